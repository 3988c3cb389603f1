"""How good predictions are: counts of right and wrong labels, and distances between numbers.

Every function takes what was predicted first and what is true second, as torch's losses do (scikit-learn: the other
way round), and returns a Python float.  Empty input has no answer: ValueError.  A share of nothing, such as the
precision of a class that was never predicted, is 0, as with scikit-learn's `zero_division=0`.
"""

from math import nan, sqrt
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "accuracy",
    "confusion_matrix",
    "expected_calibration_error",
    "f1",
    "mse",
    "precision",
    "r2",
    "recall",
    "rmse",
]

Average = Literal["binary", "macro", "micro"]


def accuracy(predicted: Tensor, target: Tensor) -> float:
    """The share of labels that are right; both [N]."""
    _labels(predicted, target)
    return (predicted == target).sum().item() / len(target)


def confusion_matrix(predicted: Tensor, target: Tensor, classes: int | None = None) -> Tensor:
    """How often class i (row) was taken for class j (column): int64 [classes, classes].

    Labels are 0, 1, … `classes` - 1; by default the largest label in either tensor is the last class.
    """
    _labels(predicted, target)
    predicted, target = predicted.long(), target.long()
    low, high = min(predicted.min().item(), target.min().item()), max(predicted.max().item(), target.max().item())
    classes = high + 1 if classes is None else classes
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1} for {classes} classes, got {low} to {high}")
    return torch.bincount(target * classes + predicted, minlength=classes**2).reshape(classes, classes)


def precision(predicted: Tensor, target: Tensor, average: Average = "binary") -> float:
    """Of what was called a class, the share that is one: TP / (TP + FP).

    "binary": of class 1, all labels being 0 or 1.  "macro": the mean over the classes that occur in either tensor.
    "micro": over all classes counted together, which makes it the accuracy.
    """
    right, called, _ = _counts(predicted, target, average)
    return _share(right, called)


def recall(predicted: Tensor, target: Tensor, average: Average = "binary") -> float:
    """Of what is a class, the share that was found: TP / (TP + FN).  Averages as in `precision`."""
    right, _, actual = _counts(predicted, target, average)
    return _share(right, actual)


def f1(predicted: Tensor, target: Tensor, average: Average = "binary") -> float:
    """The harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN).  Averages as in `precision`."""
    right, called, actual = _counts(predicted, target, average)
    return _share(2 * right, called + actual)


def expected_calibration_error(probabilities: Tensor, target: Tensor, bins: int = 15) -> float:
    """How far the probability given to the chosen class lies from the share that is right, on average.

    `probabilities` [N, C], each row with sum 1, and the true labels [N].  Examples are put into `bins` equal ranges of
    their largest probability; each bin counts |share right - mean probability| by its share of the examples (Guo et al.
    2017, arXiv 1706.04599, equation 3).  It grows with few examples: a bin of one is never exactly right.
    """
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or bins < 1:
        shape = f"{probabilities.dtype} {list(probabilities.shape)}"
        raise ValueError(f"need probabilities [N, C] as floats and bins >= 1, got {shape}, {bins=}")
    if probabilities.numel() and not torch.allclose(probabilities.sum(1), probabilities.new_ones(()), atol=1e-3):
        raise ValueError("probabilities must have rows of sum 1: of scores (logits), take softmax(1) first")
    confidence, predicted = probabilities.double().max(1)
    _labels(predicted, target)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    place = torch.bucketize(confidence, edges)  # a bin includes its upper end
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, (predicted == target).double() - confidence)
    return gap.abs().sum().item() / len(target)


def mse(predicted: Tensor, target: Tensor) -> float:
    """The mean of the squared errors, in the square of the target's unit; both [N], computed in float64."""
    _numbers(predicted, target)
    return (predicted.double() - target.double()).square().mean().item()


def rmse(predicted: Tensor, target: Tensor) -> float:
    """The root of the mean squared error, in the target's unit."""
    return sqrt(mse(predicted, target))


def r2(predicted: Tensor, target: Tensor) -> float:
    """The share of the target's variance that is explained: 1 - MSE / variance; below 0, the mean predicts better.

    As in scikit-learn, for a target that is constant: 1 if the prediction is exact, else 0; for one example: NaN.
    """
    error = mse(predicted, target)
    if len(target) < 2:
        return nan
    if (target == target[0]).all():
        return float(error == 0)
    return 1 - error / target.double().var(correction=0).item()


def _counts(predicted: Tensor, target: Tensor, average: Average) -> tuple[Tensor, Tensor, Tensor]:
    """Per class (or for all together): how many are right, were called so, and are so."""
    _labels(predicted, target)
    classes = torch.cat([predicted, target]).unique()
    if average == "binary":
        if not torch.isin(classes.long(), torch.tensor([0, 1])).all():
            raise ValueError(f'average="binary" needs labels 0 and 1, got {classes.tolist()}: take "macro" or "micro"')
        classes = torch.ones(1, dtype=classes.dtype)
    elif average not in ("macro", "micro"):
        raise ValueError(f'average must be "binary", "macro" or "micro", got {average!r}')
    called, actual = predicted == classes[:, None], target == classes[:, None]
    counts = [(called & actual).sum(1), called.sum(1), actual.sum(1)]
    right, called, actual = [c.sum(0, keepdim=True) for c in counts] if average == "micro" else counts
    return right, called, actual


def _share(part: Tensor, whole: Tensor) -> float:
    """The mean of part / whole, where 0 / 0 is 0."""
    return (part.double() / whole.clamp(min=1)).mean().item()


def _labels(predicted: Tensor, target: Tensor) -> None:
    _same_shape(predicted, target, "labels [N]; of scores [N, C] take argmax(1) first")
    for name, labels in (("predicted", predicted), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name} must hold labels (whole numbers or bool), got {labels.dtype}")


def _numbers(predicted: Tensor, target: Tensor) -> None:
    _same_shape(predicted, target, "numbers [N]; a column [N, 1] needs squeeze(1) first")


def _same_shape(predicted: Tensor, target: Tensor, expected: str) -> None:
    """Broadcasting [N, 1] against [N] would compare every pair and say nothing."""
    if predicted.ndim != 1 or predicted.shape != target.shape:
        got = f"{list(predicted.shape)} and {list(target.shape)}"
        raise ValueError(f"predicted and target must be {expected}, got {got}")
    if len(target) == 0:
        raise ValueError("predicted and target must hold at least one example, got none")
