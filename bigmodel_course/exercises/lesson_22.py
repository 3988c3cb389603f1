"""Lesson 22, quantization: an asymmetric grid, a layer in integers, the fewest bytes for a given error."""

from itertools import pairwise, product

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.compression.quantization import fit_affine

__all__ = ["asymmetric_grid", "fewest_bytes", "integer_layer"]


def _ends(x: Tensor) -> tuple[float, float]:
    return min(x.min().item(), 0.0), max(x.max().item(), 0.0)


def _grid(x: Tensor, bits: int) -> tuple[float, int]:
    low, high = _ends(x)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def _levels(x: Tensor, bits: int) -> tuple[float, int]:
    low, high = _ends(x)
    scale = (high - low) / 2**bits
    return scale, round(-low / scale)


def _from_largest(x: Tensor, bits: int) -> tuple[float, int]:
    scale = x.abs().max().item() / (2**bits - 1)
    return scale, round(-_ends(x)[0] / scale)


def _range_without_zero(x: Tensor, bits: int) -> tuple[float, int]:
    scale = (x.max() - x.min()).item() / (2**bits - 1)
    return scale, round(-x.min().item() / scale)


def _symmetric(x: Tensor, bits: int) -> tuple[float, int]:
    return x.abs().max().item() / (2 ** (bits - 1) - 1), 0


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


asymmetric_grid = Exercise(
    name="22.1",
    solution=_grid,
    trials=((_numbers(-0.7, 0.2, 2.0), 4), (_numbers(0.5, 1.25, 3.0), 8), (_numbers(-1.6, -0.3), 3)),
    labels=("x", "bits"),
    mistakes=(
        Mistake(_from_largest, "The scale comes from the range, max − min, and not from the largest magnitude."),
        Mistake(_levels, "Between 2^b codes there are 2^b − 1 steps: divide by 2^b − 1."),
        Mistake(
            lambda x, bits: (_grid(x, bits)[0], _grid(x, bits)[1] + 1),
            "The zero point is one too high: −min/s is already the code of zero, when the codes start at 0.",
        ),
        Mistake(
            lambda x, bits: (_grid(x, bits)[0], _grid(x, bits)[1] - 1),
            "The zero point is one too low: the smallest number has code 0, not −1.",
        ),
        Mistake(
            lambda x, bits: (_grid(x, bits)[0], -_ends(x)[0] / _grid(x, bits)[0]),
            "The zero point must be a whole number, or the real zero has no code: round it.",
        ),
        Mistake(
            lambda x, bits: (_grid(x, bits)[0], int(-_ends(x)[0] / _grid(x, bits)[0])),
            "You cut the zero point off: round to the nearest whole number.",
        ),
        Mistake(_range_without_zero, "The range must hold zero: min is at most 0 and max at least 0."),
        Mistake(
            lambda x, bits: (_grid(x, bits)[0], -_grid(x, bits)[1]),
            "The sign of the zero point: the codes start at 0, so the zero of a negative minimum lies above it.",
        ),
        Mistake(_symmetric, "That is the symmetric grid; here the codes go from 0 to 2^b − 1."),
        Mistake(
            lambda x, bits: (1 / _grid(x, bits)[0], _grid(x, bits)[1]),
            "Upside down: the scale is the real step from one code to the next.",
        ),
    ),
    remark="the error is at most half a step, and zero is exact.",
)


def _sums(x: Tensor, x_zero: int, w: Tensor) -> Tensor:
    return (x.int() - x_zero) @ w.int().T


def _codes(places: Tensor) -> Tensor:
    return places.clamp(0, 255).to(torch.uint8)


def _layer(x: Tensor, x_zero: int, w: Tensor, multiplier: Tensor, out_zero: int) -> Tensor:
    return _codes(torch.round(_sums(x, x_zero, w) * multiplier) + out_zero)


def _layer_in_8_bits(x: Tensor, x_zero: int, w: Tensor, multiplier: Tensor, out_zero: int) -> Tensor:
    sums = _sums(x, x_zero, w).to(torch.int8)
    return _codes(torch.round(sums * multiplier) + out_zero)


def _unsigned_difference(x: Tensor, x_zero: int, w: Tensor, multiplier: Tensor, out_zero: int) -> Tensor:
    sums = (x - x_zero).int() @ w.int().T  # uint8 − number wraps below 0
    return _codes(torch.round(sums * multiplier) + out_zero)


