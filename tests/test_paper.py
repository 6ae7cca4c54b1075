"""The page of `make bench-paper`: tables from rows, goals as they were met or missed, and nothing dropped in silence."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tunemri import evaluation, methods
from tunemri.evaluation import Case, Row
from tunemri.masks import make_mask
from tunemri.report import Picture
from tunemri.simulate import phantom, simulate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("paper")


@pytest.fixture
def tables(paper: ModuleType) -> ModuleType:
    return importlib.import_module("paper_tables")


def row(model: str, case: str, subject: str, psnr: float, dials: dict[str, float] | None = None, **labels: str) -> Row:
    return Row(
        labels={"model": model, "case": case, "subject": subject, **labels}, dials=dials or {},
        metrics={"psnr": psnr, "ssim": psnr / 50, "nmse": 1 / psnr, "hfen": 2 / psnr},
    )  # fmt: skip


def written(folder: Path, name: str, rows: list[Row], **more: str) -> None:
    evaluation.write_csv(folder / name, [{**r, **more} for r in evaluation.records(rows)])


def numbers(sections, title):
    (found,) = [s.records for s in sections if not isinstance(s, Picture) and s.title == title]
    return found


def test_rows_come_back_from_their_file(tables, tmp_path):
    rows = [
        row("tv", "1", "a", 30.5, {"lam": 0.002}, mask="radial"),
        row("zero-filled", "1", "a", 20.25, mask="radial"),
    ]
    written(tmp_path, "rows.csv", rows)
    assert tables.rows_of(tmp_path / "rows.csv") == rows


def test_a_subject_counts_once_in_mean_and_spread(tables):
    rows = [row("tv", f"{i}", subject, psnr) for i, (subject, psnr) in enumerate([("a", 30), ("a", 32), ("b", 35)])]
    (line,) = tables.summary(rows, ("model",), ("psnr",))
    assert (line["n"], line["psnr_mean"]) == (2, 33)
    assert line["psnr_sd"] == pytest.approx(4 / 2**0.5)
    (alone,) = tables.summary(rows[:2], ("model",), ("psnr",))
    assert (alone["n"], alone["psnr_sd"]) == (1, None)
    assert evaluation.table([line, alone])[1:] == [["tv", "2", "33.00 ± 2.83 (33.00)"], ["tv", "1", "31.00"]]


def test_one_subject_has_no_interval(tables):
    rows = [row(m, f"{i}", "a", p + i, ratio="0.1") for m, p in (("meta", 30), ("tv", 29)) for i in range(3)]
    (line,) = tables.differences(rows, [("meta", "tv"), ("meta", "nobody")], ("ratio",))
    assert (line["n"], line["PSNR [dB]"], line["95 % from"], line["to"], line["p"]) == (1, 1, None, None, None)


def test_goals_are_shown_met_or_missed(tables):
    (found,) = tables.goals(
        "x\nmet     MAP of 256² [s]: 9.50 (bar: 10)\nMISSED  coverage, radial: 0.61 (bar: 0.80 to 0.97)\n"
    )
    assert [(r["goal"], r["found"], r["bar"], r[""]) for r in found.records] == [
        ("MAP of 256² [s]", 9.5, "10", "met"), ("coverage, radial", 0.61, "0.80 to 0.97", "missed"),
    ]  # fmt: skip
    assert tables.goals("nothing to hold against anything") == []


def test_across_families(tables, tmp_path):
    levels = {"suggested": 30.0, "chosen": 30.5, "best": 31.0}
    rows = [
        row(m, s, s, p + gain, {"lam": 0.1} if m == "tv" else {}, mask=mask, setting=setting, parameters="0")
        for m, gain in (("tv", 0.0), ("zero-filled", -9.0)) for mask in ("radial", "poisson")
        for s in ("a", "b") for setting, p in levels.items()
    ]  # fmt: skip
    written(tmp_path, "rows.csv", rows)
    (tmp_path / "images-ixi-a.png").write_bytes(b"open")
    (tmp_path / "images-oasis-b.png").write_bytes(b"not for everybody")
    found = tables.show_across(tmp_path, "")
    (first, second) = numbers(found, "PSNR [dB], best setting / self-chosen setting")
    assert first == {"method": "tv", "radial": "31.00 / 30.50", "poisson": "31.00 / 30.50"}
    assert second["radial"] == "22.00"  # nothing to choose
    overall = numbers(found, "Over all masks")
    assert [(r["method"], r["setting"], r["n"]) for r in overall] == [
        ("tv", "suggested", 2), ("tv", "chosen", 2), ("tv", "best", 2), ("zero-filled", "suggested", 2),
    ]  # fmt: skip
    assert overall[1]["PSNR − TV at its best"] == "-0.50 (-0.50 to -0.50)"
    assert [s.png for s in found if isinstance(s, Picture)] == [b"open"]
    (tmp_path / "rows.csv").unlink()
    written(tmp_path, "rows.csv", [r for r in rows if r.labels["model"] == "tv" or r.labels["mask"] == "radial"])
    printed = "radial: 2 images\n  left out: sharper (why)\npoisson: 2 images\n  left out: sharper (why)\n"
    found = tables.show_across(tmp_path, printed)
    assert numbers(found, "PSNR [dB], best setting / self-chosen setting")[1]["poisson"] == ""
    assert [s.text for s in found if isinstance(s, tables.Printed)] == ["sharper (why)"]


def test_a_model_enters_where_undersampling_is_its_task(paper):
    across = importlib.import_module("across")
    models = {name: methods.load(name) for name in methods.bundled()}

    def entering(mask: str, acceleration: float) -> set[str]:
        pattern = make_mask(mask, (128, 120), acceleration)
        group = [Case(name="a", scan=simulate(phantom((128, 120))[None], mask=pattern, coils=1, noise=0.005)[0])]
        return {name for name, model in models.items() if across.another_task(model, group) is None}

    others = {"hyper-brain-denoising", "hyper-brain-superresolution"}
    assert entering("random", 4) == entering("poisson", 4) == entering("radial", 4) == set(models) - others
    assert "hyper-brain-superresolution" in entering("centre", 4)
    assert "hyper-brain-denoising" in entering("full", 1)
    assert "hyper-brain" not in entering("full", 1)


def test_what_is_left_out_is_said_and_has_no_row(paper, folder, monkeypatch, capsys):
    across = importlib.import_module("across")
    bundled = methods.bundled()
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in ("zero-filled", "hyperrecon")})
    monkeypatch.setattr(methods, "bundled", lambda: {"hyper-brain-denoising": bundled["hyper-brain-denoising"]})
    words = f"--data {folder / 'data'} -o {folder / 'o'} --sources ixi --limit 1 --masks radial".split()
    monkeypatch.setattr(sys, "argv", ["across.py", *words])
    across.main()
    assert "left out: hyper-brain-denoising (acceleration" in capsys.readouterr().out
    with (folder / "o/rows.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"zero-filled"}


def test_yardstick_is_met_only_above_every_ratio(tables, tmp_path):
    def rows(gain):
        return [
            row(m, f"{series}{i}", series, 40.0 + i + (gain if m == "ours" and ratio == "50" else m == "ours"), ratio=ratio, series=series)
            for ratio in ("10", "20", "30", "40", "50") for series in ("axial", "sagittal") for i in range(2)
            for m in ("ours", "ISTA-Net+", "zero-filled")
        ]  # fmt: skip

    for gain, word in ((0.2, "met"), (-0.2, "missed")):
        (tmp_path / "yardstick.csv").unlink(missing_ok=True)
        written(tmp_path, "yardstick.csv", rows(gain))
        found = tables.show_yardstick(tmp_path, "")
        (goal,) = numbers(found, "Goal")
        assert goal[""] == word
        assert numbers(found, "Differences from ISTA-Net+, image by image")[-1]["difference [dB]"] == pytest.approx(
            gain
        )
    theirs = [r for r in numbers(found, "PSNR (peak 255) and SSIM") if r["model"] == "ISTA-Net+"]
    assert theirs[0]["published, all 50"] == "34.63 / 0.9035"


def test_meta_tables_stand_beside_the_published_ones(tables, tmp_path):
    title = "Table 2: T1, radial, unseen"
    rows = [
        row(m, s, s, p, {"weight": 0.5} if m == "meta" else {}, table=title, ratio="0.15")
        for m, p in (("meta", 30.0), ("tv", 29.0), ("conventional", 28.0), ("trained meta", 29.5)) for s in ("a", "b")
    ]  # fmt: skip
    written(tmp_path, "rows.csv", rows)
    found = tables.show_meta(tmp_path, "")
    lines = {r["model"]: r for r in numbers(found, title)}
    assert lines["meta"]["κ"] == 0.5
    assert lines["meta"]["published PSNR"] == "26.35 ± 1.01, κ 0.943 (conventional 24.66 ± 1.02)"
    assert lines["conventional"]["published PSNR"] == "24.66 ± 1.02"
    assert lines["tv"]["published PSNR"] == ""
    gains = {r["difference"]: (r["PSNR [dB]"], r["published"]) for r in numbers(found, f"{title}: differences")}
    assert gains == {"meta − tv": (1, None), "trained meta − conventional": (1.5, pytest.approx(1.6921))}


def test_generative_tables_in_and_out_of_distribution(tables, tmp_path):
    scores = {"TV, tuned": 30.0, "cartesian-only": 31.0, "net": 31.0, "MAP": 32.0}
    rows = [
        row(m, s, s, p, mask="radial 11×", source=source)
        for source in ("ixi", "knee") for m, p in scores.items() for s in ("a", "b")
    ]  # fmt: skip
    written(tmp_path, "coils.csv", rows)
    found = tables.show_generative("coils.csv", {"ixi": 2, "knee": 3})(tmp_path, "")
    for source, theirs in (("ixi", "20.56 / 10.13 / .69"), ("knee", "26.26 / 4.97 / .69")):
        lines = {r["model"]: r for r in numbers(found, f"Images of {source}")}
        assert lines["cartesian-only"]["published PSNR / 100 NMSE / SSIM"] == theirs
        assert lines["net"]["published PSNR / 100 NMSE / SSIM"] == ""
        gains = {r["difference"]: r["PSNR [dB]"] for r in numbers(found, f"Images of {source}: differences")}
        assert gains == {
            "MAP − TV, tuned": 2, "net − TV, tuned": 1, "cartesian-only − TV, tuned": 1, "MAP − net": 1, "MAP − cartesian-only": 1,
        }  # fmt: skip


class Parsed(Exception):
    """The options of a command are what its script takes."""


def test_every_command_of_every_part_is_one(paper, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(parser, *arguments):
        real(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    assert len({part.name for part in paper.PARTS}) == len(paper.PARTS)
    for part in paper.PARTS:
        assert part.about and part.split and part.commands
        for command in part.commands.values():
            words = shlex.split(command.format(data="images", out="here", root="."))
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / "benchmarks" / words[0]), run_name="__main__")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two subjects of one source, two slices each, as in the shared data."""
    (tmp_path / "data/val").mkdir(parents=True)
    images = np.stack([phantom((24, 20), seed=s).numpy() for s in range(4)]).astype(np.float32)
    np.savez(tmp_path / "data/val/ixi_pd_u8.npz", img=images)
    lines = ["split,file,key,index,source,subject", *(f"val,ixi_pd_u8.npz,img,{i},x,person-{i // 2}" for i in range(4))]
    (tmp_path / "data/val/MANIFEST.csv").write_text("\n".join(lines))
    return tmp_path


