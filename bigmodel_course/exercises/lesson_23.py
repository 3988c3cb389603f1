"""Lesson 23, weight sharing: one round of k-means, the gradient of the shared values, codebooks in the fewest bytes."""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.compression.huffman import code_lengths
from bigmodel_course.compression.sharing import share, shared_gradient

__all__ = ["coded_bytes", "error_left", "fewest_bytes", "lloyd_round", "value_gradient"]


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _round(weights: Tensor, values: Tensor, middle: Callable[[Tensor], Tensor] = Tensor.mean) -> Tensor:
    """Each value becomes the `middle` of the weights nearest to it; one that no weight takes stays."""
    weights = weights[weights != 0]
    codes = (weights[:, None] - values).abs().argmin(dim=1)
    own = [weights[codes == j] for j in range(len(values))]
    return torch.stack([middle(w) if len(w) else v for w, v in zip(own, values, strict=True)])


def _with_zeros(weights: Tensor, values: Tensor) -> Tensor:
    codes = (weights[:, None] - values).abs().argmin(dim=1)
    own = [weights[codes == j] for j in range(len(values))]
    return torch.stack([w.mean() if len(w) else v for w, v in zip(own, values, strict=True)])


def _value_below(weights: Tensor, values: Tensor) -> Tensor:
    weights = weights[weights != 0]
    codes = (torch.bucketize(weights, values, right=True) - 1).clamp(min=0)
    own = [weights[codes == j] for j in range(len(values))]
    return torch.stack([w.mean() if len(w) else v for w, v in zip(own, values, strict=True)])


def _by_size(weights: Tensor, values: Tensor) -> Tensor:
    weights = weights[weights != 0]
    codes = (weights.abs()[:, None] - values.abs()).abs().argmin(dim=1)
    own = [weights[codes == j] for j in range(len(values))]
    return torch.stack([w.mean() if len(w) else v for w, v in zip(own, values, strict=True)])


lloyd_round = Exercise(
    name="23.1",
    solution=_round,
    trials=(
        (_numbers(-1.5, 0.0, -0.9, 0.4, 0.0, 0.7, 1.3, 2.6, 0.0), _numbers(-1.0, 0.1, 1.0)),
        (_numbers(3.0, 0.0, -2.0, 2.5, -0.4, 4.2, 0.0, -2.2, 2.4), _numbers(-9.0, -2.5, 0.6, 2.0)),  # no weight near -9
    ),
    labels=("weights", "values"),
    mistakes=(
        Mistake(_with_zeros, "The zeros are pruned weights: they pull the nearest value to 0. Leave them out."),
        Mistake(
            lambda weights, values: torch.stack(
                [w.mean() for w in (weights[weights != 0][_nearest(weights, values) == j] for j in range(len(values)))]
            ),
            "A value that no weight takes becomes nan (0 / 0). Leave it where it is.",
        ),
        Mistake(
            lambda weights, values: (
                torch.zeros_like(values).index_add(0, _nearest(weights, values), weights[weights != 0])
                / _nearest(weights, values).bincount(minlength=len(values)).clamp(min=1)
            ),
            "A value that no weight takes jumps to 0. Leave it where it is.",
        ),
        Mistake(
            lambda weights, values: _round(weights, values, Tensor.median),
            "The median gives the least absolute error; the squared error wants the mean.",
        ),
        Mistake(
            lambda weights, values: _round(weights, values, lambda w: (w.min() + w.max()) / 2),
            "That is the middle of the range, which two weights decide. Take the mean of all.",
        ),
        Mistake(_value_below, "You took the next value below; take the nearest: cut half-way between two values."),
        Mistake(_by_size, "You compare sizes without their signs: −1.5 is not near +1.5."),
        Mistake(
            lambda weights, values: _round(weights, values, Tensor.sum), "That is the sum of the weights, not the mean."
        ),
        Mistake(
            lambda weights, values: values[_nearest(weights, values)],
            "These are the weights with their values put in. Return the new values.",
        ),
    ),
    remark="no round can raise the squared error.",
)


def _nearest(weights: Tensor, values: Tensor) -> Tensor:
    return (weights[weights != 0][:, None] - values).abs().argmin(dim=1)


