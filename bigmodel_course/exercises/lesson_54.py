"""Exercises of lesson 54: what may be asked twice, when a replica is down, and a survivor that is full."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["health", "may_retry", "rush", "survivor"]

SAFE = ("GET", "HEAD")
IDEMPOTENT = (*SAFE, "PUT", "DELETE")
PURE = ("/v1/predict",)


def _may_retry(method: str, path: str, sent: bool, key: str | None) -> bool:
    return not sent or method in IDEMPOTENT or path in PURE or key is not None


def _requests() -> tuple[tuple[str, str, bool, str | None], ...]:
    return (
        ("GET", "/v1/model", True, None),
        ("POST", "/v1/predict", True, None),
        ("POST", "/v1/payments", True, None),
        ("POST", "/v1/payments", False, None),
        ("POST", "/v1/payments", True, "order 17"),
        ("PUT", "/v1/models/digits", True, None),
        ("DELETE", "/v1/models/digits", True, None),
        ("PATCH", "/v1/models/digits", True, None),
        ("PATCH", "/v1/models/digits", False, None),
    )


may_retry = Exercise(
    name="54.1",
    solution=_may_retry,
    trials=_requests(),
    labels=("method", "path", "sent", "key"),
    mistakes=(
        Mistake(lambda method, path, sent, key: True, "A payment whose answer got lost may have been made: not twice."),
        Mistake(
            lambda method, path, sent, key: not sent,
            "So no reader of a killed replica is ever answered: a GET that is done twice does no harm.",
        ),
        Mistake(
            lambda method, path, sent, key: not sent or method in SAFE or path in PURE or key is not None,
            "PUT and DELETE say what shall be in the end: done twice, the end is the same.",
        ),
        Mistake(
            lambda method, path, sent, key: not sent or method in IDEMPOTENT or key is not None,
            "The method is not all: POST /v1/predict changes nothing, so it may be asked again.",
        ),
        Mistake(
            lambda method, path, sent, key: not sent or method in IDEMPOTENT or path in PURE,
            "With a key the server knows that it is the same payment: then it may be sent again.",
        ),
        Mistake(
            lambda method, path, sent, key: method in IDEMPOTENT or path in PURE or key is not None,
            "What was never sent has never been done: any request may be sent for the first time again.",
        ),
        Mistake(
            lambda method, path, sent, key: not sent or method != "POST" or path in PURE or key is not None,
            "PATCH is not idempotent: it may say 'one more'.",
        ),
        Mistake(
            lambda method, path, sent, key: not _may_retry(method, path, sent, key),
            "Upside down: return True where a second time does no harm.",
        ),
    ),
    remark="what matters is not the method but whether doing it twice is as good as once.",
)


def _health(checks: Sequence[bool], fall: int, rise: int) -> list[bool]:
    up, run, states = True, 0, []
    for fine in checks:
        run = run + 1 if fine != up else 0
        if run == (fall if up else rise):
            up, run = not up, 0
        states.append(up)
    return states


def _without_reset(checks: Sequence[bool], fall: int, rise: int) -> list[bool]:
    up, count, states = True, 0, []
    for fine in checks:
        count += fine != up
        if count == (fall if up else rise):
            up, count = not up, 0
        states.append(up)
    return states


def _one_late(checks: Sequence[bool], fall: int, rise: int) -> list[bool]:
    return _health(checks, fall + 1, rise + 1)


def _window(checks: Sequence[bool], fall: int, rise: int) -> list[bool]:
    """Down whenever the last `fall` failed, up else."""
    return [not (i + 1 >= fall and not any(checks[i + 1 - fall : i + 1])) for i in range(len(checks))]


_CHECKS = tuple(letter == "+" for letter in "++-+--+-++--+-+++-+-++--++")
_LONG = tuple(letter == "+" for letter in "+-+--+---++-+++++--+---++++-")

health = Exercise(
    name="54.2",
    solution=_health,
    trials=((_CHECKS, 2, 2), (_CHECKS, 1, 3), (_LONG, 3, 2), (_LONG, 2, 1)),
    labels=("checks", "fall", "rise"),
    mistakes=(
        Mistake(lambda checks, fall, rise: list(checks), "One failed check may be bad luck: it takes `fall` of them."),
        Mistake(_without_reset, "`fall` checks in a row: one that agrees with the state sets the count back to 0."),
        Mistake(_one_late, "One too late: the check that makes it `fall` in a row changes the state itself."),
        Mistake(_window, "The way up needs `rise` good checks in a row; you are up after one."),
        Mistake(
            lambda checks, fall, rise: _health(checks, rise, fall),
            "Changed places: `fall` failures take it down, `rise` successes bring it up.",
        ),
        Mistake(
            lambda checks, fall, rise: _health(checks, fall, len(checks) + 1),
            "It never comes back: count the good checks while it is down.",
        ),
        Mistake(
            lambda checks, fall, rise: [True, *_health(checks, fall, rise)[:-1]],
            "These are the states before each check: return the state after it.",
        ),
        Mistake(
            lambda checks, fall, rise: [not up for up in _health(checks, fall, rise)],
            "Upside down: True means that the replica is up.",
        ),
    ),
    remark="a small fall finds faults soon, and takes a busy replica for a dead one.",
)


@dataclass
class Seat:
    """One replica in the rush: how many requests it has, and may have; `alive` is what the balancer cannot see."""

    name: str
    limit: int
    alive: bool = True
    up: bool = True
    busy: int = 0
    failed: int | None = None  # the tick of its last failure


@dataclass
class Request:
    """One client's request: since when it waits, its tries so far, where it is, and when it will be done."""

    came: int
    tries: int = 0
    seat: Seat | None = None
    done: int = 0


