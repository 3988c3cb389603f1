"""What a lesson shows of the package: the source of an implementation, its certificate, tables and controls."""

import inspect
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import Markdown, display

__all__ = ["certificate", "explore", "rounded", "source", "table"]


def source(*objects: Any) -> Markdown:
    """The source code of functions or classes of the package, as a notebook shows it; shown, never copied."""
    return Markdown("\n".join(f"```python\n{textwrap.dedent(inspect.getsource(thing))}```" for thing in objects))


def certificate(*names: str) -> Markdown:
    """What the test run has proved of public names such as "optim.Adam": compared with what, on what, how far apart.

    The largest difference is the largest that any run of that test measured; the bound is what fails the test.
    """
    rows = json.loads(resources.files("bigmodel_course").joinpath("verification.json").read_text())
    if missing := set(names) - {row["name"] for row in rows}:
        raise ValueError(f"names must have a row in the verification table, got {', '.join(sorted(missing))}")
    return Markdown("\n".join(_certified(row) for name in names for row in rows if row["name"] == name))


def table(rows: Sequence[Mapping[str, Any]], decimals: int = 3) -> pd.DataFrame:
    """A table with one row a mapping and its first entry as the row's name; numbers rounded by `rounded`."""
    frame = pd.DataFrame([{key: _cell(value, decimals) for key, value in row.items()} for row in rows])
    first = frame.columns[0]
    return frame.set_index(first).rename_axis(index=None, columns=first)


def rounded(value: float, decimals: int = 3) -> float:
    """`value` with the decimals that are the same on every machine; minus zero becomes zero."""
    return round(float(value), decimals) + 0.0


def explore(draw: Callable, **controls: Any) -> None:
    """Show `draw` with one control a keyword, as `ipywidgets.interact` takes them; redrawn when a control is let go."""
    widget = ipywidgets.interactive(lambda **values: display(draw(**values)), **controls)
    for control in widget.children[:-1]:  # the last child is the output
        control.description = control.description.replace("_", " ")
        control.style.description_width, control.layout.width = "initial", "28em"
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
    display(widget)


def _certified(row: Mapping[str, Any]) -> str:
    text = f"- **{row['name']}**, {row['kind']}: {row['against']}, on {row['on']}"
    if row["largest"] is None:
        return f"{text}."
    return f"{text}: largest difference {row['largest']:.2g}, allowed {row['bound']:.2g}."


def _cell(value: Any, decimals: int) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 10**-decimals <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{rounded(value, decimals):,.{decimals}f}"
