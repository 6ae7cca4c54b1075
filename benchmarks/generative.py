"""The generative prior against its bars, one thread, each part by itself:

    python benchmarks/generative.py masks      one image, many patterns: zero-filled, TV, a supervised network, MAP, MMSE
    python benchmarks/generative.py coils      the same with eight coils, in and out of distribution
    python benchmarks/generative.py posterior  intervals against errors, growth with acceleration, mixing of the chains
    python benchmarks/generative.py widths     how much wider than the draws errors are: `temperature` and `coarse` of a recipe
    python benchmarks/generative.py maps       how far the maps of draws and the true ones lie from those estimated
    python benchmarks/generative.py adapted    another anatomy: the weight from `tunemri choose`, without a reference
    python benchmarks/generative.py regression the weight by a line through training subjects, against 1 and the best
    python benchmarks/generative.py joint      image and coil maps together, few calibration lines, simulated and raw scans
    python benchmarks/generative.py speed      seconds and memory over sizes and coils
    python benchmarks/generative.py prior      what the prior believes without any data: samples, and a landscape
    python benchmarks/generative.py compare    two small energies trained for the same time: ours, and the paper's

    [--data FOLDER] [--model WEIGHTS] [--supervised WEIGHTS|RECIPE ...] [--limit N] [--only PATTERN] [--real]
    [--spline] [-o FOLDER]

Scans of `masks` to `adapted` are simulated from validation images (those of `widths` from others of them) with smooth phase
and noise of half a per cent of the maximum. TV gets, for each pattern, the weight that is best on the very images it is
judged on; the prior takes what it suggests itself, the same for all patterns.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import hashlib
import itertools
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tunemri
from tunemri import coils as coil_maps
from tunemri import datasets, evaluation, landscape, methods, metrics, plots, solvers, training, tuning
from tunemri.evaluation import Case, Contestant, Row
from tunemri.fourier import crop, fft2, ifft2
from tunemri.masks import make_mask
from tunemri.methods import generative as prior_code
from tunemri.methods.classical import TotalVariation, ZeroFilled
from tunemri.methods.generative import Generative
from tunemri.operators import Cartesian, encoding
from tunemri.scan import Scan, normalise
from tunemri.simulate import phantom, simulate, smooth_phase

# name → family, acceleration, options: the patterns of the paper.
MASKS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "random 3×, no centre": ("random", 3, {}),
    "Cartesian 4×, 8 %": ("cartesian-random", 4, {"center_fraction": 0.08}),
    "spiral 5×": ("spiral", 5, {}),
    "radial 6×": ("radial-golden", 6, {}),
    "Cartesian 4×, 8 %, swapped": ("cartesian-random", 4, {"center_fraction": 0.08, "phase_axis": "rows"}),
    "Cartesian 4×, 4 %": ("cartesian-random", 4, {"center_fraction": 0.04}),
}
PARALLEL: dict[str, tuple[str, float, dict[str, Any]]] = {
    "Cartesian 4×, 8 %": MASKS["Cartesian 4×, 8 %"],
    "Cartesian 4×, 8 %, swapped": MASKS["Cartesian 4×, 8 %, swapped"],
    "Cartesian 4×, 4 %": MASKS["Cartesian 4×, 4 %"],
    "radial 11×": ("radial", 11, {}),
    "Gaussian 8×": ("gaussian", 8, {"calibration": 0}),
}
# Few and many samples, with a centre and without.
SPREAD: dict[str, tuple[str, float, dict[str, Any]]] = {
    **{f"Cartesian {r}×": ("cartesian-random", r, {}) for r in (2, 4, 8)},
    **{mask: MASKS[mask] for mask in ("radial 6×", "random 3×, no centre")},
}
NOISE = 0.005
MEAN_OF = ("Cartesian 4×, 8 %", "spiral 5×", "radial 6×")  # the bar of 1.5 dB is on their mean
SHOWN = ("psnr", "nmse", "ssim")


def images(options: argparse.Namespace, source: str, split: str = "val", other: bool = False) -> list[Tensor]:
    """Images of one source, evenly spaced, the nearly empty ones left out; of a smaller matrix if asked for.

    other: those half-way between the ones that are had without.
    """
    planes = [
        x
        for x in datasets.load_images(options.data / split, [source])[source]
        if float((x.abs() > 0.1).float().mean()) > 0.15
    ]
    step = max(1, len(planes) // options.limit)
    planes = planes[step // 2 * other : step * options.limit : step]
    if not options.size:
        return planes
    return [F.interpolate(x[None, None], (options.size, options.size), mode="area")[0, 0] for x in planes]


def cases(
    planes: Sequence[Tensor],
    source: str,
    mask: str,
    patterns: dict[str, Any],
    coils: int,
    phase: float = 0.5,
    true_maps: bool = False,
) -> Iterator[Case]:
    """The images under one pattern; an image has the same phase, noise and coils under all of them.

    Coil maps are found as by default, or the true ones.
    """
    family, acceleration, options = patterns[mask]
    for i, x in enumerate(planes):
        seed = int.from_bytes(hashlib.sha256(f"{source}/{i}".encode()).digest()[:3])
        pattern = make_mask(family, (x.shape[0], x.shape[1]), acceleration, seed=seed, **options)
        scan, target = simulate(
            x[None], mask=pattern, coils=coils, noise=NOISE, phase=phase, store_maps=true_maps, seed=seed
        )
        scan = replace(scan, csm=methods.prepare(scan).csm)
        yield Case(name=f"{source}/{i}", scan=scan, reference=target, labels={"mask": mask, "source": source})


def judged(
    mask: str, group: list[Case], contestants: Sequence[Contestant], keep: Path | None, spline: bool = False
) -> list[Row]:
    """Zero-filling, TV with its best weight, and the contestants, all on the same scans; intensities also by spline."""
    tuned = evaluation.tune(group, TotalVariation(), points=5, rounds=2, keep=keep)
    entered = [
        Contestant(name="zero-filled", model=ZeroFilled()),
        Contestant(name="TV, tuned", model=TotalVariation(), dials=tuned.dials),
        *contestants,
    ]
    rows = evaluation.evaluate(entered, group, metrics=SHOWN, keep=keep, keep_images=spline)
    if spline:
        rows += evaluation.splined(rows, group, SHOWN)
        entered += [replace(c, name=f"{c.name}, spline") for c in entered]
    print(f"\n{mask}: n = {len(group)}, actual acceleration {statistics.fmean(c.scan.acceleration for c in group):.2f}")
    for contestant in entered:
        own = [row for row in rows if row.labels["model"] == contestant.name]
        dials = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in contestant.dials.items())
        print(
            f"  {contestant.name:22} {spread(own)}   {statistics.fmean(r.seconds for r in own):6.1f} s   {dials}",
            flush=True,
        )
    return rows


def spread(rows: Sequence[Row]) -> str:
    """PSNR / NMSE × 100 / SSIM, mean ± standard deviation."""

    def one(metric: str, factor: float, form: str) -> str:
        values = [factor * row.metrics[metric] for row in rows]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.fmean(values):{form}} ± {sd:{form}}"

    return f"{one('psnr', 1, '6.2f')} dB   {one('nmse', 100, '6.3f')}   {one('ssim', 1, '.3f')}"


def mean(rows: Sequence[Row], model: str, mask: str) -> float:
    own = [r.metrics["psnr"] for r in rows if r.labels["model"] == model and r.labels["mask"] == mask]
    return statistics.fmean(own) if own else math.nan


def verdict(name: str, value: float, met: bool, bar: str) -> None:
    print(f"{'met   ' if met else 'MISSED'}  {name}: {value:.2f} (bar: {bar})")


def contestants(options: argparse.Namespace) -> list[Contestant]:
    prior = loaded(options)
    found = [Contestant(name="MAP", model=prior, dials={"estimate": "map"})]
    if not options.no_mmse:
        found.append(Contestant(name="MMSE", model=prior, dials={"estimate": "mmse"}))
    found = [*(Contestant(name=called(what), model=supervised(what, options)) for what in options.supervised), *found]
    torch.manual_seed(0)  # draws follow it, and training has its own
    return found


def called(what: str) -> str:
    """Of runs/NAME/model.safetensors, of NAME.toml and of a bundled NAME: that."""
    path = Path(what)
    return path.parent.name if path.stem == "model" else path.stem


def supervised(what: str, options: argparse.Namespace) -> Any:
    """A network from its weights, or trained by its recipe, unless that was done before."""
    if not what.endswith(".toml"):
        return tunemri.load(what)
    if options.output is None:
        raise SystemExit(f"--supervised {what}: a recipe needs a folder to train in, give -o FOLDER")
    recipe = training.read_recipe(what, [f"data.folder={options.data / 'train'}"])
    return training.train(recipe, options.output / called(what), resume=True).eval()


def loaded(options: argparse.Namespace) -> Any:
    """The prior, with as many samples as asked for."""
    prior: Any = tunemri.load(options.model)
    if options.samples:
        prior.draws = replace(prior.draws, samples=options.samples)
    prior.real = options.real
    return prior


def part_masks(options: argparse.Namespace) -> None:
    planes, rows = images(options, options.source), []
    phase = 0.0 if options.real else 0.5
    masks = [mask for mask in MASKS if options.only in mask]
    entered = contestants(options)
    for mask in masks:
        group = list(cases(planes, options.source, mask, MASKS, 1, phase))
        rows += judged(mask, group, entered, options.keep, options.spline)
    save(rows, options, f"masks-{options.source}{'-real' * options.real}")
    gain = {mask: mean(rows, "MAP", mask) - mean(rows, "TV, tuned", mask) for mask in masks}
    print()
    for mask, value in gain.items():
        verdict(f"MAP - TV, {mask} [dB]", value, value >= 0, "never below")
    if set(MEAN_OF) <= set(masks):
        three = statistics.fmean(gain[mask] for mask in MEAN_OF)
        verdict("MAP - TV, mean of Cartesian, spiral, radial [dB]", three, three >= 1.5, "1.5")
    if "random 3×, no centre" in masks:
        value = gain["random 3×, no centre"]
        verdict("MAP - TV, random without centre [dB]", value, value >= 4, "4")
    if not options.no_mmse:
        for mask in masks:
            value = mean(rows, "MMSE", mask) - mean(rows, "MAP", mask)
            verdict(f"MMSE - MAP, {mask} [dB]", value, value >= 0, "0")
    for name, mask in itertools.product(map(called, options.supervised), masks):
        value = mean(rows, "MAP", mask) - mean(rows, name, mask)
        verdict(f"MAP - {name}, {mask} [dB]", value, value >= 0, "0 where it was not trained")


def part_coils(options: argparse.Namespace) -> None:
    rows, entered = [], contestants(options)
    for source in (options.source, "knee"):
        planes = images(options, source)
        for mask in PARALLEL:
            group = list(cases(planes, source, mask, PARALLEL, 8))
            rows += judged(f"{source}, {mask}", group, entered, options.keep)
    save(rows, options, "coils")


def part_adapted(options: argparse.Namespace) -> None:
    """Another anatomy: the weight that held-out samples choose, against TV with its best weight."""
    prior, rows = tunemri.load(options.model), []
    planes = images(options, "knee")
    for mask in MASKS:
        group = list(cases(planes, "knee", mask, MASKS, 1))
        rows += judged(mask, group, [Contestant(name="MAP", model=prior, dials={"estimate": "map"})], options.keep)
        for case in group:
            chosen = tunemri.choose(case.scan, prior, fixed={"estimate": "map"}, refine=2).dials
            rows += evaluation.evaluate(
                [Contestant(name="MAP, chosen", model=prior, dials=chosen)], [case], metrics=SHOWN
            )
        own = [row for row in rows if row.labels["model"] == "MAP, chosen" and row.labels["mask"] == mask]
        print(f"  {'MAP, chosen':22} {spread(own)}   lam {[round(float(r.dials['lam']), 2) for r in own]}", flush=True)
    save(rows, options, "adapted")
    print()
    for mask in MASKS:
        value = mean(rows, "MAP, chosen", mask) - mean(rows, "TV, tuned", mask)
        verdict(f"knee, MAP with chosen weight - TV, {mask} [dB]", value, value >= 0, "0")


def part_regression(options: argparse.Namespace) -> None:
    """One line through the best weights of training subjects; validation subjects with what it says of them."""
    prior = loaded(options)
    masks = [mask for mask in MASKS if options.only in mask]
    seen, new = images(options, options.source, "train"), images(options, options.source)
    known = [case for mask in masks for case in cases(seen, options.source, mask, MASKS, 1)]
    truths = [case.reference for case in known if case.reference is not None]
    found = tuning.fit_weight(prior, [case.scan for case in known], truths, slices=len(known))
    line, weights = found.regression, sorted(row["lam"] for row in found.rows)
    print(
        f"log lam = {line.slope:.3g} rho {line.intercept:+.3g}, lam in [{line.floor:.3g}, {line.ceiling:.3g}], median of "
        f"the best {statistics.median(weights):.3g}; R² {found.r2:.3f}, n = {len(weights)}"
    )
    print(
        f"gain on scans left out of the line: {found.gain:+.3f} dB, 95 % interval {found.low:+.3f} to {found.high:+.3f}",
        flush=True,
    )
    rows = []
    for mask in masks:
        print(f"\n{mask}: n = {len(new)}")
        for case in cases(new, options.source, mask, MASKS, 1):
            best = tunemri.choose(
                case.scan, prior, by="reference", reference=case.reference, fixed={"estimate": "map"}, points=5, refine=2
            )  # fmt: skip
            entered = [
                Contestant(name="lam 1", model=prior, dials={"estimate": "map", "lam": 1.0}),
                Contestant(name="regression", model=found.model, dials={"estimate": "map"}),
                Contestant(name="best lam", model=prior, dials=best.dials),
            ]
            rows += evaluation.evaluate(entered, [case], metrics=SHOWN)
        for name in ("lam 1", "regression", "best lam"):
            own = [row for row in rows if (row.labels["model"], row.labels["mask"]) == (name, mask)]
            print(f"  {name:22} {spread(own)}   lam {[round(float(r.dials['lam']), 2) for r in own]}", flush=True)
    save(rows, options, "regression")


def part_posterior(options: argparse.Namespace) -> None:
    """90 % intervals of both parts of every pixel of the object; correlation of standard deviation and error.

    Of several coils, whose maps share the phase out between them and the image as they like, those of magnitudes.
    """
    prior = loaded(options)
    planes = images(options, options.source)
    print(
        "pattern                  coverage: object  everywhere   correlation: object  everywhere   mean std   R-hat ≤ 1.1   ESS"
        " (median)   s"
        "   PSNR [dB] of mode and mean"
    )
    patterns = {mask: family for mask, family in SPREAD.items() if options.only in mask}
    deviations: dict[str, float] = {}
    picture: list[plots.Panel] = []
    for mask in patterns:
        numbers = []
        for case in cases(planes, options.source, mask, patterns, options.coils):
            start = time.perf_counter()
            out = tunemri.reconstruct(case.scan, prior, estimate="mmse")
            seconds = time.perf_counter() - start
            assert out.variance is not None and case.reference is not None
            record = out.stats["chains"][0]
            std, pair = out.variance.sqrt(), (out.image, case.reference)
            estimate, truth = pair if options.coils == 1 else map(torch.abs, pair)
            error = estimate - truth
            parts = torch.view_as_real(error) if error.is_complex() else error[..., None]
            # E|x - mean|² counts both parts: each has half of it.
            inside = (parts.abs() <= 1.6449 * (std / math.sqrt(2))[..., None]).float().mean(-1)
            mode = tunemri.reconstruct(case.scan, prior, estimate="map").image
            scores = [metrics.psnr(x.abs(), case.reference.abs()) for x in (mode, out.image)]
            body = metrics.foreground(case.reference.abs())
            both = torch.stack((std[body], error.abs()[body]))
            top = float(case.reference.abs().max())
            numbers.append(
                (
                    float(inside[body].mean()), float(inside.mean()), float(torch.corrcoef(both)[0, 1]),
                    float(torch.corrcoef(torch.stack((std.flatten(), error.abs().flatten())))[0, 1]),
                    float(std[body].mean()) / top, record["mixed"], record["effective"], seconds, *scores,
                )
            )  # fmt: skip
            if case.name.endswith("/0") and mask == "Cartesian 4×":
                picture = [
                    plots.Panel(title="reference", image=case.reference[0]), plots.Panel(title="mean", image=out.image[0]),
                    plots.Panel(title="error × 5", image=5 * error[0]), plots.Panel(title="std × 5", image=5 * std[0]),
                ]  # fmt: skip
        a = torch.tensor(numbers).mean(0).tolist()
        deviations[mask] = a[4]
        print(
            f"{mask:24} {a[0]:17.1%} {a[1]:11.1%} {a[2]:21.2f} {a[3]:11.2f} {a[4]:10.4f} {a[5]:13.1%} {a[6]:14.0f} {a[7]:6.0f}"
            f"   {a[8]:6.2f} {a[9]:6.2f}",
            flush=True,
        )
        verdict(f"coverage of 90 % intervals, {mask}", a[0], 0.80 <= a[0] <= 0.97, "0.80 to 0.97")
        verdict(f"correlation of std and error, object, {mask}", a[2], a[2] > 0.3, "0.3")
        verdict(f"correlation of std and error, everywhere, {mask}", a[3], a[3] > 0.3, "0.3")
        verdict(f"MMSE - MAP, {mask} [dB]", a[9] - a[8], a[9] >= a[8], "0")
        verdict(f"share of pixels with R-hat ≤ 1.1, {mask}", a[5], a[5] >= 0.95, "0.95")
    growth = [deviations.get(f"Cartesian {r}×", math.nan) for r in (2, 4, 8)]
    if not any(math.isnan(value) for value in growth):
        verdict(
            "std grows with acceleration: 4× over 2×", growth[1] / growth[0], growth[0] < growth[1] < growth[2], "1"
        )
    if picture and options.output:
        plots.strip(picture).save(options.output / "posterior.png", overwrite=True)


def part_widths(options: argparse.Namespace) -> None:
    """|error|² of the mean over the variance of draws, where k-space was not sampled, by spatial frequency.

    The three numbers of `Draws` are the least squares fit of a (1 − s)ᵖ (1 + (ρ₀/ρ)³) to its logarithm, s the share sampled,
    on validation images, of the sources that are trained on, which `posterior` at the same limit does not show: errors on
    training images are smaller.
    """
    prior = loaded(options)
    edges = (0, 1.5, 3, 5, 8, 12, 18, 26, 36, 1e9)
    patterns = {mask: family for mask, family in SPREAD.items() if options.only in mask}
    found: dict[str, list[list[float]]] = {mask: [] for mask in patterns}
    points: list[tuple[float, float, float]] = []
    for source in ("openms", "ixi", "cardiac"):
        planes = images(options, source, other=True)
        for mask in patterns:
            for case in cases(planes, source, mask, patterns, 1):
                ready = normalise(case.scan)
                assert case.reference is not None and ready.scale is not None
                drawn = prior.posterior(
                    ready.kspace, encoding(ready), noise=ready.noise_std, observe=fft2, seed=options.seed
                ).moments
                truth = fft2(case.reference / ready.scale[:, None, None])[0].to(drawn.mean.dtype)
                wrong, spread = (truth - drawn.mean).abs().square(), drawn.variance
                h, w = wrong.shape
                rho = torch.hypot((torch.arange(h) - h // 2)[:, None].float(), (torch.arange(w) - w // 2).float())
                left = (ready.mask[0, 0] == 0).expand(h, w)
                row = []
                for lo, hi in itertools.pairwise(edges):
                    ring = left & (rho >= lo) & (rho < hi)
                    ratio = float(wrong[ring].sum() / spread[ring].sum()) if bool(ring.any()) else math.nan
                    row.append(ratio)
                    if not math.isnan(ratio):
                        points.append(
                            (max(1.0, float(rho[ring].mean())), math.log(float(left.float().mean())), math.log(ratio))
                        )
                found[mask].append(row)
    print("|error|² / variance of draws, geometric means, where ρ is at least [cycles per field of view]")
    print(" " * 24 + "".join(f"{edge:9g}" for edge in edges[:-1]))
    for mask, rows in found.items():
        columns = [[math.log(v) for v in column if not math.isnan(v)] for column in zip(*rows, strict=True)]
        print(f"{mask:24}" + "".join(f"{math.exp(statistics.fmean(c)):9.1f}" if c else " " * 9 for c in columns))
    rho, share, ratio = torch.tensor(points, dtype=torch.float64).T
    trials = torch.linspace(0, 10, 101, dtype=torch.float64)[:, None]
    target = ratio - (1 + (trials / rho) ** 3).log()
    line = torch.stack((torch.ones_like(share), share), 1)
    fits = torch.linalg.lstsq(line, target.T).solution
    rest = target.T - line @ fits
    best = int(rest.square().sum(0).argmin())
    a, p = fits[:, best].tolist()
    print(
        f"temperature = {math.exp(a):.1f}, unsampled = {p:.1f}, coarse = {float(trials[best]):.1f}; n = {len(points)}, "
        f"what is left of the logarithm {float(rest[:, best].std()):.2f}"
    )


def part_maps(options: argparse.Namespace) -> None:
    """Share of coil images that estimated maps leave unexplained: of those that draws have, and of the true ones.

    The prior sees the reference where it would see a first image; the validation images are those that `posterior` does not show.
    """
    prior = loaded(options)
    print("coil images that estimated maps leave unexplained [%]: maps drawn, mean of six / true maps")
    for source, mask in itertools.product(("ixi", "knee"), PARALLEL):
        planes, found = images(options, source, other=True), []
        for x, case in zip(planes, cases(planes, source, mask, PARALLEL, 8, true_maps=True), strict=True):
            assert case.reference is not None and case.scan.csm is not None
            ready = normalise(methods.prepare(replace(case.scan, csm=None)))
            A, z = encoding(ready).preconditioned(ready.kspace)
            nu = float(ready.noise_std or 0) * prior_code._gain(A)
            image = (case.reference / ready.scale[:, None, None]).to(z)
            grids = prior._grids(z, A, nu, (x.shape[0], x.shape[1]))
            generator = torch.Generator().manual_seed(options.seed)
            drawn = [prior._other_maps(image, prior_code._low(grids), A, nu, generator) for _ in range(6)]

            def far(maps: Tensor, image: Tensor = image, csm: Tensor = A.csm) -> float:
                power = image.abs().square()
                left = 1 - (coil_maps.unit_maps(csm).conj() * coil_maps.unit_maps(maps)).sum(1).abs().square()
                return float((left * power).sum() / power.sum())

            found.append((statistics.fmean(map(far, drawn)), far(case.scan.csm)))
        print(f"{source:8} {mask:28}" + "   ".join(f"{100 * a:.4f} / {100 * b:.4f}" for a, b in found), flush=True)


def part_joint(options: argparse.Namespace) -> None:
    """4×, 4 % of the lines for calibration: maps by ESPIRiT, by nonlinear inversion, or together with the image."""
    prior = tunemri.load(options.model)
    gains: dict[str, list[float]] = {}
    for name, kspace, reference, seed in multicoil(options):
        h, w = kspace.shape[-2:]
        mask = make_mask("cartesian-random", (h, w), 4, seed=seed, center_fraction=0.04)[None, None]
        scan = Scan(kspace=kspace * mask, mask=mask, image_shape=(h, w), provenance=name)
        scores = {}
        for csm in ("espirit", "nlinv", "joint"):
            start = time.perf_counter()
            out = tunemri.reconstruct(scan, prior, csm=csm, estimate="map")
            scores[csm] = metrics.psnr(out.image.abs(), reference)
            print(
                f"{name}, mask {seed}, {scan.acceleration:.2f}×, {csm:8} {scores[csm]:6.2f} dB   "
                f"{time.perf_counter() - start:5.1f} s   {out.status}", flush=True
            )  # fmt: skip
        for other in ("espirit", "nlinv"):
            gains.setdefault(f"joint - {other}, {name.split('/')[0]}", []).append(scores["joint"] - scores[other])
    for kind, values in gains.items():
        gain = statistics.fmean(values)
        verdict(f"{kind}, n = {len(values)} [dB]", gain, gain > 0, "0")


def multicoil(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Name, complete k-space, root of the sum of squares, and the seed of its mask."""
    for source in ("ixi", "openms"):
        small = argparse.Namespace(**vars(options) | {"size": 128})
        for i, x in enumerate(images(small, source)):
            full, _ = simulate(x[None], mask=torch.ones(128, 128), coils=8, noise=NOISE, phase=0.5, seed=i)
            _, truth = simulate(x[None], mask=torch.ones(128, 128), coils=8, noise=0.0, phase=0.5, seed=i)
            yield f"simulated/{source} {i}", full.kspace, truth.abs(), i
    for file in ("brain_7ch_cart", "liver_4ch_2echo"):
        raw = tunemri.read(options.data / f"bench/raw/{file}.h5")
        kspace = crop(raw.kspace[:1], tuple(n // 2 * 2 for n in raw.image_shape))
        for seed in range(options.limit):
            yield f"{file}/raw", kspace, ifft2(kspace).abs().square().sum(1).sqrt(), seed


def part_speed(options: argparse.Namespace) -> None:
    """Each size in a process of its own, so that its peak memory is its own."""
    print("size   coils   seconds   peak memory [GB]")
    found = {}
    for size, coils in ((256, 1), (320, 1), (320, 4), (320, 8), (320, 15)):
        command = [
            sys.executable,
            __file__,
            "one",
            "--model",
            str(options.model),
            "--size",
            str(size),
            "--coils",
            str(coils),
        ]
        seconds, gigabytes = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        found[size, coils] = seconds, gigabytes
        print(f"{size}²   {coils:5d}   {seconds:7.1f}   {gigabytes:.2f}", flush=True)
    verdict("MAP of 256², one coil [s]", found[256, 1][0], found[256, 1][0] <= 10, "10")
    verdict("MAP of 320², 15 coils [s]", found[320, 15][0], found[320, 15][0] <= 60, "60")
    peak = max(gigabytes for _, gigabytes in found.values())
    verdict("peak memory [GB]", peak, peak <= 2, "2")


def part_one(options: argparse.Namespace) -> None:
    """Processor seconds and peak memory of one MAP reconstruction."""
    shape = (options.size, options.size)
    scan, _ = simulate(
        phantom(shape)[None], mask=make_mask("cartesian-random", shape, 4), coils=options.coils, noise=NOISE, store_maps=options.coils > 1,
    )  # fmt: skip
    prior = tunemri.load(options.model)
    start = time.process_time()
    tunemri.reconstruct(scan, prior, estimate="map")
    print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def part_prior(options: argparse.Namespace) -> None:
    """Annealed Langevin chains without data, and the energy on the plane of one chain's path at the lowest level."""
    prior = loaded(options)
    energy = prior.energy
    lo, hi = prior.levels
    generator = torch.Generator().manual_seed(options.seed)
    chains, size = 4, options.size or 128
    x = hi * torch.randn(chains, size, size, dtype=torch.complex64, generator=generator)
    levels = torch.logspace(math.log10(hi), math.log10(max(lo, 0.01)), 30).tolist()
    path: list[Tensor] = []
    for level in levels:
        # U = 2E/σ² is -log p of what has noise of this level; its curvature is 2/σ² at most.
        sigma = torch.full((chains,), level)

        def gradient(x: Tensor, sigma: Tensor = sigma, level: float = level) -> tuple[Tensor, Tensor]:
            value, slope = energy.value_and_gradient(x, sigma)
            return 2 * value / level**2, 2 * slope / level**2

        last = level == levels[-1]
        done = solvers.langevin(
            gradient, x, step=0.1 * level**2, samples=options.moves * (5 if last else 1), generator=generator, limit=1e3,
            observe=(lambda x: path.append(x[0].clone()) or x) if last else None,  # type: ignore[func-returns-value]
        )  # fmt: skip
        x = done.last
    sigma = torch.full((1,), levels[-1])
    with torch.no_grad():
        clean = x - energy.value_and_gradient(x, sigma.expand(chains))[1]
    found = landscape.energy_surface(
        lambda x: energy(x, sigma.expand(len(x))) / levels[-1] ** 2,
        torch.stack(path[:: max(1, len(path) // 200)]),
        points=31,
    )
    print(
        f"{chains} chains of {done.moves} moves at σ = {levels[-1]:.3g}: {100 * float(found.share.sum()):.0f} % in the plane"
    )
    print(
        f"energy on the plane from {float(found.energy.min()):.1f} to {float(found.energy.max()):.1f} (in units of σ²)"
    )
    print(
        f"draws: |x| at most {float(x.abs().max()):.2f}, R-hat ≤ 1.1 on {float((done.moments.r_hat <= 1.1).float().mean()):.0%}"
    )
    if options.output:
        panels = [plots.Panel(title=f"chain {k + 1}", image=image) for k, image in enumerate(clean)]
        plots.strip(panels).save(options.output / "prior-samples.png", overwrite=True)
        plots.surface(found, title=f"E/σ² around a chain, σ = {levels[-1]:.2g}").save(
            options.output / "prior-landscape.png", overwrite=True
        )


def part_compare(options: argparse.Namespace) -> None:
    """Both energies small, on the same images and for the same processor time, each with its best weight of five."""
    size = options.size or 64
    planes = datasets.load_images(options.data / "train", [options.source])[options.source]
    planes = [F.interpolate(x[None, None], (size, size), mode="area")[0, 0] for x in planes]
    judges = images(argparse.Namespace(**vars(options) | {"size": size}), options.source)
    encoding = Cartesian(torch.ones(1, 1, size, size))
    trained: dict[str, Any] = {}
    plans: list[tuple[str, dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = [
        ("score matching", {"energy": {"widths": [16, 32, 48]}}, lambda w: torch.optim.Adam(w, 2e-3)),
        (
            "likelihood",
            {
                "energy": {"name": "paper", "size": size, "widths": [16, 16, 32, 48, 64]},
                "likelihood": {"chain": 40, "growth": 100, "replay": 256},
            },
            lambda w: solvers.AdaBelief(w, 2e-4),
        ),
    ]
    for name, arguments, optimiser in plans:
        torch.manual_seed(0)
        model = Generative(**arguments).train()
        steps = optimiser(model.parameters())
        generator = torch.Generator().manual_seed(0)
        start, count = time.process_time(), 0
        while time.process_time() - start < options.seconds:
            chosen = torch.randint(len(planes), (8,), generator=generator)
            x = torch.stack([planes[int(k)] for k in chosen]).to(torch.complex64)
            x = x * torch.exp(1j * smooth_phase((size, size), seed=count))
            steps.zero_grad()
            try:
                model.loss(datasets.Example(y=x[:, None], A=encoding, target=x), generator).backward()
            except tunemri.errors.NonFinite as error:  # what it had learned until then is judged
                print(f"{name}: {error}")
                break
            steps.step()
            count += 1
        weights = sum(w.numel() for w in model.parameters())
        spent = time.process_time() - start
        print(f"{name}: {weights} weights, {count} updates in {spent:.0f} s, {model.notes()}", flush=True)
        trained[name] = model.eval()
    for mask in ("random 3×, no centre", "Cartesian 4×, 8 %", "radial 6×"):
        group = list(cases(judges, options.source, mask, MASKS, 1))
        print(f"\n{mask}: n = {len(group)}")
        for name, model in ({"TV": TotalVariation()} | trained).items():
            fixed = {} if name == "TV" else {"estimate": "map"}
            best = evaluation.tune(group, model, dial="lam", points=5, rounds=1, fixed=fixed)
            print(f"  {name:16} {best.value:6.2f} dB   lam {best.dials['lam']:.3g}", flush=True)


def save(rows: Sequence[Row], options: argparse.Namespace, name: str) -> None:
    if options.output:
        evaluation.write_csv(options.output / f"{name}.csv", evaluation.records(rows), overwrite=True)


PARTS = {
    "masks": part_masks, "coils": part_coils, "posterior": part_posterior, "widths": part_widths, "maps": part_maps,
    "adapted": part_adapted, "regression": part_regression, "joint": part_joint,
    "speed": part_speed, "one": part_one, "prior": part_prior, "compare": part_compare,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=sorted(PARTS))
    folder = Path(os.environ.get("TUNEMRI_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
    parser.add_argument("--data", type=Path, default=folder, help="folder with val/, bench/ and, to train, train/")
    parser.add_argument("--model", default="energy-brain")
    parser.add_argument(
        "--supervised", action="append", default=[], metavar="WEIGHTS|RECIPE",
        help="a supervised network to compare with; one of a recipe (.toml) is trained under -o first; repeatable",
    )  # fmt: skip
    parser.add_argument("--source", default="openms", help="validation images of `masks`, `coils` and `posterior`")
    parser.add_argument("--limit", type=int, default=8, help="images (or masks, of `joint`)")
    parser.add_argument("--no-mmse", action="store_true", help="leave the posterior mean out of the tables")
    parser.add_argument("--size", type=int, default=0, help="side of the images; 0: as they are, 128 of `prior`")
    parser.add_argument("--coils", type=int, default=1, help="of the scans of `posterior`")
    parser.add_argument("--samples", type=int, help="of each chain, of the posterior; none: as the weights file says")
    parser.add_argument("--moves", type=int, default=20, help="per level of `prior`")
    parser.add_argument(
        "--only", default="", help="patterns of `masks`, `posterior` and `widths` with this in their name"
    )
    parser.add_argument(
        "--real", action="store_true", help="of `masks`: images without phase, and a prior that knows so"
    )
    parser.add_argument("--spline", action="store_true", help="of `masks`: also with intensities by spline")
    parser.add_argument("--seconds", type=float, default=300, help="of training of each energy of `compare`")
    parser.add_argument("--seed", type=int, default=0, help="of `prior` and `widths`")
    parser.add_argument("--keep", type=Path, help="folder that keeps finished rows, to go on from")
    parser.add_argument("-o", "--output", type=Path, help="folder for tables and pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", tunemri.errors.TunemriWarning)
    for each in (options.output, options.keep):
        if each is not None:
            each.mkdir(parents=True, exist_ok=True)
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
