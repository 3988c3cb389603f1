"""Averaged weights are local SGD: the same as averaged gradients for one plain step, and something else for more."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bigmodel_course.data import Dataset
from bigmodel_course.distributed.averaging import (
    average_models_,
    broadcast_tensors_,
    replicas_differ,
    share_model_,
    trainable,
)
from bigmodel_course.distributed.data_parallel import DataParallel, sharded_batches
from bigmodel_course.distributed.launch import launch
from bigmodel_course.models import digit_model
from bigmodel_course.optim import HeavyBall, Optimizer

PATIENT = 300.0  # seconds: on a busy machine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(every, mu=0.0):
    """The digit model's weights after 12 steps on uneven parts; every = 0 averages gradients in place of weights."""
    model = digit_model(generator=generator()).double()
    parallel = model if every else DataParallel(model)
    optimizer, rng = Optimizer(model.parameters(), HeavyBall(mu=mu), lr=0.1), generator(1)
    x, y = torch.rand(300, 64, dtype=torch.float64, generator=rng), torch.randint(10, (300,), generator=rng)
    for step, (part, weight) in enumerate(sharded_batches(Dataset(x, y), 25, seed=0, epoch=0)):
        optimizer.zero_grad()
        (F.cross_entropy(parallel(part.x), part.y) * weight).backward()
        optimizer.step()
        if every and (step + 1) % every == 0:
            average_models_(model)
    return [p.detach() for p in model.parameters()]


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


def local_sgd():
    reference, heavy = trained(0), trained(0, mu=0.9)
    return {
        "1": apart(trained(1), reference),
        "4": apart(trained(4), reference),
        "1 heavy": apart(trained(1, mu=0.9), heavy),
    }


@functools.cache
def measured():
    return launch(local_sgd, 2, timeout=PATIENT)


@pytest.mark.verifies(
    "distributed.averaging.average_models_",
    kind="invariant",
    against="DataParallel: with plain SGD, averaging weights after each step is averaging gradients",
    on="the digit model, 12 steps of 25 examples, 2 ranks, float64",
    bound=1e-14,
)
def test_averaging_weights_after_each_plain_step_is_data_parallelism(seen):
    for found in measured():
        seen(found["1"])


def test_momentum_in_linear_rules_too_but_rarer_averaging_is_another_algorithm():
    for found in measured():
        assert found["1 heavy"] < 1e-13  # linear in the gradient: each rank's velocity averages to the velocity
        assert found["4"] > 1e-3


def replicas():
    """What the comparison says of replicas after each change, in turn."""
    rank, said = dist.get_rank(), []
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.bfloat16))
    said.append(replicas_differ(model))  # each rank drew its own weights
    share_model_(model)
    said.append(replicas_differ(model))
    with torch.no_grad():
        model[2].bias[1] = -0.0 if rank else 0.0
        said.append(replicas_differ(model))
        model[2].bias.fill_(float("nan"))
        said.append(replicas_differ(model))
        model[1].num_batches_tracked.fill_(rank)
        said.append(replicas_differ(model))
        model[0].weight[2, 1] += 1e-7 * rank
        said.append(replicas_differ(model))
    broadcast_tensors_([*model.buffers(), model[0].weight.data])
    return [*said, replicas_differ(model), replicas_differ(nn.ReLU())]


@pytest.mark.verifies(
    "distributed.averaging.replicas_differ",
    "distributed.averaging.share_model_",
    "distributed.averaging.broadcast_tensors_",
    kind="invariant",
    against="names the first tensor of which one bit differs; equal NaNs are equal, -0.0 is not 0.0",
    on="float32, bfloat16 and int64 tensors on 2 ranks",
)
def test_names_the_first_tensor_that_differs_by_a_bit():
    for said in launch(replicas, 2, timeout=PATIENT):
        assert said[0] == "0.weight"
        assert said[1:] == [None, "2.bias", None, "1.num_batches_tracked", "0.weight", None, None]


def means():
    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        for i, t in enumerate([*model.parameters(), *model.buffers()]):
            t.fill_(10 * i + dist.get_rank() + 1)
    average_models_(model, weight=[0.5, 1.5][dist.get_rank()])
    return {name: t.flatten()[0].item() for name, t in model.state_dict().items()}


@pytest.mark.verifies(
    "distributed.averaging.average_models_",
    "distributed.averaging.trainable",
    kind="invariant",
    against="the weighted mean; whole numbers stay as they are",
    on="a BatchNorm on 2 ranks with a quarter and three quarters of the examples",
)
def test_the_mean_is_weighted_and_counts_stay():
    for rank, got in enumerate(launch(means, 2, timeout=PATIENT)):
        assert got.pop("num_batches_tracked") == 41 + rank
        assert got == {"weight": 1.75, "bias": 11.75, "running_mean": 21.75, "running_var": 31.75}
    names, params = trainable(model := nn.Linear(2, 1))
    assert (names, params) == (("weight", "bias"), (model.weight, model.bias))
