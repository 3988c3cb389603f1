"""Lesson 21, pruning: a mask by magnitude over all layers, a step that keeps it, the fewest FLOPs by neurons."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["cheapest_neurons", "global_mask", "masked_step"]

Named = dict[str, Tensor]


def _weights(named: Named) -> Named:
    return {name: w for name, w in named.items() if w.ndim > 1}


def _threshold(named: Named, sparsity: float, size: Callable[[Tensor], Tensor] = torch.abs) -> Tensor:
    """The largest size that is pruned."""
    ordered = torch.cat([size(w).flatten() for w in named.values()]).sort().values
    return ordered[round(sparsity * len(ordered)) - 1]


def _global(named: Named, sparsity: float) -> Named:
    limit = _threshold(_weights(named), sparsity)
    return {name: w.abs() > limit for name, w in _weights(named).items()}


def _with_biases(named: Named, sparsity: float) -> Named:
    limit = _threshold(named, sparsity)
    return {name: w.abs() > limit for name, w in _weights(named).items()}


def _share_of_the_largest(named: Named, sparsity: float) -> Named:
    limit = sparsity * max(w.abs().max() for w in _weights(named).values())
    return {name: w.abs() > limit for name, w in _weights(named).items()}


def _named(seed: int, first: tuple[int, int], second: tuple[int, int]) -> Named:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": first, "0.bias": first[:1], "2.weight": second, "2.bias": second[:1]}
    scales = {"0.weight": 1.0, "0.bias": 0.3, "2.weight": 3.0, "2.bias": 5.0}
    return {
        name: scales[name] * torch.randn(shape, dtype=torch.float64, generator=rng) for name, shape in shapes.items()
    }


global_mask = Exercise(
    name="21.1",
    solution=_global,
    trials=((_named(0, (4, 3), (2, 4)), 0.5), (_named(1, (6, 5), (2, 5)), 0.8)),
    labels=("weights", "sparsity"),
    mistakes=(
        Mistake(
            lambda named, sparsity: {
                name: w.abs() > _threshold({name: w}, sparsity) for name, w in _weights(named).items()
            },
            "Each layer has its own threshold here: global means one threshold over all layers together.",
        ),
        Mistake(
            lambda named, sparsity: {
                name: w > _threshold(_weights(named), sparsity, lambda w: w) for name, w in _weights(named).items()
            },
            "You compare signed values: −3 is a large weight, take the magnitude.",
        ),
        Mistake(
            lambda named, sparsity: {name: ~mask for name, mask in _global(named, sparsity).items()},
            "True is what stays: you keep the small ones.",
        ),
        Mistake(
            lambda named, sparsity: {name: w.abs() > _threshold(named, sparsity) for name, w in named.items()},
            "The biases are pruned as well: they are few and each one matters. Masks are for weights only.",
        ),
        Mistake(_with_biases, "The biases took part in the threshold: leave them out before you sort."),
        Mistake(
            lambda named, sparsity: {
                name: w.abs() >= _threshold(_weights(named), sparsity) for name, w in _weights(named).items()
            },
            "Off by one: the weight at the threshold is the last to go, not the first to stay.",
        ),
        Mistake(
            _share_of_the_largest,
            "A share of the largest magnitude is not a share of the weights: sort, and count.",
        ),
        Mistake(
            lambda named, sparsity: _global(named, 1 - sparsity),
            "Sparsity is the share that goes. You took it for the share that stays.",
        ),
    ),
    remark="one threshold for the whole model, and no bias lost.",
)

LR, BETA = 0.1, 0.9
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def masked_walk(step: Step, w: Tensor, v: Tensor, gradients: Tensor, mask: Tensor) -> Tensor | None:
    """The weights after each of the steps with these `gradients`."""
    walk = []
    for g in gradients:
        result = step(w, v, g, mask)
        if result is None or result is ...:
            return result
        w, v = result
        walk.append(w)
    return torch.stack(walk)


def _masked(w: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    v = BETA * v + g
    return (w - LR * v) * mask, v


def _gradient_only(w: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    v = BETA * v + g * mask
    return w - LR * v, v


def _before(w: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    v = BETA * v + g
    return w * mask - LR * v, v


def _step_only(w: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    v = BETA * v + g
    return w - LR * v * mask, v


def _new_mask(w: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    v = BETA * v + g
    w = w - LR * v
    largest = w.abs().sort().values[-int(mask.sum())]
    return w * (w.abs() >= largest), v


def _run(seed: int, *, pruned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    w, v = torch.randn(2, 6, dtype=torch.float64, generator=rng)
    mask = torch.tensor([True, False, True, False, False, True])
    return w * mask if pruned else w, v, torch.randn(4, 6, dtype=torch.float64, generator=rng), mask


masked_step = Exercise(
    name="21.2",
    use=masked_walk,
    solution=_masked,
    trials=(_run(0, pruned=True), _run(1, pruned=False)),
    labels=("w", "v", "gradients", "mask"),
    mistakes=(
        Mistake(
            lambda w, v, g, mask: (w - LR * (BETA * v + g), BETA * v + g),
            "The mask is lost after the first step: nothing sets the pruned weights back to zero.",
        ),
        Mistake(
            _gradient_only,
            "A masked gradient is not enough: v still holds old gradients, and brings the pruned weights back.",
        ),
        Mistake(_before, "You mask before the step, and then the step moves the pruned weights: mask what comes out."),
        Mistake(
            _step_only,
            "The step is masked, the weight is not: a weight that came in dense is never set to zero.",
        ),
        Mistake(
            lambda w, v, g, mask: _masked(w, v, g, ~mask),
            "True is what stays: your mask is upside down.",
        ),
        Mistake(_new_mask, "You choose a new mask by size at each step: this one is fixed, and it is given."),
        Mistake(
            lambda w, v, g, mask: _masked(w, torch.zeros_like(v), g, mask),
            "The momentum is forgotten: v is 0.9 of the old v, plus g.",
        ),
        Mistake(
            lambda w, v, g, mask: ((w + LR * (BETA * v + g)) * mask, BETA * v + g),
            "The sign: the step goes against v.",
        ),
    ),
    remark="the pruned weights are zero after every step, whatever v remembers.",
)

Layers = list[tuple[Tensor, Tensor]]
Kept = list[list[int]]


def outputs(layers: Layers, x: Tensor, kept: Kept | None = None) -> Tensor:
    """The scores of the MLP, ReLU between its layers, with only the `kept` hidden neurons."""
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        if i < len(layers) - 1:
            x = x.relu()
            if kept is not None:
                stays = torch.zeros(len(bias), dtype=x.dtype)
                stays[torch.as_tensor(kept[i], dtype=torch.int64)] = 1
                x = x * stays
    return x


def error_left(layers: Layers, x: Tensor, kept: Kept) -> float:
    """How far the scores move, relative to their own size."""
    full = outputs(layers, x)
    return float((outputs(layers, x, kept) - full).norm() / full.norm())


def forward_flops(layers: Layers, kept: Kept) -> int:
    """FLOPs of one example in the smaller dense model."""
    return costs.total(costs.mlp([layers[0][0].shape[1], *map(len, kept), len(layers[-1][1])])).flops


def _all(layers: Layers) -> Kept:
    return [list(range(len(bias))) for _, bias in layers[:-1]]


def _without(kept: Kept, layer: int, neuron: int) -> Kept:
    return [[n for n in part if (i, n) != (layer, neuron)] for i, part in enumerate(kept)]


def _greedy(layers: Layers, x: Tensor, limit: float) -> Kept:
    """Again and again, drop the neuron that adds the least error for each FLOP saved, while the error is allowed."""
    kept = _all(layers)
    while True:
        choices = []
        for layer, part in enumerate(kept):
            for neuron in part if len(part) > 1 else []:
                trial = _without(kept, layer, neuron)
                error = error_left(layers, x, trial)
                saved = forward_flops(layers, kept) - forward_flops(layers, trial)
                choices.append((error**2 / saved, error, trial))
        allowed = [choice for choice in choices if choice[1] <= limit]
        if not allowed:
            return kept
        kept = min(allowed, key=lambda choice: choice[0])[2]


def _largest(sizes: list[Tensor], share: float) -> Kept:
    return [s.argsort(descending=True)[: max(1, round(share * len(s)))].sort().values.tolist() for s in sizes]


def _incoming(layers: Layers) -> list[Tensor]:
    return [weight.norm(dim=1) for weight, _ in layers[:-1]]


def _outgoing(layers: Layers) -> list[Tensor]:
    return [weight.norm(dim=0) for weight, _ in layers[1:]]


def _one_at_a_time(layers: Layers, x: Tensor, limit: float) -> Kept:
    return [
        [n for n in part if error_left(layers, x, _without(_all(layers), i, n)) > limit]
        for i, part in enumerate(_all(layers))
    ]


def _within(kept: Kept, layers: Layers, x: Tensor, limit: float) -> str | None:
    if len(kept) != len(layers) - 1 or not all(isinstance(part, list) for part in kept):
        return f"return a list of {len(layers) - 1} lists, the positions to keep in each hidden layer"
    for i, (part, (_, bias)) in enumerate(zip(kept, layers, strict=False)):
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < len(bias) for n in part)
        if not whole or not part or len(set(part)) < len(part):
            return f"hidden layer {i} needs one or more different positions from 0 to {len(bias) - 1}, got {part}"
    error = error_left(layers, x, kept)
    if error <= limit:
        return None
    return f"without the other neurons the scores move by {error:.3g} of their size, allowed {limit:g}"


def _problem(seed: int) -> tuple[Layers, Tensor, float]:
    """An 8-16-12-4 MLP in which the size of a neuron's incoming weights says little about its use."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=rng)

    widths, layers = (8, 16, 12, 4), []
    for inputs, neurons in pairwise(widths):
        layers.append((normal(neurons, inputs) / inputs**0.5, 0.1 * normal(neurons)))
    for layer, following in pairwise(layers):
        weight, bias = layer
        fourth = len(bias) // 4
        places = torch.randperm(len(bias), generator=rng)
        dead, idle, quiet = places[:fourth], places[fourth : 2 * fourth], places[2 * fourth :]
        bias[dead] = -20.0  # never fires
        weight[dead] *= 2
        weight[idle] *= 3  # fires loudly, and hardly anybody listens
        following[0][:, idle] *= torch.logspace(-3, -0.5, len(idle), dtype=torch.float64)
        weight[quiet] *= 0.3  # speaks softly, and is heard
        following[0][:, quiet] *= torch.logspace(-1, 0.7, len(quiet), dtype=torch.float64)
        following[0][:, dead] *= 4
    layers[-1] = (layers[-1][0] * 0.05, layers[-1][1] * 0.05)
    return layers, normal(30, 8), 0.1


