"""The viewer's engine, without a word of HTTP or notebooks: what a picture's host asks, and what it is answered.

A message is a small dict; an answer is a JSON-ready head with named arrays. `Session.read` refuses what is not a
message, `Session.answer` computes, and a `Desk` keeps two threads busy: the front one serves what somebody waits for,
the newest request of a slot replacing the older; the back one fills in the range of the dials and gives way to it.
"""

from __future__ import annotations

import copy
import math
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import __version__, errors
from ..evaluation import Contestant
from ..fourier import crop, fft2, pad
from ..methods import prepare, reconstruct
from ..methods.base import Reconstructor
from ..metrics import METRICS, score
from ..operators import encoding
from ..scan import Reconstruction, Scan, select
from ..tuning import RangeBasis, choose, range_basis

__all__ = ["Answer", "Desk", "Request", "Session", "Source", "Stopped", "pack"]

Reply = Callable[["Answer"], None]

_SCORES = ("psnr", "ssim", "mae", "hfen")
_SLOTS = ("a", "b", "kspace", "reference", "range", "choose", "export", *(f"row{i}" for i in range(16)))
_BACK = ("range", "choose", "export")  # answered by the back thread
# Of `tuning.choose`: those that need no reference and give one setting.
_CRITERIA = ("heldout-kspace", "discrepancy", "sure")
_CACHE_BYTES = 2**29
_RANGE_DB = 60.0  # how far below the maximum a preview's error should lie
_MOST = {1: (33, 9), 2: (81, 25)}  # settings of a range by the number of dials, of quick methods and of slow ones
_SLOW = 1.0  # seconds a reconstruction
_IDLE = 20.0  # seconds without work after which the threads end
_MOST_SAMPLES = 16  # draws that go to the page
_MOST_STATS = 100_000  # characters of a method's numbers that go to the page


class Stopped(Exception):
    """The work was told to stop."""


