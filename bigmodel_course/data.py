"""Data sets that come with a package, and what is done to them before training.

    digits / diabetes / mnist  ->  clean  ->  split  ->  Standardizer, fitted on the training part  ->  batches

A `Dataset` is two tensors of equal length.  Nothing here changes its input.
"""

import gzip
import hashlib
import math
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["Cleaned", "Dataset", "Standardizer", "batches", "clean", "diabetes", "digits", "mnist"]
__all__ += ["noise", "rotate", "shift", "split"]

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
UNPACKED_LIMIT = 100_000_000  # bytes: a compressed file may unpack to anything
Seed = int | Generator


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples `x` [N, ...] and what is to be predicted of each, `y` [N, ...].

    `dataset[index]`, where `index` is a slice, a list or a tensor of positions or of N booleans, is a smaller Dataset.
    """

    x: Tensor
    y: Tensor
    name: str = "data"

    def __post_init__(self) -> None:
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) != len(self.y):
            raise ValueError(f"x and y must have equally many rows, got {list(self.x.shape)} and {list(self.y.shape)}")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | list | Tensor) -> "Dataset":
        if not isinstance(index, slice | list | Tensor):
            raise TypeError(f"index must be a slice, a list or a tensor, got {index!r}: use [i : i + 1] for one row")
        return replace(self, x=self.x[index], y=self.y[index])


def digits() -> Dataset:
    """1,797 handwritten digits: x float32 [1797, 64], 8 x 8 pixels in [0, 1], and y int64 [1797] (scikit-learn's)."""
    from sklearn.datasets import load_digits  # a second to import, for nothing else here

    pixels, labels = load_digits(return_X_y=True)
    return Dataset(torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels), "digits")


def diabetes() -> Dataset:
    """442 patients: x float64 [442, 10], scaled, and y float64 [442], a year's progress (scikit-learn's)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return Dataset(torch.from_numpy(x), torch.from_numpy(y), "diabetes")


def mnist(folder: str | Path) -> tuple[Dataset, Dataset]:
    """MNIST from its four files: 60,000 digits to train on and 10,000 to test (LeCun et al. 1998).

    x float32 [N, 28, 28] in [0, 1], y int64 [N].  A file may be compressed (.gz); its content is held to the SHA-256
    of the original.  FileNotFoundError or ValueError says which file is missing or wrong, and how to get it.
    """
    parts = []
    for part in ("train", "t10k"):
        pixels = _idx(Path(folder), f"{part}-images-idx3-ubyte").float() / 255
        parts.append(Dataset(pixels, _idx(Path(folder), f"{part}-labels-idx1-ubyte").long(), f"mnist {part}"))
    return parts[0], parts[1]


def _idx(folder: Path, name: str) -> Tensor:
    """The tensor of an IDX file: two zeros, a type, the number of dimensions, their sizes, the bytes."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"folder must hold MNIST's four files, and {folder} lacks {name}: run `make mnist`")
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read(UNPACKED_LIMIT)
    if (got := hashlib.sha256(content).hexdigest()) != MNIST_SHA256[name]:
        raise ValueError(f"{path} must hold SHA-256 {MNIST_SHA256[name]}, got {got}: remove it and run `make mnist`")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


@dataclass(frozen=True)
class Cleaned:
    """What `clean` removed: rows with NaN or infinity, rows that repeat an earlier one, columns of one value."""

    not_finite: tuple[int, ...]
    duplicates: tuple[int, ...]
    constant: tuple[int, ...]

    def __str__(self) -> str:
        rows = f"{len(self.not_finite)} rows not finite, {len(self.duplicates)} duplicate rows"
        return f"removed: {rows}, {len(self.constant)} constant columns"


