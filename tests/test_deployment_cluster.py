"""A model cut over the replicas of a real Ray cluster answers as the whole one does, also while they are killed."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
import yaml
from cluster_story import ROOT, model
from filelock import FileLock
from serving import gone, until

from bigmodel_course.deployment import cluster_app, cluster_console, cluster_process
from bigmodel_course.deployment.cluster import Cluster, Replica, cut, deployment
from bigmodel_course.deployment.cluster_process import ClusterError, Process, environment_python, family
from bigmodel_course.deployment.export import check

CONFIG = ROOT / "clusters" / "serve.yaml"
PATIENCE = 1800  # seconds: a busy machine is not a fault


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> dict[str, dict]:
    """What happened in one cluster's life, told once for all of pytest-xdist's workers."""
    home = tmp_path_factory.getbasetemp()
    home = home.parent if "PYTEST_XDIST_WORKER" in os.environ else home
    journal, told = home / "cluster.journal", home / "cluster.told"
    with FileLock(home / "cluster.lock"):
        if not told.exists():
            live(journal, home)
            told.touch()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return {line["what"]: line for line in lines}


def live(journal: Path, home: Path) -> None:
    """Run the story, kill it at its end, and see what is left."""
    journal.write_text("")
    command = [sys.executable, str(ROOT / "tests" / "cluster_story.py"), str(journal), str(home / "cluster-parts")]
    with (home / "cluster.errors").open("a") as errors:  # a pipe that nobody reads would fill up
        teller = subprocess.Popen(command, stderr=errors)
        try:
            assert until(lambda: ended(journal) or teller.poll() is not None, PATIENCE), journal.read_text()
            assert ended(journal), (home / "cluster.errors").read_text()[-3000:]
            end = json.loads(journal.read_text().splitlines()[-1])
            processes = [process for pid in end["family"] for process in living(pid)]
        finally:
            teller.send_signal(signal.SIGKILL)
            teller.wait()
    until(lambda: all(map(gone, processes)) and not Path(end["folder"]).exists())
    with socket.socket() as client:
        refused = client.connect_ex(("127.0.0.1", end["port"])) != 0
    names = [process.name() for process in processes if not gone(process)]
    line = {"what": "left", "processes": names, "folder": Path(end["folder"]).exists(), "refused": refused}
    journal.write_text(journal.read_text() + json.dumps(line) + "\n")


def ended(journal: Path) -> bool:
    """Does the last line, a whole one, say so?"""
    *_, last = ["", *journal.read_text().splitlines(keepends=True)]
    return '"what": "end"' in last and last.endswith("\n")


def living(pid: int) -> list[psutil.Process]:
    """One process, or none where it has ended since it was listed: Ray ends workers that are idle."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid)]
    return []


# --- a model in parts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    cut(model(), folder, stages=3, name="three", version="7")
    return folder


@pytest.mark.verifies(
    "deployment.cluster.cut",
    kind="parity",
    against="models.GPT in torch",
    on="3 ONNX parts one after the other, batches of 1 and 3, 1 to 48 tokens, relative to the largest score",
    bound=1e-5,
)
def test_the_parts_one_after_the_other_are_the_model(parts, seen):
    gpt, draw = model(), torch.Generator().manual_seed(0)
    sessions = [onnxruntime.InferenceSession(parts / f"stage_{i}.onnx") for i in range(3)]
    for batch, length in ((1, 1), (1, 48), (3, 2), (3, 17)):
        tokens = torch.randint(256, (batch, length), generator=draw)
        x = tokens.numpy()
        for session in sessions:
            x = session.run(None, {session.get_inputs()[0].name: x})[0]
        with torch.no_grad():
            right = gpt(tokens)
        seen((torch.from_numpy(x) - right).abs().max() / right.abs().max())


