"""The fleet of lesson 54: what a second replica brings, what HTTP costs, and what kills cost.

Throughput is of four clients that ask all the time, one and two replicas in turn.  `two_over_one_replica` is of a GPT
of 19 million parameters, which needs a core a replica; `two_over_one_bare_session` is what the cores give just then
without any service, and `two_over_one_sleep` is of a model that only waits: what balancing alone does.
`overhead_over_bare_session` is the time of one request through client, balancer, service and seal, over the model's own
time in onnxruntime.  Then replicas are killed, stopped and made to talk nonsense under load: every answer is compared
with the right one, and `recovery_seconds` is the median time from SIGKILL until all are up again.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import httpx
import numpy as np
import torch
from torch.export import Dim

from benchmarks.measure import Result, ratio
from bigmodel_course.deployment.export import export
from bigmodel_course.deployment.replicas import Fleet
from bigmodel_course.deployment.served_models import Served, open_model
from bigmodel_course.deployment.traffic import Traffic
from bigmodel_course.models import GPT, GPTConfig

TARGETS = {"requests_lost": 0, "wrong_answers": 0}
CLIENTS, LENGTH = 4, 96
CONFIG = GPTConfig(layers=6, heads=8, width=512, context=128)
SMALL = GPTConfig(layers=2, heads=2, width=64, context=128)
COUNTED = [({"pictures": [[1.0] * n + [0.0] * (64 - n)]}, [str(n)]) for n in range(10)]  # what the sleep model answers


def exported(config: GPTConfig, folder: Path) -> Path:
    """A GPT of this size as a file; its weights are random, which costs as much as trained ones."""
    model = GPT(config, generator=torch.Generator().manual_seed(0)).eval()
    about = {"name": "gpt", "version": "1", "kind": "language-model", "vocabulary": 256, "context": config.context}
    dynamic = {0: Dim("batch"), 1: Dim("length", max=config.context)}
    return export(
        model, torch.zeros(2, LENGTH, dtype=torch.int64), folder / "gpt.onnx", dynamic=dynamic, metadata=about
    )


def prompts(path: Path) -> list[tuple[dict, str]]:
    """Questions to the GPT, each with the next byte that the file itself predicts, asked here."""
    model, found = open_model(str(path)), []
    for start in range(65, 75):
        text = "".join(chr(start + i % 26) for i in range(LENGTH))
        (answer,) = model.run([np.frombuffer(text.encode(), np.uint8)])
        found.append(({"prompt": text}, bytes([int(answer.argmax())]).decode(errors="replace")))
    return found


def throughput(fleet: Fleet, questions: list, seconds: float) -> float:
    """Right answers a second."""
    with Traffic(f"{fleet.url}/v1/predict", questions, clients=CLIENTS) as traffic:
        sleep(seconds)
    if traffic.lost or traffic.wrong:
        raise AssertionError(f"all is well, and {traffic.lost} requests were lost, {traffic.wrong} answers wrong")
    return len(traffic.answers) / seconds


def cores(path: Path, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Answers a second of one bare session and of two at once, in turn: all that this machine has to give just now."""
    row, found = np.full(LENGTH, 65, np.uint8), ([], [])
    with ThreadPoolExecutor(2) as pool:
        models = [open_model(str(path)) for _ in range(2)]
        for i in range(2 * rounds):
            counts = list(pool.map(lambda model: counted(model, row, seconds), models[: 1 + i % 2]))
            found[i % 2].append(sum(counts) / seconds)
    return found


def counted(model: Served, row: np.ndarray, seconds: float) -> int:
    """How many times the model answers in this time."""
    end, count = perf_counter() + seconds, 0
    while perf_counter() < end:
        model.run([row])
        count += 1
    return count


