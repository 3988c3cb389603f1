"""Bits and numbers in a stream: what is written is read again, and what cannot be is refused."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_course.compression.bits import (
    BitReader,
    BitWriter,
    read_numbers,
    to_floats,
    write_numbers,
    write_scale,
)

LARGEST_OF_ALL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # `seen` adds up


@pytest.mark.verifies(
    "compression.bits.BitWriter",
    "compression.bits.BitReader",
    kind="invariant",
    against="the numbers written",
    on="any numbers of any widths",
)
@given(st.lists(st.integers(0, 40).flatmap(lambda w: st.tuples(st.integers(0, max(0, 2**w - 1)), st.just(w)))))
def test_what_is_written_is_read(pairs):
    writer = BitWriter()
    for value, width in pairs:
        writer.write(value, width)
        writer.write_number(value % 2**32)
    data = writer.getvalue()
    assert len(data) == -(-len(writer) // 8)
    reader = BitReader(data)
    for value, width in pairs:
        assert (reader.read(width), reader.read_number()) == (value, value % 2**32)
    reader.finish()


@pytest.mark.verifies(
    "compression.bits.BitReader",
    "compression.bits.BitWriter",
    kind="message",
    against="ValueError",
    on="bytes that end, bytes left over, numbers too large",
)
def test_wrong_bits_are_named():
    with pytest.raises(ValueError, match="value must have at most 3 bits, got 8"):
        BitWriter().write(8, 3)
    with pytest.raises(ValueError, match="end too early: need 9 bits, 8 are left"):
        BitReader(b"a").read(9)
    with pytest.raises(ValueError, match="more than 32 bits"):
        BitReader(bytes(9)).read_number()
    with pytest.raises(ValueError, match="2 bytes are left over"):
        BitReader(b"ab").finish()
    reader = BitReader(b"\x01")
    reader.read(4)
    with pytest.raises(ValueError, match="must be zeros"):
        reader.finish()


@pytest.mark.verifies(
    "compression.bits.write_numbers",
    "compression.bits.read_numbers",
    "compression.bits.to_floats",
    kind="parity",
    against="numpy's float16 and float32",
    on="normal, tiny, large and zero numbers",
    bound=0.0,
)
@pytest.mark.parametrize(("bits", "dtype"), [(16, np.float16), (32, np.float32)])
def test_floats_are_numpys(bits, dtype, seen):
    numbers = torch.tensor([0.0, -0.0, 1e-7, 6e4, -1 / 3, 1e-3])
    writer = BitWriter()
    said = write_numbers(writer, numbers, bits)
    found = read_numbers(BitReader(writer.getvalue()), 6, bits)
    assert torch.equal(said, found)
    seen((found - torch.from_numpy(numbers.numpy().astype(dtype).astype(np.float32))).abs().max())


@pytest.mark.verifies(
    "compression.bits.write_scale",
    "compression.bits.write_numbers",
    "compression.bits.read_numbers",
    "compression.bits.to_floats",
    kind="invariant",
    against="half a step, the step at most 1 % above largest / (2^(bits-1) - 1); in steps",
    on="random numbers of 30 orders of magnitude, 4 to 8 bits, also all zero, one and none",
    bound=0.50001,
)
@LARGEST_OF_ALL
@given(st.integers(4, 8), st.integers(-30, 30), st.integers(0, 20), st.integers(0, 99))
def test_rounded_numbers_are_within_half_a_step(seen, bits, power, n, seed):
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    writer = BitWriter()
    said = write_numbers(writer, numbers, bits)
    assert len(writer) == 16 + n * bits
    found = read_numbers(BitReader(writer.getvalue()), n, bits)
    assert torch.equal(said, found)
    again = BitWriter()
    assert all(0 < p < 2**bits for p in write_scale(again, numbers, bits)[1])
    if n:
        step = numbers.double().abs().max() / (2 ** (bits - 1) - 1) * 1.008
        seen(((found.double() - numbers.double()).abs() / step).max())
    zeros = BitWriter()
    write_numbers(zeros, torch.zeros(3), bits)
    assert not read_numbers(BitReader(zeros.getvalue()), 3, bits).any()


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        to_floats([0x7C00], 16, 0)
