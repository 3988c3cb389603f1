"""Pruning chooses what torch chooses, stays through any optimizer and checkpoint, and its small models are the same."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bigmodel_course import checkpoint, optim
from bigmodel_course.compression import pruning
from bigmodel_course.compression.pruning import (
    DynamicPruning,
    apply_masks_,
    gradual_sparsity,
    keep_pruned,
    magnitude_masks,
    neuron_masks,
    prune_channels,
    prune_neurons,
    sensitivity,
    sparsity_of,
)
from bigmodel_course.models import GPT, MLP, GPTConfig, SmallCNN, digit_model

SPARSITIES = [0.0, 0.123, 0.5, 0.9, 1.0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp():
    return MLP((6, 8, 5, 3), generator=generator())


def cnn():
    return SmallCNN(side=7, channels=(4, 6, 5), classes=3, generator=generator())


def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def differing(model, masks):
    """How many weights our masks and the masks that torch left in `model` treat differently."""
    theirs = {f"{name}.weight": layer.weight_mask.bool() for name, layer in model.named_modules() if is_pruned(layer)}
    assert theirs.keys() == masks.keys()
    return sum((theirs[name] != masks[name]).sum().item() for name in masks)


def is_pruned(layer):
    return hasattr(layer, "weight_mask")


@pytest.mark.verifies(
    "compression.pruning.magnitude_masks",
    kind="parity",
    against="torch.nn.utils.prune.l1_unstructured and global_unstructured",
    on="masks of an MLP and a CNN at 5 sparsities, number of weights that differ",
    bound=0,
)
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_smallest_weights_go_as_torch_has_it(make, sparsity, seen):
    layerwise, together = make(), make()
    for layer in linears(layerwise):
        prune.l1_unstructured(layer, "weight", sparsity)
    prune.global_unstructured([(layer, "weight") for layer in linears(together)], prune.L1Unstructured, amount=sparsity)
    seen(differing(layerwise, magnitude_masks(make(), sparsity, scope="layer")))
    seen(differing(together, magnitude_masks(make(), sparsity)))


@pytest.mark.verifies(
    "compression.pruning.neuron_masks",
    kind="parity",
    against="torch.nn.utils.prune.ln_structured(dim=0)",
    on="masks of an MLP and a CNN, L1 and L2 norm, number of weights that differ",
    bound=0,
)
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_the_smallest_rows_go_as_torch_has_it(make, norm, sparsity, seen):
    model = make()
    for layer in linears(model):
        prune.ln_structured(layer, "weight", sparsity, n=norm, dim=0)
    seen(differing(model, neuron_masks(make(), sparsity, norm=norm)))


def test_of_equal_weights_the_first_go_and_the_count_is_exact():
    masks = magnitude_masks({"w": torch.ones(4, 5)}, 0.5)
    assert masks["w"].flatten().tolist() == [False] * 10 + [True] * 10


@pytest.mark.verifies(
    "compression.pruning.apply_masks_",
    "compression.pruning.sparsity_of",
    kind="invariant",
    against="biases and norms stay, weights are zero exactly where the mask says",
    on="an MLP, a CNN and a GPT at 90 %",
)
@pytest.mark.parametrize("make", [mlp, cnn, lambda: GPT(GPTConfig(2, 2, 8, 4, 16), generator=generator())])
def test_only_weights_are_pruned_and_all_else_stays(make):
    model, before = make(), dict(make().named_parameters())
    masks = magnitude_masks(model, 0.9)
    apply_masks_(model, masks)
    for name, p in model.named_parameters():
        want = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(p, want)
        assert (name in masks) == (p.ndim >= 2)
    assert sparsity_of(model) == pytest.approx(0.9, abs=1e-2)


@pytest.mark.verifies(
    "compression.pruning.gradual_sparsity",
    kind="invariant",
    against="Zhu and Gupta 2017, equation 1: its ends, its slope and its middle",
    on="steps before, between and after",
    bound=1e-15,
)
def test_the_gradual_schedule_climbs_from_initial_to_final_and_slows_down(seen):
    rate = [gradual_sparsity(step, start=10, end=30, final=0.9, initial=0.1) for step in range(40)]
    assert len(set(rate[:11])) == 1
    assert rate[30:] == [0.9] * 10
    rises = [b - a for a, b in pairwise(rate[10:31])]
    assert rises == sorted(rises, reverse=True)
    assert rises[-1] > 0
    seen(abs(rate[0] - 0.1))
    seen(abs(rate[20] - (0.9 - 0.8 * 0.5**3)))


OPTIMIZERS = {
    "ours momentum": lambda p: optim.Optimizer(p, optim.Momentum(0.9), 0.1),
    "ours adamw": lambda p: optim.Optimizer(p, optim.AdamW(weight_decay=0.1), 0.01),
    "torch sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "torch adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def take_steps(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 6, generator=generator(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()


@pytest.mark.verifies(
    "compression.pruning.keep_pruned",
    kind="invariant",
    against="pruned weights are exactly zero after every step and the others move",
    on="momentum and AdamW, ours and torch's, with momentum gathered before the pruning",
    bound=0.0,
)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masks_survive_fine_tuning_with_momentum(make, seen):
    model = mlp()
    optimizer = make(model.parameters())
    take_steps(model, optimizer, 3)
    handle = keep_pruned(optimizer, model, magnitude_masks(model, 0.7))
    before = copy.deepcopy(model)
    for step in range(5):
        take_steps(model, optimizer, 1, start=step)
        named = dict(model.named_parameters())
        seen(max(named[name][~mask].abs().max().item() for name, mask in handle.masks.items()))
    old = dict(before.named_parameters())
    assert all((named[name] != old[name])[mask].any() for name, mask in handle.masks.items())
    handle.remove()
    take_steps(model, optimizer, 1)
    assert sparsity_of(model) < 0.1, "without the hook momentum brings pruned weights back: the test can fail"


@pytest.mark.verifies(
    "compression.pruning.keep_pruned",
    kind="recovery",
    against="the same run without the interruption",
    on="masks, weights and optimizer through checkpoint.save and load, bitwise",
    bound=0.0,
)
def test_a_pruned_run_goes_on_from_its_checkpoint(tmp_path, seen):
    def start():
        model = mlp()
        return model, OPTIMIZERS["ours adamw"](model.parameters())

    model, optimizer = start()
    handle = keep_pruned(optimizer, model, magnitude_masks(model, 0.6))
    take_steps(model, optimizer, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "masks": handle.masks}
    checkpoint.save(tmp_path / "run", state)
    take_steps(model, optimizer, 3, start=3)

    resumed, optimizer = start()
    state = checkpoint.load(tmp_path / "run")
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    keep_pruned(optimizer, resumed, state["masks"])
    take_steps(resumed, optimizer, 3, start=3)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        seen((a - b).abs().max().item())


def test_new_masks_prune_at_once():
    model = mlp()
    handle = keep_pruned(torch.optim.SGD(model.parameters(), lr=0.1), model, magnitude_masks(model, 0.2))
    handle.masks = magnitude_masks(model, 0.8)
    assert sparsity_of(model) == pytest.approx(0.8, abs=0.01)


@pytest.mark.verifies(
    "compression.pruning.DynamicPruning",
    kind="parity",
    against="a straight-through estimator written out by hand: forward with w * mask, gradient into dense w",
    on="20 steps of SGD, masks chosen again at each",
    bound=1e-6,
)
def test_dynamic_pruning_steps_the_dense_weights_with_the_gradient_of_the_pruned_ones(seen):
    model, by_hand = mlp(), mlp()
    dynamic = DynamicPruning(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shadows = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    for step in range(20):
        dynamic.update_(0.5)
        take_steps(model, optimizer, 1, start=step)
        masks = magnitude_masks(shadows, 0.5)
        by_hand.load_state_dict({n: w * masks[n] if n in masks else w for n, w in shadows.items()})
        take_steps(by_hand, torch.optim.SGD(by_hand.parameters(), lr=0.0), 1, start=step)  # fills the gradients
        for name, p in by_hand.named_parameters():
            shadows[name] -= 0.1 * p.grad
    for name, shadow in dynamic.shadows.items():
        seen((shadow - shadows[name]).abs().max().item())


def test_a_weight_pruned_dynamically_comes_back_and_the_model_computes_with_exact_zeros():
    model = mlp()
    dynamic = DynamicPruning(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    back = 0
    for step in range(10):
        take_steps(model, optimizer, 1, start=step)
        back += dynamic.update_(0.5)
    assert back > 0
    x = torch.randn(4, 6, generator=generator())
    scores, masks = model(x), {name: mask.clone() for name, mask in dynamic.masks.items()}
    dynamic.remove()
    assert torch.equal(model(x), scores)
    assert type(model.layers[0].weight) is nn.Parameter
    assert all(torch.equal(p != 0, masks[name]) for name, p in model.named_parameters() if name in masks)


def test_without_learning_a_pruned_weight_waits_with_the_value_it_had():
    model = mlp()
    dynamic = DynamicPruning(model, 0.5, learn_pruned=False)
    before = {name: w.detach().clone() for name, w in dynamic.shadows.items()}
    take_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), 3)
    for name, shadow in dynamic.shadows.items():
        pruned = ~dynamic.masks[name]
        assert torch.equal(shadow[pruned], before[name][pruned])
        assert not torch.equal(shadow, before[name])
    dynamic.masks = {name: torch.ones_like(mask) for name, mask in dynamic.masks.items()}
    assert torch.equal(model.layers[0].weight, dynamic.shadows["layers.0.weight"]), "all of them are back"


def test_dynamic_masks_are_part_of_the_models_state():
    saved, loaded = mlp(), mlp()
    DynamicPruning(saved, 0.8)
    dynamic = DynamicPruning(loaded, 0.1)
    loaded.load_state_dict(saved.state_dict())
    assert sum((~mask).sum().item() for mask in dynamic.masks.values()) == round(0.8 * (6 * 8 + 8 * 5 + 5 * 3))


def silenced(model, kept):
    """A copy whose hidden neurons that are not kept give zero."""
    model = copy.deepcopy(model)
    for layer, positions in zip(linears(model), kept, strict=False):
        gone = torch.ones(len(layer.weight), dtype=torch.bool)
        gone[positions] = False
        layer.weight.data[gone], layer.bias.data[gone] = 0.0, 0.0
    return model


@pytest.mark.verifies(
    "compression.pruning.prune_neurons",
    "compression.pruning.prune_channels",
    kind="invariant",
    against="the model of full size with the same neurons or channels set to zero",
    on="given positions and the half with the largest norm, largest difference of the scores",
    bound=1e-6,
)
@pytest.mark.parametrize(
    ("make", "shrink", "kept", "x"),
    [
        (mlp, prune_neurons, [torch.tensor([0, 3, 7]), torch.tensor([4, 1])], torch.randn(9, 6, generator=generator())),
        (cnn, prune_channels, [[0, 2], [1, 3, 4, 5], [2, 4]], torch.rand(9, 1, 7, 7, generator=generator())),
    ],
)
def test_the_smaller_dense_model_computes_the_same(make, shrink, kept, x, seen):
    model = make()
    smaller = shrink(model, kept)
    assert [len(layer.weight) for layer in linears(smaller)] == [*map(len, kept), 3]
    seen((smaller(x) - silenced(model, kept)(x)).abs().max().item())
    largest = [m.flatten(1).any(1).nonzero()[:, 0] for m in list(neuron_masks(model, 0.5).values())[:-1]]
    seen((shrink(model, 0.5)(x) - silenced(model, largest)(x)).abs().max().item())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make().parameters(), strict=True))


@pytest.mark.verifies(
    "compression.pruning.sensitivity",
    kind="invariant",
    against="each weight pruned alone by hand; the model itself unchanged",
    on="the digit model at 3 sparsities",
    bound=0.0,
)
def test_the_sensitivity_scan_prunes_one_weight_at_a_time(seen):
    model = digit_model(generator=generator())
    x = torch.rand(20, 64, generator=generator())
    curves = sensitivity(model, lambda m: m(x).sum().item(), [0.0, 0.5, 0.9])
    assert curves.keys() == {"layers.0.weight", "layers.2.weight"}
    for name, values in curves.items():
        assert values[0] == model(x).sum().item()
        by_hand = copy.deepcopy(model)
        apply_masks_(by_hand, {name: magnitude_masks(model, 0.9, scope="layer")[name]})
        seen(abs(values[2] - by_hand(x).sum().item()))
    assert sparsity_of(model) == 0


WRONG = [
    (lambda: magnitude_masks(mlp(), 1.5), r"sparsity must be a share between 0 and 1, got 1.5"),
    (lambda: magnitude_masks(mlp(), float("nan")), "sparsity must be a share"),
    (lambda: magnitude_masks(mlp(), 0.5, scope="row"), "scope must be 'global' or 'layer', got 'row'"),
    (lambda: magnitude_masks({"b": torch.ones(3)}, 0.5), r"two dimensions or more, got \['b'\]"),
    (lambda: magnitude_masks({"w": torch.full((2, 2), float("nan"))}, 0.5), "must be finite"),
    (lambda: neuron_masks(mlp(), -0.1), "sparsity must be a share"),
    (lambda: gradual_sparsity(0, start=5, end=5, final=0.9), "need start < end, got start=5 and end=5"),
    (lambda: gradual_sparsity(0, start=0, end=5, final=2), "final must be a share"),
    (lambda: apply_masks_(mlp(), {"w": torch.ones(1)}), "must name parameters of the model, got 'w'"),
    (lambda: apply_masks_(mlp(), {"layers.0.weight": torch.ones(8, 6)}), r"must be bool \[8, 6\], got torch.float32"),
    (lambda: prune_neurons(mlp(), 0.01), "at least one neuron in each layer, got 0.01"),
    (lambda: prune_neurons(mlp(), [torch.tensor([0])]), r"hidden layers of \[8, 5\]"),
    (lambda: prune_neurons(mlp(), [torch.tensor([0, 0]), torch.tensor([1])]), "different positions"),
    (lambda: prune_neurons(mlp(), [torch.tensor([8]), torch.tensor([1])]), "different positions"),
]


@pytest.mark.verifies(
    *(f"compression.pruning.{name}" for name in ("magnitude_masks", "gradual_sparsity")),
    kind="message",
    against="ValueError that names the argument and what came",
    on="14 wrong calls of the module",
)
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match=r"models.MLP, got SmallCNN"):
        prune_neurons(cnn(), 0.5)
    with pytest.raises(TypeError, match=r"models.SmallCNN, got MLP"):
        prune_channels(mlp(), 0.5)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got int"):
        keep_pruned(3, mlp(), {})


def test_every_public_name_is_there():
    assert all(hasattr(pruning, name) for name in pruning.__all__)
