"""Sharded states (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054): data parallelism in which nothing is kept N times.

    sharded = Sharded(model, lambda shards: Optimizer(shards, AdamW(), lr=3e-4), stage=3)
    cross_entropy(model(x), y).backward()  # x: this rank's share of the batch
    sharded.step(clip_norm=1.0)

The parameters of a unit, such as a block, lie one after the other in one flat vector, a `Bucket`.  Each of the N ranks
owns an equal piece of it, its shard, and the optimizer knows nothing but shards.

    stage 1    every rank holds all parameters and all gradients, and the optimizer's states of its own shards
    stage 2    gradients too: as soon as a bucket has all of its gradients, they are summed into shards and freed
    stage 3    parameters too: a unit is gathered before its forward pass, freed, gathered for its backward, freed
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from bigmodel_course.distributed.collectives import reduce_scatter_

__all__ = ["Bucket", "Sharded"]


class Bucket:
    """Parameters in one flat vector that the ranks of `group` share equally; zeros fill the last shard up.

    All of them want gradients (`trainable`), or none does.  `whole` is the vector and `shard` this rank's piece, a
    parameter to optimize.  While the whole is freed it has no memory, and its parameters have no elements.
    """

    def __init__(self, named: dict[str, nn.Parameter], group: dist.ProcessGroup | None = None):
        self.names, self.params, self.group = list(named), list(named.values()), group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.trainable = self.params[0].requires_grad
        self.shapes = [p.shape for p in self.params]
        self.starts = [sum(map(math.prod, self.shapes[:i])) for i in range(len(self.shapes))]
        self.length = sum(map(math.prod, self.shapes))
        self.size = -(-self.length // self.ranks)  # of a shard; all together may be a little longer than `length`
        self.whole = self.params[0].detach().new_zeros(self.ranks * self.size)
        for i, p in enumerate(self.params):
            self._part(self.whole, i).copy_(p.detach())
            p.data, p.grad = self._part(self.whole, i), None
        dist.broadcast(self.whole, group=group, group_src=0)
        mine = self.whole[self.rank * self.size : (self.rank + 1) * self.size]
        self.shard = nn.Parameter(mine, requires_grad=self.trainable)
        self._grads: Tensor | None = None
        self._missing = set(range(len(self.params)))

    def _part(self, flat: Tensor, i: int) -> Tensor:
        """Parameter `i`, where it lies in a flat vector."""
        return flat[self.starts[i] : self.starts[i] + math.prod(self.shapes[i])].view(self.shapes[i])

    def split_(self) -> None:
        """Give the shard memory of its own, and free the whole."""
        self.shard.data = self.shard.detach().clone()
        self.free()

    def gather(self) -> None:
        """Fill the whole from all shards, if it is freed: each parameter has its values again."""
        memory = self.whole.untyped_storage()
        if memory.nbytes() == 0 < self.whole.nbytes:
            memory.resize_(self.whole.nbytes)  # what autograd saved looks at this memory: it is filled again as well
            self.publish()
            for i, p in enumerate(self.params):
                p.data = self._part(self.whole, i)

    def publish(self) -> None:
        """Send this rank's shard to all ranks, and theirs here."""
        dist.all_gather_single(self.whole, self.shard.detach(), group=self.group)

    def free(self) -> None:
        """Give the memory of the whole back; to compute with a freed parameter is an error, not garbage."""
        for p in self.params:
            p.data = self.whole.new_empty(0)
        self.whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def collect(self, i: int) -> bool:
        """Move the gradient of parameter `i` to its place in a flat vector; True when no other is missing."""
        p = self.params[i]
        if self._grads is None:
            self._grads = torch.zeros_like(self.whole)
        self._part(self._grads, i).add_(p.grad)
        p.grad = None
        self._missing.discard(i)
        return not self._missing

    @torch.no_grad()
    def reduce(self) -> None:
        """Add the mean over the ranks of the collected gradients to `shard.grad`, and free them."""
        if self._grads is None:
            return
        mean = _reduce_scatter_(self._grads, self.group).div_(self.ranks)
        self.shard.grad = mean if self.shard.grad is None else self.shard.grad.add_(mean)
        self._grads, self._missing = None, set(range(len(self.params)))


