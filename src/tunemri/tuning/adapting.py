"""The task weight of a trained model, from a few scans."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import errors
from ..fourier import crop
from ..methods.base import Reconstructor
from ..operators import Mask
from ..scan import Scan
from .base import Bench, Learned, Progress, Setting, golden, interval, judged, set_up, truth_of
from .criteria import Asked, split

__all__ = ["Adaptation", "adapt"]

_EFFORT = 0.002  # dB that a task weight must gain for each unit it moves: far out, the error hardly depends on it


@dataclass(frozen=True, kw_only=True)
class Adaptation(Learned):
    """A model with another task weight, and what that gains on the scans it was found with, see `Learned`.

    Units are "slices", or of fewer than four "blocks" of the image, or "folds" of k-space.

    Arguments:
        model: a copy; everything but its task parameters is as it was.
        shift: how far the task weight was moved, see `Reconstructor.move_task`.
        by: "reference" or "heldout-kspace".
        rows: what was tried: {"shift": …, "score": mean error in dB}.
    """

    model: Reconstructor
    shift: float


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
    csm: str = "auto",
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
    chosen = [judged(scan, max(1, slices // len(scans))) for scan in scans]
    benches = [set_up(scan, moved, csm, some) for scan, some in zip(scans, chosen, strict=True)]
    # The task stays what it is for all samples, also while some of them are hidden.
    starts = [bench.start({}) for bench in benches]
    enough = sum(map(len, chosen)) >= 4
    if references is None:
        generator = torch.Generator().manual_seed(seed)
        asked = Asked(reference=None, metric="psnr", seed=seed, splits=folds, fraction=fraction)
        parts = [[split(mask, asked, generator) for mask in bench.mask] for bench in benches]
    else:
        truths = [truth_of(truth, scan, some) for truth, scan, some in zip(references, scans, chosen, strict=True)]

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
    shift = golden(at, places[max(middle - 1, 0)], places[middle], places[min(middle + 1, 6)], refine)
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


def _heldout_error(bench: Bench, setting: Setting, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
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
    return interval(d)
