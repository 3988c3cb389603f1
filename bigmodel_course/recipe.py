"""The course's digit model, trained the way that lesson 16 derives, so that every lesson starts from the same one."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bigmodel_course.data import Dataset, digits, split
from bigmodel_course.models import MLP, digit_model
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import cosine
from bigmodel_course.training import History, fit

__all__ = ["digit_parts", "train_digits", "trained_digit_model"]

BATCH = 32


def digit_parts() -> tuple[Dataset, Dataset, Dataset]:
    """scikit-learn's digits as training, validation and test part: 1,078, 360 and 359 pictures, classes balanced."""
    return split(digits(), (0.6, 0.2, 0.2), seed=0)


def train_digits(model: nn.Module, train: Dataset, *, epochs: int = 20, lr: float = 0.01, **options: Any) -> History:
    """Train a classifier of digits in place: AdamW, batches of 32, the rate on half a cosine from `lr` to 0.

    `options` go to `training.fit`.
    """
    steps = epochs * -(-len(train) // BATCH)
    optimizer = Optimizer(model.parameters(), AdamW(), lr=cosine(lr, total=steps))
    settings = {"epochs": epochs, "batch_size": BATCH, "seed": 0, "progress": False} | options
    return fit(model, optimizer, cross_entropy, train, **settings)


def trained_digit_model() -> MLP:
    """The digit model of every lesson: 64-128-10, 9,610 parameters, about 98 % of the test pictures right."""
    model = digit_model(generator=torch.Generator().manual_seed(0))
    train_digits(model, digit_parts()[0])
    return model.eval()
