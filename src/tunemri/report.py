"""One self-contained HTML page: summary, pictures with what to look for, tables, provenance, and a live dial.

Everything is inside the file: it opens from `file://`, years later, without a network. The pictures and tables need
no script; the dial needs the few lines at the end of this file, the only script that the page's own policy lets run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from . import errors, files
from .evaluation import Row
from .fourier import crop
from .methods.base import Dial
from .metrics import METRICS, shown

__all__ = ["LiveDial", "Picture", "Table", "Text", "grey_png", "live_dial", "page", "report"]

SIGNED_STOPS = ("#9fd8ff", "#2f7fe0", "#123a73", "#000000", "#7a3a08", "#f0831e", "#ffd9a0")  # as plots.SIGNED


@dataclass(frozen=True, kw_only=True)
class Text:
    """A heading and paragraphs, parted by blank lines."""

    title: str
    text: str

    def html(self) -> str:
        paragraphs = "".join(f"<p>{html.escape(p.strip())}</p>" for p in self.text.split("\n\n") if p.strip())
        return f"<section><h2>{html.escape(self.title)}</h2>{paragraphs}</section>"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture (a PNG file as bytes, e.g. `plots.strip(…).png()`), its title, and what to look for."""

    title: str
    png: bytes
    caption: str

    def html(self) -> str:
        title = html.escape(self.title)
        return (
            f'<section><h2>{title}</h2><figure><img alt="{title}" src="{_uri(self.png)}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure></section>"
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text, the heading first, e.g. from `evaluation.table`; columns after the first `words` are numbers."""

    title: str
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: int = 1

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            kinds = ("" if i < self.words else ' class="n"' for i in range(len(cells)))
            return (
                "<tr>"
                + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
                + "</tr>"
            )

        heading, *body = self.rows
        return (
            f'<section><h2>{html.escape(self.title)}</h2><div class="wide"><table><thead>{line(heading, "th")}</thead>'
            f"<tbody>{''.join(line(cells, 'td') for cells in body)}</tbody></table></div>"
            f"<p class=caption>{html.escape(self.caption)}</p></section>"
        )


@dataclass(frozen=True, kw_only=True)
class LiveDial:
    """A slider through the images of a sweep; made by `live_dial`."""

    title: str
    caption: str
    data: Mapping[str, Any]
    curves: str

    def html(self) -> str:
        d, title = self.data, html.escape(self.title)
        safe = json.dumps(d).replace("<", "\\u003c")  # no </script> inside
        options = "".join(f'<option value="{i}">{html.escape(o["label"])}</option>' for i, o in enumerate(d["others"]))
        # Not `object-fit`, which would ignore the aspect of a pixel; half the window high, to keep all in view.
        ratio = d["width"] / (d["height"] * d["aspect"])
        shape = f'width="{d["width"]}" height="{d["height"]}" style="aspect-ratio:{ratio:.6g};width:min(100%,{50 * ratio:.5g}vh)"'
        panes = "".join(
            f'<figure><canvas {shape} data-pane="{p}"></canvas><figcaption data-caption="{p}"></figcaption></figure>'
            for p in ("a", "b", "difference")
        )
        start = d["start"]
        return f"""<section class="dial" data-dial><h2>{title}</h2>
<noscript><p>Without JavaScript the dial cannot turn; this is {html.escape(d["frames"][start]["label"])}.</p>
<img alt="{title}" src="{d["frames"][start]["src"]}"></noscript>
<div class="live"><div class="slider"><label><b>{html.escape(d["dial"])}</b> <output></output></label>
<input type="range" min="0" max="{len(d["frames"]) - 1}" step="1" value="{start}" aria-label="{html.escape(d["dial"])}">
<div class="ends"><span>{html.escape(d["low"])}</span><span>{html.escape(d["high"])}</span></div></div>
<div class="panes">{panes}</div>
<div class="tools"><label>B <select>{options}</select></label><button type="button" data-pin>pin A as B</button>
<span class="hint">press and hold A to see B in its place</span></div>
<div class="curves">{self.curves}</div></div>
<p class="caption">{html.escape(self.caption)}</p><script type="application/json">{safe}</script></section>"""


Section = Text | Picture | Table | LiveDial


def live_dial(
    rows: Sequence[Row],
    dial: str,
    *,
    window: tuple[float, float],
    about: Dial | None = None,
    reference: Tensor | None = None,
    others: Sequence[Row] = (),
    slice_index: int = 0,
    start: int | None = None,
    gain: float = 5.0,
    aspect: float = 1.0,
    title: str = "Turn the dial",
    caption: str = "",
) -> LiveDial:
    """A dial with live images: the rows of a sweep behind a slider, beside a second image and their difference.

    Arguments:
        rows: from `sweep`, with images, in the order of the dial.
        dial: its name.
        window: what is shown black and white, `plots.window(reference)`; one for all images.
        about: the dial's declaration, for the words at both ends.
        reference: `(B, H, W)`, or None: unknown.
        others: rows with images to compare with (zero-filled, TV, …), named by their label `model`.
        slice_index: which slice of a volume.
        start: index of the row shown first; None takes the middle.
        gain: differences are shown this many times as strong as the images.
        aspect: height of a pixel divided by its width.
        title, caption: of the section.

    Raises:
        NoData: fewer than two rows with an image and that dial.
    """
    kept = [row for row in rows if row.image is not None and dial in row.dials]
    if len(kept) < 2:
        raise errors.NoData(
            f"found {len(kept)} rows with an image and the dial {dial!r}, expected at least 2", key="dial"
        )
    truth = None if reference is None else reference[slice_index]
    frames = []
    for row in kept:
        value = row.dials[dial]
        label = f"{dial} = {value:.3g}" if isinstance(value, float | int) else f"{dial} = {value}"
        frames.append(_frame(label, row, truth, window, slice_index))
    compared = [] if truth is None else [{"label": "reference", "src": _uri(grey_png(truth, window)), "metrics": []}]
    compared += [
        _frame(row.labels.get("model", "other"), row, truth, window, slice_index)
        for row in others
        if row.image is not None
    ]
    first = kept[0].image if truth is None else truth
    assert first is not None
    names = [n for n in METRICS if n in kept[0].metrics] or ["residual"]
    curves = "".join(_curve(name, kept) for name in names if all(_value(row, name) is not None for row in kept))
    begin = len(kept) // 2 if start is None else start
    data = {
        "dial": dial,
        "low": about.low if about else "",
        "high": about.high if about else "",
        "frames": frames,
        "others": compared or [frames[0]],
        "start": begin,
        "gain": gain,
        "height": first.shape[-2],
        "width": first.shape[-1],
        "aspect": aspect,
        "stops": SIGNED_STOPS,
    }
    return LiveDial(title=title, caption=caption, data=data, curves=curves)


def _frame(label: str, row: Row, truth: Tensor | None, window: tuple[float, float], slice_index: int) -> dict[str, Any]:
    assert row.image is not None
    image = row.image[slice_index]
    image = image if truth is None else crop(image, truth.shape)
    metrics = [f"{METRICS[n].label} {shown(n, v)}" for n, v in row.metrics.items()]
    if row.residual is not None:
        metrics.append(f"residual {row.residual:.2%}")
    return {"label": label, "src": _uri(grey_png(image, window)), "metrics": metrics}


def grey_png(image: Tensor, window: tuple[float, float]) -> bytes:
    """The magnitude of `(H, W)` as an 8-bit PNG, black and white at the two ends of `window`."""
    low, high = window
    grey = ((image.detach().abs().double().cpu() - low) / (high - low)).clamp(0, 1).mul(255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def page(*, title: str, summary: str, sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    """The whole page as a string of HTML.

    Arguments:
        title: of the page.
        summary: the one sentence that a reader in a hurry takes away.
        sections: in reading order, pictures first.
        provenance: what it takes to make this again (command, dials, hashes, seed, versions), name → value.
    """
    script = _SCRIPT if any(isinstance(s, LiveDial) for s in sections) else ""
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{fingerprint}'"
    words = {str(k): v if isinstance(v, str) else json.dumps(v, default=str) for k, v in provenance.items()}
    facts = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in words.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<header><h1>{html.escape(title)}</h1><p class="summary">{html.escape(summary)}</p></header>
<main>{"".join(section.html() for section in sections)}
<section><h2>Provenance</h2><div class="wide"><table class="facts">{facts}</table></div></section></main>
<footer>Made by tunemri. For research: not for diagnosis.</footer>
<script>{script}</script></body></html>
"""


def report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write `page(…)` to a file, whole or not at all.

    Raises:
        BadOption: the file exists and `overwrite` is false.
        NoSpace: the disk is full.
    """
    text = page(title=title, summary=summary, sections=sections, provenance=provenance)
    with files.write_atomically(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _value(row: Row, metric: str) -> float | None:
    return row.residual if metric == "residual" else row.metrics.get(metric)


def _curve(name: str, rows: Sequence[Row]) -> str:
    """A small SVG of one metric along the sweep; the script moves its cursor."""
    y = np.array([_value(row, name) for row in rows], dtype=float)
    y = np.where(np.isfinite(y), y, np.nanmax(y[np.isfinite(y)], initial=0.0))
    x = np.linspace(8, 232, len(y))
    span = y.max() - y.min()
    v = 60 - 48 * ((y - y.min()) / span if span > 0 else np.full_like(y, 0.5))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, v, strict=True))
    label, hint, star = "data residual", "not a measure of quality", ""
    if name in METRICS:
        m = METRICS[name]
        best = int(y.argmax() if m.higher_is_better else y.argmin())
        label, hint = m.label, f"{'higher' if m.higher_is_better else 'lower'} is better"
        star = f'<circle class="best" cx="{x[best]:.1f}" cy="{v[best]:.1f}" r="5"/>'
    xs, ys = (",".join(f"{a:.1f}" for a in axis) for axis in (x, v))
    return (
        f'<figure><figcaption><b>{label}</b> <span class="hint">{hint}</span></figcaption>'
        f'<svg viewBox="0 0 240 72" role="img" aria-label="{label} along the dial" data-x="{xs}" data-y="{ys}">'
        f'<polyline points="{points}"/>{star}<line y1="4" y2="68"/><circle class="now" r="3.5"/></svg></figure>'
    )


_STYLE = """
:root{color-scheme:dark;--ink:#e9e9ea;--soft:#9aa0a8;--line:#2a2d33;--accent:#f0a23c;--blue:#5aa9f0}
*{box-sizing:border-box}
body{margin:0;background:#000;color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
header,main,footer{max-width:1240px;margin:0 auto;padding:0 28px}
header{padding-top:32px}
h1{font-size:30px;font-weight:650;letter-spacing:-.01em;margin:0 0 6px}
h2{font-size:19px;font-weight:600;margin:0 0 14px}
.summary{font-size:18px;color:var(--accent);margin:0;max-width:62em}
section{margin:26px 0;padding-top:24px;border-top:1px solid var(--line)}
p{max-width:62em}
figure{margin:0}
img{max-width:100%;height:auto;display:block}
figcaption,.caption,.hint{color:var(--soft);font-size:14px}
figure>figcaption{margin-top:8px;max-width:62em}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 18px 6px 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{color:var(--soft);font-weight:500}
.n{text-align:right}
.facts td{white-space:normal;
  overflow-wrap:anywhere;font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px}
.panes{display:grid;grid-template-columns:repeat(3,1fr);gap:10px}
.panes canvas{margin:0 auto;display:block;background:#000;outline:1px solid var(--line);touch-action:manipulation}
.panes canvas[data-pane=a]{cursor:pointer}
.panes figcaption{min-height:4.4em;font-variant-numeric:tabular-nums;line-height:1.45}
.panes figcaption b{color:var(--ink);display:block;font-size:15px}
.slider{margin:0 0 16px}
.slider output{color:var(--accent);font-variant-numeric:tabular-nums}
input[type=range]{width:100%;accent-color:var(--accent);height:28px;margin:2px 0}
.ends{display:flex;justify-content:space-between;color:var(--soft);font-size:13px;gap:20px}
.ends span:last-child{text-align:right}
.tools{display:flex;flex-wrap:wrap;gap:8px 16px;align-items:center;margin:14px 0}
select,button{background:#17191d;
  color:var(--ink);border:1px solid #3a3e46;border-radius:5px;padding:5px 10px;font:inherit;font-size:14px}
button{cursor:pointer}
button:focus-visible,select:focus-visible,input:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px 22px}
svg{width:100%;display:block;background:#0b0c0e;border:1px solid var(--line)}
polyline{fill:none;stroke:var(--accent);stroke-width:1.6}
svg line{stroke:var(--soft);stroke-width:.8;stroke-dasharray:3 2}
.best{fill:none;stroke:var(--blue);stroke-width:1.4}
.now{fill:var(--ink)}
footer{padding-top:18px;padding-bottom:50px;color:var(--soft);font-size:13px}
html:not(.js) .live{display:none}
@media (max-width:760px){.panes{grid-template-columns:1fr 1fr}.panes figure:nth-child(3){grid-column:1/-1}}
@media print{:root{color-scheme:light;--ink:#111;--soft:#444;--line:#ccc;--accent:#8a4b00}body{background:#fff}
.tools,.slider{display:none}section{break-inside:avoid}}
"""

# The words under a picture come from the picture that is drawn, never from the slider.
_SCRIPT = """
document.documentElement.classList.add('js');
for (const root of document.querySelectorAll('[data-dial]')) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const find = q => root.querySelector(q), slider = find('input'), pick = find('select');
  const colour = h => [1, 3, 5].map(i => parseInt(h.slice(i, i + 2), 16)), stops = data.stops.map(colour);
  const signed = t => {  // t in [-1, 1]
    const last = stops.length - 1, p = (Math.max(-1, Math.min(1, t)) + 1) / 2 * last;
    const i = Math.min(Math.floor(p), last - 1);
    return stops[i].map((c, k) => c + (stops[i + 1][k] - c) * (p - i));
  };
  const map = Array.from({length: 511}, (_, d) => signed((d - 255) / 255 * data.gain));
  const decode = async item => {
    const image = new Image(); image.src = item.src; await image.decode();
    const c = document.createElement('canvas'); c.width = data.width; c.height = data.height;
    const ctx = c.getContext('2d', {willReadFrequently: true}); ctx.drawImage(image, 0, 0);
    const rgba = ctx.getImageData(0, 0, c.width, c.height);
    return {label: item.label, metrics: item.metrics, rgba, grey: rgba.data.filter((_, i) => i % 4 === 0)};
  };
  const put = (pane, pixels, label, words) => {
    find(`[data-pane=${pane}]`).getContext('2d').putImageData(pixels, 0, 0);
    const caption = find(`[data-caption=${pane}]`), b = document.createElement('b');
    b.textContent = label; caption.replaceChildren(b, words);
  };
  Promise.all([Promise.all(data.frames.map(decode)), Promise.all(data.others.map(decode))]).then(([frames, others]) => {
    let pinned = null, swapped = false;
    const draw = () => {
      const i = Number(slider.value), a = frames[i], b = pick.value === 'pin' ? pinned : others[Number(pick.value)];
      const left = swapped ? b : a, name = swapped ? 'B in place of A' : 'A';
      put('a', left.rgba, `${name}: ${left.label}`, left.metrics.join('  ·  '));
      put('b', b.rgba, `B: ${b.label}`, b.metrics.join('  ·  '));
      const d = new ImageData(data.width, data.height);
      let sum = 0;
      for (let p = 0; p < a.grey.length; p++) {
        const e = a.grey[p] - b.grey[p]; sum += e * e;
        d.data.set(map[e + 255], 4 * p); d.data[4 * p + 3] = 255;
      }
      const rms = (Math.sqrt(sum / a.grey.length) / 2.55).toFixed(2);
      put('difference', d, `A − B, shown ×${data.gain}`,
        `rms ${rms} % of white  ·  orange: A brighter  ·  blue: A darker`);
      find('output').textContent = a.label.split(' = ')[1];
      slider.setAttribute('aria-valuetext', a.label);
      for (const svg of root.querySelectorAll('svg')) {
        const x = svg.dataset.x.split(',')[i], y = svg.dataset.y.split(',')[i];
        const line = svg.querySelector('line'), dot = svg.querySelector('.now');
        line.setAttribute('x1', x); line.setAttribute('x2', x); dot.setAttribute('cx', x); dot.setAttribute('cy', y);
      }
    };
    slider.addEventListener('input', draw);
    pick.addEventListener('change', draw);
    find('[data-pin]').addEventListener('click', () => {
      pinned = frames[Number(slider.value)];
      const option = pick.querySelector('[value=pin]') || pick.appendChild(new Option('', 'pin'));
      option.textContent = `${pinned.label} (pinned)`; pick.value = 'pin'; draw();
    });
    const pane = find('[data-pane=a]');
    pane.addEventListener('pointerdown', () => { swapped = true; draw(); });
    for (const end of ['pointerup', 'pointerleave', 'pointercancel'])
      pane.addEventListener(end, () => { if (swapped) { swapped = false; draw(); } });
    draw();
  });
}
"""
