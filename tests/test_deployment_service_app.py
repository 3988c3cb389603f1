"""Every request gets the right status and a sentence; what is measured is what happened."""

import asyncio
import contextlib
import json
import re

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import BODY, LIMITS, PATIENCE, PICTURE, Wire, head, post, until

from bigmodel_course.deployment import service_schemas as schemas
from bigmodel_course.deployment.served_models import Sleep, SleepText
from bigmodel_course.deployment.service import serving
from bigmodel_course.deployment.service_app import create_app
from bigmodel_course.deployment.service_gate import Gate, Refusal, Trace, problem
from bigmodel_course.deployment.service_metrics import Metrics
from bigmodel_course.deployment.service_settings import Settings, fingerprint

JSON = {"content-type": "application/json"}
KEYS = {name: fingerprint(f"{name}'s key") for name in ("anna", "bo", "cy")}
ANNA, BO = ({"authorization": f"Bearer {name}'s key"} for name in ("anna", "bo"))


def asking(running):
    """A client with patience, which trusts no connection that has been idle."""
    return httpx.Client(base_url=running.url, timeout=PATIENCE, limits=LIMITS)


@pytest.fixture(scope="module")
def worker():
    """A classifier that answers at once; small limits."""
    settings = Settings("sleep:0", replica="a", largest_body=20_000, largest_request=4)
    with serving(settings) as running, asking(running) as client:
        client.port = running.port
        yield client


@pytest.fixture(scope="module")
def keyed():
    """A language model that wants keys; cy's are asked for too often in one test, the others' in none."""
    settings = Settings("sleep-text:0", replica="b", keys=KEYS, rate="20/hour")
    with serving(settings) as running, asking(running) as client:
        yield client


def picture(dark):
    return [1.0] * dark + [0.0] * (64 - dark)


@pytest.mark.verifies(
    "deployment.service_app.create_app",
    kind="invariant",
    against="the model's own answers; name, version and replica",
    on="1 to 4 pictures a request, over HTTP",
    bound=0.0,
)
def test_each_picture_gets_its_answer_with_name_version_and_replica(worker, seen):
    for darks in ([7], [1, 12], [9, 8, 7, 6]):
        response = worker.post("/v1/predict", json={"pictures": [picture(dark) for dark in darks]})
        body = response.json()
        assert (body["model"], body["version"], body["replica"]) == ("sleep", "1", "a")
        assert response.headers["x-replica"] == "a"
        want = Sleep().run([np.array(picture(dark)) for dark in darks])
        for answer, row, dark in zip(body["answers"], want, darks, strict=True):
            assert answer["label"] == str(dark % 10)
            seen(np.abs(np.array(list(answer["probabilities"].values())) - row).max())
    assert worker.get("/v1/model").json() == {
        "model": "sleep",
        "version": "1",
        "replica": "a",
        "kind": "classifier",
        "sha256": "",
    }


def test_a_prompt_is_continued_byte_by_byte(keyed):
    response = keyed.post("/v1/predict", json={"prompt": "ab", "length": 5}, headers=ANNA)
    assert response.json()["continuation"] == "cdefg"
    assert response.json()["next"]["99"] == 1.0
    assert keyed.post("/v1/predict", json={"prompt": "z"}, headers=ANNA).json()["continuation"] == "{"
    umlaut = keyed.post(
        "/v1/predict", json={"prompt": "ä"}, headers=ANNA
    )  # its last byte is 164, and 165 alone no text
    assert umlaut.json()["continuation"] == "\N{REPLACEMENT CHARACTER}"


