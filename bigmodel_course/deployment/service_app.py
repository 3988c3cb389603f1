"""The service as a FastAPI application: typed routes around one model, batches, health, metrics, OpenAPI page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from swagger_ui_bundle import swagger_ui_path

from bigmodel_course.deployment import service_schemas as schemas
from bigmodel_course.deployment.batching import Batcher, QueueFull
from bigmodel_course.deployment.served_models import Served, open_model
from bigmodel_course.deployment.service_gate import Gate, Trace, problem
from bigmodel_course.deployment.service_metrics import Metrics
from bigmodel_course.deployment.service_settings import Settings

__all__ = ["create_app"]

TOP = 5  # likeliest next bytes in an answer
PROBLEM = {
    "type": "object",
    "properties": {"status": {"type": "integer"}, "title": {"type": "string"}, "detail": {"type": "string"}},
    "required": ["status", "title", "detail"],
}
UNREADABLE = "The body is not JSON that can be read: too deep, a number too long, or not UTF-8."
REFUSALS = {
    400: "The body is not JSON.",
    401: "The key is missing or not known.",
    408: "The request came too slowly.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    422: "The body is JSON, but not of the right form.",
    429: "This client asks too often.",
    503: "Too many wait, or this worker is stopping: ask again.",
    504: "The answer took too long.",
}


def create_app(settings: Settings, model: Served | None = None) -> FastAPI:
    """A FastAPI application that serves `model`, by default the one that `settings` names.

    `app.state.draining = True` turns /ready to 503 and asks clients to go elsewhere; requests are still answered.
    """
    model = model or open_model(settings.model, threads=settings.threads)
    metrics = Metrics(model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batching = {"largest": settings.batch, "wait": settings.wait, "queue": settings.queue}
        async with Batcher(model.run, **batching, seen=metrics.batch.observe) as app.state.batcher:
            metrics.waiting.set_function(lambda: len(app.state.batcher))
            yield

    app = FastAPI(
        title=f"{model.name} {model.version}",
        version=model.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={code: _refusal(text) for code, text in REFUSALS.items()},
    )
    app.openapi_version = "3.0.3"  # the page that comes with swagger-ui-bundle reads no 3.1
    app.state.draining = False
    security = [Security(HTTPBearer(auto_error=False))] if settings.keys else []
    _add_errors(app)
    _add_status(app, settings, metrics)
    _add_docs(app)
    _add_card(app, settings, model, security)
    add = _add_pictures if model.kind == "classifier" else _add_text
    add(app, settings, model, security)
    app.add_middleware(Gate, settings=settings, ended=metrics.ended, draining=lambda: app.state.draining)
    return app


def _refusal(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/problem+json": {"schema": PROBLEM}}}


def _failed(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return Response(problem(status, detail), status, headers, "application/problem+json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _failed(400, f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][1]}.")
        return _failed(422, schemas.faults(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        detail = UNREADABLE if error.status_code == 400 else str(error.detail)
        return _failed(error.status_code, detail, error.headers)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return _failed(503, f"This worker has too much to do: {error}.", {"retry-after": "1"})

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> Response:
        return _failed(504, "The answer took longer than this service allows.")


def _add_status(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    @app.get("/health", response_model=schemas.Status)
    async def health() -> Response | schemas.Status:
        """Does this worker live?  If not, only a restart helps: its model has been busy with one batch for too long."""
        if app.state.batcher.busy > 3 * settings.answer_seconds:
            return _failed(503, "The model does not come back from a batch: restart this worker.")
        return schemas.Status(status="alive", replica=settings.replica)

    @app.get("/ready", response_model=schemas.Status)
    async def ready() -> Response | schemas.Status:
        """Should requests be sent here?  Not while it is stopping."""
        if app.state.draining:
            return _failed(503, "This worker is stopping: send requests elsewhere.")
        return schemas.Status(status="ready", replica=settings.replica)

    @app.get("/metrics", include_in_schema=False)
    async def measured() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)


def _add_docs(app: FastAPI) -> None:
    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_path))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon-32x32.png",
        )


def _signature(settings: Settings, model: Served) -> dict[str, str]:
    return {"model": model.name, "version": model.version, "replica": settings.replica}


def _add_card(app: FastAPI, settings: Settings, model: Served, security: list) -> None:
    @app.get("/v1/model", dependencies=security)
    async def card() -> schemas.ModelCard:
        """What is served here."""
        return schemas.ModelCard(kind=model.kind, sha256=model.sha256, **_signature(settings, model))


async def _ask(app: FastAPI, request: Request, rows: list[np.ndarray], seconds: float) -> list[np.ndarray]:
    """The model's answers to `rows`, within `seconds`; the request's trace learns who waited for whom."""
    trace: Trace = request.scope["state"]["trace"]
    trace.stage("resume" if "parse" in trace.stages else "parse")
    async with asyncio.timeout(seconds):
        done = await app.state.batcher.submit(rows)
    longest = max(done, key=lambda each: each.waited + each.ran)
    trace.split(("queue", longest.waited), ("model", longest.ran))
    return [each.answer for each in done]


def _add_pictures(app: FastAPI, settings: Settings, model: Served, security: list) -> None:
    Pictures = schemas.pictures(settings.largest_request)

    @app.post("/v1/predict", dependencies=security)
    async def predict(request: Request, body: Pictures) -> schemas.Guesses:
        """Which class is each picture of?"""
        rows = list(np.array(body.pictures, np.float32))
        found = await _ask(app, request, rows, settings.answer_seconds)
        return schemas.Guesses(answers=[_guess(model.classes, each) for each in found], **_signature(settings, model))


def _guess(classes: list[str], probabilities: np.ndarray) -> schemas.Guess:
    named = {name: round(float(p), 6) for name, p in zip(classes, probabilities, strict=True)}
    return schemas.Guess(label=classes[int(probabilities.argmax())], probabilities=named)


def _add_text(app: FastAPI, settings: Settings, model: Served, security: list) -> None:
    @app.post("/v1/predict", dependencies=security)
    async def predict(request: Request, body: schemas.Prompt) -> schemas.Continuation:
        """What follows the prompt?  Each new byte is a row of its own, so long and short requests share batches."""
        end = perf_counter() + settings.answer_seconds
        tokens = np.frombuffer(body.prompt.encode(), np.uint8)
        start, first = len(tokens), None
        for _ in range(body.length):
            (found,) = await _ask(app, request, [tokens], end - perf_counter())
            first = found if first is None else first
            tokens = np.append(tokens, np.uint8(found.argmax()))
        top = {str(byte): round(float(first[byte]), 6) for byte in (-first).argsort(kind="stable")[:TOP]}
        text = tokens[start:].tobytes().decode(errors="replace")
        return schemas.Continuation(continuation=text, next=top, **_signature(settings, model))
