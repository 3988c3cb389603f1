"""Lesson 13, momentum: between two conventions, one Nesterov step, the fewest heavy-ball steps."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["fewest_steps", "nesterov_step", "translate"]

translate = Exercise(
    name="13.1",
    solution=lambda lr, beta: (lr * (1 - beta), beta),
    trials=((0.1, 0.9), (0.02, 0.75), (0.5, 0.0)),
    labels=("lr", "beta"),
    mistakes=(
        Mistake(
            lambda lr, beta: (lr / (1 - beta), beta),
            "The sum makes the longer steps, so its learning rate must be the smaller one: multiply, do not divide.",
        ),
        Mistake(
            lambda lr, beta: (lr, beta),
            "Unchanged, a constant gradient would step lr / (1 − beta) instead of lr.",
        ),
        Mistake(
            lambda lr, beta: (lr * beta, beta),
            "A new gradient enters the mean with weight 1 − beta; beta is what the past keeps.",
        ),
        Mistake(
            lambda lr, beta: (lr * (1 - beta), 1 - beta),
            "The learning rate is right. Both velocities forget at the same speed, so the momentum is beta itself.",
        ),
        Mistake(
            lambda lr, beta: (lr * sqrt(1 - beta), beta),
            "No root: the velocities differ by the factor 1 − beta, and a step is linear in the velocity.",
        ),
        Mistake(
            lambda lr, beta: (lr * (1 - beta) / (1 + beta), beta),
            "(1 − beta) / (1 + beta) is what a mean leaves of the noise's variance, not of the step.",
        ),
        Mistake(
            lambda lr, beta: (beta, lr * (1 - beta)),
            "The right numbers in the wrong order: the learning rate comes first.",
        ),
    ),
    remark="the way back divides by 1 − momentum.",
)


@dataclass(frozen=True)
class _Slope:
    """The gradient of a bowl: a function that can be called, copied and shown."""

    hessian_DD: Tensor

    def __call__(self, theta_D: Tensor) -> Tensor:
        return self.hessian_DD @ theta_D

    def __repr__(self) -> str:
        return "the gradient of a bowl"


def _bowl(lr: float, mu: float, seed: int) -> tuple:
    rng = torch.Generator().manual_seed(seed)
    root_DD = torch.randn(3, 3, dtype=torch.float64, generator=rng)
    theta_D, v_D = torch.randn(2, 3, dtype=torch.float64, generator=rng)
    return theta_D, v_D, _Slope(root_DD @ root_DD.T), lr, mu


def _step(velocity: Callable[..., Tensor], direction: Callable[..., Tensor]) -> Callable:
    """A step that puts `velocity(v, g, mu)` into the state and moves along `direction(old v, new v, g, mu)`."""

    def step(theta, v, gradient, lr, mu):
        g = gradient(theta)
        new = velocity(v, g, mu)
        return theta - lr * direction(v, new, g, mu), new

    return step


def _sum(v: Tensor, g: Tensor, mu: float) -> Tensor:
    return mu * v + g


def _ahead(old: Tensor, new: Tensor, g: Tensor, mu: float) -> Tensor:
    return g + mu * new


def _looking_twice(theta, v, gradient, lr, mu):
    g = gradient(theta - lr * mu * v)
    v = mu * v + g
    return theta - lr * (g + mu * v), v


def _textbook(theta, v, gradient, lr, mu):
    v = mu * v + gradient(theta - lr * mu * v)
    return theta - lr * v, v


def _rate_inside(theta, v, gradient, lr, mu):
    g = gradient(theta)
    v = mu * v + lr * g
    return theta - (lr * g + mu * v), v


nesterov_step = Exercise(
    name="13.2",
    solution=_step(_sum, _ahead),
    trials=(_bowl(0.1, 0.9, 0), _bowl(0.05, 0.5, 1)),
    labels=("theta", "v", "gradient", "lr", "mu"),
    mistakes=(
        Mistake(
            _step(_sum, lambda old, new, g, mu: new),
            "That is the heavy ball. Nesterov steps along g + mu·v with the *new* v; the old one gives v itself.",
        ),
        Mistake(
            _textbook,
            "Those are the original variables, where theta is the point *before* the look ahead. "
            "In torch's, theta is already ahead: take the gradient there.",
        ),
        Mistake(
            _looking_twice,
            "You look ahead twice: in torch's variables theta is the point ahead, so the gradient is taken at theta.",
        ),
        Mistake(
            _step(lambda v, g, mu: mu * v + (1 - mu) * g, _ahead),
            "That velocity is the running mean. torch's is the running sum: no factor 1 − mu.",
        ),
        Mistake(
            _step(_sum, lambda old, new, g, mu: g + new),
            "The velocity ahead has lost a part again: the direction is g + mu·v, not g + v.",
        ),
        Mistake(
            _step(_sum, lambda old, new, g, mu: new + mu * new),
            "Only the fresh gradient is added to mu·v. With v + mu·v the past counts twice.",
        ),
        Mistake(
            _rate_inside,
            "You keep lr inside the velocity, as some libraries do. torch's v sums gradients; lr comes at the step.",
        ),
        Mistake(
            _step(_sum, lambda old, new, g, mu: -(g + mu * new)),
            "The sign: the step goes against the gradient.",
        ),
        Mistake(
            lambda theta, v, gradient, lr, mu: (_step(_sum, _ahead)(theta, v, gradient, lr, mu)[0], v),
            "The point is right, but you return the old velocity: the next step would not remember this one.",
        ),
    ),
    remark="one gradient a step, as for the heavy ball; only where it is taken differs.",
)


def left_over(lr: float, mu: float, steps: int, low: float, high: float, points: int = 2001) -> float:
    """The largest share of its error that any curvature in [low, high] keeps after `steps` from v = 0.

    The powers of the matrix [[1 + mu − lr·curvature, −mu], [1, 0]], applied to (1, 1).
    """
    curvature_C = torch.linspace(low, high, points, dtype=torch.float64)
    now_C = before_C = torch.ones_like(curvature_C)
    for _ in range(steps):
        now_C, before_C = (1 + mu - lr * curvature_C) * now_C - mu * before_C, now_C
    return float(now_C.abs().max())


def _polyak(low: float, high: float, reduction: float) -> tuple[float, float, int]:
    """Polyak's pair, and the first number of steps that is enough for it (Polyak 1964)."""
    rho = (sqrt(high) - sqrt(low)) / (sqrt(high) + sqrt(low))
    lr, mu = 4 / (sqrt(high) + sqrt(low)) ** 2, rho**2
    steps = 1
    while left_over(lr, mu, steps, low, high) > reduction:
        steps += 1
    return lr, mu, steps


