"""Iterative solvers as functions of callables: conjugate gradients, ADMM, FISTA, power iteration.

Axis 0 counts independent problems: each has its own step, its own momentum and its own end, so a batch gives
what its samples give one by one. Everything is differentiable by unrolling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Callback", "Solution", "Status", "admm", "cg", "fista", "power_iteration"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a callback sees after an iteration.

    Arguments:
        iteration: counted from 1.
        value: the iterate `(B, *)`.
        residual: `(B,)`, the quantity that is compared with the tolerance.
    """

    iteration: int
    value: Tensor
    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where a solver ended.

    Arguments:
        value: the last iterate `(B, *)`.
        iterations: how many were made, by the problem that took most.
        converged: `(B,)` bool.
        residual: `(B,)` of the last iteration, the quantity that is compared with the tolerance.
    """

    value: Tensor
    iterations: int
    converged: Tensor
    residual: Tensor


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
