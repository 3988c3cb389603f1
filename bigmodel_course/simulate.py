"""One rank's training step of torch's own FSDP2 and tensor parallelism, on a cluster that is not there.

The process group is torch's `fake` one: it answers at once and sends nothing.  The tensors are fake ones: they have
shapes and no memory.  What runs is torch's real code, so what it asks of each rank can be counted for 16,384 of them.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel_course.costs import Transformer
from bigmodel_course.costs.arguments import at_least

__all__ = ["Decoder", "Step", "simulate"]


class _Attention(nn.Module):
    def __init__(self, shape: Transformer):
        super().__init__()
        self.head = shape.width // shape.heads
        self.query = nn.Linear(shape.width, shape.width, bias=not shape.gated)
        self.key = nn.Linear(shape.width, shape.key_value_width, bias=not shape.gated)
        self.value = nn.Linear(shape.width, shape.key_value_width, bias=not shape.gated)
        self.out = nn.Linear(shape.width, shape.width, bias=not shape.gated)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BNTD, k_BNTD, v_BNTD = (
            layer(x_BTC).unflatten(2, (-1, self.head)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        shared = q_BNTD.shape[1] != k_BNTD.shape[1]
        mean_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True, enable_gqa=shared)
        return self.out(mean_BNTD.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, shape: Transformer):
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.inner, bias=False) if shape.gated else None
        self.up = nn.Linear(shape.width, shape.inner, bias=not shape.gated)
        self.down = nn.Linear(shape.inner, shape.width, bias=not shape.gated)

    def forward(self, x_BTC: Tensor) -> Tensor:
        up_BTH = self.up(x_BTC)
        return self.down(F.gelu(up_BTH) if self.gate is None else F.silu(self.gate(x_BTC)) * up_BTH)


class _Block(nn.Module):
    def __init__(self, shape: Transformer):
        super().__init__()
        norm = nn.RMSNorm if shape.gated else nn.LayerNorm
        self.norm1, self.attention = norm(shape.width), _Attention(shape)
        self.norm2, self.mlp = norm(shape.width), _MLP(shape)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        return x_BTC + self.mlp(self.norm2(x_BTC))


class Decoder(nn.Module):
    """The decoder of a `costs.Transformer`: tokens [B, T] -> scores [B, T, vocabulary].  Build it on the meta device.

    Rotary positions have no parameters, no matrix product and no traffic: they are left out, as nothing is computed.
    """

    def __init__(self, shape: Transformer):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = None if shape.gated else nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = (nn.RMSNorm if shape.gated else nn.LayerNorm)(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Scores (logits) of the token that follows each one."""
        x_BTC = self.tokens(tokens_BT)
        if (
            self.positions is not None
        ):  # with sequence parallelism rank 0 has the first positions, and it is rank 0's step
            x_BTC = x_BTC + self.positions(torch.arange(x_BTC.shape[1])[None])
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


@dataclass
class Step:
    """What one rank's step asked for: `parameters` it holds, `flops` of its matrix products and attention.

    `messages` counts the collectives by (axis, kind), `numbers` sums the numbers in each one's larger buffer.
    """

    parameters: int = 0
    flops: int = 0
    messages: Counter = field(default_factory=Counter)
    numbers: Counter = field(default_factory=Counter)


