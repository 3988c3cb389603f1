"""A worker starts, says where it listens, and is gone afterwards, whatever happens to it or to its parent."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from serving import BODY, PATIENCE, Wire, gone, parsed, post, until

from bigmodel_course.deployment import service_settings, service_worker
from bigmodel_course.deployment.service import Running, serving
from bigmodel_course.deployment.service_settings import Settings, client_of, fingerprint, new_key

MODULE = "bigmodel_course.deployment.service"


JSON = {"content-type": "application/json"}


def get(url):
    return httpx.get(url, timeout=PATIENCE)


def predict(url):
    return httpx.post(f"{url}/v1/predict", content=BODY, headers=JSON, timeout=PATIENCE)


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE):
        return True
    return False


@pytest.mark.verifies(
    "deployment.service.serving",
    "deployment.service.Running",
    kind="recovery",
    against="no process and no listener is left",
    on="a block that ends, one that raises, one that is interrupted",
)
@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_a_worker_is_ready_in_the_block_and_gone_behind_it(end):
    with contextlib.suppress(*([end] if end else [])), serving(Settings("sleep:0", replica="a")) as running:
        assert isinstance(running, Running)
        process = psutil.Process(running.pid)
        assert get(f"{running.url}/ready").json() == {"status": "ready", "replica": "a"}
        assert running.log() == ""
        if end:
            raise end
    assert running.process.returncode == 0
    assert gone(process)
    assert not listens(running.port)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says who listens on which address, on Linux only")
def test_a_worker_listens_on_loopback_only():
    with serving(Settings("sleep:0")) as running:
        ears = [each.laddr for each in psutil.Process(running.pid).net_connections() if each.status == "LISTEN"]
    assert [(ear.ip, ear.port) for ear in ears] == [("127.0.0.1", running.port)]


def test_a_stopped_worker_is_ended_too():
    with serving(Settings("sleep:0", stop_seconds=0.1)) as running:
        os.kill(running.pid, signal.SIGSTOP)
    assert running.process.returncode == -signal.SIGKILL


PARENT = f"""
import sys, time
from {MODULE} import Settings, serving
with serving(Settings("sleep:0")) as running:
    print(running.pid, running.port, flush=True)
    time.sleep(600)
