"""Loss terms, each with one value per sample; and the simplex of their weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import skimage.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws import lines, random
from tunemri import errors, losses, metrics
from tunemri.losses import TERMS, Result
from tunemri.operators import Cartesian

SHAPES = [(16, 16), (11, 20), (5, 7)]
ZERO_AT_THE_TRUTH = {"mae", "mse", "ssim", "dc"}


def result(shape=(16, 16), batch=3, seed=0, off=0.3) -> Result:
    """Estimates off the truth by a different amount for each sample, with everything that a term may ask for."""
    x = random((batch, *shape), seed=seed)
    A = Cartesian(lines(shape))
    amount = off * torch.arange(1, batch + 1)[:, None, None]
    return Result(
        x_hat=x + amount * random((batch, *shape), seed=seed + 1), x=x, y=A(x), forward=A,
        weights={"a.weight": torch.randn(batch, 4, 3), "a.bias": torch.randn(batch, 4)},
    )  # fmt: skip


def pick(r: Result, index) -> Result:
    assert r.x is not None
    assert r.y is not None
    assert r.weights is not None
    return dataclasses.replace(
        r, x_hat=r.x_hat[index], x=r.x[index], y=r.y[index], weights={k: v[index] for k, v in r.weights.items()}
    )


@pytest.mark.parametrize("name", TERMS)
class TestEveryTerm:
    def value(self, name, r):
        return TERMS[name].value(r)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_one_finite_value_above_zero_for_each_sample(self, name, shape):
        v = self.value(name, result(shape))
        assert v.shape == (3,)
        assert bool((v > 0).all())
        assert bool(v.isfinite().all())

    def test_a_sample_does_not_know_the_others(self, name):
        r, order = result(), [2, 0, 1]
        v = self.value(name, r)
        torch.testing.assert_close(self.value(name, pick(r, order)), v[order])
        for b in range(3):
            torch.testing.assert_close(self.value(name, pick(r, slice(b, b + 1))), v[b : b + 1])

    def test_what_is_compared_with_the_truth_vanishes_there(self, name):
        r = result(off=0)
        v = self.value(name, r)
        if name in ZERO_AT_THE_TRUTH:
            torch.testing.assert_close(v, torch.zeros(3), atol=1e-6, rtol=0)
        else:
            assert bool((v > 0).all())

    @pytest.mark.parametrize("where", ["truth", "zero", "off"])
    def test_its_gradient_is_finite_everywhere(self, name, where):
        r = result()
        assert r.x is not None
        assert r.weights is not None
        start = {"truth": r.x, "zero": torch.zeros_like(r.x), "off": r.x_hat}[where].clone().requires_grad_()
        weights = {k: v.clone().requires_grad_() for k, v in r.weights.items()}
        self.value(name, dataclasses.replace(r, x_hat=start, weights=weights)).sum().backward()
        found = [weights["a.weight"].grad] if name == "l1" else [start.grad]
        for g in found:
            assert bool(torch.view_as_real(g).isfinite().all() if g.is_complex() else g.isfinite().all())
            assert where != "off" or bool(g.any()), "this term would train nothing"

    def test_an_all_zero_truth_gives_numbers(self, name):
        r = result()
        assert r.y is not None
        dark = dataclasses.replace(r, x=torch.zeros_like(r.x_hat), y=torch.zeros_like(r.y))
        assert bool(self.value(name, dark).isfinite().all())

    def test_it_says_what_it_lacks(self, name):
        x = random((2, 8, 8))
        if name in ("tv", "wavelet"):
            assert self.value(name, Result(x_hat=x)).shape == (2,)
            return
        with pytest.raises(errors.MissingKey):
            self.value(name, Result(x_hat=x))

    def test_it_can_be_labelled(self, name):
        assert TERMS[name].sentence
        assert TERMS[name].high


@pytest.mark.parametrize("name", ["mae", "mse", "ssim", "dc"])
def test_more_error_costs_more(name):
    v = TERMS[name].value(result(off=0.2))
    assert v.tolist() == sorted(v.tolist())


@pytest.mark.parametrize("shape", [(24, 31), (7, 9), (320, 320)], ids=str)
def test_what_is_trained_is_what_is_scored(shape):
    """1 − SSIM equals our metric and scikit-image's, for a volume of one slice each."""
    r = result(shape, batch=2)
    assert r.x is not None
    values = losses.ssim(r)
    for b in range(2):
        ours, truth = r.x_hat[b].abs(), r.x[b].abs()
        assert 1 - float(values[b]) == pytest.approx(metrics.ssim(ours[None], truth[None]), abs=2e-5)
        oracle = skimage.metrics.structural_similarity(
            truth.numpy().astype(np.float64), ours.numpy().astype(np.float64), data_range=float(truth.max())
        )
        assert 1 - float(values[b]) == pytest.approx(oracle, abs=2e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("phase", [1, 1j, -0.6 + 0.8j])
def test_total_variation_counts_the_edge(axis, phase):
    """A constant has none; a step of height one has one unit for each pixel along it."""
    flat = torch.full((1, 12, 9), 2.0 * phase, dtype=torch.complex64)
    torch.testing.assert_close(losses.tv(Result(x_hat=flat)), torch.zeros(1), atol=1e-6, rtol=0)
    step = flat.clone()
    step.narrow(1 + axis, 4, step.shape[1 + axis] - 4).add_(phase)
    edge_pixels = flat.shape[2 - axis]
    torch.testing.assert_close(losses.tv(Result(x_hat=step)) * 12 * 9, torch.tensor([float(edge_pixels)]))


def test_the_penalty_on_weights_is_their_mean_size():
    weights = {"a": torch.tensor([[1.0, -3.0], [0.0, 0.5]]), "b": torch.tensor([[2.0], [0.0]])}
    torch.testing.assert_close(
        losses.l1_weights(Result(x_hat=random((2, 3, 3)), weights=weights)), torch.tensor([2.0, 0.5 / 3])
    )


def test_unknown_and_repeated_terms_are_refused():
    with pytest.raises(errors.BadOption, match="did you mean 'ssim'"):
        losses.terms(["mae", "sssim"])
    for wrong in ([], ["mae", "mae"]):
        with pytest.raises(errors.BadOption, match="expected different terms"):
            losses.terms(wrong)


# ------------------------------------------------------------------------------------------------ the simplex

dials = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.floats(0, 1, width=32), min_size=k, max_size=k), min_size=1, max_size=4)
)


