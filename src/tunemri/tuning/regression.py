"""The weight of a prior as a function of what was measured, from scans whose truth is known."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..fourier import crop
from ..methods.generative import Generative, Regression, power
from ..scan import Scan
from .base import Bench, Learned, Progress, golden, interval, judged, set_up, truth_of

__all__ = ["WeightFit", "fit_weight"]


@dataclass(frozen=True, kw_only=True)
class WeightFit(Learned):
    """A prior that suggests its weight scan by scan, and what that gains on the scans it was fitted to, see `Learned`.

    Units are "scans", or of fewer than four of them "slices".

    Arguments:
        model: a copy with the regression in its arguments, hence in the header of its file; all else is as it was.
        regression: see `Regression`.
        r2: share of the variance of log λ that it explains; 0 where there is none.
        by: "reference".
        rows: of each slice: {"scan": …, "slice": …, "rho": …, "lam": the best, "gain": dB}.
    """

    model: Generative
    regression: Regression
    r2: float


def fit_weight(
    model: Generative,
    scans: Sequence[Scan],
    references: Sequence[Tensor],
    *,
    slices: int = 12,
    points: int = 5,
    refine: int = 3,
    csm: str = "auto",
    progress: Progress | None = None,
) -> WeightFit:
    """Learn which weight of the prior a scan needs from the power of its data, for scans without a reference.

        min_{a, b} Σ_i (log λ_i − a ρ_i − b)²,    λ_i = argmin_λ ‖|x̂_i(λ)| − |x_i|‖²

    i runs over slices, and x̂(λ) is the mode. λ_i is found as `choose` finds one: a grid along the dial, then golden
    sections. New scans get what `Regression.at` says of them, wherever nobody asks for another weight.

    Arguments:
        model: the prior.
        scans: of one protocol, at least four slices in all; they may differ in size and coils.
        references: their ground truths `(B, H, W)` in the units of the scans.
        slices: use about as many in all, evenly spaced.
        points, refine: weights of the grid, and golden sections, per slice.
        csm: how to estimate coil maps where a scan has none.
        progress: called with (done, total) after each reconstruction.

    Raises:
        WrongModel: no prior. BadOption: a grid of fewer than three weights. InconsistentShapes: references do not fit
        the scans. NoData: fewer than four slices, or a scan without signal.

    Source: as of `Regression`.
    """
    if not isinstance(model, Generative):
        raise errors.WrongModel(
            f"{type(model).__name__} is no prior with a weight to fit", key="model", help="energy-brain is one"
        )
    if points < 3 or refine < 0:
        raise errors.BadOption(f"found {points} points and {refine} sections, expected at least 3 and 0", key="points")
    if not scans or len(references) != len(scans):
        raise errors.NoData(f"found {len(scans)} scans and {len(references)} references", key="scans")
    chosen = [judged(scan, max(1, slices // len(scans))) for scan in scans]
    if sum(map(len, chosen)) < 4:
        raise errors.NoData(
            f"found {sum(map(len, chosen))} slices with signal, a line needs at least 4", key="scans", help="more scans"
        )
    benches = [set_up(scan, model, csm, some) for scan, some in zip(scans, chosen, strict=True)]
    truths = [truth_of(truth, scan, some) for truth, scan, some in zip(references, scans, chosen, strict=True)]
    dial, done = model.dials["lam"], 0
    total = sum(map(len, chosen)) * (points + refine + 2)

    def decibels(n: int, b: int, lam: float) -> float:
        nonlocal done
        found = _error(benches[n], b, lam, truths[n][b])
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    places: list[tuple[int, int]] = [(n, b) for n, some in enumerate(chosen) for b in range(len(some))]
    best, before, rho = [], [], []
    for n, b in places:
        y, A = benches[n].y[b : b + 1], benches[n].A.sample(b)
        tried: dict[float, float] = {}

        def at(p: float, n: int = n, b: int = b, tried: dict[float, float] = tried) -> float:
            if p not in tried:
                tried[p] = decibels(n, b, dial.at(p))
            return tried[p]

        grid = [i / (points - 1) for i in range(points)]
        middle = min(grid, key=at)
        best.append(dial.at(golden(at, max(middle - grid[1], 0.0), middle, min(middle + grid[1], 1.0), refine)))
        before.append(decibels(n, b, float(model.suggest(y, A)["lam"])))
        rho.append(power(y, A))
    own = [n if len(scans) >= 4 else i for i, (n, _) in enumerate(places)]
    gains: list[float] = []
    for i, (n, b) in enumerate(places):
        others = [k for k in range(len(places)) if own[k] != own[i]]
        line = _line([rho[k] for k in others], [best[k] for k in others])
        gains.append(before[i] - decibels(n, b, line.at(rho[i])))
    units = torch.tensor([_mean([g for g, o in zip(gains, own, strict=True) if o == u]) for u in sorted(set(own))])
    regression = _line(rho, best)
    gain, low, high = interval(units.double())
    return WeightFit(
        model=_suggesting(model, regression), regression=regression, r2=_explained(regression, rho, best),
        by="reference", gain=gain, low=low, high=high, over="scans" if len(scans) >= 4 else "slices", units=len(units),
        ratios=tuple(1 / scan.acceleration for scan in scans),
        rows=tuple(
            {"scan": n, "slice": chosen[n][b], "rho": r, "lam": lam, "gain": g}
            for (n, b), r, lam, g in zip(places, rho, best, gains, strict=True)
        ),
    )  # fmt: skip


def _error(bench: Bench, b: int, lam: float, truth: Tensor) -> float:
    """Squared error of the mode of slice b, in dB."""
    setting: dict[str, Any] = {"lam": lam, "estimate": "map"}
    x = bench.image(b, bench.y[b : b + 1], bench.A.sample(b), setting)[0].abs().cpu() * float(bench.scale[b])
    return 10 * math.log10(max(float((crop(x, truth.shape) - truth).square().mean(dtype=torch.float64)), 1e-30))


def _line(rho: Sequence[float], lam: Sequence[float]) -> Regression:
    """The least squares line through log λ; level where ρ is the same everywhere."""
    r, v = torch.tensor(rho, dtype=torch.float64), torch.tensor(lam, dtype=torch.float64).log()
    d = r - r.mean()
    level = bool(d.square().sum() <= 1e-12 * r.square().sum())
    slope = 0.0 if level else float((d * v).sum() / d.square().sum())
    return Regression(slope=slope, intercept=float(v.mean() - slope * r.mean()), floor=min(lam), ceiling=max(lam))


def _explained(line: Regression, rho: Sequence[float], lam: Sequence[float]) -> float:
    r, v = torch.tensor(rho, dtype=torch.float64), torch.tensor(lam, dtype=torch.float64).log()
    spread = float((v - v.mean()).square().sum())
    return 1 - float((v - line.slope * r - line.intercept).square().sum()) / spread if spread > 0 else 0.0


def _suggesting(model: Generative, regression: Regression) -> Generative:
    one = copy.deepcopy(model)
    one.regression, one.arguments = regression, {**model.arguments, "regression": vars(regression).copy()}
    return one.eval()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
