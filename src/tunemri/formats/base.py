"""What the formats share: the Image record, the shape of a format module, and the one way from arrays to a Scan.

A format module offers the three functions of `Format`, works on arrays as its file stores them, and leaves every
question of layout, sampling and plausibility to `make_scan` and `make_image`, so that a file is judged alike
whatever it was saved as.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from xml.parsers import expat

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..fourier import fft2
from ..scan import Geometry, Scan, check_finite, measured_acceleration

__all__ = [
    "CSM_KEYS",
    "IMAGE_KEYS",
    "KSPACE_KEYS",
    "REFERENCE_KEYS",
    "HEADER_LIMIT",
    "TRAJECTORY_KEYS",
    "UNIT",
    "Encoding",
    "Format",
    "Image",
    "as_complex64",
    "check_layout",
    "complex_values",
    "first_key",
    "header_number",
    "header_sizes",
    "header_voxel_size",
    "image_only",
    "make_image",
    "make_non_cartesian_scan",
    "make_scan",
    "mask_tensor",
    "parse_header",
    "row_range",
    "shifted",
    "single_key",
    "warn_of_kspace",
]

KSPACE_KEYS = ("kspace", "ksp", "k_space", "kdata", "k", "y")
CSM_KEYS = ("csm", "smaps", "maps", "sens_maps", "sensitivity", "sensitivities", "coil_maps", "mps")
IMAGE_KEYS = (
    "reconstruction", "reconstruction_rss", "reconstruction_esc", "image", "target", "reference", "img", "data", "x",
)  # fmt: skip
TRAJECTORY_KEYS = ("trajectory", "traj", "coord", "coords")
REFERENCE_KEYS = ("target", "reconstruction_esc", "reconstruction_rss", "reference", *IMAGE_KEYS)


@dataclass(frozen=True, kw_only=True)
class Image:
    """Slices of an image as a file holds them, in the units of the file.

    Arguments:
        data: float32 or complex64 `(B, H, W)`.
        geometry: voxel size and affine, see `Geometry`.
        provenance: where it came from, one phrase.

    Raises:
        UnsupportedLayout, NoData (no pixel, or all zero), NonFinite.
    """

    data: Tensor
    geometry: Geometry = field(default_factory=Geometry)
    provenance: str = "unknown"

    def __post_init__(self) -> None:
        x = self.data
        if x.dtype not in (torch.float32, torch.complex64) or x.ndim != 3:
            raise errors.UnsupportedLayout(
                f"found {tuple(x.shape)} {x.dtype}, expected float32 or complex64 (slices, rows, columns)", key="image"
            )
        if x.numel() == 0:
            raise errors.NoData(f"shape {tuple(x.shape)} holds no pixel", key="image")
        check_finite(x, "image")
        if not bool(x.any()):
            raise errors.NoData("every pixel is zero", key="image")


class Format(Protocol):
    """One file format: what a module of this folder offers."""

    def read_scan(self, path: Path, slices: slice | None) -> Scan:
        """The scan in the file; `UnsupportedLayout` if the format holds images only."""

    def read_image(self, path: Path, slices: slice | None, prefer: str) -> Image:
        """The image in the file; `prefer` is "image" (what came of it) or "reference" (what is true)."""

    def read_array(self, path: Path, keys: Sequence[str]) -> np.ndarray:
        """The array called by one of the keys, or the only one there is, as stored."""

    def list_arrays(self, path: Path) -> list[dict[str, Any]]:
        """Name, shape and dtype of every array, without reading values."""


def image_only(path: Path, what: str) -> errors.UnsupportedLayout:
    """The refusal for a file without k-space, with the way out."""
    return errors.UnsupportedLayout(
        f"holds {what}, not k-space", file=path, help="to experiment on it: tunemri simulate FILE -o SCAN.h5"
    )


def first_key(wanted: Iterable[str], present: Iterable[str]) -> str | None:
    """The first wanted name that is present."""
    there = set(present)
    return next((key for key in wanted if key in there), None)


def single_key(wanted: Sequence[str], present: Sequence[str], path: Path, what: str) -> str:
    """The first wanted name that is present, or the only name there is.

    Raises:
        MissingKey: neither.
    """
    key = first_key(wanted, present) or (present[0] if len(present) == 1 else None)
    if key is None:
        raise errors.MissingKey(
            f"no array is called {', '.join(wanted[:3])} or the like", file=path, key=what,
            help=errors.did_you_mean(wanted[0], present),
        )  # fmt: skip
    return key


def row_range(slices: slice | None, length: int) -> slice:
    """The selection as plain `start:stop` within `length` slices.

    Raises:
        BadOption: it is empty, or has a step.
    """
    if slices is None:
        return slice(0, length)
    if slices.step not in (None, 1):
        raise errors.BadOption(f"found a step of {slices.step}, expected START:STOP", key="slice")
    start, stop, _ = slices.indices(length)
    if stop <= start:
        raise errors.BadOption(f"{slices.start}:{slices.stop} selects none of {length} slices", key="slice")
    return slice(start, stop)


def shifted(geometry: Geometry, start: int) -> Geometry:
    """The geometry of the slices from `start` on: the affine's origin moves along."""
    if geometry.affine is None or start == 0:
        return geometry
    affine = tuple((*row[:3], row[3] + start * row[2]) for row in geometry.affine[:3])
    return replace(geometry, affine=(*affine, geometry.affine[3]))