class _Between(TorchFunctionMode):
    """Look up between any two torch calls: stop if told to, wait while the front is busy.

    This is what makes every method interruptible, those included that know nothing of it.
    """

    def __init__(self, stop: threading.Event, free: threading.Event | None = None) -> None:
        super().__init__()
        self.stop, self.free = stop, free

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        while self.free is not None and not self.free.wait(0.1) and not self.stop.is_set():
            pass
        if self.stop.is_set():
            raise Stopped
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a scan came from, for the command that repeats a picture.

    Arguments:
        path: the file.
        sha256: of its bytes.
        csm: how coil maps were estimated, or the file they are from.
    """

    path: str
    sha256: str
    csm: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One checked message: which slot asks, its running number, and what for.

    Arguments:
        coil: of the k-space to be shown; None: all of them.
        by: the criterion to choose by.
    """

    slot: str
    number: int
    model: int = 0
    slice: int = 0
    dials: Mapping[str, float | str] = field(default_factory=dict)
    coil: int | None = None
    by: str = _CRITERIA[0]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A JSON-ready head, and arrays by name."""

    head: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Session:
    """One scan, some methods, and the answers to what a viewer asks of them.

    Arguments:
        scan: what was measured; maps are estimated slice by slice where it has none.
        contestants: the methods, the first one shown first.
        reference: `(B, H, W)`, or None: unknown.
        title: what to call the scan.
        source: the file that the scan was read from; None: it only exists in memory.
        csm: how to estimate coil maps where the scan has none.
        hashes: of the models' files, name → SHA-256.

    Raises:
        BadOption: no method, or two of the same name.
    """

    def __init__(
        self,
        scan: Scan,
        contestants: Sequence[Contestant],
        *,
        reference: Tensor | None = None,
        title: str = "scan",
        source: Source | None = None,
        csm: str = "auto",
        hashes: Mapping[str, str | None] | None = None,
    ) -> None:
        names = [c.name for c in contestants]
        if not names or len(set(names)) < len(names):
            raise errors.BadOption(f"found {names}, expected at least one method, each once", key="model")
        if len(names) > 16:
            raise errors.BadOption(f"found {len(names)} methods, at most 16 fit", key="model")
        self.scan, self.contestants, self.reference = scan, list(contestants), reference
        self.title, self.source, self.csm, self.hashes = title, source, csm, dict(hashes or {})
        self.state: dict[str, Any] = {}
        self._slices: dict[int, Scan] = {}
        self._images: OrderedDict[tuple[Any, ...], tuple[Reconstruction, dict[str, float], float]] = OrderedDict()
        self._took: dict[tuple[Any, ...], float] = {}
        self._ranges: dict[tuple[Any, ...], RangeBasis] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------ what there is

    def about(self) -> Answer:
        """Everything that a client needs to draw itself."""
        voxel = self.scan.geometry.voxel_size
        h, w = self.scan.image_shape
        source, shown = self.source, self._ready(len(self.scan) // 2)  # what is shown first: its maps are needed anyway
        models = [
            {
                "name": c.name,
                "word": shlex.quote(c.name),
                "about": (c.model.__doc__ or "").strip().partition("\n")[0],
                "sha256": self.hashes.get(c.name),
                "dials": {n: d.as_dict() | {"start": c.dials.get(n, d.default)} for n, d in c.model.dials.items()},
                "terms": list(getattr(c.model, "names", ())),
                "outside": c.model.outside(shown),
            }
            for c in self.contestants
        ]
        return Answer(
            head={
                "type": "about", "version": __version__, "title": self.title, "models": models,
                "slices": len(self.scan), "shape": [h, w], "coils": self.scan.coils,
                "aspect": voxel[0] / voxel[1] if voxel else 1.0, "voxel": voxel, "letters": letters(self.scan),
                "acceleration": self.scan.acceleration, "provenance": self.scan.provenance,
                "reference": self.reference is not None, "criteria": self._criteria(),
                "metrics": {n: {"label": METRICS[n].label, "unit": METRICS[n].unit, "higher": METRICS[n].higher_is_better}
                            for n in _SCORES} if self.reference is not None else {},
                "source": None if source is None else {
                    "scan": source.path, "word": shlex.quote(source.path), "sha256": source.sha256, "csm": source.csm,
                    "options": "" if source.csm == "auto" else f" --csm {shlex.quote(source.csm)}",
                },
            }
        )  # fmt: skip

    def read(self, message: Any) -> Request:
        """A message from outside, checked against what there is.

        Raises:
            BadOption: anything that is not exactly a request.
        """
        known = {"slot", "number", "model", "slice", "dials", "coil", "by"}
        if not isinstance(message, dict) or not set(message) <= known:
            raise errors.BadOption("not a request", key="message")
        slot, number, coil = message.get("slot"), message.get("number"), message.get("coil")
        by = message.get("by", _CRITERIA[0])
        model, index, dials = message.get("model", 0), message.get("slice", 0), message.get("dials", {})
        if slot not in _SLOTS:
            raise errors.BadOption("no such slot", key="slot")
        if by not in _CRITERIA:
            raise errors.BadOption("no such criterion", key="by")
        for name, value, top in (
            ("number", number, 2**53),
            ("model", model, len(self.contestants)),
            ("slice", index, len(self.scan)),
            ("coil", 0 if coil is None else coil, self.scan.coils),
        ):
            if type(value) is not int or not 0 <= value < top:
                raise errors.BadOption(f"expected a whole number in [0, {top})", key=name)
        if not isinstance(dials, dict) or not all(type(v) in (int, float, str) for v in dials.values()):
            raise errors.BadOption("expected name → number or word", key="dials")
        c = self.contestants[model]
        checked = c.model.check_dials({**c.dials, **dials})
        return Request(
            slot=slot, number=int(number or 0), model=model, slice=index, dials=checked, coil=coil, by=by
        )  # fmt: skip

    def note(self, message: Any) -> None:
        """Where a client's dials are and what it keeps, checked like a request; `state` holds the last of it.

        Raises:
            BadOption: not such a message.
        """
        if not isinstance(message, dict) or not isinstance(kept := message.get("kept", []), list) or len(kept) > 500:
            raise errors.BadOption("not a state", key="message")

        def read(one: Any) -> dict[str, Any]:
            if not isinstance(one, dict) or not isinstance(note := one.get("note", ""), str):
                raise errors.BadOption("not a state", key="message")
            r = self.read({k: one[k] for k in ("model", "slice", "dials") if k in one} | {"slot": "a", "number": 0})
            return {"model": r.model, "slice": r.slice, "dials": dict(r.dials), "note": note[:500]}

        self.state = {**read({k: v for k, v in message.items() if k != "kept"}), "kept": [read(k) for k in kept]}

    def command(self, setting: Mapping[str, Any]) -> str:
        """The command line that makes one setting of the state again."""
        c, source = self.contestants[setting["model"]], self.source
        if source is None:
            return f"tunemri.reconstruct(scan, model, **{setting['dials']!r})"
        dials = "".join(f" {n}={v}" for n, v in setting["dials"].items())
        cut = f" --slice {setting['slice']}" if len(self.scan) > 1 else ""
        csm = "" if source.csm == "auto" else f" --csm {shlex.quote(source.csm)}"
        set_ = f" --set{dials}" if dials else ""
        return f"tunemri recon {shlex.quote(source.path)} -m {shlex.quote(c.name)}{set_}{cut}{csm} -o out.h5"

    # ------------------------------------------------------------ answers

    def answer(self, request: Request) -> Answer:
        """The answer to a request of the front; raises what the method raises."""
        common = {
            "slot": request.slot, "number": request.number, "model": request.model, "slice": request.slice,
            "dials": dict(request.dials),
        }  # fmt: skip
        if request.slot == "reference":
            return self._truth(request, common)
        if request.slot == "kspace":
            return self._kspace(request, common)
        out, scores, seconds = self.image(request)
        arrays = {"image": _pairs(out.image[0])}
        if out.variance is not None:
            arrays["std"] = out.variance[0].clamp(min=0).sqrt().float().cpu().numpy()
        if out.samples is not None:
            arrays["samples"] = out.samples[0, :_MOST_SAMPLES].abs().float().cpu().numpy()
        stats = _numbers(out.stats)
        facts = {
            "type": "image", "seconds": seconds, "status": out.status, "metrics": scores,
            "residual": None if out.residual is None else float(out.residual.mean()),
            "noise": self._expected(request.slice), "stats": stats,
        }  # fmt: skip
        return Answer(head=common | facts, arrays=arrays)

    def image(
        self, request: Request, copied: Reconstructor | None = None
    ) -> tuple[Reconstruction, dict[str, float], float]:
        """The reconstruction exactly as `tunemri recon --slice` makes it, its metrics, and the seconds it took.

        Arguments:
            copied: the method's copy for the back thread: weights are swapped in while a network runs.
        """
        key = (request.model, request.slice, *request.dials.items())
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
        torch.manual_seed(0)  # as the command line does
        start = time.perf_counter()
        model = copied or self.contestants[request.model].model
        out = reconstruct(self._cut(request.slice), model, **dict[str, Any](request.dials))
        self._took[self._choices(request)] = seconds = time.perf_counter() - start
        found = (out, self._scores(out.image, request.slice), seconds)
        with self._lock:
            self._images[key] = found
            while len(self._images) > 1 and len(self._images) * out.image.nbytes > _CACHE_BYTES:
                self._images.popitem(last=False)
        return found

    def ranges(self, request: Request, tell: Reply, stop: threading.Event, free: threading.Event) -> None:
        """The range of one method's numeric dials: coarse first, then finer; each with its scores. Runs in the back."""
        for fine in (False, True):
            basis = self.basis(request, fine=fine, tell=tell, stop=stop, free=free)
            with _Between(stop, free), torch.no_grad():
                head, arrays = range_facts(basis)
                common = {"slot": "range", "number": request.number, "model": request.model, "slice": request.slice}
                tell(Answer(head={"type": "range", **common, "final": fine, **head}, arrays=arrays))
                values = self.landscape(basis, request)
                scores = {"type": "scores", "axes": head["axes"], "fixed": head["fixed"], "values": values}
                tell(Answer(head=common | scores))

    def basis(
        self,
        request: Request,
        *,
        fine: bool = True,
        tell: Reply | None = None,
        stop: threading.Event | None = None,
        free: threading.Event | None = None,
    ) -> RangeBasis:
        """`tuning.range_basis` of one method on one slice at the request's choices; kept for later.

        Raises:
            BadOption: the method has no dial with a range.
        """
        model = self.contestants[request.model].model
        fixed = self._fixed(request)
        count = sum(1 for d in model.dials.values() if not d.choices)
        quick, slow = _MOST.get(count, (81, 27))
        most = (slow if self._took.get(self._choices(request), 0.0) > _SLOW else quick) if fine else 3**count
        fine = fine and 3**count < most  # the coarse grid of many dials is as fine as it gets
        key = (request.slice, fine, *self._choices(request))
        if key not in self._ranges:
            model = copy.deepcopy(model)  # weights are swapped in while a network runs: never share one
            start = time.perf_counter()

            def progress(done: int, _: int) -> None:
                if tell is not None:
                    each = (time.perf_counter() - start) / done
                    tell(Answer(head={"type": "progress", "slot": "range", "model": request.model,
                                      "slice": request.slice, "done": done, "each": each, "final": fine}))  # fmt: skip

            with _Between(stop or threading.Event(), free):
                self._ranges[key] = range_basis(
                    model, self._cut(request.slice), fixed=fixed, complex_valued=True, progress=progress,
                    grid=None if fine else 3, most=most, rank_db=_RANGE_DB,
                )  # fmt: skip
        return self._ranges[key]

    def chosen(self, request: Request, tell: Reply, stop: threading.Event, free: threading.Event) -> Answer:
        """What `tunemri choose --slice` chooses, and why; words stay as they are. Runs in the back.

        Raises:
            BadOption: nothing to choose, or a criterion that does not apply.
        """
        model, fixed = copy.deepcopy(self.contestants[request.model].model), self._fixed(request)
        common = {"slot": "choose", "number": request.number, "model": request.model, "slice": request.slice}
        start = time.perf_counter()

        def progress(done: int, _: int) -> None:
            each = (time.perf_counter() - start) / done
            tell(Answer(head={"type": "progress", **common, "done": done, "each": each, "final": True}))

        with _Between(stop, free), torch.no_grad():
            choice = choose(self._cut(request.slice), model, by=request.by, fixed=fixed, progress=progress)
        facts = {"type": "choice", "by": choice.by, "dials": dict(choice.dials), "reason": choice.reason}
        return Answer(head=common | facts)

    def landscape(self, basis: RangeBasis, request: Request) -> dict[str, list[float | None]]:
        """Residual and metrics at each setting of the basis's grid, name → values, the last dial fastest.

        Only there: between two settings a rebuilt image is their mean, whose noise is less than that of either.
        """
        one = self._ready(request.slice)
        assert one.scale is not None
        A, scale = encoding(one), float(one.scale[0]) / self._scale(request.slice)
        size = one.kspace.abs().square().sum().sqrt()
        found: dict[str, list[float | None]] = {}
        for setting in basis.settings.tolist():
            image = basis.rebuild(dict(zip(basis.names, setting, strict=True)))[None].to(one.kspace.dtype)
            misfit = float((A(image / scale) - one.kspace).abs().square().sum().sqrt() / size)
            for name, value in ({"residual": misfit} | self._scores(image, request.slice)).items():
                found.setdefault(name, []).append(value if math.isfinite(value) else None)
        return found

    # ------------------------------------------------------------ parts of answers

    def _fixed(self, request: Request) -> dict[str, float | str]:
        """The dials that are words: they have no range."""
        dials = self.contestants[request.model].model.dials
        return {n: v for n, v in request.dials.items() if dials[n].choices}

    def _choices(self, request: Request) -> tuple[Any, ...]:
        """What a range belongs to, and how long an image takes."""
        return (request.model, *self._fixed(request).items())

    def _criteria(self) -> list[str]:
        """By what a setting of this scan can be chosen without a reference."""
        off_grid = {"discrepancy", "sure"} if self.scan.mask is None else set()
        unknown = {"sure"} if not self.scan.noise_std else set()
        return [name for name in _CRITERIA if name not in off_grid | unknown]

    def _cut(self, index: int) -> Scan:
        """One slice, with coil maps: estimated once, as the command line does for that slice."""
        # Not under the lock: the back thread may have to wait for the front here, which would wait for the lock.
        if index not in self._slices:
            one = select(self.scan, slice(index, index + 1))
            if one.coils > 1 and one.csm is None:
                one = replace(one, csm=prepare(one, csm=self.csm).csm)
            self._slices.setdefault(index, one)
        return self._slices[index]

    def _ready(self, index: int) -> Scan:
        return prepare(self._cut(index))

    def _scores(self, image: Tensor, index: int) -> dict[str, float]:
        if self.reference is None:
            return {}
        truth = self.reference[index : index + 1]
        found: dict[str, float] = {}
        for name in _SCORES:
            try:
                found |= score(crop(image, truth.shape[-2:]), truth, [name])
            except (errors.UnsupportedLayout, errors.NoData):
                continue  # too small for it, or an empty slice
        return found

    def _expected(self, index: int) -> float | None:
        """The residual that noise alone would leave, ‖n‖ / ‖y‖; None where the noise is unknown."""
        one = self._cut(index)
        if one.noise_std is None:
            return None
        return one.noise_std * math.sqrt(int((one.kspace != 0).sum())) / float(one.kspace.abs().square().sum().sqrt())

    def _truth(self, request: Request, common: dict[str, Any]) -> Answer:
        if self.reference is None:
            raise errors.NoData("this scan comes without a reference", key="reference")
        truth = self.reference[request.slice]
        facts = {"type": "image", "seconds": 0.0, "status": "reference", "metrics": {}, "residual": None, "noise": None}
        return Answer(head=common | facts, arrays={"image": _pairs(pad(truth, self.scan.image_shape))})

    def _kspace(self, request: Request, common: dict[str, Any]) -> Answer:
        """|k-space| of the image, the residual where something was measured, and both as means over rings.

        Of all coils, as the root of the sum of squares, or of one.
        """
        out, _, _ = self.image(request)
        one = self._cut(request.slice)
        x = out.image.to(one.kspace.dtype)
        coils = slice(None) if request.coil is None else slice(request.coil, request.coil + 1)
        full = fft2(x[:, None] * one.csm[:, coils] if one.csm is not None else x[:, None])
        arrays = {"image": _rss(full)}
        facts: dict[str, Any] = {
            "type": "kspace",
            "residual": float(out.residual.mean()) if out.residual is not None else None,
            "noise": self._expected(request.slice),
            "coil": request.coil,
        }
        if one.trajectory is None and one.mask is not None:
            misfit = (full - one.kspace[:, coils]) * one.mask
            mask = one.mask.expand(1, 1, *one.image_shape)[0, 0].float()
            arrays |= {"misfit": _rss(misfit), "mask": mask.numpy()}
            rings = _rings(one.image_shape)
            count = _sums(mask, rings)
            mean = [_sums(m[0].abs().square().sum(0) * mask, rings) for m in (full, misfit)]
            safe = count.clamp(min=1) * full.shape[1]
            facts["rings"] = {
                "signal": [float(v) for v in (mean[0] / safe).sqrt()],
                "misfit": [float(v) for v in (mean[1] / safe).sqrt()],
                "samples": [int(v) for v in count],
                "noise": one.noise_std,
            }
        return Answer(head=common | facts, arrays=arrays)

    def _scale(self, index: int) -> float:
        scale = self._cut(index).scale
        assert scale is not None
        return float(scale[0])


