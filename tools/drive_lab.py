"""Drive a lesson in real JupyterLab with headless Chromium: `make browser`.

Runs all cells, moves the slider and waits for another picture, gives an exercise a wrong and a right answer, and keeps
a picture of each step in build/browser.  Needs Chromium (`CHROMIUM=` names it) and the extra `browser`.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "build" / "browser"
FLAGS = "--no-sandbox --disable-gpu --disable-sync --no-first-run"
QUIET = "--disable-background-networking --disable-component-update"  # the browser itself asks for nothing
STARTS, RUNS = 300, 300  # seconds that the server and a lesson may take

# The exercise of lesson 11 that is answered here: its stub, a typical mistake, its hint, and the right answer.
STUB = "def my_gradient(x, y, theta): ..."
WRONG = "def my_gradient(x, y, theta): return 2 * x.T @ (x @ theta - y)"
HINT = "The loss is a mean: divide by the number of rows."
RIGHT = "def my_gradient(x, y, theta): return 2 / len(x) * x.T @ (x @ theta - y)"
TICK = "✓ 11.1"


@contextmanager
def jupyter_lab(lesson: str) -> Iterator[str]:
    """`make lab` on a free loopback port, stopped at the end; its address."""
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        private = {name: str(Path(home) / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
        settings = Path(home) / "JUPYTER_CONFIG_DIR/lab/user-settings/@jupyterlab"
        for extension, option in {
            "notebook-extension/tracker": '{"windowingMode": "none"}',  # every cell in the page
            "docmanager-extension/plugin": '{"autosave": false}',  # a picture is taken, the stored lesson stays
        }.items():
            file = settings / f"{extension}.jupyterlab-settings"
            file.parent.mkdir(parents=True)
            file.write_text(option)
        options = "--no-browser --allow-root --IdentityProvider.token= --ServerApp.port_retries=0"
        command = ["make", "lab", f"PORT={port}", f"ARGS={options}", f"LESSON=notebooks/{lesson}"]
        with running(command, port, cwd=ROOT, env={**os.environ, **private}) as address:
            yield address


@contextmanager
def running(command: list[str], port: int, **options: Any) -> Iterator[str]:
    """A Jupyter server, ready when the block begins and stopped when it ends; its address."""
    address = f"http://127.0.0.1:{port}"
    with open(PICTURES / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, **options)
        try:
            wait_until_up(address, server)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def free_port() -> int:
    """A loopback port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(address: str, server: subprocess.Popen) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + STARTS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=1)
            return
        except OSError:
            time.sleep(0.25)
    raise SystemExit(f"JupyterLab did not start in {STARTS} s: see {PICTURES / 'server.log'}")


class Lesson:
    """A lesson open in the browser."""

    def __init__(self, page: Page, address: str, name: str) -> None:
        self.page = page
        page.goto(f"{address}/lab/tree/{name}?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=1000 * STARTS)
        page.wait_for_selector(".jp-Toolbar-kernelName:has-text('Python 3')", timeout=1000 * STARTS)
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=1000 * STARTS)

    def picture(self, name: str) -> None:
        """Keep what the window shows."""
        self.page.screenshot(path=PICTURES / f"{name}.png")

    def run_all(self) -> None:
        """Run every cell and wait until the last one is done."""
        self.page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        self.page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        waiting = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(p => p.innerText.includes('*'))"
        self.page.wait_for_function(waiting, timeout=10_000)
        self.page.wait_for_function(f"!{waiting}", timeout=1000 * RUNS)

    def code(self, source: str) -> Locator:
        """The code cell whose source holds `source`; scrolled into view."""
        cell = self.page.locator(".jp-CodeCell", has=self.page.locator(f".cm-content:has-text({source!r})")).first
        cell.scroll_into_view_if_needed()
        return cell

    def answer(self, stub: str, answer: str) -> str:
        """Put `answer` in place of the cell's stub, run the cell, and return what it printed."""
        cell = self.code(stub)
        old = cell.locator(".jp-OutputArea-output").last.inner_text()
        editor = cell.locator(".cm-content")
        editor.locator(f".cm-line:has-text({stub!r})").click()
        self.page.keyboard.press("Home")
        self.page.keyboard.press("Shift+End")
        self.page.keyboard.insert_text(answer)
        self.page.keyboard.press("Control+Enter")
        output = self.code(answer).locator(".jp-OutputArea-output").last
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if output.count() and output.inner_text() != old:
                return output.inner_text()
            time.sleep(0.2)
        raise TimeoutError(f"the cell still prints {old!r}")

    def move_slider(self) -> None:
        """Move the first slider one step and wait until its picture is another one."""
        cell = self.page.locator(".jp-CodeCell", has=self.page.locator(".noUi-handle")).first
        cell.scroll_into_view_if_needed()
        before = cell.locator("img").first.get_attribute("src")
        cell.locator(".noUi-handle").first.click()
        for _ in range(5):
            self.page.keyboard.press("ArrowRight")
        self.page.wait_for_function(
            "([cell, before]) => cell.querySelector('img') && cell.querySelector('img').src !== before",
            arg=[cell.element_handle(), before],
            timeout=30_000,
        )


def chromium() -> str:
    """The browser's path."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if not found:
        raise SystemExit("Chromium was not found: install it (Debian: apt install chromium) or name it with CHROMIUM=.")
    return found


def drive(name: str) -> None:
    """Open the lesson, run it, move its slider and, in lesson 11, answer an exercise wrongly and rightly."""
    name = Path(name).name
    PICTURES.mkdir(parents=True, exist_ok=True)
    with jupyter_lab(name) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*FLAGS.split(), *QUIET.split()])
        page = browser.new_page(viewport={"width": 1200, "height": 1400})
        asked: set[str] = set()
        page.on("request", lambda request: asked.add(request.url))
        lesson = Lesson(page, address, name)
        lesson.picture("1_opened")
        lesson.run_all()
        errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count()
        assert not errors, f"{errors} cells failed"
        lesson.move_slider()
        time.sleep(1)
        lesson.picture("2_slider_moved")
        if name.startswith("11"):
            said = lesson.answer(STUB, WRONG)
            assert HINT in said, said
            lesson.picture("3_wrong_answer")
            said = lesson.answer(WRONG, RIGHT)
            assert TICK in said, said
            lesson.picture("4_right_answer")
        outside = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
        assert not outside, f"the page asked for {sorted(outside)}"
        browser.close()
    print(
        f"{name}: ran, its slider moved another picture in, nothing was asked of the network. Pictures: build/browser"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lesson", nargs="?", default="11_gradient_descent.ipynb")
    sys.exit(drive(parser.parse_args().lesson))
