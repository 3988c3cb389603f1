"""Our data parallelism beside torch's DistributedDataParallel, and two ranks beside one: 1 thread a rank, real ranks.

Forward, backward and reduction in wall-clock seconds, the rivals in turn in the same processes; their weights must stay
bit for bit the same.  `two_ranks_over_one` is the throughput of two ranks over twice that of one alone on the machine;
`two_ranks_without_sending` is the same without any reduction: what cores that share one memory allow.
"""

import copy
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Result, ratio
from benchmarks.ring import ring_over_gloo
from bigmodel_course.distributed.averaging import replicas_differ
from bigmodel_course.distributed.data_parallel import DataParallel
from bigmodel_course.distributed.launch import launch
from bigmodel_course.models import GPT, GPT_SIZES

SIZES = {"10M": (4, 256, 41), "124M": (1, 256, 31)}  # examples and tokens a rank, rounds
QUICK = {"1M": (2, 32, 5)}
TARGETS = {"ours_over_torch_ddp_10m": 1.05, "ours_over_torch_ddp": 1.0}


def run(quick: bool) -> Result:
    """The ratios; `quick` takes a model of 1 million parameters for both sizes."""
    sizes = dict.fromkeys(SIZES, ("1M", 2, 32, 9)) if quick else {name: (name, *size) for name, size in SIZES.items()}
    seconds = {name: launch(beside_torch, 2, *size, timeout=1800)[0] for name, size in sizes.items()}
    ring = ring_over_gloo(quick)
    measured = {
        "ours_over_torch_ddp_10m": ratio(seconds["10M"]["ours"], seconds["10M"]["torch"]),
        "ours_over_torch_ddp": ratio(seconds["124M"]["ours"], seconds["124M"]["torch"]),
        "two_ranks_over_one": ratio(seconds["10M"]["alone"], seconds["10M"]["ours"]),
        "two_ranks_without_sending": ratio(seconds["10M"]["alone"], seconds["10M"]["without sending"]),
    }
    ratios = {label: round(value, 4) for label, (value, _) in measured.items()} | ring.ratios
    spread = max([spread for _, spread in measured.values()] + [ring.spread])
    table = [
        {"model": name, **{f"{label}, ms": f"{1000 * median(s):.0f}" for label, s in found.items()}}
        for name, found in seconds.items()
    ]
    return Result(ratios=ratios, spread=round(spread, 4), targets=TARGETS, table=table)


def beside_torch(size: str, examples: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """On each rank: seconds a step of both; up to 10M also of the plain module, on all ranks at once and alone."""
    rng = torch.Generator().manual_seed(dist.get_rank())
    plain = GPT(GPT_SIZES[size], generator=torch.Generator().manual_seed(0))
    ours, theirs = DataParallel(copy.deepcopy(plain)), DistributedDataParallel(copy.deepcopy(plain))
    rivals = {"ours": ours, "torch": theirs}
    if size != "124M":  # where memory allows a third model beside them
        rivals |= {"without sending": plain, "alone": plain}
    seconds = {label: [] for label in rivals}
    for i in range(-2, rounds):
        x = torch.randint(plain.config.vocabulary, (examples, tokens + 1), generator=rng)
        for label in list(rivals)[:: -1 if i % 2 else 1]:
            spent = timed(rivals[label], x, idle=label == "alone" and dist.get_rank() > 0)
            if i >= 0:
                seconds[label].append(spent)
        for model in (ours, theirs):
            sgd_(model)
    check_same(ours, theirs)
    return seconds


def timed(model: nn.Module, x: Tensor, *, idle: bool) -> float:
    """Seconds from one barrier to the next; an `idle` rank only waits."""
    model.zero_grad()
    dist.barrier()
    start = perf_counter()
    if not idle:
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    dist.barrier()
    return perf_counter() - start


@torch.no_grad()
def sgd_(model: nn.Module) -> None:
    for p in model.parameters():
        p -= 0.1 * p.grad


def check_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise unless all weights agree bit for bit, between the two and between the ranks."""
    same = all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    if not same or replicas_differ(ours):
        raise AssertionError("our weights and torch's must be the same, bit for bit")
