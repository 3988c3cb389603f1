"""A student's answer, run in a process of its own and called from here as if it stood here."""

import builtins
import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from bigmodel_course import forkserver
from bigmodel_course.classroom import student
from bigmodel_course.classroom.wire import pack, unpack

__all__ = ["AnswerError", "answered"]

START = 60.0  # seconds for the process to import torch on a busy machine; not counted as the student's
LARGEST = 64 << 20  # bytes of one message


class AnswerError(Exception):
    """What an answer raised, where its type is not one of Python's own; or that its process was stopped."""


@contextlib.contextmanager
def answered(given: str, answer: str, *, seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """Run the source `given`, then `answer`, in a fenced process; yield the names that `answer` defined.

    Values are copies; functions and generators are stand-ins that send their arguments over and bring the result
    back.  Reading the answer and all calls together may take `seconds`; then the process is stopped and every further
    call raises `AnswerError`.  What the answer raises while it is read is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        caller = _Caller(folder, seconds)
        try:
            caller.begin({"given": given, "seconds": seconds})
            yield caller.send(answer)
        finally:
            caller.stop()


class _Caller:
    """The other end of the student's process."""

    def __init__(self, folder: str, seconds: float) -> None:
        self.seconds, self.left = seconds, seconds
        self.lent: list[Callable] = []
        self.stopped = ""
        context = forkserver.context("torch", student.__name__)
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=student.main, args=(theirs, folder), daemon=True)
        with theirs:
            forkserver.start(self.process)

    def begin(self, task: dict[str, Any]) -> None:
        """Wait until the process has run the given cells; from then on its time counts."""
        self.left += START
        self.send(task)
        self.left = self.seconds

    def send(self, request: Any) -> Any:
        """Ask for something and wait for what comes back."""
        if self.stopped:
            raise AnswerError(self.stopped)
        with self._lost():
            self.link.send_bytes(pack(request, self._lend))
        while True:
            reply = self._receive()
            if "ask" not in reply:
                return _result(reply)
            self._answer(reply)

    def stop(self) -> None:
        """End the process and all that it started."""
        self.link.close()
        self.process.kill()
        self.process.join()

    def _receive(self) -> dict[str, Any]:
        started = time.monotonic()
        with self._lost():
            if not self.link.poll(max(self.left, 0)):
                self.stopped = f"the answer took longer than the {self.seconds:g} seconds it has"
                self.stop()
                raise AnswerError(self.stopped)
            message = self.link.recv_bytes(LARGEST)
        self.left -= time.monotonic() - started
        return unpack(message, self._stand_in)

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            reply = {"result": self.lent[request["ask"]](*request["arguments"])}
        except Exception as error:  # the student's code is told, as a function that it calls would tell it
            reply = {"error": f"{type(error).__name__}: {error}"}
        with self._lost():
            self.link.send_bytes(pack(reply, self._lend))

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self.stopped = f"the answer's process ended ({_cause(self.process)})"
            raise AnswerError(self.stopped) from error

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
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        raise kind(text)
    raise AnswerError(f"{reply['error']}: {text}")


def _cause(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    return "it hung up" if code is None else signal.Signals(-code).name if code < 0 else f"exit status {code}"
