"""Checkpoints of sharded states: each rank writes its own part, and any number of ranks can read them.

    folder/step-000000300/rank-0-of-4.safetensors … rank-3-of-4.safetensors, index.json

A part is a file of `checkpoint`, which holds its own SHA-256.  The index, written last, names the parts and their
digests: a folder without one is a save that never finished, and counts for nothing.  All ranks see one folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel_course import checkpoint
from bigmodel_course.checkpoint import CheckpointError
from bigmodel_course.distributed.sharded import Bucket, Sharded
from bigmodel_course.files import write_whole

__all__ = ["load_sharded", "read_whole", "save_sharded"]

T = TypeVar("T")
TEXT = 1000  # bytes of an error that the other ranks hear


def save_sharded(folder: str | Path, step: int, sharded: Sharded, *, extra: Any = None, keep: int = 2) -> None:
    """Write parameters, optimizer's states, buffers and `extra` after `step` steps; all ranks call it together.

    Each rank's `extra` is its own: whatever `checkpoint.save` can write, such as the state of a generator.  When the
    new checkpoint is good, all but the newest `keep` go.  If a rank cannot write its part, every rank gets an error,
    and the older checkpoints are as they were; so they are when ranks are killed at any moment.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"need keep >= 1 and step >= 0, got {keep=} and {step=}")
    ranks, rank = dist.get_world_size(sharded.group), dist.get_rank(sharded.group)
    attempt = _from_first(lambda: [_begin(Path(folder), step)], sharded)
    place = _place(Path(folder), step, attempt[0])
    file = place / _file(rank, ranks)
    own = _together(lambda: _written(file, _state(sharded, extra)), sharded, f"write its part of step {step}")
    digests = torch.empty(ranks * 32, dtype=torch.uint8, device=_device(sharded))
    dist.all_gather_single(
        digests, torch.frombuffer(bytearray.fromhex(own), dtype=torch.uint8).to(digests), sharded.group
    )
    found = [bytes(row).hex() for row in digests.view(ranks, 32).tolist()]
    index = {"step": step, "ranks": ranks, "buckets": _layout(sharded), "aliases": _aliases(sharded), "digests": found}
    _together(lambda: rank or _finish(Path(folder), place, index, keep), sharded, f"finish the save of step {step}")


def load_sharded(folder: str | Path, sharded: Sharded, *, step: int | None = None) -> tuple[int, Any] | None:
    """Take over the newest finished checkpoint, or that of `step`; return (step, extra), or None where there is none.

    All ranks call it together; their number, and the stage, may be others than when it was saved, the units may not.
    With the same number the run goes on bit for bit.  Otherwise buffers and `extra` are those that rank 0 had.
    CheckpointError, on every rank, when a part or the index is missing, damaged or of another model: nothing has
    changed then.
    """
    found = _from_first(lambda: _newest(Path(folder), step), sharded)
    if found[0] < 0:
        return None
    place = _place(Path(folder), *found)
    part = _together(lambda: _read(place, sharded), sharded, f"read its part of {place.name}")
    sharded.optimizer.load_state_dict(part.optimizer)
    for bucket, values in zip(sharded.buckets, part.shards, strict=True):
        bucket.shard.data.copy_(values)
    sharded.refresh()
    for name, buffer in sharded.model.named_buffers():
        buffer.copy_(part.buffers[name])
    return found[0], part.extra


