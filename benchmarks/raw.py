"""Classical methods against `bart pics` on raw scans, side by side in one run, one thread each.

    python benchmarks/raw.py [FOLDER] [-o FILE.csv] [-p FOLDER] [--only WORD] [-m METHOD …]

FOLDER defaults to bench/raw of TUNEMRI_DATA (or of shared/data beside the checkout). Both get the same samples in the
same units, the same ESPIRiT maps, the same number of iterations, and the best weight of one grid. BART gets the files
that `tunemri.write` makes, and its images are read as they come: an image turned, shifted or conjugated against ours
would have an error near one. Two habits of `pics` 0.8 (not of `bart fft`, which agrees with ours) are allowed for: on a
grid with one side 2 (mod 4) its image has the other sign, and with an odd side it lies a pixel aside of the maps, so that
k-space of odd sides loses its last line for both.

Errors are of complex numbers:

    fully sampled       4-fold undersampled here; ‖x - r‖ / ‖r‖ inside the object, r = Σ_c conj(S_c) x_c of all samples
    radial, one frame   the same, r from the spokes of all frames (contrast moves from frame to frame, so no error is small)
    as acquired         no reference: a tenth of the samples (every tenth spoke) is kept back, and predicted; ‖A x - y‖ / ‖y‖

CPU time is user plus system time of one solve at the best weight, the least of three: ours from the scan in memory, with
all that its operator prepares; BART's with the start of the process (some milliseconds) and its files. Met: neither
error nor time is worse (a thousandth of the error is the noise of rounding).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported, and for BART

import argparse
import csv
import resource
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tunemri
from tunemri import errors, formats, methods, nufft, plots
from tunemri.fourier import crop, ifft2
from tunemri.masks import make_mask
from tunemri.methods.classical import Sense, TotalVariation, Wavelet
from tunemri.operators import encoding
from tunemri.scan import Scan, select

GRID = np.geomspace(3e-4, 0.3, 10)
METHODS: dict[str, tuple[type[tunemri.Reconstructor], int, Callable[[float], list[str]]]] = {
    "sense": (Sense, 30, lambda lam: ["-l2", "-r", f"{lam:.6g}"]),
    "tv": (TotalVariation, 100, lambda lam: ["-R", f"T:3:0:{lam:.6g}"]),
    "wavelet": (Wavelet, 100, lambda lam: ["-R", f"W:3:0:{lam:.6g}"]),
}
READOUT = 288  # samples per spoke of the radial heart


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scan of one slice, normalised and with maps, and how far an image `(1, H, W)` is from the truth."""

    name: str
    scan: Scan
    error: Callable[[Tensor], float]
    reference: Tensor | None = None


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def undersampled(full: Scan, name: str, family: str) -> Case:
    """A fully sampled scan under a mask of ours, and what all its samples say."""
    h, w = (n // 2 * 2 for n in full.image_shape)
    full = Scan(kspace=crop(full.kspace, (h, w)), mask=torch.ones(1, 1, h, w), image_shape=(h, w))
    mask = make_mask(family, (h, w), 4, seed=0)[None, None]
    scan = methods.prepare(replace(full, kspace=full.kspace * mask, mask=mask), csm="espirit")
    x = ifft2(full.kspace)
    x = x[:, 0] if scan.csm is None else (scan.csm.conj() * x).sum(1)
    return against(x, scan, f"{name}, {family} {scan.acceleration:.1f}×")


def against(x: Tensor, scan: Scan, name: str) -> Case:
    """Judged by a reference in the units of the file."""
    assert scan.scale is not None
    reference = x / scan.scale[:, None, None].float()
    inside = reference.abs() > 0.1 * reference.abs().flatten().quantile(0.99)
    return Case(name=name, scan=scan, error=lambda x: relative(x[inside], reference[inside]), reference=reference)


def held_out(scan: Scan, name: str) -> Case:
    """A scan as acquired, judged by samples that nobody else gets to see."""
    ready = methods.prepare(scan, csm="espirit")
    if ready.trajectory is not None:
        kept = (torch.arange(ready.kspace.shape[-1]) // READOUT) % 10 != 0
        seen = replace(ready, kspace=ready.kspace[..., kept], trajectory=ready.trajectory[:, kept])
        unseen = replace(ready, kspace=ready.kspace[..., ~kept], trajectory=ready.trajectory[:, ~kept])
    else:
        assert ready.mask is not None
        h, w = ready.image_shape
        chosen = torch.rand(h, w, generator=torch.Generator().manual_seed(0)) < 0.1
        chosen[h // 2 - 12 : h // 2 + 12, w // 2 - 12 : w // 2 + 12] = False
        mask = ready.mask.expand(-1, -1, h, w)
        seen = replace(ready, mask=mask * ~chosen)
        unseen = replace(ready, mask=mask * chosen)
    A, y = encoding(unseen), unseen.kspace
    return Case(name=f"{name}, {ready.acceleration:.1f}× as acquired", scan=seen, error=lambda x: relative(A(x), y))


def one_frame(frames: Scan, index: int, name: str) -> Case:
    """A frame of a radial series, judged by the image of all spokes; its maps are theirs, too."""
    assert frames.trajectory is not None
    y, k = frames.kspace.movedim(0, 1).flatten(1)[None], frames.trajectory.flatten(0, 1)[None]
    everything = methods.prepare(replace(frames, kspace=y, trajectory=k, scale=None), csm="espirit")
    assert everything.scale is not None
    x = Sense(iterations=50)(everything.kspace, encoding(everything), lam=1e-3).image
    scan = methods.prepare(replace(select(frames, slice(index, index + 1)), csm=everything.csm))
    return against(x * everything.scale[:, None, None].float(), scan, f"{name} {index}, {scan.acceleration:.1f}×")


def cases(folder: Path, only: str) -> Iterator[Case]:
    """Every file once or twice; two files of one scan share the masks between them."""
    for file, index, families in (
        ("brain_7ch_cart.h5", 0, ("poisson",)),
        ("brain_7ch_ksp.cfl", 0, ("cartesian-random",)),
        ("liver_4ch_2echo.h5", 0, ("poisson", "cartesian-random")),
        ("liver_4ch_2echo.mrd.h5", 1, ("poisson", "cartesian-random")),
        ("knee_1ch_fatsat_raw.h5", 0, ("poisson", "cartesian-random")),
        ("brain_1ch_t1sag_raw.h5", 0, ("poisson", "cartesian-random")),
        ("brain_8ch_poisson_undersampled.h5", 0, ()),
        ("heart_radial_ksp.cfl", 0, ()),
        ("heart_radial_3ch_7frames.h5", 3, ()),
    ):
        if only not in file:
            continue
        name = file.replace("_raw", "").replace("_undersampled", "")
        if file.endswith("frames.h5"):
            yield one_frame(tunemri.read(folder / file), index, name)
            continue
        scan = tunemri.read(folder / file, slices=slice(index, index + 1))
        if not families:
            yield held_out(scan, name)
        for family in families:
            yield undersampled(scan, name, family)


class Bart:
    """`bart pics` on one scan; files live in a temporary folder, in memory where the system has such a one."""

    def __init__(self, scan: Scan, folder: Path) -> None:
        self.folder, self.off_grid = folder, scan.trajectory is not None
        self.sign = 1 if self.off_grid else (-1) ** sum(n // 2 for n in scan.image_shape)
        if scan.csm is None:
            scan = replace(scan, csm=torch.ones(1, 1, *scan.image_shape, dtype=scan.kspace.dtype))
        tunemri.write(folder / "scan.cfl", replace(scan, scale=None))

    def __call__(self, options: list[str], iterations: int) -> Tensor:
        if self.off_grid:
            options = [*options, "-t", str(self.folder / "scan_traj")]
            if "-l2" not in options:
                options = ["-e", *options]  # without it, FISTA diverges off the grid
        files = [str(self.folder / name) for name in ("scan", "scan_maps", "image")]
        call = ["bart", "pics", "-w", "1", "-i", str(iterations), *options, *files]
        subprocess.run(call, check=True, capture_output=True)
        return self.sign * formats.read_image(self.folder / "image.cfl").data


def cpu_seconds(solve: Callable[[], object], repeats: int = 3) -> float:
    """User and system time of this process and its children, the least of some runs."""
    spent = []
    for _ in range(repeats):
        nufft._density_weights.cache_clear()  # what a first call pays, every call shall pay
        before = used()
        solve()
        spent.append(used() - before)
    return min(spent)


def used() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def best(case: Case, solve: Callable[[float], Tensor]) -> tuple[float, float]:
    """(error, weight) of the lowest point of the grid: every third weight, then downhill from the best of them."""
    found = {i: case.error(solve(float(GRID[i]))) for i in range(0, len(GRID), 3)}
    at = min(found, key=found.__getitem__)
    while True:
        for i in range(max(at - 1, 0), min(at + 2, len(GRID))):
            if i not in found:
                found[i] = case.error(solve(float(GRID[i])))
        lowest = min(found, key=found.__getitem__)
        if lowest == at:
            return found[at], float(GRID[at])
        at = lowest


def compare(case: Case, pictures: Path | None, names: list[str]) -> list[dict[str, object]]:
    """One row per method."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        bart = Bart(case.scan, Path(folder))
        for name in names:
            kind, n, options = METHODS[name]

            def ours(lam: float, kind=kind, n=n) -> Tensor:  # type: ignore[no-untyped-def]
                return kind(iterations=n, tolerance=0.0)(case.scan.kspace, encoding(case.scan), lam=lam).image

            def theirs(lam: float, options=options, n=n) -> Tensor:  # type: ignore[no-untyped-def]
                return bart(options(lam), n)

            (error, lam), (bart_error, bart_lam) = (best(case, solve) for solve in (ours, theirs))
            seconds = cpu_seconds(lambda: ours(lam))  # noqa: B023 called at once
            bart_seconds = cpu_seconds(lambda: theirs(bart_lam))  # noqa: B023
            rows.append(
                {
                    "case": case.name, "method": name, "iterations": n, "error": error, "bart_error": bart_error,
                    "seconds": seconds, "bart_seconds": bart_seconds,
                    "lam": lam, "bart_lam": bart_lam,
                    "met": error <= 1.001 * bart_error and seconds <= bart_seconds,
                }
            )  # fmt: skip
            print(line(rows[-1]), flush=True)
            if pictures is not None and name == "tv":
                picture(case, ours(lam), theirs(bart_lam), pictures)
    return rows


def picture(case: Case, ours: Tensor, theirs: Tensor, folder: Path) -> None:
    """Both images, and how far apart they are."""
    panels = [plots.Panel(title="tunemri tv", image=ours[0]), plots.Panel(title="bart tv", image=theirs[0])]
    reference = None if case.reference is None else case.reference[0]
    name = "".join(c if c.isalnum() else "-" for c in case.name)
    plots.strip(panels, reference).save(folder / f"{name}.png", dpi=80, overwrite=True)


def line(row: dict[str, object]) -> str:
    return (
        f"{row['case']:58} {row['method']:8} {row['iterations']:4d}   {row['error']:.4f} {row['bart_error']:.4f}   "
        f"{row['seconds']:7.3f} {row['bart_seconds']:7.3f}   "
        f"{row['lam']:.1e} {row['bart_lam']:.1e}   {'met' if row['met'] else 'NOT MET'}"
    )


def main() -> None:
    data = Path(os.environ.get("TUNEMRI_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=data / "bench/raw")
    parser.add_argument("-o", "--output", type=Path, help="write the rows as CSV")
    parser.add_argument("-p", "--pictures", type=Path, help="folder for a picture of each scan, ours beside BART's")
    parser.add_argument("--only", default="", metavar="WORD", help="files with this in their name")
    parser.add_argument("-m", "--method", action="append", choices=METHODS, help="repeatable; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if shutil.which("bart") is None:
        raise SystemExit("bart is not on the PATH (apt-get install bart)")
    rows: list[dict[str, object]] = []
    print(f"{'case':58} {'method':8} iterations  error (BART)   CPU s (BART)      lam (BART)")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.TunemriWarning)
        for case in cases(arguments.folder, arguments.only):
            rows += compare(case, arguments.pictures, arguments.method or list(METHODS))
    met = sum(bool(row["met"]) for row in rows)
    print(f"{met} of {len(rows)} met: neither error nor time is worse than BART's")
    if arguments.output and rows:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
