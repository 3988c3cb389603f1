"""Synchronized batch normalization equals one process's, whatever each rank's part of the batch."""

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bigmodel_course.distributed.batch_norm import SyncBatchNorm, synchronize_batch_norm
from bigmodel_course.distributed.launch import launch

PATIENT = 300.0  # seconds: on a busy machine
OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}]
KINDS = {"1d": (nn.BatchNorm1d, ()), "1d long": (nn.BatchNorm1d, (5,)), "2d": (nn.BatchNorm2d, (3, 2))}
PARTS = {1: ([7],), 2: ([4, 4], [5, 2], [6, 0]), 4: ([1, 2, 3, 1],)}
COMPARED = ("y", "dx", "gradients", "buffers", "eval")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(kind, options, dtype=torch.float64):
    norm = kind(3, dtype=dtype, **options)
    for p in norm.parameters():
        nn.init.normal_(p, generator=generator(1))
    return norm


def passed(norm, x, target, factor=1.0):
    """Three steps of training, then eval: outputs, gradients of x, of the parameters, buffers, outputs of eval."""
    outputs, gradients = [], []
    for step in range(3):
        x_step = (x * (step + 1) + 100).requires_grad_()  # far from 0: sums of squares would lose digits
        y = norm(x_step)
        (factor * (y * target).sum()).backward()
        outputs.append(y.detach())
        gradients.append(x_step.grad)
    parameters = [p.grad for p in norm.parameters()]
    buffers = [b.double() for b in norm.buffers()]
    norm.eval()
    return torch.stack(outputs, 1), torch.stack(gradients, 1), parameters, buffers, norm(x).detach()


def furthest(got, want):
    pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
    return max([(a - b).abs().max().item() for a, b in pairs if a.numel()], default=0.0)


def beside_one_process(parts):
    """Largest difference by what is compared; x is random, each rank has its rows of it."""
    mine = slice(sum(parts[: dist.get_rank()]), sum(parts[: dist.get_rank() + 1]))
    found = dict.fromkeys(COMPARED, 0.0)
    for (kind, shape), options in product(KINDS.values(), OPTIONS):
        rng = generator()
        x, target = (torch.randn(sum(parts), 3, *shape, generator=rng, dtype=torch.float64) for _ in range(2))
        plain = layer(kind, options)
        synced = synchronize_batch_norm(copy.deepcopy(plain))
        want, got = passed(plain, x, target), passed(synced, x[mine], target[mine])
        for gradient in got[2]:
            dist.all_reduce(gradient)  # each rank's own share, as of any parameter
        same = (want[0][mine], want[1][mine], want[2], want[3], want[4][mine])
        if not options.get("track_running_stats", True):
            got, same = got[:4], same[:4]  # then eval uses the batch's statistics too, of which each has its own
        for name, a, b in zip(COMPARED, got, same, strict=False):
            found[name] = max(found[name], furthest(a, b))
    return found


@pytest.mark.verifies(
    "distributed.batch_norm.SyncBatchNorm",
    "distributed.batch_norm.synchronize_batch_norm",
    kind="equals one process",
    against="torch.nn.BatchNorm1d and 2d on the whole batch",
    on="outputs, gradients, running statistics, eval; 1, 2 and 4 ranks, uneven and empty parts, mean 100, float64",
    bound=1e-12,
)
@pytest.mark.parametrize("ranks", PARTS)
def test_equals_batch_norm_of_one_process(ranks, seen):
    for parts in PARTS[ranks]:
        for found in launch(beside_one_process, ranks, parts, timeout=PATIENT):
            for difference in found.values():
                seen(difference)


def plain_and_half():
    """The gap of plain BatchNorm on halves of a batch, and the dtype and error of ours in bfloat16."""
    x = torch.randn(8, 3, generator=generator())
    mine = x.chunk(2)[dist.get_rank()]
    whole, part = nn.BatchNorm1d(3)(x).chunk(2)[dist.get_rank()], nn.BatchNorm1d(3)(mine)
    low = SyncBatchNorm(3)(mine.bfloat16())
    return (part - whole).abs().max().item(), low.dtype, (low.float() - whole).abs().max().item()


def test_plain_batch_norm_does_not_and_low_precision_is_summed_in_float32():
    for gap, dtype, error in launch(plain_and_half, 2, timeout=PATIENT):
        assert gap > 0.1
        assert dtype == torch.float32  # its weight and bias are
        assert error < 0.03


def test_converts_in_place_and_keeps_what_an_optimizer_or_a_file_holds():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    model[1].eval()
    synced = synchronize_batch_norm(model)
    assert synced is model
    assert isinstance(model[1], SyncBatchNorm)
    assert isinstance(model[2][0], SyncBatchNorm)
    assert list(model.state_dict()) == keys
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not model[1].training
    assert model[2].training
    assert synchronize_batch_norm(model)[1] is model[1]
    assert isinstance(synchronize_batch_norm(nn.BatchNorm1d(3)), SyncBatchNorm)


def sentences():
    found = []
    for x in (torch.rand(1 - dist.get_rank(), 3), torch.rand(2, 4)):
        try:
            SyncBatchNorm(3)(x)
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.verifies(
    "distributed.batch_norm.SyncBatchNorm",
    kind="message",
    against="the sentence gives the shape",
    on="one value a channel over two ranks; a wrong number of channels",
)
def test_says_what_is_wrong():
    for rank, (few, channels) in enumerate(launch(sentences, 2, timeout=PATIENT)):
        assert few == f"need more than one value a channel over all ranks, got x [{1 - rank}, 3] on this one"
        assert channels == "x must be [N, 3, ...], got [2, 4]"
