"""Faults in the middle of work: kills, signals, full disks, no memory, two at once. What was good stays; work goes on."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import test_training
import test_weights
from laws import folder_state
from laws import scan as some_scan
from test_cli import everything, image, refused, run, scan, tiny  # noqa: F401 (fixtures)
from tunemri import coils, console, errors, evaluation, files, formats, methods, training
from tunemri.masks import poisson
from tunemri.methods import METHODS, prepare, reconstruct
from tunemri.scan import select
from tunemri.simulate import phantom, simulate

SOURCE = str(Path(files.__file__).parents[1])
# Several commands in one process, which is spared importing torch for each.
EACH = """
import json, sys
from tunemri import cli
for words in json.loads(sys.argv.pop()):
    try:
        cli.main(words)
    except SystemExit as stop:
        assert not stop.code, words
"""


def killed(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code that ends in a kill; it imports nothing heavy."""
    text = f"import os, signal\nfrom tunemri import files\nos.chdir({str(folder)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done


# ---------------------------------------------------------------- files: kills


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed(
        """
with files.write_atomically("a.h5") as one, files.write_folder_atomically("run") as other:
    one.write_text("half")
    (other / "sub").mkdir()
    (other / "sub" / "b").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
""",
        tmp_path,
    )
    assert len(folder_state(tmp_path)) == 2
    assert not (tmp_path / "a.h5").exists() and not (tmp_path / "run").exists()
    with files.write_atomically(tmp_path / "c") as temporary:
        temporary.write_text("whole")
        assert len(list(tmp_path.iterdir())) == 1
    assert list(folder_state(tmp_path)) == ["c"]


def test_what_others_may_still_be_writing_is_left_alone(tmp_path: Path) -> None:
    mine = files._temporary(tmp_path)
    mine.write_text("of another thread of this process")
    machine, pid = mine.name.split("-")[1:3]
    living = tmp_path / f".tunemri-{machine}-1-00000000-00000000"
    elsewhere = tmp_path / f".tunemri-{'0' * 8}-999999999-00000000-00000000"
    restarted = tmp_path / f".tunemri-{machine}-{pid}-00000000-00000000"
    for path in (living, elsewhere, restarted):
        path.write_text("")
    with files.write_atomically(tmp_path / "c"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"c", mine.name, living.name, elsewhere.name}


