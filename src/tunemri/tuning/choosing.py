"""Choosing settings of a scan: one, or several that differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..methods.base import Dial, Reconstructor
from ..scan import Scan
from .base import Bench, Progress, Setting, golden, judged, set_up
from .basis import RangeBasis
from .criteria import CRITERIA, Asked

__all__ = ["Choice", "choose", "diversify"]


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
    csm: str = "auto",
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
    some = judged(scan, slices)
    bench = set_up(scan, model, csm, some)
    fixed = dict(fixed or {})
    start = bench.start(fixed)
    free = {name: dial for name, dial in model.dials.items() if name not in fixed}
    if not free:
        raise errors.BadOption(f"{type(model).__name__} has no dial left to choose", key="dials")
    if reference is not None and reference.ndim == 3 and len(reference) == len(scan):
        reference = reference[some]
    asked = Asked(reference=reference, metric=metric, seed=seed, splits=splits, fraction=fraction)
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
        return value({**others, name: dial.at(p)})

    grid = [i / (points - 1) for i in range(points)]
    middle = min(grid, key=at)
    return dial.at(golden(at, max(middle - grid[1], 0.0), middle, min(middle + grid[1], 1.0), refine))


def _diverse(
    bench: Bench, free: Mapping[str, Dial], best: Setting, value: Callable[[Setting], float], k: int, within: float,
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
        *({**best, **{m: d.at(float(p)) for (m, d), p in zip(ranged.items(), row, strict=True)}} for row in spread),
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
