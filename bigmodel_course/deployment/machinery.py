"""What a fleet stands on: a folder and a port, supervisord and HAProxy there, and their end, however it comes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from bigmodel_course.deployment import balancer, supervision

__all__ = ["Machinery", "write_private"]


class Machinery:
    """HAProxy on `url`, and supervisord with a program for each of `slots`; `settings` are those of its configuration.

    It starts with the object and ends with `close`, with the object or with this process, by whatever signal.
    """

    def __init__(self, slots: Collection[str], *, timeout: float, **settings: float):
        self.timeout, self._settings = timeout, settings
        self.secret = secrets.token_bytes(32)
        self._keys = {name: secrets.token_bytes(32) for name in slots}  # keys that nobody has
        self.folder = Path(tempfile.mkdtemp(prefix="fleet-"))
        self._place = socket.socket()  # bound as long as the fleet lives, so that nobody else gets the port
        try:
            self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._place.bind(("127.0.0.1", 0))
            self.port = self._place.getsockname()[1]
            self.write({})
            write_private(self.folder / "supervisord.conf", self._programs())
            process = supervision.spawn(self.folder)
        except BaseException:
            _end(None, self._place, self.folder)
            raise
        self.close = weakref.finalize(self, _end, process, self._place, self.folder)
        self.supervisor, self.balancer = supervision.Supervisor(self.folder), balancer.Balancer(self.folder)
        try:
            self.until(lambda: bool(self.balancer.table()) and bool(self.supervisor.processes()))
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where to ask."""
        return f"http://127.0.0.1:{self.port}"

    def write(self, keys: dict[str, bytes]) -> None:
        """What HAProxy reads if it has to start again: the replicas in use, and the keys of their seals."""
        used = {name: name in keys for name in self._keys}
        write_private(self.folder / "haproxy.cfg", balancer.configuration(self.port, used, **self._settings))
        write_private(self.folder / "keys.map", balancer.keys_file(self._keys | keys))

    def until(self, true: Callable[[], bool], *programs: str, timeout: float | None = None) -> None:
        """Wait for something; RuntimeError with these programs' logs after `timeout` seconds."""
        timeout = self.timeout if timeout is None else timeout
        end = monotonic() + timeout
        while monotonic() < end:
            with suppress(OSError):  # a socket that is not there yet
                if true():
                    return
            sleep(0.02)
        said = "\n".join(filter(None, map(self.log, ("start", "supervisord", "haproxy", *programs))))
        raise RuntimeError(f"the fleet was not ready within {timeout:g} s; the logs say: {said or 'nothing'}")

    def log(self, program: str) -> str:
        """The end of what a program wrote."""
        path = self.folder / f"{program}.log"
        return path.read_text(errors="replace")[-2000:].strip() if path.exists() else ""

    def _programs(self) -> str:
        python = [sys.executable, "-m"]
        proxy = [*python, supervision.__name__, str(self.folder), balancer.program(), "-db", "-f", "haproxy.cfg"]
        programs = {"haproxy": proxy, "doctor": [*python, f"{__package__}.doctor", str(self.folder)]}
        worker = [*python, f"{__package__}.service_replica"]
        programs |= {name: [*worker, f"{name}.json"] for name in self._keys}
        return supervision.configuration(self.folder, programs, start=("haproxy", "doctor"))


def write_private(path: Path, text: str) -> None:
    """To a file that only its owner may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _end(process: subprocess.Popen | None, place: socket.socket, folder: Path) -> None:
    """supervisord stops its children and leaves; if it does not, they die with it."""
    if process:
        process.stdin.close()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()
    place.close()
    shutil.rmtree(folder, ignore_errors=True)
