"""Processes forked from a server that has the heavy modules loaded: a start takes a tenth of a second, not two."""

import multiprocessing
import threading
from multiprocessing import spawn
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["context", "start"]

_starting = threading.Lock()


def context(*modules: str) -> Any:
    """The multiprocessing context whose server has `modules` loaded; spawn, which is slower, where there is none.

    There is one server a program: the modules of the first start are those it has.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(modules))
    return server


def start(process: BaseProcess) -> None:
    """Start `process` without running the caller's script again, as multiprocessing does by itself."""
    with _starting:
        prepare = spawn.get_preparation_data

        def ours(name: str) -> dict:
            return {k: v for k, v in prepare(name).items() if name != process.name or not k.startswith("init_main")}

        spawn.get_preparation_data = ours
        try:
            process.start()
        finally:
            spawn.get_preparation_data = prepare
