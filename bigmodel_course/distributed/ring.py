"""The way around the ring that reduce-scatter, all-gather and all-reduce share, and what joins two tensors.

On CPU (Gloo) a chunk goes in segments, so that adding one overlaps with receiving the next; elsewhere (NCCL) it goes
whole, each send in one batch with its receive.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel_course.distributed.team import Team

__all__ = ["Path", "combining", "divided", "travel"]

SEGMENT = 2**21  # bytes of one message on the ring; from 1 to 4 MiB the speed is the same
AHEAD = 3  # receives that stand ready before their messages come

COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": Tensor.add_,
    "mean": Tensor.add_,  # and divided once, by the rank that completes the sum
    "product": Tensor.mul_,
    "max": lambda mine, theirs: torch.maximum(mine, theirs, out=mine),
    "min": lambda mine, theirs: torch.minimum(mine, theirs, out=mine),
}


def combining(op: str, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What joins two tensors of the dtype of `x`, in place."""
    if op not in COMBINE:
        raise ValueError(f"op must be one of {', '.join(COMBINE)}, got {op!r}")
    if op == "mean" and not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f'op="mean" needs a floating or complex dtype, x has {x.dtype}; take op="sum"')
    try:
        COMBINE[op](*(torch.ones(1, dtype=x.dtype, device=x.device) for _ in range(2)))
    except RuntimeError as error:
        raise TypeError(f"x must have a dtype of which torch can take the {op}, got {x.dtype}") from error
    return COMBINE[op]


def divided(op: str, total: Tensor, size: int) -> Tensor:
    """The mean from the sum, in place; with any other `op` the total as it is."""
    return total.div_(size) if op == "mean" else total


class Path(NamedTuple):
    """A way around the ring: send chunk `first`, then `hops` times hand on what came; the first `adding` hops add."""

    first: int
    adding: int
    hops: int
    op: str = "sum"


def travel(chunks: Sequence[Tensor], path: Path, us: Team) -> None:
    """In hop h chunk first - 1 - h comes from the left neighbour, and first - h goes to the right one."""
    if us.size > 1:
        (_in_segments if chunks[0].device.type == "cpu" else _in_step)(chunks, path, us)


def _in_step(chunks: Sequence[Tensor], path: Path, us: Team) -> None:
    """All ranks take one hop after the other."""
    for hop in range(path.hops):
        out, mine = chunks[(path.first - hop) % us.size], chunks[(path.first - 1 - hop) % us.size]
        landing = torch.empty_like(mine) if hop < path.adding else mine
        us.exchange(out, (us.rank + 1) % us.size, landing, (us.rank - 1) % us.size)
        _arrived(mine, landing, hop, path, us.size)


def _in_segments(chunks: Sequence[Tensor], path: Path, us: Team) -> None:
    """A segment at a time: while one is added, the next is on its way."""
    left, right = (us.rank - 1) % us.size, (us.rank + 1) % us.size
    coming = [(hop, part) for hop in range(path.hops) for part in _parts(chunks[(path.first - 1 - hop) % us.size])]
    longest = max((len(part) for hop, part in coming if hop < path.adding), default=0)
    landings = [torch.empty(longest, dtype=chunks[0].dtype) for _ in range(AHEAD)]

    def receive(i: int) -> tuple[Tensor, dist.Work]:
        hop, part = coming[i]
        landing = landings[i % AHEAD][: len(part)] if hop < path.adding else part
        return landing, us.receive(landing, left)

    ready = deque(receive(i) for i in range(min(AHEAD, len(coming))))
    sent = [us.send(part, right) for part in _parts(chunks[path.first % us.size])]
    for i, (hop, part) in enumerate(coming):
        landing, work = ready.popleft()
        work.wait()
        _arrived(part, landing, hop, path, us.size)
        if hop < path.hops - 1:
            sent.append(us.send(part, right))
        if i + AHEAD < len(coming):
            ready.append(receive(i + AHEAD))
    for work in sent:
        work.wait()


def _arrived(mine: Tensor, theirs: Tensor, hop: int, path: Path, size: int) -> None:
    if hop < path.adding:
        COMBINE[path.op](mine, theirs)
    if hop == path.adding - 1:
        divided(path.op, mine, size)


def _parts(chunk: Tensor) -> Sequence[Tensor]:
    return chunk.view(-1).split(max(1, SEGMENT // chunk.element_size())) if chunk.numel() else ()
