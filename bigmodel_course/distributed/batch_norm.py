"""Batch normalization over the batch of all ranks: each sees the mean and variance of the whole.

A plain BatchNorm normalizes each rank's part by itself, so the model depends on how many ranks there are.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SyncBatchNorm", "synchronize_batch_norm"]

Group = dist.ProcessGroup | None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d and 3d whose statistics, in training, are those of all ranks' examples together.

    x [N, C, ...]; N may differ between the ranks and may be 0.  The running variance is the unbiased one, the momentum
    and the keys of `state_dict` are torch's.  One all-gather of 2C + 1 numbers forward, one all-reduce of 2C backward.
    In eval mode nothing is sent.  (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1.)
    ValueError when all ranks together hold one value a channel.
    """

    def __init__(self, num_features: int, *, group: Group = None, **options: Any):
        super().__init__(num_features, **options)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalized, scaled and shifted: the shape stays."""
        self._check_input_dim(x)
        if not (self.training or self.running_mean is None):
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        y, mean, variance, count = _Normalize.apply(x, self.eps, self.group)
        if self.training and self.track_running_stats:
            self._remember(mean, variance * count / (count - 1))
        if not self.affine:
            return y
        shape = [1, -1] + [1] * (x.ndim - 2)
        return y * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x must be [N, {self.num_features}, ...], got {list(x.shape)}")


class _Normalize(torch.autograd.Function):
    """x -> (x - mean) / sqrt(variance + eps) with the statistics of all ranks, and those statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: Group) -> tuple[Tensor, Tensor, Tensor, float]:
        mean, variance, count = _whole_statistics(x.double() if x.dtype == torch.float64 else x.float(), group)
        if count < 2:
            raise ValueError(f"need more than one value a channel over all ranks, got x {list(x.shape)} on this one")
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = (variance + eps).rsqrt()
        y = ((x - mean.view(shape)) * scale.view(shape)).to(x.dtype)
        ctx.save_for_backward(y, scale)
        ctx.count, ctx.group = count, group
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        y, scale = ctx.saved_tensors
        others, shape = [d for d in range(y.ndim) if d != 1], [1, -1] + [1] * (y.ndim - 2)
        # Each x moves the mean and the variance, and with them every rank's outputs: so their gradients are summed.
        sums = torch.stack([dy.to(scale.dtype).sum(others), (dy * y).to(scale.dtype).sum(others)])
        dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_y = (sums / ctx.count).view(2, *shape)
        return ((dy - mean_dy - y * mean_dy_y) * scale.view(shape)).to(dy.dtype), None, None


def _whole_statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance per channel over all ranks, and the values a channel.

    From each rank's own (Chan, Golub & LeVeque 1983): sums of squares alone would cancel.
    """
    others, n = [d for d in range(x.ndim) if d != 1], x.numel() // x.shape[1]
    mean = x.mean(others) if n else x.new_zeros(x.shape[1])
    square = (x - mean.view([1, -1] + [1] * (x.ndim - 2))).square().sum(others)
    mine = torch.cat([mean, square, mean.new_tensor([n])])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    c = x.shape[1]
    mean_RC, square_RC, n_R1 = torch.stack(every).split([c, c, 1], 1)
    count = n_R1.sum()
    whole = (n_R1 * mean_RC).sum(0) / count
    variance = (square_RC + n_R1 * (mean_RC - whole).square()).sum(0) / count
    return whole, variance, count.item()


def synchronize_batch_norm(module: nn.Module, group: Group = None) -> nn.Module:
    """The module with a SyncBatchNorm in place of each BatchNorm, which keeps its parameters and buffers.

    The children are replaced in `module` itself; use what comes back, for `module` may be a BatchNorm.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        options = {key: getattr(module, key) for key in ("eps", "momentum", "affine", "track_running_stats")}
        new = SyncBatchNorm(module.num_features, group=group, **options, device="meta")
        new._parameters, new._buffers = module._parameters, module._buffers  # the same tensors, an optimizer may hold
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, group))
    return module
