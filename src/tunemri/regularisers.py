"""Energies R(x) that say what an image should look like, each with its value and a gradient, a proximal map, or both.

    value(x)       R(x), summed over the last axes, so `(*, H, W)` → `(*)`
    gradient(x)    ∇R(x) = ∂R/∂Re x + i ∂R/∂Im x, where R is smooth
    prox(v, step)  argmin_u ½‖u - v‖² + step · R(u), where that is cheap; `step` is a number or broadcasts against v

Images are complex (or real); real and imaginary part are regularised jointly, so the phase is free to turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .transforms import divergence, dwt, gradient, idwt, max_levels

__all__ = ["REGULARISERS", "Charbonnier", "Regulariser", "SmoothedL21", "TV", "Tikhonov", "Wavelet", "shrink_field"]

Step = float | Tensor

_TINY = 1e-30  # keeps 1/√0 out of values and derivatives; far below any squared magnitude that matters in float32


class Regulariser(Protocol):
    """What all members have; `gradient` and `prox` are there or not, see each."""

    def value(self, x: Tensor) -> Tensor:
        """R(x), `(*, H, W)` → `(*)`."""


@dataclass(frozen=True, kw_only=True)
class Tikhonov:
    """R(x) = ½‖x‖²."""

    def value(self, x: Tensor) -> Tensor:
        return _abs2(x).sum((-2, -1)) / 2

    def gradient(self, x: Tensor) -> Tensor:
        return x

    def prox(self, v: Tensor, step: Step) -> Tensor:
        return v / (1 + step)


@dataclass(frozen=True, kw_only=True)
class TV:
    """Isotropic total variation, R(x) = Σ_ij √(|(∇x)₀|² + |(∇x)₁|²)_ij.

    The proximal map is found on the dual, by accelerated projected gradients: u = v + div p, where p
    minimises ‖v + div p‖² under |p_ij| ≤ step.

    Arguments:
        iterations: of the dual problem.

    Source: A. Beck, M. Teboulle, "Fast gradient-based algorithms for constrained total variation image
    denoising and deblurring problems" (2009).
    """

    iterations: int = 100

    def value(self, x: Tensor) -> Tensor:
        return (_abs2(gradient(x)).sum(0) + _TINY).sqrt().sum((-2, -1))

    def prox(self, v: Tensor, step: Step) -> Tensor:
        p = q = torch.zeros_like(gradient(v))
        t = 1.0
        for _ in range(self.iterations):
            # 1/8 bounds ‖∇‖⁻² from below: the largest step of the dual that is safe.
            p_next = _clip(q + gradient(v + divergence(q)) / 8, step)
            t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
            q = p_next + (t - 1) / t_next * (p_next - p)
            p, t = p_next, t_next
        return v + divergence(p)


@dataclass(frozen=True, kw_only=True)
class Charbonnier:
    """Smoothed total variation, R(x) = Σ_ij √(|∇x|² + ε²)_ij - ε.

    Arguments:
        epsilon: edges below it are smoothed, those above it kept; in units of the image.
    """

    epsilon: float = 1e-2

    def value(self, x: Tensor) -> Tensor:
        return _smoothed_norm(_abs2(gradient(x)).sum(0), self.epsilon)

    def gradient(self, x: Tensor) -> Tensor:
        d = gradient(x)
        return -divergence(d * (_abs2(d).sum(0) + self.epsilon**2).rsqrt())


@dataclass(frozen=True, kw_only=True)
class Wavelet:
    """R(x) = ‖W x‖₁ for the orthonormal wavelet transform W of the image shifted by `shift` pixels.

    One shift alone leaves blocks in the image. Solvers draw another shift in every iteration (cycle spinning),
    which comes near the shift-invariant energy at the price of one transform.

    Arguments:
        wavelet: "haar", "db2" or "db4".
        levels: None for as many as leave 16 coarse pixels on the shorter side.

    Source: R. Coifman, D. Donoho, "Translation-invariant de-noising" (1995).
    """

    wavelet: str = "db2"
    levels: int | None = None

    def value(self, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        c = dwt(x.roll(shift, (-2, -1)), self._levels(x), self.wavelet)
        return (_abs2(c) + _TINY).sqrt().sum((-2, -1))

    def prox(self, v: Tensor, step: Step, shift: tuple[int, int] = (0, 0)) -> Tensor:
        levels = self._levels(v)
        c = _shrink(dwt(v.roll(shift, (-2, -1)), levels, self.wavelet), step)
        return idwt(c, levels, self.wavelet).roll((-shift[0], -shift[1]), (-2, -1))

    def _levels(self, x: Tensor) -> int:
        return max_levels((x.shape[-2], x.shape[-1]), 16) if self.levels is None else self.levels


@dataclass(frozen=True, kw_only=True)
class SmoothedL21:
    """Joint sparsity of feature maps `(*, C, H, W)`: R(x) = Σ_ij √(Σ_c |x_c|² + ε²)_ij - ε, `(*)`.

    Arguments:
        epsilon: half-width of the smoothing, in units of the features.
    """

    epsilon: float = 1e-2

    def value(self, x: Tensor) -> Tensor:
        return _smoothed_norm(_abs2(x).sum(-3), self.epsilon)

    def gradient(self, x: Tensor) -> Tensor:
        return x * (_abs2(x).sum(-3, keepdim=True) + self.epsilon**2).rsqrt()


REGULARISERS: dict[str, type[Regulariser]] = {
    "tikhonov": Tikhonov,
    "tv": TV,
    "charbonnier": Charbonnier,
    "wavelet": Wavelet,
    "l21": SmoothedL21,
}


def _abs2(x: Tensor) -> Tensor:
    """|x|², several times quicker than x.abs() ** 2 and smooth at zero."""
    return torch.addcmul(x.real * x.real, x.imag, x.imag) if x.is_complex() else x * x


def _smoothed_norm(squares: Tensor, epsilon: float) -> Tensor:
    """Σ √(s + ε²) - ε, without the cancellation of the two terms where s is small."""
    return (squares / ((squares + epsilon**2).sqrt() + epsilon)).sum((-2, -1))


def _shrink(x: Tensor, threshold: Step) -> Tensor:
    """Soft threshold: x (1 - threshold / |x|)₊."""
    threshold = torch.as_tensor(threshold, dtype=x.real.dtype, device=x.device)
    return x * (1 - threshold * (torch.maximum(_abs2(x), threshold * threshold) + _TINY).rsqrt())


def shrink_field(p: Tensor, threshold: Step) -> Tensor:
    """Each vector p_ij of a field `(2, *, H, W)` shortened by `threshold`: the prox of threshold · Σ_ij |p_ij|."""
    return p - _clip(p, threshold)


def _clip(p: Tensor, radius: Step) -> Tensor:
    """Each vector p_ij of a field `(2, *, H, W)` shortened to at most `radius`."""
    radius = torch.as_tensor(radius, dtype=p.real.dtype, device=p.device)
    return p * (radius * (torch.maximum(_abs2(p).sum(0), radius * radius) + _TINY).rsqrt())