BAD = {  # body, status, what the sentence says
    "not JSON": (b'{"pictures": [', 400, "not JSON"),
    "empty": (b"", 422, "the body: Field required"),
    "not UTF-8": (b'{"pictures": "\xff\xfe"}', 400, "not UTF-8"),
    "too deep": (b"[" * 15_000, 400, "too deep"),
    "a number of 15,000 digits": (b'{"pictures": [[' + b"9" * 15_000 + b"]]}", 400, "a number too long"),
    "a list": (b"[1]", 422, "the body: Input should be a valid dictionary"),
    "no pictures": (b'{"pictures": []}', 422, "at least 1 item"),
    "five pictures": (json.dumps({"pictures": [PICTURE] * 5}).encode(), 422, "at most 4 items"),
    "63 pixels": (json.dumps({"pictures": [PICTURE[1:]]}).encode(), 422, "pictures.0: List should have at least 64"),
    "not a list": (b'{"pictures": 5}', 422, "pictures: Input should be a valid list, got 5"),
    "NaN": (BODY.replace(b"0.0", b"NaN", 1), 422, "pictures.0.0: Input should be a finite number, got nan"),
    "infinity": (BODY.replace(b"0.0", b"1e999", 1), 422, "pictures.0.0: Input should be"),
    "huge": (BODY.replace(b"1.0", b"1e300", 1), 422, "pictures.0.60: Input should be less than or equal to 1"),
    "negative": (BODY.replace(b"0.0", b"-0.1", 1), 422, "greater than or equal to 0, got -0.1"),
    "a number as text": (BODY.replace(b"0.0", b'"0.0"', 1), 422, "valid number, got '0.0'"),
    "true": (BODY.replace(b"0.0", b"true", 1), 422, "valid number, got True"),
    "null": (BODY.replace(b"0.0", b"null", 1), 422, "valid number, got None"),
    "a field too many": (BODY[:-1] + b', "speed": 3}', 422, "speed: Extra inputs"),
    "half a surrogate": (b'{"pictures": "\\ud800"}', 422, r"valid list, got '\ud800'"),
    "too large": (b" " * 20_001, 413, "20,000 bytes, got 20,001"),
}


@pytest.mark.verifies(
    "deployment.service_schemas.faults",
    "deployment.service_schemas.pictures",
    "deployment.service_gate.problem",
    kind="message",
    against="the status, where the fault is, what was expected and what came",
    on=f"{len(BAD)} wrong bodies",
)
@pytest.mark.parametrize("name", BAD)
def test_a_wrong_body_gets_its_status_and_a_sentence(worker, name):
    body, status, sentence = BAD[name]
    response = worker.post("/v1/predict", content=body, headers=JSON)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json().keys() == {"status", "title", "detail"}
    assert sentence in response.json()["detail"]
    assert len(response.text) < 400  # a long wrong value is not sent back
    assert worker.post("/v1/predict", content=BODY, headers=JSON).status_code == 200


@pytest.mark.verifies(
    "deployment.service_schemas.Prompt",
    kind="message",
    against="the field and what it must be",
    on="prompts and lengths that are wrong",
)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": ""}, "prompt: String should have at least 1"),
        ({"prompt": "a" * 2_001}, "prompt: String should have at most 2000"),
        ({"prompt": 5}, "prompt: Input should be a valid string, got 5"),
        ({"length": 0}, "length: Input should be greater"),
        ({"length": 65}, "length: Input should be less"),
        ({"length": 1.5}, "length: Input should be a valid integer"),
    ],
)
def test_a_wrong_prompt_gets_a_sentence(keyed, change, sentence):
    response = keyed.post("/v1/predict", json={"prompt": "a"} | change, headers=BO)
    assert response.status_code == 422
    assert response.json()["detail"].startswith(sentence)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/predict", 405), ("DELETE", "/health", 405), ("GET", "/docs/assets/../../x", 404)],
)
def test_other_paths_and_methods_are_refused_in_the_same_form(worker, method, path, status):
    response = worker.request(method, path)
    assert response.status_code == status
    assert response.json()["status"] == status
    assert status != 405 or response.headers["allow"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/plain", 415), (None, 415)],
)
def test_only_a_body_that_says_it_is_json_is_read_as_json(worker, kind, status):
    headers = {"content-type": kind} if kind else {}
    assert worker.post("/v1/predict", content=BODY, headers=headers).status_code == status


