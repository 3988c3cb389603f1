"""Calibration: which range of the activations a grid should cover, chosen on a few examples before the model is used.

A wider range clips nothing but makes every step wider; a narrower one clips the few largest to serve the many.  Each
rule takes the numbers seen, a tensor, and gives (low, high), to be made a grid by `quantization.affine_between`.
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["entropy", "entropy_divergences", "min_max", "percentile"]


def min_max(x: Tensor) -> tuple[float, float]:
    """All of it: the smallest and the largest number of `x`."""
    _check(x)
    return x.min().item(), x.max().item()


def percentile(x: Tensor, *, percent: float = 99.9) -> tuple[float, float]:
    """The middle `percent` of the numbers: the rest is cut off, half at each end.

    Both ends are numbers of `x` (nearest rank, NumPy's method "inverted_cdf").
    """
    _check(x)
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    cut = (100 - percent) / 200
    ranked = x.flatten().sort().values
    low, high = (ranked[max(math.ceil(share * len(ranked)) - 1, 0)].item() for share in (cut, 1 - cut))
    return low, high


def entropy(x: Tensor, *, bins: int = 2048, levels: int = 128) -> tuple[float, float]:
    """The range, equally far to both sides, that loses the least information when `levels` steps cover it.

    What is lost: the KL divergence of the coarse histogram of `x` from the fine one of `bins` bins, clipped numbers
    counted at the ends (Migacz 2017, "8-bit Inference with TensorRT").  The numbers are onnxruntime's, whose default of
    128 bins leaves only one candidate, the whole range; a range never reaches beyond the numbers seen.
    """
    ranges, lost = entropy_divergences(x, bins=bins, levels=levels)
    low, high = ranges[int(lost.argmin())]
    least, most = min_max(x)
    return max(low, least), min(high, most)


def entropy_divergences(x: Tensor, *, bins: int = 2048, levels: int = 128) -> tuple[list[tuple[float, float]], Tensor]:
    """Every range that `entropy` chooses from, and the KL divergence that each one costs (infinite: no data inside)."""
    _check(x)
    if not 2 <= levels <= bins or levels % 2 or bins % 2:
        raise ValueError(f"need even numbers 2 <= levels <= bins, got {levels=} and {bins=}")
    values = x.detach().float().flatten().numpy()
    reach = np.abs(values).max()
    counts, edges = np.histogram(values, bins, range=(-reach, reach))
    ranges, lost = [], []
    for half in range(levels // 2, bins // 2 + 1):
        start, stop = bins // 2 - half, min(bins // 2 + half + 1, bins)
        ranges.append((float(edges[start]), float(edges[stop])))
        lost.append(_divergence(counts, start, stop, levels))
    return ranges, torch.tensor(lost, dtype=torch.float64)


def _divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """KL of the clipped histogram, smoothed, from the same one after `levels` steps."""
    inner = counts[start:stop]
    clipped = inner.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    fine, coarse = _smooth(clipped), _smooth(_coarse(inner, clipped != 0, levels))
    if fine is None or coarse is None:
        return math.inf
    p, q = fine / fine.sum(), coarse / coarse.sum()
    return float((p * np.log(p / q)).sum())


def _coarse(inner: np.ndarray, used: np.ndarray, levels: int) -> np.ndarray:
    """Merge the bins into `levels` of equal width, then spread each one's count over its used bins, in whole numbers.

    Bins left over at the end are counted in the last level but get nothing back, as onnxruntime has it.
    """
    width = len(inner) // levels
    whole = width * levels
    merged = inner[:whole].reshape(levels, width).sum(1)
    merged[-1] += inner[whole:].sum()
    share = merged // np.maximum(used[:whole].reshape(levels, width).sum(1), 1)
    spread = np.where(used[:whole].reshape(levels, width).any(1), share, 0).repeat(width)
    return np.concatenate([spread, np.zeros(len(inner) - whole, dtype=spread.dtype)])


def _smooth(counts: np.ndarray, floor: float = 1e-4) -> np.ndarray | None:
    """Give every empty bin `floor`, taken in equal parts from the others; None where all are empty (float32)."""
    empty = (counts == 0).astype(np.float32)
    full = 1 - empty
    if not full.any():
        return None
    return counts.astype(np.float32) + (floor * empty - floor * float(empty.sum()) / float(full.sum()) * full)


def _check(x: Tensor) -> None:
    if not x.numel() or not x.isfinite().all():
        raise ValueError(
            f"x must hold finite numbers and at least one, got {x.numel()} with {(~x.isfinite()).sum()} not finite"
        )
