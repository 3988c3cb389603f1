"""Pipeline schedules as data: for each rank, the list of operations that it does, in order.

Nothing here computes or communicates.  A schedule can be printed, drawn, costed and checked without a single process;
`distributed.pipeline` runs it.

The model is cut into `ranks * chunks` stages.  Rank r holds the stages r, r + ranks, r + 2 * ranks, …: its chunks 0, 1,
2, …  With one chunk a rank, stage and rank are the same number.
"""

from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Literal, NamedTuple

__all__ = ["Message", "Op", "Schedule", "Span", "bubble", "check_legal", "gpipe", "grid", "interleaved", "makespan"]
__all__ += ["messages", "one_at_a_time", "one_f_one_b", "peak_live", "timeline"]


class Op(NamedTuple):
    """One forward ("F") or backward ("B") pass of one microbatch through one chunk of the rank that does it."""

    kind: Literal["F", "B"]
    microbatch: int
    chunk: int = 0


class Span(NamedTuple):
    """When an operation runs."""

    op: Op
    start: float
    end: float


class Message(NamedTuple):
    """What `made` on rank `sender` gives is what `used` on rank `receiver` waits for."""

    sender: int
    made: Op
    receiver: int
    used: Op


Schedule = tuple[tuple[Op, ...], ...]
Seconds = float | Sequence[float]  # the same for every rank, or one number a rank


