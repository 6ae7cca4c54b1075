"""Operators: the laws over every one of them, and the facts that pin the Fourier convention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from laws import SHAPES, adjoint, differentiable_twice, gram, inner, linear, lines, norm, random, relative, scan
from tunemri import errors
from tunemri.fourier import crop, fft2, fft2_raw, ifft2, pad, phase_ramp, resized
from tunemri.operators import (
    Cartesian,
    Coils,
    Downsample,
    Fourier,
    Identity,
    LinearOperator,
    Mask,
    NonCartesian,
    encoding,
)
from tunemri.simulate import coil_maps
from tunemri.trajectories import golden

COILS = 3


def maps(shape, batch=1, dtype=torch.complex64):
    return torch.cat([coil_maps(shape, COILS, seed=b)[None] for b in range(batch)]).to(dtype)


def columns_mask(shape):
    return (torch.arange(shape[1]) % 3 == 0).float()[None, None, None]


def spokes(shape, batch=1):
    return golden(shape, 5 * batch).reshape(batch, -1, 2)


# Name → (shape → operator). Mask acts on coil data; a leading axis of the image serves as its coils.
OPERATORS = {
    "identity": lambda s: Identity(),
    "fourier": lambda s: Fourier(),
    "mask": lambda s: Mask(lines(s)),
    "coils": lambda s: Coils(maps(s)),
    "downsample-2": lambda s: Downsample(2, s),
    "downsample-3": lambda s: Downsample(3, s),
    "cartesian": lambda s: Cartesian(lines(s)),
    "cartesian-coils": lambda s: Cartesian(lines(s), maps(s)),
    "cartesian-columns": lambda s: Cartesian(columns_mask(s), None, s),
    "cartesian-columns-coils": lambda s: Cartesian(columns_mask(s), maps(s)),
    "cartesian-a-mask-per-slice": lambda s: Cartesian(torch.cat((lines(s), lines(s, 4))), maps(s, 2)),
    "composition": lambda s: Mask(lines(s)) @ Fourier() @ Coils(maps(s)),
    "non-cartesian": lambda s: NonCartesian(spokes(s), None, s),
    "non-cartesian-coils": lambda s: NonCartesian(spokes(s), maps(s)),
    "non-cartesian-a-trajectory-per-slice": lambda s: NonCartesian(spokes(s, 2), maps(s)),
    "non-cartesian-weights": lambda s: NonCartesian(
        spokes(s, 2), maps(s, 2), weights=1 + torch.arange(2 * spokes(s).shape[1]).reshape(2, -1) % 3
    ),
    "non-cartesian-weights-per-slice": lambda s: NonCartesian(
        spokes(s), maps(s), weights=1 + torch.arange(2 * spokes(s).shape[1]).reshape(2, -1) % 3
    ),
    "adjoint-of-composition": lambda s: (Fourier() @ Downsample(2, s)).H.H,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
class TestEveryOperator:
    def setup(self, name, shape, dtype=torch.complex64) -> tuple[LinearOperator, torch.Tensor, torch.Tensor]:
        A = OPERATORS[name](shape)
        x = random((2, 1, *shape) if name == "mask" else (2, *shape), dtype)
        return A, x, random(tuple(A(x).shape), dtype, seed=1)

    def test_adjoint(self, name, shape):
        A, x, y = self.setup(name, shape)
        adjoint(A, x, y)

    def test_gram(self, name, shape):
        A, x, _ = self.setup(name, shape)
        # Off the grid, the transform to samples and the one to the Gram kernel are each exact to 1e-5.
        gram(A, x, 1e-5 if isinstance(A, NonCartesian) else 1e-6)

    def test_linear(self, name, shape):
        A, x, y = self.setup(name, shape)
        linear(A, x)
        linear(A.H, y)
        linear(A.gram, x)

    def test_the_norm_is_the_largest_singular_value(self, name, shape):
        A, x, _ = self.setup(name, shape)
        if A.in_shape is None and name not in ("identity", "fourier", "mask"):
            with pytest.raises(errors.BadOption, match="needs one"):
                A.norm()
        elif name != "mask":
            norm(A.sample(0), shape)

    def test_a_sample_is_what_the_batch_has(self, name, shape):
        A, x, y = self.setup(name, shape)
        for b in range(2):
            one = A.sample(b)
            assert relative(one(x[b : b + 1]), A(x)[b : b + 1]) < 1e-6
            assert relative(one.H(y[b : b + 1]), A.H(y)[b : b + 1]) < 1e-6
            assert relative(one.gram(x[b : b + 1]), A.gram(x)[b : b + 1]) < 1e-6

    def test_two_batch_axes(self, name, shape):
        A, x, y = self.setup(name, shape)
        stack = torch.stack((x, 2 * x, 1j * x))
        assert relative(A(stack), torch.stack([A(v) for v in stack])) < 1e-6
        stack = torch.stack((y, 2 * y, 1j * y))
        assert relative(A.H(stack), torch.stack([A.H(v) for v in stack])) < 1e-6

    def test_inputs_are_not_changed(self, name, shape):
        A, x, y = self.setup(name, shape)
        kept = x.clone(), y.clone()
        _ = A(x), A.H(y), A.gram(x), A(x)
        assert torch.equal(x, kept[0])
        assert torch.equal(y, kept[1])


@pytest.mark.parametrize(
    ("fine", "coarse"), [((32, 32), (16, 16)), ((45, 36), (22, 18)), ((33, 48), (16, 24))], ids=str
)
@pytest.mark.parametrize("name", [name for name in OPERATORS if "cartesian" in name])
def test_a_coarser_grid_keeps_what_it_can_hold(name, fine, coarse):
    """Of an image, and maps, that vary slowly: the same data, but for the factor that noise has too."""
    A = OPERATORS[name](fine)
    B, restricted = A.coarser(coarse)
    rows, columns = (torch.arange(n) - n // 2 + 0.7 for n in coarse)
    small = torch.exp(-((rows[:, None] / coarse[0] * 6) ** 2) - (columns / coarse[1] * 6) ** 2 + 0.3j)[None]
    y = A(resized(small, fine))
    scale = math.sqrt(math.prod(coarse) / math.prod(fine))
    close = 1e-5 if isinstance(A, Cartesian) and A.csm is None else 0.05
    assert relative(restricted(y), B(small)) < close
    for b in range(len(y)):
        assert relative(B.sample(b).H(restricted(y)[b : b + 1]), B.H(B(small))[b : b + 1]) < 0.05
    noise = random(tuple(y.shape), seed=3)
    kept = restricted(noise)
    kept = kept[kept != 0]
    assert float(kept.abs().square().mean().sqrt()) == pytest.approx(
        scale * float(noise.abs().square().mean().sqrt()), rel=0.1
    )
    assert relative(B.gram(small), B.H(B(small))) < 1e-4


def test_k_and_k_plus_n_are_one_frequency_on_coarser_grids_too():
    shape, coarse = (32, 36), (16, 18)
    k = spokes(shape)
    y = random((1, 1, k.shape[1]))
    (A, r), (B, s) = (NonCartesian(k + n, None, shape).coarser(coarse) for n in (0, torch.tensor(shape)))
    assert relative(A.H(r(y)), B.H(s(y))) < 1e-4
    assert bool(r(y).any()) and not bool((r(y) != 0).all())


def test_an_operator_that_knows_no_grid_knows_no_coarser_one():
    assert Fourier().coarser((4, 4)) is None


@pytest.mark.parametrize(
    "shapes", [((16, 16), (8, 8)), ((15, 21), (7, 10)), ((12, 17), (24, 31)), ((20, 9), (11, 16))], ids=str
)
def test_resized_images_keep_their_intensities(shapes):
    first, second = shapes
    flat = torch.full((1, *first), 0.7 + 0.2j)
    assert relative(resized(flat, second), torch.full((1, *second), 0.7 + 0.2j)) < 1e-6
    small, large = (tuple(f(pair) for pair in zip(*shapes, strict=True)) for f in (min, max))
    x = random((2, *small))
    assert relative(resized(resized(x, large), small), x) < 1e-6


@pytest.mark.parametrize("shape", [(4, 6), (5, 4), (5, 3)], ids=str)
@pytest.mark.parametrize("coils", [False, True])
def test_derivatives_of_both_orders_in_image_maps_and_data(shape, coils):
    mask, double = lines(shape).double(), torch.complex128
    x, y = random((2, *shape), double), random((2, COILS if coils else 1, *shape), double)
    if not coils:
        A = Cartesian(mask)
        for f, v in ((A, x), (A.H, y), (A.gram, x)):
            differentiable_twice(f, v)
        return
    csm = maps(shape, dtype=double)
    differentiable_twice(lambda x, s: Cartesian(mask, s)(x), x, csm)
    differentiable_twice(lambda y, s: Cartesian(mask, s).H(y), y, csm)
    differentiable_twice(lambda x, s: Cartesian(mask, s).gram(x), x, csm)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coils", [False, True])
@pytest.mark.parametrize("mask", [lines, columns_mask])
def test_folding_the_shifts_changes_nothing(shape, coils, mask):
    """Cartesian is Mask @ Fourier @ Coils, only quicker."""
    m, csm = mask(shape), maps(shape) if coils else torch.ones(1, 1, *shape, dtype=torch.complex64)
    folded, plain = Cartesian(m, csm if coils else None, shape), Mask(m) @ Fourier() @ Coils(csm)
    x = random((2, *shape))
    y = random((2, csm.shape[1], *shape))
    assert relative(folded(x), plain(x)) < 1e-6
    assert relative(folded.H(y), plain.H(y)) < 1e-6
    assert relative(folded.gram(x), plain.gram(x)) < 1e-6


def test_the_fold_keeps_double_precision():
    shape = (9, 12)
    x, m = random((1, *shape), torch.complex128), lines(shape).double()
    assert relative(Cartesian(m)(x), (Mask(m) @ Fourier())(x[:, None])) < 1e-14
    assert Cartesian(m, maps(shape, dtype=torch.complex128)).gram(x).dtype == torch.complex128


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_downsampling_is_a_partial_isometry(shape, factor):
    """A Aᴴ = I wherever the blocks are whole; and a constant image keeps its mean, times the factor."""
    whole = tuple(n - n % factor for n in shape)
    A = Downsample(factor, whole)
    y = random(tuple(A(random(whole)).shape), seed=3)
    assert relative(A(A.H(y)), y) < 1e-6
    assert A(torch.ones(whole, dtype=torch.complex64)).flatten()[0] == pytest.approx(factor)
    assert tuple(Downsample(factor, shape)(random(shape)).shape) == tuple(math.ceil(n / factor) for n in shape)


def test_coils_that_do_not_match_are_refused_instead_of_broadcast():
    shape = (8, 9)
    for A in (Cartesian(lines(shape), maps(shape)), Coils(maps(shape))):
        for wrong in ((1, 1, *shape), (1, COILS + 1, *shape), shape, (1, COILS, *shape[::-1])):
            with pytest.raises(errors.InconsistentShapes, match="coils, rows, columns"):
                A.H(random(wrong))


def test_the_encoding_of_a_scan():
    s = scan((12, 15), coils=4)
    A = encoding(s)
    assert A.in_shape == s.image_shape
    assert relative(A(A.H(s.kspace)) * (1 - s.mask), torch.zeros_like(s.kspace)) == 0
    with pytest.raises(errors.MissingKey, match="sensitivity maps"):
        encoding(type(s)(kspace=s.kspace, mask=s.mask, image_shape=s.image_shape))


# ------------------------------------------------------------------------------------------------ Fourier


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), *SHAPES], ids=str)
def test_the_transform_is_its_definition(shape):
    """X[k] = 1/√N Σ x[n] exp(−2πi (k − c)(n − c) / N), c = N // 2, on both axes."""
    kernels = []
    for n in shape:
        i = torch.arange(n, dtype=torch.float64) - n // 2
        kernels.append(torch.polar(torch.full((n, n), n**-0.5, dtype=torch.float64), -2 * math.pi / n * i[:, None] * i))
    x = random(shape, torch.complex128)
    assert relative(fft2(x), kernels[0] @ x @ kernels[1].T) < 1e-13
    assert relative(ifft2(fft2(x)), x) < 1e-14
    y = random(shape, torch.complex128, seed=1)
    assert inner(fft2(x), y) == pytest.approx(inner(x, ifft2(y)), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), *SHAPES, (64, 63), (320, 320)], ids=str)
def test_the_phase_ramp_replaces_the_shifts(shape):
    x = random(shape, torch.complex128)
    within, after = phase_ramp(shape, torch.complex128)
    assert relative(after * fft2_raw(within * x), fft2(x)) < 1e-13
    if all(n % 2 == 0 for n in shape):
        for ramp in (within, after):
            assert not ramp.imag.any()
            assert bool((ramp.real.abs() == 1).all())


@pytest.mark.parametrize(("big", "small"), list(itertools.product([(9, 12), (8, 7)], [(4, 5), (5, 4), (1, 1), (8, 7)])))
def test_padding_is_the_adjoint_of_cropping_and_keeps_the_centre(big, small):
    x, y = random(big), random(small, seed=1)
    assert inner(crop(x, small), y) == pytest.approx(inner(x, pad(y, big)), rel=1e-5)
    assert torch.equal(crop(pad(y, big), small), y)
    assert crop(x, small)[small[0] // 2, small[1] // 2] == x[big[0] // 2, big[1] // 2]
    assert torch.equal(crop(x, (99, 99)), x)
