"""The training loop, written once: train, measure, stop early, and go on after a crash as if there had been none.

`fit` goes through epochs and batches, `_backward` through the pieces of a batch.  Where a run stands is one dataclass,
`_Run`: with the states of model, optimizer and generators, it is all that a checkpoint needs to hold.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from bigmodel_course.checkpoint import Checkpoints
from bigmodel_course.data import Dataset, batches

__all__ = ["History", "Score", "clip_gradients_", "evaluate", "fit"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class History:
    """What a run measured: `loss` of each step, and per epoch the means over the training and validation examples.

    Training means are taken on the way, each batch before its step; accuracies stay empty where y holds no labels.
    `best_epoch`, counted from 0, is that of the lowest validation loss.
    """

    loss: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    best_epoch: int | None = None


class Score(NamedTuple):
    """The mean loss of an example, and the share of labels that are right (None where y holds no labels)."""

    loss: float
    accuracy: float | None


@dataclass
class _Sums:
    """Sums over the examples seen so far."""

    loss: float = 0.0
    examples: int = 0
    right: int = 0
    labels: int = 0

    def add(self, loss: float, scores: Tensor, y: Tensor) -> None:
        self.loss += loss * len(y)
        self.examples += len(y)
        if not y.is_floating_point() and scores.shape[:-1] == y.shape:
            self.right += (scores.argmax(-1) == y).sum().item()
            self.labels += y.numel()

    def score(self) -> Score:
        return Score(self.loss / self.examples, self.right / self.labels if self.labels else None)


@dataclass
class _Run:
    """Where a run stands."""

    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    step: int = 0  # steps done in all
    sums: _Sums = field(default_factory=_Sums)  # of this epoch
    history: History = field(default_factory=History)
    stale: int = 0  # epochs since the best one
    best: dict[str, Any] | None = None  # the weights of the best one


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    train: Dataset,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    validation: Dataset | None = None,
    schedule: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    patience: int | None = None,
    augment: Callable[[Tensor, Generator], Tensor] | None = None,
    generators: Sequence[Generator] = (),
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place and in train mode: `epochs` passes over `train`, one step of `optimizer` for each batch.

    What is learned: `loss(model(x), y)` is the mean over the examples given.  `seed` fixes their order and what
    `augment(x, generator)` draws for a batch's x.
    How it steps: `schedule(step)`, from step 0, sets the learning rate of an optimizer without a schedule of its own;
    `clip_norm` bounds the gradient's norm; `accumulate` runs a batch in so many pieces, one after the other, which
    takes less memory and gives the same gradient.
    When it ends: with `patience`, once the validation loss has not fallen for so many epochs; the model then has the
    weights of the best epoch.
    What survives a crash: called again with the same arguments, a run that was killed goes on from the last of its
    `checkpoints` to bitwise the same weights.  Only `epochs` may grow.  Name in `generators` those that layers own.

    ValueError for arguments that do not fit together; FloatingPointError when the loss is NaN or infinite.
    """
    counts = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "patience": patience}
    _check(counts, clip_norm, optimizer, schedule, validation)
    own = torch.Generator().manual_seed(seed)
    settings = {"seed": seed, "batch_size": batch_size, "accumulate": accumulate, "examples": len(train)}
    parts = (model, optimizer, (own, *generators))
    run = _resume(checkpoints, settings, *parts) or _Run()
    step = _Step(model, optimizer, loss, schedule, clip_norm, accumulate)

    def save() -> None:
        checkpoints.save(run.step, _state(run, settings, *parts))

    model.train()
    with _bar(epochs * math.ceil(len(train) / batch_size), run.step, progress) as bar:
        while run.epoch < epochs and (patience is None or run.stale < patience):
            for batch in islice(batches(train, batch_size, seed=seed, epoch=run.epoch), run.batch, None):
                step.take(replace(batch, x=augment(batch.x, own)) if augment else batch, run)
                bar.update()
                bar.set_postfix(epoch=run.epoch, loss=f"{run.history.loss[-1]:.3f}", refresh=False)
                if checkpoints and checkpoints.every and run.step % checkpoints.every == 0:
                    save()
            _end_epoch(run, model, None if validation is None else evaluate(model, loss, validation), patience)
            if checkpoints:
                save()
    if patience and run.best:
        model.load_state_dict(run.best)
    return run.history


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, dataset: Dataset, *, batch_size: int = 1024) -> Score:
    """Mean loss and accuracy over a data set, without gradients and in eval mode; then each layer has its mode back."""
    modes = [(layer, layer.training) for layer in model.modules()]  # a frozen layer may already be in eval mode
    sums = _Sums()
    try:
        model.eval()
        for batch in batches(dataset, batch_size, seed=0, epoch=0, shuffle=False):
            scores = model(batch.x)
            sums.add(loss(scores, batch.y).item(), scores, batch.y)
    finally:
        for layer, mode in modes:
            layer.training = mode
    return sums.score()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by one factor so that their joint norm is at most `max_norm`; return the norm as it was.

    max_norm / (norm + 1e-6), where that is below 1, as torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013, arXiv
    1211.5063).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor)
    return norm


