"""What concerns the receive coils: sensitivity maps, noise and its whitening, compression to fewer virtual coils.

Maps are estimated from the centre of k-space that every ordinary scan samples completely. Each function of `MAPS`
takes k-space `(B, C, H, W)` and its mask and returns maps `(B, C, H, W)` with Σ_c |S_c|² = 1 in every pixel, slice by
slice. `MAPS` lists them by the names that the command line takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import errors, fourier, solvers
from .fourier import fft2, ifft2
from .scan import Scan

__all__ = [
    "MAPS",
    "auto_maps",
    "complete_block",
    "completed_maps",
    "compress",
    "compress_scan",
    "espirit_maps",
    "estimate_covariance",
    "joint_gradients",
    "low_resolution_maps",
    "map_series",
    "nlinv_maps",
    "narrow_centre",
    "noise_covariance",
    "poorly_calibrated",
    "prewhiten",
    "roughness",
    "smooth",
    "thinly_sampled",
    "unit_maps",
    "walsh_maps",
    "whiten_scan",
]

_LEAST = 6  # side of the smallest block worth calling a calibration
_GRID = 96  # points per axis on which ESPIRiT's matrices are decomposed: nine times what their 11×11 terms need
_CENTRE = 64  # samples per axis from which nonlinear inversion finds maps of a few cycles
_WIDTH = 5.0  # of the weights of these cycles, which fall to 1/256 there
_FIELD = 1.25  # fields of view that maps are periodic over: objects may reach the edge, and coils on both sides differ
_ORDER = 12  # highest order of the Fourier series of maps over that field
_STEPS = 17  # of Gauss and Newton
_INNER = 20  # conjugate gradient steps in each, at most: with more, maps hang on the last digits of the data
_CALIBRATION = 24  # side of the block that ESPIRiT looks at
_ENOUGH = 12  # lines of a complete block: with fewer, ESPIRiT's kernel shrinks to what knows little of the coils
_VISIBLE = 0.05  # of the brightest pixel: what nobody may lose
_CHUNK = 2**22  # matrix entries decomposed at once: 32 MB, and a few times that for the products


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


def espirit_maps(
    kspace: Tensor,
    mask: Tensor,
    *,
    calibration: int = 24,
    kernel: int = 6,
    threshold: float = 1e-3,
    crop: float = 0.8,
    cut: bool = False,
) -> Tensor:
    """Maps under which the calibration data agree with themselves: the first set of ESPIRiT.

        W(p) S(p) = λ(p) S(p),    W_cd(p) = 1/k² Σ_ij P_(c,i)(d,j) e^{2πi p (i - j) / N}

    The k×k patches of the calibration block, all coils in one vector, span a small space; P projects onto it.
    Projecting every patch of k-space and averaging the overlaps multiplies the coil images at pixel p by the C×C
    matrix W(p). Data of one object come back unchanged, so their maps are the eigenvector of eigenvalue 1.

    W(p) is a Fourier series of 2k - 1 terms each way. It is decomposed on a grid of at most 96×96 and the maps are
    interpolated from there, which costs the same whatever the size of the image. The phase is the one nearest to
    `low_resolution_maps`, which varies smoothly.

    Outside the object λ falls and S means nothing. The low-resolution maps take over there, smoothly, as λ falls
    from `crop` to `crop` - 0.2: with them, an image that is dark stays an image that can be seen. `cut` makes the maps
    zero instead, as BART does, where λ < `crop` and the low-resolution image is darker than 5 % of its maximum. That
    takes unknowns away, which helps TV, but what is dim there is lost and disturbs the rest.

    The block is the largest complete one, see `complete_block`. Of a narrow block the kernel spans a third: enough
    patches must be left to tell signal from noise. Without a block of 6×6, the low-resolution maps are returned.

    Arguments:
        kspace: complex `(B, C, H, W)`, zero where not sampled.
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        calibration: largest side of the block, in samples, ≥ 1.
        kernel: side k of a patch, in samples, ≥ 2.
        threshold: energy, relative to the largest, below which a direction of the patches counts as noise, in [0, 1).
        crop: smallest eigenvalue of a pixel in the object, in [0, 1].
        cut: set the maps to zero outside the object.

    Returns:
        csm: complex `(B, C, H, W)`, Σ_c |S_c|² = 1, or 0 outside the object with `cut`.

    Raises:
        BadOption: an argument out of range.

    Source: M. Uecker, P. Lai, M. J. Murphy, P. Virtue, M. Elad, J. M. Pauly, S. S. Vasanawala, M. Lustig,
    "ESPIRiT: an eigenvalue approach to autocalibrating parallel MRI: where SENSE meets GRAPPA", 2014.
    """
    if kernel < 2:
        raise errors.BadOption(f"found {kernel}, expected a whole number ≥ 2", key="kernel")
    for name, value, good in (("threshold", threshold, 0 <= threshold < 1), ("crop", crop, 0 <= crop <= 1)):
        if not good:
            raise errors.BadOption(f"found {value}, expected a number from 0 to 1", key=name)
    shape = (kspace.shape[-2], kspace.shape[-1])
    maps = []
    for y, sampled in zip(kspace, mask.expand(len(kspace), -1, -1, -1), strict=True):
        sides = complete_block(sampled[0], shape, calibration=calibration)
        block = fourier.crop(y, sides or (0, 0))
        if not bool(block.any()):
            maps.append(low_resolution_maps(y[None], sampled[None], calibration=calibration)[0])
        else:
            k = tuple(min(kernel, (side + 2) // 3) for side in block.shape[-2:])
            maps.append(_espirit(block / block.abs().amax(), shape, k, threshold, crop, cut))
    return torch.stack(maps)


def nlinv_maps(kspace: Tensor, mask: Tensor, *, steps: int = _STEPS) -> Tensor:
    """Maps that explain the samples together with an image: regularised nonlinear inversion.

        min ‖M F(ρ c_j) - y_j‖² + αₙ (‖ρ‖² + N Σ_j ‖W g_j‖²),    c_j = P g_j Q,    αₙ = 2⁻ⁿ,  N samples

    in steps of Gauss and Newton from ρ = 1 and c = 0, with y scaled to a norm of 100; P, Q and W as in `map_series`
    leave the maps a few cycles, so that samples far from the centre can tell them from the image. That needs
    no complete block: where ESPIRiT has a few lines or none, these maps are far better.

    Maps so smooth are found from the central 64×64 samples, whatever the size of the image; the cost grows with the coils.

    Arguments:
        kspace: complex `(B, C, H, W)`, zero where not sampled.
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        steps: ≥ 1; the more, the finer the detail of the maps, and the more noise.

    Returns:
        csm: complex `(B, C, H, W)`, Σ_c |S_c|² = 1.

    Raises:
        BadOption: `steps` < 1.

    Source: M. Uecker, T. Hohage, K. T. Block, J. Frahm, "Image reconstruction by regularized nonlinear inversion: joint
    estimation of coil sensitivities and image content", 2008.
    """
    if steps < 1:
        raise errors.BadOption(f"found {steps}, expected a whole number ≥ 1", key="steps")
    shape = (kspace.shape[-2], kspace.shape[-1])
    sampled = mask.expand(len(kspace), 1, *shape)
    series = [_inverted(y, m, steps)[1] for y, m in zip(kspace, sampled, strict=True)]
    rows, columns, _ = map_series(shape, kspace.device)
    return _unit((rows @ torch.stack(series) @ columns).to(kspace.dtype))


def completed_maps(kspace: Tensor, mask: Tensor) -> Tensor:
    """ESPIRiT's maps of a centre of 24×24 samples, those that are missing filled in by nonlinear inversion.

        y + (1 - M) F(ρ c_j),    ρ and c as of `nlinv_maps`

    They may vary faster than those of `nlinv_maps`, where the measured samples of the centre say so.

    Arguments, Returns: as `nlinv_maps`.
    """
    shape = (kspace.shape[-2], kspace.shape[-1])
    side = (min(_CALIBRATION, shape[0]), min(_CALIBRATION, shape[1]))
    blocks = []
    for y, m in zip(kspace, mask.expand(len(kspace), 1, *shape), strict=True):
        rho, series = _inverted(y, m)
        rows, columns, _ = map_series((rho.shape[-2], rho.shape[-1]), y.device)
        guess = fourier.crop(fft2(rho * (rows @ series @ columns)), side).to(y)
        blocks.append(torch.where(fourier.crop(m, side) > 0, fourier.crop(y, side), guess))
    known = fourier.pad(torch.ones(1, 1, *side, device=mask.device), shape)
    return espirit_maps(fourier.pad(torch.stack(blocks), shape), known, calibration=_CALIBRATION)


def auto_maps(kspace: Tensor, mask: Tensor) -> Tensor:
    """ESPIRiT's maps of slices with a complete block of 12×12 or more, those of nonlinear inversion of the others.

    Arguments, Returns: as `nlinv_maps`.
    """
    shape = (kspace.shape[-2], kspace.shape[-1])
    sampled = mask.expand(len(kspace), -1, -1, -1)
    return torch.cat(
        [
            (nlinv_maps if narrow_centre(m[0], shape) else espirit_maps)(y[None], m[None])
            for y, m in zip(kspace, sampled, strict=True)
        ]
    )


def narrow_centre(mask: Tensor, shape: tuple[int, int]) -> bool:
    """Whether the centre has no complete block of 12×12, or as long as the axis where that is shorter: too little for ESPIRiT.

    Arguments:
        mask: real `(H or 1, W)`, 1 where sampled.
        shape: `(H, W)`.
    """
    block = complete_block(mask, shape) or (0, 0)
    return any(side < min(_ENOUGH, size) for side, size in zip(block, shape, strict=True))


MAPS: dict[str, Callable[..., Tensor]] = {
    "auto": auto_maps,
    "low-resolution": low_resolution_maps,
    "walsh": walsh_maps,
    "espirit": espirit_maps,
    "nlinv": nlinv_maps,
}


def complete_block(mask: Tensor, shape: tuple[int, int], *, calibration: int = 24) -> tuple[int, int] | None:
    """Sides of the largest block around zero frequency that is completely sampled, none longer than `calibration`.

    Arguments:
        mask: real `(H or 1, W)`, 1 where sampled.
        shape: `(H, W)`.
        calibration: largest side, in samples, ≥ 1.

    Returns:
        `(rows, columns)`; None where not even 6×6 (or the whole axis, where it is shorter) is complete.

    Raises:
        BadOption: `calibration` < 1.
    """
    if calibration < 1:
        raise errors.BadOption(f"found {calibration}, expected a whole number ≥ 1", key="calibration")
    h, w = shape
    sides = [torch.arange(1, min(calibration, size) + 1) for size in shape]
    first = [size // 2 - side // 2 for size, side in zip(shape, sides, strict=True)]
    # Gaps in the block of every size at once, from the counts over all rectangles that start at the origin.
    counts = F.pad((mask.expand(h, w) == 0).cpu().long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    (top, left), (bottom, right) = first, (start + side for start, side in zip(first, sides, strict=True))
    down = counts[bottom] - counts[top]
    gaps = down[:, right] - down[:, left]
    area = (gaps == 0) * sides[0][:, None] * sides[1]
    best = (int(area.argmax()) // len(sides[1]) + 1, int(area.argmax()) % len(sides[1]) + 1)
    if not bool(area.any()) or best[0] < min(_LEAST, h) or best[1] < min(_LEAST, w):
        return None
    return best


def poorly_calibrated(mask: Tensor, shape: tuple[int, int]) -> bool:
    """Whether some slice has neither a complete block nor three quarters of its central 8×8 samples.

    Maps then miss over a tenth of the coil images, and half where samples lie uniformly at random.

    Arguments:
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        shape: `(H, W)`.
    """
    return any(
        complete_block(m[0], shape) is None and float(fourier.crop(m.expand(1, *shape), (8, 8)).double().mean()) < 0.75
        for m in mask
    )


def thinly_sampled(mask: Tensor, shape: tuple[int, int]) -> bool:
    """Whether some slice has under 15 % of a quadrant of its central 16×16 samples, or no two neighbours along an axis.

    Nonlinear inversion then misses over a tenth of the coil images: what lies a period of the pattern apart looks the same.

    Arguments:
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled.
        shape: `(H, W)`.
    """
    for m in mask:
        centre = fourier.crop(m.expand(1, *shape), (min(16, shape[0]), min(16, shape[1])))[0] > 0
        along = [(centre[1:] & centre[:-1]).any(), (centre[:, 1:] & centre[:, :-1]).any()]
        if any(not bool(pairs) for pairs, size in zip(along, shape, strict=True) if size > 1):
            return True
        if min(float(q.double().mean()) for rows in centre.split(8) for q in rows.split(8, 1)) < 0.15:
            return True
    return False


def map_series(shape: tuple[int, int], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(P, Q, W) of maps P g Q that are smooth, and their weights: a few cycles over 5/4 of the field of view.

        P_xk = exp(2πi x k / (5/4 h)),    ‖W g‖²,    W_kl = (1 + (k² + l²) / (5/4 · 5)²)⁸,    k, l = −12 … 12

    Q likewise along columns; x counts from the middle. Over the field itself maps would be periodic, and coils on two sides of an
    object that reaches both edges are not alike.

    Arguments:
        shape: `(h, w)` of the image in pixels, its origin at h // 2, w // 2.

    Returns:
        P and Q complex128 `(h, 25)` and `(25, w)`, W double `(25, 25)`.

    Source: weights that grow with frequency are those of M. Uecker, T. Hohage, K. T. Block, J. Frahm (2008), see `nlinv_maps`.
    """
    order = torch.arange(2 * _ORDER + 1, device=device) - _ORDER

    def waves(size: int) -> Tensor:
        place = torch.arange(size, device=device) - size // 2
        return torch.exp(2j * torch.pi * (place[:, None] * order).double() / (size * _FIELD))

    k = (order.double() / _FIELD).square()
    return waves(shape[0]), waves(shape[1]).T, (1 + (k[:, None] + k) / _WIDTH**2).pow(8)


