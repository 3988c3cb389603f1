"""Grids, integer products and calibration agree with torch and onnxruntime to the last bit, and keep what they promise."""

import itertools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from onnxruntime.quantization import calibrate as reference_calibration
from torch import nn

from bigmodel_course.compression.calibration import entropy, entropy_divergences, min_max, percentile
from bigmodel_course.compression.quantization import (
    Affine,
    affine_between,
    binarize,
    fake_quantize,
    fit_affine,
    group_int4,
    pack,
    power_of_two_grid,
    round_to_step,
    unpack,
)
from bigmodel_course.compression.quantized_layers import (
    QuantizedLinear,
    TrainingLinear,
    calibrate,
    integer_matmul,
    quantization_aware,
    quantize_model,
    quantized_matmul,
    requantize,
    stored_bytes,
)
from bigmodel_course.models import GPT, GPTConfig, LeNet300100, digit_model

SCALES = [1 / 3, 0.1, 0.0371, 0.25]
ZEROS = [-128, -3, 0, 41, 127]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=generator(seed))


def near_ties(scale):
    """Random numbers, every tie as well as float32 can say it, its two neighbours, and both infinities."""
    ties = (torch.arange(-300, 300) + 0.5) * scale
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (math.inf, -math.inf)]
    return torch.cat([normal(20_000, scale=40 * scale), ties, *beside, torch.tensor([0.0, -0.0, 1e30, -1e30])])


def codes(*shape, dtype=torch.uint8, seed=0):
    low = -128 if dtype == torch.int8 else 0
    return torch.randint(low, low + 256, shape, generator=generator(seed)).to(dtype)


def differing(a, b):
    assert a.shape == b.shape
    return (a != b).sum().item()


def onnxruntime_run(nodes, inputs, outputs, constants=None, optimize=True):
    """Run a graph of ONNX nodes on one thread; `inputs` and `constants` by name, `outputs` the names to return."""
    kind = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8}
    kind |= {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.int32): TensorProto.INT32}
    arrays = {name: t.numpy() for name, t in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind[a.dtype], a.shape) for name, a in arrays.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(t.numpy()), name) for name, t in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(result) for result in session.run(list(outputs), arrays)]


# The grid against torch's and onnxruntime's.


@pytest.mark.verifies(
    "compression.quantization.Affine",
    kind="parity",
    against="onnxruntime QuantizeLinear and DequantizeLinear",
    on="4 scales x 3 zero points, int8 and uint8, 22,404 numbers with all ties, differing values",
    bound=0,
)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("zero", [-128, 0, 41])
def test_codes_are_those_of_onnxruntime(scale, zero, seen):
    for low, high in ((-128, 127), (0, 255)):
        grid = Affine(torch.tensor(scale), torch.tensor(zero - min(low, 0) - 128 * (low == 0) * (zero < 0)).int(), low, high) \
            if False else Affine(torch.tensor(scale), torch.tensor(max(zero, low), dtype=torch.int32), low, high)
        x = near_ties(scale)
        ours = grid.encode(x)
        constants = {"scale": grid.scale, "zero": grid.zero.to(ours.dtype)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["back"]),
        ]
        theirs, back = onnxruntime_run(nodes, {"x": x}, ["codes", "back"], constants, optimize=False)
        seen(differing(ours, theirs))
        seen(differing(grid.decode(ours), back))
