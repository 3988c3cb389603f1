"""Odd and dishonest answers: each loses its points with a sentence, stops nobody else, and leaves no process behind."""

import copy
import ctypes
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from traitlets.config import Config

from bigmodel_course.classroom.grading import PutBack, mark
from bigmodel_course.classroom.sets import read
from tools.release_sets import ASSIGNMENTS, sources

SETS = {path.stem: read(path) for path in sources()}
RIGHT = "return -lr * v, (1 - mu) * v, lr / (1 - mu)"
TO_THE_LINK = "f = sys._getframe(); link = f.f_back.f_back.f_locals['self'].link"
THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()\n"
SUBCLASS = "type('T', (torch.Tensor,), {'__eq__': lambda *a: True})"
SENDS_BADLY = (
    f"import os, sys, time; {TO_THE_LINK}; os.write(link.fileno(), bytes([0, 0, 39, 16, 65])); time.sleep(999)"
)


def problem(name):
    """A problem of any set, and its set."""
    return next((held, problem) for held in SETS.values() for problem in held.problems if problem.name == name)


def marked(name, answer, **change):
    held, asked = problem(name)
    [output] = mark(held, replace(asked, **change), answer)
    return output.get("text") or "\n".join(output.traceback), output.output_type == "stream"


def moved(*lines):
    return "def moved_run(v, lr, mu):\n" + "\n".join(f"    {line}" for line in lines)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(f"import functools\ndef f(v, lr, mu): {RIGHT}\nmoved_run = functools.partial(f)", id="partial"),
        pytest.param(f"class F:\n    def __call__(self, v, lr, mu): {RIGHT}\nmoved_run = F()", id="callable object"),
        pytest.param(moved(RIGHT).replace("\n", "\r\n"), id="lines that end as on Windows"),
        pytest.param("print('x' * 10**7)\n" + moved(RIGHT), id="a flood of output"),
        pytest.param(THREAD + moved(RIGHT), id="a thread left running"),
        pytest.param("import atexit, time\natexit.register(time.sleep, 999)\n" + moved(RIGHT), id="atexit"),
        pytest.param("import os\nos.closerange(0, 3)\n" + moved(RIGHT), id="closed streams"),
    ],
)  # fmt: skip
def test_a_right_answer_in_an_odd_form_scores(answer):
    said, right = marked("moved_run", answer)
    assert right, said


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([f"return torch.empty(0).as_subclass({SUBCLASS}), v, lr"], "shape"),
        (["return type('L', (), {'__array__': lambda *a: v.numpy(), '__eq__': lambda *a: True})(), v, lr"], "made of"),
        (["return v * math.nan, v * math.nan, math.nan"], "nan"),
        (["return math.inf, math.inf, math.inf"], "the shape is"),
        (["return v + 1j, v, lr"], "values differ|made of"),
        (["return None"], "NoneType|not attempted"),
        (["x = []", "x.append(x)", "return x, v, lr"], "recursion"),
        (["return moved_run(v, lr, mu)"], "recursion"),
        (["return 'x' * (9 << 20), v, lr"], "more than 8 MiB"),
        (["yield 1"], "unpack|Generator"),
        (["raise ExceptionGroup('two', [ValueError(1)])"], "ExceptionGroup"),
        (["raise StopIteration(1)"], "StopIteration"),
        (["import sys", "return [m for m in sys.modules.values() if 'from_torch' in vars(m)][0]"], "IndexError|index"),
        (["import gc", "return [o for o in gc.get_objects() if type(o).__name__ == 'Exercise'][0]"], "index"),
        (["import sys", "return [f.f_globals['from_torch'] for f in [sys._getframe(3)]]"], "from_torch"),
        (["import os", "torch.from_file(f'/proc/{os.getppid()}/cwd/x', size=1)"], "may not open files"),
        (["import sqlite3", "sqlite3.connect('x')"], "may not use sqlite3"),
        (["import _posixsubprocess as p", "p.fork_exec()"], "may not .* start programs"),
        (["import zmq"], "Python's own library, NumPy and torch"),
        (["from sklearn.neighbors import NearestCentroid"], "Python's own library, NumPy and torch"),
        (["r = -lr * v, (1 - mu) * v, lr / (1 - mu)", "v.zero_()", "return r"], "changes its arguments"),
    ],
)  # fmt: skip
def test_a_wrong_or_dishonest_answer_is_told_why(lines, says):
    said, right = marked("moved_run", moved(*lines), test=problem("moved_run")[1].test)
    assert not right
    assert re.search(says, said), said


