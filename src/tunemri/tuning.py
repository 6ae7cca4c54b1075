"""The settings worth looking at, with or without ground truth.

    choose       one setting (or a few) of a scan: by held-out k-space, noise level, SURE, a reference, or diversity
    adapt        the task weight of a trained model, from a few scans; and whether that pays
    diversify    k good images that differ most                range_basis  every setting of a dial from a dozen images
    sensitivity  what a small turn of a dial changes           range_map    what its whole range changes

All but `adapt` works with every method, for it only turns dials. Whatever is drawn at random is the same for all
settings of a scan, so that scores differ by the setting alone.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from . import errors
from .fourier import crop
from .methods.base import Dial, Reconstructor, prepare
from .metrics import known, score
from .operators import LinearOperator, Mask, encoding
from .scan import Scan, select
from .trajectories import readouts

__all__ = [
    "CRITERIA",
    "Adaptation",
    "Choice",
    "RangeBasis",
    "Sensitivity",
    "adapt",
    "choose",
    "diversify",
    "estimate_noise",
    "range_basis",
    "range_map",
    "sensitivity",
]

Setting = dict[str, float | str]
Progress = Callable[[int, int], None]
_GOLDEN = (math.sqrt(5) - 1) / 2
_EFFORT = 0.002  # dB that a task weight must gain for each unit it moves: far out, the error hardly depends on it


# ---------------------------------------------------------------- what all of them share


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """A prepared scan on which a model is tried: normalised data `y`, operator `A`, what undoes the scale, noise."""

    scan: Scan
    model: Reconstructor
    y: Tensor  # (B, C, H, W)
    mask: Tensor  # (B, 1, H, W); empty without a grid
    A: LinearOperator
    scale: Tensor  # (B,)
    noise: Tensor | None  # (B,), in the units of y
    facts: Sequence[Mapping[str, Any]]  # what the scan tells the method of each slice

    def images(self, dials: Mapping[str, Any]) -> Tensor:
        """Images `(B, H, W)` in the units of the scan, slice by slice as `reconstruct` makes them."""
        parts = [self.image(b, self.y[b : b + 1], self.A.sample(b), dials) for b in range(len(self.y))]
        return torch.cat(parts) * self.scale[:, None, None].to(parts[0].real.dtype)

    def image(self, b: int, y: Tensor, A: LinearOperator, dials: Mapping[str, Any]) -> Tensor:
        """What the method makes of y, data of slice b, with what else the scan tells it."""
        with torch.no_grad():
            image = self.model(y, A, **dials, **self.facts[b]).image
        if not bool(torch.isfinite(torch.view_as_real(image)).all()):
            raise errors.NonFinite(f"{type(self.model).__name__} gave NaN or Inf at {dict(dials)}", key="image")
        return image

    def start(self, given: Mapping[str, Any]) -> Setting:
        """A value for every dial: the given ones, checked, and what the method suggests for the first slice."""
        checked = self.model.check_dials(given)
        with torch.no_grad():
            suggested = self.model.suggest(self.y[:1], self.A.sample(0))
        return {**suggested, **{name: checked[name] for name in given}}


def _bench(scan: Scan, model: Reconstructor, csm: str, slices: Sequence[int] | None = None) -> _Bench:
    if not bool(scan.kspace.any()):
        raise errors.NoData("every sample is zero", key="kspace", help="is this the right dataset of the file?")
    ready = prepare(scan, csm=csm)
    for sentence in model.outside(ready):
        errors.warn(f"outside what the model was trained for: {sentence}", "wrong_model")
    assert ready.scale is not None and scan.scale is not None
    index = list(range(len(scan)) if slices is None else slices)

    def some(x: Tensor | None) -> Tensor | None:
        return x[index] if x is not None and len(x) > 1 else x

    judged = replace(
        ready, kspace=ready.kspace[index], mask=some(ready.mask), trajectory=some(ready.trajectory),
        csm=some(ready.csm), scale=ready.scale[index],
    )  # fmt: skip
    scale, mask = (ready.scale / scan.scale)[index], judged.mask
    model.eval()
    return _Bench(
        scan=judged,
        model=model,
        y=judged.kspace,
        mask=torch.empty(0) if mask is None else mask.expand(len(index), 1, *scan.image_shape),
        A=encoding(judged),
        scale=scale,
        noise=None if scan.noise_std is None else scan.noise_std / scale,
        facts=[model.knows(ready, b) for b in index],
    )


def _position(dial: Dial, value: float) -> float:
    """Where on its slider a value lies, in [0, 1]: the inverse of `Dial.at`."""
    if dial.hi == dial.lo:
        return 0.0
    if dial.scale == "log":
        return math.log(value / dial.lo) / math.log(dial.hi / dial.lo)
    return (value - dial.lo) / (dial.hi - dial.lo)


def _at(dial: Dial, position: float) -> float:
    """`Dial.at`, whose ends are the dial's own numbers: exp(log(lo)) is off by a rounding."""
    return dial.lo if position <= 0 else dial.hi if position >= 1 else dial.at(position)


def _numeric(model: Reconstructor, names: Sequence[str] | None = None) -> dict[str, Dial]:
    """The dials with a range: all of them, or the named ones.

    Raises:
        BadOption: there is none, an unknown name, or one that is not a number.
    """
    dials = model.dials
    ranged = {name: dial for name, dial in dials.items() if not dial.choices}
    for name in names or ():
        if name not in ranged:
            what = "not a number, it has no range" if name in dials else "no such dial"
            raise errors.BadOption(what, key=name, help=errors.did_you_mean(name, ranged))
    if not ranged or (names is not None and not names):
        raise errors.BadOption(f"{type(model).__name__} has no dial with a range", key="dials")
    return {name: ranged[name] for name in names or ranged}


