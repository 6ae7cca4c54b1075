"""The command line: each command reads its options, calls the package, and writes its output with a sidecar.

Heavy imports stay inside the commands, so that help and version answer at once. How things are said, and what
errors become, is in `console`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from . import __version__, console, errors, files, jobs, texts

if TYPE_CHECKING:
    from torch import Tensor

    from .methods import Reconstructor
    from .viewer import Session

__all__ = ["app", "main"]

app = typer.Typer(
    name="tunemri",
    help="MRI reconstruction that you can still tune after training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ScanArgument = Annotated[Path, Argument(metavar="SCAN", help="any readable k-space file", callback=texts.resolved)]
Model = Annotated[
    str, Option("-m", "--model", metavar="MODEL", help="bundled name, .safetensors file, or method[:dial=value]")
]
Models = Annotated[
    list[str], Option("-m", "--model", metavar="MODEL", help="repeatable: bundled name, file, or method[:dial=value]")
]
Output = Annotated[Path, Option("-o", "--output", metavar="OUT", help="output; its suffix picks the format")]
OutputFolder = Annotated[Path, Option("-o", "--output", metavar="DIR", help="output folder")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace an existing output")]
AsJson = Annotated[bool, Option("--json", help="one JSON object on standard output")]
Slices = Annotated[str | None, Option("--slice", metavar="K or START:STOP", help="only these slices, counted from 0")]
Csm = Annotated[
    str,
    Option(
        "--csm",
        help="coil maps of a scan without: auto, espirit, nlinv, walsh, low-resolution, joint, or a file (bart ecalib -m1)",
    ),
]
EarlierCsm = Annotated[
    str | None,
    Option(
        "--csm",
        help="coil maps of a scan without: auto (default), espirit, nlinv, walsh, low-resolution, joint, or a file (bart ecalib -m1)",
    ),
]
ReferenceFile = Annotated[Path | None, Option("--reference", metavar="FILE", help="ground truth, for metrics")]
Extrapolate = Annotated[bool, Option("--extrapolate", help="allow dials outside their range")]
Cluster = Annotated[
    str | None,
    Option("--cluster", metavar="ADDRESS", help="of a dask scheduler whose workers do the work: tcp://HOST:PORT"),
]
Seed = Annotated[int, Option("--seed", min=0, max=2**62, help="of everything random")]
EarlierSeed = Annotated[int | None, Option("--seed", min=0, max=2**62, help="of everything random (default 0)")]


# ---------------------------------------------------------------- start


@app.command()
def demo(
    output: OutputFolder = Path("tunemri-demo"),
    overwrite: Overwrite = False,
) -> None:
    """The main job on the embedded sample: tune, choose, compare; writes report.html."""
    from .demo import run

    with console.progress("demo") as bar, files.write_folder_atomically(output, overwrite=overwrite) as folder:
        line = run(folder, bar)
    print(f"{line}\nreport: {output / 'report.html'}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the install and the device with one tiny reconstruction; say what is missing and how to get it."""
    import platform
    import shutil
    import time

    import torch

    from . import methods
    from .simulate import sample

    start = time.perf_counter()
    scan, target = sample()
    out = methods.reconstruct(scan, methods.load("sense"))
    error = float((out.magnitude - target.abs()).norm() / target.abs().norm())
    seconds = time.perf_counter() - start
    facts: dict[str, Any] = {
        "ok": error < 0.3,
        "tunemri": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "tiny_reconstruction": {"seconds": round(seconds, 3), "nrmse": round(error, 4)},
        "models": sorted(methods.bundled()),
        "missing": [] if shutil.which("bart") else ["bart, which benchmarks compare with: apt-get install bart"],
    }
    if not facts["ok"]:
        raise errors.Internal(f"the tiny reconstruction has NRMSE {error:.3f}, expected below 0.3")
    if as_json:
        print(json.dumps(facts))
        return
    print(f"tunemri {__version__}, Python {facts['python']}, torch {torch.__version__}")
    print(f"device {facts['device']}, {facts['threads']} threads on {facts['cores']} cores")
    print(f"models: {', '.join(facts['models']) or 'none bundled'}")
    for line in facts["missing"]:
        print(f"missing: {line}")
    print(f"tiny reconstruction: {seconds:.2f} s, NRMSE {error:.3f}: fine")


@app.command()
def info(
    file: Annotated[Path, Argument(metavar="FILE", help="scan, image or weights", callback=texts.resolved)],
    as_json: AsJson = False,
) -> None:
    """Say what is in a file, and what can and cannot be done with it."""
    files.check(file)
    if files.sniff(file) == "safetensors" or file.suffix == ".safetensors":
        from .cards import card

        header = card(file)
        facts = {
            "kind": "weights", "method": header["method"], "dials": header.get("dials", {}),
            "arguments": header["arguments"], "recipe": header.get("recipe", {}),
            "guarantees": header.get("guarantees", {}), "can": [f"tunemri recon SCAN -m {file} -o OUT.h5"], "cannot": [],
        }  # fmt: skip
    else:
        from . import formats

        facts = formats.inspect(file)
    if as_json:
        print(json.dumps({"ok": True, "file": str(file), **console.plain(facts)}))
        return
    for name, value in facts.items():
        if name in ("can", "cannot", "warnings"):
            for sentence in value:
                print(f"{name:>14}  {console.one_line(str(sentence))}")
        elif isinstance(value, dict):
            for key, inner in value.items():
                print(f"{name:>14}  {console.one_line(f'{key}: {json.dumps(console.plain(inner))}')}")
        elif name == "arrays":
            for row in value:
                shape = "×".join(map(str, row["shape"])) or "one"
                print(f"{name:>14}  {console.one_line(row['name'])}: {shape} {row['dtype']}")
        elif isinstance(value, bool):
            print(f"{name:>14}  {'yes' if value else 'no'}")
        elif value not in (None, []):
            print(f"{name:>14}  {console.one_line(str(value))}")


