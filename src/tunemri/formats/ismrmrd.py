"""ISMRMRD raw data, as HDF5 (`dataset/xml`, `dataset/data`) and as a stream of messages.

A file is a header (XML: matrices, fields of view, limits) and a list of readouts, each with its own counters and
flags. What becomes of them:

    noise measurements                     → `read_noise` and `noise_std`, in the bandwidth of the image
    calibration of a scan of its own       → left out; that of an embedded one fills lines that the scan left out
    navigators, phase correction, dummies  → left out
    reversed readouts                      → turned; averages → their mean
    sample and line                        → placed so that zero frequency lies at N // 2, whatever is missing
                                             (partial Fourier, asymmetric echoes); unmeasured is zero, and not in the mask
    readout oversampling                   → removed: the image has the field of view of `reconSpace`
    partitions                             → slices, by a Fourier transform
    slices; echoes, phases, repetitions, … → one axis, slices fastest; more than slices with a word about it

x of the header is the readout and becomes the rows, y the columns. Trajectories are (x, y), in cycles per field of view
or, told by their extent, per pixel. Positions are in the patient's LPS, our affine in RAS.

Source: S. Inati et al., "ISMRM Raw data format: A proposed standard for MRI raw datasets" (2017).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import errors, files
from ..fourier import crop, fft2, ifft2
from ..scan import Geometry, Scan
from .base import (
    Encoding,
    Image,
    header_number,
    header_sizes,
    make_non_cartesian_scan,
    make_scan,
    parse_header,
    row_range,
)

if TYPE_CHECKING:
    import h5py

__all__ = ["list_arrays", "matches", "read_array", "read_image", "read_noise", "read_scan"]

# Numbers of the flags, bit n - 1 of the header's field.
_NOISE, _CALIBRATION, _CALIBRATION_AND_IMAGING, _REVERSE = 19, 20, 21, 22
_AUXILIARY = {
    23: "navigator", 24: "phase correction", 26: "feedback", 27: "dummy", 28: "feedback", 29: "coil correction",
    30: "phase stabilisation", 31: "phase stabilisation",
}  # fmt: skip

# Counters that make an image of its own, the slowest first. The others belong to one image.
_COUNTERS = ("repetition", "phase", "set", "contrast", "slice")


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """All readouts of a file.

    Arguments:
        encodings: of the header, see `parse_header`.
        head: structured `(N,)`, the fixed part of each readout.
        data: N arrays, complex64 `(coils, samples)`.
        trajectory: N arrays, float32 `(samples, dimensions)`, mostly of no dimension.
    """

    encodings: list[Encoding]
    head: np.ndarray
    data: list[np.ndarray]
    trajectory: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which readout goes where.

    Arguments:
        raw: all readouts.
        encoding: of those that make images.
        kept: `(N,)` indices of those; `image`: `(N,)`, which image each belongs to.
        counters: `(images, len(_COUNTERS))`, in order.
    """

    raw: _Raw
    encoding: Encoding
    kept: np.ndarray
    image: np.ndarray
    counters: np.ndarray

    @property
    def coils(self) -> int:
        return len(self.raw.data[self.kept[0]])


def read_scan(path: Path, slices: slice | None) -> Scan:
    """The scan in an ISMRMRD file, readouts sorted into k-space."""
    raw = _load(path)
    kept = _imaging(raw, path)
    counters, image = np.unique(_keys(raw, kept), axis=0, return_inverse=True)
    encoding = _encoding(raw, kept, path)
    plan = _Plan(raw=raw, encoding=encoding, kept=kept, image=image.reshape(-1), counters=counters)
    _say_counters(counters, path)
    # A converter may store a trajectory for lines on a grid, too: the header decides.
    on_grid = encoding.get("trajectory", "cartesian").lower() in ("cartesian", "epi")
    return (_cartesian if on_grid else _non_cartesian)(plan, slices, path)


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """Always refused: raw data."""
    raise errors.MissingKey(
        "raw data without an image", file=path, key="image",
        help="make one: tunemri recon FILE -m zero-filled -o IMAGE.h5",
    )  # fmt: skip


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """Always refused: readouts are no array."""
    raise errors.MissingKey(
        "readouts, no array", file=path, key=keys[0], help="convert it: tunemri convert IN -o OUT.h5"
    )


