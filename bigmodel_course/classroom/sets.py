"""A problem set as its notebook holds it: the cells that are given, and its problems."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

__all__ = ["GIVEN", "Problem", "ProblemSet", "read", "read_cells"]

GIVEN = ("setup", "numbers")  # the cells that every answer and every test sees
SECONDS = 10.0  # of the student's own computing, where a test does not say


@dataclass(frozen=True)
class Problem:
    """One question: the source of its answer and of its test, its points, its time limit in seconds.

    `forbids` are names that an answer may not use, such as that of the library function that is the answer.
    """

    name: str
    answer: str
    test: str
    points: int
    seconds: float
    forbids: tuple[str, ...] = ()

    def defines(self) -> set[str]:
        """The names that `answer` defines at its top level; of a student's answer a test gets these, and no other."""
        names: set[str] = set()
        for line in ast.parse(self.answer).body:
            if isinstance(line, ast.FunctionDef):
                names.add(line.name)
            elif isinstance(line, (ast.Assign, ast.AnnAssign)):
                names |= {part.id for part in ast.walk(line) if isinstance(part, ast.Name) and _is_target(part)}
        return names

    def refuses(self, answer: str) -> list[str]:
        """Which of the forbidden names the source `answer` takes from elsewhere: as attribute, import or argument."""
        used: set[str] = set()
        for part in ast.walk(ast.parse(answer, "<your answer>")) if self.forbids else ():
            used |= set((getattr(part, "module", None) or "").split("."))
            used |= {getattr(part, "attr", None), getattr(part, "arg", None)}
            used |= set(part.name.split(".")) if isinstance(part, ast.alias) else set()
        return sorted(used.intersection(self.forbids))


@dataclass(frozen=True)
class ProblemSet:
    """What a set gives (`given`), asks (`problems`) and has read by a teacher (`written`: points by cell)."""

    given: str
    problems: tuple[Problem, ...]
    written: Mapping[str, int]

    @property
    def points(self) -> int:
        """All points, those of the written questions included."""
        return sum(problem.points for problem in self.problems) + sum(self.written.values())


def read(path: str | Path) -> ProblemSet:
    """The set that the notebook `path` holds."""
    return read_cells(nbformat.read(path, as_version=4).cells)


def read_cells(cells: list[Any]) -> ProblemSet:
    """The set that these cells hold; a cell is known by its nbgrader id, `test_NAME` is the test of `NAME`."""
    named = {cell.metadata["nbgrader"]["grade_id"]: cell for cell in cells if "nbgrader" in cell.metadata}
    missing = [name for name in GIVEN if name not in named]
    if missing:
        raise ValueError(f"cells must hold the cells {' and '.join(GIVEN)}, and {' and '.join(missing)} is not there")
    tests = {name.removeprefix("test_"): cell for name, cell in named.items() if name.startswith("test_")}
    problems = [
        Problem(
            name=name,
            answer=named[name].source if name in named else "",
            test=cell.source,
            points=cell.metadata["nbgrader"]["points"],
            seconds=cell.metadata.get("seconds", SECONDS),
            forbids=tuple(cell.metadata.get("forbids", ())),
        )
        for name, cell in tests.items()
    ]
    written = {
        name: cell.metadata["nbgrader"]["points"]
        for name, cell in named.items()
        if cell.cell_type == "markdown" and cell.metadata["nbgrader"]["grade"]
    }
    return ProblemSet("\n".join(named[name].source for name in GIVEN), tuple(problems), written)


def _is_target(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)
