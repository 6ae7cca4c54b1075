"""The viewer in a real browser: mouse and keys in, pixels out, compared with what `tunemri recon` writes."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from laws import scan
from test_viewer import Posterior, Slow, served
from tunemri import cli, formats
from tunemri.evaluation import Contestant
from tunemri.methods import Dial, Reconstructor, reconstruct
from tunemri.methods.hyperrecon import HyperRecon
from tunemri.scan import Reconstruction
from tunemri.simulate import phantom
from tunemri.viewer import Session, export, server

sync_playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").sync_playwright
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
SHAPE, SLICES = (48, 40), 3


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "a scan.h5"
    truth = torch.stack([phantom(SHAPE, seed=b) for b in range(SLICES)]).to(torch.complex64)
    formats.write(path, scan(SHAPE, coils=2, slices=SLICES, noise=0.02), reference=truth)
    return path


def test_a_slider_of_the_page_is_the_dial(browser):
    """Linear, logarithmic and measured sliders, both ways, to the four digits that the page rounds to."""
    dials = [
        Dial(sentence="s", default=0.5),
        Dial(sentence="s", default=0.5, curve=(0.0, 0.02, 0.3, 1.0)),
        Dial(sentence="s", default=1.0, lo=0.001, hi=10.0, scale="log"),
        Dial(sentence="s", default=1.0, lo=0.001, hi=10.0, scale="log", curve=(0.001, 0.5, 0.7, 1.2, 10.0)),
    ]
    places = [0.0, 0.1, 0.25, 0.4, 0.5, 0.77, 1.0]
    script = (Path(server.__file__).parent / "static" / "viewer.js").read_text(encoding="utf-8")
    page = browser.new_page()
    page.goto("about:blank")
    values, back = page.evaluate(
        """async ([script, dials, places]) => {
            const m = await import(URL.createObjectURL(new Blob([script], {type: "text/javascript"})));
            const values = dials.map(d => places.map(p => m.valueAt(d, p)));
            return [values, dials.map((d, i) => values[i].map(v => m.position(d, v)))];
        }""",
        [script, [dial.as_dict() for dial in dials], places],
    )
    for dial, row, where in zip(dials, values, back, strict=True):
        assert row == pytest.approx([dial.at(p) for p in places], rel=1e-3)
        assert where == pytest.approx([dial.position(v) for v in row], abs=1e-6)
        assert where == pytest.approx(places, abs=1e-3)
    page.close()


def run(*words: object) -> None:
    """A command, in this process."""
    before, argv = signal.getsignal(signal.SIGTERM), sys.argv
    sys.argv = ["tunemri", *map(str, words)]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        cli.main([str(w) for w in words])
    sys.argv = argv
    signal.signal(signal.SIGTERM, before)
    assert not stop.value.code


class Page:
    """An open viewer, and short words for what tests do with it."""

    def __init__(self, browser, link: str, *, offline: bool = False) -> None:
        self.context = browser.new_context(viewport={"width": 1366, "height": 768}, accept_downloads=True)
        self.context.set_offline(offline)
        self.page = self.context.new_page()
        self.hosts: set[str] = set()
        self.trouble: list[str] = []
        self.sent: list[str] = []
        self.page.on("request", lambda r: self.hosts.add(f"{urlsplit(r.url).scheme}:{urlsplit(r.url).hostname}"))
        self.page.on("pageerror", lambda e: self.trouble.append(str(e)))
        self.page.on("console", lambda m: self.trouble.append(m.text) if m.type == "error" else None)
        self.page.on("websocket", lambda ws: ws.on("framesent", lambda data: self.sent.append(str(data))))
        self.page.goto(link)
        self.until("v.a && v.a.frame && v.window")

    def js(self, expression: str):
        return self.page.evaluate(
            f"(() => {{ const v = document.getElementById('tunemri').viewer; return {expression}; }})()"
        )

    def until(self, expression: str, seconds: float = 30):
        end = time.monotonic() + seconds
        while not (found := self.js(f"!!({expression})")):
            assert time.monotonic() < end, f"{expression}; {self.trouble}; {self.caption()}"
            time.sleep(0.02)
        return found

    def exact(self) -> np.ndarray:
        """Pane A once it is exact, complex."""
        self.until("v.a.frame?.kind === 'exact' && v.matches(v.a) && !v.dirty.size")
        return self.data("v.a.frame")

    def data(self, frame: str) -> np.ndarray:
        numbers = f"new Uint8Array(Float32Array.from({frame}.data).buffer)"
        text = self.js(f"btoa(Array.from({numbers}, x => String.fromCharCode(x)).join(''))")
        return np.frombuffer(base64.b64decode(text), np.complex64).reshape(self.js(f"[{frame}.height, {frame}.width]"))

    def pixels(self, canvas: str) -> np.ndarray:
        self.settle()
        text = self.js(f"{canvas}.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.split(",")[1]))).convert("RGB"))

    def settle(self) -> None:
        self.page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def caption(self, pane: str = "a") -> str:
        return self.page.inner_text(f"figure[data-pane={pane}] figcaption")

    def box(self, selector: str) -> dict[str, float]:
        return self.page.locator(selector).bounding_box()

    def drag(
        self, selector: str, start: tuple[float, float], end: tuple[float, float], button: str = "left", steps: int = 8
    ) -> None:
        b, mouse = self.box(selector), self.page.mouse
        mouse.move(b["x"] + start[0] * b["width"], b["y"] + start[1] * b["height"])
        mouse.down(button=button)
        mouse.move(b["x"] + end[0] * b["width"], b["y"] + end[1] * b["height"], steps=steps)
        mouse.up(button=button)
        self.settle()

    def download(self, button: str, into: Path) -> bytes:
        with self.page.expect_download() as got:
            self.page.click(f"button:has-text('{button}'):visible")
        got.value.save_as(into)
        return into.read_bytes()

    def close(self) -> None:
        self.context.close()
        assert not self.trouble, self.trouble


PANE_A = "figure[data-pane=a] canvas"


@pytest.fixture(scope="module")
def opened(browser, file):
    session = cli._session(file, ["sense", "tv"], csm="low-resolution", reference=None)
    with served(session) as link:
        page = Page(browser, link)
        yield page
        assert page.hosts == {"http:127.0.0.1"}, "a request left this machine"
        page.close()


@pytest.fixture
def viewer(opened):
    """The viewer as it starts: slice 1, SENSE at its default as A, TV as B."""
    opened.page.keyboard.press("Escape")
    opened.page.evaluate(
        """() => {
          const v = document.getElementById('tunemri').viewer;
          v.show('tune');
          v.toSlice(1);
          v.go({model: 0, slice: 1, dials: v.starts(0)});
          Object.assign(v.b, {want: {model: 1, slice: 1, dials: v.starts(1)}});
          v.refresh(v.b, 0);
          v.setPart('magnitude');
          Object.assign(v, {swipe: undefined, kept: [], inverted: false, perPane: false, own: {}, coil: ''});
          v.setRoi(null);
          v.buildKept();
          v.resetView();
          v.autoWindow();
          v.root.focus();
        }"""
    )
    opened.exact()
    return opened


def command_of(viewer: Page, out: Path) -> np.ndarray:
    """What the copied command writes."""
    words = shlex.split(viewer.js("v.command()"))
    assert words[0] == "tunemri"
    run(*[str(out) if w == "out.h5" else w for w in words[1:]])
    return np.load(out)[0]


def test_dials_moved_by_mouse_and_keys_give_exactly_the_image_of_the_command_line(viewer, tmp_path):
    viewer.drag("input[type=range][aria-label=lam]", (0.5, 0.5), (0.8, 0.5))
    lam = viewer.js("v.a.want.dials.lam")
    assert 0.05 < lam < 0.4
    image = viewer.exact()
    assert np.array_equal(image, command_of(viewer, tmp_path / "a.npy"))
    assert f"lam {lam:.3g}"[:8] in viewer.caption()
    assert "exact" in viewer.caption()

    viewer.js("v.root.focus()")
    viewer.page.keyboard.press("ArrowLeft")
    viewer.page.keyboard.press("Shift+ArrowLeft")
    assert viewer.js("v.a.want.dials.lam") == pytest.approx(lam * 10000**-0.11, rel=2e-3)
    moved = viewer.exact()
    assert np.array_equal(moved, command_of(viewer, tmp_path / "b.npy"))
    assert not np.array_equal(moved, image)
    viewer.page.keyboard.press("u")
    viewer.page.keyboard.press("u")
    assert np.array_equal(viewer.exact(), image)

    viewer.drag("canvas.pad", (0.2, 0.5), (0.4, 0.5))
    assert viewer.js("v.a.want.dials.lam") < lam / 5
    assert np.array_equal(viewer.exact(), command_of(viewer, tmp_path / "c.npy"))


def test_pixels_are_the_image_through_the_window(viewer):
    """What the screen shows, from numbers: grey = 255 (|x| - low) / (high - low)."""
    x, window = np.abs(viewer.exact()), viewer.js("v.window")
    grey = np.clip(np.floor((x - window["lo"]) * 255.999 / (window["hi"] - window["lo"])), 0, 255)
    seen = viewer.pixels("v.panes.a.picture.canvas")
    assert seen.shape == (*SHAPE, 3)
    assert np.abs(seen[..., 0].astype(int) - grey).max() <= 1  # float32 against float64, at a step
    assert np.ptp(seen.astype(int), axis=2).max() == 0


def test_windowing_changes_pixels_in_both_panes_and_asks_the_server_nothing(viewer):
    viewer.until("v.matches(v.b) && v.b.frame.kind === 'exact'")
    time.sleep(0.5)
    before, asked = {p: viewer.pixels(f"v.panes.{p}.canvas") for p in "ab"}, len(viewer.sent)
    window = viewer.js("v.window")
    viewer.drag(PANE_A, (0.3, 0.5), (0.7, 0.7))
    moved = viewer.js("v.window")
    assert moved["hi"] - moved["lo"] > 1.2 * (window["hi"] - window["lo"])
    for p in "ab":
        assert not np.array_equal(viewer.pixels(f"v.panes.{p}.canvas"), before[p])
    viewer.js("v.turn({lam: .05})")
    viewer.exact()
    assert viewer.js("v.window") == moved, "the window never changes with a dial"
    viewer.js("v.turn({lam: .02})")
    viewer.exact()
    asked = len(viewer.sent)
    viewer.page.dblclick(PANE_A)
    assert viewer.js("v.window") == window
    assert len(viewer.sent) == asked


def test_zoom_and_move_are_joint(viewer):
    viewer.page.keyboard.press("p")
    viewer.until("v.matches(v.b)")
    b = viewer.box(PANE_A)
    viewer.page.mouse.move(b["x"] + b["width"] / 3, b["y"] + b["height"] / 3)
    viewer.page.keyboard.down("Control")
    viewer.page.mouse.wheel(0, -400)
    viewer.page.keyboard.up("Control")
    viewer.until("v.view.zoom > 2")
    viewer.drag(PANE_A, (0.5, 0.5), (0.6, 0.6), button="middle")
    viewer.drag(PANE_A, (0.5, 0.5), (0.5, 0.4), button="right")
    assert viewer.js("v.view.zoom") > 2.8
    viewer.page.mouse.move(5, 5)
    one, two = viewer.pixels("v.panes.a.canvas"), viewer.pixels("v.panes.b.canvas")
    assert np.array_equal(one, two)
    assert one.std() > 5
    viewer.page.keyboard.press("r")
    assert viewer.js("v.view.zoom") == 1


def test_pin_flicker_swap_and_swipe(viewer):
    viewer.page.keyboard.press("p")
    viewer.page.keyboard.press("Shift+ArrowRight")
    viewer.page.keyboard.press("Shift+ArrowRight")
    viewer.exact()
    viewer.until("v.b.frame.kind === 'exact'")
    viewer.page.mouse.move(5, 5)
    a, b = viewer.pixels("v.panes.a.canvas"), viewer.pixels("v.panes.b.canvas")
    assert not np.array_equal(a, b)
    viewer.page.keyboard.down(" ")
    assert np.array_equal(viewer.pixels("v.panes.a.canvas"), b)
    assert viewer.caption().startswith("B")
    viewer.page.keyboard.up(" ")
    assert np.array_equal(viewer.pixels("v.panes.a.canvas"), a)
    viewer.page.keyboard.press("w")
    half = viewer.pixels("v.panes.a.canvas")
    middle = a.shape[1] // 2
    top = slice(40, -40)  # between the corner texts
    assert np.array_equal(half[top, : middle - 3], a[top, : middle - 3])
    assert np.array_equal(half[top, middle + 3 :], b[top, middle + 3 :])
    viewer.page.keyboard.press("w")
    viewer.page.keyboard.press("s")
    assert np.array_equal(viewer.pixels("v.panes.a.canvas"), b)
    assert np.array_equal(viewer.pixels("v.panes.b.canvas"), a)


def test_one_pane_may_have_a_window_of_its_own_and_says_so(viewer):
    viewer.until("v.matches(v.b) && v.b.frame.kind === 'exact' && v.rangeOf(v.a.want)?.final && v.gallery.length", 60)
    viewer.page.mouse.move(5, 5)
    before, shared = {p: viewer.pixels(f"v.panes.{p}.canvas") for p in "ab"}, viewer.js("v.window")
    viewer.page.keyboard.down("Control")
    viewer.drag(PANE_A, (0.3, 0.5), (0.6, 0.6))
    viewer.page.keyboard.up("Control")
    viewer.page.mouse.move(5, 5)
    assert not np.array_equal(viewer.pixels("v.panes.a.canvas"), before["a"])
    assert np.array_equal(viewer.pixels("v.panes.b.canvas"), before["b"])
    assert viewer.js("v.window") == shared
    assert "own" in viewer.js("v.panes.a.scale")
    assert "own" not in viewer.js("v.panes.b.scale")
    viewer.page.dblclick(PANE_A)
    viewer.page.mouse.move(5, 5)
    assert np.array_equal(viewer.pixels("v.panes.a.canvas"), before["a"])
    viewer.page.click("button:has-text('per pane'):visible")
    for pane in "ab":
        plane = np.abs(viewer.data(f"v.{pane}.frame"))
        own = viewer.js(f"v.own.{pane}")
        assert own["hi"] == pytest.approx(np.quantile(plane, 0.995), rel=0.02)
    viewer.page.click("button:has-text('per pane'):visible")
    assert viewer.js("Object.keys(v.own).length") == 0


def test_a_circle_is_measured_in_both_panes_and_their_difference_and_along_the_dial(viewer):
    viewer.until("v.matches(v.b) && v.b.frame.kind === 'exact' && v.rangeOf(v.a.want)?.final", 60)
    viewer.page.keyboard.down("Alt")
    viewer.drag(PANE_A, (0.45, 0.45), (0.55, 0.5))
    viewer.page.keyboard.up("Alt")
    roi = viewer.js("v.roi")
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    inside = (x - roi["x"]) ** 2 + (y - roi["y"]) ** 2 <= roi["r"] ** 2
    assert inside.sum() >= 5
    a, b = np.abs(viewer.exact()), np.abs(viewer.data("v.b.frame"))
    viewer.settle()
    for pane, plane in (("a", a), ("b", b), ("c", a - b)):
        found = viewer.js(f"v.panes.{pane}.measured")
        assert found["count"] == inside.sum()
        assert found["mean"] == pytest.approx(plane[inside].mean(), abs=1e-5)
        assert found["sd"] == pytest.approx(plane[inside].std(ddof=1), abs=1e-5)
    probed = viewer.js("v.rangeOf(v.a.want).probe(v.rangeOf(v.a.want).at(v.a.want.dials), v.roiPixels)")
    assert probed["mean"] == pytest.approx(a[inside].mean(), rel=0.02)
    viewer.page.select_option("aside label:has-text('behind it') select", "roi-mean")
    viewer.settle()
    assert viewer.js("!!v.curve")
    viewer.page.select_option("aside label:has-text('behind it') select", "psnr")
    viewer.page.keyboard.down("Alt")
    viewer.page.click(PANE_A)
    viewer.page.keyboard.up("Alt")
    assert viewer.js("v.roi === null && v.panes.a.measured === null || !v.roi")


def test_kspace_has_a_zoom_of_its_own_and_a_choice_of_coil(viewer):
    viewer.page.click("[data-tab='k-space']")
    viewer.until("v.spectrum && v.ringsOf === v.spectrum")
    everything = viewer.js("v.spectrum.arrays.image.reduce((s, x) => s + x * x, 0)")
    parts = []
    for coil in ("0", "1"):
        viewer.page.select_option(".kspace select", coil)
        viewer.until(f"v.spectrum.coil === {coil}")
        parts.append(viewer.js("v.spectrum.arrays.image.reduce((s, x) => s + x * x, 0)"))
    assert sum(parts) == pytest.approx(everything, rel=1e-4)
    before = viewer.pixels("v.kpanes.image.canvas")
    box = viewer.box(".kspace canvas >> nth=0")
    viewer.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    viewer.page.mouse.wheel(0, -400)
    viewer.until("v.kview.zoom > 2")
    assert viewer.js("v.view.zoom") == 1, "that of the image is another"
    assert not np.array_equal(viewer.pixels("v.kpanes.image.canvas"), before)
    said = viewer.page.inner_text(".kspace figcaption >> nth=0")
    assert re.search(r"\(-?\d, -?\d\)", said), "near zero frequency, in the centre"
    centre = viewer.js("[v.kview.x, v.kview.y]")
    viewer.drag(".kspace canvas >> nth=0", (0.5, 0.5), (0.6, 0.4))
    moved = viewer.js("[v.kview.x, v.kview.y]")
    scale = viewer.js("v.scaleOf(v.kpanes.image.canvas, v.kview, 1).x") * SHAPE[1]
    assert moved[0] == pytest.approx(centre[0] - 0.1 * box["width"] / scale, abs=0.01)
    assert moved[1] > centre[1]
    viewer.page.dblclick(".kspace canvas >> nth=0")
    assert viewer.js("v.kview.zoom") == 1
    viewer.page.check(".kspace input[type=checkbox]")
    viewer.settle()
    assert (viewer.pixels("v.kpanes.image.picture.canvas").max(2) == 0).mean() > 0.3, "what was not sampled is black"
    viewer.page.uncheck(".kspace input[type=checkbox]")
    viewer.page.click("[data-tab='tune']")


def test_a_setting_is_picked_without_ground_truth_and_the_reason_is_kept(viewer):
    viewer.page.click("button:has-text('pick for me')")
    viewer.until("!v.choosing && !v.pickedText.hidden", 60)
    viewer.exact()
    assert "predicts held-out k-space best" in viewer.page.inner_text(".picked")
    viewer.js("v.root.focus()")
    viewer.page.keyboard.press("k")
    assert "predicts held-out k-space best" in viewer.js("v.kept[0].note")
    viewer.js("v.turn({lam: .5})")
    viewer.settle()
    assert not viewer.page.is_visible(".picked"), "the reason belongs to that setting alone"


def test_a_range_that_would_take_long_is_made_only_if_asked_for(viewer):
    viewer.exact()
    sent = len(viewer.sent)
    viewer.js("v.ranges.clear() || v.seconds.set(v.rangeKey(0, '', v.a.want.dials), 20) && v.askRange(v.a.want, 0)")
    viewer.until("v.unmade.startsWith('no range yet: 20 s')")
    time.sleep(0.3)
    assert not any('"range"' in text for text in viewer.sent[sent:])
    viewer.js("v.redraw()")
    viewer.page.click("button:has-text('make it'):visible")
    viewer.until("v.rangeOf(v.a.want)?.final && v.rangeOf(v.a.want).scores", 60)


def test_a_variance_lights_up_its_tab_and_a_certificate_its_report(browser):
    s = Session(
        scan(SHAPE, noise=0.02), [Contestant(name="posterior", model=Posterior())], reference=phantom(SHAPE)[None]
    )
    with served(s) as link:
        v = Page(browser, link)
        v.exact()
        assert not v.page.is_visible("[data-tab='uncertainty']")
        v.page.select_option("aside .dial select", "mmse")
        v.until("v.a.frame.kind === 'exact' && v.a.frame.arrays?.std")
        v.page.click("[data-tab='uncertainty']")
        v.until("v.truth && v.std && !v.dirty.size")
        v.settle()
        seen, sd = v.pixels("v.std.map.picture.canvas"), np.abs(v.data("v.a.frame")) / 2
        assert np.corrcoef(seen.sum(2, dtype=float).ravel(), sd.ravel())[0, 1] > 0.9
        error, truth = np.abs(np.abs(v.data("v.a.frame")) - s.reference[0].abs().numpy()), s.reference[0].abs().numpy()
        share = 100 * (error <= sd)[truth > 0.05 * np.quantile(truth, 0.995)].mean()
        assert f"within 1 sd: {share:.0f} %" in v.page.inner_text(".uncertainty figure:nth-child(4) .facts")
        assert "r hat\t1.02" in v.page.inner_text(".uncertainty table")
        first = v.pixels("v.std.draws.picture.canvas")
        v.page.click(".uncertainty button[title='the next']")
        assert not np.array_equal(v.pixels("v.std.draws.picture.canvas"), first)
        assert "is not in the data" in v.page.inner_text(".uncertainty figure:nth-child(3) .facts")
        v.page.click(".uncertainty button[title='the next']")
        assert np.array_equal(v.pixels("v.std.draws.picture.canvas"), first), "there are two, in turn"
        grey = v.pixels("v.std.mean.canvas")
        v.page.locator(".uncertainty input[type=range]").fill("0.5")
        assert np.ptp(grey.astype(int), axis=2).max() == 0
        assert np.ptp(v.pixels("v.std.mean.canvas").astype(int), axis=2).max() > 30, "colour where it is uncertain"
        v.page.click("[data-tab='report']")
        assert "Ψ never rises" in v.page.inner_text(".report")
        assert "gradient 1" in v.page.inner_text(".report")
        assert v.pixels("v.sections.report.querySelector('canvas')").std() > 10
        levels = "[{sigma: 1, iterations: 2, objective: [3, 2, 2]}, {sigma: .1, iterations: 2, objective: [3, 2, 2.5]}]"
        rows = v.js(f"[...v.descents({{levels: {levels}}}).querySelectorAll('tr')].map(r => r.lastChild.textContent)")
        assert rows == ["never rises", "yes", "NO"]
        v.close()


def test_the_difference_is_signed_and_black_where_equal(viewer):
    viewer.page.keyboard.press("p")
    viewer.until("v.matches(v.b)")
    assert viewer.pixels("v.panes.c.picture.canvas").max() == 0
    viewer.page.keyboard.press("t")
    viewer.until("v.b.truth")
    d = np.abs(viewer.exact()) - np.abs(viewer.data("v.b.frame"))
    seen = viewer.pixels("v.panes.c.picture.canvas").astype(int)
    top = 0.1 * (viewer.js("v.window.hi - v.window.lo"))
    assert (seen[..., 0] > seen[..., 2])[d > 0.3 * top].all(), "orange: A is brighter"
    assert (seen[..., 0] < seen[..., 2])[d < -0.3 * top].all(), "blue: A is darker"


def test_complex_parts(viewer):
    x = viewer.exact()
    for key, part in {"g": np.angle, "h": np.real, "j": np.imag, "m": np.abs}.items():
        viewer.page.keyboard.press(key)
        viewer.settle()
        plane = np.array(viewer.js("Array.from(v.plane(v.a.frame))")).reshape(SHAPE)
        assert np.allclose(plane, part(x), atol=1e-5)


def test_wheel_and_keys_change_the_slice(viewer, tmp_path):
    b = viewer.box(PANE_A)
    viewer.page.mouse.move(b["x"] + 50, b["y"] + 50)
    viewer.page.mouse.wheel(0, 100)
    viewer.until("v.slice === 2")
    assert np.array_equal(viewer.exact(), command_of(viewer, tmp_path / "s2.npy"))
    viewer.page.keyboard.press("Shift+N")
    viewer.page.keyboard.press("Shift+N")
    viewer.until("v.slice === 0")
    assert np.array_equal(viewer.exact(), command_of(viewer, tmp_path / "s0.npy"))


def test_nothing_of_another_slice_stays_or_comes_late(viewer):
    viewer.until("v.gallery.length && v.rangeOf(v.a.want).final", 60)
    viewer.exact()
    viewer.page.keyboard.press("t")
    viewer.until("v.b.truth")
    late = viewer.page.evaluate(
        """() => {
          const v = document.getElementById('tunemri').viewer;
          const image = f => Object.assign(f.data.slice(), {shape: [f.height, f.width]});
          const answer = (slot, f) => ({...f, slot, type: 'image', number: 0, arrays: {image: image(f)}});
          const old = [answer('a', v.a.frame), answer('reference', v.b.frame)];
          v.toSlice(0);
          v.toSlice(2);
          const gallery = v.gallery.length, tiles = v.tiles.children.length;
          old.forEach(o => v.receive(o));
          return [v.a.frame && v.a.frame.slice, v.b.frame && v.b.frame.slice, v.truth && v.truth.slice, gallery, tiles];
        }"""
    )
    assert late[2:] in ([None, 0, 0], [None, 6, 6]), "no reference, and no tiles but those of this very slice"
    assert set(late[:2]) <= {None, 2}
    viewer.until("v.b.truth && v.b.frame.slice === 2")
    assert viewer.js("v.gallery.every(g => g.want.slice === 2)")


def test_the_difference_of_two_phases_is_at_most_half_a_turn(viewer):
    viewer.page.keyboard.press("p")
    viewer.page.keyboard.press("Shift+ArrowRight")
    viewer.exact()
    viewer.until("v.matches(v.b) && v.b.frame.kind === 'exact'")
    viewer.page.keyboard.press("g")
    viewer.settle()
    a, b = viewer.data("v.a.frame"), viewer.data("v.b.frame")
    rms = float(np.sqrt(np.mean(np.angle(a * b.conj()) ** 2)))
    said = viewer.page.inner_text("figure[data-pane=c] .facts")
    assert float(said.split()[1]) == pytest.approx(rms, rel=0.06)
    assert said.split()[2].startswith("rad")
    viewer.page.keyboard.press("j")
    viewer.settle()
    assert viewer.js("v.panes.a.scale").startswith("imaginary"), "the window of a signed part lies about zero"


def test_a_swipe_names_both_and_a_lost_key_release_ends_the_flicker(viewer):
    viewer.until("v.b.frame")
    viewer.page.keyboard.press("w")
    viewer.settle()
    assert "sense lam 0.02 | B tv" in viewer.caption()
    viewer.page.keyboard.press("w")
    viewer.page.keyboard.down(" ")
    assert viewer.js("v.flick")
    viewer.page.evaluate("window.dispatchEvent(new Event('blur'))")
    assert not viewer.js("v.flick")
    viewer.page.keyboard.up(" ")


def test_kept_settings_come_back_by_the_command_line(viewer, tmp_path):
    viewer.page.keyboard.press("k")
    viewer.page.keyboard.type("first, the default")
    viewer.js("v.root.focus()")
    viewer.js("v.turn({lam: .0123})")
    image = viewer.exact()
    viewer.page.keyboard.press("k")
    viewer.page.keyboard.type("sharper <b>k u p</b>")
    path = tmp_path / "picks.json"
    picks = json.loads(viewer.download("export kept", path))
    assert [p["note"] for p in picks["picks"]] == ["first, the default", "sharper <b>k u p</b>"]
    run("recon", "--from", f"{path}#2", "-o", tmp_path / "again.npy")
    assert np.array_equal(np.load(tmp_path / "again.npy")[0], image)
    run("recon", "--from", path, "-o", tmp_path / "first.npy")
    assert not np.array_equal(np.load(tmp_path / "first.npy")[0], image)
    # Picks and scan, sent to somebody: the path in the picks leads nowhere there.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(picks["scan"], moved)
    picks["scan"] = f"/nowhere/{Path(picks['scan']).name}"
    (moved / "picks.json").write_text(json.dumps(picks))
    run("recon", "--from", f"{moved / 'picks.json'}#2", "-o", moved / "again.npy")
    assert np.array_equal(np.load(moved / "again.npy")[0], image)
    viewer.page.click("ol.kept li:first-child button:first-child")
    assert viewer.js("v.a.want.dials.lam") == 0.02
    viewer.exact()


def test_exported_pictures_and_arrays_say_what_they_are(viewer, tmp_path):
    image = viewer.exact()
    viewer.download("save NPY", tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), image)
    viewer.download("save PNG", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["Command"] == viewer.js("v.command()")
        assert picture.width > 900
        assert np.asarray(picture.convert("L")).std() > 10


def test_gallery_best_and_tabs(viewer):
    viewer.until("v.gallery.length >= 3 && v.rangeOf(v.a.want).final", 60)
    viewer.page.keyboard.press("3")
    assert viewer.js("v.a.want.dials.lam") == viewer.js("v.gallery[2].want.dials.lam")
    viewer.page.click("button:has-text('★ best'):visible")
    best = viewer.js("v.rangeOf(v.a.want).best('psnr', true).value")
    viewer.exact()
    assert viewer.js("v.a.frame.metrics.psnr") == pytest.approx(best, abs=0.3)
    shown = [
        t
        for t in ("tune", "landscape", "uncertainty", "methods", "k-space", "report")
        if viewer.page.is_visible(f"[data-tab='{t}']")
    ]
    assert shown == ["tune", "landscape", "methods", "k-space", "report"], "no method here offers an uncertainty"
    for tab in shown[1:]:
        viewer.page.click(f"[data-tab='{tab}']")
        viewer.until(f"v.sections['{tab}'].children.length && !v.sections['{tab}'].hidden")
    viewer.page.click("[data-tab='k-space']")
    viewer.until("v.spectrum && v.sections['k-space'].querySelector('canvas')")
    assert viewer.page.is_visible("text=not for diagnosis")
    viewer.page.click("[data-tab='tune']")


def test_a_lost_connection_comes_back_with_the_dials_where_they_were(viewer, tmp_path):
    viewer.until("v.rangeOf(v.a.want)", 60)
    # While it is lost, at least a quarter of a second: the banner, and a move of the dial.
    said = viewer.page.evaluate(
        """async () => {
          const v = document.getElementById('tunemri').viewer;
          v.link.drop();
          while (v.open) await new Promise(r => setTimeout(r, 1));
          v.turn({lam: .0517});
          const banner = v.banner.hidden ? '' : v.banner.textContent;
          v.drawPanes();
          return [banner, v.panes.a.what.textContent, v.panes.a.chip.textContent];
        }"""
    )
    assert "Lost the server" in said[0]
    assert said[1:] == ["sense lam 0.0517", "preview"]
    viewer.until("v.open", 15)
    assert viewer.js("v.a.want.dials.lam") == 0.0517
    assert np.array_equal(viewer.exact(), command_of(viewer, tmp_path / "again.npy"))


def test_a_slow_method_shows_a_preview_at_once_then_the_exact_image_and_can_be_stopped(browser):
    model = Slow(4)
    s = Session(scan((24, 24), noise=0.02), [Contestant(name="slow", model=model)], title="slow")
    with served(s) as link:
        v = Page(browser, link)
        v.until("v.rangeOf(v.a.want)?.final", 60)
        model.steps = 250
        v.js("v.root.focus()")
        v.page.keyboard.press("Shift+ArrowRight")
        v.until("v.a.frame.dials.shade === .6")
        v.settle()
        assert "preview" in v.caption()
        assert v.page.is_visible("button:has-text('stop, keep the preview')") or v.until(
            "v.work.textContent.includes('stop, keep the preview')", 3
        )
        assert v.exact() is not None
        v.settle()
        assert "exact" in v.caption()
        # Stale frames: many moves while one is computed; whatever is shown says what it is, and the last one wins.
        for _ in range(8):
            v.page.keyboard.press("ArrowLeft")
            v.settle()
            assert v.js("v.a.frame.dials.shade === v.a.want.dials.shade")
        v.until("v.work.querySelector('button')", 5)
        v.page.click("button:has-text('stop, keep the preview')")
        v.until("!v.a.number")
        assert v.js("v.a.frame.kind") == "preview"
        v.close()


class TwoDials(Reconstructor):
    """Brightness and left-to-right shading; two numbers and a word."""

    def forward(
        self, y, A, *, shade: Annotated[float, Dial(sentence="brightness", default=0.5)] = 0.5,
        tilt: Annotated[float, Dial(sentence="left to right", default=0.01, lo=0.001, hi=0.1, scale="log")] = 0.01,
        sign: Annotated[str, Dial(sentence="which way", default="up", choices=("up", "down"))] = "up",
    ):  # fmt: skip
        x = A.H(y)
        ramp = torch.linspace(-1, 1, x.shape[-1]) * tilt * (1 if sign == "up" else -1)
        return Reconstruction(image=x * (shade + ramp), dials={"shade": shade, "tilt": tilt, "sign": sign})


def test_a_pad_turns_two_dials_at_once_and_a_word_has_a_menu(browser):
    s = Session(scan(SHAPE, noise=0.02), [Contestant(name="two", model=TwoDials())], reference=phantom(SHAPE)[None])
    with served(s) as link:
        v = Page(browser, link)
        v.until("v.rangeOf(v.a.want)?.final && v.rangeOf(v.a.want).scores", 60)
        v.drag("canvas.pad", (0.5, 0.5), (0.8, 0.2))
        shade, tilt = v.js("[v.a.want.dials.shade, v.a.want.dials.tilt]")
        assert 0.75 < shade < 0.9
        assert 0.02 < tilt < 0.06
        expected = s.contestants[0].model
        image = v.exact()
        assert np.array_equal(image, reconstruct(s.scan, expected, shade=shade, tilt=tilt).image[0].numpy())
        assert v.pixels("v.padCanvas").std() > 10, "there is a landscape behind the dials"
        low, high = (float(text) for text in v.page.inner_text(".legend").split())
        assert low < high == pytest.approx(v.js("v.rangeOf(v.a.want).best('psnr', true).value"), abs=0.02)
        v.page.select_option("aside .dial select", "down")
        v.until("v.a.want.dials.sign === 'down'")
        assert not np.array_equal(v.exact(), image)
        v.page.click("[data-tab=landscape]")
        v.until("v.land.length && !v.dirty.size")
        v.close()


def test_several_terms_have_sliders_in_both_coordinates(browser):
    torch.manual_seed(0)
    terms = ("mae", "ssim", "tv", "dc")
    model = HyperRecon(main={"name": "unrolled", "stages": 1, "width": 2}, widths=[4, 2], terms=terms)
    measured = scan(SHAPE, noise=0.02)
    with served(Session(measured, [Contestant(name="four", model=model)])) as link:
        v = Page(browser, link)
        assert v.page.locator("input[type=range][aria-label^='weight of']").count() == 0
        before = model.weights(1, v.js("v.a.want.dials"))[0]
        v.page.check(".sliders label input")
        shown = [float(v.page.input_value(f"input[aria-label='weight of {name}, value']")) for name in terms]
        assert shown == pytest.approx(before.tolist(), abs=1e-3)
        v.page.fill("input[aria-label='weight of ssim, value']", "0.7")
        v.page.keyboard.press("Enter")
        expected = before * (1 - 0.7) / (1 - before[1])
        expected[1] = 0.7
        dials = v.js("v.a.want.dials")
        assert model.weights(1, dials)[0].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
        assert np.array_equal(v.exact(), reconstruct(measured, model, **dials).image[0].numpy())
        held = v.js("v.weights()")
        box = "input[type=range][aria-label='weight of dc']"
        b = v.box(box)
        v.page.mouse.move(b["x"] + (0.1 + 0.8 * held[3]) * b["width"], b["y"] + b["height"] / 2)
        v.page.mouse.down()
        for place in (1.2, 0.5):  # into the corner, where the others are nothing, and back
            v.page.mouse.move(b["x"] + place * b["width"], b["y"] + b["height"] / 2)
        v.page.mouse.up()
        v.settle()
        now = v.js("v.weights()")
        assert now[3] == pytest.approx(0.5, abs=0.05)
        assert [w / now[1] for w in now[:3]] == pytest.approx([w / held[1] for w in held[:3]], abs=0.01)
        v.page.uncheck(".sliders label input")
        assert v.page.input_value("input[aria-label='tv, value']") == f"{v.js('v.a.want.dials.tv'):.4g}"
        v.close()


def test_the_offline_file_turns_its_dials_without_a_network(browser, file, tmp_path):
    session = cli._session(file, ["sense"], csm="low-resolution", reference=None)
    facts = export(tmp_path / "range.html", session, index=1)
    v = Page(browser, (tmp_path / "range.html").as_uri(), offline=True)
    assert v.hosts <= {"file:None", "data:None", "blob:None"}
    v.drag("input[type=range][aria-label=lam]", (0.5, 0.5), (0.3, 0.5))
    lam = v.js("v.a.want.dials.lam")
    assert f"lam {lam:.2g}"[:6] in v.caption()
    assert "preview" in v.caption()
    assert "worst error" in v.page.inner_text("footer")
    exact = (
        session.image(session.read({"slot": "a", "number": 1, "slice": 1, "dials": {"lam": lam}}))[0].image[0].numpy()
    )
    error = np.abs(v.data("v.a.frame") - exact)
    assert 10 * np.log10(np.abs(exact).max() ** 2 / (error**2).mean()) > facts["checked_db"] - 6
    v.page.keyboard.press("p")
    v.page.keyboard.press("Shift+ArrowRight")
    assert not np.array_equal(v.pixels("v.panes.a.canvas"), v.pixels("v.panes.b.canvas"))
    assert v.page.is_visible("text=not for diagnosis")
    assert not v.page.is_visible("[data-tab='methods']")
    v.close()
