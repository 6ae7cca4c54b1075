"""A convolution that also takes one kernel per sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Conv"]


class Conv(nn.Conv2d):
    """`nn.Conv2d` with zero padding that keeps the size, whose weight may carry a batch axis.

    With `weight` `(B, out, in, k, k)` and `bias` `(B, out)`, put there by `torch.func.functional_call`, sample
    b is filtered with kernel b by one grouped convolution (the form used by Wang, Dalca, Sabuncu).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.ndim == 4:
            return super().forward(input)
        b, c, h, w = input.shape
        assert self.bias is not None
        kernels = self.weight.flatten(0, 1)
        y = F.conv2d(input.reshape(1, b * c, h, w), kernels, self.bias.flatten(), padding=self.padding, groups=b)
        return y.view(b, -1, h, w)
