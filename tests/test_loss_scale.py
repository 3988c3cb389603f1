"""Loss scaling: the numbers of torch's GradScaler, a step skipped by all ranks, small gradients kept."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bigmodel_course.distributed.launch import launch
from bigmodel_course.loss_scale import LossScale
from bigmodel_course.models import MLP


@pytest.mark.verifies(
    "loss_scale.LossScale",
    kind="parity",
    against="torch.amp.GradScaler on the CPU",
    on="30 steps in float16, some of which overflow: scales and bits of all weights",
    bound=0.0,
)
def test_scales_and_weights_are_those_of_torch(seen):
    ours = MLP((8, 16, 4), generator=torch.Generator().manual_seed(0))
    theirs = copy.deepcopy(ours)
    scale = LossScale(2.0**20, patience=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    skipped = 0
    for step in range(30):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.float16):
            losses = [F.cross_entropy(model(x), x[:, :4].argmax(1)) for model in (ours, theirs)]
        (losses[0] * scale.value).backward()
        scaler.scale(losses[1]).backward()
        finite = scale.unscale_(p.grad for p in ours.parameters())
        skipped += not finite
        if finite:
            optimizers[0].step()
        scale.update(finite)
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        seen(abs(scale.value - scaler.get_scale()))
        seen(max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)))
    assert 2 <= skipped < 20


@pytest.mark.verifies(
    "loss_scale.LossScale", kind="invariant", against="each rank's answer", on="an overflow on one rank of two"
)
def test_a_step_that_one_rank_must_skip_is_skipped_by_all():
    def body():
        scale = LossScale(4.0)
        broken = torch.tensor([float("inf") if dist.get_rank() else 1.0])
        return scale.unscale_([broken]), scale.unscale_([torch.tensor([8.0])]), broken

    (first, again, grad), (second, _, _) = launch(body, 2, timeout=300)
    assert (first, second, again) == (False, False, True)
    assert grad == 0.25


@pytest.mark.verifies("loss_scale.LossScale", kind="invariant", against="0", on="a gradient of 1e-8 in float16")
def test_what_float16_cannot_hold_survives_with_a_scale():
    assert torch.tensor(1e-8).half() == 0
    kept = [(torch.tensor(1e-8) * 2.0**16).half().float()]
    assert LossScale(2.0**16).unscale_(kept)
    assert kept[0] == pytest.approx(1e-8, rel=1e-3)


@pytest.mark.verifies(
    "loss_scale.LossScale", kind="message", against="an error's words", on="a scale of 0, no patience"
)
def test_wrong_scales_are_refused():
    with pytest.raises(ValueError, match=r"value must be a scale above 0, got 0\.0"):
        LossScale(0.0)
    with pytest.raises(ValueError, match="patience must be at least 1 step, got 0"):
        LossScale(patience=0)
