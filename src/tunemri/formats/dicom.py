"""DICOM images (`.dcm`), in and out.

In: any image of grey values, one frame or many, with its rescaling, spacing, orientation and position.

Out: 16-bit grey values, which slope and intercept turn back into the units of the image. What kind of object:

                    one slice                    several slices
    place known     MR Image                     Enhanced MR Image, one frame each
    place unknown   Secondary Capture            Multi-frame Grayscale Word Secondary Capture

Without an affine nobody knows where the patient's left is, so such a file names no orientation and viewers draw no
letters. Patient's name, number, birthday and sex are empty. The identifiers follow from the content: the same image
written twice is the same object.

DICOM counts in the patient's LPS, our affine in RAS. Its first direction runs along a row (our column index grows),
its second down a column.

Source: DICOM PS3.3, C.7.6.2 (Image Plane), C.7.6.16 (Multi-frame Functional Groups), C.8.13 (Enhanced MR).
"""

from __future__ import annotations

import datetime
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .. import __version__, errors, files
from ..scan import Geometry, Reconstruction, Scan
from .base import Image, image_only, make_image, row_range, shifted

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

__all__ = ["list_arrays", "read_array", "read_image", "read_scan", "write"]

_TOP = 65535  # of the stored grey values
_LPS = np.array([-1.0, -1.0, 1.0])


def read_scan(path: Path, slices: slice | None) -> Scan:
    """Always refused: DICOM holds images."""
    raise image_only(path, "a DICOM image")


def read_image(path: Path, slices: slice | None, prefer: str) -> Image:
    """Frames `(B, H, W)` in the units that slope and intercept give."""
    from pydicom import dcmread

    shape, _ = _header(path)
    data = dcmread(path)
    try:
        pixels = np.asarray(data.pixel_array).reshape(shape)
    except (NotImplementedError, RuntimeError, AttributeError) as e:
        name = getattr(getattr(data.file_meta, "TransferSyntaxUID", None), "name", "unknown")
        raise errors.UnsupportedLayout(
            f"its pixels cannot be decoded ({name})",
            file=path,
            key="PixelData",
            help="decompress it (dcmdjpeg, gdcmconv)",
        ) from e
    rows = row_range(slices, shape[0])
    frames = [_frame(data, i) for i in range(shape[0])]
    scaled = [
        pixels[i].astype(np.float64) * frames[i]["slope"] + frames[i]["intercept"] for i in range(rows.start, rows.stop)
    ]
    return make_image(
        np.stack(scaled), file=path, key="PixelData", geometry=shifted(_geometry(frames), rows.start),
    )  # fmt: skip


def read_array(path: Path, keys: Sequence[str]) -> np.ndarray:
    """The values of the one array, slices first."""
    return read_image(path, None, "image").data.numpy()


def list_arrays(path: Path) -> list[dict[str, Any]]:
    """Frames and size, and the kind of object."""
    shape, data = _header(path)
    return [{"name": "image", "shape": list(shape), "dtype": f"{data.get('BitsStored', 16)} bits"}]


def _header(path: Path) -> tuple[tuple[int, int, int], FileDataset]:
    """`(frames, rows, columns)`, and all but the pixels."""
    from pydicom import dcmread

    data = dcmread(path, stop_before_pixels=True)
    rows, columns, frames = (int(data.get(name) or 0) for name in ("Rows", "Columns", "NumberOfFrames"))
    if not rows or not columns:
        kind = data.file_meta.get("MediaStorageSOPClassUID")
        raise errors.UnsupportedLayout(
            f"a DICOM object without pixels ({getattr(kind, 'name', 'unknown')})", file=path, key="Rows"
        )
    if int(data.get("SamplesPerPixel") or 1) != 1:
        raise errors.UnsupportedLayout("a colour picture, expected grey values", file=path, key="SamplesPerPixel")
    shape = (max(frames, 1), rows, columns)
    files.check_declared(shape, 8, path.stat().st_size, file=path, key="PixelData", ratio=400, above=2**29)
    return shape, data


