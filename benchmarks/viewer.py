"""How quick the viewer is, beside minimal versions of it in Panel and Gradio, all in one run and one browser.

    python benchmarks/viewer.py [--peers PYTHON] [--model hyper-brain] [-o viewer.json]

First image after the server answers; a key on the slider to changed pixels (median, 95th percentile), read from the page's
own canvas at every animation frame; frames a second while the dial is dragged, and how long it settles after; what a frame costs
the page's main thread, in processor time (hardly depends on who else uses the machine); bytes for one change of the window; the
offline file at 320². `--peers` names a Python that has tunemri, panel and gradio. Needs chromium.
"""

from __future__ import annotations

import argparse
import json
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

import numpy as np

APPS = Path(__file__).with_name("viewer_apps.py")
KEYS = 30
PROBE = """
window.probe = {
  canvas(root = document) {
    for (const e of root.querySelectorAll('*')) {
      if (e.tagName === 'CANVAS' && e.width > 200) return e;
      const inner = e.shadowRoot && this.canvas(e.shadowRoot);
      if (inner) return inner;
    }
    return null;
  },
  signature() {
    const image = [...document.querySelectorAll('img')].find(i => i.naturalWidth === 256 && i.complete);
    if (image) return image.currentSrc;
    const canvas = document.querySelector('figure[data-pane=a] canvas') || this.canvas();
    if (!canvas) return '';
    const d = canvas.getContext('2d').getImageData(0, 0, canvas.width / 2, canvas.height / 2).data;
    let sum = 0, some = false;
    for (let i = 0; i < d.length; i += 16) { sum = (sum * 31 + d[i]) | 0; some ||= d[i] > 8; }
    return some ? String(sum) : '';
  },
  watch() {
    this.seen = []; this.last = this.signature();
    const look = () => {
      const s = this.signature();
      if (s && s !== this.last) { this.seen.push(performance.now()); this.last = s; }
      if (this.watching) requestAnimationFrame(look);
    };
    this.watching = true;
    requestAnimationFrame(look);
  },
  start: 0,
};
addEventListener('keydown', () => { probe.start = performance.now(); }, true);
addEventListener('pointerup', () => { probe.up = performance.now(); }, true);
"""


@contextmanager
def app(python: str, kind: str, model: str) -> Iterator[str]:
    """A running server: its link, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [python, str(APPS), kind, str(port), model], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        end = time.monotonic() + 180
        while kind != "tunemri":
            try:
                urllib.request.urlopen(link, timeout=60).read()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield link
    finally:
        process.terminate()
        process.wait(20)


def measure(browser: Any, link: str, kind: str) -> dict[str, Any]:
    """One visit: everything that the page on top says."""
    page = browser.new_context(viewport={"width": 1366, "height": 768}).new_page()
    page.add_init_script(PROBE)
    bytes_in = [0]
    page.on(
        "websocket", lambda ws: ws.on("framereceived", lambda data: bytes_in.__setitem__(0, bytes_in[0] + len(data)))
    )
    start = time.perf_counter()
    page.goto(link, wait_until="commit")
    until(page, "window.probe && probe.signature()")
    found: dict[str, Any] = {"first image [s]": time.perf_counter() - start}
    if kind == "tunemri":
        viewer = "document.getElementById('tunemri').viewer"
        until(page, f"[...{viewer}.ranges.values()].some(r => r.final && r.scores)", 300)
        found["range ready [s]"] = time.perf_counter() - start
        page.evaluate(f"{viewer}.root.focus()")
        found |= latencies(page, "key to pixels")
        found |= {f"{k}, exact": v for k, v in exact(page, viewer).items()}
        found |= dragged(page, "canvas.pad")
        page.wait_for_timeout(500)
        before, moment = bytes_in[0], page.evaluate(f"{viewer}.number")
        box = page.locator("figure[data-pane=a] canvas").bounding_box()
        page.mouse.move(box["x"] + 100, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + 150, steps=10)
        page.mouse.up()
        page.wait_for_timeout(300)
        assert page.evaluate(f"{viewer}.number") == moment
        found["bytes for a change of window"] = bytes_in[0] - before
    else:
        handle = ".noUi-handle" if kind == "panel" else "input[type=range]"
        page.locator(handle).first.focus()
        found |= latencies(page, "key to pixels")
        found |= dragged(page, handle)
    page.context.close()
    return found


def until(page: Any, expression: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not page.evaluate(f"!!({expression})"):
        if time.monotonic() > end:
            raise TimeoutError(expression)
        time.sleep(0.01)


def latencies(page: Any, name: str) -> dict[str, float]:
    """Single keys, each after the picture has come to rest."""
    times = []
    for _ in range(KEYS):
        page.evaluate("probe.watch()")
        page.keyboard.press("ArrowRight" if len(times) < KEYS // 2 else "ArrowLeft")
        until(page, "probe.seen.length")
        times.append(page.evaluate("probe.seen[0] - probe.start"))
        page.evaluate("probe.watching = false")
        page.wait_for_timeout(400)
    return {f"{name}, median [ms]": float(np.median(times)), f"{name}, 95 % [ms]": float(np.percentile(times, 95))}


def exact(page: Any, viewer: str) -> dict[str, float]:
    """Without the range: every frame is computed and sent."""
    page.evaluate(f"{viewer}.askRange = () => {{}}; {viewer}.ranges.clear(); {viewer}.exact.clear(); 0")
    kept = page.evaluate(f"{viewer}.a.want.dials")
    name = next(iter(kept))
    page.evaluate(f"{viewer}.turn({{{name}: {viewer}.dials()['{name}'].lo + .101}}); 0")
    page.wait_for_timeout(1500)
    found = latencies(page, "key to pixels")
    page.reload()
    until(page, "window.probe && probe.signature()")
    until(page, f"[...{viewer}.ranges.values()].some(r => r.final && r.scores)", 300)
    return found


def frame_work(page: Any) -> dict[str, float]:
    """Processor time of our page's main thread for a frame, from a move of the dial to what is handed over to be shown."""
    devtools, frames = page.context.new_cdp_session(page), 60
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        return next(
            m["value"] for m in devtools.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration"
        )

    before = spent()
    page.evaluate(
        """async frames => {
          const v = document.getElementById('tunemri').viewer, name = Object.keys(v.dials())[0], dial = v.dials()[name];
          for (let k = 1; k <= frames; k++) {
            v.turn({[name]: dial.lo + (dial.hi - dial.lo) * k / (frames + 1)}, {settled: false});
            await new Promise(requestAnimationFrame);
          }
          v.gesture = false;
        }""",
        frames,
    )
    return {"main thread for a frame [ms]": 1000 * (spent() - before) / frames}