def test_each_part_says_what_it_is_and_the_list_knows_its_bytes(parts):
    told = json.loads((parts / "model.json").read_text())
    assert {key: told[key] for key in ("name", "version", "context")} == {
        "name": "three",
        "version": "7",
        "context": 48,
    }
    for i, part in enumerate(told["stages"]):
        found = check(parts / part["file"])
        assert (found["kind"], found["stage"], found["outputs"]) == ("stage", str(i), "256" if i == 2 else "32")


@pytest.mark.verifies(
    "deployment.cluster_app.Stage",
    kind="message",
    against="a file that is not the one that was cut",
    on="one changed byte",
)
def test_a_part_that_is_not_the_one_that_was_cut_is_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_app, "stay_on_this_address", lambda: None)
    monkeypatch.setattr(cluster_app, "_replica", lambda: "Stage0#here")
    told = json.loads((parts / "model.json").read_text())["stages"][0]
    x, name = cluster_app.Stage(str(parts / told["file"]), told["sha256"])(np.zeros((1, 3), np.int64))
    assert x.shape == (1, 3, 32)
    assert name == "Stage0#here"
    content = bytearray((parts / told["file"]).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "stage_0.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged, or belongs to another model.json: cut the model again"):
        cluster_app.Stage(str(tmp_path / "stage_0.onnx"), told["sha256"])


# --- asking again -----------------------------------------------------------------------------------------------------


class Gone(Exception): ...


def flaky(*faults: BaseException | None):
    """A call that fails in this way, one fault after the other, and then answers."""
    calls = []

    async def call() -> str:
        calls.append(1)
        fault = faults[len(calls) - 1] if len(calls) <= len(faults) else None
        if fault == "hang":
            await asyncio.sleep(60)
        if fault:
            raise fault
        return "answer"

    return call, calls


@pytest.mark.verifies(
    "deployment.cluster_app.again",
    "deployment.cluster_app.Lost",
    kind="recovery",
    against="replicas that are lost 0 to 4 times, hang, or fail for good",
    on="5 tries",
)
@pytest.mark.parametrize("losses", range(5))
def test_whoever_is_lost_is_asked_again_until_one_answers(losses):
    call, calls = flaky(*[Gone()] * losses)
    assert asyncio.run(cluster_app.again(call, (Gone,), 5, 10)) == ("answer", losses + 1)
    assert len(calls) == losses + 1


def test_a_replica_that_hangs_is_given_up_after_the_patience():
    call, _ = flaky("hang")
    start = time.monotonic()
    assert asyncio.run(cluster_app.again(call, (Gone,), 5, 0.2)) == ("answer", 2)
    assert time.monotonic() - start < 60, "it slept to its end"


def test_when_the_tries_are_used_up_one_sentence_says_so():
    call, calls = flaky(*[Gone()] * 9)
    with pytest.raises(
        cluster_app.Lost, match=r"no replica answered in 3 tries \(the last one: Gone\); ask again in a"
    ):
        asyncio.run(cluster_app.again(call, (Gone,), 3, 10))
    assert len(calls) == 3


def test_an_error_of_the_model_itself_is_never_asked_again():
    call, calls = flaky(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(cluster_app.again(call, (Gone,), 5, 10))
    assert len(calls) == 1


@pytest.mark.verifies(
    "deployment.cluster_app.asked", kind="message", against="requests that are none", on="8 bodies, and through HTTP"
)
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "must be JSON such as"),
        (b"\xff", "must be JSON such as"),
        (b"[1]", "must be JSON such as"),
        (b"[" * 50_000, "must be JSON such as"),
        (b'{"prompt": 3}', "must be JSON such as"),
        (b'{"prompt": ""}', "at least one character"),
        (b'{"prompt": "a", "tries": true}', "a whole number from 1 to 5, got True"),
        (b" " * 65_537, "at most 65,536 bytes, got 65,537"),
    ],
)
def test_a_request_that_is_none_is_told_why(body, says):
    with pytest.raises(ValueError, match=says):
        cluster_app.asked(body, 5)
    assert cluster_app.asked('{"prompt": "é", "tries": 2}'.encode(), 5) == ("é".encode(), 2)


