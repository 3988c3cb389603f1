"""Checkpoints that survive a crash at any moment: whole and checked, or not there.

A file is a safetensors file, so reading it runs no code.  The tensors of a nested state are numbered; everything else
stands as JSON in the file's metadata, beside the SHA-256 of the whole file with the digest's own place left at zeros.
"""

import contextlib
import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

__all__ = ["CheckpointError", "Checkpoints", "load", "save"]

MARK, BLANK = b'"sha256":"', b"0" * 64  # quotes inside the JSON are escaped, so the mark stands once in a header
HEADER_LIMIT, FILE_LIMIT = 100_000_000, 2**36  # bytes: larger files are refused before they are read


class CheckpointError(ValueError):
    """A file that cannot be trusted: cut short, changed, or not a checkpoint at all."""


def save(path: str | Path, state: Any) -> None:
    """Write `state`: tensors, numbers, strings, booleans, None, and lists, tuples and dicts of them.

    Keys of dicts are strings or whole numbers.  The bytes go to a temporary file beside `path`, to the disk, and only
    then under the name `path`: a crash at any moment leaves the old file or the new one.  TypeError names what cannot
    be written; OSError when the folder cannot be written or the disk is full, and then the old file is as it was.
    """
    path = Path(path)
    parts = _content(state)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write the checkpoint ({error.strerror}); an older one is as it was", path
        ) from error
    sync_folder(path.parent)


def load(path: str | Path) -> Any:
    """Read what `save` wrote, bit for bit, with tensors on the CPU.

    CheckpointError if a single bit of the file is not as it was written.
    """
    path = Path(path)
    with open(path, "rb") as file:
        _check(file, path)
    try:
        with safetensors.safe_open(path, "pt") as file:  # maps the file: a copy stays when the file goes
            tensors = [file.get_tensor(str(i)).clone() for i in range(len(file.keys()))]
            return _unpacked(json.loads(file.metadata()["state"]), tensors)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this course: {error}") from error


@dataclass(frozen=True)
class Checkpoints:
    """The last `keep` checkpoints of one run, in a folder of their own.

    Training saves at the end of each epoch and, where `every` is given, after so many steps.  Making a Checkpoints
    removes what a crash left unfinished, so give two runs two folders.
    """

    folder: str | Path
    keep: int = 2
    every: int | None = None

    def __post_init__(self) -> None:
        if self.keep < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"need keep >= 1 and every >= 1 or None, got keep={self.keep} and every={self.every}")
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        for leftover in Path(self.folder).glob("step-*.unfinished"):
            leftover.unlink()

    def save(self, step: int, state: Any) -> None:
        """Write the state after `step` steps; when it is safe, remove all but the newest `keep`."""
        save(Path(self.folder) / f"step-{step:09d}.safetensors", state)
        for _, old in self._files()[self.keep :]:
            old.unlink()

    def latest(self) -> tuple[int, Any] | None:
        """The newest (step, state) that is whole, with a warning for each newer one that is not; None without any."""
        for step, path in self._files():
            try:
                return step, load(path)
            except CheckpointError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
        return None

    def _files(self) -> list[tuple[int, Path]]:
        """Newest first."""
        paths = Path(self.folder).glob("step-*.safetensors")
        return sorted(((int(path.stem[5:]), path) for path in paths if path.stem[5:].isdecimal()), reverse=True)


def _content(state: Any) -> tuple[bytes, bytes, memoryview]:
    """The bytes of the file: up to the digest, the digest, the rest."""
    tensors: list[Tensor] = []
    text = json.dumps(_packed(state, tensors, "state"))
    if (size := len(text) + sum(t.nbytes for t in tensors)) > FILE_LIMIT:
        raise ValueError(f"state must have at most {FILE_LIMIT:,} bytes, got {size:,}")
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    content = safetensors.torch.save(named, {"state": text, "sha256": BLANK.decode()})
    place = content.index(MARK) + len(MARK)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:place], digest, memoryview(content)[place + len(digest) :]


def _check(file: BinaryIO, path: Path) -> None:
    """Hold the file to its own digest, before anything in it is believed."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size > FILE_LIMIT or length > min(HEADER_LIMIT, size - 8):
        raise CheckpointError(f"{path} is not a whole checkpoint: {size:,} bytes with a header of {length:,}")
    header = bytearray(file.read(length))
    place = header.find(MARK) + len(MARK)
    if place < len(MARK) or len(header) < place + len(BLANK):
        raise CheckpointError(f"{path} is not a checkpoint: it has no digest")
    digest, header[place : place + len(BLANK)] = bytes(header[place : place + len(BLANK)]), BLANK
    found = hashlib.sha256(length.to_bytes(8, "little") + header)
    while chunk := file.read(2**20):
        found.update(chunk)
    if found.hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not give the SHA-256 written in it")


def _packed(value: Any, tensors: list[Tensor], where: str) -> Any:
    """`value` as JSON: a dict says what it stands for, everything else stands for itself.  Tensors are put aside."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors.append(_owned(value, tensors))
        return {"tensor": len(tensors) - 1}
    if isinstance(value, list | tuple):
        items = [_packed(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _packed(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    raise TypeError(
        f"{where} must be tensors, numbers, strings, lists, tuples or dicts (keys: str, int), got {value!r}"
    )


def _owned(tensor: Tensor, others: list[Tensor]) -> Tensor:
    """`tensor` in memory of its own, as safetensors wants it: a copy only if it is a view or shares with another."""
    tensor = tensor.detach().cpu().contiguous()
    memory = tensor.untyped_storage()
    shared = any(memory.data_ptr() == other.untyped_storage().data_ptr() for other in others)
    return tensor.clone() if shared or memory.nbytes() != tensor.nbytes else tensor


def _unpacked(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    return {key: _unpacked(item, tensors) for key, item in content}


def sync_folder(folder: Path) -> None:
    """Bring a new name to the disk; Windows has no such call, and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
