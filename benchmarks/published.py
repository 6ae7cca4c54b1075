"""Figures that the three founding papers and ISTA-Net+ printed: they stand beside ours on the page of `paper.py`.

All of them are for other data, other masks and other machines than ours. PSNR in dB.

Sources: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Computing multiple image reconstructions with a single hypernetwork"
(2022); M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023); W. Bian, Y. Chen,
X. Ye, Q. Zhang, "An optimization-based meta-learning model for MRI reconstruction with diverse dataset" (2021);
J. Zhang, B. Ghanem, "ISTA-Net" (2018), its released weights run by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["GENERATIVE", "HYPERRECON", "ISTA_NET_PLUS", "META"]

HYPERRECON: list[dict[str, Any]] = [
    {"network": "one U-Net", "training [h]": 4, "parameters": 149_409},
    {"network": "324 U-Nets of the grid", "training [h]": 648, "parameters": "53 M"},
    {"network": "HyperRecon-S", "training [h]": 5, "parameters": 743_533},
    {"network": "HyperRecon-M", "training [h]": 6, "parameters": 4_905_089},
    {"network": "HyperRecon-L", "training [h]": 7, "parameters": 19_208_993},
]
"""Table 1 of the journal paper, brain; inference takes about 0.2 s for all. No PSNR, SSIM or Dice is printed anywhere."""

# Table, mask as `generative.py` calls it → PSNR / 100 NMSE / SSIM of zero-filled, TV, network, MAP, MMSE.
_COLUMNS = ("zero-filled", "TV", "network", "MAP", "MMSE")
_GENERATIVE = {
    1: {
        "random 3×, no centre": "12.93/64.24/.48 20.81/10.22/.73 19.52/12.83/.57 30.87/1.34/.86 32.44/1.02/.90",
        "Cartesian 4×, 8 %": "24.16/5.96/.70 31.47/0.88/.85 34.16/0.44/.89 35.53/0.32/.89 36.17/0.28/.91",
        "spiral 5×": "21.21/10.24/.62 31.25/0.92/.85 27.76/1.90/.78 35.35/0.34/.88 36.21/0.28/.90",
        "radial 6×": "27.02/3.29/.48 32.86/0.64/.71 31.76/0.76/.65 35.04/0.36/.86 35.47/0.33/.89",
    },
    2: {
        "Cartesian 4×, 8 %": "27.19/2.24/.74 31.87/.79/.81 36.92/.24/.92 35.23/.36/.89 35.28/.36/.89",
        "Cartesian 4×, 8 %, swapped": "31.13/.93/.81 33.03/.59/.83 24.72/4.01/.67 36.23/.28/.90 36.01/.30/.90",
        "Cartesian 4×, 4 %": "24.14/4.51/.69 25.81/3.48/.70 32.16/.70/.89 35.33/.35/.89 35.22/.36/.89",
        "radial 11×": "28.76/1.57/.75 32.47/.67/.81 20.56/10.13/.69 34.46/.42/.86 34.16/.45/.86",
        "Gaussian 8×": "32.10/.74/.84 34.14/.45/.85 20.74/9.95/.68 35.35/.34/.88 35.41/.34/.89",
    },
    # Out of distribution the paper gives two of its own estimates, † and *: under MAP and MMSE here.
    3: {
        "Cartesian 4×, 8 %": "26.09/5.35/.68 31.30/1.48/.73 30.00/2.38/.77 30.60/1.95/.73 31.71/1.35/.73",
        "Cartesian 4×, 8 %, swapped": "26.58/5.15/.71 31.56/1.40/.73 28.57/2.90/.71 30.89/2.24/.75 31.65/1.37/.73",
        "Cartesian 4×, 4 %": "24.98/6.65/.65 29.91/2.09/.71 29.12/2.79/.76 29.93/2.92/.73 31.26/1.53/.72",
        "radial 11×": "25.06/7.37/.62 31.15/1.53/.71 26.26/4.97/.69 31.43/1.45/.73 31.36/1.57/.70",
        "Gaussian 8×": "26.75/5.46/.71 31.52/1.42/.75 23.46/9.93/.68 31.87/1.43/.76 32.09/1.25/.75",
    },
}
GENERATIVE: Mapping[int, Mapping[str, Mapping[str, str]]] = {
    table: {
        mask: {name: cell.replace("/", " / ") for name, cell in zip(_COLUMNS, cells.split(), strict=True)}
        for mask, cells in rows.items()
    }
    for table, rows in _GENERATIVE.items()
}
"""Tables 1 and 2 (2: in distribution, 3: out of it): mask → method → "PSNR / 100 NMSE / SSIM"."""

# Ratio in per cent → conventional (mean, sd), meta-learned (mean, sd), learned task weight σ(ω).
META: Mapping[int, Mapping[int, tuple[float, float, float, float, float]]] = {
    1: {
        10: (21.7570, 1.0677, 23.2672, 1.1229, 0.9218), 20: (26.6202, 1.1662, 28.2944, 1.2119, 0.7756),
        30: (29.5034, 1.4446, 31.1417, 1.5866, 0.6501), 40: (31.4672, 1.6390, 32.8238, 1.7039, 0.6447),
    },
    2: {
        15: (24.6573, 1.0244, 26.3494, 1.0102, 0.9429), 25: (28.4156, 1.2361, 30.0764, 1.4645, 0.8482),
        35: (31.5320, 1.5242, 32.1084, 1.6481, 0.6552),
    },
    3: {
        10: (23.0706, 1.2469, 24.0842, 1.3863, 0.9013), 20: (27.0437, 1.0613, 28.9118, 1.0717, 0.8742),
        30: (29.5533, 1.0927, 31.4096, 0.9814, 0.8029), 40: (32.0153, 0.9402, 33.1114, 1.0189, 0.7151),
    },
    4: {
        15: (24.8921, 1.2356, 26.7031, 1.2553, 0.9532), 25: (29.0545, 1.1980, 30.0698, 0.9969, 0.8595),
        35: (31.5201, 1.0021, 32.0683, 0.9204, 0.7388),
    },
    5: {
        10: (20.8867, 1.2999, 22.0434, 1.3555, 0.9361), 20: (22.7954, 1.2819, 24.7162, 1.3919, 0.8320),
        30: (24.2170, 1.2396, 26.4537, 1.3471, 0.6771), 40: (25.3668, 1.3279, 27.5367, 1.4107, 0.6498),
    },
}  # fmt: skip
"""Tables 1 to 5. The seed text prints two rows per ratio without names; the first is taken for the conventional network."""

ISTA_NET_PLUS: Mapping[str, tuple[float, float]] = {
    "10": (34.63, 0.9035), "20": (38.70, 0.9484), "30": (40.97, 0.9639), "40": (42.65, 0.9729), "50": (44.12, 0.9792),
}  # fmt: skip
"""Radial ratio in per cent → PSNR and SSIM, mean over all fifty images of its test set."""
