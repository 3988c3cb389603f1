"""The console of a cluster whose nodes are all on this machine; it runs in Ray's environment.

`deployment.cluster_process` starts it, writes lines such as {"number": 1, "do": "add_node", "with": {"cpus": 4}}, and
gets one back for each: {"number": 1, "done": ...}, or "error" with a sentence.  When its input ends, because it was
closed or because whoever held it died, it ends every node and removes its folder.  Should it be killed itself, the
nodes die with it: Ray asks the kernel for that.
"""

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Console", "main"]

HERE = "127.0.0.1"
STORE = 80_000_000  # bytes of a node's shared memory; Ray's smallest is 75 MiB
NODE = {"node_ip_address": HERE, "object_store_memory": STORE, "include_log_monitor": False}


class Console:
    """Starts nodes, deploys a config file and says what runs."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster, self.nodes, self.client = Cluster(), [], None

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What comes back for one line: "done", or "error" with a sentence."""
        try:
            act = {"add_node": self.add_node, "deploy": self.deploy, "status": self.status}[asked["do"]]
            return {"number": asked["number"], "done": act(**asked["with"])}
        except Exception as error:  # it goes to whoever asked
            return {"number": asked["number"], "error": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        """End every node."""
        import ray

        ray.shutdown()
        self.cluster.shutdown()

    def add_node(self, cpus: int) -> dict[str, Any]:
        """Start a node, the head if it is the first."""
        import ray

        head = {"include_dashboard": False, "no_monitor": True} if not self.nodes else {}
        self.nodes.append(self.cluster.add_node(num_cpus=cpus, **NODE, **head))
        if head:
            ray.init(address=self.cluster.address, log_to_driver=False, configure_logging=False)
        return self.node(self.nodes[-1])

    def node(self, node: Any) -> dict[str, Any]:
        """A node's id, and the process whose descendants are the node's replicas."""
        return {"node": node.node_id, "pid": node.all_processes["raylet"][0].process.pid, "head": node.head}

    def deploy(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Hand Serve a config file's content; a port of 0 becomes a free one."""
        from ray.serve._private.api import serve_start
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate(config)
        if self.client is None:
            if not schema.http_options.port:
                self.place = free_place()
                schema.http_options.port = self.place.getsockname()[1]
            options = schema.http_options.model_dump()
            self.client = serve_start(http_options=options, proxy_location=schema.proxy_location)
            self.port = schema.http_options.port
        schema.http_options.port = self.port
        self.client.deploy_apps(schema)
        return {"port": self.port}

    def status(self) -> dict[str, Any]:
        """The applications with the state of each replica, and which nodes live."""
        import ray

        found = self.client.get_serve_details() if self.client else {"applications": {}}
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        nodes = [{**self.node(node), "alive": node.node_id in alive} for node in self.nodes]
        return {"applications": {k: _application(v) for k, v in found["applications"].items()}, "nodes": nodes}


def _application(found: Mapping[str, Any]) -> dict[str, Any]:
    """Status, the message where something is wrong, and every replica by deployment."""
    deployments = found["deployments"]
    replicas = {name: [_replica(replica) for replica in d["replicas"]] for name, d in deployments.items()}
    messages = [found["message"], *(d["message"] for d in deployments.values())]
    return {"status": found["status"], "message": " ".join(filter(None, messages)), "replicas": replicas}


def _replica(found: Mapping[str, Any]) -> dict[str, Any]:
    """A replica that is still to start has no process and no node yet."""
    place = {"pid": found.get("pid") or 0, "node": found.get("node_id") or ""}
    return {"replica": found["replica_id"], "state": found["state"].value, **place}


def free_place() -> socket.socket:
    """A socket at a port of this machine where nobody listens; it keeps the port for those who share, as Ray does."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    place.bind((HERE, 0))
    return place


def main() -> None:
    """Answer the lines of the standard input until it ends; then leave nothing behind."""
    folder = Path(os.environ["RAY_TMPDIR"])
    (folder / "ray").mkdir(parents=True, exist_ok=True)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints
    console = None
    try:
        console = Console()
        for line in sys.stdin:
            answers.write(json.dumps(console.answer(json.loads(line))) + "\n")
    finally:
        if console:
            console.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
