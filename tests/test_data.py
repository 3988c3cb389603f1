"""Data: nothing lost, nothing leaked, and the same numbers as scikit-learn's."""

import gzip
import hashlib
import itertools
import struct
from collections import Counter

import numpy as np
import pytest
import scipy.ndimage
import sklearn.linear_model
import sklearn.model_selection
import sklearn.preprocessing
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import tensor

from bigmodel_course import data
from bigmodel_course.data import (
    Dataset,
    Standardizer,
    batches,
    clean,
    diabetes,
    digits,
    mnist,
    noise,
    rotate,
    shift,
    split,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, classes=1):
    """Rows that tell which they are."""
    return Dataset(torch.arange(n), torch.arange(n) % classes)


# Loading


@pytest.mark.verifies(
    "data.digits", kind="parity", against="sklearn.datasets.load_digits", on="all pixels and labels", bound=0.0
)
def test_digits_are_scikit_learns_scaled_to_one(seen):
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    ours = digits()
    seen((ours.x.double() * 16 - torch.from_numpy(x)).abs().max())
    seen((ours.y - torch.from_numpy(y)).abs().max())
    assert (ours.x.dtype, ours.y.dtype, len(ours)) == (torch.float32, torch.int64, 1797)


@pytest.mark.verifies(
    "data.diabetes",
    kind="parity",
    against="sklearn.linear_model.LinearRegression, least squares by torch.linalg.lstsq on our data",
    on="test MSE of train_test_split(test_size=0.2, random_state=42), relative difference",
    bound=1e-12,
)
def test_least_squares_on_diabetes_has_scikit_learns_error(seen):
    x, y = sklearn.datasets.load_diabetes(return_X_y=True)
    train, test = sklearn.model_selection.train_test_split(np.arange(len(y)), test_size=0.2, random_state=42)
    theirs = sklearn.linear_model.LinearRegression().fit(x[train], y[train])
    expected = np.mean((theirs.predict(x[test]) - y[test]) ** 2)

    ours = diabetes()
    train, test = ours[torch.from_numpy(train)], ours[torch.from_numpy(test)]
    design = [torch.cat([torch.ones(len(part), 1, dtype=torch.float64), part.x], 1) for part in (train, test)]
    weights = torch.linalg.lstsq(design[0], train.y).solution
    error = (design[1] @ weights - test.y).square().mean().item()
    seen(abs(error / expected - 1))
    assert round(error, 2) == 2900.19  # the number that lesson 11 shows


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Four files of the same form, 3 and 2 images; every second one compressed."""
    rng, hashes = np.random.default_rng(0), {}
    for i, name in enumerate(data.MNIST_SHA256):
        shape = (
            ((3, 28, 28) if "images" in name else (3,))
            if "train" in name
            else ((2, 28, 28) if "images" in name else (2,))
        )
        content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        content += rng.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8).tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()
        (tmp_path / (name + ".gz" * (i % 2))).write_bytes(gzip.compress(content) if i % 2 else content)
    monkeypatch.setattr(data, "MNIST_SHA256", hashes)
    return tmp_path


@pytest.mark.verifies(
    "data.mnist",
    kind="parity",
    against="the bytes as NumPy wrote them",
    on="IDX files, two of them compressed",
    bound=0.0,
)
def test_mnist_reads_its_four_files(small_mnist, seen):
    train, test = mnist(small_mnist)
    rng = np.random.default_rng(0)
    for part, n in ((train, 3), (test, 2)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
        seen((part.x - torch.from_numpy(pixels) / 255).abs().max())
        seen((part.y - torch.from_numpy(labels).long()).abs().max())
        assert part.x.dtype == torch.float32
        assert part.y.dtype == torch.int64


@pytest.mark.verifies(
    "data.mnist", kind="message", against="what is missing or wrong, and make mnist", on="a missing and a changed file"
)
def test_mnist_says_how_to_get_it(small_mnist):
    file = small_mnist / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte must hold SHA-256 .* got .*make mnist"):
        mnist(small_mnist)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-images-idx3-ubyte: run `make mnist`"):
        mnist(small_mnist)


@pytest.mark.verifies(
    "data.Dataset",
    kind="message",
    against="what was expected and what came",
    on="unequal lengths; a bare number as index",
)
def test_a_dataset_has_one_answer_an_example():
    with pytest.raises(ValueError, match=r"equally many rows, got \[3, 2\] and \[2\]"):
        Dataset(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(TypeError, match=r"use \[i : i \+ 1\]"):
        numbered(3)[1]
    assert [numbered(4)[index].x.tolist() for index in (slice(1, 3), [3, 0], tensor([True, False, False, True]))] == [
        [1, 2],
        [3, 0],
        [0, 3],
    ]


# Cleaning

ROWS = st.lists(
    st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan"), float("inf")])] * 3), min_size=1, max_size=12
)


def meaning(rows):
    """Python's own equality of the finite rows, in order, without repeats."""
    return list(dict.fromkeys(tuple(v + 0.0 for v in row) for row in rows if np.isfinite(row).all()))


