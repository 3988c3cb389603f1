"""Compression: how much smaller LeNet-300-100 gets on MNIST, and how much faster pruned models are on this CPU.

The sizes are read from `models/lenet-300-100.json`, which `python -m benchmarks.compression --store` writes:
that takes longer than a benchmark may.  `--quick` trains and compresses a small model on scikit-learn's digits instead,
really and now.  Times are always measured: one thread, CPU seconds, the rivals in turn.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import quantization
from benchmarks.measure import Result, Rival, alternate, ratio, versions
from bigmodel_course import checkpoint
from bigmodel_course.compression.container import load_compressed, save_compressed
from bigmodel_course.compression.pipeline import DEEP_COMPRESSION, QUICK, SMALL, Recipe, compress, decompress
from bigmodel_course.compression.pruning import apply_masks_, magnitude_masks, prune_neurons
from bigmodel_course.compression.teaching import Lessons, lessons, train_teacher
from bigmodel_course.data import Dataset, digits, mnist, split
from bigmodel_course.metrics import accuracy
from bigmodel_course.models import MLP, SmallCNN

ROOT = Path(__file__).parent.parent
STORED = ROOT / "models" / "lenet-300-100.json"
TEACHER = ROOT / "build" / "compression" / "teacher.safetensors"
COMMAND = "python -m benchmarks.compression"
DENSE = 4 * 266_610  # bytes of LeNet-300-100 in float32
ASKED = {  # the accuracy at which each ratio counts
    "deep_compression_same_techniques": 0.9825,
    "deep_compression_huffman": 0.9836,
    "deep_compression_best": 0.9836,
}
FASTER = {  # label: which of `rivals` is compared with the dense model; int8 is measured by `benchmarks.quantization`
    "structured_speedup": "half of the neurons",
    "zeros_speedup": "90 % zeros",
}


def run(quick: bool) -> Result:
    """Stored sizes (with `quick`: those of a small model, made now) and measured times."""
    ratios, table = quick_sizes() if quick else stored_sizes()
    speed, spread, timed = speeds(quick)
    int8 = quantization.run(quick)
    speed["int8_speedup"] = int8.ratios["int8_speedup_batch_32"]
    return Result(ratios={**ratios, **speed}, spread=round(max(spread, int8.spread), 4), table=[*table, *timed])


def stored_sizes() -> tuple[dict[str, float], list[dict]]:
    """Of each label the median over the seeds, and a row for each run."""
    stored = json.loads(STORED.read_text())
    ratios = {
        label: round(median(DENSE / one["bytes"] for one in stored["runs"] if one["label"] == label), 1)
        for label in ASKED
    }
    rows = [
        {
            "what": f"{one['label']}, seed {one['seed']}, stored by `{stored['command']}`",
            "result": f"{one['bytes']:,} bytes, {DENSE / one['bytes']:.1f} x, test {100 * one['test']:.2f} %",
        }
        for one in stored["runs"]
    ]
    return ratios, rows


def quick_sizes() -> tuple[dict[str, float], list[dict]]:
    """The whole pipeline on scikit-learn's digits."""
    train, test = split(digits(), (0.8, 0.2), seed=0)
    images = Dataset(train.x.view(-1, 8, 8), train.y)
    teacher = train_teacher(images, epochs=40, channels=(16, 32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.bmc"
        size = sum(compress(lessons(images, copies=4, teacher=teacher), QUICK, path=path).values())
        (right,) = measured(path, [test])
    dense = 4 * sum(p.numel() for p in MLP(QUICK.widths, generator=torch.Generator()).parameters())
    row = {"what": "digits, made now", "result": f"{size:,.0f} bytes, {dense / size:.1f} x, test {100 * right:.2f} %"}
    return {"quick_digits": round(dense / size, 1)}, [row]


def measured(path: Path, parts: Iterable[Dataset]) -> list[float]:
    """The accuracy on each part of the model that is decoded from a file's bytes."""
    model = decompress(path)
    with torch.no_grad():
        return [accuracy(model(part.x).argmax(1), part.y) for part in parts]


def speeds(quick: bool) -> tuple[dict[str, float], float, list[dict]]:
    """How many times faster than the dense model in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = alternate(rivals(quick), rounds=15 if quick else 31)
    torch.set_num_threads(threads)
    found = {label: ratio(seconds["dense"], seconds[rival]) for label, rival in FASTER.items()}
    table = [{"what": name, "result": f"{1000 * median(s):.3f} CPU ms"} for name, s in seconds.items()]
    return {label: round(r, 3) for label, (r, _) in found.items()}, max(s for _, s in found.values()), table


def rivals(quick: bool) -> dict[str, Rival]:
    """One forward pass of 64 images through an MLP of 10 million parameters, and through what pruning makes of it."""
    rng = torch.Generator().manual_seed(0)
    width = 512 if quick else 2800
    dense = MLP((784, width, width, 10), generator=rng).eval()
    zeros = MLP(dense.widths, generator=rng).eval()
    apply_masks_(zeros, magnitude_masks(zeros, 0.9))
    x = torch.rand(64, 784, generator=rng)
    models = {"dense": dense, "90 % zeros": zeros, "half of the neurons": prune_neurons(dense, 0.5)}
    return {name: Rival(partial(forward, model, x)) for name, model in models.items()}


@torch.inference_mode()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def held_out(train: Dataset) -> tuple[Dataset, Dataset]:
    """50,000 images to learn from and 10,000 to choose by, the same for all seeds."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[10_000:]], train[order[:10_000]]


def taught(train: Dataset) -> Lessons:
    """Eight copies of the training images with the scores of a teacher, which serves all seeds and is kept."""
    if not TEACHER.exists():
        TEACHER.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(TEACHER, train_teacher(train).state_dict())
    teacher = SmallCNN(28, (20, 40, 80), generator=torch.Generator()).to(memory_format=torch.channels_last)
    teacher.load_state_dict(checkpoint.load(TEACHER))
    return lessons(train, copies=8, teacher=teacher.eval())


def recoded(path: Path, recipe: Recipe, folder: Path) -> Path:
    """The same model with Huffman codes."""
    spec, layers = load_compressed(path)
    other = folder / path.name.replace("best", "huffman")
    save_compressed(other, spec, layers, coder="huffman", value_bits=recipe.value_bits, bias_bits=recipe.bias_bits)
    return other


def make(recipe: Recipe, seed: int, material: Lessons, parts: list[Dataset], folder: Path) -> list[dict]:
    """Compress once, and measure what each file decodes to."""
    label, start = f"deep_compression_{'best' if recipe == SMALL else 'same_techniques'}", time.process_time()
    path = folder / f"{label}-{seed}.bmc"
    compress(material, recipe, path=path, seed=seed)
    seconds = round(time.process_time() - start)
    files = {label: path}
    if recipe == SMALL:
        files["deep_compression_huffman"] = recoded(path, recipe, folder)
    return [entry(label, file, seed, parts, recipe, seconds) for label, file in files.items()]


def entry(label: str, file: Path, seed: int, parts: list[Dataset], recipe: Recipe, seconds: int) -> dict:
    validation, test = measured(file, parts)
    found = {"label": label, "seed": seed, "bytes": file.stat().st_size, "validation": validation, "test": test}
    print(json.dumps(found), flush=True)
    widths = decompress(file).widths
    return {**found, "asked": ASKED[label], "widths": widths, "cpu_seconds": seconds, "recipe": asdict(recipe)}


def store(runs: list[dict], seeds: list[int], folder: Path) -> None:
    """Results as JSON, and the smallest file that reaches its accuracy on validation under the name of the model."""
    best = [i for i, run in enumerate(runs) if run["label"] == "deep_compression_best"]
    chosen = min(best, key=lambda i: (runs[i]["validation"] < runs[i]["asked"], runs[i]["bytes"]))
    file = folder / f"deep_compression_best-{runs[chosen]['seed']}.bmc"
    file.with_name(STORED.with_suffix(".bmc").name).write_bytes(file.read_bytes())
    results = {
        "command": f"{COMMAND} --store --seeds {' '.join(map(str, seeds))}",
        "protocol": (
            "10,000 training images held out. Recipes fixed with seed 0 on them, from neighbouring settings and an "
            "earlier teacher of the same design; then test measured once. Points of the curve were added after that."
        ),
        "teacher": "one SmallCNN(20, 40, 80), seed 0, for all seeds",
        "dense_bytes": DENSE,
        "versions": versions(),
        "file": chosen,
        "runs": runs,
    }
    (folder / STORED.name).write_text(json.dumps(results, indent=1) + "\n")


def add_curve(keeps: list[int], material: Lessons, parts: list[Dataset], folder: Path) -> None:
    """Size against accuracy: the same recipe with other numbers of weights kept, into the stored results."""
    points = []
    for keep in keeps:
        path = folder / f"keep-{keep}.bmc"
        compress(material, replace(SMALL, keep=keep), path=path)
        validation, test = measured(path, parts)
        points.append({"keep": keep, "seed": 0, "bytes": path.stat().st_size, "validation": validation, "test": test})
        print(json.dumps(points[-1]), flush=True)
    curve = {"command": f"{COMMAND} --curve {' '.join(map(str, keeps))}", "points": points}
    STORED.write_text(json.dumps({**json.loads(STORED.read_text()), "curve": curve}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Compress LeNet-300-100 and store the results.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data/mnist")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compression", help="where all files go")
    parser.add_argument("--store", action="store_true", help="put the results and the smallest file into models/")
    parser.add_argument("--curve", type=int, nargs="+", help="only this: so many weights kept, added to the results")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    train, test = mnist(wanted.data)
    train, validation = held_out(train)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    if wanted.curve:
        add_curve(wanted.curve, taught(train), [validation, test], wanted.folder)
        return
    runs = []
    for recipe, material in ((SMALL, taught(train)), (DEEP_COMPRESSION, lessons(train))):
        for seed in wanted.seeds:
            runs += make(recipe, seed, material, [validation, test], wanted.folder)
    store(runs, wanted.seeds, wanted.folder)
    if wanted.store:
        STORED.parent.mkdir(exist_ok=True)
        for name in (STORED.name, STORED.with_suffix(".bmc").name):
            (STORED.parent / name).write_bytes((wanted.folder / name).read_bytes())


if __name__ == "__main__":
    main()
