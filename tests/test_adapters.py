"""To and from deepinv; what needs deepinv itself is skipped where the extra is not installed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from laws import SHAPES, adjoint, differentiable_twice, gram, inner, linear, random, relative, scan
from tunemri import errors, make_mask, methods, metrics, operators, sample, simulate, solvers
from tunemri.adapters import (
    RED,
    Denoising,
    from_physics,
    to_channels,
    to_complex,
    to_physics,
    to_reconstructor,
)
from tunemri.methods import prepare, reconstruct
from tunemri.simulate import coil_maps, phantom

try:
    import deepinv
except (ImportError, RuntimeError) as absent:  # RuntimeError: a torchvision that was built for another torch
    deepinv, WHY = None, f"the extra deepinv is not usable here: {str(absent).splitlines()[0]}"
else:
    WHY = ""
needs_deepinv = pytest.mark.skipif(deepinv is None, reason=WHY)


def smooth(x: Tensor, sigma: float) -> Tensor:
    """A linear, symmetric denoiser: (1 - σ) x plus σ times the mean of the four neighbours."""
    near = sum(x.roll(s, d) for s in (-1, 1) for d in (-2, -1)) / 4
    return (1 - sigma) * x + sigma * near


def cartesian(shape: tuple[int, int], coils: int, slices: int = 1) -> operators.LinearOperator:
    return operators.encoding(scan(shape, coils=coils, slices=slices))


def radial(shape: tuple[int, int], coils: int = 3) -> operators.NonCartesian:
    k = (torch.rand(1, 60, 2, generator=torch.Generator().manual_seed(1)) - 0.5) * torch.tensor(shape)
    return operators.NonCartesian(k, coil_maps(shape, coils)[None])


def masks(shape: tuple[int, int], count: int) -> Tensor:
    return (torch.rand(count, 1, *shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()


# ---------------------------------------------------------------- two channels


@pytest.mark.parametrize("shape", [(1, 5), (2, 7, 4), (3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_channels_there_and_back_are_equal(shape, dtype):
    x = random(shape, dtype)
    z = to_channels(x)
    assert z.shape == (shape[0], 2, *shape[1:])
    assert torch.equal(z[:, 0], x.real) and torch.equal(z[:, 1], x.imag)
    assert torch.equal(to_complex(z), x)
    assert torch.equal(to_channels(x.conj())[:, 1], -x.imag)


def test_channels_keep_the_inner_product():
    a, b = random((2, 5, 6), seed=1), random((2, 5, 6), seed=2)
    assert float((to_channels(a) * to_channels(b)).sum()) == pytest.approx(inner(a, b).real, abs=1e-4)


@pytest.mark.parametrize("z", [torch.zeros(1, 3, 4, 4), torch.zeros(4), torch.zeros(1, 2, 4, 4).to(torch.complex64)])
def test_other_layouts_are_refused(z):
    with pytest.raises(errors.UnsupportedLayout, match="imaginary"):
        to_complex(z)


# ---------------------------------------------------------------- without the extra


@pytest.mark.parametrize("call", [to_physics, from_physics, to_reconstructor])
def test_a_missing_extra_is_named_with_its_remedy(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(errors.BadOption, match=r"clone of tunemri: .*\[deepinv\]") as caught:
        call(methods.load("sense") if call is to_reconstructor else operators.Fourier())
    assert caught.value.exit_code == 3


# ---------------------------------------------------------------- denoisers


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_energy_is_what_the_denoiser_takes_away(shape, channels):
    """Exact for a linear symmetric denoiser, so against differences."""
    R = Denoising(denoiser=smooth, sigma=0.4, channels=channels)
    x, d = (random((2, *shape), torch.complex128, seed=s) for s in (1, 2))
    slope = (R.value(x + 1e-5 * d) - R.value(x - 1e-5 * d)) / 2e-5
    assert torch.allclose(slope, (R.gradient(x).conj() * d).real.sum((-2, -1)), rtol=1e-6)
    assert torch.equal(R.prox(x, 3.0), R.denoise(x))


def test_grey_denoisers_see_one_part_at_a_time():
    seen = []

    def watch(x: Tensor, sigma: float) -> Tensor:
        seen.append((x.clone(), sigma))
        return x

    x = random((2, 6, 5))
    for channels in (1, 2):
        assert torch.equal(Denoising(denoiser=watch, sigma=0.1, channels=channels).denoise(x), x)
    (one, sigma), (both, _) = seen
    assert one.shape == (4, 1, 6, 5) and both.shape == (2, 2, 6, 5) and sigma == 0.1
    assert torch.equal(one[:, 0], torch.stack([x[0].real, x[0].imag, x[1].real, x[1].imag]))


def test_red_solves_its_equation():
    """For a linear denoiser: Aᴴ(A x - y) + lam (x - D x) = 0, which conjugate gradients solve at once."""
    A = cartesian((15, 21), 3)
    y = A(random((1, 15, 21)))
    R = Denoising(denoiser=smooth, sigma=0.3)
    direct = solvers.cg(lambda x: A.gram(x) + 0.5 * R.gradient(x), A.H(y), iterations=300, tolerance=1e-6).value
    out = RED(smooth, iterations=400, tolerance=1e-6)(y, A, lam=0.5, sigma=0.3)
    assert out.status == "converged"
    assert out.dials == {"lam": 0.5, "sigma": 0.3}
    assert relative(out.image, direct) < 1e-3


def test_plug_and_play_by_our_solver():
    """A denoiser that is a proximal map, x / (1 + σ), in FISTA: the minimum of ½‖A x - y‖² + σ/2 ‖x‖²."""
    A = cartesian((12, 17), 2)
    y = A(random((2, 12, 17)))
    R = Denoising(denoiser=lambda x, sigma: x / (1 + sigma), sigma=0.2)
    solution = solvers.fista(lambda x: A.gram(x) - A.H(y), R.prox, A.H(y), iterations=400, tolerance=1e-6)
    direct = solvers.cg(lambda x: A.gram(x) + 0.2 * x, A.H(y), iterations=100).value
    assert relative(solution.value, direct) < 1e-3


def test_red_says_when_it_has_not_converged_and_leaves_its_denoiser_alone():
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor, sigma: float) -> Tensor:
            self.calls += 1
            return smooth(x, sigma) * (1 + 0.01 * self.calls)

    model = RED(Remembers(), iterations=2)
    s = scan((16, 16), coils=2)
    out = reconstruct(s, model)
    assert out.status.startswith("stopped after 2 iterations")
    assert torch.equal(out.image, reconstruct(s, model).image)
    assert model.denoiser.calls == 0
    assert list(model.dials) == ["lam", "sigma"]


def test_slices_do_not_see_each_other():
    A = cartesian((12, 17), 2)
    y = A(random((2, 12, 17)) * torch.tensor([1.0, 20.0])[:, None, None])
    both = RED(smooth)(y, A).image
    assert relative(both[1:], RED(smooth)(y[1:], A).image) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: RED(smooth, iterations=0),
        lambda: RED(smooth, channels=3),
        lambda: RED(smooth)(random((1, 1, 6, 6)), cartesian((6, 6), 1), lam=-1.0),
        lambda: Denoising(denoiser=smooth, sigma=0.0),
        lambda: Denoising(denoiser=smooth, sigma=float("nan")),
        lambda: Denoising(denoiser=lambda x, s: x[..., :-1], sigma=0.1).denoise(random((1, 6, 6))),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises((errors.BadOption, errors.InconsistentShapes)):
        make()


# ---------------------------------------------------------------- operators, with deepinv


@needs_deepinv
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coils", [1, 4])
@pytest.mark.parametrize("kind", ["cartesian", "radial"])
def test_an_operator_of_ours_is_a_physics(shape, coils, kind):
    A = cartesian(shape, coils) if kind == "cartesian" else radial(shape, coils)
    physics = to_physics(A)
    assert isinstance(physics, deepinv.physics.LinearPhysics)
    x = random((2, *shape))
    y = A(x)
    z, v = to_channels(x), to_channels(random(tuple(y.shape), seed=5))
    assert torch.equal(physics.A(z), to_channels(y)) and torch.equal(physics(z), physics.A(z))
    assert physics.A_adjoint(physics.A(z)).shape == z.shape
    assert relative(physics.A_adjoint_A(z), physics.A_adjoint(physics.A(z))) < 1e-4
    left, right = float((physics.A(z) * v).sum()), float((z * physics.A_adjoint(v)).sum())
    assert abs(left - right) <= 1e-5 * float(v.norm() * physics.A(z).norm())
    assert abs(float(physics.adjointness_test(z[:1]))) < 1e-2
    assert from_physics(physics) is A


@needs_deepinv
def test_deepinv_solves_least_squares_with_our_operator():
    A = cartesian((16, 16), 4)
    x = random((1, 16, 16))
    solved = to_complex(to_physics(A).A_dagger(to_channels(A(x)), max_iter=200, tol=1e-6))
    assert relative(solved, solvers.cg(A.gram, A.H(A(x)), iterations=200, tolerance=1e-6).value) < 1e-2


@needs_deepinv
def test_the_noise_of_a_physics_is_that_of_a_scan():
    A = operators.Cartesian(torch.ones(1, 1, 64, 64))
    physics = to_physics(A, noise_std=0.3)
    n = to_complex(physics(torch.zeros(4, 2, 64, 64)))
    assert float(n.abs().square().mean().sqrt()) == pytest.approx(0.3, rel=0.03)


@needs_deepinv
@pytest.mark.parametrize("name", ["mask", "coil_maps"])
def test_a_new_mask_on_the_fly_is_refused_rather_than_ignored(name):
    physics = to_physics(cartesian((12, 12), 1))
    x = torch.zeros(1, 2, 12, 12)
    for call in (physics, physics.A_adjoint_A, lambda v, **p: physics.update(**p)):
        with pytest.raises(errors.BadOption, match="never changes"):
            call(x, **{name: torch.ones(1, 2, 12, 12)})


@needs_deepinv
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slices", [1, 3])
def test_mri_of_deepinv_is_our_cartesian_operator(shape, slices):
    """Its centred FFT is ours, with one mask for each slice too."""
    x, mask, csm = random((3, *shape)), masks(shape, slices), coil_maps(shape, 4)[None]
    single, several = deepinv.physics.MRI(mask=mask), deepinv.physics.MultiCoilMRI(mask=mask, coil_maps=csm)
    for physics in (single, several):
        A = from_physics(physics)
        assert isinstance(A, operators.Cartesian)
        y = A(x)
        theirs = to_complex(physics.A(to_channels(x))).reshape(y.shape)
        assert relative(y, theirs) < 1e-6
        v = random(tuple(y.shape), seed=2)
        seen = to_channels(v[:, 0] if physics is single else v)
        assert relative(A.H(v), to_complex(physics.A_adjoint(seen))) < 1e-6
        adjoint(A, x, v)


@needs_deepinv
def test_columns_of_one_row_need_the_size_of_the_image():
    physics = deepinv.physics.MRI(mask=masks((1, 18), 1))
    with pytest.raises(errors.BadOption, match="shape"):
        from_physics(physics)
    A, x = from_physics(physics, (12, 18)), random((1, 12, 18))
    assert relative(A(x), to_complex(physics.A(to_channels(x)))) == 0
    several = from_physics(deepinv.physics.MultiCoilMRI(mask=masks((1, 18), 1), coil_maps=coil_maps((12, 18), 3)))
    assert several(x).shape == (1, 3, 12, 18)


@needs_deepinv
@pytest.mark.parametrize("shape", [(16, 16), (12, 18)])
def test_any_linear_physics_of_complex_images_is_an_operator(shape):
    blur = deepinv.physics.Blur(filter=torch.rand(1, 1, 3, 3), padding="circular")
    coarse = deepinv.physics.Downsampling(img_size=(2, *shape), factor=2, filter=None)
    mri = deepinv.physics.MRI(mask=masks(shape, 1))
    for physics in (blur, coarse, deepinv.physics.LinearPhysics(A=mri.A, A_adjoint=mri.A_adjoint)):
        A = from_physics(physics, shape)
        x = random((2, 3, *shape))
        y = A(x)
        assert y.shape[:2] == (2, 3)
        adjoint(A, x, random(tuple(y.shape), seed=3), 1e-5)
        gram(A, x, 1e-5)
        linear(A, x)
        assert torch.allclose(A(x[0, 0]), y[0, 0], atol=1e-5)
        assert A.norm() > 0
        assert relative(y[0], to_complex(physics.A(to_channels(x[0])))) == 0
        assert from_physics(to_physics(A)) is A


@needs_deepinv
def test_derivatives_pass_the_border():
    blur = deepinv.physics.Blur(filter=torch.ones(1, 1, 3, 3) / 9, padding="circular")
    A = from_physics(blur, (6, 5))
    blur.double()
    differentiable_twice(lambda x: A(x).abs().square(), random((1, 6, 5), torch.complex128))
    physics = to_physics(operators.Cartesian(masks((6, 5), 1).double()))
    differentiable_twice(
        lambda z: physics.A_adjoint(physics.A(z)).square(), to_channels(random((1, 6, 5), torch.complex128))
    )


@needs_deepinv
def test_a_physics_that_is_no_complex_operator_is_refused():
    parts = torch.tensor([1.0, 2.0])[None, :, None, None]
    scaled = deepinv.physics.LinearPhysics(A=lambda x, **_: parts * x, A_adjoint=lambda y, **_: parts * y)
    wrong = deepinv.physics.LinearPhysics(A=lambda x, **_: 2 * x, A_adjoint=lambda y, **_: 3 * y)
    per_sample = deepinv.physics.LinearPhysics(
        A=lambda x, **_: torch.ones(2, 1, 1, 1) * x, A_adjoint=lambda y, **_: torch.ones(2, 1, 1, 1) * y
    )
    flat = deepinv.physics.CompressedSensing(m=20, img_size=(2, 8, 8))
    for physics, word in ((scaled, "differently"), (wrong, "adjoint"), (per_sample, "expected data"), (flat, "data")):
        with pytest.raises(errors.UnsupportedLayout, match=word):
            from_physics(physics, (8, 8))
    with pytest.raises(errors.UnsupportedLayout, match="volumes"):
        from_physics(deepinv.physics.MRI(mask=torch.ones(1, 2, 4, 8, 8), three_d=True), (8, 8))
    with pytest.raises(errors.UnsupportedLayout, match="LinearPhysics"):
        from_physics(operators.Fourier(), (8, 8))
    with pytest.raises(errors.BadOption, match="shape"):
        from_physics(deepinv.physics.Denoising())


# ---------------------------------------------------------------- denoisers and methods, with deepinv


@needs_deepinv
@pytest.mark.parametrize(
    ("name", "channels"), [("TVDenoiser", 1), ("TVDenoiser", 2), ("TGVDenoiser", 2), ("MedianFilter", 2), ("UNet", 2)]
)
def test_denoisers_of_deepinv_are_priors(name, channels):
    options = {"MedianFilter": {"kernel_size": 3}, "UNet": {"in_channels": 2, "out_channels": 2, "scales": 2}}
    denoiser = getattr(deepinv.models, name)(**options.get(name, {"n_it_max": 30}))
    model = RED(denoiser.eval(), channels=channels, iterations=3)
    s = scan((16, 24), coils=2, slices=2)
    first = reconstruct(s, model, sigma=0.02)
    assert bool(torch.isfinite(first.image.abs()).all())
    assert torch.equal(first.image, reconstruct(s, model, sigma=0.02).image)


@needs_deepinv
def test_red_with_total_variation_improves_the_sample():
    s, target = sample()
    tv = RED(deepinv.models.TVDenoiser(n_it_max=10), iterations=15, tolerance=5e-3)
    gained = [
        metrics.score(reconstruct(s, m).image, target, ["psnr"])["psnr"] for m in (methods.load("zero-filled"), tv)
    ]
    assert gained[1] > gained[0] + 2, gained


def cases() -> list[tuple[str, dict[str, float]]]:
    return [("zero-filled", {}), ("sense", {"lam": 0.05}), ("tv", {}), ("hyper-brain", {"ssim": 0.7})]


@needs_deepinv
@pytest.mark.filterwarnings("ignore:outside what the model was trained for")
@pytest.mark.parametrize(("name", "dials"), cases())
def test_a_method_gives_deepinv_the_image_that_it_gives_us(name, dials):
    s = prepare(scan((24, 20), coils=4, slices=2, noise=0.01))
    model = methods.load(name)
    adapted = to_reconstructor(model, **dials)
    assert isinstance(adapted, deepinv.models.Reconstructor)
    ours = reconstruct(s, model, **dials).image
    out = adapted(to_channels(s.kspace), to_physics(operators.encoding(s)))
    assert torch.equal(to_complex(out), ours)
    theirs = deepinv.physics.MultiCoilMRI(mask=s.mask, coil_maps=s.csm)
    assert torch.equal(adapted(to_channels(s.kspace), theirs), out)


@needs_deepinv
def test_single_coil_and_radial_data_reach_a_method_too():
    s = scan((16, 20))
    adapted = to_reconstructor(methods.load("sense"))
    expected = to_channels(reconstruct(s, methods.load("sense")).image)
    assert torch.equal(adapted(to_channels(s.kspace[:, 0]), deepinv.physics.MRI(mask=s.mask)), expected)
    A = radial((32, 32))
    out = adapted(to_channels(A(phantom((32, 32))[None].to(torch.complex64))), to_physics(A))
    assert out.shape == (1, 2, 32, 32) and bool(torch.isfinite(out).all())


@needs_deepinv
def test_a_method_refuses_what_has_no_kspace_and_unknown_dials():
    adapted = to_reconstructor(methods.load("sense"))
    for physics in (deepinv.physics.Denoising(), to_physics(operators.Fourier())):
        with pytest.raises(errors.UnsupportedLayout, match="encoding"):
            adapted(torch.ones(1, 2, 8, 8), physics)
    with pytest.raises(errors.BadOption, match="no such dial"):
        to_reconstructor(methods.load("sense"), lamb=0.1)


@needs_deepinv
def test_deepinv_scores_a_method_as_we_do():
    """PSNR and SSIM of `deepinv.test`, slice by slice, with the same range and the same window."""
    shape = (48, 40)
    x = torch.stack([phantom(shape, seed=b) for b in range(2)])
    mask = make_mask("cartesian-random", shape, acceleration=3, seed=0)
    s, target = simulate(x, mask=mask, coils=4, noise=0.01, store_maps=True)
    window = {"gaussian_kernel": False, "kernel_size": 7}
    scores = [
        deepinv.loss.metric.PSNR(max_pixel=None, complex_abs=True),
        deepinv.loss.metric.SSIM(max_pixel=None, complex_abs=True, torchmetric_kwargs=window),
    ]
    pairs = [{"x": a, "y": b} for a, b in zip(to_channels(target), to_channels(s.kspace), strict=True)]
    model = methods.load("tv")
    found = deepinv.test(
        to_reconstructor(model, lam=0.01),
        torch.utils.data.DataLoader(pairs, batch_size=2),
        to_physics(operators.encoding(s)),
        metrics=scores,
        verbose=False,
        non_blocking_transfers=False,
    )
    image = reconstruct(s, model, lam=0.01).image.abs()
    for name in ("psnr", "ssim"):
        each = [metrics.score(a[None], b[None], [name])[name] for a, b in zip(image, target.abs(), strict=True)]
        # torchmetrics also averages over the rim, which it pads by mirrors: SSIM is close, not equal.
        assert found[name.upper()] == pytest.approx(
            sum(each) / 2, **{"psnr": {"abs": 1e-2}, "ssim": {"abs": 0.02}}[name]
        )
