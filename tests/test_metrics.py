"""Metrics: laws over every member of METRICS, and the values of independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import skimage.metrics as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunemri import errors, metrics
from tunemri.metrics import METRICS
from tunemri.simulate import phantom

SHAPES = [(1, 16, 16), (3, 17, 24), (2, 40, 9)]


def volume(shape=(2, 17, 24), seed=0, noise=0.1):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g) + 0.2
    return x + noise * torch.randn(shape, generator=g), x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METRICS)
class TestEveryMetric:
    def test_a_perfect_image_scores_best(self, name, shape):
        _, x = volume(shape)
        perfect = {"psnr": math.inf, "ssim": 1.0}.get(name, 0.0)
        assert METRICS[name].function(x, x) == pytest.approx(perfect, abs=1e-12)

    def test_more_noise_is_worse(self, name, shape):
        m = METRICS[name]
        values = [m.function(*volume(shape, noise=n)) for n in (0.02, 0.1, 0.5)]
        assert values == sorted(values, reverse=m.higher_is_better)
        assert len(set(values)) == 3

    def test_scaling_image_and_reference_together(self, name, shape):
        x_hat, x = volume(shape)
        factor = 1000.0 if METRICS[name].unit == "image" else 1.0
        assert METRICS[name].function(1000 * x_hat, 1000 * x) == pytest.approx(
            factor * METRICS[name].function(x_hat, x), rel=1e-5
        )

    def test_order_of_slices_and_dtype_do_not_matter(self, name, shape):
        x_hat, x = volume(shape)
        value = METRICS[name].function(x_hat, x)
        assert METRICS[name].function(x_hat.flip(0), x.flip(0)) == pytest.approx(value, rel=1e-12)
        assert METRICS[name].function(x_hat.double(), x.double()) == pytest.approx(value, rel=1e-12)

    def test_refuses_what_it_cannot_compare(self, name, shape):
        x_hat, x = volume(shape)
        f = METRICS[name].function
        with pytest.raises(errors.InconsistentShapes, match="expected equal shapes"):
            f(x_hat, x[:, :-1])
        with pytest.raises(errors.InconsistentShapes):
            f(x_hat[:1, :, :1], x)
        with pytest.raises(errors.UnsupportedLayout, match="magnitudes"):
            f(x_hat * 1j, x)
        with pytest.raises(errors.UnsupportedLayout, match="slices, rows, columns"):
            f(x_hat[0], x[0])
        with pytest.raises(errors.NonFinite):
            f(torch.full_like(x, math.nan), x)
        if name != "mae":
            with pytest.raises(errors.NoData):
                f(x_hat, torch.zeros_like(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_and_ssim_agree_with_scikit_image(shape):
    x_hat, x = volume(shape)
    a, b = x_hat.double().numpy(), x.double().numpy()
    top = b.max()
    assert metrics.psnr(x_hat, x) == pytest.approx(oracle.peak_signal_noise_ratio(b, a, data_range=top), rel=1e-12)
    expected = np.mean([oracle.structural_similarity(s, t, data_range=top) for s, t in zip(a, b, strict=True)])
    assert metrics.ssim(x_hat, x) == pytest.approx(expected, rel=1e-10)


def test_ssim_by_its_definition_at_one_window():
    """A 7×7 image holds exactly one window: numpy's own covariance is the oracle."""
    x_hat, x = volume((1, 7, 7))
    (v, c), (_, w) = np.cov(x_hat.double().flatten(), x.double().flatten())
    m, n, top = float(x_hat.double().mean()), float(x.double().mean()), float(x.max())
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    expected = (2 * m * n + c1) * (2 * c + c2) / ((m * m + n * n + c1) * (v + w + c2))
    assert metrics.ssim(x_hat, x) == pytest.approx(expected, rel=1e-10)


