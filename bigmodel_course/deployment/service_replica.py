"""One replica's process: a worker of the service on a Unix socket, its answers sealed; started by the supervisor.

`python -m bigmodel_course.deployment.service_replica FILE`, where FILE is a `Plan` as JSON.  If the plan allows faults,
the replica goes wrong in the way that the file `FAULT` beside its socket names: that is how lessons and tests break it.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigmodel_course.deployment import lifetime, service_worker
from bigmodel_course.deployment.sealed import Proven, Sealing, witness
from bigmodel_course.deployment.served_models import Served, open_model
from bigmodel_course.deployment.service_app import create_app
from bigmodel_course.deployment.service_settings import Settings

__all__ = ["FAULTS", "Faulty", "Garbling", "Plan", "main"]

FAULTS = {
    "weights": "the rows of the last layer have changed places: every answer is wrong, and looks right",
    "body": "a digit of the answer is another one when it leaves",
    "replay": "the first answer is sent for ever, with the seal that it had",
    "one input": "right on the question that proves it, wrong on all others",
}


@dataclass(frozen=True)
class Plan:
    """What one replica is started with; `secret` is hex, and what its seals are made with."""

    settings: str
    socket: str
    secret: str
    faults: bool = False


class Faulty:
    """A model whose answers are those of other weights while `fault()` says so."""

    def __init__(self, model: Served, fault: "Fault", *, kinds: Sequence[str]):
        self._model, self._fault, self._kinds = model, fault, kinds

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def run(self, rows: list[np.ndarray]) -> Sequence[np.ndarray]:
        """The model's answers, or each class's probability given to the next class."""
        answers = self._model.run(rows)
        return np.roll(answers, 1, axis=-1) if self._fault() in self._kinds else answers


class Garbling:
    """An ASGI application in front of another that spoils what leaves, while `fault()` says so."""

    def __init__(self, app: Sealing, fault: "Fault"):
        self.app, self.state, self._fault = app, app.state, fault
        self._first: list[dict] = []

    async def __call__(self, scope: dict, receive: object, send: object) -> None:
        """Pass the request on; the answer is that of `fault`."""
        predicting = scope["type"] == "http" and scope["path"] == "/v1/predict"
        sent: list[dict] = []

        async def reply(message: dict) -> None:
            if not predicting:
                await send(message)
                return
            sent.append(message)
            if message["type"] != "http.response.body" or message.get("more_body"):
                return
            self._first = self._first or sent
            for each in self._first if self._fault() == "replay" else sent:
                await send(_garbled(each) if self._fault() == "body" else each)

        await self.app(scope, receive, reply)


class Fault:
    """Which fault this replica has now: the text of a file, or none."""

    def __init__(self, path: str):
        self._path = path
        Path(path).unlink(missing_ok=True)  # a new process is well

    def __call__(self) -> str:
        try:
            with open(self._path, encoding="utf-8") as file:
                return file.read().strip()
        except FileNotFoundError:
            return ""


def _garbled(message: dict) -> dict:
    return (
        message | {"body": message["body"].translate(bytes.maketrans(b"0123456789", b"1234567890"))}
        if "body" in message
        else message
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal says stop, or the supervisor is gone."""
    (path,) = sys.argv[1:] if argv is None else argv
    lifetime.die_with_parent()
    lifetime.end_with_stdin()
    plan = Plan(**json.loads(Path(path).read_text(encoding="utf-8")))
    settings = Settings.from_json(plan.settings)
    fault = Fault(f"{plan.socket}.fault") if plan.faults else str
    model = open_model(settings.model, threads=settings.threads)
    asked = witness(model)
    if plan.faults:
        model, asked = (Faulty(each, fault, kinds=["weights"]) for each in (model, asked))
    proven = Proven(model, asked)
    served = Faulty(proven, fault, kinds=["one input"]) if plan.faults else proven
    app = Sealing(create_app(settings, served), proven, bytes.fromhex(plan.secret))
    listener = service_worker.listen(0, plan.socket)
    announce = service_worker.announcement(listener, settings, sys.stdout)
    service_worker.Worker(Garbling(app, fault) if plan.faults else app, settings, announce).run(sockets=[listener])
    sys.stdout.flush()
    os._exit(0)  # all is said and done: libraries may take seconds to tidy up


if __name__ == "__main__":
    sys.exit(main())