def _numbers(stats: Mapping[str, Any]) -> dict[str, Any]:
    """What a method counted, of this one slice, as far as JSON and a page can hold it."""
    import json

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        if isinstance(value, float):
            return _finite(value)
        return value if value is None or isinstance(value, bool | int) else str(value)

    found = {str(k): plain(v) for k, v in stats.items()}
    # Methods count per slice; here there is one.
    found = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in found.items()}
    return {k: v for k, v in found.items() if len(json.dumps(v)) <= _MOST_STATS}


def range_facts(basis: RangeBasis, step: float = 0.0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A range basis as a client wants it: head and arrays, the images as integers with a step each.

    Arguments:
        step: how coarse a rebuilt value may become by each component, over the largest of the mean image; 0: 16 bits.
            Coarse integers pack well.
    """
    pictures = [basis.mean, *basis.components]
    reach = [1.0, *basis.coefficients.abs().amax(0).tolist()]  # how strongly each is ever used
    top = float(basis.mean.abs().max())
    steps, whole = [], []
    for picture, most in zip(pictures, reach, strict=True):
        values = torch.view_as_real(picture.to(torch.complex64)).double()
        steps.append(max(float(values.abs().max()) / 32767, step * top / max(most, 1e-30), 1e-300))
        whole.append((values / steps[-1]).round().to(torch.int16).numpy())
    positions = [[d.position(v) for v in axis] for d, axis in zip(basis.dials.values(), basis.axes, strict=True)]
    head = {
        "names": list(basis.names), "axes": positions, "steps": steps, "fixed": dict(basis.fixed),
        "worst_db": _finite(basis.worst_db), "median_db": _finite(basis.median_db), "settings": basis.reconstructions,
    }  # fmt: skip
    return head, {"pictures": np.stack(whole), "coefficients": basis.coefficients.float().contiguous().numpy()}


def letters(scan: Scan) -> list[str] | None:
    """Patient directions at the left, right, top and bottom edge of the array as shown; None where no header says."""
    affine = scan.geometry.affine
    if affine is None:
        return None
    m = np.asarray(affine, dtype=float)[:3, :3]
    named = []
    for column in (m[:, 1], m[:, 0]):  # along a row, then down the rows
        axis = int(np.abs(column).argmax())
        toward, away = ("RAS"[axis], "LPI"[axis]) if column[axis] > 0 else ("LPI"[axis], "RAS"[axis])
        named += [away, toward]
    return named


def pack(answer: Answer) -> bytes:
    """One binary message: length of the head, the head as JSON, then the arrays, each on a multiple of eight bytes."""
    import json

    blocks, described, at = [], [], 0
    for name, array in answer.arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        described.append({"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "at": at})
        blocks.append(data + b"\0" * (-len(data) % 8))
        at += len(blocks[-1])
    head = json.dumps({**answer.head, "arrays": described}, allow_nan=False).encode()
    head += b" " * (-(len(head) + 4) % 8)
    return b"".join([len(head).to_bytes(4, "little"), head, *blocks])


def _pairs(image: Tensor) -> np.ndarray:
    """Complex `(H, W)` as float32 `(H, W, 2)`."""
    return torch.view_as_real(image.detach().cpu().to(torch.complex64).resolve_conj()).contiguous().numpy()


def _rss(coils: Tensor) -> np.ndarray:
    return coils[0].abs().square().sum(0).sqrt().float().cpu().numpy()


def _rings(shape: tuple[int, int], count: int = 48) -> Tensor:
    """Which ring around zero frequency each point lies in: equal steps of the larger relative radius."""
    h, w = shape
    rows, cols = (torch.arange(n) - n // 2 for n in (h, w))
    radius = ((rows[:, None] / (h / 2)).square() + (cols / (w / 2)).square()).sqrt()
    return (radius * count).long().clamp(max=count - 1)


def _sums(values: Tensor, rings: Tensor) -> Tensor:
    return torch.zeros(int(rings.max()) + 1).index_add_(0, rings.flatten(), values.float().flatten())


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------- who works when


@dataclass
class _Job:
    request: Request
    tell: Reply
    stop: threading.Event = field(default_factory=threading.Event)
    began: float = 0.0


class Desk:
    """Two threads that answer requests; in front the newest of each owner's slots wins, behind them the range is made.

    The threads begin with the first request and end when there has been nothing to do for a while.

    Answers are told from these threads. An error becomes an answer of type "error"; nothing is ever left unanswered
    but a request that a newer one replaced.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._waiting: dict[bool, OrderedDict[tuple[object, str], _Job]] = {False: OrderedDict(), True: OrderedDict()}
        self._running: dict[bool, tuple[tuple[object, str], _Job] | None] = {False: None, True: None}
        self._changed = threading.Condition()
        self._free = threading.Event()
        self._free.set()
        self._closed = False
        self._threads: dict[bool, threading.Thread] = {}

    def ask(self, owner: object, request: Request, tell: Reply) -> None:
        """Queue a request; an older one of the same owner and slot is dropped, and stopped if it takes long.

        What nobody (None) asked for, such as a first image made in advance, is stopped by the first request for another.
        """
        back, key = request.slot in _BACK, (owner, request.slot)
        with self._changed:
            self._waiting[back][key] = _Job(request, tell)
            if back not in self._threads and not self._closed:
                name = f"tunemri-{'back' if back else 'front'}"
                self._threads[back] = threading.Thread(target=self._work, args=(back,), name=name, daemon=True)
                self._threads[back].start()
            if not back:
                self._free.clear()
            if (running := self._running[back]) is not None:
                (its_owner, _), job = running
                # A short one may finish: stopping each would starve the picture while a dial is being dragged.
                replaced = running[0] == key and (back or time.monotonic() - job.began > 0.5)
                if replaced or (its_owner is None and _picture(job.request) != _picture(request)):
                    job.stop.set()
            self._changed.notify_all()

    def stop(self, owner: object, slot: str | None = None) -> None:
        """Forget what an owner asked for, in one slot or in all."""
        dropped = []
        with self._changed:
            for back in (False, True):
                for key in [k for k in self._waiting[back] if k[0] is owner and slot in (None, k[1])]:
                    dropped.append(self._waiting[back].pop(key))
                running = self._running[back]
                if running is not None and running[0][0] is owner and slot in (None, running[0][1]):
                    running[1].stop.set()
            self._give_way()
        for job in dropped:
            job.tell(_said(job.request, "stopped", {}))

    def close(self) -> None:
        """Stop everything and end both threads."""
        with self._changed:
            self._closed = True
            for back in (False, True):
                self._waiting[back].clear()
                running = self._running[back]
                if running is not None:
                    running[1].stop.set()
            self._free.set()
            self._changed.notify_all()
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(10)

    def _give_way(self) -> None:
        if not self._waiting[False] and self._running[False] is None:
            self._free.set()

    def _work(self, back: bool) -> None:
        while True:
            with self._changed:
                self._running[back] = None
                self._give_way()
                if not self._changed.wait_for(lambda: self._closed or bool(self._waiting[back]), _IDLE) or self._closed:
                    del self._threads[back]  # the next request starts another
                    return
                key, job = self._waiting[back].popitem(last=False)
                self._running[back] = (key, job)
                job.began = time.monotonic()
            try:
                self._do(job, back)
            except Stopped:
                job.tell(_said(job.request, "stopped", {}))
            except Exception as error:  # whatever a method raises is shown in its pane; the viewer goes on
                job.tell(_said(job.request, "error", _described(error)))

    def _do(self, job: _Job, back: bool) -> None:
        if job.request.slot == "range":
            self.session.ranges(job.request, job.tell, job.stop, self._free)
        elif job.request.slot == "choose":
            job.tell(self.session.chosen(job.request, job.tell, job.stop, self._free))
        elif job.request.slot == "export":
            from .offline import page

            with _Between(job.stop, self._free):
                text, _ = page(self.session, job.request.model, job.request.slice, job.request.dials)
            body = np.frombuffer(text.encode(), dtype=np.uint8)
            job.tell(
                Answer(head={"type": "export", "slot": "export", "number": job.request.number}, arrays={"html": body})
            )
        else:
            with _Between(job.stop):
                answer = self.session.answer(job.request)
            job.tell(answer)


def _picture(request: Request) -> tuple[Any, ...]:
    return request.model, request.slice, dict(request.dials)


def _said(request: Request, kind: str, more: Mapping[str, Any]) -> Answer:
    return Answer(head={"type": kind, "slot": request.slot, "number": request.number, "model": request.model, **more})


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, errors.TunemriError):
        return {"word": error.word, "what": str(error), "help": error.help or ""}
    if isinstance(error, MemoryError):
        return {"word": "no_memory", "what": "not enough memory", "help": "a smaller matrix, or fewer methods at once"}
    return {
        "word": "internal",
        "what": f"{type(error).__name__}: {error}"[:300],
        "help": "this is a bug: please report it",
    }
