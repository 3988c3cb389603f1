"""Processes that do not outlive whoever started them."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

__all__ = ["die_with_parent", "end_with_stdin"]


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
