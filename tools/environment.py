"""Make `.venv` from the lock file, with the kernel registered; standard library only, as nothing is installed yet.

It does nothing where the environment is up to date, and leaves no half-made one that looks finished: the stamp with
the lock's hash is written last.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-from"
LOCK = "requirements.lock"
PYTHONS = ((3, 11), (3, 13))  # oldest and newest that pyproject.toml allows
GIGABYTES = 4  # the CPU build with everything takes 2.3 GB

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


def wanted() -> str:
    """The text that the stamp holds when the environment is up to date."""
    digest = hashlib.sha256((ROOT / LOCK).read_bytes()).hexdigest()
    return f"{digest} Python {sys.version_info.major}.{sys.version_info.minor} {ROOT}\n"


def check_python() -> None:
    """Refuse a Python that the lock file does not cover."""
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        have = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"The course needs Python 3.{oldest[1]} to 3.{newest[1]} and this is {have}: "
            f"install one and run `make PYTHON=python3.{newest[1]}`."
        )


def check_disk(folder: Path = ROOT) -> None:
    """Refuse to start an install that cannot end."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < GIGABYTES:
        raise SetupError(
            f"The course's packages need {GIGABYTES} GB of disk and {free:.1f} GB are free: "
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


def make() -> None:
    """Create the environment, install the lock and the course itself, register the kernel, write the stamp."""
    check_python()
    check_disk()
    (ROOT / "build" / "environment.log").unlink(missing_ok=True)
    print("Setting up .venv (once; a few minutes) …", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    run(
        sys.executable,
        "-m",
        "venv",
        str(VENV),
        failing="Python's venv module does not work here: on Debian and Ubuntu `apt install python3-venv` brings it.",
    )
    python = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "-r", str(ROOT / LOCK), failing="Installing the pinned packages failed.")
    run(
        *pip,
        "--no-deps",
        "--no-build-isolation",
        "--editable",
        str(ROOT),
        failing="Installing the course's own package failed.",
    )
    set_up_jupyterlab(python)
    STAMP.write_text(wanted())
    print("Ready.", flush=True)


def set_up_jupyterlab(python: str) -> None:
    """Register the kernel, wrap long lines of code, and ask no server for news (nor the reader whether it may)."""
    run(python, "-m", "ipykernel", "install", "--sys-prefix", failing="Registering the Jupyter kernel failed.")
    news = ("labextension", "disable", "--level=sys_prefix", "@jupyterlab/apputils-extension:announcements")
    run(python, "-m", "jupyter", *news, failing="Setting up JupyterLab failed.")
    settings = VENV / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools" / "jupyterlab_overrides.json", settings / "overrides.json")


def main() -> int:
    """Make the environment where it is missing or its lock changed."""
    try:
        if not STAMP.exists() or STAMP.read_text() != wanted():
            make()
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
