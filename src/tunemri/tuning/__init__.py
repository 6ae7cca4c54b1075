"""The settings worth looking at, with or without ground truth.

    choose       one setting (or a few) of a scan: by held-out k-space, noise level, SURE, a reference, or diversity
    adapt        the task weight of a trained model, from a few scans; and whether that pays
    diversify    k good images that differ most                range_basis  every setting of a dial from a dozen images
    sensitivity  what a small turn of a dial changes           range_map    what its whole range changes
    equal_steps  sliders whose steps change equally much       step_sizes   how equally they do

All but `adapt` works with every method, for it only turns dials. Whatever is drawn at random is the same for all
settings of a scan, so that scores differ by the setting alone.
"""

from .adapting import Adaptation, adapt
from .basis import RangeBasis, range_basis
from .choosing import Choice, choose, diversify
from .criteria import CRITERIA, estimate_noise
from .dials import Sensitivity, equal_steps, range_map, sensitivity, step_sizes

__all__ = [
    "CRITERIA",
    "Adaptation",
    "Choice",
    "RangeBasis",
    "Sensitivity",
    "adapt",
    "choose",
    "diversify",
    "equal_steps",
    "estimate_noise",
    "range_basis",
    "range_map",
    "sensitivity",
    "step_sizes",
]