def read_noise(path: Path) -> np.ndarray | None:
    """Samples of the noise measurement, complex `(coils, samples)`, or None where the file has none.

    They are scaled to the bandwidth of the imaging readouts: their covariance is that of the noise in k-space.
    """
    raw = _load(path)
    return _noise(raw, _imaging(raw, path))


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """Readouts by purpose: how many, coils, samples."""
    raw = _load(path)
    kinds: dict[str, list[int]] = {}
    for i in range(len(raw.data)):
        kinds.setdefault(_purpose(int(raw.head["flags"][i])), []).append(i)
    return [
        {"name": f"{kind} readouts", "shape": [len(index), *raw.data[index[0]].shape], "dtype": "complex64"}
        for kind, index in kinds.items()
    ]


def _purpose(flags: int) -> str:
    if _has(flags, _NOISE):
        return "noise"
    if (name := next((name for bit, name in _AUXILIARY.items() if _has(flags, bit)), None)) is not None:
        return name
    return "calibration" if _has(flags, _CALIBRATION) and not _has(flags, _CALIBRATION_AND_IMAGING) else "imaging"


def _has(flags: int, number: int) -> bool:
    return bool(flags >> (number - 1) & 1)


# ---------------------------------------------------------------- file → readouts


def matches(path: Path) -> bool:
    """Whether an HDF5 file is laid out as ISMRMRD; a damaged one is left to those who can say what is wrong."""
    try:
        with files.open_hdf5(path) as h:
            keys = files.hdf5_keys(h, path)
            return "kspace" not in keys and bool(_groups(h, keys, path))
    except errors.TunemriError:
        return False


def _groups(h: Any, keys: list[str], path: Path) -> list[str]:
    """Names of the groups that hold readouts or their header."""
    import h5py

    found = []
    for key in keys:
        if isinstance(h.get(key, getlink=True), h5py.HardLink) and isinstance(h[key], h5py.Group):
            inside = set(files.hdf5_keys(h[key], path))
            data = (
                h[key]["data"]
                if "data" in inside and isinstance(h[key].get("data", getlink=True), h5py.HardLink)
                else None
            )
            readouts = isinstance(data, h5py.Dataset) and {"head", "data"} <= set(data.dtype.names or ())
            if "xml" in inside or readouts:
                found.append(key)
    return found


def _load(path: Path) -> _Raw:
    raw = _load_stream(path) if files.sniff(path) == "ismrmrd-stream" else _load_hdf5(path)
    if not raw.data:
        raise errors.NoData("no readout", file=path, key="data")
    return raw


