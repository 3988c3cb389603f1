"""What was computed once is read the next time, and nothing that goes wrong with the file is the caller's trouble."""

import pytest
import torch

from bigmodel_course.cache import kept


@pytest.fixture
def make():
    """Something to compute that counts how often it is."""

    def compute():
        compute.times += 1
        return {"x": torch.tensor([1.5, compute.times])}

    compute.times = 0
    return compute


@pytest.mark.verifies("cache.kept", kind="invariant", against="the first result", on="two calls", bound=0.0)
def test_the_second_call_reads_what_the_first_made(make, tmp_path, seen):
    first, second = (kept("numbers", "key", make, folder=tmp_path) for _ in range(2))
    assert make.times == 1
    seen((first["x"] - second["x"]).abs().max())
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_another_name_and_another_key_are_other_files(make, tmp_path):
    for name, key in (("a", "1"), ("a", "2"), ("b", "1")):
        kept(name, key, make, folder=tmp_path)
    assert make.times == 3


@pytest.mark.verifies("cache.kept", kind="recovery", against="the result made anew", on="a damaged file, no folder")
def test_a_damaged_file_is_made_anew(make, tmp_path):
    kept("numbers", "key", make, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert kept("numbers", "key", make, folder=tmp_path)["x"][1] == 2
    assert kept("numbers", "key", make, folder=tmp_path)["x"][1] == 2


def test_where_nothing_can_be_written_it_is_made_each_time(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "file"))
    for times in (1, 2):
        assert kept("numbers", "key", make)["x"][1] == times
