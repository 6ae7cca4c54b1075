"""From an image to a scan: coil maps, phase, noise and a mask; a phantom; and the sample that ships with the package.

What is made here says so: the provenance of every scan starts with "simulated".
"""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from torch import Tensor

from . import errors, formats
from .fourier import fft2
from .scan import Geometry, Scan, check_finite, measured_acceleration

__all__ = ["coil_maps", "phantom", "sample", "simulate", "smooth_phase"]

# What the random streams of one seed are for: they must not repeat each other.
_MAPS, _PHASE, _PHANTOM = 1, 2, 3


def simulate(
    image: Tensor,
    *,
    mask: Tensor,
    coils: int = 8,
    noise: float = 0.01,
    phase: float = 0.5,
    seed: int = 0,
    geometry: Geometry | None = None,
    store_maps: bool = False,
    mask_name: str = "mask",
) -> tuple[Scan, Tensor]:
    """The scan that would have been measured of an image.

        y_c = M (F S_c x e^{iφ} + n_c),    n_c complex white Gaussian

    F is orthonormal and nothing is rescaled: reconstructing gives the image back in its own units. The maps S_c are
    kept out of the scan unless asked for, because somebody at a scanner would have to estimate them as well.

    Arguments:
        image: real or complex `(B, H, W)`, the slices of one volume.
        mask: 0/1 `(H, W)` or `(B or 1, 1, H or 1, W)`; zero frequency at `(H // 2, W // 2)`.
        coils: number of receive coils C, see `coil_maps`; 1 is a single uniform coil.
        noise: standard deviation of a noise sample, √E|n|², as a fraction of the volume's largest magnitude.
        phase: strength in rad of the smooth phase φ given to a real image, see `smooth_phase`; 0 keeps it real.
            A complex image keeps its own phase.
        seed: ≥ 0, for maps, phase and noise. Neither depends on the mask.
        geometry: where the image lies, passed on.
        store_maps: put the true maps into the scan.
        mask_name: what to call the mask in the provenance.

    Returns:
        scan: k-space complex64 `(B, C, H, W)`, zero where not sampled, and `noise_std` in its units.
        target: the object x e^{iφ}, complex64 `(B, H, W)`.

    Raises:
        UnsupportedLayout, NonFinite, NoData, BadOption, InconsistentShapes: an argument is not as described.
    """
    x = _object(image, phase, seed)
    b, h, w = x.shape
    if not (math.isfinite(noise) and noise >= 0):
        raise errors.BadOption(f"found {noise}, expected a finite number ≥ 0", key="noise", help="0.01 is usual")
    sampled = mask[None, None] if mask.ndim == 2 else mask
    fits = sampled.ndim == 4 and all(
        size in allowed for size, allowed in zip(sampled.shape, ((1, b), (1,), (1, h), (w,)), strict=True)
    )
    if not fits:
        raise errors.InconsistentShapes(
            f"found {tuple(mask.shape)} for {b} image(s) of {h}×{w}",
            key="mask",
            help="make or choose a mask of that size",
        )
    sampled = sampled.to(torch.float32)

    csm = coil_maps((h, w), coils, seed=seed)[None]
    noise_std = noise * float(x.abs().max())
    generator = torch.Generator().manual_seed(int(seed))
    n = torch.randn((b, coils, h, w), dtype=torch.complex64, generator=generator)
    scan = Scan(
        kspace=sampled * (fft2(csm * x[:, None]) + noise_std * n),
        mask=sampled,
        image_shape=(h, w),
        csm=csm if store_maps else None,
        noise_std=noise_std,
        geometry=geometry or Geometry(),
        provenance=(
            f"simulated: {mask_name} {measured_acceleration(sampled):.3g}×, {coils} coil{'s' * (coils > 1)}, "
            f"noise {noise:g}, seed {seed}"
        ),
    )
    return scan, x


def _object(image: Tensor, phase: float, seed: int) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim != 3 or 0 in image.shape:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise errors.UnsupportedLayout(f"found {found}, expected a tensor (slices, rows, columns)", key="image")
    if not (math.isfinite(phase) and phase >= 0):
        raise errors.BadOption(f"found {phase}, expected a finite number ≥ 0", key="phase", help="in radians")
    check_finite(image, "image")
    if not bool(image.any()):
        raise errors.NoData("every pixel is zero", key="image")
    x = image.to(torch.complex64)
    if not image.is_complex():
        shape = (image.shape[-2], image.shape[-1])
        x = x * torch.polar(torch.ones(shape), smooth_phase(shape, seed=seed, strength=phase))
    return x


