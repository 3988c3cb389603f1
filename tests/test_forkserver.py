"""Processes come from a server that has the heavy modules loaded, and without the caller's script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigmodel_course import forkserver

ROOT = Path(__file__).parent.parent


def started(target, *arguments):
    """What `target` sends back from a process of its own."""
    context = forkserver.context("torch")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments))
    forkserver.start(process)
    theirs.close()
    try:
        return mine.recv()
    finally:
        process.join()
        mine.close()


def tell(link):
    link.send((os.getpid(), os.getppid(), "torch" in sys.modules))


@pytest.mark.verifies(
    "forkserver.context", "forkserver.start", kind="invariant", against="a process of its own, torch loaded",
    on="two starts from one server",
)  # fmt: skip
def test_processes_are_forked_from_one_server_that_has_torch():
    (first, server, loaded), (second, same, again) = started(tell), started(tell)
    assert len({first, second, server, os.getpid()}) == 4
    assert server == same
    assert loaded
    assert again


def test_the_callers_script_is_not_run_again(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import operator\n"
        "from bigmodel_course import forkserver\n"
        "print('the script runs')\n"
        "process = forkserver.context().Process(target=operator.add, args=(1, 2))\n"
        "forkserver.start(process)\n"
        "process.join()\n"
        "print('ended with', process.exitcode)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["the script runs", "ended with 0"], done.stderr


def test_where_there_is_no_forkserver_it_is_spawn(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert forkserver.context("torch").get_start_method() == "spawn"