# ---------------------------------------------------------------- arrays → complex numbers

_PAIRS = (("r", "i"), ("real", "imag"), ("re", "im"))


def complex_values(array: np.ndarray, file: Path, key: str) -> np.ndarray:
    """Complex values in native byte order, from complex numbers, (real, imaginary) records or a trailing pair.

    Raises:
        UnsupportedLayout: anything else, real values above all.
    """
    kind, names = array.dtype.kind, array.dtype.names or ()
    if kind == "V" and (pair := next((p for p in _PAIRS if set(p) == set(names)), None)):
        real, imag = array[pair[0]], array[pair[1]]
        if real.dtype.kind in "iuf" and imag.dtype.kind in "iuf":
            return as_complex64(_join(real, imag))
    if kind == "c":
        return as_complex64(array)
    if kind in "iuf" and array.ndim >= 3 and array.shape[-1] == 2:
        return as_complex64(_join(array[..., 0], array[..., 1]))
    raise errors.UnsupportedLayout(
        f"found {array.dtype} of shape {array.shape}, expected complex values", file=file, key=key,
        help="store k-space as complex64" + ("; real values look like an image" if kind in "iuf" else ""),
    )  # fmt: skip


def _join(real: np.ndarray, imag: np.ndarray) -> np.ndarray:
    joined = np.empty(real.shape, dtype=np.complex64 if real.dtype.itemsize <= 4 else np.complex128)
    joined.real, joined.imag = real, imag
    return joined


def as_complex64(array: np.ndarray) -> np.ndarray:
    """The array as complex64, or as complex128 where single precision would overflow or lose it."""
    if array.dtype.itemsize > 8:
        with np.errstate(all="ignore"):
            parts = [np.abs(part).max(initial=0) for part in (array.real, array.imag)]
        if not all(part == 0 or 1e-30 < part < 1e37 for part in parts) and np.isfinite(parts).all():
            return array.astype(np.complex128, copy=False)
    return array.astype(np.complex64, copy=False)


# ---------------------------------------------------------------- arrays → Scan


