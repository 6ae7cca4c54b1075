"""`tunemri evaluate`: images → retrospective undersampling → every contestant → table, curves and a page."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from . import errors, evaluation, plots, report
from .datasets import SOURCES, load_images, sampling_mask
from .evaluation import Case, Contestant, Row
from .methods import prepare
from .metrics import METRICS
from .simulate import simulate

__all__ = ["Plan", "below", "means", "run", "summary"]


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


def cases(plan: Plan, images: Mapping[str, Sequence[Tensor]]) -> Iterator[Case]:
    """Every image under every mask. The same image has the same phase, coils and noise under all masks."""
    for name, acceleration in plan.patterns():
        for source, planes in images.items():
            step = max(1, len(planes) // plan.limit)
            for index in range(0, min(len(planes), step * plan.limit), step):
                x = planes[index][None]
                # A seed of its own for each image, the same in every run.
                seed = plan.seed + int.from_bytes(hashlib.sha256(f"{source}/{index}".encode()).digest()[:3])
                pattern = sampling_mask(name, (x.shape[-2], x.shape[-1]), acceleration, seed)
                scan, target = simulate(x, mask=pattern, coils=plan.coils, noise=plan.noise, seed=seed)
                label = name if math.isnan(acceleration) else f"{name} {acceleration:g}×"
                yield Case(
                    name=f"{source}/{index}", scan=replace(scan, csm=prepare(scan).csm), reference=target.abs(),
                    labels={"mask": label, "source": source},
                )  # fmt: skip


def run(
    contestants: Sequence[Contestant],
    plan: Plan,
    folder: Path,
    *,
    metrics: Sequence[str],
    tune: bool,
    grid: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Row], str]:
    """Judge the contestants, write rows.csv, table.md, curves and report.html into `folder`.

    Arguments:
        tune: give each method with a dial `lam` its best weight per mask, on these images.
        grid: points along the first dial of the others; 0 takes them as they are.

    Returns:
        the rows, and the table as text.
    """
    there = [name for name, (filename, _) in SOURCES.items() if (plan.folder / filename).is_file()]
    images = load_images(plan.folder, plan.sources or there)
    rows: list[Row] = []
    everything = list(cases(plan, images))
    groups: dict[str, list[Case]] = {}
    for case in everything:
        groups.setdefault(case.labels["mask"], []).append(case)
    done = 0
    for group in groups.values():
        entered = []
        for contestant in contestants:
            if tune and "lam" in contestant.model.dials and "lam" not in contestant.dials:
                best = evaluation.tune(group, contestant.model, dial="lam", points=7, rounds=2).dials
                entered.append(replace(contestant, dials=best))
            elif grid and contestant.model.dials and "lam" not in contestant.model.dials:
                entered += evaluation.along(contestant, {next(iter(contestant.model.dials)): grid})
            else:
                entered.append(contestant)
        start = done
        rows += evaluation.evaluate(
            entered,
            group,
            metrics=metrics,
            progress=lambda n, of, start=start: progress(start + n, 0),  # type: ignore[misc]
        )
        done += len(entered) * len(group)

    evaluation.write_csv(folder / "rows.csv", evaluation.records(rows))
    lines = summary(rows)
    text = evaluation.markdown(lines)
    (folder / "table.md").write_text(text, encoding="utf-8")
    sections: list[report.Section] = [
        report.Table(
            title="Mean ± standard deviation (median)", rows=evaluation.table(lines), words=2,
            caption="A method's dial is given where it has one; `--tune` picked it for each mask on these very images.",
        )
    ]  # fmt: skip
    for contestant in contestants:
        own = [row for row in rows if row.labels["model"] == contestant.name and row.dials]
        dial = next(iter(contestant.model.dials), None)
        if dial is None or len({row.dials[dial] for row in own}) < 2 or (tune and dial == "lam"):
            continue
        figure = plots.dial_curve(
            {m: [row for row in own if row.labels["mask"] == m] for m in groups}, dial, list(metrics)[:4],
            about=contestant.model.dials[dial],
        )  # fmt: skip
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in contestant.name)
        figure.save(folder / f"curve-{name}.png")
        sections.insert(
            0,
            report.Picture(
                title=f"{contestant.name} along its dial",
                png=figure.png(),
                caption="Mean over images; the band is the middle half.",
            ),
        )
    report.report(
        folder / "report.html", title="tunemri evaluate",
        summary=f"{len(everything)} simulated scans from {plan.folder.name}, {len(contestants)} methods.",
        sections=sections, provenance={k: str(v) for k, v in vars(plan).items()},
    )  # fmt: skip
    return rows, text


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per mask, method and setting."""
    dials = sorted({f"dial_{name}" for row in rows for name in row.dials})
    return evaluation.summarise(rows, ("mask", "model", *dials))


def means(rows: Sequence[Row], model: str, metrics: Sequence[str]) -> dict[str, float]:
    """Mean of each metric over all rows of one contestant."""
    own = [row for row in rows if row.labels["model"] == model]
    return {name: sum(row.metrics[name] for row in own) / len(own) for name in metrics}


def below(found: Mapping[str, float], bounds: Mapping[str, float]) -> dict[str, float]:
    """The bounds that `found` does not reach; lower is better where the metric says so."""
    sign = {name: 1 if METRICS[name].higher_is_better else -1 for name in bounds}
    return {name: bound for name, bound in bounds.items() if not sign[name] * found[name] >= sign[name] * bound}
