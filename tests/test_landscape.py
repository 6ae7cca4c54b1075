"""Landscapes, their curves and far pairs, self-consistency: laws, against brute force where the grid is small."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laws import random
from test_cli import image, run, tiny  # noqa: F401  the fixtures
from test_plots_report import pixels
from test_reconstructors import SMALL
from tunemri import errors, evaluation, losses, methods, metrics, plots
from tunemri.datasets import Example
from tunemri.evaluation import Case, Contestant, Row
from tunemri.fourier import crop
from tunemri.landscape import (
    Consistency,
    Landscape,
    area_above,
    dice_along,
    energy_surface,
    histogram,
    interpolate,
    landscape,
    self_consistency,
)
from tunemri.masks import make_mask
from tunemri.methods import Dial, Reconstructor, prepare, reconstruct
from tunemri.operators import LinearOperator, encoding
from tunemri.scan import Reconstruction, Scan
from tunemri.simulate import phantom, sample, simulate

SHAPE = (24, 19)
THRESHOLDS = (-6.0, -2.0, -1.0, -0.5, -0.2, 0.0, 0.3, 40.0)


class Waves(Reconstructor):
    """x̂ = |Aᴴy| (1 + patterns that grow with a and with log b): smooth in both dials, curved, never constant.

    Raises at its `fail`-th image, to test what a stop leaves.
    """

    def __init__(self, fail: int | None = None) -> None:
        super().__init__()
        self.made, self.fail = 0, fail
        self.register_buffer("gain", torch.ones(()))

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        a: Annotated[float, Dial(sentence="one", default=0.5)] = 0.5,
        b: Annotated[float, Dial(sentence="two", default=0.1, lo=0.01, hi=1.0, scale="log")] = 0.1,
        word: Annotated[str, Dial(sentence="which", default="plain", choices=("plain", "dark"))] = "plain",
    ) -> Reconstruction:
        self.made += 1
        if self.made == self.fail:
            raise RuntimeError("pulled the plug")
        x = A.H(y)
        rows = torch.arange(x.shape[-2])[:, None] / x.shape[-2]
        cols = torch.arange(x.shape[-1]) / x.shape[-1]
        p = math.log10(b) + 2
        change = 0.3 * (a - 0.4) * torch.cos(7 * rows + 3 * a) + 0.1 * (p - 1.2) * torch.sin(5 * cols + p * rows)
        x = x * (1 + change) * self.gain
        return Reconstruction(image=0.5 * x if word == "dark" else x, dials={"a": a, "b": b, "word": word})


def case(seed: int = 0, *, slices: int = 1, coils: int = 1, shape: tuple[int, int] = SHAPE) -> Case:
    x = torch.stack([phantom(shape, seed=seed + s) for s in range(slices)])
    scan, truth = simulate(x, mask=make_mask("poisson", shape, 2.0, seed=seed), coils=coils, noise=0.01, seed=seed)
    return Case(name=f"case {seed}", scan=scan, reference=truth)


def mapped(scan: Scan) -> Scan:
    """With the maps that would be found anew for each image."""
    return dataclasses.replace(scan, csm=prepare(scan).csm)


def images_of(found: Landscape, model: Reconstructor, c: Case) -> Tensor:
    """Every image of the grid `(settings, B, H, W)`, magnitudes over the maximum of the reference."""
    truth = c.reference.abs()
    settings, scan = [{**found.fixed, **found.setting(i)} for i in range(found.mean.numel())], mapped(c.scan)
    made = [crop(reconstruct(scan, model, **at).image, truth.shape[1:]).abs() for at in settings]
    return torch.stack(made) / truth.max()


@pytest.fixture(scope="module")
def land() -> Landscape:
    return landscape(Waves(), [case(0), case(3, slices=2, coils=3)], points=9, thresholds=THRESHOLDS)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("metric", [*metrics.METRICS, "rpsnr"])
@pytest.mark.parametrize("dials", [{"a": 3}, {"b": 2, "a": 3}, {"a": [0.9, 0.1], "b": 0.3, "word": "dark"}], ids=str)
def test_values_are_those_of_reconstruct_in_the_order_of_the_grid(metric, dials):
    model, cases = Waves(), [case(0), case(3, slices=2, coils=3)]
    cases[0] = dataclasses.replace(cases[0], reference=crop(cases[0].reference, (16, 16)))
    found = landscape(model, cases, dials=dials, metric=metric)
    assert list(found.dials) == [name for name, asked in dials.items() if not isinstance(asked, float | str)]
    assert tuple(map(len, found.axes)) == found.values.shape[1:]
    entries = evaluation.along(Contestant(name="m", model=model), dials)
    for c, one in enumerate(cases):
        truth, scan = one.reference.abs(), mapped(one.scan)
        zero = crop(reconstruct(scan, methods.load("zero-filled")).image, truth.shape[1:]).abs()
        for i, entry in enumerate(entries):
            assert {**found.fixed, **found.setting(i)} == entry.dials
            x = crop(reconstruct(scan, model, **entry.dials).image, truth.shape[1:]).abs()
            expected = metrics.rpsnr(x, truth, zero) if metric == "rpsnr" else metrics.score(x, truth, [metric])[metric]
            assert float(found.values[c].flatten()[i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_dials_not_in_the_grid_take_what_reconstruct_would_take():
    model, c = methods.load("tv"), case()
    found = landscape(model, [c], points=2, metric="psnr")
    rows = evaluation.sweep(c.scan, model, 2, reference=c.reference, metrics=["psnr"])
    assert found.values[0].tolist() == pytest.approx([row.metrics["psnr"] for row in rows], rel=1e-6)


def test_best_is_the_best_either_way_round():
    for metric, pick in (("psnr", max), ("nmse", min)):
        found = landscape(Waves(), [case(0), case(1)], points=5, metric=metric, far=None)
        setting, value = found.best
        assert value == pick(found.mean.flatten().tolist())
        i, j = (found.axes[k].index(setting[name]) for k, name in enumerate(found.dials))
        assert float(found.mean[i, j]) == value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dials": {"c": 3}}, "no such dial"),
        ({"dials": {"word": 3}}, "dial of words"),
        ({"dials": {"a": 0.5}}, "expected one or two"),
        ({"dials": {"a": []}}, "expected one or two"),
        ({"dials": {"a": [2.0]}}, "outside"),
        ({"metric": "psmr"}, "psnr"),
        ({"thresholds": [math.nan]}, "finite"),
        ({"far": 1.5}, "quantile"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(errors.BadOption, match=words):
        landscape(Waves(), [case()], **{"points": 2} | options)
    with pytest.raises(errors.NoData, match="reference"):
        landscape(Waves(), [dataclasses.replace(case(), reference=None)], points=2)


def test_an_image_with_nan_is_refused():
    model = Waves()
    model.gain.fill_(math.nan)
    with pytest.raises(errors.NonFinite, match="'a'"):
        landscape(model, [case()], points=2)


# ---------------------------------------------------------------- curves


def test_area_falls_from_one_to_zero(land):
    t = sorted([*THRESHOLDS, -math.inf, math.inf, float(land.mean.max()), float(land.mean.min())])
    area = area_above(land, t).tolist()
    assert area == sorted(area, reverse=True)
    assert (area[0], area[-1]) == (1.0, 0.0)
    assert float(area_above(land, [float(land.mean.max())])) == 0.0, "strictly above"
    assert float(area_above(land, [float(land.mean.median())])) == pytest.approx(0.5, abs=1 / land.mean.numel())


def test_area_turns_round_where_lower_is_better():
    found = landscape(Waves(), [case()], points=4, metric="nmse", far=None)
    assert area_above(found, [0.0, 1e9]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("metric", ["rpsnr", "nmse"])
def test_range_curve_is_that_of_all_images_kept(metric):
    cases = [case(0), case(3, slices=2)]
    thresholds = THRESHOLDS if metric == "rpsnr" else (0.001, 0.01, 0.012, 0.02, 0.05)
    found = landscape(Waves(), cases, points=6, metric=metric, thresholds=thresholds)
    assert found.thresholds == tuple(sorted(thresholds))
    for c, one in enumerate(cases):
        images = images_of(found, Waves(), one)
        values = found.values[c].flatten()
        for i, t in enumerate(found.thresholds):
            good = images[values > t if metric == "rpsnr" else values < t].double()
            expected = float((good.amax(0) - good.amin(0)).sum() / images.shape[1]) if len(good) else 0.0
            assert float(found.ranges[c, i]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    curve = found.range_curve.tolist() if metric == "rpsnr" else found.range_curve.flip(0).tolist()
    assert curve == sorted(curve, reverse=True)
    assert curve[0] > 0
    assert curve[-1] == 0


def test_the_threshold_itself_is_not_above():
    second = sorted(landscape(Waves(), [case()], points=4).values.flatten().tolist())[-2]
    found = landscape(Waves(), [case()], points=4, thresholds=[second - 1e-9, second])
    assert float(found.ranges[0, 0]) > 0
    assert float(found.ranges[0, 1]) == 0, "the best image alone"


def test_a_single_setting_has_no_range_and_no_distance():
    found = landscape(Waves(), [case()], points=1, thresholds=[-50.0])
    assert float(found.range_curve) == 0.0
    assert found.far[0].distance == 0.0


# ---------------------------------------------------------------- the far pair


def brute(found: Landscape, c: int, one: Case) -> tuple[float, float, int]:
    """Exact largest distance, lowest good value, and how many are good."""
    images = images_of(found, Waves(), one).flatten(1).double()
    values = found.values[c].flatten()
    bar = float(np.percentile(values.numpy(), 90))
    good = images[values >= bar]
    return float(torch.cdist(good, good).max()), bar, len(good)


def test_the_far_pair_of_a_small_grid_is_the_one_of_brute_force(land):
    for c, one in enumerate([case(0), case(3, slices=2, coils=3)]):
        distance, bar, good = brute(land, c, one)
        assert 2 <= good <= 16
        pair = land.far[c]
        assert pair.case == one.name
        assert pair.distance == pytest.approx(distance, rel=1e-4)
        assert min(pair.values) >= bar
        a, b = (reconstruct(one.scan, Waves(), **at).image.abs() / one.reference.abs().max() for at in (pair.a, pair.b))
        assert float((a - b).square().sum().sqrt()) == pytest.approx(pair.distance, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_far_pair_of_a_larger_grid_is_found_by_sketches(seed):
    found = landscape(Waves(), [case(seed)], points=22)
    distance, _, good = brute(found, 0, case(seed))
    assert good > 40
    assert 0.98 * distance < found.far[0].distance <= distance * 1.0001


# ---------------------------------------------------------------- stop and go on


def same(a: Landscape, b: Landscape) -> bool:
    return torch.equal(a.values, b.values) and torch.equal(a.ranges, b.ranges) and a.far == b.far and a.axes == b.axes


@pytest.mark.parametrize("stop", [1, 2, 20, 36, 37, 40, 41, 42, 60])
def test_a_run_that_was_stopped_ends_with_the_same_numbers(tmp_path, stop):
    # 36 settings, then 4 images of the far pair; two cases.
    cases, file = [case(0), case(1)], tmp_path / "state.safetensors"
    options: dict[str, Any] = {"points": 6, "thresholds": THRESHOLDS}
    whole = landscape(Waves(), cases, **options)
    with pytest.raises(RuntimeError, match="plug"):
        landscape(Waves(fail=stop), cases, file=file, **options)
    again, seen = Waves(), []
    assert same(landscape(again, cases, file=file, progress=lambda n, of: seen.append((n, of)), **options), whole)
    assert again.made <= 2 * 40 - stop + 6, "what was done is not done again"
    assert seen[-1] == (72, 72)
    third = Waves()
    assert same(landscape(third, cases, file=file, **options), whole)
    assert third.made == 0


def test_sketches_survive_a_stop(tmp_path):
    whole = landscape(Waves(), [case()], points=15)
    with pytest.raises(RuntimeError, match="plug"):
        landscape(Waves(fail=150), [case()], points=15, file=tmp_path / "state.safetensors")
    assert same(landscape(Waves(), [case()], points=15, file=tmp_path / "state.safetensors"), whole)


def test_a_state_written_on_the_way_is_as_good_as_one_written_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tunemri.landscape._SAVE_EVERY", -1.0)
    file, options = tmp_path / "state.safetensors", {"points": 5, "thresholds": THRESHOLDS}
    kept: list[bytes] = []
    whole = landscape(Waves(), [case()], file=file, progress=lambda n, of: kept.append(file.read_bytes()), **options)
    for state in kept[::7]:
        file.write_bytes(state)
        assert same(landscape(Waves(), [case()], file=file, **options), whole)


def test_the_state_of_another_landscape_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    landscape(Waves(), [case()], points=2, file=file)
    other = Waves()
    other.gain.fill_(1.1)
    noisy = dataclasses.replace(case(), scan=dataclasses.replace(case().scan, kspace=case().scan.kspace * 1.01))
    for model, cases, options in (
        (other, [case()], {"points": 2}),
        (Waves(), [noisy], {"points": 2}),
        (Waves(), [case(), case(1)], {"points": 2}),
        (Waves(), [case()], {"points": 3}),
        (Waves(), [case()], {"points": 2, "metric": "psnr"}),
        (Waves(), [case()], {"points": 2, "thresholds": [1.0]}),
    ):
        with pytest.raises(errors.BadOption, match="another landscape"):
            landscape(model, cases, file=file, **options)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(errors.UnreadableFile, match="start again"):
        landscape(Waves(), [case()], points=2, file=file)


def test_memory_does_not_grow_with_the_grid_by_more_than_a_sketch(tmp_path):
    sizes = {}
    for points in (5, 15):
        file = tmp_path / f"{points}.safetensors"
        landscape(Waves(), [case(shape=(48, 48))], points=points, thresholds=THRESHOLDS, file=file)
        sizes[points] = file.stat().st_size
    # What is kept is what is written: a sketch and a value per setting, far less than its image (9216 bytes).
    assert sizes[15] - sizes[5] < 1100 * (15**2 - 5**2) + 2 * 9300 * len(THRESHOLDS)


# ---------------------------------------------------------------- dedicated networks in between


def test_interpolation_is_exact_for_what_is_linear(land):
    def plane(a: float, b: float) -> float:
        return 3 * a - 2 * math.log(b) + 1

    settings = [{"a": a, "b": b, "word": "plain"} for a in (0.0, 0.3, 1.0) for b in (0.01, 1.0)]
    filled = interpolate(land, settings, [plane(s["a"], s["b"]) for s in settings])
    for i in range(land.mean.numel()):
        assert float(filled.mean.flatten()[i]) == pytest.approx(plane(**land.setting(i)), abs=1e-9)
    line = landscape(Waves(), [case()], dials={"b": 5}, far=None)
    filled = interpolate(line, [{"b": 1.0}, {"b": 0.1}], [2.0, 1.0])
    assert filled.mean[:2].isnan().all(), "nothing is known outside"
    assert filled.mean[2:].tolist() == pytest.approx([1.0, 1.5, 2.0])
    assert area_above(filled, [1.2]).tolist() == pytest.approx([2 / 3])
    assert filled.best[0] == {"b": 1.0}
    for bad in ([{"a": 0.5}] * 4, [{"a": t, "b": 0.1} for t in (0.0, 0.5, 1.0)]):
        with pytest.raises(errors.BadOption, match="setting"):
            interpolate(land, bad, [1.0] * len(bad))


# ---------------------------------------------------------------- self-consistency


class Ideal(Reconstructor):
    """argmin_x w₁ mean |x - t|² + w₂ ‖A x - y‖² / ‖y‖² for unitary A and known t: the best image for every weighting."""

    names, objective = ("mse", "dc"), "mean"

    def __init__(self, truth: Tensor, turned: bool = False) -> None:
        super().__init__()
        self.truth, self.turned, self.scales = truth, turned, torch.tensor([0.7, 1.3])

    def weights(self, batch: int, dials: Any) -> Tensor:
        return losses.weights_from_lambdas(torch.tensor([[float(dials["dc"])]])).expand(batch, 2)

    def forward(
        self, y: Tensor, A: LinearOperator, *, dc: Annotated[float, Dial(sentence="data", default=0.5)] = 0.5
    ) -> Reconstruction:
        u, v = (self.weights(1, {"dc": 1 - dc if self.turned else dc})[0] / self.scales).tolist()
        u, v = u / self.truth.numel(), v / float(y.abs().square().sum())
        return Reconstruction(image=(u * self.truth + v * A.H(y)) / (u + v), dials={"dc": dc})


def ideal(**options: Any) -> tuple[Ideal, Case]:
    scan, truth = simulate(phantom(SHAPE)[None], mask=torch.ones(SHAPE), coils=1, noise=0.05)
    return Ideal(truth / prepare(scan).scale[:, None, None], **options), Case(name="c", scan=scan, reference=truth)


@pytest.mark.parametrize("objective", ["mean", "log"])
def test_the_diagonal_wins_for_a_method_that_solves_what_it_is_asked(objective):
    settings = [{"dc": t / 8} for t in range(9)]
    model, c = ideal()
    model.objective = objective
    found = self_consistency(model, [c], settings)
    assert found.wins == 1.0
    assert found.regret.tolist() == [0.0] * 9
    assert found.loss.shape == (9, 9)
    assert (found.loss > 0).all()
    assert len(found.records()) == 81
    wrong, c = ideal(turned=True)
    found = self_consistency(wrong, [c], settings)
    assert found.wins < 0.2
    assert float(found.regret.max()) > 0.05


def test_what_ships_does_what_it_is_asked():
    """On a brain that it never saw, the setting asked for costs little; asked for the wrong way round, much."""
    _, truth = sample()
    cases = []
    for i, (mask, acceleration) in enumerate((("poisson", 4.0), ("poisson", 8.0), ("cartesian-random", 4.0))):
        pattern = make_mask(mask, tuple(truth.shape[1:]), acceleration, seed=i)
        scan, x = simulate(truth.to(torch.complex64), mask=pattern, noise=0.01, seed=i)
        cases.append(Case(name=mask, scan=scan, reference=x))
    found = self_consistency(methods.load("hyper-brain"), cases, [{"ssim": t} for t in (0.0, 0.5, 1.0)])
    assert float(found.regret.max()) < 0.02
    assert float((found.regret * found.loss.amin(1)).sum() / (found.spread * found.loss.amin(1)).sum()) < 0.25
    turned = dataclasses.replace(found, each=found.each.flip(2))
    assert float(turned.regret.max()) > max(0.05, 10 * float(found.regret.max()))


def test_chance_is_told_from_a_better_setting():
    """Twelve slices, of which each other one prefers the other setting; and twelve that agree."""
    torch.manual_seed(0)
    noise = 0.05 * torch.randn(12, 2, 2).double()
    even = Consistency(settings=({"a": 0.0}, {"a": 1.0}), each=1 + noise)
    assert not even.beaten.any()
    better = torch.tensor([[0.0, -0.2], [-0.2, 0.0]]).double()
    for logarithmic in (False, True):
        wrong = Consistency(settings=even.settings, each=even.each + better, logarithmic=logarithmic)
        assert wrong.beaten.all()
        assert wrong.wins == 0
        assert bool((wrong.spread == wrong.regret).all())
        assert wrong.regret.tolist() == pytest.approx([0.25] * 2, abs=0.08)
    assert not dataclasses.replace(wrong, each=wrong.each[:1]).beaten.any(), "one slice tells nothing"


def test_rows_are_asked_and_columns_used():
    model, c = ideal()
    found = self_consistency(model, [c, c], [{"dc": 0.0}, {"dc": 1.0}])
    # Asked for the truth alone, given the truth: no loss; given the data: their noise.
    assert float(found.loss[0, 0]) < 1e-9 < float(found.loss[0, 1])
    assert float(found.loss[1, 1]) < 1e-9 < float(found.loss[1, 0])


def test_self_consistency_of_a_hypernetwork_with_every_kind_of_term():
    torch.manual_seed(0)
    names = ["dc", "tv", "l1"]
    model = methods.make("hyperrecon", {**SMALL["hyperrecon"], "terms": names})
    c = dataclasses.replace(case(slices=2), reference=None)
    settings = [{"tv": 0.1, "l1": 0.2}, {"tv": 0.9, "l1": 0.0}]
    found = self_consistency(model, [c], settings)
    assert found.loss.shape == (2, 2)
    assert bool(found.loss.isfinite().all())
    supervised = methods.make("hyperrecon", SMALL["hyperrecon"])
    with pytest.raises(errors.MissingKey, match="truth"):
        self_consistency(supervised, [c], [{"ssim": 0.5}])
    with pytest.raises(errors.BadOption, match="weighs no losses"):
        self_consistency(methods.load("tv"), [c], [{"lam": 0.01}])


@pytest.mark.parametrize("objective", ["log", "mean", "relative"])
def test_the_diagonal_is_what_training_takes_the_mean_of(objective, monkeypatch):
    torch.manual_seed(0)
    options = {**SMALL["hyperrecon"], "terms": ["dc", "tv", "l1"], "scales": [0.5, 2.0, 3.0], "objective": objective}
    model = methods.make("hyperrecon", options)
    c = dataclasses.replace(case(slices=2), reference=None)
    settings = [{"tv": 0.1, "l1": 0.2}, {"tv": 0.9, "l1": 0.0}]
    found = self_consistency(model, [c], settings)
    ready = prepare(c.scan)
    example = Example(y=ready.kspace, A=encoding(ready), target=None)
    for row, setting in enumerate(settings):
        w = model.weights(len(ready), {name: torch.full((len(ready),), t) for name, t in setting.items()})
        monkeypatch.setattr(model, "_draw", lambda batch, generator, w=w: w)
        loss = float(model.loss(example, torch.Generator().manual_seed(0)).detach())
        assert float(found.loss[row, row].log() if objective == "log" else found.loss[row, row]) == pytest.approx(
            loss, rel=1e-4
        )


# ---------------------------------------------------------------- histogram and Dice


def test_histogram_is_the_share_of_training():
    arguments = {**SMALL["hyperrecon"], "terms": ["dc", "tv", "l1"]}
    assert histogram(methods.make("hyperrecon", arguments)) is None
    model = methods.make("hyperrecon", {**arguments, "selection": {"keep": 0.5}})
    assert histogram(model) is None, "nothing trained yet"
    model.histogram[3, 7] += 3
    model.histogram[0, 0] += 1
    shares = histogram(model)
    assert float(shares.sum()) == 1.0
    assert float(shares[3, 7]) == 0.75


def test_dice_along_a_dial_is_best_where_the_image_is_right():
    def segment(x: Tensor) -> Tensor:
        return (x > 0.5).long() + (x > 1.5).long()

    truth = torch.zeros(1, 12, 12, dtype=torch.long)
    truth[:, :6], truth[:, 6:9] = 1, 2
    padded = torch.nn.functional.pad(truth.float(), (2, 2, 2, 2))
    rows = [Row(labels={"case": "c"}, dials={"gain": g}, image=g * padded * 1j) for g in (0.3, 1.0, 4.0)]
    for labels in (truth, {"c": truth}):
        found = dice_along(rows, segment, labels, [1, 2, 9])
        assert found[1].metrics == {"dice_1": 1.0, "dice_2": 1.0, "dice": 1.0}
        assert found[0].metrics["dice"] < 1
        assert found[2].metrics["dice"] < 1
    assert evaluation.dial_curve(found, "gain", "dice")[1]["mean"] == 1.0
    for bad, labels in ((rows, {"other": truth}), ([dataclasses.replace(rows[0], image=None)], truth)):
        with pytest.raises(errors.NoData):
            dice_along(bad, segment, labels, [1])


# ---------------------------------------------------------------- pictures


def pictures(land: Landscape) -> dict[str, Any]:
    line = landscape(Waves(), [case(0), case(1)], dials={"b": 5}, thresholds=THRESHOLDS)
    matrix = Consistency(settings=tuple({"a": t} for t in (0.0, 0.5, 1.0)), each=1 + 0.1 * torch.rand(2, 3, 3).double())
    dots = [({"a": 0.2, "b": 0.1}, 0.5), ({"a": 1.0, "b": 1.0}, -1.0)]
    rows = [Row(dials={"a": a}, metrics={"dice": a, "dice_1": a, "dice_2": a}) for a in (0.1, 0.6, 0.4)]
    x = random((17, 30), seed=1)
    partial = interpolate(land, [{"a": 0.0, "b": 0.1}, {"a": 1.0, "b": 0.1}, {"a": 0.5, "b": 1.0}], [0.0, 1.0, 2.0])
    return {
        "map": lambda: plots.landscape(land, dedicated=dots, title="$x"),
        "map with levels": lambda: plots.landscape(land, levels=[-1, -3]),
        "map with holes": lambda: plots.landscape(partial),
        "line": lambda: plots.landscape(line, dedicated=[({"b": 0.1}, 0.5)]),
        "one row": lambda: plots.landscape(landscape(Waves(), [case()], dials={"a": 3, "b": [0.1]})),
        "one point": lambda: plots.landscape(landscape(Waves(), [case()], points=1)),
        "area": lambda: plots.area_curves({"one": land, "other": partial}),
        "range": lambda: plots.range_curves({"one": land, "other": line}),
        "far": lambda: plots.far_pair(land, land.far[1], x, 0.8 * x),
        "far, the same": lambda: plots.far_pair(line, line.far[0], x, x),
        "consistency": lambda: plots.consistency(matrix),
        "histogram": lambda: plots.histogram(torch.full((10,), 0.1), ["a"]),
        "histogram of two": lambda: plots.histogram(torch.full((10, 10), 0.01), ["a", "b"]),
        "dice": lambda: plots.dice_curve(rows, "a", about=Waves().dials["a"]),
    }


def test_every_picture_is_black_repeatable_and_holds_its_numbers(land):
    for name, make in pictures(land).items():
        plot = make()
        png = plot.png(50)
        shown = pixels(png)
        assert (shown[0] == 0).all(), name
        assert shown.std() > 5, name
        assert plot.png(50) == png, name
        json.dumps(list(plot.data), allow_nan=False)
        assert plot.data, name


def test_pictures_of_nothing_or_of_different_things_are_refused(land):
    other = dataclasses.replace(land, metric="psnr")
    with pytest.raises(errors.NoData):
        plots.area_curves({})
    with pytest.raises(errors.BadOption, match="one metric"):
        plots.area_curves({"a": land, "b": other})
    with pytest.raises(errors.NoData, match="thresholds"):
        plots.range_curves({"a": dataclasses.replace(land, thresholds=())})


# ---------------------------------------------------------------- the command


def test_evaluate_draws_the_landscapes_and_goes_on_after_a_stop(run, image, tiny):  # noqa: F811
    Path("images").mkdir()
    image.rename("images/image.npy")
    common = (
        "evaluate",
        "-m",
        tiny,
        "-m",
        "zero-filled",
        "-m",
        "tv:lam=0.01",
        "--data",
        "images",
        "--masks",
        "poisson:3",
    )
    result = run(*common, "--landscape", 3, "--thresholds", "-9,0,9", "--state", "kept", "-o", "ev", "--json")
    assert result.code == 0, result.err
    made = sorted(p.name.split("-")[0] for p in Path("ev").glob("*.png"))
    assert made == ["area", "consistency", "far", "landscape", "range"], "only one of the three has a free dial"
    assert all(p.with_suffix(".csv").exists() for p in Path("ev").glob("*.png"))
    (table,) = Path("ev").glob("landscape-*.csv")
    assert len(table.read_text().splitlines()) == 4
    assert len(Path("ev/far-pairs.csv").read_text().splitlines()) == 1 + 2
    assert Path("ev/report.html").read_text().count("<img") == 5
    before = {p: p.read_bytes() for p in Path("kept").iterdir()}
    assert len(before) == 1
    assert run(*common, "--landscape", 3, "--thresholds", "-9,0,9", "--state", "kept", "-o", "ev2").code == 0
    assert next(Path("ev2").glob("landscape-*.csv")).read_text() == table.read_text()
    assert run(*common, "--thresholds", "1", "-o", "ev3").code == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_an_energy_on_the_plane_of_a_path(dtype: torch.dtype) -> None:
    """A path in a plane finds that plane, and ½‖x‖² on it is what the coordinates say."""
    plane = torch.linalg.qr(random((2, 20), torch.float64).T)[0].T.reshape(2, 5, 4)
    turn = torch.linspace(0, 4, 30, dtype=torch.float64)
    where = torch.stack((3 * turn.cos(), turn.sin()), 1)
    states = (where @ plane.flatten(1)).reshape(-1, 5, 4).to(dtype) * (1j if dtype.is_complex else 1)
    asked = []

    def energy(x: Tensor) -> Tensor:
        asked.append(len(x))
        assert x.dtype == dtype
        return x.abs().square().sum((1, 2)) / 2

    found = energy_surface(energy, states, points=9, batch=16)
    assert sum(asked) == 81
    assert max(asked) == 16
    torch.testing.assert_close(found.share.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert found.share[0] > found.share[1] > 0
    inner = (found.directions.conj().flatten(1) @ found.directions.flatten(1).T).real
    torch.testing.assert_close(inner, torch.eye(2), rtol=0, atol=1e-6)
    rebuilt = found.origin + torch.einsum("nk,khw->nhw", found.path.to(dtype), found.directions)
    assert float((rebuilt - states).abs().max()) < 1e-5
    for i, j in ((0, 0), (2, 7), (8, 8)):
        x = found.origin + found.a[i].to(dtype) * found.directions[0] + found.b[j].to(dtype) * found.directions[1]
        assert float(found.energy[i, j]) == pytest.approx(float(x.abs().square().sum() / 2), rel=1e-5)
    plot = plots.surface(found, title="½‖x‖²")
    assert len(plot.data) == 81
    assert pixels(plot.png()).std() > 0
    with pytest.raises(errors.NoData):
        energy_surface(energy, states[:2])
    with pytest.raises(errors.NoData):
        energy_surface(energy, turn[:, None, None].to(dtype) * states[0])
