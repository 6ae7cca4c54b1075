"""Figures from rows and images: black ground, grey anatomy, one style; each keeps the numbers that it drew.

Grey is the only map for anatomy, cividis for what has a size, orange and blue around black for what has a sign.
All panels of a figure share one window, so that a brighter picture is a brighter image.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from scipy.ndimage import uniform_filter
from torch import Tensor

from . import errors, files
from .evaluation import Row, csv_text, heading
from .evaluation import dial_curve as curve_of
from .fourier import crop
from .landscape import Consistency, FarPair, Landscape, Surface, area_above
from .methods.base import Dial
from .metrics import METRICS, known, shown

__all__ = [
    "SIGNED",
    "Panel",
    "Plot",
    "area_curves",
    "consistency",
    "contact_sheet",
    "dial_curve",
    "dice_curve",
    "far_pair",
    "histogram",
    "landscape",
    "range_curves",
    "strip",
    "surface",
    "window",
]

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
        picture, numbers = self._rendered(suffix, dpi), csv_text(self.data).encode(errors="backslashreplace")
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
        _settle(figure)
    return Plot(figure=figure, data=data)


def landscape(
    found: Landscape,
    *,
    title: str = "",
    levels: Sequence[float] | None = None,
    dedicated: Sequence[tuple[Mapping[str, float], float]] = (),
) -> Plot:
    """A metric over a grid of settings: a map with contours, or a curve for one dial; a star at the best.

    Arguments:
        found: from `landscape.landscape`, or `landscape.interpolate`.
        levels: of the contours; None picks about six.
        dedicated: (setting, value) of networks trained for one setting each, drawn as dots in the colour of their value.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2) if len(found.axes) == 2 else (5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        _map_or_curve(figure, axes, found, levels, dedicated)
        axes.set_title(_plain(title))
        _settle(figure)
    dots = [{**{f"dial_{k}": v for k, v in at.items()}, f"{found.metric}_dedicated": v} for at, v in dedicated]
    return Plot(figure=figure, data=[*found.records(), *dots])


def _map_or_curve(
    figure: Figure,
    axes: Axes,
    found: Landscape,
    levels: Sequence[float] | None = None,
    dedicated: Sequence[tuple[Mapping[str, float], float]] = (),
) -> None:
    names = list(found.dials)
    mean, (best, value) = found.mean.numpy(), found.best
    for axis, name in zip((axes.xaxis, axes.yaxis), names, strict=False):
        dial = found.dials[name]
        axis.set_label_text(f"{name} [{dial.unit}]" if dial.unit else name)
    if len(names) == 1:
        x = found.axes[0]
        axes.plot(x, mean, color=ACCENT, lw=1.8)
        if len(found.cases) > 1:
            low, high = np.quantile(found.values.numpy(), (0.25, 0.75), axis=0)
            axes.fill_between(x, low, high, color=ACCENT, alpha=0.18, lw=0)
        places = [(at[names[0]], v) for at, v in dedicated]
        colours: list[Any] = [GROUND] * len(dedicated)
        axes.set_ylabel(_heading(found.metric))
        star = (best[names[0]], value)
    else:
        x, y = found.axes
        # Of a large map only the middle counts: a hopeless corner would take all the colours.
        bottom, top = np.nanquantile(mean, (0.02, 1.0) if found.higher_is_better else (0.0, 0.98))
        norm = Normalize(bottom, top if top > bottom else bottom + 1)
        cmap = matplotlib.colormaps["cividis" if found.higher_is_better else "cividis_r"]
        axes.grid(False)
        if min(mean.shape) > 1:
            axes.pcolormesh(x, y, mean.T, cmap=cmap, norm=norm, shading="nearest", rasterized=True)
            if top > bottom:
                heights = _levels(bottom, top) if levels is None else sorted(levels)
                lines = axes.contour(
                    x, y, mean.T, levels=heights, colors=INK, linewidths=0.7, linestyles="solid", alpha=0.8
                )
                axes.clabel(lines, fontsize=7, fmt="%.4g")
        else:  # a line has no cells
            us, vs = np.meshgrid(x, y, indexing="ij")
            axes.scatter(us.ravel(), vs.ravel(), c=mean.ravel(), cmap=cmap, norm=norm)
        figure.colorbar(ScalarMappable(norm, cmap), ax=axes, label=_heading(found.metric))
        places = [(at[names[0]], at[names[1]]) for at, _ in dedicated]
        colours = [cmap(norm(v)) for _, v in dedicated]
        star = (best[names[0]], best[names[1]])
    for (u, v), colour in zip(places, colours, strict=True):
        axes.plot(u, v, "o", ms=6, mfc=colour, mec=INK, mew=1.2, zorder=4, clip_on=False)
    axes.plot(*star, "*", ms=14, mfc=ACCENT, mec=GROUND, mew=1.2, zorder=5, clip_on=False)
    for name, set_scale in zip(names, (axes.set_xscale, axes.set_yscale), strict=False):
        if found.dials[name].scale == "log":
            set_scale("log")


def _levels(bottom: float, top: float) -> list[float]:
    """Round values, closer together towards the top, where people look."""
    span = top - bottom
    digits = 1 - math.floor(math.log10(span))
    return sorted({round(top - span * part, digits) for part in (0.6, 0.4, 0.25, 0.15, 0.08, 0.03)})


def area_curves(found: Mapping[str, Landscape], thresholds: Sequence[float] | None = None) -> Plot:
    """Which share of the settings is better than a threshold: the further to the good side, the better the method.

    Arguments:
        found: label → landscape, all of one metric.
        thresholds: on the horizontal axis; None takes 200 over the whole range.

    Raises:
        NoData: nothing to draw. BadOption: different metrics.
    """
    metric = _one_metric(found)
    if thresholds is None:
        means = np.concatenate([land.mean.flatten().numpy() for land in found.values()])
        means = means[np.isfinite(means)]
        margin = 0.03 * float(np.ptp(means)) or 0.5
        thresholds = [float(t) for t in np.linspace(means.min() - margin, means.max() + margin, 200)]
    curves = {label: (thresholds, area_above(land, thresholds).tolist()) for label, land in found.items()}
    side = "above" if next(iter(found.values())).higher_is_better else "below"
    return _threshold_curves(curves, metric, "area", f"share of settings {side}", 1.0)


def range_curves(found: Mapping[str, Landscape]) -> Plot:
    """How far apart the good images are: total pixel-wise range of those better than a threshold.

    Arguments:
        found: label → landscape with thresholds, all of one metric.

    Raises:
        NoData: none has thresholds. BadOption: different metrics.
    """
    metric = _one_metric(found)
    curves = {k: (list(v.thresholds), v.range_curve.tolist()) for k, v in found.items() if v.thresholds}
    if not curves:
        raise errors.NoData("no landscape was made with thresholds", key="range curve")
    # Before the first image drops out and after the last one there is nothing to see.
    turns = [i for _, ys in curves.values() for i in range(1, len(ys)) if ys[i] != ys[i - 1]] or [0]
    some = slice(max(min(turns) - 4, 0), max(turns) + 5)
    curves = {label: (ts[some], ys[some]) for label, (ts, ys) in curves.items()}
    return _threshold_curves(curves, metric, "range", "Σ over pixels of max − min", None)


def _threshold_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    metric: str,
    column: str,
    ordinate: str,
    top: float | None,
) -> Plot:
    data: list[dict[str, Any]] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        # More curves than colours: the next round of them is dashed, then dotted.
        looks = itertools.cycle((colour, dash) for dash in ("-", "--", ":") for colour in SERIES)
        for (label, (x, y)), (colour, dash) in zip(curves.items(), looks, strict=False):
            axes.plot(x, y, color=colour, ls=dash, lw=1.8, label=_plain(label))
            data += [{"series": label, "threshold": t, column: v} for t, v in zip(x, y, strict=True)]
        axes.set_ylim(0, None if top is None else 1.03 * top)
        axes.set(xlabel=f"threshold: {_heading(metric)}", ylabel=ordinate)
        if len(curves) > 1:
            axes.legend()
        _settle(figure)
    return Plot(figure=figure, data=data)


