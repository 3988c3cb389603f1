"""Digits drawn with fonts look like the handwritten ones, are the same for the same seed, and import no matplotlib."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import ImageFont

from bigmodel_course.data import digits
from bigmodel_course.models import digit_model
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.transfer import rendered
from bigmodel_course.transfer.rendered import FONTS, font_digits, font_files, font_letters, glyphs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.verifies(
    "transfer.rendered.font_files",
    "transfer.rendered.FONTS",
    kind="invariant",
    against="20 fonts that Pillow opens, found without importing matplotlib",
    on="a fresh interpreter, and each font",
)
def test_fonts_are_found_without_importing_matplotlib():
    program = (
        "import sys; from bigmodel_course.transfer.rendered import font_digits, font_files; font_files();"
        "print('matplotlib' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert run.stdout.strip() == "False", run.stderr
    assert len({ImageFont.truetype(path).getname() for path in font_files()}) == len(FONTS) == 20


@pytest.mark.verifies(
    "transfer.rendered.font_files",
    "transfer.rendered.font_digits",
    "transfer.rendered.font_letters",
    kind="message",
    against="the font or package that is missing, the argument that is wrong",
    on="an unknown font, no matplotlib, no digit, a stretch of 1",
)
def test_what_is_missing_or_wrong_is_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"Comic\.ttf"):
        font_files(["DejaVuSans.ttf", "Comic.ttf"])
    for wrong in ({"count": 0}, {"stretch": 1.0}, {"turn": -1.0}):
        with pytest.raises(ValueError, match="need count >= 1"):
            font_digits(**{"count": 10, "generator": generator()} | wrong)
    with pytest.raises(ValueError, match="need count >= 1"):
        font_letters(0, generator=generator())
    monkeypatch.setattr(rendered, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install matplotlib"):
        font_files()


@pytest.mark.verifies(
    "transfer.rendered.glyphs",
    kind="invariant",
    against="each digit in the middle, 41 to 50 pixels high, more ink with a thicker pen, all of them different",
    on="ten digits in 20 fonts and three thicknesses",
)
def test_glyphs_are_in_the_middle_and_of_one_height():
    drawn = glyphs()
    assert drawn.shape == (10, 60, 64, 64)
    inked = drawn > 0.5
    rows, columns = inked.any(3), inked.any(2)
    heights = rows.sum(2)
    assert heights.min() >= 41
    assert heights.max() <= 50
    for sides, off in ((rows, 1), (columns, 8)):  # a slanted one stands beside its box
        first, last = sides.long().argmax(2), 63 - sides.flip(2).long().argmax(2)
        assert ((first + last - 63).abs() <= off).all()
    ink = drawn.sum((2, 3)).view(10, 20, 3)
    assert (ink.diff(dim=2) > 0).all()
    assert (torch.pdist(drawn.flatten(0, 1).flatten(1)) > 1).all()


@pytest.mark.verifies(
    "transfer.rendered.font_digits",
    "transfer.rendered.font_letters",
    kind="invariant",
    against="balanced classes, values counted in sixteenths, the same digits for the same seed, others for another",
    on="1,000 digits and 520 letters",
)
def test_drawn_digits_are_counted_like_the_handwritten_ones():
    first, again, other = (font_digits(1000, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert first.x.shape == (1000, 64)
    assert first.y.bincount().tolist() == [100] * 10
    assert torch.equal((first.x * 16).round(), first.x * 16)
    assert (first.x.amin(), first.x.amax()) == (0, 1)
    handwritten = digits().x
    assert abs(first.x.mean() - handwritten.mean()) < 0.02
    assert abs(first.x.std() - handwritten.std()) < 0.02
    letters = font_letters(520, generator=generator())
    assert letters.x.shape == (520, 32, 32)
    assert letters.y.bincount().tolist() == [20] * 26


def test_without_variation_only_font_and_thickness_differ():
    still = font_digits(600, generator=generator(), turn=0, slant=0, stretch=0, move=0)
    drawn = F.interpolate(glyphs()[7][:, None, 8:56, 8:56], (32, 32), mode="bilinear", align_corners=False) > 0.5
    want = F.avg_pool2d(drawn.float(), 4).flatten(1)
    sevens = still.x[still.y == 7]
    assert (torch.cdist(sevens, want).amin(1) < 1e-6).all()


@pytest.mark.verifies(
    "transfer.rendered.font_digits",
    kind="invariant",
    against="a model that has seen digits from fonts alone reads handwriting four times as often as chance",
    on="the digit model, 150 steps, scikit-learn's 1,797 digits",
)
def test_what_is_learned_from_fonts_is_of_use_for_handwriting():
    fonts, model = font_digits(4800, generator=generator()), digit_model(generator=generator())
    optimizer = Optimizer(model.parameters(), AdamW(), lr=0.01)
    for x, y in zip(fonts.x.split(32), fonts.y.split(32), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    handwritten = digits()
    with torch.no_grad():
        assert (model(handwritten.x).argmax(1) == handwritten.y).double().mean() > 0.4
