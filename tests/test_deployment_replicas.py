"""Under load, processes are killed, stopped and driven mad: every request gets its right answer."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from serving import PATIENCE, gone, until

from bigmodel_course.deployment import replicas, service_replica
from bigmodel_course.deployment.replicas import Fleet
from bigmodel_course.deployment.sealed import agreed
from bigmodel_course.deployment.traffic import Answer, Traffic, labels

QUESTIONS = [({"pictures": [[1.0] * n + [0.0] * (64 - n)]}, [str(n % 10)]) for n in range(10)]


@pytest.fixture(scope="module")
def fleet():
    with Fleet("sleep:0.01", replicas=3, slots=5, patience=10.0, faults=True, timeout=PATIENCE) as fleet:
        yield fleet


@contextmanager
def traffic(fleet, clients=4):
    """Ask all the while, and let nothing be lost and nothing be wrong."""
    with Traffic(f"{fleet.url}/v1/predict", QUESTIONS, clients=clients, timeout=PATIENCE) as traffic:
        assert until(lambda: len(traffic.answers) >= 20)
        yield traffic
        enough = len(traffic.answers) + 20
        assert until(lambda: len(traffic.answers) >= enough)
    assert traffic.lost == 0, Counter(answer.status for answer in traffic.answers)
    assert traffic.wrong == 0


def names(fleet):
    return [replica.name for replica in fleet.status()]


def states(fleet):
    return {replica.state for replica in fleet.status()}


@pytest.mark.verifies(
    "deployment.replicas.Fleet",
    "deployment.replicas.Replica",
    "deployment.balancer.Balancer",
    "deployment.traffic.Traffic",
    kind="recovery",
    against="no request lost, no wrong answer, all replicas up again",
    on="two of three replicas harmed at once, under load",
)
@pytest.mark.parametrize("harm", [("kill", "weights"), ("body", "freeze"), ("kill", "kill")])
def test_nothing_is_lost_and_nothing_is_wrong(fleet, harm):
    old = {replica.name: replica.pid for replica in fleet.status()}
    with traffic(fleet):
        for name, kind in zip(old, harm, strict=False):
            getattr(fleet, kind)(name) if hasattr(fleet, kind) else fleet.nonsense(name, kind)
        fleet.recovered()
    new = {replica.name: replica.pid for replica in fleet.status()}
    assert [new[name] != pid for name, pid in old.items()] == [True, True, False]


def test_each_replica_has_its_share(fleet):
    used = set(names(fleet))

    def shared():
        shares = Counter(answer.replica for answer in list(sent.answers))
        return shares.total() >= 150 and shares.keys() == used and min(shares.values()) > shares.total() / 10

    with traffic(fleet) as sent:
        assert until(shared)


def test_a_slow_replica_delays_its_requests_and_loses_none(fleet):
    slowed = names(fleet)[0]
    with traffic(fleet) as sent:
        fleet.slow(slowed, 0.1)
        enough = len(sent.answers) + 100
        assert until(lambda: len(sent.answers) >= enough)
        fleet.slow(slowed, None)
    took = {own: [a.took for a in sent.answers if (a.replica == slowed) == own] for own in (True, False)}
    assert len(took[False]) > len(took[True])
    fleet.recovered()


def test_replicas_come_and_go_and_change_their_model_under_load(fleet):
    with traffic(fleet):
        fleet.scale(4)
        assert len(names(fleet)) == 4
        assert until(lambda: states(fleet) == {"up"})
        fleet.scale(2)
        assert len(names(fleet)) == 2
        fleet.rolling_update("sleep:0.02")
        assert {replica.model for replica in fleet.status()} == {"sleep:0.02"}
        with pytest.raises((RuntimeError, ValueError), match=r"nothing\.onnx"):
            fleet.rolling_update("nothing.onnx")
        assert {replica.model for replica in fleet.status()} == {"sleep:0.02"}
    fleet.scale(3)


def test_without_any_replica_there_is_a_clear_503_and_then_an_answer(fleet):
    pids = {replica.name: replica.pid for replica in fleet.status()}
    supervisord = psutil.Process(min(pids.values())).parent()
    for name in pids:
        fleet.freeze(name)
    body, right = QUESTIONS[3]
    supervisord.suspend()  # it would start new ones, perhaps before we ask
    try:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        reply = httpx.post(f"{fleet.url}/v1/predict", json=body, timeout=PATIENCE)
    finally:
        supervisord.resume()
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json() == {"status": 503, "detail": "No replica is up: ask again in a moment."}
    fleet.recovered()
    assert labels(httpx.post(f"{fleet.url}/v1/predict", json=body, timeout=PATIENCE).json()) == right


def test_the_balancer_comes_back_as_it_was(fleet):
    body, right = QUESTIONS[4]
    replies = []

    def answered():
        with suppress(httpx.HTTPError):
            replies.append(httpx.post(f"{fleet.url}/v1/predict", json=body, timeout=PATIENCE))
        return replies and replies[-1].status_code == 200

    os.kill(fleet._machine.supervisor.processes()["haproxy"]["pid"], signal.SIGKILL)
    assert until(answered)
    assert labels(replies[-1].json()) == right
    fleet.recovered()
    assert until(lambda: states(fleet) == {"up"})


def test_errors_of_a_client_are_answered_and_cost_no_replica(fleet):
    refused = httpx.post(f"{fleet.url}/v1/predict", json={"pictures": [[2.0]]}, timeout=PATIENCE)
    assert refused.status_code == 422
    assert "x-seal" not in refused.headers
    assert httpx.get(f"{fleet.url}/v1/proof", timeout=PATIENCE).status_code == 404, (
        "the health check is not for clients"
    )
    assert httpx.get(f"{fleet.url}/docs", timeout=PATIENCE).status_code == 200
    assert states(fleet) == {"up"}


def test_what_proves_itself_and_lies_elsewhere_is_found_by_a_vote(fleet):
    """The seal's limit, and what helps: three replicas asked, and the majority believed."""
    liar, *_ = names(fleet)
    fleet.nonsense(liar, "one input")
    with Traffic(f"{fleet.url}/v1/predict", QUESTIONS, timeout=PATIENCE) as sent:
        assert until(lambda: {liar} <= {answer.replica for answer in list(sent.answers) if answer.wrong})
        enough = len(sent.answers) + 60
        assert until(lambda: len(sent.answers) >= enough)
    assert {answer.replica for answer in sent.answers if answer.wrong} == {liar}
    for body, right in QUESTIONS[:3]:
        said = []
        for name in names(fleet):
            door = httpx.HTTPTransport(uds=str(fleet.door_of(name)))
            with httpx.Client(transport=door, timeout=PATIENCE) as client:
                said.append(labels(client.post("http://fleet/v1/predict", json=body).json())[0])
        assert [agreed(said)] == right
        assert len(set(said)) == 2
    fleet.kill(liar)
    fleet.recovered()