def _one_metric(found: Mapping[str, Landscape]) -> str:
    metrics = {land.metric for land in found.values()}
    if not metrics:
        raise errors.NoData("found no landscape to draw", key="landscape")
    if len(metrics) > 1:
        raise errors.BadOption(f"found {sorted(metrics)}, expected one metric", key="landscape")
    return metrics.pop()


def far_pair(
    found: Landscape, pair: FarPair, a: Tensor, b: Tensor, *, gain: float | None = None, aspect: float = 1.0
) -> Plot:
    """The two good images that differ most, their difference, and where their settings lie.

    Arguments:
        found: the landscape of the pair.
        pair: one of `found.far`.
        a, b: its images `(H, W)`.
        gain: the difference is shown this many times as strong as the images; None takes the round number that
            makes use of the colours.
        aspect: height of a pixel divided by its width.
    """
    images = [_magnitude(a), _magnitude(b)]
    if images[0].shape != images[1].shape:
        raise errors.InconsistentShapes(f"found {images[0].shape} and {images[1].shape}", key="far pair")
    low, high = window(a)
    if gain is None:
        strength = float(np.quantile(np.abs(images[0] - images[1]), 0.995)) or high
        power = 10 ** math.floor(math.log10(high / strength))
        gain = max(step * power for step in (1, 2, 5) if step * power <= high / strength)
    own = found.cases.index(pair.case)
    found = replace(found, cases=(pair.case,), values=found.values[own : own + 1])
    side = 2.5
    tall = side * aspect * images[0].shape[0] / images[0].shape[1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3 * side + 3.6, max(tall + 0.75, 2.6)), layout="constrained")
        panels = figure.subplots(1, 4, width_ratios=(side, side, side, 3.3))
        for axes, name, image, at, value in zip(panels, "AB", images, (pair.a, pair.b), pair.values, strict=False):
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="antialiased")
            dials = ", ".join(f"{dial} = {_number(at[dial])}" for dial in found.dials)
            axes.set_title(_plain(f"{name}: {dials}"))
            axes.set_xlabel(f"{_heading(found.metric)} {value:.4g}", fontsize=8)
        span = high / gain
        panels[2].imshow(images[0] - images[1], cmap=SIGNED, vmin=-span, vmax=span, aspect=aspect)
        panels[2].set_title(f"A − B, shown ×{gain:g}")
        panels[2].set_xlabel(f"distance {pair.distance:.4g}", fontsize=8)
        for axes in panels[:3]:
            _bare(axes)
        _map_or_curve(figure, panels[3], found)
        for name, at, value in zip("AB", (pair.a, pair.b), pair.values, strict=True):
            u, v = [*(at[dial] for dial in found.dials), value][:2]
            panels[3].plot(u, v, "o", ms=13, mfc=GROUND, mec=INK, mew=1.2, zorder=6, clip_on=False)
            panels[3].text(u, v, name, ha="center", va="center", fontsize=8, zorder=7)
        panels[3].set_title("where they lie", fontsize=9)
        _settle(figure)
    return Plot(figure=figure, data=[pair.record])


