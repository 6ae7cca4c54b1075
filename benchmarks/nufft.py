"""The transform off the grid against bare FINUFFT, side by side, one thread; then the Gram operator, and BART on spokes.

    python benchmarks/nufft.py [--no-bart]

320×320, 96 spokes of 640 samples, 8 coils. Milliseconds are CPU time, least of 15, taken in turn; "bare" is a plan of
the same accuracy executed on numpy arrays that it is given, nothing else. Errors are against the exact sum, over
random samples, for a phantom and for white noise (the hardest image there is: its energy sits where rounded sample
positions matter most).

The comparison with `bart pics` is on simulated spokes: the weight with the lowest error of each from one grid, CPU time
of one solve, maps given to both.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported, and for BART

import argparse
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import finufft
import numpy as np
import torch
from torch import Tensor

from tunemri.methods.classical import Sense, TotalVariation, Wavelet
from tunemri.nufft import NUFFT
from tunemri.operators import NonCartesian
from tunemri.scan import Scan, normalise
from tunemri.simulate import coil_maps, phantom
from tunemri.trajectories import golden, radial

SIZE, SPOKES, COILS = 320, 96, 8
GRID = np.geomspace(3e-4, 0.1, 8)
METHODS = {  # -e: without it, FISTA of BART diverges off the grid
    "wavelet": (Wavelet, 100, lambda lam: ["-e", "-R", f"W:3:0:{lam:.6g}"]),
    "tv": (TotalVariation, 100, lambda lam: ["-R", f"T:3:0:{lam:.6g}"]),
    "sense": (Sense, 30, lambda lam: ["-l2", "-r", f"{lam:.6g}"]),
}


def milliseconds(*calls: Callable[[], object], repeats: int = 15) -> list[float]:
    """CPU time of each call, least of some rounds in which all take their turn."""
    rounds = []
    for _ in range(repeats):
        marks = [time.process_time()]
        for call in calls:
            call()
            marks.append(time.process_time())
        rounds.append(np.diff(marks))
    return [1e3 * float(t) for t in np.min(rounds, axis=0)]


def exact(x: Tensor, k: Tensor) -> Tensor:
    """The sum itself, in double precision."""
    kernels = []
    for axis, n in enumerate(x.shape[-2:]):
        phase = -2 * math.pi / n * k[:, axis].double()[:, None] * (torch.arange(n).double() - n // 2)
        kernels.append(torch.polar(torch.full_like(phase, n**-0.5), phase))
    return torch.einsum("mh,...hw,mw->...m", kernels[0], x.to(torch.complex128), kernels[1])


def transforms() -> None:
    shape, k = (SIZE, SIZE), radial((SIZE, SIZE), SPOKES)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(COILS, *shape, dtype=torch.complex64, generator=generator)
    object_ = torch.stack([phantom(shape, seed=c) for c in range(COILS)]).to(torch.complex64)
    some = torch.randperm(len(k), generator=generator)[:2000]
    print(
        f"{SIZE}×{SIZE}, {SPOKES} spokes of {2 * SIZE}, {COILS} coils       A ms  bare      Aᴴ ms  bare      error: phantom  noise"
    )
    points = (2 * math.pi * k.double() / SIZE).float().numpy().T.copy()
    for name, eps, backend in (
        ("finufft, as it comes (5e-5)", None, "finufft"),
        ("finufft, 1e-4", 1e-4, "finufft"),
        ("finufft, 1e-6", 1e-6, "finufft"),
        ("sparse matrices", None, "sparse"),
    ):
        start = time.process_time()
        A = NUFFT(k, shape, eps, backend)
        y = A(noise)
        A.adjoint(y)
        first = time.process_time() - start
        errors = [float((A(x)[:, some] - (e := exact(x, k[some]))).norm() / e.norm()) for x in (object_, noise)]
        if backend == "finufft":
            options = {"dtype": "complex64", "upsampfac": 2.0 if eps == 1e-6 else 1.25, "nthreads": 1}
            bare = []
            for kind, sign in ((2, -1), (1, 1)):
                bare.append(finufft.Plan(kind, shape, COILS, eps or 5e-5, sign, **options))
                bare[-1].setpts(*points)
            a, b, c, d = milliseconds(
                lambda A=A: A(noise),
                lambda p=bare[0]: p.execute(noise.numpy()),
                lambda A=A, y=y: A.adjoint(y),
                lambda p=bare[1], y=y: p.execute(y.numpy()),
            )
            times = f"{a:6.1f} {b:6.1f} {a / b:.2f}  {c:6.1f} {d:6.1f} {c / d:.2f}"
        else:
            a, c = milliseconds(lambda A=A: A(noise), lambda A=A, y=y: A.adjoint(y))
            times = f"{a:6.1f} {'':11}  {c:6.1f} {'':11}"
        print(f"{name:38} {times}   {errors[0]:.1e}  {errors[1]:.1e}   (first call of both {first:.2f} s)")


def gram() -> None:
    shape = (SIZE, SIZE)
    A = NonCartesian(radial(shape, SPOKES)[None], coil_maps(shape, COILS)[None].to(torch.complex64))
    x = phantom(shape)[None].to(torch.complex64)
    error = float((A.gram(x) - A.H(A(x))).norm() / A.H(A(x)).norm())
    quick, plain = milliseconds(lambda: A.gram(x), lambda: A.H(A(x)))
    print(f"AᴴA x by Toeplitz {quick:.1f} ms, by A and Aᴴ {plain:.1f} ms; they differ by {error:.1e}")


def write_cfl(path: Path, array: np.ndarray) -> None:
    """`array` in numpy order; BART counts axes from the fastest."""
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, array.shape[::-1])) + "\n")
    np.ascontiguousarray(array, np.complex64).tofile(path.with_suffix(".cfl"))


def against_bart(size: int = 192, spokes: int = 40, coils: int = 4) -> None:
    shape = (size, size)
    k, csm = golden(shape, spokes, readout=size), coil_maps(shape, coils)[None].to(torch.complex64)
    x = phantom(shape)[None].to(torch.complex64)
    y = NonCartesian(k[None], csm)(x)
    y = y + 0.01 * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    scan = normalise(Scan(kspace=y, trajectory=k[None], csm=csm, image_shape=shape, provenance="simulated"))
    assert scan.scale is not None
    truth, y = x.abs()[0] / float(scan.scale), scan.kspace
    print(f"\n{size}×{size}, {spokes} spokes, {coils} coils: measured acceleration {scan.acceleration:.2f}")
    print("method   iterations   NRMSE (BART)   CPU s (BART)   lam (BART)")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        trajectory = np.stack((k[:, 1], k[:, 0], np.zeros(len(k))), -1).reshape(spokes, size, 3)
        write_cfl(folder / "trajectory", trajectory)
        write_cfl(folder / "kspace", y[0].numpy().reshape(coils, spokes, size, 1))
        write_cfl(folder / "maps", csm[0].numpy()[:, None])
        for method, (kind, n, options) in METHODS.items():

            def ours(lam: float, kind=kind, n=n) -> Tensor:  # type: ignore[no-untyped-def]
                return kind(iterations=n, tolerance=0.0)(y, NonCartesian(k[None], csm), lam=lam).image[0].abs()

            def bart(lam: float, options=options, n=n) -> Tensor:  # type: ignore[no-untyped-def]
                files = [str(folder / name) for name in ("trajectory", "kspace", "maps", "image")]
                call = ["bart", "pics", "-w", "1", "-i", str(n), *options(lam), "-t", *files]
                subprocess.run(call, check=True, capture_output=True)
                return torch.from_numpy(np.fromfile(folder / "image.cfl", np.complex64).reshape(shape)).abs()

            found = [min((float((f(lam) - truth).norm() / truth.norm()), lam) for lam in GRID) for f in (ours, bart)]
            spent = []
            for f, (_, lam) in zip((ours, bart), found, strict=True):
                before = os.times()
                f(lam)
                spent.append(sum(os.times()[:4]) - sum(before[:4]))
            (error, lam), (bart_error, bart_lam) = found
            print(
                f"{method:8} {n:6d}       {error:.4f} {bart_error:.4f}   {spent[0]:6.2f} {spent[1]:6.2f}   "
                f"{lam:.1e} {bart_lam:.1e}", flush=True,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--no-bart", action="store_true", help="the transforms only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        transforms()
        gram()
        if arguments.no_bart or shutil.which("bart") is None:
            print("no comparison with bart (apt-get install bart)")
        else:
            against_bart()


if __name__ == "__main__":
    main()
