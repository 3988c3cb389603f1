"""Text for transfer: labelled sentences from packages, tokenizers held to their hash, and encoders to start from.

    start = encoder_start()                                 # pretrained where its package is, else trained here
    tokens = encode(start.tokenizer, sentences)             # [N, T], padded

Sentences are read as files of installed packages, through `ast` or as XML: none of them is imported.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from bigmodel_course.corpus import documented
from bigmodel_course.costs import EncoderConfig
from bigmodel_course.data import Dataset, batches
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.schedules import warmup_cosine
from bigmodel_course.transfer import weights
from bigmodel_course.transfer.encoder import MINILM, PAD, Encoder

__all__ = ["Start", "docstrings", "encode", "encoder_start", "glosses", "load_tokenizer", "train_start"]

GLOSSES = (
    "textblob",
    "textblob/en/en-sentiment.xml",
    "0ca603db55570bab9b2865716a3696ede01e3da02b570c47628a9dbcc3b37d1e",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALL = {"layers": 2, "heads": 4, "width": 64, "hidden": 256, "context": 64}  # the shape that is trained here


class Start(NamedTuple):
    """What a lesson starts from; `pretrained` says whether the weights came from a package."""

    encoder: Encoder
    tokenizer: Tokenizer
    pretrained: bool
    name: str


def encoder_start(*, seed: int = 0) -> Start:
    """all-MiniLM-L6-v2 where its package is installed, else a small encoder that is trained here in seconds.

    ValueError when the package is there and one of its files is not the published one: nothing is loaded then.
    """
    if weights.find("all-MiniLM-L6-v2") is None:
        return train_start(seed=seed)
    entry = weights.PRETRAINED["all-MiniLM-L6-v2 tokenizer"]
    path = weights.find("all-MiniLM-L6-v2 tokenizer")
    tokenizer = load_tokenizer(path, vocabulary=MINILM.vocabulary, sha256=entry.sha256)
    state = weights.read("all-MiniLM-L6-v2")
    # The pooler serves a task of BERT's own training; position_ids are 0, 1, 2, ...
    state = {name: t for name, t in state.items() if not name.startswith(("pooler.", "embeddings.position_ids"))}
    encoder = Encoder(MINILM, generator=torch.Generator().manual_seed(seed))
    weights.load_into_(encoder, state)
    return Start(encoder, tokenizer, True, "all-MiniLM-L6-v2")


def load_tokenizer(path: str | Path, *, vocabulary: int, sha256: str | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, which must have `vocabulary` tokens, as the encoder it is for.

    FileNotFoundError, or ValueError for another file than the one with `sha256`, a file that is no tokenizer, or one
    that numbers its tokens for another encoder: with it, every sentence would be nonsense and nothing would fail.
    """
    content = Path(path).read_bytes()
    if sha256 is not None and (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} must have SHA-256 {sha256}, got {got}: it is another tokenizer, and was not loaded")
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} holds no tokenizer: {error}") from error
    if tokenizer.get_vocab_size() != vocabulary:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"{path} numbers {size:,} tokens, and the encoder knows {vocabulary:,}: they are not a pair")
    if tokenizer.token_to_id("[PAD]") != PAD:
        raise ValueError(f"{path} must give [PAD] the number {PAD}, got {tokenizer.token_to_id('[PAD]')}")
    return tokenizer


