"""Make what comes from assignments/source: the students' copies, and the book's page of problems and wrong answers.

`make release` runs it; tests hold both to the sources.
"""

import shutil
import tempfile
from pathlib import Path

from assignments.proofs import Wrong, proof
from bigmodel_course.classroom.sets import Problem, read
from tools.class_demo import ASSIGNMENTS, ROOT, nbgrader

PAGE = ROOT / "book" / "problem_sets.md"
HEAD = """# Problem sets: what each one rejects

Made by `make release` from the sets and from `assignments/proofs`; do not edit. For every problem the tests hold: the
solution and a second, differently written answer score full marks, an untouched copy scores 0, and **each wrong answer
below loses the points and gets the hint beside it**. A row marked "no hint" is an answer made for the visible example
alone. All of it is held with another copy's numbers too, the right answers with three.
"""


def sources() -> list[Path]:
    """The sets' notebooks, in order."""
    return sorted((ASSIGNMENTS / "source").glob("*/*.ipynb"))


def release() -> None:
    """Have nbgrader make the copies in a folder of its own, so that no gradebook is left beside the sources."""
    with tempfile.TemporaryDirectory() as folder:
        course = Path(folder)
        shutil.copy(ASSIGNMENTS / "nbgrader_config.py", course)
        shutil.copytree(ASSIGNMENTS / "source", course / "source")
        for path in sources():
            nbgrader(course, "generate_assignment", path.stem)
        shutil.rmtree(ASSIGNMENTS / "release", ignore_errors=True)
        shutil.copytree(course / "release", ASSIGNMENTS / "release")


def page() -> str:
    """The table of problems and wrong answers."""
    parts = [HEAD]
    for path in sources():
        wrong, asked = proof(path.stem).WRONG, read(path)
        wrongs = sum(map(len, wrong.values()))
        parts.append(f"## {path.stem}: {asked.points} points, {wrongs} wrong answers\n")
        parts.append("| problem | points | seconds | wrong answer | the hint it gets |\n|---|---|---|---|---|")
        parts += [row for problem in asked.problems for row in _rows(problem, wrong[problem.name])]
        parts.append("")
    return "\n".join(parts)


def _rows(problem: Problem, wrongs: list[Wrong]) -> list[str]:
    heads = [f"`{problem.name}` | {problem.points} | {problem.seconds:g}", *[" | | "] * (len(wrongs) - 1)]
    return [
        f"| {head} | {_change(wrong)} | {_cell(wrong.hint) or 'no hint'} |"
        for head, wrong in zip(heads, wrongs, strict=True)
    ]


def _change(wrong: Wrong) -> str:
    if wrong.source:
        return f"`… {_cell(wrong.source.strip().splitlines()[-1])}`"
    return f"`{_cell(wrong.old)}` → `{_cell(wrong.new)}`" if wrong.new.strip() else f"without `{_cell(wrong.old)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    release()
    PAGE.write_text(page(), encoding="utf-8")
