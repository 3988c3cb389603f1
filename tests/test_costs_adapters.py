"""What training a part costs is what torch counts, and what the tensors weigh."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_course import costs, optim
from bigmodel_course.models import GPT, MLP
from bigmodel_course.transfer.encoder import Encoder, TextClassifier
from bigmodel_course.transfer.lora import adapters, inject_

verifies = pytest.mark.verifies
SHAPE = costs.EncoderConfig(layers=3, heads=2, width=16, hidden=40, vocabulary=30, context=12)
TOKENS, CLASSES, RANK = 7, 3, 2

# name: (targets of adapters, names that `costs` is asked for, parts that train in full)
WAYS = {
    "everything": ((), None, None),
    "the head": ((), ["head"], ["head"]),
    "query and value": (("query", "value"), ["lora", "head"], ["head"]),
    "key, no head": (("key",), ["lora"], []),
    "all linear layers": (("query", "key", "value", "dense"), ["lora", "head"], ["head"]),
    "one layer in the middle": (("layer.1.output.dense",), ["lora", "head"], ["head"]),
    "the last block in full": ((), ["layer.2." + n for n in ("intermediate.dense", "output.dense")], None),
}
every_way = pytest.mark.parametrize("way", WAYS)


def generator():
    return torch.Generator().manual_seed(0)


def model_of(way):
    targets, trained, also = WAYS[way]
    model = TextClassifier(Encoder(SHAPE, generator=generator()), CLASSES)
    if targets:
        inject_(model, targets, rank=RANK, generator=generator(), also=also)
    elif trained is not None:
        model.requires_grad_(False)
        for name, part in model.named_modules():
            if isinstance(part, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in trained):
                part.requires_grad_(True)
    return model


def layers_of(way):
    targets = WAYS[way][0]
    options = {"targets": targets, "rank": RANK} if targets else {}
    return costs.encoder(SHAPE, tokens=TOKENS, classes=CLASSES, **options)


def learning(model):
    return [p for p in model.parameters() if p.requires_grad]


def scores(encoder, head, tokens):
    """The classifier without the checks that look at the tokens' values, which meta tensors do not have."""
    e = encoder.embeddings
    x = e["word_embeddings"](tokens) + e["position_embeddings"].weight[: tokens.shape[1]]
    x = e["LayerNorm"](x + e["token_type_embeddings"].weight[0])
    for block in encoder.encoder["layer"]:
        x = block(x, None)
    return head(x.mean(1))


@verifies(
    "costs.encoder",
    "costs.lora",
    "costs.EncoderConfig",
    "costs.tuning_flops",
    kind="parity",
    against="torch's FlopCounterMode, forward and backward",
    on="an encoder trained in 7 ways: everything, the head, adapters at some, all or one of its layers, one block",
    bound=0,
)
@every_way
def test_the_flops_of_training_a_part_are_what_torch_counts(way, seen):
    model = model_of(way).to("meta")
    with FlopCounterMode(display=False) as counter:
        out = scores(model.encoder, model.head, torch.ones(1, TOKENS, dtype=torch.int64, device="meta"))
        seen(abs(counter.get_total_flops() - costs.total(layers_of(way)).flops))
        out.sum().backward()
    seen(abs(counter.get_total_flops() - costs.tuning_flops(layers_of(way), WAYS[way][1])))


