"""A loss of scores that lie over the ranks is torch's, also for extreme ones, and the scores are never gathered."""

import itertools
import math
import sys
from unittest import mock

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.regions import Cut
from bigmodel_course.distributed.vocabulary import VocabularyEmbedding, vocabulary_cross_entropy

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest
verifies = pytest.mark.verifies
ON_CPU = {"backend": "gloo", "timeout": 200.0}  # seconds; a busy machine is not a fault
LOSS = "distributed.vocabulary.vocabulary_cross_entropy"
SIZES = [4, 7, 50]
KINDS = {
    "ordinary": lambda x: x,
    "all + 10,000": lambda x: x + 1e4,
    "times 1,000": lambda x: 1000 * x,
    "one at 1e30": lambda x: x.index_fill(-1, torch.tensor([2]), 1e30),
    "some at minus infinity": lambda x: x.masked_fill(x > 1, -math.inf),
    "a rank without a finite one": lambda x: x.index_fill(-1, torch.arange(2), -math.inf),
}
TARGETS = {"all": lambda y: y, "some ignored": lambda y: y.masked_fill(torch.arange(y.shape[1]) % 3 == 0, -100)}


def scores(size, kind):
    rng = torch.Generator().manual_seed(size)
    x = KINDS[kind](torch.randn(3, 6, size, dtype=torch.float64, generator=rng))
    return x, x.argmax(-1) if "fini" in kind else torch.randint(0, size, (3, 6), generator=rng)


def loss_and_gradient(x, targets, reduction):
    """Of one process: torch's own."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction=reduction)
    loss.sum().backward()
    return loss.detach(), x.grad


CASES = list(itertools.product(SIZES, KINDS, TARGETS, ["mean", "sum", "none"]))


def distances(dtype):
    """For each case how far loss and gradient lie from torch's, relative to the larger of 1 and the largest value."""
    worst = 0.0
    for size, kind, which, reduction in CASES:
        x, targets = scores(size, kind)
        x, targets = x.to(dtype), TARGETS[which](targets)
        loss, grad = loss_and_gradient(x, targets, reduction)
        mine = Cut(2, size).of(x).requires_grad_()
        ours = vocabulary_cross_entropy(mine, targets, size, reduction=reduction)
        ours.sum().backward()
        for got, want in ((ours.flatten(), loss.flatten()), (mine.grad, Cut(2, size).of(grad))):
            assert got.isfinite().all(), (size, kind)
            worst = max(worst, ((got - want).abs().max() / want.abs().max().clamp(min=1)).item())
    return worst


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        pytest.param(ranks, dtype, id=f"{ranks} {dtype}", marks=verifies(
            LOSS, kind="parity", against="torch.nn.functional.cross_entropy",
            on=f"1, 2, 4 ranks; 4, 7, 50 scores up to 1e30 and to minus infinity; ignored targets; {dtype}, relative",
            bound=bound,
        ))
        for ranks, dtype, bound in (
            (1, torch.float64, 1e-14), (2, torch.float64, 1e-14), (4, torch.float64, 1e-14), (2, torch.float32, 1e-6)
        )
    ],
)  # fmt: skip
def test_equals_torchs_cross_entropy_on_whole_scores(ranks, dtype, seen):
    for worst in launch(distances, ranks, dtype, **ON_CPU):
        seen(worst)


def exchanged():
    """Numbers in every collective of a loss and its gradient."""
    sizes, whole = [], dist.all_reduce
    x, targets = scores(50, "ordinary")
    mine = Cut(2, 50).of(x).requires_grad_()
    with mock.patch.object(dist, "all_reduce", lambda x, *a, **k: (sizes.append(x.numel()), whole(x, *a, **k))):
        loss = vocabulary_cross_entropy(mine, targets, 50)
        forward = len(sizes)
        loss.backward()
    return sizes, forward


@verifies(
    LOSS,
    kind="invariant",
    against="three numbers a token, none in the backward pass; the scores are not gathered",
    on="18 tokens, 50 scores each, 2 ranks",
)
def test_exchanges_three_numbers_a_token():
    assert launch(exchanged, 2, **ON_CPU) == [([18, 36], 2)] * 2


def all_ignored():
    return vocabulary_cross_entropy(torch.zeros(1, 2, 2), torch.full((1, 2), -100), 4).item()


def test_the_mean_over_no_target_is_not_a_number_as_torch_has_it():
    assert all(math.isnan(value) for value in launch(all_ignored, 2, **ON_CPU))


def table():
    return nn.Embedding.from_pretrained(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double(), False)


TOKENS = torch.tensor([[0, 3, 6, 6], [4, 4, 2, 0]])


def looked_up():
    layer = VocabularyEmbedding(table())
    found = layer(TOKENS)
    found.square().sum().backward()
    return found, Cut(0, 7).join(layer.weight.grad)


@verifies(
    "distributed.vocabulary.VocabularyEmbedding",
    kind="parity",
    against="torch.nn.Embedding",
    on="7 rows on 1, 2 and 4 ranks: vectors and the table's gradient, exactly",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_torchs_embedding(ranks, seen):
    whole = table()
    wanted = whole(TOKENS)
    wanted.square().sum().backward()
    for found, grad in launch(looked_up, ranks, **ON_CPU):
        seen((found - wanted).abs().max().item())
        seen((grad - whole.weight.grad).abs().max().item())


def refused():
    x, y = torch.zeros(1, 3, 4), torch.tensor([[0, 7, 1]])
    calls = [
        lambda: vocabulary_cross_entropy(x, y, 7),
        lambda: vocabulary_cross_entropy(torch.zeros(1, 3, 8), y, 9),
        lambda: vocabulary_cross_entropy(x, y, 8, reduction="max"),
        lambda: VocabularyEmbedding(table())(y),
        lambda: VocabularyEmbedding(table())(y - 1),
    ]
    sentences = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


@verifies(
    LOSS,
    "distributed.vocabulary.VocabularyEmbedding",
    kind="message",
    against="ValueError that names the argument, what is needed and what came",
    on="5 wrong calls: shapes, reduction, tokens outside the vocabulary",
)
def test_wrong_input_is_named():
    first, second = launch(refused, 2, **ON_CPU)
    assert first == [
        "targets must lie in 0 … 6, got 0 … 7",
        "logits must hold this rank's share of 9 scores, [1, 3, 5], got [1, 3, 8]",
        "reduction must be 'mean', 'sum' or 'none', got 'max'",
        "tokens must lie in 0 … 6, got 0 … 7",
        "tokens must lie in 0 … 6, got -1 … 6",
    ]
    assert second[0] == "logits must hold this rank's share of 7 scores, [1, 3, 3], got [1, 3, 4]"
