"""Estimated coil maps, over every way to estimate them; noise, whitening and compression."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from laws import SHAPES, inner, random, relative, scan
from tunemri import coils
from tunemri.coils import (
    MAPS,
    auto_maps,
    complete_block,
    completed_maps,
    compress,
    compress_scan,
    espirit_maps,
    estimate_covariance,
    joint_gradients,
    nlinv_maps,
    noise_covariance,
    poorly_calibrated,
    prewhiten,
    roughness,
    smooth,
    thinly_sampled,
    unit_maps,
    walsh_maps,
    whiten_scan,
)
from tunemri.errors import BadOption, InconsistentShapes, MissingKey, NoData, TunemriWarning
from tunemri.fourier import fft2, ifft2
from tunemri.masks import MASKS, make_mask
from tunemri.methods import prepare
from tunemri.operators import encoding
from tunemri.scan import Scan
from tunemri.simulate import phantom, simulate

METHODS = sorted(MAPS)
CENTRED = sorted(set(MAPS) - {"nlinv"})  # which look at the complete block only, where there is one


def unexplained(x: Tensor, csm: Tensor) -> float:
    """‖x - S Sᴴ x‖ / ‖x‖: which part of coil images `(B, C, H, W)` no image times the maps can be."""
    return relative(csm * (csm.conj() * x).sum(1, keepdim=True), x)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("mask", "shape"), [("poisson", (64, 64)), ("cartesian-random", (65, 80)), ("radial", (96, 71))]
)
def test_maps_agree_with_the_true_ones(name: str, mask: str, shape: tuple[int, int]) -> None:
    x = torch.stack((phantom(shape), phantom(shape, seed=3)))
    scan, _ = simulate(x, mask=make_mask(mask, shape, 4), coils=6, store_maps=True)
    assert scan.csm is not None and scan.mask is not None
    csm = MAPS[name](scan.kspace, scan.mask)
    assert csm.shape == (2, 6, *shape)
    assert csm.abs().square().sum(1).sub(1).abs().max() < 1e-5
    # The phase common to all coils belongs to nobody: compare by the angle between the two vectors of coils.
    alike = (csm.conj() * scan.csm).sum(1).abs()
    assert alike[x > 0.1].mean() > 0.985


@pytest.mark.parametrize("name", METHODS)
def test_slices_are_independent_and_scale_cancels(name: str) -> None:
    shape = (32, 24)
    scan, _ = simulate(torch.stack((phantom(shape), phantom(shape, seed=1))), mask=make_mask("gaussian", shape, 3))
    assert scan.mask is not None
    both = MAPS[name](scan.kspace, scan.mask)
    alone = MAPS[name](scan.kspace[1:], scan.mask)
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert torch.allclose(MAPS[name](scan.kspace * 1e-12, scan.mask), both, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 7)])
def test_tiny_empty_and_single_coil_scans_keep_unit_norm(name: str, shape: tuple[int, int]) -> None:
    for kspace in (random((1, 4, *shape)), random((2, 1, *shape)), torch.zeros((1, 3, *shape), dtype=torch.complex64)):
        csm = MAPS[name](kspace, torch.ones(1, 1, *shape))
        assert csm.shape == kspace.shape
        assert csm.abs().square().sum(1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(48, 48), (45, 60), (110, 97)])  # the last is larger than ESPIRiT's grid
def test_maps_explain_noise_free_data(name: str, shape: tuple[int, int]) -> None:
    true, target = simulate(phantom(shape)[None], mask=torch.ones(shape), coils=5, noise=0.0, store_maps=True)
    assert true.csm is not None and true.mask is not None
    x = true.csm * target[:, None] * (target.abs() > 0.1)[:, None]
    csm = MAPS[name](true.kspace, true.mask)
    assert unexplained(x, csm) < (0.015 if name == "espirit" else 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_maps_turn_with_the_phase_of_the_data_and_are_the_same_again(name: str) -> None:
    shape = (40, 31)
    y = scan(shape, coils=4, noise=0.01)
    assert y.mask is not None
    csm, turned = (MAPS[name](y.kspace * factor, y.mask) for factor in (1, 3e5j))
    # The maps take over the phase of the object, which is what makes the image nearly real.
    torch.testing.assert_close(turned, 1j * csm, rtol=0, atol=2e-3)
    assert torch.equal(csm, MAPS[name](y.kspace, y.mask))


@pytest.mark.parametrize("name", METHODS)
def test_maps_vary_smoothly_in_the_object_phase_included(name: str) -> None:
    shape = (64, 64)
    true, target = simulate(phantom(shape)[None], mask=torch.ones(shape), coils=4, phase=1.0)
    assert true.mask is not None
    csm = MAPS[name](true.kspace, true.mask)
    inside = target.abs()[0] > 0.1
    for axis in (0, 1):
        step = (csm - csm.roll(1, axis + 2)).abs().square().sum(1).sqrt()[0]
        assert step[inside & inside.roll(1, axis)].max() < 0.5
    alike = (csm * target[:, None].abs() - ifft2(true.kspace)).abs()  # x S = coil images, with a real x
    assert alike[0, :, inside].mean() < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (61, 80)])
@pytest.mark.parametrize("lines", [8, 12, 24])
def test_espirit_beats_low_resolution_maps_whatever_the_calibration(shape: tuple[int, int], lines: int) -> None:
    mask = torch.zeros(shape)
    mask[:, ::4] = 1
    mask[:, shape[1] // 2 - lines // 2 :][:, :lines] = 1
    true, target = simulate(phantom(shape)[None], mask=mask, coils=6, noise=0.003, store_maps=True)
    assert true.csm is not None and true.mask is not None
    x = true.csm * target[:, None] * (target.abs() > 0.1)[:, None]
    left = {name: unexplained(x, MAPS[name](true.kspace, true.mask)) for name in ("espirit", "low-resolution")}
    assert left["espirit"] < 0.8 * left["low-resolution"], left


@pytest.mark.parametrize(
    ("family", "options"),
    [("cartesian-random", {"center_fraction": 0.04}), ("gaussian", {"calibration": 0}), ("random", {})],
)
def test_inversion_finds_maps_where_no_centre_is_complete(family: str, options: dict[str, float]) -> None:
    shape = (96, 80)
    mask = make_mask(family, shape, 3, seed=1, **options)
    true, target = simulate(phantom(shape)[None], mask=mask, coils=6, noise=0.003, store_maps=True)
    assert true.csm is not None and true.mask is not None
    x = true.csm * target[:, None] * (target.abs() > 0.1)[:, None]
    ways = {**MAPS, "completed": completed_maps}
    left = {name: unexplained(x, f(true.kspace, true.mask)) for name, f in ways.items()}
    assert left["auto"] == left["nlinv"]
    assert max(left["nlinv"], left["completed"]) < 0.5 * min(left["espirit"], left["walsh"], left["low-resolution"]), (
        left
    )
    assert left["nlinv"] < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (71, 90)], ids=str)
def test_inversion_knows_objects_that_reach_the_edge(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    x = 0.5 + interpolate(blobs, shape, mode="bicubic")[0]
    true, target = simulate(
        x, mask=make_mask("gaussian", shape, 3, calibration=0), coils=6, noise=0.003, store_maps=True
    )
    assert true.csm is not None and true.mask is not None
    images = true.csm * target[:, None]
    left = unexplained(images, nlinv_maps(true.kspace, true.mask))
    monkeypatch.setattr(coils, "_FIELD", 1.0)
    assert left < 0.5 * unexplained(images, nlinv_maps(true.kspace, true.mask)), "with periodic maps"


def test_each_slice_gets_maps_by_what_its_own_centre_allows() -> None:
    y, mask = random((2, 3, 40, 30)), torch.zeros(2, 1, 1, 30)
    mask[..., ::3] = 1
    mask[0, ..., 9:21] = 1  # twelve lines
    mask[1, ..., 10:20] = 1
    y = y * mask
    wide, narrow = auto_maps(y, mask).split(1)
    assert torch.equal(wide, espirit_maps(y[:1], mask[:1]))
    assert torch.equal(narrow, nlinv_maps(y[1:], mask[1:]))


def test_a_centre_that_needs_no_completing_gives_the_maps_of_espirit() -> None:
    shape = (40, 33)
    y = scan(shape, coils=3, noise=0.01).kspace
    torch.testing.assert_close(completed_maps(y, torch.ones(1, 1, *shape)), espirit_maps(y, torch.ones(1, 1, *shape)))


def test_inversion_looks_at_the_central_samples_alone() -> None:
    y, mask = random((1, 3, 150, 90)), torch.ones(1, 1, 150, 90)
    outside = torch.ones(150, 90)
    outside[75 - 32 : 75 + 32, 45 - 32 : 45 + 32] = 0
    assert torch.equal(nlinv_maps(y, mask), nlinv_maps(y + 9 * outside, mask))


def test_espirit_cuts_what_is_no_object_and_keeps_what_no_single_map_explains() -> None:
    shape = (64, 64)
    x = phantom(shape)
    full, _ = simulate(x[None], mask=torch.ones(shape), coils=6, noise=0.003)
    assert full.mask is not None
    norms = espirit_maps(full.kspace, full.mask, cut=True).abs().square().sum(1)[0]
    assert torch.minimum((norms - 1).abs(), norms).max() < 1e-5
    assert (norms > 0)[x > 0.1].all()
    background = torch.nn.functional.max_pool2d(x[None], 9, 1, 4)[0] == 0
    assert (norms == 0)[background].float().mean() > 0.9
    # Half the field of view: two places of the object fall on one pixel, and no map is right for both.
    folded = full.kspace[..., ::2].contiguous()
    norms = espirit_maps(folded, torch.ones(1, 1, 1, 32), cut=True).abs().square().sum(1)
    rss = ifft2(folded).abs().square().sum(1).sqrt()
    assert (norms > 0)[rss > 0.15 * rss.max()].all()


def test_espirit_hands_over_to_the_low_resolution_maps_outside_the_object() -> None:
    shape = (64, 64)
    x = phantom(shape)
    full, _ = simulate(x[None], mask=torch.ones(shape), coils=6, noise=0.003)
    assert full.mask is not None
    blended, everywhere, low = (
        f(full.kspace, full.mask) for f in (espirit_maps, partial(espirit_maps, crop=0.0), MAPS["low-resolution"])
    )
    background = torch.nn.functional.max_pool2d(x[None], 9, 1, 4)[0] == 0
    at = (0, slice(None), background)
    assert relative(blended[at], low[at]) < 0.3 < relative(everywhere[at], low[at])
    at = (0, slice(None), x > 0.1)
    assert relative(blended[at], everywhere[at]) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_the_complete_block_is_found(shape: tuple[int, int]) -> None:
    h, w = shape
    assert complete_block(torch.ones(1, w), shape, calibration=8) == (8, 8)
    lines = torch.zeros(1, w)
    lines[:, w // 2 - 3 : w // 2 + 4] = 1
    assert complete_block(lines, shape) == (h, 7)
    lines[:, w // 2 + 2] = 0
    assert complete_block(lines, shape) is None
    with pytest.raises(BadOption, match="calibration"):
        complete_block(lines, shape, calibration=0)


@pytest.mark.parametrize("name", CENTRED)
def test_only_the_complete_centre_is_used(name: str) -> None:
    mask = torch.zeros(1, 1, 1, 40)
    mask[..., 14:26] = 1
    mask[..., ::4] = 1
    y = random((1, 3, 40, 40)) * mask
    disturbed = y + 9 * random((1, 3, 40, 40), seed=1) * (torch.arange(40) % 4 == 0) * (torch.arange(40) < 12)
    assert torch.equal(MAPS[name](y, mask), MAPS[name](disturbed, mask))


@pytest.mark.parametrize("family", sorted(MASKS))
def test_only_a_scan_without_a_centre_is_called_poorly_calibrated(family: str) -> None:
    shape = (96, 96)
    mask = make_mask(family, shape, 4)[None, None]
    assert poorly_calibrated(mask, shape) == (family == "random")
    assert not poorly_calibrated(torch.ones(2, 1, 1, 96), shape)
    y, _ = simulate(phantom(shape)[None], mask=mask, coils=3)
    with contextlib.ExitStack() as stack:
        if family == "random":
            stack.enter_context(pytest.warns(TunemriWarning, match="expect poor ones"))
        prepare(y, csm="espirit")
    assert not thinly_sampled(mask, shape)
    prepare(y)


@pytest.mark.parametrize("kind", ["every second line", "random 8×"])
def test_a_centre_that_tells_no_maps_is_said(kind: str) -> None:
    """The maps are as wrong as they are said to be."""
    shape = (96, 80)
    lines = (torch.arange(80) % 2 == 0).float().expand(shape)
    mask = lines if kind == "every second line" else make_mask("random", shape, 8)
    y, target = simulate(phantom(shape)[None], mask=mask, coils=6, store_maps=True)
    assert y.csm is not None and y.mask is not None
    x = y.csm * target[:, None] * (target.abs() > 0.1)[:, None]
    assert unexplained(x, auto_maps(y.kspace, y.mask)) > 0.1
    assert thinly_sampled(y.mask, shape)
    with pytest.warns(TunemriWarning, match="expect poor ones; name a file"):
        prepare(replace(y, csm=None))
    for size in ((1, 1), (1, 9), (20, 1), (7, 5)):
        assert not thinly_sampled(torch.ones(1, 1, *size), size)


def test_bad_arguments_are_named() -> None:
    y, mask = random((1, 2, 8, 8)), torch.ones(1, 1, 8, 8)
    for name in ("espirit", "low-resolution", "walsh"):
        with pytest.raises(BadOption, match="calibration"):
            MAPS[name](y, mask, calibration=0)
    with pytest.raises(BadOption, match="steps"):
        nlinv_maps(y, mask, steps=0)
    with pytest.raises(BadOption, match="window"):
        walsh_maps(y, mask, window=4)
    for name, value in (("kernel", 1), ("threshold", 1.0), ("crop", -0.1)):
        with pytest.raises(BadOption, match=name):
            espirit_maps(y, mask, **{name: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------- noise


def correlated(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise `(B, C, *)` with a known covariance, and that covariance."""
    c = shape[1]
    mixing = torch.eye(c) + 0.3 * random((c, c), seed=seed + 50)
    noise = 0.2 * torch.einsum("cd,bd...->bc...", mixing, random(shape, seed=seed))
    return noise, 0.04 * mixing @ mixing.mH


