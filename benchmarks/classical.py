"""Classical methods against BART, in one run, on the same data, from the same grid of weights, one thread each.

    python benchmarks/classical.py [-o FILE.csv] [--quick]

For each method the weight with the lowest error of the magnitude image is taken from one grid (BART gets normalised
data and `-w 1`, so that both minimise the same function). CPU time is user plus system time of one solve at that
weight, the least of three. BART's includes starting the process and its files; "net" is without what a call of one
iteration takes. Maps are given to both. Then the operators against their plain form.

Images: one slice of the public test set where TUNEMRI_DATA (or shared/data beside the checkout) has it, otherwise
the embedded sample.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunemri.formats import read_image
from tunemri.masks import make_mask
from tunemri.methods.classical import Sense, TotalVariation, Wavelet
from tunemri.operators import Coils, Fourier, Mask, encoding
from tunemri.scan import Scan, normalise
from tunemri.simulate import coil_maps, sample, simulate

ITERATIONS = (30, 100)
GRID = np.geomspace(1e-4, 0.1, 13)
METHODS = {"wavelet": Wavelet, "tv": TotalVariation, "sense": Sense}
BART_OPTIONS = {
    "wavelet": lambda lam: ["-R", f"W:3:0:{lam:.6g}"],
    "tv": lambda lam: ["-R", f"T:3:0:{lam:.6g}"],
    "sense": lambda lam: ["-l2", "-r", f"{lam:.6g}"],
}


class Bart:
    """`bart pics` on one scan; files live in a temporary folder, in memory where the system has such a one."""

    def __init__(self, scan: Scan, folder: Path) -> None:
        self.folder, self.shape = folder, scan.image_shape
        maps = scan.csm if scan.csm is not None else torch.ones(1, 1, *scan.image_shape, dtype=torch.complex64)
        for name, array in (("kspace", scan.kspace), ("maps", maps)):
            # BART counts axes from the fastest: (columns, rows, 1, coils).
            c, h, w = array.shape[1:]
            (folder / f"{name}.hdr").write_text(f"# Dimensions\n{w} {h} 1 {c}\n")
            array.resolve_conj().numpy().astype(np.complex64).tofile(folder / f"{name}.cfl")

    def __call__(self, options: list[str], iterations: int) -> Tensor:
        files = [str(self.folder / name) for name in ("kspace", "maps", "image")]
        subprocess.run(
            ["bart", "pics", "-w", "1", "-i", str(iterations), *options, *files], check=True, capture_output=True
        )
        image = np.fromfile(self.folder / "image.cfl", np.complex64)
        return torch.from_numpy(image.reshape(1, *self.shape))


def cpu_seconds(solve: Callable[[], object], repeats: int = 3) -> float:
    """User and system time of this process and its children, the least of some runs."""
    spent = []
    for _ in range(repeats):
        before = os.times()
        solve()
        spent.append(sum(os.times()[:4]) - sum(before[:4]))
    return min(spent)


def nrmse(x: Tensor, reference: Tensor) -> float:
    return float((x.abs() - reference.abs()).norm() / reference.abs().norm())


def best(solve: Callable[[float], Tensor], reference: Tensor) -> tuple[float, float]:
    """(error, weight) of the best weight of the grid."""
    return min((nrmse(solve(float(lam)), reference), float(lam)) for lam in GRID)


def image(size: int) -> tuple[Tensor, str]:
    """A brain of size × size, maximum 1, and where it is from."""
    folder = Path(os.environ.get("TUNEMRI_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
    file = folder / "bench/ista_brain/brain_test_17.png"
    if file.exists():
        x, name = read_image(file).data, "ista_brain 17"
    else:
        x, name = sample()[1].abs(), "embedded sample"
    x = F.interpolate(x[None].float(), (size, size), mode="bicubic", antialias=True)[0].clamp(min=0)
    return x / x.max(), name


def compare(name: str, scan: Scan, target: Tensor, methods: tuple[str, ...]) -> list[dict[str, object]]:
    """One row per method and number of iterations."""
    scan = normalise(scan)
    assert scan.scale is not None
    reference = target / scan.scale[:, None, None].float()
    y, A = scan.kspace, encoding(scan)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        bart = Bart(scan, Path(folder))
        start = cpu_seconds(lambda: bart(["-l2", "-r", "0.1"], 1))
        for method in methods:
            for n in ITERATIONS:
                ours = METHODS[method](iterations=n, tolerance=0.0)
                options = BART_OPTIONS[method]
                error, lam = best(lambda lam, ours=ours: ours(y, A, lam=lam).image, reference)
                bart_error, bart_lam = best(lambda lam, n=n, options=options: bart(options(lam), n), reference)
                seconds = cpu_seconds(lambda ours=ours, lam=lam: ours(y, A, lam=lam))
                bart_seconds = cpu_seconds(lambda n=n, lam=bart_lam, options=options: bart(options(lam), n))
                rows.append(
                    {
                        "case": name, "method": method, "iterations": n,
                        "nrmse": error, "bart_nrmse": bart_error,
                        "seconds": seconds, "bart_seconds": bart_seconds, "bart_net": bart_seconds - start,
                        "lam": lam, "bart_lam": bart_lam,
                    }
                )  # fmt: skip
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, object]) -> str:
    # One in a thousand: what another order of summation in single precision may move.
    good = row["nrmse"] <= 1.001 * row["bart_nrmse"] and row["seconds"] <= row["bart_seconds"]  # type: ignore[operator]
    return (
        f"{row['case']:34} {row['method']:8} {row['iterations']:4d}   {row['nrmse']:.4f} {row['bart_nrmse']:.4f}   "
        f"{row['seconds']:7.3f} {row['bart_seconds']:7.3f} {row['bart_net']:7.3f}   "
        f"{row['lam']:.1e} {row['bart_lam']:.1e}   {'met' if good else 'MISSED'}"
    )


def operators(coils: int = 15, size: int = 320) -> None:
    """A and Aᴴ against shift-FFT-shift-mask, on the same numbers."""
    csm, mask = coil_maps((size, size), coils)[None], make_mask("poisson", (size, size), 4)[None, None]
    x = torch.randn(1, size, size, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    scan = Scan(kspace=torch.ones_like(csm) * mask, mask=mask, csm=csm, image_shape=(size, size))
    folded, plain = encoding(scan), Mask(mask) @ Fourier() @ Coils(csm)
    y = plain(x)
    assert float((folded(x) - y).norm() / y.norm()) < 1e-6
    print(f"\nCPU ms at {size}×{size}×{coils}, least of 15     ours   plain   ratio (bar: 0.5)")
    for name, a, b in (
        ("A x", lambda: folded(x), lambda: plain(x)),
        ("Aᴴ y", lambda: folded.adjoint(y), lambda: plain.adjoint(y)),
        ("AᴴA x", lambda: folded.gram(x), lambda: plain.gram(x)),
    ):
        # Turn and turn about, so that a busy moment of the machine hits both.
        times = np.array([[_milliseconds(a), _milliseconds(b)] for _ in range(15)]).min(0)
        print(f"{name:38} {times[0]:7.1f} {times[1]:7.1f}   {times[0] / times[1]:.2f}")


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("-o", "--output", type=Path, help="write the rows as CSV")
    parser.add_argument("--quick", action="store_true", help="30 iterations and every other weight only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        if shutil.which("bart") is None:
            print("bart is not on the PATH (apt-get install bart): no comparison with it")
        else:
            if arguments.quick:
                global ITERATIONS, GRID
                ITERATIONS, GRID = (30,), GRID[::2]
            print(f"{'case':34} {'method':8} iterations   NRMSE (BART)   CPU s (BART, net)   lam (BART)")
            for size, coils, family in ((256, 1, "poisson"), (320, 8, "poisson"), (320, 8, "cartesian-random")):
                x, source = image(size)
                mask = make_mask(family, (size, size), 4)
                scan, target = simulate(x, mask=mask, coils=coils, noise=0.01, store_maps=True)
                name = f"{size}² × {coils}, {family} {scan.acceleration:.2f}×"
                print(f"# {source}: {scan.provenance}")
                rows += compare(name, scan, target, ("wavelet", "tv", "sense") if coils > 1 else ("wavelet", "tv"))
        operators()
    if arguments.output and rows:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
