"""Plan the training of a large model: does a layout fit, how long does a step take, and which term limits it?

Sources: memory of the states, Rajbhandari et al. 2020 (arXiv 1910.02054, section 3); of the activations, Korthikanti et
al. 2022 (arXiv 2205.05198, section 4); pipeline and traffic, Narayanan et al. 2021 (arXiv 2104.04473, section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from bigmodel_course.costs.arguments import positive
from bigmodel_course.costs.clusters import Cluster, Layout
from bigmodel_course.costs.pipeline import bubble_fraction
from bigmodel_course.costs.sharding import Key, data_traffic, held, tensor_traffic
from bigmodel_course.costs.transformers import Transformer

__all__ = ["Plan", "activation_bytes", "plan", "search_layouts"]

# Bytes a parameter in mixed precision with Adam: 16-bit weight and gradient; 32-bit weight, mean and square.
WEIGHT, GRADIENT, STATES = 2, 2, 12


@dataclass(frozen=True)
class Plan:
    """What `plan` says of one layout; bytes and seconds are those of the fullest device.

    `memory` by kind in bytes; `traffic` by (axis, collective), bytes that a device sends in a step; `seconds` by what
    the step waits for.
    `flops` are the model's, `hardware_flops` those that the devices compute, with what is computed again.
    """

    layout: Layout
    parameters: int
    memory: dict[str, float]
    fits: bool
    why: str
    flops: int
    hardware_flops: int
    traffic: dict[Key, float]
    bubble: float
    seconds: dict[str, float]
    tokens: int
    peak: float
    cluster: Cluster

    @property
    def step_seconds(self) -> float:
        """Time of one step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the whole cluster reads in a second."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the model's FLOPs over what the devices could have computed meanwhile."""
        return self.flops / self.step_seconds / self.peak

    @property
    def device_flops(self) -> float:
        """FLOP/s of one device, what is computed again counted as well (as Narayanan et al. report it)."""
        return self.hardware_flops / self.step_seconds / self.cluster.devices

    def training(self, tokens: float) -> dict[str, float]:
        """Days, cost of the devices, energy (kWh) and its cost, to read `tokens` tokens; failures not counted."""
        positive(tokens=tokens)
        hours = tokens / self.tokens_per_second / 3600
        energy = hours * self.cluster.devices * self.cluster.device.watts / 1000
        bill = {"days": hours / 24, "devices": hours * self.cluster.devices * self.cluster.price}
        return bill | {"kWh": energy, "electricity": energy * self.cluster.electricity}


def activation_bytes(model: Transformer, layout: Layout) -> float:
    """Bytes that one block keeps for the backward pass of one microbatch, on one device, in 16 bits.

    A GPT as Korthikanti et al., equations 1 to 6, with dropout; a gated model without dropout, its attention fused.
    Selective recomputation runs a GPT's attention again, and of a gated model the norms and the product with the gate.
    """
    tokens, width, cut = layout.microbatch * model.context, model.width, layout.tensor
    shared = cut if layout.sequence else 1  # over how many devices norms, dropout and the blocks' inputs are divided
    if layout.recompute == "full":
        return 2 * tokens * width / shared
    if model.gated:
        norms, products = (8, 4) if layout.recompute == "none" else (4, 2)  # selective: what is elementwise, again
        inside = 2 * (2 * width + 2 * model.key_value_width + products * model.inner) + 4 * model.heads
        return tokens * (norms * width / shared + inside / cut)
    attention = 5 * model.heads * model.context * tokens / cut if layout.recompute == "none" else 0
    return tokens * width * (10 / shared + 24 / cut) + attention


def plan(model: Transformer, cluster: Cluster, layout: Layout) -> Plan:
    """Predict memory, FLOPs, traffic and time of one step; ValueError where `layout` cannot be laid out at all."""
    layout.check(model, cluster)
    memory = max((_memory(model, layout, last) for last in (False, True)), key=lambda kinds: sum(kinds.values()))
    tokens = layout.batch * model.context
    flops = layout.batch * model.training_flops()
    hardware = flops + layout.batch * model.layers * _again(model, layout)
    traffic, seconds, bubble = _time(model, cluster, layout)
    fits = sum(memory.values()) <= cluster.device.memory
    why = _limit(seconds) if fits else _overflow(memory, cluster.device.memory)
    peak = cluster.devices * cluster.device.flops
    return Plan(
        layout, model.parameters, memory, fits, why, flops, hardware, traffic, bubble, seconds, tokens, peak, cluster
    )


