"""What a learner has done is read from the lessons as they are saved."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from bigmodel_course.classroom.progress import attempts, summary

LESSONS = Path(__file__).parent.parent / "notebooks"
ANSWERS = {
    "my_gradient": "def my_gradient(x, y, theta): return 2 / len(x) * x.T @ (x @ theta - y)",
    "my_largest_step": "def my_largest_step(hessian): return 1.0",
}
SETUP = "from bigmodel_course.exercises import lesson_11 as exercises"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Lesson 11 with its first exercise right, the second wrong and the third untouched, run and saved."""
    lesson = nbformat.read(LESSONS / "11_gradient_descent.ipynb", as_version=4)
    kept = [nbformat.v4.new_code_cell(SETUP)]
    for cell in lesson.cells:
        if cell.cell_type == "code" and "exercises." in cell.source and ".check(" in cell.source:
            name = cell.source.split("(")[0].removeprefix("def ")
            stub, check = cell.source.split("\n\n\n")
            cell.source = f"{ANSWERS.get(name, stub)}\n\n\n{check}"
            kept.append(cell)
        elif cell.cell_type == "markdown":
            kept.append(cell)
    lesson.cells = kept
    NotebookClient(lesson, allow_errors=True, timeout=600, startup_timeout=300).execute()
    folder = tmp_path_factory.mktemp("lessons")
    nbformat.write(lesson, folder / "11_gradient_descent.ipynb")
    shutil.copy(LESSONS / "12_stochastic_gradients.ipynb", folder)
    return folder


@pytest.mark.verifies(
    "classroom.progress.Attempt", "classroom.progress.attempts", kind="invariant",
    against="answers given in a kernel", on="a right one, a wrong one and an untouched one of lesson 11",
)  # fmt: skip
def test_each_exercise_is_right_wrong_or_open(saved):
    found = [(attempt.exercise, attempt.state) for attempt in attempts(saved / "11_gradient_descent.ipynb")]
    assert found == [("11.1", "right"), ("11.2", "wrong"), ("11.3", "open")]


@pytest.mark.verifies("classroom.progress.summary", kind="invariant", against="the attempts", on="two lessons")
def test_the_summary_has_a_line_a_lesson_and_the_total(saved):
    first, second, total = summary(saved).splitlines()
    assert first.split() == ["11_gradient_descent", "✓", "✗", "·"]
    assert second.split()[1:] == ["·", "·", "·"]
    assert total.startswith("1 of 6 exercises are right")


@pytest.mark.parametrize("path", sorted(LESSONS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_stored_lesson_has_its_exercises_open(path):
    found = attempts(path)
    assert len(found) >= 2
    assert {attempt.state for attempt in found} == {"open"}
    assert all(attempt.exercise.startswith(f"{path.stem[:2]}.") for attempt in found)


@pytest.mark.parametrize("text", ["", "{}", "not a notebook"])
@pytest.mark.verifies(
    "classroom.progress.attempts", kind="message", against="the reason", on="files that are no notebook"
)
def test_a_file_that_is_no_notebook_is_refused(tmp_path, text):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(ValueError, match="path must be a notebook"):
        attempts(tmp_path / "x.ipynb")
