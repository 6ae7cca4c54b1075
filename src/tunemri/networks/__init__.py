"""Networks: weights only, tensors (and callables on tensors) in and out; none of them knows a Scan.

A main network is called `net(x0, gram)`: `x0 = Aᴴy` complex `(B, H, W)`, `gram` the map x ↦ AᴴAx.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import errors
from .hypernet import HyperNetwork, apply_batched
from .unet import UNet
from .unrolled import Unrolled

__all__ = ["NETWORKS", "HyperNetwork", "UNet", "Unrolled", "apply_batched", "build"]

NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "unrolled": Unrolled,
}


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The main network that `spec` describes: its `name` in NETWORKS and the constructor's arguments.

    Raises:
        BadOption: an unknown network or argument.
    """
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise errors.BadOption(f"found {name!r}", key="main.name", help=errors.did_you_mean(str(name), NETWORKS))
    try:
        return NETWORKS[name](**arguments)
    except TypeError as error:
        raise errors.BadOption(str(error), key="main") from error
