"""A file that leaves torch gives torch's answers; a file that comes from elsewhere is believed only after a check."""

import copy
import hashlib
import os
import random
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim

from bigmodel_course.deployment import export as exporting
from bigmodel_course.deployment.export import check, export, metadata_of, read, write
from bigmodel_course.deployment.graph import digests, gemm_to_matmul, nodes, operators, tensors, untie_head
from bigmodel_course.deployment.tracing import trace, translate
from bigmodel_course.models import GPT, MLP, GPTConfig, SmallCNN
from bigmodel_course.recipe import trained_byte_gpt, trained_digit_model

DIGITS = {"name": "digits", "version": 1, "kind": "classifier", "classes": 10}
BYTES = {"name": "bytes", "version": 1, "kind": "language-model", "vocabulary": 256, "context": 64}
LENGTH = {0: "batch", 1: Dim("length", max=64)}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16}
onnxruntime.set_default_logger_severity(4)  # what it refuses it also raises


@cache
def trained(make):
    return make()


def digit_model():
    return copy.deepcopy(trained(trained_digit_model))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def runner(path):
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def reference(path):
    evaluator = ReferenceEvaluator(os.fspath(path))
    return lambda x: torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])


def relative(got, want):
    """The largest difference over the largest number; shapes and types must be the same."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    got, want = got.double(), want.double()
    return ((got - want).abs().max() / want.abs().max()).item() if want.numel() else 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def exported(folder):
    """name -> (torch's model, what runs its file), each made once."""
    made = {}

    def get(name):
        if name not in made:
            kind, dtype, *options = name.split()
            model, example, dynamic, metadata = case(kind, DTYPES[dtype])
            options = {"opset": int(options[0])} if options else {}
            path = export(model, example, folder / f"{name}.onnx", dynamic=dynamic, metadata=metadata, **options)
            made[name] = (model, path)
        return made[name]

    return get


def case(kind, dtype):
    if kind == "gpt":
        return copy.deepcopy(trained(trained_byte_gpt)).to(dtype), torch.zeros(2, 8, dtype=torch.int64), LENGTH, BYTES
    model = digit_model() if kind == "mlp" else SmallCNN(generator=generator())
    return model.to(dtype), torch.rand(2, 64, dtype=dtype), {0: "batch"}, DIGITS


PARITY = [  # what is exported, and the largest difference over the largest score
    ("mlp float32", 2e-6),
    ("cnn float32", 2e-6),
    ("gpt float32", 5e-6),
    ("gpt float32 23", 5e-6),  # from opset 23 on attention is one operator
    ("mlp float64", 1e-14),
    ("mlp float16", 3e-3),
    ("cnn float16", 3e-3),
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.verifies(
                "deployment.export.export",
                kind="parity",
                against="the eager model, run by onnxruntime",
                on=f"{name}, 60 random shapes and scales, relative to the largest score",
                bound=bound,
            ),
        )
        for name, bound in PARITY
    ],
)
def test_the_file_answers_as_the_model_does_at_random_shapes_and_scales(exported, seen, name):
    model, path = exported(name)
    run, dtype = runner(path), next(model.parameters()).dtype
    smallest = 1 if name.endswith("23") else 0  # onnxruntime's Attention refuses an empty batch

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.integers(smallest, 40), st.integers(1, 64), st.sampled_from([1e-3, 1.0, 30.0]), st.integers(0, 10**6))
    def compare(batch, length, scale, seed):
        if name.startswith("gpt"):
            x = torch.randint(256, (batch, length), generator=generator(seed))
        else:
            x = (scale * torch.randn(batch, 64, generator=generator(seed))).to(dtype)
        with torch.no_grad():
            seen(relative(run(x), model(x)))

    compare()


