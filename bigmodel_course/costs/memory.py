"""What a rank holds and sends when training states are sharded (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054).

Stage 0 is plain data parallelism: each rank holds everything.  Stage 1 shards the optimizer's states over the ranks,
stage 2 the gradients too, stage 3 the parameters too.  `units` is the number of parameters that are gathered and
reduced together, one number for each unit; a rank's shard of a unit is rounded up to a whole number.
"""

from collections.abc import Sequence
from typing import NamedTuple

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.training import optimizer_bytes

__all__ = [
    "RankBytes",
    "sharded_bytes",
    "sharded_sent_bytes",
    "temporary_bytes",
]


class RankBytes(NamedTuple):
    """Bytes on one rank, by kind."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self)


def sharded_bytes(
    units: int | Sequence[int],
    ranks: int,
    stage: int,
    *,
    rule: str = "Adam",
    bytes_each: int = 4,
    mixed: bool = False,
) -> RankBytes:
    """What each rank keeps between the backward pass and the step: parameters, gradients, optimizer's states.

    With `mixed`, as in the paper's section 3.1: parameters and gradients in 2 bytes, and with the optimizer's states a
    copy of the parameters, all in 4.  With Adam that is 2 + 2 + 12 bytes a parameter on one rank.
    """
    units = _counts(units, ranks, stage)
    whole, shard = sum(units), sum(-(-n // ranks) for n in units)
    held = [shard if stage >= first else whole for first in (3, 2, 1)]  # parameters, gradients, states
    small = 2 if mixed else bytes_each
    states = optimizer_bytes(held[2], rule, 4 if mixed else bytes_each) + (4 * held[2] if mixed else 0)
    return RankBytes(small * held[0], small * held[1], states)


def temporary_bytes(
    units: int | Sequence[int], ranks: int, stage: int, *, root: int = 0, largest: int = 0, bytes_each: int = 4
) -> int:
    """The most that a backward pass needs besides: one unit at a time and the root are whole.

    `units` are without the `root`, the parameters that belong to no unit and stay whole from forward to backward.  At
    stage 2 the root and a unit hold their whole gradients, at stage 3 also their whole parameters.  `largest`: the
    parameters of the largest tensor, whose gradient arrives before its place in the unit is filled (stages 1 to 3).
    """
    units = _counts(units, ranks, stage)
    at_least(0, root=root, largest=largest)
    in_flight = [-(-n // ranks) * ranks for n in (max(units), root)]
    return bytes_each * (max(stage - 1, 0) * sum(in_flight) + (largest if stage else 0))


def sharded_sent_bytes(
    units: int | Sequence[int],
    ranks: int,
    stage: int,
    *,
    microbatches: int = 1,
    root: int = 0,
    bytes_each: int = 4,
) -> int:
    """What each rank sends in one step, with ring collectives; a unit once around is (ranks - 1) shards.

    Stages 0 and 1: gradients once (reduce-scatter), parameters or gradients once (all-gather), for all microbatches
    together.  Stage 2: gradients for each microbatch.  Stage 3: for each microbatch the gradients and the parameters
    twice, before forward and before backward; those of the `root` once.
    """
    units = _counts(units, ranks, stage)
    at_least(1, microbatches=microbatches)
    at_least(0, root=root)
    around, around_root = (sum(-(-n // ranks) for n in part) * (ranks - 1) for part in (units, [root]))
    times, times_root = {2: (1 + microbatches,) * 2, 3: (3 * microbatches, 2 * microbatches)}.get(stage, (2, 2))
    return bytes_each * (times * around + times_root * around_root)


def _counts(units: int | Sequence[int], ranks: int, stage: int) -> list[int]:
    counts = [units] if isinstance(units, int) else list(units)
    at_least(1, ranks=ranks)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"need a stage among 0, 1, 2, 3, got {stage=}")
    if not counts or min(counts) < 0:
        raise ValueError(f"need units that count parameters, got {units=}")
    return counts
