"""Sessions answer as torch does; 8 and 4 bits lose nothing that matters; five traps, each shown and repaired."""

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime import quantization
from torch.nn.functional import cross_entropy

from bigmodel_course.compression.quantized_layers import quantize_model
from bigmodel_course.corpus import windows
from bigmodel_course.deployment import quantized
from bigmodel_course.deployment.export import export, metadata_of, read, write
from bigmodel_course.deployment.graph import operators
from bigmodel_course.deployment.quantized import (
    blockwise_quantizer,
    prepared,
    quantize_4bit,
    quantize_dynamic,
    quantize_static,
)
from bigmodel_course.deployment.runtime import (
    LEVELS,
    Bound,
    Kernel,
    Latency,
    Session,
    kernels,
    open_session,
    percentile,
    percentiles,
)
from bigmodel_course.models import MLP, SmallCNN
from bigmodel_course.recipe import byte_gpt_parts, digit_parts, train_digits, trained_byte_gpt, trained_digit_model

DIGITS = {"name": "digits", "version": "1", "kind": "classifier", "classes": 10}
VNNI = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def digits(folder):
    """The digit model, its file, and the pictures of all parts."""
    model, parts = trained_digit_model(), digit_parts()
    path = export(model, parts[0].x[:2], folder / "digits.onnx", dynamic={0: "batch"}, metadata=DIGITS)
    return model, path, parts


@pytest.fixture(scope="module")
def gpt(folder):
    """The byte GPT, its file, held-out windows with their targets, and batches to calibrate with."""
    model, (train, held_out) = trained_byte_gpt(), byte_gpt_parts()
    x, y = windows(held_out, 16, 64, seed=1, step=0)
    axes = {0: "batch", 1: torch.export.Dim("tokens", max=64)}
    metadata = {"name": "gpt", "version": "1", "kind": "language-model", "vocabulary": 256, "context": 64}
    path = export(model, x[:2], folder / "gpt.onnx", dynamic=axes, metadata=metadata)
    samples = [windows(train, 8, 64, seed=3, step=step)[0].numpy() for step in range(4)]
    return model, path, (x, y), samples


@pytest.fixture(scope="module")
def cnn(folder):
    """A small CNN that has seen the digits, and its file."""
    train = digit_parts()[0]
    model = SmallCNN(channels=(8, 16), generator=torch.Generator().manual_seed(0))
    train_digits(model, train, epochs=4)
    return model, export(
        model, train.x[:2], folder / "cnn.onnx", dynamic={0: "batch"}, metadata=DIGITS | {"name": "cnn"}
    )


def scores(path, x):
    return torch.from_numpy(open_session(path).run(x.numpy())[0])


def accuracy(path, part):
    return (scores(path, part.x).argmax(1) == part.y).double().mean().item()


def loss(path, text):
    x, y = text
    return cross_entropy(scores(path, x).flatten(0, 1), y.flatten()).item()


