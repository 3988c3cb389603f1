"""One step of Adam on the parameters of GPT-2 small, ours beside torch's: one thread, CPU time.

The floor is the time that 28 bytes a parameter (read p, g, m, v; write p, m, v; float32) must take at the bandwidth
that `x.mul_(1)` reaches, which reads and writes 8 bytes a parameter.
"""

import os
import tempfile
from functools import partial
from math import prod
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import Result, Rival, alternate, ratio
from bigmodel_course.optim import Adam, Optimizer

TARGETS = {"compiled_over_fused": 1.05, "plain_over_torch_loop": 1.0}
LR = 1e-4


def gpt_shapes(layers: int, width: int, context: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Every parameter of a GPT-2 with biases and a tied head."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = [*norm, *attention, *norm, *feed_forward]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def leaves(values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Parameters of their own that share the memory of `values` and `gradients`: every rival moves the same bytes."""
    params = [value.detach().requires_grad_() for value in values]
    set_gradients(params, gradients)
    return params


def set_gradients(params: list[Tensor], gradients: list[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g


def rivals(shapes: list[tuple[int, ...]]) -> dict[str, Rival]:
    """Each way to take the step, ready to be timed."""
    rng = torch.Generator().manual_seed(0)
    values = [0.02 * torch.randn(shape, generator=rng) for shape in shapes]
    gradients = [0.01 * torch.randn(shape, generator=rng) for shape in shapes]
    buffer = torch.ones(sum(map(prod, shapes)))
    adam = partial(torch.optim.Adam, lr=LR)
    compiled = leaves(values, gradients)
    fast = Optimizer(compiled, Adam(), LR, compile=True)
    return {
        "ours": Rival(Optimizer(leaves(values, gradients), Adam(), LR).step),
        "ours, compiled": Rival(fast.step),  # the step before has left the gradients in the buffer
        "ours, compiled, fresh gradients": Rival(fast.step, partial(set_gradients, compiled, gradients)),
        "torch, loop": Rival(adam(leaves(values, gradients), foreach=False, fused=False).step),
        "torch, foreach": Rival(adam(leaves(values, gradients), foreach=True).step),
        "torch, fused": Rival(adam(leaves(values, gradients), fused=True).step),
        "mul_(1)": Rival(partial(buffer.mul_, 1.0)),
    }


def run(quick: bool) -> Result:
    """Time the seven in turn; `quick` takes a model of 0.5 million parameters."""
    shapes = gpt_shapes(2, 128, 64, 1000) if quick else gpt_shapes(12, 768, 1024, 50257)
    total = sum(map(prod, shapes))
    if not quick and (len(shapes), total) != (148, 124_439_808):
        raise AssertionError(f"GPT-2 small has 148 tensors of 124,439,808 numbers, got {len(shapes)} of {total:,}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        seconds = alternate(rivals(shapes), rounds=15)
    torch.set_num_threads(threads)
    return summary(seconds)


def summary(seconds: dict[str, list[float]]) -> Result:
    seconds = {**seconds, "floor": [28 / 8 * s for s in seconds["mul_(1)"]]}
    pairs = {
        "compiled_over_fused": ("ours, compiled", "torch, fused"),
        "plain_over_torch_loop": ("ours", "torch, loop"),
        "plain_over_torch_foreach": ("ours", "torch, foreach"),
        "floor_over_fused": ("floor", "torch, fused"),
        "compiled_fresh_gradients_over_fused": ("ours, compiled, fresh gradients", "torch, fused"),
    }
    measured = {label: ratio(seconds[above], seconds[below]) for label, (above, below) in pairs.items()}
    return Result(
        ratios={label: round(value, 4) for label, (value, _) in measured.items()},
        spread=round(max(spread for _, spread in measured.values()), 4),
        targets=TARGETS,
        table=[{"one step": label, "CPU ms": f"{1000 * median(s):.2f}"} for label, s in seconds.items()],
    )
