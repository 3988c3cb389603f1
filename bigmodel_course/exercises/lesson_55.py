"""Lesson 55, scaling out: what a kill costs, what survives it, and where to put the replicas."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, product

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["lost_by_a_kill", "placed_well", "up_together"]


def _lost(clients: int, pauses: Sequence[float], stage: int, replicas: int) -> float:
    return clients * pauses[stage] / sum(pauses) / replicas


lost_by_a_kill = Exercise(
    name="55.1",
    solution=_lost,
    trials=((8, (0.2, 0.2), 1, 2), (12, (0.1, 0.3, 0.2), 1, 3), (6, (0.5, 0.1), 0, 1), (9, (0.2, 0.4), 0, 4)),
    labels=("clients", "seconds", "stage", "replicas"),
    mistakes=(
        Mistake(
            lambda clients, seconds, stage, replicas: clients * seconds[stage] / sum(seconds),
            "That is how many are at the stage. They are spread over its replicas, and only one is killed.",
        ),
        Mistake(
            lambda clients, seconds, stage, replicas: clients / replicas,
            "Not every client is at this stage: some wait at another one.",
        ),
        Mistake(
            lambda clients, seconds, stage, replicas: clients / len(seconds) / replicas,
            "The stages do not take equally long: more requests are at the slow ones.",
        ),
        Mistake(
            lambda clients, seconds, stage, replicas: seconds[stage] / sum(seconds) / replicas,
            "That is a share. How many clients are there?",
        ),
        Mistake(
            lambda clients, seconds, stage, replicas: clients * seconds[0] / sum(seconds) / replicas,
            "You looked at stage 0, whichever was killed.",
        ),
        Mistake(
            lambda clients, seconds, stage, replicas: clients * seconds[stage] / replicas,
            "Clients times seconds is no number of requests: the rate is clients divided by the seconds of a request.",
        ),
        Mistake(
            lambda clients, seconds, stage, replicas: math.ceil(_lost(clients, seconds, stage, replicas)),
            "The average over many kills need not be a whole number: do not round.",
        ),
    ),
    remark="the arrival rate times the time under way, divided by the replicas: Little's law.",
)

Placement = Sequence[set[int]]


def _together(placement: Placement, node_up: float) -> float:
    """Over all that can happen to the nodes: does every stage stand on one that lives?"""
    stages, total = set().union(*placement), 0.0
    for alive in product((True, False), repeat=len(placement)):
        left = set().union(*(held for held, up in zip(placement, alive, strict=True) if up))
        if left == stages:
            total += math.prod(node_up if up else 1 - node_up for up in alive)
    return total


def _apart(placement: Placement, node_up: float) -> float:
    """As if each stage had nodes of its own."""
    stages = set().union(*placement)
    counts = [sum(stage in held for held in placement) for stage in stages]
    return math.prod(1 - (1 - node_up) ** n for n in counts)


up_together = Exercise(
    name="55.2",
    solution=_together,
    trials=(
        ([{0, 1}, {0, 1}], 0.9),
        ([{0}, {1}], 0.9),
        ([{0, 1}, {0}, {1}], 0.8),
        ([{0, 1}, {1, 2}, {0, 2}], 0.95),
    ),
    labels=("placement", "node_up"),
    mistakes=(
        Mistake(
            _apart,
            "The stages do not fail independently: one node that dies takes a replica of each stage that it holds.",
        ),
        Mistake(
            lambda placement, node_up: node_up ** len(placement),
            "That asks for every node to live. Some may die as long as each stage has a replica left.",
        ),
        Mistake(
            lambda placement, node_up: 1 - (1 - node_up) ** len(placement),
            "That asks for one node to live, whichever stages it holds.",
        ),
        Mistake(
            lambda placement, node_up: 1 - _together(placement, node_up),
            "That is the chance that a stage is missing.",
        ),
        Mistake(
            lambda placement, node_up: min(
                1 - (1 - node_up) ** sum(stage in held for held in placement) for stage in set().union(*placement)
            ),
            "That is the weakest stage alone. All stages must be there at the same time.",
        ),
        Mistake(
            lambda placement, node_up: node_up ** len(set().union(*placement)),
            "That is one node for each stage, whatever the placement says.",
        ),
    ),
    remark="nodes up 90 % of the time: two that hold everything give 0.99, one for each of two stages gives 0.81.",
)

Nodes = list[set[int]]


def _fits(sizes: Sequence[int], room: int, nodes: int) -> Nodes | None:
    """Each stage on two different nodes, by trying the largest first; None where `nodes` are too few."""
    order = sorted(range(len(sizes)), key=lambda stage: -sizes[stage])
    held: Nodes = [set() for _ in range(nodes)]
    free = [room] * nodes

    def place(k: int) -> bool:
        if k == len(order):
            return True
        stage = order[k]
        tried = set()
        for pair in combinations(range(nodes), 2):
            look = tuple(sorted(free[n] for n in pair))
            if look in tried or min(look) < sizes[stage]:
                continue
            tried.add(look)
            for n in pair:
                held[n].add(stage)
                free[n] -= sizes[stage]
            if place(k + 1):
                return True
            for n in pair:
                held[n].remove(stage)
                free[n] += sizes[stage]
        return False

    return held if place(0) else None


def _fewest(sizes: Sequence[int], room: int) -> Nodes:
    nodes = max(2, math.ceil(2 * sum(sizes) / room))
    while (found := _fits(sizes, room, nodes)) is None:
        nodes += 1
    return found


def _survives(placement: Nodes, sizes: Sequence[int], room: int) -> str | None:
    if not isinstance(placement, (list, tuple)) or not all(isinstance(held, (set, frozenset)) for held in placement):
        return "return a list with one set of stage numbers for each node"
    for node, held in enumerate(placement):
        if unknown := held - set(range(len(sizes))):
            return f"node {node} holds stage {min(unknown)}, and there are {len(sizes)} stages"
        if (full := sum(sizes[stage] for stage in held)) > room:
            return f"node {node} holds {full} GB and has {room}"
    for stage in range(len(sizes)):
        on = [node for node, held in enumerate(placement) if stage in held]
        if len(on) < 2:
            return f"stage {stage} stands on {len(on)} node{'s' * (len(on) != 1)}: when that dies, it is gone"
    return None


TASKS = (([6, 5, 4], 10), ([7, 3, 3, 3, 2], 10), ([8, 7, 6, 5, 4, 3, 2], 12), ([5, 5, 5], 8))


def _nodes_used(answer: Callable[[Sequence[int], int], Nodes]) -> float:
    return sum(len(answer(sizes, room)) for sizes, room in TASKS)


def _in_order(sizes: Sequence[int], room: int, copies: int = 2) -> Nodes:
    """Fill one node after the other; the second replicas go to nodes of their own."""
    rows: Nodes = []
    for _ in range(copies):
        rows.append(set())
        for stage, size in enumerate(sizes):
            if sum(sizes[held] for held in rows[-1]) + size > room:
                rows.append(set())
            rows[-1].add(stage)
    return rows


placed_well = Exercise(
    name="55.3",
    solution=_fewest,
    accept=_survives,
    trials=TASKS,
    labels=("sizes", "room"),
    mistakes=(
        Mistake(
            lambda sizes, room: [set(range(len(sizes)))] * 2,
            "A node that holds every stage needs room for all of them.",
        ),
        Mistake(
            lambda sizes, room: [{stage} for stage in range(len(sizes))],
            "One replica of each stage: whichever node dies, a stage is gone.",
        ),
        Mistake(
            lambda sizes, room: _in_order(sizes, room, copies=1),
            "The stages fit, once. Every stage needs a second replica on another node.",
        ),
        Mistake(
            lambda sizes, room: _in_order(sizes, 2 * room),
            "You filled the nodes twice over: count a node's GB again.",
        ),
        Mistake(
            lambda sizes, room: _in_order(sizes, room)[:-1],
            "The last node is missing, and with it the second replicas of its stages.",
        ),
        Mistake(
            lambda sizes, room: [[stage] for stage in range(len(sizes)) for _ in range(2)],
            "Right replicas, wrong form: a node is a set of stage numbers.",
        ),
        Mistake(
            lambda sizes, room: [{stage + 1} for stage in range(len(sizes)) for _ in range(2)],
            "Stages count from 0.",
        ),
    ),
    remark="any one node may die.",
    score=Score(_nodes_used, "nodes", _nodes_used(_fewest)),
)
