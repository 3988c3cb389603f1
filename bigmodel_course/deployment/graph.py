"""An ONNX graph as data: its tensors, its digests, and the two rewrites that quantizers need.

    gemm_to_matmul(model)     y = Gemm(x, W, b)  ->  y = Add(MatMul(x, W'), b)
    untie_head(model)         a transposed weight becomes a weight of its own

A model is an onnx.ModelProto whose tensors are in memory.  Both rewrites give a new one with the same results.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["digests", "gemm_to_matmul", "nodes", "operators", "tensors", "untie_head"]

DIGESTS = ("weights_sha256", "graph_sha256")


def nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph, those inside its branches and loops among them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from nodes(inner)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first."""
    kinds = [node.op_type for node in nodes(model.graph)]
    return dict(sorted(((kind, kinds.count(kind)) for kind in set(kinds)), key=lambda pair: (-pair[1], pair[0])))


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a model: weights, and constants inside nodes, wherever they hide."""
    graphs = [model.graph, *_inner_graphs(model)]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _all_nodes(model):
        for a in node.attribute:
            yield from chain([a.t] if a.HasField("t") else [], a.tensors)
            for sparse in chain([a.sparse_tensor] if a.HasField("sparse_tensor") else [], a.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def digests(model: onnx.ModelProto) -> dict[str, str]:
    """SHA-256 of the weights, and of everything else: nodes, shapes, opset and metadata.

    They tell damage from an intact file.  Whoever changes a file on purpose can write a new digest beside it: compare
    with one that came another way.
    """
    weights = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        weights.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}\n".encode())
        weights.update(content(tensor))
    rest = onnx.ModelProto()
    _copy_fields(model, rest, ("graph", "metadata_props"))
    _copy_fields(model.graph, rest.graph, ("initializer",))
    rest.metadata_props.extend(entry for entry in model.metadata_props if entry.key not in DIGESTS)
    graph = hashlib.sha256(rest.SerializeToString(deterministic=True))
    return dict(zip(DIGESTS, (weights.hexdigest(), graph.hexdigest()), strict=True))


def _copy_fields(source: Any, target: Any, without: Sequence[str]) -> None:
    """All fields but a few, so that the large ones are never copied."""
    for field, value in source.ListFields():
        if field.name in without:
            continue
        if isinstance(value, (int, float, str, bytes)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


def content(tensor: onnx.TensorProto) -> bytes:
    """A tensor's numbers as bytes."""
    return tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()


def gemm_to_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with a MatMul, and an Add for the bias, in the place of each Gemm whose weight is stored.

    onnxruntime's 4-bit quantizer looks at MatMul only, and passes over Gemm without a word.
    """
    model = _copy(model)
    weights, fresh = _weights(model), []
    for node in model.graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1.0) == 1.0 == options.get("beta", 1.0) and not options.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in weights or not plain:
            fresh.append(node)
            continue
        x, weight, *bias = node.input
        if options.get("transB", 0):
            weight = _transposed(model, weights, weight, (1, 0))
        product = f"{node.output[0]}_product" if bias and bias[0] else node.output[0]
        fresh.append(helper.make_node("MatMul", [x, weight], [product], name=f"{node.name}_matmul"))
        if product != node.output[0]:
            fresh.append(helper.make_node("Add", [product, bias[0]], [node.output[0]], name=f"{node.name}_bias"))
    return _with_nodes(model, fresh)


def untie_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model in which a stored weight that is transposed on the way stands transposed, as a weight of its own.

    A tied head uses the token embedding's weight, turned over in the graph: no quantizer sees a weight there.  The file
    grows by that weight, and its int8 codes take back more than they cost.
    """
    model = _copy(model)
    weights, fresh, renamed = _weights(model), [], {}
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            weight = weights[node.input[0]]
            axes = next(
                (tuple(a.ints) for a in node.attribute if a.name == "perm"), tuple(range(len(weight.dims)))[::-1]
            )
            renamed[node.output[0]] = _transposed(model, weights, node.input[0], axes)
            continue
        fresh.append(node)
    outputs = {value.name for value in model.graph.output}
    for node in fresh:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    fresh += [helper.make_node("Identity", [new], [old]) for old, new in renamed.items() if old in outputs]
    return _with_nodes(model, fresh)


def _transposed(model: onnx.ModelProto, weights: dict[str, onnx.TensorProto], name: str, axes: Sequence[int]) -> str:
    """The name of a stored weight that is `name` with its axes in another order; it is added if it is not there."""
    new = f"{name}_{''.join(map(str, axes))}"
    if new not in weights:
        turned = np.ascontiguousarray(numpy_helper.to_array(weights[name]).transpose(axes))
        model.graph.initializer.append(numpy_helper.from_array(turned, new))
        weights[new] = model.graph.initializer[-1]
    return new


def _weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _with_nodes(model: onnx.ModelProto, fresh: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """`model` with these nodes, and without the weights that no node uses any more."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in fresh]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in nodes(model.graph) for name in node.input} | {v.name for v in model.graph.output}
    for i in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[i].name not in used:
            del model.graph.initializer[i]
    return model


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in (model.graph, *model.functions):
        yield from nodes(graph)


def _inner_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    for node in _all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs
