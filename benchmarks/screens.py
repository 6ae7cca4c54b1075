"""The pictures of the viewer in the documentation: taken in a real browser from the embedded sample.

    python benchmarks/screens.py [-o docs]

Writes viewer.png, viewer-landscape.png, viewer-methods.png and viewer-kspace.png at 1366×768, and viewer-1920.png. Needs
chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tunemri import cli
from tunemri.viewer.server import listen, prepare

VIEWER = "document.getElementById('tunemri').viewer"


def until(page: Any, expression: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not page.evaluate(f"(() => {{ const v = {VIEWER}; return !!({expression}); }})()"):
        if time.monotonic() > end:
            raise TimeoutError(expression)
        time.sleep(0.05)


def settle(page: Any) -> None:
    until(page, "v.a.frame?.kind === 'exact' && v.matches(v.a) && v.b.frame?.kind === 'exact' && v.matches(v.b)")
    page.wait_for_timeout(600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).resolve().parents[1] / "docs")
    folder = parser.parse_args().output
    chromium = shutil.which("chromium") or sys.exit("no chromium: apt-get install chromium")
    session = cli._session(None, ["tv", "hyper-brain", "wavelet"], csm="low-resolution", reference=None)
    sock = listen(0)
    server, link = prepare(session, sock)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(link)
        until(page, "v && v.a?.frame?.kind === 'exact'")
        page.evaluate(f"{VIEWER}.askRange({VIEWER}.a.want, 0, true); 0")  # even where an image takes long
        until(page, "[...v.ranges.values()].some(r => r.final && r.scores?.axes[0].length === r.axes[0].length)")
        page.evaluate(f"{VIEWER}.turn({{lam: 0.0012}}); 0")
        page.keyboard.press("p")
        page.evaluate(f"{VIEWER}.turn({{lam: 0.016}}); 0")
        page.evaluate(
            f"Object.assign({VIEWER}.view, {{zoom: 2.1, x: .5, y: .47}}); {VIEWER}.setRoi({{x: 110, y: 112, r: 6}}); 0"
        )
        page.keyboard.press("k")
        page.keyboard.type("ventricles clear, cortex flat")
        page.evaluate(f"{VIEWER}.root.focus(); {VIEWER}.within.value = '3'; {VIEWER}.pick(); {VIEWER}.redraw(); 0")
        settle(page)
        page.screenshot(path=folder / "viewer.png")
        page.set_viewport_size({"width": 1920, "height": 1080})
        page.wait_for_timeout(600)
        page.screenshot(path=folder / "viewer-1920.png")
        page.set_viewport_size({"width": 1366, "height": 768})
        page.keyboard.press("r")
        page.evaluate(f"{VIEWER}.setRoi(null); 0")
        for tab in ("landscape", "methods", "k-space"):
            page.click(f"[data-tab='{tab}']")
            if tab == "methods":
                until(page, "v.rows.every(w => w.frame?.kind === 'exact') && v.truth")
            if tab == "k-space":
                until(page, "v.spectrum")
            page.wait_for_timeout(800)
            page.screenshot(path=folder / f"viewer-{tab.replace('-', '')}.png")
        browser.close()
    server.should_exit = True
    thread.join(10)


if __name__ == "__main__":
    main()