def _load_hdf5(path: Path) -> _Raw:
    from ismrmrd.hdf5 import acquisition_header_dtype

    with files.open_hdf5(path) as h:
        groups = _groups(h, files.hdf5_keys(h, path), path)
        if len(groups) > 1:
            raise errors.UnsupportedLayout(
                f"{len(groups)} measurements ({', '.join(groups)}), expected one", file=path,
                help="copy the one you want into a file of its own (h5copy)",
            )  # fmt: skip
        if not groups:
            raise errors.MissingKey("no readouts", file=path, key="dataset/data")
        xml, data = (files.hdf5_dataset(h, f"{groups[0]}/{name}", path) for name in ("xml", "data"))
        encodings = _header_of(_text(xml, path), path, f"{groups[0]}/xml")
        stored = _check_readouts(data, f"{groups[0]}/data", path)
        head = np.empty(len(stored), acquisition_header_dtype)
        for name in acquisition_header_dtype.names or ():
            head[name] = stored[name]
        sizes = head["number_of_samples"].astype(np.int64) * head["active_channels"]
        declared = int(8 * sizes.sum())
        if declared > path.stat().st_size:
            raise errors.UnreadableFile(
                f"damaged: its readouts declare {declared} bytes, the file has {path.stat().st_size}", file=path,
                help="copy or download it again",
            )  # fmt: skip
        table = files.hdf5_array(data, path)
    values, paths = [], []
    for i, (record, size) in enumerate(zip(table, sizes, strict=True)):
        samples, dimensions = int(head["number_of_samples"][i]), int(head["trajectory_dimensions"][i])
        if record["data"].size != 2 * size or record["traj"].size != samples * dimensions:
            raise errors.InconsistentShapes(
                f"readout {i} holds {record['data'].size // 2} values, its header says {int(head['active_channels'][i])} "
                f"coils of {samples} samples", file=path, key="data",
            )  # fmt: skip
        values.append(np.ascontiguousarray(record["data"]).view(np.complex64).reshape(-1, samples))
        paths.append(record["traj"].reshape(samples, dimensions))
    return _Raw(encodings=encodings, head=head, data=values, trajectory=paths)


def _check_readouts(data: h5py.Dataset | h5py.Group | None, key: str, path: Path) -> np.ndarray:
    """The fixed parts of all readouts, once the stored type is known to be that of the standard."""
    import h5py
    from ismrmrd.hdf5 import acquisition_header_dtype

    if data is None:
        raise errors.MissingKey("a header without readouts", file=path, key=key)
    kind = data.dtype if isinstance(data, h5py.Dataset) else None
    fields = kind.fields if kind is not None else None
    wanted = {name: field[0] for name, field in (acquisition_header_dtype.fields or {}).items()}
    head = fields["head"][0].fields if fields and "head" in fields else None
    flat = all(
        fields and name in fields and h5py.check_vlen_dtype(fields[name][0]) == np.dtype("<f4")
        for name in ("traj", "data")
    )
    if not head or not flat or {name: field[0] for name, field in head.items()} != wanted or data.ndim != 1:
        raise errors.UnsupportedLayout(
            f"found {kind or 'a group'}, expected the readouts of ISMRMRD 1"[:160], file=path, key=key,
        )  # fmt: skip
    files.check_declared(data.shape, data.dtype.itemsize, path.stat().st_size, file=path, key=key, ratio=100)
    return np.asarray(data.fields("head")[()])


def _text(xml: Any, path: Path) -> bytes | None:
    import h5py

    if not isinstance(xml, h5py.Dataset) or xml.size != 1 or h5py.check_string_dtype(xml.dtype) is None:
        return None
    value = files.hdf5_array(xml, path).ravel()[0]
    return value.encode() if isinstance(value, str) else bytes(value)


def _header_of(raw: bytes | None, path: Path, key: str) -> list[Encoding]:
    """The encodings; without them nobody knows the size of the image."""
    help = "the file was cut or made without its header; write it again from the scanner's data"
    if not raw:
        raise errors.MissingKey("no XML header, which says how large the image is", file=path, key=key, help=help)
    try:
        encodings = parse_header(raw, path, key)
    except ValueError as e:
        raise errors.UnreadableFile(f"damaged XML header: {e}", file=path, key=key, help=help) from e
    if not encodings:
        raise errors.MissingKey("the XML header describes no encoding", file=path, key=key, help=help)
    return encodings


