"""Images on disk → training and test examples: subject-wise splits, retrospective undersampling, augmentation.

k-space made here from images is simulated, and whatever was trained or scored on it says so.
"""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import coils as coil_methods
from . import errors, files, formats
from . import masks as patterns
from .fourier import crop, fft2, ifft2, pad
from .operators import LinearOperator, encoding
from .scan import Scan, normalise
from .simulate import coil_maps

__all__ = ["SOURCES", "Example", "Sampler", "load_images", "sampling_mask", "subjects"]

_SUFFIXES = (
    ".h5",
    ".hdf5",
    ".nii",
    ".nii.gz",
    ".npy",
    ".npz",
    ".mat",
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".cfl",
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training batch, normalised.

    Arguments:
        y: measured data `(B, C, H, W)`.
        A: its operator.
        target: ground truth, complex `(B, H, W)`, or None.
        noise_std: standard deviation of the complex noise in y (√E|n|²), `(B,)`, or None: unknown.
        upper: a second batch, of other images, for methods whose training is a problem in two levels.
    """

    y: Tensor
    A: LinearOperator
    target: Tensor | None = None
    noise_std: Tensor | None = None
    upper: Example | None = None


def _planes(z: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(z["img"].astype(np.float32))


def _openms(z: dict[str, np.ndarray]) -> list[np.ndarray]:
    volumes = [v for k, v in z.items() if not k.endswith(("_z", "_zooms"))]
    return [plane for volume in volumes for plane in volume.astype(np.float32)]


# File of the shared data folder → the magnitude or complex images in it; see the datasheet there for sources and licences.
SOURCES: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], list[np.ndarray]]]] = {
    "openms": ("openms_t1_t2_flair.npz", _openms),
    "ixi": ("ixi_pd_u8.npz", _planes),
    "cardiac": ("cardiac_cine_u16.npz", _planes),
    "oasis": ("oasis_t1_labels.npz", _planes),
    "knee": ("knee_pd_fse_u8pair.npz", lambda z: list(np.hypot(*z["absri"].astype(np.float32).transpose(1, 0, 2, 3)))),
    "siat": (
        "siat_t2_complex.npz",
        lambda z: list((z["ri"][:, 0].astype(np.float32) + 1j * z["ri"][:, 1]).astype(np.complex64)),
    ),
}


def load_images(folder: str | Path, sources: Sequence[str] = ()) -> dict[str, list[Tensor]]:
    """Images by source, each `(H, W)` real or complex and divided by its own 99.5th percentile.

    Arguments:
        folder: a split of the shared data (`…/train`, `…/val`) with `sources`, or any folder of readable
            images or scans with a reference, which is then one source. k-space without one is left out, with a warning.
        sources: names in SOURCES.

    Raises:
        BadOption: an unknown source. UnreadableFile: a source's file is not in the folder. NoData: no image.
    """
    folder = Path(folder)
    found: dict[str, list[Tensor]] = {}
    for name in sources:
        if name not in SOURCES:
            raise errors.BadOption(f"found {name!r}", key="data.sources", help=errors.did_you_mean(name, SOURCES))
        filename, planes = SOURCES[name]
        files.check(folder / filename)
        try:
            with open(folder / filename, "rb") as f, np.load(f, allow_pickle=False) as z:
                found[name] = [torch.from_numpy(np.ascontiguousarray(p)) for p in planes(dict(z))]
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise errors.UnreadableFile(
                f"not the images of {name} ({error})", file=folder / filename, help="copy or download it again"
            ) from error
    if not sources:
        if not folder.is_dir():
            raise errors.UnreadableFile("not a folder", file=folder, key="data.folder")
        found[folder.name] = _readable(sorted(p for p in folder.iterdir() if p.name.endswith(_SUFFIXES)))
    images = {name: [scaled for p in planes if (scaled := _scaled(p)) is not None] for name, planes in found.items()}
    if not any(images.values()):
        raise errors.NoData("no image found", file=folder, key="data", help=f"readable: {' '.join(_SUFFIXES)}")
    return images


def subjects(folder: str | Path, images: Mapping[str, Sequence[Tensor]]) -> dict[str, list[str]]:
    """Whose image each one is: slices of one subject are not independent, see `evaluation.paired`.

    Arguments:
        folder, images: as given to and as returned by `load_images`.

    Returns:
        for every source one name per image, from the folder's MANIFEST.csv; "" where that does not list the source.

    Raises:
        UnreadableFile: the manifest lists another number of images.
    """
    manifest = Path(folder) / "MANIFEST.csv"
    listed: dict[str, list[str]] = {}
    if manifest.is_file():
        with manifest.open(newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                listed.setdefault(row.get("file") or "", []).append(row.get("subject") or "")
    found = {}
    for source, planes in images.items():
        # A folder of one's own may hold a manifest of its own.
        names = listed.get(SOURCES[source][0], [""] * len(planes)) if source in SOURCES else [""] * len(planes)
        if len(names) != len(planes):
            raise errors.UnreadableFile(
                f"lists {len(names)} images of {source}, found {len(planes)}", file=manifest, help="copy it again"
            )
        found[source] = names
    return found


def _readable(paths: Sequence[Path]) -> list[Tensor]:
    """The images of all files, but for those that hold k-space alone."""
    images: list[Tensor] = []
    left_out = []
    for path in paths:
        try:
            images += formats.read_image(path, prefer="reference").data
        except (errors.MissingKey, errors.UnsupportedLayout) as error:
            if "k-space" not in error.what:
                raise
            left_out.append(path.name)
    if left_out:
        errors.warn(
            f"{len(left_out)} of {len(paths)} files hold k-space without a reference, left out: {', '.join(left_out)}"
        )
    return images


def sampling_mask(
    name: str, shape: tuple[int, int], acceleration: float, seed: int, options: Mapping[str, Any] | None = None
) -> Tensor:
    """A mask `(H, W)` by the name of its family, or from a file of zeros and ones.

    Raises:
        BadOption: no such family, or options for a file; what `make_mask` and `read_mask` raise.
    """
    if name in patterns.MASKS | patterns.TASKS or not Path(name).exists():
        return patterns.make_mask(name, shape, acceleration, seed=seed, **(options or {}))
    if options:
        raise errors.BadOption("a mask from a file takes no options", key=next(iter(options)))
    return formats.read_mask(Path(name), shape)


def _scaled(x: Tensor) -> Tensor | None:
    level = torch.quantile(x.abs().flatten().double(), 0.995)
    return None if level <= 0 else x / level.to(x.real.dtype)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws training batches: a random image, resolution, contrast, phase, coils, noise and mask for each sample.

    Step n of a run with seed s is always the same batch, whatever came before: that makes resuming exact.

    Arguments:
        images: by source, as from `load_images`; sources are drawn in proportion to the root of their size.
        batch: samples per step.
        size: edge of the square training matrix, in pixels.
        sizes: several instead, step after step in turn, with as many samples as have about as many pixels.
        masks: families in `masks.MASKS` or `masks.TASKS`, equally often; name one twice to draw it twice as often.
        acceleration: `(lo, hi)`, drawn log-uniformly.
        noise: `(lo, hi)` standard deviation of the noise over the image maximum, log-uniform; a quarter of the
            samples has none, unless lo = hi.
        coils: largest number of coils; half of the batches have one coil.
        bank: number of masks of each family, and of coil arrays, made beforehand (a Poisson disk takes longer than a step).
        seed: of the mask bank and of the run.
        ratios: sampling ratios instead of `acceleration`: sample b of a batch has the b-th of them, and round again,
            so that every batch holds every task.
        varied: masks differ in more than acceleration: options of their family, direction, mirrored. False: a network for one
            protocol, masks as `make_mask` makes them.
        upper: samples per step for the upper level of a bilevel problem, from the last fifth of each source, which the
            other samples then never see.
    """

    images: dict[str, list[Tensor]]
    batch: int = 8
    size: int = 128
    sizes: Sequence[int] = ()
    masks: Sequence[str] = tuple(patterns.MASKS)
    acceleration: tuple[float, float] = (2.0, 10.0)
    noise: tuple[float, float] = (0.001, 0.03)
    coils: int = 8
    bank: int = 48
    seed: int = 0
    ratios: Sequence[float] = ()
    varied: bool = True
    upper: int = 0

    def __post_init__(self) -> None:
        lo, hi = self.acceleration
        if not 1 <= lo <= hi or not 0 < self.noise[0] <= self.noise[1] or min(self.batch, self.coils, self.bank) < 1:
            found = {k: getattr(self, k) for k in ("acceleration", "noise", "batch", "coils", "bank")}
            raise errors.BadOption(f"found {found}, expected positive numbers and ascending ranges", key="data")
        if not all(0 < ratio <= 1 for ratio in self.ratios) or (self.ratios and self.bank % len(self.ratios)):
            raise errors.BadOption(
                f"found {list(self.ratios)}, expected ratios in (0, 1], and a bank that is a multiple of their number",
                key="data.ratios",
            )
        if self.upper < 0 or (self.upper and not any(_upper(v) for v in self.images.values())):
            raise errors.BadOption(
                f"found {self.upper}, expected 0, or enough images to hold some back", key="data.upper"
            )
        if self.size < 16:
            raise errors.BadOption(f"found {self.size}, expected at least 16", key="data.size")
        others = [
            replace(self, size=n, sizes=(), batch=max(1, round(self.batch * (self.size / max(1, n)) ** 2)))
            for n in self.sizes
        ]
        object.__setattr__(self, "_others", others)
        generator = torch.Generator().manual_seed(self.seed)
        bank = []
        for name in self.masks:
            for index in range(self.bank if name != "full" else 1):
                acceleration = _log_uniform(lo, hi, generator)
                if self.ratios:
                    acceleration = 1 / self.ratios[index % len(self.ratios)]
                options = _varied(name, self.size, acceleration, generator) if self.varied else {}
                bank.append(patterns.make_mask(name, (self.size, self.size), acceleration, seed=index, **options))
        object.__setattr__(self, "_bank", torch.stack(bank))
        sets = self.bank if self.coils > 1 else 1
        maps = [coil_maps((self.size, self.size), self.coils, seed=self.seed + index) for index in range(sets)]
        object.__setattr__(self, "_coils", torch.stack(maps))

    @property
    def domain(self) -> dict[str, Any]:
        """What a model trained on these batches has seen, in the terms of `Reconstructor.outside`."""
        bank: Tensor = self._bank  # type: ignore[attr-defined]
        c, sizes = self.size // 2, self.sizes or (self.size,)
        return {
            "acceleration": [1 / max(self.ratios), 1 / min(self.ratios)] if self.ratios else list(self.acceleration),
            # Convolutions carry over to other sizes; how far was measured on 256², see the README.
            "size": [min(sizes) // 2, 4 * max(sizes)],
            "coils": self.coils,
            "noise": list(self.noise),
            "block": all(name in patterns.TASKS for name in self.masks),
            "centre": float(bank[:, c - 2 : c + 3, c - 2 : c + 3].mean((1, 2)).amin()),
        }

    def __call__(self, step: int, rank: int = 0) -> Example:
        """The batch of a step (and, in distributed training, of a rank)."""
        if others := self._others:  # type: ignore[attr-defined]
            one: Example = others[step % len(others)](step, rank)
            return one
        # Three numbers into one seed, far apart, so that no two steps or ranks share a stream.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1009 + rank)
        if not self.upper:
            return self._batch(self.batch, self.images, generator)
        lower, upper = ({k: part for k, v in self.images.items() if (part := cut(v))} for cut in (_lower, _upper))
        example = self._batch(self.batch, lower, generator)
        return replace(example, upper=self._batch(self.upper, upper, generator))

    def _batch(self, batch: int, images: Mapping[str, list[Tensor]], generator: torch.Generator) -> Example:
        coils = 1 if _uniform(0, 1, generator) < 0.5 else _integer(2, max(self.coils, 2), generator)
        coils = min(coils, self.coils)
        x = torch.stack([self._image(images, generator) for _ in range(batch)])
        mask = torch.stack([self._mask(b, generator) for b in range(batch)])[:, None]
        y_full = fft2(x[:, None])
        if coils > 1:
            maps = torch.stack([self._maps(coils, generator) for _ in range(batch)])
            y_full = fft2(maps * x[:, None])
        levels = torch.tensor([self._noise(generator) for _ in range(batch)]) * x.abs().amax((1, 2))
        noise = torch.randn(y_full.shape, dtype=torch.complex64, generator=generator)
        kspace = (y_full + levels[:, None, None, None] * noise) * mask
        # Half of the multi-coil batches learn with maps estimated from the measured centre, as at the scanner.
        if coils > 1 and _uniform(0, 1, generator) < 0.5:
            estimated = coil_methods.low_resolution_maps(kspace, mask)
            x = (estimated.conj() * maps).sum(1) * x
            maps = estimated
        scan = Scan(
            kspace=kspace, mask=mask, csm=maps if coils > 1 else None, image_shape=(self.size, self.size),
            provenance="simulated: training",
        )  # fmt: skip
        ready = normalise(scan)
        assert ready.scale is not None
        scale = ready.scale.to(torch.float32)
        return Example(y=ready.kspace, A=encoding(ready), target=x / scale[:, None, None], noise_std=levels / scale)

    def _image(self, images: Mapping[str, list[Tensor]], generator: torch.Generator) -> Tensor:
        weights = torch.tensor([math.sqrt(len(v)) for v in images.values()])
        pool = list(images.values())[int(torch.multinomial(weights, 1, generator=generator))]
        x = pool[_integer(0, len(pool) - 1, generator)]
        x = _resolution(x, self.size, generator)
        x = _turned(x, generator)
        magnitude = x.abs()
        if _uniform(0, 1, generator) < 0.3:
            magnitude = _contrast(magnitude, generator)
        if _uniform(0, 1, generator) < 0.3:
            magnitude = _without_air(magnitude)
        phase = x.angle() + smooth_phase(self.size, generator)
        return torch.polar(magnitude, phase)

    def _mask(self, b: int, generator: torch.Generator) -> Tensor:
        bank: Tensor = self._bank  # type: ignore[attr-defined]
        index = _integer(0, len(bank) - 1, generator)
        if count := len(self.ratios):
            # The nearest mask of the ratio that is this sample's turn; a family's bank holds whole rounds of ratios.
            index = index - index % count + b % count
        mask = bank[index]
        if not self.varied:
            return mask
        if _uniform(0, 1, generator) < 0.5:
            mask = mask.T
        # Mirroring about index N // 2 of an even size needs a shift by one to keep DC in place.
        if _uniform(0, 1, generator) < 0.5:
            mask = mask.flip(0).roll(1 - self.size % 2, 0)
        if _uniform(0, 1, generator) < 0.5:
            mask = mask.flip(1).roll(1 - self.size % 2, 1)
        return mask

    def _maps(self, coils: int, generator: torch.Generator) -> Tensor:
        bank: Tensor = self._coils  # type: ignore[attr-defined]
        maps = bank[_integer(0, len(bank) - 1, generator)][torch.randperm(self.coils, generator=generator)[:coils]]
        return maps / maps.abs().square().sum(0).sqrt()

    def _noise(self, generator: torch.Generator) -> float:
        level = _log_uniform(*self.noise, generator)
        none = _uniform(0, 1, generator) < 0.25 and self.noise[0] < self.noise[1]
        return 0.0 if none else level


def _lower(images: list[Tensor]) -> list[Tensor]:
    return images[: len(images) - len(images) // 5]


def _upper(images: list[Tensor]) -> list[Tensor]:
    return images[len(images) - len(images) // 5 :]


def _varied(name: str, size: int, acceleration: float, generator: torch.Generator) -> dict[str, float]:
    """Options of a mask family, half of the time away from its defaults: scanners differ in more than acceleration."""
    if _uniform(0, 1, generator) < 0.5:
        return {}
    share = _uniform(0.15, 0.5, generator)
    # The calibration block must leave samples for the rest.
    block = max(4, min(24, int(size / math.sqrt(1.5 * acceleration))))
    ranges: dict[str, dict[str, float]] = {
        "poisson": {"order": _uniform(1, 6, generator), "calibration": _integer(4, block, generator)},
        "cartesian-random": {"center_fraction": share / acceleration},
        "cartesian-equispaced": {"center_fraction": share / acceleration},
        "gaussian": {"width": _uniform(0.15, 0.3, generator)},
        "spiral": {"interleaves": _integer(2, 12, generator)},
    }
    return ranges.get(name, {})


def smooth_phase(size: int, generator: torch.Generator) -> Tensor:
    """A background phase in rad `(size, size)`: offset, ramp of up to 1.5 turns an axis, smooth field, a little texture.

    The spread of the smooth part is drawn between 10 and 100 degrees, as measured on raw scans.
    """
    axis = torch.linspace(-0.5, 0.5, size)
    ramp = (torch.rand(2, generator=generator) * 2 - 1) * 1.5 * 2 * math.pi * _uniform(0, 1, generator)
    spread = math.radians(_uniform(10, 100, generator))
    phase = ramp[0] * axis[:, None] + ramp[1] * axis + _uniform(0, 2 * math.pi, generator)
    for knots, share in ((4, 1.0), (12, 0.05)):
        field = torch.randn(1, 1, knots, knots, generator=generator)
        phase = phase + spread * share * F.interpolate(field, (size, size), mode="bicubic", align_corners=True)[0, 0]
    return phase


def _resolution(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A `(size, size)` part of the image at a random, coarser resolution (a central part of its k-space)."""
    # The image as it is, half of the time: coarser ones are harder than most that anybody will bring.
    smallest = min(1.0, size / min(x.shape))
    factor = _uniform(smallest, 1.0, generator) if _uniform(0, 1, generator) < 0.5 else 1.0
    shape = [max(size if n >= size else 1, round(n * factor)) for n in x.shape]
    if shape != list(x.shape):
        k = crop(fft2(x.to(torch.complex64)), shape)
        x = ifft2(k) * math.sqrt(shape[0] * shape[1] / (x.shape[0] * x.shape[1]))
    if min(x.shape) < size:
        x = pad(x, [max(n, size) for n in x.shape])
    # Windows near the centre more often: the rim is mostly air.
    top, left = (round((n - size) * (_uniform(0, 1, generator) + _uniform(0, 1, generator)) / 2) for n in x.shape)
    return x[top : top + size, left : left + size]


def _turned(x: Tensor, generator: torch.Generator) -> Tensor:
    turn = _integer(0, 7, generator)
    x = torch.rot90(x, turn % 4, (0, 1))
    return x.T if turn >= 4 else x


def _contrast(magnitude: Tensor, generator: torch.Generator) -> Tensor:
    """Another contrast from the same anatomy: a random smooth intensity curve that keeps air dark."""
    top = magnitude.amax().clamp(min=1e-6)
    knots = torch.rand(5, generator=generator) * 1.2
    if _uniform(0, 1, generator) < 0.8:
        knots = knots.sort().values  # monotone more often than not
    curve = torch.cat((torch.zeros(1), knots))
    position = (magnitude / top * 5).clamp(0, 4.999)
    low = position.long()
    return top * torch.lerp(curve[low], curve[low + 1], position - low)


def _without_air(magnitude: Tensor) -> Tensor:
    """Exact zeros around the object, as in skull-stripped or masked images."""
    smooth = F.avg_pool2d(magnitude[None, None], 9, stride=1, padding=4)[0, 0]
    return magnitude * (smooth > 0.15 * smooth.amax())


def _uniform(lo: float, hi: float, generator: torch.Generator) -> float:
    return lo + (hi - lo) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _log_uniform(lo: float, hi: float, generator: torch.Generator) -> float:
    return math.exp(_uniform(math.log(lo), math.log(hi), generator))


def _integer(lo: int, hi: int, generator: torch.Generator) -> int:
    return int(torch.randint(lo, hi + 1, (), generator=generator))
