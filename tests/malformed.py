"""Files that a reader must refuse, and files that are odd but right: each case says what has to happen.

`REFUSED` and `ACCEPTED` are plain lists of cases; a case builds its file in a folder and returns the path.
Run as a program, this module feeds random damage to every reader (see `damage`): HDF5 is a C library, and a crash
of it must end this process, not the one that tests.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import ismrmrd  # resets the filters of warnings when it is first imported: here, before a test sets its own
import nibabel
import numpy as np
from PIL import Image as pillow
from scipy.io import savemat

B, C, H, W = 2, 4, 32, 30


def image() -> np.ndarray:
    """Two smooth, different slices."""
    r, c = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    x = np.stack([np.exp(-4 * (r**2 + (c - 0.2 * b) ** 2)) * (1 + 0.3 * np.cos(5 * r)) for b in range(B)])
    return x.astype(np.complex64)


def kspace() -> np.ndarray:
    """Centred orthonormal k-space `(B, C, H, W)` of `image` seen by four smooth coils."""
    r, c = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    coils = np.stack([np.exp(-((r - a) ** 2) - (c - b) ** 2 + 1j * a * c) for a in (-1, 1) for b in (-1, 1)])
    shifted = np.fft.ifftshift(image()[:, None] * coils, axes=(-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=(-2, -1)).astype(np.complex64)


def lines() -> np.ndarray:
    """Every other column, and the central six."""
    mask = np.arange(W) % 2 == 0
    mask[W // 2 - 3 : W // 2 + 3] = True
    return mask.astype(np.float32)


def header(rows: int = H, columns: int = W, fov: tuple[float, float, float] = (64.0, 45.0, 5.0)) -> str:
    space = (
        f"<matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize>"
        f"<fieldOfView_mm><x>{fov[0]}</x><y>{fov[1]}</y><z>{fov[2]}</z></fieldOfView_mm>"
    )
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>'
        f"<encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace></encoding></ismrmrdHeader>"
    )


def fastmri(folder: Path, name: str = "scan.h5", *, attributes: dict[str, Any] | None = None, **datasets: Any) -> Path:
    """A good fastMRI file, with datasets replaced, added, or left out (None)."""
    contents: dict[str, Any] = {"kspace": kspace(), "ismrmrd_header": header(), **datasets}
    with h5py.File(folder / name, "w") as h:
        for key, value in contents.items():
            if value is not None:
                h[key] = value
        for key, value in (attributes or {}).items():
            h.attrs[key] = value
    return folder / name


def mrd_header(
    *, rows: int = H, oversampling: int = 1, lines: tuple[int, int, int] = (0, W - 1, W // 2), partitions: int = 1,
    trajectory: str = "cartesian", calibration: str | None = None, spaces: int = 1,
) -> str:  # fmt: skip
    """The XML of an ISMRMRD file; `lines`: minimum, maximum and centre of the line counter."""
    sides = [
        f"<matrixSize><x>{n}</x><y>{W}</y><z>{partitions}</z></matrixSize>"
        f"<fieldOfView_mm><x>{2.0 * n}</x><y>{1.5 * W}</y><z>{5.0 * partitions}</z></fieldOfView_mm>"
        for n in (rows * oversampling, rows)
    ]
    limits = "".join(
        f"<kspace_encoding_step_{step}><minimum>{a}</minimum><maximum>{e}</maximum><center>{c}</center></kspace_encoding_step_{step}>"
        for step, (a, e, c) in ((1, lines), (2, (0, partitions - 1, partitions // 2)))
    )
    parallel = (
        "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>"
        "<kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor>"
        f"<calibrationMode>{calibration}</calibrationMode></parallelImaging>"
    )
    encoding = (
        f"<encoding><encodedSpace>{sides[0]}</encodedSpace><reconSpace>{sides[1]}</reconSpace>"
        f"<encodingLimits>{limits}</encodingLimits><trajectory>{trajectory}</trajectory>"
        f"{parallel if calibration else ''}</encoding>"
    )
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        "<experimentalConditions><H1resonanceFrequency_Hz>128000000</H1resonanceFrequency_Hz></experimentalConditions>"
        f"{encoding * spaces}</ismrmrdHeader>"
    )


def readouts(
    *, coil_images: np.ndarray | None = None, oversampling: int = 1, reverse: bool = False, first_sample: int = 0,
    lines: Sequence[int] = tuple(range(W)), centre: int = W // 2, **counters: int,
) -> list[Any]:  # fmt: skip
    """ISMRMRD readouts of coil images `(B, C, H, W)`, made independently of the package: padded, transformed, cut up.

    With `reverse` every second line runs backwards; `first_sample` are missing at the start (an asymmetric echo).
    """
    x = images_of_coils() if coil_images is None else coil_images
    edge = x.shape[-2] * oversampling // 2 - x.shape[-2] // 2
    x = np.pad(x, ((0, 0), (0, 0), (edge, x.shape[-2] * (oversampling - 1) - edge), (0, 0)))
    n, w = x.shape[-2:]
    y = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(x, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))
    found = []
    for b in range(len(y)):
        for line in lines:
            values = y[b, :, first_sample:, line].astype(np.complex64)
            one = ismrmrd.Acquisition.from_array(np.ascontiguousarray(values), center_sample=n // 2 - first_sample)
            if reverse and line % 2:
                one.data[:] = values[:, ::-1]
                one.set_flag(ismrmrd.ACQ_IS_REVERSE)
            one.idx.kspace_encode_step_1 = line - w // 2 + centre
            one.idx.slice = b
            one.sample_time_us = 4.0
            one.read_dir[:], one.phase_dir[:], one.slice_dir[:] = (0, 1, 0), (1, 0, 0), (0, 0, 1)
            one.position[:] = (3.0, 4.0, 6.0 * b)
            for name, value in counters.items():
                setattr(one.idx, name, value)
            found.append(one)
    return found


def images_of_coils() -> np.ndarray:
    """`image` seen by the coils of `kspace`: `(B, C, H, W)`."""
    y = np.fft.ifftshift(kspace(), axes=(-2, -1))
    return np.fft.fftshift(np.fft.ifft2(y, norm="ortho"), axes=(-2, -1))


def noise_readout(std: float = 0.1, samples: int = 4096, coils: int = C, dwell: float = 4.0) -> Any:
    rng = np.random.default_rng(5)
    values = std / np.sqrt(2) * (rng.standard_normal((coils, samples)) + 1j * rng.standard_normal((coils, samples)))
    one = ismrmrd.Acquisition.from_array(values.astype(np.complex64), sample_time_us=dwell)
    one.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    return one


def ismrmrd_hdf5(folder: Path, acquisitions: list[Any], xml: str | None = None, name: str = "raw.h5") -> Path:
    """An ISMRMRD file of the `ismrmrd` package's types, written in one go (`append_acquisition` takes its time)."""
    from ismrmrd.hdf5 import acquisition_dtype, acquisition_header_dtype

    table = np.empty(len(acquisitions), acquisition_dtype)
    for record, one in zip(table, acquisitions, strict=True):
        record["head"] = np.frombuffer(bytes(one.getHead()), acquisition_header_dtype)[0]
        record["traj"], record["data"] = one.traj.ravel(), one.data.view(np.float32).ravel()
    with h5py.File(folder / name, "w") as h:
        h["dataset/xml"] = np.array([mrd_header() if xml is None else xml], h5py.string_dtype())
        h["dataset/data"] = table
    return folder / name


