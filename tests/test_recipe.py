"""The course's small models give the same answers wherever they are trained, and good ones."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from bigmodel_course import recipe
from bigmodel_course.corpus import bigram_loss, docstrings, windows
from bigmodel_course.data import batches
from bigmodel_course.models import GPT, digit_model
from bigmodel_course.recipe import (
    byte_gpt_parts,
    digit_parts,
    train_byte_gpt,
    train_digits,
    trained_byte_gpt,
    trained_digit_model,
)
from bigmodel_course.training import evaluate


@pytest.mark.verifies(
    "recipe.trained_digit_model",
    "recipe.train_digits",
    kind="parity",
    against="torch.optim.AdamW with CosineAnnealingLR in a loop written out",
    on="680 steps of the digit model, largest difference of a weight",
    bound=1e-4,
)
def test_the_recipe_is_torchs_own_loop(seen):
    train, *_ = digit_parts()
    model = digit_model(generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False, fused=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=680)
    for epoch in range(20):
        for batch in batches(train, 32, seed=0, epoch=epoch):
            optimizer.zero_grad()
            cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()
            schedule.step()
    weights, ours = (parameters_to_vector(m.parameters()).detach() for m in (model, trained_digit_model()))
    seen((weights - ours).abs().max())


@pytest.mark.verifies(
    "recipe.digit_parts", kind="invariant", against="the whole data set", on="sizes, classes, no picture twice"
)
def test_the_parts_are_disjoint_balanced_and_whole():
    parts = digit_parts()
    assert [len(part) for part in parts] == [1078, 360, 359]
    rows = [tuple(row) for part in parts for row in part.x.tolist()]
    assert len(set(rows)) == 1797
    for part in parts:
        shares = torch.bincount(part.y) / len(part)
        assert shares.max() - shares.min() < 0.02


def test_one_thread_and_two_give_the_same_answers_and_a_good_model():
    threads = torch.get_num_threads()
    models = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            models.append(trained_digit_model())
    finally:
        torch.set_num_threads(threads)
    test = digit_parts()[2]
    assert torch.equal(*(model(test.x).argmax(1) for model in models))
    assert evaluate(models[0], cross_entropy, test).accuracy > 0.97


def test_options_reach_the_loop():
    train, validation, _ = digit_parts()
    model = digit_model(generator=torch.Generator().manual_seed(0))
    history = train_digits(model, train, epochs=2, validation=validation)
    assert len(history.validation_loss) == 2


@pytest.mark.verifies(
    "recipe.byte_gpt_parts", kind="invariant", against="the docstrings", on="every byte, in order, 5 % held out"
)
def test_the_text_is_the_docstrings_whole():
    train, held_out = byte_gpt_parts()
    assert bytes(torch.cat([train, held_out]).tolist()) == docstrings().encode()
    assert abs(len(held_out) / (len(train) + len(held_out)) - 0.05) < 1e-3


@pytest.mark.verifies(
    "recipe.trained_byte_gpt",
    kind="invariant",
    against="the bigram baseline, counted in the same text",
    on="64 held-out windows: at least 0.4 nats a byte below it",
)
def test_the_byte_gpt_is_well_below_the_bigram_baseline():
    train, held_out = byte_gpt_parts()
    x, y = windows(held_out, 64, 64, seed=1, step=0)
    with torch.no_grad():
        loss = cross_entropy(trained_byte_gpt()(x).flatten(0, 1), y.flatten())
    assert loss < bigram_loss(train, held_out) - 0.4


@pytest.mark.verifies(
    "recipe.train_byte_gpt",
    kind="invariant",
    against="itself with two threads",
    on="12 steps of the byte GPT, every bit of every weight",
    bound=0.0,
)
def test_the_byte_gpt_has_the_same_bits_with_one_thread_and_two(seen):
    train, threads, models = byte_gpt_parts()[0], torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            models.append(GPT(recipe.BYTE_GPT, generator=torch.Generator().manual_seed(0)))
            train_byte_gpt(models[-1], train, steps=12)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, two = (parameters_to_vector(m.parameters()).detach() for m in models)
    seen((one - two).abs().max())
    start = GPT(recipe.BYTE_GPT, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(one, parameters_to_vector(start.parameters()))


def test_it_is_trained_once_and_again_when_its_file_is_damaged_or_cannot_be_written(tmp_path, monkeypatch):
    trainings = []
    monkeypatch.setattr(recipe, "docstrings", lambda: "Return the number of the line. " * 40)
    monkeypatch.setattr(recipe, "train_byte_gpt", lambda model, train: trainings.append(len(train)))
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    first, second = trained_byte_gpt(), trained_byte_gpt()
    assert len(trainings) == 1
    assert torch.equal(first.tokens.weight, second.tokens.weight)
    (file,) = (tmp_path / "cache").glob("byte-gpt-*")
    file.write_bytes(file.read_bytes()[:-1])
    trained_byte_gpt()
    assert len(trainings) == 2
    monkeypatch.setenv("BIGMODEL_CACHE", str(file))  # a file where the folder should be
    trained_byte_gpt()
    assert len(trainings) == 3
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".safetensors"] * 2
