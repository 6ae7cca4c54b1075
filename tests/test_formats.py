"""Reading and writing: what goes in comes out, whatever the format, and nothing half-written is ever left."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from scipy.io import savemat
from torch import Tensor

import malformed
from malformed import fastmri, image, kspace, lines
from tunemri import errors, files, formats
from tunemri.formats import READERS, WRITERS, Image
from tunemri.fourier import fft2
from tunemri.scan import Geometry, Reconstruction, Scan, normalise

HOLDS_SCANS = {".h5", ".npy", ".cfl"}
KEEPS_PHASE = {".h5", ".npy", ".cfl"}
HAS_GEOMETRY = {".h5", ".nii", ".nii.gz", ".dcm", ".cfl"}

GEOMETRY = Geometry(
    voxel_size=(0.5, 0.75, 4.0),
    affine=((0.0, 0.75, 0.0, -10.0), (0.5, 0.0, 0.0, 20.0), (0.0, 0.0, 4.0, 5.0), (0.0, 0.0, 0.0, 1.0)),
)


def scan(b: int = 2, c: int = 3, h: int = 9, w: int = 14, *, seed: int = 0, **fields: Any) -> Scan:
    """Random k-space with its energy in the centre, sampled in 2-D, differently in every slice."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(b, 1, h, w, generator=g) < 0.6).float()
    mask[..., h // 2, w // 2] = 1
    y = torch.randn(b, c, h, w, dtype=torch.complex64, generator=g)
    y[..., h // 2, w // 2] += 20
    csm = torch.randn(1, c, h, w, dtype=torch.complex64, generator=g)
    contents = {"mask": mask, "csm": csm, "noise_std": 0.25, "geometry": GEOMETRY, **fields}
    return Scan(kspace=y * contents["mask"], image_shape=(h, w), **contents)


def pixels(b: int = 2, h: int = 9, w: int = 14) -> Tensor:
    return torch.randn(b, h, w, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)) + 0.5


def reconstruction(**fields: Any) -> Reconstruction:
    return Reconstruction(image=pixels(), **fields)


@pytest.mark.parametrize("suffix", WRITERS)
def test_reconstruction_comes_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    out = reconstruction(variance=torch.ones(2, 9, 14), dials={"lam": 0.1}, stats={"iterations": 7})
    notes = formats.write(path, out, geometry=GEOMETRY)
    assert json.loads(json.dumps(notes)) == notes
    assert notes["content"] == ("complex" if suffix in KEEPS_PHASE else "magnitude")
    back = formats.read_image(path)
    if suffix == ".png":
        top = notes["window"][1]
        sheet = torch.cat(list((255 * out.magnitude / top).clip(max=255)), dim=-1)  # two slices, side by side
        assert float((back.data[0] - sheet).abs().max()) <= 0.5 + 1e-3
    elif suffix == ".dcm":
        assert float((back.data - out.magnitude).abs().max()) <= 0.501 * notes["slope"], "half a step of 16 bits"
    elif back.data.is_complex():
        torch.testing.assert_close(back.data, out.image, rtol=0, atol=0)
    else:
        torch.testing.assert_close(back.data, out.magnitude, rtol=0, atol=0)
    if suffix in HAS_GEOMETRY:
        assert back.geometry.voxel_size == pytest.approx(GEOMETRY.voxel_size)
        assert np.allclose(back.geometry.affine or (), GEOMETRY.affine or ())


@pytest.mark.parametrize("suffix", sorted(HOLDS_SCANS))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 7, 5), (3, 1, 9, 14), (1, 4, 1, 12), (2, 3, 8, 6)])
@pytest.mark.filterwarnings("ignore::tunemri.errors.TunemriWarning")
def test_scan_comes_back(suffix: str, shape: tuple[int, int, int, int], tmp_path: Path) -> None:
    path, made = tmp_path / f"scan{suffix}", scan(*shape)
    assert formats.write(path, made)["content"] == "k-space"
    back = formats.read(path)
    torch.testing.assert_close(back.kspace, made.kspace, rtol=0, atol=0)
    assert back.image_shape == made.image_shape
    if suffix == ".npy":
        return
    assert made.mask is not None and back.mask is not None
    assert torch.equal(back.mask.expand(made.kspace.shape), made.mask.expand(made.kspace.shape))
    assert made.csm is not None and back.csm is not None
    torch.testing.assert_close(back.csm, made.csm, rtol=0, atol=0)
    assert back.noise_std == pytest.approx(made.noise_std)
    assert back.geometry == made.geometry
    assert back.provenance == "acquired"


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(["lines", "rows", "2-D", "per slice", "full"]),
    exponent=st.integers(-30, 30),
)
def test_any_mask_and_scale_come_back(
    shape: tuple[int, int, int, int], kind: str, exponent: int, tmp_path: Path
) -> None:
    b, _, h, w = shape
    size = {
        "lines": (1, 1, 1, w),
        "rows": (1, 1, h, 1),
        "2-D": (1, 1, h, w),
        "per slice": (b, 1, h, w),
        "full": (1, 1, 1, w),
    }[kind]
    mask = (torch.rand(size, generator=torch.Generator().manual_seed(b)) < 0.7).float().expand(-1, -1, -1, w).clone()
    mask[..., mask.shape[-2] // 2, w // 2] = 1
    mask = torch.ones_like(mask) if kind == "full" else mask
    made = scan(*shape, mask=mask)
    made = dataclasses.replace(made, kspace=made.kspace * 10.0**exponent)
    formats.write(tmp_path / "a.h5", made, overwrite=True)
    back = formats.read(tmp_path / "a.h5")
    torch.testing.assert_close(back.kspace, made.kspace, rtol=0, atol=0)
    assert back.mask is not None and torch.equal(back.mask.expand(b, 1, h, w), mask.expand(b, 1, h, w))


def test_simulated_stays_simulated(tmp_path: Path) -> None:
    formats.write(tmp_path / "a.h5", scan(provenance="simulated: phantom, 8 coils"))
    assert formats.read(tmp_path / "a.h5").provenance == "simulated: phantom, 8 coils"
    assert formats.inspect(tmp_path / "a.h5")["provenance"] == "simulated: phantom, 8 coils"


def test_normalised_scan_is_written_in_its_own_units(tmp_path: Path) -> None:
    made = scan()
    formats.write(tmp_path / "a.h5", normalise(made))
    back = formats.read(tmp_path / "a.h5")
    torch.testing.assert_close(back.kspace, made.kspace, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coils", [1, 3])
def test_reference_lies_where_fastmri_keeps_it(coils: int, tmp_path: Path) -> None:
    x = pixels()
    formats.write(tmp_path / "a.h5", scan(c=coils), reference=x)
    with h5py.File(tmp_path / "a.h5") as h:
        assert h["kspace"].shape == ((2, 9, 14) if coils == 1 else (2, coils, 9, 14))
        assert h["kspace"].fletcher32
        stored = h["reconstruction_esc" if coils == 1 else "reconstruction_rss"]
        assert stored.dtype == np.float32
        assert h.attrs["max"] == pytest.approx(float(x.abs().max()))
        assert b"<encodedSpace><matrixSize><x>9</x><y>14</y>" in h["ismrmrd_header"][()]
        assert h.attrs["acceleration"] == pytest.approx(scan().acceleration)
    found = formats.read_reference(tmp_path / "a.h5", slices=slice(1, 2))
    assert found is not None
    torch.testing.assert_close(found, x.abs()[1:])
    torch.testing.assert_close(formats.read_image(tmp_path / "a.h5", prefer="reference").data, x.abs())


def test_fastmri_evaluation_finds_the_reconstruction(tmp_path: Path) -> None:
    formats.write(tmp_path / "a.h5", reconstruction(status="converged", dials={"lam": 0.1}))
    with h5py.File(tmp_path / "a.h5") as h:
        assert h["reconstruction"].shape == (2, 9, 14)
        assert h["reconstruction"].dtype == np.float32
        assert json.loads(h.attrs["dials"]) == {"lam": 0.1}


def test_a_zero_filled_image_is_no_reference(tmp_path: Path) -> None:
    y = kspace() * lines()
    zero_filled = np.sqrt(
        (
            np.abs(np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(y, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))) ** 2
        ).sum(1)
    )
    path = fastmri(tmp_path, kspace=y, mask=lines(), reconstruction_rss=7 * zero_filled)
    with pytest.warns(errors.TunemriWarning, match="zero-filled"):
        assert formats.read_reference(path) is None
    assert formats.read_reference(fastmri(tmp_path)) is None
    full = fastmri(tmp_path, reconstruction_rss=np.abs(image()))
    assert formats.read_reference(full) is not None


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".cfl"])
@pytest.mark.parametrize("slices", [slice(1, 3), slice(None, 1), slice(-1, None), slice(2, 99)])
@pytest.mark.filterwarnings("ignore::tunemri.errors.TunemriWarning")
def test_slices_are_those_of_the_whole(suffix: str, slices: slice, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    formats.write(path, scan(4))
    whole, part = formats.read(path), formats.read(path, slices=slices)
    assert torch.equal(part.kspace, whole.kspace[slices])
    assert whole.mask is not None and part.mask is not None
    assert torch.equal(part.mask.expand(-1, -1, 9, 14), whole.mask.expand(4, -1, 9, 14)[slices].expand(-1, -1, 9, 14))
    if suffix == ".h5":
        assert part.geometry.affine is not None
        assert part.geometry.affine[2][3] == 5.0 + 4.0 * range(4)[slices][0], "the origin moves with the slices"


@pytest.mark.parametrize("suffix", [s for s in WRITERS if s != ".png"])
def test_slices_of_an_image(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    formats.write(path, Image(data=pixels(4)), geometry=GEOMETRY)
    whole, part = formats.read_image(path), formats.read_image(path, slices=slice(1, 3))
    assert torch.equal(part.data, whole.data[1:3])
    if suffix in HAS_GEOMETRY:
        assert part.geometry.affine is not None
        assert part.geometry.affine[2][3] == pytest.approx(9.0)


@pytest.mark.parametrize("slices", [slice(2, 2), slice(7, 9), slice(0, 2, 2)])
def test_empty_or_stepped_selections_are_refused(slices: slice, tmp_path: Path) -> None:
    with pytest.raises(errors.BadOption, match="slice"):
        formats.read(fastmri(tmp_path), slices=slices)


def test_a_single_image_is_a_stack_of_one(tmp_path: Path) -> None:
    for path in (fastmri(tmp_path, target=image()[0].real), tmp_path / "a.npy"):
        np.save(tmp_path / "a.npy", image()[0].real)
        assert formats.read_image(path, slices=slice(0, 1)).data.shape == (1, 32, 30)
        with pytest.raises(errors.BadOption, match="slice"):
            formats.read_image(path, slices=slice(1, 2))


def test_nifti_keeps_its_place(tmp_path: Path) -> None:
    """Index (row, column, slice) and affine are those that nibabel sees."""
    x = np.arange(4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3)
    stored = nibabel.Nifti1Image(x, np.array(GEOMETRY.affine))
    stored.header.set_slope_inter(2, 1)
    nibabel.save(stored, tmp_path / "a.nii.gz")
    found = formats.read_image(tmp_path / "a.nii.gz")
    assert found.data.shape == (3, 4, 5)
    seen = nibabel.load(tmp_path / "a.nii.gz")
    assert np.allclose(np.moveaxis(found.data.numpy(), 0, -1), seen.get_fdata())
    assert np.allclose(found.geometry.affine or (), seen.affine)
    formats.write(tmp_path / "b.nii", found)
    again = nibabel.load(tmp_path / "b.nii")
    assert np.allclose(again.affine, seen.affine)
    assert again.get_data_dtype() == np.float32


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_versions_and_unplaced_images(kind: type, tmp_path: Path) -> None:
    unplaced = kind(np.ones((4, 5), np.float32), None)
    nibabel.save(unplaced, tmp_path / "a.nii")
    found = formats.read_image(tmp_path / "a.nii")
    assert found.data.shape == (1, 4, 5)
    assert found.geometry.affine is None


def test_header_gives_the_voxel_size(tmp_path: Path) -> None:
    assert formats.read(fastmri(tmp_path)).geometry.voxel_size == pytest.approx((2.0, 1.5, 5.0))
    turned = fastmri(tmp_path, ismrmrd_header=malformed.header(30, 32, (45.0, 64.0, 5.0)))
    assert formats.read(turned).geometry.voxel_size == pytest.approx((2.0, 1.5, 5.0))
    placeholder = fastmri(tmp_path, ismrmrd_header=malformed.header(fov=(32.0, 30.0, 5.0)))
    assert formats.read(placeholder).geometry.voxel_size is None


@pytest.mark.parametrize(
    "mask",
    [lines(), lines()[None], lines().astype(bool), lines()[None, None, :, None], np.tile(lines(), (malformed.H, 1)),
     np.tile(lines(), (2, malformed.H, 1)), np.tile(lines(), (2, 1, 1, 1)).astype(np.int64)],
)  # fmt: skip
def test_shapes_of_masks(mask: np.ndarray, tmp_path: Path) -> None:
    found = formats.read(fastmri(tmp_path, kspace=kspace() * lines(), mask=mask))
    assert found.mask is not None
    assert torch.equal(found.mask.expand(2, 1, 32, 30)[1, 0, 7], torch.from_numpy(lines()))


def test_mask_along_rows_and_inferred_masks(tmp_path: Path) -> None:
    rows = (np.arange(malformed.H) % 2 == 0).astype(np.float32)[:, None]
    found = formats.read(fastmri(tmp_path, kspace=kspace() * rows, mask=rows))
    assert found.mask is not None and torch.equal(found.mask[0, 0, :, 3], torch.from_numpy(rows[:, 0]))
    for pattern, shape in ((rows, (1, 1, 32, 30)), (lines(), (1, 1, 1, 30))):
        with pytest.warns(errors.TunemriWarning, match="no mask"):
            found = formats.read(fastmri(tmp_path, kspace=kspace() * pattern))
        assert found.mask is not None and found.mask.shape == shape
        assert torch.equal(found.mask.expand(1, 1, 32, 30)[0, 0], torch.from_numpy(pattern).expand(32, 30))


@pytest.mark.parametrize("saver", ["npy", "npz", "mat", "h5", "png", "one of many"])
def test_read_mask(saver: str, tmp_path: Path) -> None:
    pattern = np.tile(lines(), (malformed.H, 1)).astype(np.uint8)
    path = tmp_path / f"mask.{'npz' if saver == 'one of many' else saver}"
    match saver:
        case "npy":
            np.save(path, pattern)
        case "npz":
            np.savez(path, m=pattern)
        case "one of many":
            np.savez(path, a=pattern[:3], mask=lines())
        case "mat":
            savemat(path, {"mask": pattern})
        case "h5":
            fastmri(tmp_path, path.name, mask=pattern)
        case "png":
            pillow.fromarray(255 * pattern).save(path)
    found = formats.read_mask(path, (malformed.H, malformed.W))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(pattern).float())
    with pytest.raises(errors.InconsistentShapes, match="mask"):
        formats.read_mask(path, (malformed.H, malformed.W + 1))


@pytest.mark.parametrize(("value", "error"), [(0.5, errors.UnsupportedLayout), (0.0, errors.NoData)])
def test_read_mask_refuses_what_is_none(value: float, error: type, tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.full((5, 5), value))
    with pytest.raises(error, match=r"m\.npy: mask"):
        formats.read_mask(tmp_path / "m.npy", (5, 5))


@pytest.mark.parametrize("mode", ["L", "I;16", "F", "RGB", "RGBA", "P", "1"])
def test_pictures(mode: str, tmp_path: Path) -> None:
    x = (np.abs(image()[0]) / np.abs(image()).max() * 250).round()
    match mode:
        case "I;16":
            picture, x = pillow.fromarray((x * 200).astype(np.uint16)), x * 200
        case "F":
            picture = pillow.fromarray(x.astype(np.float32))
        case "1":
            picture, x = pillow.fromarray(x > 100), (x > 100).astype(float)
        case _:
            picture = pillow.fromarray(x.astype(np.uint8)).convert(mode)
    picture.save(tmp_path / "a.tif")
    found = formats.read_image(tmp_path / "a.tif").data
    assert found.shape == (1, 32, 30)
    assert float((found[0] - torch.from_numpy(x)).abs().max()) < 1e-3


def test_colour_is_said_and_pages_are_slices(tmp_path: Path) -> None:
    red = pillow.new("RGB", (5, 4), (200, 0, 0))
    red.save(tmp_path / "red.png")
    with pytest.warns(errors.TunemriWarning, match="colour"):
        assert float(formats.read_image(tmp_path / "red.png").data[0, 0, 0]) == pytest.approx(200 * 0.299)
    pages = [pillow.fromarray(np.full((4, 5), n, np.uint8)) for n in (1, 2, 3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert formats.read_image(tmp_path / "stack.tif").data[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["a.cfl", "a.hdr", "a"])
def test_cfl_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    formats.write(tmp_path / "a.cfl", scan(mask=torch.ones(1, 1, 1, 14)))
    assert (tmp_path / "a.hdr").read_text().split("\n")[1].split()[:4] == ["9", "14", "1", "3"]
    assert len(formats.read(tmp_path / name)) == 2


def test_three_axes_are_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", kspace()[0])
    with pytest.warns(errors.TunemriWarning, match="coils, rows, columns"):
        assert formats.read(tmp_path / "a.npy").coils == malformed.C
    single = fastmri(tmp_path, kspace=kspace()[:, 0])
    assert formats.read(single).kspace.shape == (2, 1, 32, 30), "in a fastMRI file the first of three counts slices"


# ---------------------------------------------------------------- inspect


@pytest.mark.parametrize("suffix", WRITERS)
def test_inspect_every_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    formats.write(path, reconstruction(), geometry=GEOMETRY)
    report = formats.inspect(path)
    assert json.loads(json.dumps(report)) == report
    assert report["kind"] in READERS
    assert report["arrays"] and report["can"] and report["image_shape"]


@pytest.mark.filterwarnings("error")
def test_inspect_a_scan(tmp_path: Path) -> None:
    pattern = torch.from_numpy(lines())[None, None, None]
    y = torch.from_numpy(kspace())
    made = Scan(kspace=y * pattern, mask=pattern, image_shape=(32, 30), geometry=GEOMETRY, provenance="simulated: test")
    formats.write(tmp_path / "a.h5", made, reference=torch.from_numpy(image()))
    report = formats.inspect(tmp_path / "a.h5")
    expected = {
        "kind": "hdf5", "content": "k-space on a grid", "slices": 2, "coils": 4, "image_shape": [32, 30], "mask": "columns", "csm": False,
        "reference": True, "provenance": "simulated: test", "warnings": [], "voxel_size_mm": [0.5, 0.75, 4.0],
    }  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    assert report["acceleration"] == pytest.approx(made.acceleration, abs=1e-3)
    assert any("recon" in sentence for sentence in report["can"])
    assert formats.inspect(fastmri(tmp_path))["mask"] == "full"


def test_inspect_says_what_is_missing(tmp_path: Path) -> None:
    pillow.fromarray(np.full((4, 5), 7, np.uint8)).save(tmp_path / "a.png")
    report = formats.inspect(tmp_path / "a.png")
    assert any("simulate" in sentence for sentence in report["cannot"])
    with pytest.raises(errors.UnreadableFile, match=r"a\.h5"):
        formats.inspect(malformed.raw(tmp_path, "a.h5", b"text"))


# ---------------------------------------------------------------- writing safely


@pytest.mark.parametrize("suffix", WRITERS)
def test_nothing_is_overwritten_unasked(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    formats.write(path, reconstruction())
    before = path.read_bytes()
    with pytest.raises(errors.BadOption, match="--overwrite") as caught:
        formats.write(path, Image(data=pixels(1)))
    assert caught.value.exit_code == 2
    with pytest.raises(errors.BadOption, match="--overwrite"):
        formats.check_writable(path)
    formats.check_writable(path, overwrite=True)
    assert path.read_bytes() == before
    formats.write(path, Image(data=pixels(1)), overwrite=True)
    assert path.read_bytes() != before
    assert {p.suffix for p in tmp_path.iterdir()} <= {path.suffix, ".hdr"}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("earlier", [False, True])
def test_full_disk_leaves_everything_as_it_was(suffix: str, earlier: bool, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if earlier:
        formats.write(path, reconstruction())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    noise = Image(data=torch.rand(1, 300, 300, generator=torch.Generator().manual_seed(0)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel now refuses as a full disk does
        with pytest.raises(errors.NoSpace, match=r"a\." + suffix[1:].replace(".", r"\.")) as caught:
            formats.write(path, noise, overwrite=earlier)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 3
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_never_written(suffix: str, value: float, tmp_path: Path) -> None:
    x = pixels()
    x[1, 2, 3] = value
    with pytest.raises(errors.NonFinite, match="image"):
        formats.write(tmp_path / f"a{suffix}", Reconstruction(image=x))
    with pytest.raises(errors.NonFinite, match="variance"):
        formats.write(tmp_path / f"a{suffix}", reconstruction(variance=x.real))
    assert list(tmp_path.iterdir()) == []


def test_nan_reference_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(errors.NonFinite, match="reference"):
        formats.write(tmp_path / "a.h5", scan(), reference=torch.full((2, 9, 14), float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone" / "a.h5"
    for attempt in (lambda: formats.write(gone, scan()), lambda: formats.check_writable(gone)):
        with pytest.raises(errors.BadOption, match="folder .* does not exist") as caught:
            attempt()
        assert caught.value.exit_code == 3
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(errors.BadOption, match="a folder"):
        formats.write(tmp_path / "folder.h5", scan(), overwrite=True)
    with pytest.raises(errors.BadOption, match="not an ordinary file"):
        files.check_target("/dev/null", overwrite=True)
    with pytest.raises(errors.BadOption, match="(?i)name too long"):
        formats.write(tmp_path / ("a" * 300 + ".h5"), scan())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(errors.BadOption, match="permission") as caught:
        formats.write(tmp_path / "a.h5", scan())
    assert caught.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["folder.h5"]


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.h5.txt", "a.gz"])
def test_unknown_suffixes_list_the_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.BadOption, match=r"\.nii\.gz"):
        formats.write(tmp_path / name, scan())


@pytest.mark.parametrize("suffix", sorted(set(WRITERS) - HOLDS_SCANS))
def test_formats_of_images_refuse_scans(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(errors.BadOption, match="k-space"):
        formats.write(tmp_path / f"a{suffix}", scan())
    assert list(tmp_path.iterdir()) == []


def test_reference_goes_with_a_scan_in_h5(tmp_path: Path) -> None:
    with pytest.raises(errors.BadOption, match="reference"):
        formats.write(tmp_path / "a.npy", scan(), reference=pixels())
    with pytest.raises(errors.BadOption, match="reference"):
        formats.write(tmp_path / "a.h5", reconstruction(), reference=pixels())
    with pytest.raises(errors.InconsistentShapes, match="reference"):
        formats.write(tmp_path / "a.h5", scan(), reference=pixels(3))
    assert list(tmp_path.iterdir()) == []


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("earlier")

    def interrupted() -> None:
        with files.write_atomically(path, overwrite=True) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["a.txt"]
    with files.write_atomically(path, overwrite=True) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "earlier"
    assert path.read_text() == "new"
    with pytest.raises(errors.BadOption, match="exists"), files.write_atomically(tmp_path / "b") as temporary:
        (tmp_path / "b").write_text("somebody was quicker")
    assert (tmp_path / "b").read_text() == "somebody was quicker"


def test_write_folder_atomically(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def failing() -> None:
        with files.write_folder_atomically(run) as temporary:
            (temporary / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert os.listdir(tmp_path) == []
    with files.write_folder_atomically(run) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(errors.BadOption, match="--overwrite"), files.write_folder_atomically(run):
        pass
    with files.write_folder_atomically(run, overwrite=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("2")
    assert (run / "a").read_text() == "1" and (run / "sub" / "b").read_text() == "2"
    assert os.listdir(tmp_path) == ["run"]
    (tmp_path / "file").write_text("")
    for make in (files.make_folder, lambda p: files.write_folder_atomically(p).__enter__()):
        with pytest.raises(errors.BadOption, match="not a folder"):
            make(tmp_path / "file")


def test_same_file_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = malformed.raw(tmp_path, "a", b"abc")
    (tmp_path / "link").symlink_to(a)
    assert files.same_file("a", tmp_path / "link") and files.same_file("./x", tmp_path / "x")
    assert not files.same_file("a", "b")
    assert files.sha256(a) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_every_kind_is_sniffed(tmp_path: Path) -> None:
    """Each reader's kind is recognised from content alone, under a name that says nothing."""
    builders = {case.name: case.build for case in malformed.ACCEPTED}
    for kind, name in {"hdf5": "plain", "npy": "npy", "npz": "npz", "mat5": "mat 5", "mat73": "mat 7.3"}.items():
        assert files.sniff(builders[name](tmp_path).rename(tmp_path / "file")) == kind
    for suffix, kind in {".nii": "nifti", ".nii.gz": "nifti", ".png": "png"}.items():
        formats.write(tmp_path / f"a{suffix}", Image(data=pixels()))
        assert files.sniff((tmp_path / f"a{suffix}").rename(tmp_path / "file")) == kind
    for kind, saved in {"jpeg": "JPEG", "tiff": "TIFF"}.items():
        pillow.new("L", (9, 9)).save(tmp_path / "file", format=saved)
        assert files.sniff(tmp_path / "file") == kind


def test_kspace_and_image_agree_across_formats(tmp_path: Path) -> None:
    """The k-space that a file gives is that of the image: rows stay rows in every format."""
    x = pixels()
    made = Scan(kspace=fft2(x)[:, None], mask=torch.ones(1, 1, 1, 14), image_shape=(9, 14))
    for suffix in sorted(HOLDS_SCANS):
        formats.write(tmp_path / f"k{suffix}", made)
        formats.write(tmp_path / f"x{suffix}", Reconstruction(image=x))
        k = formats.read(tmp_path / f"k{suffix}").kspace[:, 0]
        found = formats.read_image(tmp_path / f"x{suffix}").data
        torch.testing.assert_close(fft2(found if found.is_complex() else x), k)


def test_image_invariants() -> None:
    for data, error in (
        (torch.ones(2, 2), errors.UnsupportedLayout), (torch.ones(1, 2, 2, dtype=torch.float64), errors.UnsupportedLayout),
        (torch.ones(0, 2, 2), errors.NoData), (torch.zeros(1, 2, 2), errors.NoData),
        (torch.full((1, 2, 2), float("nan")), errors.NonFinite),
    ):  # fmt: skip
        with pytest.raises(error):
            Image(data=data)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Image(data=torch.ones(1, 2, 2)).data = torch.ones(1)  # type: ignore[misc]
