"""What an arithmetic coder may know of a sparse weight matrix before it sees the next weight.

Two decisions on pruned weights repeat themselves: where they stand, and what they are.  A kept weight has kept
neighbours, a pixel that some neurons use is used by more, a busy neuron stays busy, and a neuron without inputs has no
outputs; next to a positive weight of a neuron's picture stands a positive one.  `encode` says so to `arithmetic.Mixer`,
which finds out how much each of it counts.
"""

import math
from collections.abc import Sequence

import numpy as np

from bigmodel_course.compression.arithmetic import NAT, ONE, STRETCHED, Decoder, Encoder, Mixer

__all__ = ["decode", "encode"]

# What the weights of the mixers tend to on pruned LeNets, for an image and for other inputs: a good place to start.
PLACES = ((0.45, 0.25, 0.05, 0.07, 0.12, 0.30, 0.10, -0.58, 0.10, 0.14, 0.22),)
PLACES += ((0.05, 0.15, 0.30, 0.10, 0.12, 0.14, 0.07, 0.07, 0.15, 0.08, -0.05),)
SIGNS = ((0.50, 0.45, 0.10, 0.35, 0.25), (0.20, 0.20, 0.25, 0.10, 0.15))
SIZES = ((0.35, 0.50, 0.20, 0.20, -0.30, 0.05), (0.30, 0.10, 0.05, 0.20, 0.20, 0.05))
BIAS = 77  # the input of the mixers that is always there: 0.3
NEAR = {(0, 1): 1, (1, 0): 2, (1, 1): 4, (1, -1): 8, (0, 2): 16, (2, 0): 16}  # which neighbour one is to those ahead
AHEAD = [(dy, dx) for dy in range(4) for dx in range(-3, 4) if dy or dx > 0]
LEVELS = [(ONE * (65536, 55109, 46341, 38968)[i % 4] >> 16) >> i // 4 for i in range(56)]  # shares 2^(-i/4)
LOGS = np.rint(NAT * np.log(np.maximum(np.arange(4096), 1))).astype(int)


def encode(
    matrices: Sequence[np.ndarray], values: Sequence[tuple[int, int]], numbers: Sequence[Sequence[int]], bits: int
) -> tuple[bytes, dict[str, float]]:
    """Code the layers of a model; return the bytes, and the bits that positions, codes and biases took.

    `matrices`: codes, uint8 [rows, columns] each, 0 for a pruned weight.  `values`: of each layer, how many shared
    values there are, and how many of them (the first ones) are negative.  `numbers`: of each layer, whole numbers of
    `bits` bits, one for each row or none at all.  `decode` needs all this but the codes and the numbers themselves.
    """
    coder = Encoder()
    _code(coder, [matrix.copy() for matrix in matrices], values, [list(n) for n in numbers], bits)
    return coder.finish(), {kind: coder.costs.get(kind, 0.0) for kind in ("positions", "codes", "biases")}


def decode(
    data: bytes,
    shapes: Sequence[tuple[int, int]],
    values: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    bits: int,
) -> tuple[list[np.ndarray], list[list[int]]]:
    """The codes and numbers that `encode` coded; ValueError if `data` has too few bytes or too many."""
    matrices, numbers = [np.zeros(shape, dtype=np.uint8) for shape in shapes], [[0] * n for n in lengths]
    coder = Decoder(data)
    _code(coder, matrices, values, numbers, bits)
    coder.finish()
    return matrices, numbers


def _code(
    coder: Encoder | Decoder,
    matrices: list[np.ndarray],
    values: Sequence[tuple[int, int]],
    numbers: list[list[int]],
    bits: int,
) -> None:
    """Writing and reading in one: each bit goes through `coder`, and what comes out of it is put in its place."""
    kept = np.zeros(0, dtype=int)
    for matrix, (size, negative), row_numbers in zip(matrices, values, numbers, strict=True):
        before = kept if len(kept) == matrix.shape[1] else None
        _Matrix(coder, matrix, (size, negative), before).code()
        kept = (matrix > 0).sum(1)
        coder.kind = "biases"
        _code_numbers(coder, row_numbers, kept.tolist(), bits)


def _code_numbers(coder: Encoder | Decoder, numbers: list[int], kept: list[int], bits: int) -> None:
    """Numbers around the middle: how long they are, then their sign, then the bits behind the first."""
    middle, lengths, signs = 1 << max(bits - 1, 0), Mixer([1.0], [4 * 16]), Mixer([1.0], [4])
    for row, number in enumerate(numbers):
        live, size, length = min(kept[row], 3), abs(number - middle), 0
        while length < bits and lengths.code(coder, int(size.bit_length() > length), [live * 16 + length], []):
            length += 1
        found = 1
        for place in range(length - 2, -1, -1):
            found = found << 1 | coder.code(size >> place & 1, ONE // 2)
        sign = length and signs.code(coder, int(number < middle), [live], [])
        numbers[row] = middle + (0 if not length else -found if sign else found)


class _Matrix:
    """One matrix on its way through the coder, row by row; the columns may be the pixels of a square image.

    Around what is known of the present row there is a margin of 3, so that neighbours need no special cases.
    """

    def __init__(self, coder: Encoder | Decoder, codes: np.ndarray, values: tuple[int, int], before: np.ndarray | None):
        self._coder, self._codes, (self._size, self._negative) = coder, codes, values
        rows, columns = codes.shape
        side, self._before = math.isqrt(columns), np.zeros(columns, dtype=int) if before is None else before
        self._image = before is None and columns >= 64 and side * side == columns
        self._high, self._wide = (side, side) if self._image else (1, columns)
        self._pitch = self._wide + 6
        self._inner = [(y + 3) * self._pitch + x + 3 for y in range(self._high) for x in range(self._wide)]
        most = max(rows, columns, int(self._before.max(initial=0)))
        self._rough = np.array([_rough(n) for n in range(most + 1)])
        self._signs, self._sizes = SIGNS[not self._image], SIZES[not self._image]
        self._counts = np.zeros(columns, dtype=int)  # what each column held in the rows so far: how many weights,
        self._leans, self._sums, self._last = [0] * columns, [0] * columns, [0] * columns  # signs, sizes, last size

    def code(self) -> None:
        """Every row, each weight's position and then at once its code."""
        if not (self._size and self._codes.size):
            return
        self._coder.kind = "positions"
        share = _code_share(self._coder, np.count_nonzero(self._codes) / self._codes.size)
        self._mix = Mixer(PLACES[not self._image], [32, 192, 4096, 192, 4096], start=share)
        self._mix_sign = Mixer(self._signs, [81, 13, 27, 112], shift=13)
        self._mix_size = Mixer(self._sizes, [16, 128, 1024, 128, 512], shift=13)
        count = 0
        for r in range(len(self._codes)):
            count = self._code_row(r, share, count)

    def _code_row(self, r: int, share: int, count_before: int) -> int:
        """Code row `r`; return how many weights it keeps."""
        row, rough, coder, mix = self._codes[r].tolist(), self._rough.tolist(), self._coder, self._mix
        column, dense, own, expected, side = self._column_inputs(r, share)
        self._start_row()
        near, close, around = self._near, self._close, self._around
        count = gap = 0
        for i, j in enumerate(self._inner):
            active = LOG_COUNTS[count] - expected[i] if count < 4095 else 0
            contexts = (
                near[j],
                3 * rough[count] + min(close[j], 2),
                column[i],
                16 * min(around[j], 11) + min(max((active >> 7) + 6, 0), 15),
                64 * rough[gap] + rough[count_before],
            )
            known = [dense[i], own[i], active, side[i], BIAS, LOG_AROUND[around[j]]]
            gap += 1
            if mix.code(coder, int(row[i] > 0), contexts, known):
                coder.kind = "codes"
                row[i] = self._code_value(row[i], i, j)
                coder.kind = "positions"
                count, gap = count + 1, 0
        self._codes[r] = row
        return count

    def _column_inputs(self, r: int, share: int) -> list[list[int]]:
        """What the rows before say of each column: a context; log-odds around it, in it, up to it, in `before`."""
        counts, rough = self._counts, self._rough
        dense = np.minimum((_blurred(counts, self._high, self._wide) * ONE + 20 * share) // (16 * r + 20), ONE - 1)
        own = np.minimum((counts * ONE + 4 * share) // (r + 4), ONE - 1)
        expected = _log((np.cumsum(dense) - dense >> 8) + 256) - _log(np.array([256]))
        side = _log(10 * self._before + 3) - _log(np.array([30])) if self._before.any() else 0 * counts
        inputs = (64 * rough[counts] + rough[self._before], STRETCHED[dense], STRETCHED[own], expected, side)
        return [numbers.tolist() for numbers in inputs]

    def _start_row(self) -> None:
        cells = (self._high + 6) * self._pitch
        self._near, self._close, self._around = [0] * cells, [0] * cells, [0] * cells
        self._lean, self._sign, self._length, self._row_lean = [0] * cells, [0] * cells, [0] * cells, 0

    def _code_value(self, code: int, i: int, j: int) -> int:
        """The code of the weight in column `i`, at `j` with margins: its sign, and how many values are smaller."""
        positive, size = code > self._negative, max(code - self._negative - 1, self._negative - code)
        positive = self._code_sign(positive, i, j)
        size = self._code_size(size, positive, i, j)
        self._counts[i] += 1
        self._remember(1 if positive else -1, size, i, j)
        return self._negative + 1 + size if positive else self._negative - size

    def _code_sign(self, positive: bool, i: int, j: int) -> bool:
        if self._negative in (0, self._size):
            return not self._negative
        sign, lean = self._sign, self._lean[j]
        left, up_left, up, up_right = (sign[k] for k in self._four(j))
        contexts = (
            left % 3 * 27 + up % 3 * 9 + up_left % 3 * 3 + up_right % 3,
            _cut(lean, 6) + 6,
            3 * (_cut(self._leans[i], 4) + 4) + left + 1,
            16 * (_cut(lean, 3) + 3) + _cut(self._row_lean, 3) + 3,
        )
        return bool(self._mix_sign.code(self._coder, int(positive), contexts, [BIAS]))

    def _code_size(self, size: int, positive: bool, i: int, j: int) -> int:
        """One bit for each value that might be the one, from the smallest on."""
        most = (self._size - self._negative if positive else self._negative) - 1
        lengths = [self._length[k] for k in self._four(j) if self._length[k]]
        mean = 1 + min(2 * (sum(lengths) - len(lengths)) // len(lengths), 6) if lengths else 0
        usual = 1 + min(2 * self._sums[i] // int(self._counts[i]), 6) if self._counts[i] else 0
        last = 8 * min(self._last[i], 15) + min(self._length[j - 1], 7)
        before, found = int(self._rough[self._before[i]]), 0
        while found < most:
            t = min(found, 7)
            contexts = (2 * t + positive, 16 * t + mean, 128 * t + last, 16 * t + usual, 64 * t + before)
            if not self._mix_size.code(self._coder, int(size > found), contexts, [BIAS]):
                break
            found += 1
        return found

    def _four(self, j: int) -> tuple[int, int, int, int]:
        """The neighbours known already: left, and the three above."""
        return j - 1, j - self._pitch - 1, j - self._pitch, j - self._pitch + 1

    def _remember(self, sign: int, size: int, i: int, j: int) -> None:
        """Tell the neighbours to come, and the column."""
        self._sign[j], self._length[j] = sign, size + 1
        self._leans[i], self._sums[i], self._last[i] = self._leans[i] + sign, self._sums[i] + size, size + 1
        self._row_lean += sign
        for (dy, dx), flag in NEAR.items():
            self._near[j + dy * self._pitch + dx] |= flag
        for dy, dx in AHEAD:
            k = j + dy * self._pitch + dx
            self._around[k] += 1
            if max(dy, abs(dx)) <= 2:
                self._close[k] += 1
                self._lean[k] += 2 * sign if max(dy, abs(dx)) == 1 else sign


def _code_share(coder: Encoder | Decoder, share: float) -> int:
    """Six bits for the share of the weights that are kept, as a chance of 65536."""
    level = min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - share * ONE))
    found = 0
    for place in range(5, -1, -1):
        found = found << 1 | coder.code(level >> place & 1, ONE // 2)
    return min(LEVELS[min(found, len(LEVELS) - 1)], ONE - 1)


def _blurred(counts: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Sixteen times `counts`, of an image smoothed with (1 2 1) both ways."""
    if high == 1:
        return 16 * counts
    image = np.pad(counts.reshape(high, wide), 1)
    image = image[:-2] + 2 * image[1:-1] + image[2:]
    return (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]).ravel()


def _log(numbers: np.ndarray) -> np.ndarray:
    """256 log(n) of whole numbers from 1 to 2^52, to about 1."""
    shifts = np.maximum(np.frexp(numbers.astype(float))[1] - 12, 0)  # exact: how many bits are more than 12
    return LOGS[numbers >> shifts] + (shifts * LOG_2 >> 8)


def _rough(number: int) -> int:
    """Below 6 the number itself, from there on two steps for each doubling."""
    bits = number.bit_length()
    return number if number < 6 else 2 * bits + (number >> bits - 2 & 1)


def _cut(number: int, most: int) -> int:
    return min(max(number, -most), most)


LOG_2 = round(256 * NAT * math.log(2))
LOG_COUNTS = _log(np.arange(1, 4096)).tolist()
LOG_AROUND = (_log(5 * np.arange(25) + 1) - _log(np.array([5]))).tolist()
