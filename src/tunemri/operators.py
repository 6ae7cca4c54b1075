"""Linear operators from image to measurement: `A(x)`, `A.H(y)`, `A.gram(x)`, `A @ B`, `A.norm()`.

An operator is an immutable value that holds tensors (a new mask is a new operator; nothing of it
enters a state dict). Images are complex `(*batch, H, W)`, coil data `(*batch, C, H, W)`; any leading
axes; everything is plain torch, so derivatives of every order exist in `x`, the maps and the data.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from . import errors
from .fourier import convolve, crop, fft2, fft2_raw, ifft2, ifft2_raw, phase_ramp, resized
from .nufft import NUFFT, density_weights, gram_spectrum
from .scan import Scan
from .solvers import power_iteration

__all__ = [
    "Cartesian",
    "Coils",
    "Downsample",
    "Fourier",
    "Identity",
    "LinearOperator",
    "Mask",
    "NonCartesian",
    "encoding",
]


class LinearOperator(abc.ABC):
    """A linear map between complex tensors; subclasses give the map and its adjoint."""

    in_shape: tuple[int, int] | None = None  # (H, W) of the image, where the operator fixes it

    @abc.abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Aᴴ y, with ⟨A x, y⟩ = ⟨x, Aᴴ y⟩."""

    @property
    def H(self) -> LinearOperator:
        """The adjoint as an operator."""
        return _Adjoint(self)

    def gram(self, x: Tensor) -> Tensor:
        """Aᴴ A x; subclasses override it where a shorter way exists."""
        return self.adjoint(self(x))

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """The composition x ↦ self(other(x))."""
        return _Composition(self, other)

    def sample(self, index: int) -> LinearOperator:
        """The operator of batch entry `index` (the batch axis stays, with length one)."""
        return self

    def preconditioned(self, y: Tensor) -> tuple[LinearOperator, Tensor]:
        """The same measurement as `(√W A, √W y)`, where AᴴWA is nearest the identity; by default as it is.

        AᴴWy is then an image, as Aᴴy is from a grid, and what a network that knows grids can work with. Least squares
        lose by it: oversampled frequencies no longer count for what they know.
        """
        return self, y

    def coarser(self, shape: tuple[int, int]) -> tuple[LinearOperator, Callable[[Tensor], Tensor]] | None:
        """(B, r), so that B x ≈ r(y) on a coarser grid over the same field of view, where A x ≈ y; None: not known, the default.

        x there is `fourier.resized(x, shape)`. Frequencies beyond those of the grid are left out, and maps taken to have
        none. White noise keeps its ratio to that of images: r scales it like `resized` does.
        """
        return None

    def norm(self) -> float:
        """Largest singular value, by 60 power iterations on AᴴA.

        Raises:
            BadOption: the operator does not fix an image shape.
        """
        if self.in_shape is None:
            raise errors.BadOption("this operator takes any image size, its norm needs one", key="norm")
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(1, *self.in_shape, dtype=torch.complex64, generator=generator)
        with torch.no_grad():
            return float(power_iteration(self.gram, start, iterations=60).max().sqrt())


@dataclass(frozen=True, eq=False)
class _Adjoint(LinearOperator):
    of: LinearOperator

    def __call__(self, x: Tensor) -> Tensor:
        return self.of.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.of(y)

    @property
    def H(self) -> LinearOperator:
        return self.of

    def sample(self, index: int) -> LinearOperator:
        return _Adjoint(self.of.sample(index))


@dataclass(frozen=True, eq=False)
class _Composition(LinearOperator):
    outer: LinearOperator
    inner: LinearOperator

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_shape", self.inner.in_shape or self.outer.in_shape)

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def gram(self, x: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.gram(self.inner(x)))

    def sample(self, index: int) -> LinearOperator:
        return _Composition(self.outer.sample(index), self.inner.sample(index))


