"""Published numbers of real trainings beside the planner's own: what it gets right, and where it is off.

Of the time, one constant is ours: the share of the peak that matrix products reach, `EFFICIENCY`, the same in all rows.
"""

from typing import NamedTuple

from bigmodel_course.costs.clusters import DEVICES, Cluster, Layout
from bigmodel_course.costs.planning import Plan, activation_bytes, plan
from bigmodel_course.costs.transformers import TRANSFORMERS, Transformer

__all__ = ["EFFICIENCY", "Published", "published"]

EFFICIENCY = 0.6


class Published(NamedTuple):
    """One published number and ours; `quantity` is "parameters", "flops", "memory" or "time"."""

    quantity: str
    what: str
    unit: str
    published: float
    ours: float
    source: str

    @property
    def off(self) -> float:
        """How far ours is from the published one, as a share of it; with a sign."""
        return self.ours / self.published - 1


ZERO, NARAYANAN = "arXiv 1910.02054, figure 1", "arXiv 2104.04473, table 1"
SAVED, RECOMPUTED = "arXiv 2205.05198, section 5", "arXiv 2205.05198, table 5"
GPT3, LLAMA3 = "arXiv 2005.14165, table 2.1", "arXiv 2407.21783, table 4"
GPT3_FLOPS, ESTIMATED = "arXiv 2005.14165, table D.1", "arXiv 2104.04473, section 5.1"

# Devices, tensor, pipeline, batch, measured TFLOP/s a device (Narayanan et al. 2021, table 1).
WEAK_SCALING = {
    "Megatron 1.7B": (32, 1, 1, 512, 137),
    "Megatron 3.6B": (64, 2, 1, 512, 138),
    "Megatron 7.5B": (128, 4, 1, 512, 142),
    "Megatron 18.4B": (256, 8, 1, 1024, 135),
    "Megatron 39.1B": (512, 8, 2, 1536, 138),
    "Megatron 76.1B": (1024, 8, 4, 1792, 140),
    "Megatron 145.6B": (1536, 8, 8, 2304, 148),
    "Megatron 310.1B": (1920, 8, 16, 2160, 155),
    "Megatron 529.6B": (2520, 8, 35, 2520, 163),
    "Megatron 1008.0B": (3072, 8, 64, 3072, 163),
}
# Model, pipeline, chunks, batch, microbatch, seconds with everything computed again, and with attention only (table 5).
RECOMPUTATION = {
    "22B": (Transformer(48, 6144, 64, 51_200, 2048), 1, 1, 4, 4, 1.42, 1.10),
    "175B": (Transformer(96, 12_288, 96, 51_200, 2048), 8, 3, 64, 1, 18.13, 13.75),
    "530B": (TRANSFORMERS["Megatron 529.6B"], 35, 3, 280, 1, 49.05, 37.83),
    "1T": (TRANSFORMERS["Megatron 1008.0B"], 64, 1, 512, 1, 94.42, 71.49),
}


def published() -> list[Published]:
    """Every row, computed now: parameters, FLOPs, memory (states and activations), and time."""
    exact = [*_parameters(), _flops(), *_states(), *_activations()]
    return [*exact, *_weak_scaling(), *_recomputation(), *_llama(), *_whole_trainings()]


def _parameters() -> list[Published]:
    rows = [("GPT-3 175B", 175.0, GPT3), ("Llama 3 405B", 405.0, "arXiv 2407.21783, table 3")]
    rows += [(name, float(name.split()[1][:-1]), NARAYANAN) for name in WEAK_SCALING]
    return [
        Published("parameters", name, "billion", billions, TRANSFORMERS[name].parameters / 1e9, source)
        for name, billions, source in rows
    ]


def _flops() -> Published:
    """GPT-3's whole training, 300 billion tokens; the published one leaves attention's T x T products out."""
    model = TRANSFORMERS["GPT-3 175B"]
    ours = 300e9 / model.context * model.training_flops() / 1e23
    return Published("flops", "GPT-3 175B, 300 billion tokens", "10^23", 3.14, ours, GPT3_FLOPS)


def _states() -> list[Published]:
    """ZeRO's example: 7.5 billion parameters on 64 devices, by stage."""
    cluster, model = Cluster(DEVICES["A100"], 64), TRANSFORMERS["Megatron 7.5B"]
    rows = []
    for stage, gigabytes in enumerate((120.0, 31.4, 16.6, 1.9)):
        memory = plan(model, cluster, Layout(64, batch=64, stage=stage)).memory
        ours = sum(memory[kind] for kind in ("parameters", "gradients", "optimizer")) / 1e9
        rows.append(Published("memory", f"ZeRO-{stage}, 7.5B on 64 devices", "GB", gigabytes, ours, ZERO))
    return rows


