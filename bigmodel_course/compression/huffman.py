"""Huffman coding, and the sparse codes that it shortens: where the non-zero weights stand and which value each has.

Huffman (1952) gives each symbol a whole number of bits, fewer to the frequent ones, so that the mean length is the
least possible.  The codes are canonical: the lengths alone say them all, so only lengths are stored.

A sparse matrix is stored as in Deep Compression (Han, Mao and Dally 2016, arXiv 1510.00149, section 2): for each
non-zero weight the number of zeros before it, as one symbol of a few bits, and the number of its shared value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from bigmodel_course.compression.bits import BitReader, BitWriter

__all__ = ["Huffman", "code_lengths", "read_sparse", "write_sparse"]

LONGEST = 15  # bits of a code: what four bits can say
WIDTHS = range(1, 9)  # bits of a relative index that are tried


def code_lengths(counts: Sequence[int], *, limit: int = LONGEST) -> tuple[int, ...]:
    """Bits for each symbol, so that sum(count x bits) is the least with no code longer than `limit`.

    `counts` [symbols], whole numbers >= 0; a symbol that never comes gets 0 bits, a symbol alone gets 1.  Package-merge
    (Larmore and Hirschberg 1990): Huffman's lengths wherever the limit does not bind.  ValueError for negative counts
    and for more symbols than `limit` bits can tell apart.
    """
    counts = [int(count) for count in counts]
    used = [symbol for symbol, count in enumerate(counts) if count]
    if min(counts, default=0) < 0 or not 1 <= limit <= 32 or len(used) > 1 << limit:
        raise ValueError(f"need counts >= 0 of at most 2**limit symbols, 1 <= limit <= 32, got {limit=} and {counts}")
    lengths = [0] * len(counts)
    if len(used) == 1:
        lengths[used[0]] = 1
        return tuple(lengths)
    coins = sorted((counts[symbol], [symbol]) for symbol in used)
    row: list[tuple[int, list[int]]] = []
    for _ in range(limit):  # each round pairs the cheapest and lays the pairs beside the coins again
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + pairs, key=lambda coin: coin[0])
    for _, symbols in row[: max(0, 2 * len(used) - 2)]:
        for symbol in symbols:  # one bit for each time it was taken
            lengths[symbol] += 1
    return tuple(lengths)


@dataclass(frozen=True)
class Huffman:
    """A canonical code: `lengths` [symbols] in bits, 0 for a symbol that never comes.

    Symbols of equal length count upwards, and shorter codes come first.  ValueError if no such code exists.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        used = [length for length in self.lengths if length]
        whole = sum(1 << LONGEST - length for length in used if 0 < length <= LONGEST)
        fits = all(0 <= length <= LONGEST for length in self.lengths) and whole == 1 << LONGEST
        if used not in ([], [1]) and not fits:  # Kraft: the codes must use up all bit strings, and no more
            raise ValueError(f"lengths must be those of a complete code of at most {LONGEST} bits, got {self.lengths}")

    @classmethod
    def fit(cls, symbols: Sequence[int], *, size: int | None = None) -> "Huffman":
        """The best code for `symbols`, numbers >= 0 of an alphabet of `size` (the largest + 1 if not given)."""
        symbols = np.asarray(symbols, dtype=np.int64)
        return cls(code_lengths(np.bincount(symbols, minlength=size or 0).tolist()))

    def codes(self) -> dict[int, tuple[int, int]]:
        """Of each symbol that may come: its code, and the length of it in bits."""
        code, before, found = -1, 0, {}
        for length, symbol in sorted((length, symbol) for symbol, length in enumerate(self.lengths) if length):
            code, before = (code + 1) << (length - before), length
            found[symbol] = (code, length)
        return found

    def encode(self, symbols: Sequence[int]) -> bytes:
        """The codes one behind the other; ValueError for a symbol that has none."""
        writer = BitWriter()
        self.write(writer, symbols)
        return writer.getvalue()

    def decode(self, data: bytes, n: int) -> list[int]:
        """The `n` symbols; ValueError if `data` is not exactly what `encode` made of `n` symbols."""
        if not 0 <= n <= 8 * len(data):
            raise ValueError(f"n must be from 0 to the {8 * len(data)} bits of data, got {n}")
        reader = BitReader(data)
        symbols = list(islice(self.read(reader), n))
        reader.finish()
        return symbols

    def write(self, writer: BitWriter, symbols: Sequence[int]) -> None:
        """`encode` into a `writer`."""
        codes = self.codes()
        for symbol in symbols:
            if int(symbol) not in codes:
                raise ValueError(f"symbols must be among the {len(codes)} that have a code, got {symbol}")
            writer.write(*codes[int(symbol)])

    def read(self, reader: BitReader) -> Iterator[int]:
        """The symbols in `reader`, one at each `next`, as long as they are asked for: at most 15 bits for each."""
        symbol_of = {code: symbol for symbol, code in self.codes().items()}
        while True:
            code, length = reader.read(1), 1
            while (code, length) not in symbol_of:
                if length == LONGEST:
                    raise ValueError("the bits are no code of this alphabet")
                code, length = code << 1 | reader.read(1), length + 1
            yield symbol_of[code, length]


