"""How many bytes of activations are held for backward passes that have not run yet."""

from types import TracebackType
from typing import Self

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["ActivationMeter"]


class ActivationMeter:
    """Counts, while its context is open, the bytes that autograd keeps: `held` now and `peak` at most.

    A storage counts once however many operations keep it, and not at all where it belongs to a parameter of `modules`.
    It is given back when the backward pass has used it, and the count falls.
    """

    def __init__(self, *modules: nn.Module):
        self._own = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._users: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor)
        self.held = self.peak = 0

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._hooks.__exit__(kind, error, trace)

    def _add(self, address: int, size: int) -> None:
        users = self._users.get(address, 0)
        self._users[address] = users + 1
        if not users and address not in self._own:
            self.held += size
            self.peak = max(self.peak, self.held)

    def _drop(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.held -= size if address not in self._own else 0


class _Kept:
    """A saved tensor that tells its meter when autograd lets it go."""

    def __init__(self, meter: ActivationMeter, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.tensor, self._meter = tensor, meter
        self._key = storage.data_ptr(), storage.nbytes()
        meter._add(*self._key)

    def __del__(self) -> None:
        self._meter._drop(*self._key)