def ismrmrd_stream(folder: Path, acquisitions: list[Any], xml: str | None = None, name: str = "raw.mrd") -> Path:
    """The same as a stream, with all that may come before and between."""
    content = io.BytesIO()
    with ismrmrd.ProtocolSerializer(content) as s:
        s.serialize(ismrmrd.ConfigFile("default.xml"))
        s.serialize(ismrmrd.xsd.CreateFromDocument(mrd_header() if xml is None else xml))
        for one in acquisitions:
            s.serialize(one)
        s.serialize(ismrmrd.Waveform(data=np.zeros((2, 7), np.uint32)))
        s.serialize("done")
    return raw(folder, name, content.getvalue())


def raw(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@dataclass(frozen=True, kw_only=True)
class Case:
    """`build(folder)` makes the file; `read` or `read_image` must then raise the error whose word is `word`.

    `says` are pieces of the message; for an accepted case (`word` is empty) pieces of the warnings, all of them.
    """

    name: str
    build: Callable[[Path], Path]
    word: str = ""
    says: tuple[str, ...] = ()
    reader: str = "read"
    exit_code: int = 2


REFUSED: list[Case] = []
ACCEPTED: list[Case] = []


def _refused(name: str, build: Callable[[Path], Path], word: str, *says: str, reader: str = "read") -> None:
    REFUSED.append(Case(name=name, build=build, word=word, says=says, reader=reader))


def _accepted(name: str, build: Callable[[Path], Path], *says: str) -> None:
    ACCEPTED.append(Case(name=name, build=build, says=says))


# ---------------------------------------------------------------- not a file that can be read


def _cut(path: Path, keep: Callable[[int], int]) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: keep(len(content))])
    return path


def _link(folder: Path) -> Path:
    (folder / "link.h5").symlink_to(folder / "gone.h5")
    return folder / "link.h5"


def _circle(folder: Path) -> Path:
    (folder / "circle.h5").symlink_to(folder / "circle.h5")
    return folder / "circle.h5"


def _node(kind: int) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        os.mknod(folder / "node.h5", kind | 0o600)
        return folder / "node.h5"

    return build


def _misspelt(folder: Path) -> Path:
    fastmri(folder, "brain_17.h5")
    return folder / "brian_17.h5"


_refused("empty", lambda d: raw(d, "a.h5", b""), "unreadable_file", "empty (0 bytes)")
_refused("missing", _misspelt, "unreadable_file", "no such file", "'brain_17.h5'")
_refused("folder", lambda d: d, "unreadable_file", "folder")
_refused("dangling link", _link, "unreadable_file", "gone.h5")
_refused("link to itself", _circle, "unreadable_file")
_refused("pipe", _node(stat.S_IFIFO), "unreadable_file", "pipe")
_refused("socket", _node(stat.S_IFSOCK), "unreadable_file", "socket")
_refused("device", lambda d: Path("/dev/zero"), "unreadable_file", "device")
_refused("nul in name", lambda d: d / "a\0b.h5", "unreadable_file")
_refused("name too long", lambda d: d / ("a" * 300 + ".h5"), "unreadable_file")
_refused("html", lambda d: raw(d, "a.h5", b"\n<!DOCTYPE html><html>404"), "unreadable_file", "HTML", "failed download")
_refused("xml", lambda d: raw(d, "a.h5", b"<?xml version='1.0'?><a/>"), "unreadable_file", "XML")
_refused("text", lambda d: raw(d, "a.h5", b"version https://git-lfs\noid sha256:0"), "unreadable_file", "plain text")
_refused("noise", lambda d: raw(d, "a.h5", np.random.default_rng(0).bytes(4000)), "unreadable_file", "hdf5")
_refused("zip", lambda d: raw(d, "a.zip", b"PK\5\6" + bytes(18)), "unsupported_layout", "zip")
_refused("pickle", lambda d: raw(d, "a.pkl", b"\x80\x04K\x01."), "unsafe_content", "pickle")
_refused("dicom", lambda d: raw(d, "a.dcm", bytes(128) + b"DICM" + bytes(9)), "unsupported_layout", "DICOM")
_refused(
    "dicom without pixels",
    lambda d: raw(d, "a.dcm", bytes(128) + b"DICM" + bytes(9)),
    "unsupported_layout",
    "without pixels",
    reader="read_image",
)
_refused("weights", lambda d: raw(d, "a.safetensors", struct.pack("<Q", 2) + b"{}"), "unsupported_layout", "weights")

# ---------------------------------------------------------------- damaged HDF5


