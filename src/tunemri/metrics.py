"""How far an image is from its reference: functions of magnitude volumes, each one number.

An image here is a real tensor `(B, H, W)`: the B slices of *one* volume. PSNR and SSIM need to know how large a value
can get; as in fastMRI that `data_range` is the maximum of the whole volume's reference, so a dark slice is not judged
by a ruler of its own. To judge single slices of a volume, pass the volume's range along.

Magnitudes are never taken silently: a complex image is refused here, `score` takes the modulus and says so.
All sums run in double precision. For gradients use `losses`: these functions return plain floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from . import errors

__all__ = [
    "METRICS",
    "Metric",
    "complex_nrmse",
    "dice",
    "foreground",
    "hfen",
    "intensity_spline",
    "known",
    "mae",
    "nmse",
    "nrmse",
    "psnr",
    "rpsnr",
    "score",
    "shown",
    "ssim",
]


def psnr(image: Tensor, reference: Tensor, *, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 20 log₁₀ R - 10 log₁₀ mean (x̂ - x)², infinite for equal images.

    Arguments:
        image, reference: real `(B, H, W)`, one volume.
        data_range: R; None takes the maximum of `reference`.

    Raises:
        InconsistentShapes, UnsupportedLayout, NonFinite, NoData: see `score`.
    """
    x_hat, x = _pair(image, reference)
    top = _range(x, data_range)
    mse = float((x_hat - x).square().mean())
    return 20 * math.log10(top) - 10 * math.log10(mse) if mse > 0 else math.inf


