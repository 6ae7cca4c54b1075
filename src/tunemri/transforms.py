"""Finite differences and periodic orthonormal wavelets of complex or real images, in plain torch.

A Daubechies filter pair with 2K taps is K plane rotations of the even and odd samples with a delay between
them (the lattice of Vaidyanathan and Hoang, "Lattice structures for optimal design and robust implementation
of two-channel perfect-reconstruction QMF banks", 1988). Rotations make the transform orthonormal by
construction, need half the multiplications of two filters, and are undone by turning back.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from . import errors

__all__ = ["WAVELETS", "divergence", "dwt", "gradient", "idwt", "max_levels"]

# Tangents of the lattice angles; db2 and db4 by peeling one rotation after the other off Daubechies' filters
# ("Ten lectures on wavelets", 1992, table 6.1), which the tests check through their vanishing moments.
WAVELETS: dict[str, tuple[float, ...]] = {
    "haar": (1.0,),
    "db2": (1 / math.sqrt(3), 2 - math.sqrt(3)),
    "db4": (0.32227588800028, 0.8109313444939061, -0.25929388162988914, 0.04600009711377783),
}


def gradient(x: Tensor) -> Tensor:
    """Forward differences along rows and columns, zero across the last edge: `(*, H, W)` → `(2, *, H, W)`.

    (∇x)₀[i, j] = x[i+1, j] - x[i, j] and (∇x)₁[i, j] = x[i, j+1] - x[i, j]; ‖∇‖² < 8.
    """
    # Repeating the last row makes the last difference zero: the Neumann boundary.
    return torch.stack(
        (
            torch.diff(x, dim=-2, append=x[..., -1:, :]),
            torch.diff(x, dim=-1, append=x[..., :, -1:]),
        )
    )


def divergence(p: Tensor) -> Tensor:
    """The negative adjoint of `gradient`, ⟨∇x, p⟩ = -⟨x, div p⟩: `(2, *, H, W)` → `(*, H, W)`."""
    rows, columns = p[0][..., :-1, :], p[1][..., :, :-1]
    zero_row, zero_column = p[0][..., -1:, :] * 0, p[1][..., :, -1:] * 0
    return torch.diff(rows, dim=-2, prepend=zero_row, append=zero_row) + torch.diff(
        columns, dim=-1, prepend=zero_column, append=zero_column
    )


def max_levels(shape: tuple[int, int], coarsest: int = 32) -> int:
    """Number of levels that leave no side of the coarse image below `coarsest` pixels; at least one."""
    return max(1, int(math.log2(max(1, min(shape) // coarsest))))


def dwt(x: Tensor, levels: int, wavelet: str = "db2") -> Tensor:
    """Periodic orthonormal wavelet transform of `(*, H, W)`, packed into the same shape.

    Each level turns a block into quadrants `[[coarse, columns], [rows, diagonal]]` and goes on with the coarse
    one. An odd last row or column of a block passes unchanged, so every size is allowed, the transform is
    orthonormal for all of them, and `idwt` is its inverse and adjoint.

    Arguments:
        x: real or complex.
        levels: how often to halve; stops early at blocks less than two pixels high or wide.
        wavelet: "haar", "db2" (four taps) or "db4" (eight taps).
    """
    tangents, gain = _lattice(wavelet)
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    if levels < 1 or not height or not width:
        return x
    low, high = _split(x[..., :height, :width], tangents, -2)
    low, high = _split(torch.stack((low, high)), tangents, -1)
    low, high = low * gain, high * gain
    top = torch.cat((dwt(low[0], levels - 1, wavelet), high[0]), -1)
    packed = torch.cat((top, torch.cat((low[1], high[1]), -1)), -2)
    if width < x.shape[-1]:
        packed = torch.cat((packed, x[..., :height, width:]), -1)
    return torch.cat((packed, x[..., height:, :]), -2) if height < x.shape[-2] else packed


def idwt(c: Tensor, levels: int, wavelet: str = "db2") -> Tensor:
    """Inverse and adjoint of `dwt`: packed coefficients `(*, H, W)` → image `(*, H, W)`."""
    tangents, gain = _lattice(wavelet)
    height, width = c.shape[-2] // 2 * 2, c.shape[-1] // 2 * 2
    if levels < 1 or not height or not width:
        return c
    h, w = height // 2, width // 2
    low = torch.stack((idwt(c[..., :h, :w], levels - 1, wavelet), c[..., h:height, :w])) * gain
    high = torch.stack((c[..., :h, w:width], c[..., h:height, w:width])) * gain
    x = _merge(low, high, tangents, -1)
    x = _merge(x[0], x[1], tangents, -2)
    if width < c.shape[-1]:
        x = torch.cat((x, c[..., :height, width:]), -1)
    return torch.cat((x, c[..., height:, :]), -2) if height < c.shape[-2] else x


@lru_cache(maxsize=8)
def _lattice(wavelet: str) -> tuple[tuple[float, ...], float]:
    """The tangents, and the product of all cosines of one level (two axes), applied in one pass at its end."""
    if wavelet not in WAVELETS:
        raise errors.BadOption(f"found {wavelet!r}", key="wavelet", help=errors.did_you_mean(wavelet, WAVELETS))
    tangents = WAVELETS[wavelet]
    return tangents, 1 / math.prod(1 + t * t for t in tangents)


def _split(x: Tensor, tangents: tuple[float, ...], axis: int) -> tuple[Tensor, Tensor]:
    """Low and high half along `axis`, up to the gain."""
    low, high = (x[..., 0::2, :], x[..., 1::2, :]) if axis == -2 else (x[..., 0::2], x[..., 1::2])
    for stage, t in enumerate(tangents):
        if stage:
            high = high.roll(1, axis)
        low, high = torch.add(low, high, alpha=t), torch.sub(high, low, alpha=t)
    return low, high


def _merge(low: Tensor, high: Tensor, tangents: tuple[float, ...], axis: int) -> Tensor:
    """Undo `_split`, up to the gain."""
    for stage, t in enumerate(reversed(tangents)):
        if stage:
            high = high.roll(-1, axis)
        low, high = torch.sub(low, high, alpha=t), torch.add(high, low, alpha=t)
    return torch.stack((low, high), dim=-2 if axis == -2 else -1).flatten(*((-3, -2) if axis == -2 else (-2, -1)))