def _again(model: Transformer, layout: Layout) -> int:
    """FLOPs of one block and sequence that are computed a second time: matrix products only, so none that are fused."""
    attention = 0 if model.gated else 4 * model.context**2 * model.width
    return {"none": 0, "selective": attention, "full": model.block_flops()}[layout.recompute]


def _states(model: Transformer, layout: Layout, last: bool, shards: int) -> int:
    """Parameters of the first or the last stage on one device, divided over `shards` ranks as well."""
    ends = model.outside() if layout.pipeline == 1 else model.after() if last else model.before()
    return layout.layers(model) * held(model.block(), shards, layout.tensor) + held(ends, shards, layout.tensor)


def _memory(model: Transformer, layout: Layout, last: bool) -> dict[str, float]:
    whole = _states(model, layout, last, 1)
    part = _states(model, layout, last, layout.data)
    sharded = [whole if layout.stage < level else part for level in (3, 2, 1)]
    memory = dict(zip(("parameters", "gradients", "optimizer"), sharded, strict=True))
    memory = {kind: memory[kind] * size for kind, size in zip(memory, (WEIGHT, GRADIENT, STATES), strict=True)}
    outside, block = held(model.outside(), 1, layout.tensor), held(model.block(), 1, layout.tensor)
    # ZeRO-3 gathers two blocks, one at work and the next, their gradient, and what stands outside the blocks.
    memory["gathered"] = WEIGHT * (3 * block + outside) if layout.stage == 3 else 0
    stages, microbatches = layout.pipeline, layout.microbatches
    live = min(microbatches, 1 if last else stages)
    interleaved = 1 + (stages - 1) / (stages * layout.chunks) if layout.chunks > 1 else 1
    kept = activation_bytes(model, layout) * layout.layers(model) * live * interleaved
    working = 0 if layout.recompute != "full" else activation_bytes(model, _without_recompute(layout))
    memory["activations"] = kept + working
    logits = layout.microbatch * model.context * model.vocabulary / layout.tensor  # 16 bits, and 32 for the loss
    memory["logits"] = 6 * logits if last or stages == 1 else 0
    return memory


def _without_recompute(layout: Layout) -> Layout:
    """The same layout while one block's forward pass is computed again; its attention is fused or dropped at once."""
    return replace(layout, recompute="selective")


def _time(model: Transformer, cluster: Cluster, layout: Layout) -> tuple[dict[Key, float], dict[str, float], float]:
    """Bytes that a device sends, seconds by what the step waits for, and the share of idle time."""
    per, sent = layout.microbatches, _sent(model, layout)
    spans = {"tensor": layout.tensor, "pipeline": layout.tensor * layout.pipeline, "data": layout.devices}
    by_axis = {axis: sum(size for (each, _), size in sent.items() if each == axis) for axis in spans}
    seconds = {axis: by_axis[axis] / cluster.bandwidth(span) for axis, span in spans.items()}
    rate = cluster.device.flops * cluster.efficiency
    seconds["compute"] = per * _slowest_stage_flops(model, layout) / rate
    bubble = bubble_fraction(layout.pipeline, per, chunks=layout.chunks)
    busy = seconds["compute"] + seconds["tensor"] + seconds["pipeline"]
    seconds["bubble"] = busy * bubble / (1 - bubble)
    if layout.overlap:  # behind the backward pass: of every microbatch from ZeRO-2 on, else of the last one
        hidden = seconds["compute"] * 2 / 3 / (1 if layout.stage >= 2 else per)
        seconds["data"] = max(0.0, seconds["data"] - hidden)
    return sent, seconds, bubble


