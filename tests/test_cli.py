"""The command line end to end: contract of outputs, sidecars, exit codes and error lines."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunemri import cli, methods
from tunemri.masks import MASKS
from tunemri.methods.hyperrecon import HyperRecon
from tunemri.simulate import phantom

LINE = re.compile(
    r"error\[(unreadable_file|missing_key|inconsistent_shapes|non_finite|unsupported_layout|no_data|too_large|unsafe_content"
    r"|bad_option|wrong_model|no_space|no_memory|busy|internal)\]: .+"
)


class Result:
    """What one command did: exit status, standard output, lines of standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.errors = [line for line in err.splitlines() if line.startswith("error[")]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: object) -> Result:
        before = signal.getsignal(signal.SIGTERM)
        words = [str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["tunemri", *words])
        import warnings

        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            cli.main(words)
        signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return go


def shell(*arguments: object, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunemri", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **more,
    )


@pytest.fixture
def image(tmp_path):
    """A volume of two slices with an intensity scale far from one."""
    path = tmp_path / "image.npy"
    np.save(path, torch.stack([phantom((48, 40), seed=s) for s in (1, 2)]).numpy() * 700)
    return path


@pytest.fixture
def scan(run, image):
    assert run("simulate", image, "-o", "scan.h5", "--mask", "poisson", "--acceleration", 3, "--coils", 1).code == 0
    return image.parent / "scan.h5"


@pytest.fixture
def tiny(tmp_path):
    """Weights of a small untrained hypernetwork."""
    torch.manual_seed(0)
    model = HyperRecon(
        main={"name": "unrolled", "stages": 2, "width": 2}, widths=[4, 2], trained={"acceleration": [2, 8]}
    )
    path = tmp_path / "tiny.safetensors"
    methods.save(model, path)
    return path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(result: Result, word: str, *parts: str, code: int = 2) -> None:
    """One error line of the given class, naming what it should."""
    assert result.code == code, result.err
    assert len(result.errors) == 1
    line = result.errors[0]
    assert LINE.fullmatch(line)
    assert len(line) <= 300
    assert line.startswith(f"error[{word}]")
    assert "Traceback" not in result.err
    for part in parts:
        assert part in line


# ---------------------------------------------------------------- help, version, names


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "models", "models hyper-brain --json", "masks", "masks poisson", "info tiny.safetensors"],
)
def test_what_only_tells_is_quick_and_needs_no_torch(words, tmp_path, tiny):
    code = "import sys; from tunemri.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "False"
    assert len(said) > 1


@pytest.mark.parametrize("command", sorted(c.name or c.callback.__name__ for c in cli.app.registered_commands))
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert "Usage" in result.out


def test_no_arguments_is_a_usage_error(run):
    assert run().code == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("recno", "x.h5"), "recon"),
        (("recon", "x.h5", "--st", "lam=1", "-m", "tv", "-o", "y.npy"), "--set"),
        (("recon", "-m", "tv", "-o", "y.npy"), "SCAN"),
        (("masks", "poison"), "poisson"),
        (("methods", "tvv"), "tv"),
        (("models", "nobody"), "nobody"),
    ],
)
def test_what_is_not_known_is_named_with_its_nearest_match(run, arguments, part):
    refused(run(*arguments), "bad_option", part)


@pytest.mark.parametrize("listing", ["methods", "masks", "models"])
def test_listings_as_json(run, listing):
    found = run(listing, "--json").json
    assert found["ok"] is True
    expected = {"methods": set(methods.METHODS), "masks": set(MASKS), "models": set(methods.bundled())}[listing]
    assert set(found[listing]) == expected


def test_a_dial_is_described_from_its_declaration(run):
    dial = run("methods", "tv", "--json").json["methods"]["tv"]["dials"]["lam"]
    assert dial == methods.load("tv").dials["lam"].as_dict()


def test_doctor(run):
    result = run("doctor", "--json")
    assert result.code == 0
    assert result.json["ok"] is True
    assert run("doctor").code == 0


# ---------------------------------------------------------------- simulate and info


@pytest.mark.parametrize("mask", sorted(MASKS))
def test_simulate_any_mask(run, image, mask):
    result = run("simulate", image, "-o", "s.h5", "--mask", mask, "--acceleration", 3, "--coils", 2, "--json")
    assert result.code == 0, result.err
    assert 2 < result.json["acceleration"] < 4.5
    about = run("info", "s.h5", "--json").json
    assert about["coils"] == 2
    assert about["provenance"].startswith("simulated")


