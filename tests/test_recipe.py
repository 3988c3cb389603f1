"""The digit model gives the same answers wherever it is trained, and good ones."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from bigmodel_course.data import batches
from bigmodel_course.models import digit_model
from bigmodel_course.recipe import digit_parts, train_digits, trained_digit_model
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