def _bit_rot(folder: Path) -> Path:
    path = folder / "rot.h5"
    with h5py.File(path, "w") as h:
        data = h.create_dataset("kspace", data=kspace(), chunks=(1, 1, H, W), fletcher32=True)
        at = data.id.get_chunk_info(3).byte_offset
    content = bytearray(path.read_bytes())
    content[at + 100] ^= 0x40
    path.write_bytes(content)
    return path


def _unknown_filter(folder: Path) -> Path:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((B, C, H, W))
    plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(folder / "blosc.h5", "w") as h:
        space = h5py.h5s.create_simple((B, C, H, W))
        data = h5py.h5d.create(h.id, b"kspace", h5py.h5t.py_create(np.dtype("c8")), space, plist)
        data.write_direct_chunk((0, 0, 0, 0), kspace().tobytes(), 0)
    return folder / "blosc.h5"


def _killed_writer(folder: Path) -> Path:
    with h5py.File(folder / "open.h5", "w", libver="latest") as h:
        h["kspace"] = kspace()
        h.flush()
        shutil.copy(folder / "open.h5", folder / "killed.h5")
    return folder / "killed.h5"


def _loop(folder: Path) -> Path:
    with h5py.File(folder / "loop.h5", "w") as h:
        h["kspace"], h["a"] = h5py.SoftLink("/a"), h5py.SoftLink("kspace")
    return folder / "loop.h5"


def _external_link(folder: Path) -> Path:
    fastmri(folder, "other.h5")
    with h5py.File(folder / "outside.h5", "w") as h:
        h["kspace"] = h5py.ExternalLink(str(folder / "other.h5"), "/kspace")
    return folder / "outside.h5"


def _external_behind_soft(folder: Path) -> Path:
    fastmri(folder, "other.h5")
    with h5py.File(folder / "outside.h5", "w") as h:
        h["door"] = h5py.ExternalLink(str(folder / "other.h5"), "/")
        h["kspace"] = h5py.SoftLink("/door/kspace")
    return folder / "outside.h5"


def _external_raw(folder: Path) -> Path:
    raw(folder, "secret", kspace().tobytes())
    with h5py.File(folder / "outside.h5", "w") as h:
        h.create_dataset("kspace", (B, C, H, W), "c8", external=[(str(folder / "secret"), 0, kspace().nbytes)])
    return folder / "outside.h5"


def _virtual(folder: Path) -> Path:
    other = fastmri(folder, "other.h5")
    layout = h5py.VirtualLayout((B, C, H, W), "c8")
    layout[:] = h5py.VirtualSource(other, "kspace", (B, C, H, W))
    with h5py.File(folder / "outside.h5", "w") as h:
        h.create_virtual_dataset("kspace", layout)
    return folder / "outside.h5"


def _declares(*shape: int) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        with h5py.File(folder / "huge.h5", "w") as h:
            h.create_dataset("kspace", shape, "c8", chunks=(1, 1, 64, 64), compression="gzip")
        return folder / "huge.h5"

    return build


