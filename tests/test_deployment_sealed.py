"""A seal fits one answer to one request by one model; whatever else leaves is noticed."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_course.deployment import sealed
from bigmodel_course.deployment.served_models import Sleep
from bigmodel_course.deployment.service_replica import FAULTS, Faulty, Garbling


class Linear:
    """A small classifier whose weights can be spoiled."""

    kind, name, version, classes = "classifier", "linear", "1", tuple("0123456789")

    def __init__(self):
        self.weights = np.random.default_rng(1).random((64, 10))

    def run(self, rows):
        scores = np.stack(rows) @ self.weights
        return scores / scores.sum(axis=1, keepdims=True)


PICTURE = [np.linspace(0, 1, 64)]


@pytest.mark.verifies(
    "deployment.sealed.Proven",
    "deployment.sealed.witness",
    kind="invariant",
    against="a model whose weights change and change back",
    on="one weight of 640",
)
def test_a_proof_stays_wrong_once_the_weights_have_changed():
    model = sealed.Proven(Linear())
    right = model.proof
    model.run(PICTURE)
    assert model.proof == right
    assert model.name == "linear"
    model.weights[3, 4] += 1.0
    model.run(PICTURE)
    assert model.proof == b""
    model.weights[3, 4] -= 1.0
    assert model.prove() == b"", "what was wrong once is not trusted again"
    started_wrong = Linear()
    started_wrong.weights[3, 4] += 1.0
    assert sealed.Proven(started_wrong).proof not in (right, b"")
    assert sealed.witness(Sleep(9.0)).each == 0.0, "a model that only waits proves itself without waiting"


@given(st.binary(max_size=40), st.integers(0, 39), st.text("ab1", max_size=3), st.sampled_from([200, 422, 503]))
@pytest.mark.verifies(
    "deployment.sealed.seal",
    "deployment.sealed.verify",
    "deployment.sealed.key_of",
    kind="invariant",
    against="every other body, number, status, key",
    on="generated answers",
)
def test_a_seal_fits_nothing_else(body, place, number, status):
    key = sealed.key_of(b"secret", b"proof")
    mark = sealed.seal(key, number, status, body)
    assert sealed.verify(key, number, status, body, mark)
    changed = body + b"x" if place >= len(body) else body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
    others = [
        (key, number, status, changed),
        (key, f"{number}1", status, body),
        (key, number, status + 1, body),
        (sealed.key_of(b"secret", b"another proof"), number, status, body),
        (sealed.key_of(b"another secret", b"proof"), number, status, body),
    ]
    assert not any(sealed.verify(*other, mark) for other in others)
    assert not sealed.verify(key, number, status, body, "")
    assert not sealed.verify(key, number, status, body, "ß")


async def application(scope, receive, send):
    (answer,) = scope["state"].run(PICTURE)
    parts = str(answer.argmax()).encode(), b" is the label"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": parts[0], "more_body": True})
    await send({"type": "http.response.body", "body": parts[1]})


def answer(app, model, path="/v1/predict", number=b"7"):
    """(status, body, seal) of one request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"x-request-number", number)], "state": model}
    asyncio.run(app(scope, None, send))
    head = dict(sent[0]["headers"])
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent), head.get(b"x-seal", b"").decode()


def replica(fault):
    """A replica of the linear model without its process, broken as `fault` says."""
    asked = Faulty(Linear(), lambda: fault, kinds=["weights"])
    proven = sealed.Proven(Linear())
    proven._model = proven._asked = asked  # it was well when it started
    served = Faulty(proven, lambda: fault, kinds=["one input"])
    application.state = SimpleNamespace(draining=False)
    return Garbling(sealed.Sealing(application, proven, b"secret"), lambda: fault), served


def verified(got, number="7"):
    key = sealed.key_of(b"secret", sealed.Proven(Linear()).proof)
    return sealed.verify(key, number, *got)


@pytest.mark.verifies(
    "deployment.sealed.Sealing",
    "deployment.service_replica.Faulty",
    "deployment.service_replica.Garbling",
    "deployment.service_replica.FAULTS",
    kind="recovery",
    against="the seal that the right model makes",
    on="four kinds of nonsense",
)
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_the_seal_of_nonsense_does_not_fit(fault):
    right = answer(*replica(""))
    assert verified(right)
    assert right[1].endswith(b" is the label")
    app, served = replica(fault)
    answer(app, served, number=b"6")
    got = answer(app, served)
    assert got[0] == 200, "nonsense looks well"
    assert verified(got) == (fault in ("", "one input")), "what proves itself and lies elsewhere passes"
    assert (got[1] == right[1]) == (fault in ("", "replay"))
    if fault == "weights":
        assert not verified(answer(app, served, path="/v1/proof"))


def test_the_health_check_proves_and_a_replica_that_leaves_says_so():
    app, model = replica("")
    assert verified(answer(app, model, path="/v1/proof"))
    app.state.draining = True
    assert answer(app, model, path="/v1/proof")[0] == 503
    assert answer(app, model, path="/docs/page")[2] == "", "the page's files are too large to be held"


@pytest.mark.verifies(
    "deployment.sealed.question", kind="invariant", against="the inputs that a model of the kind takes", on="both kinds"
)
def test_the_question_is_the_same_each_time():
    for kind in ("classifier", "language-model"):
        first, second = sealed.question(kind), sealed.question(kind)
        assert all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.mark.verifies(
    "deployment.sealed.agreed",
    kind="invariant",
    against="the definition of a majority",
    on="every split of five answers",
)
def test_a_majority_outvotes_the_liars():
    for liars in range(6):
        said = sealed.agreed(["7"] * (5 - liars) + ["1"] * liars)
        assert said == ("7" if liars <= 2 else "1")
    assert sealed.agreed(["1", "2"]) is None
    assert sealed.agreed(["1", "2", "2", "3"]) is None
    with pytest.raises(ValueError, match="at least one answer"):
        sealed.agreed([])
