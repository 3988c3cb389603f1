"""Make an environment from its lock file; standard library only, as nothing is installed yet.

    python tools/environment.py             .venv, with the course in it and the kernel registered
    python tools/environment.py cluster     .venv-cluster, with Ray Serve and what runs an exported model

It does nothing where the environment is up to date, and leaves no half-made one that looks finished: the stamp with
the lock's hash is written last.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 13))  # oldest and newest that pyproject.toml allows

CAUSES = {  # what pip's log holds -> what to tell the reader
    ("No space left on device",): "The disk is full: make room and run the command again.",
    ("NewConnectionError", "Temporary failure in name resolution", "ConnectTimeout", "Network is unreachable"): (
        "The package index cannot be reached: connect to the network and run the command again."
    ),
    ("No matching distribution found",): (
        "A pinned package has no build for this system and Python: try another Python from 3.11 to 3.13."
    ),
}


class SetupError(Exception):
    """One sentence for the reader: what is missing and what to do."""


@dataclass(frozen=True)
class Environment:
    """A folder of packages, and the lock file that says which."""

    folder: str
    lock: str
    gigabytes: int  # of disk that its making needs
    holds: str  # what the reader is told that it holds

    @property
    def path(self) -> Path:
        """Where it lies."""
        return ROOT / self.folder

    @property
    def stamp(self) -> Path:
        """The file that says from what it was made; written last."""
        return self.path / "made-from"

    def wanted(self) -> str:
        """The text that the stamp holds when the environment is up to date."""
        digest = hashlib.sha256((ROOT / self.lock).read_bytes()).hexdigest()
        return f"{digest} Python {sys.version_info.major}.{sys.version_info.minor} {ROOT}\n"

    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return self.stamp.exists() and self.stamp.read_text() == self.wanted()


ENVIRONMENTS = {
    "course": Environment(".venv", "requirements.lock", 4, "The course's packages"),  # the CPU build takes 2.3 GB
    "cluster": Environment(".venv-cluster", "requirements-cluster.lock", 1, "Ray's packages"),
}


def check_python() -> None:
    """Refuse a Python that the lock file does not cover."""
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        have = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"The course needs Python 3.{oldest[1]} to 3.{newest[1]} and this is {have}: "
            f"install one and run `make PYTHON=python3.{newest[1]}`."
        )


def check_disk(environment: Environment) -> None:
    """Refuse to start an install that cannot end."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < environment.gigabytes:
        raise SetupError(
            f"{environment.holds} need {environment.gigabytes} GB of disk and {free:.1f} GB are free: "
            "make room and run the command again."
        )


def run(*command: str, failing: str) -> None:
    """Run `command`; where it fails, keep its log and say `failing`."""
    log = ROOT / "build" / "environment.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        raise SetupError(f"{failing}{reason(log.read_text(errors='replace'))} The whole log is in build/{log.name}.")


def reason(log: str) -> str:
    """The known cause that pip's log shows, as a sentence; empty where there is none."""
    for signs, sentence in CAUSES.items():
        if any(sign in log for sign in signs):
            return f" {sentence}"
    return ""


def make(environment: Environment) -> None:
    """Create the environment, install its lock, finish the course's own, write the stamp."""
    check_python()
    check_disk(environment)
    (ROOT / "build" / "environment.log").unlink(missing_ok=True)
    print(f"Setting up {environment.folder} (once; a few minutes) …", flush=True)
    shutil.rmtree(environment.path, ignore_errors=True)
    run(
        sys.executable,
        "-m",
        "venv",
        str(environment.path),
        failing="Python's venv module does not work here: on Debian and Ubuntu `apt install python3-venv` brings it.",
    )
    python = str(environment.path / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "-r", str(ROOT / environment.lock), failing="Installing the pinned packages failed.")
    if environment is ENVIRONMENTS["course"]:
        set_up_course(python, pip)
    environment.stamp.write_text(environment.wanted())
    print("Ready.", flush=True)


def set_up_course(python: str, pip: tuple[str, ...]) -> None:
    """Install the course itself, register the kernel, set up JupyterLab."""
    own = ("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    run(*pip, *own, failing="Installing the course's own package failed.")
    run(python, "-m", "ipykernel", "install", "--sys-prefix", failing="Registering the Jupyter kernel failed.")
    set_up_jupyterlab(python)


def set_up_jupyterlab(python: str) -> None:
    """Wrap long lines of code, and ask no server for news (nor the reader whether it may)."""
    news = ("labextension", "disable", "--level=sys_prefix", "@jupyterlab/apputils-extension:announcements")
    run(python, "-m", "jupyter", *news, failing="Setting up JupyterLab failed.")
    settings = ENVIRONMENTS["course"].path / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools" / "jupyterlab_overrides.json", settings / "overrides.json")


def main(name: str = "course") -> int:
    """Make the environment where it is missing or its lock changed."""
    try:
        if not ENVIRONMENTS[name].is_up_to_date():
            make(ENVIRONMENTS[name])
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
