"""The one training loop, with resume that is exact to the bit, and the automatic matching of loss scales.

Run it in several processes with `torchrun -m tunemri train …`: gradients are averaged by one explicit
all-reduce of a flat vector (DistributedDataParallel leaves gradients of gradient-based losses unsynchronised).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from . import errors, files
from .datasets import Example, Sampler, load_images
from .methods import Reconstructor, load, make, save
from .methods.generative import Generative
from .methods.hyperrecon import HyperRecon, SingleWeight, bake
from .methods.metalearned import MetaLearned
from .solvers import AdaBelief

__all__ = ["Interrupted", "Plan", "fit", "match_scales", "read_recipe", "train"]

_OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adabelief": AdaBelief}
_STATES = ("state.safetensors", "state.previous.safetensors")  # the newest, and the one before it
_SECTIONS = ("method", "start", "arguments", "scales", "data", "training")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train.

    Arguments:
        steps: optimiser steps in all.
        lr: peak learning rate.
        warmup: steps of linear warm-up; a cosine to zero follows.
        clip: largest norm of the gradient.
        average: decay of the running average of the weights, which is what gets saved; 0 switches it off.
        checkpoint: seconds between checkpoints.
        optimiser: "adam" or "adabelief".
        precision: of the convolutions in training, "float32" or "bfloat16" (1.6 times as fast on processors that
            have it); weights, data consistency and losses keep float32.
        seed: of everything random in training.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 200
    clip: float = 1.0
    average: float = 0.999
    checkpoint: float = 120.0
    optimiser: str = "adam"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise errors.BadOption(f"found {self.precision!r}, expected float32 or bfloat16", key="training.precision")
        if self.optimiser not in _OPTIMISERS:
            raise errors.BadOption(
                f"found {self.optimiser!r}",
                key="training.optimiser",
                help=errors.did_you_mean(self.optimiser, _OPTIMISERS),
            )
        numbers = {k: v for k, v in asdict(self).items() if k not in ("seed", "precision", "optimiser")}
        for name, value in numbers.items():
            if not math.isfinite(value) or value < 0 or (name in ("steps", "lr", "clip") and value == 0):
                raise errors.BadOption(f"found {value}, expected a positive number", key=f"training.{name}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Interrupted(Exception):
    """Training was asked to stop (SIGINT or SIGTERM); its state was saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"signal {signum}")