def consistency(found: Consistency) -> Plot:
    """Losses over (asked, used) settings, as what is lost against the best of the row; a star where that is.

    The diagonal is boxed: a model that does what it is asked has every star in its box.
    """
    excess = (found.loss / found.loss.amin(1, keepdim=True) - 1).numpy() * 100
    n = len(found.settings)
    words = [", ".join(_number(v) for v in setting.values()) for setting in found.settings]
    names = _plain(", ".join(found.settings[0]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        # Near the diagonal is where it is decided: the far corners may saturate.
        top = float(np.quantile(excess, 0.8)) or float(excess.max()) or 1.0
        picture = axes.imshow(excess, cmap="cividis", vmin=0, vmax=top)
        figure.colorbar(picture, ax=axes, label="loss above the best of the row [%]", extend="max")
        for i in range(n):
            axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, ec=INK, lw=0.9))
        axes.plot(found.loss.argmin(1), range(n), "*", ms=min(11, 90 / n), mfc=ACCENT, mec=GROUND, mew=0.8, ls="none")
        every = max(1, math.ceil(n / 12))
        places = range(0, n, every)
        axes.set_xticks(places, words[::every], rotation=0 if max(map(len, words)) < 5 else 60)
        axes.set_yticks(places, words[::every])
        axes.set(xlabel=f"used: {names}", ylabel=f"asked: {names}")
        regret, beaten = 100 * float(found.regret.mean()), float(found.beaten.double().mean())
        axes.set_title(
            f"asked setting best in {found.wins:.0%} of rows, beaten beyond chance in {beaten:.0%}, mean regret {regret:.2g} %",
            fontsize=8,
        )
        _settle(figure)
    return Plot(figure=figure, data=found.records())


