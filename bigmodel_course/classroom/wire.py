"""Messages between the process that grades and the process that runs a student's code: data only, never pickled."""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

__all__ = ["pack", "unpack"]

Keep = Callable[[Any], int]  # remembers what stays on this side and gives its number
Lend = Callable[[str, int], Any]  # makes a stand-in for what stayed on the other side
PLAIN = (bool, int, float, str)


def pack(value: Any, keep: Keep | None = None) -> bytes:
    """`value` as bytes: None, numbers, text, bytes, tensors, arrays, and lists, tuples and dicts of them.

    A callable or a generator stays where it is: `keep` gives the number by which the other side asks for it.
    """
    return json.dumps(_packed(value, keep)).encode()


def unpack(message: bytes, lend: Lend | None = None) -> Any:
    """The value that `pack` sent; `lend(kind, number)` makes the stand-in for a "function" or a "generator"."""
    try:
        return _unpacked(json.loads(message), lend)
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"message must hold packed data, and it does not ({error})") from error


def _packed(value: Any, keep: Keep | None) -> Any:
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(entry, keep) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, keep), _packed(entry, keep)] for key, entry in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": _text(value)}
    if isinstance(value, torch.Tensor) and not value.is_complex():
        return {"tensor": _text(safetensors.torch.save({"": value.detach().contiguous().cpu()}))}
    if isinstance(value, np.generic):
        return _packed(value.item(), keep)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": _text(safetensors.numpy.save({"": np.ascontiguousarray(value)}))}
    if keep and hasattr(value, "send") and hasattr(value, "throw"):
        return {"generator": keep(value)}
    if keep and callable(value) and not isinstance(value, type):
        return {"function": keep(value)}
    raise TypeError(
        f"value must be made of numbers, text, tensors, arrays, lists, tuples and dicts, got {type(value).__name__}"
    )


def _unpacked(packed: Any, lend: Lend | None) -> Any:
    if not isinstance(packed, dict):
        return packed
    [(kind, held)] = packed.items()
    if kind in ("list", "tuple"):
        entries = [_unpacked(entry, lend) for entry in held]
        return entries if kind == "list" else tuple(entries)
    if kind == "dict":
        return {_unpacked(key, lend): _unpacked(entry, lend) for key, entry in held}
    if kind == "bytes":
        return base64.b64decode(held)
    if kind == "tensor":
        return safetensors.torch.load(base64.b64decode(held))[""]
    if kind == "array":
        return safetensors.numpy.load(base64.b64decode(held))[""]
    if lend and kind in ("function", "generator"):
        return lend(kind, int(held))
    raise ValueError(f"unknown kind {kind!r}")


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
