"""Off the grid: the transform against its definition, its Gram operator and weights, and what scans make of them."""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from laws import SHAPES, differentiable_twice, inner, random, relative, size
from tunemri import errors, nufft
from tunemri.errors import TunemriWarning
from tunemri.fourier import convolve, fft2, ifft2
from tunemri.methods import load, make, prepare, reconstruct
from tunemri.nufft import NUFFT, calibration_block, density_weights, gram_spectrum
from tunemri.operators import NonCartesian, encoding
from tunemri.scan import Scan, normalise, select
from tunemri.simulate import coil_maps, phantom
from tunemri.trajectories import TRAJECTORIES, golden, radial, radial_weights, readouts, spiral

backends = pytest.mark.parametrize("backend", ["finufft", "sparse"])
every_trajectory = pytest.mark.parametrize("name", TRAJECTORIES)
SINGLE, DOUBLE = torch.complex64, torch.complex128


def on_grid(shape):
    """Every point of the grid, in the order of `fft2(x).flatten(-2)`."""
    axes = [torch.arange(n).double() - n // 2 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


def exact(x, k):
    """1/√N Σ x[n] exp(−2πi k·(n − c) / N), term by term."""
    kernels = []
    for axis, n in enumerate(x.shape[-2:]):
        position = torch.arange(n).double() - n // 2
        phase = -2 * math.pi / n * k[:, axis].double()[:, None] * position
        kernels.append(torch.polar(torch.full_like(phase, n**-0.5), phase))
    return torch.einsum("mh,...hw,mw->...m", kernels[0], x.to(DOUBLE), kernels[1])


def radial_scan(shape, *, spokes=24, coils=1, slices=1, own=False, noise=0.0, maps=True):
    """Phantoms along golden-angle spokes; `own`: each slice has its own."""
    x = torch.stack([phantom(shape, seed=b).to(SINGLE) for b in range(slices)])
    csm = coil_maps(shape, coils)[None].to(SINGLE) if coils > 1 else None
    k = golden(shape, spokes * (slices if own else 1)).reshape(slices if own else 1, -1, 2)
    y = NonCartesian(k, csm, shape)(x)
    y = y + noise * random(tuple(y.shape), seed=5)
    return Scan(kspace=y, trajectory=k, image_shape=shape, csm=csm if maps else None, provenance="simulated: test"), x


# ------------------------------------------------------------------------------------------------ the transform


@backends
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(1, 6), (7, 5), (64, 63), *SHAPES], ids=str)
class TestTransform:
    def bar(self, backend, dtype):
        return 1e-11 if backend == "finufft" and dtype == DOUBLE else 1e-5

    def test_it_is_its_definition(self, shape, dtype, backend):
        k, x = golden(shape, 11), random((2, 3, *shape), dtype)
        y = NUFFT(k, shape, backend=backend)(x)
        assert y.dtype == dtype
        assert relative(y, exact(x, k)) < self.bar(backend, dtype)

    def test_on_the_grid_it_is_the_fft(self, shape, dtype, backend):
        A, x = NUFFT(on_grid(shape), shape, backend=backend), random((2, *shape), dtype)
        assert relative(A(x), fft2(x).flatten(-2)) < self.bar(backend, dtype)
        assert relative(A.adjoint(x.flatten(-2)), ifft2(x)) < self.bar(backend, dtype)

    def test_adjoint(self, shape, dtype, backend):
        A, x = NUFFT(golden(shape, 11), shape, backend=backend), random((3, *shape), dtype)
        y = random(tuple(A(x).shape), dtype, seed=1)
        assert abs(inner(A(x), y) - inner(x, A.adjoint(y))) < 1e-6 * size(A(x)) * size(y)

    def test_gram(self, shape, dtype, backend):
        k, x = golden(shape, 11).to(dtype.to_real()), random((3, *shape), dtype)
        A, w = NUFFT(k, shape, backend=backend), torch.rand(len(k), generator=torch.Generator().manual_seed(0))
        for weights in (None, w):
            spectrum = gram_spectrum(k, shape, weights, backend=backend)
            assert not spectrum.is_complex()
            y = A(x) if weights is None else A(x) * w
            assert relative(convolve(x, spectrum), A.adjoint(y)) < self.bar(backend, dtype)


