"""Train a GPT on real text: on one process, several ranks, under torchrun or over several hosts, with one command.

    python -m bigmodel_course.train --size 124M --steps 1000 --checkpoints runs/124m
    torchrun --nproc-per-node 2 --max-restarts 3 -m bigmodel_course.train --size 124M --checkpoints runs/124m

A run that finds a checkpoint in its folder goes on from there, on as many ranks as there are now.  With the same number
of ranks it ends in the same bits as a run that was never disturbed.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigmodel_course import corpus
from bigmodel_course.distributed.launch import device, launch
from bigmodel_course.distributed.sharded import Sharded
from bigmodel_course.distributed.sharded_checkpoint import load_sharded, read_whole, save_sharded
from bigmodel_course.growth import grow
from bigmodel_course.loss_scale import LossScale
from bigmodel_course.models import GPT, GPT_SIZES, GPTConfig
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import warmup_cosine

__all__ = ["SIZES", "Settings", "main", "parser", "recompute_blocks_", "train"]

# GPT-2's 124M spends 39M on vectors for 50,257 tokens.  Here a token is a byte: all parameters go into the blocks.
SIZES = GPT_SIZES | {
    "124M-bytes": GPTConfig(layers=12, heads=16, width=928, context=256),
    "0.7M": GPTConfig(layers=4, heads=2, width=116, context=256),  # it can grow into the other
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Settings:
    """What a run is: its results depend on these and on the number of ranks.

    `batch` sequences of `length` tokens a step, all ranks together, in `accumulate` parts; `stage` is ZeRO's;
    `recompute` keeps each block's input only; `grow_from` begins with what a smaller run learned, from its folder of
    checkpoints; a checkpoint every `save_every` steps into `checkpoints`, a line of JSON every step into `journal`.
    """

    size: str = "1M"
    steps: int = 100
    batch: int = 8
    length: int = 128
    lr: float = 1e-3
    warmup: int = 10
    clip_norm: float = 1.0
    seed: int = 0
    stage: int = 1
    accumulate: int = 1
    recompute: bool = False
    precision: str = "fp32"
    text: str = "data/docstrings.bin"
    grow_from: str | None = None
    checkpoints: str | None = None
    save_every: int = 50
    journal: str | None = None  # not `log`: torchrun would take --log for an option of its own, cut short

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("steps", "batch", "length", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.warmup < self.steps:
            raise ValueError(f"warmup must be between 0 and steps = {self.steps}, got {self.warmup}")
        if self.length > SIZES[self.size].context:
            raise ValueError(f"length must be at most {SIZES[self.size].context}, the context, got {self.length}")


def recompute_blocks_(model: GPT) -> None:
    """Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): each block keeps its input and runs twice."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def train(
    settings: Settings, *, stop_after: int | None = None, report: Callable[[int, float], None] | None = None
) -> dict[str, float]:
    """Run inside a rank: train to the end and return {"step", "loss", "held_out", "bigram"}, the same on every rank.

    `stop_after` ends the run early, after that step and a checkpoint; `report(step, loss)` is called by rank 0.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = settings.batch // (ranks * settings.accumulate)
    if share * ranks * settings.accumulate != settings.batch:
        parts = f"{ranks} * {settings.accumulate}"
        raise ValueError(f"batch must be a multiple of ranks * accumulate = {parts}, got {settings.batch}")
    tokens, held_out = corpus.split_tokens(_shared_text(Path(settings.text)))
    model, sharded = _built(settings)
    start, scale = _resume(settings, sharded)
    losses = _Log(settings, ranks, start, report)
    last = settings.steps if stop_after is None else min(stop_after, settings.steps)
    for step in range(start, last):
        inputs, targets = corpus.windows(tokens, settings.batch, settings.length, seed=settings.seed, step=step)
        mine = slice(rank * share * settings.accumulate, (rank + 1) * share * settings.accumulate)
        loss = _gradients(model, inputs[mine], targets[mine], settings, 1.0 if scale is None else scale.value)
        _step(sharded, settings.clip_norm, scale)
        losses.add(step + 1, loss)
        if settings.checkpoints and ((step + 1) % settings.save_every == 0 or step + 1 == last):
            save_sharded(settings.checkpoints, step + 1, sharded, extra=None if scale is None else asdict(scale))
    return {
        "step": last,
        "loss": losses.last,
        "held_out": _held_out_loss(model, held_out, settings),
        "bigram": corpus.bigram_loss(tokens, held_out),
    }


def _built(settings: Settings) -> tuple[GPT, Sharded]:
    """The model as a run without a checkpoint begins it, and its sharded optimizer."""
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.grow_from:
        model = grow(_small(settings.grow_from), SIZES[settings.size], generator=generator)
    else:
        model = GPT(SIZES[settings.size], generator=generator)
    if settings.recompute:
        recompute_blocks_(model)
    schedule = warmup_cosine(settings.lr, settings.warmup, settings.steps, floor=settings.lr / 10)
    sharded = Sharded(
        model.to(device()), lambda shards: Optimizer(shards, AdamW(beta2=0.95), schedule), stage=settings.stage
    )
    return model, sharded


def _small(folder: str) -> GPT:
    """The model in a folder of checkpoints; its size is told by its tensors."""
    _, state = read_whole(folder)
    width = state["tokens.weight"].shape[1]
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for config in SIZES.values():
        if (config.layers, config.width) == (layers, width):
            small = GPT(config, generator=torch.Generator())
            small.load_state_dict(state)
            return small
    raise ValueError(f"grow_from must hold one of the sizes {', '.join(SIZES)}, got {layers} layers of width {width}")


def _step(sharded: Sharded, clip_norm: float, scale: LossScale | None) -> None:
    """One step; with a scale, none where a gradient has overflowed on any rank."""
    if scale is None:
        sharded.step(clip_norm=clip_norm)
        return
    for bucket in sharded.buckets:
        bucket.reduce()
    finite = scale.unscale_([b.shard.grad for b in sharded.buckets if b.shard.grad is not None], sharded.group)
    if finite:
        sharded.step(clip_norm=clip_norm)
    else:
        sharded.optimizer.zero_grad(set_to_none=True)
    scale.update(finite)


def _gradients(model: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings, scale: float) -> float:
    """Backward through this rank's share of the batch, part by part, `scale` times; its mean loss over all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=device())
    parts = zip(inputs.chunk(settings.accumulate), targets.chunk(settings.accumulate), strict=True)
    for x_BT, y_BT in parts:
        with _autocast(settings):
            loss = _cross_entropy(model, x_BT, y_BT) / settings.accumulate
        (loss * scale).backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _cross_entropy(model: nn.Module, x_BT: Tensor, y_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(x_BT.to(device())).flatten(0, 1).float(), y_BT.to(device()).flatten())


