"""Bits and numbers in a stream: whole numbers of any width, floats, and rounded numbers with one scale."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BitReader", "BitWriter", "read_numbers", "to_floats", "write_numbers", "write_scale"]

FLOATS = {16: ">f2", 32: ">f4"}
SCALE = 16  # bits of the scale


class BitWriter:
    """Collects numbers of any width, first bit first; `len()` is the number of bits so far."""

    def __init__(self) -> None:
        self._bits: list[str] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def write(self, value: int, width: int) -> None:
        """Add `value` as `width` bits; ValueError if it does not fit."""
        if not 0 <= value < 1 << width:
            raise ValueError(f"value must have at most {width} bits, got {value}")
        if width:
            self._bits.append(f"{value:0{width}b}")
        self._length += width

    def write_number(self, value: int) -> None:
        """Add a number >= 0 of any size: 2 log2(value + 1) + 1 bits (Elias gamma code of value + 1)."""
        width = (value + 1).bit_length()
        self.write(0, width - 1)
        self.write(value + 1, width)

    def extend(self, other: "BitWriter") -> None:
        """Add all the bits of `other`."""
        self._bits += other._bits
        self._length += len(other)

    def getvalue(self) -> bytes:
        """All bits, filled up with zeros to whole bytes."""
        bits = np.frombuffer("".join(self._bits).encode(), dtype=np.uint8) - ord("0")
        return np.packbits(bits).tobytes()


class BitReader:
    """Reads what `BitWriter` wrote; ValueError where the bytes end too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def left(self) -> int:
        """Bits not read yet."""
        return 8 * len(self._data) - self._place

    def read(self, width: int) -> int:
        """The next `width` bits as a number."""
        if width > self.left():
            raise ValueError(f"the bytes end too early: need {width} bits, {self.left()} are left")
        start, self._place = self._place, self._place + width
        end = -(-self._place // 8)
        number = int.from_bytes(self._data[start // 8 : end], "big") >> (8 * end - self._place)
        return number & ((1 << width) - 1)

    def read_number(self) -> int:
        """What `write_number` wrote; ValueError beyond 32 bits."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise ValueError("a number of more than 32 bits: these are not the bits of write_number")
        return (1 << zeros | self.read(zeros)) - 1

    def rest(self) -> bytes:
        """The whole bytes that are left; ValueError unless zeros fill the byte begun."""
        if self.read(self.left() % 8):
            raise ValueError("the last bits of a byte must be zeros: these are not the bytes of one whole code")
        rest, self._place = self._data[self._place // 8 :], 8 * len(self._data)
        return rest

    def finish(self) -> None:
        """ValueError unless only the zeros that fill the last byte are left."""
        if rest := self.rest():
            raise ValueError(f"{len(rest)} bytes are left over: these are not the bytes of one whole code")


def write_numbers(writer: BitWriter, numbers: Tensor, bits: int) -> Tensor:
    """Write floats of 16 or 32 bits, or one scale and whole numbers of 4 to 8 bits; return them as they will be read.

    ValueError for numbers that such a float cannot hold.
    """
    scale = 0
    if bits > 8:
        with np.errstate(over="ignore"):
            floats = numbers.detach().cpu().numpy().astype(FLOATS[bits])
        if not np.isfinite(floats).all():
            raise ValueError(f"numbers must fit into a {bits}-bit float, got up to {float(numbers.abs().max()):g}")
        patterns = floats.view(f">u{bits // 8}").tolist()
    else:
        scale, patterns = write_scale(writer, numbers, bits)
    for pattern in patterns:
        writer.write(pattern, bits)
    return to_floats(patterns, bits, scale)


def read_numbers(reader: BitReader, n: int, bits: int) -> Tensor:
    """The `n` numbers that `write_numbers` wrote, float32 [n]; ValueError if one is not finite."""
    scale = reader.read(SCALE) if bits <= 8 else 0
    return to_floats([reader.read(bits) for _ in range(n)], bits, scale)


def write_scale(writer: BitWriter, numbers: Tensor, bits: int) -> tuple[int, list[int]]:
    """Write the step between neighbouring numbers of `bits` bits; return it and the numbers, zero in the middle.

    The step is a float32 cut to its first 16 bits, and one up, so that the largest number is not cut off.
    """
    half = (1 << bits - 1) - 1
    numbers = numbers.detach().cpu().double()
    step = (numbers.abs().max() / half).float() if len(numbers) else torch.zeros(())
    pattern = (step.view(torch.int32).item() >> 16) + 1
    writer.write(pattern, SCALE)
    return pattern, ((numbers / _step(pattern)).round().long() + half + 1).tolist()


def to_floats(patterns: Sequence[int], bits: int, scale: int) -> Tensor:
    """The float32 numbers that patterns of `bits` bits mean, with the `scale` that `write_scale` wrote."""
    if bits > 8:
        floats = np.array(patterns, dtype=f">u{bits // 8}").view(FLOATS[bits]).astype(np.float32)
    else:
        with np.errstate(all="ignore"):  # a scale from a hostile file
            floats = ((np.array(patterns, dtype=np.float64) - (1 << bits - 1)) * _step(scale)).astype(np.float32)
    if not np.isfinite(floats).all():
        raise ValueError("a shared value or bias is not finite")
    return torch.from_numpy(floats)


def _step(pattern: int) -> float:
    return torch.tensor(pattern << 16, dtype=torch.int64).to(torch.int32).view(torch.float32).item()
