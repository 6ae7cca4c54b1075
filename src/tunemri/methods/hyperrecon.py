"""HyperRecon: one network answers for every weighting of its training losses.

    min_φ  E_{w, x, y, A}  log Σ_k (w_k / s_k) L_k(f_θ(y, A), x),    θ = h_φ(w),    w on the simplex

The hypernetwork h_φ turns the weights w into the parameters of a main network f; the dials are the user's hold on w.
A network trained for one w alone (`SingleWeight`) is the baseline, and what `bake` returns.

Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Regularization-Agnostic Compressed Sensing MRI Reconstruction
with Hypernetworks" (2021); "Computing Multiple Image Reconstructions with a Single Hypernetwork" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors, losses
from ..networks import HyperNetwork, apply_batched, build
from ..networks.hypernet import generated_names
from ..operators import LinearOperator
from ..scan import Reconstruction
from .base import Dial, Reconstructor, data_residual

__all__ = ["PRESETS", "HyperRecon", "SingleWeight", "bake"]

_JOURNAL_UNET = {"name": "unet", "width": 32, "complex_output": False, "batch_norm": True}

# Constructor arguments by name, `HyperRecon(**PRESETS["journal-s"])`. The parameter counts of the journal's three are the
# published ones; of "conference" that of the main network (its own hypernetwork had batch normalisation and other inputs).
PRESETS: dict[str, dict[str, Any]] = {
    "journal-s": {"main": _JOURNAL_UNET, "widths": [4] * 4, "residual": False},
    "journal-m": {"main": _JOURNAL_UNET, "widths": [32] * 4, "residual": False},
    "journal-l": {"main": _JOURNAL_UNET, "widths": [128] * 4, "residual": False},
    "conference": {"main": {"name": "unet", "width": 64}, "widths": [8, 32], "residual": False},
    "unet": {"main": {"name": "unet", "width": 32}, "widths": [32, 32, 8], "residual": True},
    "default": {"main": {"name": "unrolled", "stages": 6, "width": 16}, "widths": [32, 32, 6], "residual": True},
}


class HyperRecon(Reconstructor):
    """A hypernetwork and its main network.

    Arguments:
        main: the main network, `name` (see `networks.NETWORKS`) and its arguments.
        widths: hidden layers of the hypernetwork.
        residual: θ₀ + Δθ(w) with constant-norm inputs (our default), or the plain form of the papers.
        direct: see `networks.HyperNetwork`.
        terms: names of the loss terms, in the order of w; all but the first become dials.
        scales: s_k, one per term: the loss of a network trained for that term alone (`training.match_scales`);
            or "auto": the size of the term's gradient in the image, relative to that of the first term, as a
            running mean over training, so that equal weights pull equally hard.
        faces: share of training draws on the faces of the simplex.
        backend: how per-sample weights are applied, see `networks.apply_batched`.
        trained: range of settings and scans seen in training, filled in by the recipe.
    """

    scales: Tensor

    def __init__(
        self,
        *,
        main: Mapping[str, Any],
        widths: Sequence[int],
        residual: bool = True,
        direct: bool = False,
        terms: Sequence[str] = ("mae", "ssim"),
        scales: Sequence[float] | str | None = None,
        faces: float = 0.2,
        backend: str = "auto",
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._terms = losses.terms(terms)
        if len(terms) < 2:
            raise errors.BadOption(
                f"found {list(terms)}, expected two or more: with one there is nothing to weigh", key="terms"
            )
        self.names, self.faces, self.backend = tuple(terms), faces, backend
        self.automatic = scales == "auto"
        self.register_buffer("scales", _scales(None if self.automatic else scales, len(terms)))
        network = build(main)
        self.hypernet = HyperNetwork(network, len(terms), widths, residual=residual, direct=direct)
        for name in generated_names(network):
            _make_placeholder(network, name)
        self.main = network
        if self.automatic and list(network.parameters()):
            raise errors.BadOption(
                "a network with batch normalisation needs its own numbers", key="scales", help="one per term, or none"
            )
        self.trained = dict(trained or {})
        self.arguments = {
            "main": dict(main), "widths": list(widths), "residual": residual, "direct": direct, "terms": list(terms),
            "scales": "auto" if self.automatic else None, "faces": faces, "backend": backend, "trained": self.trained,
        }  # fmt: skip

    @property
    def dials(self) -> dict[str, Dial]:
        """One dial per term after the first: its share of the weight, see `losses.weights_from_lambdas`."""
        first = losses.TERMS[self.names[0]]
        later = len(self.names) - 1
        return {
            name: Dial(
                sentence=f"weight of the {losses.TERMS[name].sentence} against {first.sentence}",
                default=0.5 if later == 1 else 1 / (index + 2),
                low=first.high,
                high=losses.TERMS[name].high,
            )
            for index, name in enumerate(self.names[1:])
        }

    def weights(self, batch: int, dials: Mapping[str, float | Tensor]) -> Tensor:
        """Dials by name, a number or `(B,)` each → w `(1 or B, K)`; one row where all are plain numbers."""
        columns = [
            torch.as_tensor(dials.get(name, dial.default), dtype=torch.float32) for name, dial in self.dials.items()
        ]
        rows = max((c.numel() for c in columns), default=1)
        device = self.hypernet.head.bias.device
        return losses.weights_from_lambdas(torch.stack([c.reshape(-1).expand(rows) for c in columns], 1)).to(device)

    def forward(self, y: Tensor, A: LinearOperator, **dials: float | Tensor) -> Reconstruction:
        """Reconstruct at the given dials; a dial may be `(B,)`, one setting per sample."""
        w = self.weights(y.shape[0], dials)
        x = self.image(A.H(y), A, self.hypernet(w))
        used = {name: _plain(dials.get(name, dial.default)) for name, dial in self.dials.items()}
        return Reconstruction(image=x, dials=used, residual=data_residual(x, y, A))

    def image(self, x0: Tensor, A: LinearOperator, theta: Mapping[str, Tensor]) -> Tensor:
        """The main network with weights `theta`, from x₀ = Aᴴy."""
        return apply_batched(self.main, theta, x0, _gram(A), backend=self.backend)

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """Mean over samples of log Σ_k (w_k / s_k) L_k, each sample at its own random w.

        The logarithm leaves the best image of a sample where it is and lets every sample pull alike; without it, the few
        that are nearly hopeless (10× random points) outweigh the many where there is something to learn.

        The backward pass has two stages: each sample is run forward and backward alone and leaves the
        gradient of its generated weights; one backward pass through the hypernetwork then takes them all.
        Same gradient, and the memory of one sample instead of B. A main network with batch
        normalisation couples the samples and takes the ordinary way.
        """
        y, A, x = example.y, example.A, example.target
        batch = y.shape[0]
        w = losses.sample_weights(batch, len(self.names), generator, faces=self.faces).to(y.real.dtype)
        theta = self.hypernet(w.to(self.hypernet.head.bias.device))
        x0 = A.H(y)
        if list(self.main.parameters()):
            values = _term_values(self._terms, self.image(x0, A, theta), x, y, A, theta)
            return _balanced(values, w / self.scales).mean()
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        total = x0.real.new_zeros(())
        gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for b in range(batch):
            own = {name: leaf[b : b + 1] for name, leaf in leaves.items()}
            A_b = A.sample(b)
            x_hat = self.image(x0[b : b + 1], A_b, own)
            truth = None if x is None else x[b : b + 1]
            values = _term_values(self._terms, x_hat, truth, y[b : b + 1], A_b, own)
            if self.automatic and self.training and b == 0:
                self._follow_scales(values[0], x_hat)
            value = _balanced(values, w[b : b + 1] / self.scales).sum() / batch
            found = torch.autograd.grad(value, list(own.values()))
            for name, gradient in zip(own, found, strict=True):
                gradients[name][b] = gradient[0]
            total = total + value.detach()
        surrogate = sum((theta[name] * gradients[name]).sum() for name in theta)
        # Value of the loss, gradient of the surrogate.
        return total + (surrogate - surrogate.detach())

    def _follow_scales(self, values: Tensor, x_hat: Tensor) -> None:
        """Move s_k towards ‖∂L_k/∂x̂‖ / ‖∂L_1/∂x̂‖ of one sample: no pass through the network."""
        sizes = []
        for value in values:
            (gradient,) = torch.autograd.grad(value, x_hat, retain_graph=True, allow_unused=True)
            sizes.append(x_hat.real.new_ones(()) if gradient is None else gradient.abs().square().sum().sqrt())
        ratio = torch.stack(sizes) / sizes[0].clamp(min=1e-12)
        if bool(torch.isfinite(ratio).all()) and bool((ratio > 0).all()):
            # In logarithms: a ratio has no preferred direction.
            self.scales.mul_((ratio.log() - self.scales.log()).mul(0.01).exp())


class SingleWeight(Reconstructor):
    """A main network trained for one weighting of the same loss terms: the baseline without a dial.

    Arguments:
        main, terms, scales, trained: as for `HyperRecon`.
        weights: w, one number per term, ≥ 0 with sum 1.
    """

    scales: Tensor
    weights: Tensor

    def __init__(
        self,
        *,
        main: Mapping[str, Any],
        terms: Sequence[str] = ("mae", "ssim"),
        weights: Sequence[float] = (0.5, 0.5),
        scales: Sequence[float] | None = None,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._terms = losses.terms(terms)
        w = torch.tensor(weights, dtype=torch.float32)
        if w.shape != (len(terms),) or not bool((w >= 0).all()) or abs(float(w.sum()) - 1) > 1e-5:
            raise errors.BadOption(
                f"found {list(weights)}, expected {len(terms)} numbers ≥ 0 with sum 1", key="weights"
            )
        self.register_buffer("scales", _scales(scales, len(terms)))
        self.register_buffer("weights", w)
        self.main = build(main)
        self.trained = dict(trained or {})
        self.arguments = {
            "main": dict(main), "terms": list(terms), "weights": [float(v) for v in weights], "trained": self.trained,
        }  # fmt: skip

    def forward(self, y: Tensor, A: LinearOperator) -> Reconstruction:
        """Reconstruct; no dial."""
        x = self.main(A.H(y), A.gram)
        return Reconstruction(image=x, residual=data_residual(x, y, A))

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """Mean over samples of log Σ_k (w_k / s_k) L_k, as for `HyperRecon`."""
        y, A = example.y, example.A
        weights = {name: p[None].expand(y.shape[0], *p.shape) for name, p in self.main.named_parameters()}
        values = _term_values(self._terms, self.main(A.H(y), A.gram), example.target, y, A, weights)
        return _balanced(values, self.weights / self.scales).mean()


def bake(model: HyperRecon, **dials: float) -> SingleWeight:
    """One setting as a plain network: same images, no hypernetwork.

    Arguments:
        model: a trained HyperRecon.
        **dials: the setting; dials not named take their default.

    Raises:
        BadOption: an unknown dial or a value outside its range.
    """
    chosen = {name: float(value) for name, value in model.check_dials(dials).items()}
    with torch.no_grad():
        w = model.weights(1, chosen)
        theta = model.hypernet(w)
    plain = SingleWeight(
        main=model.arguments["main"], terms=model.names, weights=w[0].tolist(),
        scales=model.scales.tolist(), trained=model.trained,
    )  # fmt: skip
    shared = {name: value for name, value in model.main.state_dict().items() if name not in theta}
    plain.main.load_state_dict({name: value[0] for name, value in theta.items()} | shared)
    return plain.eval()


def _gram(A: LinearOperator) -> Callable[[int | None], Callable[[Tensor], Tensor]]:
    return lambda index: (A if index is None else A.sample(index)).gram


def _term_values(
    terms: Sequence[losses.Term],
    x_hat: Tensor,
    x: Tensor | None,
    y: Tensor,
    A: LinearOperator,
    weights: Mapping[str, Tensor],
) -> Tensor:
    result = losses.Result(x_hat=x_hat, x=x, y=y, forward=A, weights=weights)
    return torch.stack([term.value(result) for term in terms], 1)


def _balanced(values: Tensor, weights: Tensor) -> Tensor:
    """log Σ_k w_k L_k of each sample, `(B,)`; a perfect image does not make it infinite."""
    return ((values * weights).sum(1) + 1e-6).log()


def _scales(scales: Sequence[float] | str | None, count: int) -> Tensor:
    if isinstance(scales, str):
        raise errors.BadOption(
            f"found {scales!r}", key="scales", help="auto (with batch normalisation: numbers), or one number per term"
        )
    s = torch.ones(count) if scales is None else torch.tensor(scales, dtype=torch.float32)
    if s.shape != (count,) or not bool((s > 0).all()) or not bool(s.isfinite().all()):
        raise errors.BadOption(f"found {scales}, expected {count} finite numbers > 0", key="scales")
    return s


def _make_placeholder(module: nn.Module, name: str) -> None:
    """Turn a parameter into an empty buffer that `functional_call` fills, so that no dead weight is trained or saved."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    delattr(owner, leaf)
    owner.register_buffer(leaf, torch.empty(0), persistent=False)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
