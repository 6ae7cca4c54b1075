"""Figures from rows and images: black ground, grey anatomy, one style; each keeps the numbers that it drew.

Grey is the only map for anatomy, cividis for what has a size, orange and blue around black for what has a sign.
All panels of a figure share one window, so that a brighter picture is a brighter image.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from scipy.ndimage import uniform_filter
from torch import Tensor

from . import errors, files
from .evaluation import Row, csv_text
from .evaluation import dial_curve as curve_of
from .fourier import crop
from .methods.base import Dial
from .metrics import METRICS, known, shown

__all__ = ["SIGNED", "Panel", "Plot", "contact_sheet", "dial_curve", "strip", "window"]

SIGNED = LinearSegmentedColormap.from_list(
    "tunemri-signed", ["#9fd8ff", "#2f7fe0", "#123a73", "#000000", "#7a3a08", "#f0831e", "#ffd9a0"]
)
"""Blue: less than the reference. Black: equal. Orange: more."""

GROUND, INK, FAINT, ACCENT = "#000000", "#e8e8e8", "#8a8f98", "#f0a23c"
SERIES = ("#f0a23c", "#5aa9f0", "#7fd08a", "#e26d8a", "#b79cf0", "#d8d36b")
STYLE: dict[Any, Any] = {
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "axes.edgecolor": "#4a4f57",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#23262b",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "tunemri",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One column of a strip: a real or complex image `(H, W)`, its title, and what to print under it."""

    title: str
    image: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure and the numbers that it drew, as flat records."""

    figure: Figure
    data: Sequence[Mapping[str, Any]]

    def png(self, dpi: int = 160) -> bytes:
        """The figure as a PNG file."""
        return self._rendered("png", dpi)

    def save(self, path: str | os.PathLike[str], *, dpi: int = 200, overwrite: bool = False) -> None:
        """Write the figure to `path` (.png, .pdf or .svg) and its numbers beside it as .csv.

        Raises:
            BadOption: another suffix, or a file is there already and `overwrite` is false.
            NoSpace: the disk is full.
        """
        path = Path(path)
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in ("png", "pdf", "svg"):
            raise errors.BadOption(f"found suffix {path.suffix!r}", file=path, help="expected .png, .pdf or .svg")
        both = (files.write_atomically(name, overwrite=overwrite) for name in (path, path.with_suffix(".csv")))
        # Rendered before either name is taken: both files or none.
        picture, numbers = self._rendered(suffix, dpi), csv_text(self.data).encode()
        with next(both) as for_picture, next(both) as for_numbers:
            for_picture.write_bytes(picture)
            for_numbers.write_bytes(numbers)

    def _rendered(self, format: str, dpi: int) -> bytes:
        buffer = io.BytesIO()
        # No date and no version: the same numbers give the same bytes.
        stamp: dict[str, Any] = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format=format, dpi=dpi, metadata=stamp[format])
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png(100)


def window(image: Tensor) -> tuple[float, float]:
    """Black and white of a magnitude image: zero, and its 99.7th percentile (1 for an empty image)."""
    top = float(np.quantile(image.detach().abs().double().cpu().numpy(), 0.997))
    return 0.0, top or 1.0


def strip(
    panels: Sequence[Panel],
    reference: Tensor | None = None,
    *,
    zoom: tuple[int, int, int, int] | None = None,
    gain: float = 5.0,
    aspect: float = 1.0,
) -> Plot:
    """Images side by side: whole, enlarged, and their signed difference from the reference.

    Arguments:
        panels: the columns, all images of one shape.
        reference: `(H, W)`, shown first; without one there is no row of differences.
        zoom: (top, left, height, width) of the enlarged box in pixels; None takes the box where the images
            differ most from each other.
        gain: differences are shown this many times as strong as the images.
        aspect: height of a pixel divided by its width.

    Raises:
        NoData: no panel. InconsistentShapes: the images differ in shape. BadOption: a box outside the image.
    """
    if not panels:
        raise errors.NoData("found no image to show", key="strip")
    columns = [*([Panel(title="reference", image=reference)] if reference is not None else []), *panels]
    images = [_magnitude(panel.image) for panel in columns]
    for panel, image in zip(columns, images, strict=True):
        if image.shape != images[0].shape:
            raise errors.InconsistentShapes(
                f"found {image.shape}, expected {images[0].shape} as in the first column", key=panel.title
            )
    height, width = images[0].shape
    top, left, h, w = _where_they_differ(np.stack(images)) if zoom is None else zoom
    if min(top, left) < 0 or min(h, w) < 1 or top + h > height or left + w > width:
        raise errors.BadOption(f"found box {zoom} in an image of {height}×{width}", key="zoom")
    low, high = window(columns[0].image)
    rows = ["image", "zoom", "difference"] if reference is not None else ["image", "zoom"]

    # Sizes in inches, so that text keeps its size however many columns there are.
    side, gap, head = 2.2, 0.06, 0.34
    foot = 0.17 * max(len(panel.metrics) for panel in panels) + 0.12
    tall = [side * aspect * height / width, side * aspect * h / w, side * aspect * height / width][: len(rows)]
    total_w = len(columns) * side + (len(columns) - 1) * gap + 0.5
    total_h = head + sum(tall) + gap * len(rows) + foot
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(total_w, total_h))
        for c, (panel, image) in enumerate(zip(columns, images, strict=True)):
            x, y = 0.3 + c * (side + gap), total_h - head
            for row, t in zip(rows, tall, strict=True):
                y -= t
                axes = figure.add_axes((x / total_w, y / total_h, side / total_w, t / total_h))
                y -= gap
                _bare(axes)
                if row == "image":
                    axes.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="antialiased")
                    axes.add_patch(Rectangle((left - 0.5, top - 0.5), w, h, fill=False, ec=ACCENT, lw=0.9))
                    axes.set_title(_plain(panel.title), pad=5)
                elif row == "zoom":
                    part = image[top : top + h, left : left + w]
                    axes.imshow(part, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
                    for spine in axes.spines.values():
                        spine.set(visible=True, color=ACCENT, linewidth=0.9)
                elif c > 0:
                    span = high / gain
                    axes.imshow(image - images[0], cmap=SIGNED, vmin=-span, vmax=span, aspect=aspect)
                else:
                    words = f"image − reference\nshown ×{gain:g}\n\norange  brighter\nblack  equal\nblue  darker"
                    axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=8, color=FAINT, linespacing=1.5)
                if c == 0 and row != "difference":
                    axes.set_ylabel(row, fontsize=8, color=FAINT)
            for i, (name, value) in enumerate(panel.metrics.items()):
                at = ((x + side / 2) / total_w, (y - 0.10 - 0.17 * i) / total_h)
                figure.text(*at, _caption(name, value), ha="center", va="center", fontsize=8)
    return Plot(figure=figure, data=[{"image": panel.title, **panel.metrics} for panel in panels])


def contact_sheet(
    rows: Sequence[Row],
    dial: str,
    *,
    reference: Tensor | None = None,
    slice_index: int = 0,
    count: int = 6,
    zoom: tuple[int, int, int, int] | None = None,
    gain: float = 5.0,
    aspect: float = 1.0,
) -> Plot:
    """What the dial does: images along it, evenly picked from a sweep, both ends included.

    Arguments:
        rows: from `sweep`, with images.
        dial: whose value is the title of a column.
        reference: `(B, H, W)`, or None.
        slice_index: which slice of a volume.
        count: how many columns.
        zoom, gain, aspect: as in `strip`.

    Raises:
        NoData: the rows hold no images, or not this dial.
    """
    kept = [row for row in rows if row.image is not None and dial in row.dials]
    if not kept:
        raise errors.NoData(
            f"no row has an image and the dial {dial!r}", key="contact sheet", help="sweep with keep_images=True"
        )
    picked = dict.fromkeys(int(i) for i in np.linspace(0, len(kept) - 1, min(count, len(kept))).round())
    truth = None if reference is None else _slice(reference, slice_index)
    panels = []
    for row in (kept[i] for i in picked):
        image = _slice(row.image, slice_index)
        image = image if truth is None else crop(image, truth.shape)
        panels.append(Panel(title=f"{dial} = {_number(row.dials[dial])}", image=image, metrics=row.metrics))
    return strip(panels, truth, zoom=zoom, gain=gain, aspect=aspect)


def dial_curve(
    rows: Mapping[str, Sequence[Row]] | Sequence[Row],
    dial: str,
    metrics: Sequence[str] = ("psnr", "ssim"),
    *,
    about: Dial | None = None,
    dedicated: Sequence[Row] = (),
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Plot:
    """Metrics along a dial, one axes each: mean over scans, and the middle half of them as a band.

    Arguments:
        rows: from `sweep` or `evaluate`; or label → rows for several methods that share the dial.
        dial: on the horizontal axis.
        metrics: keys of METRICS, or "residual".
        about: the dial's declaration: its scale, and the words at both ends.
        dedicated: networks trained for one value each, drawn as dots: the gap is the price of the dial.
        levels: label → metric → value of methods without this dial, drawn as horizontal lines.

    Raises:
        NoData: a metric that no row has. BadOption: an unknown metric.
    """
    for name in metrics:
        if name != "residual":
            known(name)
    series = {"": list(rows)} if not isinstance(rows, Mapping) else {k: list(v) for k, v in rows.items()}
    data: list[dict[str, Any]] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=((3.7 if len(metrics) < 4 else 3.1) * len(metrics), 3.1), layout="constrained")
        for axes, name in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
            for (label, its), colour in zip(series.items(), itertools.cycle(SERIES)):
                curve = curve_of(its, dial, name)
                x, mean = [p["dial"] for p in curve], [p["mean"] for p in curve]
                axes.plot(x, mean, color=colour, lw=1.8, label=_plain(label) or None)
                if any(p["n"] > 1 for p in curve):
                    axes.fill_between(
                        x, [p["low"] for p in curve], [p["high"] for p in curve], color=colour, alpha=0.18, lw=0
                    )
                if name != "residual":  # the least residual is not the best image
                    _mark_best(axes, name, x, mean, colour)
                data += [{"series": label or "dial", "metric": name, **p} for p in curve]
            if dedicated:
                dots = curve_of(dedicated, dial, name)
                axes.plot(
                    [p["dial"] for p in dots],
                    [p["mean"] for p in dots],
                    "o",
                    ms=5.5,
                    mfc=GROUND,
                    mec=INK,
                    mew=1.3,
                    label="trained for one value",
                )
                data += [{"series": "dedicated", "metric": name, **p} for p in dots]
            lines = itertools.chain(*(((k, v[name]),) for k, v in (levels or {}).items() if name in v))
            for (label, value), dash in zip(lines, itertools.cycle([(0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2))])):
                axes.axhline(value, color=FAINT, lw=1.2, ls=dash, label=_plain(label))
                data.append({"series": label, "metric": name, "mean": value})
            _dress(axes, dial, name, about)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
        # Settle the layout now: it would move a little with every further drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return Plot(figure=figure, data=data)


def _mark_best(axes: Axes, metric: str, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    i = int(np.argmax(y) if METRICS[metric].higher_is_better else np.argmin(y))
    # A dark outline keeps the star visible on its own line.
    axes.plot(x[i], y[i], "*", ms=11, mfc=colour, mec=GROUND, mew=1.0, zorder=5)


def _dress(axes: Axes, dial: str, metric: str, about: Dial | None) -> None:
    if metric == "residual":
        axes.set_title("data residual ‖A x̂ − y‖ / ‖y‖")
    else:
        m = METRICS[metric]
        arrow = "higher is better" if m.higher_is_better else "lower is better"
        axes.set_title(f"{m.label}{' [dB]' if m.unit == 'dB' else ''}   {arrow}", fontsize=9)
    axes.set_xlabel(f"{dial} [{about.unit}]" if about is not None and about.unit else dial)
    if about is None:
        return
    if about.scale == "log":
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for at, word, align in ((0.0, about.low, "left"), (1.0, about.high, "right")):
        if word:
            words = _plain(word).replace(": ", ":\n")
            axes.text(at, -0.19, words, transform=axes.transAxes, ha=align, va="top", fontsize=7, color=FAINT)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _magnitude(image: Tensor) -> np.ndarray:
    if image.ndim != 2:
        raise errors.UnsupportedLayout(
            f"found shape {tuple(image.shape)}, expected one slice (rows, columns)", key="image"
        )
    return image.detach().abs().double().cpu().numpy()


def _slice(volume: Tensor | None, index: int) -> Tensor:
    assert volume is not None
    if not -len(volume) <= index < len(volume):
        raise errors.BadOption(f"found slice {index} of a volume of {len(volume)}", key="slice")
    return volume[index]


def _where_they_differ(images: np.ndarray) -> tuple[int, int, int, int]:
    """The box, a third of the image in size, in which the images `(N, H, W)` differ most from each other."""
    height, width = images.shape[1:]
    h, w = max(1, round(height / 3)), max(1, round(width / 3))
    # A single image differs from nothing: take its own fine detail.
    spread = (
        images.std(0) if len(images) > 1 else np.hypot(*np.gradient(images[0])) if min(height, width) > 1 else images[0]
    )
    mean = uniform_filter(spread, (h, w), mode="constant")
    inside = mean[h // 2 : height - (h - 1) // 2, w // 2 : width - (w - 1) // 2]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    return int(top), int(left), h, w


def _plain(text: str) -> str:
    """Names come from users: a dollar sign in them is no formula."""
    return text.replace("$", r"\$")


def _caption(name: str, value: float) -> str:
    return f"{METRICS[name].label} {shown(name, value)}" if name in METRICS else f"{name} {value:.4g}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
