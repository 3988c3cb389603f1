"""The parent's side of one rank: start its process, hear what it says, ask where it stands, end it."""

import os
import pickle
import re
import signal
import sys
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from time import monotonic, sleep
from typing import Any

from bigmodel_course import forkserver
from bigmodel_course.distributed import rank
from bigmodel_course.distributed.rank import Frame, Job, Report

__all__ = ["Rank", "listen", "start"]

# What ranks often need, imported once, by the server. Any optimizer of torch loads _dynamo: 1.7 s in every rank.
PRELOAD = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining", "torch.distributed.checkpoint")
KEPT = 2**20  # bytes kept of each stream that a rank prints into
STANDS = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)  # as faulthandler writes, the innermost first


class _Stream:
    """The parent's end of what a rank prints: the first KEPT bytes, and how many more there were."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.open = True
        self.kept = bytearray()
        self.dropped = 0

    def read(self) -> None:
        chunk = os.read(rank.descriptor(self.pipe), 2**16)
        self.open = bool(chunk)
        room = KEPT - len(self.kept)
        self.kept += chunk[:room]
        self.dropped += len(chunk[room:])

    def read_all(self) -> str:
        """What has come by now, as text."""
        while self.open and self.pipe in connection.wait([self.pipe], 0):
            self.read()
        cut = f"\n[{self.dropped:,} more bytes are not shown]\n" if self.dropped else ""
        return self.kept.decode(errors="replace") + cut


class Rank:
    """A process that does `job`; `report` is None until it has answered or died."""

    def __init__(self, job: Job):
        self.number = job.rank
        self.report: Report | None = None
        self.frames: list[Frame] | None = None  # where it stood when it was asked, the innermost last
        context = forkserver.context(*PRELOAD, rank.__name__)
        self.control, theirs = context.Pipe()
        pipes = [context.Pipe(duplex=False) for _ in range(3)]
        self.out, self.err, self.trace = (_Stream(reader) for reader, _ in pipes)
        ends = [theirs, *(writer for _, writer in pipes)]
        self.process = context.Process(target=rank.main, args=(job, *ends), name=f"rank {job.rank}")
        try:
            forkserver.start(self.process)  # cloudpickle sends what a rank needs of the caller's script
        except BaseException:  # when we are interrupted the process may be there already: it ends with its pipe
            self.control.close()
            if self.process.pid:
                self.process.join(10.0)
            raise
        finally:
            for end in ends:
                end.close()

    def sources(self) -> list[Any]:
        """What to wait for."""
        streams = [stream.pipe for stream in (self.out, self.err) if stream.open]
        return streams if self.report else [*streams, self.control, self.process.sentinel]

    def hear(self, ready: list[Any]) -> None:
        """Read what is there to read."""
        for stream in (self.out, self.err):
            if stream.pipe in ready:
                stream.read()
        if self.report is None and (self.control in ready or self.process.sentinel in ready):
            self.report = self._answer()

    def _answer(self) -> Report:
        try:  # a rank may die right after it has answered
            if self.control.poll(0):
                return pickle.loads(self.control.recv_bytes())
        except (EOFError, OSError):
            pass
        self.process.join(10.0)
        self._locate()
        return Report("died", _death(self.process.exitcode), frames=tuple(self.frames or ()))

    def ask(self) -> None:
        """Have it write down where it stands, whatever it is doing."""
        if rank.WHERE and self.report is None and self.process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, rank.WHERE)

    def stands(self, deadline: float) -> None:
        """Read the answer to `ask` into `frames`; its last line is the server's own."""
        while rank.WHERE and self.report is None and (left := deadline - monotonic()) > 0:
            if self.trace.pipe in connection.wait([self.trace.pipe], left):
                self.trace.read()
            if not self.trace.open or b" in <module>\n" in self.trace.kept:
                break
        self._locate()

    def _locate(self) -> None:
        lines = [Frame(file, int(line), name) for file, line, name in STANDS.findall(self.trace.read_all())]
        self.frames = lines[::-1] or None

    def dismiss(self, kindly: bool) -> None:
        """Let it leave by itself; or close its pipe, at which it ends."""
        if kindly:
            with suppress(OSError):
                self.control.send_bytes(b"leave")
        else:
            self.control.close()

    def end(self, kindly: bool) -> None:
        """No process, pipe or child of its own stays."""
        if kindly:
            self.process.join(5.0)
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # the group is named after its first process
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10.0)
        self.control.close()
        with suppress(ValueError):  # a process that even SIGKILL does not end
            self.process.close()

    def show(self) -> None:
        """Print what it printed."""
        for stream, target in ((self.out, sys.stdout), (self.err, sys.stderr)):
            if text := stream.read_all():
                target.write(text)
            stream.pipe.close()
        self.trace.pipe.close()


def start(job: Job) -> Rank:
    """A new rank; the server is started if there is none, and again if it was killed."""
    for _ in range(100):
        with suppress(ConnectionError, EOFError):  # killed a moment ago: it takes the system a while to say so
            return Rank(job)
        sleep(0.05)
    return Rank(job)


def listen(ranks: list[Rank], deadline: float, *, until: Any) -> None:
    """Hear all ranks until `until()` is true or the clock reads `deadline`."""
    while not until() and (left := deadline - monotonic()) > 0:
        ready = connection.wait([source for each in ranks for source in each.sources()], left)
        for each in ranks:
            each.hear(ready)


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code} before it returned"
    known = {number.value: number.name for number in signal.Signals}
    hint = " (often: no memory left)" if -code == 9 else ""
    return f"was ended by {known.get(-code, f'signal {-code}')}{hint}"
