"""Every rule ends on torch.optim's bits, and the loop behaves as a torch optimizer does."""

import copy
import json
import pickle
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
import torch

from bigmodel_course.optim import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    HeavyBall,
    Lion,
    Momentum,
    Muon,
    Optimizer,
    RMSProp,
    Rule,
)

LR = 0.01
SHAPES = [(7, 5), (11,), ()]
MATRICES = [(7, 5), (3, 8)]
DTYPES = [torch.float32, torch.float64]
verifies = pytest.mark.verifies
BITS = {"kind": "parity", "on": "1,000 given gradients and 200 training steps, float32 and float64", "bound": 0.0}


def loop(kind, **options):
    """torch's optimizer on its plain per-tensor path: the reference."""
    foreach = {} if kind is torch.optim.Muon else {"foreach": False}
    return partial(kind, **({"lr": LR} | options | foreach))


def halved(beta):
    """Momentum(beta) is torch's momentum at lr·(1 − beta), to the bit when 1 − beta is a power of two."""
    return loop(torch.optim.SGD, momentum=beta, lr=LR * (1 - beta))


sgd = verifies("optim.SGD", against="torch.optim.SGD(foreach=False)", **BITS)
ball = verifies("optim.HeavyBall", against="torch.optim.SGD(momentum=0.9, foreach=False)", **BITS)
mean = verifies("optim.Momentum", against="torch.optim.SGD(momentum=beta) at lr (1 - beta), beta 1/2, 3/4, 7/8", **BITS)
PAIRS = [
    pytest.param(SGD(), loop(torch.optim.SGD), id="sgd", marks=sgd),
    pytest.param(SGD(0.1), loop(torch.optim.SGD, weight_decay=0.1), id="sgd-decay", marks=sgd),
    pytest.param(Momentum(0.5), halved(0.5), id="momentum-1/2", marks=mean),
    pytest.param(Momentum(0.75), halved(0.75), id="momentum-3/4", marks=mean),
    pytest.param(Momentum(0.875), halved(0.875), id="momentum-7/8", marks=mean),
    pytest.param(HeavyBall(0.9), loop(torch.optim.SGD, momentum=0.9), id="heavy-ball", marks=ball),
    pytest.param(
        HeavyBall(0.9, nesterov=True, weight_decay=0.1),
        loop(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
        id="nesterov",
        marks=ball,
    ),
    pytest.param(
        Adagrad(),
        loop(torch.optim.Adagrad),
        id="adagrad",
        marks=verifies("optim.Adagrad", against="torch.optim.Adagrad(foreach=False)", **BITS),
    ),
    pytest.param(
        RMSProp(),
        loop(torch.optim.RMSprop),
        id="rmsprop",
        marks=verifies("optim.RMSProp", against="torch.optim.RMSprop(foreach=False)", **BITS),
    ),
    pytest.param(
        Adam(),
        loop(torch.optim.Adam),
        id="adam",
        marks=verifies("optim.Adam", against="torch.optim.Adam(foreach=False)", **BITS),
    ),
    pytest.param(
        Adam(amsgrad=True),
        loop(torch.optim.Adam, amsgrad=True),
        id="amsgrad",
        marks=verifies("optim.Adam", against="torch.optim.Adam(amsgrad=True, foreach=False)", **BITS),
    ),
    pytest.param(
        AdamW(weight_decay=0.1),
        loop(torch.optim.AdamW, weight_decay=0.1),
        id="adamw",
        marks=verifies("optim.AdamW", against="torch.optim.AdamW(foreach=False)", **BITS),
    ),
    pytest.param(
        Muon(),
        loop(torch.optim.Muon),
        id="muon",
        marks=verifies("optim.Muon", against="torch.optim.Muon", **BITS),
    ),
    pytest.param(
        Muon(nesterov=False, weight_decay=0.0),
        loop(torch.optim.Muon, nesterov=False, weight_decay=0.0),
        id="muon-plain",
        marks=verifies("optim.Muon", against="torch.optim.Muon(nesterov=False)", **BITS),
    ),
]
FOREACH = [p for p in PAIRS if not isinstance(p.values[0], Muon)]  # rules that take tensors of every shape


def leaves(rule=None, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = MATRICES if isinstance(rule, Muon) else SHAPES
    return [torch.randn(shape, dtype=dtype, generator=rng).requires_grad_() for shape in shapes]


def twins(params):
    return [p.detach().clone().requires_grad_() for p in params]


def give_gradients(*copies, rng):
    """The same random gradients, of sizes 1e-3 to 1e3, for every copy of the parameters."""
    for same in zip(*copies, strict=True):
        size = 10.0 ** float(torch.randint(-3, 4, (), generator=rng))
        g = size * torch.randn(same[0].shape, dtype=same[0].dtype, generator=rng)
        for p in same:
            p.grad = g.clone()


def gap(ours, theirs):
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max(float((a - b).abs().max()) for a, b in pairs)


def relative_gap(ours, theirs):
    ours, theirs = (torch.cat([p.detach().flatten() for p in params]) for params in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def largest_gap(make_ours, make_theirs, ours, *, steps, difference=gap):
    """Step both on the same gradients and return the largest difference on the way."""
    theirs, rng = twins(ours), torch.Generator().manual_seed(1)
    optimizers = make_ours(ours), make_theirs(theirs)
    largest = 0.0
    for _ in range(steps):
        give_gradients(ours, theirs, rng=rng)
        for optimizer in optimizers:
            optimizer.step()
        largest = max(largest, difference(ours, theirs))
    return largest


def trained(make, dtype, bias):
    """The parameters of a small network after 200 steps on minibatches."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, dtype=dtype, generator=rng)
    y = torch.sin(x.sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias), torch.nn.Tanh(), torch.nn.Linear(8, 1, bias)).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, dtype=dtype, generator=rng) / 3
    optimizer = make(list(model.parameters()))
    for step in range(200):
        part = slice(step % 4 * 16, step % 4 * 16 + 16)
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(("rule", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_to_the_bit(rule, reference, dtype, seen):
    make = partial(Optimizer, rule=rule, lr=LR)
    seen(largest_gap(make, reference, leaves(rule, dtype), steps=1000))
    bias = not isinstance(rule, Muon)
    seen(gap(trained(make, dtype, bias), trained(reference, dtype, bias)))


@verifies(
    "optim.Momentum", kind="parity", against="HeavyBall at lr (1 - beta)", on="beta 0.9, float64, relative", bound=1e-13
)
def test_the_two_conventions_of_momentum_differ_by_a_factor_of_the_learning_rate(seen):
    make, reference = (
        partial(Optimizer, rule=Momentum(0.9), lr=LR),
        partial(Optimizer, rule=HeavyBall(0.9), lr=LR * (1 - 0.9)),
    )
    seen(largest_gap(make, reference, leaves(), steps=100, difference=relative_gap))


def numpy_lion(p, gradients, lr, beta1, beta2, decay):
    """Chen et al. 2023, Algorithm 2, line by line."""
    m = np.zeros_like(p)
    for g in gradients:
        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (np.sign(c) + decay * p)
        m = beta2 * m + (1 - beta2) * g
    return p


@verifies(
    "optim.Lion",
    kind="parity",
    against="the paper's Algorithm 2 in NumPy",
    on="1,000 steps, float64, relative",
    bound=1e-13,
)
def test_lion_follows_its_paper(seen):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=20), rng.normal(size=(1000, 20))
    p = torch.tensor(start, requires_grad=True)
    optimizer = Optimizer([p], Lion(0.9, 0.98, weight_decay=0.1), LR)
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    expected = numpy_lion(start, gradients, LR, 0.9, 0.98, 0.1)
    seen(np.linalg.norm(p.detach().numpy() - expected) / np.linalg.norm(expected))


def optax_trajectory(transform, start, gradients):
    with jax.enable_x64(True):
        p = jax.numpy.asarray(start)
        state = transform.init(p)
        step = jax.jit(transform.update)
        for g in gradients:
            updates, state = step(jax.numpy.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
        return np.asarray(p)


SECOND = {"kind": "parity", "on": "1,000 steps, float64, relative", "bound": 1e-13}
OPTAX = [
    pytest.param(Adam(), optax.adam(LR), id="adam", marks=verifies("optim.Adam", against="optax.adam", **SECOND)),
    pytest.param(
        AdamW(weight_decay=0.1),
        optax.adamw(LR, weight_decay=0.1),
        id="adamw",
        marks=verifies("optim.AdamW", against="optax.adamw", **SECOND),
    ),
    pytest.param(
        Lion(weight_decay=0.1),
        optax.lion(LR, weight_decay=0.1),
        id="lion",
        marks=verifies("optim.Lion", against="optax.lion", **SECOND),
    ),
    pytest.param(
        HeavyBall(0.9),
        optax.sgd(LR, momentum=0.9),
        id="heavy-ball",
        marks=verifies("optim.HeavyBall", against="optax.sgd(momentum=0.9)", **SECOND),
    ),
]


@pytest.mark.parametrize(("rule", "reference"), OPTAX)
def test_agrees_with_optax(rule, reference, seen):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=20), rng.normal(size=(1000, 20))
    p = torch.tensor(start, requires_grad=True)
    optimizer = Optimizer([p], rule, LR)
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    expected = optax_trajectory(reference, start, gradients)
    seen(np.linalg.norm(p.detach().numpy() - expected) / np.linalg.norm(expected))


# --- typical bugs, planted: the comparison must catch every one ---


@dataclass(frozen=True)
class Planted(Adam):
    """Adam written out, with one bug named by `bug`; without a bug it is Adam."""

    bug: str = ""

    def update_(self, p, g, state, t, lr):
        beta1, beta2 = (self.beta2, self.beta1) if self.bug == "betas swapped" else (self.beta1, self.beta2)
        t = {"step counted twice": 2 * t, "step counted from 0": max(t - 1, 1), "step never counted": 1}.get(
            self.bug, t
        )
        m = state["m"].lerp_(g, 1.0 if self.bug == "no momentum" else 1 - beta1)
        squared = {"|g| for g²": g.abs().sqrt(), "g³ for g²": g.abs() ** 1.5}.get(self.bug, g)
        v = (
            state["v"]
            .mul_(beta2)
            .addcmul_(squared, squared, value=1.0 if self.bug == "a sum, not a mean" else 1 - beta2)
        )
        arrived1 = 1.0 if self.bug in ("no bias correction", "m not corrected") else 1 - beta1**t
        arrived2 = 1.0 if self.bug in ("no bias correction", "v not corrected") else 1 - beta2**t
        root = v.sqrt().div_(arrived2 if self.bug == "correction outside the root" else arrived2**0.5)
        if self.bug == "eps under the root":
            root = (v / arrived2 + self.eps).sqrt()
        elif self.bug == "eps before the correction":
            root = (v.sqrt() + self.eps) / arrived2**0.5
        elif self.bug != "no eps":
            root = root.add_(self.eps)
        size = lr / arrived1
        if self.bug == "decay in the gradient":
            g.add_(p, alpha=0.01)
        if self.bug == "two roundings":
            p.sub_(size * (m / root))
        else:
            p.addcdiv_(m, root, value=size if self.bug == "uphill" else -size)


BUGS = """no bias correction; m not corrected; v not corrected; correction outside the root; betas swapped; |g| for g²;
g³ for g²; eps under the root; eps before the correction; no eps; step counted twice; step counted from 0;
step never counted; no momentum; a sum, not a mean; two roundings; uphill""".replace("\n", " ").split("; ")


def planted_gap(bug):
    make = partial(Optimizer, rule=Planted(bug=bug), lr=LR)
    return largest_gap(make, loop(torch.optim.Adam), leaves(dtype=torch.float32), steps=25)


def test_the_rule_that_the_bugs_are_planted_in_has_none_of_its_own():
    assert planted_gap("") == 0.0


@verifies("optim.Adam", kind="invariant", against="17 planted bugs", on="25 steps: each leaves torch's bits")
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_leaves_the_bits_of_torch(bug):
    assert planted_gap(bug) > 0


@verifies(
    "optim.Adam",
    "optim.AdamW",
    kind="invariant",
    against="lr, the size of a corrected first step",
    on="gradients 1e-3 to 1e6",
    bound=1e-5,
)
@pytest.mark.parametrize("rule", [Adam(), Adam(amsgrad=True), AdamW(weight_decay=0.0)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_the_first_step_of_adam_has_the_size_of_the_learning_rate(rule, size, seen):
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([size, -size], dtype=torch.float64)
    Optimizer([p], rule, LR).step()
    for moved in p.detach().abs() / LR:
        seen(abs(float(moved) - 1))
    assert p[0] < 0 < p[1]


@verifies(
    "optim.Muon", kind="invariant", against="1, the singular values of the direction", on="random matrices", bound=0.5
)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9, 9)])
def test_muon_moves_about_equally_far_in_every_direction(shape, seen):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    uneven = u @ torch.diag(torch.logspace(0, -1.5, min(shape))) @ v  # singular values from 1 to 0.03
    for value in torch.linalg.svdvals(Muon().orthogonalized(uneven).float()):
        seen(abs(float(value) - 1))


def test_in_float32_a_small_decay_is_rounded_up_by_more_than_a_percent():
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.zeros(1)
    Optimizer([p], AdamW(weight_decay=0.01), 1e-4).step()
    assert (1 - p.double()).item() / 1e-6 == pytest.approx(1.0133, abs=1e-3)


# --- a drop-in: what torch's optimizers do beyond the rule ---

LEAVES = {
    "None": lambda: torch.randn(3),
    "empty": lambda: torch.empty(0, 4),
    "zero-dimensional": lambda: torch.tensor(0.3),
    "non-contiguous": lambda: torch.randn(4, 6).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "complex64": lambda: torch.randn(50, dtype=torch.complex64),
    "complex128": lambda: torch.randn(50, dtype=torch.complex128),
    "bfloat16": lambda: torch.randn(50, dtype=torch.bfloat16),
}


@verifies(
    "optim.Optimizer",
    kind="parity",
    against="torch.optim",
    on="None, empty, 0-d, strided, complex; 20 steps",
    bound=0.0,
)
@pytest.mark.parametrize(("rule", "reference"), [pytest.param(*p.values, id=p.id) for p in FOREACH])
@pytest.mark.parametrize("kind", LEAVES)
def test_odd_parameters_do_what_torch_does(kind, rule, reference, seen):
    torch.manual_seed(0)
    start = LEAVES[kind]()
    ours, theirs = (start.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    others = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizers = Optimizer([ours, others[0]], rule, LR), reference([theirs, others[1]])
    for step in range(20):
        g = torch.randn_like(start)
        for p, other, optimizer in zip((ours, theirs), others, optimizers, strict=True):
            p.grad = None if kind == "None" and step % 3 else g.clone(memory_format=torch.preserve_format)
            other.grad = torch.ones(2)
            optimizer.step()
    seen(gap([ours, others[0]], [theirs, others[1]]))
    assert ours.stride() == start.stride()


def run(optimizer, params, steps, seed=1):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradients(params, rng=rng)
        optimizer.step()


def stored_as(kind):
    """A state_dict after a round trip through a file, or with its step counts of another type."""

    def change(packed):
        for state in packed["state"].values():
            state["step"] = kind(state["step"])
        return packed

    return change


def through_json(packed):
    for group in packed["param_groups"]:
        assert json.loads(json.dumps(group)) == group
    return packed


WAYS = {
    "as it is": lambda packed: packed,
    "groups through JSON": through_json,
    "copied": copy.deepcopy,
    "step as a tensor": stored_as(lambda t: torch.tensor(float(t))),
    "step as a float": stored_as(float),
}


@verifies(
    "optim.Optimizer",
    kind="recovery",
    against="a run that was not interrupted",
    on="state_dict, 5 ways, all rules",
    bound=0.0,
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", [pytest.param(p.values[0], id=p.id) for p in PAIRS] + [Lion()])
def test_a_run_resumed_from_a_state_dict_is_the_run_itself(rule, way, seen):
    params = leaves(rule)
    optimizer = Optimizer(params, rule, lambda step: LR / (1 + step))
    run(optimizer, params, 5)
    resumed = twins(params)
    successor = Optimizer(resumed, type(rule)(), lambda step: LR / (1 + step))  # the rule's numbers come back too
    successor.load_state_dict(WAYS[way](copy.deepcopy(optimizer.state_dict())))
    run(optimizer, params, 5, seed=2)
    run(successor, resumed, 5, seed=2)
    seen(gap(params, resumed))


@verifies(
    "optim.Optimizer", kind="recovery", against="the optimizer it was copied from", on="deepcopy and pickle", bound=0.0
)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_goes_on_by_itself(duplicate, compiled, seen):
    params = leaves()
    optimizer = Optimizer(params, AdamW(), LR, compile=compiled)
    run(optimizer, params, 3)
    others, other = duplicate((params, optimizer))
    before = twins(params)
    run(other, others, 3, seed=2)
    assert gap(params, before) == 0
    run(optimizer, params, 3, seed=2)
    seen(gap(params, others))


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
}


@verifies("optim.Optimizer", kind="parity", against="torch.optim.Adam", on="5 schedulers of torch, 20 steps", bound=0.0)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [LR, torch.tensor(LR), torch.tensor([LR])], ids=["float", "0-d", "1-d"])
def test_schedulers_and_tensor_learning_rates_work_as_with_torch(name, lr, seen):
    def make(kind, params):
        own = lr.clone() if torch.is_tensor(lr) else lr  # a scheduler changes a tensor in place
        optimizer = Optimizer(params, Adam(), own) if kind == "ours" else torch.optim.Adam(params, own, foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        after = partial(scheduler.step, 1.0) if name == "plateau" else scheduler.step
        optimizer.register_step_post_hook(lambda *_: after())
        return optimizer

    seen(largest_gap(partial(make, "ours"), partial(make, "torch"), leaves(), steps=20))


@verifies("optim.Optimizer", kind="invariant", against="lr(0), lr(1), ...", on="a schedule", bound=0.0)
def test_a_schedule_is_counted_from_zero(seen):
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = Optimizer([p], SGD(), lambda step: 2.0**step)
    for step in range(5):
        p.grad, before = torch.ones_like(p), p.item()
        optimizer.step()
        seen(abs(before - p.item() - 2.0**step))


@verifies(
    "optim.Optimizer", kind="parity", against="torch.optim.SGD with GradScaler", on="30 steps, two overflow", bound=0.0
)
def test_grad_scaler_skips_the_steps_that_overflow(seen):
    ours = leaves(dtype=torch.float32)
    theirs, rng = twins(ours), torch.Generator().manual_seed(1)
    optimizers = Optimizer(ours, HeavyBall(), LR), loop(torch.optim.SGD, momentum=0.9)(theirs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in optimizers]
    for step in range(30):
        give_gradients(ours, theirs, rng=rng)
        for params, optimizer, scaler in zip((ours, theirs), optimizers, scalers, strict=True):
            scaler.scale(torch.ones(()))
            if step in (3, 17):
                params[0].grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == 256.0
    assert optimizers[0].state[ours[0]]["step"] == 28
    seen(gap(ours, theirs))


@verifies(
    "optim.Optimizer",
    kind="parity",
    against="two torch optimizers",
    on="a group with a rule, lr and decay of its own",
    bound=0.0,
)
def test_each_group_may_have_its_own_rule_and_learning_rate(seen):
    ours = leaves()
    theirs = twins(ours)
    groups = [
        {"params": ours[:1], "weight_decay": 0.2},
        {"params": ours[1:2], "rule": SGD(), "lr": lambda step: 0.1},
        {"params": ours[2:], "rule": RMSProp(), "maximize": True},
    ]
    mixed = Optimizer(groups, AdamW(), LR)
    assert [group["weight_decay"] for group in mixed.param_groups] == [0.2, 0.0, 0.0]
    assert [group["lr"] for group in mixed.param_groups] == [LR, 0.1, LR]
    separate = [
        loop(torch.optim.AdamW, weight_decay=0.2)(theirs[:1]),
        loop(torch.optim.SGD, lr=0.1)(theirs[1:2]),
        loop(torch.optim.RMSprop, maximize=True)(theirs[2:]),
    ]
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        give_gradients(ours, theirs, rng=rng)
        for optimizer in (mixed, *separate):
            optimizer.step()
    seen(gap(ours, theirs))


@verifies("optim.Optimizer", kind="parity", against="torch.optim with maximize=True", on="20 steps, 4 rules", bound=0.0)
@pytest.mark.parametrize("index", [1, 5, 7, 11])
def test_maximize_goes_uphill_as_torch_does(index, seen):
    rule, reference = FOREACH[index].values
    make = partial(Optimizer, rule=rule, lr=LR, maximize=True)
    seen(largest_gap(make, partial(reference, maximize=True), leaves(), steps=20))


@verifies(
    "optim.Optimizer", kind="invariant", against="the contract of torch.optim.Optimizer", on="closure, hooks, names"
)
def test_closures_see_gradients_and_hooks_are_called():
    p = torch.tensor([3.0], requires_grad=True)
    optimizer = Optimizer([("weight", p)], SGD(), 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert (loss.item(), p.item(), calls) == (9.0, 0.0, ["before", "closure", "after"])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]


@verifies(
    "optim.Optimizer",
    kind="invariant",
    against="the weight decay that stands in the group",
    on="a group changed on the way",
)
def test_a_changed_weight_decay_counts_at_the_next_step():
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = Optimizer([p], AdamW(weight_decay=0.0), 0.1)
    optimizer.step()
    assert p.item() == 1.0
    optimizer.param_groups[0]["weight_decay"] = 5.0
    optimizer.step()
    assert p.item() == 0.5


# --- errors ---

WRONG_RULES = [
    (lambda: Adam(beta1=1.0), "beta1 must be at least 0 and below 1, got 1.0"),
    (lambda: Adam(beta2=-0.1), "beta2 must be at least 0 and below 1, got -0.1"),
    (lambda: AdamW(eps=-1e-8), "eps must be a finite number of at least 0, got -1e-08"),
    (lambda: SGD(weight_decay=float("nan")), "weight_decay must be a finite number"),
    (lambda: HeavyBall(mu=-1), "mu must be a finite number of at least 0, got -1"),
    (lambda: RMSProp(alpha=2), "alpha must be at least 0 and below 1, got 2"),
    (lambda: Momentum(beta=1), "beta must be at least 0 and below 1, got 1"),
]


@verifies("optim.Rule", kind="message", against="what is wrong and what was expected", on="coefficients out of range")
@pytest.mark.parametrize(("make", "message"), WRONG_RULES)
def test_a_rule_refuses_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@verifies("optim.Rule", kind="message", against="the method that is missing", on="a rule without update_")
def test_a_rule_without_its_line_says_so():
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.ones(1)
    with pytest.raises(NotImplementedError, match="Rule must define update_"):
        Optimizer([p], Rule(), LR).step()


WEIGHT = [torch.ones(2, 2, requires_grad=True)]
WRONG = [
    (lambda: Optimizer(WEIGHT, Adam(), -1.0), ValueError, "lr must be finite and not negative, got -1.0"),
    (lambda: Optimizer(WEIGHT, Adam(), float("nan")), ValueError, "lr must be finite"),
    (lambda: Optimizer(WEIGHT, Adam(), "0.1"), TypeError, "lr must be a number.*got str"),
    (lambda: Optimizer(WEIGHT, Adam(), torch.ones(2)), ValueError, r"lr must have one element.*\(2,\)"),
    (lambda: Optimizer(WEIGHT, Adam(), lambda step: -1.0), ValueError, "lr must be finite and not negative, got -1.0"),
    (lambda: Optimizer(WEIGHT, Adam, 0.1), TypeError, r"rule must be a Rule such as Adam\(\)"),
    (lambda: Optimizer(WEIGHT, 0.1, 0.1), TypeError, r"rule must be a Rule such as Adam\(\), got 0.1"),
    (lambda: Optimizer([], Adam(), 0.1), ValueError, "empty parameter list"),
    (
        lambda: Optimizer([{"params": WEIGHT, "weight_decay": 0.1}], Adam(), 0.1),
        ValueError,
        "weight_decay must be 0 for Adam",
    ),
    (
        lambda: Optimizer([{"params": WEIGHT, "weight_decay": -1}], AdamW(), 0.1),
        ValueError,
        "weight_decay must be a finite",
    ),
    (
        lambda: Optimizer([torch.ones(3, requires_grad=True)], Muon(), 0.1),
        ValueError,
        r"real matrices for Muon, got shape \(3,\)",
    ),
]


@verifies("optim.Optimizer", kind="message", against="what is wrong and what was expected", on="11 wrong calls")
@pytest.mark.parametrize(("make", "kind", "message"), WRONG)
def test_a_wrong_call_says_what_is_wrong(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@verifies("optim.Optimizer", kind="message", against="a sparse gradient, before anything moves", on="an embedding")
def test_sparse_gradients_are_refused_before_anything_moves():
    table, other = torch.nn.Embedding(4, 2, sparse=True), torch.ones(2, requires_grad=True)
    (table(torch.tensor([1])).sum() + other.sum()).backward()
    optimizer = Optimizer([other, table.weight], SGD(), LR)
    with pytest.raises(TypeError, match=r"gradients must be dense.*use sparse=False"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))


@verifies("optim.Optimizer", kind="message", against="the names of both rules", on="a state_dict of another rule")
def test_a_state_dict_of_another_rule_is_refused():
    saved = Optimizer(WEIGHT, Adam(), LR).state_dict()
    with pytest.raises(ValueError, match=r"holds the state of Adam, but this group's rule is SGD\("):
        Optimizer(WEIGHT, SGD(), LR).load_state_dict(saved)


# --- compile=True ---


@pytest.fixture(autouse=True, scope="module")
def _own_compile_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def close(name, bound):
    precision = "float64" if bound < 1e-10 else "float32"
    on = f"compile=True, 1,000 steps, {precision}, relative L2"
    return verifies(name, kind="parity", against="torch.optim (foreach=False)", on=on, bound=bound)


COMPILED = [
    pytest.param(*p.values, dtype, id=f"{p.id}-{precision}", marks=close(f"optim.{type(p.values[0]).__name__}", bound))
    for p in FOREACH
    if p.id not in ("momentum-1/2", "momentum-7/8", "sgd")
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64))
    for bound in [
        {"float32": 3e-5, "float64": 1e-13}[precision]
        if p.id == "adamw"
        else {"float32": 1e-6, "float64": 1e-14}[precision]
    ]
]


@pytest.mark.parametrize(("rule", "reference", "dtype"), COMPILED)
def test_compiled_agrees_with_torch_up_to_rounding(rule, reference, dtype, seen):
    make = partial(Optimizer, rule=rule, lr=LR, compile=True)
    seen(largest_gap(make, reference, leaves(dtype=dtype), steps=1000, difference=relative_gap))


LION = {"kind": "parity", "against": "the same rule, not compiled"}


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            torch.float32,
            marks=verifies("optim.Lion", on="compile=True, 1,000 steps, float32, relative L2", bound=3e-5, **LION),
        ),
        pytest.param(
            torch.float64,
            marks=verifies("optim.Lion", on="compile=True, 1,000 steps, float64, relative L2", bound=1e-13, **LION),
        ),
    ],
)
def test_compiled_lion_agrees_with_lion(dtype, seen):
    make = partial(Optimizer, rule=Lion(weight_decay=0.1), lr=LR)
    seen(largest_gap(partial(make, compile=True), make, leaves(dtype=dtype), steps=1000, difference=relative_gap))


@verifies(
    "optim.Optimizer",
    kind="recovery",
    against="a run that was not interrupted",
    on="compile=True, state_dict",
    bound=0.0,
)
def test_a_compiled_run_can_be_resumed(seen):
    params = leaves()
    optimizer = Optimizer(params, Adam(amsgrad=True), LR, compile=True)
    run(optimizer, params, 5)
    resumed = twins(params)
    successor = Optimizer(resumed, Adam(amsgrad=True), LR, compile=True)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 5, seed=2)
    run(successor, resumed, 5, seed=2)
    seen(gap(params, resumed))


@verifies(
    "optim.Optimizer",
    kind="parity",
    against="torch.optim.AdamW",
    on="compile=True, None gradients, relative L2",
    bound=1e-14,
)
def test_compiled_a_parameter_without_a_gradient_is_left_out(seen):
    ours = leaves()
    theirs, rng = twins(ours), torch.Generator().manual_seed(1)
    optimizers = Optimizer(ours, AdamW(), LR, compile=True), loop(torch.optim.AdamW)(theirs)
    for step in range(20):
        give_gradients(ours, theirs, rng=rng)
        if 5 <= step < 8:
            ours[0].grad = theirs[0].grad = None
        for optimizer in optimizers:
            optimizer.step()
        seen(relative_gap(ours, theirs))
    assert [optimizers[0].state[p]["step"] for p in ours] == [17, 20, 20]


@verifies(
    "optim.Optimizer",
    kind="parity",
    against="torch.optim.AdamW",
    on="compile=True, maximize, a changed decay",
    bound=1e-14,
)
def test_compiled_options_may_change_on_the_way(seen):
    def decay(optimizer, *_):
        optimizer.param_groups[0]["weight_decay"] *= 0.9

    def make(kind, params):
        options = {"lr": LR, "maximize": True}
        ours = kind == "ours"
        optimizer = (
            Optimizer(params, AdamW(), **options, compile=True)
            if ours
            else torch.optim.AdamW(params, **options, foreach=False)
        )
        optimizer.register_step_post_hook(decay)
        return optimizer

    seen(largest_gap(partial(make, "ours"), partial(make, "torch"), leaves(), steps=20, difference=relative_gap))


@verifies("optim.Optimizer", kind="invariant", against="one buffer of a group", on="compile=True")
def test_compiled_parameters_and_gradients_live_in_one_buffer():
    params = leaves()
    optimizer = Optimizer(params, Adam(), LR, compile=True)
    run(optimizer, params, 1)
    for tensors in (params, [p.grad for p in params], [optimizer.state[p]["m"] for p in params]):
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    places = [p.grad.data_ptr() for p in params]
    optimizer.zero_grad(set_to_none=False)
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    assert [p.grad.data_ptr() for p in params] == places


@dataclass(frozen=True)
class Mine(Adam):
    """A rule of a reader's own: that it derives from Adam does not give it Adam's compiled lines."""


REFUSED = [
    (lambda: WEIGHT, Muon(), "Muon has no compiled form"),
    (lambda: WEIGHT, Mine(), "Mine has no compiled form"),
    (
        lambda: [torch.ones(2, dtype=torch.complex64, requires_grad=True)],
        Adam(),
        "real floating-point numbers.*complex64",
    ),
    (
        lambda: [torch.ones(2, dtype=d, requires_grad=True) for d in DTYPES],
        Adam(),
        "one dtype and one device.*float32.*float64",
    ),
    (lambda: [torch.ones(2, 3).t().requires_grad_()], Adam(), "contiguous"),
]


@verifies("optim.Optimizer", kind="message", against="what cannot be compiled and what to do", on="5 groups")
@pytest.mark.parametrize(("params", "rule", "message"), REFUSED)
def test_what_cannot_be_compiled_is_refused(params, rule, message):
    with pytest.raises(ValueError, match=f"compile=True: .*{message}.*use compile=False"):
        Optimizer(params(), rule, LR, compile=True)


@verifies("optim.Optimizer", kind="message", against="the missing C++ compiler", on="compile=True")
def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    params = leaves()
    before = twins(params)
    optimizer = Optimizer(params, replace(Adam(), eps=1.234e-8), LR, compile=True)  # a rule not compiled yet
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with no_compiler, pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*compile=False"):
        run(optimizer, params, 1)
    assert gap(params, before) == 0
