"""Weights on disk: what is saved comes back to the bit, and what is damaged, foreign or hostile is refused by its name."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from laws import folder_state, scan
from tunemri import errors, methods
from tunemri.methods import METHODS, card, load, reconstruct, save
from tunemri.methods.hyperrecon import HyperRecon, SingleWeight

SMALL = {
    "hyperrecon": {
        "main": {"name": "unrolled", "stages": 2, "width": 4}, "widths": [6, 4], "terms": ["mae", "ssim", "tv"],
        "scales": [0.1, 0.2, 0.3], "trained": {"acceleration": [2.0, 10.0], "coils": 32},
    },
    "single-weight": {"main": {"name": "unet", "width": 4, "batch_norm": True}, "weights": [0.25, 0.75]},
    "meta-learned": {"phases": 2, "tasks": [0.1, 0.5], "features": {"channels": 2}, "proposal": {"width": 4, "levels": 2}},
    "generative": {
        "energy": {"widths": [4, 6]}, "mode": {"levels": 3}, "draws": {"chains": 2, "samples": 2},
    },
}  # fmt: skip
WITH_WEIGHTS = pytest.mark.parametrize("name", SMALL)


def build(name):
    torch.manual_seed(3)
    model = methods.make(name, SMALL[name])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for key, b in model.named_buffers():
        if "running" in key and b.is_floating_point():
            b.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "small.safetensors"
    save(build("hyperrecon"), path, {"data": "phantoms", "steps": 3})
    return path


def header_and_tensors(path):
    with safetensors.safe_open(path, "pt") as f:
        return json.loads(f.metadata()["tunemri"]), safetensors.torch.load_file(path)


def rewrite(path, header, tensors):
    """What another program may write: our header without its checksum."""
    header = {key: value for key, value in header.items() if key != "sha256"}
    safetensors.torch.save_file(tensors, path, {"tunemri": json.dumps(header, sort_keys=True)})


# ------------------------------------------------------------------------------------------------ there and back


def test_every_method_with_weights_is_tested():
    def needs_none(name):
        try:
            load(name)
        except errors.BadOption:
            return False
        return True

    assert {name for name in METHODS if not needs_none(name)} == set(SMALL)


@WITH_WEIGHTS
@pytest.mark.filterwarnings("ignore:the image misses")  # of an untrained network
def test_saved_and_loaded_gives_the_same_image_to_the_bit(name, tmp_path):
    model, s = build(name), scan((24, 27), coils=2, slices=2)
    path = tmp_path / "w.safetensors"
    save(model, path)
    again = load(path)
    assert type(again) is type(model)
    assert not again.training
    assert again.trained == model.trained
    assert again.dials == model.dials
    assert again.state_dict().keys() == model.state_dict().keys()
    settings = {"ssim": 0.3} if "ssim" in model.dials else {}
    assert torch.equal(reconstruct(s, again, **settings).image, reconstruct(s, model, **settings).image)


@WITH_WEIGHTS
def test_saving_what_was_loaded_gives_the_same_bytes(name, tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save(build(name), first, {"seed": 1})
    save(load(first), second, card(first)["recipe"])
    assert first.read_bytes() == second.read_bytes()


def test_the_header_says_it_all(saved):
    header = card(saved)
    assert header["method"] == "hyperrecon"
    assert header["recipe"] == {"data": "phantoms", "steps": 3}
    assert list(header["dials"]) == ["ssim", "tv"]
    assert header["arguments"]["trained"] == SMALL["hyperrecon"]["trained"]


def test_methods_without_weights_are_loaded_by_name():
    for name in METHODS:
        if name not in SMALL:
            assert type(load(name)) is METHODS[name]
    for name in SMALL:
        with pytest.raises(errors.BadOption, match="needs trained weights"):
            load(name)
    with pytest.raises(errors.BadOption, match="did you mean 'wavelet'"):
        load("wavlet")
    with pytest.raises(errors.BadOption, match="did you mean 'sense'"):
        methods.make("sence")
    with pytest.raises(errors.BadOption, match="takes no argument 'width'"):
        methods.make("hyperrecon", {"width": 3})
    with pytest.raises(errors.BadOption, match="needs main, widths"):
        methods.make("hyperrecon")


def test_bundled_models_are_small_and_load():
    for name, path in methods.bundled().items():
        assert path.stat().st_size <= 8e6, name
        header = card(path)
        assert header["recipe"], f"{name} does not say how it was made"
        assert load(name).dials.keys() == header["dials"].keys()


# ------------------------------------------------------------------------------------------------ writing


def test_nothing_is_overwritten_unless_asked(saved):
    before = folder_state(saved.parent)
    with pytest.raises(errors.BadOption, match="exists"):
        save(build("hyperrecon"), saved)
    assert folder_state(saved.parent) == before
    save(build("hyperrecon"), saved, overwrite=True)
    assert card(saved)["recipe"] == {}


def test_others_may_read_what_was_saved(saved):
    """safetensors' own save_file leaves a file that only its owner can read."""
    mask = os.umask(0o022)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~mask


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = build("hyperrecon")
    with torch.no_grad():
        model.hypernet.head.bias[5] = float("nan")
    with pytest.raises(errors.NonFinite, match=r"hypernet\.head\.bias"):
        save(model, tmp_path / "w.safetensors")
    assert folder_state(tmp_path) == {}


# ------------------------------------------------------------------------------------------------ refusals


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mknod, (str(self.sentinel),)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("kind", ["pickle", "protocol-0", "torch", "torch-old", "zip"])
def test_a_pickle_is_refused_and_never_run(kind, suffix, tmp_path):
    sentinel, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    trap = {"weights": Trap(sentinel)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif kind == "protocol-0":
        path.write_bytes(pickle.dumps(trap, protocol=0))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("archive/data.pkl", pickle.dumps(trap))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=kind == "torch")
    # The text protocol has no signature that one could know it by; it is refused as unreadable.
    refusal = errors.UnreadableFile if kind == "protocol-0" else errors.UnsafeContent
    with pytest.raises(refusal, match="safetensors"):
        load(path)
    assert not sentinel.exists()


def test_every_cut_is_noticed(saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises((errors.UnreadableFile, errors.NoData), match=r"cut\.safetensors"):
            load(path)


def test_noise_is_not_a_model(tmp_path):
    path = tmp_path / "noise.safetensors"
    for seed in range(5):
        path.write_bytes(bytes(torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(seed)).tolist()))
        with pytest.raises(errors.TunemriError, match=r"noise\.safetensors") as found:
            load(path)
        assert type(found.value) in (errors.UnreadableFile, errors.UnsafeContent, errors.WrongModel)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(errors.UnreadableFile):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(errors.TunemriError):
        load(tmp_path)


def test_safetensors_of_somebody_else(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}, {"tunemri": "{"}, {"tunemri": "[]"}, {"tunemri": "{}"}):
        safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata)
        with pytest.raises(errors.WrongModel, match="tunemri header"):
            load(path)


def test_a_header_from_the_future(saved):
    header, tensors = header_and_tensors(saved)
    rewrite(saved, header | {"format": methods.FORMAT + 1}, tensors)
    with pytest.raises(errors.WrongModel, match="update tunemri"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "hyper-recon"},
        {"method": "tv"},
        {"arguments": {}},
        {"arguments": None},
        {"arguments": {"main": {"name": "unet"}, "widths": [4], "depth": 3}},
        {"arguments": {"main": {"name": "resnet"}, "widths": [4]}},
        {"arguments": {"main": {"name": "unet", "width": -1}, "widths": [4]}},
        {"arguments": {"main": {"name": "unet"}, "widths": "wide"}},
        {"arguments": {"main": 3, "widths": [4]}},
    ],
    ids=str,
)
def test_a_header_that_fits_no_method(saved, change):
    header, tensors = header_and_tensors(saved)
    rewrite(saved, header | change, tensors)
    with pytest.raises(errors.WrongModel, match=r"small\.safetensors"):
        load(saved)


def test_tensors_that_do_not_fit_the_header(saved):
    header, tensors = header_and_tensors(saved)
    rewrite(saved, header, {k: v for k, v in tensors.items() if k != "hypernet.head.bias"})
    with pytest.raises(errors.WrongModel, match=r"1 tensors missing, 0 unexpected, first hypernet\.head\.bias"):
        load(saved)
    rewrite(saved, header, tensors | {"extra": torch.ones(2)})
    with pytest.raises(errors.WrongModel, match="first extra"):
        load(saved)
    rewrite(saved, header, tensors | {"hypernet.head.bias": tensors["hypernet.head.bias"][:-1].clone()})
    with pytest.raises(errors.WrongModel, match=r"hypernet\.head\.bias: found"):
        load(saved)
    for value in (float("nan"), float("inf")):
        bad = tensors["hypernet.head.bias"].clone()
        bad[-1] = value
        rewrite(saved, header, tensors | {"hypernet.head.bias": bad})
        with pytest.raises(errors.NonFinite, match=r"hypernet\.head\.bias"):
            load(saved)


def test_half_precision_weights_load_into_single(saved):
    header, tensors = header_and_tensors(saved)
    rewrite(saved, header, {k: v.half() for k, v in tensors.items()})
    model = load(saved)
    assert isinstance(model, HyperRecon)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


def test_loading_is_indifferent_to_the_state_of_randomness(saved):
    torch.manual_seed(1)
    load(saved)
    first = torch.rand(3)
    model = load(saved)
    assert isinstance(model, HyperRecon)
    assert not isinstance(model, SingleWeight)
    torch.manual_seed(99)
    for key, value in load(saved).state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert bool(first.isfinite().all())
