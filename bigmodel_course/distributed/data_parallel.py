"""Data parallelism: every rank holds the whole model and takes a part of each batch; gradients are averaged.

    model = DataParallel(module)
    for part, weight in sharded_batches(train, 32, seed=0, epoch=epoch):
        optimizer.zero_grad()
        (loss(model(part.x), part.y) * weight).backward()  # buckets are reduced while this still runs
        optimizer.step()

Every rank then takes the step that one process would take on the whole batch, so the replicas stay equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from bigmodel_course.costs import chunk_lengths
from bigmodel_course.data import Dataset, batches
from bigmodel_course.distributed.averaging import broadcast_tensors_, share_model_, trainable

__all__ = ["DataParallel", "shard", "sharded_batches"]

FIRST_BUCKET_BYTES = 2**20  # a small one, so that the link has work soon (as torch's)
Group = dist.ProcessGroup | None


def shard(batch: Dataset, group: Group = None) -> tuple[Dataset, float]:
    """This rank's part of `batch`, and the weight of that part's mean loss: ranks * len(part) / len(batch).

    Each example goes to exactly one rank; sizes differ by at most one, and the last parts may be empty.  With the
    weight, the mean over the ranks of the gradients is the gradient of the whole batch's mean loss, whatever the sizes
    (a mean loss over no example is NaN, but its gradient is 0).
    """
    if len(batch) == 0:
        raise ValueError("batch must hold at least one example, got none")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    lengths = chunk_lengths(len(batch), ranks)
    start = sum(lengths[:rank])
    return batch[start : start + lengths[rank]], ranks * lengths[rank] / len(batch)


def sharded_batches(
    dataset: Dataset, size: int, *, seed: int, epoch: int, group: Group = None, **options: bool
) -> Iterator[tuple[Dataset, float]]:
    """`shard` of each of `data.batches(dataset, size, …)`; `size` counts the examples of all ranks together.

    Every rank derives the same order from (seed, epoch) and keeps its own part, so nothing is sent.
    """
    return (shard(batch, group) for batch in batches(dataset, size, seed=seed, epoch=epoch, **options))


class DataParallel(nn.Module):
    """A module whose `backward` leaves in each `grad` the mean over the ranks, as torch's DistributedDataParallel does.

    Parameters, last ones first, lie in buckets of about `bucket_bytes`.  When the last gradient of a bucket is complete
    its all-reduce starts, and the backward pass goes on.  The gradients are views of the buckets: they are not copied
    back, and the next backward pass overwrites them.  A tied parameter counts once, after its last use.  With
    `find_unused` a parameter may be left out of a backward pass: it counts as 0, and keeps its `grad` (None) where no
    rank has used it.

    At the start every rank takes over rank 0's parameters and buffers, and after each reduction rank 0's buffers.
    `forward` never communicates.  `state_dict` is the plain module's.

    Li et al. 2020, PyTorch Distributed, arXiv 2006.15704, section 3.2.
    ValueError when the ranks' modules differ; RuntimeError when a gradient is missing or comes twice in one pass.
    """

    def __init__(
        self, module: nn.Module, *, group: Group = None, bucket_bytes: int = 25 * 2**20, find_unused: bool = False
    ):
        super().__init__()
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be 1 or more, got {bucket_bytes}")
        self.module, self.group, self.find_unused = module, group, find_unused
        share_model_(module, group)
        self._names, self._params = trainable(module)
        self._buckets, self._slots = _fill_buckets(self._params, bucket_bytes)
        self._scale = 1 / dist.get_world_size(group)
        self._synchronizes = True
        self._hooks = [self._hook(i, p) for i, p in enumerate(self._params)]
        self._reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        if torch.is_grad_enabled():
            self._check_parameters()
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of `backward` calls in here only add up on this rank; the first one outside reduces the sums."""
        before, self._synchronizes = self._synchronizes, False
        try:
            yield
        finally:
            self._synchronizes = before

    def remove(self) -> nn.Module:
        """Take the hooks off and return the module, plain again."""
        for hook in self._hooks:
            hook.remove()
        return self.module

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plain module's, so that a checkpoint does not know how many ranks wrote it."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the plain module; each rank must load the same."""
        return self.module.load_state_dict(*args, **kwargs)

    def _hook(self, i: int, p: nn.Parameter) -> Any:
        if any(isinstance(f, _Arrival) for f in (p._post_accumulate_grad_hooks or {}).values()):
            raise ValueError(f"module must not be in two DataParallels, and {self._names[i]!r} is: call remove() first")
        return p.register_post_accumulate_grad_hook(_Arrival(self._arrived, i))

    def _reset(self) -> None:
        self._under_way = False
        self._missing = [set(members) for _, members in self._buckets]
        self._works: list[dist.Work] = []  # of the buckets sent: always the first ones, the same on every rank

    def _arrived(self, i: int, p: Tensor) -> None:
        """Parameter `i` has its whole gradient: into its bucket with it, and off with every bucket that is full."""
        if p.grad.layout != torch.strided:
            raise TypeError(f"gradients must be dense, got {p.grad.layout} for {self._names[i]!r}: use sparse=False")
        if not self._synchronizes:
            self._move(i, 1.0)
            return
        if not self._under_way:
            self._under_way = True
            Variable._execution_engine.queue_callback(self._finish)  # called when this backward pass ends
        self._move(i, self._scale)
        self._missing[self._slots[i][0]].discard(i)
        self._send_full()

    def _move(self, i: int, scale: float) -> None:
        """The gradient into its bucket; scaled on the way, before the sum, as torch does."""
        p, view = self._params[i], self._slots[i][1]
        if p.grad is None:
            view.zero_()
        elif p.grad is not view or scale != 1:
            p.grad = torch.mul(p.grad, scale, out=view)

    def _send_full(self) -> None:
        """Start the next buckets, strictly in order: ranks that disagree on the order would add different things."""
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            flat, _ = self._buckets[len(self._works)]
            self._works.append(dist.all_reduce(flat, group=self.group, async_op=True))

    def _finish(self) -> None:
        """Send what has not been sent, wait for the sums, and take over rank 0's buffers."""
        unused = sorted(i for missing in self._missing for i in missing)
        if unused and not self.find_unused:
            names = ", ".join(repr(self._names[i]) for i in unused[:3]) + (", …" if len(unused) > 3 else "")
            raise RuntimeError(
                f"no gradient came for {names}: freeze what the loss does not use or pass find_unused=True; with "
                "activation checkpointing, use_reentrant=False"
            )
        used = [p.grad is not None for p in self._params]
        for i in unused:
            self._move(i, self._scale)
        self._missing = [set()] * len(self._buckets)
        self._send_full()
        if self.find_unused:
            anywhere = torch.tensor(used, dtype=torch.int32, device=self._params[0].device)
            dist.all_reduce(anywhere, group=self.group)
            used = anywhere.tolist()
        for work in self._works:
            work.wait()
        for i in unused:
            if used[i]:  # by another rank, or by an earlier microbatch
                self._params[i].grad = self._slots[i][1]
        broadcast_tensors_(self.module.buffers(), self.group)
        self._reset()

    def _check_parameters(self) -> None:
        if self._under_way:
            raise RuntimeError("the last backward pass did not end: after an error, make a new DataParallel")
        now = [p for p in self.module.parameters() if p.requires_grad]
        if len(now) != len(self._params) or any(p is not q for p, q in zip(now, self._params, strict=True)):
            raise RuntimeError("the module's trainable parameters have changed: call remove() and wrap it again")


