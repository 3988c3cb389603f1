"""Live bytes are those of the memory behind tensors: views once, freed ones not, what autograd saved as well."""

import pytest
import torch
from torch import nn

from bigmodel_course import costs
from bigmodel_course.memory import LiveBytes
from bigmodel_course.models import MLP
from bigmodel_course.optim import Adam, Optimizer

verifies = pytest.mark.verifies


@verifies("memory.LiveBytes", kind="invariant", against="the bytes that were asked for",
          on="views, deleted tensors, tensors that only autograd holds, resized memory", bound=0)  # fmt: skip
def test_counts_memory_and_not_tensors(seen):
    with LiveBytes() as live:
        a = torch.zeros(1000)
        views = [a[:500], a.view(10, 100), a.t()]
        seen(abs(live.now() - 4000))
        b = a.requires_grad_() * 2
        c = b.sin()
        del b  # the backward pass of sin needs it
        seen(abs(live.now() - 12_000))
        c.sum().backward()
        del c
        seen(abs(live.now() - 8000))  # a and its gradient
        seen(abs(live.peak - 20_008))  # a, b, c, the sum and its gradient, the gradient of b
        a.grad.untyped_storage().resize_(0)
        seen(abs(live.now() - 4000))
        del a, views
        seen(live.now())


@verifies("memory.LiveBytes", kind="parity", against="costs.training_bytes",
          on="an MLP with Adam between backward and step, and the peak; relative difference", bound=0.01)  # fmt: skip
def test_training_takes_what_costs_says(seen):
    model = MLP((64, 256, 256, 10), generator=torch.Generator().manual_seed(0))
    n, batch = sum(p.numel() for p in model.parameters()), 2
    with LiveBytes() as live:
        optimizer = Optimizer(model.parameters(), Adam(), lr=0.01)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(torch.ones(batch, 64)), torch.zeros(batch, dtype=torch.int64))
            loss.backward()
            kept = live.now()
            optimizer.step()
            optimizer.zero_grad()
    seen(abs(kept / costs.training_bytes(n, "Adam") - 1))


def test_what_no_operation_touched_can_be_added():
    model = nn.Linear(10, 10)
    with LiveBytes() as live:
        assert live.now() == 0
        live.add(model.state_dict(), [model.weight])
        assert live.now() == 440
