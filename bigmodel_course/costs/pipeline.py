"""What a pipeline costs: the share of time that ranks stand idle, the activations they hold, the bytes they send.

p ranks, m microbatches, v chunks a rank; an operation of one chunk takes a v-th of the rank's time.
"""

from itertools import pairwise

from bigmodel_course.costs.arguments import at_least
from bigmodel_course.costs.layers import GPTConfig, Layer, gpt

__all__ = ["block_ranges", "boundary_bytes", "bubble_fraction", "gpt_stages", "live_passes", "pipeline_messages"]


def bubble_fraction(ranks: int, microbatches: int, *, chunks: int = 1) -> float:
    """The share of the ranks' time that is idle: (p - 1) / (v m + p - 1).

    GPipe and 1F1B alike with one chunk, interleaved 1F1B with more, where p divides m.  Messages take no time here.
    Idle over *busy* time is (p - 1) / (v m), the number in Narayanan et al. 2021 (arXiv 2104.04473, section 2.2).
    """
    at_least(1, ranks=ranks, microbatches=microbatches, chunks=chunks)
    return (ranks - 1) / (chunks * microbatches + ranks - 1)


def live_passes(schedule: str, ranks: int, microbatches: int, rank: int, *, chunks: int = 1) -> int:
    """The most passes (a microbatch through one chunk) whose activations `rank` holds at once.

    "gpipe": m.  "1f1b": p - rank, or m where that is less.  "interleaved", where p divides m: (v - 1) p + 2 (p - 1 -
    rank) + 1, or v m where that is less; each pass is a v-th of the rank's layers.
    """
    at_least(1, ranks=ranks, microbatches=microbatches, chunks=chunks)
    if not 0 <= rank < ranks:
        raise ValueError(f"need 0 <= rank < {ranks}, got {rank=}")
    most = {"gpipe": chunks * microbatches, "1f1b": ranks - rank}
    most["interleaved"] = (chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1
    if schedule not in most:
        raise ValueError(f"need a schedule among {', '.join(most)}, got {schedule=}")
    return min(chunks * microbatches, most[schedule])


def pipeline_messages(ranks: int, microbatches: int, *, chunks: int = 1) -> int:
    """How many tensors go from rank to rank in one step: one forward and one back over each of the p v - 1 cuts."""
    at_least(1, ranks=ranks, microbatches=microbatches, chunks=chunks)
    return 2 * microbatches * (ranks * chunks - 1) if ranks > 1 else 0


def boundary_bytes(examples: int, numbers: int, *, bytes_each: int = 4) -> int:
    """Bytes over one cut in one step: for each example its `numbers` forward, and as many gradients back.

    Into how many microbatches the `examples` are divided does not matter.  A GPT has tokens * width numbers at a cut.
    """
    at_least(1, examples=examples, numbers=numbers, bytes_each=bytes_each)
    return 2 * examples * numbers * bytes_each


def block_ranges(layers: int, stages: int) -> list[range]:
    """Which of a model's `layers` blocks stand in each of `stages`: as even as it goes, the first stages the longer."""
    at_least(1, layers=layers, stages=stages)
    if stages > layers:
        raise ValueError(f"need at least one block a stage, got {layers=} for {stages=}")
    least, more = divmod(layers, stages)
    starts = [i * least + min(i, more) for i in range(stages + 1)]
    return [range(*pair) for pair in pairwise(starts)]


def gpt_stages(config: GPTConfig, stages: int, *, tokens: int | None = None) -> list[list[Layer]]:
    """The layers of `gpt`, cut by whole blocks (`block_ranges`).

    The embedding stands in the first stage, the last norm and the head in the last.  A tied head in another stage than
    the embedding has a copy of its weight, counted there once more.
    """
    embedding, *blocks, norm, head = gpt(config, tokens=tokens)
    each = len(blocks) // config.layers  # entries of one block
    cut = [blocks[each * r.start : each * r.stop] for r in block_ranges(config.layers, stages)]
    if config.tied and stages > 1:
        head = head._replace(parameters=config.vocabulary * config.width)
    cut[0].insert(0, embedding)
    cut[-1] += [norm, head]
    return cut