@app.command()
def convert(
    source: Annotated[Path, Argument(metavar="IN", help="any readable scan or image", callback=texts.resolved)],
    output: Output,
    slices: Slices = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Save a scan or an image in another format, with mask, maps, trajectory, reference and geometry where it has them."""
    from . import formats

    texts.check_output(output, source, overwrite)
    formats.check_writable(output, overwrite=overwrite)
    cut = texts.as_slice(slices)
    # A complex array without a header may be either: what an image's format is asked of is taken for one.
    what = formats.read_either(source, slices=cut, prefer="scan" if formats.holds_scans(output) else "image")
    formats.check_writable(output, what, overwrite=overwrite)
    scan = None if isinstance(what, formats.Image) else what
    keeps = scan is not None and output.suffix == ".h5"
    reference = formats.read_reference(source, slices=cut) if keeps else None
    shape = list(what.data.shape if isinstance(what, formats.Image) else what.kspace.shape)
    with files.write_with_record(output, overwrite=overwrite) as folder:
        result = folder / output.name
        notes = formats.write(result, what, reference=reference)
        facts = {
            "ok": True, "out": str(output), "out_sha256": files.sha256(result), "in": str(source),
            "in_sha256": files.sha256(source), "slice": slices, "shape": shape, "provenance": what.provenance,
            "acceleration": None if scan is None else scan.acceleration, "reference": reference is not None, **notes,
        }  # fmt: skip
        console.sidecar(result, facts, overwrite=False)
    _result(facts, as_json, f"{output}  {notes['content']} {'×'.join(map(str, shape))}")


# ---------------------------------------------------------------- use


@app.command()
def simulate(
    image: Annotated[Path, Argument(metavar="IMAGE", help="any readable image or volume", callback=texts.resolved)],
    output: Output,
    mask: Annotated[str, Option("--mask", metavar="NAME|FILE", help="mask family (see `tunemri masks`) or a 0/1 file")],
    acceleration: Annotated[float, Option("--acceleration", "-R", help="grid points per sample")] = 4.0,
    coils: Annotated[int, Option("--coils", min=1)] = 8,
    noise: Annotated[float, Option("--noise", help="standard deviation over the image maximum")] = 0.01,
    phase_axis: Annotated[str | None, Option("--phase-axis", help="rows or columns (Cartesian masks)")] = None,
    center_fraction: Annotated[
        float | None, Option("--center-fraction", help="fully sampled share (Cartesian masks)")
    ] = None,
    seed: Seed = 0,
    slices: Slices = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make an undersampled multi-coil scan from an image; it is marked as simulated."""
    from . import formats
    from .datasets import sampling_mask
    from .simulate import simulate as simulated

    texts.check_output(output, image, overwrite)
    formats.check_writable(output, overwrite=overwrite)
    if output.suffix != ".h5":
        raise errors.BadOption("a simulated scan goes into .h5, with mask and truth", file=output, key="output")
    picture = formats.read_image(image, slices=texts.as_slice(slices), prefer="reference")
    shape = (picture.data.shape[-2], picture.data.shape[-1])
    options = {"phase_axis": phase_axis, "center_fraction": center_fraction}
    pattern = sampling_mask(mask, shape, acceleration, seed, {k: v for k, v in options.items() if v is not None})
    scan, target = simulated(
        picture.data, mask=pattern, coils=coils, noise=noise, seed=seed, geometry=picture.geometry, mask_name=mask
    )
    with files.write_with_record(output, overwrite=overwrite) as folder:
        notes = formats.write(folder / output.name, scan, reference=target)
        facts = {
            "ok": True, "out": str(output), "image": str(image), "image_sha256": files.sha256(image), "mask": mask,
            "nominal_acceleration": None if Path(mask).exists() else acceleration,
            "acceleration": scan.acceleration, "coils": coils, "noise": noise,
            "noise_std": scan.noise_std, "seed": seed, "shape": list(scan.kspace.shape), "provenance": scan.provenance, **notes,
        }  # fmt: skip
        console.sidecar(folder / output.name, facts, overwrite=False)
    _result(
        facts,
        as_json,
        f"{output}  {len(scan)} slices  {coils} coils  measured acceleration {scan.acceleration:.2f}",
    )


@app.command()
def recon(
    output: Annotated[
        Path,
        Option(
            "-o", "--output", metavar="OUT", help="a file (its suffix picks the format), or a folder for several scans"
        ),
    ],
    scans: Annotated[
        list[Path] | None, Argument(metavar="SCAN...", help="any readable k-space files; with --from, its own")
    ] = None,
    model: Annotated[
        str | None,
        Option("-m", "--model", metavar="MODEL", help="bundled name, .safetensors file, or method[:dial=value]"),
    ] = None,
    settings: Annotated[list[str] | None, Option("--set", metavar="DIAL=VALUE", help="repeatable")] = None,
    source: Annotated[
        Path | None,
        Option("--from", metavar="SIDECAR", help="repeat the settings of an earlier OUT.json, or a pick: PICKS.json#2"),
    ] = None,
    csm: EarlierCsm = None,
    reference: ReferenceFile = None,
    slices: Slices = None,
    seed: EarlierSeed = None,
    extrapolate: Extrapolate = False,
    device: Annotated[str, Option("--device", help="cpu or cuda")] = "cpu",
    address: Cluster = None,
    resume: Annotated[
        bool, Option("--resume", help="of several scans, leave alone those that this very command has done before")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Reconstruct scans at chosen dials."""
    from . import cluster
    from .coils import MAPS

    if address is None:
        texts.check_device(device)
    earlier: dict[str, Any] = texts.read_sidecar(source) if source else {}
    if source and not scans and "scan" in earlier:
        scans = [texts.beside(Path(earlier["scan"]), source)]
    if not scans:
        raise errors.BadOption("no scan named", key="SCAN", help="tunemri recon SCAN -m MODEL -o OUT")
    scans = [texts.resolved(scan) or scan for scan in scans]
    if model is None:
        model = earlier.get("model")
    if model is None:
        raise errors.BadOption(
            "no model named", key="model", help="-m hyper-brain, -m tv, … (see `tunemri models`, `tunemri methods`)"
        )
    if source and model != earlier["model"]:
        earlier["dials"] = {}  # they belong to another model
    extrapolate = extrapolate or bool(earlier.get("extrapolate"))
    seed = int(earlier.get("seed", 0)) if seed is None else seed
    slices = earlier.get("slice") if slices is None else slices
    if csm is None:
        csm = str(earlier.get("csm", "auto"))
        csm = csm if source is None or csm in MAPS else str(texts.beside(Path(csm), source))
    asked = jobs.Asked(
        model=model, earlier=json.dumps(earlier), settings=tuple(settings or ()), csm=csm, reference=reference,
        slices=slices, seed=seed, extrapolate=extrapolate, device=device, overwrite=overwrite,
    )  # fmt: skip
    jobs.contestant_of.cache_clear()
    chosen = (
        asked if address is None else dataclasses.replace(asked, device="cpu")
    ).contestant  # fails before any work
    if address is not None:
        # Outputs are checked here: what a worker has made, another may have to make again.
        asked = dataclasses.replace(asked, overwrite=True, model_sha256=texts.model_hash(chosen.name))
    many = len(scans) > 1 or output.is_dir()
    if many and not output.is_dir() and output.suffix:
        raise errors.BadOption(f"{len(scans)} scans and one file", file=output, help="name a folder, without suffix")
    if many and not (overwrite or resume) and (output / "summary.json").exists():
        raise errors.BadOption("exists already", file=output / "summary.json", help="another folder, or --overwrite")
    planned = [(scan, output / f"{texts.stem(scan)}.h5" if many else output) for scan in scans]
    targets = [target for _, target in planned]
    if len(set(targets)) < len(targets):
        raise errors.BadOption(
            "two scans have the same file name", file=output, help="reconstruct them into different folders"
        )
    made = many and not output.exists()
    if many:
        files.make_folder(output)
    done: dict[int, dict[str, Any]] = {}
    refused: dict[int, dict[str, Any]] = {}
    taken: list[int] = []
    units: list[jobs.Job] = []

    def refuse(index: int, error: Exception) -> None:
        known = console.as_error(error)
        if known is None or not many:
            raise error
        console.say(console.error_line(known))
        refused[index] = {"scan": str(planned[index][0]), **console.describe(known)}

    for index, (scan, target) in enumerate(planned):
        try:
            if many and resume and (facts := jobs.done_before(scan, target, asked)) is not None:
                done[index] = facts
                continue
            if address is not None:
                jobs.check(scan, target, overwrite)
            taken.append(index)
            units.append(jobs.Job(scan=scan, target=target, asked=asked))
        except Exception as error:
            refuse(index, error)
    how = f"{output}: the same command with --resume does the rest" if many else "nothing was written"
    with (
        console.resumable(lambda: f"{len(done)} of {len(planned)} scans done, {how}"),
        cluster.workers(address) as executor,
        console.progress("recon") as bar,
    ):
        for number, (unit, outcome) in enumerate(cluster.each(jobs.run, units, executor), 1):
            if isinstance(outcome, Exception):
                refuse(taken[unit], outcome)
            else:
                done[taken[unit]] = outcome
            bar(number, len(units))
    if many and not done:
        # Nothing came of it: leave nothing behind.
        if made:
            output.rmdir()
        _result(
            {"ok": False, "done": [], "refused": _in_order(refused)},
            as_json,
            f"{output}  0 of {len(planned)} scans done",
        )
        raise typer.Exit(2)
    if many:
        summary = {"ok": not refused, "done": _in_order(done), "refused": _in_order(refused)}
        with files.write_atomically(output / "summary.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(console.plain(summary), indent=1) + "\n", encoding="utf-8")
        _result(
            summary,
            as_json,
            f"{output}  {len(done)} of {len(planned)} scans done" + (f", {len(refused)} refused" if refused else ""),
        )
        if refused:
            raise typer.Exit(1)
    else:
        facts = done[0]
        _result(facts, as_json, _recon_line(facts))


@app.command()
def sweep(
    scan: ScanArgument,
    model: Model,
    output: OutputFolder,
    grid: Annotated[
        list[str] | None,
        Option(
            "--grid",
            metavar="DIAL=START:STOP:N",
            help="repeatable; also DIAL=N and DIAL=V1,V2,…; every dial 11 points by default",
        ),
    ] = None,
    reference: ReferenceFile = None,
    metrics: Annotated[
        str, Option("--metrics", help="comma-separated, e.g. psnr,ssim,nmse,mae,hfen")
    ] = "psnr,ssim,mae,hfen",
    csm: Csm = "auto",
    slices: Slices = None,
    address: Cluster = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Reconstruct one scan over a grid of dials: table.csv, images.npy, and pictures."""
    import numpy as np
    import torch

    from . import cluster, evaluation, plots

    names = texts.metric_names(metrics)
    contestant = texts.contestant(model, {}, [], False)
    data, truth = jobs.load(scan, slices, csm, reference)
    source = jobs.Source(
        scan=scan,
        slices=slices,
        csm=csm,
        reference=reference,
        digests=tuple(map(jobs.digest_of, (scan, reference, Path(csm)))),
    )
    case = evaluation.Case(name="scan", scan=data, reference=truth, source=source)
    dials = contestant.model.dials
    axes = texts.axes_of(grid or [], contestant.model) or dict.fromkeys(dials, 11)
    fixed = {name: value for name, value in contestant.dials.items() if name not in axes}
    with (
        cluster.workers(address) as executor,
        _kept(output, "sweeping") as kept,
        console.progress("sweep") as bar,
        files.write_folder_atomically(output, overwrite=overwrite) as folder,
    ):
        rows = evaluation.sweep(
            case, contestant, {**fixed, **axes}, metrics=names, progress=bar, keep=kept, executor=executor
        )
        rows = [dataclasses.replace(row, labels={"model": model}) for row in rows]
        evaluation.write_csv(folder / "table.csv", evaluation.records(rows))
        np.save(folder / "images.npy", torch.stack([row.image for row in rows if row.image is not None]).numpy())
        middle = len(data) // 2
        for dial in axes:
            own = _slice_through(rows, dial)
            if len({row.dials[dial] for row in own}) > 1:
                plots.contact_sheet(own, dial, reference=truth, slice_index=middle).save(folder / f"images-{dial}.png")
                shown = list(names[:2]) if truth is not None else ["residual"]
                plots.dial_curve(own, dial, shown, about=dials[dial]).save(folder / f"curve-{dial}.png")
        best = {name: evaluation.choose_by_reference(rows, name) for name in names} if truth is not None else {}
        facts = {
            "ok": True, "out": str(output), "scan": str(scan), "scan_sha256": files.sha256(scan), "model": model,
            "model_sha256": texts.model_hash(model), "settings": len(rows), "grid": axes,
            "acceleration": data.acceleration, "rows": evaluation.records(rows),
            "best": {name: {"dials": row.dials, "value": row.metrics[name]} for name, row in best.items()},
        }  # fmt: skip
        console.sidecar(folder / "sweep", facts, overwrite=False)
    text = "  ".join(f"best {n} {row.metrics[n]:.4g} at {_words(row.dials)}" for n, row in best.items())
    _result(facts, as_json, f"{output}  {len(rows)} settings  {text}")


@app.command()
def choose(
    scan: ScanArgument,
    model: Model,
    by: Annotated[
        str, Option("--by", metavar="CRITERION", help="heldout-kspace, discrepancy, sure, reference or diverse")
    ] = "heldout-kspace",
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="PICKS.json", help="a record that `recon --from` repeats")
    ] = None,
    settings: Annotated[list[str] | None, Option("--set", metavar="DIAL=VALUE", help="keep a dial there")] = None,
    k: Annotated[int, Option("-k", min=1, help="of diverse: how many settings")] = 6,
    within: Annotated[float, Option("--within", help="of diverse: dB of held-out error that a setting may lose")] = 1.0,
    reference: ReferenceFile = None,
    metric: Annotated[str, Option("--metric", help="of reference")] = "psnr",
    csm: Csm = "auto",
    slices: Slices = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find a setting for one scan, with or without ground truth; or k good settings that differ most."""
    import time

    import torch

    from . import tuning

    texts.metric_names(metric)
    if output is not None:
        if output.suffix != ".json":
            raise errors.BadOption(f"found suffix {output.suffix!r}, expected .json", file=output, key="output")
        if any(files.same_file(output, path) for path in texts.files_of(scan)):
            raise errors.BadOption("output and input are the same file", file=output, help="name another output")
        files.check_target(output, overwrite=overwrite)
    torch.manual_seed(seed)
    contestant = texts.contestant(model, {}, settings or [], False)
    data, truth = jobs.load(scan, slices, csm, reference)
    start = time.perf_counter()
    with console.progress("choose") as bar:
        choice = tuning.choose(
            data, contestant.model, by=by, reference=truth, metric=metric, k=k, within=within,
            fixed=contestant.dials, seed=seed, progress=bar,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    facts = {
        "ok": True, "out": None if output is None else str(output), "scan": str(scan), "scan_sha256": files.sha256(scan),
        "model": model, "model_sha256": texts.model_hash(model), "dials": choice.dials, "by": by, "reason": choice.reason,
        "picks": [{"dials": pick} for pick in choice.picks], "tried": choice.rows, "csm": csm, "slice": slices, "seed": seed,
        "acceleration": data.acceleration, "provenance": data.provenance, "seconds": seconds,
    }  # fmt: skip
    if output is not None:
        # The picks are a sidecar themselves: what `recon --from` needs lies at the top, for the first of them.
        console.sidecar(output.with_suffix(""), facts, overwrite=overwrite)
    more = f"  {len(choice.picks)} picks" if len(choice.picks) > 1 else ""
    where = f"{output}  " if output is not None else ""
    _result(facts, as_json, f"{where}{_words(choice.dials)}{more}  {by}: {choice.reason}  {seconds:.1f} s")


@app.command()
def compare(
    scan: ScanArgument,
    model: Models,
    output: Output,
    reference: ReferenceFile = None,
    csm: Csm = "auto",
    slices: Slices = None,
    metrics: Annotated[str, Option("--metrics", help="comma-separated")] = "psnr,ssim",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Methods side by side on one scan: a picture strip, metrics under each image."""
    from . import evaluation, plots

    names = texts.metric_names(metrics)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise errors.BadOption(
            f"found suffix {output.suffix!r}, expected .png, .pdf or .svg", file=output, key="output"
        )
    texts.check_output(output, scan, overwrite)
    if len(set(model)) < len(model):
        raise errors.BadOption("the same method twice", key="model", help="give each its own setting: tv:lam=0.01")
    contestants = [texts.contestant(text, {}, [], False) for text in model]
    data, truth = jobs.load(scan, slices, csm, reference)
    case = evaluation.Case(name=scan.name, scan=data, reference=truth)
    with console.progress("compare") as bar:
        rows = evaluation.evaluate(contestants, [case], metrics=names, keep_images=True, progress=bar)
    middle = len(data) // 2
    panels = [
        plots.Panel(title=c.name, image=_like(row.image[middle], truth), metrics=row.metrics)
        for c, row in zip(contestants, rows, strict=True)
        if row.image is not None
    ]
    figure = plots.strip(panels, None if truth is None else truth[middle].abs())
    with files.write_with_record(output, overwrite=overwrite) as folder:
        figure.save(folder / output.name)
        facts = {
            "ok": True, "out": str(output), "scan": str(scan), "scan_sha256": files.sha256(scan), "slice": middle,
            "model_sha256": {text: texts.model_hash(text) for text in model}, "acceleration": data.acceleration,
            "rows": evaluation.records(rows),
        }  # fmt: skip
        console.sidecar(folder / output.name, facts, overwrite=False)
    shown = (
        "\n".join("  ".join(line) for line in evaluation.table(evaluation.summarise(rows))) if truth is not None else ""
    )
    _result(facts, as_json, f"{output}\n{shown}".strip())


@app.command()
def view(
    scan: Annotated[
        Path | None,
        Argument(
            metavar="[SCAN]",
            help="any readable k-space file; without one, the embedded sample",
            callback=texts.resolved,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="repeatable: bundled name, file, or method[:dial=value]; default hyper-brain and tv",
        ),
    ] = None,
    port: Annotated[
        int | None, Option("--port", metavar="P", min=1, max=65535, help="default 8765, or any free one")
    ] = None,
    no_open: Annotated[bool, Option("--no-open", help="print the link, open no browser")] = False,
    csm: Csm = "auto",
    reference: ReferenceFile = None,
) -> None:
    """Turn the dials in your browser: A, B and their difference, the range, what you keep. For this machine only."""
    import webbrowser

    from . import viewer

    sock = viewer.listen(port)
    session = _session(scan, model or ["hyper-brain", "tv"], csm=csm, reference=reference)
    here = sock.getsockname()[1]

    def started(url: str) -> None:
        print(url, flush=True)
        if "SSH_CONNECTION" in os.environ:
            console.say(f"from your own machine: ssh -L {here}:127.0.0.1:{here} HOST, then open the link there")
        console.say("the link works once, on this machine; Ctrl-C ends")
        if not no_open and "SSH_CONNECTION" not in os.environ:
            webbrowser.open(url)

    try:
        viewer.serve(session, sock, started)
    finally:
        for pick in session.state.get("kept", []):
            console.say(f"kept: {session.command(pick)}" + (f"  # {pick['note']}" if pick["note"] else ""))


@app.command()
def export(
    scan: ScanArgument,
    model: Model,
    output: Annotated[Path, Option("-o", "--output", metavar="RANGE.html", help="the file to write")],
    csm: Csm = "auto",
    reference: ReferenceFile = None,
    slices: Annotated[str | None, Option("--slice", metavar="K", help="which slice; default the middle one")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file with live dials, for anybody with a browser and no network; it says how exact it is."""
    from . import viewer

    if output.suffix.lower() not in (".html", ".htm"):
        raise errors.BadOption(f"found suffix {output.suffix!r}, expected .html", file=output, key="output")
    texts.check_output(output, scan, overwrite)
    session = _session(scan, [model], csm=csm, reference=reference)
    cut = texts.as_slice(slices)
    index = len(session.scan) // 2 if cut is None else cut.start
    if index >= len(session.scan) or (cut is not None and cut.stop != index + 1):
        raise errors.BadOption(f"found {slices!r}, expected one of {len(session.scan)} slices", key="slice")
    with files.write_with_record(output, overwrite=overwrite) as folder:
        facts = viewer.export(folder / output.name, session, index=index)
        facts = {
            "ok": True, "out": str(output), "out_sha256": files.sha256(folder / output.name),
            "scan": str(scan), "scan_sha256": files.sha256(scan),
            "model": model, "model_sha256": texts.model_hash(model), "slice": index, "csm": csm, **facts,
        }  # fmt: skip
        console.sidecar(folder / output.name, facts, overwrite=False)
    worst = "exact" if facts["checked_db"] is None else f"{facts['checked_db']:.1f} dB"
    _result(
        facts, as_json,
        f"{output}  {facts['bytes'] / 1e6:.2f} MB  {facts['settings']} settings  {facts['components']} components  "
        f"worst rebuild error: PSNR {worst}",
    )  # fmt: skip


# ---------------------------------------------------------------- research


@app.command()
def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE.toml")],
    output: Annotated[Path, Option("-o", "--output", metavar="RUN", help="run folder")],
    changes: Annotated[
        list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="change the recipe; repeatable")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="go on with the run in this folder")] = False,
    threads: Annotated[int | None, Option("--threads", min=1, help="processor threads")] = None,
    as_json: AsJson = False,
) -> None:
    """Train from a recipe; RUN/model.safetensors is the result. Several processes: torchrun -m tunemri train …"""
    import torch

    from . import training

    if threads:
        torch.set_num_threads(threads)
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, one speaks for all

    def report(state: dict[str, Any]) -> None:
        left = state["seconds"] / state["step"] * (state["steps"] - state["step"])
        notes = "".join(f"  {name} {value:.3g}" for name, value in state["notes"].items())
        console.say(
            f"step {state['step']}/{state['steps']}  loss {state['loss']:.4f}{notes}  {state['seconds']:.0f} s, {left:.0f} s left"
        )

    try:
        training.train(training.read_recipe(recipe, changes or []), output, resume=resume, report=report)
    except training.Interrupted as stop:
        if first:
            console.say(f"state saved; go on with: tunemri train {recipe} --resume -o {output}")
        raise typer.Exit(128 + stop.signum) from None
    if first:
        weights = output / "model.safetensors"
        digest = files.sha256(weights)
        _result({"ok": True, "out": str(weights), "sha256": digest}, as_json, f"{weights}  {digest[:12]}")


@app.command()
def adapt(
    model: Annotated[str, Argument(metavar="MODEL", help="bundled name, or a .safetensors file")],
    scans: Annotated[list[Path], Argument(metavar="SCAN...", help="one to five scans of one protocol")],
    output: Annotated[Path, Option("-o", "--output", metavar="NEW.safetensors", help="the weights to write")],
    reference: Annotated[
        list[Path] | None,
        Option("--reference", metavar="FILE", help="ground truth, one for each scan, where the scans hold none"),
    ] = None,
    by: Annotated[
        str | None,
        Option("--by", help="reference or heldout-kspace; default: reference where every scan has one"),
    ] = None,
    csm: Csm = "auto",
    slices: Slices = None,
    seed: Seed = 0,
    anyway: Annotated[bool, Option("--anyway", help="write them even where the gain may be none")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Re-learn a task weight, or how the weight of a prior follows a scan, from a few; written only if that pays."""
    import time

    from . import methods, tuning
    from .methods.generative import Generative

    source = _weights_behind(model, output, scans, overwrite)
    if reference and len(reference) != len(scans):
        raise errors.BadOption(f"found {len(reference)} for {len(scans)} scans", key="reference", help="one for each")
    if by not in (None, "reference", "heldout-kspace"):
        raise errors.BadOption(
            f"found {by!r}", key="by", help=errors.did_you_mean(str(by), ("reference", "heldout-kspace"))
        )
    trained = methods.load(model)
    if isinstance(trained, Generative):  # it has no task; what follows the scan is the weight that it suggests
        if by == "heldout-kspace":
            raise errors.BadOption(
                "how the weight of a prior follows a scan is fitted to ground truth", key="by", help="--by reference"
            )
        by = "reference"
    start = time.perf_counter()
    truths_given: list[Path | None] = [*reference] if reference else [None] * len(scans)
    loaded = [jobs.load(s, slices, csm, r) for s, r in zip(scans, truths_given, strict=True)]
    truths = [truth for _, truth in loaded if truth is not None]
    if by == "reference" and len(truths) < len(scans):
        raise errors.NoData(
            f"{len(scans) - len(truths)} of {len(scans)} scans have no ground truth", key="reference",
            help="--reference FILE for each scan" + ("" if isinstance(trained, Generative) else ", or --by heldout-kspace"),
        )  # fmt: skip
    use = by != "heldout-kspace" and len(truths) == len(scans)
    data = [scan for scan, _ in loaded]
    found: tuning.WeightFit | tuning.Adaptation
    with console.progress("adapt") as bar:
        if isinstance(trained, Generative):
            found = tuning.fit_weight(trained, data, truths, progress=bar)
        else:
            found = tuning.adapt(trained, data, truths if use else None, seed=seed, progress=bar)
    gain = f"{found.gain:+.3f} dB, 95 % interval {found.low:+.3f} to {found.high:+.3f} over {found.units} {found.over}"
    if not found.pays and not anyway:
        raise errors.NoData(
            f"{found.by}: gain {gain}: may be none, so nothing was written", file=output, key="gain",
            help="the weights that you have serve these scans as well; more scans, or --anyway",
        )  # fmt: skip
    what: dict[str, Any] = (
        {"regression": vars(found.regression), "r2": found.r2}
        if isinstance(found, tuning.WeightFit)
        else {"shift": found.shift}
    )
    made = {
        **what, "by": found.by, "gain_db": found.gain, "interval_db": [found.low, found.high],
        "units": found.units, "over": found.over, "ratios": found.ratios, "tried": found.rows,
        "model_sha256": files.sha256(source), "scans_sha256": [files.sha256(path) for path in scans], "seed": seed,
    }  # fmt: skip
    recipe = methods.card(source)["recipe"]
    facts = {
        "model": model, "scans": [str(path) for path in scans], "csm": csm, "slice": slices, "pays": found.pays, **made,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    recipe = {**recipe, "adapted": [*recipe.get("adapted", []), console.plain(made)]}
    facts = _write_weights(found.model, output, recipe, facts, overwrite)
    _result(facts, as_json, f"{output}  {found.by}: {gain}  {facts['seconds']:.1f} s")


@app.command()
def equalise(
    model: Annotated[str, Argument(metavar="MODEL", help="bundled name, or a .safetensors file")],
    scans: Annotated[list[Path], Argument(metavar="SCAN...", help="typical scans; several")],
    output: Annotated[Path, Option("-o", "--output", metavar="NEW.safetensors", help="the weights to write")],
    dial: Annotated[
        list[str] | None, Option("--dial", help="repeatable; whose slider; default: of all dials with a range")
    ] = None,
    csm: Csm = "auto",
    slices: Slices = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Space the sliders of a model anew: equal steps make an equal visible change; every value keeps its image."""
    import time

    from . import methods, tuning

    source = _weights_behind(model, output, scans, overwrite)
    trained = methods.load(model)
    start = time.perf_counter()
    loaded = [jobs.load(path, slices, csm, None)[0] for path in scans]
    with console.progress("equalise") as bar:
        even = tuning.equal_steps(trained, loaded, dials=dial or None, progress=bar)
    curves = {name: list(d.curve) for name, d in even.dials.items() if d.curve}
    made = {
        "dials": dial or list(curves), "model_sha256": files.sha256(source),
        "scans_sha256": [files.sha256(path) for path in scans],
    }  # fmt: skip
    facts = {
        "model": model, "scans": [str(path) for path in scans], "csm": csm, "slice": slices, "curves": curves, **made,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    recipe = {**methods.card(source)["recipe"], "equalised": made}
    facts = _write_weights(even, output, recipe, facts, overwrite)
    middle = _words({name: even.dials[name].at(0.5) for name in made["dials"]})
    _result(facts, as_json, f"{output}  the middle of the slider is now {middle}  {facts['seconds']:.1f} s")


@app.command()
def evaluate(
    model: Models,
    data: Annotated[Path, Option("--data", metavar="DIR", help="folder of images, or of scans with a reference")],
    output: OutputFolder,
    masks: Annotated[
        list[str] | None,
        Option(
            "--masks",
            metavar="NAME:R",
            help="repeatable; mask families with acceleration, or a 0/1 file; default poisson:4",
        ),
    ] = None,
    sources: Annotated[
        str | None, Option("--sources", help="comma-separated data sets of a shared-data folder")
    ] = None,
    limit: Annotated[int, Option("--limit", min=1, help="images per source, evenly spaced")] = 10,
    coils: Annotated[int, Option("--coils", min=1)] = 1,
    noise: Annotated[float, Option("--noise", help="standard deviation over the image maximum")] = 0.0,
    seed: Seed = 0,
    metrics: Annotated[str, Option("--metrics", help="comma-separated")] = "psnr,ssim,mae,hfen",
    tune: Annotated[
        bool,
        Option("--tune", help="give each method without weights its best `lam` for each mask, on these very images"),
    ] = False,
    grid: Annotated[
        int,
        Option("--grid", min=0, help="points along the dial of each trained model; 0: its given or default setting"),
    ] = 0,
    spline: Annotated[
        bool,
        Option("--spline", help="score every image once more, its intensities fitted to the reference on other images"),
    ] = False,
    landscape: Annotated[
        int,
        Option(
            "--landscape",
            min=0,
            metavar="N",
            help="score N settings along each free dial (at most two) of each method: maps, area and range curves, "
            "far pairs, self-consistency; 0: none",
        ),
    ] = 0,
    thresholds: Annotated[
        str | None,
        Option("--thresholds", metavar="DB,DB,…", help="of the area and range curves; default every 0.25 dB"),
    ] = None,
    state: Annotated[
        Path | None,
        Option("--state", metavar="DIR", help="keeps landscapes, finished ones too, for later commands"),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        Option("--fail-under", metavar="METRIC=VALUE", help="exit 5 unless the first model's mean reaches it"),
    ] = None,
    address: Cluster = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score methods on images that are undersampled here: table.md, rows.csv, curves, landscapes and report.html."""
    from . import cluster, scoring

    gates = dict(texts.as_pair(text, "fail-under") for text in fail_under or [])
    names = texts.metric_names(metrics, *gates)
    contestants = [texts.contestant(text, {}, [], False) for text in model]
    plan = scoring.Plan(
        folder=data, sources=tuple(sources.split(",")) if sources else (), limit=limit, coils=coils, noise=noise,
        seed=seed, masks=tuple(masks or ["poisson:4"]),
    )  # fmt: skip
    levels = tuple(texts.as_number(text, "thresholds") for text in (thresholds or "").split(",") if text)
    if not landscape and (levels or state):
        raise errors.BadOption(
            "--thresholds and --state belong to a landscape", key="landscape", help="--landscape 100"
        )
    kept = files.make_folder(state) if state else None
    atlas = scoring.Atlas(points=landscape, thresholds=levels, state=kept) if landscape else None
    if address and landscape:
        errors.warn("landscapes are made here, not on the cluster")
    with (
        cluster.workers(address) as executor,
        _kept(output, "evaluating") as unfinished,
        console.progress("evaluate") as bar,
        files.write_folder_atomically(output, overwrite=overwrite) as folder,
    ):
        rows, text = scoring.run(
            contestants, plan, folder, metrics=names, tune=tune, grid=grid, spline=spline, atlas=atlas,
            keep=unfinished, executor=executor, progress=bar,
        )  # fmt: skip
        means = scoring.means(rows, contestants[0].name, names)
        failed = scoring.below(means, {name: texts.as_number(value, name) for name, value in gates.items()})
        facts = {
            "ok": not failed, "out": str(output), "plan": dataclasses.asdict(plan), "models": model,
            "model_sha256": {text: texts.model_hash(text) for text in model}, "means": means,
            "summary": scoring.summary(rows), "failed": failed,
        }  # fmt: skip
        console.sidecar(folder / "evaluate", facts, overwrite=False)
    _result(facts, as_json, f"{text}\n{output / 'report.html'}")
    if failed:
        for name, bound in failed.items():
            console.say(f"gate: mean {name} {means[name]:.4g} does not reach {bound:g}")
        raise typer.Exit(5)


@app.command()
def models(name: Annotated[str | None, Argument(metavar="[NAME]")] = None, as_json: AsJson = False) -> None:
    """The models that ship: dials with ranges and the words at both ends, training data, scores."""
    from . import cards

    known = {n: cards.card(path) for n, path in cards.bundled().items()}
    _listing(known, name, "model", as_json, lambda c: c["recipe"].get("summary", c["method"]))


@app.command()
def methods(name: Annotated[str | None, Argument(metavar="[NAME]")] = None, as_json: AsJson = False) -> None:
    """The methods that there are, with their dials."""
    import inspect

    from .methods import METHODS, needs_weights

    def describe(name: str, kind: type[Reconstructor]) -> dict[str, Any]:
        needs = needs_weights(name)
        dials = {} if needs else {n: d.as_dict() for n, d in kind().dials.items()}
        about = inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]
        return {
            "about": about,
            "needs_weights": needs,
            "arguments": list(inspect.signature(kind).parameters),
            "dials": dials,
        }

    _listing({n: describe(n, kind) for n, kind in METHODS.items()}, name, "method", as_json, lambda d: d["about"])


@app.command()
def masks(name: Annotated[str | None, Argument(metavar="[NAME]")] = None, as_json: AsJson = False) -> None:
    """The sampling patterns that `simulate` and `evaluate` can make."""
    from . import masks as patterns

    known = {n: {"about": patterns.describe(n), "options": patterns.options(n)} for n in patterns.MASKS}
    _listing(known, name, "mask", as_json, lambda d: d["about"])


# ---------------------------------------------------------------- what the commands share


def _in_order(found: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [found[index] for index in sorted(found)]


@contextmanager
def _kept(output: Path, doing: str) -> Iterator[Path]:
    """A folder for what a long command has finished so far; if it is stopped, it says so and how to go on."""
    with files.unfinished(output, doing) as folder:

        def sentence() -> str:
            done = len(list(folder.glob("part-*")))
            return f"{done} results are kept in {folder.name}; the same command goes on from there"

        with console.resumable(sentence):
            yield folder


def _weights_behind(model: str, output: Path, scans: list[Path], overwrite: bool) -> Path:
    """The file of MODEL, of which `output` is to be made; refused before any work where that cannot be."""
    from .cards import bundled

    if output.suffix != ".safetensors":
        raise errors.BadOption(f"found suffix {output.suffix!r}, expected .safetensors", file=output, key="output")
    source = bundled().get(model, Path(model))
    for path in (source, *scans):
        texts.check_output(output, path, overwrite)
    return source


def _write_weights(
    model: Reconstructor, output: Path, recipe: dict[str, Any], facts: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    """Weights and their record, together; the facts of the record."""
    from .methods import save

    with files.write_with_record(output, overwrite=overwrite) as folder:
        file = folder / output.name
        save(model, file, recipe)
        facts = {"ok": True, "out": str(output), "out_sha256": files.sha256(file), **facts}
        console.sidecar(file, facts, overwrite=False)
    return facts


def _session(scan: Path | None, model: list[str], *, csm: str, reference: Path | None) -> Session:
    """What the viewer shows; without a scan, the embedded sample with its reference."""
    import importlib.resources

    from . import viewer

    path = Path(str(importlib.resources.files("tunemri") / "sample" / "brain.h5")) if scan is None else scan
    contestants = [texts.contestant(text, {}, [], False) for text in model]
    data, truth = jobs.load(path, None, csm, reference)
    digest = files.sha256(path)
    return viewer.Session(
        data, contestants, reference=truth, title=console.one_line(path.name) if scan is not None else "the embedded sample",
        source=viewer.Source(path=console.plain(path), sha256=digest, csm=csm),
        hashes={c.name: texts.model_hash(c.name) for c in contestants},
    )  # fmt: skip


def _recon_line(facts: dict[str, Any]) -> str:
    parts = [facts["out"], _words(facts["dials"]), f"acceleration={facts['acceleration']:.2f}"]
    parts += [f"residual={facts['residual']:.2%}"] if facts["residual"] is not None else []
    parts += [f"{name}={facts['metrics'][name]:.4g}" for name in ("psnr", "ssim") if name in facts["metrics"]]
    return "  ".join(p for p in [*parts, f"{facts['seconds']:.2f} s"] if p)


def _like(image: Tensor, truth: Tensor | None) -> Tensor:
    from .fourier import crop

    return image if truth is None else crop(image, truth.shape[-2:])


def _slice_through(rows: Any, dial: str) -> Any:
    """The rows along one dial, all other dials at their middle value."""
    others = {name for row in rows for name in row.dials} - {dial}
    middle = {
        name: sorted({row.dials[name] for row in rows}, key=str)[len({row.dials[name] for row in rows}) // 2]
        for name in others
    }
    return [row for row in rows if all(row.dials[name] == value for name, value in middle.items())]


def _words(dials: Any) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in dials.items()
    )


def _result(facts: Any, as_json: bool, line: str) -> None:
    print(json.dumps(console.plain(facts)) if as_json else line, flush=True)


def _listing(items: dict[str, Any], name: str | None, what: str, as_json: bool, about: Any) -> None:
    if name is not None and name not in items:
        raise errors.BadOption(f"found {name!r}", key=what, help=errors.did_you_mean(name, items))
    shown = items if name is None else {name: items[name]}
    if as_json:
        print(json.dumps(console.plain({"ok": True, f"{what}s": shown})))
        return
    for key, item in shown.items():
        print(f"{key:<24} {about(item)}")
        for dial, d in item.get("dials", {}).items():
            span = (
                " | ".join(d["choices"])
                if "choices" in d
                else f"{d['lo']:g} … {d['hi']:g} ({d['scale']}), default {d['default']:g}"
            )
            ends = f": {d['low']} ↔ {d['high']}" if d["low"] or d["high"] else ""
            print(f"    {dial:<20} {span}{ends}")
            print(f"    {'':<20} {d['sentence']}")
        if name is not None:
            print(json.dumps(console.plain(item), indent=2))


def _spread_lists(arguments: list[str]) -> list[str]:
    """`--set a=1 b=2` means `--set a=1 --set b=2`; likewise --grid, --masks and --fail-under."""
    out: list[str] = []
    option: str | None = None
    for text in arguments:
        if text.startswith("-"):
            option = text if text in ("--set", "--grid", "--masks", "--fail-under") else None
        elif option is not None and out[-1] != option:
            # Only what looks like one more value of the option, never a file.
            mark = ":" if option == "--masks" else "="
            if mark in text and not Path(text).exists():
                out.append(option)
            else:
                option = None
        out.append(text)
    return out


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tunemri {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
    verbose: Annotated[bool, Option("-v", "--verbose", help="show tracebacks")] = False,
) -> None:
    """MRI reconstruction that you can still tune after training."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run the command line and exit with its status."""
    argv = _spread_lists(sys.argv[1:] if arguments is None else arguments)
    # -v is allowed anywhere: it says how to report, not what to do.
    verbose = any(a in ("-v", "--verbose") for a in argv)
    argv = [a for a in argv if a not in ("-v", "--verbose")]
    console.listen()
    sys.exit(console.guarded(lambda: _dispatch(argv), verbose=verbose, as_json="--json" in argv))


def _dispatch(argv: list[str]) -> int:
    from typer import _click  # the parser's own errors become ours

    try:
        return app(args=argv, prog_name="tunemri", standalone_mode=False) or 0
    except _click.exceptions.NoArgsIsHelpError as error:
        console.say(error.format_message())
        return 2
    except _click.exceptions.NoSuchOption as error:
        known = error.ctx.command.params if error.ctx else []
        names = [name for parameter in known for name in parameter.opts]
        raise errors.BadOption(
            "no such option", key=error.option_name, help=errors.did_you_mean(error.option_name, names)
        ) from None
    except _click.exceptions.UsageError as error:
        text = error.format_message()
        commands = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
        unknown = argv[0] if argv and not argv[0].startswith("-") and argv[0] not in commands else None
        if unknown is not None:
            raise errors.BadOption(
                "no such command", key=unknown, help=errors.did_you_mean(unknown, commands)
            ) from None
        raise errors.BadOption(text.strip().rstrip("."), help=f"tunemri {argv[0] if argv else ''} --help") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
