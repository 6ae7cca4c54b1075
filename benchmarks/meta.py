"""Tables 1 to 5 of the meta-learning paper in its form, and what the guarded method promises beside them.

    python benchmarks/meta.py --data $TUNEMRI_DATA -o runs/meta
    python benchmarks/meta.py --data $TUNEMRI_DATA -o runs/meta --train 2000
    python benchmarks/meta.py --data $TUNEMRI_DATA -o runs/meta --memory --yardstick 5 --no-tables

Validation subjects, one coil, no noise, the images' own phase or a smooth one. For T1, T2 and PD: radial ratios that are
tasks of the model, radial ratios in between, and (T2) random Cartesian lines, which no task stands for. Rows: zero-filling,
total variation with its best weight for each ratio on these very images, the model with interpolated κ, and with κ adapted to
five training images of that ratio. With `--train STEPS` also networks that are trained here, with the recipe's arguments but
from scratch, for a total of STEPS steps each row: the meta-learned one on all ratios; κ = 1 on all ratios; both levels
joined; and the conventional ones, STEPS / 4 for each of four ratios (between two ratios, the better of the neighbours).
Runs live in OUT and resume. Prints mean ± sd, paired differences with their 95 % intervals, acceptance, violations of
descent, the guard's price in decibels and seconds; writes rows.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunemri import errors, evaluation, methods, training, tuning
from tunemri.datasets import Sampler, load_images, subjects
from tunemri.evaluation import Case, Row
from tunemri.formats import read_image
from tunemri.fourier import crop, fft2, ifft2
from tunemri.masks import make_mask
from tunemri.methods import Reconstructor, reconstruct
from tunemri.methods.metalearned import MetaLearned
from tunemri.metrics import psnr, score, ssim
from tunemri.scan import Scan
from tunemri.simulate import simulate

SEEN, UNSEEN = (0.1, 0.2, 0.3, 0.4), (0.15, 0.25, 0.35)
SOURCES = {"T1": "oasis", "T2": "siat", "PD": "ixi"}
TABLES = (
    # name, contrast, mask, ratios
    ("Table 1: T1, radial, seen", "T1", "radial", SEEN),
    ("Table 2: T1, radial, unseen", "T1", "radial", UNSEEN),
    ("Table 3: T2, radial, seen", "T2", "radial", SEEN),
    ("Table 4: T2, radial, unseen", "T2", "radial", UNSEEN),
    ("Table 5: T2, Cartesian, unseen", "T2", "cartesian-random", SEEN),
    ("not in the paper: PD, radial, seen", "PD", "radial", SEEN),
    ("not in the paper: PD, radial, unseen", "PD", "radial", UNSEEN),
)
METRICS = ("psnr", "ssim", "nmse")
RECIPE = Path(__file__).parent.parent / "recipes/meta-brain.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/, val/ and, for --yardstick, bench/"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-m", "--model", default="meta-brain", help="weights to judge; '' for those of --train alone")
    parser.add_argument("--limit", type=int, default=10, help="images of each contrast")
    parser.add_argument(
        "--size", type=int, default=0, help="bring images to this size by a crop of k-space; 0: as they are"
    )
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="train the comparison; 0: not")
    parser.add_argument("--edge", type=int, default=48, help="of --train: pixels of a training image")
    parser.add_argument(
        "--set", action="append", default=[], help="of --train: change the recipe, e.g. arguments.phases=4"
    )
    parser.add_argument("--table", type=int, action="append", metavar="1…7", help="only these tables; 6 and 7: PD")
    parser.add_argument("--no-tables", dest="tables", action="store_false")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step against phases")
    parser.add_argument(
        "--yardstick", type=int, default=0, metavar="EVERY", help="every so many-th image of bench/ista_brain"
    )
    parser.add_argument("--also", action="append", default=[], metavar="MODEL", help="of --yardstick: more models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("once", errors.TunemriWarning)
    if options.peak:
        print(peak(*options.peak.split(",")))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    model = methods.load(options.model) if options.model else None
    if options.memory:
        memory(options)
    if options.yardstick:
        names = [name for name in (options.model, *options.also) if name]
        rows = yardstick(options.data / "bench", {name: methods.load(name) for name in names}, options.yardstick)
        evaluation.write_csv(options.output / "yardstick.csv", evaluation.records(rows), overwrite=True)
    if options.tables:
        tables(options, model)


# ---------------------------------------------------------------- tables


def tables(options: argparse.Namespace, model: Reconstructor | None) -> None:
    """All tables, rows.csv, and the summary of the guard."""
    networks = trained(options) if options.train else {}
    rows: list[Row] = []
    certificates: list[dict[str, Any]] = []
    for number, (title, contrast, mask, ratios) in enumerate(TABLES, 1):
        if options.table and number not in options.table:
            continue
        print(f"\n{title}")
        for ratio in ratios:
            cases = [
                measured(x, mask, ratio, f"{contrast} {i}", options.size, subject)
                for i, (x, subject) in enumerate(images(options.data / "val", contrast, options.limit))
            ]
            shared = {"table": title, "ratio": f"{ratio:g}"}
            contestants, notes = entrants(model, networks, cases, options, contrast, mask, ratio)
            found: list[Row] = []
            for name, (entrant, dials) in contestants.items():
                for case in cases:
                    row, certificate = judged(name, entrant, case, dials)
                    found.append(replace(row, labels={**row.labels, **shared}))
                    if certificate and name in ("meta", "guard off"):
                        certificates.append({"name": name, **certificate})
            print(f"  {ratio:.0%} ({cases[0].scan.acceleration:.2f}×, n = {len(cases)})")
            for name in contestants:
                print("    " + line(name, [row for row in found if row.labels["model"] == name], notes.get(name, "")))
            for a, b in (
                ("meta", "tv"), ("adapted", "meta"), ("meta", "guard off"), ("trained meta", "conventional"),
                ("trained meta", "κ = 1"), ("trained meta", "joint"),
            ):  # fmt: skip
                if a in contestants and b in contestants:
                    d = evaluation.paired(found, a, b)
                    print(
                        f"    {a} - {b}: {d['mean']:+.3f} dB, {d['low']:+.3f} to {d['high']:+.3f}, wins {d['wins']:.0%}"
                    )
            rows += found
            evaluation.write_csv(options.output / "rows.csv", evaluation.records(rows), overwrite=True)
    guard(rows, certificates)


def entrants(
    model: Reconstructor | None, networks: Mapping[str, Reconstructor], cases: Sequence[Case], options: argparse.Namespace,
    contrast: str, mask: str, ratio: float,
) -> tuple[dict[str, tuple[Reconstructor, dict[str, Any]]], dict[str, str]]:  # fmt: skip
    """Who takes part in one cell of a table, with dials, and a remark about each."""
    tv = methods.load("tv")
    best = evaluation.tune(cases[:: max(1, len(cases) // 3)], tv, points=5, rounds=2)
    found: dict[str, tuple[Reconstructor, dict[str, Any]]] = {
        "zero-filled": (methods.load("zero-filled"), {}),
        "tv": (tv, dict(best.dials)),
    }
    notes = {"tv": f"lam {best.dials['lam']:.2g}"}
    if model is not None:
        found["meta"] = (model, {})
        # From training images: what is adapted must not have seen what it is judged by.
        few = [measured(x, mask, ratio, "", options.size) for x, _ in images(options.data / "train", contrast, 5)]
        new = tuning.adapt(model, [case.scan for case in few], [_truth(case) for case in few])
        found["adapted"] = (new.model, {})
        notes["adapted"] = f"on 5 others {new.gain:+.3f} dB ({new.low:+.3f} to {new.high:+.3f}), ω {new.shift:+.2f}"
        if ratio in SEEN:
            off = copy.deepcopy(model)
            assert isinstance(off, MetaLearned)
            off.guarded = False
            found["guard off"] = (off, {})
    for name, network in networks.items():
        if not name.startswith("conventional"):
            found[name] = (network, {})
    neighbours = [n for n in networks if n.startswith("conventional") and abs(float(n.split()[1]) - ratio) < 0.06]
    if neighbours:
        means = {
            n: statistics.mean(judged(n, networks[n], case, {})[0].metrics["psnr"] for case in cases)
            for n in neighbours
        }
        chosen = max(means, key=means.__getitem__)
        found["conventional"] = (networks[chosen], {})
        notes["conventional"] = chosen
    return found, notes


def images(folder: Path, contrast: str, limit: int) -> list[tuple[Tensor, str]]:
    """That many images of a contrast, evenly spaced over its subjects, and whose they are."""
    found = load_images(folder, [SOURCES[contrast]])
    pairs = list(zip(found[SOURCES[contrast]], subjects(folder, found)[SOURCES[contrast]], strict=True))
    count = min(limit, len(pairs))
    return [pairs[(2 * i + 1) * len(pairs) // (2 * count)] for i in range(count)]


def measured(x: Tensor, mask: str, ratio: float, name: str, size: int, subject: str = "") -> Case:
    if size:
        shape = [min(size, n) for n in x.shape]
        x = ifft2(crop(fft2(x.to(torch.complex64)), shape)) * math.sqrt(shape[0] * shape[1] / x.numel())
    pattern = make_mask(mask, (x.shape[0], x.shape[1]), 1 / ratio)
    scan, truth = simulate(x[None], mask=pattern, coils=1, noise=0.0)
    return Case(name=name, scan=scan, reference=truth, labels={"subject": subject})


def judged(name: str, model: Reconstructor, case: Case, dials: Mapping[str, Any]) -> tuple[Row, dict[str, Any]]:
    """A row, and the certificate where there is one; seconds are those of the processor."""
    start = time.process_time()
    out = reconstruct(case.scan, model, **dials)
    seconds = time.process_time() - start
    certificate = out.stats.get("certificate", [{}])[0]
    used = {**out.dials, **({"weight": certificate["kappa"]} if certificate else {})}
    row = Row(
        labels={"model": name, "case": case.name, **case.labels},
        dials=used,
        metrics=score(out.image, _truth(case), METRICS),
        seconds=seconds,
    )
    return row, certificate


def _truth(case: Case) -> Tensor:
    assert case.reference is not None
    return case.reference


def line(name: str, rows: Sequence[Row], note: str) -> str:
    """One row of a table: mean ± sd of each metric over images, κ."""
    parts = [f"{name:<14}"]
    for metric, digits in (("psnr", 2), ("ssim", 4), ("nmse", 5)):
        values = [row.metrics[metric] for row in rows]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        parts.append(f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f}")
    weights = [row.dials["weight"] for row in rows if "weight" in row.dials]
    parts += [f"κ {statistics.mean(weights):.4f}"] if weights else []
    return "  ".join([*parts, note])


def guard(rows: Sequence[Row], certificates: Sequence[Mapping[str, Any]]) -> None:
    """Acceptance, descent, and the guard's price, over all cells."""
    on = [c for c in certificates if c["name"] == "meta"]
    off = [c for c in certificates if c["name"] == "guard off"]
    if not on:
        return
    words = [word for c in on for word in c["branch"]]
    shares = {word: words.count(word) / len(words) for word in ("proposed", "damped", "waited", "gradient", "stopped")}
    print(f"\nthe guard, over {len(on)} images of {len(words)} phases")
    print("  taken " + ", ".join(f"{word} {share:.2%}" for word, share in shares.items()))
    print(
        f"  Ψ rises: {sum(not c['descent'] for c in on)} with the guard, {sum(not c['descent'] for c in off)} of {len(off)} without"
    )
    both = [
        row for row in rows if row.labels["ratio"] in {f"{r:g}" for r in SEEN} and row.labels["table"] != TABLES[4][0]
    ]
    d = evaluation.paired(both, "meta", "guard off")
    print(f"  guard on - off: {d['mean']:+.3f} dB, {d['low']:+.3f} to {d['high']:+.3f}, n = {d['n']}")
    seconds = [row.seconds for row in rows if row.labels["model"] == "meta"]
    print(f"  processor seconds per image: median {statistics.median(seconds):.2f}, most {max(seconds):.2f}")


