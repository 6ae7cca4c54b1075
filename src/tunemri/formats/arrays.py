"""Arrays without a header: `.npy`, `.npz` and MATLAB `.mat` (version 5, and 7.3 which is HDF5).

Nothing in such a file says what it holds, so this is what is assumed. Complex means k-space where k-space is asked
for. Two axes are `(rows, columns)`, four are `(slices, coils, rows, columns)`, and three are `(coils, rows, columns)`,
with a word about it; for images three are `(slices, rows, columns)`. In `.npz` and `.mat` the names decide.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import errors, files
from ..scan import Geometry, Reconstruction, Scan
from .base import (
    CSM_KEYS,
    IMAGE_KEYS,
    KSPACE_KEYS,
    REFERENCE_KEYS,
    Image,
    as_complex64,
    first_key,
    image_only,
    make_image,
    make_scan,
    single_key,
    warn_of_kspace,
)

__all__ = ["list_arrays", "read_array", "read_image", "read_scan", "recorded_content", "write"]

_ONLY = "array"  # the name of what has none


def read_scan(path: Path, slices: slice | None) -> Scan:
    """K-space from an array file."""
    if recorded_content(path) in ("complex", "magnitude"):
        raise image_only(path, f"an image ({path.name}.json says so)")
    shapes = {row["name"]: row for row in list_arrays(path)}
    numeric = [name for name, row in shapes.items() if row["shape"] is not None and len(row["shape"]) >= 2]
    if (key := first_key(KSPACE_KEYS, numeric)) is None:
        if (image := first_key(IMAGE_KEYS, numeric)) is not None:
            raise image_only(path, f"the image {image!r}")
        key = single_key(KSPACE_KEYS, numeric, path, "k-space")
    kspace = _load(path, key)
    if kspace.dtype.kind in "biuf" and not (kspace.ndim >= 3 and kspace.shape[-1] == 2):
        raise image_only(path, f"real values ({kspace.dtype}, shape {kspace.shape}), which look like an image")
    axes = kspace.ndim - (kspace.dtype.kind in "iuf")
    if axes == 3:
        errors.warn(f"{path}: three axes {kspace.shape} read as (coils, rows, columns) of one slice")
    mask, csm = first_key(("mask",), numeric), first_key(CSM_KEYS, numeric)
    return make_scan(
        kspace, file=path, third_axis="coils", slices=slices,
        mask=None if mask is None else _load(path, mask), csm=None if csm is None else _load(path, csm),
    )  # fmt: skip


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """An image from an array file."""
    rows = [row for row in list_arrays(path) if row["shape"] is not None]
    names = [row["name"] for row in rows if len(row["shape"]) in (2, 3)]
    complex_rows = [row for row in rows if row["dtype"].startswith("complex")]
    kspace = first_key(KSPACE_KEYS, [row["name"] for row in complex_rows])
    if kspace is None and not names:
        kspace = next((row["name"] for row in complex_rows if len(row["shape"]) == 4), None)
    if kspace is not None and first_key(IMAGE_KEYS, names) is None:
        raise errors.MissingKey(
            f"holds k-space ({kspace}) without an image", file=path, key="image",
            help="make one: tunemri recon FILE -m zero-filled -o IMAGE.h5",
        )  # fmt: skip
    if not names:
        raise errors.UnsupportedLayout(
            "found no array (rows, columns) or (slices, rows, columns)", file=path, key="image"
        )
    key = single_key(REFERENCE_KEYS if prefer == "reference" else IMAGE_KEYS, names, path, "image")
    x = _load(path, key)
    warn_of_kspace(x, path)
    return make_image(x, file=path, key=key, slices=slices)


def recorded_content(path: Path) -> str | None:
    """What the record beside a file calls its content: "k-space", "complex" or "magnitude".

    None: there is no record, or it is not of this very file. The command line leaves one beside all that it writes, and an
    array without a header has no other way to say that it is an image.
    """
    record = path.with_name(path.name + ".json")
    try:
        if not record.is_file() or record.stat().st_size > 2**24:
            return None
        facts = json.loads(record.read_bytes())
        content, digest = facts["content"], facts["out_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    known = content in ("k-space", "complex", "magnitude")
    return content if known and digest == files.sha256(path) else None


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """The array called by one of the keys, or the only one there is."""
    return _load(path, single_key(keys, [row["name"] for row in list_arrays(path)], path, keys[0]))


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """Name, shape and type of every array."""
    match files.sniff(path):
        case "npy":
            with open(path, "rb") as f:
                shape, dtype, _ = files.read_npy_header(f, file=path)
                return [_row(_ONLY, shape, dtype)]
        case "npz":
            rows = []
            with zipfile.ZipFile(path) as z:
                for name in z.namelist():
                    with z.open(name) as member:
                        shape, dtype, _ = files.read_npy_header(member, file=path, key=name)
                    rows.append(_row(name.removesuffix(".npy"), shape, dtype))
            return rows
        case "mat5":
            from scipy.io import whosmat

            numeric = {"single", "double"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
            return [
                {"name": name, "shape": list(shape) if kind in (*numeric, "logical") else None, "dtype": kind}
                for name, shape, kind in whosmat(path)
            ]
        case _:
            return _list_mat73(path)


def _row(name: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": str(dtype)}


def _list_mat73(path: Path) -> list[dict[str, Any]]:
    import h5py

    rows = []
    with files.open_hdf5(path) as h:
        for key in files.hdf5_keys(h, path):
            found = files.hdf5_dataset(h, key, path)
            if isinstance(found, h5py.Dataset) and found.shape is not None:
                rows.append(_row(key, found.shape[::-1], found.dtype))
    return rows


def _load(path: Path, key: str) -> np.ndarray:
    """One array by the name that `list_arrays` gives it."""
    match files.sniff(path):
        case "npy":
            with open(path, "rb") as f:
                return files.read_npy_stream(f, path.stat().st_size, file=path)
        case "npz":
            with zipfile.ZipFile(path) as z:
                member = z.getinfo(key + ".npy")
                with z.open(member) as f:
                    return files.read_npy_stream(f, member.compress_size, file=path, key=key)
        case "mat5":
            return _load_mat5(path, key)
        case _:
            return _load_mat73(path, key)


def _load_mat5(path: Path, key: str) -> np.ndarray:
    from scipy.io import loadmat

    shape = next(row["shape"] for row in list_arrays(path) if row["name"] == key)
    files.check_declared(shape, 16, path.stat().st_size, file=path, key=key)
    return np.asarray(loadmat(path, variable_names=[key])[key])


def _load_mat73(path: Path, key: str) -> np.ndarray:
    import h5py

    with files.open_hdf5(path) as h:
        found = files.hdf5_dataset(h, key, path)
        assert isinstance(found, h5py.Dataset)
        # MATLAB counts the first index fastest, HDF5 the last.
        return files.hdf5_array(found, path).T


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write `.npy`: k-space `(B, C, H, W)`, or the image `(B, H, W)`, complex where it is."""
    if isinstance(what, Scan):
        assert what.scale is not None
        x = what.kspace * what.scale.reshape(-1, *[1] * (what.kspace.ndim - 1))
    else:
        x = what.image if isinstance(what, Reconstruction) else what.data
    array = x.numpy(force=True)
    np.save(path, as_complex64(array) if x.is_complex() else array, allow_pickle=False)
    if isinstance(what, Scan):
        return {"content": "k-space"}
    return {"content": "complex" if x.is_complex() else "magnitude"}
