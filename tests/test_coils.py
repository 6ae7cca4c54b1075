"""Estimated coil maps, over every way to estimate them."""

from __future__ import annotations

import pytest
import torch

from laws import random
from tunemri.coils import MAPS, walsh_maps
from tunemri.errors import BadOption
from tunemri.masks import make_mask
from tunemri.simulate import phantom, simulate

METHODS = sorted(MAPS)


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
def test_only_the_complete_centre_is_used(name: str) -> None:
    mask = torch.zeros(1, 1, 1, 40)
    mask[..., 14:26] = 1
    mask[..., ::4] = 1
    y = random((1, 3, 40, 40)) * mask
    disturbed = y + 9 * random((1, 3, 40, 40), seed=1) * (torch.arange(40) % 4 == 0) * (torch.arange(40) < 12)
    assert torch.equal(MAPS[name](y, mask), MAPS[name](disturbed, mask))


def test_bad_arguments_are_named() -> None:
    y, mask = random((1, 2, 8, 8)), torch.ones(1, 1, 8, 8)
    for name in METHODS:
        with pytest.raises(BadOption, match="calibration"):
            MAPS[name](y, mask, calibration=0)
    with pytest.raises(BadOption, match="window"):
        walsh_maps(y, mask, window=4)
