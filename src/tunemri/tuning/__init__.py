"""The settings worth looking at, with or without ground truth.

    choose       one setting (or a few) of a scan: by held-out k-space, noise level, SURE, a reference, or diversity
    adapt        the task weight of a trained model, from a few scans; and whether that pays
    fit_weight   the weight of a prior as a function of the scan, from scans whose truth is known; and whether that pays
    diversify    k good images that differ most                range_basis  every setting of a dial from a dozen images
    sensitivity  what a small turn of a dial changes           range_map    what its whole range changes
    equal_steps  sliders whose steps change equally much       step_sizes   how equally they do

All but `adapt` and `fit_weight` work with every method, for they only turn dials. Whatever is drawn at random is the same
for all settings of a scan, so that scores differ by the setting alone.
"""

from .adapting import Adaptation, adapt
from .basis import RangeBasis, range_basis
from .choosing import Choice, choose, diversify
from .criteria import CRITERIA, estimate_noise
from .dials import Sensitivity, equal_steps, range_map, sensitivity, step_sizes
from .regression import WeightFit, fit_weight

__all__ = [
    "CRITERIA",
    "Adaptation",
    "Choice",
    "RangeBasis",
    "Sensitivity",
    "WeightFit",
    "adapt",
    "choose",
    "diversify",
    "equal_steps",
    "estimate_noise",
    "fit_weight",
    "range_basis",
    "range_map",
    "sensitivity",
    "step_sizes",
]
