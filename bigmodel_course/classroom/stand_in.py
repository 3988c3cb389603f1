"""A student's answer, run in a process of its own and called from here as if it stood here."""

import builtins
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from bigmodel_course import forkserver
from bigmodel_course.classroom import student
from bigmodel_course.classroom.wire import pack, unpack

__all__ = ["AnswerError", "answered"]

START = 600.0  # seconds for the process to import torch on a busy machine; not counted as the student's
PATIENCE = 5  # times the seconds of computing, by the clock: for an answer that sleeps, and for a busy machine
SEVERAL = (UnicodeError, BaseExceptionGroup)  # made of more than a text
LARGEST = 8 << 20  # bytes of one message: no problem asks for a hundredth of it


class AnswerError(Exception):
    """What an answer raised, where its type is not one of Python's own; or that its process was stopped."""


@contextlib.contextmanager
def answered(given: str, answer: str, *, seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """Run the source `given`, then `answer`, in a fenced process; yield the names that `answer` defined.

    Values are copies; functions and generators are stand-ins that send their arguments over and bring the result
    back.  Reading the answer and all calls together may compute for `seconds`, and last five times as long by the
    clock; then the process is stopped and every further call raises `AnswerError`.  What the answer raises while it is
    read is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        caller = _Caller(folder, seconds)
        try:
            caller.begin({"given": given, "seconds": seconds})
            yield caller.read(answer)
        finally:
            caller.stop()


class _Caller:
    """The other end of the student's process."""

    def __init__(self, folder: str, seconds: float) -> None:
        self.seconds, self.left = seconds, PATIENCE * seconds
        self.lent: list[Callable] = []
        self.stopped = ""
        context = forkserver.context("torch._dynamo", student.__name__)  # with what torch.optim loads at its first use
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=student.main, args=(theirs, folder), daemon=True)
        with theirs:
            forkserver.start(self.process)

    def begin(self, task: dict[str, Any]) -> None:
        """Wait until the process has run the given cells; from then on its time counts."""
        self.left += START
        self.send(task)
        self.left = PATIENCE * self.seconds

    def read(self, answer: str) -> dict[str, Any]:
        """Have the answer's source run; what it defines."""
        try:
            return self.send(answer)
        except StopIteration as stop:  # `next` of nothing; as StopIteration it would only end our own generator
            raise AnswerError(f"StopIteration: {stop.value}") from stop

    def send(self, request: Any) -> Any:
        """Ask for something and wait for what comes back."""
        if self.stopped:
            raise AnswerError(self.stopped)
        message = pack(request, self._lend)
        with self._waiting():
            self.link.send_bytes(message)
        while True:
            with self._waiting():
                message = self.link.recv_bytes(LARGEST)
            reply = unpack(message, self._stand_in)
            if "ask" not in reply:
                return _result(reply)
            self._answer(reply)

    def stop(self) -> None:
        """End the process and all that it started."""
        self.link.close()
        self._kill()
        self.process.join()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own, unless it is just starting
        self.process.kill()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """The answer's time runs.  At its end the process is killed: it may have sent, or read, half a message."""
        started, late = time.monotonic(), threading.Timer(max(self.left, 0), self._late)
        late.daemon = True
        late.start()
        try:
            yield
        except (EOFError, OSError) as error:
            self.stopped = self.stopped or self._end(error)
            raise AnswerError(self.stopped) from error
        finally:
            late.cancel()
            self.left -= time.monotonic() - started

    def _late(self) -> None:
        self.stopped = self._too_long()
        self._kill()

    def _too_long(self) -> str:
        return f"the answer took longer than the {self.seconds:g} seconds it has"

    def _end(self, error: Exception) -> str:
        """Why nothing more comes."""
        if "bad message length" in str(error):  # so says Connection.recv_bytes
            return f"the answer's process ended (it sent more than {LARGEST >> 20} MiB)"
        cause = _cause(self.process)
        return self._too_long() if cause == "SIGXCPU" else f"the answer's process ended ({cause})"

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            reply = {"result": self.lent[request["ask"]](*request["arguments"])}
        except Exception as error:  # the student's code is told, as a function that it calls would tell it
            reply = {"error": f"{type(error).__name__}: {error}"}
        message = pack(reply, self._lend)
        with self._waiting():
            self.link.send_bytes(message)

    def _lend(self, function: Callable) -> int:
        self.lent.append(function)
        return len(self.lent) - 1

    def _stand_in(self, kind: str, number: int) -> Any:
        return _Generator(self, number) if kind == "generator" else _function(self, number)


class _Generator:
    """A student's generator."""

    def __init__(self, caller: _Caller, number: int) -> None:
        self._caller, self._number = caller, number

    def __iter__(self) -> "_Generator":
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        """What the generator yields next."""
        return self._caller.send({"number": self._number, "method": "send", "arguments": (value,)})


def _function(caller: _Caller, number: int) -> Callable:
    return lambda *arguments: caller.send({"number": number, "arguments": arguments})


def _result(reply: dict[str, Any]) -> Any:
    if "stop" in reply:
        raise StopIteration(reply["stop"])
    if "error" not in reply:
        return reply["result"]
    kind = getattr(builtins, str(reply["error"]), None)
    text = f"{reply['message']} ({reply['where']})" if reply["where"] else reply["message"]
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, SEVERAL):
        raise kind(text)
    raise AnswerError(f"{reply['error']}: {text}")


def _cause(process: BaseProcess) -> str:
    process.join(30)
    code = process.exitcode
    return "it hung up" if code is None else signal.Signals(-code).name if code < 0 else f"exit status {code}"