SCRIPT = """
import json, signal, time
from bigmodel_course.deployment.replicas import Fleet
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script runs in the background is deaf to it
fleet = Fleet("sleep:0.01", replicas=1, slots=2, timeout=300.0).start()
print(json.dumps({"folder": str(fleet.folder), "url": fleet.url}), flush=True)
time.sleep(600)
"""


@pytest.mark.verifies(
    "deployment.machinery.Machinery",
    "deployment.machinery.write_private",
    "deployment.supervision.spawn",
    "deployment.supervision.main",
    "deployment.supervision.Supervisor",
    "deployment.service_replica.main",
    "deployment.service_replica.Plan",
    "deployment.doctor.main",
    kind="recovery",
    against="no process, no port, no file left",
    on="SIGKILL and an interrupt of the process that holds the fleet, SIGKILL of supervisord",
)
@pytest.mark.parametrize(
    ("victim", "blow"), [("parent", signal.SIGKILL), ("parent", signal.SIGINT), ("supervisord", signal.SIGKILL)]
)
def test_nothing_is_left_when_a_process_above_is_killed_or_interrupted(victim, blow):
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    try:
        where = json.loads(parent.stdout.readline())
        folder = Path(where["folder"])
        assert folder.stat().st_mode & 0o077 == 0, "the folder holds a secret"
        (supervisord,) = psutil.Process(parent.pid).children()
        assert until(lambda: len(supervisord.children()) == 3), "the balancer, the doctor, a replica"
        family = [supervisord, *supervisord.children()]
        os.kill(parent.pid if victim == "parent" else supervisord.pid, blow)
        assert until(lambda: all(map(gone, family)))
        with pytest.raises(httpx.ConnectError):
            httpx.get(where["url"], timeout=PATIENCE)
        assert victim == "supervisord" or until(lambda: not folder.exists())
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    if victim == "supervisord":  # nobody is left who could tidy up after two SIGKILLs
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink()
        folder.rmdir()


@pytest.mark.verifies(
    "deployment.replicas.Fleet",
    kind="message",
    against="what is wrong, and what was expected",
    on="counts, names, kinds, models",
)
def test_a_fleet_knows_the_faults_of_its_replicas():
    assert set(replicas.FAULTS) == set(service_replica.FAULTS)


def test_errors_say_what_is_wrong(fleet):
    with pytest.raises(ValueError, match="replicas must be a whole number from 0 to slots, 8, got 9"):
        Fleet("sleep:0.01", replicas=9)
    with pytest.raises(ValueError, match="slots must be"):
        Fleet("sleep:0.01", slots=0)
    with pytest.raises(ValueError, match=r"name must be one of replica-1, .* got 'replica-9'"):
        fleet.kill("replica-9")
    with pytest.raises(ValueError, match="kind must be one of weights"):
        fleet.nonsense("replica-1", "rude")
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        fleet.slow("replica-1", 1.5)
    with pytest.raises(ValueError, match="faults must be True"):
        Fleet("sleep:0.01").nonsense("replica-1")


@pytest.mark.verifies(
    "deployment.traffic.Answer",
    "deployment.traffic.labels",
    kind="invariant",
    against="lost, wrong and right by hand",
    on="one answer of each sort",
)
def test_an_answer_is_lost_wrong_or_right():
    sorts = [
        Answer(0, 1, 0, "", False),
        Answer(0, 1, 503, "", False),
        Answer(0, 1, 200, "a", False),
        Answer(0, 1, 200, "a", True),
    ]
    assert [(answer.lost, answer.wrong) for answer in sorts] == [
        (True, False),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert labels({"continuation": "x"}) == "x"
    assert labels({"answers": [{"label": "7"}]}) == ["7"]
    with pytest.raises(ValueError, match="one client and one question"):
        Traffic("http://127.0.0.1:1", [])
