"""What a dial does, and who is better: settings × scans × methods in, rows out, tables from rows.

    grid      slider positions → values             sweep     one scan along the dials → rows with images
    tune      the best setting over some scans      evaluate  contestants × cases → rows
    splined   rows with images → the same, intensities fitted to the reference on other images
    rows      → records (flat) → CSV, summary, Markdown, paired difference, curve along a dial

A row is one reconstruction. Nothing here draws, prints or chooses a device.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import safe_open
from scipy import stats
from torch import Tensor

from . import __version__, cluster, errors, files
from .fourier import crop
from .methods import load
from .methods.base import Dial, Reconstructor, prepare, reconstruct
from .metrics import intensity_spline, known, score, shown
from .scan import Scan

__all__ = [
    "Case",
    "Contestant",
    "Row",
    "Tuned",
    "along",
    "choose_by_reference",
    "csv_text",
    "dial_curve",
    "evaluate",
    "fingerprint",
    "grid",
    "heading",
    "markdown",
    "paired",
    "records",
    "splined",
    "summarise",
    "sweep",
    "table",
    "tune",
    "write_csv",
]

Setting = Mapping[str, Any]
Grid = Mapping[str, int | float | str | Sequence[float | str]]
METRICS_SHOWN = ("psnr", "ssim", "mae", "hfen")
_PARTS = ("mean", "sd", "median")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scan to be judged.

    Arguments:
        name: what to call it in a table.
        scan: what was measured.
        reference: the truth, real or complex `(B, H, W)` in the units of the scan, or None: unknown. A reference
            smaller than the image is compared with the image's centre, as fastMRI does.
        labels: what to group tables by, e.g. mask, acceleration, data set.
        source: makes this case again on another machine, from paths; None: the data themselves travel there.
    """

    name: str
    scan: Scan
    reference: Tensor | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    source: Callable[[], Case] | None = None


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A method with the setting it is judged at; dials not named take the method's own suggestion.

    Arguments:
        source: what `load` makes the model of on another machine; "": the weights themselves travel there.
    """

    name: str
    model: Reconstructor
    dials: Setting = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reconstruction: who made it, how, and how good it is.

    Arguments:
        labels: model, case and the labels of the case.
        dials: the setting that was used.
        given: names of those dials that were asked for; the others the method set itself, for this very image.
        metrics: name → value against the reference; empty without one.
        residual: ‖A x̂ - y‖ / ‖y‖, mean over slices; None where the method reports none.
        seconds: wall time of the reconstruction, coil maps not included.
        status: "converged", or why not.
        image: complex `(B, H, W)`, or None if it was not kept.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    dials: Mapping[str, Any] = field(default_factory=dict)
    given: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    residual: float | None = None
    seconds: float = 0.0
    status: str = "converged"
    image: Tensor | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Flat and JSON-ready; a dial's column is `dial_NAME`, for a dial may be called like a metric."""
        dials = {f"dial_{name}": value for name, value in self.dials.items()}
        tail = {"residual": self.residual, "seconds": self.seconds, "status": self.status}
        return {**self.labels, **dials, **self.metrics, **tail}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The setting that `tune` found.

    Arguments:
        dials: the best setting.
        value: the mean metric there.
        curve: (dial value, mean metric) of all settings tried, in order of the dial.
        at_edge: the best lies at an end of the dial's range, so a wider range might hold a better one.
    """

    dials: dict[str, float]
    value: float
    curve: tuple[tuple[float, float], ...]
    at_edge: bool


def grid(dial: Dial, n: int, start: float | None = None, stop: float | None = None) -> list[float | str]:
    """n values of a dial, evenly spaced as numbers, both ends included.

    A grid is read as numbers, so a slider of equal steps (`Dial.curve`) does not move it.

    Arguments:
        dial: whose range and scale, linear or log; a dial with choices gives all of them, whatever n.
        n: how many; one alone is the default of the dial, or `start` if given.
        start, stop: narrower ends; None takes those of the dial.

    Raises:
        BadOption: n < 1, or ends outside the dial's range.
    """
    if dial.choices:
        return list(dial.choices)
    dial = replace(dial, curve=())
    if not 1 <= n <= 100_000:
        raise errors.BadOption(f"found {n} points, expected 1 to 100000", key="grid")
    lo = float(dial.check("grid", dial.lo if start is None else start))
    hi = float(dial.check("grid", dial.hi if stop is None else stop))
    if n == 1:
        return [float(dial.default) if start is None else lo]
    if lo > hi:
        return grid(dial, n, stop, start)[::-1]
    first, last = dial.position(lo), dial.position(hi)
    # The ends are the numbers that were asked for: exp(log(hi)) may lie outside by one rounding.
    return [lo, *(dial.at(first + (last - first) * i / (n - 1)) for i in range(1, n - 1)), hi]


def sweep(
    scan: Scan | Case,
    model: Reconstructor | Contestant,
    settings: Grid | int | None = None,
    *,
    reference: Tensor | None = None,
    metrics: Sequence[str] = METRICS_SHOWN,
    csm: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    keep_images: bool = True,
    keep: Path | None = None,
    executor: Executor | None = None,
    **dials: float | str | Sequence[float | str],
) -> list[Row]:
    """Reconstruct one scan along its dials: one row per setting, every combination of several dials.

    Arguments:
        scan, model: as for `reconstruct`, or as a `Case` and a `Contestant`, which say where they come from; coil maps
            are estimated once, not once per setting.
        settings: dial → a number of points (int), the values (a list), or one fixed value; an int alone is
            the number of points on the model's first dial; None with no `dials` either means 21 of these.
        reference: as in `Case`; without one there are no metrics, only the data residual.
        metrics: keys of METRICS.
        csm: how to estimate coil maps where the scan has none.
        progress: called with (done, total) after each.
        keep_images: False drops the images, where the grid is large.
        keep, executor: as for `evaluate`.
        **dials: the same as `settings`, as keywords: `sweep(scan, model, ssim=21)`.

    Returns:
        rows in the order of the grid, the last dial running fastest.

    Raises:
        BadOption: an unknown dial or metric, a value outside its range; and as `reconstruct`.
    """
    if settings is None and not dials:
        settings = 21
    at = model if isinstance(model, Contestant) else Contestant(name=type(model).__name__, model=model)
    if isinstance(settings, int):
        settings = {next(iter(at.model.dials)): settings} if at.model.dials else {}
    contestants = along(at, {**(settings or {}), **dials})
    case = scan if isinstance(scan, Case) else Case(name="scan", scan=scan, reference=reference)
    rows = evaluate(
        contestants, [case], metrics=metrics, csm=csm, keep_images=keep_images, progress=progress, keep=keep,
        executor=executor,
    )  # fmt: skip
    return [replace(row, labels={}) for row in rows]


def along(contestant: Contestant, settings: Grid) -> list[Contestant]:
    """The same method at every setting of a grid (see `sweep`), all other dials as they were.

    Raises:
        BadOption: no such dial, or a value outside its range.
    """
    dials = contestant.model.dials
    axes = {}
    for name, values in settings.items():
        if name not in dials:
            raise errors.BadOption("no such dial", key=name, help=errors.did_you_mean(name, dials))
        if isinstance(values, int):
            axes[name] = grid(dials[name], values)
        else:
            axes[name] = [dials[name].check(name, v) for v in ([values] if isinstance(values, float | str) else values)]
        if not axes[name]:
            raise errors.BadOption("found no values, expected at least one", key=name)
    return [
        replace(contestant, dials={**contestant.dials, **dict(zip(axes, values, strict=True))})
        for values in itertools.product(*axes.values())
    ]


def evaluate(
    contestants: Sequence[Contestant],
    cases: Iterable[Case],
    *,
    metrics: Sequence[str] = METRICS_SHOWN,
    csm: str = "auto",
    keep_images: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_error: Callable[[Case, errors.TunemriError], None] | None = None,
    keep: Path | None = None,
    executor: Executor | None = None,
) -> list[Row]:
    """Every contestant on every case: one row each, all contestants on the very same data.

    Arguments:
        contestants: methods with their settings; several settings of one method: `along`.
        cases: scans with references, perhaps a generator: one is in memory at a time. Several masks of one
            image are several cases with a label `mask`.
        metrics: keys of METRICS.
        csm: how to estimate coil maps where a scan has none; once per case, shared by all contestants.
        keep_images: keep the images in the rows.
        progress: called with (done, total) after each row; total is 0 where `cases` has no length.
        on_error: called for a case that cannot be reconstructed or compared, which is then left out for *all*
            contestants, so that tables stay paired; None raises.
        keep: an existing folder that keeps every finished row: the same call, stopped at any moment, goes on from there
            and ends with the same rows. None keeps nothing.
        executor: of `cluster.workers`: the same rows, made elsewhere; None makes them here.

    Raises:
        BadOption: an unknown metric; and as `reconstruct`.
    """
    for name in metrics:
        known(name)
    if executor is not None:
        asked = _Asked(metrics=tuple(metrics), csm=csm, keep_images=keep_images)
        return _spread(contestants, list(cases), asked, executor, progress, on_error, keep)
    total = len(contestants) * len(cases) if isinstance(cases, Sequence) else 0
    rows: list[Row] = []
    for i, case in enumerate(cases):
        rows_of_case = []
        try:
            case = _with_maps(case, csm)
            mark = "" if keep is None else fingerprint([csm, list(metrics), keep_images], None, [case])
            for j, contestant in enumerate(contestants):
                if keep is None:
                    rows_of_case.append(_row(contestant, case, metrics, keep_images))
                else:
                    file = _part_file(keep, mark, contestant, case)
                    if (row := _kept(file)) is None:
                        row = _row(contestant, case, metrics, keep_images)
                        _keep(row, file)
                    rows_of_case.append(row)
                if progress is not None:
                    progress(i * len(contestants) + j + 1, total)
        except errors.TunemriError as error:
            if on_error is None:
                raise
            on_error(case, error)
            continue
        rows += rows_of_case
    return rows


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is wanted of every case."""

    metrics: tuple[str, ...]
    csm: str
    keep_images: bool


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some settings on one case: what travels to a worker."""

    case: Case | Callable[[], Case]
    settings: tuple[tuple[str, str | Reconstructor, str, Setting], ...]  # name, model or its source, fingerprint, dials
    asked: _Asked


def _spread(
    contestants: Sequence[Contestant],
    cases: Sequence[Case],
    asked: _Asked,
    executor: Executor,
    progress: Callable[[int, int], None] | None,
    on_error: Callable[[Case, errors.TunemriError], None] | None,
    keep: Path | None,
) -> list[Row]:
    """`evaluate` on the workers of an executor: the same rows, in the same order."""
    models = {id(c.model): fingerprint(None, c.model) for c in contestants}
    todo = [(i, j) for i in range(len(cases)) for j in range(len(contestants))]
    found: dict[tuple[int, int], Row] = {}
    places: dict[tuple[int, int], Path] = {}
    if keep is not None:
        marks = [fingerprint([asked.csm, list(asked.metrics), asked.keep_images], None, [case]) for case in cases]
        places = {(i, j): _part_file(keep, marks[i], contestants[j], cases[i]) for i, j in todo}
        found = {at: row for at, file in places.items() if (row := _kept(file)) is not None}
    # Parts large enough to pay for the journey, and enough of them that nobody waits for the last.
    size = max(1, min(8, len(todo) // 32))
    parts = []
    for i in range(len(cases)):
        missing = [(i, j) for j in range(len(contestants)) if (i, j) not in found]
        parts += [missing[k : k + size] for k in range(0, len(missing), size)]
    units = [
        _Part(
            case=cases[part[0][0]].source or cases[part[0][0]], asked=asked,
            settings=tuple((c.name, c.source or c.model, models[id(c.model)], c.dials) for _, j in part for c in [contestants[j]]),
        )
        for part in parts
    ]  # fmt: skip
    failed: dict[int, errors.TunemriError] = {}
    for n, outcome in cluster.each(_judge, units, executor):
        if isinstance(outcome, Exception):
            if on_error is None or not isinstance(outcome, errors.TunemriError):
                raise outcome
            failed.setdefault(parts[n][0][0], outcome)
            continue
        for at, row in zip(parts[n], outcome, strict=True):
            found[at] = row
            if keep is not None:
                _keep(row, places[at])
        if progress is not None:
            progress(len(found), len(todo))
    if on_error is not None:
        for i in sorted(failed):
            on_error(cases[i], failed[i])
    return [found[i, j] for i, j in todo if i not in failed]


def _judge(part: _Part) -> list[Row]:
    """The rows of a part, on a worker."""
    case = part.case if isinstance(part.case, Case) else _made(part.case, part.asked.csm)
    contestants = [
        Contestant(name=name, model=_loaded(model, digest) if isinstance(model, str) else model, dials=dials)
        for name, model, digest, dials in part.settings
    ]
    asked = part.asked
    return evaluate(contestants, [case], metrics=asked.metrics, csm=asked.csm, keep_images=asked.keep_images)


@lru_cache(maxsize=8)
def _made(source: Callable[[], Case], csm: str) -> Case:
    return _with_maps(source(), csm)


@lru_cache(maxsize=8)
def _loaded(source: str, digest: str) -> Reconstructor:
    model = load(source)
    if fingerprint(None, model) != digest:
        raise errors.WrongModel(
            "not the weights that were named", file=source, key="cluster", help="workers must see the same files"
        )
    return model


def _with_maps(case: Case, csm: str) -> Case:
    """The case with coil maps, so that they are estimated once and are the same for all who need them."""
    if case.scan.csm is not None or case.scan.coils == 1:
        return case
    return replace(case, scan=replace(case.scan, csm=prepare(case.scan, csm=csm).csm))


def _row(contestant: Contestant, case: Case, metrics: Sequence[str], keep_image: bool) -> Row:
    start = time.perf_counter()
    out = reconstruct(case.scan, contestant.model, **contestant.dials)
    image = out.image.cpu()  # also waits for the device, so that the clock is right
    seconds = time.perf_counter() - start
    values = {}
    if case.reference is not None:
        reference = case.reference.cpu()
        values = score(crop(image, reference.shape[1:]) if reference.ndim == 3 else image, reference, metrics)
    return Row(
        labels={"model": contestant.name, "case": case.name, **case.labels},
        dials=dict(out.dials or contestant.dials),
        given=tuple(contestant.dials),
        metrics=values,
        residual=None if out.residual is None else float(out.residual.double().mean()),
        seconds=seconds,
        status=out.status,
        image=image if keep_image else None,
    )


def _part_file(keep: Path, mark: str, contestant: Contestant, case: Case) -> Path:
    asked = [mark, contestant.name, contestant.dials, case.labels]
    return keep / f"part-{fingerprint(asked, contestant.model)}.safetensors"


def _keep(row: Row, file: Path) -> None:
    about = {
        name: getattr(row, name) for name in ("labels", "dials", "given", "metrics", "residual", "seconds", "status")
    }
    with files.write_atomically(file, overwrite=True) as temporary:
        tensors = {} if row.image is None else {"image": row.image.contiguous()}
        temporary.write_bytes(safetensors.torch.save(tensors, {"row": json.dumps(about)}))


def _kept(file: Path) -> Row | None:
    """The row in a file of `_keep`; None where there is none, or none that can be read."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as f:
            image = f.get_tensor("image") if "image" in f.keys() else None  # noqa: SIM118 (not a mapping)
            return Row(image=image, **json.loads(f.metadata()["row"]))
    except Exception as error:
        errors.warn(f"{file}: damaged ({error}): done again", "unreadable_file")
        return None


