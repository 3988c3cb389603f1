"""Lesson 31, transfer: a picture for a photographs' network, the cost of learning in part, the fewest labels."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["as_input", "fewest_labels", "training_flops"]


def _twice(picture: Tensor) -> Tensor:
    return picture.repeat_interleave(2, 0).repeat_interleave(2, 1)


def _three(picture: Tensor) -> Tensor:
    return picture.expand(3, *picture.shape)


def _input(picture: Tensor) -> Tensor:
    return _three((_twice(picture).float() - 127) / 128)


def _bytes(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


as_input = Exercise(
    name="31.1",
    solution=_input,
    trials=((torch.tensor([[0, 255], [127, 30]], dtype=torch.uint8),), (_bytes(0, 3, 4),), (_bytes(1, 5, 2),)),
    labels=("picture",),
    mistakes=(
        Mistake(
            lambda picture: _three((_twice(picture).float() / 255 - 127) / 128),
            "You divide by 255 first. The network saw 0 to 255 before the shift: all your pixels are nearly −1.",
        ),
        Mistake(
            lambda picture: _three(_twice(picture).float() / 255),
            "From 0 to 1 is another network's habit: this one saw (v − 127) / 128.",
        ),
        Mistake(
            lambda picture: _three((_twice(picture) - 127).float() / 128),
            "Bytes wrap around: 0 − 127 is 129 in uint8. Make floats before you subtract.",
        ),
        Mistake(
            lambda picture: _three((_twice(picture).float() - 128) / 127),
            "The two numbers are exchanged: subtract 127, divide by 128.",
        ),
        Mistake(
            lambda picture: (_twice(picture).float() - 127) / 128,
            "The network has three input channels: a grey picture goes into each of them.",
        ),
        Mistake(
            lambda picture: _input(picture)[:1],
            "One channel is missing two: the first convolution has weights for three.",
        ),
        Mistake(
            lambda picture: _input(picture).permute(1, 2, 0),
            "The channels come first, [3, height, width]; last is how Pillow keeps them.",
        ),
        Mistake(
            lambda picture: _three((picture.float() - 127) / 128),
            "The size is still the old one: each pixel becomes 2 x 2.",
        ),
        Mistake(
            lambda picture: _three((picture.repeat(2, 2).float() - 127) / 128),
            "That is the picture four times. Each pixel is to be repeated, not the whole.",
        ),
        Mistake(
            lambda picture: _three((255 - _twice(picture).float() - 127) / 128),
            "Black and white are exchanged.",
        ),
    ),
    remark="three channels, larger, and on the scale of the first task.",
)

Learns = Sequence[bool]


def _cost(forward: Sequence[int], learns: Learns) -> int:
    weights = sum(f for f, one in zip(forward, learns, strict=True) if one)
    inputs = sum(f for i, f in enumerate(forward) if any(learns[:i]))
    return sum(forward) + weights + inputs


def _without_inputs(forward: Sequence[int], learns: Learns) -> int:
    return sum(forward) + sum(f for f, one in zip(forward, learns, strict=True) if one)


def _frozen_forward_left_out(forward: Sequence[int], learns: Learns) -> int:
    frozen = sum(f for f, one in zip(forward, learns, strict=True) if not one)
    return _cost(forward, learns) - frozen


def _inputs_of_what_learns(forward: Sequence[int], learns: Learns) -> int:
    chosen = (f for i, f in enumerate(forward) if learns[i] and any(learns[:i]))
    return _without_inputs(forward, learns) + sum(chosen)


training_flops = Exercise(
    name="31.2",
    solution=_cost,
    trials=(
        ([10, 20, 40], [False, False, True]),
        ([10, 20, 40], [True, False, False]),
        ([7, 11, 13, 17], [False, True, False, True]),
        ([7, 11, 13, 17], [True, True, True, True]),
    ),
    labels=("forward", "learns"),
    mistakes=(
        Mistake(
            lambda forward, learns: 3 * sum(forward),
            "Three times the forward pass is what it costs when everything learns. Here some layers do not.",
        ),
        Mistake(
            lambda forward, learns: sum(forward) + 2 * sum(f for f, one in zip(forward, learns, strict=True) if one),
            "The gradient of its input is not asked of whoever learns, but of whoever has a learner before it.",
        ),
        Mistake(
            _without_inputs,
            "The gradient must travel back to the first layer that learns: each layer behind it pays for its input.",
        ),
        Mistake(
            lambda forward, learns: (
                _without_inputs(forward, learns) + sum(f for i, f in enumerate(forward) if any(learns[: i + 1]))
            ),
            "The first layer that learns needs no gradient of its own input: nobody before it learns.",
        ),
        Mistake(
            lambda forward, learns: (
                _without_inputs(forward, learns) + sum(f for i, f in enumerate(forward) if any(learns[i + 1 :]))
            ),
            "Turned around: the gradient comes from the loss, and goes on while a layer *before* still learns.",
        ),
        Mistake(_inputs_of_what_learns, "A frozen layer behind a learning one still passes the gradient through."),
        Mistake(
            _frozen_forward_left_out,
            "Frozen layers still run forward: the features must come from somewhere.",
        ),
        Mistake(
            lambda forward, learns: 3 * sum(f for f, one in zip(forward, learns, strict=True) if one),
            "Only the layers that learn are counted; the others run forward all the same.",
        ),
        Mistake(
            lambda forward, learns: _cost(forward, learns) - sum(forward),
            "That is the backward pass alone: add the forward pass.",
        ),
        Mistake(
            lambda forward, learns: 2 * sum(forward) + sum(f for i, f in enumerate(forward) if any(learns[:i])),
            "You compute weight gradients for frozen layers too.",
        ),
    ),
    remark="forward for all, weights for those that learn, inputs for those behind the first of them.",
)

BAR = 0.95
Ask = Callable[[int], int]


def _nearest(x: Tensor, asked: Sequence[int], ask: Ask) -> Tensor:
    """Every example gets the label of the nearest one that was asked about."""
    labels = torch.tensor([int(ask(i)) for i in asked])
    return labels[torch.cdist(x, x[list(asked)]).argmin(1)]


def _spread_out(x: Tensor, most: int) -> tuple[list[int], list[float]]:
    """Farthest first: each next one is the farthest from all before; and how far it was."""
    chosen = [(x - x.mean(0)).norm(dim=1).argmin().item()]
    far = []
    while len(chosen) < most:
        distance = torch.cdist(x, x[chosen]).amin(1)
        chosen.append(distance.argmax().item())
        far.append(distance.max().item())
    return chosen, far


def _ask_few(x: Tensor, ask: Ask) -> Tensor:
    """Stop where the next distance is much smaller: every heap of examples then has a label."""
    chosen, far = _spread_out(x, min(len(x), 25))
    drops = [a / b for a, b in pairwise(far)]
    return _nearest(x, chosen[: drops.index(max(drops)) + 2], ask)


def _ask_by(order: Callable[[Tensor], Tensor], count: int = 9) -> Callable[[Tensor, Ask], Tensor]:
    return lambda x, ask: _nearest(x, order(x)[:count].tolist(), ask)


def _from_middle(x: Tensor) -> Tensor:
    return (x - x.mean(0)).norm(dim=1)


def _nearest_first(x: Tensor, ask: Ask) -> Tensor:
    chosen = [len(x) // 2]
    for _ in range(8):
        distance = torch.cdist(x, x[chosen]).amin(1)
        distance[chosen] = torch.inf
        chosen.append(distance.argmin().item())
    return _nearest(x, chosen, ask)


def _one_a_class(x: Tensor, ask: Ask) -> Tensor:
    return _nearest(x, _spread_out(x, 4)[0], ask)


def _commonest(x: Tensor, ask: Ask) -> Tensor:
    labels = torch.tensor([int(ask(i)) for i in _spread_out(x, 9)[0]])
    return labels.mode().values.expand(len(x))


def _places(x: Tensor, ask: Ask) -> Tensor:
    chosen = _spread_out(x, 9)[0]
    return torch.cdist(x, x[chosen]).argmin(1)


def _only_asked(x: Tensor, ask: Ask) -> Tensor:
    return torch.tensor([int(ask(i)) for i in _spread_out(x, 9)[0]])


def _heaps(seed: int, sizes: Sequence[int], classes: int, dims: int = 6) -> tuple[Tensor, Tensor]:
    """Features of pictures: heaps far apart, one after the other, each class with several of them."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), dims, dtype=torch.float64, generator=rng)
    centres = 4 * centres / torch.cdist(centres, centres).fill_diagonal_(torch.inf).min()
    heap = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    noise = torch.randn(len(heap), dims, dtype=torch.float64, generator=rng)
    return centres[heap] + 0.25 * noise, (heap + 1) % classes


