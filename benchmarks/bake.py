"""What a setting costs at run time: hypernetwork, baked network, plain network, side by side.

    python benchmarks/bake.py

One thread, 256×256, single coil, 4× Poisson disk; the three take turns, so that a busy machine slows all alike.
Prints the median processor time of each and its ratio to the plain network, and the largest difference
between the baked image and the hypernetwork's.
"""

from __future__ import annotations

import statistics
import time

import torch

import tunemri
from tunemri import methods
from tunemri.methods.hyperrecon import SingleWeight, bake
from tunemri.operators import Cartesian


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hyper = methods.load("hyper-brain")
    baked = bake(hyper, ssim=0.3)
    plain = SingleWeight(main=hyper.arguments["main"]).eval()
    A = Cartesian(tunemri.make_mask("poisson", (256, 256), 4)[None, None])
    y = A(torch.randn(1, 256, 256, dtype=torch.complex64))
    runs = {
        "plain": lambda: plain(y, A),
        "baked": lambda: baked(y, A),
        "hypernetwork": lambda: hyper(y, A, ssim=0.3),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(15):
            for name, run in runs.items():
                start = time.process_time()
                run()
                times[name].append(time.process_time() - start)
        apart = (runs["baked"]().image - runs["hypernetwork"]().image).abs().max()
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        print(f"{name:<14} {1000 * value:7.1f} ms   {value / median['plain']:.3f} × plain")
    print(f"largest difference between baked and hypernetwork: {float(apart):.1e}")


if __name__ == "__main__":
    main()
