"""Work elsewhere gives what work here gives: rows, files, errors, warnings, also when a worker is killed; and in parts."""

from __future__ import annotations

import ast
import copy
import csv
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import warnings
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laws import folder_state, relative, scan
from tunemri import cli, cluster, errors, evaluation, formats, jobs, methods
from tunemri.errors import TunemriWarning
from tunemri.evaluation import Case, Contestant
from tunemri.simulate import phantom


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """A command in this process, in an empty folder: (exit status, standard output, lines of standard error)."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: object) -> tuple[int, str, list[str]]:
        words = [str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["tunemri", *words])
        before = signal.getsignal(signal.SIGTERM)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            cli.main(words)
        signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err.splitlines()

    return go


@pytest.fixture(scope="module")
def local():
    """A scheduler and two workers, processes of this machine."""
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    with (
        warnings.catch_warnings(),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None, silence_logs=50
        ) as made,
    ):
        yield made


def write_scan(path: Path, seed: int = 0, *, slices: int = 2, coils: int = 3, maps: bool = False) -> Path:
    s = scan((24, 20), slices=slices, coils=coils, seed=seed)
    # Maps of their own for each slice: a phase that differs shows in the image.
    turns = torch.polar(torch.ones(slices), torch.arange(slices) * 1.0)[:, None, None, None]
    s = dataclasses.replace(s, csm=s.csm * turns if maps and s.csm is not None else None)
    truth = torch.stack([phantom((24, 20), seed=seed + b) for b in range(slices)]).to(torch.complex64)
    formats.write(path, s, reference=truth)
    return path


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def table(path: Path) -> list[dict[str, Any]]:
    with path.open() as f:
        return timeless(list(csv.DictReader(f)))


# ------------------------------------------------------------------------------------------------ the interface


def odd(n: int) -> int:
    if n % 2 == 0:
        raise errors.BadOption(f"{n} is even", key="n", help="an odd one")
    errors.warn(f"{n} is odd")
    return n * n


def outcomes(executor) -> dict[int, object]:
    found: dict[int, object] = {}
    for index, outcome in cluster.each(odd, [3, 4, 5, 6], executor):
        assert index not in found, "each once"
        found[index] = str(outcome) if isinstance(outcome, Exception) else outcome
    return found


def test_here_and_elsewhere_give_the_same_errors_and_warnings_included():
    with pytest.warns(TunemriWarning) as here:
        expected = outcomes(None)
    assert expected == {0: 9, 1: "n: 4 is even; an odd one", 2: 25, 3: "n: 6 is even; an odd one"}
    with ThreadPoolExecutor(2) as executor, pytest.warns(TunemriWarning) as there:
        assert outcomes(executor) == expected
    assert sorted(str(w.message) for w in there) == sorted(str(w.message) for w in here)


class _OneDone(Executor):
    """Does the first unit at once and keeps the others waiting, as a busy cluster does."""

    def __init__(self):
        self.futures = []

    def submit(self, work, unit):
        self.futures.append(future := Future())
        if len(self.futures) == 1:
            future.set_result(work(unit))
        return future


def test_leaving_the_loop_cancels_the_rest():
    executor = _OneDone()
    loop = cluster.each(abs, list(range(100)), executor)
    assert next(loop) == (0, 0)
    assert not any(future.cancelled() for future in executor.futures)
    loop.close()
    assert [future.cancelled() for future in executor.futures] == [False] + 99 * [True]


def test_what_is_done_does_not_wait_for_a_worker_that_is_a_thread():
    begun, go_on = threading.Event(), threading.Event()

    def work(n: int) -> bool:
        begun.set()
        return n == 0 or go_on.wait(10)

    class _OneThenTheOther(ThreadPoolExecutor):
        def submit(self, call, unit):
            begun.clear()
            future = super().submit(call, unit)
            assert begun.wait(10)
            if unit == 0:
                future.result(10)
            return future

    with _OneThenTheOther(1) as executor:
        loop = cluster.each(work, [0, 1], executor)
        assert next(loop) == (0, True)
        go_on.set()
        assert next(loop) == (1, True), "the first came only after the second"


def test_a_worker_works_in_the_callers_folder_with_its_command_and_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = cluster._Call(
        work=lambda unit: (os.getcwd(), sys.argv, torch.get_num_threads()),
        folder=str(tmp_path.parent), command=["tunemri", "x"], threads=2, versions=cluster._versions(),
    )  # fmt: skip
    before = os.getcwd(), sys.argv, torch.get_num_threads()
    assert call(None)[0] == (str(tmp_path.parent), ["tunemri", "x"], 2)
    assert (os.getcwd(), sys.argv, torch.get_num_threads()) == before
    with pytest.raises(errors.BadOption, match="same folders") as caught:
        dataclasses.replace(call, folder=str(tmp_path / "absent"))(None)
    assert caught.value.exit_code == 3


def test_another_version_on_a_worker_is_said_or_refused():
    call = cluster._Call(work=abs, folder=os.getcwd(), command=[], threads=1, versions=cluster._versions())
    other = dataclasses.replace(call, versions={**call.versions, "torch": "0.1"})
    result, said = other(-3)
    assert result == 3
    assert f"torch {torch.__version__}, here 0.1" in said[0][0]
    with pytest.raises(errors.BadOption, match=r"tunemri .*, here 99"):
        dataclasses.replace(call, versions={**call.versions, "tunemri": "99"})(-3)


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__ if name[0].isupper()][:-1])
def test_every_error_survives_the_journey(kind):
    if not issubclass(kind, errors.TunemriError):
        return
    error = kind("found this", file="a.h5", key="kspace", help="try that", exit_code=7)
    again = copy.copy(error)  # goes the way of pickle
    assert (type(again), str(again), again.exit_code, again.help) == (kind, str(error), 7, "try that")


def test_what_fails_between_here_and_there_is_one_of_our_errors():
    class KilledWorker(Exception):
        pass

    for error, kind in (
        (CancelledError(), errors.BadOption),
        (KilledWorker(), errors.NoMemory),
        (ModuleNotFoundError("no", name="tunemri"), errors.BadOption),
    ):
        found = cluster._translated(error)
        assert isinstance(found, kind)
        assert found.exit_code == 3
    assert isinstance(cluster._translated(ValueError("x")), ValueError)


def test_no_scheduler_and_no_dask_are_one_line_each(run, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    monkeypatch.setattr(cluster, "_PATIENCE", 1.0)
    path, before = write_scan(tmp_path / "s.h5"), folder_state(tmp_path)
    for address in ("tcp://127.0.0.1:9", "nonsense://1", "127.0.0.1"):
        code, _, err = run("sweep", path, "-m", "tv", "--grid", "lam=2", "-o", "d", "--cluster", address)
        assert (code, len(err)) == (3, 1), err
        assert err[0].startswith(f"error[bad_option]: {address}: cluster: no dask scheduler answers")
    monkeypatch.setitem(sys.modules, "distributed", None)
    code, _, err = run("sweep", path, "-m", "tv", "--grid", "lam=2", "-o", "d", "--cluster", "tcp://127.0.0.1:9")
    assert (code, len(err)) == (3, 1)
    assert "pip install '.[cluster]'" in err[0]
    assert folder_state(tmp_path) == before


def test_the_recipes_for_queueing_systems_are_jobs_that_ask_for_what_they_say():
    jobqueue = pytest.importorskip("dask_jobqueue", reason="the extra `cluster` is not installed")
    page = (Path(__file__).parents[1] / "docs/cluster.md").read_text()
    found = re.findall(r"(\w+Cluster)(\(.*?\))$", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == ["SLURMCluster", "PBSCluster", "LSFCluster", "SGECluster"]
    for name, arguments in found:
        call = ast.parse(f"f{arguments}").body[0].value
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            queue = getattr(jobqueue, name)(**options, scheduler_options={"dashboard_address": ":0"})
        script = queue.job_script()
        queue.close()
        for wanted in ("compute", "04:00", "--nthreads 1"):
            assert wanted in script, (name, script)
        assert re.search("8G|8000000", script), script


# ------------------------------------------------------------------------------------------------ commands on a cluster


def test_a_sweep_on_a_cluster_is_the_sweep_here(run, tmp_path, local):
    write_scan(tmp_path / "s.h5")
    common = ("sweep", "s.h5", "-m", "tv", "--grid", "lam=5", "--slice", "0:1")
    assert run(*common, "-o", "here")[0] == 0
    code, _, err = run(*common, "-o", "there", "--cluster", local.scheduler_address)
    assert code == 0, err
    assert table(tmp_path / "there/table.csv") == table(tmp_path / "here/table.csv")
    assert (tmp_path / "there/images.npy").read_bytes() == (tmp_path / "here/images.npy").read_bytes()


def test_recon_of_many_scans_on_a_cluster_with_one_that_is_damaged(run, tmp_path, local):
    names = [write_scan(tmp_path / f"s{n}.h5", n).name for n in range(3)]
    whole = (tmp_path / "s1.h5").read_bytes()
    (tmp_path / "s1.h5").write_bytes(whole[: len(whole) // 2])
    common = ("recon", *names, "-m", "tv", "--set", "lam=0.01")
    code, _, said = run(*common, "-o", "here")
    assert code == 1
    code, _, err = run(*common, "-o", "there", "--cluster", local.scheduler_address)
    assert code == 1, err
    assert [line for line in err if line.startswith("error")] == [line for line in said if line.startswith("error")]
    for n in (0, 2):
        assert (tmp_path / f"there/s{n}.h5").read_bytes() == (tmp_path / f"here/s{n}.h5").read_bytes()
        facts = json.loads((tmp_path / f"there/s{n}.h5.json").read_text())
        assert facts["command"][:3] == ["tunemri", "recon", "s0.h5"], "what the user typed, not the worker's"
    summary = json.loads((tmp_path / "there/summary.json").read_text())
    assert [Path(done["scan"]).name for done in summary["done"]] == ["s0.h5", "s2.h5"]


def test_evaluate_on_a_cluster_tuning_included(run, tmp_path, local):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images/a.npy", torch.stack([phantom((32, 28), seed=s) for s in (1, 2)]).numpy())
    common = ("evaluate", "-m", "tv", "-m", "zero-filled", "--data", "images", "--tune", "--metrics", "psnr,mae")
    assert run(*common, "-o", "here")[0] == 0
    code, _, err = run(*common, "-o", "there", "--cluster", local.scheduler_address)
    assert code == 0, err
    assert table(tmp_path / "there/rows.csv") == table(tmp_path / "here/rows.csv")


def test_a_worker_killed_in_the_middle_loses_nothing(tmp_path, local):
    case = Case(name="scan", scan=scan((24, 20), coils=2), reference=phantom((24, 20))[None])
    model = Contestant(name="tv", model=methods.load("tv"), source="tv")
    expected = evaluation.sweep(case, model, {"lam": 40})
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if not killed:
            killed.append(next(iter(local.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    with cluster.workers(local.scheduler_address) as executor:
        rows = evaluation.sweep(case, model, {"lam": 40}, executor=executor, progress=kill_one)
    assert killed
    assert timeless([row.record for row in rows]) == timeless([row.record for row in expected])
    for row, other in zip(rows, expected, strict=True):
        assert row.image is not None
        assert other.image is not None
        assert torch.equal(row.image, other.image)


# ------------------------------------------------------------------------------------------------ a volume in parts


@pytest.mark.parametrize(("coils", "maps"), [(1, False), (3, False), (3, True)])
def test_a_volume_in_parts_is_the_volume_at_once(coils, maps, run, tmp_path, monkeypatch):
    """To the byte, whatever the parts: maps, scales and images of a slice depend on nothing but the slice."""
    write_scan(tmp_path / "s.h5", slices=5, coils=coils, maps=maps)
    each = 8 * coils * 24 * 20
    files, facts, read = [], [], formats.read
    held: list[int] = []

    def counted(path: Path, **options: Any) -> Any:
        found = read(path, **options)
        held.append(len(found) if found.csm is None else max(len(found), len(found.csm)))
        return found

    monkeypatch.setattr(formats, "read", counted)
    for slices in (5, 2, 1):
        held.clear()
        monkeypatch.setattr(jobs, "_PART", slices * each)
        code, _, err = run("recon", "s.h5", "-m", "tv", "--set", "lam=0.01", "-o", "out.h5", "--overwrite")
        assert code == 0, err
        files.append((tmp_path / "out.h5").read_bytes())
        record = json.loads((tmp_path / "out.h5.json").read_text())
        facts.append({k: v for k, v in record.items() if k not in ("seconds", "written")})
        assert max(held) == slices
    assert facts[0]["shape"] == [5, 24, 20]
    assert len(facts[0]["scale"]) == 5
    assert facts[0]["metrics"]["psnr"] > 20
    assert files[1] == files[2] == files[0]
    assert facts[1] == facts[2] == facts[0]


def test_a_part_that_does_not_fit_the_memory_is_halved(run, tmp_path, monkeypatch):
    """The same file to the byte, a warning, and an error that names what to cut where one slice alone is too much."""
    write_scan(tmp_path / "s.h5", slices=5, coils=3)
    common = ("recon", "s.h5", "-m", "tv", "--set", "lam=0.01")
    assert run(*common, "-o", "whole.h5")[0] == 0
    most, read = 2, formats.read

    def scarce(path: Path, *, slices: slice | None = None) -> Any:
        found = read(path, slices=slices)
        if len(found) > most:
            raise errors.NoMemory("not enough memory to read it", file=path)
        return found

    monkeypatch.setattr(formats, "read", scarce)
    code, _, err = run(*common, "-o", "parts.h5")
    assert code == 0, err
    assert [line for line in err if "not enough memory" in line] == [
        f"warning[note]: s.h5: not enough memory for {n} slices at a time: going on with {m}"
        for n, m in ((5, 3), (3, 2))
    ]
    assert (tmp_path / "parts.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    most, before = 0, folder_state(tmp_path)
    code, _, err = run(*common, "-o", "none.h5")
    assert code == 3
    assert err[-1].startswith("error[no_memory]: s.h5: not enough memory to read it")
    assert folder_state(tmp_path) == before


def test_parts_of_a_selection_and_formats_that_wait_for_the_whole(run, tmp_path, monkeypatch):
    write_scan(tmp_path / "s.h5", slices=5)
    whole, parts = [], []
    for part, found in ((2**26, whole), (2 * 8 * 3 * 24 * 20, parts)):
        monkeypatch.setattr(jobs, "_PART", part)
        for out in ("out.npy", "out.nii.gz"):
            common = ("-m", "sense", "--slice", "1:5", "-o", out, "--overwrite")
            assert run("recon", "s.h5", *common)[0] == 0
            found.append(formats.read_image(tmp_path / out).data)
    assert whole[0].shape[0] == 4
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a, b)


def test_dark_slices_at_the_ends_have_no_image_and_a_dark_volume_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_PART", 2 * 8 * 20 * 24)
    s = scan((24, 20), slices=6)
    kspace = s.kspace.clone()
    kspace[:2] = kspace[5:] = 0
    formats.write(tmp_path / "ends.h5", dataclasses.replace(s, kspace=kspace))
    code, _, err = run("recon", "ends.h5", "-m", "tv", "-o", "out.h5")
    assert code == 0, err
    image = formats.read_image(tmp_path / "out.h5").data
    assert not image[:2].any()
    assert not image[5:].any()
    expected = methods.reconstruct(dataclasses.replace(s, kspace=kspace), methods.load("tv")).image
    assert relative(image.abs(), expected.abs()) < 1e-6
    import h5py

    with h5py.File(tmp_path / "ends.h5", "r+") as f:
        f["kspace"][...] = 0
    before = folder_state(tmp_path)
    code, _, err = run("recon", "ends.h5", "-m", "tv", "-o", "none.h5")
    assert code == 2
    assert "every sample is zero" in err[-1]
    assert folder_state(tmp_path) == before
