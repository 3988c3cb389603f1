"""A pipeline over real ranks gives the loss and the gradients of one process, and those of torch's own pipelining."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from bigmodel_course import costs
from bigmodel_course.distributed.activations import ActivationMeter
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.pipeline import Pipeline, run
from bigmodel_course.distributed.pipeline_schedules import (
    Op,
    gpipe,
    interleaved,
    messages,
    one_at_a_time,
    one_f_one_b,
    peak_live,
)
from bigmodel_course.distributed.pipeline_stages import GPTStage, join_states, split_gpt, sum_tied_
from bigmodel_course.models import GPT, GPTConfig

verifies = pytest.mark.verifies
WAIT = 240.0  # a busy machine is not a fault
KINDS = ["untied", "tied", "untied, frozen", "tied, frozen"]
CASES = [
    *[(one_at_a_time, 3, 1), (gpipe, 1, 1), (gpipe, 3, 1), (one_f_one_b, 1, 1), (one_f_one_b, 3, 1)],
    *[(one_f_one_b, 8, 1), (interleaved, 1, 2), (interleaved, 3, 2), (interleaved, 8, 2)],
]


def config(tied=True):
    return GPTConfig(layers=8, heads=2, width=16, context=8, vocabulary=32, tied=tied)


def model(kind):
    """A GPT of one of the KINDS; frozen are the embeddings and three blocks, more than the first stage of four."""
    gpt = GPT(config(tied=not kind.startswith("untied")), generator=torch.Generator().manual_seed(0))
    if "frozen" in kind:
        for module in (gpt.tokens, gpt.positions, *gpt.blocks[:3]):
            module.requires_grad_(False)
    return gpt


def batch(microbatches, seed=1):
    text = torch.randint(0, 32, (microbatches, 2, 9), generator=torch.Generator().manual_seed(seed))
    return [part[:, :-1].clone() for part in text], [part[:, 1:].clone() for part in text]


def mean_loss(scores, targets):
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def gradients(modules):
    return {name: p.grad for module in modules for name, p in module.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks have: with more, a sum is taken in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def one_process(kind, microbatches, seeds=(1,)):
    """Loss and gradients of the whole model, microbatch after microbatch."""
    gpt, total = model(kind), 0.0
    for seed in seeds:
        for x, y in zip(*batch(microbatches, seed), strict=True):
            loss = mean_loss(gpt(x), y) / microbatches
            loss.backward()
            total += loss.item()
    return total, gradients([gpt])


def distance(got, want):
    """The largest difference of gradients relative to the largest gradient; what is frozen has none on both sides."""
    assert [name for name in got if got[name] is None] == [name for name in got if want[name] is None]
    largest = max(gradient.abs().max() for gradient in want.values() if gradient is not None)
    apart = [(got[name] - want[name]).abs().max() for name in got if got[name] is not None]
    return (max(apart) / largest).item() if apart else 0.0


def all_cases():
    found = {}
    for kind in KINDS:
        for make, microbatches, chunks in CASES:
            schedule = make(dist.get_world_size(), microbatches, *([chunks] if chunks > 1 else []))
            stages = split_gpt(model(kind), dist.get_world_size(), chunks)[dist.get_rank()]
            pipe = Pipeline(schedule, stages, mean_loss)
            x, y = batch(microbatches)
            first, last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1
            loss = pipe.step(x if first else None, y if last else None)
            sum_tied_(stages)
            found[kind, make.__name__, microbatches] = loss.item(), gradients(stages), pipe.peak, peak_live(schedule)
    return found


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    return launch(all_cases, request.param, timeout=WAIT)


def apart(ranks, kind, seen):
    """Compare each case of this kind with one process, and nothing may be missing."""
    for make, microbatches, _ in CASES:
        loss, want = one_process(kind, microbatches)
        whole = {}
        for answers in ranks:
            got, own, _, _ = answers[kind, make.__name__, microbatches]
            assert got == pytest.approx(loss, abs=1e-6)
            seen(distance(own, want))
            whole |= own
        assert whole.keys() == want.keys()


PIPELINE = "distributed.pipeline.Pipeline", "distributed.pipeline_stages.split_gpt"
ON = "1, 2, 4 ranks, 1, 3, 8 microbatches, four schedules"


@verifies(
    *PIPELINE, kind="equals one process", against="the same microbatches one by one", on=f"untied, {ON}", bound=0.0
)
@pytest.mark.parametrize("kind", ["untied", "untied, frozen"])
def test_gradients_are_bitwise_those_of_one_process(ranks, kind, seen):
    apart(ranks, kind, seen)


@verifies(
    *PIPELINE,
    "distributed.pipeline_stages.sum_tied_",
    kind="equals one process",
    against="the same microbatches one by one; the table's two shares are added in another order",
    on=f"tied, {ON}, relative to the largest gradient",
    bound=1e-6,
)
@pytest.mark.parametrize("kind", ["tied", "tied, frozen"])
def test_gradients_of_a_tied_model_are_those_of_one_process(ranks, kind, seen):
    apart(ranks, kind, seen)


@verifies(
    "distributed.pipeline.Pipeline",
    kind="invariant",
    against="peak_live of the schedule",
    on=f"passes held at once, {ON}",
    bound=0.0,
)
def test_no_rank_holds_more_passes_than_its_schedule_says(ranks, seen):
    for rank, answers in enumerate(ranks):
        for _, _, peak, predicted in answers.values():
            seen(abs(peak - predicted[rank]))


def wrong_ways():
    """What teaching code gets wrong, on 2 ranks with 3 microbatches: gradients by the fault's name."""
    found, (x, y) = {}, batch(3)
    for fault in ("none", "not summed", "summed twice", "sum for mean", "last microbatch only"):
        stages = split_gpt(model("tied"), 2)[dist.get_rank()]
        scale = 3 if fault == "sum for mean" else 1
        wanted = slice(2, 3) if fault == "last microbatch only" else slice(3)
        schedule = gpipe(2, 1 if fault == "last microbatch only" else 3)
        run(
            schedule,
            stages,
            x[wanted],
            y[wanted],
            lambda scores, target, scale=scale: scale * mean_loss(scores, target),
        )
        for _ in range({"not summed": 0, "summed twice": 2}.get(fault, 1)):
            sum_tied_(stages)
        found[fault] = gradients(stages)
    return found


