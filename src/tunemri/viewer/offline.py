"""One HTML file whose dials stay live without a server or a network: the page's own script, and a range basis as its data.

The answers that a server would give lie in the page, packed like on the wire and compressed. What the file promises
about itself, its worst rebuild error, is measured on what it really holds: rounded components, interpolated coefficients.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import math
import os
import shlex
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .. import errors, files
from ..tuning import RangeBasis
from .server import static
from .session import Answer, Request, Session, pack, range_facts

__all__ = ["export", "page"]

_MOST_BYTES = 3_000_000
_STEPS = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)  # of the largest value; tried until the file is small enough
_CHECKS = 7


def page(
    session: Session, model: int = 0, index: int | None = None, dials: Mapping[str, float | str] | None = None
) -> tuple[str, dict[str, Any]]:
    """The file's text, and what is true of it.

    Arguments:
        model: which of the session's methods.
        index: which slice; None: the middle one.
        dials: where they start; None: the method's own setting.

    Returns:
        the text, and: bytes, settings, components, worst_db, median_db (of the basis, at settings between its own), checked_db
        (worst of the file itself, against exact images at settings that the basis was not made from).

    Raises:
        BadOption: the method has no dial with a range. TooLarge: 3 MB do not hold it.
    """
    slice_index = len(session.scan) // 2 if index is None else index
    c = session.contestants[model]
    start = c.model.check_dials({**c.dials, **(dials or {})})
    request = Request(slot="export", number=0, model=0, slice=0, dials=start)
    basis = session.basis(replace(request, model=model, slice=slice_index))
    about = dict(session.about().head)
    about["cut"] = slice_index
    shown = about["models"][model]
    name = os.path.basename(c.name)
    shown |= {
        "name": name,
        "word": shlex.quote(name),
        "dials": {n: d | {"start": start[n]} for n, d in shown["dials"].items()},
    }
    about |= {"models": [shown], "slices": 1, "title": f"{session.title}" + (
        f", slice {slice_index}" if len(session.scan) > 1 else "")}  # fmt: skip
    if about["source"] is not None:
        # The file is made to be given away: where scan and weights lay on this machine is nobody's business.
        name = os.path.basename(about["source"]["scan"])
        cut = f" --slice {slice_index}" if len(session.scan) > 1 else ""
        about["source"] |= {"scan": name, "word": shlex.quote(name), "options": cut + about["source"]["options"]}
    values = session.landscape(basis, replace(request, model=model, slice=slice_index))
    scores = {"type": "scores", "model": 0, "slice": 0, "values": values}
    for step in _STEPS:
        head, arrays = range_facts(basis, step)
        checked = _checked(session, model, slice_index, basis, head["steps"], arrays)
        facts = {"type": "range", "slot": "range", "number": 0, "model": 0, "slice": 0, "final": True, **head}
        answers = [
            Answer(head=about | {"checked_db": checked}),
            Answer(head=facts | {"worst_db": _least(head["worst_db"], checked)}, arrays=arrays),
            Answer(head={**scores, "axes": head["axes"], "fixed": head["fixed"]}),
        ]
        text = _html(about["title"], shown["name"], answers)
        if len(text.encode()) <= _MOST_BYTES:
            return text, {
                "bytes": len(text.encode()), "settings": basis.reconstructions, "components": len(basis.components),
                "worst_db": basis.worst_db, "median_db": basis.median_db, "checked_db": checked,
            }  # fmt: skip
    raise errors.TooLarge(
        f"{len(text.encode())} bytes, limit {_MOST_BYTES}",
        key="export",
        help="a smaller matrix, or a method with fewer dials",
    )


def export(
    path: str | os.PathLike[str], session: Session, *, index: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the file for the session's first method, and return what is true of it, see `page`.

    Raises:
        BadOption: the file exists and `overwrite` is false, or the method has no dial with a range. TooLarge: too big.
    """
    files.check_target(path, overwrite=overwrite)
    text, facts = page(session, 0, index)
    with files.write_atomically(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return facts


def _html(title: str, model: str, answers: list[Answer]) -> str:
    style, script = static("viewer.css"), static("viewer.js")
    data = "\n".join(
        f'<script type="application/octet-stream" data-answer>{base64.b64encode(zlib.compress(pack(a), 9)).decode()}</script>'
        for a in answers
    )
    words = html.escape(f"{title}: {model}")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{words}</title>
<style>{style}</style>
</head>
<body class="tunemri-page">
<main id="tunemri" data-host="file"><noscript>The dials need JavaScript; everything that they show lies in this file.</noscript></main>
{data}
<script type="module">{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _checked(
    session: Session, model: int, index: int, basis: RangeBasis, steps: list[float], arrays: dict[str, np.ndarray]
) -> float | None:
    """Worst PSNR of what the file rebuilds against exact images, at settings between those of the grid."""
    pictures = torch.view_as_complex(torch.from_numpy(arrays["pictures"]).float().contiguous())
    pictures = pictures * torch.tensor(steps)[:, None, None]
    worst, copied = math.inf, copy.deepcopy(session.contestants[model].model)
    for k in range(_CHECKS):
        # Golden-section positions, shifted by each dial: no setting of a regular grid, and the same every time.
        setting = {
            name: dial.at(math.modf((k + 0.5) * 0.6180339887 + 0.37 * d)[0])
            for d, (name, dial) in enumerate(basis.dials.items())
        }
        request = Request(slot="a", number=0, model=model, slice=index, dials={**basis.fixed, **setting})
        exact = session.image(request, copied)[0].image[0].to(torch.complex64)
        c = basis.coefficients_at(torch.tensor([list(setting.values())], dtype=torch.float64))[0].float()
        rebuilt = pictures[0] + torch.tensordot(c.to(torch.complex64), pictures[1:], 1)
        mse = float((rebuilt - exact).abs().double().square().mean())
        peak = float(exact.abs().max())
        if mse > 0 and peak > 0:
            worst = min(worst, 10 * math.log10(peak**2 / mse))
    return worst if math.isfinite(worst) else None


def _least(*values: float | None) -> float | None:
    known = [v for v in values if v is not None]
    return min(known) if known else None