KINDS = {"all_reduce": "all-reduce", "allreduce_": "all-reduce"}
KINDS |= {"all_gather_into_tensor": "all-gather", "_allgather_base_": "all-gather"}
KINDS |= {"reduce_scatter_tensor": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter"}


class _Count(TorchDispatchMode):
    """Counts what runs below DTensor: each call is one that this rank really makes."""

    def __init__(self, step: Step):
        super().__init__()
        self.step = step

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as calls on this rank's part
        result = call(*args, **(kwargs or {}))
        space, name = call._schema.name.split("::")
        if name in KINDS:
            axis = "data" if space == "c10d" else "tensor"  # FSDP2 speaks to c10d, DTensor to its functional layer
            key = axis, KINDS[name]
            self.step.messages[key] += 1
            self.step.numbers[key] += max(_sizes([*args, result]))
        elif "c10d" in space and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise RuntimeError(f"the step made a collective that is not counted: {space}::{name}")
        self.step.flops += _flops(name, args)
        return result


def _sizes(values: list) -> Iterator[int]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.numel()
        elif isinstance(value, (list, tuple)):
            yield from _sizes(list(value))


def _flops(name: str, args: tuple) -> int:
    if name in ("mm", "bmm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name == "addmm":
        return 2 * args[1].numel() * args[2].shape[-1]
    if name.startswith("_scaled_dot_product"):  # two products of T x T forward, four backward (none computed again)
        query, times = (args[0], 2) if "backward" not in name else (args[1], 4)
        return times * 2 * query.numel() * query.shape[-2]
    return 0


def simulate(
    shape: Transformer,
    data: int,
    tensor: int = 1,
    *,
    sequences: int = 1,
    tokens: int | None = None,
    recompute: bool = False,
) -> Step:
    """Count what rank 0 of data x tensor ranks does in one training step with AdamW.

    Parameters, gradients and states are sharded over `data` ranks (FSDP2, each block and the rest a unit), matrices and
    sequences over `tensor` ranks.  Each group of `tensor` ranks reads `sequences` sequences of `tokens` tokens;
    `recompute` keeps a block's input only and runs its forward pass again.
    """
    tokens = shape.context if tokens is None else tokens
    if dist.is_initialized():
        raise RuntimeError("simulate makes a process group of its own: call it where none exists")
    if tokens % tensor or shape.shared_heads % tensor:
        raise ValueError(f"need tokens and key_value_heads that {tensor=} divides, got {tokens}, {shape.shared_heads}")
    at_least(1, data=data, tensor=tensor, sequences=sequences, tokens=tokens)
    with _fake_cluster(data * tensor):
        model = _sharded(shape, data, tensor, recompute)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _second_step(model, sequences, tokens)


def _sharded(shape: Transformer, data: int, tensor: int, recompute: bool) -> Decoder:
    """The model on the meta device, divided: outside the fake tensors' mode, in which DTensor cannot be made."""
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        model = Decoder(shape)
    if tensor > 1:
        _cut(model, mesh["tensor"], tied=shape.tied)
    if recompute:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block)
    if data * tensor > 1:
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh["data"])
    return model


@contextmanager
def _fake_cluster(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _cut(model: Decoder, mesh: DeviceMesh, *, tied: bool) -> None:
    """Megatron's tensor and sequence parallelism with torch's own building blocks."""
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    column, row, norm = ColwiseParallel(), RowwiseParallel(output_layouts=Shard(1)), SequenceParallel()
    plan = {"norm1": norm, "norm2": norm, "attention": whole, "mlp": whole, "attention.out": row, "mlp.down": row}
    plan |= dict.fromkeys(("attention.query", "attention.key", "attention.value", "mlp.up"), column)
    for block in model.blocks:
        parallelize_module(block, mesh, plan | ({"mlp.gate": column} if block.mlp.gate is not None else {}))
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
    tokens = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    outside = {"tokens": tokens, "norm": norm, "head": head}
    if model.positions is not None:
        outside["positions"] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, outside)
    if tied:
        model.head.weight = model.tokens.weight


def _second_step(model: Decoder, sequences: int, tokens: int) -> Step:
    """The first step sets things up that later ones do not: it is the second that counts."""
    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    cut = any(isinstance(p, DTensor) and "tensor" in p.device_mesh.mesh_dim_names for p in model.parameters())
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        step = Step(sum(p.numel() for p in parameters))
        batch = torch.zeros(sequences, tokens, dtype=torch.long)
        with _Count(step), loss_parallel() if cut else nullcontext():
            scores = model(batch)
            F.cross_entropy(scores.flatten(0, 1), batch.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return step
