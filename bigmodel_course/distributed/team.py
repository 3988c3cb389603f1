"""A rank's view of its group: who it is, how it reaches the others, and whether they all mean the same call."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

__all__ = ["Team", "team"]


class Team(NamedTuple):
    """This rank's place in a group of `size`, counted within the group, and messages to its other ranks."""

    rank: int
    size: int
    group: Any = None

    def send(self, x: Tensor, to: int) -> dist.Work:
        """Start to send; `wait()` ends when `x` may be changed."""
        return dist.isend(x, group=self.group, group_dst=to)

    def receive(self, x: Tensor, source: int) -> dist.Work:
        """Start to receive into `x`; `wait()` ends when it is there."""
        return dist.irecv(x, group=self.group, group_src=source)

    def exchange(self, x: Tensor, to: int, into: Tensor, source: int) -> None:
        """Send `x` and receive `into` at once; neither waits for the other (NCCL needs the two in one batch)."""
        calls = [(dist.isend, x, to), (dist.irecv, into, source)]
        ops = [dist.P2POp(op, t, group=self.group, group_peer=peer) for op, t, peer in calls if t.numel()]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    def check_rank(self, name: str, rank: int) -> None:
        """Refuse what is not a rank of the group."""
        if not (isinstance(rank, int) and 0 <= rank < self.size):
            raise ValueError(f"{name} must be a rank within the group, 0 to {self.size - 1}, got {rank!r}")

    def agree(self, facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Raise the same ValueError on every rank where they differ in one of the `facts`; return those of all."""
        return self.gather(facts, keys=tuple(facts))

    def gather(self, facts: Mapping[str, Any], *, keys: tuple[str, ...] = ()) -> list[Mapping[str, Any]]:
        """The `facts` of every rank, in rank order; those under `keys` must be the same everywhere."""
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, dict(facts), group=self.group)
        for key in keys:
            values = [one.get(key) for one in said]
            if any(value != values[0] for value in values):
                told = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                raise ValueError(f"every rank must make the same call: {key} is {told}")
        return said


def team(group: Any = None) -> Team:
    """The place of this rank in `group` (None: all ranks)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"group must hold the calling rank; rank {dist.get_rank()} is not one of its members")
    return Team(rank, size, group)
