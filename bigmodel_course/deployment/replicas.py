"""A fleet of replicas on one machine: the same model in several processes behind one address, and ways to break them.

with Fleet("digits.onnx", replicas=2) as fleet:
    httpx.post(f"{fleet.url}/v1/predict", json={"pictures": [pixels]})
    fleet.kill("replica-1")                     nobody notices

supervisord keeps the processes, HAProxy spreads the requests and verifies the answers, a doctor ends what hangs.
"""

import json
import os
import signal
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import monotonic, sleep

from bigmodel_course.deployment.machinery import Machinery, write_private
from bigmodel_course.deployment.sealed import Proven, key_of
from bigmodel_course.deployment.served_models import open_model
from bigmodel_course.deployment.service_settings import Settings

__all__ = ["Fleet", "Replica"]

FAULTS = ("weights", "body", "replay", "one input")  # those of service_replica, which this process need not import
CYCLE = 0.05  # seconds: how often a slow replica is stopped and let go


@dataclass(frozen=True)
class Replica:
    """One replica as balancer and supervisor see it: "up", "down", "starting" or "leaving"; `answered` so far."""

    name: str
    state: str
    pid: int
    model: str
    answered: int


class Fleet:
    """Replicas of `model` (an ONNX file, or "sleep:SECONDS") behind `url`, from `with` or `start` until `close`.

    Other `settings` are those of the service.  A replica that gives no answer within `patience` seconds has failed.
    `slots` bounds how many processes there can be, also during an update.  With `faults`, `nonsense` may be used.
    RuntimeError, with a log, if something does not start within `timeout` seconds.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        replicas: int = 2,
        slots: int = 8,
        patience: float = 5.0,
        timeout: float = 120.0,
        faults: bool = False,
        settings: Settings | None = None,
    ):
        if not isinstance(slots, int) or not 1 <= slots <= 64:
            raise ValueError(f"slots must be a whole number from 1 to 64, got {slots!r}")
        _check_count(replicas, slots)
        self.settings = replace(settings or Settings(model=str(model)), model=_where(model))
        self.replicas, self.patience, self.timeout, self.faults = replicas, patience, timeout, faults
        self._slots = [f"replica-{k}" for k in range(1, slots + 1)]
        self._used: dict[str, tuple[str, bytes]] = {}  # name: model, and the key of its seals
        self._harmed: dict[str, int] = {}  # name: the process that was harmed
        self._slow: dict[str, threading.Event] = {}
        self._machine: Machinery | None = None

    def __enter__(self) -> "Fleet":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> "Fleet":
        """Start everything, and return when all replicas are up."""
        self._machine = Machinery(self._slots, timeout=self.timeout, patience=self.patience)
        self.url, self.folder = self._machine.url, self._machine.folder
        try:
            self.scale(self.replicas)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop everything; no process, port or file is left."""
        for name in list(self._slow):
            self.slow(name, None)
        if self._machine:
            self._machine.close()

    def scale(self, replicas: int) -> None:
        """Have so many replicas: new ones join when they have proved themselves, old ones leave when they are idle."""
        _check_count(replicas, len(self._slots))
        names = list(self._used)
        self._join(replicas - len(names), self.settings.model)
        self._leave(*names[replicas:])

    def rolling_update(self, model: str | Path) -> None:
        """Put another model in the place of this one, replica by replica: each new one joins before an old one leaves.

        If a new replica does not start, RuntimeError, and the old ones go on.
        """
        names, model = list(self._used), _where(model)
        if len(names) == len(self._slots):
            raise ValueError(f"slots must leave room for one more replica, and all {len(names)} are in use")
        for name in names:
            self._join(1, model)
            self._leave(name)
        self.settings = replace(self.settings, model=model)

    def status(self) -> list[Replica]:
        """The replicas in use, by name."""
        table, processes = self._machine.balancer.table(), self._machine.supervisor.processes()
        return [self._seen(name, table[name], processes[name]) for name in sorted(self._used)]

    def recovered(self, timeout: float | None = None) -> None:
        """Wait until every replica is up, the harmed ones in new processes; RuntimeError after `timeout` seconds."""
        self._machine.until(self._all_well, *self._used, timeout=timeout)
        self._harmed.clear()

    def kill(self, name: str) -> None:
        """SIGKILL: the process is gone in the middle of what it does."""
        os.kill(self._harm(name), signal.SIGKILL)

    def freeze(self, name: str) -> None:
        """SIGSTOP: it lives, and does nothing any more."""
        os.kill(self._harm(name), signal.SIGSTOP)

    def slow(self, name: str, share: float | None) -> None:
        """Let the process run for that share of the time only, as beside a greedy neighbour; None ends that."""
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, or None, got {share!r}")
        if name in self._slow:
            self._slow.pop(name).set()
        if share is not None:
            self._slow[name] = over = threading.Event()
            threading.Thread(target=_brake, args=(self._pid(name), share, over), daemon=True).start()

    def nonsense(self, name: str, kind: str = "weights") -> None:
        """Until it restarts it answers 200 with nonsense, of a kind that `service_replica.FAULTS` names."""
        if not self.faults:
            raise ValueError("faults must be True for a fleet that may be made to talk nonsense, got False")
        if kind not in FAULTS:
            raise ValueError(f"kind must be one of {', '.join(FAULTS)}, got {kind!r}")
        self._harm(name)
        self.door_of(name).with_suffix(".sock.fault").write_text(kind)

    def door_of(self, name: str) -> Path:
        """The Unix socket on which this replica can be asked past the balancer."""
        self._pid(name)
        return self.folder / f"{name}.sock"

    def _join(self, count: int, model: str) -> None:
        """Start `count` replicas of `model` at once, wait until they listen, and let requests in."""
        free = [name for name in self._slots if name not in self._used][: max(count, 0)]
        machine = self._machine
        try:
            for name in free:
                self._used[name] = model, key_of(machine.secret, _proof(model, self.settings.threads))
                settings = replace(self.settings, model=model, replica=name)
                plan = {"settings": settings.to_json(), "socket": f"{name}.sock", "secret": machine.secret.hex()}
                write_private(self.folder / f"{name}.json", json.dumps(plan | {"faults": self.faults}))
                machine.supervisor.start(name)
            machine.until(lambda: all(map(self._listens, free)), *free)
        except BaseException:
            for name in free:
                self._used.pop(name, None)
                machine.supervisor.stop(name)
            raise
        machine.write(self._keys())
        for name in free:
            machine.balancer.trust(name, self._used[name][1])
            machine.balancer.enable(name)
        machine.until(lambda: self._up(free), *free)

    def _leave(self, *names: str) -> None:
        """No new requests; wait for those under way; stop."""
        machine = self._machine
        for name in names:
            machine.balancer.drain(name)
        end = monotonic() + self.patience + 2
        while any(int(machine.balancer.table()[name]["scur"]) for name in names) and monotonic() < end:
            sleep(0.02)
        for name in names:
            machine.balancer.disable(name)
            self._used.pop(name)
            self.slow(name, None)
        machine.write(self._keys())
        for name in names:
            machine.supervisor.stop(name)

    def _keys(self) -> dict[str, bytes]:
        return {name: key for name, (_, key) in self._used.items()}

    def _listens(self, name: str) -> bool:
        """Does its process take requests?  RuntimeError if it has ended."""
        if self._machine.supervisor.processes()[name]["statename"] in ("BACKOFF", "FATAL", "EXITED"):
            raise RuntimeError(f"{name} does not start; its log says: {self._machine.log(name)}")
        return self._takes(name)

    def _takes(self, name: str) -> bool:
        with socket.socket(socket.AF_UNIX) as line, suppress(OSError):
            line.connect(str(self.folder / f"{name}.sock"))
            return True
        return False

    def _up(self, names: list[str]) -> bool:
        table = self._machine.balancer.table()
        return all(table[name]["status"].startswith(("UP", "no check")) for name in names)

    def _all_well(self) -> bool:
        processes = self._machine.supervisor.processes()
        fresh = all(processes[name]["pid"] != pid for name, pid in self._harmed.items() if name in self._used)
        runs = fresh and all(processes[name]["statename"] == "RUNNING" for name in self._used)
        # a busy balancer may not have seen yet that the old process went: is the new one there?
        return runs and self._up(list(self._used)) and all(map(self._takes, self._used))

    def _seen(self, name: str, row: dict[str, str], process: dict) -> Replica:
        states = {"UP": "up", "DRAIN": "leaving", "MAINT": "starting", "no": "up"}
        state = states.get(row["status"].split(" ")[0], "down")
        return Replica(name, state, process["pid"], self._used[name][0], int(row["hrsp_2xx"]))

    def _pid(self, name: str) -> int:
        if name not in self._used:
            raise ValueError(f"name must be one of {', '.join(sorted(self._used))}, got {name!r}")
        pid = self._machine.supervisor.processes()[name]["pid"]
        if not pid:
            raise RuntimeError(f"{name} does not run at the moment: wait with recovered()")
        return pid

    def _harm(self, name: str) -> int:
        self._harmed[name] = pid = self._pid(name)
        return pid


@lru_cache
def _proof(model: str, threads: int) -> bytes:
    """What the right model answers to the question, found here, in a process of our own."""
    return Proven(open_model(model, threads=threads)).proof


def _check_count(replicas: int, slots: int) -> None:
    if not isinstance(replicas, int) or isinstance(replicas, bool) or not 0 <= replicas <= slots:
        raise ValueError(f"replicas must be a whole number from 0 to slots, {slots}, got {replicas!r}")


def _where(model: str | Path) -> str:
    """Absolute, as the replicas run elsewhere."""
    return str(model) if str(model).startswith("sleep") else str(Path(model).resolve())


def _brake(pid: int, share: float, over: threading.Event) -> None:
    """Stop the process and let it go, until told, or until it is gone."""
    with suppress(ProcessLookupError):
        while not over.wait(share * CYCLE):
            os.kill(pid, signal.SIGSTOP)
            over.wait((1 - share) * CYCLE)
            os.kill(pid, signal.SIGCONT)