@pytest.mark.parametrize("calls", range(1, 6))
def test_a_kill_between_two_renames_never_leaves_the_record_of_another(calls: int, tmp_path: Path) -> None:
    """An output and its record are replaced; the process ends at the n-th change of a name."""
    for name, text in (("a.h5", "old"), ("a.h5.json", "record of old")):
        (tmp_path / name).write_text(text)
    code = f"""
calls = 0
def counted(change):
    def call(*a, **k):
        global calls
        calls += 1
        if calls == {calls}:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*a, **k)
    return call
os.replace, os.unlink = counted(os.replace), counted(os.unlink)
with files.write_with_record("a.h5", overwrite=True) as folder:
    (folder / "a.h5").write_text("new")
    (folder / "a.h5.json").write_text("record of new")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed(code, tmp_path)
    output, record = (tmp_path / "a.h5").read_text(), tmp_path / "a.h5.json"
    assert output in ("old", "new")
    assert not record.exists() or record.read_text() == f"record of {output}"
    with files.write_with_record(tmp_path / "a.h5", overwrite=True) as folder:
        (folder / "a.h5").write_text("newer")
    assert (tmp_path / "a.h5").read_text() == "newer"
    assert not list(tmp_path.glob(".tunemri-*"))


# ---------------------------------------------------------------- files: a disk that fails at every call


def write_one(folder: Path) -> None:
    with files.write_atomically(folder / "a.h5", overwrite=True) as temporary:
        temporary.write_text("new")


def write_pair(folder: Path) -> None:
    with files.write_with_record(folder / "a.h5", overwrite=True) as aside:
        write_one(aside)
        (aside / "a.h5.json").write_text("new")


def write_folder(folder: Path) -> None:
    with files.write_folder_atomically(folder, overwrite=True) as aside:
        (aside / "a.h5").write_text("new")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("work", [write_one, write_pair, write_folder])
def test_a_disk_that_fails_at_any_call(
    work: Callable[[Path], None], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call to the disk fails, n = 1, 2, … until none does: each time the old is whole or the new is, nothing else."""
    folder = tmp_path / "out"
    calls, failing = 0, 0

    def fragile(call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*a: Any, **k: Any) -> Any:
            nonlocal calls
            calls += "dir_fd" not in k  # that is rmtree, clearing away
            if calls == failing and "dir_fd" not in k:
                raise OSError(number, os.strerror(number))
            return call(*a, **k)

        return attempt

    for failing in range(1, 20):
        for path in folder.glob("*"):
            path.unlink()
        folder.mkdir(exist_ok=True)
        (folder / "a.h5").write_text("old")
        (folder / "a.h5.json").write_text("old")
        calls, told = 0, None
        with monkeypatch.context() as m:
            for name in ("open", "fsync", "replace"):
                m.setattr(os, name, fragile(getattr(os, name)))
            try:
                work(folder)
            except errors.NoSpace as error:
                told = error
        done = calls < failing
        assert (told is None) == done
        # The last flush comes after the rename: then the new is there, and only perhaps on the disk.
        assert (folder / "a.h5").read_text() in (("new",) if done else ("old", "new"))
        assert {p.name for p in tmp_path.rglob("*")} <= {"out", "a.h5", "a.h5.json"}, "something was left"
        if told is not None:
            assert (told.exit_code, str(told.file).startswith(str(folder))) == (3, True), told
        if done:
            assert failing > 3, "no call to the disk was seen"
            return
    raise AssertionError("it never came to its end")


def test_a_full_disk_keeps_both_states_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = test_training.plan(steps=9)
    alone = training.fit(test_training.model(), test_training.batches, plan, tmp_path / "alone")
    expected = test_training.weights(alone)
    saves = 0
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        nonlocal saves
        saves += path.name.startswith(".tunemri-")
        if saves == 7:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    run_folder = tmp_path / "run"
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(errors.NoSpace, match=r"state\.safetensors"):
        training.fit(test_training.model(), test_training.batches, plan, run_folder)
    assert sorted(p.name for p in run_folder.iterdir()) == ["state.previous.safetensors", "state.safetensors"]
    first = []

    def counted(step: int, rank: int = 0) -> Any:
        first.append(step)
        return test_training.batches(step, rank)

    again = training.fit(test_training.model(), counted, plan, run_folder, resume=True)
    assert first[0] == 6, "the newest state before the failure is the one to go on from"
    assert torch.equal(test_training.weights(again), expected)


def test_a_disk_limit_in_the_middle_of_a_command(tmp_path: Path, run: Any, scan: Path) -> None:  # noqa: F811
    """The system's own limit, not a simulated one: the earlier output survives, nothing else is left."""
    assert run("recon", scan, "-m", "zero-filled", "-o", "o.npy").code == 0
    before = everything(tmp_path)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from tunemri.cli import main\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\nmain(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "recon", "scan.h5", "-m", "zero-filled", "-o", "o.npy", "--overwrite"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error[no_space]: o.npy: ")
    assert everything(tmp_path) == before


WITH_RECORD = [
    "simulate image.npy -o made.h5 --mask poisson --coils 1",
    "convert scan.h5 -o copy.h5",
    "convert scan.h5 -o copy.cfl",
    "convert image.npy -o copy.nii.gz",
    "recon scan.h5 -m zero-filled -o out.npy",
    "recon scan.h5 -m zero-filled -o out.cfl",
    "compare scan.h5 -m zero-filled -o strip.png",
    "sweep scan.h5 -m tiny.safetensors --grid ssim=2 -o table",
    "evaluate -m zero-filled --data images --metrics psnr -o scores",
    "export scan.h5 -m tiny.safetensors -o range.html",
]


@pytest.mark.parametrize("command", WITH_RECORD)
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "stop"])
def test_no_output_without_its_record(command, fault, run, image, scan, tiny, monkeypatch):  # noqa: F811
    """The disk is full, or somebody stops it, when all but the record is written: nothing new is there, the old still is."""
    Path("images").mkdir()
    Path("images/a.npy").write_bytes(image.read_bytes())
    words = command.split()

    def fails(*again: str) -> None:
        before = everything(Path("."))
        with monkeypatch.context() as m:
            m.setattr(console, "sidecar", lambda *a, **k: (_ for _ in ()).throw(fault))
            result = run(*words, *again)
        assert result.code == (3 if isinstance(fault, OSError) else 130), result.err
        after = {name: content for name, content in everything(Path(".")).items() if ".unfinished" not in name}
        assert after == before

    fails()
    if isinstance(fault, OSError):
        assert run(*words, "--overwrite").code == 0
        fails("--overwrite")