@given(dials)
def test_weights_lie_on_the_simplex(rows):
    w = losses.weights_from_lambdas(torch.tensor(rows))
    assert w.shape == (len(rows), len(rows[0]) + 1)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(1), torch.ones(len(rows)))


@given(dials)
def test_dials_and_weights_go_round(rows):
    w = losses.weights_from_lambdas(torch.tensor(rows, dtype=torch.float64))
    torch.testing.assert_close(losses.weights_from_lambdas(losses.lambdas_from_weights(w)), w)
    inside = torch.tensor(rows, dtype=torch.float64).clamp(0.01, 0.99)
    torch.testing.assert_close(losses.lambdas_from_weights(losses.weights_from_lambdas(inside)), inside)


def test_two_terms_are_shared_by_one_dial():
    lam = torch.tensor([[0.0], [0.25], [1.0]])
    torch.testing.assert_close(losses.weights_from_lambdas(lam), torch.cat((1 - lam, lam), 1))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_training_draws_are_fair_to_every_term(count):
    """Dirichlet(1, …, 1) and its faces both have mean 1/K in every term, and E[w²] = 2 / (K (K+1)) inside."""
    draw = lambda faces: losses.sample_weights(40_000, count, torch.Generator().manual_seed(1), faces=faces)
    for faces in (0.0, 0.2, 1.0):
        w = draw(faces)
        assert bool((w >= 0).all())
        torch.testing.assert_close(w.sum(1), torch.ones(len(w)))
        torch.testing.assert_close(w.mean(0), torch.full((count,), 1 / count), atol=0.01, rtol=0)
    second = draw(0.0).square().mean(0)
    torch.testing.assert_close(second, torch.full((count,), 2 / (count * (count + 1))), atol=0.01, rtol=0)


@pytest.mark.parametrize("count", [2, 4])
def test_the_asked_share_of_draws_lies_on_faces(count):
    w = losses.sample_weights(40_000, count, torch.Generator().manual_seed(2), faces=0.2)
    on_a_face = (w == 0).any(1)
    assert float(on_a_face.double().mean()) == pytest.approx(0.2, abs=0.01)
    kept = (w[on_a_face] > 0).sum(1)
    assert set(kept.tolist()) == set(range(1, count)), "every kind of face, down to the corners"


def test_the_same_generator_draws_the_same():
    draw = lambda: losses.sample_weights(5, 3, torch.Generator().manual_seed(4))
    assert torch.equal(draw(), draw())
