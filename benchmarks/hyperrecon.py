"""The experiments of the two HyperRecon papers, small enough for one processor core; each part by itself:

    python benchmarks/hyperrecon.py capacity   the published sizes, our default and the light forms, equal steps
    python benchmarks/hyperrecon.py sampling   without ground truth: uniform against data-driven sampling, over all settings
    python benchmarks/hyperrecon.py tasks      undersampling, denoising, superresolution on brain and knee, dedicated networks beside
    python benchmarks/hyperrecon.py dice       a segmentation network on the tissue labels, along the dial of a model
    python benchmarks/hyperrecon.py table1     time of training, time of inference and parameters of all that was trained so far

    --data FOLDER -o FOLDER [--steps N] [--size PIXELS] [--limit N] [--points N] [--seed N] [--threads N]

Networks train on crops of the train/ subjects and are judged on the val/ subjects, brought to a small matrix by a crop of
their k-space. Every network has a folder under -o: one that is finished is not trained again, one that was stopped goes on. Seconds are
of the processor, those of training kept beside the network. Figures of a small budget: they compare, they are not records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor

from tunemri import console, evaluation, landscape, methods, metrics, plots, training
from tunemri.datasets import Sampler, load_images
from tunemri.errors import TunemriWarning
from tunemri.evaluation import Case, Contestant, Row
from tunemri.fourier import crop, fft2, ifft2
from tunemri.landscape import Landscape
from tunemri.masks import make_mask
from tunemri.methods import Reconstructor, reconstruct
from tunemri.methods.hyperrecon import PRESETS
from tunemri.networks.unet import Trunk
from tunemri.operators import Cartesian
from tunemri.simulate import simulate

Data = dict[str, Any]
SETTINGS = (0.0, 0.5, 1.0)
SHOWN = ("psnr", "ssim", "mae")
STEPS = {"capacity": 150, "sampling": 200, "tasks": 150, "dice": 400, "table1": 0}
RATES = (1e-3, 4e-3)  # learning rates: of the journal paper, and ours
PASSES = 8  # images × settings in a step, the same for all that are compared
# Cardiac images for variety, as in the recipes; the first two are heads and what the networks are judged on.
BRAIN, KNEE = ("openms", "ixi", "cardiac"), ("knee",)
# What equal weights mean, fixed so that every network of a comparison is asked for the same.
SUPERVISED: Data = {"terms": ["mae", "ssim"], "scales": [1.0, 9.33]}
UNSUPERVISED: Data = {"terms": ["dc", "tv", "l1"], "scales": [1.0, 6.0, 10.0], "objective": "mean"}


def main() -> None:
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "capacity": capacity, "sampling": sampling, "tasks": tasks, "dice": dice, "table1": table1,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help=f"of each network, default {STEPS}")
    parser.add_argument("--size", type=int, default=64, help="pixels of a training crop")
    parser.add_argument("--edge", type=int, default=96, help="pixels of a validation image")
    parser.add_argument("--limit", type=int, default=6, help="validation images of each source")
    parser.add_argument(
        "--points", type=int, default=20, help="of a landscape along each dial, or along the dial of dice"
    )
    parser.add_argument("-m", "--model", default="hyper-brain", help="whose dial `dice` follows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.steps = STEPS[options.part] if options.steps is None else options.steps
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"python benchmarks/hyperrecon.py {shlex.join(sys.argv[1:])}")
    print(
        f"commit {_commit()}, torch {torch.__version__}, {_processor()}, {options.threads} thread, seed {options.seed}\n"
        f"subjects of train/ in crops of {options.size}², of val/ at {options.edge}²"
        + (f"; {options.steps} steps a network" if options.steps else "")
    )
    parts[options.part](options)


# ---------------------------------------------------------------- size


def capacity(options: argparse.Namespace) -> None:
    """Quality against parameters, supervised undersampling of heads."""
    # In the journal paper each batch holds as many settings as images; ours are antithetic, as in the recipes that ship.
    published = {name: {**PRESETS[name], **SUPERVISED} for name in ("journal-s", "journal-m", "journal-l")}
    own = {**PRESETS["default"], **SUPERVISED, "antithetic": True, "faces": 0.4}
    forms = {"default": "full", **{f"default {form}": form for form in ("film", "rank4", "anchors", "last")}}
    alone = {"main": PRESETS["journal-s"]["main"], **SUPERVISED, "weights": [0.5, 0.5]}
    # The published networks at the rate of their paper and at ours: the better one counts.
    entries = [("hyperrecon", name, more, rate) for name, more in published.items() for rate in RATES]
    entries += [("single-weight", "journal U-Net alone", alone, rate) for rate in RATES]
    entries += [("hyperrecon", name, {**own, "form": form}, RATES[1]) for name, form in forms.items()]
    images = load_images(options.data / "train", BRAIN)
    cases = [c for r in (4, 8) for c in validation(options, BRAIN[:2], "poisson", r, 0.005)]
    data: Data = {"masks": ("poisson",), "acceleration": (3.0, 8.0), "noise": (0.001, 0.01)}
    found: dict[str, dict[str, Any]] = {}
    for method, name, arguments, rate in entries:
        count = PASSES // 2 if arguments.get("antithetic") else PASSES
        sampler = Sampler(images=images, **data, batch=count, size=options.size, coils=1)
        folder = f"{name} {rate:g}"
        network, seconds = fitted(folder, method, arguments, sampler, plan(options, rate), options.output)
        settings = SETTINGS if network.dials else (0.5,)
        rows = judged(network, cases, {"ssim": settings} if network.dials else {})
        line = {"network": name, "rate": rate, "parameters": parameters(network), "seconds": seconds}
        for m, v in itertools.product(("psnr", "ssim"), settings):
            line[f"{m}_{v:g}"] = mean(rows, m, **({"ssim": v} if network.dials else {}))
        if name not in found or line["psnr_0.5"] > found[name]["psnr_0.5"]:
            found[name] = line
        # After every network, for those who do not wait for the end.
        evaluation.write_csv(options.output / "capacity.csv", list(found.values()), overwrite=True)
    zero_filled = judged(methods.load("zero-filled"), cases, {})
    print(
        f"{len(cases)} scans, Poisson disk 4× and 8×, noise 0.5 %; {PASSES} passes a step; "
        f"zero-filled {mean(zero_filled, 'psnr'):.2f} dB, {mean(zero_filled, 'ssim'):.4f}\n"
    )
    table = list(found.values())
    show(table, options.output / "capacity.csv")
    scatter(table, "psnr_0.5", "PSNR [dB] at ssim = 0.5", options.output / "capacity.png")
    for ours, theirs in itertools.product(("default", "default film"), published):
        a, b = found[ours], found[theirs]
        gaps = (
            f"{a[f'psnr_{v:g}'] - b[f'psnr_{v:g}']:+.2f} dB {a[f'ssim_{v:g}'] - b[f'ssim_{v:g}']:+.4f}"
            for v in SETTINGS
        )
        print(
            f"{ours} - {theirs} at {SETTINGS}: {', '.join(gaps)}; {a['parameters'] / b['parameters']:.2f} × its parameters"
        )


# ---------------------------------------------------------------- which settings to learn from


def sampling(options: argparse.Namespace) -> None:
    """Amortised optimisation of misfit, total variation and size of the weights: landscapes of both ways to sample."""
    # A post-processing U-Net gained nothing in such a budget: it first has to learn not to miss the data.
    main_network = {"name": "unrolled", "stages": 2, "width": 16}
    shared = {"main": main_network, **UNSUPERVISED, "residual": True, "faces": 0.2}
    images = load_images(options.data / "train", BRAIN)
    data: Data = {"masks": ("poisson",), "acceleration": (4.0, 4.0), "noise": (0.005, 0.005), "coils": 1}
    sampler = Sampler(images=images, **data, batch=2 * PASSES, size=options.size)
    cases = validation(options, BRAIN[:2], "poisson", 4, 0.005, limit=max(1, options.limit // 3))
    thresholds = [0.1 * i for i in range(-20, 81)]
    found: dict[str, Landscape] = {}
    table: list[dict[str, Any]] = []
    # The papers rank by the misfit; held-out samples do not reward an image that was left as it was.
    ways: dict[str, Data] = {
        "UHS": {}, "DHS": {"selection": {"criterion": "relative-dc"}}, "DHS held-out": {"selection": {"criterion": "heldout"}},
    }  # fmt: skip
    sizes = {"S": [2, 4], "M": [8, 32], "L": [32, 128]}
    for (size, widths), (way, more) in itertools.product(sizes.items(), ways.items()):
        name = f"{size} {way}"
        network, seconds = fitted(
            f"ao {name}", "hyperrecon", {**shared, "widths": widths, **more}, sampler, plan(options, RATES[1]), options.output
        )  # fmt: skip
        land = landscape.landscape(
            network, cases, dials={"tv": options.points, "l1": options.points}, thresholds=thresholds,
            file=options.output / f"state-{_slug(name)}-{options.points}.safetensors", progress=told(name),
        )  # fmt: skip
        found[name] = land
        best, value = land.best
        table.append(
            {
                "network": name, "parameters": parameters(network), "seconds": seconds, "best_tv": best["tv"],
                "best_l1": best["l1"], "best_rpsnr": value, "mean_rpsnr": float(land.mean.mean()),
            }
        )  # fmt: skip
        plots.landscape(land, title=f"{name}: gain over zero-filling").save(
            options.output / f"landscape-{_slug(name)}.png", overwrite=True
        )
        if (shares := landscape.histogram(network)) is not None:
            plots.histogram(shares, list(network.dials)).save(
                options.output / f"histogram-{_slug(name)}.png", overwrite=True
            )
        pair = sorted(land.far, key=lambda p: p.distance)[len(land.far) // 2]
        case = next(case for case in cases if case.name == pair.case)
        a, b = (reconstruct(case.scan, network, **at).image[0] for at in (pair.a, pair.b))
        plots.far_pair(land, pair, a, b).save(options.output / f"far-{_slug(name)}.png", overwrite=True)

    found["dedicated"] = baselines(options, shared, sampler, cases, found["M DHS"])
    top = max(float(land.mean.nan_to_num(nan=-math.inf).max()) for land in found.values())
    # What matters is near the best that any of them reaches.
    marks = [top - d for d in (3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25)]
    for line in table:
        areas = landscape.area_above(found[str(line["network"])], marks).tolist()
        line |= {f"above_{m:.2f}": area for m, area in zip(marks, areas, strict=True)}
    print(
        f"{len(cases)} scans, Poisson disk 4×, noise 0.5 %; {2 * PASSES} settings a step, DHS keeps a quarter of them"
    )
    print(f"landscape {options.points} × {options.points}; above_T: share of its settings that gain more than T dB\n")
    show(table, options.output / "sampling.csv")
    areas = landscape.area_above(found["dedicated"], marks).tolist()
    print("dedicated, interpolated: " + ", ".join(f"{a:.2f} above {m:.2f}" for a, m in zip(areas, marks, strict=True)))
    plots.area_curves(found).save(options.output / "area.png", overwrite=True)
    plots.range_curves({k: v for k, v in found.items() if v.thresholds}).save(
        options.output / "range.png", overwrite=True
    )


def baselines(
    options: argparse.Namespace, shared: Mapping[str, Any], sampler: Sampler, cases: Sequence[Case], like: Landscape
) -> Landscape:
    """Networks of one setting each on a grid of nine settings, linear in between, on the grid of `like`."""
    half = replace(sampler, batch=PASSES)
    settings, values = [], []
    for tv, l1 in itertools.product(SETTINGS, SETTINGS):
        # With all weight on the size of the weights nothing is left for the other two to share.
        w = [(1 - l1) * (1 - tv), (1 - l1) * tv, l1]
        own = {k: shared[k] for k in ("main", "terms", "scales", "objective")} | {"weights": w}
        name = "ao single " + " ".join(f"{v:g}" for v in w)
        network, _ = fitted(name, "single-weight", own, half, plan(options, RATES[1]), options.output)
        gains = []
        for case in cases:
            assert case.reference is not None
            x, zero_filled = (reconstruct(case.scan, m).magnitude for m in (network, methods.load("zero-filled")))
            gains.append(metrics.rpsnr(x, case.reference.abs(), zero_filled))
        settings.append({"tv": tv, "l1": l1})
        values.append(statistics.fmean(gains))
    grid = landscape.interpolate(like, settings, values)
    plots.landscape(grid, title="dedicated networks, interpolated", dedicated=list(zip(settings, values, strict=True))).save(
        options.output / "landscape-dedicated.png", overwrite=True
    )  # fmt: skip
    return grid


# ---------------------------------------------------------------- tasks


def tasks(options: argparse.Namespace) -> None:
    """Metric against the dial for every task and anatomy, networks trained for one value as dots."""
    shared = {"main": {"name": "unrolled", "stages": 2, "width": 16}, **SUPERVISED}
    hyper = {**shared, "widths": [32, 32, 4], "faces": 0.5, "antithetic": True}
    # task → how to train, and what to judge: (label, mask, acceleration, noise)
    kinds: dict[str, tuple[Data, list[tuple[str, str, float, float]]]] = {
        "cs": (
            {"masks": ("poisson",), "acceleration": (3.5, 9.0), "noise": (0.005, 0.005)},
            [("CS-MRI 4×", "poisson", 4, 0.005), ("CS-MRI 8×", "poisson", 8, 0.005)],
        ),
        "denoise": (
            {"masks": ("full",), "acceleration": (1.0, 1.0), "noise": (0.1, 0.1)},
            [("denoising σ = 0.1", "full", 1, 0.1)],
        ),
        "superres": (
            {"masks": ("centre",), "acceleration": (16.0, 16.0), "noise": (0.005, 0.005)},
            [("superresolution ×4", "centre", 16, 0.005)],
        ),
    }
    table: list[dict[str, Any]] = []
    for (anatomy, sources), (task, (data, judgements)) in itertools.product(
        {"brain": BRAIN[:2], "knee": KNEE}.items(), kinds.items()
    ):
        images = load_images(options.data / "train", sources)
        sampler = Sampler(images=images, **data, batch=PASSES, size=options.size, coils=1)
        name = f"{task} {anatomy}"
        # An antithetic step runs each image at two settings: half as many images make it as many passes.
        halved = replace(sampler, batch=PASSES // 2)
        network, spent = fitted(name, "hyperrecon", hyper, halved, plan(options, RATES[1]), options.output)
        dedicated = [
            fitted(f"{name} {v:g}", "single-weight", {**shared, "weights": [1 - v, v]}, sampler, plan(options, RATES[1]), options.output)
            for v in SETTINGS
        ]  # fmt: skip
        for label, mask, acceleration, noise in judgements:
            cases = validation(options, sources, mask, acceleration, noise)
            rows = judged(network, cases, {"ssim": 11})
            dots: list[Row] = []
            zero_filled = judged(methods.load("zero-filled"), cases, {})
            for v, (single, seconds) in zip(SETTINGS, dedicated, strict=True):
                own = [replace(row, dials={"ssim": v}) for row in judged(single, cases, {})]
                dots += own
                line: dict[str, Any] = {"task": label, "anatomy": anatomy, "scans": len(cases), "dial": v}
                for m in SHOWN[:2]:
                    line |= {f"zero-filled_{m}": mean(zero_filled, m), f"hyper_{m}": mean(rows, m, ssim=v)}
                    line |= {f"dedicated_{m}": mean(own, m), f"gap_{m}": mean(rows, m, ssim=v) - mean(own, m)}
                table.append({**line, "hyper_seconds": spent, "dedicated_seconds": seconds})
            evaluation.write_csv(options.output / "tasks.csv", table, overwrite=True)
            plots.dial_curve(rows, "ssim", SHOWN, about=network.dials["ssim"], dedicated=dots).save(
                options.output / f"{_slug(f'dial {anatomy} {label}')}.png", overwrite=True
            )
    print("supervised, MAE against SSIM; two stages of width 16; knee data are non-commercial: scores only\n")
    show(table, options.output / "tasks.csv")
    worst, middle = min(t["gap_psnr"] for t in table), statistics.median(t["gap_psnr"] for t in table)
    print(f"hypernetwork - dedicated: worst {worst:+.2f} dB, median {middle:+.2f} dB")


# ---------------------------------------------------------------- a later step


def dice(options: argparse.Namespace) -> None:
    """Overlap of the tissues that a network finds in the images of a model, along its dial."""
    segment = segmenter(options)
    planes, labels = tissue(options.data / "val")
    step = max(1, len(planes) // options.limit)
    chosen = range(0, min(len(planes), step * options.limit), step)
    model = methods.load(options.model)
    dial = next(iter(model.dials))
    truths = {f"oasis/{i}": labels[i][None] for i in chosen}
    table: list[dict[str, Any]] = []
    zero_filled = Contestant(name="zero-filled", model=methods.load("zero-filled"))
    entrants = evaluation.along(Contestant(name=options.model, model=model), {dial: min(options.points, 11)})
    for acceleration in (4, 8):
        cases = [simulated(planes[i], f"oasis/{i}", "poisson", acceleration, 0.01, seed=i) for i in chosen]
        note = told(f"{acceleration}×")
        rows = evaluation.evaluate([zero_filled, *entrants], cases, metrics=SHOWN[:2], keep_images=True, progress=note)
        rows += [Row(labels={"model": "truth", "case": case.name}, image=case.reference) for case in cases]
        # Grey and white matter; the ventricles apart, as the labels' datasheet asks.
        found = landscape.dice_along(rows, segment, truths, [2, 3])
        apart = landscape.dice_along(rows, segment, truths, [1])
        scored = [
            replace(row, metrics={**row.metrics, "dice_1": other.metrics["dice_1"]})
            for row, other in zip(found, apart, strict=True)
        ]
        for name, value in dict.fromkeys((row.labels["model"], row.dials.get(dial)) for row in scored):
            own = [row.metrics for row in scored if (row.labels["model"], row.dials.get(dial)) == (name, value)]
            means = {
                m: statistics.fmean(o[m] for o in own) if m in own[0] else None
                for m in ("psnr", "ssim", "dice", "dice_2", "dice_3", "dice_1")
            }
            table.append({"acceleration": acceleration, "image": name, "dial": value, **means})
        own_rows = [row for row in found if row.labels["model"] == options.model]
        plots.dice_curve(own_rows, dial, about=model.dials[dial]).save(
            options.output / f"dice-{acceleration}x.png", overwrite=True
        )
    print(
        f"{len(truths)} slices of three validation subjects at full size, one coil, noise 1 %, {options.model} along {dial}\n"
        "dice: mean of grey (2) and white matter (3); the ventricles (1) apart\n"
    )
    show(table, options.output / "dice.csv")
    for acceleration in (4, 8):
        own = [t for t in table if t["acceleration"] == acceleration and t["image"] == options.model]
        best = ", ".join(f"{m} {max(own, key=itemgetter(m))['dial']:.2g}" for m in ("dice", "psnr", "ssim"))
        span = max(t["dice"] for t in own) - min(t["dice"] for t in own)
        print(f"{acceleration}×: best {dial} for {best}; Dice varies by {span:.4f}")


def tissue(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """T1 slices that hold all three tissues, and their labels: 0 none, 1 ventricle, 2 grey, 3 white matter."""
    with np.load(folder / "oasis_t1_labels.npz") as z:
        labels = torch.from_numpy(z["label"].astype(np.int64))
    images = load_images(folder, ["oasis"])["oasis"]
    pairs = [(x, y) for x, y in zip(images, labels, strict=True) if all(int((y == c).sum()) > 100 for c in (1, 2, 3))]
    return [x for x, _ in pairs], [y for _, y in pairs]


def segmenter(options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Magnitudes `(B, H, W)` → tissue labels, by a U-Net trained here on true images with the soft Dice loss of the papers."""
    torch.manual_seed(options.seed)
    network = Trunk(1, 4, 16)
    file = options.output / f"segmenter-{options.steps}.safetensors"
    if file.exists():
        network.load_state_dict(safetensors.torch.load_file(file))
    else:
        planes, labels = tissue(options.data / "train")
        draw = torch.Generator().manual_seed(options.seed)
        how = plan(options, 3e-3)
        optimiser = torch.optim.Adam(network.parameters())
        for step in range(how.steps):
            some = torch.randint(len(planes), (PASSES,), generator=draw).tolist()
            batch = [window(planes[i], labels[i], options.edge, draw) for i in some]
            x, y = torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])
            for group in optimiser.param_groups:
                group["lr"] = how.rate(step)
            optimiser.zero_grad()
            loss = soft_dice(network(x[:, None]), y)
            loss.backward()
            optimiser.step()
            if step % 50 == 0:
                console.say(f"segmenter: {step}/{how.steps}  loss {float(loss.detach()):.3f}")
        safetensors.torch.save_file(network.state_dict(), file)
    network.eval()

    def segment(x: Tensor) -> Tensor:
        level = torch.quantile(x.flatten(1).double(), 0.995, dim=1).to(x)[:, None, None]
        with torch.no_grad():
            return network((x / level)[:, None].float()).argmax(1)

    return segment


