"""One readable error for whatever goes wrong in a rank: its number, what happened, and its own lines of Python."""

import linecache
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bigmodel_course.distributed import agreement, rank
from bigmodel_course.distributed.processes import Rank
from bigmodel_course.distributed.rank import Frame

__all__ = ["RankError", "explain"]

HIDDEN = tuple(str(Path(module.__file__).parent) + "/" for module in (torch, multiprocessing))
HIDDEN += (rank.__file__, agreement.__file__, "<frozen ")
WAITING = str(Path(torch.distributed.__file__).parent)
DISAGREE = "The ranks may disagree on what comes next: launch(..., check=True) names the first difference."


class RankError(RuntimeError):
    """A rank failed: `rank` is its number; the message says how and shows that rank's own lines."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple:
        return RankError, (self.rank, str(self))

    def _render_traceback_(self) -> list[str]:
        """A notebook shows this instead of the parent's own stack, which says nothing."""
        return [f"RankError: {self}"]


def explain(ranks: Sequence[Rank], timeout: float) -> RankError | None:
    """The error to raise, if any rank failed or has not answered."""
    failed = [each for each in ranks if each.report and each.report.outcome != "returned"]
    if not failed:
        return _unfinished(ranks, timeout)
    first = min(failed, key=lambda each: (each.report.echo, each.number))
    message = f"rank {first.number} of {len(ranks)} {first.report.text}{_lines(own(first.report.frames))}"
    if first.report.echo:
        message += f"\n{DISAGREE}{_standing(each for each in ranks if each is not first)}"
    return RankError(first.number, message)


def _unfinished(ranks: Sequence[Rank], timeout: float) -> RankError | None:
    late = [each for each in ranks if each.report is None]
    if not late:
        return None
    busy = [each for each in late if not _waits(each)]
    first = (busy or late)[0]
    why = "" if busy else f": it waits for others that do not answer. {DISAGREE}"
    message = f"rank {first.number} of {len(ranks)} did not finish within {timeout:g} s{why}"
    return RankError(first.number, message + _standing(ranks))


def _waits(each: Rank) -> bool:
    """Is it inside one of torch's communication calls?"""
    return bool(each.frames) and each.frames[-1].file.startswith(WAITING)


def _standing(ranks: Iterable[Rank]) -> str:
    """Where each of them stands, by the innermost of its own lines."""
    return "".join(f"\nrank {each.number} {_place(each)}" for each in ranks)


def _place(each: Rank) -> str:
    if each.report:
        return "has returned" if each.report.outcome == "returned" else each.report.text.partition("\n")[0]
    if lines := own(each.frames or ()):
        return f"stands at{_lines(lines[-1:])}"
    return "does not say where it stands"


def own(frames: Iterable[Frame]) -> list[Frame]:
    """The lines that are neither torch's nor launch's, the innermost last; nothing outside the function itself."""
    frames = list(frames)
    outside = max((i for i, frame in enumerate(frames) if frame.file == rank.__file__), default=-1)
    return [frame for frame in frames[outside + 1 :] if not frame.file.startswith(HIDDEN)]


def _lines(frames: Sequence[Frame]) -> str:
    """As a traceback shows them, at most the last 20; the source is read here, where a notebook's cells are known."""
    text = ""
    for frame in frames[-20:]:
        source = linecache.getline(frame.file, frame.line).strip()
        text += f"\n  {_file(frame.file)}, line {frame.line}, in {frame.name}" + (f"\n    {source}" if source else "")
    return text


def _file(name: str) -> str:
    """A notebook's cell by its number, any other file by its path."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = shell.compile.format_code_name(name) if shell else None
    return " ".join(cell) if cell else f'File "{name}"'
