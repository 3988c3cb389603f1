"""Other numbers for problem set 3."""

import random

__all__ = ["draw"]


def draw(random: random.Random) -> dict[str, object]:
    """The numbers of another copy."""
    every = random.choice([2, 3])
    return {
        "seed": random.randrange(1000),
        "each": random.choice([4, 5, 6]),
        "bins": random.choice([8, 10, 12]),
        "epochs": random.randrange(3 * every + 1, 5 * every),
        "every": every,
        **_encoder(random),
        "rank": random.choice([2, 3]),
        "alpha": float(random.choice([7, 8, 10, 12])),
    }


def _encoder(random: random.Random) -> dict[str, object]:
    """An encoder, a limit that no whole rank fills, and a share of the disk that even too large adapters can reach."""
    while True:
        blocks, width = random.choice([6, 12, 16, 24, 32]), random.choice([384, 512, 768, 1024])
        weights, a_rank = blocks * 12 * width**2, blocks * 4 * width
        limit = 4 * weights + int((random.randrange(width // 32, width // 8) + random.uniform(0.2, 0.8)) * 16 * a_rank)
        task_rank = random.choice([4, 8, 16])
        times = int(weights / (task_rank * a_rank) * random.uniform(0.12, 0.2))
        tasks = weights / (weights / times - task_rank * a_rank)
        if 0.1 < tasks % 1 < 0.9 and tasks > times + 3:
            return {"blocks": blocks, "width": width, "limit": limit, "task_rank": task_rank, "times": times}
