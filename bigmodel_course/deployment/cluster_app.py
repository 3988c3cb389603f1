"""The applications of clusters/serve.yaml: what Ray Serve imports on every node, in an environment of its own.

That environment has Ray, NumPy and onnxruntime, and no torch; the course's own has no Ray.  So Ray and onnxruntime are
imported where they are used.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Ingress", "Lost", "Sleep", "Stage", "again", "asked", "sleeper", "split_model", "stay_on_this_address"]

LONGEST = 64 * 1024  # bytes of a request


class Lost(Exception):
    """No replica of a stage answered, in all the tries that a request has."""


class Stage:
    """One part of a cut model: an array in, an array out, and the name of the replica that made it.

    `pause` seconds are waited besides, as a larger model would take them.  ValueError where the file is not the one
    that `cluster.cut` wrote, which `sha256` tells.
    """

    def __init__(self, path: str, sha256: str, pause: float = 0.0):
        import onnxruntime

        stay_on_this_address()
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{path} is damaged, or belongs to another model.json: cut the model again")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.input, self.pause = self.session.get_inputs()[0].name, pause

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, str]:
        """The part's output, and `deployment#replica`."""
        time.sleep(self.pause)
        return self.session.run(None, {self.input: x})[0], _replica()


class Ingress:
    """HTTP in front of the stages: a prompt goes through all of them, and a stage that was lost is asked again.

    A stage has no memory and changes nothing, so asking twice is the same as asking once.  What the stages before it
    answered is kept here: only the lost part is done again.
    """

    def __init__(self, described: Mapping[str, Any], *stages: Any, tries: int, patience: float):
        stay_on_this_address()
        self.described = {key: described[key] for key in ("name", "version")}
        self.context, self.stages, self.tries, self.patience = int(described["context"]), stages, tries, patience

    async def __call__(self, request: Any) -> Any:
        """A starlette request with {"prompt": text} to {"scores": [...], ...}, or a status and a sentence."""
        from ray.exceptions import RayTaskError
        from starlette.responses import JSONResponse

        try:
            prompt, tries = asked(await request.body(), self.tries)
            scores, replicas, retries = await self._through(prompt, tries)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Lost as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        except RayTaskError:
            return JSONResponse({"error": "the model itself failed: asking again would not help"}, 500)
        return JSONResponse({"scores": scores, "replicas": replicas, "retries": retries, **self.described})

    async def _through(self, prompt: bytes, tries: int) -> tuple[list[float], list[str], int]:
        x, replicas, retries = np.frombuffer(prompt, np.uint8)[None, -self.context :].astype(np.int64), [], 0
        for stage in self.stages:
            (x, replica), taken = await again(lambda s=stage, x=x: s.remote(x), _lost(), tries, self.patience)
            replicas, retries = [*replicas, replica], retries + taken - 1
        return x[0, -1].tolist(), replicas, retries


class Sleep:
    """A model for measuring how many replicas work: it waits and uses no processor."""

    def __init__(self, seconds: float):
        stay_on_this_address()
        self.seconds = seconds

    async def __call__(self, request: Any) -> dict[str, str]:
        """Which replica slept."""
        await asyncio.sleep(self.seconds)
        return {"replica": _replica()}


async def again(
    call: Callable[[], Awaitable], lost: tuple[type[BaseException], ...], tries: int, patience: float
) -> tuple[Any, int]:
    """Await `call()` until it answers, at most `tries` times and `patience` seconds each: (answer, tries taken).

    Only errors of the kinds `lost`, which say that whoever was asked is gone, are worth a second try.  An error of the
    model itself would come again, so it is raised at once.  Raises Lost when the tries are used up.
    """
    for attempt in range(tries):
        try:
            return await asyncio.wait_for(_awaited(call), patience), attempt + 1
        except (*lost, TimeoutError) as error:
            fault = type(error).__name__
            await asyncio.sleep(min(0.05 * 2**attempt, 1.0))
    raise Lost(f"no replica answered in {tries} tries (the last one: {fault}); ask again in a second")


def asked(body: bytes, most: int) -> tuple[bytes, int]:
    """The prompt in a request's body, and how many tries it wants at a stage; ValueError says what is wrong with it."""
    if len(body) > LONGEST:
        raise ValueError(f"the request must have at most {LONGEST:,} bytes, got {len(body):,}")
    try:
        found = json.loads(body)
        prompt, tries = found["prompt"].encode(), found.get("tries", most)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError('the request must be JSON such as {"prompt": "some text"}') from None
    if not prompt:
        raise ValueError("the prompt must have at least one character")
    if type(tries) is not int or not 1 <= tries <= most:
        raise ValueError(f"tries must be a whole number from 1 to {most}, got {str(tries)[:20]}")
    return prompt, tries


def split_model(args: Mapping[str, Any]) -> Any:
    """The application of a cut model: `model` is its folder, which `cluster.cut` wrote."""
    from ray import serve

    folder, pause = Path(args["model"]), float(args.get("pause", 0))
    described = json.loads((folder / "model.json").read_text())
    stages = [
        serve.deployment(Stage).options(name=f"Stage{i}").bind(str(folder / part["file"]), part["sha256"], pause)
        for i, part in enumerate(described["stages"])
    ]
    return serve.deployment(Ingress).bind(described, *stages, tries=args["tries"], patience=args["patience"])


def sleeper(args: Mapping[str, Any]) -> Any:
    """The application that only waits."""
    from ray import serve

    return serve.deployment(Sleep).bind(float(args["seconds"]))


def stay_on_this_address() -> None:
    """Have this replica listen at its node's address only.

    Ray binds every other port to the address that its node was given; a replica opens one more, for calls between
    replicas by gRPC, on all addresses of the machine.
    """
    import ray
    from ray.serve._private import replica

    bind, address = replica.add_port_to_grpc_server, ray.util.get_node_ip_address()
    own = f"[{address}]" if ":" in address else address
    replica.add_port_to_grpc_server = lambda server, wanted: bind(server, wanted.replace("[::]", own))


async def _awaited(call: Callable[[], Awaitable]) -> Any:
    return await call()


def _lost() -> tuple[type[BaseException], ...]:
    """Whoever was asked is gone, or cannot take more now."""
    from ray import exceptions as ray
    from ray.serve import exceptions as serve

    gone = (ray.RayActorError, ray.NodeDiedError, ray.ObjectLostError, ray.WorkerCrashedError, ray.RpcError)
    return (*gone, serve.DeploymentUnavailableError, serve.BackPressureError)


def _replica() -> str:
    from ray import serve

    context = serve.get_replica_context()
    return f"{context.deployment}#{context.replica_id.unique_id}"
