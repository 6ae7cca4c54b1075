"""Where a dial matters: what a small turn changes, what the whole range does, and a slider that spreads it evenly."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .. import errors
from ..methods.base import Dial, Reconstructor
from ..scan import Scan
from .base import Progress, judged, ranged, set_up

__all__ = ["Sensitivity", "equal_steps", "range_map", "sensitivity", "step_sizes"]

_KNOTS = 33  # of a measured slider: values are kept at 32 even steps
_FINEST = 1 / 512  # of a slider: a jump is located no closer


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
    model: Reconstructor, scan: Scan, dials: Mapping[str, Any], name: str, *, csm: str = "auto"
) -> Sensitivity:
    """The derivative of the image along a dial at a setting, by one forward-mode pass (a Jacobian-vector product).

        |∂x̂/∂p|,    p in [0, 1] the position on the slider: λ = lo + p (hi - lo), lo (hi / lo)^p on a log scale, or as measured

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
    dial = ranged(model, [name])[name]
    bench = set_up(scan, model, csm)
    setting = bench.start(dials)
    value = float(setting[name])
    slope = dial.slope(value)
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
        p = dial.position(value)
        low, high = max(p - 0.01, 0.0), min(p + 0.01, 1.0)
        ends = [bench.images({**setting, name: dial.at(q)}) for q in (low, high)]
        change = (ends[1] - ends[0]) / (high - low)
    return Sensitivity(map=change.abs(), how=how)


def range_map(
    model: Reconstructor,
    scan: Scan,
    name: str,
    *,
    dials: Mapping[str, Any] | None = None,
    points: int = 9,
    csm: str = "auto",
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
    dial = ranged(model, [name])[name]
    if points < 2:
        raise errors.BadOption(f"found {points}, expected at least 2", key="points")
    bench = set_up(scan, model, csm)
    setting = bench.start({key: v for key, v in (dials or {}).items() if key != name})
    low = high = bench.images({**setting, name: dial.lo}).abs()
    for i in range(1, points):
        image = bench.images({**setting, name: dial.at(i / (points - 1))}).abs()
        low, high = torch.minimum(low, image), torch.maximum(high, image)
        if progress is not None:
            progress(i + 1, points)
    return high - low


def step_sizes(
    model: Reconstructor,
    scan: Scan,
    name: str,
    *,
    steps: int = 20,
    dials: Mapping[str, Any] | None = None,
    csm: str = "auto",
    progress: Progress | None = None,
) -> Tensor:
    """What each of `steps` equal steps of a slider changes, over the image: ‖|x̂ᵢ₊₁| - |x̂ᵢ|‖ / ‖x̂‖, `(steps,)`.

    Arguments:
        name: the dial.
        dials: values of the others.
        csm: how to estimate coil maps where the scan has none.
        progress: called with (done, total).

    Raises:
        BadOption: an unknown dial, one that is not a number, or no step.
    """
    dial = ranged(model, [name])[name]
    if steps < 1:
        raise errors.BadOption(f"found {steps}, expected at least 1", key="steps")
    bench = set_up(scan, model, csm)
    setting = bench.start({key: v for key, v in (dials or {}).items() if key != name})
    sizes, before = [], bench.images({**setting, name: dial.lo}).abs()
    for i in range(1, steps + 1):
        image = bench.images({**setting, name: dial.at(i / steps)}).abs()
        sizes.append(_change(before, image))
        before = image
        if progress is not None:
            progress(i, steps)
    return torch.tensor(sizes, dtype=torch.float64)


def _change(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ over the size of both."""
    return float((a - b).norm().double() / ((a.norm() + b.norm()).double() / 2).clamp(min=1e-30))


def equal_steps(
    model: Reconstructor,
    scans: Sequence[Scan],
    *,
    dials: Sequence[str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    slices: int | None = 1,
    most: int = 97,
    csm: str = "auto",
    progress: Progress | None = None,
) -> Reconstructor:
    """The same model with other sliders: equal steps make an equal visible change, as the mean over scans has it.

        value(p) = λ(L⁻¹(p L(1))),    L(q) = mean over scans of ∫₀^q ‖∂|x̂|/∂r‖ / ‖x̂‖ dr,    λ(r) the slider as declared

    Only the spacing of a slider changes, and with it sweeps, landscapes and searches: a value gives the image it gave,
    and the ends stay. `methods.save` writes the new sliders into the header of the weights. The path of the images is
    followed in steps of at most 1/32 of its length, finer where the image changes faster; where it stands still the
    slider keeps a thousandth of the mean speed, so that every value can be reached.

    Arguments:
        model: any method; it is not changed.
        scans: typical ones, several: where one scan changes fast another may not.
        dials: whose sliders; None: of all dials with a range, one after the other, the rest at the method's suggestion.
        fixed: values of the dials that are not turned.
        slices: at most that many of each scan, evenly spaced; None: all.
        most: settings per dial and scan; a jump cannot be followed any closer.
        csm: how to estimate coil maps where a scan has none.
        progress: called with (done, 0) after each setting.

    Returns:
        a copy of the model, with a `curve` on each of these dials.

    Raises:
        NoData: no scan, or one without signal. BadOption: an unknown dial, or one along which nothing changes.
    """
    if not scans:
        raise errors.NoData("found no scan", key="scans")
    even = copy.deepcopy(model)
    even.curves = {name: curve for name, curve in model.curves.items() if dials is not None and name not in dials}
    benches = [set_up(scan, even, csm, judged(scan, slices)) for scan in scans]
    starts = [bench.start(fixed or {}) for bench in benches]
    done = itertools.count(1)
    for name, dial in ranged(even, dials).items():

        def images(p: float, name: str = name, dial: Dial = dial) -> list[Tensor]:
            found = [
                bench.images({**start, name: dial.at(p)}).abs() for bench, start in zip(benches, starts, strict=True)
            ]
            if progress is not None:
                progress(next(done), 0)
            return found

        places, lengths = _followed(images, most)
        if not sum(lengths) > 0:
            raise errors.BadOption("the image is the same all along this dial", key=name)
        even.curves = {**even.curves, name: _even(dial, places, lengths)}
    return even.eval()


def _followed(images: Callable[[float], list[Tensor]], most: int) -> tuple[list[float], list[float]]:
    """Positions along a slider, and how far the images move from each to the next, mean over the scans."""
    made: dict[float, list[Tensor]] = {}
    places = [i / 16 for i in range(17)]
    while True:
        made |= {p: images(p) for p in places if p not in made}
        pieces = list(itertools.pairwise(places))
        lengths = [fmean(map(_change, made[a], made[b])) for a, b in pieces]
        long = sum(lengths) / (_KNOTS - 1)
        halves = [(a + b) / 2 for (a, b), n in zip(pieces, lengths, strict=True) if n > long and b - a > _FINEST]
        if not halves or len(places) + len(halves) > most:
            return places, lengths
        places = sorted(places + halves)


def _even(dial: Dial, places: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """Values at even shares of the whole length."""
    speed = np.asarray(lengths) / np.diff(places)
    way = np.concatenate(([0.0], np.cumsum(np.maximum(speed, 1e-3 * sum(lengths)) * np.diff(places))))
    inner = np.interp(np.linspace(0, way[-1], _KNOTS)[1:-1], way, places)
    return (dial.lo, *(float(f"{dial.at(p):.8g}") for p in inner), dial.hi)