def _sent(model: Transformer, layout: Layout) -> dict[Key, float]:
    """Bytes that a device sends in a step, in 16 bits: a ring sends (n - 1) / n of the larger buffer, all-reduce twice.

    The buffers are those of `sharded_step`, which torch's own code is held to.
    """
    fullest = replace(model, layers=layout.layers(model))
    tokens, cut = layout.microbatch * model.context, layout.tensor
    again, ends = layout.recompute == "full", 2 if layout.pipeline == 1 else 1
    calls = tensor_traffic(fullest, cut, tokens, again, ends=ends, sequence=layout.sequence)
    if layout.stage == 3:
        calls += data_traffic(fullest, layout.data, cut)
    rings = {"tensor": (cut - 1) / cut, "data": (layout.data - 1) / layout.data}
    sent: dict[Key, float] = {}
    for (axis, kind), count, size in calls:
        times = (2 if kind == "all-reduce" else 1) * count * layout.microbatches
        sent[axis, kind] = sent.get((axis, kind), 0) + WEIGHT * times * rings[axis] * size
    if layout.stage < 3 and layout.data > 1:
        sent |= _gradients_sent(model, layout, rings["data"])
    if layout.pipeline > 1:
        boundary = 2 * layout.chunks * WEIGHT * tokens * model.width * layout.microbatches
        sent["pipeline", "send"] = boundary / (cut if layout.sequence else 1)
    return sent


def _gradients_sent(model: Transformer, layout: Layout, ring: float) -> dict[Key, float]:
    """Once a step; at stage 2 the gradients are scattered after each microbatch."""
    size = ring * GRADIENT * max(_states(model, layout, last, 1) for last in (False, True))
    if layout.stage == 0:
        return {("data", "all-reduce"): 2 * size}
    times = layout.microbatches if layout.stage == 2 else 1
    return {("data", "reduce-scatter"): times * size, ("data", "all-gather"): size}


def _slowest_stage_flops(model: Transformer, layout: Layout) -> float:
    """One microbatch forward and backward on one device of the last stage, which has the head as well."""
    block = 3 * model.block_flops() + _again(model, layout)
    return layout.microbatch * (layout.layers(model) * block + 3 * model.head_flops()) / layout.tensor


def _overflow(memory: dict[str, float], limit: float) -> str:
    largest = max(memory, key=memory.get)
    advice = {
        "parameters": "divide it over tensor or pipeline ranks, or with stage 3 over data ranks",
        "gradients": "shard them with stage 2",
        "optimizer": "shard it over data ranks with stage 1, or over tensor and pipeline ranks",
        "gathered": "divide the blocks over tensor ranks",
        "activations": "recompute them, or take a smaller microbatch or more tensor ranks",
        "logits": "take a smaller microbatch or more tensor ranks",
    }[largest]
    return (
        f"does not fit: {sum(memory.values()) / 1e9:.1f} GB of {limit / 1e9:.0f} GB a device; "
        f"the largest part is {largest} with {memory[largest] / 1e9:.1f} GB: {advice}"
    )


def _limit(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    largest = max(seconds, key=seconds.get)
    return f"fits; {largest} takes {seconds[largest] / total:.0%} of the step"


def search_layouts(
    model: Transformer, cluster: Cluster, batch: int, *, recompute: tuple[str, ...] = ("none", "selective", "full")
) -> list[Plan]:
    """All layouts that can be laid out, the best first: those that fit by their time, then the others by their memory.

    Tensor parallelism stays within a node; sizes of groups and microbatches are powers of two.
    """
    plans = [plan(model, cluster, layout) for layout in _layouts(model, cluster, batch, recompute)]
    return sorted(plans, key=lambda p: (0, p.step_seconds) if p.fits else (1, sum(p.memory.values())))


def _layouts(model: Transformer, cluster: Cluster, batch: int, recompute: tuple[str, ...]) -> Iterator[Layout]:
    powers = [2**i for i in range(cluster.devices.bit_length())]
    for tensor, pipeline, microbatch, chunks in product(powers[:7], powers[:7], (1, 2, 4), (1, 2, 4)):
        data, rest = divmod(cluster.devices, tensor * pipeline)
        if rest or tensor > cluster.node or not data or batch % (data * microbatch) or (chunks > 1 and pipeline == 1):
            continue
        for stage, again in product((1, 3) if pipeline == 1 else (1,), recompute):
            layout = Layout(data, tensor, pipeline, batch, microbatch, chunks, stage, again)
            if _possible(layout, model, cluster):
                yield layout


def _possible(layout: Layout, model: Transformer, cluster: Cluster) -> bool:
    try:
        layout.check(model, cluster)
    except ValueError:
        return False
    return True
