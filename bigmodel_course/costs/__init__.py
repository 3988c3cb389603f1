"""What a model costs: parameters, FLOPs, bytes and seconds.  Pure arithmetic, no tensors."""

from bigmodel_course.costs.layers import (
    GPTConfig,
    Layer,
    conv2d,
    gpt,
    lenet_300_100,
    linear,
    mlp,
    small_cnn,
    total,
    training_flops,
)
from bigmodel_course.costs.optimization import (
    batch_variance,
    bias_correction,
    gradient_descent_rate,
    heavy_ball_rate,
    noise_scale,
    sgd_noise_floor,
    stability_limit,
    steps_at_batch,
    steps_to_reach,
)
from bigmodel_course.costs.training import optimizer_bytes, optimizer_step_bytes, seconds, training_bytes

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
