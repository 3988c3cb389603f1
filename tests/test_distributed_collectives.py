"""Our collectives give what torch.distributed gives, and send what `costs` says, on real ranks."""

import sys
from functools import cache
from itertools import pairwise, product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bigmodel_course import costs
from bigmodel_course.distributed import collectives as ours
from bigmodel_course.distributed import ring
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.team import Team, team

PATIENCE = 400.0  # seconds: a busy machine is not a fault
WORLDS = [1, 2, 3, 4, 5]
LENGTHS = [0, 1, 2, 3, 7, 12, 101]  # fewer than the ranks, as many, more, divisible and not
EXACT = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
ROUNDED = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
MOVED = [*EXACT, *ROUNDED, torch.int16, torch.uint16, torch.float8_e4m3fn]
OPS = {"product": dist.ReduceOp.PRODUCT, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
ADDS = [f"distributed.collectives.{name}" for name in ("all_reduce_", "reduce_", "reduce_scatter", "reduce_scatter_")]
MOVES = [f"distributed.collectives.{name}" for name in ("broadcast_", "all_gather", "all_to_all")]
RING = [f"distributed.ring.{name}" for name in ("Path", "travel", "combining", "divided")]
TEAM = ["distributed.team.Team", "distributed.team.team"]


def numbers(rank, shape, dtype, seed=0):
    """What rank `rank` holds; every rank can make what any other holds."""
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=rng).to(
            dtype
        )
    return torch.randint(0, 2 if dtype == torch.bool else 12, shape, generator=rng).to(dtype)


def span(length, size, rank):
    """The rows of one rank."""
    ends = [0]
    for chunk in costs.chunk_lengths(length, size):
        ends.append(ends[-1] + chunk)
    return slice(*list(pairwise(ends))[rank])


def apart(mine, theirs, scale=None):
    """0 or 1 for equal bytes or not; with a scale, the largest difference in units of eps * scale."""
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype
    if scale is None or not mine.numel():
        mine, theirs = (t.resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (mine, theirs))
        return float(not torch.equal(mine, theirs))
    wide = torch.complex128 if mine.is_complex() else torch.float64
    return ((mine.to(wide) - theirs.to(wide)).abs() / (torch.finfo(mine.dtype).eps * scale)).max().item()


def by_torch(x, op=dist.ReduceOp.SUM):
    x = x.clone()
    dist.all_reduce(x, op)
    return x != 0 if x.dtype == torch.bool else x  # Gloo adds their bytes: True + True is the byte 2


def same_bits(x):
    """Whether all ranks hold the same."""
    copies = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, x)
    return all(apart(x, copy) == 0 for copy in copies)


def sums(dtypes):
    """On this rank, the largest difference from torch of whatever adds."""
    rank, size, worst = dist.get_rank(), dist.get_world_size(), 0.0
    for seed, (dtype, length) in enumerate(product(dtypes, LENGTHS)):
        every = [numbers(r, (length,), dtype, seed) for r in range(size)]
        x, want, rows = every[rank], by_torch(every[rank]), span(length, size, rank)
        scale = sum(one.abs().double() for one in every) if dtype in ROUNDED else None
        part = None if scale is None else scale[rows]
        at_root = ours.reduce_(x.clone(), root=length % size)
        worst = max(worst, apart(at_root, want, scale) if rank == length % size else apart(at_root, x))
        worst = max(worst, apart(ours.reduce_scatter(x), want[rows], part))
        work, whole = x.clone(), x.clone()
        mine = ours.reduce_scatter_(work)
        assert not mine.numel() or mine.data_ptr() == work[rows].data_ptr(), "the result lies in x"
        assert ours.all_reduce_(whole) is whole
        assert same_bits(whole)
        worst = max(worst, apart(whole, want, scale), apart(whole[rows], mine), apart(x, every[rank]))
    return worst


