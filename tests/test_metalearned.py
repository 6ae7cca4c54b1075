"""The guarantees of the guarded method, whatever its weights: for random ones, odd sizes, one coil and many."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from laws import SHAPES, lines, random, relative, scan
from test_cli import run  # noqa: F401  the fixture
from tunemri import errors, formats, methods, tuning
from tunemri.datasets import Example, Sampler
from tunemri.methods import metalearned, reconstruct
from tunemri.methods.metalearned import PRESETS, MetaLearned, Objective, noise_level, sampling_ratio
from tunemri.networks.features import ACTIVATIONS, Features
from tunemri.operators import Cartesian, LinearOperator, encoding
from tunemri.scan import Reconstruction, Scan, normalise
from tunemri.simulate import coil_maps, phantom, simulate
from tunemri.training import Plan, fit
from tunemri.trajectories import TRAJECTORIES
from tunemri.tuning import adapting

SMALL = {"phases": 3, "tasks": [0.1, 0.3, 0.5], "features": {"channels": 2}, "proposal": {"width": 4, "levels": 2}}
every_preset = pytest.mark.parametrize("name", ["paper", "small"])
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def build(name: str, seed: int = 0, **changes) -> MetaLearned:
    torch.manual_seed(seed)
    return MetaLearned(**({"paper": PRESETS["paper"], "small": SMALL}[name] | changes)).double().eval()


def propose_noise(model: MetaLearned, size: float = 1.0) -> None:
    with torch.no_grad():
        for k, p in enumerate(p for stage in model.stages or [] for p in stage.parameters()):
            p.copy_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))


def problem(shape, coils: int = 1, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, LinearOperator]:
    csm = coil_maps(shape, coils, seed=seed)[None].to(torch.complex128) if coils > 1 else None
    A = Cartesian(lines(shape, 2).double(), csm)
    x = random((batch, *shape), torch.complex128, seed)
    return A(x), A


def energy(model: MetaLearned, shape, coils=1, epsilon=0.01, kappa=0.5) -> tuple[Objective, torch.Tensor]:
    y, A = problem(shape, coils)
    rows = {
        "kappa": torch.tensor([kappa, kappa / 2]).double(),
        "epsilon": torch.tensor([epsilon, 2 * epsilon]).double(),
    }
    return Objective(y=y, A=A, features=model.features, mu=0.1, **rows), random((2, *shape), torch.complex128, 5)


# ------------------------------------------------------------------------------------------------ the energy


@every_activation
@pytest.mark.parametrize("coils", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_in_closed_form_is_that_of_autograd(shape, coils, activation):
    torch.manual_seed(1)
    features = Features(channels=3, layers=4, activation=activation, delta=0.05, spread=2, last=1.0).double()
    objective, x = energy(build("small"), shape, coils)
    objective = replace(objective, features=features)
    leaf = x.clone().requires_grad_()
    (slow,) = torch.autograd.grad(objective.value(leaf).sum(), leaf)
    point = objective.at(x)
    torch.testing.assert_close(point.gradient, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(point.phi, objective.value(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(point.misfit, (objective.A(x) - objective.y).abs().square().sum((1, 2, 3)) / 2)


@every_activation
def test_an_activation_and_its_slope(activation):
    s, curvature = ACTIVATIONS[activation]
    h = torch.linspace(-1, 1, 20001, dtype=torch.float64).requires_grad_()
    for delta in (0.01, 0.3):
        value, slope = s(h, delta)
        torch.testing.assert_close(slope, torch.autograd.grad(value.sum(), h, retain_graph=True)[0], rtol=0, atol=1e-12)
        value, slope, h0 = value.detach(), slope.detach(), h.detach()
        assert 0 <= float(slope.min()) <= float(slope.max()) <= 1
        steepest = float(slope.diff().abs().max() / (h0[1] - h0[0]))
        assert 0.98 * curvature / delta <= steepest <= curvature / delta * (1 + 1e-9)
        assert float((value - h0.clamp(min=0)).abs().max()) <= delta + 1e-12


def test_the_smoothed_norm_lies_between_the_norm_and_the_norm_less_m_epsilon():
    features, x = build("small").features.requires_grad_(False), random((2, 9, 11), torch.complex128)
    exact = features(x).square().sum(1).sqrt().sum((1, 2))
    epsilon = torch.tensor([0.1, 1e-9]).double()
    smooth = features.value(x, epsilon)
    assert bool((smooth <= exact).all())
    assert bool((exact <= smooth + 99 * epsilon).all())
    assert float(exact[0] - smooth[0]) > 0.1 * 99 * 0.1  # not merely + ε, as printed in the paper


@every_activation
@pytest.mark.parametrize("seed", range(3))
def test_the_constants_bound_what_they_say_they_bound(activation, seed):
    shape = (10, 13)
    torch.manual_seed(seed)
    model = build(
        "small", seed, features={"channels": 3, "activation": activation, "delta": 0.02, "spread": 2, "last": 1.0}
    )
    objective, _ = energy(model.requires_grad_(False), shape, epsilon=0.05, kappa=0.7)
    bound = model.constants(shape, 0.7, 0.05)
    jacobian, curvature = model.features.lipschitz()
    reached = 0.0
    for k in range(12):
        size = 10.0 ** (-(k % 4))
        x = random((2, *shape), torch.complex128, 3 * k) * 0.1
        z = x + size * random((2, *shape), torch.complex128, 3 * k + 1)
        apart = (z - x).abs().square().sum((1, 2)).sqrt()
        features = (model.features(z) - model.features(x)).square().sum((1, 2, 3)).sqrt()
        assert bool((features <= jacobian * apart).all())
        change = (objective.at(z).gradient - objective.at(x).gradient).abs().square().sum((1, 2)).sqrt()
        ratio = float((change / apart)[0])
        assert ratio <= bound["L"] + 0.1  # 0.1: μ of this objective
        reached = max(reached, ratio)
    assert reached > 1e-4 * bound["L"], "a bound that far off says nothing"
    assert curvature > 0


# ------------------------------------------------------------------------------------------------ the guarantees P1 - P6


@every_preset
@pytest.mark.parametrize("coils", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_phase_descends_whatever_the_weights(name, coils, seed):
    """P1, P2, P6: φ falls by ‖x⁺ − x‖²/a in each phase; Ψ never rises, across reductions of ε too."""
    shape = SHAPES[seed]
    changes = {"rule": {"sigma": 1e3 if seed % 2 else 1.0}, "epsilon": 0.1, "mu": 1e-3}
    model = build(name, seed, **changes)
    with torch.no_grad():
        for p in model.parameters():  # any weights, not those of a sensible start
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        y, A = problem(shape, coils, seed=seed)
        kappa = torch.tensor([0.9, 0.2]).double()
        first, trace = model.descend(y, A, kappa, phases=25)
    psi = torch.stack([first, *(step.psi for step in trace)])
    assert bool((psi.diff(dim=0) <= 0).all())
    reductions = 0
    for step, following in zip(trace, trace[1:], strict=False):
        objective = Objective(y=y, A=A, kappa=kappa, epsilon=step.epsilon, features=model.features, mu=model.mu)
        length = (step.after.x - step.before.x).abs().square().sum((1, 2))
        assert bool((objective.value(step.after.x) <= step.before.phi - length / model.rule.a + 1e-12).all())
        reduced = following.epsilon < step.epsilon
        reductions += int(reduced.sum())
        rms = objective.at(step.after.x).gradient.abs().square().mean((1, 2)).sqrt()
        assert bool((reduced == (rms < model.rule.sigma * model.rule.gamma * step.epsilon)).all())
    if seed % 2:
        assert reductions > 0, "ε was never reduced: nothing was tested"
    assert any(bool((step.branch == 2).any()) for step in trace)


@every_preset
@pytest.mark.parametrize("coils", [1, 3])
def test_the_line_search_ends_within_the_bound_and_the_gradient_vanishes(name, coils):
    """P3, P4: trials, and min_t ‖∇φ‖² ≤ rate (φ(x₀) − inf φ) / T, at fixed ε; and it does go to zero."""
    shape, epsilon, kappa, phases = (12, 11), 0.3, 0.5, 250
    features = PRESETS["paper"]["features"] if name == "paper" else SMALL["features"]
    features = features | {"delta": 0.3, "last": 0.3}
    model = build(name, 2, features=features, epsilon=epsilon, rule={"sigma": 1e-9, "tolerance": 0.0}, mu=0.01)
    y, A = problem(shape, coils)
    with torch.no_grad():
        _, trace = model.descend(y, A, torch.full((2,), kappa).double(), phases=phases)
    bound = model.constants(shape, kappa, epsilon)
    assert bool((trace[0].epsilon == trace[-1].epsilon).all())
    for step in trace:
        assert int(step.trials.max()) <= bound["trials"]
    norms = torch.stack([step.after.gradient.abs().square().sum((1, 2)) for step in trace])
    fall = trace[0].before.phi  # inf φ ≥ 0
    assert bool((norms.amin(0) <= bound["rate"] * fall / phases).all())
    assert bool((norms[-1] < 1e-4 * norms[0]).all())


def test_more_trials_than_proved_would_show():
    """The bound is of use: a start from a longer step takes more trials, up to it."""
    model = build("small", 0, features={"channels": 2, "last": 30.0, "delta": 0.05}, rule={"rho": 0.8})
    y, A = problem((12, 14))
    with torch.no_grad():
        model.alpha.fill_(9.0)
        _, trace = model.descend(y, A, torch.full((2,), 0.9).double(), phases=30)
    bound = model.constants((12, 14), 0.9, float(trace[-1].epsilon.min()))["trials"]
    most = max(int(step.trials.max()) for step in trace)
    assert 3 < most <= bound


def test_an_adverse_proposal_changes_nothing_about_the_guarantee():
    """P1 and P2 use u through the tests alone: let the network propose noise."""
    model = build("small", 0)
    y, A = problem((16, 15), 3)
    propose_noise(model)
    with torch.no_grad():
        first, trace = model.descend(y, A, torch.full((2,), 0.5).double())
        assert [set(step.branch.tolist()) for step in trace] == [{4}, {4}, {2}], "noise was taken"
        psi = torch.stack([first, *(step.psi for step in trace)])
        assert bool((psi.diff(dim=0) <= 0).all())
        model.guarded = False
        first, trace = model.descend(y, A, torch.full((2,), 0.5).double())
        psi = torch.stack([first, *(step.psi for step in trace)])
        assert bool((psi[-1] > psi[0]).all()), "without the guard it would do harm"


def test_half_of_a_refused_proposal_may_pass():
    """A proposal that overshoots the minimum of φ along its way is taken in part, and φ still falls."""
    model = build("small", 0, epsilon=0.1, mu=1.0)  # φ is nearly a parabola: twice the way to its minimum is too far
    y, A = problem((16, 15), 3)
    kappa = torch.full((2,), 0.01).double()
    branches = set()
    with torch.no_grad():
        for factor in (0.5, 1.5, 2.2, 5.0, 50.0):
            model._propose = lambda t, point, *_, factor=factor: (point.x - factor * point.gradient / 2, point.data)
            first, trace = model.descend(y, A, kappa)
            psi = torch.stack([first, *(step.psi for step in trace)])
            assert bool((psi.diff(dim=0) <= 0).all())
            branches.add(int(trace[0].branch[0]))
            if int(trace[0].branch[0]) == 3:
                taken, way = trace[0].after.x - trace[0].before.x, trace[0].proposed.x - trace[0].before.x
                share = float(taken.abs().sum() / way.abs().sum())
                assert min(abs(share - 0.5), abs(share - 0.25)) < 1e-9
    assert branches == {1, 3, 4}


def test_a_step_up_is_not_the_end_of_the_way():
    """A proposal above x is refused, yet the next one goes on from it, and is taken where it leads below x."""
    model = build(
        "small", 0, epsilon=0.1, mu=1.0, rule={"damping": 0}
    )  # φ is nearly a parabola, its minimum half a gradient away
    y, A = problem((16, 15), 3)
    starts, factors = [], iter((5.0, 1.0, 1.0))

    def propose(t, point, objective, alpha, tau):
        starts.append(point.x)
        return point.x - next(factors) * point.gradient / 2, point.data

    model._propose = propose
    with torch.no_grad():
        first, trace = model.descend(y, A, torch.full((2,), 0.01).double())
    assert [step.branch.tolist() for step in trace[:2]] == [[4, 4], [1, 1]]
    assert torch.equal(trace[0].after.x, trace[0].before.x), "x waits"
    assert torch.equal(starts[1], trace[0].proposed.x)
    psi = torch.stack([first, *(step.psi for step in trace)])
    assert bool((psi.diff(dim=0) <= 0).all())
    assert bool((psi[2] < psi[0]).all())


def test_the_published_monotone_quantity_is_not_monotone():
    """Ψ needs κ m ε; with ε alone, as printed, a reduction of ε raises it."""
    objective, x = energy(build("small"), (20, 24), epsilon=0.05)
    smaller = replace(objective, epsilon=0.9 * objective.epsilon)
    kappa, m = objective.kappa, 20 * 24
    printed = objective.value(x) + objective.epsilon, smaller.value(x) + smaller.epsilon
    ours = objective.value(x) + kappa * m * objective.epsilon, smaller.value(x) + kappa * m * smaller.epsilon
    assert bool((printed[1] > printed[0]).all())
    assert bool((ours[1] <= ours[0]).all())


# ------------------------------------------------------------------------------------------------ the network


def test_the_published_size():
    model = MetaLearned(**PRESETS["paper"])
    assert sum(p.numel() for p in model.parameters()) == 675
    assert sum(p.numel() for p in model.features.parameters()) == 648
    assert len(model.alpha) == 11
    assert sum(p.numel() for p in model.task_parameters()) == 4


def test_the_paper_s_proposal_is_the_linearised_proximal_step():
    """u minimises ⟨κ∇r(z), u − z⟩ + ‖u − z‖²/2β + ‖u − z‖²/2α, with τ = αβ/(α + β)."""
    model = build("paper").requires_grad_(False)
    objective, x = energy(model, (9, 10))
    point = objective.at(x)
    alpha, beta = torch.tensor(0.7).double(), torch.tensor(0.2).double()
    u, _ = model._propose(0, point, objective, alpha, alpha * beta / (alpha + beta))
    z = x - alpha * point.data
    slope = objective.at(z).prior + (u - z) / beta + (u - z) / alpha
    assert float(slope.abs().max()) < 1e-12


@every_preset
def test_it_differentiates_as_it_runs(name):
    """The derivative of the guarded image, both branches in one batch, is that of the difference quotient."""
    model = build(name, 0, epsilon=0.1, features={"channels": 2, "delta": 0.3, "last": 1.0})
    y, A = problem((8, 9), batch=2)
    weight = random((2, 8, 9), torch.complex128, 9)
    with torch.no_grad():
        for stage in model.stages or []:
            stage.trunk.last.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)

    def value() -> torch.Tensor:
        image = model(y, A, task=0.2).image
        return (weight.conj() * image).real.sum()

    value().backward()
    parameter = model.features.kernels[0]
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert parameter.grad is not None
    slope = float((parameter.grad * direction).sum())
    with torch.no_grad():
        branches = [c["branch"] for c in model(y, A, task=0.2).stats["certificate"]]
        parameter.add_(1e-6 * direction)
        above = float(value())
        parameter.sub_(2e-6 * direction)
        below = float(value())
    assert slope == pytest.approx((above - below) / 2e-6, rel=1e-4)
    assert branches


@every_preset
def test_samples_take_their_own_branch(name):
    """A batch is its samples: where one is refused, another need not be."""
    model = build(name, 3, epsilon=0.1)
    y, A = problem((14, 15), coils=2, batch=3)
    y = y * torch.tensor([1e-3, 1.0, 30.0]).double()[:, None, None, None]
    with torch.no_grad():
        together = model(y, A, task=0.3)
        for b in range(3):
            alone = model(y[b : b + 1], A.sample(b), task=0.3)
            assert relative(alone.image, together.image[b : b + 1]) < 1e-9
            assert alone.stats["certificate"][0]["branch"] == together.stats["certificate"][b]["branch"]


# ------------------------------------------------------------------------------------------------ tasks


def test_the_sampling_ratio_is_that_of_the_mask():
    for coils in (1, 4):
        y, A = problem((16, 18), coils)
        expected = float(A.mask.expand(-1, -1, 16, 18).mean())
        torch.testing.assert_close(sampling_ratio(y, A), torch.full((2,), expected).double(), rtol=1e-6, atol=0)


def test_kappa_falls_with_the_ratio_and_rises_with_the_noise():
    model = build("small")
    assert model.omega is not None
    assert model.noisiness is not None
    ratios = torch.linspace(0.05, 0.7, 40)
    quiet, loud = (level * random((1, 1, 20, 20), torch.complex128).expand(40, -1, -1, -1) for level in (1e-3, 0.1))
    for seed in range(5):
        with torch.no_grad():
            model.omega.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.3)
            a, b = model.kappa(ratios, quiet), model.kappa(ratios, loud)
        assert bool((a.diff() <= 0).all())
        assert bool((b > a).all())
        assert float(a[0]) > float(a[-1])
        assert torch.equal(a[:3], a[:1].expand(3)), "constant beyond the tasks"


def test_the_weights_of_the_paper_are_interpolated_between_tasks():
    model = build("paper")
    assert model.omega is not None
    with torch.no_grad():
        model.omega.copy_(torch.tensor([0.3, -0.1, 0.2, 0.0]))
        y = torch.ones(3, 1, 4, 4)
        kappa = model.kappa(torch.tensor([0.1, 0.25, 0.9]), y)
    torch.testing.assert_close(kappa, (10 * torch.tensor([0.3, 0.05, 0.0])).double().sigmoid())


def test_noise_shows_in_the_outer_samples():
    noise = random((3, 2, 64, 64)) * torch.tensor([0.001, 0.01, 0.1])[:, None, None, None]
    found = noise_level(noise * lines((64, 64), 2))
    assert bool((found.diff() > 0.9).all())
    assert float(noise_level(torch.zeros(1, 1, 8, 8))) == -2


def test_the_task_is_suggested_by_the_scan_and_kappa_can_be_set():
    s = normalise(scan((24, 30), every=3))
    model = methods.make("meta-learned", SMALL).eval()
    suggested = model.suggest(s.kspace, encoding(s))
    assert suggested == {"task": pytest.approx(1 / s.acceleration, rel=1e-5), "kappa": 1.0}
    weights = [reconstruct(s, model, **d).stats["certificate"][0]["kappa"] for d in ({}, {"kappa": 2}, {"task": 0.1})]
    assert weights[1] == pytest.approx(2 * weights[0], rel=1e-5)
    assert weights[2] > weights[0]
    alone = MetaLearned(tasks=[], phases=1).eval()
    assert set(alone.dials) == {"kappa"}
    assert not alone.task_parameters()
    assert reconstruct(s, alone).stats["certificate"][0]["kappa"] == 1


def test_every_slice_brings_its_certificate():
    out = reconstruct(scan((24, 30), slices=3), methods.make("meta-learned", SMALL).eval())
    certificates = json.loads(json.dumps(out.stats["certificate"]))
    assert len(certificates) == 3
    for c in certificates:
        assert c["descent"]
        assert c["guarded"]
        assert len(c["psi"]) == 4
        assert len(c["branch"]) == len(c["trials"]) == 3
        assert all(math.isfinite(c[key]) for key in ("gradient", "data_residual", "epsilon", "kappa", "accepted"))
        assert all(
            (trials > 0) == (branch == "gradient") for trials, branch in zip(c["trials"], c["branch"], strict=True)
        )


# ------------------------------------------------------------------------------------------------ training


def example(seed: int, batch: int = 2) -> Example:
    x = random((batch, 16, 18), seed=seed)
    A = Cartesian(lines((16, 18)))
    return Example(y=A(x), A=A, target=x)


def trained(bilevel: str, **changes) -> MetaLearned:
    torch.manual_seed(0)
    return MetaLearned(**SMALL | {"training": {"bilevel": bilevel, **changes}, "epsilon": 0.1}).train()


def gradients(model: MetaLearned, batch: Example) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch, torch.Generator()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_two_levels_do_not_mix():
    """Alternation: θ answers to the lower batch alone, ω to the upper one alone."""
    lower, upper = example(0), example(1, batch=1)
    joint_lower = gradients(trained("joint"), lower)
    joint_upper = gradients(trained("joint"), upper)
    both = gradients(trained("alternate"), replace(lower, upper=upper))
    for name, gradient in both.items():
        expected = joint_upper if name in ("omega", "noisiness") else joint_lower
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    assert relative(joint_lower["omega"], joint_upper["omega"]) > 1e-3, "both levels pull alike: nothing was tested"


def test_differences_are_taken_in_full_precision():
    """Under bfloat16 a displaced weight would not reach the convolutions at all."""
    batch = example(0)
    model = trained("penalty", checkpoint=True, hinge=0.0)

    def pull() -> Tensor:
        model.zero_grad()
        model.training_plan = replace(model.training_plan, penalty=1.0)
        model.loss(replace(batch, upper=example(1)), torch.Generator()).backward()
        first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.training_plan = replace(model.training_plan, penalty=0.0)
        model.loss(replace(batch, upper=example(1)), torch.Generator()).backward()
        return torch.cat([(first[n] - p.grad).flatten() for n, p in model.named_parameters() if p.grad is not None])

    plain = pull()
    with torch.autocast("cpu", torch.bfloat16):
        half = pull()
    assert float(plain.norm()) > 0
    assert relative(half, plain) < 0.05


@pytest.mark.parametrize("log", [False, True])
def test_magnitudes_tell_noise_in_the_dark_from_one_wrong_pixel(log):
    truth = torch.zeros(1, 16, 16, dtype=torch.complex64)
    noise = random((1, 16, 16), torch.complex64, 0)
    spot = torch.zeros_like(truth)
    spot[0, 3, 4] = torch.linalg.norm(noise)
    dark, one = (
        [metalearned._error(x, truth, metalearned._Training(log=log, magnitude=m)) for m in (0.0, 1.0)]
        for x in (noise, spot)
    )
    torch.testing.assert_close(dark[0], one[0])
    assert bool(dark[1] > one[1] + 0.1)


@pytest.mark.parametrize("bilevel", ["alternate", "penalty", "joint"])
def test_the_conventional_network_has_one_level(bilevel):
    """Without a task weight, the samples of the upper level are more of the same."""
    batch = replace(example(0), upper=example(1, batch=1))
    torch.manual_seed(0)
    model = MetaLearned(**SMALL | {"tasks": [], "training": {"bilevel": bilevel}, "epsilon": 0.1}).train()
    total = model.loss(batch, torch.Generator())
    parts = [model.loss(part, torch.Generator()) for part in (replace(batch, upper=None), batch.upper)]
    torch.testing.assert_close(total, sum(parts) / 2)


def test_the_gradient_of_the_penalty_is_that_of_differences():
    model = trained("penalty", penalty=0.3, log=False, hinge=0.0).double()
    with torch.no_grad():
        model.features.kernels[-1].mul_(30)
    x = random((2, 12, 10), torch.complex128, 0)
    A = Cartesian(lines((12, 10)).double())
    batch = Example(y=A(x), A=A, target=x, upper=Example(y=A(x[:1]), A=A, target=x[:1].conj()))
    found = gradients(model, batch)
    for name in ("features.kernels.0", "omega", "beta"):
        p = dict(model.named_parameters())[name]
        direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(step * direction)
            values.append(float(model.loss(batch, torch.Generator()).detach()))
            with torch.no_grad():
                p.sub_(step * direction)
        slope = (values[0] - values[1]) / 2e-5
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("bilevel", ["alternate", "penalty", "joint"])
def test_checkpoints_of_phases_change_nothing(bilevel):
    x = random((2, 12, 10), torch.complex128, 0)
    A = Cartesian(lines((12, 10)).double())
    batch = Example(y=A(x), A=A, target=x, upper=Example(y=A(x[:1]), A=A, target=x[:1].conj()))
    models = [
        trained(bilevel, checkpoint=flag, penalty=0.3, log=False, magnitude=0.5).double() for flag in (False, True)
    ]
    before = [p.clone() for p in models[1].parameters()]
    plain, spared = (gradients(model, batch) for model in models)
    assert plain.keys() == spared.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(plain[name], spared[name], rtol=1e-5, atol=1e-9 * largest, msg=name)
    assert all(map(torch.equal, before, models[1].parameters())), "the weights were left displaced"


def test_stairs_and_the_guard_set_in_when_they_should():
    model = trained("joint", first=1, stair=2, enforce=3)
    seen = []
    for step in range(7):
        seen.append(model._phases_now())
        model.loss(example(step), torch.Generator())
    assert seen == [1, 1, 2, 2, 3, 3, 3]
    assert int(model.steps) == 7
    fresh = trained("joint", enforce=10**6)
    propose_noise(fresh)
    with torch.no_grad():
        y, A = example(0).y, example(0).A
        _, trace = fresh.descend(y, A, torch.ones(2))
        assert all(bool((step.branch == 1).all()) for step in trace)
        _, trace = fresh.eval().descend(y, A, torch.ones(2))
        assert not bool((trace[0].branch == 1).any()), "a trained network is always guarded"


def test_training_makes_proposals_that_are_taken(tmp_path):
    """From proposals that raise the energy to ones that lower it, in a few steps."""
    torch.manual_seed(0)
    model = MetaLearned(**SMALL | {"training": {"enforce": 20, "hinge": 3.0}, "epsilon": 0.05})
    propose_noise(model, 0.3)

    def taken() -> float:
        model.eval()
        with torch.no_grad():
            batch = example(1000)
            certificates = model(batch.y, batch.A).stats["certificate"]
        return sum(c["accepted"] for c in certificates) / len(certificates)

    before = taken()
    fit(model, lambda step, rank: example(step), Plan(steps=40, lr=5e-3, warmup=4, average=0.9), tmp_path)
    assert before < 0.4
    assert taken() > 0.8


def test_an_unrolled_network_gives_the_first_proposals():
    single = methods.make("single-weight", {"main": {"name": "unrolled", "stages": 2, "width": 4, "levels": 2}})
    with torch.no_grad():
        single.main.steps.copy_(torch.tensor([0.9, 0.6]))
    model = MetaLearned(**SMALL | {"guarded": False, "phases": 2}).eval()
    model.start_from(dict(single.main.named_parameters()))
    with torch.no_grad():
        model.beta.fill_(-30.0)  # without the descent step of the paper
    y, A = problem((16, 12), 2)
    y, A = y.to(torch.complex64), Cartesian(A.mask.float(), A.csm.to(torch.complex64))
    assert relative(model(y, A).image, single(y, A).image) < 1e-5
    with pytest.raises(errors.WrongModel, match="unrolled"):
        MetaLearned(**SMALL | {"proposal": {"width": 5, "levels": 2}}).start_from(dict(single.main.named_parameters()))


def test_a_sampler_for_tasks_and_levels():
    images = {"a": [random((40, 40), seed=k).abs() + 100 * k for k in range(10)]}
    ratios = (0.1, 0.3)
    sampler = Sampler(
        images=images,
        batch=4,
        size=32,
        masks=("random", "poisson"),
        ratios=ratios,
        coils=1,
        bank=4,
        upper=2,
        noise=(1e-3, 1e-3),
    )
    plain = Sampler(images=images, batch=4, size=32, masks=("random",), coils=1, bank=4)
    assert plain(0).upper is None
    for step in range(3):
        batch = sampler(step)
        assert batch.upper is not None
        for part, count in ((batch, 4), (batch.upper, 2)):
            found = sampling_ratio(part.y, part.A)
            torch.testing.assert_close(found, torch.tensor([ratios[b % 2] for b in range(count)]), rtol=0.02, atol=0)
    assert sampler.domain["acceleration"] == pytest.approx([1 / 0.3, 10])
    for wrong in ({"ratios": (0.1, 0.2, 0.3)}, {"ratios": (0.0,)}, {"upper": -1}):
        with pytest.raises(errors.BadOption, match=r"data\."):
            Sampler(images=images, size=32, masks=("random",), coils=1, bank=4, **wrong)


def test_what_cannot_be_is_refused():
    for wrong in (
        {"tasks": [0.3, 0.2]}, {"tasks": [0.0]}, {"phases": 0}, {"epsilon": 0.0}, {"rule": {"rho": 1.0}}, {"rule": {"b": 1}},
        {"features": {"activation": "relu"}}, {"features": {"kernels": 3}}, {"training": {"bilevel": "tri"}}, {"proposal": {"depth": 3}},
    ):  # fmt: skip
        with pytest.raises(errors.BadOption):
            MetaLearned(**wrong)


def test_stopped_and_resumed_is_the_same_to_the_bit(tmp_path):
    """Stairs, the guard's onset and λ count steps: they must go on where they were."""

    def fresh() -> MetaLearned:
        torch.manual_seed(0)
        training = {"stair": 3, "enforce": 4, "bilevel": "penalty", "penalty": 1e-3, "growth": 1.5}
        return MetaLearned(**SMALL | {"training": training, "epsilon": 0.1})

    def batches(step: int, rank: int) -> Example:
        return replace(example(step), upper=example(step + 100, batch=1))

    def broken(step: int, rank: int) -> Example:
        if step == 6:
            raise RuntimeError
        return batches(step, rank)

    plan = Plan(steps=9, warmup=2, checkpoint=0.0)
    whole = fit(fresh(), batches, plan, tmp_path / "whole").state_dict()
    with pytest.raises(RuntimeError):
        fit(fresh(), broken, plan, tmp_path / "parts")
    resumed = fit(fresh(), batches, plan, tmp_path / "parts", resume=True).state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


# ------------------------------------------------------------------------------------------------ off the grid


@pytest.mark.parametrize("coils", [1, 3])
def test_the_guarantees_hold_off_the_grid(coils):
    """P1, P2 and the line search's bound for samples on spokes: ‖A‖² of the weighted operator is below 2."""
    shape = (20, 24)
    trajectory = TRAJECTORIES["radial"](shape, 11)[None]
    csm = coil_maps(shape, coils, seed=1)[None] if coils > 1 else None
    A = encoding(
        Scan(kspace=torch.ones(1, coils, trajectory.shape[1]) + 0j, trajectory=trajectory, csm=csm, image_shape=shape)
    )
    y = A(phantom(shape, seed=2)[None].to(torch.complex64))
    A, y = A.preconditioned(y)
    norm = A.norm()
    assert norm**2 < 2
    model = build("small", 1, epsilon=0.1, rule={"a": 1e3}).float()
    with torch.no_grad():
        first, trace = model.descend(y, A, torch.tensor([0.3]), phases=12)
    psi = torch.stack([first, *(step.psi for step in trace)])
    assert bool((psi.diff(dim=0) <= 0).all())
    for step in trace:
        length = (step.after.x - step.before.x).abs().square().sum((1, 2))
        objective = Objective(
            y=y, A=A, kappa=torch.tensor([0.3]), epsilon=step.epsilon, features=model.features, mu=model.mu
        )
        with torch.no_grad():
            assert bool((objective.value(step.after.x) <= step.before.phi - length / model.rule.a + 1e-6).all())
        bound = model.constants(shape, 0.3, float(step.epsilon), norm=norm)
        assert int(step.trials.max()) <= bound["trials"]


