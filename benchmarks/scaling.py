"""What a second process buys: sweep on a dask cluster and training under torchrun, on 1 and 2 processes.

    python benchmarks/scaling.py [--only sweep|training] [--settings 16] [--steps 10]

Strong scaling: the same work on more processes. Weak scaling: as much work for each. Efficiency is the time of one
process over the time of two (times two, for strong scaling). Starting the workers is not counted. The load of the machine
is printed, since a busy one says little; processor seconds, over all processes, show what the division itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from tunemri import cluster, evaluation, methods
from tunemri.evaluation import Case, Contestant
from tunemri.simulate import sample

TRAINING = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tunemri import training
from tunemri.datasets import Sampler
from tunemri.methods import make
from tunemri.simulate import phantom

batch, steps, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.manual_seed(0)
model = make("single-weight", {"main": {"name": "unrolled", "stages": 4, "width": 24}})
images = {"phantoms": [phantom((128, 128), seed=s) for s in range(4)]}
sampler = Sampler(images=images, batch=batch, size=96, masks=["random"], coils=1, bank=4)
plan = lambda n: training.Plan(steps=n, warmup=1, checkpoint=1e9)
training.fit(model, sampler, plan(1), folder / "warm")
wall, used = time.perf_counter(), time.process_time()
training.fit(model, sampler, plan(steps), folder / "run")
found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - used}
(folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort an interpreter that is closing down
"""


def training_seconds(processes: int, batch: int, steps: int) -> tuple[float, float]:
    """(seconds, processor seconds of all) of `steps` steps with `batch` samples in each process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.py").write_text(TRAINING)
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run(
            [*launch, str(folder / "script.py"), str(batch), str(steps), name], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    assert len(found) == processes
    return max(f["wall"] for f in found), sum(f["cpu"] for f in found)


def sweep_seconds(processes: int, settings: int) -> tuple[float, float]:
    """(seconds, processor seconds of the workers) of a sweep of CG-SENSE over the embedded sample."""
    from distributed import Client, LocalCluster

    scan, target = sample()
    case = Case(name="scan", scan=scan, reference=target, source=_Sample())
    at = Contestant(name="sense", model=methods.load("sense"), source="sense")

    def used(client: Any) -> float:
        return sum(client.run(time.process_time).values())

    with (
        warnings.catch_warnings(),
        LocalCluster(n_workers=processes, threads_per_worker=1, dashboard_address=None, silence_logs=50) as local,
        Client(local) as client,
        cluster.workers(local.scheduler_address) as executor,
    ):
        # Every worker reads the scan and estimates its maps once; a long sweep does not notice, a short one would.
        evaluation.sweep(case, at, {"lam": 8 * processes}, executor=executor, keep_images=False)
        wall, before = time.perf_counter(), used(client)
        evaluation.sweep(case, at, {"lam": settings}, executor=executor, keep_images=False)
        return time.perf_counter() - wall, used(client) - before


class _Sample:
    """The embedded sample, read by the worker itself."""

    def __call__(self) -> Case:
        scan, target = sample()
        return Case(name="scan", scan=scan, reference=target)

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)


def report(name: str, one: tuple[float, float], two: tuple[float, float], factor: int) -> None:
    efficiency = one[0] / (factor * two[0])
    print(
        f"{name:18} 1 process {one[0]:7.2f} s ({one[1]:6.2f} cpu)   2 processes {two[0]:7.2f} s ({two[1]:6.2f} cpu)   "
        f"efficiency {efficiency:.2f}   processor time ×{two[1] / one[1]:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("sweep", "training"))
    parser.add_argument("--settings", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} of {os.cpu_count()} cores may be used; load {os.getloadavg()[0]:.1f} at the start")
    if options.only != "training":
        n = options.settings
        one, two, double = sweep_seconds(1, n), sweep_seconds(2, n), sweep_seconds(2, 2 * n)
        report("sweep, strong", one, two, 2)
        report("sweep, weak", one, (double[0], double[1] / 2), 1)
    if options.only != "sweep":
        b, n = options.batch, options.steps
        one, two, double = training_seconds(1, b, n), training_seconds(2, b // 2, n), training_seconds(2, b, n)
        report("training, strong", one, two, 2)
        report("training, weak", one, (double[0], double[1] / 2), 1)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
