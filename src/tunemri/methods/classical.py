"""The methods that need no training: zero-filled, CG-SENSE, total variation and wavelet sparsity.

    x̂ = argmin_x ½‖A x - y‖² + lam · R(x)

on normalised data (see `scan.normalise`), so that lam means the same on every scan. Each problem of a batch is
solved on its own, and the solution is differentiable in the data, in lam and in whatever A holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from .. import errors, regularisers, solvers
from ..operators import LinearOperator
from ..scan import Reconstruction
from ..transforms import WAVELETS, divergence, gradient
from .base import Dial, Reconstructor, data_residual

__all__ = ["Sense", "TotalVariation", "Wavelet", "ZeroFilled"]

_EDGE = 0.1  # a fair edge of a normalised image
_HOLD = 0.06  # least penalty ρ on ∇x - d


class ZeroFilled(Reconstructor):
    """x̂ = Aᴴ y, or Aᴴ W y off the grid: what was not measured is taken for zero. Nothing to set, so it has no dials."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments = {}

    def forward(self, y: Tensor, A: LinearOperator) -> Reconstruction:
        x = _first_image(y, A)
        return Reconstruction(image=x, residual=data_residual(x, y, A))


class Sense(Reconstructor):
    """Least squares with a weight on the energy of the image, R(x) = ½‖x‖², by conjugate gradients.

    Arguments:
        iterations: at most; each costs one AᴴA.
        tolerance: on the relative residual of the normal equations.

    Source: K. P. Pruessmann, M. Weiger, P. Börnert, P. Boesiger, "Advances in sensitivity encoding with
    arbitrary k-space trajectories" (2001).
    """

    def __init__(self, *, iterations: int = 100, tolerance: float = 1e-4) -> None:
        super().__init__()
        self.arguments = _checked(iterations, tolerance)

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        lam: Annotated[
            float,
            Dial(
                sentence="weight of the energy of the image against the data",
                default=0.02, lo=1e-4, hi=1.0, scale="log", low="noisy", high="dark",
            ),
        ] = 0.02,
    ) -> Reconstruction:  # fmt: skip
        number = _number(lam)
        b = A.H(y)
        x0 = _first_image(y, A, b)
        start = None if x0 is b else x0
        solution = solvers.cg(lambda x: A.gram(x) + lam * x, b, start, **self.arguments)
        return _reconstruction(solution, y, A, number, self.arguments["tolerance"])


class TotalVariation(Reconstructor):
    """R(x) = Σ |∇x|, piecewise smooth images: ADMM on d = ∇x.

    Arguments:
        iterations: at most; each costs one AᴴA.
        tolerance: on the relative change of the image from one round of three iterations to the next.

    Sources: L. Rudin, S. Osher, E. Fatemi, "Nonlinear total variation based noise removal algorithms" (1992);
    K. T. Block, M. Uecker, J. Frahm, "Undersampled radial MRI with multiple coils" (2007).
    """

    def __init__(self, *, iterations: int = 200, tolerance: float = 3e-4) -> None:
        super().__init__()
        self.arguments = _checked(iterations, tolerance)

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        lam: Annotated[
            float,
            Dial(
                sentence="weight of the total variation against the data",
                default=0.004, lo=1e-4, hi=0.1, scale="log", low="noisy", high="cartoon",
            ),
        ] = 0.004,
    ) -> Reconstruction:  # fmt: skip
        number = _number(lam)
        # ADMM thresholds ∇x by lam / ρ: held at one edge, it converges well over the whole range of lam. Raw scans of one
        # coil or with lines missing are ill-conditioned: there this is several times as quick as an edge of 0.02. A small lam
        # fits noise in the end; a firmer hold is slower about it, and raw scans are the better for it after 100 iterations.
        b, rho = A.H(y), lam / _EDGE if number > _EDGE * _HOLD else _HOLD
        solution = solvers.admm(
            A.gram,
            b,
            gradient,
            lambda p: -divergence(p),
            lambda p: regularisers.shrink_field(p, lam / rho),
            _first_image(y, A, b),
            rho=rho,
            **self.arguments,
        )
        return _reconstruction(solution, y, A, number, self.arguments["tolerance"])


