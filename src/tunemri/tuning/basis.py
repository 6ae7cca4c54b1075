"""The range basis: every setting of a dial from a dozen images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..methods.base import Dial, Reconstructor
from ..scan import Scan, select
from .base import Progress, ranged, set_up

__all__ = ["RangeBasis", "range_basis"]


@dataclass(frozen=True, kw_only=True)
class RangeBasis:
    """All settings of some dials on one slice, as a mean and a few components.

        x̂(λ) ≈ mean + Σ_r c_r(λ) component_r,    c interpolated (multi)linearly over the grid, on the dials' own scales

    Arguments:
        names: the dials, D of them, in the order of the axes; the last runs fastest.
        dials: name → Dial.
        axes: the grid's values along each dial, ascending; not evenly spaced where the image changes faster.
        settings: all points of the grid `(G, D)`.
        mean: `(H, W)`, magnitude or complex, in the units of the scan.
        components: `(R, H, W)`, orthonormal in Re⟨·,·⟩.
        coefficients: real `(G, R)`.
        fixed: the dials that do not vary, with their values.
        worst_db, median_db: peak signal-to-noise ratio of rebuilt against exact images at settings *between* those of
            the grid (worst: on it too). 50 dB is invisible.
        reconstructions: how many exact ones it took, those to measure the error included.
    """

    names: tuple[str, ...]
    dials: Mapping[str, Dial]
    axes: tuple[tuple[float, ...], ...]
    settings: Tensor
    mean: Tensor
    components: Tensor
    coefficients: Tensor
    fixed: Mapping[str, Any] = field(default_factory=dict)
    worst_db: float
    median_db: float
    reconstructions: int

    def rebuild(self, dials: Mapping[str, Any] | None = None) -> Tensor:
        """The image `(H, W)` at a setting; dials not named take their default.

        Raises:
            BadOption: a dial that the basis does not vary, at another value than it was made with; or out of range.
        """
        given = dict(dials or {})
        for name in given.keys() - set(self.names):
            if name not in self.fixed or given[name] != self.fixed[name]:
                raise errors.BadOption(
                    f"this basis holds {dict(self.fixed)} fixed", key=name, help=errors.did_you_mean(name, self.names)
                )
        values = [float(d.check(n, given.get(n, d.default))) for n, d in self.dials.items()]
        c = self.coefficients_at(torch.tensor([values], dtype=torch.float64))[0]
        return self.mean + torch.tensordot(c.to(self.components.dtype), self.components, 1)

    def coefficients_at(self, settings: Tensor) -> Tensor:
        """Coefficients `(N, R)` at settings `(N, D)`: their distances are those of the images that they stand for."""
        positions = [
            torch.tensor([dial.position(float(v)) for v in column], dtype=torch.float64)
            for dial, column in zip(self.dials.values(), settings.T, strict=True)
        ]
        axes = [[d.position(v) for v in axis] for d, axis in zip(self.dials.values(), self.axes, strict=True)]
        return _interpolate(axes, positions, self.coefficients)


def range_basis(
    model: Reconstructor,
    scan: Scan,
    *,
    dials: Sequence[str] | None = None,
    grid: int | Mapping[str, int] | None = None,
    components: int | None = None,
    rank_db: float = 50.0,
    most: int = 129,
    fixed: Mapping[str, Any] | None = None,
    complex_valued: bool = False,
    index: int | None = None,
    csm: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> RangeBasis:
    """A range basis of one slice: singular vectors of the images over a coarse grid of dials, refined where it must be.

    The image is made exactly in the middle of every cell of the grid (of at most 32 where several dials vary). Where
    the rebuilt one misses it by more than `rank_db` allows, the grid gets a new line there; then as few components are kept as
    keep the worst of these errors, and those on the grid, above `rank_db`.

    Arguments:
        dials: those that vary; None: all that have a range.
        grid: points to start with, for all dials or by name; None: 9 for one dial, 5 for two, 3 for more.
        components: how many to keep; None: as few as `rank_db` allows.
        rank_db: worst rebuild error aimed at, dB below the maximum of the exact image.
        most: the grid stops growing at that many points; `worst_db` says what was reached.
        fixed: values of the other dials, for one that is not named the method's suggestion.
        complex_valued: keep the phase; costs more components.
        index: which slice; None: the middle one.
        csm: how to estimate coil maps where the scan has none; from that slice.
        seed: of the choice of cells.
        progress: called with (done, 0) after each exact reconstruction.

    Raises:
        BadOption: an unknown dial, one without a range, an empty slice, fewer than two points; as `reconstruct`.
    """
    varied = ranged(model, dials)
    b = len(scan) // 2 if index is None else index
    if not 0 <= b < len(scan):
        raise errors.BadOption(f"found {b}, expected a slice from 0 to {len(scan) - 1}", key="index")
    bench = set_up(select(scan, slice(b, b + 1)), model, csm)
    held = {name: v for name, v in bench.start(fixed or {}).items() if name not in varied}
    counts = _counts(varied, grid)
    axes = [[i / (counts[name] - 1) for i in range(counts[name])] for name in varied]
    exact: dict[tuple[float, ...], Tensor] = {}

    def images(points: Sequence[tuple[float, ...]]) -> Tensor:
        for point in points:
            if point not in exact:
                setting = {name: dial.at(p) for (name, dial), p in zip(varied.items(), point, strict=True)}
                image = bench.images({**held, **setting})[0]
                exact[point] = _real(image if complex_valued else image.abs())
                if progress is not None:
                    progress(len(exact), 0)
        return torch.stack([exact[point] for point in points])

    generator = torch.Generator().manual_seed(seed)
    while True:
        points = list(itertools.product(*axes))
        x = images(points)
        mean = x.mean(0)
        u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
        coefficients = u * s
        cells = _cells(axes, 32 if len(axes) > 1 else None, generator)
        between = [tuple((a[i] + a[i + 1]) / 2 for a, i in zip(axes, cell, strict=True)) for cell in cells]
        columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*between, strict=True)]
        reached = _rebuild_db(images(between), mean, vh, _interpolate(axes, columns, coefficients))
        if float(reached[:, -1].min()) >= rank_db + 0.5:  # half a dB, for the components that are left out
            break
        finer = _finer(
            axes, coefficients, [c for c, db in zip(cells, reached[:, -1], strict=True) if db < rank_db + 0.5]
        )
        if math.prod(map(len, finer)) > most:
            break
        axes = finer
    worst = torch.minimum(reached.amin(0), _rebuild_db(x, mean, vh, coefficients).amin(0))
    aim = min(rank_db, float(worst[-1]) - 0.1)
    if components is None:
        # At least one: a dial that does nothing would look broken, however little it does.
        r = min(max(int((worst >= aim).nonzero()[0]), 1), len(s))
    else:
        r = min(max(components, 0), len(s))
    shape, settings = (
        scan.image_shape,
        [[d.at(p) for d, p in zip(varied.values(), point, strict=True)] for point in points],
    )
    return RangeBasis(
        names=tuple(varied), dials=varied, fixed=held,
        axes=tuple(tuple(d.at(p) for p in axis) for d, axis in zip(varied.values(), axes, strict=True)),
        settings=torch.tensor(settings, dtype=torch.float64),
        mean=_picture(mean, shape, complex_valued), components=_picture(vh[:r], shape, complex_valued),
        coefficients=coefficients[:, :r], worst_db=float(worst[r]), median_db=float(reached[:, r].median()),
        reconstructions=len(exact),
    )  # fmt: skip


def _counts(varied: Mapping[str, Dial], grid: int | Mapping[str, int] | None) -> dict[str, int]:
    usual = {1: 9, 2: 5}.get(len(varied), 3)
    named = grid if isinstance(grid, Mapping) else {}
    for name in named:
        if name not in varied:
            raise errors.BadOption("no such dial", key=name, help=errors.did_you_mean(name, varied))
    counts = {name: named.get(name, grid if isinstance(grid, int) else usual) for name in varied}
    if min(counts.values()) < 2:
        raise errors.BadOption(f"found {counts}, expected at least two points a dial", key="grid")
    return counts


def _real(image: Tensor) -> Tensor:
    """An image as one real row, so that coefficients are real whatever it is."""
    return (torch.view_as_real(image) if image.is_complex() else image).flatten()


def _picture(rows: Tensor, shape: tuple[int, int], complex_valued: bool) -> Tensor:
    if complex_valued:
        return torch.view_as_complex(rows.reshape(*rows.shape[:-1], *shape, 2).contiguous())
    return rows.reshape(*rows.shape[:-1], *shape)


def _cells(axes: Sequence[Sequence[float]], most: int | None, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Lower corners of the cells of a grid; a random `most` of them where there are more."""
    sizes = [len(axis) - 1 for axis in axes]
    count = math.prod(sizes)
    flat = torch.arange(count) if most is None or count <= most else torch.randperm(count, generator=generator)[:most]
    return [tuple(int(i) for i in torch.unravel_index(n, tuple(sizes))) for n in flat]


