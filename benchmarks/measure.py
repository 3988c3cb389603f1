"""Fair timing on a busy machine: CPU seconds, the rivals in turn, ratios of neighbours, medians."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import numpy as np
import torch

__all__ = ["Result", "Rival", "alternate", "machine", "ratio", "versions"]


@dataclass(frozen=True)
class Rival:
    """What is timed, and what makes it ready each time without being timed."""

    call: Callable[[], object]
    ready: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Result:
    """`ratios` by label, the largest `spread` among them, `targets` not to exceed, and a `table` for people."""

    ratios: dict[str, float]
    spread: float
    targets: dict[str, float] = field(default_factory=dict)
    table: list[dict] = field(default_factory=list)


def alternate(rivals: Mapping[str, Rival], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """CPU seconds of each rival, one value a round; every round starts with another rival, so none is always first."""
    labels = list(rivals)
    seconds = {label: [] for label in labels}
    for i in range(-warmup, rounds):
        shift = i % len(labels)
        for label in labels[shift:] + labels[:shift]:
            rivals[label].ready()
            start = time.process_time()
            rivals[label].call()
            spent = time.process_time() - start
            if i >= 0:
                seconds[label].append(spent)
    return seconds


def ratio(above: list[float], below: list[float]) -> tuple[float, float]:
    """The median ratio of the rounds, and its spread: the middle half's width over the median."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    quarter, _, three_quarters = quantiles(pairs, n=4)
    return median(pairs), (three_quarters - quarter) / median(pairs)


def machine() -> dict:
    """The kind of machine, nothing that names it."""
    return {"cores": torch.multiprocessing.cpu_count(), "cpu": torch.backends.cpu.get_cpu_capability()}


def versions() -> dict:
    """What was measured with what."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
