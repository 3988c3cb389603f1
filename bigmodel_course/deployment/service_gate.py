"""What stands in front of the application: who asks, how often, how much, how long; and what the answer's head says.

A request is refused here before a byte of it is parsed.  Everything is plain ASGI, so it works under any server.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from time import perf_counter, time
from typing import Any

import limits
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from bigmodel_course.deployment.service_settings import Settings, client_of

__all__ = ["Gate", "Refusal", "Trace", "problem"]

PROTECTED = "/v1/"
THROWN_AWAY = 2**20  # bytes of a body too large that are still read, so that the client hears why
Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class Refusal(Exception):
    """A request that is refused: the status, a sentence for whoever asked, and headers."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


def problem(status: int, detail: str) -> bytes:
    """The body of an error, application/problem+json: status, its name, a sentence (RFC 9457)."""
    return json.dumps({"status": status, "title": HTTPStatus(status).phrase, "detail": detail}).encode()


class Trace:
    """Where one request's time went: `stage(name)` ends a stage; `header()` is the Server-Timing header, in ms."""

    def __init__(self) -> None:
        self.started = self._last = perf_counter()
        self.stages: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """Everything since the last stage was `name`."""
        now = perf_counter()
        self.stages[name] = self.stages.get(name, 0.0) + now - self._last
        self._last = now

    def split(self, *parts: tuple[str, float]) -> None:
        """Everything since the last stage was these (name, seconds), and "resume" what is left of it."""
        for name, seconds in parts:
            self.stages[name] = self.stages.get(name, 0.0) + seconds
            self._last += seconds
        self.stage("resume")

    def header(self) -> str:
        """`read;dur=0.1, parse;dur=0.2, …, total;dur=1.4`; the total is that of the stages that have ended."""
        stages = {**self.stages, "total": self._last - self.started}
        return ", ".join(f"{name};dur={1e3 * max(seconds, 0):.3f}" for name, seconds in stages.items())


class Gate:
    """An ASGI application in front of another: keys, rates, sizes and times of requests, by `settings`.

    `ended(scope, status, seconds)` is called after each request; `draining()` says whether clients are to go elsewhere.
    """

    def __init__(
        self,
        app: Callable,
        settings: Settings,
        *,
        ended: Callable[[dict, int, float], None],
        draining: Callable[[], bool],
    ):
        self.app, self.settings, self.ended, self.draining = app, settings, ended, draining
        self.rate = limits.parse(settings.rate) if settings.rate else None
        self.limiter = MovingWindowRateLimiter(MemoryStorage()) if self.rate else None

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace, status = Trace(), 499  # 499: the client went away before there was an answer
        scope.setdefault("state", {})["trace"] = trace

        async def reply(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                trace.stage("write")
                message = message | {"headers": [*message.get("headers", ()), *self._head(trace)]}
            await send(message)

        try:
            body = await self._admit(scope, receive)
            trace.stage("read")
            await _attended(self.app, scope, body, receive, reply)
        except Refusal as refusal:
            await _refuse(refusal, reply)
        except Exception:
            logging.getLogger(__name__).exception("%s %s failed", scope["method"], scope["path"])
            if status != 499:  # the answer has begun: nothing can be taken back
                raise
            await _refuse(Refusal(500, "This is our fault, not yours: the service's log has the reason."), reply)
        finally:
            self.ended(scope, status, perf_counter() - trace.started)

    def _head(self, trace: Trace) -> Headers:
        head = [(b"x-replica", self.settings.replica.encode()), (b"server-timing", trace.header().encode())]
        return [*head, (b"connection", b"close")] if self.draining() else head

    async def _admit(self, scope: dict, receive: Receive) -> bytes:
        """The body of a request that may pass; `Refusal` says why not."""
        head = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"].startswith(PROTECTED):
            await self._known(scope, head)
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                return await self._body(scope, head, receive)
        except TimeoutError:
            raise Refusal(
                408,
                f"The whole request must arrive within {self.settings.request_seconds:g} seconds, and it did not.",
                {"connection": "close"},
            ) from None

    async def _known(self, scope: dict, head: dict[bytes, str]) -> None:
        client = (scope.get("client") or ("unknown",))[0]
        if self.settings.keys:
            scheme, _, key = head.get(b"authorization", "").partition(" ")
            client = client_of(key.strip(), self.settings.keys) if scheme.lower() == "bearer" else None
            if client is None:
                what = "is not known" if scheme else "is missing"
                detail = f"Send your API key as the header Authorization: Bearer KEY; the key {what}."
                raise Refusal(401, detail, {"www-authenticate": "Bearer"})
        if self.rate and not await self.limiter.hit(self.rate, client):
            reset, _ = await self.limiter.get_window_stats(self.rate, client)
            after = max(1, round(reset - time() + 0.5))
            detail = f"You may ask {self.settings.rate}, and you have: ask again in {after} s."
            raise Refusal(429, detail, {"retry-after": str(after)})

    async def _body(self, scope: dict, head: dict[bytes, str], receive: Receive) -> bytes:
        declared = int(head.get(b"content-length", 0))
        largest = self.settings.largest_body
        if declared > largest + THROWN_AWAY:
            raise self._too_large(f"{declared:,}")
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "The request ended before its body was whole.", {"connection": "close"})
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > largest + THROWN_AWAY:
                raise self._too_large(f"more than {largest + THROWN_AWAY:,}")
            if size <= largest:
                body += message.get("body", b"")
        if size > largest:
            raise self._too_large(f"{size:,}")
        kind = head.get(b"content-type", "").partition(";")[0].strip().lower()
        if size and scope["path"].startswith(PROTECTED) and kind != "application/json":
            raise Refusal(415, f"The body must be JSON, with content-type application/json, got {kind or 'none'!r}.")
        return bytes(body)

    def _too_large(self, size: str) -> Refusal:
        detail = f"A body may have {self.settings.largest_body:,} bytes, got {size}."
        return Refusal(413, detail, {"connection": "close"})


async def _attended(app: Callable, scope: dict, body: bytes, receive: Receive, send: Send) -> None:
    """Run `app` on a request whose body has been read; give it up when the client goes away."""
    delivered = False

    async def replay() -> dict:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    work, gone = asyncio.ensure_future(app(scope, replay, send)), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work  # raises what it raised
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = problem(refusal.status, refusal.detail)
    headers: dict[str, Any] = {"content-type": "application/problem+json", "content-length": len(body)}
    head = [(name.encode(), str(value).encode()) for name, value in (headers | refusal.headers).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": head})
    await send({"type": "http.response.body", "body": body})
