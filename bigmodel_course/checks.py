"""Exercises that tell a learner where an answer first goes wrong, and why.

An exercise knows its right answer and the typical wrong ones.  A learner's function is called on the same inputs as
both: where it differs from the right answer we say where; where it agrees with a known mistake we give that hint.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

__all__ = ["Exercise", "Mistake", "Score", "WrongAnswer", "first_difference"]

Answer = Callable[..., Any]


class WrongAnswer(AssertionError):
    """What a check raises; a notebook shows its sentence and no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this name
        return [str(self)]


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer and the hint that helps whoever made it."""

    answer: Answer
    hint: str


@dataclass(frozen=True)
class Score:
    """What a right answer is scored by: `measure(answer)` in `unit`, at most `par` for full praise."""

    measure: Callable[[Answer], float]
    unit: str
    par: float


@dataclass(frozen=True)
class Exercise:
    """A question that checks itself.

    `trials` are the arguments of each call.  `use(answer, *trial)`, where given, is done with an answer in place of
    calling it, such as training with a learner's rule.  `accept(result, *trial)`, where given, judges the result by a
    law in place of comparing it with the solution's: it returns None, or what is wrong as a sentence.
    """

    name: str
    solution: Answer
    trials: Sequence[tuple]
    mistakes: Sequence[Mistake]
    remark: str
    use: Callable[..., Any] | None = None
    accept: Callable[..., str | None] | None = None
    score: Score | None = None
    tolerance: float = 1e-6
    labels: Sequence[str] = field(default_factory=tuple)

    def check(self, answer: Answer | Any) -> None:
        """Print a tick and a remark, print "not attempted", or raise `WrongAnswer` with a hint."""
        if self.right(answer):
            print(f"✓ {self.name}: {self.remark}{self._scored(answer)}")
        else:
            print(f"{self.name}: not attempted")

    def right(self, answer: Answer | Any) -> bool:
        """True for a right answer, False for one that was not attempted; a wrong one raises `WrongAnswer`."""
        results = [self._call(_called(answer), trial) for trial in self.trials]
        if all(_untouched(result) for result in results):
            return False
        for trial, result in zip(self.trials, results, strict=True):
            fault = self.fault(trial, result)
            if fault:
                lines = (f"✗ {self.name}: {fault}.", self._where(trial), self.hint(results))
                raise WrongAnswer("\n  ".join(filter(None, lines)))
        return True

    def fault(self, trial: tuple, result: Any) -> str | None:
        """What is wrong with `result` for the arguments `trial`, or None."""
        if isinstance(result, Exception):
            if isinstance(result, NotImplementedError):
                return "this case is not written yet"
            return f"your function raised {type(result).__name__}: {result}"
        if _untouched(result):
            return "your function returned nothing"
        if self.accept:
            return self._judged(result, trial)
        return first_difference(result, self._call(self.solution, trial), self.tolerance)

    def hint(self, results: Sequence[Any]) -> str:
        """The hint of the first known mistake that gives the same `results` in every trial; empty if none does."""
        for mistake in self.mistakes:
            if not any(map(self._differs, results, self._results(mistake.answer))):
                return f"Hint: {mistake.hint}"
        return ""

    def _results(self, answer: Answer) -> list[Any]:
        return [self._call(answer, trial) for trial in self.trials]

    def _differs(self, got: Any, want: Any) -> bool:
        if isinstance(got, Exception) or isinstance(want, Exception):
            return type(got) is not type(want)
        return first_difference(got, want, self.tolerance) is not None

    def _call(self, answer: Answer, trial: tuple) -> Any:
        """The result for fresh copies of the arguments, so that no answer can spoil the next call; or the exception."""
        try:
            arguments = copy.deepcopy(trial)
            return self.use(answer, *arguments) if self.use else answer(*arguments)
        except Exception as error:  # any mistake of a learner is to be reported, not to stop the check
            return error

    def _judged(self, result: Any, trial: tuple) -> str | None:
        try:
            return self.accept(result, *copy.deepcopy(trial))
        except Exception as error:  # a result of the wrong kind must be refused, whatever the judge trips over
            return f"your result cannot be judged ({error}): is it of the kind that was asked for?"

    def _where(self, trial: tuple) -> str:
        if not self.labels:
            return ""
        shown = (f"{label}={_short(value)}" for label, value in zip(self.labels, trial, strict=True))
        return f"with {', '.join(shown)}"

    def _scored(self, answer: Answer) -> str:
        if not self.score:
            return ""
        measured, par, unit = self.score.measure(_called(answer)), self.score.par, self.score.unit
        verdict = "at or under par" if measured <= par else "right, and it can be done with less"
        return f" Score: {measured:,.6g} {unit} (par {par:,.6g}): {verdict}."


def first_difference(got: Any, want: Any, tolerance: float = 1e-6) -> str | None:
    """Say where `got` first leaves `want`, or return None where it does not.

    Tensors, arrays, numbers, strings, and sequences or mappings of them; numbers are equal when they differ by at most
    `tolerance` times the larger of 1 and the wanted value.
    """
    for where, mine, right in _pairs(got, want, ""):
        place = f"at {where} " if where else ""
        if isinstance(right, (torch.Tensor, np.ndarray)):
            fault = _tensor_difference(mine, torch.as_tensor(right), tolerance)
            if fault:
                return (f"at {where}: " if where else "") + fault
        elif not _equal(mine, right, tolerance):
            return f"{place}you have {_short(mine)}, expected {_short(right)}"
    return None


def _pairs(got: Any, want: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(want, Mapping) and isinstance(got, Mapping) and got.keys() == want.keys():
        for key in want:
            yield from _pairs(got[key], want[key], f"{where}[{key!r}]")
    elif _is_sequence(want) and _is_sequence(got) and len(got) == len(want):
        for i, (mine, right) in enumerate(zip(got, want, strict=True)):
            yield from _pairs(mine, right, f"{where}[{i}]")
    else:
        yield where, got, want


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _tensor_difference(got: Any, want: torch.Tensor, tolerance: float) -> str | None:
    try:
        got = torch.as_tensor(got)
    except (TypeError, ValueError, RuntimeError):
        return f"you have {type(got).__name__}, expected a tensor of shape {tuple(want.shape)}"
    if got.shape != want.shape:
        return f"the shape is {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach().to(torch.float64), want.detach().to(torch.float64)
    wrong = ~torch.isclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not wrong.any():
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    place = f"{int(wrong.sum())} of {wrong.numel()} values differ; at {list(index)} " if index else ""
    return f"{place}you have {got[index]:.6g}, expected {want[index]:.6g}"


def _equal(got: Any, want: Any, tolerance: float) -> bool:
    if isinstance(got, (torch.Tensor, np.ndarray, np.generic)) and _count(got) == 1:
        got = got.item()
    if isinstance(want, Mapping) or _is_sequence(want):
        return False  # `_pairs` has compared those with the same keys, or of the same length
    if isinstance(want, bool) or not isinstance(want, (int, float)):
        return type(got) is type(want) and got == want
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return False
    try:
        return math.isclose(got, want, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(got) and math.isnan(want))
    except OverflowError:  # a whole number that no float holds
        return got == want


def _called(answer: Answer | Any) -> Answer:
    return answer if callable(answer) else lambda *_: answer


def _untouched(result: Any) -> bool:
    return result is None or result is ... or isinstance(result, NotImplementedError)


def _count(values: Any) -> int:
    return values.numel() if isinstance(values, torch.Tensor) else values.size


def _short(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if _count(value) > 6:
            return f"values of shape {tuple(value.shape)}"
        value = value.tolist()
    text = repr(_rounded(value))
    return text if len(text) <= 60 else text[:59] + "…"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
