"""From a module to a graph: eager code followed once with symbolic sizes, then each operation written as ONNX's.

program = trace(model, example, {0: "batch"})      an exported program: torch's operators, no Python left
graph = translate(program, {0: "batch"})           an onnx.ModelProto: ONNX's operators
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bigmodel_course.deployment.graph import nodes

__all__ = ["trace", "translate"]

HINTS = {  # what torch says -> what to do
    "specialized it to be a constant": "its code fixes the size of a dynamic axis: a number written out, len(x) and a "
    "loop over x do that, x.shape[0] and -1 do not",
    "data-dependent": "its code turns a value into a Python number or decides by one: torch.where, torch.cond and "
    "while_loop keep such a choice in the graph",
}
Dynamic = Mapping[int, Any] | Sequence[Mapping[int, Any]]


def trace(model: nn.Module, example: Tensor | Sequence[Tensor], dynamic: Dynamic) -> ExportedProgram:
    """The one graph that `model` is for every size of the `dynamic` axes, in eval mode; `model` is left as it was.

    `example`: the inputs to follow, at least 2 long where a size is dynamic.  `dynamic`: for each input, its axes whose
    size may differ, {0: "batch"} or {0: "batch", 1: Dim("length", max=64)}; the same name is the same size everywhere.
    ValueError with torch's reason where no such graph exists: a branch on values, a size that the code fixes.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    shapes = _shapes(dynamic)
    _check_example(inputs, shapes)
    inputs = tuple(x.contiguous() for x in inputs)  # or the strides of a view become a condition of the graph
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()  # or dropout and each batch's own statistics would go into the graph
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=tuple(shapes))
    except Exception as error:  # torch has a dozen kinds of its own for this
        hints = [hint for words, hint in HINTS.items() if words in str(error)]
        reason = "; torch: ".join([*hints, _short(error)])
        raise ValueError(f"model {type(model).__name__} is not one graph: {reason}") from error
    finally:
        for layer, mode in modes:
            layer.training = mode


def translate(program: ExportedProgram, dynamic: Dynamic, *, opset: int | None = None) -> Any:
    """The onnx.ModelProto of an exported program, of `opset`, by default torch's.

    Inputs keep their names without a shape suffix (tokens_BT: tokens); one output is called scores.  ValueError for an
    operator that ONNX lacks, an opset that cannot hold the graph, and a `dynamic` axis that the program fixes.
    """
    shapes = _shapes(dynamic)
    options = {"dynamo": True, "opset_version": opset, "dynamic_shapes": tuple(shapes), "verbose": False}
    try:
        with _quiet():
            model = torch.onnx.export(program, (), **options).model_proto
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"program uses what ONNX has no operator for: {_short(error.__cause__ or error)}") from error
    model.producer_version = model.producer_version.partition("+")[0]  # the same file from a build for another device
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if opset not in (None, versions[""]):
        raise ValueError(f"opset {opset} cannot hold this graph: torch wrote {versions['']} in its place")
    for axes, value in zip(shapes, model.graph.input, strict=True):
        if fixed := [axis for axis in axes if not value.type.tensor_type.shape.dim[axis].dim_param]:
            raise ValueError(f"dynamic names axis {fixed[0]} of {value.name}, and the program fixes it: trace it anew")
    return _named(model)


def _shapes(dynamic: Dynamic) -> list[dict[int, Dim]]:
    """`dynamic` with a Dim for each name."""
    dims: dict[str, Dim] = {}
    shapes = []
    for axes in [dynamic] if isinstance(dynamic, Mapping) else dynamic:
        known = {axis: (dim if isinstance(dim, str) else dim.__name__) for axis, dim in axes.items()}
        for name, dim in zip(known.values(), axes.values(), strict=True):
            dims.setdefault(name, Dim(dim) if isinstance(dim, str) else dim)
        shapes.append({axis: dims[name] for axis, name in known.items()})
    return shapes


def _check_example(inputs: Sequence[Tensor], shapes: Sequence[Mapping[int, Dim]]) -> None:
    if len(shapes) != len(inputs):
        raise ValueError(f"dynamic must have one mapping for each of the {len(inputs)} inputs, got {len(shapes)}")
    for number, (x, axes) in enumerate(zip(inputs, shapes, strict=True)):
        for axis in axes:
            if axis not in range(x.ndim) or x.shape[axis] < 2:
                raise ValueError(
                    f"example must be at least 2 long along each dynamic axis (torch fixes sizes of 0 and 1): "
                    f"input {number} is {list(x.shape)}, and dynamic names its axis {axis}"
                )


def _named(model: Any) -> Any:
    inputs, outputs = model.graph.input, model.graph.output
    names = {value.name: "scores" if len(outputs) == 1 else f"output_{i}" for i, value in enumerate(outputs)}
    for value in inputs:
        stem, _, suffix = value.name.rpartition("_")
        if stem and len(suffix) == len(value.type.tensor_type.shape.dim):
            names[value.name] = stem
    for part in nodes(model.graph):
        part.input[:] = [names.get(name, name) for name in part.input]
        part.output[:] = [names.get(name, name) for name in part.output]
    for value in (*inputs, *outputs):
        value.name = names.get(value.name, value.name)
    return model


def _short(error: BaseException) -> str:
    """An error's first paragraph in one line; torch's go on for pages."""
    return " ".join(str(error).strip().split("\n\n")[0].split())[:400]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and warnings off the page; what they would say is checked in the result."""
    level, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
