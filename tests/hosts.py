"""Two hosts on one machine: network namespaces joined by a cable, each with an agent of torchrun."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest


class Host(NamedTuple):
    """A network namespace, its address, and its end of the cable."""

    name: str
    address: str
    cable: str


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    if sys.platform != "linux" or not shutil.which("ip"):
        pytest.skip("two hosts need Linux and its command `ip`")
    hosts = [Host(f"bmc{os.getpid()}{end}", f"10.213.77.{i}", f"veth{i}") for i, end in enumerate("ab", start=1)]
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        first, second = hosts
        ip("link", "add", first.cable, "netns", first.name, "type", "veth", "peer", "name", second.cable,
           "netns", second.name)  # fmt: skip
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
            for each in ("lo", host.cable):
                ip("-n", host.name, "link", "set", each, "up")
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not allow network namespaces: {error.stderr.strip()}")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, timeout=20, check=False)


def torchrun_on(hosts: Sequence[Host], command: Sequence[str], folder: Path, *options: str) -> list[subprocess.Popen]:
    """Start `command` under torchrun with one rank on each host; they meet on the first.  The caller ends them."""
    agents = []
    for host in hosts:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29500", "--rdzv-id", "test"]
        meeting += ["--rdzv-conf", f"is_host={host is hosts[0]}", "--local-addr", host.address]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc-per-node", "1", *meeting]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.cable}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        line = ["ip", "netns", "exec", host.name, sys.executable, *torchrun, *options, *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        agents.append(subprocess.Popen(line, env=environment, cwd=folder, **pipes))
    return agents


def shown_by(agents: Sequence[subprocess.Popen], timeout: float) -> list[str]:
    """What the agents print until all have ended well; none is left running."""
    try:
        shown = [agent.communicate(timeout=timeout)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0] * len(agents), "\n".join(shown)
        return shown
    finally:
        for agent in agents:
            end_all(agent)
            agent.communicate()


def end_all(agent: subprocess.Popen) -> None:
    """SIGKILL to it and to its ranks, which would outlive it and keep its pipes open."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(agent.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    agent.kill()
