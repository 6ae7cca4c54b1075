"""An unrolled gradient scheme with learned steps and memory: data consistency inside the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from .conv import Conv

__all__ = ["Unrolled"]

_FINE = 8  # channels at full resolution


class Unrolled(nn.Module):
    """Learned update and data consistency in turn, for a fixed number of stages, from x_0 = Aᴴy, g_0 = AᴴA x_0 − Aᴴy:

        (u_t, m_{t+1}) = U_t(x_t, g_t, m_t)          what the network has learned
        z_t = x_t − u_t
        g_{t+1} = AᴴA z_t − Aᴴy                      what the data say to it
        x_{t+1} = z_t − μ_t g_{t+1}

    The data have the last word in every stage: with one coil and μ = 1 the samples are met exactly. U_t sees
    the image, the last data gradient and a memory m_t of its own at half resolution (each 2×2 block of pixels
    becomes channels), where it is a small three-level residual network: a quarter of the cost of working
    at full resolution, to which only its last layer returns. Any operator, any image size.

    Related work: K. Hammernik et al., "Learning a variational network for reconstruction of accelerated MRI
    data" (2018); P. Putzky, M. Welling, "Recurrent inference machines for solving inverse problems" (2017).

    Arguments:
        stages: number of steps.
        width: channels at half resolution, which is also the size of the memory; twice that below.
    """

    def __init__(self, *, stages: int = 6, width: int = 16) -> None:
        super().__init__()
        if stages < 1 or width < 1:
            raise errors.BadOption(f"found stages={stages}, width={width}, expected at least 1", key="main")
        self.width = width
        self.steps = nn.Parameter(torch.ones(stages))
        self.stages = nn.ModuleList([_Stage(width) for _ in range(stages)])

    def forward(self, x0: Tensor, gram: Callable[[Tensor], Tensor]) -> Tensor:
        """x₀ = Aᴴy complex `(B, H, W)` and x ↦ AᴴAx → complex image `(B, H, W)`."""
        b, h, w = x0.shape
        margin = (0, -w % 8, 0, -h % 8)
        x, gradient = x0, gram(x0) - x0
        memory = x0.real.new_zeros(b, self.width, (h + margin[3]) // 2, (w + margin[1]) // 2)
        memory = memory.contiguous(memory_format=torch.channels_last)
        # One step per stage, or, with a weight set per sample, one per stage and sample.
        for step, stage in zip(self.steps.movedim(-1, 0), self.stages, strict=True):
            seen = F.pad(torch.cat((torch.view_as_real(x), torch.view_as_real(gradient)), -1).movedim(-1, 1), margin)
            update, memory = stage(seen, memory)
            z = x - torch.view_as_complex(update[..., :h, :w].movedim(1, -1).float().contiguous())
            gradient = gram(z) - x0
            x = z - step.reshape(-1, 1, 1) * gradient
        return x


class _Stage(nn.Module):
    """The learned part of one stage: three levels below full resolution, additive skips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.enter = Conv(16 + w, w)
        self.top = Conv(w, w)
        self.down = Conv(w, 2 * w)
        self.middle = Conv(2 * w, 2 * w)
        self.bottom1 = Conv(2 * w, 2 * w)
        self.bottom2 = Conv(2 * w, 2 * w)
        self.back = Conv(2 * w, 2 * w)
        self.up = Conv(2 * w, w, 1)
        self.leave = Conv(w, w)
        self.spread = Conv(w, 4 * _FINE)
        self.update = Conv(_FINE + 4, 2)
        for module in self.modules():
            if isinstance(module, Conv):
                # torch's own initialisation loses half of the signal at every rectified layer.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        # Start near plain gradient descent: the first images of training would otherwise be noise.
        nn.init.normal_(self.update.weight, std=1e-2)

    def forward(self, seen: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Image and gradient `(B, 4, H, W)`, memory `(B, w, H/2, W/2)` → update `(B, 2, H, W)`, memory."""
        z = F.pixel_unshuffle(seen, 2).contiguous(memory_format=torch.channels_last)
        a = F.relu(self.enter(torch.cat((z, memory), 1)))
        a = a + F.relu(self.top(a))
        b = F.relu(self.down(F.avg_pool2d(a, 2)))
        b = b + F.relu(self.middle(b))
        c = F.relu(self.bottom1(F.avg_pool2d(b, 2)))
        c = c + F.relu(self.bottom2(c))
        b = b + F.interpolate(c, scale_factor=2, mode="nearest")
        b = b + F.relu(self.back(b))
        a = a + F.interpolate(self.up(b), scale_factor=2, mode="nearest")
        a = a + F.relu(self.leave(a))
        # The last layer works at full resolution: without it the four pixels of a block do not fit together.
        fine = F.pixel_shuffle(F.relu(self.spread(a)), 2)
        return self.update(torch.cat((fine, seen), 1)), a
