"""A cluster of equal devices, and how a model's training is laid out on it."""

from dataclasses import dataclass
from math import ceil

from bigmodel_course.costs.arguments import at_least, positive
from bigmodel_course.costs.transformers import Transformer

__all__ = ["DEVICES", "Cluster", "Device", "Layout"]


@dataclass(frozen=True)
class Device:
    """One accelerator: bytes of memory, dense 16-bit FLOP/s at its peak, bytes/s in one direction, watts.

    `link` is the speed to a device of the same node, `network` the device's share of the speed to another node.
    """

    memory: float
    flops: float
    link: float
    network: float
    watts: float

    def __post_init__(self) -> None:
        positive(memory=self.memory, flops=self.flops, link=self.link, network=self.network, watts=self.watts)


DEVICES = {  # vendors' data sheets: 80 GB versions with NVLink, one 200 or 400 Gbit/s port a device
    "A100": Device(80e9, 312e12, 300e9, 25e9, 400),
    "H100": Device(80e9, 989e12, 450e9, 50e9, 700),
}


@dataclass(frozen=True)
class Cluster:
    """`devices` of one kind, `node` of them in one machine.

    `efficiency` is the share of its peak that a device reaches on large matrix products; `price` is for one device and
    hour, `electricity` for one kWh, in any currency.
    """

    device: Device
    devices: int
    node: int = 8
    efficiency: float = 0.6
    price: float = 0.0
    electricity: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, devices=self.devices, node=self.node)
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"need 0 < efficiency <= 1, a share of the peak, got {self.efficiency!r}")

    def bandwidth(self, span: int) -> float:
        """Bytes/s of one device in a group whose members lie within `span` neighbouring devices."""
        return self.device.link if span <= self.node else self.device.network


RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How `batch` sequences a step are divided over data x pipeline x tensor devices.

    `microbatch` sequences pass through the pipeline at a time, each device has `chunks` stages of it (interleaved);
    `stage` is ZeRO's, 0 to 3; `recompute` computes again in the backward pass nothing, the attention matrix only, or
    each block from its input; `sequence` divides norms and dropout over the tensor ranks as well; `overlap` hides the
    gradients' traffic behind the backward pass.
    """

    data: int
    tensor: int = 1
    pipeline: int = 1
    batch: int = 1
    microbatch: int = 1
    chunks: int = 1
    stage: int = 1
    recompute: str = "none"
    sequence: bool = True
    overlap: bool = True

    def __post_init__(self) -> None:
        at_least(1, data=self.data, tensor=self.tensor, pipeline=self.pipeline, chunks=self.chunks)
        at_least(1, batch=self.batch, microbatch=self.microbatch)
        if self.stage not in range(4) or self.recompute not in RECOMPUTE:
            raise ValueError(f"need stage 0 to 3 and recompute of {RECOMPUTE}, got {self.stage=}, {self.recompute=}")
        if self.batch % (self.data * self.microbatch):
            raise ValueError(
                f"need a batch that data * microbatch divides, got batch={self.batch}, {self.data} * {self.microbatch}"
            )
        if self.pipeline > 1 and self.stage > 1:
            raise ValueError(
                f"need stage 0 or 1 with a pipeline, got stage={self.stage}: "
                "each microbatch would gather or scatter again"
            )

    @property
    def devices(self) -> int:
        """Devices that it needs."""
        return self.data * self.tensor * self.pipeline

    @property
    def microbatches(self) -> int:
        """Microbatches of each pipeline in a step."""
        return self.batch // (self.data * self.microbatch)

    def layers(self, model: Transformer) -> int:
        """Blocks on the fullest device."""
        return ceil(model.layers / (self.pipeline * self.chunks)) * self.chunks

    def check(self, model: Transformer, cluster: Cluster) -> None:
        """Refuse what cannot be laid out: wrong number of devices, heads or layers that cannot be divided."""
        if self.devices != cluster.devices:
            raise ValueError(
                f"need data * tensor * pipeline = {cluster.devices} devices, "
                f"got {self.data} * {self.tensor} * {self.pipeline} = {self.devices}"
            )
        if model.shared_heads % self.tensor or model.context % self.tensor:
            raise ValueError(f"need key_value_heads and context that tensor={self.tensor} divides, got {model}")
        if self.pipeline * self.chunks > model.layers:
            raise ValueError(f"need pipeline * chunks <= layers = {model.layers}, got {self.pipeline} * {self.chunks}")
