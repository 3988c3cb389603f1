"""Replicas of one model: made equal, compared, and averaged, gradients or weights.

Averaging the gradients of each step is data parallelism, and equals one process.  Averaging the weights every k steps
is local SGD: with k = 1 and plain SGD it is the same thing; with a larger k it sends less and is something else.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_gradients_", "average_models_", "broadcast_tensors_", "replicas_differ", "share_model_"]
__all__ += ["trainable"]

Group = dist.ProcessGroup | None


def average_gradients_(module: nn.Module, group: Group = None) -> None:
    """Replace each gradient by its mean over the ranks: the naive way, correct and slow, since nothing overlaps.

    Call it once a step, after the last microbatch: what is averaged must be the sum over all microbatches.
    ValueError names a parameter without a gradient.
    """
    for name, p in zip(*trainable(module), strict=True):
        if p.grad is None:
            raise ValueError(f"every parameter must have a gradient, and {name!r} has none: freeze it first")
        p.grad.mul_(1 / dist.get_world_size(group))
        dist.all_reduce(p.grad, group=group)


@torch.no_grad()
def average_models_(module: nn.Module, group: Group = None, *, weight: float = 1.0) -> None:
    """Replace each parameter and each floating-point buffer by its mean over the ranks.

    `weight` is this rank's, ranks * examples / all examples where they differ, as `data_parallel.shard` gives it.
    Called every k steps this is local SGD (Stich 2019, arXiv 1805.09767).  It means something only for replicas that
    began with the same weights: two networks that were initialised apart have their neurons in different places.
    """
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point() or t.is_complex():
            t.mul_(weight / dist.get_world_size(group))
            dist.all_reduce(t, group=group)


def replicas_differ(module: nn.Module, group: Group = None) -> str | None:
    """The name of the first parameter or buffer that is not bit for bit the same on every rank; None if all are.

    Only 16 bytes a tensor are reduced: the smallest and the largest of the ranks' hashes (SHA-256, cut to 8 bytes).
    Every rank gets the same answer.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    if not named:
        return None
    low = torch.tensor([_digest(t) for _, t in named], dtype=torch.int64, device=named[0][1].device)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    return next((name for (name, _), a, b in zip(named, low, high, strict=True) if a != b), None)


def _digest(t: Tensor) -> int:
    content = t.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def share_model_(module: nn.Module, group: Group = None) -> None:
    """Give every rank rank 0's parameters and buffers; ValueError names the first one that is not of the same shape."""
    named = [*module.named_parameters(), *module.named_buffers()]
    mine = [(name, f"{list(t.shape)} {t.dtype}{'' if t.requires_grad else ' frozen'}") for name, t in named]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        for i in range(max(len(theirs), len(everyone[0]))):
            first, other = (" ".join(rows[i]) if i < len(rows) else "nothing" for rows in (everyone[0], theirs))
            if first != other:
                raise ValueError(
                    f"module must be the same on every rank, got {first} on rank 0 and {other} on rank {rank}"
                )
    for _, t in named:
        broadcast_tensors_([t.detach()], group)  # one by one: joined, they would need the model's memory again


def broadcast_tensors_(tensors: Iterable[Tensor], group: Group = None) -> None:
    """Overwrite `tensors` with rank 0's; those of one dtype and device travel as one message."""
    kinds: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for same in kinds.values():
        flat = torch.cat([t.flatten() for t in same])
        dist.broadcast(flat.view(torch.uint8), group=group, group_src=0)  # as bytes: Gloo does not know every dtype
        for t, piece in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(piece.view(t.shape))


def trainable(module: nn.Module) -> tuple[tuple[str, ...], tuple[nn.Parameter, ...]]:
    """Names and parameters that require a gradient, a tied one once; ValueError when there are none."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("module must have a parameter that requires a gradient, got none")
    names, params = zip(*named, strict=True)
    return names, params
