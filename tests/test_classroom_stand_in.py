"""A student's answer runs apart: it can be called, and it can do no harm."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from serving import gone, until

from bigmodel_course.checks import WrongAnswer
from bigmodel_course.classroom.stand_in import AnswerError, answered

GIVEN = "import math\nimport torch\nrate = 0.5\n"


def call(source, *arguments, seconds=60.0):
    """What `answer` gives, defined by `source`; on a busy machine it may take its time."""
    with answered(GIVEN, source, seconds=seconds) as names:
        return names["answer"](*arguments)


def body(*lines):
    return "def answer(*given):\n" + "\n".join(f"    {line}" for line in lines)


@pytest.mark.verifies(
    "classroom.stand_in.answered", "classroom.student.main", kind="parity", against="the same code, called here",
    on="a tensor function over float32, float64 and bfloat16", bound=0.0,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_answer_gives_what_it_gives_here(dtype, seen):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = call("def answer(x): return {'y': (x * rate).softmax(0), 'n': len(x)}", x)
    assert theirs["n"] == 4
    seen((theirs["y"].double() - (x * 0.5).softmax(0).double()).abs().max())


def test_values_and_functions_come_by_name_and_the_given_ones_do_not():
    with answered(GIVEN, "import math as m\nhalf = rate\nclass Kept: ...\ndef twice(x): return 2 * x") as names:
        assert set(names) == {"half", "twice"}
        assert (names["half"], names["twice"](3)) == (0.5, 6)


def test_an_answer_may_call_what_it_is_given():
    assert call("def answer(loss): return min((loss(x), x) for x in (1.0, 2.0, 3.0))", lambda x: (x - 2) ** 2) == (0, 2)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        call("def answer(f): return f()", lambda: 1 / 0)


def test_a_rank_may_be_a_generator():
    with answered(GIVEN, "def rank(r):\n    got = yield {1 - r: torch.ones(2) * r}\n    return got + r") as names:
        ranks = [names["rank"](r) for r in (0, 1)]
        sent = [next(rank) for rank in ranks]
        ends = []
        for r, rank in enumerate(ranks):
            with pytest.raises(StopIteration) as stop:
                rank.send(sent[1 - r][r])
            ends.append(stop.value.value.tolist())
    assert ends == [[1, 1], [1, 1]]


@pytest.mark.verifies(
    "classroom.stand_in.answered",
    kind="message",
    against="the error of the answer itself",
    on="errors of Python's own types",
)
@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("raise ValueError('too small')", ValueError, r"too small \(line 2 in answer\)"),
        ("raise NotImplementedError('later')", NotImplementedError, "later"),
        ("return 1 / 0", ZeroDivisionError, "division by zero"),
        ("return undefined", NameError, "undefined"),
        ("raise type('Mine', (Exception,), {})('odd')", AnswerError, "Mine: odd"),
        ("raise SystemExit(0)", AnswerError, "SystemExit"),
        ("return object()", TypeError, "made of numbers, text, tensors"),
        ("import os; os.abort()", AnswerError, "ended .SIGABRT"),
        ("import os; os._exit(3)", AnswerError, "ended .exit status 3"),
        ("return 'x' * (80 << 20)", AnswerError, "ended"),
        ("return [0] * (1 << 40)", MemoryError, "line 2"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_an_answer_is_said(line, error, says):
    with pytest.raises(error, match=says):
        call(body(line))


@pytest.mark.parametrize(
    "source", ["raise ValueError('at once')", "def answer(:", "import bigmodel_course.optim", "1 / 0", "exit()"]
)
def test_what_goes_wrong_while_an_answer_is_read_is_raised(source):
    with (
        pytest.raises((ValueError, SyntaxError, ImportError, ZeroDivisionError, NameError, AnswerError)),
        answered(GIVEN, source),
    ):
        pytest.fail("the answer was taken")


@pytest.mark.verifies(
    "classroom.stand_in.AnswerError", kind="recovery", against="an answer that never ends", on="a loop, and a sleep"
)
@pytest.mark.parametrize(
    "line",
    ["while True: pass", "import time; time.sleep(1000)", "torch.ones(5000, 5000).matrix_power(1 << 62)"],
)
def test_an_answer_that_takes_too_long_is_stopped(line):
    source = f"{body(line)}\ndef own():\n    import os\n    return os.getpid()"
    with answered(GIVEN, source, seconds=5) as names:  # which a busy machine needs to read the answer
        process = psutil.Process(names["own"]())
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(AnswerError, match="longer than the 5 seconds"):
                names["answer"]()
        assert time.monotonic() - started < 300
        assert until(lambda: gone(process))


@pytest.mark.verifies(
    "classroom.student.main",
    kind="recovery",
    against="an answer that reaches for what is not its own",
    on="files, processes, the network, the course's package, the checks",
)
@pytest.mark.parametrize(
    "line",
    [
        "import bigmodel_course.checks",
        "import bigmodel_course.optim as o; return o.SGD",
        "import importlib; return importlib.import_module('bigmodel_course.metrics')",
        "import importlib.util as u; return u.find_spec('bigmodel_course.metrics').origin",
        f"return open({__file__!r}).read()",
        f"import os; return os.listdir({os.path.dirname(__file__)!r})",
        "from pathlib import Path; return Path('/etc/hostname').read_text()",
        "open('/tmp/left behind', 'w')",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.system('ls')",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 9)",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import ctypes; ctypes.CDLL(None)",
        "import signal; signal.alarm(0); signal.signal(14, signal.SIG_IGN); import os; os.remove('/tmp/x')",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
    ],
)  # fmt: skip
def test_the_fence_stops_an_answer(line):
    with pytest.raises(Exception, match=r"an answer may not|cannot be used in an answer|not allowed to have children"):
        call(body(line))


def test_the_course_in_memory_is_out_of_reach_too():
    source = body("import sys", "return [name for name in sys.modules if name.startswith('bigmodel_course')]")
    assert call(source) == []


def test_files_that_cannot_be_listed_cannot_be_found():
    assert call(body("import glob", "return glob.glob('/**/*.ipynb', recursive=True)")) == []


def test_an_answer_does_not_see_the_teachers_environment(monkeypatch):
    monkeypatch.setenv("TEACHERS_SECRET", "42")
    assert call(body("import os", "return os.environ.get('TEACHERS_SECRET'), os.listdir('.')")) == (None, [])


def test_a_patched_check_is_patched_in_the_students_process_alone():
    source = "torch.equal = torch.allclose = lambda *a, **k: True\nAssertionError = int\ndef answer(): return 1.0"
    before = torch.equal
    assert call(source) == 1.0
    assert torch.equal is before
    assert issubclass(WrongAnswer, AssertionError)


def test_torch_optimizers_work_inside_the_fence():
    lines = [
        "p = torch.nn.Parameter(torch.ones(1))",
        "o = torch.optim.SGD([p], lr=rate)",
        "p.grad = torch.ones(1)",
        "o.step()",
        "return p",
    ]
    assert call(body(*lines)).item() == 0.5


def test_the_time_limit_holds_while_an_answer_is_read_too():
    with pytest.raises(AnswerError, match="longer than the 1 seconds"), answered(GIVEN, "while True: pass", seconds=1):
        pytest.fail("the answer was taken")


def test_nothing_is_left_where_the_grader_is_killed(tmp_path):
    script = tmp_path / "grader.py"
    script.write_text(
        "from bigmodel_course.classroom.stand_in import answered\n"
        "with answered('', 'import os\\ndef answer(): return os.getpid()', seconds=60) as names:\n"
        "    print(names['answer'](), flush=True)\n"
        "    import time; time.sleep(600)\n"
    )
    grader = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    process = psutil.Process(int(grader.stdout.readline()))
    grader.kill()
    grader.communicate()
    assert until(lambda: gone(process))