def test_one_network_reconstructs_off_the_grid_as_on_it():
    """The same weights, on spokes so many that nothing is missing, give what they give on the full grid."""
    shape = (24, 24)
    x = phantom(shape, seed=1)[None].to(torch.complex64)
    model = build("small", 0).float()
    trajectory = TRAJECTORIES["radial"](shape, 60)[None]
    spokes = Scan(kspace=torch.ones(1, 1, trajectory.shape[1]) + 0j, trajectory=trajectory, image_shape=shape)
    spokes = replace(spokes, kspace=encoding(spokes)(x))
    grid = replace(scan(shape, every=1), kspace=Cartesian(torch.ones(1, 1, *shape))(x))
    off, on = (reconstruct(s, model, task=0.5).image for s in (spokes, grid))
    assert relative(off, on) < 0.1
    c = reconstruct(spokes, model).stats["certificate"][0]
    assert c["descent"]
    # The corners of k-space are missing: π/4 of it is there.
    A, y = encoding(spokes).preconditioned(spokes.kspace)
    assert 0.6 < float(sampling_ratio(y, A)) < 1.1


# ------------------------------------------------------------------------------------------------ what a file says


def test_the_header_holds_the_constants_of_the_guarantee(tmp_path, run):  # noqa: F811
    model = build("small", 1).float()
    path = tmp_path / "m.safetensors"
    methods.save(model, path)
    said = methods.card(path)["guarantees"]
    assert [row["ratio"] for row in said["tasks"]] == list(model.tasks)
    assert said["rule"]["a"] == model.rule.a
    quiet = torch.full((1, 1, 4, 4), 0.01)
    for row in said["tasks"]:
        kappa = float(model.kappa(torch.tensor([row["ratio"]]), quiet).detach())
        assert row["kappa"] == pytest.approx(kappa, rel=1e-5)
        expected = model.constants((256, 256), row["kappa"], said["epsilon"])
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        assert expected.keys() == {"M", "L_J", "L", "step", "trials", "rate"}
    assert json.loads(run("info", path, "--json").out)["guarantees"] == said
    methods.save(
        methods.make("single-weight", {"weights": [1.0, 0.0], "main": {"name": "unet", "width": 2}}),
        tmp_path / "s.safetensors",
    )
    assert "guarantees" not in methods.card(tmp_path / "s.safetensors")


