"""The laws that members of a list obey, stated once; test files run them over every member."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunemri.operators import LinearOperator
from tunemri.scan import Scan
from tunemri.simulate import coil_maps, phantom

# Even, odd, one of each, and narrow: swapped axes and off-by-one centres show on at least one of them.
SHAPES = [(16, 16), (15, 21), (12, 17), (9, 24)]


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.complex64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inner(a: Tensor, b: Tensor) -> complex:
    """⟨a, b⟩ = Σ conj(a) b, in double precision. Shapes are compared first: flattening would hide an error."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return complex((a.detach().conj().to(torch.complex128) * b.detach().to(torch.complex128)).sum())


def size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().to(torch.complex128)))


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return size(a - b) / max(size(b), 1e-300)


def adjoint(A: LinearOperator, x: Tensor, y: Tensor, tolerance: float = 1e-6) -> None:
    """⟨A x, y⟩ = ⟨x, Aᴴ y⟩, and A.H.H is A."""
    left, right = inner(A(x), y), inner(x, A.H(y))
    assert abs(left - right) <= tolerance * size(A(x)) * size(y), (left, right)
    assert torch.equal(A.H.H(x), A(x))
    assert torch.equal(A.adjoint(y), A.H(y))


def gram(A: LinearOperator, x: Tensor, tolerance: float = 1e-6) -> None:
    """A.gram(x) = Aᴴ A x, also of the adjoint."""
    assert relative(A.gram(x), A.H(A(x))) <= tolerance
    y = A(x)
    assert relative(A.H.gram(y), A(A.H(y))) <= tolerance


def linear(A: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-5) -> None:
    """A(αx + z) = αA(x) + A(z), and A leaves its input alone."""
    z, alpha = random(tuple(x.shape), x.dtype, seed=7), 0.3 - 1.7j
    kept = x.clone()
    assert relative(A(alpha * x + z), alpha * A(x) + A(z)) <= tolerance
    assert torch.equal(x, kept)


def norm(A: LinearOperator, shape: tuple[int, int]) -> None:
    """A.norm() is the largest singular value of the matrix that A is; power iterations come from below."""
    columns = torch.eye(shape[0] * shape[1], dtype=torch.complex64).reshape(-1, 1, *shape)
    matrix = torch.stack([A(column).flatten() for column in columns], 1)
    exact = float(torch.linalg.svdvals(matrix)[0])
    assert 0.99 * exact <= A.norm() <= 1.0001 * exact, (A.norm(), exact)


def differentiable_twice(f: Callable[..., Tensor], *inputs: Tensor) -> None:
    """First and second derivatives against differences, in double precision."""
    arguments = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(f, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, arguments, fast_mode=True)


def lines(shape: tuple[int, int], every: int = 3) -> Tensor:
    """A small sampling mask `(1, 1, H, W)`: a dense centre, and every so many points elsewhere."""
    h, w = shape
    index = torch.arange(h)[:, None] + 2 * torch.arange(w)
    centre = (torch.arange(h) - h // 2).abs()[:, None].maximum((torch.arange(w) - w // 2).abs()) <= min(h, w) // 5
    return ((index % every == 0) | centre).float()[None, None]


def scan(
    shape: tuple[int, int], *, slices: int = 1, coils: int = 1, every: int = 3, seed: int = 0, noise: float = 0.0
) -> Scan:
    """A small simulated scan of different phantoms, with known maps where there are several coils."""
    from tunemri.fourier import fft2

    x = torch.stack([phantom(shape, seed=seed + b).to(torch.complex64) for b in range(slices)])
    csm = coil_maps(shape, coils, seed=seed)[None].to(torch.complex64) if coils > 1 else None
    mask = lines(shape, every)
    full = fft2(x[:, None] if csm is None else csm * x[:, None])
    full = full + noise * random(tuple(full.shape), seed=seed + 100)
    return Scan(kspace=full * mask, mask=mask, csm=csm, image_shape=shape, provenance="simulated: test")


def folder_state(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes: to show that a refusal changed nothing."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: Any, b: Any) -> bool:
    """Two records of tensors are identical, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