@backends
def test_an_image_of_the_size_that_scanners_make(backend):
    """FINUFFT takes the quick kernel here: rounding of its points leaves nearly as much."""
    shape = (320, 320)
    k, x = radial(shape, 96), torch.stack([phantom(shape, seed=s) for s in range(2)]).to(SINGLE)
    some = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))[:1000]
    A = NUFFT(k[some], shape, backend=backend)
    assert relative(A(x), exact(x, k[some])) < 1e-5


@backends
def test_derivatives_of_both_orders_in_image_and_samples(backend):
    shape = (5, 4)
    k = golden(shape, 3).double()
    A = NUFFT(k, shape, backend=backend)
    x, y = random((2, *shape), DOUBLE), random((2, len(k)), DOUBLE)
    differentiable_twice(A, x)
    differentiable_twice(A.adjoint, y)
    spectrum = gram_spectrum(k, shape, backend=backend)
    differentiable_twice(lambda x: convolve(x, spectrum), x)
    differentiable_twice(lambda x: A.adjoint(A(x).abs().square() * A(x)), x)  # not linear: second derivatives matter


def test_derivatives_of_both_orders_in_the_maps():
    shape, k = (5, 4), golden((5, 4), 3).double()[None]
    x, csm, y = random((1, *shape), DOUBLE), random((1, 2, *shape), DOUBLE, seed=1), random((1, 2, k.shape[1]), DOUBLE)
    differentiable_twice(lambda x, s: NonCartesian(k, s)(x), x, csm)
    differentiable_twice(lambda y, s: NonCartesian(k, s).H(y), y, csm)
    differentiable_twice(lambda x, s: NonCartesian(k, s).gram(x), x, csm)


@backends
def test_frequencies_repeat_with_the_size_of_the_image(backend):
    shape, x = (12, 15), random((12, 15))
    k = golden(shape, 5)
    further = NUFFT(k + torch.tensor([12.0, -30.0]), shape, backend=backend)
    assert relative(further(x), NUFFT(k, shape, backend=backend)(x)) < 2e-5


def test_without_finufft_the_sparse_matrices_take_over(monkeypatch):
    shape, x = (12, 15), random((12, 15))
    k = golden(shape, 5)
    with_it = NUFFT(k, shape)(x)
    monkeypatch.setattr(nufft, "_finufft", lambda: None)
    assert 0 < relative(NUFFT(k, shape)(x), with_it) < 1e-5
    with pytest.raises(errors.BadOption, match="pip install finufft"):
        NUFFT(k, shape, backend="finufft")
    with pytest.raises(errors.BadOption, match="did you mean 'finufft'"):
        NUFFT(k, shape, backend="finuft")


def test_threads_may_share_a_transform():
    shape = (48, 40)
    A, images = NUFFT(golden(shape, 20), shape), [random((1 + i % 3, *shape), seed=i) for i in range(24)]
    alone = [A(x) for x in images]
    start = threading.Barrier(4)

    def run(part):
        start.wait()
        return [A(x) for x in images[part::4]]

    with ThreadPoolExecutor(4) as pool:
        for part, found in enumerate(pool.map(run, range(4))):
            assert all(torch.equal(a, b) for a, b in zip(found, alone[part::4], strict=True))


def test_data_that_do_not_match_are_refused():
    A = NonCartesian(golden((8, 9), 3)[None], coil_maps((8, 9), 3)[None].to(SINGLE))
    samples = A.trajectory.shape[1]
    for wrong in ((1, 1, samples), (1, 4, samples), (1, 3, samples - 1), (samples,)):
        with pytest.raises(errors.InconsistentShapes, match="coils, samples"):
            A.H(random(wrong))
    with pytest.raises(errors.BadOption, match="size of the image"):
        NonCartesian(A.trajectory)


# ------------------------------------------------------------------------------------------------ weights


def test_weights_share_out_a_frequency_among_those_who_measured_it():
    shape = (12, 15)
    k = on_grid(shape).float()
    assert relative(density_weights(k, shape), torch.ones(len(k))) < 1e-3
    assert relative(density_weights(torch.cat((k, k[:40], k[:40])), shape)[:40], torch.full((40,), 1 / 3)) < 1e-3
    alone = density_weights(torch.tensor([[0.0, 0.0], [4.0, 4.0]]), shape)
    assert relative(alone, torch.ones(2)) < 1e-3


