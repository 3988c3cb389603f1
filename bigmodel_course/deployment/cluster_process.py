"""The process in Ray's environment that holds a cluster, as the course sees it: started, asked, ended.

It is `cluster_console`.  What goes to it and comes back are lines of JSON; when its input closes, it takes the whole
cluster with it, so nothing outlives this process, however it ends.
"""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from time import monotonic
from typing import Any

import psutil

__all__ = ["ClusterError", "Process", "environment_python", "family"]

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-cluster.lock"
QUIET = {  # what Ray does only if it is told
    "RAY_AUTH_MODE": "token",  # every call between its processes carries a secret of this cluster
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # take 127.0.0.1 for a node's address, not the one other hosts see
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # report nothing to Ray's makers
    "RAY_worker_niceness": "0",  # replicas as important as whoever asks them
    "RAY_health_check_period_ms": "1000",  # a dead node is missed after three questions without an answer
    "RAY_health_check_failure_threshold": "3",
    "RAY_agent_register_timeout_ms": "120000",  # a busy machine starts a node's helpers slowly
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # without its head a node's process ends itself
    "OMP_NUM_THREADS": "1",
}


class ClusterError(RuntimeError):
    """Ray did not do what it was asked; the message says what it said."""


def environment_python(folder: str | Path = ROOT / ".venv-cluster") -> Path:
    """The Python of Ray's environment; ClusterError where it is missing or older than its lock file."""
    folder = Path(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "made-from"
    if not stamp.is_file() or not python.exists():
        raise ClusterError("Ray has an environment of its own, which is not there yet: run `make serve-cluster` once.")
    if LOCK.is_file() and hashlib.sha256(LOCK.read_bytes()).hexdigest() != stamp.read_text().split()[0]:
        raise ClusterError(f"Ray's environment is older than {LOCK.name}: run `make serve-cluster` again.")
    return python


class Process:
    """A console that runs; `folder` holds all files of its cluster."""

    def __init__(self, python: Path):
        # Ray makes sockets in there, and the path of a socket has at most 103 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV"))}
        own = {"RAY_TMPDIR": str(self.folder), "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
        self.popen = subprocess.Popen(
            [str(python), "-m", "bigmodel_course.deployment.cluster_console"],
            env={**clean, **QUIET, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "console.log").open("w"),
            text=True,
            start_new_session=True,  # an interrupt is for whoever waits, not for the cluster
        )
        self.process = psutil.Process(self.popen.pid)
        self.known: set[psutil.Process] = {self.process}
        self.answers: Queue = Queue()
        self.lock, self.number = threading.Lock(), 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(ValueError):  # closed
            for line in self.popen.stdout:
                self.answers.put(json.loads(line))
        self.answers.put({"number": None, "error": "Ray's console has ended"})

    def ask(self, do: str, timeout: float, **arguments: Any) -> Any:
        """The answer to one request; ClusterError where it is a refusal, or does not come."""
        with self.lock:
            self.number += 1
            try:
                self.popen.stdin.write(json.dumps({"number": self.number, "do": do, "with": arguments}) + "\n")
                self.popen.stdin.flush()
                answer = self._answer(monotonic() + timeout)
            except Empty:
                answer = {"error": f"no answer within {timeout:.0f} s"}
            except (OSError, ValueError):  # its input is closed
                answer = {"error": "Ray's console has ended"}
        if do != "status":  # something was started; should the console die, it is still ours to end
            self.known.update(family(self.process))
        if "error" in answer:
            raise ClusterError(f"{do}: {answer['error']}{self._last_words()}")
        return answer["done"]

    def _answer(self, deadline: float) -> dict[str, Any]:
        """The answer to the latest request; one that was interrupted may still have left its own."""
        while True:
            answer = self.answers.get(timeout=max(deadline - monotonic(), 0.01))
            if answer["number"] in (self.number, None):
                return answer

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = (self.folder / "console.log").read_text(errors="replace").strip().splitlines()
            return f" [its log ends: {lines[-1][:300]}]" if lines else ""
        return ""

    def close(self) -> None:
        """Let the console end its cluster and itself; then end what is left of them."""
        whole = self.known | set(family(self.process))
        with suppress(OSError, ValueError):
            self.popen.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(20)
        for process in whole:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(whole, 10)
        self.popen.wait(10)
        self.popen.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that descend from it; none where it is gone."""
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []
