"""What a landscape costs beyond the forward passes that it cannot do without.

    python benchmarks/landscape.py

One thread, one 256×256 image, 4× Poisson disk, with range curve, far pair and a state file; a plain forward pass of the
main network follows every setting, so that a busy machine slows both alike. Prints the processor time of both, what is
done once per scan, and what that makes for 100×100 settings. Also how near the sketches' far pair comes to the exact one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tunemri import methods
from tunemri.evaluation import Case
from tunemri.landscape import landscape
from tunemri.masks import make_mask
from tunemri.methods import prepare, reconstruct
from tunemri.methods.hyperrecon import SingleWeight
from tunemri.operators import encoding
from tunemri.simulate import phantom, simulate

THRESHOLDS = tuple(0.25 * i for i in range(61))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="hyper-brain", help="a HyperRecon")
    parser.add_argument("--points", type=int, default=60, help="settings to measure")
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = methods.load(options.model)
    dial = next(iter(model.dials))
    plain = SingleWeight(main=model.arguments["main"]).eval()
    shape = (options.size, options.size)
    scan, truth = simulate(phantom(shape)[None], mask=make_mask("poisson", shape, 4.0), noise=0.005)
    case = Case(name="phantom", scan=scan, reference=truth)
    ready = prepare(scan)
    y, A = ready.kspace, encoding(ready)
    passes: list[float] = []
    settings: list[float] = []
    mark = time.process_time()

    def follow(done: int, total: int) -> None:
        nonlocal mark
        settings.append(time.process_time() - mark)
        start = time.process_time()
        with torch.no_grad():
            plain(y, A)
        mark = time.process_time()
        passes.append(mark - start)

    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        found = landscape(
            model, [case], dials={dial: options.points}, thresholds=THRESHOLDS, progress=follow,
            file=Path(folder) / "state.safetensors",
        )  # fmt: skip
        whole = time.process_time() - begin - sum(passes)
    plain_cost = statistics.median(passes)
    cost = statistics.median(settings)
    once = max(whole - cost * options.points, 0.0)
    print(f"plain forward pass      {1000 * plain_cost:8.1f} ms")
    print(f"one setting             {1000 * cost:8.1f} ms   {cost / plain_cost:.3f} × plain")
    print(f"once per scan           {1000 * once:8.1f} ms   {once / plain_cost:.1f} plain passes (far pair included)")
    print(f"100 × 100 settings: {(cost * 10_000 + once) / (plain_cost * 10_000):.3f} × ten thousand plain passes")

    values = found.values[0]
    good = values >= values.quantile(0.9, interpolation="higher")
    images = [reconstruct(scan, model, **found.setting(int(i))).magnitude.flatten() for i in good.nonzero()]
    exact = float(torch.cdist(torch.stack(images), torch.stack(images)).max() / truth.abs().max())
    print(f"far pair: {found.far[0].distance:.5g}, brute force over {len(images)} good images {exact:.5g}")


if __name__ == "__main__":
    main()