@dataclass(frozen=True)
class _Step:
    """One step of the optimizer, and what shapes it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    schedule: Callable[[int], float] | None
    clip_norm: float | None
    accumulate: int

    def take(self, batch: Dataset, run: _Run) -> None:
        if self.schedule:
            _set_rate(self.optimizer, self.schedule(run.step))
        self.optimizer.zero_grad()
        run.history.loss.append(self.backward(batch, run))
        if self.clip_norm is not None:
            clip_gradients_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        run.batch, run.step = run.batch + 1, run.step + 1

    def backward(self, batch: Dataset, run: _Run) -> float:
        """Add up the gradient of the batch's mean loss, piece by piece, and return that loss."""
        total, cuts = 0.0, [len(batch) * i // self.accumulate for i in range(self.accumulate + 1)]
        for piece in [batch[a:b] for a, b in pairwise(cuts) if a < b]:
            scores = self.model(piece.x)
            loss = self.loss(scores, piece.y)
            share = len(piece) / len(batch)  # not 1 / accumulate: pieces may differ in size
            if not math.isfinite(value := loss.item()):
                raise FloatingPointError(
                    f"the loss is {value} in epoch {run.epoch}, step {run.step} (both counted from 0), and that step "
                    "was not taken: try a lower learning rate, clip_norm=1.0, or data.clean if the data are not finite"
                )
            (loss * share).backward()
            run.sums.add(value, scores.detach(), piece.y)
            total += value * share
        return total


def _end_epoch(run: _Run, model: nn.Module, score: Score | None, patience: int | None) -> None:
    """Write the epoch into the history, and keep the weights if they are the best so far."""
    history = run.history
    _record(run.sums.score(), history.train_loss, history.train_accuracy)
    if score:
        better = score.loss < min(history.validation_loss, default=math.inf)
        _record(score, history.validation_loss, history.validation_accuracy)
        run.stale = 0 if better else run.stale + 1
        if better:
            history.best_epoch = run.epoch
            run.best = copy.deepcopy(model.state_dict()) if patience else None
    run.epoch, run.batch, run.sums = run.epoch + 1, 0, _Sums()


def _record(score: Score, losses: list[float], accuracies: list[float]) -> None:
    losses.append(score.loss)
    if score.accuracy is not None:
        accuracies.append(score.accuracy)


def _state(run: _Run, settings: dict, model: nn.Module, optimizer: Any, generators: Sequence[Generator]) -> dict:
    """All that the run needs to go on: plain data, for `checkpoint.save`."""
    return {
        "settings": settings,
        "run": vars(run) | {"sums": vars(run.sums), "history": vars(run.history)},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),  # nn.Dropout draws from the global one
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [g.get_state() for g in generators],
    }


def _resume(
    checkpoints: Checkpoints | None, settings: dict, model: nn.Module, optimizer: Any, generators: Sequence[Generator]
) -> _Run | None:
    """Put everything back where the last checkpoint has it; None where there is none."""
    latest = checkpoints.latest() if checkpoints else None
    if latest is None:
        return None
    _, state = latest
    if state["settings"] != settings:
        raise ValueError(
            f"checkpoints hold a run with {state['settings']}, got {settings}: give each run its own folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
    run = state["run"]
    return _Run(**run | {"sums": _Sums(**run["sums"]), "history": History(**run["history"])})


def _bar(total: int, done: int, progress: bool) -> tqdm:
    """A progress bar in steps.  `disable` is passed only when asked for, so that TQDM_DISABLE=1 keeps its say."""
    return tqdm(total=total, initial=done, unit="step", **({} if progress else {"disable": True}))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _check(counts: dict[str, int | None], clip_norm: Any, optimizer: Any, schedule: Any, validation: Any) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, got {clip_norm}")
    if counts["patience"] and validation is None:
        raise ValueError("patience needs a validation set to watch, got validation=None")
    if schedule and any(group.get("schedule") for group in optimizer.param_groups):
        raise ValueError("schedule is given twice, to fit and to the optimizer: leave one out")
