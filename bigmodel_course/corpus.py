"""Real text without a download: the docstrings of Python's own standard library, one token a byte.

The text differs a little from one Python version to the next, so nothing may depend on its exact numbers: compare with
`bigram_loss` of the same text.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bigmodel_course.files import write_whole

__all__ = ["bigram_loss", "docstrings", "read_tokens", "split_tokens", "windows", "write_tokens"]

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "__pycache__"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SHORTEST = 40  # characters: shorter ones say little


def docstrings(seed: int = 0) -> str:
    """Every docstring of the standard library once, shuffled, an empty line between them: about 1.6 million bytes."""
    texts = (text for path in _sources() for text in documented(path) if len(text) >= SHORTEST)
    found = list(dict.fromkeys(texts))
    random.Random(seed).shuffle(found)  # or the held-out end would be one kind of module
    return "\n\n".join(found)


def _sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))


def documented(path: Path, kinds: tuple[type[ast.AST], ...] = DOCUMENTED) -> Iterator[str]:
    """The docstrings in a Python file, which is read and never imported; none where it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or text in another encoding
        return
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def write_tokens(path: str | Path, text: str) -> Path:
    """Write `text` as bytes, one token each, for `read_tokens`; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    return path


def read_tokens(path: str | Path) -> Tensor:
    """The tokens of a file as uint8 [N], mapped into memory: only the pages that are used are ever read."""
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        raise ValueError(
            f"path must be a file of tokens that write_tokens wrote, got {path}, which is missing or empty"
        )
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def split_tokens(tokens: Tensor, held_out: float = 0.05) -> tuple[Tensor, Tensor]:
    """(training tokens, held-out tokens): the last `held_out` share is never trained on."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {held_out!r}")
    cut = int(len(tokens) * (1 - held_out))
    return tokens[:cut], tokens[cut:]


def windows(tokens: Tensor, count: int, length: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Step `step`'s batch: inputs and targets [count, length], int64; a target is the token after its input.

    It depends on seed and step only, so ranks that share a batch agree on it, and a resumed run needs no state.
    """
    if not 1 <= length < len(tokens):
        raise ValueError(f"need 1 <= length < {len(tokens)}, the number of tokens, got {length=}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - length, (count,), generator=generator)
    rows = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def bigram_loss(train: Tensor, test: Tensor, *, smoothing: float = 0.01) -> float:
    """Cross-entropy on `test`, in nats a token, of the best guess from the token before: the baseline to fall below.

    `test` is a text [N], or rows [count, N] of which each begins anew.  Pairs are counted in `train`; `smoothing` is
    added to each count, or one unseen pair would cost infinitely much.
    """
    counts = torch.full((256, 256), smoothing, dtype=torch.float64)
    before, after = train[:-1].long(), train[1:].long()
    counts.index_put_((before, after), torch.ones(len(before), dtype=torch.float64), accumulate=True)
    logs = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -logs[test[..., :-1].long(), test[..., 1:].long()].mean().item()
