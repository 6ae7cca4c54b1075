"""What the words on a command line stand for: models with their settings, grids, slices, records of earlier commands.

Each turns one text into what the package takes, or says what was found and what was expected.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console, errors, files

if TYPE_CHECKING:
    from .evaluation import Contestant
    from .methods import Reconstructor

__all__ = [
    "as_number",
    "as_pair",
    "as_slice",
    "as_whole",
    "axes_of",
    "beside",
    "check_device",
    "check_output",
    "contestant",
    "files_of",
    "metric_names",
    "model_hash",
    "read_sidecar",
    "resolved",
    "stem",
]


def resolved(path: Path | None) -> Path | None:
    """The file that a name stands for: BART's pairs go by a name without suffix, too."""
    if path is None or (path.suffix != ".hdr" and os.path.exists(path)):
        return path
    from . import formats

    return formats.resolve(path)


def contestant(text: str, earlier: dict[str, Any], settings: list[str], extrapolate: bool) -> Contestant:
    """MODEL[:dial=value,…] with the settings of a sidecar and of --set on top, all checked."""
    from .evaluation import Contestant
    from .methods import load

    name, tail = _parted(text)
    model = load(name)
    dials = model.as_dials(dict(as_pair(part, "model") for part in tail.split(",")) if tail else {})
    # A sidecar's dials are what was used in the end, after whatever its model's text says.
    dials = {**dials, **earlier, **model.as_dials(dict(as_pair(part, "set") for part in settings))}
    checked = model.check_dials(dials, extrapolate=extrapolate)
    return Contestant(name=text, model=model, dials={key: checked[key] for key in dials}, source=name)


def model_hash(text: str) -> str | None:
    """SHA-256 of the weights behind MODEL; None for a method without."""
    from .cards import bundled

    name, _ = _parted(text)
    path = bundled().get(name, Path(name))
    return files.sha256(path) if path.is_file() else None


def _parted(text: str) -> tuple[str, str]:
    """MODEL and what follows its colon. A colon may also belong to a path: only `:key=value` at the end is a setting."""
    name, colon, tail = text.rpartition(":")
    return (name, tail) if colon and "=" in tail and not Path(text).exists() else (text, "")


def as_pair(text: str, key: str) -> tuple[str, str]:
    """`NAME=VALUE`."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise errors.BadOption(f"found {text!r}, expected NAME=VALUE", key=key)
    return name.strip(), value.strip()


def as_number(text: str, key: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise errors.BadOption(f"found {text!r}, expected a number", key=key) from None


def as_whole(text: str, key: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise errors.BadOption(f"found {text!r}, expected a whole number", key=key) from None


def axes_of(texts: list[str], model: Reconstructor) -> dict[str, Any]:
    """`DIAL=START:STOP:N`, `DIAL=N` or `DIAL=V1,V2` → dial → values."""
    from .evaluation import grid

    axes: dict[str, Any] = {}
    for text in texts:
        name, value = as_pair(text, "grid")
        if name not in model.dials:
            raise errors.BadOption("no such dial", key=name, help=errors.did_you_mean(name, model.dials))
        dial, parts = model.dials[name], value.split(":")
        if len(parts) == 3:
            axes[name] = grid(dial, as_whole(parts[2], name), as_number(parts[0], name), as_number(parts[1], name))
        elif len(parts) == 1 and "," in value or dial.choices:
            axes[name] = [v if dial.choices else as_number(v, name) for v in value.split(",")]
        elif len(parts) == 1:
            axes[name] = grid(dial, as_whole(value, name))
        else:
            raise errors.BadOption(f"found {text!r}, expected DIAL=START:STOP:N", key="grid")
    return axes


def metric_names(text: str, *more: str) -> tuple[str, ...]:
    """`psnr,ssim` and more, all of them known, none twice."""
    from .metrics import known

    names = tuple(dict.fromkeys([*(part.strip() for part in text.split(",") if part.strip()), *more]))
    for name in names:
        known(name)
    return names


def as_slice(text: str | None) -> slice | None:
    """`K` or `START:STOP`; None: all."""
    if text is None:
        return None
    start, colon, stop = str(text).partition(":")
    first = as_whole(start, "slice") if start else 0
    last = (as_whole(stop, "slice") if stop else None) if colon else first + 1
    if first < 0 or (last is not None and last <= first):
        raise errors.BadOption(f"found {text!r}, expected K or START:STOP with 0 ≤ START < STOP", key="slice")
    return slice(first, last)


def check_device(name: str) -> None:
    """Refuse a device that is not here."""
    import torch

    if name not in ("cpu", "cuda"):
        raise errors.BadOption(f"found {name!r}", key="device", help="cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise errors.BadOption("no CUDA device here", key="device", help="--device cpu", exit_code=3)


def files_of(source: Path) -> list[Path]:
    """The files behind a name: BART's pairs go by either half, or by neither suffix."""
    pair = [source.with_suffix(suffix) for suffix in (".cfl", ".hdr")] if source.suffix in (".cfl", ".hdr") else []
    return [source, *pair, *(source.parent / (source.name + suffix) for suffix in (".cfl", ".hdr"))]


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that could not be written, before any work."""
    if any(files.same_file(output, path) for path in files_of(source)):
        raise errors.BadOption("output and input are the same file", file=output, help="name another output")
    for path in (output, console.sidecar_path(output)):
        files.check_target(path, overwrite=overwrite)


def read_sidecar(path: Path) -> dict[str, Any]:
    """The facts beside an output, or those of one pick: `picks.json#2` is the second, `picks.json` the first."""
    name, mark, number = path.name.rpartition("#")
    numbered = mark and not path.exists()
    path = path.with_name(name) if numbered else path
    files.check(path)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if numbered:
            facts = {**facts, **facts["picks"][_pick(number, len(facts["picks"]), path)]}
        if not isinstance(facts, dict) or not isinstance(facts["model"], str) or not isinstance(facts["dials"], dict):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise errors.UnreadableFile(
            "not a sidecar of `tunemri recon`, nor picks of `tunemri choose`", file=path,
            help="use the OUT.json beside an output",
        ) from None  # fmt: skip
    return facts


def beside(path: Path, record: Path) -> Path:
    """A file that a record names: as it stands, or else where the record lies, for whoever comes from another folder."""
    tries = [path, record.parent / path, record.parent / path.name]
    return next((p for p in (resolved(t) or t for t in tries) if p.exists()), path)


def _pick(text: str, count: int, path: Path) -> int:
    number = as_whole(text, "from")
    if not 1 <= number <= count:
        raise errors.BadOption(f"found #{number}, expected 1 to {count}", file=path, key="from")
    return number - 1


def stem(path: Path) -> str:
    """A file name without what says its format."""
    name = path.name
    for suffix in (".nii.gz", ".mrd.h5"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return path.stem
