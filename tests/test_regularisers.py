"""Laws of every member of REGULARISERS: gradients against differences, proximal maps against brute force."""

from __future__ import annotations

import pytest
import torch

from laws import random, relative
from tunemri.regularisers import REGULARISERS, TV, Charbonnier, Wavelet, shrink_field

SHAPES = [(4, 5), (6, 4), (1, 5)]
SMOOTH = [name for name, kind in REGULARISERS.items() if hasattr(kind, "gradient")]
PROXIMAL = [name for name, kind in REGULARISERS.items() if hasattr(kind, "prox")]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)


def features(shape, dtype=torch.complex128, seed=0):
    """Two samples of three channels: what every member takes."""
    return random((2, 3, *shape), dtype, seed)


@pytest.mark.parametrize("name", REGULARISERS)
class TestEveryRegulariser:
    def test_can_be_used_by_some_solver(self, name):
        assert name in SMOOTH + PROXIMAL

    @every_dtype
    def test_is_zero_at_zero_and_never_negative(self, name, dtype):
        r = REGULARISERS[name]()
        assert float(r.value(torch.zeros(1, 3, 6, 5, dtype=dtype)).abs().max()) < 1e-9
        assert bool((r.value(features((6, 5), dtype)) > 0).all())

    def test_does_not_see_the_global_phase(self, name):
        r, x = REGULARISERS[name](), features((6, 5))
        torch.testing.assert_close(r.value(x * torch.polar(torch.tensor(1.0), torch.tensor(0.7))), r.value(x))

    def test_is_convex(self, name):
        r, x, z = REGULARISERS[name](), features((6, 5)), features((6, 5), seed=1)
        assert bool((r.value(0.3 * x + 0.7 * z) <= 0.3 * r.value(x) + 0.7 * r.value(z) + 1e-12).all())

    def test_samples_are_independent(self, name):
        r, x = REGULARISERS[name](), features((6, 5))
        torch.testing.assert_close(r.value(x)[:1], r.value(x[:1]))

    def test_derivatives_of_the_value_are_finite_even_at_zero(self, name):
        x = torch.zeros(1, 3, 6, 5, dtype=torch.complex64, requires_grad=True)
        REGULARISERS[name]().value(x).sum().backward()
        assert x.grad is not None
        assert bool(torch.view_as_real(x.grad).isfinite().all())


@pytest.mark.parametrize("name", SMOOTH)
@every_shape
@every_dtype
def test_gradient_against_differences(name, shape, dtype):
    r, x, h = REGULARISERS[name](), features(shape, dtype), 1e-6
    for seed in range(3):
        v = features(shape, dtype, seed=10 + seed)
        slope = float((r.value(x + h * v).sum() - r.value(x - h * v).sum()) / (2 * h))
        g = r.gradient(x)
        assert g.shape == x.shape
        assert float((g.conj() * v).real.sum()) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", PROXIMAL)
@every_shape
@every_dtype
@pytest.mark.parametrize("step", [0.05, 0.5])
def test_prox_against_brute_force(name, shape, dtype, step):
    r = TV(iterations=2000) if name == "tv" else REGULARISERS[name]()
    v = random((1, *shape), dtype)

    def energy(u):
        return (u - v).abs().square().sum() / 2 + step * r.value(u).sum()

    found = r.prox(v, step)
    assert found.shape == v.shape
    start = torch.view_as_real(v.to(torch.complex128)).clone().requires_grad_()
    optimiser = torch.optim.LBFGS([start], lr=0.5, max_iter=400, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def image():
        z = torch.view_as_complex(start)
        return z if dtype.is_complex else z.real

    def closure():
        optimiser.zero_grad()
        value = energy(image())
        value.backward()
        return value

    optimiser.step(closure)
    brute = float(energy(image()).detach())
    assert float(energy(found)) <= brute + 1e-7 * (1 + brute)
    for seed in range(20):  # a minimum of a strictly convex function: worse in every direction
        d = random((1, *shape), dtype, seed=seed)
        assert float(energy(found + 1e-2 * d)) > float(energy(found))


@pytest.mark.parametrize("name", PROXIMAL)
def test_prox_takes_one_step_per_sample_and_zero_changes_nothing(name):
    r, v = REGULARISERS[name](), random((2, 6, 8), torch.complex128)
    both = r.prox(v, torch.tensor([0.1, 0.4], dtype=torch.float64)[:, None, None])
    for b, step in enumerate((0.1, 0.4)):
        assert relative(both[b : b + 1], r.prox(v[b : b + 1], step)) < 1e-12
    assert relative(r.prox(v, 0.0), v) < 1e-12


@pytest.mark.parametrize("name", PROXIMAL)
def test_prox_is_differentiable_even_where_it_is_zero(name):
    r = TV(iterations=5) if name == "tv" else REGULARISERS[name]()
    v = random((1, 6, 8), torch.complex128)
    v[:, :3] = 0
    v.requires_grad_()
    r.prox(v, 0.3).abs().square().sum().backward()
    assert v.grad is not None
    assert bool(torch.view_as_real(v.grad).isfinite().all())


def test_total_variation_counts_edges():
    x = torch.zeros(1, 8, 9, dtype=torch.float64)
    x[:, :, 4:] = 2
    assert float(TV().value(x)) == pytest.approx(2 * 8)
    assert float(TV().value(x * 0 + 3)) == pytest.approx(0, abs=1e-9)
    # Joint over real and imaginary part: an edge in both is one edge of length √2.
    assert float(TV().value(x * (1 + 1j))) == pytest.approx(2 * 8 * 2**0.5)


def test_charbonnier_goes_to_total_variation():
    x = random((1, 8, 9), torch.complex128)
    assert float(Charbonnier(epsilon=1e-6).value(x)) == pytest.approx(float(TV().value(x)), rel=1e-4)


@pytest.mark.parametrize("shape", [(16, 16), (17, 24), (15, 9)], ids=str)
def test_a_shift_of_the_wavelets_is_a_shift_of_the_image(shape):
    r, v = Wavelet(levels=2), random((1, *shape), torch.complex128)
    rolled = r.prox(v.roll((3, 5), (-2, -1)), 0.3).roll((-3, -5), (-2, -1))
    assert relative(r.prox(v, 0.3, (3, 5)), rolled) < 1e-12
    assert relative(r.prox(v, 0.3), rolled) > 1e-3
    torch.testing.assert_close(r.value(v, (3, 5)), r.value(v.roll((3, 5), (-2, -1))))


def test_a_field_is_shortened_without_turning():
    p = random((2, 1, 5, 6), torch.complex128)
    length = p.abs().square().sum(0).sqrt()
    q = shrink_field(p, 0.7)
    torch.testing.assert_close(q.abs().square().sum(0).sqrt(), (length - 0.7).clamp(min=0))
    kept = length > 0.7
    for axis in range(2):
        torch.testing.assert_close((q[axis] * length)[kept], (p[axis] * (length - 0.7))[kept])
