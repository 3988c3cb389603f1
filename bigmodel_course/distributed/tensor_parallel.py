"""Tensor parallelism: each rank has a part of every matrix, and all ranks work on the same tokens.

A matrix cut by columns, then an elementwise function or whole attention heads, then a matrix cut by rows: one sum over
the ranks at the end, one at the start of the way back (Shoeybi et al. 2019, arXiv 1909.08053, section 3).  With
`sequence`, what stands between such pairs (norms, residual stream) is cut by tokens (Korthikanti et al. 2022, arXiv
2205.05198, section 4.2.2); the gathered input of a column-cut matrix is kept, not gathered again.

Every rank builds the same whole model from the same seed, then cuts it.  Make the optimizer afterwards: elementwise
rules (SGD, Adam) work on a share as on the whole.  Feed every rank of the group the same tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from bigmodel_course.distributed.regions import (
    Cut,
    Group,
    copy_to,
    gather_sequence,
    reduce_from,
    scatter_sequence,
    split_sequence,
)
from bigmodel_course.distributed.vocabulary import VocabularyEmbedding
from bigmodel_course.models import GPT

__all__ = ["ColumnLinear", "RowLinear", "SequenceNorm", "clip_gradients_", "load_whole_", "parallelize_"]
__all__ += ["whole_state_dict", "whole_tensors"]

Operator = Callable[[Tensor, Group], Tensor]


class ColumnLinear(nn.Module):
    """`linear` cut by outputs: x [..., inputs], whole, -> this rank's outputs [..., outputs / n].

    Its weight is [outputs, inputs], so that the columns of the product are the rows of the weight.  `parts`: packed
    matrices, each of which is cut (3 for queries, keys and values; the rank then has whole heads of all three).
    With `sequence`, x holds this rank's own tokens and all are gathered first.
    """

    def __init__(self, linear: nn.Linear, *, parts: int = 1, group: Group = None, sequence: bool = False):
        super().__init__()
        self.group, self.sequence = group, sequence
        if parts < 1 or linear.out_features % parts:
            raise ValueError(f"parts must divide the {linear.out_features} outputs, got {parts=}")
        cut = Cut(0, linear.out_features, parts)
        self.cuts = {"weight": cut} if linear.bias is None else {"weight": cut, "bias": cut}
        self.weight = _parameter(linear.weight, cut, group)
        self.bias = None if linear.bias is None else _parameter(linear.bias, cut, group)

    def forward(self, x: Tensor) -> Tensor:
        """No sum forward; backward sums the gradient of x."""
        x = gather_sequence(x, self.group) if self.sequence else copy_to(x, self.group)
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """`linear` cut by inputs: this rank's x [..., inputs / n] -> the sum over the ranks [..., outputs].

    The bias is whole on every rank and added once, after the sum.  With `sequence`, each rank gets its own tokens'.
    """

    def __init__(self, linear: nn.Linear, *, group: Group = None, sequence: bool = False):
        super().__init__()
        self.group, self.sequence = group, sequence
        self.cuts = {"weight": Cut(1, linear.in_features)}
        self.weight = _parameter(linear.weight, self.cuts["weight"], group)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """One sum forward; none backward."""
        partial_sum = F.linear(x, self.weight)
        if not self.sequence:
            y, bias = reduce_from(partial_sum, self.group), self.bias
        else:
            y, bias = scatter_sequence(partial_sum, self.group), _replicated(self.bias, self.group)
        return y if bias is None else y + bias


class SequenceNorm(nn.Module):
    """`norm` (an nn.LayerNorm) on this rank's own tokens [B, T / n, C]; its gradients are summed over the ranks."""

    def __init__(self, norm: nn.LayerNorm, group: Group = None):
        super().__init__()
        self.group, self.eps = group, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Each token by itself, so that nothing is exchanged forward."""
        weight, bias = (_replicated(p, self.group) for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


def parallelize_(gpt: GPT, group: Group = None, *, sequence: bool = False) -> GPT:
    """Cut `gpt` over the ranks of `group`, in place, and return it; tied or untied, frozen stays frozen.

    It then gives this rank's share of the scores: tokens [B, T] -> [B, T, V / n], for `vocabulary_cross_entropy`.
    With `sequence`, T must be divisible by the number of ranks.  ValueError where they do not divide the heads.
    """
    if not isinstance(gpt, GPT) or isinstance(gpt.tokens, VocabularyEmbedding):
        raise TypeError(f"gpt must be a models.GPT that is still whole, got {type(gpt).__name__}")
    ranks = dist.get_world_size(group)
    if gpt.config.heads % ranks:
        raise ValueError(f"need heads that the ranks divide, got heads={gpt.config.heads} and {ranks} ranks")
    options = {"group": group, "sequence": sequence}
    gpt.tokens = VocabularyEmbedding(gpt.tokens, group)
    for block in gpt.blocks:
        block.attention.qkv = ColumnLinear(block.attention.qkv, parts=3, **options)
        block.attention.out = RowLinear(block.attention.out, **options)
        block.attention.heads //= ranks
        block.up, block.down = ColumnLinear(block.up, **options), RowLinear(block.down, **options)
        if sequence:
            block.norm1, block.norm2 = SequenceNorm(block.norm1, group), SequenceNorm(block.norm2, group)
    if sequence:
        gpt.blocks[0].register_forward_pre_hook(partial(_split_input, group=group))
        gpt.norm = SequenceNorm(gpt.norm, group)
    if gpt.head is not None:
        gpt.head = ColumnLinear(gpt.head, **options)
    else:  # the tied head is a bare product with the embedding's weight: what a column-cut matrix does first, we add
        gpt.norm.register_forward_hook(
            partial(_enter_head, enter=gather_sequence if sequence else copy_to, group=group)
        )
    return gpt


def whole_tensors(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From each rank's tensors by parameter name (gradients, an optimizer's moments) the whole ones, on every rank.

    Every rank of the group must call it with the same names.
    """
    cuts = dict(_cuts(model))
    return {
        name: cuts[name][0].join(mine, cuts[name][1]) if name in cuts else mine.detach().clone()
        for name, mine in named.items()
    }


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict that the model would have on one process; every rank of the group must call it."""
    return whole_tensors(model, model.state_dict())


@torch.no_grad()
def load_whole_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take this rank's share of a whole model's state_dict, saved on any number of ranks.

    ValueError, with nothing loaded, where names or shapes differ.
    """
    cuts, own = dict(_cuts(model)), model.state_dict()
    if own.keys() != state.keys():
        raise ValueError(f"state must have the model's names; they differ in {sorted(own.keys() ^ state.keys())}")
    for name, mine in own.items():
        want = list(mine.shape)
        if name in cuts:
            want[cuts[name][0].dim] = cuts[name][0].length
        if want != list(state[name].shape):
            raise ValueError(f"{name} of the whole model must be {want}, got {list(state[name].shape)}")
    for name, mine in own.items():
        mine.copy_(cuts[name][0].of(state[name], cuts[name][1]) if name in cuts else state[name])


