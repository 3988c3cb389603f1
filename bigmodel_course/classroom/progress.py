"""How far somebody is: which exercises are right, wrong or not attempted, from the lessons as they are saved."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

__all__ = ["Attempt", "attempts", "summary"]

SAID = re.compile(r"^(?P<sign>[✓✗] )?(?P<name>\d+\.\d+): ", re.MULTILINE)  # as checks.Exercise prints and raises it
STATES = {"✓ ": "right", "✗ ": "wrong", None: "open"}
SIGNS = {"right": "✓", "wrong": "✗", "open": "·"}


@dataclass(frozen=True)
class Attempt:
    """One exercise, such as "11.2", and whether its answer is "right", "wrong" or "open" (not attempted, not run)."""

    exercise: str
    state: str


def attempts(path: str | Path) -> list[Attempt]:
    """The exercises of the lesson `path`, in order, as the last saved run left them."""
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ValueError(f"path must be a notebook, and {path} is not ({type(error).__name__})") from error
    asked = [name for cell in cells if cell.cell_type == "markdown" for name in _asked(cell.source)]
    states = {name: state for cell in cells if cell.cell_type == "code" for name, state in _said(cell)}
    return [Attempt(name, states.get(name, "open")) for name in asked]


def summary(folder: str | Path) -> str:
    """One line a lesson of `folder` that has exercises, and the total: ✓ right, ✗ wrong, · open."""
    lines, all_of_them = [], []
    for path in sorted(Path(folder).glob("*.ipynb")):
        if found := attempts(path):
            signs = " ".join(SIGNS[attempt.state] for attempt in found)
            lines.append(f"{path.stem:40} {signs}")
            all_of_them += found
    right = sum(attempt.state == "right" for attempt in all_of_them)
    return "\n".join([*lines, f"{right} of {len(all_of_them)} exercises are right (✓ right, ✗ wrong, · open)"])


def _asked(text: str) -> list[str]:
    return re.findall(r"^\*\*(\d+\.\d+)\b", text, re.MULTILINE)


def _said(cell: Any) -> Iterator[tuple[str, str]]:
    for output in cell.outputs:
        text = output.get("evalue", "") if output.output_type == "error" else output.get("text", "")
        for match in SAID.finditer(text):
            yield match["name"], STATES[match["sign"]]


if __name__ == "__main__":
    import sys

    print(summary(sys.argv[1]))