def scaled(model: str, questions: list, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Answers a second with one replica and with two, in turn."""
    one, two = [], []
    with Fleet(model, replicas=1) as fleet:
        throughput(fleet, questions, seconds / 2)
        for _ in range(rounds):
            one.append(throughput(fleet, questions, seconds))
            fleet.scale(2)
            two.append(throughput(fleet, questions, seconds))
            fleet.scale(1)
    return one, two


def overhead(path: Path, questions: list, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of one request to one replica that has nothing else to do, and of the bare session, in turn."""
    model, asked, bare = open_model(str(path)), [], []
    row = np.frombuffer(questions[0][0]["prompt"].encode(), np.uint8)
    with Fleet(str(path), replicas=1) as fleet, httpx.Client(timeout=60) as client:
        for i in range(-5, rounds):
            start = perf_counter()
            client.post(f"{fleet.url}/v1/predict", json=questions[0][0]).raise_for_status()
            middle = perf_counter()
            model.run([row])
            end = perf_counter()
            if i >= 0:
                asked.append(middle - start)
                bare.append(end - middle)
    return asked, bare


def broken(kills: int) -> tuple[dict[str, list[float]], int, int, int]:
    """Seconds to recovery by what was done, and of all requests: how many, lost, wrong."""
    harms = {"SIGKILL": ["kill"], "SIGSTOP": ["freeze"], **{k: ["nonsense", k] for k in ("weights", "body", "replay")}}
    times: dict[str, list[float]] = {name: [] for name in harms}
    plan = ["SIGKILL"] * kills + [name for name in harms if name != "SIGKILL" for _ in range(max(1, kills // 10))]
    with (
        Fleet("sleep:0.01", replicas=2, faults=True) as fleet,
        Traffic(f"{fleet.url}/v1/predict", COUNTED, clients=CLIENTS) as traffic,
    ):
        for i, name in enumerate(plan):
            sleep(0.3)
            start = perf_counter()
            what, *options = harms[name]
            getattr(fleet, what)(fleet.status()[i % 2].name, *options)
            fleet.recovered()
            times[name].append(perf_counter() - start)
    return times, len(traffic.answers), traffic.lost, traffic.wrong


def run(quick: bool) -> Result:
    """All of it; `quick` with a small GPT, short windows and two kills."""
    rounds, seconds, kills = (2, 0.5, 2) if quick else (4, 5.0, 20)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(SMALL if quick else CONFIG, Path(folder))
        questions = prompts(path)
        bare_pair = cores(path, rounds, seconds)
        gpt = scaled(str(path), questions, rounds, seconds)
        asked, bare = overhead(path, questions, 20 if quick else 200)
    waits = scaled("sleep:0.05", COUNTED, rounds, seconds)
    times, requests, lost, wrong = broken(kills)
    (gpt_ratio, spread), (wait_ratio, _) = ratio(gpt[1], gpt[0]), ratio(waits[1], waits[0])
    ratios = {"two_over_one_replica": gpt_ratio, "two_over_one_bare_session": ratio(bare_pair[1], bare_pair[0])[0]}
    ratios |= {"two_over_one_sleep": wait_ratio}
    ratios |= {"overhead_over_bare_session": median(asked) / median(bare), "requests_lost": lost}
    ratios |= {"wrong_answers": wrong, "recovery_seconds": median(times["SIGKILL"])}
    table = [
        {"what": f"{name}, answers/s with {n}", "value": round(median(found), 1)}
        for name, (one, two) in {"bare GPT": bare_pair, "GPT": gpt, "sleep 50 ms": waits}.items()
        for n, found in ((1, one), (2, two))
    ]
    table += [{"what": "one request (ms)", "value": round(1e3 * median(asked), 2)}]
    table += [{"what": "bare session (ms)", "value": round(1e3 * median(bare), 2)}]
    table += [
        {"what": f"{name}, s to recovery ({len(t)} times)", "value": round(median(t), 2)} for name, t in times.items()
    ]
    table += [{"what": "requests while replicas failed", "value": requests}]
    return Result(ratios, spread, TARGETS, table)
