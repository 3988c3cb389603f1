"""A model as a list of layers: parameters, FLOPs and kept activations of each.

A multiply-add is 2 FLOPs, and only matrix products and convolutions are counted, as torch's FlopCounterMode does:
in a large model the rest (activation functions, norms, softmax) is small.  Whatever can be counted is a whole number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from bigmodel_course.costs.arguments import at_least

__all__ = [
    "GPTConfig",
    "Layer",
    "conv2d",
    "gpt",
    "lenet_300_100",
    "linear",
    "mlp",
    "small_cnn",
    "total",
    "training_flops",
]


class Layer(NamedTuple):
    """What one layer costs in the forward pass of one example (for a GPT: of one sequence of tokens).

    `activations` counts the numbers that autograd keeps for the backward pass, parameters not among them.
    """

    name: str
    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT: `context` is the longest sequence of tokens, `width` the length of the vector of each.

    With `tied`, the head that predicts the next token shares its weight with the token embedding.
    """

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int = 256  # a token is a byte
    tied: bool = True

    def __post_init__(self) -> None:
        at_least(1, layers=self.layers, heads=self.heads, context=self.context, vocabulary=self.vocabulary)
        if self.width < 1 or self.width % self.heads:
            raise ValueError(f"need a width that the heads divide, got width={self.width} and heads={self.heads}")


def linear(inputs: int, outputs: int, *, rows: int = 1, bias: bool = True) -> Layer:
    """A fully connected layer that is applied to `rows` vectors; it keeps its input for the weight's gradient."""
    at_least(1, inputs=inputs, outputs=outputs, rows=rows)
    weights = inputs * outputs
    return Layer(f"linear {inputs}-{outputs}", weights + outputs * bias, 2 * rows * weights, rows * inputs)


def conv2d(inputs: int, outputs: int, side: int, *, kernel: int = 3, stride: int = 1) -> Layer:
    """A convolution from `inputs` to `outputs` channels of a `side` x `side` image, padded by kernel // 2 (odd)."""
    at_least(1, inputs=inputs, outputs=outputs, side=side, stride=stride)
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"need an odd kernel, got {kernel=}")
    weights = inputs * outputs * kernel**2
    pixels = ceil(side / stride) ** 2  # each weight is used once for every pixel of the result
    return Layer(f"conv {inputs}-{outputs}", weights + outputs, 2 * pixels * weights, inputs * side**2)


def mlp(widths: Sequence[int]) -> list[Layer]:
    """Linear layers with ReLU between them, as models.MLP.

    A ReLU adds nothing: what it keeps is its result, and that is the next layer's input, already counted.
    """
    if len(widths) < 2:
        raise ValueError(f"need at least two widths, input and output, got widths={tuple(widths)}")
    return [linear(*pair) for pair in pairwise(widths)]


def lenet_300_100() -> list[Layer]:
    """LeNet-300-100 for 28 x 28 images in 10 classes (LeCun et al. 1998): 266,610 parameters."""
    return mlp((784, 300, 100, 10))


def small_cnn(side: int = 8, channels: Sequence[int] = (16, 32), classes: int = 10) -> list[Layer]:
    """As models.SmallCNN: convolutions, each after the first halving the side, and a linear layer."""
    layers, inputs, stride = [], 1, 1
    for outputs in channels:
        layers.append(conv2d(inputs, outputs, side, stride=stride))
        inputs, side, stride = outputs, ceil(side / stride), 2
    return [*layers, linear(inputs * side**2, classes)]


def _block(config: GPTConfig, rows: int) -> list[Layer]:
    """One block of a GPT."""
    width = config.width
    norm = Layer("norm", 2 * width, 0, rows * (width + 2))  # keeps its input, and a mean and a deviation each row
    qkv, out = linear(width, 3 * width, rows=rows), linear(width, width, rows=rows)
    up, down = linear(width, 4 * width, rows=rows), linear(4 * width, width, rows=rows)
    # Two products with a rows x rows matrix.  The half that causality masks is counted as well; a fused kernel keeps
    # q, k, v and one number a row and head, never the matrix.
    attention = Layer("attention", 0, 2 * 2 * rows**2 * width, rows * (3 * width + config.heads))
    gelu = Layer("gelu", 0, 0, rows * 4 * width)  # unlike ReLU, it keeps its input
    named = {"norm 1": norm, "qkv": qkv, "attention": attention, "attention out": out}
    named |= {"norm 2": norm, "up": up, "gelu": gelu, "down": down}
    return [layer._replace(name=name) for name, layer in named.items()]


def gpt(config: GPTConfig, *, tokens: int | None = None) -> list[Layer]:
    """As models.GPT, reading one sequence of `tokens` tokens (default: the whole context)."""
    rows, width = config.context if tokens is None else tokens, config.width
    if not 1 <= rows <= config.context:
        raise ValueError(f"need 1 <= tokens <= context = {config.context}, got {tokens=}")
    embedding = Layer("embedding", (config.vocabulary + config.context) * width, 0, rows)  # a look-up: no FLOPs
    norm = Layer("norm", 2 * width, 0, rows * (width + 2))
    head = linear(width, config.vocabulary, rows=rows, bias=False)._replace(name="head")
    if config.tied:
        head = head._replace(parameters=0)  # counted with the embedding; its product costs all the same
    block = _block(config, rows)
    blocks = [layer._replace(name=f"block {i} {layer.name}") for i in range(config.layers) for layer in block]
    return [embedding, *blocks, norm, head]


def total(layers: Sequence[Layer]) -> Layer:
    """The sum of all layers."""
    _names, *counts = zip(*layers, strict=True)
    return Layer("total", *map(sum, counts))


def training_flops(layers: Sequence[Layer]) -> int:
    """Forward and backward of one example.

    Backward makes two products as large as the forward's: the gradient of the weight and that of the input.
    Nobody needs the gradient of the model's own input, so the first layer saves one of them.
    """
    return 3 * total(layers).flops - layers[0].flops
