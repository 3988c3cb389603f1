"""The file of a compressed model: exactly what was stored comes back, and anything else is refused."""

import hashlib
import itertools
import os
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_course.compression.bits import BitWriter
from bigmodel_course.compression.container import load_compressed, save_compressed
from bigmodel_course.compression.sharing import Codebook, CodedLayer, share

CODERS = ("fixed", "huffman", "arithmetic")
SPEC = {"widths": [64, 12, 5]}


def layers(widths=(64, 12, 5), *, kept=0.1, values=4, bias=True, seed=0):
    dice, found = torch.Generator().manual_seed(seed), []
    for inputs, outputs in itertools.pairwise(widths):
        weight = torch.randn(outputs, inputs, generator=dice)
        mask = torch.rand(outputs, inputs, generator=dice) < kept
        book = share(weight, values, mask=mask)
        found.append(CodedLayer(book, torch.randn(outputs, generator=dice) if bias else None))
    return found


def file_of(content):
    return b"BMC" + content + hashlib.sha256(b"BMC" + content).digest()[:8]


@pytest.mark.verifies(
    "compression.container.save_compressed",
    "compression.container.load_compressed",
    kind="invariant",
    against="the codes, values and biases stored; with 32 bits exactly",
    on="three coders, any density, with and without biases",
    bound=0.0,
)
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("kept", "bias"), [(0, True), (0.05, False), (0.3, True), (1, True)])
def test_a_model_comes_back_exactly(coder, kept, bias, tmp_path, seen):
    stored = layers(kept=kept, bias=bias)
    parts = save_compressed(tmp_path / "a", SPEC, stored, coder=coder, value_bits=32, bias_bits=32)
    assert sum(parts.values()) == (tmp_path / "a").stat().st_size
    assert 0 <= parts["padding"] < 5
    spec, found = load_compressed(tmp_path / "a")
    assert spec == SPEC
    for a, b in zip(stored, found, strict=True):
        assert torch.equal(a.weight.codes, b.weight.codes)
        seen((a.weight.decode() - b.weight.decode()).abs().max())
        assert (a.bias is None) == (b.bias is None)
        seen((a.bias - b.bias).abs().max() if bias else 0)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8, 16])
def test_rounding_is_the_same_for_every_coder(coder, bits, tmp_path):
    stored = layers()
    for name, each in (("a", coder), ("b", "fixed")):
        save_compressed(tmp_path / name, SPEC, stored, coder=each, value_bits=bits, bias_bits=bits)
    for a, b, c in zip(*(load_compressed(tmp_path / n)[1] for n in "ab"), stored, strict=True):
        assert torch.equal(a.weight.decode(), b.weight.decode())
        assert torch.equal(a.bias, b.bias)
        step = c.bias.abs().max() / (2 ** (bits - 1) - 1) if bits < 16 else c.bias.abs().max() / 1024
        assert (a.bias - c.bias).abs().max() <= step * 0.51


@pytest.mark.parametrize("coder", CODERS)
def test_a_value_that_rounds_to_zero_changes_no_code(coder, tmp_path):
    values = torch.tensor([-1.0, -1e-4, 1e-9, 1.0])  # the second is not negative any more
    codes = torch.randint(0, 5, (20, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_compressed(tmp_path / "a", {}, [CodedLayer(Codebook(values, codes))], coder=coder, value_bits=8)
    assert torch.equal(load_compressed(tmp_path / "a")[1][0].weight.codes, codes)


@pytest.mark.verifies(
    "compression.container.save_compressed",
    "compression.container.load_compressed",
    kind="invariant",
    against="the spec and shapes stored",
    on="specs with and without widths, convolutions, empty layers",
)
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ({}, [(3, 4), (2, 3)]),
        ({"widths": [4, 3, 2], "name": "Ä"}, [(3, 4), (2, 3)]),
        ({"widths": [9, 9]}, [(3, 4)]),
        ({"kind": "cnn", "channels": [16, [1, None, 0.5]]}, [(2, 1, 3, 3), (5, 8)]),
        ({}, [(0, 5), (5, 0), (7,)]),
    ],
)
def test_any_spec_and_shapes_come_back(coder, spec, shapes, tmp_path):
    dice = torch.Generator().manual_seed(0)
    stored = [CodedLayer(share(torch.randn(shape, generator=dice), 3), torch.zeros(shape[0])) for shape in shapes]
    save_compressed(tmp_path / "a", spec, stored, coder=coder, value_bits=32, bias_bits=8)
    found_spec, found = load_compressed(tmp_path / "a")
    assert found_spec == spec
    for a, b in zip(stored, found, strict=True):
        assert a.weight.codes.shape == b.weight.codes.shape
        assert torch.equal(a.weight.decode(), b.weight.decode())


