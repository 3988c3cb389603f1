"""Lesson 14, Adam: one step, decay beside the step, and a rule that remembers as little as possible."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigmodel_course.checks import Answer, Exercise, Mistake, Score

__all__ = ["adam_step", "adamw", "least_memory"]

Numbers = tuple[Tensor, Tensor, Tensor]


def _adam(
    p, g, m, v, t, *, lr=0.1, beta1=0.9, beta2=0.999, m_t=0, v_t=0, size=torch.square, inside=False, keep_hats=False
) -> Numbers:
    """One step of Adam; `m_t` and `v_t` shift the t of the corrections, None leaves a correction out."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * size(g)
    m_hat = m if m_t is None else m / (1 - beta1 ** (t + m_t))
    v_hat = v if v_t is None else v / (1 - beta2 ** (t + v_t))
    step = m_hat / ((v_hat + 1e-8).sqrt() if inside else v_hat.sqrt() + 1e-8)
    return (p - lr * step, m_hat, v_hat) if keep_hats else (p - lr * step, m, v)


def _state(t: int, *, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """p, g, m, v as they may be before step `t`; both means are 0 before the first."""
    rng = torch.Generator().manual_seed(seed)
    p, g, m, v = torch.randn(4, 3, dtype=torch.float64, generator=rng)
    m, v = (scale * m, (scale * v) ** 2) if t > 1 else (torch.zeros_like(m), torch.zeros_like(v))
    return p, scale * g, m, v, t


def _changed(**knobs: Any) -> Answer:
    return lambda *state: _adam(*state, **knobs)


adam_step = Exercise(
    name="14.1",
    solution=_adam,
    trials=(_state(1, seed=0), _state(12, seed=1), _state(2, seed=2, scale=1e-4)),
    labels=("p", "g", "m", "v", "t"),
    mistakes=(
        Mistake(_changed(m_t=None, v_t=None), "Both means start at 0: divide each by 1 − βᵗ."),
        Mistake(_changed(v_t=None), "You corrected m but not v, and v needs it most: divide it by 1 − β₂ᵗ."),
        Mistake(_changed(m_t=None), "You corrected v but not m: divide m by 1 − β₁ᵗ."),
        Mistake(
            _changed(m_t=-1, v_t=-1),
            "The corrections are one step late: t counts from 1, and t − 1 divides by zero at the first step.",
        ),
        Mistake(_changed(inside=True), "ε stands outside the root here: √v̂ + ε, not √(v̂ + ε)."),
        Mistake(_changed(size=torch.abs), "v is the mean of the squares g², not of |g|."),
        Mistake(_changed(beta1=0.999, beta2=0.9), "The betas are swapped: m forgets fast (0.9), v slowly (0.999)."),
        Mistake(
            _changed(keep_hats=True),
            "Return m and v as they were before the correction: m̂ and v̂ serve this step only.",
        ),
        Mistake(_changed(lr=-0.1), "The sign: the step goes against the gradient."),
        Mistake(
            lambda p, g, m, v, t: (_adam(p, 0 * g, m / 0.9, v / 0.999, t)[0], *_adam(p, g, m, v, t)[1:]),
            "You stepped with the old means: update m and v first, then step.",
        ),
    ),
    remark="two means, two corrections, one division.",
)


def _adamw(p: Tensor, gradients: Tensor, lr: float, decay: float, *, where: str = "beside") -> Tensor:
    """AdamW, and with another `where` the typical ways to misplace the decay."""
    start, m, v = p, torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        g = g + decay * p if where == "gradient" else g
        before = p
        shrink = {"beside": lr, "lr twice": lr * lr, "no lr": 1.0, "grows": -lr}.get(where, 0.0)
        p = (1 - shrink * decay) * p
        p, m, v = _adam(p, g, m, v, t, lr=lr)
        if where == "after":
            p = (1 - lr * decay) * p
        if where == "start":
            p = p - lr * decay * (before - start)
    return (1 - lr * decay) * p if where == "once" else p


def _gradients(steps: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 3, dtype=torch.float64, generator=rng) * torch.tensor([0.1, 1.0, 50.0])


def _misplaced(where: str) -> Answer:
    return lambda *problem: _adamw(*problem, where=where)


_WEIGHTS = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)

adamw = Exercise(
    name="14.2",
    solution=_adamw,
    trials=((_WEIGHTS, _gradients(1, 3), 0.1, 0.2), (_WEIGHTS, _gradients(20, 4), 0.05, 0.5)),
    labels=("p", "gradients", "lr", "decay"),
    mistakes=(
        Mistake(
            _misplaced("gradient"),
            "The decay went through the gradient: there it is divided by √v̂. Shrink p beside the step.",
        ),
        Mistake(
            _misplaced("lr twice"), "The decay is multiplied by the learning rate twice: the factor is 1 − lr·decay."
        ),
        Mistake(_misplaced("no lr"), "You shrink by 1 − decay; in AdamW it is 1 − lr·decay."),
        Mistake(
            _misplaced("after"), "You shrink after the step, so the step shrinks too: the decay acts on the old p."
        ),
        Mistake(_misplaced("grows"), "The sign: decay makes p smaller, so the factor is below 1."),
        Mistake(_misplaced("none"), "This is Adam without any decay."),
        Mistake(_misplaced("once"), "You shrink once at the end; the decay belongs to every step."),
        Mistake(_misplaced("start"), "Decay pulls towards 0, not towards the starting point."),
    ),
    remark="m and v never see the decay.",
)

