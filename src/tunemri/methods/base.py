"""What every method shares: the Dial, the Reconstructor contract, and the way from a Scan to a Reconstruction."""

from __future__ import annotations

import abc
import bisect
import inspect
import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import coils, errors
from ..nufft import calibration_block
from ..operators import Cartesian, LinearOperator, encoding
from ..scan import Reconstruction, Scan, joined, normalise, select

__all__ = ["Dial", "Reconstructor", "data_residual", "half_square", "made", "prepare", "reconstruct"]


_CENTRE = 0.5  # with less of the central 5×5 of k-space, networks fall behind least squares


@dataclass(frozen=True, kw_only=True)
class Dial:
    """One setting that stays free after training; declared once, read by everything that shows or varies it.

    Arguments:
        sentence: what it does, for a user.
        default: its value where nothing else is asked for.
        lo, hi: the range that the method answers for (of a trained model: the trained range).
        scale: "linear", or "log" for a weight whose orders of magnitude matter.
        low, high: the words at both ends of the slider.
        unit: of the number; "" for a plain ratio.
        choices: the allowed words, for a dial that is not a number; lo, hi and scale then mean nothing.
        curve: values at even steps of the slider, from lo to hi, where these were measured (`tuning.equal_steps`); in
            between, and without any, the slider follows the scale.
    """

    sentence: str
    default: float | str
    lo: float = 0.0
    hi: float = 1.0
    scale: str = "linear"
    low: str = ""
    high: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    curve: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.choices:
            if self.default not in self.choices:
                raise errors.BadOption(f"default {self.default!r} is not one of {self.choices}", key="dial")
        elif self.scale not in ("linear", "log") or not self.lo <= float(self.default) <= self.hi:
            raise errors.BadOption(f"found {self}, expected lo ≤ default ≤ hi and scale linear or log", key="dial")
        elif self.scale == "log" and self.lo <= 0:
            raise errors.BadOption(f"a logarithmic range from {self.lo}, expected lo > 0", key="dial")
        if self.curve:
            rises = all(a < b for a, b in itertools.pairwise(self.curve))
            if (
                self.choices
                or len(self.curve) < 2
                or not rises
                or (self.curve[0], self.curve[-1]) != (self.lo, self.hi)
            ):
                raise errors.BadOption(
                    f"found a curve of {len(self.curve)} values, expected rising numbers from lo to hi", key="dial"
                )

    def check(self, name: str, value: Any, *, extrapolate: bool = False) -> float | str:
        """`value` (a number, or its text) as the dial's own type.

        Raises:
            BadOption: not a number, not finite, not among the choices, or outside [lo, hi] without `extrapolate`.
        """
        if self.choices:
            if value not in self.choices:
                raise errors.BadOption(f"found {value!r}", key=name, help=errors.did_you_mean(str(value), self.choices))
            return str(value)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise errors.BadOption(
                f"found {value!r}, expected a number in [{self.lo:g}, {self.hi:g}]", key=name
            ) from None
        if not math.isfinite(number):
            raise errors.BadOption(f"found {number}, expected a number in [{self.lo:g}, {self.hi:g}]", key=name)
        if not self.lo <= number <= self.hi:
            if not extrapolate or (self.scale == "log" and number <= 0):
                raise errors.BadOption(
                    f"found {number:g}, outside [{self.lo:g}, {self.hi:g}]", key=name,
                    help="stay inside, or say --extrapolate (extrapolate=True) to leave what was trained or tested",
                )  # fmt: skip
            errors.warn(f"{name}={number:g} lies outside [{self.lo:g}, {self.hi:g}]: extrapolating", "bad_option")
        return number

    def at(self, position: float) -> float:
        """The value at slider position in [0, 1]; the ends are the dial's own numbers."""
        if not 0 < position < 1:
            return self.lo if position <= 0 else self.hi
        steps = len(self._knots) - 1
        i = min(int(position * steps), steps - 1)
        a, b = self._knots[i : i + 2]
        share = position * steps - i
        value = math.exp(math.log(a) + share * math.log(b / a)) if self.scale == "log" else a + share * (b - a)
        return min(max(value, self.lo), self.hi)  # rounding must not push it out of range

    def position(self, value: float) -> float:
        """Where on the slider a value lies: the inverse of `at`; outside [0, 1] for a value out of range."""
        if self.lo == self.hi:
            return 0.0
        i, a, b = self._piece(value)
        share = math.log(value / a) / math.log(b / a) if self.scale == "log" else (value - a) / (b - a)
        return (i + share) / (len(self._knots) - 1)

    def slope(self, value: float) -> float:
        """How fast the value moves there, for the full travel of the slider: the derivative of `at`."""
        _, a, b = self._piece(value)
        return (len(self._knots) - 1) * (value * math.log(b / a) if self.scale == "log" else b - a)

    @property
    def _knots(self) -> tuple[float, ...]:
        return self.curve or (self.lo, self.hi)

    def _piece(self, value: float) -> tuple[int, float, float]:
        """(i, value at its start, value at its end) of the piece of the slider in which a value lies."""
        knots = self._knots
        i = min(max(bisect.bisect_right(knots, value) - 1, 0), len(knots) - 2)
        return i, knots[i], knots[i + 1]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        common = {
            "sentence": self.sentence,
            "default": self.default,
            "low": self.low,
            "high": self.high,
            "unit": self.unit,
        }
        if self.choices:
            return common | {"choices": list(self.choices)}
        curve = {"curve": list(self.curve)} if self.curve else {}
        return common | {"lo": self.lo, "hi": self.hi, "scale": self.scale} | curve


