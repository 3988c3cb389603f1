"""A model cut over the ranks trains as on one process and as torch's own tensor parallelism does; known faults show.

The models are given random biases and norms: fresh ones are 0 and 1, and would hide a bias that is added twice.
"""

import functools
import itertools
import re
import sys
from unittest import mock

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bigmodel_course.distributed import regions, tensor_parallel, vocabulary
from bigmodel_course.distributed.launch import device, launch
from bigmodel_course.distributed.regions import reduce_from, scatter_sequence
from bigmodel_course.distributed.tensor_parallel import (
    ColumnLinear,
    RowLinear,
    clip_gradients_,
    load_whole_,
    parallelize_,
    whole_state_dict,
    whole_tensors,
)
from bigmodel_course.distributed.vocabulary import vocabulary_cross_entropy
from bigmodel_course.models import GPT, GPTConfig
from bigmodel_course.optim import AdamW, Optimizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest
verifies = pytest.mark.verifies
MODULE = "distributed.tensor_parallel"
VOCABULARY = 21  # neither 2 nor 4 ranks divide it
ON_CPU = {"backend": "gloo", "timeout": 200.0}  # seconds; a busy machine is not a fault
FROZEN = {
    "nothing": (),
    "much": (
        "tokens",
        "positions",
        "blocks.0",
        "blocks.1.norm2.weight",
        "blocks.1.attention.qkv",
        "blocks.1.down.bias",
    ),
}
REPLICATED = re.compile(r"norm|positions|(out|down)\.bias")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def config(tied):
    return GPTConfig(layers=2, heads=4, width=16, context=8, vocabulary=VOCABULARY, tied=tied)


@torch.no_grad()
def make(tied=True, frozen="nothing", dtype=torch.float64):
    """A whole model whose biases and norms are random too."""
    model = GPT(config(tied), generator=generator()).to(dtype)
    rng = generator(1)
    for name, p in model.named_parameters():
        p.add_(torch.randn(p.shape, dtype=torch.float64, generator=rng).to(dtype) * 0.2)
        p.requires_grad_(not name.startswith(FROZEN[frozen] or "none"))
    return model


def sequences(seed, rows=3):
    tokens = torch.randint(0, VOCABULARY, (rows, 9), generator=generator(seed))
    return tokens[:, :-1], tokens[:, 1:]


def whole_loss(model, x, y, **options):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), **options)