def coil_maps(shape: tuple[int, int], coils: int, *, seed: int = 0) -> Tensor:
    """Smooth receive sensitivities of wire loops around the object, by the law of Biot and Savart.

        S_c ∝ B_x - i B_y,    B = ∮ dl × r / (|r|² + ε²)^(3/2),    Σ_c |S_c|² = 1

    The loops stand on a cylinder around the field of view and face its axis; their place, size and tilt vary a
    little. The plane of the image cuts the cylinder near its middle. ε is the thickness of the wire.

    Arguments:
        shape: `(H, W)` of the grid; pixels are square.
        coils: number of loops C, ≥ 1; one is a uniform coil.
        seed: ≥ 0.

    Returns:
        maps: complex64 `(C, H, W)`.

    Raises:
        BadOption: an argument out of range.
    """
    h, w = shape
    if min(h, w) < 1:
        raise errors.BadOption(f"found {tuple(shape)}, expected at least (1, 1)", key="shape")
    if isinstance(coils, bool) or not isinstance(coils, int) or not 1 <= coils <= 256:
        raise errors.BadOption(f"found {coils}, expected a whole number from 1 to 256", key="coils")
    rng = _generator(seed, _MAPS)
    if coils == 1:
        return torch.ones((1, h, w), dtype=torch.complex64)
    loops = _loops(coils, rng)
    # The field is analytic inside the cylinder: a polynomial through 28 Chebyshev points an axis gives it everywhere,
    # and is ten times cheaper than the integral at every pixel.
    nodes = chebyshev.chebpts1(28)
    inverse = np.linalg.inv(chebyshev.chebvander(nodes, 27))
    unit = max(h, w) / 2
    y, x = ((np.arange(size) - size // 2) / unit for size in shape)
    rows, columns = (chebyshev.chebvander(axis, 27) @ inverse for axis in (y, x))
    fields = rows @ _field(loops, nodes, nodes) @ columns.T
    fields /= np.sqrt((np.abs(fields) ** 2).sum(0))
    return torch.from_numpy(fields.astype(np.complex64))


def _loops(coils: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners of the wire loops `(C, segments + 1, 3)` as (x, y, z), in units of half the field of view."""
    radius = rng.uniform(1.55, 1.75, coils)  # the corners of the image are at √2
    around = 2 * np.pi * ((np.arange(coils) + rng.uniform(-0.15, 0.15, coils)) / coils + rng.random())
    size = np.clip(1.2 * radius * np.sin(np.pi / coils), 0.3, 0.7) * rng.uniform(0.85, 1.15, coils)
    height = rng.uniform(-0.3, 0.3, coils)
    tilt = rng.uniform(-0.2, 0.2, coils)
    outward = np.stack((np.cos(around), np.sin(around), np.zeros(coils)), -1)
    tangent = np.stack((-np.sin(around), np.cos(around), np.zeros(coils)), -1)
    axial = np.stack((np.sin(tilt) * outward[:, 0], np.sin(tilt) * outward[:, 1], np.cos(tilt)), -1)
    centre = radius[:, None] * outward + np.stack((0 * height, 0 * height, height), -1)
    turn = np.linspace(0, 2 * np.pi, 33)[:, None]
    wire = np.cos(turn) * tangent[:, None] + np.sin(turn) * axial[:, None]
    return np.asarray(centre[:, None] + size[:, None, None] * wire)


def _field(loops: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.complex128]:
    """B_x - i B_y of each loop in the plane z = 0, `(C, len(y), len(x))`."""
    step = np.diff(loops, axis=1)[:, :, None, None]
    middle = ((loops[:, 1:] + loops[:, :-1]) / 2)[:, :, None, None]
    rx, ry, rz = x - middle[..., 0], y[:, None] - middle[..., 1], -middle[..., 2]
    thickness = 0.15
    weight = (rx**2 + ry**2 + rz**2 + thickness**2) ** -1.5
    bx = ((step[..., 1] * rz - step[..., 2] * ry) * weight).sum(1)
    by = ((step[..., 2] * rx - step[..., 0] * rz) * weight).sum(1)
    return np.asarray(bx - 1j * by)


def smooth_phase(shape: tuple[int, int], *, seed: int = 0, strength: float = 0.5) -> Tensor:
    """A background phase as field inhomogeneity and an off-centre echo leave it: a smooth field and a ramp.

    The field is a random sum of the lowest cosines; the ramp turns by up to 2 · strength rad from edge to edge.

    Arguments:
        shape: `(H, W)`.
        seed: ≥ 0.
        strength: standard deviation of the field over the grid, rad, ≥ 0; 0.3 to 1.7 was measured on raw scans.

    Returns:
        phase: real `(H, W)`, rad.
    """
    rng = _generator(seed, _PHASE)
    cosines = [np.cos(np.pi * np.arange(4)[:, None] * (np.arange(size) + 0.5) / size) for size in shape]
    orders = np.add.outer(np.arange(4), np.arange(4))
    weights = rng.standard_normal((4, 4)) / (1 + orders) ** 2
    weights[0, 0] = 0
    field = cosines[0].T @ weights @ cosines[1]
    spread = field.std()
    field = strength * field / spread if spread > 0 else field
    ramp = strength * rng.uniform(-2, 2, 2)
    y, x = (np.arange(size) / size - 0.5 for size in shape)
    return torch.from_numpy((field + ramp[0] * y[:, None] + ramp[1] * x).astype(np.float32))


# Ellipses of the head phantom: intensity added, half axes, centre (right, up) and turn in degrees, in half heights.
_ELLIPSES = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),  # scalp
    (-0.75, 0.66, 0.87, 0.0, -0.02, 0.0),  # inside the skull
    (0.35, 0.60, 0.80, 0.0, -0.02, 0.0),  # brain
    (-0.35, 0.11, 0.31, 0.22, 0.0, -18.0),  # ventricles
    (-0.35, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.2, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.2, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.3, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.3, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.3, 0.023, 0.023, 0.0, -0.605, 0.0),
    (0.3, 0.023, 0.046, 0.06, -0.605, 0.0),
)


def phantom(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    """A head made of ellipses, after Shepp and Logan, with soft tissue bright enough to be seen.

    Each pixel is the mean of 4×4 points in it. The phantom keeps its proportions and fits into the grid.

    Arguments:
        shape: `(H, W)`.
        seed: 0 is the plain head; others vary place, size, turn and intensity of everything inside it.

    Returns:
        image: float32 `(H, W)`, between 0 and 1.

    Source: L. Shepp, B. Logan, "The Fourier reconstruction of a head section", 1974.
    """
    h, w = shape
    if min(h, w) < 1:
        raise errors.BadOption(f"found {tuple(shape)}, expected at least (1, 1)", key="shape")
    rng = _generator(seed, _PHANTOM)
    fine = 4
    unit = min(h / 2, w / 2 / 0.75)
    y, x = (((np.arange(size * fine) + 0.5) / fine - 0.5 - size // 2) / unit for size in shape)
    image = np.zeros((h * fine, w * fine))
    for index, (value, a, b, right, up, turn) in enumerate(_ELLIPSES):
        if seed and index > 2:
            value, a, b = np.array([value, a, b]) * rng.uniform(0.75, 1.25, 3)
            right, up, turn = np.array([right, up, turn]) + rng.uniform(-1, 1, 3) * (0.04, 0.04, 10)
        cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        u, v = x - right, -y[:, None] - up
        image[((u * cosine + v * sine) / a) ** 2 + ((v * cosine - u * sine) / b) ** 2 <= 1] += value
    image = image.clip(0, 1).reshape(h, fine, w, fine).mean((1, 3))
    return torch.from_numpy(image.astype(np.float32))


def sample() -> tuple[Scan, Tensor]:
    """The scan that ships with tunemri: one brain slice, eight coils, 4× Poisson disk, simulated from a template.

    Returns:
        scan: complex64 `(1, 8, 208, 176)`, without coil maps.
        target: its ground truth, real `(1, 208, 176)`.

    Raises:
        UnreadableFile: the installation is damaged.

    Source: the ICBM 152 T1 template; its notice lies beside the file. V. Fonov et al., "Unbiased average
    age-appropriate atlases for pediatric studies", 2011.
    """
    with resources.as_file(resources.files("tunemri") / "sample" / "brain.h5") as path:
        return formats.read(path), formats.read_image(path, prefer="reference").data


def _generator(seed: int, purpose: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise errors.BadOption(f"found {seed!r}, expected a whole number ≥ 0", key="seed")
    return np.random.default_rng((seed, purpose))
