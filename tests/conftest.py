"""The verification table: which public name is compared with what, on what, and the largest difference seen.

A test carries `@pytest.mark.verifies("optim.Adam", kind=…, against=…, on=…, bound=…)` and calls the fixture `seen`
with each difference that it measures. The run gathers one row a mark, holds each to its bound and writes them all to
`build/verification.json`; `make verification` stores them in the package, where lessons read their certificates.
"""

import json
import math
import os
from pathlib import Path

import hypothesis
import pytest
from hosts import two_hosts  # noqa: F401 - a fixture for all tests

TABLE = Path(os.environ.get("VERIFICATION_TABLE", Path(__file__).parent.parent / "build" / "verification.json"))
KINDS = ("parity", "equals one process", "invariant", "message", "recovery")

os.environ.setdefault("TQDM_DISABLE", "1")
hypothesis.settings.register_profile("course", derandomize=True, deadline=None)  # a busy machine is not a fault
hypothesis.settings.load_profile("course")


class Seen:
    """Keeps the largest of the differences that a test reports."""

    def __init__(self) -> None:
        self.largest: float | None = None

    def __call__(self, difference: float) -> None:
        difference = float(difference)
        if math.isnan(difference):
            pytest.fail("the difference is not a number: one side holds NaN where the other does not")
        self.largest = difference if self.largest is None else max(self.largest, difference)


@pytest.fixture
def seen(request):
    """Report a difference: `seen(float)`. At the end the largest is held to the mark's bound."""
    keeper = Seen()
    yield keeper
    request.node.user_properties.append(("seen", keeper.largest))
    for mark in request.node.iter_markers("verifies"):
        bound = mark.kwargs.get("bound")
        if bound is not None and (keeper.largest is None or keeper.largest > bound):
            pytest.fail(f"{', '.join(mark.args)}: largest difference {keeper.largest}, allowed {bound}", pytrace=False)


class Table:
    """Gathers one row a mark from the tests' reports, also from those of pytest-xdist's workers."""

    def __init__(self) -> None:
        self.rows: dict[tuple, dict] = {}
        self.failed = False

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed
        if report.when != "teardown":  # `seen` reports at the end
            return
        properties = [tuple(p) for p in report.user_properties]
        measured = [value for key, value in properties if key == "seen" and value is not None]
        for row in [value for key, value in properties if key == "verifies"]:
            for name in row["names"]:
                key = (name, row["kind"], row["against"], row["on"])
                old = self.rows.setdefault(key, {"bound": row["bound"], "largest": None})
                known = measured if old["largest"] is None else [*measured, old["largest"]]
                old["largest"] = max(known, default=None)

    def pytest_sessionfinish(self):
        """Write the table of a run without a failure; a worker has no reports of its own and writes nothing."""
        if self.failed or not self.rows:
            return
        columns = ("name", "kind", "against", "on")
        table = [dict(zip(columns, key, strict=True), **row) for key, row in sorted(self.rows.items())]
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def pytest_configure(config):
    config.addinivalue_line("markers", "verifies(*names, kind, against, on, bound): what is proved of which name")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table())


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("verifies"):
            row = {"names": list(mark.args), "bound": None, **mark.kwargs}
            if not mark.args or row.get("kind") not in KINDS or not row.get("against") or not row.get("on"):
                raise pytest.UsageError(f"{item.nodeid}: verifies needs names, kind in {KINDS}, against and on: {row}")
            if row["bound"] is not None and "seen" not in item.fixturenames:
                raise pytest.UsageError(f"{item.nodeid}: a bound needs the fixture `seen`, which measures")
            item.user_properties.append(("verifies", row))
    if listing := os.environ.get("LIST_VERIFIED_NAMES"):  # see test_verification.py
        names = {name for item in items for mark in item.iter_markers("verifies") for name in mark.args}
        Path(listing).write_text(json.dumps(sorted(names)))
