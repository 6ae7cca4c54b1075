"""Training that survives: killed, told to stop, damaged, asked twice, on two processes; and recipes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from laws import folder_state, lines, random, relative
from tunemri import datasets, errors, training
from tunemri.datasets import Example, Sampler
from tunemri.errors import TunemriWarning
from tunemri.masks import MASKS, make_mask
from tunemri.methods import load
from tunemri.methods.hyperrecon import HyperRecon, SingleWeight
from tunemri.operators import Cartesian
from tunemri.simulate import phantom
from tunemri.training import Plan, fit, match_scales, read_recipe, train

TESTS = Path(__file__).parent
UNROLLED = {"name": "unrolled", "stages": 1, "width": 4}
STEPS = 24


def model() -> HyperRecon:
    torch.manual_seed(0)
    return HyperRecon(main=UNROLLED, widths=[6, 4])


def batches(step: int, rank: int = 0, batch: int = 2) -> Example:
    x = random((batch, 16, 18), seed=1000 * rank + step)
    A = Cartesian(lines((16, 18)))
    return Example(y=A(x), A=A, target=x)


def plan(**changes) -> Plan:
    return Plan(**({"steps": STEPS, "warmup": 4, "checkpoint": 0.0} | changes))


def weights(m) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in m.parameters()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> torch.Tensor:
    torch.set_num_threads(1)
    return weights(fit(model(), batches, plan(), tmp_path_factory.mktemp("whole")))


# What a child process runs: the same training, saying each step before it takes it, and waiting at the last one asked
# for, so that it never ends before it is stopped.
CHILD = f"""
import signal, sys
sys.path.insert(0, {str(TESTS)!r})
import torch
torch.set_num_threads(1)
from test_training import batches, model, plan, weights
from tunemri.training import Interrupted, fit

folder, last = sys.argv[1], int(sys.argv[2])

def told(step, rank=0):
    print(step, flush=True)
    if step == last:
        signal.alarm(120)
        signal.pause()
    return batches(step, rank)

try:
    fit(model(), told, plan(), folder, resume=True)
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""


def child(folder: Path, last: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, str(folder), str(last)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_step(process: subprocess.Popen[str], step: int) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            return int(line)
    raise AssertionError(f"ended before step {step}")


# ------------------------------------------------------------------------------------------------ resume


def test_killed_at_any_step_and_resumed_is_the_same_to_the_bit(tmp_path, uninterrupted):
    """Three kills in one run, each at another moment of a step: also in the middle of a save."""
    for step, delay in ((5, 0.0), (11, 0.004), (17, 0.011)):
        process = child(tmp_path, last=step + 3)
        wait_for_step(process, step)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    resumed_from = []

    def counted(step, rank=0):
        resumed_from.append(step)
        return batches(step, rank)

    final = fit(model(), counted, plan(), tmp_path, resume=True)
    assert 15 <= resumed_from[0] < STEPS, "it must go on, not start again"
    assert torch.equal(weights(final), uninterrupted)


def test_told_to_stop_it_saves_and_goes_on(tmp_path, uninterrupted):
    process = child(tmp_path, last=9)
    wait_for_step(process, 6)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "state.safetensors").exists()
    assert not (tmp_path / "lock.json").exists()
    assert torch.equal(weights(fit(model(), batches, plan(), tmp_path, resume=True)), uninterrupted)


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(model(), batches, plan(steps=2), tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_finished_run_resumes_to_itself(tmp_path, uninterrupted):
    fit(model(), batches, plan(), tmp_path)
    before = folder_state(tmp_path)
    assert torch.equal(weights(fit(model(), batches, plan(), tmp_path, resume=True)), uninterrupted)
    assert folder_state(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "missing"])
def test_a_damaged_state_falls_back_to_the_one_before(damage, tmp_path, uninterrupted):
    class Stop(Exception):
        pass

    def until(step, rank=0):
        if step == 10:
            raise Stop
        return batches(step, rank)

    with pytest.raises(Stop):
        fit(model(), until, plan(), tmp_path)
    newest = tmp_path / "state.safetensors"
    whole = newest.read_bytes()
    if damage == "missing":  # killed between the two renames
        newest.unlink()
        again = fit(model(), batches, plan(), tmp_path, resume=True)
    else:
        newest.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": whole[::-1]}[damage])
        with pytest.warns(TunemriWarning, match="trying the state before it"):
            again = fit(model(), batches, plan(), tmp_path, resume=True)
    assert torch.equal(weights(again), uninterrupted)


def test_a_folder_that_holds_a_run_is_not_started_over(tmp_path):
    fit(model(), batches, plan(steps=2), tmp_path)
    before = folder_state(tmp_path)
    with pytest.raises(errors.BadOption, match="already holds a run"):
        fit(model(), batches, plan(steps=2), tmp_path)
    assert folder_state(tmp_path) == before


