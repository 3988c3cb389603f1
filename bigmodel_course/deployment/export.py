"""From a trained module to a file that other programs run, and back with distrust.

    export(model, example, "digits.onnx", dynamic={0: "batch"}, metadata={...})     eager -> one graph -> a file
    read("digits.onnx")                                                             a checked graph, or a ValueError

A file of the course says in its metadata what it holds (`name`, `version`, `kind`, sizes), with the SHA-256 of its
weights and of its graph.  It appears whole or not at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper, helper

from bigmodel_course.deployment.graph import DIGESTS, content, digests, nodes, tensors
from bigmodel_course.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from bigmodel_course.deployment.tracing import Dynamic

__all__ = ["check", "export", "metadata_of", "read", "write"]

OPSETS, FORMATS = range(17, 27), range(8, 14)  # versions of the operators and of the file that onnxruntime 1.31 runs
DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}  # the standard's operators, and onnxruntime's for quantization
SIZES = {"classifier": ("classes",), "language-model": ("vocabulary", "context"), "stage": ("outputs", "context")}
LIMIT = 2**31 - 1  # bytes: a protobuf ends there
PACKED = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}  # bits; the other types fill their bytes
SMALL = 1024  # bytes: shorter constants stay in the graph, where shapes are inferred from them


def export(
    model: nn.Module | ExportedProgram,
    example: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    dynamic: Dynamic,
    metadata: Mapping[str, Any],
    opset: int | None = None,
    external_data: bool = False,
) -> Path:
    """Write `model` as a checked ONNX file and return its path.

    `example` and `dynamic` as for `tracing.trace`; an exported program brings its own example.  `metadata`: name,
    version, kind ("classifier" with classes, "language-model" with vocabulary and context, or "stage", a part of a
    model, with outputs and context), and what else you want to say.  `opset`: a version of ONNX's operators, by default
    torch's choice.  `external_data`: the weights in a second file beside it; ship both.  ValueError says what cannot be
    exported.
    """
    if opset is not None and opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    from torch.export import ExportedProgram  # here, so that whoever only reads a file needs no torch

    from bigmodel_course.deployment.tracing import trace, translate

    program = model if isinstance(model, ExportedProgram) else trace(model, example, dynamic)
    return write(translate(program, dynamic, opset=opset), path, metadata=metadata, external_data=external_data)


def write(
    model: onnx.ModelProto, path: str | Path, *, metadata: Mapping[str, Any] | None = None, external_data: bool = False
) -> Path:
    """Check a graph, stamp it with `metadata` (by default its own) and its digests, and write it whole.

    The exporter's notes, which hold source lines and paths, are left out.  With `external_data` the weights go first
    into a file named after their digest, so that an older model beside it keeps its own.
    """
    path, stamped = Path(path), onnx.ModelProto()
    stamped.CopyFrom(model)
    _strip(stamped)
    described = metadata_of(model) if metadata is None else metadata
    described = {key: str(value) for key, value in described.items() if key not in DIGESTS}
    _check_metadata(described, stamped)
    helper.set_model_props(stamped, described)
    helper.set_model_props(stamped, described | digests(stamped))
    if stamped.ByteSize() > LIMIT:
        raise ValueError(f"model must have at most {LIMIT:,} bytes to be checked, got {stamped.ByteSize():,}")
    _check_rules(stamped, path.name, full=True)
    if external_data:
        _put_aside(stamped, path)
    write_whole(path, stamped.SerializeToString(deterministic=True))
    return path


def read(path: str | Path, *, stamped: bool = True, limit: int = LIMIT) -> onnx.ModelProto:
    """The graph in a file, with its weights in memory.

    ValueError where the file is cut short, damaged, of another opset, made of operators that the standard does not
    know, or wants data from outside its folder; and where all of it is more than `limit` bytes, before they are read.
    stamped=False takes files that `write` did not make.  What passes is well formed, not harmless: a graph may still
    ask for more time and memory than there is.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path must be an ONNX file, and there is none at {path}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path.name} has {size:,} bytes, more than limit={limit:,}")
        data = file.read(size)
    try:
        model = onnx.ModelProto.FromString(data)
        _check_version(model, path.name)
        _fetch(model, path, limit - size)
        _check_rules(model, path.name, full=False)
        if stamped:
            _check_stamp(model, path.name)
    except (DecodeError, UnicodeDecodeError) as error:  # protobuf looks at some texts only when they are used
        raise ValueError(f"{path.name} is not an ONNX file, or is cut short or damaged: it does not decode") from error
    return model


def check(path: str | Path, *, limit: int = LIMIT) -> dict[str, str]:
    """The metadata of a file that `read` accepts; ValueError as there."""
    return metadata_of(read(path, limit=limit))


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """What a graph says of itself, and its digests."""
    return {entry.key: entry.value for entry in model.metadata_props}


