"""A problem set's notebook is read as its problems; another copy has other numbers."""

import nbformat
import pytest

from bigmodel_course.checks import Exercise, Mistake, WrongAnswer
from bigmodel_course.classroom.exam import renumbered
from bigmodel_course.classroom.judge import grade
from bigmodel_course.classroom.sets import Problem, ProblemSet, read, read_cells

TWICE = Exercise(
    name="9.1",
    solution=lambda x: 2 * x,
    trials=((1,), (2,)),
    mistakes=(Mistake(lambda x: x + 1, "Two times, not one more."),),
    remark="Well doubled.",
)


def notebook():
    """A set of one problem and one written question."""

    def cell(name, source, new=nbformat.v4.new_code_cell, **marks):
        about = {"grade_id": name, "grade": False, "solution": False, "locked": True, "points": 0, **marks}
        return new(source, metadata={"nbgrader": about, **({"seconds": 3} if name.startswith("test") else {})})

    cells = [
        cell("setup", "import math"),
        cell("numbers", "# The numbers of this copy.\nrate = 0.1\nsizes = [1, 2]"),
        cell("ask_twice", "Twice?", nbformat.v4.new_markdown_cell),
        cell("twice", "def twice(x): return 2 * x", solution=True, locked=False),
        cell("test_twice", "assert twice(2) == 4", grade=True, points=4),
        cell("written_1", "Why?", nbformat.v4.new_markdown_cell, grade=True, solution=True, points=5),
        nbformat.v4.new_code_cell("a cell of the student's own"),
    ]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.verifies(
    "classroom.sets.Problem", "classroom.sets.ProblemSet", "classroom.sets.GIVEN", "classroom.sets.read",
    "classroom.sets.read_cells", kind="invariant", against="the cells of the notebook",
    on="a set of one problem and one written question",
)  # fmt: skip
def test_a_set_is_read_by_the_names_of_its_cells(tmp_path):
    nbformat.write(notebook(), tmp_path / "9_set.ipynb")
    held = read(tmp_path / "9_set.ipynb")
    twice = Problem("twice", "def twice(x): return 2 * x", "assert twice(2) == 4", points=4, seconds=3)
    given = "import math\n# The numbers of this copy.\nrate = 0.1\nsizes = [1, 2]"
    assert held == ProblemSet(given, (twice,), {"written_1": 5})
    assert held.points == 9


def test_an_answer_that_was_removed_is_empty():
    cells = [cell for cell in notebook().cells if cell.metadata.get("nbgrader", {}).get("grade_id") != "twice"]
    assert read_cells(cells).problems[0].answer == ""


@pytest.mark.verifies(
    "classroom.sets.read_cells", kind="message", against="the missing cell's name", on="a set without numbers"
)
def test_a_set_without_its_given_cells_is_refused():
    with pytest.raises(ValueError, match="numbers is not there"):
        read_cells([cell for cell in notebook().cells if "rate" not in cell.source])


@pytest.mark.verifies(
    "classroom.exam.renumbered", kind="invariant", against="the numbers given", on="numbers, lists and words"
)
def test_another_copy_differs_in_its_numbers_alone():
    first, other = notebook(), renumbered(notebook(), {"rate": 0.25, "sizes": [3, 4]})
    changed = [a.source != b.source for a, b in zip(first.cells, other.cells, strict=True)]
    assert changed == [False, True, False, False, False, False, False]
    names: dict = {}
    exec(read_cells(other.cells).given, names)
    assert (names["rate"], names["sizes"]) == (0.25, [3, 4])


@pytest.mark.verifies(
    "classroom.exam.renumbered", kind="message", against="the names that are wanted", on="a name too few"
)
@pytest.mark.parametrize("numbers", [{}, {"rate": 1}, {"sizes": [], "rate": 1}, {"rate": 1, "sizes": [], "more": 1}])
def test_other_names_than_the_sets_are_refused(numbers):
    with pytest.raises(ValueError, match="numbers must hold rate, sizes in this order"):
        renumbered(notebook(), numbers)


@pytest.mark.verifies(
    "classroom.judge.grade", kind="invariant", against="full marks for right answers alone",
    on="a right answer, a wrong one, a typical one, none",
)  # fmt: skip
def test_only_a_right_answer_passes(capsys):
    grade(lambda x: x + x, TWICE)
    assert capsys.readouterr().out == "✓ 9.1: Well doubled.\n"
    for wrong, says in (
        (lambda x: 5, "expected 2"),
        (lambda x: x + 1, "Hint: Two times"),
        (lambda x: ..., "not attempted"),
    ):
        with pytest.raises(WrongAnswer, match=says):
            grade(wrong, TWICE)
    for nothing in (None, ...):
        with pytest.raises(WrongAnswer, match="not attempted"):
            grade(nothing, TWICE)
