"""Lesson 48, planning a cluster: state bytes, training days, padding, the fastest layout of a 70B model."""

from collections.abc import Sequence
from functools import cache
from math import ceil, prod

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["fastest_layout", "padding", "state_bytes", "training_days"]


def _states(weight: int, gradient: int, optimizer: int, stages: tuple[int, int, int] = (3, 2, 1)):
    """State bytes with these bytes a parameter, each kind divided from its stage on."""
    sizes = tuple(zip((weight, gradient, optimizer), stages, strict=True))

    def answer(parameters: float, devices: int, stage: int) -> float:
        return sum(size * parameters / (devices if stage >= first else 1) for size, first in sizes)

    return answer


state_bytes = Exercise(
    name="48.1",
    solution=_states(2, 2, 12),
    trials=((7.5e9, 64, 0), (7.5e9, 64, 1), (7.5e9, 64, 2), (7.5e9, 64, 3), (1e9, 8, 2)),
    labels=("parameters", "devices", "stage"),
    mistakes=(
        Mistake(_states(2, 2, 8), "Adam keeps the mean, the square and a 32-bit copy of the weight: 12 bytes, not 8."),
        Mistake(_states(4, 4, 12), "Weights and gradients have 16 bits here: 2 bytes each."),
        Mistake(
            _states(2, 2, 12, (1, 1, 1)), "Stage 1 divides the optimizer's states only; gradients come with stage 2."
        ),
        Mistake(_states(2, 2, 12, (3, 1, 1)), "Gradients are divided from stage 2 on, not from stage 1."),
        Mistake(_states(2, 2, 12, (2, 2, 1)), "Weights are divided in stage 3 only."),
        Mistake(_states(2, 2, 12, (4, 2, 1)), "In stage 3 the weights are divided as well."),
        Mistake(_states(2, 2, 12, (0, 0, 0)), "In stage 0 nothing is divided: each device holds everything."),
    ),
    remark="sixteen bytes a parameter; the optimizer's twelve are the first worth dividing.",
)


def _days(flops: float, *, mfu_divides: bool = True, hours: bool = False, all_devices: bool = True):
    def answer(parameters: float, tokens: float, devices: int, peak: float, mfu: float) -> float:
        speed = peak * (devices if all_devices else 1) * (mfu if mfu_divides else 1 / mfu)
        return flops * parameters * tokens / speed / (3600 if hours else 86_400)

    return answer


training_days = Exercise(
    name="48.2",
    solution=_days(6),
    trials=((175e9, 300e9, 1024, 312e12, 0.45), (8e9, 15e12, 64, 989e12, 0.4)),
    labels=("parameters", "tokens", "devices", "peak", "mfu"),
    mistakes=(
        Mistake(_days(2), "Two FLOPs a parameter and token are the forward pass only; backward takes four more."),
        Mistake(_days(8), "Eight counts a forward pass that is computed again: MFU asks for the model's own six."),
        Mistake(_days(3), "A multiply-add is two FLOPs: six a parameter and token, not three."),
        Mistake(_days(6, mfu_divides=False), "A lower utilization makes it slower: divide the work by peak times mfu."),
        Mistake(_days(6, hours=True), "A day has 86,400 seconds; you divided by those of an hour."),
        Mistake(_days(6, all_devices=False), "All devices work at once: multiply the speed by their number."),
    ),
    remark="with 45 % of its peak, a thousand A100 read GPT-3's 300 billion tokens in about a month.",
)


def _held(shape: Sequence[int], ranks: int, *, rows=ceil, dimension: int = 0) -> int:
    rest = prod(shape) // shape[dimension]
    return rows(shape[dimension] / ranks) * ranks * rest


def _padding(shapes: Sequence[Sequence[int]], ranks: int, **options) -> float:
    return sum(_held(shape, ranks, **options) for shape in shapes) / sum(map(prod, shapes))


