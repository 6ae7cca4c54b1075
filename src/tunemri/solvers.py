"""Iterative solvers as functions of callables.

    cg · admm · fista · power_iteration      convex problems, differentiable by unrolling
    apgd · ipalm                             smooth energies without convexity: descent is checked at every step
    langevin · markov · Moments              chains that draw from exp(-E), and what is known of them
    AdaBelief                                an optimiser of weights that torch lacks

Axis 0 counts independent problems: each has its own step, its own momentum and its own end, so a batch gives
what its samples give one by one. Of chains, axis 0 counts the chains of one problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import errors

__all__ = [
    "AdaBelief",
    "Block",
    "Callback",
    "Chains",
    "Moments",
    "Solution",
    "Status",
    "admm",
    "apgd",
    "cg",
    "fista",
    "ipalm",
    "langevin",
    "markov",
    "power_iteration",
]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a callback sees after an iteration.

    Arguments:
        iteration: counted from 1.
        value: the iterate `(B, *)`.
        residual: `(B,)`, the quantity that is compared with the tolerance.
        energy: `(B,)` double, the objective, of the solvers that evaluate it.
    """

    iteration: int
    value: Tensor
    residual: Tensor
    energy: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where a solver ended.

    Arguments:
        value: the last iterate `(B, *)`.
        iterations: how many were made, by the problem that took most.
        converged: `(B,)` bool.
        residual: `(B,)` of the last iteration, the quantity that is compared with the tolerance.
        energy: `(iterations + 1, B)` double, the objective from the start on, of the solvers that evaluate it.
        step: `(B,)`, the length with which the next step would begin, of the solvers that adapt it.
        before, age: the iterate before the last, and for how many steps inertia has built up, `(B,)`; of the same.
    """

    value: Tensor
    iterations: int
    converged: Tensor
    residual: Tensor
    energy: Tensor | None = None
    step: Tensor | None = None
    before: Tensor | None = None
    age: Tensor | None = None


Callback = Callable[[Status], bool | None]  # returning True stops the solver


def cg(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    x0: Tensor | None = None,
    *,
    iterations: int,
    tolerance: float = 1e-6,
    callback: Callback | None = None,
) -> Solution:
    """Solve G x = b for a self-adjoint positive (semi)definite G by conjugate gradients.

    A problem ends when ‖b - G x‖ ≤ tolerance · ‖b‖, or when its search direction has no curvature left.

    Arguments:
        apply: x ↦ G x on `(B, *)`.
        b: right-hand sides `(B, *)`, real or complex.
        x0: start, zero if None.

    Source: M. R. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """
    x = torch.zeros_like(b) if x0 is None else x0
    r = b if x0 is None else b - apply(x)
    target = tolerance**2 * _dot(b, b)
    x, r, k = _cg(apply, x, r, target, iterations, lambda k, x, rr: _stops(callback, k, x, _ratio(rr, b)))
    rr = _dot(r, r)
    return Solution(value=x, iterations=k, converged=rr <= target, residual=_ratio(rr, b))


def _cg(
    apply: Callable[[Tensor], Tensor],
    x: Tensor,
    r: Tensor,
    target: Tensor,
    iterations: int,
    stop: Callable[[int, Tensor, Tensor], bool] = lambda k, x, rr: False,
) -> tuple[Tensor, Tensor, int]:
    """Conjugate gradients from x with residual r, until ‖r‖² ≤ target: the new x, the new r, iterations made."""
    p, rr = r, _dot(r, r)
    for k in range(1, iterations + 1):
        active = rr > target
        if not bool(active.any()):
            return x, r, k - 1
        q = apply(p)
        curvature = _dot(p, q)
        active = active & (curvature > 0)
        # A finished problem takes steps of length zero; both divisions are guarded, or its gradient would be NaN.
        alpha = _spread(_where(active, rr, curvature), x)
        x, r = x + alpha * p, r - alpha * q
        rr, rr_before = _dot(r, r), rr
        p = r + _spread(_where(active, rr, rr_before), x) * p
        if stop(k, x, rr):
            return x, r, k
    return x, r, iterations


def admm(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    K: Callable[[Tensor], Tensor],
    K_adjoint: Callable[[Tensor], Tensor],
    prox: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    rho: float | Tensor,
    iterations: int,
    inner: int = 3,
    tolerance: float = 1e-3,
    callback: Callback | None = None,
) -> Solution:
    """Minimise ½⟨x, G x⟩ - Re⟨b, x⟩ + g(K x) by the alternating direction method of multipliers.

        x ← argmin_x ½⟨x, G x⟩ - Re⟨b, x⟩ + ρ/2 ‖K x - d + u‖²    (a few conjugate gradient steps from the last x)
        d ← prox(K x + u),    u ← u + K x - d

    A problem ends when one round changes x by no more than tolerance · ‖x‖. Convergence does not hang on rho.

    Arguments:
        apply: x ↦ G x on `(B, *)`, self-adjoint and positive semidefinite.
        b, x0: `(B, *)`.
        K, K_adjoint: a linear map and its adjoint.
        prox: w ↦ argmin_d ½‖d - w‖² + g(d) / ρ.
        iterations: applications of G in all, and what is counted; rounds of `inner` steps are made of them.

    Source: S. Boyd, N. Parikh, E. Chu, B. Peleato, J. Eckstein, "Distributed optimization and statistical
    learning via the alternating direction method of multipliers" (2011).
    """

    def normal(x: Tensor) -> Tensor:
        return apply(x) + rho * K_adjoint(K(x))

    x, k = x0, 1
    change = torch.full_like(_dot(b, b), torch.inf)
    done = torch.zeros_like(change, dtype=torch.bool)
    w = K(x)
    d = prox(w)
    u = w - d
    r = b + rho * K_adjoint(d - u) - normal(x)
    while k < iterations and not bool(done.all()):
        # Solve no more exactly than the next round can use.
        steps = min(inner, iterations - k)
        x_next, r, _ = _cg(normal, x, r, 1e-4 * _dot(r, r), steps)
        k += steps
        x_next = torch.where(_spread(done, x), x, x_next) if bool(done.any()) else x_next
        move = x_next - x
        size = (_dot(move, move) / _nonzero(_dot(x_next, x_next))).detach().sqrt()
        change = torch.where(done, change, size)
        done = done | (change <= tolerance)
        Kx, d_before, u_before = K(x_next), d, u
        d = prox(Kx + u)
        u = u + Kx - d
        # The system keeps its matrix: its residual moves with the right-hand side, no application of G spent.
        r = r + rho * K_adjoint((d - u) - (d_before - u_before))
        x = x_next
        if _stops(callback, k, x, change):
            break
    return Solution(value=x, iterations=k, converged=done, residual=change)


def fista(
    gradient: Callable[[Tensor], Tensor],
    prox: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    *,
    iterations: int,
    step: float | Tensor = 1.0,
    tolerance: float = 1e-4,
    restart: bool = True,
    callback: Callback | None = None,
) -> Solution:
    """Minimise f(x) + g(x), f smooth and g with a proximal map, by accelerated proximal gradients.

        x_k = prox(z_k - τ ∇f(z_k), τ),    z_{k+1} = x_k + (t_k - 1) / t_{k+1} (x_k - x_{k-1})

    A problem ends when ‖x_k - x_{k-1}‖ ≤ tolerance · ‖x_k‖. Its step τ shrinks whenever the gradients met show
    more curvature than 1 / τ, so a wrong guess of the Lipschitz constant slows it down instead of spoiling it.

    Arguments:
        gradient: z ↦ ∇f(z) on `(B, *)`.
        prox: (v, τ) ↦ argmin_u ½‖u - v‖² + τ g(u), with τ `(B, 1, …)` one per problem.
        step: first τ, one or `(B,)`; at most 1 / L for an L-Lipschitz ∇f.
        restart: drop the momentum where it points uphill.

    Sources: A. Beck, M. Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse
    problems" (2009); B. O'Donoghue, E. Candès, "Adaptive restart for accelerated gradient schemes" (2015).
    """
    x = z = x0
    tau = x0.real.new_ones(x0.shape[0]) * step
    t, change = torch.ones_like(tau), torch.full_like(tau, torch.inf)
    done = torch.zeros_like(tau, dtype=torch.bool)
    before: tuple[Tensor, Tensor] | None = None
    k = 0
    for k in range(1, iterations + 1):
        slope = gradient(z)
        if before is not None:
            curvature = _curvature(z.detach() - before[0], slope.detach() - before[1], z.detach())
            tau = torch.where(curvature * tau > 1.05, 1 / _nonzero(curvature), tau)
        before = z.detach(), slope.detach()
        u = prox(z - _spread(tau, z) * slope, _spread(tau, z))
        u = torch.where(_spread(done, u), x, u) if bool(done.any()) else u
        d = u - x
        size = _dot(d.detach(), d.detach()).sqrt()
        change = torch.where(done, change, size / _nonzero(_dot(u.detach(), u.detach()).sqrt()))
        done = done | (change <= tolerance)
        if restart:
            uphill = _dot((z - u).detach(), d.detach()) > 0
            t = torch.where(uphill, torch.ones_like(t), t)
        t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
        z, x, t = u + _spread((t - 1) / t_next, u) * d, u, t_next
        if _stops(callback, k, x, change) or bool(done.all()):
            break
    return Solution(value=x, iterations=k, converged=done, residual=change)


def apgd(
    energy: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    x0: Tensor,
    *,
    prox: Callable[[Tensor, Tensor], Tensor] | None = None,
    penalty: Callable[[Tensor], Tensor] | None = None,
    step: float | Tensor = 1.0,
    iterations: int,
    tolerance: float = 1e-4,
    slack: tuple[float, float] = (1e-12, 1e-6),
    tries: int = 12,
    callback: Callback | None = None,
    after: Solution | None = None,
) -> Solution:
    """Minimise f(x) + g(x), f smooth and not necessarily convex, by accelerated proximal gradients that descend.

    `ipalm` with one block: see there for the step, the meaning of every argument, and what is raised.

    Arguments:
        energy: x ↦ f(x) `(B,)` on `(B, *)`.
        gradient: x ↦ (f(x), ∇f(x)), `(B,)` and `(B, *)`; of complex x, ∂f/∂Re x + i ∂f/∂Im x.
        prox, penalty, step, after: as of a `Block`.

    Returns:
        a Solution with its `energy`, which never increases, and its last `step`.
    """
    block = Block(start=x0, prox=prox, penalty=penalty, step=step, after=after)
    return ipalm(
        energy, lambda _, x: gradient(x), [block], iterations=iterations, tolerance=tolerance, slack=slack,
        tries=tries, callback=callback,
    )[0]  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One group of unknowns of `ipalm`.

    Arguments:
        start: `(B, *)`, real or complex, any shape after axis 0.
        prox: (v, τ) ↦ argmin_u ½‖u - v‖² + τ g(u), with τ `(B, 1, …)` one per problem; None: g = 0.
        penalty: u ↦ g(u) `(B,)`; None: zero wherever `prox` lands, as of the indicator of a set.
        step: first τ, one or `(B,)`; any guess will do.
        longest: what no step shall exceed.
        after: an earlier run, of a similar problem, that ended at `start`: its inertia is kept.
    """

    start: Tensor
    prox: Callable[[Tensor, Tensor], Tensor] | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    step: float | Tensor = 1.0
    longest: float = math.inf
    after: Solution | None = None


