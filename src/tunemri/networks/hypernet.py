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

__all__ = ["BACKENDS", "FORMS", "HyperNetwork", "apply_batched", "generated_names"]

BACKENDS = ("auto", "loop", "grouped", "vmap")
FORMS = ("full", "last", "anchors", "film", "rank4")
LAST = 10  # tensors that the form "last" generates: five convolutions with their biases
RANK = 4
_GAIN = 0.1


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
    """θ(v) from K settings v: with e a small fully connected network of them,

        full     θ = W e(v) + b                                  every weight follows the settings
        last     the same for the last `LAST` tensors only, the others are shared
        anchors  θ = Σ_k v_k θ_k                                 one set of weights per setting, mixed
        film     θ = θ₀ (1 + γ) in each output channel, biases β added,     (γ, β) = W e(v)
        rank4    θ = θ₀ + U diag(c) V for each kernel, biases β added,      (c, β) = W e(v)

    With `residual`, b (or θ₀) starts as the main network's own initialisation and W small, so that training begins
    at a sound network and learns how it depends on v. Each setting enters e as (cos πv/2, sin πv/2), whose norm does not
    depend on v; e is normalised to a fixed size (rectified units, as in the papers, died within a few hundred steps at our
    learning rates and took the dial's whole effect with them) and followed by the settings themselves, 2v − 1: a learned
    e may settle where it hardly depends on v, and W then has nothing else to go by. Without `residual`, everything is as
    in the journal paper's code.

    Arguments:
        main: the network whose parameters are generated; only their names and shapes (and θ₀) are used.
        inputs: K, the number of settings.
        widths: sizes of the layers of e; the last is the dimension of the curve (or surface) of weights.
        residual: see above; every form but "full" is residual.
        form: see above.

    Source of the other forms: A. Dosovitskiy, J. Djolonga, "You Only Train Once: Loss-Conditional Training of Deep Networks"
    (2020) for film; X. Wang et al., "Deep Network Interpolation for Continuous Imagery Effect Transition" (2019) for anchors.
    """

    def __init__(
        self, main: nn.Module, inputs: int, widths: Sequence[int], *, residual: bool = True, form: str = "full"
    ) -> None:
        super().__init__()
        if inputs < 1 or not widths or min(widths) < 1:
            raise errors.BadOption(
                f"found inputs={inputs}, widths={list(widths)}, expected positive sizes", key="hypernet"
            )
        if form not in FORMS:
            raise errors.BadOption(f"found {form!r}", key="form", help=errors.did_you_mean(form, FORMS))
        if form != "full" and not residual:
            raise errors.BadOption(f"{form} is residual by construction", key="residual")
        parameters = dict(main.named_parameters())
        self.shapes = {name: parameters[name].shape for name in generated_names(main)}
        self.inputs, self.residual, self.form = inputs, residual, form
        sizes = [2 * inputs if residual else inputs, *widths]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.SiLU() if residual else nn.LeakyReLU(0.01)]
        if residual:
            layers[-1] = nn.LayerNorm(sizes[-1], elementwise_affine=False)
        count = sum(shape.numel() for shape in self.shapes.values())
        if form == "anchors":
            self.anchors = nn.Parameter(torch.empty(inputs, count))
        else:
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(sizes[-1] + inputs * residual, sum(self._codes().values()))
        if form not in ("full", "anchors"):
            self.base = nn.Parameter(torch.empty(count))
        if form == "rank4":
            kernels = {name: shape for name, shape in self.shapes.items() if len(shape) > 1}
            self.factors = nn.ParameterDict(
                {name.replace(".", "/"): torch.randn(RANK, s[0] + s[1:].numel()) for name, s in kernels.items()}
            )
        if residual:
            with torch.no_grad():
                self._begin({name: parameters[name].detach() for name in self.shapes}, 0.1)
                for layer in layers if form != "anchors" else ():
                    if isinstance(layer, nn.Linear):
                        nn.init.kaiming_normal_(layer.weight)
                        nn.init.zeros_(layer.bias)

    def _codes(self) -> dict[str, int]:
        """How many numbers are generated for each tensor."""
        last = set(list(self.shapes)[-LAST:])
        size: dict[str, Callable[[str, torch.Size], int]] = {
            "full": lambda name, shape: shape.numel(),
            "last": lambda name, shape: shape.numel() if name in last else 0,
            "film": lambda name, shape: shape[0] if shape else 1,
            "rank4": lambda name, shape: RANK if len(shape) > 1 else shape.numel(),
        }
        return {name: size[self.form](name, shape) for name, shape in self.shapes.items()}

    def _begin(self, weights: Mapping[str, Tensor], share: float) -> None:
        """Start at `weights`, and at a `share` of each tensor's own spread around them."""
        theta0 = torch.cat([weights[name].flatten() for name in self.shapes])
        spreads = {name: weights[name].std(correction=0).clamp(min=1e-3) for name in self.shapes}
        if self.form == "anchors":
            spread = torch.cat([spreads[name].expand(shape.numel()) for name, shape in self.shapes.items()])
            self.anchors.copy_(theta0 + share * spread * torch.randn_like(self.anchors))
            return
        (self.head.bias if self.form == "full" else self.base).copy_(theta0)
        if self.form != "full":
            self.head.bias.zero_()
        # Codes of kernels are relative in the two light forms.
        relative = self.form in ("film", "rank4")
        spread = torch.cat(
            [
                (torch.ones(()) if relative and len(self.shapes[name]) > 1 else spreads[name]).expand(size)
                for name, size in self._codes().items()
            ]
        )
        # Shared between the inputs of W: those of e are about 1 / width in size, the settings themselves about _GAIN.
        width = self.head.in_features - self.inputs
        sizes = torch.tensor([math.sqrt(width)] * width + [1 / (_GAIN * math.sqrt(self.inputs))] * self.inputs)
        self.head.weight.normal_().mul_(share * spread[:, None] * sizes / math.sqrt(2))
        if self.form == "rank4":
            for name, factor in self.factors.items():
                factor.normal_().mul_((spreads[name.replace("/", ".")] / math.sqrt(RANK)).sqrt())

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
            self._begin({name: value.detach() for name, value in weights.items()}, 0.01)

    def forward(self, settings: Tensor) -> dict[str, Tensor]:
        """Settings `(B, K)` in [0, 1] → parameter name → `(B, *shape)`."""
        # Weights keep full precision where training runs the convolutions in half.
        with torch.autocast(settings.device.type, enabled=False):
            if self.form == "anchors":
                return self._split(settings @ self.anchors)
            features = settings
            if self.residual:
                angle = settings * (math.pi / 2)
                features = torch.cat((angle.cos(), angle.sin()), -1)
            embedding = self.body(features)
            if self.residual:
                # Σ|e_k| ≈ 1: one step of Adam then moves θ through W about as far as through b, whatever the width of e.
                # So with the settings: at full size they pull the ends of the dial apart before the middle is good.
                embedding = torch.cat((embedding / embedding.shape[1], _GAIN * (2 * settings - 1)), 1)
            generated = self.head(embedding)
            if self.form == "full":
                return self._split(generated)
            base = self._split(self.base[None])
            codes = generated.split(list(self._codes().values()), dim=1)
            return {
                name: self._modulated(name, base[name], code) for name, code in zip(self.shapes, codes, strict=True)
            }

    def _modulated(self, name: str, base: Tensor, code: Tensor) -> Tensor:
        """One tensor `(B, *shape)` from its shared value `(1, *shape)` and its codes `(B, n)`."""
        shape, batch = self.shapes[name], code.shape[0]
        if code.shape[1] == 0:
            return base.expand(batch, *shape)
        if self.form == "last" or len(shape) < 2:
            return base + code.reshape(batch, *shape)
        if self.form == "film":
            return base * (1 + code.reshape(batch, -1, *(1 for _ in shape[1:])))
        u, v = self.factors[name.replace(".", "/")].split((shape[0], shape[1:].numel()), dim=1)
        return base + torch.einsum("br,ro,rn->bon", code, u, v).reshape(batch, *shape)

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
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
