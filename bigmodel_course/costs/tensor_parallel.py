"""What one rank of a tensor-parallel GPT holds, computes and sends in a training step."""

from math import ceil
from typing import NamedTuple

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.communication import all_gather_bytes, all_reduce_bytes, chunk_lengths, reduce_scatter_bytes
from bigmodel_course.costs.layers import GPTConfig, Layer, gpt

__all__ = ["Message", "tensor_parallel_bytes", "tensor_parallel_gpt", "tensor_parallel_messages"]

# What each rank sends of a tensor of so many numbers.
BYTES = {
    "all-reduce": all_reduce_bytes,
    "reduce-scatter": reduce_scatter_bytes,
    "all-gather": lambda numbers, ranks, each: all_gather_bytes(chunk_lengths(numbers, ranks), each),
}


class Message(NamedTuple):
    """A collective on `numbers` numbers (of the whole tensor, not of a rank's part), done `times` times in a step."""

    name: str
    collective: str
    numbers: int
    times: int


def tensor_parallel_gpt(
    config: GPTConfig, ranks: int, *, rank: int = 0, tokens: int | None = None, sequence: bool = False
) -> list[Layer]:
    """The layers of `rank` in distributed.tensor_parallel, reading one sequence: as costs.gpt, for one rank.

    Matrices and what they keep shrink by `ranks`, but norms and the whole input of a column-cut matrix stay.
    With `sequence`, norms keep this rank's own tokens only.
    """
    rows = _rows(config, ranks, tokens, sequence)
    if not 0 <= rank < ranks:
        raise ValueError(f"need 0 <= rank < {ranks}, got {rank=}")
    vocabulary = ceil((config.vocabulary - rank) / ranks)  # the earlier ranks hold the larger shares
    return [_cut(layer, config, ranks, vocabulary, (rows, sequence)) for layer in gpt(config, tokens=rows)]


def _cut(layer: Layer, config: GPTConfig, ranks: int, vocabulary: int, tokens: tuple[int, bool]) -> Layer:
    kind, width, (rows, sequence) = layer.name.split(maxsplit=2)[-1], config.width, tokens
    if kind == "embedding":  # the look-up also keeps which tokens belong to others
        return layer._replace(parameters=(vocabulary + config.context) * width, activations=2 * rows)
    if kind == "head":  # parameters is 0 where it is tied
        return layer._replace(parameters=vocabulary * width * (not config.tied), flops=2 * rows * vocabulary * width)
    if kind.startswith("norm"):
        return layer._replace(activations=layer.activations // ranks) if sequence else layer
    whole_bias = width if kind in ("attention out", "down") else 0
    parameters = (layer.parameters - whole_bias) // ranks + whole_bias
    kept = layer.activations if kind in ("qkv", "up") else layer.activations // ranks
    return Layer(layer.name, parameters, layer.flops // ranks, kept)


def tensor_parallel_messages(
    config: GPTConfig, ranks: int, *, batch: int = 1, tokens: int | None = None, sequence: bool = False
) -> list[Message]:
    """The collectives of one forward and backward over `batch` sequences, all parameters trained.

    Four all-reduces a block (Shoeybi et al. 2019, arXiv 1909.08053, section 3).  With `sequence` each becomes a
    reduce-scatter and an all-gather (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2), and the gradients of
    norms and biases are summed.
    """
    at_least(1, batch=batch)
    rows, blocks = batch * _rows(config, ranks, tokens, sequence), config.layers
    stream = rows * config.width
    messages = [
        Message("embedding", "all-reduce", stream, 1),
        Message("largest score", "all-reduce", rows, 1),
        Message("sum and target score", "all-reduce", 2 * rows, 1),
    ]
    if not sequence:
        return [
            *messages,
            Message("blocks, forward", "all-reduce", stream, 2 * blocks),
            Message("blocks, backward", "all-reduce", stream, 2 * blocks),
            Message("head, backward", "all-reduce", stream, 1),
        ]
    return [
        *messages,
        Message("embedding, backward", "all-gather", stream, 1),
        *(
            Message(f"blocks, {way}", kind, stream, 2 * blocks)
            for way in ("forward", "backward")
            for kind in ("all-gather", "reduce-scatter")
        ),
        Message("head, forward", "all-gather", stream, 1),
        Message("head, backward", "reduce-scatter", stream, 1),
        Message("norms and biases", "all-reduce", config.width, 6 * blocks + 2),
    ]


def tensor_parallel_bytes(messages: list[Message], ranks: int, *, bytes_each: int = 4) -> list[int]:
    """Bytes that each rank sends for `messages` on rings, in rank order; numbers of `bytes_each` bytes."""
    at_least(1, ranks=ranks, bytes_each=bytes_each)
    sent = [0] * ranks
    for message in messages:
        for rank, each in enumerate(BYTES[message.collective](message.numbers, ranks, bytes_each)):
            sent[rank] += message.times * each
    return sent


def _rows(config: GPTConfig, ranks: int, tokens: int | None, sequence: bool) -> int:
    """The tokens of a sequence, if the ranks can divide the work."""
    at_least(1, ranks=ranks)
    if config.heads % ranks:
        raise ValueError(f"need heads that the ranks divide, got heads={config.heads} and {ranks=}")
    rows = config.context if tokens is None else tokens
    if sequence and rows % ranks:
        raise ValueError(f"need tokens that the ranks divide with sequence=True, got tokens={rows} and {ranks=}")
    return rows