def _load_stream(path: Path) -> _Raw:
    """A stream is a list of messages: two bytes say what follows; the last one says that it is complete."""
    from ismrmrd.hdf5 import acquisition_header_dtype, waveform_header_dtype
    from ismrmrd.serialization import ISMRMRDMessageID

    size = path.stat().st_size
    known = {int(kind): kind.name for kind in ISMRMRDMessageID}
    xml: bytes | None = None
    heads: list[np.ndarray] = []
    values, paths = [], []
    with open(path, "rb") as f:

        def take(count: int) -> bytes:
            # Asked for before it is read: a damaged size must not take memory.
            if count > (left := size - f.tell()):
                raise errors.UnreadableFile(
                    f"truncated: {len(heads)} readouts, then {left} bytes where {count} were announced", file=path,
                    help="copy it again; a stream is complete when its writer has closed it",
                )  # fmt: skip
            return f.read(count)

        def number(form: str) -> int:
            return int(struct.unpack(form, take(struct.calcsize(form)))[0])

        while (message := known.get(kind := number("<H"))) != "CLOSE":
            match message:
                case "CONFIG_FILE":
                    take(1024)
                case "CONFIG_TEXT" | "TEXT":
                    take(number("<I"))
                case "HEADER":
                    xml = take(number("<I"))
                case "ACQUISITION":
                    head = np.frombuffer(take(acquisition_header_dtype.itemsize), acquisition_header_dtype)
                    coils, samples, dimensions = (
                        int(head[name][0]) for name in ("active_channels", "number_of_samples", "trajectory_dimensions")
                    )
                    paths.append(np.frombuffer(take(4 * samples * dimensions), "<f4").reshape(samples, dimensions))
                    values.append(np.frombuffer(take(8 * coils * samples), "<c8").reshape(coils, samples))
                    heads.append(head)
                case "WAVEFORM":
                    wave = np.frombuffer(take(waveform_header_dtype.itemsize), waveform_header_dtype)
                    take(4 * int(wave["channels"][0]) * int(wave["number_of_samples"][0]))
                case None:
                    raise errors.UnreadableFile(f"damaged: no message has the number {kind}", file=path)
                case _:
                    raise errors.UnsupportedLayout(
                        f"a stream with {message}, expected raw data", file=path, help="name the stream of the readouts"
                    )
    encodings = _header_of(xml, path, "header")
    head = np.concatenate(heads) if heads else np.empty(0, acquisition_header_dtype)
    return _Raw(encodings=encodings, head=head, data=values, trajectory=paths)


# ---------------------------------------------------------------- which readouts make the image


def _imaging(raw: _Raw, path: Path) -> np.ndarray:
    """Indices of the readouts that make the image, those of an embedded calibration last.

    Raises:
        NoData: there is none. InconsistentShapes: they have different numbers of coils. NonFinite.
    """
    purpose = [_purpose(int(flags)) for flags in raw.head["flags"]]
    kept = [i for i, kind in enumerate(purpose) if kind == "imaging"]
    calibration = [i for i, kind in enumerate(purpose) if kind == "calibration"]
    mode = raw.encodings[0].get("parallelImaging.calibrationMode", "embedded")
    if mode in ("embedded", "interleaved"):
        kept += calibration
    elif calibration:
        errors.warn(f"{path}: {len(calibration)} readouts of a {mode} calibration are left out")
    if (count := purpose.count("phase correction")) > 0:
        errors.warn(f"{path}: {count} phase correction readouts are left out: an EPI image keeps its Nyquist ghost")
    if not kept:
        raise errors.NoData(
            f"holds {', '.join(sorted(set(purpose)))} readouts only, none of an image", file=path, key="data",
            help="the scan itself is in another file",
        )  # fmt: skip
    coils: dict[int, int] = {}
    for i in kept:
        coils.setdefault(len(raw.data[i]), i)
        if not np.isfinite(raw.data[i].view(np.float32)).all():
            bad = int((~np.isfinite(raw.data[i])).sum())
            raise errors.NonFinite(
                f"{bad} of {raw.data[i].size} samples of readout {i} are NaN or Inf", file=path, key="data",
                help="repair or drop that readout; one such sample spoils the whole image",
            )  # fmt: skip
    if len(coils) > 1 or 0 in coils:
        (a, i), (b, j) = (*coils.items(), (0, 0))[:2]
        raise errors.InconsistentShapes(
            f"{a} coils in readout {i}, {b} in readout {j}, expected as many in all", file=path, key="data"
        )
    return np.array(kept)