def window(x: Tensor, y: Tensor, edge: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random square part of image and labels, perhaps mirrored, a little brighter or darker."""
    top, left = (int(torch.randint(n - edge + 1, (), generator=draw)) for n in x.shape)
    part = tuple(z[top : top + edge, left : left + edge] for z in (x, y))
    if float(torch.rand((), generator=draw)) < 0.5:
        part = tuple(z.flip(1) for z in part)
    return part[0] * (0.9 + 0.2 * float(torch.rand((), generator=draw))), part[1]


def soft_dice(scores: Tensor, labels: Tensor) -> Tensor:
    """1 - mean over classes of (2 Σ p t + 1) / (Σ p + Σ t + 1), class probabilities p and true classes t."""
    p = scores.softmax(1)
    t = F.one_hot(labels, scores.shape[1]).movedim(-1, 1)
    overlap, total = (p * t).sum((0, 2, 3)), (p + t).sum((0, 2, 3))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


# ---------------------------------------------------------------- time and size


def table1(options: argparse.Namespace) -> None:
    """The papers' Table 1 for every network in -o, and what as many dedicated networks as the papers' grid would take."""
    mask = make_mask("poisson", (256, 256), 4.0)
    x = torch.randn(1, 256, 256, dtype=torch.complex64, generator=torch.Generator().manual_seed(options.seed))
    A = Cartesian(mask[None, None], None)
    y = A(x)
    records = []
    for file in sorted(options.output.glob("*/state.safetensors")):
        facts = json.loads(file.with_name("network.json").read_text())
        with safe_open(file, "pt") as state:
            if int(state.metadata()["step"]) == facts["steps"]:  # one still in training has no time to speak of
                records.append(facts)
    # Networks of one kind differ in nothing that costs time: the first one stands for all.
    kinds: dict[str, dict[str, Any]] = {}
    for facts in records:
        own = {k: v for k, v in facts["arguments"].items() if k not in ("weights", "scales", "faces", "antithetic")}
        kinds.setdefault(json.dumps([facts["method"], own], sort_keys=True), facts)
    table: list[dict[str, Any]] = []
    for facts in kinds.values():
        model = methods.make(facts["method"], facts["arguments"]).eval()
        times = []
        with torch.no_grad():
            for _ in range(4):
                start = time.process_time()
                model(y, A)
                times.append(time.process_time() - start)
        costs = {
            "steps": facts["steps"], "parameters": parameters(model), "training_s": facts["seconds"],
            "per_step_ms": 1000 * facts["seconds"] / facts["steps"],
        }  # fmt: skip
        table.append({"network": facts["name"], **costs, "inference_s": statistics.median(times[1:])})
        if facts["method"] == "single-weight":
            # As many as the papers' grids have settings: 18 × 18 for two dials, 5 for one.
            many = 324 if len(facts["arguments"]["terms"]) == 3 else 5
            costs |= {k: many * costs[k] for k in ("parameters", "training_s")}
            table.append({"network": f"{many} × {facts['name']}", **costs, "inference_s": statistics.median(times[1:])})
    if not table:
        raise SystemExit(f"{options.output}: nothing was trained here yet")
    print("training as run by the parts above; inference of one 256² image at one setting\n")
    show(table, options.output / "table1.csv")
    scatter(table, "training_s", "training [processor seconds]", options.output / "table1.png", logarithmic=True)


# ---------------------------------------------------------------- what all of them use


def plan(options: argparse.Namespace, rate: float) -> training.Plan:
    # The rate ends at zero, so the last weights need no average, which running statistics would not follow.
    warmup = max(1, options.steps // 10)
    return training.Plan(steps=options.steps, lr=rate, warmup=warmup, average=0.0, seed=options.seed)


def fitted(
    name: str, method: str, arguments: dict[str, Any], sampler: Sampler, how: training.Plan, output: Path
) -> tuple[Any, float]:
    """A trained network, and the processor seconds that its training took, interruptions left out."""
    folder = output / f"{_slug(name)}-{how.steps}"
    folder.mkdir(exist_ok=True)
    record = folder / "network.json"
    earlier = json.loads(record.read_text())["seconds"] if record.exists() else 0.0
    torch.manual_seed(how.seed)
    model = methods.make(method, arguments)
    began = time.process_time()

    def note(state: dict[str, Any]) -> None:
        console.say(f"{name}: {state['step']}/{state['steps']}  loss {state['loss']:.4f}  {state['seconds']:.0f} s")
        facts = {"name": name, "method": method, "arguments": arguments, "steps": how.steps}
        record.write_text(json.dumps({**facts, "seconds": earlier + time.process_time() - began}))

    recipe = {"method": method, "arguments": arguments, "data": sampler.domain}
    training.fit(model, sampler, how, folder, resume=True, recipe=recipe, report=note)
    return model, json.loads(record.read_text())["seconds"]


def validation(
    options: argparse.Namespace, sources: Sequence[str], mask: str, acceleration: float, noise: float, limit: int = 0
) -> list[Case]:
    """Scans of validation images, evenly spaced, the nearly empty ones left out."""
    cases = []
    for source, planes in load_images(options.data / "val", sources).items():
        full = [x for x in planes if float((x.abs() > 0.1).float().mean()) > 0.15]
        count = min(limit or options.limit, len(full))
        for i in range(count):
            x = full[(2 * i + 1) * len(full) // (2 * count)]
            shape = [min(options.edge, n) for n in x.shape]
            x = ifft2(crop(fft2(x.to(torch.complex64)), shape)).abs() * math.sqrt(shape[0] * shape[1] / x.numel())
            cases.append(simulated(x, f"{source}/{i}", mask, acceleration, noise, seed=i))
    return cases


def simulated(x: Tensor, name: str, mask: str, acceleration: float, noise: float, seed: int) -> Case:
    pattern = make_mask(mask, (x.shape[0], x.shape[1]), acceleration, seed=1000 + seed)
    scan, truth = simulate(x[None], mask=pattern, coils=1, noise=noise, seed=seed)
    return Case(name=name, scan=scan, reference=truth)


def judged(model: Reconstructor, cases: Sequence[Case], dials: Mapping[str, Any]) -> list[Row]:
    contestant = Contestant(name=type(model).__name__, model=model)
    with warnings.catch_warnings():
        # A U-Net after a few hundred steps does miss the data; the tables say by how much.
        warnings.simplefilter("ignore", TunemriWarning)
        return evaluation.evaluate(evaluation.along(contestant, dials), cases, metrics=SHOWN)


def mean(rows: Sequence[Row], metric: str, **dials: float) -> float:
    """Mean of a metric over the rows at one setting."""
    near = [r for r in rows if all(abs(r.dials[name] - value) < 1e-6 for name, value in dials.items())]
    return statistics.fmean(row.metrics[metric] for row in near)


def parameters(model: Reconstructor) -> int:
    return sum(p.numel() for p in model.parameters())


def told(name: str) -> Callable[[int, int], None]:
    return lambda done, total: console.say(f"{name}: {done}/{total}") if done % 200 == 0 else None


def show(table: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Print a table and write it."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(table)))
    lines = [columns, *([_cell(line.get(c)) for c in columns] for line in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()
    evaluation.write_csv(file, table, overwrite=True)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def scatter(
    table: Sequence[Mapping[str, Any]], y: str, ordinate: str, file: Path, *, logarithmic: bool = False
) -> None:
    """A column of a table against the number of parameters, one dot a network."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        marks = itertools.product("osD^v", plots.SERIES)
        for line, (mark, colour) in zip(table, marks, strict=False):
            axes.plot(line["parameters"], line[y], mark, color=colour, ls="none", label=line["network"])
        axes.set(xscale="log", xlabel="parameters", ylabel=ordinate, yscale="log" if logarithmic else "linear")
        figure.legend(loc="outside right center")
    plots.Plot(figure=figure, data=table).save(file, overwrite=True)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