def _interpolate(axes: Sequence[Sequence[float]], positions: Sequence[Tensor], values: Tensor) -> Tensor:
    """Multilinear interpolation of `values` `(G, R)` on the grid of `axes` at N positions: `(N, R)`."""
    flat = torch.zeros(len(positions[0]), dtype=torch.long)
    lower, share = [], []
    for axis, p in zip(axes, positions, strict=True):
        a = torch.tensor(axis, dtype=torch.float64)
        i = (torch.searchsorted(a, p.clamp(a[0], a[-1]), right=True) - 1).clamp(0, len(axis) - 2)
        lower.append(i)
        share.append(((p - a[i]) / (a[i + 1] - a[i])).clamp(0, 1))
    total = torch.zeros(len(flat), values.shape[1], dtype=values.dtype, device=values.device)
    for corner in itertools.product((0, 1), repeat=len(axes)):
        index, weight = torch.zeros_like(flat), torch.ones(len(flat), dtype=torch.float64)
        for axis, i, t, side in zip(axes, lower, share, corner, strict=True):
            index = index * len(axis) + i + side
            weight = weight * (t if side else 1 - t)
        total = total + weight.to(values)[:, None] * values[index.to(values.device)]
    return total


def _rebuild_db(exact: Tensor, mean: Tensor, vh: Tensor, coefficients: Tensor) -> Tensor:
    """PSNR `(N, R + 1)` of images rebuilt from 0, 1, …, R components, `exact` `(N, P)` being the truth.

    The components are orthonormal, so ‖exact - mean - Σ c_r v_r‖² = ‖exact - mean‖² + Σ (c_r² - 2 c_r ⟨v_r, exact - mean⟩).
    """
    d = (exact - mean).double()
    overlap, c = d @ vh.double().T, coefficients.double()
    energy = d.square().sum(1, keepdim=True)
    squares = torch.cat((energy, energy + (c.square() - 2 * c * overlap).cumsum(1)), 1)
    # Rounding of the difference above: about float32's, 120 dB.
    squares = torch.maximum(squares, 1e-12 * energy.clamp(min=torch.finfo(torch.float64).tiny))
    return 10 * torch.log10(exact.double().square().amax(1, keepdim=True).clamp(min=1e-300) * exact.shape[1] / squares)


