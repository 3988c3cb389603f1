"""Answers that can be checked: a seal that only the right model can make, for this request and this answer.

A balancer cannot know whether "7" is right.  It can ask for proof.  After each batch the model also answers a fixed
question (`Proven`).  The seal is a message authentication code whose key holds that answer, and which covers the
request's number, the status and the body:

    key = HMAC(secret, proof)    seal = HMAC(key, number.status.HMAC(key, body))

So the seal fails when the weights are not those that were deployed, when the body was changed or cut, when it is the
answer to another request, and when whoever answers does not know the secret.  It does not fail when a model is wrong on
some inputs and right on the question: `agreed` asks several replicas for that.
"""

import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from threading import Lock

import numpy as np

from bigmodel_course.deployment.served_models import Served, Sleep

__all__ = ["Proven", "Sealing", "agreed", "key_of", "question", "seal", "verify", "witness"]

NUMBER, SEAL = b"x-request-number", b"x-seal"  # the headers of a request and of its answer
DECIMALS = 3


class Proven:
    """A model that answers a fixed question after each batch, in the same session; `proof` is that answer.

    `asked` is who answers it, by default `witness(model)`.

    A proof that ever differed from the first stays wrong until the process ends: `proof` is empty then.
    """

    def __init__(self, model: Served, asked: Served | None = None):
        self._model, self._lock = model, Lock()
        self._asked = asked or witness(model)
        self._question = question(model.kind)
        self.proof: bytes | None = None
        self.prove()

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def run(self, rows: list[np.ndarray]) -> Sequence[np.ndarray]:
        """The model's answers, and a new proof before any of them leaves."""
        answers = self._model.run(rows)
        self.prove()
        return answers

    def prove(self) -> bytes:
        """Ask the model the question, and return the proof."""
        proof = np.round(np.asarray(self._asked.run(self._question), np.float64), DECIMALS).tobytes()
        with self._lock:
            self.proof = proof if self.proof in (None, proof) else b""
            return self.proof


class Sealing:
    """An ASGI application in front of another: every answer gets its seal, except the page's files under /docs.

    GET /v1/proof makes a new proof: the balancer's health check.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], model: Proven, secret: bytes):
        self.app, self.model, self.secret = app, model, secret
        self.state = app.state

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Hold the answer until it is whole, seal it, send it."""
        if scope["type"] != "http" or scope["path"].startswith("/docs"):
            await self.app(scope, receive, send)
            return
        number = dict(scope["headers"]).get(NUMBER, b"").decode("latin-1")
        start, body = {}, bytearray()

        async def reply(message: dict) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if not message.get("more_body"):
                mark = seal(key_of(self.secret, self.model.proof), number, start["status"], bytes(body))
                await send({**start, "headers": [*start.get("headers", ()), (SEAL, mark.encode())]})
                await send({"type": "http.response.body", "body": bytes(body)})

        if scope["path"] == "/v1/proof":
            await self._prove(reply)
        else:
            await self.app(scope, receive, reply)

    async def _prove(self, send: Callable) -> None:
        """For the balancer's health check: is this worker to be asked, and is its model still the right one?"""
        self.model.prove()
        body = b'{"status": "leaving"}' if self.state.draining else b'{"status": "ready"}'
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        status = 503 if self.state.draining else 200
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})


def witness(model: Served) -> Served:
    """Who answers the question for `model`: itself; but one that only waits has a twin that does not."""
    return type(model)() if isinstance(model, Sleep) else model


def question(kind: str) -> list[np.ndarray]:
    """What a model of this kind is asked: four grey pictures, or two letters."""
    if kind == "classifier":
        return list(np.random.default_rng(0).random((4, 64), np.float32))
    return [np.frombuffer(b"de", np.uint8)]


def key_of(secret: bytes, proof: bytes) -> bytes:
    """The key of a replica whose model proves itself with `proof`; an empty proof fits no right model."""
    return hmac.digest(secret, proof, "sha256")


def seal(key: bytes, number: str, status: int, body: bytes) -> str:
    """The seal of one answer, as 64 hex digits (HMAC-SHA256, RFC 2104)."""
    inner = hmac.digest(key, body, "sha256").hex().upper()
    return hmac.digest(key, f"{number}.{status}.{inner}".encode(), "sha256").hex()


def verify(key: bytes, number: str, status: int, body: bytes, mark: str) -> bool:
    """Is `mark` the seal of this answer?  Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(seal(key, number, status, body).encode(), mark.encode())


def agreed(answers: Sequence[str]) -> str | None:
    """What more than half of the answers say, or None: with 2f + 1 replicas, f may lie in any way they like."""
    if not answers:
        raise ValueError("answers must hold at least one answer, got none")
    said, times = Counter(answers).most_common(1)[0]
    return said if 2 * times > len(answers) else None
