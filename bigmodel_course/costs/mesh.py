"""A mesh of ranks, data x tensor x pipeline: who stands where, and the bytes that each rank sends along each axis."""

from dataclasses import dataclass, replace
from math import prod

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.communication import all_reduce_bytes, chunk_lengths
from bigmodel_course.costs.layers import GPTConfig, Layer
from bigmodel_course.costs.pipeline import block_ranges
from bigmodel_course.costs.tensor_parallel import (
    Message,
    tensor_parallel_bytes,
    tensor_parallel_gpt,
    tensor_parallel_messages,
)

__all__ = ["Mesh", "mesh_bytes", "mesh_parameters"]

AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Mesh:
    """How many ranks each axis has; `order` names the axes from the outermost in.

    The last axis of `order` joins neighbours: ranks 0, 1, … differ in it first.  Tensor parallelism talks most, so it
    stands there, inside a node (Narayanan et al. 2021, arXiv 2104.04473, section 3).
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    order: tuple[str, ...] = AXES

    def __post_init__(self) -> None:
        at_least(1, data=self.data, tensor=self.tensor, pipeline=self.pipeline)
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order must name {', '.join(AXES)} once each, got {self.order}")

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.tensor * self.pipeline

    def place(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be from 0 to {self.ranks - 1}, got {rank}")
        return {axis: rank // self._stride(axis) % getattr(self, axis) for axis in AXES}

    def members(self, axis: str, rank: int) -> list[int]:
        """The ranks that differ from `rank` in `axis` only, itself among them: they form one group."""
        first = rank - self.place(rank)[axis] * self._stride(axis)
        return [first + i * self._stride(axis) for i in range(getattr(self, axis))]

    def crosses(self, axis: str, node: int) -> bool:
        """Does a group of `axis` reach beyond one node, if each `node` ranks in a row share one?"""
        at_least(1, node=node)
        return any(len({r // node for r in self.members(axis, rank)}) > 1 for rank in range(self.ranks))

    def _stride(self, axis: str) -> int:
        inner = self.order[self.order.index(axis) + 1 :]
        return prod(getattr(self, each) for each in inner)


def mesh_parameters(config: GPTConfig, mesh: Mesh, rank: int) -> int:
    """The numbers of a GPT that `rank` holds; a tied table stands in the first stage and, as a copy, in the last."""
    return sum(layer.parameters for layer in _stage(config, mesh, rank))


def mesh_bytes(
    config: GPTConfig,
    mesh: Mesh,
    rank: int,
    *,
    batch: int,
    microbatches: int = 1,
    tokens: int | None = None,
    bytes_each: int = 4,
) -> dict[str, int]:
    """The bytes that `rank` sends along each axis in one training step of distributed.hybrid, without sequence.

    `batch` sequences of all data ranks together; numbers of `bytes_each` bytes; all-reduces go around rings.  The
    few bytes of the loss itself and of the first step's shapes are left out.  Exact where `data` divides the length of
    every parameter that a rank holds.
    """
    at_least(1, batch=batch, microbatches=microbatches, bytes_each=bytes_each)
    if batch % (mesh.data * microbatches):
        raise ValueError(f"need a batch that data * microbatches = {mesh.data * microbatches} divides, got {batch=}")
    place, own = mesh.place(rank), batch // mesh.data
    first, last = place["pipeline"] == 0, place["pipeline"] == mesh.pipeline - 1
    messages = _messages(config, mesh, place["pipeline"], rows=own // microbatches, tokens=tokens)
    table = _vocabulary(config, mesh, rank) * config.width * (config.tied and mesh.pipeline > 1)
    stream = own * (config.context if tokens is None else tokens) * config.width
    return {
        "data": all_reduce_bytes(mesh_parameters(config, mesh, rank), mesh.data, bytes_each)[place["data"]],
        "tensor": microbatches * tensor_parallel_bytes(messages, mesh.tensor, bytes_each=bytes_each)[place["tensor"]],
        "pipeline": bytes_each * (stream * ((not first) + (not last)) + table * (first or last)),
    }


def _stage(config: GPTConfig, mesh: Mesh, rank: int) -> list[Layer]:
    """The layers that `rank` holds, cut by blocks and by columns."""
    place = mesh.place(rank)
    layers = tensor_parallel_gpt(config, mesh.tensor, rank=place["tensor"])
    embedding, *blocks, norm, head = layers
    cut, each = block_ranges(config.layers, mesh.pipeline)[place["pipeline"]], len(blocks) // config.layers
    if config.tied and mesh.pipeline > 1:
        head = head._replace(parameters=_vocabulary(config, mesh, rank) * config.width)
    own = blocks[each * cut.start : each * cut.stop]
    return [embedding] * (cut.start == 0) + own + [norm, head] * (cut.stop == config.layers)


def _vocabulary(config: GPTConfig, mesh: Mesh, rank: int) -> int:
    """The rows of the table that `rank`'s place on the tensor axis has."""
    return chunk_lengths(config.vocabulary, mesh.tensor)[mesh.place(rank)["tensor"]]


def _messages(config: GPTConfig, mesh: Mesh, stage: int, *, rows: int, tokens: int | None) -> list[Message]:
    """The tensor axis's collectives of one microbatch in one stage."""
    blocks = len(block_ranges(config.layers, mesh.pipeline)[stage])
    everything = tensor_parallel_messages(replace(config, layers=blocks), mesh.tensor, batch=rows, tokens=tokens)
    ends = {"embedding": stage == 0, "blocks, forward": True, "blocks, backward": True}
    return [message for message in everything if ends.get(message.name, stage == mesh.pipeline - 1)]
