"""What weights say of themselves: those that ship with the package, and the header of a file, read without torch."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from . import errors, files

__all__ = ["FORMAT", "bundled", "card"]

FORMAT = 1  # of the header; a file with a larger number was written by a newer tunemri
_MAX_BYTES = 2**32


def bundled() -> dict[str, Path]:
    """Weights that ship with the package: name → file."""
    folder = Path(str(importlib.resources.files("tunemri") / "weights"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def card(path: str | Path) -> dict[str, Any]:
    """The header of a weights file: method, arguments, dials, recipe.

    Raises:
        UnreadableFile, UnsafeContent, WrongModel: not a tunemri weights file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    files.check(path)
    kind = files.sniff(path)
    if kind in ("pickle", "npz", "zip"):
        raise errors.UnsafeContent(
            f"looks like {kind}, expected safetensors", file=path,
            help="a pickled checkpoint runs code when opened; tunemri never does: convert it where you trust it",
        )  # fmt: skip
    if path.stat().st_size > _MAX_BYTES:
        raise errors.TooLarge(f"{path.stat().st_size} bytes, limit {_MAX_BYTES}", file=path)
    try:
        with safe_open(path, "np") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise errors.UnreadableFile(
            f"not a whole safetensors file ({error})", file=path, help="copy or download it again"
        ) from error
    try:
        header = json.loads(metadata["tunemri"])
        found = int(header["format"])
        _ = header["method"], header["arguments"]
    except (KeyError, ValueError, TypeError) as error:
        raise errors.WrongModel("safetensors, but without a tunemri header", file=path, key="tunemri") from error
    if found > FORMAT:
        raise errors.WrongModel(
            f"header format {found}, this version reads up to {FORMAT}", file=path, help="update tunemri"
        )
    return dict(header)
