"""Figures and the report page: right pixels, right words, self-contained, whole files or none."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tunemri import errors, plots, report
from tunemri.evaluation import Row
from tunemri.methods.base import Dial
from tunemri.plots import Panel

SHAPES = [(24, 24), (17, 30), (31, 13)]
ABOUT = Dial(sentence="weight", default=0.1, lo=1e-2, hi=1.0, scale="log", low="sharper & noisier", high="smoother")


def anatomy(shape=(17, 30), seed=0):
    r, c = torch.meshgrid(torch.linspace(-1, 1, shape[0]), torch.linspace(-1, 1, shape[1]), indexing="ij")
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(r**2 + c**2 < 0.7, 0.5 + 0.4 * noise, 0.0)


def swept(n=5, shape=(17, 30), metrics=True):
    x = anatomy(shape)
    rows = []
    for i in range(n):
        image = (x * (0.6 + 0.1 * i))[None] * 1j
        values = {"psnr": 30.0 - (i - 2) ** 2, "ssim": 0.5 + 0.1 * i, "mae": 0.1 + abs(i - 1)} if metrics else {}
        rows.append(Row(dials={"lam": ABOUT.at(i / (n - 1))}, metrics=values, residual=0.1 * i, image=image))
    return rows


def panels(shape=(17, 30)):
    x = anatomy(shape)
    return [Panel(title=f"no. {i}", image=g * x, metrics={"psnr": 20.0 + i}) for i, g in enumerate((0.5, 0.9, 1.2))]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


PLOTS = {
    "strip": lambda: plots.strip(panels(), anatomy()),
    "strip without reference": lambda: plots.strip(panels()[:1]),
    "contact sheet": lambda: plots.contact_sheet(swept(), "lam", reference=anatomy()[None], count=3),
    "curve": lambda: plots.dial_curve(swept(), "lam", about=ABOUT),
    "curves": lambda: plots.dial_curve(
        {"a": swept(), "b": swept() + swept()},
        "lam",
        ("psnr", "residual"),
        dedicated=swept(),
        levels={"tv": {"psnr": 26.0}},
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_is_black_repeatable_and_holds_its_numbers(name):
    plot = PLOTS[name]()
    png = plot.png(50)
    image = pixels(png)
    assert (image[0] == 0).all()
    assert image.std() > 5
    assert plot.png(50) == png
    assert plot.data
    json.dumps(list(plot.data), allow_nan=False)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_saves_picture_and_numbers(suffix, tmp_path):
    plot = PLOTS["curve"]()
    plot.save(tmp_path / f"figure{suffix}", dpi=40)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"figure{suffix}", "figure.csv"])
    with (tmp_path / "figure.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(plot.data)
    before = (tmp_path / f"figure{suffix}").read_bytes()
    PLOTS["curve"]().save(tmp_path / f"figure{suffix}", dpi=40, overwrite=True)
    assert (tmp_path / f"figure{suffix}").read_bytes() == before


def test_saving_is_both_files_or_none(tmp_path):
    plot = plots.strip(panels())
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(errors.BadOption):
        plot.save(tmp_path / "a.png", dpi=40)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "mine"
    plot.save(tmp_path / "a.png", dpi=40, overwrite=True)
    assert (tmp_path / "a.csv").read_text() != "mine"
    with pytest.raises(errors.BadOption, match="suffix"):
        plot.save(tmp_path / "a.jpg")


class TestStrip:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_one_window_one_box_and_signed_differences(self, shape):
        x = anatomy(shape)
        figure = plots.strip(panels(shape), x, gain=4).figure
        shown = [axes.images[0] for axes in figure.axes if axes.images]
        assert len(shown) == 3 * 4 - 1  # the reference has no difference
        assert len({image.get_clim() for image in shown if image.cmap.name == "gray"}) == 1
        signed = [image for image in shown if image.cmap.name == plots.SIGNED.name]
        assert len(signed) == 3
        for image, panel in zip(signed, panels(shape), strict=True):
            assert np.allclose(image.get_array(), (panel.image - x).numpy(), atol=1e-6)
            assert image.get_clim() == pytest.approx((-plots.window(x)[1] / 4, plots.window(x)[1] / 4))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_box_finds_where_they_differ(self, shape):
        x = anatomy(shape)
        other = x.clone()
        other[shape[0] // 2, shape[1] // 3] += 1
        top, left, h, w = plots._where_they_differ(np.stack([x.numpy(), other.numpy()]))
        assert top <= shape[0] // 2 < top + h
        assert left <= shape[1] // 3 < left + w
        assert top + h <= shape[0]
        assert left + w <= shape[1]

    def test_the_map_of_differences_is_black_in_the_middle(self):
        assert plots.SIGNED(0.5)[:3] == pytest.approx((0, 0, 0), abs=0.02)
        less, more = plots.SIGNED(0.2), plots.SIGNED(0.8)
        assert less[2] > less[0]
        assert more[0] > more[2]

    def test_dollars_in_names_are_no_formulas(self):
        evil = r"$\frac{$ a $\nonsense$"
        plot = plots.strip([Panel(title=evil, image=anatomy())])
        assert plot.png(30)
        assert plots.dial_curve({evil: swept()}, "lam", levels={evil: {"psnr": 25.0}}).png(30)

    def test_refuses(self):
        x = anatomy()
        with pytest.raises(errors.NoData):
            plots.strip([])
        with pytest.raises(errors.InconsistentShapes, match="first column"):
            plots.strip(panels(), x[1:])
        with pytest.raises(errors.BadOption, match="box"):
            plots.strip(panels(), x, zoom=(0, 0, 18, 5))
        with pytest.raises(errors.UnsupportedLayout, match="one slice"):
            plots.strip([Panel(title="volume", image=x[None])])


def test_contact_sheet_titles_are_the_settings_of_its_images():
    plot = plots.contact_sheet(swept(9), "lam", count=3)
    assert [record["image"] for record in plot.data] == ["lam = 0.01", "lam = 0.1", "lam = 1"]
    with pytest.raises(errors.NoData, match="keep_images"):
        plots.contact_sheet([Row(dials={"lam": 1.0})], "lam")
    with pytest.raises(errors.BadOption, match="slice"):
        plots.contact_sheet(swept(), "lam", slice_index=3)


def test_dial_curve_draws_what_it_says():
    plot = plots.dial_curve(swept(), "lam", ("psnr", "residual"), about=ABOUT, levels={"tv": {"psnr": 26.0}})
    axes = plot.figure.axes
    assert len(axes) == 2
    assert {a.get_xscale() for a in axes} == {"log"}
    assert list(axes[0].lines[0].get_ydata()) == [26, 29, 30, 29, 26]
    star = [line for line in axes[0].lines if line.get_marker() == "*"]
    assert [list(s.get_xdata()) for s in star] == [[pytest.approx(0.1)]]
    assert not [line for line in axes[1].lines if line.get_marker() == "*"]
    with pytest.raises(errors.BadOption, match="metric"):
        plots.dial_curve(swept(), "lam", ["psrn"])


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order; collects addresses."""

    void = ("meta", "img", "input", "br", "line", "circle", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.seen = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "srcset", "poster")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def dial(**options):
    x = anatomy()
    other = Row(labels={"model": "zero-filled"}, metrics={"psnr": 21.0}, image=(0.5 * x)[None])
    given = {"window": plots.window(x), "about": ABOUT, "reference": x[None], "others": [other], **options}
    return report.live_dial(swept(), "lam", **given)