"""


@pytest.mark.verifies(
    "deployment.lifetime.end_with_stdin",
    kind="recovery",
    against="the worker is gone and its port is free",
    on="the parent killed by SIGKILL",
)
def test_when_the_parent_is_killed_its_worker_ends():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        pid, port = map(int, parent.stdout.readline().split())
        worker = psutil.Process(pid)
        assert listens(port)
        parent.kill()
        assert until(lambda: gone(worker))
        assert not listens(port)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.verifies(
    "deployment.lifetime.die_with_parent",
    kind="recovery",
    against="the worker is gone",
    on="the parent killed by SIGKILL, the worker stopped by SIGSTOP before",
)
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_can_ask_linux_to_die_with_its_parent_even_while_it_is_stopped():
    command = [sys.executable, "-m", MODULE, "--model", "sleep:0", "--port", "0", "--die-with-parent"]
    script = f"import subprocess; subprocess.run({command!r})"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        worker = psutil.Process(json.loads(parent.stdout.readline())["pid"])
        worker.suspend()
        parent.kill()
        assert until(lambda: gone(worker))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.verifies(
    "deployment.service.main",
    kind="message",
    against="the reason, and exit code 2",
    on="no model, unknown settings, a port that is taken",
)
def test_what_cannot_be_served_says_why(tmp_path):
    wrong = tmp_path / "settings.json"
    wrong.write_text('{"model": "sleep:0", "speed": 3}')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, reason in (
            (["--model", str(tmp_path / "none.onnx")], "none.onnx"),
            (["--settings", str(wrong)], "settings do not know speed"),
            (["--model", "sleep:0", "--port", port], "port must be free"),
            ([], "--model or --settings is needed"),
        ):
            command = [sys.executable, "-m", MODULE, *arguments]
            run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            assert run.returncode == 2
            assert reason in run.stderr
            assert "Traceback" not in run.stderr


def test_a_worker_that_does_not_start_is_an_error_with_its_log(tmp_path):
    worker = serving(Settings(str(tmp_path / "none.onnx")))
    with pytest.raises(RuntimeError, match=r"the worker was not ready.*none\.onnx"), worker:
        pass


@pytest.mark.verifies(
    "deployment.service_worker.announcement",
    kind="invariant",
    against="the process and the replica that answer there",
    on="a worker started by hand, from a settings file",
)
def test_a_settings_file_is_read_and_model_and_replica_win_over_it(tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text(Settings("sleep:9", replica="file", batch=3).to_json())
    command = [sys.executable, "-m", MODULE, "--settings", str(settings), "--replica", "b", "--model", "sleep:0"]
    worker = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE)
    try:
        where = json.loads(worker.stdout.readline())
        assert (where["pid"], where["replica"]) == (worker.pid, "b")
        assert get(f"http://127.0.0.1:{where['port']}/v1/model").json()["replica"] == "b"
    finally:
        worker.terminate()
        assert worker.wait(PATIENCE) == 0
        worker.stdout.close()


@pytest.mark.verifies(
    "deployment.service_worker.listen",
    kind="invariant",
    against="one answer over a Unix socket; the median of 21 answers over TCP is below 10 of those",
    on="requests on one connection, one after the other",
)
def test_over_tcp_no_answer_waits_for_the_receipt_of_its_head(tmp_path):
    path = str(tmp_path / "worker.sock")
    command = [sys.executable, "-m", MODULE, "--model", "sleep:0", "--uds", path]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert json.loads(worker.stdout.readline())["uds"] == path
        with serving(Settings("sleep:0")) as running:
            door = httpx.HTTPTransport(uds=path)
            with (
                httpx.Client(base_url=running.url, timeout=PATIENCE) as tcp,
                httpx.Client(base_url="http://worker", transport=door, timeout=PATIENCE) as uds,
            ):
                assert until(lambda: times_slower(tcp, uds) < 10)  # who waits for receipts does so in every series
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    with contextlib.closing(service_worker.listen(0, path)) as again:  # what a killed worker left is no hindrance
        assert again.getsockname() == path
    with contextlib.closing(service_worker.listen(0)) as tcp:
        assert tcp.proto == socket.IPPROTO_TCP  # or asyncio does not set TCP_NODELAY


def times_slower(one, other):
    """Of 21 answers each, asked in turn: the median of one over that of the other."""
    times = {one: [], other: []}
    for _ in range(21):
        for client, taken in times.items():
            start = time.perf_counter()
            assert client.post("/v1/predict", content=BODY, headers=JSON).json()["answers"][0]["label"] == "4"
            taken.append(time.perf_counter() - start)
    return sorted(times[one])[10] / sorted(times[other])[10]


@pytest.mark.verifies(
    "deployment.service_worker.Worker",
    kind="recovery",
    against="every request is answered; /ready says 503; exit code 0",
    on="SIGTERM with requests under way, on a connection kept alive and on new ones, drain 6 s",
)
def test_a_worker_that_is_told_to_stop_answers_what_it_has():
    settings = Settings("sleep:1", batch=1, drain=6.0, answer_seconds=PATIENCE, stop_seconds=PATIENCE)
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(serving(settings))
        client = stack.enter_context(httpx.Client(base_url=running.url, timeout=PATIENCE))
        client.get("/ready").raise_for_status()
        wires = [stack.enter_context(Wire(running.port)) for _ in range(3)]
        for wire in wires:
            wire.send(post(connection="close"))
        assert until(lambda: re.search(rb"^service_waiting_rows [12]", client.get("/metrics").content, re.MULTILINE))
        running.process.send_signal(signal.SIGTERM)
        assert until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").headers["connection"] == "close"  # ask elsewhere next time
        wires.append(stack.enter_context(Wire(running.port)))
        wires[-1].send(post(connection="close"))
        assert [wire.answer()[0] for wire in wires] == [200] * 4
        assert running.process.wait(PATIENCE) == 0
    assert not listens(running.port)


def test_a_second_signal_ends_the_draining():
    with serving(Settings("sleep:0", drain=3600)) as running:
        running.process.send_signal(signal.SIGTERM)
        assert until(lambda: get(f"{running.url}/ready").status_code == 503)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0


@pytest.mark.verifies(
    "deployment.service_worker.PatientProtocol",
    kind="recovery",
    against="the status and a sentence; other clients are answered meanwhile and afterwards",
    on="clients that send half a head, half a body, a byte at a time, nothing, no HTTP; that go away; that do not read",
)
def test_slow_and_broken_clients_get_a_sentence_and_hinder_nobody():
    half, slow = post()[:40], post()[:-20]
    late = 408, "head of a request must arrive within 3 seconds"
    cases = {  # what is sent before silence, and what comes back
        "half a head": ([half], *late),
        "half a body": ([slow], 408, "whole request must arrive within 3 seconds"),
        "no HTTP": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n"], 400, "not a whole HTTP request"),
        "a head without end": ([b"GET / HTTP/1.1\r\n", *[b"x: y\r\n" * 1000] * 3], 400, "at most 16,384 bytes"),
        "two lengths": (
            [b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"],
            400,
            "not a",
        ),
        "nothing": ([], 0, ""),
    }
    with serving(Settings("sleep:0", request_seconds=3.0)) as running, contextlib.ExitStack() as stack:
        wires = {}
        for name, (parts, _, _) in {**cases, "gone": ([slow], 0, "")}.items():
            wires[name] = stack.enter_context(Wire(running.port))  # its time runs from here
            for part in parts:
                with contextlib.suppress(ConnectionError):  # it may have heard enough
                    wires[name].send(part)
        wires.pop("gone").socket.close()
        assert predict(running.url).status_code == 200
        drip = wires["drip"] = stack.enter_context(Wire(running.port))
        drip.send(half)
        with contextlib.suppress(ConnectionError):
            while not select.select([drip.socket], [], [], 0.05)[0]:  # each byte in time, and there is no last one
                drip.send(b"x")
        for name, (_, status, sentence) in {**cases, "drip": ([], *late)}.items():
            got, answer = wires[name].answer()
            assert got == status, name
            assert not sentence or sentence in answer["detail"], name
        assert predict(running.url).status_code == 200


def test_a_client_that_does_not_take_its_answer_is_let_go():
    with serving(Settings("sleep:0", request_seconds=3.0)) as running:

        def held():
            return any(each.status == "ESTABLISHED" for each in psutil.Process(running.pid).net_connections())

        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", running.port))
            with contextlib.suppress(ConnectionError):  # 40 MB of answers that nobody reads
                deaf.sendall(b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nhost: a\r\n\r\n" * 40)
            assert until(held)
            assert until(lambda: not held())
        assert get(f"{running.url}/health").status_code == 200


def test_requests_on_one_connection_are_answered_in_order_also_when_sent_together():
    with serving(Settings("sleep:0")) as running, Wire(running.port) as wire:
        pictures = [[1.0] * dark + [0.0] * (64 - dark) for dark in (1, 2, 3)]
        bodies = [json.dumps({"pictures": [each]}).encode() for each in pictures]
        wire.send(b"".join(map(post, bodies[:2])) + post(bodies[2], connection="close"))
        answers = wire.rest().split(b"HTTP/1.1 ")[1:]
        labels = [parsed(b"HTTP/1.1 " + each)[1]["answers"][0]["label"] for each in answers]
    assert labels == ["1", "2", "3"]


@pytest.mark.verifies(
    "deployment.service_settings.Settings",
    kind="message",
    against="the name of the setting and what it must be",
    on="one wrong value of each kind; JSON of the wrong form",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be a whole number"),
        ({"queue": 1.5}, "queue must be a whole number"),
        ({"queue": 8}, "queue must hold the largest request, 32 rows, got 8"),
        ({"answer_seconds": 0}, "answer_seconds must be above 0"),
        ({"drain": -1}, "drain must be from 0"),
        ({"replica": "a\r\nX-Evil: 1"}, "replica must be 1 to 64 printable"),
        ({"keys": {"anna": "secret"}}, "64 hex digits; 'anna'"),
        ({"rate": "often"}, 'rate must read like "100/second"'),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings("sleep:0", **change)


def test_settings_survive_json_and_hold_no_key():
    key = new_key()
    settings = Settings("m.onnx", keys={"anna": fingerprint(key)}, rate="5/minute", drain=0.5)
    assert Settings.from_json(settings.to_json()) == settings
    assert key not in settings.to_json()
    for wrong in ("[1]", '{"keys": 3}', '{"batch": 2}', '{"model": "a", "keys": []}', '{"model": "a", "rate": 3}', "x"):
        with pytest.raises(ValueError, match=r"settings|Expecting|rate"):
            Settings.from_json(wrong)


@pytest.mark.verifies(
    "deployment.service_settings.client_of",
    "deployment.service_settings.fingerprint",
    "deployment.service_settings.new_key",
    kind="invariant",
    against="every entry is compared by hmac.compare_digest, whatever matches first",
    on="three clients, their keys, keys one character off, and an empty one",
)
def test_a_key_finds_its_client_and_every_entry_is_compared(monkeypatch):
    keys = {client: new_key() for client in ("anna", "bo", "cy")}
    known = {client: fingerprint(key) for client, key in keys.items()}
    assert len({*keys.values()}) == 3
    assert all(len(key) >= 43 for key in keys.values())  # 256 bits
    compared = []
    right = service_settings.hmac.compare_digest
    monkeypatch.setattr(service_settings.hmac, "compare_digest", lambda a, b: compared.append(b) or right(a, b))
    for client, key in keys.items():
        assert client_of(key, known) == client
        assert client_of(key[:-1], known) is client_of(f"{key} ", known) is client_of("", known) is None
    assert compared == list(known.values()) * 12


def test_a_worker_needs_no_torch():
    modules = "served_models, service_app, service_worker, runtime"
    code = f"import sys; from bigmodel_course.deployment import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0
