"""How the glosses are divided and how each way of tuning trains: the same in lesson 32 and in its benchmark.

The numbers were chosen on the validation part, with seeds 0, 1 and 2; then the test part was measured.
"""

import copy

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from bigmodel_course.data import Dataset, split
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import warmup_cosine
from bigmodel_course.training import evaluate, fit
from bigmodel_course.transfer.encoder import Encoder, TextClassifier
from bigmodel_course.transfer.lora import inject_
from bigmodel_course.transfer.text import Start, encode, glosses

__all__ = ["RATES", "classifier", "few", "gloss_parts", "right", "tune_"]

LONGEST, EPOCHS, BATCH, RANK = 16, 5, 20, 4  # 16 tokens hold 95 % of the glosses whole
RATES = {"LoRA": 2e-3, "full": 1e-4, "random": 2e-4}  # the ways and their peak learning rates


def gloss_parts(tokenizer: Tokenizer) -> tuple[Dataset, Dataset, Dataset]:
    """The glosses as tokens: a pool to draw labels from, validation and test: 368, 246 and 614, balanced.

    Which gloss is where does not depend on the tokenizer.
    """
    sentences, labels = glosses()
    tokens = encode(tokenizer, sentences, longest=LONGEST)
    places = split(Dataset(torch.arange(len(labels)), labels, "glosses"), (0.3, 0.2, 0.5), seed=0)
    return tuple(Dataset(tokens[part.x], part.y, part.name) for part in places)


def few(pool: Dataset, each: int, *, seed: int) -> Dataset:
    """`each` examples of every class, drawn by `seed`."""
    shuffled = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    rows = [(shuffled.y == label).nonzero()[:, 0] for label in shuffled.y.unique()]
    fewest = min(map(len, rows))
    if not 1 <= each <= fewest:
        raise ValueError(f"each must be 1 to {fewest}, what the rarest class has, got {each}")
    return shuffled[torch.cat([one[:each] for one in rows])]


def classifier(start: Start, way: str, *, seed: int) -> TextClassifier:
    """A classifier of two classes, ready to train by one of `RATES`; `start` itself stays as it is."""
    if way not in RATES:
        raise ValueError(f"way must be one of {', '.join(RATES)}, got {way!r}")
    generator = torch.Generator().manual_seed(seed)
    fresh = way == "random"
    encoder = Encoder(start.encoder.config, generator=generator) if fresh else copy.deepcopy(start.encoder)
    model = TextClassifier(encoder, 2)
    if way == "LoRA":
        inject_(model, ["query", "value"], rank=RANK, generator=generator, also=["head"])
    return model


def tune_(model: nn.Module, train: Dataset, lr: float, *, seed: int, epochs: int = EPOCHS) -> Optimizer:
    """Train what is trainable with AdamW, the rate up to `lr` and down again; return the optimizer."""
    steps = epochs * -(-len(train) // BATCH)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer(learning, AdamW(), lr=warmup_cosine(lr, max(1, steps // 10), steps))
    settings = {"epochs": epochs, "batch_size": BATCH, "seed": seed, "progress": False}
    fit(model, optimizer, cross_entropy, train, **settings)
    return optimizer


def right(model: nn.Module, part: Dataset) -> float:
    """The share of right answers; sentences of equal length go together, which saves the padding."""
    order = (part.x != 0).sum(1).argsort(stable=True)
    return evaluate(model, cross_entropy, part[order], batch_size=64).accuracy
