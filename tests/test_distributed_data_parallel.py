"""Data parallel training equals one process and torch's own, and the comparison catches what famous code gets wrong."""

import functools
import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigmodel_course.data import Dataset, batches
from bigmodel_course.distributed.averaging import average_gradients_, replicas_differ
from bigmodel_course.distributed.data_parallel import DataParallel, shard, sharded_batches
from bigmodel_course.distributed.launch import launch
from bigmodel_course.exercises import lesson_42
from bigmodel_course.models import GPT, MLP, GPTConfig, SmallCNN
from bigmodel_course.optim import AdamW, HeavyBall, Optimizer
from bigmodel_course.training import clip_gradients_

RANKS = (1, 2, 4)
PIECES = (1, 3)
KINDS = ("plain", "tied", "frozen", "tied and frozen")
PATIENT = 300.0  # seconds: on a busy machine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Words(nn.Module):
    """Predicts a word from three; "tied": one matrix reads and writes; "frozen": two parameters do not learn."""

    def __init__(self, kind):
        super().__init__()
        self.read, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.mix, self.write = nn.Linear(6, 6), nn.Linear(6, 7)
        if "tied" in kind:
            self.write.weight = self.read.weight
        self.double()
        rng = generator()
        for p in self.parameters():
            nn.init.normal_(p, generator=rng)
        if "frozen" in kind:
            self.mix.weight.requires_grad_(False)
            self.norm.bias.requires_grad_(False)

    def forward(self, x):
        return self.write(self.mix(self.norm(self.read(x).mean(1))).tanh())


def words(examples=11):
    rng = generator()
    x = torch.randint(7, (examples, 3), generator=rng)
    return Dataset(x, torch.randint(7, (examples,), generator=rng))


def pieces_of(part, pieces):
    """Microbatches, some of them empty, and the share of the part that each is."""
    return [(piece, len(piece) / max(1, len(part))) for piece in (part[i::pieces] for i in range(pieces))]


def trained(model, prepare, steps=3, pieces=1):
    """The weights after some steps on whole batches; `prepare(model)` gives (model, step): how to get the gradients."""
    optimizer = Optimizer(model.parameters(), HeavyBall(mu=0.9), lr=0.1)
    gradients = prepare(model, pieces)
    for epoch in range(steps):
        (batch,) = batches(words(), 11, seed=0, epoch=epoch)
        optimizer.zero_grad()
        gradients(batch)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def one_process(model, pieces):
    return lambda batch: F.cross_entropy(model(batch.x), batch.y).backward()


def accumulated(model, batch, pieces, factor=1.0):
    part, weight = shard(batch)
    for piece, share in pieces_of(part, pieces):
        (F.cross_entropy(model(piece.x), piece.y) * (weight * share * factor)).backward()


def naive(model, pieces):
    def gradients(batch):
        accumulated(model, batch, pieces)
        average_gradients_(model)

    return gradients


def bucketed(bucket_bytes, model, pieces):
    parallel = DataParallel(model, bucket_bytes=bucket_bytes)

    def gradients(batch):
        part, weight = shard(batch)
        for i, (piece, share) in enumerate(pieces_of(part, pieces)):
            with parallel.no_sync() if i < pieces - 1 else nullcontext():
                (F.cross_entropy(parallel(piece.x), piece.y) * (weight * share)).backward()

    return gradients


RIGHT = {
    "naive": naive,
    "one bucket": functools.partial(bucketed, 2**20),
    "small buckets": functools.partial(bucketed, 300),
    "a bucket each": functools.partial(bucketed, 1),
}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def mean_(t):
    dist.all_reduce(t.data)
    t.data /= dist.get_world_size()


def averages_the_parameter(model, pieces):
    """The hook is given the parameter, not its gradient."""
    for p in trainable(model):
        p.register_post_accumulate_grad_hook(mean_)
    return lambda batch: accumulated(model, batch, pieces)


def reduces_only_the_last_piece(model, pieces):
    """A tensor's hook sees the gradient that arrives, not the sum so far; and it is set for the last piece alone."""

    def reduced(g):
        mean_(g := g.clone())
        return g

    def gradients(batch):
        part, weight = shard(batch)
        for i, (piece, share) in enumerate(pieces_of(part, pieces)):
            hooks = [p.register_hook(reduced) for p in trainable(model)] if i == pieces - 1 else []
            (F.cross_entropy(model(piece.x), piece.y) * (weight * share)).backward()
            for hook in hooks:
                hook.remove()

    return gradients