def test_a_body_that_is_far_too_large_is_refused_before_it_is_read(worker):
    with Wire(worker.port) as wire:
        wire.send(head(content_type="application/json", content_length=10**12))
        status, answer = wire.answer()
    assert (status, answer["detail"]) == (413, "A body may have 20,000 bytes, got 1,000,000,000,000.")
    with Wire(worker.port) as wire:  # no length said, and no end in sight
        wire.send(head(content_type="application/json", transfer_encoding="chunked"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has said no and hung up before our end
            for _ in range(20):
                wire.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        status, answer = wire.answer()
    assert status == 413


@pytest.mark.verifies(
    "deployment.service_gate.Gate",
    "deployment.service_gate.Refusal",
    kind="message",
    against="401, 415 or 429 with a sentence, and the headers that go with them",
    on="no key, a wrong key, another scheme, a client that asks too often",
)
def test_who_asks_without_a_key_or_too_often_is_refused_before_the_body_is_parsed(keyed):
    assert keyed.get("/health").status_code == 200  # open: a balancer has no key
    wrong = {"authorization": "Bearer another key"}
    basic = {"authorization": "Basic anna's key"}
    for headers, what in (({}, "is missing"), (wrong, "is not known"), (basic, "is not known")):
        response = keyed.post("/v1/predict", content=b"{", headers=JSON | headers)
        assert response.status_code == 401
        assert what in response.json()["detail"]
        assert response.headers["www-authenticate"] == "Bearer"
    often = {"authorization": "Bearer cy's key"}
    statuses = [keyed.get("/v1/model", headers=often).status_code for _ in range(25)]
    assert statuses == sorted(statuses)
    assert set(statuses) == {200, 429}
    response = keyed.post("/v1/predict", json={"prompt": "a"}, headers=often)
    assert "You may ask 20/hour" in response.json()["detail"]
    assert 1 <= int(response.headers["retry-after"]) <= 3601
    assert keyed.get("/v1/model", headers={"authorization": "bearer bo's key"}).status_code == 200  # others may


def test_requests_are_counted_by_route_and_status_and_a_path_is_no_label():
    """On a worker that nobody else asks: a request is counted when its answer has left, so maybe in the next test."""

    def counted():
        families = {each.name: each for each in text_string_to_metric_families(client.get("/metrics").text)}
        samples = families["service_requests"].samples
        return {(s.labels["route"], s.labels["status"]): s.value for s in samples if s.name.endswith("_total")}

    wanted = {("other", "404"): 3, ("/v1/predict", "200"): 3}
    with serving(Settings("sleep:0")) as running, asking(running) as client:
        for i in range(3):
            client.get(f"/made/up/{i}")
            client.post("/v1/predict", content=BODY, headers=JSON)
        assert until(lambda: wanted.items() <= counted().items() and ("/metrics", "200") in counted())
        assert counted().keys() == {*wanted, ("/metrics", "200")}


@pytest.mark.verifies(
    "deployment.service_metrics.Metrics",
    kind="invariant",
    against="prometheus_client's own parser, and what was told to it",
    on="two requests of 0.3 s and a batch of 5",
)
def test_metrics_of_two_applications_do_not_mix():
    one, other = Metrics(Sleep()), Metrics(SleepText())
    for _ in range(2):
        one.ended({"route": type("Route", (), {"path": "/x"})}, 200, 0.3)
    one.batch.observe(5)
    samples = {(s.name, *sorted(s.labels.values())): s.value for f in parsed(one) for s in f.samples}
    assert samples["service_requests_total", "/x", "200"] == 2
    assert samples["service_seconds_sum", "/x"] == 0.6
    assert samples["service_seconds_bucket", "/x", "0.2"] == 0
    assert samples["service_batch_rows_sum",] == 5
    assert samples["service_model", "", "1", "sleep"] == 1
    assert not any(s.name == "service_requests_total" for f in parsed(other) for s in f.samples)


def parsed(metrics):
    return list(text_string_to_metric_families(metrics.text().decode()))


@pytest.mark.verifies(
    "deployment.service_gate.Trace",
    kind="invariant",
    against="the sum of the stages",
    on="a request that ran 0.2 s in the model, and a trace by hand",
)
def test_the_stages_of_a_request_add_up_to_its_time():
    with serving(Settings("sleep:0.2")) as running, asking(running) as client:
        header = client.post("/v1/predict", content=BODY, headers=JSON).headers["server-timing"]
    stages = {part.split(";dur=")[0]: float(part.split(";dur=")[1]) for part in header.split(", ")}
    assert list(stages) == ["read", "parse", "queue", "model", "resume", "write", "total"]
    total = stages.pop("total")
    assert abs(sum(stages.values()) - total) < 1
    assert stages["model"] >= 200
    trace = Trace()
    trace.stage("a")
    trace.split(("b", 1e-9))
    trace.stage("a")
    assert list(trace.stages) == ["a", "b", "resume"]


def test_an_answer_that_takes_too_long_and_a_queue_that_is_full_are_refused():
    settings = Settings("sleep:1", batch=1, queue=4, largest_request=4, answer_seconds=3.0)
    four = post(json.dumps({"pictures": [PICTURE] * 4}).encode(), connection="close")
    with (
        serving(settings) as running,
        asking(running) as client,
        Wire(running.port) as late,
        Wire(running.port) as full,
    ):
        late.send(four)
        assert until(lambda: re.search(rb"^service_waiting_rows [1-4]", client.get("/metrics").content, re.MULTILINE))
        full.send(four)
        assert full.answer()[0] == 503
        assert late.answer()[0] == 504
        assert until(lambda: client.post("/v1/predict", content=BODY, headers=JSON).status_code == 200)


def test_the_page_of_the_description_needs_no_network(worker):
    page = worker.get("/docs").text
    assert "http://" not in page.replace(str(worker.base_url), "")
    assert "https://" not in page
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        assert f"/docs/assets/{asset}" in page
        assert worker.get(f"/docs/assets/{asset}").status_code == 200
    description = worker.get("/openapi.json").json()
    assert description["openapi"].startswith("3.0")  # what this version of the page reads
    assert set(description["paths"]) == {"/v1/predict", "/v1/model", "/health", "/ready"}


@pytest.mark.verifies(
    "deployment.service_schemas.Guess",
    "deployment.service_schemas.Guesses",
    "deployment.service_schemas.Continuation",
    "deployment.service_schemas.ModelCard",
    "deployment.service_schemas.Status",
    kind="invariant",
    against="the schemas in its own OpenAPI description",
    on="both kinds of application",
)
def test_the_description_names_every_form():
    described = {}
    for model in (Sleep(), SleepText()):
        app = create_app(Settings("sleep:0", keys=KEYS), model)
        described |= app.openapi()["components"]["schemas"]
        assert app.openapi()["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    forms = (schemas.Guess, schemas.Guesses, schemas.Continuation, schemas.ModelCard, schemas.Status, schemas.Prompt)
    for form in forms:
        assert set(described[form.__name__]["required"]) <= form.model_fields.keys() | set()
    assert described["Pictures"]["properties"]["pictures"]["maxItems"] == 32


class Broken(Sleep):
    def run(self, rows):
        raise ArithmeticError("the secret of the model")


async def asked(app):
    """The answer of an application in this process."""
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://a") as client:
        return await client.post("/v1/predict", content=BODY, headers=JSON), await client.get("/health")


def test_a_model_that_raises_is_our_fault_and_tells_nobody_why(caplog):
    response, health = asyncio.run(asked(create_app(Settings("sleep:0"), Broken())))
    assert response.status_code == 500
    assert "our fault" in response.json()["detail"]
    assert "secret" not in response.text
    assert "the secret of the model" in caplog.text
    assert health.status_code == 200


def test_a_refusal_and_its_body_say_the_same():
    refusal = Refusal(429, "Later.", {"retry-after": "1"})
    body = json.loads(problem(refusal.status, refusal.detail))
    assert (body["status"], body["title"], body["detail"]) == (429, "Too Many Requests", "Later.")
    assert str(refusal) == "Later."
    assert callable(Gate)