def _frame(data: Dataset, index: int) -> dict[str, Any]:
    """Place and scale of one frame: its own, else those that all frames share, else those of the file."""
    own = [group[index] for group in [data.get("PerFrameFunctionalGroupsSequence")] if group and index < len(group)]
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])[:1]

    def find(sequence: str, name: str) -> Any:
        for group in (*own, *shared):
            if (inner := group.get(sequence)) and (value := inner[0].get(name)) is not None:
                return value
        return data.get(name)

    def numbers(sequence: str, name: str, count: int) -> np.ndarray | None:
        value = find(sequence, name)
        found = np.array([float(v) for v in value]) if value is not None and not isinstance(value, str) else None
        return found if found is not None and found.shape == (count,) and np.isfinite(found).all() else None

    scale = [find("PixelValueTransformationSequence", name) for name in ("RescaleSlope", "RescaleIntercept")]
    thickness = find("PixelMeasuresSequence", "SpacingBetweenSlices") or find("PixelMeasuresSequence", "SliceThickness")
    return {
        "slope": 1.0 if scale[0] is None else float(scale[0]),
        "intercept": 0.0 if scale[1] is None else float(scale[1]),
        "spacing": numbers("PixelMeasuresSequence", "PixelSpacing", 2),
        "thickness": float(thickness) if thickness else None,
        "directions": numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        "position": numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        "step": _next_slice(data),
    }


# DICOM cannot say on which side of a single slice the next one lies; we do, in a tag of our own (LPS, mm).
_OWN, _STEP = (0x0071, "tunemri"), 0x01


def _next_slice(data: Dataset) -> np.ndarray | None:
    try:
        value = data.private_block(*_OWN)[_STEP].value
        step = np.array([float(v) for v in value])
    except (KeyError, TypeError, ValueError):
        return None
    return step if step.shape == (3,) and np.isfinite(step).all() and step.any() else None


def _geometry(frames: list[dict[str, Any]]) -> Geometry:
    """Voxel size and affine of frames that are one stack of equally spaced slices; else what is known."""
    first = frames[0]
    spacing, directions, positions = first["spacing"], first["directions"], [f["position"] for f in frames]
    if spacing is None or min(spacing) <= 0:
        return Geometry()
    between = first["thickness"] or 1.0
    if directions is None or any(p is None for p in positions):
        sized = first["thickness"] is not None
        return Geometry(voxel_size=(float(spacing[0]), float(spacing[1]), between) if sized else None)
    along_row, down_column = directions[:3], directions[3:]
    step = np.cross(along_row, down_column) * between
    if first["step"] is not None and abs(float(first["step"] @ step)) > 0.999 * between * np.linalg.norm(first["step"]):
        step = step * np.sign(float(first["step"] @ step))
    if len(frames) > 1:
        steps = np.diff(np.stack(positions), axis=0)
        step, between = steps[0], float(np.linalg.norm(steps[0]))
        same = all(f["directions"] is not None and np.allclose(f["directions"], directions, atol=1e-4) for f in frames)
        if not same or between == 0 or not np.allclose(steps, step, atol=1e-2):
            return Geometry(voxel_size=(float(spacing[0]), float(spacing[1]), first["thickness"] or 1.0))
    columns = np.stack([down_column * spacing[0], along_row * spacing[1], step, positions[0]], 1) * _LPS[:, None]
    affine = np.vstack([columns, [0.0, 0.0, 0.0, 1.0]])
    return Geometry(
        voxel_size=(float(spacing[0]), float(spacing[1]), between),
        affine=tuple(tuple(row) for row in affine.tolist()),
    )


# ---------------------------------------------------------------- writing


