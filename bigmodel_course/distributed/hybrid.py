"""Data, tensor and pipeline parallelism at once: a mesh of ranks, one group an axis, one GPT over all of them.

Along the pipeline axis the blocks are divided, along the tensor axis the matrices of a block, along the data axis the
sequences of a batch.  Each rank takes part in one group of each axis, and the three methods do not know of each other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bigmodel_course.costs import Mesh, block_ranges
from bigmodel_course.distributed.averaging import average_gradients_
from bigmodel_course.distributed.pipeline import Pipeline
from bigmodel_course.distributed.pipeline_schedules import Schedule, one_f_one_b
from bigmodel_course.distributed.pipeline_stages import GPTStage, join_states, sum_tied_
from bigmodel_course.distributed.tensor_parallel import parallelize_, whole_state_dict
from bigmodel_course.distributed.vocabulary import vocabulary_cross_entropy
from bigmodel_course.models import GPT

__all__ = ["Groups", "HybridGPT", "Mesh", "make_groups"]


class Groups(NamedTuple):
    """This rank's group along each axis of a mesh."""

    data: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup


def make_groups(mesh: Mesh) -> Groups:
    """One process group for each line of the mesh; every rank makes all of them, in the same order, and keeps its own.

    torch's `init_device_mesh` makes the same ones.  ValueError where the mesh is not as large as the default group.
    """
    if mesh.ranks != dist.get_world_size():
        shape = f"{mesh.data} x {mesh.tensor} x {mesh.pipeline}"
        raise ValueError(f"mesh must have {dist.get_world_size()} ranks, as many as there are, got {shape}")
    own = {}
    for axis in Groups._fields:
        lines = {tuple(mesh.members(axis, rank)) for rank in range(mesh.ranks)}
        for line in sorted(lines):
            group = dist.new_group(list(line))
            if dist.get_rank() in line:
                own[axis] = group
    return Groups(**own)


class HybridGPT:
    """This rank's part of `gpt`, which every rank builds from the same seed; it trains as the whole one would.

    `stage` is the module to optimize: some blocks, of which this rank has a share of each matrix.  A `schedule` is
    asked with the number of stages and of microbatches.  `sequence` is tensor_parallel's.  `gpt` is used up.
    ValueError where the blocks do not fill the stages, or the tensor axis does not divide the heads.
    """

    def __init__(
        self,
        gpt: GPT,
        mesh: Mesh,
        *,
        microbatches: int = 1,
        schedule: Callable[[int, int], Schedule] = one_f_one_b,
        sequence: bool = False,
    ):
        self.mesh, self.groups, self.microbatches = mesh, make_groups(mesh), microbatches
        self.place = mesh.place(dist.get_rank())
        blocks = block_ranges(len(gpt.blocks), mesh.pipeline)[self.place["pipeline"]]
        if mesh.tensor > 1:
            parallelize_(gpt, self.groups.tensor, sequence=sequence)
        self.stage = GPTStage(gpt, blocks)  # a tied table needs no copy: the other one is in another process
        loss = partial(_loss, vocabulary=gpt.config.vocabulary, group=self.groups.tensor if mesh.tensor > 1 else None)
        steps = schedule(mesh.pipeline, microbatches)
        self.pipeline = Pipeline(steps, [self.stage], loss, group=self.groups.pipeline)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Add the gradients of the whole batch's mean loss, and return that loss, on every rank.

        Every rank is given the whole batch and takes its own sequences.  Call it once a step, on gradients that are
        None or 0: what is there already would be averaged again.
        """
        tokens, targets = (self._own(each) for each in (tokens_BT, targets_BT))
        loss = self.pipeline.step(tokens, targets)
        sum_tied_([self.stage], group=self.groups.pipeline)
        if self.mesh.data > 1:
            average_gradients_(self.stage, self.groups.data)
            dist.all_reduce(loss.div_(self.mesh.data), group=self.groups.data)
        return loss

    def whole_state_dict(self) -> dict[str, Tensor]:
        """The whole model's, on every rank; all ranks must call it."""
        states: list[Any] = [None] * self.mesh.pipeline
        dist.all_gather_object(states, whole_state_dict(self.stage), group=self.groups.pipeline)
        return join_states(states)

    def _own(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        """This data rank's sequences, one tensor a microbatch."""
        parts = self.mesh.data * self.microbatches
        if len(x_BT) % parts:
            raise ValueError(f"need a batch that data * microbatches = {parts} divides, got {len(x_BT)} sequences")
        return x_BT.chunk(self.mesh.data)[self.place["data"]].chunk(self.microbatches)


def _loss(scores_BTV: Tensor, targets_BT: Tensor, *, vocabulary: int, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return F.cross_entropy(scores_BTV.flatten(0, 1), targets_BT.flatten())
    return vocabulary_cross_entropy(scores_BTV, targets_BT, vocabulary, group=group)
