"""nbval with patience, as a busy machine is no fault: `pytest -p tools.patient_nbval --nbval notebooks`.

By itself nbval gives a kernel 60 seconds to start, and an output 5 seconds to follow the reply of its cell. And it
chooses a kernel's TCP ports a second or more before the kernel takes them: where another process has one by then, the
kernel dies. With this it waits longer, and kernels are spoken to over files that nobody else can take.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import nbval.kernel
from jupyter_client.manager import KernelManager
from nbval.plugin import IPyNbCell

PATIENCE = 300.0  # seconds until what does not come is a fault
LONGEST = 90  # bytes of the files' path without their numbers; a socket's name may have 103 on macOS


def manager(folder: str, **options: Any) -> KernelManager:
    """A kernel's manager whose sockets are files in `folder`; ports where the path is too long for that."""
    file = Path(folder) / f"{uuid4().hex[:12]}.json"
    if os.name == "posix" and len(os.fsencode(file)) < LONGEST:
        options |= {"transport": "ipc", "connection_file": str(file)}
    return KernelManager(**options)


def pytest_configure(config):
    """Wait for kernels, and start them over files."""
    folder = tempfile.mkdtemp(prefix="kernels-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.option.nbval_kernel_startup_timeout = PATIENCE
    nbval.kernel.KernelManager = lambda **options: manager(folder, **options)


def pytest_collection_modifyitems(items):
    """Wait for outputs."""
    for item in items:
        if isinstance(item, IPyNbCell):
            item.output_timeout = PATIENCE