def clean(x: Tensor, y: Tensor, name: str = "data") -> tuple[Dataset, Cleaned]:
    """Remove what cannot be learned from, in this order: rows not finite, exact duplicates (x and y), constant columns.

    x [N, D], y [N, ...].  The report counts rows and columns as they stand in the input.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a table [N, D], got {list(x.shape)}: of images, take x.flatten(1)")
    if len(x) != len(y):
        raise ValueError(f"x and y must have equally many rows, got {len(x)} and {len(y)}")
    finite = x.isfinite().all(1) & y.reshape(len(y), -1).isfinite().all(1)
    if not finite.any():
        raise ValueError(f"x and y must have at least one finite row, got none in {len(x)}")
    rows, seen = finite.nonzero()[:, 0].tolist(), {}
    for row, content in zip(rows, zip(_same(x[finite]), _same(y[finite]), strict=True), strict=True):
        seen.setdefault(content, row)  # the first of its kind stays
    kept = list(seen.values())
    varies = (x[kept] != x[kept[0]]).any(0)
    places = [tuple(mask.nonzero()[:, 0].tolist()) for mask in (~finite, ~varies)]
    report = Cleaned(places[0], tuple(sorted(set(rows) - set(kept))), places[1])
    return Dataset(x[kept][:, varies], y[kept], name), report


def _same(x: Tensor) -> list[int]:
    """A number for each row of `x` [N, ...], equal where the rows are: 0, 1, … in the order of first appearance."""
    rows = (x + 0)[:, None].flatten(1).view(torch.uint8).numpy()  # + 0 turns -0.0 into 0.0, which equals it
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]


def split(
    dataset: Dataset, fractions: Sequence[float], *, seed: Seed, stratify: bool = True, groups: Tensor | None = None
) -> tuple[Dataset, ...]:
    """Cut a data set into parts, such as fractions (0.8, 0.2), without leakage between them.

    Rows with the same x stay together, and so do rows with the same number in `groups` (int [N]: one patient, one
    drawing, …).  With `stratify`, where y holds whole numbers, each part has its fraction of every class: within one
    example where rows stand alone, as near as their groups allow otherwise; a group counts under its commonest class.
    ValueError when the fractions do not sum to 1 or a part would be empty.  Parts keep the order of the data set.
    """
    if len(fractions) < 2 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be two or more numbers above 0 that sum to 1, got {tuple(fractions)}")
    if groups is not None and groups.shape != (len(dataset),):
        raise ValueError(f"groups must have shape [{len(dataset)}], one number a row, got {list(groups.shape)}")
    units = _units(dataset.x, groups)
    labels = dataset.y.tolist() if stratify and dataset.y.ndim == 1 and not dataset.y.is_floating_point() else None
    shuffled = [units[i] for i in torch.randperm(len(units), generator=_generator(seed)).tolist()]
    part = _assign(sorted(shuffled, key=len, reverse=True), labels or [0] * len(dataset), fractions)  # large ones first
    parts = tuple(dataset[part == i] for i in range(len(fractions)))
    if not all(sizes := [len(p) for p in parts]):
        raise ValueError(f"fractions must leave no part empty, got {tuple(fractions)} of {len(dataset)} rows: {sizes}")
    return parts


def _units(x: Tensor, groups: Tensor | None) -> list[list[int]]:
    """Rows that may not be parted: the same x, the same group, or joined by a chain of such rows."""
    number = copies = torch.tensor(_same(x), dtype=torch.int64)
    kinds = [copies] if groups is None else [copies, groups.unique(return_inverse=True)[1]]
    before = None
    while before is None or not torch.equal(number, before):  # each row takes the smallest number among its kin
        before = number
        for kin in kinds:
            number = number.scatter_reduce(0, kin, number, "amin")[kin]
    units = defaultdict(list)
    for row, unit in enumerate(number.tolist()):
        units[unit].append(row)
    return list(units.values())


def _assign(units: list[list[int]], labels: list[int], fractions: Sequence[float]) -> Tensor:
    """The part of each row.

    Class after class, a unit goes where its class still lacks a whole example, and at the end where a part of one is
    missing.  So each part's count of a class ends within one of its share.  Among those, the part that lacks most in
    all gets it, so that the roundings of many classes do not add up.
    """
    part, total_lack = torch.empty(len(labels), dtype=torch.int64), [0.0] * len(fractions)
    by_class = defaultdict(list)
    for unit in units:
        by_class[Counter(labels[row] for row in unit).most_common(1)[0][0]].append(unit)
    for label in sorted(by_class):
        size = sum(map(len, by_class[label]))
        lack = [f * size for f in fractions]
        total_lack = [t + s for t, s in zip(total_lack, lack, strict=True)]
        for unit in by_class[label]:
            whole = [i for i, missing in enumerate(lack) if missing > 1 - 1e-9]
            some = [i for i, missing in enumerate(lack) if missing > 1e-9]
            chosen = max(whole or some, key=total_lack.__getitem__)
            part[unit] = chosen
            lack[chosen] -= len(unit)
            total_lack[chosen] -= len(unit)
    return part


def _generator(seed: Seed) -> Generator:
    return seed if isinstance(seed, Generator) else torch.Generator().manual_seed(seed)


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Scales each column to mean 0 and deviation 1: `Standardizer.fit(train.x).apply(test.x)`.

    Fit it on the training part only: what it knows of other rows leaks into training.  A constant column becomes 0.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> "Standardizer":
        """Measure the columns of x [N, ...]; the deviation divides by N, as scikit-learn's does."""
        if len(x) == 0 or not x.is_floating_point():
            raise ValueError(f"x must hold at least one row of floating-point numbers, got {list(x.shape)}, {x.dtype}")
        constant = (x == x[0]).all(0)
        return cls(x.mean(0), x.std(0, correction=0).masked_fill(constant, 1.0))

    def apply(self, x: Tensor) -> Tensor:
        """(x - mean) / deviation, column by column."""
        if x.shape[1:] != self.mean.shape:
            raise ValueError(f"x must have rows of shape {list(self.mean.shape)}, got {list(x.shape)}")
        return (x - self.mean) / self.deviation


