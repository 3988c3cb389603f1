"""Lesson 15, learning rates: warm-up with a cosine, reduce on plateau, the fewest steps under noise."""

from collections.abc import Callable
from math import cos, inf, isfinite, pi

from bigmodel_course import schedules
from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["fewest_noisy_steps", "plateau", "warmup_cosine"]


def _climb(step: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / warmup


def _fall(progress: float, peak: float, floor: float) -> float:
    return floor + (peak - floor) * (1 + cos(pi * progress)) / 2


def _shape(progress: Callable[[int, int, int], float]) -> Callable[..., float]:
    """Warm-up and cosine, with another idea of how far the fall has come: progress(step, warmup, total)."""

    def rate(step: int, peak: float, warmup: int, total: int, floor: float) -> float:
        return _climb(step, peak, warmup) if step < warmup else _fall(progress(step, warmup, total), peak, floor)

    return rate


def _right(step: int, peak: float, warmup: int, total: int, floor: float) -> float:
    return schedules.warmup_cosine(peak, warmup, total, floor)(step)


warmup_cosine = Exercise(
    name="15.1",
    solution=_right,
    trials=tuple((step, 2.0, 4, 20, 0.5) for step in (0, 2, 3, 4, 5, 11, 12, 16, 19, 20, 21, 30)),
    labels=("step", "peak", "warmup", "total", "floor"),
    mistakes=(
        Mistake(
            lambda step, peak, warmup, total, floor: (
                peak * step / warmup if step < warmup else _right(step, peak, warmup, total, floor)
            ),
            "Your first step has rate 0 and is wasted: steps count from 0, so use (step + 1) / warmup.",
        ),
        Mistake(
            lambda step, peak, warmup, total, floor: (
                _climb(step, peak, warmup + 1) if step < warmup else _right(step, peak, warmup, total, floor)
            ),
            "The last step of the warm-up, warmup − 1, must already have the peak.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: min(1.0, step / total)),
            "The cosine begins after the warm-up: count both its steps and its length from there.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: min(1.0, (step - warmup) / total)),
            "The fall lasts total − warmup steps, so that it ends at total.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: min(1.0, (step - warmup) / (total - warmup + 1))),
            "You reach the floor one step late: at step = total the progress must be 1.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: min(1.0, (step - warmup) / (total - warmup - 1))),
            "You reach the floor one step early: at step = total − 1 there is still a bit to go.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: (step - warmup) / (total - warmup)),
            "After `total` your cosine climbs again: let the progress stop at 1.",
        ),
        Mistake(
            lambda step, peak, warmup, total, floor: _right(step, peak, warmup, total, 0.0),
            "You left out the floor: the fall goes from peak to floor, not to 0.",
        ),
        Mistake(
            lambda step, peak, warmup, total, floor: (
                _right(step, peak, warmup, total, 0.0) + (floor if step >= warmup else 0.0)
            ),
            "Floor on top of the whole peak: the cosine may only span peak − floor.",
        ),
        Mistake(
            lambda step, peak, warmup, total, floor: max(floor, _right(step, peak, warmup, total, 0.0)),
            "Do not cut the curve off at the floor: let the cosine itself end there.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: 2 * min(1.0, (step - warmup) / (total - warmup))),
            "A whole period goes down and up again. Half a period, π, goes from 1 to −1.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: min(1.0, (step - warmup) / (total - warmup)) / 2),
            "A quarter of a period ends at cos(π/2) = 0, half way down: the fall needs an angle of π.",
        ),
        Mistake(
            _shape(lambda step, warmup, total: 180 / pi * min(1.0, (step - warmup) / (total - warmup))),
            "math.cos takes radians: half a period is π, not 180.",
        ),
    ),
    remark="the first step moves, the last one stands on the floor.",
)


def _watch(
    rate: float,
    values: list[float],
    factor: float,
    patience: int,
    *,
    better: Callable[[float, float], bool] = lambda value, best: value < best,
    over: Callable[[int, int], bool] = lambda waiting, patience: waiting > patience,
    after_better: int | None = 0,
    after_cut: int | None = 0,
    follow: bool = False,
    forget: bool = False,
) -> float:
    """The plateau rule with one thing changed: None keeps the counter, `follow` compares with the last value."""
    best, waiting = inf, 0
    for value in values:
        if better(value, best):
            best, waiting = value, waiting if after_better is None else after_better
        else:
            best, waiting = value if follow else best, waiting + 1
        if over(waiting, patience):
            rate, waiting = rate * factor, waiting if after_cut is None else after_cut
            best = inf if forget else best
    return rate


def _up_and_down(rate: float, values: list[float], factor: float, patience: int) -> float:
    best, waiting = inf, 0
    for value in values:
        if value < best:
            rate, best, waiting = rate if best == inf else rate / factor, value, 0
        else:
            waiting += 1
        if waiting > patience:
            rate, waiting = rate * factor, 0
    return rate


plateau = Exercise(
    name="15.2",
    solution=lambda rate, values, factor, patience: schedules.reduce_on_plateau(
        rate, values, factor=factor, patience=patience, threshold=0.0
    ),
    trials=(
        (1.0, [], 0.5, 2),
        (1.0, [5.0, 4.0, 3.0, 2.0, 1.0], 0.5, 1),
        (1.0, [3.0, 4.0, 5.0], 0.5, 2),
        (1.0, [3.0, 3.0, 3.0, 3.0], 0.5, 2),
        (1.0, [3.0, 4.0, 2.0, 3.0, 1.0, 2.0, 0.5], 0.5, 1),
        (1.0, [1.0, 5.0, 4.0, 3.0, 2.0], 0.5, 2),
        (1.0, [1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0], 0.5, 1),
        (0.8, [2.0, 3.0, 3.0, 2.5, 2.4, 2.3, 1.0, 1.5], 0.1, 1),
    ),
    labels=("rate", "values", "factor", "patience"),
    mistakes=(
        Mistake(
            lambda *a: _watch(*a, better=lambda value, best: value <= best),
            "An equal value is no new best: on a plateau all values are equal.",
        ),
        Mistake(lambda *a: _watch(*a, after_better=None), "A new best must set the counter back to 0."),
        Mistake(
            lambda *a: _watch(*a, follow=True), "Compare with the best value so far, not with the one just before."
        ),
        Mistake(
            lambda *a: _watch(*a, after_cut=None),
            "After a reduction the counter starts again, or every further step reduces.",
        ),
        Mistake(
            lambda *a: _watch(*a, over=lambda waiting, patience: waiting >= patience),
            "You lose patience one value early: reduce when *more* than `patience` values bring nothing.",
        ),
        Mistake(
            lambda *a: _watch(*a, over=lambda waiting, patience: waiting > patience + 1),
            "You wait one value too long: value number patience + 1 without a new best reduces.",
        ),
        Mistake(
            lambda *a: _watch(*a, better=lambda value, best: value > best or best == inf),
            "These values are to fall: a new best is a lower one.",
        ),
        Mistake(_up_and_down, "The rule only ever lowers: a new best does not raise the rate."),
        Mistake(lambda *a: _watch(*a, forget=True), "A reduction does not make the best value worse: keep it."),
        Mistake(
            lambda rate, values, factor, patience: (
                rate * factor if _watch(rate, values, factor, patience) < rate else rate
            ),
            "A second plateau reduces again: multiply each time, not once.",
        ),
        Mistake(
            lambda rate, values, factor, patience: _watch(rate, values, 1 - factor, patience),
            "Multiply by the factor; do not take that share away.",
        ),
    ),
    remark="a function of the history: a resumed run needs nothing else.",
)


def expected_loss(rates: list[float], curvatures: list[float], noise: float, start: float) -> float:
    """½ Σ λ E e² after steps with these `rates`, each gradient λ·e plus noise, the error `start` in every direction."""
    squares = [start**2] * len(curvatures)
    for rate in rates:
        squares = [(1 - rate * c) ** 2 * s + (rate * noise) ** 2 for c, s in zip(curvatures, squares, strict=True)]
    return sum(c * s for c, s in zip(curvatures, squares, strict=True)) / 2


Bowl = tuple[list[float], float, float, float]


def _first_enough(shape: Callable[[int], list[float]], bowl: Bowl) -> list[float]:
    """The shortest run of this shape that, with one of some peaks, reaches the target; by halving the interval."""
    *known, target = bowl
    peaks = [1.95 / max(known[0]) * 0.9**i for i in range(40)]

    def best(steps: int) -> list[float]:
        return min(([peak * part for part in shape(steps)] for peak in peaks), key=lambda r: expected_loss(r, *known))

    low, high = 1, 1
    while expected_loss(best(high), *known) > target:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if expected_loss(best(middle), *known) <= target else (middle + 1, high)
    return best(high)


def _line(*bowl) -> list[float]:
    return _first_enough(lambda steps: [1 - step / steps for step in range(steps)], bowl)


def _inverse_time(*bowl) -> list[float]:
    return _first_enough(lambda steps: [1 / (1 + step / 30) for step in range(steps)], bowl)


def _enough(rates: list[float], curvatures: list[float], noise: float, start: float, target: float) -> str | None:
    if len(rates) > 10_000:
        return f"{len(rates):,} steps are more than anybody needs here"
    if not all(isfinite(rate) and rate >= 0 for rate in rates):
        return "a rate must be a finite number of at least 0"
    loss = expected_loss(rates, curvatures, noise, start)
    if loss <= target * (1 + 1e-9):
        return None
    return f"after your {len(rates)} steps the expected loss is {loss:.3g}, allowed {target:g}"


_BOWL = ([1.0, 0.1, 0.02], 1.0, 10.0, 0.2)
_PAR = len(_inverse_time(*_BOWL))

fewest_noisy_steps = Exercise(
    name="15.3",
    solution=_line,
    accept=_enough,
    trials=(([1.0, 0.2], 1.0, 5.0, 0.3), _BOWL),
    labels=("curvatures", "noise", "start", "target"),
    mistakes=(
        Mistake(
            lambda curvatures, noise, start, target: [1 / max(curvatures)] * 1000,
            "At a constant rate the loss stops at the noise floor, however many steps you take.",
        ),
        Mistake(
            lambda curvatures, noise, start, target: [2 / max(curvatures)] * 1000,
            "At 2/λmax the steepest direction never shrinks, and each step adds noise.",
        ),
        Mistake(
            lambda curvatures, noise, start, target: [1 / (step + 1) for step in range(1000)],
            "1/(step + 1) falls too early: the flat direction has hardly moved. Keep the rate high for longer.",
        ),
        Mistake(
            lambda curvatures, noise, start, target: [0.9**step / max(curvatures) for step in range(1000)],
            "The sum of your rates is finite, so the flat direction never arrives. Fall more slowly.",
        ),
        Mistake(
            lambda curvatures, noise, start, target: [2 * target / noise**2 / len(curvatures)] * 20,
            "The floor of that rate is low enough, but you never reach it: take more steps, or start higher.",
        ),
        Mistake(
            lambda curvatures, noise, start, target: _line(curvatures, noise, start, target)[::-1],
            "The other way round: first high, to be quick, then low, to lose the noise.",
        ),
        Mistake(
            lambda curvatures, noise, start, target: _line(curvatures, 0.0, start, target),
            "Without noise that would be enough. Each step adds (rate · noise)² to every squared error.",
        ),
        Mistake(lambda curvatures, noise, start, target: [], "No step leaves the whole error."),
    ),
    remark="the expected loss is under the target.",
    score=Score(lambda answer: len(answer(*_BOWL)), "steps", _PAR),
)