def train(model, loss, micros, steps=2, seed=0):
    """Steps of AdamW; its eps is large, or rounding would decide the step of a gradient that is 0 in theory."""
    optimizer = Optimizer([p for p in model.parameters() if p.requires_grad], AdamW(eps=1e-4), 0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(micros):
            part = loss(model, *sequences(100 * seed + 10 * step + micro)) / micros
            part.backward()
            losses.append(part.item())
        optimizer.step()
    return losses


def parallel_loss(model, x, y, group=None):
    return vocabulary_cross_entropy(model(x), y, VOCABULARY, group=group)


@functools.cache
def one_process(tied, frozen, micros, seed=0):
    model = make(tied, frozen)
    return train(model, whole_loss, micros, seed=seed), model.state_dict()


def gap(a, b):
    """The largest difference of two state_dicts, in absolute terms."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def trained_in_parallel():
    """All cases on this rank: losses, the whole weights, and this rank's copies of replicated parameters."""
    results = {}
    for tied, frozen, micros, sequence in itertools.product([True, False], FROZEN, [1, 3], [False, True]):
        model = parallelize_(make(tied, frozen), sequence=sequence)
        losses = train(model, parallel_loss, micros)
        copies = {name: p for name, p in model.state_dict().items() if REPLICATED.search(name)}
        results[tied, frozen, micros, sequence] = losses, whole_state_dict(model), copies
    return results


@functools.cache
def on_ranks(fn, ranks):
    return launch(fn, ranks, **ON_CPU)


CUT = [f"{MODULE}.{name}" for name in ("parallelize_", "ColumnLinear", "RowLinear", "whole_state_dict")]
CUT += [f"distributed.vocabulary.{name}" for name in ("VocabularyEmbedding", "vocabulary_cross_entropy")]
CUT += [f"distributed.regions.{name}" for name in ("Cut", "copy_to", "reduce_from", "share")]
CUT_BY_TOKENS = [f"distributed.regions.{name}" for name in ("gather_sequence", "scatter_sequence", "split_sequence")]
CUT_BY_TOKENS += [f"{MODULE}.SequenceNorm", f"{MODULE}.parallelize_"]
EQUAL = {
    "kind": "equals one process",
    "against": "models.GPT whole, F.cross_entropy, AdamW",
    "on": "ranks 1, 2, 4; 1 and 3 microbatches; tied, frozen; a vocabulary of 21: losses, weights of 2 steps, float64",
    "bound": 1e-12,
}
BOTH = [
    pytest.param(False, marks=verifies(*CUT, **EQUAL), id="matrices cut"),
    pytest.param(
        True, marks=verifies(*CUT_BY_TOKENS, **EQUAL | {"on": f"sequence; {EQUAL['on']}"}), id="tokens cut too"
    ),
]


@pytest.mark.parametrize("sequence", BOTH)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_one_process(ranks, sequence, seen):
    answers = on_ranks(trained_in_parallel, ranks)
    for tied, frozen, micros in itertools.product([True, False], FROZEN, [1, 3]):
        losses, weights = one_process(tied, frozen, micros)
        parallel = [results[tied, frozen, micros, sequence] for results in answers]
        for own_losses, own_weights, copies in parallel:
            seen(max(abs(a - b) for a, b in zip(losses, own_losses, strict=True)))
            seen(gap(weights, own_weights))
            assert gap(copies, parallel[0][2]) == 0, "replicated parameters are the same on every rank, to the bit"


def pairs_in_a_world(ranks):
    """The world cut into groups of two, each with data of its own, as data parallelism would have it."""
    members = [[rank, rank + ranks // 2] for rank in range(ranks // 2)]
    groups = [dist.new_group(pair) for pair in members]
    mine = dist.get_rank() % (ranks // 2)
    results = []
    for sequence in (False, True):
        model = parallelize_(make(), groups[mine], sequence=sequence)
        losses = train(model, functools.partial(parallel_loss, group=groups[mine]), micros=1, seed=mine + 1)
        clip_gradients_(model, 1.0)
        results.append((losses, whole_state_dict(model)))
    return mine, results


@verifies(
    f"{MODULE}.parallelize_",
    kind="equals one process",
    against="models.GPT whole on that group's data",
    on="4 ranks as two groups of 2 ranks that are not neighbours, with and without sequence, float64",
    bound=1e-12,
)
def test_works_inside_groups_of_a_larger_world(seen):
    for mine, results in launch(pairs_in_a_world, 4, 4, **ON_CPU):
        losses, weights = one_process(True, "nothing", 1, seed=mine + 1)
        for own_losses, own_weights in results:
            seen(max(abs(a - b) for a, b in zip(losses, own_losses, strict=True)))
            seen(gap(weights, own_weights))


class SplitAttention(nn.Module):
    """Attention with three matrices in place of one, so that DTensor, which cuts rows in a row, cuts heads."""

    def __init__(self, attention):
        super().__init__()
        self.width = attention.qkv.in_features // attention.heads
        for name, w, b in zip("qkv", attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True):
            layer = nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype)
            layer.load_state_dict({"weight": w, "bias": b})
            setattr(self, name, layer)
        self.out = attention.out

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (-1, self.width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class SplitGPT(nn.Module):
    """models.GPT with split attention and an untied module for the head, for torch's parallelize_module."""

    def __init__(self, gpt):
        super().__init__()
        self.tokens, self.blocks, self.norm, self.head = gpt.tokens, gpt.blocks, gpt.norm, gpt.head
        self.positions, self.enter = gpt.positions, nn.Identity()
        for block in self.blocks:
            block.attention = SplitAttention(block.attention)
        if gpt.head is None:
            self.head = nn.Linear(*reversed(gpt.tokens.weight.shape), bias=False, dtype=gpt.tokens.weight.dtype)
            self.head.weight = gpt.tokens.weight

    def forward(self, tokens):
        x = self.enter(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def by_dtensor(tied, sequence, dtype):
    """The same model, cut by torch.distributed.tensor.parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    model, mesh = SplitGPT(make(tied, dtype=dtype)), init_device_mesh("cpu", (dist.get_world_size(),))
    stream = Shard(1) if sequence else Replicate()
    row = RowwiseParallel(output_layouts=stream, use_local_output=not sequence)
    plan = {f"blocks.*.attention.{name}": ColwiseParallel() for name in "qkv"}
    plan |= {"blocks.*.up": ColwiseParallel(input_layouts=stream), "blocks.*.attention.out": row, "blocks.*.down": row}
    plan |= {"tokens": RowwiseParallel(input_layouts=Replicate())}
    plan |= {"head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False)}
    if sequence:
        plan |= {"blocks.*.attention": PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate())}
        plan |= {name: SequenceParallel() for name in ("blocks.*.norm1", "blocks.*.norm2", "norm")}
        plan |= {"enter": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=stream)}
    parallelize_module(model, mesh, plan)
    if tied:
        model.head.weight = model.tokens.weight
    return model


def whole_by_dtensor(model):
    """DTensor's weights, joined, under the names of models.GPT."""
    state = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}
    for name in [name for name in state if ".q." in name]:
        state[name.replace(".q.", ".qkv.")] = torch.cat([state.pop(name.replace(".q.", f".{c}.")) for c in "qkv"])
    return state


def trained_by_both():
    from torch.distributed.tensor.parallel import loss_parallel

    results = []
    for tied, sequence, dtype in itertools.product([True, False], [False, True], [torch.float64, torch.float32]):
        ours = parallelize_(make(tied, dtype=dtype), sequence=sequence)
        losses = train(ours, parallel_loss, 1)
        theirs = by_dtensor(tied, sequence, dtype)
        with loss_parallel():
            their_losses = train(theirs, whole_loss, 1)
        results.append((dtype, losses, their_losses, gap(whole_state_dict(ours), whole_by_dtensor(theirs))))
    return results


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        pytest.param(ranks, dtype, marks=verifies(
            f"{MODULE}.parallelize_", f"{MODULE}.SequenceNorm", "distributed.vocabulary.vocabulary_cross_entropy",
            kind="parity",
            against="torch parallelize_module (Colwise, Rowwise, SequenceParallel), loss_parallel",
            on=f"2 and 4 ranks, tied and not, with and without sequence: losses and weights of 2 AdamW steps, {dtype}",
            bound=bound,
        ))
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-4)) for ranks in (2, 4)
    ],
)  # fmt: skip
def test_trains_as_torchs_own_tensor_parallelism(ranks, dtype, seen):
    for results in on_ranks(trained_by_both, ranks):
        for _, losses, their_losses, weights in (result for result in results if result[0] == dtype):
            seen(max(abs(a - b) for a, b in zip(losses, their_losses, strict=True)))
            seen(weights)


