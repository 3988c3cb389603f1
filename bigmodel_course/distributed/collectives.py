"""Collectives from send and receive: what all ranks of a group do together, message by message.

Every rank of the group makes the same call, with `x` of the same shape and dtype.  check=True exchanges these first and
raises the same error on every rank; without it ranks that disagree may hang, stop, or go on with wrong numbers, as with
torch.distributed.  `root` is a rank within the group.  `op` is sum, mean, product, max or min.  Any length, strides and
number of ranks; any dense dtype can be moved, and those that torch can add can be reduced (not float8, not uint16 to
uint64).  All ranks end with the same bits.  `costs` says how many bytes each rank sends.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel_course.costs import chunk_lengths
from bigmodel_course.distributed.ring import Path, combining, divided, travel
from bigmodel_course.distributed.team import team

__all__ = ["Sent", "all_gather", "all_reduce_", "all_to_all", "broadcast_", "count_bytes"]
__all__ += ["reduce_", "reduce_scatter", "reduce_scatter_"]


@torch.no_grad()
def broadcast_(x: Tensor, root: int = 0, *, group: Any = None, check: bool = False) -> Tensor:
    """Give every rank the root's `x`, in place, along a binomial tree: after k rounds 2**k ranks have it."""
    us, flat = team(group), _dense(x).view(-1)
    us.check_rank("root", root)
    if check:
        us.agree(_facts("broadcast_", x, root=root))
    place, mask = (us.rank - root) % us.size, 1
    while mask < us.size and len(flat):
        if place < mask and place + mask < us.size:
            us.send(flat, (us.rank + mask) % us.size).wait()
        elif mask <= place < 2 * mask:
            us.receive(flat, (us.rank - mask) % us.size).wait()
        mask *= 2
    return _back(flat, x)


