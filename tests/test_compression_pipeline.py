"""The pipeline: what is measured is decoded from bytes, the file is repeatable, and the stored one keeps its word."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import pytest
import torch

from bigmodel_course.compression import pipeline
from bigmodel_course.compression.container import CodedLayer, save_compressed
from bigmodel_course.compression.pipeline import QUICK, compress, decompress, rate_masks
from bigmodel_course.compression.sharing import Codebook
from bigmodel_course.compression.teaching import Lessons, lessons, train_teacher
from bigmodel_course.data import Dataset, digits, mnist, split
from bigmodel_course.metrics import accuracy

ROOT = Path(__file__).parent.parent
STORED, FILE = ROOT / "models" / "lenet-300-100.json", ROOT / "models" / "lenet-300-100.bmc"
MNIST = ROOT / "data" / "mnist"
RECIPE = replace(QUICK, coder="huffman")
HASTY = replace(RECIPE, epochs=(1, 4, 1, 3))


@pytest.fixture(scope="module")
def parts():
    train, test = split(digits(), (0.8, 0.2), seed=0)
    return Dataset(train.x.view(-1, 8, 8), train.y), test


@pytest.fixture(scope="module")
def teacher(parts):
    return train_teacher(parts[0], epochs=40, channels=(16, 32))


@torch.no_grad()
def right(model, data):
    return accuracy(model(data.x).argmax(1), data.y)


@pytest.mark.verifies(
    "compression.pipeline.compress",
    "compression.pipeline.decompress",
    "compression.teaching.train_teacher",
    "compression.pipeline.QUICK",
    "compression.pipeline.Recipe",
    kind="invariant",
    against="bytes by kind sum up to the file; teacher and decoded student know the test digits",
    on="scikit-learn's digits, 600 of 9,472 weights kept, 8 shared values",
)
def test_digits_are_distilled_pruned_shared_and_coded_in_one_call(parts, teacher, tmp_path):
    train, test = parts
    assert right(teacher, test) > 0.96
    sizes = compress(lessons(train, copies=4, teacher=teacher), RECIPE, path=tmp_path / "m", seed=0)
    assert sum(sizes.values()) == (tmp_path / "m").stat().st_size < 4 * 9_610 / 50
    student = decompress(tmp_path / "m")
    assert right(student, test) > 0.9
    weights = [p for p in student.parameters() if p.ndim == 2]
    assert sum((w != 0).sum().item() for w in weights) <= RECIPE.keep
    assert all(len(w.unique()) <= RECIPE.values + 1 for w in weights)


@pytest.mark.verifies(
    "compression.pipeline.compress",
    kind="invariant",
    against="a second run with the same seed",
    on="the bytes of the file; without a teacher, by rate and by magnitude",
)
@pytest.mark.parametrize("by_rate", [True, False])
def test_the_same_seed_gives_the_same_bytes(parts, tmp_path, by_rate):
    material = lessons(parts[0])
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        compress(material, replace(HASTY, by_rate=by_rate), path=tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.verifies(
    "compression.teaching.lessons",
    "compression.teaching.Lessons",
    kind="invariant",
    against="the first copy is the data; scores are the teacher's on the very bytes that the student sees",
    on="digits, 3 copies",
    bound=1e-4,
)
def test_lessons_hold_what_the_teacher_says_of_each_image(parts, teacher, seen):
    train = parts[0]
    material = lessons(train, copies=3, teacher=teacher)
    assert material.x.shape == (3, len(train), 64)
    assert torch.equal(material.x[0].view(-1, 8, 8), (train.x * 255).round().to(torch.uint8))
    assert (material.x[1] != material.x[0]).any()
    with torch.no_grad():
        seen((teacher(material.x[2].float() / 255) - material.scores[2]).abs().max())


@pytest.mark.verifies(
    "compression.pipeline.rate_masks",
    kind="invariant",
    against="exactly `keep` weights stay; of equal effects those in full rows and columns",
    on="matrices small enough to read",
)
def test_pruning_by_rate_fills_rows_and_columns():
    effect, full = torch.full((4, 6), 0.1), torch.ones(4, 6, dtype=torch.bool)
    effect[0, :4], effect[2, 5] = 1.0, 1.0
    present = effect == 1.0
    kept = rate_masks({"w": effect}, {"w": present}, 4)["w"]
    assert kept.sum() == 4
    assert kept[0, :4].all(), "the lone weight is the dearest"
    effect[2, 5] = 3.0
    assert rate_masks({"w": effect}, {"w": present}, 4)["w"][2, 5], "unless it does much more"
    assert torch.equal(rate_masks({"w": effect}, {"w": full}, 5)["w"], present), "where costs are equal, effect decides"


def test_taking_out_dead_neurons_and_pixels_leaves_the_function(parts):
    student = pipeline._Student(lessons(parts[0]), replace(RECIPE, widths=(64, 30, 20, 10)), seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.model.parameters():
            p *= torch.rand(p.shape, generator=rng) < (0.04 if p.ndim == 2 else 1.0)
    x = parts[0].x.flatten(1)
    before = student.model(x)
    student.compact()
    torch.testing.assert_close(student.model(x[:, student.pixels]), before, atol=1e-5, rtol=1e-5)
    assert all(a < b for a, b in zip(student.model.widths[:3], (64, 30, 20), strict=True))


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


@pytest.mark.verifies(
    "compression.pipeline.DEEP_COMPRESSION",
    "compression.pipeline.SMALL",
    kind="invariant",
    against="models/lenet-300-100.json: made by the recipes as they are now, three seeds each, the marks reached",
    on="LeNet-300-100 on MNIST, stored results",
)
def test_the_stored_results_are_of_these_recipes_and_reach_their_marks(stored):
    marks = {"same_techniques": (43, 0.9825), "huffman": (120, 0.9836), "best": (200, 0.9836)}
    for label, (ratio, asked) in marks.items():
        runs = [run for run in stored["runs"] if run["label"] == f"deep_compression_{label}"]
        recipe = pipeline.DEEP_COMPRESSION if label == "same_techniques" else pipeline.SMALL
        assert [run["seed"] for run in runs] == [0, 1, 2]
        assert all(run["recipe"] == json.loads(json.dumps(asdict(recipe))) for run in runs)
        assert median(stored["dense_bytes"] / run["bytes"] for run in runs) >= ratio
        assert median(run["test"] for run in runs) >= asked


def test_the_stored_file_is_the_one_in_the_results(stored):
    assert FILE.stat().st_size == stored["runs"][stored["file"]]["bytes"]
    assert decompress(FILE).widths == tuple(stored["runs"][stored["file"]]["widths"])


@pytest.mark.skipif(not MNIST.exists(), reason="needs MNIST: run `make mnist`")
@pytest.mark.verifies(
    "compression.pipeline.decompress",
    kind="invariant",
    against="the accuracy in models/lenet-300-100.json",
    on="the stored file, decoded, on MNIST's 10,000 test images; other processors add in another order",
    bound=0.0002,
)
def test_the_stored_file_classifies_as_well_as_the_results_say(stored, seen):
    _, test = mnist(MNIST)
    seen(abs(right(decompress(FILE), test) - stored["runs"][stored["file"]]["test"]))


def test_a_file_of_another_model_is_refused(tmp_path):
    layer = CodedLayer(Codebook(torch.ones(1), torch.ones(4, 3, 3, 3, dtype=torch.uint8)), torch.zeros(4))
    save_compressed(tmp_path / "conv", {"side": 8}, [layer])
    with pytest.raises(ValueError, match=r"must hold an MLP with biases, got layers of shapes \[\(4, 3, 3, 3\)\]"):
        decompress(tmp_path / "conv")


WRONG = [
    (lambda d: lessons(d, copies=0), r"need copies >= 1 of images \[N, side, side\], got copies=0"),
    (lambda d: lessons(Dataset(d.x.flatten(1), d.y)), r"images \[N, side, side\], got copies=1 and \[\d+, 64\]"),
    (
        lambda d: compress(lessons(d), pipeline.SMALL, path="never"),
        r"uint8 \[copies, N, 784\], as the recipe is, got torch.uint8 \[1, \d+, 64\]",
    ),
    (lambda d: compress(Lessons(torch.zeros(1, 9, 64), d.y[:9]), RECIPE, path="never"), "got torch.float32"),
    (lambda d: compress(lessons(d[:9]), RECIPE, path="never"), "at least 64 examples, a batch, got 9"),
    (
        lambda d: rate_masks({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)}, 5),
        "keep must be from 1 to the 4 weights, got 5",
    ),
]


@pytest.mark.verifies(
    "compression.teaching.lessons",
    "compression.pipeline.compress",
    "compression.pipeline.rate_masks",
    kind="message",
    against="ValueError that names the argument and what came",
    on="6 wrong calls",
)
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named(parts, call, message):
    with pytest.raises(ValueError, match=message):
        call(parts[0])
