"""Weight sharing: the weights of a layer take a few values, so that a weight is only the number of its value.

Deep Compression (Han, Mao and Dally 2016, arXiv 1510.00149, section 3) finds the values by k-means on the weights that
pruning left, and fine-tunes them: a value's gradient is the sum of the gradients of the weights that share it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "Codebook",
    "CodedLayer",
    "Shared",
    "codebooks",
    "order_neurons",
    "share",
    "share_weights_",
    "shared_gradient",
]

START = ("linear", "density", "random")
MOST_ROUNDS = 1000  # Lloyd's iterations end long before by themselves


@dataclass(frozen=True)
class Codebook:
    """A weight of shared values: `values` [k], float32, and `codes`, uint8, of the weight's shape.

    Code 0 is a pruned weight; code c >= 1 is `values[c - 1]`.  ValueError for codes without a value, for more than 255
    values, and for values that are not finite.
    """

    values: Tensor
    codes: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.values.ndim != 1 or not self.values.isfinite().all():
            raise ValueError(f"values must be finite, float32, [k], got {self.values.dtype} {list(self.values.shape)}")
        largest = int(self.codes.max()) if self.codes.numel() else 0
        if self.codes.dtype != torch.uint8 or largest > len(self.values) or len(self.values) > 255:
            raise ValueError(
                f"codes must be uint8 and at most the number of values, at most 255; got {self.codes.dtype} codes "
                f"up to {largest} and {len(self.values)} values"
            )

    def decode(self) -> Tensor:
        """The weight, float32, of the codes' shape."""
        return _look_up(self.values.detach(), self.codes)


@dataclass(frozen=True)
class CodedLayer:
    """What a file keeps of a layer: the weight with its shared values, and the bias, [outputs], or None."""

    weight: Codebook
    bias: Tensor | None = None


def order_neurons(layers: Sequence[CodedLayer]) -> list[CodedLayer]:
    """The same network with the neurons of each hidden layer in order, those with the most inputs first.

    Any order computes the same (up to the rounding of sums), so a file need not spend bits on one: 300 neurons can
    stand in 300! = 2^2042 orders.  In this order the arithmetic coder knows about how busy the next neuron is.
    `layers`: matrices, each as wide as the one before has rows.
    """
    layers = list(layers)
    shapes = [layer.weight.codes.shape for layer in layers]
    if any(len(s) != 2 for s in shapes) or any(b[1] != a[0] for a, b in pairwise(shapes)):
        raise ValueError("layers must be matrices, each as wide as the one before has rows")
    for i in range(len(layers) - 1):
        layer, after = layers[i], layers[i + 1]
        order = (layer.weight.codes > 0).sum(1).argsort(descending=True, stable=True)
        bias = None if layer.bias is None else layer.bias[order]
        layers[i] = CodedLayer(replace(layer.weight, codes=layer.weight.codes[order]), bias)
        layers[i + 1] = CodedLayer(replace(after.weight, codes=after.weight.codes[:, order]), after.bias)
    return layers


def share(
    weight: Tensor, values: int, *, mask: Tensor | None = None, init: str = "linear", generator: Generator | None = None
) -> Codebook:
    """The codebook of at most `values` values that is nearest to `weight`: k-means on its non-zero weights.

    `mask` (bool, True stays) says which weights those are; without it, those that are not 0.  The first values are
    init="linear": evenly from the least weight to the greatest, which keeps the few large weights and did best in the
    paper; "density": evenly in rank; "random": weights drawn by `generator`.  Then Lloyd's iterations until nothing
    moves, exact in one dimension: the sorted weights are cut half-way between neighbouring values.  There are fewer
    values where there are fewer different weights, and then nothing is lost.  ValueError for NaN or infinity.
    """
    kept = weight != 0 if mask is None else mask
    _check(weight, values, kept, init)
    ordered = np.sort(weight.detach()[kept].double().cpu().numpy())
    centers = np.unique(ordered)
    if len(centers) > values:
        centers = np.unique(_lloyd(ordered, _first_values(ordered, values, init, generator)))
    centers = np.unique(centers.astype(np.float32))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    edges = torch.from_numpy((centers[1:].astype(np.float64) + centers[:-1]) / 2)
    codes[kept.cpu()] = (torch.bucketize(weight.detach()[kept].double().cpu(), edges) + 1).to(torch.uint8)
    return Codebook(torch.from_numpy(centers), codes)


def shared_gradient(gradient: Tensor, codes: Tensor, values: int) -> Tensor:
    """The gradient of each of the `values` values [values]: the sum of the gradients of the weights that share it.

    `gradient` and `codes` have the weight's shape; pruned weights (code 0) count nowhere.
    """
    sums = gradient.new_zeros(values + 1)
    return sums.index_add_(0, codes.flatten().int(), gradient.flatten())[1:]


