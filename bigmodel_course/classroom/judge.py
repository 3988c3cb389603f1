"""What a test cell of a problem set calls: full marks, or an error that says where and why."""

from typing import Any

from bigmodel_course.checks import Exercise, WrongAnswer

__all__ = ["grade"]


def grade(answer: Any, exercise: Exercise) -> None:
    """Print a tick, or raise `WrongAnswer` where `answer` is wrong or, as that earns nothing either, not attempted."""
    if not exercise.right(answer):
        raise WrongAnswer(f"✗ {exercise.name}: not attempted.")
    print(f"✓ {exercise.name}: {exercise.remark}")
