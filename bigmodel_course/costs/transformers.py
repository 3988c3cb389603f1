"""The shapes of large language models, published ones among them: parameters, FLOPs and kept activations."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from bigmodel_course.costs.arguments import at_least

__all__ = ["TRANSFORMERS", "Matrix", "Transformer"]


class Matrix(NamedTuple):
    """One parameter tensor; `cut` is the dimension that tensor parallelism divides, None where no rank divides it."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class Transformer:
    """A decoder: `hidden` is the width inside the MLP, `key_value_heads` the heads that queries share (None: none).

    `gated` is Llama's kind: three matrices in the MLP, RMSNorm, rotary positions and no biases.  Otherwise it is GPT's:
    two matrices, LayerNorm, learned positions and biases.  A `tied` head shares the token embedding's weight.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    hidden: int | None = None
    key_value_heads: int | None = None
    gated: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        at_least(1, layers=self.layers, width=self.width, heads=self.heads, vocabulary=self.vocabulary)
        at_least(1, context=self.context, inner=self.inner, key_value_heads=self.shared_heads)
        if self.width % self.heads or self.heads % self.shared_heads:
            raise ValueError(
                "need heads that divide width and key_value_heads that divide heads, "
                f"got width={self.width}, heads={self.heads}, key_value_heads={self.shared_heads}"
            )

    @property
    def inner(self) -> int:
        """The width inside the MLP: four times the model's where none is given."""
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def key_value_width(self) -> int:
        """Width of the keys (and of the values) of one token."""
        return self.width // self.heads * self.shared_heads

    def block(self) -> list[Matrix]:
        """The tensors of one block, in the order in which the forward pass meets them."""
        return list(self._block())

    def _block(self) -> Iterator[Matrix]:
        width, inner = self.width, self.inner
        yield from self._norm("norm 1")
        for name, rows in (("query", width), ("key", self.key_value_width), ("value", self.key_value_width)):
            yield from self._linear(name, rows, width, cut=0)
        yield from self._linear("attention out", width, width, cut=1)
        yield from self._norm("norm 2")
        for name in ("gate", "up") if self.gated else ("up",):
            yield from self._linear(name, inner, width, cut=0)
        yield from self._linear("down", width, inner, cut=1)

    def before(self) -> list[Matrix]:
        """The tensors before the blocks: the embeddings."""
        positions = [] if self.gated else [Matrix("positions", (self.context, self.width))]
        return [Matrix("tokens", (self.vocabulary, self.width), 0), *positions]

    def after(self) -> list[Matrix]:
        """The tensors after the blocks: the last norm and the head; a last stage has a copy of a tied one."""
        return [*self._norm("last norm"), Matrix("head", (self.vocabulary, self.width), 0)]

    def outside(self) -> list[Matrix]:
        """The tensors that stand outside the blocks, a tied head not a second time."""
        after = self.after()
        return [*self.before(), *(after[:-1] if self.tied else after)]

    def _norm(self, name: str) -> Iterator[Matrix]:
        yield Matrix(f"{name} weight", (self.width,))
        if not self.gated:
            yield Matrix(f"{name} bias", (self.width,))

    def _linear(self, name: str, rows: int, columns: int, *, cut: int) -> Iterator[Matrix]:
        yield Matrix(f"{name} weight", (rows, columns), cut)
        if not self.gated:  # cut by columns, each rank would add the bias: it stays whole
            yield Matrix(f"{name} bias", (rows,), 0 if cut == 0 else None)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        return sum(matrix.numbers for matrix in self.block())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return self.layers * self.block_parameters + sum(matrix.numbers for matrix in self.outside())

    def block_flops(self, tokens: int | None = None) -> int:
        """FLOPs of one block's forward pass over one sequence: its matrices, and attention without its causal half."""
        tokens = self.context if tokens is None else tokens
        matrices = sum(matrix.numbers for matrix in self.block() if len(matrix.shape) == 2)
        return 2 * tokens * matrices + 4 * tokens**2 * self.width

    def head_flops(self, tokens: int | None = None) -> int:
        """FLOPs of the head's forward pass over one sequence."""
        return 2 * (self.context if tokens is None else tokens) * self.width * self.vocabulary

    def training_flops(self, tokens: int | None = None) -> int:
        """FLOPs of forward and backward (twice the forward) of one sequence, nothing computed again.

        For a GPT: 72 s l h^2 (1 + s / 6h + V / 12 l h), Narayanan et al. 2021, arXiv 2104.04473, without recomputation.
        """
        return 3 * (self.layers * self.block_flops(tokens) + self.head_flops(tokens))


def _gpt(layers: int, width: int, heads: int, *, vocabulary: int = 51_200, context: int = 2048) -> Transformer:
    return Transformer(layers, width, heads, vocabulary, context)


def _llama(layers: int, width: int, heads: int, hidden: int) -> Transformer:
    return Transformer(layers, width, heads, 128_256, 8192, hidden, key_value_heads=8, gated=True, tied=False)


# Brown et al. 2020 (arXiv 2005.14165), table 2.1; Narayanan et al. 2021 (arXiv 2104.04473), table 1;
# Llama team 2024 (arXiv 2407.21783), table 3, with the released models' vocabulary.
TRANSFORMERS = {
    "GPT-2 124M": _gpt(12, 768, 12, vocabulary=50_257, context=1024),
    "GPT-3 175B": _gpt(96, 12_288, 96, vocabulary=50_257),
    "Megatron 1.7B": _gpt(24, 2304, 24),
    "Megatron 3.6B": _gpt(30, 3072, 32),
    "Megatron 7.5B": _gpt(36, 4096, 32),
    "Megatron 18.4B": _gpt(40, 6144, 48),
    "Megatron 39.1B": _gpt(48, 8192, 64),
    "Megatron 76.1B": _gpt(60, 10_240, 80),
    "Megatron 145.6B": _gpt(80, 12_288, 96),
    "Megatron 310.1B": _gpt(96, 16_384, 128),
    "Megatron 529.6B": _gpt(105, 20_480, 128),
    "Megatron 1008.0B": _gpt(128, 25_600, 160),
    "Llama 3 8B": _llama(32, 4096, 32, 14_336),
    "Llama 3 70B": _llama(80, 8192, 64, 28_672),
    "Llama 3 405B": _llama(126, 16_384, 128, 53_248),
}
