"""Rows of many requests share a batch and each request gets its own answers; the models that are served."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from serving import PATIENCE

from bigmodel_course.deployment.batching import Batcher, Done, QueueFull
from bigmodel_course.deployment.export import export
from bigmodel_course.deployment.served_models import Classifier, LanguageModel, Sleep, SleepText, open_model
from bigmodel_course.models import GPT, GPTConfig, digit_model


class Doubling:
    """Doubles each row; keeps the batches it saw; a negative row is an error; `gate` holds a batch back."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows):
        self.batches.append(list(rows))
        assert self.gate.wait(PATIENCE)
        if min(rows) < 0:
            raise ArithmeticError(f"negative: {min(rows)}")
        return [2 * row for row in rows]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def busy(batcher, row):
    """A request that the model works on, until its gate opens."""
    batcher.run.gate.clear()
    request = asyncio.create_task(batcher.submit([row]))
    while not batcher.run.batches:
        await asyncio.sleep(0.01)
    return request


async def submit_all(batcher, requests):
    return await asyncio.gather(*(batcher.submit(rows) for rows in requests), return_exceptions=True)


def answers(done):
    return [each.answer for each in done]


@pytest.mark.verifies(
    "deployment.batching.Batcher",
    "deployment.batching.Done",
    kind="invariant",
    against="each request alone",
    on="200 requests of 1 to 5 rows at once, batches of at most 1, 7 and 32, with and without a wait",
    bound=0.0,
)
@pytest.mark.parametrize("largest", [1, 7, 32])
@pytest.mark.parametrize("wait", [0.0, 0.01])
def test_each_request_gets_its_own_answers_in_order(largest, wait, seen):
    model = Doubling()
    rng = np.random.default_rng(largest)
    requests = [list(map(int, rng.integers(0, 1_000_000, rng.integers(1, 6)))) for _ in range(200)]

    async def body():
        async with Batcher(model, largest=largest, wait=wait, queue=2_000) as batcher:
            return await submit_all(batcher, requests)

    for request, done in zip(requests, run(body()), strict=True):
        assert all(isinstance(each, Done) and 1 <= each.batch <= largest and each.waited >= 0 for each in done)
        seen(max(abs(got - 2 * row) for got, row in zip(answers(done), request, strict=True)))
    assert sum(map(len, model.batches)) == sum(map(len, requests))
    assert max(map(len, model.batches)) == largest  # 600 rows at once fill a batch


def test_what_gathers_while_a_batch_runs_is_the_next_batch_and_nobody_waits_without_load():
    model = Doubling()

    async def body():
        async with Batcher(model, largest=8) as batcher:
            requests = [await busy(batcher, 0), *(asyncio.create_task(batcher.submit([i])) for i in range(1, 6))]
            while len(batcher) < 5:
                await asyncio.sleep(0)
            model.gate.set()
            await asyncio.gather(*requests)

    run(body())
    assert model.batches == [[0], [1, 2, 3, 4, 5]]


def test_with_a_wait_the_first_row_waits_for_company_but_a_full_batch_goes_at_once():
    model = Doubling()

    async def body(rows, wait):
        async with Batcher(model, largest=4, wait=wait) as batcher:
            tasks = []
            for row in rows:
                tasks.append(asyncio.create_task(batcher.submit([row])))
                await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)

    run(body([1, 2, 3], wait=3.0))
    assert model.batches == [[1, 2, 3]]
    model.batches.clear()
    run(body([1, 2, 3, 4], wait=59.0))
    assert model.batches == [[1, 2, 3, 4]]


@pytest.mark.verifies(
    "deployment.batching.QueueFull",
    kind="message",
    against="how many wait and how many may",
    on="a queue of 3 with a slow batch before it",
)
def test_a_full_queue_refuses_the_whole_request_and_keeps_the_others():
    model = Doubling()

    async def body():
        async with Batcher(model, largest=1, queue=3) as batcher:
            first = await busy(batcher, 0)
            two = asyncio.create_task(batcher.submit([1, 2]))
            await asyncio.sleep(0)
            assert len(batcher) == 2
            with pytest.raises(QueueFull, match="2 rows wait and 3 may: 2 more"):
                await batcher.submit([3, 4])
            model.gate.set()
            return await first, await two

    first, two = run(body())
    assert answers(first) + answers(two) == [0, 2, 4]


def test_a_row_that_the_model_cannot_take_fails_its_own_request_only():
    model = Doubling()

    async def body():
        async with Batcher(model, largest=8, wait=0.05) as batcher:
            return await submit_all(batcher, [[1], [-5], [2, 3]])

    good, bad, other = run(body())
    assert answers(good) == [2]
    assert answers(other) == [4, 6]
    assert isinstance(bad, ArithmeticError)


def test_a_request_that_is_given_up_costs_nothing_and_the_work_goes_on():
    model = Doubling()

    async def body():
        async with Batcher(model, largest=1) as batcher:
            first = await busy(batcher, 0)
            assert batcher.busy > 0
            given_up, last = (asyncio.create_task(batcher.submit([i])) for i in (1, 2))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.sleep(0.01)
            assert len(batcher) == 1  # its place is free at once
            model.gate.set()
            await asyncio.gather(first, last)
            assert batcher.busy == 0

    run(body())
    assert model.batches == [[0], [2]]