@every_trajectory
def test_weights_are_where_their_iteration_ends(name):
    """C w = 1, with C_mm' = |⟨a_m, a_m'⟩|² from the rows themselves."""
    shape = (12, 9)
    k = TRAJECTORIES[name](shape, 8)
    rows = exact(torch.eye(108).reshape(108, *shape), k)  # (N, M)
    overlap = (rows.conj().T @ rows).abs().square().float()
    w = density_weights(k, shape, iterations=400)
    assert bool((w >= 0).all())
    met = overlap @ w
    assert float(met[w > 1e-2].sub(1).abs().max()) < 0.02
    # Ten iterations are nearly there, in what the weights are for.
    few = density_weights(k, shape)
    miss = [float(((rows * v) @ rows.conj().T - torch.eye(108)).norm()) for v in (few, w)]
    assert miss[0] < 1.01 * miss[1] < miss[0] * 1.02


@pytest.mark.parametrize("shape", [(64, 64), (63, 48)], ids=str)
@every_trajectory
def test_weighted_the_adjoint_gives_the_image_back(name, shape):
    """Of a dense trajectory, up to what the disk cuts off."""
    k = TRAJECTORIES[name](shape, 110 if name != "spiral" else 4)
    x = phantom(shape).to(SINGLE)
    A = NonCartesian(k[None], None, shape)
    weighted, root_y = A.preconditioned(A(x[None]))
    assert relative(weighted.H(root_y)[0].abs(), x.abs()) < 0.2
    assert relative(A.H(A(x[None]))[0].abs(), x.abs()) > 0.6
    # A gradient step of length one must not grow anything.
    assert 0.9 < weighted.norm() ** 2 < 2
    again, same = weighted.preconditioned(root_y)
    assert again is weighted and same is root_y


def test_the_ramp_is_the_area_of_each_sample():
    shape, spokes = (64, 64), 50
    for k in (radial(shape, spokes), golden(shape, spokes)):
        w = radial_weights(k, spokes)
        assert float(w.sum()) == pytest.approx(math.pi * 32**2, rel=1e-3)
        assert bool((w > 0).all())
    even = radial_weights(radial(shape, spokes), spokes).reshape(spokes, -1)
    assert relative(even, even[:1].expand_as(even)) < 1e-5
    assert float(even[0, 0]) == pytest.approx(32 * 0.5 * math.pi / spokes, rel=1e-4)  # |k| Δk Δθ
    uneven = radial_weights(torch.cat((radial((8, 8), 2), golden((8, 8), 1))), 3)
    assert float(uneven.sum()) == pytest.approx(math.pi * 16, rel=0.05)
    for shots in (0, 3, 2000):
        with pytest.raises(errors.BadOption, match="spokes"):
            radial_weights(radial((8, 8), 4, readout=10), shots)


# ------------------------------------------------------------------------------------------------ trajectories


@every_trajectory
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (31, 48), (9, 24)], ids=str)
@pytest.mark.parametrize("shots", [1, 2, 7])
def test_a_trajectory_stays_in_k_space_and_passes_its_centre(name, shape, shots):
    k = TRAJECTORIES[name](shape, shots, readout=40)
    assert k.dtype == torch.float32
    assert k.shape == (40 * shots, 2)
    half = torch.tensor(shape) / 2
    assert bool((k >= -half).all() and (k < half).all())
    # Inside the ellipse, out to its rim, and each shot through the centre.
    radius = (k / half).norm(dim=1)
    assert 0.9 < float(radius.max()) < 1 + 1e-5
    assert bool((radius.reshape(shots, -1).amin(1) < 1e-6).all())
    assert torch.equal(k, TRAJECTORIES[name](shape, shots, readout=40))
    steps = (k / half).reshape(shots, 40, 2).diff(dim=1).norm(dim=2)
    assert float(steps.max()) < 1.2 * float(steps.median()) or name == "spiral"


def test_angles_of_the_spokes():
    def turns(k, shots):
        step = k.reshape(shots, -1, 2)[:, -1] - k.reshape(shots, -1, 2)[:, 0]
        return torch.atan2(step[:, 0], step[:, 1]).rad2deg() % 180

    assert turns(radial((32, 32), 4), 4).tolist() == pytest.approx([0, 45, 90, 135], abs=1e-3)
    assert turns(golden((32, 32), 3), 3).tolist() == pytest.approx([0, 111.246, 42.492], abs=1e-2)
    tiny = TRAJECTORIES["tiny-golden"]
    assert turns(tiny((32, 32), 3), 3).tolist() == pytest.approx([0, 23.628, 47.256], abs=1e-2)
    assert torch.equal(tiny((32, 32), 3, order=1), golden((32, 32), 3))
    assert bool((radial((32, 32), 4)[:64, 0] == 0).all())  # angle 0 runs along a row


