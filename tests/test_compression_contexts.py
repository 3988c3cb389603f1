"""Sparse matrices through the arithmetic coder: exact for any shape, and short where there is a pattern."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_course.compression.bits import BitWriter
from bigmodel_course.compression.contexts import decode, encode
from bigmodel_course.compression.huffman import write_sparse


@st.composite
def layers(draw):
    """Matrices, values and numbers: chains or not, images or not, from empty to full."""
    dice = np.random.default_rng(draw(st.integers(0, 999)))
    matrices, values, numbers, bits = [], [], [], draw(st.integers(4, 8))
    for _ in range(draw(st.integers(0, 3))):
        rows, columns = draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 2, 5, 9, 64, 81]))
        if matrices and draw(st.booleans()):
            columns = len(matrices[-1])
        size = draw(st.sampled_from([1, 2, 8, 40, 255]))
        kept = dice.random((rows, columns)) < draw(st.sampled_from([0, 0.02, 0.3, 1]))
        matrices.append((kept * dice.integers(1, size + 1, (rows, columns))).astype(np.uint8))
        values.append((size, draw(st.integers(0, size))))
        numbers.append(dice.integers(1, 2**bits, draw(st.sampled_from([0, rows]))).tolist())
    return matrices, values, numbers, bits


@pytest.mark.verifies(
    "compression.contexts.encode",
    "compression.contexts.decode",
    kind="invariant",
    against="the codes and numbers coded",
    on="any shapes (also empty), densities from none to all, 1 to 255 values of any signs",
)
@settings(deadline=None, max_examples=40)
@given(layers())
def test_any_layers_come_back(case):
    matrices, values, numbers, bits = case
    before = [matrix.copy() for matrix in matrices]
    data, costs = encode(matrices, values, numbers, bits)
    assert abs(8 * len(data) - sum(costs.values())) < 40
    found, found_numbers = decode(data, [m.shape for m in matrices], values, [len(n) for n in numbers], bits)
    assert found_numbers == numbers
    for matrix, kept, original in zip(matrices, found, before, strict=True):
        assert np.array_equal(matrix, kept)
        assert np.array_equal(matrix, original)


@pytest.mark.verifies(
    "compression.contexts.decode",
    kind="recovery",
    against="ValueError, or codes of the shape and alphabet asked for",
    on="any bytes",
)
@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60), st.sampled_from([1, 2, 255]), st.integers(0, 255))
def test_any_bytes_are_refused_or_give_codes_of_that_shape(data, size, negative):
    try:
        (codes, _), numbers = decode(data, [(4, 64), (3, 4)], [(size, min(negative, size))] * 2, [4, 3], 8)
    except ValueError:
        return
    assert codes.shape == (4, 64)
    assert codes.max() <= size
    assert [len(n) for n in numbers] == [4, 3]


@pytest.mark.verifies(
    "compression.contexts.encode",
    kind="invariant",
    against="Huffman coding of relative indices: its bytes over ours at least 1.2, given as 1.2 / ratio",
    on="60 neurons that look at spots of a 28 x 28 image, positive inside and negative around",
    bound=1.0,
)
def test_patterns_take_fewer_bytes_than_with_huffman(seen):
    dice = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    centers, codes = dice.uniform(8, 20, (60, 2)), np.zeros((60, 784), dtype=np.uint8)
    for row, (cy, cx) in zip(codes, centers, strict=True):
        distance = np.hypot(y - cy, x - cx).ravel()
        kept = dice.random(784) < 0.5 * np.exp(-((distance / 3) ** 2))
        row[kept] = np.where(distance < 2, 3, 1)[kept] + (dice.random(kept.sum()) < 0.3)
    writer = BitWriter()
    write_sparse(writer, codes.ravel(), 4, huffman=True)
    data, _ = encode([codes], [(4, 2)], [[]], 0)
    seen(1.2 / (len(writer) / 8 / len(data)))
