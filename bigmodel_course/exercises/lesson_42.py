"""Lesson 42, data parallelism: gradients on two ranks, five suspects of which four have a fault, the best buckets."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.data import Dataset, batches
from bigmodel_course.distributed.launch import launch

__all__ = ["best_buckets", "diagnosis", "right_gradient", "suspect", "whole_gradient"]

Pieces = list[tuple[Tensor, Tensor]]
Gradients = dict[str, Tensor]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    rng = _generator()
    for p in model.parameters():
        nn.init.normal_(p, generator=rng)
    return model


def _on_this_rank(answer: Callable, seed: int) -> tuple[Any, Tensor | None]:
    """What the answer returned, and the gradients and parameters that it left, side by side."""
    rng, model = _generator(seed), _small_model()
    x, y = torch.randn(9, 3, dtype=torch.float64, generator=rng), torch.randint(2, (9,), generator=rng)
    cuts = ((0, 1, 4), (4, 7, 9))[dist.get_rank()]  # pieces of 1 and 3 on one rank, of 3 and 2 on the other
    pieces = [(x[a:b], y[a:b]) for a, b in pairwise(cuts)]
    start = [p.detach().clone() for p in model.parameters()]
    result = answer(model, pieces, 9)
    grads = [p.grad for p in model.parameters()]
    moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    if all(g is None for g in grads) and not moved:
        return result, None
    shown = [torch.zeros_like(p) if g is None else g for p, g in zip(start, grads, strict=True)]
    return result, torch.cat([t.detach().flatten() for t in [*shown, *model.parameters()]])


def _on_two_ranks(answer: Callable, seed: int) -> Any:
    results = launch(_on_this_rank, 2, answer, seed)
    if all(left is None for _, left in results):
        return results[0][0]
    return [torch.zeros(1) if left is None else left for _, left in results]


_remembered = cache(_on_two_ranks)  # of our own answers only: a learner's may look at what has changed


def _use(answer: Callable, seed: int) -> Any:
    ours = getattr(answer, "__module__", "") == __name__
    return (_remembered if ours else _on_two_ranks)(answer, seed)


def _sum_(tensors: Any) -> None:
    for t in tensors:
        dist.all_reduce(t)


def _backward(model: nn.Module, pieces: Pieces, total: float) -> None:
    for x, y in pieces:
        (cross_entropy(model(x), y, reduction="sum") / total).backward()


def _right(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, total)
    _sum_(p.grad for p in model.parameters())


def _no_reduction(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, total)


def _divided_twice(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, 2 * total)
    _sum_(p.grad for p in model.parameters())


def _means_of_means(model: nn.Module, pieces: Pieces, total: int) -> None:
    for x, y in pieces:
        (cross_entropy(model(x), y) / len(pieces) / 2).backward()
    _sum_(p.grad for p in model.parameters())


def _ranks_alike(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, 2 * sum(len(x) for x, _ in pieces))
    _sum_(p.grad for p in model.parameters())


def _last_piece(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces[:-1], total)
    kept = [p.grad for p in model.parameters()]
    model.zero_grad()
    _backward(model, pieces[-1:], total)
    _sum_(p.grad for p in model.parameters())
    for p, g in zip(model.parameters(), kept, strict=True):
        p.grad += g


def _sum_after_each(model: nn.Module, pieces: Pieces, total: int) -> None:
    for piece in pieces:
        _backward(model, [piece], total)
        _sum_(p.grad for p in model.parameters())


def _not_divided(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, 1)
    _sum_(p.grad for p in model.parameters())


def _parameters(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, total)
    _sum_(p.data for p in model.parameters())


def _first_parameter(model: nn.Module, pieces: Pieces, total: int) -> None:
    _backward(model, pieces, total)
    dist.all_reduce(next(model.parameters()).grad)


whole_gradient = Exercise(
    name="42.1",
    solution=_right,
    trials=((0,),),
    use=_use,
    mistakes=(
        Mistake(_no_reduction, "Your ranks hold different gradients: sum them with dist.all_reduce."),
        Mistake(_parameters, "You reduce the parameters: reduce p.grad."),
        Mistake(_divided_twice, "Too small by the number of ranks: total already counts the examples of all ranks."),
        Mistake(_means_of_means, "A mean of the pieces' means: the pieces differ in size, so weight each by len(x)."),
        Mistake(_ranks_alike, "You weight the ranks alike: they hold 4 and 5 examples. Divide by total on both."),
        Mistake(_last_piece, "Only the last piece's gradient is summed: reduce p.grad once, when all have been added."),
        Mistake(_sum_after_each, "You sum after each piece, so what was summed before is summed again."),
        Mistake(_not_divided, "Too large by the number of examples: the loss of the batch is a mean."),
        Mistake(_first_parameter, "Only one parameter is reduced: go through all of model.parameters()."),
    ),
    remark="one reduction for all pieces, and each example counts 1/total.",
)


# Five suspects: four of them have one fault each.


class _Words(nn.Module):
    """Predicts a word from two; one matrix reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.write.weight = self.read.weight
        self.double()
        rng = _generator(1)
        for p in self.parameters():
            nn.init.normal_(p, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.read(x).mean(1))


