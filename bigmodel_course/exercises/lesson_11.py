"""Lesson 11, gradient descent: the gradient of the mean squared error, the largest step, the fewest steps."""

from math import cos, log, pi

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["fewest_steps", "largest_step", "mse_gradient"]


def _problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(rows, columns, dtype=torch.float64, generator=rng)
    y_N = torch.randn(rows, dtype=torch.float64, generator=rng)
    return x_ND, y_N, torch.randn(columns, dtype=torch.float64, generator=rng)


mse_gradient = Exercise(
    name="11.1",
    solution=lambda x, y, theta: 2 / len(x) * x.T @ (x @ theta - y),
    trials=(_problem(5, 2, 0), _problem(40, 3, 1)),
    labels=("x", "y", "theta"),
    mistakes=(
        Mistake(lambda x, y, theta: x.T @ (x @ theta - y) / len(x), "The square gives a factor 2 when you derive it."),
        Mistake(lambda x, y, theta: 2 * x.T @ (x @ theta - y), "The loss is a mean: divide by the number of rows."),
        Mistake(
            lambda x, y, theta: 2 / len(x) * x.T @ (y - x @ theta),
            "The sign: derive (prediction − y)², not its negative.",
        ),
        Mistake(
            lambda x, y, theta: 2 / len(x) * (x @ theta - y).sum() * x.sum(0),
            "Each row's error multiplies its own row: sum the products, do not multiply the sums.",
        ),
        Mistake(
            lambda x, y, theta: 2 / x.numel() * x.T @ (x @ theta - y),
            "Divide by the number of rows, not by the number of entries.",
        ),
        Mistake(
            lambda x, y, theta: 2 / len(x) * x.T @ (x @ theta),
            "You left out the targets: the error is the prediction minus y.",
        ),
    ),
    remark="the gradient points uphill; the step goes the other way.",
)


def _eigenvalues(*values: float) -> tuple[Tensor]:
    rng = torch.Generator().manual_seed(len(values))
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=rng))
    return (basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T,)


largest_step = Exercise(
    name="11.2",
    solution=lambda hessian: 2 / torch.linalg.eigvalsh(hessian)[-1],
    trials=(_eigenvalues(1.0, 4.0), _eigenvalues(0.5, 3.0, 10.0)),
    labels=("hessian",),
    mistakes=(
        Mistake(
            lambda hessian: 1 / torch.linalg.eigvalsh(hessian)[-1],
            "1/λmax is safe, and half of the limit: at which step does 1 − ηλ reach −1?",
        ),
        Mistake(
            lambda hessian: 2 / torch.linalg.eigvalsh(hessian)[0],
            "The steepest direction leaves first: take the largest eigenvalue, not the smallest.",
        ),
        Mistake(
            lambda hessian: 2 / torch.linalg.eigvalsh(hessian)[[0, -1]].sum(),
            "That is the *fastest* step. The limit is where it just stops converging.",
        ),
        Mistake(
            lambda hessian: 2 / hessian.trace(), "The trace is the sum of the eigenvalues; you need the largest one."
        ),
        Mistake(
            lambda hessian: 2 / hessian.diagonal().max(),
            "The diagonal holds the eigenvalues only when the axes are the eigenvectors.",
        ),
        Mistake(
            lambda hessian: torch.linalg.eigvalsh(hessian)[-1] / 2, "Upside down: a steeper curve needs a smaller step."
        ),
    ),
    remark="the limit needs no run: it is a property of the curvature.",
)


def left_over(rates: list[float], low: float, high: float, points: int = 2001) -> float:
    """The largest factor by which any curvature in [low, high] keeps its error after steps with these `rates`."""
    curvature = torch.linspace(low, high, points, dtype=torch.float64)
    factor = torch.ones_like(curvature)
    for rate in rates:
        factor = factor * (1 - rate * curvature)
    return float(factor.abs().max())


def _constant(low: float, high: float, reduction: float) -> list[float]:
    steps = log(reduction) / log((high - low) / (high + low))
    return [2 / (low + high)] * -int(-steps // 1)


def _chebyshev(low: float, high: float, reduction: float) -> list[float]:
    """Young's step sizes: one over the roots of the Chebyshev polynomial on [low, high] (Young 1953)."""
    steps = 1
    while True:
        middle, half = (high + low) / 2, (high - low) / 2
        rates = [1 / (middle + half * cos(pi * (2 * i + 1) / (2 * steps))) for i in range(steps)]
        if left_over(rates, low, high) <= reduction:
            return rates
        steps += 1


def _enough(rates: list[float], low: float, high: float, reduction: float) -> str | None:
    if len(rates) > 10_000:
        return f"{len(rates):,} steps are more than anybody needs here"
    left = left_over(rates, low, high)
    if left <= reduction * (1 + 1e-9):
        return None
    return (
        f"after your {len(rates)} steps {left:.3g} of the error is left in the worst direction, allowed {reduction:g}"
    )


_HARD = (1.0, 100.0, 1e-3)

fewest_steps = Exercise(
    name="11.3",
    solution=_chebyshev,
    accept=_enough,
    trials=((1.0, 10.0, 1e-3), _HARD),
    labels=("low", "high", "reduction"),
    mistakes=(
        Mistake(
            lambda low, high, reduction: [2 / high] * len(_constant(low, high, reduction)),
            "At exactly 2/high the steepest direction jumps from side to side for ever.",
        ),
        Mistake(
            lambda low, high, reduction: [1 / low] * len(_constant(low, high, reduction)),
            "1/low is far over the limit of the steepest direction.",
        ),
        Mistake(
            lambda low, high, reduction: [1 / high] * len(_constant(low, high, reduction)),
            "1/high is safe but slow in the flat direction: it needs about twice as many steps.",
        ),
        Mistake(
            lambda low, high, reduction: _constant(low, high, reduction)[
                : max(1, int(len(_constant(low, high, reduction)) / log(10)))
            ],
            "Use the natural logarithm on both sides: log(reduction) / log(rate).",
        ),
        Mistake(
            lambda low, high, reduction: [2 / (low + high)],
            "One step leaves (κ−1)/(κ+1) of the error. How many make that small enough?",
        ),
        Mistake(lambda low, high, reduction: [], "No step leaves the whole error."),
    ),
    remark="every curvature between `low` and `high` is served.",
    score=Score(lambda answer: len(answer(*_HARD)), "gradient evaluations", len(_constant(*_HARD))),
)
