"""The training command: equal to a plain loop, the same on more ranks, and the same after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from hosts import end_all, shown_by, torchrun_on

from bigmodel_course import corpus, train
from bigmodel_course.checkpoint import CheckpointError
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.sharded_checkpoint import read_whole
from bigmodel_course.models import GPT, GPT_SIZES, GPTConfig
from bigmodel_course.schedules import warmup_cosine

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    words = corpus.docstrings()[:60_000]
    return str(corpus.write_tokens(tmp_path_factory.mktemp("text") / "text.bin", words))


@pytest.fixture
def settings(text, tmp_path) -> train.Settings:
    folder = str(tmp_path / "checkpoints")
    return train.Settings(steps=6, batch=4, length=16, warmup=2, text=text, checkpoints=folder, save_every=2)


def plain(settings: train.Settings) -> dict[str, torch.Tensor]:
    """The same training with torch's own optimizer and clipping, and nothing of ours but the model and the windows."""
    model = GPT(GPT_SIZES[settings.size], generator=torch.Generator().manual_seed(settings.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, foreach=False)
    schedule = warmup_cosine(settings.lr, settings.warmup, settings.steps, floor=settings.lr / 10)
    tokens, _ = corpus.split_tokens(corpus.read_tokens(settings.text))
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = schedule(step)
        x, y = corpus.windows(tokens, settings.batch, settings.length, seed=settings.seed, step=step)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def difference(mine: dict, theirs: dict) -> float:
    """The largest relative L2 difference of any tensor.

    The keys' bias is left out: it adds the same to all scores of a query, so that its gradient is 0 but for rounding.
    Adam makes a step of that rounding, another one on each machine.
    """
    assert mine.keys() == theirs.keys()

    def apart(name: str) -> float:
        a, b = mine[name], theirs[name]
        if name.endswith("qkv.bias"):
            a, b = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (a, b))
        return float((a - b).norm() / b.norm().clamp_min(1e-8))

    return max(map(apart, mine))


VARIANTS = {
    "one rank": (1, {}),
    "two ranks, ZeRO-1": (2, {}),
    "two ranks, ZeRO-3, two parts, blocks computed again": (2, {"stage": 3, "accumulate": 2, "recompute": True}),
}


@pytest.mark.verifies(
    "train.train",
    "train.Settings",
    "train.recompute_blocks_",
    kind="equals one process",
    against="a plain loop with torch.optim.AdamW and clip_grad_norm_",
    on="6 steps of a 1M GPT on text; 1 and 2 ranks, ZeRO-1 and -3, parts, recomputation; relative, but the keys' bias",
    bound=1e-5,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_ends_where_a_plain_loop_ends(settings, variant, seen):
    ranks, options = VARIANTS[variant]
    results = launch(train.train, ranks, replace(settings, **options), timeout=500)
    assert all(result == results[0] for result in results)
    step, state = read_whole(settings.checkpoints)
    assert step == settings.steps
    seen(difference(state, plain(settings)))


@pytest.mark.verifies(
    "train.train",
    kind="recovery",
    against="the run that was not interrupted",
    on="bits of all weights after stopping at step 3 of 6 and going on, 2 ranks",
    bound=0.0,
)
def test_an_interrupted_run_ends_in_the_same_bits(settings, tmp_path, seen):
    whole = replace(settings, checkpoints=str(tmp_path / "whole"))
    launch(train.train, 2, whole, timeout=500)
    launch(lambda: train.train(settings, stop_after=3), 2, timeout=500)
    assert read_whole(settings.checkpoints)[0] == 3
    launch(train.train, 2, settings, timeout=500)
    mine, theirs = read_whole(settings.checkpoints)[1], read_whole(whole.checkpoints)[1]
    seen(max(float((mine[name] != theirs[name]).sum()) for name in theirs))


@pytest.mark.verifies(
    "train.train",
    kind="recovery",
    against="the run on 2 ranks that was not interrupted",
    on="begun on 2 ranks, finished on 1; relative, but the keys' bias",
    bound=1e-5,
)
def test_a_run_goes_on_with_another_number_of_ranks(settings, tmp_path, seen):
    whole = replace(settings, checkpoints=str(tmp_path / "whole"))
    launch(train.train, 2, whole, timeout=500)
    launch(lambda: train.train(settings, stop_after=4), 2, timeout=500)
    launch(train.train, 1, settings, timeout=500)
    seen(difference(read_whole(settings.checkpoints)[1], read_whole(whole.checkpoints)[1]))


def command(settings: train.Settings, log: Path) -> list[str]:
    options = {**vars(settings), "journal": str(log)}
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in options.items() if value not in (None, False)}
    return ["-m", "bigmodel_course.train", *(word for pair in given.items() for word in pair)]


