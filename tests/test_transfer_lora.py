"""Adapters start as nothing, train as peft's do, go into the weight and out again, and know the base they are for."""

import copy
import json
import os

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bigmodel_course import costs, optim
from bigmodel_course.models import GPT, MLP, GPTConfig
from bigmodel_course.transfer import lora
from bigmodel_course.transfer.adapter_files import base_hash, load_adapter_, save_adapter
from bigmodel_course.transfer.encoder import Encoder, TextClassifier
from bigmodel_course.transfer.lora import LoRALinear, adapters, inject_, merge_, unmerge_

verifies = pytest.mark.verifies
TINY_GPT = GPTConfig(layers=2, heads=2, width=12, context=9, vocabulary=20, tied=False)
TINY_ENCODER = costs.EncoderConfig(layers=2, heads=2, width=12, hidden=20, vocabulary=20, context=9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp():
    return MLP((6, 8, 5, 3), generator=generator())


def gpt():
    return GPT(TINY_GPT, generator=generator())


def classifier():
    return TextClassifier(Encoder(TINY_ENCODER, generator=generator()), 3)


def tokens(seed=0):
    return torch.randint(1, 20, (7, 9), generator=generator(seed))


def numbers(seed=0):
    return torch.randn(7, 6, generator=generator(seed))


# What is adapted, at which layers, which part trains in full, and what goes in.
MODELS = {
    "mlp": (mlp, ["layers.0", "layers.2"], ["layers.4"], numbers),
    "gpt": (gpt, ["qkv", "out", "down"], [], tokens),
    "encoder": (classifier, ["query", "value", "intermediate.dense"], ["head"], tokens),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def adapted(kind, *, rank=2, alpha=6.0, dtype=torch.float32):
    make, targets, also, _ = MODELS[kind]
    model = make().to(dtype)
    inject_(model, targets, rank=rank, alpha=alpha, generator=generator(1), also=also)
    return model


def inputs(kind, seed=0, dtype=torch.float32):
    x = MODELS[kind][3](seed)
    return x.to(dtype) if x.is_floating_point() else x


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss(model, x):
    """Of made-up labels: a class for each row, or for a GPT the token itself."""
    scores = model(x)
    labels = x if scores.ndim == 3 else torch.arange(len(x)) % 3
    return cross_entropy(scores.flatten(0, -2), labels.flatten())


def train(model, kind, steps=5, lr=0.02, dtype=torch.float32):
    """A few steps of AdamW; the last gradients stay."""
    optimizer = optim.Optimizer(trainable(model).values(), optim.AdamW(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, inputs(kind, step, dtype)).backward()
        optimizer.step()
    return optimizer


@verifies(
    "transfer.lora.inject_",
    "transfer.lora.LoRALinear",
    "transfer.lora.adapters",
    kind="invariant",
    against="the model before the injection",
    on="scores of an MLP, a GPT and an encoder, bitwise; only adapters and the named part are trainable",
    bound=0.0,
)
@every_model
def test_the_start_is_exactly_the_model_that_is_adapted(kind, seen):
    make, targets, also, _ = MODELS[kind]
    before, model = make(), make()
    made = inject_(model, targets, rank=2, generator=generator(), also=also)
    seen((model(inputs(kind)) - before(inputs(kind))).abs().max().item())
    assert made == adapters(model)
    whole = {name for name, _ in before.named_parameters() if name.rpartition(".")[0] in also}
    assert trainable(model).keys() == whole | {f"{name}.{side}" for name in made for side in ("down", "up")}


def with_peft(kind):
    """The same model with peft's adapters, which hold the numbers that ours hold."""
    make, targets, _, _ = MODELS[kind]
    settings = peft.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.0, target_modules=targets, bias="none")
    model = peft.inject_adapter_in_model(settings, make())
    for name, layer in adapters(adapted(kind)).items():
        theirs = model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.down.data)
        theirs.lora_B["default"].weight.data.copy_(layer.up.data)
    for part in MODELS[kind][2]:
        model.get_submodule(part).requires_grad_(True)
    return model


def their_name(name):
    for ours, theirs in ((".down", ".lora_A.default.weight"), (".up", ".lora_B.default.weight")):
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


@verifies(
    "transfer.lora.LoRALinear",
    "transfer.lora.merge_",
    kind="parity",
    against="peft.inject_adapter_in_model and its merge",
    on="scores, gradients and merged weights of an MLP, a GPT and an encoder, after 1 and 5 steps of AdamW",
    bound=1e-6,
)
@every_model
@pytest.mark.parametrize("steps", [1, 5])
def test_outputs_gradients_and_merged_weights_are_those_of_peft(kind, steps, seen):
    ours, theirs = adapted(kind), with_peft(kind)
    seen((ours(inputs(kind)) - theirs(inputs(kind))).abs().max().item())
    train(ours, kind, steps), train(theirs, kind, steps)
    named = dict(theirs.named_parameters())
    assert {their_name(name) for name in trainable(ours)} == {name for name, p in named.items() if p.requires_grad}
    for name, p in trainable(ours).items():
        seen((p - named[their_name(name)]).abs().max().item())
        seen((p.grad - named[their_name(name)].grad).abs().max().item())
        assert p.grad.abs().max() > 0 or (steps == 1 and not name.endswith("bias")), name
    seen((ours(inputs(kind)) - theirs(inputs(kind))).abs().max().item())
    merge_(ours)
    for name, layer in adapters(ours).items():
        other = theirs.get_submodule(name)
        other.merge()
        seen((layer.base.weight - other.base_layer.weight).abs().max().item())


@verifies(
    "transfer.lora.merge_",
    kind="invariant",
    against="the model with its adapters beside the weights",
    on="scores of trained models, merged for a while and for good, float32",
    bound=1e-6,
)
@every_model
def test_a_merged_model_computes_the_same(kind, seen):
    model = adapted(kind)
    train(model, kind)
    model.eval()
    scores = model(inputs(kind))
    assert (scores - MODELS[kind][0]()(inputs(kind))).abs().max() > 1e-2, "it has learned: the test can fail"
    final = copy.deepcopy(model)
    merge_(model)
    merge_(final, keep=False)
    seen((model(inputs(kind)) - scores).abs().max().item())
    assert torch.equal(final(inputs(kind)), model(inputs(kind)))
    plain = MODELS[kind][0]()
    plain.load_state_dict(final.state_dict())  # the old names and nothing else
    assert torch.equal(plain.eval()(inputs(kind)), final(inputs(kind)))


@verifies(
    "transfer.lora.merge_",
    kind="invariant",
    against="the same, in float64",
    on="scores of trained models",
    bound=1e-14,
)
@every_model
def test_in_float64_merging_costs_no_more_than_its_rounding(kind, seen):
    model = adapted(kind, dtype=torch.float64)
    train(model, kind, dtype=torch.float64)
    scores = model.eval()(inputs(kind, dtype=torch.float64))
    merge_(model)
    seen((model(inputs(kind, dtype=torch.float64)) - scores).abs().max().item())


@verifies(
    "transfer.lora.unmerge_",
    kind="invariant",
    against="weights and scores before merge_, bitwise",
    on="three models, merged and unmerged three times",
    bound=0.0,
)
@every_model
def test_unmerging_gives_every_bit_back_and_training_goes_on(kind, seen):
    model = adapted(kind)
    train(model, kind)
    state, scores = copy.deepcopy(model.state_dict()), model(inputs(kind))
    for _ in range(3):
        merge_(model)
        assert all(layer.merged for layer in adapters(model).values())
        unmerge_(model)
    for name, tensor in model.state_dict().items():
        seen((tensor - state[name]).abs().max().item())
    assert torch.equal(model(inputs(kind)), scores)
    train(model, kind, steps=1)


def test_subtracting_the_update_would_miss_bits():
    layer = adapters(adapted("mlp"))["layers.0"]
    nn.init.normal_(layer.up, generator=generator(2))
    weight = layer.base.weight.detach().clone()
    layer.merge_()
    subtracted = (layer.base.weight.detach().double() - layer.update()).float()
    assert not torch.equal(subtracted, weight)
    layer.unmerge_()
    assert torch.equal(layer.base.weight, weight)


@every_model
def test_the_update_has_the_rank_of_the_adapter_and_the_base_does_not_move(kind):
    model, before = adapted(kind), MODELS[kind][0]()
    train(model, kind)
    for name, layer in adapters(model).items():
        values = torch.linalg.svdvals(layer.update())
        assert int((values > 1e-12 * values[0]).sum()) == 2
        assert torch.equal(layer.base.weight, before.get_submodule(name).weight)


@verifies(
    "costs.lora",
    kind="invariant",
    against="parameters counted and the tensors in the optimizer's state",
    on="adapters of ranks 1 and 3 on an MLP, a GPT and an encoder",
    bound=0,
)
@every_model
@pytest.mark.parametrize("rank", [1, 3])
def test_parameters_and_optimizer_bytes_are_predicted_exactly(kind, rank, seen):
    make, targets, _, _ = MODELS[kind]
    model = make()
    shapes = [layer.base.weight.shape for layer in inject_(model, targets, rank=rank, generator=generator()).values()]
    predicted = sum(costs.total(costs.lora(i, o, rank)).parameters for o, i in shapes)
    seen(abs(sum(p.numel() for p in trainable(model).values()) - predicted))
    optimizer = train(model, kind, steps=1)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    seen(abs(held - costs.optimizer_bytes(predicted, "AdamW")))


@verifies(
    "transfer.adapter_files.save_adapter",
    "transfer.adapter_files.load_adapter_",
    "transfer.adapter_files.base_hash",
    kind="recovery",
    against="the model that was saved",
    on="scores after loading onto a fresh base, bitwise; three models",
    bound=0.0,
)
@every_model
def test_an_adapter_is_saved_alone_and_loaded_onto_its_base(kind, tmp_path, seen):
    model, base = adapted(kind), MODELS[kind][0]()
    train(model, kind)
    save_adapter(tmp_path / "adapter", model)
    brings = [name for name in trainable(model) if not name.endswith((".down", ".up"))]
    assert base_hash(model, without=brings) == base_hash(base, without=brings)
    stored = safetensors.torch.load_file(tmp_path / "adapter")
    assert stored.keys() == trainable(model).keys(), "nothing of the base is in the file"
    made = load_adapter_(base, tmp_path / "adapter")
    seen((base(inputs(kind)) - model(inputs(kind))).abs().max().item())
    assert trainable(base).keys() == trainable(model).keys()
    assert all((layer.rank, layer.alpha) == (2, 6.0) for layer in made.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = adapted("mlp")
    save_adapter(tmp_path / "adapter", model)
    old = (tmp_path / "adapter").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    train(model, "mlp")
    with pytest.raises(OSError, match="no space"):
        save_adapter(tmp_path / "adapter", model)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter").read_bytes() == old


def other_bits():
    model = mlp()
    model.layers[0].weight.data[0, 0] += 1e-7
    return model


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def plain_tensors(path):
    safetensors.torch.save_file({"w": torch.ones(2)}, path)


def renamed(path):
    tensors = safetensors.torch.load_file(path)
    tensors["layers.9.down"] = tensors.pop("layers.0.down")
    with safetensors.safe_open(path, "pt") as file:
        described = file.metadata()
    safetensors.torch.save_file(tensors, path, described)


def says(**wrong):
    def change(path):
        with safetensors.safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["adapter"]) | wrong
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"adapter": json.dumps(described)})

    return change


