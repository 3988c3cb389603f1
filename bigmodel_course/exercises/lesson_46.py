"""Lesson 46, hybrid parallelism: the groups of a rank, a fault that one axis hides, the fastest mesh that fits."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_course import costs
from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.costs import GPTConfig, Mesh
from bigmodel_course.distributed.averaging import average_gradients_
from bigmodel_course.distributed.hybrid import HybridGPT
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.tensor_parallel import whole_tensors
from bigmodel_course.models import GPT

__all__ = ["SMALL", "Suspect", "Task", "fastest_mesh", "hidden_fault", "my_groups", "step_seconds"]

Lists = list[list[int]]


def _groups(rank: int, data: int, tensor: int, pipeline: int) -> Lists:
    mesh = Mesh(data, tensor, pipeline)
    return [mesh.members(axis, rank) for axis in ("data", "tensor", "pipeline")]


def _in_order(rank: int, mesh: Mesh) -> Lists:
    return [mesh.members(axis, rank) for axis in ("data", "tensor", "pipeline")]


my_groups = Exercise(
    name="46.1",
    solution=_groups,
    trials=((5, 2, 2, 2), (13, 3, 2, 4), (7, 2, 4, 3), (4, 1, 3, 2)),
    labels=("rank", "data", "tensor", "pipeline"),
    mistakes=(
        Mistake(
            lambda rank, d, t, p: _in_order(rank, Mesh(d, t, p, order=("tensor", "data", "pipeline"))),
            "Your pipeline's ranks are neighbours: the tensor axis changes fastest, the pipeline axis slowest.",
        ),
        Mistake(
            lambda rank, d, t, p: _in_order(rank, Mesh(d, t, p, order=("pipeline", "tensor", "data"))),
            "Your data ranks are neighbours: the tensor axis changes fastest.",
        ),
        Mistake(
            lambda rank, d, t, p: _in_order(rank, Mesh(d, t, p, order=("data", "pipeline", "tensor"))),
            "Your data axis changes slowest: that place is the pipeline's.",
        ),
        Mistake(
            lambda rank, d, t, p: _groups(rank, d, t, p)[::-1],
            "The right groups in another order: data, tensor, pipeline.",
        ),
        Mistake(
            lambda rank, d, t, p: [[r for r in line if r != rank] for line in _groups(rank, d, t, p)],
            "A rank is a member of its own groups.",
        ),
        Mistake(
            lambda rank, d, t, p: _groups(0, d, t, p),
            "These are rank 0's groups: begin at the place of `rank`.",
        ),
        Mistake(
            lambda rank, d, t, p: [[rank // n * n + i for i in range(n)] for n in (d, t, p)],
            "Only one axis has neighbours in a row; along the others the ranks stand further apart.",
        ),
        Mistake(
            lambda rank, d, t, p: [[rank + i * s for i in range(n)] for n, s in ((d, t), (t, 1), (p, d * t))],
            "The steps are right, but a group begins where its own axis is 0, not at `rank`.",
        ),
    ),
    remark="no table was needed: rank = (pipeline place * data + data place) * tensor + tensor place.",
)

SMALL = GPTConfig(layers=4, heads=4, width=64, context=32)
ALL = 52  # its parameters: 12 a block, the table, the positions, the last norm's two


class Suspect(HybridGPT):
    """HybridGPT with a fault."""

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Right in the loss, wrong in some gradients."""
        loss = super().backward(tokens_BT, targets_BT)
        average_gradients_(self.stage)
        return loss


