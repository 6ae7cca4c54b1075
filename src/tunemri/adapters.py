"""To and from deepinv (extra `deepinv`): operators, denoisers and whole methods cross the border in both directions.

    to_physics        a LinearOperator as a deepinv LinearPhysics: its samplers and solvers run on our scans
    from_physics      a deepinv physics as a LinearOperator
    Denoising         a deepinv denoiser as a regulariser;  RED  as a method with dials
    to_reconstructor  a Reconstructor as deepinv's, for `deepinv.test`

deepinv writes a complex image as real `(B, 2, H, W)` and k-space as `(B, 2, C, H, W)`; so Re⟨a, b⟩ of complex tensors is
its ⟨a, b⟩, and the Hermitian adjoint its transpose. Centred orthonormal FFTs are shared. deepinv is imported when a
function that needs it is called; Denoising and RED take any callable and do without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from . import errors, solvers
from .methods.base import Dial, Reconstructor, data_residual, reconstruct
from .operators import Cartesian, LinearOperator, NonCartesian
from .scan import Reconstruction, Scan

__all__ = [
    "RED",
    "Denoiser",
    "Denoising",
    "from_physics",
    "to_channels",
    "to_complex",
    "to_physics",
    "to_reconstructor",
]

Denoiser = Callable[[Tensor, float], Tensor]  # real (B, channels, H, W) and σ → the same shape


def to_channels(x: Tensor) -> Tensor:
    """Complex `(B, …)` → real `(B, 2, …)`: real part, imaginary part."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 1).contiguous()


def to_complex(z: Tensor) -> Tensor:
    """Real `(B, 2, …)` → complex `(B, …)`.

    Raises:
        UnsupportedLayout: complex already, or not two channels.
    """
    if z.is_complex() or z.ndim < 2 or z.shape[1] != 2:
        raise errors.UnsupportedLayout(
            f"found {z.dtype} {tuple(z.shape)}, expected real (B, 2, …): real and imaginary part", key="channels"
        )
    return torch.view_as_complex(z.movedim(1, -1).contiguous())


def to_physics(A: LinearOperator, *, noise_std: float = 0.0) -> Any:
    """An operator as a `deepinv.physics.LinearPhysics` on images `(B, 2, H, W)`, data `(B, 2, C, H, W)` or `(B, 2, C, M)`.

    Arguments:
        A: what measures; it stays on its device.
        noise_std: of the complex noise per sample, √E|n|², as in a Scan. deepinv's noise model gets 1/√2 of it, the
            standard deviation of either part; it adds noise where nothing is sampled, too, which A.H ignores.

    Returns:
        The physics; its `operator` is A, and `from_physics` gives A back.

    Raises:
        BadOption: deepinv is missing; or, later, the physics is asked to take a new mask or new maps.
    """
    deepinv = _deepinv()

    class OperatorPhysics(deepinv.physics.LinearPhysics):  # type: ignore[name-defined]
        def __init__(self) -> None:
            noise = deepinv.physics.GaussianNoise(noise_std / math.sqrt(2)) if noise_std else None
            super().__init__(img_size=(2, *A.in_shape) if A.in_shape else None, noise_model=noise)
            self.operator = A

        def A(self, x: Tensor, **parameters: Any) -> Tensor:
            self.update_parameters(**parameters)
            return to_channels(self.operator(to_complex(x)))

        def A_adjoint(self, y: Tensor, **parameters: Any) -> Tensor:
            self.update_parameters(**parameters)
            return to_channels(self.operator.H(to_complex(y)))

        def A_adjoint_A(self, x: Tensor, **parameters: Any) -> Tensor:
            self.update_parameters(**parameters)
            return to_channels(self.operator.gram(to_complex(x)))

        def update_parameters(self, **parameters: Any) -> None:
            # deepinv passes a new mask as a keyword, and the parameters of its noise model along with it.
            for name in ("mask", "coil_maps"):
                if parameters.get(name) is not None:
                    raise errors.BadOption(
                        "an operator never changes", key=name, help="make a new one, and its physics from that"
                    )

    return OperatorPhysics()


