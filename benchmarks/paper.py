"""One page with the tables and figures of the three founding papers in their form, an outside yardstick, and one table across families.

    make bench-paper                                 the quick budget: about 20 minutes on two cores
    python benchmarks/paper.py --data $TUNEMRI_DATA -o runs/paper --budget full --only yardstick

The page is put together from parts, each a command of its own under benchmarks/. A part that is done under -o is not run
again, unless its command or the weights that it judges have changed; one that failed, or was not run, says so in its place.
Where both budgets are done, the page shows the full one. Writes report.html (all in one file) under -o, and with
`--page FILE.md` the same as Markdown with its tables as CSV and its pictures in the folder FILE/ beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paper_tables import (
    Numbers,
    Printed,
    Section,
    plainly,
    show_across,
    show_generative,
    show_meta,
    show_stability,
    show_yardstick,
)
from PIL import Image
from published import HYPERRECON

from tunemri import __version__, errors, evaluation, files, methods, report

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ("full", "quick")  # the first that is done is shown


@dataclass(frozen=True, kw_only=True)
class Part:
    """One experiment: what to run, and what to show of it.

    Arguments:
        name: by which it is asked for.
        chapter: the heading that it stands under.
        about: what it is, and whose table or figure.
        split: which data, and what a subject is.
        commands: budget → arguments of python, run in benchmarks/; `{data}`, `{out}` and `{root}`, of the repository, are put
            in. A budget that is missing does not hold this part.
        show: (folder of its outputs, what it printed) → sections.
        models: weights that it judges: when they change it is run again.
        folder: where it works, for parts that share networks; "" is a folder of its own.
        fixed: tables that stand there whether it was run or not.
    """

    name: str
    chapter: str
    title: str
    about: str
    split: str
    commands: Mapping[str, str]
    show: Callable[[Path, str], list[Section]]
    models: tuple[str, ...] = ()
    folder: str = ""
    fixed: tuple[Numbers, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended, as kept beside its outputs.

    Arguments:
        asked: command and weights; where these have changed, the part is not done.
        status: "done", "failed" or "stopped" (out of time).
        said: the last line of a part that is not done.
    """

    asked: Mapping[str, Any]
    status: str
    said: str
    seconds: float
    commit: str
    hardware: str
    software: str


# ---------------------------------------------------------------- the parts

ACROSS, YARDSTICK = "Across families", "Outside yardstick: ISTA-Net+"
HYPER, GEN, METAS, MORE = (
    "HyperRecon: tables and figures", "Generative prior: tables and figures",
    "Meta-learning: Tables 1 to 5", "What choosing and trusting cost",
)  # fmt: skip
EVERY = ("*",)  # all weights that ship
HYPER_SPLIT = (
    "networks are trained on crops of train/ subjects and judged on val/ subjects, 100 to 200 steps each: they compare, "
    "they are no records"
)
ONE_EACH = "val/ ixi, one slice of each subject"