def ssim(image: Tensor, reference: Tensor, *, data_range: float | None = None) -> float:
    """Structural similarity, mean over slices and over every place where the whole window fits.

    Uniform 7×7 window, K₁ = 0.01, K₂ = 0.03 and sample (n - 1) covariances, which are the settings of fastMRI and
    scikit-image. Images narrower than seven pixels get the largest odd window that fits, down to 3×3.

    Arguments:
        image, reference: real `(B, H, W)`, one volume, at least 3×3.
        data_range: None takes the maximum of `reference`.

    Raises:
        UnsupportedLayout: smaller than 3×3; and as `score`.

    Source: Z. Wang et al., 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    x_hat, x = _pair(image, reference)
    size = min(7, *x.shape[-2:])
    size -= 1 - size % 2
    if size < 3:
        raise errors.UnsupportedLayout(
            f"found images of {x.shape[1]}×{x.shape[2]}, SSIM needs at least 3×3", key="ssim"
        )
    top = _range(x, data_range)
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    unbiased = size**2 / (size**2 - 1)

    def local_mean(z: Tensor) -> Tensor:
        return avg_pool2d(z[:, None], size, stride=1)

    mu_hat, mu = local_mean(x_hat), local_mean(x)
    var_hat = unbiased * (local_mean(x_hat * x_hat) - mu_hat**2)
    var = unbiased * (local_mean(x * x) - mu**2)
    cov = unbiased * (local_mean(x_hat * x) - mu_hat * mu)
    similarity = (2 * mu_hat * mu + c1) * (2 * cov + c2) / ((mu_hat**2 + mu**2 + c1) * (var_hat + var + c2))
    return float(similarity.mean())


def nmse(image: Tensor, reference: Tensor) -> float:
    """Normalised squared error: ‖x̂ - x‖² / ‖x‖² over the volume `(B, H, W)`; 1 for a zero image."""
    x_hat, x = _pair(image, reference)
    return _ratio((x_hat - x).square().sum(), x.square().sum())


def nrmse(image: Tensor, reference: Tensor) -> float:
    """Normalised error: ‖x̂ - x‖ / ‖x‖ over the volume `(B, H, W)`, the square root of `nmse`."""
    return math.sqrt(nmse(image, reference))


def mae(image: Tensor, reference: Tensor) -> float:
    """Mean absolute error |x̂ - x| over the volume `(B, H, W)`, in the units of the image."""
    x_hat, x = _pair(image, reference)
    return float((x_hat - x).abs().mean())


def hfen(image: Tensor, reference: Tensor, *, normalise: bool = True) -> float:
    """High-frequency error norm: ‖LoG(x̂ - x)‖ / ‖LoG(x)‖, an error that only sees edges and fine detail.

    LoG is the Laplacian of a Gaussian, σ = 1.5 pixels on 15×15 support, mirrored at the borders.

    Arguments:
        image, reference: real `(B, H, W)`, one volume.
        normalise: False leaves out the divisor, as in the text (not the code) of Wang et al. 2022.

    Source: S. Ravishankar, Y. Bresler, 2011, "MR image reconstruction from highly undersampled k-space data by
    dictionary learning".
    """
    x_hat, x = _pair(image, reference)
    error = _laplacian_of_gaussian(x_hat - x).square().sum()
    return _ratio(error, _laplacian_of_gaussian(x).square().sum()) ** 0.5 if normalise else float(error.sqrt())


def rpsnr(image: Tensor, reference: Tensor, baseline: Tensor) -> float:
    """PSNR gained over a baseline (zero-filling), in dB, mean over the slices.

    Every slice of all three is first stretched to [0, 1] by its own minimum and maximum, which takes out any
    difference in scale and offset: use it for the HyperRecon landscapes, not to compare calibrated images.

    Arguments:
        image, reference, baseline: real `(B, H, W)`.

    Raises:
        NoData: a slice is constant, so it cannot be stretched; and as `score`.

    Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, 2022, "Computing multiple image reconstructions with a single
    hypernetwork".
    """
    x_hat, x = _pair(image, reference)
    x_base, _ = _pair(baseline, reference)
    gains = [
        psnr(a, r, data_range=1.0) - psnr(b, r, data_range=1.0)
        for a, b, r in zip(*(_stretch(z).split(1) for z in (x_hat, x_base, x)), strict=True)
    ]
    return sum(gains) / len(gains)


def dice(labels: Tensor, reference: Tensor, classes: Sequence[int]) -> dict[int, float]:
    """Dice overlap 2|A ∩ B| / (|A| + |B|) of two label maps, class → value.

    Arguments:
        labels, reference: integer `(B, H, W)`.
        classes: the labels to compare, without the background unless wanted. A class that neither map
            contains has no overlap to speak of and is left out of the answer.

    Raises:
        InconsistentShapes: the maps differ in shape.
        UnsupportedLayout: not integers.
    """
    if labels.shape != reference.shape:
        raise errors.InconsistentShapes(_shapes(labels, reference), key="labels")
    if any(z.is_floating_point() or z.is_complex() for z in (labels, reference)):
        raise errors.UnsupportedLayout(
            f"found {labels.dtype} and {reference.dtype}, expected integer labels",
            key="labels",
            help="take the argmax of class probabilities first",
        )
    overlap = {}
    for c in classes:
        a, b = labels == c, reference == c
        total = int(a.sum()) + int(b.sum())
        if total:
            overlap[int(c)] = 2 * int((a & b).sum()) / total
    return overlap


def foreground(reference: Tensor, threshold: float = 0.1) -> Tensor:
    """Where there is signal: |x| above `threshold` times its 99th percentile over the volume; boolean `(B, H, W)`."""
    magnitude = reference.abs().double()
    # kthvalue, for torch.quantile refuses more than 16 million values.
    top = magnitude.flatten().kthvalue(max(1, math.ceil(0.99 * magnitude.numel()))).values
    return magnitude > threshold * top


def complex_nrmse(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Normalised error of complex images, blind to one constant phase per slice.

        √( Σ_b min_φ ‖e^{iφ} x̂_b - x_b‖² / Σ_b ‖x_b‖² )     inside the mask

    Magnitude metrics hide phase errors; a global phase, however, means nothing and is what joint estimation of
    image and coils leaves open. The minimising e^{iφ} is the phase of ⟨x̂_b, x_b⟩.

    Arguments:
        image, reference: complex (or real) `(B, H, W)`.
        mask: boolean `(B, H, W)`; None takes `foreground(reference)`.

    Raises:
        InconsistentShapes, NonFinite, NoData: see `score`.
    """
    x_hat, x = _checked(image).to(torch.complex128), _checked(reference).to(torch.complex128)
    mask = foreground(x) if mask is None else mask
    for other in (x, mask):
        if other.shape != x_hat.shape:
            raise errors.InconsistentShapes(_shapes(x_hat, other), key="image")
    x_hat, x = x_hat * mask, x * mask
    inner = (x_hat.conj() * x).sum((1, 2), keepdim=True)
    turn = torch.where(inner.abs() > 0, inner / inner.abs().clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    return math.sqrt(_ratio((turn * x_hat - x).abs().square().sum(), x.abs().square().sum()))


def intensity_spline(
    images: Sequence[Tensor], references: Sequence[Tensor], *, knots: int = 5
) -> Callable[[Tensor], Tensor]:
    """The curve s from intensities of reconstructions to those of their references: a cubic spline of least squares.

        min_s Σ (s(|x̂|) - |x|)² over all pixels,    K knots at the quantiles 1/(K + 1), …, K/(K + 1) of |x̂|

    It takes out what intensities alone have wrong, such as a scale or the background that noise adds to magnitudes, and no
    blur. What it is used on must not be among `images`: see `evaluation.splined`. Beyond what it has seen it is level.

    Arguments:
        images, references: real or complex `(B, H, W)` each, pair by pair of one shape; shapes of pairs may differ.
        knots: K; those between which there are too few different intensities are left out.

    Returns:
        image → real image of the same shape.

    Raises:
        NoData: no image. BadOption: fewer than no knots. InconsistentShapes, UnsupportedLayout, NonFinite: see `score`.

    Source: M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023).
    """
    import numpy as np
    from scipy.interpolate import make_lsq_spline

    if knots < 0:
        raise errors.BadOption(f"found {knots} knots, expected 0 or more", key="knots")
    if not images or len(images) != len(references):
        raise errors.NoData(f"found {len(images)} images and {len(references)} references", key="image")
    for image, reference in zip(images, references, strict=True):
        if image.shape != reference.shape:
            raise errors.InconsistentShapes(_shapes(image, reference), key="image")
    x, y = (torch.cat([_checked(z).abs().double().cpu().flatten() for z in side]) for side in (images, references))
    # Pixels of one intensity are one point, as heavy as they are many: scipy wants rising abscissae.
    at, which, count = np.unique(x.numpy(), return_inverse=True, return_counts=True)
    mean = np.bincount(which, y.numpy()) / count
    lo, hi, degree = float(at[0]), float(at[-1]), min(3, len(at) - 1)

    def apply(image: Tensor) -> Tensor:
        v = _checked(image).abs()
        return torch.from_numpy(curve(v.double().cpu().numpy().clip(lo, hi))).to(v)

    if hi - lo <= 1e-6 * hi:  # one intensity, but for rounding: no slope can be told
        level = float(y.mean())
        curve: Callable[..., Any] = lambda v: np.full_like(v, level)  # noqa: E731
        return apply
    inner: list[float] = []
    start, end = degree + 1, len(at) - degree - 1  # each piece has as many points as a polynomial of its degree needs
    for knot in np.quantile(x.numpy(), np.arange(1, knots + 1) / (knots + 1)):
        place = int(np.searchsorted(at, knot))
        if start <= place <= end:
            inner.append(float(knot))
            start = place + degree + 1
    ends = [lo] * (degree + 1), [hi] * (degree + 1)
    curve = make_lsq_spline(at, mean, [*ends[0], *inner, *ends[1]], k=degree, w=np.sqrt(count))
    return apply


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric and how to read it.

    Arguments:
        function: `(image, reference) → float`, with `data_range=` if `ranged`.
        higher_is_better: which way is good.
        unit: "dB", "" for a pure number, or "image" for the units of the image.
        label: the name in tables and plots.
        ranged: whether it takes a `data_range`.
    """

    function: Callable[..., float]
    higher_is_better: bool
    unit: str
    label: str
    ranged: bool = False


METRICS = {
    "psnr": Metric(function=psnr, higher_is_better=True, unit="dB", label="PSNR", ranged=True),
    "ssim": Metric(function=ssim, higher_is_better=True, unit="", label="SSIM", ranged=True),
    "mae": Metric(function=mae, higher_is_better=False, unit="image", label="MAE"),
    "nmse": Metric(function=nmse, higher_is_better=False, unit="", label="NMSE"),
    "nrmse": Metric(function=nrmse, higher_is_better=False, unit="", label="NRMSE"),
    "hfen": Metric(function=hfen, higher_is_better=False, unit="", label="HFEN"),
}


def known(name: str) -> Metric:
    """The metric of that name.

    Raises:
        BadOption: no such metric; names the nearest.
    """
    if name not in METRICS:
        raise errors.BadOption(f"no metric {name!r}", key="metrics", help=errors.did_you_mean(name, METRICS))
    return METRICS[name]


def shown(name: str, value: float) -> str:
    """A value as people write it, in the digits that mean something: 34.21 dB, 0.9312, 0.01250."""
    m = known(name)
    return f"{value:.2f} {m.unit}" if m.unit == "dB" else f"{value:.4f}" if not m.unit else f"{value:.4g}"


def score(
    image: Tensor,
    reference: Tensor,
    names: Sequence[str] = ("psnr", "ssim", "mae", "nrmse", "hfen"),
    *,
    data_range: float | None = None,
) -> dict[str, float]:
    """Several metrics at once, name → value; complex images are judged by their magnitude.

    Arguments:
        image, reference: real or complex `(B, H, W)`, one volume, the same shape; never broadcast.
        names: keys of METRICS.
        data_range: for PSNR and SSIM; None takes the maximum of the reference.

    Raises:
        BadOption: an unknown metric, or a data_range that is not positive.
        InconsistentShapes: the shapes differ.
        UnsupportedLayout: not `(B, H, W)`.
        NonFinite: NaN or Inf in either.
        NoData: the reference is zero, so nothing can be measured against it.
    """
    x_hat, x = (z.abs() if z.is_complex() else z for z in (image, reference))
    chosen = {name: known(name) for name in names}
    return {
        name: m.function(x_hat, x, data_range=data_range) if m.ranged else m.function(x_hat, x)
        for name, m in chosen.items()
    }


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 3 or 0 in x.shape:
        raise errors.UnsupportedLayout(
            f"found shape {tuple(x.shape)}, expected (slices, rows, columns)",
            key="image",
            help="image[None] for a single slice",
        )
    if not bool(torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all()):
        raise errors.NonFinite("NaN or Inf in an image that was to be measured", key="image")
    return x.detach()


def _pair(image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both images in double precision, or the error that says why they cannot be compared."""
    if image.is_complex() or reference.is_complex():
        raise errors.UnsupportedLayout(
            "found a complex image, expected magnitudes", key="image", help="pass image.abs(), or call metrics.score"
        )
    if image.shape != reference.shape:
        raise errors.InconsistentShapes(_shapes(image, reference), key="image", help="crop the image to its reference")
    return _checked(image).double(), _checked(reference).double()


def _shapes(image: Tensor, reference: Tensor) -> str:
    return f"found {tuple(image.shape)} against a reference of {tuple(reference.shape)}, expected equal shapes"


def _range(x: Tensor, data_range: float | None) -> float:
    if data_range is not None:
        if not 0 < data_range < math.inf:
            raise errors.BadOption(f"found {data_range}, expected a positive number", key="data_range")
        return float(data_range)
    top = float(x.max())
    if top <= 0:
        raise errors.NoData("the reference has no positive value, so its data range is empty", key="reference")
    return top


def _ratio(error: Tensor, norm: Tensor) -> float:
    if float(norm) <= 0:
        raise errors.NoData("the reference has nothing to measure an error against (it is zero)", key="reference")
    return float(error / norm)


def _stretch(x: Tensor) -> Tensor:
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    if bool((high <= low).any()):
        raise errors.NoData("a slice is constant, so it cannot be stretched to [0, 1]", key="image")
    return (x - low) / (high - low)


def _laplacian_of_gaussian(x: Tensor, sigma: float = 1.5, radius: int = 7) -> Tensor:
    """g''(r) g(c) + g(r) g''(c) by two separable passes; `(B, H, W)` in and out."""
    t = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    g = torch.exp(-0.5 * (t / sigma) ** 2)
    g = g / g.sum()
    g2 = (t**2 / sigma**4 - 1 / sigma**2) * g
    x = x[:, None, _mirror(x.shape[1], radius, x.device)][..., _mirror(x.shape[2], radius, x.device)]

    def along(row: Tensor, col: Tensor) -> Tensor:
        return conv2d(conv2d(x, row[None, None, :, None]), col[None, None, None, :])

    return (along(g2, g) + along(g, g2))[:, 0]


def _mirror(size: int, radius: int, device: torch.device) -> Tensor:
    """Indices that extend an axis by mirrors (d c b a | a b c d | d c b a), however short it is."""
    i = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.where(i < size, i, 2 * size - 1 - i)
