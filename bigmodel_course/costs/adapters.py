"""What it costs to train only a part of a model: the head alone, a low-rank adapter, or everything.

A layer is chosen by the end of its name, as `transfer.lora.inject_` chooses: "query" is every layer called "...query".
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.layers import Layer, linear, total
from bigmodel_course.costs.training import optimizer_bytes

__all__ = ["EncoderConfig", "encoder", "lora", "trained_parameters", "tuning_bytes", "tuning_flops"]

THREE = ("query", "key", "value")


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of a text encoder: `hidden` is the width inside a block, `context` the longest sentence in tokens."""

    layers: int
    heads: int
    width: int
    hidden: int
    vocabulary: int
    context: int

    def __post_init__(self) -> None:
        at_least(1, **vars(self))
        if self.width % self.heads:
            raise ValueError(f"need a width that the heads divide, got width={self.width} and heads={self.heads}")


def lora(inputs: int, outputs: int, rank: int, *, rows: int = 1) -> list[Layer]:
    """What a low-rank adapter adds to a linear layer: two thin ones, rank * (inputs + outputs) parameters.

    The first reads what the layer itself reads, so only the second keeps something more (Hu et al. 2021, arXiv
    2106.09685, section 4.1).
    """
    at_least(1, rank=rank)
    down = linear(inputs, rank, rows=rows, bias=False)._replace(name="down lora", activations=0)
    return [down, linear(rank, outputs, rows=rows, bias=False)._replace(name="up lora")]


def encoder(
    config: EncoderConfig, *, tokens: int, targets: Iterable[str] = (), rank: int = 0, classes: int = 0
) -> list[Layer]:
    """As transfer.encoder.Encoder on one sentence of `tokens` tokens, under the names of its parts.

    With `targets`, an adapter of `rank`, two layers called "... lora", stands behind each layer that they name; with
    `classes`, a head on the mean of the vectors stands at the end.
    """
    if not 1 <= tokens <= config.context:
        raise ValueError(f"need 1 <= tokens <= context = {config.context}, got {tokens=}")
    tables = (config.vocabulary + config.context + 2) * config.width  # 2 kinds of sentence, of which one is used
    layers = [Layer("embeddings", tables, 0, tokens)]
    layers += [Layer("embeddings.LayerNorm", 2 * config.width, 0, tokens * (config.width + 2))]
    for i in range(config.layers):
        layers += [layer._replace(name=f"encoder.layer.{i}.{layer.name}") for layer in _block(config, tokens)]
    layers += [linear(config.width, classes)._replace(name="head")] if classes else []
    return _with_adapters(layers, _shapes(config), list(targets), rank, tokens)


def _shapes(config: EncoderConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of a block."""
    square = (config.width, config.width)
    shapes = {f"attention.self.{name}": square for name in THREE}
    shapes |= {"attention.output.dense": square, "intermediate.dense": (config.width, config.hidden)}
    return shapes | {"output.dense": (config.hidden, config.width)}


def _block(config: EncoderConfig, tokens: int) -> list[Layer]:
    width, hidden = config.width, config.hidden
    parts = {name: linear(*shape, rows=tokens) for name, shape in _shapes(config).items()}
    for name in ("key", "value"):  # the three share one input
        parts[f"attention.self.{name}"] = parts[f"attention.self.{name}"]._replace(activations=0)
    parts["attention"] = Layer("", 0, 4 * tokens**2 * width, tokens * (3 * width + config.heads))
    parts["gelu"] = Layer("", 0, 0, tokens * hidden)
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        parts[name] = Layer("", 2 * width, 0, tokens * (width + 2))
    order = ("attention.self.query", "attention.self.key", "attention.self.value", "attention")
    order += ("attention.output.dense", "attention.output.LayerNorm")
    order += ("intermediate.dense", "gelu", "output.dense", "output.LayerNorm")
    return [parts[name]._replace(name=name) for name in order]


def _with_adapters(
    layers: list[Layer], shapes: dict[str, tuple[int, int]], targets: list[str], rank: int, tokens: int
) -> list[Layer]:
    found = []
    for layer in layers:
        found.append(layer)
        shape = next((shape for end, shape in shapes.items() if layer.name.endswith(f".{end}")), None)
        if shape and _named(layer.name, targets):
            found += [one._replace(name=f"{layer.name} {one.name}") for one in lora(*shape, rank, rows=tokens)]
    if targets and len(found) == len(layers):
        raise ValueError(f"targets must name linear layers, the ends of {', '.join(shapes)}, got {targets}")
    return found


def trained_parameters(layers: Sequence[Layer], trained: Iterable[str] | None = None) -> int:
    """How many parameters learn: those of the layers that `trained` names; None means all."""
    return sum(layer.parameters for layer in _chosen(layers, trained))


def tuning_bytes(
    layers: Sequence[Layer], rule: str, *, trained: Iterable[str] | None = None, bytes_each: int = 4
) -> int:
    """All weights, and of what is trained the gradient and what the rule remembers; activations come on top."""
    learn = trained_parameters(layers, trained)
    return (total(layers).parameters + learn) * bytes_each + optimizer_bytes(learn, rule, bytes_each)


def tuning_flops(layers: Sequence[Layer], trained: Iterable[str] | None = None) -> int:
    """Forward and backward of one example when only the layers that `trained` names learn; None means all.

    A layer's weight gradient is one more product as large as its forward, if it learns; the gradient of its input is
    another, if anything before it learns.  So below the first layer that learns nothing is computed backward, and above
    it a frozen layer costs two thirds of one that learns.
    """
    learns = {layer.name for layer in _chosen(layers, trained)}
    spent, below, three = total(layers).flops, False, {}  # below: whether anything before the layer learns
    for layer in layers:
        part, learning = _part_of_attention(layer.name), layer.name in learns
        if part == "query" and part not in three:
            three = dict.fromkeys(THREE, below)  # the three read one input, not one another
        before = three[part] if part else below
        if three and not part and layer.name.endswith("attention"):
            spent += layer.flops // 2 * (sum(three.values()) + (three["query"] or three["key"]))
        elif layer.name.endswith("attention"):
            spent += layer.flops * 2 * before
        else:
            spent += layer.flops * (learning + before)
        if part:
            three[part] |= learning
        else:
            three = {}
        below |= learning
    return spent


def _part_of_attention(name: str) -> str:
    found = re.search(r"\b(query|key|value)( (down|up) lora)?$", name)
    return found[1] if found else ""


def _chosen(layers: Sequence[Layer], trained: Iterable[str] | None) -> list[Layer]:
    if trained is None:
        return list(layers)
    trained = list(trained)
    for target in trained:
        if not any(_named(layer.name, [target]) for layer in layers):
            raise ValueError(f"trained must name layers, got {target!r}; there are {[one.name for one in layers]}")
    return [layer for layer in layers if _named(layer.name, trained)]


def _named(name: str, targets: Iterable[str]) -> bool:
    return any(re.search(rf"(^|[. ]){re.escape(target)}$", name) for target in targets)