@pytest.mark.verifies(
    "deployment.tracing.trace",
    kind="parity",
    against="the eager model",
    on="the exported program of the byte GPT, six shapes, relative to the largest score",
    bound=1e-6,
)
@pytest.mark.verifies(
    "deployment.tracing.translate",
    kind="parity",
    against="ONNX's reference implementation in NumPy",
    on="the ONNX graph of the byte GPT, six shapes, relative to the largest score",
    bound=5e-6,
)
def test_each_stage_answers_as_the_stage_before(seen, tmp_path):
    model = trained(trained_byte_gpt)
    program = trace(model, torch.zeros(2, 8, dtype=torch.int64), LENGTH)
    path = write(translate(program, LENGTH), tmp_path / "gpt.onnx", metadata=BYTES)
    run = reference(path)
    with torch.no_grad():
        for batch, length in ((1, 1), (1, 64), (5, 7), (2, 2), (3, 40), (8, 1)):
            x = torch.randint(256, (batch, length), generator=generator(batch))
            seen(relative(program.module()(x), model(x)))
            seen(relative(run(x), model(x)))


EXTREME = [0.0, -0.0, 1e-45, 1e-38, 1e4, 1e30, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("name", ["mlp float32", "cnn float32", "mlp float64"])
@pytest.mark.parametrize("how", ["one pixel", "every pixel"])
def test_extreme_values_overflow_and_spread_as_in_torch(exported, name, how):
    model, path = exported(name)
    run = runner(path)
    for value in EXTREME:
        x = torch.full((2, 64), 0.5, dtype=next(model.parameters()).dtype)
        x[0, 5 if how == "one pixel" else slice(None)] = value
        got, want = run(x), model(x).detach()
        assert torch.equal(got.isnan(), want.isnan()), value
        scale = want[want.isfinite()].abs().max() if want.isfinite().any() else 1.0
        torch.testing.assert_close(got / scale, want / scale, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_what_the_runtime_cannot_do_is_an_error_and_not_another_answer(exported, tmp_path):
    _, path = exported("gpt float32")
    run = runner(path)
    for tokens, reason in ((torch.zeros(1, 65), "Add"), (torch.full((1, 4), 256), "Gather")):
        with pytest.raises(Exception, match=reason):
            run(tokens.long())
    for kind, dtype in (("cnn", torch.float64), ("mlp", torch.bfloat16)):
        model, example, dynamic, metadata = case(kind, dtype)
        path = export(model, example, tmp_path / "m.onnx", dynamic=dynamic, metadata=metadata)
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            runner(path)


def test_a_negative_token_is_the_one_input_that_torch_refuses_and_the_file_takes(exported):
    model, path = exported("gpt float32")
    with pytest.raises(IndexError):
        model(torch.tensor([[-1]]))
    torch.testing.assert_close(runner(path)(torch.tensor([[-1]])), model(torch.tensor([[255]])).detach())


def test_a_model_comes_back_as_it_went_and_dropout_stays_out_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(64, 10), nn.Dropout(0.5), nn.BatchNorm1d(10))
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = export(model, torch.rand(2, 64), tmp_path / "m.onnx", dynamic={0: "batch"}, metadata=DIGITS)
    assert [model.training, model[1].training, model[2].training] == [True, True, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = torch.rand(3, 64, generator=generator())
    assert torch.equal(runner(path)(x), runner(path)(x))
    torch.testing.assert_close(runner(path)(x), model.eval()(x).detach())


def test_the_same_model_gives_the_same_bytes_and_none_of_them_tell_where_it_was_made(tmp_path):
    paths = []
    for name in ("a", "b"):
        model = digit_model()
        paths.append(export(model, torch.rand(2, 64), tmp_path / name, dynamic={0: "batch"}, metadata=DIGITS))
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    for words in (b"forward", b"models.py", os.fspath(tmp_path).encode(), b"site-packages"):
        assert words not in first


def test_how_the_example_lies_in_memory_is_no_part_of_the_file(tmp_path):
    gpt, tokens = trained(trained_byte_gpt), torch.arange(40).view(8, 5).T[:, :6]
    assert not tokens.is_contiguous()
    files = [export(gpt, x, tmp_path / "m.onnx", dynamic=LENGTH, metadata=BYTES) for x in (tokens, tokens.contiguous())]
    again = torch.randint(256, (3, 9), generator=generator())
    assert relative(runner(files[0])(again), gpt(again)) < 1e-5


@pytest.mark.parametrize("opset", [17, 18, 21, 23, 25])
def test_the_opset_is_the_one_asked_for(tmp_path, opset):
    model, example, dynamic, metadata = case("mlp", torch.float32)
    path = export(model, example, tmp_path / "m.onnx", dynamic=dynamic, metadata=metadata, opset=opset)
    assert [entry.version for entry in read(path).opset_import] == [opset]
    x = torch.rand(5, 64, generator=generator())
    assert relative(runner(path)(x), model(x).detach()) < 2e-6


def test_an_opset_that_cannot_hold_the_graph_is_an_error(tmp_path):
    model, example, dynamic, metadata = case("mlp", torch.float32)
    for opset in (16, 27):
        with pytest.raises(ValueError, match="opset must be from 17 to 26"):
            export(model, example, tmp_path / "m.onnx", dynamic=dynamic, metadata=metadata, opset=opset)
    gpt = GPT(GPTConfig(layers=1, heads=1, width=8, context=64), generator=generator())
    program = trace(gpt, torch.zeros(2, 8, dtype=torch.int64), LENGTH)
    with pytest.raises(ValueError, match="opset 16 cannot hold this graph: torch wrote 18"):
        translate(program, LENGTH, opset=16)  # LayerNormalization came with 17
    assert not list(tmp_path.iterdir())


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else -x


class Where(nn.Module):
    def forward(self, x):
        return torch.where(x.sum() > 0, x * 2, -x)


class Halved(nn.Module):
    def forward(self, x):
        while x.abs().max() > 1:
            x = x / 2
        return x


class HalvedInGraph(nn.Module):
    def forward(self, x):
        return torch.while_loop(lambda x: x.abs().max() > 1, lambda x: (x / 2,), (x,))[0]


class Pairs(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), 2, -1).sum(2)


class AnyPairs(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], 2, -1).sum(2)


