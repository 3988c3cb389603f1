"""int8 in onnxruntime beside float32, one thread, with the accuracy of both.

    mlp_batch1, mlp_batch256   an MLP of 10 million parameters after one epoch on MNIST, dynamic int8 (wanted: 5 and 3)
    gpt                        a GPT of 124 million, dynamic int8: the least of three shapes (wanted: 2.5)
    cnn_static                 a CNN on scikit-learn's digits, three times as large each way, static int8

Each of them is against torch eager as it comes; with `_over_best_float32` behind its name, against whatever was the
fastest in float32: torch eager, torch.compile, onnxruntime, or torch eager with oneDNN's products.  That rival is there
because eager takes its float32 products from MKL, which is half as fast as it could be on processors that Intel did not
make: without it, half of what int8 "gains" there on large batches would be MKL's loss.

Ratios are medians of neighbouring calls' CPU time, the rivals in turn in one run.  What is lost in accuracy is in
shares of right answers; nothing may lose more than half a point.  The GPT's body is as initialised, as nobody trains
124 million parameters for a benchmark; its head is fitted to the features by least squares, so that its scores mean
something: how often the next byte of a held-out text is the likeliest.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.mkldnn import to_mkldnn

from benchmarks.measure import Result, ratio
from benchmarks.quantization import MNIST, trained
from bigmodel_course.corpus import windows
from bigmodel_course.data import Dataset
from bigmodel_course.deployment.export import export
from bigmodel_course.deployment.quantized import quantize_4bit, quantize_dynamic, quantize_static
from bigmodel_course.deployment.runtime import Latency, open_session, percentiles
from bigmodel_course.models import GPT, GPT_SIZES, MLP, GPTConfig, SmallCNN
from bigmodel_course.recipe import byte_gpt_parts, digit_parts, train_digits

ALLOWED_LOSS = 0.005  # share of right answers
BYTES = 256
FLOAT32 = ("eager", "eager, oneDNN", "torch.compile", "float32")  # the last is onnxruntime's
Rows = list[dict]


def run(quick: bool) -> Result:
    """The three models, one after the other; `quick` takes small ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            parts = [part(quick, Path(folder)) for part in (mlp, gpt, cnn)]
    finally:
        torch.set_num_threads(threads)
    ratios = {label: value for found, _, _ in parts for label, value in found.items()}
    lost = [label for label in ratios if label.endswith("_lost")]
    return Result(
        ratios={label: round(value, 4) for label, value in ratios.items()},
        spread=round(max(spread for _, spread, _ in parts), 4),
        targets=dict.fromkeys(lost, ALLOWED_LOSS),
        table=[row for _, _, rows in parts for row in rows],
    )


def mlp(quick: bool, folder: Path) -> tuple[dict[str, float], float, Rows]:
    """Batches of 1 and 256; without MNIST the speed is measured all the same, and the accuracy said to be missing."""
    test = None
    if quick or MNIST.is_dir():
        model, test = trained(quick)
    else:
        model = MLP((784, 2048, 2048, 2048, 10), generator=torch.Generator().manual_seed(0))
        print(f"MNIST is not at {MNIST.name}: the MLP's accuracy is not measured (`make mnist` fetches it)")
    width = model.widths[0]
    source = exported(model, torch.rand(2, width), folder / "mlp.onnx", classes=10)
    samples = [test.x[i : i + 64].numpy() for i in range(0, 320, 64)] if test else [torch.rand(64, width).numpy()]
    files = {
        "float32": source,
        "int8": quantize_dynamic(source, folder / "mlp8.onnx"),
        "int8 static": quantize_static(source, folder / "mlps.onnx", samples),
        "4 bits": quantize_4bit(source, folder / "mlp4.onnx", block=128),
    }
    rivals = contestants(model, files, compiled=not quick)
    ratios, spreads, rows, lost = {}, [], [], []
    for batch in (1, 256):
        x = test.x[:batch] if test else torch.rand(batch, width)
        taken = timed(rivals, x, rounds=5 if quick else 34, streak=20 if batch == 1 else 3)
        found, spread = gains(f"mlp_batch{batch}", taken)
        ratios |= found
        spreads.append(spread)
        right = {name: hits(call, test, batch) for name, call in rivals.items()} if test else {}
        rows += table(f"MLP, batch {batch}", taken, files, right)
        lost += [right["eager"] - right["int8"]] if right else []
    return ratios | ({"mlp_accuracy_lost": max(lost)} if lost else {}), max(spreads), rows