class Wavelet(Reconstructor):
    """R(x) = ‖W x‖₁, W orthonormal wavelets, cycle-spun: FISTA that draws new shifts in every iteration.

    The proximal map is the mean over two shifts of opposite parity: together they see every pixel in both
    phases of the finest level, which takes out most of the noise that random shifts bring along.

    Arguments:
        iterations: each costs one AᴴA.
        tolerance: on the relative change of the mean image from the third to the last quarter of the iterations.
        wavelet: "haar", "db2" or "db4".
        seed: of the shifts.

    Sources: M. Lustig, D. Donoho, J. Pauly, "Sparse MRI" (2007); M. A. T. Figueiredo, R. D. Nowak, "An EM
    algorithm for wavelet-based image restoration" (2003), for random shifts.
    """

    def __init__(self, *, iterations: int = 100, tolerance: float = 1e-2, wavelet: str = "db2", seed: int = 0) -> None:
        super().__init__()
        if wavelet not in WAVELETS:
            raise errors.BadOption(f"found {wavelet!r}", key="wavelet", help=errors.did_you_mean(wavelet, WAVELETS))
        self.arguments = _checked(iterations, tolerance) | {"wavelet": wavelet, "seed": seed}

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        lam: Annotated[
            float,
            Dial(
                sentence="weight of the wavelet coefficients against the data",
                default=0.005, lo=1e-4, hi=0.1, scale="log", low="noisy", high="blurred",
            ),
        ] = 0.005,
    ) -> Reconstruction:  # fmt: skip
        number = _number(lam)
        sparsity = regularisers.Wavelet(wavelet=self.arguments["wavelet"])
        generator = torch.Generator().manual_seed(self.arguments["seed"])
        b = A.H(y)
        size = torch.tensor(b.shape[-2:])

        def prox(v: Tensor, tau: Tensor) -> Tensor:
            first, second = (torch.rand(2, 2, generator=generator) * size).long()
            second = second - (second - first + 1) % 2  # the other parity
            return (sparsity.prox(v, tau * lam, _pair(first)) + sparsity.prox(v, tau * lam, _pair(second))) / 2

        # New shifts keep the image moving a little for ever, so only the drift of its mean tells whether it arrived.
        n = self.arguments["iterations"]
        earlier, later = torch.zeros_like(b), torch.zeros_like(b)

        def watch(status: solvers.Status) -> None:
            nonlocal earlier, later
            if status.iteration > n - n // 4:
                later = later + status.value.detach()
            elif status.iteration > n - 2 * (n // 4):
                earlier = earlier + status.value.detach()

        x0, step = _first_image(y, A, b), torch.ones(())
        if x0 is not b:  # off the grid: AᴴA is as large as the centre is oversampled
            with torch.no_grad():
                step = 1 / solvers.power_iteration(A.gram, x0, iterations=8).clamp(min=1)
        # With a step so short the image moves less than new shifts move it, and momentum only seems to point uphill.
        solution = solvers.fista(
            lambda x: A.gram(x) - b, prox, x0, iterations=n, step=step, tolerance=0, restart=x0 is b, callback=watch
        )
        drift = _norm(later - earlier) / _norm(later).clamp(min=1e-30)
        arrived = solution.converged | ((drift <= self.arguments["tolerance"]) & (n >= 4))
        solution = replace(solution, residual=drift, converged=arrived)
        return _reconstruction(solution, y, A, number, self.arguments["tolerance"])


def _first_image(y: Tensor, A: LinearOperator, b: Tensor | None = None) -> Tensor:
    """Aᴴ W y, with W = 1 on a grid, where it is b = Aᴴ y."""
    weighted, root_y = A.preconditioned(y)
    return b if weighted is A and b is not None else weighted.H(root_y)


def _norm(x: Tensor) -> Tensor:
    return x.abs().square().sum((-2, -1)).sqrt()


def _pair(shift: Tensor) -> tuple[int, int]:
    return int(shift[0]), int(shift[1])


def _checked(iterations: int, tolerance: float) -> dict[str, int | float]:
    if iterations < 1:
        raise errors.BadOption(f"found {iterations}, expected at least 1", key="iterations")
    if not 0 <= tolerance < 1:
        raise errors.BadOption(
            f"found {tolerance}, expected a number in [0, 1)", key="tolerance", help="0: never stop early"
        )
    return {"iterations": iterations, "tolerance": tolerance}


def _number(lam: float | Tensor) -> float:
    """The weight as a plain number, also where its derivative is wanted.

    Raises:
        BadOption: negative or not finite.
    """
    number = float(lam.detach()) if isinstance(lam, Tensor) else float(lam)
    if not 0 <= number < float("inf"):
        raise errors.BadOption(f"found {number:g}, expected a finite number ≥ 0", key="lam")
    return number


def _reconstruction(
    solution: solvers.Solution, y: Tensor, A: LinearOperator, lam: float, tolerance: float
) -> Reconstruction:
    x, worst = solution.value, float(solution.residual.max())
    unfinished = f"stopped after {solution.iterations} iterations at {worst:.1e}, above the tolerance {tolerance:.0e}"
    return Reconstruction(
        image=x,
        status="converged" if bool(solution.converged.all()) else unfinished,
        stats={"iterations": solution.iterations, "change": worst},
        dials={"lam": lam},
        residual=data_residual(x, y, A),
    )
