"""NIfTI-1 and NIfTI-2 images (`.nii`, `.nii.gz`): index (i, j, k) is (row, column, slice), and the affine is kept.

Images that all lie in one place (echoes of one slice: an affine without a step from image to image) count along the fourth
axis.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from io import IOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from .. import errors, files
from ..scan import Geometry, Reconstruction, Scan
from .base import Image, image_only, make_image, row_range, shifted

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

__all__ = ["list_arrays", "read_array", "read_image", "read_scan", "write"]


def read_scan(path: Path, slices: slice | None) -> Scan:
    """Always refused: NIfTI holds images."""
    raise image_only(path, "a NIfTI image")


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """A volume `(H, W, B)` as slices `(B, H, W)`, scaled as its header says."""
    with _open(path) as f:
        image, shape = _header(f, path)
        echoes = len(shape) == 4
        if len(shape) == 2:
            shape = (*shape, 1)
        rows = row_range(slices, shape[-1])
        proxy, wanted = image.dataobj, slice(rows.start, rows.stop)
        # Further axes have length 1 here; slicing the proxy reads no more than is wanted.
        array = np.asarray(proxy[:, :, :, wanted] if echoes else proxy[:, :, wanted] if len(image.shape) > 2 else proxy)
        array = array.reshape(shape[0], shape[1], -1)
        header = image.header
        zooms = [float(z) for z in header.get_zooms()[:3]] + [1.0] * 3
        placed = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
        affine = np.array(image.affine, dtype=np.float64)
        affine[:3, 2] *= not echoes
        sane = placed and bool(np.isfinite(affine).all())
        positive = all(np.isfinite(z) and z > 0 for z in zooms[:3])
        geometry = Geometry(
            voxel_size=(zooms[0], zooms[1], zooms[2]) if positive else None,
            affine=tuple(tuple(row) for row in affine.tolist()) if sane else None,
        )
        return make_image(np.moveaxis(array, -1, 0), file=path, key="image", geometry=shifted(geometry, rows.start))


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """The values of the one array, slices first."""
    return read_image(path, None, "image").data.numpy()


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """Shape and type of the one array."""
    with _open(path) as f:
        image, _ = _header(f, path)
        return [{"name": "image", "shape": list(image.shape), "dtype": str(image.get_data_dtype())}]


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as f:
        compressed = f.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if compressed else open(path, "rb")


def _header(f: BinaryIO, path: Path) -> tuple[Nifti1Image, tuple[int, ...]]:
    """The image, its values unread, and its shape: two or three axes, or four of one slice."""
    import nibabel

    start = f.read(12)
    f.seek(0)
    kind = nibabel.Nifti2Image if start[4:7] in (b"n+2", b"ni2") else nibabel.Nifti1Image
    image = kind.from_stream(cast(IOBase, f))
    shape = tuple(int(n) for n in image.shape)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufc":
        raise errors.UnsupportedLayout(f"found values of type {dtype}, expected numbers", file=path, key="image")
    # A gzip stream inflates up to a thousandfold; images compress less than fiftyfold.
    packed = isinstance(f, gzip.GzipFile)
    files.check_declared(
        shape, max(dtype.itemsize, 4), path.stat().st_size, file=path, key="image",
        ratio=200 if packed else 1000, above=2**29 if packed else 4 * 2**30,
    )  # fmt: skip
    if len(shape) > 3 and shape[2] == 1 and set(shape[4:]) <= {1} and shape[3] > 1:
        return image, shape[:4]
    if len(shape) > 3 and set(shape[3:]) != {1}:
        raise errors.UnsupportedLayout(
            f"found {len(shape)} axes, shape {shape}, expected one volume", file=path, key="image",
            help="split the volumes first (fslsplit, or nibabel.four_to_three)",
        )  # fmt: skip
    if len(shape) < 2:
        raise errors.UnsupportedLayout(f"found shape {shape}, expected (rows, columns, slices)", file=path, key="image")
    return image, shape[:3]


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write the magnitude as float32 `(H, W, B)` with the affine, or with the voxel size where there is none."""
    import nibabel

    if isinstance(what, Scan):
        raise errors.BadOption("NIfTI holds images, not k-space", file=path, help="write the scan to .h5")
    x = what.image if isinstance(what, Reconstruction) else what.data
    magnitude = (x.abs() if x.is_complex() else x).to(torch.float32).numpy(force=True)
    affine = np.array(geometry.affine) if geometry.affine else np.diag([*(geometry.voxel_size or (1, 1, 1)), 1.0])
    array = np.moveaxis(magnitude, 0, -1)
    if not affine[:3, 2].any():
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / np.linalg.norm(normal) * (geometry.voxel_size or (1, 1, 1))[2]
        array = array[:, :, None]
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    if not geometry.affine:  # scaling alone says nothing about the patient
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)
    # Not `nibabel.save`, which leaves its file open when the disk is full.
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content)
    return {"content": "magnitude"}