@pytest.mark.parametrize("coils", [1, 3, 8])
def test_prewhitened_noise_has_identity_covariance(coils: int) -> None:
    noise, true = correlated((2, coils, 60, 50))
    covariance = noise_covariance(noise)
    assert relative(covariance, true) < 0.05
    white = prewhiten(noise, covariance)
    assert white.shape == noise.shape
    assert (noise_covariance(white) - torch.eye(coils)).abs().max() < 1e-4
    off_grid, _ = correlated((2, coils, 500), seed=1)
    assert prewhiten(off_grid, covariance).shape == off_grid.shape


@pytest.mark.parametrize("family", ["poisson", "cartesian-random", "radial"])
@pytest.mark.parametrize("coils", [1, 6])
def test_the_covariance_is_found_under_an_object(family: str, coils: int) -> None:
    shape = (96, 80)
    full, _ = simulate(
        torch.stack((phantom(shape), phantom(shape, seed=2))), mask=torch.ones(shape), coils=coils, noise=0
    )
    noise, true = correlated((2, coils, *shape))
    mask = make_mask(family, shape, 3)
    y = (full.kspace + noise) * mask
    found = estimate_covariance(y, mask[None, None])
    assert relative(found, true) < 0.25
    assert torch.allclose(found, found.mH)
    assert torch.allclose(estimate_covariance(3 * y), 9 * found, rtol=1e-4)


