"""Lesson 45, pipeline parallel: the order of one rank, a silent fault to find, a schedule within a memory bound."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.distributed import pipeline_schedules as schedules
from bigmodel_course.distributed.pipeline import run
from bigmodel_course.distributed.pipeline_schedules import Op
from bigmodel_course.distributed.pipeline_stages import split_gpt
from bigmodel_course.models import GPT

__all__ = ["find_the_bug", "order_of_a_rank", "step_with_a_fault", "within_memory"]

Pairs = list[tuple[str, int]]


def _in_turn(microbatches: int, ahead: int) -> Pairs:
    ahead = max(0, min(ahead, microbatches))
    forward, backward = [[(kind, i) for i in range(microbatches)] for kind in "FB"]
    steady = [op for pair in zip(forward[ahead:], backward, strict=False) for op in pair]
    return forward[:ahead] + steady + backward[microbatches - ahead :]


def _ours(rank: int, ranks: int, microbatches: int) -> Pairs:
    return _in_turn(microbatches, ranks - 1 - rank)


def _never_drained(rank: int, ranks: int, microbatches: int) -> Pairs:
    return _ours(rank, ranks, microbatches)[: 2 * microbatches - min(ranks - 1 - rank, microbatches)]


def _last_first(rank: int, ranks: int, microbatches: int) -> Pairs:
    """Backward passes in the opposite order, as soon as they are possible."""
    live: list[int] = []
    found = []
    for kind, i in _ours(rank, ranks, microbatches):
        if kind == "F":
            live.append(i)
        found.append((kind, i if kind == "F" else live.pop()))
    return found


def _backward_before(rank: int, ranks: int, microbatches: int) -> Pairs:
    """In the steady part the backward pass stands first."""
    ops = _ours(rank, ranks, microbatches)
    ahead = min(ranks - 1 - rank, microbatches)
    steady = ops[ahead : 2 * microbatches - ahead]
    turned = [op for pair in zip(steady[1::2], steady[::2], strict=True) for op in pair]
    return ops[:ahead] + turned + ops[2 * microbatches - ahead :]


order_of_a_rank = Exercise(
    name="45.1",
    solution=_ours,
    trials=((0, 4, 8), (3, 4, 8), (1, 4, 3), (0, 3, 2), (0, 1, 2)),
    labels=("rank", "ranks", "microbatches"),
    mistakes=(
        Mistake(
            lambda rank, ranks, microbatches: _in_turn(microbatches, ranks - rank),
            "One forward pass too many ahead: the last rank goes back at once, so rank r runs p − 1 − r ahead.",
        ),
        Mistake(
            lambda rank, ranks, microbatches: _in_turn(microbatches, rank),
            "The wrong way round: it is the first rank that must fill all the others.",
        ),
        Mistake(
            lambda rank, ranks, microbatches: _in_turn(microbatches, ranks - 1),
            "Every rank runs equally far ahead: a later rank has fewer below it to fill.",
        ),
        Mistake(
            lambda rank, ranks, microbatches: _in_turn(microbatches, microbatches),
            "That is GPipe: all forwards, then all backwards.",
        ),
        Mistake(
            lambda rank, ranks, microbatches: _in_turn(microbatches, 0),
            "Nothing runs ahead: each microbatch goes forward and back before the next one.",
        ),
        Mistake(_never_drained, "The backward passes of the last microbatches are missing: drain the pipe."),
        Mistake(
            _last_first, "You take back the newest microbatch first: the gradient that arrives is that of the oldest."
        ),
        Mistake(_backward_before, "In turn means forward first: the backward pass you wait for may need it."),
        Mistake(
            lambda rank, ranks, microbatches: [(kind, i + 1) for kind, i in _ours(rank, ranks, microbatches)],
            "Microbatches count from 0.",
        ),
    ),
    remark="fill, alternate, drain; at most p − r microbatches are held.",
)


def step_with_a_fault(gpt: GPT, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """One step of a pipeline on 2 ranks: this rank's gradients by name. Something in it is silently wrong."""
    stages = split_gpt(gpt, 2)[dist.get_rank()]

    def loss(scores: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), tokens.flatten())

    run(schedules.one_f_one_b(2, len(inputs)), stages, inputs, targets, loss)
    table = stages[0].tokens.weight.grad
    if dist.get_rank() == 1:
        dist.send(table, 0)
    else:
        other = table.clone()
        dist.recv(other, 1)
        table += other
    return {name: p.grad for stage in stages for name, p in stage.named_parameters()}


TABLE = "tokens.weight"

find_the_bug = Exercise(
    name="45.2",
    solution=lambda: (1, TABLE, "not summed"),
    trials=((),),
    mistakes=(
        Mistake(
            lambda: (0, TABLE, "not summed"),
            "The right parameter and fault. On which rank does its gradient differ from that of one process?",
        ),
        Mistake(
            lambda: (1, TABLE, "missing"),
            "The right place. Is there no gradient at all, or one that lacks a part?",
        ),
        Mistake(
            lambda: (1, TABLE, "summed twice"),
            "The right place. Add the gradient of the *other* use once more: do you come closer to `right` or not?",
        ),
        Mistake(
            lambda: (1, TABLE, "sum for mean"),
            "A sum for a mean would be off by the factor m, in every parameter. Is the ratio constant?",
        ),
        Mistake(
            lambda: (1, TABLE, "last microbatch only"),
            "Then every parameter of the stage would be wrong. Are the others?",
        ),
        Mistake(
            lambda: (0, TABLE, "summed twice"),
            "Rank 0's table is as in one process. Compare rank 1's.",
        ),
        Mistake(
            lambda: (1, "norm.weight", "sum for mean"),
            "The last norm's gradient is right to the bit: compare each name with `right`.",
        ),
    ),
    remark="the table's part from rank 1 reached rank 0, but not the other way: after one step the copies differ.",
)