class Summed(nn.Module):
    def forward(self, x):
        total = torch.zeros_like(x[0])
        for row in x:
            total = total + row
        return x + total


class SummedInGraph(nn.Module):
    def forward(self, x):
        return x + x.sum(0)


class Signs(nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.sign(x.numpy()))


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x.T @ x)[None]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), "decides by one: torch.where"),
        (Halved(), "decides by one: torch.where, torch.cond and while_loop"),
        (Pairs(), r"fixes the size of a dynamic axis: a number written out, len\(x\)"),
        (Summed(), "a loop over x do that"),
        (Signs(), r"model Signs is not one graph: .numpy\(\) is not supported"),
        (Spectrum(), "no operator for: .*_linalg_eigh"),
    ],
)
@pytest.mark.verifies(
    "deployment.tracing.trace",
    "deployment.export.export",
    kind="message",
    against="what is no graph, or has no operator in ONNX",
    on="branches, loops, sizes fixed by len, NumPy, eigenvalues",
)
def test_what_cannot_be_exported_says_why_and_leaves_no_file(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        export(model, torch.rand(2, 4), tmp_path / "m.onnx", dynamic={0: "batch"}, metadata=DIGITS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "eager"),
    [(Where(), Branch()), (HalvedInGraph(), Halved()), (AnyPairs(), Pairs()), (SummedInGraph(), Summed())],
)
def test_rewritten_it_is_exported_and_does_the_same(tmp_path, model, eager):
    sizes = {"classes": 2 if isinstance(model, AnyPairs) else 4}
    path = export(model, torch.rand(2, 4), tmp_path / "m.onnx", dynamic={0: "batch"}, metadata=DIGITS | sizes)
    run = runner(path)
    for x in (torch.rand(3, 4), -torch.rand(1, 4), 50 * torch.rand(7, 4)):
        torch.testing.assert_close(run(x), eager(x))


