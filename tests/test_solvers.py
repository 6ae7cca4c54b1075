"""Solvers against exact solutions, and the ways in which they may end."""

from __future__ import annotations

import pytest
import torch

from laws import random, relative
from tunemri.solvers import admm, cg, fista, power_iteration


def spd(n: int = 12, batch: int = 3, smallest: float = 0.1) -> torch.Tensor:
    """Hermitian positive definite matrices with known extreme eigenvalues."""
    q = torch.linalg.qr(random((batch, n, n), torch.complex128))[0]
    return (q * torch.linspace(smallest, 1, n)) @ q.mH


def times(matrix: torch.Tensor):
    return lambda x: (matrix @ x[..., None])[..., 0]


def soft(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return v * (1 - t / v.abs().clamp(min=1e-300)).clamp(min=0)


def test_cg_finds_the_solution():
    g, b = spd(), random((3, 12), torch.complex128, seed=1)
    solution = cg(times(g), b, iterations=60, tolerance=1e-12)
    assert relative(solution.value, torch.linalg.solve(g, b)) < 1e-10
    assert bool(solution.converged.all())
    assert solution.iterations < 60


def test_cg_after_exact_convergence_stays_finite():
    b = random((2, 8))
    solution = cg(lambda x: x, b, iterations=50, tolerance=0.0)
    assert relative(solution.value, b) < 1e-6
    assert bool(solution.residual.isfinite().all())


def test_cg_from_the_solution_makes_no_step():
    g, b = spd(), random((3, 12), torch.complex128)
    solution = cg(times(g), b, torch.linalg.solve(g, b), iterations=9)
    assert solution.iterations == 0
    assert bool(solution.converged.all())


def test_cg_on_a_singular_system_ends_finite_and_says_so():
    singular = spd(smallest=0.0)
    solution = cg(times(singular), random((3, 12), torch.complex128), iterations=40, tolerance=1e-8)
    assert bool(torch.view_as_real(solution.value).isfinite().all())
    assert not solution.converged.any()
    zero = cg(torch.zeros_like, random((2, 5)), iterations=5)
    assert not zero.value.any()


def test_cg_with_a_spoilt_sample_leaves_the_others_alone():
    g, b = spd(), random((3, 12), torch.complex128)
    good = cg(times(g), b, iterations=60, tolerance=1e-10)
    b[1] = complex("nan")
    bad = cg(times(g), b, iterations=60, tolerance=1e-10)
    for i in (0, 2):
        assert relative(bad.value[i], good.value[i]) < 1e-9
    assert bad.converged.tolist() == [True, False, True]


def test_cg_is_differentiable_through_a_finished_sample():
    g, b = spd(), random((3, 12), torch.complex128)
    b[1] = 0
    b.requires_grad_()
    cg(times(g), b, iterations=30, tolerance=1e-10).value.abs().square().sum().backward()
    exact = torch.linalg.inv(g) @ torch.linalg.solve(g, b.detach())[..., None] * 2
    assert b.grad is not None
    assert relative(b.grad, exact[..., 0]) < 1e-6


@pytest.mark.parametrize("restart", [True, False])
def test_fista_meets_the_conditions_of_the_optimum(restart):
    g, b, lam = spd(), random((3, 12), torch.complex128), 0.5
    s = fista(
        lambda x: times(g)(x) - b, lambda v, t: soft(v, t * lam), torch.zeros_like(b),
        iterations=3000, tolerance=1e-13, restart=restart,
    )  # fmt: skip
    slope = b - times(g)(s.value)  # must lie in lam · ∂|x|
    assert float(slope.abs().max()) <= lam * (1 + 1e-6)
    inside = s.value.abs() > 1e-6
    assert bool(inside.any())
    assert not bool(inside.all())
    assert relative(slope[inside], (lam * s.value / s.value.abs())[inside]) < 1e-6


def test_fista_with_too_long_a_step_gets_there_all_the_same():
    g, b = 50 * spd(), random((3, 12), torch.complex128)
    s = fista(lambda x: times(g)(x) - b, lambda v, t: v, torch.zeros_like(b), iterations=2000, tolerance=1e-12)
    assert relative(s.value, torch.linalg.solve(g, b)) < 1e-8


def test_fista_without_anything_to_do_ends_at_once():
    s = fista(torch.zeros_like, lambda v, t: v, torch.zeros(2, 4, 4), iterations=50)
    assert s.iterations == 1
    assert bool(s.converged.all())


def test_admm_agrees_with_fista_whatever_rho():
    g, b, lam = spd(), random((3, 12), torch.complex128), 0.5
    exact = fista(
        lambda x: times(g)(x) - b, lambda v, t: soft(v, t * lam), torch.zeros_like(b), iterations=3000, tolerance=1e-14
    ).value
    for rho in (0.1, 1.0, 10.0):
        threshold = torch.tensor(lam / rho)
        s = admm(
            times(g), b, lambda x: x, lambda d: d, lambda w, t=threshold: soft(w, t), torch.zeros_like(b),
            rho=rho, iterations=5000, tolerance=1e-13,
        )  # fmt: skip
        assert relative(s.value, exact) < 1e-5, rho


def test_iterations_are_the_applications_that_were_paid_for():
    g, b = spd(), random((3, 12), torch.complex128)
    for n in (1, 2, 7, 30):
        calls = []

        def counted(x, calls=calls):
            calls.append(1)
            return times(g)(x)

        a = admm(
            counted, b, lambda x: x, lambda d: d, lambda w: soft(w, torch.tensor(0.1)), b,
            rho=1.0, iterations=n, tolerance=0.0,
        )  # fmt: skip
        assert len(calls) <= n
        assert a.iterations == n
        calls.clear()
        assert (
            fista(lambda x: counted(x) - b, lambda v, t: soft(v, 0.1 * t), b, iterations=n, tolerance=0.0).iterations
            == n
        )
        assert len(calls) == n
        calls.clear()
        assert cg(counted, b, iterations=min(n, 5), tolerance=0.0).iterations == len(calls) == min(n, 5)


@pytest.mark.parametrize("solver", ["cg", "fista", "admm"])
def test_a_batch_is_its_samples_one_by_one(solver):
    g, b = spd(), random((3, 12), torch.complex128) * torch.tensor([[1.0], [1e-3], [1e3]])

    def solve(g, b):
        if solver == "cg":
            return cg(times(g), b, iterations=50, tolerance=1e-3)
        if solver == "fista":
            return fista(lambda x: times(g)(x) - b, lambda v, t: soft(v, 0.1 * t), b, iterations=100, tolerance=1e-3)
        return admm(
            times(g), b, lambda x: x, lambda d: d, lambda w: soft(w, torch.tensor(0.1)), b, rho=1.0, iterations=100
        )

    together = solve(g, b)
    for i in range(3):
        alone = solve(g[i : i + 1], b[i : i + 1])
        assert relative(alone.value, together.value[i : i + 1]) < 1e-12
        assert bool(alone.converged) == bool(together.converged[i])


@pytest.mark.parametrize("solver", ["cg", "fista", "admm"])
def test_a_callback_sees_every_iteration_and_may_stop(solver):
    g, b = spd(), random((3, 12), torch.complex128)
    seen = []

    def watch(status):
        seen.append(status.iteration)
        assert status.value.shape == b.shape
        assert status.residual.shape == (3,)
        return len(seen) == 3

    common = {"tolerance": 0.0, "callback": watch, "iterations": 50}
    if solver == "cg":
        s = cg(times(g), b, **common)
    elif solver == "fista":
        s = fista(lambda x: times(g)(x) - b, lambda v, t: v, torch.zeros_like(b), **common)
    else:
        s = admm(
            times(g), b, lambda x: x, lambda d: d, lambda w: soft(w, torch.tensor(0.1)), b, rho=1.0, inner=4, **common
        )
    assert seen == ([1, 2, 3] if solver != "admm" else [5, 9, 13])
    assert s.iterations == seen[-1]


def test_power_iteration_finds_the_largest_eigenvalue():
    largest = power_iteration(times(spd()), random((3, 12), torch.complex128), iterations=300)
    torch.testing.assert_close(largest, torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)
    assert not power_iteration(torch.zeros_like, random((2, 4)), iterations=3).any()
