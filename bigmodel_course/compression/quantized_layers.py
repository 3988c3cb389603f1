"""Layers that compute with integers, and models made of them.

    x @ w  =  x_scale * w_scale * sum over k of (x_code - x_zero) * (w_code - w_zero)

The sum, where all the work is, needs integers only: 8 bits in, 32 bits in the sum.  These functions give the numbers
of onnxruntime's kernels to the last bit; for their speed, use onnxruntime.
"""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_course.compression.calibration import min_max
from bigmodel_course.compression.quantization import Affine, affine_between, fake_quantize, fit_affine, pack, unpack

__all__ = ["QuantizedLinear", "TrainingLinear", "calibrate", "integer_matmul", "quantize_model", "quantized_matmul"]
__all__ += ["quantization_aware", "requantize", "stored_bytes"]

LONGEST = 2**31 // 255**2  # more products than this might leave int32


def integer_matmul(a: Tensor, b: Tensor, *, a_zero: Tensor | int = 0, b_zero: Tensor | int = 0) -> Tensor:
    """(a - a_zero) @ (b - b_zero) in int32, ONNX's MatMulInteger: a [..., K], b [K, N], both int8 or uint8.

    `b_zero` may differ from column to column.  At most 33,025 products are summed, so that no sum can overflow.
    """
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype not in (torch.int8, torch.uint8):
            raise TypeError(f"{name} must hold codes, int8 or uint8, got {codes.dtype}")
    if a.ndim < 1 or b.ndim != 2 or a.shape[-1] != b.shape[0] or b.shape[0] > LONGEST:
        want = f"a [..., K] and b [K, N] with K <= {LONGEST}"
        raise ValueError(f"need {want}, got {list(a.shape)} and {list(b.shape)}")
    return (a.int() - a_zero) @ (b.int() - b_zero)


def requantize(sums: Tensor, multiplier: Tensor, grid: Affine) -> Tensor:
    """Codes on `grid` of the int32 `sums`: clamp(round(sums * multiplier) + zero), the multiplier in float32.

    multiplier = a_scale * b_scale / out_scale, one number or one for each column.
    """
    if sums.dtype != torch.int32:
        raise TypeError(f"sums must be int32, got {sums.dtype}")
    places = torch.round(sums.float() * multiplier) + grid.zero
    return places.clamp(grid.low, grid.high).to(torch.int8 if grid.low < 0 else torch.uint8)


def quantized_matmul(a: Tensor, a_grid: Affine, b: Tensor, b_grid: Affine, out_grid: Affine) -> Tensor:
    """Codes of a product from the codes of its factors, ONNX's QLinearMatMul: a [..., K], b [K, N] -> [..., N]."""
    sums = integer_matmul(a, b, a_zero=a_grid.zero, b_zero=b_grid.zero)
    return requantize(sums, a_grid.scale * b_grid.scale / out_grid.scale, out_grid)


