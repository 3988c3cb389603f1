"""The rules of `optim`, which is where their public names are: one small frozen dataclass per algorithm.

A rule has two methods and no memory of its own:

    init(p)                         -> state    what the rule remembers about `p`, as named tensors
    update_(p, g, state, t, lr)                 changes `p` and `state` in place, by the gradient `g`

`t` counts from 1, as in the papers.  Each rule takes its operations in the order of torch's per-tensor path, so both
end on the same bits: `add_(alpha=)`, `lerp_` and `addcmul_` round once where `p -= lr * g` rounds twice.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = []  # see `optim`

State = dict[str, Any]

BELOW_ONE = ("beta", "beta1", "beta2", "alpha")  # the share of the past that a running mean keeps
NOT_NEGATIVE = ("mu", "eps", "weight_decay", "steps")


@dataclass(frozen=True)
class Rule:
    """What every rule can do; a rule of your own is a frozen dataclass that derives from it and writes `update_`.

    ValueError when a field named `beta`, `beta1`, `beta2` or `alpha` is outside [0, 1), or `mu`, `eps`, `weight_decay`
    or `steps` is negative.
    """

    remembers = ()  # the names of the tensors, shaped like the parameter, that start at 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in BELOW_ONE and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
            if name in NOT_NEGATIVE and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")

    def init(self, p: Tensor) -> State:
        """The state before the first step."""
        return {name: torch.zeros_like(p) for name in self.remembers}

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Take step `t` (1, 2, …): change `p` and `state` in place and leave `g` alone."""
        raise NotImplementedError(f"{type(self).__name__} must define update_(p, g, state, t, lr)")


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent (Robbins & Monro 1951), here with L2 decay."""

    weight_decay: float = 0.0

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Move against the gradient.

        g ← g + weight_decay·p
        p ← p − lr·g
        """
        if self.weight_decay:
            g = g.add(p, alpha=self.weight_decay)
        p.add_(g, alpha=-lr)


@dataclass(frozen=True)
class Momentum(Rule):
    """Momentum as a running mean of the gradients: when they are constant, a step becomes lr·g.

    It is `HeavyBall(mu=beta)` at the learning rate lr·(1 − beta); torch's `momentum=` means that one.
    """

    beta: float = 0.9
    remembers = ("v",)

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Move against the mean.

        v ← beta·v + (1 − beta)·g
        p ← p − lr·v
        """
        v = state["v"].mul_(self.beta).add_(g, alpha=1 - self.beta)
        p.add_(v, alpha=-lr)


@dataclass(frozen=True)
class HeavyBall(Rule):
    """Momentum as a sum of the gradients (Polyak 1964): when they are constant, a step grows to lr·g / (1 − mu).

    torch's convention, also for Nesterov's form (Sutskever et al. 2013, section 2) and for the L2 decay.
    """

    mu: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    remembers = ("v",)

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Move against the sum; with `nesterov`, against where the sum is about to point.

        g ← g + weight_decay·p
        v ← mu·v + g
        p ← p − lr·v             or  p ← p − lr·(g + mu·v)
        """
        if self.weight_decay:
            g = g.add(p, alpha=self.weight_decay)
        v = state["v"].mul_(self.mu).add_(g)
        p.add_(g.add(v, alpha=self.mu) if self.nesterov else v, alpha=-lr)


@dataclass(frozen=True)
class Adagrad(Rule):
    """Adagrad: a coordinate that has moved much moves less (Duchi, Hazan & Singer 2011, diagonal form)."""

    eps: float = 1e-10
    remembers = ("s",)

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Divide by the root of all squares so far.

        s ← s + g²
        p ← p − lr·g / (√s + eps)
        """
        s = state["s"].addcmul_(g, g)
        p.addcdiv_(g, s.sqrt().add_(self.eps), value=-lr)


@dataclass(frozen=True)
class RMSProp(Rule):
    """RMSProp: Adagrad that forgets (Tieleman & Hinton 2012, lecture 6.5); eps is outside the root, as in torch."""

    alpha: float = 0.99
    eps: float = 1e-8
    remembers = ("s",)

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Divide by the root of a running mean of squares.

        s ← alpha·s + (1 − alpha)·g²
        p ← p − lr·g / (√s + eps)
        """
        s = state["s"].mul_(self.alpha).addcmul_(g, g, value=1 - self.alpha)
        p.addcdiv_(g, s.sqrt().add_(self.eps), value=-lr)


