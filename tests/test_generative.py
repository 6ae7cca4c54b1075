"""The generative prior: its energy and the gradient, the mode and the posterior against closed forms, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch
from torch import nn

from laws import lines, random, relative, scan
from tunemri import cli, coils, console, errors, formats, trajectories, tuning
from tunemri.coils import low_resolution_maps
from tunemri.datasets import Example
from tunemri.fourier import fft2, ifft2, pad, resized
from tunemri.masks import make_mask
from tunemri.methods import card, generative, load, prepare, reconstruct, save
from tunemri.methods.generative import PRESETS, Generative, Likelihood, Regression, noise_level, power
from tunemri.networks.energy import Coloured, Energy, Homogeneous
from tunemri.operators import Cartesian, Coils, Fourier, Mask, NonCartesian, encoding
from tunemri.scan import normalise
from tunemri.simulate import phantom, simulate
from tunemri.solvers import AdaBelief
from tunemri.training import Plan, fit
from tunemri.tuning import regression

SMALL = {"energy": {"widths": [4, 6]}, "mode": {"levels": 4}, "draws": {"chains": 2, "samples": 3}}


def build(**changes) -> Generative:
    torch.manual_seed(0)
    return Generative(**SMALL | changes).eval()


# ------------------------------------------------------------------------------------------------ the energy


@pytest.mark.parametrize("shape", [(16, 16), (15, 21), (9, 24)], ids=str)
def test_the_gradient_is_that_of_the_energy(shape):
    net = Energy(widths=[4, 6, 8]).double()
    x, d = random((2, *shape), torch.complex128), random((2, *shape), torch.complex128, seed=1)
    sigma, h = torch.tensor([0.3, 0.02]).double(), 1e-6
    value, gradient = net.value_and_gradient(x, sigma)
    slope = (net(x + h * d, sigma) - net(x - h * d, sigma)) / (2 * h)
    torch.testing.assert_close(slope, (gradient.conj() * d).real.sum((1, 2)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value, net(x, sigma), rtol=1e-12, atol=0)
    assert gradient.requires_grad, "training needs a graph"
    with torch.no_grad():
        value, gradient = net.value_and_gradient(x, sigma)
        assert not gradient.requires_grad and not value.requires_grad


def test_intensities_and_levels_have_no_unit():
    net, x, sigma = Energy(widths=[4, 6]).double(), random((1, 12, 17), torch.complex128), torch.tensor([0.1]).double()
    for a in (1e-3, 7.0):
        torch.testing.assert_close(net(a * x, a * sigma), a * a * net(x, sigma), rtol=1e-9, atol=0)
    assert float(net(x, sigma).detach()) > 0


def test_the_energy_is_smooth():
    """Second derivatives exist and are bounded, so a line search ends."""
    net, x = Energy(widths=[4, 6]).double(), random((1, 8, 8), torch.complex128)
    d, sigma = random((1, 8, 8), torch.complex128, seed=1), torch.tensor([0.5]).double()
    gradients = [net.value_and_gradient(x + h * d, sigma)[1] for h in (0.0, 1e-5, 2e-5)]
    first, second = gradients[1] - gradients[0], gradients[2] - gradients[1]
    assert relative(first, second) < 1e-3


def test_training_removes_noise_of_every_level():
    """A few steps on phantoms: better than doing nothing, and the record of levels is kept."""
    torch.manual_seed(0)
    model = Generative(energy={"widths": [8, 12]}, levels=(0.05, 0.5)).train()
    x = torch.stack([phantom((24, 24), seed=b).to(torch.complex64) for b in range(4)])
    example = Example(y=fft2(x[:, None]), A=Cartesian(torch.ones(1, 1, 24, 24)), target=x)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(60):
        optimiser.zero_grad()
        loss = model.loss(example, torch.Generator().manual_seed(step))
        loss.backward()
        optimiser.step()
    model.eval()
    kept = model.usual.clone()
    with torch.no_grad():
        scores = [float(model.loss(example, torch.Generator().manual_seed(99 + k))) for k in range(4)]
    assert max(scores) < -0.3, "the noise is still there"
    assert torch.equal(model.usual, kept), "only training remembers"
    with torch.no_grad():
        alike, texture = phantom((24, 24), seed=9).to(torch.complex64)[None], random((1, 24, 24))
    assert abs(float(model.unlike(alike))) < abs(float(model.unlike(texture)))
    assert float(build().unlike(alike)) == 0, "never trained"


# ------------------------------------------------------------------------------------------------ coloured noise

COARSE = {"widths": [4, 6], "levels": [0.01, 0.5], "starts": 2}


@pytest.mark.parametrize("shape", [(16, 16), (15, 21), (9, 24)], ids=str)
def test_coloured_noise_is_louder_the_lower_its_frequency(shape):
    net = Coloured(widths=[4, 6], corner=3.0, power=2.0)
    x, y = random((2, *shape), torch.complex128), random((2, *shape), torch.complex128, seed=1)
    torch.testing.assert_close((net.colour(x).conj() * y).sum(), (x.conj() * net.colour(y)).sum())
    factor = (fft2(net.colour(ifft2(torch.ones(shape, dtype=torch.complex128))))).real
    h, w = shape
    assert float(factor[h // 2, w // 2]) == pytest.approx(math.sqrt(1 + (9 / 0.5) ** 2))
    assert float(factor.min()) >= 1
    assert int(factor.argmax()) == h // 2 * w + w // 2
    turned = net.colour(x.mT.contiguous()).mT  # noise in an image that is turned is noise
    torch.testing.assert_close(turned, net.colour(x))
    assert net.colour(random((1, *shape))).dtype == torch.complex64


class White(Coloured):
    """That of independent normal pixels of variance c: D(x, σ) = c (c + σ² S)⁻¹ x."""

    def value_and_gradient(self, x, sigma):
        s = fft2(self.colour(self.colour(ifft2(torch.ones_like(x)))))
        slope = ifft2(sigma[:, None, None] ** 2 / (0.3 + sigma[:, None, None] ** 2 * s) * fft2(x))
        return (slope.conj() * x).real.sum((1, 2)).double() / 2, slope


@pytest.mark.parametrize("shape", [(24, 24), (25, 32)], ids=str)
def test_what_is_taken_away_has_the_colour_of_the_noise(shape):
    model, x, sigma = build(coarse=COARSE), random((1, *shape)), 0.2
    energy = White(widths=[4])
    s = fft2(energy.colour(energy.colour(ifft2(torch.ones(shape, dtype=torch.complex64)))))
    torch.testing.assert_close(x - model._removed(x, sigma, energy), ifft2(0.3 / (0.3 + sigma**2 * s) * fft2(x)))


@pytest.mark.parametrize("coils", [1, 3])
def test_noise_without_colour_makes_no_difference(coils):
    s, common = (
        normalise(scan((64, 50), coils=coils, noise=0.01)),
        {"mode": {"rough": 6, "way": 0}, "precision": "float32"},
    )
    A, plain = encoding(s), build(**common)
    alike = {"widths": [4, 6], "levels": plain.levels, "start": 1.0, "noise": 0.25, "inertia": 15, "starts": 1}
    models = [plain, *(build(**common, coarse=alike | {"corner": corner}) for corner in (1e-4, 6.0))]
    for model in models[1:]:
        model.start_from(plain)
    plainly, white, coloured = (model(s.kspace, A, noise=0.01).image for model in models)
    assert relative(white, plainly) < 1e-3
    assert relative(coloured, plainly) > 0.02


def test_of_several_ways_down_the_one_of_the_lowest_energy_goes_on():
    s = normalise(scan((64, 50), noise=0.01))
    model, A = build(coarse=COARSE, mode={"rough": 6, "way": 0}), encoding(s)
    grids = model._grids(s.kspace, A, 0.01, (64, 50))
    x = torch.cat([random((1, 64, 50), seed=k) * (1, 0.1, 0.5, 3)[k] for k in range(4)])
    assert torch.equal(model._chosen(x, grids[1], 0.1, 2), x[[1, 2]])
    levels = [v for v in model._levels(grids, 0.01, 2) if v > grids[1].above]
    x = s.kspace[:, 0].repeat(3, 1, 1)
    out = model._down(x, s.kspace, grids, levels, 0.01, 0.5, 2, torch.Generator().manual_seed(0), 2)
    assert out.shape == x.shape
    assert not torch.equal(out[0], out[1])
    assert torch.equal(model._down(x, s.kspace, grids, [], 0.01, 0.5, 2, torch.Generator(), 2), x)


@pytest.mark.parametrize("shape", [(64, 64), (50, 67)], ids=str)
def test_low_frequencies_are_what_the_coarse_energy_says(shape):
    model, s = build(coarse=COARSE | {"corner": 3.0, "below": 0}), normalise(scan(shape, noise=0.01))
    grid, low = model._grids(s.kspace, encoding(s), 0.01, shape)[:2]
    v, generator = random((1, *shape)), torch.Generator().manual_seed(0)
    view = generative._view(torch.Generator().manual_seed(0))
    fine = generative._back(model._removed(generative._seen(v, view), 0.1), view)
    small = model._removed(generative._seen(resized(v, low.shape), view), 0.1 * low.scale, model.coarse)
    coarse, taken = (
        fft2(resized(generative._back(small, view), shape)),
        fft2(model._taken(v, grid, low, 0.1, generator)),
    )
    h, w = shape
    torch.testing.assert_close(taken[:, h // 2, w // 2], coarse[:, h // 2, w // 2])
    torch.testing.assert_close(taken[:, 0], fft2(fine)[:, 0], rtol=1e-3, atol=1e-4)
    assert relative(taken, fft2(fine)) > 0.01
    faint = 0.4 * model.rough.levels[0] / low.scale
    fine = generative._back(model._removed(generative._seen(v, view), faint), view)
    again = model._taken(v, grid, low, faint, generator.manual_seed(0))
    assert torch.equal(again, fine), "it knows no such level"


def test_training_beside_an_energy_leaves_that_alone():
    torch.manual_seed(0)
    trained = Generative(energy={"widths": [8, 12]}, levels=(0.05, 0.5), trained={"size": [32, 256]})
    trained.usual.fill_(1.0)
    coarse = {"widths": [8, 12], "levels": [0.05, 0.5]}
    model = Generative(energy={"widths": [8, 12]}, levels=(0.05, 0.5), coarse=coarse, trained={"size": [8, 9]}).train()
    x = torch.stack([phantom((24, 24), seed=b).to(torch.complex64) for b in range(4)])
    example = Example(y=fft2(x[:, None]), A=Cartesian(torch.ones(1, 1, 24, 24)), target=x)
    with pytest.raises(errors.BadOption, match="not trained"):
        model.loss(example, torch.Generator())
    model.start_from(trained)
    assert model.trained == trained.trained == model.arguments["trained"]
    assert model.coarse is not None
    for mine, others in zip(model.coarse.parameters(), trained.energy.parameters(), strict=True):
        assert torch.equal(mine, others)
    moved = [p for p in model.parameters() if p.requires_grad]
    assert len(moved) == len(list(model.coarse.parameters()))
    optimiser = torch.optim.Adam(moved, 5e-3)
    losses = []
    for step in range(60):
        optimiser.zero_grad()
        loss = model.loss(example, torch.Generator().manual_seed(step))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < sum(losses[:10]) - 2
    assert torch.equal(model.usual, trained.usual)
    again = Generative(**model.arguments)
    again.start_from(model)
    assert torch.equal(again.coarse.first.weight, model.coarse.first.weight)
    with pytest.raises(errors.BadOption, match="other networks"):
        trained.start_from(model)


# ------------------------------------------------------------------------------------------------ the paper's energy

PAPER = {
    "energy": {"name": "paper", "size": 16, "widths": [4, 4, 6]},
    "likelihood": {"chain": 6, "growth": 3, "replay": 12, "survival": 0.5},
    "draws": {"chains": 2, "samples": 3, "thin": 2},
}


def pictures(count: int = 4) -> Example:
    x = torch.stack([phantom((16, 16), seed=b).to(torch.complex64) for b in range(count)])
    return Example(y=fft2(x[:, None]), A=Cartesian(torch.ones(1, 1, 16, 16)), target=x)


def test_as_many_parameters_as_published():
    model = Generative(**PRESETS["paper"])
    assert sum(p.numel() for p in model.parameters()) == 21_350_640
    weights = [tuple(p.shape) for p in model.parameters()]
    assert weights[:4] == [(48, 1, 3, 3), (48, 48, 3, 3), (48, 48, 3, 3), (144, 48, 3, 3)]
    assert weights[-1] == (1, 1344, 5, 5)


def test_it_is_homogeneous():
    """R(a u) = a R(u) ≥ 0, and R is its own slope along u: its mean in equilibrium is n T."""
    net = Homogeneous(size=16, widths=[4, 4, 6]).double()
    u = random((3, 16, 16), torch.complex128).real.requires_grad_()
    value = net.raw(u)
    assert bool((value > 0).all())
    for a in (0.0, 0.3, 50.0):
        torch.testing.assert_close(net.raw(a * u), a * value)
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close((slope * u).sum((1, 2)), value)
    x, sigma = u.detach().to(torch.complex128), torch.tensor([0.1, 0.2, 3.0]).double()
    expected = sigma**2 * net.raw(x.abs()) / (2 * net.temperature)
    torch.testing.assert_close(net(x, sigma), expected)
    for shape in ((9, 24), (15, 17)):
        assert net(random((1, *shape), torch.complex128), sigma[:1]).shape == (1,)


def test_chains_lengthen_as_published():
    assert [Likelihood().length(h) for h in (0, 1000, 10**6)] == [5, 322, 505]


def test_likelihood_raises_the_energy_of_chains_over_that_of_images():
    """Gradient: the difference of mean energies, at fixed chains."""
    torch.manual_seed(0)
    model, example = Generative(**PAPER).train(), pictures()
    optimiser, losses = AdaBelief(model.parameters(), 1e-2), []
    for step in range(20):
        optimiser.zero_grad()
        loss = model.loss(example, torch.Generator().manual_seed(step))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert model.replay.shape == (12, 16, 16)
    assert int(model.updates) == 20
    assert all(math.isfinite(v) and v > 0 for v in model.notes().values())
    assert sum(losses[-5:]) < sum(losses[:5]), "images are no likelier than before"


def test_it_resumes_with_its_memory(tmp_path):
    """Stopped after three updates and resumed: the same weights and the same memory, bit for bit."""

    def run(folder, plans):
        for k, steps in enumerate(plans):
            torch.manual_seed(0)
            model = Generative(**PAPER)
            plan = Plan(steps=5, lr=1e-3, optimiser="adabelief", checkpoint=0)

            def batches(step, rank, last=steps):
                if step == last:
                    raise KeyboardInterrupt
                return pictures()

            try:
                fit(model, batches, plan, folder, resume=k > 0)
            except KeyboardInterrupt:
                continue
        return model

    whole, parts = run(tmp_path / "a", [9]), run(tmp_path / "b", [3, 9])
    for (name, a), (_, b) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(whole.replay) == 12
    save(whole, tmp_path / "w.safetensors")
    assert "replay" not in load(tmp_path / "w.safetensors").state_dict()


def test_chains_that_run_away_stop_training():
    model = Generative(**PAPER | {"likelihood": {"replay": 4, "limit": 1.01}}).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(50)
    with pytest.raises(errors.NonFinite, match="chain of training"):
        model.loss(pictures(), torch.Generator().manual_seed(0))


def test_it_reconstructs():
    s = normalise(scan((16, 16), noise=0.02))
    model = Generative(**PAPER).eval()
    for estimate in ("map", "mmse"):
        out = model(s.kspace, encoding(s), estimate=estimate)
        assert bool(out.image.isfinite().all())
    with pytest.raises(errors.BadOption, match="temperature"):
        Generative(energy={"name": "paper", "size": 16, "widths": [4, 4], "temperature": 0.1})
    with pytest.raises(errors.BadOption, match="did you mean 'paper'"):
        Generative(energy={"name": "papers"})


# ------------------------------------------------------------------------------------------------ closed forms


class Gaussian(nn.Module):
    """The energy of images with independent normal pixels of variance c: D(x, σ) = c / (c + σ²) x."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, x, sigma):
        return self.value_and_gradient(x, sigma)[0]

    def value_and_gradient(self, x, sigma):
        share = (sigma**2 / (self.c + sigma**2))[:, None, None]
        return (share * x.abs().square() / 2).sum((1, 2)).double(), share * x


