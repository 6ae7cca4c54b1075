"""Energies of images and their gradients: of white noise of a level and of coloured noise, and the paper's of one temperature.

    E(x, σ) = σ² e(x / σ),    e(u) = ½ ‖U(u)‖²,    ∇E(x, σ) = σ J_Uᵀ(u) U(u) at u = x / σ

U is a smooth residual U-Net without normalisation layers, trained so that x ↦ x − ∇E(x, σ) removes noise of standard
deviation σ. It always meets noise of size one, so it needs to be told no level; and E(a x, a σ) = a² E(x, σ), so no
unit of intensity either.

Related work: S. Hurault, A. Leclaire, N. Papadakis, "Gradient step denoiser for convergent plug-and-play" (2022), for
E = ½‖x − N_σ(x)‖².
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from ..fourier import fft2, ifft2
from .unet import as_channels

__all__ = ["ENERGIES", "Coloured", "Energy", "Homogeneous"]


class _Potential(nn.Module):
    """What has a value for each image: e(u), scaled to E(x, σ) by subclasses, which also say at which u."""

    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E(x, σ), differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E(x, σ) of each image, `(B,)` float64, for σ `(B,)`: standard deviation of complex noise, √E|n|²."""
        return self.energy(x, sigma)

    def value_and_gradient(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E(x, σ) `(B,)` float64, and ∇E = ∂E/∂Re x + i ∂E/∂Im x, of the kind of x.

        Differentiable, where gradients are on, in x and in the weights.
        """
        outside = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if outside and x.requires_grad else x.detach().requires_grad_()
            value = self.energy(x, sigma)
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=outside)
        return (value if outside else value.detach()), slope


class Energy(_Potential):
    """E for complex images `(B, H, W)` of any size.

    Arguments:
        widths: channels at each resolution, each half of the one above.
        blocks: residual blocks at each resolution, on the way down and on the way up.
    """

    def __init__(self, *, widths: Sequence[int] = (32, 64, 96), blocks: int = 1) -> None:
        super().__init__()
        if not widths or min(*widths, blocks) < 1:
            raise errors.BadOption(f"found {list(widths)}, {blocks=}, expected at least 1", key="energy")
        self.multiple = 2 ** (len(widths) - 1)

        def stack(width: int) -> nn.Sequential:
            return nn.Sequential(*(_Block(width) for _ in range(blocks)))

        pairs = list(zip(widths, widths[1:], strict=False))
        self.first = nn.Conv2d(2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(stack(w) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in reversed(pairs))
        self.up = nn.ModuleList(stack(w) for w in reversed(widths[:-1]))
        self.last = nn.Conv2d(widths[0], 2, 3, padding=1)

    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        """σ² e(x / σ)."""
        h, w = x.shape[-2:]
        z = as_channels(x / sigma[:, None, None])
        z = self._features(F.pad(z, (0, -w % self.multiple, 0, -h % self.multiple)))[..., :h, :w]
        return sigma.double().square() * z.square().sum((1, 2, 3), dtype=torch.float64) / 2

    def _features(self, z: Tensor) -> Tensor:
        z = self.first(z)
        skips = []
        for level, block in enumerate(self.down):
            z = block(self.shrink[level - 1](z) if level else z)
            skips.append(z)
        skips.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            z = block(grow(z) + skips.pop())
        return self.last(z)


class Coloured(Energy):
    """E for images with noise that is louder at low frequencies: D(x, σ) = x − S ∇E(x, σ) removes σ S^½ times white noise.

        S(ρ) = 1 + (ρ₀² / (ρ² + ½))ᵅ,    ρ in cycles per field of view

    White noise is a small part of low frequencies, in which images are strong, whatever its level. What removes it never sees an
    image that is wrong there by as much as it is strong, and cannot tell. Under this noise it does.

    Arguments:
        widths, blocks: as of `Energy`.
        corner: ρ₀, and
        power: α.

    Related work: T. Karras, M. Aittala, T. Aila, S. Laine, "Elucidating the design space of diffusion-based generative models"
    (2022), whose noise is white and as loud as the images are strong.
    """

    def __init__(
        self, *, widths: Sequence[int] = (32, 64, 96), blocks: int = 1, corner: float = 6.0, power: float = 1.5
    ) -> None:
        super().__init__(widths=widths, blocks=blocks)
        if not 0 < min(corner, power) <= max(corner, power) < math.inf:
            raise errors.BadOption(f"found {corner=}, {power=}, expected numbers > 0", key="energy")
        self.corner, self.power = float(corner), float(power)

    def colour(self, x: Tensor) -> Tensor:
        """S^½ x."""
        return ifft2((1 + (self.corner**2 / (_squared_frequency(x) + 0.5)) ** self.power).sqrt() * fft2(x))

    def below(self, x: Tensor) -> Tensor:
        """What of x is at lower frequencies than ρ₀, with a soft edge."""
        return ifft2(fft2(x) / (1 + (_squared_frequency(x) / self.corner**2) ** 4))


def _squared_frequency(x: Tensor) -> Tensor:
    """ρ² for each sample of images `(*, H, W)`; of those that are not square in cycles per side of a square of as many pixels."""
    h, w = x.shape[-2:]  # an image that is turned then has the same noise
    rows, columns = (math.sqrt(h * w) / n * (torch.arange(n, device=x.device) - n // 2) for n in (h, w))
    return (rows[:, None].square() + columns.square()).to(x.real.dtype)


class _Block(nn.Module):
    """z + W₂ s(W₁ z), s(h) = h / (1 + e⁻ʰ): smooth, so ∇E is Lipschitz and a line search has a theory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.outer(F.silu(self.inner(z)))


class Homogeneous(_Potential):
    """The paper's energy R of real images of one size, p ∝ exp(−R/T), as E(x, σ) = σ² R(|x|) / 2T.

    Six stages of a 3×3 convolution and one with stride 2, each with a leaky rectifier, and a last convolution that
    takes all that is left; no bias, so R(a u) = a R(u) for a ≥ 0, R(0) = 0 and ⟨∇R(u), u⟩ = R(u). With the arguments
    as they are, 21,350,640 weights.

    Arguments:
        size: edge of the images; others are cropped or zero-padded about their centre.
        widths: channels before the first and after each stage.
        slope: of the rectifier below zero.
        temperature: T.

    Source: M. Zach, F. Knoll, T. Pock, "Stable deep MRI reconstruction using generative priors" (2023), and their
    published program, whose widths and missing biases these are.
    """

    def __init__(
        self,
        *,
        size: int = 320,
        widths: Sequence[int] = (48, 48, 144, 240, 432, 768, 1344),
        slope: float = 0.05,
        temperature: float = 0.0075**2 / 2,
    ) -> None:
        super().__init__()
        stages = len(widths) - 1
        if stages < 1 or min(widths) < 1 or size % 2**stages or size < 2**stages or not 0 < temperature < 1:
            raise errors.BadOption(
                f"found {size=}, {list(widths)}, {temperature=}, expected a size that {2 ** max(stages, 0)} divides",
                key="energy",
            )
        self.size, self.slope, self.temperature = size, slope, temperature
        layers = []
        for k in range(stages):
            layers.append(nn.Conv2d(widths[k] if k else 1, widths[k], 3, padding=1, bias=False))
            layers.append(nn.Conv2d(widths[k], widths[k + 1], 3, stride=2, padding=1, bias=False))
        self.layers = nn.ModuleList(layers)
        self.last = nn.Conv2d(widths[-1], 1, size // 2**stages, bias=False)
        for layer in (*layers, self.last):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight[0].numel()))

    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        """σ² R(|x|) / 2T."""
        h, w = x.shape[-2:]
        rows, columns = self.size - h, self.size - w
        u = F.pad(x.abs(), (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return sigma.double().square() * self.raw(u) / (2 * self.temperature)

    def raw(self, u: Tensor) -> Tensor:
        """R(u) `(B,)` float64 of real images `(B, size, size)`, in the paper's units."""
        z = u[:, None]
        for layer in self.layers:
            z = F.leaky_relu(layer(z), self.slope)
        return self.last(z)[:, 0, 0, 0].double().abs()


ENERGIES: dict[str, type[_Potential]] = {"unet": Energy, "paper": Homogeneous}
