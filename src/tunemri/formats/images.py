"""Pictures (PNG, JPEG, TIFF): grey values as stored; for display, and to experiment on. Never k-space."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .. import errors, files
from ..scan import Geometry, Reconstruction, Scan
from .base import Image, image_only, make_image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["list_arrays", "read_array", "read_image", "read_scan", "write"]

_GREY = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_PIXEL_LIMIT = 100_000_000


def read_scan(path: Path, slices: slice | None) -> Scan:
    """Always refused: a picture holds grey values."""
    raise image_only(path, "a picture")


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """Grey values `(B, H, W)`; the pages of a TIFF are the slices, colour becomes luminance with a word about it."""
    with _open(path) as picture:
        pages = [_grey(picture, path)]
        for index in range(1, getattr(picture, "n_frames", 1)):
            picture.seek(index)
            _check_size(picture, path, pages=index + 1)
            pages.append(_grey(picture, path))
    if len({page.shape for page in pages}) > 1:
        raise errors.InconsistentShapes("pages of different sizes", file=path, help="split the file into its pages")
    return make_image(np.stack(pages), file=path, key="image", slices=slices)


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """The values of the one array, slices first."""
    return read_image(path, None, "image").data.numpy()


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """Size and colour mode of the picture."""
    with _open(path) as picture:
        shape = [getattr(picture, "n_frames", 1), picture.height, picture.width]
        return [{"name": "image", "shape": shape, "dtype": picture.mode}]


@contextmanager
def _open(path: Path) -> Iterator[Picture]:
    from PIL import Image as pillow

    try:
        picture = pillow.open(path, formats=("PNG", "JPEG", "TIFF"))
    except pillow.DecompressionBombError as e:
        raise errors.TooLarge(f"{e}", file=path, key="image") from None
    with picture:
        _check_size(picture, path, pages=1)
        yield picture


def _check_size(picture: Picture, path: Path, *, pages: int) -> None:
    """Pixels are declared in a few bytes and compressed a thousandfold: count them before decoding."""
    shape = (pages, picture.height, picture.width)
    files.check_declared(shape, 4, 0, file=path, key="image", above=4 * _PIXEL_LIMIT)


def _grey(picture: Picture, path: Path) -> np.ndarray:
    if picture.mode in _GREY:
        return np.asarray(picture, dtype=np.float32)
    colour = np.asarray(picture.convert("RGB"), dtype=np.float32)
    if not (np.array_equal(colour[..., 0], colour[..., 1]) and np.array_equal(colour[..., 0], colour[..., 2])):
        errors.warn(f"{path}: a colour picture; its luminance is used")
    luminance: np.ndarray = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
    return luminance


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write the magnitude as 8-bit PNG, from 0 to its 99.9th percentile; several slices form a sheet."""
    from PIL import Image as pillow

    if isinstance(what, Scan):
        raise errors.BadOption("a picture holds an image, not k-space", file=path, help="write the scan to .h5")
    x = (what.image if isinstance(what, Reconstruction) else what.data).abs().double().numpy(force=True)
    top = float(np.quantile(x, 0.999)) or float(x.max()) or 1.0
    grey = np.round(255 * (x / top).clip(0, 1)).astype(np.uint8)
    b, h, w = grey.shape
    columns = math.ceil(math.sqrt(b))
    sheet = np.zeros((-(-b // columns) * h, columns * w), dtype=np.uint8)
    for i, page in enumerate(grey):
        row, column = divmod(i, columns)
        sheet[row * h : (row + 1) * h, column * w : (column + 1) * w] = page
    pillow.fromarray(sheet).save(path, format="PNG")
    return {"content": "magnitude", "window": [0.0, top]}
