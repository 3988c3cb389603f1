"""Lesson 43, sharded states: bytes of a rank, numbers that never move, units that need the fewest bytes."""

from functools import cache
from itertools import accumulate, combinations, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.distributed.collectives import all_gather, reduce_scatter
from bigmodel_course.distributed.launch import launch
from bigmodel_course.models import digit_model
from bigmodel_course.optim import Adam, Optimizer
from bigmodel_course.recipe import digit_parts

__all__ = ["bytes_of_a_rank", "careless", "numbers_that_stand_still", "units_of_fewest_bytes"]


def _kinds(parameters: int, ranks: int, stage: int) -> list[int]:
    return list(costs.sharded_bytes(parameters, ranks, stage, mixed=True))


def _with(whole: int, shard: int, *divided: bool, each: tuple[int, ...] = (2, 2, 12)) -> list[int]:
    return [size * (shard if cut else whole) for size, cut in zip(each, divided, strict=True)]


bytes_of_a_rank = Exercise(
    name="43.1",
    solution=_kinds,
    trials=((1_000_003, 8, 2), (7_500_000_000, 64, 1), (1003, 4, 3), (1000, 8, 0)),
    labels=("parameters", "ranks", "stage"),
    mistakes=(
        Mistake(
            lambda n, ranks, stage: _with(n, n // ranks, stage > 2, stage > 1, stage > 0),
            "A shard is rounded up: what is left over must be somewhere, and the shards are equally long.",
        ),
        Mistake(
            lambda n, ranks, stage: _with(n, -(-n // ranks), stage > 2, stage > 1, stage > 0, each=(2, 2, 8)),
            "Adam's two averages are 8 bytes, but the float32 copy of the parameters is a state, too.",
        ),
        Mistake(
            lambda n, ranks, stage: _with(n, -(-n // ranks), stage > 2, stage > 1, stage > 0, each=(4, 4, 8)),
            "That is float32 throughout: in mixed precision parameters and gradients have 2 bytes.",
        ),
        Mistake(
            lambda n, ranks, stage: _with(n, -(-n // ranks), stage > 0, stage > 1, stage > 2),
            "The order: stage 1 divides the optimizer's states, and stage 3 the parameters.",
        ),
        Mistake(
            lambda n, ranks, stage: _with(n, -(-n // ranks), *[stage > 0] * 3),
            "You divide everything at once: that is stage 3.",
        ),
        Mistake(
            lambda n, ranks, stage: _with(n, -(-n // ranks), stage == 3, stage == 2, stage == 1),
            "Each stage keeps what the one before it has divided.",
        ),
        Mistake(lambda n, ranks, stage: sum(_kinds(n, ranks, stage)), "That is the total: return the three kinds."),
        Mistake(
            lambda n, ranks, stage: [ranks * b for b in _kinds(n, ranks, stage)],
            "Those are the bytes of all ranks together: one rank's are asked for.",
        ),
    ),
    remark="16 bytes a parameter on one rank, and 16 / N at stage 3.",
)


def careless(steps: int = 5) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """On a rank: train the digit model with sharded states; (losses, weights before, weights after).

    There is one silent fault in it.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, train, losses = digit_model(generator=torch.Generator().manual_seed(0)), digit_parts()[0], []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    params = list(model.parameters())
    whole = nn.utils.parameters_to_vector(params).detach()
    size = len(whole) // ranks
    shard = nn.Parameter(whole[rank * size : (rank + 1) * size].clone())
    optimizer = Optimizer([shard], Adam(), lr=0.01)
    for step in range(steps):
        rows = torch.arange(64 * step, 64 * (step + 1)).tensor_split(ranks)[rank]
        loss = cross_entropy(model(train.x[rows]), train.y[rows])
        grads = nn.utils.parameters_to_vector(torch.autograd.grad(loss, params))
        shard.grad = reduce_scatter(grads[: ranks * size], op="mean")
        optimizer.step()
        whole[: ranks * size] = all_gather(shard.detach())
        nn.utils.vector_to_parameters(whole, params)
        losses.append(loss.item())
    return losses, before, {name: p.detach().clone() for name, p in model.named_parameters()}


@cache
def _finding() -> tuple[str, int]:
    _, before, after = launch(careless, 4)[0]
    alone = launch(careless, 1)[0][2]
    still = {name: int(((before[name] == after[name]) & (before[name] != alone[name])).sum()) for name in before}
    name = max(still, key=still.get)
    return name, still[name]


numbers_that_stand_still = Exercise(
    name="43.2",
    solution=_finding,
    trials=((),),
    mistakes=(
        Mistake(
            lambda: (_finding()[0], _finding()[1] + 1),
            "The right parameter, one number too many: compare exactly, with ==.",
        ),
        Mistake(
            lambda: (_finding()[0], 10),
            "The right parameter, but most of its numbers move: count those that do not.",
        ),
        Mistake(
            lambda: ("layers.0.bias", 5),
            "Those neurons get no gradient from these pictures: on one rank they stand still, too.",
        ),
        Mistake(lambda: _finding()[::-1], "The other way round: first the name, then how many."),
        Mistake(lambda: _finding()[0], "Return a pair: the parameter's name, and how many of its numbers stand still."),
        Mistake(
            lambda: ("layers.2.weight", 2),
            "The right number, the wrong place: where in the flat vector does the last shard end?",
        ),
    ),
    remark="length // ranks drops what is left over, and the loss falls all the same: round up.",
)

Problem = tuple[list[int], int, int, int]


def _grouped(layers: list[int], sizes: list[int]) -> list[int]:
    """Parameters of each unit."""
    ends = [0, *accumulate(sizes)]
    return [sum(layers[start:end]) for start, end in pairwise(ends)]


def peak_bytes(layers: list[int], ranks: int, sizes: list[int]) -> int:
    """Of one rank at stage 3 with Adam in float32: what it keeps, and two units whole."""
    units = _grouped(layers, sizes)
    return costs.sharded_bytes(units, ranks, 3).total + costs.temporary_bytes(units, ranks, 3)


def _search(layers: list[int], ranks: int, most: int, limit: int) -> list[int]:
    """Every way to cut the row into at most so many units."""
    n = len(layers)
    cuts = (c for units in range(1, most + 1) for c in combinations(range(1, n), units - 1))
    choices = ([b - a for a, b in pairwise([0, *c, n])] for c in cuts)
    return min(choices, key=lambda sizes: peak_bytes(layers, ranks, sizes))


def _filled(layers: list[int], ranks: int, most: int, limit: int) -> list[int]:
    """Fill a unit until it has its share of the parameters and a quarter more, then begin the next."""
    sizes, held = [0], 0
    for n in layers:
        if sizes[-1] and held + n > 1.25 * sum(layers) / most and len(sizes) < most:
            sizes, held = [*sizes, 0], 0
        sizes[-1], held = sizes[-1] + 1, held + n
    return sizes


def _evenly(layers: list[int], ranks: int, most: int, limit: int) -> list[int]:
    return [len(part) for part in torch.arange(len(layers)).tensor_split(most)]


def _judge(sizes: list[int], layers: list[int], ranks: int, most: int, limit: int) -> str | None:
    whole = isinstance(sizes, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    if not whole or sum(sizes) != len(layers):
        return f"return a list of whole numbers above 0 that add up to the {len(layers)} layers"
    if len(sizes) > most:
        return f"you have {len(sizes)} units, allowed {most}"
    peak = peak_bytes(layers, ranks, sizes)
    return None if peak <= limit else f"a rank needs {peak:,} bytes at its peak, allowed {limit:,}"


_EASY: Problem = ([100, 100, 400, 100, 100], 4, 3, 6_500)
_HARD: Problem = ([9000, 300, 2500, 2500, 800, 6000, 6000, 200, 4000, 1500, 1500, 7000], 8, 5, 176_000)

units_of_fewest_bytes = Exercise(
    name="43.3",
    solution=_search,
    accept=_judge,
    trials=(_EASY, _HARD),
    labels=("layers", "ranks", "most", "limit"),
    mistakes=(
        Mistake(_evenly, "As many layers in each unit: but layers differ, and the largest unit counts."),
        Mistake(
            lambda layers, ranks, most, limit: [1] * len(layers),
            "Each layer by itself needs the fewest bytes, but too many messages: join neighbours.",
        ),
        Mistake(
            lambda layers, ranks, most, limit: [len(layers)],
            "One unit is the whole model, and it would be gathered at once.",
        ),
        Mistake(
            lambda layers, ranks, most, limit: _grouped(layers, _search(layers, ranks, most, limit)),
            "Those are the parameters of each unit: return how many layers it has.",
        ),
        Mistake(
            lambda layers, ranks, most, limit: list(accumulate(_search(layers, ranks, most, limit))),
            "Those are the places where units end: return how many layers each has.",
        ),
        Mistake(
            lambda layers, ranks, most, limit: peak_bytes(layers, ranks, _search(layers, ranks, most, limit)),
            "Those are the bytes: return the list of sizes that needs them.",
        ),
        Mistake(
            lambda layers, ranks, most, limit: _search(layers, ranks, most, limit)[:-1],
            "The last unit is missing: all layers must be in one.",
        ),
    ),
    remark="the rank's peak is its shards and two copies of its largest unit.",
    score=Score(
        lambda answer: peak_bytes(_HARD[0], _HARD[1], answer(*_HARD)),
        "bytes a rank",
        peak_bytes(_HARD[0], _HARD[1], _filled(*_HARD)),
    ),
)
