"""BART's pairs of files: `.hdr` (text, sixteen sizes) and `.cfl` (complex64, the first index counts fastest).

Axes used here: 0 rows, 1 columns, 3 coils, 13 slices. All others must have length 1. Samples along a trajectory have
1 in axis 0 and count along axes 1 and 2 (readout and spoke), as `bart nufft` takes them. Component 0 of a trajectory is
the frequency along axis 0 of the image, which BART calls x or readout and we call rows: read here, reconstructed and
written here, a scan gives the array that `bart nufft -i` makes of the same files, not its transpose: a heart measured
along spokes stands upright in both. (A program that shows axis 0 from left to right shows both lying on their side.)

A scan is one file NAME.cfl with companions beside it, found by name: NAME may end in `_ksp`, `_kspace` or `_data`,
which is then replaced, otherwise the ending is added.

    NAME_traj      (3, readout, spokes): rows, columns, nothing; cycles per field of view
    NAME_maps      coil maps, axes as for k-space
    NAME_mask      1 where sampled (BART calls it pattern); absent: what is zero in all coils was not sampled

What these files cannot say (whether it is k-space or an image, noise, geometry, provenance, size of a non-Cartesian image)
stands in our headers as one line of JSON under `# Tunemri`; BART skips it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors, files
from ..scan import Geometry, Reconstruction, Scan
from .base import (
    UNIT,
    Image,
    image_only,
    make_image,
    make_non_cartesian_scan,
    make_scan,
    row_range,
    shifted,
    warn_of_kspace,
)

__all__ = ["beside", "companion", "list_arrays", "read_array", "read_image", "read_maps", "read_scan", "write"]

_USED = {0: "rows", 1: "columns", 3: "coils", 13: "slices"}
_ENDINGS = ("_ksp", "_kspace", "_data")
COMPANIONS = ("traj", "maps", "mask")


def companion(path: Path, name: str) -> Path:
    """Where the trajectory, maps or mask of a scan lie."""
    stem = next((path.stem.removesuffix(e) for e in _ENDINGS if path.stem.endswith(e)), path.stem)
    return path.with_name(f"{stem}_{name}.cfl")


def read_scan(path: Path, slices: slice | None) -> Scan:
    """K-space `(slices, coils, rows, columns)`, or samples along the trajectory that lies beside it."""
    notes = _notes(path)
    if notes.get("content") == "complex":
        raise image_only(path, "an image")
    found = {name: _companion(path, name) for name in COMPANIONS}
    sizes = _dimensions(path)
    about: dict[str, Any] = {
        "noise_std": notes.get("noise_std"), "geometry": _geometry(notes),
        "provenance": notes.get("provenance", "acquired"),
    }  # fmt: skip
    csm = None if found["maps"] is None else _grid(found["maps"])
    if found["traj"] is not None:
        shape = notes.get("image_shape")
        return make_non_cartesian_scan(
            _samples(path), _trajectory(found["traj"], sizes), file=path, slices=slices, csm=csm,
            unit=UNIT if shape else None, image_shape=(shape[0], shape[1]) if shape else None, **about,
        )  # fmt: skip
    if sizes[0] == 1 and sizes[2] > 1:
        raise errors.MissingKey(
            "samples off the grid (axes 1 and 2), and no trajectory beside them", file=path, key="traj",
            help=f"its name would be {companion(path, 'traj').name}",
        )  # fmt: skip
    mask = None if found["mask"] is None else np.abs(_grid(found["mask"]))
    return make_scan(_grid(path), file=path, third_axis="coils", slices=slices, csm=csm, mask=mask, **about)


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """An image: the coil axis must have length 1."""
    notes = _notes(path)
    if notes.get("content") == "k-space" or any(_companion(path, name) for name in COMPANIONS):
        raise errors.MissingKey(
            "holds k-space without an image", file=path, key="image",
            help="make one: tunemri recon FILE -m zero-filled -o IMAGE.cfl",
        )  # fmt: skip
    x = _grid(path)
    if x.shape[1] != 1:
        raise errors.UnsupportedLayout(
            f"{x.shape[1]} coils: k-space, maps or coil images, expected one image", file=path, key="image",
            help="combine them first (bart rss 8)",
        )  # fmt: skip
    warn_of_kspace(x, path)
    return make_image(
        x[:, 0], file=path, key="image", slices=slices, provenance=notes.get("provenance", ""),
        geometry=shifted(_geometry(notes), row_range(slices, len(x)).start),
    )  # fmt: skip


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """The values of the one array, slices first."""
    return read_image(path, None, "image").data.numpy()


def read_maps(path: Path) -> np.ndarray:
    """Coil maps `(slices, coils, rows, columns)`, from a file that is not known to hold something else."""
    content, maps = _notes(path).get("content"), companion(path, "maps")
    if content is not None or path.stem.endswith(("_ksp", "_kspace")) or _companion(path, "traj") is not None:
        what = "an image" if content == "complex" else "k-space"
        raise errors.MissingKey(
            f"holds {what}, no coil maps", file=path, key="csm",
            help=f"they lie in {maps.name}" if maps.is_file() else "bart ecalib -m1 makes some",
        )  # fmt: skip
    if _dimensions(path)[4] > 1:
        raise errors.UnsupportedLayout(
            f"{_dimensions(path)[4]} sets of coil maps (axis 4), expected one", file=path, key="csm",
            help="bart ecalib -m1 makes one; bart slice 4 0 takes the first",
        )  # fmt: skip
    return _grid(path)


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """The sizes as BART counts them, of the file and its companions."""
    found = [other for name in COMPANIONS if (other := _companion(path, name)) is not None]
    return [{"name": one.stem, "shape": _dimensions(one), "dtype": "complex64"} for one in (path, *found)]


def _companion(path: Path, name: str) -> Path | None:
    other = companion(path, name)
    return other if other != path and other.is_file() else None


# ---------------------------------------------------------------- the two files


def _header(path: Path) -> list[str]:
    header = files.check(path.with_suffix(".hdr"))
    with open(header, "rb") as f:
        return f.read(2**16).decode("utf-8", "replace").splitlines()


def _dimensions(path: Path) -> list[int]:
    header, lines = path.with_suffix(".hdr"), _header(path)
    try:
        found = [int(word) for word in lines[lines.index("# Dimensions") + 1].split()]
    except (ValueError, IndexError) as e:
        raise errors.UnreadableFile("no list of dimensions, expected BART's text header", file=header) from e
    if not 1 <= len(found) <= 16 or any(n < 1 for n in found):
        raise errors.UnreadableFile(f"found dimensions {found}, expected up to 16 sizes ≥ 1", file=header)
    return found + [1] * (16 - len(found))


def _notes(path: Path) -> dict[str, Any]:
    """What our header says beyond BART's; what is not as we write it counts as absent."""
    lines = _header(path)
    try:
        found = json.loads(lines[lines.index("# Tunemri") + 1])
    except (ValueError, IndexError, RecursionError):
        return {}
    checks = {
        "content": lambda v: v in ("k-space", "complex"),
        "provenance": lambda v: isinstance(v, str) and v.startswith("simulated") and v.isprintable() and len(v) <= 300,
        "noise_std": lambda v: _numbers(v, ()) is not None and v >= 0,
        "voxel_size": lambda v: (n := _numbers(v, (3,))) is not None and bool((n > 0).all()),
        "affine": lambda v: _numbers(v, (4, 4)) is not None,
        "image_shape": lambda v: (n := _numbers(v, (2,))) is not None and bool(((n >= 1) & (n == n.round())).all()),
    }
    return {key: found[key] for key, check in checks.items() if key in found and check(found[key])}


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.shape == shape and bool(np.isfinite(array).all()) else None