def test_strong_samples_hardly_move_the_covariance() -> None:
    noise, true = correlated((1, 4, 64, 64))
    noise[:, :, :, ::11] *= 30
    assert relative(estimate_covariance(noise, share=1.0), true) < 0.3


def test_whitening_a_scan_keeps_its_level_and_its_model() -> None:
    noise, covariance = correlated((2, 4, 32, 33))
    s = scan((32, 33), slices=2, coils=4, every=1)
    white = whiten_scan(replace(s, kspace=noise), covariance)
    assert white.noise_std is not None
    assert relative(noise_covariance(white.kspace), white.noise_std**2 * torch.eye(4)) < 0.1
    assert white.noise_std == pytest.approx(0.2, rel=0.3)
    # y = A x stays true for the same x.
    x = random((2, 32, 33))
    exact = whiten_scan(replace(s, kspace=encoding(s)(x)), covariance)
    assert relative(encoding(exact)(x), exact.kspace) < 1e-5
    assert whiten_scan(replace(s, kspace=noise)).noise_std == pytest.approx(white.noise_std, rel=0.1)


def test_a_covariance_that_is_none_is_named() -> None:
    y = random((1, 3, 8, 8))
    with pytest.raises(InconsistentShapes, match="covariance"):
        prewhiten(y, torch.eye(4))
    with pytest.raises(BadOption, match="positive definite"):
        prewhiten(y, torch.zeros(3, 3))
    with pytest.raises(NoData, match="noise"):
        noise_covariance(random((1, 3, 2)))
    with pytest.raises(NoData, match="outer"):
        estimate_covariance(torch.zeros(1, 3, 64, 64, dtype=torch.complex64))
    with pytest.raises(BadOption, match="share"):
        estimate_covariance(y, share=0.0)
    t = (torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * 32
    off_grid = Scan(kspace=random((1, 3, 50)), trajectory=t, image_shape=(32, 32))
    with pytest.raises(MissingKey, match="covariance"):
        whiten_scan(off_grid)
    assert whiten_scan(off_grid, torch.eye(3)).noise_std == pytest.approx(1)


# ---------------------------------------------------------------- compression


@pytest.mark.parametrize("shape", [(1, 6, 20, 21), (3, 5, 200)])
def test_compression_keeps_energy_and_reduces_coils(shape: tuple[int, ...]) -> None:
    # Two strong directions, different in every slice, and a little of all others.
    y = torch.einsum("bcd,bd...->bc...", random((shape[0], shape[1], 2), seed=1), random((shape[0], 2, *shape[2:])))
    y = y + 1e-2 * random(shape, seed=2)
    two = compress(y, 2)
    assert two.shape == (shape[0], 2, *shape[2:])
    kept = two.abs().square().flatten(1).sum(1) / y.abs().square().flatten(1).sum(1)
    assert (kept > 0.999).all() and (kept <= 1 + 1e-5).all()
    assert torch.allclose(compress(y[:1], 2), two[:1], atol=1e-4)
    assert torch.allclose(compress(y * 1e-9, 2), two * 1e-9, atol=1e-13)
    # The strongest comes first, and the virtual coils share nothing.
    assert (two[:, 0].abs().square().flatten(1).sum(1) >= two[:, 1].abs().square().flatten(1).sum(1)).all()
    assert abs(inner(two[0, 0], two[0, 1])) < 1e-3 * float(two[0].abs().square().sum())
    assert torch.equal(compress(y, 99), y)
    with pytest.raises(BadOption, match="coils"):
        compress(y, 0)


def test_a_compressed_scan_keeps_its_model() -> None:
    s = scan((24, 25), slices=2, coils=8)
    small = compress_scan(s, 4)
    assert small.coils == 4 and small.csm is not None
    x = random((2, 24, 25))
    y = encoding(s)(x)
    again = compress_scan(replace(s, kspace=y), 4)
    assert relative(encoding(again)(x), again.kspace) < 1e-5
    assert compress_scan(s, 8) is s
    assert torch.isfinite(torch.view_as_real(compress_scan(replace(s, kspace=s.kspace * 0), 2).kspace)).all()


@pytest.mark.parametrize("shape", [*SHAPES, (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_smoothing_solves_the_linear_system(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """(I + weight L) σ = maps, L the five-point Laplacian of a grid with zeros around it, solved by a sparse LU."""
    h, w = shape

    def second(n: int) -> scipy.sparse.spmatrix:
        return scipy.sparse.diags([2.0, -1.0, -1.0], [0, 1, -1], shape=(n, n))

    laplace = scipy.sparse.kron(second(h), scipy.sparse.eye(w)) + scipy.sparse.kron(scipy.sparse.eye(h), second(w))
    maps, weight = random((2, 3, h, w), dtype), torch.tensor([0.3, 70.0], dtype=torch.float64)[:, None, None, None]
    sigma = smooth(maps, weight)
    for b in range(2):
        system = (scipy.sparse.eye(h * w) + float(weight[b]) * laplace).tocsc()
        exact = scipy.sparse.linalg.spsolve(system.astype(complex), maps[b].reshape(3, -1).numpy().T.astype(complex)).T
        assert relative(sigma[b].to(torch.complex128), torch.from_numpy(exact).reshape(3, h, w)) < 1e-12
    flat = torch.view_as_real(maps.to(torch.complex128)).movedim(-1, 1).reshape(2, -1, h * w).numpy()
    energy = [0.5 * sum(v @ (laplace @ v) for v in planes) for planes in flat]
    torch.testing.assert_close(roughness(maps), torch.tensor(energy, dtype=torch.float64))


def test_smoothing_by_nothing_changes_nothing_and_single_precision_is_enough() -> None:
    maps = random((1, 4, 61, 50))
    assert relative(smooth(maps, 0.0), maps) < 2e-6
    assert relative(smooth(maps, 10.0), smooth(maps.to(torch.complex128), 10.0).to(torch.complex64)) < 2e-6
    assert roughness(smooth(maps, 10.0)) < 0.01 * roughness(maps)


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_joint_gradients_against_autograd(kind: torch.dtype) -> None:
    """½‖M F(x ĉ) - y‖² with a pixel whose maps vanish and one whose maps are below the guard."""
    x, c, y = random((2, 9, 8), kind), random((2, 3, 9, 8), torch.complex128, 1), random((2, 3, 9, 8), seed=2)
    mask = (random((2, 1, 9, 8), torch.float64, 3) > 0).double()
    c[0, :, 2, 3], c[1, :, 4, 5] = 0, 1e-8
    x.requires_grad_()
    c.requires_grad_()

    def residual() -> Tensor:
        return mask * (fft2(x[:, None] * unit_maps(c)) - y)

    f = residual().abs().square().sum() / 2
    f.backward()
    assert x.grad is not None and c.grad is not None
    slope_x, slope_c = joint_gradients(x.detach(), c.detach(), ifft2(residual().detach()))
    assert slope_x.dtype == kind
    assert relative(slope_x, x.grad) < 1e-10
    plain = torch.ones(2, 9, 8, dtype=torch.bool)
    plain[0, 2, 3] = plain[1, 4, 5] = False  # there 1e6 times the rest
    for where in (plain, ~plain):
        assert relative(slope_c.movedim(1, -1)[where], c.grad.movedim(1, -1)[where]) < 1e-10


def test_unit_maps_are_of_unit_length_and_zero_where_there_are_none() -> None:
    c = random((1, 5, 6, 7))
    c[0, :, 1, 1] = 0
    size = unit_maps(1e3 * c).abs().square().sum(1)
    assert float(size[0, 1, 1]) == 0
    assert float((size - 1).abs().flatten().sort().values[-2]) < 1e-5
