"""Our ring all-reduce beside Gloo's own: wall-clock seconds on real ranks, the two in turn.

Wall-clock time, because a rank's CPU time says little here: most of it is spent by Gloo's own threads and by waiting.
"""

from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from benchmarks.measure import Result, ratio
from bigmodel_course import costs
from bigmodel_course.distributed.collectives import all_reduce_
from bigmodel_course.distributed.launch import launch

RANKS = (2, 4)


def run(quick: bool) -> Result:
    """On 2 and on 4 ranks; 1 means as fast as Gloo."""
    found = {ranks: ring_over_gloo(quick, ranks=ranks) for ranks in (RANKS[:1] if quick else RANKS)}
    ratios = {"ring_over_gloo": found[2].ratios["ring_over_gloo"]}
    ratios |= {f"ring_over_gloo_{n}_ranks": one.ratios["ring_over_gloo"] for n, one in found.items() if n != 2}
    table = [row for one in found.values() for row in one.table]
    return Result(ratios=ratios, spread=max(one.spread for one in found.values()), table=table)


def ring_over_gloo(quick: bool, *, ranks: int = 2) -> Result:
    """Time of our all_reduce_ over that of torch.distributed.all_reduce, 100 MB float32 (`quick`: 4 MB)."""
    length = 1_000_000 if quick else 25_000_000
    seconds = launch(in_turn, ranks, length, 9 if quick else 31, timeout=600)[0]
    value, spread = ratio(seconds["ours"], seconds["Gloo"])
    sent = max(costs.all_reduce_bytes(length, ranks)) / 1e6
    table = [
        {"all-reduce": f"{label}, {ranks} ranks", "MB a rank sends": f"{sent:.0f}", "ms": f"{1000 * median(s):.1f}"}
        for label, s in seconds.items()
    ]
    return Result(ratios={"ring_over_gloo": round(value, 4)}, spread=round(spread, 4), table=table)


def in_turn(length: int, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """On each rank: seconds from one barrier to the next; every round starts with the other one."""
    rivals = {"ours": all_reduce_, "Gloo": dist.all_reduce}
    seconds = {label: [] for label in rivals}
    x = torch.empty(length)
    for i in range(-warmup, rounds):
        for label in list(rivals)[:: -1 if i % 2 else 1]:
            x.fill_(1.0)
            dist.barrier()
            start = perf_counter()
            rivals[label](x)
            dist.barrier()
            if i >= 0:
                seconds[label].append(perf_counter() - start)
            if not bool((x == dist.get_world_size()).all()):
                raise AssertionError(f"{label}: the sum is wrong")
    return seconds