def test_another_recipe_is_refused_and_says_what_differs(tmp_path):
    recipe = {"data": {"sources": ["a"], "batch": 2}}
    fit(model(), batches, plan(steps=2), tmp_path, recipe=recipe)
    before = folder_state(tmp_path)
    with pytest.raises(errors.BadOption, match=r"recipe\.data\.batch was 2, is 3"):
        fit(model(), batches, plan(steps=2), tmp_path, resume=True, recipe={"data": {"sources": ["a"], "batch": 3}})
    with pytest.raises(errors.BadOption, match=r"plan\.lr was 0\.001, is 0\.01"):
        fit(model(), batches, plan(steps=2, lr=0.01), tmp_path, resume=True, recipe=recipe)
    assert folder_state(tmp_path) == before


# ------------------------------------------------------------------------------------------------ one at a time


def test_a_busy_folder_is_refused(tmp_path):
    first = child(tmp_path, last=0)
    try:
        wait_for_step(first, 0)
        with pytest.raises(errors.Busy, match=f"process {first.pid}"):
            fit(model(), batches, plan(), tmp_path, resume=True)
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == first.pid
    finally:
        first.kill()
        first.communicate()


def test_the_claim_of_the_dead_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "lock.json").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    fit(model(), batches, plan(steps=1), tmp_path)
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize("claim", ["", "{", "[]", '{"pid": "x", "host": "here"}', '{"pid": 1, "host": "elsewhere"}'])
def test_a_claim_that_we_cannot_judge_is_respected(claim, tmp_path):
    (tmp_path / "lock.json").write_text(claim)
    with pytest.raises(errors.Busy, match=r"lock\.json"):
        fit(model(), batches, plan(steps=1), tmp_path)
    assert (tmp_path / "lock.json").read_text() == claim


# ------------------------------------------------------------------------------------------------ what is not a number


def poisoned(*steps):
    def make(step, rank=0):
        batch = batches(step, rank)
        return Example(y=batch.y, A=batch.A, target=batch.target * float("nan")) if step in steps else batch

    return make


def test_one_bad_step_is_skipped_and_said(tmp_path):
    with pytest.warns(TunemriWarning) as said:
        final = fit(model(), poisoned(3, 7, 8), plan(), tmp_path)
    assert [str(w.message) for w in said] == [f"step {n}: gradient is not finite, step skipped" for n in (3, 7, 8)]
    assert bool(weights(final).isfinite().all())


def test_three_bad_steps_stop_it_with_the_last_good_state(tmp_path):
    with pytest.warns(TunemriWarning), pytest.raises(errors.NonFinite, match="three steps running up to 9"):
        fit(model(), poisoned(7, 8, 9), plan(), tmp_path)
    state = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert all(bool(v.isfinite().all()) for v in state.values())
    assert not (tmp_path / "lock.json").exists()


# ------------------------------------------------------------------------------------------------ the loop


def test_training_lowers_the_loss_and_returns_the_averaged_weights(tmp_path):
    said = []
    m = model()
    start = weights(m)
    one = lambda step, rank: batches(0)
    final = fit(m, one, plan(steps=60, lr=5e-3, checkpoint=1e9), tmp_path, report=said.append)
    value = lambda w: float(sum(w.loss(batches(0), torch.Generator().manual_seed(s)).detach() for s in range(5)))
    assert value(final) < 0.9 * value(model())
    assert said[-1]["step"] == 60
    assert said[-1]["rate"] < 5e-5
    assert not final.training
    state = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert not torch.equal(weights(final), start)
    for name, p in final.named_parameters():
        assert torch.equal(p, state[f"average.{name}"])
        assert not torch.equal(p, state[f"model.{name}"])


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    p = Plan(steps=100, lr=2.0, warmup=10)
    rates = [p.rate(n) for n in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0}, {"lr": float("nan")}, {"warmup": -1}, {"clip": float("inf")}], ids=str
)
def test_an_impossible_plan_is_refused(wrong):
    with pytest.raises(errors.BadOption, match=rf"training\.{next(iter(wrong))}"):
        Plan(**({"steps": 5} | wrong))


TWO = f"""
import os, sys
sys.path.insert(0, {str(TESTS)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_training import UNROLLED, batches, plan, single
import torch.distributed as dist
from tunemri.methods.hyperrecon import HyperRecon
from tunemri.training import fit
folder = Path(sys.argv[1])
fit(single(), batches, plan(steps=2), folder / "single")
torch.manual_seed(0)
following = fit(HyperRecon(main=UNROLLED, widths=[4], scales="auto"), batches, plan(steps=2), folder / "hyper")
both = [torch.empty(2), torch.empty(2)]
dist.all_gather(both, following.scales)
assert torch.equal(both[0], both[1]), both
dist.barrier()
os._exit(0)  # gloo's threads can abort an interpreter that is closing down
"""


