"""Quantization: real numbers as small integers on a grid.

    code = clamp(round(real / scale) + zero, low, high)          real is about scale * (code - zero)

Between the ends of the grid the error is at most half a step, and the real number zero has a code of its own.
Rounding is to the nearest code, ties to the even one, as onnxruntime and torch have it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Affine", "Binary", "Int4Groups", "affine_between", "binarize", "fake_quantize", "fit_affine", "group_int4"]
__all__ += ["pack", "power_of_two_grid", "round_to_step", "unpack"]


@dataclass(frozen=True, eq=False)
class Affine:
    """How integer codes map to real numbers: real = scale * (code - zero), with code from `low` to `high`.

    `scale` (floating) and `zero` (int32) broadcast against the tensor: one number each for a whole tensor, or one for
    each channel.  Codes are uint8, or int8 where `low` is negative.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 255 or -128 <= self.low < self.high <= 127):
            raise ValueError(f"low < high must fit in uint8 or int8, got low={self.low}, high={self.high}")
        if not (self.scale.isfinite() & (self.scale > 0)).all():
            raise ValueError(f"scale must be positive and finite, got {self.scale.flatten()[:4].tolist()}")
        if self.zero.dtype != torch.int32 or ((self.zero < self.low) | (self.zero > self.high)).any():
            got = f"{self.zero.dtype} {self.zero.flatten()[:4].tolist()}"
            raise ValueError(f"zero must be int32 between low={self.low} and high={self.high}, got {got}")

    def encode(self, x: Tensor, *, reciprocal: bool = False) -> Tensor:
        """The codes of `x`, in its shape; what lies beyond the ends of the grid, infinity too, gets the end's code.

        reciprocal=True multiplies by 1 / scale as torch does; ONNX divides.  The two part only where x / scale lies
        within one rounding error of a tie.
        """
        return self._places(x, reciprocal).clamp(self.low, self.high).to(torch.int8 if self.low < 0 else torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The real numbers that `codes` stand for, in the dtype of `scale`."""
        return self.scale * (codes.to(self.scale.dtype) - self.zero)

    def _places(self, x: Tensor, reciprocal: bool) -> Tensor:
        """The nearest code to each number, as a float and not yet clamped."""
        if x.isnan().any():
            raise ValueError(f"x must not hold NaN, which has no code; got {x.isnan().sum()} of {x.numel()}")
        return torch.round(x * (1 / self.scale) if reciprocal else x / self.scale) + self.zero


def fit_affine(x: Tensor, *, bits: int = 8, symmetric: bool = False, dim: int | None = None) -> Affine:
    """The narrowest grid that covers `x` and holds zero exactly, for the whole tensor or for each slice along `dim`.

    `x`: floating, finite and not empty.  A constant is covered from zero to itself; zeros get scale 1.
    """
    _check_real("x", x)
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of x {list(x.shape)} or None, got {dim}")
    x = x.detach()
    dims = [d for d in range(x.ndim) if dim is None or d != dim % x.ndim]
    low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
    return affine_between(low, high, bits=bits, symmetric=symmetric)


def affine_between(low: Tensor | float, high: Tensor | float, *, bits: int = 8, symmetric: bool = False) -> Affine:
    """The grid of `bits` bits that reaches from `low` to `high`, widened so that it holds zero exactly.

    symmetric=False: 2**bits codes from 0, as in ONNX's DynamicQuantizeLinear.  symmetric=True: zero is code 0 and the
    codes reach equally far to both sides, -127 to 127 for 8 bits: one code less, and no `zero` to carry through a
    matrix product (Jacob et al. 2018, section 2.1, arXiv 1712.05877).  `low` and `high`: numbers, or tensors that
    broadcast against what is to be coded.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be between 2 and 8, got {bits}")
    low, high = torch.as_tensor(low).clamp(max=0), torch.as_tensor(high).clamp(min=0)
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    scale = (torch.maximum(-low, high) if symmetric else high - low) / top
    if not scale.isfinite().all():
        got = f"{low.min().item():.4g} and {high.max().item():.4g}"
        raise ValueError(f"low and high must be finite and no further apart than {scale.dtype} can say, got {got}")
    # A range of zeros has no step of its own, and one near the smallest float would have a step of 0.
    scale = torch.where(low == high, 1.0, scale.clamp(min=torch.finfo(scale.dtype).tiny))
    if symmetric:
        return Affine(scale, torch.zeros_like(scale, dtype=torch.int32), -top, top)
    return Affine(scale, torch.round(-low / scale).clamp(0, top).int(), 0, top)


def round_to_step(x: Tensor, k: int) -> Tensor:
    """round(x / 2**k) * 2**k: floats with a step of 2**k, not k bits, and as many bytes as before.

    No end, no code, and one step for small weights and large: choose k too large and every weight becomes zero.
    """
    return torch.round(x / 2.0**k) * 2.0**k


def power_of_two_grid(grid: Affine) -> Affine:
    """`grid` with its scale rounded up to a power of two: scaling becomes a shift, a step up to twice as wide."""
    if grid.zero.any():
        raise ValueError("grid must be symmetric (zero = 0): another scale would move its ends")
    mantissa, exponent = torch.frexp(grid.scale)  # mantissa from 0.5 up to below 1
    above = torch.where(mantissa > 0.5, 1.0, 0.5).to(mantissa.dtype)
    return Affine(torch.ldexp(above, exponent), grid.zero, grid.low, grid.high)


def fake_quantize(x: Tensor, grid: Affine, *, reciprocal: bool = False) -> Tensor:
    """`grid.decode(grid.encode(x))` that training can go through: the straight-through estimator.

    The gradient passes unchanged where `x` lies on the grid and is zero beyond its ends (Bengio et al. 2013, arXiv
    1308.3432); the grid gets none.  `reciprocal` as in `Affine.encode`; with it, this is torch's fake quantize.
    """
    return _StraightThrough.apply(x, grid, reciprocal)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, grid: Affine, reciprocal: bool) -> Tensor:
        places = grid._places(x, reciprocal)
        ctx.save_for_backward((places >= grid.low) & (places <= grid.high))
        return grid.decode(places.clamp(grid.low, grid.high))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 to 2**bits - 1 as bytes without gaps, the first code in the lowest bits: a flat uint8 tensor."""
    if codes.dtype != torch.uint8 or not 1 <= bits <= 8 or (codes.numel() and codes.max().item() >= 2**bits):
        raise ValueError(f"codes must be uint8 below 2**bits with bits from 1 to 8, got {codes.dtype} and {bits=}")
    if bits == 8:
        return codes.flatten().clone()
    stream = (codes.flatten()[:, None] >> torch.arange(bits, dtype=torch.uint8) & 1).flatten()
    return _bytes(F.pad(stream, (0, -len(stream) % 8)).view(-1, 8))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes that `pack` put into `packed`."""
    if packed.dtype != torch.uint8 or not 1 <= bits <= 8 or packed.shape != (-(-count * bits // 8),):
        want, got = -(-count * bits // 8), f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(f"packed must be uint8 [{want}] for {count} codes of {bits} bits, got {got}")
    if bits == 8:
        return packed.clone()
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    return _bytes(stream[: count * bits].view(-1, bits))


@dataclass(frozen=True, eq=False)
class Binary:
    """Weights of one bit: scale * (+1 or -1).  `signs`: packed, 1 for plus; `scale`: one number for each row."""

    signs: Tensor
    scale: Tensor
    shape: torch.Size

    def decode(self) -> Tensor:
        """The weights that they stand for."""
        return self.scale * (2.0 * unpack(self.signs, 1, self.shape.numel()).view(self.shape) - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the signs and the scales."""
        return self.signs.nbytes + self.scale.nbytes


def binarize(weight: Tensor) -> Binary:
    """The nearest tensor to `weight` of the form scale * sign, one scale for each row: scale = mean |weight|.

    Nearest in squared distance (Rastegari et al. 2016, XNOR-Net, equation 6, arXiv 1603.05279).  `weight` [rows, ...];
    zero counts as positive.
    """
    _check_real("weight", weight)
    weight = weight.detach()
    scale = weight.abs().mean(list(range(1, weight.ndim)), keepdim=True)
    return Binary(pack((weight >= 0).to(torch.uint8), 1), scale, weight.shape)


@dataclass(frozen=True, eq=False)
class Int4Groups:
    """Weights of four bits, two a byte; `group` neighbours in a row share a scale and, unless None, a zero.

    codes packed row by row; scale [rows, groups]; zeros packed too, None means 8.
    """

    packed: Tensor
    scale: Tensor
    zeros: Tensor | None
    shape: torch.Size
    group: int

    @property
    def codes(self) -> Tensor:
        """The codes 0 to 15 in the weight's shape (uint8)."""
        return unpack(self.packed, 4, self.shape.numel()).view(self.shape)

    @property
    def zero(self) -> Tensor:
        """The code of zero in each group: uint8 [rows, groups]."""
        count, zeros = self.scale.numel(), self.zeros
        codes = torch.full((count,), 8, dtype=torch.uint8) if zeros is None else unpack(zeros, 4, count)
        return codes.view(self.scale.shape)

    def decode(self) -> Tensor:
        """The weights that they stand for."""
        zero, scale = (t.repeat_interleave(self.group, 1)[:, : self.shape[1]] for t in (self.zero, self.scale))
        return scale * (self.codes.to(scale.dtype) - zero)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, the scales and the zeros."""
        return self.packed.nbytes + self.scale.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def group_int4(weight: Tensor, *, group: int = 32, symmetric: bool = False) -> Int4Groups:
    """Four-bit codes of `weight` [rows, columns], with a scale for each `group` neighbours in a row.

    The numbers are those of onnxruntime's MatMulNBits; the last group may be short.  symmetric=True: zero is code 8,
    and the number of largest magnitude gets code 0: `scale` may be negative.  Ties go away from zero, here only.
    """
    _check_real("weight", weight)
    if weight.ndim != 2 or group < 1:
        raise ValueError(f"need weight [rows, columns] and group >= 1, got {list(weight.shape)} and {group=}")
    rows, columns = weight.shape
    blocks = F.pad(weight.detach(), (0, -columns % group)).view(rows, -1, group)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    scale = torch.where(high > -low, high, low) / -8 if symmetric else (high - low) / 15
    if not scale.isfinite().all():
        raise ValueError(f"weight must not span more than {scale.dtype} can say, got {low.min()} to {high.max()}")
    safe = torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, 1.0, scale)  # 1 / scale must stay finite
    zero = torch.full_like(scale, 8) if symmetric else _away(-low / safe)
    codes = _away(blocks * (1 / safe)[..., None] + zero[..., None]).view(rows, -1)[:, :columns]
    zeros = None if symmetric else pack(zero.to(torch.uint8), 4)
    return Int4Groups(pack(codes.to(torch.uint8), 4), scale, zeros, weight.shape, group)


def _away(x: Tensor) -> Tensor:
    """Round to 0 ... 15, ties away from zero; in float64, where adding a half to a float32 is exact."""
    return (x.double() + 0.5).floor().clamp(0, 15).to(x.dtype)


def _bytes(bits: Tensor) -> Tensor:
    """[n, at most 8] bits, the lowest first -> n bytes."""
    return (bits << torch.arange(bits.shape[1], dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _check_real(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}: convert it with .float()")
    if not x.numel():
        raise ValueError(f"{name} must not be empty, got shape {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in {(~x.isfinite()).sum()} of {x.numel()} places")