@pytest.mark.parametrize(
    ("example", "dynamic", "message"),
    [
        (torch.rand(1, 64), {0: "batch"}, r"at least 2 long along each dynamic axis .*input 0 is \[1, 64\]"),
        (torch.rand(2, 64), {2: "batch"}, "dynamic names its axis 2"),
        (torch.rand(2, 64), [{0: "batch"}, {}], "one mapping for each of the 1 inputs, got 2"),
        (torch.rand(2, 64), {0: "batch", 1: "pixels"}, "fixes the size of a dynamic axis|is not one graph"),
    ],
)
def test_a_wrong_example_says_what_is_wrong(tmp_path, example, dynamic, message):
    model = digit_model()
    with pytest.raises(ValueError, match=message):
        export(model, example, tmp_path / "m.onnx", dynamic=dynamic, metadata=DIGITS)


def test_a_program_that_fixes_a_size_is_not_sold_as_dynamic(tmp_path):
    program = torch.export.export(digit_model(), (torch.rand(2, 64),))
    with pytest.raises(ValueError, match="dynamic names axis 0 of x, and the program fixes it"):
        translate(program, {0: "batch"})
    path = export(program, torch.rand(2, 64), tmp_path / "m.onnx", dynamic={}, metadata=DIGITS)
    with pytest.raises(Exception, match="invalid dimensions"):
        runner(path)(torch.rand(4, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "oracle"}, "must say kind, one of classifier, language-model, .*got 'oracle'"),
        ({"name": ""}, "must say name in 1 to 1,000"),
        ({"version": "1\r\nX-Admin: yes"}, "must say version in 1 to 1,000 printable"),
        ({"classes": "ten"}, "classes must be a whole number above 0, got 'ten'"),
        ({"classes": 0}, "classes must be a whole number"),
        ({"classes": 12}, "classes must be the output's last size, 10, got 12"),
        ({"note": "x" * 1001}, "must say note in 1 to 1,000"),
        ({"kind": "language-model"}, "must say vocabulary"),
    ],
)
@pytest.mark.verifies("deployment.export.write", kind="message", against="metadata that does not fit", on="eight kinds")
def test_metadata_must_say_what_a_service_needs(exported, tmp_path, change, message):
    _, path = exported("mlp float32")
    with pytest.raises(ValueError, match=message):
        write(read(path), tmp_path / "m.onnx", metadata=DIGITS | change)


@pytest.mark.verifies(
    "deployment.export.check",
    "deployment.export.metadata_of",
    kind="invariant",
    against="what was given, and SHA-256 computed by hand",
    on="the digit model and the byte GPT",
)
def test_a_file_says_what_it_holds(exported):
    for name, given_ in (("mlp float32", DIGITS), ("gpt float32", BYTES)):
        _, path = exported(name)
        found = check(path)
        assert found == metadata_of(read(path))
        assert {key: found[key] for key in given_} == {key: str(value) for key, value in given_.items()}
        digest = hashlib.sha256()
        for weight in sorted(read(path).graph.initializer, key=lambda weight: weight.name):
            digest.update(f"{weight.name} {weight.data_type} {list(weight.dims)}\n".encode())
            digest.update(numpy_helper.to_array(weight).tobytes())
        assert found["weights_sha256"] == digest.hexdigest()


def damaged(model, edit):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    edit(changed)
    return changed


@pytest.mark.verifies(
    "deployment.graph.digests", kind="invariant", against="every edit of a model", on="weights, shapes, nodes, opset"
)
def test_digests_change_with_whatever_changes(exported):
    model = read(exported("mlp float32")[1])
    known = digests(model)
    assert known == digests(damaged(model, lambda m: None))
    edits = {
        "weights": lambda m: setattr(m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data[::-1]),
        "name": lambda m: setattr(m.graph.initializer[0], "name", "other"),
        "node": lambda m: setattr(m.graph.node[1], "op_type", "Sigmoid"),
        "opset": lambda m: setattr(m.opset_import[0], "version", 21),
        "input": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 65),
        "metadata": lambda m: setattr(m.metadata_props[0], "value", "other"),
    }
    for name, edit in edits.items():
        changed = digests(damaged(model, edit))
        assert changed["weights_sha256"] != known["weights_sha256"] or name not in ("weights", "name")
        assert changed["graph_sha256"] != known["graph_sha256"] or name in ("weights", "name")


