"""The doctor ends replicas that live and do not answer right; the supervisor then starts them again.

`python -m bigmodel_course.deployment.doctor FOLDER`.  A process that hangs never ends, and one that talks
nonsense is in the best of health: nobody but the balancer knows that something is wrong with them.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep

from bigmodel_course.deployment.balancer import Balancer
from bigmodel_course.deployment.lifetime import end_with_stdin
from bigmodel_course.deployment.supervision import Supervisor

__all__ = ["hopeless", "main"]

EVERY = 0.25  # seconds
GRACE = 180.0  # seconds: a new process is left in peace, unless it once was up; a busy machine starts it slowly
LOOKS, DOWN = 12, 8  # of so many looks, a replica must be found down so often: busy is not dead


def hopeless(table: Mapping[str, Mapping], processes: Mapping[str, Mapping], been_up: set[int]) -> dict[str, int]:
    """Replicas (name: pid) in use, down, and running: `been_up` holds the processes that once were up, and is kept."""
    found = {}
    for name, row in table.items():
        process = processes[name]
        age = process["now"] - process["start"]
        if row["watch"] == "UP" and row["since"] <= age:  # else it is the process before this one that was up
            been_up.add(process["pid"])
        if process["statename"] != "RUNNING" or row["status"].startswith(("MAINT", "DRAIN")):
            continue
        if row["watch"].startswith("DOWN") and (process["pid"] in been_up or age > GRACE):
            found[name] = process["pid"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Look, and look again, until the supervisor is gone."""
    (folder,) = sys.argv[1:] if argv is None else argv
    end_with_stdin()
    balancer, supervisor = Balancer(Path(folder)), Supervisor(Path(folder))
    been_up: set[int] = set()
    looks: deque[set[int]] = deque(maxlen=LOOKS)
    while True:
        with suppress(OSError, RuntimeError):  # the balancer starts, or is being replaced
            found = hopeless(balancer.table(), supervisor.processes(), been_up)
            looks.append(set(found.values()))
            for pid in [pid for pid in looks[-1] if sum(pid in down for down in looks) >= DOWN]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        sleep(EVERY)


if __name__ == "__main__":
    sys.exit(main())
