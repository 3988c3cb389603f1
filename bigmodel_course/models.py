"""The models of the course: an MLP, LeNet-300-100, a small CNN and a GPT.

They know nothing of training or of parallelism.  All randomness comes from the generator passed in: the global random
state is neither read nor changed.  Build on the generator's device, move afterwards; built under
`torch.device("meta")`, a model has shapes but no memory.  What each costs is in `costs`, by the same names.

Shape suffixes: B batch, T tokens, C width of a token's vector, N heads, D width of a head, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from bigmodel_course.costs import GPTConfig

__all__ = ["GPT", "GPT_SIZES", "MLP", "Attention", "Block", "GPTConfig", "LeNet300100", "SmallCNN", "digit_model"]


def _empty(kind: type[nn.Module], *args: int, **options: object) -> nn.Module:
    """A layer whose parameters are not filled: torch's own filling would draw from the global random state."""
    return skip_init(kind, *args, **options, device=torch.get_default_device())


@torch.no_grad()
def _uniform_(layer: nn.Linear | nn.Conv2d, generator: Generator) -> nn.Module:
    """Fill as torch does by default: uniform within 1 / sqrt(inputs of one output), weight first."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(layer.weight[0].numel())
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def _linear(inputs: int, outputs: int, generator: Generator) -> nn.Module:
    return _uniform_(_empty(nn.Linear, inputs, outputs), generator)


class MLP(nn.Module):
    """Linear layers with ReLU between them: x [B, widths[0]] -> scores [B, widths[-1]].

    An image is flattened first.  Initialised as torch's nn.Linear.
    """

    def __init__(self, widths: Sequence[int], *, generator: Generator):
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"need at least two widths, all >= 1, got widths={tuple(widths)}")
        self.widths = tuple(widths)
        layers = [part for pair in pairwise(widths) for part in (_linear(*pair, generator), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU after the last

    def forward(self, x: Tensor) -> Tensor:
        """Scores (logits) of each class."""
        return self.layers(_flat(x, self.widths[0]))


def _flat(x: Tensor, numbers: int) -> Tensor:
    """`x` as [B, numbers]."""
    if x.ndim < 2 or math.prod(x.shape[1:]) != numbers:
        raise ValueError(f"need x with {numbers} numbers an example, [B, {numbers}] or an image, got {list(x.shape)}")
    return x.flatten(1)


class LeNet300100(MLP):
    """LeNet-300-100 for 28 x 28 images in 10 classes (LeCun et al. 1998): 266,610 parameters.

    The layers are the paper's; the activation is ReLU, as in later work on pruning.
    """

    def __init__(self, *, generator: Generator):
        super().__init__((784, 300, 100, 10), generator=generator)


def digit_model(*, generator: Generator) -> MLP:
    """The digit model that goes through the whole course: 8 x 8 pixels in, 10 classes out, 9,610 parameters."""
    return MLP((64, 128, 10), generator=generator)


class SmallCNN(nn.Module):
    """3 x 3 convolutions with ReLU, then a linear layer: x [B, 1, side, side] (or flat) -> scores [B, classes].

    Each convolution after the first halves the side by its stride: a max-pool would also keep 8-byte indices for the
    backward pass.  Initialised as torch's nn.Conv2d and nn.Linear.
    """

    def __init__(self, side: int = 8, channels: Sequence[int] = (16, 32), classes: int = 10, *, generator: Generator):
        super().__init__()
        if min(side, classes, len(channels), *channels) < 1:
            raise ValueError(f"need side, classes and channels >= 1, got {side=}, {classes=}, {channels=}")
        self.side = side
        layers, inputs, stride = [], 1, 1
        for outputs in channels:
            conv = _empty(nn.Conv2d, inputs, outputs, 3, stride=stride, padding=1)
            layers += [_uniform_(conv, generator), nn.ReLU()]
            inputs, side, stride = outputs, math.ceil(side / stride), 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), _linear(inputs * side**2, classes, generator))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (logits) of each class."""
        return self.layers(_flat(x, self.side**2).unflatten(1, (1, self.side, self.side)))


# From one that learns in a minute on one core to GPT-2's smallest, whose tokens are not bytes.
GPT_SIZES = {
    "1M": GPTConfig(layers=4, heads=4, width=144, context=256),
    "3M": GPTConfig(layers=4, heads=4, width=256, context=256),
    "10M": GPTConfig(layers=8, heads=8, width=320, context=256),
    "30M": GPTConfig(layers=6, heads=10, width=640, context=256),
    "124M": GPTConfig(layers=12, heads=12, width=768, context=1024, vocabulary=50257),
}


class Attention(nn.Module):
    """Causal self-attention: each token takes a weighted mean of what itself and the earlier ones offer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = _empty(nn.Linear, config.width, 3 * config.width)
        self.out = _empty(nn.Linear, config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Shapes stay: [B, T, C] -> [B, T, C]."""
        q_BNTD, k_BNTD, v_BNTD = (
            part_BTC.unflatten(2, (self.heads, -1)).transpose(1, 2) for part_BTC in self.qkv(x_BTC).chunk(3, dim=2)
        )
        mean_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True)
        return self.out(mean_BNTD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers with GELU, each added to what comes in; norms stand before them (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = _empty(nn.Linear, config.width, 4 * config.width)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's, within 5e-4 of the exact one
        self.down = _empty(nn.Linear, 4 * config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Shapes stay: [B, T, C] -> [B, T, C]."""
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        return x_BTC + self.down(self.gelu(self.up(self.norm2(x_BTC))))


class GPT(nn.Module):
    """Predicts each next token from those before it: tokens [B, T] (int64) -> scores [B, T, V].

    The shape is GPT-2's (Radford et al. 2019): pre-norm, learned positions, GELU; no dropout.
    """

    def __init__(self, config: GPTConfig, *, generator: Generator):
        super().__init__()
        self.config = config
        self.tokens = _empty(nn.Embedding, config.vocabulary, config.width)
        self.positions = _empty(nn.Embedding, config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # A tied head is no module of its own: moved from the meta device, two modules would end with two weights.
        self.head = None if config.tied else _empty(nn.Linear, config.width, config.vocabulary, bias=False)
        self.initialise_(generator)

    @torch.no_grad()
    def initialise_(self, generator: Generator) -> None:
        """Fill every parameter as GPT-2 does: normal with deviation 0.02, biases 0, norms 1.

        What is added to the stream, 2 * layers times, gets 0.02 / sqrt(2 * layers), so that the sum does not grow.
        """
        added = 0.02 / math.sqrt(2 * self.config.layers)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1.0)
            else:
                p.normal_(0.0, added if name.endswith(("out.weight", "down.weight")) else 0.02, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Scores (logits) of the token that follows each one."""
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] > self.config.context:
            raise ValueError(
                f"need tokens [B, T] with T <= context = {self.config.context}, got {list(tokens_BT.shape)}"
            )
        x_BTC = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        x_BTC = self.norm(x_BTC)
        return F.linear(x_BTC, self.tokens.weight) if self.head is None else self.head(x_BTC)