def whole_page(**options):
    sections = [
        dial(),
        report.Text(title="Words", text="one\n\ntwo"),
        report.Picture(title="Strip", png=plots.strip(panels()).png(40), caption="Look at the edge."),
        report.Table(title="Numbers", rows=[["model", "PSNR"], ["tv", "30.1"]], caption="c"),
    ]
    given = {"title": "T", "summary": "S", "sections": sections, "provenance": {"command": "tunemri demo"}}
    return report.page(**{**given, **options})


class TestPage:
    def test_is_well_formed_and_self_contained(self):
        text = whole_page()
        outline = Outline(text)
        assert outline.addresses
        assert all(a.startswith("data:image/png;base64,") for a in outline.addresses)
        assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", text)

    def test_policy_allows_this_script_and_no_other(self):
        text = whole_page()
        script = re.search(r"<script>(.+?)</script>", text, re.S).group(1)
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
        assert "default-src 'none'" in policy
        assert f"script-src 'sha256-{allowed}'" in policy

    def test_hostile_words_stay_words(self):
        evil = "</script></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
        rows = [Row(dials={evil: float(i)}, metrics={"psnr": 1.0 + i}, image=anatomy()[None]) for i in range(3)]
        about = Dial(sentence="", default=0.0, lo=0.0, hi=2.0, low=evil, high=evil)
        other = Row(labels={"model": evil}, image=anatomy()[None])
        sections = [
            report.live_dial(rows, evil, window=(0.0, 1.0), about=about, others=[other], title=evil, caption=evil),
            report.Text(title=evil, text=evil),
            report.Picture(title=evil, png=b"", caption=evil),
            report.Table(title=evil, rows=[[evil], [evil]], caption=evil),
        ]
        text = whole_page(title=evil, summary=evil, sections=sections, provenance={evil: evil, "more": {evil: [evil]}})
        assert "<img src=x" not in text
        assert "<script>alert" not in text
        assert Outline(text).seen.count("script") == 2  # the data and the program

    def test_a_page_without_dial_runs_nothing(self):
        text = whole_page(sections=[report.Text(title="a", text="b")])
        assert "<script></script>" in text

    def test_written_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "report.html"
        options = {"title": "T", "summary": "S", "sections": [], "provenance": {}}
        report.report(path, **options)
        before = path.read_bytes()
        assert before.decode() == report.page(**options)
        with pytest.raises(errors.BadOption):
            report.report(path, **{**options, "title": "other"})
        assert path.read_bytes() == before
        report.report(path, **{**options, "title": "other"}, overwrite=True)
        assert path.read_bytes() != before
        assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


