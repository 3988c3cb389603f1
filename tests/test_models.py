"""The models compute what torch's own layers compute, from the given generator alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigmodel_course import costs, models

verifies = pytest.mark.verifies
TINY = models.GPTConfig(layers=3, heads=4, width=32, context=16, vocabulary=50)


def fresh(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt(config=TINY, dtype=torch.float64):
    return models.GPT(config, generator=fresh()).to(dtype)


def some_tokens(batch=2, length=16, vocabulary=50):
    return torch.randint(vocabulary, (batch, length), generator=fresh(1))


def largest(got, want):
    return (got - want).abs().max().item()


MAKERS = {
    "mlp": lambda g: models.MLP((7, 5, 3), generator=g),
    "lenet": lambda g: models.LeNet300100(generator=g),
    "digits": lambda g: models.digit_model(generator=g),
    "cnn": lambda g: models.SmallCNN(generator=g),
    "gpt": lambda g: models.GPT(TINY, generator=g),
}

# The same models out of torch's layers, which draw from the global random state in the same order
TORCH = {
    "mlp": lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)),
    "lenet": lambda: nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)),
    "digits": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    ),
}
INPUT = {"mlp": (4, 7), "lenet": (4, 784), "digits": (4, 64), "cnn": (4, 8, 8)}


@verifies("models.MLP", "models.LeNet300100", "models.digit_model", "models.SmallCNN", kind="parity",
          against="nn.Sequential of torch's layers, filled by torch from the same seed",
          on="scores and every gradient, float32", bound=0.0)  # fmt: skip
@pytest.mark.parametrize("name", TORCH)
def test_equals_torchs_own_layers_bit_for_bit(name, seen):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = TORCH[name]()
    ours = MAKERS[name](fresh())
    x = torch.randn(INPUT[name], generator=fresh(1))
    seen(largest(ours(x), theirs(x)))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        seen(largest(p.grad, q.grad))


def test_the_digit_model_has_9610_parameters():
    assert sum(p.numel() for p in models.digit_model(generator=fresh()).parameters()) == 9_610


@verifies("models.MLP", "models.LeNet300100", "models.digit_model", "models.SmallCNN", "models.GPT", kind="invariant",
          against="the same seed again, after the global state has moved", on="every parameter", bound=0.0)  # fmt: skip
@pytest.mark.parametrize("name", MAKERS)
def test_only_the_generator_decides_the_parameters(name, seen):
    first, before = MAKERS[name](fresh()), torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        again = MAKERS[name](fresh())
    MAKERS[name](fresh())
    assert torch.equal(torch.get_rng_state(), before), "the global random state was drawn from"
    for p, q in zip(first.parameters(), again.parameters(), strict=True):
        seen(largest(p, q))
    other = MAKERS[name](fresh(1))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


@verifies("models.SmallCNN", "models.MLP", kind="invariant", against="the same pixels as a flat vector",
          on="images of 8 x 8 and 28 x 28", bound=0.0)  # fmt: skip
@pytest.mark.parametrize("side", [8, 28])
def test_an_image_may_come_flat(side, seen):
    x = torch.randn(3, 1, side, side, generator=fresh())
    for model in (models.SmallCNN(side, generator=fresh()), models.MLP((side**2, 10), generator=fresh())):
        assert model(x).shape == (3, 10)
        seen(largest(model(x), model(x.flatten(1))))


def torch_block(block):
    """torch's own encoder layer with the weights of `block`."""
    width, heads = block.norm1.normalized_shape[0], block.attention.heads
    theirs = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, norm_first=True, batch_first=True,
        activation=lambda x: F.gelu(x, approximate="tanh"), dtype=block.up.weight.dtype,
    )  # fmt: skip
    theirs.load_state_dict(dict(zip(theirs.state_dict(), encoder_order(block), strict=True)))
    return theirs


def encoder_order(block):
    attention = block.attention
    parts = [attention.qkv, attention.out, block.up, block.down, block.norm1, block.norm2]
    return [p for part in parts for p in (part.weight, part.bias)]


def torch_gpt(model, tokens):
    """The scores of `model`, computed by torch's encoder layers under a causal mask."""
    length = tokens.shape[1]
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=model.norm.weight.dtype)
    x = F.embedding(tokens, model.tokens.weight) + model.positions.weight[None, :length]
    for block in model.blocks:
        x = torch_block(block)(x, src_mask=mask)
    x = F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias)
    return x @ model.tokens.weight.T


def shaken(module):
    """Biases and norms moved off 0 and 1, and weights large: else most mistakes would not show."""
    rng = fresh(2)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.1)
    return module


def gpt_bounds(*names, on):
    against = "nn.TransformerEncoderLayer(norm_first=True, tanh GELU) under a causal mask, weights copied"
    return [
        pytest.param(
            dtype, id=text, marks=verifies(*names, kind="parity", against=against, on=f"{on}, {text}", bound=b)
        )
        for dtype, text, b in [(torch.float32, "float32", 1e-5), (torch.float64, "float64", 1e-10)]
    ]


