"""A step on a cluster that is not there asks for what a real one asks for, and `costs` predicts each count."""

import pytest
import torch
import torch.distributed as dist

from bigmodel_course import costs, simulate
from bigmodel_course.distributed.launch import launch

SHAPES = {
    "Llama": costs.Transformer(3, 64, 8, 1001, 32, hidden=192, key_value_heads=4, gated=True, tied=False),
    "GPT": costs.Transformer(2, 64, 8, 997, 32),
    "GPT, untied": costs.Transformer(2, 64, 4, 1000, 16, tied=False),
}
LAYOUTS = [(1, 1), (8, 1), (3, 1), (1, 2), (4, 2), (5, 4), (128, 4)]  # on 1 to 512 ranks; many of them divide unevenly


def differences(step: simulate.Step, predicted: costs.ShardedStep) -> dict[str, float]:
    """Relative differences of parameters, bytes by collective (and their number), and FLOPs."""
    keys = predicted.numbers.keys() | step.numbers.keys()
    bytes_off = max((abs(step.numbers[key] - predicted.numbers.get(key, 0)) for key in keys), default=0)
    messages_off = max((abs(step.messages[key] - predicted.messages.get(key, 0)) for key in keys), default=0)
    return {
        "parameters": abs(step.parameters - predicted.parameters),
        "bytes": bytes_off,
        "messages": messages_off,
        "flops": abs(step.flops / predicted.flops - 1),
    }


@pytest.mark.verifies(
    "costs.sharded_step",
    "costs.ShardedStep",
    kind="parity",
    against="torch's FSDP2 and tensor parallelism on a fake process group",
    on="parameters, bytes, messages and FLOPs of a rank; GPT and Llama shapes, 1 to 512 ranks, uneven shards",
    bound=0.0,
)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_costs_predicts_what_torch_asks_for(shape, recompute, seen):
    for data, tensor in LAYOUTS:
        options = {"sequences": 2, "recompute": recompute}
        step = simulate.simulate(shape, data, tensor, **options)
        for difference in differences(step, costs.sharded_step(shape, data, tensor, **options)).values():
            seen(difference)


@pytest.mark.verifies(
    "costs.sharded_step",
    kind="parity",
    against="torch's FSDP2 and tensor parallelism on a fake process group",
    on="one block of Llama 3 405B on 16,384 ranks: parameters, bytes, messages, FLOPs",
    bound=0.0,
)
def test_a_block_of_the_largest_llama_on_16384_ranks(seen):
    shape = costs.Transformer(1, 16_384, 128, 128_256, 8192, 53_248, 8, gated=True, tied=False)
    step = simulate.simulate(shape, 2048, 8, recompute=True)
    for difference in differences(step, costs.sharded_step(shape, 2048, 8, recompute=True)).values():
        seen(difference)


CASES = [(name, *ranks, again) for name in ("Llama", "GPT") for ranks in ((4, 1), (2, 2)) for again in (False, True)]


def real_steps() -> list[simulate.Step]:
    torch.manual_seed(0)
    shapes = [(SHAPES[name], *rest) for name, *rest in CASES]
    return [simulate._second_step(simulate._sharded(*case), 2, case[0].context) for case in shapes]


@pytest.mark.verifies(
    "simulate.simulate",
    "simulate.Step",
    kind="parity",
    against="the same step on 4 real ranks with Gloo",
    on="every count of rank 0; Llama and GPT shapes, 4 x 1 and 2 x 2, with and without recomputation",
    bound=0.0,
)
def test_fake_ranks_ask_for_what_real_ones_do(seen):
    for (name, data, tensor, again), real in zip(CASES, launch(real_steps, 4, timeout=500)[0], strict=True):
        fake = simulate.simulate(SHAPES[name], data, tensor, sequences=2, recompute=again)
        seen(0.0 if real == fake else 1.0)


@pytest.mark.verifies(
    "simulate.Decoder",
    "costs.Transformer",
    "costs.Matrix",
    kind="invariant",
    against="the module's own parameters",
    on="number of parameters of each shape",
    bound=0.0,
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_decoder_has_the_parameters_of_its_shape(shape, seen):
    with torch.device("meta"):
        decoder = simulate.Decoder(shape)
    seen(abs(sum(p.numel() for p in decoder.parameters()) - shape.parameters))
    shapes = sorted(tuple(p.shape) for p in decoder.blocks[0].parameters())
    assert shapes == sorted(matrix.shape for matrix in shape.block())


@pytest.mark.verifies("simulate.simulate", kind="message", against="an error's words", on="layouts that cannot be run")
def test_says_what_cannot_be_simulated():
    shape = SHAPES["Llama"]
    with pytest.raises(ValueError, match=r"need tokens and key_value_heads that tensor=8 divides"):
        simulate.simulate(shape, 1, 8)
    with pytest.raises(ValueError, match=r"tensor=3"):
        simulate.simulate(shape, 1, 3)
    assert not dist.is_initialized()


def test_leaves_no_process_group_behind_when_a_step_fails():
    with pytest.raises(ValueError, match="sequences"):
        simulate.simulate(SHAPES["GPT"], 2, sequences=0)
    assert not dist.is_initialized()


def inside_a_group() -> str:
    try:
        simulate.simulate(SHAPES["GPT"], 2)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_refuses_to_run_where_a_process_group_exists():
    assert launch(inside_a_group, 1, timeout=500) == [
        "simulate makes a process group of its own: call it where none exists"
    ]
