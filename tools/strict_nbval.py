"""nbval, made fit for a strict course: `pytest -p tools.strict_nbval --nbval notebooks`.

Two changes, each held by a test. A lesson that was not run from top to bottom is refused (nbval compares nothing in a
cell without an execution count, so a stripped notebook would pass). And the last printed digit of a decimal number may
differ by one, as other processors round another way, as long as that is less than half a percent of it.
"""

import math
import re

import pytest
from nbval.plugin import IPyNbCell

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d*\.\d+(?:[eE][-+]?\d+)?(?![\w.])")
RELATIVE = 5e-3


def same_but_for_rounding(stored: str, run: str) -> bool:
    """Whether two texts differ in nothing but the last digit of decimal numbers."""
    old, new = NUMBER.findall(stored), NUMBER.findall(run)
    return NUMBER.sub("#", stored) == NUMBER.sub("#", run) and all(map(_close, old, new))


def _close(old: str, new: str) -> bool:
    if old == new:
        return True
    if _decimals(old) != _decimals(new):
        return False
    a, b = (float(text.replace("−", "-")) for text in (old, new))
    last_digit = 10.0 ** -_decimals(old)
    return abs(a - b) <= min(1.0001 * last_digit, RELATIVE * abs(a)) and math.copysign(1, a) == math.copysign(1, b)


def _decimals(number: str) -> int:
    mantissa, _, exponent = number.lower().partition("e")
    return len(mantissa.partition(".")[2]) - int(exponent or 0)


def _texts(output) -> dict:
    """The part of an output that holds text to compare: a stream itself, or the data of a display."""
    return output if output["output_type"] == "stream" else output.get("data", {})


def lenient(compare):
    """Wrap nbval's comparison: texts that differ only by rounding are made equal first."""

    def compare_outputs(cell, run, stored, *args):
        for new, old in zip(run, stored, strict=False):
            if new["output_type"] != old["output_type"]:
                continue
            ours, theirs = _texts(new), _texts(old)
            for key in ("text", "text/plain", "text/html", "text/markdown"):
                if key in ours and key in theirs and same_but_for_rounding(theirs[key], ours[key]):
                    ours[key] = theirs[key]
        return compare(cell, run, stored, *args)

    return compare_outputs


def pytest_configure():
    """Put the comparison in place for this process, once."""
    IPyNbCell.compare_outputs = lenient(IPyNbCell.compare_outputs)


def pytest_collection_modifyitems(items):
    """Refuse lessons whose cells are not numbered 1 to N."""
    counts: dict[str, list] = {}
    for item in items:
        if isinstance(item, IPyNbCell):
            counts.setdefault(str(item.path), []).append(item.cell.execution_count)
    for path, found in counts.items():
        if found != list(range(1, len(found) + 1)):
            raise pytest.UsageError(f"{path}: the cells were not run from top to bottom ({found}); run `make lessons`")
