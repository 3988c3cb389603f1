"""Other numbers for problem set 4."""

import random

__all__ = ["draw"]


def draw(random: random.Random) -> dict[str, object]:
    """The numbers of another copy: a vector that no number of ranks divides, and a plan that its typical slips miss."""
    old, new = random.sample((3, 4, 5, 6, 7, 8), 2)
    while (plan := _plan(random)) is None:
        pass
    return {
        "seed": random.randrange(1, 10_000),
        "length": random.choice([n for n in range(900, 1100) if n % old and n % new]),
        "old_ranks": old,
        "new_ranks": new,
        **plan,
    }


def _plan(random: random.Random) -> dict[str, object] | None:
    """A drawn plan, or None where a slip would give the right number of data ranks or that of another slip."""
    parameters = random.randrange(6, 60) * 1_000_000_000
    batch, tensor, stages = random.choice((96, 144, 192, 240, 288)), random.choice((2, 4)), random.choice((2, 4, 8))
    memory, activations = random.choice((16, 24, 32, 40, 48)), random.randrange(20, 200) / 10
    cut = parameters / (tensor * stages) / 1e9

    def smallest(whole: float, divided: float, needed: float, step: int = 1, gb: float = 1.0) -> int:
        """The fewest data ranks that fit; with `step` 0 they need not divide the batch; `gb` is in 10⁹ bytes."""
        room = (memory - needed) * gb - whole * cut
        fitting = (n for n in range(1, batch + 1) if divided * cut / n <= room and (not step or batch % n == 0))
        return next(fitting, batch)

    slips = [smallest(4, 12, 0), smallest(4, 12, activations, 0), smallest(0, 16, activations)]
    slips.append(smallest(4, 12, activations, gb=2**30 / 1e9))
    found = [smallest(4, 12, activations), *slips, smallest(4, 8, activations)]
    if len(set(found)) < len(found) or found[0] > 16 or batch // found[0] < 2 * stages:
        return None
    return {
        "parameters": parameters,
        "tokens": random.randrange(10, 100) * 10_000_000_000,
        "batch": batch,
        "tensor_ranks": tensor,
        "stages": stages,
        "memory_gb": memory,
        "activations_gb": activations,
        "peak_tflops": random.choice((80, 120, 200, 312)),
        "efficiency": random.choice((0.35, 0.4, 0.5, 0.55)),
    }
