"""torchrun: two processes take the step of their joint batch, whatever the method; resume to the bit; one of them speaks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from laws import lines, random, relative
from tunemri import errors, training
from tunemri.datasets import Example
from tunemri.methods import METHODS, Reconstructor, make, needs_weights
from tunemri.operators import Cartesian
from tunemri.simulate import phantom
from tunemri.training import Plan, fit

TESTS = Path(__file__).parent
UNROLLED = {"name": "unrolled", "stages": 1, "width": 4}
META = {"phases": 2, "tasks": [0.1, 0.5], "features": {"channels": 2}, "proposal": {"width": 4, "levels": 2}}
# Every method that trains, and the ways in which its loss makes a gradient.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "hyperrecon": ("hyperrecon", {"main": UNROLLED, "widths": [6, 4]}),
    "hyperrecon, antithetic": ("hyperrecon", {"main": UNROLLED, "widths": [4], "antithetic": True}),
    "hyperrecon, scales": ("hyperrecon", {"main": UNROLLED, "widths": [4], "scales": "auto"}),
    "hyperrecon, selection": (
        "hyperrecon",
        {"main": UNROLLED, "widths": [4], "objective": "mean", "selection": {"keep": 0.5}},
    ),
    "hyperrecon, coupled": ("hyperrecon", {"main": {"name": "unet", "width": 4, "batch_norm": True}, "widths": [4]}),
    "single-weight": ("single-weight", {"main": {"name": "unet", "width": 4}}),
    "meta-learned": ("meta-learned", {**META, "training": {"bilevel": "joint"}}),
    "meta-learned, alternate": ("meta-learned", {**META, "training": {"bilevel": "alternate"}}),
    "meta-learned, penalty": ("meta-learned", {**META, "training": {"bilevel": "penalty", "penalty": 0.1}}),
    "generative": ("generative", {"energy": {"widths": [4, 6]}, "levels": [0.01, 1.0]}),
    "generative, likelihood": (
        "generative",
        {
            "energy": {"name": "paper", "size": 16, "widths": [4, 4]},
            "likelihood": {"chain": 6, "replay": 4},
        },
    ),
}


def built(name: str) -> Reconstructor:
    torch.manual_seed(0)
    return make(*FAMILIES[name])


def batches(step: int, rank: int = 0, shape: tuple[int, int] = (16, 18)) -> Example:
    def example(seed: int) -> Example:
        x = random((2, *shape), seed=seed) * 0.1 + phantom(shape, seed=seed)
        A = Cartesian(lines(shape))
        return Example(y=A(x), A=A, target=x)

    lower, upper = (example(1000 * rank + 10 * step + level) for level in (0, 1))
    return Example(y=lower.y, A=lower.A, target=lower.target, upper=upper)


def batches_of(name: str) -> Callable[..., Example]:
    """What a family trains on: the paper's energy knows images of one size alone."""
    return partial(batches, shape=(16, 16)) if name == "generative, likelihood" else batches


def plan(**changes: Any) -> Plan:
    return Plan(**({"steps": 1, "warmup": 0, "checkpoint": 0.0, "clip": 1e9} | changes))


def weights(model: Reconstructor) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


RECIPE = """
method = "single-weight"
arguments.main = { name = "unrolled", stages = 1, width = 4 }
data = { batch = 1, size = 16, bank = 1, masks = ["random"], coils = 1 }
training = { steps = 2, checkpoint = 0.0, warmup = 1 }
"""

# What each of two processes runs: all tests below look at what it leaves behind.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(TESTS)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import torch.distributed as dist
from test_distributed import FAMILIES, batches, batches_of, built, fit, plan, weights
from tunemri import cli, errors

folder = Path(sys.argv[1])
for name in FAMILIES:
    model = fit(built(name), batches_of(name), plan(), folder / name)
    own = torch.cat([weights(model), *(b.double().flatten() for b in model.buffers())])
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    assert torch.equal(*both), f"{{name}}: the processes have drifted apart"

class Stop(Exception):
    pass

def until(step, rank=0):
    if step == 2:
        raise Stop
    return batches(step, rank)

fit(built("hyperrecon"), batches, plan(steps=4), folder / "whole")
try:
    fit(built("hyperrecon"), until, plan(steps=4), folder / "resumed")
except Stop:
    pass
dist.barrier()  # the state must be there for all before any of them reads it
fit(built("hyperrecon"), batches, plan(steps=4), folder / "resumed", resume=True)

def poisoned(step, rank=0):
    batch = batches(step, rank)
    return type(batch)(y=batch.y, A=batch.A, target=batch.target * float("nan")) if step == rank == 1 else batch

try:
    cli.main(["--version"])  # from here on warnings are lines, as for a user