Direction = Callable[[Tensor, dict, int], Tensor]


def train(direction: Direction, seed: int, steps: int = 300) -> dict[str, float]:
    """Run `direction` on 64 x 32 weights: the largest distance to the best, the bytes remembered, the steps taken."""
    rng = torch.Generator().manual_seed(seed)
    best_RC = torch.rand(64, 32, dtype=torch.float64, generator=rng) * 2 - 1
    rows, columns = (torch.logspace(0, 3, n, dtype=torch.float64)[torch.randperm(n, generator=rng)] for n in (64, 32))
    curvature_RC = torch.outer(rows, columns)
    p, state, most = torch.zeros_like(best_RC), {}, 0
    for t in range(1, steps + 1):
        moved = direction(curvature_RC * (p - best_RC), state, t)
        if moved is None or moved is ...:
            return moved
        p = p - 0.1 * 0.98 ** (t - 1) * moved
        most = max(most, sum(s.nbytes for s in state.values() if isinstance(s, Tensor)))
        if not p.isfinite().all():
            break
    return {"distance": float((p - best_RC).abs().max()), "bytes": most, "steps": t}


def _arrived(result: dict[str, float], seed: int) -> str | None:
    if result["distance"] <= 1e-4:
        return None
    far = f"{result['distance']:.2g}" if result["steps"] == 300 else "infinity"
    return f"after {result['steps']} steps the farthest weight is at a distance of {far}, allowed 0.0001"


def _mean(state: dict, name: str, value: Tensor, beta: float) -> Tensor:
    """The running mean of `value`, kept in `state`."""
    state[name] = beta * state.get(name, 0.0) + (1 - beta) * value
    return state[name]


def _factored(*, total: bool = True, power: float = 0.5, use: str = "both") -> Direction:
    """The squares' running mean from its row and column means (Shazeer & Stern 2018, arXiv 1804.04235, Algorithm 1)."""

    def direction(g: Tensor, state: dict, t: int) -> Tensor:
        rows = _mean(state, "rows", g.square().mean(1, keepdim=True), 0.99)
        columns = _mean(state, "columns", g.square().mean(0, keepdim=True), 0.99)
        both = rows * columns / (rows.mean() if total else 1)
        v = {"both": both, "rows": rows, "columns": columns}[use] / (1 - 0.99**t)
        return g / v**power

    return direction


def _by_adam(beta1: float, beta2: float) -> Direction:
    def direction(g: Tensor, state: dict, t: int) -> Tensor:
        m_hat = _mean(state, "m", g, beta1) / (1 - beta1**t)
        v_hat = _mean(state, "v", g.square(), beta2) / (1 - beta2**t)
        return m_hat / (v_hat.sqrt() + 1e-8)

    return direction


def _adagrad(g: Tensor, state: dict, t: int) -> Tensor:
    state["s"] = state.get("s", 0.0) + g.square()
    return g / (state["s"].sqrt() + 1e-10)


least_memory = Exercise(
    name="14.3",
    use=train,
    solution=_factored(),
    accept=_arrived,
    trials=((0,), (1,)),
    labels=("seed",),
    mistakes=(
        Mistake(
            lambda g, state, t: g,
            "Plain gradient descent flies away: the steepest weight needs a rate a million times smaller.",
        ),
        Mistake(
            lambda g, state, t: _mean(state, "m", g, 0.9),
            "Momentum alone follows the size of the slope as well: divide each entry by its own size.",
        ),
        Mistake(
            lambda g, state, t: g.sign(),
            "The sign needs no memory, but each step is as long as the last rate: it must shrink as the slope does.",
        ),
        Mistake(lambda g, state, t: g / g.norm(), "One number for the whole matrix leaves the flat entries behind."),
        Mistake(_adagrad, "AdaGrad never forgets: the first, large slopes hold its steps back to the end."),
        Mistake(_by_adam(0.999, 0.9), "Adam with its betas swapped: m should forget fast, v slowly."),
        Mistake(_factored(use="rows"), "Row means serve the rows; within a row the columns still differ."),
        Mistake(_factored(use="columns"), "Column means serve the columns; within a column the rows still differ."),
        Mistake(
            _factored(total=False),
            "Rows times columns counts the overall size twice: divide the product by the mean of the row means.",
        ),
        Mistake(
            _factored(power=1.0), "You divide by the mean of g² and not by its root, so the step has the wrong unit."
        ),
        Mistake(lambda g, state, t: -g.sign(), "Return what is *subtracted* from p: it points uphill, as g does."),
    ),
    remark="every weight is served, however steep.",
    score=Score(lambda answer: train(answer, seed=0)["bytes"], "bytes", 64 * 32 * 8),
)
