"""The verification table is whole: every public name has a row, and the stored rows are those that the tests make."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import bigmodel_course

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def verified_names(tmp_path_factory) -> set[str]:
    """The names on the marks of all tests, whichever of them this run was asked for."""
    listing = tmp_path_factory.mktemp("names") / "names.json"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", str(TESTS)]
    environment = {**os.environ, "LIST_VERIFIED_NAMES": str(listing)}
    subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, check=True, timeout=1800)
    return set(json.loads(listing.read_text()))


def public_names() -> set[str]:
    """`module.name` of all that is public; a package with an `__all__` of its own speaks for its modules."""
    found, faces = set(), set()
    for info in pkgutil.walk_packages(bigmodel_course.__path__, "bigmodel_course."):
        short = info.name.removeprefix("bigmodel_course.")
        module = importlib.import_module(info.name)
        if info.ispkg and hasattr(module, "__all__"):
            faces.add(short)
        elif info.ispkg or short.split(".")[0] in {"exercises", *faces}:  # exercises have tests of their own
            continue
        found |= {f"{short}.{name}" for name in module.__all__}
    return found


def test_every_public_name_has_a_row(verified_names):
    assert public_names() - verified_names == set()


def test_every_row_names_something_public(verified_names):
    assert verified_names - public_names() == set()


def test_the_stored_table_is_the_one_that_the_tests_make(verified_names):
    stored = json.loads(resources.files("bigmodel_course").joinpath("verification.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in stored} == verified_names, "run `make verification`"
    assert all(row["bound"] is None or row["largest"] <= row["bound"] for row in stored)
