"""What a pretrained picture network costs, block by block, and what it saves to keep the features of a frozen part."""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.layers import Layer, linear, total

__all__ = ["LITE0", "BlockSpec", "cached_flops", "efficientnet_lite"]


class BlockSpec(NamedTuple):
    """`repeats` blocks that widen their channels `widen` times; the first has `stride` and changes their number."""

    repeats: int
    kernel: int
    stride: int
    widen: int
    channels: int


LITE0 = (
    BlockSpec(1, 3, 1, 1, 16),
    BlockSpec(2, 3, 2, 6, 24),
    BlockSpec(2, 5, 2, 6, 40),
    BlockSpec(3, 3, 2, 6, 80),
    BlockSpec(3, 5, 1, 6, 112),
    BlockSpec(4, 5, 2, 6, 192),
    BlockSpec(1, 3, 1, 6, 320),
)


def efficientnet_lite(
    side: int, classes: int = 1000, *, blocks: Sequence[BlockSpec] = LITE0, stem: int = 32, width: int = 1280
) -> list[Layer]:
    """As transfer.vision.EfficientNetLite on a picture of `side` x `side`, one Layer a convolution with its BatchNorm.

    Activations are those of training: what each convolution and norm reads, padding included, and each ReLU6.
    """
    at_least(1, side=side, classes=classes, stem=stem, width=width)
    layers, inputs = [_convolution("stem", 3, stem, side, kernel=3, stride=2)], stem
    side, number = ceil(side / 2), 0
    for spec in blocks:
        for i in range(spec.repeats):
            stride, wide = 1 if i else spec.stride, inputs * spec.widen
            name = f"blocks.{number}"
            if spec.widen > 1:
                layers.append(_convolution(f"{name}.expand", inputs, wide, side))
            options = {"kernel": spec.kernel, "stride": stride, "groups": wide}
            layers.append(_convolution(f"{name}.depthwise", wide, wide, side, **options))
            side, number = ceil(side / stride), number + 1
            layers.append(_convolution(f"{name}.project", wide, spec.channels, side, relu=False))
            inputs = spec.channels
    return [*layers, _convolution("head", inputs, width, side), linear(width, classes)._replace(name="linear")]


def cached_flops(layers: Sequence[Layer], frozen: int, epochs: int) -> int:
    """Training what stands behind the first `frozen` layers for `epochs`, one example, with their features kept.

    The frozen part runs forward once; the rest runs forward and backward in each epoch.  With frozen=0 nothing is kept.
    """
    if not 0 <= frozen < len(layers) or epochs < 1:
        raise ValueError(f"need 0 <= frozen < {len(layers)} layers and epochs >= 1, got {frozen=}, {epochs=}")
    kept, rest = list(layers[:frozen]), layers[frozen:]
    once = total(kept).flops if kept else 0
    return once + epochs * (3 * total(rest).flops - rest[0].flops)


def _convolution(
    name: str,
    inputs: int,
    outputs: int,
    side: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    relu: bool = True,
) -> Layer:
    """A convolution without bias, padded to keep ceil(side / stride) pixels, its BatchNorm, and a ReLU6."""
    result = ceil(side / stride)
    weights = inputs // groups * outputs * kernel**2
    padded = side + max((result - 1) * stride + kernel - side, 0)
    pixels = result**2 * outputs
    kept = inputs * padded**2 + pixels + 2 * outputs + relu * pixels  # two numbers a channel: mean and deviation
    return Layer(name, weights + 2 * outputs, 2 * result**2 * weights, kept)