@pytest.mark.verifies(
    "data.clean",
    "data.Cleaned",
    kind="invariant",
    against="Python's equality of rows; nothing left to clean; input untouched",
    on="random tables of 1 to 12 rows with NaN, infinities, repeats, both zeros",
)
@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_cleaning_keeps_each_finite_row_once_and_counts_the_rest(rows):
    x, y = tensor(rows)[:, :2], tensor(rows)[:, 2]
    before = x.clone(), y.clone()
    kept = meaning(rows)
    if not kept:
        with pytest.raises(ValueError, match="at least one finite row, got none"):
            clean(x, y)
        return
    cleaned, report = clean(x, y)
    varying = [j for j in (0, 1) if len({row[j] for row in kept}) > 1]
    assert cleaned.y.tolist() == [row[2] for row in kept]
    assert cleaned.x.tolist() == [[row[j] for j in varying] for row in kept]
    assert len(report.not_finite) + len(report.duplicates) + len(kept) == len(rows)
    assert set(report.constant) == {0, 1} - set(varying)
    if varying:
        assert clean(cleaned.x, cleaned.y)[1] == data.Cleaned((), (), ())
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(before, (x, y), strict=True))


def test_the_report_names_rows_and_columns_of_the_input():
    x = tensor([[1.0, 7.0], [float("nan"), 7.0], [1.0, 7.0], [2.0, 7.0], [1.0, 7.0]])
    cleaned, report = clean(x, tensor([0, 0, 0, 0, 1]))
    assert report == data.Cleaned(not_finite=(1,), duplicates=(2,), constant=(1,))
    assert str(report) == "removed: 1 rows not finite, 1 duplicate rows, 1 constant columns"
    assert cleaned.y.tolist() == [0, 0, 1], "the same x with another y is no duplicate"


# Splitting


@pytest.mark.verifies(
    "data.split",
    kind="parity",
    against="sklearn.model_selection.train_test_split(stratify=y), counts of each class",
    on="digits, 50/50 to 90/10; the largest difference in examples (both round)",
    bound=1.0,
)
@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.5])
def test_class_counts_are_those_of_scikit_learn(share, seen):
    whole = digits()
    test = split(whole, (1 - share, share), seed=0)[1]
    _, theirs = sklearn.model_selection.train_test_split(whole.y, test_size=share, stratify=whole.y, random_state=0)
    seen((test.y.bincount() - theirs.bincount()).abs().max())
    assert abs(len(test) - len(theirs)) <= 1


@pytest.mark.verifies(
    "data.split",
    kind="invariant",
    against="every row in one part; each class within one example of its share",
    on="random labels of 40 to 90 rows, 2 to 4 parts; difference from the exact share in examples",
    bound=1.0,
)
@pytest.mark.parametrize("seed", range(20))
def test_parts_cover_all_rows_once_with_the_classes_shared_out(seed, seen):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(40, 90))
    whole = Dataset(torch.arange(n), torch.from_numpy(rng.choice(4, n, p=[0.6, 0.3, 0.08, 0.02])))
    for fractions in [(0.5, 0.5), (0.8, 0.2), (0.6, 0.2, 0.2), (0.7, 0.1, 0.1, 0.1), (1 / 3, 2 / 3)]:
        parts = split(whole, fractions, seed=seed)
        assert sorted(torch.cat([part.x for part in parts]).tolist()) == list(range(n))
        for part, fraction in zip(parts, fractions, strict=True):
            for label, count in Counter(whole.y.tolist()).items():
                seen(abs((part.y == label).sum().item() - fraction * count))
        if len(fractions) == 2:
            assert abs(len(parts[0]) - fractions[0] * n) < 1