# ------------------------------------------------------------------------------------------------ adaptation


class Scaled(methods.Reconstructor):
    """x̂ = x e^{ω - 1.7} + a little of its own at each sample: the best task weight is known."""

    def __init__(self, truth: Tensor, matters: bool = True) -> None:
        super().__init__()
        self.omega, self.theta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(3))
        self.truth, self.matters = truth, matters

    def task_parameters(self):
        return [self.omega]

    @torch.no_grad()
    def move_task(self, shift):
        self.omega.add_(shift)

    def forward(self, y, A):
        x = self.truth * ((self.omega - 1.7).exp() if self.matters else 0.5)
        return Reconstruction(image=(x + 0.01 * A.H(y)).expand(len(y), -1, -1))


def brains(count: int, shape=(40, 36), **more) -> list[tuple[Scan, Tensor]]:
    return [
        simulate(
            torch.stack([phantom(shape, seed=1)]),
            mask=lines(shape)[0, 0],
            coils=1,
            noise=0.002,
            phase=0.0,
            seed=k,
            **more,
        )
        for k in range(count)
    ]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("known", [True, False])
def test_adaptation_finds_the_weight_and_says_over_what(count, known):
    scans, truths = zip(*brains(count), strict=True)
    x = truths[0][0] / (normalise(scans[0]).scale).float()
    model = Scaled(x).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = tuning.adapt(model, scans, truths if known else None, refine=10)
    best = 1.7 + math.log(0.99)  # the rest comes from Aᴴy
    assert found.shift == pytest.approx(best, abs=0.06)
    assert found.model.omega.item() == pytest.approx(found.shift)
    assert torch.equal(found.model.theta, model.theta), "only the task weight may change"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the model given was changed"
    assert found.by == ("reference" if known else "heldout-kspace")
    assert found.over == ("slices" if count > 1 else "blocks" if known else "folds")
    assert found.units == 5
    assert found.pays
    assert 0 < found.low <= found.gain <= found.high
    assert len(found.rows) < 20