def _read(answer: Callable[[Tensor, Ask], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return answer(x, lambda i: y[i].item())


def _asked(answer: Callable[[Tensor, Ask], Tensor], x: Tensor, y: Tensor) -> int:
    """How many different examples an answer asks about."""
    seen = set()

    def ask(i: int) -> int:
        seen.add(int(i) % len(x))
        return y[i].item()

    answer(x, ask)
    return len(seen)


def _good_enough(result: Tensor, x: Tensor, y: Tensor) -> str | None:
    if not isinstance(result, Tensor) or result.shape != y.shape:
        shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        return f"return one label for each of the {len(x)} examples, as a tensor; got {shape}"
    share = (result == y).double().mean().item()
    return None if share >= BAR else f"{100 * share:.0f} % of the labels are right, wanted are {100 * BAR:.0f} %"


_EASY = _heaps(3, (30, 12, 9, 20, 15, 8), 3)
_HARD = _heaps(5, (40, 6, 25, 8, 30, 12, 7, 20, 10, 5, 22), 4)

fewest_labels = Exercise(
    name="31.3",
    solution=_ask_few,
    use=_read,
    accept=_good_enough,
    trials=(_EASY, _HARD),
    labels=("x", "y"),
    mistakes=(
        Mistake(
            _ask_by(lambda x: torch.arange(len(x))),
            "You ask about the first rows, and they are all of one kind: look where the examples lie.",
        ),
        Mistake(
            _ask_by(lambda x: torch.randperm(len(x), generator=torch.Generator().manual_seed(0))),
            "At random the large heaps are asked again and again, and small ones never.",
        ),
        Mistake(
            _ask_by(lambda x: _from_middle(x).argsort(descending=True)),
            "Far from the middle is not far from one another: your examples lie in one corner.",
        ),
        Mistake(
            _ask_by(lambda x: _from_middle(x).argsort()),
            "The examples nearest to the middle stand for no heap but their own.",
        ),
        Mistake(_nearest_first, "You take the nearest to those you have: take the farthest."),
        Mistake(_one_a_class, "One label a class is not enough: a class has several kinds of pictures."),
        Mistake(_commonest, "Every example gets the commonest label: give each that of its nearest neighbour."),
        Mistake(_places, "These are places in your list of asked examples: return their labels."),
        Mistake(_only_asked, "These are the labels you asked for: return one for every example."),
        Mistake(
            lambda x, ask: torch.zeros(len(x), dtype=torch.int64),
            "You asked nothing, so you know nothing: one class is never 95 % of these examples.",
        ),
    ),
    remark="good features let you choose what to label.",
    score=Score(lambda answer: _asked(answer, *_HARD), "labels", _asked(_ask_few, *_HARD)),
)
