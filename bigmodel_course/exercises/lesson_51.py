"""Lesson 51, export: what a file accepts, a choice inside the graph, a stranger's file name, the fewest nodes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_course.checks import Exercise, Mistake, Score
from bigmodel_course.deployment.tracing import trace

__all__ = ["clip_rows", "fewest_nodes", "fits", "safe_location"]

Shapes = Sequence[Sequence[Any]]
Node = tuple[str, tuple[str, ...], str]


def _fits(inputs: Shapes, shapes: Shapes, *, shared: bool = True, across: bool = True, rank: bool = True) -> bool:
    """The rule; each keyword leaves out a part of it."""
    if len(inputs) != len(shapes):
        return False
    known: dict[str, int] = {}
    for want, got in zip(inputs, shapes, strict=True):
        if rank and len(want) != len(got):
            return False
        known = known if across else {}
        for size, found in zip(want, got, strict=False):
            expected = known.setdefault(size, found) if isinstance(size, str) else size
            if expected != found and (shared or not isinstance(size, str)):
                return False
    return True


fits = Exercise(
    name="51.1",
    solution=_fits,
    trials=(
        ([["batch", 64]], [[4, 64]]),
        ([["batch", 64]], [[4, 65]]),
        ([["batch", 64]], [[0, 64]]),
        ([["batch", 64]], [[4, 64, 1]]),
        ([["batch", 64]], [[1, 64]]),
        ([["batch", "batch"]], [[3, 4]]),
        ([["batch", 64], ["batch", "length"]], [[4, 64], [4, 9]]),
        ([["batch", 64], ["batch", "length"]], [[4, 64], [5, 9]]),
        ([["batch", 64], ["batch", "length"]], [[4, 64]]),
        ([["a"], ["b"]], [[7], [7]]),
    ),
    labels=("inputs", "shapes"),
    mistakes=(
        Mistake(
            lambda inputs, shapes: _fits(inputs, shapes, shared=False),
            "A name is one size: where it stands twice, both must be the same.",
        ),
        Mistake(
            lambda inputs, shapes: _fits(inputs, shapes, across=False),
            "A name is one size in all inputs together: do not forget it from one input to the next.",
        ),
        Mistake(
            lambda inputs, shapes: _fits(inputs, shapes, rank=False),
            "The number of axes must agree as well: zip stops at the shorter one.",
        ),
        Mistake(
            lambda inputs, shapes: _fits(inputs, shapes) and all(size > 0 for got in shapes for size in got),
            "An open size may be 0 when the file runs; only the example of the export must be at least 2.",
        ),
        Mistake(
            lambda inputs, shapes: _fits(inputs, shapes) and all(size > 1 for got in shapes for size in got),
            "An open size may be 0 or 1 when the file runs; only the example of the export must be at least 2.",
        ),
        Mistake(
            lambda inputs, shapes: _fits(inputs[: len(shapes)], shapes),
            "An input is missing: there must be one array for each.",
        ),
        Mistake(
            lambda inputs, shapes: _fits(inputs, shapes) and len({x[0] for x in shapes}) == len({x[0] for x in inputs}),
            "Two different names may have the same size.",
        ),
        Mistake(
            lambda inputs, shapes: [list(want) for want in inputs] == [list(got) for got in shapes],
            "A name stands for any size: only numbers must be equal as they are written.",
        ),
    ),
    remark="so a file says before the first sum what it cannot answer.",
)


def _clip(x: Tensor, limit: float) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > limit, x * limit / norm, x)


def _in_graph(answer: Callable, x: Tensor, limit: float) -> Any:
    """The result of the program that `answer` is, once traced, for another number of rows than it was traced with."""

    class Answer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return answer(x, limit)

    if not isinstance(answer(x.clone(), limit), Tensor):
        return answer(x.clone(), limit)
    kept = x.clone()
    result = trace(Answer(), x[:2], {0: "rows"}).module()(x)
    return result, torch.equal(x, kept)


def _clip_in_place(x: Tensor, limit: float) -> Tensor:
    x.copy_(_clip(x, limit))
    return x


_GENERATOR = torch.Generator().manual_seed(51)
_ROWS = torch.randn(5, 4, generator=_GENERATOR, dtype=torch.float64) * torch.tensor([[0.1], [3.0], [0.3], [9.0], [1.0]])

clip_rows = Exercise(
    name="51.2",
    solution=_clip,
    use=_in_graph,
    trials=((_ROWS, 1.0), (_ROWS[:3], 0.5), (torch.cat([_ROWS, torch.zeros(1, 4, dtype=torch.float64)]), 2.0)),
    labels=("x", "limit"),
    mistakes=(
        Mistake(
            lambda x, limit: x * limit / x.norm(dim=1, keepdim=True),
            "Every row got the length of the limit: shorter rows must stay as they are.",
        ),
        Mistake(
            lambda x, limit: torch.where(x.norm() > limit, x * limit / x.norm(), x),
            "That is one norm for the whole batch: each row has its own, dim=1.",
        ),
        Mistake(
            lambda x, limit: x.clamp(-limit, limit),
            "You clipped each number; the length of the row is to be at most the limit.",
        ),
        Mistake(
            lambda x, limit: torch.where(x.norm(dim=1, keepdim=True) > limit, x / x.norm(dim=1, keepdim=True), x),
            "The clipped rows have length 1: multiply by the limit.",
        ),
        Mistake(
            lambda x, limit: torch.where(
                x.norm(dim=1, keepdim=True) < limit, x * limit / x.norm(dim=1, keepdim=True), x
            ),
            "The two branches are the wrong way round: the long rows are to be scaled.",
        ),
        Mistake(
            lambda x, limit: torch.where(x.norm(dim=0) > limit, x * limit / x.norm(dim=0), x),
            "The norm goes along the wrong axis: a row's numbers lie along dim=1.",
        ),
        Mistake(
            _clip_in_place,
            "The result is right, and x was changed: write no value into an input.",
        ),
    ),
    remark="both branches are computed, and the graph chooses for each row.",
)


def _safe(location: str) -> bool:
    return location not in ("", ".", "..") and not set("/\\:\0") & set(location)


LOCATIONS = ["model.data", "../secret", "/etc/passwd", "a/../../b", "weights/a.data", "..", ".", "", "..\\secret"]
LOCATIONS += ["C:secret", "a..b", "...", "model\0.data", ".hidden", "https://host/a", "a/..", "C:\\secret"]

safe_location = Exercise(
    name="51.3",
    solution=_safe,
    trials=tuple((location,) for location in LOCATIONS),
    labels=("location",),
    mistakes=(
        Mistake(
            lambda location: not location.startswith("/"),
            "An absolute path is only one way out: a relative one can climb with `..`.",
        ),
        Mistake(
            lambda location: ".." not in location,
            "An absolute path needs no `..`, and a plain name such as a..b may hold one.",
        ),
        Mistake(
            lambda location: not location.startswith(("/", "..")),
            "`a/../../b` begins harmlessly: look at the whole of it, not at its beginning.",
        ),
        Mistake(
            lambda location: not location.startswith("/") and ".." not in location.split("/"),
            "Another system separates with `\\` and knows drives; and only a plain name was asked for.",
        ),
        Mistake(
            lambda location: location not in ("", ".", "..") and "/" not in location,
            "On Windows `\\` separates too, and `:` names a drive: a file may travel to another system.",
        ),
        Mistake(
            lambda location: not set("/\\:\0") & set(location),
            "`.`, `..` and the empty name hold no separator, and are no files either.",
        ),
        Mistake(
            lambda location: _safe(location.replace("\0", "")),
            "A zero byte ends the name for the system below: what you check is not what it opens.",
        ),
        Mistake(
            lambda location: _safe(location) and ".." not in location,
            "`a..b` and `...` are plain names: only the whole name `..` climbs.",
        ),
    ),
    remark="a name that cannot leave its folder; whether a link stands there is looked at next.",
)


TWO = {"add": torch.add, "mul": torch.mul, "sub": torch.sub}
GRAPHS: tuple[tuple[list[Node], str], ...] = (
    (
        [
            ("add", ("x", "y"), "a"),
            ("add", ("y", "x"), "b"),
            ("mul", ("a", "b"), "c"),
            ("sub", ("x", "y"), "unused"),
            ("neg", ("unused",), "unused2"),
            ("mul", ("a", "a"), "d"),
            ("add", ("c", "d"), "out"),
        ],
        "out",
    ),
    (
        [
            ("neg", ("x",), "a"),
            ("neg", ("a",), "b"),
            ("mul", ("b", "y"), "c"),
            ("neg", ("c",), "d"),
            ("neg", ("d",), "e"),
            ("sub", ("x", "y"), "f"),
            ("sub", ("y", "x"), "g"),
            ("mul", ("f", "g"), "h"),
            ("add", ("e", "h"), "out"),
        ],
        "out",
    ),
    (
        [
            ("mul", ("x", "x"), "a"),
            ("mul", ("x", "x"), "b"),
            ("sub", ("a", "y"), "c"),
            ("sub", ("b", "y"), "d"),
            ("mul", ("c", "d"), "e"),
            ("neg", ("d",), "f"),
            ("add", ("e", "f"), "out"),
            ("add", ("out", "e"), "later"),
        ],
        "out",
    ),
)


def evaluate(nodes: Sequence[Node], output: str) -> Tensor:
    """What a graph gives for fixed x and y."""
    values = {"x": torch.tensor([1.5, -2.0, 0.25]), "y": torch.tensor([0.5, 3.0, -4.0])}
    for kind, inputs, name in nodes:
        parts = [values[part] for part in inputs]
        values[name] = -parts[0] if kind == "neg" and len(parts) == 1 else TWO[kind](*parts)
    return values[output]


def _optimize(
    nodes: Sequence[Node],
    output: str,
    *,
    commutes: Sequence[str] = ("add", "mul"),
    merge: bool = True,
    dead: bool = True,
) -> list[Node]:
    """One node for each value that is needed; two negations are none."""
    same: dict[str, str] = {}
    made: dict[tuple, str] = {}
    negated: dict[str, str] = {}
    kept: list[Node] = []
    for kind, inputs, name in nodes:
        parts = tuple(same.get(part, part) for part in inputs)
        key = (kind, tuple(sorted(parts)) if kind in commutes else parts)
        if merge and kind == "neg" and parts[0] in negated:
            same[name] = negated[parts[0]]
        elif merge and key in made:
            same[name] = made[key]
        else:
            made[key] = name
            kept.append((kind, parts, name))
            if kind == "neg":
                negated[name] = parts[0]
    return _needed(kept, output) if dead else kept


def _needed(nodes: Sequence[Node], output: str) -> list[Node]:
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if node[2] in wanted:
            wanted |= set(node[1])
            kept.append(node)
    return kept[::-1]


def _judged(result: Any, nodes: Sequence[Node], output: str) -> str | None:
    try:
        value = evaluate(result, output)
    except KeyError as error:
        return f"your graph uses {error}, which no node before it makes"
    if not torch.allclose(value, evaluate(nodes, output)):
        return "your graph computes another value"
    if len(result) >= len(nodes):
        return f"your graph has {len(result)} nodes, and {len(nodes)} came in"
    return None


def _count(answer: Callable) -> int:
    return sum(len(answer(list(nodes), output)) for nodes, output in GRAPHS)


fewest_nodes = Exercise(
    name="51.4",
    solution=_optimize,
    trials=GRAPHS,
    labels=("nodes", "output"),
    accept=_judged,
    mistakes=(
        Mistake(lambda nodes, output: nodes, "Nothing was left out: begin with nodes that nothing uses."),
        Mistake(
            lambda nodes, output: _optimize(nodes, output, commutes=("add", "mul", "sub")),
            "x − y is not y − x: only add and mul may change the order of their inputs.",
        ),
        Mistake(
            lambda nodes, output: [node for node in _optimize(nodes, output) if node[2] != output],
            "The output's own node is gone: the output is used, by whoever asks.",
        ),
        Mistake(
            lambda nodes, output: _optimize(nodes, output)[::-1],
            "The order is turned over: a node comes after those that make its inputs.",
        ),
        Mistake(
            lambda nodes, output: list({(kind, tuple(sorted(i))): (kind, i, n) for kind, i, n in nodes}.values()),
            "You left out the twin, and those that used it still ask for its name: rename their inputs.",
        ),
        Mistake(
            lambda nodes, output: [node for node in nodes if node[0] != "neg"],
            "A negation alone changes the value: only two in a row are none.",
        ),
    ),
    remark="dead nodes, twins and double negations: a runtime does the same before the first call.",
    score=Score(_count, "nodes", 13),
)