def moves():
    """On this rank, 1 if any byte differs from torch's, or, where torch refuses a dtype, from the inputs'."""
    rank, size, worst = dist.get_rank(), dist.get_world_size(), 0.0
    for seed, (dtype, length) in enumerate(product(MOVED, LENGTHS)):
        every = [numbers(r, (length, 3), dtype, seed) for r in range(size)]
        x, root, lengths = every[rank], length % size, costs.chunk_lengths(length, size)
        pieces = [one[span(length, size, r)] for r, one in enumerate(every)]
        got = {"broadcast": ours.broadcast_(x.clone(), root), "gather": ours.all_gather(x)}
        got |= {"pieces": ours.all_gather(pieces[rank], lengths=lengths), "exchange": ours.all_to_all(x)}
        want = {"broadcast": every[root], "gather": torch.cat(every), "pieces": torch.cat(pieces)}
        want["exchange"] = torch.cat([one[span(length, size, rank)] for one in every])
        worst = max(worst, *(apart(got[key], want[key]) for key in want))
        if dtype in EXACT + ROUNDED:
            theirs, taken, copies = x.clone(), torch.empty_like(want["exchange"]), [torch.empty_like(x) for _ in every]
            dist.broadcast(theirs, root)
            dist.all_to_all_single(taken, x, [lengths[rank]] * size, lengths)
            dist.all_gather(copies, x)
            found = {"broadcast": theirs, "exchange": taken, "gather": torch.cat(copies)}
            worst = max(worst, *(apart(got[key], found[key]) for key in found))
    return worst


def other_ops():
    """Product, max and min against torch's, mean against the sum divided; also a scalar and odd strides."""
    rank, size, worst = dist.get_rank(), dist.get_world_size(), 0.0
    for dtype, (name, op) in product((torch.int32, torch.float64), OPS.items()):
        x = numbers(rank, (5, 4), dtype)
        scale = None if dtype == torch.int32 or name != "product" else by_torch(x.abs(), op).clamp(min=1e-300)
        worst = max(worst, apart(ours.all_reduce_(x.clone(), op=name), by_torch(x, op), scale))
    x = numbers(rank, (4, 6), torch.float64)
    scale, mean = by_torch(x.abs()), by_torch(x) / size
    worst = max(worst, apart(ours.all_reduce_(x.clone(), op="mean"), mean, scale))
    at_root = ours.reduce_(x.clone(), op="mean")
    worst = max(worst, apart(at_root, mean, scale) if rank == 0 else apart(at_root, x))
    worst = max(worst, apart(ours.all_reduce_(torch.tensor(rank + 1.0)), torch.tensor(size * (size + 1) / 2)))
    assert ours.all_gather(torch.tensor(rank)).tolist() == list(range(size))
    holder = x.clone()
    ours.all_reduce_(holder.t()[::2], op="max")  # every other column, transposed
    assert torch.equal(holder[:, 1::2], x[:, 1::2]), "what is not part of the view stays"
    worst = max(worst, apart(holder[:, ::2], by_torch(x, dist.ReduceOp.MAX)[:, ::2]))
    every = [torch.complex(*[numbers(r, (4, 6), torch.float64)] * 2).conj() for r in (rank, 0)]
    worst = max(worst, apart(ours.broadcast_(every[0]), every[1]))
    leaf = x.clone().requires_grad_()
    return max(worst, apart(ours.all_reduce_(leaf).detach(), by_torch(x), scale))


def in_order():
    """1 if any bit of a float32 sum is not that of adding chunk c in the order c + 1, c + 2, ..., c around the ring."""
    rank, size, length = dist.get_rank(), dist.get_world_size(), 101
    every = [numbers(r, (length,), torch.float32) for r in range(size)]
    want = []
    for chunk in range(size):
        order = [(chunk + 1 + i) % size for i in range(size)]
        total = every[order[0]][span(length, size, chunk)].clone()
        for r in order[1:]:
            total += every[r][span(length, size, chunk)]
        want.append(total)
    return apart(ours.all_reduce_(every[rank].clone()), torch.cat(want))


def in_small_segments():
    """The same with segments of 8 bytes, so that many are under way, and with the path that GPUs take."""
    x, size, worst = numbers(dist.get_rank(), (101,), torch.float64), dist.get_world_size(), 0.0
    want, rows = ours.all_reduce_(x.clone()), ours.all_gather(x)
    for changed in ({"SEGMENT": 8}, {"SEGMENT": 80}, {"_in_segments": ring._in_step}):
        with patch.multiple(ring, **changed):
            worst = max(worst, apart(ours.all_reduce_(x.clone()), want), apart(ours.all_gather(x), rows))
            worst = max(worst, apart(ours.reduce_scatter(x), want[span(101, size, dist.get_rank())]))
    return worst