@pytest.mark.verifies(
    "data.split",
    kind="invariant",
    against="no row and no group in two parts",
    on="random tables full of duplicates, with and without groups",
)
@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 1)), min_size=20, max_size=60),
    st.booleans(),
)
def test_neither_duplicates_nor_groups_leak(rows, grouped):
    x, group, y = tensor(rows).T
    kin = {} if not grouped else {"groups": group}
    whole = Dataset(torch.stack([x, torch.zeros_like(x)], 1), y)
    try:
        parts = split(whole, (0.6, 0.4), seed=1, **kin)
    except ValueError:
        reject()  # a chain of groups joins everything
    first, second = (set(part.x[:, 0].tolist()) for part in parts)
    assert not first & second
    if grouped:
        groups = [{g for v, g, _ in rows if v in values} for values in (first, second)]
        assert not groups[0] & groups[1]


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    whole = digits()
    same = [split(whole, (0.8, 0.2), seed=seed)[1].x for seed in (0, 0, generator(0))]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert not torch.equal(same[0], split(whole, (0.8, 0.2), seed=1)[1].x[: len(same[0])])


@pytest.mark.verifies(
    "data.split", kind="message", against="what was expected and what came", on="fractions and groups"
)
@pytest.mark.parametrize(
    ("fractions", "options", "text"),
    [
        ((0.8, 0.3), {}, r"sum to 1, got \(0.8, 0.3\)"),
        ((1.0,), {}, "two or more"),
        ((1.2, -0.2), {}, "above 0"),
        ((0.99, 0.01), {}, r"no part empty, got \(0.99, 0.01\) of 10 rows: \[10, 0\]"),
        ((0.5, 0.5), {"groups": torch.zeros(3)}, r"groups must have shape \[10\].* got \[3\]"),
    ],
)
def test_wrong_fractions_are_named(fractions, options, text):
    with pytest.raises(ValueError, match=text):
        split(numbered(10), fractions, seed=0, **options)


# Scaling


@pytest.mark.verifies(
    "data.Standardizer",
    kind="parity",
    against="sklearn.preprocessing.StandardScaler",
    on="digits (float32 pixels as float64, with constant columns), fitted on a part, applied to the rest",
    bound=1e-12,
)
def test_standardizer_equals_scikit_learn(seen):
    train, test = split(digits(), (0.8, 0.2), seed=0)
    ours = Standardizer.fit(train.x.double()).apply(test.x.double())
    theirs = sklearn.preprocessing.StandardScaler().fit(train.x.double().numpy()).transform(test.x.double().numpy())
    seen((ours - torch.from_numpy(theirs)).abs().max() / np.abs(theirs).max())


@pytest.mark.verifies(
    "data.Standardizer",
    kind="invariant",
    against="what is fitted on the training part does not depend on the test part",
    on="diabetes with its test rows moved by 100",
)
def test_fitting_on_everything_leaks_and_fitting_on_train_does_not():
    whole = diabetes()
    train, test = split(whole, (0.8, 0.2), seed=0)
    moved = test.x + 100
    honest = [Standardizer.fit(train.x).apply(train.x) for _ in (test.x, moved)]
    leaky = [Standardizer.fit(torch.cat([train.x, other])).apply(train.x) for other in (test.x, moved)]
    assert torch.equal(*honest)
    assert (leaky[0] - leaky[1]).abs().max() > 0.1, "the training rows changed although only the test part did"


def test_standardizer_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"rows of shape \[2\], got \[4, 3\]"):
        Standardizer.fit(torch.rand(5, 2)).apply(torch.rand(4, 3))
    with pytest.raises(ValueError, match="floating-point"):
        Standardizer.fit(torch.arange(4))


# Batches