def summed_twice(x, group=None):
    """What a collective that knows autograd does by itself: the sum's backward sums again."""
    return regions._Cross.apply(x, regions._sum, regions._sum, group)


def biased_on_every_rank(self, x):
    enter = scatter_sequence if self.sequence else reduce_from
    return enter(F.linear(x, self.weight, self.bias), self.group)


FAULTS = {  # what is wrong: (what to replace, by what)
    "nothing": (tensor_parallel, "reduce_from", reduce_from),
    "packed queries, keys and values cut as one matrix": (
        tensor_parallel, "ColumnLinear", lambda linear, *, parts=1, **options: ColumnLinear(linear, **options)
    ),
    "bias of a row-cut matrix added on every rank": (RowLinear, "forward", biased_on_every_rank),
    "input's gradient not summed": (tensor_parallel, "copy_to", lambda x, group=None: x),
    "sum's gradient summed again": (tensor_parallel, "reduce_from", summed_twice),
    "norms' gradients not summed": (tensor_parallel, "_replicated", lambda p, group: p),
    "each rank subtracts its own largest score": (vocabulary, "_largest", lambda x, group: x.detach().amax(-1)),
    "each rank counts the target as its own": (
        vocabulary, "_own_places",
        lambda tokens, size, group: (tokens.clamp(max=size // 2 - 1), torch.zeros_like(tokens, dtype=torch.bool)),
    ),
}  # fmt: skip


def with_faults():
    """What each fault does to the loss and to the gradients, on this rank, against one process."""
    whole, (x, y) = make(), sequences(0)
    whole_loss(whole, x, y).backward()
    results = {}
    for (fault, change), sequence in itertools.product(FAULTS.items(), [False, True]):
        with mock.patch.object(*change):
            model = parallelize_(make(), sequence=sequence)
            loss = parallel_loss(model, x, y)
            loss.backward()
        grads = whole_tensors(model, {name: p.grad for name, p in model.named_parameters()})
        moved = max((p.grad - grads[name]).abs().max().item() for name, p in whole.named_parameters())
        results[fault, sequence] = (loss - whole_loss(whole, x, y)).abs().item(), moved
    return results


@verifies(
    f"{MODULE}.whole_tensors",
    *(f"{MODULE}.{name}" for name in ("ColumnLinear", "RowLinear", "SequenceNorm")),
    kind="invariant",
    against="seven known faults leave one process's loss or gradients; without them the difference is below 1e-12",
    on="2 ranks, with and without sequence, one step, float64",
)
def test_known_faults_are_caught():
    for results in launch(with_faults, 2, **ON_CPU):
        harmless = {(fault, sequence) for (fault, sequence), gaps in results.items() if max(gaps) < 1e-12}
        unused = {("norms' gradients not summed", False), ("sum's gradient summed again", True)}  # not in that path
        assert harmless == {("nothing", False), ("nothing", True)} | unused
        for (fault, sequence), (loss, grads) in results.items():
            assert (fault, sequence) in harmless or max(loss, grads) > 1e-2, fault
        for fault in ("input's gradient not summed", "sum's gradient summed again", "norms' gradients not summed"):
            assert max(results[fault, sequence][0] for sequence in (False, True)) < 1e-12, "the loss shows nothing"


def clipped():
    results = []
    for max_norm, sequence in itertools.product([0.1, 100.0], [False, True]):
        whole, model, (x, y) = make(), parallelize_(make(), sequence=sequence), sequences(0)
        whole_loss(whole, x, y).backward()
        parallel_loss(model, x, y).backward()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        alone = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        own = clip_gradients_(model, max_norm)
        grads = whole_tensors(model, {name: p.grad for name, p in model.named_parameters()})
        moved = gap({name: p.grad for name, p in whole.named_parameters()}, grads)
        results.append(((own - norm).abs().item(), moved, (alone - norm).abs().item()))
    return results


@verifies(
    f"{MODULE}.clip_gradients_",
    kind="parity",
    against="torch.nn.utils.clip_grad_norm_ on one process",
    on="2 ranks, norms far below and far above the gradient's: the norm and every gradient, float64",
    bound=1e-12,
)
def test_gradients_are_clipped_by_the_norm_of_the_whole_model(seen):
    for results in launch(clipped, 2, **ON_CPU):
        for norm, grads, by_each_rank_alone in results:
            seen(norm)
            seen(grads)
            assert by_each_rank_alone > 1e-2, "a rank's own norm is another one"


def reloaded(state):
    """The scores, and the state that comes back, of models built from another seed that load `state`."""
    results = []
    for sequence in (False, True):
        model = parallelize_(GPT(config(tied=False), generator=generator(99)).double(), sequence=sequence)
        load_whole_(model, state)
        scores = regions.Cut(2, VOCABULARY).join(model(sequences(0)[0]))
        results.append((scores, whole_state_dict(model)))
    return results


@verifies(
    f"{MODULE}.load_whole_",
    f"{MODULE}.whole_state_dict",
    "distributed.regions.Cut",
    kind="equals one process",
    against="models.GPT whole with that state_dict: the scores; the state that comes back is the same bits",
    on="one state loaded by 1, 2 and 4 ranks, float64",
    bound=1e-12,
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_whole_state_loads_on_any_number_of_ranks_and_comes_back(ranks, seen):
    model = make(tied=False)
    for results in launch(reloaded, ranks, model.state_dict(), **ON_CPU):
        for scores, state in results:
            seen((scores - model(sequences(0)[0])).abs().max().item())
            assert gap(state, model.state_dict()) == 0


def built_on_meta():
    with torch.device("meta"):
        model = parallelize_(GPT(config(tied=True), generator=torch.Generator()).double())
    load_whole_(model.to_empty(device="cpu"), make().state_dict())
    return parallel_loss(model, *sequences(0)).item()


def test_a_model_too_large_for_one_rank_is_cut_on_the_meta_device_and_loaded_afterwards():
    wanted = whole_loss(make(), *sequences(0)).item()
    assert launch(built_on_meta, 2, **ON_CPU) == pytest.approx([wanted] * 2, abs=1e-12)


def refusals():
    """The sentence of each wrong call."""
    state = make().state_dict()
    mine, twice = parallelize_(make()), parallelize_(make())
    layer = nn.Linear(4, 6)
    before = {name: p.clone() for name, p in mine.state_dict().items()}
    calls = [
        lambda: parallelize_(GPT(GPTConfig(1, 3, 6, 4), generator=generator())),
        lambda: parallelize_(GPT(GPTConfig(1, 2, 6, 4, vocabulary=1), generator=generator())),
        lambda: parallelize_(layer),
        lambda: parallelize_(twice),
        lambda: parallelize_(make(), sequence=True)(torch.zeros(1, 7, dtype=torch.int64)),
        lambda: ColumnLinear(layer, parts=4),
        lambda: load_whole_(mine, state | {"more": torch.ones(1)}),
        lambda: load_whole_(mine, state | {"norm.weight": torch.ones(3)}),
        lambda: load_whole_(mine, state | {"tokens.weight": torch.ones(VOCABULARY // 2 + 1, 16)}),
    ]
    sentences = []
    for call in calls:
        try:
            call()
        except (TypeError, ValueError) as error:
            sentences.append(str(error))
    assert gap(before, mine.state_dict()) == 0, "nothing is half loaded"
    return sentences


@verifies(
    *(f"{MODULE}.{name}" for name in ("parallelize_", "ColumnLinear", "load_whole_")),
    kind="message",
    against="an error that names the argument, what is needed and what came",
    on="9 wrong calls",
)
def test_wrong_input_is_named():
    wanted = [
        r"heads that the ranks divide, got heads=3 and 2 ranks",
        r"at least one row a rank, got a vocabulary of 1 and 2 ranks",
        r"gpt must be a models.GPT that is still whole, got Linear",
        r"gpt must be a models.GPT that is still whole, got GPT",
        r"a sequence that 2 ranks divide, in dimension 1, got \[1, 7, 16\]",
        r"parts must divide the 6 outputs, got parts=4",
        r"must have the model's names; they differ in \['more'\]",
        r"norm.weight of the whole model must be \[16\], got \[3\]",
        r"tokens.weight of the whole model must be \[21, 16\], got \[11, 16\]",
    ]
    for sentences in launch(refusals, 2, **ON_CPU):
        assert len(sentences) == len(wanted)
        for sentence, pattern in zip(sentences, wanted, strict=True):
            assert re.search(pattern, sentence), sentence


def on_gpus(sequence):
    model = parallelize_(make().to(device()), sequence=sequence)
    losses = train(model, lambda m, x, y: parallel_loss(m, x.to(device()), y.to(device())), micros=1)
    return losses, {name: p.cpu() for name, p in whole_state_dict(model).items()}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sequence", [False, True])
def test_equals_one_process_on_gpus(sequence):
    losses, weights = one_process(True, "nothing", 1)
    for own_losses, own_weights in launch(on_gpus, 2, sequence, backend="nccl"):
        assert own_losses == pytest.approx(losses, abs=1e-10)
        assert gap(weights, own_weights) < 1e-10
