"""What choosing without ground truth costs, how few images a whole dial needs, and how even a slider is.

    python benchmarks/tuning.py --data $TUNEMRI_DATA -o runs/tuning
    python benchmarks/tuning.py steps --data $TUNEMRI_DATA -o runs/steps
    python benchmarks/tuning.py diversity --data $TUNEMRI_DATA -o runs/diversity

Images are brought to `--size` by a crop of k-space and undersampled.

`choosing`, on validation subjects with coil maps estimated from the data: for each method the best dial by exhaustive
search with the truth; decibels that each criterion of `tunemri.choose` loses against it; size, error and time of the range
basis against exact reconstructions. Prints two tables, writes rows.csv and basis.csv.

`steps`: makes equal steps from training subjects, then compares twenty steps of the slider before and after, on validation
subjects. Writes the model with the new slider, which `tunemri equalise` would write, and steps.csv.

`diversity`: six good settings that differ most, of hyper-brain (one dial) and meta-brain (two): by the papers' search (random
settings, the tenth of them with the best PSNR, the pair farthest apart; four more at random), 10,000 settings, its time from
`--samples` of them; by `diversify` over 10,000 settings of a range basis, with the same gate; and by
`choose --by diverse`, whose gate needs no truth. Distances and PSNR are of exact reconstructions. Writes diversity.csv.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunemri import evaluation, methods, tuning
from tunemri.datasets import load_images, sampling_mask
from tunemri.errors import TunemriError
from tunemri.fourier import crop, fft2, ifft2
from tunemri.methods import Reconstructor, reconstruct
from tunemri.metrics import psnr
from tunemri.scan import Scan
from tunemri.simulate import simulate

CRITERIA = ("heldout-kspace", "discrepancy", "sure", "reference")
WAYS = ("papers", "basis", "blind")
CASES = (
    # coils, noise over the image maximum, mask, acceleration
    (1, 0.005, "poisson", 4.0),
    (1, 0.02, "cartesian-random", 3.0),
    (8, 0.005, "poisson", 8.0),
    (8, 0.02, "cartesian-random", 4.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("choosing", "steps", "diversity"), default="choosing")
    parser.add_argument("--data", type=Path, required=True, help="folder with val/, and train/ for steps")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "-m", "--model", action="append", help="repeatable; default tv, wavelet, hyper-brain; hyper-brain"
    )
    parser.add_argument("--sources", default="openms,siat")
    parser.add_argument("--coils", type=int, help="1 or 8: only these cases, of choosing")
    parser.add_argument("--by", action="append", choices=CRITERIA, help="repeatable; default all, of choosing")
    parser.add_argument("--limit", type=int, default=1, help="images per source and case")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument(
        "--samples", type=int, default=100, help="settings of the papers' search that are timed, of diversity"
    )
    parser.add_argument("--way", action="append", choices=WAYS, help="repeatable; default all, of diversity")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"choosing": choosing, "steps": steps, "diversity": diversity}[options.what](options)


def choosing(options: argparse.Namespace) -> None:
    images = load_images(options.data / "val", options.sources.split(","))
    rows: list[dict[str, Any]] = []
    bases: list[dict[str, Any]] = []
    for name in options.model or ["tv", "wavelet", "hyper-brain"]:
        model = methods.load(name)
        for case in (case for case in CASES if options.coils in (None, case[0])):
            for source, planes in images.items():
                for i in range(options.limit):
                    x = planes[(2 * i + 1) * len(planes) // (2 * options.limit)]
                    scan, truth = measured(reduced(x, options.size), *case)
                    about = {
                        "model": name,
                        "coils": case[0],
                        "noise": case[1],
                        "mask": f"{case[2]}:{case[3]:g}",
                        "source": source,
                        "image": i,
                    }
                    rows += [about | row for row in losses(scan, truth, model, options.by or CRITERIA)]
                    bases.append(about | basis(scan, model))
                    words = "  ".join(f"{r['by']} {r['lost']:.3f}" for r in rows if about.items() <= r.items())
                    made = bases[-1]
                    print(
                        f"{' '.join(map(str, about.values()))}  lost {words}  basis {made['components']} of {made['grid']}, "
                        f"worst {made['worst_db']:.1f} median {made['median_db']:.1f} dB",
                        flush=True,
                    )
    options.output.mkdir(parents=True, exist_ok=True)
    evaluation.write_csv(options.output / "rows.csv", rows, overwrite=True)
    evaluation.write_csv(options.output / "basis.csv", bases, overwrite=True)
    report(rows, bases)


def steps(options: argparse.Namespace) -> None:
    """Largest over smallest of twenty steps of a slider, before and after, on scans that it was not made with."""
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.model or ["hyper-brain"]:
        model = methods.load(name)
        start = time.perf_counter()
        scans = list(varied(options, "train", 0).values())
        even = tuning.equal_steps(model, scans)
        seconds = time.perf_counter() - start
        for which, turned in (("as trained", model), ("equal steps", even)):
            for case, scan in varied(options, "val", 1).items():
                for dial, about in turned.dials.items():
                    if not about.choices:
                        sizes = tuning.step_sizes(turned, scan, dial).tolist()
                        rows += [
                            {"model": name, "slider": which, "dial": dial, "case": case, "step": i, "change": change}
                            for i, change in enumerate(sizes)
                        ]
        if name in methods.bundled():
            recipe = methods.card(methods.bundled()[name])["recipe"]
            made = f"benchmarks/tuning.py steps, {options.size}², {options.sources}, {len(scans)} training scans"
            target = options.output / f"{name}.safetensors"
            methods.save(even, target, {**recipe, "equalised": {"command": made}}, overwrite=True)
        for dial in dict.fromkeys(r["dial"] for r in rows if r["model"] == name):
            print(
                f"{name} {dial}: made in {seconds:.0f} s, curve {[float(f'{v:.3g}') for v in even.dials[dial].curve[::4]]}"
            )
            for which in ("as trained", "equal steps"):
                own = [r for r in rows if (r["model"], r["dial"], r["slider"]) == (name, dial, which)]
                mean = [statistics.fmean(r["change"] for r in own if r["step"] == i) for i in range(20)]
                single = [
                    max(c) / max(min(c), 1e-12)
                    for case in dict.fromkeys(r["case"] for r in own)
                    for c in [[r["change"] for r in own if r["case"] == case]]
                ]
                print(
                    f"  {which:<12} steps of {100 * min(mean):.3f} to {100 * max(mean):.3f} % of the image: largest over "
                    f"smallest {max(mean) / min(mean):.2f} of the mean, {statistics.median(single):.2f} of a single scan "
                    f"(median of {len(single)}, worst {max(single):.2f})"
                )
    evaluation.write_csv(options.output / "steps.csv", rows, overwrite=True)


def diversity(options: argparse.Namespace) -> None:
    """Processor time, spread and quality of three ways to find settings that differ."""
    rows: list[dict[str, Any]] = []
    for name in options.model or ["hyper-brain", "meta-brain"]:
        model = methods.load(name)
        names = [n for n, d in model.dials.items() if not d.choices]
        for source, planes in load_images(options.data / "val", options.sources.split(",")).items():
            for mask, acceleration in (("poisson", 4.0), ("cartesian-random", 4.0)):
                scan, truth = measured(reduced(planes[len(planes) // 2], options.size), 1, 0.01, mask, acceleration)
                for way in options.way or WAYS:
                    found = {"papers": searched, "basis": spread, "blind": blind}[way]
                    seconds, picks = found(model, names, scan, truth, options.samples)
                    images = torch.stack([reconstruct(scan, model, **p).magnitude[0] for p in picks])
                    apart = torch.pdist(images.flatten(1)) / truth.norm()
                    quality = [psnr(x[None], truth.abs()) for x in images]
                    rows.append(
                        {
                            "model": name, "source": source, "mask": f"{mask}:{acceleration:g}", "way": way, "picks": len(picks),
                            "seconds": seconds, "farthest": 100 * float(apart.max()), "nearest": 100 * float(apart.min()),
                            "best": max(quality), "worst": min(quality),
                        }
                    )  # fmt: skip
                    print(
                        "  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True
                    )
    options.output.mkdir(parents=True, exist_ok=True)
    evaluation.write_csv(options.output / "diversity.csv", rows, overwrite=True)
    print(
        "\nmedians: processor seconds (papers: for 10,000), farthest and nearest two of six in % of the image, PSNR best and worst"
    )
    for name in dict.fromkeys(r["model"] for r in rows):
        for way in dict.fromkeys(r["way"] for r in rows):
            own = [r for r in rows if (r["model"], r["way"]) == (name, way)]
            middle = {
                key: statistics.median(r[key] for r in own)
                for key in ("seconds", "farthest", "nearest", "best", "worst")
            }
            print(f"{name:<12} {way:<7}" + "".join(f"  {key} {value:.4g}" for key, value in middle.items()))


Found = tuple[float, list[dict[str, Any]]]


def searched(model: Reconstructor, names: list[str], scan: Scan, truth: Tensor, samples: int) -> Found:
    """The papers' search: the pair farthest apart among the best tenth of 10,000, and four more of these at random.

    The time is that of reconstructing 10,000 settings, from `samples` of them; all of them are looked at by way of a range
    basis, which this search does not have.
    """
    place = torch.rand(samples, len(names), generator=torch.Generator().manual_seed(0)).tolist()
    start = time.process_time()
    for row in place:
        setting: dict[str, Any] = {n: model.dials[n].at(p) for n, p in zip(names, row, strict=True)}
        image = reconstruct(scan, model, **setting)
        psnr(image.magnitude, truth.abs())
    seconds = (time.process_time() - start) * 10_000 / samples
    settings, c, quality = _ten_thousand(model, names, scan, truth)
    good = (quality >= quality.quantile(0.9, interpolation="higher")).nonzero().flatten()
    apart = torch.cdist(c[good], c[good], compute_mode="donot_use_mm_for_euclid_dist")
    pair = divmod(int(apart.argmax()), len(good))
    order = torch.randperm(len(good), generator=torch.Generator().manual_seed(0)).tolist()
    others = [i for i in order if i not in pair][:4]
    return seconds, [settings[int(good[i])] for i in (*pair, *others)]


def spread(model: Reconstructor, names: list[str], scan: Scan, truth: Tensor, samples: int) -> Found:
    """The same gate, the settings that differ most, over 10,000 of a range basis."""
    start = time.process_time()
    settings, c, quality = _ten_thousand(model, names, scan, truth)
    gate = float(quality.max() - quality.quantile(0.9, interpolation="higher"))
    picks = tuning.diversify(c, quality, 6, within=gate)
    return time.process_time() - start, [settings[i] for i in picks]


def _ten_thousand(
    model: Reconstructor, names: list[str], scan: Scan, truth: Tensor
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Settings, their coefficients and their PSNR but for a constant, none of their images made."""
    made = tuning.range_basis(model, scan, dials=names)
    places = torch.quasirandom.SobolEngine(len(names), scramble=True, seed=0).draw(10_000)
    settings: list[dict[str, Any]] = [
        {n: model.dials[n].at(float(p)) for n, p in zip(names, row, strict=True)} for row in places
    ]
    c = made.coefficients_at(torch.tensor([list(s.values()) for s in settings], dtype=torch.float64)).float()
    # ‖mean + Σ c v - truth‖² by the components' orthonormality.
    off = (made.mean - truth[0].abs()).flatten()
    error = off.square().sum() + c.square().sum(1) + 2 * c @ (made.components.flatten(1) @ off)
    return settings, c, -10 * torch.log10(error)