@dataclass(frozen=True)
class Adam(Rule):
    """Adam: the running mean of g over the root of the running mean of g² (Kingma & Ba 2015, Algorithm 1).

    With `amsgrad` the largest v so far stands in place of v (Reddi, Kale & Kumar 2018, Algorithm 2); Adam's bias
    corrections are kept, as in torch.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    amsgrad: bool = field(default=False, kw_only=True)

    @property
    def remembers(self) -> tuple[str, ...]:
        """Two running means, and with `amsgrad` the largest v."""
        return ("m", "v", "v_max") if self.amsgrad else ("m", "v")

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Divide the mean by its size.

        m ← beta1·m + (1 − beta1)·g           m̂ = m / (1 − beta1ᵗ)
        v ← beta2·v + (1 − beta2)·g²          v̂ = v / (1 − beta2ᵗ)
        p ← p − lr·m̂ / (√v̂ + eps)
        """
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        if self.amsgrad:
            v = torch.maximum(state["v_max"], v, out=state["v_max"])
        # Both means start at 0: after t steps only 1 − betaᵗ of their weight has arrived.
        root = v.sqrt().div_((1 - self.beta2**t) ** 0.5)
        p.addcdiv_(m, root.add_(self.eps), value=-lr / (1 - self.beta1**t))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2; scaled by lr, as in torch)."""

    weight_decay: float = 0.01

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Shrink p, then take Adam's step, whose m and v never see the decay.

        p ← (1 − lr·weight_decay)·p
        """
        # torch does the same: in float32 the factor is rounded, so lr 1e-4 and decay 0.01 shrink p 1.3 % too fast.
        p.mul_(1 - lr * self.weight_decay)
        super().update_(p, g, state, t, lr)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion: each coordinate moves by lr, up or down (Chen et al. 2023, arXiv 2302.06675, Algorithm 2)."""

    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    remembers = ("m",)

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Move by the sign of one running mean, and remember another.

        u = sign(beta1·m + (1 − beta1)·g)
        p ← p − lr·(u + weight_decay·p)
        m ← beta2·m + (1 − beta2)·g
        """
        m = state["m"]
        u = m.mul(self.beta1).add_(g, alpha=1 - self.beta1).sign_()
        p.mul_(1 - lr * self.weight_decay).add_(u, alpha=-lr)
        m.mul_(self.beta2).add_(g, alpha=1 - self.beta2)


@dataclass(frozen=True)
class Muon(Rule):
    """Muon: momentum with all its singular values pushed towards 1 (Jordan et al. 2024); for real matrices only.

    Follows torch.optim.Muon: v is a running mean, Nesterov, decoupled decay of 0.1, tall matrices move further by
    √(rows/columns), Newton-Schulz in bfloat16.  optax's defaults differ.  ValueError for any other shape.
    """

    beta: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    eps: float = 1e-7
    steps: int = 5
    remembers = ("v",)

    def init(self, p: Tensor) -> State:
        """The state before the first step."""
        if p.ndim != 2 or p.is_complex():
            raise ValueError(f"params must be real matrices for Muon, got shape {tuple(p.shape)} of {p.dtype}")
        return super().init(p)

    def update_(self, p: Tensor, g: Tensor, state: State, t: int, lr: float) -> None:
        """Move equally far in every direction that the mean has.

        v ← beta·v + (1 − beta)·g             u = beta·v + (1 − beta)·g  or  u = v
        p ← (1 − lr·weight_decay)·p − lr·√max(1, rows/columns)·orthogonalized(u)
        """
        v = state["v"].lerp_(g, 1 - self.beta)
        u = g.lerp(v, self.beta) if self.nesterov else v
        rows, columns = p.shape
        p.mul_(1 - lr * self.weight_decay)
        p.add_(self.orthogonalized(u), alpha=-(lr * math.sqrt(max(1, rows / columns))))

    def orthogonalized(self, u: Tensor) -> Tensor:
        """About U·Vᵀ, where u = U·S·Vᵀ, without computing U or V: the quintic Newton-Schulz iteration."""
        x = u.bfloat16()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm().clamp(min=self.eps)  # so that no singular value is above 1
        for _ in range(self.steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return x.T if tall else x