except SystemExit:
    pass
fit(built("single-weight"), poisoned, plan(steps=3), folder / "poisoned")
dist.barrier()
sys.argv = ["tunemri", "train", str(folder / "recipe.toml"), "--set", f"data.folder={{folder / 'images'}}", "-o", str(folder / "run")]
try:
    cli.main()
except SystemExit as stop:
    code = stop.code
sys.stdout.flush()
os._exit(code or 0)  # gloo's threads can abort an interpreter that is closing down
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the runs of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "images").mkdir()
    np.save(folder / "images" / "a.npy", phantom((20, 18)).numpy()[None])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(folder / "script.py"), str(folder)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_method_that_trains_is_among_the_families():
    assert {method for method, _ in FAMILIES.values()} == {name for name in METHODS if needs_weights(name)}


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_take_the_mean_of_the_gradients_of_their_samples(name, two, tmp_path, monkeypatch):
    gradients: list[Tensor] = []

    def recorded(parameters: Any, *_: Any) -> None:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradients.append(torch.cat([g.flatten() for g in own]))

    monkeypatch.setattr(training, "_all_reduce", recorded)
    monkeypatch.setattr(training, "_share_buffers", lambda *_: None)
    for rank in range(2):
        monkeypatch.setattr(training, "_distributed", lambda rank=rank: (rank, 2))
        model = fit(built(name), batches_of(name), plan(), tmp_path / str(rank))
    assert relative(gradients[0], gradients[1]) > 0.01, "each process has samples of its own"
    mean = (gradients[0] + gradients[1]) / 2
    state = safetensors.torch.load_file(two[0] / name / "state.safetensors")
    # After one step Adam's first moment is a tenth of the gradient.
    taken = torch.cat([state[f"adam.exp_avg.{key}"].flatten() * 10 for key, p in model.named_parameters()])
    assert relative(taken, mean) < 1e-5


def test_resume_on_two_processes_is_exact_and_only_on_two(two):
    folder, _ = two
    whole, resumed = (safetensors.torch.load_file(folder / n / "state.safetensors") for n in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    with pytest.raises(errors.BadOption, match="world was 2, is 1"):
        fit(built("hyperrecon"), batches, plan(steps=4), folder / "resumed", resume=True)


def test_a_killed_process_ends_the_others_who_say_so(tmp_path):
    """Nobody waits for the dead, and the last state is whole."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends whoever is left
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from test_distributed import batches, built, errors, fit, plan

def dying(step, rank=0):
    if step == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return batches(step, rank)

try:
    fit(built("hyperrecon"), dying, plan(steps=4), sys.argv[1])
except errors.NoMemory as error:
    Path(sys.argv[1], "said").write_text(f"{{error.exit_code}} {{error}}")
os._exit(1)
"""
    (tmp_path / "script.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "script.py"), str(tmp_path / "run")], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    said = (tmp_path / "run/said").read_text()
    assert said.startswith("3 ") and "another process of this training has ended" in said, done.stderr
    state = safetensors.torch.load_file(tmp_path / "run/state.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert not (tmp_path / "run/lock.json").exists()


def test_one_process_speaks_for_all(two):
    """One line of result, each progress and warning once."""
    folder, done = two
    results = [line for line in done.stdout.splitlines() if "model.safetensors" in line]
    assert len(results) == 1, done.stdout
    assert (folder / "run" / "model.safetensors").is_file()
    assert done.stderr.count("gradient is not finite, step skipped") == 1, done.stderr
    assert done.stderr.count("step 2/2") == 1, done.stderr


@pytest.mark.parametrize("name", ["hyperrecon", "single-weight", "meta-learned", "generative"])
def test_bfloat16_in_training_changes_the_gradient_by_a_few_per_cent(name, tmp_path, monkeypatch):
    """Convolutions alone are rounded; weights, data consistency and losses stay as they are."""
    found: dict[str, tuple[float, Tensor]] = {}
    for precision in ("float32", "bfloat16"):
        model, said = built(name), []
        fit(model, batches, plan(precision=precision), tmp_path / precision, report=said.append)
        state = safetensors.torch.load_file(tmp_path / precision / "state.safetensors")
        assert all(value.dtype != torch.bfloat16 for value in state.values())
        moments = [state[f"adam.exp_avg.{key}"].flatten() for key, _ in model.named_parameters()]
        found[precision] = said[-1]["loss"], torch.cat(moments)
    (loss, gradient), (rounded, other) = found["float32"], found["bfloat16"]
    print(name, loss, rounded, relative(other, gradient))
    assert rounded == pytest.approx(loss, rel=0.01, abs=0.01)
    assert relative(other, gradient) < 0.05
    assert not torch.equal(other, gradient), "it did nothing"
