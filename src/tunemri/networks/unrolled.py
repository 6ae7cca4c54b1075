"""An unrolled scheme of small U-Nets with data consistency in between: physics inside the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import errors
from .unet import Trunk, as_channels, as_complex

__all__ = ["Unrolled"]


class Unrolled(nn.Module):
    """Learned update and data consistency in turn, for a fixed number of stages, from x_0 = Aᴴy, g_0 = AᴴA x_0 − Aᴴy:

        z_t = x_t + U_t(x_t, g_t)              what the network has learned
        g_{t+1} = AᴴA z_t − Aᴴy                what the data say to it
        x_{t+1} = z_t − μ_t g_{t+1}

    U_t is a U-Net of its own, which sees the image and the last data gradient. The data have the last word
    in every stage: with one coil and μ = 1 the samples are met exactly. Any operator, any image size.

    Related work: J. Schlemper et al., "A deep cascade of convolutional neural networks for dynamic MR image
    reconstruction" (2018); A. Sriram et al., "End-to-end variational networks for accelerated MRI
    reconstruction" (2020).

    Arguments:
        stages: number of steps.
        width, levels: of the U-Nets.
        silent: training begins with U_t = 0 and μ_t = ½. Where everything was sampled, as for denoising, μ = 1 undoes
            whatever U_t says: from a loud start training soon finds that way out, and there nothing can be learned.
    """

    takes_batched_weights = True  # `steps` may be `(B, stages)`

    def __init__(self, *, stages: int = 5, width: int = 16, levels: int = 3, silent: bool = False) -> None:
        super().__init__()
        if stages < 1:
            raise errors.BadOption(f"found stages={stages}, expected at least 1", key="main")
        self.steps = nn.Parameter(torch.full((stages,), 0.5 if silent else 1.0))
        trunks = [Trunk(4, 2, width, levels=levels) for _ in range(stages)]
        if silent:
            for trunk in trunks:
                for parameter in trunk.last.parameters():
                    nn.init.zeros_(parameter)
        self.stages = nn.ModuleList(trunks)

    def forward(self, x0: Tensor, gram: Callable[[Tensor], Tensor]) -> Tensor:
        """x₀ = Aᴴy complex `(B, H, W)` and x ↦ AᴴAx → complex image `(B, H, W)`."""
        x, gradient = x0, gram(x0) - x0
        # One step per stage, or, with a weight set per sample, one per stage and sample.
        for step, stage in zip(self.steps.movedim(-1, 0), self.stages, strict=True):
            z = x + as_complex(stage(as_channels(x, gradient)))
            gradient = gram(z) - x0
            x = z - step.reshape(-1, 1, 1) * gradient
        return x
