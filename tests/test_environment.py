"""One set of pinned packages, said three times and held together; and what setting up says when it cannot go on."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tools import environment

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(path: str) -> list[Requirement]:
    lines = [line.partition(" #")[0].strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


LOCK = requirements("requirements.lock")
CLUSTER_LOCK = requirements("requirements-cluster.lock")
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(python: str, lock: list[Requirement] = LOCK) -> dict[str, str]:
    """A lock's versions for a Python of this system."""
    here = {**default_environment(), "python_version": python, "python_full_version": f"{python}.9"}
    active = [line for line in lock if line.marker is None or line.marker.evaluate(here)]
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in active}


def direct() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_direct_dependency_for_every_python(python):
    versions = pinned(python)
    for requirement in direct():
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_rays_lock_pins_what_it_is_made_from_and_the_same_runtime_as_the_courses_without_torch(python):
    versions, ours = pinned(python, CLUSTER_LOCK), pinned(python)
    for requirement in requirements("clusters/requirements.in"):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    assert {name: versions[name] for name in ("numpy", "onnxruntime")} == {
        name: ours[name] for name in ("numpy", "onnxruntime")
    }
    assert "torch" not in versions


def test_the_locks_pin_exactly_and_name_no_index():
    for line in LOCK + CLUSTER_LOCK:
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
    monkeypatch.setattr(environment, "sys", SimpleNamespace(version_info=version))
    have = ".".join(map(str, version))
    with pytest.raises(environment.SetupError, match=rf"needs Python 3.11 to 3.13 and this is {have}: install one and"):
        environment.check_python()


def test_a_full_disk_is_told_how_much_is_missing(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage(10e9, 9e9, 1.25e9))
    with pytest.raises(environment.SetupError, match=r"need 4 GB of disk and 1.2 GB are free: make room"):
        environment.check_disk(environment.ENVIRONMENTS["course"])
    environment.check_disk(environment.ENVIRONMENTS["cluster"])


def copy_of_the_project(folder: Path) -> Path:
    for name in ("pyproject.toml", "requirements.lock", "requirements-cluster.lock", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "environment.py", folder / "tools")
    return folder


def set_up(folder: Path, *names: str, **extra: str) -> subprocess.CompletedProcess:
    command = [sys._base_executable, "tools/environment.py", *names]
    return subprocess.run(command, cwd=folder, env={**os.environ, **extra}, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("name", environment.ENVIRONMENTS)
def test_without_a_network_one_sentence_says_so_and_nothing_looks_finished(tmp_path, name):
    folder, made = copy_of_the_project(tmp_path), environment.ENVIRONMENTS[name]
    (folder / made.lock).write_text("a-package-that-no-disk-has==1.0\n")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    nowhere |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    result = set_up(folder, name, **nowhere)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "The package index cannot be reached: connect to the network and run the command again." in result.stderr
    assert (folder / made.folder).is_dir()
    assert not (folder / made.folder / "made-from").exists()


def test_without_a_python_make_says_which_ones_it_needs(tmp_path):
    folder = copy_of_the_project(tmp_path)
    tools = folder / "bin"
    tools.mkdir()
    for name in ("make", "sh", "echo"):
        (tools / name).symlink_to(shutil.which(name))
    result = subprocess.run(["make", "setup"], cwd=folder, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "The course needs Python 3.11, 3.12 or 3.13 and none was found" in result.stderr


@pytest.mark.parametrize("name", environment.ENVIRONMENTS)
def test_an_up_to_date_environment_is_left_alone_and_a_changed_lock_is_noticed(tmp_path, monkeypatch, name):
    folder, made = copy_of_the_project(tmp_path), []

    def make(wanted: environment.Environment) -> None:
        made.append(wanted.folder)
        wanted.path.mkdir(exist_ok=True)
        wanted.stamp.write_text(wanted.wanted())

    monkeypatch.setattr(environment, "ROOT", folder)
    monkeypatch.setattr(environment, "make", make)
    kind = environment.ENVIRONMENTS[name]
    assert [environment.main(name), environment.main(name)] == [0, 0]
    assert made == [kind.folder]
    (folder / kind.lock).write_text("torch==2.13.0\n")
    assert environment.main(name) == 0
    assert made == [kind.folder] * 2


def test_the_targets_that_start_ray_set_its_environment_up_first():
    rules = dict(re.findall(r"^(\w[\w-]*):([^#\n]*)", (ROOT / "Makefile").read_text(), re.M))
    for target in ("test", "unit", "nbval", "lessons", "verification"):
        assert "serve-cluster" in rules[target].split(), target
