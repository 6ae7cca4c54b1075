"""What a reader does with files that are damaged, hostile, not what they seem, or merely odd."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import malformed
import tunemri
from malformed import ACCEPTED, REFUSED, Case, fastmri, kspace, lines
from tunemri import cli, console, datasets, errors, files, formats, training


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if not p.is_symlink()
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; nothing but the test may write into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::tunemri.errors.TunemriWarning")
def test_refused(case: Case, here: Path) -> None:
    path = case.build(here)
    before = snapshot(here)
    start = time.perf_counter()
    with pytest.raises(errors.TunemriError) as caught:
        getattr(formats, case.reader)(path)
    assert time.perf_counter() - start < 1.5, "a refusal is quick"
    error = caught.value
    assert error.word == case.word, str(error)
    assert error.exit_code == case.exit_code
    assert str(error).startswith(str(path.parent if path.parent != path else path)), "the message begins with the file"
    for piece in case.says:
        assert piece in str(error)
    assert "\n" not in error.what + (error.help or "")
    assert snapshot(here) == before, "reading changed something"


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_accepted(case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan = formats.read(path)
    said = [str(w.message) for w in caught]
    assert len(said) == len(case.says), said
    for piece, message in zip(case.says, said, strict=True):
        assert piece in message
        assert path.name in message
    truth = torch.from_numpy(kspace()).to(torch.complex128)
    found = scan.kspace.to(torch.complex128)
    found = found * (truth.norm() / found.norm())
    assert float((found - truth).norm() / truth.norm()) < 1e-3
    assert scan.acceleration == 1
    assert scan.provenance == "acquired"


def test_every_case_is_told_apart() -> None:
    """Names are test ids, and every class of file error is met."""
    names = [case.name for case in REFUSED + ACCEPTED]
    assert len(names) == len(set(names))
    assert {case.word for case in REFUSED} == {
        "unreadable_file", "missing_key", "inconsistent_shapes", "non_finite", "unsupported_layout", "no_data",
        "too_large", "unsafe_content",
    }  # fmt: skip


def test_no_permission_is_the_environments_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fastmri(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # a superuser may read everything
    with pytest.raises(errors.UnreadableFile, match="permission") as caught:
        formats.read(path)
    assert caught.value.exit_code == 3


def test_limit_is_raised_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fastmri(tmp_path)
    monkeypatch.setenv("TUNEMRI_MAX_BYTES", "1000")
    with pytest.raises(errors.TooLarge, match="1000 bytes"):
        formats.read(path)
    monkeypatch.setenv("TUNEMRI_MAX_BYTES", str(kspace().nbytes))
    assert len(formats.read(path)) == malformed.B
    monkeypatch.setenv("TUNEMRI_MAX_BYTES", "much")
    with pytest.raises(errors.BadOption, match="TUNEMRI_MAX_BYTES"):
        formats.read(path)
    monkeypatch.delenv("TUNEMRI_MAX_BYTES")
    files.check_declared((2**30,), 4, 2**23, file=path)  # 4 GiB, 512-fold: images compress like that
    with pytest.raises(errors.TooLarge):
        files.check_declared((2**33,), 16, 2**40, file=path)


def test_a_file_replaced_while_being_read(tmp_path: Path) -> None:
    path = fastmri(tmp_path)
    with pytest.raises(errors.UnreadableFile, match="changed"), files.check_unchanged(path):
        path.write_bytes(b"other")


@pytest.mark.parametrize(
    "name", [" blank .h5", "quo'te\".h5", "a;b$c.h5", "ümlaut.h5", "-dash.h5", "line\nbreak.h5", "a" * 252 + ".h5"]
)
def test_any_file_name(name: str, here: Path) -> None:
    fastmri(here, name)
    assert len(formats.read(name)) == malformed.B
    assert formats.write("copy.h5", formats.read(name)) == {"content": "k-space"}
    formats.write(name, formats.read(name), overwrite=True)
    assert sorted(os.listdir(here)) == sorted([name, "copy.h5"])


def test_mask_that_disagrees_with_the_data(tmp_path: Path) -> None:
    with pytest.warns(errors.TunemriWarning, match="energy lies where it says 'not sampled'"):
        scan = formats.read(fastmri(tmp_path, mask=1 - lines()))
    assert not bool((scan.kspace * (scan.mask == 0)).any()), "what the mask leaves out is zero"
    with pytest.warns(errors.TunemriWarning, match="it calls sampled are zero"):
        formats.read(fastmri(tmp_path, kspace=kspace() * lines(), mask=np.ones(malformed.W)))
    quiet = formats.read(fastmri(tmp_path, kspace=kspace() * lines(), mask=lines()))
    assert quiet.acceleration == pytest.approx(1 / lines().mean())


def test_zero_frequency_in_the_corner(tmp_path: Path) -> None:
    with pytest.warns(errors.TunemriWarning, match="fftshift"):
        formats.read(fastmri(tmp_path, kspace=np.fft.ifftshift(kspace(), axes=(-2, -1))))


def test_one_empty_slice_is_kept(tmp_path: Path) -> None:
    y = kspace()
    y[0] = 0
    scan = formats.read(fastmri(tmp_path, kspace=y))
    assert not bool(scan.kspace[0].any()) and bool(scan.kspace[1].any()) and scan.acceleration == 1


def test_warnings_as_errors_stay_warnings(tmp_path: Path) -> None:
    with pytest.raises(errors.TunemriWarning, match="no mask"):
        formats.read(fastmri(tmp_path, kspace=kspace() * lines()))


def test_random_damage(tmp_path: Path) -> None:
    """Whatever bytes are hit: an error of ours or finite values, never a crash, a NaN or a stranger's exception."""
    source = Path(tunemri.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, malformed.__file__, str(tmp_path), "40"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(source), "TUNEMRI_MAX_BYTES": str(2**30)},
    )  # fmt: skip
    assert run.stderr == "", "libraries report to nobody"
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


