"""Laws of sampling patterns, over every family."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

from tunemri.errors import BadOption
from tunemri.masks import MASKS, describe, make_mask, options

FAMILIES = sorted(MASKS)
SEEDED = sorted(set(MASKS) - {"radial"})
POINTS = ["gaussian", "poisson", "random"]
LINES = ["cartesian-equispaced", "cartesian-random"]
SHAPES = [(64, 64), (65, 48), (128, 96)]

# Files of the ISTA-Net and ADMM-Net papers: sampled points of 256 × 256, SHA-256 of the bits packed row by row.
RADIAL = {
    10: (6695, "d5b123b0e0d7d65a18d0259d6823efded3afe1542e0f7e9418b6f9c32b67b911"),
    20: (13233, "27f03ed70364f9d3edbfb00f59832e8e8a0bf8157bfc4ac37754fd377df114ce"),
    30: (19789, "bfbbb28d734a9730f85518b93446781dde94ce080fc761546cdcc9d989a8c2cc"),
    40: (26273, "cfc13d806a1994e355639e3737bebeebf1bac8cb081fff57a0e190575e871962"),
    50: (32753, "53c08a1dbde184fa080932b1e3084be6fa8f06e5b74fca35bd9d0f13769cab2e"),
}


def measured(mask: Tensor) -> float:
    return mask.numel() / float(mask.sum())


def points(mask: Tensor) -> np.ndarray:
    return mask.nonzero().numpy().astype(float)


def test_the_names_are_those_of_the_command_line() -> None:
    assert set(MASKS) == {
        "poisson", "cartesian-random", "cartesian-equispaced", "radial", "radial-golden", "spiral", "gaussian",
        "random",
    }  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("acceleration", [2, 3, 4, 6, 8])
def test_binary_and_truly_accelerated(name: str, shape: tuple[int, int], acceleration: float) -> None:
    mask = make_mask(name, shape, acceleration, seed=1)
    assert mask.shape == shape and mask.dtype == torch.float32
    assert bool(((mask == 0) | (mask == 1)).all())
    if name != "random":
        assert mask[shape[0] // 2, shape[1] // 2] == 1
    wanted = mask.numel() / acceleration
    if name in POINTS:
        assert abs(float(mask.sum()) - wanted) <= 0.5
    elif name in LINES:
        assert abs(float(mask.sum()) - wanted) <= 0.51 * shape[0] if name == "cartesian-random" else 1.01 * shape[0]
    else:
        assert measured(mask) == pytest.approx(acceleration, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_large_grids_meet_the_acceleration_closely(name: str) -> None:
    assert measured(make_mask(name, (256, 256), 5, seed=2)) == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(8, 8), (31, 17), (1, 1), (1, 9)])
def test_acceleration_one_samples_everything(name: str, shape: tuple[int, int]) -> None:
    assert bool(make_mask(name, shape, 1).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_same_seed_same_mask(name: str) -> None:
    first, again = (make_mask(name, (48, 40), 3, seed=5) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", SEEDED)
def test_other_seed_other_mask(name: str) -> None:
    masks = [make_mask(name, (48, 40), 3, seed=seed) for seed in range(6)]
    assert any(not torch.equal(masks[0], other) for other in masks[1:])


@given(
    name=st.sampled_from(FAMILIES),
    shape=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    acceleration=st.floats(1, 30),
    seed=st.integers(0, 2**31),
)
def test_any_request_is_met_or_refused(name: str, shape: tuple[int, int], acceleration: float, seed: int) -> None:
    # Only small grids, or the corners that a spiral never reaches, excuse a refusal.
    excused = name not in POINTS and (acceleration > 3 or acceleration < 1.3)
    try:
        mask = make_mask(name, shape, acceleration, seed=seed)
    except BadOption:
        if not excused:
            raise
        return
    assert 0.8 <= measured(mask) / acceleration <= 1.25
    assert bool(((mask == 0) | (mask == 1)).all())


@pytest.mark.parametrize("percent", RADIAL)
def test_radial_is_that_of_the_papers(percent: int) -> None:
    count, digest = RADIAL[percent]
    mask = make_mask("radial", (256, 256), 256 * 256 / count)
    bits = np.packbits(mask.numpy().astype(np.uint8))
    assert hashlib.sha256(bits.tobytes()).hexdigest() == digest


@pytest.mark.parametrize("percent", RADIAL)
def test_radial_equals_the_published_files(percent: int, data: Path) -> None:
    published = np.load(data / "bench" / "masks" / f"radial_{percent}_256.npy")
    assert np.array_equal(make_mask("radial", (256, 256), 1 / published.mean()).numpy(), published)


@pytest.mark.parametrize("name", ["radial", "radial-golden"])
@pytest.mark.parametrize("shape", [(64, 64), (33, 48)])
def test_radial_lines_pass_through_the_centre(name: str, shape: tuple[int, int]) -> None:
    mask = make_mask(name, shape, 4)
    # About index N // 2 an even size has an unpaired first row or column; it stays empty.
    h, w = (size - 1 + size % 2 for size in shape)
    paired = mask[-h:, -w:]
    assert torch.equal(paired, paired.flip(0, 1))
    assert float(paired.sum()) == float(mask.sum())


def test_poisson_points_keep_a_distance() -> None:
    acceleration = 9
    mask = make_mask("poisson", (96, 80), acceleration, order=0, calibration=0)
    nearest = cKDTree(points(mask)).query(points(mask), k=2)[0][:, 1]
    at_random = points(make_mask("random", (96, 80), acceleration))
    assert nearest.min() >= 2  # of 3, the spacing of a square lattice
    assert cKDTree(at_random).query(at_random, k=2)[0][:, 1].min() == 1


def test_poisson_distance_grows_away_from_the_centre() -> None:
    places = points(make_mask("poisson", (160, 160), 8, seed=3))
    nearest = cKDTree(places).query(places, k=2)[0][:, 1]
    radius = np.hypot(*(places - 80).T) / 80
    # The smallest distance in each ring, which random points of the same density would not keep.
    smallest = [nearest[(radius >= a) & (radius < a + 0.2)].min() for a in (0.2, 0.5, 0.8, 1.05)]
    assert smallest == sorted(smallest) and smallest[2] >= 2 and smallest[3] >= 4


@pytest.mark.parametrize("name", ["poisson", "gaussian"])
@pytest.mark.parametrize(("calibration", "sides"), [(12, (12, 12)), ((5, 10), (5, 10)), (0, (1, 1)), (None, (12, 10))])
def test_calibration_block_is_complete(
    name: str, calibration: int | tuple[int, int] | None, sides: tuple[int, int]
) -> None:
    uniform = {"poisson": {"order": 0}, "gaussian": {"width": 2}}[name]  # or the centre might be full by itself
    mask = make_mask(name, (96, 80), 6, calibration=calibration, **uniform)
    top, left = 48 - sides[0] // 2, 40 - sides[1] // 2
    assert bool(mask[top : top + sides[0], left : left + sides[1]].all())
    assert not bool(mask[top - 4 : top + sides[0] + 4, left - 4 : left + sides[1] + 4].all())


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("phase_axis", ["columns", "rows"])
def test_lines_are_whole_and_the_central_ones_complete(name: str, phase_axis: str) -> None:
    mask = make_mask(name, (40, 100), 4, phase_axis=phase_axis, center_fraction=0.1)
    lines = mask[0] if phase_axis == "columns" else mask[:, 0]
    assert torch.equal(mask, (lines if phase_axis == "columns" else lines[:, None]).expand(40, 100))
    n = len(lines)
    middle = round(0.1 * n)
    first = (n - middle + 1) // 2
    assert bool(lines[first : first + middle].all())


def test_default_central_lines_are_those_of_fastmri() -> None:
    for acceleration, lines in ((4, 16), (8, 8)):  # 0.08 and 0.04 of 200
        mask = make_mask("cartesian-random", (4, 200), acceleration)[0]
        first = (200 - lines + 1) // 2
        assert bool(mask[first : first + lines].all()) and float(mask.sum()) == 200 / acceleration


def test_equispaced_lines_are_equispaced() -> None:
    lines = make_mask("cartesian-equispaced", (4, 240), 4, seed=2)[0].nonzero()[:, 0]
    sides = [lines[lines < 108], lines[lines > 132]]  # clear of the central ones
    gaps = torch.cat([side.diff() for side in sides])
    assert len(gaps) > 30 and gaps.max() - gaps.min() <= 1  # a spacing that is no whole number is rounded


def test_gaussian_density_follows_its_width() -> None:
    places = points(make_mask("gaussian", (200, 200), 20, calibration=0, width=0.1)) - 100
    # Without replacement the middle saturates, so the spread is a little larger than the width itself.
    assert places.std() == pytest.approx(0.1 * 200, rel=0.2)


@pytest.mark.parametrize("name", FAMILIES)
def test_description_and_options_are_told(name: str) -> None:
    assert describe(name) and "\n" not in describe(name)
    assert set(options(name)) | {"shape", "acceleration", "seed"} == set(inspect.signature(MASKS[name]).parameters)
    # Naming every default changes nothing.
    assert torch.equal(make_mask(name, (40, 32), 3, **options(name)), make_mask(name, (40, 32), 3))


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        ({"name": "poison"}, "mask", "'poisson'"),
        ({"acceleration": 0.5}, "acceleration", "≥ 1"),
        ({"acceleration": float("nan")}, "acceleration", "finite"),
        ({"acceleration": float("inf")}, "acceleration", "finite"),
        ({"shape": (0, 8)}, "shape", "at least 1"),
        ({"shape": (8.5, 8)}, "shape", "at least 1"),
        ({"seed": -1}, "seed", "≥ 0"),
        ({"seed": 0.5}, "seed", "whole"),
        ({"center_fractoin": 0.1}, "center_fractoin", "'center_fraction'"),
        ({"calibration": 8}, "calibration", "no such option"),
        ({"center_fraction": 0}, "center_fraction", "between 0 and 1"),
        ({"center_fraction": 1.0}, "center_fraction", "between 0 and 1"),
        ({"center_fraction": 0.5}, "center_fraction", "more than"),
        ({"phase_axis": "depth"}, "phase_axis", "'rows'"),
        ({"name": "poisson", "calibration": 40}, "calibration", "more than"),
        ({"name": "poisson", "calibration": (4, 4, 4)}, "calibration", "two"),
        ({"name": "poisson", "calibration": -1}, "calibration", "whole"),
        ({"name": "poisson", "order": -1}, "order", "0 to 20"),
        ({"name": "gaussian", "width": 0}, "width", "> 0"),
        ({"name": "spiral", "interleaves": 0}, "interleaves", "≥ 1"),
        ({"name": "spiral", "order": float("nan")}, "order", "0 to 20"),
        ({"acceleration": 1000}, "acceleration", "nearest"),
        ({"name": "radial", "acceleration": 1000}, "acceleration", "nearest"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, key: str, words: str) -> None:
    with pytest.raises(BadOption) as refusal:
        make_mask(**{"name": "cartesian-random", "shape": (64, 48), "acceleration": 4} | arguments)
    assert refusal.value.key == key and words in str(refusal.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_masks_of_other_tasks(shape: tuple[int, int]) -> None:
    assert bool(make_mask("full", shape, 4).all())
    block = make_mask("centre", shape, 4)
    rows, columns = (block.amax(axis).bool() for axis in (1, 0))
    assert torch.equal(block, torch.outer(rows.float(), columns.float()))
    # Zero frequency in the middle of the block, to one line.
    for n, line in zip(shape, (rows, columns), strict=True):
        first, last = line.nonzero().flatten()[[0, -1]].tolist()
        assert last - first + 1 == line.sum() == round(n / 2)
        assert 0 <= (n // 2 - first) - (last - n // 2) <= 1
