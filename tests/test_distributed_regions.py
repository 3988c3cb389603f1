"""Each operator's forward and backward are what they say; what is cut comes back, whatever its length."""

import sys

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from bigmodel_course.distributed import regions
from bigmodel_course.distributed.launch import launch
from bigmodel_course.distributed.regions import Cut, share

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not import pytest
verifies = pytest.mark.verifies
ON_CPU = {"backend": "gloo", "timeout": 200.0}  # seconds; a busy machine is not a fault
OPERATORS = ["copy_to", "reduce_from", "gather_sequence", "scatter_sequence", "split_sequence"]


def numbers(seed, *shape):
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).double()


def there_and_back():
    """This rank's input, output, gradient of the output and gradient of the input, for each operator."""
    rank, ranks, results = dist.get_rank(), dist.get_world_size(), {}
    for name in OPERATORS:
        length = 3 if name == "gather_sequence" else 3 * ranks
        x = numbers(rank, 2, length, 5).requires_grad_()
        y = getattr(regions, name)(x)
        grad = numbers(50 + rank, *y.shape)
        y.backward(grad)
        results[name] = x.detach(), y.detach(), grad, x.grad
    return results


def parts(xs):
    """Rank by rank its own tokens of the sum of all."""
    return list(sum(xs).chunk(len(xs), dim=1))


BY_DEFINITION = {  # xs of all ranks -> ys of all ranks
    "same": lambda xs: xs,
    "sum": lambda xs: [sum(xs)] * len(xs),
    "gather": lambda xs: [torch.cat(xs, 1)] * len(xs),
    "sum, own tokens": parts,
    "own tokens": lambda xs: [x.chunk(len(xs), dim=1)[i] for i, x in enumerate(xs)],
}
PAIRS = {
    "copy_to": ("same", "sum"),
    "reduce_from": ("sum", "same"),
    "gather_sequence": ("gather", "sum, own tokens"),
    "scatter_sequence": ("sum, own tokens", "gather"),
    "split_sequence": ("own tokens", "gather"),
}


@verifies(
    *(f"distributed.regions.{name}" for name in OPERATORS),
    kind="invariant",
    against="its forward and its backward by definition, from all ranks' inputs and gradients",
    on="1, 2 and 4 ranks, whole numbers, exactly",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_operator_is_one_collective_forward_and_another_backward(ranks, seen):
    answers = launch(there_and_back, ranks, **ON_CPU)
    for name, (forward, backward) in PAIRS.items():
        xs, ys, grads, back = zip(*(answer[name] for answer in answers), strict=True)
        for got, want in ((ys, BY_DEFINITION[forward](xs)), (back, BY_DEFINITION[backward](grads))):
            assert [g.shape for g in got] == [w.shape for w in want]
            seen(max((g - w).abs().max().item() for g, w in zip(got, want, strict=True)))


CUTS = [(Cut(0, 7), (7, 3)), (Cut(1, 5), (2, 5)), (Cut(0, 3), (3,)), (Cut(0, 24, 3), (24, 2)), (Cut(2, 4), (2, 1, 4))]


def cut_and_joined():
    results = []
    for cut, shape in CUTS:
        whole = numbers(0, *shape)
        mine = cut.of(whole)
        assert mine.untyped_storage().nbytes() == mine.nbytes, "the whole can be freed"
        results.append((mine, cut.join(mine), share(cut.length)))
    return results


@verifies(
    "distributed.regions.Cut",
    "distributed.regions.share",
    kind="invariant",
    against="torch.tensor_split, part by part; joined it is the whole again",
    on="1, 2 and 4 ranks, lengths that they divide and lengths that they do not, packed matrices",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_cut_comes_back_whole(ranks, seen):
    for rank, results in enumerate(launch(cut_and_joined, ranks, **ON_CPU)):
        for (cut, shape), (mine, joined, (first, last)) in zip(CUTS, results, strict=True):
            whole = numbers(0, *shape)
            blocks = [part.tensor_split(ranks, cut.dim)[rank] for part in whole.chunk(cut.parts, cut.dim)]
            assert torch.equal(mine, torch.cat(blocks, cut.dim))
            assert torch.arange(cut.length).tensor_split(ranks)[rank].tolist() == list(range(first, last))
            seen((joined - whole).abs().max().item())


def refused():
    with pytest.raises(ValueError, match=r"a sequence that 2 ranks divide, in dimension 1, got \[2, 5, 1\]"):
        regions.split_sequence(torch.ones(2, 5, 1))
    x = torch.ones(1, 2, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(regions.copy_to(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@verifies(
    "distributed.regions.split_sequence",
    kind="message",
    against="ValueError that says what does not divide; no second derivative in silence",
    on="5 tokens on 2 ranks",
)
def test_a_sequence_that_the_ranks_do_not_divide_is_refused():
    launch(refused, 2, **ON_CPU)
