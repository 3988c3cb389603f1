"""Ranks are real processes: they answer in order, and whatever ends one of them is told in one error that names it."""

import ctypes
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from hosts import end_all, shown_by, torchrun_on

from bigmodel_course import forkserver as starter
from bigmodel_course.distributed import processes
from bigmodel_course.distributed.launch import RankError, device, launch

PATIENCE = 240.0  # seconds: a busy machine is not a fault


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Starts the server, which stays; what is measured afterwards must come back to this."""
    launch(dist.get_rank, 1, timeout=PATIENCE)


@pytest.fixture(autouse=True)
def nothing_left(warm, monkeypatch):
    """After every test: no process, open file, thread, socket or shared memory more than before.

    Other tests of this process may have left some that go away meanwhile, and those of other processes make shared
    memory of their own: only what is new is a fault, and only what belongs to this process and its ranks.
    """
    ours, start = {os.getpid()}, starter.start

    def noted(process):
        start(process)
        ours.add(process.pid)

    monkeypatch.setattr(starter, "start", noted)
    before = held(ours)
    yield
    deadline = time.monotonic() + 30
    while (more := held(ours) - before) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel may still be closing what was killed
    assert not more


def held(ours: set[int]) -> Counter:
    """What this process holds, and the shared memory that it or a rank of it made: `ours` are their numbers."""
    gc.collect()
    me = psutil.Process()
    kept = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    found = Counter({"open files": me.num_fds(), "threads": me.num_threads()})
    found.update(child for child in me.children(recursive=True) if child.pid not in kept)
    found.update(f"socket {c.laddr}" for c in me.net_connections(kind="inet"))
    found.update(f"shared memory {name}" for name in shared_memory(ours))
    return found


def shared_memory(ours: set[int]) -> set[str]:
    """What this process has in its memory, and what torch named after one of `ours`, which may be dead."""
    if not Path("/dev/shm").exists():
        return set()
    named = {path.name for path in Path("/dev/shm").iterdir() if any(f"_{pid}_" in path.name for pid in ours)}
    return named | set(re.findall(r" /dev/shm/(.*)", Path("/proc/self/maps").read_text()))


@pytest.fixture
def all_are_heard(monkeypatch):
    """Where every rank reports an error, wait for all of them: on a busy machine they come one after the other."""
    for name in ("LINGER", "ECHO"):
        monkeypatch.setattr(f"bigmodel_course.distributed.launch.{name}", PATIENCE)


@pytest.fixture
def marked(monkeypatch, tmp_path):
    """`marked(body)` for ranks that hang: their time is not over before each of them has come to where it does."""
    listen = processes.listen

    def until_all_hang(ranks, deadline, *, until):
        listen(ranks, deadline, until=until)
        end = time.monotonic() + PATIENCE
        while not until() and time.monotonic() < end:
            there = all(each.report or hangs(each.process.pid, tmp_path / f"mark{each.number}") for each in ranks)
            listen(ranks, time.monotonic() + 0.2, until=until)  # once more: a rank may have returned meanwhile
            if there:
                break

    def mark(body):
        def marks_and_runs():
            (tmp_path / f"mark{dist.get_rank()}").write_text(f"{time.process_time()}\n")
            return body()

        return marks_and_runs

    monkeypatch.setattr(processes, "listen", until_all_hang)
    return mark


def hangs(pid: int, mark: Path) -> bool:
    """Has it written its mark, and sleeps since, or has been busy for a while?"""
    if not mark.exists() or not (text := mark.read_text()).endswith("\n"):
        return False
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        busy = sum(process.cpu_times()[:2]) - float(text)
        return process.status() in (psutil.STATUS_SLEEPING, psutil.STATUS_STOPPED) or busy > 0.2
    return True


def everything_of(rank_: int) -> str:
    """A result large enough not to fit into a pipe."""
    return str(rank_) * 300_000


@pytest.mark.verifies(
    "distributed.launch.launch",
    "distributed.processes.Rank",
    "distributed.processes.start",
    "distributed.processes.listen",
    "distributed.rank.main",
    "distributed.rank.join",
    "distributed.rank.Job",
    "distributed.rank.Report",
    "distributed.rank.pickled",
    "distributed.rank.descriptor",
    kind="invariant",
    against="the sum over ranks, by torch's all_reduce",
    on="1, 2 and 4 processes; nested functions, tensors, large results",
    bound=0.0,
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_runs_the_function_in_a_process_of_its_own_and_results_come_in_rank_order(ranks, seen):
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def body(scale):
        x = weights * scale * (dist.get_rank() + 1)
        dist.all_reduce(x)
        threads = torch.get_num_threads()
        return x, dist.get_rank(), dist.get_world_size(), os.getpid(), threads, everything_of(dist.get_rank())

    results = launch(body, ranks, 3.0, timeout=PATIENCE)
    for number, (x, its_rank, size, _, threads, text) in enumerate(results):
        seen((x - weights * 3 * ranks * (ranks + 1) / 2).abs().max())
        assert (its_rank, size, threads, text) == (number, ranks, 1, everything_of(number))
    assert len({pid for _, _, _, pid, _, _ in results} | {os.getpid()}) == ranks + 1


def test_ranks_have_the_threads_asked_for_and_the_callers_environment_and_folder_of_now(monkeypatch, tmp_path):
    monkeypatch.setenv("SET_AFTER_THE_SERVER_STARTED", "yes")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    names = ("SET_AFTER_THE_SERVER_STARTED", "HOME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

    def body():
        return torch.get_num_threads(), os.getcwd(), [os.environ.get(name) for name in names]

    assert launch(body, 2, threads=3, timeout=PATIENCE) == [
        (3, str(tmp_path), ["yes", None, str(number), "2", str(number), "2"]) for number in range(2)
    ]


def test_what_ranks_print_comes_out_in_rank_order_also_below_python(capfd):
    def body():
        number = dist.get_rank()
        time.sleep(0.2 * (1 - number))  # rank 1 speaks first
        print("rank", number)
        os.write(1, f"written by {number}\n".encode())
        os.system(f"echo child of {number}")
        ctypes.CDLL(None).puts(f"C of {number}".encode())
        print("complaint of", number, file=sys.stderr)

    launch(body, 2, timeout=PATIENCE)
    shown = capfd.readouterr()
    lines = [line for n in range(2) for line in (f"rank {n}", f"written by {n}", f"child of {n}", f"C of {n}")]
    assert shown.out.splitlines() == lines
    assert shown.err.splitlines() == ["complaint of 0", "complaint of 1"]


def test_a_rank_that_prints_without_end_fills_no_memory(capsys):
    def body():
        os.write(1, b"x" * 5_000_000)

    launch(body, 2, timeout=PATIENCE)
    shown = capsys.readouterr().out
    assert len(shown) < 2.2 * processes.KEPT
    assert shown.count("[3,951,424 more bytes are not shown]") == 2


def test_what_was_printed_before_a_rank_died_is_shown(capsys):
    def body():
        print("last words of", dist.get_rank())
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError):
        launch(body, 2, timeout=PATIENCE)
    assert capsys.readouterr().out == "last words of 0\nlast words of 1\n"


def meet():
    """What the healthy ranks do: wait for one that does not come."""
    dist.all_reduce(torch.ones(1))


def raises():
    raise ValueError("seven is not eight")


def inside_torch():
    torch.ones(2) @ torch.ones(3)


def ends(number):
    os.kill(os.getpid(), number)


def crashes():
    ctypes.string_at(0)


def sleeps():
    time.sleep(1000)


def holds_the_interpreter():
    sum(range(10**15))  # one instruction of Python: no other thread runs until it ends


def ignores_signals():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


ENDINGS = [  # what rank 1 does, the time-out, what the message must say
    pytest.param(raises, PATIENCE, r"^rank 1 of 3 raised ValueError: seven is not eight\n", id="raises"),
    pytest.param(inside_torch, PATIENCE, r"^rank 1 of 3 raised RuntimeError: inconsistent tensor size", id="torch"),
    pytest.param(lambda: sys.exit(3), PATIENCE, r"^rank 1 of 3 left with sys.exit\(3\)", id="exit 3"),
    pytest.param(sys.exit, PATIENCE, r"^rank 1 of 3 left with sys.exit\(None\)", id="exit 0"),
    pytest.param(lambda: os._exit(5), PATIENCE, r"^rank 1 of 3 ended with exit code 5 before it returned", id="_exit"),
    pytest.param(lambda: ends(signal.SIGKILL), PATIENCE, r"^rank 1 of 3 was ended by SIGKILL", id="SIGKILL"),
    pytest.param(lambda: ends(signal.SIGTERM), PATIENCE, r"^rank 1 of 3 was ended by SIGTERM", id="SIGTERM"),
    pytest.param(crashes, PATIENCE, r"(?s)^rank 1 of 3 was ended by SIGSEGV.*in crashes", id="SIGSEGV"),
    pytest.param(sleeps, 2.0, r"(?s)^rank 1 of 3 did not finish within 2 s\n.*rank 1 stands at.*in sleeps", id="hang"),
    pytest.param(holds_the_interpreter, 2.0, r"(?s)^rank 1 of 3 did not .*rank 1 stands at.*in holds_the", id="GIL"),
    pytest.param(ignores_signals, 2.0, r"(?s)^rank 1 of 3 did not .*rank 1 stands at.*in ignores_signals", id="deaf"),
    pytest.param(lambda: ends(signal.SIGSTOP), 2.0, r"(?s)^rank 1 of 3 did not .*rank 1 does not say", id="stopped"),
]


@pytest.mark.verifies(
    "distributed.launch.launch",
    "distributed.launch.RankError",
    "distributed.failures.RankError",
    "distributed.failures.explain",
    "distributed.rank.Frame",
    kind="message",
    against="one error that names the rank and shows its own lines; nothing left behind",
    on="raise, exit, SIGKILL, SIGTERM, SIGSEGV, hangs; 3 processes, the others wait in a collective",
)
@pytest.mark.parametrize(("ending", "timeout", "says"), ENDINGS)
def test_a_rank_that_does_not_return_ends_all_in_one_error_that_names_it(ending, timeout, says, marked, monkeypatch):
    monkeypatch.setattr("bigmodel_course.distributed.launch.ECHO", PATIENCE)  # an echo may come long before its cause

    def body():
        ending() if dist.get_rank() == 1 else meet()

    start, sockets = time.monotonic(), len(psutil.Process().net_connections())
    with pytest.raises(RankError) as caught:
        launch(marked(body), 3, timeout=timeout)
    assert len(psutil.Process().net_connections()) <= sockets  # also while the error, as in a notebook, is kept
    assert time.monotonic() - start < timeout + PATIENCE  # none of them waits for ever
    message = str(caught.value)
    assert caught.value.rank == 1
    assert re.search(says, message), message
    assert "distributed/rank.py" not in message
    assert "site-packages/torch" not in message


@pytest.mark.verifies(
    "distributed.launch.launch",
    kind="message",
    against="one error that names the rank",
    on="arguments, functions and results that cannot be pickled or read back; wrong arguments",
)
def test_what_cannot_be_pickled_is_named(all_are_heard):
    with pytest.raises(TypeError, match=r"must be picklable to reach the ranks, got print\(int, generator\)"):
        launch(print, 2, 1, (i for i in range(3)))
    with pytest.raises(
        RankError, match=r"^rank 0 of 2 returned a generator that cannot be pickled: TypeError"
    ) as caught:
        launch(lambda: (i for i in range(3)), 2, timeout=PATIENCE)
    assert caught.value.rank == 0
    with pytest.raises(RankError, match="rank 1 returned what cannot be read: ZeroDivisionError"):
        launch(lambda: OnlyThere() if dist.get_rank() == 1 else None, 2, timeout=PATIENCE)
    with pytest.raises(RankError, match="rank 0 of 2 raised ZeroDivisionError"):
        launch(print, 2, OnlyThere(), timeout=PATIENCE)


def test_a_variable_named_config_beside_torch_distributed_is_no_obstacle():
    """cloudpickle then sends torch.distributed.config too, which it cannot pickle by itself."""
    names = {"dist": dist, "config": 7, "__name__": "__main__"}
    exec("def body(): return dist.get_rank() + config", names)
    assert launch(names["body"], 2, timeout=PATIENCE) == [7, 8]


class OnlyThere:
    """Can be pickled but not unpickled."""

    def __reduce__(self):
        return divmod, (1, 0)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("fn", 2), {}, "fn must be a function, got str"),
        ((print, 0), {}, "ranks must be a whole number >= 1, got 0"),
        ((print, 2.0), {}, "ranks must be a whole number >= 1, got 2.0"),
        ((print, 2), {"threads": True}, "threads must be a whole number >= 1, got True"),
        ((print, 2), {"timeout": 0}, "timeout must be > 0 seconds, got 0"),
        ((print, 2), {"backend": "mpi"}, 'backend must be None, "gloo" or "nccl", got \'mpi\''),
        ((print, 99), {"backend": "nccl"}, '"nccl" needs a GPU for each rank, got 99 ranks'),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(arguments, options, says):
    with pytest.raises((TypeError, ValueError), match=re.escape(says)):
        launch(*arguments, **options)


def test_of_several_errors_the_lowest_ranks_is_told(all_are_heard):
    def body():
        raise KeyError(dist.get_rank())

    for _ in range(3):
        with pytest.raises(RankError, match=r"^rank 0 of 4 raised KeyError: 0\n"):
            launch(body, 4, timeout=PATIENCE)


def test_the_cause_is_told_and_not_its_echo(monkeypatch):
    """Rank 0 hears of the death through its broken connection, and says so first."""
    monkeypatch.setattr("bigmodel_course.distributed.launch.ECHO", PATIENCE)

    def body():
        if dist.get_rank() == 2:
            time.sleep(0.5)  # the cause comes last; it would be told if it came first, too
            raise ValueError("the cause")
        if dist.get_rank() == 1:
            sleeps()
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    with pytest.raises(RankError, match="rank 2 of 3 raised ValueError: the cause"):
        launch(body, 3, timeout=PATIENCE)


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RankError(3, "rank 3 of 4 raised ValueError")))
    assert (error.rank, str(error)) == (3, "rank 3 of 4 raised ValueError")


def one_returns():
    if dist.get_rank() != 1:
        meet()


def other_kinds():
    if dist.get_rank() == 1:
        dist.broadcast(torch.ones(1), 0)
    else:
        meet()


def other_shapes():
    dist.all_reduce(torch.ones(3 + dist.get_rank()))


def other_roots():
    dist.broadcast(torch.ones(1), dist.get_rank())


def ddp_over_other_models():
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2 + dist.get_rank()))


def ddp_backward_on_one_rank():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    loss = model(torch.ones(1, 2)).sum()
    if dist.get_rank() == 0:
        loss.backward()


DISAGREEMENTS = [
    pytest.param(one_returns, "rank 0: allreduce of float32 [1]\n  rank 1: nothing more: it has finished", id="return"),
    pytest.param(other_kinds, "rank 0: allreduce of float32 [1]\n  rank 1: broadcast of float32 [1]", id="kind"),
    pytest.param(other_shapes, "rank 0: allreduce of float32 [3]\n  rank 1: allreduce of float32 [4]", id="shape"),
    pytest.param(other_roots, "rank 0: broadcast of float32 [1], root_rank 0\n  rank 1: broadcast of", id="root"),
    pytest.param(ddp_backward_on_one_rank, "allreduce of float32 [6]\n  rank 1: nothing more", id="backward"),
]


@pytest.mark.verifies(
    "distributed.agreement.Agreement",
    kind="message",
    against="one error that says which rank calls what, without waiting for the time-out",
    on="another kind, shape, root; a rank that has returned; DDP's backward on one rank only",
)
@pytest.mark.parametrize(("body", "says"), DISAGREEMENTS)
def test_ranks_that_disagree_are_told_who_calls_what(body, says):
    with pytest.raises(RankError, match=re.escape(says)) as caught:
        launch(body, 2, timeout=PATIENCE, check=True)
    assert f"in {body.__name__}" in str(caught.value)


@pytest.mark.parametrize("body", [one_returns, other_kinds, other_shapes])
def test_without_the_check_ranks_that_disagree_are_told_where_they_stand(body, marked):
    with pytest.raises(RankError, match="The ranks may disagree on what comes next") as caught:
        launch(marked(body), 2, timeout=1.5)
    assert "in meet" in str(caught.value) or "in other_shapes" in str(caught.value)


@pytest.mark.verifies(
    "distributed.agreement.Agreement",
    kind="invariant",
    against="the same run without the check",
    on="torch's collectives, subgroups, DDP, FSDP2 and DTensor on 2 processes",
    bound=0.0,
)
def test_the_check_changes_nothing_where_ranks_agree(seen):
    def body():
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        torch.manual_seed(0)
        number, x = dist.get_rank(), torch.arange(4.0) + dist.get_rank()
        parts, pair = [torch.zeros(4) for _ in range(2)], torch.zeros(2)
        dist.all_gather(parts, x)
        dist.reduce_scatter_tensor(pair, x)
        dist.all_to_all_single(y := torch.zeros(4), x)
        dist.scatter(z := torch.zeros(4), parts if number == 0 else None, src=0)
        dist.send(x, 1) if number == 0 else dist.recv(x, 0)
        alone = [dist.new_group([r]) for r in range(2)][number]
        for _ in range(number + 1):  # groups count for themselves
            dist.all_reduce(x, group=alone)
        dist.barrier()
        gradients = []
        for wrap in (torch.nn.parallel.DistributedDataParallel, fully_shard):
            model = wrap(torch.nn.Linear(4, 4))
            model(y[None] + z).sum().backward()
            gradients += [
                p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()
            ]
        mesh = dist.init_device_mesh("cpu", (2,))
        whole = distribute_tensor(x, mesh).sum().full_tensor()
        return torch.cat([x, *parts, pair, y, z, whole[None], *(g.flatten() for g in gradients)])

    for one, other in zip(*(launch(body, 2, timeout=PATIENCE, check=check) for check in (True, False)), strict=True):
        seen((one - other).abs().max())


@pytest.mark.verifies(
    "distributed.launch.launch",
    kind="invariant",
    against="processes, sockets, open files, threads and shared memory before",
    on="200 launches in a row, and sockets while the ranks run",
)
def test_200_launches_leave_nothing_behind():
    for i in range(200):
        assert launch(dist.get_world_size, 1 + i % 2, timeout=PATIENCE) == [1 + i % 2] * (1 + i % 2)


def test_only_this_machine_can_reach_the_ranks():
    def body(parent):
        meet()
        return [c.laddr for pid in (parent, os.getpid()) for c in psutil.Process(pid).net_connections(kind="inet")]

    others = {c.laddr for c in psutil.Process().net_connections(kind="inet")}  # of tests that ran before
    found = {address for addresses in launch(body, 2, os.getpid(), timeout=PATIENCE) for address in addresses}
    assert {address.ip.removeprefix("::ffff:") for address in found - others} == {"127.0.0.1"}


def test_children_of_a_rank_end_with_it(tmp_path):
    def body():
        children = [subprocess.Popen(["sleep", "1000"]), multiprocessing.get_context("fork").Process(target=sleeps)]
        children[1].start()
        (tmp_path / str(dist.get_rank())).write_text(" ".join(str(child.pid) for child in children))

    launch(body, 2, timeout=PATIENCE)
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 4
    assert gone(pids)


def gone(pids: list[int], seconds: float = 30.0) -> bool:
    """Does none of them run any more, or will not soon?"""
    deadline = time.monotonic() + seconds
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.verifies(
    "distributed.launch.launch",
    kind="recovery",
    against="no rank outlives the call, and the next launch works",
    on="an interrupted cell, a killed server, a killed parent, a script without a main guard",
)
def test_an_interrupted_cell_ends_its_ranks(tmp_path):
    def body():
        (tmp_path / str(dist.get_rank())).write_text(str(os.getpid()))
        sleeps()

    over = threading.Event()  # or a launch that fails would leave the helper waiting, and the next test interrupted

    def interrupt():
        while sum(bool(path.read_text()) for path in tmp_path.iterdir()) < 2:  # a file is there before its number is
            if over.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(body, 2, timeout=PATIENCE)
    finally:
        over.set()
        helper.join()
    assert gone([int(path.read_text()) for path in tmp_path.iterdir()])


def test_a_rank_ends_when_its_start_is_interrupted(monkeypatch):
    begun, start = [], starter.start

    def interrupted(process):
        start(process)
        begun.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(starter, "start", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps it, and with it what its frames hold
        launch(dist.get_rank, 2, timeout=PATIENCE)
    assert gone(begun), kept
    assert len(begun) == 1


def test_a_killed_server_is_started_again():
    killed = forkserver._forkserver._forkserver_pid
    os.kill(killed, signal.SIGKILL)
    assert launch(dist.get_rank, 2, timeout=PATIENCE) == [0, 1]
    server = forkserver._forkserver._forkserver_pid
    assert server != killed
    with pytest.raises(RankError, match=r"rank [01] of 2 (was ended by SIGKILL|ended with exit code 255)"):
        # Not os.getppid(): once the server is dead, that is another process.
        launch(lambda: (os.kill(server, signal.SIGKILL), sleeps()), 2, timeout=PATIENCE)
    assert launch(dist.get_rank, 2, timeout=PATIENCE) == [0, 1]


def test_without_a_forkserver_it_spawns(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert launch(lambda: dist.get_rank() * 7, 2, timeout=PATIENCE) == [0, 7]


def run_script(folder: Path, text: str, *command: str) -> subprocess.Popen:
    """Run a script of its own, its output as one text."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command, str(script)], env=environment, cwd=folder, **pipes)