def test_a_weight_that_is_right_or_means_nothing_is_kept():
    scans, truths = zip(*brains(5), strict=True)
    x = truths[0][0] / (normalise(scans[0]).scale).float()
    right = Scaled(x)
    right.move_task(1.7 + math.log(0.99))
    for model in (right, Scaled(x, matters=False)):
        for references in (truths, None):
            found = tuning.adapt(model, scans, references)
            assert not found.pays
            assert abs(found.gain) < 0.01


def test_a_far_optimum_is_reached_and_the_reach_is_kept():
    scans, truths = zip(*brains(1), strict=True)
    x = truths[0][0] / (normalise(scans[0]).scale).float()
    far = Scaled(x)
    far.move_task(-3.5)
    assert tuning.adapt(far, scans, truths, refine=10).shift == pytest.approx(5.19, abs=0.1)
    far.move_task(-6.0)
    assert tuning.adapt(far, scans, truths).shift == 6.0
    far.move_task(20.0)
    assert tuning.adapt(far, scans, truths).shift == -6.0


def test_gain_is_judged_where_it_was_not_searched():
    """No shift is better on average, each unit prefers one of its own: a gain is hardly ever claimed."""
    shifts = [-6.0, -3.0, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 3.0, 6.0]
    place = torch.tensor(shifts, dtype=torch.float64)[:, None]
    claimed = 0
    for seed in range(200):
        slopes = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        values = slopes * place + 0.15 * place.square()
        assert float((values[5] - values[values.mean(1).argmin()]).mean()) >= 0, "a search always finds one"
        gain, low, high = adapting._left_out(values, shifts)
        assert low <= gain <= high
        claimed += low > 0
    assert claimed <= 5
    steady = torch.tensor([[0.0] * 6, [-1.0] * 6, [2.0] * 6], dtype=torch.float64) + torch.arange(6)
    assert adapting._left_out(steady, [0.0, 1.0, 2.0]) == pytest.approx((1.0, 1.0, 1.0))