@every_trajectory
def test_readouts_are_told_apart_by_their_jumps(name):
    for shots in (1, 2, 5, 16):
        found = readouts(TRAJECTORIES[name]((20, 17), shots))
        assert torch.equal(found, torch.arange(shots).repeat_interleave(len(found) // shots)), shots
    assert readouts(torch.zeros(1, 2)).tolist() == [0]


def test_arms_of_the_spiral():
    k = spiral((64, 64), 4)
    cells = len(torch.unique(k.round(), dim=0))
    assert cells > 0.95 * math.pi * 32**2  # dense as it is
    few = spiral((64, 64), 4, readout=200, turns=3, order=4).reshape(4, 200, 2)
    steps = few.diff(dim=1).norm(dim=2)
    assert float(steps.max()) < 1.05 * float(steps.median())  # near the centre the chord is shorter than the arc
    # The centre takes the larger share when the density falls off.
    inner_part = [
        float((spiral((64, 64), 4, readout=200, turns=3, order=o).norm(dim=1) < 16).double().mean()) for o in (0, 4)
    ]
    assert inner_part[1] > 1.3 * inner_part[0]


@every_trajectory
def test_trajectories_refuse_what_makes_no_sense(name):
    for arguments, key in (
        ({"shots": 0}, "shots"), ({"shots": 1.5}, "shots"), ({"readout": 1}, "readout"), ({"shape": (0, 4)}, "shape"),
    ):  # fmt: skip
        with pytest.raises(errors.BadOption) as caught:
            TRAJECTORIES[name](**({"shape": (8, 8), "shots": 3} | arguments))
        assert caught.value.key == key
    for function, option in (("spiral", "turns"), ("spiral", "order"), ("tiny-golden", "order")):
        with pytest.raises(errors.BadOption, match="expected"):
            TRAJECTORIES[function]((8, 8), 3, **{option: -1})


# ------------------------------------------------------------------------------------------------ scans


def test_the_centre_comes_onto_the_grid():
    shape = (64, 60)
    scan, x = radial_scan(shape, spokes=60, coils=3, slices=2, own=True)
    block, mask = calibration_block(scan.kspace, scan.trajectory, shape, size=20)
    assert mask.shape == (1, 1, *shape)
    assert float(mask.sum()) == 400
    assert mask[0, 0, 22:42, 20:40].all()
    truth = fft2(scan.csm * x[:, None]) * mask
    assert relative(block, truth) < 0.02
    with pytest.raises(errors.NoData, match="near zero frequency"):
        calibration_block(scan.kspace[..., :1], torch.full((1, 1, 2), 25.0), shape, size=16)


@pytest.mark.parametrize("coils", [1, 4])
def test_the_scale_is_that_of_the_same_image_on_the_grid(coils):
    shape = (64, 60)
    scan, x = radial_scan(shape, spokes=50, coils=coils, slices=2)
    full = fft2(x[:, None] if scan.csm is None else scan.csm * x[:, None])
    grid = Scan(kspace=full, mask=torch.ones(1, 1, *shape), csm=scan.csm, image_shape=shape)
    assert relative(normalise(scan).scale, normalise(grid).scale) < 0.02
    bigger = dataclasses.replace(scan, kspace=scan.kspace * 1e6)
    assert relative(normalise(bigger).kspace, normalise(scan).kspace) < 1e-5


def test_acceleration_counts_the_cells_that_were_visited():
    shape = (12, 16)
    k = on_grid(shape).float()[::3]
    scan = Scan(kspace=random((1, 1, 64)), trajectory=k[None], image_shape=shape)
    assert scan.acceleration == 3
    twice = dataclasses.replace(scan, kspace=random((1, 1, 128)), trajectory=torch.cat((k, k))[None])
    assert twice.acceleration == 3
    assert 1.2 < radial_scan((64, 64), spokes=110)[0].acceleration < 1.35  # the whole disk: 4 / π


@pytest.mark.parametrize("shape", [(64, 64), (64, 48)], ids=str)
def test_a_trajectory_in_another_unit_is_refused_with_what_to_do(shape):
    scan, _ = radial_scan(shape, spokes=12)
    n, k = torch.tensor(shape), scan.trajectory
    for wrong, word, kind in (
        (k / n, r"\[-0.5, 0.5\]: multiply each axis by N$", errors.UnsupportedLayout),
        (2 * k / n, r"\[-1, 1\]: multiply each axis by N / 2", errors.UnsupportedLayout),
        (2 * math.pi * k / n, r"radians: multiply each axis by N / \(2π\)", errors.UnsupportedLayout),
        (k * 4, "too small for the resolution", errors.InconsistentShapes),
        (k * 1.1, "too small for the resolution", errors.InconsistentShapes),
    ):
        with pytest.raises(kind, match=word):
            dataclasses.replace(scan, trajectory=wrong)
    if shape[0] != shape[1]:
        with pytest.raises(errors.InconsistentShapes, match="swapped"):
            dataclasses.replace(scan, trajectory=k.flip(-1))
    # Half a sample over the rim is the delay of a gradient; and a small matrix has few cycles.
    dataclasses.replace(scan, trajectory=k + 0.49)
    Scan(kspace=random((1, 1, 40)), trajectory=radial((2, 3), 4, readout=10)[None], image_shape=(2, 3))


def test_a_trajectory_that_covers_little_is_allowed_with_a_warning():
    shape = (64, 64)
    k = radial((8, 8), 12)[None]
    scan = Scan(kspace=NonCartesian(k, None, shape)(phantom(shape)[None].to(SINGLE)), trajectory=k, image_shape=shape)
    with pytest.warns(TunemriWarning, match="reaches 12% of the way"):
        prepare(scan)


@pytest.mark.parametrize("name", ["zero-filled", "sense", "tv", "wavelet"])
@pytest.mark.parametrize("coils", [1, 4])
def test_methods_without_weights_reconstruct_spokes(name, coils):
    scan, x = radial_scan((48, 40), spokes=20, coils=coils, slices=2, noise=0.002, own=True)
    out = reconstruct(scan, load(name))
    assert out.image.shape == x.shape
    error = relative(out.image.abs(), x.abs())
    assert error < {"zero-filled": 0.35, "sense": 0.25, "tv": 0.15, "wavelet": 0.2}[name], error
    assert out.residual is not None
    assert float(out.residual.max()) < (0.4 if name == "zero-filled" else 0.1)
    # A slice gives the image that it gives alone.
    assert relative(reconstruct(select(scan, slice(1, 2)), load(name)).image, out.image[1:]) < 1e-4


def test_maps_are_estimated_from_the_centre_of_the_spokes():
    scan, x = radial_scan((48, 40), spokes=40, coils=4, maps=False)
    out = reconstruct(scan, load("sense"), lam=0.001)
    assert out.csm.shape == (1, 4, 48, 40)
    assert relative(out.image.abs(), x.abs()) < 0.2
    with pytest.raises(errors.MissingKey, match="sensitivity maps"):
        encoding(scan)


def test_a_learned_model_takes_spokes_as_it_takes_the_grid():
    """Its input is AᴴWy and AᴴWA: an image of the right size whatever the oversampling; and it says that this is new to it."""
    model = load("hyper-brain")
    scan, x = radial_scan((64, 64), spokes=40, slices=2)
    assert any("off the grid" in sentence for sentence in model.outside(scan))
    y, A = scan.kspace, encoding(scan)
    with torch.no_grad():
        image = model(y, A).image
        assert relative(image.abs(), x.abs()) < 0.2
        # The same samples twice are the same measurement.
        twice = NonCartesian(torch.cat((scan.trajectory,) * 2, 1), None, (64, 64))
        assert relative(model(torch.cat((y, y), -1), twice).image, image) < 1e-3


def test_a_model_trains_on_spokes():
    from tunemri.datasets import Example

    torch.manual_seed(0)
    model = make("hyperrecon", {"main": {"name": "unrolled", "stages": 2, "width": 2}, "widths": [4]})
    scan, x = radial_scan((24, 20), spokes=12, slices=2, own=True)
    ready = prepare(scan)
    example = Example(y=ready.kspace, A=encoding(ready), target=x / ready.scale[:, None, None].float())
    loss = model.loss(example, torch.Generator().manual_seed(0))
    loss.backward()
    assert bool(loss.isfinite())
    assert any(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None)