def gaussian(c: float, **changes) -> Generative:
    model = build(**changes)
    model.energy = Gaussian(c)
    return model


@pytest.mark.parametrize("lam", [0.5, 1.0, 4.0])
def test_the_mode_of_a_normal_prior(lam):
    c, noise = 0.3, 0.1
    mask = lines((15, 18))
    y = random((2, 1, 15, 18)) * mask
    model = gaussian(c, mode={"levels": 4, "steps": 40, "tolerance": 1e-6})
    out = model(y, Cartesian(mask), lam=lam, noise=noise)
    nu = lam * noise**2
    exact = ifft2(y / (1 + nu / (c + nu)))[:, 0]  # the last level is that of the noise
    assert relative(out.image, exact) < 1e-4
    assert out.variance is None


def cooled(model: Generative, c: float, noise: float, tau: float, grids, held) -> tuple[float, float]:
    """Variance of a draw of one coefficient under a normal prior, and the factor from data to its mean: the way down is linear.

    tau: 1 where the coefficient is sampled, 0 where it is not. held: of each grid, whether the coefficient is on it. The state is
    (x, x before); b the data of this draw.
    """
    b = tau * noise**2
    covariance = torch.full((2, 2), b + model.draws.start**2, dtype=torch.float64)
    with_data, mean = torch.full((2,), b, dtype=torch.float64), torch.full((2,), tau, dtype=torch.float64)
    levels, last = model._levels(grids, noise, model.mode.levels), grids[0]
    for k, sigma in enumerate(levels):
        grid = [g for g in grids if sigma > g.above][-1]
        on = float(held[grids.index(grid)])
        if grid is not last:  # what the new grid does not hold is lost, and inertia begins anew
            move = grid.scale / last.scale * on * torch.tensor([[1, 0], [1, 0]], dtype=torch.float64)
            covariance, with_data, mean, last = move @ covariance @ move.T, move @ with_data, move @ mean, grid
        spread = grid.scale * sigma
        beta = min(k, model.mode.inertia) / (min(k, model.mode.inertia) + 3)
        weight = tau * (sigma / noise) ** 2
        keep, take = c / (c + spread**2) / (1 + weight), grid.scale * weight / (1 + weight)
        step = on * torch.tensor([[keep * (1 + beta), -keep * beta], [1, 0]], dtype=torch.float64)
        data = on * torch.tensor([take, 0], dtype=torch.float64)
        cross = torch.outer(step @ with_data, data)
        covariance = step @ covariance @ step.T + cross + cross.T + b * torch.outer(data, data)
        covariance[0, 0] += on * (keep * model.draws.noise * spread) ** 2
        with_data, mean = step @ with_data + b * data, step @ mean + tau * data
    return float(covariance[0, 0]), float(mean[0])