def fingerprint(plan: Any, model: Reconstructor | None = None, cases: Sequence[Case] = ()) -> str:
    """What results depend on, in 64 characters: a JSON-ready plan, the weights of a model, the data of cases."""
    about = [__version__, plan]
    if model is not None:
        about += [type(model).__name__, dict(model.arguments)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items() if model is not None else ():
        _add(digest, name, weight)
    for case in cases:
        scan = case.scan
        digest.update(repr((case.name, scan.noise_std, scan.image_shape)).encode())
        fields = (scan.kspace, scan.mask, scan.trajectory, scan.csm, scan.scale, case.reference)
        for name, x in zip(("kspace", "mask", "trajectory", "csm", "scale", "reference"), fields, strict=True):
            if x is not None:
                _add(digest, name, x)
    return digest.hexdigest()


def _add(digest: Any, name: str, x: Tensor) -> None:
    digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().numpy().tobytes())


def splined(rows: Sequence[Row], cases: Iterable[Case], metrics: Sequence[str] = METRICS_SHOWN) -> list[Row]:
    """Every row once more, its image through the intensity spline that *other* images of the same kind ask for.

    Of the same kind are rows that share all labels but case and subject, and the dials that were given. The spline (see
    `metrics.intensity_spline`) never sees the subject that it is used on, nor, where there is but one, the image.

    Arguments:
        rows: from `evaluate`, with their images.
        cases: those of the rows, with references.
        metrics: keys of METRICS.

    Returns:
        rows without image, in order, of models called `NAME, spline`.

    Raises:
        NoData: a row without image or reference, or with no other image of its kind.
    """
    truths = {_place(dict(case.labels) | {"case": case.name}): case.reference for case in cases}
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row)
    pairs = {id(row): _compared(row, truths.get(_place(row.labels))) for row in rows}
    found: dict[tuple[Any, str], Callable[[Tensor], Tensor]] = {}
    out = []
    for row in rows:
        kind, members = _kind(row), kinds[_kind(row)]
        several = len({_subject(other) for other in members}) > 1
        whose = _subject if several else _case
        if (key := (kind, whose(row))) not in found:
            others = [pairs[id(other)] for other in members if whose(other) != whose(row)]
            if not others:
                raise errors.NoData(
                    f"{_case(row)} is the only image of its kind: no other to fit a spline to", key="spline",
                    help="more images, or scores without it",
                )  # fmt: skip
            found[key] = intensity_spline(*zip(*others, strict=True))
        image, truth = pairs[id(row)]
        labels = {**row.labels, "model": f"{row.labels['model']}, spline"}
        out.append(replace(row, labels=labels, image=None, metrics=score(found[key](image), truth, metrics)))
    return out


