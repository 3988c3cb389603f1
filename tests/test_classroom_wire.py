"""Messages carry data and nothing else."""

import json

import numpy as np
import pytest
import torch

from bigmodel_course.checks import first_difference
from bigmodel_course.classroom.wire import pack, unpack

VALUES = [
    *(
        None,
        True,
        3,
        2**80,
        0.1,
        float("inf"),
        "ü\n",
        b"\0\xff",
        [],
        (),
        {},
        {"dict": []},
        [1, (2, [3])],
        {1: 2, "1": 3},
    ),
    *(np.arange(6).reshape(2, 3).T, np.float64(1.5), np.array(["no"])[:0].astype(float)),
    *(
        torch.arange(6.0).view(3, 2).T,
        torch.tensor(7),
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.tensor([True]),
    ),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.verifies(
    "classroom.wire.pack", "classroom.wire.unpack", kind="invariant", against="the value sent",
    on="numbers, text, bytes, tensors, arrays, and lists, tuples and dicts of them", bound=0.0,
)  # fmt: skip
def test_what_is_sent_comes_out_the_same(value, seen):
    back = unpack(pack(value))
    assert first_difference(back, value, 0.0) is None
    if isinstance(value, torch.Tensor):
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        seen((back.double() - value.double()).abs().sum())
    else:
        assert type(back) is type(value) or isinstance(value, np.generic)
        seen(0.0)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.nn.Linear(1, 1), np.array([object()]), np.array(["a"]), int])
def test_what_is_no_data_is_refused(value):
    with pytest.raises(TypeError, match="value must be made of"):
        pack(value)


def test_a_function_stays_where_it_is():
    kept = []
    message = pack([1, len], lambda thing: kept.append(thing) or 0)
    assert kept == [len]
    assert unpack(message, lambda kind, number: (kind, number)) == [1, ("function", 0)]


@pytest.mark.parametrize(
    "message",
    [b"", b"\x80\x04", b"{}", b'{"a": 1, "b": 2}', b'{"tensor": "AAAA"}', b'{"pickle": "x"}', b'{"function": 0}',
     b'{"bytes": 5}', b'{"dict": [1]}', b'{"dict": [[{"list": []}, 1]]}', b"[" * 100_000],
    ids=range(11),
)  # fmt: skip
def test_a_broken_or_hostile_message_is_one_clear_error(message):
    with pytest.raises(ValueError, match="message must hold packed data"):
        unpack(message)


def test_a_message_is_plain_json():
    assert json.loads(pack({"a": (1, 2.5)})) == {"dict": [["a", {"tuple": [1, 2.5]}]]}