def read_whole(folder: str | Path, *, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The model's whole state from the newest finished checkpoint, or that of `step`; needs no process group.

    (step, state): for `load_state_dict` of the model before it was sharded.  CheckpointError as for `load_sharded`.
    """
    found = _newest(Path(folder), step)
    if found[0] < 0:
        raise CheckpointError(f"{folder} holds no finished checkpoint")
    place = _place(Path(folder), *found)
    index = _index(place)
    parts = [_part(place, index, rank) for rank in range(index["ranks"])]
    state = dict(parts[0]["buffers"])
    for i, bucket in enumerate(index["buckets"]):
        flat, start = torch.cat([part["buckets"][i]["shard"] for part in parts]), 0
        for name, shape in zip(bucket["names"], bucket["shapes"], strict=True):
            n = torch.Size(shape).numel()
            state[name], start = flat[start : start + n].view(shape).clone(), start + n
    return found[0], state | {alias: state[name] for alias, name in index["aliases"].items()}


class _Part(NamedTuple):
    """What a rank takes over."""

    shards: list[Tensor]
    optimizer: dict[str, Any]
    buffers: dict[str, Tensor]
    extra: Any


def _place(folder: Path, step: int, attempt: int) -> Path:
    """A second save of the same step does not touch the first: it gets a folder of its own."""
    return folder / (f"step-{step:09d}" + (f".{attempt}" if attempt else ""))


def _file(rank: int, ranks: int) -> str:
    return f"rank-{rank}-of-{ranks}.safetensors"


def _places(folder: Path) -> list[tuple[int, int]]:
    """(step, attempt) of every folder, newest first."""
    names = (re.fullmatch(r"step-(\d{9,})(?:\.(\d+))?", path.name) for path in folder.glob("step-*"))
    return sorted(((int(m[1]), int(m[2] or 0)) for m in names if m), reverse=True)


def _newest(folder: Path, step: int | None) -> list[int]:
    found = [p for p in _places(folder) if step in (None, p[0]) and (_place(folder, *p) / "index.json").exists()]
    if not found and step is not None:
        raise CheckpointError(f"{folder} holds no finished checkpoint of step {step}: there is no index.json for it")
    return list(found[0]) if found else [-1, -1]


def _begin(folder: Path, step: int) -> int:
    attempt = max((a for s, a in _places(folder) if s == step), default=-1) + 1
    _place(folder, step, attempt).mkdir(parents=True)
    return attempt


def _written(file: Path, state: Any) -> str:
    """Write a part; its digest, as it stands in the file."""
    checkpoint.save(file, state)
    with safetensors.safe_open(file, "pt") as opened:
        return opened.metadata()["sha256"]


def _state(sharded: Sharded, extra: Any) -> dict[str, Any]:
    states = sharded.optimizer.state
    return {
        "buckets": [{"shard": b.shard, "state": dict(states.get(b.shard, {}))} for b in sharded.buckets],
        "groups": sharded.optimizer.state_dict()["param_groups"],
        "buffers": dict(sharded.model.named_buffers()),
        "extra": extra,
    }


def _layout(sharded: Sharded) -> list[dict[str, Any]]:
    """What lies where in the flat vectors: it must be the same when they are read."""
    return [
        {"names": b.names, "shapes": [list(s) for s in b.shapes], "dtype": str(b.shard.dtype)} for b in sharded.buckets
    ]


def _aliases(sharded: Sharded) -> dict[str, str]:
    """The other names of tied parameters."""
    first = {id(p): name for bucket in sharded.buckets for name, p in zip(bucket.names, bucket.params, strict=True)}
    names = sharded.model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in names if name != first[id(p)]}


def _finish(folder: Path, place: Path, index: dict[str, Any], keep: int) -> None:
    """Write the index: from then on the checkpoint counts.  Then remove what is old or was never finished."""
    text = json.dumps(index)
    whole = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "index": text})
    write_whole(place / "index.json", whole.encode())
    for path in (place, folder):
        checkpoint.sync_folder(path)
    finished = [p for p in _places(folder) if (_place(folder, *p) / "index.json").exists()]
    for old in set(_places(folder)) - set(finished[:keep]):
        (_place(folder, *old) / "index.json").unlink(missing_ok=True)  # first: half a checkpoint must not count
        shutil.rmtree(_place(folder, *old))


def _index(place: Path) -> dict[str, Any]:
    path = place / "index.json"
    try:
        outer = json.loads(path.read_text())
        if hashlib.sha256(outer["index"].encode()).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{path} is damaged: its content does not give the SHA-256 written in it")
        return json.loads(outer["index"])
    except (OSError, LookupError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is missing or not an index of this course: {error!r}") from error


def _part(place: Path, index: dict[str, Any], rank: int) -> dict[str, Any]:
    """The part that `rank` wrote, if it is whole and belongs to this index."""
    path = place / _file(rank, index["ranks"])
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the checkpoint has {index['ranks']} parts, and all are needed")
    state = checkpoint.load(path)
    with safetensors.safe_open(path, "pt") as file:
        if file.metadata()["sha256"] != index["digests"][rank]:
            raise CheckpointError(f"{path} is not the part that index.json names: it comes from another save")
    return state


def _read(place: Path, sharded: Sharded) -> _Part:
    """This rank's part of the checkpoint, from all the parts that hold some of it."""
    index, ranks, rank = _index(place), dist.get_world_size(sharded.group), dist.get_rank(sharded.group)
    for saved, own in zip(index["buckets"], _layout(sharded), strict=False):
        if saved != own:
            raise CheckpointError(f"{place} is of another model or other units: it holds {saved}, the model has {own}")
    if len(index["buckets"]) != len(sharded.buckets):
        counts = f"{len(index['buckets'])} buckets, the model {len(sharded.buckets)}"
        raise CheckpointError(f"{place} is of another model or other units: it has {counts}")
    home = rank if ranks == index["ranks"] else 0  # whose buffers and extra
    needed = {old for b in sharded.buckets for old in range(index["ranks"]) if _overlap(b, old, index["ranks"])}
    shards = [torch.zeros_like(b.shard) for b in sharded.buckets]
    states: list[dict[str, Any]] = [{} for _ in sharded.buckets]
    for old in sorted(needed | {home}):
        part = _part(place, index, old)
        for i, bucket in enumerate(sharded.buckets):
            _take(bucket, part["buckets"][i], (old, index["ranks"]), shards[i], states[i])
        if old == home:
            kept = part
    return _Part(shards, _packed(sharded, kept["groups"], states), kept["buffers"], kept["extra"])


def _overlap(bucket: Bucket, old: int, ranks: int) -> tuple[int, int] | None:
    """The places in the flat vector that this rank holds now and rank `old` of `ranks` held then."""
    size = -(-bucket.length // ranks)
    start = max(bucket.rank * bucket.size, old * size)
    end = min((bucket.rank + 1) * bucket.size, (old + 1) * size, bucket.length)
    return (start, end) if start < end else None


def _take(bucket: Bucket, saved: dict[str, Any], source: tuple[int, int], shard: Tensor, state: dict[str, Any]) -> None:
    """Copy what one old part holds of this rank's shard and of the states shaped like it; other states are equal."""
    places = _overlap(bucket, *source)
    old_size = len(saved["shard"])
    here, there = bucket.rank * bucket.size, source[0] * old_size
    for key, value in [(None, saved["shard"]), *saved["state"].items()]:
        if isinstance(value, Tensor) and value.shape == (old_size,):
            target = shard if key is None else state.setdefault(key, value.new_zeros(bucket.size))
            if places:
                start, end = places
                target[start - here : end - here] = value[start - there : end - there].to(target.device)
        else:
            state.setdefault(key, value)


def _packed(sharded: Sharded, groups: list[dict[str, Any]], states: list[dict[str, Any]]) -> dict[str, Any]:
    """A state_dict for the optimizer, by the numbers that its parameters have there."""
    own = sharded.optimizer.state_dict()["param_groups"]
    if [group["params"] for group in own] != [group["params"] for group in groups]:
        raise CheckpointError(f"the optimizer has {len(own)} groups that do not match the {len(groups)} saved ones")
    shards = [p for group in sharded.optimizer.param_groups for p in group["params"]]
    numbers = {id(p): n for p, n in zip(shards, (n for group in own for n in group["params"]), strict=True)}
    pairs = zip(sharded.buckets, states, strict=True)
    return {"state": {numbers[id(b.shard)]: s for b, s in pairs if b.trainable and s}, "param_groups": groups}


def _device(sharded: Sharded) -> torch.device:
    return sharded.buckets[0].shard.device


def _together(work: Callable[[], T], sharded: Sharded, what: str) -> T:
    """Do `work` on every rank; if one fails, all do: that one with its own error, the others by quoting it."""
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    good = torch.empty(dist.get_world_size(sharded.group), dtype=torch.int64, device=_device(sharded))
    dist.all_gather_single(good, good.new_tensor([error is None]), sharded.group)
    if not good.all():
        first = good.tolist().index(0)
        said = torch.frombuffer(bytearray(str(error).encode()[:TEXT].ljust(TEXT)), dtype=torch.uint8).to(good.device)
        dist.broadcast(said, group=sharded.group, group_src=first)
        said = bytes(said.tolist()).decode(errors="replace").strip()
        raise error or CheckpointError(f"rank {first} of {len(good)} could not {what}; nothing has changed: {said}")
    return result


def _from_first(work: Callable[[], list[int]], sharded: Sharded) -> list[int]:
    """What `work` gives on the group's first rank, at most two numbers, on all ranks."""
    first = dist.get_rank(sharded.group) == 0
    found = _together(lambda: work() if first else [], sharded, "look into the folder")
    numbers = torch.tensor([*found, 0, 0][:2], dtype=torch.int64, device=_device(sharded))
    dist.broadcast(numbers, group=sharded.group, group_src=0)
    return numbers.tolist()
