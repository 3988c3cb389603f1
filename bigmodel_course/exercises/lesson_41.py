"""Lesson 41, processes and collectives: a hop of the ring, a scan, a silent fault, the fewest bytes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.distributed.collectives import all_gather, all_reduce_, count_bytes
from bigmodel_course.distributed.launch import launch

__all__ = ["FAULTS", "hop_of_the_ring", "least_squares", "running_sum", "suspect", "suspect_all_reduce_"]

RANKS = 4
FAULTS = (
    "it returns the mean",
    "the tail is never added",
    "a hop is missing",
    "the ranks end with different numbers",
    "one rank is counted twice",
)


def _on_ranks(answer: Callable, *columns: list) -> list | None:
    """What each of four real ranks returns for its entry of every column; None where none returned anything."""
    results = launch(_one_rank, RANKS, answer, columns, timeout=60)
    return None if all(result is None or result is ... for result in results) else results


def _one_rank(answer: Callable, columns: tuple) -> Any:
    return answer(*(column[dist.get_rank()] for column in columns))


_known = cache(lambda answer, key: _on_ranks(answer, *TRIALS[key]))  # a launch takes time, and ours never change


def _use(key: str) -> Callable:
    def use(answer: Callable, *columns: list) -> list | None:
        return _known(answer, key) if getattr(answer, "__module__", "") == __name__ else _on_ranks(answer, *columns)

    return use


def _hop(me: int, size: int, hop: int) -> tuple:
    return (me - 1 - hop) % size, (me - 2 - hop) % size, hop < size - 1


hop_of_the_ring = Exercise(
    name="41.1",
    solution=_hop,
    trials=((0, 4, 0), (2, 4, 1), (1, 4, 2), (3, 4, 3), (0, 4, 5), (4, 5, 3), (1, 2, 1)),
    labels=("me", "size", "hop"),
    mistakes=(
        Mistake(
            lambda me, size, hop: ((me - hop) % size, (me - 1 - hop) % size, hop < size - 1),
            "That ring starts with chunk me, so rank me ends with chunk me + 1. Ours starts one to the left.",
        ),
        Mistake(
            lambda me, size, hop: (_hop(me, size, hop)[1], _hop(me, size, hop)[0], hop < size - 1),
            "You swapped the two: a rank sends what came in the hop before.",
        ),
        Mistake(
            lambda me, size, hop: (*_hop(me, size, hop)[:2], hop < size),
            "Only n − 1 hops add: each chunk needs n − 1 additions to hold n vectors.",
        ),
        Mistake(
            lambda me, size, hop: (*_hop(me, size, hop)[:2], True),
            "In the second half complete chunks go round: they replace, or a vector would be counted twice.",
        ),
        Mistake(
            lambda me, size, hop: (me - 1 - hop, me - 2 - hop, hop < size - 1),
            "Chunks count from 0 to n − 1: take the number modulo n.",
        ),
        Mistake(
            lambda me, size, hop: ((me + 1 + hop) % size, (me + 2 + hop) % size, hop < size - 1),
            "That ring runs the other way: here messages go to the right, so chunks come from the left.",
        ),
    ),
    remark="what comes in one hop goes out in the next.",
)


def _scan(x: Tensor) -> Tensor:
    me, size = dist.get_rank(), dist.get_world_size()
    total = x.clone()
    if me > 0:
        dist.recv(total, me - 1)
        total += x
    if me + 1 < size:
        dist.send(total, me + 1)
    return total


def _only_neighbours(x: Tensor) -> Tensor:
    me, size, before = dist.get_rank(), dist.get_world_size(), torch.zeros_like(x)
    if me > 0:
        dist.recv(before, me - 1)
    if me + 1 < size:
        dist.send(x, me + 1)
    return x + before


def _from_the_right(x: Tensor) -> Tensor:
    me, size, total = dist.get_rank(), dist.get_world_size(), x.clone()
    if me + 1 < size:
        dist.recv(total, me + 1)
        total += x
    if me > 0:
        dist.send(total, me - 1)
    return total


def _overwritten(x: Tensor) -> Tensor:
    me, size, total = dist.get_rank(), dist.get_world_size(), x.clone()
    if me > 0:
        dist.recv(total, me - 1)
    if me + 1 < size:
        dist.send(total, me + 1)
    return total


def _returned_nothing_at_first(x: Tensor) -> Tensor | None:
    total = _scan(x)
    return total if dist.get_rank() == dist.get_world_size() - 1 else None


VECTORS = [torch.tensor([1.0, 5.0, -2.0]), torch.tensor([10.0, 2.0, 0.5]), torch.tensor([100.0, 3.0, 7.0])]
VECTORS += [torch.tensor([1000.0, -4.0, 0.25])]

running_sum = Exercise(
    name="41.2",
    solution=_scan,
    use=_use("scan"),
    trials=((VECTORS,),),
    labels=("x of each rank",),
    mistakes=(
        Mistake(lambda x: all_reduce_(x.clone()), "That is the sum over all ranks: rank r wants those up to r only."),
        Mistake(lambda x: _scan(x) - x, "You leave out the rank itself: rank r's own x belongs to its sum."),
        Mistake(_only_neighbours, "You pass on x itself: pass on the sum so far, or only two ranks are in it."),
        Mistake(_from_the_right, "Your sum runs from the last rank down: rank 0 should end with its own x alone."),
        Mistake(_overwritten, "What came has replaced your own numbers: receive into another tensor, then add."),
        Mistake(_returned_nothing_at_first, "Every rank returns its sum, not only the last one."),
        Mistake(lambda x: x.clone(), "No rank has heard of another: rank r must receive from r − 1 first."),
    ),
    remark="each rank waits for one message and sends one; with n ranks the last one waits for n − 1.",
)


def suspect_all_reduce_(x: Tensor) -> Tensor:
    """A ring all-reduce with a silent fault: find it by what it does."""
    me, size = dist.get_rank(), dist.get_world_size()
    share = len(x) // size
    chunks = [x[i * share : (i + 1) * share] for i in range(size)]
    for hop in range(2 * size - 2):
        out, mine = chunks[(me - 1 - hop) % size], chunks[(me - 2 - hop) % size]
        theirs = torch.empty_like(mine)
        sending = dist.isend(out, (me + 1) % size)
        dist.recv(theirs, (me - 1) % size)
        sending.wait()
        mine.copy_(mine + theirs if hop < size - 1 else theirs)
    return x


def _finding() -> tuple[str, int]:
    return FAULTS[1], 8


suspect = Exercise(
    name="41.3",
    solution=_finding,
    trials=((),),
    mistakes=(
        Mistake(
            lambda: (FAULTS[0], 0),
            "Print the result beside that of dist.all_reduce: where it is wrong, is it a mean of anything?",
        ),
        Mistake(
            lambda: (FAULTS[3], 8),
            "The ranks do differ there. But why? Compare what rank r has at position 8 with what it had before.",
        ),
        Mistake(lambda: (FAULTS[2], 8), "With a hop missing, 8 numbers would be wrong too. They are right."),
        Mistake(
            lambda: (FAULTS[4], 8),
            "A rank counted twice would make sums too large. What is at position 8 on each rank?",
        ),
        Mistake(lambda: (FAULTS[1], 9), "An earlier position is wrong too: 10 numbers on 4 ranks leave over two."),
        Mistake(lambda: (FAULTS[1], 2), "The position in the vector, counted from 0, not how many are wrong."),
        Mistake(lambda: (FAULTS[1], 10), "Positions count from 0: the last one is 9."),
        Mistake(lambda: FAULTS[1], "The fault is right. Return the position too, as a pair."),
    ),
    remark="10 // 4 is 2, so positions 8 and 9 stay as they were, on every rank another value: replicas drift apart.",
)


def _rows() -> tuple[list[Tensor], list[Tensor]]:
    """Unequal parts of one table; the rows of each rank follow a slope of their own."""
    rng = torch.Generator().manual_seed(41)
    x = [torch.randn(n, 8, dtype=torch.float64, generator=rng) * (1 + r) for r, n in enumerate((12, 40, 20, 30))]
    own = torch.randn(RANKS, 8, dtype=torch.float64, generator=rng)
    y = [
        x_r @ own_r + torch.randn(len(x_r), dtype=torch.float64, generator=rng)
        for x_r, own_r in zip(x, own, strict=True)
    ]
    return x, y


X, Y = _rows()
TRIALS = {"scan": (VECTORS,), "squares": (X, Y)}


def _solved(sums: Tensor) -> Tensor:
    return torch.linalg.solve(sums[:, :8], sums[:, 8])


def _sums(x: Tensor, y: Tensor) -> Tensor:
    return x.T @ torch.cat([x, y[:, None]], dim=1)


def _from_triangle(x: Tensor, y: Tensor) -> Tensor:
    i, j = torch.triu_indices(8, 8)
    packed = all_reduce_(torch.cat([(x.T @ x)[i, j], x.T @ y]))
    square = packed.new_zeros(8, 8)
    square[i, j] = square[j, i] = packed[:36]
    return torch.linalg.solve(square, packed[36:])


def _with_mean(x: Tensor, y: Tensor) -> Tensor:
    left, right = all_reduce_(x.T @ x), all_reduce_(x.T @ y, op="mean")
    return torch.linalg.solve(left, right)


def _at_rank_0(x: Tensor, y: Tensor) -> Tensor | None:
    sums = all_reduce_(_sums(x, y))
    return _solved(sums) if dist.get_rank() == 0 else None


def _half_reduced(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.solve(all_reduce_(x.T @ x), x.T @ y)


def _weighted(x: Tensor, y: Tensor) -> Tensor:
    """The local solutions, weighted by rows."""
    rows = all_reduce_(torch.tensor([float(len(x))], dtype=x.dtype))
    return all_reduce_(_solved(_sums(x, y)) * len(x)) / rows


def _same_rows(x: Tensor, y: Tensor) -> Tensor:
    """As many rows of each rank as the shortest has."""
    table = all_gather(torch.cat([x, y[:, None]], dim=1)[:12])
    return _solved(_sums(table[:, :8], table[:, 8]))


def _payload(answer: Callable, x: Tensor, y: Tensor) -> int:
    with count_bytes() as sent:
        answer(x, y)
    return sent.payload or sent.wire or 0  # who lets torch send is counted on the wire


def busiest(answer: Callable) -> int:
    """The most bytes that one of the ranks sends."""
    return max(launch(_count, RANKS, answer, X, Y, timeout=60))


def _count(answer: Callable, x: list[Tensor], y: list[Tensor]) -> int:
    return _payload(answer, x[dist.get_rank()], y[dist.get_rank()])


least_squares = Exercise(
    name="41.4",
    solution=_from_triangle,
    use=_use("squares"),
    trials=(TRIALS["squares"],),
    labels=("x of each rank", "y of each rank"),
    mistakes=(
        Mistake(lambda x, y: _solved(_sums(x, y)), "Each rank solved for its own rows: nothing was communicated."),
        Mistake(
            lambda x, y: all_reduce_(_solved(_sums(x, y)), op="mean"),
            "You fused sub-models: the mean of the solutions is not the solution of all rows. Add x'x and x'y instead.",
        ),
        Mistake(
            _weighted, "Weighted or not, a mean of local solutions is not the solution of all rows: add x'x and x'y."
        ),
        Mistake(_with_mean, "One side is summed and the other averaged: your solution is four times too small."),
        Mistake(_half_reduced, "x'x is of all rows, x'y of your own only: add both over the ranks."),
        Mistake(_at_rank_0, "Every rank returns the solution, not only rank 0."),
        Mistake(_same_rows, "all_gather took equally many rows of each rank: the others are lost."),
    ),
    remark="sums travel, rows stay where they are: the bytes do not depend on the number of rows.",
    score=Score(busiest, "bytes", 864),
)
