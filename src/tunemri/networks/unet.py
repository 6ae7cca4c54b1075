"""The U-Net of HyperRecon: constant width, four levels, fifteen convolutions.

Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Regularization-Agnostic Compressed Sensing MRI
Reconstruction with Hypernetworks" (2021) and "Computing Multiple Image Reconstructions with a Single
Hypernetwork" (2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from .conv import Conv

__all__ = ["UNet"]


class UNet(nn.Module):
    """x̂ = x₀ + U(x₀): post-processing of the zero-filled image.

    Two 3×3 convolutions a level, 2×2 max-pooling down, bilinear ×2 up, concatenated skips, a last 1×1
    convolution. Any image size: zero-padded to a multiple of eight inside.

    Arguments:
        width: channels at every level.
        complex_output: two output channels (real, imaginary) added to x₀; otherwise one real channel added
            to |x₀| (journal form; its image is real).
        batch_norm: batch normalisation after each 3×3 convolution (journal form).
    """

    def __init__(self, width: int = 32, *, complex_output: bool = True, batch_norm: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise errors.BadOption(f"found {width}, expected at least 1", key="width")
        self.complex_output = complex_output
        w = width

        def block(inputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (inputs, w):
                layers += [Conv(channels, w), *([nn.BatchNorm2d(w)] if batch_norm else []), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList([block(2), block(w), block(w), block(w)])
        self.up = nn.ModuleList([block(2 * w), block(2 * w), block(2 * w)])
        self.last = Conv(w, 2 if complex_output else 1, 1)

    def forward(self, x0: Tensor, gram: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Complex `(B, H, W)` → complex `(B, H, W)`; `gram` is not used: a U-Net has no physics inside."""
        h, w = x0.shape[-2:]
        # Padded with the channels last in memory, where the convolutions are quickest.
        z = F.pad(torch.view_as_real(x0), (0, 0, 0, -w % 8, 0, -h % 8)).movedim(-1, 1)
        skips = []
        for level, block in enumerate(self.down):
            z = block(F.max_pool2d(z, 2) if level else z)
            skips.append(z)
        skips.pop()
        for block in self.up:
            z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=True)
            z = block(torch.cat((z, skips.pop()), 1))
        z = self.last(z)[..., :h, :w]
        if self.complex_output:
            return x0 + torch.view_as_complex(z.movedim(1, -1).contiguous())
        real = x0.abs() + z[:, 0]
        return torch.complex(real, torch.zeros_like(real))
