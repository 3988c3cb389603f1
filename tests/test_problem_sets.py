"""Every problem gives full marks to right answers, none to an untouched one, and knows its typical mistakes."""

import ast
import copy
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions
from traitlets.config.loader import PyFileConfigLoader

from assignments.numbers import drawn
from assignments.proofs import proof
from bigmodel_course.classroom.exam import renumbered
from bigmodel_course.classroom.sets import read_cells
from tools.release_sets import PAGE, page, sources

ROOT = Path(__file__).parent.parent
SETS = sources()
SEEDS = (1, 2, 3)


def source(path):
    return nbformat.read(path, as_version=4)


def released(notebook):
    """What a student gets, made by nbgrader's own hands."""
    notebook = copy.deepcopy(notebook)
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT / "assignments")).load_config()
    for preprocessor in (ClearSolutions(config=config), ClearHiddenTests(config=config)):
        notebook, _ = preprocessor.preprocess(notebook, {})
    return notebook


def outcome(given, answer, problem):
    """What a problem's test says of an answer, in one process: "" for full marks, else the error's text."""
    try:
        asks = problem.defines()
        mine = {name: value for name, value in named(given, answer).items() if name in asks}
        exec(problem.test, run(given) | mine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def named(given, answer):
    """What an answer defines."""
    names = run(given)
    before = set(names)
    exec(answer, names)
    return {name: value for name, value in names.items() if name not in before}


def run(code):
    names = {"__name__": "__main__"}
    exec(code, names)
    return names


def values(path, problem):
    """The numbers and words that an answer is, where it is no function."""
    defined = named(read_cells(source(path).cells).given, problem.answer)
    return {name: value for name, value in defined.items() if isinstance(value, (int, float, str))}


def cases(kind):
    return [
        case for path in SETS for problem in read_cells(source(path).cells).problems for case in kind(path, problem)
    ]


def problems(path, problem):
    yield pytest.param(path, problem, id=f"{path.stem}-{problem.name}")


def literals(path, problem):
    if values(path, problem):
        yield from problems(path, problem)


def wrongs(path, problem):
    for i, wrong in enumerate(proof(path.stem).WRONG[problem.name]):
        yield pytest.param(path, problem, wrong, id=f"{path.stem}-{problem.name}-{i}")


@pytest.fixture(autouse=True)
def quiet(capsys):
    """A tick a test is not for the log."""


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_set_has_four_to_six_problems_and_two_written_questions_with_a_rubric(path):
    notebook = source(path)
    held = read_cells(notebook.cells)
    assert 4 <= len(held.problems) <= 6
    assert len(held.written) == 2
    ids = [cell.metadata["nbgrader"]["grade_id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    order = ["intro", "setup", "numbers"]
    order += [name for p in held.problems for name in (f"ask_{p.name}", p.name, f"test_{p.name}")]
    assert ids == [*order, *held.written]
    for cell in notebook.cells:
        held_by_teacher = "**Rubric**" in cell.source
        assert held_by_teacher == (cell.metadata["nbgrader"]["grade_id"] in held.written)
        if "outputs" in cell:
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_books_page_is_in_step_with_the_sets():
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_release_holds_no_solution_no_hidden_test_and_no_rubric(path):
    text = "\n".join(cell.source for cell in released(source(path)).cells)
    for word in ("BEGIN SOLUTION", "END SOLUTION", "HIDDEN TESTS", "Rubric", "mistakes="):
        assert word not in text


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_the_stored_release_is_in_step_with_the_source(path):
    stored = source(ROOT / "assignments" / "release" / path.stem / path.name)
    assert [cell.source for cell in stored.cells] == [cell.source for cell in released(source(path)).cells]


@pytest.mark.parametrize(("path", "problem"), cases(problems))
def test_the_solution_scores_full_marks(path, problem):
    assert outcome(read_cells(source(path).cells).given, problem.answer, problem) == ""


@pytest.mark.parametrize(("path", "problem"), cases(problems))
def test_another_right_answer_scores_full_marks(path, problem):
    answer = proof(path.stem).SOLUTIONS[problem.name]
    assert ast.dump(ast.parse(answer)) != ast.dump(ast.parse(problem.answer))
    assert outcome(read_cells(source(path).cells).given, answer, problem) == ""


@pytest.mark.parametrize(("path", "problem"), cases(problems))
def test_an_untouched_answer_scores_nothing(path, problem):
    notebook = source(path)
    stubs = {p.name: p for p in read_cells(released(notebook).cells).problems}
    given = read_cells(notebook.cells).given
    assert outcome(given, stubs[problem.name].answer, problem)
    assert outcome(
        given, stubs[problem.name].answer, replace(problem, test=stubs[problem.name].test)
    )  # its visible part says so too


@pytest.mark.parametrize("seed", [None, 1], ids=["as stored", "another copy"])
@pytest.mark.parametrize(("path", "problem", "wrong"), cases(wrongs))
def test_a_typical_wrong_answer_loses_the_points_and_gets_its_hint(path, problem, wrong, seed):
    notebook = source(path) if seed is None else renumbered(source(path), drawn(path.stem, seed))
    said = outcome(read_cells(notebook.cells).given, wrong.of(problem.answer), problem)
    assert said
    assert f"Hint: {wrong.hint}" in said if wrong.hint else "Hint:" not in said


@pytest.mark.parametrize(("path", "problem"), cases(problems))
def test_every_problem_has_five_wrong_answers_with_hints_of_their_own(path, problem):
    hints = [wrong.hint for wrong in proof(path.stem).WRONG[problem.name] if wrong.hint]
    assert len(set(hints)) >= 5
    assert not any(a != b and a.startswith(b) for a in hints for b in hints)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("path", "problem"), cases(problems))
def test_with_other_numbers_the_solution_passes(path, problem, seed):
    notebook = renumbered(source(path), drawn(path.stem, seed))
    assert outcome(read_cells(notebook.cells).given, problem.answer, problem) == ""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("path", "problem"), cases(literals))
def test_with_other_numbers_the_values_of_the_old_ones_fail(path, problem, seed):
    given = read_cells(renumbered(source(path), drawn(path.stem, seed)).cells).given
    answer = "\n".join(f"{name} = {value!r}" for name, value in values(path, problem).items())
    assert outcome(given, answer, problem)
