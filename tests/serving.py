"""What the tests of the service share: requests by hand, and patience with a busy machine."""

import contextlib
import json
import socket
import time

import httpx
import psutil

PATIENCE = 300.0  # seconds until what does not come is a fault: a busy machine is none
LIMITS = httpx.Limits(keepalive_expiry=1)  # a worker closes an idle connection after 5 s, maybe while we send on it
PICTURE = [0.0] * 60 + [1.0] * 4  # the sleep model's answer is 4
BODY = json.dumps({"pictures": [PICTURE]}).encode()


def until(true, seconds=PATIENCE):
    """Wait until `true()` is; False if it never is."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def gone(process):
    """No such process, or one that has ended and was not collected: not every machine's first process does that."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def head(method="POST", path="/v1/predict", **headers):
    """The head of a request as bytes; a header's underscore stands for a hyphen."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def post(body=BODY, **headers):
    """A whole request as bytes."""
    return head(content_type="application/json", content_length=len(body), **headers) + body


class Wire:
    """One TCP connection to a worker, for what no HTTP client would do."""

    def __init__(self, port, timeout=PATIENCE):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def rest(self):
        """Everything until the worker closes."""
        parts = []
        with contextlib.suppress(ConnectionResetError):  # it had not read all that we sent
            while part := self.socket.recv(65536):
                parts.append(part)
        return b"".join(parts)

    def answer(self):
        """(status, body as JSON or text) of the last thing the worker says before it closes."""
        return parsed(self.rest())


def parsed(data):
    first, _, body = data.partition(b"\r\n\r\n")
    status = int(first.split()[1]) if first else 0
    kind = next((line for line in first.lower().split(b"\r\n") if line.startswith(b"content-type")), b"")
    return status, json.loads(body) if b"json" in kind else body.decode()
