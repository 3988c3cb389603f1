"""What a rank of a tensor-parallel GPT holds, keeps, computes and sends is what `costs` says."""

import itertools
import sys
from collections import Counter
from unittest import mock

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_course import costs
from bigmodel_course.distributed import collectives
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.tensor_parallel import parallelize_
from bigmodel_course.distributed.vocabulary import vocabulary_cross_entropy
from bigmodel_course.models import GPT, GPTConfig

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest
verifies = pytest.mark.verifies
ON_CPU = {"backend": "gloo", "timeout": 200.0}  # seconds; a busy machine is not a fault
BATCH, TOKENS = 3, 8
CASES = list(itertools.product([True, False], [False, True]))  # tied, sequence


def shape_of(tied):
    return GPTConfig(layers=2, heads=4, width=16, context=12, vocabulary=21, tied=tied)


def tensors(x):
    return x if isinstance(x, list | tuple) else [x]


def recorder(kind, collective, calls, whole):
    """The collective of torch.distributed, which also counts the numbers of its whole tensor."""

    def call(*args, **options):
        calls[kind, sum(x.numel() for x in tensors(args[whole]))] += 1
        return collective(*args, **options)

    return call


def recorded(calls):
    """Patches that record every collective; which argument is the whole tensor differs."""
    names = {"all_reduce": ("all-reduce", 0), "all_gather": ("all-gather", 0), "reduce_scatter": ("reduce-scatter", 1)}
    changes = {name: recorder(kind, getattr(dist, name), calls, at) for name, (kind, at) in names.items()}
    return mock.patch.multiple(dist, **changes)


