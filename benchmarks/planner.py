"""Is the planner right?  Against torch's own code on a cluster that is not there, and against published trainings.

`parameters_off`, `bytes_off` and `flops_off` are the largest relative differences between `costs.sharded_step` and one
rank's step of FSDP2 with tensor parallelism: a whole Llama 70B on 512 devices, a whole Llama 405B on 16,384.
`published_worst_off` is the largest difference from published parameters and memory, `published_time_worst_off` from
published times, for which the planner assumes one efficiency.
"""

from time import perf_counter

from benchmarks.measure import Result
from bigmodel_course import costs
from bigmodel_course.simulate import Step, simulate

__all__ = ["run"]

# Model, data ranks, tensor ranks, whether blocks are computed again.
WHOLE = [("Llama 3 70B", 64, 8, False), ("Llama 3 405B", 2048, 8, True)]
QUICK = [("GPT-2 124M", 8, 1, False), ("GPT-2 124M", 4, 4, True)]


def run(quick: bool) -> Result:
    rows = [_compared(*case) for case in (QUICK if quick else WHOLE)]
    ratios = {key: max(row[key] for row in rows) for key in ("parameters_off", "bytes_off", "flops_off")}
    published = costs.published()
    ratios["published_worst_off"] = max(abs(row.off) for row in published if row.quantity != "time")
    ratios["published_time_worst_off"] = max(abs(row.off) for row in published if row.quantity == "time")
    targets = {"parameters_off": 0.0, "bytes_off": 0.0, "flops_off": 0.01, "published_worst_off": 0.1}
    return Result(ratios, spread=0.0, targets=targets, table=rows)


def _compared(name: str, data: int, tensor: int, recompute: bool) -> dict:
    model = costs.TRANSFORMERS[name]
    start = perf_counter()
    step = simulate(model, data, tensor, recompute=recompute)
    seconds = perf_counter() - start
    predicted = costs.sharded_step(model, data, tensor, recompute=recompute)
    return {
        "model": name,
        "devices": data * tensor,
        "parameters_off": abs(predicted.parameters / step.parameters - 1),
        "bytes_off": _bytes_off(predicted, step),
        "flops_off": abs(predicted.flops / step.flops - 1),
        "held_over_even_share": step.parameters * data * tensor / model.parameters,
        "seconds": seconds,
    }


def _bytes_off(predicted: costs.ShardedStep, step: Step) -> float:
    """The largest relative difference of any collective; one that only one side makes is 1."""
    keys = predicted.numbers.keys() | step.numbers.keys()
    pairs = [(predicted.numbers.get(key, 0), step.numbers.get(key, 0)) for key in keys]
    return max(abs(mine - theirs) / max(mine, theirs) for mine, theirs in pairs)