@pytest.mark.verifies(
    "data.batches",
    kind="invariant",
    against="every example once an epoch; the order depends on (seed, epoch) only",
    on="1 to 40 examples, every size, shuffled or not",
)
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**40), st.integers(0, 10**6), st.booleans())
def test_an_epoch_gives_every_example_once(n, size, seed, epoch, shuffle):
    state = torch.get_rng_state()
    first, again = (list(batches(numbered(n), size, seed=seed, epoch=epoch, shuffle=shuffle)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()), "the global random state is left alone"
    order = torch.cat([batch.x for batch in first]).tolist()
    assert sorted(order) == list(range(n))
    assert order == torch.cat([batch.x for batch in again]).tolist()
    assert shuffle or order == list(range(n))
    assert all(len(batch) == size for batch in first[:-1])
    if size <= n:
        whole = list(batches(numbered(n), size, seed=seed, epoch=epoch, shuffle=shuffle, drop_last=True))
        assert [len(batch) for batch in whole] == [size] * (n // size)


def test_epochs_and_seeds_have_different_orders():
    orders = [
        tuple(torch.cat([b.x for b in batches(numbered(30), 8, seed=seed, epoch=epoch)]).tolist())
        for seed, epoch in itertools.product(range(4), range(4))
    ]
    assert len(set(orders)) == 16


@pytest.mark.verifies(
    "data.batches", kind="message", against="what was expected and what came", on="sizes, seeds, no data"
)
@pytest.mark.parametrize(
    ("n", "size", "options", "text"),
    [
        (5, 0, {}, "need size >= 1.*size=0"),
        (5, 2, {"seed": -1}, "seed=-1"),
        (5, 8, {"drop_last": True}, "at least one batch, got 5 examples for size=8"),
        (0, 8, {}, "at least one batch, got 0 examples"),
    ],
)
def test_wrong_sizes_are_named_at_once(n, size, options, text):
    with pytest.raises(ValueError, match=text):
        batches(numbered(n), size, **{"seed": 0, "epoch": 0} | options)


# Augmentation

AUGMENTATIONS = {
    "shift": lambda x, g: shift(x, 2, generator=g),
    "rotate": lambda x, g: rotate(x, 25.0, generator=g),
    "noise": lambda x, g: noise(x, 0.3, generator=g),
}


@pytest.mark.verifies(
    "data.shift",
    "data.rotate",
    "data.noise",
    kind="invariant",
    against="shape, dtype and range kept; input and global random state untouched; the generator alone decides",
    on="digits and random images, float32 and float64, [N, H, W], [N, 1, H, W] and [N, 3, H, W]",
)
@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 1, 8, 5), (4, 3, 7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_augmentation_keeps_what_an_image_is(name, shape, dtype):
    augment, images = AUGMENTATIONS[name], torch.rand(shape, generator=generator(1), dtype=dtype)
    before, state = images.clone(), torch.get_rng_state()
    out, again, other = (augment(images, generator(seed)) for seed in (0, 0, 1))
    assert (out.shape, out.dtype) == (images.shape, dtype)
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    assert torch.equal(images, before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.verifies(
    "data.shift", kind="parity", against="scipy.ndimage.shift(order=0)", on="100 images, up to 3 pixels", bound=0.0
)
def test_shift_moves_by_whole_pixels(seen):
    images = torch.rand(100, 6, 9, generator=generator(1)) + 0.1
    moves = list(itertools.product(range(-3, 4), repeat=2))
    used = set()
    for image, moved in zip(images, shift(images, 3, generator=generator()), strict=True):
        candidates = {move: torch.from_numpy(scipy.ndimage.shift(image.numpy(), move, order=0)) for move in moves}
        best = min(candidates, key=lambda move: (candidates[move] - moved).abs().max())
        seen((candidates[best] - moved).abs().max())
        used.add(best)
    assert len(used) > 30, "moves in all directions occur"
    assert torch.equal(shift(images, 0, generator=generator()), images)


@pytest.mark.verifies(
    "data.rotate",
    kind="parity",
    against="scipy.ndimage.rotate(order=1, mode=grid-constant)",
    on="wide and tall float64 images, angles to 180 degrees",
    bound=1e-12,
)
@pytest.mark.parametrize("size", [(8, 8), (6, 11), (12, 5)])
def test_rotate_turns_about_the_middle(size, seen):
    images = torch.rand(10, *size, generator=generator(1), dtype=torch.float64)
    turned = rotate(images, 180.0, generator=generator())
    angles = (2 * torch.rand(10, generator=generator(), dtype=torch.float64) - 1) * 180
    for image, ours, angle in zip(images, turned, angles.tolist(), strict=True):
        theirs = scipy.ndimage.rotate(image.numpy(), angle, reshape=False, order=1, mode="grid-constant")
        seen((ours - torch.from_numpy(theirs)).abs().max())


@pytest.mark.verifies(
    "data.noise",
    kind="invariant",
    against="mean 0 and the deviation asked for",
    on="a million grey pixels; difference of either from its value",
    bound=5e-4,
)
def test_noise_has_the_deviation_asked_for(seen):
    added = noise(torch.full((100, 100, 100), 0.5, dtype=torch.float64), 0.05, generator=generator()) - 0.5
    seen(abs(added.mean()))
    seen(abs(added.std() - 0.05))


@pytest.mark.verifies(
    "data.shift",
    "data.rotate",
    "data.noise",
    kind="message",
    against="what was expected and what came",
    on="flat images, whole numbers, negative strengths",
)
@pytest.mark.parametrize("function", [shift, rotate, noise])
def test_wrong_images_are_named(function):
    with pytest.raises(ValueError, match=r"images must be floats .* got \[5, 64\]"):
        function(torch.rand(5, 64), 1, generator=generator())
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        function(torch.zeros(5, 8, 8, dtype=torch.uint8), 1, generator=generator())
    with pytest.raises(ValueError, match="=-1"):
        function(torch.rand(5, 8, 8), -1, generator=generator())