def _gradients() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the suspect on this rank's mesh, and those of one process."""
    tokens = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(1))
    whole, cut = (GPT(SMALL, generator=torch.Generator().manual_seed(0)).double() for _ in range(2))
    F.cross_entropy(whole(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    suspect = Suspect(cut, Mesh(data=2, tensor=2))
    suspect.backward(tokens[:, :-1], tokens[:, 1:])
    found = whole_tensors(suspect.stage, {name: p.grad for name, p in suspect.stage.named_parameters()})
    return found, {name: p.grad for name, p in whole.named_parameters()}


def _wrong_ones() -> list[str]:
    found, right = _gradients()
    return [name for name in right if (found[name] - right[name]).abs().max() > 1e-9]


@cache
def _wrong() -> int:
    return len(launch(_wrong_ones, 4)[0])


hidden_fault = Exercise(
    name="46.2",
    solution=lambda: (_wrong(), 2),
    trials=((),),
    mistakes=(
        Mistake(
            lambda: (_wrong(), 1),
            "The right number. But without the sum over the data axis, norms and positions would be wrong as well.",
        ),
        Mistake(
            lambda: (_wrong(), 3),
            "The right number. With the same sequences everywhere no gradient would be right, nor would the loss.",
        ),
        Mistake(
            lambda: (_wrong(), 4),
            "The right number. A sum for a mean doubles the gradients of all parameters alike.",
        ),
        Mistake(
            lambda: (_wrong(), 5),
            "The right number. Without the backward sum what stands before a cut matrix would be wrong: the norms.",
        ),
        Mistake(
            lambda: (ALL, 2),
            "Every gradient? Compare with a tolerance of 1e-9: some are equal up to rounding.",
        ),
        Mistake(
            lambda: (ALL - _wrong(), 2),
            "You counted the gradients that are right.",
        ),
        Mistake(lambda: (2, _wrong()), "The other way round: first how many gradients are wrong, then the fault."),
        Mistake(lambda: _wrong(), "Return a pair: how many gradients are wrong, and the number of the fault."),
        Mistake(
            lambda: (_wrong() // 4, 2),
            "You counted kinds of parameters: each block has its own.",
        ),
    ),
    remark="replicas agree along the tensor axis, so a mean over it hides there; shares of a matrix do not.",
)


class Task(NamedTuple):
    """A GPT to train on `ranks` devices, `node` of them in each machine."""

    config: GPTConfig
    ranks: int
    node: int
    batch: int
    memory: float


FLOPS, INSIDE, BETWEEN = 1e14, 1e11, 1e10  # a second: of a device; bytes of a link inside a node, between nodes
BYTES_A_PARAMETER = 16  # float32 weight, gradient and Adam's two moments


def step_seconds(task: Task, mesh: Mesh) -> float:
    """The busiest rank's time for a step, if nothing overlaps; one sequence a microbatch, float32."""
    flops = 3 * sum(layer.flops for layer in costs.gpt(task.config)) * task.batch / mesh.ranks
    micros = task.batch // mesh.data
    compute = flops / FLOPS / (1 - costs.bubble_fraction(mesh.pipeline, micros))
    speed = {axis: BETWEEN if mesh.crosses(axis, task.node) else INSIDE for axis in mesh.order}
    times = []
    for rank in range(mesh.ranks):
        sent = costs.mesh_bytes(task.config, mesh, rank, batch=task.batch, microbatches=micros)
        times.append(sum(sent[axis] / speed[axis] for axis in mesh.order))
    return compute + max(times)


def _sizes(ranks: int) -> list[tuple[int, int, int]]:
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [(d, t, ranks // d // t) for d in divisors for t in divisors if ranks % (d * t) == 0]


@cache
def _seconds(task: Task, sizes: tuple[int, int, int]) -> float:
    return step_seconds(task, Mesh(*sizes))


def _refused(sizes: tuple[int, int, int], task: Task) -> str | None:
    """Why this mesh cannot train the model; None if it can."""
    if not (isinstance(sizes, tuple | list) and len(sizes) == 3 and all(type(n) is int and n > 0 for n in sizes)):
        return "return three whole numbers above 0: the sizes of data, tensor and pipeline"
    (data, tensor, pipeline), shape = sizes, "x".join(map(str, sizes))
    if data * tensor * pipeline != task.ranks:
        return f"{shape} has {data * tensor * pipeline} ranks, and there are {task.ranks}"
    if task.config.heads % tensor or task.config.layers < pipeline or task.batch % data:
        return f"{shape} does not divide {task.config.heads} heads, {task.config.layers} blocks, {task.batch} sequences"
    mesh = Mesh(*sizes)
    held = BYTES_A_PARAMETER * max(costs.mesh_parameters(task.config, mesh, rank) for rank in range(mesh.ranks))
    return None if held <= task.memory else f"{shape} needs {held / 1e9:.1f} GB a device, and {task.memory / 1e9:g} fit"


def _fits(sizes: tuple[int, int, int], task: Task) -> bool:
    return _refused(sizes, task) is None


def _fastest(task: Task) -> tuple[int, int, int]:
    return min((sizes for sizes in _sizes(task.ranks) if _fits(sizes, task)), key=lambda s: _seconds(task, s))


def _without_tensor(task: Task) -> tuple[int, int, int]:
    """The fastest without tensor parallelism."""
    return min((s for s in _sizes(task.ranks) if s[1] == 1 and _fits(s, task)), key=lambda s: _seconds(task, s))


_WIDE = Task(GPTConfig(24, 16, 2048, 1024, vocabulary=50257), ranks=16, node=4, batch=32, memory=6e9)
_LONG = Task(GPTConfig(36, 20, 1280, 1024, vocabulary=50257), ranks=32, node=8, batch=64, memory=4e9)

fastest_mesh = Exercise(
    name="46.3",
    solution=_fastest,
    accept=lambda sizes, task: _refused(sizes, task),
    trials=((_WIDE,), (_LONG,)),
    labels=("task",),
    mistakes=(
        Mistake(
            lambda task: (task.ranks, 1, 1),
            "Data parallelism alone sends least, but every rank holds the whole model: check the memory.",
        ),
        Mistake(
            lambda task: (1, task.ranks, 1),
            "Tensor parallelism cuts whole heads: its size must divide their number.",
        ),
        Mistake(
            lambda task: (1, 1, 2 * task.ranks),
            "All ranks must have a place, and no more: the three sizes multiply to task.ranks.",
        ),
        Mistake(
            lambda task: (task.ranks // task.node, task.node, task.node),
            "That is a factor of task.node too many ranks.",
        ),
        Mistake(
            lambda task: min(_sizes(task.ranks), key=lambda s: -s[0] if s[2] == 2 else 0),
            "One cut is not enough to fit: try a longer pipeline or a wider tensor axis.",
        ),
        Mistake(
            lambda task: Mesh(*_fastest(task)),
            "Return the three sizes (data, tensor, pipeline), not a Mesh.",
        ),
        Mistake(
            lambda task: _seconds(task, _fastest(task)),
            "These are seconds: return the sizes of the mesh that needs them.",
        ),
    ),
    remark="tensor inside the node, pipeline across nodes, data with what is left; the sum decides, not the rule.",
    score=Score(
        lambda answer: 1e3 * sum(_seconds(task, tuple(answer(task))) for task in (_WIDE, _LONG)),
        "ms",
        1e3 * sum(_seconds(task, _without_tensor(task)) for task in (_WIDE, _LONG)),
    ),
)