def dragged(page: Any, selector: str, seconds: float = 3) -> dict[str, float]:
    """Frames that differ while the dial is dragged, and how long pictures keep coming after it is let go."""
    box = page.locator(selector).first.bounding_box()
    track = 200 if box["width"] < 60 else 0.6 * box["width"]  # a handle is dragged along its track
    x0 = box["x"] + (box["width"] / 2 if box["width"] < 60 else 0.2 * box["width"])
    y = box["y"] + box["height"] / 2
    page.mouse.move(x0, y)
    page.mouse.down()
    page.evaluate("probe.watch()")
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        i += 1
        page.mouse.move(x0 + track * (0.5 - 0.5 * np.cos(i / 25)), y + 0.2 * (i % 2))
        time.sleep(0.008)
    spent = time.perf_counter() - start
    frames = page.evaluate("probe.seen.length")
    page.evaluate("probe.seen = []")
    page.mouse.up()
    page.wait_for_timeout(3500)
    last = page.evaluate("probe.seen.length ? probe.seen.at(-1) - (probe.up || 0) : 0")
    page.evaluate("probe.watching = false")
    return {"drag [frames/s]": frames / spent, "settles after [ms]": max(0.0, last)}


def offline(browser: Any, model: str) -> dict[str, Any]:
    """The one-file viewer of a 320² slice: its size, and frames a second of a drag."""
    import tunemri  # noqa: F401  the apps beside this file need it as well
    from tunemri.evaluation import Contestant
    from tunemri.viewer import Session, export

    sys.path.insert(0, str(APPS.parent))
    from viewer_apps import scene

    scan, target, method = scene(model, (320, 320))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "range.html"
        facts = export(file, Session(scan, [Contestant(name=model, model=method)], reference=target))
        context = browser.new_context(viewport={"width": 1366, "height": 768})
        context.set_offline(True)
        page = context.new_page()
        page.add_init_script(PROBE)
        start = time.perf_counter()
        page.goto(file.as_uri())
        until(page, "window.probe && probe.signature()")
        found = {
            "size [MB]": facts["bytes"] / 1e6,
            "worst rebuild error [dB]": facts["checked_db"],
            "first image [s]": time.perf_counter() - start,
        }
        found |= dragged(page, "canvas.pad") | frame_work(page)
        context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", help="a Python with tunemri, panel and gradio")
    parser.add_argument("--model", default="hyper-brain")
    parser.add_argument("-o", "--output", type=Path, help="also as JSON")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium: apt-get install chromium")
    print(f"load average at the start {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rows: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for kind in ["tunemri", *(["panel", "gradio"] if options.peers else [])]:
            with app(sys.executable if kind == "tunemri" else options.peers, kind, options.model) as link:
                rows[kind] = measure(browser, link, kind)
            print(kind, {k: round(v, 2) for k, v in rows[kind].items()}, flush=True)
        rows["one file"] = offline(browser, options.model)
        print("one file", {k: v if v is None else round(v, 2) for k, v in rows["one file"].items()})
        browser.close()
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("\n| | " + " | ".join(rows) + " |\n|---|" + "---:|" * len(rows))
    for name in names:
        print(
            f"| {name} | "
            + " | ".join(f"{row[name]:.3g}" if row.get(name) is not None else "" for row in rows.values())
            + " |"
        )
    print(f"\nload average at the end {os.getloadavg()[0]:.1f}")
    if options.output:
        options.output.write_text(json.dumps({"load": os.getloadavg(), **rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
