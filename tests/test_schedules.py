"""Every schedule follows its torch counterpart over a whole run, and is a plain function of the step."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as theirs

from bigmodel_course import schedules as ours

verifies = pytest.mark.verifies


def sgd(lr):
    return torch.optim.SGD([torch.zeros(1)], lr=lr)


def torch_rates(scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def relative(got, want):
    """The difference in units of `want`; both 0 is no difference."""
    return 0.0 if got == want else abs(got - want) / abs(want)


def climb(optimizer, warmup):
    return theirs.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)


def warmup_cosine(optimizer, warmup, total, floor):
    parts = [climb(optimizer, warmup), theirs.CosineAnnealingLR(optimizer, total - warmup, eta_min=floor)]
    return theirs.SequentialLR(optimizer, parts, milestones=[warmup])


def warmup_stable_decay(optimizer, warmup, stable, decay, end_factor):
    parts = [
        climb(optimizer, warmup),
        theirs.ConstantLR(optimizer, factor=1.0),
        theirs.LinearLR(optimizer, start_factor=1.0, end_factor=end_factor, total_iters=decay),
    ]
    return theirs.SequentialLR(optimizer, parts, milestones=[warmup, warmup + stable])


def row(name, against, schedule, make, steps):
    mark = verifies(
        f"schedules.{name}",
        kind="parity",
        against=f"torch.optim.lr_scheduler: {against}",
        on="every step of whole runs, relative difference",
        bound=1e-12,
    )
    return pytest.param(schedule, make, steps, id=f"{name}-{steps}", marks=mark)


CASES = [
    row("constant", "ConstantLR(factor=1)", ours.constant(0.3), lambda: theirs.ConstantLR(sgd(0.3), factor=1.0), 50),
    row("step_decay", "StepLR", ours.step_decay(0.3, 7, 0.4), lambda: theirs.StepLR(sgd(0.3), 7, gamma=0.4), 300),
    row("exponential", "ExponentialLR", ours.exponential(0.3, 0.97), lambda: theirs.ExponentialLR(sgd(0.3), 0.97), 500),
    row("linear_warmup", "LinearLR", ours.linear_warmup(0.3, 30), lambda: climb(sgd(0.3), 30), 100),
    row("linear_warmup", "LinearLR", ours.linear_warmup(0.3, 2), lambda: climb(sgd(0.3), 2), 10),
    *[
        row(
            "cosine",
            "CosineAnnealingLR",
            ours.cosine(0.3, total, floor),
            lambda total=total, floor=floor: theirs.CosineAnnealingLR(sgd(0.3), total, eta_min=floor),
            total + 1,
        )
        for total, floor in [(1, 0.0), (10, 0.0), (1000, 0.0), (137, 0.01)]
    ],
    *[
        row(
            "warmup_cosine",
            "SequentialLR(LinearLR, CosineAnnealingLR)",
            ours.warmup_cosine(0.3, warmup, total, floor),
            lambda args=(warmup, total, floor): warmup_cosine(sgd(0.3), *args),
            total + 1,
        )
        for warmup, total, floor in [(2, 10, 0.0), (100, 1000, 0.0), (37, 411, 0.02)]
    ],
    *[
        row(
            "warmup_stable_decay",
            "SequentialLR(LinearLR, ConstantLR, LinearLR)",
            ours.warmup_stable_decay(0.3, *lengths, floor=0.3 * share),
            lambda lengths=lengths, share=share: warmup_stable_decay(sgd(0.3), *lengths, share),
            sum(lengths) + 10,
        )
        for *lengths, share in [(10, 70, 20, 0.1), (33, 500, 150, 0.01)]
    ],
    *[
        row(
            "one_cycle",
            "OneCycleLR",
            ours.one_cycle(0.3, total, **options),
            lambda total=total, options=options: theirs.OneCycleLR(
                sgd(0.3), 0.3, total, cycle_momentum=False, **options
            ),
            total,
        )
        for total, options in [(10, {}), (997, {}), (400, {"pct_start": 0.13, "div_factor": 4, "final_div_factor": 50})]
    ],
]


@pytest.mark.parametrize(("schedule", "make", "steps"), CASES)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # raised by SequentialLR's own code
def test_follows_torch_over_a_whole_run(schedule, make, steps, seen):
    for step, want in enumerate(torch_rates(make(), steps)):
        seen(relative(schedule(step), want))


@verifies(
    "schedules.reduce_on_plateau",
    kind="parity",
    against="torch.optim.lr_scheduler.ReduceLROnPlateau(eps=0)",
    on="100 histories of 80 measurements, after each one, relative difference",
    bound=1e-12,
)
@pytest.mark.parametrize("options", [{}, {"factor": 0.5, "patience": 3}, {"patience": 0, "threshold": 0.05}])
def test_plateau_rule_follows_torch_after_each_measurement(options, seen):
    rng = torch.Generator().manual_seed(0)
    for _ in range(100):
        values = (torch.rand(80, generator=rng, dtype=torch.float64) * torch.linspace(1, 0.6, 80)).tolist()
        scheduler = theirs.ReduceLROnPlateau(sgd(0.3), eps=0.0, **options)
        for count, value in enumerate(values, start=1):
            scheduler.step(value)
            rate = ours.reduce_on_plateau(0.3, values[:count], **options)
            seen(relative(rate, scheduler.optimizer.param_groups[0]["lr"]))
        assert rate < 0.3, "the history must make the rule act"


@verifies(
    "schedules.Schedule", kind="invariant", against="itself, asked backwards and twice", on="all schedules", bound=0
)
@pytest.mark.parametrize(("schedule", "make", "steps"), [pytest.param(*case.values, id=case.id) for case in CASES])
def test_a_rate_depends_on_the_step_alone(schedule, make, steps, seen):
    forwards = [schedule(step) for step in range(steps + 5)]
    backwards = [schedule(step) for step in reversed(range(steps + 5))]
    seen(max(abs(a - b) for a, b in zip(forwards, reversed(backwards), strict=True)))


lengths = st.integers(1, 200)
shares = st.floats(0, 1)


@verifies(
    "schedules.warmup_stable_decay",
    kind="invariant",
    against="climbs to the peak, stays, falls to the floor, no jump",
    on="hypothesis: lengths and floors",
)
@given(warmup=lengths, stable=lengths, decay=lengths, share=shares)
def test_warmup_stable_decay_has_three_straight_pieces(warmup, stable, decay, share):
    schedule = ours.warmup_stable_decay(2.0, warmup, stable, decay, floor=2.0 * share)
    rates = [schedule(step) for step in range(warmup + stable + decay + 5)]
    up, flat, down = rates[:warmup], rates[warmup : warmup + stable + 1], rates[warmup + stable :]
    assert up == sorted(up)
    assert up[-1] == 2.0
    assert set(flat) == {2.0}
    assert down == sorted(down, reverse=True)
    assert down[-1] == pytest.approx(2.0 * share, abs=1e-15)
    slope = max(2 / warmup, 2 / decay)
    assert max(abs(b - a) for a, b in pairwise(rates)) <= slope + 1e-12


@verifies(
    "schedules.warmup_cosine",
    "schedules.cosine",
    kind="invariant",
    against="highest at the end of the warm-up, falls from there, stays at the floor",
    on="hypothesis",
)
@given(warmup=lengths, fall=lengths, share=shares)
def test_warmup_cosine_has_one_peak_and_ends_on_the_floor(warmup, fall, share):
    schedule = ours.warmup_cosine(2.0, warmup, warmup + fall, floor=2.0 * share)
    rates = [schedule(step) for step in range(warmup + fall + 5)]
    assert max(rates) == rates[warmup - 1] == rates[warmup] == 2.0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(b <= a + 1e-15 for a, b in pairwise(rates[warmup:]))
    assert rates[-5:] == [2.0 * share] * 5
    assert rates[warmup:] == [ours.cosine(2.0, fall, 2.0 * share)(step) for step in range(fall + 5)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.constant(-1), r"need lr >= 0, got lr=-1"),
        (lambda: ours.step_decay(0.1, 0, 0.5), r"need every >= 1 step, got every=0"),
        (lambda: ours.exponential(0.1, 0), r"need factor > 0, got factor=0"),
        (lambda: ours.linear_warmup(0.1, 0), r"need warmup >= 1 step, got warmup=0"),
        (lambda: ours.cosine(0.1, 0), r"need total >= 1 step, got total=0"),
        (lambda: ours.cosine(0.1, 10, 0.2), r"need 0 <= floor <= lr, got floor=0.2 and lr=0.1"),
        (lambda: ours.warmup_cosine(0.1, 9, 4), r"need 0 < warmup < total, got warmup=9 and total=4"),
        (lambda: ours.warmup_stable_decay(0.1, 1, -1, 0), r"got stable=-1 and decay=0"),
        (lambda: ours.one_cycle(0.1, 3), r"need 1 < pct_start \* total < total, got pct_start=0.3 and total=3"),
        (lambda: ours.reduce_on_plateau(0.1, [], factor=2), r"need 0 < factor < 1, got factor=2"),
        (lambda: ours.reduce_on_plateau(0.1, [], patience=-1), r"need patience >= 0, got patience=-1"),
    ],
)
@verifies(
    "schedules.constant", "schedules.step_decay", "schedules.exponential", "schedules.linear_warmup",
    "schedules.cosine", "schedules.warmup_cosine", "schedules.warmup_stable_decay", "schedules.one_cycle",
    "schedules.reduce_on_plateau",
    kind="message", against="the argument, what was expected, what came", on="one wrong call each",
)  # fmt: skip
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