def make_scan(
    kspace: np.ndarray,
    *,
    file: Path,
    third_axis: str,
    mask: np.ndarray | None = None,
    csm: np.ndarray | None = None,
    slices: slice | None = None,
    total: int | None = None,
    noise_std: float | None = None,
    geometry: Geometry | None = None,
    provenance: str = "acquired",
) -> Scan:
    """A Scan from arrays as files store them, with everything that can be checked checked.

    Arguments:
        kspace: complex or pair values (see `complex_values`), `(H, W)`, `(third, H, W)` or `(B, C, H, W)`.
        third_axis: "slices" or "coils": what the first of three axes counts.
        mask: `(W,)`, `(H, W)`, `(H, 1)`, `(B, H or 1, W)` or `(B or 1, 1, H or 1, W)`; None infers it from the
            exact zeros that all coils share.
        csm: `(C, H, W)` or `(B or 1, C, H, W)`.
        slices: the slices wanted; `total`: the number in the file, given when `kspace` is already cut to them.

    Raises:
        UnsupportedLayout, InconsistentShapes, NonFinite, NoData, BadOption.
    """
    check_layout(kspace.shape, file, "kspace", pair=kspace.dtype.kind in "iuf")
    y = complex_values(kspace, file, "kspace")
    y = y[None, None] if y.ndim == 2 else y if y.ndim == 4 else y[:, None] if third_axis == "slices" else y[None]
    b = len(y) if total is None else total
    rows = row_range(slices, b)
    k = torch.from_numpy(np.ascontiguousarray(y if total is not None else y[rows]))
    power = torch.stack([one.abs().double().square().sum(0) for one in k])
    if not bool(power.isfinite().all()):
        check_finite(k, "kspace", str(file))
    if len(k) == b:  # some slices of a volume may hold no signal
        _check_measured(power, file)
    if mask is None:
        m = _infer_mask(power, file)
    else:
        m = mask_tensor(mask, (b, *k.shape[-2:]), file)
        m = m[rows] if m.shape[0] == b else m
        k = _apply_mask(k, m, power, file)
    _warn_implausible(k, power, file)
    return Scan(
        kspace=k, mask=m, image_shape=(k.shape[-2], k.shape[-1]), csm=_maps(csm, b, rows, k.dtype, file),
        noise_std=noise_std, geometry=shifted(geometry or Geometry(), rows.start), provenance=provenance,
    )  # fmt: skip


def _check_measured(power: Tensor, file: Path) -> None:
    if not bool(power.any()):
        raise errors.NoData("every sample is zero", file=file, key="kspace")


def _maps(csm: np.ndarray | None, total: int, rows: slice, dtype: torch.dtype, file: Path) -> Tensor | None:
    """Coil maps as files store them → complex `(B or 1, C, H, W)` of the wanted slices."""
    if csm is None:
        return None
    maps = torch.from_numpy(np.ascontiguousarray(complex_values(csm, file, "csm")))
    maps = maps[None] if maps.ndim == 3 else maps
    return (maps[rows] if maps.shape[0] == total else maps).to(dtype)


def check_layout(shape: tuple[int, ...], file: Path, key: str, *, pair: bool = False) -> None:
    """Refuse shapes that are no k-space; `pair`: the last axis may hold real and imaginary parts."""
    s = shape[:-1] if pair and len(shape) >= 3 and shape[-1] == 2 else shape
    if not 2 <= len(s) <= 4:
        raise errors.UnsupportedLayout(
            f"found {len(s)} axes, shape {shape}; expected (slices, coils, rows, columns)", file=file, key=key
        )
    if 0 in s:
        raise errors.NoData(f"shape {shape} holds no sample", file=file, key=key)
    # More coils than receivers have, over an image a few columns wide: the axes are in another order.
    if len(s) >= 3 and s[-3] >= 32 and 2 * s[-1] <= s[-3] and 2 * s[-1] <= s[-2]:
        raise errors.UnsupportedLayout(
            f"shape {shape} would be {s[-3]} coils of {s[-2]}×{s[-1]}: the coils seem to come last", file=file, key=key,
            help="expected (slices, coils, rows, columns); numpy.moveaxis(kspace, -1, -3) puts them there",
        )  # fmt: skip


def mask_tensor(mask: np.ndarray, shape: tuple[int, int, int], file: Path) -> Tensor:
    """A mask as files store it → float32 `(B or 1, 1, H or 1, W)` for k-space of `shape` `(B, H, W)`."""
    b, h, w = shape
    if mask.dtype.kind not in "biuf":
        raise errors.UnsupportedLayout(f"found {mask.dtype}, expected 0 and 1", file=file, key="mask")
    m = torch.from_numpy(np.ascontiguousarray(mask.astype(np.float32)))
    check_finite(m, "mask", str(file))
    s = tuple(m.shape)
    while len(s) > 1 and s[-1] == 1 != w and s != (h, 1):  # fastMRI keeps an axis for (real, imaginary) behind it
        s = s[:-1]
    if s == (h, 1):
        return m.reshape(1, 1, h, 1).repeat(1, 1, 1, w)
    if s in ((w,), (1, w)):
        return m.reshape(1, 1, 1, w)
    if s == (h, w):
        return m.reshape(1, 1, h, w)
    if len(s) == 3 and s[0] in (1, b) and s[1] in (1, h) and s[2] == w:
        return m.reshape(s[0], 1, s[1], w)
    if len(s) == 4 and s[0] in (1, b) and s[1] == 1 and s[2] in (1, h) and s[3] == w:
        return m.reshape(s)
    hint = "phase encoding along rows is stored as (rows, 1)" if s == (h,) else None
    raise errors.InconsistentShapes(
        f"found {tuple(mask.shape)}, expected ({w},), ({h}, {w}) or ({b}, {h}, {w}) to match k-space",
        file=file, key="mask", help=hint,
    )  # fmt: skip


