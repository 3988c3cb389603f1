"""What proves each problem set: a second right answer and typical wrong ones for every problem."""

from dataclasses import dataclass


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
