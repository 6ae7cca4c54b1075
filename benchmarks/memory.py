"""Peak memory against the number of slices, of the commands as a user calls them.

    python benchmarks/memory.py [--slices 16,128,512] [--size 128] [--coils 8]

Each line is one process: what it held at most (resident set, from the system), beside the size of the k-space.

    recon .h5     reads, reconstructs and writes some slices at a time
    recon .npy    reads and reconstructs some slices at a time, keeps the images
    sweep         holds the scan, and the images of all settings (here two)
    evaluate      holds the simulated scans of all images
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from tunemri import formats
from tunemri.masks import make_mask
from tunemri.simulate import phantom, simulate


def volume(path: Path, slices: int, size: int, coils: int) -> None:
    """A scan of many slices, written slice by slice: this process must not need what it is to measure."""
    shape = (size, size)
    scan, _ = simulate(phantom(shape)[None], mask=make_mask("cartesian-random", shape, 4), coils=coils, store_maps=True)
    formats.write(path, scan)
    with h5py.File(path, "r+") as f:
        one = f["kspace"][0]
        del f["kspace"]
        stack = f.create_dataset("kspace", (slices, *one.shape), one.dtype, chunks=(1, *one.shape))
        for b in range(slices):
            stack[b] = one * (1 + b / slices)


def images(folder: Path, count: int, size: int) -> None:
    folder.mkdir()
    np.save(folder / "images.npy", np.stack([phantom((size, size), seed=s).numpy() for s in range(count)]))


def peak(arguments: list[str], folder: Path) -> tuple[float, float]:
    """(MB held at most, seconds) of one command."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "tunemri", *arguments], cwd=folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"tunemri {' '.join(arguments)}: exit status {child.returncode}")
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", default="16,128,512")
    parser.add_argument("--size", type=int, default=128, help="rows and columns")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--commands", default="recon .h5,recon .npy,sweep,evaluate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {
        "recon .h5": ["recon", "v.h5", "-m", "zero-filled", "-o", "out.h5"],
        "recon .npy": ["recon", "v.h5", "-m", "zero-filled", "-o", "out.npy"],
        "sweep": ["sweep", "v.h5", "-m", "sense", "--grid", "lam=0.01,0.1", "-o", "swept"],
        "evaluate": ["evaluate", "-m", "zero-filled", "--data", "images", "--limit", "100000", "--masks", "random:4", "-o", "judged"],
    }  # fmt: skip
    print(f"{options.size}×{options.size}, {options.coils} coils (evaluate: one)")
    print(f"{'command':12} {'slices':>7} {'k-space MB':>11} {'peak MB':>9} {'seconds':>9}")
    for command in options.commands.split(","):
        for slices in map(int, options.slices.split(",")):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                coils = options.coils if command != "evaluate" else 1
                if command == "evaluate":
                    images(folder / "images", slices, options.size)
                else:
                    volume(folder / "v.h5", slices, options.size, coils)
                held, seconds = peak(known[command], folder)
            size = slices * coils * options.size**2 * 8 / 1e6
            print(f"{command:12} {slices:7d} {size:11.0f} {held:9.0f} {seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