def _strip(model: onnx.ModelProto) -> None:
    graph = model.graph
    for part in (*nodes(graph), *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _check_version(model: onnx.ModelProto, name: str) -> None:
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    opset = versions.get("ai.onnx", 0)
    if not opset or not model.graph.output:
        raise ValueError(f"{name} is not an ONNX model, or is cut short: it has no opset or no output")
    if opset not in OPSETS:
        raise ValueError(f"{name} is of opset {opset}; we read {OPSETS[0]} to {OPSETS[-1]}: export the model again")
    if model.ir_version not in FORMATS:
        raise ValueError(f"{name} is of file format {model.ir_version}; we read {FORMATS[0]} to {FORMATS[-1]}")
    domains = {entry.domain for entry in model.opset_import} | {node.domain for node in nodes(model.graph)}
    if foreign := sorted(domains - DOMAINS):
        raise ValueError(f"{name} needs operators of {', '.join(foreign):.80}, which are not ONNX's")
    if model.functions or model.training_info:
        raise ValueError(f"{name} brings functions or training graphs of its own, which no export of the course does")


def _check_rules(model: onnx.ModelProto, name: str, *, full: bool) -> None:
    """ONNX's own checker; `full` infers every shape as well."""
    try:
        onnx.checker.check_model(model, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} breaks the rules of ONNX: {reason}") from error


def _check_metadata(described: Mapping[str, str], model: onnx.ModelProto) -> None:
    """What a service relies on is there, printable, and fits the graph."""
    kind = described.get("kind")
    if kind not in SIZES:
        raise ValueError(f"metadata must say kind, one of {', '.join(SIZES)}, got {kind!r}")
    for key in ("name", "version", *SIZES[kind], *described):
        value = described.get(key)
        if not value or len(value) > 1000 or not (key + value).isprintable():
            raise ValueError(f"metadata must say {key} in 1 to 1,000 printable characters, got {value!r:.80}")
    for key in SIZES[kind]:
        if not (described[key].isascii() and described[key].isdecimal() and int(described[key])):
            raise ValueError(f"metadata's {key} must be a whole number above 0, got {described[key]!r:.80}")
    wide = model.graph.output[0].type.tensor_type.shape.dim
    if wide and wide[-1].dim_value not in (0, int(described[SIZES[kind][0]])):
        key = SIZES[kind][0]
        raise ValueError(f"metadata's {key} must be the output's last size, {wide[-1].dim_value}, got {described[key]}")


def _check_stamp(model: onnx.ModelProto, name: str) -> None:
    described = metadata_of(model)
    if missing := [key for key in DIGESTS if key not in described]:
        raise ValueError(f"{name} is cut short, or `write` did not make it: its metadata lacks {', '.join(missing)}")
    for key, found in digests(model).items():
        if described[key] != found:
            raise ValueError(f"{name} is damaged, or its data file is another model's: {key} does not fit")
    _check_metadata(described, model)


def _put_aside(model: onnx.ModelProto, path: Path) -> None:
    """Move the weights into a file beside `path`, which is on the disk before any graph names it."""
    name = f"{path.stem}-{metadata_of(model)[DIGESTS[0]][:16]}.data"
    parts, place = [], 0
    for tensor in model.graph.initializer:
        if len(data := content(tensor)) < SMALL:
            continue
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data))
        external_data_helper.set_external_data(tensor, name, offset=place, length=len(data))
        tensor.ClearField("raw_data")
        parts.append(data)
        place += len(data)
    write_whole(path.with_name(name), b"".join(parts))


def _fetch(model: onnx.ModelProto, path: Path, room: int) -> None:
    """Load what lies in other files: plain ones in the model's own folder, `room` bytes at most."""
    for tensor in tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        file = path.parent / _plain_name(entry.get("location", ""), path.name)
        size = _size(tensor, path.name)
        if entry.setdefault("length", str(size)) != str(size):
            raise ValueError(f"{path.name}: {tensor.name!r:.80} is {size:,} bytes by its shape, not {entry['length']}")
        room -= size
        if room < 0:
            raise ValueError(f"{path.name} and its data have more bytes than limit allows, at {tensor.name!r:.80}")
        tensor.external_data.add(key="length", value=entry["length"])  # the last one counts
        try:
            if not stat.S_ISREG(os.lstat(file).st_mode):
                raise ValueError("it is a link or a device")
            external_data_helper.load_external_data_for_tensor(tensor, os.fspath(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ValueError(f"{path.name}: its data file {file.name!r} cannot be used: {error}") from error


def _plain_name(location: str, name: str) -> str:
    if location in ("", ".", "..") or len(location) > 255 or set("/\\:\0") & set(location):
        raise ValueError(f"{name} wants data from {location!r:.80}: only a file in its own folder is read")
    return location


def _size(tensor: TensorProto, name: str) -> int:
    """The bytes of a tensor by its type and shape."""
    if tensor.data_type not in helper.get_all_tensor_dtypes() or tensor.data_type == TensorProto.STRING:
        raise ValueError(f"{name}: {tensor.name!r:.80} is of type {tensor.data_type}, which has no fixed size")
    kind = TensorProto.DataType.Name(tensor.data_type)
    bits = PACKED.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for dim in tensor.dims:
        if dim < 0:
            raise ValueError(f"{name}: {tensor.name!r:.80} has a negative size, {dim}")
        bits *= dim
    return -(-bits // 8)
