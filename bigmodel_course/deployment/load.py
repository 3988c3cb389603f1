"""A load test: several numbers of users in turn, each user asking again as soon as it is answered (a closed loop).

The requests come from Locust, in a process of its own: Locust replaces parts of Python's standard library.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

__all__ = ["Level", "load"]

WARM_UP = 0.5  # seconds before counting begins at each level
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Level:
    """What so many users measured: answers, of them failures, answers a second, and seconds from request to answer."""

    users: int
    answers: int
    failures: int
    throughput: float
    mean: float
    p50: float
    p95: float
    p99: float


def load(url: str, users: Sequence[int], body: object, *, seconds: float = 2.0, key: str = "") -> list[Level]:
    """One `Level` for each number of users that POST `body` as JSON to `url` for `seconds` seconds.

    An answer of a status other than 2xx is a failure.  In a closed loop throughput times mean latency is the number of
    users (Little's law), so a slow service is asked less often: it measures a service, not what a crowd would suffer.
    """
    if not users or min(users) < 1 or max(users) > 1_000:
        raise ValueError(f"users must be numbers from 1 to 1,000, got {list(users)}")
    if not 0 < seconds <= 600:
        raise ValueError(f"seconds must be above 0 and at most 600, got {seconds!r}")
    plan = {"url": url, "users": list(users), "body": body, "seconds": seconds, "key": key}
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        timeout=60 + 10 * len(users) + 5 * seconds * len(users),
    )
    if run.returncode:
        raise RuntimeError(f"the load generator failed: {run.stderr[-2000:].strip()}")
    return [_level(line) for line in map(json.loads, run.stdout.splitlines())]


def _level(line: dict) -> Level:
    times = np.array(line["times"] or [float("nan")])
    shares = dict(zip(("p50", "p95", "p99"), map(float, np.percentile(times, PERCENTILES)), strict=True))
    answers = len(line["times"])
    return Level(line["users"], answers, line["failures"], answers / line["seconds"], float(times.mean()), **shares)


def _generate(plan: dict) -> None:
    """Runs in the process of its own, one line of JSON a level."""
    import gevent
    from locust import FastHttpUser, constant, task
    from locust.env import Environment

    headers = {"Authorization": f"Bearer {plan['key']}"} if plan["key"] else {}
    times, failures = [], []

    class Asking(FastHttpUser):
        wait_time = constant(0)
        host = plan["url"]

        @task
        def ask(self) -> None:
            self.client.post("", json=plan["body"], headers=headers)

    def heard(response_time: float, exception: Exception | None, **rest: object) -> None:
        times.append(response_time / 1e3)
        failures.append(exception is not None)

    environment = Environment(user_classes=[Asking])
    environment.events.request.add_listener(heard)
    runner = environment.create_local_runner()
    for users in plan["users"]:
        runner.start(users, spawn_rate=1_000, wait=True)
        gevent.sleep(WARM_UP)
        times.clear()
        failures.clear()
        start = perf_counter()
        gevent.sleep(plan["seconds"])
        took = perf_counter() - start
        print(json.dumps({"users": users, "seconds": took, "times": times, "failures": sum(failures)}), flush=True)
        runner.stop()


if __name__ == "__main__":
    _generate(json.load(sys.stdin))
    sys.stdout.flush()
    os._exit(0)  # Locust's threads have nothing left to say
