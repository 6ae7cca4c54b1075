"""tunemri: MRI reconstruction that its user can still tune after training.

    scan = tunemri.read("knee.h5")
    model = tunemri.load("hyper-brain")
    out = tunemri.reconstruct(scan, model, ssim=0.3)

This page is the table of contents. Names are imported on first use, so that `import tunemri` (and the command
line's help) does not load torch.
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

_CONTENTS = {
    # the three nouns, and the way between them
    "Scan": "scan",
    "Reconstruction": "scan",
    "Reconstructor": "methods",
    "Dial": "methods",
    "read": "formats",
    "read_image": "formats",
    "write": "formats",
    "load": "methods",
    "save": "methods",
    "reconstruct": "methods",
    # what there is, by name
    "METHODS": "methods",
    "MASKS": "masks",
    "TRAJECTORIES": "trajectories",
    "METRICS": "metrics",
    "REGULARISERS": "regularisers",
    "TERMS": "losses",
    "READERS": "formats",
    "WRITERS": "formats",
    # making, measuring, training
    "encoding": "operators",
    "make_mask": "masks",
    "simulate": "simulate",
    "sample": "simulate",
    "sweep": "evaluation",
    "evaluate": "evaluation",
    "adapt": "tuning",
    "choose": "tuning",
    "range_basis": "tuning",
    "sensitivity": "tuning",
    "equal_steps": "tuning",
    "fit": "training",
    "bake": "methods.hyperrecon",
    "view": "viewer",
    "TunemriError": "errors",
}

__all__ = ["__version__", *_CONTENTS]


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"module 'tunemri' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_CONTENTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Contents(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule binds its name here; where a function shares it (`simulate`), the function stays.
        if not (name in _CONTENTS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Contents