def test_from_commands_to_the_page(paper, folder, monkeypatch, capsys):
    """Done once, not again; failures and what was not run stand in their places; asked anew when the command changes."""
    across, other = paper.PARTS[:2]
    quick = "across.py --data {data} -o {out} -m tv -m hyper-brain --sources ixi --limit 2 --size 0 --masks radial --choose 3 0 1"
    parts = [
        replace(across, commands={"quick": quick}, models=()),
        replace(other, name="broken", commands={"quick": "nothing.py"}, models=()),
        replace(other, name="later", commands={"full": quick}, models=()),
    ]
    monkeypatch.setattr(paper, "PARTS", parts)
    page = folder / "docs/report.md"
    asked = ["--data", str(folder / "data"), "-o", str(folder / "runs"), "--page", str(page)]
    page.parent.mkdir()
    paper.main(asked)
    assert "across: done in" in capsys.readouterr().out
    text = page.read_text()
    assert re.search(r"\*\*Failed: .+nothing\.py.*: .*No such file", text)
    assert "Not run: only in the full budget" in text
    assert "| tv | best | 2 |" in text
    assert "**Warned of meanwhile**\n\n```text\noutside what" in text
    assert "Command: python benchmarks/across.py --data $TUNEMRI" in text
    assert str(folder) not in text
    for link in re.findall(r"\]\((report/[^)]+)\)", text):
        assert (page.parent / link).stat().st_size > 0
    assert "Over all masks" in (folder / "runs/report.html").read_text()
    (csv,) = [p for p in (folder / "docs/report").glob("*.csv") if "parameters" in p.read_text()]
    assert csv.read_text().startswith("method,setting,n,psnr_mean,psnr_sd")

    monkeypatch.setattr(paper.subprocess, "run", _never(paper.subprocess.run))
    paper.main([*asked, "--only", "across"])
    assert "across: done before" in capsys.readouterr().out
    monkeypatch.setattr(paper, "PARTS", [replace(parts[0], commands={"quick": quick + " --seed 1"}), *parts[1:]])
    paper.main([*asked, "--show"])
    assert "with another command or other weights" in page.read_text()
    state = json.loads((folder / "runs/quick/across/state-across.json").read_text())
    assert state["status"] == "done"


