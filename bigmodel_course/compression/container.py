"""One file for a whole compressed model: widths, codebooks, sparse codes, biases, and a checksum over everything.

    magic "BMC" · version · how values, biases and weights are coded · shapes · codebooks · coded weights · SHA-256

Numbers of the header are variable-length integers (7 bits a byte), and nothing is said twice: a model of 5,000 bytes
has no room for names.  Every size is held to a limit before memory is taken for it, so that a file from anywhere is
refused with a ValueError or gives a model of the size it says.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigmodel_course.compression import contexts
from bigmodel_course.compression.bits import (
    SCALE,
    BitReader,
    BitWriter,
    read_numbers,
    to_floats,
    write_numbers,
    write_scale,
)
from bigmodel_course.compression.huffman import read_sparse, write_sparse
from bigmodel_course.compression.sharing import Codebook, CodedLayer
from bigmodel_course.files import write_whole

__all__ = ["load_compressed", "save_compressed"]

MAGIC, VERSION = b"BMC", 1
CODERS = ("fixed", "huffman", "arithmetic")
BITS = (4, 5, 6, 7, 8, 16, 32)  # of a bias or a shared value: whole numbers times one scale, or floats
CHECKSUM = 8  # bytes of the SHA-256: damage passes unseen once in 2^64 times; no checksum without a key stops a forger
MOST_BYTES, MOST_LAYERS, MOST_SPEC, MOST_DIMENSIONS = 2**27, 255, 10_000, 8
MOST_WEIGHTS = {"fixed": 2**24, "huffman": 2**24, "arithmetic": 2**20}  # the last takes about 6 µs for each


def save_compressed(
    path: str | Path,
    spec: dict[str, Any],
    layers: Sequence[CodedLayer],
    *,
    coder: str = "huffman",
    value_bits: int = 16,
    bias_bits: int = 16,
) -> dict[str, float]:
    """Write a model as one file, whole or not at all, and return its bytes by kind; they sum to the file's size.

    `spec`: what is needed to build the model, plain JSON data.  {"widths": [784, 300, 100, 10]} costs nothing where the
    layers' shapes say it.  `coder`: "fixed", "huffman" or "arithmetic" for the weights.  Shared values and biases are
    rounded to 32- or 16-bit floats, or to 4 … 8 bits times one scale for each layer: measure the model that
    `load_compressed` returns.  TypeError or ValueError for what cannot be stored.
    """
    _check(layers, coder, value_bits, bias_bits)
    writer, bits = BitWriter(), dict.fromkeys(("header", "values", "biases", "positions", "codes"), 0.0)
    form = Form(coder, value_bits, None if layers[0].bias is None else bias_bits)
    _write_form(writer, form)
    _write_shapes(writer, spec, [layer.weight.codes.shape for layer in layers])
    bits["header"] = 8 * len(MAGIC) + len(writer)
    sizes = []
    for layer in layers:
        writer.write_number(len(layer.weight.values))
        sizes.append(_sizes(write_numbers(writer, layer.weight.values, value_bits)))
    bits["values"] = 8 * len(MAGIC) + len(writer) - bits["header"]
    coded = _write_coded(writer, layers, sizes, form, bits)
    content = MAGIC + writer.getvalue() + coded
    write_whole(Path(path), content + hashlib.sha256(content).digest()[:CHECKSUM])
    bits["padding"] = 8 * len(content) - sum(bits.values())
    return {kind: n / 8 for kind, n in bits.items()} | {"checksum": CHECKSUM}


def load_compressed(path: str | Path) -> tuple[dict[str, Any], list[CodedLayer]]:
    """The spec and the layers that `save_compressed` wrote; values and biases are float32.

    ValueError if a single bit of the file is not as it was written, or if its sizes are beyond the limits.
    """
    path = Path(path)
    if (size := os.stat(path).st_size) > MOST_BYTES:
        raise ValueError(f"{path} is too large for a compressed model: {size:,} bytes, the limit is {MOST_BYTES:,}")
    data = path.read_bytes()
    content, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
    if not content.startswith(MAGIC):
        raise ValueError(f"{path} is not a compressed model of this course: it does not begin with {MAGIC!r}")
    if hashlib.sha256(content).digest()[:CHECKSUM] != checksum:
        raise ValueError(f"{path} is damaged: its {len(data):,} bytes do not give the SHA-256 that ends it")
    try:
        return _read(BitReader(content[len(MAGIC) :]))
    except (ValueError, RecursionError) as error:  # JSON nested too deep is a RecursionError
        raise ValueError(f"{path} cannot be a compressed model: {error}") from error


class Form(NamedTuple):
    """How the parts of a model are coded; `bias_bits` is None where there are no biases."""

    coder: str
    value_bits: int
    bias_bits: int | None

    @property
    def mixes_biases(self) -> bool:
        """Whether the arithmetic coder takes the biases too: whole numbers have a pattern, floats have none."""
        return self.coder == "arithmetic" and self.bias_bits is not None and self.bias_bits <= 8


def _read(reader: BitReader) -> tuple[dict[str, Any], list[CodedLayer]]:
    """The model in a file whose checksum is right, which may still say anything."""
    form = _read_form(reader)
    spec, shapes = _read_shapes(reader, MOST_WEIGHTS[form.coder])
    values = [read_numbers(reader, _limited(reader.read_number(), 255, "values"), form.value_bits) for _ in shapes]
    codes, biases = _read_coded(reader, shapes, [_sizes(v) for v in values], form)
    books = [Codebook(v, torch.from_numpy(c).view(shape)) for v, c, shape in zip(values, codes, shapes, strict=True)]
    return spec, [CodedLayer(book, bias) for book, bias in zip(books, biases, strict=True)]


def _write_coded(
    writer: BitWriter,
    layers: Sequence[CodedLayer],
    sizes: Sequence[tuple[int, int]],
    form: Form,
    bits: dict[str, float],
) -> bytes:
    """Biases and weights: into `writer`, or as bytes that follow it; what each kind takes is added to `bits`."""
    codes = [layer.weight.codes.cpu().numpy() for layer in layers]
    start, numbers = len(writer), [[] for _ in layers]
    for layer, later in zip(layers, numbers, strict=True):
        if form.bias_bits and form.mixes_biases:
            later += write_scale(writer, layer.bias, form.bias_bits)[1]
        elif form.bias_bits:
            write_numbers(writer, layer.bias, form.bias_bits)
    bits["biases"] += len(writer) - start
    if form.coder == "arithmetic":
        coded, parts = contexts.encode([c.reshape(_rows(c.shape)) for c in codes], sizes, numbers, form.bias_bits or 0)
    else:
        coded = b""
        both = [
            write_sparse(writer, c.ravel(), k, huffman=form.coder == "huffman")
            for c, (k, _) in zip(codes, sizes, strict=True)
        ]
        parts = {kind: sum(one[kind] for one in both) for kind in both[0]}
    for kind, n in parts.items():
        bits[kind] += n
    return coded


def _read_coded(
    reader: BitReader, shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]], form: Form
) -> tuple[list[np.ndarray], list[Tensor | None]]:
    """The codes and biases that `_write_coded` wrote."""
    outputs = [shape[0] for shape in shapes]
    if form.mixes_biases:
        scales = [reader.read(SCALE) for _ in shapes]
        codes, numbers = contexts.decode(reader.rest(), [_rows(s) for s in shapes], sizes, outputs, form.bias_bits)
        return codes, [to_floats(n, form.bias_bits, s) for n, s in zip(numbers, scales, strict=True)]
    biases = [form.bias_bits and read_numbers(reader, n, form.bias_bits) for n in outputs]
    if form.coder == "arithmetic":
        return contexts.decode(reader.rest(), [_rows(s) for s in shapes], sizes, [0] * len(shapes), 0)[0], biases
    codes = [
        read_sparse(reader, math.prod(shape), size, huffman=form.coder == "huffman")
        for shape, (size, _) in zip(shapes, sizes, strict=True)
    ]
    reader.finish()
    return codes, biases


def _write_form(writer: BitWriter, form: Form) -> None:
    writer.write(VERSION, 8)
    writer.write(CODERS.index(form.coder), 2)
    writer.write(BITS.index(form.value_bits), 3)
    writer.write(BITS.index(form.bias_bits) if form.bias_bits else len(BITS), 3)


def _read_form(reader: BitReader) -> Form:
    version, coder, value, bias = (reader.read(width) for width in (8, 2, 3, 3))
    if version != VERSION or coder >= len(CODERS) or value >= len(BITS):
        raise ValueError(f"form {version}.{coder}.{value} is not known; this reader knows version {VERSION}")
    return Form(CODERS[coder], BITS[value], (*BITS, None)[bias])


def _write_shapes(writer: BitWriter, spec: dict[str, Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Shapes and spec, with what one says of the other left out."""
    chain = all(len(s) == 2 for s in shapes) and all(b[1] == a[0] for a, b in pairwise(shapes))
    widths = [shapes[0][1], *(shape[0] for shape in shapes)] if chain else []
    implied = chain and spec.get("widths") == widths
    writer.write_number(len(shapes))
    writer.write(chain, 1)
    writer.write(implied, 1)
    for number in widths if chain else [n for shape in shapes for n in (len(shape), *shape)]:
        writer.write_number(number)
    rest = {key: value for key, value in spec.items() if key != "widths" or not implied}
    try:
        text = json.dumps(rest, separators=(",", ":"), allow_nan=False).encode() if rest else b""
    except (TypeError, ValueError) as error:
        raise TypeError(f"spec must be JSON data: {error}") from error
    if json.loads(text or "{}") != rest or len(text) > MOST_SPEC:
        raise TypeError(
            f"spec must be JSON data (lists, no tuples) of at most {MOST_SPEC} bytes, got {len(text)} bytes"
        )
    writer.write_number(len(text))
    writer.write(int.from_bytes(text, "big"), 8 * len(text))


