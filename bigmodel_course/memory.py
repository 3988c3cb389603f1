"""The bytes that tensors really hold: counted from the memory behind them, now and at the worst moment."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Count the memory of every tensor that an operation reads or makes inside `with LiveBytes() as live:`.

    `live.now()`: bytes that are alive at this moment; views share their memory, which counts once.  `live.peak`: the
    most after any operation so far; set it to 0 to start again.  What a kernel allocates and frees inside one operation
    is not seen, nor what Python, libraries and the allocator keep beside the tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def now(self) -> int:
        """Bytes of all tensors seen so far that are still alive."""
        return sum(memory.nbytes() for ref in list(self._seen.values()) if (memory := ref()) is not None)

    def add(self, *tensors: Any) -> None:
        """Count tensors, in whatever lists and dicts they stand, that no operation has touched yet."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                memory = tensor.untyped_storage()
                if id(memory) not in self._seen:
                    self._seen[id(memory)] = weakref.ref(memory, partial(self._forget, id(memory)))

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._seen.pop(key, None)

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(args, kwargs, out)
        self.peak = max(self.peak, self.now())
        return out