# ---------------------------------------------------------------- long work, stopped and gone on with


class Stopped:
    """Lets so many reconstructions pass, then stops as a signal does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, how: type[BaseException]) -> None:
        self.left, self.made = after, 0
        real = evaluation.reconstruct

        def counted(*a: Any, **k: Any) -> Any:
            if self.left == 0:
                raise how(143) if how is console.Terminated else how()
            self.left -= 1
            self.made += 1
            return real(*a, **k)

        monkeypatch.setattr(evaluation, "reconstruct", counted)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


@pytest.mark.parametrize(("how", "code"), [(KeyboardInterrupt, 130), (console.Terminated, 143)])
def test_a_sweep_goes_on_where_it_was_stopped(how, code, run, scan, tiny, monkeypatch):  # noqa: F811
    command = ("sweep", scan, "-m", tiny, "--grid", "ssim=6", "--metrics", "psnr", "-o")
    assert run(*command, "alone").code == 0
    with monkeypatch.context() as m:
        Stopped(m, 4, how)
        result = run(*command, "out")
    assert result.code == code
    assert "4 results are kept in out.unfinished; the same command goes on from there" in result.err
    assert not Path("out").exists()
    with monkeypatch.context() as m:
        refused(run(*command, "out", "--grid", "nothing=3"), "bad_option")
        assert len(list(Path("out.unfinished").iterdir())) == 4, "a mistake costs nothing that was finished"
        rest = Stopped(m, 100, how)
        assert run(*command, "out").code == 0
    assert rest.made == 2
    assert rows(Path("out/table.csv")) == rows(Path("alone/table.csv"))
    assert Path("out/images.npy").read_bytes() == Path("alone/images.npy").read_bytes()
    assert not Path("out.unfinished").exists()


def test_what_is_kept_is_used_for_the_same_question_only(tmp_path: Path) -> None:
    """Other weights, dials, metrics, scans or maps are other rows; a damaged one is made again."""
    a, b = some_scan((16, 18), coils=2, seed=1), some_scan((16, 18), coils=2, seed=2)
    truth = torch.rand(1, 16, 18)
    model, keep = methods.load("tv"), tmp_path

    def asked(of: Any = a, lam: Any = (0.01,), metrics: Any = ("psnr",), **more: Any) -> int:
        before = len(list(keep.iterdir()))
        found = evaluation.sweep(of, model, {"lam": list(lam)}, reference=truth, metrics=metrics, keep=keep, **more)
        fresh = evaluation.sweep(of, model, {"lam": list(lam)}, reference=truth, metrics=metrics, **more)
        for one, other in zip(found, fresh, strict=True):
            assert (one.metrics, one.dials, one.residual) == (other.metrics, other.dials, other.residual)
            assert one.image is other.image is None or torch.equal(one.image, other.image)
        return len(list(keep.iterdir())) - before

    assert [asked(), asked(), asked(lam=(0.01, 0.02)), asked(b), asked(metrics=("mae",))] == [1, 0, 1, 1, 1]
    assert [asked(csm="walsh"), asked(keep_images=False)] == [1, 1]
    for path in keep.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(errors.TunemriWarning, match="done again"):
        assert asked() == 0


def test_an_evaluation_goes_on_where_it_was_stopped(run: Any, image: Path, tiny: Path, monkeypatch) -> None:  # noqa: F811
    Path("images").mkdir()
    image.rename("images/a.npy")
    command = ("evaluate", "-m", tiny, "-m", "tv", "--tune", "--data", "images", "--metrics", "psnr", "-o")
    assert run(*command, "alone").code == 0
    with monkeypatch.context() as m:
        Stopped(m, 9, KeyboardInterrupt)
        result = run(*command, "out")
    assert result.code == 130 and "9 results are kept in out.unfinished" in result.err
    assert run(*command, "out").code == 0
    assert rows(Path("out/rows.csv")) == rows(Path("alone/rows.csv"))
    assert Path("out/table.md").read_bytes() == Path("alone/table.md").read_bytes()
    assert not Path("out.unfinished").exists()


def test_a_batch_goes_on_where_it_was_stopped(run: Any, scan: Path, monkeypatch) -> None:  # noqa: F811
    for name in "bc":
        Path(f"{name}.h5").write_bytes(scan.read_bytes())
    command = ("recon", scan, "b.h5", "c.h5", "-m", "tv", "-o", "out")
    calls = 0

    def stop_at_the_third(*a: Any, **k: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return reconstruct(*a, **k)

    monkeypatch.setattr(methods, "reconstruct", stop_at_the_third)
    result = run(*command)
    assert result.code == 130
    assert "2 of 3 scans done, out: the same command with --resume does the rest" in result.err
    kept = everything(Path("out"))
    assert sorted(kept) == ["b.h5", "b.h5.json", "scan.h5", "scan.h5.json"]
    assert run(*command, "--resume").code == 0
    assert calls == 4, "only the third was made"
    after = everything(Path("out"))
    assert {name: after[name] for name in kept} == kept
    assert len(json.loads(after["summary.json"])["done"]) == 3
    result = run(*command, "--set", "lam=0.02", "--resume")
    assert result.code == 2, "another setting is another result"
    assert all("made with another dials" in line for line in result.errors) and len(result.errors) == 3
    assert everything(Path("out")) == after


def test_ctrl_c_of_a_running_export_leaves_nothing(tmp_path: Path, scan: Path, tiny: Path) -> None:  # noqa: F811
    """A real signal to a real process."""
    before = everything(tmp_path)
    command = [sys.executable, "-m", "tunemri", "export", "scan.h5", "-m", "tiny.safetensors", "-o", "range.html"]
    for _ in range(5):  # on a machine that is busy enough it may be done before this process gets to send the signal
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".tunemri-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        for name in ("range.html", "range.html.json"):
            (tmp_path / name).unlink()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted" and "Traceback" not in said
    assert everything(tmp_path) == before


def test_a_second_signal_stops_a_training_at_once() -> None:
    with training._signals() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_poor_environment(tmp_path: Path) -> None:
    """No home, no locale, no text on the terminal but ASCII: an error is still one line."""
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": SOURCE,
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "20",
    }
    command = [sys.executable, "-m", "tunemri", "info", "nö.h5"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error[unreadable_file]: n") and done.stderr.count("\n") == 1


def test_names_that_are_no_text_and_a_terminal_of_ascii(tmp_path: Path) -> None:
    """Every command works under such names, and says them as far as they can be said."""
    odd = {name: os.fsdecode(name.encode() + b"\xff") for name in ("scan", "image", "images", "scores", "range")}
    (tmp_path / odd["images"]).mkdir()
    np.save(tmp_path / odd["images"] / f"{odd['image']}.npy", phantom((24, 20))[None].numpy())
    scan = f"{odd['scan']}.h5"  # noqa: F811
    commands = [
        ["simulate", f"{odd['images']}/{odd['image']}.npy", "-o", scan, "--mask", "poisson", "--coils", "1"],
        ["recon", scan, "-m", "zero-filled", "-o", f"{odd['image']}.h5"],
        ["recon", scan, "-m", "zero-filled", "-o", f"{odd['image']}.nii", "--json"],
        ["convert", scan, "-o", f"{odd['scan']}.cfl"],
        ["info", scan],
        ["compare", scan, "-m", "zero-filled", "-o", f"{odd['image']}.png"],
        ["evaluate", "-m", "zero-filled", "--data", odd["images"], "--metrics", "psnr", "-o", odd["scores"]],
        ["export", scan, "-m", "sense", "-o", f"{odd['range']}.html"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": SOURCE, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert "scan\\udcff.h5  1 slices" in done.stdout
    assert f"{odd['range']}.html" in os.listdir(tmp_path)
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = test_training.plan(steps=4)
    expected = test_training.weights(training.fit(test_training.model(), test_training.batches, plan, tmp_path / "a"))
    now = 2e9

    def earlier() -> float:
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(training.time, "time", earlier)
    monkeypatch.setattr(training.time, "monotonic", earlier)
    found = training.fit(test_training.model(), test_training.batches, plan, tmp_path / "b")
    assert torch.equal(test_training.weights(found), expected)


# ---------------------------------------------------------------- two at once


def test_two_commands_on_one_folder(run: Any, scan: Path, tiny: Path) -> None:  # noqa: F811
    """Process 1 always lives."""
    Path("out.unfinished").mkdir()
    lock = Path("out.unfinished/lock.json")
    lock.write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    Path("out.unfinished/part-1.safetensors").write_text("somebody's")
    before = everything(Path("."))
    result = run("sweep", scan, "-m", tiny, "--grid", "ssim=2", "-o", "out")
    refused(result, "busy", "process 1", "is sweeping here")
    assert everything(Path(".")) == before
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))  # dead: beyond the largest number
    assert run("sweep", scan, "-m", tiny, "--grid", "ssim=2", "-o", "out").code == 0
    assert not Path("out.unfinished").exists()


def test_a_folder_made_by_somebody_quicker_is_not_replaced(tmp_path: Path) -> None:
    def slow() -> None:
        with files.write_folder_atomically(tmp_path / "run") as f:
            (f / "a").write_text("mine")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "a").write_text("theirs")

    with pytest.raises(errors.BadOption, match="exists already"):
        slow()
    assert folder_state(tmp_path) == {"run/a": b"theirs"}


def test_of_several_processes_the_first_speaks(run: Any, image: Path, monkeypatch) -> None:  # noqa: F811
    from test_cli import RECIPE

    Path("images").mkdir()
    image.rename("images/a.npy")
    Path("recipe.toml").write_text(RECIPE)
    monkeypatch.setenv("RANK", "1")
    result = run("train", "recipe.toml", "-o", "runs", "--set", "training.steps=1", "arguments.scales=[1.0,1.0]")
    assert (result.code, result.out) == (0, "")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes")],
    ids=str,
)
def test_no_memory_says_what_to_cut(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*a: Any, **k: Any) -> Any:
        raise error

    monkeypatch.setitem(coils.MAPS, "auto", allocate)
    volume = some_scan((16, 18), coils=2, slices=3)
    volume = type(volume)(**{**vars(volume), "csm": None})
    with pytest.raises(errors.NoMemory, match=r"3 slices of 2 coils, 16×18; fewer slices at a time \(--slice 0:1\)"):
        reconstruct(volume, methods.load("zero-filled"))
    with pytest.raises(errors.NoMemory, match="1 slices of 2 coils, 16×18; fewer coils"):
        reconstruct(select(volume, slice(0, 1)), methods.load("zero-filled"))
    monkeypatch.setitem(coils.MAPS, "auto", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        reconstruct(volume, methods.load("zero-filled"))


def test_a_reader_without_memory_does_not_call_the_file_damaged(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.ones((1, 2, 8, 8), "c8"))
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")):
        monkeypatch.setattr(formats.arrays, "read_scan", lambda *a, e=error: (_ for _ in ()).throw(e))
        with pytest.raises(errors.NoMemory, match=r"a\.npy.*read fewer slices"):
            formats.read(tmp_path / "a.npy")


def test_a_limit_of_memory_in_the_middle_of_a_command(tmp_path: Path) -> None:
    """The system's own limit: one line that says what to cut, exit status 3, and nothing is left."""
    rng = np.random.default_rng(0)
    for name, size in (("small", 32), ("large", 512)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((1, 8, size, size, 2)).astype("f4").view("c8")[..., 0])
    code = """
import pathlib, resource
from tunemri import cli

def recon(name):
    try:
        cli.main(["recon", f"{name}.npy", "-m", "tv:lam=0.1", "-o", f"{name}.h5"])
    except SystemExit as stop:
        return stop.code

assert not recon("small")  # everything is imported now
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
raise SystemExit(recon("large"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": SOURCE},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert (
        "error[no_memory]: large.npy: kspace: not enough for 1 slices of 8 coils, 512×512; fewer coils" in done.stderr
    )
    assert sorted(os.listdir(tmp_path)) == ["large.npy", "small.h5", "small.h5.json", "small.npy"]


def test_no_memory_in_training_says_what_to_cut(tmp_path: Path) -> None:
    class Greedy(test_training.HyperRecon):
        def loss(self, example: Any, generator: torch.Generator) -> Any:
            raise MemoryError

    model = Greedy(main=test_training.UNROLLED, widths=[6, 4])
    with pytest.raises(errors.NoMemory, match=r"k-space of \(2, 1, 16, 18\).*--set data\.batch=1"):
        training.fit(model, test_training.batches, test_training.plan(), tmp_path)
    assert folder_state(tmp_path) == {}


def test_a_volume_is_prepared_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit as each slice alone, and never more than one at a time: memory stays flat."""
    volume = some_scan((32, 30), coils=3, slices=4)
    volume = type(volume)(**{**vars(volume), "csm": None})
    ready = prepare(volume)
    for b in range(4):
        alone = prepare(select(volume, slice(b, b + 1)))
        assert torch.equal(ready.kspace[b : b + 1], alone.kspace)
        assert torch.equal(ready.scale[b : b + 1], alone.scale)
        assert torch.equal(ready.csm[b : b + 1], alone.csm)
    sizes = []
    monkeypatch.setitem(coils.MAPS, "auto", lambda y, m: sizes.append(len(y)) or torch.full_like(y, 3**-0.5))
    prepare(volume)
    assert sizes == [1] * 4


