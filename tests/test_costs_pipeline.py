"""What `costs` says of a pipeline: by hand where it is small, and for the published setting.

The simulated and the run pipeline are compared in test_distributed_pipeline_schedules and test_distributed_pipeline.
"""

import pytest
import torch

from bigmodel_course import costs
from bigmodel_course.distributed.pipeline_stages import split_gpt
from bigmodel_course.models import GPT

verifies = pytest.mark.verifies


@verifies(
    "costs.bubble_fraction",
    kind="invariant",
    against="Narayanan et al. 2021, section 2.2: idle over busy time (p - 1) / m, and a v-th of it",
    on="8 ranks, 64 microbatches, 1 and 4 chunks",
    bound=1e-12,
)
def test_idle_over_busy_time_is_the_papers(seen):
    for chunks in (1, 4):
        idle = costs.bubble_fraction(8, 64, chunks=chunks)
        seen(abs(idle / (1 - idle) - 7 / (64 * chunks)))
    assert costs.bubble_fraction(2, 16) == 1 / 17, "so two ranks are 1.88 times as fast as one, not 2"
    assert costs.bubble_fraction(1, 3) == 0


@verifies(
    "costs.block_ranges",
    "costs.gpt_stages",
    kind="invariant",
    against="parameters counted in the stages of models.GPT; the whole model's layers",
    on="tied and untied, 1-4 stages of 6 blocks",
    bound=0.0,
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_stage_has_the_parameters_that_are_counted(tied, stages, seen):
    config = costs.GPTConfig(layers=6, heads=2, width=8, context=4, vocabulary=16, tied=tied)
    cut = costs.gpt_stages(config, stages)
    with torch.device("meta"):
        real = split_gpt(GPT(config, generator=None), stages)
    for layers, (stage,) in zip(cut, real, strict=True):
        seen(abs(costs.total(layers).parameters - sum(p.numel() for p in stage.parameters())))
    whole, together = costs.total(costs.gpt(config)), costs.total([layer for layers in cut for layer in layers])
    assert whole[2:] == together[2:], "FLOPs and activations stay"
    assert together.parameters - whole.parameters == (16 * 8 if tied and stages > 1 else 0), "the head's own copy"


@verifies(
    "costs.block_ranges",
    kind="invariant",
    against="every block once, lengths that differ by at most one",
    on="1-12 blocks",
)
def test_blocks_are_divided_evenly():
    for layers in range(1, 13):
        for stages in range(1, layers + 1):
            ranges = costs.block_ranges(layers, stages)
            assert [i for r in ranges for i in r] == list(range(layers))
            assert {len(r) for r in ranges} <= {layers // stages, layers // stages + 1}


@verifies(
    "costs.pipeline_messages",
    "costs.boundary_bytes",
    kind="invariant",
    against="counted by hand",
    on="4 ranks, 8 microbatches, a width of 768",
)
def test_interleaving_sends_more_over_more_cuts():
    assert costs.pipeline_messages(4, 8) == 8 * 3 * 2
    assert costs.pipeline_messages(4, 8, chunks=2) == 8 * 7 * 2
    assert costs.pipeline_messages(1, 8, chunks=2) == 0
    assert costs.boundary_bytes(8, 1024 * 768, bytes_each=2) == 2 * 8 * 1024 * 768 * 2


@verifies(
    *(f"costs.{name}" for name in ("bubble_fraction", "live_passes", "pipeline_messages", "boundary_bytes")),
    "costs.block_ranges",
    "costs.gpt_stages",
    kind="message",
    against="ValueError that names the argument and what came",
    on="eight wrong calls",
)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costs.bubble_fraction(0, 1), "need ranks >= 1, got ranks=0"),
        (lambda: costs.bubble_fraction(1, 1, chunks=0), "need chunks >= 1"),
        (
            lambda: costs.live_passes("2F2B", 2, 2, 0),
            "need a schedule among gpipe, 1f1b, interleaved, got schedule='2F2B'",
        ),
        (lambda: costs.live_passes("1f1b", 2, 2, 2), "need 0 <= rank < 2, got rank=2"),
        (lambda: costs.pipeline_messages(2, 0), "need microbatches >= 1"),
        (lambda: costs.boundary_bytes(0, 3), "need examples >= 1"),
        (lambda: costs.block_ranges(3, 4), "need at least one block a stage, got layers=3 for stages=4"),
        (lambda: costs.gpt_stages(costs.GPTConfig(2, 1, 4, 4), 3), "need at least one block a stage"),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
