"""One GPT on a mesh of data x tensor x pipeline trains as on one process and as torch's own methods; faults show.

The models are given random biases and norms: fresh ones are 0 and 1, and would hide a bias that is added twice.
"""

import re
import sys
from functools import cache
from itertools import product
from unittest import mock

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bigmodel_course import costs
from bigmodel_course.distributed import hybrid
from bigmodel_course.distributed.hybrid import HybridGPT, Mesh, make_groups
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.pipeline_schedules import gpipe
from bigmodel_course.distributed.traffic import Traffic
from bigmodel_course.models import GPT, GPTConfig
from bigmodel_course.optim import AdamW, Optimizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest
verifies = pytest.mark.verifies
PATIENCE = 240.0  # seconds: a busy machine is not a fault
VOCABULARY, BATCH = 24, 12
MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2)]
KINDS = {"tied": True, "untied": False, "tied, frozen": True, "untied, frozen": False}
STEPS = 2


def config(tied=True):
    return GPTConfig(layers=4, heads=4, width=16, context=8, vocabulary=VOCABULARY, tied=tied)


@torch.no_grad()
def make(kind="tied"):
    """A whole model whose biases and norms are random too."""
    model = GPT(config(KINDS[kind]), generator=torch.Generator().manual_seed(0)).double()
    rng = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        p.add_(torch.randn(p.shape, dtype=p.dtype, generator=rng) * 0.2)
        p.requires_grad_("frozen" not in kind or not name.startswith(("tokens", "blocks.0", "blocks.2.up")))
    return model


def batch(step):
    tokens = torch.randint(0, VOCABULARY, (BATCH, 9), generator=torch.Generator().manual_seed(10 + step))
    return tokens[:, :-1], tokens[:, 1:]


def whole_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def optimizer_of(module):
    """Its eps is large, or rounding would decide the step of a gradient that is 0 in theory."""
    return Optimizer([p for p in module.parameters() if p.requires_grad], AdamW(eps=1e-4), 0.05)


