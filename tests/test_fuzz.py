"""Whatever is found in a file or handed to the API: an error of ours, or something finite and whole. Never a stranger's.

`test_bad_files.py` has the named cases and the random damage of every format; here hypothesis looks for what nobody
thought of: headers, types, shapes, places to cut, weights, recipes, records, words of the command line.
"""

from __future__ import annotations

import json
import math
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import malformed
from malformed import fastmri, kspace, raw
from test_weights import SMALL, build, header_and_tensors, rewrite
from tunemri import console, errors, formats, methods, texts, training
from tunemri.scan import Scan

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIDES = st.integers(0, 9)
DTYPES = st.sampled_from(["c8", "c16", ">c8", "f4", "f8", "f2", "i2", "i8", "u1", "?", "S3", "U2", "M8[s]"])
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=5))
JSON = st.recursive(NUMBERS, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=6), x, max_size=4))


def fine(read: Callable[[], Any]) -> Any:
    """What was read, or None where it was refused in our words, in a moment."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", errors.TunemriWarning)
        try:
            found = read()
        except errors.TunemriError as error:
            found, said = None, error
        else:
            said = None
    if said is not None:
        assert said.exit_code in (2, 3), repr(said)
        assert "\n" not in console.error_line(said) and len(console.error_line(said)) <= 300
    assert time.process_time() - began < 10
    return found


def whole(scan: Scan | None) -> None:
    """A scan as every method may rely on."""
    if scan is not None:
        assert bool(torch.isfinite(torch.view_as_real(scan.kspace)).all()) and bool(scan.kspace.any())
        assert scan.kspace.shape[-2:] == scan.image_shape and 1 <= scan.acceleration < math.inf


def anything(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Numbers of any type, some of them extreme."""
    values = np.random.default_rng(seed).bytes(max(1, math.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(values, dtype)[: math.prod(shape)].reshape(shape)


# ---------------------------------------------------------------- scans


@FEW
@given(shape=st.lists(SIDES, max_size=5).map(tuple), dtype=DTYPES, seed=st.integers(0, 99), order=st.sampled_from("CF"))
def test_any_array_in_a_file(shape: tuple[int, ...], dtype: str, seed: int, order: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray(anything(shape, dtype, seed), order=order))
    whole(fine(lambda: formats.read(tmp_path / "a.npy")))
    image = fine(lambda: formats.read_image(tmp_path / "a.npy"))
    assert image is None or bool(torch.isfinite(torch.view_as_real(image.data + 0j)).all())


@FEW
@given(data=st.data())
def test_any_datasets_beside_good_kspace(data: st.DataObject, tmp_path: Path) -> None:
    names = ("mask", "csm", "trajectory", "kspace", "reconstruction_rss", "ismrmrd_header")
    sides = st.lists(st.sampled_from([1, 2, 4, 30, 32]), max_size=4).map(tuple)
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    of = {
        name: anything(data.draw(sides), data.draw(st.sampled_from(["c8", "f4", "u1", "i8", "S3"])), 1)
        for name in chosen
    }
    text = st.dictionaries(st.sampled_from(["noise_std", "provenance", "affine", "image_shape", "units"]), NUMBERS)
    notes = {k: v for k, v in data.draw(text).items() if v is not None and not (type(v) is int and abs(v) >= 2**63)}
    notes = {k: v.replace("\0", "") if isinstance(v, str) else v for k, v in notes.items()}
    path = fine(lambda: fastmri(tmp_path, attributes=notes, **of))
    scan = fine(lambda: formats.read(path))
    if scan is not None and scan.trajectory is None:
        whole(scan)


CUTS = {
    "fastmri": fastmri, "npy": lambda d: malformed._saved("a.npy", kspace())(d),
    "npz": malformed._npz(kspace=kspace()), "mat": malformed._mat(kspace=kspace()),
    "mrd": lambda d: malformed.ismrmrd_stream(d, malformed.readouts(lines=range(12, 18))),
    "cfl": malformed._cfl_of_slices, "dicom": lambda d: malformed.dicom(d, b=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
@settings(FEW, max_examples=12)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "whole" if (tmp_path / "whole").exists() else CUTS[name](tmp_path).rename(tmp_path / "whole")
    content = path.read_bytes()
    suffix = ".cfl" if name == "cfl" else ".bin"
    cut = raw(tmp_path, f"cut{suffix}", content[: int(share * len(content))])
    if name == "cfl" and not cut.with_suffix(".hdr").exists():
        next(tmp_path.glob("*.hdr")).rename(cut.with_suffix(".hdr"))
    read = formats.read_image if name == "dicom" else formats.read
    assert fine(lambda: read(cut)) is None, f"{len(content)} bytes cut to {int(share * len(content))}"


@FEW
@given(sizes=st.lists(st.integers(-3, 2**65), min_size=1, max_size=18), words=st.text(max_size=20))
def test_any_cfl_header(sizes: list[int], words: str, tmp_path: Path) -> None:
    (tmp_path / "a.hdr").write_bytes(f"# Dimensions\n{' '.join(map(str, sizes))}\n{words}\n".encode("utf-8", "replace"))
    raw(tmp_path, "a.cfl", kspace().tobytes())
    whole(fine(lambda: formats.read(tmp_path / "a.cfl")))


@FEW
@given(
    kspace=st.one_of(
        arrays.arrays(np.complex64, st.lists(SIDES, min_size=2, max_size=5).map(tuple)),
        arrays.arrays(st.sampled_from([np.float32, np.int64, np.complex128]), (1, 2, 4, 6)),
    ),
    mask=arrays.arrays(np.float32, st.sampled_from([(1, 1, 4, 6), (4, 6), (1, 1, 1, 6), (2, 1, 4, 6), (0,)])),
    csm=st.none() | arrays.arrays(np.complex64, st.sampled_from([(1, 2, 4, 6), (1, 1, 4, 6), (2, 4, 6)])),
    noise=st.none() | st.floats(),
)
def test_any_arrays_through_the_api(kspace: np.ndarray, mask: np.ndarray, csm: Any, noise: Any) -> None:
    def make() -> Scan:
        maps = None if csm is None else torch.from_numpy(csm)
        y = torch.from_numpy(kspace)
        return Scan(kspace=y, mask=torch.from_numpy(mask), csm=maps, noise_std=noise, image_shape=tuple(y.shape[-2:]))  # type: ignore[arg-type]

    scan = fine(make)
    if scan is not None:
        before = scan.kspace.clone()
        out = fine(lambda: methods.reconstruct(scan, methods.load("zero-filled")))
        assert out is None or bool(torch.isfinite(torch.view_as_real(out.image)).all())
        assert torch.equal(scan.kspace, before), "what is handed in is left alone"


def test_what_is_no_tensor_scan_or_model_is_told_how_to_become_one() -> None:
    good: dict[str, Any] = {
        "kspace": torch.ones(1, 1, 4, 6) + 0j,
        "mask": torch.ones(1, 1, 1, 6),
        "image_shape": (4, 6),
    }
    for name in ("kspace", "mask", "trajectory", "csm", "scale"):
        with pytest.raises(errors.UnsupportedLayout, match=f"{name}: found (list|ndarray)"):
            Scan(**good | {name: [1.0] if name == "scale" else np.ones((1, 1, 4, 6))})
    with pytest.raises(errors.BadOption, match=r"scan: found str; tunemri\.read"):
        methods.reconstruct("scan.h5", methods.load("tv"))  # type: ignore[arg-type]
    with pytest.raises(errors.BadOption, match=r"model: found str; tunemri\.load"):
        methods.reconstruct(Scan(**good), "tv")  # type: ignore[arg-type]


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    methods.save(build("hyperrecon"), path, {"data": "phantoms"})
    return path


@settings(FEW, max_examples=150)
@given(data=st.data())
def test_no_flipped_bit_in_weights_goes_unnoticed(data: st.DataObject, weights: Path, tmp_path: Path) -> None:
    content = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of the flips into the header, which is a small part of the file.
    at = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path = raw(tmp_path, "flipped.safetensors", bytes(content))
    if fine(lambda: methods.load(path)) is not None:
        kept, changed = methods.card(weights), methods.card(path)
        assert changed == kept or "sha256" not in changed, "the only bit that may go is one in the name of the checksum"


HEADERS = {
    "longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "2^62": struct.pack("<Q", 2**62) + b"{}",
    "of nothing": struct.pack("<Q", 0),
    "of noise": struct.pack("<Q", 9) + b"{\xff\xfe\xfd:::}}",
    "nested": struct.pack("<Q", 20_000) + b'{"a":' * 4000,
}


def _spans(first: list[int], second: list[int], size: int = 8, shape: tuple[int, ...] = (1,)) -> bytes:
    spans = {"a": first, "b": second}
    text = json.dumps({k: {"dtype": "F32", "shape": shape, "data_offsets": v} for k, v in spans.items()}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [*HEADERS.values(), _spans([0, 4], [0, 4], 4), _spans([0, 4], [8, 12], 12), _spans([0, 4], [4, 12], 12),
     _spans([0, 4], [4, 8], 7), _spans([0, 4], [4, 8], 9), _spans([0, 4], [4, 8], shape=(2**40, 2**40)),
     _spans([0, 4], [4, 2**60]), _spans([4, 0], [4, 8])],
    ids=[*HEADERS, "overlap", "hole", "longer than its shape", "body short", "body long", "overflow", "beyond the end", "backwards"],
)  # fmt: skip
def test_headers_that_lie_are_refused_at_once(content: bytes, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises((errors.UnreadableFile, errors.UnsafeContent, errors.WrongModel)):
        methods.load(raw(tmp_path, "w.safetensors", content))
    assert time.process_time() - began < 1


@FEW
@given(name=st.sampled_from(sorted(SMALL)), data=st.data())
def test_any_header_of_weights(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Arguments that are anything: refused, before memory is taken for what they ask."""
    path = tmp_path / f"{name}.safetensors"
    if not path.exists():
        methods.save(build(name), path)
    header, tensors = header_and_tensors(path)
    keys = st.sampled_from(sorted(header["arguments"])) | st.text(max_size=5)
    changed = data.draw(st.dictionaries(keys, JSON | st.sampled_from([10**6, 10**18, [10**6] * 3]), max_size=2))
    rewrite(tmp_path / "x.safetensors", header | {"arguments": header["arguments"] | changed}, tensors)
    model = fine(lambda: methods.load(tmp_path / "x.safetensors"))
    assert model is None or all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())


HUGE = [
    ("hyperrecon", {"widths": [10**6, 10**6]}),
    ("hyperrecon", {"widths": [1] * 30_000}),
    ("hyperrecon", {"main": {"name": "unet", "width": 10**6}}),
    ("single-weight", {"main": {"name": "unrolled", "stages": 10**10, "width": 1}}),
    ("meta-learned", {"phases": 10**10}),
    ("meta-learned", {"features": {"channels": 10**8}}),
    ("generative", {"energy": {"widths": [10**7, 10**7]}}),
]


@pytest.mark.parametrize(("name", "asked"), HUGE, ids=lambda x: str(x)[:50])
def test_a_header_that_names_a_huge_network(name: str, asked: dict[str, Any], tmp_path: Path) -> None:
    if name not in SMALL:
        pytest.skip(f"{name} is not a method of this checkout")
    path = tmp_path / "huge.safetensors"
    methods.save(build(name), path)
    header, tensors = header_and_tensors(path)
    rewrite(path, header | {"arguments": header["arguments"] | asked}, tensors)
    began = time.process_time()
    with pytest.raises(errors.WrongModel, match=r"huge\.safetensors.*far larger than the \d+ numbers in the file"):
        methods.load(path)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("name", ["https://example.org/w.safetensors", "../../etc/passwd", "file:///etc/passwd", "~"])
def test_weights_come_from_files_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("it reached for the network"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((errors.UnreadableFile, errors.BadOption)):
        methods.load(name)


def test_weights_of_another_kind_of_number(weights: Path, tmp_path: Path) -> None:
    header, tensors = header_and_tensors(weights)
    for kind in (torch.int64, torch.complex64):
        rewrite(tmp_path / "w.safetensors", header, tensors | {"scales": tensors["scales"].to(kind)})
        with pytest.raises(errors.WrongModel, match="scales: found torch"):
            methods.load(tmp_path / "w.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors", {"tunemri": json.dumps(header)})
    assert methods.load(tmp_path / "w.safetensors"), "written by another program, yet all as it was"


# ---------------------------------------------------------------- recipes, records, words


@FEW
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), change=st.text(max_size=12))
def test_any_recipe(content: bytes, change: str, tmp_path: Path) -> None:
    path = raw(tmp_path, "recipe.toml", content + b"\n")
    fine(lambda: training.read_recipe(path, [change] if change else []))


@FEW
@given(data=st.data())
def test_any_value_in_a_recipe(data: st.DataObject, tmp_path: Path) -> None:
    recipe = {"method": "hyperrecon", "data": {"folder": str(tmp_path)}, "training": {"steps": 1}, "arguments": {}}
    section = data.draw(st.sampled_from(sorted(recipe)))
    keys = st.sampled_from(["steps", "lr", "batch", "masks", "folder", "main", "widths", "terms", "scales"])
    recipe[section] = data.draw(JSON if section == "method" else st.dictionaries(keys, JSON, max_size=3))
    fine(lambda: training.train(recipe, tmp_path / "run"))
    fine(lambda: training.train(recipe | {"data": {"folder": []}}, tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "nothing is made before all is known to be right"


@FEW
@given(record=JSON | st.dictionaries(st.sampled_from(["model", "dials", "scan", "picks", "slice", "seed"]), JSON))
def test_any_record(record: Any, tmp_path: Path) -> None:
    path = raw(tmp_path, "a.json", json.dumps(record).encode())
    fine(lambda: texts.read_sidecar(path))
    fine(lambda: texts.read_sidecar(path.with_name("a.json#2")))


@FEW
@given(words=st.text(alphabet="0123456789:.,=-+einfax ", max_size=12))
def test_any_words_for_slices_grids_and_settings(words: str) -> None:
    model = methods.load("tv")
    fine(lambda: texts.as_slice(words))
    fine(lambda: texts.axes_of([f"lam={words}"], model))
    fine(lambda: texts.contestant(f"tv:lam={words}", {}, [], False))
    fine(lambda: texts.contestant(words, {}, [words], True))
