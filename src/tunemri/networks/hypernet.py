"""A hypernetwork: from dial settings to the weights of any main network, one set per sample.

Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Computing Multiple Image Reconstructions with a Single
Hypernetwork" (2022); residual form with constant-norm inputs after J. J. Ortiz, J. Guttag, A. V. Dalca,
"Magnitude Invariant Parametrizations Improve Hypernetwork Learning" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .. import errors
from .conv import Conv

__all__ = ["BACKENDS", "HyperNetwork", "apply_batched", "generated_names"]

BACKENDS = ("auto", "loop", "grouped", "vmap")


def generated_names(main: nn.Module) -> list[str]:
    """The parameters of `main` that a hypernetwork generates: all but those of normalisation layers."""
    shared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in main.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    return [name for name, _ in main.named_parameters() if name not in shared]


class HyperNetwork(nn.Module):
    """θ(v) = W e(v) + b, with e a small fully connected network of the K settings v.

    With `residual`, b starts as the main network's own initialisation θ₀ and W small, so that training begins
    at a sound network and learns how it depends on v; each setting enters as (cos πv/2, sin πv/2), whose norm
    does not depend on v, and e is normalised to a fixed size: rectified units, as in the papers, died within a few
    hundred steps at our learning rates and took the dial's whole effect with them. Without `residual`, everything is
    as in the journal paper's code.

    Arguments:
        main: the network whose parameters are generated; only their names and shapes (and θ₀) are used.
        inputs: K, the number of settings.
        widths: sizes of the layers of e; the last is the dimension of the curve (or surface) of weights.
        residual: see above.
        direct: append the settings themselves, 2v − 1, to e. A learned e may settle where it hardly depends on v, and
            W then has nothing to go by; this part always does.
    """

    def __init__(
        self, main: nn.Module, inputs: int, widths: Sequence[int], *, residual: bool = True, direct: bool = False
    ) -> None:
        super().__init__()
        if inputs < 1 or not widths or min(widths) < 1:
            raise errors.BadOption(
                f"found inputs={inputs}, widths={list(widths)}, expected positive sizes", key="hypernet"
            )
        parameters = dict(main.named_parameters())
        self.shapes = {name: parameters[name].shape for name in generated_names(main)}
        self.residual, self.direct = residual, direct
        sizes = [2 * inputs if residual else inputs, *widths]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.SiLU() if residual else nn.LeakyReLU(0.01)]
        if residual:
            layers[-1] = nn.LayerNorm(sizes[-1], elementwise_affine=False)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1] + inputs * direct, sum(shape.numel() for shape in self.shapes.values()))
        if residual:
            with torch.no_grad():
                theta0 = [parameters[name].detach().flatten() for name in self.shapes]
                self.head.bias.copy_(torch.cat(theta0))
                # A tenth of each tensor's own spread, shared between the entries of e.
                spread = torch.cat([t.std(correction=0).clamp(min=1e-3).expand_as(t) for t in theta0])
                self.head.weight.normal_().mul_(0.1 * spread[:, None] * math.sqrt(sizes[-1]))
                for layer in layers:
                    if isinstance(layer, nn.Linear):
                        nn.init.kaiming_normal_(layer.weight)
                        nn.init.zeros_(layer.bias)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at trained weights of the main network, and at a hundredth of their spread around them.

        Raises:
            WrongModel: names or shapes differ; or this is not the residual form.
        """
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if not self.residual or found != {name: tuple(shape) for name, shape in self.shapes.items()}:
            raise errors.WrongModel(
                "these weights are not those of the main network of a residual hypernetwork", key="start"
            )
        with torch.no_grad():
            theta0 = [weights[name].flatten() for name in self.shapes]
            self.head.bias.copy_(torch.cat(theta0))
            spread = torch.cat([t.std(correction=0).clamp(min=1e-3).expand_as(t) for t in theta0])
            self.head.weight.normal_().mul_(0.01 * spread[:, None] * math.sqrt(self.head.in_features))

    def forward(self, settings: Tensor) -> dict[str, Tensor]:
        """Settings `(B, K)` in [0, 1] → parameter name → `(B, *shape)`."""
        features = settings
        if self.residual:
            angle = settings * (math.pi / 2)
            features = torch.cat((angle.cos(), angle.sin()), -1)
        # Weights keep full precision where training runs the convolutions in half.
        with torch.autocast(settings.device.type, enabled=False):
            embedding = self.body(features)
            if self.residual:
                # Σ|e_k| ≈ 1: one step of Adam then moves θ through W about as far as through b, whatever the width of e.
                embedding = embedding / embedding.shape[1]
            if self.direct:
                embedding = torch.cat((embedding, 2 * settings - 1), 1)
            flat = self.head(embedding)
        pieces = flat.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: piece.reshape(-1, *shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


def apply_batched(
    net: nn.Module,
    weights: Mapping[str, Tensor],
    x0: Tensor,
    gram: Callable[[int | None], Callable[[Tensor], Tensor]],
    *,
    backend: str = "auto",
) -> Tensor:
    """Run `net(x0, gram)` with its own set of weights for each sample.

    Arguments:
        net: main network; parameters not in `weights` are its own.
        weights: name → `(B, *shape)`, or `(1, *shape)` for one set shared by the batch (plain convolutions).
        x0: complex `(B, H, W)`.
        gram: `gram(b)` is x ↦ AᴴAx for sample b alone, `gram(None)` for the whole batch.
        backend: "loop" over samples; "grouped", one grouped convolution a layer (networks built of `Conv`);
            "vmap", for networks that ignore `gram`; "auto", the quickest by size and device: a loop on CPU
            from 96² pixels (measured: hyperrecon design notes §8), grouped below and on a GPU.

    Raises:
        BadOption: an unknown backend, or one that this network does not allow.
    """
    if backend not in BACKENDS:
        raise errors.BadOption(f"found {backend!r}", key="backend", help=errors.did_you_mean(backend, BACKENDS))
    sets = next(iter(weights.values())).shape[0]
    if sets == 1:
        return functional_call(net, {k: v[0] for k, v in weights.items()}, (x0, gram(None)))
    if sets != x0.shape[0]:
        raise errors.InconsistentShapes(
            f"{sets} weight sets for {x0.shape[0]} samples, expected 1 or as many", key="dials"
        )
    mixes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()) and net.training
    owners = (net.get_submodule(name.rpartition(".")[0]) for name in weights)
    groupable = all(isinstance(m, Conv) or getattr(m, "takes_batched_weights", False) for m in owners)
    if backend == "auto":
        big = x0.shape[-1] * x0.shape[-2] >= 96 * 96 and x0.device.type == "cpu"
        backend = "grouped" if groupable and (mixes or not big) else "loop"
    if backend == "grouped":
        if not groupable:
            raise errors.BadOption("this network has layers other than tunemri's Conv", key="backend", help="use loop")
        return functional_call(net, dict(weights), (x0, gram(None)))
    if mixes:
        raise errors.BadOption(f"{backend} would normalise each sample by itself", key="backend", help="use grouped")
    if backend == "vmap":

        def one(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(net, parameters, (image[None],))[0]

        return vmap(one)(dict(weights), x0)
    return torch.cat(
        [functional_call(net, {k: v[b] for k, v in weights.items()}, (x0[b : b + 1], gram(b))) for b in range(sets)]
    )
