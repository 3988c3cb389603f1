"""Run lessons from a clean kernel and store their outputs: `make lessons`.

A lesson is replaced only when every cell ran. What is stored is the same whoever runs it: one thread, no progress bar,
no metadata but the kernel's and the language's, and in place of a live control a line that says how to get it.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.asyncio import tqdm

QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep only what belongs in a stored lesson."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            if WIDGET in output.get("data", {}):
                output.data = nbformat.from_dict({"text/plain": "▸ Run this cell to get the control."})


async def store(path: Path, slots: asyncio.Semaphore) -> str | None:
    """Run one lesson and replace its file; return what went wrong, if anything."""
    async with slots:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"], resources={"metadata": {"path": str(path.parent)}},
        )  # fmt: skip
        try:
            await client.async_execute(env={**os.environ, **QUIET})
        except CellExecutionError as error:
            return f"{path}: {error}"
        tidy(notebook)
        unfinished = path.with_suffix(".unfinished")
        nbformat.write(notebook, unfinished)
        unfinished.replace(path)
        return None


async def store_all(paths: list[Path], jobs: int) -> list[str]:
    """Store every lesson, `jobs` at a time, with a progress line."""
    slots = asyncio.Semaphore(jobs)
    results = await tqdm.gather(*(store(path, slots) for path in paths), desc="lessons", unit="lesson")
    return [fault for fault in results if fault]


def main() -> int:
    """Parse the command line and store the lessons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="lessons run at a time")
    options = parser.parse_args()
    faults = asyncio.run(store_all(options.lessons, options.jobs))
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
