"""The parts of the pages that are written by the package itself: `<!-- generated: NAME -->` stands where they go.

Everything here reads declarations (dials, options, errors, headers of weights), so a page cannot say anything else.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

__all__ = ["GENERATED", "MARK", "fill", "modules"]

MARK = re.compile(r"^<!-- generated: ([\w-]+)(?: ([\w.-]+))? -->$", re.M)
ROOT = Path(__file__).resolve().parents[2]


def fill(markdown: str) -> str:
    """The page with every mark replaced by what the package declares.

    Raises:
        KeyError: a mark that nothing stands behind.
    """
    return MARK.sub(lambda m: GENERATED[m[1]](*filter(None, [m[2]])), markdown)


# ---------------------------------------------------------------- methods, models and their dials


def methods() -> str:
    """Every method, what it is, and whether it is trained."""
    rows = [
        [f"`{name}`", _text(m["about"]), "trained weights" if m["needs_weights"] else "nothing"]
        for name, m in _said("methods").items()
    ]
    return _table(["method", "in one sentence", "needs"], rows)


def models() -> str:
    """Every model that ships, with its summary."""
    rows = [
        [f"[`{name}`](/models/{name}.md)", f"`{m['method']}`", _text(m["recipe"].get("summary", ""))]
        for name, m in _said("models").items()
    ]
    return _table(["model", "method", "trained on"], rows)


def dials() -> str:
    """Every dial of everything that can be loaded by name."""
    kinds = {n: m for n, m in _said("methods").items() if not m["needs_weights"]} | _said("models")
    rows = [row for name, kind in kinds.items() for row in _dial_rows(name, kind["dials"])]
    return _table(["`-m`", "dial", "range", "default", "what it does", "from … to"], rows)


def _dial_rows(name: str, dials: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    if not dials:
        return [[f"`{name}`", "–", "", "", "nothing to set", ""]]
    rows = []
    for dial, d in dials.items():
        span = (
            " \\| ".join(f"`{c}`" for c in d["choices"])
            if "choices" in d
            else f"{d['lo']:g} … {d['hi']:g}{' ' + d['unit'] if d['unit'] else ''}{', log' * (d['scale'] == 'log')}"
        )
        default = f"{d['default']:g}" if isinstance(d["default"], float | int) else f"`{d['default']}`"
        ends = f"{_text(d['low'])} ↔ {_text(d['high'])}" if d["low"] or d["high"] else ""
        rows.append([f"`{name}`", f"`{dial}`", span, default, _text(d["sentence"]), ends])
    return rows


def card(name: str) -> str:
    """What the header of a model that ships says of it."""
    header = _said("models")[name]
    recipe, path = header["recipe"], ROOT / f"src/tunemri/weights/{name}.safetensors"
    trained, data = header["arguments"].get("trained", {}), recipe.get("data", {})
    facts = {
        "Method": f"`{header['method']}`",
        "Summary": _text(recipe.get("summary", "")),
        "File": f"{path.stat().st_size / 1e6:.2f} MB, SHA-256 `{_sha256(path)[:16]}…`, {_parameters(path):,} numbers",
        "Trained for": _spans(trained),
        "Images": _spans(recipe.get("images", {})),
        "Masks": ", ".join(f"`{m}`" for m in dict.fromkeys(data.get("masks", []))),
        "Training": _text(recipe.get("history", "")) or _spans(recipe.get("training", {})),
        "Start": _text(recipe.get("start") or ""),
        "Commit": _text(recipe.get("commit") or ""),
        "torch": _text(recipe.get("torch") or ""),
    }
    parts = [
        _table(["", "from the header"], [[key, value] for key, value in facts.items() if value]),
        "## Dials",
        _table(["", "dial", "range", "default", "what it does", "from … to"], _dial_rows(name, header["dials"])),
    ]
    if scores := recipe.get("scores"):
        parts += ["## Scores", _scores(scores)]
    return "\n\n".join(parts)


def _spans(facts: Mapping[str, Any]) -> str:
    """`{acceleration: [2, 8], coils: 8}` → "acceleration 2 to 8, coils 8"."""

    def one(value: Any) -> str:
        numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(v, float | int) for v in value)
        return f"{value[0]:g} to {value[1]:g}" if numbers else _text(json.dumps(value).strip('"'))

    return ", ".join(f"{_text(str(key))} {one(value)}" for key, value in facts.items())


def _scores(scores: Mapping[str, Any]) -> str:
    """The scores of a header: its command as code, words as sentences, what is nested as a table."""
    plain = {k: v for k, v in scores.items() if k != "command" and not isinstance(v, Mapping)}
    nested = {k: v for k, v in scores.items() if isinstance(v, Mapping)}
    parts = [f"```console\n$ {scores['command']}\n```"] if "command" in scores else []
    parts += [f"{_text(k).capitalize()}: {_score(v)}." for k, v in plain.items()]
    if nested:
        columns = list(dict.fromkeys(column for row in nested.values() for column in row))
        rows = [[_text(name), *(_score(row.get(c, "")) for c in columns)] for name, row in nested.items()]
        parts.append(_table(["", *map(_text, columns)], rows))
    return "\n\n".join(parts)


def _score(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(k)} {_score(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " / ".join(map(_score, value))
    return f"{value:g}" if isinstance(value, float) else _text(str(value))


# ---------------------------------------------------------------- what else there is by name


def masks() -> str:
    """Every mask family with its own options."""
    rows = [
        [f"`{n}`", _text(m["about"]), ", ".join(f"`{o}`" for o in m["options"]) or "–"]
        for n, m in _said("masks").items()
    ]
    return _table(["`--mask`", "pattern", "options"], rows)


def trajectories() -> str:
    """Every path off the grid."""
    from tunemri import TRAJECTORIES

    return _table(["name", "path"], [[f"`{n}`", _first(f)] for n, f in TRAJECTORIES.items()])


def maps() -> str:
    """Every way to estimate coil maps."""
    from tunemri.coils import MAPS

    return _table(["`--csm`", "maps"], [[f"`{n}`", _first(f)] for n, f in MAPS.items()])


def metrics() -> str:
    """Every metric, and which way is better."""
    from tunemri import METRICS

    rows = [[f"`{n}`", m.label, m.unit or "–", "higher" if m.higher_is_better else "lower"] for n, m in METRICS.items()]
    return _table(["name", "metric", "unit", "better"], rows)


def terms() -> str:
    """Every loss term; each can be a dial of HyperRecon."""
    from tunemri import TERMS

    return _table(["term", "what it measures"], [[f"`{n}`", _text(t.sentence)] for n, t in TERMS.items()])


def criteria() -> str:
    """Every way in which `choose` judges a setting, from its docstring."""
    from tunemri.tuning import choose

    block = re.search(r"\n\n((?: {8}.+\n)+)", choose.__doc__ or "")
    assert block is not None, "choose no longer lists its criteria"
    found = re.sub(r"\n {20,}", " ", block[1])
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in found.splitlines()]
    return _table(["`--by`", "the setting that is taken"], [[f"`{name}`", _text(text)] for name, text in rows])


def formats() -> str:
    """Every kind of file, what reads and what writes it."""
    from tunemri import READERS, WRITERS

    kinds: dict[Any, list[str]] = {}
    for kind, module in READERS.items():
        kinds.setdefault(module, []).append(f"`{kind}`")
    rows = []
    for module, names in kinds.items():
        suffixes = [f"`{suffix}`" for suffix, writer in WRITERS.items() if inspect.getmodule(writer) is module]
        rows.append([", ".join(names), ", ".join(suffixes) or "–", _first(module)])
    return _table(["read", "written as", "what it is"], rows)


# ---------------------------------------------------------------- command line


def commands() -> str:
    """Every command with its arguments and options, as `tunemri COMMAND --help` gives them."""
    from tunemri.cli import app

    group = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())  # type: ignore[attr-defined]


def _command(name: str, command: Any) -> str:
    usage, rows = [f"tunemri {name}"], []
    for p in command.params:
        if p.name == "help":
            continue
        argument, flag = p.param_type_name == "argument", getattr(p, "is_flag", False)
        metavar = "" if flag else p.metavar or p.name.upper()
        if argument:
            usage.append(metavar if p.required or metavar.startswith("[") else f"[{metavar}]")
        elif p.required:
            usage.append(f"{p.opts[0]} {metavar}")
        about = _text(p.help or "")
        if not p.required and not flag and isinstance(p.default, str | int | float | Path):
            about += f"; default `{p.default}`"
        names = metavar.strip("[]") if argument else f"{', '.join(p.opts)} {metavar}".strip()
        rows.append([f"`{names}`", about])
    what = _text(inspect.cleandoc(command.help or ""))
    return f"## {name}\n\n{what}\n\n```text\n{' '.join(usage)} [options]\n```\n\n{_table(['', ''], rows)}"


def errors() -> str:
    """Every class of error: its word on the command line, its exit status, and what it means."""
    from tunemri import errors

    rows = []
    for name, what in re.findall(r"[├└]── (\w+) +(.+)", errors.__doc__ or ""):
        kind = getattr(errors, name)
        rows.append([f"`{kind.word}`", f"`{name}`", str(kind.exit_code), _text(what)])
    return _table(["on the command line", "in Python", "exit", "meaning"], rows)


# ---------------------------------------------------------------- Python


def python() -> str:
    """The public names: functions and classes by mkdocstrings, lists as links to their tables."""
    import tunemri

    source = inspect.getsource(tunemri)
    contents = source[source.index("_CONTENTS = {") : source.index("}\n", source.index("_CONTENTS = {"))]
    parts = []
    for line in contents.splitlines():
        if heading := re.match(r"\s+# (.+)", line):
            parts.append(f"## {heading[1][0].upper()}{heading[1][1:]}")
        elif entry := re.match(r'\s+"(\w+)": "([\w.]+)"', line):
            name, module = entry[1], entry[2]
            value = getattr(tunemri, name)
            if name.isupper():
                known = ", ".join(f"`{key}`" for key in value)
                parts.append(f"### {name}\n\n`tunemri.{module}.{name}`, by name: {known}.")
            else:
                parts.append(
                    f"::: {value.__module__}.{name}\n    options:\n      heading_level: 3\n      skip_local_inventory: true"
                )
    return "\n\n".join(parts)


def modules() -> dict[str, str]:
    """Every module of the package that a user may want to read about: name → one line."""
    import tunemri

    names = [m.name for m in pkgutil.iter_modules(tunemri.__path__) if m.name not in ("__main__", "cli", "console")]
    return {name: _line(importlib.import_module(f"tunemri.{name}")) for name in names}


def module_list() -> str:
    """Links to the pages of all modules."""
    return _table(
        ["module", "what it is for"], [[f"[`{n}`](/reference/modules/{n}.md)", _text(t)] for n, t in modules().items()]
    )


# ---------------------------------------------------------------- what they share


@cache
def _said(command: str) -> dict[str, Any]:
    """What `tunemri COMMAND --json` lists."""
    from tunemri.cli import app

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        app([command, "--json"], standalone_mode=False)
    listed = json.loads(said.getvalue())[command]
    assert isinstance(listed, dict)
    return listed


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(text: str) -> str:
    """A sentence as Markdown: `code` stays code, nothing else is markup, and a table cell stays one cell."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if i % 2 else re.sub(r"([\\*_<>|\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def _line(thing: Any) -> str:
    return " ".join(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].split()).rstrip(":")


def _first(thing: Any) -> str:
    return _text(_line(thing))


def _sha256(path: Path) -> str:
    from tunemri.files import sha256

    return sha256(path)


def _parameters(path: Path) -> int:
    import math

    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118 (not a mapping)


GENERATED: dict[str, Callable[..., str]] = {
    "methods": methods, "models": models, "dials": dials, "card": card, "masks": masks, "trajectories": trajectories,
    "maps": maps, "metrics": metrics, "terms": terms, "criteria": criteria, "formats": formats, "commands": commands,
    "errors": errors, "python": python, "modules": module_list,
}  # fmt: skip
"""What may stand behind a mark."""