@pytest.mark.verifies(
    "compression.container.load_compressed",
    kind="recovery",
    against="ValueError; never a model",
    on="a file cut at every length, with every byte flipped in three ways, and with a byte added",
)
@pytest.mark.parametrize("coder", CODERS)
def test_a_damaged_file_is_never_a_model(coder, tmp_path):
    path = tmp_path / "a"
    save_compressed(path, SPEC, layers(), coder=coder, bias_bits=8)
    whole = path.read_bytes()
    wrong = [whole[:n] for n in range(len(whole))] + [whole + b"\0"]
    for i, flip in itertools.product(range(len(whole)), (1, 128, 255)):
        wrong.append(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged|is not a compressed model"):
            load_compressed(path)


def hostile():
    """Headers with a right checksum that ask for too much."""
    for coder in range(4):
        for numbers in (
            (1, 1, 1, 2**32 - 1, 2**32 - 1),  # 2^64 weights
            (1, 1, 1, 0, 2**32 - 1),  # no weights, and 2^32 biases
            (2**32 - 1, 1, 1),
            (1, 1, 1, 4000, 4000, 2**32 - 1),  # a spec of 4 gigabytes
            (1, 1, 1, 1024, 1024, 0, 2**32 - 1),  # so many values
            (1, 0, 0, 9),
            (0, 1, 1),
        ):
            writer = BitWriter()
            for value, width in ((1, 8), (coder, 2), (5, 3), (4, 3)):
                writer.write(value, width)
            count, *flags = numbers[:3]
            writer.write_number(count)
            for flag in flags:
                writer.write(flag, 1)
            for number in numbers[3:]:
                writer.write_number(number)
            yield file_of(writer.getvalue())


@pytest.mark.verifies(
    "compression.container.load_compressed",
    kind="recovery",
    against="ValueError in under a second and 20 MB",
    on="headers that ask for 2^64 weights, 2^32 biases, layers, values or bytes of spec, with a right checksum",
)
def test_a_hostile_header_takes_no_memory(tmp_path):
    tracemalloc.start()
    start = time.process_time()
    for data in hostile():
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match="cannot be a compressed model"):
            load_compressed(tmp_path / "a")
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 255), st.binary(max_size=80))
def test_any_content_with_a_right_checksum_is_refused_or_a_model(tmp_path_factory, form, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(file_of(bytes([1, form]) + content))
    try:
        _, found = load_compressed(path)
    except ValueError:
        return
    assert all(layer.weight.decode().isfinite().all() for layer in found)


@pytest.mark.verifies(
    "compression.container.save_compressed",
    kind="message",
    against="TypeError or ValueError",
    on="coder, bits, layers, biases, spec",
)
def test_wrong_input_is_named(tmp_path):
    good, path = layers(), tmp_path / "a"
    with pytest.raises(ValueError, match="coder must be one of"):
        save_compressed(path, SPEC, good, coder="zip")
    with pytest.raises(ValueError, match="must be among"):
        save_compressed(path, SPEC, good, bias_bits=3)
    with pytest.raises(ValueError, match="layers must be 1 to 255, got 0"):
        save_compressed(path, SPEC, [])
    with pytest.raises(ValueError, match="all have a bias, or none"):
        save_compressed(path, SPEC, [good[0], CodedLayer(good[1].weight)])
    for bias in (torch.zeros(3), torch.full((12,), torch.nan)):
        with pytest.raises(ValueError, match=r"layers\[0\].bias must be finite, \[12\]"):
            save_compressed(path, SPEC, [CodedLayer(good[0].weight, bias)])
    with pytest.raises(ValueError, match="16-bit float"):
        save_compressed(path, SPEC, [CodedLayer(good[0].weight, torch.full((12,), 1e6))])
    for spec in ({"a": (1, 2)}, {"a": "x" * 20_000}, {1: 2}, {"a": {1}}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError), match="spec"):
            save_compressed(path, spec, good)
    book = Codebook(torch.ones(1), torch.zeros(1, dtype=torch.uint8).expand(2**13, 2**12))
    with pytest.raises(ValueError, match="weights, the limit is"):
        save_compressed(path, {}, [CodedLayer(book)])
    assert not path.exists()


@pytest.mark.verifies(
    "compression.container.save_compressed",
    kind="recovery",
    against="the old file, whole, and no leftovers",
    on="a folder that cannot take the new file",
)
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_compressed(tmp_path / "a", SPEC, layers())
    old = (tmp_path / "a").read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_compressed(tmp_path / "a", SPEC, layers(seed=1))
    assert (tmp_path / "a").read_bytes() == old
    assert os.listdir(tmp_path) == ["a"]
