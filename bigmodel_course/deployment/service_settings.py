"""What one worker of the service is told: its model, who may ask, how fast, how much, how long."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import limits

__all__ = ["Settings", "client_of", "fingerprint", "new_key"]


def new_key() -> str:
    """A key of 256 random bits; give it to one client and keep its `fingerprint` only."""
    return secrets.token_urlsafe(32)


def fingerprint(key: str) -> str:
    """SHA-256 of a key, in hex: whoever reads it cannot ask with it.  (A password can be guessed and needs more.)"""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def client_of(key: str, keys: Mapping[str, str]) -> str | None:
    """The client whose fingerprint in `keys` (client: fingerprint) is that of `key`, or None.

    Every entry is compared, each in a time that does not depend on where the two differ: an answer that comes a little
    later for a key that is a little more right would give it away, digit by digit.
    """
    given, found = fingerprint(key), None
    for client, known in keys.items():
        if hmac.compare_digest(given, known):
            found = client
    return found


@dataclass(frozen=True)
class Settings:
    """One worker's settings.  Sizes are bytes, times are seconds.

    `model`: the path of an ONNX file, or "sleep:SECONDS" (a model that takes so long for each row and does nothing).
    `keys`: client -> fingerprint of its key; empty, and everybody may ask.  `rate`: how often one client may ask, such
    as "100/second" or "600/minute"; empty for no limit.  `batch`, `wait`, `queue`: see `batching.Batcher`.
    `drain`: how long a worker that was told to stop still takes new requests, while /ready says no.
    """

    model: str
    replica: str = "0"
    keys: Mapping[str, str] = field(default_factory=dict)
    rate: str = ""
    largest_body: int = 262_144
    largest_request: int = 32
    request_seconds: float = 10.0
    answer_seconds: float = 10.0
    batch: int = 32
    wait: float = 0.0
    queue: int = 256
    connections: int = 512
    threads: int = 1
    drain: float = 0.0
    stop_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("largest_body", "largest_request", "batch", "queue", "connections", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
        for name in ("request_seconds", "answer_seconds", "stop_seconds"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name} must be above 0 and at most 3600, got {getattr(self, name)!r}")
        if not 0 <= self.drain <= 3600:
            raise ValueError(f"drain must be from 0 to 3600, got {self.drain!r}")
        if self.queue < self.largest_request:
            raise ValueError(f"queue must hold the largest request, {self.largest_request} rows, got {self.queue}")
        if not self.replica.isascii() or not self.replica.isprintable() or not 0 < len(self.replica) <= 64:
            raise ValueError(f"replica must be 1 to 64 printable ASCII characters, got {self.replica!r}")
        if wrong := [client for client, known in self.keys.items() if not _is_fingerprint(known)]:
            raise ValueError(
                f"keys must map clients to fingerprint(key), 64 hex digits; {wrong[0]!r} has another value"
            )
        if self.rate:
            _check_rate(self.rate)

    def to_json(self) -> str:
        """These settings as one line, which holds fingerprints and no keys."""
        return json.dumps(asdict(self) | {"keys": dict(self.keys)})

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Settings from `to_json`'s line or a file written by hand; ValueError names what is unknown or wrong."""
        given = json.loads(text)
        if not isinstance(given, dict) or not isinstance(given.get("keys", {}), dict):
            raise ValueError(f"settings must be a JSON object, its keys an object too, got {text[:60]!r}")
        if unknown := given.keys() - {each.name for each in fields(cls)}:
            raise ValueError(f"settings do not know {', '.join(sorted(unknown))}")
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"settings are incomplete or of the wrong type: {error}") from error


def _is_fingerprint(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _check_rate(rate: str) -> None:
    try:
        limits.parse(rate)
    except ValueError as error:
        raise ValueError(f'rate must read like "100/second" or "600/minute", got {rate!r}') from error