def _infer_mask(power: Tensor, file: Path) -> Tensor:
    """The mask that the zeros common to all coils tell of, `(B or 1, 1, H or 1, W)`; `power`: energy `(B, H, W)`."""
    sampled = power > 0
    # A slice without signal was sampled like the others; a stray zero is a measurement.
    sampled = torch.where(sampled.flatten(1).any(1)[:, None, None], sampled, sampled.any(0))
    if float(sampled.double().mean()) > 0.995 or not bool(sampled.any()):
        return torch.ones(1, 1, 1, power.shape[-1])
    if bool((sampled == sampled[:1]).all()):
        sampled = sampled[:1]
    if bool((sampled == sampled[:, :1]).all()):
        sampled = sampled[:, :1]
    mask = sampled[:, None].float()
    errors.warn(f"{file}: no mask; its zeros say {measured_acceleration(mask):.3g}-fold undersampled")
    return mask


def _apply_mask(kspace: Tensor, mask: Tensor, power: Tensor, file: Path) -> Tensor:
    """The k-space with zeros where the mask says so, and a word where the two disagree."""
    m = mask[:, 0].double()
    outside = float((power * (m == 0)).sum() / power.sum())
    if outside == 1:
        raise errors.NoData(
            "selects no sample that was measured", file=file, key="mask", help="is it inverted? 1 means sampled"
        )
    if outside > 0.01:
        errors.warn(
            f"{file}: mask: {outside:.1%} of the energy lies where it says 'not sampled': left out; is it inverted?",
            "inconsistent_shapes",
        )
    active = power.flatten(1).any(1)
    sampled = (m != 0).expand(power.shape)[active]
    empty = float((sampled & (power[active] == 0)).double().sum() / sampled.double().sum().clamp(min=1))
    if empty > 0.01:
        errors.warn(
            f"{file}: mask: {empty:.1%} of the points that it calls sampled are zero: was it made for another scan?"
        )
    return kspace * mask if outside > 0 else kspace


_LEAST_SIDE = 32  # of an array whose distribution of energy means anything


