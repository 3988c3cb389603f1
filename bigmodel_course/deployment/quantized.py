"""Model files in 8 and 4 bits, by onnxruntime's quantizers, with nothing left out in silence.

    quantize_dynamic(source, target)             int8 weights; the inputs' ranges are measured at each call
    quantize_static(source, target, samples)     int8 weights; the ranges are measured before, on samples
    quantize_4bit(source, target)                4-bit weights in blocks, for few inputs at a time

Each starts from `prepared`, because a quantizer sees only a product with a stored weight, and each counts afterwards:
a product that stayed in float is an error.  Weights are signed: unsigned ones miss the processors' fast int8 product.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization import quant_utils

from bigmodel_course.deployment.export import metadata_of, read, write
from bigmodel_course.deployment.graph import gemm_to_matmul, nodes, untie_head

__all__ = ["blockwise_quantizer", "prepared", "quantize_4bit", "quantize_dynamic", "quantize_static"]

Model = Any  # an onnx.ModelProto
SIGNED = {"weight_type": quantization.QuantType.QInt8}


def prepared(source: str | Path) -> Model:
    """The graph of a file in which every product that can be is a MatMul with a stored weight of its own.

    No Gemm, which the 4-bit quantizer passes over, and no tied head, which none of them sees.
    """
    return untie_head(gemm_to_matmul(read(source)))


def quantize_dynamic(
    source: str | Path,
    target: str | Path,
    *,
    operators: Sequence[str] = ("MatMul",),
    per_channel: bool = True,
    reduce_range: bool = False,
) -> Path:
    """Write `source` with int8 weights to `target`; each call measures its inputs' ranges and rounds them to 8 bits.

    `operators` are quantized ("MatMul", "Conv"); per_channel gives each output a scale of its own.  Needs no samples,
    loses least, and an answer depends a little on what else is in its batch.  Convolutions get slower this way.
    `reduce_range` keeps the weights to 7 bits, for x86 processors without VNNI, whose 16-bit sums of two products
    overflow with 8.
    """

    def quantize(model: Model, file: Path) -> None:
        options = {"per_channel": per_channel, "reduce_range": reduce_range, **SIGNED}
        quantization.quantize_dynamic(model, file, op_types_to_quantize=list(operators), **options)

    return _written(source, target, "int8 dynamic", operators, quantize)


def quantize_static(
    source: str | Path,
    target: str | Path,
    samples: Iterable[np.ndarray | Sequence[np.ndarray]],
    *,
    operators: Sequence[str] = ("MatMul",),
    per_channel: bool = False,
) -> Path:
    """Write `source` in int8 to `target`, with ranges from `samples`: smallest and largest of what was seen (QDQ).

    `samples` are batches as `Session.run` takes them.  For a CNN name ("Conv", "Relu", "MatMul"); in a language model
    leave it at MatMul: a mask's minus infinity stands in the range of the scores, and 8 bits then hold nothing else.
    """
    batches = [(batch,) if isinstance(batch, np.ndarray) else tuple(batch) for batch in samples]
    if not batches:
        raise ValueError("samples must hold at least one batch, got none: the ranges are measured on them")

    def quantize(model: Model, file: Path) -> None:
        names = [value.name for value in model.graph.input]
        reader = _Samples([dict(zip(names, batch, strict=True)) for batch in batches])
        options = {"quant_format": quantization.QuantFormat.QDQ, "per_channel": per_channel, **SIGNED}
        quantization.quantize_static(model, file, reader, op_types_to_quantize=list(operators), **options)

    return _written(source, target, "int8 static", operators, quantize)


def quantize_4bit(source: str | Path, target: str | Path, *, block: int = 32) -> Path:
    """Write `source` to `target` with 4-bit weights: `block` of them in a row share a float scale and a 4-bit zero.

    The smallest file and the fastest answer for one input, where a call is as long as reading the weights.  With many
    inputs the arithmetic counts, and int8 is faster.
    """
    if block not in (16, 32, 64, 128, 256):
        raise ValueError(f"block must be 16, 32, 64, 128 or 256, got {block}")

    def quantize(model: Model, file: Path) -> None:
        fast = 4  # onnxruntime's "accuracy level" 4: inputs are rounded to int8 too, a block at a time
        quantizer = blockwise_quantizer()(model, bits=4, block_size=block, is_symmetric=False, accuracy_level=fast)
        quantizer.process()
        quantizer.model.save_model_to_file(file)

    return _written(source, target, "4 bits", ("MatMul",), quantize)


class _Samples(quantization.CalibrationDataReader):
    """Batches in the form that onnxruntime's calibration asks for."""

    def __init__(self, batches: Iterable[dict[str, np.ndarray]]):
        self._left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _written(
    source: str | Path,
    target: str | Path,
    name: str,
    operators: Sequence[str],
    quantize: Callable[[Model, Path], None],
) -> Path:
    """Quantize into a folder of its own, count, and only then write `target`, which says what was done to it."""
    model = prepared(source)
    described = metadata_of(model) | {"weights": name}
    expected = _weighted(model, set(operators) & {"MatMul", "Conv"})
    if not expected:
        raise ValueError(f"{Path(source).name} has no {' or '.join(operators)} with a stored weight to quantize")
    quant_utils.add_pre_process_metadata(model)  # `prepared` does that work; without the mark onnxruntime warns
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.onnx"
        quantize(model, file)
        result = read(file, stamped=False)
    left = expected & _weighted(result, {"MatMul", "Conv"})
    if left:
        raise ValueError(f"{len(left)} of {len(expected)} products stayed in float: {', '.join(sorted(left)[:5])}")
    return write(result, target, metadata=described)


def _weighted(model: Model, kinds: set[str]) -> set[str]:
    """The outputs of the nodes of these kinds whose second input is a stored float matrix or kernel."""
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1}
    return {node.output[0] for node in nodes(model.graph) if node.op_type in kinds and node.input[1] in floats}


def blockwise_quantizer() -> type:
    """onnxruntime's 4-bit quantizer, whose module would set up logging for the whole program when it is imported."""
    silent = logging.NullHandler()
    logging.root.addHandler(silent)  # with a handler in place, basicConfig does nothing
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        logging.root.removeHandler(silent)
    return MatMulNBitsQuantizer
