"""What every test may use: one thread, no surprises from the machine, the shared real scans where they exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("tunemri", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tunemri")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Weights that a test initialises without a generator are the same in every run, alone or in parallel."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    assert torch.is_grad_enabled(), "a test left gradients switched off"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real scans: TUNEMRI_DATA, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("TUNEMRI_DATA", ROOT.parent / "shared/data"))
    if not (folder / "train").is_dir():
        pytest.skip(f"no real scans at {folder}: set TUNEMRI_DATA to their folder")
    return folder
