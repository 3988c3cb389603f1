"""What a compressed model learns from: a teacher, copies of the images, and what the teacher says of each.

Both are made once and serve many students: a student's step is then a look-up, cheaper than running the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_course.data import Dataset, rotate, shift
from bigmodel_course.models import SmallCNN
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import one_cycle

__all__ = ["Lessons", "lessons", "train_teacher"]


@dataclass(frozen=True, eq=False)
class Lessons:
    """What a student learns from: `x` uint8 [copies, N, D] (0 … 255 for 0 … 1), `y` [N], and a teacher's `scores`."""

    x: Tensor
    y: Tensor
    scores: Tensor | None = None  # [copies, N, classes]


@torch.no_grad()
def lessons(train: Dataset, *, copies: int = 1, teacher: nn.Module | None = None, seed: int = 0) -> Lessons:
    """`copies` of `train` (images [N, side, side]), all but the first turned and shifted, and `teacher`'s scores."""
    if copies < 1 or train.x.ndim != 3:
        raise ValueError(f"need copies >= 1 of images [N, side, side], got {copies=} and {list(train.x.shape)}")
    rng = torch.Generator().manual_seed(seed)
    side, several, scores = train.x.shape[-1], [], []
    for copy in range(copies):
        x = shift(rotate(train.x, 10, generator=rng), side // 28, generator=rng) if copy else train.x
        several.append((x * 255).round().to(torch.uint8))
        if teacher:
            scores.append(torch.cat([teacher(part.float() / 255) for part in several[-1].split(500)]))
    return Lessons(torch.stack(several).flatten(2), train.y, torch.stack(scores) if teacher else None)


def train_teacher(
    train: Dataset, *, epochs: int = 14, seed: int = 0, channels: Sequence[int] = (20, 40, 80)
) -> SmallCNN:
    """A small CNN that has learned `train` (images [N, side, side]), shifted and turned afresh in each epoch."""
    rng = torch.Generator().manual_seed(seed)
    side = train.x.shape[-1]
    model = SmallCNN(side, channels, generator=rng).to(memory_format=torch.channels_last)
    steps = epochs * (len(train) // 128)
    optimizer = Optimizer(model.parameters(), AdamW(weight_decay=0.02), one_cycle(3e-3, steps, pct_start=0.2))
    for _ in range(epochs):
        x = shift(rotate(train.x, 12, generator=rng), side // 14, generator=rng)
        for rows in torch.randperm(len(train), generator=rng).split(128)[: len(train) // 128]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), train.y[rows]).backward()
            optimizer.step()
    return model.eval()
