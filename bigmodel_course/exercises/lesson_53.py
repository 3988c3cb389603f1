"""Lesson 53, serving: a moving window of requests, a closed loop's throughput, the fewest seconds of a busy model."""

import random
from itertools import pairwise

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["busy_seconds", "closed_loop", "moving_window"]


def _window(times: list[float], limit: int, seconds: float, *, counted: bool = False, old: bool = False) -> list[bool]:
    """`counted`: refused requests count too; `old`: one that is exactly `seconds` old still counts."""
    kept, answers = [], []
    for now in times:
        inside = [t for t in kept if now - t < seconds or (old and now - t == seconds)]
        answers.append(len(inside) < limit)
        if answers[-1] or counted:
            kept.append(now)
    return answers


def _fixed_window(times: list[float], limit: int, seconds: float) -> list[bool]:
    answers, counts = [], {}
    for now in times:
        box = now // seconds
        answers.append(counts.get(box, 0) < limit)
        counts[box] = counts.get(box, 0) + answers[-1]
    return answers


def _restarting(times: list[float], limit: int, seconds: float) -> list[bool]:
    answers, start, count = [], times[0], 0
    for now in times:
        if now - start >= seconds:
            start, count = now, 0
        answers.append(count < limit)
        count += answers[-1]
    return answers


def _paced(times: list[float], limit: int, seconds: float) -> list[bool]:
    answers, last = [], -seconds
    for now in times:
        answers.append(now - last >= seconds / limit)
        last = now if answers[-1] else last
    return answers


moving_window = Exercise(
    name="53.1",
    solution=_window,
    trials=(
        ([0.0, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 3.0, 3.5], 2, 1.0),
        ([0.5, 1.0, 1.5, 9.5, 10.0, 10.25, 10.5, 10.75, 11.0, 19.5, 20.0], 3, 10.0),
        ([1.0, 2.0, 3.0, 5.5, 6.0, 6.5, 11.0], 1, 5.0),
    ),
    labels=("times", "limit", "seconds"),
    mistakes=(
        Mistake(
            _fixed_window,
            "Your boxes have fixed borders, and around a border twice the limit passes. Look back from each request.",
        ),
        Mistake(
            lambda times, limit, seconds: _window(times, limit, seconds, counted=True),
            "Refused requests do not count, or whoever asks too often is locked out for as long as he asks.",
        ),
        Mistake(
            lambda times, limit, seconds: _window(times, limit, seconds, old=True),
            "A request that is exactly `seconds` old no longer counts: compare with <.",
        ),
        Mistake(
            lambda times, limit, seconds: _window(times, limit + 1, seconds),
            "One too many: the request itself is one of the `limit`.",
        ),
        Mistake(
            lambda times, limit, seconds: _window(times, limit, float("inf")),
            "Nothing is ever forgotten: only requests younger than `seconds` count.",
        ),
        Mistake(
            _restarting,
            "Your window starts anew all at once, and forgets requests that are still young. Each one has its own age.",
        ),
        Mistake(
            _paced,
            "You ask for equal distances. A client may use up its limit at once, and then has to wait.",
        ),
    ),
    remark="in any span of the window no more than the limit passed.",
)


def _throughput(users: int, call: float, each: float, largest: int) -> float:
    if users == 1:
        return 1 / (call + each)
    if users <= 2 * largest:
        return users / (2 * call + each * users)
    return largest / (call + each * largest)


closed_loop = Exercise(
    name="53.2",
    solution=_throughput,
    trials=(
        (1, 0.05, 0.0025, 32),
        (8, 0.05, 0.0025, 32),
        (8, 0.05, 0.0025, 1),
        (24, 0.125, 0.25, 16),
        (100, 0.5, 0.125, 8),
    ),
    labels=("users", "call", "each", "largest"),
    mistakes=(
        Mistake(
            lambda users, call, each, largest: 1 / (call + each),
            "That is one row after the other. Which rows share a call?",
        ),
        Mistake(
            lambda users, call, each, largest: users / (call + each),
            "You let all users' calls run at the same time. There is one model.",
        ),
        Mistake(
            lambda users, call, each, largest: (
                users / (call + each * users) if users <= largest else largest / (call + each * largest)
            ),
            "You put all users into one batch. While it runs, nobody is left to gather: two groups take turns.",
        ),
        Mistake(
            lambda users, call, each, largest: users / (2 * call + each * users),
            "This holds from 2 to 2 × largest users. What of a lone user, and what when both batches are full?",
        ),
        Mistake(
            lambda users, call, each, largest: 1 / (call + each) if users == 1 else users / (2 * call + each * users),
            "It cannot grow for ever: a batch has at most `largest` rows.",
        ),
        Mistake(
            lambda users, call, each, largest: (
                1 / (call + each)
                if users == 1
                else users / (2 * call + each * users)
                if users <= largest
                else largest / (call + each * largest)
            ),
            "The model is full only when both groups are: at 2 × largest users.",
        ),
        Mistake(
            lambda users, call, each, largest: users / _throughput(users, call, each, largest),
            "That is the latency: Little's law has N = X R.",
        ),
        Mistake(
            lambda users, call, each, largest: (
                1 / (call + each)
                if users == 1
                else min(users / (2 * (call + each * users)), largest / (call + each * largest))
            ),
            "In one round each row is computed once: the two groups have N rows together, not N each.",
        ),
    ),
    remark="throughput grows with the users until both groups fill a batch.",
)


