"""Other numbers for problem set 2."""

import random

__all__ = ["draw"]


def draw(random: random.Random) -> dict[str, object]:
    """The numbers of another copy."""
    return {
        "seed": random.randrange(1000),
        **_matrix(random),
        **random.choice([{"keep": 2, "of": 4}, {"keep": 2, "of": 5}, {"keep": 4, "of": 6}]),
        "group": random.choice([4, 6, 8]),
        "levels": random.choice([4, 5, 6]),
        "temperature": random.randrange(6, 16) / 2,
        "soft": random.randrange(60, 90) / 100,
        "top": random.choice([2, 3, 4]),
    }


def _matrix(random: random.Random) -> dict[str, object]:
    """A matrix whose bits fill neither its last byte nor the last byte of a row; a quarter or less of it is left.

    With some number of values CSR takes just as much as the dense matrix, which is not yet less.
    """
    while True:
        rows, columns = random.randrange(201, 400, 2), random.randrange(401, 700, 2)
        value, index = random.choice([(2, 4), (4, 4), (2, 8), (4, 8)])
        kept = random.randrange(rows * columns // 20, rows * columns // 4)
        if (value * rows * columns - (rows + 1) * index) % (value + index) == 0:
            return {"rows": rows, "columns": columns, "value_bytes": value, "index_bytes": index, "kept": kept}