def _activations() -> list[Published]:
    """The share of the activations that selective recomputation saves in GPT-3 and in a 530B model."""
    rows = []
    for name, percent in (("175B", 70.0), ("530B", 65.0)):
        kept = [
            activation_bytes(RECOMPUTATION[name][0], Layout(1, 8, recompute=kind)) for kind in ("none", "selective")
        ]
        ours = 100 * (1 - kept[1] / kept[0])
        rows.append(Published("memory", f"{name}, selective recomputation", "% saved", percent, ours, SAVED))
    return rows


def _weak_scaling() -> list[Published]:
    """The microbatch is not published: the planner takes the fastest that fits."""
    rows = []
    for name, (devices, tensor, pipeline, batch, teraflops) in WEAK_SCALING.items():
        cluster, data = Cluster(DEVICES["A100"], devices, efficiency=EFFICIENCY), devices // (tensor * pipeline)
        layouts = [
            Layout(data, tensor, pipeline, batch, size, recompute="full", sequence=False, overlap=False)
            for size in (1, 2, 4, 8)
            if batch % (data * size) == 0
        ]
        best = min((p for p in _plans(name, cluster, layouts) if p.fits), key=lambda p: p.step_seconds)
        rows.append(Published("time", name, "TFLOP/s a device", teraflops, best.device_flops / 1e12, NARAYANAN))
    return rows


def _plans(name: str, cluster: Cluster, layouts: list[Layout]) -> list[Plan]:
    return [plan(TRANSFORMERS[name], cluster, layout) for layout in layouts]


def _recomputation() -> list[Published]:
    rows = []
    for name, (model, pipeline, chunks, batch, size, full, selective) in RECOMPUTATION.items():
        cluster = Cluster(DEVICES["A100"], 8 * pipeline, efficiency=EFFICIENCY)
        for kind, sequence, seconds in (("full", False, full), ("selective", True, selective)):
            layout = Layout(1, 8, pipeline, batch, size, chunks, 0, kind, sequence)
            ours = plan(model, cluster, layout).step_seconds
            rows.append(Published("time", f"{name}, recompute {kind}", "s a step", seconds, ours, RECOMPUTED))
    return rows


def _llama() -> list[Published]:
    """Two rows of three: the third divides each sequence of 131,072 tokens as well, which no `Layout` does."""
    rows = []
    for devices, data, teraflops in ((8192, 64, 430.0), (16_384, 128, 400.0)):
        cluster = Cluster(DEVICES["H100"], devices, efficiency=EFFICIENCY)
        layout = Layout(data, 8, 16, 2048, 1, 4, recompute="selective")
        ours = plan(TRANSFORMERS["Llama 3 405B"], cluster, layout).device_flops / 1e12
        what = f"Llama 3 405B on {devices:,}"
        rows.append(Published("time", what, "TFLOP/s a device", teraflops, ours, LLAMA3))
    return rows


def _whole_trainings() -> list[Published]:
    """Days that Narayanan et al. estimate from their own measured speeds, and what Llama 3.1's model card reports."""
    rows = []
    for name, (data, pipeline), batch, tokens, days in (
        ("GPT-3 175B", (16, 8), 1536, 300e9, 34.0),  # 1,024 devices; their division is not published
        ("Megatron 1008.0B", (6, 64), 3072, 450e9, 84.0),
    ):
        cluster = Cluster(DEVICES["A100"], data * 8 * pipeline, efficiency=EFFICIENCY)
        layout = Layout(data, 8, pipeline, batch, recompute="full", sequence=False, overlap=False)
        ours = plan(TRANSFORMERS[name], cluster, layout).training(tokens)["days"]
        what = f"{name}, {tokens / 1e9:.0f} billion tokens on {cluster.devices:,}"
        rows.append(Published("time", what, "days", days, ours, ESTIMATED))
    cluster = Cluster(DEVICES["H100"], 16_384, efficiency=EFFICIENCY, price=1.0)
    layout = Layout(128, 8, 16, 2048, chunks=4, recompute="selective")
    hours = plan(TRANSFORMERS["Llama 3 405B"], cluster, layout).training(15.6e12)["devices"] / 1e6
    what = "Llama 3 405B, 15.6 trillion tokens"
    return [*rows, Published("time", what, "million GPU-hours", 30.84, hours, "the model card of Llama 3.1")]