def roughness(maps: Tensor) -> Tensor:
    """F(σ) = ½ Σ |∇σ|² of maps that are zero all around the image, `(B, C, H, W)` → `(B,)` double.

    Without knowing the maps, this is what says that they vary slowly. See `smooth` for its proximal map.
    """
    framed = F.pad(torch.view_as_real(maps).movedim(-1, 2) if maps.is_complex() else maps, (1, 1, 1, 1))
    down, right = framed.diff(dim=-2)[..., 1:-1], framed.diff(dim=-1)[..., 1:-1, :]
    a, b = (d.square().flatten(1).sum(1, dtype=torch.float64) for d in (down, right))
    return (a + b) / 2


def smooth(maps: Tensor, weight: float | Tensor) -> Tensor:
    """The proximal map of `roughness`: argmin_σ ½‖σ - maps‖² + weight · F(σ), solved exactly by two sine transforms.

        σ = S (S maps / (1 + weight · w)),    w_kl = 4 - 2 cos(π (k+1) / (H+1)) - 2 cos(π (l+1) / (W+1))

    S is the orthonormal DST-I along both axes, which the zero frame calls for. It is applied as a matrix: at the
    sizes of images no slower than a fast transform of H + 1 points, and differentiable on any device.

    Arguments:
        maps: `(B, C, H, W)`, real or complex.
        weight: ≥ 0, one number or one that spreads over `(B, C)` from the left, such as `(B, 1, 1, 1)`.

    Source: M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023), where the
    maps are estimated together with the image.
    """
    real = torch.view_as_real(maps).movedim(-1, 0) if maps.is_complex() else maps
    rows, w_rows = _sines(real, maps.shape[-2])
    columns, w_columns = _sines(real, maps.shape[-1])
    spectrum = rows @ real @ columns / (1 + weight * (w_rows[:, None] + w_columns))
    solved = rows @ spectrum @ columns
    return torch.complex(solved[0], solved[1]) if maps.is_complex() else solved


