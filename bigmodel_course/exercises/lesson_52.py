"""Lesson 52, the runtime: a percentile, what a quantizer left in float, a graph in the fewest kernels."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import numpy as np

from bigmodel_course.checks import Exercise, Mistake, Score

__all__ = ["fewest_kernels", "left_in_float", "percentile", "run"]


def _rank(times: Sequence[float], percent: float) -> int:
    return math.ceil(percent * len(times) / 100)


_TIMES = [4.0, 1.5, 2.0, 9.0, 2.5, 1.0, 3.0, 2.25, 1.25, 70.0]

percentile = Exercise(
    name="52.1",
    solution=lambda times, percent: sorted(times)[_rank(times, percent) - 1],
    trials=((_TIMES, 50), (_TIMES, 95), (_TIMES, 99), (_TIMES[:7], 90), ([5.0, 3.0], 1)),
    labels=("times", "percent"),
    mistakes=(
        Mistake(
            lambda times, percent: times[_rank(times, percent) - 1],
            "You take a place in the order of the calls: sort the times first.",
        ),
        Mistake(
            lambda times, percent: sorted(times)[min(_rank(times, percent), len(times) - 1)],
            "One place too far: the smallest of the sorted times has rank 1 and index 0.",
        ),
        Mistake(
            lambda times, percent: sorted(times)[max(int(percent * len(times) / 100) - 1, 0)],
            "You round the rank down: then fewer than `percent` % of the calls are that fast. Round up.",
        ),
        Mistake(
            lambda times, percent: float(np.percentile(times, percent)),
            "You interpolate between two calls: return a time that was really measured.",
        ),
        Mistake(
            lambda times, percent: mean(times),
            "This is the mean: one slow call moves it as far as it likes.",
        ),
        Mistake(
            lambda times, percent: sorted(times, reverse=True)[_rank(times, percent) - 1],
            "You count from the slow end: the 99th percentile is one of the slowest times.",
        ),
    ),
    remark="at least that share of the calls were this fast, and the value was measured.",
)

Node = tuple[str, tuple[str, ...], str]  # operator, inputs, output
PRODUCTS = ("MatMul", "Gemm")


def _graph(text: str) -> list[Node]:
    """Nodes from lines such as "y = MatMul x w"."""
    lines = (line.split() for line in text.strip().splitlines())
    return [(op, tuple(inputs), output) for output, _, op, *inputs in lines]


def _products(nodes: Sequence[Node], wanted: Callable[[str, str], bool]) -> list[str]:
    """The outputs of the products whose operator and second input are wanted."""
    return [output for op, inputs, output in nodes if op in PRODUCTS and wanted(op, inputs[1])]


def _turned(nodes: Sequence[Node], weights: Sequence[str]) -> set[str]:
    """What is a stored weight, only transposed."""
    return {output for op, inputs, output in nodes if op == "Transpose" and inputs[0] in weights}


def _left(nodes: Sequence[Node], weights: Sequence[str], sees: Sequence[str]) -> list[str]:
    turned = _turned(nodes, weights)
    return _products(nodes, lambda op, weight: weight in turned or (weight in weights and op not in sees))


_GPT = (
    _graph("""
    stream = Gather embedding tokens
    qk = MatMul stream w_qk
    q = Split qk
    k = Transpose qk
    attention = MatMul q k
    up = Gemm attention w_up b_up
    down = MatMul up w_down
    head = Transpose embedding
    scores = MatMul down head
    """),
    ["embedding", "w_qk", "w_up", "b_up", "w_down"],
)
_MLP = (
    _graph("""
    h = Gemm x w0 b0
    r = Relu h
    m = MatMul r w1
    w2t = Transpose w2
    y = Gemm m w2t b2
    """),
    ["w0", "b0", "w1", "w2", "b2"],
)

left_in_float = Exercise(
    name="52.2",
    solution=_left,
    trials=((*_GPT, ("MatMul",)), (*_GPT, ("MatMul", "Gemm")), (*_MLP, ("MatMul",)), (*_MLP, ("Gemm",))),
    labels=("nodes", "weights", "sees"),
    mistakes=(
        Mistake(
            lambda nodes, weights, sees: _products(nodes, lambda op, weight: op not in sees or weight not in weights),
            "Attention multiplies two activations: there is no weight to store in int8, so nothing was left out.",
        ),
        Mistake(
            lambda nodes, weights, sees: _products(nodes, lambda op, weight: op not in sees and weight in weights),
            "The tied head is missing: its second input is a transposed weight, which no quantizer recognises.",
        ),
        Mistake(
            lambda nodes, weights, sees: _products(nodes, lambda op, weight: weight in _turned(nodes, weights)),
            "What the quantizer does not look at stays in float too: compare each operator with `sees`.",
        ),
        Mistake(
            lambda nodes, weights, sees: _left([node for node in nodes if node[0] != "Gemm"], weights, sees),
            "Gemm is a product as well: it multiplies and adds a bias.",
        ),
        Mistake(
            lambda nodes, weights, sees: _products(nodes, lambda op, weight: op in sees and weight in weights),
            "These are the products that were quantized: return the others.",
        ),
        Mistake(
            lambda nodes, weights, sees: _left(nodes, weights, ("MatMul",)),
            "You assume that the quantizer looks at MatMul only: `sees` says what it looks at.",
        ),
        Mistake(
            lambda nodes, weights, sees: [out for op, inputs, out in nodes if op in PRODUCTS and inputs[0] in weights],
            "Ask whether the second input comes from a weight; the first is the activation.",
        ),
    ),
    remark="count them after every quantization: a silent omission costs speed and bytes, and no error tells you.",
)

Weights = Mapping[str, np.ndarray]
Graph = tuple[list[Node], Weights]
KERNELS: dict[str, Callable[..., np.ndarray]] = {
    "MatMul": lambda a, b: a @ b,
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "Relu": lambda a: np.maximum(a, 0),
    "Transpose": lambda a: a.T,
    "Identity": lambda a: a,
    "Gemm": lambda a, w, b: a @ w + b,
    "FusedGemm": lambda a, w, b: np.maximum(a @ w + b, 0),
}


def run(nodes: Sequence[Node], weights: Weights, x: np.ndarray) -> np.ndarray:
    """What the graph gives as "y" for the input "x": a runtime in three lines."""
    values = {"x": x, **weights}
    for op, inputs, output in nodes:
        values[output] = KERNELS[op](*(values[name] for name in inputs))
    return values["y"]


def _renamed(nodes: Sequence[Node], names: Mapping[str, str]) -> list[Node]:
    return [(op, tuple(names.get(n, n) for n in inputs), names.get(output, output)) for op, inputs, output in nodes]


def _without_identity(nodes: Sequence[Node]) -> list[Node]:
    """Identity nodes dropped; where one makes the output, its input takes that name."""
    for node in [node for node in nodes if node[0] == "Identity"]:
        (source,), output = node[1:]
        rest = [other for other in nodes if other != node]
        nodes = _renamed(rest, {source: "y"} if output == "y" else {output: source})
    return list(nodes)


def _folded(nodes: Sequence[Node], weights: Weights) -> Graph:
    """What depends on weights alone, computed once."""
    weights, left = dict(weights), []
    for op, inputs, output in nodes:
        if all(name in weights for name in inputs):
            weights[output] = KERNELS[op](*(weights[name] for name in inputs))
        else:
            left.append((op, inputs, output))
    return left, weights


def _alive(nodes: Sequence[Node]) -> list[Node]:
    needed, kept = {"y"}, []
    for op, inputs, output in reversed(nodes):
        if output in needed:
            needed |= set(inputs)
            kept.append((op, inputs, output))
    return kept[::-1]


def _pair(nodes: Sequence[Node], first: Sequence[str], second: str, *, once: bool = True) -> tuple[Node, Node] | None:
    """Two nodes, the second of which is the only one to use what the first makes."""
    uses = Counter(name for _, inputs, _ in nodes for name in inputs)
    makes = {node[2]: node for node in nodes if node[0] in first}
    for node in nodes:
        if node[0] == second and node[1][0] in makes and (not once or uses[node[1][0]] == 1):
            return makes[node[1][0]], node
    return None


def _replaced(nodes: Sequence[Node], pair: tuple[Node, Node], new: Node) -> list[Node]:
    return [new if node == pair[1] else node for node in nodes if node != pair[0]]


def _fused(nodes: list[Node], weights: Weights, *, once: bool = True) -> Graph:
    """MatMul and Add to Gemm, then Gemm and Relu to FusedGemm, where nobody else wants what is between."""
    while pair := _pair(nodes, ("MatMul",), "Add"):
        (_, (x, w), _), (_, (_, b), output) = pair
        if b not in weights:
            break
        nodes = _replaced(nodes, pair, ("Gemm", (x, w, b), output))
    while pair := _pair(nodes, ("Gemm",), "Relu", once=once):
        nodes = _replaced(nodes, pair, ("FusedGemm", pair[0][1], pair[1][2]))
        if not once:  # the wrong one: whoever else wanted the sum gets it after the ReLU
            nodes = [(op, tuple(pair[1][2] if n == pair[0][2] else n for n in i), out) for op, i, out in nodes]
    return nodes, weights


def _multiplied(nodes: list[Node], weights: Weights, *, first: Sequence[str] = ("Gemm",), carry: bool = True) -> Graph:
    """Two linear layers with nothing between them are one: (x V + a) W + b = x (V W) + (a W + b)."""
    weights = dict(weights)
    while pair := _pair(nodes, first, "Gemm"):
        (_, (x, v, a), _), (_, (_, w, b), output) = pair
        weights[v + w] = weights[v] @ weights[w]
        weights[a + b] = (weights[a] @ weights[w] if carry else 0) + weights[b]
        nodes = _replaced(nodes, pair, ("Gemm", (x, v + w, a + b), output))
    return nodes, weights


def _optimised(
    nodes: Sequence[Node], weights: Weights, *, once: bool = True, first: Sequence[str] = ("Gemm",), carry: bool = True
) -> Graph:
    left, folded = _folded(_without_identity(nodes), weights)
    return _multiplied(*_fused(_alive(left), folded, once=once), first=first, carry=carry)


def _unturned(nodes: Sequence[Node], weights: Weights) -> Graph:
    """Transposes dropped, and the weights left as they lie."""
    names = {output: inputs[0] for op, inputs, output in nodes if op == "Transpose"}
    return _optimised([(op, tuple(names.get(n, n) for n in i), o) for op, i, o in nodes if op != "Transpose"], weights)


def _called(answer: Callable, nodes: list[Node], weights: Weights) -> object:
    """The weights as a sorted list, so that graphs with other names can be compared."""
    result = answer(nodes, weights)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result[0], sorted(result[1].items())
    return result


def _judged(result: Graph, nodes: list[Node], weights: Weights) -> str | None:
    if not isinstance(result, tuple) or len(result) != 2:
        return "return two things, nodes and weights"
    result, x = (result[0], dict(result[1])), np.random.default_rng(0).standard_normal((7, 6))
    made = {"x", *result[1]}
    for op, inputs, output in result[0]:
        if op not in KERNELS:
            return f"{op!r} is no operator: there are {', '.join(KERNELS)}"
        if missing := [name for name in inputs if name not in made]:
            return f"{op} reads {missing[0]!r}, which nothing before it makes"
        made.add(output)
    if "y" not in made:
        return "nothing makes 'y', the output"
    if len(result[0]) >= len(nodes):
        return f"the graph still has {len(result[0])} nodes, as many as before"
    want, got = run(nodes, weights, x), run(*result, x)
    if got.shape != want.shape:
        return f"'y' has shape {got.shape}, expected {want.shape}"
    worst = float(np.abs(got - want).max())
    return None if worst < 1e-9 else f"'y' differs by up to {worst:.3g}"


def _weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(shapes))
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


_SMALL = (
    _graph("""
    m1 = MatMul x w1
    a1 = Add m1 b1
    r1 = Relu a1
    d1 = Identity r1
    t2 = Transpose w2
    m2 = MatMul d1 t2
    y = Add m2 b2
    """),
    _weights(w1=(6, 5), b1=(5,), w2=(5, 5), b2=(5,)),
)
_LARGE = (  # a2 is used twice, `unused` never, and nothing stands between the last two products
    _graph("""
    t1 = Transpose w1
    s1 = Mul t1 scale
    m1 = MatMul x s1
    a1 = Add m1 b1
    r1 = Relu a1
    d1 = Identity r1
    t2 = Transpose w2
    m2 = MatMul d1 t2
    a2 = Add m2 b2
    r2 = Relu a2
    s2 = Add r2 a2
    m3 = MatMul s2 w3
    a3 = Add m3 b3
    unused = Relu a3
    m4 = MatMul a3 w4
    a4 = Add m4 b4
    y = Identity a4
    """),
    _weights(w1=(6, 6), scale=(6,), b1=(6,), w2=(6, 6), b2=(6,), w3=(6, 4), b3=(4,), w4=(4, 3), b4=(3,)),
)

fewest_kernels = Exercise(
    name="52.3",
    solution=_optimised,
    use=_called,
    accept=_judged,
    trials=(_SMALL, _LARGE),
    labels=("nodes", "weights"),
    mistakes=(
        Mistake(
            lambda nodes, weights: _folded([n for n in nodes if n[0] != "Identity"], weights),
            "Who drops an Identity must give its input to those who read its output.",
        ),
        Mistake(_unturned, "A folded Transpose must be computed: store the turned weight under the new name."),
        Mistake(
            lambda nodes, weights: _optimised(nodes, weights, once=False),
            "Somebody else reads the sum before the ReLU: fuse only what is used once.",
        ),
        Mistake(
            lambda nodes, weights: _optimised(nodes, weights, first=("Gemm", "FusedGemm")),
            "You multiplied two matrices with a ReLU between them: that is not linear.",
        ),
        Mistake(
            lambda nodes, weights: _optimised(nodes, weights, carry=False),
            "Two linear layers in one: the first bias goes through the second matrix, a W + b.",
        ),
        Mistake(
            lambda nodes, weights: _optimised(nodes, weights)[0],
            "Return the weights too: folding has made new ones.",
        ),
        Mistake(
            lambda nodes, weights: (_optimised(nodes, weights)[0], weights),
            "The nodes read folded weights, and you return the old ones.",
        ),
        Mistake(
            lambda nodes, weights: (list(nodes), weights),
            "This is the graph as it was: fold, fuse, and drop what nobody reads.",
        ),
    ),
    remark="the same answer from fewer kernels, which is all that an optimisation level does.",
    score=Score(lambda answer: len(answer(*_LARGE)[0]), "kernels", 6),
)
