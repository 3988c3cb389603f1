"""The process in which one answer of a student runs: fenced in, with a limit on time and memory.

It is started by `stand_in.answered` with a pipe.  The first message brings the set's own cells, the second the
student's.  After that it calls what it is asked to call and sends back what comes out.  No hidden test and no right
answer ever enters this process, so nothing that the student's code does to it can show or change them.

The fence stops what a homework has no use for: an audit hook (PEP 578) says what was refused, and where Linux has
Landlock the kernel refuses the same to code that asks no hook.  It is not a jail: a class with attackers in it grades
inside a container.
"""

import _posixsubprocess
import contextlib
import ctypes
import functools
import inspect
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bigmodel_course.classroom.wire import pack, unpack

__all__ = ["main"]

MEMORY = 8 << 30  # bytes of address space; torch alone maps 3
FILE_BYTES = 1 << 20  # of a file in the folder that the process may use, which is removed with it
FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.", "socket."),
    *("ctypes.", "os.link", "os.symlink", "os.truncate", "shutil.", "os.chdir", "os.chmod", "os.chown"),
    *("signal.", "resource.", "webbrowser.", "sqlite3.connect"),
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir")
UNHEARD = ((_posixsubprocess, "fork_exec"), (torch, "from_file"), (torch.UntypedStorage, "from_file"))  # by the hook
LISTS = ("os.listdir", "os.scandir")
READABLE = (sys.prefix + os.sep, sys.base_prefix + os.sep, "/proc/cpuinfo/", "/proc/meminfo/", os.devnull + os.sep)
# What C code may read besides: shared libraries, and what they ask of the machine.
LIBRARIES = (
    *(sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"),
    *("/sys/devices/system", "/proc/cpuinfo", "/proc/meminfo", "/dev/urandom"),
)
KEPT = ("PATH", "LANG", "LC_ALL")  # of the teacher's environment
COURSE = "bigmodel_course"
# Libraries that hold answers or open files and sockets by themselves; the sets allow Python's own, NumPy and torch.
REFUSED = ("sklearn", "scipy", "onnx", "onnxruntime", "pandas", "zmq")
COURSE_FOLDER = str(Path(__file__).resolve().parent.parent)


class Answer:
    """The student's names, called from the other end of `link`."""

    def __init__(self, link: Connection) -> None:
        self.link = link
        self.kept: list[Any] = []

    def keep(self, thing: Any) -> int:
        """The number by which the other side asks for `thing`."""
        self.kept.append(thing)
        return len(self.kept) - 1

    def lend(self, kind: str, number: int) -> Callable:
        """A function that asks the other side to call its function `number`."""
        return lambda *arguments: self.ask(number, arguments)

    def ask(self, number: int, arguments: tuple) -> Any:
        """Call back and wait for the result."""
        self.link.send_bytes(pack({"ask": number, "arguments": arguments}, self.keep))
        reply = unpack(self.link.recv_bytes(), self.lend)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def serve(self) -> None:
        """Do what is asked until the other side hangs up."""
        while True:
            try:
                request = unpack(self.link.recv_bytes(), self.lend)
            except EOFError:
                return
            self.reply(lambda request=request: self.do(**request))

    def do(self, number: int, arguments: tuple, method: str = "") -> Any:
        """Call what was kept under `number`, which must leave its arguments alone, or a method of it."""
        thing = self.kept[number]
        if method:
            return getattr(thing, method)(*arguments)
        before = pack(arguments, _any_number)
        result = thing(*arguments)
        if pack(arguments, _any_number) != before:
            raise ValueError("it changes its arguments: work on a copy of what you are given")
        return result

    def reply(self, work: Callable[[], Any]) -> None:
        """Send what `work` gives, or its error by name."""
        try:
            message = pack({"result": work()}, self.keep)
        except StopIteration as stop:
            message = pack({"stop": stop.value}, self.keep)
        except BaseException as error:  # sys.exit is a mistake like another, and must be reported as one
            message = pack({"error": type(error).__name__, "message": str(error)[:2000], "where": _where(error)})
        self.link.send_bytes(message)


def main(link: Connection, folder: str) -> None:
    """Serve the answer whose sources come over `link`, in the empty folder `folder`."""
    answer = Answer(link)
    task = unpack(answer.link.recv_bytes())
    _bound(task["seconds"])
    _alone(folder, link.fileno())
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    answer.reply(lambda: exec(compile(task["given"], "<the set's own cells>", "exec"), module.__dict__))
    given = set(vars(module))
    source = unpack(answer.link.recv_bytes())
    _count(task["seconds"])
    _fence(folder)

    def run() -> dict[str, Any]:
        exec(compile(source, "<your answer>", "exec"), module.__dict__)
        return {name: value for name, value in vars(module).items() if name not in given and _travels(name, value)}

    answer.reply(run)
    answer.serve()


def _any_number(_: Any) -> int:
    return 0


def _travels(name: str, value: Any) -> bool:
    return not name.startswith("__") and not isinstance(value, (type, types.ModuleType))


def _where(error: BaseException) -> str:
    """The frames of the student's own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<your answer>"]
    return "; ".join(f"line {frame.lineno} in {frame.name}" for frame in frames)


def _bound(seconds: float) -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(10 * seconds) + 600)  # the last rope, for a parent that was killed: it ends a sleeping process too


def _count(seconds: float) -> None:
    """From now on the process may compute for `seconds`, whole ones; waiting for a busy machine does not count."""
    end = int(time.process_time() + seconds) + 1
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (end, end + 1))  # SIGXCPU, and for who ignores it SIGKILL


def _alone(folder: str, link: int) -> None:
    """Leave the teacher's folder, environment and streams; what a student prints is not ours to keep."""
    os.setsid()
    os.closerange(3, link)  # the pipes of the server from which this process was forked, among them
    os.closerange(link + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir(folder)
    for name in set(os.environ) - set(KEPT):
        del os.environ[name]
    os.environ |= {"HOME": folder, "TMPDIR": folder}
    tempfile.tempdir = folder
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    torch.set_num_threads(1)


def _fence(folder: str) -> None:
    """From here on no file but Python's own can be read, nothing written or started, and the course not imported."""
    for name in [name for name in sys.modules if name.split(".")[0] in (COURSE, *REFUSED)]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    inspect.getsource(_refuse)  # loads what the first traceback would load
    own = os.path.realpath(folder) + os.sep
    for place, name in UNHEARD:
        setattr(place, name, _not_here)
    if sys.platform == "linux":
        _landlock(own)
    sys.addaudithook(functools.partial(_refuse, own))


def _not_here(*_: Any, **__: Any) -> None:
    raise PermissionError("an answer may not open files or start programs: it gets data and returns data")


def _landlock(own: str) -> None:
    """Have the kernel refuse to C code too what the hook refuses: `torch.from_file`, SQLite, sockets; see landlock(7).

    Files since Linux 5.13, TCP since 6.7; where there is less, the hook alone must do.
    """
    call = ctypes.CDLL(None, use_errno=True).syscall
    version = call(444, None, 0, 1)  # landlock_create_ruleset(…, LANDLOCK_CREATE_RULESET_VERSION)
    files = (1 << 15) - 1 if version >= 3 else (1 << 13) - 1  # execute 1, write 2, read 4, list 8, make, remove …
    rights = (ctypes.c_uint64 * 2)(files, 3 if version >= 4 else 0)  # … and of TCP: bind 1, connect 2
    rules = call(444, rights, 16 if version >= 4 else 8, 0) if version > 0 else -1
    if rules < 0:
        return
    for path, allowed in ((own, files & ~1), (os.devnull, 6), *((path, 12) for path in LIBRARIES)):
        with contextlib.suppress(OSError):  # what this machine does not have need not be allowed
            place = os.open(path, os.O_PATH)
            some = allowed if os.path.isdir(path) else allowed & 6  # a file cannot be listed
            beneath = some.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
            call(445, rules, 1, beneath, 0)  # landlock_add_rule(…, LANDLOCK_RULE_PATH_BENEATH)
            os.close(place)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which a user may not restrict itself
    call(446, rules, 0)
    os.close(rules)


def _refuse(own: str, event: str, arguments: tuple) -> None:
    if event == "import" and str(arguments[0]).split(".")[0] == COURSE:
        raise ImportError("the course's own implementation cannot be used in an answer: write it yourself")
    if event == "import" and str(arguments[0]).split(".")[0] in REFUSED:
        raise ImportError(f"an answer may use Python's own library, NumPy and torch, and not {arguments[0]}")
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"an answer may not use {event}: it gets data and returns data")
    if event in CHANGES and not all(_inside(path, (own,)) for path in arguments if _is_path(path)):
        raise PermissionError(f"an answer may not use {event}: it gets data and returns data")
    if event in LISTS and not _inside(arguments[0] or ".", (*READABLE, own)):
        raise PermissionError("an answer may not list folders: its data comes as arguments")
    if event == "open" and _is_path(arguments[0]) and not _inside(arguments[0], _allowed(own, *arguments)):
        raise PermissionError(f"an answer may not open {Path(str(arguments[0])).name!r}: its data comes as arguments")


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))  # and not a descriptor, which is open already


def _allowed(own: str, path: Any, mode: Any, flags: int) -> tuple[str, ...]:
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    return (own, os.devnull + os.sep) if writes else (*READABLE, own)


def _inside(path: Any, folders: tuple[str, ...]) -> bool:
    path = os.path.realpath(os.fsdecode(path))
    return f"{path}{os.sep}".startswith(folders) and not path.startswith(COURSE_FOLDER)
