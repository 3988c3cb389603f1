"""Ray Serve from the course's side: a model cut into parts, and nodes on this machine that serve and lose them.

    with Cluster("clusters/serve.yaml", model="folder/of/parts") as cluster:
        cluster.predict("Return the ")
        cluster.kill(cluster.replicas("split", "Stage0")[0])

Ray lives in an environment of its own that `make serve-cluster` sets up; the course asks its service by HTTP, like any
other client.
"""

import copy
import hashlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
import torch
import yaml

from bigmodel_course.deployment.cluster_process import ClusterError, Process, environment_python, family
from bigmodel_course.deployment.export import export
from bigmodel_course.distributed.pipeline_stages import split_gpt
from bigmodel_course.models import GPT

__all__ = ["Cluster", "Replica", "cut", "deployment"]

STARTS = 4  # Ray gives a node up that is slow to start, after 15 s, however busy the machine is


@dataclass(frozen=True)
class Replica:
    """A replica: `name` is deployment#id, as in the answers; `state` as Ray calls it; `node` the id of its node."""

    name: str
    state: str
    pid: int
    node: str


def cut(gpt: GPT, folder: str | Path, *, stages: int, name: str, version: str = "1") -> list[Path]:
    """Write a GPT as `stages` ONNX files, and model.json that says how they belong together; the files' paths.

    The first takes tokens [B, T], the last gives scores [B, T, V], between them go vectors [B, T, width].
    """
    folder, parts, lines = Path(folder), [], []
    folder.mkdir(parents=True, exist_ok=True)
    config = gpt.config
    length = torch.export.Dim("length", max=config.context)
    for i, (stage,) in enumerate(split_gpt(gpt, stages)):
        shape = (2, min(8, config.context))
        example = torch.zeros(shape, dtype=torch.int64) if i == 0 else torch.zeros(*shape, config.width)
        described = {"name": name, "version": version, "kind": "stage", "stage": i, "context": config.context}
        described["outputs"] = config.vocabulary if i == stages - 1 else config.width
        path = folder / f"stage_{i}.onnx"
        parts.append(export(stage, example, path, dynamic={0: "batch", 1: length}, metadata=described))
        lines.append({"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    whole = {"name": name, "version": version, "context": config.context, "stages": lines}
    (folder / "model.json").write_text(json.dumps(whole, indent=1) + "\n")
    return parts


def deployment(config: Mapping[str, Any], application: str, name: str) -> dict[str, Any]:
    """The settings of one deployment in a config file's content, to read or to change."""
    found = {(app["name"], d["name"]): d for app in config["applications"] for d in app["deployments"]}
    if (application, name) not in found:
        known = ", ".join("/".join(pair) for pair in found)
        raise ValueError(f"the config file has no deployment {application}/{name}; it has {known}")
    return found[application, name]


class Cluster:
    """A Ray cluster of a head node and `nodes` others, all processes of this machine, which serves `config`.

    `config` is the path of a file in Ray Serve's format, or its content; `model` is the folder that `cut` wrote, for
    every application that names one.  The HTTP port is a free one.  Use it in a `with` statement, or `start` and `stop`
    it; afterwards no process, port or file of it is left, also when it is interrupted or this process is killed.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any],
        *,
        model: str | Path | None = None,
        nodes: int = 2,
        cpus: int = 4,
        timeout: float = 180.0,
    ):
        if nodes < 1 or cpus < 1:
            raise ValueError(f"need nodes >= 1 and cpus >= 1 besides the head, got {nodes=} and {cpus=}")
        self.python = environment_python()
        content = config if isinstance(config, Mapping) else yaml.safe_load(Path(config).read_text())
        self.config = copy.deepcopy(dict(content))
        self.config["http_options"] = {**self.config.get("http_options", {}), "host": "127.0.0.1", "port": 0}
        for app in self.config["applications"]:
            if model is not None and "model" in app.get("args", {}):
                app["args"]["model"] = str(Path(model).resolve())
        self.count, self.timeout, self.cpus = nodes, timeout, cpus
        self.process: Process | None = None
        self.http: httpx.Client | None = None

    def start(self) -> "Cluster":
        """Start the nodes and everything that the config file names; returns when all of it answers."""
        deadline = monotonic() + self.timeout
        try:
            self._start(deadline)
            self.deploy(self.config)
            self.wait(self._all_run, "the applications of the config file to run", deadline - monotonic())
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the cluster; nothing of it is left."""
        if self.http:
            self.http.close()
        if self.process:
            self.process.close()
        self.http = self.process = None

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, deadline: float) -> None:
        for attempt in range(STARTS):
            self.process = Process(self.python)
            try:
                for cpus in (0, *[self.cpus] * self.count):  # no work on the head: if it dies, all dies
                    self.process.ask("add_node", max(deadline - monotonic(), 1), cpus=cpus)
                return
            except ClusterError:
                self.process.close()
                if attempt == STARTS - 1 or monotonic() > deadline:
                    raise

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Ask for what `config` says; Ray changes only what differs from what runs."""
        port = self.process.ask("deploy", self.timeout, config=config)["port"]
        self.config = copy.deepcopy(dict(config))
        if self.http is None:
            self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def predict(self, prompt: str, *, tries: int | None = None) -> dict[str, Any]:
        """The split model's scores of the next byte after `prompt`, which replicas made them, and the retries it took.

        `tries` is how often the ingress may ask one stage, at most and by default as often as the config file says.
        ClusterError with status and sentence where there is no answer.
        """
        try:
            answer = self.http.post("/predict", json={"prompt": prompt} | ({} if tries is None else {"tries": tries}))
        except httpx.HTTPError as error:
            raise ClusterError(f"no answer by HTTP: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise ClusterError(f"status {answer.status_code}: {answer.text[:300]}")
        return answer.json()

    def status(self) -> dict[str, Any]:
        """Every application with its replicas, and every node, as Ray's controller sees them now."""
        return self.process.ask("status", self.timeout)

    def replicas(self, application: str, name: str, state: str = "RUNNING") -> list[Replica]:
        """The replicas of one deployment that are in a state."""
        found = self.status()["applications"].get(application, {}).get("replicas", {}).get(name, [])
        named = [Replica(f"{name}#{r['replica']}", r["state"], r["pid"], r["node"]) for r in found]
        return [replica for replica in named if replica.state == state]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that live: id, process, whether it is the head."""
        return [node for node in self.status()["nodes"] if node["alive"]]

    def add_node(self) -> str:
        """Start one more node; its id."""
        for _ in range(STARTS - 1):
            with suppress(ClusterError):
                return self.process.ask("add_node", self.timeout, cpus=self.cpus)["node"]
        return self.process.ask("add_node", self.timeout, cpus=self.cpus)["node"]

    def kill(self, replica: Replica) -> None:
        """End one replica's process with SIGKILL."""
        if not replica.pid:
            raise ClusterError(f"{replica.name} has no process yet: wait until it is RUNNING")
        os.kill(replica.pid, signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """End a whole node: its processes get SIGKILL, all at once, as if its machine lost power."""
        (pid,) = [found["pid"] for found in self.status()["nodes"] if found["node"] == node]
        for process in family(psutil.Process(pid)):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def wait(self, until: Callable[[], Any], what: str, timeout: float | None = None) -> float:
        """Wait until `until()` is true; the seconds it took.  ClusterError names `what` did not come."""
        start = monotonic()
        while not until():
            if monotonic() - start > (self.timeout if timeout is None else timeout):
                raise ClusterError(f"waited {monotonic() - start:.0f} s for {what}; Ray says: {self._complaint()}")
            sleep(0.1)
        return monotonic() - start

    def _all_run(self) -> bool:
        found = self.status()["applications"]
        if failed := [name for name, app in found.items() if app["status"] == "DEPLOY_FAILED"]:
            raise ClusterError(f"Ray could not deploy {', '.join(failed)}: {self._complaint()}")
        return len(found) == len(self.config["applications"]) and all(a["status"] == "RUNNING" for a in found.values())

    def _complaint(self) -> str:
        said = {name: app["message"] or app["status"] for name, app in self.status()["applications"].items()}
        return " ".join(" ".join(f"{name}: {text}".split())[-400:] for name, text in said.items())

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster."""
        return family(self.process.process) if self.process else []
