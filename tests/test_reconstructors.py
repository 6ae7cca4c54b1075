"""What every method obeys, from METHODS by name: those without weights as they are, those with weights small and untrained."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws import relative, scan
from tunemri import errors, methods
from tunemri.datasets import Example
from tunemri.errors import TunemriWarning
from tunemri.methods import METHODS, Dial, Reconstructor, load, prepare, reconstruct
from tunemri.operators import encoding
from tunemri.scan import Scan, normalise, select

SMALL = {
    "hyperrecon": {"main": {"name": "unrolled", "stages": 2, "width": 4}, "widths": [6, 4]},
    "single-weight": {"main": {"name": "unet", "width": 4}},
    "meta-learned": {
        "phases": 2,
        "tasks": [0.1, 0.5],
        "features": {"channels": 2},
        "proposal": {"width": 4, "levels": 2},
    },
    "generative": {
        "energy": {"widths": [4, 6]},
        "mode": {"way": 22, "levels": 3},
        "draws": {"chains": 2, "samples": 2},
        "precision": "float32",  # laws of the last digits
    },
}


def build(name) -> Reconstructor:
    torch.manual_seed(0)
    return methods.make(name, SMALL[name]).eval() if name in SMALL else load(name)


every_method = pytest.mark.parametrize("name", METHODS)


@pytest.mark.filterwarnings("ignore:the image misses the measured data")  # untrained weights do
@every_method
class TestEveryMethod:
    @pytest.mark.parametrize("coils", [1, 8])
    @pytest.mark.parametrize("shape", [(32, 32), (31, 45), (48, 33)], ids=str)
    def test_an_image_of_the_size_of_the_scan_with_all_that_is_known_about_it(self, name, shape, coils):
        out = reconstruct(scan(shape, coils=coils, slices=2), build(name))
        assert out.image.shape == (2, *shape)
        assert out.image.is_complex()
        assert bool(torch.view_as_real(out.image).isfinite().all())
        assert out.residual is not None
        assert out.residual.shape == (2,)
        assert bool(out.residual.isfinite().all())
        assert out.status
        assert set(out.dials) <= set(build(name).dials)  # what is suggested slice by slice has no one value
        one = reconstruct(scan(shape, coils=coils), build(name))
        assert set(one.dials) == set(build(name).dials)

    def test_maps_are_estimated_where_there_are_none(self, name):
        s = scan((32, 33), coils=4)
        out = reconstruct(dataclasses.replace(s, csm=None), build(name))
        assert out.csm is not None
        assert out.csm.shape == (1, 4, 32, 33)
        assert bool(out.image.isfinite().all())

    @pytest.mark.parametrize("factor", [1e-6, 1e6])
    def test_units_do_not_matter(self, name, factor):
        """A scan times c gives the image times c: a dial means the same whatever the receiver's gain."""
        s = scan((32, 36), coils=3, noise=0.02)
        plain = reconstruct(s, build(name)).image
        scaled = reconstruct(dataclasses.replace(s, kspace=s.kspace * factor), build(name)).image
        assert relative(scaled / factor, plain) < 1e-4

    def test_powers_of_two_are_exact(self, name):
        s = scan((32, 36), coils=3, noise=0.02)
        plain = reconstruct(s, build(name)).image
        scaled = reconstruct(dataclasses.replace(s, kspace=s.kspace * 2**20), build(name)).image
        assert torch.equal(scaled, plain * 2**20)

    def test_the_same_scan_gives_the_same_image(self, name):
        s = scan((32, 32), coils=2, noise=0.01)
        assert torch.equal(reconstruct(s, build(name)).image, reconstruct(s, build(name)).image)

    def test_slices_are_independent(self, name):
        s = scan((32, 30), coils=2, slices=3, noise=0.01)
        together = reconstruct(s, build(name)).image
        for b in range(3):
            alone = reconstruct(select(s, slice(b, b + 1)), build(name)).image
            assert relative(alone, together[b : b + 1]) < 1e-6

    def test_a_batch_is_its_samples_one_by_one(self, name):
        model, s = build(name), normalise(scan((24, 30), coils=2, slices=3, noise=0.01))
        A = encoding(s)
        with torch.no_grad():
            together = model(s.kspace, A).image
            for b in range(3):
                assert relative(model(s.kspace[b : b + 1], A.sample(b)).image, together[b : b + 1]) < 1e-4

    def test_an_empty_slice_stays_empty_and_spoils_nothing(self, name):
        s = scan((32, 30), coils=2, slices=3, noise=0.01)
        kspace = s.kspace.clone()
        kspace[1] = 0
        whole, holed = reconstruct(s, build(name)), reconstruct(dataclasses.replace(s, kspace=kspace), build(name))
        for b in (0, 2):
            assert relative(holed.image[b], whole.image[b]) < 1e-6
        assert bool(holed.image.isfinite().all())
        assert not holed.image[1].any(), "an image from nothing"

    def test_what_is_given_is_left_as_it_was(self, name):
        s = scan((24, 25), coils=2, slices=2)
        kept = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}
        model = build(name)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        reconstruct(s, model)
        for key, value in kept.items():
            now = getattr(s, key)
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value, key
        for key, value in model.state_dict().items():
            assert torch.equal(value, weights[key]), key

    def test_the_image_depends_on_the_data_differentiably(self, name):
        model, s = build(name), normalise(scan((16, 17)))
        y = s.kspace.clone().requires_grad_()
        model(y, encoding(s)).image.abs().square().sum().backward()
        assert y.grad is not None
        assert bool(y.grad.isfinite().all())
        assert bool(y.grad.any())

    def test_its_dials_hold_their_promises(self, name):
        model = build(name)
        s = scan((24, 24), noise=0.02)
        suggested = model.suggest(s.kspace, encoding(s))
        assert set(suggested) == set(model.dials)
        for dial_name, dial in model.dials.items():
            assert dial.sentence
            assert dial.check(dial_name, suggested[dial_name]) == suggested[dial_name]
            assert dial.as_dict()["sentence"] == dial.sentence
            settings = dial.choices or [dial.at(p) for p in (0.0, 0.5, 1.0)]
            images = [reconstruct(s, model, **{dial_name: value}).image for value in settings]
            assert not torch.equal(images[0], images[-1]), "a dial that does nothing"
            if dial.choices:
                with pytest.raises(errors.BadOption, match=dial_name):
                    reconstruct(s, model, **{dial_name: "much"})
                continue
            for wrong in (dial.hi + 1, float("nan"), float("inf"), "much"):
                with pytest.raises(errors.BadOption, match=dial_name):
                    reconstruct(s, model, **{dial_name: wrong})
            with pytest.warns(TunemriWarning, match="extrapolating"):
                out = reconstruct(s, model, extrapolate=True, **{dial_name: dial.hi * 1.01})
            assert out.dials[dial_name] == pytest.approx(dial.hi * 1.01)
        with pytest.raises(errors.BadOption, match="no such dial"):
            reconstruct(s, model, sharpness=1)

    def test_it_trains_or_says_that_it_cannot(self, name):
        model, s = build(name), normalise(scan((16, 16)))
        batch = Example(y=s.kspace, A=encoding(s), target=encoding(s).H(s.kspace) * 2)
        if name in SMALL:
            assert model.loss(batch, torch.Generator().manual_seed(0)).requires_grad
        else:
            with pytest.raises(errors.BadOption, match="no weights to train"):
                model.loss(batch, torch.Generator())

    def test_a_scan_without_signal_is_refused(self, name):
        s = scan((16, 16), slices=2)
        with pytest.raises(errors.NoData, match="every sample is zero"):
            reconstruct(dataclasses.replace(s, kspace=torch.zeros_like(s.kspace)), build(name))


