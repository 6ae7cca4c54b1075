"""Does a method keep its head? Its images under changes that it was not made for, beside CG-SENSE and TV in the same run.

    python benchmarks/stability.py [--data $TUNEMRI_DATA/val] [--limit 2] [-m hyper-brain …] [-o FILE.csv] [--quick]
    python benchmarks/stability.py --arithmetic [-m hyper-brain …] [-o FILE.csv]

Brain images, four coils with their true maps, Poisson disk 4×, noise 0.5 % of the maximum; each method with a dial `lam`
gets its best one on these very scans. Then, always at that setting:

    more samples      PSNR at nested masks of 8 ⊂ 6 ⊂ 4 ⊂ 3 ⊂ 2 ⊂ 1: the largest loss from one to the next
    mask family       PSNR under families that the others were not tuned on, and lines along the other axis
    noise             PSNR at 2, 4 and 8 times the noise
    inserted detail   a disk of 15 % of the maximum and of radius 1.5 to 3 pixels: share of its contrast that arrives,
                      and the largest change of the image away from it, over that contrast
    perturbation      κ = (‖R(y + δ) − R(y)‖ / ‖R(y)‖) / (‖δ‖ / ‖y‖) at ‖δ‖ = 1 % of ‖y‖, for the worst δ that power
                      iterations on the Jacobian find, and for a random one
    data              ‖A x̂ − y‖ over what the noise alone would leave

With `--arithmetic`, instead: how far the image moves, ‖x − x′‖ / ‖x‖, when nothing changes but the order or the
precision of sums, as it does from one machine to another: a second run, two threads instead of one, the last bit of each
sample drawn anew, and all in double precision. This is what a GPU does to an image, too, as far as it can be told
without one.

Without data the embedded sample is taken. Sources: V. Antun et al., "On instabilities of deep learning in image
reconstruction" (2020); M. Genzel, J. Macdonald, M. März, "Solving inverse problems with deep neural networks –
robustness included?" (2022).
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunemri import evaluation, methods
from tunemri.datasets import load_images
from tunemri.evaluation import Case, Contestant
from tunemri.fourier import crop, fft2, ifft2
from tunemri.masks import MASKS, make_mask
from tunemri.methods import Reconstructor, prepare, reconstruct
from tunemri.metrics import psnr
from tunemri.operators import LinearOperator, encoding
from tunemri.scan import Scan
from tunemri.simulate import sample, simulate

RATIOS = (8.0, 6.0, 4.0, 3.0, 2.0, 1.0)
FAMILIES = ("cartesian-random", "cartesian-equispaced", "radial", "spiral", "gaussian", "random")
RADII = (1.5, 2.0, 2.5, 3.0)
NOISE = 0.005


def resized(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """The central part of the k-space of images `(B, H, W)`: the same field of view on fewer pixels, maximum 1."""
    y = ifft2(crop(fft2(x.to(torch.complex64)), shape)).abs()
    return y / y.amax((1, 2), keepdim=True)


def scan_of(x: Tensor, mask: Tensor, *, coils: int = 4, noise: float = NOISE, seed: int = 0) -> tuple[Scan, Tensor]:
    """A scan of images with its true maps, so that methods differ in nothing but themselves."""
    return simulate(x, mask=mask, coils=coils, noise=noise, seed=seed, store_maps=coils > 1)


def nested(shape: tuple[int, int], ratios: Sequence[float] = RATIOS, seed: int = 0) -> Iterator[tuple[float, Tensor]]:
    """(acceleration, mask): points of variable density, those of each mask among those of the next."""
    h, w = shape
    y, x = ((torch.arange(n) - n // 2) / n for n in shape)
    radius = (y[:, None].square() + x.square()).sqrt()
    generator = torch.Generator().manual_seed(seed)
    # Points in the order of an exponential clock that runs slower outside, after a centre that all share.
    order = torch.empty(shape).exponential_(generator=generator) * (1 + (radius / 0.15).square())
    order[(y.abs() <= 4.5 / h)[:, None] & (x.abs() <= 4.5 / w)] = 0
    ranked = order.flatten().argsort()
    for ratio in ratios:
        mask = torch.zeros(h * w)
        mask[ranked[: round(h * w / ratio)]] = 1
        yield ratio, mask.reshape(shape)


def image_of(scan: Scan, at: Contestant) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings outside training: that is the point
        return reconstruct(scan, at.model, **at.dials).image


def with_disk(x: Tensor, centre: tuple[int, int], radius: float, contrast: float = 0.15) -> tuple[Tensor, Tensor]:
    """The images with a disk added (`contrast` in units of the maximum), and its coverage of each pixel."""
    h, w = x.shape[-2:]
    fine = (torch.arange(8) + 0.5) / 8 - 0.5
    rows = (torch.arange(h)[:, None] - centre[0] + fine).flatten()
    columns = (torch.arange(w)[:, None] - centre[1] + fine).flatten()
    inside = (rows[:, None].square() + columns.square() <= radius**2).float()
    cover = inside.reshape(h, 8, w, 8).mean((1, 3))
    return x + contrast * x.abs().max() * cover, cover


def kept_contrast(
    x: Tensor, mask: Tensor, at: Contestant, centre: tuple[int, int], radius: float, **options: Any
) -> tuple[float, float]:
    """(share of a disk's contrast in the image, largest change elsewhere over the contrast): same noise with and without."""
    changed, cover = with_disk(x, centre, radius)
    options = {"seed": 3, **options}
    noise = options.pop("noise", NOISE) * float(x.abs().max())
    images, truths = [], []
    for picture in (x, changed):
        # The noise of `simulate` is relative to the maximum, which the disk may raise.
        scan, truth = scan_of(picture, mask, noise=noise / float(picture.abs().max()), **options)
        images.append(image_of(scan, at).abs()[0])
        truths.append(truth.abs()[0])
    delta, true = images[1] - images[0], truths[1] - truths[0]
    core = cover > 0.5
    h, w = cover.shape
    far = (torch.arange(h)[:, None] - centre[0]).square() + (torch.arange(w) - centre[1]).square() > (radius + 4) ** 2
    return float(delta[core].mean() / true[core].mean()), float(delta[far].abs().max() / true[core].mean())


def gains(scan: Scan, at: Contestant, *, size: float = 0.01, steps: int = 8, seed: int = 0) -> tuple[float, float]:
    """(κ for the worst perturbation found, κ for a random one) on measured samples, see above."""
    ready = prepare(scan)
    y, A = ready.kspace[:1], encoding(ready).sample(0)
    at.model.eval()
    dials = {**at.model.suggest(y, A), **at.dials}
    measure: Callable[[Tensor], Tensor] = lambda data: at.model(data, A, **dials).image  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator) * (y != 0)
    with torch.no_grad():
        plain = measure(y)
    found = []
    for step in range(steps + 1):
        delta = (size * y.norm() / direction.norm() * direction).detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            change = measure(y + delta) - plain
        found.append(float(change.detach().norm() / plain.norm()) / size)
        if step < steps:
            # The gradient of ½‖R(y + δ) − R(y)‖² is Jᴴ J δ to first order: a power iteration.
            direction = torch.autograd.grad(change.abs().square().sum(), delta)[0] * (y != 0)
    return max(found), found[0]