PARTS = [
    Part(
        name="across", chapter=ACROSS, title="All methods, all masks, the same scans", models=EVERY, show=show_across,
        about="No other package prints this table: every method and every mask family at 4×, each method at the best setting "
        "that the reference could pick, and at the one that it chose from the measured samples alone. Models that were trained for "
        "another task than such undersampling are left out.",
        split="val/, the middle slice of each subject, one coil, noise 0.5 % of the maximum; brought to a smaller matrix by a "
        "crop of k-space",
        commands={
            "quick": "across.py --data {data} -o {out} --sources ixi,oasis,siat --limit 1 --size 96 --choose 4 0 1",
            "full": "across.py --data {data} -o {out} --limit 1 --size 96 --choose 4 0 1 "
            "--masks poisson,cartesian-random,radial,spiral,gaussian",
        },
    ),
    Part(
        name="yardstick", chapter=YARDSTICK, title="Radial sampling of 10 to 50 %", models=("hyper-brain", "meta-brain"),
        show=show_yardstick,
        about="Its own test images and masks, its own released weights (one network for each ratio, 337 k parameters each), "
        "against one model of ours for all ratios, at the setting that it suggests itself. Nothing was trained, tuned or "
        "selected on these images. Ours were trained on other subjects' data.",
        split="bench/ista_brain 01-24 (axial, one head) and 25-35 (sagittal, another; 25-34 nearly empty), no noise",
        commands={
            "quick": "meta.py --data {data} -o {out} --no-tables --yardstick 5 --also hyper-brain",
            "full": "meta.py --data {data} -o {out} --no-tables --yardstick 1 --also hyper-brain",
        },
    ),
    Part(
        name="hyper-capacity", chapter=HYPER, title="Capacity", folder="hyperrecon",
        about="The published sizes S, M and L, our default and the light forms, at equal steps.", split=HYPER_SPLIT,
        commands={"full": "hyperrecon.py capacity --data {data} -o {out} --steps 100"},
        show=plainly({"capacity.csv": "Quality against parameters"}, {"capacity.png": "Each dot is a network."}),
    ),
    Part(
        name="hyper-sampling", chapter=HYPER, title="Uniform against data-driven sampling", folder="hyperrecon",
        about="Landscapes of the gain over zero-filling, area and range curves and far pairs, without ground truth in "
        "training; dedicated networks on a grid of nine settings, interpolated, beside them (the papers: 18 × 18).",
        split=HYPER_SPLIT, commands={"full": "hyperrecon.py sampling --data {data} -o {out} --steps 200 --points 15"},
        show=plainly(
            {"sampling.csv": "UHS and DHS"},
            {
                "area.png": "Share of settings that gain more than a threshold.", "range.png": "Diversity of good images.",
                "landscape-*.png": "Mean gain over zero-filling at every setting.", "histogram-*.png": "Settings that training used.",
                "far-*.png": "The farthest pair among the best tenth of all settings.",
            },
        ),
    ),
    Part(
        name="hyper-tasks", chapter=HYPER, title="Three tasks, two anatomies", folder="hyperrecon", split=HYPER_SPLIT,
        about="Metric against the dial for undersampling, denoising and superresolution on brain and knee, with networks "
        "trained for one value as dots.",
        commands={"full": "hyperrecon.py tasks --data {data} -o {out} --steps 150"},
        show=plainly({"tasks.csv": "One network against dedicated ones"}, {"dial-*.png": "Dots: dedicated networks."}),
    ),
    Part(
        name="hyper-dice", chapter=HYPER, title="A later step: Dice", folder="hyperrecon", models=("hyper-brain",),
        about="Overlap of the tissues that a segmentation network finds, along the dial; the paper found its best near 0.25.",
        split="segmentation trained on oasis train/, judged on oasis val/ (3 subjects)",
        commands={
            "quick": "hyperrecon.py dice --data {data} -o {out} --limit 3 --steps 150 --points 5",
            "full": "hyperrecon.py dice --data {data} -o {out}",
        },
        show=plainly({"dice.csv": "Dice along the dial"}, {"dice-*.png": "Mean over scans."}),
    ),
    Part(
        name="hyper-table1", chapter=HYPER, title="Table 1: time and size", folder="hyperrecon", split=HYPER_SPLIT,
        about="Training time, inference time and parameters of the networks above.",
        commands={"full": "hyperrecon.py table1 --data {data} -o {out}"},
        show=plainly({"table1.csv": "Ours, processor seconds"}, {"table1.png": "Training time against parameters."}),
        fixed=(Numbers(title="Published (Titan Xp GPU, brain)", records=HYPERRECON),),
    ),
    Part(
        name="hyper-dedicated", chapter=HYPER, title="The price of the dial", folder="dial",
        about="The recipe of a small study: one hypernetwork against five networks of one setting, the same steps each.",
        split="trained on openms, ixi, cardiac train/; val/ of the same, by subject",
        commands={"full": "dial.py --data {data} -o {out}"},
        show=plainly({"gaps.csv": "One network against five"}, {"curves.png": "Dots: dedicated networks."}),
    ),
    Part(
        name="hyper-landscape", chapter=HYPER, title="The price of a landscape", models=("hyper-brain",),
        about="100 × 100 settings of one 256² scan, as the papers' landscapes have; against as many plain forward passes.",
        split="a phantom",
        commands={"quick": "landscape.py --points 8 --size 128", "full": "landscape.py"},
        show=plainly({}, printed=True),
    ),
    Part(
        name="generative-1", chapter=GEN, title="Table 1: four masks", folder="generative", models=("energy-brain", "hyper-brain"),
        about="Zero-filled, TV at its best weight for each mask, a supervised network for Cartesian 4× (theirs a U-Net, ours unrolled, "
        "recipes/cartesian-only.toml, in the full budget) and one for all masks (hyper-brain), MAP and the posterior mean; one prior and "
        "one weight for all masks. The prior knows that images are real, TV and the networks do not.",
        split=ONE_EACH + ", one coil, real images without phase, as theirs, noise 0.5 %; theirs of 61 knees, without noise",
        commands={
            "quick": "generative.py masks --data {data} -o {out} --keep {out} --source ixi --limit 2 --size 96 "
            "--real --samples 4 --supervised hyper-brain",
            "full": "generative.py masks --data {data} -o {out} --keep {out} --source ixi --limit 3 --size 128 "
            "--real --samples 8 --supervised hyper-brain --supervised {root}/recipes/cartesian-only.toml",
        },
        show=show_generative("masks-ixi-real.csv", {"ixi": 1}),
    ),
    Part(
        name="generative-2", chapter=GEN, title="Table 2: parallel imaging, in and out of distribution", folder="generative",
        models=("energy-brain", "hyper-brain"), show=show_generative("coils.csv", {"ixi": 2, "knee": 3}),
        about="Eight coils; out of distribution is another anatomy here, fat suppression there. The VN of the paper saw Cartesian 4× "
        "only: cartesian-only here (recipes/cartesian-only.toml); hyper-brain saw all families, up to 8.5×. "
        "Their two estimates out of distribution († and *) stand beside MAP and MMSE.",
        split=ONE_EACH + ", and val/ knee alike; noise 0.5 %, maps as by default (auto)",
        commands={
            "quick": "generative.py coils --data {data} -o {out} --keep {out} --source ixi --limit 2 --size 96 --no-mmse "
            "--supervised hyper-brain",
            "full": "generative.py coils --data {data} -o {out} --keep {out} --source ixi --limit 2 --size 96 --samples 8 "
            "--supervised hyper-brain --supervised {root}/recipes/cartesian-only.toml",
        },
    ),
    Part(
        name="generative-posterior", chapter=GEN, title="Variance: calibration and growth", models=("energy-brain",),
        about="Do 90 % intervals hold 90 % of the errors? Does the deviation grow with acceleration, do the chains agree?",
        split=ONE_EACH,
        commands={
            "quick": "generative.py posterior --data {data} -o {out} --source ixi --limit 1 --size 96 --samples 4",
            "full": "generative.py posterior --data {data} -o {out} --source ixi --limit 2 --size 96",
        },
        show=plainly({}, {"posterior.png": "Mean, error and standard deviation of one scan."}, printed=True),
    ),
    Part(
        name="generative-prior", chapter=GEN, title="What the prior believes without data", models=("energy-brain",),
        about="Annealed Langevin chains without measurements, and the energy on the plane of the first two principal components "
        "of a chain.",
        split="no data",
        commands={
            "quick": "generative.py prior -o {out} --size 64 --moves 5", "full": "generative.py prior -o {out} --size 96",
        },
        show=plainly(
            {}, {"prior-samples.png": "Four chains.", "prior-landscape.png": "Landscape and the states of the chain."}, printed=True
        ),
    ),
    Part(
        name="generative-adapted", chapter=GEN, title="Another anatomy, the weight chosen without a reference",
        models=("energy-brain",), about="The weight from held-out samples, against TV at its best weight.",
        split="val/ knee, one slice of each of 3 subjects",
        commands={"full": "generative.py adapted --data {data} -o {out} --keep {out} --limit 3 --size 96"},
        show=show_generative("adapted.csv", {}),
    ),
    Part(
        name="generative-knee", chapter=GEN, title="Another anatomy, one coil with phase", models=("energy-brain",),
        about="The masks of Table 1 on complex images of knees, which the prior has not seen; TV at its best weight for each mask.",
        split="val/ knee, one slice of each of 2 subjects, smooth phase, noise 0.5 %",
        commands={"full": "generative.py masks --data {data} -o {out} --keep {out} --source knee --limit 2 --size 96 --samples 8"},
        show=show_generative("masks-knee.csv", {}),
    ),
    Part(
        name="generative-joint", chapter=GEN, title="Image and coil maps together", models=("energy-brain",),
        about="4× with 4 % of the lines for calibration: maps by ESPIRiT, by nonlinear inversion, or together with the image.",
        split="val/ ixi and openms, eight simulated coils, 128²; raw scans of a brain and a liver, two masks each",
        commands={"full": "generative.py joint --data {data} -o {out} --limit 2"}, show=plainly({}, printed=True),
    ),
    Part(
        name="generative-compare", chapter=GEN, title="Score matching against the paper's likelihood",
        about="Two small energies, ours and the paper's form with its way of training, for the same processor time.",
        split="trained on train/ ixi, judged on val/ ixi, 64²",
        commands={"full": "generative.py compare --data {data} --source ixi --limit 4 --seconds 90"}, show=plainly({}, printed=True),
    ),
    Part(
        name="generative-speed", chapter=GEN, title="Time and memory", models=("energy-brain",), split="a phantom",
        about="MAP over sizes and coils, one thread; the paper: about 5 s on a Titan RTX.",
        commands={"full": "generative.py speed"}, show=plainly({}, printed=True),
    ),
    Part(
        name="meta", chapter=METAS, title="T1 and T2; ratios seen and unseen; lines that no task stands for", models=("meta-brain",),
        about="Conventional (a network for each ratio), meta-learned (one for all, a learned weight κ for each task) and adapted "
        "(κ alone, to five training images). The full budget also trains the conventional and the meta-learned network here, from "
        "scratch and for an equal number of steps; the quick one has the shipped network beside TV at its best weight.",
        split="T1: val/ oasis, 3 subjects; T2: val/ siat, 1 subject (so no interval); one coil, no noise",
        commands={
            "quick": "meta.py --data {data} -o {out} --size 96 --limit 3 " + " ".join(f"--table {n}" for n in range(1, 6)),
            "full": "meta.py --data {data} -o {out} --size 96 --limit 3 --train 1200 " + " ".join(f"--table {n}" for n in range(1, 6)),
        },
        show=show_meta,
    ),
    Part(
        name="meta-memory", chapter=METAS, title="Memory of a training step", split="noise",
        about="Peak memory of the bilevel step against phases, with and without recomputation.",
        commands={"full": "meta.py --data {data} -o {out} --memory --no-tables"}, show=plainly({}, printed=True),
    ),
    Part(
        name="choosing", chapter=MORE, title="Decibels that choosing loses", models=("hyper-brain",),
        about="What each criterion of `tunemri choose` loses against the setting that the reference would pick.",
        split="val/ openms and siat", commands={"full": "tuning.py --data {data} -o {out}"}, show=plainly({}, printed=True),
    ),
    Part(
        name="stability", chapter=MORE, title="Stability", models=EVERY,
        about="More samples, other masks, more noise, inserted detail and worst-case perturbations, beside CG-SENSE and TV.",
        split="val/ brain images, four coils, 4× Poisson disk, noise 0.5 %",
        commands={
            "quick": "stability.py --data {data}/val --limit 1 --size 96 --quick -m hyper-brain -m meta-brain -o {out}/stability.csv",
            "full": "stability.py --data {data}/val -o {out}/stability.csv",
        },
        show=show_stability,
    ),
]  # fmt: skip


