"""A model as a service sees it: rows in, one answer a row out, and the name and version that go into every answer."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from bigmodel_course.deployment.runtime import Session

__all__ = ["Classifier", "LanguageModel", "Served", "Sleep", "SleepText", "open_model"]


class Served(Protocol):
    """What a service needs of a model.  `kind` decides the form of request and answer; `sha256` is its weights'."""

    name: str
    version: str
    kind: str
    sha256: str

    def run(self, rows: list[np.ndarray]) -> Sequence[np.ndarray]:
        """One answer a row, in their order."""
        ...


class Classifier:
    """Pictures float32 [64] to the probabilities of `classes`, which are called 0, 1, 2, …"""

    kind = "classifier"

    def __init__(self, session: "Session"):
        self.session, self.sha256 = session, session.metadata["weights_sha256"]
        self.name, self.version = session.metadata["name"], session.metadata["version"]
        self.classes = [str(i) for i in range(int(session.metadata["classes"]))]

    def run(self, rows: list[np.ndarray]) -> np.ndarray:
        """[64] each -> [rows, classes]."""
        return _softmax(self.session.run(np.stack(rows))[0])


class LanguageModel:
    """Tokens uint8 [length] to the probabilities of the next token; rows of any lengths share a batch."""

    kind = "language-model"

    def __init__(self, session: "Session"):
        self.session, self.sha256 = session, session.metadata["weights_sha256"]
        self.name, self.version = session.metadata["name"], session.metadata["version"]
        self.context = int(session.metadata["context"])

    def run(self, rows: list[np.ndarray]) -> np.ndarray:
        """[length] each -> [rows, vocabulary].

        Shorter rows are filled up on the right, and each is read at its own last token: a causal model's answer there
        does not depend on what stands behind it.
        """
        rows = [row[-self.context :] for row in rows]
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), max(2, lengths.max())), np.int64)  # an exported length is 2 or more
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row)] = row
        logits = self.session.run(tokens)[0]
        return _softmax(logits[np.arange(len(rows)), lengths - 1])


class Sleep:
    """A classifier for measuring a service: it waits `each` seconds a row and `call` a batch, without a processor.

    Its answer is the number of pixels above a half, modulo 10: a wrong answer shows.
    """

    kind = "classifier"
    name, version, sha256 = "sleep", "1", ""
    classes = tuple("0123456789")

    def __init__(self, each: float = 0.0, call: float = 0.0):
        if not (0 <= each <= 60 and 0 <= call <= 60):
            raise ValueError(f"each and call must be seconds from 0 to 60, got {each=} and {call=}")
        self.each, self.call = each, call

    def run(self, rows: list[np.ndarray]) -> np.ndarray:
        """[64] each -> [rows, 10], a 1 at the answer."""
        time.sleep(self.call + self.each * len(rows))
        return np.eye(10)[[int((row > 0.5).sum()) % 10 for row in rows]]


class SleepText(Sleep):
    """The same as a language model: behind each byte comes the next one, so "ab" goes on "cdef"."""

    kind, name = "language-model", "sleep-text"

    def run(self, rows: list[np.ndarray]) -> np.ndarray:
        """[length] each -> [rows, 256], a 1 at the byte behind the last."""
        time.sleep(self.call + self.each * len(rows))
        return np.eye(256)[[(int(row[-1]) + 1) % 256 for row in rows]]


def open_model(name: str, *, threads: int = 1) -> Served:
    """The model in the ONNX file `name`; or one that only waits, for "sleep:EACH" and "sleep:EACH+CALL" (`Sleep`).

    "sleep-text:EACH" is `SleepText`.  ValueError where the file says no kind of model that is served here.
    """
    if match := re.fullmatch(r"sleep(-text)?:(\d*\.?\d+)(?:\+(\d*\.?\d+))?", name):
        return (SleepText if match[1] else Sleep)(float(match[2]), float(match[3] or 0))
    from bigmodel_course.deployment.runtime import open_session  # a model that only waits starts without it

    session = open_session(name, threads=threads)
    kinds = {"classifier": Classifier, "language-model": LanguageModel}
    kind = session.metadata.get("kind")
    if kind not in kinds:
        raise ValueError(f"model must be of one of the kinds {sorted(kinds)}, and the metadata of {name} say {kind!r}")
    return kinds[kind](session)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
