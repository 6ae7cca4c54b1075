"""Solvers against exact solutions, and the ways in which they may end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from laws import random, relative
from tunemri.errors import BadOption, NoData, NonFinite
from tunemri.solvers import AdaBelief, Block, Moments, admm, apgd, cg, fista, ipalm, langevin, markov, power_iteration


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


def quadratic(g: Tensor, b: Tensor):
    """½⟨x, G x⟩ - Re⟨b, x⟩ and its gradient, counted."""
    calls = {"energy": 0, "gradient": 0}

    def energy(x: Tensor) -> Tensor:
        calls["energy"] += 1
        return (x.conj() * (times(g)(x) / 2 - b)).real.sum(1)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        calls["gradient"] += 1
        return (x.conj() * (times(g)(x) / 2 - b)).real.sum(1), times(g)(x) - b

    return energy, gradient, calls


def never_rises(energy: Tensor) -> bool:
    return bool((energy.diff(dim=0) <= 0).all())


@pytest.mark.parametrize("step", [1e-3, 1.0, 1e3])
def test_apgd_finds_the_minimum_whatever_the_first_step_and_never_rises(step):
    g, b = 30 * spd(), random((3, 12), torch.complex128)
    energy, gradient, _ = quadratic(g, b)
    s = apgd(energy, gradient, torch.zeros_like(b), step=step, iterations=3000, tolerance=1e-12, slack=(1e-12, 1e-12))
    assert relative(s.value, torch.linalg.solve(g, b)) < 1e-6
    assert bool(s.converged.all())
    assert s.energy is not None
    assert s.energy.shape == (s.iterations + 1, 3)
    assert never_rises(s.energy)
    torch.testing.assert_close(s.energy[-1], energy(s.value))


def test_apgd_is_faster_than_plain_descent():
    """Accelerated: about √κ iterations, not κ."""
    g, b = spd(smallest=1e-3), random((3, 12), torch.complex128)
    energy, gradient, _ = quadratic(g, b)
    s = apgd(energy, gradient, torch.zeros_like(b), iterations=400, tolerance=0.0, slack=(1e-14, 1e-14))
    best = energy(torch.linalg.solve(g, b))
    assert bool(((s.energy[-1] - best) < 1e-6 * best.abs()).all())


def test_apgd_with_a_penalty_agrees_with_fista():
    g, b, lam = spd(), random((3, 12), torch.complex128), 0.5
    energy, gradient, _ = quadratic(g, b)
    s = apgd(
        energy, gradient, torch.zeros_like(b), prox=lambda v, t: soft(v, t * lam),
        penalty=lambda u: lam * u.abs().sum(1), iterations=3000, tolerance=1e-12, slack=(1e-13, 1e-13),
    )  # fmt: skip
    exact = fista(
        lambda x: times(g)(x) - b, lambda v, t: soft(v, t * lam), torch.zeros_like(b), iterations=3000, tolerance=1e-14
    ).value
    assert relative(s.value, exact) < 1e-6
    assert s.energy is not None
    assert never_rises(s.energy)


def test_apgd_descends_without_convexity_in_single_precision():
    """A double well in every coordinate, from beside its hilltop; rounding is what ends it."""
    x0 = 0.01 * random((2, 50), torch.float32)

    def energy(x: Tensor) -> Tensor:
        return ((x * x - 1) ** 2).sum(1)

    s = apgd(energy, lambda x: (energy(x), 4 * x * (x * x - 1)), x0, step=10.0, iterations=500, tolerance=0.0)
    torch.testing.assert_close(s.value, x0.sign(), rtol=0, atol=2e-3)
    assert s.energy is not None
    assert never_rises(s.energy)
    assert bool(s.converged.all())
    assert s.iterations < 500


def test_apgd_ends_converged_where_rounding_hides_the_descent():
    """Rounding, played by a ripple that the gradient knows nothing of and the slack allows for."""

    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1) / 2 + 1e-4 * torch.sin(1e7 * x.sum(1))

    start = random((2, 5), torch.float64)
    s = apgd(energy, lambda x: (energy(x), x), start, iterations=500, tolerance=0.0, slack=(1e-3, 0))
    assert bool(s.converged.all())
    assert s.iterations < 500
    assert s.step is not None
    assert float(s.step.min()) > 1e-8  # it gives up at once, not when steps underflow
    assert float(s.value.abs().max()) < 0.05
    assert s.energy is not None
    assert never_rises(s.energy)


def test_apgd_stays_and_says_so_where_no_candidate_descends():
    g, b = spd(), random((3, 12), torch.complex128)
    energy, gradient, _ = quadratic(g, b)
    s = apgd(energy, lambda x: (gradient(x)[0], -gradient(x)[1]), b, iterations=3, slack=(0, 0))
    assert torch.equal(s.value, b)
    assert not s.converged.any()


def test_a_batch_of_apgd_is_its_samples_one_by_one():
    g, b = spd() * torch.tensor([1.0, 40.0, 0.1])[:, None, None], random((3, 12), torch.complex128)

    def solve(rows: slice):
        energy, gradient, _ = quadratic(g[rows], b[rows])
        return apgd(energy, gradient, torch.zeros_like(b[rows]), iterations=200, tolerance=1e-3)

    together = solve(slice(None))
    for i in range(3):
        alone = solve(slice(i, i + 1))
        assert relative(alone.value, together.value[i : i + 1]) < 1e-12
        assert bool(alone.converged) == bool(together.converged[i])


def test_the_price_of_apgd_and_its_callback():
    g, b = spd(), random((3, 12), torch.complex128)
    energy, gradient, calls = quadratic(g, b)
    seen = []

    def watch(status):
        seen.append(status.iteration)
        assert status.energy is not None
        assert status.energy.shape == status.residual.shape == (3,)
        return len(seen) == 40

    s = apgd(energy, gradient, b, iterations=100, tolerance=0.0, callback=watch)
    assert seen == list(range(1, 41))
    assert s.iterations == 40
    assert calls["gradient"] <= 80
    assert calls["energy"] <= 120


def bilinear(y: Tensor):
    """½‖u vᵀ - y‖² for u `(B, n)`, v `(B, m)`."""

    def energy(u: Tensor, v: Tensor) -> Tensor:
        return (u[:, :, None] * v[:, None] - y).square().sum((1, 2)) / 2

    def gradient(i: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        r = u[:, :, None] * v[:, None] - y
        return energy(u, v), (r @ v[..., None])[..., 0] if i == 0 else (u[:, None] @ r)[:, 0]

    return energy, gradient


def test_ipalm_finds_the_best_rank_one_matrix():
    y = random((3, 8, 6), torch.float64) * torch.tensor([1.0, 1e2, 1e-2])[:, None, None]
    energy, gradient = bilinear(y)
    scale = y.flatten(1).norm(dim=1).sqrt()[:, None]
    starts = [Block(start=scale * random((3, n), torch.float64, n)) for n in (8, 6)]
    u, v = ipalm(energy, gradient, starts, iterations=4000, tolerance=1e-10, slack=(1e-15, 1e-13))
    left, s, right = torch.linalg.svd(y)
    best = s[:, :1, None] * left[:, :, :1] * right[:, :1]
    assert relative((u.value[:, :, None] * v.value[:, None]) / scale[..., None], best / scale[..., None]) < 1e-5
    assert u.energy is not None
    assert never_rises(u.energy)
    assert u.energy is not None
    assert u.value.shape == (3, 8)
    assert v.value.shape == (3, 6)


def test_ipalm_keeps_to_constraints_and_counts_penalties():
    """Non-negative u, and ½μ‖v‖² by its proximal map: the optimum of the positive matrix is its rank-one part, shrunk."""
    y = random((2, 8, 6), torch.float64).abs() + 0.5
    energy, gradient = bilinear(y)
    mu = 0.7
    blocks = [
        Block(start=torch.ones(2, 8, dtype=torch.float64), prox=lambda z, t: (z - mu * t).clamp(min=0),
              penalty=lambda u: mu * u.sum(1)),
        Block(start=torch.ones(2, 6, dtype=torch.float64), prox=lambda z, t: z / (1 + mu * t),
              penalty=lambda v: mu / 2 * v.square().sum(1)),
    ]  # fmt: skip
    u, v = ipalm(energy, gradient, blocks, iterations=5000, tolerance=1e-11, slack=(1e-14, 1e-14))
    assert u.energy is not None
    assert never_rises(u.energy)
    # The conditions of a stationary point, block by block.
    slope_u, slope_v = (gradient(i, u.value, v.value)[1] for i in (0, 1))
    assert float((slope_u + mu)[u.value > 0].abs().max()) < 1e-5
    assert float((slope_v + mu * v.value).abs().max()) < 1e-5
    assert bool((u.value >= 0).all())


def test_ipalm_stops_at_numbers_that_are_none():
    y = random((2, 3, 3), torch.float64)
    energy, gradient = bilinear(y)
    blocks = [Block(start=torch.ones(2, 3, dtype=torch.float64)), Block(start=torch.ones(2, 3, dtype=torch.float64))]
    with pytest.raises(NonFinite, match="energy of the start"):
        ipalm(lambda u, v: energy(u, v) * torch.tensor([1.0, torch.nan]), gradient, blocks, iterations=3)
    nan = torch.tensor([1.0, torch.nan])[:, None]
    with pytest.raises(NonFinite, match=r"gradient .*entry 1"):
        ipalm(energy, lambda i, u, v: (energy(u, v), gradient(i, u, v)[1] * nan), blocks, iterations=3)
    with pytest.raises(NonFinite, match="every candidate"):
        apgd(
            lambda x: torch.where(x.sum(1) == 2, 0.0, torch.nan), lambda x: (x.sum(1), x), torch.ones(1, 2),
            iterations=2,
        )  # fmt: skip


def gaussian(variance: Tensor, mean: Tensor):
    return lambda x: (((x - mean).abs() ** 2 / variance / 2).flatten(1).sum(1), (x - mean) / variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_langevin_has_the_moments_of_a_gaussian(dtype, preconditioned):
    variance = torch.tensor([0.2, 1.0, 1.5, 3.0]) if not preconditioned else torch.tensor([1e-3, 0.1, 10.0, 1e3])
    mean = torch.tensor([1.0, -2.0, 0.0, 5.0])
    M = variance if preconditioned else torch.ones(4)
    tau = 0.1
    c = langevin(
        gaussian(variance, mean), (mean + 0 * variance).to(dtype).repeat(4, 300, 1), step=tau, samples=500, burn_in=50,
        thin=2, temperature=0.5, precondition=lambda d: M * d, root=lambda xi: M.sqrt() * xi,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    m = c.moments
    # Without rejection the variance is wider by a known factor; of complex numbers it is that of both parts.
    wide = 0.5 * variance / (1 - tau * M / variance / 2) * (2 if dtype.is_complex else 1)
    assert m.count == 500
    assert c.moves == 1050
    torch.testing.assert_close(m.variance.mean(0), wide, rtol=0.03, atol=0)
    # Errors of the mean, in units of what the effective sample size promises: of size one.
    error = (m.mean - mean).abs() / (m.variance / m.effective).sqrt()
    assert 0.8 < float(error.square().mean().sqrt()) < 1.2
    assert float((m.r_hat < 1.1).float().mean()) > 0.95
    # The autocorrelation of the scheme is (1 - τ a)^(2 thin …): its effective sample size in closed form.
    rho = (1 - tau * M / variance) ** 2
    torch.testing.assert_close(m.effective.mean(0), 2000 * (1 - rho) / (1 + rho), rtol=0.3, atol=0)


def test_moments_are_those_of_the_draws_though_they_are_forgotten():
    for count in (1, 2, 5, 16, 17, 31, 33, 100, 257):
        for dtype in (torch.float64, torch.complex128):
            x = random((count, 3, 4, 5), dtype) + 100
            moments = Moments()
            for draw in x:
                moments = moments.add(draw)
            assert moments.count == count
            assert len(moments.means) <= 16
            torch.testing.assert_close(moments.mean, x.flatten(0, 1).mean(0))
            if count > 1:
                torch.testing.assert_close(moments.variance, x.flatten(0, 1).var(0))


def test_split_r_hat_in_closed_form():
    """Two halves at a time, as the books have it, where the number of draws splits evenly."""
    x = random((64, 3, 7), torch.float64).cumsum(0)
    moments = Moments()
    for draw in x:
        moments = moments.add(draw)
    halves = torch.cat((x[:32], x[32:]), 1)
    within, between = halves.var(0).mean(0), halves.mean(0).var(0)
    torch.testing.assert_close(moments.r_hat, ((31 / 32 * within + between) / within).sqrt(), rtol=0.01, atol=0)


def test_chains_that_did_not_mix_are_told():
    generator = torch.Generator().manual_seed(0)

    def run(x0: Tensor, step: float = 0.3):
        return langevin(gaussian(torch.ones(50), torch.zeros(50)), x0, step=step, samples=400, generator=generator)

    good, far = run(torch.zeros(4, 50)).moments, torch.tensor([0.0, 0.0, 100.0, 100.0])[:, None].expand(4, 50)
    assert float((good.r_hat < 1.1).float().mean()) > 0.95
    assert float(good.effective.median()) > 100
    stuck = run(far, step=1e-4).moments  # starts far apart, hardly moves
    assert float(stuck.r_hat.min()) > 1.5
    assert float(stuck.effective.max()) < 10
    drifting = run(torch.full((4, 50), 30.0), step=2e-3).moments  # all together, still on the way: the halves differ
    assert float(drifting.r_hat.min()) > 1.2
    assert bool(Moments().add(torch.zeros(2, 3)).r_hat.isinf().all())
    # A pixel that never moves is known exactly, unless its chains stand apart.
    still = Moments()
    for _ in range(8):
        still = still.add(torch.tensor([[1.0, 0.0], [1.0, 5.0]]))
    assert still.r_hat.tolist() == [1.0, float("inf")]
    assert float(still.effective[0]) == 16
    assert float(still.effective[1]) < 2


def test_chains_are_exact_by_seed_and_stop_and_keep():
    def run(samples: int = 20, callback=None, seed: int = 3):
        return langevin(
            gaussian(torch.ones(6), torch.zeros(6)), torch.zeros(2, 6), step=lambda k: 0.5 if k < 5 else 0.1,
            samples=samples, burn_in=4, thin=3, callback=callback, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    a, b = run(), run()
    assert torch.equal(a.last, b.last)
    assert torch.equal(a.moments.mean, b.moments.mean)
    assert not torch.equal(a.last, run(seed=4).last)
    assert not a.stopped
    assert a.energy.shape == (20, 2)
    seen = []
    kept = run(callback=lambda k, moments: seen.append((k, moments.count)) or moments.count == 7)
    assert kept.stopped
    assert seen[-1] == (kept.moves, 7) == (4 + 7 * 3, 7)
    assert seen[0] == (1, 0)
    assert torch.equal(kept.last, run(samples=7).last)
    assert torch.equal(kept.moments.mean, run(samples=7).moments.mean)
    with pytest.raises(NoData):
        _ = run(callback=lambda k, moments: True).moments.mean


def test_annealed_steps_are_taken_and_observations_are_what_is_summed_up():
    steps = []
    c = langevin(
        lambda x: (x.new_zeros(2), x), torch.full((2, 3), -4.0), step=lambda k: steps.append(k) or 1 / (k + 1),
        samples=3, temperature=0.0, observe=torch.abs, generator=torch.Generator(),
    )  # fmt: skip
    assert steps == [1, 2, 3]
    torch.testing.assert_close(c.last, torch.full((2, 3), -1.0))
    torch.testing.assert_close(c.moments.mean, torch.full((3,), (2 + 4 / 3 + 1) / 3))


def test_trouble_stops_a_chain_at_once():
    normal, start = gaussian(torch.ones(3), torch.zeros(3)), torch.zeros(2, 3)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(NonFinite, match=r"diverged.*100.*move"):
        langevin(normal, start, step=3.0, samples=1000, generator=generator, limit=100.0)
    with pytest.raises(NonFinite, match=r"state after move"):
        markov(lambda k, x: (x + 1e38, None), start, samples=9)
    with pytest.raises(NonFinite, match=r"energy at move 4 .*entry 1"):
        markov(lambda k, x: (x, torch.tensor([0.0, torch.inf if k == 4 else 0.0])), start, samples=9)
    with pytest.raises(NonFinite, match="a draw"):
        markov(lambda k, x: (x, None), start, samples=2, observe=lambda x: x / 0)
    for wrong in (
        {"step": 0.0},
        {"step": 0.1, "temperature": -1.0},
        {"step": 0.1, "thin": 0},
        {"step": 0.1, "root": abs},
    ):
        with pytest.raises(BadOption):
            langevin(normal, start, **({"samples": 2, "generator": generator} | wrong))


def test_markov_takes_any_kernel():
    """Exact draws, independent from move to move."""
    generator = torch.Generator().manual_seed(0)
    c = markov(lambda k, x: (torch.randn(x.shape, generator=generator), None), torch.zeros(4, 500), samples=100)
    assert bool(c.energy.isnan().all())
    assert float(c.moments.effective.median()) > 250
    torch.testing.assert_close(c.moments.variance.mean(), torch.tensor(1.0), rtol=0.02, atol=0)


def test_adabelief_by_hand():
    """Two steps on one weight, from the formula in plain numbers; and it resumes exactly."""
    w = torch.tensor([2.0], requires_grad=True)
    optimiser = AdaBelief([w], lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    value, m, s = 2.0, 0.0, 0.0
    for t in (1, 2):
        optimiser.zero_grad()
        w.square().sum().backward()
        g = 2 * value
        m = 0.9 * m + 0.1 * g
        s = 0.99 * s + 0.01 * (g - m) ** 2 + 1e-6
        value -= 0.1 * (m / (1 - 0.9**t)) / ((s / (1 - 0.99**t)) ** 0.5 + 1e-6)
        optimiser.step()
        assert float(w.detach()) == pytest.approx(value, rel=1e-6)
    other = torch.tensor([float(w.detach())], requires_grad=True)
    resumed = AdaBelief([other], lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for weight, o in ((w, optimiser), (other, resumed)):
        o.zero_grad()
        weight.square().sum().backward()
        o.step()
    assert torch.equal(w, other)
    with pytest.raises(BadOption):
        AdaBelief([w], lr=-1)