@torch.no_grad()
def reduce_(x: Tensor, root: int = 0, *, op: str = "sum", group: Any = None, check: bool = False) -> Tensor:
    """Put the sum of all ranks' `x` (or another `op`) into the root's, along the same tree; the others keep theirs."""
    us, combine, flat = team(group), combining(op, x), _dense(x).view(-1)
    us.check_rank("root", root)
    if check:
        us.agree(_facts("reduce_", x, op=op, root=root))
    place, total, mask = (us.rank - root) % us.size, flat, 1 << us.size.bit_length()
    while (mask := mask // 2) and len(flat):
        if place < mask and place + mask < us.size:
            total = flat.clone() if total is flat and place else total  # only the root's x may change
            landing = torch.empty_like(flat)
            us.receive(landing, (us.rank + mask) % us.size).wait()
            combine(total, landing)
        elif mask <= place < 2 * mask:
            us.send(total, (us.rank - mask) % us.size).wait()
    return _back(divided(op, flat, us.size), x) if place == 0 else x


@torch.no_grad()
def all_reduce_(x: Tensor, *, op: str = "sum", group: Any = None, check: bool = False) -> Tensor:
    """Put the sum of all ranks' `x` (or another `op`) into every rank's, in place: reduce-scatter, then all-gather.

    Around a ring each rank sends costs.all_reduce_bytes, hardly twice its `x` however many ranks there are (Patarasuk
    and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).  The order of summation differs from chunk to chunk.
    """
    us, flat = team(group), _dense(x).view(-1)
    combining(op, x)
    if check:
        us.agree(_facts("all_reduce_", x, op=op))
    chunks = flat.split(chunk_lengths(len(flat), us.size))
    travel(chunks, Path(us.rank - 1, us.size - 1, 2 * us.size - 2, op), us)
    return _back(flat, x)


@torch.no_grad()
def reduce_scatter_(x: Tensor, *, op: str = "sum", group: Any = None, check: bool = False) -> Tensor:
    """The first half of `all_reduce_`: this rank's rows of the sum, cut along dimension 0 by costs.chunk_lengths.

    Takes no memory for a second `x`: the result lies in `x` where that is contiguous, and the other rows of `x` are
    left with partial sums.
    """
    us, rows = team(group), _dense(x)
    combining(op, x)
    if x.ndim == 0:
        raise ValueError("x must have a dimension 0 that can be cut, got a tensor of shape []")
    if check:
        us.agree(_facts("reduce_scatter_", x, op=op))
    chunks = rows.split(chunk_lengths(len(rows), us.size))
    travel(chunks, Path(us.rank - 1, us.size - 1, us.size - 1, op), us)
    return chunks[us.rank]


def reduce_scatter(x: Tensor, *, op: str = "sum", group: Any = None, check: bool = False) -> Tensor:
    """As `reduce_scatter_`, and `x` is left alone."""
    return reduce_scatter_(_dense(x).detach().clone(), op=op, group=group, check=check).clone()


@torch.no_grad()
def all_gather(x: Tensor, *, lengths: Sequence[int] | None = None, group: Any = None, check: bool = False) -> Tensor:
    """Join all ranks' `x` along dimension 0, in rank order, around a ring: the second half of `all_reduce_`.

    `lengths`: how many rows each rank brings, where they do not all bring as many; costs.chunk_lengths(rows, ranks)
    undoes `reduce_scatter`.
    """
    us, rows = team(group), _rows(x)
    if check:
        us.agree(_facts("all_gather", rows, lengths=lengths))
    lengths = [len(rows)] * us.size if lengths is None else list(lengths)
    if len(lengths) != us.size or lengths[us.rank] != len(rows):
        want = f"the rows of {us.size} ranks, {len(rows)} for rank {us.rank}"
        raise ValueError(f"lengths must be {want}, as x has, got {lengths}")
    joined, chunks = _joined(rows, lengths)
    chunks[us.rank].copy_(rows)
    travel(chunks, Path(us.rank, 0, us.size - 1), us)
    return joined


@torch.no_grad()
def all_to_all(
    x: Tensor, *, lengths: Sequence[Sequence[int]] | None = None, group: Any = None, check: bool = False
) -> Tensor:
    """Send rank r the r-th part of `x`; return what all ranks sent here, joined along dimension 0 in rank order.

    `lengths`[giver][taker]: how many rows go from one to the other; without it every `x` has as many rows, cut by
    costs.chunk_lengths.  In step s each rank sends to the one s places to the right, and receives from the left.
    """
    us, rows = team(group), _rows(x)
    if check:
        us.agree(_facts("all_to_all", rows, lengths=lengths))
    table = [chunk_lengths(len(rows), us.size)] * us.size if lengths is None else [list(row) for row in lengths]
    if [len(row) for row in table] != [us.size] * us.size or sum(table[us.rank]) != len(rows):
        want = f"{us.size} rows of {us.size} numbers, {len(rows)} in all in row {us.rank}, as x has"
        raise ValueError(f"lengths must hold {want}, got {table}")
    given = rows.split(table[us.rank])
    taken, parts = _joined(rows, [row[us.rank] for row in table])
    parts[us.rank].copy_(given[us.rank])
    for step in range(1, us.size):
        to, source = (us.rank + step) % us.size, (us.rank - step) % us.size
        us.exchange(given[to], to, parts[source], source)
    return taken


@dataclass
class Sent:
    """What this rank sent: `payload` bytes in `messages` by send or isend; `wire` bytes over all its connections.

    `wire` sees torch's own collectives too, with Gloo's few bytes for each message and those of the store.  It is None
    where the system does not count (elsewhere than on Linux).
    """

    payload: int = 0
    messages: int = 0
    wire: int | None = None


@contextmanager
def count_bytes() -> Iterator[Sent]:
    """Count what this rank sends while the block runs, whoever calls send; read `wire` after the block."""
    sent, before = Sent(), _written()
    real = vars(dist.ProcessGroup)["send"]  # as an attribute of the class it would come without its self

    def counted(self: dist.ProcessGroup, tensors: list[Tensor], *args: Any, **options: Any) -> dist.Work:
        sent.payload += sum(tensor.nbytes for tensor in tensors)
        sent.messages += len(tensors)
        return real.__get__(self)(tensors, *args, **options)

    dist.ProcessGroup.send = counted  # send, isend and batch_isend_irecv all come through here
    try:
        yield sent
    finally:
        dist.ProcessGroup.send = real
        if before is not None:
            sent.wire = sum(max(0, now - before.get(key, 0)) for key, now in _written().items())


def _written() -> dict[str, int] | None:
    """Bytes put into each TCP connection of this process so far, from Linux's struct tcp_info."""
    if not (os.path.isdir("/proc/self/fd") and hasattr(socket, "TCP_INFO")):
        return None
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                sent, again = struct.unpack_from("QQ", info, 200)
                found[name] = sent - again + struct.unpack_from("I", info, 144)[0]  # and what waits in the kernel
        except (OSError, struct.error):  # closed meanwhile, not TCP, or an older kernel
            continue
    return found


def _dense(x: Tensor) -> Tensor:
    """The numbers of `x` side by side: `x` itself where it is so, else a copy."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_quantized:
        raise TypeError(f"x must be a dense tensor, got {getattr(x, 'layout', type(x).__name__)}")
    return x.detach().resolve_conj().resolve_neg().contiguous()


def _rows(x: Tensor) -> Tensor:
    return _dense(x) if x.ndim else _dense(x)[None]


def _joined(rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Sequence[Tensor]]:
    """Room for so many rows of each rank, whole and by rank."""
    whole = torch.empty(sum(lengths), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    return whole, whole.split(list(lengths))


def _back(flat: Tensor, x: Tensor) -> Tensor:
    """Write the result into `x`, if it does not lie there already."""
    if flat.data_ptr() != x.data_ptr() or x.is_conj() or x.is_neg():
        x.copy_(flat.view(x.shape))
    return x


def _facts(name: str, x: Tensor, **more: Any) -> dict[str, Any]:
    """What must be the same on every rank; with `lengths`, ranks may hold other numbers of rows."""
    shape = list(x.shape) if more.get("lengths") is None else ["any", *x.shape[1:]]
    return {"the collective": name, "the shape of x": shape, "the dtype of x": str(x.dtype), **more}
