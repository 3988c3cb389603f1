"""A file appears whole or not at all."""

import os

import pytest

from bigmodel_course.files import write_whole


@pytest.mark.verifies(
    "files.write_whole",
    kind="recovery",
    against="the file as it was",
    on="a disk that fails while the bytes are flushed, and while the name is given",
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_bytes_take_the_place_of_the_old(tmp_path):
    for content in (b"first", b""):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