def write(
    path: Path, what: Scan | Reconstruction | Image, reference: Tensor | None, geometry: Geometry
) -> dict[str, Any]:
    """Write the magnitude to the (temporary) path; the notes tell slope and intercept."""
    from pydicom import Dataset, dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    if isinstance(what, Scan):
        raise errors.BadOption("DICOM holds images, not k-space", file=path, help="write the scan to .h5")
    x = what.image if isinstance(what, Reconstruction) else what.data
    values = (x.abs() if x.is_complex() else x).double().numpy(force=True)
    low, high = min(float(values.min()), 0.0), float(values.max())
    slope = float(f"{(high - low) / _TOP or 1.0:.9e}")  # a decimal string has sixteen characters
    intercept = float(f"{low:.8e}")
    stored = np.clip(np.round((values - intercept) / slope), 0, _TOP).astype("<u2")
    if values.shape[1] > _TOP or values.shape[2] > _TOP:
        raise errors.BadOption(f"DICOM ends at {_TOP} rows and columns", file=path, key="image")
    place = _place(geometry, len(stored), path)
    name = hashlib.sha256(stored.tobytes() + repr((values.shape, slope, intercept, geometry)).encode()).hexdigest()
    many, placed = len(stored) > 1, place is not None
    data = Dataset()
    data.SOPClassUID = _sop_class(many, placed)
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(data, keyword, generate_uid(entropy_srcs=[keyword, name]))
    _describe(data, name, placed)
    _describe_pixels(data, stored, slope, intercept)
    window = float(np.quantile(values, 0.999)) or high or 1.0
    if many and place is not None:
        _describe_frames(data, place, len(stored), slope, intercept, window, geometry)
    else:
        _describe_slice(data, place, len(stored), window, geometry)
    data.PixelData = stored.tobytes()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta = meta
    buffer = io.BytesIO()
    dcmwrite(buffer, data, enforce_file_format=True)
    path.write_bytes(buffer.getbuffer())
    return {"content": "magnitude", "slope": slope, "intercept": intercept}


_Place = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _place(geometry: Geometry, count: int, path: Path) -> _Place | None:
    """Down a column, along a row, slice to slice (mm per index) and origin, in LPS; None where it is not known."""
    if geometry.affine is None:
        return None
    columns = np.array(geometry.affine)[:3] * _LPS[:, None]
    down, along, step, origin = columns.T
    normal = np.cross(along, down)
    if count == 1 and not step.any() and normal.any():  # one echo of several
        step = normal / np.linalg.norm(normal) * (geometry.voxel_size or (1.0, 1.0, 1.0))[2]
    lengths = [float(np.linalg.norm(axis)) for axis in (down, along, step)]
    if lengths[2] == 0 and min(lengths[:2]) > 0:
        errors.warn(
            f"{path}: several images in one place, which we do not write as DICOM: written without place and orientation"
        )
        return None
    if min(lengths) <= 0 or abs(float(down @ along)) > 1e-4 * lengths[0] * lengths[1]:
        errors.warn(f"{path}: its affine is sheared, which DICOM cannot say: written without place and orientation")
        return None
    return down, along, step, origin


def _sop_class(many: bool, placed: bool) -> Any:
    from pydicom import uid

    if placed:
        return uid.EnhancedMRImageStorage if many else uid.MRImageStorage
    return uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage if many else uid.SecondaryCaptureImageStorage


def _describe(data: Dataset, name: str, placed: bool) -> None:
    """Patient (nobody), study, series, equipment."""
    from pydicom.uid import generate_uid

    data.PatientName = data.PatientID = data.PatientBirthDate = data.PatientSex = ""
    data.StudyDate = data.StudyTime = data.StudyID = data.AccessionNumber = data.ReferringPhysicianName = ""
    data.Modality = "MR"
    data.SeriesNumber = data.InstanceNumber = 1
    data.SeriesDescription = "tunemri reconstruction"
    data.Manufacturer = data.ManufacturerModelName = "tunemri"
    data.SoftwareVersions = __version__
    data.DeviceSerialNumber = "0"
    data.ConversionType = "WSD"
    if placed:
        data.FrameOfReferenceUID = generate_uid(entropy_srcs=["FrameOfReferenceUID", name])
        data.PositionReferenceIndicator = ""
        del data.ConversionType


def _describe_pixels(data: Dataset, stored: np.ndarray, slope: float, intercept: float) -> None:
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.Rows, data.Columns = stored.shape[1:]
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.ImageType = ["DERIVED", "PRIMARY"]
    data.BurnedInAnnotation = "NO"
    data.LossyImageCompression = "00"
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = slope, intercept, "US"


