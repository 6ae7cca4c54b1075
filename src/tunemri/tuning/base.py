"""What all of tuning shares: a scan made ready once, on which a model is tried at many settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from .. import errors
from ..methods.base import Dial, Reconstructor, prepare
from ..operators import LinearOperator, encoding
from ..scan import Scan

__all__ = ["Bench", "Learned", "Progress", "Setting", "golden", "interval", "judged", "ranged", "set_up", "truth_of"]

Setting = dict[str, float | str]
Progress = Callable[[int, int], None]
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned from a few scans, and what it gains on them.

    Arguments:
        by: what the error was judged by.
        gain: mean decibels of error less than before, each unit judged by what the *other* units say of it.
        low, high: 95 % interval of it, paired over units (Student's t).
        over: what the units are, in the plural.
        units: how many.
        ratios: measured sampling ratio of each scan.
        rows: what it was learned from, one record each.
    """

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


@dataclass(frozen=True, kw_only=True)
class Bench:
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


def set_up(scan: Scan, model: Reconstructor, csm: str, slices: Sequence[int] | None = None) -> Bench:
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
    return Bench(
        scan=judged,
        model=model,
        y=judged.kspace,
        mask=torch.empty(0) if mask is None else mask.expand(len(index), 1, *scan.image_shape),
        A=encoding(judged),
        scale=scale,
        noise=None if scan.noise_std is None else scan.noise_std / scale,
        facts=[model.knows(ready, b) for b in index],
    )


def ranged(model: Reconstructor, names: Sequence[str] | None = None) -> dict[str, Dial]:
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


def judged(scan: Scan, slices: int | None) -> list[int]:
    """Indices of the slices that judge, evenly spaced among those with signal."""
    filled = scan.kspace.flatten(1).any(1).nonzero().flatten().tolist()
    if slices is None or len(filled) <= slices:
        return filled
    return [filled[(2 * i + 1) * len(filled) // (2 * slices)] for i in range(slices)]


def golden(at: Callable[[float], float], low: float, middle: float, high: float, refine: int) -> float:
    """The best point after `refine` golden sections of [low, high], `middle` being the best so far."""
    for _ in range(refine):
        right = high - middle > middle - low
        p = middle + (1 - _GOLDEN) * (high - middle if right else low - middle)
        if at(p) < at(middle):
            low, middle, high = (middle, p, high) if right else (low, p, middle)
        else:
            low, high = (low, p) if right else (p, high)
    return middle


def truth_of(truth: Tensor, scan: Scan, some: Sequence[int]) -> Tensor:
    """Magnitudes of the ground truth of some slices.

    Raises:
        InconsistentShapes: it has not one image for each slice of the scan.
    """
    if truth.ndim != 3 or len(truth) != len(scan):
        raise errors.InconsistentShapes(
            f"found {tuple(truth.shape)}, expected ({len(scan)}, rows, columns)", key="reference"
        )
    return truth[list(some)].abs().cpu()


def interval(d: Tensor) -> tuple[float, float, float]:
    """Mean of differences `(units,)`, two or more, with both ends of its 95 % interval (Student's t)."""
    mean, half = float(d.mean()), float(stats.t.ppf(0.975, len(d) - 1) * d.std() / math.sqrt(len(d)))
    return mean, mean - half, mean + half