def _encoding(raw: _Raw, kept: np.ndarray, path: Path) -> Encoding:
    spaces = np.unique(raw.head["encoding_space_ref"][kept])
    if len(spaces) > 1:
        raise errors.UnsupportedLayout(
            f"readouts of {len(spaces)} encoding spaces, expected one", file=path, key="encoding_space_ref",
            help="split the file: one scan in each",
        )  # fmt: skip
    if spaces[0] >= len(raw.encodings):
        raise errors.InconsistentShapes(
            f"readouts refer to encoding {spaces[0]}, the header has {len(raw.encodings)}", file=path,
            key="encoding_space_ref",
        )  # fmt: skip
    encoding = raw.encodings[int(spaces[0])]
    matrix, _ = header_sizes(encoding, "encodedSpace")
    if not all(1 <= n <= 65535 for n in matrix[:2]):
        raise errors.MissingKey("the header has no matrix size", file=path, key="encodedSpace.matrixSize")
    return encoding


def _keys(raw: _Raw, kept: np.ndarray) -> np.ndarray:
    """`(N, counters)`: which image each readout belongs to; slices are counted by where they lie."""
    head = raw.head[kept]
    keys = np.stack([head["idx"][name] for name in _COUNTERS], 1).astype(np.int64)
    place = np.einsum("ij,ij->i", head["position"].astype(np.float64), head["slice_dir"].astype(np.float64))
    names = np.unique(keys[:, -1])
    first = [place[np.flatnonzero(keys[:, -1] == name)[0]] for name in names]
    # Interleaved slices are numbered in the order of time by some scanners.
    if np.isfinite(first).all() and len(set(first)) == len(names):
        order = np.empty(len(names), np.int64)
        order[np.argsort(first)] = np.arange(len(names))
        keys[:, -1] = order[np.searchsorted(names, keys[:, -1])]
    return keys


def _say_counters(images: np.ndarray, path: Path) -> None:
    """More than slices share the first axis: say in which order."""
    counts = {name: len(set(column)) for name, column in zip(_COUNTERS, images.T, strict=True)}
    if any(n > 1 for name, n in counts.items() if name != "slice"):
        words = ", ".join(f"{name} × {n}" for name, n in counts.items() if n > 1 or name == "slice")
        errors.warn(f"{path}: {words}: read as {len(images)} slices in this order, the last counting fastest")


def _noise(raw: _Raw, kept: np.ndarray) -> np.ndarray | None:
    """Noise samples of as many coils as the image, √(dwell / dwell) wider or narrower in bandwidth."""
    coils, dwell = len(raw.data[kept[0]]), float(raw.head["sample_time_us"][kept[0]])
    found = []
    for i, flags in enumerate(raw.head["flags"]):
        if _has(int(flags), _NOISE) and len(raw.data[i]) == coils and np.isfinite(raw.data[i].view(np.float32)).all():
            own = float(raw.head["sample_time_us"][i])
            factor = np.sqrt(own / dwell) if own > 0 and dwell > 0 else 1.0
            found.append(raw.data[i] * np.float32(factor))
    return np.concatenate(found, 1) if found else None


def _noise_std(noise: np.ndarray | None, averages: float = 1.0) -> float | None:
    """√E|n|², over all coils, of the mean of so many readouts."""
    return None if noise is None else float(np.sqrt(np.mean(np.abs(noise.astype(np.complex128)) ** 2) / averages))


# ---------------------------------------------------------------- readouts → grid


def _line(raw: _Raw, i: int) -> tuple[np.ndarray, int]:
    """A readout in the order of growing frequency, and where its zero frequency is; discarded samples are gone."""
    head, values = raw.head[i], raw.data[i]
    before, after = int(head["discard_pre"]), int(head["discard_post"])
    if _has(int(head["flags"]), _REVERSE):
        # `center_sample` counts as if the readout ran forward, the discarded samples as they were measured.
        values, before, after = values[:, ::-1], after, before
    return values[:, before : values.shape[1] - after], int(head["center_sample"]) - before