# --- the cluster ------------------------------------------------------------------------------------------------------


@pytest.mark.verifies(
    "deployment.cluster.Cluster",
    "deployment.cluster_app.Ingress",
    "deployment.cluster_app.split_model",
    kind="parity",
    against="the whole model in torch",
    on="10 prompts by HTTP through 2 stages on 2 nodes, relative to the largest score",
    bound=1e-5,
)
def test_the_split_model_answers_as_the_whole(story, seen):
    seen(story["answers"]["whole"])
    assert story["answers"]["different"] > 2, "a constant answer would pass"


@pytest.mark.verifies(
    "deployment.cluster_app.Stage",
    kind="parity",
    against="the same parts in one process, by onnxruntime",
    on="10 prompts by HTTP through 2 stages on 2 nodes",
    bound=0.0,
)
def test_what_goes_over_the_network_changes_no_bit(story, seen):
    seen(story["answers"]["parts"])


@pytest.mark.verifies(
    "deployment.cluster_app.stay_on_this_address",
    kind="invariant",
    against="the addresses that the cluster's processes listen at",
    on="every listening socket of 3 nodes and 6 replicas",
)
def test_no_port_is_open_to_other_hosts_and_no_replica_steps_back(story):
    listening = story["sockets"]["listening"]
    assert sum("ServeReplica" in name for name, _ in listening) >= 6
    assert {address for _, address in listening} == {"127.0.0.1"}
    assert set(story["sockets"]["nice"]) == {psutil.Process().nice()}


def test_bad_requests_get_422_and_a_sentence(story):
    assert set(story["bad requests"]["statuses"]) == {422}
    assert all(len(sentence) > 20 and "Traceback" not in sentence for sentence in story["bad requests"]["said"])


@pytest.mark.verifies(
    "deployment.cluster_app.Sleep",
    "deployment.cluster_app.sleeper",
    kind="invariant",
    against="3 replicas answer at most 3 requests each 0.2 s, and more than 1 can",
    on="6 clients: 1 replica, 3, and 1 again",
)
def test_replicas_come_with_the_load_and_go_with_it(story):
    told = story["autoscaled"]
    assert told["seen"][0] == 1
    assert told["seen"][-1] == 3
    assert told["answers"] > 1.3 * told["seconds"] / 0.2, "no more than one replica could"
    ready = 3 + 6  # what each replica and each client may have had at hand when the clock began
    assert told["answers"] <= 3 * told["seconds"] / 0.2 + ready


@pytest.mark.verifies(
    "deployment.cluster.Cluster",
    "deployment.cluster.Replica",
    kind="recovery",
    against="no request lost and none answered wrongly, while replicas of both stages get SIGKILL",
    on="8 clients, 2 stages with 2 replicas each",
)
def test_under_load_a_replica_killed_loses_no_request(story):
    told = story["replicas killed"]
    assert told["requests"] > 50
    assert (told["failed"], told["wrong"], told["statuses"]) == (0, 0, [200])
    assert told["retries"] > 0, "nothing was under way on a replica when it was killed"
    assert len(told["replicas"]) == 6, "2 stages with 2 replicas, and 2 in place of those killed"


def test_without_retries_the_requests_that_were_under_way_are_lost(story):
    told = story["replicas killed, one try"]
    assert 0 < told["failed"] < 20
    assert told["wrong"] == 0
    assert told["statuses"] == [200, 503]
    assert "no replica answered in 1 tries (the last one: " in told["said"]


@pytest.mark.verifies(
    "deployment.cluster.Cluster",
    kind="recovery",
    against="no request lost and none answered wrongly, while a whole node gets SIGKILL",
    on="8 clients, 3 local nodes, one killed and another started",
)
def test_under_load_a_node_killed_loses_no_request(story):
    told = story["node killed"]
    assert (told["failed"], told["wrong"], told["statuses"]) == (0, 0, [200])
    assert told["retries"] > 0


