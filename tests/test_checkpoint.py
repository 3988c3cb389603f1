"""Checkpoints: bit for bit, refused when one bit is wrong, and never half there."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from multiprocessing import forkserver

import pytest
import resumable_run
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bigmodel_course import checkpoint
from bigmodel_course.checkpoint import CheckpointError, Checkpoints, load, save

PATIENCE = 300.0  # seconds: a busy machine is not a fault
WEIGHT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
STATES = {
    "numbers": {"int": 2**80, "float": 0.1, "infinite": float("-inf"), "none": None, "true": True, "text": 'é"{'},
    "keys": {"state": {0: {"m": WEIGHT}, -1: {}}, "groups": [{"betas": (0.9, 0.999), "params": [0, 1]}]},
    "views": [WEIGHT, WEIGHT.t(), WEIGHT[1], WEIGHT.view(-1), WEIGHT[:, ::2], WEIGHT],
    "empty": [torch.empty(0, 3), torch.empty(0), [], {}, ()],
    "dtypes": [WEIGHT.to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)],
    "complex": [torch.complex(WEIGHT, -WEIGHT), torch.tensor(3.5)],
    "special": [torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])],
    "adam": torch.optim.Adam([torch.zeros(2)]).state_dict(),
    "random": torch.get_rng_state(),
    "the mark itself": {'"sha256":"': '"sha256":"' + "0" * 64},
    "nothing": None,
}


def same(a, b):
    """Equal in type and, tensors, in every bit."""
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.verifies(
    "checkpoint.save",
    "checkpoint.load",
    kind="invariant",
    against="the state that was saved, every bit and type of it",
    on="nested states: views, tied and empty tensors, nine dtypes, NaN, int keys, tuples, generator states",
)
@pytest.mark.parametrize("name", STATES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    save(tmp_path / "a", STATES[name])
    assert same(load(tmp_path / "a"), STATES[name])
    assert os.listdir(tmp_path) == ["a"]


def nested(leaves):
    return st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), leaves, max_size=3)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)


@settings(max_examples=60, deadline=None)
@given(state=st.recursive(LEAVES, nested, max_leaves=12))
def test_any_nested_state_comes_back(state, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "nested"
    save(path, state)
    assert same(load(path), state)


@pytest.mark.verifies(
    "checkpoint.save",
    kind="parity",
    against="safetensors.safe_open, which reads the file without this course",
    on="weights of a small model",
    bound=0.0,
)
def test_the_file_is_a_safetensors_file(tmp_path, seen):
    model = torch.nn.Linear(4, 3)
    save(tmp_path / "a", model.state_dict())
    with safe_open(tmp_path / "a", "pt") as file:
        for i, tensor in enumerate(model.state_dict().values()):
            seen((file.get_tensor(str(i)) - tensor).abs().max())


def test_loaded_tensors_are_their_own(tmp_path):
    save(tmp_path / "a", [WEIGHT, WEIGHT])
    first, second = load(tmp_path / "a")
    (tmp_path / "a").unlink()
    first.zero_()
    assert torch.equal(second, WEIGHT)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a"
    save(path, {"weight": WEIGHT, "step": 7, "name": "digit model"})
    return path.read_bytes()


@pytest.mark.verifies(
    "checkpoint.load",
    "checkpoint.CheckpointError",
    kind="recovery",
    against="a refusal, CheckpointError",
    on="a file cut at every length, and with each single bit flipped",
)
def test_every_cut_and_every_flipped_bit_is_refused(good, tmp_path):
    path = tmp_path / "a"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load(path)
    for bit in range(8 * len(good)):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(good)
    assert load(path)["step"] == 7


FOREIGN = {
    "empty": (b"", "not a whole checkpoint: 0 bytes"),
    "longer": (None, "damaged"),
    "text": (b"not a checkpoint at all, only words", "not a whole checkpoint"),
    "huge header": (b"\xff" * 8 + b"{}", "not a whole checkpoint"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 40, "not a whole checkpoint|no digest"),
    "plain safetensors": (safetensors.torch.save({"0": WEIGHT}, {"state": "1"}), "no digest"),
    "zeros": (bytes(300), "no digest"),
}


@pytest.mark.verifies(
    "checkpoint.load",
    "checkpoint.CheckpointError",
    kind="message",
    against="the file and what is wrong with it",
    on="empty, longer, text, a pickle, a plain safetensors file, a header of 2**64 bytes",
)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_with_its_name(name, good, tmp_path):
    content, text = FOREIGN[name]
    (tmp_path / "a").write_bytes(good + b"\0" if content is None else content)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'a'} is .*({text})"):
        load(tmp_path / "a")


def test_a_file_with_a_right_digest_and_a_foreign_content_is_refused(tmp_path, monkeypatch):
    for text in ("{}", '{"tensor": 5}', '{"dict": 3}', "[" * 100_000, "nonsense"):
        monkeypatch.setattr(checkpoint.json, "dumps", lambda _, text=text: text)
        save(tmp_path / "a", None)
        with pytest.raises(CheckpointError, match="not a checkpoint of this course"):
            load(tmp_path / "a")


def test_files_beyond_the_limit_are_refused_unread(good, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(good)
    monkeypatch.setattr(checkpoint, "FILE_LIMIT", 100)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load(tmp_path / "a")
    with pytest.raises(ValueError, match="state must have at most 100 bytes, got"):
        save(tmp_path / "b", torch.zeros(100))


@pytest.mark.verifies(
    "checkpoint.save", kind="message", against="where it stands and what it is", on="functions, sets, tuples as keys"
)
@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": [1, {2: max}]}, r"state\['a'\]\[1\]\[2\] must be tensors, numbers.* got <built-in function max>"),
        ({"a": {1, 2}}, r"state\['a'\] must be"),
        ({(1, 2): 3}, "keys: str, int"),
        ({True: 3}, "keys: str, int"),
    ],
)
def test_what_cannot_be_written_is_named(state, text, tmp_path):
    with pytest.raises(TypeError, match=text):
        save(tmp_path / "a", state)
    assert not list(tmp_path.iterdir())


@pytest.mark.verifies(
    "checkpoint.save",
    kind="recovery",
    against="the old file unchanged, nothing left behind",
    on="a disk full at each of three points, a file-size limit of the system, a missing folder",
)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(call, good, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(good)
    monkeypatch.setattr(*((checkpoint, "open", full) if call == "open" else (os, call, full)), raising=False)
    with pytest.raises(
        OSError, match=r"cannot write the checkpoint \(No space left on device\); an older one is as it was"
    ):
        save(tmp_path / "a", {"step": 8})
    monkeypatch.undo()
    assert load(tmp_path / "a")["step"] == 7
    assert os.listdir(tmp_path) == ["a"]


def test_a_limit_of_the_system_leaves_the_old_file(good, tmp_path):
    (tmp_path / "a").write_bytes(good)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint") as caught:
            save(tmp_path / "a", torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert load(tmp_path / "a")["step"] == 7
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write the checkpoint.*nowhere"):
        save(tmp_path / "nowhere" / "a", {})


@pytest.mark.verifies(
    "checkpoint.Checkpoints",
    kind="recovery",
    against="the last good checkpoint, with a warning",
    on="the newest one cut short, the two newest damaged, all damaged, leftovers of a crash",
)
def test_the_last_good_checkpoint_is_used(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    assert store.latest() is None
    for step in (8, 9, 10):
        store.save(step, {"step": step})
    assert store.latest() == (10, {"step": 10})
    for left, broken in enumerate(sorted(tmp_path.iterdir(), reverse=True)):
        broken.write_bytes(broken.read_bytes()[:-1])
        with warnings.catch_warnings(record=True) as caught:
            found = store.latest()
        assert len(caught) == left + 1
        assert f"passed over: {broken} is not a whole checkpoint" in str(caught[-1].message)
        assert found == ((9 - left, {"step": 9 - left}) if left < 2 else None)


def test_old_checkpoints_go_and_leftovers_with_them(tmp_path):
    (tmp_path / "step-000000004.safetensors.unfinished").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    store = Checkpoints(tmp_path)
    for step in (999_999_999, 5, 1_000_000_000):
        store.save(step, step)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-1000000000.safetensors", "step-999999999.safetensors"]
    assert store.latest() == (1_000_000_000, 1_000_000_000)


@pytest.mark.verifies(
    "checkpoint.Checkpoints", kind="message", against="what was expected and what came", on="keep, every"
)
@pytest.mark.parametrize("options", [{"keep": 0}, {"every": 0}])
def test_wrong_numbers_are_named(options, tmp_path):
    with pytest.raises(ValueError, match="need keep >= 1 and every >= 1 or None, got keep="):
        Checkpoints(tmp_path, **options)


# Killed by SIGKILL and started again: real processes, from a server that has torch loaded already.


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resumable_run", "torch._dynamo"])  # the first optimizer would import the latter
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or the server would not find the former
        forkserver.ensure_running()
    return context


def start(processes, folder, **options):
    process = processes.Process(target=resumable_run.run, args=(folder,), kwargs=options, daemon=True)
    process.start()
    return process


def finish(processes, folder, **options):
    process = start(processes, folder, **options)
    process.join(PATIENCE)
    assert process.exitcode == 0
    return load(folder / "final.safetensors")


def die(processes, folder, place, count):
    process = start(processes, folder, damage=(place, count))
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    names = resumable_run.OPTIMIZERS
    return {name: finish(processes, tmp_path_factory.mktemp("through"), optimizer=name) for name in names}


PLACES = [
    "while packing",
    "in the middle of writing",
    "before the bytes are safe",
    "before the new name",
    "after the new name",
    "before an old one goes",
    "after an old one went",
]


@pytest.mark.verifies(
    "checkpoint.Checkpoints",
    "checkpoint.save",
    "checkpoint.load",
    kind="recovery",
    against="the same run undisturbed: weights and history bitwise the same",
    on="SIGKILL at 7 places of saving a checkpoint, 3 times in one run",
)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_while_saving_ends_in_the_same_weights(place, processes, undisturbed, tmp_path):
    for count in (1, 9, 4):
        die(processes, tmp_path, place, count)
    assert same(finish(processes, tmp_path), undisturbed["course's AdamW"])
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.verifies(
    "training.fit",
    kind="recovery",
    against="the same run undisturbed: weights and history bitwise the same",
    on="SIGKILL from outside at random moments until the run is through; three optimizers, dropout, augmentation",
)
@pytest.mark.parametrize(("optimizer", "every"), [("course's AdamW", 1), ("torch's Adam", 4), ("torch's SGD", None)])
def test_a_run_killed_at_random_moments_ends_in_the_same_weights(optimizer, every, processes, undisturbed, tmp_path):
    dice, kills = random.Random(str(every)), 0
    while not (tmp_path / "final.safetensors").exists() and kills < 6:
        begun = tmp_path / f"begun-{kills}"
        process = start(processes, tmp_path, optimizer=optimizer, every=every, begun=begun)
        while not begun.exists():  # how long a process takes to load depends on the machine
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.15))  # all of it takes 0.1 to 0.2 s
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += 1
    assert same(finish(processes, tmp_path, optimizer=optimizer, every=every), undisturbed[optimizer])


def test_a_run_goes_on_from_an_older_checkpoint_when_the_last_is_damaged(processes, undisturbed, tmp_path):
    die(processes, tmp_path, "before the new name", 12)
    newest = max(tmp_path.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(finish(processes, tmp_path), undisturbed["course's AdamW"])


def test_a_finished_run_can_be_prolonged(processes, undisturbed, tmp_path):
    finish(processes, tmp_path, epochs=2)
    (tmp_path / "final.safetensors").unlink()
    assert same(finish(processes, tmp_path), undisturbed["course's AdamW"])
