"""A model file at work: sessions of onnxruntime, and latencies that can be compared.

session = open_session("digits.onnx")           checked, optimised, one thread
scores, = session.run(pictures)                 arrays in, arrays out
percentiles({"torch": f, "onnxruntime": g})     the rivals in turn, in one run
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

from bigmodel_course.deployment.export import metadata_of, read

__all__ = ["LEVELS", "Bound", "Kernel", "Latency", "Session", "kernels", "open_session", "percentile", "percentiles"]

_Level = onnxruntime.GraphOptimizationLevel
LEVELS = {  # how far a session may rewrite the graph before it runs it; each does what those before it do
    "off": _Level.ORT_DISABLE_ALL,
    "basic": _Level.ORT_ENABLE_BASIC,  # constants folded, nodes without effect dropped
    "extended": _Level.ORT_ENABLE_EXTENDED,  # nodes fused into kernels of this runtime
    "all": _Level.ORT_ENABLE_ALL,  # and the memory layout that suits this processor
}
DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}


class Session:
    """A model that is loaded and ready, made by `open_session`; it may be called from several threads at once."""

    def __init__(self, inner: onnxruntime.InferenceSession, metadata: Mapping[str, str]):
        self._inner = inner
        self.metadata = dict(metadata)
        self.inputs = {value.name: (DTYPES.get(value.type), value.shape) for value in inner.get_inputs()}
        self.outputs = [value.name for value in inner.get_outputs()]

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The model's outputs for its inputs, in the order of the file; ValueError where it cannot take them."""
        try:
            return self._inner.run(None, named := self._named(arrays))
        except (TypeError, ValueError):
            raise
        except Exception as error:  # onnxruntime has a dozen kinds, none of them public
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in named.items())
            raise ValueError(f"the model cannot run on {shapes}: {_sentence(error)}") from error

    def bind(self, *arrays: np.ndarray) -> "Bound":
        """One call at these shapes whose inputs and outputs keep their places in memory."""
        return Bound(self._inner, self._named(arrays))

    def _named(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        if len(arrays) != len(self.inputs):
            raise ValueError(f"need one array for each of {', '.join(self.inputs)}, got {len(arrays)}")
        for array, (name, (dtype, shape)) in zip(arrays, self.inputs.items(), strict=True):
            if not isinstance(array, np.ndarray) or (dtype and array.dtype != dtype):
                kind = getattr(array, "dtype", type(array).__name__)
                raise TypeError(f"{name} must be a NumPy array of {np.dtype(dtype)}, got {kind}")
            fixed = [(size, want) for size, want in zip(array.shape, shape, strict=False) if isinstance(want, int)]
            if array.ndim != len(shape) or any(size != want for size, want in fixed):
                raise ValueError(f"{name} must have shape {shape}, got {list(array.shape)}")
        return dict(zip(self.inputs, arrays, strict=True))


class Bound:
    """A call that allocates nothing: write into `inputs`, call, read `outputs`.

    The arrays are the same at every call.  On a CPU that saves an allocation; on a GPU, where inputs and outputs can
    stay in its memory, it saves the copies.  One thread at a time.
    """

    def __init__(self, inner: onnxruntime.InferenceSession, named: Mapping[str, np.ndarray]):
        self._inner, self._binding = inner, inner.io_binding()
        self.inputs = [np.array(array, order="C") for array in named.values()]
        self.outputs = [np.ascontiguousarray(array) for array in inner.run(None, dict(named))]
        for name, array in zip(named, self.inputs, strict=True):
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for value, array in zip(inner.get_outputs(), self.outputs, strict=True):
            self._binding.bind_output(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self) -> list[np.ndarray]:
        """`outputs`, which now hold the results for what stands in `inputs`."""
        self._inner.run_with_iobinding(self._binding)
        return self.outputs


def open_session(path: str | Path, *, threads: int = 1, level: str = "all") -> Session:
    """Load a model file that `export.read` accepts; what was checked is what runs.

    `threads` work on one call; `level` is one of LEVELS.  ValueError where the file or an option is refused.
    """
    model = read(path)
    return Session(_loaded(model.SerializeToString(), _options(threads, level), path), metadata_of(model))


@dataclass(frozen=True)
class Kernel:
    """An operator as it really ran: how many times in one call, and how many seconds all of them took."""

    operator: str
    calls: int
    seconds: float


def kernels(path: str | Path, *arrays: np.ndarray, level: str = "all", calls: int = 9) -> list[Kernel]:
    """What one call spends its time on after the graph was optimised, the dearest first: onnxruntime's own profile.

    Seconds are the median of `calls` calls, after one that is not counted, on one thread.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    model = read(path)
    with tempfile.TemporaryDirectory() as folder:
        options = _options(1, level)
        options.enable_profiling, options.profile_file_prefix = True, os.path.join(folder, "profile")
        session = Session(inner := _loaded(model.SerializeToString(), options, path), metadata_of(model))
        for _ in range(calls + 1):
            session.run(*arrays)
        events = json.loads(Path(inner.end_profiling()).read_text())
    ran = [event for event in events if event["name"].endswith("_kernel_time")]
    each = len(ran) // (calls + 1)
    found: dict[str, list[list[float]]] = {}
    for place, event in enumerate(ran[each:]):
        times = found.setdefault(event["args"]["op_name"], [[] for _ in range(calls)])
        times[place // each].append(event["dur"] / 1e6)
    rows = [Kernel(name, len(times[0]), median(map(math.fsum, times))) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


@dataclass(frozen=True)
class Latency:
    """The seconds of many calls, in the order in which they were made."""

    seconds: tuple[float, ...]

    def __getitem__(self, percent: float) -> float:
        """latency[99] is the 99th percentile."""
        return percentile(self.seconds, percent)

    @property
    def mean(self) -> float:
        """The average, which one slow call can move as far as it likes."""
        return math.fsum(self.seconds) / len(self.seconds)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` % of them do not exceed (nearest rank)."""
    if not 0 < percent <= 100 or not len(values):
        raise ValueError(f"need values and 0 < percent <= 100, got {len(values)} values and {percent=}")
    return sorted(values)[math.ceil(percent * len(values) / 100) - 1]


def percentiles(
    rivals: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    streak: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Each rival's latency, `rounds` x `streak` calls one by one, all in one run.

    A round gives every rival a streak in turn, and each round starts with another one: what the machine does besides
    then falls on all of them.  A streak starts with one call that is not counted, which finds the caches full of the
    others' weights.  With `clock=time.process_time` only this process's own work counts.
    """
    if rounds < 1 or streak < 1 or not rivals:
        raise ValueError(f"need rivals, rounds >= 1 and streak >= 1, got {len(rivals)} rivals, {rounds=}, {streak=}")
    names, seconds = list(rivals), {name: [] for name in rivals}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call = rivals[name]
            call()
            for _ in range(streak):
                start = clock()
                call()
                seconds[name].append(clock() - start)
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def _options(threads: int, level: str) -> onnxruntime.SessionOptions:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # who waits leaves the core to others
    options.log_severity_level = 3  # errors, not warnings
    return options


def _loaded(model: bytes, options: onnxruntime.SessionOptions, path: str | Path) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as in `Session.run`
        raise ValueError(f"onnxruntime refuses {Path(path).name}: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
