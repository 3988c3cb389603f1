"""A larger GPT computes what the small one did, and its copies do not stay copies."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bigmodel_course.growth import grow
from bigmodel_course.models import GPT, GPTConfig

CONFIG = GPTConfig(layers=2, heads=2, width=8, context=16, vocabulary=32)
TOKENS = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(2))


def small(*, tied: bool = True) -> GPT:
    gpt = GPT(replace(CONFIG, tied=tied), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # as after training: no bias that is 0 and no norm that is 1
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.3)
    return gpt


def grown(factor: int, layers: int = 2, *, tied: bool = True, **options: float) -> GPT:
    config = replace(CONFIG, layers=layers, heads=2 * factor, width=8 * factor, tied=tied)
    return grow(small(tied=tied), config, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.verifies(
    "growth.grow",
    kind="parity",
    against="the model that it was grown from",
    on="scores of a GPT 1, 2 and 5 times as wide, of 2 and of 4 layers, tied and not; relative",
    bound=2e-5,
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("factor", [1, 2, 5])
@torch.no_grad()
def test_a_grown_model_gives_the_same_scores(factor, layers, tied, seen):
    before, after = small(tied=tied)(TOKENS), grown(factor, layers, tied=tied)(TOKENS)
    seen((after - before).abs().max() / before.abs().max())


@pytest.mark.verifies("growth.grow", kind="invariant", against="gradients of equal copies", on="with and without noise")
def test_only_with_noise_do_copies_go_their_own_way():
    apart = {}
    for noise in (0.0, 0.02):
        gpt = grown(2, noise=noise)
        F.cross_entropy(gpt(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        first, second = gpt.blocks[0].up.bias.grad.chunk(2)
        apart[noise] = ((first - second).norm() / first.norm()).item()
    assert apart[0.0] < 1e-4
    assert apart[0.02] > 0.01


SHAPES = {"width": {"width": 12}, "heads": {"width": 16, "heads": 2}, "depth": {"layers": 1}, "head": {"tied": False}}


@pytest.mark.verifies("growth.grow", kind="message", against="an error's words", on="four shapes it cannot become")
@pytest.mark.parametrize("shape", SHAPES)
def test_what_cannot_grow_is_refused(shape):
    with pytest.raises(ValueError, match="width and heads times the same factor, or deeper, got GPTConfig"):
        grow(small(), replace(CONFIG, **SHAPES[shape]), generator=torch.Generator())
