"""Run lessons from a clean kernel and store their outputs: `make lessons`.

A lesson is replaced only when every cell ran. What is stored is the same whoever runs it: one thread, no progress bar,
no metadata but the kernel's and the language's, and in place of a live control a line that says how to get it.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
CELL_SECONDS = 240  # many times what a cell takes; the check, nbval, stops at 120
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


def store(path: Path) -> str | None:
    """Run one lesson and replace its file; return what went wrong, if anything."""
    os.environ.update(QUIET)
    notebook = nbformat.read(path, as_version=4)
    options = {"extra_arguments": ["--IPKernelApp.log_level=ERROR"], "resources": {"metadata": {"path": path.parent}}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, **options)
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"{path}: {error}"
    tidy(notebook)
    unfinished = path.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    unfinished.replace(path)
    return None


def store_all(paths: list[Path], jobs: int) -> list[str]:
    """Store every lesson, `jobs` at a time, each in a process of its own, with a progress line."""
    with ProcessPoolExecutor(jobs) as pool:
        running = [pool.submit(store, path) for path in paths]
        results = [done.result() for done in tqdm(as_completed(running), "lessons", len(paths), unit="lesson")]
    return [fault for fault in results if fault]


def main() -> int:
    """Parse the command line and store the lessons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="lessons run at a time")
    options = parser.parse_args()
    faults = store_all(options.lessons, options.jobs)
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
