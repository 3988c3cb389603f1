"""nbval stays meaningful: a lesson whose stored outputs are changed a little turns red."""

import re
import subprocess
import sys

import nbformat
import pytest
from lessons import LESSONS, ROOT, read

from tools.strict_nbval import same_but_for_rounding

LESSON = next(path for path in LESSONS if path.name.startswith("11"))
CELLS = 9  # of the lesson's code cells: enough to hold numbers, few enough to be quick
NUMBER = re.compile(r"\d+\.\d{3,}|\d{4,}\.\d")


def beginning():
    """The lesson up to and including its first few code cells."""
    notebook = read(LESSON)
    last = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"][CELLS]
    notebook.cells = notebook.cells[:last]
    return notebook


def change_a_number(notebook, change):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            plain = output.get("data", {}).get("text/plain", "")
            if match := NUMBER.search(plain):
                old = match[0]
                new = change(old)
                output.data["text/plain"] = plain.replace(old, new, 1)
                return
    raise AssertionError("no number is stored here: this test would prove nothing")


def one_percent(old):
    return f"{float(old) * 1.01:.{len(old.partition('.')[2])}f}"


def empty_an_output(notebook):
    next(cell for cell in notebook.cells if cell.get("outputs")).outputs = []


def strip(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


SPOILED = {
    "a number changed by 1 %": lambda notebook: change_a_number(notebook, one_percent),
    "a number with another sign": lambda notebook: change_a_number(notebook, lambda old: f"-{old}"),
    "an output emptied": empty_an_output,
    "a lesson stripped": strip,
}


def nbval(path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-p", "tools.patient_nbval", "-p", "tools.strict_nbval", "--nbval", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_the_lesson_as_stored_is_green(tmp_path):
    nbformat.write(beginning(), tmp_path / "lesson.ipynb")
    run = nbval(tmp_path / "lesson.ipynb")
    assert run.returncode == 0, run.stdout
    assert f"{CELLS} passed" in run.stdout


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_lesson_is_red(tmp_path, spoil):
    notebook = beginning()
    spoil(notebook)
    nbformat.write(notebook, tmp_path / "lesson.ipynb")
    run = nbval(tmp_path / "lesson.ipynb")
    assert run.returncode != 0
    reason = "were not run from top to bottom" if spoil is strip else "Cell outputs differ"
    assert reason in run.stdout + run.stderr, "red for this, and not because a kernel did not start"


@pytest.mark.parametrize(
    ("stored", "run", "same"),
    [
        ("rate 0.99536", "rate 0.99537", True),
        ("<td>2,900.19</td>", "<td>2,900.20</td>", True),
        ("1.2345e-08", "1.2346e-08", True),
        ("0.99536", "0.99538", False),
        ("0.98", "0.99", False),
        ("1.234", "-1.234", False),
        ("-0.0001", "0.0001", False),
        ("123", "124", False),
        ("0.5", "0.50", False),
        ("1.000", "1.000 m", False),
        ("3.11.7", "3.11.8", False),
        ("[0.1234, 0.5]", "[0.1235, 0.6]", False),
    ],
)
def test_only_the_last_digit_of_a_decimal_may_differ(stored, run, same):
    assert same_but_for_rounding(stored, run) is same
