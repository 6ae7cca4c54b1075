"""What choosing without ground truth costs, and how few images a whole dial needs.

    python benchmarks/tuning.py --data $TUNEMRI_DATA -o runs/tuning

Validation subjects, brought to `--size` by a crop of k-space, undersampled with coil maps estimated from the data.
For each method: the best dial by exhaustive search with the truth; decibels that each criterion of `tunemri.choose` loses
against it; size, error and time of the range basis against exact reconstructions. Prints two tables, writes rows.csv
and basis.csv.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
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
CASES = (
    # coils, noise over the image maximum, mask, acceleration
    (1, 0.005, "poisson", 4.0),
    (1, 0.02, "cartesian-random", 3.0),
    (8, 0.005, "poisson", 8.0),
    (8, 0.02, "cartesian-random", 4.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with val/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-m", "--model", action="append", help="repeatable; default tv, wavelet, hyper-brain")
    parser.add_argument("--sources", default="openms,siat")
    parser.add_argument("--limit", type=int, default=1, help="images per source and case")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load_images(options.data / "val", options.sources.split(","))
    rows: list[dict[str, Any]] = []
    bases: list[dict[str, Any]] = []
    for name in options.model or ["tv", "wavelet", "hyper-brain"]:
        model = methods.load(name)
        for case in CASES:
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
                    rows += [about | row for row in losses(scan, truth, model)]
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


def reduced(x: Tensor, size: int) -> Tensor:
    """The image at a lower resolution: a central part of its k-space."""
    shape = [min(size, n) for n in x.shape]
    return ifft2(crop(fft2(x.to(torch.complex64)), shape)) * math.sqrt(shape[0] * shape[1] / x.numel())


def measured(x: Tensor, coils: int, noise: float, mask: str, acceleration: float) -> tuple[Scan, Tensor]:
    pattern = sampling_mask(mask, (x.shape[0], x.shape[1]), acceleration, 0, {})
    return simulate(x[None], mask=pattern, coils=coils, noise=noise, seed=0, store_maps=False)


def losses(scan: Scan, truth: Tensor, model: Reconstructor) -> list[dict[str, Any]]:
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
    for by in CRITERIA:
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