def _text() -> Dataset:
    """27 examples; x holds two words, and behind them the number of the row."""
    words = torch.randint(6, (27, 3), generator=_generator(2))
    return Dataset(torch.cat([words[:, :2], torch.arange(27)[:, None]], 1), words[:, 2])


def _gradients(model: nn.Module, rows: Tensor, factor: float = 1.0) -> Gradients:
    data = _text()
    model.zero_grad()
    (cross_entropy(model(data.x[rows, :2]), data.y[rows]) * factor).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def suspect(letter: str) -> list[dict[str, Any]]:
    """Train as one of the ranks for three steps; `letter`: A, B, C, D or E.

    Of each step: the rows of the whole "batch" and the "rows" of this rank (int64), and by name the "weights" before
    the step, the gradients of its loss over the ranks ("local") and after the reduction ("reduced").
    """
    model, rank, ranks, record = _Words(), dist.get_rank(), dist.get_world_size(), []
    for batch in batches(_text(), 10, seed=0, epoch=0):  # of 10, 10 and 7
        rows = batch.x[:, 2]
        mine = rows.tensor_split(ranks)[0 if letter == "B" else rank]
        if letter == "D":
            mine = rows.split(len(rows) // ranks)[rank]
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        factor = 1.0 if letter in "AD" else ranks * len(mine) / len(rows)
        local = {name: g.clone() for name, g in _gradients(model, mine, factor / ranks).items()}
        for _, p in model.named_parameters(remove_duplicate=letter != "C"):
            dist.all_reduce(p.grad)
        reduced = {name: p.grad.clone() for name, p in model.named_parameters()}
        record.append({"batch": rows, "rows": mine, "weights": weights, "local": local, "reduced": reduced})
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return record


def right_gradient(step: dict[str, Any]) -> Gradients:
    """What one process would have: the gradient of the mean loss of the step's whole batch, at the step's weights."""
    model = _Words()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(step["weights"][name])
    return _gradients(model, step["batch"])


_TRUTH = {
    "A": ("not weighted", 2),
    "B": ("same rows", 0),
    "C": ("tied twice", 0),
    "D": ("row dropped", 2),
    "E": ("none", None),
}


def _but(**changed: tuple) -> Callable:
    return lambda: _TRUTH | changed


diagnosis = Exercise(
    name="42.2",
    solution=lambda: _TRUTH,
    trials=((),),
    mistakes=(
        Mistake(
            _but(A=("not weighted", 3), B=("same rows", 1), C=("tied twice", 1), D=("row dropped", 3)),
            "Count the steps from 0.",
        ),
        Mistake(
            _but(A=("row dropped", 2), D=("not weighted", 2)),
            "A and D both show at the odd batch. In one the ranks' rows do not make up the batch: which?",
        ),
        Mistake(_but(A=("none", None)), "A: the replicas agree, but compare with one process at the odd batch."),
        Mistake(_but(B=("none", None)), "B: the replicas agree, and the reduction is a mean. Look at the rows."),
        Mistake(_but(D=("none", None)), "D: join the rows of both ranks. Are they the batch, at every step?"),
        Mistake(
            _but(C=("sum for mean", 0)),
            "C: a sum for a mean would touch every parameter; here one is too large. What is special about it?",
        ),
        Mistake(_but(B=("not weighted", 0)), "B: at even batches the weights are 1. Compare the rows of the ranks."),
        Mistake(_but(E=("sum for mean", 0)), "E: compare its reduced gradients with one process: they agree."),
        Mistake(_but(A=("not weighted", 0)), "A: at which step does it first differ from one process?"),
        Mistake(_but(D=("row dropped", 0)), "D: at which step is a row first missing?"),
    ),
    remark="all four are silent: no error, and no replica differs from the other.",
)


# The best buckets for a link that carries one message at a time.


def _end(ready: list[float], sizes: list[float], counts: list[int], latency: float, rate: float) -> float:
    """When the last bucket has arrived."""
    free, first = 0.0, 0
    for count in counts:
        last = first + count
        free = max(free, ready[last - 1]) + latency + sum(sizes[first:last]) / rate
        first = last
    return free


def _best(ready: list[float], sizes: list[float], latency: float, rate: float) -> list[int]:
    """The earliest end of the first j gradients, for each j: the last bucket of them begins at the best i."""
    ends, starts = [0.0], [0]
    for j in range(1, len(ready) + 1):
        choices = [(max(ends[i], ready[j - 1]) + latency + sum(sizes[i:j]) / rate, i) for i in range(j)]
        end, start = min(choices)
        ends.append(end)
        starts.append(start)
    counts, j = [], len(ready)
    while j:
        counts.append(j - starts[j])
        j = starts[j]
    return counts[::-1]


def _by_size(ready: list[float], sizes: list[float], limit: float) -> list[int]:
    counts, filled = [0], 0.0
    for size in sizes:
        if filled >= limit:
            counts, filled = [*counts, 0], 0.0
        counts[-1] += 1
        filled += size
    return counts


def _allowed(counts: Any, ready: list[float], sizes: list[float], latency: float, rate: float) -> str | None:
    if not isinstance(counts, list) or not all(isinstance(c, int) and not isinstance(c, bool) for c in counts):
        return "return a list of whole numbers: how many gradients each bucket holds"
    if min(counts, default=0) < 1 or sum(counts) != len(ready):
        return f"the buckets must hold 1 or more each and {len(ready)} in all, got {counts}"
    end = _end(ready, sizes, counts, latency, rate)
    rivals = [_end(ready, sizes, simple, latency, rate) for simple in ([len(ready)], [1] * len(ready))]
    return None if end < min(rivals) else f"the last bucket arrives at {end:.4g} ms, one extreme at {min(rivals):.4g}"


def _problem(seed: int, n: int, latency: float, rate: float) -> tuple[list[float], list[float], float, float]:
    rng = _generator(seed)
    ready = (torch.rand(n, dtype=torch.float64, generator=rng) * 2 + 0.2).cumsum(0).round(decimals=2).tolist()
    sizes = (torch.rand(n, dtype=torch.float64, generator=rng).square() * 8 + 0.1).round(decimals=1).tolist()
    sizes[-1] = 2.0
    return ready, sizes, latency, rate


_EASY, _HARD = _problem(0, 8, 1.0, 2.0), _problem(1, 40, 1.5, 2.5)

best_buckets = Exercise(
    name="42.3",
    solution=_best,
    accept=_allowed,
    trials=(_EASY, _HARD),
    labels=("ready", "sizes", "latency", "rate"),
    mistakes=(
        Mistake(
            lambda ready, sizes, latency, rate: [len(ready)],
            "One bucket waits for the last gradient and hides nothing.",
        ),
        Mistake(
            lambda ready, sizes, latency, rate: [1] * len(ready),
            "A bucket each: the link pays the latency every time and falls behind.",
        ),
        Mistake(
            lambda ready, sizes, latency, rate: _best(ready, sizes, latency, rate)[:-1],
            "The last gradients are in no bucket: they would never be reduced.",
        ),
        Mistake(
            lambda ready, sizes, latency, rate: torch.tensor(_best(ready, sizes, latency, rate)).cumsum(0).tolist(),
            "These are the ends of the buckets: return how many gradients each holds.",
        ),
        Mistake(
            lambda ready, sizes, latency, rate: [0, *_best(ready, sizes, latency, rate)],
            "An empty bucket: start with one gradient in it.",
        ),
        Mistake(
            lambda ready, sizes, latency, rate: len(_best(ready, sizes, latency, rate)),
            "One number is not enough: return the list, first bucket first.",
        ),
        Mistake(
            lambda ready, sizes, latency, rate: [float(c) for c in _best(ready, sizes, latency, rate)],
            "Counts are whole numbers: use int.",
        ),
    ),
    remark="what is left after the backward pass is one small bucket.",
    score=Score(
        lambda answer: _end(*_HARD[:2], answer(*_HARD), *_HARD[2:]),
        "ms",
        min(_end(*_HARD[:2], _by_size(*_HARD[:2], limit / 2), *_HARD[2:]) for limit in range(1, 60)),
    ),
)
