"""How good a setting is: held-out k-space, discrepancy, Stein's estimate, or the truth. Low scores are good."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..fourier import crop
from ..metrics import known, score
from ..operators import LinearOperator, Mask, encoding
from ..scan import Scan, select
from ..trajectories import readouts
from .base import Bench, Setting

__all__ = ["CRITERIA", "Asked", "Judge", "estimate_noise", "split"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    reference: Tensor | None
    metric: str
    seed: int
    splits: int
    fraction: float


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A criterion on one scan: the score of a setting, low is good, and a sentence about the best one."""

    score: Callable[[Setting], float]
    sentence: Callable[[float], str]


def _heldout(bench: Bench, asked: Asked) -> Judge:
    """The squared error of the image: over the gaps of the pattern from hidden samples, on the samples by SURE.

        Σ_k w_k (|A x̂_T - y|²_k - σ²) over hidden samples k, x̂_T made from the others; see `split` for w

    Where the noise is unknown the first part judges alone; it is nearly always the larger one.
    """
    generator = torch.Generator().manual_seed(asked.seed)
    on_grid = bench.scan.mask is not None
    if on_grid:
        trials = [[_hide_samples(bench, b, asked, generator)] for b in range(len(bench.y))]
    else:
        trials = [_hide_readouts(select(bench.scan, slice(b, b + 1)), asked, generator) for b in range(len(bench.y))]
    known_noise = bench.noise is not None and bool((bench.noise > 0).all())
    floor = bench.noise.square() * bench.y.shape[1] if bench.noise is not None else torch.zeros(len(bench.y))
    measured = _sure(bench, asked).score if known_noise and on_grid else lambda setting: 0.0

    def score(setting: Setting) -> float:
        total = 0.0
        for b, of_slice in enumerate(trials):
            for trial in of_slice:
                x = bench.image(b, trial.y, trial.A, setting)
                wrong = (trial.all_of(x) - trial.truth).abs().square().sum(1).double()
                total += float((trial.weight * (wrong - floor[b])).sum() * bench.scale[b] ** 2)
        return total / asked.splits + measured(setting)

    what = "samples" if on_grid else "readouts"

    def sentence(best: float) -> str:
        return f"predicts held-out k-space best ({asked.splits} times {asked.fraction:.0%} of the {what})"

    return Judge(score=score, sentence=sentence)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """Data `y` of `A` to reconstruct from; `all_of(x)` is then compared with `truth`, the weights saying where."""

    y: Tensor
    A: LinearOperator
    truth: Tensor
    all_of: LinearOperator
    weight: Tensor


def _hide_samples(bench: Bench, b: int, asked: Asked, generator: torch.Generator) -> _Trial:
    """All splits of a slice in one batch: its samples are independent of each other."""
    kept, weight = split(bench.mask[b], asked, generator)
    y, A = bench.y[b : b + 1], bench.A.sample(b)
    return _Trial(y=y * kept, A=Mask(kept) @ A, truth=y, all_of=A, weight=weight)


