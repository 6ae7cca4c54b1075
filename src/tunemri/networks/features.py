"""A learned feature map g and the smoothed l2,1 norm of what it finds, with the gradient in closed form.

    r_ε(x) = Σ_j (√(‖g_j(x)‖² + ε²) − ε),    ∇r_ε(x) = J_g(x)ᵀ q,    q_j = g_j / √(‖g_j‖² + ε²)

j runs over pixels, the inner norm over the channels there. J_gᵀ is the same convolutions transposed, in reverse order.

Source: W. Bian, Y. Chen, X. Ye, Q. Zhang, "An Optimization-Based Meta-Learning Model for MRI Reconstruction with
Diverse Dataset" (2021); constants and corrections are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from .unet import as_channels

__all__ = ["ACTIVATIONS", "Features"]


def _smoothed_relu(h: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """A rectifier whose corner is a parabola of half-width δ, and its derivative: once differentiable."""
    slope = (h / (2 * delta) + 0.5).clamp(0, 1)
    return delta * slope.square() + F.relu(h - delta), slope


def _squareplus(h: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(h + √(h² + 4δ²)) / 2 and its derivative: smooth to every order, and cheaper than softplus."""
    squares = h.square() + 4 * delta**2
    inverse = squares.rsqrt()  # divisions take ten times as long as products
    return (h + squares * inverse) / 2, (1 + h * inverse) / 2


# Name → (h, δ) ↦ (s(h), s'(h)), and the Lipschitz constant of s' times δ. Both are non-expansive.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float], tuple[Tensor, Tensor]], float]] = {
    "smoothed-relu": (_smoothed_relu, 1 / 2),
    "squareplus": (_squareplus, 1 / 4),
}


class Features(nn.Module):
    """g = W_L ∗ s(… s(W_1 ∗ x)): complex 3×3 convolutions without bias, s on real and imaginary parts apart.

    Arguments:
        channels: complex kernels of each layer.
        layers: number of convolutions, two or more.
        activation: "smoothed-relu", as in the paper; or "squareplus", for which all second derivatives exist.
        delta: width of the corner of s.
        spread: layer l looks `spread`^l pixels far; with 2, three layers see 15×15 pixels instead of 7×7.
        last: size of the last layer's first weights, over Xavier's. Small, or the regulariser outweighs the data.
    """

    def __init__(
        self,
        *,
        channels: int = 4,
        layers: int = 3,
        activation: str = "squareplus",
        delta: float = 0.01,
        spread: int = 1,
        last: float = 0.03,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise errors.BadOption(
                f"found {activation!r}", key="features.activation", help=errors.did_you_mean(activation, ACTIVATIONS)
            )
        if channels < 1 or layers < 2 or delta <= 0 or spread < 1:
            found = f"{channels=}, {layers=}, {delta=}, {spread=}"
            raise errors.BadOption(f"found {found}, expected ≥ 1, ≥ 2, > 0, ≥ 1", key="features")
        self.activation, self.delta = activation, delta
        self.reach = [spread**level for level in range(layers)]
        sizes = [1, *[channels] * layers]
        # Real and imaginary parts of the kernels, in one parameter: (2, out, in, 3, 3).
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(2, after, before, 3, 3)) for before, after in zip(sizes, sizes[1:], strict=False)
        )
        for kernel, before, after in zip(self.kernels, sizes, sizes[1:], strict=False):
            # Xavier for complex numbers: half of the variance for each part.
            nn.init.normal_(kernel, std=math.sqrt(1 / (9 * (before + after))))
        with torch.no_grad():
            self.kernels[-1].mul_(last)

    def forward(self, x: Tensor) -> Tensor:
        """Complex `(B, H, W)` → g(x) `(B, 2 channels, H, W)`, real parts first."""
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(x, self._weights())[0]

    def value(self, x: Tensor, epsilon: Tensor) -> Tensor:
        """r_ε(x) of each sample, `(B,)` float64, for ε `(B,)`."""
        return _smoothed_norm(self(x), epsilon)[0]

    def value_and_gradient(self, x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """r_ε(x), `(B,)` float64, and ∇r_ε(x) = ∂r/∂Re x + i ∂r/∂Im x, complex `(B, H, W)`; one pass each way."""
        # In full precision, whatever the rest is trained in: values are compared with each other.
        with torch.autocast(x.device.type, enabled=False):
            weights = self._weights()
            g, slopes = self._forward(x, weights)
            value, root = _smoothed_norm(g, epsilon)
            q = g * (1 / root)
            for weight, reach, slope in zip(weights[:0:-1], self.reach[:0:-1], slopes[::-1], strict=True):
                q = slope * _filtered(q, _transposed(weight), reach)
            q = _filtered(q, _transposed(weights[0]), 1)
        return value, torch.view_as_complex(q.movedim(1, -1).contiguous())

    def lipschitz(self) -> tuple[float, float]:
        """(M, L_J): bounds of ‖J_g(x)‖ and of the Lipschitz constant of J_g, from the norms of the convolutions.

            M = Π_l ‖W_l‖,    L_J = c/δ · M · Σ_l Π_{k≤l} ‖W_k‖     (l < L; c of the activation)

        The norm of a convolution with zero padding is at most the maximum of its transfer function, found on a
        grid of frequencies; between grid points a trigonometric polynomial of degree one is larger by at most 1/cos²(π/n).
        """
        norms = [_largest_gain(weight.detach().double()) for weight in self._weights()]
        upto = [math.prod(norms[:count]) for count in range(1, len(norms) + 1)]
        curvature = ACTIVATIONS[self.activation][1] / self.delta
        return upto[-1], curvature * upto[-1] * sum(upto[:-1])

    def _weights(self) -> list[Tensor]:
        """Each complex convolution as a real one on stacked parts, [[Re, −Im], [Im, Re]]."""
        return [torch.cat((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), 0) for real, imag in self.kernels]

    def _forward(self, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """g(x), and s' at each activation."""
        activate, slopes = ACTIVATIONS[self.activation][0], []
        h = _filtered(as_channels(x), weights[0], 1)
        for weight, reach in zip(weights[1:], self.reach[1:], strict=True):
            h, slope = activate(h, self.delta)
            slopes.append(slope)
            h = _filtered(h, weight, reach)
        return h, slopes


def _smoothed_norm(g: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j (√(‖g_j‖² + ε²) − ε) `(B,)`, summed in double precision, and the root `(B, 1, H, W)`."""
    eps = epsilon.to(g.dtype)[:, None, None, None]
    squares = g.square().sum(1, keepdim=True)
    root = (squares + eps.square()).sqrt()
    # The same as root − ε, without its cancellation.
    return (squares / (root + eps)).sum((1, 2, 3), dtype=torch.float64), root


def _filtered(h: Tensor, weight: Tensor, reach: int) -> Tensor:
    return F.conv2d(h, weight, padding=reach, dilation=reach)


def _transposed(weight: Tensor) -> Tensor:
    """The kernel of the adjoint; three times as fast as `conv_transpose2d` on CPU."""
    return weight.flip(2, 3).transpose(0, 1)


def _largest_gain(weight: Tensor, points: int = 32) -> float:
    """An upper bound of the norm of the convolution with `weight` `(out, in, 3, 3)`, whatever its reach."""
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    wave = torch.polar(torch.ones(points, 3, dtype=torch.float64), angle[:, None] * torch.arange(3))
    transfer = torch.einsum("oiab,ra,cb->rcoi", weight.to(torch.complex128), wave, wave)
    return float(torch.linalg.matrix_norm(transfer, ord=2).max()) / math.cos(math.pi / points) ** 2