def gpt(quick: bool, folder: Path) -> tuple[dict[str, float], float, Rows]:
    """One token, one window of 128, eight of 64; next-byte accuracy on held-out docstrings."""
    config = GPTConfig(layers=2, heads=2, width=64, context=128, vocabulary=512) if quick else GPT_SIZES["124M"]
    model = GPT(replace(config, tied=False), generator=torch.Generator().manual_seed(0)).eval()
    train, held_out = byte_gpt_parts()
    fit_head_(model, train, count=16 if quick else 96)
    x = windows(held_out, 2, 64, seed=0, step=0)[0].contiguous()
    sizes = {"vocabulary": config.vocabulary, "context": config.context}
    axes = {0: "batch", 1: torch.export.Dim("tokens", max=config.context)}
    source = exported(model, x, folder / "gpt.onnx", axes=axes, kind="language-model", **sizes)
    files = {"float32": source, "int8": quantize_dynamic(source, folder / "gpt8.onnx")}
    files["4 bits"] = quantize_4bit(source, folder / "gpt4.onnx", block=128)
    rivals = contestants(model, files, compiled=not quick)
    right = {name: next_bytes(call, held_out, count=8 if quick else 40) for name, call in rivals.items()}
    ratios, spreads, rows = [], [], []
    for shape, rounds in (((1, 1), 100), ((1, 128), 20), ((8, 64), 8)):
        taken = timed(rivals, windows(held_out, *shape, seed=1, step=0)[0], rounds=6 if quick else rounds, streak=1)
        found, spread = gains("gpt", taken)
        ratios.append(found)
        spreads.append(spread)
        rows += table(f"GPT, {shape[0]} × {shape[1]} tokens", taken, files, right)
    least = {label: min(found[label] for found in ratios) for label in ratios[0]}
    return least | {"gpt_accuracy_lost": right["eager"] - right["int8"]}, max(spreads), rows


def cnn(quick: bool, folder: Path) -> tuple[dict[str, float], float, Rows]:
    """Batches of 32; dynamic int8 stands beside it, which makes convolutions slower."""
    train, _, test = (larger(part) for part in digit_parts())
    model = SmallCNN(24, (16, 32) if quick else (32, 64), generator=torch.Generator().manual_seed(0))
    train_digits(model, train, epochs=1 if quick else 5, lr=0.003)
    source = exported(model, train.x[:2], folder / "cnn.onnx", classes=10)
    kinds = {"operators": ("Conv", "Relu", "MatMul")}
    files = {
        "float32": source,
        "int8 static": quantize_static(source, folder / "cnns.onnx", [train.x[:256].numpy()], **kinds),
        "int8": quantize_dynamic(source, folder / "cnn8.onnx", operators=("Conv", "MatMul")),
    }
    rivals = contestants(model, files, compiled=not quick)
    taken = timed(rivals, test.x[:32], rounds=5 if quick else 20, streak=5)
    found, spread = gains("cnn_static", taken, "int8 static")
    right = {name: hits(call, test, 32) for name, call in rivals.items()}
    lost = {"cnn_accuracy_lost": right["eager"] - right["int8 static"]}
    return found | lost, spread, table("CNN, batch 32", taken, files, right)


Call = Callable[[Tensor], Tensor]


def exported(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    axes: Mapping | None = None,
    kind: str = "classifier",
    **sizes: int,
) -> Path:
    described = {"name": path.stem, "version": "1", "kind": kind, **sizes}
    return export(model, example, path, dynamic=axes or {0: "batch"}, metadata=described)