@pytest.mark.verifies(
    "deployment.cluster.deployment",
    kind="invariant",
    against="the config file",
    on="one deployment changed, redeployed",
)
def test_one_line_changed_in_the_config_changes_one_deployment(story):
    assert story["scaled"]["kept"], "Stage0 kept its processes while Stage1 lost a replica"
    assert story["scaled"]["answers"] == 256
    config = yaml.safe_load(CONFIG.read_text())
    deployment(config, "split", "Stage1")["num_replicas"] = 5
    assert config["applications"][0]["deployments"][2]["num_replicas"] == 5
    with pytest.raises(ValueError, match="has no deployment split/Stage7; it has split/Ingress, split/Stage0, "):
        deployment(config, "split", "Stage7")


@pytest.mark.verifies(
    "deployment.cluster_process.family",
    "deployment.cluster_console.main",
    kind="recovery",
    against="nothing left: processes, port, folder",
    on="kill -9 of the process that holds a cluster",
)
def test_nothing_outlives_a_holder_that_was_killed(story):
    assert story["left"] == {"what": "left", "processes": [], "folder": False, "refused": True}
    assert len(story["end"]["family"]) > 12


@pytest.mark.verifies(
    "deployment.cluster_process.Process",
    "deployment.cluster_console.Console",
    kind="recovery",
    against="nothing left: processes, folder",
    on="kill -9 of the console itself, with one node",
)
def test_nothing_outlives_a_console_that_was_killed():
    process = Process(environment_python())
    try:
        node = process.ask("add_node", PATIENCE, cpus=1)
        assert node["head"]
        assert process.ask("status", PATIENCE)["applications"] == {}
        with pytest.raises(ClusterError, match="add_node: TypeError"):
            process.ask("add_node", PATIENCE, cpus=1, colour="blue")
        whole = family(process.process)
        assert len(whole) > 4
        process.popen.kill()
        with pytest.raises(ClusterError, match="status: Ray's console has ended"):
            process.ask("status", PATIENCE)
    finally:
        process.close()
    assert until(lambda: all(map(gone, whole)))
    assert not process.folder.exists()


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.verifies(
    "deployment.cluster_process.environment_python",
    "deployment.cluster_process.ClusterError",
    kind="message",
    against="an environment that is missing, or older than its lock",
    on="one sentence that names the command",
)
def test_without_rays_environment_one_sentence_names_the_command(tmp_path, monkeypatch):
    with pytest.raises(ClusterError, match="is not there yet: run `make serve-cluster` once"):
        environment_python(tmp_path)
    (tmp_path / "made-from").write_text("0123 Python 3.11 /somewhere\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    with pytest.raises(ClusterError, match=r"older than requirements-cluster.lock: run `make serve-cluster` again"):
        environment_python(tmp_path)
    monkeypatch.setattr(cluster_process, "LOCK", tmp_path / "none")
    assert environment_python(tmp_path) == tmp_path / "bin" / "python"


def test_a_cluster_without_nodes_is_refused():
    with pytest.raises(ValueError, match="need nodes >= 1 and cpus >= 1 besides the head, got nodes=0"):
        Cluster(CONFIG, nodes=0)
    assert Replica("Stage0#a", "RUNNING", 1, "n").name == "Stage0#a"


def test_the_config_file_is_bound_to_this_machine_and_its_sizes_are_those_of_the_lesson():
    config = yaml.safe_load(CONFIG.read_text())
    assert config["http_options"]["host"] == "127.0.0.1"
    assert [app["name"] for app in config["applications"]] == ["split", "sleep"]
    for app in config["applications"]:
        module, name = app["import_path"].split(":")
        assert module == "bigmodel_course.deployment.cluster_app"
        assert callable(getattr(cluster_app, name))


def test_a_port_that_was_found_free_is_kept_for_ray():
    with contextlib.closing(cluster_console.free_place()) as place, socket.socket() as other, socket.socket() as rays:
        with pytest.raises(OSError, match="in use"):
            other.bind(place.getsockname())
        rays.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        rays.bind(place.getsockname())