def kept_numbers(model, x):
    """How many numbers autograd keeps for the backward pass: each storage once, the parameters' own left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()  # held in `kept`, so that no later tensor can have its address
        kept[storage.data_ptr()] = (storage, storage.nbytes() // tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(numbers for address, (_, numbers) in kept.items() if address not in own)


def measured():
    results = []
    x = torch.randint(0, 21, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    for tied, sequence in CASES:
        model = parallelize_(GPT(shape_of(tied), generator=torch.Generator().manual_seed(0)), sequence=sequence)
        calls = Counter()
        with recorded(calls), FlopCounterMode(display=False) as flops:
            loss = vocabulary_cross_entropy(model(x), x, 21)
            forward = flops.get_total_flops()
            loss.backward()
        parameters = sum(p.numel() for p in model.parameters())
        results.append((parameters, forward, kept_numbers(model, x), calls))
    return results


NAMES = ("costs.tensor_parallel_gpt", "costs.tensor_parallel_messages", "costs.Message")


@verifies(
    *NAMES,
    kind="parity",
    against="numel, FlopCounterMode, saved_tensors_hooks, and every collective recorded with its size",
    on="each of 1, 2 and 4 ranks, tied and untied, with and without sequence",
    bound=0,
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_holds_keeps_computes_and_sends_what_is_predicted(ranks, seen):
    for rank, results in enumerate(launch(measured, ranks, **ON_CPU)):
        for (tied, sequence), (parameters, flops, kept, calls) in zip(CASES, results, strict=True):
            options = {"tokens": TOKENS, "sequence": sequence}
            layers = costs.tensor_parallel_gpt(shape_of(tied), ranks, rank=rank, **options)
            in_attention = sum(layer.flops for layer in layers if layer.name.endswith("attention"))
            total = costs.total(layers)
            seen(abs(total.parameters - parameters))
            seen(abs(BATCH * (total.flops - in_attention) - flops))  # torch's counter misses attention on the CPU
            seen(abs(BATCH * total.activations - kept))
            messages = costs.tensor_parallel_messages(shape_of(tied), ranks, batch=BATCH, **options)
            predicted = Counter()
            for message in messages:
                predicted[message.collective, message.numbers] += message.times
            seen(sum(((predicted - calls) + (calls - predicted)).values()))


@verifies(
    "costs.tensor_parallel_gpt",
    kind="invariant",
    against="costs.gpt: one rank is the whole; FLOPs and cut parameters of all ranks add up to it",
    on="1, 2, 4 and 8 ranks, tied and untied",
    bound=0,
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_together_do_the_work_of_one(ranks, tied, seen):
    shape = GPTConfig(layers=3, heads=8, width=32, context=16, vocabulary=50, tied=tied)
    whole = costs.gpt(shape)
    each = [costs.tensor_parallel_gpt(shape, ranks, rank=rank) for rank in range(ranks)]
    seen(abs(sum(costs.total(layers).flops for layers in each) - costs.total(whole).flops))
    replicas = (16 + 2 + 3 * (2 + 2 + 1 + 1)) * 32  # positions, norms, biases of row-cut matrices
    parameters = sum(costs.total(layers).parameters for layers in each)
    seen(abs(parameters - (ranks - 1) * replicas - costs.total(whole).parameters))
    if ranks == 1:
        assert [layer.parameters for layer in each[0]] == [layer.parameters for layer in whole]


@verifies(
    "costs.tensor_parallel_bytes",
    "costs.tensor_parallel_messages",
    kind="invariant",
    against="Shoeybi et al. 2019: four all-reduces a block; Korthikanti et al. 2022: sequence sends as much",
    on="1, 2, 4 and 8 ranks",
    bound=0,
)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_block_sends_four_all_reduces_with_and_without_sequence(ranks, seen):
    shape = GPTConfig(layers=5, heads=8, width=64, context=32)
    stream_bytes = 2 * 32 * 64 * 4  # two sequences in float32
    for sequence in (False, True):
        messages = costs.tensor_parallel_messages(shape, ranks, batch=2, sequence=sequence)
        blocks = [message for message in messages if message.name.startswith("blocks")]
        for sent in costs.tensor_parallel_bytes(blocks, ranks):
            seen(abs(sent - 5 * 4 * 2 * (ranks - 1) / ranks * stream_bytes))
        assert costs.tensor_parallel_bytes(messages, 1) == [0]


def all_reduce_on_a_ring(x, op=None, group=None):
    collectives.all_reduce_(x, op="max" if op == dist.ReduceOp.MAX else "sum", group=group)


def all_gather_on_a_ring(parts, x, group=None):
    for part, row in zip(parts, collectives.all_gather(x[None], group=group), strict=True):
        part.copy_(row)


def reduce_scatter_on_a_ring(own, parts, group=None):
    own.copy_(collectives.reduce_scatter(torch.stack(parts), group=group)[0])


def sent_on_rings():
    """Payload bytes of send calls in a step, when torch's collectives are replaced by those of lesson 41."""
    rings = {"all_reduce": all_reduce_on_a_ring, "all_gather": all_gather_on_a_ring}
    rings |= {"reduce_scatter": reduce_scatter_on_a_ring}
    results = []
    x = torch.randint(0, 21, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    for _, sequence in CASES[:2]:
        model = parallelize_(GPT(shape_of(True), generator=torch.Generator().manual_seed(0)), sequence=sequence)
        with mock.patch.multiple(dist, **rings), collectives.count_bytes() as sent:
            vocabulary_cross_entropy(model(x), x, 21).backward()
        results.append(sent.payload)
    return results


@verifies(
    "costs.tensor_parallel_bytes",
    "costs.tensor_parallel_messages",
    kind="parity",
    against="the bytes handed to send in a step, on the rings of distributed.collectives",
    on="each of 2 and 4 ranks, with and without sequence, 24 tokens",
    bound=0,
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_sent_are_the_bytes_predicted(ranks, seen):
    answers = launch(sent_on_rings, ranks, **ON_CPU)
    for (_, sequence), counted in zip(CASES, zip(*answers, strict=True), strict=False):
        options = {"batch": BATCH, "tokens": TOKENS, "sequence": sequence}
        messages = costs.tensor_parallel_messages(shape_of(True), ranks, **options)
        for predicted, sent in zip(costs.tensor_parallel_bytes(messages, ranks), counted, strict=True):
            seen(abs(predicted - sent))


SHAPE = GPTConfig(layers=1, heads=4, width=8, context=6)
WRONG = [
    (lambda: costs.tensor_parallel_gpt(SHAPE, 3), "heads that the ranks divide, got heads=4 and ranks=3"),
    (lambda: costs.tensor_parallel_gpt(SHAPE, 2, rank=2), "need 0 <= rank < 2, got rank=2"),
    (lambda: costs.tensor_parallel_gpt(SHAPE, 2, tokens=7), "need 1 <= tokens <= context = 6, got tokens=7"),
    (lambda: costs.tensor_parallel_messages(SHAPE, 4, sequence=True), "divide with sequence=True, got tokens=6"),
    (lambda: costs.tensor_parallel_messages(SHAPE, 2, batch=0), "need batch >= 1"),
    (lambda: costs.tensor_parallel_bytes([], 0), "need ranks >= 1"),
]


@verifies(*NAMES[:2], "costs.tensor_parallel_bytes", kind="message", against="ValueError that names the argument",
          on="6 wrong calls")  # fmt: skip
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