@verifies(
    "distributed.pipeline.run",
    "distributed.pipeline_stages.sum_tied_",
    kind="equals one process",
    against="the same comparison refuses a tied gradient not summed or summed twice, a sum for a mean, one microbatch",
    on="2 ranks, 3 microbatches",
    bound=1e-6,
)
def test_known_wrong_ways_are_caught(seen):
    want = one_process("tied", 3)[1]
    for answers in launch(wrong_ways, 2, timeout=WAIT):
        seen(distance(answers.pop("none"), want))
        assert min(distance(got, want) for got in answers.values()) > 0.1


def steps_and_groups():
    """Two pipelines of two ranks side by side, each on its own data: three times two backward passes and a step."""
    replica = dist.get_rank() % 2
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[replica]
    stages = split_gpt(model("tied"), 2)[dist.get_rank(group)]
    pipe = Pipeline(one_f_one_b(2, 3), stages, mean_loss, group=group)
    optimizer = torch.optim.SGD([p for stage in stages for p in stage.parameters()], lr=0.5)
    losses = []
    for step in range(3):
        for seed in (2 * step, 2 * step + 1):
            losses.append(pipe.step(*batch(3, seed + 10 * replica)).item())
        sum_tied_(stages, group=group)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [stage.state_dict() for stage in stages]