@torch.no_grad()
def clip_gradients_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that the whole model's norm is at most `max_norm`; return the norm before.

    As torch.nn.utils.clip_grad_norm_ on one process.  Called on each rank's share it would use another norm on every
    rank, and the copies of replicated parameters would drift apart.
    """
    cuts, trained = dict(_cuts(model)), {name: p for name, p in model.named_parameters() if p.grad is not None}
    cut, replicated = ([p.grad for name, p in trained.items() if (name in cuts) == is_cut] for is_cut in (True, False))
    squares = get_total_norm(cut).square()
    for group in {group for _, group in cuts.values()}:
        dist.all_reduce(squares, group=group)  # shares add up; a replica counts once
    norm = (squares + get_total_norm(replicated).square()).sqrt()
    clip_grads_with_norm_(trained.values(), max_norm, norm)
    return norm


def _parameter(whole: nn.Parameter, cut: Cut, group: Group) -> nn.Parameter:
    return nn.Parameter(cut.of(whole, group), whole.requires_grad)


def _replicated(p: nn.Parameter | None, group: Group) -> Tensor | None:
    """A parameter that every rank uses on its own tokens: its gradient is the sum of the ranks'."""
    return None if p is None else copy_to(p, group)


def _split_input(block: nn.Module, args: tuple[Tensor], group: Group) -> Tensor:
    return split_sequence(args[0], group)


def _enter_head(norm: nn.Module, args: tuple[Tensor], y: Tensor, enter: Operator, group: Group) -> Tensor:
    return enter(y, group)


def _cuts(model: nn.Module) -> Iterator[tuple[str, tuple[Cut, Group]]]:
    """Each parameter that is cut: its name, how, and over which group."""
    for prefix, module in model.named_modules():
        for attribute, cut in getattr(module, "cuts", {}).items():
            yield f"{prefix}.{attribute}".lstrip("."), (cut, module.group)