def misfit(scan: Scan, at: Contestant) -> float:
    """‖A x̂ − y‖ / (σ √M): 1 where what is left of M samples is as large as their noise."""
    ready = prepare(scan)
    assert scan.noise_std is not None
    assert scan.mask is not None
    left = (encoding(ready)(image_of(scan, at)) - scan.kspace).norm()
    return float(left / (scan.noise_std * math.sqrt(float(scan.mask.expand_as(scan.kspace.real).sum()))))


def tuned(contestant: Contestant, scans: Sequence[tuple[Scan, Tensor]], points: int = 7) -> Contestant:
    """The contestant at its best `lam` for these scans, if it has that dial and it is free."""
    if "lam" not in contestant.model.dials or "lam" in contestant.dials:
        return contestant
    cases = [Case(name=str(i), scan=scan, reference=truth) for i, (scan, truth) in enumerate(scans)]
    best = evaluation.tune(cases, contestant.model, dial="lam", points=points, rounds=2)
    return replace(contestant, dials={**contestant.dials, **best.dials})


def judge(at: Contestant, images: Sequence[Tensor], *, quick: bool = False) -> dict[str, Any]:
    """One row of the table, means over the images (worst for losses and gains)."""
    shape = (images[0].shape[-2], images[0].shape[-1])
    h, w = shape
    base = make_mask("poisson", shape, 4)
    row: dict[str, Any] = {"method": at.name, **at.dials}

    def mean(scans: Sequence[tuple[Scan, Tensor]]) -> float:
        return sum(psnr(image_of(scan, at).abs(), truth.abs()) for scan, truth in scans) / len(scans)

    row["psnr"] = mean([scan_of(x, base) for x in images])
    curve = [mean([scan_of(x, mask) for x in images]) for _, mask in nested(shape)]
    row |= {f"R={ratio:g}": value for ratio, value in zip(RATIOS, curve, strict=True)}
    row["largest loss"] = max(a - b for a, b in zip(curve, curve[1:], strict=False))
    for name in FAMILIES[: 2 if quick else None]:
        row[name] = mean([scan_of(x, make_mask(name, shape, 4)) for x in images])
    lines = make_mask("cartesian-random", (w, h), 4).T.contiguous()
    row["other axis"] = mean([scan_of(x, lines) for x in images])
    for times in (2, 4, 8):
        row[f"noise ×{times}"] = mean([scan_of(x, base, noise=times * NOISE) for x in images])
    centres = [(h // 2 + dy, w // 2 + dx) for dy, dx in ((-h // 8, w // 8), (h // 6, -w // 10))]
    for radius in RADII[:: 2 if quick else 1]:
        pairs = [kept_contrast(x, base, at, centre, radius) for x in images for centre in centres]
        row[f"disk {radius:g}"] = sum(kept for kept, _ in pairs) / len(pairs)
        row["ghost"] = max(row.get("ghost", 0.0), *(ghost for _, ghost in pairs))
    found = [gains(scan_of(x, base)[0], at, steps=4 if quick else 10) for x in images]
    row |= {"κ worst": max(a for a, _ in found), "κ random": max(b for _, b in found)}
    row["residual / noise"] = max(misfit(scan_of(x, base)[0], at) for x in images)
    return row


def arithmetic(at: Contestant, scan: Scan) -> dict[str, Any]:
    """One row: the relative change of the image of the first slice under other roundings; "" where it means nothing."""
    ready = prepare(scan)
    y, A, more = ready.kspace[:1], encoding(ready).sample(0), at.model.knows(ready, 0)
    dials = {**at.model.suggest(y, A), **at.dials}

    @torch.no_grad()
    def image(data: Tensor = y, operator: LinearOperator = A, model: Reconstructor = at.model) -> Tensor:
        return model(data, operator, **dials, **more).image

    one = image()

    def change(other: Tensor) -> float:
        return float((other - one).norm() / one.norm())

    row: dict[str, Any] = {"method": at.name, "again": change(image())}
    torch.set_num_threads(2)
    row["two threads"] = change(image())
    torch.set_num_threads(1)
    last = 2.0**-24 * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    row["last bit"] = change(image(y * (1 + last)))
    row["double"] = ""
    if "mmse" not in dials.values():  # draws of another precision are other draws
        assert ready.mask is not None
        fine = replace(
            ready, kspace=ready.kspace.to(torch.complex128), mask=ready.mask.double(),
            csm=None if ready.csm is None else ready.csm.to(torch.complex128),
        )  # fmt: skip
        row["double"] = change(image(fine.kspace[:1], encoding(fine).sample(0), copy.deepcopy(at.model).double()))
    return row


def pictures(folder: Path | None, limit: int, shape: tuple[int, int]) -> tuple[list[Tensor], str]:
    """Images on a grid of `shape`, and where they are from."""
    if folder is None:
        return [resized(sample()[1], shape)], "the embedded sample"
    found = [
        x
        for planes in load_images(folder, ("openms", "ixi")).values()
        for x in planes[:: max(1, len(planes) // limit)][:limit]
    ]
    return [resized(x[None], shape) for x in found if min(x.shape) >= max(shape)], f"{folder.name}"


def contestants(names: Sequence[str]) -> list[Contestant]:
    return [Contestant(name=name, model=methods.load(name)) for name in names]


def estimates(at: Contestant) -> list[Contestant]:
    """The contestant once for each kind of image that it can give: the most probable one, the mean."""
    kinds = at.model.dials["estimate"].choices if "estimate" in at.model.dials else ()
    return [replace(at, name=f"{at.name} {kind}", dials={"estimate": kind}) for kind in kinds] or [at]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table, one column per method."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    width = max(13, *(len(row["method"]) + 2 for row in rows))
    for name in names:
        cells = [row.get(name, "") for row in rows]
        print(f"{name:22}" + "".join(f"{c:>{width}.3g}" if isinstance(c, float) else f"{c:>{width}}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a split of the shared data: its brain images")
    parser.add_argument("--limit", type=int, default=2, help="images per source")
    parser.add_argument("--size", type=int, default=128, help="rows and columns")
    parser.add_argument("-m", "--model", action="append", help="default: every bundled model")
    parser.add_argument("-o", "--output", type=Path, help="also as CSV")
    parser.add_argument("--arithmetic", action="store_true", help="other roundings instead of other data")
    parser.add_argument("--quick", action="store_true", help="fewer masks, radii and power iterations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert set(FAMILIES) <= set(MASKS)
    shape = (options.size, options.size)
    images, where = pictures(options.data, options.limit, shape)
    base = [scan_of(x, make_mask("poisson", shape, 4)) for x in images]
    rows = []
    for contestant in contestants(["zero-filled", "sense", "tv", "wavelet", *(options.model or methods.bundled())]):
        if options.arithmetic:
            rows += [arithmetic(at, base[0][0]) for at in estimates(contestant)]
        else:
            rows.append(judge(tuned(contestant, base), images, quick=options.quick))
        print(f"{contestant.name}: done", flush=True)
    print(f"\n{len(images)} images of {where}, {shape[0]}×{shape[1]}")
    show(rows)
    if options.output:
        evaluation.write_csv(options.output, rows, overwrite=True)


if __name__ == "__main__":
    main()
