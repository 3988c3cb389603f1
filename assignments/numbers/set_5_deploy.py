"""Other numbers for problem set 5."""

import math
import random

__all__ = ["draw"]


def draw(random: random.Random) -> dict[str, object]:
    """The numbers of another copy: times are eighths and rates powers of two, so that sums of them are exact."""
    while (capacity := _capacity(random)) is None:
        pass
    return {
        "seed": random.randrange(1, 10_000),
        "parts": random.randrange(4, 12),
        "share": random.choice((0.8, 0.9, 0.95, 0.97)),
        "largest": random.randrange(3, 7),
        "fixed_ms": random.randrange(40, 80) / 8,
        "each_ms": random.randrange(4, 17) / 8,
        "rate": random.choice((0.5, 1.0, 2.0, 4.0)),
        "burst": random.randrange(2, 6),
        **capacity,
    }


def _capacity(random: random.Random) -> dict[str, object] | None:
    """A drawn service, or None where a slip would give the right number of replicas or that of another slip."""
    service = random.randrange(10, 60)
    latency, arriving = round(service * random.uniform(1.6, 3.0)), 10.0 * random.randrange(10, 60)
    busy_at_most = random.choice((0.6, 0.65, 0.7, 0.75))
    needed = arriving * service / 1000
    found = [math.ceil(needed / busy_at_most) + extra for extra in (0, 1)]
    found += [math.ceil(needed) + 1, math.ceil(needed * busy_at_most) + 1]
    found += [math.ceil(arriving * latency / 1000 / busy_at_most) + 1]
    if len(set(found)) < len(found) or not 0.05 < needed / busy_at_most % 1 < 0.95 or found[1] > 20:
        return None
    return {
        "requests_per_second": arriving,
        "service_ms": float(service),
        "busy_at_most": busy_at_most,
        "latency_ms": float(latency),
        "up": random.choice((0.98, 0.985, 0.99, 0.995)),
    }