@cache
def one_process(kind):
    model = make(kind)
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = whole_loss(model, *batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def on_a_mesh(mesh, kind, options):
    """Losses and the whole model's weights after a few steps, on this rank."""
    model = HybridGPT(make(kind), mesh, **options)
    optimizer, losses = optimizer_of(model.stage), []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(model.backward(*batch(step)).item())
        optimizer.step()
    return losses, model.whole_state_dict()


def gap(first, second):
    """The largest difference of losses and weights."""
    (losses, state), (other_losses, other_state) = first, second
    assert state.keys() == other_state.keys()
    differences = [abs(a - b) for a, b in zip(losses, other_losses, strict=True)]
    return max(*differences, *((state[name] - other_state[name]).abs().max().item() for name in state))


OPTIONS = [{"microbatches": 1}, {"microbatches": 3}, {"microbatches": 3, "sequence": True}]


def gaps(mesh):
    """For each kind of model and each way to run it, this rank's distance from one process."""
    return [gap(on_a_mesh(mesh, kind, options), one_process(kind)) for kind, options in product(KINDS, OPTIONS)]


@verifies(
    "distributed.hybrid.HybridGPT",
    "distributed.hybrid.make_groups",
    "distributed.hybrid.Groups",
    "distributed.hybrid.Mesh",
    kind="equals one process",
    against="models.GPT on one process, the whole batch at once",
    on="all meshes of 2 and 4 ranks and 2 x 2 x 2; tied, frozen, 1 and 3 microbatches, sequence: losses and weights of "
    "2 AdamW steps, float64",
    bound=1e-12,
)
@pytest.mark.parametrize("sizes", [pytest.param(sizes, id="x".join(map(str, sizes))) for sizes in MESHES])
def test_trains_as_one_process(sizes, seen):
    for differences in launch(gaps, Mesh(*sizes).ranks, Mesh(*sizes), timeout=PATIENCE):
        for difference in differences:
            seen(difference)


def test_another_schedule_and_another_order_of_ranks_change_nothing():
    mesh = Mesh(2, 1, 2, order=("data", "tensor", "pipeline"))
    options = {"microbatches": 3, "schedule": gpipe}
    results = launch(on_a_mesh, 4, mesh, "tied", options, timeout=PATIENCE)
    assert max(gap(result, one_process("tied")) for result in results) < 1e-12


def by_device_mesh():
    """The members of each of this rank's groups: ours, and torch's."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = Mesh(2, 2, 2)
    theirs = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=mesh.order)
    ours = make_groups(mesh)._asdict()
    return [[dist.get_process_group_ranks(g) for g in (ours[axis], theirs.get_group(axis))] for axis in mesh.order]


@verifies(
    "distributed.hybrid.make_groups",
    "costs.Mesh",
    kind="parity",
    against="torch.distributed.device_mesh.init_device_mesh",
    on="the ranks of every group of a 2 x 2 x 2 mesh",
)
def test_the_groups_are_those_of_torchs_device_mesh():
    for found in launch(by_device_mesh, 8, timeout=PATIENCE):
        assert all(ours == theirs for ours, theirs in found)


def by_fsdp_and_dtensor():
    """torch's FSDP2 over the data axis, its tensor parallelism (of the two-layer parts) over the tensor axis."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), make()
    parallelize_module(model, mesh["tensor"], {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()})
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (each.chunk(2)[mesh["data"].get_local_rank()] for each in batch(step))
        loss = whole_loss(model, x, y)
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss := loss.detach() / 2, group=mesh["data"].get_group())
        losses.append(loss.item())
    theirs = losses, {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return gap(on_a_mesh(Mesh(2, 2, 1), "tied", {}), theirs)


def by_ddp_and_pipelining():
    """torch's pipelining over the pipeline axis, DDP around each stage over the data axis."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    mesh = Mesh(2, 1, 2)
    place, groups, model = mesh.place(dist.get_rank()), make_groups(mesh), make("untied")
    stage = hybrid.GPTStage(model, costs.block_ranges(4, 2)[place["pipeline"]])
    wrapped = nn.parallel.DistributedDataParallel(stage, process_group=groups.data)
    step_of = PipelineStage(wrapped, place["pipeline"], 2, torch.device("cpu"), group=groups.pipeline)
    schedule = Schedule1F1B(step_of, 3, loss_fn=lambda scores, y: F.cross_entropy(scores.flatten(0, 1), y.flatten()))
    optimizer = optimizer_of(stage)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (each.chunk(2)[place["data"]] for each in batch(step))
        schedule.step(*([x] if place["pipeline"] == 0 else []), **({"target": y} if place["pipeline"] == 1 else {}))
        optimizer.step()
    ours = on_a_mesh(Mesh(2, 1, 2), "untied", {"microbatches": 3})[1]
    return max((ours[name] - p).abs().max().item() for name, p in stage.named_parameters())


@verifies(
    "distributed.hybrid.HybridGPT",
    kind="parity",
    against="torch's FSDP2 x DTensor tensor parallelism on a 2 x 2 DeviceMesh",
    on="losses and weights of 2 AdamW steps, float64",
    bound=1e-12,
)
def test_trains_as_torchs_fsdp2_with_tensor_parallelism(seen):
    for difference in launch(by_fsdp_and_dtensor, 4, timeout=PATIENCE):
        seen(difference)


@verifies(
    "distributed.hybrid.HybridGPT",
    kind="parity",
    against="torch.distributed.pipelining Schedule1F1B x DistributedDataParallel, 2 x 2",
    on="weights of 2 AdamW steps, 3 microbatches, float64",
    bound=1e-12,
)
def test_trains_as_torchs_pipelining_with_ddp(seen):
    for difference in launch(by_ddp_and_pipelining, 4, timeout=PATIENCE):
        seen(difference)


FAULTS = {  # what is wrong: (mesh, what to replace, by what)
    "gradients averaged over all ranks": (
        (2, 2, 1), "average_gradients_", lambda stage, group: hybrid_average(stage, None)
    ),
    "gradients averaged along the tensor axis": (
        (2, 2, 1), "average_gradients_", lambda stage, group: hybrid_average(stage, tensor_group())
    ),
    "gradients not averaged": ((2, 1, 2), "average_gradients_", lambda stage, group: None),
    "tied gradient not summed": ((2, 1, 2), "sum_tied_", lambda stages, group: None),
    "tied gradient summed over the data axis too": (
        (2, 1, 2), "sum_tied_", lambda stages, group: [real_sum_tied(stages, group=group) for _ in range(2)]
    ),
    "loss of each rank's own scores": ((1, 2, 2), "vocabulary_cross_entropy", lambda scores, y, size, group: (
        F.cross_entropy(scores.flatten(0, 1), y.flatten() % scores.shape[-1])
    )),
}  # fmt: skip
real_sum_tied, hybrid_average = hybrid.sum_tied_, hybrid.average_gradients_


def tensor_group():
    """The neighbours' group of a 2 x 2 x 1 mesh."""
    return make_groups(Mesh(2, 2, 1)).tensor


def with_fault(fault):
    sizes, name, wrong = FAULTS[fault]
    with mock.patch.object(hybrid, name, wrong):
        try:
            return gap(on_a_mesh(Mesh(*sizes), "tied", {"microbatches": 3}), one_process("tied"))
        except ValueError as error:  # the two copies of the table have drifted apart
            return 1.0 if "copies" in str(error) else 0.0


def with_faults():
    return {fault: with_fault(fault) for fault in FAULTS}


def test_known_faults_are_caught():
    """Each of them runs without an error."""
    for found in launch(with_faults, 4, timeout=PATIENCE):
        for fault, difference in found.items():
            assert difference > 1e-3, f"{fault}: {difference}"


def sent_bytes(sizes, tied, microbatches):
    """What this rank sent in its second step, along each axis."""
    model = HybridGPT(make("tied" if tied else "untied"), Mesh(*sizes), microbatches=microbatches)
    model.backward(*batch(0))  # the first one also sends the shapes
    model.stage.zero_grad()
    with Traffic(model.groups._asdict()) as traffic:
        model.backward(*batch(1))
    return dict(traffic.sent), sum(p.numel() for p in model.stage.parameters())


def all_sent(cases):
    return [sent_bytes(*case) for case in cases]


@verifies(
    "costs.mesh_bytes",
    "costs.mesh_parameters",
    "distributed.traffic.Traffic",
    kind="invariant",
    against="the bytes that each rank sends along each axis, and the parameters that it holds, counted in a real step",
    on="meshes of 2, 4 and 8 ranks, tied and untied, 1 and 3 microbatches",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_along_each_axis_are_as_predicted(ranks, seen):
    meshes = [sizes for sizes in MESHES if Mesh(*sizes).ranks == ranks]
    cases = list(product(meshes, (True, False), (1, 3)))
    for rank, found in enumerate(launch(all_sent, ranks, cases, timeout=PATIENCE)):
        for (sizes, tied, microbatches), (sent, parameters) in zip(cases, found, strict=True):
            mesh = Mesh(*sizes)
            options = {"batch": BATCH, "microbatches": microbatches, "tokens": 8, "bytes_each": 8}
            predicted = costs.mesh_bytes(config(tied), mesh, rank, **options)
            assert sent == predicted, (sizes, tied, microbatches, rank)
            seen(max(abs(sent[axis] - predicted[axis]) for axis in predicted))
            seen(abs(parameters - costs.mesh_parameters(config(tied), mesh, rank)))


def wrong_calls():
    """What each says."""
    said = []
    for call in (
        lambda: HybridGPT(make(), Mesh(2, 2, 1)),
        lambda: HybridGPT(make(), Mesh(2, 1, 1), microbatches=5).backward(*batch(0)),
        lambda: HybridGPT(GPT(GPTConfig(4, 1, 16, 8), generator=torch.Generator()), Mesh(1, 2, 1)),
        lambda: HybridGPT(GPT(GPTConfig(1, 4, 16, 8), generator=torch.Generator()), Mesh(1, 1, 2)),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


@verifies(
    "distributed.hybrid.HybridGPT", kind="message", against="the expected text", on="sizes that do not fit"
)  # fmt: skip
def test_wrong_sizes_say_what_was_expected():
    want = [
        r"mesh must have 2 ranks, as many as there are, got 2 x 2 x 1",
        r"need a batch that data \* microbatches = 10 divides, got 12 sequences",
        r"need heads that the ranks divide, got heads=1 and 2 ranks",
        r"need at least one block a stage, got layers=1 for stages=2",
    ]
    for said in launch(wrong_calls, 2, timeout=PATIENCE):
        assert all(re.search(pattern, text) for pattern, text in zip(want, said, strict=True)), said
