"""What `costs` predicts is what torch counts, holds in memory, or does on a quadratic."""

from itertools import combinations, product
from statistics import fmean, pvariance

import numpy as np
import optax
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_course import costs, models

verifies = pytest.mark.verifies
TINY = costs.GPTConfig(layers=2, heads=4, width=32, context=16)


def fresh():
    return torch.Generator().manual_seed(0)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def counted_flops(make, *shape, dtype=torch.float32):
    """What torch counts for one example: forward, and forward + backward.

    On the meta device: it is quick for any size, and attention there is plain matrix products.  The fused attention of
    the CPU is unknown to torch's counter, which gives it 0 FLOPs.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        out = make()(torch.empty(1, *shape, dtype=dtype))
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


def kept_numbers(module, x):
    """How many numbers autograd keeps for the backward pass: each storage once, the parameters' own left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()  # held in `kept`, so that no later tensor can have its address
        kept[storage.data_ptr()] = (storage, storage.nbytes() // tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(numbers for address, (_, numbers) in kept.items() if address not in own)


def row(names, id, layers, make, *shape):
    mark = verifies(
        *names,
        kind="parity",
        against="numel, FlopCounterMode (forward, and with backward), saved_tensors_hooks",
        on="parameters, FLOPs, numbers kept for the backward pass",
        bound=0,
    )
    return pytest.param(layers, make, shape, id=id, marks=mark)


def gpt_row(id, config, tokens=None):
    names = ("costs.gpt", "costs.GPTConfig", "costs.Layer", "models.GPT", "models.GPT_SIZES", "models.GPTConfig")
    layers = costs.gpt(config, tokens=tokens)
    return row(names, id, layers, lambda: models.GPT(config, generator=fresh()), tokens or config.context)


UNTIED = costs.GPTConfig(layers=1, heads=2, width=24, context=20, vocabulary=50, tied=False)
CNN = ("costs.small_cnn", "models.SmallCNN", "costs.total", "costs.training_flops")
MLP = ("costs.mlp", "models.MLP", "costs.total", "costs.training_flops")
LENET = ("costs.lenet_300_100", "models.LeNet300100")
SMALL = [
    row(("costs.linear",), "linear", [costs.linear(7, 5)], lambda: nn.Linear(7, 5), 7),
    row(("costs.linear",), "rows", [costs.linear(7, 5, rows=3, bias=False)],
        lambda: nn.Linear(7, 5, bias=False), 3, 7),
    row(("costs.conv2d",), "conv", [costs.conv2d(3, 4, 9)], lambda: nn.Conv2d(3, 4, 3, padding=1), 3, 9, 9),
    row(("costs.conv2d",), "stride", [costs.conv2d(3, 4, 9, kernel=5, stride=2)],
        lambda: nn.Conv2d(3, 4, 5, stride=2, padding=2), 3, 9, 9),
    row(("models.digit_model",), "digits", costs.mlp((64, 128, 10)), lambda: models.digit_model(generator=fresh()), 64),
    row(MLP, "mlp", costs.mlp((64, 50, 20, 10)), lambda: models.MLP((64, 50, 20, 10), generator=fresh()), 64),
    row(LENET, "lenet", costs.lenet_300_100(), lambda: models.LeNet300100(generator=fresh()), 784),
    row(CNN, "cnn 8", costs.small_cnn(), lambda: models.SmallCNN(generator=fresh()), 64),
    row(CNN, "cnn 28", costs.small_cnn(28), lambda: models.SmallCNN(28, generator=fresh()), 1, 28, 28),
    row(CNN, "cnn odd", costs.small_cnn(15, (4, 6, 8), 3),
        lambda: models.SmallCNN(15, (4, 6, 8), 3, generator=fresh()), 225),
    gpt_row("gpt tiny", TINY),
    gpt_row("gpt short", TINY, tokens=11),
    gpt_row("gpt untied", UNTIED),
]  # fmt: skip
SIZES = [gpt_row(f"gpt {name}", config) for name, config in models.GPT_SIZES.items()]


@pytest.mark.parametrize(("layers", "make", "shape"), SMALL + SIZES)
def test_parameters_and_flops_are_what_torch_counts(layers, make, shape, seen):
    with torch.device("meta"):
        seen(abs(costs.total(layers).parameters - parameters(make())))
    is_gpt = layers[0].name == "embedding"
    forward, both = counted_flops(make, *shape, dtype=torch.int64 if is_gpt else torch.float32)
    seen(abs(costs.total(layers).flops - forward))
    seen(abs(costs.training_flops(layers) - both))


@pytest.mark.parametrize(("layers", "make", "shape"), SMALL + SIZES[:1])
@pytest.mark.parametrize("batch", [1, 5])
def test_activations_are_what_autograd_keeps(layers, make, shape, batch, seen):
    is_gpt = layers[0].name == "embedding"
    x = torch.zeros(batch, *shape, dtype=torch.int64) if is_gpt else torch.zeros(batch, *shape)
    seen(abs(batch * costs.total(layers).activations - kept_numbers(make(), x)))


@verifies("costs.gpt", "models.GPT_SIZES", kind="parity", against="GPT-2's smallest, as published",
          on="parameters and tensors of the 124M size", bound=0)  # fmt: skip
def test_the_124m_size_is_gpt2(seen):
    with torch.device("meta"):
        model = models.GPT(models.GPT_SIZES["124M"], generator=fresh())
    seen(abs(costs.total(costs.gpt(models.GPT_SIZES["124M"])).parameters - 124_439_808))
    seen(abs(len(list(model.parameters())) - 148))
    seen(abs(len(model.state_dict()) - 148))


@pytest.mark.parametrize(("name", "config"), models.GPT_SIZES.items())
def test_a_size_is_named_for_its_parameters(name, config):
    assert costs.total(costs.gpt(config)).parameters == pytest.approx(float(name[:-1]) * 1e6, rel=0.1)


@verifies("costs.Layer", "costs.total", kind="invariant", against="pandas' sum of the columns", on="a GPT", bound=0)
def test_layers_are_the_rows_of_a_table(seen):
    layers = costs.gpt(TINY)
    sums = pd.DataFrame(layers)[["parameters", "flops", "activations"]].sum()
    seen(max(abs(sums - pd.Series(costs.total(layers)._asdict()).drop("name"))))


# Training

TORCH_RULES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "HeavyBall": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9),
    "Adagrad": torch.optim.Adagrad,
    "RMSProp": torch.optim.RMSprop,
    "Muon": torch.optim.Muon,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AMSGrad": lambda p: torch.optim.Adam(p, amsgrad=True),
}


