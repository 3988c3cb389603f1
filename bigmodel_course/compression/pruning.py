"""Pruning: which weights go, how they stay gone, and how whole neurons are taken out.

A mask is a bool tensor of its weight's shape: True stays, False is pruned.  Masks are a plain dict by parameter name,
so that they go into a checkpoint as they are.  Only weights of two dimensions or more are pruned: biases and the gains
of norms are few and each one matters.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bigmodel_course.models import MLP, SmallCNN

__all__ = ["DynamicPruning", "apply_masks_", "gradual_sparsity", "keep_pruned", "magnitude_masks", "neuron_masks"]
__all__ += ["prune_channels", "prune_neurons", "sensitivity", "sparsity_of"]

Named = nn.Module | Mapping[str, Tensor]


def magnitude_masks(weights: Named, sparsity: float, *, scope: str = "global") -> dict[str, Tensor]:
    """Masks that prune the share `sparsity` of the weights, the smallest in magnitude first (Han et al. 2015).

    `weights`: a model or tensors by name.  scope="global" compares all weights with each other, "layer" only those of
    one tensor.  Counts are rounded as torch.nn.utils.prune does; of equal weights the first one goes first.
    """
    named = _prunable(weights)
    _check_share("sparsity", sparsity)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    if scope == "layer":
        return {name: _largest(w.abs(), sparsity) for name, w in named.items()}
    kept = _largest(torch.cat([w.abs().flatten() for w in named.values()]), sparsity)
    parts = kept.split([w.numel() for w in named.values()])
    return {name: part.view(w.shape).clone() for (name, w), part in zip(named.items(), parts, strict=True)}


def neuron_masks(weights: Named, sparsity: float, *, norm: float = 2.0) -> dict[str, Tensor]:
    """Masks that prune whole rows (output neurons or channels) of each weight, those of the smallest norm first."""
    named = _prunable(weights)
    _check_share("sparsity", sparsity)
    rows = {name: _largest(w.flatten(1).norm(norm, dim=1), sparsity) for name, w in named.items()}
    return {name: row.view(-1, *[1] * (w.ndim - 1)).expand_as(w).clone() for (name, w), row in _zip(named, rows)}


def gradual_sparsity(step: float, *, start: float, end: float, final: float, initial: float = 0.0) -> float:
    """The sparsity at `step`: `initial` until `start`, then fast and ever slower up to `final` at `end`.

    final + (initial - final) * (1 - (step - start) / (end - start))**3  (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1)
    """
    if not start < end:
        raise ValueError(f"need start < end, got {start=} and {end=}")
    _check_share("initial", initial)
    _check_share("final", final)
    progress = min(1.0, max(0.0, (step - start) / (end - start)))
    return final + (initial - final) * (1 - progress) ** 3


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of `model` to exactly zero."""
    for p, mask in _matched(model, masks):
        p.masked_fill_(~mask, 0.0)


def keep_pruned(optimizer: torch.optim.Optimizer, model: nn.Module, masks: Mapping[str, Tensor]) -> "Pruned":
    """Prune `model`, and prune again after each step of `optimizer`, whatever its momentum or weight decay does.

    `optimizer`: ours or torch's.  The `masks` of the handle that comes back may be replaced on the way (gradual
    pruning) and belong into the checkpoint; `remove()` ends it.  A run that goes on calls `keep_pruned` again with the
    masks it had saved.
    """
    return Pruned(optimizer, model, masks)


