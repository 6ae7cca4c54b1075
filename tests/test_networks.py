"""Networks: published parameter counts, per-sample weights however they are applied, and any image size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laws import lines, random, relative
from tunemri import errors
from tunemri.networks import NETWORKS, HyperNetwork, UNet, Unrolled, apply_batched, build
from tunemri.networks.conv import Conv
from tunemri.networks.hypernet import BACKENDS, FORMS, LAST, generated_names
from tunemri.operators import Cartesian

TINY = {"unet": {"name": "unet", "width": 4}, "unrolled": {"name": "unrolled", "stages": 2, "width": 4}}


def tiny(name):
    return build(TINY[name])


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def gram_of(A):
    return lambda index: (A if index is None else A.sample(index)).gram


def test_every_network_is_tested():
    assert set(TINY) == set(NETWORKS)


# ------------------------------------------------------------------------------------------------ counts


def test_the_published_counts():
    """HyperRecon's papers and code: U-Nets of 592,002 and 149,409; with hypernetworks of width 4, 32, 128."""
    assert parameters(UNet(64)) == 592_002
    journal = UNet(32, complex_output=False, batch_norm=True)
    assert parameters(journal) == 149_409
    for width, count in ((4, 743_533), (32, 4_905_089), (128, 19_208_993)):
        hypernet = HyperNetwork(journal, 2, [width] * 4, residual=False)
        assert parameters(hypernet) + parameters(journal) - sum(s.numel() for s in hypernet.shapes.values()) == count


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (7, 32), (63, 65), (16, 24)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_image_size(name, shape):
    net, A = tiny(name), Cartesian(torch.ones(1, 1, *shape))
    x0 = random((2, *shape))
    x = net(x0, A.gram)
    assert x.shape == x0.shape
    assert x.dtype == x0.dtype
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_of_a_batch_do_not_meet(name):
    net, shape = tiny(name).eval(), (16, 19)
    A, x0 = Cartesian(lines(shape)), random((3, *shape))
    together = net(x0, A.gram)
    for b in range(3):
        assert relative(net(x0[b : b + 1], A.gram), together[b : b + 1]) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_an_untrained_network_starts_near_its_input_and_every_weight_has_a_gradient(name):
    net, shape = tiny(name), (16, 16)
    x0 = random((1, *shape))
    net(x0, Cartesian(lines(shape)).gram).abs().square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert bool(p.grad.isfinite().all()), key
    used = sum(bool(p.grad.any()) for p in net.parameters())
    assert used >= 0.9 * len(list(net.parameters()))


def test_an_unrolled_network_starts_as_gradient_descent():
    """With its learned part silent, one stage at step 1 is x − (AᴴAx − x₀)."""
    net, shape = Unrolled(stages=2, width=4), (15, 18)
    A = Cartesian(lines(shape))
    for stage in net.stages:
        for p in stage.last.parameters():
            nn.init.zeros_(p)
    x0 = A.H(random((1, 1, *shape)))
    x = x0
    for _ in range(2):
        x = x - (A.gram(x) - x0)
    assert relative(net(x0, A.gram), x) < 1e-6


@pytest.mark.parametrize("silent", [False, True])
def test_only_a_silent_start_learns_from_complete_data(silent):
    """At μ = 1 the data undo what a stage says; a silent one begins at x₀ and hears what to say."""
    net, x0 = Unrolled(stages=2, width=4, silent=silent), random((1, 15, 18))
    x = net(x0, lambda x: x)
    assert relative(x, x0) < 1e-6
    x.abs().square().sum().backward()
    assert any(float(p.grad.abs().max()) > 1e-4 for p in net.stages.parameters()) == silent


def test_unknown_networks_and_arguments_are_refused():
    with pytest.raises(errors.BadOption, match="did you mean 'unet'"):
        build({"name": "u-net"})
    with pytest.raises(errors.BadOption, match="widht"):
        build({"name": "unet", "widht": 3})
    for wrong in (lambda: UNet(0), lambda: Unrolled(stages=0), lambda: HyperNetwork(UNet(2), 0, [3])):
        with pytest.raises(errors.BadOption):
            wrong()


# ------------------------------------------------------------------------------------------------ hypernetwork