def single() -> SingleWeight:
    torch.manual_seed(0)
    return SingleWeight(main=UNROLLED)


def test_two_processes_take_the_step_of_their_joint_batch(tmp_path):
    """torchrun, B samples in each process: Adam sees the mean gradient, that of one batch of 2 B; buffers stay equal."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "two")], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    def joint(step, rank=0):
        a, b = batches(step, 0), batches(step, 1)
        return Example(y=torch.cat((a.y, b.y)), A=a.A, target=torch.cat((a.target, b.target)))

    fit(single(), joint, plan(steps=2), tmp_path / "one")
    one, two = (safetensors.torch.load_file(tmp_path / n / "state.previous.safetensors") for n in ("one", "two/single"))
    moments = [k for k in one if k.startswith("adam.exp_avg.")]
    assert moments
    join = lambda state: torch.cat([state[k].flatten() for k in moments])
    assert relative(join(two), join(one)) < 1e-5


# ------------------------------------------------------------------------------------------------ recipes

RECIPE = """
method = "hyperrecon"
[arguments]
main = { name = "unrolled", stages = 1, width = 4 }
widths = [6, 4]
[scales]
steps = 3
examples = 2
[data]
batch = 2
size = 32
bank = 1
masks = ["cartesian-random", "radial"]
coils = 2
[training]
steps = 4
checkpoint = 0.0
warmup = 2
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    images = tmp_path / "images"
    images.mkdir()
    import numpy as np

    np.save(images / "a.npy", phantom((40, 36)).numpy()[None])
    np.save(images / "b.npy", phantom((24, 50), seed=1).numpy()[None])
    return path


def test_a_recipe_from_images_to_weights(recipe, tmp_path):
    run = tmp_path / "run"
    followed = read_recipe(recipe, [f"data.folder={json.dumps(str(tmp_path / 'images'))}"])
    made = train(followed, run)
    again = load(run / "model.safetensors")
    assert torch.equal(weights(made), weights(again))
    assert isinstance(again, HyperRecon)
    assert set(again.trained) == {"acceleration", "size", "coils", "noise", "centre", "block"}
    assert again.trained["size"] == [followed["data"]["size"] // 2, 4 * followed["data"]["size"]]
    assert bool((again.scales > 0).all())
    assert not torch.equal(again.scales, torch.ones(2)), "scales were matched"
    with pytest.raises(errors.BadOption, match="already holds a run"):
        train(followed, run)
    resumed = train(followed, run, resume=True)
    assert torch.equal(weights(resumed), weights(made))


def test_changes_on_the_command_line(recipe):
    changed = read_recipe(
        recipe, ["training.steps=9", "data.masks=['radial']", "method=single-weight", "arguments.main.width=2"]
    )
    assert changed["training"]["steps"] == 9
    assert changed["data"]["masks"] == ["radial"]
    assert changed["method"] == "single-weight"
    assert changed["arguments"]["main"] == {"name": "unrolled", "stages": 1, "width": 2}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ("training.stpes=3", errors.BadOption, "did you mean 'steps'"),
        ("data.sorces=[]", errors.BadOption, "did you mean 'sources'"),
        ("trainig.steps=3", errors.BadOption, "did you mean 'training'"),
        ("training.steps", errors.BadOption, "section.key=value"),
        ("method.name=3", errors.BadOption, "not a section"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(change, kind, words, recipe):
    with pytest.raises(kind, match=words):
        read_recipe(recipe, [change])


def test_recipes_that_are_none(tmp_path):
    path = tmp_path / "r.toml"
    for text, kind in (("= 3", errors.UnreadableFile), ('method = "tv"', errors.MissingKey), ("", errors.TunemriError)):
        path.write_text(text)
        with pytest.raises(kind):
            read_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.UnreadableFile):
        read_recipe(path)


def test_every_recipe_that_ships_can_be_read():
    found = sorted((TESTS.parent / "recipes").glob("*.toml"))
    assert found
    for path in found:
        read = read_recipe(path)
        Plan(**read["training"])
        torch.manual_seed(0)
        training.make(read["method"], read.get("arguments"))


def test_scales_are_the_losses_of_networks_that_know_one_goal(tmp_path):
    """Each is the loss that a network trained for that term alone reaches, so lower than before training."""
    build = lambda w: (torch.manual_seed(0), SingleWeight(main=UNROLLED, weights=w))[1]
    fixed = lambda step, rank=0: batches(0)
    scales = match_scales(build, 2, fixed, plan(steps=80, lr=1e-2, checkpoint=1e9), tmp_path, examples=2)
    for k, scale in enumerate(scales):
        before = build([float(j == k) for j in range(2)]).loss(batches(0), torch.Generator())
        assert 0 < scale < 0.9 * float(before.detach().exp())  # the loss is the logarithm


# ------------------------------------------------------------------------------------------------ batches


def sampler(**changes) -> Sampler:
    images = {"a": [phantom((40, 44)), phantom((30, 26), seed=1)], "b": [phantom((64, 64), seed=2).to(torch.complex64)]}
    return Sampler(**({"images": images, "batch": 3, "size": 32, "bank": 2, "coils": 4} | changes))


def test_a_batch_depends_on_step_and_rank_and_on_nothing_else():
    first, again = sampler(), sampler()
    again(0), again(5, 1)
    for step, rank in ((3, 0), (4, 0), (3, 1)):
        a, b = first(step, rank), again(step, rank)
        assert torch.equal(a.y, b.y)
        assert a.target is not None
        assert b.target is not None
        assert torch.equal(a.target, b.target)
    y = [first(*at).target for at in ((3, 0), (4, 0), (3, 1))]
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[0], y[2])


