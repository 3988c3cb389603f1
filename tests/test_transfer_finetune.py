"""Frozen parts do not move, features are computed once, and each stage learns at its own rate."""

import copy

import pytest
import torch
from torch import nn

from bigmodel_course import checkpoint, costs, optim
from bigmodel_course.models import GPT, MLP, GPTConfig, SmallCNN, digit_model
from bigmodel_course.schedules import cosine
from bigmodel_course.transfer.finetune import (
    depth_groups,
    features,
    freeze_,
    hold_statistics_,
    replace_head_,
    stages,
    trained_parameters,
    unfreeze_,
    unfreeze_gradually_,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """A trunk with BatchNorm and dropout, and a head."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(8, 3)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator())

    def forward(self, x):
        return self.head(self.trunk(x))


def pictures(n=32, seed=0):
    return torch.randn(n, 6, generator=generator(seed)) + 2


def train_(model, steps=5, lr=0.05, params=None):
    optimizer = torch.optim.AdamW(model.parameters() if params is None else params, lr=lr)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        x = pictures(seed=step)
        nn.functional.cross_entropy(model(x), (x[:, 0] > 2).long()).backward()
        optimizer.step()


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module, before):
    """The largest change of a tensor."""
    return max((t.double() - before[name].double()).abs().max().item() for name, t in module.state_dict().items())


@pytest.mark.verifies(
    "transfer.finetune.freeze_",
    kind="invariant",
    against="parameters, running statistics and outputs of the frozen part stay the same, bit for bit; the head moves",
    on="five steps of AdamW after model.train(), a trunk with BatchNorm and dropout",
    bound=0.0,
)
def test_what_is_frozen_does_not_move_whatever_train_says(seen):
    model = Net()
    freeze_(model, keep=["head"])
    before, head = copies(model.trunk), copies(model.head)
    out = model.trunk(pictures())
    train_(model)
    seen(moved(model.trunk, before))
    model.train()
    seen((model.trunk(pictures()) - out).detach().abs().max())
    assert moved(model.head, head) > 0
    assert model.head.training


def test_the_classic_mistake_is_caught_by_that_test():
    model = Net()
    model.trunk.requires_grad_(False)  # and nothing else
    before, out = copies(model.trunk), model.trunk.eval()(pictures())
    train_(model)
    assert moved(model.trunk, before) > 0.1
    assert (model.trunk.eval()(pictures()) - out).abs().max() > 0.1
    frozen = Net()
    freeze_(frozen, keep=["head"])
    before = copies(frozen.trunk)
    train_(frozen)
    assert moved(frozen.trunk, before) == 0


def test_a_frozen_copy_stays_frozen_and_a_part_may_be_frozen_alone():
    model = Net()
    freeze_(model.trunk[0])
    clone = copy.deepcopy(model)
    before = copies(clone.trunk[0])
    train_(clone)
    assert moved(clone.trunk[0], before) == 0
    assert trained_parameters(model) == trained_parameters(Net()) - (6 * 8 + 8)
    with pytest.raises(ValueError, match="keep must name parts of Net, got fc"):
        freeze_(model, keep=["fc"])


def test_what_was_frozen_before_stays_frozen_when_it_is_kept():
    model = Net()
    model.head.bias.requires_grad_(False)
    freeze_(model, keep=["head"])
    assert trained_parameters(model) == 8 * 3


@pytest.mark.verifies(
    "transfer.finetune.unfreeze_",
    kind="parity",
    against="the same model that was never frozen",
    on="five steps of AdamW in training mode, largest difference of a tensor",
    bound=0.0,
)
def test_unfreezing_leaves_no_trace(seen):
    model, plain = Net(), Net()
    for _ in range(2):
        freeze_(model)
    unfreeze_(model)
    assert trained_parameters(model) == trained_parameters(plain)
    for net in (model, plain):
        torch.manual_seed(0)  # dropout
        train_(net)
    seen(moved(model, copies(plain)))


@pytest.mark.verifies(
    "transfer.finetune.hold_statistics_",
    kind="invariant",
    against="running statistics stay, gains and weights move",
    on="five steps of AdamW after model.train()",
    bound=0.0,
)
def test_statistics_are_held_while_gains_learn(seen):
    model = Net()
    assert hold_statistics_(model) == 2
    before = copies(model)
    train_(model)
    for name, tensor in model.state_dict().items():
        if "running" in name or "tracked" in name:
            seen((tensor.double() - before[name].double()).abs().max())
        else:
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.verifies(
    "transfer.finetune.replace_head_",
    kind="parity",
    against="torch.nn.Linear built after torch.manual_seed",
    on="weights and biases of the new head, largest difference; all else is bitwise the same",
    bound=0.0,
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_new_head_is_filled_as_torch_fills_it(bias, seen):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7, bias=bias).double())
    before, state = copies(model[0]), torch.get_rng_state()
    head = replace_head_(model, "1", 3, generator=generator(4))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
    assert model[1] is head
    assert moved(model[0], before) == 0
    torch.manual_seed(4)
    want = nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    assert head.state_dict().keys() == want.state_dict().keys()
    seen(moved(head, copies(want)))


@pytest.mark.verifies(
    "transfer.finetune.replace_head_",
    kind="message",
    against="the names of the layers that can be replaced",
    on="an unknown name, a layer that is not linear, no class",
)
def test_a_head_that_is_not_there_is_named():
    for name in ("fc", "trunk.1"):
        with pytest.raises(ValueError, match=rf"linear layer of Net \(trunk.0, trunk.4, head\), got '{name}'"):
            replace_head_(Net(), name, 3, generator=generator())
    with pytest.raises(ValueError, match="need classes >= 1, got classes=0"):
        replace_head_(Net(), "head", 0, generator=generator())


@pytest.mark.verifies(
    "transfer.finetune.trained_parameters",
    kind="parity",
    against="costs.mlp and costs.small_cnn, whole and without the frozen layers",
    on="the digit model and a CNN, all trained or the head alone",
    bound=0,
)
@pytest.mark.parametrize(
    ("model", "layers", "head"),
    [
        (digit_model, costs.mlp((64, 128, 10)), "layers.2"),
        (SmallCNN, costs.small_cnn(), "layers.5"),
    ],
)
def test_trained_parameters_are_as_predicted(model, layers, head, seen):
    model = model(generator=generator())
    seen(abs(trained_parameters(model) - costs.total(layers).parameters))
    freeze_(model, keep=[head])
    seen(abs(trained_parameters(model) - layers[-1].parameters))


@pytest.mark.verifies(
    "transfer.finetune.stages",
    kind="invariant",
    against="each parameter stands in a stage, in the order in which the model runs",
    on="an MLP, a CNN, a network with nested Sequentials, a model that names its own stages",
)
def test_stages_hold_every_parameter_once_and_in_order():
    own = Net()
    own.stages = lambda: [own.trunk, own.head]
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.ModuleList([nn.Linear(3, 4)]))
    models = MLP((6, 5, 4, 3), generator=generator()), SmallCNN(generator=generator()), nested, own
    for model, count in zip(models, (3, 3, 2, 2), strict=True):
        parts = stages(model)
        assert len(parts) == count
        assert [p for part in parts for p in part.parameters()] == list(model.parameters())


RULES = {
    "SGD with momentum": (optim.HeavyBall(0.9), lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.9)),
    "AdamW": (optim.AdamW(), lambda p, lr: torch.optim.AdamW([p], lr=lr, foreach=False)),
}


@pytest.mark.verifies(
    "transfer.finetune.depth_groups",
    kind="parity",
    against="one torch.optim optimizer a parameter, with its rate computed by hand",
    on="20 steps of an MLP of three stages, decay 0.5, Optimizer and torch.optim, largest difference of a weight",
    bound=0.0,
)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_each_stage_learns_at_its_own_rate(name, who, seen):
    rule, by_hand = RULES[name]
    mine, theirs = (MLP((6, 5, 4, 3), generator=generator()) for _ in range(2))
    groups = depth_groups(mine, 0.01, 0.5)
    assert [group["lr"] for group in groups] == [0.0025, 0.005, 0.01]
    kinds = {
        "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "AdamW": (torch.optim.AdamW, {"foreach": False}),
    }
    kind, options = kinds[name]
    optimizer = optim.Optimizer(groups, rule, lr=1.0) if who == "ours" else kind(groups, lr=1.0, **options)
    rates = (0.01 * 0.5 * 0.5, 0.01 * 0.5, 0.01)
    layers = [layer for layer in theirs.layers if isinstance(layer, nn.Linear)]
    references = [by_hand(p, lr) for layer, lr in zip(layers, rates, strict=True) for p in layer.parameters()]
    for step in range(20):
        for model, optimizers in ((mine, [optimizer]), (theirs, references)):
            model.zero_grad()
            x = pictures(seed=step)
            nn.functional.cross_entropy(model(x), (x[:, 0] > 2).long()).backward()
            for one in optimizers:
                one.step()
    seen(moved(mine, copies(theirs)))
    assert moved(mine, copies(MLP((6, 5, 4, 3), generator=generator()))) > 0.01


def test_a_schedule_is_scaled_and_a_tied_weight_learns_with_the_first_stage():
    model = GPT(GPTConfig(1, 2, 8, 4, 16, tied=False), generator=generator())
    parts = [model.tokens, model.positions, *model.blocks, nn.ModuleList([model.norm, model.head])]
    model.head.weight = model.tokens.weight
    groups = depth_groups(parts, cosine(0.1, total=10), 0.1)
    assert [group["lr"](0) for group in groups] == [0.1 * 0.1 ** (3 - i) for i in range(4)]
    assert groups[0]["params"] == [model.tokens.weight]
    assert model.tokens.weight not in {*groups[-1]["params"]}
    assert sum(p.numel() for group in groups for p in group["params"]) == trained_parameters(model)


@pytest.mark.verifies(
    "transfer.finetune.depth_groups",
    "transfer.finetune.unfreeze_gradually_",
    kind="message",
    against="the argument, or the parameter that no stage holds",
    on="a decay of 0 and above 1, a parameter outside the stages, a negative epoch, every=0",
)
def test_wrong_rates_and_epochs_are_named():
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match="need 0 < decay <= 1"):
            depth_groups(Net(), 0.1, decay)
    model = Net()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="stages of Net must hold every parameter, and lack scale"):
        depth_groups(model, 0.1, 0.5)
    for wrong in ({"epoch": -1}, {"epoch": 0, "every": 0}):
        with pytest.raises(ValueError, match="need epoch >= 0 and every >= 1"):
            unfreeze_gradually_(Net(), **wrong)


@pytest.mark.verifies(
    "transfer.finetune.unfreeze_gradually_",
    kind="invariant",
    against="the last stages move, the first ones stay bit for bit, one more every second epoch",
    on="an MLP of three stages under one optimizer, seven epochs",
)
def test_stages_are_unfrozen_from_the_last_to_the_first():
    model = MLP((6, 5, 4, 3), generator=generator())
    params, counts = list(model.parameters()), []
    for epoch in range(7):
        counts.append(unfreeze_gradually_(model, epoch, every=2))
        before = [copies(part) for part in stages(model)]
        train_(model, steps=2, params=params)
        changed = [moved(part, old) > 0 for part, old in zip(stages(model), before, strict=True)]
        assert changed == [i >= 3 - counts[-1] for i in range(3)]
    assert counts == [1, 1, 2, 2, 3, 3, 3]


class Counting(nn.Module):
    """A trunk that counts its passes."""

    def __init__(self):
        super().__init__()
        self.net, self.passes = Net().trunk, 0

    def forward(self, x):
        self.passes += 1
        return self.net(x)


@pytest.mark.verifies(
    "transfer.finetune.features",
    kind="parity",
    against="one pass in eval mode; the second call runs nothing",
    on="a trunk with BatchNorm and dropout, 70 examples in pieces of 32",
    bound=1e-6,
)
def test_features_are_those_of_eval_mode_and_computed_once(tmp_path, seen):
    network, x = Counting().double().train(), pictures(70).double()  # pieces are added up in another order than a whole
    first = features(network, x, folder=tmp_path, batch_size=32)
    assert network.passes == 3
    assert network.training  # as it was
    assert torch.equal(features(network, x, folder=tmp_path, batch_size=32), first)
    assert network.passes == 3
    seen((network.net.eval()(x).detach() - first).abs().max())
    assert not first.requires_grad
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_anything_else_is_another_feature(tmp_path):
    x = pictures(8)

    def other(change):
        network = Counting()
        change(network)
        return network

    changes = {
        "a weight": lambda n: n.net[0].weight.data[0, 0].add_(1e-6),
        "a statistic": lambda n: n.net[1].running_mean[0].add_(1.0),
        "a layer that has no tensor": lambda n: n.net.__setitem__(2, nn.GELU()),
    }
    features(Counting(), x, folder=tmp_path)
    for change in changes.values():
        network = other(change)
        features(network, x, folder=tmp_path)
        assert network.passes == 1
    for data in (x + 1e-6, x[:7], x.double().float()):
        network = Counting()
        features(network, data, folder=tmp_path)
        assert network.passes == (0 if torch.equal(data, x) else 1)


@pytest.mark.verifies(
    "transfer.finetune.features",
    kind="recovery",
    against="the right features, and a whole file afterwards where there can be one",
    on="a damaged file, a file cut short, a folder that cannot be written, a crash while writing",
)
def test_a_damaged_or_unwritable_cache_costs_time_and_nothing_else(tmp_path, monkeypatch):
    network, x = Counting(), pictures(8)
    want = features(network, x, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for damaged in (content[:-3], content[:40], b"", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        assert torch.equal(features(network, x, folder=tmp_path), want)
        assert torch.equal(checkpoint.load(path), want)
    (tmp_path / "file").write_text("no folder")
    assert torch.equal(features(network, x, folder=tmp_path / "file" / "below"), want)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    new = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        features(network, x, folder=new)
    assert not list(new.glob("features-*"))


def test_the_cache_folder_may_be_set_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    features(Counting(), pictures(8))
    assert len(list((tmp_path / "cache").iterdir())) == 1