@torch.no_grad()
def ipalm(
    energy: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, Tensor]],
    blocks: Sequence[Block],
    *,
    iterations: int,
    tolerance: float = 1e-4,
    slack: tuple[float, float] = (1e-12, 1e-6),
    tries: int = 12,
    callback: Callback | None = None,
) -> tuple[Solution, ...]:
    """Minimise f(x_1, …, x_n) + Σ_i g_i(x_i), one block after the other, by inertial proximal gradients that descend.

        z = x_i + β (x_i - x_i before),    u = prox_i(z - τ ∇_i f(z), τ)
        taken if  f(u) ≤ f(z) + Re⟨∇_i f(z), u - z⟩ + ‖u - z‖² / 2τ + slack   and   f(u) + g(u) ≤ f(x) + g(x)

    Where the first fails, τ is halved; where only the second does, the inertia is dropped. A step that is taken
    never raises the objective, to the last bit; τ then grows again by a quarter. Each problem decides for itself.

    A problem ends when an iteration changes no block by more than tolerance · ‖x_i‖, or when rounding hides any
    further descent: both count as converged. It stays where it is when no try succeeded, which does not.

    Arguments:
        energy: (x_1, …, x_n) ↦ f `(B,)`, the same number whenever it is asked; in double precision if possible.
        gradient: (i, x_1, …, x_n) ↦ (f, ∇_i f), `(B,)` and the shape of x_i; of complex x, ∂f/∂Re x + i ∂f/∂Im x.
            Called without autograd: a function that differentiates says `torch.enable_grad()` itself.
        blocks: start, proximal map and first step of each.
        iterations: at most; one visits every block once and costs a gradient and an energy of each, or more.
        slack: (absolute, relative to |f|): how much rounding may spoil the first condition.
        tries: candidates per block and iteration.
        callback: sees the first block, the largest change and the objective.

    Returns:
        one Solution per block, all with the same `iterations`, `converged` and `energy` `(iterations + 1, B)`.

    Raises:
        NonFinite: the energy of the start, or of every candidate, or a gradient.

    Sources: T. Pock, S. Sabach, "Inertial proximal alternating linearized minimization (iPALM) for nonconvex and
    nonsmooth problems" (2016); A. Beck, M. Teboulle, "Fast gradient-based algorithms for constrained total
    variation image denoising and deblurring problems" (2009), for the monotone step.
    """
    x = [block.start for block in blocks]
    f = energy(*x).double()
    before, age = (list(part) for part in zip(*(_inertia(block, f) for block in blocks), strict=True))
    g = [_penalty(block, block.start, f) for block in blocks]
    _require(f + sum(g), "the energy of the start")
    trace = [f + sum(g)]
    tau = [f.new_ones(len(f)) * torch.as_tensor(block.step, device=f.device) for block in blocks]
    change = torch.full((len(blocks), len(f)), torch.inf, dtype=f.dtype, device=f.device)
    done = torch.zeros_like(f, dtype=torch.bool)
    k = 0
    for k in range(1, iterations + 1):
        floor = torch.ones_like(done)  # rounding hides any descent, in every block
        for i, block in enumerate(blocks):

            def at(u: Tensor, i: int = i) -> list[Tensor]:
                return [*x[:i], u, *x[i + 1 :]]

            beta = torch.where(done, 0.0, age[i] / (age[i] + 3))
            inertial = beta > 0
            z = x[i] + _spread(beta, x[i]).to(x[i].real.dtype) * (x[i] - before[i])
            total, u_best = f + sum(g), x[i]
            f_best, g_best, moving, moved = f, g[i], ~done, True
            fits = torch.zeros_like(done)
            for _ in range(tries):
                if moved:
                    f_z, slope = gradient(i, *at(z))
                    f_z = f_z.double()
                    _require(f_z, "the energy of a trial point")
                    _require(slope, "the gradient of the energy")
                length = _spread(tau[i], z).to(z.real.dtype)
                u = z - length * slope
                u = u if block.prox is None else block.prox(u, length)
                d = u - z
                f_u, g_u = energy(*at(u)).double(), _penalty(block, u, f)
                bound = f_z + _dot(slope, d) + _dot(d, d) / (2 * tau[i])
                fits = f_u <= bound + slack[0] + slack[1] * f_z.abs()
                falls = f_u + sum([*g[:i], g_u, *g[i + 1 :]]) <= total
                taken = moving & fits & falls
                u_best = torch.where(_spread(taken, u), u, u_best)
                f_best, g_best = torch.where(taken, f_u, f_best), torch.where(taken, g_u, g_best)
                age[i] = torch.where(taken, age[i] + 1, age[i])
                moving = moving & ~taken
                if not bool(moving.any()):
                    break
                # Uphill from the extrapolated point: start again from x. Uphill from x itself, within the slack: shorter.
                dropped = moving & fits & inertial
                moved = bool(dropped.any())
                z = torch.where(_spread(dropped, z), x[i], z)
                age[i] = torch.where(dropped, 0.0, age[i])
                inertial, fits = inertial & ~dropped, fits & ~dropped
                tau[i] = torch.where(moving & ~dropped, tau[i] / 2, tau[i])
            else:
                _require(torch.where(moving, f_u, f), "the energy of every candidate")
            size = (_dot(u - x[i], u - x[i]).sqrt() / _nonzero(_dot(u, u).sqrt())).double()
            change[i] = torch.where(done, change[i], size)
            floor &= (moving & fits) | (change[i] <= tolerance) & ~moving
            tau[i] = torch.where(moving | done, tau[i], (1.25 * tau[i]).clamp(max=block.longest))
            before[i], x[i] = torch.where(_spread(moving, u), before[i], x[i]), u_best
            f, g[i] = f_best, g_best
        done = done | floor
        trace.append(f + sum(g))
        if callback is not None and bool(
            callback(Status(iteration=k, value=x[0], residual=change.amax(0), energy=trace[-1]))
        ):
            break
        if bool(done.all()):
            break
    return tuple(
        Solution(
            value=x[i],
            iterations=k,
            converged=done,
            residual=change[i],
            energy=torch.stack(trace),
            step=tau[i],
            before=before[i],
            age=age[i],
        )
        for i in range(len(blocks))
    )


