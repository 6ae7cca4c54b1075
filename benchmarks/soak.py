"""Kill long work at random moments, go on, and compare with work that was left alone.

    python benchmarks/soak.py --kills 72

Every job is a command of `tunemri`. Killed (SIGKILL) at a random moment, it may leave no torn file under a final name;
gone on with as its user would, it must end with the same result as one that was left alone and leave nothing else behind.
Exits with 1 if anything differs. Children are forked from one process that has everything imported: a kill then costs
what the work costs. Takes minutes; the numbers in docs/reliability.md are its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tunemri import cli, files, formats, methods
from tunemri.methods.hyperrecon import HyperRecon
from tunemri.simulate import phantom

RECIPE = """
method = "hyperrecon"
[arguments]
main = {name = "unrolled", stages = 1, width = 4}
widths = [6, 4]
terms = ["mae", "ssim"]
[data]
folder = "images"
batch = 2
size = 24
coils = 2
bank = 3
masks = ["poisson"]
[training]
steps = 40
warmup = 4
checkpoint = 0.0
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """`first` starts the work, `again` goes on with it; `result` is all that must be equal in the end."""

    first: str
    again: str
    result: Callable[[Path], object]


def without_time(table: Path) -> list[dict[str, str]]:
    """Rows of a table, without the seconds that they took."""
    with open(table, newline="") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def pair(name: str) -> Callable[[Path], object]:
    """An output whose record tells of it."""

    def result(folder: Path) -> object:
        record = json.loads((folder / f"{name}.json").read_text())
        assert record.get("out_sha256", files.sha256(folder / name)) == files.sha256(folder / name)
        return (folder / name).read_bytes()

    return result


JOBS = {
    "train": Job(
        first="train recipe.toml -o run", again="train recipe.toml -o run --resume",
        result=lambda d: (d / "run/model.safetensors").read_bytes(),
    ),
    "sweep": Job(
        first="sweep scan.h5 -m tiny.safetensors --grid ssim=12 -o out",
        again="sweep scan.h5 -m tiny.safetensors --grid ssim=12 -o out --overwrite",
        result=lambda d: (without_time(d / "out/table.csv"), (d / "out/images.npy").read_bytes()),
    ),
    "evaluate": Job(
        first="evaluate -m tiny.safetensors -m tv --data images --landscape 3 -o out",
        again="evaluate -m tiny.safetensors -m tv --data images --landscape 3 -o out --overwrite",
        result=lambda d: (
            without_time(d / "out/rows.csv"), (d / "out/far-pairs.csv").read_bytes(), (d / "out/table.md").read_bytes(),
        ),
    ),
    "recon": Job(
        first="recon scan.h5 b.h5 c.h5 d.h5 -m tv:lam=0.01 -o out",
        again="recon scan.h5 b.h5 c.h5 d.h5 -m tv:lam=0.01 -o out --resume",
        result=lambda d: [pair(f"{name}.h5")(d / "out") for name in ("scan", "b", "c", "d")],
    ),
    "export": Job(
        first="export scan.h5 -m tiny.safetensors -o range.html",
        again="export scan.h5 -m tiny.safetensors -o range.html --overwrite", result=pair("range.html"),
    ),
    "sample": Job(
        first="recon scan.h5 -m energy.safetensors --set estimate=mmse -o sample.h5",
        again="recon scan.h5 -m energy.safetensors --set estimate=mmse -o sample.h5 --overwrite", result=pair("sample.h5"),
    ),
    "adapt": Job(
        first="adapt meta.safetensors scan.h5 --anyway -o new.safetensors",
        again="adapt meta.safetensors scan.h5 --anyway -o new.safetensors --overwrite",
        result=lambda d: safetensors.torch.save(safetensors.torch.load_file(d / "new.safetensors")),
    ),
    "equalise": Job(
        first="equalise tiny.safetensors scan.h5 -o new.safetensors",
        again="equalise tiny.safetensors scan.h5 -o new.safetensors --overwrite",
        result=lambda d: safetensors.torch.save(safetensors.torch.load_file(d / "new.safetensors")),
    ),
    "convert": Job(
        first="convert scan.h5 -o copy.h5", again="convert scan.h5 -o copy.h5 --overwrite", result=pair("copy.h5"),
    ),
    "simulate": Job(
        first="simulate images/a.npy -o made.h5 --mask poisson --coils 4",
        again="simulate images/a.npy -o made.h5 --mask poisson --coils 4 --overwrite", result=pair("made.h5"),
    ),
}  # fmt: skip