@dataclass
class Counts:
    """What became of the requests, and how many tries were for nothing."""

    answered: int = 0
    lost: int = 0
    wasted: int = 0


Choose = Callable[[list[dict]], str | None]
WORK, PATIENCE, RETRIES = 5, 30, 3
DIES, SEEN, BACK, END = 20, 60, 100, 200  # ticks


def rush(choose: Choose, clients: int, limit: int) -> Counts:
    """Two replicas, and `clients` that ask all the time.  Replica a dies at tick 20; health checks see it at tick 60.

    At tick 100 it is back.  A try at a dead replica fails at once and costs one of three retries; so does a try at one
    that has `limit` requests.  A request that waits for 30 ticks is lost.
    """
    seats, counts = [Seat("a", limit), Seat("b", limit)], Counts()
    requests = [Request(0) for _ in range(clients)]
    for now in range(END):
        seats[0].alive = not DIES <= now < BACK
        seats[0].up = not SEEN <= now < BACK
        for request in requests:
            if now == DIES and request.seat is seats[0]:
                _fail(request, seats[0], now, counts)
            elif request.seat and request.done == now:
                request.seat.busy -= 1
                counts.answered += 1
                _renew(request, now)
        for request in sorted(requests, key=lambda each: each.came):
            _place(request, seats, choose, now, counts)
    return counts


def _place(request: Request, seats: list[Seat], choose: Choose, now: int, counts: Counts) -> None:
    """Try until it has a place, waits, or is lost."""
    came = request.came
    while request.seat is None and (request.came == came or not request.tries):
        told = [_told(seat, now) for seat in seats]
        chosen = choose(told)
        seat = next((seat for seat in seats if seat.name == chosen), None)
        if seat is None:
            if now - request.came >= PATIENCE:
                counts.lost += 1
                _renew(request, now)
            return
        if seat.alive and seat.busy < seat.limit:
            request.seat, request.done = seat, now + WORK
            seat.busy += 1
        elif _fail(request, seat, now, counts):
            return


def _told(seat: Seat, now: int) -> dict:
    failed = None if seat.failed is None else now - seat.failed
    return {"name": seat.name, "up": seat.up, "busy": seat.busy, "limit": seat.limit, "failed": failed}


