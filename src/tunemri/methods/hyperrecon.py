"""HyperRecon: one network answers for every weighting of its training losses.

    min_φ  E_{w, x, y, A}  log Σ_k (w_k / s_k) L_k(f_θ(y, A), x),    θ = h_φ(w),    w on the simplex

The hypernetwork h_φ turns the weights w into the parameters of a main network f; the dials are the user's hold on w.
A network trained for one w alone (`SingleWeight`) is the baseline, and what `bake` returns.

Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Regularization-Agnostic Compressed Sensing MRI Reconstruction
with Hypernetworks" (2021); "Computing Multiple Image Reconstructions with a Single Hypernetwork" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors, losses
from ..networks import HyperNetwork, apply_batched, build
from ..networks.hypernet import generated_names
from ..operators import Cartesian, LinearOperator
from ..scan import Reconstruction
from .base import Dial, Reconstructor, data_residual, made

__all__ = ["CRITERIA", "OBJECTIVES", "PRESETS", "HyperRecon", "Selection", "SingleWeight", "bake", "weighted"]

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


OBJECTIVES = ("log", "mean", "relative")  # what is made of the weighted sum of losses, see `HyperRecon`
# Scores of a reconstruction without its truth, `(B,)`, small is good: what data-driven sampling ranks by.
CRITERIA = ("dc", "relative-dc", "noise", "heldout")
_BINS = 10  # of the histogram of weights, along each dial


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Data-driven sampling: which samples of a batch, each at its own w, are learned from.

    All are reconstructed; those that score best without their truth are kept, so that the network spends itself on
    weights that give useful images. Those dropped leave no gradient.

    Arguments:
        keep: share of the batch that is kept.
        criterion: "dc", ‖A x̂ − y‖² as in the papers, which prefers dark images; "relative-dc", over ‖y‖²; "noise",
            |‖A x̂ − y‖² / (M σ²) − 1|, which does not reward fitting the noise (M samples; "relative-dc" where σ is
            unknown or zero); "heldout", the error at samples that a second reconstruction was not shown.
        temperature: 0 keeps or drops; above, every sample counts by the softmin of its score, relative to the median.
        pair_steps: first steps, with weight on the first and last term alone (as in the history of the authors' code).
        uniform_steps: first steps without selection.

    Source: A. Q. Wang, A. V. Dalca, M. R. Sabuncu, "Regularization-Agnostic Compressed Sensing MRI Reconstruction
    with Hypernetworks" (2021).
    """

    keep: float = 0.25
    criterion: str = "relative-dc"
    temperature: float = 0.0
    pair_steps: int = 0
    uniform_steps: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise errors.BadOption(
                f"found {self.criterion!r}", key="criterion", help=errors.did_you_mean(self.criterion, CRITERIA)
            )
        if (
            not 0 < self.keep <= 1
            or not 0 <= self.temperature < math.inf
            or min(self.pair_steps, self.uniform_steps) < 0
        ):
            raise errors.BadOption(f"found {self}, expected 0 < keep ≤ 1 and numbers ≥ 0", key="selection")

    def shares(self, scores: Tensor) -> Tensor:
        """Scores `(B,)` → how much each sample counts, `(B,)`, sum 1."""
        if self.temperature > 0:
            return torch.softmax(-scores / (self.temperature * scores.median().clamp(min=1e-12)), 0)
        count = max(1, round(self.keep * len(scores)))
        shares = torch.zeros_like(scores)
        shares[scores.argsort(stable=True)[:count]] = 1 / count
        return shares


