"""The verification table is whole: every public name has a row, and the stored rows are those that the tests make."""

import ast
import importlib
import json
import pkgutil
from importlib import resources
from pathlib import Path

import bigmodel_course

TESTS = Path(__file__).parent


def marks() -> list[ast.Call]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.glob("test_*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if "verifies" in (getattr(call.func, "attr", ""), getattr(call.func, "id", ""))]


def public_names() -> set[str]:
    found = set()
    for module in pkgutil.walk_packages(bigmodel_course.__path__, "bigmodel_course."):
        short = module.name.removeprefix("bigmodel_course.")
        if not module.ispkg and not short.startswith("exercises."):  # these have tests of their own
            found |= {f"{short}.{name}" for name in importlib.import_module(module.name).__all__}
    return found


def verified_names() -> set[str]:
    return {argument.value for call in marks() for argument in call.args if isinstance(argument, ast.Constant)}


def test_every_public_name_has_a_row():
    assert public_names() - verified_names() == set()


def test_every_row_names_something_public():
    assert verified_names() - public_names() == set()


def test_the_stored_table_is_the_one_that_the_tests_make():
    stored = json.loads(resources.files("bigmodel_course").joinpath("verification.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in stored} == verified_names(), "run `make verification`"
    assert all(row["bound"] is None or row["largest"] <= row["bound"] for row in stored)