def _fail(request: Request, seat: Seat, now: int, counts: Counts) -> bool:
    """A try was for nothing; was it the last?"""
    if request.seat:
        seat.busy -= 1
        request.seat = None
    seat.failed = now
    counts.wasted += 1
    request.tries += 1
    if request.tries > RETRIES:
        counts.lost += 1
        _renew(request, now)
        return True
    return False


def _renew(request: Request, now: int) -> None:
    request.came, request.tries, request.seat = now, 0, None


def _least(seats: list[dict]) -> str | None:
    return min(seats, key=lambda seat: seat["busy"])["name"] if seats else None


def _free(replicas: list[dict]) -> list[dict]:
    return [seat for seat in replicas if seat["up"] and seat["busy"] < seat["limit"]]


def _bad(seat: dict, ticks: int = 40) -> bool:
    return seat["failed"] is not None and seat["failed"] < ticks


def _marked_down(replicas: list[dict]) -> str | None:
    """At the first failure a replica is down, until the checks have had the time to look at it."""
    return _least([seat for seat in _free(replicas) if not _bad(seat)])


def _not_just_now(replicas: list[dict]) -> str | None:
    free = _free(replicas)
    return _least([seat for seat in free if not _bad(seat, 1)] or free)


def _outcome(choose: Choose, clients: int, limit: int) -> tuple[int, int, int] | None:
    """(lost, answered, wasted); None where the choice is not written yet."""
    if choose([_told(Seat("a", limit), 0)]) in (None, ...):
        return None
    counts = rush(choose, clients, limit)
    return counts.lost, counts.answered, counts.wasted


def _survives(result: tuple[int, int, int], clients: int, limit: int) -> str | None:
    lost, answered, _ = result
    enough = rush(_marked_down, clients, limit).answered * 9 // 10
    if lost:
        return f"{lost} requests are lost"
    return None if answered >= enough else f"only {answered} requests are answered, {enough} or more could be"


_RUSH = ((8, 5), (10, 5), (12, 8))

survivor = Exercise(
    name="54.3",
    solution=_marked_down,
    use=_outcome,
    accept=_survives,
    trials=_RUSH,
    labels=("clients", "limit"),
    mistakes=(
        Mistake(
            lambda replicas: _least(_free(replicas)),
            "A dead replica is never busy, so it is always the first choice, until it is seen. Look at `failed`.",
        ),
        Mistake(
            _not_just_now,
            "You avoid it where another one has room. When the survivor is full, wait (None): do not burn a retry.",
        ),
        Mistake(
            lambda replicas: _least([seat for seat in replicas if seat["up"] and not _bad(seat)]),
            "The survivor has a limit: with one request more it refuses.",
        ),
        Mistake(
            lambda replicas: _least([seat for seat in _free(replicas) if seat["failed"] is None]),
            "You never forgive: once the replica is back, it must be used again.",
        ),
        Mistake(
            lambda replicas: _least([seat for seat in replicas if seat["busy"] < seat["limit"]]),
            "`up` is False when the health checks have found it dead: do not ask it then.",
        ),
        Mistake(
            lambda replicas: replicas[-1]["name"],
            "Always the same one, be it full or dead: that is no balance.",
        ),
        Mistake(
            lambda replicas: None if any(map(_bad, replicas)) else _least(_free(replicas)),
            "One replica has failed, and you send nothing to the other one either.",
        ),
        Mistake(
            lambda replicas: _least(_free(replicas)) or replicas[0]["name"],
            "When nobody has room, say None and let the request wait.",
        ),
    ),
    remark="mark it down at the first error and let the rest wait: what HAProxy's on-error mark-down does.",
    score=Score(
        lambda answer: sum(rush(answer, *trial).wasted for trial in _RUSH),
        "wasted tries",
        sum(rush(_marked_down, *trial).wasted for trial in _RUSH),
    ),
)