# ---------------------------------------------------------------- the same again, and what outputs say


MEAN = ("--set", "estimate=mmse")
# Output → the model that makes it: every method, with weights of its own where it needs some, and whatever ships.
REPEATED: dict[str, tuple[str, ...]] = {
    **{f"{name}.h5": (f"{name}.safetensors" if methods.needs_weights(name) else name,) for name in METHODS},
    **{f"{name}.h5": (name,) for name in methods.bundled()},
    "generative-mean.h5": ("generative.safetensors", *MEAN),
    **({"energy-brain-mean.h5": ("few-draws.safetensors", *MEAN)} if "energy-brain" in methods.bundled() else {}),
    **{f"any{suffix}": ("zero-filled",) for suffix in formats.WRITERS},
}


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where two processes, in opposite orders, made each output of REPEATED: one in `a`, one in `b`."""
    folder = tmp_path_factory.mktemp("repeated")
    for name in test_weights.SMALL:
        methods.save(test_weights.build(name), folder / f"{name}.safetensors")
    if "energy-brain" in methods.bundled():
        trained = methods.load("energy-brain")
        few = methods.make("generative", trained.arguments | {"draws": {"chains": 2, "samples": 2}})
        few.load_state_dict(trained.state_dict())
        methods.save(few, folder / "few-draws.safetensors")
    # Maps are estimated for each image, too.
    simulated, truth = simulate(phantom((36, 32))[None], mask=poisson((36, 32), 3), coils=3, noise=0.01)
    formats.write(folder / "scan.h5", simulated, reference=truth)
    for side, names in (("a", list(REPEATED)), ("b", list(REPEATED)[::-1])):
        (folder / side).mkdir()
        words = [["recon", "scan.h5", "--seed", "3", "-o", f"{side}/{n}", "-m", *REPEATED[n]] for n in names]
        done = subprocess.run(
            [sys.executable, "-c", EACH, json.dumps(words)], cwd=folder, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_command_gives_the_same_bytes(name: str, repeated: Path) -> None:
    """In another process, after other work, on two threads."""
    assert (repeated / "a" / name).read_bytes() == (repeated / "b" / name).read_bytes()
    records = [json.loads((repeated / side / f"{name}.json").read_text()) for side in "ab"]
    own = ("out", "command", "written", "seconds")
    assert len({json.dumps({k: v for k, v in r.items() if k not in own}) for r in records}) == 1


def test_a_gpu_is_asked_for_single_precision_and_the_same_again() -> None:
    """Settings alone can be looked at without one; they are given back."""
    seen = []

    class Watching(METHODS["zero-filled"]):
        def forward(self, *a: Any, **k: Any) -> Any:
            cudnn = torch.backends.cudnn
            seen.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
            return super().forward(*a, **k)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    reconstruct(some_scan((16, 18)), Watching())
    assert seen == [(True, True, False, False)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == before


def test_another_seed_is_another_draw(repeated: Path, run: Any) -> None:  # noqa: F811
    """What is the same above is not so because nothing in it is random."""
    few = repeated / "generative.safetensors"
    assert run("recon", repeated / "scan.h5", "-m", few, *MEAN, "--seed", 4, "-o", "o.h5").code == 0
    assert Path("o.h5").read_bytes() != (repeated / "a/generative-mean.h5").read_bytes()


def test_an_image_of_a_simulated_scan_says_so(run: Any, scan: Path) -> None:  # noqa: F811
    for name in ("o.h5", "o.cfl"):
        assert run("recon", scan, "-m", "zero-filled", "-o", name).code == 0
        assert "simulated" in run("info", name, "--json").json["provenance"], name


def test_a_smaller_reference_is_compared_with_the_centre(run: Any, scan: Path) -> None:  # noqa: F811
    np.save("small.npy", np.abs(formats.read_reference(scan).numpy())[:, 6:-6, 8:-8])
    result = run("recon", scan, "-m", "tv", "--reference", "small.npy", "--json", "-o", "o.npy")
    assert result.code == 0 and result.json["metrics"]["psnr"] > 15
    for command in (("sweep", "--grid", "lam=2", "-o", "out"), ("compare", "-m", "zero-filled", "-o", "strip.png")):
        result = run(command[0], scan, "-m", "tv", "--reference", "small.npy", *command[1:])
        assert result.code == 0, result.err


def test_records_hold_the_hash_of_every_model(run: Any, scan: Path, image: Path, tiny: Path) -> None:  # noqa: F811
    digest = files.sha256(tiny)
    assert run("sweep", scan, "-m", tiny, "--grid", "ssim=2", "-o", "s", "--json").json["model_sha256"] == digest
    both = {str(tiny): digest, "tv": None}
    assert run("compare", scan, "-m", tiny, "-m", "tv", "-o", "c.png", "--json").json["model_sha256"] == both
    Path("images").mkdir()
    image.rename("images/a.npy")
    command = ("evaluate", "-m", tiny, "-m", "tv", "--data", "images", "--metrics", "psnr", "-o", "e", "--json")
    assert run(*command).json["model_sha256"] == both
