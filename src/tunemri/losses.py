"""Training terms with one value per sample, their weights on the simplex, and the drawing of such weights.

    loss_b = Σ_k (w_k / s_k) L_k(x̂_b),    w ≥ 0, Σ_k w_k = 1

Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Computing Multiple Image Reconstructions with a Single
Hypernetwork" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import errors
from .transforms import dwt, gradient

__all__ = [
    "TERMS",
    "Result",
    "Term",
    "lambdas_from_weights",
    "sample_weights",
    "ssim_map",
    "terms",
    "weights_from_lambdas",
]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a term may look at.

    Arguments:
        x_hat: reconstruction, complex `(B, H, W)`.
        x: ground truth, complex `(B, H, W)`, or None in unsupervised training.
        y: measured data, complex `(B, …)`, or None.
        forward: x ↦ A x, or None.
        weights: generated network weights, name → `(B, …)`, or None.
    """

    x_hat: Tensor
    x: Tensor | None = None
    y: Tensor | None = None
    forward: Callable[[Tensor], Tensor] | None = None
    weights: Mapping[str, Tensor] | None = None

    def truth(self) -> Tensor:
        """The ground truth.

        Raises:
            MissingKey: there is none.
        """
        if self.x is None:
            raise errors.MissingKey("this loss term compares with a ground truth, and there is none", key="target")
        return self.x


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss term.

    Arguments:
        value: Result → `(B,)`.
        sentence: what it measures.
        low, high: the words for a little and for much of it.
        supervised: whether it needs a ground truth.
    """

    value: Callable[[Result], Tensor]
    sentence: str
    low: str = ""
    high: str = ""
    supervised: bool = False


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def mae(result: Result) -> Tensor:
    """mean | |x̂| − |x| |: the magnitude is what is looked at and scored."""
    return _mean((result.x_hat.abs() - result.truth().abs()).abs())


def mse(result: Result) -> Tensor:
    """mean |x̂ − x|², complex."""
    return _mean((result.x_hat - result.truth()).abs().square())


def ssim_map(a: Tensor, b: Tensor, data_range: Tensor) -> Tensor:
    """Local SSIM of real `(B, H, W)` over 7×7 windows, K₁ = 0.01, K₂ = 0.03, unbiased (co)variances.

    The fastMRI definition, so that what is trained is what is scored; images smaller than the window use
    the largest odd window that fits. Source: Z. Wang et al., "Image quality assessment: from error
    visibility to structural similarity" (2004).

    Arguments:
        data_range: `(B,)`, the range of b.
    """
    size = min(7, *(n - 1 + n % 2 for n in a.shape[-2:]))
    n = size * size
    unbiased = n / max(n - 1, 1)
    c1, c2 = ((k * data_range).square()[:, None, None] for k in (0.01, 0.03))
    # One pass over five stacked images instead of five passes.
    moments = F.avg_pool2d(torch.stack((a, b, a * a, b * b, a * b), 1), size, stride=1)
    mu_a, mu_b, aa, bb, ab = moments.unbind(1)
    var_a, var_b, cov = (unbiased * m for m in (aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b))
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))


def ssim(result: Result) -> Tensor:
    """1 − mean SSIM of the magnitudes; the range is the maximum of the truth."""
    x = result.truth().abs()
    data_range = x.flatten(1).amax(1).clamp(min=1e-6)
    return 1 - _mean(ssim_map(result.x_hat.abs(), x, data_range))


def dc(result: Result) -> Tensor:
    """‖A x̂ − y‖² / ‖y‖²: the acquired data, noise included; normalised so that dark images do not win."""
    if result.forward is None or result.y is None:
        raise errors.MissingKey("data consistency needs the measured data and their operator", key="y")
    misfit = (result.forward(result.x_hat) - result.y).abs().square().flatten(1).sum(1)
    energy = result.y.abs().square().flatten(1).sum(1)
    return misfit / torch.where(energy > 0, energy, torch.ones_like(energy))


def tv(result: Result) -> Tensor:
    """mean over pixels of |∂ᵢx̂| + |∂ⱼx̂|, anisotropic, real and imaginary part together."""
    return _mean(gradient(result.x_hat).abs().sum(0))


def wavelet(result: Result) -> Tensor:
    """mean |W x̂| of orthonormal Daubechies-4 coefficients over three levels."""
    return _mean(dwt(result.x_hat, levels=3, wavelet="db4").abs())


def l1_weights(result: Result) -> Tensor:
    """mean |θ| over the generated weights of that sample."""
    if not result.weights:
        raise errors.MissingKey("the weight penalty needs generated weights", key="weights")
    return torch.cat([w.flatten(1) for w in result.weights.values()], 1).abs().mean(1)


TERMS: dict[str, Term] = {
    "mae": Term(value=mae, sentence="mean absolute error", high="true intensities", supervised=True),
    "ssim": Term(value=ssim, sentence="loss of structural similarity", high="true structure", supervised=True),
    "mse": Term(value=mse, sentence="mean squared error", high="least squared error", supervised=True),
    "dc": Term(value=dc, sentence="misfit to the measured data", high="follows the data: sharper, noisier"),
    "tv": Term(value=tv, sentence="total variation", high="piecewise smooth"),
    "wavelet": Term(value=wavelet, sentence="wavelet sparsity", high="fewer wavelets"),
    "l1": Term(value=l1_weights, sentence="size of the generated weights", high="simpler network"),
}


def terms(names: Sequence[str]) -> list[Term]:
    """The named terms.

    Raises:
        BadOption: an unknown or repeated name, or none.
    """
    for name in names:
        if name not in TERMS:
            raise errors.BadOption(f"found {name!r}", key="terms", help=errors.did_you_mean(name, TERMS))
    if len(names) < 1 or len(set(names)) != len(names):
        raise errors.BadOption(f"found {list(names)}, expected different terms", key="terms")
    return [TERMS[name] for name in names]


def weights_from_lambdas(lambdas: Tensor) -> Tensor:
    """Dials `(B, K−1)` in [0, 1] → weights `(B, K)` on the simplex.

    w_K = λ_K, w_j = λ_j Π_{i>j} (1 − λ_i), w_1 = Π (1 − λ_i): for two terms (1 − λ, λ). Stick breaking from the last
    term, so the dial of term j is its share of what the later terms leave.
    """
    left = torch.ones_like(lambdas[:, 0])
    shares = []
    for share in reversed(lambdas.unbind(1)):
        shares.append(left * share)
        left = left * (1 - share)
    return torch.stack([left, *reversed(shares)], 1)


def lambdas_from_weights(weights: Tensor) -> Tensor:
    """The inverse: λ_j = w_j / (1 − Σ_{i>j} w_i); zero where the later terms leave nothing."""
    head = weights.cumsum(1)[:, 1:]  # Σ_{i≤j} w_i = 1 − Σ_{i>j} w_i
    return torch.where(head > 0, weights[:, 1:] / head.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)


def sample_weights(batch: int, count: int, generator: torch.Generator, *, faces: float = 0.2) -> Tensor:
    """Weights `(B, K)` drawn uniformly on the simplex, a share `faces` of them on its faces and corners.

    Uniform on [0, 1] per dial would starve the early terms (their mean weight halves with each later term);
    Dirichlet(1, …, 1) does not, and corners, of measure zero, are where users look first.
    """
    exponential = -torch.rand(batch, count, generator=generator).clamp(min=1e-12).log()
    keep = torch.rand(batch, count, generator=generator).argsort(1)
    size = torch.randint(1, count, (batch, 1), generator=generator) if count > 1 else torch.ones(batch, 1)
    face = torch.rand(batch, 1, generator=generator) < faces
    exponential = torch.where(face & (keep >= size), torch.zeros_like(exponential), exponential)
    return exponential / exponential.sum(1, keepdim=True)
