"""How long a reader waits for each lesson's first picture and its end, and for the whole course under nbval.

These are seconds, not ratios: there is nothing else a user would pick instead.  They stand under `ratios` so that every
benchmark has one form.
"""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import nbformat
from nbclient import NotebookClient

from benchmarks.measure import Result

ROOT = Path(__file__).parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def run(quick: bool = False) -> Result:
    """Time each lesson alone, then all of them under nbval on two workers; `quick` takes only the first lesson."""
    lessons = sorted((ROOT / "notebooks").glob("*.ipynb"))[: 1 if quick else None]
    rows, spreads = [], []
    for path in lessons:
        timed = [asyncio.run(one(path)) for _ in range(1 if quick else 3)]
        first = [seconds for seconds, _ in timed]
        spreads.append((max(first) - min(first)) / median(first))
        rows.append({"lesson": path.stem, "first picture (s)": median(first), "end (s)": median(s for _, s in timed)})
    ratios = {f"{row['lesson']}_first_picture_s": row["first picture (s)"] for row in rows}
    ratios |= {f"{row['lesson']}_s": row["end (s)"] for row in rows}
    ratios["course_under_nbval_s"] = nbval(lessons)
    table = [{key: f"{value:.1f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    return Result(ratios=ratios, spread=max(spreads), table=table)


async def one(path: Path) -> tuple[float, float]:
    """Seconds from the kernel's start to the first picture, and to the end of the lesson."""
    notebook = nbformat.read(path, as_version=4)
    pictures: list[float] = []
    cells: list[float] = []  # the last of them is the end: closing a kernel may take longer than a reader waits

    def note(cell, cell_index, execute_reply) -> None:
        cells.append(time.perf_counter() - start)
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            pictures.append(cells[-1])

    arguments = {"extra_arguments": ["--IPKernelApp.log_level=ERROR"], "resources": {"metadata": {"path": path.parent}}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", on_cell_executed=note, **arguments)
    start = time.perf_counter()
    await client.async_execute(env={**os.environ, **QUIET})
    return (pictures or cells[-1:])[0], cells[-1]


def nbval(lessons: list[Path]) -> float:
    """Seconds that the strict comparison of `lessons` takes; a red lesson stops the benchmark."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "-p",
        "tools.strict_nbval",
        "--nbval",
    ]
    start = time.perf_counter()
    done = subprocess.run([*command, *lessons], cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the lessons must be green before they are timed:\n{done.stdout[-2000:]}")
    return time.perf_counter() - start
