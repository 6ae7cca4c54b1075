"""What the dial costs: one hypernetwork against one dedicated network per setting, same steps each.

    python benchmarks/dial.py --data $TUNEMRI_DATA -o runs/dial-study

Trains recipes/dial-study.toml (the hypernetwork) and five `single-weight` networks with the same main network,
data, steps and loss scales, then scores all of them on the validation subjects. Each run has its own folder and
resumes where it stopped. Prints, for each setting, the metrics of both and their difference, and the ratio of
training times; writes gaps.csv and curves.png.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tunemri import console, evaluation, methods, plots, scoring, training
from tunemri.datasets import Sampler, load_images
from tunemri.evaluation import Case, Contestant

SETTINGS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent.parent / "recipes/dial-study.toml")
    parser.add_argument("--set", action="append", default=[], help="change the recipe, e.g. training.steps=300")
    parser.add_argument("--limit", type=int, default=8, help="validation images per source and mask")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = training.read_recipe(options.recipe, [f"data.folder={options.data / 'train'}", *options.set])
    data = {k: v for k, v in recipe["data"].items() if k not in ("folder", "sources")}
    sampler = Sampler(images=load_images(recipe["data"]["folder"], recipe["data"]["sources"]), **data)
    plan = training.Plan(**recipe["training"])

    arguments = recipe["arguments"]
    # An antithetic step runs each image at two settings: half as many images make it the same number of passes.
    halved = replace(sampler, batch=sampler.batch // 2) if arguments.get("antithetic") else sampler
    hyper, hyper_seconds = fitted("hyperrecon", arguments, halved, plan, options.output / "hyper")
    shared = {"main": arguments["main"], "terms": arguments["terms"], "scales": hyper.scales.tolist()}
    dedicated, seconds = [], []
    for value in SETTINGS:
        own = {**shared, "weights": [1 - value, value]}
        network, spent = fitted("single-weight", own, sampler, plan, options.output / f"single-{value:g}")
        dedicated.append(network)
        seconds.append(spent)

    where = scoring.Plan(folder=options.data / "val", limit=options.limit, masks=("poisson:4,8",), noise=0.005)
    images = load_images(where.folder, recipe["data"]["sources"])
    cases: list[Case] = list(scoring.cases(where, images))
    names = ("psnr", "ssim", "mae")
    ours = evaluation.evaluate(
        [Contestant(name="hyper", model=hyper, dials={"ssim": v}) for v in SETTINGS], cases, metrics=names
    )
    theirs = []
    for value, network in zip(SETTINGS, dedicated, strict=True):
        rows = evaluation.evaluate([Contestant(name="dedicated", model=network)], cases, metrics=names)
        theirs += [replace(row, dials={"ssim": value}) for row in rows]

    table: list[dict[str, Any]] = []
    for value, spent in zip(SETTINGS, seconds, strict=True):
        line: dict[str, Any] = {"ssim": value}
        for name in names:
            a, b = (mean(rows, value, name) for rows in (ours, theirs))
            line |= {f"hyper_{name}": a, f"dedicated_{name}": b, f"gap_{name}": a - b}
        table.append(line | {"hyper_seconds": hyper_seconds, "dedicated_seconds": spent})
    print(
        f"{len(cases)} validation scans, {plan.steps} steps of {sampler.batch} passes each, scales {hyper.scales.tolist()}"
    )
    print("  ssim   PSNR hyper  dedicated    gap   SSIM hyper  dedicated    gap    MAE hyper  dedicated   time ratio")
    for t in table:
        print(
            f"  {t['ssim']:4.2f}   {t['hyper_psnr']:10.3f} {t['dedicated_psnr']:10.3f} {t['gap_psnr']:+6.3f}   "
            f"{t['hyper_ssim']:10.5f} {t['dedicated_ssim']:10.5f} {t['gap_ssim']:+8.5f}  {t['hyper_mae']:.6f}  {t['dedicated_mae']:.6f}   "
            f"{t['hyper_seconds'] / t['dedicated_seconds']:.2f}"
        )
    evaluation.write_csv(options.output / "gaps.csv", table, overwrite=True)
    curve = evaluation.evaluate(
        evaluation.along(Contestant(name="hyper", model=hyper), {"ssim": 11}), cases, metrics=names
    )
    plots.dial_curve(curve, "ssim", names, about=hyper.dials["ssim"], dedicated=theirs).save(
        options.output / "curves.png", overwrite=True
    )


def fitted(
    method: str, arguments: dict[str, Any], sampler: Sampler, plan: training.Plan, folder: Path
) -> tuple[Any, float]:
    """A trained network and the processor seconds that its training took (kept beside it; of a run that was not interrupted)."""
    torch.manual_seed(plan.seed)
    model = methods.make(method, arguments)
    record, before = folder / "seconds.txt", time.process_time()
    training.fit(
        model, sampler, plan, folder, resume=True, recipe={"method": method, "arguments": arguments},
        report=lambda s: console.say(f"{folder.name}: {s['step']}/{s['steps']}  loss {s['loss']:.4f}  {s['seconds']:.0f} s"),
    )  # fmt: skip
    if not record.exists():
        record.write_text(f"{time.process_time() - before}")
    return model, float(record.read_text())


def mean(rows: list[evaluation.Row], value: float, metric: str) -> float:
    """Mean of a metric over the rows at one setting."""
    own = [row.metrics[metric] for row in rows if abs(row.dials["ssim"] - value) < 1e-6]
    return sum(own) / len(own)


if __name__ == "__main__":
    main()
