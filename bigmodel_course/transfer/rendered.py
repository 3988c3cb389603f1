"""Digits drawn with fonts: as many labelled pictures as we like, for nothing, in the style of the handwritten ones.

The handwritten digits of `data.digits` were bitmaps of 32 x 32 pixels; each of their 8 x 8 numbers counts the ink in a
square of 4 x 4 (scikit-learn's description of load_digits).  So are these: drawn large, turned, slanted and stretched
at random, brought to 32 x 32 in black and white, and counted.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from bigmodel_course.data import Dataset

__all__ = ["FONTS", "font_digits", "font_files", "font_letters", "glyphs"]

FONTS = tuple(
    f"{family}{style}.ttf"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-BoldOblique", "-Oblique"),
        "DejaVuSansMono": ("", "-Bold", "-BoldOblique", "-Oblique"),
        "DejaVuSerif": ("", "-Bold", "-BoldItalic", "-Italic"),
        "STIXGeneral": ("", "Bol", "BolIta", "Italic"),
        "cm": ("r10", "b10", "ss10", "tt10"),
    }.items()
    for style in styles
)
CANVAS, BITMAP, SIDE = 64, 32, 8  # pixels: drawn, brought to, counted in
HEIGHT = 44  # of a drawn digit, so that it has room to turn


def font_files(names: Sequence[str] = FONTS) -> list[Path]:
    """Fonts that come inside matplotlib, which is not imported; FileNotFoundError names those that are not there."""
    package = find_spec("matplotlib")
    if package is None:
        raise FileNotFoundError("the fonts come with matplotlib, which is not installed: pip install matplotlib")
    folder = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"names must be fonts in matplotlib's folder, got {', '.join(missing)}")
    return [folder / name for name in names]


def glyphs(characters: str = "0123456789", fonts: Sequence[str] = FONTS, strokes: Sequence[int] = (0, 1, 2)) -> Tensor:
    """Every character in every font and thickness, in its middle: float32 [characters, fonts * strokes, 64, 64].

    Ink is 1 and paper 0; all have the same height.  `strokes`: by how many pixels the pen is thicker on each side.
    """
    pictures = [
        [_drawn(character, path, stroke) for path in font_files(fonts) for stroke in strokes]
        for character in characters
    ]
    return torch.from_numpy(np.array(pictures, dtype=np.float32)) / 255


def font_digits(
    count: int, *, generator: Generator, turn: float = 20.0, slant: float = 0.3, stretch: float = 0.2, move: float = 1.5
) -> Dataset:
    """`count` digits drawn with fonts: x float32 [count, 64], 8 x 8 pixels in [0, 1], and y int64 [count], balanced.

    Each is turned by up to ±`turn` degrees, slanted by up to ±`slant` (a tangent), its sides stretched by up to
    ±`stretch` (a share) and moved by up to ±`move` pixels of 32.  The same generator state gives the same digits.
    """
    if count < 1 or not 0 <= stretch < 1 or min(turn, slant, move) < 0:
        raise ValueError(f"need count >= 1, stretch in [0, 1) and no negative number, got {count=}, {stretch=}")
    bitmaps, labels = _varied(glyphs(), count, (turn, slant, stretch, move), generator)
    return Dataset(F.avg_pool2d(bitmaps.float(), BITMAP // SIDE).flatten(1), labels, "digits from fonts")


def font_letters(count: int, *, generator: Generator) -> Dataset:
    """`count` capital letters: x float32 [count, 32, 32], 0 or 1, and y int64 [count], 0 for A to 25 for Z."""
    if count < 1:
        raise ValueError(f"need count >= 1, got {count=}")
    letters = glyphs("ABCDEFGHIJKLMNOPQRSTUVWXYZ", strokes=(0, 2))
    bitmaps, labels = _varied(letters, count, (20.0, 0.3, 0.2, 2.0), generator)
    return Dataset(bitmaps[:, 0].float(), labels, "letters from fonts")


def _varied(drawn: Tensor, count: int, ways: tuple[float, ...], generator: Generator) -> tuple[Tensor, Tensor]:
    """Bitmaps, bool [count, 1, 32, 32], and their labels, each class in turn."""
    turn, slant, stretch, move = ways
    labels = torch.arange(count) % len(drawn)
    which = torch.randint(drawn.shape[1], (count,), generator=generator)
    angle, lean, wide, high, right, down = 2 * torch.rand(6, count, generator=generator) - 1
    angle, lean = angle * math.radians(turn), lean * slant
    # From a place in the result to a place in the drawing, both from -1 to 1, of which a digit is 0.69 high.
    width, height = 0.75 / (1 + stretch * wide), 0.75 / (1 + stretch * high)
    edge = 2 * move / BITMAP
    across = [width * angle.cos(), height * (lean - angle.sin()), edge * right]
    along = [width * angle.sin(), height * angle.cos(), edge * down]
    turns = torch.stack(across + along, 1).view(count, 2, 3)
    grid = F.affine_grid(turns, [count, 1, BITMAP, BITMAP], align_corners=False)
    return F.grid_sample(drawn[labels, which][:, None], grid, align_corners=False) > 0.5, labels


def _drawn(character: str, path: Path, stroke: int) -> np.ndarray:
    """One character on a canvas, its box in the middle, `HEIGHT` pixels high."""
    left, top, right, bottom = ImageFont.truetype(path, HEIGHT).getbbox(character)
    font = ImageFont.truetype(path, round(HEIGHT * HEIGHT / (bottom - top)))
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (CANVAS, CANVAS))
    corner = (CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font, stroke_width=stroke)
    return np.asarray(canvas)
