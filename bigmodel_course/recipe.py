"""The course's two small models, trained in one way, so that every lesson starts from the same ones.

The digit model is trained the way that lesson 16 derives; the byte GPT predicts the next byte of Python's docstrings.
"""

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bigmodel_course.cache import kept
from bigmodel_course.corpus import docstrings, split_tokens, windows
from bigmodel_course.data import Dataset, digits, split
from bigmodel_course.models import GPT, MLP, GPTConfig, digit_model
from bigmodel_course.optim import AdamW, Muon, Optimizer
from bigmodel_course.schedules import cosine, warmup_cosine
from bigmodel_course.training import History, fit

__all__ = ["byte_gpt_parts", "digit_parts", "train_byte_gpt", "train_digits", "trained_byte_gpt", "trained_digit_model"]

BATCH = 32
BYTE_GPT = GPTConfig(layers=2, heads=2, width=64, context=64)
BYTE_GPT_STEPS = 700


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


def byte_gpt_parts() -> tuple[Tensor, Tensor]:
    """Python's docstrings as training tokens and held-out ones (5 %), a byte each, uint8.

    They are read once and kept under $BIGMODEL_CACHE, for each Python apart.
    """
    tokens = kept("docstrings", sys.version, lambda: torch.tensor(list(docstrings().encode()), dtype=torch.uint8))
    return split_tokens(tokens)


def train_byte_gpt(model: GPT, train: Tensor, *, steps: int = BYTE_GPT_STEPS) -> None:
    """Train a byte GPT in place: 8 windows of its context a step, Muon for the blocks' matrices, AdamW for the rest.

    On one thread whatever is set, so that two threads give the same weights as one.
    """
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is block for block in blocks)]
    groups = [
        {"params": blocks, "rule": Muon(), "lr": warmup_cosine(0.02, 10, steps)},
        {"params": rest, "rule": AdamW(beta2=0.99, weight_decay=0.0), "lr": warmup_cosine(0.01, 10, steps)},
    ]
    optimizer = Optimizer(groups, AdamW(), lr=0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(steps):
            x, y = windows(train, 8, model.config.context, seed=0, step=step)
            optimizer.zero_grad()
            cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)


def trained_byte_gpt() -> GPT:
    """The small GPT of lessons 51 to 54: 120,576 parameters, 64 bytes of context, in eval mode.

    Trained in about 8 seconds, well below the bigram baseline; then kept under $BIGMODEL_CACHE, by the hash of its
    text, of its recipe and of torch's version.
    """
    train, _ = byte_gpt_parts()
    model = GPT(BYTE_GPT, generator=torch.Generator().manual_seed(0))

    def trained() -> dict[str, Tensor]:
        train_byte_gpt(model, train)
        return model.state_dict()

    text = hashlib.sha256(train.numpy()).hexdigest()
    model.load_state_dict(kept("byte-gpt", f"{torch.__version__} {BYTE_GPT} {BYTE_GPT_STEPS} {text}", trained))
    return model.eval()
