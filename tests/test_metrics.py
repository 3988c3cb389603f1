"""Every metric is scikit-learn's number, on empty and one-class input too."""

import math
import warnings

import numpy as np
import pytest
import sklearn.calibration
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


@pytest.mark.verifies(
    "metrics.expected_calibration_error",
    kind="parity",
    against="sklearn.calibration.calibration_curve, its bins weighted by their counts",
    on="random softmax rows of 2 to 7 classes, sharp and flat, 1 to 200 examples, 1 to 20 bins",
    bound=1e-12,
)
@pytest.mark.parametrize("seed", range(20))
def test_the_calibration_error_is_that_of_scikit_learns_curve(seed, seen):
    rng = torch.Generator().manual_seed(seed)
    n, classes, bins = (
        torch.randint(low, high, (1,), generator=rng).item() for low, high in ((1, 201), (2, 8), (1, 21))
    )
    scores = torch.randn(n, classes, dtype=torch.float64, generator=rng) * 3 * torch.rand(1, generator=rng)
    probabilities, target = scores.softmax(1), torch.randint(classes, (n,), generator=rng)
    confidence, predicted = probabilities.max(1)
    right = (predicted == target).numpy()
    shares, means = sklearn.calibration.calibration_curve(right, confidence.numpy(), n_bins=bins)
    counts, _ = np.histogram(
        np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence.numpy()), np.arange(bins + 1)
    )
    want = (abs(shares - means) * counts[counts > 0]).sum() / n
    seen(abs(metrics.expected_calibration_error(probabilities, target, bins) - want))


@pytest.mark.verifies(
    "metrics.expected_calibration_error",
    kind="message",
    against="what was expected and what came",
    on="scores for probabilities, one number an example, labels of another length, no example",
)
@pytest.mark.parametrize(
    ("probabilities", "target", "text"),
    [
        (tensor([[2.0, 1.0]]), tensor([0]), "softmax"),
        (tensor([0.5]), tensor([0]), r"probabilities \[N, C\]"),
        (tensor([[0.5, 0.5]]), tensor([0, 1]), r"\[1\] and \[2\]"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "at least one"),
    ],
)
def test_calibration_needs_probabilities(probabilities, target, text):
    with pytest.raises(ValueError, match=text):
        metrics.expected_calibration_error(probabilities, target)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    sure = tensor([[1.0, 0.0], [0.0, 1.0]])
    assert metrics.expected_calibration_error(sure, tensor([0, 1])) == 0
    assert metrics.expected_calibration_error(sure, tensor([1, 0])) == 1


def test_an_unknown_average_is_named():
    with pytest.raises(ValueError, match="'weighted'"):
        metrics.f1(tensor([0]), tensor([0]), "weighted")


def test_booleans_are_labels():
    predicted, target = tensor([True, True, False]), tensor([True, False, False])
    assert metrics.precision(predicted, target) == 0.5
    assert metrics.confusion_matrix(predicted, target).tolist() == [[1, 1], [0, 1]]