def blind(model: Reconstructor, names: list[str], scan: Scan, truth: Tensor, samples: int) -> Found:
    """Without the truth: within 1 dB of the least held-out error."""
    start = time.process_time()
    fixed = {n: d.default for n, d in model.dials.items() if n not in names}
    choice = tuning.choose(scan, model, by="diverse", k=6, fixed=fixed)
    return time.process_time() - start, [dict(p) for p in choice.picks]


def varied(options: argparse.Namespace, split: str, seed: int) -> dict[str, Scan]:
    """One scan of each source, mask family and acceleration, of subjects of a split."""
    found = {}
    for s, (source, planes) in enumerate(load_images(options.data / split, options.sources.split(",")).items()):
        for m, (mask, acceleration) in enumerate((("poisson", 4.0), ("poisson", 8.0), ("cartesian-random", 4.0))):
            x = reduced(planes[(2 * m + 1) * len(planes) // 6], options.size)
            found[f"{source} {mask}:{acceleration:g}"] = measured(x, 1, 0.01, mask, acceleration, seed + 10 * s + m)[0]
    return found


def reduced(x: Tensor, size: int) -> Tensor:
    """The image at a lower resolution: a central part of its k-space."""
    shape = [min(size, n) for n in x.shape]
    return ifft2(crop(fft2(x.to(torch.complex64)), shape)) * math.sqrt(shape[0] * shape[1] / x.numel())


def measured(x: Tensor, coils: int, noise: float, mask: str, acceleration: float, seed: int = 0) -> tuple[Scan, Tensor]:
    pattern = sampling_mask(mask, (x.shape[0], x.shape[1]), acceleration, seed, {})
    return simulate(x[None], mask=pattern, coils=coils, noise=noise, seed=seed, store_maps=False)


def losses(scan: Scan, truth: Tensor, model: Reconstructor, criteria: Sequence[str]) -> list[dict[str, Any]]:
    """Decibels that each criterion loses against the best of a fine grid and golden sections around it."""
    quality: dict[float, float] = {}
    dial = next(iter(model.dials))

    def at(value: float) -> float:
        setting: dict[str, Any] = {dial: value}
        if value not in quality:
            quality[value] = psnr(reconstruct(scan, model, **setting).magnitude, truth.abs())
        return quality[value]

    best = tuning.choose(scan, model, by="reference", reference=truth, points=13, refine=5)
    top = at(float(best.dials[dial]))
    found = []
    for by in criteria:
        start = time.perf_counter()
        try:
            choice = tuning.choose(scan, model, by=by, reference=truth if by == "reference" else None)
        except TunemriError as refusal:
            print(f"{by}: {refusal}")
            continue
        value = float(choice.dials[dial])
        seconds = time.perf_counter() - start
        found.append(
            {
                "by": by,
                "best": best.dials[dial],
                "chosen": value,
                "top": top,
                "lost": top - at(value),
                "seconds": seconds,
            }
        )
    return found


def basis(scan: Scan, model: Reconstructor) -> dict[str, Any]:
    """Size, error and time of a range basis, and the time of an exact image."""
    start = time.perf_counter()
    made = tuning.range_basis(model, scan)
    seconds = time.perf_counter() - start
    dial = made.names[0]
    start = time.perf_counter()
    for p in (0.2, 0.5, 0.8):
        setting: dict[str, Any] = {dial: made.dials[dial].at(p)}
        reconstruct(scan, model, **setting)
    exact = (time.perf_counter() - start) / 3
    start = time.perf_counter()
    for p in torch.linspace(0, 1, 100):
        made.rebuild({dial: made.dials[dial].at(float(p))})
    preview = (time.perf_counter() - start) / 100
    return {
        "components": len(made.components), "grid": len(made.settings), "reconstructions": made.reconstructions,
        "worst_db": made.worst_db, "median_db": made.median_db, "seconds": seconds,
        "exact_ms": 1000 * exact, "rebuild_ms": 1000 * preview,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], bases: list[dict[str, Any]]) -> None:
    print("\ndB lost against the setting that ground truth picks: median (90th percentile, worst), seconds to choose")
    for model in dict.fromkeys(r["model"] for r in rows):
        for coils in sorted({r["coils"] for r in rows}):
            line = f"{model:<12} {coils} coils  "
            for by in CRITERIA:
                own = [r for r in rows if (r["model"], r["coils"], r["by"]) == (model, coils, by)]
                lost = sorted(r["lost"] for r in own)
                if lost:
                    high = lost[min(int(0.9 * len(lost)), len(lost) - 1)]
                    seconds = statistics.median(r["seconds"] for r in own)
                    line += f"  {by} {statistics.median(lost):.3f} ({high:.2f}, {lost[-1]:.2f}) {seconds:.1f} s"
            print(line)
    print("\nrange basis: components (median, most), grid, worst and median rebuild dB, seconds, exact and rebuilt ms")
    for model in dict.fromkeys(r["model"] for r in bases):
        own = [r for r in bases if r["model"] == model]

        def middle(key: str, own: list[dict[str, Any]] = own) -> float:
            return statistics.median(r[key] for r in own)

        print(
            f"{model:<12} {middle('components'):.0f}, {max(r['components'] for r in own)}  grid {middle('grid'):.0f}"
            f"  made from {middle('reconstructions'):.0f}  worst {min(r['worst_db'] for r in own):.1f}"
            f"  median {middle('median_db'):.1f} dB  {middle('seconds'):.1f} s"
            f"  exact {middle('exact_ms'):.0f} ms  rebuilt {middle('rebuild_ms'):.2f} ms"
        )


if __name__ == "__main__":
    main()