class Shared(nn.Module):
    """A parametrization: a layer's weight is looked up, and the values are the parameter that is trained."""

    def __init__(self, codes: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, values: Tensor) -> Tensor:
        """The weight that `values` [k] give; its backward is `shared_gradient`."""
        return _look_up(values, self.codes)


def share_weights_(model: nn.Module, books: Mapping[str, Codebook]) -> list[nn.Parameter]:
    """Tie each weight of `model` that `books` names to its codebook; return the values, ready for an optimizer.

    `books`: a Codebook by parameter name, such as "layers.0.weight".  From then on the model computes with the shared
    values, and a step of an optimizer (ours or torch's) on them moves all weights of a value together; weight decay
    counts once for each value.  Biases stay as they are.  `codebooks(model)` gives the values as trained so far.
    """
    for name, book in books.items():
        module, _, weight = name.rpartition(".")
        layer = model.get_submodule(module)
        shape = getattr(layer, weight).shape
        if book.codes.shape != shape:
            raise ValueError(f"books[{name!r}] must have codes of shape {list(shape)}, got {list(book.codes.shape)}")
        device = getattr(layer, weight).device
        setattr(layer, weight, nn.Parameter(book.values.clone().to(device)))
        parametrize.register_parametrization(layer, weight, Shared(book.codes.to(device)), unsafe=True)
    return [values for _, values, _ in _tied(model)]


def codebooks(model: nn.Module) -> dict[str, Codebook]:
    """The codebook of each weight that `share_weights_` tied, by the weight's name, in memory of its own."""
    return {name: Codebook(values.detach().cpu().clone(), codes.cpu().clone()) for name, values, codes in _tied(model)}


def _tied(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    for owner, layer in model.named_modules():
        for attribute, steps in getattr(layer, "parametrizations", {}).items():
            if isinstance(steps[0], Shared):
                yield f"{owner}.{attribute}".lstrip("."), steps.original, steps[0].codes


def _look_up(values: Tensor, codes: Tensor) -> Tensor:
    """values[code - 1], and 0 for code 0."""
    return torch.cat([values.new_zeros(1), values])[codes.int()]


def _check(weight: Tensor, values: int, kept: Tensor, init: str) -> None:
    if not isinstance(values, int) or not 1 <= values <= 255:
        raise ValueError(f"values must be a whole number from 1 to 255, got {values!r}")
    if kept.dtype != torch.bool or kept.shape != weight.shape:
        raise ValueError(f"mask must be bool {list(weight.shape)}, got {kept.dtype} {list(kept.shape)}")
    if not weight[kept].isfinite().all():
        raise ValueError("weight must be finite to be shared, got NaN or infinity")
    if init not in START:
        raise ValueError(f"init must be one of {START}, got {init!r}")


def _first_values(ordered: np.ndarray, values: int, init: str, generator: Generator | None) -> np.ndarray:
    """At most `values` different numbers, in order, among the `ordered` weights."""
    different = np.unique(ordered)
    if len(different) <= values:
        return different
    if init == "linear":
        return np.linspace(ordered[0], ordered[-1], values)
    if init == "density":
        return np.unique(np.quantile(ordered, (np.arange(values) + 0.5) / values))
    if generator is None:
        raise TypeError('init="random" needs a torch.Generator as generator')
    return np.sort(different[torch.randperm(len(different), generator=generator)[:values].numpy()])


def _lloyd(ordered: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """k-means in one dimension from sorted `centers`: each is the mean of the weights between its two midpoints."""
    running = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(MOST_ROUNDS):
        cuts = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2, side="right")
        cuts = np.concatenate([[0], cuts, [len(ordered)]])
        counts, sums = np.diff(cuts), np.diff(running[cuts])
        if not counts.all():
            _refill_(counts, sums, ordered, centers)
        moved = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), centers))
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def _refill_(counts: np.ndarray, sums: np.ndarray, ordered: np.ndarray, centers: np.ndarray) -> None:
    """Give each value that no weight took one of the weights that are farthest from their own, as scikit-learn does."""
    owners, empty = np.repeat(np.arange(len(centers)), counts), np.flatnonzero(counts == 0)
    farthest = np.argsort(-np.abs(ordered - centers[owners]), kind="stable")
    for value, weight in zip(empty, farthest, strict=False):
        for which, sign in ((value, 1), (owners[weight], -1)):
            counts[which] += sign
            sums[which] += sign * ordered[weight]
