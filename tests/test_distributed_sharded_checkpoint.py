"""A sharded checkpoint goes on bit for bit, on any number of ranks, and is whole or not there when ranks are killed."""

import functools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bigmodel_course import checkpoint
from bigmodel_course.checkpoint import CheckpointError
from bigmodel_course.distributed import sharded_checkpoint
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.sharded import Sharded
from bigmodel_course.distributed.sharded_checkpoint import load_sharded, read_whole, save_sharded
from bigmodel_course.models import MLP
from bigmodel_course.optim import AdamW, HeavyBall, Optimizer
from bigmodel_course.schedules import warmup_cosine

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest
verifies = pytest.mark.verifies
LONG = 200.0  # seconds; a busy machine is not a fault
RULES = {
    "course's AdamW": lambda shards: Optimizer(shards, AdamW(), lr=warmup_cosine(0.05, 2, 12)),
    "torch's Adam": lambda shards: torch.optim.Adam(shards, lr=0.05, amsgrad=True),
    "course's SGD with momentum": lambda shards: Optimizer(shards, HeavyBall(), lr=0.05),
}


class Net(nn.Module):
    """Tied and frozen weights, a buffer, and a unit with fewer numbers than ranks."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.body = nn.Sequential(
            MLP((5, 7, 7), generator=g), MLP((7, 7, 7), generator=g), nn.LayerNorm(7), MLP((7, 1), generator=g)
        )
        self.body[1].layers[2].weight = self.body[0].layers[2].weight
        self.body[1].layers[0].weight.requires_grad_(False)
        self.register_buffer("sum", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.sum += x.detach().sum()  # differs from rank to rank
        return self.body(x)


def make(rule="course's AdamW", stage=3, seed=0):
    model = Net(seed).double()
    return model, Sharded(model, RULES[rule], stage=stage)


def go_on(model, trainer, steps):
    """Steps on this rank's share of batches that depend on the step alone."""
    for step in steps:
        x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mine = x.tensor_split(dist.get_world_size())[dist.get_rank()]
        (model(mine) - mine.sum(1, keepdim=True)).square().mean().backward()
        trainer.step(clip_norm=1.0)


def saved_run(folder, rule="course's AdamW", stage=3):
    """Train 4 steps, save, train 3 more; the weights after both."""
    model, trainer = make(rule, stage)
    go_on(model, trainer, range(4))
    save_sharded(folder, 4, trainer, extra={"rank": dist.get_rank(), "seen": torch.arange(3)})
    middle = trainer.state_dict()
    go_on(model, trainer, range(4, 7))
    return middle, trainer.state_dict()


def resumed_run(folder, rule="course's AdamW", stage=3):
    model, trainer = make(rule, stage, seed=9)
    step, extra = load_sharded(folder, trainer)
    middle = trainer.state_dict()
    go_on(model, trainer, range(step, 7))
    return middle, trainer.state_dict(), extra["rank"]


def apart(got, want, *, without=()):
    assert got.keys() == want.keys()
    names = [name for name in want if not name.startswith(without)] if without else list(want)
    return max(float((got[name] - want[name]).abs().max()) for name in names)


