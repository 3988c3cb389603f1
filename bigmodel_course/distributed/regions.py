"""Where tensor parallelism crosses between ranks: five operators with their gradients, and how a tensor is cut.

Forward and backward of an operator are two different collectives.  Where every rank needs the same input, the
gradients of the ranks add up; where the ranks' outputs add up, each needs the same gradient.  So `copy_to` and
`reduce_from` are each other's backward (f and g of Shoeybi et al. 2019, arXiv 1909.08053, section 3), and so are
`gather_sequence` and `scatter_sequence` (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2).

Shape suffixes: B batch, T tokens, C width.  The sequence is dimension 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Cut",
    "copy_to",
    "gather_sequence",
    "reduce_from",
    "scatter_sequence",
    "share",
    "split_sequence",
]

Group = dist.ProcessGroup | None
Collective = Callable[[Tensor, Group], Tensor]


def copy_to(x: Tensor, group: Group = None) -> Tensor:
    """`x` as it is; backward sums the ranks' gradients, for each rank uses `x` for another part of the work.

    The same holds for a parameter that every rank has a copy of and uses on its own tokens.
    """
    return _Cross.apply(x, _same, _sum, group)


def reduce_from(x: Tensor, group: Group = None) -> Tensor:
    """The sum of the ranks' `x`; backward hands the gradient, the same on every rank, on as it is."""
    return _Cross.apply(x, _sum, _same, group)


def gather_sequence(x_BTC: Tensor, group: Group = None) -> Tensor:
    """All tokens from each rank's own [B, T / n, C]; backward sums the ranks' gradients, and keeps the own tokens'."""
    return _Cross.apply(x_BTC, _gather, _sum_own, group)


def scatter_sequence(x_BTC: Tensor, group: Group = None) -> Tensor:
    """The sum of the ranks' `x_BTC`, of which each keeps its own tokens; backward gathers the gradients of all."""
    return _Cross.apply(x_BTC, _sum_own, _gather, group)


def split_sequence(x_BTC: Tensor, group: Group = None) -> Tensor:
    """This rank's own tokens of what every rank has; backward gathers the gradients of all."""
    return _Cross.apply(x_BTC, _own, _gather, group)


def share(length: int, group: Group = None, *, rank: int | None = None) -> tuple[int, int]:
    """First and one past the last of `length` things that belong to this rank (or to `rank`).

    Shares differ by one at most; the earlier ranks have the larger ones, as torch.tensor_split cuts.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group) if rank is None else rank
    size, more = divmod(length, ranks)
    return rank * size + min(rank, more), (rank + 1) * size + min(rank + 1, more)


class Cut(NamedTuple):
    """How a tensor lies over the ranks: along `dim`, `length` long, in `parts` blocks, each rank its share of each.

    A packed matrix of queries, keys and values has three parts.
    """

    dim: int
    length: int
    parts: int = 1

    def of(self, whole: Tensor, group: Group = None) -> Tensor:
        """This rank's share of `whole`, in memory of its own."""
        first, last = share(self.length // self.parts, group)
        blocks = whole.detach().unflatten(self.dim, (self.parts, -1))
        return blocks.narrow(self.dim + 1, first, last - first).flatten(self.dim, self.dim + 1).clone()

    def join(self, mine: Tensor, group: Group = None) -> Tensor:
        """The whole from every rank's share, on every rank."""
        pieces = []
        for rank in range(dist.get_world_size(group)):  # one at a time: shares may differ in size
            first, last = share(self.length // self.parts, group, rank=rank)
            shape = list(mine.shape)
            shape[self.dim] = self.parts * (last - first)
            own = rank == dist.get_rank(group)
            piece = mine.detach().clone(memory_format=torch.contiguous_format) if own else mine.new_empty(shape)
            dist.broadcast(piece, group=group, group_src=rank)
            pieces.append(piece.unflatten(self.dim, (self.parts, -1)))
        return torch.cat(pieces, self.dim + 1).flatten(self.dim, self.dim + 1)


class _Cross(torch.autograd.Function):
    """`there` on the way forward, `back` on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Collective, back: Collective, group: Group) -> Tensor:
        ctx.back, ctx.group = back, group
        return there(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.back(grad, ctx.group), None, None, None


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gather(x_BTC: Tensor, group: Group) -> Tensor:
    parts = [torch.empty_like(x_BTC, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x_BTC.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _parts(x_BTC: Tensor, group: Group) -> list[Tensor]:
    ranks = dist.get_world_size(group)
    if x_BTC.ndim < 2 or x_BTC.shape[1] % ranks:
        raise ValueError(f"need a sequence that {ranks} ranks divide, in dimension 1, got {list(x_BTC.shape)}")
    return [part.contiguous() for part in x_BTC.chunk(ranks, dim=1)]


def _sum_own(x_BTC: Tensor, group: Group) -> Tensor:
    parts = _parts(x_BTC, group)
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


def _own(x_BTC: Tensor, group: Group) -> Tensor:
    return _parts(x_BTC, group)[dist.get_rank(group)].clone()
