"""Every metric is scikit-learn's number, on empty and one-class input too."""

import math
import warnings

import pytest
import sklearn.metrics
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import tensor

from bigmodel_course import metrics

# `seen` keeps the largest difference over all that hypothesis tries
random = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SHARES = {
    "precision": sklearn.metrics.precision_score,
    "recall": sklearn.metrics.recall_score,
    "f1": sklearn.metrics.f1_score,
}


def two_vectors(elements):
    return st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(elements, min_size=n, max_size=n)] * 2))


@pytest.mark.verifies(
    "metrics.precision",
    "metrics.recall",
    "metrics.f1",
    kind="parity",
    against="sklearn.metrics.precision_score, recall_score, f1_score(zero_division=0)",
    on="binary, macro and micro; random label vectors of 1 to 30, one class included",
    bound=1e-12,
)
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("average", ["binary", "macro", "micro"])
def test_shares_equal_scikit_learn(name, average, seen):
    @random
    @given(two_vectors(st.integers(0, 1 if average == "binary" else 4)))
    def compare(vectors):
        predicted, target = vectors
        ours = getattr(metrics, name)(tensor(predicted), tensor(target), average)
        seen(abs(ours - SHARES[name](target, predicted, average=average, zero_division=0)))

    compare()


@pytest.mark.verifies(
    "metrics.accuracy",
    "metrics.confusion_matrix",
    kind="parity",
    against="sklearn.metrics.accuracy_score, confusion_matrix",
    on="random label vectors of 1 to 30, one class included",
    bound=0.0,
)
@random
@given(vectors=two_vectors(st.integers(0, 4)))
def test_counts_equal_scikit_learn(seen, vectors):
    predicted, target = vectors
    seen(abs(metrics.accuracy(tensor(predicted), tensor(target)) - sklearn.metrics.accuracy_score(target, predicted)))
    ours = metrics.confusion_matrix(tensor(predicted), tensor(target), classes=5)
    theirs = sklearn.metrics.confusion_matrix(target, predicted, labels=range(5))
    seen((ours - torch.from_numpy(theirs)).abs().max())


@pytest.mark.verifies(
    "metrics.mse",
    "metrics.rmse",
    "metrics.r2",
    kind="parity",
    against="sklearn.metrics.mean_squared_error, root_mean_squared_error, r2_score",
    on="random float64 vectors of 1 to 30, constant targets included; relative difference",
    bound=1e-12,
)
@random
@given(vectors=two_vectors(st.sampled_from([-3.5, 0.0, 0.125, 1.0, 7.25, 1e3])))  # whose sums and means are exact
def test_distances_equal_scikit_learn(seen, vectors):
    predicted, target = (tensor(v, dtype=torch.float64) for v in vectors)
    pairs = [
        (metrics.mse, sklearn.metrics.mean_squared_error),
        (metrics.rmse, sklearn.metrics.root_mean_squared_error),
        (metrics.r2, sklearn.metrics.r2_score),
    ]
    for ours, theirs in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one example has no R²
            expected = theirs(target, predicted)
        got = ours(predicted, target)
        assert math.isnan(got) == math.isnan(expected)
        if not math.isnan(got):
            seen(abs(got - expected) / max(1.0, abs(expected)))


EMPTY = tensor([], dtype=torch.int64)
WRONG = {
    "accuracy": [(EMPTY, EMPTY, "at least one example"), (torch.rand(3, 2), tensor([0, 1, 1]), "argmax")],
    "confusion_matrix": [(tensor([-1]), tensor([0]), "labels must be 0 to"), (EMPTY, EMPTY, "at least one example")],
    "precision": [(EMPTY, EMPTY, "at least one example"), (tensor([2]), tensor([0]), 'take "macro" or "micro"')],
    "recall": [(tensor([0.5]), tensor([0]), "must hold labels"), (tensor([0]), tensor([3]), "needs labels 0 and 1")],
    "f1": [(tensor([0, 1]), tensor([0]), r"got \[2\] and \[1\]"), (EMPTY, EMPTY, "at least one example")],
    "mse": [(EMPTY, EMPTY, "at least one example"), (torch.rand(3, 1), torch.rand(3), "squeeze")],
    "rmse": [(torch.rand(3, 1), torch.rand(3), "squeeze")],
    "r2": [(torch.rand(3, 1), torch.rand(3), "squeeze"), (EMPTY, EMPTY, "at least one example")],
}


@pytest.mark.verifies(
    "metrics.accuracy",
    "metrics.confusion_matrix",
    "metrics.precision",
    "metrics.recall",
    "metrics.f1",
    "metrics.mse",
    "metrics.rmse",
    "metrics.r2",
    kind="message",
    against="what was expected and what came",
    on="empty input, scores for labels, [N, 1] against [N], labels out of range",
)
@pytest.mark.parametrize(
    ("name", "predicted", "target", "text"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_wrong_input_says_what_is_wrong(name, predicted, target, text):
    with pytest.raises((ValueError, TypeError), match=text):
        getattr(metrics, name)(predicted, target)


def test_an_unknown_average_is_named():
    with pytest.raises(ValueError, match="'weighted'"):
        metrics.f1(tensor([0]), tensor([0]), "weighted")


def test_booleans_are_labels():
    predicted, target = tensor([True, True, False]), tensor([True, False, False])
    assert metrics.precision(predicted, target) == 0.5
    assert metrics.confusion_matrix(predicted, target).tolist() == [[1, 1], [0, 1]]
