"""Every file format behind `read`, `read_image`, `write` and `inspect`; one module per format.

The bytes of a file decide which reader gets it (`files.sniff`), the suffix of an output which writer. A new format
is one module with the functions of `base.Format`, and one line in the tables below.

Whatever a library raises on a damaged file leaves this module as a `TunemriError` that names the file.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors, files
from ..fourier import crop, ifft2
from ..scan import Geometry, Reconstruction, Scan, check_finite, joined
from ..trajectories import readouts
from . import arrays, cfl, dicom, fastmri, images, ismrmrd, nifti
from .base import CSM_KEYS, IMAGE_KEYS, KSPACE_KEYS, Format, Image, complex_values, first_key, mask_tensor

__all__ = [
    "READERS",
    "WRITERS",
    "Image",
    "check_writable",
    "holds_scans",
    "inspect",
    "read",
    "read_either",
    "read_image",
    "read_maps",
    "read_mask",
    "read_noise",
    "read_reference",
    "volume_shape",
    "write",
    "write_pieces",
    "resolve",
]

READERS: dict[str, Format] = {
    "hdf5": fastmri,
    "ismrmrd": ismrmrd,
    "ismrmrd-stream": ismrmrd,
    "nifti": nifti,
    "dicom": dicom,
    "npy": arrays,
    "npz": arrays,
    "mat5": arrays,
    "mat73": arrays,
    "cfl": cfl,
    "png": images,
    "jpeg": images,
    "tiff": images,
}
"""What `_kind` calls a file → the module that reads it."""

Writer = Callable[[Path, Scan | Reconstruction | Image, Tensor | None, Geometry], dict[str, Any]]

WRITERS: dict[str, Writer] = {
    ".h5": fastmri.write,
    ".npy": arrays.write,
    ".nii": nifti.write,
    ".nii.gz": nifti.write,
    ".dcm": dicom.write,
    ".cfl": cfl.write,
    ".png": images.write,
}
"""Suffix of an output → the function that writes it."""

_SUFFIXES = {
    ".h5": "hdf5", ".hdf5": "hdf5", ".npy": "npy", ".npz": "npz", ".mat": "mat", ".nii": "nifti", ".gz": "nifti",
    ".dcm": "dicom", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff", ".tiff": "tiff",
}  # fmt: skip


def read(path: files.StrPath, *, slices: slice | None = None) -> Scan:
    """The scan in a file of any format.

    Arguments:
        slices: `slice(start, stop)` of the slices wanted; where the format allows, only these are read.

    Raises:
        TunemriError: every class of file error; see `errors`.
    """
    with _guard(path) as (p, reader):
        return reader.read_scan(p, slices)


def read_image(path: files.StrPath, *, slices: slice | None = None, prefer: str = "image") -> Image:
    """The image in a file of any format, `(B, H, W)`.

    Arguments:
        slices: as for `read`.
        prefer: where a file holds several, "image" takes what was reconstructed, "reference" what is held true.

    Raises:
        TunemriError: every class of file error; see `errors`.
    """
    if prefer not in ("image", "reference"):
        raise errors.BadOption(f"found {prefer!r}, expected 'image' or 'reference'", key="prefer")
    with _guard(path) as (p, reader):
        return reader.read_image(p, slices, prefer)


def read_either(path: files.StrPath, *, slices: slice | None = None, prefer: str = "scan") -> Scan | Image:
    """The scan in a file or, where it holds no k-space, the image; with `prefer` "image" the image, where there is one.

    Raises:
        TunemriError: as for `read`.
    """
    if prefer not in ("scan", "image"):
        raise errors.BadOption(f"found {prefer!r}, expected 'scan' or 'image'", key="prefer")
    if prefer == "image":
        try:
            return read_image(path, slices=slices)
        except (errors.MissingKey, errors.UnsupportedLayout):
            return read(path, slices=slices)
    try:
        return read(path, slices=slices)
    except (errors.MissingKey, errors.UnsupportedLayout) as no_scan:
        # The way out that readers name for an image: simulate a scan from it.
        if no_scan.help is None or "simulate" not in no_scan.help:
            raise
    return read_image(path, slices=slices)


_TRUE = ("target", "reconstruction_esc", "reconstruction_rss", "reference")


def read_reference(path: files.StrPath, *, slices: slice | None = None) -> Tensor | None:
    """The true image `(B, H, W)` that a file keeps beside its k-space, or None where it keeps none.

    Some undersampled files keep their zero-filled image under the name of the reference; it is told by comparing,
    and is no reference.

    Raises:
        TunemriError: as for `read_image`.
    """
    with _guard(path) as (p, reader):
        names = [row["name"] for row in reader.list_arrays(p)]
        if not any(name in _TRUE for name in names):
            return None
        x = reader.read_image(p, slices, "reference").data
        if not any(name in KSPACE_KEYS for name in names):
            return x
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.TunemriWarning)  # `read` has said it
            start = (slices.start if slices is not None else None) or 0
            scan = reader.read_scan(p, slice(start, start + 1 or None))
    if scan.acceleration > 1.05:
        rss = crop(ifft2(scan.kspace).abs().square().sum(1).sqrt(), x.shape[-2:])[0].double()
        first = x[0].abs().double()
        if rss.shape == first.shape and float((rss / rss.norm() - first / first.norm()).norm()) < 1e-3:
            errors.warn(f"{path}: its reference is the zero-filled image of the undersampled data: not used")
            return None
    return x


def read_mask(path: files.StrPath, shape: tuple[int, int]) -> Tensor:
    """A sampling mask from any file: 0 and 1 (in a picture: black and one grey), float32 of `shape` `(H, W)`.

    Raises:
        InconsistentShapes, UnsupportedLayout (other values), NoData (nothing sampled); and as for `read_image`.
    """
    with _guard(path) as (p, reader):
        values = reader.read_array(p, ("mask",))
        if reader is images:
            values = values / values.max()
        if values.ndim == 3 and len(values) == 1:
            values = values[0]
        mask = mask_tensor(values, (1, *shape), p)[0, 0].expand(shape).contiguous()
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise errors.UnsupportedLayout("values other than 0 and 1", key="mask", help="1 means sampled")
        if not bool(mask.any()):
            raise errors.NoData("selects no sample", key="mask")
        return mask


def read_maps(path: files.StrPath) -> Tensor:
    """Coil sensitivity maps from any file, complex `(B or 1, C, H, W)`; three axes are one slice's `(C, H, W)`.

    Raises:
        MissingKey: several arrays and none with a name for maps; UnsupportedLayout (real, other axes); and as for `read`.
    """
    with _guard(path) as (p, reader):
        names = [row["name"] for row in reader.list_arrays(p)]
        if first_key(CSM_KEYS, names) is None and (other := first_key((*KSPACE_KEYS, *IMAGE_KEYS), names)) is not None:
            raise errors.MissingKey(
                f"holds {other!r} and no coil maps",
                key="csm",
                help=f"they would be called {', '.join(CSM_KEYS[:3])}, …",
            )
        values = cfl.read_maps(p) if reader is cfl else reader.read_array(p, CSM_KEYS)
        if (content := arrays.recorded_content(p)) is not None:
            raise errors.MissingKey(f"holds {_CONTENT[content]}, no coil maps", key="csm")
        values = complex_values(values, p, "csm")
        if values.ndim not in (3, 4):
            raise errors.UnsupportedLayout(f"found shape {values.shape}, expected (coils, rows, columns)", key="csm")
        maps = torch.from_numpy(np.ascontiguousarray(values if values.ndim == 4 else values[None]))
        check_finite(maps, "csm")
        level = maps.abs().square().sum(1).sqrt()
        if bool(level.any()) and float(level[level > 0].median()) < 0.02 * float(level.max()):
            errors.warn(
                f"{path}: csm: half of it lies below 2 % of its maximum: is this k-space, not coil maps?",
                "unsupported_layout",
            )
        return maps


_CONTENT = {"k-space": "k-space", "complex": "an image", "magnitude": "an image"}


def read_noise(path: files.StrPath) -> Tensor | None:
    """Samples of a noise measurement, complex `(C, N)`, or None where the file has none.

    Their covariance is that of the noise in the k-space that `read` gives (before averaging): what prewhitening needs.

    Raises:
        TunemriError: as for `read`.
    """
    with _guard(path) as (p, reader):
        noise = ismrmrd.read_noise(p) if reader is ismrmrd else None
        return None if noise is None else torch.from_numpy(noise)


@contextmanager
def _guard(path: files.StrPath) -> Iterator[tuple[Path, Format]]:
    """The reader of a file; what it raises is turned into an error that names the file."""
    try:
        p = files.check(resolve(Path(path)))
        with files.check_unchanged(p), _libraries_silenced():
            yield p, _reader(p)
    except errors.TunemriError as e:
        e.file = e.file if e.file is not None else path
        raise
    except Warning:  # somebody turned warnings into errors
        raise
    except PermissionError as e:
        raise errors.UnreadableFile("no permission to read it", file=path, exit_code=3) from e
    except RecursionError as e:
        raise errors.UnreadableFile("damaged: nested too deeply", file=path) from e
    except Exception as e:  # h5py, nibabel, scipy and pillow raise some twenty kinds on damaged files
        if errors.lacks_memory(e):
            raise errors.NoMemory("not enough memory to read it", file=path, help="read fewer slices") from e
        reason = " ".join(str(e).split())[:160] or type(e).__name__
        raise errors.UnreadableFile(f"damaged: {reason}", file=path, help="copy or download it again") from e


@contextmanager
def _libraries_silenced() -> Iterator[None]:
    """What the libraries have to say about a file reaches nobody; what counts, we say ourselves."""
    loggers = [
        logging.getLogger(name) for name in ("nibabel.global", "PIL.TiffImagePlugin", "PIL.PngImagePlugin", "pydicom")
    ]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(PIL|scipy|nibabel|h5py|numpy|pydicom)\b")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def resolve(path: Path) -> Path:
    """The file that a name stands for: BART names a pair of files without suffix, or by either half."""
    # `os.path` answers where a name is too long or no name, `Path` would raise.
    if path.suffix == ".hdr" or (path.suffix != ".cfl" and not os.path.exists(path)):
        candidate = path.with_suffix(".cfl") if path.suffix == ".hdr" else path.parent / (path.name + ".cfl")
        return candidate if path.name and os.path.isfile(candidate) else path
    return path


def _kind(path: Path) -> str:
    """The kind by content; HDF5 is two formats, told apart by what is in it."""
    kind = files.sniff(path)
    return "ismrmrd" if kind == "hdf5" and ismrmrd.matches(path) else kind


def _reader(path: Path) -> Format:
    kind = _kind(path)
    promised = _SUFFIXES.get(path.suffix.lower())
    if kind not in READERS:
        raise _refusal(kind, path, promised)
    if promised is not None and not kind.startswith(promised) and kind != "ismrmrd":
        errors.warn(f"{path}: named {path.suffix} but holds {kind}; read as {kind}")
    return READERS[kind]


def _refusal(kind: str, path: Path, promised: str | None) -> errors.TunemriError:
    if kind in ("html", "xml", "text"):
        looks = {"html": "HTML", "xml": "XML", "text": "plain text"}[kind]
        hint = "failed download?" if kind != "text" else "expected a data file"
        return errors.UnreadableFile(f"looks like {looks}: {hint}", file=path, help="look into it, download it again")
    if kind == "pickle":
        return errors.UnsafeContent(
            "a Python pickle, which could run code when loaded", file=path, help="save numbers as .npy or .h5"
        )
    if kind == "safetensors":
        return errors.UnsupportedLayout("holds weights of a model, not a scan", file=path, help="give it to -m")
    if kind in ("zip", "gzip") and promised is None:
        return errors.UnsupportedLayout(f"a {kind} archive", file=path, help="unpack it first")
    wanted = f"{promised} as its name says" if promised else "one of " + ", ".join(READERS)
    return errors.UnreadableFile(
        f"damaged or of an unknown kind, expected {wanted}", file=path, help="copy or download it again"
    )


def _suffix(path: files.StrPath) -> str:
    name = Path(path).name.lower()
    suffix = next((s for s in sorted(WRITERS, key=len, reverse=True) if name.endswith(s)), None)
    if suffix is None:
        raise errors.BadOption(
            f"no format for the suffix {Path(path).suffix!r}", file=path, help=f"known: {', '.join(WRITERS)}"
        )
    return suffix


def holds_scans(path: files.StrPath) -> bool:
    """Whether the format that the suffix names can hold k-space, not images alone.

    Raises:
        BadOption: unknown suffix.
    """
    return _suffix(path) in (".h5", ".npy", ".cfl")


def check_writable(
    path: files.StrPath, what: Scan | Reconstruction | Image | None = None, *, overwrite: bool = False
) -> None:
    """Refuse an output that `write` would refuse, before the work of making it.

    Arguments:
        what: what is to be written, once it is known: `.cfl` goes by what lies beside it.

    Raises:
        BadOption: unknown suffix, existing file; with exit status 3 a missing folder or permission.
    """
    if _suffix(path) == ".cfl":
        files.check_target(Path(path).with_suffix(".hdr"), overwrite=overwrite)
        if what is not None:
            cfl.check_beside(Path(path), what)
    files.check_target(path, overwrite=overwrite)


def write(
    path: files.StrPath,
    what: Scan | Reconstruction | Image,
    *,
    reference: Tensor | None = None,
    geometry: Geometry | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a scan, a reconstruction or an image; the suffix picks the format, see `WRITERS`.

    Arguments:
        reference: true image `(B, H, W)`, kept beside the k-space in `.h5`.
        geometry: of a reconstruction, which has none of its own; None takes that of `what`.
        overwrite: replace an existing file.

    Returns:
        Notes for a sidecar: `content` is "k-space", "complex" or "magnitude"; `window` of a picture.

    Raises:
        BadOption: unknown suffix, existing file, missing folder. NonFinite: NaN or Inf is never written.
        NoSpace: the disk is full; an earlier file is then as it was.
    """
    final, suffix = Path(path), _suffix(path)
    if geometry is None:
        geometry = Geometry() if isinstance(what, Reconstruction) else what.geometry
    tensors = {"image": what.image, "variance": what.variance} if isinstance(what, Reconstruction) else {}
    if reference is not None and not (isinstance(what, Scan) and suffix == ".h5"):
        raise errors.BadOption("is kept beside the k-space of a scan, in .h5 only", file=path, key="reference")
    try:
        for key, x in tensors.items():
            if x is not None:
                check_finite(x, key)
        check_writable(final, what, overwrite=overwrite)
        with ExitStack() as stack:
            temporary = stack.enter_context(files.write_atomically(final, overwrite=overwrite))
            beside = cfl.beside(final, what, geometry) if suffix == ".cfl" else {}
            for other, content in beside.items():
                stack.enter_context(files.write_atomically(other, overwrite=overwrite)).write_bytes(content)
            return WRITERS[suffix](temporary, what, reference, geometry)
    except errors.TunemriError as e:
        e.file = path
        raise
    except MemoryError as e:
        raise errors.NoMemory("not enough memory to write it", file=path, help="write fewer slices") from e