def _geometry(notes: Mapping[str, Any]) -> Geometry:
    voxel, affine = notes.get("voxel_size"), notes.get("affine")
    return Geometry(
        voxel_size=None if voxel is None else tuple(voxel),
        affine=None if affine is None else tuple(tuple(row) for row in affine),
    )


def _values(path: Path, used: Sequence[int], what: str) -> np.ndarray:
    """All values, the axis that counts slowest first; only the `used` axes may be longer than 1."""
    sizes = _dimensions(path)
    data = files.check(path.with_suffix(".cfl"))
    if any(n > 1 and axis not in used for axis, n in enumerate(sizes)):
        raise errors.UnsupportedLayout(f"found dimensions {sizes}, expected 1 everywhere but in {what}", file=data)
    wanted, stored = 8 * math.prod(sizes), data.stat().st_size
    if wanted != stored:
        kind = "truncated" if stored < wanted else "longer than its header says"
        raise errors.UnreadableFile(f"{kind}: {stored} of {wanted} bytes", file=data, help="copy both files again")
    files.check_declared(sizes, 8, stored, file=data)
    return np.fromfile(data, dtype="<c8").reshape(sizes[::-1])


def _grid(path: Path) -> np.ndarray:
    """`(slices, coils, rows, columns)`."""
    values = _values(path, tuple(_USED), "rows, columns, coils (3) and slices (13)")
    rows, columns, coils, slices = (values.shape[15 - axis] for axis in _USED)
    return values.reshape(slices, coils, columns, rows).swapaxes(2, 3)


def _samples(path: Path) -> np.ndarray:
    """`(slices, coils, samples)`."""
    values = _values(
        path, (1, 2, 3, 13), "readout (1), spokes (2), coils (3) and slices (13), where a trajectory lies beside it"
    )
    return values.reshape(values.shape[15 - 13], values.shape[15 - 3], -1)


