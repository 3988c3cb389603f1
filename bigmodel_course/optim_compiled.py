"""The fast path of `optim`: a group in one flat buffer, and the papers' lines compiled for it by torch.compile.

An optimizer step is bound by memory: Adam reads p, g, m, v and writes p, m, v, 28 bytes a parameter in float32, but
plain torch walks over them again in each of its operations.  Compiled, one pass does everything; flat, one kernel
serves all tensors.  torch's order of operations is kept in `optim`; here stand the papers' lines, and the two agree
up to rounding.  When several jobs compile at once, give each its own folder in `TORCHINDUCTOR_CACHE_DIR`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bigmodel_course.optim_rules import SGD, Adagrad, Adam, AdamW, HeavyBall, Lion, Momentum, RMSProp, Rule

__all__ = []  # see `Optimizer(compile=True)`

ALIGN = 16  # elements: each parameter starts on a cache line, as it would in memory of its own


def _sgd(rule, p, g, state, lr, decay, **_):
    p.sub_(lr * (g + decay * p))


def _momentum(rule, p, g, state, lr, **_):
    v = state["v"].copy_(rule.beta * state["v"] + (1 - rule.beta) * g)
    p.sub_(lr * v)


def _heavy_ball(rule, p, g, state, lr, decay, **_):
    g = g + decay * p
    v = state["v"].copy_(rule.mu * state["v"] + g)
    p.sub_(lr * (g + rule.mu * v if rule.nesterov else v))


def _adagrad(rule, p, g, state, lr, **_):
    s = state["s"].add_(g * g)
    p.sub_(lr * g / (s.sqrt() + rule.eps))


def _rmsprop(rule, p, g, state, lr, **_):
    s = state["s"].copy_(rule.alpha * state["s"] + (1 - rule.alpha) * g * g)
    p.sub_(lr * g / (s.sqrt() + rule.eps))


def _adam(rule, p, g, state, lr, arrived1, arrived2, **_):
    m = state["m"].copy_(rule.beta1 * state["m"] + (1 - rule.beta1) * g)
    v = state["v"].copy_(rule.beta2 * state["v"] + (1 - rule.beta2) * g * g)
    if rule.amsgrad:
        v = state["v_max"].copy_(torch.maximum(state["v_max"], v))
    p.sub_(lr / arrived1 * m / ((v / arrived2).sqrt() + rule.eps))


def _adamw(rule, p, g, state, lr, decay, **arrived):
    p.mul_(1 - lr * decay)
    _adam(rule, p, g, state, lr, **arrived)


def _lion(rule, p, g, state, lr, decay, **_):
    m = state["m"]
    u = (rule.beta1 * m + (1 - rule.beta1) * g).sign()
    p.sub_(lr * (u + decay * p))
    m.copy_(rule.beta2 * m + (1 - rule.beta2) * g)


LINES = {
    SGD: _sgd,
    Momentum: _momentum,
    HeavyBall: _heavy_ball,
    Adagrad: _adagrad,
    RMSProp: _rmsprop,
    Adam: _adam,
    AdamW: _adamw,
    Lion: _lion,
}


class FlatGroup:
    """One group's parameters, gradients and states, each in one buffer, stepped by one compiled call.

    The parameters become views of their buffer (they move to new memory, once), and so do their entries in `states`.
    A gradient that does not lie in its buffer is copied there and `p.grad` becomes that view:
    `zero_grad(set_to_none=False)` keeps it there and saves the copy.  ValueError when the group cannot be flattened,
    RuntimeError when its rule cannot be compiled.
    """

    def __init__(self, params: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]], rule: Rule):
        self.check(params, rule)
        self.params, self.rule = params, rule
        size = sum(map(_room, params))
        self.p, self.g = (torch.zeros(size, dtype=params[0].dtype, device=params[0].device) for _ in range(2))
        self.state = rule.init(self.p)
        self.gradients = _views(self.g, params)
        self.places = [{} for _ in params]  # for each parameter, its part of every state
        for name, flat in self.state.items():
            for p, place, part in zip(params, self.places, _views(flat, params), strict=True):
                place[name] = part.copy_(states[p][name]) if name in states[p] else part
        for p, place, part in zip(params, self.places, _views(self.p, params), strict=True):
            p.data = part.copy_(p.detach())
            states[p].update(place)
        self.address = self._addresses(states)

    @staticmethod
    def check(params: Sequence[Tensor], rule: Rule) -> None:
        """Raise ValueError, with what to do, when this rule or these parameters cannot be compiled."""
        why = None
        if type(rule) not in LINES:  # not isinstance: a subclass has lines of its own
            why = f"{type(rule).__name__} has no compiled form"
        elif any(not p.is_floating_point() for p in params):
            why = f"the parameters must be real floating-point numbers, got {sorted({str(p.dtype) for p in params})}"
        elif len(kinds := {f"{p.dtype} on {p.device}" for p in params}) > 1:
            why = f"a group must have one dtype and one device, got {sorted(kinds)}"
        elif any(not p.is_contiguous() for p in params):
            why = "the parameters must be contiguous"
        if why:
            raise ValueError(f"compile=True: {why}; use compile=False for it, or split the group")

    def holds(self, params: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]], rule: Rule) -> bool:
        """Whether these are the rule, parameters and states kept here, still in their places."""
        return params is self.params and rule == self.rule and self._addresses(states) == self.address

    def step_(self, t: int, lr: float, decay: float, *, maximize: bool = False) -> None:
        """Take step `t` (1, 2, …) with the gradients in `p.grad`; none of them may be None."""
        for p, g in zip(self.params, self.gradients, strict=True):
            if p.grad.data_ptr() != g.data_ptr():
                p.grad = g.copy_(p.grad)
        # As tensors, because a Python number is part of the compiled code: it would be compiled anew each step.
        numbers = {
            "lr": lr,
            "decay": decay,
            "arrived1": _arrived(self.rule, 1, t),
            "arrived2": _arrived(self.rule, 2, t),
        }
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        try:
            _compiled(self.rule, maximize)(self.p, self.g, self.state, numbers)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                "compile=True could not compile the rule: it needs a C++ compiler such as g++ (named by CXX, or found "
                f"on PATH). Install one, or use compile=False. The compiler said: {error}"
            ) from error

    def _addresses(self, states: Mapping[Tensor, dict[str, Any]]) -> list[int]:
        return [x.data_ptr() for p in self.params for x in (p, *(states[p].get(name, p) for name in self.state))]


@lru_cache(maxsize=64)  # a copied or reloaded optimizer does not compile again
def _compiled(rule: Rule, maximize: bool) -> Callable:
    def step(p, g, state, numbers):
        LINES[type(rule)](rule, p, -g if maximize else g, state, **numbers)

    return torch.compile(step, fullgraph=True, dynamic=True, isolate_recompiles=True)


def _arrived(rule: Rule, i: int, t: int) -> float:
    """The share of a running mean's weight that has arrived after `t` steps."""
    return 1 - getattr(rule, f"beta{i}", 0.0) ** t


def _room(p: Tensor) -> int:
    return -(-p.numel() // ALIGN) * ALIGN


def _views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([_room(p) for p in params])
    return [part[: p.numel()].view(p.shape) for part, p in zip(parts, params, strict=True)]
