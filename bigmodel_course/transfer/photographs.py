"""Photographs that come inside packages, and views of them: a small real set of pictures, with no download."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

__all__ = ["photographs", "views"]

# File -> package.  The files are read; the packages are not imported.
FILES = {
    "data/astronaut.png": "skimage",
    "data/brick.png": "skimage",
    "data/camera.png": "skimage",
    "data/chelsea.png": "skimage",
    "data/clock_motion.png": "skimage",
    "data/coffee.png": "skimage",
    "data/coins.png": "skimage",
    "data/grass.png": "skimage",
    "data/gravel.png": "skimage",
    "data/hubble_deep_field.jpg": "skimage",
    "data/ihc.png": "skimage",
    "data/moon.png": "skimage",
    "data/motorcycle_left.png": "skimage",
    "data/page.png": "skimage",
    "data/retina.jpg": "skimage",
    "data/rocket.jpg": "skimage",
    "datasets/images/china.jpg": "sklearn",
    "datasets/images/flower.jpg": "sklearn",
}


def photographs(names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Photographs that come with scikit-image and scikit-learn, by name: uint8 [3, H, W], black 0.

    FileNotFoundError names those of `names`, by default all 18, that are not there.
    """
    paths = {Path(file).stem: _path(package, file) for file, package in FILES.items()}
    wanted = list(paths) if names is None else list(names)
    if missing := [name for name in wanted if paths.get(name) is None]:
        raise FileNotFoundError(
            f"photographs of scikit-image and scikit-learn that are not there: {', '.join(missing)}"
        )
    return {name: _picture(paths[name]) for name in wanted}


def views(
    photograph: Tensor, count: int, *, side: int, generator: Generator, parts: tuple[float, float] = (0.3, 0.5)
) -> Tensor:
    """`count` squares cut from a photograph at random and brought to `side` x `side`: uint8 [count, 3, side, side].

    A square is `parts` (from, to) of the shorter side long, lies anywhere, is mirrored half of the time, and its light
    is changed by up to 40 %.
    """
    low, high = parts
    if photograph.ndim != 3 or photograph.dtype != torch.uint8:
        raise ValueError(f"photograph must be uint8 [3, H, W], got {photograph.dtype} {list(photograph.shape)}")
    if not 0 < low <= high <= 1 or count < 1 or side < 1:
        raise ValueError(f"need count, side >= 1 and 0 < parts[0] <= parts[1] <= 1, got {count=}, {side=}, {parts=}")
    _, height, width = photograph.shape
    pictures = []
    for size, down, right, mirror, light in torch.rand(count, 5, generator=generator).tolist():
        edge = max(1, int(min(height, width) * (low + (high - low) * size)))
        top, left = int(down * (height - edge + 1)), int(right * (width - edge + 1))
        square = photograph[None, :, top : top + edge, left : left + edge].float()
        square = F.interpolate(square, (side, side), mode="bilinear", antialias=True) * (0.6 + 0.8 * light)
        pictures.append(square.flip(3) if mirror < 0.5 else square)
    return torch.cat(pictures).clamp(0, 255).byte()


def _path(package: str, file: str) -> Path | None:
    spec = find_spec(package)
    path = None if spec is None else Path(spec.origin).parent / file
    return path if path is not None and path.is_file() else None


def _picture(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