def test_simulate_rows_and_columns_differ(run, image):
    for axis in ("rows", "columns"):
        done = run(
            "simulate", image, "-o", f"{axis}.h5", "--mask", "cartesian-random", "--phase-axis", axis, "--coils", 1
        )
        assert done.code == 0, done.err
    import h5py

    masks = []
    for axis in ("rows", "columns"):
        with h5py.File(f"{axis}.h5") as f:
            masks.append(np.broadcast_to(np.asarray(f["mask"]), (48, 40)))
    assert (masks[0] == masks[0][:, :1]).all()
    assert (masks[1] == masks[1][:1]).all()


def test_simulate_is_the_same_for_the_same_seed(run, image):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("simulate", image, "-o", f"{name}.h5", "--mask", "gaussian", "--seed", seed, "--coils", 2)
    a, b, c = (Path(f"{name}.h5").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_simulate_with_a_mask_from_a_file(run, image):
    mask = np.zeros((48, 40), np.uint8)
    mask[::2] = 1
    np.save("mask.npy", mask)
    assert run("simulate", image, "-o", "s.h5", "--mask", "mask.npy", "--coils", 1, "--json").json["acceleration"] == 2
    np.save("mask.npy", mask[:, :30])
    refused(run("simulate", image, "-o", "t.h5", "--mask", "mask.npy"), "inconsistent_shapes", "mask.npy")


def test_simulate_a_slice(run, image):
    assert run("simulate", image, "-o", "s.h5", "--mask", "random", "--slice", "1:2", "--json").json["shape"] == [
        1,
        8,
        48,
        40,
    ]
    refused(run("simulate", image, "-o", "t.h5", "--mask", "random", "--slice", "7"), "bad_option", "slice")


def test_info_of_weights(run, tiny):
    about = run("info", tiny, "--json").json
    assert about["kind"] == "weights"
    assert about["method"] == "hyperrecon"
    assert "ssim" in about["dials"]


# ---------------------------------------------------------------- recon


@pytest.mark.parametrize("model", ["zero-filled", "sense", "tv", "wavelet", "tiny.safetensors"])
def test_recon_with_every_method_in_the_units_of_the_image(run, scan, tiny, image, model):
    result = run("recon", scan, "-m", model, "-o", "out.npy", "--json")
    assert result.code == 0, result.err
    found, truth = np.load("out.npy"), np.load(image)
    assert found.shape == truth.shape
    assert found.dtype == np.complex64
    ratio = np.abs(found).sum() / truth.sum()
    assert 0.5 < ratio < 1.6
    facts = result.json
    assert facts["metrics"]["psnr"] > 10
    sidecar = json.loads(Path("out.npy.json").read_text())
    for key in (
        "command",
        "dials",
        "scale",
        "seed",
        "scan_sha256",
        "model_sha256",
        "tunemri",
        "seconds",
        "acceleration",
        "residual",
        "metrics",
    ):
        assert key in sidecar
    assert sidecar["acceleration"] == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("suffix", ["h5", "npy", "nii", "nii.gz", "cfl", "png"])
def test_recon_into_every_format(run, scan, suffix):
    assert run("recon", scan, "-m", "zero-filled", "-o", f"out.{suffix}").code == 0
    assert Path(f"out.{suffix}").stat().st_size > 0
    assert not list(Path().glob(".tunemri*"))


def test_recon_from_a_sidecar_gives_the_same_bytes(run, scan, tiny):
    first = run("recon", scan, "-m", tiny, "--set", "ssim=0.25", "--slice", "1", "-o", "a.npy")
    assert first.code == 0, first.err
    assert run("recon", scan, "--from", "a.npy.json", "-o", "b.npy").code == 0
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()
    assert json.loads(Path("b.npy.json").read_text())["dials"] == {"ssim": 0.25}


def test_settings_on_the_command_line(run, scan):
    one = run("recon", scan, "-m", "tv:lam=0.01", "-o", "a.npy", "--json")
    two = run("recon", scan, "-m", "tv", "--set", "lam=0.01", "-o", "b.npy", "--json")
    three = run("recon", scan, "-m", "tv", "-o", "c.npy", "--json")
    assert one.json["dials"] == two.json["dials"] == {"lam": 0.01}
    assert one.json["out_sha256"] == two.json["out_sha256"] != three.json["out_sha256"]


def test_reference_from_a_file_or_from_the_scan(run, scan, image):
    own = run("recon", scan, "-m", "zero-filled", "-o", "a.npy", "--json").json["metrics"]
    named = run("recon", scan, "-m", "zero-filled", "--reference", image, "-o", "b.npy", "--json").json["metrics"]
    assert own["psnr"] == pytest.approx(named["psnr"], abs=0.01)
    np.save("other.npy", np.ones((2, 50, 50), np.float32))
    result = run("recon", scan, "-m", "zero-filled", "--reference", "other.npy", "-o", "c.npy")
    refused(result, "inconsistent_shapes", "other.npy")


def test_coil_maps_from_a_file(run, image):
    run("simulate", image, "-o", "multi.h5", "--mask", "poisson", "--coils", 4)
    from tunemri.simulate import coil_maps

    np.save("maps.npy", coil_maps((48, 40), 4, seed=0).numpy())
    true = run("recon", "multi.h5", "-m", "sense", "--csm", "maps.npy", "-o", "a.npy", "--json")
    assert true.code == 0, true.err
    for name in ("low-resolution", "walsh", "espirit"):
        assert run("recon", "multi.h5", "-m", "sense", "--csm", name, "-o", f"{name}.npy", "--json").code == 0
    np.save("maps.npy", coil_maps((48, 40), 3, seed=0).numpy())
    refused(run("recon", "multi.h5", "-m", "sense", "--csm", "maps.npy", "-o", "b.npy"), "inconsistent_shapes", "csm")
    refused(run("recon", "multi.h5", "-m", "sense", "--csm", "wlash", "-o", "b.npy"), "bad_option", "walsh")
    # Maps that are found with the image are not those of another setting.
    refused(run("sweep", "multi.h5", "-m", "sense", "--csm", "joint", "-o", "swept"), "bad_option", "recon")


def test_a_batch_with_bad_scans_does_the_rest(run, scan):
    Path("bad.h5").write_bytes(b"no HDF5")
    Path("good.h5").write_bytes(scan.read_bytes())
    result = run("recon", scan, "bad.h5", "good.h5", "-m", "zero-filled", "-o", "out")
    assert result.code == 1
    assert len(result.errors) == 1
    assert "bad.h5" in result.errors[0]
    summary = json.loads(Path("out/summary.json").read_text())
    assert len(summary["done"]) == 2
    assert [r["class"] for r in summary["refused"]] == ["unreadable_file"]
    alone = run("recon", "good.h5", "-m", "zero-filled", "-o", "alone.h5", "--json").json
    assert alone["out_sha256"] == summary["done"][1]["out_sha256"]


# ---------------------------------------------------------------- refusals leave everything as it was


@pytest.mark.parametrize(
    ("arguments", "word", "code"),
    [
        (("recon", "nothing.h5", "-m", "tv", "-o", "o.npy"), "unreadable_file", 2),
        (("recon", "image.npy", "-m", "tv", "-o", "o.npy"), "unsupported_layout", 2),
        (("recon", "scan.h5", "-m", "tv", "-o", "o.xyz"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "-o", "missing/o.npy"), "bad_option", 3),
        (("recon", "scan.h5", "-m", "tv", "-o", "scan.h5", "--overwrite"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "-o", "image.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tvv", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "hyperrecon", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "--set", "lam=nan", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "--set", "lam=99", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "--set", "lamb=0.1", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "--set", "lam", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tiny.safetensors", "--set", "ssim=1.5", "-o", "o.npy"), "bad_option", 2),
        (("recon", "scan.h5", "-m", "tv", "--device", "cuda", "-o", "o.npy"), "bad_option", 3),
        (("recon", "scan.h5", "-m", "scan.h5", "-o", "o.npy"), "unreadable_file", 2),
        (("recon", "scan.h5", "-m", "evil.safetensors", "-o", "o.npy"), "unsafe_content", 2),
        (("recon", "scan.h5", "--from", "image.npy", "-o", "o.npy"), "unreadable_file", 2),
        (("simulate", "image.npy", "-o", "o.h5", "--mask", "poison"), "bad_option", 2),
        (("simulate", "image.npy", "-o", "o.h5", "--mask", "poisson", "--acceleration", "0.5"), "bad_option", 2),
        (("simulate", "image.npy", "-o", "o.h5", "--mask", "poisson", "--noise", "-1"), "bad_option", 2),
        (("simulate", "image.npy", "-o", "o.h5", "--mask", "poisson", "--coils", "0"), "bad_option", 2),
        (("sweep", "scan.h5", "-m", "tv", "--grid", "lam=1:2", "-o", "d"), "bad_option", 2),
        (("sweep", "scan.h5", "-m", "tv", "--metrics", "psrn", "-o", "d"), "bad_option", 2),
        (("compare", "scan.h5", "-m", "tv", "-o", "o.npy"), "bad_option", 2),
        (("train", "recipe.toml", "-o", "d"), "unreadable_file", 2),
        (("evaluate", "-m", "tv", "--data", "nowhere", "-o", "d"), "unreadable_file", 2),
        (("info", "nothing.h5"), "unreadable_file", 2),
    ],
)
def test_a_refusal_writes_nothing(run, scan, tiny, arguments, word, code):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(scan.parent / "canary"),))

    Path("evil.safetensors").write_bytes(pickle.dumps(Evil()))
    before = everything(scan.parent)
    refused(run(*arguments), word, code=code)
    assert everything(scan.parent) == before
    assert not (scan.parent / "canary").exists()


def test_an_existing_output_needs_overwrite(run, scan):
    Path("out.npy").write_text("precious")
    refused(run("recon", scan, "-m", "tv", "-o", "out.npy"), "bad_option", "--overwrite")
    assert Path("out.npy").read_text() == "precious"
    assert run("recon", scan, "-m", "zero-filled", "-o", "out.npy", "--overwrite").code == 0
    assert np.load("out.npy").shape == (2, 48, 40)


def test_errors_as_json(run, scan):
    result = run("recon", scan, "-m", "tv", "--set", "lam=99", "-o", "o.npy", "--json")
    assert result.json["ok"] is False
    assert result.json["error"]["class"] == "bad_option"
    assert result.json["exit_code"] == result.code == 2


def test_a_bug_of_ours_is_exit_4_with_a_log(run, scan, monkeypatch):
    monkeypatch.setattr(methods.METHODS["zero-filled"], "forward", lambda *a, **k: 1 / 0)
    result = run("recon", scan, "-m", "zero-filled", "-o", "o.npy")
    refused(result, "internal", code=4)
    log = Path(re.search(r"traceback in (\S+\.log)", result.err)[1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()
    assert not Path("o.npy").exists()


def test_control_characters_in_names_are_escaped(run):
    name = "a\nb\x1b[31m.h5"
    Path(name).write_bytes(b"x" * 64)
    result = run("info", name)
    assert len(result.err.splitlines()) == 1
    assert "\x1b" not in result.err


def test_odd_file_names(run, scan):
    for name in ("a b.h5", "ü.h5", "a'b;$(x).h5", "-dash.h5"):
        Path(name).write_bytes(scan.read_bytes())
        assert run("recon", f"./{name}", "-m", "zero-filled", "-o", f"./out {name}").code == 0


def test_a_scan_outside_of_the_training_is_warned_of(run, image, tiny):
    run("simulate", image, "-o", "far.h5", "--mask", "gaussian", "--acceleration", 12, "--coils", 1)
    result = run("recon", "far.h5", "-m", tiny, "-o", "o.npy")
    assert result.code == 0
    assert "warning[wrong_model]" in result.err
    assert "12" in result.err


# ---------------------------------------------------------------- sweep, compare, evaluate, train, demo


def test_sweep(run, scan, tiny):
    result = run("sweep", scan, "-m", tiny, "--grid", "ssim=0:1:3", "-o", "sw", "--json")
    assert result.code == 0, result.err
    assert result.json["settings"] == 3
    table = Path("sw/table.csv").read_text().splitlines()
    assert len(table) == 4
    assert [float(row["dial_ssim"]) for row in result.json["rows"]] == [0, 0.5, 1]
    assert np.load("sw/images.npy").shape == (3, 2, 48, 40)
    assert Path("sw/images-ssim.png").exists()
    refused(run("sweep", scan, "-m", tiny, "-o", "sw"), "bad_option", "--overwrite")


def test_compare(run, scan, tiny):
    result = run("compare", scan, "-m", "zero-filled", "-m", "tv:lam=0.01", "-m", tiny, "-o", "strip.png", "--json")
    assert result.code == 0, result.err
    assert [row["model"] for row in result.json["rows"]] == ["zero-filled", "tv:lam=0.01", str(tiny)]
    assert Path("strip.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_and_its_gate(run, image, tiny):
    folder = Path("images")
    folder.mkdir()
    image.rename(folder / "image.npy")
    common = ("evaluate", "-m", tiny, "--data", folder, "--masks", "poisson:3", "radial:3", "--grid", 2)
    result = run(*common, "-m", "wavelet", "--tune", "-o", "ev", "--json")
    assert result.code == 0, result.err
    # Two images, two masks; the trained model at two settings, the classical one at its best.
    assert len(Path("ev/rows.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    assert "poisson 3×" in Path("ev/table.md").read_text()
    assert Path("ev/report.html").exists()
    assert run(*common, "-o", "ev2", "--fail-under", "psnr=5").code == 0
    failed = run(*common, "-o", "ev3", "--fail-under", "psnr=99")
    assert failed.code == 5
    assert "psnr" in failed.err


def test_evaluate_with_a_spline(run, tmp_path):
    """Every row once more; those without are what they were."""
    Path("images").mkdir()
    common = ("evaluate", "-m", "zero-filled", "-m", "tv", "--data", "images", "--masks", "radial:3", "--noise", 0.05)
    np.save("images/a.npy", phantom((32, 28), seed=0).numpy())
    refused(run(*common, "--spline", "-o", "one"), "no_data", "no other to fit a spline to")
    assert not Path("one").exists()
    np.save("images/b.npy", phantom((32, 28), seed=1).numpy())
    plain, both = run(*common, "-o", "plain", "--json"), run(*common, "--spline", "-o", "both", "--json")
    assert (plain.code, both.code) == (0, 0), both.err
    texts = [Path(f"{name}/rows.csv").read_text(encoding="utf-8") for name in ("plain", "both")]
    rows = [list(csv.DictReader(text.splitlines())) for text in texts]
    names = ["zero-filled", "tv", "zero-filled, spline", "tv, spline"]
    assert [row["model"] for row in rows[0]] == names[:2] * 2
    assert [row["model"] for row in rows[1]] == names[:2] * 2 + names[2:] * 2
    for a, b, c in zip(rows[0], rows[1][:4], rows[1][4:], strict=True):
        assert a["psnr"] == b["psnr"] != c["psnr"]
        assert a["case"] == b["case"] == c["case"]
    assert both.json["means"] == plain.json["means"]
    assert "zero-filled, spline" in Path("both/table.md").read_text(encoding="utf-8")


RECIPE = """
method = "hyperrecon"
[arguments]
main = { name = "unrolled", stages = 1, width = 2 }
widths = [4, 2]
scales = "auto"
[data]
folder = "images"
batch = 2
size = 16
bank = 2
coils = 2
acceleration = [2.0, 3.0]
masks = ["gaussian", "random"]
[training]
steps = 5
warmup = 1
"""


def test_train_then_reconstruct(run, image, scan):
    Path("images").mkdir()
    image.rename("images/image.npy")
    Path("recipe.toml").write_text(RECIPE)
    result = run("train", "recipe.toml", "-o", "runs", "--set", "training.steps=3", "--json")
    assert result.code == 0, result.err
    header = run("info", "runs/model.safetensors", "--json").json
    assert header["recipe"]["training"]["steps"] == 3
    assert header["arguments"]["main"]["width"] == 2
    assert run("recon", scan, "-m", "runs/model.safetensors", "-o", "o.npy").code == 0
    refused(run("train", "recipe.toml", "-o", "runs"), "bad_option", "--resume")
    refused(run("train", "recipe.toml", "-o", "other", "--set", "training.stepz=3"), "bad_option", "steps")
    refused(run("train", "recipe.toml", "-o", "other", "--set", "arguments.width=3"), "bad_option", "width")
    assert not Path("other").exists()


@pytest.mark.parametrize("terms", [("mae", "ssim", "tv"), ("mae", "ssim", "mse", "dc", "tv", "wavelet")], ids=len)
def test_many_terms_are_trained_and_served_in_both_coordinates(terms, run, image, scan):
    Path("images").mkdir()
    image.rename("images/image.npy")
    Path("recipe.toml").write_text(RECIPE)
    result = run(
        "train", "recipe.toml", "-o", "runs", "--set", f"arguments.terms={json.dumps(terms)}", "training.steps=2"
    )
    assert result.code == 0, result.err
    model = "runs/model.safetensors"
    assert list(run("info", model, "--json").json["dials"]) == sorted(terms[1:])
    weights = [k + 1 for k in range(len(terms))]
    asked = [f"w_{name}={w}" for name, w in zip(terms, weights, strict=True)]
    found = run("recon", scan, "-m", model, "--set", *asked, "-o", "w.npy", "--json").json
    shares = [w / sum(weights[: k + 1]) for k, w in enumerate(weights)][1:]
    assert found["dials"] == pytest.approx(dict(zip(terms[1:], shares, strict=True)))
    dials = [f"{name}={value}" for name, value in found["dials"].items()]
    assert run("recon", scan, "-m", model, "--set", *dials, "-o", "d.npy").code == 0
    assert run("recon", scan, "-m", f"{model}:{','.join(asked)}", "-o", "m.npy").code == 0
    assert run("recon", "--from", "w.npy.json", "-o", "f.npy").code == 0
    assert len({Path(f"{name}.npy").read_bytes() for name in "wdmf"}) == 1
    assert run("recon", scan, "-m", model, "-o", "0.npy").code == 0
    assert Path("0.npy").read_bytes() != Path("w.npy").read_bytes()
    refused(run("recon", scan, "-m", model, "--set", asked[-1], "-o", "o.npy"), "bad_option", "w_mae, w_ssim")


def test_training_is_stopped_by_sigterm_and_resumed(tmp_path, image):
    (tmp_path / "images").mkdir()
    image.rename(tmp_path / "images/image.npy")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("steps = 5", "steps = 100000"))
    command = [sys.executable, "-m", "tunemri", "train", "recipe.toml", "-o", "runs"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "runs/lock.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "--resume" in err
    assert (tmp_path / "runs/state.safetensors").exists()
    assert not (tmp_path / "runs/lock.json").exists()


@pytest.mark.skipif("hyper-brain" not in methods.bundled(), reason="no hyper-brain weights in this checkout")
def test_demo_makes_a_whole_report(run):
    result = run("demo", "-o", "demo")
    assert result.code == 0, result.err
    page = Path("demo/report.html").read_text()
    assert page.count("data:image/png") >= 21
    assert "http://" not in page.replace("http://www.w3.org", "")
    for name in ("rows.csv", "dial.png", "methods.png", "curves.png"):
        assert Path("demo", name).stat().st_size > 0
    assert run("info", "demo/scan.h5").code == 0
    refused(run("demo", "-o", "demo"), "bad_option", "--overwrite")


def test_output_into_a_closed_pipe_is_quiet(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m tunemri methods | head -n 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr


def test_a_bart_pair_is_never_overwritten_under_its_other_name(run, scan, tmp_path):
    assert run("convert", scan, "-o", "w_ksp.cfl").code == 0
    before = everything(tmp_path)
    for name in ("w_ksp.hdr", "w_ksp.cfl"):
        refused(run("recon", name, "-m", "sense", "-o", "w_ksp.cfl", "--overwrite"), "bad_option", "same file")
    refused(run("convert", "w_ksp", "-o", "w_ksp.cfl", "--overwrite"), "bad_option", "same file")
    assert everything(tmp_path) == before
    assert run("convert", "w_ksp", "-o", "u.h5").code == 0
    assert (tmp_path / "u.h5.json").is_file()


def test_what_is_said_explicitly_wins_over_the_sidecar(run, image, tmp_path):
    simulated = ("simulate", image, "-o", "many.h5", "--mask", "poisson", "--acceleration", 2, "--coils", 3)
    assert run(*simulated).code == 0
    assert run("recon", "many.h5", "-m", "sense", "--csm", "walsh", "--seed", 3, "-o", "a.npy").code == 0
    assert run("recon", "--from", "a.npy.json", "-o", "b.npy").code == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert run("recon", "--from", "a.npy.json", "--csm", "espirit", "--seed", 0, "-o", "c.npy").code == 0
    said = {name: json.loads((tmp_path / f"{name}.npy.json").read_text()) for name in "bc"}
    assert [(s["csm"], s["seed"]) for s in said.values()] == [("walsh", 3), ("espirit", 0)]


def test_a_batch_that_is_refused_whole_says_so_and_leaves_nothing(run, tmp_path):
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).write_bytes(b"no scan at all")
    before = everything(tmp_path)
    result = run("recon", "a.h5", "b.h5", "-m", "sense", "-o", "out", "--json")
    assert result.code == 2
    assert len(result.json["refused"]) == 2
    assert everything(tmp_path) == before
    assert not (tmp_path / "out").exists()
