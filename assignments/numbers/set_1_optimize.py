"""Other numbers for problem set 1."""

import math
import random

__all__ = ["draw"]


def draw(random: random.Random) -> dict[str, object]:
    """The numbers of another copy."""
    return {
        "seed": random.randrange(1000),
        "penalty": random.randrange(2, 10) / 10,
        **_bowl(random),
        "momentum": random.randrange(60, 95) / 100,
        "decay": random.randrange(10, 40) / 100,
        "betas": (random.randrange(70, 85) / 100, random.randrange(90, 98) / 100),
        "digit": random.choice([3, 8, 9]),
        "missed_cost": float(random.randrange(5, 12)),
        "alarm_cost": float(random.randrange(1, 4)),
    }


def _bowl(random: random.Random) -> dict[str, object]:
    """A bowl and a target for which every usual mistake gives another batch than the right answer, rounding too."""
    while True:
        curvatures = sorted(round(base * random.uniform(0.7, 1.4), 2) for base in (0.4, 1.5, 6.0, 25.0))
        variances = [round(base * random.uniform(0.7, 1.4), 1) for base in (3.0, 8.0, 20.0, 45.0)]
        share = random.randrange(60, 85) / 100
        rate = share * 2 / curvatures[-1]
        floors = [rate * v / (2 * (2 - rate * c)) for c, v in zip(curvatures, variances, strict=True)]
        target = float(f"{sum(floors) / random.uniform(40, 150):.3g}")
        needs = [
            *(sum(floors) / target * factor for factor in (1, 2, 1 / len(floors))),
            floors[-1] / target,
            sum(rate * v / 4 for v in variances) / target,
            sum(2 * floor / c for floor, c in zip(floors, curvatures, strict=True)) / target,
        ]
        if len({math.ceil(need) for need in needs}) == len(needs) and 0.1 < needs[0] % 1 < 0.45:
            return {"curvatures": curvatures, "variances": variances, "share": share, "target": target}