def test_a_model_that_forgets_a_row_is_an_error_and_not_somebody_elses_answer():
    async def body():
        async with Batcher(lambda rows: rows[1:], largest=4, wait=0.05) as batcher:
            return await submit_all(batcher, [[1], [2]])

    assert all(isinstance(each, ValueError) and "one answer a row" in str(each) for each in run(body()))


@pytest.mark.parametrize(
    "options", [{"largest": 0}, {"queue": 0}, {"wait": -1.0}, {"wait": 60}, {"wait": float("nan")}]
)
def test_wrong_options_are_named(options):
    async def body():
        Batcher(list, **options)

    with pytest.raises(ValueError, match=next(iter(options))):
        run(body())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained digit model and a GPT of one layer, exported; and the modules themselves."""
    folder = tmp_path_factory.mktemp("models")
    digits = digit_model(generator=torch.Generator().manual_seed(0)).eval()
    gpt = GPT(GPTConfig(layers=1, heads=2, width=16, context=32), generator=torch.Generator().manual_seed(0)).eval()
    described = {"name": "digits", "version": "7", "kind": "classifier", "classes": 10}
    export(digits, torch.zeros(2, 64), folder / "digits.onnx", dynamic={0: "batch"}, metadata=described)
    described = {"name": "gpt", "version": "1", "kind": "language-model", "vocabulary": 256, "context": 32}
    dynamic = {0: "batch", 1: torch.export.Dim("length", max=32)}
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    export(gpt, tokens, folder / "gpt.onnx", dynamic=dynamic, metadata=described)
    return folder, digits, gpt


@pytest.mark.verifies(
    "deployment.served_models.Classifier",
    "deployment.served_models.open_model",
    kind="parity",
    against="torch's softmax of the module itself",
    on="33 random pictures in one batch, float32",
    bound=1e-6,
)
def test_a_served_classifier_answers_as_its_module(files, seen):
    folder, digits, _ = files
    model = open_model(str(folder / "digits.onnx"))
    assert isinstance(model, Classifier)
    assert (model.name, model.version, len(model.sha256), len(model.classes)) == ("digits", "7", 64, 10)
    x = torch.rand(33, 64, generator=torch.Generator().manual_seed(1))
    want = digits(x).softmax(-1).detach().numpy()
    seen(np.abs(model.run(list(x.numpy())) - want).max())


@pytest.mark.verifies(
    "deployment.served_models.LanguageModel",
    kind="parity",
    against="torch's softmax at the last token of each prompt alone",
    on="prompts of 1 to 40 bytes in one batch, context 32, float32",
    bound=1e-5,
)
def test_prompts_of_different_lengths_share_a_batch_and_change_nothing(files, seen):
    folder, _, gpt = files
    model = open_model(str(folder / "gpt.onnx"))
    assert isinstance(model, LanguageModel)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, length).astype(np.uint8) for length in (1, 2, 7, 31, 32, 33, 40)]
    for row, found in zip(rows, model.run(rows), strict=True):
        want = gpt(torch.from_numpy(row[-32:].astype(np.int64))[None])[0, -1].softmax(-1)
        seen(np.abs(found - want.detach().numpy()).max())
    seen(np.abs(model.run(rows[:1]) - model.run(rows)[:1]).max())


@pytest.mark.verifies(
    "deployment.served_models.Sleep",
    "deployment.served_models.SleepText",
    kind="invariant",
    against="the number of dark pixels; the next byte",
    on="random pictures and all 256 bytes",
)
def test_the_models_that_only_wait_say_when_an_answer_is_wrong():
    pictures = [np.array([1.0] * dark + [0.0] * (64 - dark), np.float32) for dark in range(64)]
    assert [int(row.argmax()) for row in Sleep().run(pictures)] == [dark % 10 for dark in range(64)]
    tokens = [np.array([5, byte], np.uint8) for byte in range(256)]
    assert [int(row.argmax()) for row in SleepText().run(tokens)] == [*range(1, 256), 0]
    slow = open_model("sleep:0.01+0.05")
    assert (slow.each, slow.call) == (0.01, 0.05)
    assert isinstance(open_model("sleep-text:.5"), SleepText)
    start = time.perf_counter()
    slow.run(pictures[:5])
    assert time.perf_counter() - start >= 0.1


@pytest.mark.verifies(
    "deployment.served_models.Served", kind="invariant", against="the four names and run", on="each kind of model"
)
def test_each_kind_of_model_has_what_a_service_needs(files):
    for name in ("sleep:0", "sleep-text:0", str(files[0] / "digits.onnx"), str(files[0] / "gpt.onnx")):
        model = open_model(name)
        assert all(isinstance(getattr(model, each), str) for each in ("name", "version", "kind", "sha256"))
        assert callable(model.run)


@pytest.mark.parametrize("name", ["nothing.onnx", "sleep:", "sleep:x", "sleep:-1", "sleep:61"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=r"nothing\.onnx|sleep:|each and call"):
        open_model(name)