# ---------------------------------------------------------------- names, links, folders, code


def test_a_name_that_is_no_text(here: Path) -> None:
    """A name of any bytes works; where it is shown, what is no text is escaped."""
    name = os.fsdecode(b"a\xff\xfe.h5")
    fastmri(here, "a.h5").rename(name)
    assert len(formats.read(name)) == malformed.B
    assert formats.write(name, formats.read(name), overwrite=True) == {"content": "k-space"}
    (here / name).write_bytes(b"")
    with pytest.raises(errors.UnreadableFile) as caught:
        formats.read(name)
    line = console.error_line(caught.value)
    assert line.startswith("error[unreadable_file]: a") and "udcff" in line
    line.encode()


def test_links_are_followed_to_read_and_replaced_to_write(here: Path) -> None:
    truth = fastmri(here, "truth.h5")
    Path("a.h5").symlink_to("truth.h5")
    before = truth.read_bytes()
    scan = formats.read("a.h5")
    with pytest.raises(errors.BadOption, match="exists"):
        formats.write("a.h5", scan)
    Path("dangling.h5").symlink_to("nowhere.h5")
    formats.write("dangling.h5", scan, overwrite=True)
    formats.write("a.h5", scan, overwrite=True)
    assert truth.read_bytes() == before, "what a link points to is not ours to change"
    assert not Path("a.h5").is_symlink() and not Path("nowhere.h5").exists()


# A superuser may do anything; without these rights it is held to the permissions of files like everybody else.
_PERMISSIONS = """
import ctypes, os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import malformed
from tunemri import errors, files, formats

if os.geteuid() == 0:
    head, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(head, rights) == 0
    rights[0] &= ~6  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: of the effective set
    rights[1] &= ~6  # of the permitted set
    assert libc.capset(head, rights) == 0

def refused(work):
    try:
        work()
    except errors.TunemriError as error:
        assert error.exit_code == 3, error
        return type(error)
    raise AssertionError("it was not refused")

def mode(path):
    return os.stat(path).st_mode & 0o777

path = malformed.fastmri(pathlib.Path("."), "a.h5")
os.umask(0o027)
os.chmod(path, 0)
assert refused(lambda: formats.read(path)) is errors.UnreadableFile
os.chmod(path, 0o444)  # of no consequence: it is the folder that says whether a name in it may be given anew
scan = formats.read(path)
formats.write(path, scan, overwrite=True)
assert mode(path) == 0o640, "as the mask of the user wants it"
for name, bits in (("closed", 0), ("blind", 0o600), ("full", 0o500)):
    os.mkdir(name)
    os.link(path, f"{name}/a.h5")
    os.chmod(name, bits)
    if name == "full":
        assert len(formats.read(f"{name}/a.h5")) == len(scan)
    else:
        assert refused(lambda: formats.read(f"{name}/a.h5")) is errors.UnreadableFile
    for target in ("a.h5", "b.h5"):
        assert refused(lambda: formats.write(f"{name}/{target}", scan, overwrite=True)) is errors.BadOption
        assert refused(lambda: files.check_target(f"{name}/{target}", overwrite=True)) is errors.BadOption
    os.chmod(name, 0o700)
    assert os.listdir(name) == ["a.h5"]
os.mkdir("drop", 0o300)  # what lies in it is nobody's business, but anybody may put something there
formats.write("drop/b.h5", scan)
with files.write_with_record("drop/c.h5") as folder:
    formats.write(folder / "c.h5", scan)
    (folder / "c.h5.json").write_text("{}")
os.chmod("drop", 0o700)
assert sorted(os.listdir("drop")) == ["b.h5", "c.h5", "c.h5.json"]
"""