def test_ssim_of_small_images():
    """Six rows take a 5×5 window: as scikit-image's with that window."""
    x_hat, x = volume((1, 6, 40))
    a, b = x_hat[0].double().numpy(), x[0].double().numpy()
    expected = oracle.structural_similarity(b, a, win_size=5, data_range=b.max())
    assert metrics.ssim(x_hat, x) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(errors.UnsupportedLayout, match="3×3"):
        metrics.ssim(*volume((1, 2, 40)))


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 17, 24), (1, 5, 9)])
def test_hfen_agrees_with_scipy(shape):
    x_hat, x = volume(shape)

    def filtered(z):
        return np.stack([scipy.ndimage.gaussian_laplace(s, 1.5, truncate=4.34) for s in z.double().numpy()])

    error = np.linalg.norm(filtered(x_hat.double() - x.double()))
    assert metrics.hfen(x_hat, x, normalise=False) == pytest.approx(error, rel=1e-9)
    assert metrics.hfen(x_hat, x) == pytest.approx(error / np.linalg.norm(filtered(x)), rel=1e-9)


def test_hfen_filter_has_15_by_15_support_and_no_response_to_a_constant():
    impulse = torch.zeros(1, 41, 41, dtype=torch.float64)
    impulse[0, 20, 20] = 1
    response = metrics._laplacian_of_gaussian(impulse)[0]
    rows, cols = response.nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max()), int(cols.min()), int(cols.max())) == (13, 27, 13, 27)
    assert abs(float(response.sum())) < 1e-3 * float(response.abs().sum())


def test_known_values():
    x = torch.ones(2, 8, 8)
    x_hat = x + 0.1
    assert metrics.psnr(x_hat, x) == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(x_hat, x, data_range=10.0) == pytest.approx(40, abs=1e-4)
    assert metrics.nmse(x_hat, x) == pytest.approx(0.01, rel=1e-5)
    assert metrics.nrmse(x_hat, x) == pytest.approx(0.1, rel=1e-5)
    assert metrics.mae(x_hat, x) == pytest.approx(0.1, rel=1e-5)


def test_data_range_belongs_to_the_volume():
    x_hat, x = volume()
    x, x_hat = torch.cat([x, 10 * x]), torch.cat([x_hat, 10 * x + 0.1])
    dim = [metrics.psnr(x_hat[:2], x[:2], data_range=r) for r in (None, float(x.max()))]
    assert dim[1] == pytest.approx(dim[0] + 20, abs=1e-3)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(errors.BadOption, match="data_range"):
            metrics.psnr(x_hat, x, data_range=bad)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100), st.floats(-5, 5))
def test_rpsnr_ignores_scale_and_offset(scale, offset):
    x_hat, x = volume((2, 12, 10))
    base, _ = volume((2, 12, 10), noise=0.4)
    gain = metrics.rpsnr(x_hat.double(), x.double(), base.double())
    assert gain > 0
    assert metrics.rpsnr(x_hat.double() * scale + offset, x.double(), base.double()) == pytest.approx(gain, abs=1e-6)
    assert metrics.rpsnr(base, x, base) == 0
    with pytest.raises(errors.NoData, match="constant"):
        metrics.rpsnr(torch.ones_like(x), x, base)


def test_dice():
    a = torch.tensor([[[0, 1, 1, 2]]])
    b = torch.tensor([[[0, 1, 2, 2]]])
    assert metrics.dice(a, b, [1, 2, 7]) == pytest.approx({1: 2 / 3, 2: 2 / 3})
    assert metrics.dice(a, a, [0, 1, 2]) == {0: 1.0, 1: 1.0, 2: 1.0}
    with pytest.raises(errors.InconsistentShapes):
        metrics.dice(a, b[..., :3], [1])
    with pytest.raises(errors.UnsupportedLayout, match="integer"):
        metrics.dice(a.float(), b, [1])


def test_complex_nrmse_ignores_one_phase_per_slice_and_no_more():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 12, dtype=torch.complex128, generator=g) + 2
    turns = torch.exp(1j * torch.tensor([0.3, -2.0], dtype=torch.float64))[:, None, None]
    assert metrics.complex_nrmse(x * turns, x) < 1e-12
    ramp = torch.exp(1j * torch.linspace(0, 2, 12, dtype=torch.float64))
    assert metrics.complex_nrmse(x * ramp, x) > 0.1
    outside = ~metrics.foreground(x)
    assert metrics.complex_nrmse(x + 5 * outside, x) < 1e-12
    assert metrics.complex_nrmse(x * 0, x) == pytest.approx(1)
    with pytest.raises(errors.InconsistentShapes):
        metrics.complex_nrmse(x, x[:1])