@pytest.mark.parametrize(
    "answer",
    ["# My answer\nIt is **u**.", "%matplotlib inline\n" + moved(RIGHT), "x = '\0'", "raise StopIteration",
     "import os; os._exit(0)", "rate = batch = 10**400", "moved_run = 3", "class moved_run: ...", "#" + "z" * 200_000],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_answer_gets_a_sentence(answer):
    said, right = marked("moved_run", answer)
    assert not right
    assert said.strip()


@pytest.mark.parametrize(
    "line", [SENDS_BADLY, "import sys, time; " + TO_THE_LINK + "; link.send_bytes(b'7'); time.sleep(999)"]
)
def test_half_a_message_stops_nobody(line):
    started = time.monotonic()
    said, right = marked("moved_run", moved(f"{line}"), seconds=2)
    assert not right, said
    assert time.monotonic() - started < 120
    assert marked("moved_run", moved(RIGHT))[1]  # the server from which the next answer's process comes is alive


@pytest.mark.skipif(
    sys.platform != "linux" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 1, reason="this kernel has no Landlock"
)
def test_the_kernel_refuses_what_no_hook_hears_of(tmp_path):
    (tmp_path / "tests").write_text("hidden")
    read_it = f"torch._C._VariableFunctions.from_file({str(tmp_path / 'tests')!r}, size=6, dtype=torch.uint8)"
    said, _ = marked("moved_run", moved(f"raise ValueError(bytes({read_it}.tolist()))"))
    assert "Permission denied" in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("weighted_gradient", "def weighted_gradient(*a):\n    x.backward()", "without backward"),
        ("weighted_gradient", "from torch.func import grad", "without func"),
        ("weighted_gradient", "x = torch.zeros(1, requires_grad=True)", "without requires_grad"),
        ("adamax", "def adamax(p, *a):\n    return torch.optim.Adamax([p])", "without Adamax"),
    ],
)
def test_the_library_function_that_is_the_answer_is_refused(name, answer, says):
    said, right = marked(name, answer)
    assert not right
    assert says in said


@pytest.mark.parametrize("name", SETS)
def test_a_set_computes_for_less_than_a_minute_even_if_no_answer_ever_ends(name):
    assert sum(problem.seconds for problem in SETS[name].problems) <= 50


def test_no_process_is_left_behind():
    marked("moved_run", moved(RIGHT))  # starts the server from which the processes come
    before = psutil.Process().children(recursive=True)
    marked("moved_run", THREAD + moved(RIGHT))
    assert psutil.Process().children(recursive=True) == before


def test_an_answer_runs_in_a_folder_of_its_own():
    said, _ = marked("moved_run", moved("import os; raise ValueError(os.getcwd())"))
    assert str(Path.cwd()) not in said


def handed_in(change):
    """Set 1 with a right answer everywhere, changed by the student, as the grader sees it: each name's source."""
    name = "1_optimize"
    path = ASSIGNMENTS / "release" / name / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    config = Config(CourseDirectory={"root": str(ASSIGNMENTS)})
    names = {"nbgrader": {"assignment": name, "notebook": name}}
    notebook, _ = PutBack(config=config).preprocess(notebook, names)
    marks = nbformat.read(ASSIGNMENTS / "source" / name / f"{name}.ipynb", as_version=4).cells
    assert {c.metadata.nbgrader.grade_id: c.metadata.nbgrader for c in notebook.cells if "nbgrader" in c.metadata} == {
        c.metadata.nbgrader.grade_id: c.metadata.nbgrader for c in marks
    }
    return {c.metadata.nbgrader.grade_id: c.source for c in notebook.cells if "nbgrader" in c.metadata}


def named(notebook, name):
    return next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == name)


def split(notebook):
    cell = named(notebook, "moved_run")
    place = notebook.cells.index(cell)
    cell.source = "def moved_run(v, lr, mu):"
    notebook.cells.insert(place + 1, copy.deepcopy(cell))
    notebook.cells[place + 1].update(id="another", source="    return v, v, lr")


def lose_the_marks(notebook):
    named(notebook, "moved_run").source = "x = 1"
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)


def make_it_another(notebook):
    named(notebook, "test_moved_run").metadata.nbgrader.update(grade=False, solution=True, locked=False, points=99)
    named(notebook, "moved_run").metadata.nbgrader.grade_id = "no such problem"


def delete_it(notebook):
    notebook.cells = [cell for cell in notebook.cells if "moved_run" not in cell.metadata.nbgrader.grade_id]


@pytest.mark.verifies(
    "classroom.grading.PutBack", kind="recovery", against="the set's own cells and marks",
    on="cells that were split, deleted, renamed, or lost their marks",
)  # fmt: skip
@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (split, "def moved_run(v, lr, mu):\n\n    return v, v, lr"),
        (lose_the_marks, "x = 1"),
        (make_it_another, ""),
        (delete_it, ""),
        (lambda notebook: notebook.cells.clear(), ""),
        (lambda notebook: notebook.cells.reverse(), None),
    ],
)
def test_a_damaged_notebook_costs_at_most_its_own_problem(change, answer):
    sources_by_name = handed_in(change)
    assert answer is None or sources_by_name["moved_run"] == answer
