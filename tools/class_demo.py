"""A teacher's whole path with a class of seven, in one folder: release, hand out, collect, autograde, feedback, grades.

`make class-demo` runs it with problem set 1 under build/class and says where to look.  Every step is nbgrader's own
command, the one that book/teaching.md names.  Three of the seven hand in what a class hands in: right answers, typical
wrong ones, nothing.  Four hand in trouble: a loop that never ends, an answer that fails while it is read, a notebook
without its test cells, and answers that reach for the hidden tests and the checks.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat

from assignments.proofs import proof
from bigmodel_course.classroom.sets import ProblemSet, read

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENTS = ROOT / "assignments"
COURSE = "bigmodel"
# The teacher's commands, in order: what comes before the students, and what comes after them.
BEFORE = ("generate_assignment", "release_assignment")
AFTER = ("collect", "autograde", "generate_feedback", "release_feedback")

PEEK = """
import gc, glob, sys
import numpy as np
import torch
import bigmodel_course.checks
bigmodel_course.checks.Exercise.right = lambda *given: True
torch.allclose = torch.equal = lambda *given, **named: True
hidden = [open(path).read() for path in glob.glob("../**/*.ipynb", recursive=True)]
"""

Fill = Callable[[Any, ProblemSet, Mapping[str, str]], None]


def solve(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """Right answers everywhere, and something in the written questions."""
    right = {problem.name: re.sub(r"\s*### \w+ SOLUTION", "", problem.answer) for problem in asked.problems}
    _answer(notebook, right | dict.fromkeys(asked.written, "Yes."))


def err(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """A typical wrong answer everywhere."""
    _answer(notebook, wrong)


def leave(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """Nothing at all."""


def loop(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """Right answers, but the first never ends."""
    solve(notebook, asked, wrong)
    _answer(notebook, {asked.problems[0].name: "while True:\n    pass"})


def fail(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """Right answers, but the first fails while it is read."""
    solve(notebook, asked, wrong)
    _answer(notebook, {asked.problems[0].name: "import a_module_of_my_own\n\n" + asked.problems[0].answer})


def cut(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """Wrong answers, and no test cell to say so."""
    err(notebook, asked, wrong)
    notebook.cells = [cell for cell in notebook.cells if not _id(cell).startswith("test_")]


def peek(notebook: Any, asked: ProblemSet, wrong: Mapping[str, str]) -> None:
    """Wrong answers that first reach for the hidden tests and the checks."""
    _answer(notebook, {name: PEEK + source for name, source in wrong.items()})


CLASS: dict[str, Fill] = {
    "right": solve, "wrong": err, "empty": leave, "loops": loop, "raises": fail, "cuts": cut, "peeks": peek,
}  # fmt: skip


def run(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """Walk the path for the problem set `name` in the new folder `folder`; the grades by student."""
    teacher, exchange = folder / "teacher", folder / "exchange"
    exchange.mkdir(parents=True)
    exchange.chmod(0o777)
    shutil.copytree(ASSIGNMENTS / "source" / name, teacher / "source" / name)
    shutil.copy(ASSIGNMENTS / "nbgrader_config.py", teacher)
    for step in BEFORE:
        nbgrader(teacher, step, name)
    for student, fill in CLASS.items():
        hand_in(folder / student, name, fill)
    for step in AFTER:  # one account plays the whole class, so whose file it is cannot be checked
        nbgrader(teacher, step, name, *(["--ExchangeCollect.check_owner=False"] if step == "collect" else []))
    nbgrader(teacher, "export")
    with (teacher / "grades.csv").open(newline="", encoding="utf-8") as file:
        return {row["student_id"]: row for row in csv.DictReader(file)}


def hand_in(folder: Path, name: str, fill: Fill) -> None:
    """A student fetches the set, fills it in and submits it."""
    folder.mkdir()
    shutil.copy(ASSIGNMENTS / "nbgrader_config.py", folder)
    nbgrader(folder, "fetch_assignment", name)
    path = folder / name / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    fill(notebook, read(ASSIGNMENTS / "source" / name / path.name), typical(name))
    nbformat.write(notebook, path)
    nbgrader(folder, "submit", name, "--student", folder.name)


def typical(name: str) -> dict[str, str]:
    """The first typical wrong answer of every problem."""
    solutions = {
        problem.name: problem.answer for problem in read(ASSIGNMENTS / "source" / name / f"{name}.ipynb").problems
    }
    return {problem: wrongs[0].of(solutions[problem]) for problem, wrongs in proof(name).WRONG.items()}


def nbgrader(folder: Path, *command: str) -> None:
    """Run one of nbgrader's commands in `folder`, with the exchange beside it; its log is the error where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *command],
        cwd=folder,
        env=environment(folder.parent),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(f"nbgrader {' '.join(command)} failed:\n{done.stderr}")


def environment(folder: Path) -> dict[str, str]:
    """What a member of the class in `folder` has in the environment; nothing of the user's own Jupyter is touched."""
    names = {"BIGMODEL_EXCHANGE": "exchange", "JUPYTER_DATA_DIR": "data", "JUPYTER_CONFIG_DIR": "config"}
    scripts = sysconfig.get_path("scripts")
    return {
        **os.environ,
        **{name: str(folder / place) for name, place in names.items()},
        "PATH": os.pathsep.join((scripts, os.environ.get("PATH", ""))),  # nbgrader calls alembic by name
        "PYTHONPATH": str(ROOT),
    }


def _answer(notebook: Any, answers: Mapping[str, str]) -> None:
    for cell in notebook.cells:
        cell.source = answers.get(_id(cell), cell.source)


def _id(cell: Any) -> str:
    return cell.metadata["nbgrader"]["grade_id"]


def main() -> None:
    """Show the class's grades and where its feedback lies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", default="1_optimize", help="the folder of a set in assignments/source")
    name = parser.parse_args().set
    folder = ROOT / "build" / "class"
    shutil.rmtree(folder, ignore_errors=True)
    for student, row in run(folder, name).items():
        print(f"{student:8} {float(row['score']):5.1f} of {float(row['max_score']):.0f}")
    teacher = (folder / "teacher").relative_to(ROOT)
    print(f"Grades: {teacher}/grades.csv. Feedback: {teacher}/feedback/STUDENT/{name}/{name}.html.")


if __name__ == "__main__":
    main()
