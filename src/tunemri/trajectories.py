"""Paths through k-space off the grid, as pure functions: radial, golden angle, tiny golden angle, spiral.

Every family is a function `f(shape, shots, …) -> trajectory`: a float32 tensor `(M, 2)`, (row, column) in cycles per
field of view, shot after shot, inside [-N/2, N/2). Pixels are taken for square: on a grid of H×W the measured disk has
the radius H/2 along rows and W/2 along columns, the same resolution both ways. (`masks` has their kin on the grid.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import errors

__all__ = ["TRAJECTORIES", "golden", "radial", "radial_weights", "readouts", "spiral", "tiny_golden"]

Shape = tuple[int, int]
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def radial(shape: Shape, shots: int, *, readout: int | None = None) -> Tensor:
    """Diameters at equal angles, shot s at π s / shots; angle 0 runs along a row.

    Arguments:
        shape: `(H, W)` of the image.
        shots: number of spokes, ≥ 1. π/2 · max(shape) of them sample the disk densely.
        readout: samples per spoke; None takes twice the larger side, the usual oversampling.

    Returns:
        trajectory `(shots * readout, 2)`.

    Raises:
        BadOption: an argument out of range.
    """
    return _spokes(shape, shots, readout, math.pi / max(1, shots))


def golden(shape: Shape, shots: int, *, readout: int | None = None) -> Tensor:
    """Diameters at steps of the golden angle, 111.25°: any number of consecutive spokes is spread evenly.

    Arguments, returns, raises: see `radial`.

    Source: S. Winkelmann, T. Schaeffter, T. Koehler, H. Eggers, O. Doessel, "An optimal radial profile order based on
    the golden ratio for time-resolved MRI" (2007).
    """
    return _spokes(shape, shots, readout, math.pi / _GOLDEN_RATIO)


def tiny_golden(shape: Shape, shots: int, *, readout: int | None = None, order: int = 7) -> Tensor:
    """Diameters at steps of the tiny golden angle π / (τ + order - 1): small steps spare eddy currents.

    Arguments:
        order: ≥ 1; 1 is the golden angle, 7 is 23.63°. The others, returns, raises: see `radial`.

    Source: S. Wundrak et al., "Golden ratio sparse MRI using tiny golden angles" (2016).
    """
    _at_least(1, order=order)
    return _spokes(shape, shots, readout, math.pi / (_GOLDEN_RATIO + order - 1))


def spiral(
    shape: Shape, shots: int, *, readout: int | None = None, turns: float | None = None, order: float = 0
) -> Tensor:
    """Interleaved Archimedean spirals from the centre outwards, |k| ∝ t^(1 + order / 2), sampled at even arc length.

    Arguments:
        shape: `(H, W)` of the image.
        shots: number of arms, ≥ 1.
        readout: samples per arm; None takes one per half a grid step along the arm.
        turns: of each arm, > 0; None takes as many as sample the disk densely, max(shape) / (2 shots).
        order: fall-off of the density, 0 to 20; 0 is uniform.

    Returns:
        trajectory `(shots * readout, 2)`.

    Raises:
        BadOption: an argument out of range.
    """
    _check(shape, shots, readout)
    if turns is not None and not 0 < turns < math.inf:
        raise errors.BadOption(f"found {turns}, expected a finite number > 0", key="turns")
    if not 0 <= order <= 20:
        raise errors.BadOption(f"found {order}, expected a number from 0 to 20", key="order", help="0 is uniform")
    turns = max(shape) / (2 * shots) if turns is None else turns
    fine = torch.linspace(0, 1, 64 * (2 + math.ceil(turns * (1 + order))), dtype=torch.float64)
    radius, angle = fine ** (1 + order / 2) / 2, 2 * math.pi * turns * fine
    curve = torch.stack((radius * angle.sin(), radius * angle.cos()), 1)
    length = torch.cat((torch.zeros(1).double(), (curve[1:] - curve[:-1]).norm(dim=1).cumsum(0)))
    count = readout or max(2, math.ceil(2 * max(shape) * float(length[-1])))
    # The end is left out: it would touch +N/2, which is -N/2 of the next period.
    wanted = torch.arange(count, dtype=torch.float64) / count * length[-1]
    at = torch.searchsorted(length, wanted, right=True).clamp(max=len(length) - 1)
    part = (wanted - length[at - 1]) / (length[at] - length[at - 1])
    t = (fine[at - 1] + part * (fine[at] - fine[at - 1]))[None]
    turned = 2 * math.pi * (turns * t + torch.arange(shots, dtype=torch.float64)[:, None] / shots)
    radius = t ** (1 + order / 2) / 2
    return _finish(shape, radius * turned.sin(), radius * turned.cos())


TRAJECTORIES: dict[str, Callable[..., Tensor]] = {
    "radial": radial,
    "golden": golden,
    "tiny-golden": tiny_golden,
    "spiral": spiral,
}


def readouts(trajectory: Tensor) -> Tensor:
    """Which readout (spoke, arm) each sample of a list belongs to: the next one begins where the path jumps.

    A jump is longer than four times the median step. Readouts that go on where the last one ended count as one.

    Arguments:
        trajectory: `(M, 2)`, readout after readout.

    Returns:
        int64 `(M,)`, from 0 on, never falling.
    """
    step = trajectory.diff(dim=0).square().sum(-1).sqrt()
    jumps = step > 4 * step.median() if len(step) else step > 0
    return torch.cat((jumps.new_zeros(1), jumps)).cumsum(0)


def radial_weights(trajectory: Tensor, shots: int) -> Tensor:
    """The area of k-space that belongs to each sample of full spokes: the ramp |k| Δk Δθ, in grid cells.

    The angles may be in any order and unevenly spread: each spoke gets half the way to its neighbours. The weights of
    spokes that are sparse exceed one cell; `nufft.density_weights`, which treats any trajectory, never counts a sample
    for more than the frequency it is.

    Arguments:
        trajectory: `(M, 2)`, spoke after spoke, each a diameter of evenly spaced samples.
        shots: number of spokes.

    Returns:
        weights: `(M,)`.

    Raises:
        BadOption: M is not a multiple of `shots`, or too few samples for a spacing.
    """
    m = trajectory.shape[0]
    if shots < 1 or m % shots or m // shots < 2:
        raise errors.BadOption(f"{m} samples are not {shots} spokes of two or more", key="shots")
    k = trajectory.reshape(shots, -1, 2).double()
    step = k[:, -1] - k[:, 0]
    angle = torch.atan2(step[:, 0], step[:, 1]) % math.pi
    order = angle.argsort()
    gap = (torch.roll(angle[order], -1) - angle[order]) % math.pi
    gap = torch.full_like(gap, math.pi) if shots == 1 else gap
    width = torch.empty_like(gap)
    width[order] = (gap + torch.roll(gap, 1)) / 2
    spacing = step.norm(dim=1) / (k.shape[1] - 1)
    radius = k.norm(dim=2)
    # The sample at the centre has a sector of the small disk of half a spacing: π/4 Δk² in all, shared by angle.
    ring = torch.where(radius > spacing[:, None] / 4, radius, spacing[:, None] / 4)
    return (ring * (spacing * width)[:, None]).flatten().to(trajectory.dtype)


def _spokes(shape: Shape, shots: int, readout: int | None, step: float) -> Tensor:
    _check(shape, shots, readout)
    n = 2 * max(shape) if readout is None else readout
    # Half a turn is enough, and keeps both ends of a spoke inside [-N/2, N/2).
    angle = (torch.arange(shots, dtype=torch.float64)[:, None] * step) % math.pi
    radius = (torch.arange(n, dtype=torch.float64) - n // 2) / n
    return _finish(shape, radius * angle.sin(), radius * angle.cos())


def _finish(shape: Shape, rows: Tensor, columns: Tensor) -> Tensor:
    trajectory = torch.stack((rows * shape[0], columns * shape[1]), -1).reshape(-1, 2).float()
    half = torch.tensor(shape) / 2
    return torch.where(trajectory >= half, trajectory.nextafter(torch.zeros(())), trajectory)


def _check(shape: Shape, shots: int, readout: int | None) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise errors.BadOption(f"found {tuple(shape)}, expected (rows, columns) of at least 1 each", key="shape")
    _at_least(1, shots=shots)
    if readout is not None:
        _at_least(2, readout=readout)


def _at_least(least: int, **named: Any) -> None:
    for key, value in named.items():
        if isinstance(value, bool) or value != int(value) or value < least:
            raise errors.BadOption(f"found {value}, expected a whole number ≥ {least}", key=key)
