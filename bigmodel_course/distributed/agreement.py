"""Do the ranks agree on their next collective? Gloo itself may hang, raise or, worse, return something wrong."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Agreement"]

KINDS = ("all", "reduce", "broadcast", "gather", "scatter", "barrier")  # send and recv are no collectives
SAME_SHAPES = ("allreduce", "all_reduce", "allgather", "all_gather", "reduce", "broadcast")  # the others may differ
INPUTS = ("input_tensors", "input_tensor", "input_list", "tensors", "input", "inputs")


class Agreement(TorchDispatchMode):
    """While it is on, each collective is told to the group's other ranks first, and a difference raises on all of them.

    It sees every collective that goes through torch's dispatcher, whoever calls it (DDP and FSDP too), and leaves send
    and recv alone. Each one costs as many messages to `store` as the group has ranks. Raises RuntimeError.
    """

    def __init__(self, store: dist.Store):
        super().__init__()
        self.store = dist.PrefixStore("agreement", store)
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compare first, then do it."""
        package, _, name = func._schema.name.partition("::")
        name = name.strip("_")
        if package in ("c10d", "_c10d_functional") and name.startswith(KINDS):
            values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            self._compare(_group(values), _described(name, values))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        """Tell the others that no collective follows: whoever still waits for one learns it at once."""
        if error[0] is None:
            self._tell(dist.group.WORLD, "nothing more: it has finished")
        super().__exit__(*error)

    def _tell(self, group: dist.ProcessGroup, call: str) -> str:
        place = f"{group.group_name}/{self.calls[group.group_name]}"
        self.store.set(f"{place}/{group.rank()}", call)
        return place

    def _compare(self, group: dist.ProcessGroup, call: str) -> None:
        place = self._tell(group, call)
        self.calls[group.group_name] += 1
        calls = [self.store.get(f"{place}/{rank}").decode() for rank in range(group.size())]
        if len(set(calls)) > 1:
            ranks = dist.get_process_group_ranks(group)
            told = "".join(f"\n  rank {rank}: {each}" for rank, each in zip(ranks, calls, strict=True))
            number = self.calls[group.group_name]
            raise RuntimeError(f"the ranks disagree on collective {number} of their group:{told}")


def _group(values: dict[str, Any]) -> dist.ProcessGroup:
    if "group_name" in values:
        return dist.distributed_c10d._resolve_process_group(values["group_name"])
    return dist.ProcessGroup.unbox(values["process_group"])


def _described(name: str, values: dict[str, Any]) -> str:
    """Such as "allreduce of float32 [3]", "broadcast of float32 [3], root_rank 0"."""
    words = name
    if name.startswith(SAME_SHAPES):
        inputs = next(values[key] for key in INPUTS if key in values)
        tensors = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
        words += " of " + ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
    details = {key: values.get(key) for key in ("root_rank", "src", "reduce_op")}
    return words + "".join(f", {key} {value}" for key, value in details.items() if isinstance(value, int | str))
