"""Loss scaling for 16-bit floats (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

float16 holds nothing smaller than 6e-8: small gradients become 0.  A loss that is multiplied by S has gradients that
are S times as large; they are divided by S before the step.  S itself is found by trying.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LossScale"]


@dataclass
class LossScale:
    """A scale that halves when a gradient overflows and doubles after `patience` steps without an overflow.

    Call `(loss * scale.value).backward()`, then `unscale_` with all gradients, step only if that was True, and `update`
    with its answer.  The numbers are those of torch.amp.GradScaler.
    """

    value: float = 2.0**16
    patience: int = 2000
    good: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.value < float("inf"):
            raise ValueError(f"value must be a scale above 0, got {self.value!r}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 step, got {self.patience!r}")

    @torch.no_grad()
    def unscale_(self, grads: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> bool:
        """Divide the gradients by the scale; True when all are finite, on every rank of `group` if there are ranks."""
        grads = list(grads)
        for g in grads:
            g.mul_(1 / self.value)
        finite = torch.ones(1, device=grads[0].device if grads else "cpu")
        for g in grads:
            finite *= g.isfinite().all()
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)  # a step that one rank skips, all skip
        return bool(finite)

    def update(self, finite: bool) -> None:
        """Count a good step, or halve after an overflow."""
        if not finite:
            self.value, self.good = self.value / 2, 0
        elif self.good + 1 == self.patience:
            self.value, self.good = self.value * 2, 0
        else:
            self.good += 1
