"""`tunemri evaluate`: images → retrospective undersampling → every contestant → table, curves and a page."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from . import errors, evaluation, plots, report
from .datasets import SOURCES, load_images, sampling_mask, subjects
from .evaluation import Case, Contestant, Row
from .landscape import Landscape, histogram, landscape, self_consistency
from .methods import prepare, reconstruct
from .metrics import METRICS
from .simulate import simulate

__all__ = ["Atlas", "Plan", "below", "means", "run", "summary"]

_THRESHOLDS = tuple(0.25 * i for i in range(-20, 161))  # dB over zero-filling; those that no image reaches cost nothing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to judge on.

    Arguments:
        folder: of images, or of scans that hold a reference.
        sources: data sets of a shared-data folder; empty takes those that are there, or every readable file.
        limit: images per source, evenly spaced.
        masks: `NAME:R` (several accelerations as `NAME:R1,R2`), or the file of a mask.
        coils, noise, seed: of the simulation.
    """

    folder: Path
    sources: tuple[str, ...] = ()
    limit: int = 10
    masks: tuple[str, ...] = ("poisson:4",)
    coils: int = 1
    noise: float = 0.0
    seed: int = 0

    def patterns(self) -> list[tuple[str, float]]:
        """(family or file, acceleration) of each mask."""
        found = []
        for text in self.masks:
            name, colon, numbers = text.rpartition(":")
            if not colon or Path(text).exists():
                found.append((text, math.nan if Path(text).exists() else 4.0))
                continue
            for number in numbers.split(","):
                try:
                    found.append((name, float(number)))
                except ValueError:
                    raise errors.BadOption(f"found {text!r}, expected NAME:ACCELERATION", key="masks") from None
        return found


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """Which landscapes to make.

    Arguments:
        points: along each of the (at most two) dials.
        thresholds: of the area and range curves, dB over zero-filling; empty takes a quarter of a dB apart.
        state: an existing folder that keeps landscapes, finished ones too; None keeps them where `run` keeps its rows.
    """

    points: int
    thresholds: tuple[float, ...] = ()
    state: Path | None = None


