"""A folder goes with the process that made it, whatever ends that process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bigmodel_course.deployment.lifetime import Folder

PATIENT = 120.0  # seconds: a busy machine is not a fault
MAKER = """
import time
from pathlib import Path
from bigmodel_course.deployment.lifetime import Folder
folder = Folder()
(Path(folder.name) / "deep").mkdir()
(Path(folder.name) / "deep" / "model.onnx").write_bytes(bytes(1000))
print(folder.name, folder._watch.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.verifies(
    "deployment.lifetime.Folder",
    kind="recovery",
    against="neither the folder nor the process that watches it is left",
    on="SIGKILL, SIGTERM and an interrupt of the process that made it, alone and with its whole group",
)
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_folder_is_gone_when_its_maker_is(send, blow):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    maker = subprocess.Popen([sys.executable, "-c", MAKER], text=True, start_new_session=True, **pipes)
    try:
        name, pid = maker.stdout.readline().split()
        watch = psutil.Process(int(pid))
        assert (Path(name) / "deep" / "model.onnx").exists()
        send(maker.pid, blow)
        assert psutil.wait_procs([watch], timeout=PATIENT)[1] == []
        assert not Path(name).exists()
    finally:
        maker.kill()
        maker.wait()
        maker.stdout.close()


def test_a_folder_can_go_before_its_maker():
    with Folder(prefix="parts-") as name:
        assert Path(name).name.startswith("parts-")
        assert Path(name).is_dir()
    folder = Folder()
    watch = psutil.Process(folder._watch.pid)
    folder.cleanup()
    folder.cleanup()  # twice is as good as once
    assert not Path(name).exists()
    assert not Path(folder.name).exists()
    assert not watch.is_running()