def test_blocks_hold_every_pixel_once_and_are_all_over_the_image():
    squares = torch.rand(2, 43, 61, dtype=torch.float64)
    dealt = adapting._dealt(squares, 5)
    torch.testing.assert_close(dealt.sum(1), squares.sum((1, 2)))
    area = adapting._dealt(torch.ones_like(squares), 5)
    assert float(area.min() / area.max()) > 0.7
    corner = torch.zeros(1, 43, 61, dtype=torch.float64)
    corner[:, :15, :20] = 1
    assert bool((adapting._dealt(corner, 5) > 0).all())


def test_what_cannot_be_adapted_is_said():
    scans, truths = zip(*brains(1), strict=True)
    with pytest.raises(errors.WrongModel, match="no task weight"):
        tuning.adapt(methods.load("tv"), scans)
    with pytest.raises(errors.WrongModel, match="no task weight"):
        tuning.adapt(MetaLearned(tasks=[], phases=1), scans)
    with pytest.raises(errors.BadOption, match="no task weight"):
        MetaLearned(tasks=[], phases=1).move_task(1.0)
    with pytest.raises(errors.BadOption, match="no task weight"):
        methods.load("tv").move_task(1.0)
    model = methods.make("meta-learned", SMALL)
    with pytest.raises(errors.NoData, match="0 scans"):
        tuning.adapt(model, [])
    with pytest.raises(errors.NoData, match="2 references"):
        tuning.adapt(model, scans, [truths[0]] * 2)
    with pytest.raises(errors.InconsistentShapes, match="reference"):
        tuning.adapt(model, scans, [truths[0].expand(2, -1, -1)])
    trajectory = TRAJECTORIES["radial"]((24, 24), 9)[None]
    spokes = Scan(kspace=torch.ones(1, 1, trajectory.shape[1]) + 0j, trajectory=trajectory, image_shape=(24, 24))
    with pytest.raises(errors.UnsupportedLayout, match="on a grid"):
        tuning.adapt(model, [spokes])


