"""Arithmetic coding with mixed contexts: bits in fewer bytes, the better their chances are known beforehand.

Huffman coding spends at least one bit on a symbol.  An arithmetic coder spends -log2(chance) on each decision, however
little that is (Witten, Neal and Cleary 1987), and the chance may be another one every time.  The mixer makes it, as in
Mahoney's PAQ: each context has a chance of its own that it learns as it goes; the mixer adds these up as log-odds, with
weights that take a gradient step after each bit.  It is a small logistic regression, trained while the file is written
and trained in the same way while it is read.

All is integer arithmetic, because reader and writer must agree to the last bit on any machine: log-odds are in 1/256,
chances in 1/65536.
"""

import math
from collections.abc import Sequence
from operator import mul

import numpy as np

__all__ = ["Decoder", "Encoder", "Mixer"]

NAT, ONE = 256, 1 << 16  # units of log-odds and of chances
FAR = 12 * NAT - 1  # log-odds beyond this are cut off
# No entry is so near a half that the last digit of some machine's logarithm could tip the rounding: a test holds it.
_chances, _odds = np.arange(ONE) + 0.5, np.arange(-FAR, FAR + 1) / NAT
STRETCHED = np.rint(NAT * np.log(_chances / (ONE - _chances))).astype(int)
STRETCH = STRETCHED.tolist()
SQUASH = np.clip(np.rint(ONE / (1 + np.exp(-_odds))), 1, ONE - 1).astype(int).tolist()
SLOWEST = 255  # a chance follows the mean of what its context has seen, and later the last 255 or so
RATES = [int(ONE / (n + 1.5)) for n in range(SLOWEST + 1)]
FINE = 6  # more bits of a chance that is learned, for small steps
WEIGHT = 20  # bits after the point of a mixer's weight


class Encoder:
    """Bits into bytes, each as -log2(chance) bits: the place in an interval that every bit narrows.

    `costs` counts the bits of each `kind` that was set.
    """

    def __init__(self) -> None:
        self._low, self._high, self._bytes = 0, 0xFFFFFFFF, bytearray()
        self.kind, self.costs = "", {}

    def code(self, bit: int, chance: int) -> int:
        """Add `bit`; `chance` / 65536 is what the reader, too, takes for its chance to be 1."""
        middle = self._low + ((self._high - self._low) * chance >> 16)
        if bit:
            self._high = middle
        else:
            self._low = middle + 1
        while not (self._low ^ self._high) >> 24:  # the first byte is settled
            self._bytes.append(self._low >> 24)
            self._low, self._high = self._low << 8 & 0xFFFFFFFF, (self._high << 8 & 0xFFFFFFFF) | 0xFF
        cost = -math.log2((chance if bit else ONE - chance) / ONE)
        self.costs[self.kind] = self.costs.get(self.kind, 0.0) + cost
        return bit

    def finish(self) -> bytes:
        """All bytes; the last are the fewest that say a place in the interval, if zeros are read behind them."""
        return bytes(self._bytes) + _last_bytes(self._low, self._high)


class Decoder:
    """`Encoder` the other way: the same chances give the same bits."""

    def __init__(self, data: bytes) -> None:
        self._low, self._high, self._data, self._next = 0, 0xFFFFFFFF, data, 4
        self._place = int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self.kind = ""

    def code(self, bit: int, chance: int) -> int:
        """The next bit; the argument `bit` is not looked at.  ValueError when the bytes have long ended."""
        middle = self._low + ((self._high - self._low) * chance >> 16)
        bit = int(self._place <= middle)
        if bit:
            self._high = middle
        else:
            self._low = middle + 1
        while not (self._low ^ self._high) >> 24:
            self._low, self._high = self._low << 8 & 0xFFFFFFFF, (self._high << 8 & 0xFFFFFFFF) | 0xFF
            byte = self._data[self._next] if self._next < len(self._data) else 0
            self._place, self._next = (self._place << 8 & 0xFFFFFFFF) | byte, self._next + 1
            if self._next > len(self._data) + 4:
                raise ValueError("the coded bytes end too early")
        return bit

    def finish(self) -> None:
        """ValueError unless the bytes end as `Encoder.finish` ends them."""
        if self._data[self._next - 4 :] != _last_bytes(self._low, self._high):
            raise ValueError("the coded bytes do not end where the last bit does")


def _last_bytes(low: int, high: int) -> bytes:
    """The fewest bytes that say a place from `low` to `high`, if zeros are read behind them."""
    for count in range(5):
        unit = 1 << 32 - 8 * count
        place = -(-low // unit) * unit
        if place <= high:
            break
    return place.to_bytes(5, "big")[1 : 1 + count]


class Mixer:
    """The chance of a bit from several contexts and known log-odds, learned from each bit.

    `weights`: one for each context, then one for each known log-odds.  `sizes`: how many values each context has.
    `start`: the chance before anything is seen, of 65536.  `shift`: a weight's step is error x input / 2^shift.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], *, start: int = ONE // 2, shift: int = 15):
        self._weights = [round(weight * (1 << WEIGHT)) for weight in weights]
        self._chances = [[start << FINE] * size for size in sizes]
        self._seen = [[0] * size for size in sizes]
        self._shift = shift

    def code(self, coder: Encoder | Decoder, bit: int, contexts: Sequence[int], known: Sequence[int]) -> int:
        """Give `bit` to the encoder, or get it from the decoder, and learn from it."""
        inputs = [STRETCH[chances[c] >> FINE] for chances, c in zip(self._chances, contexts, strict=True)]
        inputs += known
        odds = sum(map(mul, self._weights, inputs)) >> WEIGHT
        chance = SQUASH[min(max(odds, -FAR), FAR) + FAR]
        bit = coder.code(bit, chance)
        error, shift = (bit << 16) - chance, self._shift
        half = 1 << shift - 1
        self._weights = [w + (error * x + half >> shift) for w, x in zip(self._weights, inputs, strict=True)]
        target = bit << 16 + FINE
        for chances, seen, c in zip(self._chances, self._seen, contexts, strict=True):
            chances[c] += (target - chances[c]) * RATES[seen[c]] >> 16
            if seen[c] < SLOWEST:
                seen[c] += 1
        return bit
