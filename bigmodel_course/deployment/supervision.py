"""supervisord over the balancer and the replicas: what runs, and that none of it outlives whoever started it.

supervisord starts a process again when it ends.  What does not end but no longer answers is ended by the doctor.
The chain of life: the pipe to supervisord closes when the process that started it is gone, however it went; then
supervisord stops its children.  If supervisord itself is killed, its children see their own pipes close, or are killed
by the kernel (Linux).
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import xmlrpc.client
from collections.abc import Mapping, Sequence
from pathlib import Path

from supervisor import supervisord
from supervisor.xmlrpc import SupervisorTransport, UnixStreamHTTPConnection

from bigmodel_course.deployment.lifetime import die_with_parent, end_with_stdin

__all__ = ["Supervisor", "configuration", "main", "spawn"]

HOLDER = "FLEET_SUPERVISOR"  # in the environment of supervisord's children: its process
PATIENCE = 60.0  # seconds that supervisord may take for an answer; it stops a process in 8
_HEAD = """[supervisord]
nodaemon = true
silent = true
logfile = {folder}/supervisord.log
logfile_maxbytes = 1MB
logfile_backups = 0
pidfile = {folder}/supervisord.pid
childlogdir = {folder}
directory = {folder}
minfds = 256
minprocs = 64
[unix_http_server]
file = {folder}/supervisor.sock
chmod = 0700
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""
_PROGRAM = """[program:{name}]
command = {command}
directory = {folder}
autostart = {autostart}
autorestart = true
startsecs = {startsecs}
startretries = 100
stopwaitsecs = 8
killasgroup = true
stopasgroup = false
redirect_stderr = true
stdout_logfile = {folder}/{name}.log
stdout_logfile_maxbytes = 1MB
stdout_logfile_backups = 0
"""


def configuration(folder: Path, programs: Mapping[str, Sequence[str]], *, start: Sequence[str] = ()) -> str:
    """supervisord's configuration for these programs (name: command); those in `start` are started with it."""
    parts = [_HEAD.format(folder=_escaped(str(folder)))]
    for name, command in programs.items():
        options = {"autostart": str(name in start).lower(), "startsecs": 0 if name in start else 1}
        words = " ".join(_quoted(word) for word in command)
        parts.append(_PROGRAM.format(name=name, command=words, folder=_escaped(str(folder)), **options))
    return "".join(parts)


def spawn(folder: Path) -> subprocess.Popen:
    """supervisord on `folder`/supervisord.conf; it stops, and removes the folder, when its standard input ends."""
    command = [sys.executable, "-m", __name__, str(folder)]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": _path()}
    with open(folder / "start.log", "wb") as log:  # what is said before supervisord has its own
        streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
        return subprocess.Popen(command, **streams, env={**os.environ, **quiet}, start_new_session=True, cwd=folder)


class Supervisor:
    """A running supervisord, through its socket in `folder`."""

    def __init__(self, folder: Path):
        self._socket = folder / "supervisor.sock"

    def start(self, name: str) -> None:
        """Start a program; returns at once."""
        self._ask().startProcess(name, False)

    def stop(self, name: str) -> None:
        """Stop a program, by force after 8 s; returns when it has ended."""
        with contextlib.suppress(xmlrpc.client.Fault):  # it does not run
            self._ask().stopProcess(name)

    def processes(self) -> dict[str, dict]:
        """Every program: `statename`, `pid` (0 if it does not run), `start` and `now` in seconds."""
        return {process["name"]: process for process in self._ask().getAllProcessInfo()}

    def _ask(self) -> object:
        transport = SupervisorTransport(serverurl=f"unix://{self._socket}")
        transport._get_connection = self._connection
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def _connection(self) -> UnixStreamHTTPConnection:
        """As the transport makes it, but not one that waits for ever."""
        connection = UnixStreamHTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        connection.sock.connect(str(self._socket))
        return connection


def main(argv: Sequence[str] | None = None) -> int:
    """`FOLDER`: be supervisord.  `FOLDER PROGRAM …`: become that program, as a child that dies with supervisord."""
    folder, *program = sys.argv[1:] if argv is None else argv
    if program:
        die_with_parent()
        if os.environ.get(HOLDER, parent := str(os.getppid())) != parent:
            return 1  # supervisord died before we asked
        os.execv(program[0], program)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # until supervisord has a handler: the folder must go
        end_with_stdin(lambda: os.kill(os.getpid(), signal.SIGTERM))
        os.environ[HOLDER] = str(os.getpid())
        supervisord.main(["-c", str(Path(folder) / "supervisord.conf")])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _path() -> str:
    """Where this package is, for processes that run in another folder."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def _escaped(text: str) -> str:
    return text.replace("%", "%%")  # supervisord expands %(name)s


def _quoted(word: str) -> str:
    return '"' + _escaped(word).replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    sys.exit(main())