def from_physics(physics: Any, shape: tuple[int, int] | None = None) -> LinearOperator:
    """A deepinv physics as a LinearOperator; its noise and sensor models stay behind.

    `MRI` and `MultiCoilMRI` become a `Cartesian` operator with the same mask and maps, whose data have a coil axis:
    `to_complex(y)[:, None]` of single-coil ones. Any other linear physics of complex images runs its own code, and its
    data are `to_complex(y)`.

    Arguments:
        physics: a `deepinv.physics.LinearPhysics`.
        shape: `(H, W)` of the image; needed where the physics is neither of the two.

    Raises:
        BadOption: deepinv or the shape is missing.
        UnsupportedLayout: not linear over the complex numbers, data without two channels, an adjoint that is none, three
            dimensions, or parameters of its own for each sample of a batch.
    """
    deepinv = _deepinv()
    if not isinstance(physics, deepinv.physics.LinearPhysics):
        raise errors.UnsupportedLayout(f"found {type(physics).__name__}, expected a LinearPhysics", key="physics")
    if getattr(physics, "three_d", False):
        raise errors.UnsupportedLayout("found a physics of volumes, expected one of images", key="physics")
    own = _own(physics)
    if own is not None:
        return own
    if shape is None:
        raise errors.BadOption(
            f"{type(physics).__name__} does not tell the size of the image", key="shape", help="shape=(H, W)"
        )
    x = torch.randn(1, *shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    x = x.to(next(physics.buffers()).device)
    with torch.no_grad():
        y = physics.A(to_channels(x))
        if not isinstance(y, Tensor) or y.is_complex() or y.ndim < 3 or y.shape[:2] != (1, 2):
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise errors.UnsupportedLayout(
                f"one image gives {found}, expected data (1, 2, …): real and imaginary part", key="physics"
            )
        A = _Foreign(physics, shape, tuple(y.shape[2:]))
        y = to_complex(y)
        energy = float(y.abs().square().sum())
        if float((A(1j * x) - 1j * y).abs().square().sum()) > 1e-6 * energy:
            raise errors.UnsupportedLayout(
                "treats real and imaginary part differently, or is not linear", key="physics"
            )
        if abs(complex((x.conj() * A.adjoint(y)).sum()) - energy) > 1e-3 * energy:
            raise errors.UnsupportedLayout("its A_adjoint is not the adjoint of its A", key="physics")
    return A


def _own(physics: Any) -> LinearOperator | None:
    """The operator of ours that equals the physics, where there is one."""
    deepinv = _deepinv()
    own = getattr(physics, "operator", None)
    if isinstance(own, LinearOperator):
        return own
    # Not their subclasses: those sample films or trajectories.
    if type(physics) not in (deepinv.physics.MRI, deepinv.physics.MultiCoilMRI):
        return None
    csm = getattr(physics, "coil_maps", None)
    # A mask of a single row, without maps, does not tell the size of the image.
    return Cartesian(physics.mask[:, :1], csm) if csm is not None or physics.mask.shape[-2] > 1 else None


@dataclass(frozen=True, eq=False)
class _Foreign(LinearOperator):
    """A physics of deepinv behind our interface; `data` is the shape of its complex data after the batch axis."""

    physics: Any
    shape: tuple[int, int]
    data: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_shape", self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.physics.A(to_channels(x.reshape(-1, *x.shape[-2:])))
        return to_complex(y).reshape(*x.shape[:-2], *self.data)

    def adjoint(self, y: Tensor) -> Tensor:
        x = self.physics.A_adjoint(to_channels(y.reshape(-1, *self.data)))
        return to_complex(x).reshape(*y.shape[: -len(self.data)], *self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """Regularisation by denoising, R(x) = ½ Re⟨x, x - D_σ(x)⟩ with ∇R(x) = x - D_σ(x).

    The gradient belongs to the energy where D is homogeneous and its Jacobian symmetric; few denoisers are so. For others
    the zeros of Aᴴ(A x - y) + lam (x - D_σ(x)) are what a solver finds, and no minimum of anything.

    Arguments:
        denoiser: D, a deepinv denoiser or any callable on real images `(B, channels, H, W)`.
        sigma: σ > 0, noise that it takes away, in units of the image. deepinv's TVDenoiser, TGVDenoiser and
            WaveletDenoiser read it as their threshold.
        channels: 2 if D takes both parts of a complex image at once, 1 if one at a time, as grey images.

    Sources: Y. Romano, M. Elad, P. Milanfar, "The little engine that could: regularization by denoising (RED)" (2017);
    E. T. Reehorst, P. Schniter, "Regularization by denoising: clarifications and new interpretations" (2019).
    """

    denoiser: Denoiser
    sigma: float
    channels: int = 2

    def __post_init__(self) -> None:
        _check(self.channels)
        if not 0 < self.sigma < math.inf:
            raise errors.BadOption(f"found {self.sigma}, expected a finite number > 0", key="sigma")

    def denoise(self, x: Tensor) -> Tensor:
        """D_σ(x), complex `(B, H, W)`.

        Raises:
            InconsistentShapes: the denoiser changed the shape.
        """
        z = to_channels(x)
        seen = z if self.channels == 2 else z.flatten(0, 1)[:, None]
        out = self.denoiser(seen, self.sigma)
        if out.shape != seen.shape:
            raise errors.InconsistentShapes(
                f"the denoiser made {tuple(out.shape)} of {tuple(seen.shape)}", key="channels",
                help="channels=1 is for denoisers of grey images; some need sizes that 8 or 16 divides",
            )  # fmt: skip
        return to_complex(out.reshape(z.shape))

    def value(self, x: Tensor) -> Tensor:
        """R(x), `(B, H, W)` → `(B,)`."""
        return (x.conj() * self.gradient(x)).real.sum((-2, -1)) / 2

    def gradient(self, x: Tensor) -> Tensor:
        """x - D_σ(x)."""
        return x - self.denoise(x)

    def prox(self, v: Tensor, step: float | Tensor) -> Tensor:
        """D_σ(v) whatever the step: plug-and-play, where a denoiser stands for a proximal map, as in `solvers.fista`."""
        return self.denoise(v)


class RED(Reconstructor):
    """Regularisation by denoising: Aᴴ(A x - y) + lam (x - D_σ(x)) = 0, as a fixed point.

        x ← argmin_x ½‖A x - y‖² + lam/2 ‖x - D_σ(x_k)‖²        (conjugate gradients from x_k)

    It converges where D shrinks distances. Data are normalised, images reach about 1: σ means the same on every scan, and
    lies where denoisers of images in [0, 1] expect it.

    Arguments:
        denoiser: a deepinv denoiser or any callable, see `Denoising`. It is copied for every reconstruction, for some
            (TVDenoiser) remember the image before.
        channels: see `Denoising`.
        iterations: denoisings at most.
        tolerance: on the relative change of the image from one to the next.

    Source: Y. Romano, M. Elad, P. Milanfar, "The little engine that could: regularization by denoising (RED)" (2017).
    """

    def __init__(self, denoiser: Denoiser, *, channels: int = 2, iterations: int = 50, tolerance: float = 1e-3) -> None:
        super().__init__()
        _check(channels)
        if iterations < 1:
            raise errors.BadOption(f"found {iterations}, expected at least 1", key="iterations")
        self.denoiser = denoiser
        self.arguments = {"channels": channels, "iterations": iterations, "tolerance": tolerance}

    def forward(
        self,
        y: Tensor,
        A: LinearOperator,
        *,
        lam: Annotated[
            float,
            Dial(
                sentence="weight of the denoised image against the data",
                default=0.1, lo=1e-3, hi=10.0, scale="log", low="noisy", high="denoised",
            ),
        ] = 0.1,
        sigma: Annotated[
            float,
            Dial(
                sentence="noise that the denoiser takes away (its threshold, if it is TV or wavelets)",
                default=0.05, lo=1e-3, hi=0.5, scale="log", low="noisy", high="smooth",
            ),
        ] = 0.05,
    ) -> Reconstruction:  # fmt: skip
        if not 0 <= lam < math.inf:
            raise errors.BadOption(f"found {lam}, expected a finite number ≥ 0", key="lam")
        prior = Denoising(denoiser=copy.deepcopy(self.denoiser), sigma=sigma, channels=self.arguments["channels"])
        tolerance = self.arguments["tolerance"]
        weighted, root_y = A.preconditioned(y)
        b, x = A.H(y), weighted.H(root_y)
        change = torch.full_like(_norm(x), torch.inf)
        done = torch.zeros_like(change, dtype=torch.bool)
        k = 0
        while k < self.arguments["iterations"] and not bool(done.all()):
            k += 1
            target = b + lam * prior.denoise(x)
            u = solvers.cg(lambda v: A.gram(v) + lam * v, target, x, iterations=20, tolerance=tolerance / 10).value
            u = torch.where(done[:, None, None], x, u)
            moved = (_norm(u - x) / _norm(u).clamp(min=1e-30)).detach()
            change, x = torch.where(done, change, moved), u
            done = done | (change <= tolerance)
        worst = float(change.max())
        unfinished = f"stopped after {k} iterations at {worst:.1e}, above the tolerance {tolerance:.0e}"
        return Reconstruction(
            image=x,
            status="converged" if bool(done.all()) else unfinished,
            stats={"iterations": k, "change": worst},
            dials={"lam": lam, "sigma": sigma},
            residual=data_residual(x, y, A),
        )


def to_reconstructor(model: Reconstructor, **dials: Any) -> Any:
    """A method at one setting as a `deepinv.models.Reconstructor`: `model(y, physics)`, and so `deepinv.test`.

    It gives the image of `tunemri.reconstruct`, as `(B, 2, H, W)` in the units of the data. deepinv's PSNR with
    max_pixel=None and complex_abs=True is ours of each slice; its SSIM has another window and counts the rim. No
    gradients pass: training stays with `tunemri.fit`.

    Arguments:
        model: any method; it is registered, and moves with the result.
        **dials: settings by name; those not named take the model's suggestion for each scan.

    Raises:
        BadOption: deepinv is missing, or a dial unknown or outside its range. The call raises UnsupportedLayout for a
            physics that is neither MRI, MultiCoilMRI nor made of an `encoding`: without k-space nothing tells the scale.
    """
    deepinv = _deepinv()
    model.check_dials(dials)

    class AdaptedReconstructor(deepinv.models.Reconstructor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, y: Tensor, physics: Any) -> Tensor:
            return to_channels(reconstruct(_scan(y, physics), self.model, **dials).image)

    return AdaptedReconstructor()


def _scan(y: Tensor, physics: Any) -> Scan:
    A, kspace = _own(physics), to_complex(y)
    if isinstance(A, Cartesian) and A.in_shape:
        kspace = kspace[:, None] if kspace.ndim == 3 else kspace  # deepinv's MRI has no coil axis
        return Scan(kspace=kspace, mask=A.mask, csm=A.csm, image_shape=A.in_shape)
    if isinstance(A, NonCartesian) and A.in_shape and A.weights is None:
        return Scan(kspace=kspace, trajectory=A.trajectory, csm=A.csm, image_shape=A.in_shape)
    raise errors.UnsupportedLayout(
        f"found {type(physics if A is None else A).__name__}, expected MRI, MultiCoilMRI or the physics of an encoding",
        key="physics",
        help="to_physics(tunemri.encoding(scan))",
    )


def _deepinv() -> Any:
    try:
        import deepinv
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise errors.BadOption(
            f"deepinv cannot be imported ({error})", key="deepinv", exit_code=3,
            help='in the clone of tunemri: pip install ".[deepinv]", with the torchvision that belongs to this torch',
        ) from error  # fmt: skip
    return deepinv


def _check(channels: int) -> None:
    if channels not in (1, 2):
        raise errors.BadOption(f"found {channels}, expected 1 or 2", key="channels")


def _norm(x: Tensor) -> Tensor:
    return x.abs().square().sum((-2, -1)).sqrt()
