"""An HTTP service around one exported model: `python -m bigmodel_course.deployment.service --model digits.onnx`.

`serving(settings)` starts one worker in a process of its own and stops it again; `create_app` is the application
itself.  A worker listens on 127.0.0.1 only: what faces the world is the balancer in front of it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from time import monotonic
from typing import IO

from bigmodel_course.deployment import lifetime
from bigmodel_course.deployment.service_settings import Settings

__all__ = ["Running", "main", "serving"]

LOG = 10_000  # bytes of a worker's log that are shown


@dataclass(frozen=True)
class Running:
    """A worker that runs: where it listens, its process, and what it has written to its log."""

    url: str
    port: int
    pid: int
    process: subprocess.Popen
    errors: IO[bytes]

    def log(self) -> str:
        """What the worker wrote to standard error, its last 10,000 bytes."""
        return _tail(self.errors)


@contextmanager
def serving(settings: Settings, *, port: int = 0, timeout: float = 180.0) -> Iterator[Running]:
    """A worker in a process of its own, ready when the block begins and gone when it ends, however it ends.

    If this process dies, even by SIGKILL, the worker ends too: it holds the other end of a pipe.  RuntimeError with the
    worker's log if it is not ready within `timeout` seconds.
    """
    command = [sys.executable, "-m", __name__, "--stdin", "--port", str(port)]
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, **pipes, env=_environment(), start_new_session=True)
        try:
            process.stdin.write(settings.to_json().encode() + b"\n")
            process.stdin.flush()
            where = _first_line(process, errors, timeout)
            yield Running(f"http://127.0.0.1:{where['port']}", where["port"], process.pid, process, errors)
        finally:
            _stop(process, settings.drain + settings.stop_seconds + 5)


def _environment() -> dict[str, str]:
    """One thread a library: a worker's parallelism is its replicas."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **quiet}


def _first_line(process: subprocess.Popen, errors: IO[bytes], timeout: float) -> dict:
    end, line = monotonic() + timeout, b""
    with DefaultSelector() as selector:
        selector.register(process.stdout, EVENT_READ)
        while not line.endswith(b"\n") and (left := end - monotonic()) > 0:
            if not selector.select(left):
                continue
            if not (part := os.read(process.stdout.fileno(), 4096)):
                break
            line += part
    if line.endswith(b"\n"):
        return json.loads(line)
    log = _tail(errors).strip()[-2000:] or "nothing"
    raise RuntimeError(f"the worker was not ready within {timeout:g} s; its log says: {log}")


def _tail(errors: IO[bytes]) -> str:
    """Read without moving: the worker writes at the same place of the same file."""
    start = max(0, os.fstat(errors.fileno()).st_size - LOG)
    return os.pread(errors.fileno(), LOG, start).decode(errors="replace")


def _stop(process: subprocess.Popen, seconds: float) -> None:
    """Ask, wait, and then do not ask any more."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:  # it hangs, or is stopped
        process.kill()
        process.wait()
    finally:
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()


def _read_settings(arguments: argparse.Namespace) -> Settings:
    if arguments.stdin:
        settings = Settings.from_json(sys.stdin.buffer.raw.readline(2**20).decode())
    elif arguments.settings:
        settings = Settings.from_json(Path(arguments.settings).read_text(encoding="utf-8"))
    else:
        settings = Settings(model=arguments.model)
    given = {name: getattr(arguments, name) for name in ("model", "replica") if getattr(arguments, name) is not None}
    return replace(settings, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal says stop; write one line of JSON, port, pid and replica, when ready."""
    parser = argparse.ArgumentParser(prog="python -m bigmodel_course.deployment.service", description=__doc__)
    parser.add_argument("--model", help="an ONNX file, or sleep:SECONDS")
    parser.add_argument("--replica", help="this worker's name, in every answer")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; 0 takes a free one (default 8000)")
    parser.add_argument("--uds", help="a Unix socket's path, in place of a port")
    parser.add_argument("--settings", help="a file of settings as JSON; --model and --replica win over it")
    parser.add_argument("--stdin", action="store_true", help="settings are the first line of stdin; end when it ends")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the parent dies (Linux)")
    arguments = parser.parse_args(argv)
    if not (arguments.model or arguments.settings or arguments.stdin):
        parser.error("--model or --settings is needed")

    from bigmodel_course.deployment import service_app, service_worker  # fastapi and onnxruntime: in the worker only

    if arguments.die_with_parent:
        lifetime.die_with_parent()
    try:
        settings = _read_settings(arguments)
        listener = service_worker.listen(arguments.port, arguments.uds)
        app = service_app.create_app(settings)
    except (ValueError, OSError) as error:
        print(f"service: {error}", file=sys.stderr)
        return 2
    if arguments.stdin:
        lifetime.end_with_stdin()
    announce = service_worker.announcement(listener, settings, sys.stdout)
    service_worker.Worker(app, settings, announce).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