def _inertia(block: Block, f: Tensor) -> tuple[Tensor, Tensor]:
    """The iterate before the start of a block, and how long inertia has built up: `(B,)`."""
    last = block.after
    if last is None or last.before is None or last.age is None:
        return block.start, torch.zeros_like(f)
    return last.before, last.age


def _penalty(block: Block, u: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if block.penalty is None else block.penalty(u).double()


def _require(value: Tensor, name: str, help: str = "smaller steps, or data of usual scale (maximum about 1)") -> None:
    """Raises NonFinite, with the number of the problem or chain, where `value` `(B, *)` is not finite."""
    finite = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    finite = finite.isfinite().flatten(1).all(1) if finite.ndim > 1 else finite.isfinite()
    if not bool(finite.all()):
        raise errors.NonFinite(f"{name} is not finite (entry {int((~finite).nonzero()[0])})", key="energy", help=help)


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Mean, variance and the mixing of chains, from draws that are seen once and forgotten.

    `moments = Moments().add(x)` for each state x `(K, *)` of K chains, real or complex. The draws of each chain are
    summed up in at most 16 batches of equal length; when those are full, neighbours are merged and the length
    doubles. Memory is that of 32 states, whatever the number of draws.

    Arguments:
        size: draws per batch.
        counts: draws in each batch; all but the last are full.
        means, squares: of each batch `(K, *)`, the mean and the sum of squared distances from it; complex
            numbers as pairs in a last axis.
        pairs: the draws were complex.

    Source for merging: T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance" (1983).
    """

    size: int = 1
    counts: tuple[int, ...] = ()
    means: tuple[Tensor, ...] = ()
    squares: tuple[Tensor, ...] = ()
    pairs: bool = False

    def add(self, x: Tensor) -> Moments:
        """With one more draw of each chain, `(K, *)`.

        Raises:
            NonFinite: before anything is added.
        """
        _require(x, "a draw", _SHORTER)
        pairs = x.is_complex()
        x = torch.view_as_real(x.detach().resolve_conj()) if pairs else x.detach()
        counts, means, squares = list(self.counts), list(self.means), list(self.squares)
        size = self.size
        if counts and counts[-1] == size and len(counts) == _BATCHES:
            merged = [_merge(counts[j : j + 2], means[j : j + 2], squares[j : j + 2]) for j in range(0, _BATCHES, 2)]
            counts, means, squares = (list(column) for column in zip(*merged, strict=True))
            size *= 2
        if counts and counts[-1] < size:
            counts[-1] += 1
            d = x - means[-1]
            means[-1] = means[-1] + d / counts[-1]
            squares[-1] = squares[-1] + d * (x - means[-1])
        else:
            counts, means, squares = [*counts, 1], [*means, x.clone()], [*squares, torch.zeros_like(x)]
        return Moments(size=size, counts=tuple(counts), means=tuple(means), squares=tuple(squares), pairs=pairs)

    @property
    def count(self) -> int:
        """Draws of each chain."""
        return sum(self.counts)

    @property
    def mean(self) -> Tensor:
        """Over all draws of all chains, `(*)`."""
        mean = self._all()[1]
        return torch.view_as_complex(mean.contiguous()) if self.pairs else mean

    @property
    def variance(self) -> Tensor:
        """Over all draws of all chains, real `(*)`; of complex draws E|x - mean|². NaN of a single draw."""
        count, _, squares = self._all()
        return self._whole(squares) / (count - 1 if count > 1 else math.nan)

    @property
    def r_hat(self) -> Tensor:
        """Split R̂ of each pixel, `(*)`: spread of all half chains together over the spread within; 1 when mixed.

            R̂² = ((n - 1) W / n + V) / W,    W mean of the variances, V variance of the means, of 2K half chains

        Of complex draws the larger of both parts. Infinite of fewer than four draws. Few draws make it large by
        chance: of 4 chains that mix perfectly, 8 draws of each leave 23 % of complex pixels above 1.1, 16 leave 4 %.

        Source: A. Gelman, J. B. Carlin, H. S. Stern, D. B. Dunson, A. Vehtari, D. B. Rubin, "Bayesian data
        analysis", third edition (2013).
        """
        if self.count < 4:
            mean = self._all()[1]
            return torch.full_like(mean[..., 0] if self.pairs else mean, torch.inf)
        half = (len(self.counts) + 1) // 2 if self.counts[-1] < self.size else len(self.counts) // 2
        halves = [
            _merge(self.counts[part], self.means[part], self.squares[part]) for part in (slice(half), slice(half, None))
        ]
        n = self.count / 2
        means = torch.cat([mean for _, mean, _ in halves])
        within = torch.cat([squares / max(count - 1, 1) for count, _, squares in halves]).mean(0)
        between = means.var(0)
        still = torch.where(between > 0, torch.inf, 1.0).to(within)  # no spread within: all the same, or stuck apart
        ratio = torch.where(within > 0, (n - 1) / n + between / _nonzero(within), still).sqrt()
        return ratio.amax(-1) if self.pairs else ratio

    @property
    def effective(self) -> Tensor:
        """How many independent draws the mean of each pixel is worth, `(*)`, at most as many as were made.

            K V / max(B / m, C),    B variance of the m batch means in their chain, C variance of the K chain means

        with V the variance of all draws. Batch means tell how slowly a chain forgets; where whole chains
        disagree more than that, the chains count. Zero before two batches are full.
        """
        full = [mean for count, mean in zip(self.counts, self.means, strict=True) if count == self.size]
        if len(full) < 2:
            return torch.zeros_like(self.variance)
        batches = torch.stack(full)
        m, k = batches.shape[:2]
        error = self._whole(batches.var(0).mean(0)) / m
        if k > 1:
            error = torch.maximum(error, self._whole(batches.mean(0).var(0)))
        most = self.count * k
        independent = k * self.variance / _nonzero(error)
        return torch.where(error > 0, independent, most).clamp(max=most)

    def _all(self) -> tuple[int, Tensor, Tensor]:
        """Count, mean and squares over batches and chains."""
        if not self.counts:
            raise errors.NoData("no draw was made", key="samples", help="more samples, or a shorter burn-in")
        count, means, squares = _merge(self.counts, self.means, self.squares)
        return _merge([count] * len(means), list(means), list(squares))

    def _whole(self, squares: Tensor) -> Tensor:
        return squares.sum(-1) if self.pairs else squares


_BATCHES = 16  # even; 8 to 16 batch means tell the error of a mean to a quarter or better
_SHORTER = "shorter steps; or a prior, a weight and data that fit together"


def _merge(counts: Sequence[int], means: Sequence[Tensor], squares: Sequence[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Count, mean and sum of squared distances of groups taken together."""
    n, mean, square = counts[0], means[0], squares[0]
    for m, other, spread in zip(counts[1:], means[1:], squares[1:], strict=True):
        d = other - mean
        square = square + spread + d * d * (n * m / (n + m))
        mean = mean + d * (m / (n + m))
        n += m
    return n, mean, square


@dataclass(frozen=True, kw_only=True, eq=False)
class Chains:
    """Where chains ended and what they drew.

    Arguments:
        last: the last state of each chain, `(K, *)`.
        moments: of the draws after the burn-in.
        moves: made by each chain, burn-in included.
        energy: `(draws, K)` double, of the state from which each counted move set out; NaN where `move` gave none.
        stopped: the callback ended the chains early.
    """

    last: Tensor
    moments: Moments
    moves: int
    energy: Tensor
    stopped: bool


@torch.no_grad()
def markov(
    move: Callable[[int, Tensor], tuple[Tensor, Tensor | None]],
    x0: Tensor,
    *,
    samples: int,
    burn_in: int = 0,
    thin: int = 1,
    observe: Callable[[Tensor], Tensor] | None = None,
    limit: float = math.inf,
    callback: Callable[[int, Moments], bool | None] | None = None,
) -> Chains:
    """Run several chains side by side and sum up their draws.

    Arguments:
        move: (k, x) ↦ (next x, energy of x `(K,)` or None), k counted from 1; called without autograd.
        x0: one start per chain `(K, *)`.
        samples: draws of each chain that count, ≥ 1.
        burn_in: moves before the first of them.
        thin: moves from one to the next.
        observe: x ↦ what is summed up, `(K, *)`: `torch.abs` for statistics of magnitudes; None: x itself.
        limit: |x| beyond which a chain counts as diverged.
        callback: sees the number of moves made and the moments so far (`count` 0 during burn-in); True stops and
            keeps what there is.

    Raises:
        NonFinite: a state or an energy that is not finite, or a state beyond `limit`, at the move where it happens.
        BadOption: samples, burn_in or thin out of range.
    """
    for name, number, least in (("samples", samples, 1), ("burn_in", burn_in, 0), ("thin", thin, 1)):
        if number < least:
            raise errors.BadOption(f"found {number}, expected a whole number ≥ {least}", key=name)
    x, moments, energies, stopped = x0, Moments(), [], False
    unknown = torch.full((len(x0),), math.nan, dtype=torch.float64, device=x0.device)
    k = 0
    for k in range(1, burn_in + samples * thin + 1):
        x, energy = move(k, x)
        if energy is not None:
            _require(energy, f"the energy at move {k}", _SHORTER)
        _require(x, f"the state after move {k}", _SHORTER)
        if limit < math.inf and float(x.abs().max()) > limit:
            raise errors.NonFinite(
                f"a chain diverged: |x| exceeds {limit:g} after move {k}", key="energy", help=_SHORTER
            )
        if k > burn_in and (k - burn_in) % thin == 0:
            moments = moments.add(x if observe is None else observe(x))
            energies.append(unknown if energy is None else energy.double())
        if callback is not None and bool(callback(k, moments)):
            stopped = k < burn_in + samples * thin
            break
    trace = torch.stack(energies) if energies else unknown.new_empty(0, len(x0))
    return Chains(last=x, moments=moments, moves=k, energy=trace, stopped=stopped)


def langevin(
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    x0: Tensor,
    *,
    step: float | Tensor | Callable[[int], float | Tensor],
    samples: int,
    generator: torch.Generator,
    burn_in: int = 0,
    thin: int = 1,
    temperature: float = 1.0,
    precondition: Callable[[Tensor], Tensor] | None = None,
    root: Callable[[Tensor], Tensor] | None = None,
    observe: Callable[[Tensor], Tensor] | None = None,
    limit: float = math.inf,
    callback: Callable[[int, Moments], bool | None] | None = None,
) -> Chains:
    """Draw from exp(-E / T) by the unadjusted Langevin algorithm, several chains at once.

        x ← x - τ M ∇E(x) + √(2 τ T) M^½ ξ,    ξ white

    Without a rejection step the draws are biased by the order of τ: where E has curvature a, their variance is
    T / a / (1 - τ a / 2) instead of T / a, and they diverge for τ a > 2.

    Arguments:
        gradient: x ↦ (E(x) `(K,)`, ∇E(x) `(K, *)`); of complex x, ∂E/∂Re x + i ∂E/∂Im x. Called without autograd.
        x0: one start per chain `(K, *)`.
        step: τ, one number, a tensor that spreads over x, or a function of the move, counted from 1, that
            gives one of these: for annealing.
        generator: of all randomness; the same seed gives the same draws.
        temperature: T ≥ 0; at 0 the chains descend.
        precondition, root: d ↦ M d and ξ ↦ R ξ with R Rᴴ = M, a positive definite M that is constant in x; or both None.
        samples, burn_in, thin, observe, limit, callback: as of `markov`.

    Raises:
        as `markov`; BadOption: a step or temperature that is not positive, or one of `precondition` and `root` alone.

    Source: G. O. Roberts, R. L. Tweedie, "Exponential convergence of Langevin distributions and their discrete
    approximations" (1996).
    """
    if (precondition is None) != (root is None):
        raise errors.BadOption("found one of the two, expected both or neither", key="precondition, root")
    if not 0 <= temperature < math.inf:
        raise errors.BadOption(f"found {temperature:g}, expected a finite number ≥ 0", key="temperature")

    def move(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        tau = torch.as_tensor(step(k) if callable(step) else step, dtype=x.real.dtype, device=x.device)
        if not bool((tau > 0).all()):
            raise errors.BadOption(f"found {float(tau.min()):g} at move {k}, expected a number > 0", key="step")
        energy, slope = gradient(x)
        noise = torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
        if x.is_complex():
            noise = noise * math.sqrt(2)  # unit variance of each part
        if precondition is not None and root is not None:
            slope, noise = precondition(slope), root(noise)
        return x - tau * slope + (2 * temperature * tau).sqrt() * noise, energy

    return markov(
        move, x0, samples=samples, burn_in=burn_in, thin=thin, observe=observe, limit=limit, callback=callback
    )


class AdaBelief(torch.optim.Optimizer):
    """Adam whose step is short where the gradient is not the one expected.

        m ← β₁ m + (1 - β₁) g,    s ← β₂ s + (1 - β₂) (g - m)² + ε,    w ← w - lr · m̂ / (√ŝ + ε)

    with m̂, ŝ divided by 1 - βᵗ. ε is added twice, as in the authors' program: once in each step to s, and to the root.

    Arguments:
        params: as of every torch optimiser.
        lr: > 0.
        betas: (β₁, β₂), in [0, 1).
        eps: ε > 0.

    Source: J. Zhuang, T. Tang, Y. Ding, S. Tatikonda, N. Dvornek, X. Papademetris, J. S. Duncan, "AdaBelief
    optimizer: adapting stepsizes by the belief in observed gradients" (2020).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
    ) -> None:
        if not (lr > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise errors.BadOption(f"found lr {lr}, betas {betas}, eps {eps}", key="optimizer")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every weight that has a gradient; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(w), belief=torch.zeros_like(w))
                state["step"] += 1
                state["mean"].lerp_(w.grad, 1 - beta1)
                surprise = w.grad - state["mean"]
                state["belief"].mul_(beta2).addcmul_(surprise, surprise, value=1 - beta2).add_(eps)
                step = int(state["step"])  # a tensor, once it was saved
                root = (state["belief"] / (1 - beta2**step)).sqrt_().add_(eps)
                w.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - beta1**step))
        return loss


def power_iteration(apply: Callable[[Tensor], Tensor], x0: Tensor, *, iterations: int = 60) -> Tensor:
    """Largest eigenvalue `(B,)` of a self-adjoint positive semidefinite operator; a lower bound that grows.

    Arguments:
        apply: x ↦ G x on `(B, *)`.
        x0: a start that is not orthogonal to the eigenvector sought: noise.
    """
    x, size = x0, _dot(x0, x0).sqrt()
    for _ in range(iterations):
        x = apply(x / _spread(_nonzero(size), x))
        size = _dot(x, x).sqrt()
    return size


def _stops(callback: Callback | None, k: int, x: Tensor, residual: Tensor) -> bool:
    return callback is not None and bool(callback(Status(iteration=k, value=x, residual=residual)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Re ⟨a, b⟩ of each problem, `(B,)`."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return (a * b).flatten(1).sum(1)


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """`(B,)` → `(B, 1, …)` with as many axes as `like`."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))


def _where(active: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator where active, else zero."""
    safe = torch.where(active, denominator, torch.ones_like(denominator))
    return torch.where(active, numerator / safe, torch.zeros_like(numerator))


def _ratio(rr: Tensor, b: Tensor) -> Tensor:
    """‖r‖ / ‖b‖, zero where both are."""
    return (rr / _nonzero(_dot(b, b))).detach().sqrt()


def _curvature(dz: Tensor, dslope: Tensor, z: Tensor) -> Tensor:
    """‖∇f(z) - ∇f(z')‖ / ‖z - z'‖, or zero where the two are so near that rounding would decide."""
    size = _dot(dz, dz).sqrt()
    far = size > 1e-3 * _dot(z, z).sqrt()
    return torch.where(far, _dot(dslope, dslope).sqrt() / _nonzero(size), torch.zeros_like(size))