# ---------------------------------------------------------------- one setting, with or without ground truth


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The setting that `choose` found, and why.

    Arguments:
        by: the criterion, a key of CRITERIA.
        dials: the chosen setting, every dial by name.
        picks: what to look at, the chosen setting first; one, or k for "diverse".
        rows: every setting that was tried, in the order of trying: {"dials": …, "score": …}; low scores are good.
        reason: one sentence.
    """

    by: str
    dials: Setting
    picks: tuple[Setting, ...]
    rows: tuple[dict[str, Any], ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Asked:
    reference: Tensor | None
    metric: str
    seed: int
    splits: int
    fraction: float


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """A criterion on one scan: the score of a setting, low is good, and a sentence about the best one."""

    score: Callable[[Setting], float]
    sentence: Callable[[float], str]


def choose(
    scan: Scan,
    model: Reconstructor,
    *,
    by: str = "heldout-kspace",
    reference: Tensor | None = None,
    metric: str = "psnr",
    k: int = 6,
    within: float = 1.0,
    points: int = 7,
    refine: int = 4,
    splits: int = 3,
    fraction: float = 0.1,
    slices: int | None = 3,
    fixed: Mapping[str, Any] | None = None,
    csm: str = "espirit",
    seed: int = 0,
    progress: Progress | None = None,
) -> Choice:
    """Find a setting for a scan: a coarse grid along each dial on its own scale, then golden sections around the best.

        heldout-kspace   hides a part of the samples (off the grid: of the readouts), reconstructs from the rest, and
                         compares what that predicts; on the grid, with a known σ, SURE adds the error on the samples
        discrepancy      ‖A x̂ - y‖² nearest to what noise alone leaves, M σ²
        sure             Stein's unbiased estimate of ‖A (x̂ - x)‖², the error in the measured range; needs white noise
                         of known σ
        reference        the best metric against a ground truth
        diverse          k settings that differ most among those whose held-out error is within a tolerance of the best

    Several dials are searched one after the other, twice. All slices share one setting.

    Arguments:
        by: a key of CRITERIA.
        reference: ground truth `(B, H, W)` in the units of the scan; "reference" needs it, the others never look at it.
        metric: of "reference", a key of METRICS.
        k, within: of "diverse": how many, and how many dB of held-out error they may lose.
        points, refine: settings of the coarse grid, and golden sections, per dial.
        splits, fraction: of held-out k-space: how many times, and which share of the samples is hidden each time.
        slices: judge by at most that many slices, evenly spaced; None: by all.
        fixed: dials that are not to be searched, with their values.
        csm: how to estimate coil maps where the scan has none; from the whole scan, once.
        seed: of everything drawn at random.
        progress: called with (done, 0) after each setting.

    Returns:
        Choice; the same scan, model and seed give the same.

    Raises:
        BadOption: an unknown criterion or metric, nothing left to search, or a criterion that does not apply to this
            scan (the sentence says why).
        NoData: "reference" without one.

    Sources: B. Yaman et al., "Self-supervised learning of physics-guided reconstruction neural networks without fully
    sampled reference data" (2020), for held-out k-space; V. A. Morozov, "On the solution of functional equations by the
    method of regularization" (1966); S. Ramani, T. Blu, M. Unser, "Monte-Carlo SURE" (2008); Y. C. Eldar, "Generalized
    SURE for exponential families" (2009).
    """
    if by not in CRITERIA:
        raise errors.BadOption(f"found {by!r}", key="by", help=errors.did_you_mean(by, CRITERIA))
    if k < 1 or points < 3 or refine < 0 or splits < 1 or not 0 < fraction < 0.5 or not within > 0:
        found = {"k": k, "points": points, "refine": refine, "splits": splits, "fraction": fraction, "within": within}
        raise errors.BadOption(
            f"found {found}, expected k ≥ 1, points ≥ 3, splits ≥ 1, fraction below a half", key="choose"
        )
    if scan.mask is None and by in ("discrepancy", "sure"):
        raise errors.UnsupportedLayout(
            f"{by} needs samples on a grid, this scan has a trajectory", key="by", help="choose by heldout-kspace"
        )
    some = _judged(scan, slices)
    bench = _bench(scan, model, csm, some)
    fixed = dict(fixed or {})
    start = bench.start(fixed)
    free = {name: dial for name, dial in model.dials.items() if name not in fixed}
    if not free:
        raise errors.BadOption(f"{type(model).__name__} has no dial left to choose", key="dials")
    if reference is not None and reference.ndim == 3 and len(reference) == len(scan):
        reference = reference[some]
    asked = _Asked(reference=reference, metric=metric, seed=seed, splits=splits, fraction=fraction)
    judge = CRITERIA[by](bench, asked)
    tried: dict[tuple[float | str, ...], float] = {}

    def value(setting: Setting) -> float:
        key = tuple(setting[name] for name in start)
        if key not in tried:
            tried[key] = judge.score(setting)
            if progress is not None:
                progress(len(tried), 0)
        return tried[key]

    best = _search(free, start, value, points, refine)
    if by == "diverse":
        picks, sentence = _diverse(bench, free, best, value, k, within, points, seed)
        best = picks[0]
    else:
        picks, sentence = (best,), judge.sentence(value(best))
    ends = [n for n, d in free.items() if not d.choices and best[n] in (d.lo, d.hi)]
    rows = tuple({"dials": dict(zip(start, key, strict=True)), "score": s} for key, s in tried.items())
    return Choice(
        by=by, dials=best, picks=picks, rows=rows,
        reason=f"{sentence}, of {len(rows)} settings tried" + (f"; at the end of {' and '.join(ends)}" if ends else ""),
    )  # fmt: skip


def _judged(scan: Scan, slices: int | None) -> list[int]:
    """Indices of the slices that judge, evenly spaced among those with signal."""
    filled = scan.kspace.flatten(1).any(1).nonzero().flatten().tolist()
    if slices is None or len(filled) <= slices:
        return filled
    return [filled[(2 * i + 1) * len(filled) // (2 * slices)] for i in range(slices)]


def _search(
    dials: Mapping[str, Dial], start: Setting, value: Callable[[Setting], float], points: int, refine: int
) -> Setting:
    """The setting of lowest value: a grid on each dial, golden sections around its best, dial after dial."""
    best = dict(start)
    for _ in range(1 if len(dials) == 1 else 2):
        for name, dial in dials.items():
            best[name] = _along(name, dial, best, value, points, refine)
    return best


def _along(
    name: str, dial: Dial, others: Setting, value: Callable[[Setting], float], points: int, refine: int
) -> float | str:
    if dial.choices:
        return min(dial.choices, key=lambda word: value({**others, name: word}))

    def at(p: float) -> float:
        return value({**others, name: _at(dial, p)})

    grid = [i / (points - 1) for i in range(points)]
    middle = min(grid, key=at)
    return _at(dial, _golden(at, max(middle - grid[1], 0.0), middle, min(middle + grid[1], 1.0), refine))


def _golden(at: Callable[[float], float], low: float, middle: float, high: float, refine: int) -> float:
    """The best point after `refine` golden sections of [low, high], `middle` being the best so far."""
    for _ in range(refine):
        right = high - middle > middle - low
        p = middle + (1 - _GOLDEN) * (high - middle if right else low - middle)
        if at(p) < at(middle):
            low, middle, high = (middle, p, high) if right else (low, p, middle)
        else:
            low, high = (low, p) if right else (p, high)
    return middle


def _heldout(bench: _Bench, asked: _Asked) -> _Judge:
    """The squared error of the image: over the gaps of the pattern from hidden samples, on the samples by SURE.

        Σ_k w_k (|A x̂_T - y|²_k - σ²) over hidden samples k, x̂_T made from the others; see `_split` for w

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

    return _Judge(score=score, sentence=sentence)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """Data `y` of `A` to reconstruct from; `all_of(x)` is then compared with `truth`, the weights saying where."""

    y: Tensor
    A: LinearOperator
    truth: Tensor
    all_of: LinearOperator
    weight: Tensor


