"""The teacher's page works as it is typed."""

import os
import sqlite3
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCKS = (ROOT / "book" / "teaching.md").read_text(encoding="utf-8").split("```")[1::2]


def test_a_course_made_as_the_page_says_has_a_gradebook_that_knows_the_set(tmp_path):
    """Whatever else lies in the folder, `generate_assignment` must do its work: without it nothing can be graded."""
    (tmp_path / "assignments").symlink_to(ROOT / "assignments")
    first = [line for line in BLOCKS[3].splitlines() if line.startswith("nbgrader generate_assignment")]
    typed = "\n".join([BLOCKS[1], BLOCKS[2], *first])
    paths = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    homes = {"JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    done = subprocess.run(
        ["bash", "-e", "-c", typed],
        cwd=tmp_path, env={**os.environ, **homes, "PATH": paths}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "my-course" / "gradebook.db") as book:
        assert book.execute("select name from assignment").fetchall() == [("1_optimize",)]