@functools.cache
def four_ranks(folder, rule, stage):
    return launch(saved_run, 4, folder, rule, stage, timeout=LONG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of step 4 by four ranks: for each rule at stage 3, and for each stage with AdamW."""
    root = tmp_path_factory.mktemp("sharded")
    return {case: root / f"{i}" for i, case in enumerate([*((rule, 3) for rule in RULES), (next(iter(RULES)), 1)])}


@verifies("distributed.sharded_checkpoint.save_sharded", "distributed.sharded_checkpoint.load_sharded",
          kind="recovery", against="the run that was not interrupted, every bit of every rank's state",
          on="4 ranks, stages 1 and 3, three optimizers, tied, frozen, buffers, weights of another seed before loading",
          bound=0.0)  # fmt: skip
@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_as_many_ranks_go_on_bit_for_bit(case, folders, seen):
    (rule, stage), folder = list(folders.items())[case]
    first = four_ranks(folder, rule, stage)
    again = launch(resumed_run, 4, folder, rule, stage, timeout=LONG)
    for rank in range(4):
        assert again[rank][2] == rank  # each its own `extra`
        for want, got in zip(first[rank], again[rank], strict=False):
            seen(apart(got, want))


@verifies("distributed.sharded_checkpoint.save_sharded", "distributed.sharded_checkpoint.load_sharded",
          kind="recovery", against="the run that was not interrupted: weights as loaded (bitwise), and 3 steps later",
          on="4 ranks -> 2 -> 1 -> 3, each from the one before, also from stage 3 to 1; float64",
          bound=1e-12)  # fmt: skip
def test_another_number_of_ranks_goes_on(folders, tmp_path, seen):
    rule = next(iter(RULES))
    folder = folders[rule, 3]
    first = four_ranks(folder, rule, 3)[0]
    shutil.copytree(folder, tmp_path / "chain")

    def next_link(number):
        model, trainer = make(stage=number % 3 + 1, seed=9)
        step, extra = load_sharded(tmp_path / "chain", trainer)
        save_sharded(tmp_path / "chain", step, trainer, extra=extra)  # what these ranks have read
        loaded = trainer.state_dict()
        go_on(model, trainer, range(step, 7))
        return loaded, trainer.state_dict(), extra["rank"]

    for number in (2, 1, 3):
        for loaded, later, extra in launch(next_link, number, number, timeout=LONG):
            assert apart(loaded, first[0]) == 0.0 == extra  # with rank 0's buffers
            seen(apart(later, first[1], without="sum"))
    step, whole = read_whole(tmp_path / "chain")
    assert step == 4
    assert apart(whole, first[0]) == 0.0


@verifies("distributed.sharded_checkpoint.read_whole", kind="invariant", against="the state of the ranks' model",
          on="4 ranks, tied and frozen parameters, a buffer; loaded by a plain model", bound=0.0)  # fmt: skip
def test_one_process_reads_it_without_ranks(folders, seen):
    rule = next(iter(RULES))
    first = four_ranks(folders[rule, 3], rule, 3)[0]
    step, state = read_whole(folders[rule, 3])
    model = Net(seed=5).double()
    model.load_state_dict(state)
    seen(apart(model.state_dict(), first[0]))
    assert step == 4
    assert model.body[1].layers[2].weight is model.body[0].layers[2].weight


# Damage


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def other_save(folder):
    """A part of another save, whole in itself."""
    part, *_ = (path for path in files(folder) if "rank-1" in path.name)
    state = checkpoint.load(part)
    state["extra"] = "other"
    checkpoint.save(part, state)


DAMAGE = {
    "a part cut short": (lambda f: files(f)[2].write_bytes(files(f)[2].read_bytes()[:-9]), "rank-1-of-4.* damaged"),
    "a part with one bit changed": (lambda f: flip(files(f)[4]), "rank-3-of-4.* damaged"),
    "a part missing": (lambda f: files(f)[3].unlink(), "rank-2-of-4.* is missing"),
    "a part of another save": (other_save, "rank-1-of-4.* comes from another save"),
    "the index cut short": (
        lambda f: files(f)[0].write_bytes(files(f)[0].read_bytes()[:40]),
        "index.json is missing or",
    ),
    "the index with one bit changed": (lambda f: flip(files(f)[0], 60), "index.json is (damaged|missing or)"),
    "the index missing": (lambda f: files(f)[0].unlink(), "no finished checkpoint of step 4"),
    "another model": (None, "of another model or other units"),
    "another optimizer": (None, "rule"),
}


def refused(folders):
    """What each damaged folder says on this rank, and whether anything had changed."""
    answers = {}
    for name, folder in folders.items():
        rule = "course's SGD with momentum" if name == "another optimizer" else "course's AdamW"
        model, trainer = make(rule, seed=9)
        if name == "another model":
            model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).double()
            trainer = Sharded(model, RULES[rule], stage=3)
        go_on(model, trainer, range(1))
        before, states = trainer.state_dict(), repr(trainer.optimizer.state_dict())
        try:
            load_sharded(folder, trainer, step=4)
            answers[name] = "loaded", False
        except ValueError as error:
            same = apart(trainer.state_dict(), before) == 0 and repr(trainer.optimizer.state_dict()) == states
            answers[name] = f"{type(error).__name__}: {error}", same
    return answers


@verifies("distributed.sharded_checkpoint.load_sharded", kind="recovery",
          against="an error on every rank that says what is wrong, with nothing changed",
          on="parts and index cut, changed, missing, exchanged; another model, another optimizer; 2 ranks")  # fmt: skip
def test_damage_is_named_and_nothing_is_half_loaded(folders, tmp_path):
    rule = next(iter(RULES))
    four_ranks(folders[rule, 3], rule, 3)
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(folders[rule, 3], tmp_path / name)
        if damage:
            damage(tmp_path / name)
    ranks = launch(refused, 2, {name: tmp_path / name for name in DAMAGE}, timeout=LONG)
    for name, (_, message) in DAMAGE.items():
        texts = [answers[name][0] for answers in ranks]
        assert all(answers[name][1] for answers in ranks), (name, texts)
        assert all(re.search(message, text) for text in texts), (name, texts)
        assert name == "another optimizer" or all(text.startswith("CheckpointError") for text in texts)


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert launch(lambda: load_sharded(tmp_path / "none", make()[1]), 2, timeout=LONG) == [None, None]
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        read_whole(tmp_path)


@verifies("distributed.sharded_checkpoint.save_sharded", "distributed.sharded_checkpoint.read_whole", kind="message",
          against="the argument, what was expected, what came", on="a wrong keep and step; no checkpoint")  # fmt: skip
def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="need keep >= 1 and step >= 0, got keep=0 and step=3"):
        save_sharded(tmp_path, 3, None, keep=0)
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 7"):
        read_whole(tmp_path, step=7)


# Ranks killed while they save


def save_and_die(folder, place, victim):
    """Save step 1; then step 2, in which rank `victim` is killed at `place`."""
    model, trainer = make()
    go_on(model, trainer, range(1))
    save_sharded(folder, 1, trainer)
    go_on(model, trainer, range(1, 2))
    if dist.get_rank() == victim:
        owner, name, count = KILLS[place][1:4]
        real, left = getattr(owner, name), count

        def killed(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, killed)
    save_sharded(folder, 2, trainer, keep=1)


KILLS = {  # place: victim, what is called there, for which time, the newest good step afterwards
    "before its folder": (0, sharded_checkpoint, "_begin", 1, 1),
    "before its part": (1, checkpoint, "_content", 1, 1),
    "when its part is not yet safe": (1, os, "fsync", 1, 1),
    "when its part has no name yet": (1, os, "replace", 1, 1),
    "before the index": (0, sharded_checkpoint, "_finish", 1, 1),
    "when the index has no name yet": (0, os, "replace", 2, 1),
    "after the index": (0, checkpoint, "sync_folder", 2, 2),
    "when an old one is half removed": (0, shutil, "rmtree", 1, 2),
}


def look_then_save(folder):
    _, trainer = make(seed=9)
    step, _ = load_sharded(folder, trainer)
    loaded = trainer.state_dict()
    save_sharded(folder, step + 1, trainer, keep=1)
    return step, loaded


@verifies("distributed.sharded_checkpoint.save_sharded", kind="recovery",
          against="the last finished checkpoint, every bit of it, on another number of ranks",
          on="a rank killed by SIGKILL at eight places of the save; then the next save", bound=0.0)  # fmt: skip
@pytest.mark.parametrize("place", KILLS)
def test_a_rank_killed_while_saving_leaves_a_good_checkpoint(place, tmp_path, seen):
    with pytest.raises(RuntimeError):
        launch(save_and_die, 2, tmp_path, place, KILLS[place][0], timeout=LONG)
    good = KILLS[place][-1]
    _, want = read_whole(tmp_path, step=good)
    for step, loaded in launch(look_then_save, 3, tmp_path, timeout=LONG):
        assert step == good
        seen(apart(loaded, want))
    (left,) = os.listdir(tmp_path)  # what was never finished is gone
    assert left in (f"step-{good + 1:09d}", f"step-{good + 1:09d}.1")
    assert sorted(os.listdir(tmp_path / left)) == [
        "index.json",
        *(f"rank-{rank}-of-3.safetensors" for rank in range(3)),
    ]


def test_only_the_newest_are_kept(tmp_path):
    def several():
        model, trainer = make()
        go_on(model, trainer, range(1))
        for step in (1, 2, 3, 3):
            save_sharded(tmp_path, step, trainer, extra=step)

    launch(several, 2, timeout=LONG)
    assert sorted(os.listdir(tmp_path)) == ["step-000000003", "step-000000003.1"]
    assert json.loads(json.loads((tmp_path / "step-000000003/index.json").read_text())["index"])["ranks"] == 2


@verifies("distributed.sharded_checkpoint.save_sharded", kind="recovery", against="an error on every rank",
          on="no folder can be made; the disk of rank 1 is full: the older checkpoint stays")  # fmt: skip
def test_a_rank_that_cannot_write_is_an_error_on_every_rank(tmp_path):
    def fail():
        def full(*_):
            raise OSError(28, "No space left on device")

        _, trainer = make()
        save_sharded(tmp_path / "good", 1, trainer)
        (tmp_path / "file").touch()
        messages = []
        for folder, save in ((tmp_path / "file", checkpoint.save), (tmp_path / "good", full)):
            checkpoint.save = save if dist.get_rank() == 1 else checkpoint.save
            try:
                save_sharded(folder, 2, trainer)
            except (OSError, CheckpointError) as error:
                messages.append(str(error))
        return messages

    (made, other), (waits, full) = launch(fail, 2, timeout=LONG)
    assert "Not a directory" in made
    assert waits.startswith("rank 0 of 2 could not look into the folder; nothing has changed: [Errno")
    assert "No space left" in full
    assert other.startswith("rank 1 of 2 could not write its part of step 2; nothing has changed: [Errno 28] No space")
    assert read_whole(tmp_path / "good")[0] == 1
