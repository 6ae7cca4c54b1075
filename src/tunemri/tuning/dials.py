"""Where a dial matters: what a small turn changes, and what the whole range does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .. import errors
from ..methods.base import Reconstructor
from ..scan import Scan
from .base import Progress, ranged, set_up

__all__ = ["Sensitivity", "range_map", "sensitivity"]


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