class _Arrival(partial):
    """The hook on a parameter: a type of its own, to be recognised."""


def _fill_buckets(
    params: tuple[nn.Parameter, ...], bucket_bytes: int
) -> tuple[list[tuple[Tensor, list[int]]], list[tuple[int, Tensor]]]:
    """Flat buffers with the numbers of their parameters, and for each parameter its bucket and its view of it.

    From the last parameter to the first: about the order in which the backward pass reaches them.
    """
    groups: list[list[int]] = []
    size, limit = 0, 0
    for i in reversed(range(len(params))):
        p = params[i]
        if size >= limit or (p.dtype, p.device) != (params[groups[-1][0]].dtype, params[groups[-1][0]].device):
            limit = min(FIRST_BUCKET_BYTES, bucket_bytes) if not groups else bucket_bytes
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += p.numel() * p.element_size()
    buckets, slots = [], [None] * len(params)
    for b, members in enumerate(map(sorted, groups)):  # inside a bucket in the module's order, as torch's first ones
        flat = params[members[0]].new_zeros(sum(params[i].numel() for i in members))
        for i, piece in zip(members, flat.split([params[i].numel() for i in members]), strict=True):
            slots[i] = (b, piece.view(params[i].shape))
        buckets.append((flat, members))
    return buckets, slots