def _ends(sizes: list[int], arrivals: list[float], call: float, each: float) -> list[float]:
    """When each batch is done."""
    ends, first = [], 0
    for size in sizes:
        start = max(arrivals[first + size - 1], ends[-1] if ends else 0.0)
        ends.append(start + call + each * size)
        first += size
    return ends


def _planned(arrivals: list[float], call: float, each: float, limit: float) -> list[int]:
    """Fewest batches: for each number of batches and of rows, the earliest end, and how it is reached."""
    n, inf = len(arrivals), float("inf")
    best = [(0.0, [])] + [(inf, [])] * n
    for _ in range(n):
        following = [(inf, [])] * (n + 1)
        for done, (end, sizes) in enumerate(best):
            for upto in range(done + 1, n + 1) if end < inf else ():
                finish = max(end, arrivals[upto - 1]) + call + each * (upto - done)
                if finish - arrivals[done] <= limit and finish < following[upto][0]:
                    following[upto] = finish, [*sizes, upto - done]
        best = following
        if best[n][0] < inf:
            break
    return best[n][1]


def _what_is_there(arrivals: list[float], call: float, each: float, limit: float) -> list[int]:
    sizes, free, done = [], 0.0, 0
    while done < len(arrivals):
        start = max(free, arrivals[done])
        size = sum(t <= start for t in arrivals[done:])
        sizes.append(size)
        free, done = start + call + each * size, done + size
    return sizes


def _wait_and_forget_the_model(arrivals: list[float], call: float, each: float, limit: float) -> list[int]:
    """As long a batch as the limit allows, as if the model were always free."""
    sizes, done = [], 0
    while done < len(arrivals):
        upto = done + 1
        while upto < len(arrivals) and arrivals[upto] + call + each * (upto + 1 - done) - arrivals[done] <= limit:
            upto += 1
        sizes.append(upto - done)
        done = upto
    return sizes


def _wait_and_forget_the_call(arrivals: list[float], call: float, each: float, limit: float) -> list[int]:
    return _wait_and_forget_the_model(arrivals, 0.0, 0.0, limit)


def _fixed_size(arrivals: list[float], call: float, each: float, limit: float) -> list[int]:
    full, rest = divmod(len(arrivals), 8)
    return [8] * full + [rest] * (rest > 0)


def _judge(sizes: list[int], arrivals: list[float], call: float, each: float, limit: float) -> str | None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return "each size must be a whole number, 1 or more"
    if sum(sizes) != len(arrivals):
        return f"your batches hold {sum(sizes)} rows of {len(arrivals)}"
    firsts = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes) - 1))]
    for i, (first, end) in enumerate(zip(firsts, _ends(sizes, arrivals, call, each), strict=True)):
        if end - arrivals[first] > limit + 1e-9:
            return f"batch {i} ends {end - arrivals[first]:.3f} s after its first row arrived; {limit:g} is allowed"
    return None


def _arrivals(seed: int, rows: int, span: float) -> list[float]:
    rng = random.Random(seed)
    return sorted(round(rng.uniform(0, span), 3) for _ in range(rows))


_MODEL = 0.05, 0.0025, 0.25  # call, each, limit
_TRIALS = (
    (_arrivals(0, 60, 2.4), *_MODEL),
    (_arrivals(1, 25, 0.5), *_MODEL),
    ([0.0, 0.01, 0.02, 1.0, 2.0, 2.05, 2.1], *_MODEL),
    ([i / 50 for i in range(40)], *_MODEL),
    (_arrivals(28, 20, 1.2), 0.05, 0.02, 0.3),  # what is planned as if the model were free comes too late
)


def _busy(answer: object) -> float:
    sizes = answer(*_TRIALS[0])
    return len(sizes) * _MODEL[0] + sum(sizes) * _MODEL[1]


busy_seconds = Exercise(
    name="53.3",
    solution=_planned,
    trials=_TRIALS,
    labels=("arrivals", "call", "each", "limit"),
    accept=_judge,
    mistakes=(
        Mistake(
            lambda arrivals, call, each, limit: [1] * len(arrivals),
            "One by one is more than the model can do: the queue grows, and with it the wait.",
        ),
        Mistake(
            lambda arrivals, call, each, limit: [len(arrivals)],
            "One batch waits for the very last row.",
        ),
        Mistake(
            _wait_and_forget_the_model,
            "You fill each batch as if the model were free. It may still be busy with the batch before.",
        ),
        Mistake(
            _wait_and_forget_the_call,
            "The limit holds for the answer: the batch has to run within it, too.",
        ),
        Mistake(
            _fixed_size,
            "A fixed size is too much to wait for when few rows come.",
        ),
        Mistake(
            lambda arrivals, call, each, limit: [b - a for a, b in pairwise(range(0, len(arrivals), 4))],
            "The last rows are in no batch.",
        ),
    ),
    remark="every row is answered in time, in few calls.",
    score=Score(_busy, "seconds busy", _busy(_planned)),
)
