"""The training loop takes the steps of one written out with torch, in any number of pieces, and knows when to stop."""

import copy
import math
import os

import pytest
import resumable_run
import torch
from torch import nn
from tqdm import tqdm

from bigmodel_course import training
from bigmodel_course.checkpoint import Checkpoints, load
from bigmodel_course.data import Dataset, batches, digits, split
from bigmodel_course.metrics import accuracy
from bigmodel_course.models import digit_model
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import warmup_cosine
from bigmodel_course.training import History, Score, clip_gradients_, evaluate, fit

LOSS = nn.CrossEntropyLoss()
RUN = {"epochs": 2, "batch_size": 16, "seed": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=50, dtype=torch.float32):
    """Three classes that a small model can tell apart."""
    y = torch.arange(n) % 3
    return Dataset(torch.randn(n, 4, generator=generator(), dtype=dtype) + y[:, None], y)


def model(dtype=torch.float32):
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)]
    for p in nn.ModuleList(layers).parameters():
        nn.init.normal_(p, 0.0, 0.5, generator=generator(p.numel()))
    return nn.Sequential(*layers).to(dtype)


def trained(network=None, optimizer=None, data=None, **options):
    """The weights after a run, and its history."""
    network = network or model()
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    history = fit(network, optimizer, LOSS, data or blobs(), **RUN | options)
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach(), history


def written_out(network, optimizer, data, rate, clip_norm):
    """The same loop as anyone would write it."""
    losses = []
    for epoch in range(RUN["epochs"]):
        for batch in batches(data, RUN["batch_size"], seed=RUN["seed"], epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(len(losses))
            optimizer.zero_grad()
            loss = LOSS(network(batch.x), batch.y)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach(), losses


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW, tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01)),
    "course": lambda params: Optimizer(params, AdamW(), lr=0.01),
}


@pytest.mark.verifies(
    "training.fit",
    "training.History",
    kind="parity",
    against="the loop written out with torch.optim and torch.nn.utils.clip_grad_norm_",
    on="8 steps with a schedule and clipping, four optimizers: weights and losses",
    bound=0.0,
)
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "tensor" not in n])
def test_fit_takes_the_steps_of_the_plain_loop(name, seen):
    rate, ours, theirs = warmup_cosine(0.1, 2, 8), model(), model()
    weights, history = trained(ours, OPTIMIZERS[name](ours.parameters()), schedule=rate, clip_norm=0.5)
    expected, losses = written_out(theirs, OPTIMIZERS[name](theirs.parameters()), blobs(), rate, 0.5)
    seen((weights - expected).abs().max())
    seen(max(abs(a - b) for a, b in zip(history.loss, losses, strict=True)))


def test_a_tensor_as_learning_rate_is_set_in_place():
    network = model()
    optimizer = OPTIMIZERS["AdamW, tensor lr"](network.parameters())
    rate = optimizer.param_groups[0]["lr"]
    trained(network, optimizer, schedule=lambda step: 0.5)
    assert rate.item() == 0.5


@pytest.mark.verifies(
    "training.fit",
    kind="invariant",
    against="the same schedule inside the course's Optimizer",
    on="8 steps of AdamW, difference of the weights",
    bound=0.0,
)
def test_the_optimizers_own_schedule_gives_the_same(seen):
    rate, first, second = warmup_cosine(0.1, 2, 8), model(), model()
    inside, _ = trained(first, Optimizer(first.parameters(), AdamW(), lr=rate))
    outside, _ = trained(second, Optimizer(second.parameters(), AdamW(), lr=0.01), schedule=rate)
    seen((inside - outside).abs().max())
    with pytest.raises(ValueError, match="schedule is given twice"):
        trained(first, Optimizer(first.parameters(), AdamW(), lr=rate), schedule=rate)


@pytest.mark.verifies(
    "training.fit",
    kind="invariant",
    against="the whole batch at once",
    on="batches of 16 and 2 in 3, 5 and 40 pieces, unequal ones too; weights after 8 steps, float64",
    bound=1e-13,
)
@pytest.mark.parametrize("pieces", [3, 5, 40])
def test_pieces_of_a_batch_give_its_gradient(pieces, seen):
    whole, history = trained(model(torch.float64), data=blobs(dtype=torch.float64))
    weights, same = trained(model(torch.float64), data=blobs(dtype=torch.float64), accumulate=pieces)
    seen((weights - whole).abs().max())
    seen(max(abs(a - b) for a, b in zip(history.loss, same.loss, strict=True)))
    seen(abs(history.train_loss[-1] - same.train_loss[-1]))
    assert history.train_accuracy == same.train_accuracy