PAUSING = """
import os, time
from bigmodel_course import train

add, first_life = train._Log.add, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def add_and_wait(self, step, loss):
    add(self, step, loss)
    if step == 12 and first_life and os.environ["RANK"] == "0":
        time.sleep(1000)

train._Log.add = add_and_wait
train.main()
"""  # the command, but its rank 0 waits after step 12 until it is ended: however slow the test is, it comes in time


def torchrun(settings: train.Settings, log: Path, script: Path) -> subprocess.Popen:
    script.write_text(PAUSING)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    run += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), *command(settings, log)[2:]]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(log: Path) -> list[int]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = (json.loads(line) for line in lines if line.endswith("\n"))  # the last one may be half written
    return [line["step"] for line in whole if "step" in line]


def kill_rank(agent: subprocess.Popen, rank: int, script: Path) -> None:
    """SIGKILL to the process of that rank, among the agent's children."""
    for child in psutil.Process(agent.pid).children(recursive=True):
        with suppress(psutil.Error):  # one that ends while we look
            if str(script) in child.cmdline() and child.environ().get("RANK") == str(rank):
                os.kill(child.pid, signal.SIGKILL)
                return
    pytest.fail(f"no process of rank {rank}")


@pytest.mark.verifies(
    "train.main",
    "train.train",
    kind="recovery",
    against="the same run under torchrun that nobody killed",
    on="rank 1 of 2 killed with SIGKILL in the middle, restarted by torchrun; bits of all weights",
    bound=0.0,
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_rank_under_torchrun_costs_no_bit(settings, tmp_path, seen):
    settings = replace(settings, steps=20, save_every=5)
    whole = replace(settings, checkpoints=str(tmp_path / "whole"))
    launch(train.train, 2, whole, timeout=500)
    log, script = tmp_path / "log.jsonl", tmp_path / "pausing.py"
    with torchrun(settings, log, script) as agent:
        try:
            deadline = time.monotonic() + 240
            while max(steps(log), default=0) < 12 and agent.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            kill_rank(agent, 1, script)
            out, err = agent.communicate(timeout=400)
        finally:
            end_all(agent)
    assert agent.returncode == 0, err[-2000:]
    assert json.loads(out.splitlines()[-1])["step"] == settings.steps
    begun = [line["from_step"] for line in map(json.loads, log.read_text().splitlines()) if "from_step" in line]
    assert begun[0] == 0
    assert begun[-1] >= 10
    mine, theirs = read_whole(settings.checkpoints)[1], read_whole(whole.checkpoints)[1]
    seen(max(float((mine[name] != theirs[name]).sum()) for name in theirs))


WRONG = {
    "size must be one of 1M": {"size": "7B"},
    "precision must be one of fp32, bf16, fp16, got 'int4'": {"precision": "int4"},
    "batch must be at least 1, got 0": {"batch": 0},
    "warmup must be between 0 and steps = 5, got 5": {"steps": 5, "warmup": 5},
    "length must be at most 256, the context, got 512": {"length": 512},
}


@pytest.mark.verifies("train.Settings", kind="message", against="an error's words", on="five wrong settings")
@pytest.mark.parametrize("words", WRONG)
def test_wrong_settings_are_named(words):
    with pytest.raises(ValueError, match=words):
        train.Settings(**WRONG[words])


@pytest.mark.verifies("train.main", kind="message", against="the command's exit", on="a setting that is refused")
def test_the_command_refuses_what_the_settings_refuse(capsys):
    with pytest.raises(SystemExit):
        train.main(["--size", "7B"])
    assert "size must be one of 1M" in capsys.readouterr().err


def test_a_batch_that_ranks_cannot_share_is_refused(settings):
    with pytest.raises(RuntimeError, match=r"batch must be a multiple of ranks \* accumulate = 1 \* 3, got 4"):
        launch(train.train, 1, replace(settings, accumulate=3), timeout=300)


@pytest.mark.verifies(
    "train.train",
    "train.SIZES",
    kind="equals one process",
    against="the run that it grew from, one step earlier",
    on="loss of the first step of 124M's little shape, grown from a checkpoint; relative",
    bound=1e-4,
)
def test_a_run_begins_with_what_a_smaller_run_learned(settings, tmp_path, monkeypatch, seen):
    wide = GPTConfig(layers=6, heads=4, width=232, context=256)
    monkeypatch.setitem(train.SIZES, "wide", wide)
    small = replace(settings, size="0.7M")
    launch(train.train, 1, small, timeout=500)
    model = GPT(train.SIZES["0.7M"], generator=torch.Generator())
    model.load_state_dict(read_whole(small.checkpoints)[1])
    tokens, _ = corpus.split_tokens(corpus.read_tokens(settings.text))
    x, y = corpus.windows(tokens, settings.batch, settings.length, seed=settings.seed, step=0)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()

    def grown():
        train.SIZES["wide"] = wide  # a rank has a module of its own
        large = replace(settings, size="1M", grow_from=small.checkpoints, checkpoints=None)
        object.__setattr__(large, "size", "wide")
        return train.train(large, stop_after=1)

    seen(abs(launch(grown, 1, timeout=500)[0]["loss"] / expected - 1))


@pytest.mark.verifies(
    "train.train",
    kind="recovery",
    against="the run in fp16 that was not interrupted",
    on="bits of all weights, 2 ranks, stopped at step 3 of 6; the loss scale comes from the checkpoint",
    bound=0.0,
)
def test_a_run_in_fp16_goes_on_with_its_loss_scale(settings, tmp_path, seen):
    settings = replace(settings, precision="fp16", save_every=3)
    whole = replace(settings, checkpoints=str(tmp_path / "whole"))
    launch(train.train, 2, whole, timeout=500)
    launch(lambda: train.train(settings, stop_after=3), 2, timeout=500)
    launch(train.train, 2, settings, timeout=500)
    mine, theirs = read_whole(settings.checkpoints)[1], read_whole(whole.checkpoints)[1]
    seen(max(float((mine[name] != theirs[name]).sum()) for name in theirs))
    start = plain(replace(settings, steps=6, lr=0.0))
    assert difference(mine, start) > 1e-4  # it has learned: not every step was left out


@pytest.mark.verifies(
    "train.main",
    kind="equals one process",
    against="2 ranks on one host",
    on="torchrun on two hosts (network namespaces), a rank on each; bits of all weights",
    bound=0.0,
)
def test_two_hosts_end_in_the_same_bits_as_one(two_hosts, settings, tmp_path, seen):
    whole = replace(settings, checkpoints=str(tmp_path / "whole"))
    launch(train.train, 2, whole, timeout=500)
    shown = shown_by(torchrun_on(two_hosts, command(settings, tmp_path / "log.jsonl"), tmp_path), 400)
    assert [json.loads(line)["step"] for line in shown[0].splitlines() if line.startswith("{")] == [6]
    mine, theirs = read_whole(settings.checkpoints)[1], read_whole(whole.checkpoints)[1]
    seen(max(float((mine[name] != theirs[name]).sum()) for name in theirs))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        read_whole(tmp_path)


def slurm() -> list[str]:
    lines = (ROOT / "clusters" / "slurm.sbatch").read_text().split("bigmodel_course.train")[1]
    return lines.replace("\\\n", " ").split()


def kubernetes() -> list[str]:
    _, job = yaml.safe_load_all((ROOT / "clusters" / "kubernetes.yaml").read_text())
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    return arguments[arguments.index("bigmodel_course.train") + 1 :]


@pytest.mark.verifies(
    "train.parser", kind="invariant", against="the settings", on="the commands in the Slurm and Kubernetes files"
)
@pytest.mark.parametrize("cluster", [slurm, kubernetes])
def test_the_cluster_files_say_what_the_command_understands(cluster):
    wanted = vars(train.parser().parse_args(cluster()))
    assert wanted.pop("ranks") is None
    wanted.pop("threads")
    assert train.Settings(**wanted).size == "124M"


def test_the_slurm_file_is_a_shell_script():
    subprocess.run(["bash", "-n", str(ROOT / "clusters" / "slurm.sbatch")], check=True)