def _gradients(seed: int, k: int, *shape: int) -> tuple[Tensor, Tensor, int]:
    rng = torch.Generator().manual_seed(seed)
    gradient = torch.randn(*shape, dtype=torch.float64, generator=rng)
    codes = torch.randint(0, k, shape, dtype=torch.uint8, generator=rng)  # no weight has the last value
    codes[0, 0] = k - 1
    return gradient, codes, k


def _sizes(codes: Tensor, k: int) -> Tensor:
    return codes.flatten().int().bincount(minlength=k + 1)[1:].clamp(min=1)


def _last_one(gradient: Tensor, codes: Tensor, k: int) -> Tensor:
    out = gradient.new_zeros(k + 1)
    for g, code in zip(gradient.flatten(), codes.flatten().int(), strict=True):
        out[code] = g
    return out[1:]


value_gradient = Exercise(
    name="23.2",
    solution=shared_gradient,
    trials=(_gradients(0, 3, 3, 4), _gradients(1, 5, 6, 7)),
    labels=("gradient", "codes", "k"),
    mistakes=(
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient, codes, k) / _sizes(codes, k),
            "You averaged. By the chain rule the gradients of all the places add up: no division.",
        ),
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient, codes + 1, k + 1)[:k],
            "Off by one: code 0 is a pruned weight, and code 1 is the first value.",
        ),
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient, codes + 1, k + 1),
            "You have a gradient for the pruned weights as well. Code 0 has no value.",
        ),
        Mistake(_last_one, "An assignment keeps only the last gradient of each value: add, as index_add_ does."),
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient, codes, k) / codes.numel(),
            "You divided by the number of weights. The loss has its own mean already: no division here.",
        ),
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient.abs(), codes, k),
            "You lost the signs: gradients of opposite sign must cancel.",
        ),
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient, codes, k)[codes[codes > 0].int() - 1],
            "That is one entry for each weight. Return one for each value.",
        ),
        Mistake(
            lambda gradient, codes, k: shared_gradient(gradient, codes, k)[: int(codes.max())],
            "A value that no weight takes has gradient 0: return k numbers.",
        ),
    ),
    remark="one number for each value, however many weights share it.",
)

Layers = list[Tensor]
VALUE_BITS = 16


def _codes(weights: Tensor, values: Tensor) -> Tensor:
    return (weights[:, None] - values).abs().argmin(dim=1)


def error_left(layers: Layers, books: Layers) -> float:
    """The squared error of all weights together, relative to their squares, when each takes its nearest value."""
    lost = sum(float((w - v[_codes(w, v)]).square().sum()) for w, v in zip(layers, books, strict=True))
    return lost / sum(float(w.square().sum()) for w in layers)


