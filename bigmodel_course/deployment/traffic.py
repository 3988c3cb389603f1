"""Traffic that knows the right answers: clients that keep asking, and what each of them got.

A load generator counts answers; this one reads them.  Of each request it keeps when it was sent, how long it took, what
came, from which replica and which version of the model, and whether it was right.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

__all__ = ["Answer", "Traffic", "labels"]


@dataclass(frozen=True)
class Answer:
    """What one request got, `sent` and `took` in seconds; status 0 is a connection that broke."""

    sent: float
    took: float
    status: int
    replica: str
    right: bool
    version: str = ""

    @property
    def lost(self) -> bool:
        """No answer, or one that is none."""
        return self.status != 200

    @property
    def wrong(self) -> bool:
        """An answer that looks like one, and is not right."""
        return self.status == 200 and not self.right


def labels(reply: dict[str, Any]) -> Any:
    """What is compared of a service's answer: the labels of its pictures, or the text behind the prompt."""
    return reply["continuation"] if "continuation" in reply else [answer["label"] for answer in reply["answers"]]


class Traffic:
    """`clients` threads that POST `questions`, (body, right answer), to `url` in turn, from `with` until its end.

    Each goes on `pause` seconds after it was answered, and does not ask again where no answer came: that is what the
    service is for.  `answers` grows while it runs; its clock starts at 0.
    """

    def __init__(
        self,
        url: str,
        questions: Sequence[tuple[dict[str, Any], Any]],
        *,
        clients: int = 4,
        pause: float = 0.0,
        read: Callable[[dict[str, Any]], Any] = labels,
        timeout: float = 60.0,
    ):
        if not questions or clients < 1:
            raise ValueError(f"need one client and one question at least, got {clients} and {len(questions)}")
        self.url, self.questions, self.read, self.timeout = url, questions, read, timeout
        self.answers: list[Answer] = []
        self.pause, self._over = pause, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(k,), daemon=True) for k in range(clients)]

    def __enter__(self) -> "Traffic":
        self._zero = perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return perf_counter() - self._zero

    @property
    def lost(self) -> int:
        """How many requests got no answer."""
        return sum(answer.lost for answer in self.answers)

    @property
    def wrong(self) -> int:
        """How many answers were not right."""
        return sum(answer.wrong for answer in self.answers)

    def _ask(self, turn: int) -> None:
        with httpx.Client(timeout=self.timeout) as client:
            while not self._over.wait(self.pause):
                body, right = self.questions[turn % len(self.questions)]
                turn += len(self._threads)
                self.answers.append(self._answer(client, body, right))

    def _answer(self, client: httpx.Client, body: dict[str, Any], right: Any) -> Answer:
        sent = self.now
        try:
            reply = client.post(self.url, json=body)
        except httpx.HTTPError:
            return Answer(sent, self.now - sent, 0, "", False)
        took, right_one, version = self.now - sent, False, ""
        if reply.status_code == 200:
            with suppress(ValueError, KeyError, TypeError):  # not even of the right form
                said = reply.json()
                right_one, version = self.read(said) == right, said["version"]
        return Answer(sent, took, reply.status_code, reply.headers.get("x-replica", ""), right_one, version)
