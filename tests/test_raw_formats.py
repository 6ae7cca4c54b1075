"""Raw data of scanners: what the readouts say, the image shows, in its place; and what leaves tunemri is readable elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import malformed
from malformed import (
    B,
    C,
    H,
    W,
    fastmri,
    images_of_coils,
    ismrmrd_hdf5,
    ismrmrd_stream,
    mrd_header,
    noise_readout,
    readouts,
)
from tunemri import errors, formats
from tunemri.formats import Image
from tunemri.fourier import fft2, ifft2
from tunemri.operators import NonCartesian
from tunemri.scan import Geometry, Reconstruction, Scan
from tunemri.simulate import phantom
from tunemri.solvers import cg

FILES = [ismrmrd_hdf5, ismrmrd_stream]
both = pytest.mark.parametrize("save", FILES, ids=["hdf5", "stream"])
Save = Callable[..., Path]


def truth() -> Tensor:
    return torch.from_numpy(images_of_coils()).to(torch.complex64)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------- ISMRMRD


@both
@pytest.mark.parametrize("oversampling", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_image_is_the_image_in_place(save: Save, oversampling: int, reverse: bool, tmp_path: Path) -> None:
    path = save(
        tmp_path,
        [noise_readout(), *readouts(oversampling=oversampling, reverse=reverse)],
        mrd_header(oversampling=oversampling),
    )
    scan = formats.read(path)
    assert scan.image_shape == (H, W)
    assert scan.acceleration == 1 and scan.provenance == "acquired"
    assert distance(ifft2(scan.kspace), truth()) < 1e-5
    assert scan.noise_std == pytest.approx(0.1, rel=0.02)


@both
def test_order_of_readouts_does_not_matter(save: Save, tmp_path: Path) -> None:
    shuffled = readouts()
    np.random.default_rng(0).shuffle(shuffled)  # type: ignore[arg-type]
    assert distance(ifft2(formats.read(save(tmp_path, shuffled)).kspace), truth()) < 1e-5


@pytest.mark.parametrize("centre", [W // 2, 7])
def test_partial_fourier_keeps_the_centre(centre: int, tmp_path: Path) -> None:
    """The first lines are missing; the counter of the zero frequency comes from the encoding limits."""
    first = W // 2 - 7
    path = ismrmrd_hdf5(
        tmp_path, readouts(lines=range(first, W), centre=centre), mrd_header(lines=(0, W - 1 - first, centre))
    )
    scan = formats.read(path)
    assert scan.mask is not None
    assert scan.mask[0, 0, 0].tolist() == [0.0] * first + [1.0] * (W - first)
    assert distance(scan.kspace, fft2(truth()) * scan.mask) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_asymmetric_echoes(reverse: bool, tmp_path: Path) -> None:
    scan = formats.read(ismrmrd_hdf5(tmp_path, readouts(first_sample=9, reverse=reverse)))
    assert scan.mask is not None
    assert scan.mask[0, 0, :, 3].tolist() == [0.0] * 9 + [1.0] * (H - 9)
    assert distance(scan.kspace, fft2(truth()) * scan.mask) < 1e-5


def test_asymmetric_echoes_with_oversampling(tmp_path: Path) -> None:
    path = ismrmrd_hdf5(tmp_path, readouts(first_sample=18, oversampling=2), mrd_header(oversampling=2))
    scan = formats.read(path)
    assert scan.mask is not None
    sampled = scan.mask[0, 0, :, 3]
    assert sampled.tolist() == [0.0] * 13 + [1.0] * (H - 17) + [0.0] * 4, "four samples beside each end are given up"
    assert distance(scan.kspace, fft2(truth()) * scan.mask) < 2e-2


@pytest.mark.parametrize("reverse", [False, True])
def test_discarded_samples(reverse: bool, tmp_path: Path) -> None:
    """What is to be discarded may hold anything."""
    lines = readouts(reverse=reverse)
    for one in lines:
        one.discard_pre, one.discard_post = 3, 2
        one.data[:, :3], one.data[:, -2:] = 99, 77
    scan = formats.read(ismrmrd_hdf5(tmp_path, lines))
    assert scan.mask is not None and float(scan.kspace.abs().max()) < 50
    assert distance(scan.kspace, fft2(truth()) * scan.mask) < 1e-5


def test_averages_are_their_mean_and_their_noise_is_less(tmp_path: Path) -> None:
    once, twice = readouts(), readouts(average=1)
    for one in once:
        one.data[:] *= 3
    scan = formats.read(ismrmrd_hdf5(tmp_path, [noise_readout(), *once, *twice]))
    assert distance(ifft2(scan.kspace), 2 * truth()) < 1e-5
    assert scan.noise_std == pytest.approx(0.1 / np.sqrt(2), rel=0.02)
    with pytest.warns(errors.TunemriWarning, match="1 to 2 times"):
        formats.read(ismrmrd_hdf5(tmp_path, [*once, *twice[3:]]))


def test_noise_is_that_of_the_bandwidth_of_the_image(tmp_path: Path) -> None:
    """Four times the bandwidth has four times the noise power."""
    path = ismrmrd_hdf5(tmp_path, [noise_readout(0.2, dwell=1.0), *readouts()])
    noise = formats.read_noise(path)
    assert noise is not None and noise.shape == (C, 4096)
    assert formats.read(path).noise_std == pytest.approx(0.1, rel=0.02)
    assert float(noise.abs().square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)
    assert formats.read_noise(ismrmrd_hdf5(tmp_path, readouts())) is None
    assert formats.read_noise(fastmri(tmp_path)) is None


@pytest.mark.parametrize("mode", ["embedded", "separate"])
def test_calibration_lines(mode: str, tmp_path: Path) -> None:
    """Lines of an embedded calibration fill gaps and change nothing else; those of a separate scan are left out."""
    middle = list(range(W // 2 - 3, W // 2 + 3))
    calibration = readouts(lines=middle)
    for one in calibration:
        one.set_flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
        if one.idx.kspace_encode_step_1 % 2:
            one.data[:] = 1000  # measured by the image as well, which counts
    path = ismrmrd_hdf5(tmp_path, [*calibration, *readouts(lines=range(1, W, 2))], mrd_header(calibration=mode))
    if mode == "separate":
        with pytest.warns(errors.TunemriWarning, match="12 readouts of a separate calibration"):
            scan = formats.read(path)
    else:
        scan = formats.read(path)
    assert scan.mask is not None
    wanted = [float(w % 2 == 1 or (mode == "embedded" and w in middle)) for w in range(W)]
    assert scan.mask[0, 0, 0].tolist() == wanted
    assert distance(scan.kspace, fft2(truth()) * scan.mask) < 1e-5


def test_echoes_are_slices_with_a_word_about_it(tmp_path: Path) -> None:
    second = readouts(contrast=1)
    for one in second:
        one.data[:] *= 2j
    path = ismrmrd_hdf5(tmp_path, [*second, *readouts()])
    with pytest.warns(errors.TunemriWarning, match="contrast × 2, slice × 2: read as 4 slices"):
        scan = formats.read(path)
    assert distance(ifft2(scan.kspace), torch.cat([truth(), 2j * truth()])) < 1e-5
    assert scan.geometry.affine is None, "echoes do not lie beside each other"
    with pytest.warns(errors.TunemriWarning, match="read as 4 slices"):
        part = formats.read(path, slices=slice(2, 4))
    assert torch.equal(part.kspace, scan.kspace[2:])
    assert part.geometry.affine is not None


def test_slices_lie_in_space_whatever_their_number(tmp_path: Path) -> None:
    """Interleaved slices: the first measured lies last."""
    swapped = readouts()
    for one in swapped:
        one.position[:] = (3.0, 4.0, -6.0 * one.idx.slice)
    scan = formats.read(ismrmrd_hdf5(tmp_path, swapped))
    assert distance(ifft2(scan.kspace), truth().flip(0)) < 1e-5


@both
def test_affine_is_that_of_the_directions(save: Save, tmp_path: Path) -> None:
    """The centre of the image, index N // 2, is the position in LPS; the affine counts in RAS."""
    scan = formats.read(save(tmp_path, readouts()))
    assert scan.geometry.voxel_size == pytest.approx((2.0, 1.5, 6.0))
    affine = np.array(scan.geometry.affine)
    for b in range(B):
        assert affine @ [H // 2, W // 2, b, 1] == pytest.approx([-3.0, -4.0, 6.0 * b, 1.0])
    assert affine @ [1, 0, 0, 0] == pytest.approx([0, -2.0, 0, 0]), "rows along the readout, y of the patient"
    assert affine @ [0, 1, 0, 0] == pytest.approx([-1.5, 0, 0, 0])
    one = formats.read(save(tmp_path, readouts()), slices=slice(1, 2))
    assert np.array(one.geometry.affine)[:, 3] == pytest.approx(affine @ [0, 0, 1, 1])


def test_echoes_of_one_slice_lie_in_its_place(tmp_path: Path) -> None:
    """No step from one to the next: NIfTI counts them along its fourth axis, and reads them back from there."""
    import nibabel

    first = readouts(coil_images=images_of_coils()[:1])
    second = readouts(coil_images=2 * images_of_coils()[:1], contrast=1)
    with pytest.warns(errors.TunemriWarning, match="contrast × 2"):
        scan = formats.read(ismrmrd_hdf5(tmp_path, [*first, *second]))
    affine = np.array(scan.geometry.affine)
    for b in range(2):
        assert affine @ [H // 2, W // 2, b, 1] == pytest.approx([-3.0, -4.0, 0.0, 1.0])
    image = Image(data=ifft2(scan.kspace).abs().sum(1), geometry=scan.geometry)
    formats.write(tmp_path / "a.nii.gz", image)
    seen = nibabel.load(tmp_path / "a.nii.gz")
    assert seen.shape == (H, W, 1, 2)
    assert seen.affine @ [H // 2, W // 2, 0, 1] == pytest.approx([-3.0, -4.0, 0.0, 1.0])
    assert abs(seen.affine[2, 2]) == pytest.approx(5.0), "the thickness that the header gives"
    back = formats.read_image(tmp_path / "a.nii.gz")
    torch.testing.assert_close(back.data, image.data)
    assert np.array(back.geometry.affine) == pytest.approx(affine)
    part = formats.read_image(tmp_path / "a.nii.gz", slices=slice(1, 2))
    assert torch.equal(part.data, back.data[1:]) and part.geometry.affine == back.geometry.affine
    with pytest.warns(errors.TunemriWarning, match="in one place"):
        formats.write(tmp_path / "a.dcm", image)
    formats.write(tmp_path / "b.dcm", part)
    alone = np.array(formats.read_image(tmp_path / "b.dcm").geometry.affine)
    assert alone[:, [0, 1, 3]] == pytest.approx(affine[:, [0, 1, 3]], abs=1e-4)
    assert np.linalg.norm(alone[:3, 2]) == pytest.approx(5.0)


def test_one_millimetre_is_believed_where_the_place_is_known(tmp_path: Path) -> None:
    """Converters that know nothing write 1 mm and no position."""
    xml = mrd_header().replace(f"<x>{2.0 * H}</x><y>{1.5 * W}</y>", f"<x>{H}</x><y>{W}</y>")
    assert formats.read(ismrmrd_hdf5(tmp_path, readouts(), xml)).geometry.voxel_size == pytest.approx((1, 1, 6))
    nowhere = readouts()
    for one in nowhere:
        one.position[:] = (0, 0, 0)
    assert formats.read(ismrmrd_hdf5(tmp_path, nowhere, xml)).geometry == Geometry()


def test_partitions_become_slices(tmp_path: Path) -> None:
    x = images_of_coils()[:1] * np.array([1, 2, 3j, 4])[:, None, None, None]
    y = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(x, axes=0), axis=0, norm="ortho"), axes=0)
    lines = [one for z in range(4) for one in readouts(coil_images=y[z : z + 1], kspace_encode_step_2=z)]
    path = ismrmrd_hdf5(tmp_path, lines, mrd_header(partitions=4))
    scan = formats.read(path)
    assert distance(ifft2(scan.kspace), torch.from_numpy(x).to(torch.complex64)) < 1e-5
    assert torch.equal(formats.read(path, slices=slice(1, 3)).kspace, scan.kspace[1:3])
    assert np.array(scan.geometry.affine) @ [H // 2, W // 2, 2, 1] == pytest.approx([-3.0, -4.0, 0.0, 1.0])
    with pytest.raises(errors.UnsupportedLayout, match="3-D"):
        formats.read(ismrmrd_hdf5(tmp_path, lines[:-2], mrd_header(partitions=4)))


@both
@pytest.mark.parametrize("unit", ["per field of view", "per pixel", "per oversampled field of view"])
def test_trajectories(save: Save, unit: str, tmp_path: Path) -> None:
    """Samples on the grid, sent as a trajectory: x is the readout, our rows."""
    y = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images_of_coils(), axes=(-2, -1)), norm="ortho"), axes=(-2, -1))
    factor = {"per field of view": (1, 1), "per pixel": (H, W), "per oversampled field of view": (0.5, 0.5)}[unit]
    lines = []
    for b in range(B):
        for w in range(W):
            at = np.stack([(np.arange(H) - H // 2) / factor[0], np.full(H, w - W // 2) / factor[1]], 1)
            values = np.ascontiguousarray(y[b, :, :, w].astype(np.complex64))
            one = ismrmrd.Acquisition.from_array(values, at.astype(np.float32))
            one.idx.slice = b
            lines.append(one)
    over = 2 if "oversampled" in unit else 1
    path = save(tmp_path, lines, mrd_header(trajectory="radial", oversampling=over))
    if unit == "per pixel":
        with pytest.warns(errors.TunemriWarning, match="taken as cycles per pixel"):
            scan = formats.read(path)
    else:
        scan = formats.read(path)
    assert scan.mask is None and scan.trajectory is not None
    assert scan.image_shape == (H, W) and scan.kspace.shape == (B, C, H * W) and scan.trajectory.shape[0] == 1
    grid = torch.zeros(B, C, H, W, dtype=torch.complex64)
    index = (scan.trajectory[0] + torch.tensor([H // 2, W // 2])).round().long()
    grid[..., index[:, 0], index[:, 1]] = scan.kspace
    assert distance(ifft2(grid), truth()) < 1e-5


def test_what_info_says_of_readouts(tmp_path: Path) -> None:
    navigator = readouts(lines=[0])[0]
    navigator.set_flag(ismrmrd.ACQ_IS_NAVIGATION_DATA)
    path = ismrmrd_stream(tmp_path, [noise_readout(), navigator, *readouts()])
    report = formats.inspect(path)
    assert report["kind"] == "ismrmrd-stream" and "stream" in report["format"]
    assert [(row["name"], row["shape"]) for row in report["arrays"]] == [
        ("noise readouts", [1, C, 4096]), ("navigator readouts", [1, C, H]), ("imaging readouts", [B * W, C, H])
    ]  # fmt: skip
    assert report["slices"] == B and report["placed"]
    assert any("weigh the coils" in s and "whitens" in s for s in report["cannot"]), "the level is all that recon takes"
    assert not any("whitens" in s for s in formats.inspect(ismrmrd_stream(tmp_path, readouts()))["cannot"])
    with pytest.raises(errors.MissingKey, match="recon"):
        formats.read_image(path)


@both
@pytest.mark.filterwarnings("ignore::tunemri.errors.TunemriWarning")
def test_a_cut_file_is_never_read_as_a_scan(save: Save, tmp_path: Path) -> None:
    path = save(tmp_path, [noise_readout(samples=64), *readouts()])
    content = path.read_bytes()

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(length=st.integers(1, len(content) - 1))
    def cut(length: int) -> None:
        path.write_bytes(content[:length])
        with pytest.raises(errors.UnreadableFile) as caught:
            formats.read(path)
        assert caught.value.exit_code == 2 and str(caught.value).startswith(str(path))

    cut()


def test_the_package_itself_may_have_written_the_file(tmp_path: Path) -> None:
    with ismrmrd.Dataset(tmp_path / "a.h5", mode="w") as d:
        d.write_xml_header(mrd_header().encode())
        for one in readouts():
            d.append_acquisition(one)
    assert distance(ifft2(formats.read(tmp_path / "a.h5").kspace), truth()) < 1e-5


# ---------------------------------------------------------------- samples along a trajectory


def radial_scan(**fields: Any) -> Scan:
    y = malformed.along(malformed.spokes(), malformed.square())
    t = torch.from_numpy(malformed.spokes()).reshape(1, -1, 2)
    contents = {"kspace": torch.from_numpy(y).flatten(2), "trajectory": t, "image_shape": (32, 32), **fields}
    return Scan(**contents)


@pytest.mark.parametrize("suffix", [".h5", ".cfl"])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("coils", [1, C])
def test_a_scan_along_a_trajectory_comes_back(suffix: str, each: bool, coils: int, tmp_path: Path) -> None:
    made = radial_scan()
    assert made.trajectory is not None
    t = torch.cat([made.trajectory, -made.trajectory]) if each else made.trajectory
    csm = torch.from_numpy(images_of_coils()[:1, :coils].astype(np.complex64)).nan_to_num()
    csm = torch.nn.functional.pad(csm, (1, 1))
    place = Geometry(voxel_size=(1.0, 2.0, 3.0), affine=tuple(map(tuple, np.diag([1.0, 2.0, 3.0, 1.0]).tolist())))
    made = radial_scan(
        kspace=made.kspace[:, :coils],
        trajectory=t,
        csm=csm,
        noise_std=0.5,
        geometry=place,
        provenance="simulated: test",
    )
    formats.write(tmp_path / f"a{suffix}", made)
    back = formats.read(tmp_path / f"a{suffix}")
    for name in ("kspace", "trajectory", "csm"):
        torch.testing.assert_close(getattr(back, name), getattr(made, name), rtol=0, atol=0)
    assert (back.image_shape, back.noise_std, back.geometry, back.provenance, back.mask) == (
        made.image_shape, made.noise_std, made.geometry, made.provenance, None
    )  # fmt: skip
    part = formats.read(tmp_path / f"a{suffix}", slices=slice(1, 2))
    assert torch.equal(part.kspace, made.kspace[1:]) and len(part) == 1
    assert part.trajectory is not None and torch.equal(part.trajectory, t[-1:])
    assert part.geometry.affine is not None and part.geometry.affine[2][3] == 3.0


def test_radial_files_of_others(tmp_path: Path) -> None:
    """Spokes and samples on axes of their own, in every layout that cannot be mistaken."""
    made = radial_scan()
    y, t = malformed.along(malformed.spokes(), malformed.square()), malformed.spokes()
    for path in (
        malformed.radial(tmp_path),
        malformed.radial(tmp_path, kspace=y.reshape(B, C, -1), trajectory=t.reshape(1, -1, 2)),
        malformed.radial(tmp_path, trajectory=np.stack([t, t])),
    ):
        found = formats.read(path)
        torch.testing.assert_close(found.kspace, made.kspace)
        assert found.trajectory is not None and torch.equal(found.trajectory[:1], made.trajectory)  # type: ignore[arg-type]
    one = formats.read(malformed.radial(tmp_path, kspace=y[:, 0], trajectory=np.stack([t, t])))
    torch.testing.assert_close(one.kspace, made.kspace[:, :1])
    with pytest.warns(errors.TunemriWarning, match="coils"):
        coils = formats.read(malformed.radial(tmp_path, kspace=y[0]))
    torch.testing.assert_close(coils.kspace, made.kspace[:1])
    single = formats.read(malformed.radial(tmp_path, kspace=y[0, 0]))
    torch.testing.assert_close(single.kspace, made.kspace[:1, :1])
    with pytest.warns(errors.TunemriWarning, match="32×32"):
        bart = formats.read(malformed.cfl_radial(tmp_path))
    torch.testing.assert_close(bart.kspace, made.kspace[:1])
    assert bart.image_shape == (32, 32)


@pytest.mark.parametrize(("unit", "factor"), [("cycles per pixel", 1 / 32), ("radians per pixel", 2 * np.pi / 32)])
@pytest.mark.parametrize("said", [True, False])
def test_units_of_a_trajectory(unit: str, factor: float, said: bool, tmp_path: Path) -> None:
    """A unit that the file states is believed; one that only its extent tells is said."""
    t = malformed.spokes() * np.float32(factor) * np.float32(1 if said else 1)
    path = malformed.radial(tmp_path, trajectory=t)
    with h5py.File(path, "a") as h:
        if said:
            h["trajectory"].attrs["units"] = f"({unit}) of a 32x32 grid"
    if said:
        found = formats.read(path)
    else:
        with pytest.warns(errors.TunemriWarning, match=f"taken as {unit}"):
            found = formats.read(path)
    torch.testing.assert_close(found.trajectory, radial_scan().trajectory)


def test_noise_alone_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 3, 64, 48, 2)).astype(np.float32)
    noise[..., 32, 24, :] = 6  # what a receiver's offset leaves in the middle
    with pytest.warns(errors.TunemriWarning, match="only noise"):
        formats.read(fastmri(tmp_path, kspace=noise, ismrmrd_header=None))
    y = malformed.along(malformed.spokes(), malformed.square())
    noise = rng.standard_normal((*y.shape, 2)).astype(np.float32)
    with pytest.warns(errors.TunemriWarning, match="only noise"):
        formats.read(malformed.radial(tmp_path, kspace=noise))


def test_a_slice_without_signal_is_no_reason_to_speak(tmp_path: Path) -> None:
    y = malformed.kspace()
    y[1] = 0
    empty = formats.read(fastmri(tmp_path, kspace=y), slices=slice(1, 2))
    assert not empty.kspace.any()


def test_noise_is_told_from_a_shift(tmp_path: Path) -> None:
    """The strongest sample of noise lies anywhere: no reason to speak of zero frequency."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 2, 64, 48, 2)).astype(np.float32)
    noise[..., 5, 4, :] = 6
    with pytest.warns(errors.TunemriWarning) as said:
        formats.read(fastmri(tmp_path, kspace=noise, ismrmrd_header=None))
    assert ["only noise" in str(w.message) for w in said] == [True]
    with pytest.warns(errors.TunemriWarning) as said:
        formats.read(fastmri(tmp_path, kspace=np.fft.ifftshift(malformed.kspace(), axes=(-2, -1))))
    assert ["fftshift" in str(w.message) for w in said] == [True]


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_spokes_without_their_trajectory_are_noticed(along: str, tmp_path: Path) -> None:
    angle = np.pi * np.arange(12)[:, None] / 12
    t = np.stack([np.sin(angle), np.cos(angle)], -1) * ((np.arange(64) - 32) / 2)[:, None]
    y = malformed.along(t.astype(np.float32), malformed.square())
    y = y if along == "rows" else y.swapaxes(-2, -1)
    with pytest.warns(errors.TunemriWarning, match=f"every {along[:-1]} has its peak .* spokes"):
        formats.read(fastmri(tmp_path, kspace=np.ascontiguousarray(y), ismrmrd_header=None))
    xml = malformed.header(12, 64).replace("</encoding>", "<trajectory>radial</trajectory></encoding>")
    with pytest.raises(errors.MissingKey, match="trajectory: the header says radial"):
        formats.read(fastmri(tmp_path, kspace=y, ismrmrd_header=xml))


@pytest.mark.parametrize(("unit", "factor"), [("1/m", 4.0), ("degrees", 180 / 16)])
def test_units_that_no_extent_tells(unit: str, factor: float, tmp_path: Path) -> None:
    """A readout in steps of several cycles would fold the object over itself; 180 is the border in degrees."""
    angle = np.pi * np.arange(12)[:, None] / 12
    t = np.stack([np.sin(angle), np.cos(angle)], -1) * ((np.arange(64) - 32) / 2)[:, None]
    y = malformed.along(t.astype(np.float32), malformed.square())

    def read(trajectory: np.ndarray) -> list[str]:
        contents = {"kspace": y, "trajectory": trajectory.astype(np.float32), "ismrmrd_header": None}
        with pytest.warns(errors.TunemriWarning) as said:
            formats.read(fastmri(tmp_path, **contents))
        return [str(w.message) for w in said if "1/m" in str(w.message)]

    assert len(read(factor * t)) == 1
    assert read(t) == []


# ---------------------------------------------------------------- what is an image, what is k-space, what are maps


@pytest.mark.parametrize("suffix", [".cfl", ".npy"])
def test_an_image_is_never_read_as_a_scan(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What tunemri wrote says what it is; what others wrote is noticed by its Fourier transform."""
    source = fastmri(tmp_path, "scan.h5", kspace=malformed.kspace()[:, :1])
    out = tmp_path / f"image{suffix}"
    assert command("recon", source, "-m", "zero-filled", "-o", out) == 0
    with pytest.raises(errors.UnsupportedLayout, match="holds an image.*simulate"):
        formats.read(out)
    assert formats.inspect(out)["content"] == "image"
    with pytest.raises(errors.MissingKey, match="image"):
        formats.read_maps(out)
    for made in ("a.nii.gz", "a.dcm", "a.png", "a.h5"):
        assert command("convert", out, "-o", tmp_path / made) == 0
        found = formats.read_image(tmp_path / made).data.abs()
        if made != "a.png":
            assert distance(found, formats.read_image(out).data.abs()) < 1e-4
    capsys.readouterr()
    assert command("recon", out, "-m", "zero-filled", "-o", tmp_path / "b.h5") == 2
    assert capsys.readouterr().err.startswith("error[unsupported_layout]")
    if suffix == ".npy":
        np.save(out, phantom((48, 40)).numpy() * np.exp(0.3j))  # the record no longer speaks of this file
        with pytest.warns(errors.TunemriWarning, match="looks like an image"):
            formats.read(out)


@pytest.mark.parametrize("suffix", [".cfl", ".npy"])
def test_kspace_is_no_image(suffix: str, tmp_path: Path) -> None:
    y = malformed.kspace()[:, :1]
    if suffix == ".cfl":
        formats.write(
            tmp_path / "a.cfl", Scan(kspace=torch.from_numpy(y), mask=torch.ones(1, 1, 1, W), image_shape=(H, W))
        )
        with pytest.raises(errors.MissingKey, match="k-space without an image"):
            formats.read_image(tmp_path / "a.cfl")
        return
    np.save(tmp_path / "a.npy", y)
    with pytest.raises(errors.MissingKey, match="k-space"):
        formats.read_image(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.pad(y[:, 0], ((0, 0), (16, 16), (17, 17))))
    with pytest.warns(errors.TunemriWarning, match="looks like k-space"):
        formats.read_image(tmp_path / "a.npy")


def maps() -> np.ndarray:
    x = images_of_coils()[:1] / np.linalg.norm(images_of_coils()[:1], axis=1, keepdims=True)
    return np.nan_to_num(x).astype(np.complex64)


def test_kspace_is_refused_as_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a file that holds k-space, or an image, and no maps; errors name the file of the maps."""
    scan = fastmri(tmp_path, "scan.h5")
    np.save(tmp_path / "maps.npy", maps())
    formats.write(tmp_path / "b.cfl", formats.read(scan))
    np.savez(tmp_path / "ksp.npz", kspace=malformed.kspace())
    formats.write(tmp_path / "image.h5", Reconstruction(image=torch.from_numpy(malformed.image())))
    np.save(tmp_path / "small.npy", maps()[..., 1:])

    def tried(csm: object) -> str:
        capsys.readouterr()
        out = tmp_path / "out.h5"
        code = command("recon", scan, "-m", "sense", "--csm", csm, "-o", out, "--overwrite")
        said = capsys.readouterr().err
        assert (code == 0) == ("error" not in said) == out.exists(), said
        out.unlink(missing_ok=True)
        return said

    assert tried(tmp_path / "maps.npy") == ""
    for name in ("scan.h5", "b.cfl", "ksp.npz", "image.h5"):
        said = tried(tmp_path / name)
        assert said.startswith(f"error[missing_key]: {tmp_path / name}: csm: holds"), said
    assert tried(tmp_path / "small.npy").startswith(f"error[inconsistent_shapes]: {tmp_path / 'small.npy'}: csm")
    assert tried("").startswith("error[bad_option]: csm: found ''")
    np.save(tmp_path / "bare.npy", malformed.kspace()[:1])
    assert f"warning[unsupported_layout]: {tmp_path / 'bare.npy'}: csm: half of it lies below 2 %" in tried(
        tmp_path / "bare.npy"
    )


def test_two_sets_of_maps_are_refused(tmp_path: Path) -> None:
    both_sets = np.stack([maps(), maps()]).astype("<c8")
    malformed.raw(tmp_path, "maps.hdr", f"# Dimensions\n{H} {W} 1 {C} 2\n".encode())
    malformed.raw(tmp_path, "maps.cfl", both_sets.tobytes())
    with pytest.raises(errors.UnsupportedLayout, match="2 sets of coil maps.*ecalib -m1"):
        formats.read_maps(tmp_path / "maps")


# ---------------------------------------------------------------- BART


def test_companions_of_a_scan(tmp_path: Path) -> None:
    """Mask and maps lie beside the k-space, under names made from its own."""
    pattern = torch.from_numpy(malformed.lines())[None, None, None]
    y = torch.from_numpy(malformed.kspace()) * pattern
    csm = torch.from_numpy(images_of_coils()[:1].astype(np.complex64))
    made = Scan(kspace=y, mask=pattern, csm=csm, image_shape=(H, W))
    formats.write(tmp_path / "brain_ksp.cfl", made)
    assert sorted(p.name for p in tmp_path.glob("*.cfl")) == ["brain_ksp.cfl", "brain_maps.cfl", "brain_mask.cfl"]
    back = formats.read(tmp_path / "brain_ksp")
    assert back.mask is not None and torch.equal(back.mask.expand(1, 1, H, W)[0, 0, 0], pattern[0, 0, 0])
    torch.testing.assert_close(back.csm, csm, rtol=0, atol=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bare = Scan(kspace=y, mask=pattern, image_shape=(H, W))
    with pytest.raises(errors.BadOption, match=r"brain_maps\.cfl.*would be taken for the maps"):
        formats.write(tmp_path / "brain_ksp.cfl", bare, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(shutil.which("bart") is None, reason="bart is not installed")
def test_bart_reads_what_we_write(tmp_path: Path) -> None:
    """Its transform of our samples is the image, unturned; the line of ours in the header does not disturb it."""
    x = malformed.square()[:1, :1].copy()
    x[..., :16, :14] = 0
    y = torch.from_numpy(malformed.along(malformed.spokes(), x)).flatten(2)
    formats.write(tmp_path / "a.cfl", radial_scan(kspace=y))
    subprocess.run(
        ["bart", "nufft", "-i", "-d32:32:1", "a_traj", "a", "x"], cwd=tmp_path, check=True, capture_output=True
    )
    found, wanted = formats.read_image(tmp_path / "x.cfl").data[0].abs(), torch.from_numpy(x)[0, 0].abs().float()

    def far(a: Tensor, b: Tensor) -> float:
        return float((a / a.norm() - b / b.norm()).norm())

    assert far(found, wanted) < 0.3, "twelve spokes, but the right way up"
    assert min(far(found, turned) for turned in (wanted.flip(0), wanted.flip(1), wanted.T)) > 0.4
    scan = formats.read(tmp_path / "a.cfl")
    A = NonCartesian(scan.trajectory, shape=scan.image_shape)
    ours = cg(A.gram, A.H(scan.kspace), iterations=50).value
    formats.write(tmp_path / "ours.cfl", Reconstruction(image=ours))
    theirs, ours = (torch.from_numpy(np.fromfile(tmp_path / f"{x}.cfl", np.complex64)) for x in ("x", "ours"))
    assert far(ours, theirs) < 0.3, "values in the same order"
    assert far(ours, theirs.reshape(32, 32).T.flatten()) > 0.4


# ---------------------------------------------------------------- DICOM


PLACES = {
    "axial": ((0, 1.5, 0, -7), (2, 0, 0, 3), (0, 0, 6, 5), (0, 0, 0, 1)),
    "downwards": ((0, 1.5, 0, -7), (2, 0, 0, 3), (0, 0, -6, 5), (0, 0, 0, 1)),
    "oblique": (
        (1.6, 0.9, 0, -7), (-1.2, 1.2, 0, 3), (0, 0, 6, 5), (0, 0, 0, 1)
    ),
}  # fmt: skip


def placed(where: str, b: int = B) -> Image:
    affine = tuple(tuple(float(v) for v in row) for row in PLACES[where])
    return Image(
        data=torch.from_numpy(images_of_coils()[:1, 0].real.astype(np.float32)).repeat(b, 1, 1) * torch.arange(1, b + 1)[:, None, None],
        geometry=Geometry(voxel_size=(2.0, 1.5, 6.0), affine=affine),
    )  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("b", [1, 3])
def test_dicom_keeps_values_and_place(where: str, b: int, tmp_path: Path) -> None:
    made = placed(where, b)
    notes = formats.write(tmp_path / "a.dcm", made)
    back = formats.read_image(tmp_path / "a.dcm")
    assert float((back.data - made.data).abs().max()) <= 0.501 * notes["slope"], "negative values too"
    found, wanted = np.array(back.geometry.affine), np.array(made.geometry.affine)
    assert found == pytest.approx(wanted, abs=1e-4), "of one slice, too: which side the next would be on"
    assert back.geometry.voxel_size == pytest.approx((2.0, 1.5, 6.0))
    if b > 1:
        part = formats.read_image(tmp_path / "a.dcm", slices=slice(1, 2))
        assert np.array(part.geometry.affine)[2, 3] == pytest.approx(5 + PLACES[where][2][2])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("b", [1, 3])
def test_dicom_is_valid_and_names_nobody(known: bool, b: int, tmp_path: Path) -> None:
    import pydicom
    from pydicom import config

    made = placed("axial", b) if known else Image(data=placed("axial", b).data)
    before = config.settings.writing_validation_mode
    try:
        config.settings.writing_validation_mode = config.RAISE
        formats.write(tmp_path / "a.dcm", made)
        config.settings.reading_validation_mode = config.RAISE
        data = pydicom.dcmread(tmp_path / "a.dcm")
        for element in data.iterall():
            assert element.value is not None or element.VR in ("DS", "CS", "IS")
    finally:
        config.settings.writing_validation_mode = before
        config.settings.reading_validation_mode = config.WARN
    expected = {
        (False, 1): "Secondary Capture Image Storage", (True, 1): "MR Image Storage", (True, 3): "Enhanced MR Image Storage",
        (False, 3): "Multi-frame Grayscale Word Secondary Capture Image Storage",
    }  # fmt: skip
    assert data.SOPClassUID.name == expected[known, b]
    assert [str(data.get(key)) for key in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")] == [""] * 4
    assert ("ImageOrientationPatient" in data) == (known and b == 1)
    first = data.SOPInstanceUID
    formats.write(tmp_path / "b.dcm", made)
    assert pydicom.dcmread(tmp_path / "b.dcm").SOPInstanceUID == first, "the same image is the same object"
    if not known:
        assert formats.read_image(tmp_path / "a.dcm").geometry.affine is None


def test_what_dicom_means_by_its_directions(tmp_path: Path) -> None:
    """Our rows run down the picture, towards the front in RAS, which is LPS (0, -1, 0); columns towards the right side."""
    import pydicom

    formats.write(tmp_path / "a.dcm", placed("axial", 1))
    data = pydicom.dcmread(tmp_path / "a.dcm")
    assert [float(v) for v in data.ImageOrientationPatient] == [-1, 0, 0, 0, -1, 0]
    assert [float(v) for v in data.PixelSpacing] == [2.0, 1.5], "between rows first"
    assert [float(v) for v in data.ImagePositionPatient] == [7, -3, 5]
    sheared = Geometry(voxel_size=(1, 1, 1), affine=((1, 0.5, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)))
    with pytest.warns(errors.TunemriWarning, match="sheared"):
        formats.write(tmp_path / "b.dcm", placed("axial", 1), geometry=sheared)


# ---------------------------------------------------------------- fastMRI's own evaluation, and convert


def test_fastmri_finds_target_and_reconstruction(tmp_path: Path) -> None:
    """What its evaluation does: open both files of one name, crop the target to a square, subtract."""
    truth = torch.from_numpy(np.abs(malformed.image()))
    csm = torch.ones(1, C, H, W, dtype=torch.complex64)
    scan = Scan(kspace=fft2(truth[:, None] * csm), csm=csm, mask=torch.ones(1, 1, 1, W), image_shape=(H, W))
    for folder, what, extra in (("target", scan, {"reference": truth}), ("ours", Reconstruction(image=truth + 0j), {})):
        (tmp_path / folder).mkdir()
        formats.write(tmp_path / folder / "a.h5", what, **extra)  # type: ignore[arg-type]
    with h5py.File(tmp_path / "target/a.h5") as target, h5py.File(tmp_path / "ours/a.h5") as ours:
        assert target["reconstruction_rss"][()] == pytest.approx(ours["reconstruction"][()])
        assert ours["reconstruction"].dtype == np.float32 and ours["reconstruction"].shape == (B, H, W)
        assert {"max", "norm"} <= set(target.attrs)


def command(*arguments: object) -> int:
    from tunemri import cli

    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return int(end.value.code or 0)


@pytest.mark.filterwarnings("ignore::tunemri.errors.TunemriWarning")
def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any readable scan goes into .h5 and .cfl and comes back equal; a refusal changes nothing."""
    cases = [
        ismrmrd_hdf5(tmp_path, [noise_readout(), *readouts(lines=range(5, W))], name="cartesian.h5"),
        ismrmrd_stream(tmp_path, readouts(), name="stream.mrd"),
        malformed.radial(tmp_path, "radial.h5"),
        fastmri(tmp_path, "fast.h5", kspace=malformed.kspace() * malformed.lines(), mask=malformed.lines()),
    ]
    for source in cases:
        made = formats.read(source)
        for suffix in (".h5", ".cfl"):
            out = tmp_path / f"out-{source.stem}{suffix}"
            assert command("convert", source, "-o", out) == 0
            back = formats.read(out)
            torch.testing.assert_close(back.kspace, made.kspace, rtol=0, atol=0)
            assert back.geometry == made.geometry and back.noise_std == pytest.approx(made.noise_std)
            if made.mask is not None:
                assert back.mask is not None
                assert torch.equal(back.mask.expand(B, 1, H, W), made.mask.expand(B, 1, H, W))
            else:
                torch.testing.assert_close(back.trajectory, made.trajectory, rtol=0, atol=0)
            assert (tmp_path / f"{out.name}.json").exists()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    for wrong in (("fast.h5", "out-fast.cfl"), ("fast.h5", "fast.h5"), ("fast.h5", "a.dcm"), ("fast.h5", "a.xyz")):
        assert command("convert", tmp_path / wrong[0], "-o", tmp_path / wrong[1]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error[bad_option]") and said.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore::tunemri.errors.TunemriWarning")
def test_names_without_suffix_and_records_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """BART's names, and a record whose scan and maps lie beside it, seen from another folder."""
    monkeypatch.chdir(tmp_path)
    formats.write("s_ksp.cfl", formats.read(fastmri(tmp_path)))
    np.save("m.npy", maps())
    assert command("info", "s_ksp") == 0
    assert command("recon", "s_ksp", "-m", "sense", "--csm", "m.npy", "-o", "a.npy") == 0
    assert command("choose", "s_ksp", "-m", "sense", "--slice", 0, "-o", "picks.json") == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert command("recon", "--from", "../a.npy.json", "-o", "b.npy") == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "other/b.npy").read_bytes()
    assert command("recon", "--from", "../picks.json#1", "-o", "c.npy") == 0
    (tmp_path / "s_ksp.cfl").unlink()
    capsys.readouterr()
    assert command("recon", "--from", "../a.npy.json", "-o", "d.npy") == 2
    assert "s_ksp" in capsys.readouterr().err


def test_simulate_says_at_once_which_suffixes_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.write(tmp_path / "a.nii.gz", placed("oblique"))
    for name, says in (("s.hdf5", "known: .h5"), ("s.npy", "goes into .h5")):
        assert command("simulate", tmp_path / "a.nii.gz", "--mask", "poisson", "-o", tmp_path / name) == 2
        assert says in capsys.readouterr().err


def test_a_folder_of_images_may_hold_scans(tmp_path: Path) -> None:
    """k-space without a reference is left out, and counted."""
    from tunemri.datasets import load_images

    (tmp_path / "d").mkdir()
    formats.write(tmp_path / "d/a.nii.gz", placed("oblique"))
    fastmri(tmp_path / "d", "b.h5")
    fastmri(tmp_path / "d", "c.h5", reconstruction_rss=np.abs(malformed.image()))
    formats.write(tmp_path / "d/e_ksp.cfl", formats.read(tmp_path / "d/b.h5"))
    np.save(tmp_path / "d/f.npy", malformed.kspace())
    with pytest.warns(errors.TunemriWarning, match=r"3 of 5 files .*left out: b\.h5, e_ksp\.cfl, f\.npy"):
        found = load_images(tmp_path / "d")
    assert len(found["d"]) == 2 * B


def test_convert_an_image(tmp_path: Path) -> None:
    """Affine and values survive the way through NIfTI and DICOM."""
    formats.write(tmp_path / "a.nii.gz", placed("oblique"))
    assert command("convert", tmp_path / "a.nii.gz", "-o", tmp_path / "b.dcm") == 0
    assert command("convert", tmp_path / "b.dcm", "-o", tmp_path / "c.nii") == 0
    a, c = formats.read_image(tmp_path / "a.nii.gz"), formats.read_image(tmp_path / "c.nii")
    assert np.array(c.geometry.affine) == pytest.approx(np.array(a.geometry.affine), abs=1e-4)
    assert float((a.data - c.data).abs().max() / a.data.abs().max()) < 1e-5