@verifies(
    *PIPELINE,
    "distributed.pipeline_stages.sum_tied_",
    "distributed.pipeline_stages.join_states",
    "distributed.pipeline_stages.GPTStage",
    kind="equals one process",
    against="the weights of one process after three steps of SGD",
    on="ranks 0 and 2, and beside them 1 and 3; two passes accumulated a step",
    bound=1e-6,
)
def test_two_pipelines_in_groups_train_as_one_process_and_join_again(seen):
    answers = launch(steps_and_groups, 4, timeout=WAIT)
    for number, members in enumerate(([0, 2], [1, 3])):
        gpt = model("tied")
        optimizer = torch.optim.SGD(gpt.parameters(), lr=0.5)
        for step in range(3):
            for seed in (2 * step, 2 * step + 1):
                loss = sum(mean_loss(gpt(x), y) for x, y in zip(*batch(3, seed + 10 * number), strict=True)) / 3
                loss.backward()
                assert all(answers[i][0][seed] == pytest.approx(loss.item(), abs=1e-5) for i in members)
            optimizer.step()
            optimizer.zero_grad()
        whole = model("tied")
        whole.load_state_dict(join_states([state for i in members for state in answers[i][1]]))
        seen(max((a - b).abs().max().item() for a, b in zip(whole.parameters(), gpt.parameters(), strict=True)))


def torch_cases(cases):
    """Loss and gradients of torch's pipelining and of ours, for each case."""
    ranks, rank, found = dist.get_world_size(), dist.get_rank(), []
    for theirs, make, microbatches, chunks in cases:
        x, y = batch(microbatches)
        stages = split_gpt(model("tied"), ranks, chunks)[rank]
        wrapped = [
            PipelineStage(stage, chunk * ranks + rank, ranks * chunks, torch.device("cpu"))
            for chunk, stage in enumerate(stages)
        ]
        schedule = theirs(wrapped if chunks > 1 else wrapped[0], microbatches, loss_fn=mean_loss)
        losses = []
        schedule.step(
            *([torch.cat(x)] if rank == 0 else []),
            **({"target": torch.cat(y), "losses": losses} if rank == ranks - 1 else {}),
        )
        sum_tied_(stages)
        ours = split_gpt(model("tied"), ranks, chunks)[rank]
        loss = run(make(ranks, microbatches, *([chunks] if chunks > 1 else [])), ours, x, y, mean_loss)
        sum_tied_(ours)
        apart = abs(sum(losses).item() / microbatches - loss.item()) if losses else 0.0
        assert apart < 1e-6  # we add up in float64
        found.append(distance(gradients(ours), gradients(stages)))
    return found


PAIRS = [(ScheduleGPipe, gpipe, 1), (Schedule1F1B, one_f_one_b, 1), (ScheduleInterleaved1F1B, interleaved, 2)]


