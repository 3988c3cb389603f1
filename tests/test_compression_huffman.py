"""Huffman codes: as short as any, within a bit of the entropy, read back exactly, and never read past the end."""

import heapq
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_course.compression.bits import BitReader, BitWriter
from bigmodel_course.compression.huffman import Huffman, code_lengths, read_sparse, write_sparse

LARGEST_OF_ALL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # `seen` adds up
COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)


def huffman_total(counts):
    """Huffman's own way: merge the two rarest until one is left; each merge costs its weight in bits."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def total(counts, lengths):
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


@pytest.mark.verifies(
    "compression.huffman.code_lengths",
    kind="parity",
    against="Huffman's merging with heapq: the same total of bits",
    on="any counts of up to 40 symbols, where 15 bits do not bind",
    bound=0,
)
@LARGEST_OF_ALL
@given(COUNTS)
def test_codes_are_as_short_as_huffmans(seen, counts):
    if sum(map(bool, counts)) > 1:
        seen(abs(total(counts, code_lengths(counts, limit=32)) - huffman_total(counts)))


@pytest.mark.verifies(
    "compression.huffman.code_lengths",
    kind="parity",
    against="the best of all lengths that Kraft's inequality allows, by trying them all",
    on="any counts of up to 5 symbols, at most 3 or 4 bits",
    bound=0,
)
@settings(LARGEST_OF_ALL, max_examples=30)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=5), st.integers(3, 4))
def test_bounded_codes_are_the_best_there_are(seen, counts, limit):
    every = itertools.product(range(1, limit + 1), repeat=len(counts))
    best = min(total(counts, lengths) for lengths in every if sum(2.0**-n for n in lengths) <= 1)
    seen(abs(total(counts, code_lengths(counts, limit=limit)) - best))


@pytest.mark.verifies(
    "compression.huffman.Huffman",
    kind="invariant",
    against="mean length between the entropy and 1 bit more; excess in bits",
    on="any counts of up to 40 symbols",
    bound=1.0,
)
@LARGEST_OF_ALL
@given(COUNTS)
def test_the_mean_length_is_within_one_bit_of_the_entropy(seen, counts):
    n = sum(counts)
    entropy = -sum(c / n * math.log2(c / n) for c in counts if c)
    symbols = np.repeat(np.arange(len(counts)), counts)
    excess = total(counts, Huffman.fit(symbols, size=len(counts)).lengths) / n - entropy
    assert excess > -1e-9
    seen(excess)


def test_lengths_are_bounded_where_huffmans_are_not():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(sum(fibonacci[-2:]))
    assert max(code_lengths(fibonacci, limit=32)) == 29
    assert max(code_lengths(fibonacci)) == 15


@pytest.mark.verifies(
    "compression.huffman.Huffman",
    kind="invariant",
    against="the symbols; no code begins another one",
    on="any symbols, also one alone and none",
)
@given(st.lists(st.integers(0, 30), max_size=200))
def test_decoding_gives_the_symbols_back(symbols):
    code = Huffman.fit(symbols)
    assert code.decode(code.encode(symbols), len(symbols)) == symbols
    words = [f"{value:0{length}b}" for value, length in code.codes().values()]
    assert not any(a != b and b.startswith(a) for a in words for b in words)


@pytest.mark.verifies(
    "compression.huffman.Huffman",
    "compression.huffman.code_lengths",
    kind="message",
    against="ValueError",
    on="impossible lengths, symbols without a code, bytes cut off, left over or flipped, too many symbols",
)
def test_wrong_input_is_refused():
    code = Huffman.fit([0, 0, 0, 1, 2])
    data = code.encode([0, 1, 2, 0, 0, 1, 2])
    for lengths in ((1, 1, 1), (1, 2), (16, 1), (-1, 1), (2,)):
        with pytest.raises(ValueError, match="complete code"):
            Huffman(lengths)
    with pytest.raises(ValueError, match="symbols must be among the 3"):
        code.encode([3])
    with pytest.raises(ValueError, match="n must be from 0"):
        code.decode(data, 10**12)
    for n in (5, 20):
        with pytest.raises(ValueError, match=r"too early|left over|zeros"):
            code.decode(data + b"\1", n)
    with pytest.raises(ValueError, match="no code"):
        Huffman((1,)).decode(b"\xff\xff", 1)
    with pytest.raises(ValueError, match="need counts >= 0"):
        code_lengths([1, -1])
    with pytest.raises(ValueError, match="at most 2"):
        code_lengths([1] * 5, limit=2)


@st.composite
def sparse(draw):
    n, size = draw(st.integers(0, 400)), draw(st.integers(1, 20))
    dice = np.random.default_rng(draw(st.integers(0, 999)))
    kept = dice.random(n) < draw(st.sampled_from([0, 0.01, 0.1, 0.5, 1]))
    return (kept * dice.integers(1, size + 1, n)).astype(np.uint8), size


@pytest.mark.verifies(
    "compression.huffman.write_sparse",
    "compression.huffman.read_sparse",
    kind="invariant",
    against="the codes written",
    on="any density from none to all, 1 to 20 values, fixed width and Huffman",
)
@settings(deadline=None)
@given(sparse(), st.booleans())
def test_sparse_codes_come_back(case, huffman):
    codes, size = case
    writer = BitWriter()
    parts = write_sparse(writer, codes, size, huffman=huffman)
    assert sum(parts.values()) == len(writer)
    reader = BitReader(writer.getvalue())
    assert (read_sparse(reader, len(codes), size, huffman=huffman) == codes).all()
    reader.finish()


@pytest.mark.verifies(
    "compression.huffman.read_sparse",
    kind="recovery",
    against="ValueError, or codes of the shape and alphabet asked for",
    on="any bytes",
)
@settings(deadline=None)
@given(st.binary(max_size=60), st.integers(0, 300), st.integers(0, 8), st.booleans())
def test_any_bytes_are_refused_or_give_codes_of_that_shape(data, n, size, huffman):
    try:
        codes = read_sparse(BitReader(data), n, size, huffman=huffman)
    except ValueError:
        return
    assert codes.shape == (n,)
    assert codes.max(initial=0) <= size