def _enough(answer: tuple[float, float, int], low: float, high: float, reduction: float) -> str | None:
    lr, mu, steps = answer
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 10_000:
        return f"steps must be a whole number from 0 to 10,000, got {steps!r}"
    left = left_over(lr, mu, steps, low, high)
    if left <= reduction * (1 + 1e-9):
        return None
    return f"after your {steps} steps {left:.3g} of the error is left in the worst direction, allowed {reduction:g}"


def _with(change: Callable[..., tuple[float, float, int]]) -> Callable:
    """A wrong answer made of the right one: `change(lr, mu, steps, low, high, reduction)`."""
    return lambda low, high, reduction: change(*_polyak(low, high, reduction), low, high, reduction)


_HARD = (1.0, 100.0, 1e-3)

fewest_steps = Exercise(
    name="13.3",
    solution=_polyak,
    accept=_enough,
    trials=((1.0, 10.0, 1e-3), _HARD),
    labels=("low", "high", "reduction"),
    mistakes=(
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (lr, mu, -int(log(left) / log(sqrt(mu)) // -1))),
            "ρ to the power of k forgets the double root: count with ρ^k·(1 + k·(1 + ρ)).",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (lr, sqrt(mu), steps)),
            "A step keeps √μ of the error, so the best μ is the *square* of (√κ − 1)/(√κ + 1).",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (4 / (low + high), mu, steps)),
            "4/(high + low) is over the stability limit 2(1 + μ)/high: add the roots, then square.",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (lr * (1 - mu), mu, steps)),
            "That would translate a running mean; here lr = 4/(√high + √low)² stands as it is.",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (2 / (low + high), mu, steps)),
            "2/(high + low) is best without memory. With it, more is stable, and the flat direction needs it.",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (2 / (low + high), 0.0, steps)),
            "Without momentum it takes κ where the heavy ball takes √κ.",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (2 * (1 + mu) / high, mu, steps)),
            "At exactly 2(1 + μ)/high one root is −1: the steepest direction jumps from side to side for ever.",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (lr, ((high - low) / (high + low)) ** 2, steps)),
            "You used κ where √κ belongs: so much memory forgets too slowly.",
        ),
        Mistake(
            _with(lambda lr, mu, steps, low, high, left: (lr, 0.9, steps)),
            "0.9 is a habit, not a property of these curvatures: derive μ from high/low.",
        ),
        Mistake(lambda low, high, reduction: (0.0, 0.0, 0), "No step leaves the whole error."),
    ),
    remark="11.3's changing step sizes need 38 where Polyak's pair needs 58, but their number is fixed first.",
    score=Score(lambda answer: answer(*_HARD)[2], "gradient evaluations", _polyak(*_HARD)[2]),
)
