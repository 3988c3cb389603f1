"""How many steps an optimizer needs.  On a quadratic, kappa = largest / smallest curvature."""

from math import ceil, log, sqrt

from bigmodel_course.costs.arguments import at_least, positive

__all__ = [
    "batch_variance",
    "bias_correction",
    "gradient_descent_rate",
    "heavy_ball_rate",
    "noise_scale",
    "sgd_noise_floor",
    "stability_limit",
    "steps_at_batch",
    "steps_to_reach",
]


def gradient_descent_rate(kappa: float) -> float:
    """What each step leaves of the error at the best constant learning rate: (kappa - 1) / (kappa + 1)."""
    at_least(1, kappa=kappa)
    return (kappa - 1) / (kappa + 1)


def heavy_ball_rate(kappa: float) -> float:
    """The same with momentum (Polyak 1964): (sqrt(kappa) - 1) / (sqrt(kappa) + 1).

    It is reached in the limit only: the error falls as step * rate**step.  The best momentum is rate**2.
    """
    at_least(1, kappa=kappa)
    return gradient_descent_rate(sqrt(kappa))


def stability_limit(largest_eigenvalue: float) -> float:
    """The learning rate at which gradient descent on a quadratic stops converging: 2 / largest curvature."""
    positive(largest_eigenvalue=largest_eigenvalue)
    return 2 / largest_eigenvalue


def steps_to_reach(rate: float, reduction: float) -> int:
    """The fewest steps after which rate**steps <= reduction (1e-6: a millionth of the first error)."""
    if not (0 <= rate < 1 and 0 < reduction <= 1):
        raise ValueError(f"need 0 <= rate < 1 and 0 < reduction <= 1, got {rate=} and {reduction=}")
    if rate == 0:
        return int(reduction < 1)
    return ceil(log(reduction) / log(rate) - 1e-9)  # rounding must not add a step


def bias_correction(beta: float, t: int) -> float:
    """The weight that has arrived in a running mean which began at 0, after `t` values: 1 - beta**t.

    Adam divides by it (Kingma & Ba 2015, section 3, arXiv 1412.6980).
    """
    if not (0 <= beta < 1 and t >= 1):
        raise ValueError(f"need 0 <= beta < 1 and t >= 1 (steps count from 1), got {beta=} and {t=}")
    return 1 - beta**t


def batch_variance(single: float, batch: int, population: int | None = None) -> float:
    """Variance of the mean of `batch` gradients, if one alone has variance `single`: single / batch.

    Drawn without replacement out of `population`, it is (population - batch) / (population - 1) times that:
    the whole data set has no noise at all.
    """
    at_least(1, batch=batch)
    if population is None:
        return single / batch
    if batch > population:
        raise ValueError(f"need batch <= population, got {batch=} and {population=}")
    return single / batch * (population - batch) / max(population - 1, 1)


def noise_scale(trace: float, squared_norm: float) -> float:
    """The simple noise scale, near which the critical batch size lies: tr(Sigma) / |G|**2.

    `trace` sums the variances of one example's gradient, `squared_norm` is that of the mean gradient
    (McCandlish et al. 2018, section 2.2, arXiv 1812.06162).
    """
    positive(squared_norm=squared_norm)
    return trace / squared_norm


def steps_at_batch(fewest: float, batch: int, noise: float) -> float:
    """Steps with `batch` examples each, if `fewest` suffice without noise: fewest * (1 + noise / batch).

    Far below the noise scale twice the batch takes half the steps; far above it, hardly fewer (same paper).
    """
    at_least(1, batch=batch)
    return fewest * (1 + noise / batch)


def sgd_noise_floor(lr: float, curvature: float, variance: float) -> float:
    """The loss at which SGD stays on curvature * x**2 / 2, if the gradient's variance is `variance`.

    lr * variance / (2 * (2 - lr * curvature)), below the stability limit.
    """
    if not 0 < lr * curvature < 2:
        raise ValueError(f"need 0 < lr < 2 / curvature, got {lr=} and {curvature=}")
    return lr * variance / (2 * (2 - lr * curvature))
