"""Fine-tuning: a new head, frozen parts, features kept on disk, learning rates by depth, and unfreezing step by step.

    head = replace_head_(model, "fc", 10, generator=g)      a head for the new task
    freeze_(model, keep=["fc"])                             train the head alone, or
    depth_groups(model, 0.01, decay=0.5)                    everything, the first layers slowly

All of it works with any module; what is frozen and what trains is seen in the model itself.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bigmodel_course.cache import kept

__all__ = ["depth_groups", "features", "freeze_", "hold_statistics_", "replace_head_", "stages", "trained_parameters"]
__all__ += ["unfreeze_", "unfreeze_gradually_"]

LearningRate = float | Callable[[int], float]


@torch.no_grad()
def replace_head_(model: nn.Module, name: str, classes: int, *, generator: Generator) -> nn.Linear:
    """Put a new linear layer with `classes` outputs in the place of the one called `name`, and return it.

    Same inputs, bias where the old one has it, filled as torch fills nn.Linear; everything else stays.
    """
    found = dict(model.named_modules())
    old = found.get(name)
    if not isinstance(old, nn.Linear):
        linear = [key for key, layer in found.items() if isinstance(layer, nn.Linear)]
        raise ValueError(f"name must be a linear layer of {type(model).__name__} ({', '.join(linear)}), got {name!r}")
    if classes < 1:
        raise ValueError(f"need classes >= 1, got {classes=}")
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = torch.nn.utils.skip_init(nn.Linear, old.in_features, classes, bias=old.bias is not None, **like)
    nn.init.kaiming_uniform_(new.weight, a=math.sqrt(5), generator=generator)
    if new.bias is not None:
        bound = 1 / math.sqrt(old.in_features)
        nn.init.uniform_(new.bias, -bound, bound, generator=generator)
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, new)
    return new


def freeze_(part: nn.Module, *, keep: Sequence[str] = ()) -> None:
    """Freeze `part`, a model or a layer, except its parts named in `keep`.

    Its parameters get no gradient, and its layers stay in eval mode whatever `model.train()` says: the running
    statistics of a BatchNorm are no parameters, and would drift with every batch.  The mode is set when a layer runs.
    """
    named = dict(part.named_modules())
    if missing := [name for name in keep if name not in named]:
        raise ValueError(f"keep must name parts of {type(part).__name__}, got {', '.join(missing)}")
    spared = {layer for name in keep for layer in named[name].modules()}
    kept = {id(p) for name in keep for p in named[name].parameters()}
    for p in part.parameters():
        p.requires_grad_(p.requires_grad and id(p) in kept)
    for layer in set(part.modules()) - spared:
        _hold(layer)


def unfreeze_(part: nn.Module) -> None:
    """Let every parameter of `part` train, and its layers follow `model.train()` again."""
    for layer in part.modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _stay_in_eval:
                del layer._forward_pre_hooks[key]
    part.requires_grad_(True)


def hold_statistics_(model: nn.Module) -> int:
    """Hold the running statistics of every BatchNorm, whose gains may go on training; return how many there are.

    With few pictures in a batch, the batch's own statistics are noise.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        _hold(layer)
    return len(norms)


