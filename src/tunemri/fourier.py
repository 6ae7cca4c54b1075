"""The one centred, orthonormal Fourier pair, and the crops and pads that go with it.

    X[k] = 1/√N Σ_n x[n] exp(-2πi (k - c)(n - c) / N),    c = N // 2

Zero frequency and image centre both sit at index N // 2. Nobody else in tunemri calls `torch.fft`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["convolve", "crop", "fft2", "fft2_raw", "ifft2", "ifft2_raw", "pad", "phase_ramp", "resized"]

_AXES = (-2, -1)


def fft2(x: Tensor) -> Tensor:
    """Image `(*, H, W)` → centred orthonormal k-space `(*, H, W)`."""
    x = torch.fft.ifftshift(x, dim=_AXES)
    return torch.fft.fftshift(torch.fft.fft2(x, norm="ortho"), dim=_AXES)


def ifft2(y: Tensor) -> Tensor:
    """Centred orthonormal k-space `(*, H, W)` → image `(*, H, W)`; the inverse and adjoint of `fft2`."""
    y = torch.fft.ifftshift(y, dim=_AXES)
    return torch.fft.fftshift(torch.fft.ifft2(y, norm="ortho"), dim=_AXES)


def fft2_raw(x: Tensor) -> Tensor:
    """Orthonormal FFT with both origins at index 0; `phase_ramp` turns it into the centred one."""
    return torch.fft.fft2(x, norm="ortho")


def ifft2_raw(y: Tensor) -> Tensor:
    """Inverse and adjoint of `fft2_raw`."""
    return torch.fft.ifft2(y, norm="ortho")


def convolve(x: Tensor, spectrum: Tensor) -> Tensor:
    """Convolve images `(*, H, W)` with a kernel of up to 2H - 1 by 2W - 1 taps, given by its spectrum.

    Arguments:
        x: complex `(*, H, W)`.
        spectrum: `(*, ≥ 2H - 1, ≥ 2W - 1)`, the unscaled FFT of the kernel, origin at index 0.
    """
    (h, w), (rows, columns) = x.shape[-2:], spectrum.shape[-2:]
    # Along each axis only what is not known to be zero, or to be thrown away: a quarter less than whole transforms.
    y = torch.fft.fft(torch.fft.fft(x, n=rows, dim=-2), n=columns, dim=-1) * spectrum
    return torch.fft.ifft(torch.fft.ifft(y, dim=-1)[..., :w], dim=-2)[..., :h, :]


@lru_cache(maxsize=32)
def phase_ramp(shape: tuple[int, int], dtype: torch.dtype = torch.complex64) -> tuple[Tensor, Tensor]:
    """The two factors that replace the shifts: `fft2(x) = outer * fft2_raw(inner * x)`.

    Expanding (k - c)(n - c) = kn - kc - cn + c² in the definition above leaves one factor in n,
    `exp(2πi c n / N)`, and one in k, `exp(2πi c k / N) exp(-2πi c² / N)`. For even N both are ±1
    (a checkerboard), so folding them into coil maps and mask removes two memory passes each way.

    Returns:
        inner, outer: complex `(H, W)` of the given dtype; exactly real for even sizes.
    """
    # The cache outlives the caller: tensors made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        inner, outer = [], []
        for size in shape:
            n = torch.arange(size, dtype=torch.float64)
            c = size // 2
            # Reduce the phase modulo N in exact integers first: even sizes then give exactly ±1.
            turns = (n * c) % size / size
            constant = -((c * c) % size) / size
            inner.append(_unit(turns))
            outer.append(_unit(turns + constant))
        return (
            (inner[0][:, None] * inner[1]).to(dtype),
            (outer[0][:, None] * outer[1]).to(dtype),
        )


def _unit(turns: Tensor) -> Tensor:
    """exp(2πi turns), exact at the quarter turns."""
    quarter = (turns * 4).round()
    exact = (turns * 4 - quarter).abs() < 1e-12
    angle = torch.where(exact, quarter * (math.pi / 2), turns * (2 * math.pi))
    real = torch.where(exact, torch.tensor([1.0, 0, -1, 0]).double()[(quarter % 4).long()], angle.cos())
    imag = torch.where(exact, torch.tensor([0.0, 1, 0, -1]).double()[(quarter % 4).long()], angle.sin())
    return torch.complex(real, imag)


def crop(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Central `(*, h, w)` part of `(*, H, W)`, keeping index N // 2 in the centre; no larger than `x`."""
    for axis, size in zip(_AXES, shape, strict=True):
        start = x.shape[axis] // 2 - min(size, x.shape[axis]) // 2
        x = x.narrow(axis, start, min(size, x.shape[axis]))
    return x


def pad(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Zero-pad `(*, h, w)` to `(*, H, W)` around index N // 2; the adjoint of `crop`, and the same where H or W is smaller."""
    (top, bottom), (left, right) = (
        (lambda before: (before, big - small - before))(big // 2 - small // 2)
        for small, big in zip(x.shape[-2:], shape, strict=True)
    )
    return torch.nn.functional.pad(x, (left, right, top, bottom))


def resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Images `(*, H, W)` on a grid `(*, h, w)` over the same field of view, by their Fourier series: intensities stay.

    Where the grid is coarser, finer frequencies are lost; where it is finer, they are zero.
    """
    return ifft2(pad(fft2(x), shape)) * math.sqrt(shape[0] * shape[1] / math.prod(x.shape[-2:]))
