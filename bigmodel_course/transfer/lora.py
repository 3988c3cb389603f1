"""Low-rank adapters (LoRA): a frozen linear layer learns by adding a product of two thin matrices.

    y = W x + b + (alpha / rank) B A x        A: [rank, inputs], B: [outputs, rank], W and b frozen

B starts at zero, so the adapted model starts as exactly the model it adapts (Hu et al. 2021, arXiv 2106.09685, section
4.1).  What is trainable in an adapted model is its adapter; all the rest is its base.
"""

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn

__all__ = ["LoRALinear", "adapters", "inject_", "merge_", "unmerge_"]


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, plus a trainable update of low rank: x [..., inputs] -> [..., outputs].

    A ("down") is drawn as torch draws a linear layer's weight, B ("up") is zero; both on the layer's device, in its
    precision.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, generator: Generator):
        super().__init__()
        largest = min(base.weight.shape)
        if not 1 <= rank <= largest:
            raise ValueError(f"rank must be 1 to {largest} for a layer of {list(base.weight.shape)}, got {rank}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be above 0 and finite, got {alpha}")
        self.base, self.rank, self.alpha = base, rank, alpha
        down = torch.empty(rank, base.in_features, dtype=base.weight.dtype, device=generator.device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.register_buffer("_original", None, persistent=False)  # while merged, W as it was

    @property
    def scale(self) -> float:
        """What the product is multiplied by: with alpha fixed, a new rank needs no new learning rate."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether the update stands in the weight at present."""
        return self._original is not None

    def update(self) -> Tensor:
        """What is added to the weight, [outputs, inputs], in float64: the rank is read off its singular values."""
        return self.scale * (self.up.detach().double() @ self.down.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its update; two thin products, or, merged, none."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this adapter is merged, and training would not reach it: call unmerge_ first")
            return self.base(x)
        return self.base(x) + self.scale * nn.functional.linear(nn.functional.linear(x, self.down), self.up)

    def merge_(self) -> None:
        """Put the update into the weight, rounded once; the weight as it was is kept."""
        merged = (self.base.weight.detach().double() + self.update()).to(self.base.weight.dtype)
        self._original, self.base.weight.data = self.base.weight.data, merged

    def unmerge_(self) -> None:
        """Put the weight back as it was, bit for bit: subtracting could miss it by a rounding."""
        self.base.weight.data, self._original = self._original, None

    def extra_repr(self) -> str:
        """Rank and alpha, as they stand in the printed model."""
        return f"rank={self.rank}, alpha={self.alpha:g}"


def inject_(
    model: nn.Module,
    targets: Iterable[str],
    *,
    rank: int,
    generator: Generator,
    alpha: float | None = None,
    also: Iterable[str] = (),
) -> dict[str, LoRALinear]:
    """Put an adapter on each linear layer named in `targets`, freeze everything else, return the adapters by name.

    A target is a full name ("layers.0") or its end ("query" for every ...query).  `alpha` is `rank` unless given, which
    makes the scale 1.  The parts named in `also`, such as a new head, train in full and belong to the adapter.
    ValueError names what is missing, is no linear layer, or has an adapter already; the model is then as it was.
    """
    if adapters(model):
        raise ValueError("model has adapters already: merge_(model, keep=False) puts them into the weights first")
    also = _names(also)
    found, whole = _targets(model, _names(targets)), [_part(model, name) for name in also]
    for name in found:
        if any(f"{name}.".startswith(f"{part}.") for part in also):
            raise ValueError(f"also trains {name!r} in full, and targets puts an adapter on it: choose one")
    alpha = rank if alpha is None else alpha
    made = {name: LoRALinear(layer, rank=rank, alpha=alpha, generator=generator) for name, layer in found.items()}
    model.requires_grad_(False)
    for part in whole:
        part.requires_grad_(True)
    for name, layer in made.items():
        _put(model, name, layer)
    return made


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapters of `model` by the names of their layers."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def merge_(model: nn.Module, *, keep: bool = True) -> None:
    """Put every update into its weight: the model then costs what it cost before it was adapted.

    With keep=True `unmerge_` takes it back exactly; until then both weights are in memory.  With keep=False the layers
    are plain linear layers under their old names again, for good.  ValueError if there is nothing to merge, or if it
    is merged already: the update would count twice.
    """
    found = _adapters(model)
    if any(layer.merged for layer in found.values()):
        raise ValueError("model is merged already: merging again would add the update a second time")
    for name, layer in found.items():
        layer.merge_()
        if not keep:
            _put(model, name, layer.base)


def unmerge_(model: nn.Module) -> None:
    """Give every weight back the bits it had before `merge_`, so that training can go on."""
    found = _adapters(model)
    if not all(layer.merged for layer in found.values()):
        raise ValueError("model is not merged: there is nothing to take back")
    for layer in found.values():
        layer.unmerge_()


def _names(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"targets and also are lists of names, got the string {names!r}: write [{names!r}]")
    return list(names)


def _targets(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    named = dict(model.named_modules())
    linear = {name: layer for name, layer in named.items() if isinstance(layer, nn.Linear)}
    found = {}
    for target in targets:
        hits = {name: layer for name, layer in named.items() if f".{name}".endswith(f".{target}")}
        hits = {target: named[target]} if target in named else hits
        if not hits or not hits.keys() <= linear.keys():
            kinds = sorted({type(layer).__name__ for layer in hits.values()})
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"targets must name linear layers ({', '.join(ends)}), got {target!r}: {kinds or 'none'}")
        found |= hits
    if not found:
        raise ValueError("targets must name at least one linear layer, got none")
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if shared := [name for name, layer in found.items() if uses.count(id(layer.weight)) > 1]:
        raise ValueError(f"targets names {shared[0]!r}, whose weight another layer shares: merging would change both")
    return {name: found[name] for name in linear if name in found}  # in the model's order, whatever order was asked


def _part(model: nn.Module, name: str) -> nn.Module:
    named = dict(model.named_modules())
    if name not in named or not name:
        raise ValueError(f"also must name parts of the model, got {name!r}; there are {[n for n in named if n]}")
    return named[name]


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    found = adapters(model)
    if not found:
        raise ValueError("model has no adapters: call inject_ first")
    return found


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layer)