class TestLiveDial:
    def test_every_caption_belongs_to_its_image(self):
        data = dial().data
        x, rows = anatomy(), swept()
        assert [f["label"] for f in data["frames"]] == [f"lam = {r.dials['lam']:.3g}" for r in rows]
        for frame, row in zip(data["frames"], rows, strict=True):
            png = base64.b64decode(frame["src"].split(",")[1])
            expected = (row.image[0].abs() / plots.window(x)[1]).clamp(0, 1) * 255
            assert np.abs(pixels(png)[..., 0] - expected.numpy()).max() <= 0.51
            assert frame["metrics"][0] == f"PSNR {row.metrics['psnr']:.2f} dB"
        assert [o["label"] for o in data["others"]] == ["reference", "zero-filled"]

    def test_without_reference_there_is_no_quality(self):
        d = report.live_dial(swept(metrics=False), "lam", window=(0.0, 1.0))
        assert "not a measure of quality" in d.curves
        assert 'class="best"' not in d.curves
        assert "is better" not in d.curves
        assert [o["label"] for o in d.data["others"]] == [d.data["frames"][0]["label"]]

    def test_curves_mark_the_best(self):
        curves = dial().curves
        for label, best, top in (("PSNR", 2, min), ("SSIM", 4, min), ("MAE", 1, max)):  # SVG counts from the top
            svg = re.search(
                rf'{label} along the dial" data-x="([^"]+)" data-y="([^"]+)".+?class="best" cx="([^"]+)"', curves
            )
            x, y = ([float(v) for v in part.split(",")] for part in svg.groups()[:2])
            assert y.index(top(y)) == best
            assert float(svg.group(3)) == x[best]

    def test_a_curve_with_holes_is_left_out(self):
        rows = swept()
        rows[1] = replace(rows[1], metrics={"psnr": 1.0})
        curves = report.live_dial(rows, "lam", window=(0.0, 1.0)).curves
        assert "PSNR" in curves
        assert "SSIM" not in curves

    def test_infinite_metrics_still_draw(self):
        rows = [
            Row(dials={"lam": float(i)}, metrics={"psnr": v}, image=anatomy()[None])
            for i, v in enumerate((20.0, math.inf))
        ]
        text = report.live_dial(rows, "lam", window=(0.0, 1.0)).html()
        assert "nan" not in text.split("<script")[0]

    def test_pixels_keep_their_aspect(self):
        for aspect in (1.0, 2.0):
            text = dial(aspect=aspect).html()
            assert text.count(f"aspect-ratio:{30 / (17 * aspect):.6g};") == 3
        assert "object-fit" not in whole_page()

    def test_needs_two_images(self):
        with pytest.raises(errors.NoData, match="at least 2"):
            report.live_dial(swept()[:1], "lam", window=(0.0, 1.0))

    def test_size_of_a_real_page(self):
        """Twenty-one noisy 256×256 images, which compress badly, stay under three megabytes."""
        g = torch.Generator().manual_seed(0)
        x = anatomy((256, 256))
        rows = [
            Row(
                dials={"lam": float(i)},
                metrics={"psnr": 1.0},
                image=(x + 0.02 * torch.randn(x.shape, generator=g))[None],
            )
            for i in range(21)
        ]
        assert len(report.live_dial(rows, "lam", window=(0.0, 1.0), reference=x[None]).html()) < 3e6


def test_grey_png_clips_at_the_window():
    image = torch.tensor([[0.0, 0.5, 1.0, 3.0j]])
    assert pixels(report.grey_png(image, (0.0, 1.0)))[0, :, 0].tolist() == [0, 128, 255, 255]


def test_report_and_plots_share_their_colours():
    for position, colour in zip(np.linspace(0, 1, len(report.SIGNED_STOPS)), report.SIGNED_STOPS, strict=True):
        stop = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert plots.SIGNED(float(position))[:3] == pytest.approx(stop, abs=0.03)
