"""What `costs` says of communication holds for every length and number of ranks, and for messages sent one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_course import costs

lengths, worlds = st.integers(0, 10**6), st.integers(1, 64)
LINK = {"latency": 2e-5, "bandwidth": 1e9}
BYTES = {
    "reduce_scatter": costs.reduce_scatter_bytes,
    "all_gather": lambda length, ranks, each: costs.all_gather_bytes(costs.chunk_lengths(length, ranks), each),
    "all_reduce": costs.all_reduce_bytes,
    "all_to_all": costs.all_to_all_bytes,
    "broadcast": costs.broadcast_bytes,
    "reduce": costs.reduce_bytes,
    "star": costs.star_bytes,
}


@pytest.mark.verifies(
    "costs.chunk_lengths", kind="parity", against="torch.tensor_split", on="any length and number of ranks", bound=0
)
def test_chunks_are_those_of_tensor_split(seen):
    @given(lengths, worlds)
    def compare(length, ranks):
        theirs = [len(part) for part in torch.empty(length, device="meta").tensor_split(ranks)]
        seen(max(abs(a - b) for a, b in zip(costs.chunk_lengths(length, ranks), theirs, strict=True)))

    compare()


def rounds(name, length, ranks):
    """The collective as rounds of messages (from, to, numbers), as a textbook draws it."""
    chunks = costs.chunk_lengths(length, ranks)
    if name in ("reduce", "tree"):
        up = [[(b, a, n) for a, b, n in one] for one in reversed(rounds("broadcast", length, ranks))]
        return up + rounds("broadcast", length, ranks) if name == "tree" else up
    if name == "broadcast":
        powers = [2**k for k in range(ranks.bit_length())]
        return [[(a, a + p, length) for a in range(p) if a + p < ranks] for p in powers if p < ranks]
    if name == "star":
        return [[(r, 0, length)] for r in range(1, ranks)] + [[(0, r, length)] for r in range(1, ranks)]
    if name == "all_to_all":
        return [[(r, (r + s) % ranks, chunks[(r + s) % ranks]) for r in range(ranks)] for s in range(1, ranks)]
    first = 0 if name == "all_gather" else -1  # what rank 0 sends first
    hops = (ranks - 1) * (2 if name == "all_reduce" else 1)
    return [[(r, (r + 1) % ranks, chunks[(r + first - hop) % ranks]) for r in range(ranks)] for hop in range(hops)]


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.verifies(
    *(f"costs.{name}_bytes" for name in BYTES),
    kind="invariant",
    against="a list of all messages, summed by sender",
    on="1 to 12 ranks, any length",
    bound=0,
)
def test_the_bytes_are_those_of_the_messages(name, seen):
    @given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([1, 2, 4, 8]))
    def compare(length, ranks, bytes_each):
        sent = [0] * ranks
        for sender, _, numbers in (message for one in rounds(name, length, ranks) for message in one):
            sent[sender] += numbers * bytes_each
        seen(max(abs(a - b) for a, b in zip(BYTES[name](length, ranks, bytes_each), sent, strict=True)))

    compare()


@given(lengths, worlds)
def test_a_ring_sends_evenly_and_in_all_what_a_star_sends(length, ranks):
    ring, star = costs.all_reduce_bytes(length, ranks), costs.star_bytes(length, ranks)
    assert sum(ring) == sum(star) == 8 * (ranks - 1) * length
    assert max(ring) - min(ring) <= 8
    if length % ranks == 0:
        assert ring == [8 * (ranks - 1) * length // ranks] * ranks
    assert max(star) == 4 * (ranks - 1) * length


@given(st.integers(0, 1000), st.integers(1, 40), st.data())
def test_any_root_sends_what_root_0_sends(length, ranks, data):
    root = data.draw(st.integers(0, ranks - 1))
    for function in (costs.broadcast_bytes, costs.reduce_bytes, costs.star_bytes):
        moved = function(length, ranks, root=root)
        assert moved[root:] + moved[:root] == function(length, ranks)


def simulated(name, length, ranks, latency, bandwidth):
    """When the last message has arrived, if a rank sends one and receives one at a time."""
    sends, receives, ready = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    for messages in rounds(name, length, ranks):
        for a, b, numbers in messages:
            end = max(sends[a], receives[b], ready[a]) + latency + 4 * numbers / bandwidth
            sends[a] = receives[b] = end
        ready = list(receives)  # what goes out next may depend on all that came in
    return max(sends + receives)


@pytest.mark.parametrize("name", [*BYTES, "tree"])
@pytest.mark.verifies(
    "costs.collective_seconds",
    kind="parity",
    against="a simulation message by message",
    on="1 to 12 ranks, lengths that they divide; relative",
    bound=1e-12,
)
def test_the_time_is_that_of_the_messages_one_by_one(name, seen):
    @given(st.integers(0, 1000), st.integers(1, 12), st.floats(0, 1e-3), st.floats(1e6, 1e11))
    def compare(chunk, ranks, latency, bandwidth):
        want = simulated(name, chunk * ranks, ranks, latency, bandwidth)
        got = costs.collective_seconds(name, 4 * chunk * ranks, ranks, latency=latency, bandwidth=bandwidth)
        seen(abs(got - want) / max(want, 1e-30))

    compare()


def test_a_tree_is_quicker_for_short_vectors_and_a_ring_for_long_ones():
    def time(name, size):
        return costs.collective_seconds(name, size, 16, **LINK)

    assert time("tree", 1e3) < time("all_reduce", 1e3)
    assert time("all_reduce", 1e8) < time("tree", 1e8) < time("star", 1e8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: costs.chunk_lengths(-1, 2), "need length >= 0, got length=-1"),
        (lambda: costs.all_reduce_bytes(3, 0), "need ranks >= 1, got ranks=0"),
        (lambda: costs.all_gather_bytes([]), "need ranks >= 1, got ranks=0"),
        (lambda: costs.all_gather_bytes([2, -1]), "need length >= 0, got length=-1"),
        (lambda: costs.broadcast_bytes(3, 4, root=4), "need 0 <= root < ranks=4, got root=4"),
        (lambda: costs.reduce_bytes(3, 4, root=-1), "need 0 <= root < ranks=4, got root=-1"),
        (lambda: costs.star_bytes(3, 4, root=9), "need 0 <= root < ranks=4, got root=9"),
        (
            lambda: costs.collective_seconds("ring", 1, 2, **LINK),
            "need a name among reduce_scatter, .*, got name='ring'",
        ),
        (lambda: costs.collective_seconds("star", 1, 2, latency=0, bandwidth=0), "need bandwidth > 0, got bandwidth=0"),
        (lambda: costs.collective_seconds("star", 1, 2, latency=-1, bandwidth=1), "need latency >= 0, got latency=-1"),
    ],
)
@pytest.mark.verifies(
    *(f"costs.{name}_bytes" for name in BYTES),
    "costs.chunk_lengths",
    "costs.collective_seconds",
    kind="message",
    against="wrong arguments",
    on="which argument, what was needed, what came",
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