@pytest.mark.parametrize("noise", [0.05, 0.2])
@pytest.mark.parametrize("shape", [(12, 14), (48, 51)])
def test_draws_of_a_normal_prior_go_the_way_down(noise, shape):
    c = 0.1
    mask = lines(shape)
    y = random((1, 1, *shape)) * mask * (torch.hann_window(shape[0], False)[:, None] ** 3 + 0.01)
    model = gaussian(c, draws={"chains": 8, "samples": 60}, mode={"way": 12, "rough": 20})
    A = Cartesian(mask)
    drawn = model.posterior(y, A, noise=noise, observe=lambda x: fft2(x)).moments
    sampled, n, grids = (mask[0, 0] > 0).expand(shape), 480, model._grids(y, A, noise, shape)
    on_it = pad(torch.ones(grids[-1].shape), shape) > 0
    assert len(grids) == 1 + (shape[0] == 48)
    for tau, inner in itertools.product((1.0, 0.0), (True, False)):
        where = (sampled if tau else ~sampled) & (on_it if inner else ~on_it)
        if not bool(where.any()):
            continue
        variance, factor = cooled(model, c, noise, tau, grids, [True, inner])
        error = 4 / math.sqrt(n * int(where.sum())) + 0.02
        assert float(drawn.variance[where].mean()) == pytest.approx(variance, rel=error)
        assert float((drawn.mean - factor * y[0, 0]).abs().square()[where].mean()) < 2 * variance / n
    assert float((drawn.r_hat < 1.1).double().mean()) > 0.95


@pytest.mark.parametrize("shape", [(20, 30), (64, 50), (96, 130), (193, 100)])
@pytest.mark.parametrize("coils", [1, 3])
def test_the_way_down_ends_on_the_grid_of_the_image(shape, coils):
    s = normalise(scan(shape, coils=coils, noise=0.01))
    model = build()
    for noise in (1e-3, 0.05, 0.6):
        grids = model._grids(s.kspace, encoding(s), noise, shape)
        levels = model._levels(grids, noise, model.mode.levels)
        assert grids[0].shape == shape
        assert len(grids) == 1 + max(0, int(math.log2(min(shape) / 24)))
        for k, (fine, coarse) in enumerate(itertools.pairwise(grids)):
            assert coarse.shape == (shape[0] >> k + 1, shape[1] >> k + 1)
            assert coarse.above >= max(fine.above, 2 * levels[-1])
            assert coarse.data(s.kspace).shape[-2:] == coarse.shape
        assert all(a > b for a, b in itertools.pairwise(levels))
        for sigma in levels:
            assert sigma * [g for g in grids if sigma > g.above][-1].scale >= 0.999 * model.levels[0]
        assert levels[0] == pytest.approx(min(model.levels[1], max(1.0 if len(grids) > 1 else 0.3, 2 * noise)))
        assert levels[-1] == pytest.approx(max(noise, model.levels[0]) if noise < 0.5 else 0.5)


