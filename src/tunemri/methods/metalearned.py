"""A learned descent method with a safeguard: any network may propose, and a test on an energy decides.

    min_x  φ(x) = ½‖A x − y‖² + κ r_ε(x) + ½μ‖x‖²,    r_ε the smoothed l2,1 norm of a learned feature map,
    κ = σ(ω(task)) ∈ (0, 1) the only number that belongs to a task (a sampling ratio); all else is shared

In each phase t a network proposes u. It is taken if both

    ‖∇φ(x)‖ ≤ a ‖u − x‖    and    φ(u) ≤ φ(x) − ‖u − x‖² / a

hold; otherwise x waits for the next proposal, which goes on from u, and after the last one (in the paper, at once)
v = x − α∇φ(x) is taken, with α halved until the second one holds for v. Where the gradient has become small
against ε, ε shrinks. Whatever the network proposes, Ψ = φ + κ m ε (m pixels) never increases, and over enough phases
the gradient goes to zero. Every reconstruction carries the record of this, its certificate, in `stats`.

Source: W. Bian, Y. Chen, X. Ye, Q. Zhang, "An Optimization-Based Meta-Learning Model for MRI Reconstruction with
Diverse Dataset" (2021). Their Ψ has ε in place of κ m ε, for which descent does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import errors
from ..networks.features import Features
from ..networks.unet import Trunk, as_channels
from ..operators import LinearOperator
from ..scan import Reconstruction
from .base import Dial, Reconstructor, data_residual, half_square, made

__all__ = ["PRESETS", "MetaLearned", "Objective", "Point", "Rule"]

# Constructor arguments by name, `MetaLearned(**PRESETS["paper"])`: 675 parameters, as published. Its a, ρ, γ and σ are
# not in the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "phases": 11, "tasks": [0.1, 0.2, 0.3, 0.4], "monotone": False, "noise": False,
        "features": {"channels": 4, "activation": "smoothed-relu", "delta": 0.001}, "mu": 0.0, "rule": {"damping": 0},
    },
    "default": {
        "phases": 8, "tasks": [0.1, 0.2, 0.3, 0.4, 0.5], "epsilon": 0.02,
        "features": {"channels": 6, "spread": 2, "last": 1.0}, "proposal": {"width": 16, "levels": 3},
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The constants of the safeguard.

    Arguments:
        a: of the two tests on a step; the larger, the more is let through.
        rho: factor on α in the line search.
        gamma: factor on ε where it is reduced.
        sigma: ε is reduced where ‖∇φ‖/√m < sigma · gamma · ε (the paper has no √m: then it depends on the image size).
        tolerance: a sample stops where sigma · ε falls below it.
        trials: of the line search, at most. Where none descends, only rounding is left, and the sample stops.
        damping: how often a proposal that is refused may be halved, x + (u − x)/2^k, before v takes its place. A part of
            a learned step is worth more than a step along the gradient; the same two tests decide.
    """

    a: float = 1e3
    rho: float = 0.5
    gamma: float = 0.9
    sigma: float = 1.0
    tolerance: float = 1e-5
    trials: int = 40
    damping: int = 2

    def __post_init__(self) -> None:
        good = self.a > 0 and 0 < self.rho < 1 and 0 < self.gamma < 1 and self.sigma > 0 and self.tolerance >= 0
        if not good or self.trials < 1 or self.damping < 0:
            raise errors.BadOption(f"found {self}, expected a, sigma > 0, 0 < rho, gamma < 1, trials ≥ 1", key="rule")


@dataclass(frozen=True, kw_only=True)
class Point:
    """An image and the energy there: f and φ `(B,)` float64, and the parts of its gradient, complex `(B, H, W)`."""

    x: Tensor
    misfit: Tensor  # f = ½‖A x − y‖²
    phi: Tensor
    data: Tensor  # Aᴴ(A x − y)
    prior: Tensor  # κ ∇r_ε(x) + μ x
    seen: Tensor  # the last data gradient that a proposal saw: at x itself, or at z on the way there

    @property
    def gradient(self) -> Tensor:
        """∇φ(x)."""
        return self.data + self.prior