def _autocast(settings: Settings) -> AbstractContextManager:
    kind = PRECISIONS[settings.precision]
    return nullcontext() if kind is None else torch.autocast(device().type, kind)


@torch.no_grad()
def _held_out_loss(model: nn.Module, held_out: Tensor, settings: Settings, *, count: int = 16) -> float:
    """Mean loss on `count` windows of the held-out text, in nats a token."""
    x_BT, y_BT = corpus.windows(held_out, count, settings.length, seed=0, step=0)
    with _autocast(settings):
        return _cross_entropy(model, x_BT, y_BT).item()


def _shared_text(path: Path) -> Tensor:
    """The tokens; rank 0 writes them where they are missing."""
    if dist.get_rank() == 0 and not path.is_file():
        corpus.write_tokens(path, corpus.docstrings())
    dist.barrier()
    return corpus.read_tokens(path)


def _resume(settings: Settings, sharded: Sharded) -> tuple[int, LossScale | None]:
    """The step to go on from, and the loss scale of fp16, from the newest checkpoint where there is one."""
    step, extra = (settings.checkpoints and load_sharded(settings.checkpoints, sharded)) or (0, None)
    return step, LossScale(**(extra or {})) if settings.precision == "fp16" else None


class _Log:
    """Rank 0's record: a line of JSON that says what runs, then one a step."""

    def __init__(self, settings: Settings, ranks: int, start: int, report: Callable[[int, float], None] | None):
        self.path = Path(settings.journal) if settings.journal and dist.get_rank() == 0 else None
        self.report = report if dist.get_rank() == 0 else None
        self.last, self.begun = float("nan"), perf_counter()
        self._write({"settings": asdict(settings), "ranks": ranks, "from_step": start, **_versions()})

    def add(self, step: int, loss: float) -> None:
        self.last = loss
        self._write({"step": step, "loss": loss, "seconds": perf_counter() - self.begun})
        if self.report:
            self.report(step, loss)

    def _write(self, line: dict) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "device": device().type}


def parser() -> argparse.ArgumentParser:
    """Every setting as an option, and how many processes with how many threads."""
    found = argparse.ArgumentParser(prog="python -m bigmodel_course.train", description=__doc__.splitlines()[0])
    for name, value in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.add_argument(option, action="store_true")
        else:
            found.add_argument(option, type=str if value is None else type(value), default=value)
    found.add_argument("--ranks", type=int, default=None, help="processes; under torchrun as many as it started")
    found.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command; rank 0 prints the result as one line of JSON."""
    options = parser()
    wanted = vars(options.parse_args(arguments))
    ranks, threads = wanted.pop("ranks"), wanted.pop("threads")
    try:
        settings = Settings(**wanted)
    except ValueError as refusal:
        options.error(str(refusal))
    _run(settings, ranks, threads)


def _run(settings: Settings, ranks: int | None, threads: int) -> None:
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 1))
    result = launch(train, ranks, settings, timeout=WEEK, threads=threads)[0]
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
