"""Coil sensitivity maps, estimated from the centre of k-space that every ordinary scan samples completely.

Each function takes k-space `(B, C, H, W)` and its mask and returns maps `(B, C, H, W)` with Σ_c |S_c|² = 1 in every
pixel, slice by slice. `MAPS` lists them by the names that the command line takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import errors
from .fourier import ifft2

__all__ = ["MAPS", "low_resolution_maps", "walsh_maps"]


def low_resolution_maps(kspace: Tensor, mask: Tensor, *, calibration: int = 24) -> Tensor:
    """Maps as ratios of low-resolution images: S_c = I_c / √(Σ_d |I_d|²).

    I_c is the image from the largest centred block of k-space that is completely sampled, at most
    `calibration` wide, under a Hann window. Where no block of 6×6 is complete, the block of
    full width is taken as it is, gaps being zero: better than blocks so small, but of uniformly random points expect
    poor maps. The maps carry the smooth phase of the object.

    Arguments:
        kspace: complex `(B, C, H, W)`, zero where not sampled.
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        calibration: largest side of the block, in samples, ≥ 1.

    Returns:
        csm: complex `(B, C, H, W)`, Σ_c |S_c|² = 1.

    Raises:
        BadOption: `calibration` < 1.
    """
    return _unit(_low_resolution_images(kspace, mask, calibration))


def walsh_maps(kspace: Tensor, mask: Tensor, *, calibration: int = 24, window: int = 7) -> Tensor:
    """Maps that combine the coils with the best signal-to-noise ratio in each neighbourhood.

        S(p) = dominant eigenvector of Σ_{q near p} I(q) I(q)ᴴ,    I the vector of low-resolution coil images

    An eigenvector has no phase of its own; it gets the one that is nearest to `low_resolution_maps`, which varies
    smoothly. Needs memory for C² images.

    Arguments:
        kspace: complex `(B, C, H, W)`, zero where not sampled.
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        calibration: largest side of the block of k-space used, in samples, ≥ 1.
        window: side of the neighbourhood in pixels, odd, ≥ 1.

    Returns:
        csm: complex `(B, C, H, W)`, Σ_c |S_c|² = 1.

    Raises:
        BadOption: `calibration` < 1, or `window` not odd and positive.

    Source: D. Walsh, A. Gmitro, M. Marcellin, "Adaptive reconstruction of phased array MR imagery", 2000.
    """
    if window < 1 or window % 2 == 0:
        raise errors.BadOption(f"found {window}, expected an odd number ≥ 1", key="window")
    images = _low_resolution_images(kspace, mask, calibration)
    return torch.cat([_dominant(image, window) for image in images])


MAPS: dict[str, Callable[..., Tensor]] = {
    "low-resolution": low_resolution_maps,
    "walsh": walsh_maps,
}


def _low_resolution_images(kspace: Tensor, mask: Tensor, calibration: int) -> Tensor:
    if calibration < 1:
        raise errors.BadOption(f"found {calibration}, expected a whole number ≥ 1", key="calibration")
    h, w = kspace.shape[-2:]
    sampled = mask.expand(-1, -1, h, w)[:, 0] > 0
    windows = torch.stack([_window(m, calibration) for m in sampled])
    return ifft2(kspace * windows[:, None].to(kspace.real.dtype))


def _window(sampled: Tensor, calibration: int) -> Tensor:
    """Hann window `(H, W)` over the largest completely sampled block around zero frequency."""
    h, w = sampled.shape
    sides = [torch.arange(1, min(calibration, size) + 1) for size in (h, w)]
    first = [size // 2 - side // 2 for size, side in zip((h, w), sides, strict=True)]
    # Gaps in the block of every size at once, from the counts over all rectangles that start at the origin.
    counts = F.pad((~sampled).cpu().long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    (top, left), (bottom, right) = first, (start + side for start, side in zip(first, sides, strict=True))
    down = counts[bottom] - counts[top]
    gaps = down[:, right] - down[:, left]
    area = (gaps == 0) * sides[0][:, None] * sides[1]
    best = (int(area.argmax()) // len(sides[1]) + 1, int(area.argmax()) % len(sides[1]) + 1)
    if not bool(area.any()) or best[0] < min(6, h) or best[1] < min(6, w):
        best = (len(sides[0]), len(sides[1]))
    window = torch.zeros(h, w, device=sampled.device)
    y, x = h // 2 - best[0] // 2, w // 2 - best[1] // 2
    window[y : y + best[0], x : x + best[1]] = _hann(best[0])[:, None] * _hann(best[1])
    return window


def _hann(size: int) -> Tensor:
    """Symmetric about index size // 2 and nowhere zero."""
    n = torch.arange(size) - size // 2
    return torch.cos(torch.pi * n / (size + 2 - size % 2)).square()


def _dominant(image: Tensor, window: int) -> Tensor:
    """Dominant eigenvectors of the local coil covariances of one slice: `(C, H, W)` → `(1, C, H, W)`."""
    c, h, w = image.shape
    start = _unit(image[None])
    covariance = torch.view_as_real(image[:, None] * image.conj()).permute(0, 1, 4, 2, 3).reshape(1, -1, h, w)
    local = F.avg_pool2d(covariance, window, stride=1, padding=window // 2, count_include_pad=False)
    local = torch.view_as_complex(local.reshape(c, c, 2, h * w).permute(3, 0, 1, 2).contiguous())  # (HW, C, C)
    s = start.reshape(c, h * w).T[..., None]
    for _ in range(6):  # the start is close, and the second eigenvalue small: neighbouring pixels are nearly parallel
        s = local @ s
        s = s / s.abs().amax(1, keepdim=True).clamp(min=torch.finfo(s.real.dtype).tiny)
    s = _unit(s[..., 0].T.reshape(1, c, h, w))
    overlap = (s.conj() * start).sum(1, keepdim=True)
    return s * torch.polar(torch.ones_like(overlap.real), overlap.angle())


def _unit(images: Tensor) -> Tensor:
    """Divide by the root sum of squares over coils; pixels without any signal get equal parts of each coil."""
    # Bring each slice near 1 first, so that squares neither overflow nor vanish.
    peak = images.abs().amax((1, 2, 3), keepdim=True)
    images = images / torch.where(peak > 0, peak, torch.ones_like(peak))
    rss = images.abs().square().sum(1, keepdim=True).sqrt()
    equal = torch.full_like(images, images.shape[1] ** -0.5)
    return torch.where(rss > 1e-12, images / rss.clamp(min=1e-12), equal)