def _hide_samples(bench: _Bench, b: int, asked: _Asked, generator: torch.Generator) -> _Trial:
    """All splits of a slice in one batch: its samples are independent of each other."""
    kept, weight = _split(bench.mask[b], asked, generator)
    y, A = bench.y[b : b + 1], bench.A.sample(b)
    return _Trial(y=y * kept, A=Mask(kept) @ A, truth=y, all_of=A, weight=weight)


def _hide_readouts(one: Scan, asked: _Asked, generator: torch.Generator) -> list[_Trial]:
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


def _split(mask: Tensor, asked: _Asked, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks `(S, 1, H, W)` with a random part of the samples of `mask` `(1, H, W)` hidden, and weights `(S, H, W)` of those.

        w = (1 - p) / p,    p the local density of sampling

    Hidden samples stand for those that were never taken: with w their sum estimates the error over the gaps of the
    pattern, while the plain sum would judge by the dense centre alone. Where whole lines were measured, whole lines
    are hidden; the innermost samples never are, without them there is no image.
    """
    m = mask[0]
    h, w = m.shape
    rows, columns = bool((m == m[:, :1]).all()), bool((m == m[:1]).all())
    if rows == columns:  # points; or full sampling, which has no lines either
        rows = columns = False
    draw = torch.rand((asked.splits, 1 if columns else h, 1 if rows else w), generator=generator).to(m.device)
    vertical, across = ((torch.arange(n, device=m.device) - n // 2).abs() <= max(n // 40, 1) for n in (h, w))
    inner = vertical[:, None] if rows else across if columns else vertical[:, None] & across
    hidden = (m > 0) & (draw < asked.fraction) & ~inner
    window = [2 * max(n // 32, 1) + 1 for n in (h, w)]
    p = F.avg_pool2d(m[None, None], window, stride=1, padding=[n // 2 for n in window], count_include_pad=False)[0, 0]
    weight = torch.ones_like(p) if bool((p == 1).all()) else (1 - p) / p.clamp(min=0.02)
    return (m * ~hidden)[:, None], weight.double() * hidden / asked.fraction


def _discrepancy(bench: _Bench, asked: _Asked) -> _Judge:
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

    return _Judge(score=lambda setting: abs(math.log(max(ratio(setting), 1e-12))), sentence=sentence)


def _noise(bench: _Bench) -> tuple[Tensor, str]:
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


def _sure(bench: _Bench, asked: _Asked) -> _Judge:
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

    return _Judge(score=score, sentence=lambda best: f"has the least estimated error in the measured range, {best:.3g}")


def _by_reference(bench: _Bench, asked: _Asked) -> _Judge:
    if asked.reference is None:
        raise errors.NoData(
            "no ground truth to compare with", key="reference", help="pass --reference, or choose by heldout-kspace"
        )
    sign = -1 if known(asked.metric).higher_is_better else 1
    truth = asked.reference.cpu()

    def score_of(setting: Setting) -> float:
        image = crop(bench.images(setting).cpu(), truth.shape[-2:])
        return sign * score(image, truth, [asked.metric])[asked.metric]

    return _Judge(score=score_of, sentence=lambda best: f"{asked.metric} {sign * best:.4g} is the best")


CRITERIA: dict[str, Callable[[_Bench, _Asked], _Judge]] = {
    "heldout-kspace": _heldout,
    "discrepancy": _discrepancy,
    "sure": _sure,
    "reference": _by_reference,
    "diverse": _heldout,
}


# ---------------------------------------------------------------- the weight of a task


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A model with another task weight, and what that gains on the scans it was found with.

    Arguments:
        model: a copy; everything but its task parameters is as it was.
        shift: how far the task weight was moved, see `Reconstructor.move_task`.
        by: "reference" or "heldout-kspace".
        gain: mean decibels of error less than before, each unit judged at the shift that the *other* units would choose.
        low, high: 95 % interval of it, paired over units (Student's t).
        over: what the units are: "slices", or of fewer than four "blocks" of the image, or "folds" of k-space.
        units: how many.
        ratios: measured sampling ratio of each scan.
        rows: what was tried: {"shift": …, "score": mean error in dB}.
    """

    model: Reconstructor
    shift: float
    by: str
    gain: float
    low: float
    high: float
    over: str
    units: int
    ratios: tuple[float, ...]
    rows: tuple[dict[str, float], ...]

    @property
    def pays(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0


def adapt(
    model: Reconstructor,
    scans: Sequence[Scan],
    references: Sequence[Tensor] | None = None,
    *,
    slices: int = 12,
    reach: float = 6.0,
    refine: int = 4,
    folds: int = 5,
    fraction: float = 0.1,
    csm: str = "espirit",
    seed: int = 0,
    progress: Progress | None = None,
) -> Adaptation:
    """Re-learn the task weight of a model, and nothing else, from a few scans of one protocol.

        min_δ mean_i 10 log₁₀ e_i(ω + δ) + 0.002 |δ|,    e_i the squared error of unit i

    With references e is that of the magnitude image; without, that of held-out k-space, weighted as in `choose`. A grid
    brackets the minimum, then golden sections follow; without the last term a weight that hardly matters would run
    away. A search always finds a gain on what it searched: so each unit counts at the shift that all *others* would choose.

    Arguments:
        model: trained, with `task_parameters()`.
        scans: one to five of them, say; they may differ in size and coils.
        references: their ground truths `(B, H, W)` in the units of the scans, or None.
        slices: judge by about as many in all, evenly spaced.
        reach: |δ| stays within it.
        refine: golden sections.
        folds, fraction: of held-out k-space: how many times, and which share of the samples is hidden each time.
        csm: how to estimate coil maps where a scan has none.
        seed: of the held-out samples.
        progress: called with (done, 0) after each δ.

    Raises:
        WrongModel: nothing in this model belongs to a task.
        UnsupportedLayout: samples off the grid, and no reference.
        InconsistentShapes: references do not fit the scans. NoData: no scan, or one without signal.
    """
    if not model.task_parameters():
        raise errors.WrongModel(
            f"{type(model).__name__} has no task weight to adapt", key="model",
            help="a meta-learned model has; for the dials of any model there is `choose`",
        )  # fmt: skip
    if not scans or (references is not None and len(references) != len(scans)):
        raise errors.NoData(f"found {len(scans)} scans and {len(references or ())} references", key="scans")
    if references is None and any(scan.mask is None for scan in scans):
        raise errors.UnsupportedLayout(
            "held-out k-space needs samples on a grid, this scan has a trajectory", key="scans", help="give a reference"
        )
    moved = copy.deepcopy(model)
    chosen = [_judged(scan, max(1, slices // len(scans))) for scan in scans]
    benches = [_bench(scan, moved, csm, some) for scan, some in zip(scans, chosen, strict=True)]
    # The task stays what it is for all samples, also while some of them are hidden.
    starts = [bench.start({}) for bench in benches]
    enough = sum(map(len, chosen)) >= 4
    if references is None:
        generator = torch.Generator().manual_seed(seed)
        asked = _Asked(reference=None, metric="psnr", seed=seed, splits=folds, fraction=fraction)
        parts = [[_split(mask, asked, generator) for mask in bench.mask] for bench in benches]
    else:
        truths = [_truth(truth, scan, some) for truth, scan, some in zip(references, scans, chosen, strict=True)]

    def judge(n: int) -> Tensor:
        """Squared error of each unit of scan n, (slices, folds or blocks)."""
        if references is None:
            return _heldout_error(benches[n], starts[n], parts[n])
        image = crop(benches[n].images(starts[n]).abs().cpu(), truths[n].shape[-2:])
        return _dealt((image - truths[n]).square().double(), folds)

    errors_at: dict[float, Tensor] = {}

    def at(shift: float) -> float:
        if shift not in errors_at:
            moved.load_state_dict(model.state_dict())
            moved.move_task(shift)
            found = torch.cat([judge(n) for n in range(len(scans))])
            errors_at[shift] = 10 * (found.sum(1) if enough else found.flatten()).clamp(min=1e-30).log10()
            if progress is not None:
                progress(len(errors_at), 0)
        return float(errors_at[shift].mean()) + _EFFORT * abs(shift)

    places = [reach * share for share in (-1, -1 / 2, -1 / 6, 0, 1 / 6, 1 / 2, 1)]
    middle = min(range(7), key=lambda i: at(places[i]))
    shift = _golden(at, places[max(middle - 1, 0)], places[middle], places[min(middle + 1, 6)], refine)
    moved.load_state_dict(model.state_dict())
    moved.move_task(shift)
    tried = sorted(errors_at)
    gain, low, high = _left_out(torch.stack([errors_at[s] for s in tried]), tried)
    return Adaptation(
        model=moved.eval(), shift=shift, by="heldout-kspace" if references is None else "reference",
        gain=gain, low=low, high=high,
        over="slices" if enough else "folds" if references is None else "blocks", units=len(errors_at[0.0]),
        ratios=tuple(1 / scan.acceleration for scan in scans), rows=tuple({"shift": s, "score": float(errors_at[s].mean())} for s in tried),
    )  # fmt: skip


def _truth(truth: Tensor, scan: Scan, some: Sequence[int]) -> Tensor:
    if truth.ndim != 3 or len(truth) != len(scan):
        raise errors.InconsistentShapes(
            f"found {tuple(truth.shape)}, expected ({len(scan)}, rows, columns)", key="reference"
        )
    return truth[list(some)].abs().cpu()


def _heldout_error(bench: _Bench, setting: Setting, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Weighted squared error over the hidden samples, (slices, folds)."""
    found = []
    for b, (kept, weight) in enumerate(parts):
        y, A = bench.y[b : b + 1], bench.A.sample(b)
        x = bench.image(b, y * kept, Mask(kept) @ A, setting)
        found.append((weight * (A(x) - y).abs().square().sum(1).double()).sum((1, 2)))
    return torch.stack(found)


def _dealt(squares: Tensor, hands: int) -> Tensor:
    """Squared errors `(B, H, W)` → sums over tiles, which are dealt like cards: `(B, hands)`, each all over the image."""
    h, w = squares.shape[-2:]
    edge = max(2, min(h, w) // (3 * hands))
    row, column = torch.arange(h)[:, None] // edge, torch.arange(w) // edge
    hand = (row * 2 + column) % hands  # two on with each row of tiles: no hand is a stripe
    return torch.stack([(squares * (hand == k)).sum((1, 2)) for k in range(hands)], 1)


def _left_out(values: Tensor, shifts: Sequence[float]) -> tuple[float, float, float]:
    """Mean gain of unit i at the shift that is best for all other units, over shift 0, with its 95 % interval.

    Arguments:
        values: dB of error `(shifts, units)`, two units or more.
        shifts: 0 among them.
    """
    units = values.shape[1]
    effort = _EFFORT * torch.tensor(shifts, dtype=values.dtype).abs()
    others = (values.sum(1, keepdim=True) - values) / (units - 1) + effort[:, None]
    d = values[list(shifts).index(0.0)] - values.gather(0, others.argmin(0, keepdim=True))[0]
    mean, half = float(d.mean()), float(stats.t.ppf(0.975, units - 1) * d.std() / math.sqrt(units))
    return mean, mean - half, mean + half


# ---------------------------------------------------------------- several settings


def _diverse(
    bench: _Bench, free: Mapping[str, Dial], best: Setting, value: Callable[[Setting], float], k: int, within: float,
    points: int, seed: int,
) -> tuple[tuple[Setting, ...], str]:  # fmt: skip
    """The best setting and those that differ most from it and each other, among evenly spread candidates."""
    ranged = {name: dial for name, dial in free.items() if not dial.choices}
    if not ranged:
        raise errors.BadOption("no dial with a range to vary", key="diverse")
    n = 2 * points + 1
    if len(ranged) == 1:
        spread = torch.linspace(0, 1, n)[:, None]
    else:
        spread = torch.quasirandom.SobolEngine(len(ranged), scramble=True, seed=seed).draw(2 * n)
    settings = [
        best,
        *({**best, **{m: _at(d, float(p)) for (m, d), p in zip(ranged.items(), row, strict=True)}} for row in spread),
    ]
    # Decibels of held-out error: the quality that needs no reference. An estimated error may come out below zero: what is
    # under a hundredth of the largest counts as equal.
    scores = torch.tensor([value(s) for s in settings], dtype=torch.float64)
    quality = -10 * torch.log10(scores.clamp(min=0.01 * float(scores.max())))
    passing = [i for i, q in enumerate(quality) if q >= quality.max() - within]
    images = torch.stack([bench.images(settings[i]).abs() for i in passing])
    chosen = diversify(images, -scores[passing], k, within=math.inf)
    sentence = f"{len(chosen)} of {len(passing)} settings within {within:g} dB of the least held-out error, those that differ most"
    return tuple(settings[passing[i]] for i in chosen), sentence


def diversify(points: Tensor | RangeBasis, quality: Tensor, k: int, *, within: float = 1.0) -> list[int]:
    """Choose k good points that differ most: each next one is farthest from all chosen before (Euclidean distance).

    Arguments:
        points: images `(N, …)`, or anything whose distances are theirs, such as `RangeBasis.coefficients_at`; a
            RangeBasis stands for its grid.
        quality: `(N,)`, higher is better; only points within `within` of the best pass. Any score will do: metric,
            negative held-out error in dB.
        k: how many, ≥ 1.
        within: how much quality may be lost; inf: nothing is refused.

    Returns:
        at most k indices, the best first, all different; fewer where fewer pass, or where those left equal one that is chosen.

    Raises:
        BadOption: k < 1. InconsistentShapes: as many points as qualities are needed. NonFinite: a quality is NaN.

    Source: T. F. Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985).
    """
    x = (points.coefficients if isinstance(points, RangeBasis) else points).flatten(1)
    if k < 1 or not within >= 0:
        raise errors.BadOption(f"found k = {k} and within = {within}, expected k ≥ 1 and within ≥ 0", key="diversify")
    if quality.shape != (len(x),) or len(x) == 0:
        raise errors.InconsistentShapes(f"found {tuple(quality.shape)} qualities for {len(x)} points", key="quality")
    if bool(quality.isnan().any()):
        raise errors.NonFinite("a quality is NaN", key="quality")
    passing = quality >= quality.max() - within
    chosen = [int(quality.argmax())]
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    while len(chosen) < k:
        nearest = torch.minimum(nearest, torch.linalg.vector_norm(x - x[chosen[-1]], dim=1).double())
        candidate = int(torch.where(passing, nearest, -1.0).argmax())
        if not bool(passing[candidate]) or nearest[candidate] <= 0:
            break
        chosen.append(candidate)
    return chosen


# ---------------------------------------------------------------- every setting from a few images


@dataclass(frozen=True, kw_only=True)
class RangeBasis:
    """All settings of some dials on one slice, as a mean and a few components.

        x̂(λ) ≈ mean + Σ_r c_r(λ) component_r,    c interpolated (multi)linearly over the grid, on the dials' own scales

    Arguments:
        names: the dials, D of them, in the order of the axes; the last runs fastest.
        dials: name → Dial.
        axes: the grid's values along each dial, ascending; not evenly spaced where the image changes faster.
        settings: all points of the grid `(G, D)`.
        mean: `(H, W)`, magnitude or complex, in the units of the scan.
        components: `(R, H, W)`, orthonormal in Re⟨·,·⟩.
        coefficients: real `(G, R)`.
        fixed: the dials that do not vary, with their values.
        worst_db, median_db: peak signal-to-noise ratio of rebuilt against exact images at settings *between* those of
            the grid (worst: on it too). 50 dB is invisible.
        reconstructions: how many exact ones it took, those to measure the error included.
    """

    names: tuple[str, ...]
    dials: Mapping[str, Dial]
    axes: tuple[tuple[float, ...], ...]
    settings: Tensor
    mean: Tensor
    components: Tensor
    coefficients: Tensor
    fixed: Mapping[str, Any] = field(default_factory=dict)
    worst_db: float
    median_db: float
    reconstructions: int

    def rebuild(self, dials: Mapping[str, Any] | None = None) -> Tensor:
        """The image `(H, W)` at a setting; dials not named take their default.

        Raises:
            BadOption: a dial that the basis does not vary, at another value than it was made with; or out of range.
        """
        given = dict(dials or {})
        for name in given.keys() - set(self.names):
            if name not in self.fixed or given[name] != self.fixed[name]:
                raise errors.BadOption(
                    f"this basis holds {dict(self.fixed)} fixed", key=name, help=errors.did_you_mean(name, self.names)
                )
        values = [float(d.check(n, given.get(n, d.default))) for n, d in self.dials.items()]
        c = self.coefficients_at(torch.tensor([values], dtype=torch.float64))[0]
        return self.mean + torch.tensordot(c.to(self.components.dtype), self.components, 1)

    def coefficients_at(self, settings: Tensor) -> Tensor:
        """Coefficients `(N, R)` at settings `(N, D)`: their distances are those of the images that they stand for."""
        positions = [
            torch.tensor([_position(dial, float(v)) for v in column], dtype=torch.float64)
            for dial, column in zip(self.dials.values(), settings.T, strict=True)
        ]
        axes = [[_position(d, v) for v in axis] for d, axis in zip(self.dials.values(), self.axes, strict=True)]
        return _interpolate(axes, positions, self.coefficients)


def range_basis(
    model: Reconstructor,
    scan: Scan,
    *,
    dials: Sequence[str] | None = None,
    grid: int | Mapping[str, int] | None = None,
    components: int | None = None,
    rank_db: float = 50.0,
    most: int = 129,
    fixed: Mapping[str, Any] | None = None,
    complex_valued: bool = False,
    index: int | None = None,
    csm: str = "espirit",
    seed: int = 0,
    progress: Progress | None = None,
) -> RangeBasis:
    """A range basis of one slice: singular vectors of the images over a coarse grid of dials, refined where it must be.

    The image is made exactly in the middle of every cell of the grid (of at most 32 where several dials vary). Where
    the rebuilt one misses it by more than `rank_db` allows, the grid gets a new line there; then as few components are kept as
    keep the worst of these errors, and those on the grid, above `rank_db`.

    Arguments:
        dials: those that vary; None: all that have a range.
        grid: points to start with, for all dials or by name; None: 9 for one dial, 5 for two, 3 for more.
        components: how many to keep; None: as few as `rank_db` allows.
        rank_db: worst rebuild error aimed at, dB below the maximum of the exact image.
        most: the grid stops growing at that many points; `worst_db` says what was reached.
        fixed: values of the other dials, for one that is not named the method's suggestion.
        complex_valued: keep the phase; costs more components.
        index: which slice; None: the middle one.
        csm: how to estimate coil maps where the scan has none; from that slice.
        seed: of the choice of cells.
        progress: called with (done, 0) after each exact reconstruction.

    Raises:
        BadOption: an unknown dial, one without a range, an empty slice, fewer than two points; as `reconstruct`.
    """
    varied = _numeric(model, dials)
    b = len(scan) // 2 if index is None else index
    if not 0 <= b < len(scan):
        raise errors.BadOption(f"found {b}, expected a slice from 0 to {len(scan) - 1}", key="index")
    bench = _bench(select(scan, slice(b, b + 1)), model, csm)
    held = {name: v for name, v in bench.start(fixed or {}).items() if name not in varied}
    counts = _counts(varied, grid)
    axes = [[i / (counts[name] - 1) for i in range(counts[name])] for name in varied]
    exact: dict[tuple[float, ...], Tensor] = {}

    def images(points: Sequence[tuple[float, ...]]) -> Tensor:
        for point in points:
            if point not in exact:
                setting = {name: _at(dial, p) for (name, dial), p in zip(varied.items(), point, strict=True)}
                image = bench.images({**held, **setting})[0]
                exact[point] = _real(image if complex_valued else image.abs())
                if progress is not None:
                    progress(len(exact), 0)
        return torch.stack([exact[point] for point in points])

    generator = torch.Generator().manual_seed(seed)
    while True:
        points = list(itertools.product(*axes))
        x = images(points)
        mean = x.mean(0)
        u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
        coefficients = u * s
        cells = _cells(axes, 32 if len(axes) > 1 else None, generator)
        between = [tuple((a[i] + a[i + 1]) / 2 for a, i in zip(axes, cell, strict=True)) for cell in cells]
        columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*between, strict=True)]
        reached = _rebuild_db(images(between), mean, vh, _interpolate(axes, columns, coefficients))
        if float(reached[:, -1].min()) >= rank_db + 0.5:  # half a dB, for the components that are left out
            break
        finer = _finer(
            axes, coefficients, [c for c, db in zip(cells, reached[:, -1], strict=True) if db < rank_db + 0.5]
        )
        if math.prod(map(len, finer)) > most:
            break
        axes = finer
    worst = torch.minimum(reached.amin(0), _rebuild_db(x, mean, vh, coefficients).amin(0))
    aim = min(rank_db, float(worst[-1]) - 0.1)
    if components is None:
        # At least one: a dial that does nothing would look broken, however little it does.
        r = min(max(int((worst >= aim).nonzero()[0]), 1), len(s))
    else:
        r = min(max(components, 0), len(s))
    shape, settings = (
        scan.image_shape,
        [[_at(d, p) for d, p in zip(varied.values(), point, strict=True)] for point in points],
    )
    return RangeBasis(
        names=tuple(varied), dials=varied, fixed=held,
        axes=tuple(tuple(_at(d, p) for p in axis) for d, axis in zip(varied.values(), axes, strict=True)),
        settings=torch.tensor(settings, dtype=torch.float64),
        mean=_picture(mean, shape, complex_valued), components=_picture(vh[:r], shape, complex_valued),
        coefficients=coefficients[:, :r], worst_db=float(worst[r]), median_db=float(reached[:, r].median()),
        reconstructions=len(exact),
    )  # fmt: skip


def _counts(varied: Mapping[str, Dial], grid: int | Mapping[str, int] | None) -> dict[str, int]:
    usual = {1: 9, 2: 5}.get(len(varied), 3)
    named = grid if isinstance(grid, Mapping) else {}
    for name in named:
        if name not in varied:
            raise errors.BadOption("no such dial", key=name, help=errors.did_you_mean(name, varied))
    counts = {name: named.get(name, grid if isinstance(grid, int) else usual) for name in varied}
    if min(counts.values()) < 2:
        raise errors.BadOption(f"found {counts}, expected at least two points a dial", key="grid")
    return counts


def _real(image: Tensor) -> Tensor:
    """An image as one real row, so that coefficients are real whatever it is."""
    return (torch.view_as_real(image) if image.is_complex() else image).flatten()


def _picture(rows: Tensor, shape: tuple[int, int], complex_valued: bool) -> Tensor:
    if complex_valued:
        return torch.view_as_complex(rows.reshape(*rows.shape[:-1], *shape, 2).contiguous())
    return rows.reshape(*rows.shape[:-1], *shape)


def _cells(axes: Sequence[Sequence[float]], most: int | None, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Lower corners of the cells of a grid; a random `most` of them where there are more."""
    sizes = [len(axis) - 1 for axis in axes]
    count = math.prod(sizes)
    flat = torch.arange(count) if most is None or count <= most else torch.randperm(count, generator=generator)[:most]
    return [tuple(int(i) for i in torch.unravel_index(n, tuple(sizes))) for n in flat]


def _interpolate(axes: Sequence[Sequence[float]], positions: Sequence[Tensor], values: Tensor) -> Tensor:
    """Multilinear interpolation of `values` `(G, R)` on the grid of `axes` at N positions: `(N, R)`."""
    flat = torch.zeros(len(positions[0]), dtype=torch.long)
    lower, share = [], []
    for axis, p in zip(axes, positions, strict=True):
        a = torch.tensor(axis, dtype=torch.float64)
        i = (torch.searchsorted(a, p.clamp(a[0], a[-1]), right=True) - 1).clamp(0, len(axis) - 2)
        lower.append(i)
        share.append(((p - a[i]) / (a[i + 1] - a[i])).clamp(0, 1))
    total = torch.zeros(len(flat), values.shape[1], dtype=values.dtype, device=values.device)
    for corner in itertools.product((0, 1), repeat=len(axes)):
        index, weight = torch.zeros_like(flat), torch.ones(len(flat), dtype=torch.float64)
        for axis, i, t, side in zip(axes, lower, share, corner, strict=True):
            index = index * len(axis) + i + side
            weight = weight * (t if side else 1 - t)
        total = total + weight.to(values)[:, None] * values[index.to(values.device)]
    return total


def _rebuild_db(exact: Tensor, mean: Tensor, vh: Tensor, coefficients: Tensor) -> Tensor:
    """PSNR `(N, R + 1)` of images rebuilt from 0, 1, …, R components, `exact` `(N, P)` being the truth.

    The components are orthonormal, so ‖exact - mean - Σ c_r v_r‖² = ‖exact - mean‖² + Σ (c_r² - 2 c_r ⟨v_r, exact - mean⟩).
    """
    d = (exact - mean).double()
    overlap, c = d @ vh.double().T, coefficients.double()
    energy = d.square().sum(1, keepdim=True)
    squares = torch.cat((energy, energy + (c.square() - 2 * c * overlap).cumsum(1)), 1)
    # Rounding of the difference above: about float32's, 120 dB.
    squares = torch.maximum(squares, 1e-12 * energy.clamp(min=torch.finfo(torch.float64).tiny))
    return 10 * torch.log10(exact.double().square().amax(1, keepdim=True).clamp(min=1e-300) * exact.shape[1] / squares)


def _finer(axes: list[list[float]], coefficients: Tensor, failing: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """The grid with a new line through each failing cell, across the axis along which the coefficients bend most there."""
    values = coefficients.reshape(*map(len, axes), -1)
    new: list[set[float]] = [set(axis) for axis in axes]
    for cell in failing:
        bends = []
        for d, axis in enumerate(axes):
            line = values.movedim(d, -2)[(*cell[:d], *cell[d + 1 :])]
            i = cell[d]
            around = [j for j in (i - 1, i) if 0 <= j <= len(axis) - 3]  # triples of points that hold this interval
            bends.append(max((_bend(axis, line, j) * (axis[i + 1] - axis[i]) ** 2 for j in around), default=math.inf))
        d = bends.index(max(bends))
        new[d].add((axes[d][cell[d]] + axes[d][cell[d] + 1]) / 2)
    return [sorted(points) for points in new]


def _bend(axis: Sequence[float], line: Tensor, j: int) -> float:
    """Size of the second difference quotient at points j, j + 1, j + 2."""
    a, b, c = axis[j : j + 3]
    slopes = (line[j + 1] - line[j]) / (b - a), (line[j + 2] - line[j + 1]) / (c - b)
    return float((slopes[1] - slopes[0]).norm()) / (c - a)


# ---------------------------------------------------------------- where a dial matters


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What a small turn of a dial changes.

    Arguments:
        map: |∂x̂/∂p|, real `(B, H, W)`, in units of the image for the dial's full travel.
        how: "derivative", or "finite difference: " and why.
    """

    map: Tensor
    how: str


def sensitivity(
    model: Reconstructor, scan: Scan, dials: Mapping[str, Any], name: str, *, csm: str = "espirit"
) -> Sensitivity:
    """The derivative of the image along a dial at a setting, by one forward-mode pass (a Jacobian-vector product).

        |∂x̂/∂p|,    p in [0, 1] the position on the slider: λ = lo + p (hi - lo), or lo (hi / lo)^p on a log scale

    Not an uncertainty: it says what depends on the choice of the dial, nothing more.

    Arguments:
        dials: the setting; dials not named take the method's suggestion.
        name: the dial to turn.
        csm: how to estimate coil maps where the scan has none.

    Returns:
        Sensitivity; a method that cannot be differentiated gets a difference over 1 % of the dial's travel to either side, and
        `how` says so.

    Raises:
        BadOption: an unknown dial, or one that is not a number.
    """
    dial = _numeric(model, [name])[name]
    bench = _bench(scan, model, csm)
    setting = bench.start(dials)
    value = float(setting[name])
    slope = value * math.log(dial.hi / dial.lo) if dial.scale == "log" else dial.hi - dial.lo
    parts: list[Tensor] = []
    how = "derivative"
    try:
        for b in range(len(bench.y)):
            with torch.no_grad(), warnings.catch_warnings(), forward_ad.dual_level():
                # The first dual number loads a part of torch that itself uses what torch calls deprecated.
                warnings.simplefilter("ignore", DeprecationWarning)
                turned = forward_ad.make_dual(torch.tensor(value), torch.tensor(slope))
                out = model(bench.y[b : b + 1], bench.A.sample(b), **{**setting, name: turned, **bench.facts[b]})
                tangent = forward_ad.unpack_dual(out.image).tangent
                if tangent is None or not bool(torch.isfinite(torch.view_as_real(tangent)).all()):
                    raise NotImplementedError("the image carries no finite derivative")
                parts.append(tangent.clone())
        change = torch.cat(parts) * bench.scale[:, None, None].to(parts[0].real.dtype)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        # A method may turn its dial into a plain number, or use what has no forward derivative.
        how = f"finite difference: {str(error).partition(chr(10))[0]}"
        p = _position(dial, value)
        low, high = max(p - 0.01, 0.0), min(p + 0.01, 1.0)
        ends = [bench.images({**setting, name: _at(dial, q)}) for q in (low, high)]
        change = (ends[1] - ends[0]) / (high - low)
    return Sensitivity(map=change.abs(), how=how)


def range_map(
    model: Reconstructor,
    scan: Scan,
    name: str,
    *,
    dials: Mapping[str, Any] | None = None,
    points: int = 9,
    csm: str = "espirit",
    progress: Progress | None = None,
) -> Tensor:
    """Largest minus smallest magnitude of every pixel over the range of a dial, real `(B, H, W)`.

    Arguments:
        name: the dial.
        dials: values of the others.
        points: settings, evenly spaced on the dial's own scale, ≥ 2.
        csm: how to estimate coil maps where the scan has none.
        progress: called with (done, total).

    Raises:
        BadOption: an unknown dial, one that is not a number, or fewer than two points.
    """
    dial = _numeric(model, [name])[name]
    if points < 2:
        raise errors.BadOption(f"found {points}, expected at least 2", key="points")
    bench = _bench(scan, model, csm)
    setting = bench.start({key: v for key, v in (dials or {}).items() if key != name})
    low = high = bench.images({**setting, name: dial.lo}).abs()
    for i in range(1, points):
        image = bench.images({**setting, name: _at(dial, i / (points - 1))}).abs()
        low, high = torch.minimum(low, image), torch.maximum(high, image)
        if progress is not None:
            progress(i + 1, points)
    return high - low
