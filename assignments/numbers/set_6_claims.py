"""Other numbers for problem set 6."""

import math
import random

__all__ = ["draw"]


def draw(random: random.Random) -> dict[str, object]:
    """The numbers of another copy: a share in every part of the range, and betas whose first steps are short."""
    betas = None
    while betas is None:
        betas = _betas(random)
    parts = ((5, 20), (25, 45), (52, 58), (63, 71), (80, 95))
    return {
        "seed": random.randrange(1, 10_000),
        "shares": [random.randrange(*part) / 100 for part in parts],
        "bits": random.randrange(4, 8),
        "threshold": random.choice((0.002, 0.005, 0.02, 0.03, 0.05)),
        **betas,
    }


def _betas(random: random.Random) -> dict[str, object] | None:
    """Drawn betas, or None unless the first step is no longer than allowed and the longest one clearly is."""
    beta1, beta2 = random.randrange(850, 960, 5) / 1000, random.randrange(960, 996) / 1000
    most = random.choice((1.05, 1.1, 1.15, 1.2))
    factors = [(1 - beta1**t) / math.sqrt(1 - beta2**t) for t in range(1, 2000)]
    settled = 1 + max((t for t, f in enumerate(factors, 1) if f > most), default=0)
    near = min(abs(f - most) for f in factors)
    if factors[0] > 0.95 * most or max(factors) < 1.1 * most or settled > 1500 or near < 1e-5:
        return None
    return {"beta1": beta1, "beta2": beta2, "most": most}