@pytest.mark.verifies(
    "training.clip_gradients_",
    kind="parity",
    against="torch.nn.utils.clip_grad_norm_",
    on="gradients and norm, float32 and float64, above and below the limit, one gradient None",
    bound=0.0,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [0.01, 1.0, 1e3])
def test_clipping_equals_torch(dtype, limit, seen):
    ours = [torch.zeros(shape, dtype=dtype) for shape in [(40, 30), (7,), (), (2,)]]
    for p in ours[:-1]:
        p.grad = torch.randn(p.shape, generator=generator(p.numel()), dtype=dtype)
    theirs = copy.deepcopy(ours)
    for ours_p, theirs_p in zip(ours[:-1], theirs[:-1], strict=True):
        theirs_p.grad = ours_p.grad.clone()
    seen((clip_gradients_(ours, limit) - nn.utils.clip_grad_norm_(theirs, limit)).abs())
    seen(max((a.grad - b.grad).abs().max() for a, b in zip(ours[:-1], theirs[:-1], strict=True)))
    assert clip_gradients_([torch.zeros(3)], limit) == 0


# What is measured


@pytest.mark.verifies(
    "training.evaluate",
    "training.Score",
    kind="parity",
    against="torch.nn.CrossEntropyLoss on all examples at once, metrics.accuracy",
    on="1,797 digits in batches of 100, float64",
    bound=1e-12,
)
def test_evaluate_is_the_mean_over_all_examples(seen):
    data, network = digits(), digit_model(generator=generator()).double()
    data = Dataset(data.x.double(), data.y)
    score = evaluate(network, LOSS, data, batch_size=100)
    with torch.no_grad():
        seen(abs(score.loss - LOSS(network(data.x), data.y).item()))
        seen(abs(score.accuracy - accuracy(network(data.x).argmax(1), data.y)))
    regression = evaluate(nn.Linear(4, 1), nn.MSELoss(), Dataset(torch.rand(5, 4), torch.rand(5, 1)))
    assert regression == Score(regression.loss, None)


@pytest.mark.verifies(
    "training.evaluate",
    kind="invariant",
    against="layers in eval mode, no gradients, then every layer's mode as it was",
    on="dropout and a frozen batch norm; also when the model raises",
)
def test_evaluate_leaves_the_model_as_it_was():
    data, network = blobs(), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9), nn.BatchNorm1d(3), nn.Linear(3, 3))
    network[2].eval()
    modes, before = [layer.training for layer in network.modules()], copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    first, second = (evaluate(network, LOSS, data) for _ in range(2))
    assert first == second
    assert [layer.training for layer in network.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError):
        evaluate(network, LOSS, Dataset(torch.rand(3, 5), torch.zeros(3)))
    assert [layer.training for layer in network.modules()] == modes
    with pytest.raises(ValueError, match="at least one batch, got 0 examples"):
        evaluate(network, LOSS, data[:0])


@pytest.mark.verifies(
    "training.History",
    kind="invariant",
    against="the run that it tells of",
    on="lengths, means of unequal batches, validation after each epoch, the best epoch",
)
def test_the_history_tells_what_happened():
    data, network = blobs(), model()
    _, history = trained(network, epochs=3, validation=data[:9])
    assert len(history.loss) == 3 * 4
    assert len(history.train_loss) == len(history.validation_loss) == len(history.validation_accuracy) == 3
    mean = sum(loss * size for loss, size in zip(history.loss[:4], (16, 16, 16, 2), strict=True)) / 50
    assert history.train_loss[0] == pytest.approx(mean, rel=1e-12)
    assert (history.validation_loss[-1], history.validation_accuracy[-1]) == evaluate(network, LOSS, data[:9])
    assert history.best_epoch == min(range(3), key=history.validation_loss.__getitem__)
    _, plain = trained()
    assert plain.validation_loss == []
    assert plain.best_epoch is None


def test_the_digit_model_learns():
    train, test = split(digits(), (0.8, 0.2), seed=0)
    network = digit_model(generator=generator())
    fit(network, Optimizer(network.parameters(), AdamW(), lr=1e-2), LOSS, train, epochs=3, batch_size=64, seed=0)
    assert evaluate(network, LOSS, test).accuracy > 0.93


# When it ends


