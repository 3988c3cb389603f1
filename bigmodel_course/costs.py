"""What a model costs: parameters, FLOPs, bytes and seconds.  Pure arithmetic, no tensors.

A multiply-add is 2 FLOPs, and only matrix products and convolutions are counted, as torch's FlopCounterMode does:
in a large model the rest (activation functions, norms, softmax) is small.  Whatever can be counted is a whole number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log, sqrt
from typing import NamedTuple

__all__ = [
    "GPTConfig",
    "Layer",
    "batch_variance",
    "bias_correction",
    "conv2d",
    "gpt",
    "gradient_descent_rate",
    "heavy_ball_rate",
    "lenet_300_100",
    "linear",
    "mlp",
    "noise_scale",
    "optimizer_bytes",
    "optimizer_step_bytes",
    "seconds",
    "sgd_noise_floor",
    "small_cnn",
    "stability_limit",
    "steps_at_batch",
    "steps_to_reach",
    "total",
    "training_bytes",
    "training_flops",
]

# How many numbers a rule remembers for each parameter, from one step to the next.
STATES = {"SGD": 0, "Momentum": 1, "HeavyBall": 1, "Adagrad": 1, "RMSProp": 1, "Lion": 1, "Muon": 1}
STATES |= {"Adam": 2, "AdamW": 2, "AMSGrad": 3}  # AMSGrad is Adam(amsgrad=True)


def _at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if value < low:
            raise ValueError(f"need {name} >= {low}, got {name}={value!r}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"need {name} > 0, got {name}={value!r}")


# Models: a list of layers


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
        _at_least(1, layers=self.layers, heads=self.heads, context=self.context, vocabulary=self.vocabulary)
        if self.width < 1 or self.width % self.heads:
            raise ValueError(f"need a width that the heads divide, got width={self.width} and heads={self.heads}")


def linear(inputs: int, outputs: int, *, rows: int = 1, bias: bool = True) -> Layer:
    """A fully connected layer that is applied to `rows` vectors; it keeps its input for the weight's gradient."""
    _at_least(1, inputs=inputs, outputs=outputs, rows=rows)
    weights = inputs * outputs
    return Layer(f"linear {inputs}-{outputs}", weights + outputs * bias, 2 * rows * weights, rows * inputs)


def conv2d(inputs: int, outputs: int, side: int, *, kernel: int = 3, stride: int = 1) -> Layer:
    """A convolution from `inputs` to `outputs` channels of a `side` x `side` image, padded by kernel // 2 (odd)."""
    _at_least(1, inputs=inputs, outputs=outputs, side=side, stride=stride)
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


# Training: bytes and seconds


def _states(rule: str) -> int:
    if rule not in STATES:
        raise ValueError(f"need a rule among {', '.join(STATES)}, got {rule=}")
    return STATES[rule]


def optimizer_bytes(parameters: int, rule: str, bytes_each: int = 4) -> int:
    """What the rule remembers: 0 for SGD, one number a parameter with momentum, two for Adam."""
    return _states(rule) * parameters * bytes_each


def training_bytes(parameters: int, rule: str, *, activations: int = 0, bytes_each: int = 4) -> int:
    """Weights, gradients, what the rule remembers, and `activations` numbers (batch * total(layers).activations)."""
    return (2 * parameters + activations) * bytes_each + optimizer_bytes(parameters, rule, bytes_each)


def optimizer_step_bytes(parameters: int, rule: str, bytes_each: int = 4) -> int:
    """The least traffic with memory of one step: read weight, gradient and states; write weight and states.

    For Adam 7 numbers, 28 bytes a parameter: no kernel is faster than that over the memory's bandwidth.
    """
    return (3 + 2 * _states(rule)) * parameters * bytes_each


def seconds(amount: float, rate: float) -> float:
    """Time for `amount` FLOPs (or bytes) at `rate` FLOPs (or bytes) a second."""
    _positive(rate=rate)
    return amount / rate


# Optimization: how many steps.  On a quadratic, kappa = largest / smallest curvature.


def gradient_descent_rate(kappa: float) -> float:
    """What each step leaves of the error at the best constant learning rate: (kappa - 1) / (kappa + 1)."""
    _at_least(1, kappa=kappa)
    return (kappa - 1) / (kappa + 1)


def heavy_ball_rate(kappa: float) -> float:
    """The same with momentum (Polyak 1964): (sqrt(kappa) - 1) / (sqrt(kappa) + 1).

    It is reached in the limit only: the error falls as step * rate**step.  The best momentum is rate**2.
    """
    _at_least(1, kappa=kappa)
    return gradient_descent_rate(sqrt(kappa))


def stability_limit(largest_eigenvalue: float) -> float:
    """The learning rate at which gradient descent on a quadratic stops converging: 2 / largest curvature."""
    _positive(largest_eigenvalue=largest_eigenvalue)
    return 2 / largest_eigenvalue


def steps_to_reach(rate: float, reduction: float) -> int:
    """The fewest steps after which rate**steps <= reduction (1e-6: a millionth of the first error)."""
    if not (0 <= rate < 1 and 0 < reduction <= 1):
        raise ValueError(f"need 0 <= rate < 1 and 0 < reduction <= 1, got {rate=} and {reduction=}")
    if rate == 0:
        return int(reduction < 1)
    return ceil(log(reduction) / log(rate) - 1e-9)  # rounding must not add a step


def bias_correction(beta: float, t: int) -> float:
    """The weight that has arrived in a running mean which began at 0, after `t` values: 1 - beta**t.

    Adam divides by it (Kingma & Ba 2015, section 3, arXiv 1412.6980).
    """
    if not (0 <= beta < 1 and t >= 1):
        raise ValueError(f"need 0 <= beta < 1 and t >= 1 (steps count from 1), got {beta=} and {t=}")
    return 1 - beta**t


def batch_variance(single: float, batch: int, population: int | None = None) -> float:
    """Variance of the mean of `batch` gradients, if one alone has variance `single`: single / batch.

    Drawn without replacement out of `population`, it is (population - batch) / (population - 1) times that:
    the whole data set has no noise at all.
    """
    _at_least(1, batch=batch)
    if population is None:
        return single / batch
    if batch > population:
        raise ValueError(f"need batch <= population, got {batch=} and {population=}")
    return single / batch * (population - batch) / max(population - 1, 1)


def noise_scale(trace: float, squared_norm: float) -> float:
    """The simple noise scale, near which the critical batch size lies: tr(Sigma) / |G|**2.

    `trace` sums the variances of one example's gradient, `squared_norm` is that of the mean gradient
    (McCandlish et al. 2018, section 2.2, arXiv 1812.06162).
    """
    _positive(squared_norm=squared_norm)
    return trace / squared_norm


def steps_at_batch(fewest: float, batch: int, noise: float) -> float:
    """Steps with `batch` examples each, if `fewest` suffice without noise: fewest * (1 + noise / batch).

    Far below the noise scale twice the batch takes half the steps; far above it, hardly fewer (same paper).
    """
    _at_least(1, batch=batch)
    return fewest * (1 + noise / batch)


def sgd_noise_floor(lr: float, curvature: float, variance: float) -> float:
    """The loss at which SGD stays on curvature * x**2 / 2, if the gradient's variance is `variance`.

    lr * variance / (2 * (2 - lr * curvature)), below the stability limit.
    """
    if not 0 < lr * curvature < 2:
        raise ValueError(f"need 0 < lr < 2 / curvature, got {lr=} and {curvature=}")
    return lr * variance / (2 * (2 - lr * curvature))
