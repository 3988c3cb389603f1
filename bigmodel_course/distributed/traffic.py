"""What this rank sends, group by group: counted where torch hands a collective to its backend, whoever asked for it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel_course.costs import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes

__all__ = ["Traffic"]


class Traffic(TorchDispatchMode):
    """While it is on, `sent[name]` grows by the bytes that this rank sends in `groups[name]`.

    A send counts its tensor; an all-reduce, all-gather or reduce-scatter what it takes on a ring, as `costs` says.
    Single numbers, such as a loss, and all other collectives are left out.  In a backward pass it sees what the calling
    thread does: on a CPU all of it.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]):
        super().__init__()
        self.names = {group.group_name: name for name, group in groups.items()}
        self.sent: Counter[str] = Counter(dict.fromkeys(groups, 0))

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count, then do it."""
        package, _, kind = call._schema.name.partition("::")
        if package == "c10d":
            values = {argument.name: value for argument, value in zip(call._schema.arguments, args, strict=False)}
            group = dist.ProcessGroup.unbox(values["process_group"]) if "process_group" in values else None
            if group and group.group_name in self.names:
                self.sent[self.names[group.group_name]] += _bytes(kind.strip("_"), values, group)
        return call(*args, **(kwargs or {}))


def _bytes(kind: str, values: Mapping[str, Any], group: dist.ProcessGroup) -> int:
    """What this rank sends in one call."""
    inputs = next(values[key] for key in ("input_tensors", "input_tensor", "tensors", "tensor") if key in values)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    numbers, rank, ranks = sum(x.numel() for x in tensors), group.rank(), group.size()
    each = tensors[0].element_size() if tensors else 0
    if numbers <= 1:
        return 0
    if kind == "send":
        return numbers * each
    if kind == "allreduce":
        return all_reduce_bytes(numbers, ranks, each)[rank]
    if kind in ("allgather", "allgather_base"):
        return all_gather_bytes([numbers] * ranks, each)[rank]
    if kind in ("reduce_scatter", "reduce_scatter_base"):
        return reduce_scatter_bytes(numbers, ranks, each)[rank]
    return 0
