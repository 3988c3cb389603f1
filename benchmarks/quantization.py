"""int8 beside float32 in onnxruntime: an MLP of 10 million parameters, one thread, batches of 1, 32 and 256.

Three traps on the way, each held by an assertion: the model is pre-processed first, the weights are signed (unsigned
ones miss the CPU's int8 dot product), and every product is really quantized.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from benchmarks.measure import Result, Rival, alternate, ratio
from bigmodel_course.data import Dataset, digits, mnist, split
from bigmodel_course.models import MLP
from bigmodel_course.optim import Adam, Optimizer
from bigmodel_course.schedules import warmup_cosine
from bigmodel_course.training import fit

MNIST = Path(__file__).parent.parent / "data" / "mnist"
BATCHES = {1: 20, 32: 4, 256: 1}  # examples a call: calls a round


def run(quick: bool) -> Result:
    """Train, quantize, and time the two in turn; `quick` takes a small MLP and scikit-learn's digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, test = trained(quick)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"fp32": Path(folder) / "fp32.onnx", "int8": Path(folder) / "int8.onnx"}
        onnx.save(graph_of(model), paths["fp32"])
        quantize(paths["fp32"], paths["int8"], layers=len(model.widths) - 1)
        size = {name: path.stat().st_size for name, path in paths.items()}
        sessions = {name: session(path) for name, path in paths.items()}
    if not quick and not 3.95 < size["fp32"] / size["int8"] < 4:
        raise AssertionError(f"int8 must be about 4 times smaller, got {size}")
    seconds = alternate(rivals(sessions, test.x), rounds=15)
    return summary(seconds, size, {name: accuracy(s, test) for name, s in sessions.items()})


def trained(quick: bool) -> tuple[MLP, Dataset]:
    """An MLP after one epoch on MNIST, and the test set."""
    if quick:
        train, test = split(digits(), (0.8, 0.2), seed=0)
        widths, epochs = (64, 256, 256, 10), 10
    else:
        train, test = (Dataset(part.x.flatten(1), part.y, part.name) for part in mnist(MNIST))
        widths, epochs = (784, 2048, 2048, 2048, 10), 1
    model = MLP(widths, generator=torch.Generator().manual_seed(0))
    steps = epochs * -(-len(train) // 128)
    optimizer = Optimizer(model.parameters(), Adam(), warmup_cosine(5e-4, steps // 10, steps))
    fit(model, optimizer, F.cross_entropy, train, epochs=epochs, batch_size=128, seed=0, progress=False)
    return model, test


def graph_of(model: MLP) -> onnx.ModelProto:
    """The model as ONNX nodes: MatMul, Add and Relu (some quantizers skip Gemm without a word)."""
    nodes, constants, name = [], [], "x"
    linears = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(linears):
        weight, bias = (np.ascontiguousarray(p.detach().numpy()) for p in (layer.weight.T, layer.bias))
        constants += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        out = f"h{i}" if layer is not linears[-1] else "y"
        nodes += [
            helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"]),
            helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}" if out != "y" else out]),
        ]
        nodes += [helper.make_node("Relu", [f"a{i}"], [out])] if out != "y" else []
        name = out
    ends = [("x", model.widths[0]), ("y", model.widths[-1])]
    x, y = (helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", width]) for end, width in ends)
    graph = helper.make_graph(nodes, "mlp", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def quantize(source: Path, target: Path, layers: int) -> None:
    """Dynamic int8, one scale an output; fails unless every product became an integer one with signed weights."""
    prepared = source.with_name("prepared.onnx")
    quant_pre_process(source, prepared)
    quantize_dynamic(prepared, target, weight_type=QuantType.QInt8, per_channel=True)
    graph = onnx.load(target).graph
    products = sum(node.op_type == "MatMulInteger" for node in graph.node)
    signed = sum(tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2 for tensor in graph.initializer)
    if (products, signed) != (layers, layers):
        raise AssertionError(f"need {layers} integer products with int8 weights, got {products} and {signed}")


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def scores(session: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x})[0]


def accuracy(session: onnxruntime.InferenceSession, test: Dataset) -> float:
    """The share of right answers, batch by batch: a dynamic grid depends on what stands in the batch."""
    parts = zip(test.x.split(256), test.y.split(256), strict=True)
    return sum(int((scores(session, x.numpy()).argmax(1) == y.numpy()).sum()) for x, y in parts) / len(test)


def rivals(sessions: dict[str, onnxruntime.InferenceSession], x: torch.Tensor) -> dict[str, Rival]:
    def repeat(session: onnxruntime.InferenceSession, batch: np.ndarray, calls: int) -> None:
        for _ in range(calls):
            scores(session, batch)

    return {
        f"{name}, batch {size}": Rival(partial(repeat, session, x[:size].numpy(), calls))
        for size, calls in BATCHES.items()
        for name, session in sessions.items()
    }


def summary(seconds: dict[str, list[float]], size: dict[str, int], right: dict[str, float]) -> Result:
    measured = {
        f"int8_speedup_batch_{batch}": ratio(seconds[f"fp32, batch {batch}"], seconds[f"int8, batch {batch}"])
        for batch in BATCHES
    }
    ratios = {label: round(value, 4) for label, (value, _) in measured.items()}
    ratios["int8_size_ratio"] = round(size["fp32"] / size["int8"], 4)
    ratios["int8_accuracy_lost"] = round(right["fp32"] - right["int8"], 5)
    table = [
        {
            "model": name,
            "MB": f"{size[name] / 1e6:.2f}",
            "accuracy": f"{right[name]:.2%}",
            **{
                f"CPU ms, batch {batch}": f"{1000 * median(seconds[f'{name}, batch {batch}']) / calls:.3f}"
                for batch, calls in BATCHES.items()
            },
        }
        for name in size
    ]
    return Result(ratios=ratios, spread=round(max(spread for _, spread in measured.values()), 4), table=table)