def fit(
    model: Reconstructor,
    batches: Callable[[int, int], Example],
    plan: Plan,
    folder: str | Path,
    *,
    resume: bool = False,
    recipe: Mapping[str, Any] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Reconstructor:
    """Minimise the mean of `model.loss` over `batches`; return the model with its averaged weights.

    Step n draws its batch and its dials from a seed made of (plan.seed, n), so a run that was killed at any
    step and resumed ends with the same weights, bit for bit, as one that was not (same machine and threads).

    Arguments:
        batches: (step, rank) → Example.
        folder: run folder; holds `state.safetensors` (the newest) and `state.previous.safetensors`.
        resume: go on from the newest readable state in `folder`.
        recipe: what is being trained; a state made by another recipe is refused.
        report: called with step, loss, rate, seconds about every ten seconds.

    Raises:
        Busy: another process trains in this folder.
        BadOption: the folder holds a run and `resume` is false, or the recipe differs.
        NonFinite: the gradient was NaN or Inf in three steps running; the last state is intact.
        NoMemory, NoSpace: for a step, for a state; the last state is intact.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    folder = Path(folder)
    files.make_folder(folder)
    rank, world = _distributed()
    model.train()
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = _OPTIMISERS[plan.optimiser](parameters.values(), lr=plan.lr)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    identity = json.dumps({"recipe": recipe, "plan": asdict(plan), "world": world}, sort_keys=True, default=str)
    with files.claimed(folder, "training") if rank == 0 else nullcontext(), _signals() as asked:
        start, seconds = 0, 0.0
        if resume:
            start, seconds = _restore(folder, model, optimiser, parameters, average, identity)
        else:
            _refuse_a_run(folder)
        began = saved = told = time.monotonic()
        bad = 0
        for step in range(start, plan.steps):
            generator = torch.Generator().manual_seed((plan.seed * 7_368_787 + step) * 1013 + rank)
            for group in optimiser.param_groups:
                group["lr"] = plan.rate(step)
            optimiser.zero_grad(set_to_none=True)
            example = batches(step, rank)
            with errors.enough_memory(partial(_too_large, example)):
                with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16"):
                    loss = model.loss(example, generator)
                loss.backward()
            with _others_alive(folder):
                _all_reduce(parameters.values(), world, asked)
                _share_buffers(model, world)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), plan.clip)
            if not bool(torch.isfinite(norm)):
                bad += 1
                if bad == 3:
                    raise errors.NonFinite(
                        f"loss {float(loss.detach()):g} with a gradient that is not finite, three steps running up to {step}",
                        file=folder, key="loss", help="lower training.lr; the last saved state is sound",
                    )  # fmt: skip
                if rank == 0:
                    errors.warn(f"step {step}: gradient is not finite, step skipped", "non_finite")
            else:
                bad = 0
                optimiser.step()
                with torch.no_grad():
                    # A short memory at first: the average would otherwise remember the initialisation for long.
                    decay = min(plan.average, (1 + step) / (10 + step))
                    for name, p in parameters.items():
                        average[name].lerp_(p, 1 - decay)
            now = time.monotonic()
            last = step + 1 == plan.steps
            if report and rank == 0 and (last or now - told > 10):
                told = now
                spent = seconds + now - began
                report(
                    {
                        "step": step + 1,
                        "steps": plan.steps,
                        "loss": float(loss.detach()),
                        "rate": plan.rate(step),
                        "seconds": spent,
                        "notes": model.notes(),
                    }
                )
            if rank == 0 and (last or asked or now - saved > plan.checkpoint):
                _save(folder, model, optimiser, parameters, average, step + 1, seconds + now - began, identity)
                saved = now
            if asked and not last:
                raise Interrupted(asked[0])
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(average[name])
    return model.eval()


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A TOML recipe of `method`, `start`, `arguments`, `scales`, `data`, `training`, with `section.key=value` changes applied.

    Raises:
        UnreadableFile: not TOML. BadOption: an unknown section or key, or a change that is not `key=value`.
    """
    path = Path(path)
    files.check(path)
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.UnreadableFile(f"not a TOML recipe: {error}", file=path) from error
    for change in changes:
        name, sign, text = change.partition("=")
        if not sign:
            raise errors.BadOption(f"found {change!r}, expected section.key=value", key="set")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word: a path or a name
        *sections, key = name.strip().split(".")
        table = recipe
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise errors.BadOption(f"{section!r} is not a section", key=name)
        table[key] = value
    known: dict[str, Iterable[str]] = {
        "data": {*inspect.signature(Sampler).parameters, "folder", "sources"} - {"images"},
        "training": inspect.signature(Plan).parameters,
        "scales": ("steps", "examples"),
    }
    for section in recipe:
        if section in ("arguments", "scales", "data", "training") and not isinstance(recipe[section], dict):
            raise errors.BadOption(f"found {recipe[section]!r}, expected a section", file=path, key=section)
        if section not in _SECTIONS:
            raise errors.BadOption(
                "no such section", file=path, key=section, help=errors.did_you_mean(section, _SECTIONS)
            )
    for section, keys in known.items():
        for key in recipe.get(section, {}):
            if key not in keys:
                raise errors.BadOption(
                    "no such key", file=path, key=f"{section}.{key}", help=errors.did_you_mean(key, keys)
                )
    for section in ("method", "data", "training"):
        if section not in recipe:
            raise errors.MissingKey("a recipe needs it", file=path, key=section)
    for section, key in (("training", "steps"), ("scales", "steps")):
        if section in recipe and key not in recipe[section]:
            raise errors.MissingKey("a recipe needs it", file=path, key=f"{section}.{key}")
    return recipe


def train(
    recipe: Mapping[str, Any],
    folder: str | Path,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Reconstructor:
    """Follow a recipe: load the images, match the loss scales if asked, fit, write `model.safetensors` into `folder`.

    Arguments:
        recipe: as from `read_recipe`.
        folder: the run; checkpoints live there too.
        resume: go on with the run in `folder`.
        report: see `fit`.

    Raises:
        BadOption: an argument that the method refuses, or a run that is there already; what `load_images` and `fit` raise.
    """
    folder = Path(folder)
    data = dict(recipe["data"])
    source = data.pop("folder", None)
    if source is None:
        raise errors.MissingKey("where the images are", key="data.folder", help="--set data.folder=DIR")
    if not resume:
        _refuse_a_run(folder)
    plan = _built(Plan, "training", recipe["training"])
    data.setdefault("seed", plan.seed)
    arguments = dict(recipe.get("arguments", {}))
    images = _built(load_images, "data", {"folder": source, "sources": data.pop("sources", ())})
    sampler = _built(Sampler, "data", {"images": images, **data})
    torch.manual_seed(plan.seed)
    _built(make, "arguments", {"method": recipe["method"], "arguments": arguments})  # wrong ones fail before any work
    if (matching := recipe.get("scales")) is not None:
        for key, value in matching.items():
            if type(value) is not int or value < 1:
                raise errors.BadOption(f"found {value!r}, expected a whole number above 0", key=f"scales.{key}")
        shared = {k: arguments[k] for k in ("main", "terms") if k in arguments}

        def single(weights: list[float]) -> SingleWeight:
            torch.manual_seed(plan.seed)
            return SingleWeight(**shared, weights=weights)

        short = replace(plan, steps=matching["steps"], warmup=min(plan.warmup, matching["steps"] // 4))
        count = len(arguments.get("terms", ("mae", "ssim")))
        arguments["scales"] = match_scales(
            single, count, sampler, short, folder, examples=matching.get("examples", 16), recipe=recipe
        )
    arguments["trained"] = sampler.domain
    torch.manual_seed(plan.seed)
    model = make(recipe["method"], arguments)
    if (start := recipe.get("start")) is not None:
        _start(model, load(start))
    fit(model, sampler, plan, folder, resume=resume, recipe=recipe, report=report)
    if _distributed()[0] == 0:
        save(model, folder / "model.safetensors", provenance(recipe, images), overwrite=True)
    if dist.is_initialized():
        # Leave together: a process that ends early takes the others' connections with it.
        dist.barrier()
        dist.destroy_process_group()
    return model


def _start(model: Reconstructor, trained: Reconstructor) -> None:
    """Begin at the weights of a network trained without a dial, or of the same method.

    The proposals of `MetaLearned` begin at such a network too, or at a hypernetwork's for its first loss term.
    """
    if isinstance(model, MetaLearned) and isinstance(trained, HyperRecon):
        trained = bake(trained, **{name: dial.lo for name, dial in trained.dials.items()})
    if isinstance(model, MetaLearned) and isinstance(trained, SingleWeight):
        model.start_from(dict(trained.main.named_parameters()))
    elif isinstance(model, HyperRecon) and isinstance(trained, SingleWeight):
        model.hypernet.start_from(dict(trained.main.named_parameters()))
    elif isinstance(model, Generative) and isinstance(trained, Generative):
        model.start_from(trained)
    elif type(model) is type(trained) and {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in trained.state_dict().items()
    }:
        model.load_state_dict(trained.state_dict())
    else:
        raise errors.BadOption(
            "those weights are neither of a single-weight network nor of the same method", key="start"
        )


def provenance(recipe: Mapping[str, Any], images: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """What made a model, for the header of its weights file; where the data lay is nobody's business."""
    return {
        "data": {key: value for key, value in recipe["data"].items() if key != "folder"},
        "training": recipe["training"],
        "start": recipe.get("start"),
        "images": {name: len(planes) for name, planes in images.items()},
        "commit": _commit(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """The commit of the checkout that this runs from, "+" appended where files differ; "" outside one."""
    try:
        here = Path(__file__).parent
        run = partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10, check=True)
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + ("+" if run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def match_scales(
    build: Callable[[list[float]], SingleWeight],
    count: int,
    batches: Callable[[int, int], Example],
    plan: Plan,
    folder: str | Path,
    *,
    examples: int = 16,
    recipe: Mapping[str, Any] | None = None,
) -> list[float]:
    """s_k = typical loss k of a network trained for term k alone, from short runs of `plan.steps` (the two-network rule).

    Typical is the geometric mean over samples, since `SingleWeight.loss` is the mean logarithm.

    Arguments:
        build: weights w → a fresh network for that weighting.
        count: number of terms K.
        examples: batches, unseen in training, that the losses are averaged over.
    """
    scales = []
    for k in range(count):
        weights = [float(j == k) for j in range(count)]
        network = build(weights)
        assert isinstance(network, SingleWeight)
        fit(
            network,
            batches,
            plan,
            Path(folder) / f"scale-{k}",
            resume=True,
            recipe={"scale": k, "of": recipe},
        )
        generator = torch.Generator().manual_seed(plan.seed)
        values = [float(network.loss(batches(plan.steps + n, 0), generator).detach()) for n in range(examples)]
        scales.append(math.exp(sum(values) / examples))
    return scales


def _distributed() -> tuple[int, int]:
    """(rank, world size); joins the group that torchrun describes, if there is one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), world


@contextmanager
def _others_alive(folder: Path) -> Iterator[None]:
    """Where a process that should answer has ended, that is what is said."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(
            error
        ):  # which has no class for a lost connection
            raise
        raise errors.NoMemory(
            "another process of this training has ended: out of memory, or killed", file=folder, key="torchrun",
            help="--resume goes on from the last state",
        ) from error  # fmt: skip


def _all_reduce(parameters: Any, world: int, asked: list[int]) -> None:
    """Average the gradients of all processes, and let all stop where one was asked to: one message."""
    if world == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([float(bool(asked))])])
    dist.all_reduce(flat)
    flat /= world
    if flat[-1] > 0 and not asked:
        asked.append(int(signal.SIGTERM))
    offset = 0
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = flat[offset : offset + g.numel()].view_as(g).clone()
        offset += g.numel()


def _share_buffers(model: Reconstructor, world: int) -> None:
    """Running statistics and loss scales of the first process for all: each has seen other samples."""
    if world > 1:
        for buffer in model.buffers():
            if buffer.numel():
                dist.broadcast(buffer, 0)


def _save(
    folder: Path, model: Reconstructor, optimiser: torch.optim.Optimizer, parameters: dict[str, Tensor],
    average: dict[str, Tensor], step: int, seconds: float, identity: str,
) -> None:  # fmt: skip
    """Put the new state in place of the one before it, which is kept: a kill or a full disk leaves a whole state."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    # What a method remembers for its training alone is no part of its weights.
    tensors |= {f"model.{name}": value for name, value in model.named_buffers() if value.numel()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, p in parameters.items():
        for key, value in optimiser.state.get(p, {}).items():
            tensors[f"adam.{key}.{name}"] = torch.as_tensor(value)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"step": str(step), "seconds": repr(seconds), "identity": identity}
    newest = folder / _STATES[0]
    with files.write_atomically(newest, overwrite=True) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))  # save_file would let only its owner read it
        # Only now that the new one is there, whole: a full disk must not cost the newest.
        if newest.exists():
            os.replace(newest, folder / _STATES[1])


def _restore(
    folder: Path, model: Reconstructor, optimiser: torch.optim.Optimizer, parameters: dict[str, Tensor],
    average: dict[str, Tensor], identity: str,
) -> tuple[int, float]:  # fmt: skip
    damaged = False
    for name in _STATES:
        path = folder / name
        if not path.exists():
            continue
        try:
            with safe_open(path, "pt") as f:
                metadata = f.metadata()
                tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:
            errors.warn(f"{path.name}: damaged ({error}), trying the state before it", "unreadable_file")
            # Out of the way, or the next checkpoint would move it over the good one.
            os.replace(path, path.with_name(f"damaged.{name}"))
            damaged = True
            continue
        if metadata["identity"] != identity:
            raise errors.BadOption(
                f"made by another recipe: {_difference(json.loads(metadata['identity']), json.loads(identity))}",
                file=path, key="recipe", help="resume with the recipe of the run, or start in a new folder",
            )  # fmt: skip
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()})
        for key in weights.keys() - model.state_dict().keys():
            owner, _, leaf = key.rpartition(".")
            setattr(model.get_submodule(owner), leaf, weights[key])
        for key, p in parameters.items():
            average[key].copy_(tensors[f"average.{key}"])
            state = {
                k: tensors[f"adam.{k}.{key}"]
                for k in ("step", "exp_avg", "exp_avg_sq", "mean", "belief")
                if f"adam.{k}.{key}" in tensors
            }
            if state:
                optimiser.state[p] = state
        return int(metadata["step"]), float(metadata["seconds"])
    if damaged:
        raise errors.UnreadableFile("no state of this run can be read", file=folder, help="start again in a new folder")
    return 0, 0.0


def _too_large(example: Example) -> errors.NoMemory:
    """What of a batch to cut; states saved before are sound."""
    shape = tuple(example.y.shape)
    cut = f"--set data.batch={shape[0] // 2}" if shape[0] > 1 else "smaller images (data.size), fewer data.coils"
    return errors.NoMemory(f"not enough for k-space of {shape} in a step", key="data.batch", help=cut)


def _refuse_a_run(folder: Path) -> None:
    if any((folder / name).exists() for name in _STATES):
        raise errors.BadOption(
            "this folder already holds a run", file=folder, help="--resume to go on with it, or name another"
        )


def _built(kind: Callable[..., Any], key: str, arguments: Mapping[str, Any]) -> Any:
    """`kind(**arguments)`, where a recipe's text for a number, a scalar for a pair, … is the recipe's fault."""
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise errors.BadOption(
            str(error), key=key, help="see the recipes that ship for the form of each value"
        ) from error


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first leaf at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if found := _difference(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")):
                return found
        return ""
    return "" if old == new else f"{path} was {old}, is {new}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted for the loop to finish its step and save; a second one stops at once."""
    asked: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: leave signals to whoever owns it
        before = {}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