class TrainingLinear(nn.Module):
    """A linear layer that trains against its own quantization; it takes over the parameters of `layer`.

    Weights, one symmetric grid of `bits` bits for each output, and activations, 8 bits over the batch, go through
    `fake_quantize`: the forward pass is that of QuantizedLinear, the gradient goes straight through.
    """

    def __init__(self, layer: nn.Linear, *, bits: int = 8):
        super().__init__()
        self.weight, self.bias, self.bits = layer.weight, layer.bias, bits

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        weight = fake_quantize(self.weight, fit_affine(self.weight, bits=self.bits, symmetric=True, dim=0))
        return F.linear(fake_quantize(x, fit_affine(x)), weight, self.bias)


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights and an integer product, for inference: x [..., inputs] -> [..., outputs].

    Weights: symmetric, `bits` bits, a scale for each output (or one for all), stored without gaps.  Activations: 8 bits
    on a fixed `grid` (static), or, without one, on the grid of whatever comes in (dynamic).  Input, output and bias are
    float32.
    """

    def __init__(
        self, layer: nn.Linear | TrainingLinear, *, bits: int = 8, per_channel: bool = True, grid: Affine | None = None
    ):
        super().__init__()
        if grid is not None and (grid.low, grid.high, grid.scale.numel()) != (0, 255, 1):
            raise ValueError(f"grid must be one for all inputs with codes 0 to 255, got {grid}")
        weight = fit_affine(layer.weight, bits=bits, symmetric=True, dim=0 if per_channel else None)
        codes = weight.encode(layer.weight.detach())
        self.bits, self.shape = bits, codes.shape
        self.register_buffer("packed", pack((codes.short() + weight.high).to(torch.uint8), bits))
        self.register_buffer("scale", weight.scale.flatten())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.register_buffer("input_scale", None if grid is None else grid.scale.clone())
        self.register_buffer("input_zero", None if grid is None else grid.zero.clone())

    @property
    def codes(self) -> Tensor:
        """The weights' codes: int8 [outputs, inputs]."""
        stored = unpack(self.packed, self.bits, self.shape.numel()).view(self.shape)
        return (stored.short() - (2 ** (self.bits - 1) - 1)).to(torch.int8)

    @property
    def weight(self) -> Tensor:
        """The weights that the codes stand for: float [outputs, inputs]."""
        return self.codes.to(self.scale.dtype) * self.scale[:, None]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x`, multiply in integers, and scale the sums back."""
        grid = fit_affine(x) if self.input_scale is None else Affine(self.input_scale, self.input_zero, 0, 255)
        sums = integer_matmul(grid.encode(x), self.codes.T, a_zero=grid.zero)
        result = sums.float() * (grid.scale.flatten() * self.scale)
        return result if self.bias is None else result + self.bias


def quantize_model(
    model: nn.Module, *, bits: int = 8, per_channel: bool = True, grids: Mapping[str, Affine] | None = None
) -> nn.Module:
    """A copy of `model` with every linear layer quantized: dynamic, or static on the `grids` that `calibrate` gives.

    Only layers are found, not products: an output head tied to an embedding stays float, so untie it first.
    """
    names = {name for name, _ in _linears(model)}
    if grids is not None and grids.keys() != names:
        raise ValueError(f"grids must name the linear layers {sorted(names)}, got {sorted(grids)}")
    options = {"bits": bits, "per_channel": per_channel}
    return _replaced(model, lambda name, layer: QuantizedLinear(layer, grid=grids and grids[name], **options))


def quantization_aware(model: nn.Module, *, bits: int = 8) -> nn.Module:
    """A copy of `model` for quantization-aware training; when it is trained, give it to `quantize_model`.

    Every linear layer becomes a TrainingLinear; the names of the parameters stay.
    """
    return _replaced(model, lambda _, layer: TrainingLinear(layer, bits=bits))


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Tensor], rule: Callable[[Tensor], tuple[float, float]] = min_max
) -> dict[str, Affine]:
    """The grid of each linear layer's input: `rule`, as in `calibration`, on all that comes in while `batches` pass.

    `model` computes in float here.  All inputs are kept till the end: a few hundred examples are enough.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in _linears(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kept=seen[name]: kept.append(args[0].flatten()))
        for name, layer in _linears(model)
    ]
    try:
        for x in batches:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name, kept in seen.items() if not kept]:
        raise ValueError(f"batches must reach every linear layer, nothing came to {silent}")
    return {name: affine_between(*rule(torch.cat(kept))) for name, kept in seen.items()}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all that `model` would store, its state dict: what a file holds besides names and shapes."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear | TrainingLinear]]:
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | TrainingLinear)]
    if not found:
        raise ValueError(f"model must hold an nn.Linear, got {type(model).__name__} without one")
    return found


def _replaced(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A copy of `model` with make(name, layer) in the place of each linear layer."""
    model = copy.deepcopy(model)
    for name, layer in _linears(model):
        if name == "":
            return make(name, layer)
        model.set_submodule(name, make(name, layer))
    return model