class Odd(nn.Module):
    """A main network unlike ours: a linear layer, a parameter of its own and a complex scaling."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x0, gram):
        z = self.mix(torch.view_as_real(x0))
        return x0 + self.gain * gram(torch.view_as_complex(z.contiguous()))


@pytest.mark.parametrize(("residual", "form"), [(False, "full"), *((True, form) for form in FORMS)])
def test_a_hypernetwork_for_any_main_network(residual, form):
    net, shape = Odd(), (8, 9)
    hypernet = HyperNetwork(net, 3, [5, 4], residual=residual, form=form)
    w = torch.rand(2, 3)
    theta = hypernet(w)
    assert {k: tuple(v.shape[1:]) for k, v in theta.items()} == {k: tuple(p.shape) for k, p in net.named_parameters()}
    A, x0 = Cartesian(lines(shape)), random((2, *shape))
    x = apply_batched(net, theta, x0, gram_of(A))
    x.abs().sum().backward()
    assert x.shape == x0.shape
    assert all(p.grad is not None and bool(p.grad.any()) for p in hypernet.parameters())
    with pytest.raises(errors.BadOption, match="use loop"):
        apply_batched(net, theta, x0, gram_of(A), backend="grouped")


@pytest.mark.parametrize("form", FORMS)
def test_a_residual_hypernetwork_starts_at_the_main_network(form):
    """θ(v) is θ₀ up to a tenth of its spread, at every setting; and it does depend on v."""
    torch.manual_seed(0)
    net = UNet(4)
    hypernet = HyperNetwork(net, 2, [16, 8], form=form)
    corners = hypernet(torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]))
    for name, p in net.named_parameters():
        distance = (corners[name] - p).flatten(1).norm(dim=1)
        assert bool((distance <= 0.5 * p.std(correction=0).clamp(min=1e-3) * p.numel() ** 0.5 + 1e-6).all()), name
    assert not torch.equal(corners["trunk.last.weight"][0], corners["trunk.last.weight"][2])


def test_light_forms_are_light_and_share_what_they_say():
    net, v = UNet(8), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    own = parameters(net)
    made = {form: HyperNetwork(net, 2, [8], form=form) for form in FORMS}
    assert parameters(made["anchors"]) == 2 * own
    assert max(parameters(made[form]) for form in ("film", "rank4")) < 2.5 * own < parameters(made["full"])
    last = list(net.state_dict())[-LAST:]
    follows = {name: not torch.equal(*value) for name, value in made["last"](v).items()}
    assert follows == {name: name in last for name in follows}
    middle = made["anchors"](torch.tensor([[0.25, 0.75]]))
    ends = made["anchors"](torch.eye(2))
    for name, value in middle.items():
        torch.testing.assert_close(value[0], 0.25 * ends[name][0] + 0.75 * ends[name][1])
    film, base = made["film"](v), made["film"]._split(made["film"].base[None])
    ratio = film["trunk.last.weight"] / base["trunk.last.weight"]
    torch.testing.assert_close(ratio, ratio[..., :1, :1, :1].expand_as(ratio))  # one gain per output channel
    for form, residual in (("film", False), ("filmy", True)):
        with pytest.raises(errors.BadOption):
            HyperNetwork(net, 2, [8], form=form, residual=residual)


@pytest.mark.parametrize("form", FORMS)
def test_any_form_starts_from_trained_weights(form):
    torch.manual_seed(0)
    net, hypernet = UNet(4), HyperNetwork(UNet(4), 2, [4], form=form)
    weights = dict(net.named_parameters())
    hypernet.start_from(weights)
    for name, value in hypernet(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).items():
        allowed = 0.1 * weights[name].std(correction=0).clamp(min=1e-3) * weights[name].numel() ** 0.5
        assert bool(((value - weights[name]).flatten(1).norm(dim=1) <= allowed).all()), name


def test_normalisation_layers_are_shared_not_generated():
    net = UNet(4, batch_norm=True)
    generated = set(generated_names(net))
    others = {n for n, _ in net.named_parameters()} - generated
    assert len(others) == 2 * 14  # weight and bias of one after each 3×3 convolution
    assert generated == {
        f"{n}.{leaf}" for n, m in net.named_modules() if isinstance(m, Conv) for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("shape", [(16, 16), (13, 18), (96, 96)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_ways_to_apply_weights_agree_in_value_and_gradient(name, shape):
    torch.manual_seed(1)
    net, batch = tiny(name), 3
    hypernet = HyperNetwork(net, 2, [6, 5])
    csm = random((batch, 2, *shape), seed=5)
    A, x0 = Cartesian(torch.cat([lines(shape, k) for k in (2, 3, 4)]), csm / csm.abs().amax()), random((batch, *shape))
    w = torch.tensor([[0.0, 1.0], [0.3, 0.7], [1.0, 0.0]])
    target = random((batch, *shape), seed=9)
    found = {}
    for backend in BACKENDS:
        if backend == "vmap" and name != "unet":
            continue  # a data gradient per sample does not go through vmap
        hypernet.zero_grad()
        x = apply_batched(net, hypernet(w), x0, gram_of(A), backend=backend)
        (x - target).abs().square().mean().backward()
        found[backend] = x.detach(), torch.cat([p.grad.flatten().clone() for p in hypernet.parameters()])
    reference = torch.cat([
        torch.func.functional_call(net, {k: v[b] for k, v in hypernet(w).items()}, (x0[b : b + 1], A.sample(b).gram))
        for b in range(batch)
    ]).detach()  # fmt: skip
    for backend, (x, gradient) in found.items():
        assert relative(x, reference) < 1e-5, backend
        assert relative(gradient, found["loop"][1]) < 1e-5, backend


def test_one_set_of_weights_serves_the_whole_batch():
    net, shape = tiny("unrolled"), (12, 10)
    A, x0 = Cartesian(lines(shape)), random((3, *shape))
    theta = HyperNetwork(net, 2, [4])(torch.tensor([[0.2, 0.8]]))
    repeated = {k: v.expand(3, *v.shape[1:]) for k, v in theta.items()}
    assert relative(apply_batched(net, theta, x0, gram_of(A)), apply_batched(net, repeated, x0, gram_of(A))) < 1e-5


def test_wrong_calls_are_refused():
    net, shape = tiny("unet"), (8, 8)
    A, x0 = Cartesian(lines(shape)), random((3, *shape))
    theta = HyperNetwork(net, 1, [4])(torch.rand(2, 1))
    with pytest.raises(errors.InconsistentShapes, match="2 weight sets for 3 samples"):
        apply_batched(net, theta, x0, gram_of(A))
    with pytest.raises(errors.BadOption, match="did you mean 'grouped'"):
        apply_batched(net, theta, x0[:2], gram_of(A), backend="group")
    coupled = UNet(4, batch_norm=True).train()
    theta = HyperNetwork(coupled, 1, [4])(torch.rand(2, 1))
    with pytest.raises(errors.BadOption, match="normalise each sample by itself"):
        apply_batched(coupled, theta, x0[:2], gram_of(A), backend="loop")
