"""HyperRecon: the gradient of its two-stage backward, settings per sample, baking, and what the dial does after training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws import lines, random, relative, scan
from tunemri import errors, losses
from tunemri.datasets import Example
from tunemri.errors import TunemriWarning
from tunemri.fourier import fft2
from tunemri.methods import reconstruct
from tunemri.methods.hyperrecon import CRITERIA, OBJECTIVES, PRESETS, HyperRecon, Selection, SingleWeight, bake
from tunemri.operators import Cartesian, encoding
from tunemri.scan import normalise
from tunemri.simulate import phantom
from tunemri.training import Plan, fit

UNROLLED = {"name": "unrolled", "stages": 2, "width": 4}
NETWORKS = {
    "unrolled": UNROLLED,
    "unet": {"name": "unet", "width": 4},
    "with batch norm": {"name": "unet", "width": 4, "batch_norm": True},
}


def small(main=UNROLLED, terms=("mae", "ssim"), **changes):
    torch.manual_seed(0)
    return HyperRecon(main=main, widths=[8, 4], terms=terms, **changes)


def example(shape=(20, 18), batch=3, coils=2, seed=0) -> Example:
    """A mask and maps of its own for every sample."""
    csm = random((batch, coils, *shape), seed=seed)
    csm = csm / csm.abs().square().sum(1, keepdim=True).sqrt()
    x = random((batch, *shape), seed=seed + 1)
    A = Cartesian(torch.cat([lines(shape, 2 + b % 3) for b in range(batch)]), csm)
    return Example(y=A(x), A=A, target=x)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.cat([g.flatten() for g in found.values()]), set(found)


# ------------------------------------------------------------------------------------------------ construction


def test_presets_have_the_published_counts_and_no_dead_weight():
    count = lambda name: sum(p.numel() for p in HyperRecon(**PRESETS[name]).parameters())
    assert [count(f"journal-{s}") for s in "sml"] == [743_533, 4_905_089, 19_208_993]
    for name in ("unet", "default"):
        model = HyperRecon(**PRESETS[name])
        assert not list(model.main.parameters()), "generated weights must not be trained twice"
        assert 4 * count(name) <= 8e6, "must fit into the 8 MB that a bundled model may have"
    conference = SingleWeight(main=PRESETS["conference"]["main"])
    assert sum(p.numel() for p in conference.parameters()) == 592_002


@pytest.mark.parametrize("terms", [("mae", "ssim"), ("mae", "ssim", "mse", "dc", "tv", "wavelet")], ids=len)
def test_weights_are_the_dials_in_other_coordinates(terms):
    model = small(terms=terms)
    for w in torch.cat([losses.sample_weights(5, len(terms), torch.Generator().manual_seed(0)), torch.eye(len(terms))]):
        dials = model.as_dials({f"w_{name}": str(7 * float(v)) for name, v in zip(terms, w, strict=True)})
        assert list(dials) == list(model.dials)
        assert model.check_dials(dials) == dials
        assert torch.allclose(model.weights(1, dials)[0], w, atol=1e-6)
    assert model.as_dials({"ssim": 0.3}) == {"ssim": 0.3}
    assert model.as_dials({}) == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"w_mae": 0.5, "w_ssim": 0.5}, "expected w_mae, w_ssim, w_tv"),
        ({"w_mae": 0.5, "w_ssim": 0.5, "w_tv": 0.1, "tv": 0.2}, "expected w_mae, w_ssim, w_tv"),
        ({"w_mae": 0, "w_ssim": 0, "w_tv": 0}, "zeros alone"),
        ({"w_mae": 1, "w_ssim": -1, "w_tv": 0}, "w_ssim"),
        ({"w_mae": "much", "w_ssim": 0, "w_tv": 0}, "w_mae"),
    ],
)
def test_weights_that_say_nothing_are_refused(given, words):
    with pytest.raises(errors.BadOption, match=words):
        small(terms=("mae", "ssim", "tv")).as_dials(given)


def test_dials_come_from_the_loss_terms():
    model = small(terms=("mae", "ssim", "tv"))
    assert list(model.dials) == ["ssim", "tv"]
    w = model.weights(1, {name: dial.default for name, dial in model.dials.items()})
    torch.testing.assert_close(w, torch.full((1, 3), 1 / 3))
    assert list(small().dials) == ["ssim"]
    assert small().dials["ssim"].default == 0.5
    assert small().dials["ssim"].low != small().dials["ssim"].high


@pytest.mark.parametrize(
    "change",
    [
        {"terms": ["mae"]},
        {"terms": ["mae", "mae"]},
        {"terms": ["mae", "sim"]},
        {"scales": [1.0]},
        {"scales": [1.0, 0.0]},
        {"scales": [1.0, float("nan")]},
        {"widths": []},
        {"main": {"name": "unet", "depth": 3}},
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(change):
    with pytest.raises(errors.BadOption):
        HyperRecon(**({"main": UNROLLED, "widths": [4]} | change))


@pytest.mark.parametrize("weights", [[0.5], [0.7, 0.7], [-0.5, 1.5], [float("nan"), 1.0]], ids=str)
def test_weights_off_the_simplex_are_refused(weights):
    with pytest.raises(errors.BadOption, match="sum 1"):
        SingleWeight(main=UNROLLED, weights=weights)


# ------------------------------------------------------------------------------------------------ training step


@pytest.mark.parametrize("terms", [("mae", "ssim"), ("mse", "dc", "tv", "wavelet", "l1")], ids=str)
@pytest.mark.parametrize("main", NETWORKS.values(), ids=NETWORKS)
def test_the_two_stage_backward_is_the_gradient(main, terms):
    scales = [0.3 + k for k in range(len(terms))]
    model, batch = small(main, terms, scales=scales).train(), example()
    loss = model.loss(batch, torch.Generator().manual_seed(3))
    loss.backward()
    found, names = gradients(model)

    w = losses.sample_weights(3, len(terms), torch.Generator().manual_seed(3), faces=model.faces)
    theta = model.hypernet(w)
    x_hat = model.image(batch.A.H(batch.y), batch.A, theta)
    result = losses.Result(x_hat=x_hat, x=batch.target, y=batch.y, forward=batch.A, weights=theta)
    values = torch.stack([losses.TERMS[name].value(result) for name in terms], 1)
    plain = ((values * w / torch.tensor(scales)).sum(1) + 1e-6).log().mean()
    plain.backward()
    expected, expected_names = gradients(model)
    assert names == expected_names
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert relative(found, expected) < 2e-5


@pytest.mark.parametrize("terms", [("mae", "ssim"), ("mse", "dc", "tv")], ids=str)
def test_antithetic_training_takes_every_image_at_every_cyclic_shift(terms):
    model, batch, count = small(terms=terms, antithetic=True).train(), example(), len(terms)
    loss = model.loss(batch, torch.Generator().manual_seed(3))
    loss.backward()
    found, _ = gradients(model)

    w = losses.sample_weights(1, count, torch.Generator().manual_seed(3), faces=model.faces)
    plain = 0
    for shift in range(count):
        shifted = w[:, [(k - shift) % count for k in range(count)]]
        theta = model.hypernet(shifted)
        result = losses.Result(
            x_hat=model.image(batch.A.H(batch.y), batch.A, theta),
            x=batch.target,
            y=batch.y,
            forward=batch.A,
            weights=theta,
        )
        values = torch.stack([losses.TERMS[name].value(result).expand(3) for name in terms], 1)
        plain = plain + ((values * shifted).sum(1) + 1e-6).log().mean() / count
    plain.backward()
    expected, _ = gradients(model)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert relative(found, expected) < 2e-5


def kept(model, batch, seed=3):
    """Which samples leave a gradient in their own generated weights, in one step of training."""
    made, forward = [], model.hypernet.forward

    def watched(v):
        theta = forward(v)
        for value in theta.values():
            value.retain_grad()
        made.append(theta)
        return theta

    model.hypernet.forward = watched
    model.train().loss(batch, torch.Generator().manual_seed(seed)).backward()
    model.hypernet.forward = forward
    return [any(bool(value.grad[b].any()) for value in made[0].values()) for b in range(batch.y.shape[0])]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_data_driven_sampling_learns_from_the_best_of_the_batch_alone(criterion):
    selection = {"keep": 0.5, "criterion": criterion}
    batch = replace(example(batch=4), noise_std=torch.full((4,), 0.1))
    model = small(terms=("dc", "tv", "l1"), selection=selection, objective="mean")
    found = kept(model, batch)
    generator = torch.Generator().manual_seed(3)
    w = losses.sample_weights(4, 3, generator, faces=model.faces)
    with torch.no_grad():
        scores = model._scores(batch, batch.A.H(batch.y), model.hypernet(w), criterion, generator)
    best = scores.argsort()[:2]
    assert found == [b in best for b in range(4)]
    assert float(model.histogram.sum()) == pytest.approx(1.0)
    assert int(model.step) == 1
    bins = (losses.lambdas_from_weights(w)[best] * 10).long().clamp(0, 9)
    assert all(model.histogram[tuple(at)] > 0 for at in bins)


def test_criteria_score_what_they_say():
    batch = example(batch=2)
    noisy = replace(batch, y=batch.y * 3, noise_std=torch.tensor([0.0, 0.2]))
    model, generator = small(), torch.Generator().manual_seed(0)
    theta = model.hypernet(torch.tensor([[0.5, 0.5]] * 2))
    score = lambda e, c: model._scores(e, e.A.H(e.y), theta, c, generator).detach()
    misfit, relative = score(noisy, "dc"), score(noisy, "relative-dc")
    energy = noisy.y.abs().square().flatten(1).sum(1)
    torch.testing.assert_close(misfit, relative * energy)
    count = (noisy.y[1] != 0).sum()
    expected = (misfit[1] / (count * 0.04) - 1).abs()
    torch.testing.assert_close(score(noisy, "noise"), torch.stack([relative[0], expected]))
    # With every sample shown there would be nothing to judge by; with one hidden in ten, the rest must predict it.
    assert bool((score(noisy, "heldout") > relative).all())


def test_soft_selection_weighs_by_score_and_schedules_come_first():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3])
    soft = Selection(temperature=0.5).shares(scores)
    assert float(soft.sum()) == pytest.approx(1.0)
    assert soft.argsort(descending=True).tolist() == [0, 2, 3, 1]
    assert Selection(keep=0.5).shares(scores).tolist() == [0.5, 0.0, 0.5, 0.0]

    model = small(terms=("dc", "l1", "tv"), selection={"pair_steps": 1, "uniform_steps": 2, "keep": 0.34}).train()
    first = model._draw(5, torch.Generator().manual_seed(0))
    assert bool((first[:, 1] == 0).all()), "the first steps weigh the first and the last term alone"
    torch.testing.assert_close(first.sum(1), torch.ones(5))
    assert [sum(kept(model, example())) for _ in range(3)] == [3, 3, 1]
    assert bool((model._draw(5, torch.Generator().manual_seed(0))[:, 1] > 0).any())


@pytest.mark.parametrize(
    "selection",
    [{"keep": 0.0}, {"criterion": "ssim"}, {"kept": 0.5}, {"temperature": -1.0}, {"pair_steps": -1}],
    ids=str,
)
def test_impossible_selections_are_refused(selection):
    with pytest.raises(errors.BadOption):
        small(selection=selection)
    with pytest.raises(errors.BadOption, match="selection"):
        small(selection={}, antithetic=True)


def test_the_plain_objective_is_the_weighted_sum():
    model, batch = small(objective="mean", scales=[0.5, 2.0]).train(), example()
    loss = float(model.loss(batch, torch.Generator().manual_seed(3)).detach())
    w = losses.sample_weights(3, 2, torch.Generator().manual_seed(3), faces=model.faces)
    with torch.no_grad():
        result = losses.Result(x_hat=model.image(batch.A.H(batch.y), batch.A, model.hypernet(w)), x=batch.target)
    values = torch.stack([losses.mae(result), losses.ssim(result)], 1)
    assert loss == pytest.approx(float((values * w / torch.tensor([0.5, 2.0])).sum(1).mean()), rel=1e-5)
    for refused in (small, lambda **wrong: SingleWeight(main=UNROLLED, **wrong)):
        with pytest.raises(errors.BadOption, match="objective"):
            refused(objective="sum")


def test_networks_that_couple_the_samples_refuse_what_needs_them_apart():
    for change in ({"antithetic": True}, {"scales": "auto"}):
        with pytest.raises(errors.BadOption, match=next(iter(change))):
            small(NETWORKS["with batch norm"], **change)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("main", NETWORKS.values(), ids=NETWORKS)
def test_the_baseline_has_the_same_loss_and_its_gradient(main, objective):
    torch.manual_seed(0)
    terms, w, scales = ("mae", "dc", "l1"), [0.2, 0.5, 0.3], [1.0, 2.0, 0.5]
    model = SingleWeight(main=main, terms=terms, weights=w, scales=scales, objective=objective).train()
    batch = example()
    loss = model.loss(batch, torch.Generator())
    loss.backward()
    found, _ = gradients(model)

    x_hat = model.main(batch.A.H(batch.y), batch.A.gram)
    own = {n: p[None].expand(3, *p.shape) for n, p in model.main.named_parameters()}
    result = losses.Result(x_hat=x_hat, x=batch.target, y=batch.y, forward=batch.A, weights=own)
    weighted = sum(w[k] / scales[k] * losses.TERMS[name].value(result) for k, name in enumerate(terms))
    if objective == "relative":
        start = replace(result, x_hat=batch.A.H(batch.y))
        weighted = weighted / sum(
            (w[k] + 0.1 / 3) / scales[k] * losses.TERMS[name].value(start).detach() for k, name in enumerate(terms)
        )
    plain = ((weighted + 1e-6).log() if objective == "log" else weighted).mean()
    plain.backward()
    expected, _ = gradients(model)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert relative(found, expected) < 2e-5


def test_the_penalty_on_weights_reaches_a_baseline():
    """In the papers' code the baselines' weight penalty was detached and trained nothing."""
    model = SingleWeight(main=UNROLLED, terms=("mse", "l1"), weights=[0.0, 1.0])
    model.loss(example(), torch.Generator()).backward()
    assert all(bool(p.grad.any()) for p in model.main.parameters() if p.grad is not None and bool(p.any()))


def test_training_without_ground_truth():
    y = example()
    model = small(terms=("dc", "tv"))
    value = model.loss(Example(y=y.y, A=y.A), torch.Generator().manual_seed(0))
    value.backward()
    assert bool(gradients(model)[0].isfinite().all())
    with pytest.raises(errors.MissingKey, match="ground truth"):
        small().loss(Example(y=y.y, A=y.A), torch.Generator().manual_seed(0))


def test_scales_that_follow_make_equal_weights_pull_equally_hard():
    """s_k / s_1 goes to the ratio of the gradients of term k and of the first in the image, whatever the units."""
    main = {"name": "unrolled", "stages": 1, "width": 2}
    model, batch = small(main, ("mae", "mse"), scales="auto"), example((8, 8), batch=1)
    assert bool((model.scales == 1).all())
    for step in range(600):
        model.loss(batch, torch.Generator().manual_seed(step))
    with torch.no_grad():
        theta = model.hypernet(losses.sample_weights(1, 2, torch.Generator().manual_seed(0)))
        x_hat = model.image(batch.A.H(batch.y), batch.A, theta)
    x_hat.requires_grad_()
    result = losses.Result(x_hat=x_hat, x=batch.target)
    pull = [torch.autograd.grad(losses.TERMS[n].value(result).sum(), x_hat)[0].norm() for n in ("mae", "mse")]
    assert float(model.scales[0]) == pytest.approx(1)
    assert float(model.scales[1]) == pytest.approx(float(pull[1] / pull[0]), rel=0.1)
    with pytest.raises(errors.BadOption, match="scales"):
        small(scales="automatic")


def test_the_same_generator_gives_the_same_loss_and_another_gives_another():
    model, batch = small(), example()
    value = lambda seed: float(model.loss(batch, torch.Generator().manual_seed(seed)).detach())
    assert value(1) == value(1)
    assert value(1) != value(2)


# ------------------------------------------------------------------------------------------------ the dial


def test_one_setting_for_each_sample_equals_one_by_one():
    model, batch = small(terms=("mae", "ssim", "tv")).eval(), example(batch=4)
    ssim, tv = torch.tensor([0.0, 0.3, 0.8, 1.0]), 0.25
    with torch.no_grad():
        out = model(batch.y, batch.A, ssim=ssim, tv=tv)
        for b in range(4):
            one = model(batch.y[b : b + 1], batch.A.sample(b), ssim=float(ssim[b]), tv=tv)
            assert relative(one.image, out.image[b : b + 1]) < 1e-5
    assert out.dials["ssim"] == ssim.tolist()
    assert out.dials["tv"] == 0.25


def test_the_image_is_differentiable_in_the_dial():
    model, batch = small().eval(), example()
    lam = torch.tensor([0.2, 0.4, 0.9], requires_grad=True)
    model(batch.y, batch.A, ssim=lam).image.abs().square().sum().backward()
    assert lam.grad is not None
    assert bool((lam.grad != 0).all())


@pytest.mark.parametrize("main", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("setting", [0.0, 0.35, 1.0])
def test_a_baked_setting_is_the_same_network(main, setting):
    model, s = small(main).eval(), normalise(scan((24, 21), slices=2, coils=2))
    if main.get("batch_norm"):
        model.train()
        model.loss(example(), torch.Generator().manual_seed(0))  # running statistics other than 0 and 1
        model.eval()
    A = encoding(s)
    with torch.no_grad():
        hyper, plain = model(s.kspace, A, ssim=setting), bake(model, ssim=setting)(s.kspace, A)
    assert relative(plain.image, hyper.image) < 1e-6
    assert not bake(model, ssim=setting).dials


def test_baking_keeps_the_same_training_goal_and_refuses_what_the_dial_refuses():
    model = small(scales=[0.5, 2.0], objective="mean", trained={"coils": 4})
    plain = bake(model, ssim=0.25)
    torch.testing.assert_close(plain.weights, torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(plain.scales, model.scales)
    assert plain.trained == model.trained and plain.arguments["objective"] == "mean"
    for wrong in ({"ssim": 1.2}, {"sim": 0.5}):
        with pytest.raises(errors.BadOption):
            bake(model, **wrong)


def test_outside_of_the_trained_range_only_when_asked():
    model, s = small(), scan((16, 16))
    for wrong in (-0.01, 1.01):
        with pytest.raises(errors.BadOption, match="outside"):
            reconstruct(s, model, ssim=wrong)
    with pytest.warns(TunemriWarning, match="extrapolating"):
        assert reconstruct(s, model, ssim=1.1, extrapolate=True).dials["ssim"] == pytest.approx(1.1)


# ------------------------------------------------------------------------------------------------ after training


def noisy_phantoms(step: int, rank: int = 0, batch: int = 4) -> Example:
    """So much noise that the two goals part: low error smooths, structural similarity keeps edges."""
    generator = torch.Generator().manual_seed(step)
    x = torch.stack([phantom((32, 32), seed=8 * step + b).to(torch.complex64) for b in range(batch)])
    A = Cartesian(lines((32, 32), 2))
    y = fft2(x)[:, None] + 0.3 * torch.randn(batch, 1, 32, 32, dtype=torch.complex64, generator=generator)
    return Example(y=y * A.mask, A=A, target=x)


def test_each_goal_is_served_best_at_its_own_end_of_the_dial(tmp_path):
    """350 steps on small phantoms: error rises and structural similarity rises, all along the dial."""
    torch.manual_seed(0)
    main = {"name": "unrolled", "stages": 1, "width": 8}
    model = HyperRecon(main=main, widths=[16, 8], scales=[0.08, 0.19], faces=0.6)
    pool = [noisy_phantoms(n) for n in range(24)]
    plan = Plan(steps=350, lr=1e-2, warmup=20, average=0.98, checkpoint=1e9)
    fit(model, lambda step, rank: pool[step % len(pool)], plan, tmp_path)

    unseen = noisy_phantoms(1000, batch=32)
    results = []
    with torch.no_grad():
        for setting in (0.0, 0.5, 1.0):
            results.append(losses.Result(x_hat=model(unseen.y, unseen.A, ssim=setting).image, x=unseen.target))
    zero_filled = losses.Result(x_hat=unseen.A.H(unseen.y), x=unseen.target)
    mae, loss_of_ssim = ([float(term(r).mean()) for r in results] for term in (losses.mae, losses.ssim))
    assert mae == sorted(mae), mae
    assert loss_of_ssim == sorted(loss_of_ssim, reverse=True), loss_of_ssim
    # By margins well above chance (measured: 4 % and 3 %), and far better than doing nothing.
    assert mae[0] < 0.98 * mae[-1]
    assert loss_of_ssim[-1] < 0.99 * loss_of_ssim[0]
    assert max(mae) < 0.6 * float(losses.mae(zero_filled).mean())
    assert max(loss_of_ssim) < 0.5 * float(losses.ssim(zero_filled).mean())
