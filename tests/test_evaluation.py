"""Evaluation: grids, sweeps, tuning, contests and tables, with a method whose best setting is known."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from typing import Annotated

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunemri import coils, datasets, errors, evaluation, scoring
from tunemri.evaluation import Case, Contestant, Row
from tunemri.fourier import fft2
from tunemri.methods.base import Dial, Reconstructor, data_residual
from tunemri.metrics import METRICS
from tunemri.scan import Reconstruction, Scan
from tunemri.simulate import phantom

BEST = 1.3


class Gain(Reconstructor):
    """x̂ = (gain / BEST) Aᴴ y: perfect on full data at gain = BEST and nowhere else."""

    def forward(
        self,
        y,
        A,
        *,
        gain: Annotated[float, Dial(sentence="brightness", default=1.0, lo=0.5, hi=2.0, scale="log")] = 1.0,
        kind: Annotated[str, Dial(sentence="which part", default="all", choices=("all", "real"))] = "all",
    ):
        x = A.H(y)
        x = gain / BEST * (x.real + 0j if kind == "real" else x)
        return Reconstruction(image=x, dials={"gain": gain, "kind": kind}, residual=data_residual(x, y, A))


class Plain(Reconstructor):
    """Aᴴ y, no dials."""

    def forward(self, y, A):
        return Reconstruction(image=A.H(y))


def case(seed=0, shape=(2, 12, 15), **labels):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    scan = Scan(kspace=fft2(x + 0j)[:, None], mask=torch.ones(1, 1, 1, shape[-1]), image_shape=shape[1:])
    return Case(name=f"case {seed}", scan=scan, reference=x, labels=labels)


class TestGrid:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(2, 40), st.floats(1e-6, 1.0), st.floats(1.01, 1e6), st.sampled_from(["linear", "log"]))
    def test_ends_order_and_range(self, n, lo, factor, scale):
        dial = Dial(sentence="", default=lo, lo=lo, hi=lo * factor, scale=scale)
        values = evaluation.grid(dial, n)
        assert (len(values), values[0], values[-1]) == (n, dial.lo, dial.hi)
        assert values == sorted(values)
        assert [dial.check("x", v) for v in values] == values
        assert evaluation.grid(dial, n, dial.hi, dial.lo) == values[::-1]

    def test_even_on_its_own_scale(self):
        assert evaluation.grid(Dial(sentence="", default=0.5), 5) == [0, 0.25, 0.5, 0.75, 1]
        log = evaluation.grid(Dial(sentence="", default=1e-2, lo=1e-4, hi=1, scale="log"), 5)
        assert log == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])

    def test_one_point_is_the_default_and_choices_are_all(self):
        assert evaluation.grid(Dial(sentence="", default=0.2), 1) == [0.2]
        assert evaluation.grid(Dial(sentence="", default=0.2), 1, start=0.7) == [0.7]
        assert evaluation.grid(Gain().dials["kind"], 7) == ["all", "real"]

    def test_refuses_nothing_and_the_outside(self):
        for points in (0, 100_001):
            with pytest.raises(errors.BadOption, match="1 to 100000"):
                evaluation.grid(Dial(sentence="", default=0.2), points)
        with pytest.raises(errors.BadOption, match="outside"):
            evaluation.grid(Dial(sentence="", default=0.2), 3, stop=1.5)


class TestSweep:
    def test_rows_of_one_dial(self):
        c, seen = case(), []
        rows = evaluation.sweep(c.scan, Gain(), 5, reference=c.reference, progress=lambda *p: seen.append(p))
        assert [row.dials["gain"] for row in rows] == evaluation.grid(Gain().dials["gain"], 5)
        assert seen == [(i, 5) for i in range(1, 6)]
        assert set(rows[0].metrics) == {"psnr", "ssim", "mae", "hfen"}
        for row in rows:
            expected = row.dials["gain"] / BEST * c.reference
            assert torch.allclose(row.image.abs(), expected, rtol=1e-4)
            assert row.residual == pytest.approx(abs(row.dials["gain"] / BEST - 1), abs=1e-4)

    def test_several_dials_make_every_combination_the_last_fastest(self):
        rows = evaluation.sweep(case().scan, Gain(), {"gain": [0.5, 2.0]}, kind=2)
        assert [(r.dials["gain"], r.dials["kind"]) for r in rows] == [
            (0.5, "all"), (0.5, "real"), (2.0, "all"), (2.0, "real"),
        ]  # fmt: skip

    def test_fixed_values_defaults_and_no_dials(self):
        scan = case().scan
        assert len(evaluation.sweep(scan, Gain())) == 21
        assert [r.dials for r in evaluation.sweep(scan, Gain(), gain=1.5)] == [{"gain": 1.5, "kind": "all"}]
        assert len(evaluation.sweep(scan, Plain())) == 1

    def test_without_reference_there_is_a_residual_and_no_metric(self):
        rows = evaluation.sweep(case().scan, Gain(), 3, keep_images=False)
        assert all(row.metrics == {} and row.image is None and row.residual is not None for row in rows)
        with pytest.raises(errors.NoData, match="psnr"):
            evaluation.choose_by_reference(rows)

    def test_a_smaller_reference_is_compared_with_the_centre(self):
        c = case(shape=(1, 16, 18))
        inner = c.reference[:, 4:12, 4:14]
        row = evaluation.sweep(c.scan, Gain(), reference=inner, gain=BEST)[0]
        assert row.metrics["psnr"] > 90
        with pytest.raises(errors.InconsistentShapes):
            evaluation.sweep(c.scan, Gain(), 1, reference=torch.ones(1, 20, 18))

    def test_maps_are_estimated_once(self, monkeypatch):
        c, calls = case(), []
        k = c.scan.kspace.repeat(1, 3, 1, 1)
        scan = Scan(kspace=k, mask=c.scan.mask, image_shape=c.scan.image_shape)

        def estimate(kspace, mask):
            calls.append(1)
            return torch.full_like(kspace, 3**-0.5)

        monkeypatch.setitem(coils.MAPS, "auto", estimate)
        evaluation.sweep(scan, Gain(), 4)
        assert len(calls) == len(scan)

    def test_refuses_what_is_not_there(self):
        scan = case().scan
        with pytest.raises(errors.BadOption, match="did you mean 'gain'"):
            evaluation.sweep(scan, Gain(), {"gian": 3})
        with pytest.raises(errors.BadOption, match="outside"):
            evaluation.sweep(scan, Gain(), {"gain": [1.0, 9.0]})
        with pytest.raises(errors.BadOption, match="no values"):
            evaluation.sweep(scan, Gain(), {"gain": []})
        with pytest.raises(errors.BadOption, match="'ssmi'"):
            evaluation.sweep(scan, Gain(), 3, metrics=["ssmi"])


class TestTune:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("factor", [1.0, 0.85])  # the best lies left, right of the best point of the coarse grid
    def test_finds_the_known_best(self, metric, factor):
        cases = [replace(c, reference=factor * c.reference) for c in (case(0), case(1))]
        found = evaluation.tune(cases, Gain(), metric, points=5, rounds=5)
        assert found.dials["gain"] == pytest.approx(factor * BEST, rel=0.02)
        assert not found.at_edge
        assert [v for v, _ in found.curve] == sorted({v for v, _ in found.curve})
        best = max if METRICS[metric].higher_is_better else min
        assert found.value == best(v for _, v in found.curve)

    def test_each_round_can_only_improve(self):
        values = [evaluation.tune([case()], Gain(), rounds=r, points=5).value for r in (1, 2, 3)]
        assert values == sorted(values)
        assert values[0] < values[-1]

    def test_says_when_the_best_is_at_the_edge(self):
        c = case()
        brighter = Case(name="bright", scan=c.scan, reference=3 * c.reference)
        found = evaluation.tune([brighter], Gain(), points=3, rounds=2)
        assert found.at_edge
        assert found.dials == {"gain": 2.0}

    def test_refuses(self):
        with pytest.raises(errors.BadOption, match="range"):
            evaluation.tune([case()], Gain(), dial="kind")
        with pytest.raises(errors.BadOption, match="range"):
            evaluation.tune([case()], Plain())
        with pytest.raises(errors.BadOption, match="at least 3"):
            evaluation.tune([case()], Gain(), points=2)
        with pytest.raises(errors.NoData):
            evaluation.tune([], Gain())
        with pytest.raises(errors.NoData):
            evaluation.tune([Case(name="blind", scan=case().scan)], Gain())


def contest(cases=None):
    contestants = [
        Contestant(name="good", model=Gain(), dials={"gain": 1.25}),
        Contestant(name="bad", model=Gain(), dials={"gain": 0.6}),
        Contestant(name="plain", model=Plain()),
    ]
    return evaluation.evaluate(contestants, cases or [case(s, mask="full") for s in range(4)], metrics=list(METRICS))


class TestEvaluate:
    def test_a_row_for_each(self):
        rows = contest()
        assert len(rows) == 12
        assert rows[0].labels == {"model": "good", "case": "case 0", "mask": "full"}
        assert all(row.image is None for row in rows)

    @pytest.mark.parametrize("metric", METRICS)
    def test_the_reference_chooses_the_better(self, metric):
        rows = [row for row in contest() if row.labels["model"] != "plain"]
        assert evaluation.choose_by_reference(rows, metric).labels["model"] == "good"

    def test_a_case_that_fails_is_left_out_for_all(self):
        broken = Case(name="broken", scan=case(7).scan, reference=torch.zeros(2, 12, 15))
        refused = []
        rows = evaluation.evaluate(
            [Contestant(name=n, model=Plain()) for n in "ab"],
            [case(0), broken, case(1)],
            on_error=lambda c, e: refused.append((c.name, type(e))),
        )
        assert [row.labels["case"] for row in rows] == ["case 0", "case 0", "case 1", "case 1"]
        assert refused == [("broken", errors.NoData)]
        with pytest.raises(errors.NoData):
            evaluation.evaluate([Contestant(name="a", model=Plain())], [broken])

    def test_cases_may_be_a_generator(self):
        seen = []
        rows = evaluation.evaluate(
            [Contestant(name="a", model=Plain())], (case(s) for s in range(2)), progress=lambda *p: seen.append(p)
        )
        assert len(rows) == 2
        assert seen == [(1, 0), (2, 0)]


class TestTables:
    def test_a_dial_that_the_method_sets_image_by_image_does_not_split_its_row(self):
        def row(task, given=()):
            return Row(labels={"mask": "m", "model": "a"}, dials={"task": task, "kappa": 1.0}, given=given)

        (line,) = scoring.summary([row(0.1), row(0.2)])
        assert (line["n"], line["dial_kappa"], line.get("dial_task")) == (2, 1.0, None)
        assert [line["dial_task"] for line in scoring.summary([row(0.1, ["task"]), row(0.2, ["task"])])] == [0.1, 0.2]
        assert scoring.summary([row(0.1), row(0.1)])[0]["dial_task"] == 0.1

    def test_summary_is_mean_sd_median_per_group(self):
        rows = [
            Row(labels={"model": m}, metrics={"psnr": p}) for m, p in [("a", 1.0), ("b", 7.0), ("a", 2.0), ("a", 6.0)]
        ]
        a, b = evaluation.summarise(rows)
        assert a == {"model": "a", "n": 3, "psnr_mean": 3.0, "psnr_sd": pytest.approx(7**0.5), "psnr_median": 2.0}
        assert b == {"model": "b", "n": 1, "psnr_mean": 7.0, "psnr_sd": 0.0, "psnr_median": 7.0}
        assert evaluation.table([a, b]) == [
            ["model", "n", "PSNR [dB]"],
            ["a", "3", "3.00 ± 2.65 (2.00)"],
            ["b", "1", "7.00"],
        ]

    def test_infinite_psnr_does_not_break_a_table(self):
        rows = [Row(metrics={"psnr": v}) for v in (math.inf, 30.0)]
        assert "inf" in evaluation.markdown(evaluation.summarise(rows, by=()))

    def test_markdown_has_one_line_per_group_and_escapes_bars(self):
        summary = evaluation.summarise([Row(labels={"model": "a|b"}, metrics={"ssim": 0.5})])
        assert evaluation.markdown(summary) == "| model | n | SSIM |\n| --- | --- | --- |\n| a\\|b | 1 | 0.5000 |\n"
        assert evaluation.markdown([]) == ""

    def test_records_are_complete_json_ready_and_read_back(self, tmp_path):
        rows = [*contest(), Row(labels={"model": "x"}, dials={"ssim": 0.3}, metrics={"ssim": 0.9})]
        flat = evaluation.records(rows)
        assert len({tuple(record) for record in flat}) == 1
        assert list(flat[0])[:3] == ["model", "case", "mask"]
        assert list(flat[0])[-3:] == [
            "residual",
            "seconds",
            "status",
        ]
        # A dial called like a metric keeps its own column.
        assert (flat[-1]["dial_ssim"], flat[-1]["ssim"]) == (0.3, 0.9)
        json.dumps(flat, allow_nan=False)
        path = tmp_path / "rows.csv"
        evaluation.write_csv(path, flat)
        with path.open(newline="") as file:
            back = list(csv.DictReader(file))
        assert float(back[0]["psnr"]) == flat[0]["psnr"]
        assert back[-1]["psnr"] == ""
        with pytest.raises(errors.BadOption):
            evaluation.write_csv(path, [])
        assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]

    def test_dial_curve_averages_cases(self):
        contestants = evaluation.along(Contestant(name="g", model=Gain()), {"gain": 4})
        rows = evaluation.evaluate(contestants, [case(s) for s in range(3)], metrics=["mae"])
        curve = evaluation.dial_curve(rows, "gain", "mae")
        assert [p["dial"] for p in curve] == evaluation.grid(Gain().dials["gain"], 4)
        for p in curve:
            values = [r.metrics["mae"] for r in rows if r.dials["gain"] == p["dial"]]
            assert p["n"] == 3
            assert p["mean"] == pytest.approx(sum(values) / 3)
            assert min(values) <= p["low"] <= p["high"] <= max(values)
        assert evaluation.dial_curve(rows, "gain", "residual")[0]["mean"] == pytest.approx(1 - 0.5 / BEST, abs=1e-4)
        with pytest.raises(errors.NoData):
            evaluation.dial_curve(rows, "kind", "mae")


class TestPaired:
    @pytest.mark.parametrize("metric", METRICS)
    def test_positive_means_better_whatever_the_metric(self, metric):
        difference = evaluation.paired(contest(), "good", "bad", metric)
        assert difference["n"] == 4
        assert difference["wins"] == 1
        assert 0 < difference["low"] <= difference["mean"] <= difference["high"]
        back = evaluation.paired(contest(), "bad", "good", metric)
        assert back["mean"] == pytest.approx(-difference["mean"])
        assert back["wins"] == 0

    def test_no_difference(self):
        rows = contest()
        twin = [
            Row(labels={**r.labels, "model": "twin"}, metrics=r.metrics) for r in rows if r.labels["model"] == "good"
        ]
        d = evaluation.paired(rows + twin, "good", "twin")
        assert (d["mean"], d["low"], d["high"], d["p"]) == (0, 0, 0, 1)

    def test_slices_of_a_subject_count_once(self):
        def rows(name, values):
            whose = zip(("a", "a", "a", "b"), values, strict=True)
            return [
                Row(labels={"model": name, "case": f"case {i}", "subject": subject}, metrics={"psnr": value})
                for i, (subject, value) in enumerate(whose)
            ]

        d = evaluation.paired([*rows("x", [31.0, 32.0, 33.0, 14.0]), *rows("y", [30.0, 30.0, 30.0, 10.0])], "x", "y")
        # Differences 2 and 4 of two subjects, not 1, 2, 3 and 4 of four slices.
        assert (d["n"], d["mean"], d["wins"]) == (2, 3.0, 1.0)
        assert (d["low"], d["high"]) == pytest.approx((3 - 12.706, 3 + 12.706), abs=1e-3)
        alone = [row for row in [*rows("x", [1.0] * 4), *rows("y", [0.0] * 4)] if row.labels["subject"] == "a"]
        d = evaluation.paired(alone, "x", "y")
        assert (d["n"], d["mean"], d["low"], d["high"]) == (1, 1.0, -math.inf, math.inf)

    def test_refuses_unpaired_and_ambiguous(self):
        rows = contest()
        with pytest.raises(errors.NoData, match="share no case"):
            evaluation.paired(rows, "good", "nobody")
        with pytest.raises(errors.BadOption, match="several rows"):
            evaluation.paired(rows + rows, "good", "bad")


def test_cases_know_whose_they_are(tmp_path):
    """The manifest of the shared data says so; a folder without one has subjects of no name, and one that disagrees is refused."""
    np.savez(tmp_path / "ixi_pd_u8.npz", img=np.stack([phantom((16, 12), seed=s).numpy() for s in range(3)]))
    plan = scoring.Plan(folder=tmp_path, sources=("ixi",), limit=3, masks=("radial:2",))
    images = datasets.load_images(tmp_path, ["ixi"])
    assert datasets.subjects(tmp_path, images) == {"ixi": ["", "", ""]}
    assert all("subject" not in case.labels for case in scoring.cases(plan, images))
    lines = ["file,subject", "ixi_pd_u8.npz,a", "other.npz,x", "ixi_pd_u8.npz,a", "ixi_pd_u8.npz,b"]
    (tmp_path / "MANIFEST.csv").write_text("\n".join(lines))
    assert [case.labels["subject"] for case in scoring.cases(plan, images)] == ["a", "a", "b"]
    (tmp_path / "MANIFEST.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(errors.UnreadableFile, match="lists 2 images of ixi, found 3"):
        datasets.subjects(tmp_path, images)


class TestSpline:
    """Reconstructions that are g times the truth: what was learned from others shows as 1/g of theirs."""

    def made(self, gains, subjects=None, **more):
        x = torch.linspace(0, 1, 180).view(1, 12, 15)
        cases = [
            replace(case(), name=f"c{k}", reference=x, labels={"subject": s} if s else {})
            for k, s in enumerate(subjects or [""] * len(gains))
        ]
        rows = [
            Row(labels={"model": "m", "case": c.name, **c.labels}, image=g * x + 0j, metrics={"mae": 9.0}, **more)
            for g, c in zip(gains, cases, strict=True)
        ]
        return rows, cases, float(x.mean())

    def test_the_judged_image_is_not_among_those_it_learns_from(self):
        rows, cases, top = self.made([2.0, 4.0])
        out = evaluation.splined(rows, cases, ["mae"])
        assert [row.labels["model"] for row in out] == ["m, spline"] * 2
        assert all(row.image is None for row in out)
        # The first, twice too bright, through the curve of the second: half of what it should be.
        assert out[0].metrics["mae"] == pytest.approx(top / 2, rel=1e-4)
        # The second is brighter than all that the first has shown, so half of it ends at the maximum.
        assert out[1].metrics["mae"] == pytest.approx(top / 2, rel=0.01)
        assert rows[0].metrics == {"mae": 9.0}

    def test_nor_is_any_other_of_its_subject(self):
        rows, cases, top = self.made([2.0, 2.0, 4.0], ["a", "a", "b"])
        out = evaluation.splined(rows, cases, ["mae"])
        assert [row.metrics["mae"] for row in out[:2]] == pytest.approx([top / 2] * 2, rel=1e-4)
        rows, cases, top = self.made([2.0, 2.0], ["a", "a"])  # no other subject: then another image
        out = evaluation.splined(rows, cases, ["mae"])
        assert [row.metrics["mae"] for row in out] == pytest.approx([0, 0], abs=1e-5)

    def test_settings_and_masks_learn_apart(self):
        rows, cases, _ = self.made([2.0, 2.0])
        more, _, _ = self.made([4.0, 4.0], dials={"lam": 3.0}, given=("lam",))
        both = evaluation.splined(rows + more, cases, ["mae"])
        assert [row.metrics["mae"] for row in both] == pytest.approx([0] * 4, abs=1e-5)
        assert both[2].dials == {"lam": 3.0}

    def test_a_smaller_reference_is_compared_with_the_centre(self):
        rows, cases, _ = self.made([2.0, 2.0])
        cases = [replace(c, reference=c.reference[:, 2:10, 3:12]) for c in cases]
        assert evaluation.splined(rows, cases, ["mae"])[0].metrics["mae"] == pytest.approx(0, abs=1e-5)

    def test_what_cannot_be_is_refused(self):
        rows, cases, _ = self.made([2.0, 2.0])
        with pytest.raises(errors.NoData, match="only image of its kind"):
            evaluation.splined(rows[:1], cases)
        for wrong in (
            [replace(r, image=None) for r in rows],
            [replace(r, labels={**r.labels, "case": "?"}) for r in rows],
            [replace(r, labels={}) for r in rows],
        ):
            with pytest.raises(errors.NoData, match="no image or no reference"):
                evaluation.splined(wrong, cases)