def coded_bytes(layers: Layers, books: Layers) -> int:
    """Bytes of the Huffman codes of all layers, each with its own table, and of the values at 16 bits."""
    bits = 0
    for weights, values in zip(layers, books, strict=True):
        counts = _codes(weights, values).bincount(minlength=len(values)).tolist()
        lengths = code_lengths(counts)
        bits += sum(count * length for count, length in zip(counts, lengths, strict=True)) + VALUE_BITS * len(values)
    return -(-bits // 8)


def _kmeans(weights: Tensor, k: int) -> Tensor:
    return share(weights, k).values.double()


def _search_k(layers: Layers, limit: float, most: int = 24) -> Layers:
    """k-means with the cheapest k for each layer, out of all choices."""
    total = sum(float(w.square().sum()) for w in layers)
    tables = []
    for w in layers:
        books = [_kmeans(w, k) for k in range(1, most + 1)]
        share_of = float(w.square().sum()) / total
        tables.append([(coded_bytes([w], [b]), share_of * error_left([w], [b]), b) for b in books])
    choices = (c for c in product(*tables) if sum(error for _, error, _ in c) <= limit)
    return [book for _, _, book in min(choices, key=lambda c: sum(size for size, _, _ in c))]


def _grid(weights: Tensor, step: float, shift: float) -> Tensor:
    """Values at about equal distances: the means of the weights in equal cells, the empty ones left out."""
    cells = ((weights / step) + shift).round()
    return torch.stack([weights[cells == cell].mean() for cell in cells.unique()])


def _equal_steps(layers: Layers, limit: float) -> Layers:
    """The same step in all layers, as coarse as the limit allows."""
    best = None
    for i in range(200):
        step = 2.0 ** (1 - i / 40)
        for shift in (0.0, 0.5):
            books = [_grid(w, step, shift) for w in layers]
            if error_left(layers, books) <= limit:
                size = coded_bytes(layers, books)
                if best is None or size < best[0]:
                    best = size, books
    return best[1]


def _each_its_own_limit(layers: Layers, limit: float) -> Layers:
    """Every layer spends the whole of what all may lose together."""
    total = sum(float(w.square().sum()) for w in layers)
    allowed = [limit * total / float(w.square().sum()) for w in layers]
    return [
        next(b for b in (_kmeans(w, k) for k in range(1, 65)) if error_left([w], [b]) <= most)
        for w, most in zip(layers, allowed, strict=True)
    ]


def _allowed(books: Layers, layers: Layers, limit: float) -> str | None:
    if not isinstance(books, list) or len(books) != len(layers):
        return f"return a list of {len(layers)} codebooks, one for each layer"
    if not all(isinstance(b, Tensor) and b.ndim == 1 and 1 <= len(b) <= 255 and b.isfinite().all() for b in books):
        return "a codebook is a tensor of 1 to 255 finite values"
    error = error_left(layers, [b.double() for b in books])
    if error <= limit:
        return None
    return f"with {[len(b) for b in books]} values {error:.3g} of the squares is lost, allowed {limit:g}"


def _problem(seed: int, sizes: tuple[int, int, int], limit: float) -> tuple[Layers, float]:
    """Three layers: normal weights, weights of which a few are large, and weights with a hole around 0."""
    rng = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randn(n, dtype=torch.float64, generator=rng) for n in sizes)
    return [0.5 * first, 0.2 * second * second.abs(), third + 1.5 * third.sign()], limit


_EASY, _HARD = _problem(1, (80, 120, 40), 0.04), _problem(0, (600, 1500, 300), 0.02)

fewest_bytes = Exercise(
    name="23.3",
    solution=_equal_steps,
    accept=_allowed,
    trials=(_EASY, _HARD),
    labels=("layers", "limit"),
    mistakes=(
        Mistake(
            lambda layers, limit: _search_k(layers, math.sqrt(limit)),
            "You compare the root of the error with the limit. The limit is one of squares.",
        ),
        Mistake(
            lambda layers, limit: _search_k(layers, limit * sum(float(w.square().sum()) for w in layers)),
            "Your error is absolute: divide by the squares of all weights.",
        ),
        Mistake(
            _each_its_own_limit, "Each layer alone is within the limit. Together they are not: their errors add up."
        ),
        Mistake(
            lambda layers, limit: [_search_k(layers, limit)[0]] * len(layers),
            "The values of the first layer do not suit the others: each layer has its own.",
        ),
        Mistake(
            lambda layers, limit: [
                torch.linspace(float(w.min()), float(w.max()), len(b), dtype=torch.float64)
                for w, b in zip(layers, _search_k(layers, limit), strict=True)
            ],
            "These are the values of the linear start: move them to the means of their weights.",
        ),
        Mistake(
            lambda layers, limit: [torch.stack([-w.abs().mean(), w.abs().mean()]) for w in layers],
            "Two values each are the smallest file, and too few: measure the error.",
        ),
        Mistake(
            lambda layers, limit: [
                _kmeans(w.abs(), len(b)) for w, b in zip(layers, _equal_steps(layers, limit), strict=True)
            ],
            "You lost the signs: no negative weight has a value near it.",
        ),
        Mistake(
            lambda layers, limit: [len(b) for b in _search_k(layers, limit)],
            "These are the numbers of values. Return the values.",
        ),
        Mistake(
            lambda layers, limit: [_codes(w, b) for w, b in zip(layers, _search_k(layers, limit), strict=True)],
            "These are the codes of the weights. Return the values.",
        ),
        Mistake(
            lambda layers, limit: torch.cat(_search_k(layers, limit)),
            "One long tensor does not say which value belongs to which layer: return a list.",
        ),
    ),
    remark="the error is within the limit, and the rare values pay for themselves.",
    score=Score(
        lambda answer: coded_bytes(_HARD[0], answer(*_HARD)), "bytes", coded_bytes(_HARD[0], _search_k(*_HARD))
    ),
)