class Pruned:
    """The handle that `keep_pruned` gives."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, masks: Mapping[str, Tensor]):
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._model = model
        self.masks = masks
        self._hook = optimizer.register_step_post_hook(lambda *_: apply_masks_(self._model, self._masks))

    @property
    def masks(self) -> dict[str, Tensor]:
        """What stays.  Setting it prunes at once."""
        return self._masks

    @masks.setter
    def masks(self, masks: Mapping[str, Tensor]) -> None:
        apply_masks_(self._model, masks)
        self._masks = dict(masks)

    def remove(self) -> None:
        """Let the optimizer move the pruned weights again."""
        self._hook.remove()


class DynamicPruning:
    """Pruning that can be taken back: the model computes with pruned weights, the optimizer moves dense ones.

    Each weight becomes a parametrized one: its dense shadow gets the gradient of the pruned weight as if nothing had
    been pruned (straight through), so that a pruned weight goes on learning and returns when it has grown large enough
    (Guo et al. 2016, arXiv 1608.04493).  With learn_pruned=False it gets no gradient and waits with the value it had.
    Make the optimizer after this; call `update_` every few steps, or set `masks`; `remove` leaves the pruned weights as
    plain parameters.
    """

    def __init__(self, model: nn.Module, sparsity: float, *, scope: str = "global", learn_pruned: bool = True):
        masks = magnitude_masks(model, sparsity, scope=scope)
        self._scope, self._parts = scope, {}
        for name in masks:
            owner, _, attribute = name.rpartition(".")
            layer = model.get_submodule(owner)
            parametrize.register_parametrization(layer, attribute, _Pruned(masks[name], learn_pruned))
            self._parts[name] = (layer, attribute)

    @property
    def shadows(self) -> dict[str, Tensor]:
        """The dense weights behind the pruned ones."""
        return {name: layer.parametrizations[a].original for name, (layer, a) in self._parts.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        """What the model computes with at present."""
        return {name: layer.parametrizations[a][0].mask for name, (layer, a) in self._parts.items()}

    @masks.setter
    def masks(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in self.masks.items():
            mask.copy_(masks[name])

    def update_(self, sparsity: float) -> int:
        """Choose again which weights stay, by their shadows; return how many pruned weights came back."""
        new = magnitude_masks(self.shadows, sparsity, scope=self._scope)
        back = sum((new[name] & ~mask).sum().item() for name, mask in self.masks.items())
        self.masks = new
        return back

    def remove(self) -> None:
        """End it: each weight is an ordinary parameter again, with zeros where it is pruned."""
        for layer, attribute in self._parts.values():
            parametrize.remove_parametrizations(layer, attribute)


class _Pruned(nn.Module):
    """weight -> weight * mask, with the gradient of the identity where pruned weights are to learn."""

    def __init__(self, mask: Tensor, learn_pruned: bool):
        super().__init__()
        self.register_buffer("mask", mask)
        self.learn_pruned = learn_pruned

    def forward(self, weight: Tensor) -> Tensor:
        if not self.learn_pruned:
            return weight * self.mask
        return weight + (weight * self.mask - weight).detach()  # exactly 0 or `weight`: x - x is 0


def prune_neurons(mlp: MLP, keep: float | Sequence[Tensor]) -> MLP:
    """A smaller dense MLP without the hidden neurons that matter least; it shares no memory with `mlp`.

    `keep`: the share of each hidden layer to keep, by the L2 norm of a neuron's incoming weights, or the positions to
    keep in each hidden layer.  The result equals `mlp` with the other neurons' outputs set to zero.
    """
    if not isinstance(mlp, MLP):
        raise TypeError(f"mlp must be a models.MLP, got {type(mlp).__name__}")
    layers = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
    kept = _kept(layers[:-1], keep)
    widths = [mlp.widths[0], *map(len, kept), mlp.widths[-1]]
    return _filled(MLP(widths, generator=torch.Generator()), layers, kept)


def prune_channels(cnn: SmallCNN, keep: float | Sequence[Tensor]) -> SmallCNN:
    """A smaller dense CNN without the channels that matter least; `keep` as in `prune_neurons`."""
    if not isinstance(cnn, SmallCNN):
        raise TypeError(f"cnn must be a models.SmallCNN, got {type(cnn).__name__}")
    layers = [layer for layer in cnn.layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    kept = _kept(layers[:-1], keep)
    smaller = SmallCNN(cnn.side, [len(k) for k in kept], layers[-1].out_features, generator=torch.Generator())
    return _filled(smaller, layers, kept)


def sensitivity(
    model: nn.Module, measure: Callable[[nn.Module], float], sparsities: Sequence[float]
) -> dict[str, list[float]]:
    """What `measure(model)` gives with one weight pruned at a time, for each of the `sparsities`.

    The layer whose curve falls first is the one to prune least (Han et al. 2015, section 3.1).  `model` is left alone.
    """
    curves = {}
    for name, weight in _prunable(model).items():
        curves[name] = []
        for sparsity in sparsities:
            trial = copy.deepcopy(model)
            apply_masks_(trial, magnitude_masks({name: weight}, sparsity))
            curves[name].append(measure(trial))
    return curves


def sparsity_of(weights: Named) -> float:
    """The share of the prunable weights that are exactly zero."""
    named = _prunable(weights).values()
    return sum((w == 0).sum().item() for w in named) / sum(w.numel() for w in named)


def _prunable(weights: Named) -> dict[str, Tensor]:
    named = dict(weights.named_parameters() if isinstance(weights, nn.Module) else weights)
    found = {name: w.detach() for name, w in named.items() if w.ndim >= 2 and w.numel()}
    if not found:
        raise ValueError(f"weights must hold a tensor of two dimensions or more, got {list(named)}")
    return found


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be a share between 0 and 1, got {share}")


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """True for all but the round(sparsity * n) smallest."""
    if not scores.isfinite().all():
        raise ValueError("weights must be finite to be compared, got NaN or infinity")
    order = scores.flatten().argsort(stable=True)
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[order[: round(sparsity * len(order))]] = False
    return kept.view(scores.shape)


def _zip(named: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[tuple[str, Tensor], Tensor]]:
    return list(zip(named.items(), other.values(), strict=True))


def _matched(model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each mask beside its parameter."""
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in named:
            raise ValueError(f"masks must name parameters of the model, got {name!r}; there are {list(named)}")
        if mask.dtype != torch.bool or mask.shape != named[name].shape:
            want, got = list(named[name].shape), f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"the mask of {name!r} must be bool {want}, got {got}")
    return [(named[name], mask) for name, mask in masks.items()]


