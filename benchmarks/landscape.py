"""What a landscape costs beyond the forward passes that it cannot do without; and whether a model does what it is asked.

    python benchmarks/landscape.py
    python benchmarks/landscape.py consistency --data $TUNEMRI_DATA -o runs/consistency

`speed`: one thread, one 256×256 image, 4× Poisson disk, with range curve, far pair and a state file; a plain forward pass of the
main network follows every setting, so that a busy machine slows both alike. Prints the processor time of both, what is
done once per scan, and what that makes for 100×100 settings. Also how near the sketches' far pair comes to the exact one.

`consistency`: validation images, brought to `--size` by a crop of k-space, under three masks. For each weighting of the losses
that can be asked for: which setting serves it best, what the one that was asked for loses against it, whether beyond
chance (95 %, paired over scans), and how much there is to lose. Writes matrix.csv and consistency.png.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tunemri import methods, plots
from tunemri.datasets import load_images
from tunemri.evaluation import Case, write_csv
from tunemri.fourier import crop, fft2, ifft2
from tunemri.landscape import landscape, self_consistency
from tunemri.masks import make_mask
from tunemri.methods import prepare, reconstruct
from tunemri.methods.hyperrecon import SingleWeight
from tunemri.operators import encoding
from tunemri.simulate import phantom, simulate

THRESHOLDS = tuple(0.25 * i for i in range(61))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("speed", "consistency"), default="speed")
    parser.add_argument("-m", "--model", default="hyper-brain", help="a HyperRecon")
    parser.add_argument("--points", type=int, help="settings; default 60, of consistency 9")
    parser.add_argument("--size", type=int, help="default 256, of consistency 128")
    parser.add_argument("--data", type=Path, help="folder with val/, of consistency")
    parser.add_argument("--sources", default="openms,ixi")
    parser.add_argument("--limit", type=int, default=3, help="images per source and mask, of consistency")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/consistency"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.what == "speed":
        speed(options.model, options.points or 60, options.size or 256)
    elif options.data is None:
        parser.error("consistency needs --data")
    else:
        consistency(options)


def speed(name: str, points: int, size: int) -> None:
    model = methods.load(name)
    dial = next(iter(model.dials))
    plain = SingleWeight(main=model.arguments["main"]).eval()
    shape = (size, size)
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
            model, [case], dials={dial: points}, thresholds=THRESHOLDS, progress=follow,
            file=Path(folder) / "state.safetensors",
        )  # fmt: skip
        whole = time.process_time() - begin - sum(passes)
    plain_cost = statistics.median(passes)
    cost = statistics.median(settings)
    once = max(whole - cost * points, 0.0)
    print(f"plain forward pass      {1000 * plain_cost:8.1f} ms")
    print(f"one setting             {1000 * cost:8.1f} ms   {cost / plain_cost:.3f} × plain")
    print(f"once per scan           {1000 * once:8.1f} ms   {once / plain_cost:.1f} plain passes (far pair included)")
    print(f"100 × 100 settings: {(cost * 10_000 + once) / (plain_cost * 10_000):.3f} × ten thousand plain passes")

    values = found.values[0]
    good = values >= values.quantile(0.9, interpolation="higher")
    images = [reconstruct(scan, model, **found.setting(int(i))).magnitude.flatten() for i in good.nonzero()]
    exact = float(torch.cdist(torch.stack(images), torch.stack(images)).max() / truth.abs().max())
    print(f"far pair: {found.far[0].distance:.5g}, brute force over {len(images)} good images {exact:.5g}")


def consistency(options: argparse.Namespace) -> None:
    model, points = methods.load(options.model), options.points or 9
    dial = next(iter(model.dials))
    settings = [{dial: i / (points - 1)} for i in range(points)]
    cases = list(_cases(options, options.size or 128))
    found = self_consistency(model, cases, settings)
    print(
        f"{options.model}: {len(cases)} scans, {points} settings; the one that was asked for is best in {found.wins:.0%} of the "
        f"rows, and beaten beyond chance in {float(found.beaten.double().mean()):.0%}"
    )
    print("asked    best   it loses of what there is to lose")
    for i, setting in enumerate(settings):
        best, lost, spread = int(found.loss[i].argmin()), 100 * float(found.regret[i]), 100 * float(found.spread[i])
        print(
            f"{setting[dial]:5.3f}   {settings[best][dial]:5.3f}   {lost:6.3f} %   of {spread:6.3f} %  ({lost / spread:5.1%})"
            f"{'  beaten beyond chance' if found.beaten[i] else ''}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "matrix.csv", found.records(), overwrite=True)
    plots.consistency(found).save(options.output / "consistency.png", overwrite=True)


def _cases(options: argparse.Namespace, size: int) -> Iterator[Case]:
    for source, planes in load_images(options.data / "val", options.sources.split(",")).items():
        for m, (mask, acceleration) in enumerate((("poisson", 4.0), ("poisson", 8.0), ("cartesian-random", 4.0))):
            for i in range(options.limit):
                whole = planes[(2 * (m + 3 * i) + 1) * len(planes) // (6 * options.limit)]
                shape = (min(size, whole.shape[0]), min(size, whole.shape[1]))
                x = ifft2(crop(fft2(whole.to(torch.complex64)), shape)) * (shape[0] * shape[1] / whole.numel()) ** 0.5
                scan, truth = simulate(x[None], mask=make_mask(mask, shape, acceleration, seed=i), noise=0.01, seed=i)
                yield Case(name=f"{source} {mask} {i}", scan=scan, reference=truth)


if __name__ == "__main__":
    main()
