"""Weight sharing: k-means exact in one dimension, and shared values that learn from the sum of gradients."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from bigmodel_course.compression.sharing import (
    Codebook,
    CodedLayer,
    Shared,
    codebooks,
    order_neurons,
    share,
    share_weights_,
    shared_gradient,
)
from bigmodel_course.models import MLP
from bigmodel_course.optim import Momentum, Optimizer


def weight(seed=0, shape=(30, 40), kept=0.3):
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice) * (torch.rand(shape, generator=dice) < kept)


def inertia(numbers, centers):
    return ((numbers[:, None] - np.asarray(centers, dtype=float)) ** 2).min(1).sum()


@pytest.mark.verifies(
    "compression.sharing.share",
    kind="parity",
    against="sklearn.cluster.KMeans from the same first values: values, and inertia never higher (relative)",
    on="360 weights of a sparse layer, 2 to 16 values, linear and density starts",
    bound=1e-6,
)
@pytest.mark.parametrize("values", [2, 4, 8, 16])
@pytest.mark.parametrize("init", ["linear", "density"])
def test_values_are_scikit_learns(values, init, seen):
    for seed in range(3):
        w = weight(seed)
        numbers = np.sort(w[w != 0].double().numpy())
        if init == "linear":
            first = np.linspace(numbers[0], numbers[-1], values)
        else:
            first = np.quantile(numbers, (np.arange(values) + 0.5) / values)
        theirs = KMeans(values, init=first[:, None], n_init=1, max_iter=1000, tol=0).fit(numbers[:, None])
        ours = share(w, values, init=init)
        assert len(ours.values) == values
        seen(np.abs(ours.values.numpy() - np.sort(theirs.cluster_centers_[:, 0])).max())
        seen(max(0.0, inertia(numbers, ours.values) / theirs.inertia_ - 1))


@pytest.mark.verifies(
    "compression.sharing.share",
    "compression.sharing.Codebook",
    kind="invariant",
    against="each kept weight takes its nearest value, each value is the mean of its weights (absolute)",
    on="any numbers, also equal ones, few and none, three starts",
    bound=1e-5,
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5]) | st.floats(-4, 4, width=32, allow_subnormal=False), max_size=60),
    st.integers(1, 12),
    st.sampled_from(["linear", "density", "random"]),
)
def test_weights_take_the_nearest_value_and_values_are_means(seen, numbers, values, init):
    w = torch.tensor(numbers)
    with warnings.catch_warnings(action="error"):  # here alone: what an earlier test left to the collector may warn too
        book = share(w, values, init=init, generator=torch.Generator().manual_seed(0))
    kept = w != 0
    assert torch.equal(book.codes > 0, kept)
    assert len(book.values) <= values
    decoded = book.decode()
    assert torch.equal(decoded[~kept], w[~kept])
    distances = (w[kept, None] - book.values).abs()
    seen(((w - decoded).abs()[kept] - distances.min(1).values).max() if kept.any() else 0)
    for code, value in enumerate(book.values, 1):
        members = w[book.codes == code].double()
        assert len(members)
        seen((members.mean() - value).abs())
    if len(set(w[kept].tolist())) <= values:
        assert torch.equal(decoded, w)


def test_linear_starts_keep_the_large_weights():
    w = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.tensor([9.0, -9.0])])
    assert share(w, 8).values.abs().max() > share(w, 8, init="density").values.abs().max()


def test_a_mask_decides_what_is_kept():
    w = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    mask = torch.tensor([[True, True], [False, True]])
    assert torch.equal(share(w, 3, mask=mask).decode(), w * mask)


@pytest.mark.verifies(
    "compression.sharing.shared_gradient",
    "compression.sharing.Shared",
    "compression.sharing.share_weights_",
    kind="parity",
    against="autograd through indexing with the codes, and the sum over masks",
    on="a layer of 8 values in float64",
    bound=1e-12,
)
def test_the_gradient_of_a_value_is_the_sum_of_its_weights(seen):
    book = share(weight(), 8)
    gradient = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = shared_gradient(gradient, book.codes, 8)
    values = book.values.double().requires_grad_()
    (torch.cat([torch.zeros(1), values])[book.codes.long()] * gradient).sum().backward()
    seen((ours - values.grad).abs().max())
    seen((ours - torch.stack([gradient[book.codes == c].sum() for c in range(1, 9)])).abs().max())
    values.grad = None
    (Shared(book.codes)(values) * gradient).sum().backward()
    seen((ours - values.grad).abs().max())


@pytest.mark.verifies(
    "compression.sharing.share_weights_",
    "compression.sharing.codebooks",
    "compression.sharing.Shared",
    kind="parity",
    against="the same steps by hand: values minus rate times shared_gradient",
    on="20 steps of SGD with momentum, torch's and ours",
    bound=1e-6,
)
@pytest.mark.parametrize("ours", [True, False])
def test_fine_tuning_moves_the_values_by_the_summed_gradient(ours, seen):
    generator = torch.Generator().manual_seed(0)
    model = MLP((10, 8, 3), generator=generator)
    x, y = torch.randn(64, 10, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    name = "layers.0.weight"
    book = share(model.layers[0].weight.detach() * (torch.rand(8, 10, generator=generator) < 0.5), 4)
    plain = MLP((10, 8, 3), generator=torch.Generator().manual_seed(0))
    parameters = share_weights_(model, {name: book})
    assert [p.shape for p in parameters] == [book.values.shape]
    optimizer = Optimizer(parameters, Momentum(0.9), 0.1) if ours else torch.optim.SGD(parameters, 0.1)
    values, velocity, loss = book.values.clone(), torch.zeros(4), nn.CrossEntropyLoss()
    for _ in range(20):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        plain.layers[0].weight.data = Codebook(values, book.codes).decode()
        plain.zero_grad()
        loss(plain(x), y).backward()
        step = shared_gradient(plain.layers[0].weight.grad, book.codes, 4)
        velocity = 0.9 * velocity + 0.1 * step if ours else step
        values = values - 0.1 * velocity
    trained = codebooks(model)[name]
    assert not torch.equal(trained.values, book.values)
    assert torch.equal(trained.codes, book.codes)
    assert torch.equal(model.layers[0].weight, trained.decode())
    seen((trained.values - values).abs().max())


def layers(widths, seed=0):
    shapes = [(b, a) for a, b in itertools.pairwise(widths)]
    return [CodedLayer(share(weight(seed, shape, 0.1), 4), torch.linspace(-1, 1, shape[0])) for shape in shapes]


def scores(coded, x):
    *hidden, last = [(layer.weight.decode().double(), layer.bias.double()) for layer in coded]
    for w, b in hidden:
        x = (x @ w.T + b).relu()
    return x @ last[0].T + last[1]


@pytest.mark.verifies(
    "compression.sharing.order_neurons",
    "compression.sharing.CodedLayer",
    kind="parity",
    against="the scores of the model before",
    on="three layers with dead neurons, float64",
    bound=1e-12,
)
def test_ordered_neurons_compute_the_same(seen):
    stored = layers((30, 20, 10, 4))
    ordered = order_neurons(stored)
    x = torch.rand(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen((scores(stored, x) - scores(ordered, x)).abs().max())
    for layer, before in zip(ordered[:-1], stored, strict=False):
        busy = (layer.weight.codes > 0).sum(1)
        assert (busy.diff() <= 0).all()
        assert not torch.equal(layer.bias, before.bias)


@pytest.mark.verifies(
    "compression.sharing.share",
    "compression.sharing.Codebook",
    "compression.sharing.share_weights_",
    "compression.sharing.order_neurons",
    kind="message",
    against="ValueError or TypeError",
    on="NaN, infinity, too many values, unknown start, no generator, wrong mask, codes without a value",
)
def test_wrong_input_is_named():
    w = weight()
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="weight must be finite"):
            share(torch.tensor([1.0, bad]), 2)
    for values in (0, 256, 2.0):
        with pytest.raises(ValueError, match="values must be a whole number from 1 to 255"):
            share(w, values)
    with pytest.raises(ValueError, match="init must be one of"):
        share(w, 4, init="best")
    with pytest.raises(TypeError, match=r"needs a torch\.Generator"):
        share(w, 4, init="random")
    with pytest.raises(ValueError, match=r"mask must be bool \[30, 40\]"):
        share(w, 4, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="codes up to 3 and 2 values"):
        Codebook(torch.zeros(2), torch.tensor([3], dtype=torch.uint8))
    with pytest.raises(ValueError, match="values must be finite, float32"):
        Codebook(torch.tensor([torch.nan]), torch.tensor([1], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must have codes of shape \[8, 10\], got \[30, 40\]"):
        share_weights_(MLP((10, 8), generator=torch.Generator()), {"layers.0.weight": share(w, 2)})
    with pytest.raises(ValueError, match="each as wide as the one before"):
        order_neurons([*layers((5, 4)), *layers((5, 4))])