def batches(
    dataset: Dataset, size: int, *, seed: int, epoch: int, shuffle: bool = True, drop_last: bool = False
) -> Iterator[Dataset]:
    """One epoch of batches of `size` examples: each example once, in an order that depends on (seed, epoch) only.

    So a run that is resumed needs no random state to find its order again.  The last batch may be smaller, unless
    `drop_last` leaves it out.  ValueError for a size below 1, or when there would be no batch at all.
    """
    if size < 1 or min(seed, epoch) < 0:
        raise ValueError(f"need size >= 1, seed >= 0 and epoch >= 0, got {size=}, {seed=}, {epoch=}")
    used = len(dataset) - len(dataset) % size if drop_last else len(dataset)
    if used == 0:
        raise ValueError(f"need at least one batch, got {len(dataset)} examples for {size=} and {drop_last=}")
    order = torch.arange(len(dataset))
    if shuffle:
        mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).item()  # far apart for near pairs
        order = torch.randperm(len(dataset), generator=_generator(mixed))
    return (dataset[order[start : min(start + size, used)]] for start in range(0, used, size))


# Augmentation: images [N, H, W] or [N, C, H, W], floating point.  What comes in from outside the image is 0.


def shift(images: Tensor, pixels: int, *, generator: Generator) -> Tensor:
    """Each image moved by whole pixels, up to `pixels` in each direction, every distance equally likely."""
    x_NCHW = _images(images)
    n, _, height, width = x_NCHW.shape
    if pixels < 0:
        raise ValueError(f"need pixels >= 0, got {pixels=}")
    corner = torch.randint(2 * pixels + 1, (2, n, 1), generator=generator)
    rows, columns = corner[0] + torch.arange(height), corner[1] + torch.arange(width)
    wide_NCHW = F.pad(x_NCHW, (pixels,) * 4)
    moved = wide_NCHW.take_along_dim(rows[:, None, :, None], 2).take_along_dim(columns[:, None, None, :], 3)
    return moved.reshape(images.shape)


def rotate(images: Tensor, degrees: float, *, generator: Generator) -> Tensor:
    """Each image turned about its middle by an angle drawn evenly from ±`degrees`, counter-clockwise, bilinear."""
    x_NCHW = _images(images)
    n, _, height, width = x_NCHW.shape
    if not 0 <= degrees <= 180:
        raise ValueError(f"need 0 <= degrees <= 180, got {degrees=}")
    angle = (2 * torch.rand(n, generator=generator, dtype=images.dtype) - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid measures both sides from -1 to 1, so a turn must undo the image's proportions.
    turn_N23 = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).view(n, 2, 3)
    grid = F.affine_grid(turn_N23, list(x_NCHW.shape), align_corners=False)
    return F.grid_sample(x_NCHW, grid, align_corners=False).reshape(images.shape)


def noise(images: Tensor, deviation: float, *, generator: Generator) -> Tensor:
    """Normal noise added to every pixel, the result kept in [0, 1]."""
    _images(images)
    if deviation < 0:
        raise ValueError(f"need deviation >= 0, got {deviation=}")
    drawn = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + deviation * drawn).clamp(0, 1)


def _images(images: Tensor) -> Tensor:
    """As [N, C, H, W]."""
    if images.ndim not in (3, 4) or not images.is_floating_point():
        raise ValueError(f"images must be floats [N, H, W] or [N, C, H, W], got {list(images.shape)}, {images.dtype}")
    return images[:, None] if images.ndim == 3 else images
