"""A GPT cut into stages for a pipeline, and put together again.

A tied table stands in the first stage as embedding and in the last as head.  On two ranks these are two copies: they
start equal, and each gets a share of the gradient.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_course.costs import block_ranges
from bigmodel_course.models import GPT

__all__ = ["GPTStage", "join_states", "split_gpt", "sum_tied_"]


class GPTStage(nn.Module):
    """Some consecutive blocks of a GPT, after its embedding in the first stage, before its head in the last.

    Tokens [B, T] go into the first stage, scores [B, T, V] come out of the last; between them x [B, T, C].  The names
    of the parameters are those of the whole model, with which a stage shares its modules.
    """

    def __init__(self, gpt: GPT, blocks: range, *, own_table: bool = False):
        super().__init__()
        self.first, self.last = blocks.start == 0, blocks.stop == len(gpt.blocks)
        self.tied = gpt.head is None
        self.positions = gpt.positions if self.first else None
        self.tokens = gpt.tokens if self.first or (self.last and self.tied) else None
        if own_table and self.tokens is not None and not self.first:
            self.tokens = copy.deepcopy(gpt.tokens)
        self.blocks = nn.ModuleDict({str(i): gpt.blocks[i] for i in blocks})
        self.norm, self.head = (gpt.norm, gpt.head) if self.last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """What the whole model does between the stage's first layer and its last."""
        if self.first:
            x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x)
        if not self.last:
            return x
        x = self.norm(x)
        return F.linear(x, self.tokens.weight) if self.tied else self.head(x)


def split_gpt(gpt: GPT, ranks: int, chunks: int = 1) -> list[list[GPTStage]]:
    """The stages of each rank: `split_gpt(gpt, ranks)[rank]` are the modules of its chunks.

    The stages share the modules of `gpt`, which is left as it is; only the last rank's copy of a tied table is new.
    Cuts are those of `costs.block_ranges`.
    """
    if not isinstance(gpt, GPT):
        raise TypeError(f"gpt must be a models.GPT, got {type(gpt).__name__}")
    cut = block_ranges(len(gpt.blocks), ranks * chunks)
    stages = [GPTStage(gpt, blocks, own_table=ranks > 1) for blocks in cut]
    return [stages[rank::ranks] for rank in range(ranks)]


def sum_tied_(stages: Sequence[GPTStage], *, group: dist.ProcessGroup | None = None) -> None:
    """Add up the gradients of a tied table's two copies, on the first rank and the last.

    Each rank calls it **once** before the optimizer's step, after all that adds to the gradients; a second call would
    count the other's share twice.  Both copies then take the same step and stay equal.  Nothing is done where the model
    is not tied, the table is frozen, or one rank holds both ends.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    end = next((stage for stage in stages if stage.tokens is not None), None)
    if ranks == 1 or end is None or not end.tied or end.tokens.weight.grad is None:
        return
    mine, peer = end.tokens.weight.grad, ranks - 1 - rank
    theirs = torch.empty_like(mine)
    both = [(dist.isend, mine), (dist.irecv, theirs)]
    for work in dist.batch_isend_irecv([dist.P2POp(do, x, group=group, group_peer=peer) for do, x in both]):
        work.wait()
    mine += theirs


def join_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole model's state dict from those of all stages; ValueError where copies of one tensor differ."""
    whole: dict[str, Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            if name in whole and not torch.equal(whole[name], tensor):
                apart = (whole[name] - tensor).abs().max().item()
                raise ValueError(f"the copies of {name!r} differ by up to {apart:.3g}: were their gradients summed?")
            whole[name] = tensor
    return whole