def test_foreground_is_where_the_signal_is():
    x = torch.zeros(1, 20, 20)
    x[:, 5:15, 5:15] = 1
    x[:, 0, 0] = 0.05
    assert int(metrics.foreground(x).sum()) == 100
    assert torch.equal(metrics.foreground(x), metrics.foreground(1e4 * x * 1j))


def bent(x):
    """A rising curve that is no spline, with an offset: what intensities may have wrong."""
    return 0.05 + 0.9 * x.clamp(min=0) ** 1.5


@pytest.mark.parametrize("knots", [0, 5])
def test_a_spline_leaves_alone_what_is_right(knots):
    x = [volume((1, 17, 24), seed=s)[1] for s in range(3)]
    same = metrics.intensity_spline(x[:2], x[:2], knots=knots)
    inside = x[2].clamp(float(min(v.min() for v in x[:2])), float(max(v.max() for v in x[:2])))
    assert float((same(inside) - inside).abs().max()) <= 1e-6 * float(inside.max())
    assert same(x[2]).dtype == x[2].dtype


def test_a_spline_undoes_a_curve_that_it_learned_elsewhere():
    x = [phantom((40, 36), seed=s)[None] for s in range(3)]
    # Of other shapes, and complex: what counts is intensity.
    others = [bent(x[0]), bent(x[1])[:, :30] * 1j]
    curve = metrics.intensity_spline(others, [x[0], x[1][:, :30]])
    before, after = metrics.psnr(bent(x[2]), x[2]), metrics.psnr(curve(bent(x[2])), x[2])
    assert after > before + 10
    rising = curve(bent(torch.linspace(0, 1, 200)).view(1, 20, 10)).flatten()
    assert bool((rising.diff() > -1e-4).all())


def test_a_spline_is_level_outside_and_where_there_is_one_intensity():
    x = torch.linspace(0.2, 0.8, 60).view(1, 6, 10)
    curve = metrics.intensity_spline([x], [2 * x])
    assert float(curve(torch.full((1, 2, 2), 9.0))[0, 0, 0]) == pytest.approx(1.6)
    assert float(curve(torch.zeros(1, 2, 2))[0, 0, 0]) == pytest.approx(0.4)
    level = metrics.intensity_spline([torch.full((1, 6, 10), 0.3)], [x])
    assert torch.allclose(level(x), x.mean().expand_as(x))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 12))
def test_no_spline_breaks_on_ties(seed, different, knots):
    """Few intensities, most pixels in one of them: least squares is then exact at no more places than there are."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(different, generator=g) ** 8
    x = values[(torch.rand(1, 9, 11, generator=g) ** 4 * different).long().clamp(max=different - 1)]
    y = torch.rand(x.shape, generator=g)
    fitted = metrics.intensity_spline([x], [y], knots=knots)(x)
    assert bool(fitted.isfinite().all())
    # The constant is a spline, too: never farther from y than that.
    assert float((fitted - y).square().mean()) <= float((y - y.mean()).square().mean()) * (1 + 1e-4)


def test_a_spline_refuses_what_it_cannot_learn_from():
    x = torch.rand(1, 6, 7)
    for images, references, kind in (
        ([], [], errors.NoData),
        ([x], [], errors.NoData),
        ([x], [x[:, :5]], errors.InconsistentShapes),
        ([x * math.nan], [x], errors.NonFinite),
        ([x], [x * math.inf], errors.NonFinite),
        ([x[0]], [x[0]], errors.UnsupportedLayout),
    ):
        with pytest.raises(kind):
            metrics.intensity_spline(images, references)
    with pytest.raises(errors.BadOption, match="knots"):
        metrics.intensity_spline([x], [x], knots=-1)
    with pytest.raises(errors.NonFinite):
        metrics.intensity_spline([x], [x])(x * math.nan)


def test_score_takes_magnitudes_and_names():
    x_hat, x = (z.abs() for z in volume())
    values = metrics.score(x_hat * 1j, x.to(torch.complex64), list(METRICS))
    assert list(values) == list(METRICS)
    assert all(values[n] == pytest.approx(METRICS[n].function(x_hat, x), rel=1e-6) for n in METRICS)
    assert metrics.score(x_hat, x, ["psnr"], data_range=1.0)["psnr"] == metrics.psnr(x_hat, x, data_range=1.0)
    with pytest.raises(errors.BadOption, match="did you mean 'psnr'"):
        metrics.score(x_hat, x, ["psrn"])
