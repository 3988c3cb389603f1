"""The digit model's passport: one row a treatment, from its first training to the day it is served.

The rows live in `passport.json` beside the lessons.  A lesson stamps its row; a row whose counts have not changed is
left as it stands, so running a lesson again changes nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from filelock import FileLock

from bigmodel_course.files import write_whole

__all__ = ["Stamp", "read", "stamp"]


@dataclass(frozen=True)
class Stamp:
    """What one treatment made of the digit model.

    `latency` is relative to the dense model, both measured in one run; `flops` are of one picture's forward pass;
    `bytes_sent` is what each rank sent in training (0 for one process).
    """

    treatment: str
    parameters: int
    bytes_on_disk: int
    flops: int
    accuracy: float
    latency: float = 1.0
    bytes_sent: int = 0

    def __post_init__(self) -> None:
        for name in ("parameters", "bytes_on_disk", "flops", "bytes_sent"):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy must be a share from 0 to 1, got {self.accuracy!r}")
        if not self.latency > 0:
            raise ValueError(f"latency must be above 0 (1 is the dense model's), got {self.latency!r}")


def read(path: str | Path = "passport.json") -> list[Stamp]:
    """The rows in the order in which they were stamped; none where there is no file yet."""
    path = Path(path)
    if not path.exists():
        return []
    known = {field.name for field in fields(Stamp)}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError(f"a list of rows was expected, got {type(rows).__name__}")
        return [Stamp(**{key: row[key] for key in known}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"path must hold a passport, and {path} does not ({error}): remove it and run lesson 16"
        ) from error


def stamp(new: Stamp, path: str | Path = "passport.json") -> Sequence[Stamp]:
    """Add or replace the row of `new.treatment` and return all rows.

    A row that differs in nothing but its latency, or in the last tenth of a percent of its accuracy, is kept.
    """
    path = Path(path)
    with FileLock(path.with_name(f".{path.name}.lock")):  # two lessons may run side by side
        rows = {row.treatment: row for row in read(path)}
        old = rows.get(new.treatment)
        if old is None or not _same(old, new):
            rows[new.treatment] = new
            text = json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n"
            write_whole(path, text.encode())
    return list(rows.values())


def _same(old: Stamp, new: Stamp) -> bool:
    return abs(old.accuracy - new.accuracy) < 1e-3 and old == replace(new, latency=old.latency, accuracy=old.accuracy)