def encode(tokenizer: Tokenizer, sentences: Iterable[str], *, longest: int = 32) -> Tensor:
    """Tokens [N, T], int64, T at most `longest`; a longer sentence is cut, a shorter one padded on the right."""
    sentences = list(sentences)
    if not sentences or not all(isinstance(sentence, str) for sentence in sentences):
        raise ValueError(f"sentences must hold at least one string and nothing else, got {sentences[:3]!r}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    rows = [torch.tensor(one.ids) for one in tokenizer.encode_batch(sentences)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def glosses() -> tuple[list[str], Tensor]:
    """1,228 short definitions of English words and whether they are good (1) or bad (0), labelled by hand.

    From TextBlob's sentiment lexicon (De Smedt and Daelemans, public domain): senses of polarity 0.3 or stronger, each
    gloss once, and none that is marked both ways.  In the order of the file.
    """
    marks: dict[str, set[int]] = {}
    for gloss, polarity in _lexicon():
        if abs(polarity) >= 0.3:
            marks.setdefault(gloss, set()).add(int(polarity > 0))
    clear = {gloss: next(iter(labels)) for gloss, labels in marks.items() if len(labels) == 1}
    return list(clear), torch.tensor(list(clear.values()))


def docstrings(libraries: Sequence[str], each: int) -> tuple[list[str], Tensor]:
    """First sentences of docstrings, `each` from every library, and the position of their library.

    Which sentences differs a little between versions of a library.  Files are read, nothing is imported.
    """
    sentences, labels = [], []
    for label, library in enumerate(libraries):
        found = _first_sentences(_folder(library), each)
        if len(found) < each:
            raise ValueError(f"{library} has only {len(found)} docstrings with a first sentence, asked for {each}")
        sentences += found
        labels += [label] * each
    return sentences, torch.tensor(labels)


def train_start(*, seed: int = 0, steps: int = 400) -> Start:
    """A small encoder of the same code that learns to fill in left-out words (Devlin et al. 2018, section 3.1).

    It reads all glosses, without their labels, and sentences of the standard library; about ten CPU seconds.
    """
    sentences = sorted({gloss for gloss, _ in _lexicon()}) + _first_sentences(_folder(""), 1500)
    tokenizer = _word_tokenizer(sentences)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(EncoderConfig(**SMALL, vocabulary=tokenizer.get_vocab_size()), generator=generator)
    _fill_in(encoder, encode(tokenizer, sentences, longest=24), steps, generator)
    return Start(encoder.eval(), tokenizer, False, "trained here")


def _fill_in(encoder: Encoder, tokens: Tensor, steps: int, generator: torch.Generator) -> None:
    """Leave out 15 % of the words and predict them from the rest; the scores share the table of the words."""
    optimizer = Optimizer(encoder.parameters(), AdamW(), lr=warmup_cosine(3e-3, max(1, steps // 10), steps))
    data, size = Dataset(tokens, tokens), 64
    epochs = -(-steps * size // len(data)) + 1
    order = (batch.x for epoch in range(epochs) for batch in batches(data, size, seed=0, epoch=epoch, drop_last=True))
    for _, x in zip(range(steps), order, strict=False):
        hidden = (torch.rand(x.shape, generator=generator) < 0.15) & (x >= len(SPECIAL))
        x = encoder.trimmed(x)
        hidden = hidden[:, : x.shape[1]]
        if hidden.any():
            vectors = encoder(x.masked_fill(hidden, SPECIAL.index("[MASK]")))[hidden]
            optimizer.zero_grad()
            cross_entropy(linear(vectors, encoder.embeddings["word_embeddings"].weight), x[hidden]).backward()
            optimizer.step()


def _word_tokenizer(sentences: Iterable[str]) -> Tokenizer:
    """One token for each word that occurs twice; the rest is [UNK]."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for text in sentences for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    words = [word for word, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if count > 1]
    known = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens([name for name in SPECIAL if name != "[UNK]"])  # what decoding leaves out
    ends = [(name, known[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def _lexicon() -> list[tuple[str, float]]:
    """Every gloss of the lexicon with its polarity, from -1 to 1."""
    package, file, sha256 = GLOSSES
    path = Path(str(metadata.distribution(package).locate_file(file)))
    content = path.read_bytes()
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} must have SHA-256 {sha256}, got {got}: another version of {package}?")
    words = (word.attrib for word in ElementTree.fromstring(content))
    return [(word["sense"], float(word["polarity"])) for word in words if word.get("sense")]


def _folder(library: str) -> Path:
    """Where a library's files are, without importing it; the standard library's for ""."""
    if not library:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library) if library.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"libraries must be installed packages, got {library!r}")
    return Path(next(iter(spec.submodule_search_locations)))


def _first_sentences(folder: Path, wanted: int) -> list[str]:
    """The first `wanted`, over files in an order that mixes the folders and is the same everywhere."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    names = [name for name in files if not {"tests", "test", "site-packages", "idlelib"} & set(name.split("/"))]
    found: dict[str, None] = {}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        found |= dict.fromkeys(_sentences(files[name]))
        if len(found) >= wanted:
            break
    return list(found)[:wanted]


def _sentences(path: Path) -> Iterable[str]:
    for text in documented(path, (ast.FunctionDef, ast.ClassDef)):
        sentence = " ".join(text.split("\n\n")[0].split())
        if 4 <= len(sentence.split()) <= 30:
            yield sentence