@pytest.mark.verifies(
    "training.fit",
    kind="invariant",
    against="the weights of the epoch with the lowest validation loss, found by running each number of epochs",
    on="a validation set with wrong labels, patience 2",
    bound=0.0,
)
def test_early_stopping_ends_with_the_best_weights(seen):
    data = blobs()
    held_out = Dataset(data.x[:12], (data.y[:12] + (torch.arange(12) % 3 == 0)) % 3)
    options = {"validation": held_out, "epochs": 60}
    weights, history = trained(patience=2, **options)
    best, done = history.best_epoch, len(history.validation_loss)
    assert best > 0
    assert done == best + 3 < 60
    expected, through = trained(**options | {"epochs": best + 1})
    assert min(history.validation_loss) == through.validation_loss[-1]
    seen((weights - expected).abs().max())


@pytest.mark.verifies(
    "training.fit",
    kind="message",
    against="the epoch, the step, and what to try; the weights still finite",
    on="NaN in the data, a learning rate of 1e38",
)
@pytest.mark.parametrize(
    ("spoilt", "rate", "text"),
    [
        (True, 0.1, r"loss is nan in epoch 0, step \d .*not taken.*lower learning rate.*clip_norm=1.0.*data\.clean"),
        (False, 1e38, r"loss is (nan|inf) in epoch 0, step 1 "),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run(spoilt, rate, text):
    data, network = blobs(), model()
    if spoilt:
        data.x[7] = math.nan
    with pytest.raises(FloatingPointError, match=text):
        fit(network, torch.optim.SGD(network.parameters(), lr=rate), LOSS, data, **RUN)
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.verifies(
    "training.fit", kind="message", against="what was expected and what came", on="its numbers; patience"
)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
        ({"patience": 0, "validation": blobs()}, "patience must be 1 or more, got 0"),
        ({"patience": 2}, "patience needs a validation set"),
        ({"validation": blobs(0)}, "at least one batch, got 0 examples"),
        ({"clip_norm": 0.0}, r"clip_norm must be above 0, got 0\.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        trained(**options)


# The same again


@pytest.mark.verifies(
    "training.fit",
    kind="invariant",
    against="the same run with checkpoints, with a progress bar, with two threads",
    on="weights of the run that the SIGKILL tests use; difference",
    bound=0.0,
)
def test_what_watches_a_run_does_not_change_it(tmp_path, seen):
    def weights(network):
        return torch.nn.utils.parameters_to_vector(network.parameters()).detach()

    often, history = resumable_run.run(tmp_path / "a", every=1)
    seldom, same = resumable_run.run(tmp_path / "b", every=None)
    seen((weights(often) - weights(seldom)).abs().max())
    assert vars(history) == vars(same)

    plain, _ = trained()
    seen((trained(checkpoints=Checkpoints(tmp_path / "c"))[0] - plain).abs().max())
    seen((trained(progress=False)[0] - plain).abs().max())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen((trained()[0] - plain).abs().max())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.verifies(
    "training.fit", kind="message", against="the two runs' settings", on="a folder with another run's checkpoints"
)
def test_checkpoints_of_another_run_are_refused(tmp_path):
    trained(checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ValueError, match=r"'batch_size': 16.*got .*'batch_size': 8.*its own folder"):
        trained(checkpoints=Checkpoints(tmp_path), batch_size=8)


def test_the_random_states_of_gpus_are_kept_too(tmp_path, monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor([1, 2], dtype=torch.uint8)])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.extend)
    for _ in range(2):
        trained(checkpoints=Checkpoints(tmp_path))
    assert [state.tolist() for state in put_back] == [[1, 2]]


def test_a_finished_run_comes_back_from_its_checkpoints(tmp_path):
    weights, history = trained(checkpoints=Checkpoints(tmp_path, every=1))
    again, same = trained(checkpoints=Checkpoints(tmp_path, every=1))
    assert torch.equal(weights, again)
    assert same == history
    assert isinstance(same, History)
    assert load(tmp_path / "step-000000008.safetensors")["run"]["epoch"] == 2


def test_the_progress_bar_is_silent_when_told_so(capsys):
    assert os.environ["TQDM_DISABLE"] == "1"  # set before tqdm was imported, which reads it then
    trained()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_is_shown_unless_it_is_turned_off(progress, capsys, monkeypatch):
    monkeypatch.setattr(training, "tqdm", lambda **options: tqdm(**{"disable": False} | options))
    trained(progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("8/8" in shown.err) if progress else (shown.err == "")