_refused("h5 half", lambda d: _cut(fastmri(d), lambda n: n // 2), "unreadable_file", "truncated", " bytes")
_refused("h5 last byte", lambda d: _cut(fastmri(d), lambda n: n - 1), "unreadable_file", "truncated", " bytes")
_refused("h5 signature only", lambda d: raw(d, "a.h5", b"\x89HDF\r\n\x1a\n"), "unreadable_file")
_refused("bit rot", _bit_rot, "unreadable_file", "kspace")
_refused("filter", _unknown_filter, "unreadable_file", "kspace", "32001", "blosc")
_refused("killed writer", _killed_writer, "unreadable_file", "h5clear")
_refused("soft-link loop", _loop, "unreadable_file", "circle")
_refused("external link", _external_link, "unsafe_content", "kspace", "other.h5")
_refused("external link behind a soft one", _external_behind_soft, "unsafe_content", "kspace")
_refused("external raw data", _external_raw, "unsafe_content", "kspace")
_refused("virtual dataset", _virtual, "unsafe_content", "kspace")
_refused("859 TB", _declares(2, 16, 1 << 21, 1 << 21), "too_large", "kspace", "limit", "TUNEMRI_MAX_BYTES")
_refused("5 GiB in 2 kB", _declares(2, 4, 1 << 13, 10240), "too_large", "kspace", "limit", "TUNEMRI_MAX_BYTES")

# ---------------------------------------------------------------- HDF5 that is no scan


def _group(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as h:
        h.create_group("kspace")["x"] = kspace()
    return folder / "a.h5"


def _ismrmrd(folder: Path) -> Path:
    with h5py.File(folder / "raw.h5", "w") as h:
        h["dataset/xml"], h["dataset/data"] = header(), np.zeros(3)
    return folder / "raw.h5"


def _h5(name: str, word: str, *says: str, **datasets: Any) -> None:
    _refused(name, lambda d: fastmri(d, **datasets), word, *says)


def _spoilt(value: complex) -> np.ndarray:
    y = kspace()
    y[1, 2, 3, 5] = value
    return y


_h5("no kspace", "missing_key", "kspace", "'ksp'", kspace=None, ksp=np.zeros(3))
_h5("image only", "missing_key", "kspace", "simulate", kspace=None, reconstruction_rss=image().real)
_refused("mrd without readouts of its type", _ismrmrd, "unsupported_layout", "ISMRMRD")
_refused("kspace is a group", _group, "unsupported_layout", "kspace", "group")
_h5("strings", "unsupported_layout", "kspace", kspace=["a", "b"])
_h5("null", "unsupported_layout", "kspace", kspace=h5py.Empty("c8"))
_h5("real", "unsupported_layout", "kspace", "float64", kspace=np.ones((B, C, H, W)))
_h5("boolean", "unsupported_layout", "kspace", kspace=np.ones((B, C, H, W), dtype=bool))
_h5("1-D", "unsupported_layout", "kspace", "(7,)", kspace=np.ones(7, dtype="c8"))
_h5("6-D", "unsupported_layout", "kspace", "6 axes", kspace=np.ones((1, 1, 2, 2, 2, 2), dtype="c8"))
_h5("scalar", "unsupported_layout", "kspace", kspace=np.complex64(1))
_h5("records", "unsupported_layout", "kspace", kspace=np.zeros((B, H, W), dtype=[("a", "f4"), ("b", "f4")]))
_h5("trajectory of another scan", "inconsistent_shapes", "trajectory", "(3, 2)", trajectory=np.zeros((3, 2)))
_h5("zero slices", "no_data", "kspace", kspace=np.zeros((0, C, H, W), dtype="c8"))
_h5("all zero", "no_data", "kspace", kspace=np.zeros((B, C, H, W), dtype="c8"))
_h5("one NaN", "non_finite", "kspace", "1 of 7680", "(1, 2, 3, 5)", kspace=_spoilt(complex(0, np.nan)))
_h5("one Inf", "non_finite", "kspace", "(1, 2, 3, 5)", kspace=_spoilt(np.inf))
_h5("all NaN", "non_finite", "kspace", kspace=kspace() * np.nan)
_h5("coils last", "inconsistent_shapes", "(2, 32, 30, 4)", "32×30", kspace=np.moveaxis(kspace(), 1, -1))
_h5(
    "coils last, no header", "unsupported_layout", "moveaxis", kspace=np.ones((1, 64, 64, 4), "c8"), ismrmrd_header=None
)
_h5("mask short", "inconsistent_shapes", "mask", "(28,)", mask=np.ones(W - 2))
_h5("mask of rows", "inconsistent_shapes", "mask", "(rows, 1)", mask=np.ones(H))
_h5("mask empty", "no_data", "mask", mask=np.zeros(W))
_h5("mask 0.5", "unsupported_layout", "mask", mask=np.full(W, 0.5))
_h5("mask -1", "unsupported_layout", "mask", mask=-np.ones(W))
_h5("mask NaN", "non_finite", "mask", mask=np.full(W, np.nan))
_h5("mask of text", "unsupported_layout", "mask", mask="yes")
_h5("mask of the unmeasured", "no_data", "mask", kspace=kspace() * lines(), mask=1 - lines())
_h5("three maps", "inconsistent_shapes", "csm", csm=np.ones((3, H, W), "c8"))
_h5("maps of another grid", "inconsistent_shapes", "csm", csm=np.ones((C, H - 2, W), "c8"))
_h5("maps for one coil", "inconsistent_shapes", "csm", kspace=kspace()[:, 0], csm=np.ones((C, H, W), "c8"))
_h5("real maps", "unsupported_layout", "csm", csm=np.ones((C, H, W)))
_h5("NaN map", "non_finite", "csm", csm=np.full((C, H, W), np.nan, "c8"))
_h5("zero maps", "no_data", "csm", csm=np.zeros((C, H, W), "c8"))
_h5(
    "entity bomb", "unsafe_content", "ismrmrd_header", "DOCTYPE",
    ismrmrd_header='<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>',
)  # fmt: skip
_refused("no image", fastmri, "missing_key", "recon", reader="read_image")
_refused("h5 of notes", lambda d: fastmri(d, kspace=None), "missing_key", "no image", reader="read_image")

# ---------------------------------------------------------------- arrays


def _saved(name: str, array: np.ndarray) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        np.save(folder / name, array)
        return folder / name

    return build


def _npz(**contents: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        np.savez_compressed(folder / "a.npz", **contents)
        return folder / "a.npz"

    return build


def _mat(**contents: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        savemat(folder / "a.mat", contents, do_compression=True)
        return folder / "a.mat"

    return build


class Canary:
    """Unpickling one makes a file beside the array."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


def _npy_header(shape: str) -> bytes:
    text = f"{{'descr': '<c8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _npz_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("kspace.npy", _npy_header("(2, 64, 16384, 16384)") + bytes(10_000))
    return folder / "bomb.npz"


def _hollow_zip(folder: Path) -> Path:
    path = _npz(kspace=kspace())(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    return path


_OBJECTS = np.array([Canary()], dtype=object)
_refused("npy objects", _saved("a.npy", _OBJECTS), "unsafe_content", "objects")
_refused("npz objects", _npz(kspace=_OBJECTS), "unsafe_content", "kspace", "objects")
_refused("npy cut", lambda d: _cut(_saved("a.npy", kspace())(d), lambda n: n - 9), "unreadable_file", "truncated")
_refused("npy header only", lambda d: _cut(_saved("a.npy", kspace())(d), lambda n: 40), "unreadable_file")
_refused("npy negative", lambda d: raw(d, "a.npy", _npy_header("(-3, 4)")), "unreadable_file", "(-3, 4)")
_refused("npy nested", lambda d: raw(d, "a.npy", _npy_header("(" * 40)), "unreadable_file", "header")
_refused("npy 2 TB", lambda d: raw(d, "a.npy", _npy_header("(2, 64, 65536, 32768)")), "too_large", "limit")
_refused("npy real", _saved("a.npy", image().real), "unsupported_layout", "simulate")
_refused("npy text", _saved("a.npy", np.array([["a", "b"]])), "unsupported_layout")
_refused("npy 1-D", _saved("a.npy", np.ones(5, "c8")), "missing_key")
_refused("npy coils last", _saved("a.npy", np.ones((256, 216, 8), "c8")), "unsupported_layout", "moveaxis")
_refused("npz bomb", _npz_bomb, "too_large", "kspace")
_refused("npz damaged", _hollow_zip, "unreadable_file")
_refused("npz of images", _npz(img=image().real), "unsupported_layout", "'img'", "simulate")
_refused("npz unknown names", _npz(a=kspace(), b=kspace()), "missing_key", "known: a, b")
_refused(
    "mat noise",
    lambda d: raw(d, "a.mat", b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"\x0e\0\0\0\xff" * 60),
    "unreadable_file",
)
_refused("mat cut", lambda d: _cut(_mat(kspace=kspace())(d), lambda n: n // 2), "unreadable_file")
_refused("mat words", _mat(note="nothing here"), "missing_key")
_refused("image objects", _saved("a.npy", _OBJECTS), "unsafe_content", reader="read_image")
_refused("image NaN", _saved("a.npy", np.full((H, W), np.nan)), "non_finite", reader="read_image")
_refused("image too bright", _saved("a.npy", np.full((H, W), 1e300)), "non_finite", reader="read_image")
_refused("image zero", _saved("a.npy", np.zeros((H, W))), "no_data", reader="read_image")
_refused("image without pixels", _saved("a.npy", np.zeros((0, W))), "no_data", reader="read_image")
_refused("image 4-D", _saved("a.npy", np.ones((2, 2, 2, 2))), "unsupported_layout", reader="read_image")

# ---------------------------------------------------------------- NIfTI, pictures, cfl


def _nifti(array: np.ndarray, name: str = "a.nii.gz") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name)
        return folder / name

    return build


def _nifti_header(*shape: int) -> bytes:
    head = nibabel.Nifti1Header()
    head.set_data_shape(shape)
    head.set_data_dtype(np.float32)
    head["vox_offset"], head["magic"] = 352, b"n+1"
    return bytes(head.binaryblock) + bytes(4)


def _png_header(rows: int, columns: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def _png(folder: Path, name: str = "a.png") -> Path:
    pillow.fromarray((255 * image().real[0] / image().real.max()).astype(np.uint8)).save(folder / name)
    return folder / name


def _cfl(folder: Path, sizes: str = f"{H} {W} 1 {C}", *, text: str | None = None, values: int = H * W * C) -> Path:
    raw(folder, "a.hdr", (f"# Dimensions\n{sizes}\n" if text is None else text).encode())
    return raw(folder, "a.cfl", kspace()[0].swapaxes(1, 2).tobytes()[: 8 * values])


def _cfl_alone(folder: Path) -> Path:
    path = _cfl(folder)
    path.with_suffix(".hdr").unlink()
    return path


_X = np.moveaxis(image().real, 0, -1).copy()
_NAN = _X.copy()
_NAN[3, 4, 1] = np.nan
_refused("nifti is no scan", _nifti(_X), "unsupported_layout", "simulate")
_refused("nifti NaN", _nifti(_NAN), "non_finite", "(1, 3, 4)", reader="read_image")
_refused("nifti zero", _nifti(0 * _X), "no_data", reader="read_image")
_refused("nifti series", _nifti(np.ones((4, 4, 2, 3), "f4")), "unsupported_layout", "(4, 4, 2, 3)", reader="read_image")
_refused("nii.gz cut", lambda d: _cut(_nifti(_X)(d), lambda n: n // 2), "unreadable_file", reader="read_image")
_refused("nii cut", lambda d: _cut(_nifti(_X, "a.nii")(d), lambda n: n - 9), "unreadable_file", reader="read_image")
_refused("nii magic", lambda d: raw(d, "a.nii", b"\x5c\1\0\0" + bytes(996)), "unreadable_file", reader="read_image")
_refused("nii 100 TB", lambda d: raw(d, "a.nii", _nifti_header(32000, 32000, 32000)), "too_large", reader="read_image")
_refused(
    "nii.gz bomb",
    lambda d: raw(d, "a.nii.gz", gzip.compress(_nifti_header(1024, 1024, 200) + bytes(10**6))),
    "too_large", reader="read_image",
)  # fmt: skip
_refused("png is no scan", _png, "unsupported_layout", "simulate")
_refused("png cut", lambda d: _cut(_png(d), lambda n: n // 2), "unreadable_file", reader="read_image")
_refused("png bomb", lambda d: raw(d, "a.png", _png_header(30000, 30000)), "too_large", reader="read_image")
_refused("png bombard", lambda d: raw(d, "a.png", _png_header(11000, 11000)), "too_large", reader="read_image")
_refused("png black", lambda d: raw(d, "a.png", _png_header(9, 10)), "no_data", reader="read_image")
_refused("cfl without hdr", _cfl_alone, "unreadable_file", "a.hdr")
_refused("cfl short", lambda d: _cfl(d, values=99), "unreadable_file", "truncated", "792 of 30720 bytes")
_refused("cfl long", lambda d: _cfl(d, f"{H} {W} 1 2"), "unreadable_file", "longer")
_refused("cfl negative", lambda d: _cfl(d, f"{H} -{W} 1 {C}"), "unreadable_file", "-30")
_refused("cfl 3-D", lambda d: _cfl(d, f"{H} {W} {C}"), "unsupported_layout", "dimensions")
_refused("cfl hdr empty of sizes", lambda d: _cfl(d, text="# Dimensions\n"), "unreadable_file", "dimensions")
_refused("cfl hdr of words", lambda d: _cfl(d, "a b"), "unreadable_file", "dimensions")
_refused("cfl of coils as image", _cfl, "unsupported_layout", "4 coils", reader="read_image")

# ---------------------------------------------------------------- odd, and right


def _big_endian_pair() -> np.ndarray:
    y = kspace()
    return np.stack([y.real, y.imag], axis=-1).astype(">f4")


def _records() -> np.ndarray:
    y = np.empty(kspace().shape, dtype=[("real", "<f8"), ("imag", "<f8")])
    y["real"], y["imag"] = kspace().real, kspace().imag
    return y


def _chunked(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as h:
        h.create_dataset("kspace", data=kspace(), chunks=(1, 3, 7, 11), compression="gzip", shuffle=True)
    return folder / "a.h5"


def _soft_link(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as h:
        h["raw/data"] = kspace()
        h["kspace"] = h5py.SoftLink("/raw/data")
    return folder / "a.h5"


def _renamed(folder: Path) -> Path:
    return _saved("a.npy", kspace())(folder).rename(folder / "a.h5")


def _mat73(folder: Path) -> Path:
    with h5py.File(folder / "a.mat", "w", userblock_size=512) as h:
        y = np.empty(kspace().T.shape, dtype=[("real", "<f4"), ("imag", "<f4")])
        y["real"], y["imag"] = kspace().T.real, kspace().T.imag
        h["kspace"] = y
    with open(folder / "a.mat", "r+b") as f:
        f.write(b"MATLAB 7.3 MAT-file".ljust(512, b"\0"))
    return folder / "a.mat"


def _cfl_of_slices(folder: Path) -> Path:
    raw(folder, "a.hdr", f"# Dimensions\n{H} {W} 1 {C} {'1 ' * 9}{B} 1 1\n# Command\nfft".encode())
    return raw(folder, "a.cfl", kspace().swapaxes(2, 3).tobytes())


def _good(name: str, *says: str, **datasets: Any) -> None:
    attributes = datasets.pop("attributes", None)
    _accepted(name, lambda d: fastmri(d, attributes=attributes, **datasets), *says)


_good("plain")
_good("complex128", kspace=kspace().astype(np.complex128))
_good("big-endian", kspace=kspace().astype(">c8"))
_good("float pair", kspace=_big_endian_pair())
_good("records of two doubles", kspace=_records())
_good("tiny values", kspace=kspace() * np.float32(1e-9))
_good("huge values", kspace=kspace() * np.float32(1e9))
_good("tiny doubles", kspace=kspace().astype(np.complex128) * 1e-60)
_good("huge doubles", kspace=kspace().astype(np.complex128) * 1e60)
_good("no header", ismrmrd_header=None)
_good("header cut", "damaged", ismrmrd_header=header()[:90])
_good("header of noise", "damaged", ismrmrd_header=np.bytes_(b"\xff\xfe\x00"))
_good("header of another matrix", "640×368", ismrmrd_header=header(640, 368))
_good("header too long", "too long", ismrmrd_header="<a>" + " " * 2**20 + "</a>")
_good("latin-1 attributes", attributes={"patient_id": np.bytes_("Müller".encode("latin-1"))})
_good("path as patient", attributes={"patient_id": "../../etc/passwd", "acquisition": "<script>"})
_good("noise is text", "noise_std", attributes={"noise_std": "much"})
_good("noise is negative", "noise_std", attributes={"noise_std": -1.0})
_good("all ones", mask=np.ones(W))
_good("a stray zero", kspace=_spoilt(0))
_accepted("chunked", _chunked)
_accepted("soft link", _soft_link)
_accepted("npy called h5", _renamed, "read as npy")
_accepted("npy", _saved("a.npy", kspace()))
_accepted("npy column-major", _saved("a.npy", np.asfortranarray(kspace())))
_accepted("npy big-endian", _saved("a.npy", kspace().astype(">c16")))
_accepted("npz", _npz(ksp=kspace(), note="a", mask=np.ones(W)))
_accepted("mat 5", _mat(kspace=kspace(), note="a"))
_accepted("mat 7.3", _mat73)
_accepted("cfl", _cfl_of_slices)


# ---------------------------------------------------------------- scans off the grid, and images placed in the patient


def spokes() -> np.ndarray:
    """`(12, 40, 2)`: spokes in cycles per field of view of a 32×32 image."""
    angle, radius = np.pi * np.arange(12)[:, None] / 12, (np.arange(40) - 20) * 0.8
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).astype(np.float32)


def along(trajectory: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples `(…, *trajectory.shape[:-1])` of images `(…, 32, 32)`, the sum written out."""
    n = np.arange(32) - 16
    k = trajectory.reshape(-1, 2).astype(np.float64) / 32
    rows, columns = np.exp(-2j * np.pi * k[:, :1] * n), np.exp(-2j * np.pi * k[:, 1:] * n)
    y = np.einsum("mr,...rc,mc->...m", rows, x, columns) / 32
    return y.reshape(*x.shape[:-2], *trajectory.shape[:-1]).astype(np.complex64)


def square() -> np.ndarray:
    """`images_of_coils` on 32×32 pixels."""
    return np.pad(images_of_coils(), ((0, 0), (0, 0), (0, 0), (1, 1)))


def radial(folder: Path, name: str = "scan.h5", **datasets: Any) -> Path:
    contents = {"kspace": along(spokes(), square()), "trajectory": spokes(), "ismrmrd_header": None, **datasets}
    return fastmri(folder, name, attributes={"image_shape": (32, 32)}, **contents)


def cfl_radial(
    folder: Path, *, trajectory: np.ndarray | None = None, samples: np.ndarray | None = None, sizes: str = "3 40 12"
) -> Path:
    y = along(spokes(), square()[0]) if samples is None else samples
    t = spokes() if trajectory is None else trajectory
    raw(folder, "a_ksp.hdr", f"# Dimensions\n1 40 12 {len(y)}\n".encode())
    raw(folder, "a_traj.hdr", f"# Dimensions\n{sizes}\n".encode())
    raw(folder, "a_traj.cfl", np.concatenate([t, 0 * t[..., :1]], -1).astype("<c8").tobytes())
    return raw(folder, "a_ksp.cfl", y.tobytes())


def dicom(folder: Path, *, b: int = B, change: Callable[[Any], Any] = lambda data: None) -> Path:
    """A DICOM file of `image`, changed after it was made."""
    import pydicom
    import torch

    from tunemri import formats
    from tunemri.scan import Geometry

    place = Geometry(
        voxel_size=(2.0, 1.5, 6.0), affine=((0, -1.5, 0, 9.0), (-2.0, 0, 0, 7.0), (0, 0, 6.0, 5.0), (0, 0, 0, 1))
    )
    what = formats.Image(data=torch.from_numpy(image().real[:b].copy()), geometry=place)
    formats.write(folder / "a.dcm", what, overwrite=True)
    data = pydicom.dcmread(folder / "a.dcm")
    change(data)
    data.save_as(folder / "a.dcm")
    return folder / "a.dcm"


# ---------------------------------------------------------------- raw data that is none, or not whole


def _changed(*changes: Callable[[list[Any]], object], xml: str | None = None) -> Callable[[Path], Path]:
    """An ISMRMRD file with its readouts changed."""

    def build(folder: Path) -> Path:
        found = readouts()
        for change in changes:
            change(found)
        return ismrmrd_hdf5(folder, found, xml)

    return build


def _replaced(index: int, **of: Any) -> Callable[[list[Any]], None]:
    """Readout `index` cut to other samples or coils, or with another counter."""

    def change(found: list[Any]) -> None:
        old = found[index]
        values = np.ascontiguousarray(old.data[: of.get("coils", C), : of.get("samples", H)])
        found[index] = ismrmrd.Acquisition.from_array(values, center_sample=of.get("center", H // 2))
        found[index].idx.slice = old.idx.slice
        found[index].idx.kspace_encode_step_1 = of.get("line", old.idx.kspace_encode_step_1)
        found[index].encoding_space_ref = of.get("space", 0)

    return change


def _spoil(found: list[Any]) -> None:
    found[7].data[:] = np.nan


def _flagged(number: int) -> Callable[[list[Any]], None]:
    return lambda found: [one.set_flag(number) for one in found] and None


def _without(key: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = ismrmrd_hdf5(folder, readouts())
        with h5py.File(path, "a") as h:
            del h[key]
        return path

    return build


def _twice(folder: Path) -> Path:
    path = ismrmrd_hdf5(folder, readouts())
    with h5py.File(path, "a") as h:
        h.copy("dataset", "dataset_2")
    return path


def _stream(end: int | None = None, put: dict[int, bytes] | None = None) -> Callable[[Path], Path]:
    """A stream cut at `end`, or with bytes put over its own."""

    def build(folder: Path) -> Path:
        path = ismrmrd_stream(folder, readouts())
        content = bytearray(path.read_bytes())[:end]
        for at, new in (put or {}).items():
            content[at : at + len(new)] = new
        path.write_bytes(content)
        return path

    return build


def _stream_without_header(folder: Path) -> Path:
    content = io.BytesIO()
    with ismrmrd.ProtocolSerializer(content) as s:
        s.serialize(ismrmrd.ConfigText("<configuration/>     "))
        for one in readouts():
            s.serialize(one)
    return raw(folder, "raw.mrd", content.getvalue())


def _stream_of_many(folder: Path) -> Path:
    """65535 samples of 65535 coils in the first readout."""
    path = ismrmrd_stream(folder, readouts())
    content = bytearray(path.read_bytes())
    head = content.index(b"\xf0\3\1\0") + 2
    content[head + 34 : head + 40] = b"\xff" * 6
    path.write_bytes(content)
    return path


_BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>'
_refused("mrd without xml", _without("dataset/xml"), "missing_key", "dataset/xml", "how large")
_refused("mrd without readouts", _without("dataset/data"), "missing_key", "dataset/data")
_refused("mrd twice", _twice, "unsupported_layout", "dataset, dataset_2")
_refused("mrd xml cut", _changed(xml=mrd_header()[:300]), "unreadable_file", "dataset/xml", "XML")
_refused("mrd xml of nothing", _changed(xml="<ismrmrdHeader/>"), "missing_key", "encoding")
_refused("mrd xml bomb", _changed(xml=_BOMB), "unsafe_content", "DOCTYPE")
_refused("mrd matrix of nothing", _changed(xml=mrd_header().replace("matrixSize", "size")), "missing_key", "matrixSize")
_refused("mrd matrix of 65535", _changed(xml=mrd_header(rows=65535)), "inconsistent_shapes", "readout 0", "65535")
_refused(
    "mrd of 134 GB", _changed(xml=mrd_header(partitions=1000).replace("<y>30<", "<y>65535<")), "too_large", "matrixSize"
)
_refused("mrd short readout", _changed(_replaced(5, samples=20, center=20)), "inconsistent_shapes", "readout 5", "20")
_refused("mrd line 5000", _changed(_replaced(5, line=5000)), "inconsistent_shapes", "readout 5", "5000", "30 lines")
_refused("mrd fewer coils", _changed(_replaced(5, coils=2)), "inconsistent_shapes", "readout 5", "2", "4")
_refused("mrd other encoding", _changed(_replaced(5, space=1)), "unsupported_layout", "encoding spaces")
_refused("mrd NaN readout", _changed(_spoil), "non_finite", "readout 7", "128 of 128")
_refused("mrd noise only", _changed(_flagged(19)), "no_data", "noise readouts only")
_refused("mrd navigators only", _changed(_flagged(23)), "no_data", "navigator")
_refused("mrd zeros", _changed(lambda found: [one.data.fill(0) for one in found]), "no_data", "zero")
_refused(
    "mrd radial without trajectory", _changed(xml=mrd_header(trajectory="radial")), "missing_key", "traj", "radial"
)
_refused("mrd is no image", _changed(), "missing_key", "recon", reader="read_image")
_refused("stream cut", _stream(end=9000), "unreadable_file", "truncated", "readouts")
_refused("stream not closed", _stream(end=-2), "unreadable_file", "truncated")
_refused("stream of no message", _stream(put={0: b"\3\0\x20\0\0\0<a>", 38: b"\x99\x99"}), "unreadable_file", "39321")
_refused("stream declares 34 GB", _stream_of_many, "unreadable_file", "truncated: 0 readouts", "34358689800")
_refused("stream without header", _stream_without_header, "missing_key", "header")


def _at_three(folder: Path) -> Path:
    return radial(folder, trajectory=np.concatenate([spokes(), 0 * spokes()[..., :1]], -1))


def _radial_alone(folder: Path) -> Path:
    path = cfl_radial(folder)
    (folder / "a_traj.cfl").unlink()
    return path


_refused(
    "radial axes swapped",
    lambda d: radial(d, trajectory=np.moveaxis(spokes(), -1, 0)),
    "inconsistent_shapes",
    "moveaxis",
)
_refused("radial three columns", _at_three, "inconsistent_shapes", "(12, 40, 3)")
_refused("radial of fewer spokes", lambda d: radial(d, trajectory=spokes()[:7]), "inconsistent_shapes", "(7, 40, 2)")
_refused("radial NaN", lambda d: radial(d, trajectory=np.nan * spokes()), "non_finite", "trajectory")
_refused("radial NaN spoke", lambda d: radial(d, kspace=np.nan * along(spokes(), square())), "non_finite", "kspace")
_refused("radial zeros", lambda d: radial(d, kspace=0 * along(spokes(), square())), "no_data", "zero")
_refused("radial beyond the image", lambda d: radial(d, trajectory=3 * spokes()), "inconsistent_shapes", "trajectory")
_refused("radial complex", lambda d: radial(d, trajectory=1j * spokes()), "unsupported_layout", "trajectory")
_refused("radial of other maps", lambda d: radial(d, csm=np.ones((3, 32, 32), "c8")), "inconsistent_shapes", "csm")
_refused("cfl radial alone", _radial_alone, "missing_key", "a_traj.cfl")
_refused(
    "cfl radial short", lambda d: cfl_radial(d, sizes="3 40 11"), "inconsistent_shapes", "a_traj", "[3, 40, 11, 1]"
)
_refused("cfl radial swapped", lambda d: cfl_radial(d, sizes="40 3 12"), "inconsistent_shapes", "a_traj")
_refused("cfl radial complex", lambda d: cfl_radial(d, trajectory=1j * spokes()), "unsupported_layout", "complex")


def _hollow(data: Any) -> None:
    del data.PixelData


def _short(data: Any) -> None:
    data.PixelData = data.PixelData[: len(data.PixelData) // 2]


def _huge(data: Any) -> None:
    data.Rows = data.Columns = 65535
    data.NumberOfFrames = 5000


def _jpeg(data: Any) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    data.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(60)] * B)
    data["PixelData"].is_undefined_length = True


_refused("dicom is no scan", dicom, "unsupported_layout", "simulate")
_refused(
    "dicom without values", lambda d: dicom(d, change=_hollow), "unsupported_layout", "PixelData", reader="read_image"
)
_refused("dicom short", lambda d: dicom(d, change=_short), "unreadable_file", reader="read_image")
_refused("dicom of 40 TB", lambda d: dicom(d, change=_huge), "too_large", reader="read_image")
_refused("dicom jpeg", lambda d: dicom(d, change=_jpeg), "unsupported_layout", "JPEG 2000", reader="read_image")
_refused("dicom cut", lambda d: _cut(dicom(d), lambda n: n - 9), "unreadable_file", reader="read_image")

_accepted("ismrmrd", lambda d: ismrmrd_hdf5(d, readouts()))
_accepted("ismrmrd stream", lambda d: ismrmrd_stream(d, readouts()))
_accepted("ismrmrd called bin", lambda d: ismrmrd_stream(d, readouts(), name="raw.bin"))
_accepted(
    "ismrmrd without centre",
    _changed(lambda found: [setattr(one, "center_sample", 0) for one in found]),
    "center_sample",
)


# ---------------------------------------------------------------- random damage


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut the bytes short, flip a few, or overwrite a stretch."""
    spoilt = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(spoilt[: rng.integers(1, len(spoilt))])
    # Most of the structure lies in front.
    reach = len(spoilt) if kind == 1 else min(len(spoilt), 2048)
    if kind == 3:
        at = int(rng.integers(reach))
        length = min(int(rng.integers(1, 32)), len(spoilt) - at)
        spoilt[at : at + length] = rng.bytes(length)
    else:
        for at in rng.integers(reach, size=rng.integers(1, 9)):
            spoilt[at] ^= 1 << rng.integers(8)
    return bytes(spoilt)


def main(folder: Path, count: int) -> int:
    """Read `count` damaged copies of a file of every kind; returns how many ended neither well nor in our error."""
    import warnings

    import torch

    from tunemri import errors, formats

    seeds: dict[str, Callable[[Path], Path]] = {case.name: case.build for case in ACCEPTED}
    names = ("plain", "chunked", "npy", "npz", "mat 5", "mat 7.3", "cfl")
    sources = {name: (seeds[name], formats.read) for name in names} | {
        "nii": (_nifti(_X, "a.nii"), formats.read_image), "nii.gz": (_nifti(_X), formats.read_image),
        "png": (_png, formats.read_image), "jpg": (lambda d: _png(d, "a.jpg"), formats.read_image),
        "tif": (lambda d: _png(d, "a.tif"), formats.read_image),
        "h5 image": (lambda d: fastmri(d, reconstruction_rss=image().real), formats.read_image),
        "ismrmrd": (lambda d: ismrmrd_hdf5(d, readouts()), formats.read),
        "ismrmrd stream": (lambda d: ismrmrd_stream(d, readouts()), formats.read),
        "h5 radial": (radial, formats.read), "cfl radial": (cfl_radial, formats.read),
        "dicom": (lambda d: dicom(d, b=1), formats.read_image), "dicom frames": (dicom, formats.read_image),
    }  # fmt: skip
    bad = 0
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", errors.TunemriWarning)
    for number, (name, (build, read)) in enumerate(sources.items()):
        rng = np.random.default_rng(number)
        path = build(folder)
        content = path.read_bytes()
        for _ in range(count):
            path.write_bytes(damage(content, rng))
            try:
                found = read(path)
                values = found.kspace if read is formats.read else found.data
                assert bool(torch.isfinite(torch.view_as_real(values) if values.is_complex() else values).all())
            except errors.TunemriError as e:
                if e.file is None or e.exit_code not in (2, 3):
                    print(f"{name}: {type(e).__name__} without a file: {e}")
                    bad += 1
            except BaseException as e:
                print(f"{name}: {type(e).__name__}: {e}")
                bad += 1
    return bad


def within(folder: Path, spare: int = 2**29) -> int:
    """Read every case of REFUSED with so many bytes of memory to spare; returns how many ended otherwise than they should."""
    import resource
    import warnings

    from tunemri import errors, formats

    warnings.simplefilter("ignore")
    bad, limit = 0, resource.getrlimit(resource.RLIMIT_AS)
    for number, case in enumerate(REFUSED):
        (own := folder / str(number)).mkdir()
        path = case.build(own)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, limit[1]))
        try:
            getattr(formats, case.reader)(path)
            found = "nothing"
        except errors.TunemriError as error:
            found = error.word
        except MemoryError:
            found = "MemoryError"
        resource.setrlimit(resource.RLIMIT_AS, limit)
        if found != case.word:
            print(f"{case.name}: {found}, expected {case.word}")
            bad += 1
    return bad


if __name__ == "__main__":
    where, *counts = sys.argv[1:]
    sys.exit(min(main(Path(where), int(counts[0])) if counts else within(Path(where)), 99))
