"""Coil maps: ESPIRiT against BART's `ecalib -m1`, and what maps are worth to a reconstruction.

    python benchmarks/coils.py [--data DIR] [-o FILE.csv] [--sources NAME,…] [--limit N] [--size N] [--masks N]
        [-m MODEL] … [--iterations N]

First, on the raw multi-coil scans of DIR/bench/raw (default: TUNEMRI_DATA, or shared/data beside the checkout), with the
same parameters, one thread each: the difference of the two projections of the coil images x = F⁻¹ y inside BART's maps,
‖S Sᴴ x - R Rᴴ x‖ / ‖x‖, what each leaves unexplained, ‖x - S Sᴴ x‖ / ‖x‖, and CPU time, the least of five (BART's
includes starting the process and its files).

Then, on validation images simulated with 8 coils: the part of the true coil images that maps leave unexplained, and the
PSNR of TV and of learned models with them, against the true maps. TV takes its default weight.

Last, on the complete ones of the raw scans, under masks with few lines in the centre: the part of all coil images that maps leave
unexplained, and the PSNR of the same methods against the root of the sum of squares.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported, and for BART

import argparse
import csv
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tunemri
from tunemri.coils import MAPS, completed_maps, espirit_maps
from tunemri.datasets import SOURCES, load_images
from tunemri.fourier import crop, ifft2
from tunemri.masks import make_mask
from tunemri.methods.classical import TotalVariation
from tunemri.metrics import psnr
from tunemri.scan import Scan
from tunemri.simulate import simulate

RAW = ("brain_7ch_cart.h5", "liver_4ch_2echo.h5", "brain_8ch_poisson_undersampled.h5")
COMPLETE = ("brain_7ch_cart.h5", "liver_4ch_2echo.h5")
# name → family, acceleration, options
MASKS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "Poisson 4×": ("poisson", 4, {}),
    "Cartesian 4×": ("cartesian-random", 4, {}),
    "Cartesian 4×, 4 %": ("cartesian-random", 4, {"center_fraction": 0.04}),
    "radial 4×": ("radial", 4, {}),
    "Gaussian 8×, no centre": ("gaussian", 8, {"calibration": 0}),
    "random 3×, no centre": ("random", 3, {}),
}
FEW = {f"Cartesian 4×, {share} %": ("cartesian-random", 4, {"center_fraction": share / 100}) for share in (4, 8)}
ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    **MAPS,
    "completed": completed_maps,
    "espirit everywhere": partial(espirit_maps, crop=0.0),
    "espirit, cut": partial(espirit_maps, cut=True),
}


Methods = dict[str, tunemri.Reconstructor]


def cpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """User and system time of this process and its children, the least of some runs."""
    spent = []
    for _ in range(repeats):
        before = os.times()
        work()
        spent.append(sum(os.times()[:4]) - sum(before[:4]))
    return min(spent)


def bart_maps(kspace: Tensor, folder: Path) -> Tensor:
    """`bart ecalib -m1` of one slice `(1, C, H, W)`."""
    c, h, w = kspace.shape[1:]
    (folder / "kspace.hdr").write_text(f"# Dimensions\n{w} {h} 1 {c}\n")
    kspace.numpy().tofile(folder / "kspace.cfl")
    command = ["bart", "ecalib", "-m1", str(folder / "kspace"), str(folder / "maps")]
    subprocess.run(command, check=True, capture_output=True)
    return torch.from_numpy(np.fromfile(folder / "maps.cfl", np.complex64).reshape(1, c, h, w))


def explained(x: Tensor, csm: Tensor) -> Tensor:
    """S Sᴴ x."""
    return csm * (csm.conj() * x).sum(1, keepdim=True)


def against_bart(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"{'scan':38} {'difference':>10} {'left':>7} {'BART':>7}   {'CPU s':>6} {'BART':>6}   support (BART)")
    for name in RAW:
        scan = tunemri.read(folder / name)
        assert scan.mask is not None
        for b in range(len(scan)):
            y, mask = scan.kspace[b : b + 1].contiguous(), scan.mask
            x = ifft2(y)
            with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
                theirs = bart_maps(y, Path(temporary))
                bart_seconds = cpu_seconds(lambda y=y, t=temporary: bart_maps(y, Path(t)))  # type: ignore[misc]
            ours = espirit_maps(y, mask, cut=True)
            seconds = cpu_seconds(lambda y=y, mask=mask: espirit_maps(y, mask, cut=True))  # type: ignore[misc]
            there, here = (m.abs().sum(1, keepdim=True) > 0 for m in (theirs, ours))
            size = (x * there).norm()
            row = {
                "scan": f"{name}[{b}] {x.shape[1]}×{x.shape[2]}×{x.shape[3]}",
                "difference": float(((explained(x, ours) - explained(x, theirs)) * there).norm() / size),
                "left": float(((x - explained(x, ours)) * there).norm() / size),
                "bart_left": float(((x - explained(x, theirs)) * there).norm() / size),
                "seconds": seconds, "bart_seconds": bart_seconds,
                "support": float(here.float().mean()), "bart_support": float(there.float().mean()),
            }  # fmt: skip
            good = row["difference"] <= 0.02 and seconds <= bart_seconds
            print(
                f"{row['scan']:38} {row['difference']:10.4f} {row['left']:7.4f} {row['bart_left']:7.4f}   "
                f"{seconds:6.3f} {bart_seconds:6.3f}   {row['support']:.3f} ({row['bart_support']:.3f})   "
                f"{'met' if good else 'MISSED'}",
                flush=True,
            )
            rows.append(row)
    return rows


def worth(images: dict[str, list[Tensor]], limit: int, methods: Methods) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, (family, acceleration, options) in MASKS.items():
        for source, planes in images.items():
            for index in range(len(planes) // (2 * limit), len(planes), max(1, len(planes) // limit)):
                shape = (planes[index].shape[-2], planes[index].shape[-1])
                mask = make_mask(family, shape, acceleration, seed=index, **options)
                scan, target = simulate(planes[index][None], mask=mask, coils=8, seed=index, store_maps=True)
                assert scan.csm is not None
                x = scan.csm * target[:, None]
                rows += judged(scan, x, target, methods, {"mask": name, "image": f"{source}/{index}"})
        print(f"# {name}, 8 coils, noise 0.01")
        table([row for row in rows if row["mask"] == name], list(methods))
    print("# all")
    table(rows, list(methods))
    return rows


def worth_on_raw(folder: Path, methods: Methods, masks: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for file in COMPLETE:
        for name, (family, acceleration, options) in FEW.items():
            full = tunemri.read(folder / file)
            h, w = (n // 2 * 2 for n in full.image_shape)
            kspace = crop(full.kspace[:1], (h, w))
            x = ifft2(kspace)
            for seed in range(masks):
                mask = make_mask(family, (h, w), acceleration, seed=seed, **options)[None, None]
                scan = Scan(kspace=kspace * mask, mask=mask, image_shape=(h, w))
                target = x.abs().square().sum(1).sqrt()
                rows += judged(scan, x, target, methods, {"mask": name, "image": f"{file}, mask {seed}"})
            print(f"# {file}, {name}, {masks} masks")
            table([row for row in rows if (row["mask"], row["image"].startswith(file)) == (name, True)], list(methods))  # type: ignore[attr-defined]
    return rows


def judged(
    scan: Scan, x: Tensor, target: Tensor, methods: Methods, labels: dict[str, object]
) -> list[dict[str, object]]:
    """A row for each kind of maps; x: the coil images, of which maps explain a part."""
    assert scan.mask is not None
    rows = []
    x = x * (target.abs() > 0.1 * target.abs().max())[:, None]
    for name in (*(["true"] if scan.csm is not None else []), *ESTIMATORS):
        csm, seconds = scan.csm, 0.0
        if csm is None or name != "true":
            before = time.process_time()
            csm = ESTIMATORS[name](scan.kspace, scan.mask)
            seconds = time.process_time() - before
        row = {**labels, "maps": name, "left": float((x - explained(x, csm)).norm() / x.norm()), "seconds": seconds}
        for method, network in methods.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a model was not trained for is the same for all maps
                result = tunemri.reconstruct(replace(scan, csm=csm), network)
            row[method] = psnr(result.image.abs(), target.abs())
            row[f"{method} residual"] = float(result.residual)  # type: ignore[arg-type]
        rows.append(row)
    return rows


def table(rows: list[dict[str, object]], methods: list[str]) -> None:
    """Means for each kind of maps."""
    print(f"{'maps':22} {'left':>7} {'CPU s':>7}" + "".join(f" {m + ' dB':>14} {'residual':>9}" for m in methods))
    groups = defaultdict(list)
    for row in rows:
        groups[row["maps"]].append(row)
    for name, own in groups.items():
        mean = {key: np.mean([row[key] for row in own]) for key in own[0] if key not in ("mask", "image", "maps")}
        print(
            f"{name:22} {mean['left']:7.4f} {mean['seconds']:7.3f}"
            + "".join(f" {mean[m]:14.2f} {mean[m + ' residual']:9.4f}" for m in methods),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    beside = Path(__file__).resolve().parents[2] / "shared/data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TUNEMRI_DATA", beside)))
    parser.add_argument("-o", "--output", type=Path, help="write the rows of the second and third part as CSV")
    parser.add_argument("--limit", type=int, default=1, help="validation images per source")
    parser.add_argument("--sources", default=",".join(SOURCES), help="of the validation images")
    parser.add_argument("--iterations", type=int, default=200, help="of TV")
    parser.add_argument("--size", type=int, help="of the validation images, made smaller; default: as they are")
    parser.add_argument("--masks", type=int, default=2, help="of each kind on a raw scan")
    parser.add_argument("-m", "--model", action="append", help="default: hyper-brain")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if shutil.which("bart") is None:
        print("bart is not on the PATH (apt-get install bart): no comparison with it")
    else:
        against_bart(arguments.data / "bench/raw")
    methods = {"tv": TotalVariation(iterations=arguments.iterations)}
    methods |= {name: tunemri.load(name) for name in arguments.model or ["hyper-brain"]}
    images = load_images(arguments.data / "val", arguments.sources.split(","))
    if arguments.size:
        shape = (arguments.size, arguments.size)
        images = {
            name: [F.interpolate(x[None, None], shape, mode="area")[0, 0] for x in own] for name, own in images.items()
        }
    rows = worth(images, arguments.limit, methods)
    rows += worth_on_raw(arguments.data / "bench/raw", methods, arguments.masks)
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