# ---------------------------------------------------------------- running


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = Path(os.environ.get("TUNEMRI_DATA", ROOT.parent / "shared/data"))
    parser.add_argument("--data", type=Path, default=folder, help="folder with train/, val/ and bench/")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/paper"))
    parser.add_argument("--budget", choices=BUDGETS, default="quick")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="PART", help=f"repeatable: {' '.join(names)}")
    parser.add_argument("--jobs", type=int, default=1, help="parts at the same time, one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="most for one part")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="the page as Markdown too")
    parser.add_argument("--show", action="store_true", help="run nothing, only write the page")
    options = parser.parse_args(arguments)
    options.data, options.output = options.data.resolve(), options.output.resolve()
    wanted = [part for part in PARTS if not options.only or part.name in options.only]
    if not options.show:
        # Parts that share networks wait for each other.
        groups: dict[str, list[Part]] = {}
        for part in wanted:
            groups.setdefault(part.folder or part.name, []).append(part)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda group: [run(part, options) for part in group], groups.values()))
    write_page(options)


def run(part: Part, options: argparse.Namespace) -> None:
    """Run a part unless it is done; what it prints is kept, and how it ended."""
    if options.budget not in part.commands:
        return
    folder = options.output / options.budget / (part.folder or part.name)
    folder.mkdir(parents=True, exist_ok=True)
    asked = asked_of(part, options.budget)
    before = outcome_of(part, options, options.budget)
    if before is not None and before.status == "done" and before.asked == asked:
        print(f"{part.name}: done before", flush=True)
        return
    if not part.folder and (before is None or before.asked != asked):
        for old in (*folder.glob("*.csv"), *folder.glob("*.png")):
            old.unlink()  # else a part that is stopped half-way would show them as its own
    command = part.commands[options.budget].format(data=options.data, out=folder, root=ROOT)
    words = [sys.executable, *shlex.split(command)]
    print(f"{part.name}: {shlex.join(['python', *words[1:]])}", flush=True)
    start, log = time.perf_counter(), folder / f"log-{part.name}.txt"
    with log.open("w", encoding="utf-8") as out:
        try:
            limit = None if math.isinf(options.minutes) else 60 * options.minutes
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            words[1] = str(ROOT / "benchmarks" / words[1])
            done = subprocess.run(
                words, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
            status = "failed" if done.returncode else "done"
        except subprocess.TimeoutExpired:
            status = "stopped"
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing was printed"]
    words_of = {"done": "", "failed": lines[-1], "stopped": f"after {options.minutes:g} minutes, more were not allowed"}
    ended = Outcome(
        asked=asked, status=status, said=words_of[status], seconds=time.perf_counter() - start, commit=commit(), hardware=hardware(),
        software=f"tunemri {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )  # fmt: skip
    with files.write_atomically(_state(part, options, options.budget), overwrite=True) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(ended), indent=1), encoding="utf-8")
    print(f"{part.name}: {status} in {ended.seconds:.0f} s {ended.said}", flush=True)


