"""A mesh of ranks by arithmetic: every rank in one group an axis; what axes send and ranks hold."""

from itertools import permutations

import pytest

from bigmodel_course import costs
from bigmodel_course.costs import GPTConfig, Mesh

verifies = pytest.mark.verifies
CONFIG = GPTConfig(layers=4, heads=4, width=16, context=8, vocabulary=24)


@verifies(
    "costs.Mesh", kind="invariant", against="every rank in one group an axis", on="all orders of a 2 x 3 x 4 mesh"
)
def test_the_groups_of_an_axis_part_the_ranks():
    for order in permutations(Mesh().order):
        mesh = Mesh(2, 3, 4, order=order)
        assert len({tuple(mesh.place(rank).values()) for rank in range(24)}) == 24
        for axis in order:
            lines = {tuple(mesh.members(axis, rank)) for rank in range(24)}
            assert sorted(rank for line in lines for rank in line) == list(range(24))
            assert {len(line) for line in lines} == {getattr(mesh, axis)}
        inner = getattr(mesh, order[-1])
        assert mesh.members(order[-1], 0) == list(range(inner))
        assert not mesh.crosses(order[-1], inner)
        assert mesh.crosses(order[0], 24 // getattr(mesh, order[0]))


@verifies(
    "costs.mesh_parameters",
    kind="invariant",
    against="the whole model's parameters, where nothing is held twice",
    on="untied GPT, pipeline of 1, 2 and 4 stages",
    bound=0.0,
)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_stages_hold_the_model_once(stages, seen):
    config = GPTConfig(layers=4, heads=4, width=16, context=8, vocabulary=24, tied=False)
    mesh = Mesh(pipeline=stages)
    held = sum(costs.mesh_parameters(config, mesh, rank) for rank in range(stages))
    seen(abs(held - costs.total(costs.gpt(config)).parameters))


@verifies(
    "costs.mesh_bytes",
    kind="invariant",
    against="each axis alone sends what its own cost says",
    on="4 ranks on one axis",
    bound=0.0,
)
def test_an_axis_alone_sends_what_its_own_cost_says(seen):
    parameters = costs.total(costs.gpt(CONFIG)).parameters
    alone = {
        "data": (Mesh(data=4), costs.all_reduce_bytes(parameters, 4)[0]),
        "tensor": (
            Mesh(tensor=4),
            costs.tensor_parallel_bytes(costs.tensor_parallel_messages(CONFIG, 4, batch=8), 4)[0],
        ),
        "pipeline": (Mesh(pipeline=4), costs.boundary_bytes(8, 8 * 16) // 2 + 4 * 24 * 16),  # forward; the tied table
    }
    for axis, (mesh, expected) in alone.items():
        sent = costs.mesh_bytes(CONFIG, mesh, 0, batch=8)
        seen(abs(sent.pop(axis) - expected))
        seen(sum(sent.values()))


@verifies("costs.Mesh", "costs.mesh_bytes", kind="message", against="the expected text", on="sizes that do not fit")
def test_wrong_sizes_say_what_was_expected():
    with pytest.raises(ValueError, match="order must name pipeline, data, tensor once each"):
        Mesh(order=("data", "tensor"))
    with pytest.raises(ValueError, match="rank must be from 0 to 3, got 4"):
        Mesh(2, 2).place(4)
    with pytest.raises(ValueError, match=r"need a batch that data \* microbatches = 6 divides"):
        costs.mesh_bytes(CONFIG, Mesh(2), 0, batch=8, microbatches=3)