def test_sizes_come_in_turn_with_as_many_pixels():
    draw = sampler(batch=4, size=32, sizes=[32, 16, 64])
    assert [tuple(draw(step).target.shape) for step in range(4)] == [
        (4, 32, 32),
        (16, 16, 16),
        (1, 64, 64),
        (4, 32, 32),
    ]
    assert torch.equal(draw(3, 1).target, sampler(batch=4)(3, 1).target)
    assert draw.domain["size"] == [8, 256]
    assert draw.domain["acceleration"] == sampler().domain["acceleration"]
    with pytest.raises(errors.BadOption, match=r"data\.size"):
        sampler(sizes=[32, 0])


def test_masks_of_one_protocol_are_as_they_are_made():
    """Otherwise they are turned, mirrored, and have other options of their family."""
    families = {"masks": ("cartesian-random",), "acceleration": (4.0, 4.0), "coils": 1, "bank": 3}
    plain = [make_mask("cartesian-random", (32, 32), 4.0, seed=k).bool() for k in range(3)]
    for varied in (False, True):
        draw = sampler(**families, varied=varied)
        seen = [y[0] != 0 for step in range(6) for y in draw(step).y]
        assert all(any(torch.equal(one, mask) for mask in plain) for one in seen) is not varied


@pytest.mark.parametrize("name", MASKS)
def test_data_and_target_of_a_batch_belong_together(name):
    """Without noise, and with the true maps, y is A x; always, the scale is of the order of one."""
    draw = sampler(masks=[name], noise=(1e-9, 1e-9))
    exact = 0
    for step in range(8):
        batch = draw(step)
        assert batch.target is not None
        assert batch.target.shape == (3, 32, 32)
        assert bool(torch.view_as_real(batch.y).isfinite().all())
        peak = batch.target.abs().flatten(1).amax(1)
        assert bool(((peak > 0.1) & (peak < 10)).all()), peak
        exact += relative(batch.y, batch.A(batch.target)) < 1e-4
    assert exact >= 3


def test_batches_vary_in_coils_masks_and_noise():
    draw = sampler(noise=(0.02, 0.02))
    seen = [draw(step) for step in range(12)]
    assert {b.y.shape[1] for b in seen} >= {1}
    assert len({b.y.shape[1] for b in seen}) > 1
    assert len({float((b.y != 0).float().mean()) for b in seen}) > 6


@pytest.mark.parametrize(
    "wrong",
    [{"acceleration": (4.0, 2.0)}, {"acceleration": (0.5, 2.0)}, {"size": 8}, {"batch": 0}, {"coils": 0}],
    ids=str,
)
def test_impossible_samplers_are_refused(wrong):
    with pytest.raises(errors.BadOption):
        sampler(**wrong)


def test_images_of_a_folder_and_of_the_shared_data(tmp_path, data):
    loaded = datasets.load_images(data / "val", ["openms", "cardiac"])
    assert set(loaded) == {"openms", "cardiac"}
    for planes in loaded.values():
        assert planes
        for x in planes:
            assert float(torch.quantile(x.abs().flatten().double(), 0.995)) == pytest.approx(1, rel=1e-3)
    with pytest.raises(errors.BadOption, match="did you mean 'openms'"):
        datasets.load_images(data / "val", ["opnms"])
    with pytest.raises(errors.TunemriError):
        datasets.load_images(tmp_path, ["openms"])
    with pytest.raises(errors.NoData, match="no image found"):
        datasets.load_images(tmp_path)