# ---------------------------------------------------------------- networks at an equal budget


def trained(options: argparse.Namespace) -> dict[str, Reconstructor]:
    """The networks of `--train`, all from scratch, with the same total of steps for each row of a table."""
    steps, edge = options.train, options.edge
    changes = [
        f"data.folder={options.data / 'train'}", f"data.size={edge}", "data.masks=['radial']", "data.coils=1",
        "data.batch=8", f"training.steps={steps}", f"training.warmup={min(100, steps // 10)}", "training.average=0.99",
        *options.set,
    ]  # fmt: skip
    recipe = training.read_recipe(RECIPE, changes)
    recipe.pop("start", None)
    arguments, data, plan = recipe["arguments"], recipe["data"], recipe["training"]
    how = {**arguments.get("training", {}), "enforce": int(0.4 * steps)}
    arguments = {**arguments, "training": how}
    data["ratios"], data["bank"] = list(SEEN), 48
    single = {**arguments, "tasks": []}
    each = {**plan, "steps": steps // len(SEEN)}
    runs = {
        "trained meta": ({**arguments, "tasks": list(SEEN)}, data, plan),
        "κ = 1": (single, data, plan),
        "joint": ({**arguments, "tasks": list(SEEN), "training": {**how, "bilevel": "joint"}}, data, plan),
        **{
            f"conventional {ratio:g}": (
                {**single, "training": {**how, "enforce": int(0.4 * each["steps"])}}, {**data, "ratios": [ratio]}, each
            )
            for ratio in SEEN
        },
    }  # fmt: skip
    networks: dict[str, Reconstructor] = {}
    for name, (own, source, how_long) in runs.items():
        folder = options.output / f"{name.replace(' ', '-')}-{how_long['steps']}"
        if not (folder / "model.safetensors").exists():
            start = time.perf_counter()
            training.train(
                {"method": "meta-learned", "arguments": own, "data": source, "training": how_long}, folder, resume=True,
                report=lambda s, name=name: print(f"{name}: step {s['step']} of {s['steps']}", file=sys.stderr, flush=True),
            )  # fmt: skip
            print(f"{name}: {how_long['steps']} steps in {time.perf_counter() - start:.0f} s", flush=True)
        networks[name] = methods.load(folder / "model.safetensors")
    return networks


# ---------------------------------------------------------------- memory


def memory(options: argparse.Namespace) -> None:
    """Peak memory of one training step against phases, with and without recomputation, each in a process of its own."""
    print(
        "\nMiB that a training step of the penalty, 4 + 4 images of 96², adds to a process that has done a step of 16²"
    )
    for spared in (False, True):
        found = []
        for phases in (2, 4, 8):
            command = [
                sys.executable, __file__, "--data", str(options.data), "-o", str(options.output), "--peak", f"{phases},{int(spared)}",
            ]  # fmt: skip
            found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(
            f"  {'recomputed' if spared else 'kept':<10}  "
            + "  ".join(f"{p} phases {m:.0f}" for p, m in zip((2, 4, 8), found, strict=True))
        )


def peak(phases: str, spared: str) -> float:
    """MiB of one step."""
    arguments = training.read_recipe(RECIPE)["arguments"]
    how = {**arguments.get("training", {}), "bilevel": "penalty", "checkpoint": spared == "1", "enforce": 10**6}
    torch.manual_seed(0)
    model = MetaLearned(**{**arguments, "phases": int(phases), "training": how}).train()

    def step(size: int) -> float:
        planes = {"noise": [torch.rand(size, size) for _ in range(10)]}
        sampler = Sampler(images=planes, batch=4, upper=4, size=size, masks=("random",), coils=1, bank=4)
        model.loss(sampler(0), torch.Generator()).backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = step(16)
    return step(96) - before


# ---------------------------------------------------------------- the outside yardstick


def yardstick(folder: Path, models: Mapping[str, Reconstructor], every: int = 1) -> list[Row]:
    """Models beside ISTA-Net+ (one network for each ratio) on its own test images and masks, image by image.

    Its figures are in `ista_plus.csv`: 8-bit images clipped to their range, peak 255. Ours are magnitudes, clipped alike; the
    scans are of the real images, without noise. For testing only: nothing may be trained or chosen here.
    """
    with (folder / "ista_plus.csv").open() as file:
        published = {(row["ratio_percent"], row["image"]): row for row in csv.DictReader(file)}
    print("\nISTA-Net+ test images, PSNR with peak 255, axial 01-24 and sagittal 25-35 apart")
    rows: list[Row] = []
    for percent in ("10", "20", "30", "40", "50"):
        mask = torch.from_numpy(np.load(folder / f"masks/radial_{percent}_256.npy")).float()
        names = sorted(name for ratio, name in published if ratio == percent)[::every]
        for image in names:
            x = read_image(folder / "ista_brain" / image).data.float()
            x = x * (255 / x.max()) if x.max() <= 1 else x
            scan = Scan(
                kspace=fft2(x.to(torch.complex64))[:, None] * mask, mask=mask[None, None], image_shape=(256, 256)
            )
            series = "axial" if int(image[11:13]) <= 24 else "sagittal"
            # All slices of a series are of one head.
            labels = {"case": image, "ratio": percent, "series": series, "subject": series}
            for name, model in models.items():
                start = time.process_time()
                out = reconstruct(scan, model)
                seconds = time.process_time() - start
                y = out.magnitude.clamp(0, 255)
                metrics = {"psnr": psnr(y, x, data_range=255), "ssim": ssim(y, x, data_range=255)}
                rows.append(
                    Row(labels={"model": name, **labels}, dials=dict(out.dials), metrics=metrics, seconds=seconds)
                )
            theirs = published[percent, image]
            for name, key in (("zero-filled", "zf"), ("ISTA-Net+", "ista_plus")):
                metrics = {m: float(theirs[f"{key}_{m}"]) for m in ("psnr", "ssim")}
                rows.append(Row(labels={"model": name, **labels}, metrics=metrics))
        for series in ("axial", "sagittal"):
            own = [row for row in rows if (row.labels["ratio"], row.labels["series"]) == (percent, series)]
            parts = []
            for name in (*models, "ISTA-Net+"):
                values = [row.metrics["psnr"] for row in own if row.labels["model"] == name]
                parts.append(f"{name} {statistics.mean(values):.2f}" if values else f"{name} –")
                if values and name != "ISTA-Net+":
                    difference = evaluation.paired(own, name, "ISTA-Net+")
                    parts[-1] += f" ({difference['mean']:+.2f})"
            print(f"  {percent} % {series:<8} n = {len(values):2}  " + "  ".join(parts), flush=True)
    return rows


if __name__ == "__main__":
    main()
