"""Thousands of requests made from the service's own OpenAPI description: none takes it down, each gets its status.

1,000 of them here; `python -m benchmarks cases` asks for 10,000 by the same test.
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import hypothesis
import psutil
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from serving import BODY, LIMITS, PATIENCE, Wire, head, post

from bigmodel_course.deployment.service import serving
from bigmodel_course.deployment.service_settings import Settings, fingerprint

CASES = int(os.environ.get("SERVICE_CASES", 1_000))
SHARES = {  # of the cases: pictures take longer to make up than text
    ("sleep-text:0", GenerationMode.POSITIVE): 0.4,
    ("sleep-text:0", GenerationMode.NEGATIVE): 0.45,
    ("sleep:0", GenerationMode.POSITIVE): 0.1,
    ("sleep:0", GenerationMode.NEGATIVE): 0.05,
}
DOCUMENTED = {200, 400, 408, 413, 415, 422}


def answered(running):
    """Does it still answer rightly?"""
    with httpx.Client(base_url=running.url, timeout=PATIENCE) as client:
        body = {"prompt": "a"} if b"prompt" in client.get("/openapi.json").content else json.loads(BODY)
        found = client.post("/v1/predict", json=body).json()
    return found.get("continuation") == "b" or found["answers"][0]["label"] == "4"


def ask_all(running, mode, count):
    """Statuses of `count` generated requests; AssertionError at the first that is answered wrongly."""
    operation = schemathesis.openapi.from_url(f"{running.url}/openapi.json")["/v1/predict"]["POST"]
    statuses, idle_since = Counter(), time.monotonic()
    everything = list(hypothesis.HealthCheck)
    profile = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": everything}

    @hypothesis.settings(max_examples=count, phases=[hypothesis.Phase.generate], **profile)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        nonlocal idle_since
        if time.monotonic() - idle_since > LIMITS.keepalive_expiry:  # making the case up took long
            connection.close()
        status, kind, answer = sent(connection, case)
        statuses[status] += 1
        idle_since = time.monotonic()
        assert status in DOCUMENTED, answer
        assert (status == 200) == (mode is GenerationMode.POSITIVE), (case.body, answer)
        assert status == 200 or (kind == "application/problem+json" and len(json.loads(answer)["detail"]) > 10)

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)) as connection:
        ask()
    return statuses


def sent(connection, case):
    """(status, content type, body) of the answer; several times as fast as Schemathesis's own way."""
    wanted = ("method", "url", "headers", "json", "data", "params")
    parts = {key: value for key, value in case.as_transport_kwargs().items() if key in wanted}
    ready = requests.Request(**parts).prepare()
    connection.request(ready.method, ready.path_url, ready.body, dict(ready.headers))
    response = connection.getresponse()
    return response.status, response.headers["content-type"], response.read()


@pytest.mark.verifies(
    "deployment.service_app.create_app",
    kind="recovery",
    against="200 for each valid request and 4xx with a sentence for each invalid one; the same process afterwards",
    on="1,000 requests (10,000 by python -m benchmarks cases) that Schemathesis makes from the OpenAPI description",
)
def test_generated_requests_each_get_their_status():
    seen = Counter()
    for model in ("sleep-text:0", "sleep:0"):
        with serving(Settings(model, largest_request=2)) as running:
            process = psutil.Process(running.pid)
            assert answered(running)
            before = process.memory_info().rss
            for (name, mode), share in SHARES.items():
                if name == model:
                    seen += ask_all(running, mode, round(CASES * share))
            assert answered(running)
            assert process.is_running()
            assert process.num_fds() < 60  # no connection is forgotten
            assert process.memory_info().rss < before + 50 * 2**20
            assert "Traceback" not in running.log()
    assert sum(seen.values()) >= CASES
    assert seen[200] > CASES / 3
    assert seen[422] > CASES / 10


@pytest.mark.parametrize("model", ["sleep:0", "sleep-text:0"])
def test_it_does_what_its_description_says_of_every_route_method_and_header(model, tmp_path):
    settings = Settings(model, keys={"test": fingerprint("the key")}, largest_request=2)
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", "all", "--max-examples", "25", "--phases", "examples,coverage,fuzzing", "--seed", "1"]
    options += ["--report", "json", "--report-dir", str(tmp_path), "--generation-database", "none", "--no-color"]
    options += ["--suppress-health-check", "too_slow"]  # which is about the machine
    with serving(settings) as running:
        command = [program, "run", f"{running.url}/openapi.json", "-H", "Authorization: Bearer the key", *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=5 * PATIENCE, cwd=tmp_path)
        assert httpx.get(f"{running.url}/health", timeout=PATIENCE).status_code == 200
    assert run.returncode == 0, run.stdout[-4000:]
    (report,) = tmp_path.glob("*.json")
    assert json.loads(report.read_text())["test_cases"]["generated"] > 100


DAMAGE = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5)


def test_damaged_requests_are_refused_or_answered_and_never_end_the_service():
    whole = post(BODY, connection="close")
    heads = (head("GET", "/health", connection="close"), whole)

    @hypothesis.settings(max_examples=300, database=None)
    @hypothesis.given(which=st.sampled_from(heads), damage=DAMAGE, cut=st.integers(0, 10_000))
    def damaged(which, damage, cut):
        data = bytearray(which)
        for place, byte in damage:
            data[place % len(data)] = byte
        with Wire(running.port) as wire:
            with contextlib.suppress(OSError):  # it may have heard enough, and hung up
                wire.send(bytes(data[: cut or None]))
                wire.socket.shutdown(1)  # nothing more comes: half a request
            data = wire.rest()
        assert not data or 200 <= int(data.split()[1]) < 500

    with serving(Settings("sleep:0", request_seconds=2.0)) as running:
        damaged()
        assert answered(running)
        assert psutil.Process(running.pid).num_fds() < 60
        assert "Traceback" not in running.log()
