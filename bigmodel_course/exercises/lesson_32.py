"""Lesson 32, low-rank adapters: what they cost, their gradients, the merge, and the fewest parameters for an error."""

from itertools import product

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["adapter_gradients", "adapter_memory", "fewest_parameters", "merged_weight"]

Shapes = list[tuple[int, int]]


def _count(shapes: Shapes, rank: int) -> int:
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)


def _weights(shapes: Shapes) -> int:
    return sum(outputs * inputs for outputs, inputs in shapes)


def _memory(shapes: Shapes, rank: int) -> tuple[int, int]:
    learn = _count(shapes, rank)
    return learn, 4 * _weights(shapes) + 16 * learn


adapter_memory = Exercise(
    name="32.1",
    solution=_memory,
    trials=(([(384, 384)] * 3, 4), ([(8, 6), (5, 8), (10, 3)], 2), ([(1536, 384)], 16)),
    labels=("shapes", "rank"),
    mistakes=(
        Mistake(
            lambda shapes, rank: (rank * _weights(shapes), 4 * _weights(shapes) + 16 * rank * _weights(shapes)),
            "rank × outputs × inputs: the two factors have rank × inputs and outputs × rank numbers, so add.",
        ),
        Mistake(
            lambda shapes, rank: (_count(shapes, 1), 4 * _weights(shapes) + 16 * _count(shapes, 1)),
            "The rank is missing: each of the two factors is `rank` wide.",
        ),
        Mistake(
            lambda shapes, rank: (
                sum(rank * i for _, i in shapes),
                4 * _weights(shapes) + 16 * sum(rank * i for _, i in shapes),
            ),
            "You count A alone: B learns as well, outputs × rank.",
        ),
        Mistake(
            lambda shapes, rank: (_count(shapes, rank), 16 * _count(shapes, rank)),
            "The frozen weights are still in memory: 4 bytes each, without gradient and without Adam's numbers.",
        ),
        Mistake(
            lambda shapes, rank: (_count(shapes, rank), 16 * (_weights(shapes) + _count(shapes, rank))),
            "Frozen weights have no gradient, and AdamW remembers nothing of them: 4 bytes each, not 16.",
        ),
        Mistake(
            lambda shapes, rank: (_count(shapes, rank), 4 * _weights(shapes) + 12 * _count(shapes, rank)),
            "One number is missing: what learns has a value, a gradient and two running means, 4 × 4 bytes.",
        ),
        Mistake(
            lambda shapes, rank: (_count(shapes, rank), 4 * _weights(shapes) + 8 * _count(shapes, rank)),
            "You count AdamW's two numbers alone: the adapter's own values and their gradients need memory too.",
        ),
        Mistake(
            lambda shapes, rank: (_count(shapes, rank), _weights(shapes) + 4 * _count(shapes, rank)),
            "These are numbers: a float32 takes 4 bytes.",
        ),
    ),
    remark="frozen numbers cost 4 bytes each, those that learn 16.",
)