def _cartesian(plan: _Plan, slices: slice | None, path: Path) -> Scan:
    raw, encoding, kept = plan.raw, plan.encoding, plan.kept
    matrix, fov = header_sizes(encoding, "encodedSpace")
    _, recon_fov = header_sizes(encoding, "reconSpace")
    n, w, z = (int(size) for size in (*matrix[:2], max(matrix[2], 1)))
    rows = row_range(slices if z == 1 else None, len(plan.counters))
    b, coils = rows.stop - rows.start, plan.coils
    stored = sum(raw.data[i].nbytes for i in kept)
    files.check_declared(
        (b, z, coils, n, w), 8, stored, file=path, key="encodedSpace.matrixSize", ratio=100, above=2**30
    )
    y = np.zeros((b, z, coils, n, w), np.complex64)
    count = np.zeros((b, z, n, w), np.int32)
    unset = all(int(raw.head["center_sample"][i]) == 0 and raw.data[i].shape[1] == n for i in kept) and n > 1
    if unset:
        errors.warn(f"{path}: center_sample is 0 in full readouts: not set, taken as {n // 2}")
    limits = [_limits(encoding, step, size) for step, size in ((1, w), (2, z))]
    for i, image in zip(kept, plan.image, strict=True):
        if not rows.start <= image < rows.stop:
            continue
        values, centre = _line(raw, i)
        top = n // 2 - (n // 2 if unset else centre)
        steps = [int(raw.head["idx"][f"kspace_encode_step_{s}"][i]) for s in (1, 2)]
        column, partition = (
            step - centre + size // 2 for step, centre, size in zip(steps, limits, (w, z), strict=True)
        )
        if not (0 <= column < w and 0 <= partition < z):
            raise errors.InconsistentShapes(
                f"readout {i} is line {steps[0]} of partition {steps[1]}, the matrix has {w} lines and {z} partitions",
                file=path, key="kspace_encode_step_1", help="are the encoding limits of the header right?",
            )  # fmt: skip
        # The centre is in every readout, so that none is shorter than half the matrix.
        if top < 0 or top + values.shape[1] > n or 2 * values.shape[1] < n - 1:
            raise errors.InconsistentShapes(
                f"readout {i} has {values.shape[1]} samples with the centre at {centre}, the matrix {n}", file=path,
                key="number_of_samples",
            )  # fmt: skip
        place = (image - rows.start, partition, slice(top, top + values.shape[1]), column)
        # An embedded calibration comes after the image itself, and only fills what that left out.
        if _purpose(int(raw.head["flags"][i])) == "calibration" and count[place].any():
            continue
        y[place[0], partition, :, place[2], column] += values
        count[place] += 1
    found = np.unique(count[count > 0])
    if len(found) > 1 and len(np.unique(raw.head["idx"]["average"][kept])) > 1:
        errors.warn(f"{path}: lines were measured {found[0]} to {found[-1]} times: each is the mean of its own")
    averages = float(count[count > 0].mean())
    y /= np.maximum(count, 1)[:, :, None]
    mask = (count > 0).astype(np.float32)[:, :, None]
    y, mask = _partitions(y, mask, _inside(z, fov[2], recon_fov[2]), path)
    wanted = _inside(n, fov[0], recon_fov[0])
    if wanted < n:
        y, mask = _remove_oversampling(y, mask, wanted)
    if not mask[..., mask.shape[-2] // 2, w // 2].all():
        errors.warn(
            f"{path}: the centre of k-space was not measured: expect an image without its brightness", "no_data"
        )
    if (mask == mask[..., :1, :]).all():
        mask = mask[..., :1, :]
    if (mask == mask[:1]).all():
        mask = mask[:1]
    return make_scan(
        y, file=path, third_axis="coils", mask=mask, slices=slices if z > 1 else None,
        noise_std=_noise_std(_noise(raw, kept), averages),
        geometry=_geometry(plan, rows, "encodedSpace", (wanted, w), y.shape[0] // b),
    )  # fmt: skip


def _limits(encoding: Encoding, step: int, size: int) -> int:
    """The counter of the zero frequency."""
    name = f"encodingLimits.kspace_encoding_step_{step}.center"
    return int(header_number(encoding, name)) if name in encoding else size // 2


def _partitions(y: np.ndarray, mask: np.ndarray, kept: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`(B, Z, C, H, W)` → `(B·kept, C, H, W)`: partitions become slices by the inverse transform along them."""
    z = y.shape[1]
    if z == 1:
        return y[:, 0], mask[:, 0]
    if not (mask == mask[:, :1]).all():
        raise errors.UnsupportedLayout(
            "partitions that were sampled differently, expected the same lines in all", file=path,
            key="kspace_encode_step_2", help="3-D undersampled data are not reconstructed",
        )  # fmt: skip
    along = torch.from_numpy(np.ascontiguousarray(np.moveaxis(y, 1, -1)))[..., None]
    image = crop(ifft2(along), (kept, 1))[..., 0]
    y = np.ascontiguousarray(np.moveaxis(image.numpy(), -1, 1))
    return y.reshape(-1, *y.shape[2:]), np.repeat(mask[:, 0], kept, axis=0)


def _inside(size: int, fov: float, recon_fov: float) -> int:
    """How many of `size` pixels lie inside the smaller field of view."""
    return min(size, max(1, round(size * recon_fov / fov))) if 0 < recon_fov < 0.999 * fov else size


def _remove_oversampling(y: np.ndarray, mask: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the field of view along the rows: transform, crop, transform back.

    Where a readout is incomplete (an asymmetric echo) the samples beside its ends mix with what was not measured, the
    grid being periodic: four of them are left out at each.
    """
    n = y.shape[-2]
    along = torch.from_numpy(np.ascontiguousarray(y.swapaxes(-2, -1)))[..., None]
    cut = fft2(crop(ifft2(along), (wanted, 1)))[..., 0].numpy().swapaxes(-2, -1)
    if (mask == mask[..., :1, :]).all():
        return cut * mask[..., :1, :], np.repeat(mask[..., :1, :], wanted, axis=-2)
    at = np.clip(np.round((np.arange(wanted) - wanted // 2) * n / wanted).astype(int) + n // 2, 0, n - 1)
    reach = np.ceil(4 * n / wanted).astype(int)
    inner = mask > 0
    for shift in range(1, reach + 1):
        inner = inner & (np.roll(mask, shift, -2) > 0) & (np.roll(mask, -shift, -2) > 0)
    kept = inner[..., at, :].astype(np.float32)
    return cut * kept, kept


# ---------------------------------------------------------------- readouts → samples along a trajectory


def _non_cartesian(plan: _Plan, slices: slice | None, path: Path) -> Scan:
    raw, encoding, kept = plan.raw, plan.encoding, plan.kept
    rows = row_range(slices, len(plan.counters))
    kind = encoding["trajectory"]
    if any(raw.trajectory[i].shape[1] < 2 for i in kept):
        raise errors.MissingKey(
            f"a {kind} scan without its trajectory", file=path, key="traj",
            help="let the converter write it, or give kspace and trajectory in one .h5 (see `tunemri info`)",
        )  # fmt: skip
    matrix, fov = header_sizes(encoding, "encodedSpace")
    if matrix[2] > 1:
        raise errors.UnsupportedLayout(
            f"a {kind} scan of {int(matrix[2])} partitions, expected slices", file=path, key="encodedSpace.matrixSize.z"
        )
    samples, points = [], []
    for image in range(rows.start, rows.stop):
        chosen = kept[plan.image == image]
        ends = [
            (int(raw.head["discard_pre"][i]), raw.data[i].shape[1] - int(raw.head["discard_post"][i])) for i in chosen
        ]
        samples.append(np.concatenate([raw.data[i][:, a:e] for i, (a, e) in zip(chosen, ends, strict=True)], 1))
        points.append(np.concatenate([raw.trajectory[i][a:e, :2] for i, (a, e) in zip(chosen, ends, strict=True)]))
    sizes = {y.shape[1] for y in samples}
    if len(sizes) > 1:
        raise errors.UnsupportedLayout(
            f"images of {min(sizes)} to {max(sizes)} samples, expected as many in each", file=path, key="data",
            help="read them one at a time (--slice)",
        )  # fmt: skip
    t = np.stack(points).astype(np.float32)
    recon, recon_fov = header_sizes(encoding, "reconSpace")
    shape = (int(recon[0]), int(recon[1])) if min(recon[:2]) >= 1 else (int(matrix[0]), int(matrix[1]))
    # Some count cycles in the oversampled field of view, with the same border of k-space.
    if np.abs(t).max(initial=0) > 0.505 * max(shape) and 0 < recon_fov[0] < fov[0]:
        t = t * np.float32(recon_fov[0] / fov[0])
    space = "reconSpace" if min(recon[:2]) >= 1 else "encodedSpace"
    return make_non_cartesian_scan(
        np.stack(samples), t if (t != t[:1]).any() else t[:1], file=path, image_shape=shape, total=len(samples),
        noise_std=_noise_std(_noise(raw, kept)), geometry=_geometry(plan, rows, space, shape, 1),
    )  # fmt: skip


# ---------------------------------------------------------------- where the image lies


def _geometry(plan: _Plan, rows: slice, space: str, shape: tuple[int, int], partitions: int) -> Geometry:
    """Voxel size from the header, affine from positions and directions.

    There is no affine where the first axis is more than one stack of equally spaced slices, or one of partitions. Echoes
    of a single slice all lie in its place: the affine then has no step from one to the next.
    """
    matrix, fov = header_sizes(plan.encoding, space)
    # One millimetre per pixel in the middle of the magnet: nobody knew.
    unset = fov[:2] == matrix[:2] and not plan.raw.head["position"][plan.kept].any()
    if min(fov) <= 0 or unset:
        return Geometry()
    spacing = [size / max(count, 1) for size, count in zip(fov, matrix, strict=True)]
    first = [plan.kept[np.flatnonzero(plan.image == image)[0]] for image in range(rows.start, rows.stop)]
    head, images = plan.raw.head[first], plan.counters[rows]
    place = head["position"].astype(np.float64)
    read, phase, through = (head[name][0].astype(np.float64) for name in ("read_dir", "phase_dir", "slice_dir"))
    step = through * spacing[2]
    if len(images) > 1 and len({tuple(image[:-1]) for image in images}) == 1 and partitions == 1:
        steps = np.diff(place, axis=0)
        step = steps[0]
        stack = bool(np.allclose(steps, step, atol=1e-2)) and float(np.linalg.norm(step)) > 1e-3
        spacing[2] = float(np.linalg.norm(step)) if stack else spacing[2]
    elif len(images) > 1 and partitions == 1 and np.allclose(place, place[0], atol=1e-2):
        step, stack = np.zeros(3), True
    else:
        stack = len(images) == 1
    voxel = (spacing[0], spacing[1], spacing[2])
    known = all(abs(np.linalg.norm(axis) - 1) < 1e-3 for axis in (read, phase, through)) and np.isfinite(place).all()
    if not (stack and known):
        return Geometry(voxel_size=voxel)
    rows_, columns = read * spacing[0], phase * spacing[1]
    # The position is that of the centre, index N // 2.
    origin = place[0] - rows_ * (shape[0] // 2) - columns * (shape[1] // 2) - step * (partitions // 2)
    lps = np.stack([rows_, columns, step, origin], 1)
    ras = np.vstack([lps * np.array([[-1.0], [-1.0], [1.0]]), [0.0, 0.0, 0.0, 1.0]])
    return Geometry(voxel_size=voxel, affine=tuple(tuple(row) for row in ras.tolist()))