def _sines(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The DST-I matrix, its own inverse, and the eigenvalues of the second difference with zeros at both ends."""
    # Whole numbers modulo the period first, or the large arguments would cost the sines their digits.
    k = torch.arange(1, size + 1, device=like.device)
    angle = (k[:, None] * k % (2 * (size + 1))).double() * (math.pi / (size + 1))
    waves = angle.sin() * math.sqrt(2 / (size + 1))
    return waves.to(like.dtype), (2 - 2 * (k.double() * (math.pi / (size + 1))).cos()).to(like.dtype)


def unit_maps(c: Tensor, *, least: float = 1e-6) -> Tensor:
    """ĉ = c / max(|c|, least) with |c|² = Σ_c |c_c|²: maps that an optimiser may scale as it likes.

    The image then carries the whole brightness, and nothing is gained by shrinking it while the maps grow.

    Arguments:
        c: complex `(B, C, H, W)`.
        least: |c| below which a pixel has no maps; keeps ĉ finite where c vanishes.
    """
    return c / _rss(c).clamp(min=least)


def joint_gradients(x: Tensor, c: Tensor, r: Tensor, *, least: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Derivatives of ½‖A(x ĉ) - y‖² in the image and in the maps before `unit_maps`.

        ∂x = Σ_c ĉ_c* r_c,    ∂c = (g - ĉ Re⟨ĉ, g⟩) / |c|,    g = x* r

    as ∂f/∂Re + i ∂f/∂Im. Where |c| < least, ∂c = g / least.

    Arguments:
        x: image `(B, H, W)`, real or complex; ∂x is of the same kind.
        c: complex `(B, C, H, W)`.
        r: Aᴴ(A(x ĉ) - y), complex `(B, C, H, W)`: the residual as coil images, before the coils are combined.
        least: as given to `unit_maps`.
    """
    unit, size = unit_maps(c, least=least), _rss(c)
    slope_x = (unit.conj() * r).sum(1)
    g = x[:, None].conj() * r
    radial = (unit.conj() * g).real.sum(1, keepdim=True)
    slope_c = (g - unit * torch.where(size >= least, radial, torch.zeros_like(radial))) / size.clamp(min=least)
    return (slope_x if x.is_complex() else slope_x.real), slope_c


def _rss(c: Tensor) -> Tensor:
    return torch.linalg.vector_norm(c, dim=1, keepdim=True)


def noise_covariance(noise: Tensor) -> Tensor:
    """Covariance of the receivers from samples that hold noise alone, Ψ = 1/n Σ n nᴴ.

    Arguments:
        noise: complex `(B, C, *)`, from an acquisition without excitation.

    Returns:
        covariance: complex, Hermitian `(C, C)`.

    Raises:
        NoData: fewer than C samples per coil, which leave the covariance singular.
    """
    n = _samples(noise)
    if n.shape[1] < len(n):
        raise errors.NoData(f"found {n.shape[1]} samples of {len(n)} coils, expected as many or more", key="noise")
    return n @ n.mH / n.shape[1]


def estimate_covariance(kspace: Tensor, mask: Tensor | None = None, *, share: float = 0.1) -> Tensor:
    """Covariance of the noise from the outermost samples of a scan, where there is least signal.

        Ψ ← C/n Σ y yᴴ / (yᴴ Ψ⁻¹ y)

    Each sample counts by its direction only (Tyler), so that a few with signal cannot spoil it; the level is set
    by the median of yᴴ Ψ⁻¹ y, as the median absolute deviation does for one coil. What signal remains out there is
    taken for noise: an upper estimate, good where k-space reaches the noise floor.

    Arguments:
        kspace: complex `(B, C, H, W)`, zero where not sampled.
        mask: real `(B or 1, 1, H or 1, W)`, 1 where sampled; None takes every sample that is not zero.
        share: of the samples, the outermost, to use; in (0, 1].

    Returns:
        covariance: complex, Hermitian `(C, C)`, one for all slices: the receivers are the same.

    Raises:
        NoData: fewer than 10 C of those samples hold anything (a scanner that filled up with zeros, say).
        BadOption: `share` out of range.

    Source: D. E. Tyler, "A distribution-free M-estimator of multivariate scatter", 1987.
    """
    if not 0 < share <= 1:
        raise errors.BadOption(f"found {share}, expected a number in (0, 1]", key="share")
    b, c, h, w = kspace.shape
    y, x = ((torch.arange(size, device=kspace.device) - size // 2) / size for size in (h, w))
    sampled = kspace.abs().amax(1) > 0
    if mask is not None:
        sampled &= mask.expand(b, -1, h, w)[:, 0] > 0
    radius = torch.where(sampled, (y[:, None] ** 2 + x**2).sqrt(), -1.0)
    count = min(math.ceil(share * int(sampled.sum())), 20_000)
    if count < 10 * c:
        raise errors.NoData(
            f"{count} outer samples of {c} coils hold data, expected at least {10 * c}", key="kspace",
            help="give the covariance of a noise acquisition, or a larger share",
        )  # fmt: skip
    outer = _samples(kspace)[:, radius.flatten().topk(count).indices].to(torch.complex128)
    psi = torch.eye(c, dtype=outer.dtype, device=outer.device)
    for _ in range(30):
        distance = (outer.conj() * torch.linalg.solve(psi, outer)).sum(0).real
        psi = c / count * (outer / distance) @ outer.mH
    distance = (outer.conj() * torch.linalg.solve(psi, outer)).sum(0).real
    # Of white noise in C coils the distance is a Gamma variable of shape C; this is its median.
    psi = psi * distance.median() / (c - 1 / 3 + 8 / (405 * c))
    return psi.to(kspace.dtype)


def prewhiten(kspace: Tensor, covariance: Tensor) -> Tensor:
    """Combine the coils to ones whose noise is uncorrelated and of unit variance: L⁻¹ y with Ψ = L Lᴴ.

    Arguments:
        kspace: complex `(B, C, *)`.
        covariance: Ψ, Hermitian `(C, C)`, see `noise_covariance` and `estimate_covariance`.

    Returns:
        the same shape, in units of the noise.

    Raises:
        InconsistentShapes: not C×C. BadOption: not positive definite.
    """
    return _mix(_whitening(covariance, kspace.shape[1]), kspace)


def whiten_scan(scan: Scan, covariance: Tensor | None = None) -> Scan:
    """A scan with noise that is uncorrelated and equal in all coils, at the level of their geometric mean.

    Arguments:
        scan: what was measured; its maps, where known, are carried along.
        covariance: of the noise, `(C, C)`; None estimates it from the outer k-space.

    Raises:
        As `prewhiten` and `estimate_covariance`; MissingKey: non-Cartesian data without a covariance.
    """
    if covariance is None:
        if scan.trajectory is not None:
            raise errors.MissingKey("non-Cartesian data need the covariance of their noise", key="covariance")
        covariance = estimate_covariance(scan.kspace, scan.mask)
    W = _whitening(covariance, scan.coils)
    noise_std = float(W.diagonal().abs().double().log().mean().neg().exp())
    return _mixed(scan, W * noise_std, noise_std)


def compress(kspace: Tensor, coils: int) -> Tensor:
    """The few combinations of the coils that hold most of the energy: Uᴴ y, from the singular vectors of each slice.

    The combinations are orthonormal, so white noise stays white.

    Arguments:
        kspace: complex `(B, C, *)`.
        coils: how many to keep, ≥ 1; C or more changes nothing.

    Returns:
        virtual coils `(B, min(coils, C), *)`, the strongest first.

    Raises:
        BadOption: `coils` < 1.

    Source: M. Buehrer, K. Pruessmann, P. Boesiger, S. Kozerke, "Array compression for MRI with large coil arrays",
    2007.
    """
    return kspace if coils >= kspace.shape[1] else _mix(_compression(kspace, coils), kspace)


def compress_scan(scan: Scan, coils: int) -> Scan:
    """A scan with at most `coils` virtual coils, see `compress`; its maps, where known, are carried along."""
    return scan if coils >= scan.coils else _mixed(scan, _compression(scan.kspace, coils), scan.noise_std)


def _samples(kspace: Tensor) -> Tensor:
    """`(B, C, *)` → `(C, all samples)`."""
    return kspace.movedim(1, 0).flatten(1)


def _whitening(covariance: Tensor, coils: int) -> Tensor:
    if covariance.shape != (coils, coils):
        raise errors.InconsistentShapes(
            f"found {tuple(covariance.shape)}, expected ({coils}, {coils}): one row per coil", key="covariance"
        )
    L, failed = torch.linalg.cholesky_ex(covariance.to(torch.complex128))
    if bool(failed) or not bool(torch.isfinite(torch.view_as_real(L)).all()):
        raise errors.BadOption(
            "not positive definite", key="covariance", help="a dead coil, or fewer noise samples than coils?"
        )
    return torch.linalg.solve_triangular(L, torch.eye(coils).to(L), upper=False)


def _compression(kspace: Tensor, coils: int) -> Tensor:
    """Uᴴ `(B, coils, C)` of the dominant singular vectors of each slice."""
    if coils < 1:
        raise errors.BadOption(f"found {coils}, expected a whole number ≥ 1", key="coils")
    y = kspace.flatten(2)
    y = y / y.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(y.real.dtype).tiny)
    U = torch.linalg.eigh((y @ y.mH).to(torch.complex128)).eigenvectors.flip(-1)[..., :coils]
    # A singular vector has no phase of its own: make its largest entry positive, whatever the library returned.
    largest = U.gather(1, U.abs().argmax(1, keepdim=True))
    return (U * (largest.conj() / largest.abs())).mH


def _mix(combine: Tensor, x: Tensor) -> Tensor:
    """Combinations `(B or 1, C', C)` of the coils of `(B, C, *)`."""
    return (combine.to(x) @ x.flatten(2)).reshape(x.shape[0], -1, *x.shape[2:])


def _mixed(scan: Scan, combine: Tensor, noise_std: float | None) -> Scan:
    csm = None if scan.csm is None else _mix(combine, scan.csm.expand(len(scan), -1, -1, -1))
    return replace(scan, kspace=_mix(combine, scan.kspace), csm=csm, noise_std=noise_std)


def _low_resolution_images(kspace: Tensor, mask: Tensor, calibration: int) -> Tensor:
    h, w = kspace.shape[-2:]
    windows = torch.stack([_window(m[0], (h, w), calibration) for m in mask])
    return ifft2(kspace * windows[:, None].to(kspace.real.dtype))


def _window(mask: Tensor, shape: tuple[int, int], calibration: int) -> Tensor:
    """Hann window `(H, W)` over the calibration block, or over a block of full width with its gaps."""
    block = complete_block(mask, shape, calibration=calibration)
    rows, columns = block or (min(calibration, size) for size in shape)
    return fourier.pad(_hann(rows)[:, None] * _hann(columns), shape).to(mask.device)


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


def _espirit(
    block: Tensor, shape: tuple[int, int], k: tuple[int, ...], threshold: float, crop: float, cut: bool
) -> Tensor:
    """Maps `(C, H, W)` of one slice from its calibration block `(C, h, w)`, scaled to a maximum of 1."""
    c, height, width = block.shape
    grid = [min(size, _GRID) for size in shape]
    coefficients = _projection(block, k, threshold)
    low = _synthesis(block * (_hann(height)[:, None] * _hann(width)).to(block), grid)
    rss = low.abs().square().sum(0).sqrt()
    pieces = []
    step = max(1, _CHUNK // (c * c * grid[1]))
    for top in range(0, grid[0], step):
        rows = slice(top, top + step)
        W = _synthesis(coefficients, grid, rows).permute(2, 3, 0, 1)  # (rows, columns, C, C)
        power = W
        for _ in range(6):  # W^64: what differs by 5 % in eigenvalue differs by 10³ in energy
            power = power / _trace(power).clamp(min=1e-30)
            power = power @ power
        # The projection of the low-resolution maps onto the eigenvector has the phase that we want it to have.
        s = power @ low[:, rows].permute(1, 2, 0)[..., None]
        s = s / torch.linalg.vector_norm(s, dim=-2, keepdim=True).clamp(min=1e-30)
        eigenvalue = (s.mH @ W @ s).real[..., 0]
        pieces.append(torch.cat((s[..., 0], eigenvalue), -1).permute(2, 0, 1))
    found = torch.cat(pieces, 1)
    s, eigenvalue = found[:c], found[c].real
    if not cut:
        inside = ((eigenvalue - crop) / 0.2 + 1).clamp(0, 1)
        s = inside * s + (1 - inside) * _unit(low[None])[0]
    planes = torch.cat((s.real, s.imag, eigenvalue[None], rss[None]))
    planes = _cubic(shape[0], grid[0]).to(planes) @ planes @ _cubic(shape[1], grid[1]).to(planes).T
    csm = _unit(torch.complex(planes[:c], planes[c : 2 * c])[None])[0]
    return csm * ((planes[-2] >= crop) | (planes[-1] > _VISIBLE * rss.amax())) if cut else csm


def _inverted(y: Tensor, mask: Tensor, steps: int = _STEPS) -> tuple[Tensor, Tensor]:
    """ρ `(1, h, w)` of the central samples of one slice and the series of c `(C, n, n)`, by nonlinear inversion.

    In double precision, for seventeen steps of a few conjugate gradients each make much of rounding.
    """
    grid = (min(y.shape[-2], _CENTRE), min(y.shape[-1], _CENTRE))
    there, back = (-(grid[0] // 2), -(grid[1] // 2)), (grid[0] // 2, grid[1] // 2)  # index 0 is the origin in between
    y = fourier.crop(y, grid).roll(there, (-2, -1)).to(torch.complex128)
    mask = fourier.crop(mask, grid).roll(there, (-2, -1)).double()
    rows, columns, W = map_series(grid, y.device)
    rows, columns = rows.roll(there[0], 0), columns.roll(there[1], 1)
    W = W * math.sqrt(math.prod(grid))

    def spread(g: Tensor) -> Tensor:
        return rows @ (g / W) @ columns

    def gathered(c: Tensor) -> Tensor:
        return rows.mH @ c @ columns.mH / W

    scale = torch.linalg.vector_norm(y).clamp(min=torch.finfo(torch.float32).tiny) / 100
    y = y / scale

    def step(u: tuple[Tensor, Tensor], alpha: float) -> tuple[Tensor, Tensor]:
        """u and what Gauss and Newton add to it."""
        rho, g = u
        c = spread(g)

        def adjoint(r: Tensor) -> tuple[Tensor, Tensor]:
            x = fourier.ifft2_raw(r)
            return (c.conj() * x).sum(0, keepdim=True), gathered(rho.conj() * x)

        def packed(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat((a.flatten(), b.flatten()))[None]

        def parts(d: Tensor) -> tuple[Tensor, Tensor]:
            return d[0, : rho.numel()].view_as(rho), d[0, rho.numel() :].view_as(g)

        def normal(d: Tensor) -> Tensor:
            a, b = parts(d)
            return packed(*adjoint(mask * fourier.fft2_raw(c * a + rho * spread(b)))) + alpha * d

        right = packed(*adjoint(y - mask * fourier.fft2_raw(rho * c))) - alpha * packed(*u)
        a, b = parts(solvers.cg(normal, right, iterations=_INNER, tolerance=0.1).value)
        return rho + a, g + b

    u = torch.ones_like(y[:1]), y.new_zeros(len(y), *W.shape)
    for n in range(steps):
        u = step(u, 0.5**n)
    return scale * u[0].roll(back, (-2, -1)), u[1] / W


def _projection(block: Tensor, k: tuple[int, ...], threshold: float) -> Tensor:
    """Σ_{i-j=Δ} P_(c,i)(d,j) / k², `(C, C, 2k-1, 2k-1)`: what W(p) is made of."""
    c = len(block)
    patches = block.unfold(1, k[0], 1).unfold(2, k[1], 1).permute(0, 3, 4, 1, 2).reshape(c * k[0] * k[1], -1)
    # The decomposition of the smaller of the two products gives the same space.
    tall = patches.shape[0] > patches.shape[1]
    energy, vectors = torch.linalg.eigh(patches.mH @ patches if tall else patches @ patches.mH)
    keep = energy > threshold * energy[-1]
    V = vectors[:, keep]
    if tall:
        V = patches @ V / energy[keep].sqrt()
    P = (V @ V.mH).reshape(c, *k, c, *k).flip(-2, -1)
    total = P.new_zeros(c, c, 2 * k[0] - 1, 2 * k[1] - 1)
    for i in range(k[0]):
        for j in range(k[1]):
            total[:, :, i : i + k[0], j : j + k[1]] += P[:, i, j]
    return total / (k[0] * k[1])


def _synthesis(coefficients: Tensor, grid: list[int], rows: slice = slice(None)) -> Tensor:
    """Fourier series `(…, n, m)`, zero frequency at n // 2, evaluated on (some rows of) a grid over the field of view."""
    waves = []
    for n, size in zip(coefficients.shape[-2:], grid, strict=True):
        place, order = torch.arange(size) - size // 2, torch.arange(n) - n // 2
        waves.append(torch.exp(2j * torch.pi * place[:, None] * order / size).to(coefficients))
    return waves[0][rows] @ coefficients @ waves[1].T


def _cubic(size: int, grid: int) -> Tensor:
    """Matrix `(size, grid)` of periodic cubic convolution between points centred at index N // 2; identity if equal."""
    place = (torch.arange(size) - size // 2) * (grid / size) + grid // 2
    t = ((place[:, None] - torch.arange(grid) + grid / 2) % grid - grid / 2).abs()
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]


def _unit(images: Tensor) -> Tensor:
    """Divide by the root sum of squares over coils; pixels without any signal get equal parts of each coil."""
    # Bring each slice near 1 first, so that squares neither overflow nor vanish.
    peak = images.abs().amax((1, 2, 3), keepdim=True)
    images = images / torch.where(peak > 0, peak, torch.ones_like(peak))
    rss = images.abs().square().sum(1, keepdim=True).sqrt()
    equal = torch.full_like(images, images.shape[1] ** -0.5)
    return torch.where(rss > 1e-12, images / rss.clamp(min=1e-12), equal)
