"""BART's pair of files: `.hdr` (text, sixteen sizes) and `.cfl` (complex64, the first index counts fastest).

Axes used here: 0 rows, 1 columns, 3 coils, 13 slices. All others must have length 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import errors, files
from ..scan import Geometry, Reconstruction, Scan
from .base import Image, as_complex64, make_image, make_scan

__all__ = ["header_text", "list_arrays", "read_array", "read_image", "read_scan", "write"]

_USED = {0: "rows", 1: "columns", 3: "coils", 13: "slices"}


def read_scan(path: Path, slices: slice | None) -> Scan:
    """K-space `(slices, coils, rows, columns)`."""
    return make_scan(_read(path), file=path, third_axis="coils", slices=slices)


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """An image: the coil axis must have length 1."""
    x = _read(path)
    if x.shape[1] != 1:
        raise errors.UnsupportedLayout(
            f"{x.shape[1]} coils, expected one image", file=path, help="combine them first (bart rss 8)"
        )
    return make_image(x[:, 0], file=path, key="image", slices=slices)


def read_array(path: Path, keys: Sequence[str], *, coils: bool = False) -> np.ndarray:
    """The values of the one array, slices first; with `coils`, `(slices, coils, rows, columns)`."""
    return _read(path) if coils else read_image(path, None, "image").data.numpy()


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """The sizes as BART counts them."""
    return [{"name": path.stem, "shape": _dimensions(path), "dtype": "complex64"}]


def _dimensions(path: Path) -> list[int]:
    header = files.check(path.with_suffix(".hdr"))
    try:
        lines = header.read_bytes()[:4096].decode("ascii").splitlines()
        found = [int(word) for word in lines[lines.index("# Dimensions") + 1].split()]
    except (ValueError, IndexError) as e:
        raise errors.UnreadableFile("no list of dimensions, expected BART's text header", file=header) from e
    if not 1 <= len(found) <= 16 or any(n < 1 for n in found):
        raise errors.UnreadableFile(f"found dimensions {found}, expected up to 16 sizes ≥ 1", file=header)
    return found + [1] * (16 - len(found))


def _read(path: Path) -> np.ndarray:
    """The values as `(slices, coils, rows, columns)`."""
    sizes = _dimensions(path)
    data = files.check(path.with_suffix(".cfl"))
    if any(n > 1 and axis not in _USED for axis, n in enumerate(sizes)):
        raise errors.UnsupportedLayout(
            f"found dimensions {sizes}, expected 1 everywhere but in rows, columns, coils (3) and slices (13)",
            file=data,
        )
    wanted, stored = 8 * math.prod(sizes), data.stat().st_size
    if wanted != stored:
        kind = "truncated" if stored < wanted else "longer than its header says"
        raise errors.UnreadableFile(f"{kind}: {stored} of {wanted} bytes", file=data, help="copy both files again")
    files.check_declared(sizes, 8, stored, file=data)
    rows, columns, coils, slices = (sizes[axis] for axis in _USED)
    return np.fromfile(data, dtype="<c8").reshape(slices, coils, columns, rows).swapaxes(2, 3)


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write the `.cfl` values to the (temporary) path; `header_text` is the other half."""
    if isinstance(what, Scan):
        if what.trajectory is not None:
            raise errors.UnsupportedLayout("non-Cartesian scans are not written yet", key="trajectory")
        assert what.scale is not None
        x = what.kspace * what.scale[:, None, None, None]
    else:
        x = (what.image if isinstance(what, Reconstruction) else what.data)[:, None]
    array = as_complex64(x.numpy(force=True))
    array.swapaxes(2, 3).astype("<c8").tofile(path)
    return {"content": "k-space" if isinstance(what, Scan) else "complex", "dimensions": _sizes(array.shape)}


def _sizes(shape: tuple[int, ...]) -> list[int]:
    slices, coils, rows, columns = shape
    return [rows, columns, 1, coils, *[1] * 9, slices, 1, 1]


def header_text(sizes: list[int]) -> str:
    """The `.hdr` that belongs to an array of these sizes."""
    return "# Dimensions\n" + " ".join(str(n) for n in sizes) + "\n"