def after_one_step(rule, shape):
    """A model of one matrix, and the tensors that torch's `rule` keeps for it."""
    model = nn.Linear(*shape, bias=False)
    optimizer = TORCH_RULES[rule](model.parameters())
    model(torch.ones(8, shape[0])).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    return model, [t for key, t in state.items() if torch.is_tensor(t) and key != "step"]


@verifies("costs.optimizer_bytes", "costs.training_bytes", "costs.optimizer_step_bytes", kind="parity",
          against="bytes of the tensors that torch.optim keeps after a step",
          on="one matrix, 9 rules; traffic: weight and states twice, gradient once", bound=0)  # fmt: skip
@pytest.mark.parametrize("rule", TORCH_RULES)
def test_bytes_are_those_that_torch_holds(rule, seen):
    model, states = after_one_step(rule, (24, 16))
    n, kept = 24 * 16, sum(t.nbytes for t in states)
    weight, grad = model.weight.nbytes, model.weight.grad.nbytes
    seen(abs(costs.optimizer_bytes(n, rule) - kept))
    seen(abs(costs.training_bytes(n, rule, activations=8 * 24) - (weight + grad + kept + 8 * 24 * 4)))
    seen(abs(costs.optimizer_step_bytes(n, rule) - (weight + grad + kept) - (weight + kept)))


@verifies("costs.optimizer_bytes", kind="parity", against="optax.lion", on="bytes of its state", bound=0)
def test_lion_remembers_what_optax_remembers(seen):
    state = optax.lion(0.1).init(np.zeros((5, 7), np.float32))
    seen(abs(costs.optimizer_bytes(35, "Lion") - state[0].mu.nbytes))


def test_adam_moves_28_bytes_a_parameter():
    assert costs.optimizer_step_bytes(1, "Adam") == 28


@verifies("costs.seconds", kind="invariant", against="seconds * rate = amount", on="hypothesis, relative difference",
          bound=1e-15)  # fmt: skip
def test_seconds_times_rate_is_the_amount(seen):
    @given(st.floats(1e-3, 1e24), st.floats(1e-3, 1e18))
    def check(amount, rate):
        seen(abs(costs.seconds(amount, rate) * rate / amount - 1))

    check()


