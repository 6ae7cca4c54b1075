"""A generative prior: one energy of images, learned without any sampling pattern, for every sampling pattern.

    p(x | y) ∝ exp(−‖A x − y‖² / λν² − 2 E(x, σ) / σ²),    σ → 0

ν and σ are standard deviations of complex noise: ν of what was measured, σ of what the energy was trained to see in
images. x ↦ D(x, σ) = x − ∇E(x, σ) removes noise of that level, so −2∇E/σ² is the score of images with that noise.

The mode is sought on a way down through the levels, with a little fresh noise at each, on grids as coarse as the noise
allows, and then descended to with a certificate. What white noise hides too little of for D to learn, low frequencies, may have
an energy of their own, of images with coloured noise: on coarser grids, and below its corner on that of the image. Each draw
goes the same way with more noise, its own, from data with noise of their own.

Sources: M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023), for the system;
P. Vincent, "A connection between score matching and denoising autoencoders" (2011), for the training of our energy;
S. Hurault, A. Leclaire, N. Papadakis, "Gradient step denoiser for convergent plug-and-play" (2022), for its form;
M. Terris, T. Moreau, N. Pustelnik, J. Tachella, "Equivariant plug-and-play image reconstruction" (2024), for the views.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import coils, errors, solvers
from ..fourier import fft2, ifft2, resized
from ..networks.energy import ENERGIES, Coloured, Energy, Homogeneous
from ..operators import LinearOperator, NonCartesian
from ..scan import Reconstruction, Scan, joined
from .base import Dial, Reconstructor, data_residual, half_square, made

__all__ = ["PRESETS", "Draws", "Generative", "Likelihood", "Mode", "Regression", "noise_level", "power"]

_BINS = 12  # of log σ, in which the energies of training images are remembered
_FAINTEST = 0.002  # noise level that is always assumed: the rounding of most files
_SHORT = 1 / 16  # first step of descent at the first level, over (σ/ν)²; larger ones are hardly ever short enough
_ALONE = 0.3  # where the way begins if there is no coarser grid
_CUT = 0.07  # where grids coarser than the image's usually end
_SMALLEST = 24  # pixels that the coarsest grid has at least
_LOW = 48  # pixels that the grid of low frequencies has at least
_SHIFTS = 8  # pixels; further on, networks that halve the image three times do the same again, but at the edges
_DETAIL = 0.05  # standard deviation of details of images, over their scale
_OPEN = 30  # conjugate gradient steps, at most, for what the data leave open; of many coils and little noise it takes that many
_FITTED = 150  # conjugate gradient steps, at most, for other maps, and
_FIT = 1e-2  # the share of the right-hand side that may be left
_MOST = 1.25  # root mean square of what D takes away around a pixel, over σ


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How the mode is looked for.

    Arguments:
        start: highest σ, in units of the scale of the image.
        rough: steps down from there on coarser grids: fewer where that part is short, none where there is no such grid.
        halve: σ down to which a grid is taken, over the root mean square of the measured frequencies that it has not and the
            next finer one has.
        way: steps from there on, at full resolution.
        noise: standard deviation of the fresh noise at each step, over σ.
        levels: of σ that end the way, as far apart as its steps, the last that of the noise in the data; and
        steps: of accelerated descent at each, at most.
        inertia: steps for which it builds up at most.
        tolerance: on the relative change of the image in a step of descent.
        inner: conjugate gradient steps, at most, with which the data are met in each.
        mu: weight of the roughness of what is added to coil maps, where they are sought too.
        map_levels: levels that end the way then, instead of `levels`: maps move there alone, for an image that is not yet one
            would spoil them.
        map_steps: for them, at each of these, at most.
    """

    start: float = 1.0
    rough: int = 80
    halve: float = 1.5
    way: int = 36
    noise: float = 0.25
    levels: int = 2
    steps: int = 2
    inertia: int = 15
    tolerance: float = 1e-3
    inner: int = 10
    mu: float = 10.0
    map_levels: int = 6
    map_steps: int = 5

    def __post_init__(self) -> None:
        good = (
            min(
                self.levels - 1,
                self.map_levels - 1,
                self.steps,
                self.inner,
                self.map_steps,
                self.way + 1,
                self.rough + 1,
                self.inertia + 1,
            )
            >= 1
        )
        if (
            not good
            or not 0 <= self.tolerance < 1
            or not 0 <= min(self.mu, self.noise) < math.inf
            or not 0 < min(self.start, self.halve) <= max(self.start, self.halve) < math.inf
        ):
            raise errors.BadOption(
                f"found {self}, expected levels ≥ 2, steps ≥ 1, start and halve > 0, tolerance, noise and mu ≥ 0",
                key="mode",
            )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How the posterior is drawn from.

    Arguments:
        chains: run side by side, each from noise of its own.
        samples: of each chain; their number is `chains` times as large.
        start: σ of the noise on the zero-filled image from which each draw sets out.
        noise: standard deviation of the noise on its way down, over σ.
        temperature: factor a on the variance of what the data leave open, where nothing is sampled;
        unsampled: power p of the share of k-space that is not, by which that factor falls; and
        coarse: spatial frequency ρ₀, in cycles per field of view, below which it grows with (ρ₀/ρ)³; so that intervals
            hold what they promise. All three fitted by `benchmarks/generative.py widths`.
        maps: "resampled", each draw of several coils with maps of its own that the data allow as well as those of the scan,
            wherever these are from, or "fixed", as they are; the paper's energy knows fixed ones only.
        thin: steps between draws of the paper's energy, and
        burn_in: draws of each chain of it that do not count; ours begins each draw anew.
        inner: conjugate gradient steps, at most, with which the data are met at each.
        seed: of all randomness; None: that of torch, which the option --seed of the command line sets.
    """

    chains: int = 3
    samples: int = 24
    start: float = 0.2
    noise: float = 0.7
    temperature: float = 1.0
    unsampled: float = 0.0
    coarse: float = 0.0
    maps: str = "resampled"
    thin: int = 6
    burn_in: int = 1
    inner: int = 10
    seed: int | None = None

    def __post_init__(self) -> None:
        counts = min(self.chains, self.samples, self.thin, self.inner, self.burn_in + 1)
        if (
            counts < 1
            or not 0 < self.temperature < math.inf
            or not all(0 <= v < math.inf for v in (self.start, self.noise, self.unsampled, self.coarse))
        ):
            raise errors.BadOption(f"found {self}, expected counts ≥ 1, temperature > 0, others ≥ 0", key="draws")
        if self.maps not in ("fixed", "resampled"):
            raise errors.BadOption(f"found {self.maps!r}, expected fixed or resampled", key="draws.maps")


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How the paper's energy is trained.

    Arguments:
        smooth: standard deviation of the noise added to images: a density that has a slope everywhere.
        noise: ε of the chains; with the temperature T = ε²/2, they draw from exp(−R/T).
        chain: steps of a chain at each update, once training is under way; fewer before.
        growth: updates in which the length comes to 1 − 1/e of that.
        replay: images kept, from which chains go on.
        survival: chance of one to be kept after it was used; others begin again at an image, or at its pixels shuffled.
        limit: |u| at which chains count as diverged.
    """

    smooth: float = 0.015
    noise: float = 0.0075
    chain: int = 500
    growth: float = 1000.0
    replay: int = 8000
    survival: float = 0.99
    limit: float = 100.0

    def __post_init__(self) -> None:
        positive = min(self.smooth, self.noise, self.chain, self.growth, self.replay, self.limit) > 0
        if not positive or not 0 <= self.survival <= 1:
            raise errors.BadOption(f"found {self}, expected numbers > 0 and a survival in [0, 1]", key="likelihood")

    def length(self, update: int) -> int:
        """Steps of a chain at an update, counted from 0."""
        return math.ceil(self.chain * (1 - math.exp(-update / self.growth) + 0.01))


