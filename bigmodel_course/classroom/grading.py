"""nbgrader's autograding, with each answer in a process of its own: the tests and the student's code never meet."""

import contextlib
import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import NbGraderPreprocessor

from bigmodel_course.checks import WrongAnswer
from bigmodel_course.classroom.sets import Problem, ProblemSet, read
from bigmodel_course.classroom.stand_in import answered

__all__ = ["GradeApart", "PutBack", "mark"]

LONGEST = 100_000  # characters of an answer: reading more takes time that is the grader's, not the answer's


class PutBack(NbGraderPreprocessor):
    """Goes before nbgrader's own `Autograde.sanitize_preprocessors`: a notebook gets the set's cells and marks back.

    A cell is known by its nbgrader id, or by its own where that was lost.  Of a cell that was split or copied the parts
    are one answer, in their order; what is missing comes back, an answer empty; other cells stay, without marks.
    """

    def preprocess(self, nb: NotebookNode, resources: Mapping[str, Any]) -> tuple[NotebookNode, Mapping[str, Any]]:
        """Give `nb` the cells and marks of its set."""
        asked = nbformat.read(_source_path(self.config, resources), as_version=4).cells
        asked = {cell.metadata.nbgrader.grade_id: cell for cell in asked if "nbgrader" in cell.metadata}
        by_id = {cell.id: name for name, cell in asked.items()}
        kept: dict[str, NotebookNode] = {}
        cells = []
        for cell in nb.cells:
            name = cell.metadata.pop("nbgrader", {}).get("grade_id") or by_id.get(cell.get("id"))
            if name in kept:
                kept[name].source += f"\n\n{cell.source}"
                continue
            if name in asked:
                kept[name] = cell
            cells.append(cell)
        place = 0
        for name, model in asked.items():
            if name not in kept:
                kept[name] = copy.deepcopy(model)
                kept[name].source = "" if model.metadata.nbgrader.solution else model.source
                cells.insert(place, kept[name])
            kept[name].metadata.nbgrader = copy.deepcopy(model.metadata.nbgrader)
            place = next(i for i, cell in enumerate(cells) if cell is kept[name]) + 1
        nb.cells = cells
        return nb, resources


class GradeApart(NbGraderPreprocessor):
    """Takes the place of nbgrader's `Execute` in `Autograde.autograde_preprocessors`.

    Everything but the student's own answers comes from the teacher's source: given cells, tests, points and time
    limits.  A test cell's output is what the test says; no other cell is run.
    """

    def preprocess(self, nb: NotebookNode, resources: Mapping[str, Any]) -> tuple[NotebookNode, Mapping[str, Any]]:
        """Mark every problem of the set that `nb` answers."""
        asked = read(_source_path(self.config, resources))
        cells = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in nb.cells}
        for problem in asked.problems:
            self.log.info("Marking %s", problem.name)
            cell = cells[f"test_{problem.name}"]
            cell.source = problem.test
            cell.outputs, cell.execution_count = mark(asked, problem, _source(cells.get(problem.name))), None
        return nb, resources


def _source_path(config: Any, resources: Mapping[str, Any]) -> Path:
    names, courses = resources["nbgrader"], CourseDirectory(config=config)
    return Path(courses.format_path(courses.source_directory, ".", names["assignment"])) / f"{names['notebook']}.ipynb"


def mark(asked: ProblemSet, problem: Problem, answer: str) -> list[NotebookNode]:
    """A test cell's outputs for the source `answer`: what the test prints, and an error where the answer is wrong."""
    printed = io.StringIO()
    try:
        if not answer.strip():
            raise WrongAnswer(f"✗ {problem.name}: its cell is empty or missing.")
        if len(answer) > LONGEST:
            raise WrongAnswer(f"✗ {problem.name}: its cell holds {len(answer):,} characters, and {LONGEST:,} may be.")
        if refused := problem.refuses(answer):
            raise WrongAnswer(f"✗ {problem.name}: write it yourself, without {' and '.join(refused)}.")
        with _reading(problem), contextlib.redirect_stdout(printed):
            names: dict[str, Any] = {"__name__": "__main__"}
            exec(asked.given, names)
            with answered(asked.given, answer, seconds=problem.seconds) as defined:
                asks = problem.defines()
                wanted = {name: value for name, value in defined.items() if name in asks}
                exec(compile(problem.test, "<the test>", "exec"), names | wanted)  # no `len` of the student's own
    except Exception as error:  # a wrong answer may make a test fail in any way, and every one of them is a 0
        return [new_output("error", ename=type(error).__name__, evalue=str(error), traceback=_shown(error))]
    return [new_output("stream", name="stdout", text=printed.getvalue() or "✓\n")]


@contextlib.contextmanager
def _reading(problem: Problem):
    """A missing name is the commonest fault: say which, and where to look."""
    try:
        yield
    except NameError as error:
        raise WrongAnswer(f"✗ {problem.name}: {error}: does your cell define it, under this name?") from error


def _shown(error: Exception) -> list[str]:
    return str(error).split("\n") if isinstance(error, WrongAnswer) else [f"{type(error).__name__}: {error}"]


def _source(cell: NotebookNode | None) -> str:
    return cell.source if cell is not None and cell.cell_type == "code" else ""
