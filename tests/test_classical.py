"""Classical methods: they solve the problem that they state, recover images, and say when they did not arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws import random, relative, scan
from tunemri import errors, formats, solvers
from tunemri.fourier import ifft2
from tunemri.masks import make_mask
from tunemri.methods import prepare
from tunemri.methods.classical import Sense, TotalVariation, Wavelet, ZeroFilled
from tunemri.operators import Identity, NonCartesian, encoding
from tunemri.regularisers import TV
from tunemri.scan import Reconstruction, Scan, normalise
from tunemri.simulate import coil_maps, phantom
from tunemri.trajectories import golden

ITERATIVE = [Sense, TotalVariation, Wavelet]

every_iterative = pytest.mark.parametrize("kind", ITERATIVE, ids=lambda kind: kind.__name__)


def case(shape=(48, 40), coils=4, noise=0.02, every=4):
    s = normalise(scan(shape, coils=coils, noise=noise, every=every))
    truth = phantom(shape)[None].to(torch.complex64) / s.scale[:, None, None].float()
    return s.kspace, encoding(s), truth


def test_zero_filled_is_the_adjoint():
    y, A, _ = case()
    assert torch.equal(ZeroFilled()(y, A).image, A.H(y))
    assert not ZeroFilled().dials


def test_sense_solves_the_normal_equations():
    y, A, _ = case((10, 9))
    for lam in (0.02, 0.3):
        x = Sense(tolerance=1e-6)(y, A, lam=lam).image
        columns = torch.eye(90, dtype=torch.complex64).reshape(90, 10, 9)
        gram = torch.stack([A.gram(c[None])[0].flatten() for c in columns], 1)
        exact = torch.linalg.solve(gram + lam * torch.eye(90), A.H(y).flatten())
        assert relative(x.flatten(), exact) < 1e-4


def test_tv_reaches_the_optimum_for_every_weight():
    """Denoising has an oracle that shares no line with ADMM: the proximal map by the dual."""
    v = phantom((24, 20))[None].to(torch.complex64) + 0.1 * random((1, 24, 20))
    for lam in (1e-4, 1e-3, 0.01, 0.1):  # the range of the dial
        x = TotalVariation(iterations=400, tolerance=1e-6)(v, Identity(), lam=lam).image
        assert relative(x, TV(iterations=1500).prox(v, lam)) < 5e-3, lam


def test_tv_of_undersampled_data_beats_every_neighbour():
    y, A, _ = case((24, 20))
    lam = 0.01
    x = TotalVariation(iterations=1000, tolerance=1e-6)(y, A, lam=lam).image

    def energy(u):
        return float((A(u) - y).abs().square().sum() / 2 + lam * TV().value(u).sum())

    best = energy(x)
    others = [random(tuple(x.shape), seed=s) * 0.01 for s in range(10)] + [-0.01 * x, A.H(y) - x]
    assert all(energy(x + d) > best for d in others)


@every_iterative
def test_better_than_zero_filled(kind):
    y, A, truth = case()
    zero, found = ZeroFilled()(y, A).image, kind()(y, A).image
    assert relative(found, truth) < (0.9 if kind is Sense else 0.5) * relative(zero, truth)


@every_iterative
def test_a_larger_weight_leaves_more_of_the_data_unexplained(kind):
    y, A, _ = case()
    residuals = [float(kind()(y, A, lam=lam).residual) for lam in (1e-3, 1e-2, 1e-1)]
    assert residuals == sorted(residuals)
    assert residuals[0] < 0.7 * residuals[2]


@every_iterative
def test_it_says_whether_it_arrived(kind):
    y, A, _ = case()
    short = kind(iterations=3)(y, A)
    assert "stopped after 3 iterations" in short.status
    assert short.stats["iterations"] == 3
    long = kind(iterations=600)(y, A, lam=0.03)
    assert long.status == "converged"
    assert isinstance(long, Reconstruction)
    assert long.dials == {"lam": 0.03}


@every_iterative
def test_no_signal_gives_no_image(kind):
    y, A, _ = case()
    out = kind()(0 * y, A)
    assert not out.image.any()
    assert out.status == "converged"


@every_iterative
def test_a_weight_of_zero_stays_finite(kind):
    y, A, _ = case()
    assert bool(torch.view_as_real(kind(iterations=20)(y, A, lam=0.0).image).isfinite().all())


@every_iterative
def test_maps_that_are_too_large_do_not_blow_up(kind):
    s = normalise(scan((24, 20), coils=3))
    y, A = s.kspace, encoding(s)
    loud = type(A)(A.mask, 5 * A.csm)
    out = kind(iterations=300)(y, loud, lam=1e-3)
    assert bool((out.residual < 0.2).all()), out.residual


@every_iterative
def test_what_cannot_be_is_refused(kind):
    y, A, _ = case((8, 8))
    for lam in (-0.1, float("nan"), float("inf")):
        with pytest.raises(errors.BadOption, match="lam"):
            kind()(y, A, lam=lam)
    with pytest.raises(errors.BadOption, match="iterations"):
        kind(iterations=0)
    with pytest.raises(errors.BadOption, match="tolerance"):
        kind(tolerance=-1.0)
    with pytest.raises(errors.BadOption, match="did you mean 'db2'"):
        Wavelet(wavelet="db22")


@pytest.mark.parametrize("weight", [0.03, 0.002])
@every_iterative
def test_the_image_depends_on_the_weight_differentiably(kind, weight):
    y, A, _ = case((12, 11))
    y, h = y.to(torch.complex128), 1e-5
    A = type(A)(A.mask.double(), A.csm.to(torch.complex128))
    method = kind(iterations=12, tolerance=0.0)

    def energy(lam):
        return method(y, A, lam=lam).image.abs().square().sum()

    lam = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    energy(lam).backward()
    assert lam.grad is not None
    with torch.no_grad():
        slope = (energy(weight + h) - energy(weight - h)) / (2 * h)
    assert float(lam.grad) == pytest.approx(float(slope), rel=1e-3)


def test_the_seed_draws_the_shifts():
    y, A, _ = case()
    first, again, other = (Wavelet(iterations=10, seed=s)(y, A).image for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert relative(first, other) < 0.05


def test_tv_of_a_raw_scan_is_as_good_as_pics(data):
    """A sagittal brain of one coil, 4-fold undersampled: `bart pics -i 100` comes to 0.1291 (benchmarks/raw.py)."""
    full = formats.read(data / "bench/raw/brain_1ch_t1sag_raw.h5")
    mask = make_mask("poisson", full.image_shape, 4, seed=0)[None, None]
    ready = prepare(replace(full, kspace=full.kspace * mask, mask=mask))
    reference = ifft2(full.kspace)[:, 0] / float(ready.scale[0])
    inside = reference.abs() > 0.1 * reference.abs().flatten().quantile(0.99)
    x = TotalVariation(iterations=100, tolerance=0.0)(ready.kspace, encoding(ready), lam=6.5e-4).image
    assert relative(x[inside], reference[inside]) < 0.129


def test_wavelets_keep_their_momentum_off_the_grid(monkeypatch):
    """Dropping it where it points uphill, as FISTA does elsewhere, mistakes new shifts for a wrong direction."""
    x, csm, k = phantom((48, 48))[None] + 0j, coil_maps((48, 48), 3)[None], golden((48, 48), 20)[None]
    y = NonCartesian(k, csm)(x)
    s = normalise(Scan(kspace=y + 0.1 * random(tuple(y.shape), seed=2), trajectory=k, image_shape=(48, 48), csm=csm))

    def error():
        image = Wavelet(iterations=60)(s.kspace, encoding(s), lam=0.03).image
        return relative(image * float(s.scale[0]), x)

    kept, fista = error(), solvers.fista
    monkeypatch.setattr(solvers, "fista", lambda *a, **options: fista(*a, **{**options, "restart": True}))
    assert kept < 0.995 * error()