def _hide_readouts(one: Scan, asked: Asked, generator: torch.Generator) -> list[_Trial]:
    """One slice off the grid with whole readouts hidden: neighbours along a readout say nearly the same.

    Every cell of the grid that was met counts once, however often: the samples in it share its weight.

    Raises:
        BadOption: fewer than four readouts.
    """
    assert one.trajectory is not None
    k, (h, w) = one.trajectory[0], one.image_shape
    readout = readouts(k)
    count = int(readout[-1]) + 1
    if count < 4:
        raise errors.BadOption(
            f"{count} readouts in this trajectory, expected at least 4 to hide some",
            key="by",
            help="choose by reference",
        )
    size = k.new_tensor((h, w))
    cell = ((k.round() + size // 2) % size).long()
    index = cell[:, 0] * w + cell[:, 1]
    weight = (1 / torch.bincount(index, minlength=h * w).clamp(min=1).double())[index]
    number = max(1, round(asked.fraction * count))
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(1 + asked.splits * number // count)])
    trials = []
    for split in range(asked.splits):
        hidden = torch.isin(readout, order[split * number : (split + 1) * number].to(readout.device))
        seen, unseen = (replace(one, kspace=one.kspace[..., m], trajectory=k[m][None]) for m in (~hidden, hidden))
        trials.append(
            _Trial(
                y=seen.kspace,
                A=encoding(seen),
                truth=unseen.kspace,
                all_of=encoding(unseen),
                weight=weight[hidden] * (count / number),
            )  # fmt: skip
        )
    return trials


def split(mask: Tensor, asked: Asked, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks `(S, 1, H, W)` with a random part of the samples of `mask` `(1, H, W)` hidden, and weights `(S, H, W)` of those.

        w = (1 - p) / p,    p the local density of sampling

    Hidden samples stand for those that were never taken: with w their sum estimates the error over the gaps of the
    pattern, while the plain sum would judge by the dense centre alone. Where whole lines were measured, whole lines
    are hidden; the innermost samples never are, without them there is no image, nor those that stand for no gap. The
    splits take turns: no sample is hidden twice before all were, so that few lines are judged by many of them.

    Raises:
        BadOption: nothing may be hidden.
    """
    m = mask[0]
    h, w = m.shape
    rows, columns = bool((m == m[:, :1]).all()), bool((m == m[:1]).all())
    if rows == columns:  # points; or full sampling, which has no lines either
        rows = columns = False
    window = [2 * max(n // 32, 1) + 1 for n in (h, w)]
    p = F.avg_pool2d(m[None, None], window, stride=1, padding=[n // 2 for n in window], count_include_pad=False)[0, 0]
    weight = torch.ones_like(p) if bool((p == 1).all()) else (1 - p) / p.clamp(min=0.02)
    vertical, across = ((torch.arange(n, device=m.device) - n // 2).abs() <= max(n // 40, 1) for n in (h, w))
    inner = vertical[:, None] if rows else across if columns else vertical[:, None] & across
    spare = (m > 0) & ~inner & (weight > 0)
    spare = spare[:, :1] if rows else spare[:1] if columns else spare
    index = spare.flatten().nonzero().flatten()
    if not len(index):
        raise errors.BadOption("no sample beside the centre that could be hidden", key="by", help="choose by reference")
    number = max(1, round(asked.fraction * len(index)))
    turns = [torch.randperm(len(index), generator=generator) for _ in range(1 + asked.splits * number // len(index))]
    order = index[torch.cat(turns)[: asked.splits * number].to(index.device)].reshape(asked.splits, number)
    hidden = torch.zeros(asked.splits, spare.numel(), dtype=torch.bool, device=m.device).scatter_(1, order, True)
    hidden = hidden.reshape(asked.splits, *spare.shape)
    return (m * ~hidden)[:, None], weight.double() * (hidden & (m > 0)) * (len(index) / number)


def _discrepancy(bench: Bench, asked: Asked) -> Judge:
    """|log(‖A x̂ - y‖² / (M σ²))|, with M samples of all coils."""
    noise, source = _noise(bench)
    expected = float((bench.mask.flatten(1).sum(1) * (noise * bench.scale).square()).sum()) * bench.y.shape[1]

    def ratio(setting: Setting) -> float:
        found = 0.0
        for b in range(len(bench.y)):
            y, A = bench.y[b : b + 1], bench.A.sample(b)
            misfit = A(bench.image(b, y, A, setting)) - y
            found += float(misfit.abs().square().sum().double() * bench.scale[b] ** 2)
        return found / expected

    def sentence(best: float) -> str:
        return f"its residual is the nearest to the {source} noise, off by {math.expm1(best / 2):.1%}"

    return Judge(score=lambda setting: abs(math.log(max(ratio(setting), 1e-12))), sentence=sentence)


def _noise(bench: Bench) -> tuple[Tensor, str]:
    if bench.noise is not None and bool((bench.noise > 0).all()):
        return bench.noise, "known"
    noise = torch.stack([_outer_noise(y, m) for y, m in zip(bench.y, bench.mask, strict=True)])
    if not bool((noise > 1e-6).all()):
        raise errors.BadOption(
            "the noise is unknown, and the outermost samples hold none to estimate it from", key="discrepancy",
            help="k-space was filtered or zero-filled? use heldout-kspace",
        )  # fmt: skip
    return noise, "estimated"


def estimate_noise(scan: Scan) -> Tensor:
    """Standard deviation of the complex noise of each slice, from the outermost tenth of its samples.

        σ² = q₀.₂₅(|y|²) / -ln(1 - 0.25)

    |noise|² is exponentially distributed; a low quantile is hardly moved by what signal there is so far out. Signal
    there, and noise that was filtered away, still bias it: a known level is better.

    Arguments:
        scan: Cartesian.

    Returns:
        σ `(B,)` in k-space units.
    """
    assert scan.mask is not None
    masks = scan.mask.expand(len(scan), 1, *scan.image_shape)
    return torch.stack([_outer_noise(y, m) for y, m in zip(scan.kspace, masks, strict=True)])


def _outer_noise(y: Tensor, mask: Tensor) -> Tensor:
    h, w = y.shape[-2:]
    radius = torch.hypot((torch.arange(h) - h // 2)[:, None] / h, (torch.arange(w) - w // 2) / w).to(y.device)
    sampled = mask[0] > 0
    outer = sampled & (radius >= torch.quantile(radius[sampled], 0.9))
    return (torch.quantile(y[:, outer].abs().square().flatten().double(), 0.25) / -math.log(0.75)).sqrt()


def _sure(bench: Bench, asked: Asked) -> Judge:
    """‖A x̂ - y‖² - M σ² + 2 σ² Re⟨b, A x̂(y + ε b) - A x̂(y)⟩ / ε with one random b: the error in the measured range."""
    noise = bench.noise
    if noise is None or not bool((noise > 0).all()):
        raise errors.BadOption(
            "SURE needs white noise of a known level, and this scan does not say its noise_std", key="sure",
            help="use heldout-kspace, or give the scan its noise_std",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(asked.seed)
    probes = torch.randn(bench.y.shape, dtype=torch.complex64, generator=generator).to(bench.y) * bench.mask

    def score(setting: Setting) -> float:
        total = 0.0
        for b in range(len(bench.y)):
            y, A, probe, sigma = bench.y[b : b + 1], bench.A.sample(b), probes[b : b + 1], float(noise[b])
            epsilon = 0.1 * sigma
            fit, moved = A(bench.image(b, torch.cat((y, y + epsilon * probe)), A, setting)).split(1)
            divergence = float((probe.conj() * (moved - fit)).real.sum().double()) / epsilon
            misfit = float((fit - y).abs().square().sum().double())
            samples = float(bench.mask[b].sum()) * bench.y.shape[1]
            total += (misfit + sigma**2 * (2 * divergence - samples)) * float(bench.scale[b]) ** 2
        return total

    return Judge(score=score, sentence=lambda best: f"has the least estimated error in the measured range, {best:.3g}")


def _by_reference(bench: Bench, asked: Asked) -> Judge:
    if asked.reference is None:
        raise errors.NoData(
            "no ground truth to compare with", key="reference", help="pass --reference, or choose by heldout-kspace"
        )
    sign = -1 if known(asked.metric).higher_is_better else 1
    truth = asked.reference.cpu()

    def score_of(setting: Setting) -> float:
        image = crop(bench.images(setting).cpu(), truth.shape[-2:])
        return sign * score(image, truth, [asked.metric])[asked.metric]

    return Judge(score=score_of, sentence=lambda best: f"{asked.metric} {sign * best:.4g} is the best")


CRITERIA: dict[str, Callable[[Bench, Asked], Judge]] = {
    "heldout-kspace": _heldout,
    "discrepancy": _discrepancy,
    "sure": _sure,
    "reference": _by_reference,
    "diverse": _heldout,
}
