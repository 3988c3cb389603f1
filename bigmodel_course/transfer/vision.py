"""EfficientNet-Lite0 in plain torch, with the names of its published weights, and cut wherever a lesson wants.

    stem -> 16 blocks -> head convolution -> mean over the pixels -> linear layer

A block widens the channels, filters each one by itself, and narrows them again (Sandler et al. 2018, arXiv 1801.04381);
the Lite variant has ReLU6 and no squeeze-and-excitation (Tan & Le 2019, arXiv 1905.11946, and its Lite release).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bigmodel_course.costs import LITE0, BlockSpec
from bigmodel_course.data import Dataset
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import cosine
from bigmodel_course.training import fit
from bigmodel_course.transfer import weights
from bigmodel_course.transfer.rendered import font_letters

__all__ = ["Cuts", "EfficientNetLite", "Start", "Trunk", "as_input", "network_start", "train_start"]

# What is trained here where no pretrained weights are: five blocks, 32 pixels, letters.
SMALL = (BlockSpec(1, 3, 1, 1, 16), BlockSpec(2, 3, 2, 4, 24), BlockSpec(2, 3, 2, 4, 40))


class SamePad(nn.Conv2d):
    """A convolution padded as TensorFlow pads: the odd pixel comes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        down, right = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        if down or right:
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return super().forward(x)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.utils.skip_init(SamePad, inputs, outputs, kernel, stride=stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Widen, filter each channel, narrow; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, widen: int):
        super().__init__()
        wide = inputs * widen
        if widen > 1:
            self._expand_conv, self._bn0 = _conv(inputs, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, outputs, 1), _norm(outputs)
        self.widens, self.adds = widen > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, or another stack of such blocks: x [N, 3, H, W] from `as_input` -> scores [N, classes].

    Filled from the generator: convolutions by He's rule for their outputs, as in the paper's code, the last layer as
    nn.Linear.  The regularisers of the original (dropout, dropped blocks) are left out.
    """

    def __init__(
        self,
        classes: int = 1000,
        *,
        generator: Generator,
        blocks: Sequence[BlockSpec] = LITE0,
        stem: int = 32,
        width: int = 1280,
    ):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, stem, 3, 2), _norm(stem)
        self._blocks, inputs = nn.ModuleList(), stem
        for spec in blocks:
            for i in range(spec.repeats):
                self._blocks.append(Block(inputs, spec.channels, spec.kernel, 1 if i else spec.stride, spec.widen))
                inputs = spec.channels
        self._conv_head, self._bn1 = _conv(inputs, width, 1), _norm(width)
        self._fc = nn.utils.skip_init(nn.Linear, width, classes)
        self._fill_(generator)

    @torch.no_grad()
    def _fill_(self, generator: Generator) -> None:
        for layer in self.modules():
            if isinstance(layer, SamePad):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        bound = self._fc.in_features**-0.5
        for p in self._fc.parameters():
            p.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (logits) of each class."""
        return self._fc(self.maps(x)[-1].mean((2, 3)))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The pictures inside, [N, channels, height, width]: after the stem, each block, and the head convolution."""
        found = [F.relu6(self._bn0(self._conv_stem(x)))]
        for block in self._blocks:
            found.append(block(found[-1]))
        return [*found, F.relu6(self._bn1(self._conv_head(found[-1])))]

    def stages(self) -> list[nn.Module]:
        """From input to output: stem, each block, head convolution, linear layer."""
        stem, head = (nn.ModuleList(pair) for pair in ((self._conv_stem, self._bn0), (self._conv_head, self._bn1)))
        return [stem, *self._blocks, head, self._fc]


class Trunk(nn.Module):
    """The network up to a cut: x -> the means of each channel over `grid` x `grid` regions, [N, channels * grid**2].

    `blocks`: after how many blocks to cut; None keeps all and the head convolution.  Layers are shared with `network`,
    and what is behind the cut is not there, so it costs nothing.
    """

    def __init__(self, network: EfficientNetLite, blocks: int | None = None, *, grid: int = 1):
        super().__init__()
        most = len(network._blocks)
        if grid < 1 or (blocks is not None and not 0 <= blocks <= most):
            raise ValueError(f"need grid >= 1 and blocks from 0 to {most}, or None for all, got {grid=}, {blocks=}")
        parts = [network._conv_stem, network._bn0, nn.ReLU6(), *network._blocks[:blocks]]
        parts += [network._conv_head, network._bn1, nn.ReLU6()] if blocks is None else []
        self.layers, self.pool = nn.Sequential(*parts), nn.AdaptiveAvgPool2d(grid)

    def forward(self, x: Tensor) -> Tensor:
        """The means."""
        return self.pool(self.layers(x)).flatten(1)


class Cuts(nn.Module):
    """What `Trunk` gives at every cut, from one pass: x -> [N, sum of `widths`], to be split by `widths`."""

    def __init__(self, network: EfficientNetLite, *, grid: int = 1):
        super().__init__()
        self.network, self.pool = network, nn.AdaptiveAvgPool2d(grid)
        norms = [network._bn0, *(block._bn2 for block in network._blocks), network._bn1]
        self.widths = [norm.num_features * grid**2 for norm in norms]

    def forward(self, x: Tensor) -> Tensor:
        """The means at all cuts, side by side."""
        return torch.cat([self.pool(found).flatten(1) for found in self.network.maps(x)], 1)


class Start(NamedTuple):
    """What a lesson starts from; `pretrained` says whether the weights came from a package."""

    network: EfficientNetLite
    pretrained: bool
    name: str


def network_start(*, seed: int = 0) -> Start:
    """EfficientNet-Lite0 with ImageNet weights where their package is, else a small one that is trained here.

    ValueError when the package is there and its file is not the published one.
    """
    if weights.find("efficientnet-lite0") is None:
        return train_start(seed=seed)
    network = EfficientNetLite(generator=torch.Generator().manual_seed(seed))
    weights.load_into_(network, weights.read("efficientnet-lite0"))
    return Start(network.eval(), True, "EfficientNet-Lite0")


def train_start(*, seed: int = 0, count: int = 2600, epochs: int = 6) -> Start:
    """A network of the same code with five blocks, which learns to read letters drawn in two colours, in seconds."""
    generator = torch.Generator().manual_seed(seed)
    letters = font_letters(count, generator=generator)
    ink, paper = torch.rand(2, count, 3, 1, 1, generator=generator)
    data = Dataset(as_input(paper + (ink - paper) * letters.x[:, None], 32), letters.y)
    network = EfficientNetLite(26, generator=generator, blocks=SMALL, stem=16, width=160)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # a few hundred steps are too few for 0.01
    optimizer = Optimizer(network.parameters(), AdamW(), lr=cosine(0.005, total=epochs * -(-count // 64)))
    fit(network, optimizer, F.cross_entropy, data, epochs=epochs, batch_size=64, seed=seed, progress=False)
    return Start(network.eval(), False, "trained here")


def as_input(pictures: Tensor, side: int) -> Tensor:
    """Pictures as EfficientNet-Lite was trained to see them: three channels, `side` x `side`, (value - 127) / 128.

    `pictures`: [N, H, W] or [N, C, H, W] with C = 1 or 3, bytes from 0 to 255 or floats from 0 to 1, black 0.
    """
    x = pictures[:, None] if pictures.ndim == 3 else pictures
    if x.ndim != 4 or x.shape[1] not in (1, 3) or side < 1:
        shape = list(pictures.shape)
        raise ValueError(f"need pictures [N, H, W] or [N, 1 or 3, H, W] and side >= 1, got {shape}, {side=}")
    if not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise TypeError(f"pictures must hold bytes (uint8) or floats from 0 to 1, got {x.dtype}")
    value = x.float() if x.dtype == torch.uint8 else 255 * x.float()
    if value.numel() and not -0.01 <= value.min() <= value.max() <= 255.01:
        raise ValueError(f"float pictures must lie between 0 and 1, got {x.min().item():g} to {x.max().item():g}")
    smaller = side < max(x.shape[2:])  # then every pixel counts, or thin lines vanish
    value = F.interpolate(value, size=(side, side), mode="bilinear", antialias=smaller, align_corners=False)
    return (value.expand(-1, 3, -1, -1) - 127) / 128