def sums_for_the_mean(model, pieces):
    def gradients(batch):
        accumulated(model, batch, pieces)
        for p in trainable(model):
            dist.all_reduce(p.grad)

    return gradients


def counts_the_tied_weight_twice(model, pieces):
    """Divided in the loss, then summed name by name: a tensor of two names is summed twice."""

    def gradients(batch):
        accumulated(model, batch, pieces, factor=1 / dist.get_world_size())
        for _, p in model.named_parameters(remove_duplicate=False):
            if p.requires_grad:
                dist.all_reduce(p.grad)

    return gradients


def forgets_the_weights(model, pieces):
    def gradients(batch):
        part, _ = shard(batch)
        F.cross_entropy(model(part.x), part.y).backward()
        average_gradients_(model)

    return gradients


def gives_everybody_the_same_part(model, pieces):
    def gradients(batch):
        F.cross_entropy(model(batch[:3].x), batch[:3].y).backward()
        average_gradients_(model)

    return gradients


WRONG = {  # what is wrong, and where it shows: (ranks, pieces, kind)
    averages_the_parameter: lambda ranks, pieces, kind: True,
    reduces_only_the_last_piece: lambda ranks, pieces, kind: pieces > 1,
    sums_for_the_mean: lambda ranks, pieces, kind: True,
    counts_the_tied_weight_twice: lambda ranks, pieces, kind: "tied" in kind,
    forgets_the_weights: lambda ranks, pieces, kind: True,
    gives_everybody_the_same_part: lambda ranks, pieces, kind: True,
}


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


def differences():
    """Every way, right and wrong, of every kind of model against one process: name -> largest difference of weights."""
    found = {}
    for kind, pieces in product(KINDS, PIECES):
        whole = trained(Words(kind), one_process)
        for prepare in [*RIGHT, *WRONG]:
            way = RIGHT.get(prepare, prepare)
            found[kind, pieces, getattr(prepare, "__name__", prepare)] = apart(
                trained(Words(kind), way, pieces=pieces), whole
            )
    return found


@functools.cache
def measured(ranks):
    return launch(differences, ranks, timeout=PATIENT)


@pytest.mark.verifies(
    "distributed.data_parallel.DataParallel",
    "distributed.data_parallel.shard",
    "distributed.averaging.average_gradients_",
    kind="equals one process",
    against="one process on the whole batch",
    on="weights after 3 steps of 11 examples, 1, 2 and 4 ranks, 1 and 3 microbatches, tied and frozen, float64",
    bound=1e-13,
)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process_on_the_whole_batch(ranks, pieces, kind, seen):
    for found in measured(ranks):
        for way in RIGHT:
            seen(found[kind, pieces, way])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_what_teaching_code_gets_wrong_is_caught(ranks, wrong):
    for kind, pieces in product(KINDS, PIECES):
        found = max(each[kind, pieces, wrong.__name__] for each in measured(ranks))
        assert (found > 1e-3) == WRONG[wrong](ranks, pieces, kind), (kind, pieces, found)


# torch's DistributedDataParallel


def gpt():
    return GPT(GPTConfig(2, 2, 16, 8, 32), generator=generator())


def gpt_frozen():
    model = gpt()
    model.positions.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model


def tokens_loss(model, part):
    return F.cross_entropy(model(part.x).flatten(0, 1), part.y.flatten())


def digits_loss(model, part):
    return F.cross_entropy(model(part.x), part.y)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = MLP((64, 20, 8), generator=generator())
        self.norm, self.head = nn.BatchNorm1d(8), MLP((8, 10), generator=generator(1))

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def tokens():
    x = torch.randint(32, (24, 9), generator=generator())
    return Dataset(x[:, :-1], x[:, 1:])


def pictures():
    rng = generator()
    return Dataset(torch.rand(24, 64, generator=rng), torch.randint(10, (24,), generator=rng))


