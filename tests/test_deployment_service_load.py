"""The load test measures what the queue's arithmetic says."""

import json

import pytest
from serving import BODY

from bigmodel_course.deployment.load import Level, load
from bigmodel_course.deployment.service import serving
from bigmodel_course.deployment.service_settings import Settings, fingerprint


@pytest.mark.verifies(
    "deployment.load.load",
    "deployment.load.Level",
    kind="invariant",
    against="Little's law: throughput times mean latency is the number of users (relative)",
    on="1, 3 and 6 users of a model that sleeps 0.1 s a row, one by one",
    bound=0.25,
)
def test_throughput_times_latency_is_the_number_of_users(seen):
    with serving(Settings("sleep:0.1", batch=1, keys={"a": fingerprint("k")})) as running:
        levels = load(f"{running.url}/v1/predict", [1, 3, 6], json.loads(BODY), seconds=5.0, key="k")
    for level, users in zip(levels, (1, 3, 6), strict=True):
        assert isinstance(level, Level)
        assert (level.users, level.failures) == (users, 0)
        assert level.p50 <= level.p95 <= level.p99
        # one by one: never more than 10 a second, and what was ready before the clock began, an answer a user at most
        assert level.answers <= 10 * level.answers / level.throughput + users
        seen(abs(level.throughput * level.mean / users - 1))


def test_an_answer_that_is_no_success_is_a_failure():
    with serving(Settings("sleep:0")) as running:
        (level,) = load(f"{running.url}/v1/predict", [2], {"pictures": []}, seconds=2.0)
    assert level.failures == level.answers > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"users": []}, "users must be"), ({"users": [0]}, "users must be"), ({"seconds": 0}, "seconds must be above 0")],
)
def test_a_wrong_plan_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        load("http://127.0.0.1:1", **{"users": [1], "body": {}} | change)