@pytest.mark.parametrize("dtype", gpt_bounds("models.GPT", on="scores, 2 x 1, 11 and 16 tokens"))
@pytest.mark.parametrize("length", [1, 11, 16])
def test_gpt_equals_a_stack_of_torchs_encoder_layers(dtype, length, seen):
    ours, tokens = shaken(gpt(dtype=dtype)), some_tokens(length=length)
    theirs = torch_gpt(ours, tokens)
    seen(largest(ours(tokens), theirs))
    assert theirs.abs().max() > 0.5, "the scores must be large enough for the comparison to say something"


@pytest.mark.parametrize(
    "dtype", gpt_bounds("models.Block", "models.Attention", on="one block, 2 x 16 vectors, and every gradient")
)
def test_a_block_equals_torchs_encoder_layer(dtype, seen):
    block = shaken(gpt(dtype=dtype)).blocks[0]
    x = torch.randn(2, 16, 32, generator=fresh(), dtype=dtype)
    theirs = torch_block(block)
    mask = nn.Transformer.generate_square_subsequent_mask(16, dtype=dtype)
    seen(largest(block(x), theirs(x, src_mask=mask)))
    block(x).square().mean().backward()
    theirs(x, src_mask=mask).square().mean().backward()
    for p, q in zip(encoder_order(block), theirs.parameters(), strict=True):
        seen(largest(p.grad, q.grad))


@verifies("models.GPT", "models.Attention", "models.Block", kind="invariant",
          against="the scores before the last tokens were changed",
          on="each position of 16, float64", bound=1e-14)  # fmt: skip
def test_a_token_changes_nothing_before_it(seen):
    model, tokens = shaken(gpt()), some_tokens(batch=1)
    scores = model(tokens)
    for t in range(16):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after = model(changed)
        if t:
            seen(largest(after[:, :t], scores[:, :t]))
        assert largest(after[:, t], scores[:, t]) > 1e-3


@verifies("models.GPT", kind="invariant", against="a tied head with the same weights", on="untied head", bound=0.0)
def test_an_untied_head_with_the_embeddings_weight_gives_the_same_scores(seen):
    tied = gpt()
    untied = gpt(models.GPTConfig(**{**vars(TINY), "tied": False}))
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.tokens.weight})
    seen(largest(untied(some_tokens()), tied(some_tokens())))


@verifies("models.GPT", kind="invariant", against="GPT-2's initial deviations: 0.02, and 0.02 / sqrt(2 * layers)",
          on="each matrix of the 3M size, relative difference", bound=0.02)  # fmt: skip
def test_gpt_starts_as_gpt2_does(seen):
    config = models.GPT_SIZES["3M"]
    for name, p in models.GPT(config, generator=fresh()).named_parameters():
        if p.ndim == 1:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            added = name.endswith(("attention.out.weight", "down.weight"))
            deviation = 0.02 / (2 * config.layers) ** 0.5 if added else 0.02
            seen(abs(p.std().item() / deviation - 1))


@verifies("models.GPT", kind="invariant", against="the model built on the CPU at once",
          on="built on the meta device, moved, filled", bound=0.0)  # fmt: skip
def test_a_model_built_without_memory_can_be_filled_later(seen):
    with torch.device("meta"):
        model = models.GPT(TINY, generator=fresh())
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").initialise_(fresh())
    for p, q in zip(model.parameters(), models.GPT(TINY, generator=fresh()).parameters(), strict=True):
        seen(largest(p, q))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.MLP((5,), generator=fresh()), r"need at least two widths, all >= 1, got widths=\(5,\)"),
        (lambda: models.MLP((5, 0), generator=fresh()), r"got widths=\(5, 0\)"),
        (lambda: models.digit_model(generator=fresh())(torch.zeros(3, 63)), r"need x with 64 numbers .* got \[3, 63\]"),
        (lambda: models.LeNet300100(generator=fresh())(torch.zeros(784)), r"need x with 784 numbers .* got \[784\]"),
        (lambda: models.SmallCNN(0, generator=fresh()), r"need side, classes and channels >= 1, got side=0"),
        (lambda: models.SmallCNN(generator=fresh())(torch.zeros(3, 1, 9, 9)), r"need x with 64 .* got \[3, 1, 9, 9\]"),
        (lambda: models.GPTConfig(2, 3, 32, 8), r"need a width that the heads divide, got width=32 and heads=3"),
        (lambda: gpt()(torch.zeros(1, 17, dtype=torch.int64)), r"T <= context = 16, got \[1, 17\]"),
        (lambda: gpt()(torch.zeros(16, dtype=torch.int64)), r"need tokens \[B, T\] with .* got \[16\]"),
    ],
)
@verifies("models.MLP", "models.LeNet300100", "models.digit_model", "models.SmallCNN", "models.GPT", "models.GPTConfig",
          kind="message", against="the argument, what was expected, what came", on="one wrong call each")  # fmt: skip
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_config_is_the_one_that_costs_are_made_of():
    assert models.GPTConfig is costs.GPTConfig
