"""Lesson 24, distillation: the loss from logits, its gradient and the limit of it, a teacher's scores in few bytes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot, softmax

from bigmodel_course.checks import Answer, Exercise, Mistake, Score

__all__ = ["distillation", "fewest_bytes", "gradient"]


def _logits(seed: int, rows: int, classes: int, scale: float = 2.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, dtype=torch.float64, generator=rng)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence of q from p, one number a row, both given as log-probabilities."""
    return (p.exp() * (p - q)).sum(1)


def _loss(student, teacher, y, temperature, soft, *, power=2, on=(1, 1), kl=_kl, reduce=Tensor.mean, hot=False, hard=1):
    """The distillation loss, and with other knobs the typical ways to miss it."""
    q, p = (
        log_softmax(z / (temperature if softened else 1), 1) for z, softened in zip((student, teacher), on, strict=True)
    )
    labels = cross_entropy(student, y) * (temperature**2 if hot else 1)
    return soft * temperature**power * reduce(kl(p, q)) + (1 - soft) * hard * labels


def _changed(**knobs) -> Answer:
    return lambda *problem: _loss(*problem, **knobs)


def _labelled(seed: int, rows: int, classes: int, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.arange(rows) % classes
    return _logits(seed, rows, classes, scale), _logits(seed + 1, rows, classes, scale), y


distillation = Exercise(
    name="24.1",
    solution=_loss,
    trials=((*_labelled(0, 4, 3), 2.0, 0.9), (*_labelled(2, 6, 5), 5.0, 0.3), (*_labelled(4, 3, 4, 2000.0), 1.5, 0.5)),
    labels=("student", "teacher", "y", "temperature", "soft"),
    mistakes=(
        Mistake(_changed(power=0), "The factor T² is missing: without it the soft part fades when T grows."),
        Mistake(_changed(power=1), "T once is not enough: one 1/T is from the chain rule, the other from softening."),
        Mistake(_changed(on=(1, 0)), "The teacher's scores are not softened: divide them by T as well."),
        Mistake(_changed(on=(0, 1)), "The student's scores are not softened: in the soft part divide them by T."),
        Mistake(
            _changed(kl=lambda p, q: _kl(q, p)),
            "The divergence is the other way round: the teacher's probabilities weigh the difference of the logs.",
        ),
        Mistake(
            _changed(kl=lambda p, q: p.exp() * (p - q)),
            "You took the mean over all entries: sum over the classes, then take the mean over the batch.",
        ),
        Mistake(_changed(reduce=Tensor.sum), "You summed over the batch: take the mean of the pictures."),
        Mistake(
            _changed(kl=lambda p, q: (p.exp() * (p.exp().log() - q.exp().log())).sum(1)),
            "Softmax first and log after gives −∞, and 0·∞ is not a number: use log_softmax.",
        ),
        Mistake(
            _changed(kl=lambda p, q: -(p.exp() * q).sum(1)),
            "That is the cross-entropy with the soft targets. Subtract the teacher's entropy, so that equals cost 0.",
        ),
        Mistake(_changed(hot=True), "T² belongs to the soft part only: the labels' part is not softened."),
        Mistake(
            lambda student, teacher, y, temperature, soft: _loss(student, teacher, y, temperature, 1 - soft),
            "The mix is swapped: `soft` weighs the teacher, 1 − soft the labels.",
        ),
        Mistake(_changed(hard=0), "The labels are not used: add 1 − soft times the cross-entropy."),
    ),
    remark="0 where student and teacher agree and the labels are silent.",
)


def _centred(z: Tensor) -> Tensor:
    return z - z.mean(1, keepdim=True)


def _gradient(student, teacher, temperature, *, power=1, inner=0, limit=lambda z: _centred(z) / z.shape[1], sign=1):
    """The gradient of the soft part; `inner` of 1 leaves the division by T out of the softmax."""
    if math.isinf(temperature) and limit:
        return sign * limit(student - teacher) / len(student)
    q, p = (softmax(z / temperature ** (1 - inner), 1) for z in (student, teacher))
    return sign * temperature**power * (q - p) / len(student)


def _other(**knobs) -> Answer:
    return lambda *problem: _gradient(*problem, **knobs)


gradient = Exercise(
    name="24.2",
    solution=_gradient,
    trials=tuple((_logits(6, 4, 5), _logits(7, 4, 5) + 1, t) for t in (1.0, 3.0, 100.0, math.inf)),
    labels=("student", "teacher", "temperature"),
    mistakes=(
        Mistake(_other(power=-1), "That is the gradient without T²: the loss carries T², so T·(q − p) is left."),
        Mistake(_other(power=2), "The chain rule brings 1/T, as the scores are divided by T: T²/T is T."),
        Mistake(_other(power=0), "T² from the loss and 1/T from the chain rule leave one T."),
        Mistake(
            _other(sign=-1),
            "The sign: where the student says too much, its score must fall, so the gradient is student minus teacher.",
        ),
        Mistake(
            lambda student, teacher, temperature: _gradient(student, teacher, temperature) * len(student),
            "The loss is a mean over the batch: divide by the number of rows.",
        ),
        Mistake(
            lambda student, teacher, temperature: _gradient(student, teacher, temperature) / student.shape[1],
            "The loss sums over the classes: divide by the rows only. The limit has one 1/N of its own.",
        ),
        Mistake(
            _other(limit=None), "At T = ∞ the formula reads ∞ · 0: return the limit there, from e^(z/T) ≈ 1 + z/T."
        ),
        Mistake(
            _other(limit=lambda z: z / z.shape[1]),
            "In the limit each row is taken less its mean: a shift of all scores changes no probability.",
        ),
        Mistake(_other(limit=_centred), "In the limit every probability is near 1/N: the factor 1/N is missing."),
        Mistake(_other(limit=torch.zeros_like), "Without T² the limit is 0. With it, a difference of scores remains."),
        Mistake(_other(inner=1), "The probabilities are the softened ones: divide the scores by T before the softmax."),
    ),
    remark="hot distillation is least squares on the scores.",
)


# A codec is a pair: pack(scores [rows, classes]) -> bytes, and unpack(bytes, rows, classes) -> scores.
Codec = tuple[Callable[[Tensor], bytes], Callable[[bytes, int, int], Tensor]]

_TEMPERATURE, _ALLOWED = 4.0, 0.05


def _teacher(seed: int, rows: int) -> Tensor:
    """Scores such as a trained network of 10 classes gives: one class high, the others spread below."""
    z = _logits(seed, rows, 10, 5.0)
    return z + 9 * one_hot(torch.arange(rows) % 10, 10)


def _trip(answer: Callable[[], Codec], seed: int, rows: int) -> dict[str, float] | None:
    """Pack, pack another batch, unpack the first: the gap of the loss's gradient, and the bytes."""
    codec = answer()
    if codec is None or codec is ...:
        return codec
    pack, unpack = codec
    scores = _teacher(seed, rows)
    data = pack(scores.clone())
    if data is None or data is ...:
        return data
    if not isinstance(data, bytes):
        raise TypeError(f"pack must return bytes, got {type(data).__name__}")
    pack(3 * _teacher(seed + 10, rows))  # whoever remembers the last batch outside the bytes is found out
    restored = unpack(data, rows, 10)
    if restored is None or restored is ...:
        return restored
    if not isinstance(restored, Tensor) or restored.shape != scores.shape:
        raise ValueError(f"unpack must return a tensor of shape {list(scores.shape)}")
    student = _logits(seed + 20, rows, 10)
    right, mine = (_gradient(student, z, _TEMPERATURE) for z in (scores, restored.double()))
    return {"gap": float((mine - right).norm() / right.norm()), "bytes": len(data)}


def _near_enough(result: dict[str, float], seed: int, rows: int) -> str | None:
    if result["gap"] <= _ALLOWED:
        return None
    return f"the gradient is off by {100 * result['gap']:.3g} % of its length, allowed {100 * _ALLOWED:g} %"


def _bytes(codes: Tensor) -> bytes:
    return codes.to(torch.uint8).flatten().numpy().tobytes()


def _codes(data: bytes, *shape: int) -> Tensor:
    return torch.tensor(list(data), dtype=torch.float64).view(*shape)


def _nibbles(depth: float | None, *, swapped: bool = False, forgotten: bool = False) -> Codec:
    """Four bits a class: 16 levels from each row's largest score down to `depth` below it.

    Without a depth the levels cover the whole range of the batch, whose two ends go before the codes.
    """

    def pack(scores: Tensor) -> bytes:
        if depth:
            ends, low, span = b"", scores.amax(1, keepdim=True) - depth, depth
        else:
            ends, low = torch.stack([scores.min(), scores.max()]).numpy().tobytes(), scores.min()
            span = scores.max() - low
        codes = ((scores - low) / span * 15).round().clamp(0, 15).view(-1, 2)
        return ends + _bytes(codes[:, 0] * 16 + codes[:, 1])

    def unpack(data: bytes, rows: int, classes: int) -> Tensor:
        low, high = (-depth, 0.0) if depth else torch.frombuffer(bytearray(data[:16]), dtype=torch.float64).tolist()
        both = _codes(data if depth else data[16:], -1)
        pair = [both // 16, both % 16]
        codes = torch.stack(pair[::-1] if swapped else pair, 1).view(rows, classes)
        return codes if forgotten else low + codes * (high - low) / 15

    return pack, unpack


def _largest(keep: int, *, spread: bool) -> Codec:
    """The softened probabilities of the `keep` largest classes in a byte each; the rest gets nothing, or shares."""

    def pack(scores: Tensor) -> bytes:
        values, places = (scores / _TEMPERATURE).softmax(1).topk(keep, 1)
        return _bytes(torch.cat([(values * 255).round(), places], 1))

    def unpack(data: bytes, rows: int, classes: int) -> Tensor:
        values, places = _codes(data, rows, 2 * keep).split(keep, 1)
        rest = (1 - values.sum(1, keepdim=True) / 255).clamp(min=0) / (classes - keep) * spread
        p = rest.expand(rows, classes).clone().scatter(1, places.long(), values / 255)
        return _TEMPERATURE * p.clamp(min=1e-9).log()

    return pack, unpack


def _hard() -> Codec:
    return (
        lambda scores: _bytes(scores.argmax(1)),
        lambda data, rows, classes: 1000.0 * one_hot(_codes(data, rows).long(), classes),
    )


def _unsoftened() -> Codec:
    return (
        lambda scores: _bytes((scores.softmax(1) * 255).round()),
        lambda data, rows, classes: (_codes(data, rows, classes) / 255).clamp(min=1e-9).log(),
    )


def _rounded(store: Callable[[Tensor], Tensor]) -> Codec:
    """Whole numbers, `store` making them fit into an unsigned byte."""
    return lambda scores: _bytes(store(scores.round())), lambda data, rows, classes: _codes(data, rows, classes)


def _outside() -> Codec:
    """A byte a class, with the scale in a variable and not in the bytes."""
    kept = {}

    def pack(scores: Tensor) -> bytes:
        kept["low"], kept["step"] = scores.min(), (scores.max() - scores.min()) / 255
        return _bytes(((scores - kept["low"]) / kept["step"]).round())

    return pack, lambda data, rows, classes: kept["low"] + kept["step"] * _codes(data, rows, classes)


fewest_bytes = Exercise(
    name="24.3",
    use=_trip,
    solution=lambda: _nibbles(18.0),
    accept=_near_enough,
    trials=((0, 300), (1, 200)),
    labels=("seed", "rows"),
    mistakes=(
        Mistake(_hard, "Only the answer is left. What it says of the other classes is what you wanted to store."),
        Mistake(
            _unsoftened,
            "At T = 1 the small probabilities round to 0, and no division by T brings them back: soften first.",
        ),
        Mistake(
            lambda: _largest(2, spread=False), "You store two classes and give the others nothing: together they weigh."
        ),
        Mistake(
            lambda: _largest(3, spread=True), "Three classes and an even rest: the rest is not even. Store more of it."
        ),
        Mistake(
            lambda: _rounded(lambda z: z % 256),
            "Scores below 0 come back as numbers near 256: the sign was lost in an unsigned byte.",
        ),
        Mistake(
            lambda: _rounded(lambda z: z.clamp(0, 255)),
            "Scores below 0 all became 0: measure from the lowest or the highest, not from 0.",
        ),
        Mistake(_outside, "The scale is in a variable, not in the bytes: after the next batch it is gone."),
        Mistake(
            lambda: _nibbles(None),
            "16 levels over the whole range are too coarse. Measure each row from its largest score, and cut far off.",
        ),
        Mistake(lambda: _nibbles(18.0, swapped=True), "The two halves of each byte are swapped on the way back."),
        Mistake(
            lambda: _nibbles(18.0, forgotten=True), "You return the codes: multiply by the step to get scores back."
        ),
        Mistake(
            lambda: _nibbles(6.0), "You cut too near: classes 10 below the best still weigh a twelfth of it at T = 4."
        ),
    ),
    remark="the student would hardly notice.",
    score=Score(lambda answer: _trip(answer, 0, 300)["bytes"], "bytes", 1500),
)
