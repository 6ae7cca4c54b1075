"""Every raw scan of a folder through every method that needs no training and the bundled ones: a page to look at.

    python benchmarks/gallery.py [FOLDER] [-o gallery.html] [-m METHOD …]

FOLDER defaults to bench/raw of TUNEMRI_DATA (or of shared/data beside the checkout). Scans are what `tunemri.read`
takes; companions of `.cfl` files are not scans of their own. What to look for: anatomy as the data set describes it,
nothing wrapped around, the same side left in every format; and small numbers in the first table, which a flip or a
shift would bring near one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tunemri
from tunemri import errors, formats, methods, plots, report
from tunemri.fourier import crop

METHODS = ("zero-filled", "sense", "tv", "wavelet", "hyper-brain")
SUFFIXES = (".h5", ".mrd", ".cfl", ".npy")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A scan, its images and what was said about it."""

    file: Path
    info: dict[str, object]
    images: dict[str, Tensor]
    seconds: dict[str, float]
    said: list[str]


def scans(folder: Path) -> list[Path]:
    """Files that hold k-space."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES]
    return [p for p in found if not p.stem.endswith(("_traj", "_maps", "_mask"))]


def show(file: Path, names: list[str]) -> Shown:
    """One slice, the first, by every method that takes the scan."""
    said: list[str] = []
    images, seconds = {}, {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        info = formats.inspect(file)
        scan = tunemri.read(file, slices=slice(0, 1))
        ready = methods.prepare(scan)
        for name in names:
            model = methods.load(name)
            start = time.perf_counter()
            try:
                images[name] = methods.reconstruct(ready, model).image[0].abs()
            except errors.TunemriError as error:
                said.append(f"{name}: {error}")
                continue
            seconds[name] = time.perf_counter() - start
    said += dict.fromkeys(str(w.message) for w in caught if isinstance(w.message, errors.TunemriWarning))
    return Shown(file=file, info=info, images=images, seconds=seconds, said=said)


def section(shown: Shown) -> report.Picture:
    panels = [plots.Panel(title=name, image=image, metrics={}) for name, image in shown.images.items()]
    shape = "×".join(str(n) for n in shown.info["image_shape"])  # type: ignore[attr-defined]
    facts = (
        f"{shown.info['format']}; {shown.info['content']}; {shown.info['slices']} slices of {shape}, "
        f"{shown.info['coils']} coils, acceleration {shown.info['acceleration']:.2f}. First slice. "
        + ", ".join(f"{name} {s:.1f} s" for name, s in shown.seconds.items())
    )
    return report.Picture(
        title=shown.file.name, png=plots.strip(panels).png(dpi=110), caption=" ".join([facts, *shown.said])
    )


def twins(all_shown: list[Shown], name: str) -> list[list[str]]:
    """How far an image is from the reference in its file, and from that of a file that begins alike and holds as much."""
    rows = [["file", "against", "relative difference"]]
    for i, a in enumerate(all_shown):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.TunemriWarning)
            reference = formats.read_reference(a.file, slices=slice(0, 1))
        others = [] if reference is None else [("its own reference", reference[0].abs())]
        alike = [b for b in all_shown[i + 1 :] if b.file.name.split("_")[:2] == a.file.name.split("_")[:2]]
        others += [(b.file.name, b.images[name]) for b in alike if b.info["acceleration"] == a.info["acceleration"]]
        for title, y in others:
            x = crop(a.images[name], y.shape)
            # Images are shown in units of their own scale.
            rows.append([a.file.name, title, f"{float((x / x.norm() - y / y.norm()).norm()):.2g}"])
    return rows


def main() -> None:
    data = Path(os.environ.get("TUNEMRI_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=data / "bench/raw")
    parser.add_argument("-o", "--output", type=Path, default=Path("gallery.html"))
    parser.add_argument("-m", "--method", action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.method or list(METHODS)
    shown = []
    for file in scans(arguments.folder):
        shown.append(show(file, names))
        print(f"{file.name}: {', '.join(shown[-1].images)}", flush=True)
    rows = twins(shown, names[0])
    tables = (
        [
            report.Table(
                title="Against the reference in the file, and the same scan in another format", rows=rows, words=2
            )
        ]
        if len(rows) > 1
        else []
    )
    report.report(
        arguments.output,
        title="Raw scans",
        summary=f"{len(shown)} raw scans, {len(names)} methods: upright, centred, and alike in every format?",
        sections=[*tables, *(section(one) for one in shown)],
        provenance={"command": "python benchmarks/gallery.py", "tunemri": tunemri.__version__, "methods": names},
        overwrite=True,
    )
    print(*("  ".join(row) for row in rows), arguments.output, sep="\n")


if __name__ == "__main__":
    main()