@verifies(
    *PIPELINE,
    "distributed.pipeline.run",
    kind="parity",
    against="torch.distributed.pipelining PipelineStage with ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B",
    on="2 and 4 ranks, 4 and 8 microbatches; gradients (losses within 1e-6)",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_torch_bit_for_bit_where_the_microbatches_are_a_power_of_two(ranks, seen):
    cases = [(theirs, ours, m, chunks) for theirs, ours, chunks in PAIRS for m in (4, 8)]
    for answers in launch(torch_cases, ranks, cases, timeout=WAIT):
        for difference in answers:
            seen(difference)


@verifies(
    "distributed.pipeline.Pipeline",
    kind="parity",
    against="torch.distributed.pipelining, which divides the summed gradients at the end where we divide each loss",
    on="2 ranks, 3 microbatches, relative to the largest gradient",
    bound=1e-6,
)
def test_equals_torch_to_rounding_else(seen):
    cases = [(theirs, ours, 3, chunks) for theirs, ours, chunks in PAIRS]
    for answers in launch(torch_cases, 2, cases, timeout=WAIT):
        for difference in answers:
            seen(difference)


def held_bytes(shapes):
    """Peak bytes of activations of a step on this rank, and the bytes that went out, for each schedule."""
    rank, found, sent = dist.get_rank(), [], []
    isend = dist.isend
    dist.isend = lambda tensor, *args, **kw: sent.append(tensor.nbytes) or isend(tensor, *args, **kw)
    for make, microbatches, chunks in shapes:
        stages = split_gpt(model("tied"), dist.get_world_size(), chunks)[rank]
        schedule = make(dist.get_world_size(), microbatches, *([chunks] if chunks > 1 else []))
        pipe = Pipeline(schedule, stages, mean_loss)
        meters, traffic = [], []
        for _ in range(2):
            sent.clear()
            with ActivationMeter(*stages) as meter:
                pipe.step(*batch(microbatches))
            meters.append((meter.peak, meter.held))
            traffic.append(sum(sent))
        found.append((meters, traffic))
    return found


def predicted_bytes(stage, stages):
    """What one microbatch (2 sequences of 8 tokens) keeps, that of the loss included."""
    layers = costs.gpt_stages(config(), stages, tokens=8)[stage]
    kept = 2 * 4 * costs.total(layers).activations
    kept += 2 * 4 * 8 if stage == 0 else 0  # the numbers of tokens are 8 bytes, not 4
    loss = 2 * 8 * 32 * 4 + 2 * 8 * 8 + 4  # log-probabilities, targets, the number of them
    return kept + (loss if stage == stages - 1 else 0)


SHAPES = [(gpipe, 2, 1), (gpipe, 8, 1), (one_f_one_b, 8, 1), (interleaved, 8, 2)]


@verifies(
    "distributed.activations.ActivationMeter",
    "costs.live_passes",
    "costs.gpt_stages",
    "costs.boundary_bytes",
    kind="invariant",
    against="passes held at once x the stage's activations; messages x tokens x width",
    on="the bytes that autograd holds and that isend gets, on 2 ranks and on 4; relative",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_held_and_sent_are_those_predicted(ranks, seen):
    answers = launch(held_bytes, ranks, SHAPES, timeout=WAIT)
    for rank, found in enumerate(answers):
        for (make, microbatches, chunks), (meters, traffic) in zip(SHAPES, found, strict=True):
            schedule = make(ranks, microbatches, *([chunks] if chunks > 1 else []))
            each = [predicted_bytes(chunk * ranks + rank, ranks * chunks) for chunk in range(chunks)]
            held = peak = 0
            for op in schedule[rank]:
                held += each[op.chunk] if op.kind == "F" else -each[op.chunk]
                peak = max(peak, held)
            assert [left for _, left in meters] == [0, 0], "nothing is held after the step"
            seen(abs(meters[0][0] / peak - 1))
            tensor = 2 * 8 * 16 * 4
            out = sum(m.sender == rank for m in messages(schedule)) * tensor
            headers = sum(m.made.kind == "F" for m in messages(schedule) if m.sender == rank) // microbatches
            seen(abs(traffic[0] - out - headers * 80))
            seen(abs(traffic[1] - out))
    total = sum(found[2][1][1] for found in answers)
    seen(abs(total - (ranks - 1) * costs.boundary_bytes(16, 8 * 16)))


def odd_models():
    """Stages that are not GPTs: other shapes and types at each cut, a stage without parameters, one wholly frozen."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Linear(7, 2)]
    whole = nn.Sequential(*layers).double()
    layers[2].requires_grad_(False)
    x = torch.arange(18.0, dtype=torch.float64).view(3, 2, 3)
    y = torch.ones(3, 2, 2, dtype=torch.float64)
    stage = layers[dist.get_rank()]
    loss = run(one_f_one_b(4, 3), [stage], list(x), list(y), F.mse_loss)
    got = [p.grad for p in stage.parameters()]
    for p in stage.parameters():
        p.grad = None
    for a, b in zip(x, y, strict=True):
        (F.mse_loss(whole(a), b) / 3).backward()
    return loss.item() - F.mse_loss(whole(x), y).item(), got, [p.grad for p in stage.parameters()]


def test_any_module_can_be_a_stage():
    for apart, got, want in launch(odd_models, 4, timeout=WAIT):
        assert abs(apart) < 1e-12
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


RING = ((Op("F", 0), Op("B", 0), Op("F", 1), Op("B", 1)), (Op("F", 1), Op("B", 1), Op("F", 0), Op("B", 0)))


def refusals():
    """What each wrong call says on this rank."""
    stages, (x, y) = split_gpt(model("tied"), 2)[dist.get_rank()], batch(2)
    whole_numbers = Pipeline(gpipe(2, 2), [nn.Identity()], mean_loss)
    pipe = Pipeline(gpipe(2, 2), stages, mean_loss)
    calls = {
        "ring": lambda: Pipeline(RING, stages, mean_loss),
        "ranks": lambda: Pipeline(gpipe(3, 2), stages, mean_loss),
        "stages": lambda: Pipeline(gpipe(2, 2), [*stages, *stages], mean_loss),
        "count": lambda: pipe.step(x[:1], y[:1]),
        "type": lambda: whole_numbers.step(x, y) if dist.get_rank() == 0 else None,
        "shape": lambda: pipe.step([x[0], x[1][:1]], y) if dist.get_rank() == 0 else pipe.step(None, None),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


@verifies(
    "distributed.pipeline.Pipeline",
    "distributed.pipeline.run",
    kind="message",
    against="ValueError that says what and how much",
    on="a deadlocking order, wrong numbers of ranks, stages and microbatches, two shapes",
)
def test_wrong_calls_are_refused_on_the_rank_that_can_tell():
    first, second = launch(refusals, 2, timeout=WAIT)
    for said in (first, second):
        assert said["ring"].startswith("the schedule never ends: rank 0 waits before B0 for rank 1's B0")
        assert "3 ranks with 1 chunks each needs as many ranks and stages, got 2 ranks and 1 stages" in said["ranks"]
        assert "got 2 ranks and 2 stages" in said["stages"]
    assert first["count"] == "rank 0 needs inputs for 2 microbatches, got 1"
    assert second["count"] == "rank 1 needs targets for 2 microbatches, got 1"
    assert first["shape"] == "inputs must be microbatches of one shape, got [(1, 8), (2, 8)]"
    assert first["type"] == "a stage must give one floating-point tensor, got torch.int64 [2, 8]"
    assert second["shape"] == "rank 1 needs targets for 2 microbatches, got None"


@verifies(
    "distributed.pipeline_stages.split_gpt",
    "distributed.pipeline_stages.GPTStage",
    "distributed.pipeline_stages.join_states",
    "costs.block_ranges",
    kind="invariant",
    against="the whole model's scores and state dict",
    on="tied and untied, 1-8 stages; also on the meta device",
    bound=0.0,
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (8, 1), (2, 4)])
def test_the_stages_one_after_the_other_are_the_model(kind, ranks, chunks, seen):
    gpt, x = model(kind), batch(1)[0][0]
    cut = split_gpt(gpt, ranks, chunks)
    y = x
    for stage in range(ranks * chunks):
        y = cut[stage % ranks][stage // ranks](y)
    seen((y - gpt(x)).abs().max().item())
    joined = join_states([stage.state_dict() for stages in cut for stage in stages])
    assert joined.keys() == gpt.state_dict().keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in gpt.state_dict().items())
    assert isinstance(cut[0][0], GPTStage)
    with torch.device("meta"):
        empty = split_gpt(GPT(config(), generator=None), ranks, chunks)
    assert empty[-1][-1](torch.empty(2, 8, 16, device="meta") if ranks * chunks > 1 else x.to("meta")).shape == (
        2,
        8,
        32,
    )


def test_wrong_cuts_and_unequal_copies_are_named():
    with pytest.raises(TypeError, match=r"gpt must be a models.GPT, got Linear"):
        split_gpt(nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="at least one block a stage, got layers=8 for stages=9"):
        split_gpt(model("tied"), 3, 3)
    with pytest.raises(ValueError, match="copies of 'w' differ by up to 1: were their gradients summed"):
        join_states([{"w": torch.ones(2)}, {"w": torch.zeros(2)}])


@verifies(
    "distributed.activations.ActivationMeter",
    kind="invariant",
    against="the bytes counted by hand",
    on="a chain of two products: up in the forward pass, down in the backward pass",
)
def test_the_meter_counts_a_storage_once_and_parameters_never():
    layer = SimpleNamespace(linear=nn.Linear(4, 4, bias=False))
    x = torch.ones(2, 4, requires_grad=True)
    with ActivationMeter(layer.linear) as meter:
        y = layer.linear(x)
        assert meter.held == 2 * 4 * 4, "its input; the weight is a parameter"
        z = (y * y).sum()
        assert meter.held == 2 * 2 * 4 * 4, "y counts once"
        z.backward()
    assert (meter.held, meter.peak) == (0, 2 * 2 * 4 * 4)
