"""nbgrader's autograding, with each answer in a process of its own: the tests and the student's code never meet."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import NbGraderPreprocessor

from bigmodel_course.checks import WrongAnswer
from bigmodel_course.classroom.sets import Problem, ProblemSet, read
from bigmodel_course.classroom.stand_in import answered

__all__ = ["GradeApart", "mark"]


class GradeApart(NbGraderPreprocessor):
    """Takes the place of nbgrader's `Execute` in `Autograde.autograde_preprocessors`.

    Everything but the student's own answers comes from the teacher's source: given cells, tests, points and time
    limits.  A test cell's output is what the test says; no other cell is run.
    """

    def preprocess(self, nb: NotebookNode, resources: Mapping[str, Any]) -> tuple[NotebookNode, Mapping[str, Any]]:
        """Mark every problem of the set that `nb` answers."""
        names = resources["nbgrader"]
        courses = CourseDirectory(config=self.config)
        folder = courses.format_path(courses.source_directory, ".", names["assignment"])
        asked = read(Path(folder) / f"{names['notebook']}.ipynb")
        cells = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in nb.cells}
        for problem in asked.problems:
            self.log.info("Marking %s", problem.name)
            cell = cells[f"test_{problem.name}"]
            cell.source = problem.test
            cell.outputs, cell.execution_count = mark(asked, problem, _source(cells.get(problem.name))), None
        return nb, resources


def mark(asked: ProblemSet, problem: Problem, answer: str) -> list[NotebookNode]:
    """A test cell's outputs for the source `answer`: what the test prints, and an error where the answer is wrong."""
    printed = io.StringIO()
    try:
        if not answer.strip():
            raise WrongAnswer(f"✗ {problem.name}: its cell is empty or missing.")
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
