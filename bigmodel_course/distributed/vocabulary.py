"""The two ends of a tensor-parallel language model: each rank has its share of the vocabulary.

The embedding looks up what it holds and the ranks add up.  The loss never gathers the scores: for each token the ranks
exchange three numbers, the largest score, the sum of exponentials and the score of the target (Shoeybi et al. 2019,
arXiv 1909.08053, section 3).  The vocabulary need not be divisible: shares differ by one row at most.

Shape suffixes: B batch, T tokens, V this rank's share of the vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_course.distributed.regions import Cut, Group, reduce_from, share

__all__ = ["VocabularyEmbedding", "vocabulary_cross_entropy"]


class VocabularyEmbedding(nn.Module):
    """Rows of `embedding`'s table, cut over the ranks: tokens [B, T] -> vectors [B, T, C], the same on every rank."""

    def __init__(self, embedding: nn.Embedding, group: Group = None):
        super().__init__()
        self.vocabulary, ranks = embedding.num_embeddings, dist.get_world_size(group)
        if self.vocabulary < ranks:
            raise ValueError(f"need at least one row a rank, got a vocabulary of {self.vocabulary} and {ranks} ranks")
        self.group, self.cuts = group, {"weight": Cut(0, self.vocabulary)}
        self.weight = nn.Parameter(self.cuts["weight"].of(embedding.weight, group), embedding.weight.requires_grad)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Each rank looks up its own rows and adds nothing for the others'."""
        _check_range("tokens", tokens_BT, self.vocabulary)
        places_BT, foreign_BT = _own_places(tokens_BT, self.vocabulary, self.group)
        found_BTC = F.embedding(places_BT, self.weight).masked_fill(foreign_BT[..., None], 0.0)
        return reduce_from(found_BTC, self.group)


def vocabulary_cross_entropy(
    logits_BTV: Tensor,
    targets_BT: Tensor,
    vocabulary: int,
    *,
    group: Group = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of scores that lie over the ranks, as F.cross_entropy gives it for whole ones, on every rank.

    `logits_BTV`: this rank's share of the last dimension (any dimensions before it); `targets_BT`: the same on every
    rank, `ignore_index` where there is none; `vocabulary`: all scores of a token together.  `reduction`: "mean" over
    the targets that are not ignored, "sum" or "none".  Backward needs no communication.
    """
    _check_loss(logits_BTV, targets_BT, vocabulary, group, reduction)
    kept_BT = targets_BT != ignore_index
    targets_BT = targets_BT.where(kept_BT, 0)
    _check_range("targets", targets_BT, vocabulary)
    shifted_BTV = logits_BTV - _largest(logits_BTV, group)[..., None]  # no exponential overflows
    places_BT, foreign_BT = _own_places(targets_BT, vocabulary, group)
    target_BT = shifted_BTV.gather(-1, places_BT[..., None])[..., 0].masked_fill(foreign_BT, 0.0)
    total_BT, target_BT = reduce_from(torch.stack([shifted_BTV.exp().sum(-1), target_BT]), group)
    loss_BT = (total_BT.log() - target_BT).masked_fill(~kept_BT, 0.0)
    if reduction == "none":
        return loss_BT
    return loss_BT.sum() / kept_BT.sum() if reduction == "mean" else loss_BT.sum()


def _largest(logits_BTV: Tensor, group: Group) -> Tensor:
    """The largest of all ranks' scores; a constant for the gradient, since it cancels."""
    largest_BT = logits_BTV.detach().amax(-1)
    dist.all_reduce(largest_BT, dist.ReduceOp.MAX, group=group)
    return largest_BT


def _own_places(tokens_BT: Tensor, vocabulary: int, group: Group) -> tuple[Tensor, Tensor]:
    """Where each token stands in this rank's share, and which do not (they get place 0)."""
    first, last = share(vocabulary, group)
    foreign_BT = (tokens_BT < first) | (tokens_BT >= last)
    return (tokens_BT - first).masked_fill(foreign_BT, 0), foreign_BT


def _check_range(name: str, tokens_BT: Tensor, vocabulary: int) -> None:
    """A token that no rank owns would count as zeros, silently."""
    if tokens_BT.numel() and not 0 <= tokens_BT.min() <= tokens_BT.max() < vocabulary:
        low, high = tokens_BT.min().item(), tokens_BT.max().item()
        raise ValueError(f"{name} must lie in 0 … {vocabulary - 1}, got {low} … {high}")


def _check_loss(logits_BTV: Tensor, targets_BT: Tensor, vocabulary: int, group: Group, reduction: str) -> None:
    first, last = share(vocabulary, group)
    if logits_BTV.shape != (*targets_BT.shape, last - first):
        want, got = [*targets_BT.shape, last - first], list(logits_BTV.shape)
        raise ValueError(f"logits must hold this rank's share of {vocabulary} scores, {want}, got {got}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