class HyperRecon(Reconstructor):
    """A hypernetwork and its main network.

    Arguments:
        main: the main network, `name` (see `networks.NETWORKS`) and its arguments.
        widths: hidden layers of the hypernetwork.
        residual: θ₀ + Δθ(w) with constant-norm inputs (our default), or the plain form of the papers.
        form: how much of θ follows w, "full" or one of the lighter ones, see `networks.HyperNetwork`.
        terms: names of the loss terms, in the order of w; all but the first become dials.
        scales: s_k, one per term: the loss of a network trained for that term alone (`training.match_scales`);
            or "auto": the size of the term's gradient in the image, relative to that of the first term, as a
            running mean over training, so that equal weights pull equally hard.
        faces: share of training draws on the faces of the simplex.
        objective: "log" of the weighted sum of losses, see `loss`; "mean", the sum as it is, as in the papers; "relative",
            the sum over that of x₀ = Aᴴy, for terms that know no truth: every sample at every w then pulls alike, and
            none without bound as the logarithm does where the data alone count.
        selection: arguments of `Selection`, data-driven sampling; None learns from all samples.
        antithetic: train each image at one w and at its K cyclic shifts (for two terms: w and its mirror). What the
            settings have in common then cancels from the gradient of the dial's own weights, which otherwise drowns
            in it; and a batch shares its settings, so that the convolutions run in plain batches.
        backend: how per-sample weights are applied, see `networks.apply_batched`.
        trained: range of settings and scans seen in training, filled in by the recipe.
    """

    scales: Tensor
    step: Tensor
    histogram: Tensor

    def __init__(
        self,
        *,
        main: Mapping[str, Any],
        widths: Sequence[int],
        residual: bool = True,
        form: str = "full",
        terms: Sequence[str] = ("mae", "ssim"),
        scales: Sequence[float] | str | None = None,
        faces: float = 0.2,
        objective: str = "log",
        selection: Mapping[str, Any] | None = None,
        antithetic: bool = False,
        backend: str = "auto",
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._terms = losses.terms(terms)
        if len(terms) < 2:
            raise errors.BadOption(
                f"found {list(terms)}, expected two or more: with one there is nothing to weigh", key="terms"
            )
        self.names, self.faces, self.antithetic, self.backend = tuple(terms), faces, antithetic, backend
        self.automatic = scales == "auto"
        self.register_buffer("scales", _scales(None if self.automatic else scales, len(terms)))
        network = build(main)
        self.hypernet = HyperNetwork(network, len(terms), widths, residual=residual, form=form)
        for name in generated_names(network):
            _make_placeholder(network, name)
        self.main = network
        coupled = bool(list(network.parameters()))
        if coupled and self.automatic:
            raise errors.BadOption(
                "a network with batch normalisation needs its own numbers", key="scales", help="one per term, or none"
            )
        if coupled and antithetic:
            raise errors.BadOption(
                "a network with batch normalisation takes one setting per sample", key="antithetic", help="leave it out"
            )
        self.objective = _known_objective(objective)
        self.selection: Selection | None = None if selection is None else made(Selection, "selection", selection)
        if self.selection is not None:
            if antithetic:
                raise errors.BadOption("antithetic training takes every setting, selection does not", key="selection")
            # In the state: an exact resume needs the step, and the histogram is what the model was trained on.
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self.register_buffer("histogram", torch.zeros((_BINS,) * (len(terms) - 1) if len(terms) < 4 else (0,)))
        self.trained = dict(trained or {})
        self.arguments = {
            "main": dict(main), "widths": list(widths), "residual": residual, "form": form, "terms": list(terms),
            "scales": scales if scales is None or isinstance(scales, str) else list(scales), "faces": faces, "objective": objective,
            "selection": None if self.selection is None else asdict(self.selection), "antithetic": antithetic,
            "backend": backend, "trained": self.trained,
        }  # fmt: skip

    def declared(self) -> dict[str, Dial]:
        """One dial per term after the first: its share of the weight, see `losses.weights_from_lambdas`."""
        first = losses.TERMS[self.names[0]]
        later = len(self.names) - 1
        # Without a truth, no weight on the data asks for an empty image: the range ends before.
        unsupervised = not any(losses.TERMS[name].supervised for name in self.names)
        return {
            name: Dial(
                sentence=f"weight of the {losses.TERMS[name].sentence} against {first.sentence}",
                default=0.25 if unsupervised else 0.5 if later == 1 else 1 / (index + 2),
                hi=0.9 if unsupervised else 1.0,
                low=first.high,
                high=losses.TERMS[name].high,
            )
            for index, name in enumerate(self.names[1:])
        }

    def as_dials(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Dials as they are; the weights `w_TERM` of all terms, coordinates of the simplex, as the dials that give them.

            λ_j = w_j / Σ_{i≤j} w_i,    w up to a common factor

        Raises:
            BadOption: some of the weights only, or dials beside them; not a number ≥ 0; all of them zero.
        """
        names = [f"w_{name}" for name in self.names]
        if not set(names) & set(given):
            return dict(given)
        if set(names) != set(given):
            raise errors.BadOption(
                f"found {', '.join(given)}, expected {', '.join(names)}", key="weights",
                help="a weight for every term, or dials",
            )  # fmt: skip
        weight = Dial(sentence="weight of a term", default=0.0, hi=math.inf)
        w = torch.tensor([[float(weight.check(name, given[name])) for name in names]], dtype=torch.float64)
        if not float(w.sum()) > 0:
            raise errors.BadOption("found zeros alone, expected a weight above zero", key="weights")
        return dict(zip(self.names[1:], losses.lambdas_from_weights(w)[0].tolist(), strict=True))

    def weights(self, batch: int, dials: Mapping[str, float | Tensor]) -> Tensor:
        """Dials by name, a number or `(B,)` each → w `(1 or B, K)`; one row where all are plain numbers."""
        columns = [
            torch.as_tensor(dials.get(name, dial.default), dtype=self.scales.dtype) for name, dial in self.dials.items()
        ]
        rows = max((c.numel() for c in columns), default=1)
        device = self.scales.device
        return losses.weights_from_lambdas(torch.stack([c.reshape(-1).expand(rows) for c in columns], 1)).to(device)

    def forward(self, y: Tensor, A: LinearOperator, **dials: float | Tensor) -> Reconstruction:
        """Reconstruct at the given dials; a dial may be `(B,)`, one setting per sample."""
        w = self.weights(y.shape[0], dials)
        weighted, root_y = A.preconditioned(y)
        x = self.image(weighted.H(root_y), weighted, self.hypernet(w))
        used = {name: _plain(dials.get(name, dial.default)) for name, dial in self.dials.items()}
        return Reconstruction(image=x, dials=used, residual=data_residual(x, y, A))

    def image(self, x0: Tensor, A: LinearOperator, theta: Mapping[str, Tensor]) -> Tensor:
        """The main network with weights `theta`, from x₀ = Aᴴy."""
        return apply_batched(self.main, theta, x0, _gram(A), backend=self.backend)

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """Mean over samples of log Σ_k (w_k / s_k) L_k, each at its own random w (or see `antithetic`, `selection`).

        The logarithm leaves the best image of a sample where it is and lets every sample pull alike; without it, the few
        that are nearly hopeless (10× random points) outweigh the many where there is something to learn.

        The backward pass has two stages: each setting is run forward and backward alone and leaves the
        gradient of its generated weights; one backward pass through the hypernetwork then takes them all.
        Same gradient, and the memory of one setting instead of all. A main network with batch
        normalisation couples the samples and takes the ordinary way.
        """
        y, A, x = example.y, example.A, example.target
        x0, count = A.H(y), len(self.names)
        if self.antithetic:
            w = losses.sample_weights(1, count, generator, faces=self.faces)
            w = torch.cat([w.roll(shift, 1) for shift in range(count)])
        else:
            w = self._draw(y.shape[0], generator)
        theta = self.hypernet(w.to(self.scales.device))
        w = w.to(y.real)
        shares = self._shares(example, x0, theta, w, generator)
        if list(self.main.parameters()):
            values = _term_values(self._terms, self.image(x0, A, theta), x, y, A, theta)
            start = _at_start(self.objective, self._terms, x0, x, y, A, theta)
            return (weighted(values, w, self.scales, self.objective, start) * shares).sum()
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        total = x0.real.new_zeros(())
        gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        followed = False
        for row in shares.nonzero().flatten().tolist():
            own = {name: leaf[row : row + 1] for name, leaf in leaves.items()}
            some = slice(None) if self.antithetic else slice(row, row + 1)
            A_row = A if self.antithetic else A.sample(row)
            x_hat = self.image(x0[some], A_row, own)
            truth = None if x is None else x[some]
            values = _term_values(self._terms, x_hat, truth, y[some], A_row, own)
            if self.automatic and self.training and not followed:
                self._follow_scales(values[0], x_hat)
                followed = True
            start = _at_start(self.objective, self._terms, x0[some], truth, y[some], A_row, own)
            value = weighted(values, w[row], self.scales, self.objective, start).mean() * shares[row]
            found = torch.autograd.grad(value, list(own.values()))
            for name, gradient in zip(own, found, strict=True):
                gradients[name][row] = gradient[0]
            total = total + value.detach()
        surrogate = sum((theta[name] * gradients[name]).sum() for name in theta)
        # Value of the loss, gradient of the surrogate.
        return total + (surrogate - surrogate.detach())

    def _draw(self, batch: int, generator: torch.Generator) -> Tensor:
        w = losses.sample_weights(batch, len(self.names), generator, faces=self.faces)
        if self.selection is not None and int(self.step) < self.selection.pair_steps:
            share = torch.rand(batch, generator=generator)
            w = torch.zeros_like(w)
            w[:, 0], w[:, -1] = share, 1 - share
        return w

    def _shares(
        self, example: Any, x0: Tensor, theta: Mapping[str, Tensor], w: Tensor, generator: torch.Generator
    ) -> Tensor:
        """How much each setting of the batch counts, `(B,)`, sum 1; equally unless `selection` says otherwise."""
        shares = torch.full_like(w[:, 0], 1 / len(w))
        chosen = self.selection
        if chosen is None:
            return shares
        if int(self.step) >= chosen.uniform_steps:
            with torch.no_grad():
                shares = chosen.shares(self._scores(example, x0, theta, chosen.criterion, generator))
        if self.training:
            self.step += 1
            if self.histogram.numel():
                bins = (losses.lambdas_from_weights(w) * _BINS).long().clamp(0, _BINS - 1)
                self.histogram.index_put_(tuple(bins.unbind(1)), shares, accumulate=True)
        return shares

    def _scores(
        self, example: Any, x0: Tensor, theta: Mapping[str, Tensor], criterion: str, generator: torch.Generator
    ) -> Tensor:
        """How bad each reconstruction is, judged without its truth, see `Selection`; `(B,)`."""
        y, A = example.y, example.A
        if criterion == "heldout":
            if not isinstance(A, Cartesian):
                raise errors.BadOption("held-out samples need Cartesian sampling", key="criterion")
            shown = (torch.rand(A.mask.shape, generator=generator) > 0.1).to(A.mask)
            part = Cartesian(A.mask * shown, A.csm, A.in_shape)
            hidden = 1 - shown
            x_hat = self.image(part.H(y * shown), part, theta)
            return _energy(hidden * (A(x_hat) - y)) / _energy(hidden * y).clamp(min=1e-12)
        misfit = _energy(A(self.image(x0, A, theta)) - y)
        if criterion == "dc":
            return misfit
        relative = misfit / _energy(y).clamp(min=1e-12)
        if criterion == "relative-dc" or example.noise_std is None:
            return relative
        expected = example.noise_std.square() * (y != 0).flatten(1).sum(1)
        return torch.where(expected > 0, (misfit / expected.clamp(min=1e-20) - 1).abs(), relative)

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
        main, terms, scales, objective, trained: as for `HyperRecon`.
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
        objective: str = "log",
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._terms = losses.terms(terms)
        w = torch.tensor(weights, dtype=torch.float32)
        if w.shape != (len(terms),) or not bool((w >= 0).all()) or abs(float(w.sum()) - 1) > 1e-5:
            raise errors.BadOption(
                f"found {list(weights)}, expected {len(terms)} numbers ≥ 0 with sum 1", key="weights"
            )
        self.objective = _known_objective(objective)
        self.register_buffer("scales", _scales(scales, len(terms)))
        self.register_buffer("weights", w)
        self.main = build(main)
        self.trained = dict(trained or {})
        self.arguments = {
            "main": dict(main), "terms": list(terms), "weights": [float(v) for v in weights], "objective": objective,
            "trained": self.trained,
        }  # fmt: skip

    def forward(self, y: Tensor, A: LinearOperator) -> Reconstruction:
        """Reconstruct; no dial."""
        weighted, root_y = A.preconditioned(y)
        x = self.main(weighted.H(root_y), weighted.gram)
        return Reconstruction(image=x, residual=data_residual(x, y, A))

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """Mean over samples of Σ_k (w_k / s_k) L_k or its logarithm, as for `HyperRecon`."""
        A, y = example.A.preconditioned(example.y)
        weights = {name: p[None].expand(y.shape[0], *p.shape) for name, p in self.main.named_parameters()}
        x0, x = A.H(y), example.target
        values = _term_values(self._terms, self.main(x0, A.gram), x, y, A, weights)
        start = _at_start(self.objective, self._terms, x0, x, y, A, weights)
        return weighted(values, self.weights, self.scales, self.objective, start).mean()


def bake(model: HyperRecon, **dials: float) -> SingleWeight:
    """One setting as a plain network: same images, no hypernetwork.

    Arguments:
        model: a trained HyperRecon.
        **dials: the setting; dials not named take their default.

    Raises:
        BadOption: an unknown dial or a value outside its range.
    """
    chosen = {name: float(value) for name, value in model.check_dials(model.as_dials(dials)).items()}
    with torch.no_grad():
        w = model.weights(1, chosen)
        theta = model.hypernet(w)
    plain = SingleWeight(
        main=model.arguments["main"], terms=model.names, weights=w[0].tolist(),
        scales=model.scales.tolist(), objective=model.objective, trained=model.trained,
    )  # fmt: skip
    shared = {name: value for name, value in model.main.state_dict().items() if name not in theta}
    plain.main.load_state_dict({name: value[0] for name, value in theta.items()} | shared)
    return plain.eval()


def _gram(A: LinearOperator) -> Callable[[int | None], Callable[[Tensor], Tensor]]:
    return lambda index: (A if index is None else A.sample(index)).gram


def _energy(y: Tensor) -> Tensor:
    return y.abs().square().flatten(1).sum(1)


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


def _at_start(objective: str, terms: Sequence[losses.Term], x0: Tensor, *about: Any) -> Tensor | None:
    """The terms of x₀ = Aᴴy, where the objective asks for them."""
    if objective != "relative":
        return None
    with torch.no_grad():
        return _term_values(terms, x0, *about)


def weighted(values: Tensor, w: Tensor, scales: Tensor, objective: str, start: Tensor | None) -> Tensor:
    """Σ_k (w_k / s_k) L_k of each sample, or what the objective makes of it: what training takes the mean of.

    Arguments:
        values: L_k, `(B, K)` or one row for all.
        w: `(B, K)`, or `(K,)` for all.
        start: L_k of x₀ = Aᴴy, as `values`; only the objective "relative" has them.

    Returns:
        `(B,)`.
    """
    total = (values * (w / scales)).sum(-1)
    if start is not None:
        # A tenth of equal weights beside w: where the data alone count, x₀, which meets them, has no loss to compare with.
        return total / (start * ((w + 0.1 / len(scales)) / scales)).sum(-1).clamp(min=1e-12)
    return (total + 1e-6).log() if objective == "log" else total  # a perfect image does not make it infinite


def _known_objective(objective: str) -> str:
    if objective not in OBJECTIVES:
        raise errors.BadOption(f"found {objective!r}", key="objective", help=errors.did_you_mean(objective, OBJECTIVES))
    return objective


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
