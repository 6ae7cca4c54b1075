"""The two records that travel: a Scan (what was measured) and a Reconstruction (what came of it)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import errors
from .fourier import ifft2
from .nufft import calibration_block

__all__ = [
    "Geometry",
    "Reconstruction",
    "Scan",
    "check_finite",
    "joined",
    "measured_acceleration",
    "normalise",
    "select",
    "without_image",
]

_COMPLEX = (torch.complex64, torch.complex128)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the image lies in the patient.

    Arguments:
        voxel_size: `(row, column, slice)` spacing in mm, or None when the header does not say.
        affine: 4×4 array index `(row, column, slice)` → patient RAS in mm, nested tuples, or None: unknown. Without a step
            from slice to slice (third column zero) all images lie in one place: echoes of one slice.
    """

    voxel_size: tuple[float, float, float] | None = None
    affine: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What was measured, in the units of the file, and what is known about it.

    Arguments:
        kspace: complex `(B, C, H, W)`, zero where not sampled, or `(B, C, M)` with `trajectory`;
            B slices, C coils (single-coil is C = 1); centred, orthonormal convention of `fourier`.
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled; None only for non-Cartesian data.
        trajectory: `(B or 1, M, 2)` (row, column) in cycles per field of view, in [-N/2, N/2]; other units are refused
            where they can be told.
        image_shape: `(H, W)` of the image to reconstruct, in pixels.
        csm: coil sensitivity maps, complex `(B or 1, C, H, W)`; None means unknown.
        noise_std: standard deviation of the complex noise per sample (√E|n|²), in k-space units; None means unknown.
        scale: `(B,)` factor that `normalise` divided the k-space by; ones for a scan as read.
        geometry: voxel size and affine, see `Geometry`.
        provenance: "acquired", or "simulated: how".

    Raises:
        InconsistentShapes, UnsupportedLayout, NonFinite, NoData: the fields do not make one scan.
    """

    kspace: Tensor
    mask: Tensor | None = None
    trajectory: Tensor | None = None
    image_shape: tuple[int, int]
    csm: Tensor | None = None
    noise_std: float | None = None
    scale: Tensor | None = None
    geometry: Geometry = field(default_factory=Geometry)
    provenance: str = "acquired"

    def __post_init__(self) -> None:
        k = self.kspace
        if not isinstance(k, Tensor) or k.dtype not in _COMPLEX:
            found = k.dtype if isinstance(k, Tensor) else type(k).__name__
            raise errors.UnsupportedLayout(
                f"found {found}, expected a complex64 or complex128 tensor", key="kspace",
                help="join real and imaginary parts with torch.complex; half precision loses the dynamic range of k-space",
            )  # fmt: skip
        for name in ("mask", "trajectory", "csm", "scale"):
            if not isinstance(value := getattr(self, name), Tensor | None):
                raise errors.UnsupportedLayout(
                    f"found {type(value).__name__}, expected a tensor",
                    key=name,
                    help="torch.from_numpy makes one of an array",
                )
        cartesian = self.trajectory is None
        if k.ndim != (4 if cartesian else 3):
            layout = "(slices, coils, rows, columns)" if cartesian else "(slices, coils, samples) with a trajectory"
            raise errors.UnsupportedLayout(f"found shape {tuple(k.shape)}, expected {layout}", key="kspace")
        if 0 in k.shape:
            raise errors.NoData(f"shape {tuple(k.shape)} holds no sample", key="kspace")
        h, w = self.image_shape
        if h < 1 or w < 1:
            raise errors.InconsistentShapes(f"found {(h, w)}, expected positive sizes", key="image_shape")
        check_finite(k, "kspace")
        if cartesian:
            self._check_cartesian()
        else:
            self._check_trajectory()
        if self.csm is not None:
            self._check_maps(self.csm)
        if self.scale is None:
            object.__setattr__(self, "scale", torch.ones(k.shape[0], dtype=k.real.dtype, device=k.device))
        elif self.scale.shape != (k.shape[0],):
            raise errors.InconsistentShapes(
                f"found shape {tuple(self.scale.shape)}, expected ({k.shape[0]},): one per slice", key="scale"
            )
        if self.noise_std is not None and not 0 <= self.noise_std < float("inf"):
            raise errors.BadOption(f"found {self.noise_std}, expected a finite number ≥ 0", key="noise_std")

    def _check_cartesian(self) -> None:
        b, _, h, w = self.kspace.shape
        if self.image_shape != (h, w):
            raise errors.InconsistentShapes(
                f"image_shape {self.image_shape} against k-space of {h}×{w}; a Cartesian image has the size of its grid",
                key="image_shape", help="crop the reconstructed image instead",
            )  # fmt: skip
        m = self.mask
        if m is None:
            raise errors.MissingKey(
                "a Cartesian scan needs its sampling mask", key="mask", help="ones for full sampling"
            )
        if (
            m.is_complex()
            or m.ndim != 4
            or m.shape[0] not in (1, b)
            or m.shape[1] != 1
            or m.shape[2] not in (1, h)
            or m.shape[3] != w
        ):
            raise errors.InconsistentShapes(
                f"found {tuple(m.shape)} {m.dtype}, expected real ({b} or 1, 1, {h} or 1, {w}) to match k-space {tuple(self.kspace.shape)}",
                key="mask",
            )  # fmt: skip
        if not bool(((m == 0) | (m == 1)).all()):
            raise errors.UnsupportedLayout(
                "values other than 0 and 1", key="mask", help="threshold it: 1 means sampled"
            )
        if not bool(m.flatten(1).any(1).all()):
            raise errors.NoData("selects no sample in at least one slice", key="mask")
        # What the mask does not select was not measured, whatever the array holds there (full k-space and a mask, say).
        if bool(((m == 0) & (self.kspace != 0)).any()):
            object.__setattr__(self, "kspace", self.kspace * m)

    def _check_trajectory(self) -> None:
        t = self.trajectory
        assert t is not None
        b, _, samples = self.kspace.shape
        if t.ndim != 3 or t.shape[0] not in (1, b) or t.shape[1:] != (samples, 2):
            raise errors.InconsistentShapes(
                f"found {tuple(t.shape)}, expected ({b} or 1, {samples}, 2) to match k-space {tuple(self.kspace.shape)}",
                key="trajectory",
            )
        check_finite(t, "trajectory")
        _check_units(t, self.image_shape)

    def _check_maps(self, csm: Tensor) -> None:
        b, c = self.kspace.shape[:2]
        h, w = self.image_shape
        # No broadcasting over the coil axis: one coil against four maps would give a wrong image, silently.
        if not csm.is_complex() or csm.ndim != 4 or csm.shape[0] not in (1, b) or csm.shape[1:] != (c, h, w):
            raise errors.InconsistentShapes(
                f"found {tuple(csm.shape)} {csm.dtype}, expected complex ({b} or 1, {c}, {h}, {w})", key="csm"
            )
        check_finite(csm, "csm")
        if not bool(csm.abs().flatten(1).any(1).all()):
            raise errors.NoData("all maps of at least one slice are zero", key="csm")

    def __len__(self) -> int:
        return self.kspace.shape[0]

    @property
    def coils(self) -> int:
        """Number of receive coils C."""
        return self.kspace.shape[1]

    @property
    def acceleration(self) -> float:
        """Measured acceleration: grid points per sampled point, mean over slices; never the nominal one.

        Off the grid, points are the cells of the grid in which a sample lies: oversampling does not count.
        """
        if self.mask is not None:
            return measured_acceleration(self.mask)
        assert self.trajectory is not None
        cells = [len(torch.unique(k.round().remainder(k.new_tensor(self.image_shape)), dim=0)) for k in self.trajectory]
        return self.image_shape[0] * self.image_shape[1] * len(cells) / sum(cells)

    def to(self, device: torch.device | str) -> Scan:
        """The same scan with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name in ("kspace", "mask", "trajectory", "csm", "scale")
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An image, and what is known about it.

    Arguments:
        image: complex `(B, H, W)`, in the units of the k-space that it was made from.
        csm: the maps used, `(B or 1, C, H, W)`, or None.
        variance: pixelwise posterior variance `(B, H, W)`, or None where a method has none.
        samples: a few draws from the posterior, complex `(B, S, H, W)`, or None where a method has none. They spread as
            `variance` says.
        status: "converged", or a sentence that says why not.
        stats: numbers worth reporting (iterations, objective, …), JSON-ready.
        dials: the settings used, name → number; those that are the same for all slices.
        residual: `(B,)` data-consistency residual ‖A x̂ - y‖ / ‖y‖ over the measured samples.
        provenance: of the scan that it was made from.
    """

    image: Tensor
    csm: Tensor | None = None
    variance: Tensor | None = None
    samples: Tensor | None = None
    status: str = "converged"
    stats: Mapping[str, Any] = field(default_factory=dict)
    dials: Mapping[str, Any] = field(default_factory=dict)
    residual: Tensor | None = None
    provenance: str = "unknown"

    @property
    def magnitude(self) -> Tensor:
        """|image|, real `(B, H, W)`."""
        return self.image.abs()


def without_image(piece: Reconstruction) -> Reconstruction:
    """What is known of a reconstruction, without what is large: zero slices of its size."""
    none = piece.image.new_empty((0, *piece.image.shape[1:]))  # no view, which would hold the memory of the whole
    return replace(piece, image=none, csm=None, variance=None, samples=None)


def joined(pieces: Sequence[Reconstruction]) -> Reconstruction:
    """Reconstructions of the slices of one scan as one.

    Lists in `stats` have one entry per slice; of the rest, the first piece's stands for all. Maps that differ from
    slice to slice are joined too, one set for all stays one. A dial that differs, as a method may suggest it slice by
    slice, is left out: no one number would make these images again.
    """
    if len(pieces) == 1:
        return pieces[0]
    first = next((piece for piece in pieces if piece.dials), pieces[0])

    def together(name: str) -> Tensor | None:
        parts = [part for piece in pieces if (part := getattr(piece, name)) is not None]
        return torch.cat(parts) if len(parts) == len(pieces) else None

    csm, count = together("csm"), sum(len(piece.image) for piece in pieces)
    return replace(
        first,
        image=torch.cat([piece.image for piece in pieces]),
        csm=csm if csm is not None and len(csm) == count else first.csm,
        variance=together("variance"),
        samples=together("samples"),
        status=next((piece.status for piece in pieces if piece.status != "converged"), "converged"),
        stats={
            name: [entry for piece in pieces for entry in piece.stats.get(name, ())]
            if isinstance(value, list)
            else value
            for name, value in first.stats.items()
        },
        dials={
            name: value
            for name, value in first.dials.items()
            if all(piece.dials.get(name) == value for piece in pieces if piece.dials)
        },
        residual=together("residual"),
    )


def check_finite(x: Tensor, key: str, file: str | None = None) -> None:
    """Raise `NonFinite` with count and first position unless every entry of `x` is a number."""
    finite = torch.isfinite(torch.view_as_real(x) if x.is_complex() else x)
    if bool(finite.all()):
        return
    bad = ~(finite.all(-1) if x.is_complex() else finite)
    first = tuple(int(i) for i in bad.nonzero()[0])
    raise errors.NonFinite(
        f"{int(bad.sum())} of {bad.numel()} values are NaN or Inf, first at {first}", file=file, key=key,
        help="repair or drop that slice; one such sample spoils the whole image",
    )  # fmt: skip


def _check_units(trajectory: Tensor, shape: tuple[int, int]) -> None:
    """Refuse a trajectory that is not in cycles per field of view, as far as its extent tells."""
    extent = [float(v) for v in trajectory.abs().amax((0, 1))]
    found = f"|k| up to {extent[0]:.4g} (rows) and {extent[1]:.4g} (columns)"
    limits = [n / 2 + 0.5 for n in shape]  # a sample on the rim, or a delay of half a sample, is no other unit
    expected = f"expected up to {shape[0] / 2:g} and {shape[1] / 2:g}: cycles per field of view"
    if any(e > limit for e, limit in zip(extent, limits, strict=True)):
        swapped = extent[0] <= limits[1] and extent[1] <= limits[0]
        raise errors.InconsistentShapes(
            f"{found}, {expected}", key="trajectory",
            help="rows and columns seem to be swapped" if swapped
            else "is image_shape too small for the resolution measured, or the unit 1/m?",
        )  # fmt: skip
    largest = max(extent)
    if min(shape) < 32 or largest > math.pi + 0.01:
        return
    unit, factor = (
        ("radians", "N / (2π)") if largest > 3 else ("[-0.5, 0.5]", "N") if largest <= 0.5 else ("[-1, 1]", "N / 2")
    )
    if largest > 3 or largest <= 1:
        raise errors.UnsupportedLayout(
            f"{found}, {expected}", key="trajectory", help=f"it seems to be in {unit}: multiply each axis by {factor}"
        )


def measured_acceleration(mask: Tensor) -> float:
    """Grid points per sampled point of a mask `(…, H or 1, W)`: the mean of a 0/1 mask, inverted."""
    return float(1 / mask.double().mean())


def select(scan: Scan, slices: slice) -> Scan:
    """The given slices of a scan, with everything that belongs to them.

    Raises:
        BadOption: the selection is empty.
    """
    b = len(scan)
    if len(range(b)[slices]) == 0:
        raise errors.BadOption(f"{slices.start}:{slices.stop} selects none of {b} slices", key="slice")

    def cut(x: Tensor | None) -> Tensor | None:
        return x[slices] if x is not None and x.shape[0] == b else x

    return replace(
        scan, kspace=scan.kspace[slices], mask=cut(scan.mask), trajectory=cut(scan.trajectory),
        csm=cut(scan.csm), scale=cut(scan.scale),
    )  # fmt: skip


def normalise(scan: Scan) -> Scan:
    """Divide each slice by its own scale, so that a dial means the same on every scan.

    The scale is the 99th percentile of a low-resolution magnitude image made from the central 24×24
    (or fewer) k-space points, divided by the fraction of that centre that was sampled. It therefore
    depends neither on the acceleration nor on the mask family, and scaling the data by c scales it by c.
    Computed per slice: a slice of a volume gives the image that it would give alone. A slice without
    signal keeps the scale 1. Of a trajectory the centre is brought onto the grid first.
    """
    # Slice by slice: the double-precision copies of a whole volume would be several times its size.
    found = [_scale(select(scan, slice(b, b + 1))) for b in range(len(scan))]
    scaled = torch.empty(scan.kspace.shape, dtype=torch.complex64, device=scan.kspace.device)
    for b, s in enumerate(found):
        scaled[b] = scan.kspace[b].to(torch.complex128) / s
    scale = torch.cat(found)
    noise = None if scan.noise_std is None else scan.noise_std / float(scale.mean())
    assert scan.scale is not None
    return replace(scan, kspace=scaled, noise_std=noise, scale=scan.scale.double() * scale)


def _scale(scan: Scan) -> Tensor:
    """The scale of a scan of one slice, `(1,)`, see `normalise`."""
    y, (h, w) = scan.kspace, scan.image_shape
    # Work on a copy brought near 1 first: data near the float32 limits must not overflow here.
    peak = y.abs().amax().double()
    if peak == 0:
        return torch.ones(1, dtype=torch.float64, device=y.device)
    y64 = y.to(torch.complex128) / peak
    if scan.trajectory is None:
        assert scan.mask is not None
        grid, mask = y64, scan.mask
    else:
        grid, mask = calibration_block(y64, scan.trajectory, scan.image_shape)
    rows, cols = (
        torch.hann_window(min(24, n) + 2, periodic=False, dtype=torch.float64, device=y.device)[1:-1] for n in (h, w)
    )
    top, left = h // 2 - len(rows) // 2, w // 2 - len(cols) // 2
    centre = (..., slice(top, top + len(rows)), slice(left, left + len(cols)))
    window = rows[:, None] * cols
    low = torch.zeros_like(grid)
    low[centre] = grid[centre] * window
    image = ifft2(low).abs().square().sum(1).sqrt()
    sampled = mask.double().expand(-1, -1, h, w)[centre].mul(window).sum((1, 2, 3)) / window.sum()
    scale = torch.quantile(image.flatten(1), 0.99, dim=1) / sampled.clamp(min=1e-3)
    # Nothing in the centre: fall back on the energy of all samples.
    energy = y64.abs().square().flatten(1).sum(1).div(h * w).sqrt()
    return torch.where(scale > 1e-6 * energy, scale, energy) * peak