@dataclass(frozen=True, kw_only=True)
class Regression:
    """The weight that a scan is likely to need, from what was measured of it; fitted by `tuning.fit_weight`.

        λ = exp(slope ρ + intercept) within [floor, ceiling],    ρ as `power` says

    In log λ, as the dial is: twice too much then counts like twice too little, and no line leads below zero. Scans
    unlike those of the fit get no weight that none of them needed: that is what floor and ceiling are for.

    Source: M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023), whose residual of
    the zero-filled image is zero but for rounding, and so stands for the power of the data.
    """

    slope: float
    intercept: float
    floor: float
    ceiling: float

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.slope, self.intercept, self.ceiling)))
        if not finite or not 0 < self.floor <= self.ceiling:
            raise errors.BadOption(f"found {self}, expected numbers, 0 < floor ≤ ceiling", key="regression")

    def at(self, rho: float) -> float:
        """λ of a scan of power ρ."""
        line = self.slope * rho + self.intercept
        if line <= math.log(self.floor):
            return self.floor
        return self.ceiling if line >= math.log(self.ceiling) else math.exp(line)


# Constructor arguments by name, `Generative(**PRESETS["paper"])`: 21,350,640 parameters, as published.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"energy": {"name": "paper"}, "likelihood": {}},
    "default": {"energy": {"name": "unet", "widths": [24, 48, 96, 128]}},
}


@dataclass(frozen=True, kw_only=True)
class _Rough:
    """The way down on coarser grids by an energy of their own, see `Generative`."""

    levels: tuple[float, float] = (0.008, 1.0)
    start: float = 0.5
    noise: float = 0.7
    below: float = 0.25
    inertia: int = 4
    starts: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _range(self.levels, "coarse.levels"))
        if (
            not 0 < self.start < math.inf
            or not 0 <= min(self.noise, self.below) < math.inf
            or self.inertia < 0
            or self.starts < 1
        ):
            raise errors.BadOption(
                f"found {self}, expected start > 0, noise, below and inertia ≥ 0, starts ≥ 1", key="coarse"
            )