def histogram(shares: Tensor, names: Sequence[str]) -> Plot:
    """Where data-driven sampling spent its training, over one dial or two.

    Arguments:
        shares: `(10,)` or `(10, 10)`, from `landscape.histogram`.
        names: of the dials.
    """
    if shares.ndim not in (1, 2) or shares.ndim != len(names):
        raise errors.UnsupportedLayout(
            f"found {shares.ndim} axes for {len(names)} dials, expected 1 or 2", key="histogram"
        )
    percent = 100 * shares.numpy()
    edges = [np.linspace(0, 1, n + 1) for n in percent.shape]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4 if percent.ndim == 1 else 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(names[0])
        if percent.ndim == 1:
            axes.bar(edges[0][:-1], percent, width=np.diff(edges[0]), align="edge", color=ACCENT, ec=GROUND, zorder=2)
            axes.axhline(100 / len(percent), color=FAINT, lw=1.2, ls=(0, (6, 3)), zorder=3)
            axes.set_ylabel("share of training [%]")
        else:
            axes.grid(False)
            picture = axes.pcolormesh(*edges, percent.T, cmap="cividis", vmin=0, rasterized=True)
            figure.colorbar(picture, ax=axes, label="share of training [%]")
            axes.set_ylabel(names[1])
        axes.set_xlim(0, 1)
        axes.set_title("what data-driven sampling trained on")
        _settle(figure)
    columns = [f"dial_{name}" for name in names]
    data = [
        {
            **{c: (i + 0.5) / n for c, i, n in zip(columns, place, percent.shape, strict=True)},
            "share": float(share) / 100,
        }
        for place, share in np.ndenumerate(percent)
    ]
    return Plot(figure=figure, data=data)


def dice_curve(rows: Sequence[Row], dial: str, *, about: Dial | None = None) -> Plot:
    """Overlap of segmentations along a dial: the mean of the classes, each class as a thin line, a star at the best.

    Arguments:
        rows: from `landscape.dice_along`.
        dial: on the horizontal axis.
        about: the dial's declaration.
    """
    classes = sorted({name for row in rows for name in row.metrics if name.startswith("dice_")})
    data: list[dict[str, Any]] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, colour in zip(["dice", *classes], itertools.cycle(SERIES)):
            curve = curve_of(rows, dial, name)
            x, y = [p["dial"] for p in curve], [p["mean"] for p in curve]
            word = "mean" if name == "dice" else name.replace("dice_", "class ")
            axes.plot(x, y, color=colour, lw=2.2 if name == "dice" else 1.0, label=_plain(word))
            if name == "dice":
                best = int(np.argmax(y))
                axes.plot(x[best], y[best], "*", ms=11, mfc=colour, mec=GROUND, mew=1.0, zorder=5)
            data += [{"series": word, **p} for p in curve]
        axes.set(xlabel=dial, title="Dice overlap   higher is better")
        if about is not None and about.scale == "log":
            axes.set_xscale("log")
        axes.legend()
        _settle(figure)
    return Plot(figure=figure, data=data)


def surface(found: Surface, *, title: str = "") -> Plot:
    """An energy on a plane, with the path that defined it: from the open circle to the full one.

    Arguments:
        found: from `landscape.energy_surface`.
    """
    energy, path = found.energy.cpu().numpy(), found.path.cpu().numpy()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        a, b = found.a.cpu().numpy(), found.b.cpu().numpy()
        # Far from the path an energy grows without bound; the valley is what there is to see.
        top = float(np.quantile(energy, 0.9))
        picture = axes.pcolormesh(a, b, energy.T, cmap="cividis_r", vmax=top, shading="nearest", rasterized=True)
        figure.colorbar(picture, ax=axes, label="energy", extend="max")
        levels = np.linspace(float(energy.min()), top, 9)[1:]
        if levels[0] < levels[-1]:
            axes.contour(a, b, energy.T, levels=levels, colors=INK, linewidths=0.5, linestyles="solid", alpha=0.5)
        axes.plot(*path.T, "-", color=ACCENT, lw=0.9, alpha=0.9)
        axes.plot(*path[0], "o", ms=7, mfc="none", mec=ACCENT, mew=1.5)
        axes.plot(*path[-1], "o", ms=7, mfc=ACCENT, mec=GROUND)
        first, second = (f"{100 * float(share):.0f} %" for share in found.share)
        axes.set(
            xlabel=f"first component ({first} of the variance)", ylabel=f"second component ({second})",
            title=_plain(title),
        )  # fmt: skip
        _settle(figure)
    return Plot(figure=figure, data=found.records())


def _heading(metric: str) -> str:
    return "rPSNR [dB]" if metric == "rpsnr" else heading(metric)


def _settle(figure: Figure) -> None:
    """Fix the layout now: it would move a little with every further drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


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