def _padded_total(shapes: Sequence[Sequence[int]], ranks: int) -> float:
    numbers = sum(map(prod, shapes))
    return ceil(numbers / ranks) * ranks / numbers


def _mean_padding(shapes: Sequence[Sequence[int]], ranks: int) -> float:
    return sum(_held(shape, ranks) / prod(shape) for shape in shapes) / len(shapes)


def _worst_padding(shapes: Sequence[Sequence[int]], ranks: int) -> float:
    return max(_held(shape, ranks) / prod(shape) for shape in shapes)


padding = Exercise(
    name="48.3",
    solution=_padding,
    trials=(([(10, 4), (6,)], 4), ([(128, 16_384), (2048, 16_384), (16_384,)], 2048), ([(7, 3), (3, 5)], 3)),
    labels=("shapes", "ranks"),
    mistakes=(
        Mistake(_padded_total, "Each tensor is cut by itself, in whole rows: pad every tensor, not their sum."),
        Mistake(_mean_padding, "A large tensor weighs more than a small one: add the numbers first, then divide."),
        Mistake(_worst_padding, "Not the worst tensor alone: all of them together."),
        Mistake(
            lambda shapes, ranks: _padding(shapes, ranks, rows=int), "Rows that do not divide are rounded up, not down."
        ),
        Mistake(lambda shapes, ranks: _padding(shapes, ranks, dimension=-1), "It is the first dimension that is cut."),
        Mistake(
            lambda shapes, ranks: 1 / _padding(shapes, ranks),
            "Held over needed, so that 1 means no waste: turn it round.",
        ),
    ),
    remark="few rows and many ranks: there the padding is.",
)


MODEL, CLUSTER, BATCH = costs.TRANSFORMERS["Llama 3 70B"], costs.Cluster(costs.DEVICES["H100"], 64), 256


def _fault(layout: costs.Layout) -> str | None:
    if not isinstance(layout, costs.Layout):
        return f"return a costs.Layout, you have {type(layout).__name__}"
    if layout.batch != BATCH:
        return f"the batch is to be {BATCH}, yours is {layout.batch}"
    try:
        plan = costs.plan(MODEL, CLUSTER, layout)
    except ValueError as refusal:
        return f"it cannot be laid out: {refusal}"
    return None if plan.fits else plan.why


@cache
def _best() -> costs.Plan:
    return costs.search_layouts(MODEL, CLUSTER, BATCH)[0]


fastest_layout = Exercise(
    name="48.4",
    solution=lambda: _best().layout,
    trials=((),),
    accept=_fault,
    mistakes=(
        Mistake(
            lambda: costs.Layout(64, batch=BATCH, stage=0),
            "Plain data parallelism holds a whole copy on each device: 16 bytes times 70 billion.",
        ),
        Mistake(
            lambda: costs.Layout(64, batch=BATCH, stage=1),
            "Stage 1 divides the optimizer; weights and gradients of 70 billion are still whole on every device.",
        ),
        Mistake(
            lambda: costs.Layout(64, batch=BATCH, stage=3),
            "The states are divided now; the activations are not. Recompute them, or divide them over tensor ranks.",
        ),
        Mistake(
            lambda: costs.Layout(1, 64, batch=BATCH),
            "Eight heads of keys and values cannot be divided over 64 ranks; and no link is that wide.",
        ),
        Mistake(
            lambda: costs.Layout(8, 8, batch=64, recompute="selective"),
            "A smaller batch is another training: keep 256 sequences a step.",
        ),
        Mistake(
            lambda: costs.Layout(16, 4, batch=BATCH),
            "Four tensor ranks leave 70 GB of weights and gradients on each device: add pipeline stages.",
        ),
    ),
    remark="it fits.",
    score=Score(
        lambda answer: costs.plan(MODEL, CLUSTER, answer()).step_seconds, "seconds a step", _best().step_seconds
    ),
)