def _gradients(gradient: Tensor, down: Tensor, up: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    scale = alpha / len(down)
    return scale * up.T @ gradient, scale * gradient @ down.T


def _factors(seed: int, outputs: int, inputs: int, rank: int, alpha: float, *, fresh: bool = False) -> tuple:
    rng = torch.Generator().manual_seed(seed)
    gradient, down, up = (
        torch.randn(*shape, dtype=torch.float64, generator=rng)
        for shape in ((outputs, inputs), (rank, inputs), (outputs, rank))
    )
    return gradient, down, up * (not fresh), alpha


adapter_gradients = Exercise(
    name="32.2",
    solution=_gradients,
    trials=(_factors(0, 4, 4, 2, 6.0), _factors(1, 5, 3, 2, 1.0), _factors(2, 4, 4, 2, 4.0, fresh=True)),
    labels=("gradient", "down", "up", "alpha"),
    mistakes=(
        Mistake(
            lambda gradient, down, up, alpha: _gradients(gradient, down, up, len(down)),
            "The scale is missing: the update is (alpha / rank) B A, so both gradients carry alpha / rank.",
        ),
        Mistake(
            lambda gradient, down, up, alpha: _gradients(gradient, down, up, alpha * len(down)),
            "Divide alpha by the rank.",
        ),
        Mistake(
            lambda gradient, down, up, alpha: _gradients(gradient, down, up, len(down) ** 2 / alpha),
            "Upside down: the scale is alpha / rank.",
        ),
        Mistake(
            lambda gradient, down, up, alpha: _gradients(gradient, down, up, alpha)[::-1],
            "The order: first the gradient of A (down), then that of B (up).",
        ),
        Mistake(
            lambda gradient, down, up, alpha: (
                alpha / len(down) * up.T @ gradient,
                torch.zeros_like(up) + 0 * alpha,
            ),
            "B needs a gradient too. At the start it is the only one that is not zero.",
        ),
        Mistake(
            lambda gradient, down, up, alpha: (torch.ones_like(down), alpha / len(down) * gradient @ down.T),
            "The gradient of A goes through B: with B = 0 it is zero.",
        ),
        Mistake(
            lambda gradient, down, up, alpha: tuple(-g for g in _gradients(gradient, down, up, alpha)),
            "The sign: this is the step downhill. Return the gradients.",
        ),
        Mistake(
            lambda gradient, down, up, alpha: tuple(g.T for g in _gradients(gradient, down, up, alpha)),
            "Transposed: a gradient has the shape of what it belongs to, A [rank, inputs], B [outputs, rank].",
        ),
        Mistake(
            lambda gradient, down, up, alpha: gradient,
            "That is the gradient of the whole weight: the chain rule takes it through each factor.",
        ),
    ),
    remark="the gradient of A goes through B, and that of B through A: one of them may be zero, not both.",
)


def _merge(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    return weight + alpha / len(down) * up @ down


def _merged_twice(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    return _merge(_merge(weight, down, up, alpha), down, up, alpha)


merged_weight = Exercise(
    name="32.3",
    solution=_merge,
    trials=(_factors(3, 4, 4, 2, 6.0), _factors(4, 4, 4, 3, 1.0), _factors(5, 6, 6, 1, 2.0)),
    labels=("weight", "down", "up", "alpha"),
    mistakes=(
        Mistake(
            lambda weight, down, up, alpha: weight + up @ down,
            "The scale is missing: add (alpha / rank) B A.",
        ),
        Mistake(
            lambda weight, down, up, alpha: weight + alpha * up @ down,
            "Divide alpha by the rank.",
        ),
        Mistake(
            lambda weight, down, up, alpha: weight + alpha / down.shape[1] * up @ down,
            "You divide by the inputs: the rank is the number of rows of A.",
        ),
        Mistake(
            lambda weight, down, up, alpha: weight + alpha / len(down) * (up @ down).T,
            "Transposed: a torch weight is [outputs, inputs], and so is B A.",
        ),
        Mistake(_merged_twice, "You add the update twice."),
        Mistake(
            lambda weight, down, up, alpha: weight - alpha / len(down) * up @ down,
            "The sign: that takes the update out.",
        ),
        Mistake(
            lambda weight, down, up, alpha: alpha / len(down) * up @ down,
            "That is the update alone: it is added to the weight.",
        ),
        Mistake(
            lambda weight, down, up, alpha: weight @ (torch.eye(len(weight)).double() + alpha / len(down) * up @ down),
            "The update is added to the weight, not multiplied with it.",
        ),
    ),
    remark="one matrix again, and not one product more than before.",
)

Updates = list[Tensor]


def parameters(updates: Updates, ranks: list[int]) -> int:
    """What adapters of these ranks would train; a layer of rank 0 gets none."""
    return sum(rank * sum(update.shape) for update, rank in zip(updates, ranks, strict=True))


def error_left(updates: Updates, ranks: list[int]) -> float:
    """The norm of what the best adapters of these ranks leave out, over the norm of all updates."""
    left = sum(
        float(torch.linalg.svdvals(update)[rank:].square().sum()) for update, rank in zip(updates, ranks, strict=True)
    )
    return (left / sum(float(update.square().sum()) for update in updates)) ** 0.5


def _search(updates: Updates, limit: float) -> list[int]:
    """Of all choices that are allowed the cheapest."""
    values = [torch.linalg.svdvals(update).square() for update in updates]
    whole = sum(float(v.sum()) for v in values)
    left = [[float(v[rank:].sum()) for rank in range(len(v) + 1)] for v in values]
    allowed = limit**2 * whole * (1 + 1e-12)
    choices = (
        (parameters(updates, list(ranks)), list(ranks))
        for ranks in product(*(range(len(v) + 1) for v in values))
        if sum(table[rank] for table, rank in zip(left, ranks, strict=True)) <= allowed
    )
    return min(choices)[1]


def _greedy(updates: Updates, limit: float) -> list[int]:
    """From nothing up: take the singular value that removes the most error for each parameter."""
    ranks = [0] * len(updates)
    values = [torch.linalg.svdvals(update).square() for update in updates]
    while error_left(updates, ranks) > limit:
        open_ones = [i for i, v in enumerate(values) if ranks[i] < len(v)]
        best = max(open_ones, key=lambda i: float(values[i][ranks[i]]) / sum(updates[i].shape))
        ranks[best] += 1
    return ranks


def _uniform(updates: Updates, limit: float) -> list[int]:
    """The same rank everywhere."""
    same = ([min(rank, *u.shape) for u in updates] for rank in range(max(min(u.shape) for u in updates) + 1))
    return next(ranks for ranks in same if error_left(updates, ranks) <= limit)


def _each_alone(updates: Updates, limit: float) -> list[int]:
    return [next(r for r in range(min(u.shape) + 1) if error_left([u], [r]) <= limit) for u in updates]


def _allowed(ranks: list[int], updates: Updates, limit: float) -> str | None:
    if not isinstance(ranks, list) or len(ranks) != len(updates):
        return f"return a list of {len(updates)} ranks, one for each layer"
    for rank, update in zip(ranks, updates, strict=True):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= min(update.shape):
            return f"a layer of shape {tuple(update.shape)} has ranks from 0 to {min(update.shape)}, got {rank!r}"
    error = error_left(updates, ranks)
    return None if error <= limit else f"with ranks {ranks} the error left is {error:.3g}, allowed {limit:g}"


def _problem(seed: int, shapes: Shapes, decay: list[float], limit: float) -> tuple[Updates, float]:
    """Updates of different shapes, whose singular values fall at different speeds."""
    rng = torch.Generator().manual_seed(seed)
    updates = []
    for (outputs, inputs), fall in zip(shapes, decay, strict=True):
        noise = torch.randn(outputs, inputs, dtype=torch.float64, generator=rng)
        u, _, v = torch.linalg.svd(noise, full_matrices=False)
        updates.append(u * fall ** torch.arange(min(outputs, inputs)) @ v)
    return updates, limit


_EASY = _problem(0, [(6, 6), (12, 4), (5, 8)], [0.4, 0.8, 0.6], 0.3)
_HARD = _problem(1, [(8, 8), (24, 8), (8, 24), (10, 6), (6, 30)], [0.9, 0.55, 0.75, 0.8, 0.4], 0.25)

fewest_parameters = Exercise(
    name="32.4",
    solution=_search,
    accept=_allowed,
    trials=(_EASY, _HARD),
    labels=("updates", "limit"),
    mistakes=(
        Mistake(
            lambda updates, limit: _search(updates, limit**0.5),
            "You compare the squared error with the limit: take the root.",
        ),
        Mistake(
            lambda updates, limit: _search(
                updates, limit * sum(float(u.square().sum()) for u in updates) ** 0.5 / 2**0.5
            ),
            "Your error is absolute: divide by the norm of all updates together.",
        ),
        Mistake(
            lambda updates, limit: [1] * len(updates),
            "Rank 1 everywhere leaves too much: measure the error that is left.",
        ),
        Mistake(
            lambda updates, limit: [max(r - 1, 0) for r in _search(updates, limit)],
            "One too low: the first `rank` singular values stay, so the error begins with the next one.",
        ),
        Mistake(
            lambda updates, limit: _search(updates, limit)[::-1],
            "The order: the first rank belongs to the first layer.",
        ),
        Mistake(
            lambda updates, limit: max(_uniform(updates, limit)),
            "One number is not enough: return a list, with the rank of each layer.",
        ),
        Mistake(
            lambda updates, limit: parameters(updates, _search(updates, limit)),
            "These are the parameters: return the list of ranks that needs them.",
        ),
        Mistake(
            lambda updates, limit: [r * sum(u.shape) for r, u in zip(_search(updates, limit), updates, strict=True)],
            "These are the parameters of each layer: return its rank.",
        ),
    ),
    remark="the error stays within the limit, and rank goes where it buys the most.",
    score=Score(
        lambda answer: parameters(_HARD[0], answer(*_HARD)), "parameters", parameters(_HARD[0], _greedy(*_HARD))
    ),
)