REFUSED = [
    (other_bits, None, "trained on weights with SHA-256 .*…, and this model's is .*…: on other weights"),
    (lambda: MLP((6, 8, 4, 3), generator=generator()), None, r"layers.2.up is \[5, 2\], and the model needs \[4, 2\]"),
    (lambda: MLP((6, 8), generator=generator()), None, "linear layer 'layers.2', and the model has none"),
    (lambda: MLP((6, 8, 5), generator=generator()), None, "brings 'layers.4.weight', and the model has no parameter"),
    (lambda: adapted("mlp"), None, "has adapters already"),
    (mlp, cut, "adapter is no whole safetensors file"),
    (mlp, plain_tensors, "holds tensors, but no adapter of this course"),
    (mlp, renamed, r"does not hold what it says: \['layers.0.down', 'layers.9.down'\]"),
    (mlp, says(rank=3), r"layers.0.down is \[2, 6\], and the model needs \[3, 6\]"),
    (mlp, says(layers=3), "does not say of which layers"),
    (mlp, says(base="0" * 64), "trained on weights with SHA-256 000000000000…"),
]


@verifies(
    "transfer.adapter_files.load_adapter_",
    kind="message",
    against="ValueError that says what does not fit, and a model left as it was",
    on="another base, other shapes, and files cut, plain or changed: 11 cases",
)
@pytest.mark.parametrize(("make", "spoil", "message"), REFUSED)
def test_an_adapter_is_refused_where_it_does_not_belong(make, spoil, message, tmp_path):
    trained = adapted("mlp")
    train(trained, "mlp")
    save_adapter(tmp_path / "adapter", trained)
    if spoil:
        spoil(tmp_path / "adapter")
    model = make()
    names, state, learns = list(model.state_dict()), copy.deepcopy(model.state_dict()), trainable(model).keys()
    with pytest.raises(ValueError, match=message):
        load_adapter_(model, tmp_path / "adapter")
    assert list(model.state_dict()) == names
    assert trainable(model).keys() == learns
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def tied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def injected(model, targets, rank=2, **options):
    return inject_(model, targets, rank=rank, generator=generator(), **options)


