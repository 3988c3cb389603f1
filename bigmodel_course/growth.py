"""Grow a trained GPT into a larger one that computes the same (Chen, Goodfellow & Shlens 2016, arXiv 1511.05641)."""

import torch
from torch import Generator, Tensor

from bigmodel_course.models import GPT, Block, GPTConfig

__all__ = ["grow"]


@torch.no_grad()
def grow(small: GPT, config: GPTConfig, *, generator: Generator, noise: float = 0.02) -> GPT:
    """A GPT of the shape `config` that gives the scores of `small`, which is left alone.

    Wider: every vector stands `factor` times side by side, so norms see the same mean and deviation, and a matrix reads
    these copies with shares that add up to its old weight.  The shares differ by normal `noise` that sums to zero over
    the copies: without it copies would have equal gradients and stay copies for ever.  Deeper: new blocks at the end
    add 0 to the stream.  Grow what has been trained: where the stream is as small as at the start, norms magnify the
    rounding that lies between copies, and noise hands it on.

    ValueError unless width and heads are the same multiple and all else that exists is as large.
    """
    old, factor = small.config, config.width // small.config.width
    same = (old.context, old.vocabulary, old.tied) == (config.context, config.vocabulary, config.tied)
    if (
        (config.width, config.heads) != (factor * old.width, factor * old.heads)
        or config.layers < old.layers
        or not same
    ):
        raise ValueError(f"config must be {old} with width and heads times the same factor, or deeper, got {config}")
    big = GPT(config, generator=generator)
    kept = dict(small.named_parameters())
    for name, p in big.named_parameters():
        if name in kept:
            p.copy_(_wider(name, kept[name], factor, noise, generator))
    if config.tied:  # the head reads the repeated table, which cannot hold shares: the last norm takes them
        big.norm.weight /= factor
        big.norm.bias /= factor
    for block in big.blocks[old.layers :]:
        _silence_(block)
    return big


def _wider(name: str, value: Tensor, factor: int, noise: float, generator: Generator) -> Tensor:
    if name in ("tokens.weight", "positions.weight"):
        return value.repeat(1, factor)
    parts = 3 if ".qkv." in name else 1  # queries, keys and values stand one after the other: each is copied
    rows = 1 if name == "head.weight" else factor  # a score is one number, whatever the width
    tall = value.unflatten(0, (parts, -1)).repeat(1, rows, *[1] * (value.ndim - 1)).flatten(0, 1)
    if value.ndim == 1:
        return tall
    shares = noise * torch.randn(len(tall), factor, value.shape[1], generator=generator, dtype=value.dtype)
    return (tall[:, None] / factor + shares - shares.mean(1, keepdim=True)).flatten(1)


def _silence_(block: Block) -> None:
    for layer in (block.attention.out, block.down):
        layer.weight.zero_()
        layer.bias.zero_()