def test_permissions_are_those_of_the_system(tmp_path: Path) -> None:
    """Files and folders that may not be read, searched, written or listed; what is written has the rights of any new file."""
    run = subprocess.run(
        [sys.executable, "-c", _PERMISSIONS, str(Path(__file__).parent)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(tunemri.__file__).parents[1])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_no_case_takes_memory_before_it_is_refused(tmp_path: Path) -> None:
    """Each is read with half a gigabyte to spare: a size that is believed before it is compared would show."""
    run = subprocess.run(
        [sys.executable, malformed.__file__, str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(tunemri.__file__).parents[1])},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, ""), run.stdout[-2000:] + run.stderr[-2000:]


def test_no_patient_gets_into_an_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scan says of the person: not in images, copies, records, nor what is printed of it."""
    name = "Planted^Name"
    subject = f"<subjectInformation><patientName>{name}</patientName><patientID>{name}</patientID></subjectInformation>"
    xml = malformed.header().replace("<encoding>", subject + "<encoding>")
    fastmri(here, attributes={"patient_id": name, "acquisition": name}, ismrmrd_header=xml)
    for words in (
        "convert scan.h5 -o copy.h5", "convert scan.h5 -o copy.cfl", "recon scan.h5 -m zero-filled -o image.h5",
        "recon scan.h5 -m zero-filled -o image.nii", "recon scan.h5 -m zero-filled -o image.dcm",
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["tunemri", *words.split()])
        before = signal.getsignal(signal.SIGTERM)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        assert not stop.value.code, words
    made = [path for path in here.iterdir() if path.name != "scan.h5"]
    assert len(made) >= 11
    assert name.encode() in Path("scan.h5").read_bytes()
    assert [path.name for path in made if name.encode() in path.read_bytes()] == []


def test_one_bad_image_in_a_folder_is_found_before_training(here: Path) -> None:
    Path("images").mkdir()
    for name in "abc":
        np.save(f"images/{name}.npy", malformed.image().real)
    np.save("images/b.npy", np.full((9, 9), np.nan))
    recipe = {"method": "hyperrecon", "data": {"folder": "images"}, "training": {"steps": 1}}
    with pytest.raises(errors.NonFinite, match=r"b\.npy"):
        training.train(recipe, "run")
    assert not Path("run").exists()


def test_a_damaged_source_of_training_images_is_named(here: Path) -> None:
    name, (filename, _) = next(iter(datasets.SOURCES.items()))
    for content in (b"PK\3\4 not an archive", b"\x93NUMPY noise", b"noise"):
        Path(filename).write_bytes(content)
        with pytest.raises(errors.UnreadableFile, match=filename):
            datasets.load_images(here, [name])


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    """No pickle, no eval, no shell, no unpinned torch.load or numpy.load: read from the source itself."""
    for path in Path(tunemri.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "cloudpickle"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "os.system", "os.popen", "compile"), (path, called)
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("shell", "False") == "False", path
                assert called != "np.load" or given.get("allow_pickle") == "False", path


def test_every_proof_that_the_page_names_exists() -> None:
    """docs/reliability.md is a list of tests and of cases in `malformed.py`: a proof that is renamed is renamed there too."""
    tests = Path(__file__).parent
    page = (tests.parent / "docs/reliability.md").read_text()
    defined = re.findall(r"def (test_\w+)\(", "".join(path.read_text() for path in sorted(tests.glob("test_*.py"))))
    for name in re.findall(r"`(test_\w+)(?:…)?`", page):
        assert any(known.startswith(name) if name.endswith("_") else known == name for known in defined), name
    cases = {case.name for case in REFUSED + ACCEPTED}
    rows = [line.split("|")[3] for line in page.splitlines() if re.match(r"\| [FAT]\d", line)]
    for name in [
        name.strip() for row in rows for names in re.findall(r"\*([^*]+)\*", row) for name in names.split(",")
    ]:
        assert "…" in name or name in cases, name