class Sharded:
    """Data parallelism over `group` with sharded states: call `model`, `backward()`, then `step()` of this.

    `optimizer`: a function from the list of shards (flat parameters) to their optimizer; its rule must treat each
    number alone, which all of `optim`'s but Muon do.  `stage`: 1, 2 or 3.  `units`: the modules that are gathered and
    reduced as one, by default the elements of every nn.Sequential and nn.ModuleList.  What lies outside of them, or in
    two of them (tied weights), belongs to the root: its bucket stays whole from the model's forward to its last
    gradient.  Rank 0's parameters are sent to all.  Each microbatch adds to the gradients; `step` uses and frees them.

    Collectives run in the order of the backward pass, so all ranks must use the same parameters.  If some parameters
    of a bucket get no gradient, theirs counts as 0.  Nothing overlaps with computing; there is no prefetch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        stage: int,
        units: Iterable[nn.Module] | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        if stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {stage!r}")
        self.model, self.stage, self.group = model, stage, group
        if next(model.parameters(), None) is None:
            raise ValueError(f"model must have parameters, got {type(model).__name__} without any")
        owners = _owners(model, _default_units(model) if units is None else list(units))
        self._units = {unit: [Bucket(named, group) for named in owned] for unit, owned in owners.items()}
        self.buckets = [bucket for buckets in self._units.values() for bucket in buckets]
        self.optimizer = optimizer([bucket.shard for bucket in self.buckets if bucket.trainable])
        self._backward = False
        for bucket in self.buckets:
            for i, p in enumerate(bucket.params if bucket.trainable else ()):
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket, i=i: self._arrived(bucket, i))
        if stage == 3:
            for unit, buckets in self._units.items():
                unit.register_forward_pre_hook(lambda *_, buckets=buckets: _gather(buckets))
                unit.register_forward_hook(self._after_forward, with_kwargs=True)
            for bucket in self.buckets:
                bucket.split_()

    def step(self, *, clip_norm: float | None = None) -> float | None:
        """Take one step with the mean of the ranks' gradients and forget them.

        With `clip_norm`, gradients whose norm over all parameters of all ranks is larger are scaled down to it, as
        torch.nn.utils.clip_grad_norm_ does; the norm before that comes back.
        """
        for bucket in self.buckets:
            bucket.reduce()
        norm = None if clip_norm is None else self._clip_(clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.refresh([bucket for bucket in self.buckets if bucket.trainable])
        return norm

    def refresh(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Bring changed shards into the model: at once (stages 1 and 2), or when they are next gathered (3)."""
        for bucket in self.buckets if buckets is None else buckets:
            if self.stage == 3:
                bucket.free()
            else:
                bucket.publish()

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state, a copy, on every rank; all ranks call it together."""
        whole = {}
        for bucket in self.buckets:
            bucket.gather()
            whole |= {id(p): p.detach().clone() for p in bucket.params}
            if self.stage == 3:
                bucket.free()
        state = self.model.state_dict(keep_vars=True)
        return {name: whole[id(t)] if id(t) in whole else t.detach().clone() for name, t in state.items()}

    @torch.no_grad()
    def _clip_(self, limit: float) -> float:
        grads = [b.shard.grad for b in self.buckets if b.shard.grad is not None]
        none = torch.zeros((), dtype=torch.float64, device=self.buckets[0].shard.device)
        squares = sum((g.double().square().sum() for g in grads), none)
        dist.all_reduce(squares, group=self.group)  # each number of each parameter lies on one rank only
        norm = squares.sqrt().item()
        share = min(1.0, limit / (norm + 1e-6))
        for g in grads if share < 1 else ():
            g.mul_(share)
        return norm

    def _arrived(self, bucket: Bucket, i: int) -> None:
        self._at_end_of_backward()
        if bucket.collect(i) and self.stage > 1:
            self._finish(bucket)

    def _finish(self, bucket: Bucket) -> None:
        if self.stage == 3:
            bucket.free()
        bucket.reduce()

    def _after_forward(self, unit: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Free the unit, and have it gathered again before its backward pass.

        A parameter has its gradient only when all that used it has gone backward, so a trainable bucket can go then;
        a frozen one when the unit's inputs have their gradients.
        """
        buckets = self._units[unit]
        waiting = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if unit is not self.model or not waiting:
            for bucket in buckets:
                bucket.free()
        for t in waiting:
            t.register_hook(lambda _: (self._at_end_of_backward(), _gather(buckets), None)[-1])
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        frozen = [bucket for bucket in buckets if not bucket.trainable]
        if waiting and inputs and frozen:
            register_multi_grad_hook(inputs, lambda _: [bucket.free() for bucket in frozen])

    def _at_end_of_backward(self) -> None:
        """Have what is left over cleared away when this backward pass ends: frozen and unused parameters."""
        if self.stage > 1 and not self._backward:
            self._backward = True
            Variable._execution_engine.queue_callback(self._clear)

    def _clear(self) -> None:
        self._backward = False
        for bucket in self.buckets:
            self._finish(bucket)


def _reduce_scatter_(flat: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of the sum over the ranks."""
    if flat.device.type == "cpu":  # Gloo's own sends twice as much: it is an all-reduce, of which it keeps a part
        return reduce_scatter_(flat, group=group).clone()
    mine = flat.new_empty(len(flat) // dist.get_world_size(group))
    dist.reduce_scatter_single(mine, flat, group=group)
    return mine


def _gather(buckets: Sequence[Bucket]) -> None:
    for bucket in buckets:
        bucket.gather()


def _default_units(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules."""
    found = []
    for child in model.children():
        is_list = isinstance(child, nn.Sequential | nn.ModuleList)
        found += list(child) if is_list else _default_units(child)
    return found


def _owners(model: nn.Module, units: Sequence[nn.Module]) -> dict[nn.Module, list[dict[str, nn.Parameter]]]:
    """The named parameters of each unit and of the root, apart by type and by whether they are trained."""
    inside = {unit: set(unit.parameters()) for unit in units}
    for unit in units:
        if unit is model or any(part in inside for part in list(unit.modules())[1:]):
            got = ", ".join(type(unit).__name__ for unit in units)
            raise ValueError(f"units must be parts of the model, none inside another, got {got}")
    owners: dict[nn.Module, dict[Any, dict[str, nn.Parameter]]] = {model: {}, **{unit: {} for unit in units}}
    for name, p in model.named_parameters():
        holders = [unit for unit in units if p in inside[unit]]
        owner = holders[0] if len(holders) == 1 else model
        owners[owner].setdefault((p.dtype, p.requires_grad), {})[name] = p
    return {unit: list(kinds.values()) for unit, kinds in owners.items()}