class Reconstructor(nn.Module, abc.ABC):
    """A method: `model(y, A, *, dials…) → Reconstruction`, differentiable.

    Subclasses annotate each dial of `forward` once, `lam: Annotated[float, Dial(…)] = …`; a method whose
    dials depend on its constructor overrides `declared`. Those with weights add `loss(example, generator)`.
    `arguments` is what the constructor was given: it goes into the header of a weights file.
    """

    arguments: Mapping[str, Any] = {}
    trained: Mapping[str, Any] = {}  # what the weights have seen (see `outside`), from the weights file
    curves: Mapping[str, Sequence[float]] = {}  # of dials whose slider was measured (see `Dial`), from the weights file

    def __init__(self) -> None:
        # No argument unless a method declares some: `methods.make` and `load` read this signature.
        super().__init__()

    @abc.abstractmethod
    def forward(self, y: Tensor, A: LinearOperator) -> Reconstruction:
        """Reconstruct from normalised data `y` `(B, C, H, W)` or `(B, C, M)` measured by `A`; dials as keywords."""

    @property
    def dials(self) -> dict[str, Dial]:
        """Name → Dial, in the order of `forward`'s keywords."""
        return {
            name: replace(dial, curve=tuple(self.curves[name])) if name in self.curves else dial
            for name, dial in self.declared().items()
        }

    def declared(self) -> dict[str, Dial]:
        """The dials as the method knows them, without `curves`."""
        hints = typing.get_type_hints(type(self).forward, include_extras=True)
        found = {}
        for name, hint in hints.items():
            for extra in getattr(hint, "__metadata__", ()):
                if isinstance(extra, Dial):
                    found[name] = extra
        return found

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """What training minimises for one batch, a scalar; methods with weights define it.

        Raises:
            BadOption: this method has none.
        """
        raise errors.BadOption(f"{type(self).__name__} has no weights to train", key="method")

    def notes(self) -> dict[str, float]:
        """Numbers worth watching during training, besides the loss; none as a rule."""
        return {}

    def suggest(self, y: Tensor, A: LinearOperator) -> dict[str, float | str]:
        """A setting for this measurement; the defaults unless a method knows better."""
        return {name: dial.default for name, dial in self.dials.items()}

    def knows(self, scan: Scan, index: int) -> dict[str, Any]:
        """Keywords of `forward` that are no dials and that a prepared `scan` answers for one slice; none as a rule."""
        return {}

    def task_parameters(self) -> list[nn.Parameter]:
        """The parameters that `adapt` may change; none unless a method says so."""
        return []

    def move_task(self, shift: float) -> None:
        """Move the weight that belongs to a task by `shift`, the one number that `adapt` searches.

        Raises:
            BadOption: this method has no task parameters.
        """
        raise errors.BadOption(f"{type(self).__name__} has no task weight", key="method")

    def guarantees(self) -> dict[str, Any]:
        """What is proved about these weights, JSON-ready; goes into the header of their file. Nothing, as a rule."""
        return {}

    def as_dials(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A setting by the names of dials, not checked; a method may take it in other coordinates too."""
        return dict(given)

    def check_dials(self, given: Mapping[str, Any], *, extrapolate: bool = False) -> dict[str, float | str]:
        """All dials with a value each: the given ones checked, the others at their default.

        Raises:
            BadOption: an unknown name, or a value that its dial refuses.
        """
        dials = self.dials
        for name in given:
            if name not in dials:
                raise errors.BadOption("no such dial", key=name, help=errors.did_you_mean(name, dials))
        return {
            name: dial.check(name, given[name], extrapolate=extrapolate) if name in given else dial.default
            for name, dial in dials.items()
        }

    def view(self, scan: Scan, **options: Any) -> Any:
        """Turn this method's dials on a scan, live in a notebook: `tunemri.view(scan, self, …)`."""
        from ..viewer import view  # the package's top row: found when somebody looks, not when a method is made

        return view(scan, self, **options)

    def outside(self, scan: Scan) -> list[str]:
        """Sentences that say in which respects a prepared `scan` lies outside what these weights were trained for."""
        said = []
        mask, (h, w) = scan.mask, scan.image_shape
        if "acceleration" in self.trained:
            lo, hi = self.trained["acceleration"]
            # Full sampling and milder undersampling are reported too: they were not seen either.
            if not lo * 0.95 <= scan.acceleration <= hi * 1.05:
                said.append(f"acceleration {scan.acceleration:.1f}, trained for {lo:g} to {hi:g}")
        if "centre" in self.trained and mask is not None:
            core = mask.expand(-1, -1, h, w)[..., h // 2 - 2 : h // 2 + 3, w // 2 - 2 : w // 2 + 3]
            share, least = float(core.double().mean()), self.trained["centre"]
            if share < least:
                said.append(f"{share:.0%} of the central 5×5 of k-space sampled, trained for at least {least:.0%}")
            elif share < _CENTRE:
                # Training may have seen such masks, and learned little from them (tests/test_stability.py).
                said.append(f"{share:.0%} of the central 5×5 of k-space sampled, too little for a trained method")
        if self.trained.get("block") and mask is not None and not _one_block(mask):
            said.append("samples scattered over k-space, trained for one complete block of it")
        if "size" in self.trained:
            lo, hi = self.trained["size"]
            if min(h, w) < lo or max(h, w) > hi:
                said.append(f"matrix {h}×{w}, trained for {lo:g} to {hi:g}")
        if "noise" in self.trained and scan.noise_std is not None and scan.noise_std > 2 * self.trained["noise"][1]:
            # Twice: training counts noise over the image maximum, which is up to twice the scale of a scan.
            said.append(
                f"noise {scan.noise_std:.3f} of the signal, trained for at most {2 * self.trained['noise'][1]:.3f}"
            )
        if "coils" in self.trained and scan.coils > self.trained["coils"]:
            said.append(f"{scan.coils} coils, trained for at most {self.trained['coils']:g}")
        if self.trained and not self.trained.get("trajectory") and scan.trajectory is not None:
            said.append("samples off the grid, trained for samples on it")
        return said


def _one_block(mask: Tensor) -> bool:
    """Whether every mask samples all of a rectangle and nothing else."""
    rows, columns = mask.amax(-1, keepdim=True), mask.amax(-2, keepdim=True)
    gaps = [int((line.flatten(1).diff(dim=1) > 0).sum(1).max()) for line in (rows, columns)]
    return bool((mask == rows * columns).all()) and max(gaps) <= 1


def made(kind: Callable[..., Any], key: str, arguments: Mapping[str, Any] | None) -> Any:
    """`kind(**arguments)` of a part of a method that recipes and headers describe by name.

    Raises:
        BadOption: an argument that it does not have, or one that it lacks.
    """
    try:
        return kind(**dict(arguments or {}))
    except TypeError as error:
        raise errors.BadOption(str(error), key=key) from error


def half_square(x: Tensor) -> Tensor:
    """½‖x‖² of each sample of a complex `(B, …)`, `(B,)` float64: descent is judged by small differences of it."""
    return torch.view_as_real(x).square().flatten(1).sum(1, dtype=torch.float64) / 2


def data_residual(x: Tensor, y: Tensor, A: LinearOperator) -> Tensor:
    """Relative data-consistency residual ‖A x − y‖ / ‖y‖ of each sample, `(B,)`; zero where y is zero."""
    with torch.no_grad():
        error = (A(x) - y).abs().square().flatten(1).sum(1).sqrt()
        total = y.abs().square().flatten(1).sum(1).sqrt()
        return error / torch.where(total > 0, total, torch.ones_like(total))


def _over_noise(residual: Tensor, scan: Scan, noise_std: float) -> list[float]:
    """‖A x̂ − y‖ / (σ √M) of each slice: 1 where what is left of the M samples is as large as their noise alone."""
    y = scan.kspace.flatten(1)
    share = torch.ones(1) if scan.mask is None else scan.mask.double().flatten(1).mean(1).cpu()
    left = residual.double().cpu() * y.abs().double().square().sum(1).sqrt().cpu()
    return [float(v) for v in left / (noise_std * (share * y.shape[1]).sqrt())]


def prepare(scan: Scan, *, csm: str = "auto") -> Scan:
    """A scan ready for any method: maps present and normalised, each slice divided by its scale.

    Arguments:
        csm: how to estimate maps where several coils come without: a name in `coils.MAPS`, or "joint": as a start only.

    Raises:
        BadOption: no such way to estimate maps. NoMemory: too large for this machine; says what to cut.
    """
    with errors.enough_memory(lambda: _too_large(scan)):
        return _prepared(scan, csm)


def _prepared(scan: Scan, csm: str) -> Scan:
    joint = csm == "joint"
    csm = "auto" if joint else csm
    if csm not in coils.MAPS:
        raise errors.BadOption(f"found {csm!r}", key="csm", help=errors.did_you_mean(csm, coils.MAPS))
    if scan.trajectory is not None:
        reach = float((scan.trajectory.abs().amax((0, 1)) / scan.trajectory.new_tensor(scan.image_shape)).amax())
        if reach < 1 / 8:
            errors.warn(
                f"trajectory: reaches {2 * reach:.0%} of the way to the edge of k-space: expect a blurred image; "
                "is it in cycles per field of view?"
            )
    maps = scan.csm
    if maps is None and scan.coils > 1:
        pieces, poor = [], False
        for b in range(len(scan)):  # one at a time: estimating takes several times the memory of what it is done for
            one = select(scan, slice(b, b + 1))
            centre = one.kspace, one.mask
            if one.trajectory is not None:
                centre = calibration_block(one.kspace, one.trajectory, one.image_shape)
            assert centre[1] is not None
            found = csm in ("auto", "nlinv")
            poor |= (coils.thinly_sampled if found else coils.poorly_calibrated)(centre[1], one.image_shape)
            pieces.append(coils.MAPS[csm](centre[0], centre[1]))
        maps = torch.cat(pieces)
        if poor:
            errors.warn(
                f"hardly a centre of k-space to estimate the maps of {scan.coils} coils from: expect poor ones; "
                + ("" if csm in ("auto", "nlinv") else "auto and nlinv look beyond the complete lines, or ")
                + "name a file with maps, if there is one"
            )
    if maps is not None:
        rss = maps.abs().square().sum(1, keepdim=True).sqrt()
        inside = rss > 1e-3 * rss.amax()
        if float((rss[inside] - 1).abs().max()) > 0.05:
            errors.warn(
                "coil maps are not normalised (root sum of squares differs from 1 by over 5 %): normalising them"
            )
            maps = maps / torch.where(inside, rss, torch.ones_like(rss)) * inside
    return normalise(replace(scan, csm=maps))


def _other_maps(scan: Scan, y: Tensor, A: LinearOperator) -> Tensor | None:
    """Maps of one slice for a second start, where its centre is narrow and nobody brought any."""
    if scan.csm is not None or not isinstance(A, Cartesian):
        return None
    return coils.completed_maps(y, A.mask) if coils.narrow_centre(A.mask[0, 0], scan.image_shape) else None


def _too_large(scan: Scan) -> errors.NoMemory:
    """What of this scan to cut; its slices are taken one at a time already."""
    h, w = scan.image_shape
    cut = "fewer slices at a time (--slice 0:1)" if len(scan) > 1 else "fewer coils (coils.compress_scan)"
    return errors.NoMemory(
        f"not enough for {len(scan)} slices of {scan.coils} coils, {h}×{w}", key="kspace", help=f"{cut}, or a smaller matrix",
    )  # fmt: skip


def reconstruct(
    scan: Scan, model: Reconstructor, *, csm: str = "auto", extrapolate: bool = False, **dials: Any
) -> Reconstruction:
    """Reconstruct every slice of a scan: estimate maps if needed → normalise → encode → model → un-normalise.

    Arguments:
        scan: what was measured.
        model: any method, see `tunemri.load`.
        csm: how to estimate coil maps where the scan has none; "joint": together with the image, of methods that can.
        extrapolate: allow dials outside their range, with a warning.
        **dials: settings by name; those not named take the model's suggestion for this scan.

    Returns:
        Reconstruction with the image in the units of the scan; slices are independent of each other. Its stats hold,
        for each slice, `scale` and, where the noise is known, `residual_over_noise`.

    Raises:
        NoData: the scan holds nothing but zeros.
        BadOption: an unknown dial or a value outside its range.
        NonFinite: the method gave no usable image.
    """
    for value, kind, key in ((scan, Scan, "scan"), (model, Reconstructor, "model")):
        if not isinstance(value, kind):
            how = "tunemri.read(FILE)" if key == "scan" else "tunemri.load(NAME)"
            raise errors.BadOption(f"found {type(value).__name__}", key=key, help=f"{how} makes one")
    asked = model.as_dials(dials)
    checked = model.check_dials(asked, extrapolate=extrapolate)
    given = {name: checked[name] for name in asked}
    if not bool(scan.kspace.any()):
        raise errors.NoData("every sample is zero", key="kspace", help="is this the right dataset of the file?")
    together = {"joint": True} if csm == "joint" and scan.coils > 1 else {}
    if csm == "joint" and "joint" not in inspect.signature(model.forward).parameters:
        raise errors.BadOption(
            f"{type(model).__name__} does not estimate maps with the image", key="csm", help="energy-brain does"
        )
    model.eval()
    pieces = []
    # Of a GPU: the same each time, and in single precision; by default its convolutions keep three digits (TF32).
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact, errors.enough_memory(lambda: _too_large(scan)):
        ready = prepare(scan, csm=csm)
        for sentence in model.outside(ready):
            errors.warn(f"outside what the model was trained for: {sentence}", "wrong_model")
        assert ready.scale is not None and scan.scale is not None
        factor = ready.scale / scan.scale
        A = encoding(ready)
        for b in range(len(ready)):
            # One slice at a time: memory stays flat, and a slice never depends on its neighbours.
            y, A_b = ready.kspace[b : b + 1], A.sample(b)
            others = {"also": other} if together and (other := _other_maps(scan, y, A_b)) is not None else {}
            settings = model.suggest(y, A_b) | given
            pieces.append(model(y, A_b, **settings, **model.knows(ready, b), **together, **others))
    whole = joined(pieces)
    # A slice without signal has no image; what a network's biases make of it is not one.
    image = whole.image * ready.kspace.flatten(1).any(1)[:, None, None]
    finite = torch.isfinite(torch.view_as_real(image)).all()
    if not bool(finite):
        raise errors.NonFinite(
            f"{type(model).__name__} gave NaN or Inf at {whole.dials}",
            key="image",
            help="try another setting of its dials",
        )
    misfit = 0.0 if whole.residual is None else float(whole.residual.max())
    if misfit > 1:  # worse than no image at all
        errors.warn(f"the image misses the measured data by {misfit:.0%}: do not trust it; wrong coil maps or weights?")
    up = factor.to(image.real.dtype)[:, None, None]
    stats = {**whole.stats, "scale": factor.tolist()}
    if scan.noise_std and whole.residual is not None:
        stats["residual_over_noise"] = _over_noise(whole.residual, scan, scan.noise_std)
    return replace(
        whole,
        image=image * up,
        csm=ready.csm if whole.csm is None else whole.csm,
        variance=None if whole.variance is None else whole.variance * up.square(),
        samples=None if whole.samples is None else whole.samples * up[:, None],
        stats=stats,
        provenance=scan.provenance,
    )
