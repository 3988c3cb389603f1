"""Traffic counts what each group is asked to send, as a ring sends it."""

import sys

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from bigmodel_course import costs
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.traffic import Traffic

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest


def calls():
    """Bytes of each call on this rank, along two groups; a third group is not asked about."""
    rank, x = dist.get_rank(), torch.ones(7, dtype=torch.float64)
    twins = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    does = {
        "all_reduce": lambda group: dist.all_reduce(x, group=group),
        "all_gather": lambda group: dist.all_gather([torch.empty_like(x) for _ in range(2)], x, group=group),
        "reduce_scatter": lambda group: dist.reduce_scatter(x, [x.clone(), x.clone()], group=group),
        "send": lambda group: dist.send(x, 1, group=group) if rank == 0 else dist.recv(x, 0, group=group),
        "broadcast": lambda group: dist.broadcast(x, 0, group=group),
        "one number": lambda group: dist.all_reduce(torch.ones(1), group=group),
    }
    found = {}
    for name, do in does.items():
        with Traffic({"one": twins[0], "other": dist.group.WORLD}) as traffic:
            do(twins[0])
            do(dist.group.WORLD)
            do(dist.group.WORLD)
            do(twins[1])
        found[name] = dict(traffic.sent)
    return found


@pytest.mark.verifies(
    "distributed.traffic.Traffic",
    kind="invariant",
    against="costs.all_reduce_bytes, all_gather_bytes, reduce_scatter_bytes, and a tensor's own bytes for send",
    on="each call in three groups of 2 ranks, 7 float64",
    bound=0.0,
)
def test_each_call_counts_for_its_group(seen):
    for rank, found in enumerate(launch(calls, 2, timeout=240.0)):
        expected = {
            "all_reduce": costs.all_reduce_bytes(7, 2, 8)[rank],
            "all_gather": costs.all_gather_bytes([7, 7], 8)[rank],
            "reduce_scatter": costs.reduce_scatter_bytes(14, 2, 8)[rank],
            "send": 56 * (rank == 0),
            "broadcast": 0,
            "one number": 0,
        }
        for name, sent in expected.items():
            seen(abs(found[name]["one"] - sent))
            seen(abs(found[name]["other"] - 2 * sent))