@pytest.mark.verifies(
    "deployment.export.read",
    kind="message",
    against="files that are cut short or changed",
    on="600 cuts, 400 single bits, 100 files of random bytes",
)
def test_a_file_that_is_not_as_it_was_written_is_refused(exported, tmp_path):
    whole = exported("mlp float32")[1].read_bytes()
    path, rng = tmp_path / "m.onnx", random.Random(0)
    cuts = (*range(100), *range(len(whole) - 400, len(whole)), *(rng.randrange(len(whole)) for _ in range(100)))
    pieces = [whole[:cut] for cut in cuts]
    pieces += [rng.randbytes(rng.randrange(2000)) for _ in range(100)]
    ends = (*range(200), *range(len(whole) - 900, len(whole)))  # where names and numbers of the format stand
    for place in (*rng.sample(ends, 200), *(rng.randrange(len(whole)) for _ in range(200))):
        pieces.append(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
    for piece in pieces:
        path.write_bytes(piece)
        with pytest.raises(ValueError, match=r"m\.onnx"):
            read(path)


def stored(tmp_path, model):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def loop_with_weight(model):
    """A weight inside a branch, where a check of the top graph would not look."""
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["v"])], "inner", [], [])
    inner.initializer.append(TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL))
    inner.initializer[0].external_data.add(key="location", value="../secret")
    model.graph.node.append(helper.make_node("If", ["c"], ["v"], then_branch=inner, else_branch=inner))


def outside(location, **entries):
    def edit(model):
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in ({"location": location} | entries).items():
            weight.external_data.add(key=key, value=value)

    return edit


def huge(model):
    outside("d.data")(model)
    model.graph.initializer[0].dims[:] = [10**9, 10**9]


