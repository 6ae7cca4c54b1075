"""HDF5 as the fastMRI data set uses it.

    kspace                complex (slices, coils, rows, columns), or (slices, rows, columns) from one coil
    mask                  (columns,), or (rows, columns): 1 where sampled; absent when fully sampled
    reconstruction_rss    float (slices, rows, columns), the reference of a multi-coil scan
    reconstruction_esc    float, the same for one coil
    ismrmrd_header        XML: matrix sizes and fields of view
    csm, reference        ours: coil maps, and the complex reference where it is known
    reconstruction        an image that came of it; fastMRI's evaluation looks for this name
    image, variance       ours: the complex image, and its pixelwise variance
    trajectory            float (slices or 1, …, 2), (row, column) of samples off the grid; kspace is then
                          (slices, coils, …) with the same axes … (one, or spokes and samples) at its end

Rows are the readout and columns the phase encoding. Attributes that we write: provenance, noise_std, voxel_size,
affine, acceleration (measured), max and norm (of the reference), units (of the trajectory), image_shape. Arrays carry
fletcher32 checksums, so that a flipped bit on a disk is an error, not another image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import errors, files
from ..scan import Geometry, Reconstruction, Scan, check_finite, joined, without_image
from .base import (
    CSM_KEYS,
    IMAGE_KEYS,
    REFERENCE_KEYS,
    TRAJECTORY_KEYS,
    UNIT,
    Encoding,
    Image,
    as_complex64,
    check_layout,
    complex_values,
    first_key,
    header_sizes,
    header_voxel_size,
    make_image,
    make_non_cartesian_scan,
    make_scan,
    parse_header,
    row_range,
    shifted,
    single_key,
)

if TYPE_CHECKING:
    import h5py

__all__ = ["list_arrays", "read_array", "read_image", "read_scan", "volume_shape", "write", "write_pieces"]


def read_scan(path: Path, slices: slice | None) -> Scan:
    """The scan in a fastMRI file; only the wanted slices are read."""
    with files.open_hdf5(path) as h:
        keys = files.hdf5_keys(h, path)
        if files.hdf5_dataset(h, "kspace", path) is None:
            raise _without_kspace(keys, path)
        kspace = _numeric(h, "kspace", path)
        shape, kind = kspace.shape, kspace.dtype.kind
        pair = kind in "iuf"
        if kind == "b" or (pair and not (len(shape) >= 3 and shape[-1] == 2)):
            raise errors.UnsupportedLayout(
                f"found {kspace.dtype} of shape {shape}, expected complex values", file=path, key="kspace",
                help="store k-space as complex64",
            )  # fmt: skip
        grid = shape[:-1] if pair else shape
        header = _read_header(h, path)
        if (key := first_key(TRAJECTORY_KEYS, keys)) is not None:
            return _read_non_cartesian(h, kspace, key, header, slices, path)
        if (said := header.get("trajectory", "cartesian").lower()) not in ("cartesian", "epi"):
            raise errors.MissingKey(
                f"the header says {said}, and there is no trajectory", file=path, key="trajectory",
                help="(slices or 1, …, 2): row and column of every sample, in cycles per field of view",
            )  # fmt: skip
        _compare_header(header, grid, path)
        check_layout(shape, path, "kspace", pair=pair)
        total = grid[0] if len(grid) > 2 else 1
        rows = row_range(slices, total)
        y = files.hdf5_array(kspace, path, rows=rows if len(grid) > 2 else None)
        return make_scan(
            y, file=path, third_axis="slices", slices=slices, total=total,
            mask=_optional(h, ("mask",), path), csm=_maps(h, rows, total, path),
            noise_std=_noise_std(h, path), geometry=_geometry(h, header, grid[-2:]), provenance=_provenance(h),
        )  # fmt: skip


def volume_shape(path: Path) -> tuple[int, int, int, int] | None:
    """(slices, coils, rows, columns) of complex k-space on a grid, whose slices can be read one by one; else None."""
    import h5py

    with files.open_hdf5(path) as h:
        keys = files.hdf5_keys(h, path)
        kspace = files.hdf5_dataset(h, "kspace", path)
        if not isinstance(kspace, h5py.Dataset) or kspace.dtype.kind != "c" or first_key(TRAJECTORY_KEYS, keys):
            return None
        shape = kspace.shape
        return shape if len(shape) == 4 else (shape[0], 1, *shape[1:]) if len(shape) == 3 else None


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """The reconstruction or the reference in an HDF5 file."""
    with files.open_hdf5(path) as h:
        keys = files.hdf5_keys(h, path)
        key = first_key(REFERENCE_KEYS if prefer == "reference" else IMAGE_KEYS, keys)
        if key is None and "kspace" in keys:
            raise errors.MissingKey(
                "holds k-space without an image", file=path, key="reconstruction",
                help="make one: tunemri recon FILE -m zero-filled -o IMAGE.h5",
            )  # fmt: skip
        if key is None:
            raise errors.MissingKey(
                "no image", file=path, key="reconstruction", help=errors.did_you_mean("reconstruction", keys)
            )
        dataset = _numeric(h, key, path)
        stack = dataset.ndim == 3 and 0 not in dataset.shape
        rows = row_range(slices, dataset.shape[0]) if stack else None
        array = files.hdf5_array(dataset, path, rows=rows)
        geometry = _geometry(h, _read_header(h, path), array.shape[-2:])
        return make_image(
            array, file=path, key=key, slices=None if rows else slices,
            geometry=shifted(geometry, rows.start if rows else 0),
            provenance=f"{key} of {path.name}, {_provenance(h, of_image=True)}",
        )  # fmt: skip


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """The dataset called by one of the keys, or the only one there is."""
    with files.open_hdf5(path) as h:
        key = single_key(keys, files.hdf5_keys(h, path), path, keys[0])
        return files.hdf5_array(_numeric(h, key, path), path)


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """Name, shape and type of what stands at the top of the file."""
    import h5py

    rows: list[dict[str, Any]] = []
    with files.open_hdf5(path) as h:
        for key in files.hdf5_keys(h, path):
            try:
                found = files.hdf5_dataset(h, key, path)
            except errors.TunemriError as e:
                rows.append({"name": key, "shape": None, "dtype": e.what})
                continue
            if isinstance(found, h5py.Dataset):
                shape = None if found.shape is None else list(found.shape)
                rows.append({"name": key, "shape": shape, "dtype": str(found.dtype)})
            else:
                rows.append({"name": key, "shape": None, "dtype": "group"})
    return rows


# ---------------------------------------------------------------- parts of a file


def _without_kspace(keys: list[str], path: Path) -> errors.TunemriError:
    """Which of the files without `kspace` this is."""
    if (image := first_key(IMAGE_KEYS, keys)) is not None:
        return errors.MissingKey(
            "no k-space, only an image", file=path, key="kspace",
            help=f"to experiment on {image}: tunemri simulate FILE -o SCAN.h5",
        )  # fmt: skip
    return errors.MissingKey("no such dataset", file=path, key="kspace", help=errors.did_you_mean("kspace", keys))


def _read_non_cartesian(
    h: Any, kspace: h5py.Dataset, key: str, header: Encoding, slices: slice | None, path: Path
) -> Scan:
    """Samples along a trajectory: the axes that both arrays end with are one list of samples."""
    y = complex_values(files.hdf5_array(kspace, path), path, "kspace")
    found = _numeric(h, key, path)
    t = files.hdf5_array(found, path)
    samples, layout = _sample_axes(y.shape, t.shape, path, key), y.shape
    lead = layout[: y.ndim - samples]
    if len(lead) == 1 and t.ndim == samples + 1:
        errors.warn(f"{path}: kspace {layout} along one trajectory read as (coils, …) of one slice")
        lead = (1, *lead)
    elif len(lead) < 2:
        lead = (*lead, 1) if lead else (1, 1)
    y = y.reshape(*lead, -1)
    t = t.reshape(-1, y.shape[-1], 2)
    unit = _text(files.hdf5_attribute(found, "units")) or _text(files.hdf5_attribute(h, "units"))
    shape = _numbers(h, "image_shape", 2) or (_numbers(h, "grid", 1) or []) * 2
    matrix = header_sizes(header, "reconSpace")[0][:2]
    size = (shape or (matrix if min(matrix) >= 1 else None)) and tuple(int(n) for n in shape or matrix)
    if size is None and unit is None and samples == 2 and float(np.abs(t).max(initial=0)) <= 3.15:
        # In units of pixels, and no size: a spoke has as many samples as the grid that its file was made for.
        errors.warn(f"{path}: no size of the image given: that of the readout, {layout[-1]}, is taken")
        size = (layout[-1], layout[-1])
    return make_non_cartesian_scan(
        y, t, file=path, unit=unit, image_shape=(size[0], size[1]) if size else None, slices=slices,
        csm=_optional(h, CSM_KEYS, path), noise_std=_noise_std(h, path),
        geometry=_geometry(h, header, (size[0], size[1]) if size else (0, 0)), provenance=_provenance(h),
    )  # fmt: skip


def _sample_axes(kspace: tuple[int, ...], trajectory: tuple[int, ...], path: Path, key: str) -> int:
    """How many axes at the end of k-space count its samples: one, or two (spokes and samples).

    Raises:
        InconsistentShapes: the two arrays do not fit.
    """
    for count in (2, 1) if len(kspace) == 2 else (1, 2):
        lead, shared = kspace[:-count], trajectory[: -1 - count]
        same = len(trajectory) > count and trajectory[-1 - count :] == (*kspace[-count:], 2)
        if same and len(lead) <= 2 and shared in ((), (1,), lead[:1]):
            return count
    swapped = trajectory[-1:] != (2,) and 2 in trajectory
    raise errors.InconsistentShapes(
        f"found {trajectory} beside k-space {kspace}, expected (slices or 1, …, 2) beside (slices, coils, …)",
        file=path, key=key,
        help="numpy.moveaxis puts the axis of two, (row, column), last" if swapped else "the samples come last in both",
    )  # fmt: skip


def _optional(h: Any, keys: tuple[str, ...], path: Path) -> np.ndarray | None:
    key = first_key(keys, files.hdf5_keys(h, path))
    return None if key is None else files.hdf5_array(_numeric(h, key, path), path)


def _maps(h: Any, rows: slice, total: int, path: Path) -> np.ndarray | None:
    """The coil maps of the wanted slices, or those of all."""
    key = first_key(CSM_KEYS, files.hdf5_keys(h, path))
    if key is None:
        return None
    dataset = _numeric(h, key, path)
    each = dataset.ndim == 4 and dataset.shape[0] == total
    return files.hdf5_array(dataset, path, rows=rows if each else None)


def _numeric(h: Any, key: str, path: Path) -> h5py.Dataset:
    """The dataset of that name, which must hold numbers."""
    import h5py

    found = files.hdf5_dataset(h, key, path)
    if isinstance(found, h5py.Dataset) and found.shape is not None and found.dtype.kind in "biufcV":
        return found
    what = "a group" if not isinstance(found, h5py.Dataset) else "no values" if found.shape is None else found.dtype
    raise errors.UnsupportedLayout(f"found {what}, expected an array of numbers", file=path, key=key)


def _text(value: Any) -> str | None:
    """An attribute as text, whatever it was stored as."""
    if isinstance(value, bytes | np.bytes_):
        return value.decode("utf-8", "replace")
    return str(value) if isinstance(value, str) else None


def _provenance(h: Any, *, of_image: bool = False) -> str:
    """What the file says of its origin; k-space without a word is acquired, an image may be anything's."""
    text = _text(files.hdf5_attribute(h, "provenance")) or ""
    if text.startswith("simulated") or (of_image and text):
        return "".join(c for c in text if c.isprintable())[:300]
    return "acquired"