def merged():
    model = adapted("mlp")
    merge_(model)
    return model


WRONG = [
    (lambda m: injected(m, ["layers.9"]), r"must name linear layers \(0, 2, 4\), got 'layers.9': none"),
    (lambda m: injected(m, ["layers.1"]), r"got 'layers.1': \['ReLU'\]"),
    (lambda m: injected(m, []), "at least one linear layer"),
    (lambda m: injected(m, ["layers.0"], rank=7), r"rank must be 1 to 6 for a layer of \[8, 6\], got 7"),
    (lambda m: injected(m, ["layers.0"], rank=0), "rank must be 1 to 6"),
    (lambda m: injected(m, ["layers.0"], alpha=0.0), "alpha must be above 0 and finite, got 0.0"),
    (lambda m: injected(m, ["layers.0"], alpha=float("nan")), "alpha must be above 0"),
    (lambda m: injected(m, ["layers.0"], also=["head"]), "also must name parts of the model, got 'head'"),
    (lambda m: injected(m, ["layers.0"], also=["layers"]), "also trains 'layers.0' in full"),
    (lambda m: injected(adapted("mlp"), ["layers.0"]), "has adapters already"),
    (lambda m: injected(tied(), ["1"]), "'1', whose weight another layer shares"),
    (lambda m: merge_(m), "no adapters: call inject_ first"),
    (lambda m: merge_(merged()), "merged already: merging again would add the update a second time"),
    (lambda m: unmerge_(adapted("mlp")), "not merged: there is nothing to take back"),
    (lambda m: save_adapter("x", m), "no adapters to save"),
    (lambda m: save_adapter("x", merged()), "base is not as it was: call unmerge_ first"),
    (lambda m: save_adapter("x", adapted("mlp").requires_grad_(False)), "these are frozen"),
]


