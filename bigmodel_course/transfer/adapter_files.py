"""Adapters as files: only what was trained, and the SHA-256 of the weights that it was trained on.

An adapter is a difference.  Put on other weights it gives numbers all the same, and they mean nothing; so the file
names its base, and loading asks for it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Generator, Tensor, nn

from bigmodel_course.files import write_whole
from bigmodel_course.transfer.lora import LoRALinear, adapters, inject_

__all__ = ["base_hash", "load_adapter_", "save_adapter"]

FORMAT = "bigmodel-course-adapter-1"
SIDES = ("down", "up")


def base_hash(model: nn.Module, *, without: Iterable[str] = ()) -> str:
    """SHA-256 over names, types, shapes and bits of `model`'s state, the same before and after `inject_`.

    `without`: names of parameters that do not count, such as those of a head that comes with the adapter.
    """
    layers = adapters(model)
    leave_out = {*without, *(f"{name}.{side}" for name in layers for side in SIDES)}
    rename = {f"{name}.base.{end}": f"{name}.{end}" for name in layers for end in ("weight", "bias")}
    state = {rename.get(name, name): t for name, t in model.state_dict().items() if name not in leave_out}
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(path: str | Path, model: nn.Module) -> None:
    """Write every trainable parameter of an adapted model, and its rank, layers and base beside them, as safetensors.

    The bytes go to a temporary file first: a crash leaves the old file or the new one.
    """
    found = adapters(model)
    if not found:
        raise ValueError("model has no adapters to save: call inject_ first")
    if any(layer.merged for layer in found.values()):
        raise ValueError("model is merged, and its base is not as it was: call unmerge_ first")
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    if missing := {f"{name}.{side}" for name in found for side in SIDES} - tensors.keys():
        raise ValueError(f"adapters must be trainable to be saved, and these are frozen: {sorted(missing)[:4]}")
    whole = [name for name in tensors if name.rpartition(".")[0] not in found]
    one = next(iter(found.values()))
    described = {"format": FORMAT, "base": base_hash(model, without=whole), "layers": list(found), "also": whole}
    described |= {"rank": one.rank, "alpha": one.alpha}
    write_whole(Path(path), safetensors.torch.save(tensors, {"adapter": json.dumps(described)}))


def load_adapter_(model: nn.Module, path: str | Path) -> dict[str, LoRALinear]:
    """Put a saved adapter on `model`, which must hold the very weights that it was trained on.

    ValueError if it does not, or if the file holds no adapter or not one for this model; then `model` is as it was.
    """
    described, tensors = _read(Path(path))
    if adapters(model):
        raise ValueError("model has adapters already: load onto the base")
    _check_fits(model, described, tensors)
    whole = described["also"]
    if (have := base_hash(model, without=whole)) != described["base"]:
        raise ValueError(
            f"{Path(path).name} was trained on weights with SHA-256 {described['base'][:12]}…, and this model's is "
            f"{have[:12]}…: on other weights the adapter means nothing"
        )
    numbers = {"rank": described["rank"], "alpha": described["alpha"]}
    made = inject_(model, described["layers"], **numbers, generator=Generator())
    for name, p in model.named_parameters():
        if name in tensors:
            p.requires_grad_(True).data.copy_(tensors[name])
    return made


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get("adapter", "null"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no dict
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path.name} is no whole safetensors file: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ValueError(f"{path.name} holds tensors, but no adapter of this course")
    try:
        wanted = {f"{name}.{side}" for name in described["layers"] for side in SIDES} | set(described["also"])
        fits = wanted == tensors.keys() and {"rank", "alpha", "base"} <= described.keys()
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path.name} holds an adapter, but does not say of which layers: {error!r}") from error
    if not fits:
        raise ValueError(f"{path.name} does not hold what it says: {sorted(wanted ^ tensors.keys())[:4]}")
    return described, tensors


def _check_fits(model: nn.Module, described: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of other shapes, before anything changes."""
    layers, own = dict(model.named_modules()), dict(model.named_parameters())
    wanted = {}
    for name in described["layers"]:
        if not isinstance(layer := layers.get(name), nn.Linear):
            raise ValueError(f"the adapter is for a linear layer {name!r}, and the model has none of that name")
        wanted |= {f"{name}.down": (described["rank"], layer.in_features)}
        wanted |= {f"{name}.up": (layer.out_features, described["rank"])}
    for name in described["also"]:
        if name not in own:
            raise ValueError(f"the adapter brings {name!r}, and the model has no parameter of that name")
        wanted[name] = tuple(own[name].shape)
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"the adapter's {name} is {list(tensors[name].shape)}, and the model needs {list(shape)}")
