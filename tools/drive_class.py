"""A student's side of the classroom in a real browser: `make class-browser`, after `make class-demo`.

Starts JupyterLab for somebody new in the class of build/class, fetches the set from nbgrader's assignment list, presses
*Validate* on the untouched notebook, and keeps a picture of each in build/browser.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

from tools.class_demo import ASSIGNMENTS, COURSE, environment
from tools.drive_lab import FLAGS, PICTURES, QUIET, ROOT, STARTS, chromium, free_port, running

CLASS = ROOT / "build" / "class"


@contextmanager
def student_lab(folder: Path) -> Iterator[str]:
    """JupyterLab in the new folder of a student whose class's exchange is that of the demo; its address."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(ASSIGNMENTS / "nbgrader_config.py", folder)
    port = free_port()
    options = f"--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --IdentityProvider.token="
    quiet = "--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
    command = [sys.executable, "-m", "jupyterlab", *options.split(), *quiet.split()]
    with running(command, port, cwd=folder, env=environment(folder.parent)) as address:
        yield address


def drive() -> None:
    """Fetch the set and validate it untouched: the button must say that it fails, and where."""
    if not (CLASS / "exchange").exists():
        raise SystemExit("There is no class to join: run `make class-demo` first.")
    PICTURES.mkdir(parents=True, exist_ok=True)
    [released] = (CLASS / "exchange" / COURSE / "outbound").iterdir()
    with student_lab(CLASS / "newcomer") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*FLAGS.split(), *QUIET.split()])
        page = browser.new_page(viewport={"width": 1300, "height": 1100})
        page.set_default_timeout(1000 * STARTS)
        page.goto(f"{address}/lab?reset")
        page.click(".lm-MenuBar-itemLabel:text-is('Nbgrader')")
        page.click(".lm-Menu-itemLabel:text-is('Assignment List')")
        page.wait_for_selector(f"#released_assignments_list:has-text('{released.name}')")
        page.screenshot(path=PICTURES / "class_1_assignment_list.png")
        page.click("#released_assignments_list button:has-text('Fetch')")
        page.wait_for_selector(f"#fetched_assignments_list:has-text('{released.name}')")
        page.screenshot(path=PICTURES / "class_2_fetched.png")
        page.goto(f"{address}/lab/tree/{released.name}/{released.name}.ipynb?reset")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        page.click("button:has-text('Validate'), jp-button:has-text('Validate')")
        page.wait_for_selector(".jp-Dialog:has-text('failed')")
        said = page.locator(".jp-Dialog").inner_text()
        assert "NotImplementedError" in said, said
        page.screenshot(path=PICTURES / "class_3_validate.png")
        browser.close()
    print(f"{released.name}: fetched from the assignment list, validated untouched: it fails. Pictures: build/browser")


if __name__ == "__main__":
    drive()