def test_what_was_not_measured_may_matter():
    """Data of the centre alone do not say that details are hidden; noise alone does not make them matter."""
    shape, model = (96, 96), build()
    s = normalise(scan(shape, noise=0.01))
    centre = pad(torch.ones(24, 24), shape)[None, None]
    whole, part = (model._grids(s.kspace * m, Cartesian(m), 1e-3, shape) for m in (torch.ones_like(centre), centre))
    assert len(part) == 1
    assert len(whole) == 3
    centre = pad(torch.ones(48, 48), shape)[None, None]
    _, first, second = model._grids(s.kspace * centre, Cartesian(centre), 1e-3, shape)
    assert first.above == second.above > whole[1].above
    _, first, _ = model._grids(0.1 * random((1, 1, *shape)), Cartesian(torch.ones_like(centre)), 0.1, shape)
    assert first.above < 0.25


def test_without_a_step_at_full_resolution_the_image_is_still_whole():
    s = normalise(scan((64, 64), noise=0.01))
    out = build(mode={"rough": 3, "way": 0}).eval()(s.kspace, encoding(s), noise=0.01)
    assert out.image.shape == (1, 64, 64)


def test_an_operator_without_coarser_grids_is_met_on_the_finest():
    shape = (64, 64)
    s = normalise(scan(shape, noise=0.01))
    A = Mask(s.mask) @ Fourier() @ Coils(torch.ones(1, 1, *shape, dtype=torch.complex64))
    out = build(mode={"rough": 3, "way": 2}).eval()(s.kspace, A, noise=0.01)
    assert bool(out.image.isfinite().all())