@dataclass(frozen=True, kw_only=True)
class Objective:
    """φ for given data: y `(B, C, …)`, its operator, κ and ε `(B,)`, and the feature map."""

    y: Tensor
    A: LinearOperator
    kappa: Tensor
    epsilon: Tensor
    features: Features
    mu: float = 0.0

    def value(self, x: Tensor) -> Tensor:
        """φ(x), `(B,)` float64."""
        return (
            half_square(self.A(x) - self.y)
            + self.kappa.double() * self.features.value(x, self.epsilon)
            + self.mu * half_square(x)
        )

    def at(self, x: Tensor) -> Point:
        """φ and ∇φ at x."""
        residual = self.A(x) - self.y
        misfit = half_square(residual)
        value, gradient = self.features.value_and_gradient(x, self.epsilon)
        data = self.A.H(residual)
        return Point(
            x=x,
            misfit=misfit,
            phi=misfit + self.kappa.double() * value + self.mu * half_square(x),
            data=data,
            prior=_per_sample(self.kappa, x) * gradient + self.mu * x,
            seen=data,
        )

    def sample(self, b: int) -> Objective:
        """φ of sample b alone."""
        some = slice(b, b + 1)
        return replace(self, y=self.y[some], A=self.A.sample(b), kappa=self.kappa[some], epsilon=self.epsilon[some])


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happened in one phase; `(B,)` each.

    Arguments:
        before, proposed, after: the points x, u and x⁺.
        branch: 0 where the sample had stopped, 1 where u was taken, 2 where v was, 3 where a part of u was, 4 where x
            stayed what it was, because the next proposal is still to come.
        trials: of the line search.
        psi: Ψ at x⁺, with the new ε.
        epsilon: in this phase.
    """

    before: Point
    proposed: Point | None
    after: Point
    branch: Tensor
    trials: Tensor
    psi: Tensor
    epsilon: Tensor


class MetaLearned(Reconstructor):
    """The method, with the paper's proposal or a stronger one.

    The paper proposes u = z − τ_t κ∇r(z) at z = x − α_t∇f(x). With `proposal`, a U-Net of its own for each phase
    sees the image and both gradients (that of f at the last z, or at x where there is none), and the data have the
    last word:

        z = x + U_t(x, ∇f, κ∇r(x)) − τ_t κ∇r(x),    u = z − α_t ∇f(z),    α_t < 2,  τ_t = α_t β_t / (α_t + β_t) < α_t

    Arguments:
        tasks: sampling ratios, ascending, that have an ω each; in between ω is interpolated. None: κ = 1, the
            conventional network, trained for one task alone.
        phases: T.
        features: arguments of `networks.features.Features`.
        proposal: `width` and `levels` of the U-Nets, or None for the paper's proposal.
        monotone: ω falls with the ratio by construction.
        noise: ω also rises with the noise, see `noise_level`.
        rule: constants of the safeguard, see `Rule`.
        guarded: off, every proposal is taken, for comparison only: nothing is guaranteed then.
        epsilon: ε at the beginning; learned.
        mu: μ. Above zero, φ has bounded level sets, whatever the features.
        training: how to train, see `loss`.
        trained: range of scans seen in training, filled in by the recipe.
    """

    steps: Tensor

    def __init__(
        self,
        *,
        tasks: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
        phases: int = 11,
        features: Mapping[str, Any] | None = None,
        proposal: Mapping[str, int] | None = None,
        monotone: bool = True,
        noise: bool = True,
        rule: Mapping[str, float] | None = None,
        guarded: bool = True,
        epsilon: float = 0.001,
        mu: float = 1e-6,
        training: Mapping[str, Any] | None = None,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        ratios = [float(ratio) for ratio in tasks]
        if ratios != sorted(set(ratios)) or not all(0 < ratio <= 1 for ratio in ratios):
            raise errors.BadOption(f"found {list(tasks)}, expected sampling ratios in (0, 1], ascending", key="tasks")
        if phases < 1 or not 0 < epsilon < math.inf or not 0 <= mu < math.inf:
            raise errors.BadOption(f"found {phases=}, {epsilon=}, {mu=}, expected ≥ 1, > 0, ≥ 0", key="phases")
        self.rule = made(Rule, "rule", rule)
        self.training_plan = made(_Training, "training", training)
        self.tasks, self.monotone, self.noise, self.guarded, self.mu = tuple(ratios), monotone, noise, guarded, mu
        self.features = made(Features, "features", features)
        self.omega = nn.Parameter(torch.zeros(len(ratios))) if ratios else None
        self.noisiness = nn.Parameter(torch.zeros(1)) if noise and ratios else None
        self.alpha = nn.Parameter(torch.zeros(phases))
        self.beta = nn.Parameter(torch.full((phases,), math.log(0.05)))
        self.epsilon = nn.Parameter(torch.tensor(math.log(epsilon)))
        self.stages = None
        if proposal is not None:
            self.stages = nn.ModuleList([made(_Proposal, "proposal", proposal) for _ in range(phases)])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of training, so far
        self.trained = dict(trained or {})
        self.arguments = {
            "tasks": ratios, "phases": phases, "features": dict(features or {}),
            "proposal": None if proposal is None else dict(proposal), "monotone": monotone, "noise": noise,
            "rule": dict(rule or {}), "guarded": guarded, "epsilon": epsilon, "mu": mu, "training": dict(training or {}),
            "trained": self.trained,
        }  # fmt: skip

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at the trained weights of a `networks.Unrolled` of the same width, levels and number of stages or fewer.

        Its stages become the first proposals, as they are: what they do not know, ∇r, enters with weight zero.

        Raises:
            WrongModel: names or shapes differ.
        """
        steps = weights.get("steps", torch.zeros(0))
        own = dict(self.stages.named_parameters()) if self.stages is not None else {}
        given = {k.removeprefix("stages.").replace(".", ".trunk.", 1): v for k, v in weights.items() if k != "steps"}
        fits = 0 < len(steps) <= self.alpha.numel() and all(
            name in own and own[name].shape[2:] == value.shape[2:] and own[name].shape[:1] == value.shape[:1]
            for name, value in given.items()
        )
        if not fits:
            raise errors.WrongModel("these weights are not those of an unrolled network of that width", key="start")
        with torch.no_grad():
            for name, value in given.items():
                own[name].zero_()
                # The first layer of each stage has two more inputs.
                own[name][(slice(None), *(slice(n) for n in value.shape[1:2]))] = value
            # A step beyond one overshoots the samples of a single coil, and φ rises.
            share = steps.clamp(0.05, 1.0) / 2
            self.alpha[: len(steps)] = (share / (1 - share)).log()

    # ---------------------------------------------------------------- the task weight

    def declared(self) -> dict[str, Dial]:
        """The sampling ratio, and a factor on the weight that belongs to it."""
        found = {}
        if len(self.tasks) > 1:
            found["task"] = Dial(
                sentence="share of k-space that was sampled, to which the weight of the regulariser fits",
                default=self.tasks[len(self.tasks) // 2], lo=self.tasks[0], hi=self.tasks[-1],
                low="few samples, smooth", high="many samples, faithful",
            )  # fmt: skip
        found["kappa"] = Dial(
            sentence="weight of the learned regulariser, over what was learned for the task",
            default=1.0, lo=0.1, hi=10.0, scale="log", low="faithful", high="smooth",
        )  # fmt: skip
        return found

    def suggest(self, y: Tensor, A: LinearOperator) -> dict[str, float | str]:
        """The measured sampling ratio, as far as it is within the tasks; the learned weight."""
        if len(self.tasks) < 2:
            return {"kappa": 1.0}
        A, y = A.preconditioned(y)
        ratio = float(sampling_ratio(y, A).mean())
        return {"task": min(max(ratio, self.tasks[0]), self.tasks[-1]), "kappa": 1.0}

    def task_parameters(self) -> list[nn.Parameter]:
        """What belongs to tasks and not to θ: ω."""
        return [p for p in (self.omega, self.noisiness) if p is not None]

    @torch.no_grad()
    def move_task(self, shift: float) -> None:
        """ω + shift for every task: the curve over sampling ratios keeps its form."""
        if self.omega is None:
            super().move_task(shift)
            return
        # Where ω falls by construction, the first is followed by all others.
        (self.omega[:1] if self.monotone else self.omega).add_(shift / _SPEED)

    def kappa(self, ratio: Tensor, y: Tensor) -> Tensor:
        """κ = σ(ω) for sampling ratios `(B,)` and data y, `(B,)`: ω linear between tasks, constant beyond."""
        if self.omega is None:
            return torch.ones_like(ratio)
        omega = self.omega * _SPEED
        if self.monotone:
            falls = nn.functional.softplus(omega[1:])
            omega = omega[0] - torch.cat((falls.new_zeros(1), falls.cumsum(0)))
        knots, ratio = omega.new_tensor(self.tasks), ratio.to(omega.dtype).contiguous()
        position = torch.bucketize(ratio, knots).clamp(1, max(len(knots) - 1, 1))
        if len(knots) == 1:
            value = omega.expand(len(ratio))
        else:
            low, high = knots[position - 1], knots[position]
            share = ((ratio - low) / (high - low)).clamp(0, 1)
            value = torch.lerp(omega[position - 1], omega[position], share)
        if self.noisiness is not None:
            value = value + nn.functional.softplus(self.noisiness * _SPEED) * noise_level(y).to(value.dtype)
        return value.sigmoid()

    # ---------------------------------------------------------------- the algorithm

    def forward(
        self, y: Tensor, A: LinearOperator, *, task: float | Tensor | None = None, kappa: float | Tensor = 1.0
    ) -> Reconstruction:
        """Reconstruct; `task` (default: the measured ratio) and `kappa` may be `(B,)`, one per sample."""
        # Of samples off the grid, AᴴA is then near the identity, as it is on one; ‖A‖² stays below 2.
        weighted, root_y = A.preconditioned(y)
        ratio = sampling_ratio(root_y, weighted) if task is None else _row(task, y)
        weight = self.kappa(ratio, root_y) * _row(kappa, y)
        first, trace = self.descend(root_y, weighted, weight)
        x = trace[-1].after.x
        used = {"task": _plain(ratio if task is None else task), "kappa": _plain(kappa)}
        used = {name: used[name] for name in self.dials}
        residual = data_residual(x, y, A)
        certificate = self._certificate(first, trace, weight, residual)
        return Reconstruction(image=x, dials=used, residual=residual, stats={"certificate": certificate})

    def descend(
        self, y: Tensor, A: LinearOperator, kappa: Tensor, *, phases: int | None = None
    ) -> tuple[Tensor, list[Step]]:
        """Ψ at the start, and all phases from x₀ = Aᴴy; beyond the learned ones, `phases` descends along the gradient.

        Arguments:
            kappa: the weight of each sample, `(B,)`.
        """
        x0 = A.H(y)
        epsilon = self.epsilon.exp().expand(len(y))
        objective = Objective(y=y, A=A, kappa=kappa, epsilon=epsilon, features=self.features, mu=self.mu)
        point = objective.at(x0)
        first = _psi(point, objective)
        stopped = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        trace: list[Step] = []
        ahead = point
        for t in range(self.alpha.numel() if phases is None else phases):
            if self.training and self.training_plan.checkpoint:
                step, ahead, objective = checkpoint(
                    self._phase, t, point, ahead, objective, stopped, use_reentrant=False
                )
            else:
                step, ahead, objective = self._phase(t, point, ahead, objective, stopped)
            trace.append(step)
            point = step.after
            failed = (step.branch == 2) & (step.trials == self.rule.trials + 1)
            stopped = stopped | failed | (self.rule.sigma * objective.epsilon < self.rule.tolerance)
            if bool(stopped.all()):
                break
        return first, trace

    def _phase(
        self, t: int, point: Point, ahead: Point, objective: Objective, stopped: Tensor
    ) -> tuple[Step, Point, Objective]:
        """One phase from x, where the next proposal starts, and the objective of the next phase, whose ε may be smaller.

        The U-Nets go on from `ahead`, what they proposed last, taken or not, while x waits: a step up on the way to a
        lower place is not the end of the way. The paper's proposal starts at x, and v follows where it is refused.
        """
        last = self.alpha.numel() - 1
        alpha = 2 * self.alpha[min(t, last)].sigmoid()
        beta = self.beta[min(t, last)].exp()
        proposed, accepted = None, torch.zeros_like(stopped)
        if t <= last:
            u, seen = self._propose(t, ahead, objective, alpha, alpha * beta / (alpha + beta))
            proposed = replace(objective.at(u), seen=seen)
            accepted = self._accept(point, proposed) & ~stopped
        branch, trials = accepted.long(), torch.zeros_like(stopped, dtype=torch.int64)
        after = proposed
        if after is None or not bool(accepted.all()):
            # The searches decide without gradient; the steps themselves are differentiated, their lengths plain numbers.
            rows = [point.x[b : b + 1] for b in range(len(stopped))]
            for b in range(len(stopped)):
                some = slice(b, b + 1)
                if bool(stopped[b]):
                    continue
                share = 1.0 if bool(accepted[b]) else self._damped(point, proposed, objective, b)
                if share:
                    assert proposed is not None
                    branch[b] = 1 if share == 1 else 3
                    rows[b] = proposed.x[some] if share == 1 else torch.lerp(point.x[some], proposed.x[some], share)
                    continue
                if self.stages is not None and t < last:
                    branch[b] = 4  # a step along ∇φ would lower the bar for the proposals that are still to come
                    continue
                branch[b] = 2
                step, trials[b] = self._search(point, objective.sample(b), b, float(alpha.detach()))
                rows[b] = rows[b] - step * point.gradient[some]
            after = objective.at(torch.cat(rows))
        epsilon, following = objective.epsilon, self._reduced(after, objective, stopped)
        ahead = after if self.stages is None or proposed is None else proposed
        if following is not objective:
            # With another ε, all but the place is another.
            same = ahead is after
            after = replace(following.at(after.x), seen=after.seen)
            ahead = after if same else replace(following.at(ahead.x), seen=ahead.seen)
        step_made = Step(
            before=point, proposed=proposed, after=after, branch=branch, trials=trials,
            psi=_psi(after, following).detach(), epsilon=epsilon,
        )  # fmt: skip
        return step_made, ahead, following

    def _propose(self, t: int, point: Point, objective: Objective, alpha: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """u, and the data gradient that the next proposal will be shown."""
        if self.stages is None:
            z = point.x - alpha * point.data
            return z - tau * objective.at(z).prior, point.data
        z = self.stages[t](point.x, point.seen, point.prior) - tau * point.prior
        # At x the samples of a single coil are met already: only at z do they say what the network did to them.
        data = objective.A.H(objective.A(z) - objective.y)
        return z - alpha * data, data

    @torch.no_grad()
    def _accept(self, x: Point, u: Point) -> Tensor:
        """Which proposals pass, `(B,)`: all, where the guard is off."""
        if not self.guarded or (self.training and int(self.steps) < self.training_plan.enforce):
            return torch.ones_like(x.phi, dtype=torch.bool)
        return self._passes(x.gradient, x.phi, u.phi, u.x - x.x)

    def _passes(self, gradient: Tensor, before: Tensor, after: Tensor, move: Tensor) -> Tensor:
        """The two tests, `(B,)`."""
        length = _norm(move)
        enough = before - length.square() / self.rule.a - _rounding(before, move)
        return (_norm(gradient) <= self.rule.a * length) & (after <= enough)

    @torch.no_grad()
    def _damped(self, point: Point, proposed: Point | None, objective: Objective, b: int) -> float:
        """The largest part of the way to u, 1/2, 1/4, …, that passes for sample b; 0 if none does."""
        if proposed is None:
            return 0.0
        some = slice(b, b + 1)
        x, move, own = point.x[some], proposed.x[some] - point.x[some], objective.sample(b)
        for halvings in range(1, self.rule.damping + 1):
            part = move / 2**halvings
            if bool(self._passes(point.gradient[some], point.phi[some], own.value(x + part), part)):
                return 2.0**-halvings
        return 0.0

    @torch.no_grad()
    def _search(self, point: Point, objective: Objective, b: int, alpha: float) -> tuple[float, int]:
        """(α, number of trials) for sample b, whose `objective` this is; α = 0 and one trial too many where none descends."""
        x, gradient, phi = point.x[b : b + 1], point.gradient[b : b + 1], point.phi[b : b + 1]
        square = _norm(gradient).square()
        for trial in range(1, self.rule.trials + 1):
            value = objective.value(x - alpha * gradient)
            if bool(value <= phi - alpha**2 * square / self.rule.a - _rounding(phi, x)):
                return alpha, trial
            alpha *= self.rule.rho
        return 0.0, self.rule.trials + 1

    def _reduced(self, point: Point, objective: Objective, stopped: Tensor) -> Objective:
        """The objective with ε shrunk for the samples whose gradient has become small against it."""
        with torch.no_grad():
            rms = _norm(point.gradient) / math.sqrt(point.x[0].numel())
            small = (rms < self.rule.sigma * self.rule.gamma * objective.epsilon) & ~stopped
        if not bool(small.any()):
            return objective
        return replace(objective, epsilon=torch.where(small, self.rule.gamma * objective.epsilon, objective.epsilon))

    # ---------------------------------------------------------------- guarantees

    def constants(self, shape: tuple[int, int], kappa: float, epsilon: float, *, norm: float = 1.0) -> dict[str, float]:
        """What is proved about φ_ε on images of `shape`, for an operator with ‖A‖ ≤ `norm`.

            ‖J_g‖ ≤ M,    ‖∇φ(x) − ∇φ(z)‖ ≤ L ‖x − z‖,    L = ‖A‖² + κ(√m L_J + M²/ε) + μ

        Every line search ends at some α ≥ `step`, after at most `trials` trials, and over T phases
        min_t ‖∇φ(x_t)‖² ≤ `rate` · (φ(x₀) − inf φ) / T at fixed ε.
        """
        jacobian, curvature = self.features.lipschitz()
        pixels = math.sqrt(shape[0] * shape[1])
        smooth = norm**2 + kappa * (pixels * curvature + jacobian**2 / epsilon) + self.mu
        enough = 2 / (2 / self.rule.a + smooth)
        largest = float(2 * self.alpha.detach().sigmoid().max())
        step = min(float(2 * self.alpha.detach().sigmoid().min()), self.rule.rho * enough)
        trials = 1 + max(0, math.ceil(math.log(largest / enough) / math.log(1 / self.rule.rho)))
        a = self.rule.a
        return {
            "M": jacobian,
            "L_J": curvature,
            "L": smooth,
            "step": step,
            "trials": trials,
            "rate": max(a**3, a / step**2),
        }

    @torch.no_grad()
    def guarantees(self) -> dict[str, Any]:
        """`constants` of each task on images of 256×256, at the learned κ (for noise of 0.01 of the signal) and first ε."""
        ratios = torch.tensor(self.tasks or [1.0])
        kappa = self.kappa(ratios, torch.full((len(ratios), 1, 1, 1), 0.01))
        epsilon = float(self.epsilon.exp())
        rows = [
            {"ratio": ratio, "kappa": value, **self.constants((256, 256), value, epsilon)}
            for ratio, value in zip(self.tasks or (1.0,), kappa.tolist(), strict=True)
        ]
        return {"epsilon": epsilon, "guarded": self.guarded, "rule": asdict(self.rule), "tasks": rows}

    @torch.no_grad()
    def _certificate(self, first: Tensor, trace: list[Step], kappa: Tensor, residual: Tensor) -> list[dict[str, Any]]:
        """Of each sample, JSON-ready: Ψ from x₀ on, the branch and trials of each phase, what is left at the end."""
        psi = torch.stack([first.detach(), *(step.psi for step in trace)], 1)
        branch = torch.stack([step.branch for step in trace], 1)
        trials = torch.stack([step.trials for step in trace], 1)
        end = trace[-1].after
        gradient = _norm(end.gradient) / math.sqrt(end.x[0].numel())
        words = ("stopped", "proposed", "gradient", "damped", "waited")
        return [
            {
                "kappa": float(kappa[b]),
                "epsilon": float(trace[-1].epsilon[b]),
                "psi": psi[b].tolist(),
                "descent": bool((psi[b].diff() <= 0).all()),
                "branch": [words[i] for i in branch[b].tolist()],
                "trials": trials[b].tolist(),
                "accepted": float((branch[b] == 1).double().mean()),
                "gradient": float(gradient[b]),
                "data_residual": float(residual[b]),
                "guarded": self.guarded,
            }
            for b in range(len(first))
        ]

    # ---------------------------------------------------------------- training

    def loss(self, example: Any, generator: torch.Generator) -> Tensor:
        """Mean over samples of the error of the images, with the guard in force, and of the violation of its test.

            L = Σ_t w_t ℓ(u_t, x) / Σ w_t + c · mean_t [ (φ(u_t) − φ(x_t) + s ‖u_t − x_t‖²/a) / D_t + margin ]₊

        ℓ is the logarithm of the mean squared error, or as the constructor's `training` says, see `_Training`, and
        D_t = |Δf| + |Δ(φ − f)| + s ‖u_t − x_t‖²/a a scale. The proposals of all phases count, so that one that is
        refused still learns. Where the batch brings samples for the upper level of the bilevel problem,
        min_ω L_upper(θ(ω), ω) with θ(ω) = argmin_θ L(θ, ω), ω follows them.
        """
        plan, upper = self.training_plan, example.upper
        # Without a task weight there is no upper level: its samples are some more.
        if plan.bilevel == "joint" or upper is None or not self.task_parameters():
            total = self._level(example)
            if upper is not None:
                total = (total + self._level(upper)) / 2
        elif plan.bilevel == "alternate":
            # θ follows the training samples at fixed ω, and ω the others at fixed θ: no weight sees both.
            omega = self.task_parameters()
            above = self._level(upper)
            slopes = torch.autograd.grad(above, omega, allow_unused=True)
            pull = sum(
                ((p * g).sum() for p, g in zip(omega, slopes, strict=True) if g is not None), above.new_zeros(())
            )
            total = self._level(example, fixed=True) + (pull - pull.detach())
        else:
            if plan.checkpoint:
                # In full precision: half of it would round the differences away, and keeps old copies of the weights.
                with torch.autocast(example.y.device.type, enabled=False):
                    penalty = self._penalty_by_difference(example)
            else:
                penalty = self._penalty(example)
            total = self._level(upper) + plan.penalty * plan.growth ** int(self.steps) * penalty
        if self.training:
            self.steps += 1
        return total

    def _theta(self) -> list[nn.Parameter]:
        omega = {id(p) for p in self.task_parameters()}
        return [p for p in self.parameters() if id(p) not in omega]

    def _penalty(self, example: Any) -> Tensor:
        """½‖∇_θ L‖², with a graph of the backward pass, which holds every phase."""
        slopes = torch.autograd.grad(self._level(example), self._theta(), create_graph=True, allow_unused=True)
        return sum((g.square().sum() for g in slopes if g is not None), start=torch.zeros(())) / 2

    def _penalty_by_difference(self, example: Any) -> Tensor:
        """The same in the memory of one gradient: H v ≈ [∇L(θ + h v) − ∇L(θ − h v)] / 2h, v = ∇_θ L, by θ and by ω."""
        theta, every = self._theta(), list(self.parameters())
        v = [torch.zeros_like(p) if g is None else g for p, g in zip(theta, self._slopes(example, theta), strict=True)]
        square = torch.stack([g.square().sum() for g in v]).sum()
        length = torch.stack([p.detach().square().sum() for p in theta]).sum().sqrt()
        # Small against the curvature, large against rounding.
        h = float(torch.finfo(square.dtype).eps ** 0.4 * length / square.sqrt().clamp(min=1e-30))
        kept, sides = [p.detach().clone() for p in theta], []
        try:
            for sign in (h, -h):
                with torch.no_grad():
                    for p, old, g in zip(theta, kept, v, strict=True):
                        p.copy_(old + sign * g)
                sides.append(self._slopes(example, every))
        finally:
            with torch.no_grad():
                for p, old in zip(theta, kept, strict=True):
                    p.copy_(old)
        pull = square.new_zeros(())
        for p, above, below in zip(every, *sides, strict=True):
            if above is not None and below is not None:
                pull = pull + (p * ((above - below) / (2 * h))).sum()
        return square / 2 + (pull - pull.detach())

    def _slopes(self, example: Any, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self._level(example), parameters, allow_unused=True)

    def _phases_now(self) -> int:
        plan, phases = self.training_plan, self.alpha.numel()
        return min(phases, plan.first + int(self.steps) // plan.stair) if plan.stair and self.training else phases

    def _level(self, example: Any, *, fixed: bool = False) -> Tensor:
        """The loss of one level, at fixed ω if asked."""
        plan, y, A, target = self.training_plan, example.y, example.A, example.target
        kappa = self.kappa(sampling_ratio(y, A), y)
        _, trace = self.descend(y, A, kappa.detach() if fixed else kappa, phases=self._phases_now())
        total, weights = _error(trace[-1].after.x, target, plan), 1.0
        excess = torch.zeros_like(total)
        for t, step in enumerate(trace, 1):
            assert step.proposed is not None
            x, u = step.before, step.proposed
            if plan.deep and t < len(trace):
                weight = plan.deep ** (len(trace) - t)
                total, weights = total + weight * _error(u.x, target, plan), weights + weight
            least = plan.slack * _norm(u.x - x.x).square() / self.rule.a
            fit, change = u.misfit - x.misfit, u.phi - x.phi
            size = (fit.abs() + (change - fit).abs() + least).detach() + 1e-12
            excess = excess + ((change + least) / size + plan.margin).clamp(min=0).to(excess.dtype)
        return (total / weights + plan.hinge * excess / len(trace)).mean()


# ω in units of its parameter: Adam moves every parameter by about as much, and ω has far to go.
_SPEED = 10.0


@dataclass(frozen=True, kw_only=True)
class _Training:
    """How `MetaLearned` trains.

    Arguments:
        log: the logarithm of the squared error, so that every sample pulls alike; otherwise the error itself.
        magnitude: weight of the mean absolute error of magnitudes beside it: squares hardly see the noise left in the
            dark, which eyes and SSIM do.
        deep: weight of the proposal of phase t over that of phase t + 1; 0: only the last image counts.
        hinge, slack, margin: c, s and margin of `MetaLearned.loss`; s above 1 and margin above 0 leave room to the tests.
        enforce: steps before the guard is in force: until then every proposal is taken, or the last image, which counts
            most, would seldom be the network's own.
        first, stair: begin with `first` phases and add one every `stair` steps; 0: all from the start.
        bilevel: "alternate": θ descends L and ω L_upper; "penalty": both descend L_upper + λ/2 ‖∇_θ L‖², λ beginning at
            `penalty` and growing by `growth` a step, which takes second derivatives (activation "squareplus"); or
            "joint": both descend the mean of the two. Without samples for the upper level, always joint.
        checkpoint: recompute each phase in the backward pass: memory of one phase. The penalty's second derivatives are
            then symmetric differences, since a graph of the backward pass would hold all phases again.
    """

    log: bool = True
    magnitude: float = 0.0
    deep: float = 0.5
    hinge: float = 1.0
    slack: float = 2.0
    margin: float = 0.2
    enforce: int = 0
    first: int = 1
    stair: int = 0
    bilevel: str = "alternate"
    penalty: float = 1e-5
    growth: float = 1.0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.bilevel not in ("alternate", "penalty", "joint"):
            raise errors.BadOption(
                f"found {self.bilevel!r}", key="training.bilevel", help="alternate, penalty or joint"
            )


class _Proposal(nn.Module):
    """x + U(x, ∇f, κ∇r), U a U-Net whose last layer begins at zero."""

    def __init__(self, *, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        self.trunk = Trunk(6, 2, width, levels=levels)
        for parameter in self.trunk.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, data: Tensor, prior: Tensor) -> Tensor:
        z = self.trunk(as_channels(x, data, prior)).to(x.real.dtype)
        return x + torch.view_as_complex(z.movedim(1, -1).contiguous())


def sampling_ratio(y: Tensor, A: LinearOperator) -> Tensor:
    """Samples per pixel of the image, `(B,)`: the energy that A sees of one pixel, with normalised coil maps.

    Any operator will do: for Cartesian sampling it is the mean of the mask, for another its samples over the pixels.
    """
    with torch.no_grad():
        x = A.H(y)
        # Where the object is bright, the coil maps are known.
        place = x.abs().flatten(1).argmax(1, keepdim=True)
        pixel = torch.zeros_like(x).flatten(1).scatter(1, place, 1).view_as(x)
        return A(pixel).abs().square().flatten(1).sum(1)


def noise_level(y: Tensor) -> Tensor:
    """log₁₀ of the lower quartile of the magnitudes sampled, over 0.01, within ±2, `(B,)`: noise, where it dominates.

    Most samples lie far from the centre of k-space, where there is more noise than signal.
    """
    with torch.no_grad():
        levels = []
        for magnitudes in y.abs().flatten(1):
            sampled = magnitudes[magnitudes > 0]
            count = max(1, sampled.numel() // 4)
            levels.append(sampled.kthvalue(count).values if sampled.numel() else magnitudes.new_tensor(0.0))
        return (torch.stack(levels) / 0.01).clamp(0.01, 100).log10()


def _norm(x: Tensor) -> Tensor:
    return (2 * half_square(x)).sqrt()


def _rounding(phi: Tensor, x: Tensor) -> Tensor:
    """A descent smaller than this may be none: values are made of numbers of x's precision."""
    return torch.finfo(x.real.dtype).eps * phi.abs()


def _psi(point: Point, objective: Objective) -> Tensor:
    """Ψ = φ + κ m ε."""
    return point.phi + objective.kappa.double() * objective.epsilon.double() * point.x[0].numel()


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.real.dtype)[:, None, None]


def _error(x_hat: Tensor, x: Tensor, plan: _Training) -> Tensor:
    error = torch.view_as_real(x_hat - x).square().mean((1, 2, 3))
    absolute = (x_hat.abs() - x.abs()).abs().mean((1, 2)) if plan.magnitude else torch.zeros_like(error)
    if plan.log:
        # Twice, as the logarithm of a square.
        return (error + 1e-8).log() + plan.magnitude * 2 * (absolute + 1e-4).log()
    return error + plan.magnitude * absolute


def _row(value: float | Tensor, y: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=y.device).reshape(-1).expand(len(y))


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.numel() == 1 else value.tolist()