# ------------------------------------------------------------------------------------------------ the way in


@pytest.mark.parametrize("shape", [(24, 24), (31, 20), (8, 64)], ids=str)
@pytest.mark.parametrize("coils", [1, 4])
def test_normalising_scales_with_the_data_and_not_with_the_mask(shape, coils):
    s = scan(shape, coils=coils, slices=2, every=2)
    ready = normalise(s)
    assert s.scale is not None
    assert ready.scale is not None
    for factor in (1e-12, 1e12):
        scaled = normalise(dataclasses.replace(s, kspace=s.kspace * factor)).scale
        torch.testing.assert_close(scaled, ready.scale * factor, rtol=1e-5, atol=0)
    sparse = normalise(scan(shape, coils=coils, slices=2, every=4)).scale
    torch.testing.assert_close(sparse, ready.scale, rtol=0.35, atol=0)
    torch.testing.assert_close(
        ready.kspace.to(torch.complex128) * ready.scale[:, None, None, None],
        s.kspace.to(torch.complex128),
        rtol=1e-5,
        atol=1e-9,
    )


def test_normalising_reaches_the_order_of_one_from_any_sampling():
    for every in (1, 2, 4):
        for coils in (1, 4):
            s = scan((40, 44), coils=coils, every=every)
            ready = normalise(s)
            full = normalise(scan((40, 44), coils=coils, every=1))
            image = encoding(full).H(full.kspace).abs()
            assert ready.scale is not None
            assert full.scale is not None
            assert 0.5 < float(image.max() * full.scale / ready.scale) < 3


def test_an_empty_slice_keeps_scale_one():
    s = scan((16, 16), slices=2)
    kspace = s.kspace.clone()
    kspace[0] = 0
    ready = normalise(dataclasses.replace(s, kspace=kspace))
    assert ready.scale is not None
    assert float(ready.scale[0]) == 1
    assert float(ready.scale[1]) != 1


def test_maps_that_are_not_normalised_are_said_and_mended():
    s = scan((24, 24), coils=4)
    assert s.csm is not None
    with pytest.warns(TunemriWarning, match="not normalised"):
        mended = prepare(dataclasses.replace(s, csm=s.csm * 3)).csm
    assert mended is not None
    torch.testing.assert_close(mended, prepare(s).csm, rtol=1e-3, atol=1e-4)


