"""A small training run with everything random in it, for tests that kill it and start it again."""

import os
import signal
from pathlib import Path

import torch
from torch import nn

from bigmodel_course import checkpoint
from bigmodel_course.data import Dataset, noise
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import warmup_cosine
from bigmodel_course.training import History, fit

STEPS = 30  # 5 epochs of 6 batches
OPTIMIZERS = {
    "course's AdamW": lambda params: Optimizer(params, AdamW(), lr=warmup_cosine(0.02, 4, STEPS)),
    "torch's Adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "torch's SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
}


class OwnDropout(nn.Module):
    """Dropout that draws from a generator of its own."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator) > 0.2) / 0.8 if self.training else x


def run(folder, *, optimizer="course's AdamW", every=1, epochs=5, damage=None, begun=None) -> tuple[nn.Module, History]:
    """Train, going on from the checkpoints in `folder`; write the final weights beside them.

    The file `begun` appears when everything is loaded and the training begins.
    """
    torch.set_num_threads(1)
    torch.manual_seed(3)
    own, drawn = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    data = Dataset(torch.rand(60, 1, 3, 3, generator=drawn), torch.arange(60) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
    model.extend([OwnDropout(own), nn.Linear(16, 3)])
    options = {"epochs": epochs, "batch_size": 8, "seed": 5, "accumulate": 2, "clip_norm": 0.5, "patience": 3}
    options |= {"augment": lambda x, g: noise(x, 0.1, generator=g), "generators": [own], "validation": data[48:]}
    options |= {"checkpoints": checkpoint.Checkpoints(folder, every=every), "progress": False}
    if damage:
        kill_at(*damage)
    if begun:
        Path(begun).touch()
    history = fit(model, OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss(), data[:48], **options)
    checkpoint.save(Path(folder) / "final.safetensors", {"model": model.state_dict(), "history": vars(history)})
    return model, history


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place: str, count: int) -> None:
    """Make this process kill itself the `count`-th time that saving a checkpoint comes to `place`."""
    left = count

    def now() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def before(function):
        return lambda *args, **options: die() if now() else function(*args, **options)

    def after(function):
        def call(*args, **options):
            result = function(*args, **options)
            return die() if now() else result

        return call

    content = checkpoint._content

    def half_written(state):
        whole = b"".join(content(state))
        yield whole[: len(whole) // 2]
        if now():
            os.sync()  # half of it has reached the disk
            die()
        yield whole[len(whole) // 2 :]

    owner, name, changed = {
        "while packing": (checkpoint, "_content", before(content)),
        "in the middle of writing": (checkpoint, "_content", half_written),
        "before the bytes are safe": (os, "fsync", before(os.fsync)),
        "before the new name": (os, "replace", before(os.replace)),
        "after the new name": (os, "replace", after(os.replace)),
        "before an old one goes": (Path, "unlink", before(Path.unlink)),
        "after an old one went": (Path, "unlink", after(Path.unlink)),
    }[place]
    setattr(owner, name, changed)