# Optimization

KAPPAS = [1.0, 1.5, 10.0, 1000.0]


@verifies("costs.gradient_descent_rate", kind="invariant", against="gradient descent, run on a quadratic",
          on="20 steps at lr = 2 / (1 + kappa), relative difference of the error", bound=1e-12)  # fmt: skip
@pytest.mark.parametrize("kappa", KAPPAS)
def test_gradient_descent_falls_at_the_predicted_rate(kappa, seen):
    curvatures = np.array([1.0, kappa])
    x = np.ones(2)
    for _ in range(20):
        new = x - 2 / (1 + kappa) * curvatures * x
        seen(np.linalg.norm(new) - costs.gradient_descent_rate(kappa) * np.linalg.norm(x))
        x = new


@verifies("costs.heavy_ball_rate", kind="invariant", against="largest eigenvalue (numpy) of one step",
          on="99 curvatures from 1 to kappa, at the best lr and momentum", bound=1e-12)  # fmt: skip
@pytest.mark.parametrize("kappa", KAPPAS[1:])
def test_heavy_ball_contracts_every_direction_at_the_predicted_rate(kappa, seen):
    rate = costs.heavy_ball_rate(kappa)
    momentum, lr = rate**2, (2 / (1 + kappa**0.5)) ** 2
    for curvature in np.linspace(1, kappa, 101)[1:-1]:  # at both ends a double root: numpy finds it to 1e-8 only
        step = np.array([[1 + momentum - lr * curvature, -momentum], [1.0, 0.0]])
        seen(abs(max(abs(np.linalg.eigvals(step))) - rate))
    assert rate < costs.gradient_descent_rate(kappa)


@verifies("costs.stability_limit", kind="invariant", against="gradient descent, run on a quadratic",
          on="1,000 steps just below and just above the limit")  # fmt: skip
@pytest.mark.parametrize("largest", [0.3, 1.0, 40.0])
def test_the_stability_limit_separates_falling_from_growing(largest):
    below, above = (abs(1 - share * costs.stability_limit(largest) * largest) ** 1000 for share in (0.999, 1.001))
    assert below < 0.2
    assert above > 5


@verifies("costs.steps_to_reach", kind="invariant", against="enough, and one fewer is not enough", on="hypothesis")
@given(rate=st.floats(1e-3, 0.9999), reduction=st.floats(1e-9, 0.999))
def test_steps_to_reach_is_the_fewest(rate, reduction):
    steps = costs.steps_to_reach(rate, reduction)
    assert rate**steps <= reduction * (1 + 1e-7)
    assert rate ** (steps - 1) > reduction


@pytest.mark.parametrize(
    ("rate", "reduction", "steps"), [(0.9, 0.729, 3), (0.5, 0.25, 2), (0.9, 1.0, 0), (0.0, 0.5, 1)]
)
def test_rounding_adds_no_step(rate, reduction, steps):
    assert costs.steps_to_reach(rate, reduction) == steps


@verifies("costs.bias_correction", kind="invariant", against="the running mean of ones, computed",
          on="200 steps, three betas", bound=1e-12)  # fmt: skip
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999])
def test_bias_correction_is_the_weight_that_has_arrived(beta, seen):
    mean = 0.0
    for t in range(1, 201):
        mean = beta * mean + (1 - beta)
        seen(abs(mean / costs.bias_correction(beta, t) - 1))


@verifies("costs.batch_variance", kind="invariant", against="the variance over every possible batch",
          on="6 gradients, batches of 1 to 6, with and without replacement", bound=1e-12)  # fmt: skip
@pytest.mark.parametrize("batch", range(1, 7))
def test_batch_variance_is_that_of_all_batches(batch, seen):
    gradients = [0.3, -1.2, 2.5, 0.0, 7.1, -0.4]
    single = pvariance(gradients)
    without = pvariance([fmean(chosen) for chosen in combinations(gradients, batch)])
    seen(abs(costs.batch_variance(single, batch, population=6) - without))
    with_replacement = pvariance([fmean(chosen) for chosen in product(gradients, repeat=batch)])
    seen(abs(costs.batch_variance(single, batch) - with_replacement))


@verifies("costs.noise_scale", "costs.steps_at_batch", kind="invariant",
          against="the best possible step on |x|**2 / 2, by exact line search (scipy)",
          on="batches from 1 to 1,000, relative difference of the expected gain", bound=1e-8)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 8, 1000])
