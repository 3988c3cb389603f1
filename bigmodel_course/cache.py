"""What takes seconds to compute, kept in a file for the next lesson."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from bigmodel_course import checkpoint

__all__ = ["kept"]


def kept(name: str, key: str, make: Callable[[], Any], *, folder: str | Path | None = None) -> Any:
    """`make()`, or what an earlier call with the same `name` and `key` made: whatever `checkpoint.save` can write.

    `key` says everything that the result depends on.  `folder`: by default $BIGMODEL_CACHE, or .cache/bigmodel-course
    in the home folder; where it cannot be written, and where the file is damaged, it is made anew.
    """
    folder = Path(folder or os.environ.get("BIGMODEL_CACHE") or Path.home() / ".cache" / "bigmodel-course")
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    with contextlib.suppress(OSError, checkpoint.CheckpointError):
        return checkpoint.load(path)
    result = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{uuid4().hex}.unfinished"  # two lessons may make the same side by side
        checkpoint.save(unfinished, result)
        os.replace(unfinished, path)
    return result