def stored_types(path):
    """The ONNX types of the stored matrices, by number: 1 float, 2 uint8, 3 int8."""
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2}


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.verifies(
    "deployment.runtime.open_session",
    "deployment.runtime.Session",
    "deployment.runtime.LEVELS",
    kind="parity",
    against="torch eager",
    on="the digit model, 1 to 359 pictures, four levels, 1 and 2 threads, relative to the largest score",
    bound=2e-6,
)
@pytest.mark.parametrize("level", LEVELS)
def test_a_session_gives_torchs_scores_at_every_level_and_number_of_threads(digits, level, seen):
    model, path, (_, _, test) = digits
    for threads in (1, 2):
        session = open_session(path, threads=threads, level=level)
        for pictures in (test.x[:1], test.x[:7], test.x):
            with torch.no_grad():
                wanted = model(pictures)
            (got,) = session.run(pictures.numpy())
            seen((torch.from_numpy(got) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.verifies(
    "deployment.runtime.open_session",
    kind="parity",
    against="torch eager",
    on="the byte GPT, held-out windows of 1, 5 and 64 tokens, relative to the largest score",
    bound=1e-5,
)
def test_a_session_runs_a_language_model_of_any_length(gpt, seen):
    model, path, (x, _), _ = gpt
    for length in (1, 5, 64):
        with torch.no_grad():
            wanted = model(x[:3, :length])
        seen((scores(path, x[:3, :length]) - wanted).abs().max() / wanted.abs().max())


def test_a_session_knows_its_metadata_and_serves_several_threads_at_once(digits):
    _, path, (_, _, test) = digits
    session = open_session(path)
    assert {key: session.metadata[key] for key in DIGITS} == {key: str(value) for key, value in DIGITS.items()}
    parts = np.array_split(test.x.numpy(), 40)
    with ThreadPoolExecutor(4) as pool:
        together = np.concatenate([answer[0] for answer in pool.map(session.run, parts)])
    assert np.array_equal(together, np.concatenate([session.run(part)[0] for part in parts]))


@pytest.mark.verifies(
    "deployment.runtime.Bound",
    kind="invariant",
    against="Session.run",
    on="a call whose arrays keep their places in memory, refilled four times",
    bound=0.0,
)
def test_a_bound_call_answers_from_the_same_memory_every_time(digits, seen):
    _, path, (_, _, test) = digits
    session, pictures = open_session(path), test.x.numpy()
    assert isinstance(session, Session)
    first = pictures[:8].copy()
    bound = session.bind(first)
    assert isinstance(bound, Bound)
    places = [array.ctypes.data for array in bound.inputs + bound.outputs]
    for i in range(0, 32, 8):
        bound.inputs[0][:] = pictures[i : i + 8]
        (answer,) = bound()
        seen(np.abs(answer - session.run(pictures[i : i + 8])[0]).max())
    assert [array.ctypes.data for array in bound.inputs + bound.outputs] == places
    assert np.array_equal(first, pictures[:8]), "the caller's array is left alone"


@pytest.mark.verifies(
    "deployment.runtime.open_session",
    "deployment.runtime.Session",
    kind="message",
    against="what was expected and what came",
    on="wrong arrays, a wrong option, a file that is cut short",
)
def test_a_wrong_input_or_file_is_named(digits, tmp_path):
    _, path, (_, _, test) = digits
    session, x = open_session(path), test.x.numpy()
    with pytest.raises(ValueError, match="one array for each of x, got 2"):
        session.run(x, x)
    with pytest.raises(TypeError, match="x must be a NumPy array of float32, got float64"):
        session.run(x.astype(np.float64))
    with pytest.raises(TypeError, match="x must be a NumPy array of float32, got list"):
        session.run(x.tolist())
    for wrong in (x[:, :63], x[0], x[None]):
        with pytest.raises(ValueError, match=r"x must have shape \['batch', 64\], got \["):
            session.run(wrong)
    with pytest.raises(ValueError, match="level must be one of off, basic, extended, all, got 'fast'"):
        open_session(path, level="fast")
    for threads in (0, 2.0, True):
        with pytest.raises(ValueError, match="threads must be a whole number from 1 to 1024"):
            open_session(path, threads=threads)
    (short := tmp_path / "short.onnx").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"short\.onnx"):
        open_session(short)


def test_tokens_that_a_model_cannot_take_are_an_error_and_the_session_goes_on(gpt):
    _, path, (x, _), _ = gpt
    session = open_session(path)
    for wrong in (np.full((1, 4), 300), np.zeros((1, 65), np.int64)):
        with pytest.raises(ValueError, match=r"the model cannot run on \w+ \[1, \d+\]: "):
            session.run(wrong)
    assert session.run(x[:1].numpy())[0].shape == (1, 64, 256)


def test_a_file_whose_weights_lie_beside_it_runs_and_is_quantized(digits, tmp_path):
    model, path, (_, _, test) = digits
    apart = export(
        model, test.x[:2], tmp_path / "apart.onnx", dynamic={0: "batch"}, metadata=DIGITS, external_data=True
    )
    assert torch.equal(scores(apart, test.x), scores(path, test.x))
    ours, whole = (quantize_dynamic(file, tmp_path / f"{i}.onnx") for i, file in enumerate((apart, path)))
    assert torch.equal(scores(ours, test.x), scores(whole, test.x))


@pytest.mark.verifies(
    "deployment.runtime.kernels",
    "deployment.runtime.Kernel",
    kind="invariant",
    against="the operators in the file",
    on="onnxruntime's profile of the byte GPT with every optimisation off; fused kernels above that",
)
def test_without_optimisation_the_kernels_are_the_files_operators_and_with_it_they_are_fused(gpt, digits):
    _, path, (x, _), _ = gpt
    ran = {level: kernels(path, x[:1].numpy(), level=level, calls=2) for level in LEVELS}
    counts = {level: {kernel.operator: kernel.calls for kernel in rows} for level, rows in ran.items()}
    assert counts["off"] == operators(read(path))
    assert {"SkipLayerNormalization", "FastGelu"} <= counts["extended"].keys() - counts["basic"].keys()
    assert all(isinstance(row, Kernel) and row.seconds > 0 for row in ran["all"])
    _, path, (_, _, test) = digits
    fused = kernels(path, test.x[:1].numpy(), level="extended", calls=1)
    assert {kernel.operator: kernel.calls for kernel in fused} == {"FusedGemm": 1, "Gemm": 1}
    with pytest.raises(ValueError, match="calls must be at least 1, got 0"):
        kernels(path, test.x[:1].numpy(), calls=0)


# --- percentiles ------------------------------------------------------------------------------------------------------


@pytest.mark.verifies(
    "deployment.runtime.percentile",
    "deployment.runtime.Latency",
    kind="parity",
    against='numpy.percentile(method="inverted_cdf")',
    on="1 to 200 values, percents from 1 to 100",
    bound=0.0,
)
def test_percentiles_are_nearest_ranks(seen):
    @given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200), st.integers(1, 100))
    def compared(values, percent):
        wanted = np.percentile(values, percent, method="inverted_cdf")
        seen(abs(percentile(values, percent) - wanted))
        seen(abs(Latency(tuple(values))[percent] - wanted))
        assert Latency(tuple(values)).mean == math.fsum(values) / len(values)

    compared()
    for values, percent in (([], 50), ([1.0], 0), ([1.0], 101)):
        with pytest.raises(ValueError, match="need values and 0 < percent <= 100"):
            percentile(values, percent)