def test_a_scan_outside_of_what_was_trained_is_said():
    model = methods.make("hyperrecon", SMALL["hyperrecon"] | {
        "trained": {"acceleration": [6, 8], "size": [64, 128], "coils": 1},
    })  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reconstruct(scan((32, 32), coils=2), model)
    said = " ".join(str(w.message) for w in caught)
    for word in ("acceleration", "matrix 32×32", "2 coils"):
        assert word in said
    assert all(isinstance(w.message, TunemriWarning) for w in caught)


def test_csm_by_an_unknown_name_is_refused():
    with pytest.raises(errors.BadOption, match="did you mean 'walsh'"):
        reconstruct(scan((16, 16), coils=2), build("zero-filled"), csm="wallsh")


# ------------------------------------------------------------------------------------------------ dials

ranges = st.tuples(st.floats(1e-3, 1e3), st.floats(1.5, 1e3)).map(lambda p: (p[0], p[0] * p[1]))


@given(ranges, st.sampled_from(["linear", "log"]), st.floats(0, 1))
def test_every_slider_position_is_in_range_and_monotone(bounds, scale, position):
    lo, hi = bounds
    dial = Dial(sentence="s", default=lo, lo=lo, hi=hi, scale=scale)
    value = dial.at(position)
    assert lo * (1 - 1e-12) <= value <= hi * (1 + 1e-12)
    assert dial.at(0) == pytest.approx(lo)
    assert dial.at(1) == pytest.approx(hi)
    if scale == "log":
        assert dial.at(0.5) == pytest.approx(math.sqrt(lo * hi))


def test_the_ends_of_a_slider_pass_its_own_check():
    """exp(log(lo)) may miss lo by one bit; a slider pushed to its end must still be inside."""
    for lo, hi in ((1e-4, 1.0), (0.003, 7.1), (1e-5, 10.0), (0.1, 0.3)):
        dial = Dial(sentence="s", default=lo, lo=lo, hi=hi, scale="log")
        assert dial.check("lam", dial.at(0)) == pytest.approx(lo)
        assert dial.check("lam", dial.at(1)) == pytest.approx(hi)


def test_a_dial_of_words():
    dial = Dial(sentence="s", default="mmse", choices=("map", "mmse"))
    assert dial.check("estimate", "map") == "map"
    with pytest.raises(errors.BadOption, match="did you mean 'mmse'"):
        dial.check("estimate", "mmsee")
    assert dial.as_dict()["choices"] == ["map", "mmse"]


def test_impossible_dials_are_refused():
    for wrong in (
        {"default": 2.0},
        {"default": 0.5, "scale": "square"},
        {"default": 0.0, "scale": "log"},
        {"default": "a", "choices": ("b",)},
    ):
        with pytest.raises(errors.BadOption):
            Dial(sentence="s", **wrong)


# ------------------------------------------------------------------------------------------------ records


def test_a_scan_that_is_not_one_is_refused():
    s = scan((8, 9), coils=2, slices=2)
    k, m, csm = s.kspace, s.mask, s.csm
    assert m is not None
    assert csm is not None
    bad = k.clone()
    bad[0, 1, 2, 3] = complex("nan")
    good = {"kspace": k, "mask": m, "image_shape": (8, 9), "csm": csm}
    cases = [
        ({"kspace": k.real}, errors.UnsupportedLayout, "complex64"),
        ({"kspace": k[0]}, errors.UnsupportedLayout, r"\(2, 8, 9\)"),
        ({"kspace": k[:0]}, errors.NoData, "no sample"),
        ({"kspace": bad}, errors.NonFinite, r"first at \(0, 1, 2, 3\)"),
        ({"image_shape": (9, 8)}, errors.InconsistentShapes, "8×9"),
        ({"mask": None}, errors.MissingKey, "mask"),
        ({"mask": m[..., :-1]}, errors.InconsistentShapes, "mask"),
        ({"mask": m * 0.5}, errors.UnsupportedLayout, "0 and 1"),
        ({"mask": m * 0}, errors.NoData, "no sample"),
        ({"csm": csm[:, :1]}, errors.InconsistentShapes, "csm"),
        ({"csm": csm * 0}, errors.NoData, "zero"),
        ({"scale": torch.ones(3)}, errors.InconsistentShapes, "one per slice"),
        ({"noise_std": -1.0}, errors.BadOption, "noise_std"),
    ]
    assert len(Scan(**good)) == 2
    for change, kind, words in cases:
        with pytest.raises(kind, match=words):
            Scan(**(good | change))


def test_a_scan_knows_its_acceleration_and_its_parts():
    s = scan((9, 12), slices=3, every=2)
    assert s.mask is not None
    assert s.acceleration == pytest.approx(9 * 12 / float(s.mask.sum()))
    part = select(s, slice(1, 3))
    assert torch.equal(part.kspace, s.kspace[1:])
    with pytest.raises(errors.BadOption, match="none of 3 slices"):
        select(s, slice(3, 5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.kspace = s.kspace  # type: ignore[misc]
