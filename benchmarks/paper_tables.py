"""What `paper.py` shows of the outputs of a benchmark: from rows and printed goals to tables in the papers' form."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from published import GENERATIVE, ISTA_NET_PLUS, META

from tunemri import evaluation, report
from tunemri.evaluation import Row
from tunemri.metrics import METRICS

OPEN = ("openms", "ixi", "cardiac")  # images of these may be shown to everybody


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A table: records with the same keys, as text on the page and in full beside it."""

    title: str
    records: Sequence[Mapping[str, Any]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a command printed, as it is."""

    title: str
    text: str


Section = Numbers | Printed | report.Picture


# ---------------------------------------------------------------- from rows to tables


def rows_of(file: Path) -> list[Row]:
    """The rows of a file that `evaluation.write_csv` wrote: words are labels, so is any number that is no metric and no dial."""
    rows = []
    with file.open(newline="", encoding="utf-8") as f:
        for record in csv.DictReader(f):
            there = {key: value for key, value in record.items() if value != ""}
            rows.append(
                Row(
                    labels={k: v for k, v in there.items() if k not in _NUMBERS and not k.startswith("dial_")},
                    dials={k.removeprefix("dial_"): _number(v) for k, v in there.items() if k.startswith("dial_")},
                    metrics={k: float(v) for k, v in there.items() if k in METRICS},
                    seconds=float(there.get("seconds", 0)),
                    status=there.get("status", "converged"),
                )
            )
    return rows


_NUMBERS = {*METRICS, "residual", "seconds", "status"}


def records_of(file: Path) -> list[dict[str, Any]]:
    """Any table in a file."""
    with file.open(newline="", encoding="utf-8") as f:
        return [{key: _number(value) for key, value in record.items()} for record in csv.DictReader(f)]


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if math.isfinite(value) and value == int(value) and "." not in text else value


def per_subject(rows: Sequence[Row], by: Sequence[str]) -> list[Row]:
    """One row for each subject and each group of `by`: the mean over its slices."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        whose = row.labels.get("subject") or row.labels["case"]
        groups.setdefault((*(row.labels[key] for key in by), whose), []).append(row)
    return [
        Row(
            labels={**dict(zip(by, key, strict=False)), "subject": key[-1]},
            metrics={m: statistics.fmean(row.metrics[m] for row in own) for m in own[0].metrics},
            seconds=statistics.fmean(row.seconds for row in own),
        )
        for key, own in groups.items()
    ]


def summary(rows: Sequence[Row], by: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """`evaluation.summarise` over subjects: n counts these; one alone has no standard deviation."""
    found = evaluation.summarise(per_subject(rows, by), by, metrics)
    return [{k: None if k.endswith("_sd") and r["n"] < 2 else v for k, v in r.items()} for r in found]


def differences(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], by: Sequence[str], metric: str = "psnr"
) -> list[dict[str, Any]]:
    """Paired differences a - b within each group, subject by subject, with 95 % intervals."""
    found = []
    for key in dict.fromkeys(tuple(row.labels[k] for k in by) for row in rows):
        own = [row for row in rows if tuple(row.labels[k] for k in by) == key]
        names = {row.labels["model"] for row in own}
        for a, b in pairs:
            if a in names and b in names:
                d = evaluation.paired(own, a, b, metric)
                alone = d["n"] < 2  # one subject says nothing about another
                found.append(
                    {
                        **dict(zip(by, key, strict=True)), "difference": f"{a} − {b}", "n": d["n"], evaluation.heading(metric): d["mean"],
                        "95 % from": None if alone else d["low"], "to": None if alone else d["high"],
                        "better": d["wins"], "p": None if alone else d["p"],
                    }
                )  # fmt: skip
    return found


GOAL = re.compile(r"^(met|MISSED)\s+(.+): (\S+) \(bar: (.+)\)$", re.M)


def goals(printed: str) -> list[Section]:
    """What the command itself held against its bars, missed ones as they are."""
    found = [
        {"goal": name, "found": _number(value), "bar": bar, "": word.lower()}
        for word, name, value, bar in GOAL.findall(printed)
    ]
    return [Numbers(title="Goals", records=found)] if found else []


def pictures(folder: Path, captions: Mapping[str, str]) -> list[Section]:
    """The pictures that fit the patterns, in this order."""
    return [
        report.Picture(title=_words(file.stem), png=file.read_bytes(), caption=caption)
        for pattern, caption in captions.items()
        for file in sorted(folder.glob(pattern))
    ]


def _words(stem: str) -> str:
    text = stem.replace("-", " ")
    return text[:1].upper() + text[1:]


def plainly(
    tables: Mapping[str, str], figures: Mapping[str, str] | None = None, *, printed: bool = False
) -> Callable[[Path, str], list[Section]]:
    """Shows tables (file → title), pictures (pattern → caption), goals, and perhaps the rest of what was printed."""

    def show(folder: Path, said: str) -> list[Section]:
        found: list[Section] = [Numbers(title=title, records=records_of(folder / f)) for f, title in tables.items()]
        if printed and (rest := GOAL.sub("", said).strip()):
            found.append(Printed(title="Printed", text=re.sub(r"\n{2,}", "\n", rest)))
        return [*found, *goals(said), *pictures(folder, figures or {})]

    return show


# ---------------------------------------------------------------- what the parts show


def show_across(folder: Path, printed: str) -> list[Section]:
    """PSNR and SSIM, methods × masks; means over masks with differences from TV at its best; pictures."""
    rows = rows_of(folder / "rows.csv")
    names = list(dict.fromkeys(row.labels["model"] for row in rows))
    masks = list(dict.fromkeys(row.labels["mask"] for row in rows))
    found: list[Section] = []
    for metric, form in (("psnr", "{:.2f}"), ("ssim", "{:.3f}")):
        table: list[dict[str, Any]] = []
        for name in names:
            cells: dict[str, Any] = {"method": name}
            for mask in masks:
                own = [row for row in rows if (row.labels["model"], row.labels["mask"]) == (name, mask)]
                if not own:  # left out
                    cells[mask] = ""
                    continue
                at = {
                    setting: statistics.fmean(r.metrics[metric] for r in own if r.labels["setting"] == setting)
                    for setting in ("best", "chosen")
                }
                cells[mask] = form.format(at["best"]) + (f" / {form.format(at['chosen'])}" if own[0].dials else "")
            table.append(cells)
        title = f"{evaluation.heading(metric)}, best setting / self-chosen setting"
        found.append(Numbers(title=title, records=table, caption="Means over subjects."))
    # One name for a method and its setting, and no label by which two methods could differ on one case.
    plain = []
    for row in rows:
        place = {key: row.labels[key] for key in ("case", "mask", "subject")}
        plain.append(replace(row, labels={"model": f"{row.labels['model']}, {row.labels['setting']}", **place}))
    overall: list[dict[str, Any]] = []
    for line in summary(plain, ("model",), ("psnr", "ssim", "hfen")):
        name, _, setting = line["model"].rpartition(", ")
        own = [row for row in rows if (row.labels["model"], row.labels["setting"]) == (name, setting)]
        if not own[0].dials and setting != "suggested":
            continue  # nothing to turn: one row says it all
        waited = [float(row.labels["choose_seconds"]) for row in own if "choose_seconds" in row.labels]
        facts: dict[str, Any] = {
            "parameters": int(own[0].labels["parameters"]), "seconds": statistics.median(row.seconds for row in own),
            "seconds to choose": statistics.median(waited) if waited else None,
        }  # fmt: skip
        if "tv" in names and line["model"] != "tv, best":
            d = evaluation.paired(plain, line["model"], "tv, best")
            interval = f" ({d['low']:+.2f} to {d['high']:+.2f})" if d["n"] > 1 else ""
            facts["PSNR − TV at its best"] = f"{d['mean']:+.2f}{interval}"
        overall.append({"method": name, "setting": setting, **{k: v for k, v in line.items() if k != "model"}, **facts})
    caption = "n counts subjects; each is first averaged over all masks. Intervals: 95 %, Student's t over subjects."
    found.append(Numbers(title="Over all masks", records=overall, caption=caption))
    if left := re.findall(r"^  left out: (.+)$", printed, re.MULTILINE):
        once = {
            line.partition(" ")[0]: line for line in left
        }  # of each model; the numbers differ a little between masks
        found.append(Printed(title="Left out, as trained for another task", text="\n".join(once.values())))
    words = "One window for all, errors five times as strong, at the setting that each method chose itself."
    return [*found, *pictures(folder, {f"images-{source}-*.png": words for source in OPEN})]


def show_yardstick(folder: Path, printed: str) -> list[Section]:
    """PSNR and SSIM beside ISTA-Net+ image by image, and the goal."""
    rows = rows_of(folder / "yardstick.csv")
    table = []
    for line in evaluation.summarise(rows, ("ratio", "series", "model"), ("psnr", "ssim")):
        psnr, ssim = ISTA_NET_PLUS[line["ratio"]]
        theirs = f"{psnr:.2f} / {ssim:.4f}" if line["model"] == "ISTA-Net+" else ""
        table.append({k: v for k, v in line.items() if k != "n"} | {"n": line["n"], "published, all 50": theirs})
    judged: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    ours = [m for m in dict.fromkeys(row.labels["model"] for row in rows) if m not in ("zero-filled", "ISTA-Net+")]
    for ratio in dict.fromkeys(row.labels["ratio"] for row in rows):
        at: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.labels["ratio"] == ratio:
                at.setdefault(row.labels["model"], {})[row.labels["case"]] = row
        for name in ours:
            d = {case: row.metrics["psnr"] - at["ISTA-Net+"][case].metrics["psnr"] for case, row in at[name].items()}
            per_head = evaluation.paired([r for own in at.values() for r in own.values()], name, "ISTA-Net+")
            judged.append(
                {
                    "ratio": ratio, "model": name, "images": len(d), "difference [dB]": statistics.fmean(d.values()),
                    "worst": min(d.values()), "best": max(d.values()), "images better": sum(v > 0 for v in d.values()) / len(d),
                    "heads": per_head["n"],
                }
            )  # fmt: skip
    for name in ours:
        own = [line for line in judged if line["model"] == name]
        lowest = min(line["difference [dB]"] for line in own)
        verdicts.append(
            {
                "goal": f"{name} above ISTA-Net+ at every ratio", "found": f"{lowest:+.2f} dB where it is furthest behind",
                "bar": "0 at all five", "": "met" if len(own) == len(ISTA_NET_PLUS) and lowest > 0 else "missed",
            }
        )  # fmt: skip
    return [
        Numbers(
            title="PSNR (peak 255) and SSIM", records=table, caption="n counts slices; each series is of one head."
        ),
        Numbers(
            title="Differences from ISTA-Net+, image by image", records=judged,
            caption="Two heads only: slices of one head are not independent, so no interval is given.",
        ),
        Numbers(title="Goal", records=verdicts, caption="On the images above; the goal itself is on all 50, of which 15 are kept back."),
    ]  # fmt: skip


def show_meta(folder: Path, printed: str) -> list[Section]:
    """Tables 1 to 5: every ratio, our rows and theirs, and the paired differences."""
    rows = rows_of(folder / "rows.csv")
    found: list[Section] = []
    for title in dict.fromkeys(row.labels["table"] for row in rows):
        own = [row for row in rows if row.labels["table"] == title]
        number = int(title.removeprefix("Table ")[0]) if title.startswith("Table") else 0
        kappas: dict[tuple[str, str], list[float]] = {}
        for row in own:
            if "weight" in row.dials:
                kappas.setdefault((row.labels["ratio"], row.labels["model"]), []).append(row.dials["weight"])
        table = []
        for line in summary(own, ("ratio", "model"), ("psnr", "ssim", "nmse")):
            kappa = kappas.get((line["ratio"], line["model"]))
            theirs = _published_meta(number, round(100 * float(line["ratio"])), line["model"])
            facts = {"κ": statistics.fmean(kappa) if kappa else None, "published PSNR": theirs}
            table.append({**line, **facts})
        found.append(Numbers(title=title, records=table, caption="n counts subjects; slices are averaged within each."))
        pairs = (
            ("meta", "tv"), ("meta", "zero-filled"), ("adapted", "meta"), ("trained meta", "conventional"),
            ("trained meta", "κ = 1"), ("meta", "guard off"),
        )  # fmt: skip
        lines = differences(own, pairs, ("ratio",))
        for line in lines:
            theirs = META.get(number, {}).get(round(100 * float(line["ratio"])))
            same = theirs is not None and line["difference"] == "trained meta − conventional"
            line["published"] = theirs[2] - theirs[0] if theirs is not None and same else None
        found.append(Numbers(title=f"{title}: differences", records=lines))
    return found


def _published_meta(table: int, percent: int, model: str) -> str:
    line = META.get(table, {}).get(percent)
    if line is None or model not in ("meta", "trained meta", "conventional"):
        return ""
    conventional, meta = (f"{mean:.2f} ± {sd:.2f}" for mean, sd in (line[:2], line[2:4]))
    return conventional if model == "conventional" else f"{meta}, κ {line[4]:.3f} (conventional {conventional})"


def show_generative(file: str, tables: Mapping[str, int]) -> Callable[[Path, str], list[Section]]:
    """Table 1 or 2: masks × methods, PSNR, NMSE and SSIM; `tables` says which published one stands beside a source."""

    def show(folder: Path, printed: str) -> list[Section]:
        rows = rows_of(folder / file)
        found: list[Section] = []
        for source in dict.fromkeys(row.labels["source"] for row in rows):
            own = [row for row in rows if row.labels["source"] == source]
            theirs = GENERATIVE.get(tables.get(source, 0), {})
            table = []
            for line in summary(own, ("mask", "model"), ("psnr", "nmse", "ssim")):
                cell = theirs.get(line["mask"], {}).get(_ROLES.get(line["model"], ""), "")
                table.append({**line, **({"published PSNR / 100 NMSE / SSIM": cell} if theirs else {})})
            found.append(Numbers(title=f"Images of {source}", records=table))
            names = dict.fromkeys(row.labels["model"] for row in own)
            others = [name for name in names if name not in ("zero-filled", "TV, tuned", "MAP", "MMSE")]
            pairs = [("MAP", "TV, tuned"), ("MMSE", "MAP"), *((name, "TV, tuned") for name in others)]
            pairs += [("MAP", name) for name in others]
            lines = differences(own, pairs, ("mask",))
            found.append(Numbers(title=f"Images of {source}: differences", records=lines))
        return [*found, *goals(printed)]

    return show


_ROLES = {"zero-filled": "zero-filled", "TV, tuned": "TV", "MAP": "MAP", "MMSE": "MMSE", "cartesian-only": "network"}


def show_stability(folder: Path, printed: str) -> list[Section]:
    """One column for each method, as the benchmark prints it."""
    methods = records_of(folder / "stability.csv")
    names = [key for key in methods[0] if key != "method"]
    records = [{"": name, **{str(m["method"]): m[name] for m in methods}} for name in names]
    return [Numbers(title="Under changes that nothing was made for", records=records)]
