"""Each lesson is one clean run, compared cell by cell, with the parts that every lesson has."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from lessons import LESSONS, ROOT, code, is_compared, number, read, text

from bigmodel_course.checks import Exercise

every_lesson = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in LESSONS])


def exercises(path) -> dict[str, Exercise]:
    module = importlib.import_module(f"bigmodel_course.exercises.lesson_{number(path)}")
    return {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}


@every_lesson
def test_stored_as_one_run_from_top_to_bottom(path):
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every_lesson
def test_stores_no_error_no_stderr_and_no_absolute_path(path):
    for cell in code(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
        assert not re.search(r"""["' (](/(home|root|Users|tmp|usr|opt|var|work|mnt)/|[A-Z]:\\)""", json.dumps(cell))
        assert not re.search(r"^\s*!|^%%(bash|sh)\b|get_ipython\(\)\.system", cell.source, re.M)


@every_lesson
def test_stores_no_metadata_but_kernel_language_and_the_one_tag(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.metadata in ({}, {"tags": ["nbval-ignore-output"]})


@every_lesson
def test_a_cell_is_compared_unless_it_asserts_a_ratio_or_shows_a_control(path):
    cells = code(path)
    for before, cell in zip([None, *cells], cells, strict=False):
        if is_compared(cell):
            continue
        control = re.fullmatch(r"show\.explore\(\s*(\w+),\s.*\)", cell.source, re.S)
        if control:
            assert f"{control[1]}(" in before.source, "the cell above a control shows the same thing with fixed values"
        else:
            assert "assert" in cell.source
            assert re.search(r"perf_counter|process_time|measure", cell.source), "only times and rates may be ignored"


@every_lesson
def test_has_the_parts_that_every_lesson_has(path):
    words = text(path)
    assert words.startswith(f"# {number(path)} · ")
    for part in (
        "minutes ·",
        "GB of memory",
        "**By the end you can**",
        "**Predict",
        "## Summary",
        "**References.**",
        "**Next**",
    ):
        assert part in words, part
    goals = re.search(r"\*\*By the end you can\*\*\n((- .*(\n  .*)*\n?)+)", words)
    assert len(re.findall(r"^- ", goals[1], re.M)) == 3
    assert any(cell.source.startswith("show.explore(") for cell in code(path))
    assert len(words.split()) <= 2200
    lines = [cell.source.count("\n") + 1 for cell in code(path)]
    assert max(lines) <= 25
    assert sum(lines) <= 330


@every_lesson
def test_every_exercise_untouched_says_not_attempted(path):
    stored = {}
    for cell in code(path):
        if match := re.search(r"exercises\.(\w+)\.check\(", cell.source):
            stored[match[1]] = "".join(output.get("text", "") for output in cell.outputs)
    assert stored == {name: f"{exercise.name}: not attempted\n" for name, exercise in exercises(path).items()}


@every_lesson
def test_the_same_outputs_with_two_threads_under_plain_nbval(path):
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    threads["OMP_WAIT_POLICY"] = "PASSIVE"  # two tests share two cores: a waiting thread must not burn the other's
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TQDM_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-p", "tools.patient_nbval", "--nbval", "--nbval-cell-timeout=900", str(path)]
    run = subprocess.run(command, cwd=ROOT, env={**clean, **threads}, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert f"{len(code(path))} passed" in run.stdout
