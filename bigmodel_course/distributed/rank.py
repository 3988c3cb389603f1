"""What runs inside a rank that `launch` started: join the group, call the function, report once, wait to be let go."""

import ctypes
import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from contextlib import nullcontext, suppress
from datetime import timedelta
from importlib import import_module
from io import BytesIO
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Literal, NamedTuple

import cloudpickle
import torch
import torch.distributed as dist

from bigmodel_course.distributed.agreement import Agreement

__all__ = ["Frame", "Job", "Report", "descriptor", "join", "main", "pickled"]

HOST = "127.0.0.1"
SLACK = 600.0  # torch's own time-out comes this much later than ours: the parent, which knows more, speaks first
WHERE = getattr(signal, "SIGUSR1", None)  # a rank that gets this signal writes down where it stands


class Frame(NamedTuple):
    """A line of Python in which a function stands."""

    file: str
    line: int
    name: str


class Job(NamedTuple):
    """All that a rank is told: its place among the ranks, how to meet them, and the pickled call."""

    rank: int
    ranks: int
    port: int
    backend: str
    timeout: float
    threads: int
    check: bool
    environment: dict[str, str]
    call: bytes


class Report(NamedTuple):
    """How the call ended; an `echo` is an error that tells of another rank's end rather than of a fault of its own."""

    outcome: Literal["returned", "raised", "died"]
    text: str = ""
    value: bytes = b""
    frames: tuple[Frame, ...] = ()
    echo: bool = False


def main(job: Job, control: Connection, out: Connection, err: Connection, trace: Connection) -> None:
    """Do `job`: print into `out` and `err`, answer with one Report through `control`, leave when it says so."""
    faulthandler.enable(trace.fileno(), all_threads=False)
    if WHERE:
        faulthandler.register(WHERE, trace.fileno(), all_threads=False)
    _live_no_longer_than_the_parent()
    leave = threading.Event()
    threading.Thread(target=_watch, args=(control, leave), daemon=True).start()
    _redirect(out, err)
    report = _outcome(job)
    _flush()
    control.send_bytes(pickle.dumps(report))
    leave.wait()  # until then our sockets stay open: others may still read what we sent
    with suppress(Exception):
        dist.destroy_process_group()
    _flush()
    os._exit(0)


def _live_no_longer_than_the_parent() -> None:
    """A process group of our own: one signal ends it with all children, and a terminal's Ctrl-C goes to the parent."""
    if hasattr(os, "setsid"):
        os.setsid()
    if sys.platform == "linux":  # the server dies with the parent, and we with the server, whatever we are doing
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _watch(control: Connection, leave: threading.Event) -> None:
    """Wait for the parent's word; its end of the pipe closes when it gives us up or is killed."""
    try:
        control.recv_bytes()
        leave.set()
    except (EOFError, OSError):
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _redirect(out: Connection, err: Connection) -> None:
    """Below Python too, so that what C++ or a child process writes goes the same way."""
    for number, name, pipe in ((1, "stdout", out), (2, "stderr", err)):
        os.dup2(descriptor(pipe), number)
        setattr(sys, name, open(number, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def descriptor(pipe: Connection) -> int:
    """The pipe's file descriptor, for `os`."""
    if sys.platform != "win32":
        return pipe.fileno()
    import msvcrt

    return msvcrt.open_osfhandle(pipe.fileno(), 0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the function may have replaced or closed them
            stream.flush()
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)


def _outcome(job: Job) -> Report:
    """Call the function; whatever happens becomes a Report."""
    try:
        value = _call(job)
    except SystemExit as error:
        return Report("raised", f"left with sys.exit({error.code!r})", frames=_frames(error))
    except BaseException as error:
        return Report("raised", f"raised {_described(error)}", frames=_frames(error), echo=_is_echo(error))
    try:
        return Report("returned", value=pickled(value))
    except Exception as error:
        kind = type(value).__name__
        return Report("raised", f"returned a {kind} that cannot be pickled: {_described(error)}")


def _call(job: Job) -> Any:
    address = {"MASTER_ADDR": HOST, "MASTER_PORT": str(job.port)}
    place = {"RANK": job.rank, "LOCAL_RANK": job.rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
    os.environ.clear()  # the server's are as old as the server
    os.environ.update(job.environment | address | {name: str(number) for name, number in place.items()})
    if loopback := {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback.pop()
    patience = timedelta(seconds=job.timeout + SLACK)
    store = dist.TCPStore(HOST, job.port, is_master=False, timeout=patience)
    join(job.backend, job.threads, store=store, rank=job.rank, world_size=job.ranks, timeout=patience)
    fn, args = cloudpickle.loads(job.call)
    with Agreement(store) if job.check else nullcontext():
        return fn(*args)


def join(backend: str, threads: int, **place: Any) -> None:
    """Join torch's default process group on `backend` ("gloo" or "nccl"); `place` is init_process_group's."""
    torch.set_num_threads(threads)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # tensors of either kind can be sent
    dist.init_process_group(backend, **place)


class _Pickler(cloudpickle.Pickler):
    """Sends a GPU's tensors as CPU tensors: the parent need not touch the GPU; and modules of any type by name.

    cloudpickle adds torch.distributed.config, which is of a type of its own, to a function that uses torch.distributed
    and a variable named `config`.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ModuleType) and type(value) is not ModuleType and value.__name__ in sys.modules:
            return import_module, (value.__name__,)
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return value.detach().cpu().requires_grad_(value.requires_grad).__reduce_ex__(self.proto)
        return super().reducer_override(value)


def pickled(value: Any) -> bytes:
    """Also what the caller's script or notebook defines."""
    buffer = BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _described(error: BaseException) -> str:
    """Type and message, without the C++ frames that torch appends, and of bounded length."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return text.split("\nException raised from ")[0][:10_000]


def _frames(error: BaseException) -> tuple[Frame, ...]:
    stack = traceback.walk_tb(error.__traceback__)
    return tuple(Frame(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in stack)


def _is_echo(error: BaseException) -> bool:
    """Did the others' silence cause it? A rank that meets a dead peer raises too."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