ONLY_HERE = "only a file in its own folder is read"
HOSTILE = {
    "an absolute path": (outside("/etc/passwd"), ONLY_HERE),
    "a path upwards": (outside("../secret"), ONLY_HERE),
    "a path down and up": (outside("a/../../secret"), ONLY_HERE),
    "a Windows path": (outside("..\\secret"), ONLY_HERE),
    "a drive": (outside("C:secret"), ONLY_HERE),
    "a zero byte": (outside("secret\0.data"), ONLY_HERE),
    "the folder itself": (outside("."), ONLY_HERE),
    "no name": (outside(""), ONLY_HERE),
    "a link": (outside("link"), "it is a link or a device"),
    "a pipe": (outside("pipe"), "it is a link or a device"),
    "a folder": (outside("folder"), "it is a link or a device"),
    "no such file": (outside("missing"), "cannot be used"),
    "too short a file": (outside("short"), "cannot be used"),
    "a wrong length": (outside("short", length="7"), "is .* bytes by its shape, not 7"),
    "a negative offset": (outside("short", offset="-4"), "cannot be used"),
    "an offset that is no number": (outside("short", offset="x"), "cannot be used"),
    "a weight larger than memory": (huge, "more bytes than limit allows"),
    "a weight inside a branch": (loop_with_weight, ONLY_HERE),
    "an unknown type": (
        lambda m: (outside("short")(m), setattr(m.graph.initializer[0], "data_type", 99)),
        "of type 99",
    ),
    "an old opset": (lambda m: setattr(m.opset_import[0], "version", 9), "is of opset 9; we read 17 to 26"),
    "a new opset": (lambda m: setattr(m.opset_import[0], "version", 99), "is of opset 99"),
    "a new format": (lambda m: setattr(m, "ir_version", 14), "file format 14"),
    "operators of its own": (lambda m: m.opset_import.add(domain="evil", version=1), "operators of evil"),
    "a node of its own": (lambda m: setattr(m.graph.node[0], "domain", "evil"), "operators of evil"),
    "functions of its own": (lambda m: m.functions.add(name="f"), "functions or training graphs"),
    "a training graph": (lambda m: m.training_info.add(), "functions or training graphs"),
    "no digest": (lambda m: m.ClearField("metadata_props"), "metadata lacks weights_sha256"),
    "a changed weight": (
        lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(len(m.graph.initializer[0].raw_data))),
        "weights_sha256 does not fit",
    ),
    "a changed node": (lambda m: setattr(m.graph.node[1], "op_type", "Sigmoid"), "graph_sha256 does not fit"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.verifies(
    "deployment.export.read", kind="message", against="hostile files and files of others", on=f"{len(HOSTILE)} kinds"
)
def test_a_hostile_file_is_refused_before_it_is_followed(exported, tmp_path, name):
    edit, message = HOSTILE[name]
    inner = tmp_path / "inner"
    (inner / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(10**6))
    (inner / "link").symlink_to(tmp_path / "secret")
    (inner / "short").write_bytes(bytes(10))
    os.mkfifo(inner / "pipe")
    path = stored(inner, damaged(read(exported("mlp float32")[1]), edit))
    for stamped in (True, False):
        if stamped or not ("fit" in message or "lacks" in message):
            with pytest.raises(ValueError, match=message):
                read(path, stamped=stamped)


def test_whoever_rewrites_the_digest_too_still_cannot_break_the_rules(exported, tmp_path):
    def edit(model):
        model.graph.node[1].op_type = "NoSuchOperator"
        fresh = metadata_of(model) | digests(model)
        helper.set_model_props(model, fresh)

    path = stored(tmp_path, damaged(read(exported("mlp float32")[1]), edit))
    with pytest.raises(ValueError, match="breaks the rules of ONNX: No Op registered for NoSuchOperator"):
        read(path)


def test_a_file_larger_than_the_limit_is_refused_before_it_is_read(exported, tmp_path):
    path = exported("mlp float32")[1]
    size = path.stat().st_size
    assert read(path, limit=size)
    with pytest.raises(ValueError, match=f"has {size:,} bytes, more than limit={size - 1:,}"):
        read(path, limit=size - 1)
    with pytest.raises(ValueError, match="there is none at"):
        check(tmp_path / "none.onnx")


@pytest.mark.verifies(
    "deployment.export.write",
    "deployment.export.read",
    kind="recovery",
    against="a data file that is missing, shorter, or another model's, and a crash between the two files",
    on="the digit model",
)
def test_weights_beside_the_graph_are_held_to_it(exported, tmp_path, monkeypatch):
    _, inside = exported("mlp float32")
    path = write(read(inside), tmp_path / "m.onnx", external_data=True)
    (data,) = tmp_path.glob("*.data")
    assert path.stat().st_size < 5000 < data.stat().st_size
    x = torch.rand(5, 64, generator=generator())
    assert torch.equal(runner(path)(x), runner(inside)(x))
    assert check(path) == check(inside)

    whole = data.read_bytes()
    for content, message in ((whole[:-1], "cannot be used"), (whole[::-1], "its data file is another model's")):
        data.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(path)
    data.write_bytes(whole)

    other = MLP((64, 128, 10), generator=generator(1))
    replaced = translate(trace(other, torch.rand(2, 64), {0: "batch"}), {0: "batch"})

    def crash(*_):
        raise KeyboardInterrupt

    original = exporting.write_whole
    monkeypatch.setattr(exporting, "write_whole", lambda p, c: original(p, c) if p.suffix == ".data" else crash())
    with pytest.raises(KeyboardInterrupt):
        write(replaced, path, metadata=DIGITS, external_data=True)
    assert torch.equal(runner(path)(x), runner(inside)(x))
    data.unlink()
    with pytest.raises(ValueError, match="cannot be used"):
        read(path)


@pytest.mark.verifies(
    "deployment.graph.gemm_to_matmul",
    "deployment.graph.untie_head",
    kind="parity",
    against="the graph before",
    on="the digit model and the byte GPT, by onnxruntime, relative to the largest score",
    bound=2e-6,
)
def test_the_rewrites_change_no_answer(exported, seen, tmp_path):
    for name, x in (("mlp float32", torch.rand(9, 64)), ("gpt float32", torch.randint(256, (3, 20)))):
        before = read(exported(name)[1])
        for rewrite in (gemm_to_matmul, untie_head):
            kept = before.SerializeToString()
            path = write(rewrite(before), tmp_path / "m.onnx")
            assert before.SerializeToString() == kept
            seen(relative(runner(path)(x), runner(exported(name)[1])(x)))


def product(a, b, names=("x", "w")):
    """A graph y = op(x, w[, b]) with a stored weight, for rewrites."""
    weights = [numpy_helper.from_array(array, name) for array, name in zip(b, ("w", "b"), strict=False)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph([a], "g", [value("x", 1, None)], [value("y", 1, None)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.verifies(
    "deployment.graph.operators",
    "deployment.graph.nodes",
    "deployment.graph.tensors",
    kind="invariant",
    against="what was put into the graph",
    on="Gemm with and without bias and transposition, a branch",
)
def test_a_gemm_becomes_a_matmul_and_an_add(turned, bias):
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((5, 3) if turned else (3, 5), dtype=np.float32), rng.standard_normal(5, dtype=np.float32)
    gemm = helper.make_node("Gemm", ["x", "w", "b"] if bias else ["x", "w"], ["y"], transB=turned)
    model = product(gemm, [w, b] if bias else [w])
    changed = gemm_to_matmul(model)
    assert operators(model) == {"Gemm": 1}
    assert operators(changed) == ({"Add": 1, "MatMul": 1} if bias else {"MatMul": 1})
    assert [node.output[0] for node in nodes(changed.graph)][-1] == "y"
    assert [list(tensor.dims) for tensor in tensors(changed) if tensor.name != "b"] == [[3, 5]]
    x = rng.standard_normal((4, 3), dtype=np.float32)
    want = x @ (w.T if turned else w) + (b if bias else 0)
    np.testing.assert_allclose(ReferenceEvaluator(changed).run(None, {"x": x})[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_gemm_that_does_more_stays(options):
    model = product(helper.make_node("Gemm", ["x", "w"], ["y"], **options), [np.ones((3, 3), np.float32)])
    assert operators(gemm_to_matmul(model)) == {"Gemm": 1}


def test_a_gemm_of_two_inputs_stays():
    model = product(helper.make_node("Gemm", ["x", "x"], ["y"]), [])
    assert operators(gemm_to_matmul(model)) == {"Gemm": 1}


def test_an_untied_head_is_a_stored_weight_and_the_embedding_stays():
    tied = GPT(GPTConfig(layers=1, heads=2, width=64, context=64), generator=generator())
    example = torch.zeros(2, 8, dtype=torch.int64)
    model = translate(trace(tied, example, LENGTH), LENGTH)
    head = model.graph.node[-1]
    assert head.op_type == "MatMul"
    assert head.input[1] not in {weight.name for weight in model.graph.initializer}
    changed = untie_head(model)
    weights = {weight.name: list(weight.dims) for weight in changed.graph.initializer}
    assert weights[changed.graph.node[-1].input[1]] == [64, 256]
    assert [256, 64] in weights.values()
    grown = sum(map(len, (t.raw_data for t in tensors(changed)))) - sum(map(len, (t.raw_data for t in tensors(model))))
    assert grown == 4 * 64 * 256


def test_what_nothing_uses_any_more_is_dropped():
    transpose = helper.make_node("Transpose", ["w"], ["y"], perm=[1, 0])
    changed = untie_head(product(transpose, [np.arange(6, dtype=np.float32).reshape(2, 3)]))
    assert [tensor.name for tensor in tensors(changed)] == ["w_10"]
    (y,) = ReferenceEvaluator(changed).run(None, {"x": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(y, np.arange(6, dtype=np.float32).reshape(2, 3).T)


def test_tensors_and_nodes_are_found_wherever_they_hide(exported):
    model = damaged(read(exported("mlp float32")[1]), loop_with_weight)
    assert [node.op_type for node in nodes(model.graph)].count("Identity") == 2
    assert [tensor.name for tensor in tensors(model)].count("w") == 2
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(2), "inside"))
    model.graph.node.append(constant)
    assert "inside" in {tensor.name for tensor in tensors(model)}
