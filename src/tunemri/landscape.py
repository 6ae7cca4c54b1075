"""The whole range of a method at once: every setting of a full grid, scored, over validation scans.

    landscape         settings × scans → values, range curve, far pair    area_above   which share of settings is good
    interpolate       dedicated networks on the grid of a landscape       histogram    what data-driven sampling trained on
    self_consistency  losses over (asked, used) settings                  dice_along   segmentation against the dial
    energy_surface    the valley in which images of a prior lie, without any data

Images are judged one at a time and thrown away, so that memory does not grow with the grid, and a long run can be
stopped and taken up again. Where images are compared with each other, they are magnitudes over the maximum of the reference.

Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Regularization-Agnostic Compressed Sensing MRI Reconstruction
with Hypernetworks" (2021); "Computing Multiple Image Reconstructions with a Single Hypernetwork" (2022).
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from scipy import stats
from scipy.interpolate import griddata
from torch import Tensor

from . import errors, files, losses
from .evaluation import Case, Row, fingerprint, grid
from .fourier import crop
from .methods import METHODS
from .methods.base import Dial, Reconstructor, prepare, reconstruct
from .methods.hyperrecon import weighted
from .metrics import METRICS, dice, known, rpsnr, score
from .operators import LinearOperator, encoding

__all__ = [
    "Consistency",
    "FarPair",
    "Landscape",
    "Surface",
    "area_above",
    "dice_along",
    "energy_surface",
    "histogram",
    "interpolate",
    "landscape",
    "self_consistency",
]

Setting = dict[str, Any]
Progress = Callable[[int, int], None]
_SKETCH = 256  # numbers kept of each image: distances between sketches are off by about 1/√(2·256) = 4 %
_VERIFIED = 16  # images made again to measure the farthest pair exactly
_SAVE_EVERY = 30.0  # seconds


# ---------------------------------------------------------------- the landscape


@dataclass(frozen=True, kw_only=True)
class FarPair:
    """The two settings whose images differ most among the good ones of one scan.

    Arguments:
        case: name of the scan.
        a, b: the settings, every dial that was set; `a` comes first in the grid.
        values: of the metric, at a and at b.
        distance: ‖x̂_a - x̂_b‖, magnitudes over the maximum of the reference.
    """

    case: str
    a: Setting
    b: Setting
    values: tuple[float, float]
    distance: float

    @property
    def record(self) -> dict[str, Any]:
        """Flat and JSON-ready."""
        settings = {f"{which}_{name}": value for which in "ab" for name, value in getattr(self, which).items()}
        values = {"value_a": _json_ready(self.values[0]), "value_b": _json_ready(self.values[1])}
        return {"case": self.case, **settings, **values, "distance": self.distance}


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape:
    """A metric at every setting of a grid.

    Arguments:
        dials: the one or two dials of the grid, name → declaration.
        axes: the values along each; `values[c, i, j]` belongs to `axes[0][i]` and `axes[1][j]`.
        fixed: the other dials that were set.
        metric: "rpsnr" or a key of METRICS.
        cases: names of the scans.
        values: `(cases, n)` or `(cases, n, m)`, double precision; NaN where unknown.
        thresholds: of the range curve, increasing.
        ranges: `(cases, thresholds)`, total pixel-wise range, see `landscape`.
        far: one pair per scan, or empty.
    """

    dials: Mapping[str, Dial]
    axes: tuple[tuple[float, ...], ...]
    fixed: Mapping[str, Any]
    metric: str
    cases: tuple[str, ...]
    values: Tensor
    thresholds: tuple[float, ...] = ()
    ranges: Tensor
    far: tuple[FarPair, ...] = ()

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "rpsnr" or METRICS[self.metric].higher_is_better

    @property
    def mean(self) -> Tensor:
        """Mean over scans, `(n,)` or `(n, m)`."""
        return self.values.mean(0)

    @property
    def range_curve(self) -> Tensor:
        """Total pixel-wise range at each threshold, mean over scans, `(thresholds,)`."""
        return self.ranges.mean(0)

    @property
    def best(self) -> tuple[Setting, float]:
        """The setting of the best mean, and that mean; the first of several."""
        mean = self.mean if self.higher_is_better else -self.mean
        index = int(mean.nan_to_num(nan=-math.inf).argmax())
        return self.setting(index), float(self.mean.flatten()[index])

    def setting(self, index: int) -> Setting:
        """The setting at a place of the grid, counted with the last dial running fastest."""
        places = np.unravel_index(index, self.values.shape[1:])
        return {name: axis[i] for name, axis, i in zip(self.dials, self.axes, places, strict=True)}

    def records(self) -> list[dict[str, Any]]:
        """Flat records: the dials, mean and quartiles over the scans, and how many these are."""
        table = self.values.flatten(1).numpy()
        low, high = np.quantile(table, (0.25, 0.75), axis=0)
        return [
            {
                **{f"dial_{name}": value for name, value in self.setting(i).items()},
                f"{self.metric}_mean": _json_ready(mean),
                f"{self.metric}_low": _json_ready(low[i]),
                f"{self.metric}_high": _json_ready(high[i]),
                "n": len(table),
            }
            for i, mean in enumerate(table.mean(0))
        ]


def landscape(
    model: Reconstructor,
    cases: Sequence[Case],
    *,
    points: int = 100,
    dials: Mapping[str, int | float | str | Sequence[float]] | None = None,
    metric: str = "rpsnr",
    thresholds: Sequence[float] = (),
    far: float | None = 0.9,
    csm: str = "auto",
    file: str | Path | None = None,
    progress: Progress | None = None,
) -> Landscape:
    """Score every setting of a grid on every scan, and what the good settings span, in one pass.

        range(t) = Σ_pixels max_λ |x̂_λ| - min_λ |x̂_λ|     over the settings λ that are better than t on this scan
        far pair = argmax_{λ, μ} ‖ |x̂_λ| - |x̂_μ| ‖₂      over the settings in the top tenth of this scan

    Both in units of the reference's maximum; a volume gives the mean range of its slices, and no good setting gives 0.
    The far pair is found among sketches of the images (every pixel with a random sign in one of 256 random sums) and
    measured exactly among the sixteen most promising ones, which are made once more.

    Arguments:
        model: any method with a dial that is a number.
        cases: scans with references.
        points: along each dial of the grid.
        dials: name → points (int) or values (sequence) of a dial of the grid, one or two of these; or one fixed value.
            None takes the first two dials that are numbers. The other dials take what `reconstruct` would.
        metric: "rpsnr", the PSNR gained over the zero-filled image (see `metrics.rpsnr`), or a key of METRICS.
        thresholds: of the range curve, in units of the metric.
        far: what counts as good for the far pair, a quantile of the values; None leaves it out.
        csm: how to estimate coil maps where a scan has none.
        file: keeps the state; a run that was stopped goes on from there and ends with the same numbers, a finished one
            is read. Written every half minute, and at the end, whatever ends it.
        progress: called with (done, total) after each reconstruction of the grid.

    Raises:
        BadOption: no such dial or metric, a value out of range, not one or two dials in the grid; or `file` holds the
            state of another model, grid, metric or other scans.
        NoData: no scan, or one without a reference.
        UnreadableFile: `file` is damaged.

    Source: M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams" (2002), for the sketch.
    """
    axes, fixed = _grid(model, dials, points)
    sign = 1 if metric == "rpsnr" or known(metric).higher_is_better else -1
    if not cases or any(case.reference is None for case in cases):
        raise errors.NoData("a landscape needs scans with a reference", key="cases")
    if not all(math.isfinite(t) for t in thresholds) or (far is not None and not 0 <= far <= 1):
        raise errors.BadOption(f"found {thresholds} and {far}, expected finite numbers and a quantile", key="landscape")
    # Towards the better end: a value clears the first so many of them.
    bounds = sorted({sign * float(t) for t in thresholds})
    settings = [dict(zip(axes, place, strict=True)) for place in itertools.product(*axes.values())]
    count, total = len(settings), len(settings) * len(cases)
    plan = {
        "model": type(model).__name__, "arguments": dict(model.arguments), "axes": axes, "fixed": fixed,
        "metric": metric, "bounds": bounds, "far": far, "csm": csm, "cases": [case.name for case in cases],
    }  # fmt: skip
    identity = "" if file is None else fingerprint(plan, model, cases)
    state = None if file is None else _restore(Path(file), identity)
    if state is None:
        state = {
            "done": torch.zeros((), dtype=torch.int64),
            "values": torch.full((len(cases), count), math.nan, dtype=torch.float64),
            "ranges": torch.zeros(len(cases), len(bounds), dtype=torch.float64),
            "far": torch.zeros(len(cases), 3, dtype=torch.float64),
            "sketch": torch.zeros(0 if far is None else count, _SKETCH),
        }
        if file is not None:
            _keep(Path(file), identity, state)  # a file that cannot be written shows now, not in an hour
    start, saved = int(state["done"]), time.monotonic()
    model.eval()
    try:
        for c, case in enumerate(cases):
            if start >= (c + 1) * count:
                continue
            bench = _bench(model, case, fixed, metric, csm)
            for j in range(max(start - c * count, 0), count):
                # Whatever interrupts this leaves a state from which the setting is simply done once more.
                if j == 0:
                    for name in [name for name in state if name.startswith(("high.", "low."))]:
                        del state[name]
                image, value = bench.judged(settings[j])
                state["values"][c, j] = value
                cleared = bisect.bisect_left(bounds, sign * value)
                if cleared:
                    _widen(state, cleared - 1, image)
                if far is not None:
                    state["sketch"][j] = bench.sketch(image)
                if j == count - 1:
                    state["ranges"][c] = _ranges(state, len(bounds), len(image))
                    if far is not None:
                        state["far"][c] = _far_pair(bench, settings, sign * state["values"][c], state["sketch"], far)
                state["done"].fill_(c * count + j + 1)
                if progress is not None:
                    progress(c * count + j + 1, total)
                if file is not None and time.monotonic() - saved > _SAVE_EVERY:
                    _keep(Path(file), identity, state)
                    saved = time.monotonic()
    finally:
        if file is not None and int(state["done"]) > start:
            _keep(Path(file), identity, state)

    pairs = []
    for case, values, (a, b, distance) in zip(cases, state["values"], state["far"].tolist(), strict=True):
        i, k = int(a), int(b)
        pair = FarPair(
            case=case.name, a={**fixed, **settings[i]}, b={**fixed, **settings[k]},
            values=(float(values[i]), float(values[k])), distance=distance,
        )  # fmt: skip
        pairs.append(pair)
    order = slice(None) if sign > 0 else slice(None, None, -1)
    return Landscape(
        dials={name: model.dials[name] for name in axes},
        axes=tuple(tuple(axis) for axis in axes.values()),
        fixed=fixed,
        metric=metric,
        cases=tuple(case.name for case in cases),
        values=state["values"].reshape(len(cases), *(len(axis) for axis in axes.values())),
        thresholds=tuple(sign * t for t in bounds[order]),
        ranges=state["ranges"] if sign > 0 else state["ranges"].flip(1),
        far=() if far is None else tuple(pairs),
    )


def _grid(
    model: Reconstructor, dials: Mapping[str, int | float | str | Sequence[float]] | None, points: int
) -> tuple[dict[str, list[float]], Setting]:
    """(axis values of the grid's dials, fixed dials)."""
    known_dials = model.dials
    numbers = [name for name, dial in known_dials.items() if not dial.choices]
    axes: dict[str, list[float]] = {}
    fixed: Setting = {}
    for name, asked in (dict.fromkeys(numbers[:2], points) if dials is None else dials).items():
        if name not in known_dials:
            raise errors.BadOption("no such dial", key=name, help=errors.did_you_mean(name, known_dials))
        dial = known_dials[name]
        if isinstance(asked, float | str):
            fixed[name] = dial.check(name, asked)
        elif dial.choices:
            raise errors.BadOption("a dial of words has no axis", key=name, help="fix it at one of its words")
        elif isinstance(asked, int):
            axes[name] = [float(v) for v in grid(dial, asked)]
        else:
            axes[name] = [float(dial.check(name, v)) for v in asked]
    if len(axes) not in (1, 2) or not all(axes.values()):
        raise errors.BadOption(
            f"found {len(axes)} dials in the grid of {type(model).__name__}, expected one or two with values",
            key="dials",
        )
    return axes, fixed


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """One scan, made ready once: what does not depend on the setting is not done once per setting."""

    model: Reconstructor
    slices: tuple[tuple[Tensor, LinearOperator, Setting], ...]  # y, A, dials that stay
    factor: Tensor  # (B, 1, 1), back to the units of the scan
    reference: Tensor
    value: Callable[[Tensor], float]
    bucket: Tensor  # (B·H·W,), which sum of the sketch a pixel goes to
    flip: Tensor  # ±1

    def judged(self, setting: Setting) -> tuple[Tensor, float]:
        """The image `(B, H, W)` over the maximum of the reference, and its value."""
        with torch.no_grad():
            parts = [self.model(y, A, **(stays | setting)).image for y, A, stays in self.slices]
        image = crop((torch.cat(parts) * self.factor).cpu(), self.reference.shape[1:]).abs()
        if not bool(torch.isfinite(image).all()):
            raise errors.NonFinite(f"{type(self.model).__name__} gave NaN or Inf at {setting}", key="image")
        return image / self.reference.max(), self.value(image)

    def sketch(self, image: Tensor) -> Tensor:
        return torch.zeros(_SKETCH).index_add_(0, self.bucket, image.flatten().float() * self.flip)


def _bench(model: Reconstructor, case: Case, fixed: Setting, metric: str, csm: str) -> _Bench:
    if not bool(case.scan.kspace.any()):
        raise errors.NoData("every sample is zero", key=case.name)
    ready = prepare(case.scan, csm=csm)
    for sentence in model.outside(ready):
        errors.warn(f"outside what the model was trained for: {sentence}", "wrong_model")
    assert case.reference is not None and ready.scale is not None and case.scan.scale is not None
    reference = case.reference.detach().cpu().abs()
    if metric == "rpsnr":
        # The one baseline for all settings, and one for all methods.
        zero_filled = crop(reconstruct(ready, METHODS["zero-filled"]()).image.cpu(), reference.shape[1:]).abs()
    A = encoding(ready)
    slices = []
    with torch.no_grad():
        for b in range(len(ready)):
            y, A_b = ready.kspace[b : b + 1], A.sample(b)
            slices.append((y, A_b, model.suggest(y, A_b) | fixed | model.knows(ready, b)))
    draw = torch.Generator().manual_seed(0)
    return _Bench(
        model=model,
        slices=tuple(slices),
        # A slice without signal has no image, see `reconstruct`.
        factor=((ready.scale / case.scan.scale) * ready.kspace.flatten(1).any(1))[:, None, None],
        reference=reference,
        value=(lambda x: rpsnr(x, reference, zero_filled))
        if metric == "rpsnr"
        else (lambda x: score(x, reference, [metric])[metric]),
        bucket=torch.randint(_SKETCH, (reference.numel(),), generator=draw),
        flip=torch.randint(2, (reference.numel(),), generator=draw) * 2.0 - 1,
    )


def _widen(state: dict[str, Tensor], index: int, image: Tensor) -> None:
    """Take an image into the extremes of the band that its value lies in: one band, however many thresholds it clears."""
    for name, extreme in ((f"high.{index}", torch.maximum), (f"low.{index}", torch.minimum)):
        state[name] = extreme(state[name], image) if name in state else image.clone()


def _ranges(state: Mapping[str, Tensor], thresholds: int, slices: int) -> Tensor:
    """Total range above each threshold: the extremes of its band and of all bands above."""
    found = torch.zeros(thresholds, dtype=torch.float64)
    high = low = None
    for index in reversed(range(thresholds)):
        if f"high.{index}" in state:
            more, less = state[f"high.{index}"], state[f"low.{index}"]
            high = more if high is None else torch.maximum(high, more)
            low = less if low is None else torch.minimum(low, less)
        if high is not None and low is not None:
            found[index] = (high - low).sum(dtype=torch.float64) / slices
    return found


def _far_pair(bench: _Bench, settings: Sequence[Setting], values: Tensor, sketch: Tensor, quantile: float) -> Tensor:
    """(first place, second place, exact distance) of the farthest pair among the values in the top of the quantile."""
    bar = np.quantile(values.numpy(), quantile, method="higher")
    good = (values >= bar).nonzero().flatten()
    chosen = good.tolist() if len(good) <= _VERIFIED else _promising(good, sketch)
    images = torch.stack([bench.judged(settings[j])[0].flatten() for j in chosen]).double()
    apart = torch.cdist(images, images, compute_mode="donot_use_mm_for_euclid_dist")
    i, k = sorted(divmod(int(apart.argmax()), len(chosen)))
    return torch.tensor([chosen[i], chosen[k], float(apart[i, k])], dtype=torch.float64)


def _promising(good: Tensor, sketch: Tensor) -> list[int]:
    """The members of the farthest pairs of sketches, farthest first until there are enough; in the order of the grid."""
    some = sketch[good]
    pairs: list[tuple[float, int, int]] = []
    for begin in range(0, len(some), 256):  # never all distances at once
        apart = torch.cdist(some[begin : begin + 256], some)
        best = apart.flatten().topk(min(apart.numel(), 4 * _VERIFIED**2))
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        pairs += [(distance, begin + at // len(some), at % len(some)) for distance, at in found]
    chosen: dict[int, None] = {}
    for _, a, b in sorted(pairs, reverse=True):
        if len(chosen) <= _VERIFIED - 2:
            chosen |= {int(good[a]): None, int(good[b]): None}
    return sorted(chosen)


def _keep(path: Path, identity: str, state: Mapping[str, Tensor]) -> None:
    with files.write_atomically(path, overwrite=True) as temporary:
        temporary.write_bytes(safetensors.torch.save(dict(state), {"identity": identity}))


def _restore(path: Path, identity: str) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    files.check(path)
    try:
        with safe_open(path, "pt") as f:
            found = (f.metadata() or {}).get("identity")
            state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise errors.UnreadableFile(
            f"not a whole state of a landscape ({error})", file=path, help="delete it to start again"
        ) from error
    if found != identity:
        raise errors.BadOption(
            "holds another landscape: its model, scans, grid, metric or thresholds differ",
            file=path, key="file", help="name another file, or delete this one",
        )  # fmt: skip
    return state


# ---------------------------------------------------------------- what is read off it


def area_above(found: Landscape, thresholds: Sequence[float]) -> Tensor:
    """Fraction of the grid whose mean value is strictly better than each threshold, `(thresholds,)`.

    Better is above, or below where lower is better; settings without a value (see `interpolate`) do not count.
    """
    mean = found.mean.flatten()
    mean = mean[~mean.isnan()]
    t = torch.as_tensor(list(thresholds), dtype=torch.float64)[:, None]
    return ((mean > t) if found.higher_is_better else (mean < t)).double().mean(1)


def interpolate(found: Landscape, settings: Sequence[Mapping[str, float]], values: Sequence[float]) -> Landscape:
    """Values at a few settings (networks trained for one setting each), linearly in between: a landscape to compare with.

    Arguments:
        found: whose grid to fill.
        settings: dials by name, those of the grid at least.
        values: of the same metric, one per setting.

    Returns:
        a landscape with one case, on the same grid, linear along each dial's own scale; NaN outside the settings' hull.

    Raises:
        BadOption: a setting lacks a dial, or there are too few settings to span the grid.
    """
    missing = [name for name in found.dials if any(name not in setting for setting in settings)]
    if missing or len(settings) != len(values) or len(settings) <= len(found.dials):
        raise errors.BadOption(
            f"found {len(settings)} settings with {len(values)} values, without {missing or 'nothing'}; expected "
            f"more than {len(found.dials)}, each with every dial of the grid",
            key="settings",
        )
    places = [[float(setting[name]) for setting in settings] for name in found.dials]
    scaled = [_scaled(dial, axis) for dial, axis in zip(found.dials.values(), places, strict=True)]
    wanted = [_scaled(dial, axis) for dial, axis in zip(found.dials.values(), found.axes, strict=True)]
    mesh = np.meshgrid(*wanted, indexing="ij")
    y = np.asarray(values, dtype=float)
    if len(wanted) == 1:
        order = np.argsort(scaled[0])
        filled = np.interp(mesh[0], scaled[0][order], y[order], left=math.nan, right=math.nan)
    else:
        try:
            filled = griddata(np.stack(scaled, 1), y, tuple(mesh), method="linear")
        except Exception as error:  # of Qhull, which has many
            raise errors.BadOption("the settings lie on one line", key="settings") from error
    none = torch.zeros(1, 0, dtype=torch.float64)
    return replace(
        found, cases=("interpolated",), values=torch.from_numpy(filled)[None], thresholds=(), ranges=none, far=()
    )


def _scaled(dial: Dial, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    return np.log(x) if dial.scale == "log" else x


def histogram(model: Reconstructor) -> Tensor | None:
    """Share of training that data-driven sampling spent in each tenth of each dial, sum 1; None where it did none.

    Returns:
        `(10,)` or `(10, 10)` over the dials in their order.
    """
    counts = getattr(model, "histogram", None)
    if not isinstance(counts, Tensor) or counts.ndim != len(model.dials) or not float(counts.sum()) > 0:
        return None
    return counts.detach().cpu().double() / float(counts.sum())


# ---------------------------------------------------------------- the right setting for each weighting


@dataclass(frozen=True, kw_only=True, eq=False)
class Consistency:
    """Which setting serves which weighting of the losses best.

    Arguments:
        settings: the dials, both asked for and used.
        each: `(slices, asked, used)`: the loss weighted as asked, of the image made at the used setting; of the objective
            "relative", over that of x₀ = Aᴴy, as in training.
        logarithmic: the model was trained on the logarithm of the loss: means are geometric.
    """

    settings: tuple[Setting, ...]
    each: Tensor
    logarithmic: bool = False

    @property
    def loss(self) -> Tensor:
        """Mean over the slices, `(asked, used)`."""
        return self._followed.mean(0).exp() if self.logarithmic else self.each.mean(0)

    @property
    def wins(self) -> float:
        """Share of rows in which no other setting does better than the one asked for: 1 is perfect."""
        return float((self.loss.diagonal() <= self.loss.amin(1)).double().mean())

    @property
    def regret(self) -> Tensor:
        """How much more than the least loss the setting asked for leaves, `(asked,)`; 0.01 is 1 % more."""
        return self.loss.diagonal() / self.loss.amin(1) - 1

    @property
    def spread(self) -> Tensor:
        """How much more than the least loss the worst setting leaves, `(asked,)`: what there is to lose."""
        return self.loss.amax(1) / self.loss.amin(1) - 1

    @property
    def beaten(self) -> Tensor:
        """Whether the best setting of a row beats the one asked for beyond chance, `(asked,)`.

        The 95 % interval of the difference, paired over slices (Student's t), lies above zero. One slice tells nothing.
        """
        n, best = len(self.each), self.loss.argmin(1)
        rows = torch.arange(len(best))
        lost = self._followed[:, rows, rows] - self._followed[:, rows, best]
        if n < 2:
            return torch.zeros(len(best), dtype=torch.bool)
        return lost.mean(0) > float(stats.t.ppf(0.975, n - 1)) * lost.std(0) / math.sqrt(n)

    @property
    def _followed(self) -> Tensor:
        """What training took the mean of."""
        return (self.each + 1e-6).log() if self.logarithmic else self.each

    def records(self) -> list[dict[str, Any]]:
        """Flat records, one per (asked, used)."""
        return [
            {
                **{f"asked_{name}": value for name, value in asked.items()},
                **{f"used_{name}": value for name, value in used.items()},
                "loss": float(self.loss[a, u]),
            }
            for (a, asked), (u, used) in itertools.product(enumerate(self.settings), repeat=2)
        ]


def self_consistency(
    model: Reconstructor,
    cases: Sequence[Case],
    settings: Sequence[Mapping[str, float]],
    *,
    csm: str = "auto",
    progress: Progress | None = None,
) -> Consistency:
    """Is the image at a setting the best one for that weighting of the losses? Needs no other network to compare with.

        M[a, u] = Σ_k (w_k(a) / s_k) L_k(x̂_u)      of the objective "relative", over that of x₀ = Aᴴy (see `HyperRecon`)

    Arguments:
        model: with `names` and `scales` of its loss terms and `weights(1, dials)`, as `HyperRecon`.
        cases: scans, with references of the size of the image if a term compares with the truth; a complex reference
            where a term looks at the phase.
        settings: dials by name.

    Raises:
        BadOption: the model is trained for nothing that is weighted, or a setting it refuses.
        MissingKey, InconsistentShapes: a term needs a reference, and it is missing or cropped.
    """
    if not all(hasattr(model, name) for name in ("names", "scales", "weights")):
        raise errors.BadOption(f"{type(model).__name__} weighs no losses by its dials", key="model")
    if not cases or not settings:
        raise errors.NoData(f"found {len(cases)} scans and {len(settings)} settings", key="self-consistency")
    terms = losses.terms(model.names)  # type: ignore[arg-type]
    checked: list[Setting] = [dict(model.check_dials(setting)) for setting in settings]
    objective = getattr(model, "objective", "mean")
    sums = "mean" if objective == "log" else objective  # the logarithm comes later: what is shown is the loss
    model.eval()

    def values(x_hat: Tensor, at: Setting, x: Tensor | None, y: Tensor, A: LinearOperator) -> Tensor:
        network = model.hypernet(model.weights(1, at)) if hasattr(model, "hypernet") else None  # type: ignore[operator]
        result = losses.Result(x_hat=x_hat, x=x, y=y, forward=A, weights=network)
        return torch.stack([term.value(result) for term in terms], 1)

    each: list[Tensor] = []
    done = 0
    with torch.no_grad():
        w = torch.cat([model.weights(1, setting) for setting in checked])  # type: ignore[operator]
        scales = torch.as_tensor(model.scales)
        for y, A, x in _examples(cases, csm):
            start = None
            if sums == "relative":
                start = torch.cat([values(A.H(y), asked, x, y, A) for asked in checked])
            columns = []
            for used in checked:
                found = values(model(y, A, **used).image, used, x, y, A)
                loss = weighted(found, w.to(found), scales.to(found), sums, start)
                columns.append(loss.double().cpu())
                done += 1
                if progress is not None:
                    progress(done, len(checked) * sum(len(case.scan) for case in cases))
            each.append(torch.stack(columns, 1))
    return Consistency(settings=tuple(checked), each=torch.stack(each), logarithmic=objective == "log")


def _examples(cases: Sequence[Case], csm: str) -> Iterator[tuple[Tensor, LinearOperator, Tensor | None]]:
    """Slices with signal, normalised as in training: data, operator, truth."""
    for case in cases:
        ready = prepare(case.scan, csm=csm)
        assert ready.scale is not None and case.scan.scale is not None
        A, truth = encoding(ready), case.reference
        if truth is not None and tuple(truth.shape) != (len(ready), *ready.image_shape):
            raise errors.InconsistentShapes(
                f"found a reference {tuple(truth.shape)}, expected {(len(ready), *ready.image_shape)}", key=case.name
            )
        factor = ready.scale / case.scan.scale
        for b in range(len(ready)):
            if bool(ready.kspace[b].any()):
                x = None if truth is None else (truth[b : b + 1].to(ready.kspace) / factor[b])
                yield ready.kspace[b : b + 1], A.sample(b), x


# ---------------------------------------------------------------- what the setting does to a later step


def dice_along(
    rows: Sequence[Row],
    segment: Callable[[Tensor], Tensor],
    labels: Tensor | Mapping[str, Tensor],
    classes: Sequence[int],
) -> list[Row]:
    """Segment every image and compare with the true tissue: Dice overlap beside the metrics that are there.

    Arguments:
        rows: from `sweep` or `evaluate`, with images.
        segment: magnitudes `(B, H, W)` → integer labels `(B, H, W)`.
        labels: the true labels, or case → labels; an image larger than these is cropped to its centre.
        classes: which labels count, without the background unless wanted.

    Returns:
        the rows, with `dice_C` for each class C that occurs and their mean `dice` in `metrics`; draw them with
        `plots.dice_curve`.

    Raises:
        NoData: a row without an image, or without labels for its case.
    """
    found = []
    for row in rows:
        name = row.labels.get("case", "")
        truth = labels if isinstance(labels, Tensor) else labels.get(name)
        if row.image is None or truth is None:
            raise errors.NoData(
                f"no {'labels' if truth is None else 'image'} for {name!r}", key="dice", help="keep_images=True"
            )
        overlap = dice(segment(crop(row.image, truth.shape[1:]).abs()), truth, classes)
        if not overlap:
            raise errors.NoData(f"none of the classes {list(classes)} occurs in {name!r}", key="dice")
        more = {f"dice_{c}": value for c, value in overlap.items()}
        found.append(replace(row, metrics={**row.metrics, **more, "dice": sum(overlap.values()) / len(overlap)}))
    return found


# ---------------------------------------------------------------- the energy of a prior, without data


@dataclass(frozen=True, kw_only=True, eq=False)
class Surface:
    """An energy on the plane in which a path of images moves most.

    Arguments:
        origin: mean of the path, `(*)`.
        directions: `(2, *)`, orthonormal: the first two principal components of the path.
        share: `(2,)`, of the path's variance along each.
        a, b: coordinates of the grid `(n,)` along each.
        energy: `(n, n)` double, at origin + a_i directions[0] + b_j directions[1].
        path: `(states, 2)`, coordinates of the path.
    """

    origin: Tensor
    directions: Tensor
    share: Tensor
    a: Tensor
    b: Tensor
    energy: Tensor
    path: Tensor

    def records(self) -> list[dict[str, float]]:
        """Flat and JSON-ready: the grid."""
        return [
            {"a": float(a), "b": float(b), "energy": float(self.energy[i, j])}
            for (i, a), (j, b) in itertools.product(enumerate(self.a), enumerate(self.b))
        ]


@torch.no_grad()
def energy_surface(
    energy: Callable[[Tensor], Tensor], states: Tensor, *, points: int = 41, margin: float = 0.25, batch: int = 16
) -> Surface:
    """The energy around a path, a Langevin trajectory say, on the plane of its first two principal components.

    Arguments:
        energy: images `(B, *)` ↦ `(B,)`.
        states: the path, `(N, *)`, real or complex, N ≥ 3.
        points: of the grid along each component.
        margin: how far the grid goes beyond the path, over its extent.
        batch: images whose energy is asked for at once.

    Raises:
        NoData: fewer than three states, or all on one line.

    Source: M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023).
    """
    flat = (torch.view_as_real(states.resolve_conj()) if states.is_complex() else states).flatten(1).double()
    mean = flat.mean(0)
    moved = flat - mean
    # The small matrix of inner products has the same spectrum as the covariance of all pixels.
    variance, vectors = torch.linalg.eigh(moved @ moved.T)
    if len(flat) < 3 or variance[-2] <= 1e-12 * variance[-1]:
        raise errors.NoData(f"{len(flat)} states that span no plane", key="states", help="a longer path")
    directions = (vectors[:, [-1, -2]].T @ moved) / variance[[-1, -2], None].sqrt()
    path = moved @ directions.T

    def picture(rows: Tensor) -> Tensor:
        rows = rows.to(flat.dtype).reshape(-1, *states.shape[1:], *([2] if states.is_complex() else []))
        return (torch.view_as_complex(rows.contiguous()) if states.is_complex() else rows).to(states.dtype)

    reach = margin * (path.amax(0) - path.amin(0))
    a, b = (
        torch.linspace(float(lo), float(hi), points, dtype=torch.float64, device=flat.device)
        for lo, hi in zip(path.amin(0) - reach, path.amax(0) + reach, strict=True)
    )
    plane = mean + torch.cartesian_prod(a, b) @ directions
    values = torch.cat([energy(picture(rows)).double() for rows in plane.split(batch)])
    return Surface(
        origin=picture(mean[None])[0], directions=picture(directions), share=variance[[-1, -2]] / variance.sum(),
        a=a, b=b, energy=values.reshape(points, points), path=path,
    )  # fmt: skip


def _json_ready(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