def start(command: str, folder: Path) -> int:
    """The process that runs a command in a folder."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        os.chdir(folder)
        null = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(null, 1)
        os.dup2(null, 2)
        words = command.split()
        sys.argv = ["tunemri", *words]
        status = 70
        try:
            cli.main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)
    return child


def finish(command: str, folder: Path) -> float:
    """Run a command to its end; the seconds that it took."""
    began = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(start(command, folder), 0)[1])
    assert status == 0, f"{command}: exit {status}\n{(folder / 'log').read_text()[-2000:]}"
    return time.monotonic() - began


def whole(folder: Path) -> None:
    """Every file under a final name can be read to its end."""
    for path in folder.rglob("*"):
        if any(part.startswith(".tunemri-") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if path.suffix == ".json" and path.name != "lock.json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        elif path.suffix == ".npy":
            np.load(path)
        elif (
            path.name in ("made.h5", "copy.h5", "sample.h5", "range.html")
            or path.parent.name == "out"
            and path.suffix == ".h5"
        ):
            assert path.stat().st_size > 1000
            if path.suffix == ".h5":
                formats.inspect(path)


def left_behind(folder: Path) -> list[str]:
    marks = (".tunemri-*", "*.unfinished", "lock.json", "part-*", "damaged.*")
    return sorted(str(path.relative_to(folder)) for mark in marks for path in folder.rglob(mark))


def prepared(folder: Path) -> Path:
    """A folder with what the jobs start from."""
    (folder / "images").mkdir(parents=True)
    for seed, name in enumerate("ab"):
        np.save(folder / "images" / f"{name}.npy", phantom((40, 36), seed=seed)[None].numpy())
    (folder / "recipe.toml").write_text(RECIPE)
    torch.manual_seed(0)
    model = HyperRecon(
        main={"name": "unrolled", "stages": 2, "width": 2}, widths=[4, 2], trained={"acceleration": [2, 8]}
    )
    methods.save(model, folder / "tiny.safetensors")
    meta = {"phases": 2, "tasks": [0.1, 0.5], "features": {"channels": 2}, "proposal": {"width": 4, "levels": 2}}
    methods.save(methods.make("meta-learned", meta), folder / "meta.safetensors")
    energy = {"energy": {"widths": [4, 6]}, "mode": {"levels": 3}, "draws": {"chains": 2, "samples": 4}}
    methods.save(methods.make("generative", energy), folder / "energy.safetensors")
    finish("simulate images/a.npy -o scan.h5 --mask poisson --acceleration 3 --coils 4", folder)
    for name in "bcd":
        shutil.copy(folder / "scan.h5", folder / f"{name}.h5")
    (folder / "log").unlink()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default=",".join(JOBS))
    options = parser.parse_args()
    rng, names = random.Random(options.seed), options.jobs.split(",")
    failures = 0
    print("job        kills  of runs  gone on with  same result  left behind")
    with tempfile.TemporaryDirectory() as scratch:
        clean = prepared(Path(scratch) / "clean")
        for number, name in enumerate(names):
            job, share = JOBS[name], len(range(number, options.kills, len(names)))
            alone = shutil.copytree(clean, Path(scratch) / f"{name}-alone")
            seconds = min(finish(job.first, alone), 60.0)
            expected = job.result(alone)
            kills = runs = ends = same = 0
            mess: list[str] = []
            while kills < share:
                folder = shutil.copytree(clean, Path(scratch) / f"{name}-{ends}")
                command = job.first
                for _ in range(4):  # at most so many kills in one piece of work
                    child = start(command, folder)
                    moment = time.monotonic() + rng.uniform(0.02, 1.0) * seconds
                    while (killed := os.waitpid(child, os.WNOHANG) == (0, 0)) and time.monotonic() < moment:
                        time.sleep(0.005)
                    if killed:  # it had not ended yet
                        os.kill(child, signal.SIGKILL)
                        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
                    runs += 1
                    kills += killed
                    whole(folder)
                    command = job.again
                    if not killed or kills >= share:
                        break
                finish(job.again, folder)
                ends += 1
                same += job.result(folder) == expected
                mess += left_behind(folder)
                shutil.rmtree(folder)
            failures += (ends - same) + len(mess)
            print(f"{name:<10} {kills:5d} {runs:8d} {ends:13d} {same:12d} {len(mess):12d}", *mess[:3], flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
