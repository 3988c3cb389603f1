"""Lesson 16, the training loop: macro F1 from counts, clipping by the joint norm, the fewest pieces of a batch."""

import torch
from torch import Tensor

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["clip", "fewest_pieces", "macro_f1"]


def _counts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right, called and actual, per class."""
    matrix = matrix.double()
    return matrix.diagonal(), matrix.sum(0), matrix.sum(1)


def _f1(matrix: Tensor) -> Tensor:
    right, called, actual = _counts(matrix)
    return 2 * right / (called + actual)


def _harmonic(a: Tensor, b: Tensor) -> Tensor:
    return 2 * a * b / (a + b)


def _precision_recall(matrix: Tensor) -> tuple[Tensor, Tensor]:
    right, called, actual = _counts(matrix)
    return right / called, right / actual


def _weighted(matrix: Tensor) -> Tensor:
    actual = _counts(matrix)[2]
    return (_f1(matrix) * actual).sum() / actual.sum()


macro_f1 = Exercise(
    name="16.1",
    solution=lambda matrix: _f1(matrix).mean(),
    trials=(
        (torch.tensor([[8, 1, 1], [2, 50, 8], [0, 0, 5]]),),
        (torch.tensor([[90, 0], [10, 0]]),),  # class 1 is never called
    ),
    labels=("matrix",),
    mistakes=(
        Mistake(
            lambda matrix: _counts(matrix)[0].sum() / matrix.sum(),
            "That is the micro average, which is the accuracy: macro is the mean of each class's own F1.",
        ),
        Mistake(
            lambda matrix: _harmonic(*_precision_recall(matrix)).mean(),
            "A class that is never called has precision 0/0, and one NaN spoils the mean: 2 right / (called + actual).",
        ),
        Mistake(
            lambda matrix: _harmonic(*_precision_recall(matrix)).nanmean(),
            "You left out a class that is never called: its F1 is 0, and it counts.",
        ),
        Mistake(_weighted, "Weighted by size, the large classes speak again: macro gives each class one vote."),
        Mistake(
            lambda matrix: _harmonic(*(part.nan_to_num().mean() for part in _precision_recall(matrix))),
            "The mean comes last: first each class's F1, then their mean.",
        ),
        Mistake(
            lambda matrix: torch.stack(_precision_recall(matrix)).nan_to_num().mean(),
            "F1 is the harmonic mean of precision and recall, not the arithmetic one.",
        ),
        Mistake(
            lambda matrix: _precision_recall(matrix)[1].mean(),
            "That is the mean recall: F1 also counts what was wrongly called.",
        ),
        Mistake(lambda matrix: _f1(matrix).mean() / 2, "A factor 2 is missing: 2 right / (called + actual)."),
    ),
    remark="it is the same for the transposed matrix: F1 treats precision and recall alike.",
)


def _joint(gradients: list[Tensor]) -> Tensor:
    return sum(g.square().sum() for g in gradients).sqrt()


def _scaled(gradients: list[Tensor], norm: Tensor, limit: float) -> list[Tensor]:
    return [g * (limit / norm).clamp(max=1) for g in gradients]


def _gradients(scale: float) -> list[Tensor]:
    rng = torch.Generator().manual_seed(16)
    return [scale * torch.randn(shape, dtype=torch.float64, generator=rng) for shape in ((3, 4), (3,), (2, 3))]


clip = Exercise(
    name="16.2",
    solution=lambda gradients, limit: _scaled(gradients, _joint(gradients), limit),
    trials=((_gradients(10.0), 5.0), (_gradients(0.1), 5.0)),
    labels=("gradients", "limit"),
    mistakes=(
        Mistake(
            lambda gradients, limit: [g * (limit / g.norm()).clamp(max=1) for g in gradients],
            "Each tensor by its own norm turns the step: one factor, from the norm of all of them together.",
        ),
        Mistake(
            lambda gradients, limit: [g.clamp(-limit, limit) for g in gradients],
            "That clips each value, and so turns the step: scale all by one factor.",
        ),
        Mistake(
            lambda gradients, limit: [g * limit / _joint(gradients) for g in gradients],
            "A gradient below the limit stays as it is: never scale up.",
        ),
        Mistake(
            lambda gradients, limit: _scaled(gradients, sum(g.norm() for g in gradients), limit),
            "Norms do not add up: add the squares, then take the root.",
        ),
        Mistake(
            lambda gradients, limit: _scaled(gradients, _joint(gradients) ** 2, limit),
            "You compare with the square of the norm: take the root.",
        ),
        Mistake(
            lambda gradients, limit: [g / _joint(gradients).clamp(min=1) for g in gradients],
            "That brings the norm to 1: bring it to the limit.",
        ),
        Mistake(
            lambda gradients, limit: _scaled(gradients, max(g.abs().max() for g in gradients), limit),
            "The largest value is not the norm: take the root of the sum of all squares.",
        ),
    ),
    remark="the direction is kept, only the length is cut.",
)


def _room(parameters: int, limit: int, *, rule: str = "AdamW", bytes_each: int = 4) -> int:
    """How many activations fit beside the training state."""
    return (limit - costs.training_bytes(parameters, rule)) // bytes_each


def _first_fit(order: list[int], kept: list[int], room: int) -> list[list[int]]:
    """Each example into the first piece that has room for it."""
    pieces: list[list[int]] = []
    for i in order:
        piece = next((p for p in pieces if sum(kept[j] for j in p) + kept[i] <= room), None)
        if piece is None:
            pieces.append(piece := [])
        piece.append(i)
    return pieces


def _largest_first(kept: list[int], room: int) -> list[list[int]]:
    return _first_fit(sorted(range(len(kept)), key=lambda i: -kept[i]), kept, room)


def _fits(pieces: list[list[int]], kept: list[int], parameters: int, limit: int) -> str | None:
    places = sorted(i for piece in pieces for i in piece)
    if places != list(range(len(kept))):
        return f"each position from 0 to {len(kept) - 1} must stand in exactly one piece"
    sizes = [
        costs.training_bytes(parameters, "AdamW", activations=sum(kept[i] for i in piece)) for piece in pieces if piece
    ]
    if max(sizes) <= limit:
        return None
    return f"piece {sizes.index(max(sizes))} needs {max(sizes):,} bytes, allowed {limit:,}"


_SMALL = ([300, 500, 200, 400, 100], 100, 5_600)
_HARD = ([440, 270, 260, 560, 300, 730, 250, 480, 740, 520, 700, 450, 300, 550, 450], 100, 5_600)

fewest_pieces = Exercise(
    name="16.3",
    solution=lambda kept, parameters, limit: _largest_first(kept, _room(parameters, limit)),
    accept=_fits,
    trials=(_SMALL, _HARD),
    labels=("kept", "parameters", "limit"),
    mistakes=(
        Mistake(
            lambda kept, parameters, limit: [list(range(len(kept)))],
            "All at once is too much: cut the batch into pieces that fit.",
        ),
        Mistake(
            lambda kept, parameters, limit: _largest_first(kept, limit // 4),
            "Weights, gradients and AdamW's two moments take their place first: 16 bytes a parameter.",
        ),
        Mistake(
            lambda kept, parameters, limit: _largest_first(kept, _room(parameters, limit, rule="SGD")),
            "AdamW remembers two numbers for each parameter: they take their place as well.",
        ),
        Mistake(
            lambda kept, parameters, limit: _largest_first(kept, _room(parameters, limit, bytes_each=1)),
            "`kept` counts numbers, `limit` counts bytes: a float32 has 4.",
        ),
        Mistake(
            lambda kept, parameters, limit: [
                [kept[i] for i in piece] for piece in _largest_first(kept, _room(parameters, limit))
            ],
            "Return the positions of the examples, not their sizes.",
        ),
        Mistake(
            lambda kept, parameters, limit: _largest_first(kept, _room(parameters, limit))[:-1],
            "The last piece is missing: its examples would never be learned from.",
        ),
        Mistake(
            lambda kept, parameters, limit: [list(range(i, min(i + 3, len(kept)))) for i in range(0, len(kept), 3)],
            "Pieces of equal count are not equally large: examples keep different numbers.",
        ),
    ),
    remark="every piece fits, and each example is used once.",
    score=Score(lambda answer: len(answer(*_HARD)), "gradient calls", 7),
)
