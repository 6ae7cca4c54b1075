"""The public surface: what `tunemri` offers, that it comes on first use, and that help needs no torch."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import tunemri

CONTENTS = [name for name in tunemri.__all__ if name != "__version__"]


def python(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def test_the_table_of_contents_is_exactly_this():
    """A public name is a promise: adding or dropping one is a decision, made here and in the CHANGELOG."""
    assert sorted(CONTENTS) == sorted(
        """Dial MASKS METHODS METRICS READERS REGULARISERS Reconstruction Reconstructor Scan TERMS TRAJECTORIES
        TunemriError WRITERS adapt bake choose encoding equal_steps evaluate fit load make_mask range_basis read read_image
        reconstruct sample save sensitivity simulate sweep view write""".split()
    )


@pytest.mark.parametrize("name", CONTENTS)
def test_every_name_is_there_and_documented(name):
    value = getattr(tunemri, name)
    assert value is not None
    if not name.isupper():
        assert callable(value)
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_names_stay_what_they_are_after_their_module_is_imported():
    """`tunemri.simulate` is the function, though a module has the same name."""
    assert (
        python(
            "-c", "import tunemri, tunemri.simulate as m; assert callable(tunemri.simulate), tunemri.simulate"
        ).returncode
        == 0
    )
    assert (
        python("-c", "import tunemri; tunemri.read; tunemri.sample; assert callable(tunemri.simulate)").returncode == 0
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'reconstrukt'"):
        _ = tunemri.reconstrukt
    assert set(CONTENTS) <= set(dir(tunemri))


@pytest.mark.parametrize("module", sorted(m.name for m in pkgutil.walk_packages(tunemri.__path__, "tunemri.")))
def test_every_promised_name_of_every_module_exists(module):
    if module.endswith("__main__"):
        return
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        assert hasattr(loaded, name), f"{module}.__all__ promises {name}"


def test_one_version():
    assert version("tunemri") == tunemri.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([.+-]\w+)*", tunemri.__version__)


HEAVY = ("torch", "numpy", "scipy", "h5py", "nibabel", "matplotlib", "PIL")


@pytest.mark.parametrize(
    "lines",
    [
        "import tunemri",
        "import tunemri; tunemri.__version__; dir(tunemri); tunemri.TunemriError",
        "import sys; sys.argv = ['tunemri', '--help']; import runpy; run()",
        "import sys; sys.argv = ['tunemri', '--version']; import runpy; run()",
        "import sys; sys.argv = ['tunemri', 'recon', '--help']; import runpy; run()",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(lines):
    run = """
def run():
    try:
        runpy.run_module('tunemri', run_name='__main__')
    except SystemExit as end:
        assert not end.code, end.code
"""
    done = python(
        "-W", "error", "-c", f"{run}\n{lines}\nimport sys\nprint('loaded', *[m for m in {HEAVY} if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded"], done.stdout.splitlines()[-1]


def test_the_command_says_its_version():
    done = python("-m", "tunemri", "--version")
    assert done.returncode == 0
    assert tunemri.__version__ in done.stdout
    assert done.stderr == ""
