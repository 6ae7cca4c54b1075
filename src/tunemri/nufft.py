"""The Fourier transform off the grid, its adjoint and its Gram operator, and weights that make up for uneven sampling.

    y_m = 1/√N Σ_n x[n] exp(-2πi k_m (n - c) / N),    c = N // 2, k in cycles per field of view

so that a trajectory on the grid gives `fourier.fft2`. On a CPU FINUFFT does the work; without it, and on other devices,
a Kaiser-Bessel interpolation by sparse matrices does. Both are differentiable to any order in image and samples (the
derivative of a linear map is its adjoint), not in the trajectory.

Sources: A. Barnett, J. Magland, L. af Klinteberg, "A parallel non-uniform fast Fourier transform library based on an
'exponential of semicircle' kernel" (2019); P. Beatty, D. Nishimura, J. Pauly, "Rapid gridding reconstruction with a
minimal oversampling ratio" (2005).
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import errors
from .fourier import convolve, crop, fft2, fft2_raw, ifft2_raw, pad
from .solvers import cg

__all__ = ["BACKENDS", "NUFFT", "calibration_block", "density_weights", "gram_spectrum"]

Shape = tuple[int, int]
Map = Callable[[Tensor], Tensor]
BACKENDS = ("auto", "finufft", "sparse")


@dataclass(frozen=True, eq=False)
class NUFFT:
    """The transform of images `(*, H, W)` to samples `(*, M)` along one trajectory, and back.

    It keeps what it has planned: make it once for a trajectory. May be used from several threads.

    Arguments:
        trajectory: real `(M, 2)`, (row, column) in cycles per field of view; k and k + N are the same frequency.
        shape: `(H, W)`.
        eps: relative error that FINUFFT aims at. None: in double precision 1e-12; in single 1e-6, or 5e-5 for images of
            256 pixels and more, where FINUFFT's rounding of the points leaves 1e-5 or 2e-5 anyway, in half the time.
        backend: "finufft", "sparse" (fixed error of about 1e-5), or "auto".

    Raises:
        BadOption: an unknown backend, or "finufft" where it is not installed.
    """

    trajectory: Tensor
    shape: Shape
    eps: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise errors.BadOption(
                f"found {self.backend!r}", key="backend", help=errors.did_you_mean(self.backend, BACKENDS)
            )
        if self.backend == "finufft" and _finufft() is None:
            raise errors.BadOption("finufft is not installed", key="backend", help="pip install finufft, or use auto")

    def __call__(self, x: Tensor) -> Tensor:
        """Images → samples."""
        return _Linear.apply(x, self._forward, self._adjoint)

    def adjoint(self, y: Tensor) -> Tensor:
        """Samples → images, with ⟨A x, y⟩ = ⟨x, Aᴴ y⟩."""
        return _Linear.apply(y, self._adjoint, self._forward)

    def _forward(self, x: Tensor) -> Tensor:
        if self._uses_finufft(x):
            return self._execute(2, x, (self.trajectory.shape[0],), x.shape[:-2])
        forward, _, grid, inverse = self._gridding(x.real.dtype, x.device)
        return _columns(forward, fft2_raw(pad(x * inverse, grid)).flatten(-2))

    def _adjoint(self, y: Tensor) -> Tensor:
        if self._uses_finufft(y):
            return self._execute(1, y, self.shape, y.shape[:-1])
        _, adjoint, grid, inverse = self._gridding(y.real.dtype, y.device)
        return crop(ifft2_raw(_columns(adjoint, y).unflatten(-1, grid)), self.shape) * inverse

    def _uses_finufft(self, data: Tensor) -> bool:
        return self.backend != "sparse" and data.device.type == "cpu" and _finufft() is not None

    # ------------------------------------------------------------------------------ FINUFFT

    def _execute(self, kind: int, data: Tensor, end: tuple[int, ...], batch: torch.Size) -> Tensor:
        count = math.prod(batch)
        if count == 0:
            return data.new_zeros((*batch, *end))
        flat = data.detach().resolve_conj().contiguous().reshape(count, *data.shape[len(batch) :]).numpy()
        with self._lock:  # a plan has one work space
            out = torch.from_numpy(self._plan(kind, count, flat.dtype.name).execute(flat))
        return out.reshape(*batch, *end).mul_(math.prod(self.shape) ** -0.5)

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    @cached_property
    def _plans(self) -> dict[tuple[int, int, str], Any]:
        return {}

    def _plan(self, kind: int, count: int, dtype: str) -> Any:
        key = (kind, count, dtype)
        if key not in self._plans:
            single = dtype == "complex64"
            usual = (5e-5 if max(self.shape) >= 256 else 1e-6) if single else 1e-12
            # Less than rounding allows is no use, and makes FINUFFT complain on its own standard error.
            eps = max(self.eps or usual, 1e-6 if single else 1e-14)
            plan = _finufft().Plan(
                kind, self.shape, count, eps, -1 if kind == 2 else 1, dtype=dtype,
                # The small fine grid halves the time, and reaches only so far.
                upsampfac=1.25 if eps >= (3e-5 if single else 1e-8) else 2.0, nthreads=torch.get_num_threads(),
            )  # fmt: skip
            plan.setpts(*self._angles.astype("float32" if single else "float64"))
            self._plans[key] = plan
        return self._plans[key]

    @cached_property
    def _angles(self) -> np.ndarray:
        """2π k / N in [-π, π), `(2, M)`."""
        k = self.trajectory.detach().cpu().double()
        turns = k / torch.tensor(self.shape)
        return ((turns - (turns + 0.5).floor()) * (2 * math.pi)).T.contiguous().numpy()

    # ------------------------------------------------------------------------------ sparse matrices

    @cached_property
    def _griddings(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Shape, Tensor]]:
        return {}

    def _gridding(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Shape, Tensor]:
        """Interpolation matrix, its transpose, the fine grid, and the image factor that undoes the kernel."""
        if (dtype, device) not in self._griddings:
            with torch.inference_mode(False):
                self._griddings[dtype, device] = _kaiser_bessel(self._angles, self.shape, dtype, device)
        return self._griddings[dtype, device]


class _Linear(torch.autograd.Function):
    """y = A x for maps that autograd cannot see into: the derivative is the adjoint, and so on for ever."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Map, adjoint: Map) -> Tensor:
        ctx.maps = A, adjoint
        return A(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        A, adjoint = ctx.maps
        return _Linear.apply(gradients[0], adjoint, A), None, None


@lru_cache(maxsize=1)
def _finufft() -> Any:
    """The package, or None."""
    try:
        import finufft
    except ImportError:
        return None
    return finufft


_WIDTH, _OVERSAMPLING = 7, 1.5  # of the kernel, in steps of the fine grid, and of that grid


def _kaiser_bessel(
    angles: np.ndarray, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Shape, Tensor]:
    """See `NUFFT._gridding`.

    The kernel is φ(u) = I₀(β √(1 - (2u/J)²)); the image factor is 1 / φ̂. The even grid keeps the image centred at
    G / 2, so that shifting it to the origin is a factor (-1)^κ at grid frequency κ, which the matrix takes over.
    """
    half, beta = _WIDTH / 2, math.pi * math.sqrt((_WIDTH / _OVERSAMPLING * (_OVERSAMPLING - 0.5)) ** 2 - 0.8)
    weights, indices, factors = [], [], []
    grid = tuple(max(2 * math.ceil(n * _OVERSAMPLING / 2), 2 * math.ceil(half)) for n in shape)
    for turns, n, fine in zip(torch.from_numpy(angles) / (2 * math.pi), shape, grid, strict=True):
        at = turns * fine
        near = (at - half).ceil()[:, None] + torch.arange(_WIDTH)
        inside = (1 - ((near - at[:, None]) / half) ** 2).clamp(min=0).sqrt()
        weights.append(torch.special.i0(beta * inside) * (1 - 2 * (near % 2)))
        indices.append((near % fine).long())
        position = torch.arange(n, dtype=torch.float64) - n // 2
        z = (beta**2 - (2 * math.pi * half * position / fine) ** 2).to(torch.complex128).sqrt()
        hat = 2 * half * (torch.sinh(z) / z).real
        factors.append(math.sqrt(fine / n) / hat)
    m = angles.shape[1]
    columns = (indices[0][:, :, None] * grid[1] + indices[1][:, None, :]).reshape(m, -1)
    columns, order = columns.sort(1)
    values = (weights[0][:, :, None] * weights[1][:, None, :]).reshape(m, -1).gather(1, order)
    matrix = torch.sparse_coo_tensor(
        torch.stack((torch.arange(m).repeat_interleave(columns.shape[1]), columns.flatten())),
        values.flatten().to(dtype), (m, math.prod(grid)), check_invariants=True, is_coalesced=False,
    ).to(device)  # fmt: skip
    inverse = (factors[0][:, None] * factors[1]).to(dtype).to(device)
    return _compressed(matrix), _compressed(matrix.t()), (grid[0], grid[1]), inverse


def _compressed(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return matrix.coalesce().to_sparse_csr()


def _columns(matrix: Tensor, data: Tensor) -> Tensor:
    """A real sparse matrix `(P, Q)` times complex vectors `(*, Q)` → `(*, P)`."""
    batch = data.shape[:-1]
    # Real and imaginary parts are columns of their own: half the work of a complex matrix.
    parts = torch.view_as_real(data.resolve_conj().reshape(-1, data.shape[-1])).permute(1, 0, 2)
    product = matrix @ parts.reshape(data.shape[-1], -1)
    product = product.reshape(matrix.shape[0], -1, 2).permute(1, 0, 2).contiguous()
    return torch.view_as_complex(product).reshape(*batch, matrix.shape[0])


# ---------------------------------------------------------------------------------- Gram operator and weights


def gram_spectrum(
    trajectory: Tensor, shape: Shape, weights: Tensor | None = None, *, eps: float | None = None, backend: str = "auto"
) -> Tensor:
    """What turns AᴴWA into a convolution: AᴴWA x = `fourier.convolve(x, spectrum)`.

    AᴴWA is a Toeplitz matrix: its entry (n, n') depends on n - n' alone, p[n - n'] = 1/N Σ_m w_m exp(2πi k_m (n - n') / N).

    Arguments:
        trajectory: `(M, 2)`. shape: `(H, W)`. weights: w, real `(M,)`, or None for ones. eps, backend: see `NUFFT`.

    Returns:
        spectrum: real `(2H, 2W)`.

    Source: J. Fessler, S. Lee, V. Olafsson, H. Shi, D. Noll, "Toeplitz-based iterative image reconstruction for MRI
    with correction for magnetic field inhomogeneity" (2005).
    """
    (h, w), dtype = shape, torch.complex128 if trajectory.dtype == torch.float64 else torch.complex64
    # 2k on a grid of twice the size: the same frequencies, at positions from -N to N - 1.
    double = NUFFT(2 * trajectory, (2 * h, 2 * w), eps, backend)
    samples = torch.ones(trajectory.shape[0], dtype=dtype, device=trajectory.device)
    kernel = double.adjoint(samples if weights is None else weights.to(dtype)) * (2 / math.sqrt(h * w))
    kernel[0], kernel[:, 0] = 0, 0  # position -N has no mirror image, and no use: without it the spectrum is real
    # From the middle of the array to index 0; and from the orthonormal to the plain transform.
    spectrum = fft2_raw(torch.roll(kernel, (-h, -w), (0, 1))) * (2 * math.sqrt(h * w))
    return spectrum.real.contiguous()


def density_weights(trajectory: Tensor, shape: Shape, *, iterations: int = 10) -> Tensor:
    """Weights w ≥ 0 for which AᴴWA comes close to the identity, by Pipe and Menon's iteration.

        w ← w / (C w),    C_mm' = |⟨a_m, a_m'⟩|², a_m the rows of A, all of length 1

    Its fixed point C w = 1 minimises ‖AᴴWA - I‖ (Frobenius). A sample far from all others gets the weight 1, as on a
    grid; r samples of one frequency get 1/r each.

    Arguments:
        trajectory: `(M, 2)`. shape: `(H, W)`.

    Returns:
        weights: `(M,)`, in the precision of the trajectory. Remembered for the trajectories used last.

    Source: J. Pipe, P. Menon, "Sampling density compensation in MRI: rationale and an iterative numerical solution"
    (1999).
    """
    points = trajectory.detach().cpu().contiguous()
    found = _density_weights(points.numpy().tobytes(), points.dtype, (shape[0], shape[1]), iterations)
    return torch.tensor(found, dtype=trajectory.dtype, device=trajectory.device)


@lru_cache(maxsize=16)
def _density_weights(points: bytes, dtype: torch.dtype, shape: Shape, iterations: int) -> np.ndarray:
    (h, w) = shape
    trajectory = torch.frombuffer(bytearray(points), dtype=dtype).reshape(-1, 2)
    # |⟨a_m, a_m'⟩|² is the transform of a triangle: the box of the field of view, correlated with itself.
    double = NUFFT(2 * trajectory, (2 * h, 2 * w), 1e-3)
    rows, columns = (n - (torch.arange(2 * n) - n).abs() for n in shape)
    triangle = (rows[:, None] * columns) * (4 / (h * w))
    with torch.no_grad():
        weights = torch.ones(len(trajectory))
        for _ in range(iterations):
            overlap = double(triangle * double.adjoint(weights.to(torch.complex64))).real
            weights = weights / overlap.clamp(min=1e-3 * weights)
    return weights.numpy()


def calibration_block(kspace: Tensor, trajectory: Tensor, shape: Shape, *, size: int = 32) -> tuple[Tensor, Tensor]:
    """The centre of k-space on the grid, from samples off it: least squares on an image of few pixels.

    What was written for Cartesian data (coil maps, the scale of a slice) can then use it.

    Arguments:
        kspace: complex `(B, C, M)`. trajectory: `(B or 1, M, 2)`. shape: `(H, W)`.
        size: side of the block, at most the grid.

    Returns:
        kspace `(B, C, H, W)`, zero outside the block; mask `(1, 1, H, W)`, 1 inside.

    Raises:
        NoData: no sample lies there.
    """
    sides = tuple(min(size, n) for n in shape)
    small = (min(sides[0] + 8, shape[0]), min(sides[1] + 8, shape[1]))  # with a rim that the block does not keep
    half = torch.tensor(small, device=trajectory.device) / 2
    blocks = []
    for b in range(len(kspace)):
        k = trajectory[b if len(trajectory) > 1 else 0]
        inside = ((k >= -half) & (k < half)).all(1)
        if not bool(inside.any()):
            raise errors.NoData("no sample near zero frequency", key="trajectory", help="is its unit cycles per image?")
        k = k[inside]
        w = density_weights(k, small)
        spectrum = gram_spectrum(k, small, w)
        start = NUFFT(k, small).adjoint(kspace[b, :, inside] * w)
        # The weights make ten iterations plenty; frequencies that were not measured stay small.
        x = cg(lambda x, s=spectrum: convolve(x, s) + 1e-3 * x, start, iterations=10, tolerance=1e-3).value  # type: ignore[misc]
        blocks.append(pad(crop(fft2(x), sides), shape))
    mask = pad(torch.ones(sides, device=kspace.device), shape)
    return torch.stack(blocks), mask[None, None]
