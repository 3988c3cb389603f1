"""What one rank of data x tensor ranks holds, computes and sends in a step of fully sharded training.

The counts are those of torch's FSDP2 and DTensor on rank 0, which has the largest part; `simulate` counts the real
code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.transformers import Matrix, Transformer

__all__ = ["ShardedStep", "sharded_step"]

Key = tuple[str, str]  # (axis, kind of collective)


@dataclass(frozen=True)
class ShardedStep:
    """`parameters` that the rank holds, `flops` it computes; of its collectives the number of messages and of numbers.

    A collective's numbers are those of its larger buffer: what an all-gather ends with, a reduce-scatter begins with.
    """

    parameters: int
    flops: int
    messages: dict[Key, int]
    numbers: dict[Key, int]


def sharded_step(
    model: Transformer,
    data: int,
    tensor: int = 1,
    *,
    sequences: int = 1,
    tokens: int | None = None,
    recompute: bool = False,
) -> ShardedStep:
    """Predict one step: ZeRO-3 over `data` ranks, each block and the rest a unit, and sequence parallelism.

    Each group of `tensor` ranks reads `sequences` sequences of `tokens` tokens.  `recompute` runs a block's forward
    pass again in the backward pass, up to the last tensor that is needed.
    """
    tokens = model.context if tokens is None else tokens
    at_least(1, data=data, tensor=tensor, sequences=sequences, tokens=tokens)
    _divides(tensor, tokens=tokens, key_value_heads=model.shared_heads)
    traffic = [*data_traffic(model, data, tensor), *tensor_traffic(model, tensor, sequences * tokens, recompute)]
    return ShardedStep(
        parameters=sum(held(unit, data, tensor) * times for unit, times in units(model)),
        flops=sequences * _flops(model, tensor, tokens, recompute),
        messages={key: sum(count for name, count, _ in traffic if name == key) for key, *_ in traffic},
        numbers={key: sum(count * size for name, count, size in traffic if name == key) for key, *_ in traffic},
    )


def _divides(tensor: int, **values: int) -> None:
    for name, value in values.items():
        if value % tensor:
            raise ValueError(f"need {name} that tensor={tensor} divides, got {name}={value}")


def units(model: Transformer) -> list[tuple[list[Matrix], int]]:
    """What is gathered together, and how often there is such a unit."""
    return [(model.outside(), 1), (model.block(), model.layers)]


def _local(matrix: Matrix, tensor: int) -> tuple[int, ...]:
    """Rank 0's part of a matrix after tensor parallelism: the first part is the largest."""
    return tuple(ceil(size / tensor) if i == matrix.cut else size for i, size in enumerate(matrix.shape))


def _rows(shape: Sequence[int], data: int) -> int:
    """Numbers in the rows that rank 0 holds: FSDP2 cuts dimension 0, and pads every rank to the first one's rows."""
    return ceil(shape[0] / data) * prod(shape[1:])


def held(unit: Sequence[Matrix], data: int, tensor: int) -> int:
    """Numbers of a unit on rank 0 of data x tensor ranks."""
    return sum(_rows(_local(matrix, tensor), data) for matrix in unit)


def data_traffic(model: Transformer, data: int, tensor: int) -> list[tuple[Key, int, int]]:
    """Gather each block before forward and before backward; what stands outside stays; scatter the gradients.

    Each entry is (axis and collective, how often, numbers in the larger buffer).
    """
    if data == 1:
        return []
    outside, block = (data * held(unit, data, tensor) for unit, _ in units(model))
    gather, scatter = ("data", "all-gather"), ("data", "reduce-scatter")
    return [
        (gather, 1, outside),
        (gather, 2 * model.layers, block),
        (scatter, 1, outside),
        (scatter, model.layers, block),
    ]


def tensor_traffic(
    model: Transformer, tensor: int, rows: int, recompute: bool, *, ends: int = 2, sequence: bool = True
) -> list[tuple[Key, int, int]]:
    """Activations of `rows` tokens.

    Each half of a block gathers its input and scatters its result, and the backward pass does the reverse.  Without
    `sequence` parallelism a half's result is summed instead, and so is the gradient of its input.  `ends`: of the
    embedding and the head, how many stand on this rank.
    """
    if tensor == 1:
        return []
    gather, scatter, reduce = (("tensor", kind) for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    activation = rows * model.width
    loss = (reduce, 3, rows)  # maximum, sum of the exponentials, the target's score
    again = model.layers if recompute else 0
    if not sequence:
        return [(reduce, 4 * model.layers + 2 * again + ends, activation), loss]
    norm = 1 if model.gated else 2  # tensors in a norm
    positions = [] if model.gated else [(reduce, 1, model.context * model.width)]
    return [  # what the last matrix of a block sends is not needed again
        (gather, 4 * model.layers + 2 * again + ends, activation),  # before the head, and the embedding's gradient
        (scatter, 4 * model.layers + again + ends, activation),
        (reduce, norm * (2 * model.layers + 1), model.width),  # a norm sees its own tokens only: sum its gradients
        *positions,
        loss,
    ]


def _flops(model: Transformer, tensor: int, tokens: int, recompute: bool) -> int:
    """Of one sequence on one rank; the vocabulary may be uneven, all else is divided evenly."""
    block, head = model.block_flops(tokens), 2 * tokens * model.width * ceil(model.vocabulary / tensor)
    down = 2 * tokens * model.width * model.inner
    again = block - down if recompute else 0
    return model.layers * (3 * block + again) // tensor + 3 * head
