"""Simulated scans: consistent, in the units of the image, as noisy as asked, and never called acquired."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import torch

from tunemri import errors
from tunemri.coils import low_resolution_maps
from tunemri.fourier import ifft2
from tunemri.masks import make_mask
from tunemri.scan import Scan
from tunemri.simulate import coil_maps, phantom, sample, simulate, smooth_phase

SHAPES = [(32, 32), (33, 48), (17, 9)]


def combine(scan: Scan) -> torch.Tensor:
    assert scan.csm is not None
    return (scan.csm.conj() * ifft2(scan.kspace)).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coils", [1, 2, 8])
def test_without_noise_the_image_comes_back_in_its_own_units(shape: tuple[int, int], coils: int) -> None:
    x = 700 * torch.stack((phantom(shape), phantom(shape, seed=1)))
    scan, target = simulate(x, mask=torch.ones(shape), coils=coils, noise=0, store_maps=True)
    assert scan.kspace.shape == (2, coils, *shape) and scan.kspace.dtype == torch.complex64
    assert (combine(scan) - target).abs().max() < 1e-5 * 700
    assert (target.abs() - x).abs().max() < 1e-5 * 700


def test_noise_is_as_strong_as_asked_and_only_where_sampled() -> None:
    shape, volume = (64, 48), 5 * torch.stack((phantom((64, 48)), phantom((64, 48), seed=2) / 2))
    mask = make_mask("poisson", shape, 2)
    clean, noisy = (simulate(volume, mask=mask, coils=4, noise=noise)[0] for noise in (0, 0.03))
    n = (noisy.kspace - clean.kspace)[..., mask > 0]
    level = 0.03 * float(volume.max())  # of the volume, the same for its darker slice
    assert noisy.noise_std == pytest.approx(level)
    for one_slice in n:
        assert float(one_slice.abs().square().mean().sqrt()) == pytest.approx(level, rel=0.05)
    # White and circular: equal halves, no correlation between them or between coils.
    assert float(n.real.std() / n.imag.std()) == pytest.approx(1, abs=0.03)
    assert float((n.real * n.imag).mean()) == pytest.approx(0, abs=0.03 * level**2)
    assert float((n[:, 0] * n[:, 1].conj()).mean().abs()) < 0.05 * level**2
    assert not noisy.kspace[..., mask == 0].any()


def test_maps_phase_and_noise_do_not_depend_on_the_mask() -> None:
    x, mask = phantom((32, 24))[None], make_mask("gaussian", (32, 24), 3)
    whole, part = (simulate(x, mask=m, seed=4)[0].kspace for m in (torch.ones(32, 24), mask))
    assert torch.equal(whole * mask, part)


@pytest.mark.parametrize("factor", [1e-20, 3.0, 1e20])
def test_scaling_the_image_scales_the_scan(factor: float) -> None:
    x, mask = phantom((24, 20))[None], make_mask("random", (24, 20), 2)
    scan, _ = simulate(x, mask=mask)
    scaled, _ = simulate(x * factor, mask=mask)
    assert torch.allclose(scaled.kspace / factor, scan.kspace, atol=1e-5)
    assert scan.noise_std is not None and scaled.noise_std == pytest.approx(factor * scan.noise_std)


def test_seed_decides_everything_random() -> None:
    x, mask = phantom((24, 20))[None], torch.ones(24, 20)
    first, again, other = (simulate(x, mask=mask, seed=seed)[0].kspace for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-2)


def test_real_images_get_a_phase_and_complex_ones_keep_theirs() -> None:
    x, mask = phantom((40, 40))[None], torch.ones(40, 40)
    _, target = simulate(x, mask=mask)
    assert float(target[x > 0.5].angle().std()) > 0.2
    _, real = simulate(x, mask=mask, phase=0)
    assert not real.imag.any()
    given = x * torch.polar(torch.ones(40, 40), smooth_phase((40, 40), seed=9, strength=1.0))
    _, kept = simulate(given, mask=mask)
    assert torch.equal(kept, given)


def test_a_scan_says_that_it_is_simulated_and_hides_its_maps() -> None:
    scan, _ = simulate(phantom((32, 32))[None], mask=make_mask("radial", (32, 32), 4), mask_name="radial", seed=3)
    assert scan.csm is None
    assert scan.provenance.startswith("simulated: radial 3.9")  # the measured acceleration
    assert "8 coils" in scan.provenance and "seed 3" in scan.provenance


@pytest.mark.parametrize("shape", [(16, 16), (16,), (1, 1, 1, 16), (2, 1, 16, 16)])
def test_masks_of_every_layout(shape: tuple[int, ...]) -> None:
    x = phantom((16, 16)).expand(2, 16, 16)
    mask = torch.ones(shape)
    if len(shape) == 1:
        with pytest.raises(errors.InconsistentShapes, match="mask"):
            simulate(x, mask=mask)
    else:
        assert simulate(x, mask=mask)[0].acceleration == 1


@pytest.mark.parametrize("shape", [(64, 64), (33, 48), (8, 64), (1, 1)])
@pytest.mark.parametrize("coils", [1, 2, 8, 32])
def test_maps_have_unit_norm_and_are_smooth(shape: tuple[int, int], coils: int) -> None:
    maps = coil_maps(shape, coils, seed=1)
    assert maps.shape == (coils, *shape)
    assert maps.abs().square().sum(0).sub(1).abs().max() < 1e-5
    if shape == (64, 64):
        assert maps.diff(dim=1).abs().max() < 0.15 and maps.diff(dim=2).abs().max() < 0.15


def test_maps_of_a_finer_grid_are_the_same_field() -> None:
    coarse, fine = coil_maps((32, 24), 8), coil_maps((64, 48), 8)
    assert (fine[:, ::2, ::2] - coarse).abs().max() < 1e-5


def test_coils_see_different_places() -> None:
    maps = coil_maps((64, 64), 8).abs()
    brightest = {int(m.argmax()) for m in maps}
    assert len(brightest) == 8
    assert maps[:, 32, 32].max() < 0.7  # none owns the middle


def test_phase_has_the_strength_asked_for() -> None:
    field = smooth_phase((64, 48), strength=0.5, seed=2)
    y, x = (torch.linspace(-0.5, 0.5, n) for n in (64, 48))
    ramps = torch.stack((torch.ones(64, 48), y[:, None].expand(64, 48), x.expand(64, 48)), -1).reshape(-1, 3)
    flat = field.reshape(-1, 1) - ramps @ torch.linalg.lstsq(ramps, field.reshape(-1, 1)).solution
    assert 0.1 < float(flat.std()) <= 0.55
    assert field.diff(dim=0).abs().max() < 0.3
    assert not smooth_phase((8, 8), strength=0).any()


@pytest.mark.parametrize("shape", [(64, 64), (65, 48), (9, 8), (1, 1), (8, 64)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_phantom_is_a_bounded_image(shape: tuple[int, int], seed: int) -> None:
    x = phantom(shape, seed=seed)
    assert x.shape == shape and x.dtype == torch.float32
    assert 0 <= float(x.min()) and 0 < float(x.max()) <= 1
    assert torch.equal(x, phantom(shape, seed=seed))


def test_phantom_is_antialiased_and_varies_with_the_seed() -> None:
    assert len(phantom((64, 64)).unique()) > 50  # six intensities without partial pixels
    assert not torch.allclose(phantom((64, 64)), phantom((64, 64), seed=1), atol=0.1)


def test_the_sample_is_whole_and_honest() -> None:
    scan, target = sample()
    assert scan.kspace.shape == (1, 8, 208, 176) and target.shape == (1, 208, 176)
    assert scan.provenance.startswith("simulated")
    assert scan.acceleration == pytest.approx(4, rel=1e-3)
    assert scan.csm is None and scan.mask is not None
    # The target belongs to the data: even zero-filled, the scan resembles it, in the same units.
    maps = low_resolution_maps(scan.kspace, scan.mask)
    image = (maps.conj() * ifft2(scan.kspace)).sum(1).abs()
    assert float((image - target).square().mean().sqrt()) < 0.04 * float(target.max())
    # Far out there is little but noise, as strong as the file says.
    y, x = torch.meshgrid(torch.arange(208) - 104, torch.arange(176) - 88, indexing="ij")
    rim = (scan.mask[0, 0] > 0) & ((y / 104) ** 2 + (x / 88) ** 2 > 1.2)
    level = float(scan.kspace[0][:, rim].abs().square().mean().sqrt())
    assert scan.noise_std is not None and 0.95 < level / scan.noise_std < 1.3


def test_the_sample_is_small_and_carries_its_notice() -> None:
    folder = resources.files("tunemri") / "sample"
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir() if entry.is_file()) <= 500_000
    assert "Copyright (C) 1993-2009 Louis Collins" in (folder / "NOTICE.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "key"),
    [
        ({"image": torch.ones(8, 8)}, errors.UnsupportedLayout, "image"),
        ({"image": torch.zeros(1, 8, 8)}, errors.NoData, "image"),
        ({"image": torch.full((1, 8, 8), torch.nan)}, errors.NonFinite, "image"),
        ({"mask": torch.ones(8, 7)}, errors.InconsistentShapes, "mask"),
        ({"mask": torch.zeros(8, 8)}, errors.NoData, "mask"),
        ({"mask": torch.full((8, 8), 0.5)}, errors.UnsupportedLayout, "mask"),
        ({"mask": torch.ones(3, 1, 8, 8)}, errors.InconsistentShapes, "mask"),
        ({"noise": -0.1}, errors.BadOption, "noise"),
        ({"noise": float("inf")}, errors.BadOption, "noise"),
        ({"phase": float("nan")}, errors.BadOption, "phase"),
        ({"coils": 0}, errors.BadOption, "coils"),
        ({"coils": 2.5}, errors.BadOption, "coils"),
        ({"seed": -1}, errors.BadOption, "seed"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[errors.TunemriError], key: str) -> None:
    with pytest.raises(error) as refusal:
        simulate(**{"image": torch.ones(1, 8, 8), "mask": torch.ones(8, 8)} | arguments)
    assert refusal.value.key == key
