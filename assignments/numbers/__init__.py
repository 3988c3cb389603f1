"""The numbers of each problem set: `set_NAME.draw(random)` gives those of another copy."""

import importlib
import random


def drawn(name: str, seed: int) -> dict[str, object]:
    """The numbers of `seed` for a set such as "1_optimize"."""
    return importlib.import_module(f"{__name__}.set_{name}").draw(random.Random(seed))