@verifies(
    "transfer.lora.inject_",
    "transfer.lora.merge_",
    "transfer.lora.unmerge_",
    "transfer.adapter_files.save_adapter",
    kind="message",
    against="ValueError that names the argument and what came, and a model left as it was",
    on="17 wrong calls",
)
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named_and_changes_nothing(call, message):
    model, names = mlp(), list(mlp().state_dict())
    with pytest.raises(ValueError, match=message):
        call(model)
    assert list(model.state_dict()) == names
    assert len(trainable(model)) == len(names)


def test_one_name_in_place_of_a_list_is_named():
    with pytest.raises(TypeError, match=r"got the string 'query': write \['query'\]"):
        injected(mlp(), "query")


def test_a_merged_adapter_does_not_pretend_to_train():
    model = merged().train()
    with pytest.raises(RuntimeError, match="training would not reach it: call unmerge_ first"):
        model(numbers())
    with torch.no_grad():
        model(numbers())


def test_with_both_matrices_zero_nothing_ever_moves():
    model = adapted("mlp")
    for layer in adapters(model).values():
        nn.init.zeros_(layer.down)
    train(model, "mlp", steps=3)
    assert all(not p.any() for layer in adapters(model).values() for p in (layer.up, layer.down))


def test_every_public_name_is_there():
    assert all(hasattr(lora, name) for name in lora.__all__)
    assert isinstance(adapters(adapted("mlp"))["layers.0"], LoRALinear)