MODELS = {
    "gpt": (gpt, tokens_loss, tokens),
    "gpt frozen": (gpt_frozen, tokens_loss, tokens),
    "mlp": (lambda: MLP((64, 30, 20, 10), generator=generator()), digits_loss, pictures),
    "cnn": (lambda: SmallCNN(generator=generator()), digits_loss, pictures),
    "batch norm": (Normalized, digits_loss, pictures),
}
OPTIMIZERS = {
    "ours": lambda p: Optimizer(p, AdamW(), lr=0.01),
    "torch": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def step(parallel, optimizer, loss, part, pieces, clip):
    optimizer.zero_grad()
    for i in range(pieces):
        with parallel.no_sync() if i < pieces - 1 else nullcontext():
            (loss(parallel, part[i::pieces]) / pieces).backward()
    if clip == "ours":
        clip_gradients_(parallel.parameters(), 0.1)
    elif clip == "torch":
        nn.utils.clip_grad_norm_(parallel.parameters(), 0.1)
    optimizer.step()


def beside_torch(bucket_bytes, options):
    """Largest difference of the weights, by case; torch's DDP takes the same steps on a copy."""
    found = {}
    for (name, (make, loss, data)), pieces, clip in product(MODELS.items(), (1, 3), OPTIMIZERS):
        ours = DataParallel(make(), bucket_bytes=bucket_bytes)
        theirs = DistributedDataParallel(make(), bucket_cap_mb=bucket_bytes / 2**20, **options)
        rivals = [(p, OPTIMIZERS[clip](p.parameters())) for p in (ours, theirs)]
        for epoch in range(4):
            for part, _ in sharded_batches(data(), 24, seed=0, epoch=epoch):
                for parallel, optimizer in rivals:
                    step(parallel, optimizer, loss, part, pieces, clip)
        found[f"{name}, {pieces} microbatches, {clip}"] = apart(ours.parameters(), theirs.parameters())
        assert replicas_differ(ours) is None
        if dist.get_rank() == 0 and list(ours.buffers()):
            assert apart(ours.buffers(), theirs.buffers()) == 0
    return found


@pytest.mark.verifies(
    "distributed.data_parallel.DataParallel",
    kind="parity",
    against="torch.nn.parallel.DistributedDataParallel",
    on="weights after 4 steps on 2 ranks (on 4, with a bucket for each parameter), float32, GPT, MLP, CNN, BatchNorm",
    bound=0.0,
)
@pytest.mark.parametrize(
    ("ranks", "bucket_bytes", "options"),
    [
        pytest.param(2, 25 * 2**20, {}, id="2 ranks, one bucket"),
        pytest.param(2, 5000, {"gradient_as_bucket_view": True}, id="2 ranks, small buckets"),
        # More than two numbers: their sum depends on the order, and Gloo's on the place in the bucket.
        pytest.param(4, 1, {"find_unused_parameters": True}, id="4 ranks, a bucket each"),
    ],
)
def test_the_same_bits_as_torch(ranks, bucket_bytes, options, seen):
    for found in launch(beside_torch, ranks, bucket_bytes, options, timeout=PATIENT):
        assert len(found) == len(MODELS) * 2 * len(OPTIMIZERS)
        for difference in found.values():
            seen(difference)


class Branches(nn.Module):
    """Takes the branch it is told, so that ranks use different parameters, and no rank the last one."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(MLP((4, 3), generator=generator(i)) for i in range(3))
        self.head = MLP((3, 2), generator=generator(9))

    def forward(self, x, branch):
        return self.head(self.branches[branch](x))


def unused_beside_torch():
    """Gradients with branches: each rank another, then all the same; with an earlier microbatch in another branch."""
    rank, found = dist.get_rank(), []
    x = torch.rand(3, 4, generator=generator(rank))
    ours = DataParallel(Branches(), bucket_bytes=40, find_unused=True)
    theirs = DistributedDataParallel(Branches(), find_unused_parameters=True)
    for takes in ([rank], [0], [1 - rank, 0]):
        for parallel in (ours, theirs):
            parallel.zero_grad()
            for i, branch in enumerate(takes):
                with parallel.no_sync() if i < len(takes) - 1 else nullcontext():
                    parallel(x, branch).square().sum().backward()
        pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
        assert [p.grad is None for p, _ in pairs] == [q.grad is None for _, q in pairs]
        found.append(max((p.grad - q.grad).abs().max().item() for p, q in pairs if p.grad is not None))
    return found, sum(p.grad is None for p, _ in pairs)


@pytest.mark.verifies(
    "distributed.data_parallel.DataParallel",
    kind="parity",
    against="torch.nn.parallel.DistributedDataParallel(find_unused_parameters=True)",
    on="gradients, and which are None, of a model whose ranks take different branches; 2 ranks, float32",
    bound=0.0,
)
def test_unused_parameters_are_treated_as_torch_does(seen):
    for found, unused in launch(unused_beside_torch, 2, timeout=PATIENT):
        assert unused == 2  # weight and bias of the branch that nobody takes
        for difference in found:
            seen(difference)


def parts_of_epochs():
    data = Dataset(torch.arange(53), torch.arange(53) * 10)
    return [list(sharded_batches(data, 8, seed=1, epoch=epoch, drop_last=epoch == 2)) for epoch in range(3)]


@pytest.mark.verifies(
    "distributed.data_parallel.sharded_batches",
    "distributed.data_parallel.shard",
    kind="invariant",
    against="data.batches: joined, the ranks' parts are its batches, and the weights sum to the ranks",
    on="53 examples in batches of 8 (the last of 5), 1, 2 and 4 ranks, 3 epochs",
    bound=1e-15,
)
@pytest.mark.parametrize("ranks", RANKS)
def test_each_example_goes_to_exactly_one_rank(ranks, seen):
    data, orders = Dataset(torch.arange(53), torch.arange(53) * 10), []
    epochs = zip(*launch(parts_of_epochs, ranks, timeout=PATIENT), strict=True)
    for epoch, by_rank in enumerate(epochs):
        whole = list(batches(data, 8, seed=1, epoch=epoch, drop_last=epoch == 2))
        for batch, *parts in zip(whole, *by_rank, strict=True):
            assert torch.equal(torch.cat([part.x for part, _ in parts]), batch.x)
            assert torch.equal(torch.cat([part.y for part, _ in parts]), batch.y)
            assert max(len(part) for part, _ in parts) - min(len(part) for part, _ in parts) <= 1
            assert [weight for _, weight in parts] == [ranks * len(part) / len(batch) for part, _ in parts]
            seen(abs(math.fsum(weight for _, weight in parts) - ranks))
        orders.append(torch.cat([batch.x for batch in whole]).tolist())
        assert len(set(orders[-1])) == len(orders[-1]) == (48 if epoch == 2 else 53)
    assert orders[0] != orders[1]


def life_of_a_wrapped_module():
    """Things that must simply work; returns what to compare."""
    rank = dist.get_rank()
    x = torch.rand(4, 3, dtype=torch.float64, generator=generator(rank))
    whole = torch.cat([torch.rand(4, 3, dtype=torch.float64, generator=generator(r)) for r in range(2)])
    plain = MLP((3, 4, 2), generator=generator(0)).double()
    mine = MLP((3, 4, 2), generator=generator(rank)).double()  # rank 1 starts elsewhere
    parallel = DataParallel(mine)
    start = apart(mine.parameters(), plain.parameters())
    other = MLP((3, 4, 2), generator=generator(5)).double().state_dict()
    parallel.load_state_dict(other)
    plain.load_state_dict(other)
    keys = list(parallel.state_dict()) == list(plain.state_dict())
    for model, data in ((parallel, x), (plain, whole)):
        loss = model(data).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()  # twice through one graph, and the gradients add up
        model(data).sum(1).mean().backward()
    gradients = apart([p.grad for p in mine.parameters()], [p.grad for p in plain.parameters()])
    held = [p.grad.data_ptr() for p in mine.parameters()]
    parallel.zero_grad(set_to_none=False)  # the gradients stay in their buckets
    plain.zero_grad()
    for model, data in ((parallel, x), (plain, whole)):
        model(data).sum(1).mean().backward()
    again = apart([p.grad for p in mine.parameters()], [p.grad for p in plain.parameters()])
    same = held == [p.grad.data_ptr() for p in mine.parameters()]
    with torch.no_grad():
        parallel(x if rank else x[:0])  # forward sends nothing: a rank may evaluate alone
    alone = parallel.remove()(x).square().mean()
    alone.backward()
    return {"start": start, "gradients": max(gradients, again)}, keys and same and alone.requires_grad


@pytest.mark.verifies(
    "distributed.data_parallel.DataParallel",
    kind="invariant",
    against="one process through start, load_state_dict, two backwards of one graph, zero_grad of both kinds",
    on="an MLP on 2 ranks, float64",
    bound=1e-15,
)
def test_starts_loads_accumulates_and_lets_go(seen):
    for differences, held in launch(life_of_a_wrapped_module, 2, timeout=PATIENT):
        assert held
        for difference in differences.values():
            seen(difference)


def message(action):
    try:
        action()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def sentences():
    rank, x = dist.get_rank(), torch.rand(3, 4)

    def wider():
        DataParallel(MLP((4, 3 + rank, 2), generator=generator()))

    def longer():
        DataParallel(MLP((4, 3, 2) if rank else (4, 3), generator=generator()))

    def unused():
        DataParallel(Branches())(x, 0).sum().backward()

    def after_an_error():
        parallel = DataParallel(Branches())
        message(parallel(x, 0).sum().backward)
        parallel(x, 0)

    def refrozen():
        parallel = DataParallel(MLP((4, 3), generator=generator()))
        parallel.module.layers[0].bias.requires_grad_(False)
        parallel(x)

    def twice():
        model = MLP((4, 3), generator=generator())
        DataParallel(model)
        DataParallel(model)

    def sparse():
        DataParallel(nn.Embedding(4, 2, sparse=True))(torch.tensor([1])).sum().backward()

    def no_gradient():
        average_gradients_(Branches())

    actions = (wider, longer, unused, after_an_error, refrozen, twice, sparse, no_gradient)
    rest = {
        "frozen": lambda: DataParallel(MLP((4, 3), generator=generator()).requires_grad_(False)),
        "size": lambda: DataParallel(MLP((4, 3), generator=generator()), bucket_bytes=0),
        "empty": lambda: shard(Dataset(x[:0], x[:0])),
    }
    return {action.__name__: message(action) for action in actions} | {key: message(f) for key, f in rest.items()}


@functools.cache
def told():
    return launch(sentences, 2, timeout=PATIENT)


@pytest.mark.verifies(
    "distributed.data_parallel.DataParallel",
    "distributed.data_parallel.shard",
    "distributed.averaging.share_model_",
    "distributed.averaging.trainable",
    kind="message",
    against="the sentence names the parameter, the ranks and what to do; the same one on every rank",
    on="models that differ, unused, refrozen, sparse, twice wrapped, without gradients",
)
@pytest.mark.parametrize(
    ("case", "want"),
    [
        (
            "wider",
            "ValueError: module must be the same on every rank, got layers.0.weight [3, 4] torch.float32 on rank 0 and "
            "layers.0.weight [4, 4] torch.float32 on rank 1",
        ),
        ("longer", "got nothing on rank 0 and layers.2.weight [2, 3] torch.float32 on rank 1"),
        ("unused", "RuntimeError: no gradient came for 'branches.1.layers.0.weight', 'branches.1.layers.0.bias', "),
        ("after_an_error", "RuntimeError: the last backward pass did not end"),
        ("refrozen", "RuntimeError: the module's trainable parameters have changed: call remove()"),
        ("twice", "ValueError: module must not be in two DataParallels, and 'layers.0.weight' is"),
        ("sparse", "TypeError: gradients must be dense, got torch.sparse_coo for 'weight'"),
        ("no_gradient", "ValueError: every parameter must have a gradient, and 'branches.0.layers.0.weight' has none"),
        ("frozen", "ValueError: module must have a parameter that requires a gradient, got none"),
        ("size", "ValueError: bucket_bytes must be 1 or more, got 0"),
        ("empty", "ValueError: batch must hold at least one example, got none"),
    ],
)
def test_says_what_is_wrong_on_every_rank(case, want):
    for sentences in told():
        assert want in sentences[case]


def faults_of(records):
    """What a reader of lesson 42 would find: the fault of a suspect and the first step at which it shows."""
    for step, ranks in enumerate(zip(*records, strict=True)):
        batch, rows = ranks[0]["batch"].tolist(), [rank["rows"].tolist() for rank in ranks]
        right, reduced = lesson_42.right_gradient(ranks[0]), ranks[0]["reduced"]
        wrong = [name for name in right if not torch.allclose(right[name], reduced[name], rtol=1e-9, atol=1e-12)]
        assert all(torch.equal(w, ranks[1]["weights"][name]) for name, w in ranks[0]["weights"].items())
        if rows[0] == rows[1]:
            return "same rows", step
        if sorted(rows[0] + rows[1]) != sorted(batch):
            return "row dropped", step
        if wrong == ["read.weight"]:
            assert torch.allclose(reduced["read.weight"], 2 * right["read.weight"])
            return "tied twice", step
        if wrong:
            assert len(rows[0]) != len(rows[1])
            return "not weighted", step
    return "none", None


def test_the_suspects_of_lesson_42_have_the_faults_that_its_check_expects():
    letters = lesson_42.diagnosis.solution()
    found = {letter: faults_of(launch(lesson_42.suspect, 2, letter, timeout=PATIENT)) for letter in letters}
    assert found == letters
