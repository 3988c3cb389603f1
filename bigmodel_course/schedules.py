"""Learning-rate schedules.

A schedule is a plain function from the step number (0, 1, 2, ...) to a learning rate.
It knows nothing of optimizers, so it can be plotted, tested and composed by itself.
After its last step each one stays where it ended.
"""

from collections.abc import Callable, Iterable
from math import cos, inf, pi

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "linear_warmup",
    "one_cycle",
    "reduce_on_plateau",
    "step_decay",
    "warmup_cosine",
    "warmup_stable_decay",
]

Schedule = Callable[[int], float]


def _half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine, as `progress` goes from 0 to 1: flat at both ends."""
    return end + (start - end) * (1 + cos(pi * progress)) / 2


def constant(lr: float) -> Schedule:
    """The same rate at every step: rate(step) = lr."""
    if lr < 0:
        raise ValueError(f"need lr >= 0, got {lr=}")
    return lambda step: lr


def step_decay(lr: float, every: int, factor: float) -> Schedule:
    """Multiply by `factor` once in `every` steps: rate(step) = lr * factor ** (step // every)."""
    if lr < 0:
        raise ValueError(f"need lr >= 0, got {lr=}")
    if every < 1:
        raise ValueError(f"need every >= 1 step, got {every=}")
    if factor <= 0:
        raise ValueError(f"need factor > 0, got {factor=}")
    return lambda step: lr * factor ** (step // every)


def exponential(lr: float, factor: float) -> Schedule:
    """Multiply by `factor` at every step: rate(step) = lr * factor ** step.

    With `factor` above 1 it grows: a quick way to find the largest rate that still trains.
    """
    return step_decay(lr, 1, factor)


def linear_warmup(lr: float, warmup: int) -> Schedule:
    """Climb in equal steps to `lr`, and stay: rate(step) = lr * min(1, (step + 1) / warmup).

    The first step already moves: its rate is lr / warmup, not 0.  Why large batches need it: Goyal et al. 2017,
    section 2.2, arXiv 1706.02677.
    """
    if lr < 0:
        raise ValueError(f"need lr >= 0, got {lr=}")
    if warmup < 1:
        raise ValueError(f"need warmup >= 1 step, got {warmup=}")
    return lambda step: lr * min(1.0, (step + 1) / warmup)


def cosine(lr: float, total: int, floor: float = 0.0) -> Schedule:
    """Follow half a cosine from `lr` at step 0 down to `floor` at step `total`.

    rate(step) = floor + (lr - floor) * (1 + cos(pi * step / total)) / 2
    (Loshchilov & Hutter 2017, SGDR, equation 5, without restarts, arXiv 1608.03983).
    """
    if not 0 <= floor <= lr:
        raise ValueError(f"need 0 <= floor <= lr, got {floor=} and {lr=}")
    if total < 1:
        raise ValueError(f"need total >= 1 step, got {total=}")
    return lambda step: _half_cosine(lr, floor, min(1.0, step / total))


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Climb linearly to `peak` during `warmup` steps, then follow half a cosine down to `floor` at step `total`.

    step < warmup:  rate(step) = peak * (step + 1) / warmup
    afterwards:     rate(step) = floor + (peak - floor) * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2
    """
    if not 0 < warmup < total:
        raise ValueError(f"need 0 < warmup < total, got {warmup=} and {total=}")
    climb, fall = linear_warmup(peak, warmup), cosine(peak, total - warmup, floor)
    return lambda step: climb(step) if step < warmup else fall(step - warmup)


def warmup_stable_decay(peak: float, warmup: int, stable: int, decay: int, floor: float = 0.0) -> Schedule:
    """Climb to `peak` in `warmup` steps, keep it for `stable` steps, fall in a straight line to `floor` in `decay`.

    step < warmup:           rate(step) = peak * (step + 1) / warmup
    step < warmup + stable:  rate(step) = peak
    afterwards:              rate(step) = peak + (floor - peak) * (step - warmup - stable) / decay

    Unlike a cosine, the run can be prolonged: the end need not be known before the fall begins
    (Hu et al. 2024, MiniCPM, section 4, arXiv 2404.06395; their fall is an exponential).
    """
    if not 0 <= floor <= peak:
        raise ValueError(f"need 0 <= floor <= peak, got {floor=} and {peak=}")
    if stable < 0 or decay < 1:
        raise ValueError(f"need stable >= 0 and decay >= 1 steps, got {stable=} and {decay=}")
    climb, fall_begins = linear_warmup(peak, warmup), warmup + stable

    def rate(step: int) -> float:
        if step < fall_begins:
            return climb(step)
        return peak + (floor - peak) * min(1.0, (step - fall_begins) / decay)

    return rate


def one_cycle(
    peak: float, total: int, *, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> Schedule:
    """Climb to `peak` during the share `pct_start` of `total` steps, then fall far below the start: two half cosines.

    start = peak / div_factor, end = start / final_div_factor, and the peak is at step `pct_start * total - 1`.
    The last step is `total - 1`.  The idea is Smith & Topin's (arXiv 1708.07120); the shape and the options' names are
    those of torch's OneCycleLR, which also moves the momentum.
    """
    if peak < 0:
        raise ValueError(f"need peak >= 0, got {peak=}")
    if not 1 < pct_start * total < total:
        raise ValueError(f"need 1 < pct_start * total < total, got {pct_start=} and {total=}")
    if min(div_factor, final_div_factor) <= 0:
        raise ValueError(f"need div_factor and final_div_factor > 0, got {div_factor=} and {final_div_factor=}")
    start, top, last = peak / div_factor, pct_start * total - 1, total - 1
    end = start / final_div_factor

    def rate(step: int) -> float:
        if step <= top:  # `top` need not be a whole number: then no step has exactly the peak
            return _half_cosine(start, peak, step / top)
        return _half_cosine(peak, end, min(1.0, (step - top) / (last - top)))

    return rate


def reduce_on_plateau(
    lr: float, values: Iterable[float], *, factor: float = 0.1, patience: int = 10, threshold: float = 1e-4
) -> float:
    """The rate after the `values` measured so far: multiplied by `factor` each time they stop falling.

    A value is better when it is below best * (1 - threshold).  After more than `patience` values in a row that are not,
    the rate is reduced and the count starts again.  Nothing is remembered between calls, so a resumed run needs no
    state but its history.  `values` are to fall: of an accuracy, pass 1 - accuracy.  For a lowest rate, take
    max(floor, reduce_on_plateau(...)).
    """
    if lr < 0:
        raise ValueError(f"need lr >= 0, got {lr=}")
    if not 0 < factor < 1:
        raise ValueError(f"need 0 < factor < 1, got {factor=}")
    if patience < 0:
        raise ValueError(f"need patience >= 0, got {patience=}")
    best, bad = inf, 0
    for value in values:
        better = value < best * (1 - threshold)
        best, bad = (value, 0) if better else (best, bad + 1)
        if bad > patience:
            lr, bad = lr * factor, 0
    return lr
