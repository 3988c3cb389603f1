"""What only GPUs can show: each way to divide the work ends, on two GPUs with NCCL, where it ends on the CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from bigmodel_course.distributed import collectives
from bigmodel_course.distributed.data_parallel import DataParallel
from bigmodel_course.distributed.launch import device, launch
from bigmodel_course.distributed.pipeline import Pipeline
from bigmodel_course.distributed.pipeline_schedules import one_f_one_b
from bigmodel_course.distributed.pipeline_stages import split_gpt
from bigmodel_course.distributed.sharded import Sharded
from bigmodel_course.models import GPT, GPTConfig
from bigmodel_course.optim import AdamW, Optimizer

CONFIG = GPTConfig(layers=2, heads=2, width=16, context=8, vocabulary=32, tied=False)


def model() -> GPT:
    return GPT(CONFIG, generator=torch.Generator().manual_seed(0)).to(device())


def tokens(rows: int) -> tuple[Tensor, Tensor]:
    both = torch.randint(32, (rows, 9), generator=torch.Generator().manual_seed(1)).to(device())
    return both[:, :-1], both[:, 1:]


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, 1), targets.flatten())


def mine(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def sums() -> list[Tensor]:
    x = torch.arange(1001.0, device=device()) * (dist.get_rank() + 1)
    collectives.all_reduce_(x)
    return [x, collectives.all_gather(collectives.reduce_scatter(x), lengths=[501, 500])]


def data_parallel() -> list[Tensor]:
    parallel = DataParallel(model())
    optimizer = Optimizer(parallel.parameters(), AdamW(), lr=1e-2)
    x, y = tokens(4)
    for _ in range(3):
        optimizer.zero_grad()
        loss(parallel(mine(x)), mine(y)).backward()
        optimizer.step()
    return [p.detach() for p in parallel.parameters()]


def sharded(stage: int) -> list[Tensor]:
    gpt = model()
    states = Sharded(gpt, lambda shards: Optimizer(shards, AdamW(), lr=1e-2), stage=stage)
    x, y = tokens(4)
    for _ in range(3):
        loss(gpt(mine(x)), mine(y)).backward()
        states.step(clip_norm=1.0)
    return list(states.state_dict().values())


def pipeline() -> list[Tensor]:
    ranks = dist.get_world_size()
    stages = split_gpt(model(), ranks)[dist.get_rank()]
    x, y = tokens(4)
    Pipeline(one_f_one_b(ranks, 4), stages, loss).step(x.chunk(4), y.chunk(4))
    return [p.grad for stage in stages for p in stage.parameters()]


WAYS: dict[str, Callable[[], list[Tensor]]] = {
    "collectives": sums,
    "data parallel": data_parallel,
    **{f"sharded, stage {stage}": (lambda stage=stage: sharded(stage)) for stage in (1, 2, 3)},
    "pipeline": pipeline,
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL with two ranks needs two GPUs, and they are not here")
@pytest.mark.parametrize("way", WAYS)
def test_ends_on_gpus_where_it_ends_on_the_cpu(way):
    on_gpus, on_cpu = (launch(WAYS[way], 2, backend=backend, timeout=300) for backend in ("nccl", "gloo"))
    for theirs, ours in zip(on_gpus, on_cpu, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_that_gpus_are_asked_for_runs_on_the_cpu(way):
    results = launch(WAYS[way], 2, backend="gloo", timeout=300)
    assert all(bool(tensor.isfinite().all()) for result in results for tensor in result)
