"""Every exercise accepts its solution, says so when untouched, and names at least five typical mistakes."""

import importlib
import pkgutil

import pytest

import bigmodel_course.exercises
from bigmodel_course.checks import Exercise, WrongAnswer

EXERCISES = [
    pytest.param(exercise, id=f"{module.name}-{name}")
    for module in pkgutil.iter_modules(bigmodel_course.exercises.__path__)
    for name, exercise in vars(importlib.import_module(f"bigmodel_course.exercises.{module.name}")).items()
    if isinstance(exercise, Exercise)
]
MISTAKES = [
    pytest.param(param.values[0], mistake, id=f"{param.id}-{i}")
    for param in EXERCISES
    for i, mistake in enumerate(param.values[0].mistakes)
]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_solution_gets_its_tick_and_remark(exercise, capsys):
    exercise.check(exercise.solution)
    assert capsys.readouterr().out.startswith(f"✓ {exercise.name}: {exercise.remark}")


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_untouched_stub_is_not_attempted(exercise, capsys):
    exercise.check(lambda *arguments: ...)
    exercise.check(...)
    assert capsys.readouterr().out == f"{exercise.name}: not attempted\n" * 2


@pytest.mark.parametrize("exercise", EXERCISES)
def test_knows_at_least_five_mistakes_each_with_its_own_hint(exercise):
    hints = {mistake.hint for mistake in exercise.mistakes}
    assert len(hints) == len(exercise.mistakes) >= 5


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES)
def test_a_typical_mistake_is_refused_with_the_hint_for_it(exercise, mistake):
    with pytest.raises(WrongAnswer) as refusal:
        exercise.check(mistake.answer)
    assert str(refusal.value).startswith(f"✗ {exercise.name}: ")
    assert str(refusal.value).endswith(f"Hint: {mistake.hint}")


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("answer", [lambda *a: 0.12345, lambda *a: "?", lambda *a: [], lambda *a: 1 / 0, 7e77])
def test_nonsense_is_refused(exercise, answer):
    with pytest.raises(WrongAnswer):
        exercise.check(answer)


SCORED = [param for param in EXERCISES if param.values[0].score]


@pytest.mark.parametrize("exercise", SCORED)
def test_the_solution_is_at_or_under_par(exercise):
    assert exercise.score.measure(exercise.solution) <= exercise.score.par


def test_each_lesson_ends_with_a_scored_exercise():
    by_lesson: dict[str, list[Exercise]] = {}
    for exercise in EXERCISES:
        by_lesson.setdefault(exercise.values[0].name.split(".")[0], []).append(exercise.values[0])
    assert by_lesson
    for lesson, exercises in by_lesson.items():
        last = max(exercises, key=lambda exercise: int(exercise.name.split(".")[1]))
        assert last.score, f"lesson {lesson}: its last exercise must be scored by time, memory or a count of work"
        assert 2 <= len(exercises) <= 4, f"lesson {lesson} has {len(exercises)} exercises"
