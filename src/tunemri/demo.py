"""The main job on the embedded sample: one undersampled scan over the whole range of a dial, beside the classical methods."""

from __future__ import annotations

import importlib.resources
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from . import __version__, evaluation, files, methods, plots, report
from .metrics import shown
from .scan import Scan
from .simulate import sample

__all__ = ["run"]

_CLASSICAL = ("zero-filled", "sense", "tv", "wavelet")
_METRICS = ("psnr", "ssim", "mae", "hfen")
_DPI = 110  # of pictures: a report of 3 MB travels by mail


def run(folder: Path, progress: Callable[[int, int], None], *, points: int = 21, model: str = "hyper-brain") -> str:
    """Sweep the dial, tune the classical methods on the very same scan; write pictures, tables, report.html, and the scan.

    Arguments:
        folder: an empty folder.
        progress: called with (done, total).
        points: settings along the dial.
        model: which trained model.

    Returns:
        one line that sums it up.
    """
    scan, reference = sample()
    # Maps once for all: every method below gets the same ones.
    scan = replace(scan, csm=methods.prepare(scan).csm)
    reference = reference.abs()
    network = methods.load(model)
    dial, about = next(iter(network.dials.items()))
    total = points + len(_CLASSICAL)
    rows = evaluation.sweep(
        scan,
        network,
        {dial: points},
        reference=reference,
        metrics=_METRICS,
        progress=lambda done, _: progress(done, total),
    )
    rows = [replace(row, labels={"model": model}) for row in rows]
    others = []
    for number, name in enumerate(_CLASSICAL, points + 1):
        others.append(_at_its_best(name, scan, reference))
        progress(number, total)
    best = evaluation.choose_by_reference(rows, "psnr")
    rival = max(others, key=lambda row: row.metrics["psnr"])
    gain = best.metrics["psnr"] - rival.metrics["psnr"]

    evaluation.write_csv(folder / "rows.csv", evaluation.records([*rows, *others]))
    sheet = plots.contact_sheet(rows, dial, reference=reference)
    panels = [plots.Panel(title=_title(row), image=_image(row), metrics=row.metrics) for row in [*others, best]]
    strip = plots.strip(panels, reference[0])
    levels = {row.labels["model"]: row.metrics for row in others}
    curve = plots.dial_curve(rows, dial, ("psnr", "ssim", "mae", "hfen"), about=about, levels=levels)
    for name, figure in (("dial", sheet), ("methods", strip), ("curves", curve)):
        figure.save(folder / f"{name}.png", dpi=_DPI)

    seconds = sorted(row.seconds for row in rows)[len(rows) // 2]
    summary = (
        f"One network, {points} settings of its dial on a {scan.acceleration:.1f}× undersampled {scan.coils}-coil scan, "
        f"{1000 * seconds:.0f} ms each; at its best {best.metrics['psnr']:.2f} dB, "
        f"{gain:+.2f} dB against {rival.labels['model']} at its best."
    )
    live = report.live_dial(
        rows, dial, window=plots.window(reference), about=about, reference=reference, others=others,
        caption=f"Move the slider. Left end: {about.low}; right end: {about.high}. The picture on the right and the "
        "difference follow. Nothing is retrained: the same weights answer for every setting.",
    )  # fmt: skip
    table = [["method", "setting", *(evaluation.heading(m) for m in _METRICS), "seconds"]]
    for row in [*others, *(evaluation.choose_by_reference(rows, m) for m in ("psnr", "ssim"))]:
        values = [shown(m, row.metrics[m]) for m in _METRICS]
        table.append([row.labels["model"], _setting(row), *values, f"{row.seconds:.2f}"])
    sections: list[report.Section] = [
        live,
        report.Picture(
            title="Beside the classical methods, each at its best weight on this scan", png=strip.png(_DPI),
            caption="Top: the images. Below: the box enlarged, and five times the difference from the truth. Look for "
            "residual aliasing (zero-filled, SENSE), staircases and lost texture (TV, wavelet).",
        ),
        report.Picture(
            title="What the dial trades", png=curve.png(_DPI),
            caption="Metrics along the dial; flat lines are the classical methods at their best weight.",
        ),
        report.Picture(
            title="Along the dial", png=sheet.png(_DPI), caption="From one end to the other, the same scan and the same weights."
        ),
        report.Table(
            title="In numbers", rows=table, words=2, caption="The last two rows: the settings with the best PSNR and the best SSIM.",
        ),
        report.Text(
            title="What this is, and what it is not",
            text=f"The scan is {scan.provenance}. The anatomy is an average of many brains and smoother than a person's, "
            "which flatters every method. It was not used for training. Not for diagnosis.",
        ),
    ]  # fmt: skip
    shipped = methods.bundled().get(model)
    sample_file = Path(str(importlib.resources.files("tunemri") / "sample" / "brain.h5"))
    shutil.copyfile(sample_file, folder / "scan.h5")  # for whoever wants to go on with it
    provenance = {
        "command": "tunemri " + " ".join(sys.argv[1:]), "tunemri": __version__, "model": model,
        "model sha256": files.sha256(shipped) if shipped else "", "scan sha256": files.sha256(sample_file),
        "measured acceleration": f"{scan.acceleration:.3f}", "dials": ", ".join(network.dials),
    }  # fmt: skip
    report.report(
        folder / "report.html",
        title="tunemri: one scan, every setting",
        summary=summary,
        sections=sections,
        provenance=provenance,
    )
    return summary


def _at_its_best(name: str, scan: Scan, reference: Tensor) -> evaluation.Row:
    """A classical method at the weight with the best PSNR on this very scan: as honest a rival as can be had."""
    model = methods.load(name)
    case = evaluation.Case(name="sample", scan=scan, reference=reference)
    dials = evaluation.tune([case], model, points=7, rounds=2).dials if "lam" in model.dials else {}
    contestant = evaluation.Contestant(name=name, model=model, dials=dials)
    return evaluation.evaluate([contestant], [case], metrics=_METRICS, keep_images=True)[0]


def _image(row: evaluation.Row) -> Tensor:
    assert row.image is not None
    return row.image[0]


def _setting(row: evaluation.Row) -> str:
    return ", ".join(f"{k}={v:.3g}" for k, v in row.dials.items())


def _title(row: evaluation.Row) -> str:
    return f"{row.labels['model']} {_setting(row)}".strip()