def trained_parameters(model: nn.Module) -> int:
    """How many numbers training moves; a tied parameter counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stages(model: nn.Module) -> list[nn.Module]:
    """The parts of a model from its input to its output: what its method `stages` says, or its children.

    A Sequential or ModuleList among the children counts as its own children; parts without parameters are left out.
    """
    if hasattr(model, "stages"):
        return list(model.stages())
    parts = [part for child in model.children() for part in _opened(child)]
    return [part for part in parts if any(True for _ in part.parameters())]


def depth_groups(model: nn.Module | Sequence[nn.Module], lr: LearningRate, decay: float) -> list[dict[str, Any]]:
    """Parameter groups, one a stage: the last learns with `lr`, each one before it with `decay` times the next one's.

    For `Optimizer` or an optimizer of torch.  `model`: its `stages`, or the stages themselves.  `lr` is a number, or a
    schedule for `Optimizer`.  What the first layers know (edges, strokes) is of use to most tasks (Howard & Ruder 2018,
    arXiv 1801.06146, section 3.2).  A tied parameter learns with the first of its stages.  ValueError if a parameter of
    the model is in no stage.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"need 0 < decay <= 1, got {decay=}")
    parts = stages(model) if isinstance(model, nn.Module) else list(model)
    seen: set[int] = set()
    groups = []
    for i, part in enumerate(parts):
        fresh = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        if fresh:
            groups.append({"params": fresh, "lr": _scaled(lr, decay ** (len(parts) - 1 - i))})
    if isinstance(model, nn.Module) and (left := [n for n, p in model.named_parameters() if id(p) not in seen]):
        raise ValueError(f"the stages of {type(model).__name__} must hold every parameter, and lack {', '.join(left)}")
    return groups


def unfreeze_gradually_(model: nn.Module | Sequence[nn.Module], epoch: int, *, every: int = 1) -> int:
    """Freeze all stages but the last 1 + epoch // every, and return how many train; call it before each epoch.

    The new head begins alone, while its gradients are still noise (Howard & Ruder 2018, section 3.3).  Epochs count
    from 0.  The optimizer may hold all parameters from the start: it leaves those without a gradient alone, so set
    gradients to None between steps, as zero_grad does.
    """
    if epoch < 0 or every < 1:
        raise ValueError(f"need epoch >= 0 and every >= 1, got {epoch=}, {every=}")
    parts = stages(model) if isinstance(model, nn.Module) else list(model)
    trained = min(len(parts), 1 + epoch // every)
    for part in parts[: len(parts) - trained]:
        freeze_(part)
    for part in parts[len(parts) - trained :]:
        unfreeze_(part)
    return trained


@torch.no_grad()
def features(network: nn.Module, x: Tensor, *, folder: str | Path | None = None, batch_size: int = 64) -> Tensor:
    """What a frozen network makes of `x` [N, ...], computed once and kept on disk.

    The second call reads a file, whose name is the hash of the network (its layers and every number in them), of `x`,
    and of torch's version.  `folder`: by default $BIGMODEL_CACHE, or .cache/bigmodel-course in the home folder; where
    it cannot be written, features are computed every time.  A damaged file is computed anew.
    """
    return kept("features", _digest(network, x), lambda: _computed(network, x, batch_size), folder=folder)


def _computed(network: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        network.eval()
        return torch.cat([network(piece) for piece in x.split(batch_size)])
    finally:
        for layer, mode in modes:
            layer.training = mode


def _digest(network: nn.Module, x: Tensor) -> str:
    """One hash for what goes in.  The layers' description holds what no tensor does, such as a stride."""
    found = hashlib.sha256(f"{torch.__version__}\n{type(network).__qualname__}\n{network}".encode())
    tensors = [*network.named_parameters(), *network.named_buffers(), ("x", x)]
    for name, tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(f"\n{name} {plain.dtype} {list(plain.shape)}\n".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return found.hexdigest()


def _hold(layer: nn.Module) -> None:
    if not any(hook is _stay_in_eval for hook in layer._forward_pre_hooks.values()):
        layer.register_forward_pre_hook(_stay_in_eval)
    layer.training = False


def _stay_in_eval(layer: nn.Module, _inputs: Any) -> None:
    layer.training = False


def _opened(part: nn.Module) -> Iterator[nn.Module]:
    if isinstance(part, nn.Sequential | nn.ModuleList):
        for child in part:
            yield from _opened(child)
    else:
        yield part


def _scaled(lr: LearningRate, factor: float) -> LearningRate:
    return (lambda step: factor * lr(step)) if callable(lr) else factor * lr