def _integers(seed: int, x_zero: int, out_zero: int, multiplier: Tensor) -> tuple:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 5), dtype=torch.uint8, generator=rng)
    w = torch.randint(-127, 128, (len(multiplier), 5), dtype=torch.int8, generator=rng)
    return x, x_zero, w, multiplier, out_zero


integer_layer = Exercise(
    name="22.2",
    solution=_layer,
    trials=(
        _integers(0, 100, 10, _numbers(0.004, 0.0031)),
        _integers(1, 37, 128, _numbers(0.02, 0.005, 0.011)),  # some outputs leave 0 … 255
    ),
    labels=("x", "x_zero", "w", "multiplier", "out_zero"),
    mistakes=(
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: _layer(x, 0, w, multiplier, out_zero),
            "The zero point of x is missing: a code stands for s(q − z).",
        ),
        Mistake(_layer_in_8_bits, "Your sums wrap around in 8 bits: convert the codes to int32 before you multiply."),
        Mistake(
            _unsigned_difference,
            "x − x_zero wraps below 0 in uint8: convert x before you subtract.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: (
                torch.round(_sums(x, x_zero, w) * multiplier).long() + out_zero
            ).to(torch.uint8),
            "Clamp to 0 … 255 before you make bytes: 256 wraps around to 0.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: _codes(
                torch.round(_sums(x, x_zero, w) * multiplier).clamp(0, 255) + out_zero
            ),
            "You clamp before you add the zero point: everything below zero is lost. Clamp last.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: _layer(x, x_zero, w, multiplier, 0),
            "The zero point of the output is missing: the real 0 has the code out_zero.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: _codes((_sums(x, x_zero, w) * multiplier).int() + out_zero),
            "You cut the fraction off: round to the nearest code.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: _layer(x, x_zero, w, 1 / multiplier, out_zero),
            "You divide by the multiplier: it is already s_x s_w / s_out.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: _layer(x, x_zero, w, multiplier.mean(), out_zero),
            "Each output has its own multiplier: the scales are per channel.",
        ),
        Mistake(
            lambda x, x_zero, w, multiplier, out_zero: (
                torch.round(_sums(x, x_zero, w) * multiplier + out_zero).clamp(-128, 127).to(torch.int8)
            ),
            "The output is uint8: its codes go from 0 to 255, not from −128 to 127.",
        ),
    ),
    remark="no float but the multiplier, and the same codes as the float product gives.",
)

Weights = list[Tensor]


