"""Ranks are real processes: `launch` runs one function in each and brings back what they return."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

__all__ = ["launch"]


def launch(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 60.0, threads: int = 1) -> list[Any]:
    """Call `fn(*args)` in `ranks` processes with torch's default process group ready; results in rank order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "cloudpickle", "bigmodel_course.distributed.launch"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = cloudpickle.dumps((fn, args))
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, ranks, store.port, job, theirs, threads), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        answers = [_receive(pipe, rank, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return answers


def _receive(pipe: Any, rank: int, timeout: float) -> Any:
    if not pipe.poll(timeout):
        raise RuntimeError(f"rank {rank} gave no result within {timeout} s")
    ok, value = cloudpickle.loads(pipe.recv_bytes())
    if not ok:
        raise RuntimeError(f"rank {rank} raised\n{value}")
    return value


def _rank(rank: int, ranks: int, port: int, job: bytes, pipe: Any, threads: int) -> None:
    import traceback

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(threads)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        fn, args = cloudpickle.loads(job)
        answer = (True, fn(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(cloudpickle.dumps(answer))
    if dist.is_initialized():
        dist.destroy_process_group()