def in_groups():
    """Odd and even ranks each for themselves, against torch in the same group; and an uneven exchange."""
    rank, size, worst = dist.get_rank(), dist.get_world_size(), 0.0
    members = [list(range(first, size, 2)) for first in range(min(2, size))]
    group = [dist.new_group(ranks) for ranks in members][rank % 2]
    us, x = team(group), numbers(rank, (7,), torch.int64)
    assert us == Team(members[rank % 2].index(rank), len(members[rank % 2]), group)
    want, sent = x.clone(), x.clone()
    dist.all_reduce(want, group=group)
    dist.broadcast(sent, group_src=us.size - 1, group=group)
    worst = max(worst, apart(ours.all_reduce_(x.clone(), group=group), want))
    worst = max(worst, apart(ours.broadcast_(x.clone(), us.size - 1, group=group), sent))
    worst = max(worst, apart(ours.reduce_scatter(x, group=group), want[span(7, us.size, us.rank)]))
    assert ours.all_gather(torch.tensor(rank), group=group).tolist() == members[rank % 2]
    taken = torch.cat([numbers(r, (7,), torch.int64)[span(7, us.size, us.rank)] for r in members[rank % 2]])
    worst = max(worst, apart(ours.all_to_all(x, group=group), taken))
    at_root = ours.reduce_(x.clone(), us.size - 1, group=group)
    worst = max(worst, apart(at_root, want if us.rank == us.size - 1 else x))
    table = [[(giver + 2 * taker) % 4 for taker in range(size)] for giver in range(size)]
    x = torch.cat([torch.full((n,), 10 * rank + taker) for taker, n in enumerate(table[rank])])
    want = [10 * giver + rank for giver in range(size) for _ in range(table[giver][rank])]
    return max(worst, float(ours.all_to_all(x, lengths=table).tolist() != want))


def calls(length, dtype):
    """Every collective on a vector of this length, and what `costs` says each rank sends."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, root, lengths = torch.ones(length, dtype=dtype), length % size, costs.chunk_lengths(length, size)
    mine, each = x[: lengths[rank]], x.itemsize
    return {
        "all_reduce": (lambda: ours.all_reduce_(x), costs.all_reduce_bytes(length, size, each)),
        "reduce_scatter": (lambda: ours.reduce_scatter(x), costs.reduce_scatter_bytes(length, size, each)),
        "all_gather": (lambda: ours.all_gather(mine, lengths=lengths), costs.all_gather_bytes(lengths, each)),
        "all_to_all": (lambda: ours.all_to_all(x), costs.all_to_all_bytes(length, size, each)),
        "broadcast": (lambda: ours.broadcast_(x, root), costs.broadcast_bytes(length, size, each, root=root)),
        "reduce": (lambda: ours.reduce_(x, root), costs.reduce_bytes(length, size, each, root=root)),
    }


def traffic():
    """What this rank sent, for each collective and length, beside what `costs` says."""
    rows = []
    for length, dtype in product([*LENGTHS, 1_000_003], (torch.int8, torch.float64)):
        for name, (call, predicted) in calls(length, dtype).items():
            with ours.count_bytes() as sent:
                call()
            rows.append((name, length, predicted[dist.get_rank()], sent.payload, sent.messages, sent.wire))
    return rows


def everything():
    """All that one launch can answer."""
    found = {"exact": sums(EXACT), "rounded": sums(ROUNDED), "moves": moves(), "ops": other_ops()}
    found |= {"order": in_order(), "segments": in_small_segments(), "groups": in_groups(), "traffic": traffic()}
    return found


@cache
def results(size):
    """From every rank, in one launch a world size."""
    return launch(everything, size, timeout=PATIENCE)


def worst(size, *keys):
    return max(rank[key] for rank in results(size) for key in keys)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    *ADDS,
    *RING,
    kind="parity",
    against="torch.distributed.all_reduce on Gloo",
    on="bool and integers, lengths 0 to 101, 1 to 5 ranks; 0 = the same bytes",
    bound=0,
)
def test_adds_integers_exactly_as_torch(size, seen):
    seen(worst(size, "exact"))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    *ADDS,
    *RING,
    kind="parity",
    against="torch.distributed.all_reduce on Gloo",
    on="five floating dtypes, lengths 0 to 101; in units of eps * sum of magnitudes",
    bound=4,  # n - 1 additions of a sum over n <= 5 ranks, each off by eps / 2, on either side
)
def test_adds_floats_as_torch_up_to_the_order_of_summation(size, seen):
    seen(worst(size, "rounded"))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    *MOVES,
    *TEAM,
    kind="parity",
    against="torch.distributed.broadcast, all_gather, all_to_all_single on Gloo",
    on="13 dtypes, lengths 0 to 101, 1 to 5 ranks; 0 = the same bytes",
    bound=0,
)
def test_moves_every_byte_as_torch(size, seen):
    seen(worst(size, "moves"))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    "distributed.collectives.all_reduce_",
    "distributed.ring.combining",
    "distributed.ring.divided",
    kind="parity",
    against="torch.distributed.all_reduce on Gloo",
    on="product, max, min, mean; scalars, views, conjugates; in units of eps * scale",
    bound=4,
)
def test_other_operations_and_strides_as_torch(size, seen):
    seen(worst(size, "ops"))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    "distributed.collectives.all_reduce_",
    "distributed.ring.travel",
    kind="invariant",
    against="adding rank after rank around the ring, in one process",
    on="float32, bit for bit; and with segments of 8 bytes, and hop by hop as on GPUs",
    bound=0,
)
def test_the_order_of_summation_is_the_ring_s_whatever_the_segments(size, seen):
    seen(worst(size, "order", "segments"))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    *ADDS[:3],
    *MOVES,
    *TEAM,
    kind="parity",
    against="torch.distributed in the same group",
    on="odd and even ranks at once, and an uneven all-to-all",
    bound=0,
)
def test_works_within_a_group(size, seen):
    seen(worst(size, "groups"))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.verifies(
    *ADDS[:3],
    *MOVES,
    "distributed.collectives.count_bytes",
    "distributed.collectives.Sent",
    *(f"costs.{name}_bytes" for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")),
    "costs.reduce_bytes",
    "costs.chunk_lengths",
    kind="invariant",
    against="bytes that costs predicts for this rank",
    on="each rank's sends, lengths 0 to 1,000,003, 1 and 8 bytes each",
    bound=0,
)
def test_each_rank_sends_exactly_the_predicted_bytes(size, seen):
    for rank in results(size):
        for name, length, predicted, payload, messages, _ in rank["traffic"]:
            assert (messages == 0) == (payload == 0), (name, length)
            seen(abs(predicted - payload))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how many bytes a connection carried")
@pytest.mark.verifies(
    "distributed.collectives.count_bytes",
    kind="parity",
    against="Linux's own count of the bytes in each TCP connection",
    on="8 MB a rank; relative",
    bound=0.001,
)
def test_the_kernel_counts_the_same_bytes_on_the_wire(seen):
    for rank in results(2):
        for _, _, _, payload, _, wire in rank["traffic"]:
            assert wire >= payload
            if payload > 1e6:
                seen(wire / payload - 1)


def others(length):
    """What torch's own all-reduce sends, as Linux counts it, and how often its send was called."""
    with ours.count_bytes() as sent:
        dist.all_reduce(torch.ones(length))
    return sent.wire, sent.payload


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how many bytes a connection carried")
@pytest.mark.verifies(
    "costs.all_reduce_bytes",
    kind="parity",
    against="what Gloo's all_reduce puts on the wire",
    on="4 MB, 4 ranks; relative",
    bound=0.001,
)
def test_torch_s_all_reduce_sends_as_many_bytes_as_ours(seen):
    for rank, (wire, payload) in enumerate(launch(others, 4, 1_000_000, timeout=PATIENCE)):
        assert payload == 0
        seen(abs(wire / costs.all_reduce_bytes(1_000_000, 4)[rank] - 1))


