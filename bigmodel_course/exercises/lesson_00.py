"""Lesson 00, start here: the parameters of an MLP, the bytes of mixed precision, the shape that keeps the least."""

from itertools import pairwise
from math import ceil, isqrt, prod
from numbers import Integral

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["leanest_shape", "mlp_parameters", "training_bytes"]


def _weights(widths: list[int]) -> int:
    return sum(inputs * outputs for inputs, outputs in pairwise(widths))


mlp_parameters = Exercise(
    name="00.1",
    solution=lambda widths: _weights(widths) + sum(widths[1:]),
    trials=(([64, 128, 10],), ([784, 300, 100, 10],), ([5, 3],)),
    labels=("widths",),
    mistakes=(
        Mistake(_weights, "Each layer has biases too: one for each of its outputs."),
        Mistake(
            lambda widths: _weights(widths) + sum(widths[:-1]),
            "A bias belongs to an output of a layer, not to an input.",
        ),
        Mistake(
            lambda widths: _weights(widths) + sum(widths),
            "The first width is the data's: it has no layer before it, and no bias.",
        ),
        Mistake(
            lambda widths: _weights(widths) + len(widths) - 1,
            "One bias for each output, not one for each layer.",
        ),
        Mistake(prod, "Layers follow one another: their parameters add up. Only the two widths of one layer multiply."),
        Mistake(sum, "You counted the units. Between two layers each pair of units has its own weight."),
        Mistake(
            lambda widths: _weights(widths[:-1]) + sum(widths[1:-1]),
            "You stopped one layer early: the last pair of widths is a layer as well.",
        ),
        Mistake(
            lambda widths: _weights(widths[1:]) + sum(widths[2:]),
            "You started one layer late: the first pair of widths is a layer as well.",
        ),
    ),
    remark="costs.mlp counts the same, layer by layer.",
)


def _master(small: int, large: int) -> int:
    return large if small < large else 0


training_bytes = Exercise(
    name="00.2",
    solution=lambda parameters, small, large: parameters * (2 * small + 2 * large + _master(small, large)),
    trials=((1_000_000_000, 2, 4), (9_610, 4, 4), (1_000, 1, 4)),
    labels=("parameters", "small", "large"),
    mistakes=(
        Mistake(
            lambda parameters, small, large: parameters * (small + 2 * large + _master(small, large)),
            "You left out the gradients: as many numbers as weights, of the same size.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * (2 * small + large + _master(small, large)),
            "Adam keeps two averages for each parameter, of the gradient and of its square.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * (2 * small + 2 * large),
            "You left out the second copy of the weights, which the updates are added to.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * (2 * small + 3 * large),
            "Where both sizes are equal, nobody needs a second copy of the weights.",
        ),
        Mistake(
            lambda parameters, small, large: 8 * parameters * (2 * small + 2 * large + _master(small, large)),
            "These are bits. The sizes are given in bytes, and the answer is in bytes.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * 4 * small,
            "Adam's averages are not small: they take `large` bytes each.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * 4 * large,
            "Weights and gradients are not large: they take `small` bytes each.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * (small + 3 * large + _master(small, large)),
            "The gradients are as small as the weights that they belong to.",
        ),
        Mistake(
            lambda parameters, small, large: parameters * small,
            "This stores the model. Training also needs gradients and what Adam remembers.",
        ),
    ),
    remark="2 and 4 bytes give 16 a parameter again: mixed precision saves activations and time, not these.",
)

_INPUTS, _CLASSES = 784, 10
_HARD = 2_000_000


def _count(widths: list[int]) -> int:
    return costs.total(costs.mlp(widths)).parameters


def _leanest(parameters: int) -> list[int]:
    """One or two hidden layers: a third could always be merged into the first, which then has more parameters."""
    shapes = [[ceil((parameters - _CLASSES) / (_INPUTS + 1 + _CLASSES))]]
    for second in range(1, isqrt(parameters) + 1):
        rest = parameters - _CLASSES - (1 + _CLASSES) * second
        shapes.append([max(1, ceil(rest / (_INPUTS + 1 + second))), second])
    return [_INPUTS, *min(shapes, key=sum), _CLASSES]


def _two_equal(parameters: int) -> list[int]:
    width = 1
    while _count([_INPUTS, width, width, _CLASSES]) < parameters:
        width += 1
    return [_INPUTS, width, width, _CLASSES]


def _enough(widths: list[int], parameters: int) -> str | None:
    if not isinstance(widths, (list, tuple)) or len(widths) < 2:
        return f"a list of widths from {_INPUTS} to {_CLASSES} was asked for"
    if not all(isinstance(width, Integral) and width >= 1 for width in widths):
        return "every width must be a whole number, 1 or more"
    if (widths[0], widths[-1]) != (_INPUTS, _CLASSES):
        return f"the first width must be {_INPUTS} and the last {_CLASSES}"
    if len(widths) > 10_000:
        return f"{len(widths):,} widths are more than anybody needs here"
    count = _count(widths)
    return None if count >= parameters else f"your model has {count:,} parameters, asked were {parameters:,}"


leanest_shape = Exercise(
    name="00.3",
    solution=_leanest,
    accept=_enough,
    trials=((266_610,), (_HARD,)),
    labels=("parameters",),
    mistakes=(
        Mistake(
            lambda parameters: _leanest(parameters)[1:-1],
            "Return all widths: 784 pixels first, 10 classes last.",
        ),
        Mistake(
            lambda parameters: [_INPUTS, parameters // (_INPUTS + 1 + _CLASSES), _CLASSES],
            "Rounding down leaves a few parameters missing: round up.",
        ),
        Mistake(
            lambda parameters: [_INPUTS, (parameters - _CLASSES) / (_INPUTS + 1 + _CLASSES), _CLASSES],
            "There is no half unit: round up to a whole one.",
        ),
        Mistake(
            lambda parameters: [_INPUTS, _CLASSES],
            "Without a hidden layer there are 7,850 parameters, however many were asked for.",
        ),
        Mistake(
            lambda parameters: [_INPUTS, ceil(parameters / (_INPUTS * _CLASSES)), _CLASSES],
            "The parameters of the layers add up; the widths of different layers do not multiply.",
        ),
        Mistake(
            lambda parameters: [_INPUTS, 300, 100, _CLASSES],
            "That is LeNet-300-100, right for 266,610 only: use the argument.",
        ),
    ),
    remark="the same parameters, and what training keeps depends on their shape.",
    score=Score(
        lambda answer: 4 * costs.total(costs.mlp(answer(_HARD))).activations,
        "bytes of activations a picture, at 2,000,000 parameters",
        4 * costs.total(costs.mlp(_two_equal(_HARD))).activations,
    ),
)
