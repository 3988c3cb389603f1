"""Real text without a download: whole, memory-mapped, the same for all ranks, with a counted baseline."""

import itertools
import math
from collections import Counter

import pytest
import torch

from bigmodel_course import corpus


@pytest.fixture(scope="module")
def text() -> str:
    return corpus.docstrings()


@pytest.mark.verifies(
    "corpus.docstrings", kind="invariant", against="inspect.getdoc of known functions", on="their presence, once; size"
)
def test_the_text_holds_the_docstrings_of_the_standard_library(text):
    import json
    import textwrap

    for function in (json.dumps, textwrap.wrap):
        first = function.__doc__.strip().splitlines()[0]
        assert text.count(first) >= 1
    assert 1_000_000 < len(text.encode()) < 4_000_000
    assert text == corpus.docstrings()
    assert text != corpus.docstrings(seed=1)


@pytest.mark.verifies(
    "corpus.write_tokens",
    "corpus.read_tokens",
    kind="invariant",
    against="the bytes written",
    on="1,000 bytes of every kind",
)
def test_tokens_are_the_bytes_of_the_text(tmp_path):
    words = "".join(map(chr, range(32, 1032)))
    tokens = corpus.read_tokens(corpus.write_tokens(tmp_path / "deep" / "text.bin", words))
    assert bytes(tokens.tolist()).decode() == words
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["text.bin"]


@pytest.mark.verifies(
    "corpus.read_tokens", kind="message", against="an error's words", on="a missing and an empty file"
)
@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_bytes(b"")])
def test_a_missing_or_empty_text_is_refused(tmp_path, make):
    make(tmp_path / "text.bin")
    with pytest.raises(ValueError, match=r"path must be a file of tokens .*text.bin, which is missing or empty"):
        corpus.read_tokens(tmp_path / "text.bin")


@pytest.mark.verifies(
    "corpus.windows",
    "corpus.split_tokens",
    kind="invariant",
    against="the text they are cut from",
    on="inputs, targets one further, the same for the same seed and step, others for another step",
)
def test_a_window_and_its_targets_are_neighbours_in_the_text():
    tokens = torch.arange(200, dtype=torch.uint8)
    train, held_out = corpus.split_tokens(tokens, 0.1)
    assert (len(train), len(held_out)) == (180, 20)
    x, y = corpus.windows(train, 8, 16, seed=3, step=5)
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)
    assert int(y.max()) < 180
    again, _ = corpus.windows(train, 8, 16, seed=3, step=5)
    other, _ = corpus.windows(train, 8, 16, seed=3, step=6)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


@pytest.mark.verifies("corpus.windows", kind="message", against="an error's words", on="windows longer than the text")
def test_too_long_windows_are_refused():
    with pytest.raises(ValueError, match="need 1 <= length < 10, the number of tokens, got length=10"):
        corpus.windows(torch.zeros(10, dtype=torch.uint8), 1, 10, seed=0, step=0)
    with pytest.raises(ValueError, match="held_out must be a share between 0 and 1, got 1"):
        corpus.split_tokens(torch.zeros(10), 1)


@pytest.mark.verifies(
    "corpus.bigram_loss",
    kind="parity",
    against="pairs counted one by one with collections.Counter",
    on="20,000 bytes of the docstrings, relative",
    bound=1e-12,
)
def test_the_baseline_is_the_entropy_of_counted_pairs(text, seen):
    data = text.encode()[:20_000]
    train, test = data[:18_000], data[18_000:]
    pairs, firsts = Counter(itertools.pairwise(train)), Counter(train[:-1])
    logs = [math.log((pairs[a, b] + 0.01) / (firsts[a] + 256 * 0.01)) for a, b in itertools.pairwise(test)]
    ours = corpus.bigram_loss(torch.tensor(list(train)), torch.tensor(list(test)))
    seen(abs(ours / (-sum(logs) / len(logs)) - 1))
    whole = torch.tensor(list(test))
    rows = torch.stack([whole[:1001], whole[999:]])  # the pairs 0 to 999, and 999 to 1998
    expected = -(sum(logs[:1000]) + sum(logs[999:])) / 2000
    seen(abs(corpus.bigram_loss(torch.tensor(list(train)), rows) / expected - 1))
