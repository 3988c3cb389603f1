"""Lesson 47, a model over 100 million: the worst moment of a step, a loss scale, the fastest step that fits."""

from collections.abc import Callable
from itertools import product

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["fastest_that_fits", "next_scale", "peak_of_a_step", "seconds_of"]


def _peak(parameters: int, activations: int, parts: int) -> int:
    """12 bytes a parameter stay; activations of one part meet the gradients of those before."""
    kept = activations // parts
    return 12 * parameters + (max(4 * parameters, kept) if parts == 1 else 4 * parameters + kept)


peak_of_a_step = Exercise(
    name="47.1",
    solution=_peak,
    trials=((1000, 16_000, 1), (1000, 16_000, 4), (1000, 1000, 1), (124_632_256, 365_000_000, 2)),
    labels=("parameters", "activations", "parts"),
    mistakes=(
        Mistake(
            lambda n, a, parts: 16 * n + a // parts,
            "With one part gradients appear while activations go: they are never all there together.",
        ),
        Mistake(
            lambda n, a, parts: 12 * n + max(4 * n, a // parts),
            "From the second part on, the gradients of the first are there when the activations come.",
        ),
        Mistake(
            lambda n, a, parts: 12 * n + (max(4 * n, a) if parts == 1 else 4 * n + a),
            "Only one part's activations are kept at a time: divide them.",
        ),
        Mistake(
            lambda n, a, parts: 4 * n + (max(4 * n, a // parts) if parts == 1 else 4 * n + a // parts),
            "Adam's two averages are missing: 8 bytes a parameter, and they never go.",
        ),
        Mistake(
            lambda n, a, parts: _peak(n, a, parts) - (4 * n if parts > 1 else 0),
            "You free the gradients between the parts, but they are to be added up.",
        ),
        Mistake(
            lambda n, a, parts: 8 * n + (max(4 * n, a // parts) if parts == 1 else 4 * n + a // parts),
            "Adam has two averages, of 4 bytes each.",
        ),
        Mistake(
            lambda n, a, parts: 12 * n + a // parts,
            "And the end of the backward pass? Then the activations are gone, and all gradients are there.",
        ),
    ),
    remark="the peak is at the end of the forward pass or at the end of the backward, whichever is larger.",
)

State = tuple[float, int]


def _next(scale: float, good: int, finite: bool, patience: int) -> State:
    if not finite:
        return scale / 2, 0
    return (scale * 2, 0) if good + 1 == patience else (scale, good + 1)


def _never_up(scale: float, good: int, finite: bool, patience: int) -> State:
    return (scale, good + 1) if finite else (scale / 2, 0)


def _counted_on(scale: float, good: int, finite: bool, patience: int) -> State:
    new, count = _next(scale, good, finite, patience)
    return new, good if not finite else count


def _no_reset(scale: float, good: int, finite: bool, patience: int) -> State:
    new, count = _next(scale, good, finite, patience)
    return new, good + 1 if finite else count


def _late(scale: float, good: int, finite: bool, patience: int) -> State:
    if not finite:
        return scale / 2, 0
    return (scale * 2, 0) if good == patience else (scale, good + 1)


def _always_up(scale: float, good: int, finite: bool, patience: int) -> State:
    return (scale * 2, 0) if finite else (scale / 2, 0)


def _history(answer: Callable[..., State | None], finite: list[bool], patience: int) -> list[State] | None:
    """The states from (1024, 0) on, one a step."""
    states = [(1024.0, 0)]
    for each in finite:
        state = answer(*states[-1], each, patience)
        if state is None or state is ...:
            return None
        states.append((float(state[0]), int(state[1])))
    return states


STEPS = [False, True, True, True, True, True, True, True, False, True, True, False, True]

next_scale = Exercise(
    name="47.2",
    solution=_next,
    trials=((STEPS, 3), (STEPS, 1), (STEPS, 5)),
    use=_history,
    labels=("finite", "patience"),
    mistakes=(
        Mistake(_never_up, "It only falls: after `patience` good steps it must be tried twice as large."),
        Mistake(
            _always_up, "Twice as large after every good step would overflow every few steps: wait `patience` steps."
        ),
        Mistake(_counted_on, "After an overflow the count of good steps begins again at 0."),
        Mistake(_no_reset, "After doubling the count begins again at 0, or it doubles only once."),
        Mistake(_late, "One step late: this step is good, too, so `good + 1` steps have been."),
        Mistake(
            lambda scale, good, finite, patience: _next(scale, good, not finite, patience),
            "The wrong way round: an overflow means that the scale is too large.",
        ),
    ),
    remark="these are the numbers of torch's GradScaler, but for its default factor and patience of 2,000.",
)

SEQUENCES, TOKENS = 64, 256
CONFIG = costs.GPTConfig(layers=12, heads=16, width=928, context=256)
RATE, BANDWIDTH = 1e11, 2e10  # FLOP/s and bytes/s
LIMITS = (14_000_000_000, 4_000_000_000, 2_100_000_000)
Choice = tuple[int, bool]


def seconds_of(choice: Choice) -> float:
    """A step of 64 sequences in `parts`, with blocks computed `again` or not: arithmetic, and weights read anew."""
    parts, again = choice
    layers = costs.gpt(CONFIG, tokens=TOKENS)
    flops = SEQUENCES * (costs.training_flops(layers) + (costs.total(layers).flops if again else 0))
    return flops / RATE + parts * 3 * 4 * costs.total(layers).parameters / BANDWIDTH


def _fits(choice: Choice, limit: int) -> bool:
    parts, again = choice
    return costs.step_bytes(CONFIG, SEQUENCES, TOKENS, accumulate=parts, recompute=again).peak <= limit


def _ours(limit: int) -> Choice:
    choices = product([n for n in range(1, SEQUENCES + 1) if SEQUENCES % n == 0], (False, True))
    return min((choice for choice in choices if _fits(choice, limit)), key=seconds_of)


def _judge(choice: Choice, limit: int) -> str | None:
    parts, again = choice
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1 or SEQUENCES % parts:
        return f"parts must be a whole number that divides {SEQUENCES}, got {parts!r}"
    peak = costs.step_bytes(CONFIG, SEQUENCES, TOKENS, accumulate=parts, recompute=bool(again)).peak
    return None if peak <= limit else f"this step needs {peak / 1e9:.2f} GB, and there are {limit / 1e9:.2f}"


fastest_that_fits = Exercise(
    name="47.3",
    solution=_ours,
    trials=tuple((limit,) for limit in LIMITS),
    labels=("limit",),
    mistakes=(
        Mistake(lambda limit: (1, False), "Nothing is saved: read the largest kind off the table of section 1."),
        Mistake(lambda limit: (1, True), "Recomputing alone: with this many tokens the blocks' inputs are too much."),
        Mistake(lambda limit: (2, False), "Two parts halve the activations only: go on dividing until it fits."),
        Mistake(
            lambda limit: (max(1, round(16e9 / limit)), False),
            "Parts must divide the batch, and it is the activations that they divide, not the parameters.",
        ),
        Mistake(
            lambda limit: (8, False), "One answer for all limits: choose by `costs.step_bytes(…).peak` and the limit."
        ),
        Mistake(lambda limit: (limit // 1_000_000_000, True), "More memory allows fewer parts, not more."),
    ),
    accept=_judge,
    score=Score(
        lambda answer: sum(seconds_of(answer(limit)) for limit in LIMITS),
        "seconds for the three limits",
        sum(seconds_of(_ours(limit)) for limit in LIMITS),
    ),
    remark="fewer parts read the weights less often; recomputing costs a third more arithmetic.",
)
