"""Bytes of sharded states: the published numbers, the laws between stages, and wrong arguments by name."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_course import costs

verifies = pytest.mark.verifies
UNITS = st.lists(st.integers(0, 10**6), min_size=1, max_size=5)


@verifies("costs.sharded_bytes", kind="parity", against="the ZeRO paper (arXiv 1910.02054), figure 1",
          on="7.5 billion parameters, 64 devices, mixed precision, Adam: 120, 31.4, 16.6, 1.9 GB", bound=0)  # fmt: skip
@pytest.mark.parametrize(("stage", "published"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example(stage, published, seen):
    total = costs.sharded_bytes(7_500_000_000, 64, stage, mixed=True).total
    seen(abs(round(total / 1e9, 1) - published))


@verifies("costs.sharded_bytes", kind="parity", against="costs.training_bytes", on="one rank, every stage and rule",
          bound=0)  # fmt: skip
@pytest.mark.parametrize("rule", ["SGD", "Momentum", "Adam", "AMSGrad"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_holds_everything(stage, rule, seen):
    seen(abs(costs.sharded_bytes([7, 11], 1, stage, rule=rule).total - costs.training_bytes(18, rule)))
    mixed = costs.sharded_bytes(18, 1, stage, mixed=True)
    assert mixed == (36, 36, 12 * 18)
    assert mixed.total == 16 * 18


@verifies("costs.sharded_bytes", "costs.RankBytes", kind="invariant", on="hypothesis: units, ranks, mixed or not",
          against="one kind more is divided by each stage; the shards cover the whole")  # fmt: skip
@given(units=UNITS, ranks=st.integers(1, 40), mixed=st.booleans())
def test_each_stage_divides_one_kind_more(units, ranks, mixed):
    stages = [costs.sharded_bytes(units, ranks, stage, mixed=mixed) for stage in range(4)]
    for stage, held in enumerate(stages):
        assert held.total == held.parameters + held.gradients + held.optimizer
        for kind in range(3):
            divided = stage >= 3 - kind
            assert held[kind] == stages[3 if divided else 0][kind]
    for whole, shard in zip(stages[0], stages[3], strict=True):
        each = whole // max(sum(units), 1)  # bytes a parameter
        assert whole <= ranks * shard <= whole + each * len(units) * (ranks - 1)


@verifies("costs.sharded_sent_bytes", kind="parity", against="the collectives in costs.communication, call by call",
          on="hypothesis: units and root padded to the ranks, microbatches; every rank", bound=0)  # fmt: skip
def test_traffic_is_that_of_its_collectives(seen):
    @given(UNITS, st.integers(0, 1000), st.integers(1, 9), st.integers(1, 4))
    def check(units, root, ranks, micros):
        def sent(count, times):
            padded = -(-count // ranks) * ranks
            return times * costs.reduce_scatter_bytes(padded, ranks)[0]

        for stage, inside, outside in [(0, 2, 2), (1, 2, 2), (2, micros + 1, micros + 1), (3, 3 * micros, 2 * micros)]:
            want = sum(sent(n, inside) for n in units) + sent(root, outside)
            seen(abs(costs.sharded_sent_bytes(units, ranks, stage, root=root, microbatches=micros) - want))

    check()


def test_stage_3_sends_half_as_much_again():
    plain, full = (costs.sharded_sent_bytes(64_000, 64, stage) for stage in (0, 3))
    assert full == 1.5 * plain
    assert plain == costs.all_reduce_bytes(64_000, 64)[0]


@verifies("costs.temporary_bytes", kind="invariant", against="nothing, gradients, parameters too are whole besides",
          on="units of 6 and 10, a root of 4, the largest tensor 3; 1 and 4 ranks", bound=0)  # fmt: skip
def test_what_is_whole_for_a_moment(seen):
    for ranks, unit in ((1, 10), (4, 12)):
        for stage, numbers in enumerate((0, 3, unit + 4 + 3, 2 * (unit + 4) + 3)):
            seen(abs(costs.temporary_bytes([6, 10], ranks, stage, root=4, largest=3) - 4 * numbers))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costs.sharded_bytes(5, 0, 1), "need ranks >= 1, got ranks=0"),
        (lambda: costs.sharded_bytes(5, 2, 4), "need a stage among 0, 1, 2, 3, got stage=4"),
        (lambda: costs.sharded_bytes([], 2, 1), "need units that count parameters, got units=[]"),
        (lambda: costs.sharded_bytes(5, 2, 1, rule="adam"), "got rule='adam'"),
        (lambda: costs.temporary_bytes(5, 2, 1, root=-1), "need root >= 0, got root=-1"),
        (lambda: costs.sharded_sent_bytes([3, -1], 2, 1), "need units that count parameters, got units=[3, -1]"),
        (lambda: costs.sharded_sent_bytes(3, 2, 1, microbatches=0), "need microbatches >= 1, got microbatches=0"),
    ],
)
@verifies("costs.sharded_bytes", "costs.temporary_bytes", "costs.sharded_sent_bytes", kind="message",
          against="the argument, what was expected, what came", on="one wrong call each")  # fmt: skip
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