@pytest.mark.parametrize("shape", [(16, 18), (15, 12)])
def test_what_the_data_leave_open_is_warmed(shape):
    """Where k-space is not sampled deviations grow, most where it is coarse; where it is sampled they stay as they are."""
    mask = lines(shape)
    warm = gaussian(0.3, draws={"temperature": 16.0, "unsampled": 2.0, "coarse": 3.0})._wider(Cartesian(mask), 1e-3)
    x = random((2, *shape))
    sampled = (mask[0, 0] > 0).expand(shape)
    before, after = fft2(x), fft2(warm(x))
    torch.testing.assert_close(after[:, sampled], before[:, sampled], rtol=0.05, atol=1e-2)
    h, w = shape
    rho = torch.hypot((torch.arange(h) - h // 2)[:, None].float(), (torch.arange(w) - w // 2).float()).clamp(min=1)
    gain = 4 * (1 - generative._sampled(Cartesian(mask), x[:1])) * (1 + (3 / rho) ** 3).sqrt()
    torch.testing.assert_close(after[:, ~sampled], (gain * before)[:, ~sampled], rtol=1e-3, atol=1e-3)
    assert torch.equal(gaussian(0.3)._wider(Cartesian(mask), 1e-3)(x), x), "cold as they were drawn"


@pytest.mark.parametrize("coils", [1, 4])
def test_the_share_that_is_sampled(coils):
    s = normalise(scan((64, 60), coils=coils))
    assert generative._sampled(encoding(s), s.kspace[:, 0]) == pytest.approx(float(s.mask.float().mean()), abs=0.03)


@pytest.mark.parametrize("kind", ["coils", "spokes", "real"])
def test_widening_is_linear_and_leaves_the_data_alone(kind):
    """Self-adjoint, never narrower, and next to nothing of what many samples tell."""
    shape = (16, 14)
    s = normalise(scan(shape, coils=4 if kind == "coils" else 1, noise=0.02))
    A = encoding(s)
    if kind == "spokes":
        A = NonCartesian(trajectories.radial(shape, 9)[None].float(), shape=shape)
    B, _ = A.preconditioned(A(random((1, *shape))))
    model = gaussian(0.3, draws={"temperature": 4.0}, real=kind == "real")
    wider = model._wider(B, 0.01)
    x, y = random((2, *shape)), random((2, *shape), seed=1)
    if kind == "real":
        x, y = x.real.to(x.dtype), y.real.to(y.dtype)
        assert not bool(wider(x).imag.any())
    inner = lambda a, b: float((a.conj() * b).real.sum())  # noqa: E731
    assert inner(wider(x), y) == pytest.approx(inner(x, wider(y)), rel=1e-2, abs=1e-2)
    assert inner(x, wider(x)) > inner(x, x)
    told = B.gram(x)
    for _ in range(30):  # what the data tell best
        told = B.gram(told / torch.linalg.vector_norm(told))
    if kind != "real":
        assert relative(wider(told), told) < 0.1


def test_the_mean_comes_with_variance_and_its_record():
    s = scan((16, 18), slices=2, noise=0.05)
    out = reconstruct(s, gaussian(0.3), estimate="mmse")
    assert out.variance is not None and out.variance.shape == (2, 16, 18)
    assert bool((out.variance > 0).all())
    assert len(out.stats["chains"]) == 2
    assert {"samples", "r_hat_95", "mixed", "effective", "burn_in"} <= set(out.stats["chains"][0])
    wider = reconstruct(s, gaussian(0.3, draws=SMALL["draws"] | {"temperature": 3.0}), estimate="mmse")
    assert wider.variance is not None
    assert float(wider.variance.sum()) > 1.2 * float(out.variance.sum())
    assert torch.equal(wider.image, out.image)
    assert (wider.stats["chains"][0]["temperature"], wider.stats["chains"][0]["coarse"]) == (3.0, 0.0)


def test_samples_spread_as_the_variance_says():
    s = scan((16, 18), noise=0.05)
    model = gaussian(0.3, draws={"chains": 24, "samples": 4, "temperature": 4.0, "coarse": 3.0})
    out = reconstruct(s, model, estimate="mmse")
    assert out.samples is not None and out.variance is not None
    spread = (out.samples[0] - out.image[0]).abs().square().mean(0)
    assert float(spread.mean()) == pytest.approx(float(out.variance.mean()), rel=0.15)


def several(noise: float, shape: tuple[int, int] = (64, 60), off_grid: bool = False, count: int = 4):
    """Normalised data of some coils, their operator with estimated maps, the image, the true maps and the noise."""
    sampling = make_mask("radial-golden", shape, 5) if off_grid else make_mask("gaussian", shape, 3, calibration=0)
    one, target = simulate(phantom(shape)[None], mask=sampling, coils=count, noise=noise, store_maps=True)
    true = one.csm
    found = normalise(prepare(dataclasses.replace(one, csm=None)))
    A, y = encoding(found).preconditioned(found.kspace)
    nu = found.noise_std * generative._gain(A)
    return y, A, (target / found.scale[:, None, None]).to(A.csm), true, nu


def unlike(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> float:
    """Share of the coil images of x and maps a that maps b leave unexplained."""
    w = x.abs().square()
    return float(((1 - (a.conj() * b).sum(1).abs().square()) * w).sum() / w.sum())


@pytest.mark.parametrize("off_grid", [False, True])
def test_other_maps_are_about_as_far_away_as_the_true_ones(off_grid):
    y, A, x, true, nu = several(0.01, off_grid=off_grid)
    model, generator = build(), torch.Generator().manual_seed(0)
    grids = model._grids(y, A, nu, (64, 60))
    others = [model._other_maps(x, grids[-1], A, nu, generator) for _ in range(6)]
    far = [unlike(A.csm, c, x) for c in others]
    assert 0.3 < sum(far) / 6 / unlike(A.csm, true, x) < 6
    for c in others:
        torch.testing.assert_close(c.abs().square().sum(1), torch.ones(1, 64, 60), rtol=0, atol=1e-5)
        along = (A.csm.conj() * c).sum(1)
        torch.testing.assert_close(along, along.abs().to(along.dtype), rtol=0, atol=1e-5, msg="no phase of its own")
    quiet = [model._other_maps(x, grids[-1], A, nu / 10, generator) for _ in range(6)]
    assert sum(unlike(A.csm, c, x) for c in quiet) < 0.5 * sum(far), "data with less noise leave less open"


def test_other_maps_keep_the_norm_of_the_maps():
    y, A, x, _, nu = several(0.01)
    size = torch.linspace(0, 2, 60).expand(1, 1, 64, 60).clone()
    size[..., :20, :] = 0  # maps that are cut off where there is no object
    A = dataclasses.replace(A, csm=size * A.csm)
    model = build()
    grids = model._grids(y, A, nu, (64, 60))
    other = model._other_maps(x, grids[-1], A, nu, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.linalg.vector_norm(other, dim=1, keepdim=True), size, rtol=1e-4, atol=1e-6)


def test_other_maps_have_the_covariance_of_least_squares():
    """Against the inverse of the normal matrix, written out."""
    shape = (8, 6)
    csm = random((1, 2, *shape), torch.complex64)
    csm = csm / csm.abs().square().sum(1, keepdim=True).sqrt()
    A, x, nu = Cartesian(lines(shape, 2), csm), random((1, *shape), seed=1), 0.5
    model, generator = build(), torch.Generator().manual_seed(0)
    grid = generative._Grid(shape, 0.0, 1.0, model.energy, A, lambda y: y)
    P, Q, W = coils.map_series(shape)
    n = len(W) ** 2
    E = torch.einsum("hk,lw->hwkl", P, Q).reshape(-1, n) / W.flatten() / (1 / W).norm() / math.sqrt(2)
    c = csm[0].flatten(1).T.to(E.dtype)  # pixels, coils
    across = torch.eye(2) - c[:, :, None] * c[:, None, :].conj()  # a projection in every pixel
    D = torch.einsum("pij,pk->pijk", across, E).movedim(1, 0).reshape(2 * len(c), 2 * n)  # coils × pixels, of j and k
    J = torch.cat(
        (generative._DETAIL * torch.cat([torch.diag(c[:, i]) for i in range(2)]), x.flatten().repeat(2)[:, None] * D), 1
    )
    pixels = len(c)
    F_ = torch.stack([fft2(e.view(shape)).flatten() for e in torch.eye(pixels, dtype=E.dtype)], 1)
    M = lines(shape, 2).flatten().to(E.dtype)[:, None] * F_
    J = torch.block_diag(M, M) @ J / nu
    whole = torch.linalg.inv(torch.eye(J.shape[1]) + J.mH @ J)
    expected = (D @ whole[pixels:, pixels:] @ D.mH).diagonal().real.view(2, *shape)
    draws = torch.cat([model._other_maps(x, grid, A, nu, generator) for _ in range(250)])
    along = (csm.conj() * draws).sum(1, keepdim=True)
    found = (draws / along - csm).abs().square().mean(0)  # what was added, before the norm was made one again
    assert relative(found, expected.float()) < 0.2


def test_maps_of_another_norm_are_other_words_for_the_same():
    y, A, x, _, nu = several(0.01)
    model = build()

    def other(size: float) -> torch.Tensor:
        B = dataclasses.replace(A, csm=size * A.csm)
        small = model._grids(y, B, nu, (64, 60))[-1]
        return model._other_maps(x / size, small, B, nu, torch.Generator().manual_seed(0)) / size

    assert relative(other(3.0), other(1.0)) < 1e-4


def test_other_maps_are_those_of_a_solver_that_has_all_the_time(monkeypatch):
    """Much is measured of few unknowns and little of most."""
    y, A, x, _, nu = several(0.003, count=8)
    model = build()
    grid = model._grids(y, A, nu, (64, 60))[-1]

    def far() -> float:
        generator = torch.Generator().manual_seed(0)
        return sum(unlike(A.csm, model._other_maps(x, grid, A, nu, generator), x) for _ in range(2))

    soon = far()
    monkeypatch.setattr(generative, "_FITTED", 1000)
    monkeypatch.setattr(generative, "_FIT", 1e-3)
    assert soon == pytest.approx(far(), rel=0.25)


def test_draws_go_down_with_the_maps_that_were_drawn(monkeypatch):
    y, A, _, _, nu = several(0.02, (64, 60))
    model = build(draws={"chains": 2, "samples": 1, "seed": 3}, mode={"levels": 2, "rough": 3, "way": 2})
    way, seen = Generative._down, []

    def watched(self, x, z, grids, *more):
        seen.append([grid.A.csm for grid in grids])
        return way(self, x, z, grids, *more)

    monkeypatch.setattr(Generative, "_down", watched)
    monkeypatch.setattr(Generative, "_other_maps", lambda self, x, grid, A, *more: A.csm.flip(1))
    model.posterior(y, A, noise=nu)
    first, *draws = seen
    assert len(first) > 1 and len(draws) == 2
    for maps in draws:
        for drawn, found in zip(maps, first, strict=True):
            torch.testing.assert_close(drawn, found.flip(1))


def test_the_record_says_which_maps_draws_had():
    s = normalise(scan((16, 18), coils=3, noise=0.05))
    small = SMALL["draws"] | {"samples": 1}

    def had(s, **changes):
        model = gaussian(0.3, draws=small | changes)
        return reconstruct(s, model, estimate="mmse").stats["chains"][0]["maps"]

    assert (had(s), had(s, maps="fixed"), had(scan((16, 18), noise=0.05))) == ("resampled", "fixed", "fixed")


def test_draws_have_maps_of_their_own_and_a_seed_says_it_all():
    y, A, _, _, _ = several(0.02, (24, 22))
    model = build(draws={"chains": 2, "samples": 2, "seed": 3}, mode={"levels": 4, "rough": 4, "way": 4})
    own, again = (model.posterior(y, A) for _ in range(2))
    assert torch.equal(own.last, again.last)
    fixed = model.posterior(y, A, maps="fixed")
    assert not torch.equal(own.last, fixed.last)
    with pytest.raises(errors.BadOption, match="fixed or resampled"):
        build(draws={"maps": "none"})


@pytest.mark.parametrize("shape", [(1, 12, 9), (2, 8, 8)])
@pytest.mark.parametrize("ways", range(8))
def test_a_view_comes_back(shape, ways):
    x = random(shape)
    seen = generative._seen(x, (ways, 3, 5))
    assert torch.equal(generative._back(seen, (ways, 3, 5)), x)
    others = [generative._seen(x, (k, 3, 5)) for k in range(8) if k != ways]
    assert not any(other.shape == seen.shape and torch.equal(other, seen) for other in others)


def test_the_way_down_shows_every_side(monkeypatch):
    """Both formats of a rectangle, and what depends on place or direction does not add up in one."""
    shapes = set()

    class Watched(Gaussian):
        def value_and_gradient(self, x, sigma):
            shapes.add(tuple(x.shape[-2:]))
            value, slope = super().value_and_gradient(x, sigma)
            return value, slope * torch.linspace(0.8, 1.2, x.shape[-1])

    model, s = build(), normalise(scan((16, 18), noise=0.05))
    model.energy = Watched(0.3)
    shown = model(s.kspace, encoding(s)).image
    assert shapes == {(16, 18), (18, 16)}
    monkeypatch.setattr(generative, "_view", lambda generator: (0, 0, 0))
    assert relative(model(s.kspace, encoding(s)).image, shown) > 1e-3


# ------------------------------------------------------------------------------------------------ the certificate


@pytest.mark.parametrize("coils", [1, 3])
def test_every_level_descends(coils):
    s = normalise(scan((24, 27), coils=coils, noise=0.02))
    out = build(mode={"levels": 5, "steps": 6})(s.kspace, encoding(s))
    record = out.stats["certificate"][0]["levels"]
    assert len(record) == 5
    for level in record:
        objective = level["objective"]
        assert len(objective) > 1
        assert all(after <= before for before, after in zip(objective, objective[1:], strict=False))
    assert objective[-1] < objective[0]
    sigmas = [level["sigma"] for level in record]
    assert sigmas == sorted(sigmas, reverse=True)


class Inventive(Gaussian):
    """One that makes things up in a corner, as trained ones do now and then."""

    def value_and_gradient(self, x, sigma):
        value, slope = super().value_and_gradient(x, sigma)
        slope[:, :5, :5] += 100 * sigma[:, None, None]
        return value, slope


def test_what_is_made_up_in_one_place_stays_small():
    s = normalise(scan((24, 27), noise=0.02))
    model = build()
    model.energy = Inventive(0.3)
    removed = model._removed(s.kspace[:, 0], 0.1)
    assert float(removed.abs().max()) < 1, "ten times what the noise is, as the energy wants"
    model.energy = Gaussian(0.3)
    x = 0.1 * s.kspace[:, 0]
    torch.testing.assert_close(model._removed(x, 0.1), model.energy.value_and_gradient(x, torch.tensor([0.1]))[1])


def test_real_images_stay_real_and_positive():
    shape = (20, 22)
    x = phantom(shape, seed=3)[None]
    mask = lines(shape, 3)
    y = mask * fft2(x.to(torch.complex64))[:, None]
    model = gaussian(0.3)
    plain = model(y, Cartesian(mask), noise=0.01).image
    model.real = True
    out = model(y, Cartesian(mask), noise=0.01).image
    assert not bool(out.imag.any()) and float(out.real.min()) >= 0
    assert relative(out, x.to(out.dtype)) < 0.95 * relative(plain, x.to(out.dtype))
    drawn = model.posterior(y, Cartesian(mask), noise=0.01).last
    assert not bool(drawn.imag.any())


def test_a_heavier_prior_gives_an_image_of_less_energy():
    s = normalise(scan((24, 24), noise=0.05))
    model = gaussian(0.3)
    energies = []
    for lam in (0.1, 1.0, 10.0):
        x = model(s.kspace, encoding(s), lam=lam).image
        energies.append(float(model.energy(x, torch.tensor([0.1])).detach()))
    assert energies == sorted(energies, reverse=True)


# ------------------------------------------------------------------------------------------------ maps


def test_maps_are_found_with_the_image():
    """Better maps than it began with, and no accepted step uphill."""
    s = scan((24, 26), coils=4, every=2)
    start = low_resolution_maps(s.kspace, s.mask)
    rough = dataclasses.replace(s, csm=start)
    model = gaussian(0.5, mode={"levels": 6, "steps": 8, "map_steps": 20, "mu": 0.1})
    out = reconstruct(rough, model, csm="joint")
    fixed = reconstruct(rough, model)
    assert out.csm is not None and out.csm.shape == (1, 4, 24, 26)
    torch.testing.assert_close(out.csm.abs().square().sum(1), torch.ones(1, 24, 26))
    assert not torch.equal(out.csm, start)
    assert float(out.residual) < 0.9 * float(fixed.residual)
    levels = out.stats["certificate"][0]["levels"]
    for level in levels[1:]:
        for trace in (level["objective"], level["maps"]):
            assert all(after <= before for before, after in zip(trace, trace[1:], strict=False))
    assert levels[1]["maps"][-1] < levels[1]["maps"][0]


def test_of_two_starts_the_one_that_ends_lower_is_taken(monkeypatch):
    """Where the centre is narrow and nobody brought maps."""
    lines = (torch.arange(30) % 3 == 0).float().expand(32, 30)
    narrow, _ = simulate(phantom((32, 30))[None], mask=lines, coils=4)
    model, ends, seen = gaussian(0.5, mode={"map_levels": 2}), [], []
    objective, forward = generative._objective, model.forward
    monkeypatch.setattr(generative, "_objective", lambda mode: ends.append(objective(mode)) or ends[-1])
    monkeypatch.setattr(
        model, "forward", functools.wraps(forward)(lambda *a, **k: seen.append("also" in k) or forward(*a, **k))
    )
    with pytest.warns(errors.TunemriWarning, match="expect poor ones"):
        out = reconstruct(narrow, model, csm="joint")
    assert len(set(ends)) == 2
    assert objective(out) == min(ends)
    mine = dataclasses.replace(narrow, csm=low_resolution_maps(narrow.kspace, narrow.mask))
    wide, _ = simulate(phantom((16, 18))[None], mask=torch.ones(16, 18), coils=3)
    for one in (mine, wide):
        reconstruct(one, model, csm="joint")
    assert seen == [True, False, False]


def test_who_cannot_find_maps_says_so():
    with pytest.raises(errors.BadOption, match="csm"):
        reconstruct(scan((16, 16), coils=2), load("tv"), csm="joint")
    one = scan((16, 16), noise=0.02)
    assert reconstruct(one, build(), csm="joint").csm is None, "one coil has no map"
    with pytest.raises(errors.BadOption, match="one coil"):
        build()(one.kspace, encoding(one), joint=True)


def test_joint_maps_on_the_command_line(tmp_path):
    save(build(), tmp_path / "prior.safetensors")
    s = dataclasses.replace(scan((20, 22), coils=3, noise=0.02), csm=None)
    formats.write(tmp_path / "s.h5", s)
    images = []
    for way in ("joint", "low-resolution"):
        words = [
            "recon",
            tmp_path / "s.h5",
            "-m",
            tmp_path / "prior.safetensors",
            "--csm",
            way,
            "-o",
            tmp_path / f"{way}.npy",
        ]
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        assert not stop.value.code
        images.append(torch.from_numpy(np.load(tmp_path / f"{way}.npy")))
        assert json.loads((tmp_path / f"{way}.npy.json").read_text())["csm"] == way
    assert 1e-4 < relative(*images) < 0.5


def test_the_noise_that_a_scan_knows_is_used():
    s = dataclasses.replace(scan((16, 18), noise=0.05), noise_std=0.07)
    out = reconstruct(s, build())
    assert out.stats["certificate"][0]["noise"] == pytest.approx(0.07 / out.stats["scale"][0], rel=1e-5)


# ------------------------------------------------------------------------------------------------ chance


def test_a_seed_says_it_all():
    s = normalise(scan((16, 16), noise=0.02))
    model, A = build(), encoding(s)
    first, again = (model.posterior(s.kspace, A, seed=3).moments for _ in range(2))
    other = model.posterior(s.kspace, A, seed=4).moments
    assert torch.equal(first.mean, again.mean) and torch.equal(first.variance, again.variance)
    assert not torch.equal(first.mean, other.mean)


def test_rounding_stays_far_below_the_noise():
    s = scan((24, 27), noise=0.02)
    quick, exact = (reconstruct(s, build(precision=name)) for name in ("bfloat16", "float32"))
    assert relative(quick.image, exact.image) < 0.01
    record = quick.stats["certificate"][0]["levels"]
    assert all(b <= a for level in record for a, b in itertools.pairwise(level["objective"]))
    with pytest.raises(errors.BadOption, match="float16"):
        build(precision="float16")


def test_chains_can_be_stopped_and_what_they_drew_is_kept():
    s = normalise(scan((16, 16), noise=0.02))
    seen = []

    def stop(k, moments):
        seen.append(moments.count)
        return k == 3

    chains = build().posterior(s.kspace, encoding(s), samples=50, callback=stop)
    assert chains.stopped and chains.moves == 3 and chains.moments.count == 3
    assert seen == [1, 2, 3]
    assert bool(chains.moments.mean.isfinite().all())


def test_the_first_interruption_keeps_what_was_drawn(tmp_path, monkeypatch):
    save(
        build(draws={"chains": 2, "samples": 50}, mode={"way": 2}),
        tmp_path / "e.safetensors",
        {"data": "none"},
    )
    formats.write(tmp_path / "scan.h5", scan((16, 18), slices=2, noise=0.02))
    seen: list[tuple[int, int]] = []

    def told(bar: console.Progress, done: int, total: int) -> None:
        if bar.verb == "draws":
            seen.append((done, total))
            if len(seen) == 5:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(console.Progress, "__call__", told)
    before = signal.getsignal(signal.SIGINT)
    words = [
        "recon",
        tmp_path / "scan.h5",
        "-m",
        tmp_path / "e.safetensors",
        "--set",
        "estimate=mmse",
        "-o",
        tmp_path / "a.h5",
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words)])
    assert not stop.value.code
    assert signal.getsignal(signal.SIGINT) is before
    # The handler is there from the first draw on: the fifth ends the first slice, and the second is not drawn at length.
    assert seen == [(1, 50), (2, 50), (3, 50), (4, 50), (5, 50), (1, 50)]
    facts = json.loads((tmp_path / "a.h5.json").read_text())
    assert facts["status"] == "stopped after 5 of 50 draws of each chain"
    assert [record["samples"] for record in facts["chains"]] == [10, 2]
    image = formats.read_image(tmp_path / "a.h5").data
    assert bool(image.isfinite().all()) and bool((image.abs().amax((1, 2)) > 0).all())


# ------------------------------------------------------------------------------------------------ trouble


class Broken(Gaussian):
    """An energy whose gradient explodes."""

    def value_and_gradient(self, x, sigma):
        value, slope = super().value_and_gradient(x, sigma)
        return value * math.nan, slope * -1e30


@pytest.mark.parametrize("estimate", ["map", "mmse"])
def test_an_energy_that_is_not_finite_stops_at_once(estimate):
    s = normalise(scan((16, 16), noise=0.02))
    model = build()
    model.energy = Broken(0.3)
    with pytest.raises(errors.NonFinite, match="energy"):
        model(s.kspace, encoding(s), estimate=estimate)


def test_wrong_numbers_are_refused():
    s = normalise(scan((16, 16)))
    model, A = build(), encoding(s)
    for lam in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(errors.BadOption, match="lam"):
            model(s.kspace, A, lam=lam)
    with pytest.raises(errors.BadOption, match="noise"):
        model(s.kspace, A, noise=0.0)
    with pytest.raises(errors.BadOption, match="draws"):
        model.posterior(s.kspace, A, chains=0)
    with pytest.raises(errors.BadOption, match="draws"):
        model.posterior(s.kspace, A, chain=3)
    for wrong in ({"temperature": 0.0}, {"coarse": math.nan}, {"noise": -1.0}, {"thin": 0}):
        with pytest.raises(errors.BadOption, match=next(iter(wrong))):
            model.posterior(s.kspace, A, **wrong)
    for wrong in (
        {"levels": (1.0, 0.1)},
        {"energy": {"width": 3}},
        {"energy": {"widths": []}},
        {"coarse": {"width": 3}},
        {"coarse": {"corner": 0}},
        {"coarse": {"levels": [1, 0.1]}},
        {"coarse": {"noise": -1}},
        {"coarse": {"starts": 0}},
        {"coarse": {}, "energy": {"name": "paper", "size": 16, "widths": [4, 4]}},
        {"mode": {"levels": 1}},
    ):
        with pytest.raises(errors.BadOption):
            Generative(**wrong)


def test_nothing_about_sampling_was_learned():
    model = build(trained={"acceleration": [1, 1], "size": [64, 512], "coils": 1})
    assert model.outside(scan((64, 64), coils=4, every=7)) == []
    assert "matrix 32×64" in model.outside(scan((32, 64)))[0]


# ------------------------------------------------------------------------------------------------ the weight of a scan

LINE = {"slope": -3.0, "intercept": 0.5, "floor": 0.1, "ceiling": 2.0}


def test_a_line_in_the_logarithm_between_floor_and_ceiling():
    line = Regression(**LINE)
    for rho in (0.0, 0.3, 0.8):
        assert line.at(rho) == pytest.approx(math.exp(0.5 - 3 * rho))
    assert (line.at(1e9), line.at(-1e9)) == (0.1, 2.0)
    for wrong in ({"floor": 0.0}, {"floor": 3.0}, {"slope": math.nan}, {"ceiling": math.inf}, {"bend": 1.0}):
        with pytest.raises(errors.BadOption, match="regression"):
            Generative(regression=LINE | wrong)


def test_power_is_per_pixel_and_counts_all_coils():
    mask = lines((15, 18))
    y = random((1, 1, 15, 18)) * mask
    A = Cartesian(mask)
    assert power(y, A) == pytest.approx(float(y.abs().square().sum()) / 2 / 270)
    assert power(3 * y, A) == pytest.approx(9 * power(y, A))
    s = normalise(scan((20, 22), coils=3))
    assert power(s.kspace, encoding(s)) == pytest.approx(float(s.kspace.abs().square().sum()) / 2 / 440, rel=1e-5)


def test_weights_with_a_line_suggest_what_it_says(tmp_path):
    s = scan((20, 22), noise=0.02)
    ready = prepare(s)
    plain, learned = build(), build(regression=LINE)
    assert "regression" not in plain.arguments
    assert plain.suggest(ready.kspace, encoding(ready)) == {"lam": 1.0, "estimate": "map"}
    save(learned, tmp_path / "learned.safetensors")
    again = load(tmp_path / "learned.safetensors")
    expected = Regression(**LINE).at(power(ready.kspace, encoding(ready)))
    assert 0.1 < expected < 2.0
    assert reconstruct(s, again).dials["lam"] == pytest.approx(expected)
    assert reconstruct(s, again, lam=0.7).dials["lam"] == 0.7
    beyond = build(regression={"slope": 0.0, "intercept": 9.0, "floor": 1.0, "ceiling": 1e4})
    with pytest.raises(errors.BadOption, match="lam"):
        reconstruct(s, beyond)


def test_weights_that_differ_by_slice_are_made_again(tmp_path, capsys):
    """No one number is recorded for them: the line says the same the second time."""
    save(build(regression=LINE, mode={"way": 2, "levels": 2}), tmp_path / "line.safetensors", {"data": "none"})
    formats.write(tmp_path / "scan.h5", scan((20, 22), slices=3, noise=0.02))
    model = ("-m", tmp_path / "line.safetensors", "--set", "estimate=mmse")
    for words in (
        (tmp_path / "scan.h5", *model, "-o", tmp_path / "a.npy"),
        ("--from", tmp_path / "a.npy.json", "-o", tmp_path / "b.npy"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["recon", *map(str, words)])
        assert not stop.value.code, capsys.readouterr().err
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    facts = json.loads((tmp_path / "a.npy.json").read_text())
    assert facts["dials"] == {"estimate": "mmse"}
    assert len({record["lam"] for record in facts["chains"]}) > 1


def noisy(count: int, told: float) -> tuple[list, list]:
    """Scans of two slices with noise of 0.1 that say it is `told` times that."""
    volumes = [torch.stack([phantom((18, 16), seed=2 * k + i) for i in range(2)]) for k in range(count)]
    made = [simulate(x, mask=torch.ones(18, 16), noise=0.1, seed=k) for k, x in enumerate(volumes)]
    return [dataclasses.replace(s, noise_std=s.noise_std * told) for s, _ in made], [truth for _, truth in made]


@pytest.mark.parametrize("told", [0.3, 3.0])
def test_the_fit_finds_what_the_noise_of_scans_hides(told, monkeypatch):
    """Where they say a third of it, the weight that their images need is about nine times as large."""
    through: list[int] = []
    line = regression._line
    monkeypatch.setattr(regression, "_line", lambda rho, lam: through.append(len(rho)) or line(rho, lam))
    model = gaussian(0.3, mode={"way": 2, "levels": 2, "steps": 10})
    right = tuning.fit_weight(model, *noisy(4, 1.0)).rows
    seen: list[tuple[int, int]] = []
    scans, truths = noisy(4, told)
    found = tuning.fit_weight(model, scans, truths, progress=lambda *at: seen.append(at))
    assert seen == [(k, 80) for k in range(1, 81)]
    for a, b in zip(found.rows, right, strict=True):
        assert a["lam"] * told**2 == pytest.approx(b["lam"], rel=0.5)
        assert a["rho"] == b["rho"]
    assert (found.over, found.units) == ("scans", 4)
    assert through[-9:] == [6] * 8 + [8]  # each judged by the line of other scans, and then the line of all
    assert found.pays
    assert 0 < found.low <= found.gain <= found.high
    assert found.model.regression == found.regression
    assert found.model.arguments["regression"] == vars(found.regression)
    assert model.regression is None
    used = [record["lam"] for record in reconstruct(scans[0], found.model).stats["certificate"]]
    assert used == pytest.approx([found.regression.at(row["rho"]) for row in found.rows if row["scan"] == 0])


def test_the_line_is_that_of_least_squares():
    rho = [0.1, 0.2, 0.4, 0.5]
    exact = regression._line(rho, [math.exp(1 - 2 * r) for r in rho])
    assert (exact.slope, exact.intercept) == pytest.approx((-2, 1))
    assert regression._explained(exact, rho, [math.exp(1 - 2 * r) for r in rho]) == pytest.approx(1)
    slope, intercept = np.polyfit(rho, np.log([1.0, 3.0, 2.0, 5.0]), 1)
    line = regression._line(rho, [1.0, 3.0, 2.0, 5.0])
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    assert (line.floor, line.ceiling) == (1.0, 5.0)
    level = regression._line([0.3] * 3, [1.0, 2.0, 4.0])
    assert (level.slope, level.at(7.0)) == pytest.approx((0, 2))
    assert regression._explained(level, [0.3] * 3, [2.0, 2.0, 2.0]) == 0


def test_what_has_no_line_is_refused():
    model, (scans, truths) = build(), noisy(4, 1.0)
    with pytest.raises(errors.WrongModel, match="no prior"):
        tuning.fit_weight(load("tv"), scans, truths)
    for some, references in (([], []), (scans, truths[:3]), (scans[:1], truths[:1])):
        with pytest.raises(errors.NoData):
            tuning.fit_weight(model, some, references)
    with pytest.raises(errors.InconsistentShapes):
        tuning.fit_weight(model, scans, [t[0] for t in truths])
    with pytest.raises(errors.BadOption):
        tuning.fit_weight(model, scans, truths, points=2)


def test_adapt_on_the_command_line(tmp_path, capsys):
    """Weights of an energy that knows nothing, on scans that say to be noisier than they are: the less of it, the better."""
    save(build(mode={"way": 2, "levels": 2}), tmp_path / "prior.safetensors", {"data": "none"})
    volume = torch.stack([phantom((18, 16), seed=k) for k in range(5)])
    s, truth = simulate(volume, mask=torch.ones(18, 16), noise=0.1, seed=1)
    s = dataclasses.replace(s, noise_std=10 * s.noise_std)
    formats.write(tmp_path / "known.h5", s, reference=truth)
    formats.write(tmp_path / "unknown.h5", s)

    def run(*words) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        return int(stop.value.code or 0), capsys.readouterr().err

    old, new = tmp_path / "prior.safetensors", tmp_path / "new.safetensors"
    for words, said in (
        ((tmp_path / "unknown.h5",), "no ground truth"),
        ((tmp_path / "known.h5", "--by", "heldout-kspace"), "by: "),
    ):
        code, text = run("adapt", old, *words, "-o", new)
        assert code == 2
        assert said in text
        assert not new.exists()
    code, text = run("adapt", old, tmp_path / "known.h5", "-o", new)
    assert code == 0, text
    header = card(new)
    adapted = header["recipe"]["adapted"][0]
    assert header["arguments"]["regression"] == adapted["regression"]
    assert (adapted["units"], adapted["over"]) == (5, "slices")
    assert 0 < adapted["interval_db"][0] <= adapted["gain_db"]
    for name, value in load(old).state_dict().items():
        assert torch.equal(value, load(new).state_dict()[name])
    code, text = run("recon", tmp_path / "unknown.h5", "-m", new, "-o", tmp_path / "x.npy", "--slice", "0")
    assert code == 0, text
    used = json.loads((tmp_path / "x.npy.json").read_text())["dials"]["lam"]
    assert used == pytest.approx(Regression(**adapted["regression"]).at(adapted["tried"][0]["rho"]))
    assert used < 1


# ------------------------------------------------------------------------------------------------ the noise


@pytest.mark.parametrize("coils", [1, 4])
def test_the_noise_is_found_under_a_signal(coils):
    s = scan((64, 60), noise=0.05, coils=coils)
    A = encoding(s)
    assert 0.04 < noise_level(s.kspace, A) < 0.065
    pure = 0.05 * random((1, coils, 64, 60))
    assert noise_level(pure, A) == pytest.approx(0.05, rel=0.1)
    assert noise_level(torch.zeros_like(pure), A) == 0.002


def test_off_the_grid_too():
    shape = (24, 26)
    k = trajectories.radial(shape, 30)[None]
    x = phantom(shape).to(torch.complex64)[None]
    A = NonCartesian(k, shape=shape)
    y = A(x) + 0.03 * random((1, 1, k.shape[1]))
    assert 0.025 < noise_level(y, A) < 0.15
    for estimate in ("map", "mmse"):
        out = build()(y, A, estimate=estimate)
        assert float(out.residual) < 0.5
