"""A model cut by layers over several ranks: the interpreter that runs a schedule.

Every rank calls the same things in the same order; models do not know that they are cut.  `pipeline_schedules` says
which rank holds which stage.  What crosses a cut is one floating-point tensor, of one shape for all microbatches; the
first message over a cut is preceded by its shape and type, later ones are not.
"""

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmodel_course.distributed.pipeline_schedules import Message, Op, Schedule, Span, check_legal, messages

__all__ = ["Pipeline", "run"]

Loss = Callable[[Tensor, Tensor], Tensor]
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_DIMENSIONS = 8


def run(
    schedule: Schedule,
    stages: Sequence[nn.Module],
    inputs: Sequence[Tensor] | None,
    targets: Sequence[Tensor] | None,
    loss_fn: Loss,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """One step of a `Pipeline` that is used once."""
    return Pipeline(schedule, stages, loss_fn, group=group).step(inputs, targets)


class Pipeline:
    """This rank's side of a pipeline over the ranks of `group`.

    `stages`: the modules of this rank's chunks, in order.  `loss_fn(output, target)` is the mean over a microbatch.
    After a step, `peak` is the most passes whose activations were held at once, and `spans` when each operation ran,
    in seconds of this machine's clock (on a GPU: when it was started).
    """

    def __init__(
        self, schedule: Schedule, stages: Sequence[nn.Module], loss_fn: Loss, *, group: dist.ProcessGroup | None = None
    ):
        check_legal(schedule)
        self._rank, self._ranks, self._group = dist.get_rank(group), dist.get_world_size(group), group
        self._ops = schedule[self._rank] if len(schedule) == self._ranks else ()
        if len({op.chunk for op in self._ops}) != len(stages):
            chunks = len({op.chunk for op in schedule[0]})
            raise ValueError(
                f"a schedule of {len(schedule)} ranks with {chunks} chunks each needs as many ranks and stages,"
                f" got {self._ranks} ranks and {len(stages)} stages on rank {self._rank}"
            )
        self._stages, self._loss_fn = list(stages), loss_fn
        self._last = self._ranks * len(stages) - 1
        self._microbatches = len(self._ops) // (2 * len(stages))
        found = next((p.device for stage in stages for p in stage.parameters()), torch.device("cpu"))
        self._mail = _Mail(schedule, self._rank, found, group)
        self._loss = torch.zeros((), dtype=torch.float64, device=found)
        self._live: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.peak, self.spans = 0, []

    def step(self, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> Tensor:
        """Add to the parameters the gradients of the mean loss over the microbatches; return that loss on every rank.

        `inputs` are needed on the first rank and `targets` on the last; elsewhere they may be None.  Gradients are
        exactly those of one process that adds up the microbatches one after the other.  Copies of one parameter on
        several ranks hold a share of its gradient each: see `sum_tied_`.
        """
        self._check(inputs, targets)
        self._loss = torch.zeros_like(self._loss)
        self.peak, self.spans = 0, []
        self._mail.open()
        for op in self._ops:
            arrived = self._mail.receive(op)
            start = perf_counter()
            made = self._forward(op, arrived, inputs, targets) if op.kind == "F" else self._backward(op, arrived)
            self.spans.append(Span(op, start, perf_counter()))
            self._mail.send(op, made)
        self._mail.close()
        dist.broadcast(self._loss, group_src=self._ranks - 1, group=self._group)
        return self._loss

    def _forward(
        self, op: Op, x: Tensor | None, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None
    ) -> Tensor:
        x = inputs[op.microbatch] if x is None else x.requires_grad_()
        y = self._stages[op.chunk](x)
        if self._stage(op) == self._last:
            y = self._loss_fn(y, targets[op.microbatch]) / self._microbatches
            self._loss += y.detach()
        self._live[op.microbatch, op.chunk] = x, y
        self.peak = max(self.peak, len(self._live))
        return y.detach()

    def _backward(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        x, y = self._live.pop((op.microbatch, op.chunk))  # with these names the graph and its activations go
        if y.requires_grad:  # not where all that comes before is frozen
            y.backward(gradient)
        if self._stage(op) == 0:
            return None
        return torch.zeros_like(x) if x.grad is None else x.grad

    def _stage(self, op: Op) -> int:
        return op.chunk * self._ranks + self._rank

    def _check(self, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> None:
        first, last = self._rank == 0, self._rank == self._ranks - 1
        for name, needed, given in (("inputs", first, inputs), ("targets", last, targets)):
            if needed and (given is None or len(given) != self._microbatches):
                got = "None" if given is None else len(given)
                raise ValueError(f"rank {self._rank} needs {name} for {self._microbatches} microbatches, got {got}")
        shapes = {tuple(x.shape) for x in inputs} if first else set()
        if len(shapes) > 1:
            raise ValueError(f"inputs must be microbatches of one shape, got {sorted(shapes)}")


class _Mail:
    """What a rank sends and receives.

    Both ends of a link post their sends and receives in the one order that `messages` gives.  So they agree even where
    a backend ignores tags and does one thing at a time on a link (NCCL), and nothing waits in a ring.
    """

    def __init__(self, schedule: Schedule, rank: int, device: torch.device, group: dist.ProcessGroup | None):
        self._rank, self._device, self._group = rank, device, group
        self._alone = len(schedule) == 1
        self._order = [m for m in messages(schedule) if rank in (m.sender, m.receiver)]
        self._outgoing = {m.made: m for m in self._order if m.sender == rank}
        self._incoming = {m.used: m for m in self._order if m.receiver == rank}
        self._place = {(peer, op): i for peer, ops in enumerate(schedule) for i, op in enumerate(ops)}
        self._shapes: dict[
            tuple[str, int], tuple[tuple[int, ...], torch.dtype]
        ] = {}  # of what comes, by kind and chunk

    def open(self) -> None:
        """Begin a step."""
        self._links: dict[int, deque[Message]] = {}
        for m in self._order:
            self._links.setdefault(self._peer(m), deque()).append(m)
        self._arriving: dict[Op, tuple[dist.Work, Tensor]] = {}
        self._sent: list[tuple[Message, dist.Work, Tensor]] = []
        self._kept: dict[Op, Tensor] = {}  # from chunk to chunk of a rank that is alone

    def close(self) -> None:
        """End a step: wait until everything has been fetched."""
        for _message, work, _tensor in self._sent:
            work.wait()
        self._sent = []

    def receive(self, op: Op) -> Tensor | None:
        """What `op` needs from elsewhere; None where it starts from data or from the loss."""
        message = self._incoming.get(op)
        if message is None:
            return self._kept.pop(op, None)
        if op not in self._arriving:
            self._post(message)
        work, tensor = self._arriving.pop(op)
        work.wait()
        self._let_go(message)
        return tensor

    def send(self, op: Op, tensor: Tensor | None) -> None:
        """Send what `op` made to whoever needs it."""
        message = self._outgoing.get(op)
        if message is None:
            if self._alone and tensor is not None:
                self._kept[op._replace(chunk=op.chunk + (1 if op.kind == "F" else -1))] = tensor
            return
        self._post(message)
        tensor = tensor.contiguous()
        if op.kind == "F" and ("B", op.chunk) not in self._shapes:
            self._start(message, _described(tensor, self._device))
            self._shapes["B", op.chunk] = tuple(tensor.shape), tensor.dtype  # its gradient will look the same
        if op.kind == "F" and self._shapes["B", op.chunk] != (tuple(tensor.shape), tensor.dtype):
            old = list(self._shapes["B", op.chunk][0])
            raise ValueError(f"a cut carries one shape: it was {old}, now {list(tensor.shape)}; make a new Pipeline")
        self._start(message, tensor)

    def _start(self, message: Message, tensor: Tensor) -> None:
        work = dist.isend(tensor, group_dst=message.receiver, group=self._group)
        self._sent.append((message, work, tensor))  # the tensor must live until it is fetched

    def _post(self, message: Message) -> None:
        """Post the receives that stand before `message` on its link, and its own."""
        link = self._links[self._peer(message)]
        while True:
            following = link.popleft()
            if following.receiver == self._rank:
                self._arriving[following.used] = self._expect(following)
            if following == message:
                return

    def _expect(self, message: Message) -> tuple[dist.Work, Tensor]:
        kind = message.used.kind, message.used.chunk
        if kind not in self._shapes:
            description = torch.zeros(2 + MOST_DIMENSIONS, dtype=torch.int64, device=self._device)
            dist.recv(description, group_src=message.sender, group=self._group)
            number, dimensions, *shape = description.tolist()
            self._shapes[kind] = tuple(shape[:dimensions]), TYPES[number]
        shape, dtype = self._shapes[kind]
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return dist.irecv(tensor, group_src=message.sender, group=self._group), tensor

    def _let_go(self, came: Message) -> None:
        """Forget what the sender of `came` must have fetched before it could make it."""
        made = self._place[came.sender, came.made]
        waiting = []
        for message, work, tensor in self._sent:
            if message.receiver == came.sender and self._place[message.receiver, message.used] <= made:
                work.wait()  # returns at once
            else:
                waiting.append((message, work, tensor))
        self._sent = waiting

    def _peer(self, message: Message) -> int:
        return message.receiver if message.sender == self._rank else message.sender


def _described(tensor: Tensor, device: torch.device) -> Tensor:
    """Type and shape as whole numbers."""
    if tensor.dtype not in TYPES or tensor.ndim > MOST_DIMENSIONS:
        raise ValueError(f"a stage must give one floating-point tensor, got {tensor.dtype} {list(tensor.shape)}")
    padding = [0] * (MOST_DIMENSIONS - tensor.ndim)
    return torch.tensor([TYPES.index(tensor.dtype), tensor.ndim, *tensor.shape, *padding], device=device)
