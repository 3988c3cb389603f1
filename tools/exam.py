"""The problem sets with other numbers: `make exam SEED=7` writes a course folder in which nbgrader does the rest.

It holds the sets' sources, released copies and nbgrader's settings.  The same seed gives the same numbers.
"""

import argparse
import shutil
from pathlib import Path

import nbformat

from assignments.numbers import drawn
from bigmodel_course.classroom.exam import renumbered
from tools.class_demo import ASSIGNMENTS, ROOT, nbgrader
from tools.release_sets import sources


def write(seed: int, folder: Path) -> list[Path]:
    """Write every set with the numbers of `seed` into the new `folder`; the sources' paths."""
    folder.mkdir(parents=True)
    shutil.copy(ASSIGNMENTS / "nbgrader_config.py", folder)
    written = []
    for path in sources():
        copy = folder / "source" / path.stem / path.name
        copy.parent.mkdir(parents=True)
        nbformat.write(renumbered(nbformat.read(path, as_version=4), drawn(path.stem, seed)), copy)
        written.append(copy)
    return written


def main() -> None:
    """Write the exam and say where it lies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seed", type=int)
    seed = parser.parse_args().seed
    folder = ROOT / "build" / f"exam-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    for path in write(seed, folder):
        nbgrader(folder, "generate_assignment", path.stem)
    print(f"The sets with the numbers of seed {seed}: build/{folder.name}, for the class in its folder release.")


if __name__ == "__main__":
    main()