def _place(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, text) for name, text in labels.items() if name != "model"))


def _kind(row: Row) -> Any:
    labels = sorted((name, text) for name, text in row.labels.items() if name not in ("case", "subject"))
    return tuple(labels), tuple((name, row.dials.get(name)) for name in row.given)


def _case(row: Row) -> str:
    return row.labels.get("case", "")


def _subject(row: Row) -> str:
    """Whose image it is; of one that nobody says it of, the image itself."""
    return row.labels.get("subject") or f"\n{_case(row)}"


def _compared(row: Row, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """The image of a row and its truth, as `evaluate` compares them."""
    if row.image is None or reference is None:
        raise errors.NoData(f"{_case(row)} has no image or no reference", key="spline", help="keep_images=True")
    truth = reference.cpu()
    return crop(row.image, truth.shape[1:]) if truth.ndim == 3 else row.image, truth


def choose_by_reference(rows: Sequence[Row], metric: str = "psnr") -> Row:
    """The row with the best metric.

    Raises:
        BadOption: an unknown metric.
        NoData: no row, or rows without that metric (they were made without a reference).
    """
    sign = 1 if known(metric).higher_is_better else -1
    judged = [row for row in rows if metric in row.metrics]
    if not judged:
        raise errors.NoData(f"no setting has a value for {metric}", key="reference", help="pass --reference")
    return max(judged, key=lambda row: sign * row.metrics[metric])


def tune(
    cases: Sequence[Case],
    model: Reconstructor | Contestant,
    metric: str = "psnr",
    *,
    dial: str | None = None,
    points: int = 9,
    rounds: int = 3,
    fixed: Setting | None = None,
    csm: str = "auto",
    keep: Path | None = None,
    executor: Executor | None = None,
) -> Tuned:
    """The setting of one dial that is best on average over some cases: a grid, then finer ones around its best.

    This is how a baseline gets its weight honestly: give it the cases that the others are judged on.

    Arguments:
        cases: with references.
        model: any method with a numeric dial, or a `Contestant`, which says where it comes from.
        metric: a key of METRICS.
        dial: which; None takes the model's first.
        points: settings per round, at least 3.
        rounds: 1 is the plain grid; each further one shrinks the interval by (points - 1) / 2.
        fixed: values of the other dials.
        csm: how to estimate coil maps where a scan has none.
        keep, executor: as for `evaluate`.

    Raises:
        BadOption: no such dial or metric, a dial without a range, fewer than 3 points.
        NoData: no case, or one without reference.
    """
    better = max if known(metric).higher_is_better else min
    contestant = model if isinstance(model, Contestant) else Contestant(name="", model=model)
    dials = contestant.model.dials
    name = dial if dial is not None else next(iter(dials), "")
    if name not in dials or dials[name].choices:
        raise errors.BadOption("no such dial with a range", key=name or "dial", help=errors.did_you_mean(name, dials))
    if points < 3 or rounds < 1:
        raise errors.BadOption(f"found {points} points in {rounds} rounds, expected at least 3 in 1", key="tune")
    if not cases or any(case.reference is None for case in cases):
        raise errors.NoData("tuning needs at least one case, each with a reference", key="reference")
    if executor is None:
        cases = [_with_maps(case, csm) for case in cases]
    full = dials[name]
    tried: dict[float, float] = {}
    best, lo, hi = full.lo, full.lo, full.hi
    for _ in range(rounds):
        new = [value for v in grid(full, points, lo, hi) if (value := float(v)) not in tried]
        at = [replace(contestant, name=name, dials={**contestant.dials, **(fixed or {}), name: value}) for value in new]
        rows = evaluate(at, cases, metrics=[metric], csm=csm, keep=keep, executor=executor)
        for k, value in enumerate(new):
            tried[value] = statistics.fmean(row.metrics[metric] for row in rows[k :: len(new)])
        ordered = sorted(tried)
        best = better(ordered, key=lambda v: tried[v])
        i = ordered.index(best)
        lo, hi = ordered[max(i - 1, 0)], ordered[min(i + 1, len(ordered) - 1)]
    return Tuned(
        dials={name: best},
        value=tried[best],
        curve=tuple(sorted(tried.items())),
        at_edge=best in (full.lo, full.hi),
    )


def dial_curve(rows: Sequence[Row], dial: str, metric: str) -> list[dict[str, float]]:
    """A metric along a dial, over all cases in `rows`: records of dial, mean, low, high (quartiles), n.

    Raises:
        NoData: no row has both.
    """
    at: dict[float, list[float]] = {}
    for row in rows:
        value = row.residual if metric == "residual" else row.metrics.get(metric)
        if isinstance(row.dials.get(dial), float | int) and value is not None:
            at.setdefault(float(row.dials[dial]), []).append(float(value))
    if not at:
        raise errors.NoData(f"no row has both a number for the dial {dial!r} and a value for {metric!r}", key=dial)
    return [
        {
            "dial": x,
            "mean": statistics.fmean(values),
            "low": float(np.quantile(values, 0.25)),
            "high": float(np.quantile(values, 0.75)),
            "n": len(values),
        }
        for x, values in sorted(at.items())
    ]


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as flat records that all have the same keys; None where a row has nothing to say."""
    flat = [row.record for row in rows]
    tail = ("residual", "seconds", "status")
    keys = [k for k in dict.fromkeys(itertools.chain.from_iterable(flat)) if k not in tail]
    order = sorted(keys, key=lambda k: _rank(k, flat)) + list(tail)
    return [{key: record.get(key) for key in order} for record in flat]


def _rank(key: str, flat: Sequence[Mapping[str, Any]]) -> int:
    """Labels first, then dials, then metrics; sorting is stable within each."""
    if key.startswith("dial_"):
        return 1
    return 0 if any(isinstance(record.get(key), str) for record in flat) else 2


def summarise(
    rows: Sequence[Row], by: Sequence[str] = ("model",), metrics: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Mean, standard deviation, median and number per group, in the order in which groups first appear.

    Arguments:
        rows: from `evaluate`.
        by: keys of `Row.record`, e.g. `("mask", "model", "dial_lam")`; None where a row lacks it.
        metrics: which; None takes all that occur.

    Returns:
        records with the keys of `by`, `n`, and for each metric `NAME_mean`, `NAME_sd`, `NAME_median`.
    """
    names = list(dict.fromkeys(n for row in rows for n in row.metrics)) if metrics is None else list(metrics)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        record = row.record
        groups.setdefault(tuple(record.get(key) for key in by), []).append(row)
    out = []
    for key, members in groups.items():
        record = {**dict(zip(by, key, strict=True)), "n": len(members)}
        for name in names:
            values = [row.metrics[name] for row in members if name in row.metrics]
            if values:
                # Infinite PSNR has no spread.
                spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
                record |= {
                    f"{name}_mean": statistics.fmean(values),
                    f"{name}_sd": spread,
                    f"{name}_median": statistics.median(values),
                }
        out.append(record)
    return out


def paired(rows: Sequence[Row], a: str, b: str, metric: str = "psnr") -> dict[str, float]:
    """How much contestant `a` is better than `b`, on the same cases, subject by subject.

    Slices of one subject, and masks of one slice, are no independent witnesses: differences are averaged within each
    subject first, and a subject counts once.

    Arguments:
        rows: from `evaluate`, one setting per contestant; a label `subject` says whose scan it is. Where that is missing or
            empty, every case counts as a subject of its own.
        a, b: names of contestants.
        metric: a key of METRICS; differences are turned so that positive means `a` is better.

    Returns:
        n (subjects), mean, low and high (95 % interval of the mean by Student's t; infinite for one subject),
        wins (fraction of subjects where `a` is better), p (Wilcoxon signed rank, two-sided; 1 where nothing differs).

    Raises:
        NoData: they share no case.
        BadOption: an unknown metric, or a contestant with several rows for one case.
    """
    sign = 1 if known(metric).higher_is_better else -1
    values: dict[str, dict[tuple[str, ...], float]] = {a: {}, b: {}}
    subjects: dict[tuple[str, ...], str] = {}
    for row in rows:
        if row.labels.get("model") in values and metric in row.metrics:
            key = tuple(f"{k}={v}" for k, v in row.labels.items() if k != "model")
            mine = values[row.labels["model"]]
            if key in mine:
                raise errors.BadOption(
                    f"{row.labels['model']!r} has several rows for one case", key="paired", help="choose one setting"
                )
            mine[key] = row.metrics[metric]
            subjects[key] = row.labels.get("subject") or "\n".join(key)
    shared = [key for key in values[a] if key in values[b]]
    if not shared:
        raise errors.NoData(f"{a!r} and {b!r} share no case with {metric}", key="paired")
    own: dict[str, list[float]] = {}
    for key in shared:
        own.setdefault(subjects[key], []).append(sign * (values[a][key] - values[b][key]))
    d = np.array([statistics.fmean(differences) for differences in own.values()])
    half = float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.inf
    return {
        "n": len(d),
        "mean": float(d.mean()),
        "low": float(d.mean()) - half,
        "high": float(d.mean()) + half,
        "wins": float((d > 0).mean()),
        "p": float(stats.wilcoxon(d).pvalue) if d.any() else 1.0,
    }


def table(summary: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """`summarise`'s records as text, the heading first: `mean ± sd (median)` in one column per metric."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(summary)))
    names = [c.removesuffix("_mean") for c in columns if c.endswith("_mean")]
    plain = [c for c in columns if not any(c.startswith(f"{n}_") for n in names)]
    lines = [[c.removeprefix("dial_") for c in plain] + [heading(n) for n in names]]
    for record in summary:
        cells = [_cell(record.get(c)) for c in plain]
        for n in names:
            # The unit stands in the heading.
            values = [record.get(f"{n}_{part}") for part in _PARTS]
            parts = [shown(n, value).split()[0] for value in values if value is not None]
            # One case has neither spread nor median worth printing.
            cells.append("{} ± {} ({})".format(*parts) if len(parts) == 3 and record["n"] > 1 else "".join(parts[:1]))
        lines.append(cells)
    return lines


def markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """`table` in Markdown."""
    heading, *body = table(summary)
    lines = [heading, ["---"] * len(heading), *body] if body else []
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def heading(metric: str) -> str:
    """The name of a metric over a column, with its unit."""
    m = known(metric)
    return f"{m.label} [{m.unit}]" if m.unit == "dB" else m.label


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def csv_text(flat: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV with a header; numbers in full precision, nothing for None."""
    text = io.StringIO()
    columns = list(dict.fromkeys(itertools.chain.from_iterable(flat)))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def write_csv(path: str | os.PathLike[str], flat: Sequence[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Write `csv_text(flat)` to a file, whole or not at all.

    Raises:
        BadOption: the file exists and `overwrite` is false.
        NoSpace: the disk is full.
    """
    with files.write_atomically(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(csv_text(flat).encode(errors="backslashreplace"))