def write_pieces(
    path: files.StrPath, pieces: Iterable[Reconstruction], *, slices: int, geometry: Geometry | None = None
) -> dict[str, Any]:
    """Write a reconstruction that comes some slices at a time: `.h5` takes each piece as it comes, others wait for all.

    Arguments:
        pieces: in order; `slices`: how many there are in all.
        geometry: of the whole.

    Returns, raises: as `write`.
    """
    final, suffix = Path(path), _suffix(path)
    if suffix != ".h5":
        return write(path, joined(list(pieces)), geometry=geometry)
    with files.write_atomically(final) as temporary:
        return fastmri.write_pieces(temporary, pieces, slices, geometry or Geometry())


def volume_shape(path: files.StrPath) -> tuple[int, int, int, int] | None:
    """(slices, coils, rows, columns) of a file whose slices can be read one by one; None for any other.

    Raises:
        TunemriError: as for `read`.
    """
    with _guard(path) as (p, reader):
        return fastmri.volume_shape(p) if reader is fastmri else None


# ---------------------------------------------------------------- what is in it?


def inspect(path: files.StrPath) -> dict[str, Any]:
    """What a file holds, what can be done with it and what cannot, JSON-ready.

    Raises:
        TunemriError: it can be read neither as a scan nor as an image.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", errors.TunemriWarning)
        with _guard(path) as (p, reader):
            listed = reader.list_arrays(p)
        scan, no_scan = _attempt(read, path)
        image, no_image = _attempt(read_image, path, prefer="reference")
        reference, _ = _attempt(read_reference, path)
    if no_scan is not None and no_image is not None:
        raise no_image if isinstance(no_scan, errors.UnsupportedLayout) and "not k-space" in no_scan.what else no_scan
    kind = _kind(p)
    report: dict[str, Any] = {
        "file": str(path), "kind": kind, "format": _WORDS[kind], "bytes": p.stat().st_size, "arrays": listed,
    }  # fmt: skip
    can: list[str] = []
    cannot: list[str] = []
    if scan is not None:
        report |= _scan_facts(scan)
        can, cannot = _uses(scan)
        if kind.startswith("ismrmrd") and scan.coils > 1 and read_noise(path) is not None:
            cannot.append(
                "weigh the coils by their noise: recon takes no more than its level from the noise measurement; in Python, "
                "coils.whiten_scan(scan, coils.noise_covariance(formats.read_noise(FILE))) whitens"
            )
    elif no_scan is not None:
        cannot.append(f"reconstruct: {no_scan.what}; {no_scan.help or ''}".rstrip("; "))
    report["reference"] = reference is not None
    if image is not None and scan is None:
        report |= {
            "content": "image", **_image_facts(image), "provenance": image.provenance,
            "voxel_size_mm": _voxel_size(image.geometry), "placed": image.geometry.affine is not None,
        }  # fmt: skip
        can.append("simulate a scan from it: tunemri simulate FILE -o SCAN.h5 --mask poisson")
        can.append("serve as a reference: --reference FILE")
        can.append("be saved in another format: tunemri convert FILE -o OUT.nii.gz (or .dcm, .h5, .npy, .png)")
    elif reference is not None:
        can.append("score (PSNR, SSIM, …) against the reference in it")
    else:
        cannot.append("score (PSNR, SSIM, …): no reference image in the file; give one with --reference")
    messages = dict.fromkeys(str(w.message) for w in caught if isinstance(w.message, errors.TunemriWarning))
    return report | {"can": can, "cannot": cannot, "warnings": list(messages)}


_WORDS = {
    "hdf5": "HDF5 as fastMRI lays it out", "ismrmrd": "ISMRMRD raw data, as HDF5",
    "ismrmrd-stream": "ISMRMRD raw data, as a stream", "nifti": "NIfTI image", "dicom": "DICOM image",
    "npy": "numpy array", "npz": "numpy arrays", "mat5": "MATLAB variables", "mat73": "MATLAB 7.3 variables",
    "cfl": "BART's .cfl and .hdr", "png": "picture (PNG)", "jpeg": "picture (JPEG)", "tiff": "picture (TIFF)",
}  # fmt: skip


def _uses(scan: Scan) -> tuple[list[str], list[str]]:
    """What can, and what cannot be done with a scan, a sentence each."""
    can = ["reconstruct: tunemri recon FILE -m tv -o OUT.h5"]
    cannot = []
    if scan.trajectory is None:
        can.append("tune: tunemri sweep FILE -m hyper-brain --grid ssim=0:1:11 -o DIR")
    else:
        can.append("tune: tunemri sweep FILE -m tv --grid lam=5 -o DIR")
        if int(readouts(scan.trajectory[0])[-1]) < 3:
            cannot.append("choose a setting by held-out k-space: its trajectory does not fall into readouts")
    can.append("be saved in another format: tunemri convert FILE -o OUT.h5 (or OUT.cfl)")
    if scan.csm is None and scan.coils > 1:
        cannot.append("use measured coil maps: none in the file; they are estimated, or given with --csm")
    if scan.coils > 1 and scan.noise_std is None:
        cannot.append("weigh the coils by their noise: no noise measurement in the file")
    if scan.geometry.affine is None:
        cannot.append("place the image in the patient (NIfTI, DICOM): the file does not say where it lies")
    if scan.acceleration == 1 and scan.trajectory is None:
        can.append("serve as a fully sampled reference and be undersampled again")
    return can, cannot


def _attempt(
    function: Callable[..., Any], path: files.StrPath, **options: Any
) -> tuple[Any, errors.TunemriError | None]:
    try:
        return function(path, **options), None
    except errors.TunemriError as e:
        return None, e


def _scan_facts(scan: Scan) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "content": "k-space on a grid" if scan.mask is not None else "k-space along a trajectory",
        "slices": len(scan), "coils": scan.coils, "image_shape": list(scan.image_shape),
        "acceleration": round(scan.acceleration, 4),
    }  # fmt: skip
    if scan.mask is not None:
        facts["mask"] = _mask_family(scan.mask)
    if scan.trajectory is not None:
        reach = scan.trajectory.abs().amax((0, 1))
        facts["samples"] = scan.kspace.shape[-1]
        facts["trajectory_reach"] = [round(float(r), 2) for r in reach]  # cycles per field of view, rows and columns
    return facts | {
        "csm": scan.csm is not None, "noise_std": scan.noise_std, "provenance": scan.provenance,
        "voxel_size_mm": _voxel_size(scan.geometry), "placed": scan.geometry.affine is not None,
    }  # fmt: skip


def _voxel_size(geometry: Geometry) -> list[float] | None:
    return None if geometry.voxel_size is None else list(geometry.voxel_size)


def _mask_family(mask: Tensor) -> str:
    m = mask != 0
    if bool(m.all()):
        return "full"
    if bool((m == m[:, :, :1]).all()):
        return "columns"
    return "rows" if bool((m == m[..., :1]).all()) else "2-D"


def _image_facts(image: Image) -> dict[str, Any]:
    x = image.data.abs()
    return {
        "slices": len(x), "image_shape": list(x.shape[1:]), "complex": image.data.is_complex(),
        "maximum": float(x.max()), "zeros": round(float((x == 0).double().mean()), 4),
    }  # fmt: skip
