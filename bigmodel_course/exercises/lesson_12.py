"""Lesson 12, stochastic gradients: the mini-batch gradient, its variance, the fewest samples to a given error."""

from collections.abc import Callable
from math import ceil, log

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["batch_gradient", "batch_variance", "fewest_samples"]


def _problem(size: int, columns: int, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(size)
    x_ND = torch.randn(size, columns, dtype=torch.float64, generator=rng)
    y_N = torch.randn(size, dtype=torch.float64, generator=rng)
    return x_ND, y_N, torch.randn(columns, dtype=torch.float64, generator=rng), torch.tensor(rows)


def _gradient(x: Tensor, y: Tensor, theta: Tensor, rows: Tensor) -> Tensor:
    return 2 / len(rows) * x[rows].T @ (x[rows] @ theta - y[rows])


batch_gradient = Exercise(
    name="12.1",
    solution=_gradient,
    trials=(_problem(6, 2, [4, 1]), _problem(30, 3, [7, 20, 7, 3, 29])),  # drawn with replacement: 7 came twice
    labels=("x", "y", "theta", "rows"),
    mistakes=(
        Mistake(
            lambda x, y, theta, rows: _gradient(x, y, theta, rows) * len(rows),
            "You added the patients' gradients: without the mean, the step grows with the batch.",
        ),
        Mistake(
            lambda x, y, theta, rows: _gradient(x, y, theta, rows) * len(rows) / len(x),
            "Divide by the number of rows in the batch, not by that of the whole table.",
        ),
        Mistake(
            lambda x, y, theta, rows: _gradient(x, y, theta, rows) / 2,
            "The square gives a factor 2 when you derive it.",
        ),
        Mistake(
            lambda x, y, theta, rows: _gradient(x, y, theta, torch.arange(len(rows))),
            "These are always the first rows of the table: index with `rows`, x and y alike.",
        ),
        Mistake(
            lambda x, y, theta, rows: _gradient(x, y, theta, rows.unique()),
            "A row that was drawn twice counts twice, or the mean is no longer unbiased.",
        ),
        Mistake(
            lambda x, y, theta, rows: _gradient(x, y, theta, torch.arange(len(x))),
            "This is the full gradient: you never used `rows`.",
        ),
        Mistake(
            lambda x, y, theta, rows: -_gradient(x, y, theta, rows),
            "The sign: derive (prediction − y)², not its negative.",
        ),
    ),
    remark="whatever the batch size, one learning rate means one length of step.",
)


def _rows(size: int, columns: int) -> Tensor:
    rng = torch.Generator().manual_seed(size)
    return 1 + torch.randn(size, columns, dtype=torch.float64, generator=rng)


def _variance(gradients: Tensor, batch: int, replacement: bool) -> Tensor:
    size = len(gradients)
    single = (gradients - gradients.mean(0)).square().sum(1).mean()
    return single / batch * (1 if replacement else (size - batch) / (size - 1))


batch_variance = Exercise(
    name="12.2",
    solution=_variance,
    trials=((_rows(6, 2), 2, True), (_rows(6, 2), 2, False), (_rows(20, 3), 5, False), (_rows(20, 3), 20, False)),
    labels=("gradients", "batch", "replacement"),
    mistakes=(
        Mistake(
            lambda gradients, batch, replacement: _variance(gradients, batch, replacement) / batch,
            "1/batch² is the variance of each term of the mean. There are `batch` terms to add up.",
        ),
        Mistake(
            lambda gradients, batch, replacement: _variance(gradients, batch, replacement) * batch**0.5,
            "The standard deviation falls as 1/√batch. The variance is its square.",
        ),
        Mistake(
            lambda gradients, batch, replacement: _variance(gradients, batch, True),
            "Without replacement a batch of all rows has no noise at all: which factor is 0 there?",
        ),
        Mistake(
            lambda gradients, batch, replacement: _variance(gradients, batch, False),
            "With replacement a row may come again, so the size of the table does not matter.",
        ),
        Mistake(
            lambda gradients, batch, replacement: _variance(gradients, batch, not replacement),
            "The two cases are exchanged: the factor belongs to drawing *without* replacement.",
        ),
        Mistake(
            lambda gradients, batch, replacement: (
                _variance(gradients, batch, True) * (1 if replacement else 1 - batch / len(gradients))
            ),
            "With (N−B)/N a batch of one would have less noise than one row has. Divide by N − 1.",
        ),
        Mistake(
            lambda gradients, batch, replacement: (
                _variance(gradients, batch, replacement) * len(gradients) / (len(gradients) - 1)
            ),
            "These rows are the whole population: divide by N (`correction=0`), not by N − 1.",
        ),
        Mistake(
            lambda gradients, batch, replacement: _variance(gradients, batch, replacement) / gradients.shape[1],
            "The trace adds the variances of the columns. You took their mean.",
        ),
        Mistake(
            lambda gradients, batch, replacement: (
                _variance(gradients - gradients.mean(0), batch, replacement)
                * gradients.square().sum()
                / (gradients - gradients.mean(0)).square().sum()
            ),
            "Variance is measured around the mean: subtract the full gradient first.",
        ),
    ),
    remark="four times the batch halves the noise, and not more.",
)

# 12.3: a quadratic of one weight. The expected squared error follows a recursion, so nothing is drawn here.


def error_left(sizes: list[int], rate: float, curvature: float, variance: float, start: float) -> float:
    """The expected squared error after one SGD step with each batch size in `sizes`."""
    error = start
    for size in sizes:
        error = (1 - rate * curvature) ** 2 * error + rate**2 * variance / size
    return error


def _quiet_steps(rate: float, curvature: float, start: float, target: float) -> int:
    return ceil(log(target / start) / (2 * log(abs(1 - rate * curvature))))


def _floor(rate: float, curvature: float, variance: float) -> float:
    return rate * variance / (curvature * (2 - rate * curvature))


def _constant(rate: float, curvature: float, variance: float, start: float, target: float) -> list[int]:
    """The cheapest list in which all sizes are equal."""
    shortest = _quiet_steps(rate, curvature, start, target) + 1
    found = []
    for steps in range(shortest, 3 * shortest):
        left = error_left([1] * steps, rate, curvature, 0.0, start)
        noise = error_left([1] * steps, rate, curvature, variance, 0.0)
        found.append([ceil(noise / (target - left) - 1e-9)] * steps)
    return min(found, key=sum)


def _growing(rate: float, curvature: float, variance: float, start: float, target: float) -> list[int]:
    """Sizes that grow by 1/|1 − rate·curvature| a step: the least sum for a given noise (by Lagrange's multiplier)."""
    keep = abs(1 - rate * curvature)
    shortest = _quiet_steps(rate, curvature, start, target) + 1
    found = []
    for steps in range(shortest, 3 * shortest):
        weights = [keep**k for k in reversed(range(steps))]
        room = target - keep ** (2 * steps) * start
        found.append([ceil(rate**2 * variance / room * sum(weights) * weight) for weight in weights])
    return min(found, key=sum)


def _enough(
    sizes: list[int], rate: float, curvature: float, variance: float, start: float, target: float
) -> str | None:
    if len(sizes) > 10_000:
        return f"{len(sizes):,} steps are more than anybody needs here"
    wrong = [size for size in sizes if size < 1 or size != int(size)]
    if wrong:
        return f"a batch holds a whole number of samples, at least 1, and yours has {wrong[0]:.6g}"
    left = error_left(sizes, rate, curvature, variance, start)
    if left <= target * (1 + 1e-9):
        return None
    return f"after your {len(sizes)} steps the expected squared error is {left:.4g}, allowed {target:g}"


def _as_mistake(change: Callable[..., list]) -> Callable[..., list]:
    """A wrong answer made of the number of steps that would do without noise, and of the problem's numbers."""
    return lambda rate, curvature, variance, start, target: change(
        _quiet_steps(rate, curvature, start, target), (rate, curvature, variance, start, target)
    )


_HARD = (0.1, 1.0, 100.0, 100.0, 0.1)

fewest_samples = Exercise(
    name="12.3",
    solution=_growing,
    accept=_enough,
    trials=((0.25, 2.0, 8.0, 50.0, 0.2), _HARD),
    labels=("rate", "curvature", "variance", "start", "target"),
    mistakes=(
        Mistake(lambda rate, curvature, variance, start, target: [], "No step leaves the whole error."),
        Mistake(
            _as_mistake(lambda steps, problem: [1] * steps),
            "Batches of one stay at rate·variance/(curvature·(2 − rate·curvature)). Is that below the target?",
        ),
        Mistake(
            _as_mistake(lambda steps, problem: [ceil(_floor(*problem[:3]) / problem[-1])] * steps),
            "Now the floor alone fills the target: leave room for what is left of the start.",
        ),
        Mistake(
            lambda *problem: [ceil(problem[2] / problem[-1])],
            "One large batch removes the noise, not the distance: count the steps as well.",
        ),
        Mistake(
            lambda *problem: _growing(*problem)[::-1],
            "The noise of early steps is forgotten, that of the last ones stays: which should be large?",
        ),
        Mistake(
            lambda *problem: [size - 0.5 for size in _growing(*problem)],
            "Round each size up to a whole number.",
        ),
    ),
    remark="noise that later steps forget anyway need not be paid for.",
    score=Score(lambda answer: sum(answer(*_HARD)), "samples", sum(_constant(*_HARD))),
)