def shown_by_script(script: subprocess.Popen) -> str:
    """All that it prints until it ends; it does not stay if it takes too long."""
    try:
        return script.communicate(timeout=PATIENCE)[0]
    finally:
        end_all(script)
        script.wait()


def test_a_script_without_a_main_guard_runs_once_and_its_ranks_end_when_it_is_killed(tmp_path):
    script = run_script(
        tmp_path,
        """
        import os, sys, time
        import torch.distributed as dist
        from bigmodel_course.distributed.launch import launch

        print("the script runs", flush=True)
        OFFSET = 5

        def body():
            return dist.get_rank() + OFFSET

        def hang():
            dist.barrier()
            with open(f"pid{dist.get_rank()}", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(1000)

        print(launch(body, 2, timeout=240), flush=True)
        launch(hang, 2, timeout=1000)
        """,
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not all((file := tmp_path / f"pid{n}").exists() and file.read_text() for n in range(2)):
            assert script.poll() is None, script.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        everything = [child.pid for child in psutil.Process(script.pid).children(recursive=True)]
    finally:
        script.kill()
    assert shown_by_script(script) == "the script runs\n[5, 6]\n"
    assert gone([*everything, *(int((tmp_path / f"pid{n}").read_text()) for n in range(2))])


def test_in_a_notebook_functions_may_stand_in_cells_and_errors_name_the_cell(tmp_path):
    script = run_script(
        tmp_path,
        '''
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
        shell.run_cell("""
        import torch, torch.distributed as dist
        from bigmodel_course.distributed.launch import launch
        offset = torch.tensor(5)""", store_history=True)
        shell.run_cell("""def body(wrong):
            if wrong:
                raise ValueError("seven")
            return dist.get_rank() + offset""", store_history=True)
        shell.run_cell("print(launch(body, 2, False, timeout=240))", store_history=True)
        shell.run_cell("launch(body, 2, True, timeout=240)", store_history=True)
        ''',
    )
    shown = shown_by_script(script)
    assert script.returncode == 0, shown
    error = '  Cell In[2], line 3, in body\n    raise ValueError("seven")'
    assert shown == f"[tensor(5), tensor(6)]\nRankError: rank 0 of 2 raised ValueError: seven\n{error}\n"


UNDER_TORCHRUN = """
import json, os, socket, sys
import torch, torch.distributed as dist
from bigmodel_course.distributed.launch import device, launch

def body(scale):
    x = torch.ones(2, device=device()) * scale * (dist.get_rank() + 1)
    dist.all_reduce(x)
    return dist.get_rank(), x.tolist(), torch.get_num_threads()

results = launch(body, 2, 10)
again = launch(lambda: launch(dist.get_rank, 2), 2)  # inside a rank too it takes part in the group that is there
try:
    launch(body, 3, 10)
except ValueError as error:
    refused = str(error)
with open(f"results{os.environ['RANK']}", "w") as file:
    json.dump([results, again, refused], file)
"""
EXPECTED = [
    [[0, [30.0, 30.0], 1], [1, [30.0, 30.0], 1]],
    [[0, 1], [0, 1]],
    "ranks must be 2, as many as were started, got 3",
]


@pytest.mark.verifies(
    "distributed.launch.launch",
    kind="parity",
    against="the same function under torchrun",
    on="one host with 2 processes; two hosts (network namespaces) with one each",
    bound=0.0,
)
def test_under_torchrun_the_same_script_is_one_rank_of_the_group(tmp_path, seen):
    script = run_script(
        tmp_path, UNDER_TORCHRUN, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    )
    shown = shown_by_script(script)
    assert script.returncode == 0, shown
    for number in range(2):
        results = json.loads((tmp_path / f"results{number}").read_text())
        assert results == EXPECTED
        here = launch(lambda: torch.ones(2) * 10 * sum(range(1, dist.get_world_size() + 1)), 2, timeout=PATIENCE)
        seen((here[number] - torch.tensor(results[0][number][1])).abs().max())


def test_two_hosts_run_the_same_script(two_hosts, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    shown_by(torchrun_on(two_hosts, [str(script)], tmp_path), PATIENCE)
    assert [json.loads((tmp_path / f"results{number}").read_text()) for number in range(2)] == [EXPECTED] * 2


@pytest.mark.verifies(
    "distributed.launch.device",
    kind="invariant",
    against="the CPU outside a rank and where ranks have no GPU each",
    on="this process and 2 ranks on Gloo",
)
def test_the_device_is_the_cpu_without_a_gpu_for_each_rank():
    assert device() == torch.device("cpu")
    assert launch(device, 2, backend="gloo", timeout=PATIENCE) == [torch.device("cpu")] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_with_a_gpu_for_each_rank_it_is_that_gpu_and_results_come_back_on_the_cpu():
    ranks = torch.cuda.device_count()

    def body():
        x = torch.ones(2, device=device()) * (dist.get_rank() + 1)
        dist.all_reduce(x)
        return device(), x

    for number, (its, x) in enumerate(launch(body, ranks, timeout=PATIENCE)):
        assert its == torch.device("cuda", number)
        assert torch.equal(x, torch.full((2,), ranks * (ranks + 1) / 2))