def asked_of(part: Part, budget: str) -> dict[str, Any]:
    """What the outputs of a part depend on."""
    shipped = methods.bundled()
    names = list(shipped) if part.models == EVERY else part.models
    weights = {name: files.sha256(shipped[name])[:16] if name in shipped else "" for name in names}
    return {"command": part.commands[budget], "weights": weights}


def outcome_of(part: Part, options: argparse.Namespace, budget: str) -> Outcome | None:
    """How a part ended under a budget; None if it was never run."""
    file = _state(part, options, budget)
    return Outcome(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _state(part: Part, options: argparse.Namespace, budget: str) -> Path:
    found: Path = options.output / budget / (part.folder or part.name) / f"state-{part.name}.json"
    return found


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def hardware() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = next((line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, one thread, no GPU; {os.cpu_count()} cores in the machine"


# ---------------------------------------------------------------- the page


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A part on the page: words, sections, and what it takes to make it again."""

    part: Part
    status: str
    facts: Mapping[str, str]
    sections: Sequence[Section]


def shown(part: Part, options: argparse.Namespace) -> Shown:
    """The best there is of a part: done with today's weights, else done, the full budget first; else why there is nothing."""
    ended = {b: found for b in BUDGETS if b in part.commands and (found := outcome_of(part, options, b)) is not None}
    done = [b for b, found in ended.items() if found.status == "done"]
    current = [b for b in done if ended[b].asked == asked_of(part, b)]
    budget = next(iter([*current, *done, *ended]), "")
    if not budget:
        why = "" if "quick" in part.commands else ": only in the full budget"
        return Shown(part=part, status=f"not run{why}", facts={}, sections=part.fixed)
    found = ended[budget]
    place = f"runs/paper/{budget}/{part.folder or part.name}"
    facts = {
        "Command": "python benchmarks/" + found.asked["command"].format(data="$TUNEMRI_DATA", out=place, root="."),
        "Commit": found.commit, "Seed": "0", "Data": part.split, "Budget": budget,
        "Time": f"{found.seconds / 60:.1f} minutes", "Hardware": found.hardware, "Software": found.software,
    }  # fmt: skip
    if found.asked["weights"]:
        facts["Weights"] = ", ".join(f"{name} {digest}" for name, digest in found.asked["weights"].items())
    status = found.status
    if status != "done":
        status = f"{status}: {_public(found.said, options)}"
    elif budget not in current:
        status = "done, but with another command or other weights than those of today"
    folder = options.output / budget / (part.folder or part.name)
    printed = _public((folder / f"log-{part.name}.txt").read_text(encoding="utf-8"), options)
    warned = list(dict.fromkeys(WARNING.findall(printed)))
    try:
        # Of a folder that parts share, nobody knows whose the half-finished tables are.
        whole = found.status == "done" or not part.folder
        sections = part.show(folder, WARNING.sub("", printed)) if whole else []
    except (OSError, LookupError, ValueError, errors.TunemriError) as error:
        sections = []
        if found.status == "done":
            status = f"done, but cannot be shown: {type(error).__name__}: {_public(str(error), options)}"
    if warned:
        sections = [*sections, Printed(title="Warned of meanwhile", text="\n".join(warned))]
    return Shown(part=part, status=status, facts=facts, sections=[*part.fixed, *sections])


WARNING = re.compile(r"^.*TunemriWarning: (.+)\n(?:  .+\n)?", re.M)


def _public(text: str, options: argparse.Namespace) -> str:
    """Without the paths of this machine."""
    for path, name in ((options.output, "runs/paper"), (options.data, "$TUNEMRI_DATA"), (ROOT, ".")):
        text = text.replace(str(path), name)
    return text


TITLE = "The papers' tables, rerun"
INTRODUCTION = (
    "Every table and figure of the three founding papers in its own form, next to the figures that they printed; an outside "
    "yardstick that nobody here made; and one table across all families of methods. `make bench-paper` makes this page again.",
    "The data differ from the papers': other images, other subjects, other masks, fewer of all. A published number beside one "
    "of ours shows the form of the experiment and the order of magnitude; it is no comparison of methods. Those stand within "
    "a table: all rows of one table saw the same scans. k-space is simulated from images unless a table says raw, which "
    "flatters every method alike.",
    "n counts subjects, not slices: slices are averaged within a subject first, and intervals are Student's over subjects. "
    "± is the standard deviation over subjects, in brackets the median. A missed goal stands as it is; a part that was not "
    "run says so in its place. Rows of a method that did not change are kept from an earlier run of the part; commit and time are of the "
    "last one.",
    "Anatomy on pictures, reduced: IXI (CC BY-SA 3.0, brain-development.org) and open MS data (CC BY, Lesjak et al. 2016).",
)


def write_page(options: argparse.Namespace) -> None:
    """report.html under the output folder, and Markdown where it is asked for."""
    everything = [shown(part, options) for part in PARTS]
    overview = Numbers(
        title="Parts",
        records=[
            {
                "chapter": s.part.chapter, "part": s.part.title, "asked for by": s.part.name, "budget": s.facts.get("Budget", ""),
                "status": s.status,
            }
            for s in everything
        ],
    )  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    summary, *more = (text.replace("`", "") for text in INTRODUCTION)
    sections: list[report.Section] = [report.Text(title="How to read it", text="\n\n".join(more)), _html(overview)]
    for s in everything:
        words = f"{s.part.about}\n\n" + ("" if s.status == "done" else f"{s.status}\n\n") + _facts(s)
        sections += [report.Text(title=f"{s.part.chapter}: {s.part.title}", text=words), *map(_html, s.sections)]
    report.report(
        options.output / "report.html", title=TITLE, summary=summary, sections=sections,
        provenance={"command": "make bench-paper", "commit": commit(), "hardware": hardware()}, overwrite=True,
    )  # fmt: skip
    print(options.output / "report.html")
    if options.page:
        markdown(everything, overview, options.page)
        print(options.page)


def _html(section: Section) -> report.Section:
    if isinstance(section, Numbers):
        rows = evaluation.table(section.records)
        body = list(zip(*rows[1:], strict=True))
        words = next(
            (i for i, column in enumerate(body) if any(re.match(r"[-+−\d]", cell) for cell in column)), len(body)
        )
        return report.Table(title=section.title, rows=rows, caption=section.caption, words=words)
    if isinstance(section, Printed):
        return report.Text(title=section.title, text=section.text.replace("\n", "\n\n"))
    return section


def _facts(s: Shown) -> str:
    return " · ".join(f"{key}: {value}" for key, value in s.facts.items())


def markdown(everything: Sequence[Shown], overview: Numbers, page: Path) -> None:
    """The page with its tables (CSV) and pictures in the folder beside it, which holds nothing else."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    lines = [
        "<!-- written by benchmarks/paper.py: run `make bench-paper`, do not edit -->", f"# {TITLE}",
        *(_escaped(text) for text in INTRODUCTION), evaluation.markdown(overview.records),
    ]  # fmt: skip
    chapter = ""
    for s in everything:
        if s.part.chapter != chapter:
            chapter = s.part.chapter
            lines.append(f"## {_escaped(chapter)}")
        lines += [f"### {_escaped(s.part.title)}", _escaped(s.part.about)]
        if s.status != "done":
            lines.append(f"**{_escaped(s.status[0].upper() + s.status[1:])}.**")
        for i, section in enumerate(s.sections, 1):
            name = f"{s.part.name}-{i}"
            if isinstance(section, Numbers):
                evaluation.write_csv(folder / f"{name}.csv", section.records)
                about = f"**{_escaped(section.title)}** ([CSV]({folder.name}/{name}.csv)). {_escaped(section.caption)}"
                lines += [about.strip(), evaluation.markdown(section.records)]
            elif isinstance(section, Printed):
                lines += [f"**{_escaped(section.title)}**", f"```text\n{section.text}\n```"]
            else:
                (folder / f"{name}.png").write_bytes(small(section.png))
                lines += [
                    f"![{_escaped(section.title)}]({folder.name}/{name}.png)",
                    f"*{_escaped(f'{section.title}. {section.caption}')}*",
                ]
        if s.facts:
            lines.append("<small>" + _escaped(_facts(s)) + "</small>")
    page.write_text("\n\n".join(line.rstrip("\n") for line in lines) + "\n", encoding="utf-8")


def small(png: bytes) -> bytes:
    """A picture for the repository: at most 1400 pixels wide, 256 colours."""
    with Image.open(io.BytesIO(png)) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((1400, 1400))
        out = io.BytesIO()
        picture.quantize(256).save(out, "PNG", optimize=True)
    return out.getvalue()


def _escaped(text: str) -> str:
    """Words as Markdown: code stays code, nothing else is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_<>|\[\]])", r"\\\1", part) for i, part in enumerate(parts))


if __name__ == "__main__":
    main()