def test_a_step_gains_what_the_noise_scale_says(batch, seen):
    gradient, variances = np.array([3.0, -1.0, 2.0]), np.array([5.0, 0.5, 40.0])
    squared = gradient @ gradient

    def expected_loss(lr):  # of x - lr * g where g is the mean of a batch and x = gradient
        return ((1 - lr) ** 2 * squared + lr**2 * costs.batch_variance(variances.sum(), batch)) / 2

    gain = squared / 2 - minimize_scalar(expected_loss, tol=1e-12).fun
    slower = costs.steps_at_batch(1.0, batch, costs.noise_scale(variances.sum(), squared))
    seen(abs(gain / (squared / 2 / slower) - 1))


@verifies("costs.sgd_noise_floor", kind="invariant", against="the mean of x**2 after each step, by its recursion",
          on="until it stays, relative difference", bound=1e-12)  # fmt: skip
@pytest.mark.parametrize(("lr", "curvature", "variance"), [(0.1, 1.0, 1.0), (0.5, 3.0, 0.2), (1.9, 1.0, 4.0)])
def test_sgd_stays_at_the_noise_floor(lr, curvature, variance, seen):
    square = 1.0
    for _ in range(1000):
        square = (1 - lr * curvature) ** 2 * square + lr**2 * variance
    seen(abs(curvature * square / 2 / costs.sgd_noise_floor(lr, curvature, variance) - 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costs.linear(0, 3), r"need inputs >= 1, got inputs=0"),
        (lambda: costs.conv2d(1, 2, 8, kernel=4), r"need an odd kernel, got kernel=4"),
        (lambda: costs.mlp([10]), r"need at least two widths, input and output, got widths=\(10,\)"),
        (lambda: costs.small_cnn(side=0), r"need side >= 1, got side=0"),
        (lambda: costs.GPTConfig(1, 5, 32, 8), r"need a width that the heads divide, got width=32 and heads=5"),
        (lambda: costs.GPTConfig(0, 5, 30, 8), r"need layers >= 1, got layers=0"),
        (lambda: costs.gpt(TINY, tokens=17), r"need 1 <= tokens <= context = 16, got tokens=17"),
        (lambda: costs.optimizer_bytes(1, "adam"), r"need a rule among SGD, .*, Adam, .*, got rule='adam'"),
        (lambda: costs.training_bytes(1, "Sgd"), r"got rule='Sgd'"),
        (lambda: costs.optimizer_step_bytes(1, ""), r"got rule=''"),
        (lambda: costs.seconds(1, 0), r"need rate > 0, got rate=0"),
        (lambda: costs.gradient_descent_rate(0.5), r"need kappa >= 1, got kappa=0.5"),
        (lambda: costs.heavy_ball_rate(-1), r"need kappa >= 1, got kappa=-1"),
        (lambda: costs.stability_limit(0), r"need largest_eigenvalue > 0, got largest_eigenvalue=0"),
        (lambda: costs.steps_to_reach(1.0, 0.1), r"need 0 <= rate < 1 .* got rate=1.0 and reduction=0.1"),
        (lambda: costs.bias_correction(0.9, 0), r"steps count from 1\), got beta=0.9 and t=0"),
        (lambda: costs.batch_variance(1.0, 9, 8), r"need batch <= population, got batch=9 and population=8"),
        (lambda: costs.noise_scale(1.0, 0.0), r"need squared_norm > 0, got squared_norm=0.0"),
        (lambda: costs.steps_at_batch(10, 0, 1.0), r"need batch >= 1, got batch=0"),
        (lambda: costs.sgd_noise_floor(2.0, 1.0, 1.0), r"need 0 < lr < 2 / curvature, got lr=2.0 and curvature=1.0"),
    ],
)
@verifies(
    "costs.linear", "costs.conv2d", "costs.mlp", "costs.small_cnn", "costs.GPTConfig", "costs.gpt",
    "costs.optimizer_bytes", "costs.training_bytes", "costs.optimizer_step_bytes", "costs.seconds",
    "costs.gradient_descent_rate", "costs.heavy_ball_rate", "costs.stability_limit", "costs.steps_to_reach",
    "costs.bias_correction", "costs.batch_variance", "costs.noise_scale", "costs.steps_at_batch",
    "costs.sgd_noise_floor",
    kind="message", against="the argument, what was expected, what came", on="one wrong call each",
)  # fmt: skip
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