def _read_shapes(reader: BitReader, most: int) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The spec, and shapes of together at most `most` weights (and rows, of which each may have a bias)."""
    n, chain, implied = _limited(reader.read_number(), MOST_LAYERS, "layers"), reader.read(1), reader.read(1)
    if not n or implied > chain:
        raise ValueError("a model has at least one layer, and only a chain of layers implies its widths")
    if chain:
        widths = [reader.read_number() for _ in range(n + 1)]
        shapes = [(b, a) for a, b in pairwise(widths)]
    else:
        shapes = [tuple(reader.read_number() for _ in range(_dimensions(reader))) for _ in range(n)]
    _limited(sum(max(math.prod(shape), shape[0]) for shape in shapes), most, "weights")
    length = _limited(reader.read_number(), MOST_SPEC, "bytes of spec")
    spec = json.loads(reader.read(8 * length).to_bytes(length, "big") or b"{}")
    if not isinstance(spec, dict):
        raise ValueError(f"the spec must be a JSON object, got a {type(spec).__name__}")
    return ({"widths": widths} if implied else {}) | spec, shapes


def _dimensions(reader: BitReader) -> int:
    if not (n := _limited(reader.read_number(), MOST_DIMENSIONS, "dimensions")):
        raise ValueError("a weight has at least one dimension")
    return n


def _limited(number: int, limit: int, what: str) -> int:
    if number > limit:
        raise ValueError(f"{number:,} {what}, the limit is {limit:,}")
    return number


def _sizes(values: Tensor) -> tuple[int, int]:
    """How many values there are, and how many of them are negative, as they stand in the file."""
    return len(values), int((values < 0).sum())


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """A weight as a matrix: one row for each output."""
    return (shape[0], math.prod(shape[1:]))


def _check(layers: Sequence[CodedLayer], coder: str, value_bits: int, bias_bits: int) -> None:
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {CODERS}, got {coder!r}")
    if value_bits not in BITS or bias_bits not in BITS:
        raise ValueError(f"value_bits and bias_bits must be among {BITS}, got {value_bits} and {bias_bits}")
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise ValueError(f"layers must be 1 to {MOST_LAYERS}, got {len(layers)}")
    if len({layer.bias is None for layer in layers}) > 1:
        raise ValueError("layers must all have a bias, or none")
    for i, (book, bias) in enumerate((layer.weight, layer.bias) for layer in layers):
        if not 1 <= book.codes.ndim <= MOST_DIMENSIONS:
            raise ValueError(f"layers[{i}].weight must have 1 to {MOST_DIMENSIONS} dimensions, got {book.codes.ndim}")
        if bias is not None and (bias.shape != book.codes.shape[:1] or not bias.isfinite().all()):
            raise ValueError(f"layers[{i}].bias must be finite, [{len(book.codes)}], got {list(bias.shape)}")
    _limited(sum(max(x.weight.codes.numel(), len(x.weight.codes)) for x in layers), MOST_WEIGHTS[coder], "weights")
