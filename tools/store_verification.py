"""Store the table that the last test run measured: in the package for the lessons, in the book for readers."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "build" / "verification.json"
STORED = ROOT / "bigmodel_course" / "verification.json"
PAGE = ROOT / "book" / "verification.md"

HEAD = """# What is compared with what

This table is made by the test run (`make verification`), never typed. A row stands for a test that fails when the
largest difference is above the allowed one. An empty difference: the test asks yes or no, such as for an error's words.

| name | kind | compared with | on | largest difference | allowed |
|---|---|---|---|---|---|
"""


def page(rows: list[dict]) -> str:
    """The table as a page of the book."""
    lines = [
        f"| `{row['name']}` | {row['kind']} | {_plain(row['against'])} | {_plain(row['on'])} "
        f"| {_number(row['largest'])} | {_number(row['bound'])} |"
        for row in rows
    ]
    return HEAD + "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


if __name__ == "__main__":
    STORED.write_text(MEASURED.read_text(encoding="utf-8"), encoding="utf-8")
    PAGE.write_text(page(json.loads(MEASURED.read_text(encoding="utf-8"))), encoding="utf-8")
