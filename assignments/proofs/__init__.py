"""What proves each problem set: a second right answer and typical wrong ones for every problem."""

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Wrong:
    """A typical wrong answer: the solution with `old` replaced by `new`, or a whole `source`; it must get `hint`."""

    hint: str
    old: str = ""
    new: str = ""
    source: str = ""

    def of(self, solution: str) -> str:
        """The wrong answer's source."""
        if self.source:
            return self.source
        assert solution.count(self.old) == 1, f"{self.old!r} must stand once in the solution"
        return solution.replace(self.old, self.new)


def proof(name: str) -> ModuleType:
    """The SOLUTIONS and WRONG of a set such as "1_optimize"."""
    return importlib.import_module(f"{__name__}.set_{name}")
