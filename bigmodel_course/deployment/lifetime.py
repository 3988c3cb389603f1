"""Processes and folders that do not outlive whoever started them."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

__all__ = ["Folder", "die_with_parent", "end_with_stdin"]


class Folder(tempfile.TemporaryDirectory):
    """A temporary folder that is gone when this process is, however that ends: a small process waits for it.

    `name` is its path; `cleanup()`, or the end of a `with` block, removes it earlier.
    """

    def __init__(self, prefix: str = "course-"):
        super().__init__(prefix=prefix)
        wait = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        command = [sys.executable, "-I", "-S", "-c", wait, self.name]
        self._watch = subprocess.Popen(command, stdin=subprocess.PIPE, **quiet)

    def cleanup(self) -> None:
        """Remove the folder now."""
        super().cleanup()
        self._watch.stdin.close()
        self._watch.wait()


def end_with_stdin(end: Callable[[], object] = lambda: os._exit(0)) -> None:
    """Call `end` when standard input ends: whoever holds the other end is gone then, however it went."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end()

    threading.Thread(target=watch, daemon=True, name="stdin").start()


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even while it is stopped (PR_SET_PDEATHSIG)."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