def _finer(axes: list[list[float]], coefficients: Tensor, failing: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """The grid with a new line through each failing cell, across the axis along which the coefficients bend most there."""
    values = coefficients.reshape(*map(len, axes), -1)
    new: list[set[float]] = [set(axis) for axis in axes]
    for cell in failing:
        bends = []
        for d, axis in enumerate(axes):
            line = values.movedim(d, -2)[(*cell[:d], *cell[d + 1 :])]
            i = cell[d]
            around = [j for j in (i - 1, i) if 0 <= j <= len(axis) - 3]  # triples of points that hold this interval
            bends.append(max((_bend(axis, line, j) * (axis[i + 1] - axis[i]) ** 2 for j in around), default=math.inf))
        d = bends.index(max(bends))
        new[d].add((axes[d][cell[d]] + axes[d][cell[d] + 1]) / 2)
    return [sorted(points) for points in new]


def _bend(axis: Sequence[float], line: Tensor, j: int) -> float:
    """Size of the second difference quotient at points j, j + 1, j + 2."""
    a, b, c = axis[j : j + 3]
    slopes = (line[j + 1] - line[j]) / (b - a), (line[j + 2] - line[j + 1]) / (c - b)
    return float((slopes[1] - slopes[0]).norm()) / (c - a)