def _never(real):
    def run(command, **options):
        assert command[0] == "git", "a part that is done was run again"
        return real(command, **options)

    return run


def test_a_part_out_of_time_is_stopped_and_shows_what_is_its_own(paper, folder, monkeypatch):
    part = replace(paper.PARTS[1], commands={"quick": "across.py --data {data} -o {out} --sources ixi"}, models=())
    monkeypatch.setattr(paper, "PARTS", [part])
    asked = ["--data", str(folder / "data"), "-o", str(folder / "runs"), "--page", str(folder / "report.md")]
    outputs = folder / "runs/quick/yardstick"
    outputs.mkdir(parents=True)
    rows = [row(m, "1", "axial", p, ratio="10", series="axial") for m, p in (("ours", 31.0), ("ISTA-Net+", 30.0))]
    written(outputs, "yardstick.csv", rows)
    paper.main([*asked, "--minutes", "0.0001"])
    text = (folder / "report.md").read_text()
    assert "Stopped: after 0.0001 minutes, more were not allowed" in text
    assert "| axial |" not in text  # of an earlier command
    written(outputs, "yardstick.csv", rows)
    paper.main([*asked, "--minutes", "0.0001"])
    assert "| 10 | axial | ours | 1 |" in (folder / "report.md").read_text()


def test_stability_has_a_column_for_each_method(tables, tmp_path):
    evaluation.write_csv(
        tmp_path / "stability.csv",
        [{"method": m, "noise 2×": v, "radial": 30} for m, v in (("tv", 28.5), ("net", 29.5))],
    )
    (table,) = tables.show_stability(tmp_path, "")
    assert table.records == [{"": "noise 2×", "tv": 28.5, "net": 29.5}, {"": "radial", "tv": 30, "net": 30}]
