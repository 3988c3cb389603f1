"""The passport keeps one row a treatment and rewrites nothing that has not changed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bigmodel_course.passport import Stamp, read, stamp

DENSE = Stamp("dense", parameters=9610, bytes_on_disk=38_600, flops=18_944, accuracy=0.975)


@pytest.mark.verifies(
    "passport.stamp", "passport.read", kind="invariant", against="the rows written", on="write, read, write again"
)
def test_rows_come_back_in_order_and_the_same_row_changes_nothing(tmp_path):
    path = tmp_path / "passport.json"
    assert read(path) == []
    stamp(DENSE, path)
    pruned = replace(DENSE, treatment="pruned", latency=0.5)
    assert stamp(pruned, path) == [DENSE, pruned] == read(path)
    before = path.stat().st_mtime_ns
    stamp(replace(pruned, latency=0.6, accuracy=0.9751), path)
    assert path.stat().st_mtime_ns == before
    stamp(replace(pruned, parameters=5), path)
    assert read(path)[1].parameters == 5


def test_lessons_side_by_side_lose_no_row(tmp_path):
    rows = [replace(DENSE, treatment=f"treatment {i}") for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: stamp(row, tmp_path / "passport.json"), rows))
    assert {row.treatment for row in read(tmp_path / "passport.json")} == {row.treatment for row in rows}


@pytest.mark.verifies(
    "passport.Stamp", kind="message", against="the argument's name in the message", on="wrong rows and files"
)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parameters", 1.5, "parameters must be a whole number, 0 or more, got 1.5"),
        ("flops", -1, "flops must be a whole number"),
        ("accuracy", 97.5, "accuracy must be a share from 0 to 1, got 97.5"),
        ("latency", 0.0, "latency must be above 0"),
    ],
)
def test_a_wrong_row_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(DENSE, **{field: value})


@pytest.mark.parametrize("text", ["", "[", "{}", '[{"treatment": "dense"}]', "[1]", "null"])
def test_a_file_that_is_no_passport_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "passport.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must hold a passport.*run lesson 16"):
        stamp(DENSE, path)
    assert path.read_text() == text