def contestants(model: nn.Module, files: Mapping[str, Path], *, compiled: bool = False) -> dict[str, Call]:
    """Eager torch with MKL and with oneDNN, torch.compile where it is wanted, and a session for each file."""

    def scores(module: Callable, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(x)

    def answer(session: object, x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(x.numpy())[0])

    model.eval()
    calls = {"eager": partial(scores, model)}
    if torch.backends.mkldnn.is_available():
        calls["eager, oneDNN"] = partial(scores, to_mkldnn(copy.deepcopy(model)))  # weights turned to its layout once
    if compiled:
        calls["torch.compile"] = partial(scores, torch.compile(model, dynamic=False))
    return calls | {name: partial(answer, open_session(path)) for name, path in files.items()}


def timed(rivals: Mapping[str, Call], x: Tensor, *, rounds: int, streak: int) -> dict[str, Latency]:
    calls = {name: partial(call, x) for name, call in rivals.items()}
    return percentiles(calls, rounds=rounds, streak=streak, clock=time.process_time)


def gains(label: str, taken: Mapping[str, Latency], what: str = "int8") -> tuple[dict[str, float], float]:
    """How many times as fast `what` is as eager torch, and as the fastest float32; and the first one's spread."""
    speed, spread = ratio(taken["eager"].seconds, taken[what].seconds)
    best = min((taken[name] for name in FLOAT32 if name in taken), key=lambda latency: latency[50])
    return {label: speed, f"{label}_over_best_float32": ratio(best.seconds, taken[what].seconds)[0]}, spread


def table(what: str, taken: Mapping[str, Latency], files: Mapping[str, Path], right: Mapping[str, float]) -> Rows:
    """A row for each rival; a percentile that so few calls cannot tell from the slowest one is left out."""
    return [
        {
            "model": what,
            "variant": name,
            "MB": f"{files[name].stat().st_size / 1e6:.1f}" if name in files else "",
            **{
                f"p{p}, CPU ms": f"{1e3 * latency[p]:.3f}" if len(latency.seconds) * (100 - p) >= 100 else ""
                for p in (50, 95, 99)
            },
            "speed": f"{taken['eager'][50] / latency[50]:.2f}",
            "accuracy": f"{right[name]:.2%}" if name in right else "",
        }
        for name, latency in taken.items()
    ]


def hits(call: Call, test: Dataset, batch: int) -> float:
    """The share of right answers, `batch` pictures a call: dynamic int8 measures its ranges in each batch."""
    parts = zip(test.x.split(batch), test.y.split(batch), strict=True)
    return sum(int((call(x).argmax(1) == y).sum()) for x, y in parts) / len(test)


def next_bytes(call: Call, tokens: Tensor, *, count: int) -> float:
    """The share of held-out bytes that are the likeliest of the 256, `count` batches of two windows of 128."""
    right = 0
    for step in range(count):
        x, y = windows(tokens, 2, 128, seed=2, step=step)
        right += int((call(x)[..., :BYTES].argmax(2) == y).sum())
    return right / (count * 2 * 128)


@torch.no_grad()
def fit_head_(model: GPT, tokens: Tensor, *, count: int) -> None:
    """Least squares from the features to the next byte, over `count` windows of 128, into the first 256 rows."""
    head, model.head = model.head, nn.Identity()
    width = head.in_features
    gram, sums = torch.eye(width, dtype=torch.float64), torch.zeros(width, BYTES, dtype=torch.float64)
    for step in range(count):
        x, y = windows(tokens, 1, 128, seed=3, step=step)
        features = model(x)[0].double()
        gram += features.T @ features
        sums += features.T @ nn.functional.one_hot(y[0], BYTES).double()
    head.weight[:BYTES] = torch.linalg.solve(gram, sums).T.float()
    model.head = head


def larger(part: Dataset) -> Dataset:
    """Each pixel nine times: 8 × 8 pictures become 24 × 24."""
    pictures = part.x.unflatten(1, (8, 8)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    return Dataset(pictures.flatten(1), part.y, part.name)
