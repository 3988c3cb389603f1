"""Dynamic batching: rows of many requests go through the model together, and each request gets its own answers back.

While one batch runs, the next one gathers; so under load batches form by themselves, and without load nobody waits.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

__all__ = ["Batcher", "Done", "QueueFull"]

Run = Callable[[list], Sequence]


class QueueFull(RuntimeError):
    """More rows wait already than the queue may hold: answer "come back later" now, and do not grow without bound."""


@dataclass(frozen=True)
class Done:
    """One row's answer, the seconds that it waited and that its batch ran, and how many rows the batch had."""

    answer: Any
    waited: float
    ran: float
    batch: int


@dataclass(eq=False)
class _Row:
    value: Any
    future: asyncio.Future
    arrived: float = field(default_factory=perf_counter)


class Batcher:
    """Calls `run(rows) -> answers`, one a row and in their order, with up to `largest` rows, in a thread of its own.

    The first row of a batch waits up to `wait` seconds for company, 0 by default: then a batch is what gathered while
    the last one ran.  More than `queue` waiting rows are refused with `QueueFull`.  A row whose request was given up
    is dropped before it costs anything.  Where a batch raises, its rows run again one by one, so that the error
    reaches only the request that caused it.  `seen`, where given, is called with the number of rows of each batch.
    """

    def __init__(
        self,
        run: Run,
        *,
        largest: int = 32,
        wait: float = 0.0,
        queue: int = 256,
        seen: Callable[[int], None] | None = None,
    ):
        if largest < 1 or queue < 1:
            raise ValueError(f"largest and queue must be 1 or more, got {largest=} and {queue=}")
        if not 0 <= wait < 60:
            raise ValueError(f"wait must be seconds, 0 or more and less than 60, got {wait!r}")
        self.run, self.largest, self.wait, self.queue, self.seen = run, largest, wait, queue, seen
        self._rows: deque[_Row] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task | None = None
        self._started: float | None = None

    @property
    def busy(self) -> float:
        """Seconds since the batch that runs now began; 0 while none runs."""
        return perf_counter() - self._started if self._started is not None else 0.0

    def __len__(self) -> int:
        """How many rows wait."""
        return len(self._rows)

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        for row in self._rows:
            row.future.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(self, values: Sequence[Any]) -> list[Done]:
        """The answers to these rows, in their order; `QueueFull` if not all of them have room."""
        if len(self._rows) + len(values) > self.queue:
            raise QueueFull(f"{len(self._rows)} rows wait and {self.queue} may: {len(values)} more have no room")
        loop = asyncio.get_running_loop()
        rows = [_Row(value, loop.create_future()) for value in values]
        self._rows.extend(rows)
        self._arrived.set()
        try:
            return await asyncio.gather(*(row.future for row in rows))
        except BaseException:  # given up, or one row failed: the others must not hold a place
            self._rows = deque(row for row in self._rows if row not in rows)
            raise

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            await self._company()
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _company(self) -> None:
        """Let the first row wait for others, `wait` seconds after it came at the latest."""
        while self._rows and 0 < len(self._rows) < self.largest:
            left = self._rows[0].arrived + self.wait - perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Row]:
        batch: list[_Row] = []
        while self._rows and len(batch) < self.largest:
            row = self._rows.popleft()
            if not row.future.done():  # its request may have been given up
                batch.append(row)
        if not self._rows:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[_Row]) -> None:
        started = self._started = perf_counter()
        if self.seen:
            self.seen(len(batch))
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._checked, batch)
        except Exception as error:
            await self._one_by_one(batch, error)
            return
        finally:
            self._started = None
        ran = perf_counter() - started
        for row, answer in zip(batch, answers, strict=True):
            if not row.future.done():
                row.future.set_result(Done(answer, started - row.arrived, ran, len(batch)))

    def _checked(self, batch: list[_Row]) -> Sequence[Any]:
        answers = self.run([row.value for row in batch])
        if len(answers) != len(batch):
            raise ValueError(f"run must return one answer a row, got {len(answers)} for {len(batch)} rows")
        return answers

    async def _one_by_one(self, batch: list[_Row], error: Exception) -> None:
        if len(batch) > 1:
            for row in batch:
                await self._answer([row])
        elif not batch[0].future.done():
            batch[0].future.set_exception(error)