_EASY, _HARD = _problem(0), _problem(6)

cheapest_neurons = Exercise(
    name="21.3",
    solution=_greedy,
    accept=_within,
    trials=(_EASY, _HARD),
    labels=("layers", "x", "limit"),
    mistakes=(
        Mistake(
            lambda layers, x, limit: [
                sorted(set(whole) - set(part))
                for whole, part in zip(_all(layers), _greedy(layers, x, limit), strict=True)
            ],
            "These are the neurons to drop: return those that stay.",
        ),
        Mistake(
            lambda layers, x, limit: [len(part) for part in _greedy(layers, x, limit)],
            "These are counts: return the positions, one list for each hidden layer.",
        ),
        Mistake(
            lambda layers, x, limit: [
                [n in part for n in whole] for whole, part in zip(_all(layers), _greedy(layers, x, limit), strict=True)
            ],
            "These are masks: return the positions where they are True.",
        ),
        Mistake(
            lambda layers, x, limit: _largest(_incoming(layers), 0.5),
            "The norm of the incoming weights does not see the bias, nor who listens: a loud neuron may be useless.",
        ),
        Mistake(
            lambda layers, x, limit: _largest(_outgoing(layers), 0.5),
            "The outgoing weights do not see whether the neuron ever fires: multiply by its output on x.",
        ),
        Mistake(
            _one_at_a_time,
            "Each of these can go alone. Together they move the scores too far: measure again after each one.",
        ),
        Mistake(
            lambda layers, x, limit: _greedy(layers, x, limit**0.5),
            "You compare the squared error with the limit: take the root.",
        ),
        Mistake(
            lambda layers, x, limit: _greedy(layers, x, limit / float(outputs(layers, x).norm())),
            "Your error is absolute: divide by the norm of the full model's scores.",
        ),
        Mistake(
            lambda layers, x, limit: [[n for n in range(len(bias)) if bias[n] > 0] for _, bias in layers[:-1]],
            "A negative bias alone does not silence a neuron: look at its output on x.",
        ),
    ),
    remark="the smaller model gives the same scores, within the limit.",
    score=Score(lambda answer: forward_flops(_HARD[0], answer(*_HARD)), "FLOPs", 244),
)
