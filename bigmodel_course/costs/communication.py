"""What collectives cost: the bytes each rank sends, exactly, and the time they take where a message has a latency.

A vector of `length` numbers (or rows) of `bytes_each` bytes is cut into one chunk a rank.  Lists are in rank order.
"""

from collections.abc import Sequence

from bigmodel_course.costs.arguments import at_least, positive

__all__ = [
    "all_gather_bytes",
    "all_reduce_bytes",
    "all_to_all_bytes",
    "broadcast_bytes",
    "chunk_lengths",
    "collective_seconds",
    "reduce_bytes",
    "reduce_scatter_bytes",
    "star_bytes",
]


def chunk_lengths(length: int, ranks: int) -> list[int]:
    """How `length` is cut for `ranks`: chunks differ by at most one, the longer ones first (torch.tensor_split)."""
    at_least(0, length=length)
    at_least(1, ranks=ranks)
    short, longer = divmod(length, ranks)
    return [short + (rank < longer) for rank in range(ranks)]


def reduce_scatter_bytes(length: int, ranks: int, bytes_each: int = 4) -> list[int]:
    """A ring: each rank sends every chunk but its own, which comes to it last."""
    return [(length - own) * bytes_each for own in chunk_lengths(length, ranks)]


def all_gather_bytes(lengths: Sequence[int], bytes_each: int = 4) -> list[int]:
    """A ring: each rank sends every piece but that of the rank to its right.  `lengths`: what each rank holds."""
    at_least(1, ranks=len(lengths))
    at_least(0, length=min(lengths))
    return [(sum(lengths) - right) * bytes_each for right in [*lengths[1:], lengths[0]]]


def all_reduce_bytes(length: int, ranks: int, bytes_each: int = 4) -> list[int]:
    """A ring: reduce-scatter, then all-gather; 2 * (ranks - 1) / ranks of the vector where the ranks divide it.

    No all-reduce can send less at its busiest rank (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).
    """
    gathered = all_gather_bytes(chunk_lengths(length, ranks), bytes_each)
    return [a + b for a, b in zip(reduce_scatter_bytes(length, ranks, bytes_each), gathered, strict=True)]


def all_to_all_bytes(length: int, ranks: int, bytes_each: int = 4) -> list[int]:
    """Every rank cuts its vector and sends each other rank one chunk."""
    return reduce_scatter_bytes(length, ranks, bytes_each)


def broadcast_bytes(length: int, ranks: int, bytes_each: int = 4, *, root: int = 0) -> list[int]:
    """A binomial tree: whoever has the vector sends it to one that has not, round by round."""
    return [children * length * bytes_each for children in _children(ranks, root)]


def reduce_bytes(length: int, ranks: int, bytes_each: int = 4, *, root: int = 0) -> list[int]:
    """The same tree the other way: every rank but the root sends one vector."""
    _check_root(ranks, root)
    return [(rank != root) * length * bytes_each for rank in range(ranks)]


def star_bytes(length: int, ranks: int, bytes_each: int = 4, *, root: int = 0) -> list[int]:
    """The plain all-reduce: all send to the root, which adds and sends the sum to each."""
    _check_root(ranks, root)
    return [(ranks - 1 if rank == root else 1) * length * bytes_each * (ranks > 1) for rank in range(ranks)]


def collective_seconds(name: str, size: float, ranks: int, *, latency: float, bandwidth: float) -> float:
    """Time of a collective on `size` bytes in all: its steps, each latency + (bytes of a step) / bandwidth.

    `name`: reduce_scatter, all_gather, all_to_all or all_reduce (rings and pairs), broadcast or reduce (trees), tree or
    star (an all-reduce as reduce + broadcast along a tree, or at one root).  A rank sends one message and receives one
    at a time, at `bandwidth` bytes a second; adding is free (Thakur, Rabenseifner and Gropp 2005, section 3,
    doi 10.1177/1094342005051521).
    """
    at_least(1, ranks=ranks)
    at_least(0, size=size, latency=latency)
    positive(bandwidth=bandwidth)
    rounds = (ranks - 1).bit_length()  # of a tree: log2(ranks), rounded up
    steps = {  # how many, and what share of `size` in each
        "reduce_scatter": (ranks - 1, 1 / ranks),
        "all_gather": (ranks - 1, 1 / ranks),
        "all_to_all": (ranks - 1, 1 / ranks),
        "all_reduce": (2 * (ranks - 1), 1 / ranks),
        "broadcast": (rounds, 1),
        "reduce": (rounds, 1),
        "tree": (2 * rounds, 1),
        "star": (2 * (ranks - 1), 1),
    }
    if name not in steps:
        raise ValueError(f"need a name among {', '.join(steps)}, got {name=}")
    count, share = steps[name]
    return count * (latency + size * share / bandwidth)


def _check_root(ranks: int, root: int) -> None:
    at_least(1, ranks=ranks)
    if not 0 <= root < ranks:
        raise ValueError(f"need 0 <= root < {ranks=}, got {root=}")


def _children(ranks: int, root: int) -> list[int]:
    """To how many others each rank hands the vector on: those at distance 2**k, for 2**k above its own place."""
    _check_root(ranks, root)
    counts = [0] * ranks
    for rank in range(ranks):
        place = (rank - root) % ranks
        powers = range(place.bit_length(), ranks.bit_length())
        counts[rank] = sum(place + 2**k < ranks for k in powers)
    return counts