class Generative(Reconstructor):
    """The prior and what follows from it.

    Arguments:
        energy: `name` in `networks.energy.ENERGIES`, by default "unet", and its arguments.
        levels: (lo, hi) of σ in training, over the scale of the image (see `scan.normalise`).
        coarse: of another energy for grids coarser than the image's and for low frequencies, `networks.energy.Coloured`: its
            arguments, its own `levels`, and of the way down on such grids `start`, `noise` and `inertia`, see `Mode`; `below`, that
            noise where it sees to low frequencies of the image's grid; `starts`, of which the one of the lowest energy goes on, of
            half as many where draws are made. Training then fits it alone. None: the same energy for all grids.
        mode, draws: how to find the mode and how to draw, see `Mode` and `Draws`.
        likelihood: how to train the paper's energy, see `Likelihood`.
        real: images are real and not negative, as magnitude images are and as the paper assumes; posterior samples, whose
            deviations are widened, are real alone.
        precision: of convolutions while noise is taken away, "float32" or "bfloat16" (three times as quick on
            processors that know it, which others do not try; their rounding is far below the noise). Descents, which
            carry the certificate, are in single precision always.
        regression: of the weight that is suggested for a scan, see `Regression`; None: 1 for every scan.
        trained: range of images seen in training, filled in by the recipe.

    `watch`, where one is set, sees (draws of each chain so far, of how many); True stops, and what was drawn is kept.
    """

    usual: Tensor
    replay: Tensor
    updates: Tensor
    balance: Tensor

    def __init__(
        self,
        *,
        energy: Mapping[str, Any] | None = None,
        levels: Sequence[float] = (0.004, 1.0),
        coarse: Mapping[str, Any] | None = None,
        mode: Mapping[str, Any] | None = None,
        draws: Mapping[str, Any] | None = None,
        likelihood: Mapping[str, Any] | None = None,
        real: bool = False,
        precision: str = "bfloat16",
        regression: Mapping[str, Any] | None = None,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.levels = _range(levels, "levels")
        spec = dict(energy or {})
        name = spec.pop("name", "unet")
        if name not in ENERGIES:
            raise errors.BadOption(f"found {name!r}", key="energy.name", help=errors.did_you_mean(str(name), ENERGIES))
        self.energy = made(ENERGIES[name], "energy", spec)
        self.likelihood: Likelihood = made(Likelihood, "likelihood", likelihood)
        if isinstance(self.energy, Homogeneous):
            if abs(2 * self.energy.temperature / self.likelihood.noise**2 - 1) > 1e-6:
                raise errors.BadOption(
                    f"found {self.energy.temperature:g}, expected noise²/2 of the chains", key="energy.temperature"
                )
            # Memory of training: part of its state, so that it resumes exactly, but not of the weights.
            self.register_buffer("replay", torch.zeros(0), persistent=False)
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
            # R of images and of chains, over what it is in equilibrium: n T with n pixels.
            self.register_buffer("balance", torch.zeros(2))
        self.coarse: Coloured | None = None
        spec = dict(coarse or {})
        self.rough: _Rough = made(_Rough, "coarse", {key: spec.pop(key) for key in vars(_Rough()) if key in spec})
        if coarse is not None:
            if isinstance(self.energy, Homogeneous):
                raise errors.BadOption(f"found one beside {name!r}, which knows one level", key="coarse")
            self.coarse = made(Coloured, "coarse", spec)
            self.energy.requires_grad_(False)
        self.watch: Callable[[int, int], bool | None] | None = None
        self.mode, self.draws = made(Mode, "mode", mode), made(Draws, "draws", draws)
        # Of noisy training images, in bins of log σ: means of log E/(σ² pixels) and of its square.
        self.register_buffer("usual", torch.zeros(2, _BINS))
        self.real = bool(real)
        if precision not in ("float32", "bfloat16"):
            raise errors.BadOption(f"found {precision!r}, expected float32 or bfloat16", key="precision")
        self.precision = precision
        self.regression: Regression | None = None if regression is None else made(Regression, "regression", regression)
        self.trained = dict(trained or {})
        self.arguments = {
            "energy": dict(energy or {}), "levels": list(self.levels), "mode": dict(mode or {}),
            "draws": dict(draws or {}), "likelihood": dict(likelihood or {}), "real": self.real,
            "precision": precision, "trained": self.trained, **({} if coarse is None else {"coarse": dict(coarse)}),
            **({} if regression is None else {"regression": dict(regression)}),
        }  # fmt: skip

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        lam: Annotated[
            float,
            Dial(
                sentence="weight of the prior, over the one that the noise in the data asks for",
                default=1.0, lo=0.05, hi=20.0, scale="log", low="faithful, noisy", high="smooth",
            ),
        ] = 1.0,
        estimate: Annotated[
            str,
            Dial(
                sentence="the most probable image, or the mean of the probable ones with their spread",
                default="map", choices=("map", "mmse"),
            ),
        ] = "map",
        noise: float | None = None,
        joint: bool = False,
        also: Tensor | None = None,
    ) -> Reconstruction:  # fmt: skip
        """Reconstruct: the mode of the posterior, or its mean and variance E|x − x̂|².

        Arguments:
            noise: ν; None: as `noise_level` finds it.
            joint: estimate the coil maps together with the image, beginning at those of A.
            also: other maps `(B, C, H, W)` to begin at: the problem is not convex, and the image of the lower objective is taken.

        Raises:
            BadOption: lam or noise not above zero. NonFinite: an energy or a state is not, at the step where it happens.
        """
        weight = _positive(lam, "lam")
        pieces = []
        for b in range(len(y)):  # what a line search decides for one image must not hang on its neighbours
            y_b, A_b = y[b : b + 1], A.sample(b)
            B, z = A_b.preconditioned(y_b.detach())
            nu = noise_level(z, B) if noise is None else _positive(noise, "noise") * _gain(B)
            nu *= math.sqrt(weight)
            mode = None
            if joint:
                starts = [_maps(A_b)] if also is None else [_maps(A_b), also[b : b + 1]]
                mode = min((self._mode(z, _with_maps(B, c), nu, joint) for c in starts), key=_objective)
            elif estimate == "map":
                mode = self._mode(z, B, nu, joint)
            if mode is not None and mode.csm is not None:
                A_b, B = _with_maps(A_b, mode.csm), _with_maps(B, mode.csm)
            if estimate == "map":
                assert mode is not None
                piece = replace(mode, image=self._attached(mode.image, y_b, A_b, nu)) if y.requires_grad else mode
            else:
                piece = self._mean(z, B, nu)
                if mode is not None:
                    piece = replace(piece, csm=mode.csm, stats={**mode.stats, **piece.stats})
            about = {name: [{**one, "lam": weight} for one in records] for name, records in piece.stats.items()}
            pieces.append(replace(piece, residual=data_residual(piece.image, y_b, A_b), stats=about))
        return replace(joined(pieces), dials={"lam": float(lam), "estimate": estimate})

    def suggest(self, y: Tensor, A: LinearOperator) -> dict[str, float | str]:
        """The defaults; λ by the regression, where these weights have one."""
        found = super().suggest(y, A)
        if self.regression is not None:
            found["lam"] = self.dials["lam"].check("lam", self.regression.at(power(y, A)))
        return found

    def knows(self, scan: Scan, index: int) -> dict[str, Any]:
        """The noise, where the scan knows it."""
        if scan.noise_std is None or scan.scale is None or not scan.noise_std > 0:
            return {}
        return {"noise": scan.noise_std * float(scan.scale.mean() / scan.scale[index])}

    def outside(self, scan: Scan) -> list[str]:
        """Only the size of the image: nothing about sampling was learned."""
        (h, w), (lo, hi) = scan.image_shape, self.trained.get("size", (1, math.inf))
        return [f"matrix {h}×{w}, trained for {lo:g} to {hi:g}"] if min(h, w) < lo or max(h, w) > hi else []

    # ---------------------------------------------------------------- the mode

    def _mode(self, z: Tensor, A: LinearOperator, nu: float, joint: bool) -> Reconstruction:
        """argmin_x ½‖A x − z‖² + (ν/σ)² E(x, σ), σ falling to ν, from the zero-filled image; jointly, + μ F(c − c₀)."""
        x, c, record = self._descend(self._begun(A, z), z, A, nu, _maps(A) if joint else None)
        certificate = [{"noise": nu, "levels": record, "unlike": float(self.unlike(x)), "bfloat16": self._quick(x)}]
        return Reconstruction(
            image=x, csm=None if c is None else coils.unit_maps(c), stats={"certificate": certificate}
        )

    def _descend(
        self, x: Tensor, z: Tensor, A: LinearOperator, nu: float, c: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, list[dict[str, Any]]]:
        """Images and maps at the end of the way down, and what was descended there.

            x ← prox(D(x + β (x − x before) + κ σ ξ, σ)),    ξ white and fresh    then descent of the objective

        The noise ξ keeps D within what it was trained for. Without it, errors of an image that is free of noise look
        like details, and stay or grow; with as much as σ, inertia has nothing to build on. D sees each step turned, mirrored
        and shifted anew: what it would do to one orientation or place alone then averages out, instead of adding up.

        The data are met by their proximal map. Maps c, where there are any, are sought in turn with the image; what is
        added to those they begin at is smooth, see `coils.roughness`. Maps that are smooth themselves, as the paper asks for, would
        be worse than those of `coils.nlinv_maps`: they are far from zero at the edge of the image.
        """
        plan, record, solution, b, begun = self.mode, [], None, A.H(z), c
        ends = plan.levels if c is None else plan.map_levels
        grids = self._grids(z, A, nu, (b.shape[-2], b.shape[-1]))
        levels = self._levels(grids, nu, ends)
        descents = isinstance(self.energy, Homogeneous)  # no denoiser: every level is one
        ends = len(levels) if descents else ends
        # Every mode meets the same noise and the same views, on every device.
        generator = torch.Generator().manual_seed(0)
        x = self._down(x, z, grids, levels[:-ends], nu, plan.noise, plan.inner, generator, self.rough.starts)
        short: float | Tensor = 1.0 if descents else _SHORT
        for sigma in levels[-ends:]:
            moved = None
            if c is not None and begun is not None:
                moved = self._smooth_maps(x, c, begun, z, A)
                c = moved.value
                A = _with_maps(A, coils.unit_maps(c))
                b = A.H(z)
            prox = self._closest(A, b, plan.inner)
            energy, gradient = self._weighted(sigma, (nu / sigma) ** 2)
            solution = solvers.apgd(
                energy, gradient, x, prox=prox, penalty=_misfit(A, z), step=(sigma / nu) ** 2 * short,
                iterations=plan.steps, tolerance=plan.tolerance, after=solution,
            )  # fmt: skip
            x = solution.value
            # What was too long here will be at the next level, but near the end rounding alone makes steps short.
            if solution.step is not None:
                short = (solution.step / (sigma / nu) ** 2).clamp(_SHORT, 1)
            record.append(_level(sigma, solution, moved))
            if solution.age is not None:  # where levels follow each other, more inertia overshoots
                solution = replace(solution, age=solution.age.clamp(max=plan.inertia))
        return x, c, record

    def _down(
        self, x: Tensor, z: Tensor, grids: Sequence[_Grid], levels: Sequence[float], nu: float, noise: float, inner: int,
        generator: torch.Generator, starts: int,
    ) -> Tensor:  # fmt: skip
        """The way down: the step of `_descend` at each level, with fresh noise of `noise` times that level.

        Where noise hides whatever is finer, on a coarser grid: D sees further there, so gaps in the data fill from further
        away, and a step costs a fraction. With a coarse energy `starts` ways are gone on such grids, as far as that of low frequencies.
        """
        low, k, count = None, 0, len(x)
        if self.coarse is not None and len(grids) > 1 and levels:
            low, sigma = _low(grids), levels[0]
            x, z = (u.repeat_interleave(starts, 0) for u in (x, z.expand(count, *z.shape[1:])))
        for grid, stage in itertools.groupby(levels, lambda sigma: next(g for g in grids[::-1] if sigma > g.above)):
            if low is not None and len(x) > count and grid.scale > low.scale:
                x, z = self._chosen(x, low, sigma, count), z[::starts]
            x = before = x if x.shape[-2:] == grid.shape else resized(x, grid.shape)
            prox = self._closest(grid.A, grid.A.H(grid.data(z)), inner)
            coloured = isinstance(grid.energy, Coloured)
            share, longest = (self.rough.noise, self.rough.inertia) if coloured else (noise, self.mode.inertia)
            for sigma in stage:
                beta = min(k, longest) / (min(k, longest) + 3)
                fresh = _coloured(grid.energy, _white(x, generator))
                v = x + beta * (x - before) + share * grid.scale * sigma * fresh
                clean = v - self._taken(v, grid, low, sigma, generator)
                x, before = prox(clean, _row((sigma / nu) ** 2, x)[:, None, None]), x
                k += 1
        if low is not None and len(x) > count:
            x = self._chosen(x, low, sigma, count)
        return x if x.shape[-2:] == grids[0].shape else resized(x, grids[0].shape)

    def _chosen(self, x: Tensor, low: _Grid, sigma: float, count: int) -> Tensor:
        """Of images that began alike the one with the lowest coarse energy.

        Some end where prior and data hardly agree, where the centre of k-space is missing far too bright. Next to such differences
        between energies, of hundreds, no draw has a probability worth drawing from.
        """
        assert self.coarse is not None
        y, s = x if x.shape[-2:] == low.shape else resized(x, low.shape), low.scale * sigma
        noise = self.coarse.colour(_white(y[:1], torch.Generator().manual_seed(0)))
        with torch.no_grad():
            best = self.coarse(y + s * noise, _row(s, y)).view(count, -1).argmin(1)
        return x.view(count, -1, *x.shape[1:])[torch.arange(count), best]

    def _grids(self, z: Tensor, A: LinearOperator, nu: float, full: tuple[int, int]) -> list[_Grid]:
        """That of the image and those with half, a quarter, … as many points each way, as far as A knows them.

        Where nothing was measured of what a grid leaves out, it is taken for as much as the next one leaves out beyond that.
        Noise that ν does not account for (λ below one, density weights) counts as something to be seen: grids are finer then.
        """
        shape, energy = full, self.energy if self.coarse is None else self.coarse
        lowest = self.levels[0] if self.coarse is None else self.rough.levels[0]
        grids, kept = [_Grid(shape, 0.0, 1.0, self.energy, A, lambda y: y)], _sum_of_squares(z, A)
        while min(shape) // 2 >= _SMALLEST and (coarser := A.coarser((shape[0] // 2, shape[1] // 2))) is not None:
            shape = shape[0] // 2, shape[1] // 2
            scale = math.sqrt(math.prod(shape) / math.prod(full))
            inside = _sum_of_squares(coarser[1](z) / scale, coarser[0])
            lost, count = kept[0] - inside[0], kept[1] - inside[1]
            power = max(0.0, lost / count - z.shape[1] * nu**2) if count > 0 else math.inf
            grids.append(_Grid(shape, self.mode.halve * math.sqrt(power), scale, energy, *coarser))
            kept = inside
        for coarse, grid in itertools.pairwise(grids[:0:-1]):
            if grid.above == math.inf:
                grid.above = coarse.above
        for grid, coarse in itertools.pairwise(grids):
            # The image itself is to be seen, too, and D knows no lower level than that of training.
            coarse.above = max(grid.above, coarse.above, 2 * self._end(nu), lowest / coarse.scale)
        return [grid for grid in grids if grid.above < math.inf]

    def _begun(self, A: LinearOperator, z: Tensor) -> Tensor:
        """The zero-filled image."""
        return _real(A.H(z)) if self.real else A.H(z)

    def _taken(self, v: Tensor, grid: _Grid, low: _Grid | None, sigma: float, generator: torch.Generator) -> Tensor:
        """What D takes away of v, seen anew: of low frequencies, where there is a coarse energy, what that one does on its grid."""
        view = _view(generator)
        fine = _back(self._removed(_seen(v, view), grid.scale * sigma, grid.energy), view)
        # At half of the lowest level of its training it still knows more than the other one does.
        if low is None or isinstance(grid.energy, Coloured) or low.scale * sigma < self.rough.levels[0] / 2:
            return fine
        assert self.coarse is not None
        small = resized(v, low.shape)
        fresh = self.rough.below * low.scale * sigma * self.coarse.colour(_white(small, generator))
        small = _back(self._removed(_seen(small + fresh, view), low.scale * sigma, self.coarse), view) - fresh
        return fine + self.coarse.below(resized(small, grid.shape) - fine)

    def _removed(self, x: Tensor, sigma: float, energy: Energy | None = None) -> Tensor:
        """∇E(x, σ), what D takes away (S ∇E, if noise is coloured): around no pixel much more than there is noise.

        Far from what it was trained for, D now and then makes things up in some place; one such step would ruin all
        that follow. Coloured noise is limited where it is white, S^½ ∇E.

        Raises:
            NonFinite: the energy is not.
        """
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=self._quick(x)):
            value, slope = (energy or self.energy).value_and_gradient(x, _row(sigma, x))
        if not bool(value.isfinite().all()):
            raise errors.NonFinite(f"the energy at σ = {sigma:g}", key="energy", help="data of usual scale")
        slope = _coloured(energy, slope)
        return _coloured(energy, slope * (_MOST * sigma / _around(slope).clamp(min=_MOST * sigma)))

    def _quick(self, x: Tensor) -> bool:
        """Whether convolutions on images like x round to bfloat16 while noise is taken away."""
        return self.precision == "bfloat16" and x.dtype == torch.complex64 and _knows_bfloat16(x.device)

    def _closest(self, A: LinearOperator, b: Tensor, iterations: int) -> Callable[[Tensor, Tensor], Tensor]:
        """(v, τ) ↦ argmin_u ½‖u − v‖² + τ/2 ‖A u − y‖², b = Aᴴ y; on a grid two steps are exact for one coil.

        Of real images the closest real one, with what is negative set to zero.
        """
        part = _real if self.real else torch.clone

        def prox(v: Tensor, tau: Tensor) -> Tensor:
            G = lambda u: u + tau * part(A.gram(u))  # noqa: E731
            u = solvers.cg(G, part(v + tau * b), part(v), iterations=iterations, tolerance=1e-4).value
            return u.real.clamp(min=0).to(u.dtype) if self.real else u

        return prox

    def _smooth_maps(self, x: Tensor, c: Tensor, begun: Tensor, z: Tensor, A: Any) -> solvers.Solution:
        """argmin_c ½‖A(x c/|c|) − z‖² + μ F(c − c₀) at fixed x, a few steps of it."""
        one, mu = replace(A, csm=None, **({} if A.shape else {"shape": A.in_shape})), self.mode.mu
        misfit = _misfit(lambda u: one(u[0])[:, 0][None], z)

        def energy(c: Tensor) -> Tensor:
            return misfit(coils.unit_maps(c) * x[:, None])

        def gradient(c: Tensor) -> tuple[Tensor, Tensor]:
            images = coils.unit_maps(c) * x[:, None]
            r = one(images[0]) - z[0][:, None]
            value = torch.view_as_real(r).square().sum(dtype=torch.float64)[None] / 2
            return value, coils.joint_gradients(x, c, one.H(r)[None])[1]

        return solvers.apgd(
            energy, gradient, c, prox=lambda v, tau: begun + coils.smooth(v - begun, mu * tau),
            penalty=lambda c: mu * coils.roughness(c - begun), iterations=self.mode.map_steps, tolerance=self.mode.tolerance,
        )  # fmt: skip

    def _attached(self, x: Tensor, y: Tensor, A: LinearOperator, nu: float) -> Tensor:
        """x with the derivative in y of one more step: the solvers leave no graph."""
        B, z = A.preconditioned(y)
        sigma = self._end(nu)
        _, slope = self.energy.value_and_gradient(x, _row(sigma, x))
        return self._closest(B, B.H(z), self.mode.inner)(x - slope.detach(), _row((sigma / nu) ** 2, x)[:, None, None])

    def _weighted(
        self, sigma: float, weight: float
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """x ↦ w E(x, σ), and x ↦ (w E, w ∇E)."""

        def energy(x: Tensor) -> Tensor:
            return weight * self.energy(x, _row(sigma, x))

        def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = self.energy.value_and_gradient(x, _row(sigma, x))
            return weight * value, weight * slope

        return energy, gradient

    def _end(self, nu: float) -> float:
        """The lowest level: that of the noise."""
        lo, hi = self.levels
        return min(max(lo, nu), hi / 2)

    def _levels(self, grids: Sequence[_Grid], nu: float, ends: int) -> list[float]:
        """Of σ, falling: at most `rough` down to where the grid is that of the image, then `way` and `ends`, both geometric."""
        plan, end = self.mode, self._end(nu)
        highest, start = self.levels[1], plan.start
        if self.coarse is not None:
            highest, start = self.rough.levels[1] / grids[-1].scale, self.rough.start
        hi = min(highest, max(start, 2 * end))
        if len(grids) == 1 or isinstance(self.energy, Homogeneous):
            return _geometric(min(hi, max(_ALONE, 2 * end)), end, plan.way + ends)
        cut = min(grids[1].above, hi)
        rough = math.ceil(plan.rough * min(1.0, math.log(hi / cut) / math.log(1 / _CUT)))
        return _geometric(hi, cut, rough + 1)[:-1] + _geometric(cut, end, plan.way + ends)

    # ---------------------------------------------------------------- the mean

    def _mean(self, z: Tensor, A: LinearOperator, nu: float) -> Reconstruction:
        plan, watch = self.draws, self.watch

        def told(k: int, moments: solvers.Moments) -> bool:
            return watch is not None and moments.count > 0 and bool(watch(moments.count, plan.samples))

        wider, total = self._wider(A, nu), torch.zeros_like(A.H(z)[0])

        def widened(x: Tensor) -> Tensor:
            total.add_(x.sum(0))
            return wider(x)

        chains = self.posterior(z, A, noise=nu, callback=told, observe=widened)
        moments = chains.moments
        mean, r_hat = total / (moments.count * plan.chains), moments.r_hat
        record = {
            "samples": moments.count * plan.chains,
            "burn_in": plan.burn_in * plan.chains if isinstance(self.energy, Homogeneous) else 0,
            "r_hat_95": float(_quantile(r_hat, 0.95)),
            "mixed": float((r_hat <= 1.1).double().mean()),
            "effective": float(moments.effective.median()),
            "noise": nu,
            "temperature": plan.temperature,
            "unsampled": plan.unsampled,
            "coarse": plan.coarse,
            "maps": plan.maps if self._varies(A) else "fixed",
            "bfloat16": self._quick(z),
        }
        return Reconstruction(
            image=mean[None],
            variance=moments.variance[None],
            samples=(mean + wider(chains.last) - moments.mean)[None],
            stats={"chains": [record]},
            status=f"stopped after {moments.count} of {plan.samples} draws of each chain"
            if chains.stopped
            else "converged",
        )

    def posterior(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        noise: float | None = None,
        observe: Callable[[Tensor], Tensor] | None = None,
        callback: Callable[[int, solvers.Moments], bool | None] | None = None,
        **changes: float | str | None,
    ) -> solvers.Chains:
        """Draw from the posterior of one slice.

        Each draw begins anew: at noise of its own and data with more noise, it goes the way down to the mode, with more
        noise on it, as Langevin's algorithm at falling temperature does. Moves know nothing of each other, and R̂ tells
        whether there are enough; with one coil, or fixed maps, the chains of one move share its views. With several, each draw has
        maps of its own, for an error of maps is one of the image, see `Draws.maps`. Where little is sampled, errors are larger than the
        spread of draws: what this returns, moments too, is as drawn, and `forward` widens deviations by `Draws.temperature`.
        The paper's energy, which knows one level only, is drawn from by Langevin's algorithm, from the mode for data with
        more noise.

        Arguments:
            y: `(1, C, …)`, and
            noise: ν in it, times √λ if the prior is to weigh λ; None: as `noise_level` finds it.
            observe: x ↦ what is summed up: `torch.abs` for statistics of magnitudes; None: the complex image.
            callback: sees the number of moves made and the moments so far; True stops and keeps what there is.
            **changes: of `Draws`.

        Raises:
            NonFinite: a chain diverged, at the move where it did. BadOption: an unknown or wrong change.

        Sources: F. Orieux, O. Féron, J.-F. Giovannelli, "Sampling high-dimensional Gaussian distributions for general
        linear inverse problems" (2012), for perturbing the data; Y. Song, S. Ermon, "Generative modeling by estimating
        gradients of the data distribution" (2019), for the levels.
        """
        plan = made(Draws, "draws", {**vars(self.draws), **changes})
        with torch.no_grad():
            B, z = A.preconditioned(y)
            nu = noise_level(z, B) if noise is None else _positive(noise, "noise")
            b = B.H(z)
            generator = torch.Generator().manual_seed(torch.initial_seed() if plan.seed is None else plan.seed)

            def other() -> Tensor:
                one = z.expand(plan.chains, *z.shape[1:])
                return z + nu * _white(one, generator) * (z != 0)

            def begun(data: Tensor) -> Tensor:
                return data + plan.start * _white(data, generator)

            common: dict[str, Any] = {
                "samples": plan.samples, "observe": observe, "callback": callback,
                "limit": 100 * float(b.abs().max()) + 100,
            }  # fmt: skip
            if not isinstance(self.energy, Homogeneous):
                grids = self._grids(z, B, nu, (b.shape[-2], b.shape[-1]))
                levels = self._levels(grids, nu, self.mode.levels)
                starts = (self.rough.starts + 1) // 2

                def down(data: Tensor, A: LinearOperator, grids: Sequence[_Grid]) -> Tensor:
                    return self._down(
                        begun(A.H(data)), data, grids, levels, nu, plan.noise, plan.inner, generator, starts
                    )

                if plan.maps == "fixed" or not self._varies(B):
                    return solvers.markov(
                        lambda k, x: (down(other(), B, grids), None), b.expand(plan.chains, *b.shape[1:]), **common
                    )
                small = _low(grids)
                image = down(z, B, grids)

                def move(k: int, x: Tensor) -> tuple[Tensor, None]:
                    draws = []
                    for data in other().split(1):
                        A = _with_maps(B, self._other_maps(image, small, B, nu, generator))
                        draws.append(down(data, A, self._grids(z, A, nu, (b.shape[-2], b.shape[-1]))))
                    return torch.cat(draws), None

                return solvers.markov(move, b.expand(plan.chains, *b.shape[1:]), **common)
            data = other()
            start = self._descend(begun(self._begun(B, data)), data, B, nu)[0]
            misfit, unit = _misfit(B, z), _row(1.0, start)

            def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
                value, slope = self.energy.value_and_gradient(x, unit)
                return 2 * misfit(x) / nu**2 + 2 * value, 2 * (B.H(B(x) - z) / nu**2 + slope)

            # It knows one temperature, so nothing can be annealed: plain Langevin, as short as the data ask for.
            return solvers.langevin(
                gradient, start, step=min(self.energy.temperature, nu**2 / 4), generator=generator,
                burn_in=plan.burn_in * plan.thin, thin=plan.thin, **common,
            )  # fmt: skip

    def _varies(self, A: LinearOperator) -> bool:
        """Whether draws can have maps of their own."""
        csm = getattr(A, "csm", None)
        return csm is not None and csm.shape[1] > 1 and not isinstance(self.energy, Homogeneous)

    def _other_maps(self, x: Tensor, grid: _Grid, A: LinearOperator, nu: float, generator: torch.Generator) -> Tensor:
        """Maps c + δ that the data allow as well as the maps c of A: drawn, with the model made linear around an image x.

            p(u, g) ∝ exp(−‖M F(c u + x δ)‖² / ν² − ‖u‖² / d² − ‖W g‖² / s²),    δ = P g Q,  ⟨c, δ⟩ = 0 in every pixel

        What c and x leave of the data is taken for noise, so δ is drawn around zero. u are details of the image, as large as d,
        and P, Q and W those of `coils.map_series`; s makes δ as large as maps are, for that is what is known of them before
        anything is measured. What δ has along c is brightness and phase, which are the image's. Noise and both priors are
        drawn and one least-squares problem is solved: that has the covariance of p, as nearly as it is solved.

        On `grid`, a coarse one, for maps are smooth. Their norm, in every pixel, stays as it is.

        Source: F. Orieux, O. Féron, J.-F. Giovannelli (2012), as in `posterior`.
        """
        # Zero where maps were cut off, and so it stays.
        size = torch.linalg.vector_norm(_maps(A), dim=1, keepdim=True)
        c, x = coils.unit_maps(_maps(grid.A)), resized(x * size[:, 0], grid.shape)[:, None]
        single: LinearOperator = replace(grid.A, csm=None, shape=grid.shape)  # type: ignore[type-var]
        rows, columns, weights = coils.map_series(grid.shape, x.device)
        rows, columns = rows.to(c), columns.to(c)
        prior = (1 / (weights * torch.linalg.vector_norm(1 / weights) * math.sqrt(c.shape[1]))).to(x.real)
        level, pixels, count = grid.scale * nu, x.numel(), c.shape[1]
        # Unknowns of which the data say much and little: scaled to the same diagonal, or the solver would never end.
        told = torch.cat(
            (
                torch.full_like(x.real, _DETAIL**2).flatten(1),
                (prior.square() * x.abs().square().sum()).flatten().repeat(count)[None],
            ),
            1,
        )
        even = (1 + told * _sampled(single, x[:, 0]) / level**2).rsqrt()

        def series(v: Tensor) -> Tensor:
            return prior * v[:, pixels:].view(1, -1, *prior.shape)

        def forward(v: Tensor) -> Tensor:
            details = _DETAIL * v[:, :pixels].view_as(x)
            return (details * c + x * _across(c, rows @ series(v) @ columns)) / level

        def adjoint(r: Tensor) -> Tensor:
            details = _DETAIL * (c.conj() * r).sum(1)
            g = prior * (rows.mH @ _across(c, x.conj() * r) @ columns.mH)
            return torch.cat((details.flatten(1), g.flatten(1)), 1) / level

        noise = adjoint(single.H(_white(single(c[0]), generator))[None])
        v = even * solvers.cg(
            lambda v: even * (even * v + adjoint(single.gram(forward(even * v)[0])[None])),
            even * (noise + _white(noise, generator)), iterations=_FITTED, tolerance=_FIT,
        ).value  # fmt: skip
        c = coils.unit_maps(_maps(A))
        rows, columns, _ = coils.map_series((c.shape[-2], c.shape[-1]), c.device)
        return size * coils.unit_maps(c + _across(c, rows.to(c) @ series(v) @ columns.to(c)))

    def _wider(self, A: LinearOperator, nu: float) -> Callable[[Tensor], Tensor]:
        """x ↦ x + (√T(ρ) − 1) (I + (d/ν)² AᴴA)⁻¹ x, T(ρ) = a (1 − s)ᵖ (1 + (ρ₀/ρ)³) ≥ 1: draws that spread as errors do.

        s is the share of k-space that is sampled, the mean of the diagonal of AᴴA; for the numbers see `Draws`. What the
        data tell better than details are large, d, is left alone: data with noise of their own spread it as they should.
        """
        plan, part, tau = self.draws, _real if self.real else torch.clone, (_DETAIL / nu) ** 2
        if plan.temperature <= 1 and plan.coarse == 0:
            return torch.clone

        def wider(x: Tensor) -> Tensor:
            left = solvers.cg(lambda u: u + tau * part(A.gram(u)), x, iterations=_OPEN, tolerance=1e-4).value
            h, w = x.shape[-2:]
            rows, columns = (torch.arange(n, device=x.device) - n // 2 for n in (h, w))
            rho = torch.hypot(rows[:, None].float(), columns.float()).clamp(min=1)
            factor = plan.temperature * (1 - _sampled(A, x[:1])) ** plan.unsampled
            gain = (factor * (1 + (plan.coarse / rho) ** 3)).clamp(min=1).sqrt() - 1
            return x + part(ifft2(gain * fft2(left)))

        return wider

    def unlike(self, x: Tensor) -> Tensor:
        """How many standard deviations the energy of normalised images lies above that of training images, `(B,)`.

        With noise of a level in the middle of those trained. Far from zero, the prior knows little about such images, and
        a smaller weight of it is safer. Zero where it was never trained.
        """
        k = _BINS // 2
        lo, hi = self.levels
        sigma = lo * (hi / lo) ** ((k + 0.5) / _BINS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            noise = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
            energy = self.energy(x + sigma * noise, _row(sigma, x)) / (sigma**2 * x[0].numel())
            mean, square = self.usual[:, k].double()
            spread = (square - mean.square()).clamp(min=0).sqrt()
            return (energy.clamp(min=1e-12).log() - mean) / spread if bool(spread > 0) else torch.zeros_like(energy)

    # ---------------------------------------------------------------- training

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """Denoising score matching, over all levels: mean over samples of log (‖D(x̃, σ) − x‖² / ‖x̃ − x‖²).

        x̃ is the image with noise of a level σ that is drawn uniformly in log σ, one stratum for each sample of the
        batch. Under the logarithm every level pulls alike. Coloured noise is compared where it is white.
        """
        if isinstance(self.energy, Homogeneous):
            return self._likelihood_loss(self.energy, example.target.abs(), generator)
        x = example.target
        energy, levels = (self.energy, self.levels) if self.coarse is None else (self.coarse, self.rough.levels)
        if self.coarse is not None and not bool(self.usual.any()):
            raise errors.BadOption(
                "the energy that it stands beside was not trained", key="coarse", help="give a start"
            )
        lo, hi = (math.log(level) for level in levels)
        place = torch.rand((), generator=generator) + torch.arange(len(x)) / len(x)
        place = (place % 1).to(x.device)
        sigma = (lo + (hi - lo) * place).exp()
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) * sigma[:, None, None]
        value, gradient = energy.value_and_gradient(x + _coloured(energy, noise), sigma)
        error = (noise - _coloured(energy, gradient)).abs().square().sum((1, 2)) / noise.abs().square().sum((1, 2))
        error = (error + 1e-4).log()
        if self.training and self.coarse is None:
            usual = (value / (sigma.double().square() * x[0].numel())).detach().clamp(min=1e-12).log()
            seen = torch.stack((usual, usual.square())).to(self.usual.dtype)
            for k, row in zip((place * _BINS).long().clamp(max=_BINS - 1), seen.T, strict=True):
                self.usual[:, k].lerp_(row, 0.01)
        return error.mean()

    def _likelihood_loss(self, energy: Homogeneous, x: Tensor, generator: torch.Generator) -> Tensor:
        """mean R(x + noise) − mean R(u), u from chains that go on from a memory: the slope of −T log likelihood."""
        plan, n = self.likelihood, energy.size
        if x.shape[1:] != (n, n):
            raise errors.InconsistentShapes(f"found images of {tuple(x.shape[1:])}, expected {(n, n)}", key="data.size")

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(x.device)

        def white(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        def born(count: int) -> Tensor:
            images = x[(uniform(count) * len(x)).long().clamp(max=len(x) - 1)].flatten(1)
            shuffled = images.gather(1, uniform(*images.shape).argsort(1))
            return torch.where(uniform(count, 1) < 0.5, images, shuffled).view(count, n, n)

        with torch.no_grad():
            if not len(self.replay):
                self.replay = torch.cat([born(min(64, plan.replay - k)) for k in range(0, plan.replay, 64)])
            chosen = (uniform(plan.replay).argsort())[: len(x)]
            u = self.replay[chosen]
            for _ in range(plan.length(int(self.updates))):
                slope = _slope(energy, u)
                u = u - slope + plan.noise * white(u)
            if not bool(u.isfinite().all()) or float(u.abs().max()) > plan.limit:
                raise errors.NonFinite(
                    f"a chain of training left [−{plan.limit:g}, {plan.limit:g}] at update {int(self.updates)}",
                    key="likelihood", help="lower training.lr",
                )  # fmt: skip
            if self.training:
                fresh = uniform(len(u)) >= plan.survival
                self.replay[chosen] = torch.where(fresh[:, None, None], born(len(u)), u)
        data, chains = energy.raw(x + plan.smooth * white(x)).mean(), energy.raw(u).mean()
        if self.training:
            self.updates += 1
            now = torch.stack((data, chains)).detach() / (n * n * energy.temperature)
            self.balance.copy_(now if int(self.updates) == 1 else self.balance.lerp(now.to(self.balance), 0.05))
        return (data - chains).float()

    def start_from(self, trained: Generative) -> None:
        """Take over what is trained; a coarse energy that has not been begins at the other one.

        Raises:
            BadOption: networks of other shapes.
        """
        found = trained.state_dict()
        if self.coarse is not None and trained.coarse is None:
            found |= {f"coarse.{name}": value for name, value in trained.energy.state_dict().items()}
        if {k: v.shape for k, v in self.state_dict().items()} != {k: v.shape for k, v in found.items()}:
            raise errors.BadOption("those weights are of other networks", key="start", help="the same energy.widths")
        self.load_state_dict(found)
        if self.coarse is not None:  # the image's own grid decides which images it is for
            self.trained = dict(trained.trained)
            self.arguments = {**self.arguments, "trained": self.trained}

    def notes(self) -> dict[str, float]:
        """Of training by likelihood: R of images and of chains over n T; both come to one in equilibrium."""
        if not isinstance(self.energy, Homogeneous):
            return {}
        return {"R of images / nT": float(self.balance[0]), "R of chains / nT": float(self.balance[1])}


@dataclass(eq=False)
class _Grid:
    """One that the way down takes for σ `above`: what energy, A and data are there, and white noise over that on the finest."""

    shape: tuple[int, int]
    above: float
    scale: float
    energy: Any
    A: LinearOperator
    data: Callable[[Tensor], Tensor]


def _low(grids: Sequence[_Grid]) -> _Grid:
    """The one for low frequencies: the coarsest with enough points for them, or the coarsest there is."""
    return next((g for g in grids[:0:-1] if min(g.shape) >= _LOW), grids[-1])


def _coloured(energy: Any, x: Tensor) -> Tensor:
    """S^½ x for an energy of images with coloured noise, x for one of white."""
    return energy.colour(x) if isinstance(energy, Coloured) else x


def _range(levels: Sequence[float], name: str) -> tuple[float, float]:
    lo, hi = levels
    if not 0 < lo < hi < math.inf:
        raise errors.BadOption(f"found {list(levels)}, expected 0 < lo < hi", key=name)
    return float(lo), float(hi)


def _sum_of_squares(z: Tensor, A: LinearOperator) -> tuple[float, float]:
    """Σ |z|² and how many samples that is, by their weights where A has some."""
    weights = getattr(A, "weights", None)
    count = (z != 0).any(1).sum() if weights is None else weights.sum()
    return float(half_square(z).sum()) * 2, float(count)


def _geometric(first: float, last: float, count: int) -> list[float]:
    return [first * (last / first) ** (k / max(1, count - 1)) for k in range(count)]


def _knows_bfloat16(device: torch.device) -> bool:
    """Whether its convolutions are quicker in bfloat16, not only possible."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.6
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def _slope(energy: Homogeneous, u: Tensor) -> Tensor:
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy.raw(u).sum(), u)
    return slope


def _across(c: Tensor, d: Tensor) -> Tensor:
    """What d has across maps c of unit norm, in every pixel."""
    return d - c * (c.conj() * d).sum(1, keepdim=True)


def _real(x: Tensor) -> Tensor:
    return x.real.to(x.dtype)


def _white(like: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, the same on every device."""
    return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)


def _view(generator: torch.Generator) -> tuple[int, int, int]:
    """One of the eight ways to turn and mirror a rectangle, and how far to shift it around, down and to the right."""
    ways, down, right = (int(torch.randint(n, (), generator=generator)) for n in (8, _SHIFTS, _SHIFTS))
    return ways, down, right


def _seen(x: Tensor, view: tuple[int, int, int]) -> Tensor:
    ways, down, right = view
    x = torch.rot90(x, ways % 4, (-2, -1))
    return torch.roll(x.mT if ways >= 4 else x, (down, right), (-2, -1)).contiguous()


def _back(x: Tensor, view: tuple[int, int, int]) -> Tensor:
    ways, down, right = view
    x = torch.roll(x, (-down, -right), (-2, -1))
    return torch.rot90(x.mT if ways >= 4 else x, -(ways % 4), (-2, -1)).contiguous()


def _around(x: Tensor) -> Tensor:
    """Root mean square of x around each pixel."""
    return F.avg_pool2d(x.abs().square()[:, None], 9, 1, 4, count_include_pad=False)[:, 0].sqrt()


def noise_level(y: Tensor, A: LinearOperator) -> float:
    """ν, the standard deviation of complex noise in k-space data y, from the outer third of the samples.

        median |y|² / ln 2 ≈ S r⁻ᵖ + ν² in shells of radius r,    S, p and ν those of least Itakura–Saito distance

    |noise|² is exponentially distributed, hence ln 2; what images add falls off like a power of r, and in small
    matrices it is nowhere below the noise. Zeros are not counted, and no less than 0.2 % of the scale of the image is
    ever said.
    """
    if isinstance(A, NonCartesian):
        radius = torch.linalg.vector_norm(A.trajectory, dim=-1)[:, None]
    else:
        h, w = y.shape[-2:]
        radius = torch.hypot((torch.arange(h) - h // 2)[:, None] / h, (torch.arange(w) - w // 2) / w).to(y.device)
    sampled = y != 0
    if not bool(sampled.any()):
        return _FAINTEST
    r, power = radius.expand(y.shape)[sampled], y[sampled].abs().square()
    outer = r >= _quantile(r, 0.7)
    r, power = r[outer].double(), power[outer].double()
    shells = min(20, len(r) // 10)
    if shells < 4:
        return max(_FAINTEST, math.sqrt(float(_quantile(power, 0.5)) / math.log(2)))
    order = r.argsort()[: len(r) // shells * shells].view(shells, -1)
    seen = power[order].quantile(0.5, dim=1) / math.log(2)
    falls = (r[order].mean(1) / r.max()) ** -torch.arange(2.0, 9.0, 0.5, dtype=r.dtype, device=r.device)[:, None]
    signal = (seen / falls).amin(1, keepdim=True) / 2
    noise = seen.min() / 2 * torch.ones_like(signal)
    for _ in range(100):  # multiplicative: both stay positive, and the distance never grows
        model = signal * falls + noise
        signal = signal * ((falls * seen / model**2).sum(1, True) / (falls / model).sum(1, True)).sqrt()
        noise = noise * ((seen / model**2).sum(1, True) / (1 / model).sum(1, True)).sqrt()
    ratio = seen / (signal * falls + noise)
    best = int((ratio - ratio.log()).sum(1).argmin())
    return max(_FAINTEST, math.sqrt(float(noise[best])))


def power(y: Tensor, A: LinearOperator) -> float:
    """ρ = ½‖z‖² for each pixel of the image, z the normalised data y as the prior meets them (`preconditioned`)."""
    B, z = A.preconditioned(y)
    return float(half_square(z).sum()) / B.H(z).numel()


def _sampled(A: LinearOperator, like: Tensor) -> float:
    """The share of k-space that A samples: the mean of the diagonal of AᴴA, for maps of unit norm, by one product with noise."""
    xi = _white(like, torch.Generator().manual_seed(0))
    return min(1.0, float((xi.conj() * A.gram(xi)).real.sum() / xi.abs().square().sum()))


def _quantile(values: Tensor, share: float) -> Tensor:
    """The value that a share of them does not exceed; `torch.quantile` has a limit of 16 million."""
    return values.flatten().kthvalue(max(1, math.ceil(share * values.numel()))).values


def _misfit(A: Callable[[Tensor], Tensor], y: Tensor) -> Callable[[Tensor], Tensor]:
    """x ↦ ½‖A x − y‖² of each sample, `(B,)` float64."""
    return lambda x: half_square(A(x) - y)


def _maps(A: LinearOperator) -> Tensor:
    """The maps of an encoding.

    Raises:
        BadOption: it has none.
    """
    maps = getattr(A, "csm", None)
    if maps is None:
        raise errors.BadOption("one coil has no map to estimate", key="csm", help="leave out joint")
    return maps


def _objective(mode: Reconstruction) -> float:
    """Where the descent of the image ended."""
    return float(mode.stats["certificate"][0]["levels"][-1]["objective"][-1])


def _with_maps(A: Any, maps: Tensor) -> LinearOperator:
    """The same encoding with other maps."""
    one: LinearOperator = replace(A, csm=maps)
    return one


def _gain(A: LinearOperator) -> float:
    """By how much preconditioning scales noise, root mean square."""
    weights = getattr(A, "weights", None)
    return 1.0 if weights is None else float(weights.mean().sqrt())


def _level(sigma: float, x: solvers.Solution, c: solvers.Solution | None) -> dict[str, Any]:
    level = {"sigma": sigma, "iterations": x.iterations, "objective": _trace(x)}
    return level if c is None else {**level, "maps": _trace(c)}


def _trace(solution: solvers.Solution) -> list[float]:
    assert solution.energy is not None
    return [float(v) for v in solution.energy[:, 0]]


def _positive(value: float | Tensor, name: str) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise errors.BadOption(f"found {number:g}, expected a finite number > 0", key=name)
    return number


def _row(value: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), value, dtype=x.real.dtype, device=x.device)
