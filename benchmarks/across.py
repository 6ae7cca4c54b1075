"""All methods on the same scans under all masks, each at its best setting and at the one that it chooses itself.

    python benchmarks/across.py --data $TUNEMRI_DATA -o runs/across

One slice, the middle one, of each validation subject, brought to `--size` by a crop of k-space; one coil, the images' own
phase or a smooth one, noise of half a per cent of the maximum. Three settings of each method:

    suggested   what the method takes when nobody turns a dial
    chosen      its main dial by `tunemri choose` for each scan: held-out samples and the noise level, no reference
    best        its main dial where the PSNR of this very scan is highest, by a search as long: nobody has this at a scanner

A bundled model is left out of a mask that is another task than its own, by the acceleration and pattern in its header; one
that is named with `-m` is not.

Writes rows.csv (one row per reconstruction, with seconds and parameters) and, of the first mask, a strip of images for
each subject. The same call goes on where it was stopped. Seconds are wall time of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunemri import datasets, errors, evaluation, methods, plots, tuning
from tunemri.evaluation import Case, Contestant, Row
from tunemri.fourier import crop, fft2, ifft2
from tunemri.masks import MASKS, make_mask
from tunemri.simulate import simulate

SETTINGS = ("suggested", "chosen", "best")
SHOWN = ("psnr", "ssim", "nmse", "hfen")
MAIN = ("lam", "kappa", "ssim")  # the dial that is turned: the first of these that a method has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with val/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "-m", "--model", action="append", help="repeatable; default: all that need no training, and all bundled"
    )
    parser.add_argument("--sources", default="ixi,oasis,siat,knee", help="comma-separated")
    parser.add_argument("--limit", type=int, default=3, help="subjects of each source, one slice each")
    parser.add_argument("--size", type=int, default=128, help="pixels of the shorter side; 0: as they are")
    parser.add_argument("--masks", default=",".join(MASKS), help="comma-separated families")
    parser.add_argument("--acceleration", type=float, default=4.0)
    parser.add_argument("--noise", type=float, default=0.005, help="standard deviation over the image maximum")
    how = "points, refinements and splits of choose"
    parser.add_argument("--choose", type=int, nargs=3, default=(7, 4, 3), metavar="N", help=how)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("once", errors.TunemriWarning)
    kept = options.output / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    untrained = [name for name in methods.METHODS if not methods.needs_weights(name)]
    entrants = {name: methods.load(name) for name in options.model or [*untrained, *methods.bundled()]}
    rows: list[dict[str, Any]] = []
    for number, mask in enumerate(options.masks.split(",")):
        group = list(cases(options, mask))
        subjects = {case.labels["subject"] for case in group}
        actual = statistics.fmean(case.scan.acceleration for case in group)
        print(f"\n{mask}: {len(group)} images of {len(subjects)} subjects, actual acceleration {actual:.2f}")
        found: list[Row] = []
        for name, model in entrants.items():
            if not options.model and (why := another_task(model, group)):
                print(f"  left out: {name} ({why})")
                continue
            own, choosing = judged(name, model, group, options, kept)
            count = sum(p.numel() for p in model.parameters())
            for row in own:
                waited = choosing.get(row.labels["case"]) if row.labels["setting"] == "chosen" else None
                rows.append({**row.record, "choose_seconds": waited, "parameters": count})
            found += own
            print("  " + line(name, own), flush=True)
        evaluation.write_csv(options.output / "rows.csv", complete(rows), overwrite=True)
        if number == 0:
            pictures(found, group, list(dict.fromkeys(row.labels["model"] for row in found)), options.output)


def another_task(model: methods.Reconstructor, group: Sequence[Case]) -> str | None:
    """Why these scans are no task of a model, None if they are one. Their noise and size may be new to it: scores tell."""
    limited = copy.copy(model)
    limited.trained = {key: model.trained[key] for key in ("acceleration", "block") if key in model.trained}
    return next((words for case in group for words in limited.outside(methods.prepare(case.scan))), None)


def cases(options: argparse.Namespace, mask: str) -> Iterator[Case]:
    """The middle slices of some subjects under one mask; a slice has the same phase and noise under all masks."""
    images = datasets.load_images(options.data / "val", options.sources.split(","))
    whose = datasets.subjects(options.data / "val", images)
    for source, planes in images.items():
        slices: dict[str, list[Tensor]] = {}
        for subject, x in zip(whose[source], planes, strict=True):
            slices.setdefault(subject, []).append(x)
        names = list(slices)
        count = min(options.limit, len(names))
        for subject in (names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)):
            x = reduced(slices[subject][len(slices[subject]) // 2], options.size)
            pattern = make_mask(mask, (x.shape[0], x.shape[1]), options.acceleration, seed=options.seed)
            scan, truth = simulate(x[None], mask=pattern, coils=1, noise=options.noise, seed=options.seed)
            labels = {"mask": mask, "source": source, "subject": subject}
            yield Case(name=subject, scan=scan, reference=truth, labels=labels)


def reduced(x: Tensor, size: int) -> Tensor:
    """The image at a lower resolution: the centre of its k-space. A real image stays real, for `simulate` to give it a phase."""
    if not size or min(x.shape) <= size:
        return x
    shape = [2 * round(n * size / min(x.shape) / 2) for n in x.shape]
    y = ifft2(crop(fft2(x.to(torch.complex64)), shape)) * math.sqrt(shape[0] * shape[1] / x.numel())
    return y if x.is_complex() else y.abs()


def judged(
    name: str, model: methods.Reconstructor, group: Sequence[Case], options: argparse.Namespace, kept: Path
) -> tuple[list[Row], dict[str, float]]:
    """The rows of one method at its three settings, and the seconds that choosing took for each case."""
    plain = Contestant(name=name, model=model)
    suggested = evaluation.evaluate([plain], group, metrics=SHOWN, keep=kept, keep_images=True)
    dial = next((d for d in MAIN if d in model.dials), None)
    if dial is None:  # nothing to turn: all three settings are one
        return [labelled(row, setting) for setting in SETTINGS for row in suggested], {}
    chosen, best = [], []
    choosing: dict[str, float] = {}
    for case, row in zip(group, suggested, strict=True):
        others = {n: v for n, v in row.dials.items() if n != dial}
        found = [row]
        for by in ("heldout-kspace", "reference"):
            setting, seconds = choice(model, case, by, others, options, kept)
            at = replace(plain, dials=setting)
            found += evaluation.evaluate([at], [case], metrics=SHOWN, keep=kept, keep_images=True)
            choosing.setdefault(case.name, seconds)
        chosen.append(found[1])
        # Between the points of the search one of the others may know better.
        best.append(max(found, key=lambda row: row.metrics["psnr"]))
    together = zip(SETTINGS, (suggested, chosen, best), strict=True)
    return [labelled(row, setting) for setting, own in together for row in own], choosing


def choice(
    model: methods.Reconstructor,
    case: Case,
    by: str,
    others: Mapping[str, Any],
    options: argparse.Namespace,
    kept: Path,
) -> tuple[dict[str, Any], float]:
    """What `choose` takes for a scan, and its seconds; kept, so that a run that was stopped need not choose again."""
    points, refine, splits = options.choose
    asked = [by, list(options.choose), options.seed, dict(others)]
    file = kept / f"choice-{evaluation.fingerprint(asked, model, [case])}.json"
    if not file.exists():
        start = time.perf_counter()
        found = tuning.choose(
            case.scan, model, by=by, reference=case.reference if by == "reference" else None, points=points, refine=refine,
            splits=splits, fixed=others, seed=options.seed,
        )  # fmt: skip
        file.write_text(json.dumps([found.dials, time.perf_counter() - start]))
    dials, seconds = json.loads(file.read_text())
    return dials, seconds


def labelled(row: Row, setting: str) -> Row:
    return replace(row, labels={**row.labels, "setting": setting})


def line(name: str, rows: Sequence[Row]) -> str:
    """PSNR at the three settings, mean over subjects, and seconds of a reconstruction."""
    means = (statistics.fmean(row.metrics["psnr"] for row in rows if row.labels["setting"] == s) for s in SETTINGS)
    text = "  ".join(f"{setting} {value:6.2f}" for setting, value in zip(SETTINGS, means, strict=True))
    return f"{name:14} {text} dB   {statistics.median(row.seconds for row in rows):6.2f} s"


def complete(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All records with the same columns, words first."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda c: 0 if c in ("model", "setting", "case", "mask", "source", "subject") else 1)
    return [{c: row.get(c) for c in columns} for row in rows]


def pictures(rows: Sequence[Row], group: Sequence[Case], names: Sequence[str], folder: Path) -> None:
    """The chosen image of each method, one window for all, and five times its error."""
    for case in group:
        panels = []
        for name in names:
            (row,) = (
                r for r in rows if (r.labels["model"], r.labels["setting"], r.labels["case"]) == (name, "chosen", case.name)
            )  # fmt: skip
            assert row.image is not None
            panels.append(plots.Panel(title=name, image=row.image[0], metrics={m: row.metrics[m] for m in SHOWN[:2]}))
        assert case.reference is not None
        plots.strip(panels, case.reference[0]).save(
            folder / f"images-{case.labels['source']}-{case.name}.png", overwrite=True
        )


if __name__ == "__main__":
    main()