@pytest.mark.verifies(
    "deployment.runtime.percentiles",
    kind="invariant",
    against="a clock that each rival moves on by a known time",
    on="three rivals, 4 rounds of 2 calls",
    bound=1e-12,
)
def test_rivals_are_timed_in_turn_and_each_round_starts_with_another(seen):
    now, order = [0.0], []

    def work(name, seconds):
        order.append(name)
        now[0] += seconds

    rivals = {name: partial(work, name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    measured = percentiles(rivals, rounds=4, streak=2, clock=lambda: now[0])
    assert "".join(order[::3]) == "abcbcacababc", "three calls in a row, of which the first is not counted"
    for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        assert len(measured[name].seconds) == 8
        seen(max(abs(value - seconds) for value in measured[name].seconds))
    with pytest.raises(ValueError, match="need rivals, rounds >= 1 and streak >= 1"):
        percentiles({}, rounds=4)


# --- quantizers -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not VNNI, reason="without VNNI the processor's 16-bit sums of two products may overflow")
@pytest.mark.verifies(
    "deployment.quantized.quantize_dynamic",
    kind="parity",
    against="compression.quantized_layers.quantize_model, integer arithmetic in torch",
    on="the digit model, 359 pictures in one batch, relative to the largest score",
    bound=1e-5,
)
def test_dynamic_int8_is_the_arithmetic_of_the_compression_part(digits, tmp_path, seen):
    model, path, (_, _, test) = digits
    theirs = scores(quantize_dynamic(path, tmp_path / "int8.onnx"), test.x)
    ours = quantize_model(model)(test.x)
    seen((theirs - ours).abs().max() / ours.abs().max())


@pytest.mark.verifies(
    "deployment.quantized.quantize_dynamic",
    "deployment.quantized.quantize_static",
    "deployment.quantized.quantize_4bit",
    kind="invariant",
    against="the float32 file's accuracy",
    on="the digit model, 1,797 pictures: share of right answers lost",
    bound=0.005,
)
def test_every_variant_is_smaller_and_keeps_the_accuracy(digits, tmp_path, seen):
    _, path, parts = digits
    train = parts[0].x.numpy()
    files = {
        3.4: quantize_dynamic(path, tmp_path / "dynamic.onnx"),
        2.9: quantize_dynamic(path, tmp_path / "tensor.onnx", per_channel=False),
        2.8: quantize_dynamic(path, tmp_path / "seven.onnx", reduce_range=True),
        3.0: quantize_static(path, tmp_path / "static.onnx", [train[i : i + 64] for i in range(0, 320, 64)]),
        4.8: quantize_4bit(path, tmp_path / "4.onnx"),
    }

    def right(file):
        return sum(accuracy(file, part) * len(part) for part in parts) / sum(map(len, parts))

    for smaller, file in files.items():
        seen(max(0.0, right(path) - right(file)))
        floats = sum(len(t.raw_data) for t in read(path).graph.initializer)
        assert sum(len(t.raw_data) for t in read(file).graph.initializer) < floats / smaller
        described = metadata_of(read(file))
        assert described["name"] == "digits"
        assert described["weights"] in ("int8 dynamic", "int8 static", "4 bits")
        assert described["weights_sha256"] != metadata_of(read(path))["weights_sha256"]


@pytest.mark.verifies(
    "deployment.quantized.quantize_dynamic",
    "deployment.quantized.quantize_static",
    "deployment.quantized.quantize_4bit",
    kind="invariant",
    against="the float32 file's loss",
    on="the byte GPT, 1,024 held-out bytes, nats a byte lost",
    bound=0.05,
)
def test_a_language_model_keeps_its_loss(gpt, tmp_path, seen):
    _, path, text, samples = gpt
    full = loss(path, text)
    seen(loss(quantize_dynamic(path, tmp_path / "dynamic.onnx"), text) - full)
    seen(loss(quantize_static(path, tmp_path / "static.onnx", samples), text) - full)
    seen(loss(quantize_4bit(path, tmp_path / "4.onnx", block=32), text) - full)


@pytest.mark.verifies(
    "deployment.quantized.quantize_static",
    kind="invariant",
    against="the float32 file's accuracy",
    on="a CNN, 359 pictures, convolutions and ReLU included: share of right answers lost",
    bound=0.005,
)
def test_static_int8_takes_convolutions(cnn, digits, tmp_path, seen):
    _, path = cnn
    train, _, test = digits[2]
    file = quantize_static(path, tmp_path / "s.onnx", [train.x[:128].numpy()], operators=("Conv", "Relu", "MatMul"))
    seen(max(0.0, accuracy(path, test) - accuracy(file, test)))
    ran = {kernel.operator for kernel in kernels(file, test.x[:4].numpy(), calls=1)}
    assert "QLinearConv" in ran
    assert "Conv" not in ran


@pytest.mark.verifies(
    "deployment.quantized.prepared",
    kind="invariant",
    against="the file that it starts from",
    on="the digit model and the byte GPT: no Gemm, every stored matrix a product's own; scores relative to the largest",
    bound=2e-6,
)
def test_a_prepared_graph_gives_the_same_scores(digits, gpt, tmp_path, seen):
    for path, x in ((digits[1], digits[2][2].x), (gpt[1], gpt[2][0])):
        model = prepared(path)
        assert "Gemm" not in operators(model)
        weights = {tensor.name for tensor in model.graph.initializer}
        assert not [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
        wanted = scores(path, x)
        seen((scores(write(model, tmp_path / "p.onnx"), x) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.verifies(
    "deployment.quantized.quantize_dynamic",
    "deployment.quantized.quantize_static",
    "deployment.quantized.quantize_4bit",
    kind="message",
    against="what is wrong",
    on="no samples, a wrong block, nothing to quantize, a product that stayed in float; no target is written then",
)
def test_what_cannot_be_quantized_is_said_and_no_file_is_written(digits, tmp_path, monkeypatch):
    _, path, _ = digits
    before, target = path.read_bytes(), tmp_path / "target.onnx"
    with pytest.raises(ValueError, match="samples must hold at least one batch"):
        quantize_static(path, target, [])
    with pytest.raises(ValueError, match="block must be 16, 32, 64, 128 or 256, got 24"):
        quantize_4bit(path, target, block=24)
    with pytest.raises(ValueError, match=r"digits\.onnx has no Conv with a stored weight to quantize"):
        quantize_dynamic(path, target, operators=("Conv",))
    monkeypatch.setattr(quantized, "gemm_to_matmul", lambda model: model)
    monkeypatch.setattr(quantized, "_weighted", lambda model, kinds: quantized_with_gemm(model))
    with pytest.raises(ValueError, match="2 of 2 products stayed in float"):
        quantize_4bit(path, target)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def quantized_with_gemm(model):
    return {node.output[0] for node in model.graph.node if node.op_type == "Gemm"}


@pytest.mark.verifies(
    "deployment.quantized.blockwise_quantizer",
    kind="invariant",
    against="the program's logging before",
    on="the first import of onnxruntime's 4-bit quantizer, which sets up the root logger by itself",
)
def test_the_4_bit_quantizer_leaves_the_programs_logging_alone(digits, tmp_path):
    before = logging.root.level, list(logging.root.handlers)
    quantize_4bit(digits[1], tmp_path / "4.onnx")
    assert (logging.root.level, list(logging.root.handlers)) == before


# --- the five traps: what onnxruntime's own calls do, and what ours do ------------------------------------------------


def raw_dynamic(path, target, **options):
    quantization.quantize_dynamic(path, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, **options)
    return operators(onnx.load(target))


def test_trap_1_a_tied_head_is_not_quantized_until_it_is_untied(gpt, tmp_path):
    _, path, _, _ = gpt
    layers = 2 * 4
    assert raw_dynamic(path, tmp_path / "raw.onnx")["MatMulInteger"] == layers, "all but the head"
    assert operators(read(quantize_dynamic(path, tmp_path / "int8.onnx")))["MatMulInteger"] == layers + 1


def test_trap_2_a_freshly_exported_linear_stops_the_quantizer_until_it_is_prepared(digits, tmp_path):
    _, path, _ = digits
    with pytest.raises(Exception, match="Inferred shape and existing shape differ"):
        raw_dynamic(path, tmp_path / "raw.onnx")
    quantization.quant_pre_process(path, tmp_path / "processed.onnx")
    assert raw_dynamic(tmp_path / "processed.onnx", tmp_path / "raw.onnx")["MatMulInteger"] == 2
    assert operators(read(quantize_dynamic(path, tmp_path / "int8.onnx")))["MatMulInteger"] == 2


def test_trap_3_the_4_bit_quantizer_passes_over_gemm_without_a_word(digits, tmp_path, caplog):
    _, path, _ = digits
    quantizer = blockwise_quantizer()(read(path), bits=4, block_size=32)
    with caplog.at_level(logging.WARNING):
        quantizer.process()
    quantizer.model.save_model_to_file(tmp_path / "raw.onnx")
    assert not caplog.records, "no warning"
    assert "MatMulNBits" not in operators(onnx.load(tmp_path / "raw.onnx"))
    full = path.stat().st_size
    assert (tmp_path / "raw.onnx").stat().st_size > 0.99 * full
    assert quantize_4bit(path, tmp_path / "4.onnx").stat().st_size < 0.25 * full


def test_trap_4_unsigned_weights_are_what_a_careless_call_stores(digits, tmp_path):
    _, path, _ = digits
    write(prepared(path), tmp_path / "prepared.onnx")
    raw_dynamic(tmp_path / "prepared.onnx", tmp_path / "u8.onnx", weight_type=quantization.QuantType.QUInt8)
    assert stored_types(tmp_path / "u8.onnx") == {2}
    for file in (
        quantize_dynamic(path, tmp_path / "a"),
        quantize_static(path, tmp_path / "b", [np.ones((4, 64), "f4")]),
    ):
        assert stored_types(file) == {3}


@pytest.mark.skipif(not VNNI, reason="this processor has no fast product of unsigned and signed bytes")
def test_trap_4_unsigned_weights_lose_the_speed(tmp_path):
    model = MLP((256, 1024, 1024, 10), generator=torch.Generator().manual_seed(0))
    path = export(model, torch.rand(2, 256), tmp_path / "f.onnx", dynamic={0: "batch"}, metadata=DIGITS)
    write(prepared(path), tmp_path / "prepared.onnx")
    unsigned = {"weight_type": quantization.QuantType.QUInt8, "per_channel": True}
    quantization.quantize_dynamic(tmp_path / "prepared.onnx", tmp_path / "raw.onnx", **unsigned)
    files = {
        "signed": quantize_dynamic(path, tmp_path / "s.onnx"),
        "unsigned": write(read(tmp_path / "raw.onnx", stamped=False), tmp_path / "u.onnx"),
    }
    x = np.random.default_rng(0).random((128, 256), np.float32)
    calls = {name: partial(open_session(file).run, x) for name, file in files.items()}
    measured = percentiles(calls, rounds=12, streak=4, clock=time.process_time)
    assert measured["unsigned"][50] > 1.2 * measured["signed"][50]


def test_trap_5_static_int8_of_every_operator_wrecks_a_language_model(gpt, tmp_path):
    _, path, text, samples = gpt
    full = loss(path, text)
    every = quantize_static(path, tmp_path / "all.onnx", samples, operators=list(operators(read(path))))
    masked = quantize_static(path, tmp_path / "softmax.onnx", samples, operators=("MatMul", "Softmax"))
    products = quantize_static(path, tmp_path / "products.onnx", samples)
    assert loss(products, text) < full + 0.05
    assert loss(every, text) > full + 0.3
    assert loss(masked, text) > full + 0.3, "the scores stand beside the mask's minus infinity"
