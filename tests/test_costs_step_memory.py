"""What a step keeps, by kind: predicted by costs, counted from the memory behind the tensors."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from bigmodel_course import costs
from bigmodel_course.memory import LiveBytes
from bigmodel_course.models import GPT
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.train import recompute_blocks_

CONFIG = costs.GPTConfig(layers=4, heads=4, width=232, context=128)


def measured(*, accumulate: int = 1, recompute: bool = False, autocast: bool = False) -> dict[str, int]:
    """One step after a first one, on 4 sequences of 128 tokens."""
    model = GPT(CONFIG, generator=torch.Generator().manual_seed(0))
    if recompute:
        recompute_blocks_(model)
    tokens = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(1))
    with LiveBytes() as live:
        live.add(list(model.parameters()))
        found = {"parameters": live.now()}
        optimizer = Optimizer(model.parameters(), AdamW(), lr=1e-3)
        for _ in range(2):
            live.peak, found["kept"], start = 0, 0, live.now()
            for part in tokens.chunk(accumulate):
                before = live.now()
                with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                    loss = F.cross_entropy(model(part).flatten(0, 1).float(), part.flatten())
                found["kept"] = max(found["kept"], live.now() - before)
                loss.backward()
                del loss
            found |= {"gradients": live.now() - start, "peak": live.peak}
            optimizer.step()
            optimizer.zero_grad()
        found["optimizer"] = live.now() - found["parameters"]
    return found


REMEDIES = {
    "none": {},
    "four parts": {"accumulate": 4},
    "recomputed blocks": {"recompute": True},
    "autocast": {"autocast": True},
    "all": {"accumulate": 4, "recompute": True, "autocast": True},
}


@pytest.mark.verifies(
    "costs.step_bytes",
    "costs.StepBytes",
    kind="parity",
    against="memory.LiveBytes",
    on="each kind and the peak of a 2.7M GPT's step: plain, in parts, recomputed, autocast, all; relative",
    bound=0.1,
)
@pytest.mark.parametrize("name", REMEDIES)
def test_each_kind_is_what_is_counted(name, seen):
    found, told = measured(**REMEDIES[name]), costs.step_bytes(CONFIG, 4, 128, **REMEDIES[name])
    for kind in ("parameters", "gradients", "optimizer", "peak"):
        seen(abs(getattr(told, kind) / found[kind] - 1))
    if name != "all":  # autocast's copies go with the forward pass, and with recomputed blocks nothing else stays
        seen(abs((told.activations + told.copies) / found["kept"] - 1))


@pytest.mark.verifies("costs.step_bytes", kind="invariant", against="costs.sharded_bytes", on="stages 0 to 3, 4 ranks")
@pytest.mark.parametrize("stage", range(4))
def test_states_are_those_of_the_stage(stage):
    block = 12 * 232**2 + 13 * 232
    root = (256 + 128 + 2) * 232
    told = costs.step_bytes(CONFIG, 4, 128, ranks=4, stage=stage)
    states = costs.sharded_bytes([block] * 4 + [root], 4, stage, rule="AdamW")
    assert (told.parameters, told.gradients, told.optimizer) == tuple(states)


@pytest.mark.verifies("costs.step_bytes", kind="message", against="an error's words", on="parts that do not divide")
def test_parts_must_divide_the_sequences():
    with pytest.raises(ValueError, match="need sequences that accumulate divides, got sequences=4 and accumulate=3"):
        costs.step_bytes(CONFIG, 4, 128, accumulate=3)
