"""One set of pinned packages, said three times and held together; and what setting up says when it cannot go on."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tools import environment

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(python: str) -> dict[str, str]:
    """The lock's versions for a Python of this system."""
    here = {**default_environment(), "python_version": python, "python_full_version": f"{python}.9"}
    active = [line for line in LOCK if line.marker is None or line.marker.evaluate(here)]
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in active}


def direct() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_direct_dependency_for_every_python(python):
    versions = pinned(python)
    for requirement in direct():
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_lock_pins_exactly_and_names_no_index():
    for line in LOCK:
        assert re.fullmatch(r"==[\w.]+", str(line.specifier)), line
        assert line.url is None, line


def test_torch_is_the_same_everywhere():
    import torch

    wanted = next(str(r.specifier) for r in direct() if r.name == "torch").removeprefix("==")
    assert (
        {pinned(python)["torch"] for python in PYTHONS} == {wanted} == {torch.__version__.split("+")[0]} == {"2.13.0"}
    )


def test_what_is_installed_is_what_is_pinned():
    from importlib.metadata import version

    versions = pinned(f"{sys.version_info.major}.{sys.version_info.minor}")
    for requirement in direct():
        name = canonicalize_name(requirement.name)
        assert version(name).split("+")[0] == versions[name], name


def test_conda_takes_the_same_python_and_the_same_lock():
    pip = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    python = next(entry for entry in CONDA["dependencies"] if isinstance(entry, str) and entry.startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert pip == ["-r requirements.lock", "-e ."]
    assert CONDA["channels"] == ["conda-forge"]


def test_the_set_up_accepts_the_pythons_that_the_project_allows():
    allowed = SpecifierSet(PROJECT["requires-python"])
    oldest, newest = environment.PYTHONS
    for minor in range(8, 20):
        assert allowed.contains(f"3.{minor}.1") == (oldest <= (3, minor) <= newest)


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0)])
def test_a_wrong_python_is_told_which_one_to_use(monkeypatch, version):
    monkeypatch.setattr(environment.sys, "version_info", version)
    have = ".".join(map(str, version))
    with pytest.raises(environment.SetupError, match=rf"needs Python 3.11 to 3.13 and this is {have}: install one and"):
        environment.check_python()


def test_a_full_disk_is_told_how_much_is_missing(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage(10e9, 9e9, 1.25e9))
    with pytest.raises(environment.SetupError, match=r"need 4 GB of disk and 1.2 GB are free: make room"):
        environment.check_disk()


def copy_of_the_project(folder: Path) -> Path:
    for name in ("pyproject.toml", "requirements.lock", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "environment.py", folder / "tools")
    return folder


def set_up(folder: Path, **extra: str) -> subprocess.CompletedProcess:
    command = [sys._base_executable, "tools/environment.py"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **extra}, capture_output=True, text=True, timeout=300)


def test_without_a_network_one_sentence_says_so_and_nothing_looks_finished(tmp_path):
    folder = copy_of_the_project(tmp_path)
    (folder / "requirements.lock").write_text("a-package-that-no-disk-has==1.0\n")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    result = set_up(folder, **nowhere, PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "The package index cannot be reached: connect to the network and run the command again." in result.stderr
    assert not (folder / ".venv" / "made-from").exists()


def test_without_a_python_make_says_which_ones_it_needs(tmp_path):
    folder = copy_of_the_project(tmp_path)
    tools = folder / "bin"
    tools.mkdir()
    for name in ("make", "sh", "echo"):
        (tools / name).symlink_to(shutil.which(name))
    result = subprocess.run(["make", "setup"], cwd=folder, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "The course needs Python 3.11, 3.12 or 3.13 and none was found" in result.stderr


def test_an_up_to_date_environment_is_left_alone_and_a_changed_lock_is_noticed(tmp_path, monkeypatch):
    folder = copy_of_the_project(tmp_path)
    made = []
    for name, value in {"ROOT": folder, "VENV": folder / ".venv", "STAMP": folder / "made-from"}.items():
        monkeypatch.setattr(environment, name, value)
    monkeypatch.setattr(
        environment, "make", lambda: made.append(1) or environment.STAMP.write_text(environment.wanted())
    )
    assert [environment.main(), environment.main()] == [0, 0]
    assert len(made) == 1
    (folder / "requirements.lock").write_text("torch==2.13.0\n")
    assert environment.main() == 0
    assert len(made) == 2
