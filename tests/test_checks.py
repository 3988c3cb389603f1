"""A check says where an answer first leaves the right one and why, and lets nothing wrong pass."""

import pytest
import torch

from bigmodel_course.checks import Exercise, Mistake, Score, WrongAnswer, first_difference

DOUBLE = Exercise(
    name="0.1",
    solution=lambda x: 2 * x,
    trials=((torch.tensor([1.0, 2.0]),), (torch.tensor([3.0, 5.0]),)),
    labels=("x",),
    mistakes=(Mistake(lambda x: x * x, "Twice is not squared."), Mistake(lambda x: x + 2, "Twice is not plus two.")),
    remark="twice.",
    score=Score(lambda answer: 3, "steps", 4),
)


@pytest.mark.verifies(
    "checks.Exercise",
    "checks.Score",
    kind="invariant",
    against="its own solution",
    on="a right answer written otherwise",
)
def test_a_right_answer_written_otherwise_passes_with_its_score(capsys):
    DOUBLE.check(lambda x: (x.numpy() + x.numpy()).tolist() and x + x)
    assert capsys.readouterr().out == "✓ 0.1: twice. Score: 3 steps (par 4): at or under par.\n"


FIRST, SECOND = "\n  with x=[1.0, 2.0]", "\n  with x=[3.0, 5.0]"


@pytest.mark.verifies(
    "checks.Mistake",
    "checks.WrongAnswer",
    kind="message",
    against="the mistake's own hint",
    on="every kind of wrong answer",
)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda x: x * x,
            "1 of 2 values differ; at [0] you have 1, expected 2." + FIRST + "\n  Hint: Twice is not squared.",
        ),
        (
            lambda x: x + 2,
            "1 of 2 values differ; at [0] you have 3, expected 2." + FIRST + "\n  Hint: Twice is not plus two.",
        ),
        (lambda x: torch.tensor([2.0, 4.0]), "2 of 2 values differ; at [0] you have 2, expected 6." + SECOND),
        (lambda x: x[:1], "the shape is (1,), expected (2,)." + FIRST),
        (lambda x: 1 / 0, "your function raised ZeroDivisionError: division by zero." + FIRST),
        (lambda x: 2 * x if x[0] == 1 else None, "your function returned nothing." + SECOND),
        (lambda x: x.mul_(torch.nan), "2 of 2 values differ; at [0] you have nan, expected 2." + FIRST),
    ],
)
def test_a_wrong_answer_is_told_where_and_why(answer, message):
    with pytest.raises(WrongAnswer) as refusal:
        DOUBLE.check(answer)
    assert str(refusal.value) == f"✗ 0.1: {message}"
    assert refusal.value._render_traceback_() == [str(refusal.value)]


def test_an_answer_that_changes_its_argument_spoils_nothing(capsys):
    DOUBLE.check(lambda x: x.mul_(2))
    DOUBLE.check(DOUBLE.solution)
    assert capsys.readouterr().out.count("✓") == 2


def test_an_answer_that_raises_not_implemented_is_not_attempted(capsys):
    def stub(x):
        raise NotImplementedError

    DOUBLE.check(stub)
    assert capsys.readouterr().out == "0.1: not attempted\n"


@pytest.mark.verifies(
    "checks.first_difference",
    kind="invariant",
    against="equal and unequal pairs",
    on="tensors, numbers, strings, lists, mappings",
)
@pytest.mark.parametrize(
    ("got", "want", "place"),
    [
        (1.0, 1, None),
        (torch.tensor(1.0), 1.0, None),
        (True, 1, "you have True, expected 1"),
        (1, True, "you have 1, expected True"),
        (float("nan"), float("nan"), None),
        pytest.param(10**400, 10**400, None, id="more than a float holds"),
        pytest.param(1.0, 10**400, f"you have 1.0, expected {10**58}…", id="less than more than a float holds"),
        (float("nan"), 1.0, "you have nan, expected 1.0"),
        ("adam", "adamw", "you have 'adam', expected 'adamw'"),
        ([1, [2, 3]], (1, (2, 4)), "at [1][1] you have 3, expected 4"),
        ([1, 2], [1, 2, 3], "you have [1, 2], expected [1, 2, 3]"),
        ({"a": 1}, {"a": 2}, "at ['a'] you have 1, expected 2"),
        ({"b": 1}, {"a": 1}, "you have {'b': 1}, expected {'a': 1}"),
        ({"a": torch.ones(1), "b": 1}, {"a": torch.ones(1), "c": 1},
         "you have {'a': tensor([1.]), 'b': 1}, expected {'a': tensor([1.]), 'c': 1}"),
        ([torch.zeros(2)], [torch.ones(2)], "at [0]: 2 of 2 values differ; at [0] you have 0, expected 1"),
        ("two", torch.ones(2), "you have str, expected a tensor of shape (2,)"),
    ],
)  # fmt: skip
def test_first_difference(got, want, place):
    assert first_difference(got, want) == place
