"""From a dense LeNet-300-100 to a few thousand bytes, in one call: distil, prune, share, code.

    material = lessons(train, copies=8, teacher=train_teacher(train))
    compress(material, SMALL, path=..., seed=0)     dense -> pruned step by step -> shared values -> a file
    decompress(path)                                the file -> a model, on which alone accuracy is measured

The order is Deep Compression's (Han, Mao and Dally 2016, arXiv 1510.00149).  Two things are added where a `Recipe` asks
for them: a teacher, whose softened scores the student goes on learning from in every step, also while it is pruned; and
pruning by rate, which weighs what a weight does against the bits that its position takes in the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_course.compression.container import CodedLayer, load_compressed, save_compressed
from bigmodel_course.compression.distillation import soft_loss
from bigmodel_course.compression.pruning import (
    DynamicPruning,
    gradual_sparsity,
    keep_pruned,
    magnitude_masks,
    prune_neurons,
)
from bigmodel_course.compression.sharing import Codebook, codebooks, share, share_weights_
from bigmodel_course.compression.teaching import Lessons
from bigmodel_course.models import MLP
from bigmodel_course.optim import Adam, Optimizer
from bigmodel_course.schedules import Schedule, constant, cosine

__all__ = ["DEEP_COMPRESSION", "QUICK", "SMALL", "Recipe", "compress", "decompress", "rate_masks"]


@dataclass(frozen=True)
class Recipe:
    """What is done, and for how long: everything but the data, the teacher and the seed."""

    keep: int  # weights that stay
    values: int  # shared values of each layer
    epochs: tuple[int, int, int, int]  # dense, pruning, settling (the masks fixed), sharing
    by_rate: bool = True  # prune by effect for bits; otherwise by magnitude
    coder: str = "arithmetic"
    value_bits: int = 16
    bias_bits: int = 6
    rate: float = 4e-3  # Adam's, at its highest
    batch: int = 256
    temperature: float = 3.0
    dropout: float = 0.0  # of what enters each layer; it fades as the layer is pruned
    widths: tuple[int, ...] = (784, 300, 100, 10)


DEEP_COMPRESSION = Recipe(
    21_000, 16, (12, 20, 20, 8), by_rate=False, coder="huffman", bias_bits=16, rate=2e-3, dropout=0.2
)
SMALL = Recipe(6_500, 8, (12, 60, 50, 16))
QUICK = Recipe(600, 8, (20, 20, 10, 6), batch=64, widths=(64, 128, 10))  # scikit-learn's digits: seconds


def compress(material: Lessons, recipe: Recipe, *, path: str | Path, seed: int = 0) -> dict[str, float]:
    """Train a student, prune it, share its weights, and write it to `path`; return the bytes by kind, as they sum up.

    `material`, from `lessons`, says what is learned, and with its scores also from which teacher.  Measure the model
    that `decompress(path)` gives.
    """
    if material.x.dtype != torch.uint8 or material.x.ndim != 3 or material.x.shape[2] != recipe.widths[0]:
        got = f"{material.x.dtype} {list(material.x.shape)}"
        raise ValueError(f"material.x must be uint8 [copies, N, {recipe.widths[0]}], as the recipe is, got {got}")
    if len(material.y) < recipe.batch:
        raise ValueError(f"material must hold at least {recipe.batch} examples, a batch, got {len(material.y)}")
    student = _Student(material, recipe, seed)
    dense, pruning, settling, sharing = recipe.epochs
    student.learn(dense, cosine(recipe.rate, student.steps(dense), recipe.rate / 3))
    student.prune(pruning)
    student.learn(settling, cosine(0.7 * recipe.rate, student.steps(settling), 0.02 * recipe.rate))
    books = student.share(sharing)
    layers = student.coded(books)
    return save_compressed(
        path,
        {"widths": [layers[0].weight.codes.shape[1], *(len(layer.weight.codes) for layer in layers)]},
        layers,
        coder=recipe.coder,
        value_bits=recipe.value_bits,
        bias_bits=recipe.bias_bits,
    )


@torch.no_grad()
def decompress(path: str | Path) -> MLP:
    """The model in a file of `compress`, without the neurons that pruning left without effect.

    ValueError for a damaged file, and for one of another kind of model.
    """
    spec, coded = load_compressed(path)
    shapes = [tuple(one.weight.codes.shape) for one in coded]
    if shapes != [(b, a) for a, b in pairwise(spec.get("widths", []))] or any(one.bias is None for one in coded):
        raise ValueError(f"{path} must hold an MLP with biases, got layers of shapes {shapes} and the spec {spec}")
    model = MLP(spec["widths"], generator=torch.Generator())
    for layer, one in zip(_linears(model), coded, strict=True):
        layer.weight.copy_(one.weight.decode())
        layer.bias.copy_(one.bias)
    return model.eval()


@torch.no_grad()
def rate_masks(effects: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """New masks for the `keep` weights that do most for their bits, where the present ones are `masks`.

    `effects` [outputs, inputs] by name say how much the loss depends on each weight.  A weight costs 3 bits for its
    value and -log2(p) for its position, where p is the share of weights in its row times that in its column: alone in
    a row it is dear, so whole neurons and pixels empty out.  The score is effect / bits.
    """
    scores = {name: effect / (3 + _position_bits(masks[name])) for name, effect in effects.items()}
    total = sum(score.numel() for score in scores.values())
    if not 0 < keep <= total:
        raise ValueError(f"keep must be from 1 to the {total} weights, got {keep}")
    return magnitude_masks(scores, 1 - keep / total)


def _position_bits(mask: Tensor) -> Tensor:
    """What it costs to say that a weight stands here, where rows and columns are filled as in `mask`."""
    rows, columns = mask.sum(1, keepdim=True) + 0.5, mask.sum(0, keepdim=True) + 0.5
    return -(rows * columns / mask.sum().clamp(min=1)).clamp(max=0.5).log2()


class _Student:
    """A model on its way.  It shrinks as neurons and pixels fall out of use, and then it learns faster."""

    def __init__(self, material: Lessons, recipe: Recipe, seed: int):
        self.recipe, self.x, self.y, self.scores = recipe, material.x, material.y, material.scores
        self.rng = torch.Generator().manual_seed(seed)
        self.model = MLP(recipe.widths, generator=self.rng)
        self.pixels = torch.arange(recipe.widths[0])

    def steps(self, epochs: int) -> int:
        return epochs * (len(self.y) // self.recipe.batch)

    def learn(self, epochs: int, rate: Schedule, *, each: Callable[[int], None] = lambda step: None) -> None:
        """Some epochs of Adam, each on one of the copies, with `each(step)` before a step; what is zero stays zero."""
        self.optimizer, step = Optimizer(self.model.parameters(), Adam(), rate), 0
        keep_pruned(self.optimizer, self.model, self.masks())
        for _ in range(epochs):
            copy = torch.randint(len(self.x), (), generator=self.rng)
            order = torch.randperm(len(self.y), generator=self.rng)
            for rows in order.split(self.recipe.batch)[: self.steps(1)]:
                each(step)
                self.optimizer.zero_grad()
                self.loss(copy, rows).backward()
                self.optimizer.step()
                step += 1

    def masks(self) -> dict[str, Tensor]:
        return {name: p != 0 for name, p in self.model.named_parameters() if p.ndim == 2}

    def loss(self, copy: Tensor, rows: Tensor) -> Tensor:
        logits = self.scores_of(self.x[copy][rows].float() / 255)
        if self.scores is None:
            return F.cross_entropy(logits, self.y[rows])
        return soft_loss(logits, self.scores[copy][rows], temperature=self.recipe.temperature)

    def scores_of(self, x: Tensor) -> Tensor:
        """The model's scores under dropout, weaker where fewer weights are left (Han et al. 2015, equation 5)."""
        for layer in self.model.layers:
            if self.recipe.dropout and isinstance(layer, nn.Linear):
                gone = self.recipe.dropout * (layer.weight != 0).float().mean().sqrt().item()
                x = x * (torch.rand(x.shape, generator=self.rng) >= gone) / (1 - gone)
            x = layer(x)
        return x

    def prune(self, epochs: int) -> None:
        """Prune little by little; a weight pruned early comes back if others turn out to matter less."""
        dynamic = DynamicPruning(self.model, 0.0, learn_pruned=False)
        total = sum(mask.numel() for mask in dynamic.masks.values())
        final, end = 1 - self.recipe.keep / total, 0.85 * self.steps(epochs)

        def each(step: int) -> None:
            if step % 16 == 15:
                gone = gradual_sparsity(step, start=0, end=end, final=final)
                dynamic.masks = self.chosen(dynamic, round((1 - gone) * total))

        self.learn(epochs, constant(0.7 * self.recipe.rate), each=each)
        dynamic.remove()
        self.compact()

    @torch.no_grad()
    def chosen(self, dynamic: DynamicPruning, keep: int) -> dict[str, Tensor]:
        """Masks by rate or by magnitude.

        The effect of a weight is |w| sqrt(sqrt(v) m): v, Adam's mean square of its gradient, and m, the mean square of
        what enters it, both say how the loss curves along it (LeCun et al. 1990, Optimal Brain Damage).
        """
        weights = dynamic.shadows
        if not self.recipe.by_rate:
            return magnitude_masks(weights, 1 - keep / sum(w.numel() for w in weights.values()))
        effects, x = {}, self.x[0, :512].float() / 255
        for name, layer in self.model.layers.named_children():
            if isinstance(layer, nn.Linear):
                weight = weights[f"layers.{name}.weight"]
                curvature = self.optimizer.state[weight]["v"].sqrt() * x.square().mean(0)
                effects[f"layers.{name}.weight"] = weight.abs() * curvature.sqrt()
            x = layer(x)
        return rate_masks(effects, dynamic.masks, keep)

    @torch.no_grad()
    def compact(self) -> None:
        """Leave out pixels and hidden neurons without effect.  A neuron that nothing enters is a part of the biases."""
        layers = _linears(self.model)
        while True:
            kept = []
            for layer, following in pairwise(layers):
                enters, leaves = (layer.weight != 0).any(1), (following.weight != 0).any(0)
                following.bias += following.weight[:, ~enters] @ layer.bias[~enters].relu()
                kept.append((enters & leaves).nonzero()[:, 0])
            smaller = prune_neurons(self.model, kept)
            if smaller.widths == self.model.widths:
                break
            self.model, layers = smaller, _linears(smaller)
        used = (layers[0].weight != 0).any(0).nonzero()[:, 0]
        self.x, self.pixels = self.x[:, :, used], self.pixels[used]
        narrow = MLP((len(used), *self.model.widths[1:]), generator=self.rng)
        state = self.model.state_dict()
        narrow.load_state_dict(state | {"layers.0.weight": state["layers.0.weight"][:, used]})
        self.model = narrow

    def share(self, epochs: int) -> dict[str, Codebook]:
        """k-means on each layer's weights; then the shared values and the biases are trained."""
        weights = {name: p for name, p in self.model.named_parameters() if p.ndim == 2}
        share_weights_(self.model, {name: share(w, self.recipe.values, init="density") for name, w in weights.items()})
        self.learn(epochs, cosine(0.4 * self.recipe.rate, self.steps(epochs)))
        return codebooks(self.model)

    def coded(self, books: dict[str, Codebook]) -> list[CodedLayer]:
        """The layers for the file, the first one again as wide as the image."""
        first, *others = books.values()
        codes = torch.zeros(len(first.codes), self.recipe.widths[0], dtype=torch.uint8)
        codes[:, self.pixels] = first.codes
        biases = [layer.bias.detach() for layer in _linears(self.model)]
        whole = [Codebook(first.values, codes), *others]
        return [CodedLayer(book, bias) for book, bias in zip(whole, biases, strict=True)]


def _linears(model: MLP) -> list[nn.Linear]:
    return [layer for layer in model.layers if isinstance(layer, nn.Linear)]