def cases(plan: Plan, images: Mapping[str, Sequence[Tensor]], *, maps: bool = True) -> Iterator[Case]:
    """Every image under every mask. The same image has the same phase, coils and noise under all masks.

    Arguments:
        maps: estimate the coil maps here, once for all who use the case.
    """
    whose = subjects(plan.folder, images)
    for name, acceleration in plan.patterns():
        for source, planes in images.items():
            step = max(1, len(planes) // plan.limit)
            for index in range(0, min(len(planes), step * plan.limit), step):
                x = planes[index]
                place = _Place(
                    plan=plan, mask=name, acceleration=acceleration, source=source, index=index, digest=_digest(x),
                    subject=whose[source][index],
                )  # fmt: skip
                case = place.simulated(x)
                yield replace(case, scan=replace(case.scan, csm=prepare(case.scan).csm)) if maps else case


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Which image, under which mask: what a worker makes the case of again."""

    plan: Plan
    mask: str
    acceleration: float
    source: str
    index: int
    digest: str
    subject: str

    def __call__(self) -> Case:
        for _ in range(2):
            x = _images(self.plan.folder, (self.source,) if self.source in SOURCES else ())[self.source][self.index]
            if _digest(x) == self.digest:
                return self.simulated(x)
            _images.cache_clear()  # read for an earlier command, perhaps, and changed since
        raise errors.UnreadableFile(
            f"image {self.index} of {self.source} is not the one that was named", file=self.plan.folder,
            key="cluster", help="workers must see the same files",
        )  # fmt: skip

    def simulated(self, x: Tensor) -> Case:
        plan = self.plan
        # A seed of its own for each image, the same in every run.
        seed = plan.seed + int.from_bytes(
            hashlib.sha256(f"{self.source}/{self.index}".encode(errors="surrogateescape")).digest()[:3]
        )
        pattern = sampling_mask(self.mask, (x.shape[-2], x.shape[-1]), self.acceleration, seed)
        scan, target = simulate(x[None], mask=pattern, coils=plan.coils, noise=plan.noise, seed=seed)
        label = self.mask if math.isnan(self.acceleration) else f"{self.mask} {self.acceleration:g}×"
        return Case(
            name=f"{self.source}/{self.index}", scan=scan, reference=target,
            labels={"mask": label, "source": self.source} | ({"subject": self.subject} if self.subject else {}),
            source=self,
        )  # fmt: skip


@lru_cache(maxsize=2)
def _images(folder: Path, sources: tuple[str, ...]) -> dict[str, list[Tensor]]:
    return load_images(folder, sources)


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def _trained(contestant: Contestant) -> bool:
    return next(contestant.model.parameters(), None) is not None


def run(
    contestants: Sequence[Contestant],
    plan: Plan,
    folder: Path,
    *,
    metrics: Sequence[str],
    tune: bool,
    grid: int,
    spline: bool = False,
    atlas: Atlas | None = None,
    keep: Path | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int], None],
) -> tuple[list[Row], str]:
    """Judge the contestants, write rows.csv, table.md, curves and report.html into `folder`.

    Arguments:
        tune: give each method without weights its best `lam` per mask, on these images.
        grid: points along the first dial of each trained model; 0 takes them as they are.
        spline: score every image once more, its intensities fitted to the reference on other images.
        atlas: the landscapes of those with dials; None makes none.
        keep: an existing folder for what is finished, so that a run that was stopped goes on from there.
        executor: of `cluster.workers`, for all but the landscapes; None does everything here.

    Returns:
        the rows, and the table as text.
    """
    there = [name for name, (filename, _) in SOURCES.items() if (plan.folder / filename).is_file()]
    images = load_images(plan.folder, plan.sources or there)
    lone = [source for source, planes in images.items() if min(len(planes), plan.limit) < 2]
    if spline and lone:
        raise errors.NoData(
            f"one image of {lone[0]}: no other to fit a spline to",
            key="spline",
            help="more images, or a larger --limit",
        )
    rows: list[Row] = []
    everything = list(cases(plan, images, maps=executor is None))
    groups: dict[str, list[Case]] = {}
    for case in everything:
        groups.setdefault(case.labels["mask"], []).append(case)
    done = 0
    for group in groups.values():
        entered = []
        for contestant in contestants:
            trained, dials = _trained(contestant), contestant.model.dials
            if tune and not trained and "lam" in dials and "lam" not in contestant.dials:
                best = evaluation.tune(
                    group, contestant, dial="lam", points=7, rounds=2, keep=keep, executor=executor
                ).dials
                entered.append(replace(contestant, dials={**contestant.dials, **best}))
            elif grid and trained and dials:
                entered += evaluation.along(contestant, {next(iter(dials)): grid})
            else:
                entered.append(contestant)
        start = done
        made = evaluation.evaluate(
            entered,
            group,
            metrics=metrics,
            keep_images=spline,
            progress=lambda n, of, start=start: progress(start + n, 0),  # type: ignore[misc]
            keep=keep,
            executor=executor,
        )
        rows += [replace(row, image=None) for row in made]
        rows += evaluation.splined(made, group, metrics) if spline else []
        done += len(entered) * len(group)

    evaluation.write_csv(folder / "rows.csv", evaluation.records(rows))
    lines = summary(rows)
    text = evaluation.markdown(lines)
    (folder / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    sections: list[report.Section] = [
        report.Table(
            title="Mean ± standard deviation (median)", rows=evaluation.table(lines), words=2,
            caption="A method's dial is given where it has one; `--tune` picked it for each mask on these very images."
            + " Of `NAME, spline`, intensities were fitted to the reference on images of others." * spline,
        )
    ]  # fmt: skip
    for contestant in contestants:
        own = [row for row in rows if row.labels["model"] == contestant.name and row.dials]
        dial = next(iter(contestant.model.dials), None)
        if dial is None or len({row.dials[dial] for row in own}) < 2 or not _trained(contestant):
            continue
        figure = plots.dial_curve(
            {m: [row for row in own if row.labels["mask"] == m] for m in groups}, dial, list(metrics)[:4],
            about=contestant.model.dials[dial],
        )  # fmt: skip
        figure.save(folder / f"curve-{_slug(contestant.name)}.png")
        sections.insert(
            0,
            report.Picture(
                title=f"{contestant.name} along its dial",
                png=figure.png(),
                caption="Mean over images; the band is the middle half.",
            ),
        )
    if atlas is not None:
        sections += _explore(contestants, groups, folder, atlas, keep, lambda n, of: progress(done + n, 0))
    report.report(
        folder / "report.html", title="tunemri evaluate",
        summary=f"{len(everything)} simulated scans from {plan.folder.name}, {len(contestants)} methods.",
        sections=sections, provenance={k: str(v) for k, v in vars(plan).items()},
    )  # fmt: skip
    return rows, text


def _explore(
    contestants: Sequence[Contestant],
    groups: Mapping[str, Sequence[Case]],
    folder: Path,
    atlas: Atlas,
    keep: Path | None,
    progress: Callable[[int, int], None],
) -> list[report.Section]:
    """Every contestant over the whole range of its free dials, for each mask: files in `folder`, sections of the page."""
    sections: list[report.Section] = []
    pairs: list[dict[str, Any]] = []

    def show(plot: plots.Plot, name: str, title: str, caption: str) -> None:
        plot.save(folder / f"{name}.png")
        sections.append(report.Picture(title=title, png=plot.png(), caption=caption))

    free: list[tuple[Contestant, list[str]]] = []
    for contestant in contestants:
        dials = contestant.model.dials
        names = [n for n, dial in dials.items() if not dial.choices and n not in contestant.dials][:2]
        if names:
            free.append((contestant, names))
    done = 0
    for mask, group in groups.items():
        found: dict[str, Landscape] = {}
        for contestant, names in free:
            name = _slug(f"{contestant.name} {mask}")
            state = None if keep is None else keep / f"part-landscape-{name}.safetensors"
            land = landscape(
                contestant.model, group, dials={**dict.fromkeys(names, atlas.points), **contestant.dials},
                thresholds=atlas.thresholds or _THRESHOLDS,
                progress=lambda n, of, start=done: progress(start + n, of),  # type: ignore[misc]
                file=state if atlas.state is None else atlas.state / f"landscape-{name}.safetensors",
            )  # fmt: skip
            found[contestant.name] = land
            done += land.values.numel()
            best, value = land.best
            setting = ", ".join(f"{dial} = {at:.3g}" for dial, at in best.items())
            show(
                plots.landscape(land), f"landscape-{name}", f"{contestant.name}: gain over zero-filling, {mask}",
                f"Mean over {len(group)} scans at {land.mean.numel()} settings. Star: the best, {value:.2f} dB at {setting}.",
            )  # fmt: skip
            # The scan of middling diversity, not the one that happens to show most.
            pair = sorted(land.far, key=lambda p: p.distance)[len(land.far) // 2]
            case = next(case for case in group if case.name == pair.case)
            a, b = (reconstruct(case.scan, contestant.model, **at).image[0].cpu() for at in (pair.a, pair.b))
            show(
                plots.far_pair(land, pair, a, b), f"far-{name}", f"{contestant.name}: equally good, most different, {mask}",
                f"{pair.case}: the farthest pair among the best tenth of all settings; look where the difference has structure.",
            )  # fmt: skip
            pairs += [{"model": contestant.name, "mask": mask, **p.record} for p in land.far]
        if found:
            where = _slug(mask)
            show(
                plots.area_curves(found, atlas.thresholds or None), f"area-{where}", f"Share of good settings, {mask}",
                "How much of the range of its dials a method can be trusted with: further right is better.",
            )  # fmt: skip
            show(
                plots.range_curves(found), f"range-{where}", f"Diversity of good images, {mask}",
                "Total pixel-wise range of the images above the threshold, each in units of its reference's maximum.",
            )  # fmt: skip
    for contestant, names in free:
        name, model = _slug(contestant.name), contestant.model
        if hasattr(model, "names"):
            count = min(atlas.points, 9 if len(names) == 1 else 4)
            axes = [evaluation.grid(model.dials[n], count) for n in names]
            settings = [{**contestant.dials, **dict(zip(names, at, strict=True))} for at in itertools.product(*axes)]
            consistent = self_consistency(model, [c for group in groups.values() for c in group], settings)
            show(
                plots.consistency(consistent), f"consistency-{name}", f"{contestant.name}: does it do what it is asked?",
                "Each row asks for one weighting of the losses; the star marks the setting whose images serve it best.",
            )  # fmt: skip
        if (shares := histogram(model)) is not None:
            show(
                plots.histogram(shares, list(model.dials)), f"histogram-{name}", f"{contestant.name}: trained settings",
                "Where data-driven sampling spent its training; an even spread would be flat.",
            )  # fmt: skip
    if pairs:
        evaluation.write_csv(folder / "far-pairs.csv", pairs)
    return sections


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-")


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per mask, method and setting; a dial that the method set itself, image by image, is left open."""
    used: dict[tuple[str, str], set[Any]] = {}
    for row in rows:
        for name in row.dials.keys() - set(row.given):
            used.setdefault((row.labels["model"], name), set()).add(row.dials[name])

    def told(row: Row, name: str) -> bool:
        return name in row.given or len(used[row.labels["model"], name]) == 1

    shown = [replace(row, dials={name: v for name, v in row.dials.items() if told(row, name)}) for row in rows]
    dials = sorted({f"dial_{name}" for row in shown for name in row.dials})
    return evaluation.summarise(shown, ("mask", "model", *dials))


def means(rows: Sequence[Row], model: str, metrics: Sequence[str]) -> dict[str, float]:
    """Mean of each metric over all rows of one contestant."""
    own = [row for row in rows if row.labels["model"] == model]
    return {name: sum(row.metrics[name] for row in own) / len(own) for name in metrics}


def below(found: Mapping[str, float], bounds: Mapping[str, float]) -> dict[str, float]:
    """The bounds that `found` does not reach; lower is better where the metric says so."""
    sign = {name: 1 if METRICS[name].higher_is_better else -1 for name in bounds}
    return {name: bound for name, bound in bounds.items() if not sign[name] * found[name] >= sign[name] * bound}
