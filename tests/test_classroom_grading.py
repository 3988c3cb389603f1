"""A class walks nbgrader's whole path: right answers earn, wrong ones do not, and trouble stays with its maker."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from bigmodel_course.classroom.grading import mark
from bigmodel_course.classroom.sets import read
from tools import class_demo, exam

NAME = "1_optimize"
SOURCE = Path(__file__).parent.parent / "assignments" / "source" / NAME / f"{NAME}.ipynb"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The folder in which a class of seven has been graded, and the grades."""
    folder = tmp_path_factory.mktemp("course") / "class"
    return folder, class_demo.run(folder, NAME)


@pytest.fixture(scope="module")
def asked():
    return read(SOURCE)


def test_the_teachers_page_names_the_same_commands_in_the_same_order():
    page = (Path(__file__).parent.parent / "book" / "teaching.md").read_text(encoding="utf-8")
    blocks = "\n".join(page.split("```")[1::2])
    written = re.findall(r"^nbgrader (\w+)", blocks, re.MULTILINE)
    assert written == [*class_demo.BEFORE, *class_demo.AFTER, "export"]
    for command in ("fetch_assignment", "submit"):
        assert f"`nbgrader {command} {NAME}`" in page


def test_the_teachers_page_gives_each_lesson_the_minutes_that_it_says_itself():
    root = Path(__file__).parent.parent
    rows = re.findall(
        r"^\| (\d\d) \| (\d+) \|", (root / "book" / "teaching.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    badges = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        head = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells[:3])
        badges[path.name[:2]] = re.search(r"^\*+(\d+) minutes", head, re.MULTILINE)[1]
    assert dict(rows) == badges


def feedback(course, student):
    text = (course[0] / "teacher" / "feedback" / student / NAME / f"{NAME}.html").read_text(encoding="utf-8")
    return re.sub(r"<[^>]+>", "", text)


@pytest.mark.verifies(
    "classroom.grading.GradeApart", kind="invariant", against="the points that the answers deserve",
    on="nbgrader's path with seven made-up students",
)  # fmt: skip
def test_the_class_gets_the_grades_it_deserves(course, asked):
    auto = sum(problem.points for problem in asked.problems)
    first = asked.problems[0].points
    grades = {student: float(row["score"]) for student, row in course[1].items()}
    assert grades == {
        "right": auto, "wrong": 0, "empty": 0, "loops": auto - first, "raises": auto - first, "cuts": 0, "peeks": 0,
    }  # fmt: skip
    assert {float(row["max_score"]) for row in course[1].values()} == {asked.points}


def test_the_grades_are_a_csv_file(course):
    with (course[0] / "teacher" / "grades.csv").open(newline="", encoding="utf-8") as file:
        assert {row["student_id"] for row in csv.DictReader(file)} == set(class_demo.CLASS)


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ("right", "✓"),
        ("wrong", "Hint: "),
        ("empty", "NotImplementedError"),
        ("loops", "took longer than the"),
        ("raises", "No module named"),
        ("cuts", "Hint: "),
        ("peeks", "own implementation cannot be used in an answer"),
    ],
)
def test_the_feedback_says_why(course, student, says):
    assert says in feedback(course, student)


def test_the_feedback_gives_no_hidden_test_away(course):
    for student in class_demo.CLASS:
        text = feedback(course, student)
        assert "HIDDEN TESTS" not in text
        assert "mistakes=" not in text


def test_written_answers_wait_for_the_teacher(course, asked):
    graded = nbformat.read(course[0] / "teacher" / "autograded" / "right" / NAME / f"{NAME}.ipynb", as_version=4)
    cells = {cell.metadata["nbgrader"]["grade_id"]: cell for cell in graded.cells}
    for name in asked.written:
        assert cells[name].source == "Yes."


def test_students_get_their_feedback_through_the_exchange(course):
    returned = list((course[0] / "exchange" / class_demo.COURSE / "feedback").glob("*.html"))
    assert len(returned) == len(class_demo.CLASS)


@pytest.mark.verifies(
    "classroom.grading.mark", kind="message", against="the answer's fault", on="answers that cannot be read"
)
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "empty or missing"),
        ("x = 1", "does your cell define it"),
        ("def f(:", "SyntaxError"),
        ("1/0", "ZeroDivision"),
    ],
)
def test_an_answer_that_cannot_be_read_says_what_is_wrong(asked, answer, says):
    [output] = mark(asked, asked.problems[0], answer)
    assert output.output_type == "error"
    assert says in "\n".join(output.traceback)


def test_an_exam_has_other_numbers_and_the_solutions_pass(tmp_path):
    first, again, other = (exam.write(seed, tmp_path / name)[0] for seed, name in ((7, "a"), (7, "b"), (8, "c")))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    asked = read(other)
    [output] = mark(asked, asked.problems[1], asked.problems[1].answer)
    assert output.output_type == "stream"


def test_an_answer_cannot_bring_builtins_of_its_own(asked):
    problem = replace(asked.problems[0], answer="def twice(x): return 2 * x", test="assert bool(twice(3) == 6)")
    [output] = mark(asked, problem, "def twice(x): return 7\ndef bool(x): return True")
    assert output.output_type == "error"
    [output] = mark(asked, problem, "def twice(x): return x + x")
    assert output.output_type == "stream"