def outputs(weights: Weights, x: Tensor) -> Tensor:
    """What the MLP gives: ReLU between the layers, no biases."""
    for i, weight in enumerate(weights):
        x = x @ weight.T if i == 0 else x.relu() @ weight.T
    return x


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weights on a symmetric grid, one scale a row."""
    grid = fit_affine(weight, bits=bits, symmetric=True, dim=0)
    return grid.decode(grid.encode(weight))


def error_left(weights: Weights, x: Tensor, bits: list[int]) -> float:
    """How far the outputs move, relative to their own size."""
    full = outputs(weights, x)
    return float((outputs([rounded(w, b) for w, b in zip(weights, bits, strict=True)], x) - full).norm() / full.norm())


def code_bytes(weights: Weights, bits: list[int]) -> int:
    """Bytes of the codes, packed without gaps."""
    return sum(-(-w.numel() * b // 8) for w, b in zip(weights, bits, strict=True))


def _search(weights: Weights, x: Tensor, limit: float) -> list[int]:
    """All choices, the cheapest first; the first one that is allowed."""
    tables = [{b: rounded(w, b) for b in range(2, 9)} for w in weights]
    full = outputs(weights, x)
    choices = sorted(product(range(2, 9), repeat=len(weights)), key=lambda bits: code_bytes(weights, list(bits)))
    for bits in choices:
        moved = outputs([table[b] for table, b in zip(tables, bits, strict=True)], x) - full
        if float(moved.norm() / full.norm()) <= limit:
            return list(bits)
    raise ValueError(f"limit must allow 8 bits everywhere, got {limit}")


def _uniform(weights: Weights, x: Tensor, limit: float) -> list[int]:
    return next([b] * len(weights) for b in range(2, 9) if error_left(weights, x, [b] * len(weights)) <= limit)


def _greedy(weights: Weights, x: Tensor, limit: float) -> list[int]:
    """From 8 bits down: take the bit that adds the least error for each byte saved, while the error is allowed."""
    bits = [8] * len(weights)
    while True:
        choices = []
        for i in range(len(bits)):
            trial = [b - (i == j) for j, b in enumerate(bits)]
            if trial[i] >= 2 and (error := error_left(weights, x, trial)) <= limit:
                choices.append((error**2 / weights[i].numel(), trial))
        if not choices:
            return bits
        bits = min(choices)[1]


def _one_at_a_time(weights: Weights, x: Tensor, limit: float) -> list[int]:
    chosen = []
    for i in range(len(weights)):
        alone = ([b if i == j else 8 for j in range(len(weights))] for b in range(2, 9))
        chosen.append(next(bits[i] for bits in alone if error_left(weights, x, bits) <= limit))
    return chosen


def _by_weight_error(weights: Weights, x: Tensor, limit: float) -> list[int]:
    return [next(b for b in range(2, 9) if (rounded(w, b) - w).norm() <= limit * w.norm()) for w in weights]


def _allowed(bits: list[int], weights: Weights, x: Tensor, limit: float) -> str | None:
    if not isinstance(bits, list) or len(bits) != len(weights):
        return f"return a list of {len(weights)} numbers of bits, one for each layer"
    if not all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= 8 for b in bits):
        return f"bits are whole numbers from 2 to 8, got {bits}"
    error = error_left(weights, x, bits)
    return None if error <= limit else f"with {bits} bits the outputs move by {error:.3g}, allowed {limit:g}"


def _problem(seed: int, widths: tuple[int, ...], limit: float) -> tuple[Weights, Tensor, float]:
    """Layers of very different size; one has rows with a few large weights, which a grid serves badly."""
    rng = torch.Generator().manual_seed(seed)
    weights = []
    for i, (inputs, neurons) in enumerate(pairwise(widths)):
        weight = torch.randn(neurons, inputs, dtype=torch.float64, generator=rng)
        if i % 2:
            weight = weight * weight.abs()
        weights.append(weight / inputs**0.5)
    return weights, torch.randn(40, widths[0], dtype=torch.float64, generator=rng), limit


_EASY, _HARD = _problem(0, (8, 16, 12, 4), 0.1), _problem(0, (12, 48, 24, 16, 6), 0.12)

fewest_bytes = Exercise(
    name="22.3",
    solution=_search,
    accept=_allowed,
    trials=(_EASY, _HARD),
    labels=("weights", "x", "limit"),
    mistakes=(
        Mistake(
            _one_at_a_time,
            "Each layer alone can be rounded so far. Together they move the outputs too far: the errors add up.",
        ),
        Mistake(
            lambda weights, x, limit: _search(weights, x, limit**0.5),
            "You compare the squared error with the limit: take the root.",
        ),
        Mistake(
            lambda weights, x, limit: _search(weights, x, limit * float(outputs(weights, x).norm())),
            "Your error is absolute: divide by the norm of the outputs before rounding.",
        ),
        Mistake(
            _by_weight_error,
            "The error of the weights is not the error of the outputs: run the rounded model on x.",
        ),
        Mistake(
            lambda weights, x, limit: [2] * len(weights),
            "Two bits everywhere is the smallest model, and the outputs move too far: measure on x.",
        ),
        Mistake(
            lambda weights, x, limit: _search(weights, x, limit)[::-1],
            "The order: the first number belongs to the first layer.",
        ),
        Mistake(
            lambda weights, x, limit: _uniform(weights, x, limit)[0],
            "One number is not enough: return a list, with the bits of each layer.",
        ),
        Mistake(
            lambda weights, x, limit: code_bytes(weights, _search(weights, x, limit)),
            "These are the bytes: return the list of bits that gives them.",
        ),
        Mistake(
            lambda weights, x, limit: [2 ** (b - 1) - 1 for b in _search(weights, x, limit)],
            "These are the largest codes: return the bits.",
        ),
        Mistake(
            lambda weights, x, limit: [
                8 * rounded(w, b).numel() for w, b in zip(weights, _uniform(weights, x, limit), strict=True)
            ],
            "These are bits of whole layers: return the bits of one weight.",
        ),
    ),
    remark="the outputs stay within the limit, and no byte is spent twice.",
    score=Score(lambda answer: code_bytes(_HARD[0], answer(*_HARD)), "bytes", code_bytes(_HARD[0], _greedy(*_HARD))),
)
