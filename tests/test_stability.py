"""A method keeps its head: thresholds on what `benchmarks/stability.py` measures, relative to CG-SENSE in the same run."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from laws import random, relative
from tunemri import cli, formats, methods
from tunemri.errors import TunemriWarning
from tunemri.evaluation import Contestant
from tunemri.masks import MASKS, make_mask
from tunemri.methods import reconstruct
from tunemri.metrics import psnr
from tunemri.scan import Scan
from tunemri.simulate import sample


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measure = benchmark("stability")
SHAPE = (100, 96)  # the least that the networks were trained for
# Good settings for these images; trained models at their own suggestion.
CLASSICAL = {"zero-filled": {}, "sense": {"lam": 0.004}, "tv": {"lam": 0.0007}, "wavelet": {"lam": 0.001}}
# Draws and descents of the generative prior take seconds each: it is judged by the benchmark alone.
NETWORKS = {
    name: card for name, path in methods.bundled().items() if (card := methods.card(path))["method"] != "generative"
}
# Denoising and superresolution are for one kind of mask: they say so of every other, and are judged at their own.
SPECIAL = {
    name: "full" if card["arguments"]["trained"]["acceleration"][1] == 1 else "centre"
    for name, card in NETWORKS.items()
    if card["arguments"]["trained"].get("block")
}
TRAINED = [name for name in NETWORKS if name not in SPECIAL]
every_method = pytest.mark.parametrize("name", [*CLASSICAL, *TRAINED])


@lru_cache
def at(name: str) -> Contestant:
    return Contestant(name=name, model=methods.load(name), dials=CLASSICAL.get(name, {}))


@lru_cache
def image() -> Tensor:
    return measure.resized(sample()[1], SHAPE)


@lru_cache
def scan(family: str = "poisson", noise: float = measure.NOISE) -> tuple[Scan, Tensor]:
    return measure.scan_of(image(), make_mask(family, SHAPE, 4), noise=noise)


@lru_cache
def decibels(name: str, family: str = "poisson", noise: float = measure.NOISE) -> tuple[float, bool]:
    """(PSNR, whether the program warned)."""
    data, truth = scan(family, noise)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x = reconstruct(data, at(name).model, **at(name).dials).image
    return psnr(x.abs(), truth.abs()), any(isinstance(w.message, TunemriWarning) for w in said)


@every_method
def test_more_samples_never_make_it_worse(name):
    """Nested masks: no step loses over 0.3 dB, and with every sample it is no worse than doing nothing.

    But for the weight of CG-SENSE, which darkens the image where it is no longer needed.
    """
    curve = []
    for _, mask in measure.nested(SHAPE, (8, 4, 2, 1)):
        data, truth = measure.scan_of(image(), mask)
        curve.append(psnr(measure.image_of(data, at(name)).abs(), truth.abs()))
    plain = psnr(measure.image_of(data, at("zero-filled")).abs(), truth.abs())
    assert all(b > a - 0.3 for a, b in zip(curve, curve[1:], strict=False)), curve
    assert curve[-1] > plain - (2 if name == "sense" else 0.5), (curve, plain)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_model_for_one_task_does_it_and_refuses_none_silently(name):
    model, truth = methods.load(name), image()
    noise = 0.1 if SPECIAL[name] == "full" else measure.NOISE
    data, _ = measure.scan_of(truth, make_mask(SPECIAL[name], SHAPE, 1 if noise == 0.1 else 4), noise=noise, coils=1)
    found, plain, tv = (
        psnr(reconstruct(data, m, **dials).image.abs(), truth.abs())
        for m, dials in ((model, {}), (methods.load("zero-filled"), {}), (methods.load("tv"), {"lam": noise / 14}))
    )
    assert found > plain + 1 and found > tv - 0.5, (found, plain, tv)
    other = measure.scan_of(truth, make_mask("poisson", SHAPE, 4), coils=1)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reconstruct(other, model)
    assert any("scattered" in str(w.message) for w in said)


def test_nested_masks_are_nested_and_as_dense_as_they_say():
    masks = dict(measure.nested(SHAPE))
    previous = torch.zeros(SHAPE)
    for ratio, mask in masks.items():
        assert float(mask.mean()) == pytest.approx(1 / ratio, abs=1e-3)
        assert bool((mask >= previous).all())
        previous = mask


@every_method
def test_the_axis_of_the_phase_encoding_does_not_matter(name):
    """Rows instead of columns: the same image, turned; a network, which has its habits, loses at most half a dB."""
    data, truth = scan("cartesian-random")
    turned = replace(
        data, image_shape=SHAPE[::-1], kspace=data.kspace.mT.contiguous(), mask=data.mask.expand(-1, -1, *SHAPE).mT.contiguous(),
        csm=data.csm.mT.contiguous(),
    )  # fmt: skip
    x, z = measure.image_of(data, at(name)), measure.image_of(turned, at(name)).mT
    if name in CLASSICAL:
        # Wavelets are shifted at random, the same way in both.
        assert relative(z, x) < (0.02 if name == "wavelet" else 1e-3)
    else:
        assert psnr(z.abs(), truth.abs()) > psnr(x.abs(), truth.abs()) - 0.5


@pytest.mark.parametrize("family", [name for name in MASKS if name != "full"])
@pytest.mark.parametrize("name", TRAINED)
def test_under_every_mask_family_a_network_is_no_worse_than_least_squares_or_says_so(name, family):
    found, warned = decibels(name, family)
    assert warned or found > decibels("sense", family)[0] - 1, found


@pytest.mark.parametrize("name", TRAINED)
def test_noise_beyond_training_is_warned_of_and_noise_within_is_borne(name):
    assert decibels(name, noise=4 * measure.NOISE)[0] > decibels("sense", noise=4 * measure.NOISE)[0] - 1
    if "noise" in at(name).model.trained:
        assert decibels(name, noise=0.2)[1]
        assert not decibels(name)[1]


@pytest.mark.parametrize("name", TRAINED)
def test_of_noise_alone_no_anatomy_is_made(name):
    """Without an object: nothing that looks like the one it knows, and less of the noise than least squares lets through."""
    data, truth = scan()
    nothing = replace(data, kspace=random(tuple(data.kspace.shape), seed=5) * (data.mask != 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TunemriWarning)
        x, plain, least = (measure.image_of(nothing, at(n)).abs() for n in (name, "zero-filled", "sense"))
    likeness = float(torch.corrcoef(torch.stack([x.flatten(), truth.abs().flatten()]))[0, 1])
    print(
        f"{name}: likeness {likeness:.2f}, gain {x.norm() / plain.norm():.2f}, CG-SENSE {least.norm() / plain.norm():.2f}"
    )
    assert abs(likeness) < 0.2
    assert float(x.norm()) < 0.6 * float(least.norm())


@pytest.mark.parametrize("name", TRAINED)
def test_a_dial_turns_without_a_jump(name):
    """Nine settings over its range: no neighbours differ by over 5 %."""
    model = at(name).model
    for dial in (key for key, d in model.dials.items() if not d.choices):
        images = [reconstruct(scan()[0], model, **{dial: model.dials[dial].at(k / 8)}).image for k in range(9)]
        steps = [relative(b, a) for a, b in zip(images, images[1:], strict=False)]
        assert 0 < max(steps) < 0.05, (dial, steps)


@every_method
def test_a_small_disk_keeps_its_contrast(name):
    """15 % of the maximum, radius 2 and 3 pixels: no less of it than with CG-SENSE, no more of it elsewhere."""
    mask = make_mask("poisson", SHAPE, 4)
    for radius, centre in ((2.0, (43, 58)), (3.0, (65, 40))):
        kept, ghost = measure.kept_contrast(image(), mask, at(name), centre, radius)
        expected, elsewhere = measure.kept_contrast(image(), mask, at("sense"), centre, radius)
        if name != "zero-filled":
            assert kept > expected - 0.05
        assert ghost < elsewhere + 0.05


def test_the_disk_is_what_it_says():
    changed, cover = measure.with_disk(image(), (43, 58), 2.0)
    assert float(cover.sum()) == pytest.approx(3.1416 * 4, rel=0.02)
    assert float((changed - image()).max()) == pytest.approx(0.15, rel=1e-5)
    assert float(cover[43, 58]) == 1


@every_method
def test_the_worst_perturbation_found_is_amplified_no_more_than_by_least_squares(name):
    worst, random = measure.gains(scan()[0], at(name), steps=4)
    limit, _ = measure.gains(scan()[0], at("sense"), steps=4)
    print(f"{name}: κ {worst:.2f}, of a random perturbation {random:.2f}; CG-SENSE {limit:.2f}")
    assert random <= worst <= 1.1 * limit
    if name == "zero-filled":
        assert worst < 1.01, "Aᴴ amplifies nothing"


@every_method
def test_the_residual_is_that_of_the_noise_where_the_setting_is_sound(name):
    data, _ = scan()
    out = reconstruct(data, at(name).model, **at(name).dials)
    assert out.residual is not None
    (over,) = out.stats["residual_over_noise"]
    assert over == pytest.approx(measure.misfit(data, at(name)), rel=1e-3)
    if name != "zero-filled":
        assert 0.3 < over < 2


def test_recon_warns_of_an_image_that_does_not_fit_the_noise(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    formats.write("scan.h5", scan()[0])

    def warned(*more: str) -> tuple[str, float]:
        words = ["recon", "scan.h5", "-o", "out.h5", "--overwrite", *more]
        monkeypatch.setattr(sys, "argv", ["tunemri", *words])
        before = signal.getsignal(signal.SIGTERM)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            cli.main(words)
        signal.signal(signal.SIGTERM, before)
        assert not stop.value.code
        return capfd.readouterr().err, json.loads(Path("out.h5.json").read_text())["residual_over_noise"][0]

    said, over = warned("-m", "tv", "--set", "lam=0.001")
    assert said == ""
    assert over < 2
    said, over = warned("-m", "tv", "--set", "lam=0.1")
    assert "times their noise" in said
    assert over > 3


@every_method
def test_another_number_of_threads_moves_the_last_digits_alone(name):
    data, _ = scan()
    one = measure.image_of(data, at(name))
    torch.set_num_threads(2)
    assert relative(measure.image_of(data, at(name)), one) < 1e-4