def one_at_a_time(ranks: int, microbatches: int) -> Schedule:
    """A model that is only cut: each microbatch goes forward and back before the next one starts."""
    return _schedule(ranks, microbatches, ahead=[0] * ranks)


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965)."""
    return _schedule(ranks, microbatches, ahead=[microbatches] * ranks)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """1F1B: fill the pipe, then alternate, then drain (Narayanan et al. 2019; its variant with one update a batch).

    Rank r holds at most ranks - r microbatches, however many there are.
    """
    return _schedule(ranks, microbatches, ahead=[ranks - 1 - rank for rank in range(ranks)])


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B with several chunks a rank (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Microbatches go through a rank's chunks in rounds of `ranks`.  As torch's schedule, this one also takes numbers that
    `ranks` does not divide, so long as the rounds are equally long.
    """
    if chunks < 2:
        raise ValueError(f"need chunks >= 2 to interleave, got {chunks=}; for one chunk there is one_f_one_b")
    rounds = max(1, microbatches // max(1, ranks))
    if microbatches % rounds:
        raise ValueError(f"need microbatches in {rounds} rounds of one length, got {microbatches=} for {ranks=}")
    ahead = [(chunks - 1) * (microbatches // rounds) + 2 * (ranks - 1 - rank) for rank in range(ranks)]
    return _schedule(ranks, microbatches, ahead=ahead, chunks=chunks, rounds=rounds)


def _schedule(ranks: int, microbatches: int, *, ahead: Sequence[int], chunks: int = 1, rounds: int = 1) -> Schedule:
    """On each rank `ahead` forwards, then one forward and one backward in turn, then the backwards that are left."""
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"need ranks >= 1 and microbatches >= 1, got {ranks=} and {microbatches=}")
    size = microbatches // rounds
    starts = range(0, microbatches, size)
    forward = [Op("F", i + j, c) for i in starts for c in range(chunks) for j in range(size)]
    backward = [Op("B", i + j, c) for i in starts for c in reversed(range(chunks)) for j in range(size)]
    return tuple(tuple(_in_turn(forward, backward, min(n, len(forward)))) for n in ahead)


def _in_turn(forward: list[Op], backward: list[Op], ahead: int) -> list[Op]:
    steady = [op for pair in zip(forward[ahead:], backward, strict=False) for op in pair]
    return forward[:ahead] + steady + backward[len(forward) - ahead :]


def check_legal(schedule: Schedule) -> None:
    """Raise a ValueError that says what is wrong: an operation missing, twice or too early, ranks that wait in a ring.

    A schedule that passes runs to its end wherever a rank need not wait until what it sent is fetched.
    """
    if not schedule or not all(schedule):
        raise ValueError(f"schedule must hold operations for each rank, got {schedule!r}")
    microbatches, chunks = _sizes(schedule)
    wanted = {Op(kind, i, c) for kind in "FB" for i in range(microbatches) for c in range(chunks)}
    for rank, ops in enumerate(schedule):
        times = Counter(ops)
        if wrong := [op for op in sorted(wanted | set(ops)) if op not in wanted or times[op] != 1]:
            name, count = _name(wrong[0], chunks), times[wrong[0]]
            raise ValueError(
                f"rank {rank} must do each operation of {microbatches} microbatches once: {name} {count} times"
            )
        position = {op: i for i, op in enumerate(ops)}
        if early := [op for op in ops if op.kind == "B" and position[op] < position[op._replace(kind="F")]]:
            raise ValueError(f"rank {rank} does {_name(early[0], chunks)} before its forward pass")
    timeline(schedule)


def timeline(
    schedule: Schedule, forward: Seconds = 1.0, backward: Seconds = 2.0, *, message: float = 0.0
) -> tuple[tuple[Span, ...], ...]:
    """When each operation runs if every rank starts its next one as soon as it can.

    Raises ValueError where ranks wait in a ring.  `forward` and `backward` are the times of one microbatch in all
    chunks of a rank (a number, or one a rank); each chunk takes an equal share.  `message` is the time from the end of
    an operation to its result's arrival on another rank; it keeps no rank busy.
    """
    chunks = _sizes(schedule)[1]
    seconds = {"F": _each(forward, schedule), "B": _each(backward, schedule)}
    done: dict[tuple[int, Op], float] = {}
    spans: list[list[Span]] = [[] for _ in schedule]
    moved = True
    while moved:
        moved = False
        for rank, ops in enumerate(schedule):
            while len(spans[rank]) < len(ops):
                op = ops[len(spans[rank])]
                needs = _needs(rank, op, len(schedule), chunks)
                if any(need not in done for need in needs):
                    break
                arrivals = [done[need] + message * (need[0] != rank) for need in needs]
                start = max([*arrivals, spans[rank][-1].end if spans[rank] else 0.0])
                done[rank, op] = start + seconds[op.kind][rank] / chunks
                spans[rank].append(Span(op, start, done[rank, op]))
                moved = True
    _refuse_waiting(schedule, [len(line) for line in spans], done)
    return tuple(map(tuple, spans))


def _refuse_waiting(schedule: Schedule, positions: list[int], done: dict[tuple[int, Op], float]) -> None:
    """Say who waits for whom, where not every rank came to its end."""
    chunks, stuck = _sizes(schedule)[1], []
    for rank, (ops, position) in enumerate(zip(schedule, positions, strict=True)):
        if position < len(ops):
            needs = _needs(rank, ops[position], len(schedule), chunks)
            other, missing = next(need for need in needs if need not in done)
            stuck.append(
                f"rank {rank} waits before {_name(ops[position], chunks)} for rank {other}'s {_name(missing, chunks)}"
            )
    if stuck:
        raise ValueError(f"the schedule never ends: {'; '.join(stuck)}")


def _needs(rank: int, op: Op, ranks: int, chunks: int) -> list[tuple[int, Op]]:
    """What must be done before: (rank, operation)."""
    own = [(rank, op._replace(kind="F"))] if op.kind == "B" else []
    stage = op.chunk * ranks + rank + (-1 if op.kind == "F" else 1)
    if not 0 <= stage < ranks * chunks:
        return own
    return [*own, (stage % ranks, op._replace(chunk=stage // ranks))]


def messages(schedule: Schedule) -> list[Message]:
    """Everything that one rank makes and another needs, in the order in which the `timeline` makes it.

    Both ends of a link can work this list out, so both can post their sends and receives in the same order.
    """
    chunks = _sizes(schedule)[1]
    ends = {(rank, span.op): span.end for rank, line in enumerate(timeline(schedule)) for span in line}
    found = [
        Message(*need, rank, op)
        for rank, ops in enumerate(schedule)
        for op in ops
        for need in _needs(rank, op, len(schedule), chunks)
        if need[0] != rank
    ]
    return sorted(found, key=lambda m: (ends[m.sender, m.made], m))


def makespan(spans: Sequence[Sequence[Span]]) -> float:
    """The end of the last operation."""
    return max(line[-1].end for line in spans)


def bubble(spans: Sequence[Sequence[Span]]) -> float:
    """The share of the ranks' time, from 0 to the `makespan`, in which they stand idle."""
    busy = sum(span.end - span.start for line in spans for span in line)
    return 1 - busy / (len(spans) * makespan(spans))


def peak_live(schedule: Schedule) -> list[int]:
    """For each rank the most passes whose activations it holds at once: forward begun, backward not ended.

    Counted in microbatches through one chunk.
    """
    peaks = []
    for ops in schedule:
        live = [sum(1 if op.kind == "F" else -1 for op in ops[: i + 1]) for i in range(len(ops))]
        peaks.append(max(live))
    return peaks


def grid(spans: Sequence[Sequence[Span]]) -> str:
    """A line of text a rank, a column a unit of time; the times must be whole numbers.

    "F2" is the forward pass of microbatch 2, "··" idle; with several chunks each has a letter: "F2a", "B2b".
    """
    if any(time != int(time) for line in spans for span in line for time in span[1:]):
        raise ValueError("spans must begin and end at whole numbers: choose times that the chunks divide")
    chunks = 1 + max(span.op.chunk for line in spans for span in line)
    label = {span.op: _name(span.op, chunks) for line in spans for span in line}
    width = max(map(len, label.values()))
    rows = []
    for rank, line in enumerate(spans):
        cells = ["·" * width] * int(makespan(spans))
        for op, start, end in line:
            cells[int(start) : int(end)] = [label[op].ljust(width)] * int(end - start)
        rows.append(f"rank {rank} | {' '.join(cells).rstrip()}")
    return "\n".join(rows)


def _name(op: Op, chunks: int) -> str:
    return f"{op.kind}{op.microbatch}" + (ascii_lowercase[op.chunk % 26] if chunks > 1 else "")


def _sizes(schedule: Schedule) -> tuple[int, int]:
    """How many microbatches, and how many chunks a rank."""
    return tuple(1 + max(op[field] for ops in schedule for op in ops) for field in (1, 2))


def _each(seconds: Seconds, schedule: Schedule) -> Sequence[float]:
    each = seconds if isinstance(seconds, Sequence) else [seconds] * len(schedule)
    if len(each) != len(schedule) or min(each) <= 0:
        raise ValueError(f"times must be above 0, one for all ranks or one a rank ({len(schedule)}), got {seconds}")
    return each