@pytest.mark.parametrize("monotone", [True, False])
def test_a_moved_task_keeps_the_form_of_its_curve(monotone):
    model = build("small", monotone=monotone)
    assert model.omega is not None
    with torch.no_grad():
        model.omega.copy_(torch.tensor([0.1, -0.2, 0.05]))
        ratios, y = torch.linspace(0.05, 0.6, 30), torch.ones(30, 1, 4, 4).double()
        before = model.kappa(ratios, y).logit()
        model.move_task(-1.3)
        after = model.kappa(ratios, y).logit()
    torch.testing.assert_close(after, before - 1.3, rtol=1e-6, atol=1e-6)


@pytest.fixture
def too_strong(tmp_path) -> Path:
    """Weights whose regulariser, of random features, does harm: less of it is better, whatever the scan."""
    torch.manual_seed(0)
    model = MetaLearned(tasks=[0.2, 0.4], phases=2, features={"channels": 2, "last": 1.0}, epsilon=0.05)
    with torch.no_grad():
        model.beta.fill_(0.0)
        model.move_task(2.0)
    methods.save(model, tmp_path / "strong.safetensors", {"data": "none"})
    return tmp_path / "strong.safetensors"


def test_adapt_on_the_command_line(run, too_strong, tmp_path):  # noqa: F811
    """With the truth in the file, in another file, and without it; and once more, when nothing is left to gain."""
    for k in range(2):
        volume = torch.stack([phantom((40, 36), seed=10 * k + s) for s in range(3)]) * 500
        np.save(tmp_path / f"v{k}.npy", volume.numpy())
        made = run("simulate", f"v{k}.npy", "-o", f"s{k}.h5", "--mask", "poisson", "-R", 3, "--coils", 1)
        assert made.code == 0, made.err
    old = too_strong.read_bytes()
    out = run("adapt", too_strong, "s0.h5", "s1.h5", "-o", "new.safetensors", "--json")
    assert out.code == 0, out.err
    facts = out.json
    assert facts["by"] == "reference"
    assert facts["over"] == "slices"
    assert facts["units"] == 6
    assert 0 < facts["interval_db"][0] <= facts["gain_db"]
    assert facts["shift"] < 0
    assert json.loads(Path("new.safetensors.json").read_text())["gain_db"] == facts["gain_db"]
    header = methods.card("new.safetensors")
    assert header["recipe"]["data"] == "none"
    assert header["recipe"]["adapted"][0]["shift"] == facts["shift"]
    assert str(tmp_path) not in json.dumps(header), "a path in a weights file"
    before, after = (methods.load(path) for path in (too_strong, "new.safetensors"))
    for (name, p), q in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(p, q) == (name != "omega"), name
    assert too_strong.read_bytes() == old
    truth = formats.read_reference("s0.h5")
    assert truth is not None
    errors_of = [relative(reconstruct(formats.read("s0.h5"), m).image.abs(), truth.abs()) for m in (before, after)]
    assert errors_of[1] < errors_of[0]

    weak = methods.load("new.safetensors")
    weak.move_task(-30.0)  # of nothing, more or less is nothing
    methods.save(weak, "weak.safetensors", header["recipe"])
    again = run("adapt", "weak.safetensors", "s0.h5", "s1.h5", "-o", "twice.safetensors")
    assert again.code == 2
    assert len(again.errors) == 1
    assert again.errors[0].startswith("error[no_data]: twice.safetensors: gain: ")
    assert "interval" in again.errors[0]
    assert not Path("twice.safetensors").exists()
    assert not Path("twice.safetensors.json").exists()
    assert run("adapt", "weak.safetensors", "s0.h5", "-o", "twice.safetensors", "--anyway").code == 0
    assert len(methods.card("twice.safetensors")["recipe"]["adapted"]) == 2

    blind = run("adapt", too_strong, "s0.h5", "--by", "heldout-kspace", "-o", "blind.safetensors", "--json")
    assert blind.code == 0, blind.err
    assert blind.json["over"] == "folds"
    assert blind.json["shift"] < 0
    named = run("adapt", too_strong, "s0.h5", "--reference", "v0.npy", "-o", "named.safetensors", "--json")
    assert named.code == 0, named.err
    assert named.json["over"] == "blocks"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tv", "s.h5", "-o", "n.safetensors"), "error[wrong_model]: model: TotalVariation has no task weight"),
        (("M", "s.h5", "-o", "n.h5"), "error[bad_option]: n.h5: output: found suffix"),
        (("M", "s.h5", "-o", "M"), "error[bad_option]: "),
        (("M", "s.h5", "s.h5", "--reference", "s.h5", "-o", "n.safetensors"), "error[bad_option]: reference: found 1 for 2 scans"),
        (("M", "s.h5", "--by", "referense", "-o", "n.safetensors"), "error[bad_option]: by: found 'referense'; did you mean 'reference'"),
        (("M", "none.h5", "-o", "n.safetensors"), "error[unreadable_file]: none.h5"),
        (("M", "s.h5", "--by", "reference", "-o", "n.safetensors"), "error[no_data]: reference: 1 of 1 scans have no ground truth"),
        (("M", "s.h5", "-o", "there.safetensors"), "error[bad_option]: there.safetensors"),
    ],
)  # fmt: skip
def test_a_refused_adaptation_writes_nothing(run, too_strong, tmp_path, arguments, said):  # noqa: F811
    formats.write(tmp_path / "s.h5", scan((24, 24)))
    Path("there.safetensors").write_bytes(b"mine")
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    done = run("adapt", *(str(too_strong) if word == "M" else word for word in arguments))
    assert done.code == 2
    assert len(done.errors) == 1
    assert done.errors[0].startswith(said)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files
