"""Another copy of a problem set, with other numbers."""

import ast
import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["renumbered"]

HEAD = "# The numbers of this copy."


def renumbered(notebook: Any, numbers: Mapping[str, Any]) -> Any:
    """A copy of `notebook` whose cell `numbers` holds `numbers`: the same names, in the same order, as literals."""
    notebook = copy.deepcopy(notebook)
    [cell] = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "numbers"]
    names = [target.id for line in ast.parse(cell.source).body for target in line.targets]
    if names != list(numbers):
        raise ValueError(f"numbers must hold {', '.join(names)} in this order, got {', '.join(numbers)}")
    cell.source = "\n".join([HEAD, *(f"{name} = {value!r}" for name, value in numbers.items())])
    return notebook
