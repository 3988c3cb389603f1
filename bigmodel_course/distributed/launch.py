"""Ranks are real processes: `launch` runs one function in each and brings back what they return.

A server that has torch loaded forks them, so that a launch takes a fraction of a second. What goes wrong in a rank
comes back as one RankError, and no rank outlives the call.
"""

import atexit
import gc
import os
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from bigmodel_course.distributed import processes, rank
from bigmodel_course.distributed.failures import RankError, explain
from bigmodel_course.distributed.processes import Rank
from bigmodel_course.distributed.rank import Job

__all__ = ["RankError", "device", "launch"]

GIVEN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets; a rank of ours has them too
LINGER, ECHO, ASK = 0.2, 2.0, 2.0  # seconds: for others after an error, for its cause after an echo, for an answer


def launch(
    fn: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60.0,
    threads: int = 1,
    backend: str | None = None,
    check: bool = False,
) -> list[Any]:
    """Call `fn(*args)` in `ranks` processes with torch's default process group ready; results in rank order.

    `fn` may stand in a notebook's cell or inside another function, and may return whatever can be pickled; tensors come
    back on the CPU. What the ranks print is printed in rank order at the end. Each rank has `threads` threads of torch,
    and a GPU of its own if there are enough (NCCL), else the CPU (Gloo); `backend` "gloo" or "nccl" insists on one.
    With `check`, the ranks compare every collective before they start it, and a difference says who calls what.

    A rank that raises, exits, dies or needs more than `timeout` seconds ends them all: RankError.
    Under torchrun nothing is started: the process joins its group, runs `fn` as that rank, and returns all results.
    """
    backend = _backend(fn, ranks, timeout, threads, backend)
    if os.environ.keys() >= GIVEN:
        return _as_one_of_them(fn, ranks, args, threads, backend)
    call = _pickled(fn, args)
    store = _store()
    started: list[Rank] = []
    kindly = False
    try:
        for number in range(ranks):
            job = Job(number, ranks, store.port, backend, timeout, threads, check, dict(os.environ), call)
            started.append(processes.start(job))
        _hear(started, timeout)
        if failure := explain(started, timeout):
            raise failure
        results = [_result(each) for each in started]
        kindly = True
    finally:
        _end(started, kindly)
        del store  # an error keeps this frame, and with it the port
    return results


def device() -> torch.device:
    """Inside a rank its own GPU if the ranks have one each, else the CPU."""
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def _backend(fn: Any, ranks: int, timeout: float, threads: int, backend: str | None) -> str:
    """Refuse what cannot run, and choose."""
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}")
    for name, value in (("ranks", ranks), ("threads", threads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0 seconds, got {timeout!r}")
    if backend not in (None, "gloo", "nccl"):
        raise ValueError(f'backend must be None, "gloo" or "nccl", got {backend!r}')
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), torch.cuda.device_count()
    if backend == "nccl" and gpus < here:
        raise ValueError(f'backend "nccl" needs a GPU for each rank, got {here} ranks on this machine and {gpus} GPUs')
    return backend or ("nccl" if gpus >= here and dist.is_nccl_available() else "gloo")


def _as_one_of_them(fn: Callable[..., Any], ranks: int, args: tuple, threads: int, backend: str) -> list[Any]:
    """This process is a rank already, of torchrun or of an outer launch: take part, and share the results."""
    if not dist.is_initialized():
        rank.join(backend, threads)
        atexit.register(_leave)
    if dist.get_world_size() != ranks:
        raise ValueError(f"ranks must be {dist.get_world_size()}, as many as were started, got {ranks}")
    pickles: list[Any] = [None] * ranks
    dist.all_gather_object(pickles, rank.pickled(fn(*args)))
    return [cloudpickle.loads(each) for each in pickles]


def _leave() -> None:
    """Give the group up while Python is whole.

    A group that garbage still holds would live on: a thread of Gloo that lets go of a tensor while the interpreter ends
    is ended itself, and the process with it, by SIGABRT.
    """
    gc.collect()
    dist.destroy_process_group()
    gc.collect()


def _pickled(fn: Callable[..., Any], args: tuple) -> bytes:
    try:
        return rank.pickled((fn, args))
    except Exception as error:
        call = f"{getattr(fn, '__name__', type(fn).__name__)}({', '.join(type(arg).__name__ for arg in args)})"
        raise TypeError(f"fn and its arguments must be picklable to reach the ranks, got {call}: {error}") from None


def _store() -> dist.TCPStore:
    """Where the ranks meet: a free port that only this machine can reach."""
    listener = socket.create_server((rank.HOST, 0), backlog=1024)
    port = listener.getsockname()[1]
    return dist.TCPStore(rank.HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _hear(ranks: list[Rank], timeout: float) -> None:
    """Until all have returned, the first error has settled, or the time is over and each has said where it stands."""

    def reports() -> list:
        return [each.report for each in ranks if each.report]

    def failed(echo: bool = True) -> bool:
        return any(report.outcome != "returned" and (echo or not report.echo) for report in reports())

    deadline = monotonic() + timeout
    processes.listen(ranks, deadline, until=lambda: failed() or len(reports()) == len(ranks))
    if failed() and not failed(echo=False):  # an echo often comes before its cause
        processes.listen(ranks, monotonic() + ECHO, until=lambda: failed(echo=False))
    if failed(echo=False):  # of several errors the lowest rank's is told
        processes.listen(ranks, monotonic() + LINGER, until=lambda: len(reports()) == len(ranks))
    elif len(reports()) < len(ranks):
        for each in ranks:
            each.ask()
        for each in ranks:
            each.stands(monotonic() + ASK)


def _result(each: Rank) -> Any:
    try:
        return cloudpickle.loads(each.report.value)
    except Exception as error:
        kind = type(error).__name__
        raise RankError(each.number, f"rank {each.number} returned what cannot be read: {kind}: {error}") from None


def _end(ranks: list[Rank], kindly: bool) -> None:
    """All pipes first: that is enough to end a rank, should we be interrupted in the middle of this."""
    for each in ranks:
        each.dismiss(kindly)
    for each in ranks:
        each.end(kindly)
    for each in ranks:
        each.show()
