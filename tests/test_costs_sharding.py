"""What `costs` says of a rank is what torch's own code asks for, up to 16,384 of them, whatever divides unevenly."""

import pytest

from bigmodel_course import costs
from bigmodel_course.simulate import simulate

# 997 and 1001 tokens, 56 and 72 numbers in a row: next to nothing divides evenly by 8, 512 or 16,384.
SHAPES = {
    "Llama": costs.Transformer(2, 64, 8, 1001, 32, hidden=200, key_value_heads=8, gated=True, tied=False),
    "GPT": costs.Transformer(2, 72, 8, 997, 32),
}
RANKS = [(8, 1), (4, 2), (512, 1), (64, 8), (16_384, 1), (2048, 8)]


@pytest.mark.verifies(
    "costs.sharded_step",
    "costs.ShardedStep",
    kind="parity",
    against="torch's FSDP2 and tensor parallelism on a fake process group",
    on="GPT and Llama shapes on 8, 512 and 16,384 ranks: parameters, FLOPs, messages and numbers of each collective",
    bound=0.0,
)
@pytest.mark.parametrize(("data", "tensor"), RANKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_rank_of_any_cluster_asks_for_what_was_predicted(shape, data, tensor, seen):
    step, told = simulate(shape, data, tensor), costs.sharded_step(shape, data, tensor)
    assert step.messages == told.messages
    assert step.numbers.keys() == told.numbers.keys()
    seen(abs(step.parameters - told.parameters))
    seen(abs(step.flops - told.flops))
    for key, numbers in step.numbers.items():
        seen(abs(numbers - told.numbers[key]))