def _describe_slice(data: Dataset, place: _Place | None, frames: int, window: float, geometry: Geometry) -> None:
    """One frame, or frames that lie nobody knows where."""
    from pydicom.tag import Tag

    data.WindowCenter, data.WindowWidth = _decimal(window / 2), _decimal(window)
    if geometry.voxel_size is not None:
        data.PixelSpacing = [_decimal(v) for v in geometry.voxel_size[:2]]
        data.SliceThickness = _decimal(geometry.voxel_size[2])
    if frames > 1:
        data.NumberOfFrames = frames
        data.PresentationLUTShape = "IDENTITY"
        if geometry.voxel_size is not None:
            data.SpacingBetweenSlices = _decimal(geometry.voxel_size[2])
        data.FrameIncrementPointer = Tag("PageNumberVector")
        data.PageNumberVector = list(range(1, frames + 1))
    if place is None:
        return
    down, along, step, origin = place
    data.PixelSpacing = [_decimal(np.linalg.norm(axis)) for axis in (down, along)]
    data.SliceThickness = _decimal(np.linalg.norm(step))
    data.SpacingBetweenSlices = data.SliceThickness
    data.ImageOrientationPatient = _directions(place)
    data.ImagePositionPatient = [_decimal(v) for v in origin]
    data.private_block(*_OWN, create=True).add_new(_STEP, "DS", [_decimal(v) for v in step])
    # Of the acquisition nothing is known; these must be there.
    data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "RM", "NONE", ""
    data.MRAcquisitionType = data.RepetitionTime = data.EchoTime = data.EchoTrainLength = None


def _describe_frames(
    data: Dataset, place: _Place, frames: int, slope: float, intercept: float, window: float, geometry: Geometry
) -> None:
    """The functional groups of an Enhanced MR Image: what all frames share, and where each lies."""
    from pydicom import Dataset, Sequence
    from pydicom.tag import Tag
    from pydicom.uid import generate_uid

    def group(**values: Any) -> Sequence:
        item = Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        return Sequence([item])

    del data.RescaleSlope, data.RescaleIntercept, data.RescaleType
    down, along, step, origin = place
    kind = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    shared = Dataset()
    shared.PixelMeasuresSequence = group(
        PixelSpacing=[_decimal(np.linalg.norm(axis)) for axis in (down, along)],
        SliceThickness=_decimal(np.linalg.norm(step)), SpacingBetweenSlices=_decimal(np.linalg.norm(step)),
    )  # fmt: skip
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=_directions(place))
    shared.PixelValueTransformationSequence = group(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US")
    shared.FrameVOILUTSequence = group(WindowCenter=_decimal(window / 2), WindowWidth=_decimal(window))
    shared.MRImageFrameTypeSequence = group(
        FrameType=kind, PixelPresentation="MONOCHROME", VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE", ComplexImageComponent="MAGNITUDE", AcquisitionContrast="UNKNOWN",
    )  # fmt: skip
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    each = []
    for index in range(frames):
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[_decimal(v) for v in origin + index * step])
        frame.FrameContentSequence = group(
            StackID="1", InStackPositionNumber=index + 1, DimensionIndexValues=[1, index + 1]
        )
        each.append(frame)
    data.PerFrameFunctionalGroupsSequence = Sequence(each)
    data.NumberOfFrames = frames
    # Demanded here; nowhere else, where it would only make the same image another file.
    now = datetime.datetime.now()
    data.ContentDate, data.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    data.ImageType = kind
    data.PixelPresentation, data.VolumetricProperties, data.VolumeBasedCalculationTechnique = (
        "MONOCHROME",
        "VOLUME",
        "NONE",
    )
    data.ComplexImageComponent, data.AcquisitionContrast = "MAGNITUDE", "UNKNOWN"
    data.PresentationLUTShape = "IDENTITY"
    data.AcquisitionContextSequence = Sequence()
    organisation = generate_uid(entropy_srcs=["DimensionOrganizationUID", str(data.SOPInstanceUID)])
    data.DimensionOrganizationSequence = group(DimensionOrganizationUID=organisation)
    content = Tag("FrameContentSequence")
    pointers: list[Dataset] = []
    for keyword in ("StackID", "InStackPositionNumber"):
        pointers += group(
            DimensionOrganizationUID=organisation, DimensionIndexPointer=Tag(keyword), FunctionalGroupPointer=content
        )
    data.DimensionIndexSequence = Sequence(pointers)


def _directions(place: _Place) -> list[float]:
    down, along = (axis / np.linalg.norm(axis) for axis in place[:2])
    return [_decimal(v) for v in (*along, *down)]


def _decimal(value: Any) -> float:
    """A number that fits DICOM's decimal string of sixteen characters."""
    return float(f"{float(value):.8e}")
