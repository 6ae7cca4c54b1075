"""Choosing a setting, spreading settings out, and the range basis: laws, over every method with a dial."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from typing import Annotated, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laws import relative
from test_cli import run  # noqa: F401  the fixture
from test_reconstructors import SMALL
from tunemri import errors, methods, tuning
from tunemri.evaluation import grid
from tunemri.fourier import fft2
from tunemri.masks import make_mask
from tunemri.methods import METHODS, Dial, Reconstructor, reconstruct
from tunemri.metrics import psnr
from tunemri.operators import LinearOperator, NonCartesian
from tunemri.scan import Reconstruction, Scan, select
from tunemri.simulate import coil_maps, phantom, simulate
from tunemri.trajectories import golden, readouts
from tunemri.tuning.criteria import Asked, _hide_readouts, split


def build(name: str) -> Reconstructor:
    """A small network, or a classical method that stops early: what is tested here does not hang on convergence."""
    torch.manual_seed(0)
    arguments = SMALL.get(name, {})
    if "iterations" in inspect.signature(METHODS[name]).parameters:
        arguments = {"iterations": 24} | arguments
    return methods.make(name, arguments).eval()


DIALLED = [name for name in METHODS if any(not d.choices for d in build(name).dials.values())]
SHAPE = (45, 40)


class TwoDials(Reconstructor):
    """x̂ = shrunk (1 - a) Aᴴy + b |Aᴴy|² i, and a word: numbers, a logarithm and a choice in one."""

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        a: Annotated[float, Dial(sentence="less", default=0.5)] = 0.5,
        b: Annotated[float, Dial(sentence="more", default=0.1, lo=0.01, hi=1.0, scale="log")] = 0.1,
        word: Annotated[str, Dial(sentence="which", default="plain", choices=("plain", "turned"))] = "plain",
    ) -> Reconstruction:
        x = A.H(y)
        x = (1 - 0.5 * a) * x + 0.3j * b * x.abs().square()
        return Reconstruction(image=x if word == "plain" else -0.5j * x, dials={"a": a, "b": b, "word": word})


class Rounding(Reconstructor):
    """A method that turns its dial into a plain number: no derivative."""

    def forward(
        self, y: Tensor, A: LinearOperator, *, a: Annotated[float, Dial(sentence="size", default=0.5)] = 0.5
    ) -> Reconstruction:
        return Reconstruction(image=float(a) ** 2 * A.H(y), dials={"a": a})


def head(
    *, coils: int = 1, noise: float = 0.02, slices: int = 1, shape: tuple[int, int] = (72, 60)
) -> tuple[Scan, Tensor]:
    """A phantom 3× undersampled; maps, if any, are to be estimated."""
    x = torch.stack([phantom(shape, seed=s + 1) for s in range(slices)])
    return simulate(x, mask=make_mask("poisson", shape, 3.0, seed=0), coils=coils, noise=noise, store_maps=False)


def quality(s: Scan, model: Reconstructor, truth: Tensor, dials: Any) -> float:
    return psnr(reconstruct(s, model, **dials).magnitude, truth.abs())


def asked(*, splits: int, fraction: float) -> Asked:
    return Asked(reference=None, metric="psnr", seed=0, splits=splits, fraction=fraction)


every_dial = pytest.mark.parametrize("name", DIALLED)
pytestmark = pytest.mark.filterwarnings("ignore:the image misses the measured data", "ignore:outside what the model")


class TestChoice:
    @pytest.mark.parametrize("by", tuning.CRITERIA)
    @every_dial
    def test_every_criterion_finds_a_setting_of_every_method(self, name, by):
        s, truth = head(shape=SHAPE)
        model = build(name)
        found = tuning.choose(s, model, by=by, reference=truth, points=3, refine=1, splits=1, k=3)
        assert found.by == by
        assert found.picks[0] == found.dials
        assert model.check_dials(found.dials) == found.dials, "every dial, each in its range"
        assert found.rows
        assert found.reason
        chosen = next(row["score"] for row in found.rows if row["dials"] == found.dials)
        assert chosen == min(row["score"] for row in found.rows), "the best of those tried"

    def test_by_reference_is_the_best_of_an_exhaustive_grid(self):
        s, truth = head()
        model = methods.load("sense")
        dial = model.dials["lam"]
        top = max(quality(s, model, truth, {"lam": dial.at(i / 60)}) for i in range(61))
        found = tuning.choose(s, model, by="reference", reference=truth)
        assert quality(s, model, truth, found.dials) > top - 0.02
        assert len(found.rows) < 13

    @pytest.mark.parametrize("metric", ["psnr", "mae"])
    def test_the_metric_is_turned_the_right_way_round(self, metric):
        s, truth = head(shape=SHAPE)
        found = tuning.choose(s, methods.load("sense"), by="reference", reference=truth, metric=metric)
        assert quality(s, methods.load("sense"), truth, found.dials) > quality(
            s, methods.load("sense"), truth, {"lam": 1.0}
        )

    @pytest.mark.parametrize("noise", [0.01, 0.04])
    @pytest.mark.parametrize(("name", "coils"), [("tv", 1), ("sense", 4)])
    def test_held_out_kspace_finds_nearly_what_ground_truth_would(self, name, coils, noise):
        s, truth = head(coils=coils, noise=noise, shape=(60, 56))
        model = methods.make(name, {"iterations": 60})
        ideal, blind = (tuning.choose(s, model, by=by, reference=truth) for by in ("reference", "heldout-kspace"))
        lost = quality(s, model, truth, ideal.dials) - quality(s, model, truth, blind.dials)
        assert lost < 0.25

    def test_held_out_kspace_without_a_known_noise(self):
        s, truth = head(noise=0.02)
        s, model = dataclasses.replace(s, noise_std=None), methods.make("tv", {"iterations": 60})
        ideal, blind = (tuning.choose(s, model, by=by, reference=truth) for by in ("reference", "heldout-kspace"))
        assert quality(s, model, truth, ideal.dials) - quality(s, model, truth, blind.dials) < 0.4

    def test_the_held_out_score_estimates_the_whole_error(self):
        s, truth = head(noise=0.03, shape=(96, 80))
        found = tuning.choose(s, methods.load("sense"), points=5, refine=0, splits=8, fraction=0.05)
        for row in found.rows:
            error = (reconstruct(s, methods.load("sense"), **row["dials"]).image - truth).abs().square().sum()
            assert row["score"] == pytest.approx(float(error), rel=0.35)

    def test_held_out_lines_of_a_cartesian_scan(self):
        x = phantom((64, 60), seed=2)[None]
        s, truth = simulate(x, mask=make_mask("cartesian-random", (64, 60), 2.5, seed=0), coils=1, noise=0.02)
        model = methods.make("tv", {"iterations": 60})
        ideal, blind = (tuning.choose(s, model, by=by, reference=truth) for by in ("reference", "heldout-kspace"))
        assert quality(s, model, truth, ideal.dials) - quality(s, model, truth, blind.dials) < 0.5

    def test_the_reference_is_never_looked_at_by_the_others(self):
        s, truth = head(shape=SHAPE)
        for by in ("heldout-kspace", "discrepancy", "sure"):
            assert tuning.choose(s, methods.load("sense"), by=by, reference=truth) == tuning.choose(
                s, methods.load("sense"), by=by
            )

    def test_the_seed_decides(self):
        s, _ = head(shape=SHAPE)
        first, again, other = (tuning.choose(s, methods.load("sense"), seed=seed) for seed in (3, 3, 4))
        assert first == again
        assert [r["score"] for r in first.rows] != [r["score"] for r in other.rows]

    def test_units_do_not_matter(self):
        s, _ = head(shape=SHAPE)
        scaled = dataclasses.replace(s, kspace=s.kspace * 512, noise_std=(s.noise_std or 0) * 512)
        for by in ("heldout-kspace", "discrepancy", "sure"):
            assert (
                tuning.choose(s, methods.load("sense"), by=by).dials
                == tuning.choose(scaled, methods.load("sense"), by=by).dials
            )

    def test_discrepancy_leaves_as_much_as_noise_does(self):
        s, _ = head(coils=4, noise=0.03)
        s = dataclasses.replace(s, csm=methods.prepare(s).csm)
        model = methods.make("tv", {"iterations": 60})
        found = tuning.choose(s, model, by="discrepancy")
        residual = float(reconstruct(s, model, **found.dials).residual)
        assert s.mask is not None
        expected = float((s.mask.sum() * 4).sqrt()) * (s.noise_std or 0) / float(s.kspace.abs().square().sum().sqrt())
        assert residual == pytest.approx(expected, rel=0.05)

    def test_sure_estimates_the_error_in_the_measured_range(self):
        s, truth = head(noise=0.05)
        found = tuning.choose(s, methods.load("sense"), by="sure", points=5, refine=0)
        for row in found.rows:
            image = reconstruct(s, methods.load("sense"), **row["dials"]).image
            assert s.mask is not None
            error = float((s.mask[:, 0] * fft2(image - truth)).abs().square().sum())
            assert row["score"] == pytest.approx(error, rel=0.15)

    def test_several_dials_and_words_are_searched_together(self):
        s, truth = head(shape=SHAPE, noise=0.0)
        found = tuning.choose(s, TwoDials(), by="reference", reference=truth, metric="psnr")
        assert found.dials["word"] == "plain"
        assert float(found.dials["a"]) == pytest.approx(0.0, abs=0.05)
        kept = tuning.choose(s, TwoDials(), by="reference", reference=truth, fixed={"a": 0.7})
        assert kept.dials["a"] == 0.7

    def test_an_empty_slice_does_not_judge(self):
        s, _ = head(shape=SHAPE, slices=2)
        kspace = s.kspace.clone()
        kspace[0] = 0
        holed = dataclasses.replace(s, kspace=kspace)
        alone = select(holed, slice(1, 2))
        for by in ("heldout-kspace", "discrepancy", "sure"):
            assert tuning.choose(holed, methods.load("sense"), by=by) == tuning.choose(
                alone, methods.load("sense"), by=by
            )

    def test_what_does_not_apply_is_refused_with_the_reason(self):
        s, _ = head(shape=SHAPE)
        unknown = dataclasses.replace(s, noise_std=None)
        with pytest.raises(errors.BadOption, match="white noise of a known level"):
            tuning.choose(unknown, methods.load("tv"), by="sure")
        with pytest.raises(errors.NoData, match="no ground truth"):
            tuning.choose(s, methods.load("tv"), by="reference")
        with pytest.raises(errors.BadOption, match="did you mean 'heldout-kspace'"):
            tuning.choose(s, methods.load("tv"), by="heldout")
        with pytest.raises(errors.BadOption, match="no dial left"):
            tuning.choose(s, methods.load("zero-filled"))
        with pytest.raises(errors.BadOption, match="no dial left"):
            tuning.choose(s, methods.load("tv"), fixed={"lam": 0.01})
        with pytest.raises(errors.BadOption, match="splits"):
            tuning.choose(s, methods.load("tv"), splits=0)
        silent = dataclasses.replace(unknown, kspace=s.kspace * (s.kspace.abs() > s.kspace.abs().quantile(0.95)))
        with pytest.raises(errors.BadOption, match="outermost samples hold none"):
            tuning.choose(silent, methods.load("tv"), by="discrepancy")

    def test_the_noise_is_estimated_from_the_rim_of_kspace(self):
        s, _ = head(noise=0.05, coils=4, slices=2)
        assert tuning.estimate_noise(s) == pytest.approx([s.noise_std] * 2, rel=0.15)


class TestHiding:
    @pytest.mark.parametrize("lines", ["none", "rows", "columns"])
    def test_hidden_and_kept_samples_are_the_measured_ones(self, lines):
        h, w = 63, 48
        g = torch.Generator().manual_seed(0)
        mask = {
            "none": make_mask("poisson", (h, w), 4.0, seed=0),
            "rows": (torch.rand(h, 1, generator=g) < 0.5).float().expand(h, w),
            "columns": (torch.rand(1, w, generator=g) < 0.5).float().expand(h, w),
        }[lines]
        kept, weight = split(mask[None], asked(splits=1, fraction=0.2), g)
        kept, weight = kept[0], weight[0]
        hidden = mask - kept[0]
        assert bool(((kept == 0) | (kept == 1)).all())
        assert bool(((hidden == 0) | (hidden == 1)).all())
        assert bool((weight[hidden == 0] == 0).all())
        assert 0.1 < float(hidden.sum() / mask.sum()) < 0.3
        assert kept[0, h // 2, w // 2] == mask[h // 2, w // 2], "the innermost sample stays"
        if lines == "rows":
            assert bool((hidden == hidden[:, :1]).all())
        if lines == "columns":
            assert bool((hidden == hidden[:1]).all())

    @pytest.mark.parametrize("family", ["cartesian-random", "poisson"])
    def test_the_splits_take_turns(self, family):
        """Of few lines, none is hidden twice, and every split hides some that stand for a gap."""
        mask = make_mask(family, (64, 60), 4.0, seed=0)
        kept, weight = split(mask[None], asked(splits=5, fraction=0.19), torch.Generator().manual_seed(0))
        hidden = mask - kept[:, 0]
        assert float(hidden.sum(0).max()) == 1
        assert bool((hidden.sum((1, 2)) > 0).all())
        assert bool((weight.sum((1, 2)) > 0).all())
        assert bool(((weight > 0) == (hidden > 0)).all()), "nothing is hidden that does not count"

    def test_where_nothing_can_be_hidden_it_is_refused(self):
        mask = torch.zeros(40, 40)
        mask[19:22, 19:22] = 1
        with pytest.raises(errors.BadOption, match="could be hidden"):
            split(mask[None], asked(splits=1, fraction=0.1), torch.Generator())

    def test_the_weights_count_what_was_not_measured(self):
        mask = make_mask("poisson", (96, 96), 4.0, seed=0)
        g = torch.Generator().manual_seed(0)
        total = float(split(mask[None], asked(splits=20, fraction=0.1), g)[1].sum()) / 20
        assert total == pytest.approx(float((1 - mask).sum()), rel=0.15)


def spokes(shots: int, *, noise: float = 0.02) -> tuple[Scan, Tensor]:
    """A phantom along golden-angle spokes, four coils, maps known."""
    x, csm = phantom((32, 32), seed=1)[None].to(torch.complex64), coil_maps((32, 32), 4, seed=0)[None]
    k = golden((32, 32), shots)[None]
    y = NonCartesian(k, csm)(x)
    y = y + noise * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return Scan(kspace=y, trajectory=k, image_shape=(32, 32), csm=csm), x


class TestOffTheGrid:
    @pytest.mark.parametrize("by", ["heldout-kspace", "diverse"])
    def test_hidden_readouts_find_a_good_setting(self, by):
        s, x = spokes(24)
        model = build("tv")
        found = tuning.choose(s, model, by=by, points=5, refine=2, splits=2, k=3)
        assert tuning.choose(s, model, by=by, points=5, refine=2, splits=2, k=3) == found
        best = tuning.choose(s, model, by="reference", reference=x, points=5, refine=2)
        if by == "diverse":
            assert len(found.picks) == 3
        else:
            assert "readouts" in found.reason
            assert quality(s, model, x, found.dials) > quality(s, model, x, best.dials) - 2
            assert quality(s, model, x, found.dials) > quality(s, model, x, {"lam": 0.1}) + 1, "not any setting"

    def test_whole_readouts_are_hidden_and_nothing_of_them_is_seen(self):
        s, _ = spokes(20)
        assert s.trajectory is not None
        of = readouts(s.trajectory[0])
        trials = _hide_readouts(s, asked(splits=3, fraction=0.2), torch.Generator().manual_seed(0))
        assert len(trials) == 3
        for trial in trials:
            seen, unseen = trial.y.shape[-1], trial.truth.shape[-1]
            assert seen + unseen == s.kspace.shape[-1]
            assert unseen == 4 * 64, "a fifth of twenty spokes"
            places = [bool((s.kspace[0, :, i, None] == trial.truth[0]).all(0).any()) for i in range(0, len(of), 64)]
            assert sum(places) == 4
            assert bool((trial.weight >= 0).all()) and bool(trial.weight.any())

    def test_what_cannot_be_is_said(self):
        s, _ = spokes(3)
        with pytest.raises(errors.BadOption, match="3 readout.* at least 4"):
            tuning.choose(s, build("tv"), by="heldout-kspace")
        for by in ("sure", "discrepancy"):
            with pytest.raises(errors.UnsupportedLayout, match="grid"):
                tuning.choose(s, build("tv"), by=by)


class TestDiversify:
    def test_farthest_first_and_only_what_passes(self):
        x = torch.tensor([[0.0], [1.0], [10.0], [4.0], [5.0]])
        q = torch.tensor([0.0, 0.2, -5.0, -0.5, -0.9])
        assert tuning.diversify(x, q, 3, within=1.2) == [1, 4, 0]
        assert tuning.diversify(x, q, 2, within=math.inf) == [1, 2]
        assert tuning.diversify(x, q, 9, within=1.0) == [1, 3, 0]

    def test_equal_images_are_not_picked_twice(self):
        assert len(tuning.diversify(torch.ones(5, 3), torch.zeros(5), 4)) == 1

    def test_it_spreads_better_than_picking_at_random(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(200, 6, generator=g)

        def spread(index: list[int]) -> float:
            return float(torch.pdist(x[index]).min())

        mine = spread(tuning.diversify(x, torch.zeros(200), 5))
        assert mine > max(spread(torch.randperm(200, generator=g)[:5].tolist()) for _ in range(100))

    def test_wrong_input_is_named(self):
        with pytest.raises(errors.BadOption, match="k = 0"):
            tuning.diversify(torch.ones(2, 2), torch.zeros(2), 0)
        with pytest.raises(errors.InconsistentShapes):
            tuning.diversify(torch.ones(2, 2), torch.zeros(3), 1)
        with pytest.raises(errors.NonFinite):
            tuning.diversify(torch.ones(2, 2), torch.tensor([0.0, math.nan]), 1)

    @every_dial
    def test_picks_of_a_scan_are_different_and_good(self, name):
        s, _ = head(shape=SHAPE)
        model = build(name)
        found = tuning.choose(s, model, by="diverse", k=4, points=3, refine=1, splits=1, within=2.0)
        assert 1 <= len(found.picks) <= 4
        assert len({tuple(p.values()) for p in found.picks}) == len(found.picks)
        scores = {tuple(row["dials"].values()): row["score"] for row in found.rows}
        best = scores[tuple(found.dials.values())]
        for pick in found.picks:
            assert scores[tuple(pick.values())] <= best * 10**0.2 * (1 + 1e-9)


class TestRangeBasis:
    @every_dial
    def test_the_grid_is_rebuilt_exactly_when_all_components_are_kept(self, name):
        s, _ = head(shape=SHAPE)
        model = build(name)
        basis = tuning.range_basis(model, s, grid=3, components=99, rank_db=-99)
        assert basis.settings.shape == (3 ** len(basis.names), len(basis.names))
        for row in basis.settings:
            dials = dict(zip(basis.names, row.tolist(), strict=True))
            assert relative(basis.rebuild(dials), reconstruct(s, model, **dials).magnitude[0]) < 1e-4

    @every_dial
    def test_components_are_orthonormal(self, name):
        s, _ = head(shape=SHAPE)
        for complex_valued in (False, True):
            basis = tuning.range_basis(build(name), s, grid=4, complex_valued=complex_valued, rank_db=20)
            v = basis.components.flatten(1)
            assert v.is_complex() == complex_valued
            gram = (v @ v.conj().T).real
            assert torch.allclose(gram, torch.eye(len(v)), atol=1e-4)
            assert basis.coefficients.shape == (len(basis.settings), len(v))

    @pytest.mark.parametrize("name", ["sense", "tv"])
    def test_the_errors_it_reports_are_those_of_settings_between_the_grid(self, name):
        s, _ = head(shape=SHAPE)
        model = build(name)
        basis = tuning.range_basis(model, s)
        dial, axis = model.dials["lam"], basis.axes[0]
        found = []
        for low, high in zip(axis, axis[1:], strict=False):
            lam = math.sqrt(low * high)  # the middle on a logarithmic scale
            exact = reconstruct(s, model, lam=lam).magnitude
            found.append(psnr(basis.rebuild({"lam": lam})[None], exact))
        assert basis.worst_db >= 50
        assert min(found) >= 50
        assert min(found) >= basis.worst_db - 0.05
        assert float(np.median(found)) == pytest.approx(basis.median_db, abs=1.0)
        assert 1 <= len(basis.components) < len(basis.settings)
        fewer = tuning.range_basis(model, s, components=len(basis.components) - 1)
        assert fewer.worst_db < 50, "as few components as will do"
        assert basis.axes[0][0] == dial.lo
        assert basis.axes[0][-1] == dial.hi

    def test_the_grid_grows_where_it_must_and_no_further_than_allowed(self):
        s, _ = head(shape=SHAPE)
        model = methods.load("sense")
        coarse = tuning.range_basis(model, s, grid=3, most=3)
        fine = tuning.range_basis(model, s, grid=3)
        assert len(coarse.settings) == 3 < len(fine.settings)
        assert coarse.worst_db < 50 <= fine.worst_db

    def test_several_dials(self):
        s, _ = head(shape=SHAPE)
        basis = tuning.range_basis(TwoDials(), s, complex_valued=True)
        assert basis.names == ("a", "b")
        assert basis.fixed == {"word": "plain"}
        assert basis.worst_db >= 50
        for dials in ({"a": 0.31, "b": 0.07}, {"a": 1.0, "b": 0.012}, {}):
            exact = reconstruct(s, TwoDials(), **dials).image[0]
            assert relative(basis.rebuild(dials), exact) < 0.02
        with pytest.raises(errors.BadOption, match="fixed"):
            basis.rebuild({"word": "turned"})
        with pytest.raises(errors.BadOption, match="outside"):
            basis.rebuild({"a": 2.0})
        one = tuning.range_basis(TwoDials(), s, dials=["b"], fixed={"a": 0.2, "word": "turned"})
        assert one.fixed == {"a": 0.2, "word": "turned"}
        assert (
            relative(
                one.rebuild({"b": 0.5, "a": 0.2}), reconstruct(s, TwoDials(), a=0.2, b=0.5, word="turned").magnitude[0]
            )
            < 0.01
        )

    def test_distances_of_coefficients_are_those_of_images(self):
        s, _ = head(shape=SHAPE)
        basis = tuning.range_basis(methods.load("sense"), s)
        lams = torch.tensor([[2e-4], [0.013], [0.7]], dtype=torch.float64)
        c = basis.coefficients_at(lams)
        images = torch.stack([basis.rebuild({"lam": float(v)}) for v in lams])
        assert torch.allclose(torch.pdist(c.float()), torch.pdist(images.flatten(1)), rtol=1e-3)

    def test_any_slice(self):
        s, _ = head(shape=SHAPE, slices=3)
        model = methods.load("sense")
        for index in (None, 2):
            basis = tuning.range_basis(model, s, index=index)
            b = 1 if index is None else index
            assert relative(basis.rebuild({"lam": 0.05}), reconstruct(s, model, lam=0.05).magnitude[b]) < 0.02
        with pytest.raises(errors.BadOption, match="slice from 0 to 2"):
            tuning.range_basis(model, s, index=3)

    def test_without_a_range_it_is_refused(self):
        s, _ = head(shape=SHAPE)
        with pytest.raises(errors.BadOption, match="no dial with a range"):
            tuning.range_basis(methods.load("zero-filled"), s)
        with pytest.raises(errors.BadOption, match="has no range"):
            tuning.range_basis(TwoDials(), s, dials=["word"])
        with pytest.raises(errors.BadOption, match="did you mean 'lam'"):
            tuning.range_basis(methods.load("tv"), s, dials=["lamb"])
        with pytest.raises(errors.BadOption, match="two points"):
            tuning.range_basis(methods.load("tv"), s, grid=1)


class TestWhereADialMatters:
    @every_dial
    def test_sensitivity_is_the_limit_of_differences(self, name):
        s, _ = head(shape=SHAPE, coils=2, slices=2)
        model = build(name)
        dial_name, dial = next((n, d) for n, d in model.dials.items() if not d.choices)
        # Away from lam = 0.006, where TV takes another penalty and the iterates, not the minimum, have a kink.
        found = tuning.sensitivity(model, s, {dial_name: dial.at(0.7)}, dial_name)
        assert found.map.shape == (2, *SHAPE)
        low, high = (reconstruct(s, model, **{dial_name: dial.at(p)}).image for p in (0.68, 0.72))
        difference = ((high - low) / 0.04).abs()
        assert relative(found.map, difference) < 0.15

    def test_our_methods_are_differentiated(self):
        s, _ = head(shape=SHAPE)
        for name in ("sense", "tv", "wavelet", "hyperrecon"):
            model = build(name)
            assert tuning.sensitivity(model, s, {}, next(iter(model.dials))).how == "derivative"

    def test_exactly(self):
        s, _ = head(shape=SHAPE)
        zero_filled = reconstruct(s, methods.load("zero-filled")).image
        found = tuning.sensitivity(TwoDials(), s, {"a": 0.4, "b": 0.01}, "a")
        assert relative(found.map, 0.5 * zero_filled.abs()) < 1e-5
        at_b = tuning.sensitivity(TwoDials(), s, {"b": 0.2}, "b")
        scale = reconstruct(s, methods.load("zero-filled")).stats["scale"][0]
        assert relative(at_b.map, 0.3 * 0.2 * math.log(100) * zero_filled.abs().square() / scale) < 1e-5

    @pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
    def test_where_there_is_no_derivative_it_says_so(self, value):
        s, _ = head(shape=SHAPE)
        found = tuning.sensitivity(Rounding(), s, {"a": value}, "a")
        assert found.how.startswith("finite difference: ")
        zero_filled = reconstruct(s, methods.load("zero-filled")).image.abs()
        assert (
            relative(found.map, (2 * value + (0.01 if value == 0 else -0.01 if value == 1 else 0)) * zero_filled) < 0.01
        )

    def test_the_range_map_is_what_the_dial_can_change(self):
        s, _ = head(shape=SHAPE, slices=2)
        zero_filled = reconstruct(s, methods.load("zero-filled")).magnitude
        assert relative(tuning.range_map(Rounding(), s, "a"), zero_filled) < 1e-6
        sweep = torch.stack([reconstruct(s, build("tv"), lam=1e-4 * 1000 ** (i / 4)).magnitude for i in range(5)])
        found = tuning.range_map(build("tv"), s, "lam", points=5)
        assert relative(found, sweep.amax(0) - sweep.amin(0)) < 1e-5


class Growing(Reconstructor):
    """x̂ = exp(3 aᵏ) Aᴴy: its relative change is 3 k aᵏ⁻¹ da, so that aᵏ would be the even slider."""

    def __init__(self, k: float = 4.0) -> None:
        super().__init__()
        self.k = k

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        a: Annotated[float, Dial(sentence="size", default=0.5)] = 0.5,
        b: Annotated[float, Dial(sentence="tilt", default=1.0, lo=0.01, hi=1.0, scale="log")] = 1.0,
    ) -> Reconstruction:
        change = torch.as_tensor(3.0 * a**self.k + b).exp()
        return Reconstruction(image=change * A.H(y), dials={"a": a, "b": b})


class TestEqualSteps:
    def test_the_slider_is_the_inverse_of_the_way_that_the_image_goes(self):
        s, _ = head(shape=SHAPE)
        model = Growing()
        even = tuning.equal_steps(model, [s], dials=["a"])
        for p in (0.0, 0.1, 0.37, 0.5, 0.93, 1.0):
            assert even.dials["a"].at(p) == pytest.approx(p**0.25, abs=0.01)
        before, after = (tuning.step_sizes(m, s, "a") for m in (model, even))
        assert float(before.max() / before.min()) > 100
        # The first knot lies 1/32 up the slider, where a⁴ is bent most.
        assert float(after.max() / after.min()) < 2
        assert float(after[2:].max() / after[2:].min()) < 1.1
        assert not model.dials["a"].curve, "the model itself is as it was"

    def test_a_logarithmic_dial_and_all_dials_at_once(self):
        s, _ = head(shape=SHAPE)
        even = tuning.equal_steps(Growing(1.0), [s])
        assert set(even.curves) == {"a", "b"}
        sizes = tuning.step_sizes(even, s, "b")
        assert float(sizes.max() / sizes.min()) < 1.1
        assert even.dials["b"].at(0.5) == pytest.approx(0.505, abs=0.01), "e^b changes as b does"
        again = tuning.equal_steps(even, [s], dials=["a"])
        assert again.dials["b"] == even.dials["b"], "only what was asked for"

    @every_dial
    def test_it_evens_every_method_out_and_changes_no_value(self, name):
        s, _ = head(shape=SHAPE)
        model = build(name)
        dial = next(n for n, d in model.dials.items() if not d.choices)
        even = tuning.equal_steps(model, [s], dials=[dial], most=33)
        sizes = [tuning.step_sizes(m, s, dial, steps=8) for m in (model, even)]
        ratio = [float(size.max() / size.min()) for size in sizes]
        # The first iterates of TV jump where it takes another penalty: no slider spreads a jump.
        assert ratio[1] < max(1.5, 0.8 * ratio[0])
        value = model.dials[dial].at(0.3)
        assert torch.equal(
            reconstruct(s, even, **{dial: value}).image, reconstruct(s, model, **{dial: value}).image
        )  # fmt: skip

    def test_a_jump_is_found_and_stays_one_step(self):
        s, _ = head(shape=SHAPE)
        done: list[int] = []
        even = tuning.equal_steps(
            Growing(math.inf), [s], dials=["a"], progress=lambda now, total: done.append(now)
        )  # aᵏ is 0, but for a = 1
        assert len(done) < 30
        assert even.dials["a"].at(0.5) > 0.99
        assert int((tuning.step_sizes(even, s, "a", steps=8) > 0).sum()) == 1

    def test_it_is_the_mean_over_scans(self):
        scans = [head(shape=SHAPE, noise=noise)[0] for noise in (0.005, 0.05)]
        alone = [tuning.equal_steps(methods.load("sense"), [s]).dials["lam"].at(0.5) for s in scans]
        both = tuning.equal_steps(methods.load("sense"), scans).dials["lam"].at(0.5)
        assert min(alone) < both < max(alone)

    def test_it_lives_in_the_weights(self, tmp_path):
        s, _ = head(shape=SHAPE)
        model = build("hyperrecon")
        even = tuning.equal_steps(model, [s])
        methods.save(even, tmp_path / "even.safetensors")
        back = methods.load(tmp_path / "even.safetensors")
        assert back.dials == even.dials != model.dials
        assert torch.equal(reconstruct(s, back, ssim=0.3).image, reconstruct(s, model, ssim=0.3).image)
        assert methods.card(tmp_path / "even.safetensors")["dials"]["ssim"]["curve"][-1] == 1.0

    @pytest.mark.parametrize(
        "curve", [[0.0, 0.7, 0.3, 1.0], [0.1, 1.0], [0.0, "x", 1.0], [1.0], 3.0, [0.0, math.nan, 1.0]]
    )
    def test_a_curve_that_is_none_is_refused(self, tmp_path, curve):
        even = build("hyperrecon")
        methods.save(even, tmp_path / "even.safetensors")
        tensors = safetensors.torch.load_file(tmp_path / "even.safetensors")
        header = methods.card(tmp_path / "even.safetensors")
        header["dials"]["ssim"]["curve"] = curve
        del header["sha256"]
        safetensors.torch.save_file(tensors, tmp_path / "bent.safetensors", {"tunemri": json.dumps(header)})
        with pytest.raises(errors.WrongModel, match="header"):
            methods.load(tmp_path / "bent.safetensors")

    def test_all_that_follows_a_slider_follows_it(self):
        s, truth = head(shape=SHAPE)
        even = tuning.equal_steps(Growing(), [s], dials=["a"])
        dial = even.dials["a"]
        assert grid(dial, 5) == [0.0, 0.25, 0.5, 0.75, 1.0], "what is asked for in numbers stays"
        size = reconstruct(s, even, a=0.8).magnitude
        assert relative(tuning.sensitivity(even, s, {"a": 0.8}, "a").map, 3 * size) < 0.05
        tried = [r["dials"]["a"] for r in tuning.choose(s, even, fixed={"b": 1.0}, points=5, refine=0).rows]
        assert tried == [dial.at(p) for p in (0, 0.25, 0.5, 0.75, 1)]
        basis = tuning.range_basis(even, s, dials=["a"], grid=5, most=5)
        assert basis.axes[0] == pytest.approx([dial.at(p) for p in (0, 0.25, 0.5, 0.75, 1)])
        exact = reconstruct(s, even, a=dial.at(0.75)).magnitude[0]
        assert relative(basis.rebuild({"a": dial.at(0.75)}), exact) < 1e-4

    def test_what_cannot_be_is_refused(self):
        s, _ = head(shape=SHAPE)
        with pytest.raises(errors.NoData, match="no scan"):
            tuning.equal_steps(Growing(), [])
        with pytest.raises(errors.BadOption, match="no dial with a range"):
            tuning.equal_steps(methods.load("zero-filled"), [s])
        with pytest.raises(errors.BadOption, match="the same all along"):
            tuning.equal_steps(Growing(k=0), [s], dials=["a"])
        with pytest.raises(errors.BadOption, match="at least 1"):
            tuning.step_sizes(Growing(), s, "a", steps=0)


@given(
    st.sampled_from(["linear", "log"]),
    st.lists(st.floats(0.01, 10), min_size=2, max_size=12),
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
def test_a_slider_and_its_inverse(scale, increments, places):
    knots = tuple(itertools.accumulate(increments))
    dial = Dial(sentence="s", default=knots[0], lo=knots[0], hi=knots[-1], scale=scale, curve=knots)
    values = [dial.at(p) for p in sorted(places)]
    assert values == sorted(values)
    for p in places:
        assert dial.position(dial.at(p)) == pytest.approx(p, abs=1e-6)
    for i, knot in enumerate(knots):
        assert dial.at(i / (len(knots) - 1)) == pytest.approx(knot)
        assert dial.position(knot) == pytest.approx(i / (len(knots) - 1))
    p = (0.5 + int(places[0] * 0.999 * (len(knots) - 1))) / (len(knots) - 1)  # in the middle of a piece
    difference = (dial.at(p + 1e-6) - dial.at(p - 1e-6)) / 2e-6
    assert dial.slope(dial.at(p)) == pytest.approx(difference, rel=1e-4)


class TestCommand:
    def test_equalise_writes_weights_that_load(self, run, file):  # noqa: F811
        methods.save(build("hyperrecon"), "small.safetensors", {"summary": "small"})
        done = run("equalise", "small.safetensors", file, "-o", "even.safetensors", "--json")
        assert done.code == 0, done.err
        dial = methods.load("even.safetensors").dials["ssim"]
        assert list(dial.curve) == done.json["curves"]["ssim"]
        made = methods.card("even.safetensors")["recipe"]
        assert made["summary"] == "small"
        assert made["equalised"]["dials"] == ["ssim"]
        swept = run("sweep", file, "-m", "even.safetensors", "--grid", "ssim=0:1:5", "-o", "swept", "--json")
        assert swept.code == 0, swept.err
        rows = (file.parent / "swept" / "table.csv").read_text().splitlines()
        at = rows[0].split(",").index("dial_ssim")
        assert [float(r.split(",")[at]) for r in rows[1:]] == [0, 0.25, 0.5, 0.75, 1]
        np.save("maps.npy", coil_maps((48, 40), 8)[None].numpy())
        done = run("equalise", "small.safetensors", file, "-o", "mapped.safetensors", "--csm", "maps.npy")
        assert done.code == 0, done.err
        np.save("maps.npy", coil_maps((40, 48), 8)[None].numpy())
        assert run("equalise", "small.safetensors", file, "-o", "m.safetensors", "--csm", "maps.npy").code == 2
        assert run("equalise", "small.safetensors", file, "-o", "even.safetensors").code == 2
        assert run("equalise", "small.safetensors", file, "-o", "even.h5").code == 2
        assert "ssim" in run("equalise", "small.safetensors", file, "--dial", "sim", "-o", "x.safetensors").errors[0]

    @pytest.fixture
    def file(self, run, tmp_path):  # noqa: F811
        np.save("image.npy", phantom((48, 40), seed=1)[None].numpy())
        assert run("simulate", "image.npy", "-o", "scan.h5", "--mask", "poisson", "-R", 3, "--noise", 0.02).code == 0
        return tmp_path / "scan.h5"

    def test_one_line_and_picks_that_recon_repeats(self, run, file):  # noqa: F811
        done = run("choose", file, "-m", "sense", "--by", "diverse", "-k", 3, "--within", 3, "-o", "picks.json")
        assert done.code == 0, done.err
        assert len(done.out.splitlines()) == 1
        assert done.out.startswith("picks.json  lam=")
        facts = json.loads((file.parent / "picks.json").read_text())
        assert facts["dials"] == facts["picks"][0]["dials"]
        assert len(facts["picks"]) == 3
        assert {"scan_sha256", "command", "seed", "tried", "reason"} <= facts.keys()
        for source, number in (("picks.json", 0), ("picks.json#1", 0), ("picks.json#3", 2)):
            again = run("recon", "--from", source, "-o", "out.npy", "--overwrite", "--json")
            assert again.code == 0, again.err
            assert again.json["dials"] == facts["picks"][number]["dials"]
        refused = run("recon", "--from", "picks.json#4", "-o", "other.npy")
        assert refused.code == 2
        assert "expected 1 to 3" in refused.errors[0]
        assert run("recon", "--from", "picks.json#x", "-o", "other.npy").code == 2

    def test_json_without_a_file(self, run, file):  # noqa: F811
        before = sorted(p.name for p in file.parent.iterdir())
        done = run("choose", file, "-m", "sense", "--json")
        assert done.code == 0, done.err
        assert done.json["by"] == "heldout-kspace"
        assert done.json["model"] == "sense"
        assert 1e-4 <= done.json["dials"]["lam"] <= 1.0
        assert sorted(p.name for p in file.parent.iterdir()) == before

    def test_the_reference_in_the_file_serves(self, run, file):  # noqa: F811
        best = run("choose", file, "-m", "sense", "--by", "reference", "--json").json
        at = [
            run("recon", file, "-m", f"sense:lam={lam}", "-o", "x.npy", "--overwrite", "--json").json["metrics"]["psnr"]
            for lam in (best["dials"]["lam"], 1e-3, 0.5)
        ]
        assert at[0] == max(at)

    def test_nothing_is_overwritten_and_nothing_left_behind(self, run, file):  # noqa: F811
        (file.parent / "picks.json").write_text("mine")
        refused = run("choose", file, "-m", "sense", "-o", "picks.json")
        assert (refused.code, (file.parent / "picks.json").read_text()) == (2, "mine")
        assert run("choose", file, "-m", "sense", "-o", "picks.txt").code == 2
        assert run("choose", file, "-m", "sense", "--by", "taste", "-o", "new.json").code == 2
        assert not (file.parent / "new.json").exists()
        assert run("choose", file, "-m", "sense", "-o", "picks.json", "--overwrite").code == 0
        assert json.loads((file.parent / "picks.json").read_text())["ok"]