def _numbers(h: Any, name: str, count: int) -> list[float] | None:
    """`count` finite numbers from an attribute, or None."""
    try:
        values = np.asarray(files.hdf5_attribute(h, name), dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return values.tolist() if values.size == count and bool(np.isfinite(values).all()) else None


def _noise_std(h: Any, path: Path) -> float | None:
    if files.hdf5_attribute(h, "noise_std") is None:
        return None
    value = _numbers(h, "noise_std", 1)
    if value is None or value[0] < 0:
        errors.warn(f"{path}: noise_std is not a number ≥ 0, ignored")
        return None
    return value[0]


# ---------------------------------------------------------------- the ISMRMRD header


def _read_header(h: Any, path: Path) -> Encoding:
    """The first encoding of the header; empty where it is absent or unusable.

    Raises:
        UnsafeContent: it declares a DOCTYPE, the door to entity bombs and to other files.
    """
    import h5py

    found = files.hdf5_dataset(h, "ismrmrd_header", path)
    # Text and nothing else: reading damaged sequences of variable length can crash the HDF5 library.
    if not isinstance(found, h5py.Dataset) or found.size != 1 or h5py.check_string_dtype(found.dtype) is None:
        return {}
    value = files.hdf5_array(found, path).ravel()[0]
    raw = value.encode() if isinstance(value, str) else bytes(value) if isinstance(value, bytes) else b""
    try:
        return next(iter(parse_header(raw, path, "ismrmrd_header")), {})
    except ValueError as e:
        errors.warn(f"{path}: ismrmrd_header is damaged ({e}), ignored")
        return {}


def _compare_header(header: Encoding, shape: tuple[int, ...], path: Path) -> None:
    """Refuse (slices, rows, columns, coils) where the header says rows × columns; mention any other difference."""
    x, y = (int(n) for n in header_sizes(header, "encodedSpace")[0][:2])
    encoded = {x, y}
    if 0 in encoded or set(shape[-2:]) == encoded or not 2 <= len(shape) <= 4:
        return
    if len(shape) == 4 and set(shape[1:3]) == encoded:
        raise errors.InconsistentShapes(
            f"shape {tuple(shape)} against a header matrix of {x}×{y}: the coils seem to come last", file=path,
            key="kspace", help="expected (slices, coils, rows, columns); numpy.moveaxis(kspace, -1, 1) puts them there",
        )  # fmt: skip
    errors.warn(
        f"{path}: the header says {x}×{y}, the data {shape[-2]}×{shape[-1]}: the data count", "inconsistent_shapes"
    )


def _geometry(h: Any, header: Encoding, shape: tuple[int, int]) -> Geometry:
    """Our own attributes first, then the header."""
    affine = _numbers(h, "affine", 16)
    voxel = _numbers(h, "voxel_size", 3)
    ours = (voxel[0], voxel[1], voxel[2]) if voxel and min(voxel) > 0 else None
    return Geometry(
        voxel_size=ours or header_voxel_size(header, shape),
        affine=tuple(tuple(affine[i : i + 4]) for i in range(0, 16, 4)) if affine else None,
    )


def _header_xml(height: int, width: int, geometry: Geometry, trajectory: str) -> str:
    """The least that fastMRI's loaders and the ISMRMRD schema ask for; 1 mm pixels where the size is unknown."""
    dr, dc, ds = geometry.voxel_size or (1.0, 1.0, 1.0)
    space = (
        f"<matrixSize><x>{height}</x><y>{width}</y><z>1</z></matrixSize>"
        f"<fieldOfView_mm><x>{height * dr:g}</x><y>{width * dc:g}</y><z>{ds:g}</z></fieldOfView_mm>"
    )
    limits = f"<minimum>0</minimum><maximum>{width - 1}</maximum><center>{width // 2}</center>"
    return (
        '<?xml version="1.0" encoding="utf-8"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        "<experimentalConditions><H1resonanceFrequency_Hz>0</H1resonanceFrequency_Hz></experimentalConditions>"
        f"<encoding><encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace>"
        f"<encodingLimits><kspace_encoding_step_1>{limits}</kspace_encoding_step_1></encodingLimits>"
        f"<trajectory>{trajectory}</trajectory></encoding></ismrmrdHeader>"
    )


# ---------------------------------------------------------------- writing


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write a scan, a reconstruction or an image to the (temporary) path; returns notes for the sidecar."""
    import h5py

    if isinstance(what, Reconstruction):
        return write_pieces(path, [what], len(what.image), geometry)
    if isinstance(what, Scan):
        arrays, attributes = _scan_contents(what, reference, geometry)
    else:
        arrays, attributes = _image_contents(what, geometry)
    for key, array in arrays:
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            raise errors.NonFinite("NaN or Inf, refused to write them", key=key)
    with _Sink(path, "w+b") as sink, h5py.File(sink, "w") as h:
        for key, array in arrays:
            chunks = (1,) * (array.ndim - 2) + array.shape[-2:]
            h.create_dataset(key, data=array, chunks=chunks, fletcher32=True)
        if isinstance(what, Scan):
            kind = "cartesian" if what.trajectory is None else "other"
            h["ismrmrd_header"] = _header_xml(*what.image_shape, geometry, kind)
        for name, value in attributes.items():
            if value is not None:
                h.attrs[name] = value
    return {"content": "k-space" if isinstance(what, Scan) else "complex"}


def write_pieces(path: Path, pieces: Iterable[Reconstruction], slices: int, geometry: Geometry) -> dict[str, Any]:
    """Write a reconstruction to the (temporary) path as it comes, some slices at a time: one piece is in memory.

    The file does not depend on how its slices were divided into pieces.
    """
    import h5py

    top, peak, facts = 0, 0.0, []
    with _Sink(path, "w+b") as sink, h5py.File(sink, "w") as h:
        for piece in pieces:
            arrays, attributes = _image_contents(piece, geometry)
            for key, array in arrays:
                if not np.isfinite(array).all():
                    raise errors.NonFinite("NaN or Inf, refused to write them", key=key)
                if key not in h:
                    h.create_dataset(
                        key, (slices, *array.shape[1:]), array.dtype, chunks=(1, *array.shape[1:]), fletcher32=True
                    )
            for b in range(len(piece.image)):
                for key, array in arrays:
                    h[key][top + b] = array[b]
            top, peak = top + len(piece.image), max(peak, attributes["max"])
            facts.append(without_image(piece))
        _, attributes = _image_contents(replace(joined(facts), image=torch.zeros(1)), geometry)
        for name, value in {**attributes, "max": peak}.items():
            if value is not None:
                h.attrs[name] = value
    return {"content": "complex"}


class _Sink(io.FileIO):
    """A file that keeps a full disk to itself until it is closed: told of it, the HDF5 library fails once more, noisily."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.failure is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0

    def close(self) -> None:
        super().close()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


def _scan_contents(
    scan: Scan, reference: Tensor | None, geometry: Geometry
) -> tuple[list[tuple[str, np.ndarray]], dict[str, Any]]:
    assert scan.scale is not None
    scale = scan.scale.double()
    in_units = (
        scan.kspace if bool((scale == 1).all()) else scan.kspace * scale.reshape(-1, *[1] * (scan.kspace.ndim - 1))
    )
    y = as_complex64(in_units.numpy(force=True))
    place: dict[str, Any] = {}
    if scan.mask is not None:
        arrays = [("kspace", y[:, 0] if scan.coils == 1 else y)]
        mask = scan.mask.numpy(force=True).astype(np.uint8)[:, 0]
        arrays.append(("mask", mask if len(mask) > 1 else mask[0] if mask.shape[1] > 1 else mask[0, 0]))
    else:
        assert scan.trajectory is not None
        arrays = [("kspace", y), ("trajectory", scan.trajectory.float().numpy(force=True))]
        place = {"units": UNIT, "image_shape": np.array(scan.image_shape)}
    if scan.csm is not None:
        arrays.append(("csm", as_complex64(scan.csm.numpy(force=True))))
    attributes = {
        "provenance": scan.provenance,
        "noise_std": None if scan.noise_std is None else scan.noise_std * float(scale.mean()),
        "acceleration": scan.acceleration,
        **place,
        **_geometry_attributes(geometry),
    }
    if reference is not None:
        if reference.ndim != 3 or len(reference) != len(scan):
            raise errors.InconsistentShapes(
                f"found {tuple(reference.shape)}, expected ({len(scan)}, rows, columns)", key="reference"
            )
        check_finite(reference, "reference")
        magnitude = reference.abs().float().numpy(force=True)
        arrays.append(("reconstruction_esc" if scan.coils == 1 else "reconstruction_rss", magnitude))
        if reference.is_complex():
            arrays.append(("reference", as_complex64(reference.numpy(force=True))))
        attributes |= {"max": float(magnitude.max()), "norm": float(np.linalg.norm(magnitude.astype(np.float64)))}
    return arrays, attributes


def _image_contents(
    what: Reconstruction | Image, geometry: Geometry
) -> tuple[list[tuple[str, np.ndarray]], dict[str, Any]]:
    x = what.image if isinstance(what, Reconstruction) else what.data
    arrays = [("reconstruction", x.abs().float().numpy(force=True))]
    if x.is_complex():
        arrays.append(("image", as_complex64(x.numpy(force=True))))
    attributes: dict[str, Any] = {"max": float(arrays[0][1].max()), **_geometry_attributes(geometry)}
    attributes["provenance"] = what.provenance
    if isinstance(what, Image):
        return arrays, attributes
    if what.variance is not None:
        arrays.append(("variance", what.variance.float().numpy(force=True)))
    attributes |= {
        "status": what.status,
        "dials": json.dumps(dict(what.dials), default=str),
        "stats": json.dumps(dict(what.stats), default=str),
    }
    return arrays, attributes


def _geometry_attributes(geometry: Geometry) -> dict[str, Any]:
    return {
        "voxel_size": None if geometry.voxel_size is None else np.array(geometry.voxel_size),
        "affine": None if geometry.affine is None else np.array(geometry.affine),
    }