def faults():
    """What each wrong call says, on this rank; the ranks must still understand each other afterwards."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    uneven = torch.ones(3 + (rank == 1))
    half = torch.ones(3, dtype=torch.float16 if rank == 2 else torch.float32)
    calls = {
        "shape": lambda: ours.all_reduce_(uneven, check=True),
        "rows": lambda: ours.all_gather(uneven, check=True),
        "columns": lambda: ours.all_gather(uneven[None], lengths=[1] * size, check=True),
        "dtype": lambda: ours.broadcast_(half, check=True),
        "op": lambda: ours.reduce_(half.float(), op="max" if rank else "min", check=True),
        "other root": lambda: ours.reduce_(half.float(), root=min(rank, 1), check=True),
        "collective": lambda: (ours.all_to_all if rank else ours.reduce_scatter)(torch.ones(3), check=True),
        "root": lambda: ours.broadcast_(torch.ones(3), root=size),
        "unknown op": lambda: ours.all_reduce_(torch.ones(3), op="median"),
        "mean": lambda: ours.all_reduce_(torch.ones(3, dtype=torch.int64), op="mean"),
        "float8": lambda: ours.all_reduce_(torch.ones(3).to(torch.float8_e4m3fn)),
        "sparse": lambda: ours.all_reduce_(torch.ones(3).to_sparse()),
        "list": lambda: ours.broadcast_([1.0]),
        "scalar": lambda: ours.reduce_scatter(torch.tensor(1.0)),
        "lengths": lambda: ours.all_gather(torch.ones(3), lengths=[2] * size),
        "table": lambda: ours.all_to_all(torch.ones(3), lengths=[[2] * size] * size),
    }
    if rank == 2:
        calls["group"] = lambda: ours.all_reduce_(torch.ones(3), group=pair)
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    said["after"] = ours.all_reduce_(torch.tensor(1), check=True).item()
    return said


@cache
def said():
    return launch(faults, 3, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("fault", "words"),
    {
        "shape": "ValueError: every rank must make the same call: the shape of x is [3] on rank 0, [4] on",
        "rows": "the shape of x is [3] on rank 0, [4] on rank 1",
        "columns": "the shape of x is ['any', 3] on rank 0, ['any', 4] on rank 1",
        "dtype": "the dtype of x is torch.float32 on rank 0, torch.float32 on rank 1, torch.float16 on rank 2",
        "op": "op is min on rank 0, max on rank 1, max on rank 2",
        "other root": "root is 0 on rank 0, 1 on rank 1, 1 on rank 2",
        "collective": "the collective is reduce_scatter_ on rank 0, all_to_all on rank 1",
        "root": "ValueError: root must be a rank within the group, 0 to 2, got 3",
        "unknown op": "ValueError: op must be one of sum, mean, product, max, min, got 'median'",
        "mean": 'TypeError: op="mean" needs a floating or complex dtype, x has torch.int64; take op="sum"',
        "float8": "TypeError: x must have a dtype of which torch can take the sum, got torch.float8_e4m3fn",
        "sparse": "TypeError: x must be a dense tensor, got torch.sparse_coo",
        "list": "TypeError: x must be a dense tensor, got list",
        "scalar": "ValueError: x must have a dimension 0 that can be cut, got a tensor of shape []",
        "lengths": "ValueError: lengths must be the rows of 3 ranks, 3 for rank 0, as x has, got [2, 2, 2]",
        "table": "ValueError: lengths must hold 3 rows of 3 numbers, 3 in all in row 0, as x has, got [[2, 2, 2]",
    }.items(),
    ids=lambda value: value if len(value) < 12 else "",
)
@pytest.mark.verifies(
    *ADDS, *MOVES, *TEAM, kind="message", against="wrong calls", on="3 ranks: the same error on each, and no hang"
)
def test_a_wrong_call_is_one_clear_error_on_every_rank(fault, words):
    for rank, found in enumerate(said()):
        own = words.replace("for rank 0", f"for rank {rank}").replace("in row 0", f"in row {rank}")
        assert own in found[fault]
        assert found["after"] == 3, "the ranks still understand each other"


def test_a_rank_outside_the_group_is_told_so():
    assert said()[2]["group"] == "ValueError: group must hold the calling rank; rank 2 is not one of its members"
    assert "group" not in said()[0]


def without_the_tail(x):
    """A known fault: chunks of length // ranks, and what is left over is never summed."""
    size = dist.get_world_size()
    ours.all_reduce_(x[: len(x) // size * size])
    return x


def mean_of_chunks(x):
    """Another one: the owner divides its chunk, and the others divide it again."""
    return ours.all_reduce_(x, op="mean").div_(dist.get_world_size())


def wrong_ones(length):
    x = numbers(dist.get_rank(), (length,), torch.float64)
    want = by_torch(x)
    return [apart(fault(x.clone()), want) for fault in (ours.all_reduce_, without_the_tail, mean_of_chunks)]


def test_the_comparison_finds_known_faults():
    assert launch(wrong_ones, 2, 7, timeout=PATIENCE) == [[0, 1, 1]] * 2
    assert launch(wrong_ones, 2, 8, timeout=PATIENCE) == [[0, 0, 1]] * 2  # silent where the ranks divide the length


def nested(length):
    x = torch.ones(length)
    with ours.count_bytes() as outer:
        ours.all_reduce_(x)
        with ours.count_bytes() as inner:
            dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0)
        if dist.get_rank() == 0:
            (work,) = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1)])
        else:
            (work,) = dist.batch_isend_irecv([dist.P2POp(dist.irecv, x, 0)])
        work.wait()
    ours.all_reduce_(x)
    return outer.payload, inner.payload, inner.messages


@pytest.mark.verifies(
    "distributed.collectives.count_bytes",
    "distributed.collectives.Sent",
    kind="invariant",
    against="the sizes of the tensors sent",
    on="nested counts, send, isend and batches of torch's own",
    bound=0,
)
def test_counts_whoever_sends_and_only_inside_the_block(seen):
    got = launch(nested, 2, 10, timeout=PATIENCE)
    for mine, right in zip(got, ([120, 40, 1], [40, 0, 0]), strict=True):
        seen(max(abs(a - b) for a, b in zip(mine, right, strict=True)))
