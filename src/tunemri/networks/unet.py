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

__all__ = ["Trunk", "UNet", "as_channels", "as_complex"]


class Trunk(nn.Module):
    """Real channels in, real channels out: two 3×3 convolutions a level, 2×2 max-pooling down, bilinear ×2 up,
    concatenated skips, a last 1×1 convolution. Any image size: zero-padded inside.

    Arguments:
        inputs, outputs: channels.
        width: channels at every level.
        levels: resolutions, each half of the one above.
        batch_norm: batch normalisation after each 3×3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, width: int, *, levels: int = 4, batch_norm: bool = False) -> None:
        super().__init__()
        if min(inputs, outputs, width, levels) < 1:
            raise errors.BadOption(f"found width={width}, levels={levels}, expected at least 1", key="main")
        w = width

        def block(inputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (inputs, w):
                layers += [Conv(channels, w), *([nn.BatchNorm2d(w)] if batch_norm else []), nn.ReLU()]
            return nn.Sequential(*layers)

        self.multiple = 2 ** (levels - 1)
        self.down = nn.ModuleList([block(inputs), *(block(w) for _ in range(levels - 1))])
        self.up = nn.ModuleList([block(2 * w) for _ in range(levels - 1)])
        self.last = Conv(w, outputs, 1)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, inputs, H, W)` → `(B, outputs, H, W)`."""
        h, w = z.shape[-2:]
        z = F.pad(z, (0, -w % self.multiple, 0, -h % self.multiple))
        skips = []
        for level, block in enumerate(self.down):
            z = block(F.max_pool2d(z, 2) if level else z)
            skips.append(z)
        skips.pop()
        for block in self.up:
            z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=True)
            z = block(torch.cat((z, skips.pop()), 1))
        return self.last(z)[..., :h, :w]


class UNet(nn.Module):
    """x̂ = x₀ + U(x₀): post-processing of the zero-filled image.

    Arguments:
        width: channels at every level.
        complex_output: two output channels (real, imaginary) added to x₀; otherwise one real channel added
            to |x₀| (journal form; its image is real).
        batch_norm: batch normalisation after each 3×3 convolution (journal form).
    """

    def __init__(self, width: int = 32, *, complex_output: bool = True, batch_norm: bool = False) -> None:
        super().__init__()
        self.complex_output = complex_output
        self.trunk = Trunk(2, 2 if complex_output else 1, width, batch_norm=batch_norm)

    def forward(self, x0: Tensor, gram: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Complex `(B, H, W)` → complex `(B, H, W)`; `gram` is not used: a U-Net has no physics inside."""
        z = self.trunk(as_channels(x0))
        if self.complex_output:
            return x0 + as_complex(z)
        real = x0.abs() + z[:, 0]
        return torch.complex(real, torch.zeros_like(real))


def as_channels(*images: Tensor) -> Tensor:
    """Complex `(B, H, W)` each → real `(B, 2n, H, W)`, channels last in memory, where convolutions are quickest."""
    return torch.cat([torch.view_as_real(x) for x in images], -1).movedim(-1, 1)


def as_complex(z: Tensor) -> Tensor:
    """Real `(B, 2, H, W)` of any precision → complex `(B, H, W)`."""
    return torch.view_as_complex(z.movedim(1, -1).float().contiguous())
