"""Lesson 44, tensor parallelism: a packed weight made whole, a silent fault, a chain of matrices that sends little."""

from functools import cache
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.regions import scatter_sequence
from bigmodel_course.distributed.tensor_parallel import parallelize_, whole_tensors
from bigmodel_course.distributed.vocabulary import vocabulary_cross_entropy
from bigmodel_course.models import GPT, GPT_SIZES

__all__ = ["fewest_sent", "packed_whole", "silent_fault", "spoil"]


def _whole(shares: list[Tensor]) -> Tensor:
    return torch.cat([share.unflatten(0, (3, -1)) for share in shares], dim=1).flatten(0, 1)


def _shares(ranks: int, width: int, seed: int) -> tuple[list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return ([torch.randn(3 * width // ranks, width, dtype=torch.float64, generator=rng) for _ in range(ranks)],)


packed_whole = Exercise(
    name="44.1",
    solution=_whole,
    trials=(_shares(2, 4, 0), _shares(4, 8, 1), _shares(1, 2, 2)),
    labels=("shares",),
    mistakes=(
        Mistake(
            lambda shares: torch.cat(shares),
            "You set whole shares below each other: then rank 0's keys stand before rank 1's queries.",
        ),
        Mistake(
            lambda shares: torch.cat(shares, dim=1),
            "You joined along the inputs: the packed weight is cut by rows (its outputs).",
        ),
        Mistake(
            lambda shares: _whole(shares[::-1]),
            "The ranks stand in reverse order: rank 0 has the first heads.",
        ),
        Mistake(
            lambda shares: sum(shares),
            "Shares are parts of the matrix, not of a sum: join them.",
        ),
        Mistake(
            lambda shares: torch.stack([s.unflatten(0, (3, -1)) for s in shares], dim=2).flatten(0, 2),
            "Rows of different ranks alternate: with stack the rank goes inside. Join along the heads with cat.",
        ),
        Mistake(
            lambda shares: torch.cat([share.unflatten(0, (3, -1)) for share in shares], dim=1),
            "Nearly: q, k and v are still a dimension of their own; flatten it into the rows.",
        ),
        Mistake(lambda shares: shares[0], "That is rank 0's share alone: all ranks' are needed."),
    ),
    remark="whole heads, whole checkpoint: it loads on any number of ranks.",
)


def spoil(gpt: GPT) -> GPT:
    """Put a silent fault into a parallelized GPT, and return it."""
    gpt.blocks[2].attention.out.forward = _leave.__get__(gpt.blocks[2].attention.out)
    return gpt


def _leave(self: torch.nn.Module, x: Tensor) -> Tensor:
    return scatter_sequence(F.linear(x, self.weight), self.group) + self.bias


def _wrong_gradients() -> list[str]:
    """The parameters whose gradient is not that of one process, on this rank."""
    tokens = torch.randint(0, 256, (1, 33), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    whole, cut = (GPT(GPT_SIZES["1M"], generator=torch.Generator().manual_seed(0)).double() for _ in range(2))
    F.cross_entropy(whole(x).flatten(0, 1), y.flatten()).backward()
    cut = spoil(parallelize_(cut, sequence=True))
    vocabulary_cross_entropy(cut(x), y, 256).backward()
    grads = whole_tensors(cut, {name: p.grad for name, p in cut.named_parameters()})
    return [name for name, p in whole.named_parameters() if (p.grad - grads[name]).abs().max() > 1e-9]


@cache
def _finding() -> tuple[str, int]:
    return launch(_wrong_gradients, 2, backend="gloo")[0][0], 1


silent_fault = Exercise(
    name="44.2",
    solution=_finding,
    trials=((),),
    mistakes=(
        Mistake(
            lambda: (_finding()[0], 4),
            "The right parameter. But a bias added by every rank would change the output, and the loss is right.",
        ),
        Mistake(
            lambda: (_finding()[0], 2),
            "The right parameter. Is its gradient too large, or has each rank a part of it? Compare the ranks.",
        ),
        Mistake(
            lambda: (_finding()[0], 3),
            "The right parameter. It is not packed, and a wrong cut would change the loss.",
        ),
        Mistake(
            lambda: ("blocks.2.attention.out.weight", 1),
            "Close: that layer's weight is cut, and each rank has the gradient of its part. What else is there?",
        ),
        Mistake(
            lambda: ("blocks.2.attention.qkv.bias", 1),
            "Some gradients differ by rounding, about 1e-16: look for an error that is much larger.",
        ),
        Mistake(lambda: _finding()[0], "Return a pair: the parameter's name and the number of the fault."),
        Mistake(lambda: _finding()[::-1], "The other way round: first the parameter's name, then the fault's number."),
        Mistake(
            lambda: ("tokens.weight", 1),
            "The first parameter, but not the first wrong one: its gradient agrees with one process.",
        ),
    ),
    remark="each rank learned the bias from its own tokens alone, and the copies would have drifted apart.",
)

Problem = tuple[list[int], int, int]
KINDS = ("column", "row", "copy")


def _held(widths: list[int], kinds: list[str], ranks: int) -> int:
    """Weights of one rank."""
    sizes = zip(pairwise(widths), kinds, strict=True)
    return sum(a * b // (1 if kind == "copy" else ranks) for (a, b), kind in sizes)


def _sent(widths: list[int], kinds: list[str]) -> int:
    """Numbers a token, in units of (n - 1) / n, forward and backward."""
    sent, cut = 0, False
    for i, kind in enumerate(kinds):
        w, first = widths[i], i == 0
        if kind == "column":
            sent += 0 if first else 2 * w
        elif kind == "row":
            sent += (0 if cut or first else w) + 2 * widths[i + 1]
        else:
            sent += w if cut else 0
        cut = kind == "column"
    return sent + (widths[-1] if cut else 0)


def _search(widths: list[int], ranks: int, limit: int) -> list[str]:
    layouts = (list(kinds) for kinds in product(KINDS, repeat=len(widths) - 1))
    return min((k for k in layouts if _held(widths, k, ranks) <= limit), key=lambda kinds: _sent(widths, kinds))


def _turns(widths: list[int], ranks: int, limit: int) -> list[str]:
    return [KINDS[i % 2] for i in range(len(widths) - 1)]


def _judge(kinds: list[str], widths: list[int], ranks: int, limit: int) -> str | None:
    if not isinstance(kinds, list) or len(kinds) != len(widths) - 1 or not set(kinds) <= set(KINDS):
        return f'return a list of {len(widths) - 1} words, each "column", "row" or "copy"'
    held = _held(widths, kinds, ranks)
    return None if held <= limit else f"a rank holds {held:,} weights, allowed {limit:,}"


_EASY: Problem = ([8, 32, 8], 2, 300)
_HARD: Problem = ([256, 256, 1024, 384, 1024, 256, 768], 4, 700_000)

fewest_sent = Exercise(
    name="44.3",
    solution=_search,
    accept=_judge,
    trials=(_EASY, _HARD),
    labels=("widths", "ranks", "limit"),
    mistakes=(
        Mistake(
            lambda widths, ranks, limit: ["copy"] * (len(widths) - 1),
            "Nothing is sent, but every rank holds every weight: cut some of them.",
        ),
        Mistake(
            lambda widths, ranks, limit: _turns(widths, ranks, limit)[:-1],
            "One word is missing: between k widths lie k − 1 matrices.",
        ),
        Mistake(
            lambda widths, ranks, limit: [*_turns(widths, ranks, limit), "copy"],
            "One word too many: between k widths lie k − 1 matrices.",
        ),
        Mistake(
            lambda widths, ranks, limit: _sent(widths, _search(widths, ranks, limit)),
            "That is what is sent: return the list of words.",
        ),
        Mistake(
            lambda widths, ranks, limit: [
                "column" if a * b == max(x * y for x, y in pairwise(widths)) else "copy" for a, b in pairwise(widths)
            ],
            "You cut the largest matrix alone: count the weights of the others, which every rank holds whole.",
        ),
        Mistake(
            lambda widths, ranks, limit: [_search(widths, ranks, limit)] * ranks,
            "One list is enough: all ranks cut alike.",
        ),
        Mistake(
            lambda widths, ranks, limit: [f"{kind}s" for kind in _turns(widths, ranks, limit)],
            'The words are "column", "row" and "copy", without an s.',
        ),
    ),
    remark="every rank holds its share, and vectors are joined where they are narrow.",
    score=Score(
        lambda answer: _sent(_HARD[0], answer(*_HARD)),
        "numbers a token",
        _sent(_HARD[0], ["column", *_turns(*_HARD)[:-1]]),
    ),
)
