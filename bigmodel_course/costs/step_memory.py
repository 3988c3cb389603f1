"""What one training step of a GPT keeps in memory, by kind, and what each remedy takes off it."""

from dataclasses import dataclass

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.layers import GPTConfig, gpt, total
from bigmodel_course.costs.memory import sharded_bytes, temporary_bytes

__all__ = ["StepBytes", "step_bytes"]


@dataclass(frozen=True)
class StepBytes:
    """Bytes on one rank, by kind, and the most at one moment.

    `activations` are kept from the forward pass to the backward; `copies` are weights in 16 bits, which autocast makes
    and drops with the forward pass; `working` exists for a moment of the backward pass only: a block that is computed
    again, or gathered.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    copies: int
    working: int
    peak: int


def step_bytes(
    config: GPTConfig,
    sequences: int,
    tokens: int,
    *,
    accumulate: int = 1,
    recompute: bool = False,
    autocast: bool = False,
    ranks: int = 1,
    stage: int = 0,
    rule: str = "AdamW",
) -> StepBytes:
    """Bytes of a step on `sequences` of `tokens` tokens on this rank, weights in float32, as models.GPT keeps them.

    `accumulate`: parts of the batch, one after the other.  `recompute`: blocks keep their input only (Chen et al. 2016,
    arXiv 1604.06174).  `autocast`: products in 16 bits.  `stage`: states sharded over `ranks` (see `sharded_bytes`).
    """
    at_least(1, sequences=sequences, accumulate=accumulate)
    if sequences % accumulate:
        raise ValueError(f"need sequences that accumulate divides, got {sequences=} and {accumulate=}")
    rows = sequences // accumulate * tokens
    layers = gpt(config, tokens=tokens)
    block = total([layer for layer in layers if layer.name.startswith("block 0 ")]).parameters
    root = total(layers).parameters - config.layers * block
    states = sharded_bytes([block] * config.layers + [root], ranks, stage, rule=rule)
    inside = _block_bytes(config, autocast) * rows
    scores = 4 * rows * (config.vocabulary + 2)  # their log-softmax, and the targets
    ends = scores + total([layers[0], *layers[-2:]]).activations * 4 * rows // tokens
    kept = config.layers * (4 * rows * config.width if recompute else inside) + ends
    copies = _copies(config) if autocast else 0
    working = inside if recompute else 0
    if stage:
        largest = max(4 * config.width**2, config.vocabulary * config.width)
        working += temporary_bytes([block] * config.layers, ranks, stage, root=root, largest=largest)
    # Gradients appear as activations go.  With several parts, those of the first are there when the second comes.
    before = states.gradients if accumulate > 1 else 0
    most = max(kept + copies + before, states.gradients + working)
    return StepBytes(*states, kept, copies, working, states.parameters + states.optimizer + most)


def _block_bytes(config: GPTConfig, autocast: bool) -> int:
    """What one block keeps for one token: norms' inputs in float32, the inputs of all products in 16 bits or 32."""
    norms = 2 * 4 * (config.width + 2)
    return norms + (2 if autocast else 4) * 14 * config.width + 4 * config.heads


def _copies(config: GPTConfig) -> int:
    """The weights and biases of all linear layers once more, in 2 bytes."""
    width = config.width
    return 2 * (config.layers * (12 * width**2 + 9 * width) + config.vocabulary * width)
