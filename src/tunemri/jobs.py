"""One scan from its file to the file of its reconstruction: part by part, with its record, here or on a worker.

Torch is imported inside the functions: the command line names what is here before it knows that there is work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import console, errors, files, texts

if TYPE_CHECKING:
    from torch import Tensor

    from .evaluation import Case, Contestant
    from .scan import Geometry, Reconstruction, Scan

__all__ = ["Asked", "Job", "Source", "check", "contestant_of", "digest_of", "done_before", "load", "run"]

_MISFIT = 3.0  # times the noise: what methods leave at settings that they suggest is below, see benchmarks/stability.py
_PART = 2**26  # bytes of k-space that are read and reconstructed at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What `recon` is asked to do with every scan; plain values, for the workers of a cluster."""

    model: str
    earlier: str
    settings: tuple[str, ...]
    csm: str
    reference: Path | None
    slices: str | None
    seed: int
    extrapolate: bool
    device: str
    overwrite: bool
    model_sha256: str | None = None

    @property
    def contestant(self) -> Contestant:
        """The method with its setting, loaded once."""
        return contestant_of(self)


@functools.lru_cache(maxsize=2)
def contestant_of(asked: Asked) -> Contestant:
    """The method that is asked for, on its device; workers check that they see the same weights."""
    texts.check_device(asked.device)
    earlier = json.loads(asked.earlier).get("dials", {})
    contestant = texts.contestant(asked.model, earlier, list(asked.settings), asked.extrapolate)
    if asked.model_sha256 not in (None, texts.model_hash(contestant.name)):
        raise errors.WrongModel(
            "not the weights that were named", file=asked.model, key="cluster", help="workers must see the same files"
        )
    contestant.model.to(asked.device)
    return contestant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One scan of `recon`."""

    scan: Path
    target: Path
    asked: Asked


def check(scan: Path, target: Path, overwrite: bool) -> None:
    """Refuse what could not be written, before any work."""
    from . import formats

    texts.check_output(target, scan, overwrite)
    formats.check_writable(target, overwrite=overwrite)


def run(job: Job) -> dict[str, Any]:
    """Reconstruct one scan, some of its slices at a time, and write it with its record."""
    import itertools

    import torch

    from . import formats
    from .fourier import crop
    from .scan import joined, without_image

    asked, scan, target = job.asked, job.scan, job.target
    chosen, earlier = asked.contestant, json.loads(asked.earlier)
    check(scan, target, asked.overwrite)
    hashes = {"scan": files.sha256(files.check(scan)), "model": texts.model_hash(chosen.name)}
    for what, digest in hashes.items():
        if earlier.get(f"{what}_sha256", digest) != digest:
            errors.warn(f"the {what} is not the one of the sidecar: the image will differ", "note")
    torch.manual_seed(asked.seed)  # for each scan, so that it does not depend on those before it
    parts: list[_Slices] = []
    compared: list[tuple[Tensor, Tensor]] = []

    def made() -> Iterator[Reconstruction]:
        for part in _in_parts(scan, asked):
            # What is judged stays until the end, because a metric belongs to a whole volume; all else can go.
            if part.truth is not None:
                compared.append((crop(part.out.image, part.truth.shape[-2:]), part.truth))
            parts.append(dataclasses.replace(part, out=without_image(part.out), truth=None))
            yield part.out

    pieces: Iterator[Reconstruction] = made()
    pieces = itertools.chain([next(pieces)], pieces)  # a scan that is at fault is refused before anything is written
    total = parts[0].total
    with files.write_with_record(target, overwrite=asked.overwrite) as folder:
        result = folder / target.name
        notes = formats.write_pieces(result, pieces, slices=total, geometry=parts[0].geometry)
        out = joined([part.out for part in parts])
        scores = _scores(*(torch.cat(side) for side in zip(*compared, strict=True))) if compared else {}
        if out.status != "converged":
            errors.warn(f"{scan}: not converged: {out.status}")
        over = out.stats.get("residual_over_noise")
        if over and max(over) > _MISFIT and chosen.model.dials:  # without a dial nobody asked for a fit
            errors.warn(
                f"{scan}: the image misses the data by {max(over):.2g} times their noise: a strong setting, or wrong coil maps"
            )
        facts = {
            "ok": True, "out": str(target), "out_sha256": files.sha256(result), "scan": str(scan), "scan_sha256": hashes["scan"],
            "model": chosen.name, "model_sha256": hashes["model"], "dials": dict(out.dials), "csm": asked.csm,
            "slice": asked.slices, "seed": asked.seed, "extrapolate": asked.extrapolate, "device": asked.device,
            "shape": [total, *out.image.shape[1:]], "coils": parts[0].coils, "provenance": out.provenance,
            "acceleration": total / sum(part.slices / part.acceleration for part in parts),
            "scale": out.stats.get("scale"), "certificate": out.stats.get("certificate"), "chains": out.stats.get("chains"),
            "residual": None if out.residual is None else float(out.residual.mean()), "residual_over_noise": over,
            "status": out.status, "metrics": scores, "seconds": sum(part.seconds for part in parts), **notes,
        }  # fmt: skip
        console.sidecar(result, facts, overwrite=False)
    return facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Slices:
    """Some slices of a scan, reconstructed, and what the record says of them; `total`: how many there are in all."""

    out: Reconstruction
    truth: Tensor | None
    geometry: Geometry
    total: int
    slices: int
    coils: int
    acceleration: float
    seconds: float


def _in_parts(scan: Path, asked: Asked) -> Iterator[_Slices]:
    """The reconstruction of a scan in parts of `_PART` bytes of k-space, where its file can be read so.

    A part for which memory does not suffice is halved: no slice depends on its neighbours. Maps or a reference from
    another file keep a scan whole: which of their slices belongs to which is told by counting all.
    """
    from . import formats
    from .coils import MAPS

    shape = formats.volume_shape(scan) if asked.csm in MAPS and asked.reference is None else None
    parts, total, dark = [range(0)], None, 0  # one part: all that is asked for
    if shape is not None and (rows := range(shape[0])[texts.as_slice(asked.slices) or slice(None)]):
        total = len(rows)
        parts = _split(rows, max(1, _PART // (8 * shape[1] * shape[2] * shape[3])))
    while parts:
        some, part = parts[0], None
        slices = asked.slices if len(some) in (0, total) else f"{some.start}:{some.stop}"
        try:
            part = _one_part(scan, asked, slices, dark, total)
        except errors.NoMemory as error:
            if len(some) <= 1:
                error.file = error.file or scan
                raise
        if part is None:  # not in the handler, which holds on to what did not fit
            half = (len(some) + 1) // 2
            errors.warn(f"{scan}: not enough memory for {len(some)} slices at a time: going on with {half}")
            parts = [piece for longer in parts for piece in _split(longer, half)]
            continue
        dark += 0 if bool(part.out.image.any()) else part.slices
        del parts[0]
        yield part
        del part  # not beside the next one


def _split(rows: range, size: int) -> list[range]:
    return [rows[k : k + size] for k in range(0, len(rows), size)]


def _one_part(scan: Path, asked: Asked, slices: str | None, dark: int, total: int | None) -> _Slices:
    """Some slices, read and reconstructed; `dark`: how many of the `total` before them held no signal."""
    import time

    import torch

    from .methods import reconstruct
    from .scan import Reconstruction

    chosen = asked.contestant
    data, truth = load(scan, slices, asked.csm, asked.reference, joint=True)
    start = time.perf_counter()
    if bool(data.kspace.any()) or dark + len(data) == (total or len(data)):
        way = "joint" if asked.csm == "joint" else "auto"  # other maps are in the scan by now
        with _watched(chosen.model):
            out = reconstruct(
                data.to(asked.device), chosen.model, csm=way, extrapolate=asked.extrapolate, **chosen.dials
            )
        out = dataclasses.replace(out, image=out.image.cpu())
    else:
        # No signal in these slices, as at the ends of a volume: they have no image. All of them dark are refused above.
        image, ones = torch.zeros((len(data), *data.image_shape), dtype=torch.complex64), torch.ones(len(data))
        out = Reconstruction(image=image, residual=0 * ones, stats={"scale": ones.tolist()}, provenance=data.provenance)
    return _Slices(
        out=out, truth=truth, geometry=data.geometry, total=total or len(data), slices=len(data), coils=data.coils,
        acceleration=data.acceleration, seconds=time.perf_counter() - start,
    )  # fmt: skip


@contextmanager
def _watched(model: Any) -> Iterator[None]:
    """Shows how many draws are made. From the first on, Ctrl-C ends them and keeps what there is; once more ends the command."""
    if not hasattr(model, "watch"):
        yield
        return
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        signal.signal(signal.SIGINT, before)
        console.say("keeping what was drawn; Ctrl-C once more ends without it")

    with console.progress("draws") as bar:

        def watch(done: int, total: int) -> bool:
            bar(done, total)
            if not asked and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, ask)
            return bool(asked)

        model.watch = watch
        try:
            yield
        finally:
            model.watch = None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)


def done_before(scan: Path, target: Path, asked: Asked) -> dict[str, Any] | None:
    """The record of an output that is there, whole, and just what is asked for; None where it is to be made.

    Raises:
        BadOption: it was made of something else.
    """
    record = console.sidecar_path(target)
    if not target.exists() or not record.exists():
        return None
    facts = texts.read_sidecar(record)
    chosen = asked.contestant
    wanted = {
        "out_sha256": files.sha256(target), "scan_sha256": files.sha256(scan), "model": chosen.name,
        "model_sha256": texts.model_hash(chosen.name), "dials": {**facts["dials"], **chosen.dials}, "csm": asked.csm,
        "slice": asked.slices, "seed": asked.seed, "extrapolate": asked.extrapolate,
    }  # fmt: skip
    differs = [name for name, value in console.plain(wanted).items() if facts.get(name) != value]
    if differs:
        raise errors.BadOption(
            f"made with another {', '.join(differs)}", file=target, key="resume", help="--overwrite, or another folder"
        )
    return facts


def _scores(image: Tensor, truth: Tensor) -> dict[str, float]:
    """The metrics that can be had; SSIM needs a few pixels."""
    from .metrics import score

    found: dict[str, float] = {}
    for name in ("psnr", "ssim", "nmse", "mae", "hfen"):
        try:
            found |= score(image, truth, [name])
        except errors.UnsupportedLayout as error:
            errors.warn(f"no {name}: {error.what}")
    return found


def load(
    path: Path, slices: str | None, csm: str, reference: Path | None, *, joint: bool = False
) -> tuple[Scan, Tensor | None]:
    """A scan with coil maps, and its ground truth where one is named or lies in the file itself.

    Arguments:
        joint: the maps may be left out, for they are found with the image.
    """
    from . import coils, formats
    from .methods import prepare

    cut = texts.as_slice(slices)
    scan = formats.read(path, slices=cut)
    if scan.coils > 1 or csm not in coils.MAPS:
        if csm in coils.MAPS:
            # Estimated here, once, for all that is done with this scan.
            scan = dataclasses.replace(scan, csm=prepare(scan, csm=csm).csm) if scan.csm is None else scan
        elif csm != "joint":
            scan = _with_maps(scan, csm, cut)
        elif scan.csm is None and scan.coils > 1 and not joint:
            raise errors.BadOption(
                "maps are found with an image, so each setting would have its own", key="csm",
                help="only `tunemri recon` does it; here auto, espirit, nlinv, walsh, low-resolution or a file",
            )  # fmt: skip
    truth = (
        formats.read_reference(path, slices=cut)
        if reference is None
        else formats.read_image(reference, slices=None, prefer="reference").data
    )
    if truth is not None and reference is not None and cut is not None and len(truth) != len(scan):
        truth = truth[cut]
    if (
        truth is not None
        and reference is not None
        and (len(truth) != len(scan) or any(a > b for a, b in zip(truth.shape[1:], scan.image_shape, strict=True)))
    ):
        raise errors.InconsistentShapes(
            f"found {tuple(truth.shape)}, the reconstruction is {(len(scan), *scan.image_shape)}",
            file=reference,
            key="reference",
        )
    return scan, truth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A scan by its name: what a worker of a cluster reads it of."""

    scan: Path
    slices: str | None
    csm: str
    reference: Path | None
    digests: tuple[str | None, ...]

    def __call__(self) -> Case:
        from .evaluation import Case

        for path, digest in zip((self.scan, self.reference, Path(self.csm)), self.digests, strict=True):
            if path is not None and digest_of(path) != digest:
                raise errors.UnreadableFile(
                    "not the file that was named", file=path, key="cluster", help="workers must see the same files"
                )
        data, truth = load(self.scan, self.slices, self.csm, self.reference)
        return Case(name="scan", scan=data, reference=truth)


def digest_of(path: Path | None) -> str | None:
    """SHA-256 of a file; None where there is none."""
    return files.sha256(path) if path is not None and path.is_file() else None


def _with_maps(scan: Scan, csm: str, cut: slice | None) -> Scan:
    """The scan with the coil maps of a file."""
    from . import coils, formats

    path = formats.resolve(Path(csm))
    if not csm.strip() or not path.exists():
        raise errors.BadOption(f"found {csm!r}, no such file", key="csm", help=errors.did_you_mean(csm, coils.MAPS))
    maps = formats.read_maps(path)
    maps = maps[cut] if cut is not None and len(maps) > len(scan) else maps
    try:
        return dataclasses.replace(scan, csm=maps.to(scan.kspace.dtype))
    except errors.TunemriError as error:
        error.file = path
        raise