def _kept(layers: Sequence[nn.Module], keep: float | Sequence[Tensor]) -> list[Tensor]:
    """The positions to keep in each layer's output, in order."""
    if not isinstance(keep, float | int):
        kept = [torch.as_tensor(k) for k in keep]
        wrong = len(kept) != len(layers) or any(
            k.ndim != 1 or k.dtype != torch.int64 or len(k) == 0 or len(k.unique()) < len(k) or not _inside(k, layer)
            for k, layer in zip(kept, layers, strict=False)
        )
        if wrong:
            sizes = [len(layer.weight) for layer in layers]
            raise ValueError(f"keep must hold different positions (int64) for hidden layers of {sizes}, got {keep}")
        return kept
    _check_share("keep", keep)
    masks = [_largest(layer.weight.detach().flatten(1).norm(dim=1), 1 - keep) for layer in layers]
    if not all(mask.any() for mask in masks):
        raise ValueError(f"keep must leave at least one neuron in each layer, got {keep}")
    return [mask.nonzero()[:, 0] for mask in masks]


def _inside(positions: Tensor, layer: nn.Module) -> bool:
    return positions.min().item() >= 0 and positions.max().item() < len(layer.weight)


@torch.no_grad()
def _filled(smaller: nn.Module, layers: Sequence[nn.Module], kept: Sequence[Tensor]) -> nn.Module:
    """Copy what is kept of `layers` into `smaller`: rows are a layer's outputs, columns the outputs before it."""
    targets = [layer for layer in smaller.layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    everything = torch.arange(len(layers[-1].weight))
    columns = torch.arange(layers[0].weight.shape[1])
    for target, layer, rows in zip(targets, layers, [*kept, everything], strict=True):
        each = target.weight.shape[1] // len(columns)  # after flattening, a channel is `each` columns in a row
        wide = (columns[:, None] * each + torch.arange(each)).flatten()
        target.weight.copy_(layer.weight[rows][:, wide])
        target.bias.copy_(layer.bias[rows])
        columns = rows
    return smaller