def _trajectory(path: Path, sizes: list[int]) -> np.ndarray:
    """`(slices or 1, samples, 2)` for samples whose file has those sizes."""
    found = _dimensions(path)
    if found[0] not in (2, 3) or found[1:3] != sizes[1:3] or found[13] not in (1, sizes[13]):
        raise errors.InconsistentShapes(
            f"found dimensions {found[:4]}, expected [3, {sizes[1]}, {sizes[2]}, 1] to match the samples", file=path,
            key="traj",
        )  # fmt: skip
    values = _values(path, (0, 1, 2, 13), "axes (0), readout (1), spokes (2) and slices (13)")
    values = values.reshape(found[13], -1, found[0])
    if values.imag.any() or values[..., 2:].any():
        what = "complex numbers" if values.imag.any() else "a third direction: the scan is 3-D"
        raise errors.UnsupportedLayout(f"found {what}, expected rows and columns", file=path, key="traj")
    return np.ascontiguousarray(values[..., :2].real)


# ---------------------------------------------------------------- writing


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write the values to the (temporary) path of the `.cfl`; `beside` is the rest of it."""
    x = _main(what)
    path.write_bytes(_bytes(x))
    return {"content": "k-space" if isinstance(what, Scan) else "complex"}


def check_beside(path: Path, what: Scan | Reconstruction | Image) -> None:
    """Refuse a name beside which lies what the scan does not have, and would be taken for its own.

    Raises:
        BadOption
    """
    own = _companions(what) if isinstance(what, Scan) else COMPANIONS
    for other, name in ((companion(path, name), name) for name in COMPANIONS if name not in own):
        if other.exists():
            raise errors.BadOption(
                f"{other.name!r} lies there and would be taken for the {name} of this scan", file=path,
                help="move it away or choose another name",
            )  # fmt: skip


def beside(path: Path, what: Scan | Reconstruction | Image, geometry: Geometry) -> dict[Path, bytes]:
    """Everything that belongs to the `.cfl` of that name: its header, and the companions of a scan with theirs."""
    content = "k-space" if isinstance(what, Scan) else "complex"
    notes: dict[str, Any] = {
        "content": content, "voxel_size": geometry.voxel_size, "affine": geometry.affine, "provenance": what.provenance,
    }  # fmt: skip
    made: dict[Path, bytes] = {}
    if isinstance(what, Scan):
        assert what.scale is not None
        notes["noise_std"] = None if what.noise_std is None else what.noise_std * float(what.scale.mean())
        if what.trajectory is not None:
            notes["image_shape"] = what.image_shape
        for name, x in _companions(what).items():
            other = companion(path, name)
            made |= {other: _bytes(x), other.with_suffix(".hdr"): _header_of(_sizes(name, x))}
    return {path.with_suffix(".hdr"): _header_of(_sizes("", _main(what)), notes), **made}


def _main(what: Scan | Reconstruction | Image) -> Tensor:
    if isinstance(what, Scan):
        assert what.scale is not None
        return what.kspace * what.scale.reshape(-1, *[1] * (what.kspace.ndim - 1))
    return (what.image if isinstance(what, Reconstruction) else what.data)[:, None]


def _companions(scan: Scan) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if scan.trajectory is not None:
        found["traj"] = torch.cat([scan.trajectory, torch.zeros_like(scan.trajectory[..., :1])], -1)
    elif scan.mask is not None and not bool((scan.mask != 0).all()):
        found["mask"] = scan.mask.expand(-1, -1, *scan.image_shape)
    if scan.csm is not None:
        found["maps"] = scan.csm
    return found


def _bytes(x: Tensor) -> bytes:
    """In BART's order: of a grid the rows count fastest; lists of samples are in that order already."""
    array = x.numpy(force=True)
    with np.errstate(over="ignore"):
        single = (array.swapaxes(-2, -1) if array.ndim == 4 else array).astype("<c8")
    if not np.isfinite(single).all():
        raise errors.NonFinite("beyond single precision, all that BART knows", key="kspace", help="write .h5 or .npy")
    return single.tobytes()


def _sizes(name: str, x: Tensor) -> list[int]:
    sizes = [1] * 16
    sizes[13] = x.shape[0]
    if x.ndim == 4:
        sizes[3], sizes[0], sizes[1] = x.shape[1:]
    elif name == "traj":
        sizes[1], sizes[0] = x.shape[1:]
    else:
        sizes[3], sizes[1] = x.shape[1:]
    return sizes


def _header_of(sizes: list[int], notes: Mapping[str, Any] | None = None) -> bytes:
    text = "# Dimensions\n" + " ".join(str(n) for n in sizes) + "\n"
    said = {key: value for key, value in (notes or {}).items() if value is not None}
    return (text + (f"# Tunemri\n{json.dumps(said)}\n" if said else "")).encode("ascii")