class Identity(LinearOperator):
    """A x = x: denoising."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def norm(self) -> float:
        return 1.0


class Fourier(LinearOperator):
    """The centred orthonormal FFT of the last two axes."""

    def __call__(self, x: Tensor) -> Tensor:
        return fft2(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return ifft2(y)

    def gram(self, x: Tensor) -> Tensor:
        return x

    def norm(self) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """Multiplication of coil data `(*batch, C, H, W)` by a real mask `(B or 1, 1, H or 1, W)`."""

    mask: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.mask

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.mask

    def sample(self, index: int) -> LinearOperator:
        return Mask(_one(self.mask, index))

    def norm(self) -> float:
        return float(self.mask.abs().max())


@dataclass(frozen=True, eq=False)
class Coils(LinearOperator):
    """x `(*batch, H, W)` ↦ S_c x `(*batch, C, H, W)` for maps `csm` `(B or 1, C, H, W)`."""

    csm: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_shape", tuple(self.csm.shape[-2:]))

    def __call__(self, x: Tensor) -> Tensor:
        return self.csm * x.unsqueeze(-3)

    def adjoint(self, y: Tensor) -> Tensor:
        _same_coils(y, self.csm)
        return (self.csm.conj() * y).sum(-3)

    def sample(self, index: int) -> LinearOperator:
        return Coils(_one(self.csm, index))

    def norm(self) -> float:
        return float(self.csm.abs().square().sum(-3).max().sqrt())


@dataclass(frozen=True, eq=False)
class Downsample(LinearOperator):
    """Block means of `factor` × `factor` pixels, times `factor`: a low-resolution image for superresolution.

    The scaling makes A Aᴴ = I, so the adjoint is nearest-neighbour enlargement divided by `factor`.
    Sizes that `factor` does not divide are zero-padded at the end.

    Arguments:
        factor: block edge in pixels.
        shape: `(H, W)` of the full-resolution image.
    """

    factor: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_shape", self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        h, w = self.shape
        f = self.factor
        x = F.pad(x, (0, -w % f, 0, -h % f))
        blocks = x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f))
        return blocks.sum((-1, -3)) / f

    def adjoint(self, y: Tensor) -> Tensor:
        h, w = self.shape
        f = self.factor
        return y.repeat_interleave(f, -2).repeat_interleave(f, -1)[..., :h, :w] / f

    def norm(self) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class Cartesian(LinearOperator):
    """Multi-coil Cartesian sampling, A x = M F S x, with the FFT shifts folded into maps and mask.

    `F = D_out F₀ D_in` with F₀ the unshifted FFT (see `fourier.phase_ramp`), so A x = (M D_out) F₀ (S D_in) x
    needs no shift, and AᴴA needs D_in only. About twice as fast as `Mask @ Fourier @ Coils`, which it equals.

    Arguments:
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        csm: complex maps `(B or 1, C, H, W)`, or None for one uniform coil.
        shape: `(H, W)`; needed only where the mask varies along W alone and there are no maps.
    """

    mask: Tensor
    csm: Tensor | None = None
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        h, w = self.shape or tuple((self.mask if self.csm is None else self.csm).shape[-2:])
        object.__setattr__(self, "in_shape", (h, w))

    @cached_property
    def _maps(self) -> Tensor:
        assert self.in_shape is not None
        dtype = torch.complex128 if self.mask.dtype == torch.float64 else torch.complex64
        inner, _ = phase_ramp(self.in_shape, self.csm.dtype if self.csm is not None else dtype)
        inner = inner.to(self.mask.device)
        return inner[None] if self.csm is None else self.csm * inner

    @cached_property
    def _sampling(self) -> Tensor:
        assert self.in_shape is not None
        _, outer = phase_ramp(self.in_shape, self._maps.dtype)
        even = self.in_shape[0] % 2 == 0 and self.in_shape[1] % 2 == 0
        # Even sizes: the factor is ±1, and a real multiplication is cheaper than a complex one.
        return self.mask * (outer.real if even else outer).to(self.mask.device)

    @cached_property
    def _sampled(self) -> Tensor:
        # |M D_out|² = M² = M for a 0/1 mask; kept general for weighted masks.
        return self.mask.square().expand(*self.mask.shape[:-2], *(self.in_shape or ())).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return _scaled(fft2_raw(self._maps * x.unsqueeze(-3)), self._sampling)

    def adjoint(self, y: Tensor) -> Tensor:
        _same_coils(y, self._maps)
        image = ifft2_raw(y * self._sampling.conj())
        return _combine(image, self._maps)

    def gram(self, x: Tensor) -> Tensor:
        y = _scaled(fft2_raw(self._maps * x.unsqueeze(-3)), self._sampled)
        return _combine(ifft2_raw(y), self._maps)

    def sample(self, index: int) -> LinearOperator:
        csm = None if self.csm is None else _one(self.csm, index)
        one = Cartesian(_one(self.mask, index), csm, self.in_shape)
        # Hand down what is folded already, rather than fold again for each sample.
        vars(one).update({name: _one(getattr(self, name), index) for name in ("_maps", "_sampling", "_sampled")})
        return one

    def coarser(self, shape: tuple[int, int]) -> tuple[LinearOperator, Callable[[Tensor], Tensor]]:
        scale = _scale(self.in_shape, shape)
        rows, columns = (min(n, m) for n, m in zip(shape, self.mask.shape[-2:], strict=True))
        csm = None if self.csm is None else resized(self.csm, shape)
        return Cartesian(crop(self.mask, (rows, columns)), csm, shape), lambda y: scale * crop(y, shape)


@dataclass(frozen=True, eq=False)
class NonCartesian(LinearOperator):
    """Multi-coil sampling along a trajectory, A x = √W F S x, F the Fourier transform off the grid (see `nufft`).

    The Gram operator is a convolution on the double grid (Toeplitz), exact to the accuracy of the transform.
    Differentiable in image, maps and data, not in trajectory and weights.

    Arguments:
        trajectory: real `(B or 1, M, 2)`, (row, column) in cycles per field of view.
        csm: complex maps `(B or 1, C, H, W)`, or None for one uniform coil.
        shape: `(H, W)`; needed only where there are no maps.
        weights: W, real ≥ 0 `(B or 1, M)`, or None for the plain F S.
        eps, backend: see `nufft.NUFFT`.

    Raises:
        BadOption: neither maps nor shape.
    """

    trajectory: Tensor
    csm: Tensor | None = None
    shape: tuple[int, int] | None = None
    weights: Tensor | None = None
    eps: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.shape is None and self.csm is None:
            raise errors.BadOption("a trajectory does not tell the size of the image", key="shape")
        h, w = self.shape or tuple(self.csm.shape[-2:])  # type: ignore[union-attr]
        object.__setattr__(self, "in_shape", (h, w))

    @property
    def _size(self) -> tuple[int, int]:
        assert self.in_shape is not None
        return self.in_shape

    @cached_property
    def _transforms(self) -> tuple[NUFFT, ...]:
        return tuple(NUFFT(k, self._size, self.eps, self.backend) for k in self.trajectory)

    @cached_property
    def _spectrum(self) -> Tensor:
        count = len(self.trajectory) if self.weights is None else max(len(self.trajectory), len(self.weights))
        trajectories = self.trajectory.expand(count, -1, -1)
        weights = [None] * count if self.weights is None else self.weights.expand(count, -1)
        pairs = zip(trajectories, weights, strict=True)
        return torch.stack([gram_spectrum(k, self._size, w, eps=self.eps, backend=self.backend) for k, w in pairs])

    @cached_property
    def _root(self) -> Tensor | None:
        return None if self.weights is None else self.weights.sqrt()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-3)
        y = _each(self._transforms, x if self.csm is None else self.csm * x, -4, -3)
        return y if self._root is None else y * self._root

    def adjoint(self, y: Tensor) -> Tensor:
        coils, samples = 1 if self.csm is None else self.csm.shape[-3], self.trajectory.shape[-2]
        if y.ndim < 2 or y.shape[-2:] != (coils, samples):
            raise errors.InconsistentShapes(
                f"found data {tuple(y.shape)}, expected (…, {coils}, {samples}): coils, samples", key="kspace"
            )
        adjoints = [transform.adjoint for transform in self._transforms]
        image = _each(adjoints, y if self._root is None else y * self._root, -3, -4)
        return image.squeeze(-3) if self.csm is None else _combine(image, self.csm)

    def gram(self, x: Tensor) -> Tensor:
        if self.csm is None:
            return convolve(x, self._spectrum)
        # Coil by coil: one doubled grid at a time stays in the cache, which halves the time.
        return sum((s.conj() * convolve(s * x, self._spectrum) for s in self.csm.unbind(-3)), torch.zeros_like(x))

    def sample(self, index: int) -> LinearOperator:
        csm, weights = (None if v is None else _one(v, index) for v in (self.csm, self.weights))
        one = NonCartesian(_one(self.trajectory, index), csm, self.in_shape, weights, self.eps, self.backend)
        # Hand down what is planned already.
        transforms = self._transforms
        vars(one)["_transforms"] = transforms[index : index + 1] if len(transforms) > 1 else transforms
        if "_spectrum" in vars(self):
            vars(one)["_spectrum"] = _one(self._spectrum, index)
        return one

    def preconditioned(self, y: Tensor) -> tuple[LinearOperator, Tensor]:
        if self.weights is not None:
            return self, y
        weights = torch.stack([density_weights(k, self._size) for k in self.trajectory])
        one = NonCartesian(self.trajectory, self.csm, self.in_shape, weights, self.eps, self.backend)
        vars(one)["_transforms"] = self._transforms
        return one, y * weights.sqrt()[:, None]

    def coarser(self, shape: tuple[int, int]) -> tuple[LinearOperator, Callable[[Tensor], Tensor]]:
        scale = _scale(self.in_shape, shape)
        fine, coarse = (torch.tensor(n).to(self.trajectory) for n in (self._size, shape))
        k = self.trajectory - fine * (self.trajectory / fine + 0.5).floor()  # k and k + N are the same frequency
        inside = ((k >= -coarse / 2) & (k < coarse / 2)).all(-1).to(k.dtype)
        csm = None if self.csm is None else resized(self.csm, shape)
        weights = inside if self.weights is None else self.weights * inside
        one = NonCartesian(self.trajectory, csm, shape, weights, self.eps, self.backend)
        return one, lambda y: scale * y * inside[:, None]


def _each(maps: Sequence[Callable[[Tensor], Tensor]], data: Tensor, axis: int, out: int) -> Tensor:
    """One map on data that share it, or each batch entry (from `axis`, to `out`) through its own."""
    if len(maps) == 1:
        return maps[0](data)
    parts = data.expand(*data.shape[:axis], len(maps), *data.shape[axis + 1 :]).unbind(axis)
    return torch.stack([f(part) for f, part in zip(maps, parts, strict=True)], out)


def _scale(fine: tuple[int, int] | None, coarse: tuple[int, int]) -> float:
    """By what `resized` multiplies white noise."""
    assert fine is not None
    return math.sqrt(math.prod(coarse) / math.prod(fine))


def _scaled(y: Tensor, factor: Tensor) -> Tensor:
    """y · factor, in place where no gradient needs the old value."""
    same = torch.broadcast_shapes(y.shape, factor.shape) == y.shape
    return y.mul_(factor) if same and not (y.requires_grad or factor.requires_grad) else y * factor


def _combine(image: Tensor, maps: Tensor) -> Tensor:
    """Σ_c conj(S_c) x_c over the coil axis; without a sum for one coil."""
    product = image * maps.conj()
    return product.squeeze(-3) if product.shape[-3] == 1 else product.sum(-3)


def _one(x: Tensor, index: int) -> Tensor:
    return x[index : index + 1] if x.shape[0] > 1 else x


def _same_coils(y: Tensor, maps: Tensor) -> None:
    # Broadcasting one coil against four maps would give a wrong image without a word.
    if y.ndim < 3 or y.shape[-3:] != maps.shape[-3:]:
        raise errors.InconsistentShapes(
            f"found data {tuple(y.shape)}, expected (…, {', '.join(map(str, maps.shape[-3:]))}): coils, rows, columns",
            key="kspace",
        )


def encoding(scan: Scan) -> LinearOperator:
    """The operator A of a scan: y ≈ A x.

    Raises:
        MissingKey: several coils and no maps (estimate them: `tunemri.coils`).
    """
    if scan.csm is None and scan.coils > 1:
        raise errors.MissingKey(
            f"{scan.coils} coils and no sensitivity maps", key="csm", help="estimate them, e.g. --csm low-resolution"
        )
    if scan.trajectory is not None:
        return NonCartesian(scan.trajectory, scan.csm, scan.image_shape)
    assert scan.mask is not None
    return Cartesian(scan.mask.to(scan.kspace.real.dtype), scan.csm, scan.image_shape)
