"""The stored lessons, read once for the tests of their form."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def text(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def is_compared(cell: nbformat.NotebookNode) -> bool:
    return not cell.metadata.get("tags") and not re.search(r"NBVAL_|# PYTEST_VALIDATE", cell.source)


def number(path: Path) -> str:
    return path.name[:2]
