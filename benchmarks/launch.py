"""From nothing to the first collective: `launch`, whose server is warm, beside torch.multiprocessing.spawn.

Wall-clock seconds: most of the work is done by other processes. Spawn's ranks import torch anew, so a busy machine
makes it many times slower; the ratio says what a reader waits less.
"""

import os
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.measure import Result, ratio
from bigmodel_course.distributed.launch import launch

RANKS = 4
TARGETS = {"warm_4_ranks_seconds": 1.0}


def first_collective() -> float:
    x = torch.ones(1)
    dist.all_reduce(x)
    return x.item()


def spawned(rank: int, port: int, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if first_collective() != ranks:
        raise AssertionError("the sum of ones is the number of ranks")
    dist.destroy_process_group()


def by_spawn(ranks: int) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(spawned, (store.port, ranks), nprocs=ranks)


def by_launch(ranks: int) -> None:
    if launch(first_collective, ranks, timeout=300.0) != [ranks] * ranks:
        raise AssertionError("the sum of ones is the number of ranks")


def seconds(call: object, ranks: int) -> float:
    start = perf_counter()
    call(ranks)
    return perf_counter() - start


def run(quick: bool) -> Result:
    """The two in turn; a launch is short, so each round has five of them and keeps the middle one."""
    rounds, ranks = (2, 2) if quick else (5, RANKS)
    cold = seconds(by_launch, 1)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(median(seconds(by_launch, ranks) for _ in range(5)))
        theirs.append(seconds(by_spawn, ranks))
    times, spread = ratio(theirs, ours)
    table = [
        {"start": f"launch, {ranks} ranks", "seconds": round(median(ours), 3)},
        {"start": f"spawn, {ranks} ranks", "seconds": round(median(theirs), 3)},
        {"start": "the first launch, with its server", "seconds": round(cold, 3)},
    ]
    ratios = {"warm_4_ranks_seconds": median(ours), "spawn_over_launch": times}
    return Result(ratios, spread, TARGETS, table)
