"""One worker process: uvicorn around an application, and what uvicorn leaves open: slow clients, an orderly end."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import Callable
from typing import TextIO

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmodel_course.deployment.service_gate import problem
from bigmodel_course.deployment.service_settings import Settings

__all__ = ["PatientProtocol", "Worker", "announcement", "listen"]

LARGEST_HEAD = 16_384  # bytes: request line and headers


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, which waits for a client for ever, with an end to that.

    A request's head must arrive within `seconds`, or the answer is 408 (the body's time is the gate's); a connection
    that says nothing is closed; so is one whose answer is not taken.
    """

    seconds = 10.0
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client came: its first head is due."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Bytes came: is the head whole?"""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._arrived()
        elif self._limit is None:  # the first bytes of the next request
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went."""
        self._arrived()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take its answer."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It took some."""
        super().resume_writing()
        if stuck := getattr(self, "_stuck", None):
            stuck.cancel()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._answer(400, "What came is not a whole HTTP request with a head of at most 16,384 bytes.")

    def _expect(self) -> None:
        self._limit = self.loop.call_later(self.seconds, self._late)

    def _arrived(self) -> None:
        if self._limit:
            self._limit.cancel()
        self._limit = None

    def _late(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._answer(408, f"The head of a request must arrive within {self.seconds:g} seconds, and it did not.")
        else:
            self.transport.close()

    def _answer(self, status: int, detail: str) -> None:
        body = problem(status, detail)
        kind = (b"content-type", b"application/problem+json")
        head = [kind, (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        for event in (h11.Response(status_code=status, headers=head), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class Worker(uvicorn.Server):
    """A server that says where it listens, and on SIGTERM or SIGINT leaves in order.

    First /ready turns to 503 for `settings.drain` seconds, while every request is still answered; then no more come
    in, and what runs may end.  A second signal skips the first part.
    """

    def __init__(self, app: FastAPI, settings: Settings, announce: Callable[[], None]):
        protocol = type("Protocol", (PatientProtocol,), {"seconds": settings.request_seconds})
        options = {"http": protocol, "ws": "none", "log_level": "warning", "access_log": False, "lifespan": "on"}
        limits = {"limit_concurrency": settings.connections, "h11_max_incomplete_event_size": LARGEST_HEAD}
        stop = {"timeout_graceful_shutdown": settings.stop_seconds}
        super().__init__(uvicorn.Config(app, server_header=False, proxy_headers=False, **options, **limits, **stop))
        self.app, self.settings, self.announce = app, settings, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.announce()

    def handle_exit(self, sig: int, frame: object) -> None:
        """The first signal begins to drain, the second ends that."""
        if self.app.state.draining or not self.settings.drain or not self.started:
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(self.loop.call_later, self.settings.drain, self._leave)
        self.app.state.draining = True

    def _leave(self) -> None:
        self.should_exit = True


def listen(port: int, path: str | None = None) -> socket.socket:
    """A socket on 127.0.0.1, where port 0 takes a free one; or the Unix socket `path`, for a balancer beside it."""
    if path is not None:
        listener, address = socket.socket(socket.AF_UNIX), path
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)  # left by a worker that was killed
    else:
        # asyncio sends small pieces at once (TCP_NODELAY) only where the socket says that it is TCP; else each answer
        # waits 40 ms: its body for the client's receipt of its head, and that for something to travel with
        listener, address = socket.socket(proto=socket.IPPROTO_TCP), ("127.0.0.1", port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"port must be free, and {address} is not ({error.strerror}): port 0 takes a free one"
        ) from error
    return listener


def announcement(listener: socket.socket, settings: Settings, out: TextIO) -> Callable[[], None]:
    """Writes where the worker listens, as one line of JSON, when called."""

    def announce() -> None:
        place = listener.getsockname()
        where = {"port": place[1]} if listener.family == socket.AF_INET else {"uds": place}
        where |= {"pid": os.getpid(), "replica": settings.replica}
        print(json.dumps(where), file=out, flush=True)

    return announce