def write_sparse(writer: BitWriter, codes: np.ndarray, size: int, *, huffman: bool) -> dict[str, int]:
    """Write `codes` [n], 0 for a pruned weight and 1 … `size` for the shared values; return the bits by kind.

    A run of zeros is a relative index of a few bits; a run too long for it goes in pieces.  Of the widths of the index
    the one that needs the fewest bits in all is taken.
    """
    tried = [_write_sparse(codes, size, width, huffman) for width in WIDTHS]
    best, parts = min(tried, key=lambda one: len(one[0]))
    writer.extend(best)
    return parts


def read_sparse(reader: BitReader, n: int, size: int, *, huffman: bool) -> np.ndarray:
    """The codes [n], uint8, that `write_sparse` wrote; ValueError if the bits are no such codes."""
    width, count = reader.read(3) + 1, reader.read_number()
    if count > min(n, reader.left()):
        raise ValueError(f"{count} non-zero weights do not fit into {n} weights and {reader.left()} bits")
    codes = np.zeros(n, dtype=np.uint8)
    indices = _read_table(reader, 1 << width) if huffman else _fixed(width)
    codes[_places(indices.read(reader), count, n, (1 << width) - 1)] = 1
    values = _read_table(reader, size) if huffman else _fixed(_width(size))
    found = list(islice(values.read(reader), count))
    if max(found, default=-1) >= size:
        raise ValueError(f"a weight has value {max(found)}, but the values are 0 to {size - 1}")
    codes[codes > 0] += np.asarray(found, dtype=np.uint8)
    return codes


def _write_sparse(codes: np.ndarray, size: int, width: int, huffman: bool) -> tuple[BitWriter, dict[str, int]]:
    """The bits with a relative index of `width`, and how many of them say positions and how many codes."""
    places = np.flatnonzero(codes)
    indices, values = _indices(places, (1 << width) - 1), codes[places].astype(int) - 1
    writer = BitWriter()
    writer.write(width - 1, 3)
    writer.write_number(len(places))
    (_write_table(writer, indices, 1 << width) if huffman else _fixed(width)).write(writer, indices)
    middle = len(writer)
    (_write_table(writer, values, size) if huffman else _fixed(_width(size))).write(writer, values)
    return writer, {"positions": middle, "codes": len(writer) - middle}


def _indices(places: np.ndarray, longest: int) -> list[int]:
    """Relative indices of the weights at `places`: k says k - 1 zeros and then a weight, 0 says `longest` zeros."""
    found: list[int] = []
    for zeros in (np.diff(places, prepend=-1) - 1).tolist():
        found += [0] * (zeros // longest) + [zeros % longest + 1]
    return found


def _places(indices: Iterator[int], count: int, n: int, longest: int) -> list[int]:
    """Where the `count` weights stand: `_indices` the other way."""
    place, found = -1, []
    while len(found) < count:
        index = next(indices)
        place += index or longest
        if place >= n:
            raise ValueError(f"a weight stands outside the {n} weights of its matrix")
        if index:
            found.append(place)
    return found


def _width(size: int) -> int:
    """Bits of a number below `size`, at least 1."""
    return max(1, (size - 1).bit_length())


def _fixed(width: int) -> Huffman:
    """The code in which each number is its own `width` bits: a Huffman code in which all are equally frequent."""
    return Huffman((width,) * (1 << width))


def _write_table(writer: BitWriter, symbols: Sequence[int], size: int) -> Huffman:
    """The best code for `symbols`, its lengths written with four bits each up to the last one that is not 0."""
    code = Huffman.fit(symbols, size=size)
    entries = max((symbol + 1 for symbol, length in enumerate(code.lengths) if length), default=0)
    writer.write_number(entries)
    for length in code.lengths[:entries]:
        writer.write(length, 4)
    return code


def _read_table(reader: BitReader, size: int) -> Huffman:
    entries = reader.read_number()
    if entries > size:
        raise ValueError(f"a table of {entries} codes for {size} symbols")
    return Huffman(tuple(reader.read(4) for _ in range(entries)))
