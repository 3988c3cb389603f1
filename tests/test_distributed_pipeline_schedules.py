"""Schedules are legal, never wait in a ring, and have the bubble and the live activations that the formulas say."""

from itertools import combinations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as theirs

from bigmodel_course import costs
from bigmodel_course.distributed.pipeline_schedules import (
    Message,
    Op,
    Span,
    bubble,
    check_legal,
    gpipe,
    grid,
    interleaved,
    makespan,
    messages,
    one_at_a_time,
    one_f_one_b,
    peak_live,
    timeline,
)

verifies = pytest.mark.verifies
PLAIN = [one_at_a_time, gpipe, one_f_one_b]
NAMES = tuple(f"distributed.pipeline_schedules.{name}" for name in ("one_at_a_time", "gpipe", "one_f_one_b"))
TIMES = st.sampled_from([(1, 2), (1, 1), (3, 4)])
sizes = {"ranks": st.integers(1, 6), "microbatches": st.integers(1, 12)}


@st.composite
def schedules(draw):
    """Any schedule of the package, with its number of chunks."""
    ranks, microbatches = draw(sizes["ranks"]), draw(sizes["microbatches"])
    make = draw(st.sampled_from([*PLAIN, interleaved]))
    if make is not interleaved:
        return make(ranks, microbatches)
    rounds = max(1, microbatches // ranks)
    return interleaved(ranks, microbatches - microbatches % rounds, draw(st.integers(2, 4)))


@verifies(
    *NAMES,
    "distributed.pipeline_schedules.interleaved",
    "distributed.pipeline_schedules.check_legal",
    "distributed.pipeline_schedules.Schedule",
    "distributed.pipeline_schedules.Op",
    kind="invariant",
    against="each pass once, forward before backward, no waiting in a ring",
    on="1-6 ranks, 1-12 microbatches, 1-4 chunks",
)
@given(schedules())
def test_every_schedule_is_legal(schedule):
    check_legal(schedule)


@verifies(
    "distributed.pipeline_schedules.timeline",
    "distributed.pipeline_schedules.Span",
    kind="invariant",
    against="no operation before what it needs, none at once on a rank, no rank idle that could work",
    on="any schedule, three pairs of times, with and without time for messages",
)
@given(schedules(), TIMES, st.sampled_from([0, 1]))
def test_an_operation_starts_as_soon_as_rank_and_input_are_there(schedule, times, message):
    spans = timeline(schedule, *times, message=message)
    chunks = 1 + max(op.chunk for op in schedule[0])
    ends = {(rank, span.op): span.end for rank, line in enumerate(spans) for span in line}
    for rank, line in enumerate(spans):
        assert [span.op for span in line] == list(schedule[rank])
        free = 0
        for op, start, end in line:
            stage, step = op.chunk * len(schedule) + rank, -1 if op.kind == "F" else 1
            earliest = [free]
            if 0 <= stage + step < len(schedule) * chunks:
                other = (stage + step) % len(schedule), op._replace(chunk=(stage + step) // len(schedule))
                earliest.append(ends[other] + message * (other[0] != rank))
            assert start == max(earliest)
            assert end == pytest.approx(start + times[op.kind == "B"] / chunks)
            free = end


@verifies(
    *NAMES[1:],
    "distributed.pipeline_schedules.bubble",
    "distributed.pipeline_schedules.makespan",
    "costs.bubble_fraction",
    kind="invariant",
    against="(p - 1) / (m + p - 1)",
    on="the simulated timeline, 1-6 ranks, 1-12 microbatches, three pairs of times",
    bound=1e-12,
)
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_the_bubble_of_gpipe_and_1f1b(make, seen):
    @given(**sizes, times=TIMES)
    def check(ranks, microbatches, times):
        spans = timeline(make(ranks, microbatches), *times)
        seen(abs(bubble(spans) - costs.bubble_fraction(ranks, microbatches)))
        seen(abs(makespan(spans) - (microbatches + ranks - 1) * sum(times)))

    check()


@verifies(
    "distributed.pipeline_schedules.interleaved",
    "costs.bubble_fraction",
    kind="invariant",
    against="(p - 1) / (v m + p - 1), the bubble in units of work a v-th of GPipe's",
    on="the simulated timeline, 1-6 ranks, 2-4 chunks, 1-4 rounds, three pairs of times",
    bound=1e-12,
)
def test_the_bubble_of_the_interleaved_schedule(seen):
    @given(ranks=sizes["ranks"], rounds=st.integers(1, 4), chunks=st.integers(2, 4), times=TIMES)
    def check(ranks, rounds, chunks, times):
        spans = timeline(interleaved(ranks, rounds * ranks, chunks), *times)
        seen(abs(bubble(spans) - costs.bubble_fraction(ranks, rounds * ranks, chunks=chunks)))

    check()


@given(**sizes, times=TIMES)
def test_a_model_that_is_only_cut_uses_one_rank_at_a_time(ranks, microbatches, times):
    spans = timeline(one_at_a_time(ranks, microbatches), *times)
    assert bubble(spans) == pytest.approx(1 - 1 / ranks)


@verifies(
    *NAMES[1:],
    "distributed.pipeline_schedules.interleaved",
    "distributed.pipeline_schedules.peak_live",
    "costs.live_passes",
    kind="invariant",
    against="GPipe m, 1F1B min(m, p - rank), interleaved min(v m, (v - 1) p + 2 (p - 1 - rank) + 1)",
    on="1-6 ranks, 1-12 microbatches, 2-4 chunks",
)
@given(**sizes, chunks=st.integers(2, 4))
def test_the_activations_held_at_once(ranks, microbatches, chunks):
    def predicted(name, microbatches, chunks=1):
        return [costs.live_passes(name, ranks, microbatches, rank, chunks=chunks) for rank in range(ranks)]

    assert peak_live(gpipe(ranks, microbatches)) == predicted("gpipe", microbatches)
    assert peak_live(one_f_one_b(ranks, microbatches)) == predicted("1f1b", microbatches)
    whole = ranks * microbatches
    assert peak_live(interleaved(ranks, whole, chunks)) == predicted("interleaved", whole, chunks)
    assert peak_live(one_at_a_time(ranks, microbatches)) == [1] * ranks


def torch_order(make, ranks, microbatches, chunks):
    """The order of torch's own schedule, worked out without a process group."""
    if make is not interleaved:
        kind = theirs.ScheduleGPipe if make is gpipe else theirs.Schedule1F1B
        order = kind._get_pipeline_order(SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches))
    else:
        rounds = max(1, microbatches // ranks)
        numbers = {"pp_group_size": ranks, "n_local_stages": chunks, "_n_microbatches": microbatches}
        schedule = SimpleNamespace(**numbers, microbatches_per_round=microbatches // rounds)
        work = theirs.ScheduleInterleaved1F1B._calculate_single_rank_operations
        order = {rank: work(schedule, rank) for rank in range(ranks)}
    kinds = {theirs._ComputationType.FORWARD: "F", theirs._ComputationType.FULL_BACKWARD: "B"}
    return tuple(
        tuple(
            Op(kinds[action.computation_type], action.microbatch_index, action.stage_index // ranks)
            for action in order[rank]
            if action is not None and action.computation_type in kinds
        )
        for rank in range(ranks)
    )


@verifies(
    *NAMES[1:],
    "distributed.pipeline_schedules.interleaved",
    kind="parity",
    against="torch.distributed.pipelining ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B",
    on="the order of operations of each rank (1F1B: but the last), 1-5 ranks, 1-12 microbatches, 2-3 chunks",
    bound=0.0,
)
@pytest.mark.parametrize("make", [gpipe, one_f_one_b, interleaved])
@pytest.mark.parametrize("ranks", range(1, 6))
def test_the_order_is_torchs(make, ranks, seen):
    for microbatches in range(1, 13):
        for chunks in (2, 3) if make is interleaved else (1,):
            if make is interleaved and microbatches % max(1, microbatches // ranks):
                continue
            if make is one_f_one_b and microbatches < ranks:  # torch's list then names microbatches that do not exist
                continue
            ours = make(ranks, microbatches, *([chunks] if chunks > 1 else []))
            # Torch's list of 1F1B (not what it runs) counts the forwards of the last rank from 1.
            told = slice(ranks - 1 if make is one_f_one_b else ranks)
            seen(ours[told] != torch_order(make, ranks, microbatches, chunks)[told])


@verifies(
    "distributed.pipeline_schedules.messages",
    "distributed.pipeline_schedules.Message",
    "costs.pipeline_messages",
    kind="invariant",
    against="2 m (p v - 1) messages; on each link no rank sends before what the other has to receive first",
    on="any schedule",
)
@given(schedules())
def test_both_ends_of_a_link_can_post_in_the_order_of_the_messages(schedule):
    found = messages(schedule)
    chunks = 1 + max(op.chunk for op in schedule[0])
    assert len(found) == costs.pipeline_messages(len(schedule), 1 + max(op[1] for op in schedule[0]), chunks=chunks)
    place = {(rank, op): i for rank, ops in enumerate(schedule) for i, op in enumerate(ops)}
    for first, second in combinations(found, 2):
        if first.sender == second.sender:
            assert place[first.sender, first.made] < place[second.sender, second.made]
        elif (first.sender, first.receiver) == (second.receiver, second.sender):
            # The sender of the first posts it before it waits for the second.
            assert place[first.sender, first.made] < place[second.receiver, second.used]


def test_a_message_joins_the_two_operations_of_neighbours():
    assert messages(gpipe(2, 1)) == [Message(0, Op("F", 0), 1, Op("F", 0)), Message(1, Op("B", 0), 0, Op("B", 0))]
    turned = [m for m in messages(interleaved(2, 2, 2)) if m.made == Op("F", 0, 0) and m.sender == 1]
    assert turned == [Message(1, Op("F", 0, 0), 0, Op("F", 0, 1))], "from the last rank back to the first"


RING = ((Op("F", 0), Op("B", 0), Op("F", 1), Op("B", 1)), (Op("F", 1), Op("B", 1), Op("F", 0), Op("B", 0)))
F0, B0 = Op("F", 0), Op("B", 0)
WRONG = [
    ((), "must hold operations for each rank"),
    (((), ()), "must hold operations for each rank"),
    (RING, "rank 0 waits before B0 for rank 1's B0; rank 1 waits before F1 for rank 0's F1"),
    (((F0, B0), (F0, B0, F0)), "rank 1 must do each operation of 1 microbatches once: F0 2 times"),
    (((F0, B0), (F0,)), "rank 1 must do each operation of 1 microbatches once: B0 0 times"),
    (((F0, B0, Op("F", 1)), (F0, B0)), "rank 0 must do each operation of 2 microbatches once: B1 0 times"),
    (((F0, B0), (B0, F0)), "rank 1 does B0 before its forward pass"),
]


@verifies(
    "distributed.pipeline_schedules.check_legal",
    kind="message",
    against="the rank and the operation in the message",
    on="two ranks that wait for each other, and six other faults",
)
@pytest.mark.parametrize(("schedule", "message"), WRONG)
def test_a_schedule_that_cannot_run_is_refused_with_the_reason(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_legal(schedule)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpipe(0, 3), "need ranks >= 1 and microbatches >= 1, got ranks=0"),
        (lambda: one_f_one_b(2, 0), "got ranks=2 and microbatches=0"),
        (lambda: interleaved(0, 0), "need ranks >= 1"),
        (lambda: interleaved(2, 4, 1), "need chunks >= 2 to interleave, got chunks=1"),
        (lambda: interleaved(3, 7), "need microbatches in 2 rounds of one length, got microbatches=7 for ranks=3"),
        (lambda: timeline(gpipe(2, 2), [1.0]), r"one for all ranks or one a rank \(2\), got \[1.0\]"),
        (lambda: timeline(gpipe(2, 2), 0), "times must be above 0"),
        (lambda: grid(timeline(gpipe(2, 2), 0.5)), "must begin and end at whole numbers"),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@verifies(
    "distributed.pipeline_schedules.grid",
    kind="invariant",
    against="the text written by hand",
    on="1F1B with one chunk, interleaved with two",
)
def test_the_grid_shows_who_works_when():
    assert grid(timeline(one_f_one_b(2, 2))).splitlines() == [
        "rank 0 | F0 F1 ·· ·· B0 B0 ·· B1 B1",
        "rank 1 | ·· F0 B0 B0 F1 B1 B1 ·· ··",
    ]
    assert grid(timeline(interleaved(2, 2), 2, 4)).splitlines() == [
        "rank 0 | F0a F1a F0b F1b ··· ··· B0b B0b ··· B1b B1b B0a B0a B1a B1a",
        "rank 1 | ··· F0a F1a F0b B0b B0b F1b B1b B1b B0a B0a B1a B1a ··· ···",
    ]


def test_ranks_may_differ_in_speed():
    spans = timeline(one_f_one_b(2, 4), [1, 3], [1, 3])
    assert makespan(spans) == 1 + 4 * 6 + 1, "the slower rank sets the pace"
    assert isinstance(spans[0][0], Span)
