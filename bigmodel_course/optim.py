"""Optimizers: one small rule per algorithm (in `optim_rules`), one loop for all of them.

    optimizer = Optimizer(model.parameters(), AdamW(weight_decay=0.1), lr=warmup_cosine(3e-4, warmup=100, total=2000))

A rule knows one parameter and one step.  `Optimizer` owns the rest: the groups, the states, the step counts and the
learning rates.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bigmodel_course.optim_compiled import FlatGroup
from bigmodel_course.optim_rules import SGD, Adagrad, Adam, AdamW, HeavyBall, Lion, Momentum, Muon, RMSProp, Rule, State

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "HeavyBall", "Lion", "Momentum", "Muon", "Optimizer", "RMSProp", "Rule"]

LearningRate = float | Tensor | Callable[[int], float]

LINEAR = (SGD, Momentum, HeavyBall)  # as they are in complex numbers; the others step real and imaginary parts apart


class Optimizer(torch.optim.Optimizer):
    """Apply `rule` to `params`: a `torch.optim.Optimizer`, so torch's schedulers, `GradScaler` and hooks work with it.

    `params`: tensors, (name, tensor) pairs, or group dicts, which may hold their own "rule", "lr", "weight_decay" and
    "maximize".  `lr`: a float, a one-element tensor, or a schedule: a function from the steps already taken (0 at
    first) to a float; use a schedule or torch's schedulers, not both.  Every group has the keys "lr" and
    "weight_decay", and what stands there counts.  A parameter whose gradient is None is left out of the step and keeps
    its own count.  Complex numbers are stepped as pairs of real ones, as torch does.

    `compile=True` keeps each group in one buffer and compiles its rule for it: see `optim_compiled.FlatGroup`.  A group
    in which a gradient is None, or once was, is stepped tensor by tensor instead, because its step counts differ.

    `state_dict` is plain data, with the rule as its name and numbers; schedules and `compile` are not part of it.
    ValueError or TypeError for a wrong `lr`, rule or group, and TypeError for sparse gradients, before anything moves.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        rule: Rule,
        lr: LearningRate,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        self._flat: dict[int, FlatGroup] = {}
        super().__init__(params, {"rule": rule, "lr": lr, "maximize": maximize, "compile": compile})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; what the dict leaves out comes from the constructor."""
        group = {**self.defaults, **param_group}
        if not isinstance(group["rule"], Rule):
            raise TypeError(f"rule must be a Rule such as Adam(), got {group['rule']!r}")
        group.setdefault("weight_decay", getattr(group["rule"], "weight_decay", 0.0))
        group["schedule"] = group["lr"] if callable(group["lr"]) else None
        group["lr"] = _checked(group["lr"](0) if group["schedule"] else group["lr"])
        group["steps"] = 0
        rule = _rule(group)
        super().add_param_group(group)
        try:
            for p in group["params"]:
                rule.init(p.detach().to("meta"))  # costs no memory: a rule that cannot take `p` says so now
            if group["compile"]:
                FlatGroup.check(group["params"], rule)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with the gradients in `p.grad`; `closure`, if given, first computes them and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _refuse_sparse(group["params"])
        for i, group in enumerate(self.param_groups):
            if group["schedule"]:
                group["lr"] = _checked(group["schedule"](group["steps"]))
            if not (group["compile"] and self._step_flat(i, group)):
                self._step_each(group)
            group["steps"] += 1
        return loss

    def _step_each(self, group: dict[str, Any]) -> None:
        rule = _rule(group)
        lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, **rule.init(p))
            t = state["step"] = int(state["step"]) + 1  # a checkpoint may bring a tensor
            g = -p.grad if group["maximize"] else p.grad
            if p.is_complex() and not isinstance(rule, LINEAR):
                p, g, state = _real(p, g, state)
            rule.update_(p, g, state, t, lr)

    def _step_flat(self, i: int, group: dict[str, Any]) -> bool:
        """Step the whole group at once, or return False when its parameters do not move in step."""
        params, rule = group["params"], group["rule"]
        if any(p.grad is None for p in params):
            return False
        steps = {int(self.state[p].get("step", 0)) for p in params}
        if len(steps) != 1:
            return False
        flat = self._flat.get(i)
        if flat is None or not flat.holds(params, self.state, rule):
            flat = self._flat[i] = FlatGroup(params, self.state, rule)
        t = steps.pop() + 1
        flat.step_(t, float(group["lr"]), group["weight_decay"], maximize=group["maximize"])
        for p in params:
            self.state[p]["step"] = t
        return True

    def state_dict(self) -> dict[str, Any]:
        """The states and each group's options, as numbers, strings, lists, dicts and tensors."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group["rule"] = _described(group["rule"])
            del group["schedule"], group["compile"]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states and options; ValueError when a group was saved under another kind of rule."""
        groups = []
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch checks the lengths
            numbers = dict(saved.get("rule", _described(own["rule"])))
            if (name := numbers.pop("name")) != type(own["rule"]).__name__:
                raise ValueError(f"state_dict holds the state of {name}, but this group's rule is {own['rule']!r}")
            kept = {key: own[key] for key in ("schedule", "compile")}
            groups.append({"steps": 0, **saved, "rule": replace(own["rule"], **numbers), **kept})
        super().load_state_dict({**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flat = {}  # a copy, or what was loaded, is gathered into new buffers at its next step


def _checked(lr: Any) -> float | Tensor:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must have one element when it is a tensor, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor | Real):
        raise TypeError(f"lr must be a number, a one-element tensor or a schedule, got {type(lr).__name__}")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    return lr


def _rule(group: dict[str, Any]) -> Rule:
    """The group's rule, with the group's own weight decay: torch's tools change it there."""
    rule, decay = group["rule"], group["weight_decay"]
    if decay == getattr(rule, "weight_decay", 0.0):
        return rule
    if not hasattr(rule, "weight_decay"):
        raise ValueError(f"weight_decay must be 0 for {type(rule).__name__}, which has no decay, got {decay}")
    return replace(rule, weight_decay=decay)


def _described(rule: Rule) -> dict[str, Any]:
    return {"name": type(rule).__name__, **asdict(rule)}


def _refuse_sparse(params: Iterable[Tensor]) -> None:
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(
                f"gradients must be dense, got a sparse one ({p.grad.layout}) for a parameter of shape "
                f"{tuple(p.shape)}; use sparse=False in its layer, or torch.optim.SparseAdam"
            )


def _real(p: Tensor, g: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """The same memory as pairs of real numbers, when `p` is complex."""
    pairs = {name: torch.view_as_real(s) for name, s in state.items() if isinstance(s, Tensor) and s.is_complex()}
    return torch.view_as_real(p), torch.view_as_real(g), {**state, **pairs}
