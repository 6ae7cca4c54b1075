"""Finite differences and wavelets: adjoints, orthonormality, vanishing moments, an independent implementation."""

from __future__ import annotations

import pytest
import torch

from laws import differentiable_twice, inner, linear, random, relative, size
from tunemri import errors
from tunemri.transforms import WAVELETS, divergence, dwt, gradient, idwt, max_levels

SHAPES = [(16, 16), (15, 21), (12, 17), (9, 24), (2, 2), (1, 9), (5, 1), (1, 1), (38, 22)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_wavelet = pytest.mark.parametrize("wavelet", WAVELETS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)


@every_shape
@every_dtype
def test_divergence_is_the_negative_adjoint_of_the_gradient(shape, dtype):
    x, p = random((2, 3, *shape), dtype), random((2, 2, 3, *shape), dtype, seed=1)
    left, right = inner(gradient(x), p), -inner(x, divergence(p))
    assert abs(left - right) <= 1e-12 * size(x) * size(p)


def test_the_gradient_of_a_plane_is_its_slope_and_of_the_last_edge_zero():
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    d = gradient(2 * rows - 3 * columns)
    assert bool((d[0, :-1] == 2).all())
    assert bool((d[1, :, :-1] == -3).all())
    assert not d[0, -1].any()
    assert not d[1, :, -1].any()


def test_the_gradient_is_shorter_than_the_step_of_tv_needs():
    x = random((1, 16, 17), torch.float64)
    for _ in range(300):
        x = -divergence(gradient(x))
        eigenvalue, x = size(x), x / size(x)
    assert 7.5 < eigenvalue < 8


@every_wavelet
@every_shape
@every_dtype
@pytest.mark.parametrize("levels", [0, 1, 3, 9])
class TestEveryWavelet:
    def test_is_orthonormal_and_inverted_exactly(self, wavelet, shape, dtype, levels):
        x, c = random((2, *shape), dtype), random((2, *shape), dtype, seed=1)
        w = dwt(x, levels, wavelet)
        assert w.shape == x.shape
        assert size(w) == pytest.approx(size(x), rel=1e-12)
        assert relative(idwt(w, levels, wavelet), x) < 1e-12
        assert relative(dwt(idwt(c, levels, wavelet), levels, wavelet), c) < 1e-12
        assert abs(inner(w, c) - inner(x, idwt(c, levels, wavelet))) < 1e-12 * size(x) * size(c)

    def test_is_linear(self, wavelet, shape, dtype, levels):
        if dtype.is_complex:
            linear(lambda x: dwt(x, levels, wavelet), random((2, *shape), dtype), 1e-12)


@every_wavelet
def test_in_single_precision_too(wavelet):
    x = random((2, 64, 70))
    assert relative(idwt(dwt(x, 4, wavelet), 4, wavelet), x) < 1e-6


@every_wavelet
def test_is_differentiable_twice(wavelet):
    differentiable_twice(lambda x: dwt(x, 2, wavelet).abs().pow(3), random((1, 8, 9), torch.complex128))


@pytest.mark.parametrize(("wavelet", "moments"), [("haar", 1), ("db2", 2), ("db4", 4)])
def test_details_of_polynomials_vanish_up_to_the_order_and_no_further(wavelet, moments):
    n = torch.arange(64, dtype=torch.float64) / 64
    for order in range(moments + 1):
        c = dwt((n**order).expand(64, 64), 1, wavelet)
        # Away from the edge where the period starts again.
        largest = float(c[:32, 40:56].abs().max())
        assert largest < 1e-12 if order < moments else largest > 1e-9, (order, largest)


@every_wavelet
def test_the_same_bands_as_pywavelets(wavelet):
    pywt = pytest.importorskip("pywt", reason="PyWavelets is an oracle, not a dependency")
    x = random((32, 48), torch.float64)
    # Theirs run the other way and, but for Haar, pair odd with even samples; signs and delays leave spectra alone.
    offset = 0 if wavelet == "haar" else 1
    ours = dwt(x.flip(-2, -1).roll((offset, offset), (-2, -1)), 1, wavelet)
    theirs, (rows, columns, diagonal) = pywt.dwt2(x.numpy(), wavelet, mode="periodization")
    quadrants = (ours[:16, :24], ours[16:, :24], ours[:16, 24:], ours[16:, 24:])
    for a, b in zip(quadrants, (theirs, rows, columns, diagonal), strict=True):
        spectrum = torch.fft.fft2(torch.from_numpy(b)).abs()
        torch.testing.assert_close(torch.fft.fft2(a).abs(), spectrum, rtol=1e-10, atol=1e-10)


def test_levels_leave_a_coarse_image_of_some_size():
    assert max_levels((256, 256)) == 3
    assert max_levels((256, 70)) == 1
    assert max_levels((8, 8)) == 1
    assert max_levels((1, 1)) == 1


def test_an_unknown_wavelet_is_refused():
    with pytest.raises(errors.BadOption, match="did you mean 'db4'"):
        dwt(torch.zeros(8, 8), 1, "db5")