def _warn_implausible(kspace: Tensor, power: Tensor, file: Path) -> None:
    """Say what the energy of k-space tells: spokes, an image, only noise, or zero frequency in the corner.

    The most certain of these is said, and no other. `power`: energy of all coils `(B, H, W)`.
    """
    if not bool(power.any()):
        return
    h, w = power.shape[-2:]
    for lines, axis in ((power.sum(0), "row"), (power.sum(0).T, "column")):
        if _are_spokes(lines):
            errors.warn(
                f"{file}: kspace: every {axis} has its peak in the middle and holds as much as the others: read as lines on a "
                "grid, but are they spokes of a radial scan, without their trajectory?",
                "unsupported_layout",
            )
            return
    large = min(h, w) >= _LEAST_SIDE
    if large and _share_in_middle(power) < 0.5:
        some = kspace[int(power.sum((1, 2)).argmax())]
        if _share_in_middle(fft2(some).abs().square()) > 0.5:
            errors.warn(
                f"{file}: kspace: looks like an image, its transform looks like k-space; "
                "if it is one: tunemri simulate FILE -o SCAN.h5",
                "unsupported_layout",
            )
            return
    if large and _is_flat(power):
        errors.warn(f"{file}: kspace: hardly more energy in one place than elsewhere: is it only noise?", "no_data")
        return
    row, column = divmod(int(power.sum(0).argmax()), w)
    if (h >= 8 and abs(row - h // 2) > h / 4) or (w >= 8 and abs(column - w // 2) > w / 4):
        errors.warn(
            f"{file}: kspace: the strongest sample lies at ({row}, {column}), zero frequency belongs at "
            f"({h // 2}, {w // 2}); numpy.fft.fftshift moves it from the corner to the centre",
            "unsupported_layout",
        )


def _is_flat(power: Tensor) -> bool:
    """Whether no block of an eighth of the sides holds three times its share."""
    sides = [n // 8 for n in power.shape[-2:]]
    p, n = power.sum(0), (power > 0).double().sum(0)

    def sums(x: Tensor) -> Tensor:
        counts = torch.nn.functional.pad(x.cumsum(0).cumsum(1), (1, 0, 1, 0))
        down = counts[sides[0] :] - counts[: -sides[0]]
        return down[:, sides[1] :] - down[:, : -sides[1]]

    # A few samples more than there are: of one or two alone, noise may well hold three times the mean.
    return bool((sums(p) <= 3 * float(p.sum() / n.sum()) * (sums(n) + 4)).all())


def _share_in_middle(power: Tensor) -> float:
    """The share of the energy `(…, H, W)` that lies in the middle eighth of both axes."""
    h, w = power.shape[-2:]
    middle = power[..., h // 2 - h // 16 : h // 2 + h // 16 + 1, w // 2 - w // 16 : w // 2 + w // 16 + 1]
    return float(middle.double().sum() / power.double().sum())


def _are_spokes(power: Tensor) -> bool:
    """Whether all rows of `(H, W)` peak in the middle and have much the same energy: each goes through zero frequency."""
    h, w = power.shape
    energy = power.sum(1)
    if h < 8 or w < _LEAST_SIDE or not bool((energy > 0).all()):
        return False
    off = (power.argmax(1) - w // 2).abs() > w / 16
    return float(off.double().mean()) < 0.05 and float(energy.quantile(0.05)) > 0.1 * float(energy.max())


def warn_of_kspace(x: np.ndarray, file: Path) -> None:
    """Say so where a complex image `(…, H, W)` of a file without labels looks like k-space."""
    if x.dtype.kind != "c" or min(x.shape[-2:], default=0) < _LEAST_SIDE or not np.isfinite(x).all() or not x.any():
        return
    y = torch.from_numpy(np.ascontiguousarray(x.astype(np.complex64)))
    if _share_in_middle(y.abs().square()) > 0.5 > _share_in_middle(fft2(y).abs().square()):
        errors.warn(f"{file}: image: looks like k-space, not like an image", "unsupported_layout")


# ---------------------------------------------------------------- arrays and a trajectory → Scan

UNIT = "cycles per field of view"
"""What a trajectory of ours is measured in, and what we write beside it."""


def make_non_cartesian_scan(
    kspace: np.ndarray,
    trajectory: np.ndarray,
    *,
    file: Path,
    unit: str | None = None,
    image_shape: tuple[int, int] | None = None,
    csm: np.ndarray | None = None,
    slices: slice | None = None,
    total: int | None = None,
    noise_std: float | None = None,
    geometry: Geometry | None = None,
    provenance: str = "acquired",
) -> Scan:
    """A Scan from samples along a trajectory, its unit made cycles per field of view.

    Arguments:
        kspace: complex `(B, C, M)`.
        trajectory: `(B or 1, M, 2)`, (row, column), in `unit`.
        unit: what the file says it is, in words: "cycles per field of view", "cycles per pixel" or "radians per pixel"
            may occur in it; None: tell it from the extent, with a word about it.
        image_shape: `(H, W)`; None takes that of the maps, or a square that holds the trajectory, with a word about it.
        The others: as for `make_scan`.

    Raises:
        UnsupportedLayout, InconsistentShapes, NonFinite, NoData, BadOption.
    """
    y = complex_values(kspace, file, "kspace")
    if trajectory.dtype.kind not in "iuf":
        raise errors.UnsupportedLayout(f"found {trajectory.dtype}, expected real numbers", file=file, key="trajectory")
    if y.ndim != 3 or 0 in y.shape:
        raise errors.NoData(f"shape {y.shape} holds no sample", file=file, key="kspace")
    b = len(y) if total is None else total
    rows = row_range(slices, b)
    k = torch.from_numpy(np.ascontiguousarray(y if total is not None else y[rows]))
    t = torch.from_numpy(np.ascontiguousarray(trajectory.astype(np.float32)))
    if t.ndim != 3 or t.shape[0] not in (1, b) or tuple(t.shape[1:]) != (k.shape[-1], 2):
        raise errors.InconsistentShapes(
            f"found {tuple(trajectory.shape)}, expected ({b} or 1, {k.shape[-1]}, 2): (row, column) of every sample",
            file=file, key="trajectory",
        )  # fmt: skip
    check_finite(t, "trajectory", str(file))
    t = t[rows] if len(t) == b else t
    check_finite(k, "kspace", str(file))
    power = k.abs().double().square().sum(1)
    _check_measured(power, file)
    if image_shape is None and csm is not None and csm.ndim >= 2:
        image_shape = (csm.shape[-2], csm.shape[-1])
    t, shape = _in_cycles(t, unit, image_shape, file)
    _warn_dark_centre(power, t, shape, file)
    return Scan(
        kspace=k, trajectory=t, image_shape=shape, csm=_maps(csm, b, rows, k.dtype, file), noise_std=noise_std,
        geometry=shifted(geometry or Geometry(), rows.start), provenance=provenance,
    )  # fmt: skip


def _in_cycles(
    t: Tensor, unit: str | None, shape: tuple[int, int] | None, file: Path
) -> tuple[Tensor, tuple[int, int]]:
    """The trajectory in cycles per field of view, and the image shape it belongs to.

    Numbers alone do not say their unit, but their extent does: a half is the border in cycles per pixel, π in radians
    per pixel, and half the image in cycles per field of view.
    """
    extent = float(t.abs().max())
    said = (unit or "").lower()
    step = float(t.diff(dim=1).square().sum(-1).sqrt().median()) if t.shape[1] > 1 else 0.0
    if not said:
        guessed = "cycles per pixel" if extent <= 0.5005 else "radians per pixel" if 2.5 < extent <= 3.15 else UNIT
        if guessed != UNIT:
            errors.warn(f"{file}: trajectory: no unit given, and an extent of {extent:.4g}: taken as {guessed}")
        said = guessed
    per_pixel = 1.0 if "per pixel" in said and "radian" not in said else 1 / (2 * math.pi) if "radian" in said else None
    if shape is None:
        if per_pixel is not None:
            raise errors.MissingKey(
                "a trajectory in units of pixels, and no size of the image", file=file, key="image_shape",
                help=f"multiply the trajectory by the size of the image: {UNIT}",
            )  # fmt: skip
        # The border of the last sample, unless it lies on the border of the grid already.
        n = 2 * math.ceil(extent - 1e-2)
        if n < 32 and t.shape[-2] >= 256:
            raise errors.UnsupportedLayout(
                f"reaches {extent:.3g}, for {t.shape[-2]} samples: hardly cycles per field of view", file=file,
                key="trajectory", help="in [-1, 1]? multiply it by N / 2, for an image of N×N",
            )  # fmt: skip
        shape = (max(n, 1), max(n, 1))
        errors.warn(f"{file}: no size of the image given: {n}×{n}, which the trajectory just fills")
        # Scanners sample a readout at least as densely as the field of view asks.
        if step > 1.1 or 179.5 < extent <= 180:
            errors.warn(
                f"{file}: trajectory: reaches {extent:.4g} in steps of {step:.3g}, expected steps of at most 1 cycle per field "
                "of view: is it in 1/m, or in degrees? state the unit, or the size of the image",
                "unsupported_layout",
            )
    if per_pixel is not None:
        t = t * (per_pixel * torch.tensor(shape, dtype=torch.float32))
    return t, shape


def _warn_dark_centre(power: Tensor, t: Tensor, shape: tuple[int, int], file: Path) -> None:
    """The middle of k-space is brighter than the rest, unless nothing was in the coil or the trajectory is another's."""
    radius = (t / torch.tensor(shape, dtype=torch.float32)).square().sum(-1).sqrt().expand(power.shape)
    inner = radius < 1 / 16
    if bool(inner.any()) and power.shape[-1] >= 256 and float(power[inner].mean()) < 2 * float(power.mean()):
        errors.warn(
            f"{file}: kspace: no more energy in the middle than elsewhere: only noise, or a wrong trajectory?",
            "no_data",
        )


# ---------------------------------------------------------------- the ISMRMRD header

Encoding = dict[str, str]
"""What the header says of one encoding, its tags joined by dots: `encodedSpace.matrixSize.x` → "256"."""

HEADER_LIMIT = 2**20


def parse_header(raw: bytes, file: Path, key: str) -> list[Encoding]:
    """The encodings of an ISMRMRD header; empty where it names none.

    Raises:
        UnsafeContent: it declares a DOCTYPE, the door to entity bombs and to other files.
        ValueError: it is damaged or longer than a mebibyte.
    """
    if len(raw) > HEADER_LIMIT:
        raise ValueError(f"{len(raw)} bytes are too long")
    encodings: list[Encoding] = []
    trail: list[str] = []
    text: list[str] = []

    def start(tag: str, _attributes: dict[str, str]) -> None:
        trail.append(tag.rsplit(":", 1)[-1])
        text.clear()
        if trail[1:] == ["encoding"]:
            encodings.append({})

    def end(_tag: str) -> None:
        if len(trail) > 2 and trail[1] == "encoding" and (value := "".join(text).strip()):
            encodings[-1].setdefault(".".join(trail[2:]), value)
        text.clear()
        trail.pop()

    def doctype(*_: object) -> None:
        raise errors.UnsafeContent(
            "XML with a DOCTYPE, which could name other files or grow without bound", file=file, key=key
        )

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as e:
        raise ValueError(str(e)) from e
    return encodings


def header_number(encoding: Mapping[str, str], name: str) -> float:
    """A number of the header; 0 where it is absent or none."""
    try:
        value = float(encoding.get(name, "0"))
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def header_sizes(encoding: Mapping[str, str], space: str) -> tuple[list[float], list[float]]:
    """Matrix and field of view in mm, along x, y and z, of "encodedSpace" or "reconSpace"; 0 where absent."""
    matrix = [header_number(encoding, f"{space}.matrixSize.{axis}") for axis in "xyz"]
    return matrix, [header_number(encoding, f"{space}.fieldOfView_mm.{axis}") for axis in "xyz"]


def header_voxel_size(encoding: Mapping[str, str], shape: tuple[int, int]) -> tuple[float, float, float] | None:
    """Spacing of an image of `shape`, in mm; None where the header has another matrix or does not know.

    One millimetre per pixel is what converters write when they do not know.
    """
    for space in ("encodedSpace", "reconSpace"):
        matrix, fov = header_sizes(encoding, space)
        if {*shape} != {*matrix[:2]} or min(*fov, *matrix) <= 0:
            continue
        if fov[:2] == matrix[:2]:
            return None
        spacing = [size / n for size, n in zip(fov, matrix, strict=True)]
        if shape[0] != matrix[0]:
            spacing[0], spacing[1] = spacing[1], spacing[0]
        return spacing[0], spacing[1], spacing[2]
    return None


# ---------------------------------------------------------------- arrays → Image


def make_image(
    array: np.ndarray, *, file: Path, key: str, slices: slice | None = None, geometry: Geometry | None = None,
    provenance: str = "",
) -> Image:  # fmt: skip
    """An Image from `(H, W)` or `(B, H, W)` values, real or complex, cut to `slices`.

    Raises:
        UnsupportedLayout, NonFinite, NoData, BadOption.
    """
    kind = array.dtype.kind
    if kind not in "biufc" or array.ndim not in (2, 3):
        raise errors.UnsupportedLayout(
            f"found {array.dtype} of shape {array.shape}, expected numbers (slices, rows, columns)", file=file, key=key
        )
    if array.size == 0:
        raise errors.NoData(f"shape {array.shape} holds no pixel", file=file, key=key)
    array = array[None] if array.ndim == 2 else array
    with np.errstate(all="ignore"):  # what overflows becomes infinite, and is refused as such
        x = array[row_range(slices, len(array))].astype(np.complex64 if kind == "c" else np.float32)
    return Image(
        data=torch.from_numpy(np.ascontiguousarray(x)), geometry=geometry or Geometry(),
        provenance=provenance or f"read from {file.name}",
    )  # fmt: skip