Lists = list[Pairs]


def _as_schedule(lists: Any) -> schedules.Schedule:
    return tuple(tuple(Op(*op) for op in ops) for ops in lists)


def _pairs(schedule: schedules.Schedule) -> Lists:
    return [[(op.kind, op.microbatch) for op in ops] for ops in schedule]


def _first_come(ranks: int, microbatches: int, limit: int) -> Lists:
    """Whatever can start first, a backward pass if both can; a forward pass only where there is memory."""
    lists: Lists = [[] for _ in range(ranks)]
    end: dict[tuple, int] = {}
    free = [0] * ranks
    while any(len(ops) < 2 * microbatches for ops in lists):
        choices = []
        for rank, ops in enumerate(lists):
            forwards = sum(kind == "F" for kind, _ in ops)
            backwards = len(ops) - forwards
            came = 0 if rank == 0 else end.get(("F", rank - 1, forwards))
            if forwards < min(microbatches, backwards + limit) and came is not None:
                choices.append((max(free[rank], came), 1, rank, "F", forwards))
            back = ("F", rank, backwards) if rank == ranks - 1 else ("B", rank + 1, backwards)
            if backwards < forwards and back in end:
                choices.append((max(free[rank], end[back]), 0, rank, "B", backwards))
        start, _, rank, kind, i = min(choices)
        lists[rank].append((kind, i))
        end[kind, rank, i] = free[rank] = start + (1 if kind == "F" else 2)
    return lists


def _allowed(lists: Lists, ranks: int, microbatches: int, limit: int) -> str | None:
    if not isinstance(lists, (list, tuple)) or len(lists) != ranks:
        return f"return {ranks} lists, one for each rank"
    schedule = _as_schedule(lists)
    try:
        schedules.check_legal(schedule)
    except ValueError as error:
        return str(error)
    if len(schedule[0]) != 2 * microbatches:
        return f"rank 0 has {len(schedule[0])} operations for {microbatches} microbatches, expected {2 * microbatches}"
    rank, peak = max(enumerate(schedules.peak_live(schedule)), key=lambda pair: pair[1])
    return None if peak <= limit else f"rank {rank} holds {peak} microbatches at once, allowed {limit}"


def _step_time(answer: Callable[..., Lists]) -> float:
    return schedules.makespan(schedules.timeline(_as_schedule(answer(4, 8, 2))))


def _greedy_forward(ranks: int, microbatches: int, limit: int) -> Lists:
    return [_in_turn(microbatches, limit) for _ in range(ranks)]


within_memory = Exercise(
    name="45.3",
    solution=_first_come,
    accept=_allowed,
    trials=((2, 4, 2), (4, 8, 3), (4, 8, 2), (3, 5, 1)),
    labels=("ranks", "microbatches", "limit"),
    mistakes=(
        Mistake(
            lambda ranks, microbatches, limit: _pairs(schedules.gpipe(ranks, microbatches)),
            "GPipe holds every microbatch at once.",
        ),
        Mistake(
            lambda ranks, microbatches, limit: _pairs(schedules.one_f_one_b(ranks, microbatches)),
            "1F1B holds up to p − r microbatches, whatever the limit: run at most limit − 1 ahead.",
        ),
        Mistake(
            _greedy_forward,
            "With `limit` forward passes ahead, the next one is too many: the backward pass stands after it.",
        ),
        Mistake(
            lambda ranks, microbatches, limit: _pairs(schedules.one_f_one_b(ranks, microbatches))[::-1],
            "The ranks are turned round: the list of rank 0 comes first.",
        ),
        Mistake(
            lambda ranks, microbatches, limit: [
                [(kind, i) for i in range(microbatches) for kind in ("F", "B")][:: 1 if rank % 2 == 0 else -1]
                for rank in range(ranks)
            ],
            "A backward pass stands before its forward pass, which makes what it needs.",
        ),
        Mistake(
            lambda ranks, microbatches, limit: _in_turn(microbatches, limit - 1),
            "One list is not enough: return a list of lists, one for each rank.",
        ),
        Mistake(
            lambda ranks, microbatches, limit: [_in_turn(limit, limit - 1) for _ in range(ranks)],
            "Only `limit` microbatches are done: all of them must be, a few at a time.",
        ),
        Mistake(
            lambda ranks, microbatches, limit: [
                [
                    op
                    for i in (range(microbatches) if rank % 2 == 0 else range(microbatches)[::-1])
                    for op in (("F", i), ("B", i))
                ]
                for rank in range(ranks)
            ],
            "Two ranks begin with different microbatches, and each waits for the other's.",
        ),
    ),
    remark="no rank holds more than it may, and none waits without need.",
    score=Score(_step_time, "forward passes", _step_time(_first_come)),
)