@verifies(
    "costs.trained_parameters",
    "costs.tuning_bytes",
    "costs.encoder",
    kind="parity",
    against="numel, and the bytes of weights, gradients and the optimizer's state after a step",
    on="the same 7 ways, AdamW and Momentum",
    bound=0,
)
@every_way
@pytest.mark.parametrize("rule", [optim.AdamW(), optim.Momentum()], ids=lambda rule: type(rule).__name__)
def test_parameters_and_bytes_are_what_the_tensors_weigh(way, rule, seen):
    model, trained = model_of(way), WAYS[way][1]
    seen(abs(sum(p.numel() for p in learning(model)) - costs.trained_parameters(layers_of(way), trained)))
    optimizer = optim.Optimizer(learning(model), rule, lr=0.1)
    model(torch.ones(2, TOKENS, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = [t for one in optimizer.state.values() for t in one.values() if isinstance(t, torch.Tensor)]
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *state]
    predicted = costs.tuning_bytes(layers_of(way), type(rule).__name__, trained=trained)
    seen(abs(sum(t.nbytes for t in held) - predicted))


@verifies(
    "costs.encoder",
    kind="parity",
    against="saved_tensors_hooks: numbers that autograd keeps",
    on="an encoder whose every parameter learns, one sentence without padding",
    bound=0,
)
def test_the_kept_activations_are_what_autograd_keeps(seen):
    encoder = Encoder(SHAPE, generator=generator())
    own, kept = {p.untyped_storage().data_ptr() for p in encoder.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()  # held in `kept`, so that no later tensor can have its address
        kept[storage.data_ptr()] = (storage, storage.nbytes() // tensor.element_size())
        return tensor

    tokens = torch.ones(1, TOKENS, dtype=torch.int64)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = scores(encoder, nn.Identity(), tokens)
    assert out.requires_grad
    counted = sum(numbers for address, (_, numbers) in kept.items() if address not in own)
    seen(abs(counted - costs.total(costs.encoder(SHAPE, tokens=TOKENS)).activations))


@verifies(
    "costs.tuning_flops",
    kind="invariant",
    against="costs.training_flops",
    on="a GPT and an encoder of which everything learns",
    bound=0,
)
def test_training_everything_is_what_training_costs(seen):
    gpt = costs.gpt(costs.GPTConfig(layers=2, heads=2, width=8, context=6, tied=False))
    for layers in (gpt, costs.encoder(SHAPE, tokens=TOKENS, classes=2)):
        seen(abs(costs.tuning_flops(layers) - costs.training_flops(layers)))


@verifies(
    "costs.lora",
    "costs.tuning_flops",
    kind="parity",
    against="torch's FlopCounterMode, forward and backward",
    on="adapters on an MLP and on an untied GPT",
    bound=0,
)
def test_adapters_of_other_models_are_counted_as_well(seen):
    mlp = MLP((6, 8, 3), generator=generator())
    inject_(mlp, ["layers.2"], rank=2, generator=generator())
    listed = [*costs.mlp((6, 8, 3)), *costs.lora(8, 3, 2)]
    config = costs.GPTConfig(layers=2, heads=2, width=8, context=6, vocabulary=9, tied=False)
    gpt = GPT(config, generator=generator())
    inject_(gpt, ["qkv"], rank=2, generator=generator())
    more = []
    for layer in costs.gpt(config):
        more += [layer, *(costs.lora(8, 24, 2, rows=6) if layer.name.endswith("qkv") else [])]
    tokens = torch.ones(1, 6, dtype=torch.int64, device="meta")
    for model, layers, x in ((mlp, listed, torch.ones(1, 6, device="meta")), (gpt, more, tokens)):
        model.to("meta")
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        seen(abs(counter.get_total_flops() - costs.tuning_flops(layers, ["lora"])))
        found = [layer.down.numel() + layer.up.numel() for layer in adapters(model).values()]
        assert sum(found) == costs.trained_parameters(layers, ["lora"])


WRONG = [
    (lambda: costs.EncoderConfig(2, 3, 16, 32, 10, 8), "a width that the heads divide, got width=16 and heads=3"),
    (lambda: costs.EncoderConfig(0, 2, 16, 32, 10, 8), "need layers >= 1, got layers=0"),
    (lambda: costs.encoder(SHAPE, tokens=13), "need 1 <= tokens <= context = 12, got tokens=13"),
    (lambda: costs.encoder(SHAPE, tokens=3, targets=["head"], rank=2), r"targets must name linear layers.*\['head'\]"),
    (lambda: costs.encoder(SHAPE, tokens=3, targets=["query"]), "need rank >= 1, got rank=0"),
    (lambda: costs.lora(3, 4, 0), "need rank >= 1, got rank=0"),
    (lambda: costs.trained_parameters(costs.mlp((2, 3)), ["head"]), "trained must name layers, got 'head'"),
    (lambda: costs.tuning_flops(costs.mlp((2, 3)), ["lora"]), "trained must name layers, got 'lora'"),
    (lambda: costs.tuning_bytes(costs.mlp((2, 3)), "Adan"), "need a rule among"),
]


@verifies(
    "costs.EncoderConfig",
    "costs.encoder",
    "costs.lora",
    "costs.trained_parameters",
    "costs.tuning_flops",
    "costs.tuning_bytes",
    kind="message",
    against="ValueError that names the argument and what came",
    on="9 wrong calls",
)
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
