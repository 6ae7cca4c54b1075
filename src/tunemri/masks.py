"""Which points of k-space are measured: sampling patterns as pure functions of shape, acceleration and seed.

Every family is a function `f(shape, acceleration, *, seed=0, …) -> mask`: a float32 tensor `(H, W)` of 0 and 1 with
zero frequency at `(H // 2, W // 2)`. The same seed gives the same mask. The acceleration is the true one, grid points
per sampled point: families made of points meet it exactly (to one point), families made of lines or curves come as
near as whole lines and curves allow. Acceleration 1 samples everything.

Point families draw without replacement, so their count needs no search. For the others the fraction sampled grows
with one number (spokes, turns, minimum distance), which is searched for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import errors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MASKS",
    "TASKS",
    "cartesian_equispaced",
    "cartesian_random",
    "centre",
    "describe",
    "full",
    "gaussian",
    "make_mask",
    "options",
    "poisson",
    "radial",
    "radial_golden",
    "random",
    "spiral",
]

Shape = tuple[int, int]
PhaseAxis = Literal["columns", "rows"]
_GOLDEN_ANGLE = math.pi * (math.sqrt(5) - 1) / 2  # 111.25°: the golden section of half a turn


def poisson(
    shape: Shape,
    acceleration: float,
    *,
    seed: int = 0,
    calibration: int | tuple[int, int] | None = None,
    order: float | None = None,
) -> Tensor:
    """Variable-density Poisson disk: random points that keep a distance, which grows away from the centre.

    Points are visited in random order; one is kept unless it lies closer to a point q kept before than

        r(q) = a (1 - |q|)^(-order / 2),    |q| = 0 at zero frequency, 1 in the corners,

    so that the density falls as the polynomial (1 - |q|)^order. Squares of distances on a grid are whole numbers,
    which alone would give rings of constant density; each r² is therefore dithered by up to ± 1 (less where r² is
    below 3/2, so that the centre can be full). The factor a is searched until slightly too many points fit, and the
    surplus is removed at random: the count is exact and all distances stay, |p - q|² ≥ r² - 1.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1.
        seed: ≥ 0.
        calibration: side, or `(rows, columns)`, of the block around zero frequency that is sampled completely;
            None takes an eighth of the grid, at most 24; 0 keeps zero frequency only.
        order: fall-off of the density, 0 to 20; 0 is uniform. None takes 2 log₂ R - 1 for acceleration R, at least 1,
            which served total variation best on brain images (1 at 2×, 3 at 4×, 5 at 8×).

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range, or a calibration block larger than all samples together.

    Source: R. Bridson, "Fast Poisson disk sampling in arbitrary dimensions", 2007; variable density as in
    M. Lustig, M. Alley, S. Vasanawala, D. Donoho, J. Pauly, "L1 SPIR-iT", 2009.
    """
    count = _count(shape, acceleration)
    if order is None:
        order = max(1.0, 2 * math.log2(acceleration) - 1)
    _check_order(order)
    rng = _generator(seed)
    block = _calibration(shape, calibration, count)
    visits = rng.permutation(_size(shape))
    noise = rng.uniform(-1, 1, shape)
    falloff = (1 - np.minimum(_radius(shape) / math.sqrt(2), 0.95)) ** (-order / 2)
    # Larger disks would leave the corners empty, and cost the more.
    largest = max(max(shape) / 8, 3 * math.sqrt(acceleration)) ** 2

    # Points that keep a distance r have the density min(1, 0.7 / r²): solve that model for a, correct its aim by what
    # really fitted, and again. Bounds on a guard the search; a factor that is too small always fits enough points.
    aim = 1.005 * count
    low, high = -math.inf, math.inf
    best = np.ones(shape, dtype=bool)
    for _ in range(12):
        log_a = _match_density(falloff, aim)
        if not low < log_a < high:
            log_a = (low + high) / 2
        if not math.isfinite(log_a):
            break
        r2 = np.minimum(math.exp(2 * log_a) * falloff**2, largest)
        kept = _throw_darts(visits, r2 + noise * np.clip(r2 - 0.5, 0, 1), block)
        n = int(kept.sum())
        if n >= count:
            low, best = log_a, (kept if n <= best.sum() else best)
        else:
            high = log_a
        if count <= n <= 1.01 * count + 1 or high - low < 1e-3:
            break
        aim = min(max(1.0, aim * (1.005 * count + 0.5) / n), float(_size(shape)))
    surplus = np.flatnonzero(best & ~block)
    best.flat[rng.permutation(surplus)[: int(best.sum()) - count]] = False
    return _tensor(best)


def _match_density(falloff: NDArray[np.float64], count: float) -> float:
    """log a such that densities min(1, 0.7 / (a falloff)²) add up to `count`."""
    low, high = -math.log(falloff.max()) - 1, 0.5 * math.log(falloff.size)
    for _ in range(20):
        log_a = (low + high) / 2
        fits = np.minimum(1, 0.7 * math.exp(-2 * log_a) / falloff**2).sum()
        low, high = (log_a, high) if fits > count else (low, log_a)
    return (low + high) / 2


def _throw_darts(
    visits: NDArray[np.int64], squared_distance: NDArray[np.float64], block: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Keep the block, then each visited point that no point kept before claims with its disk, r² given per point."""
    h, w = block.shape
    # A margin as wide as the largest disk spares the bounds checks.
    margin = min(math.ceil(math.sqrt(max(0.0, squared_distance.max()))), max(h, w))
    stride = w + 2 * margin
    # Whole-numbered squares: the points closer than r are those with squared distance ≤ ⌈r²⌉ - 1.
    level = np.clip(np.ceil(squared_distance).astype(np.int64) - 1, 0, margin**2)
    dy, dx = np.mgrid[-margin : margin + 1, -margin : margin + 1]
    squared = dy**2 + dx**2
    by_distance = np.argsort(squared, axis=None, kind="stable")
    offsets = (dy * stride + dx).ravel()[by_distance]
    ends = np.searchsorted(squared.ravel()[by_distance], np.arange(int(level.max()) + 1), side="right")
    disks = [offsets[:end] for end in ends]

    # The visit loop is sequential by nature; a bytearray is the fastest thing to ask, its numpy view to write.
    claimed = bytearray((h + 2 * margin) * stride)
    writable = np.frombuffer(claimed, dtype=np.uint8)
    kept = block.copy()
    rows, columns = np.divmod(np.concatenate([np.flatnonzero(block), visits]), w)
    places = ((rows + margin) * stride + columns + margin).tolist()
    levels = level[rows, columns].tolist()
    accepted = []
    first_visit = len(places) - len(visits)
    for i, (place, m) in enumerate(zip(places, levels, strict=True)):
        if i >= first_visit and claimed[place]:
            continue
        accepted.append(i)
        if m > 0:
            writable[place + disks[m]] = 1
    kept[rows[accepted], columns[accepted]] = True
    return kept


def cartesian_random(
    shape: Shape,
    acceleration: float,
    *,
    seed: int = 0,
    center_fraction: float | None = None,
    phase_axis: PhaseAxis = "columns",
) -> Tensor:
    """Whole lines: those in the centre, and others drawn uniformly at random.

    The fastMRI rule, except that the number of lines is drawn exactly and not on average.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid lines per sampled line, ≥ 1.
        seed: ≥ 0.
        center_fraction: fraction of the lines around zero frequency that are sampled completely, in (0, 1); None
            takes 0.32 / acceleration (0.08 at 4×, 0.04 at 8×).
        phase_axis: the axis along which the mask varies: "columns" (last axis, as in fastMRI files) or "rows".

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range, or more central lines than the acceleration allows altogether.

    Source: J. Zbontar et al., "fastMRI: an open dataset and benchmarks for accelerated MRI", 2018.
    """
    centre, count = _lines(shape, acceleration, center_fraction, phase_axis)
    others = np.flatnonzero(~centre)
    lines = centre.copy()
    lines[_generator(seed).permutation(others)[: count - int(centre.sum())]] = True
    return _spread(lines, shape, phase_axis)


def cartesian_equispaced(
    shape: Shape,
    acceleration: float,
    *,
    seed: int = 0,
    center_fraction: float | None = None,
    phase_axis: PhaseAxis = "columns",
) -> Tensor:
    """Whole lines: those in the centre, and others at equal distances; the seed moves the first one.

    Lines sit at round(offset + k s). The spacing s starts as in fastMRI from the value that makes up for the central
    lines, s = R (W - c) / (W - R c) with c of W lines central, and is adjusted until the count is right.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid lines per sampled line, ≥ 1.
        seed: ≥ 0.
        center_fraction: fraction of the lines around zero frequency that are sampled completely, in (0, 1); None
            takes 0.32 / acceleration (0.08 at 4×, 0.04 at 8×).
        phase_axis: the axis along which the mask varies: "columns" (last axis, as in fastMRI files) or "rows".

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range, or more central lines than the acceleration allows altogether.

    Source: J. Zbontar et al., "fastMRI: an open dataset and benchmarks for accelerated MRI", 2018.
    """
    centre, count = _lines(shape, acceleration, center_fraction, phase_axis)
    start = _generator(seed).random()
    size, middle = len(centre), int(centre.sum())
    if count <= middle:
        return _spread(centre, shape, phase_axis)

    def lines(spacing: float) -> NDArray[np.bool_]:
        chosen = centre.copy()
        places = np.rint(np.arange(start * spacing, size, spacing)).astype(int)
        chosen[places[places < size]] = True
        return chosen

    nominal = max(1.0, (size - middle) / (count - middle))
    # Nearest count first, then nearest spacing: sorted() is stable and the candidates start at the nominal one.
    factors = sorted(np.linspace(0.5, 2.0, 601), key=lambda f: abs(math.log(f)))
    spacing = min((nominal * f for f in factors), key=lambda s: abs(int(lines(s).sum()) - count))
    return _spread(lines(spacing), shape, phase_axis)


def radial(shape: Shape, acceleration: float, *, seed: int = 0) -> Tensor:
    """Pseudo-radial: straight lines through the centre at equal angles, drawn on the grid.

    n lines at the angles π k / n, k = 0 … n - 1, each one pixel thick: a line nearer to the row axis has one point in
    each column, round(tan θ · column), and the other way round. At 256 × 256 this gives the masks of the ISTA-Net and
    ADMM-Net papers bit for bit: 27, 55, 85, 117 and 152 lines sample 10, 20, 30, 40 and 50 %.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1; met as nearly as a whole number of lines allows.
        seed: has no effect, there is nothing random; for a pattern that turns see `radial_golden`.

    Returns:
        mask `(H, W)`, symmetric about zero frequency.

    Raises:
        BadOption: an argument out of range.
    """
    count = _count(shape, acceleration)
    _generator(seed)
    return _tensor(_search_lines(shape, count, lambda n: np.linspace(0, math.pi, n, endpoint=False)))


def radial_golden(shape: Shape, acceleration: float, *, seed: int = 0) -> Tensor:
    """Golden-angle radial: straight lines through the centre, each 111.25° after the one before, drawn on the grid.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1; met as nearly as a whole number of lines allows.
        seed: ≥ 0, turns the first line.

    Returns:
        mask `(H, W)`, symmetric about zero frequency.

    Raises:
        BadOption: an argument out of range.

    Source: S. Winkelmann et al., "An optimal radial profile order based on the golden ratio", 2007.
    """
    count = _count(shape, acceleration)
    first = _generator(seed).random() * math.pi
    return _tensor(_search_lines(shape, count, lambda n: first + _GOLDEN_ANGLE * np.arange(n)))


def spiral(shape: Shape, acceleration: float, *, seed: int = 0, interleaves: int = 4, order: float = 6.0) -> Tensor:
    """Interleaved spirals from the centre to the edge, drawn on the grid; the corners stay empty.

    Arm j follows, for t from 0 to 1,

        radius = t^(1 + order / 2),    angle = 2π (turns · t + j / interleaves) + start,

    in units of half the grid, so that order 0 is Archimedean (uniform) and larger orders put more turns into the
    centre, up to a density ∝ 1 / radius. The number of turns, not necessarily whole, is searched.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1; below 1.3 the corners would be needed.
        seed: ≥ 0, turns the arms.
        interleaves: number of arms, ≥ 1.
        order: fall-off of the density, 0 to 20; 0 is uniform.

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range.
    """
    count = _count(shape, acceleration)
    if isinstance(interleaves, bool) or interleaves != int(interleaves) or interleaves < 1:
        raise errors.BadOption(f"found {interleaves}, expected a whole number ≥ 1", key="interleaves")
    _check_order(order)
    start = _generator(seed).random()
    if count == _size(shape):
        return _tensor(np.ones(shape, dtype=bool))
    h, w = shape
    arms = np.arange(interleaves)[:, None] / interleaves + start

    def draw(turns: float) -> NDArray[np.bool_]:
        # At most one pixel per step, also at the rim, where the arms move fastest.
        steps = 2 + int(max(h, w) * (1 + order / 2 + math.pi * turns))
        t = np.linspace(0, 1, steps)
        radius, angle = t ** (1 + order / 2), 2 * math.pi * (turns * t + arms)
        rows = np.rint(h // 2 + h / 2 * radius * np.sin(angle)).astype(int)
        columns = np.rint(w // 2 + w / 2 * radius * np.cos(angle)).astype(int)
        inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
        mask = np.zeros(shape, dtype=bool)
        mask[rows[inside], columns[inside]] = True
        return mask

    # With this many turns neighbouring arms are less than a pixel apart even at the rim: the disk is full.
    low, high = 0.0, max(h, w) * (1 + order / 2) / interleaves
    masks = [draw(low), draw(high)]
    for _ in range(14):
        middle = (low + high) / 2
        masks.append(draw(middle))
        low, high = (middle, high) if masks[-1].sum() < count else (low, middle)
    return _tensor(min(masks, key=lambda mask: abs(int(mask.sum()) - count)))


def gaussian(
    shape: Shape,
    acceleration: float,
    *,
    seed: int = 0,
    calibration: int | tuple[int, int] | None = None,
    width: float = 0.2,
) -> Tensor:
    """Random points whose density is a Gaussian around zero frequency.

    Points are drawn one after the other without replacement, each with probability ∝ exp(-|k|² / (2 width²)).

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1.
        seed: ≥ 0.
        calibration: side, or `(rows, columns)`, of the block around zero frequency that is sampled completely;
            None takes an eighth of the grid, at most 24; 0 keeps zero frequency only.
        width: standard deviation as a fraction of the grid, > 0.

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range, or a calibration block larger than all samples together.
    """
    count = _count(shape, acceleration)
    if not (math.isfinite(width) and width > 0):
        raise errors.BadOption(f"found {width}, expected a finite number > 0", key="width", help="0.2 is the default")
    mask = _calibration(shape, calibration, count)
    # The k largest log-weights plus Gumbel noise are a weighted draw without replacement (Vieira, 2014).
    key = -((_radius(shape) / (2 * width)) ** 2) / 2 + _generator(seed).gumbel(size=shape)
    key[mask] = np.inf
    mask.flat[np.argsort(-key, axis=None, kind="stable")[:count]] = True
    return _tensor(mask)


def random(shape: Shape, acceleration: float, *, seed: int = 0) -> Tensor:
    """Random points, uniform over the grid; not even zero frequency is sure.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1.
        seed: ≥ 0.

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range.
    """
    count = _count(shape, acceleration)
    mask = np.zeros(shape, dtype=bool)
    mask.flat[_generator(seed).permutation(_size(shape))[:count]] = True
    return _tensor(mask)


def full(shape: Shape, acceleration: float = 1.0, *, seed: int = 0) -> Tensor:
    """All of k-space, whatever the acceleration: what is left to do is to remove noise.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration, seed: of no effect.

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range.
    """
    _count(shape, acceleration)
    return _tensor(np.ones(shape, dtype=bool))


def centre(shape: Shape, acceleration: float, *, seed: int = 0) -> Tensor:
    """A central block alone, as of a smaller matrix: what is left to do is superresolution, 16× for 4 along each axis.

    Arguments:
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1.
        seed: of no effect.

    Returns:
        mask `(H, W)`.

    Raises:
        BadOption: an argument out of range.
    """
    _count(shape, acceleration)
    mask = np.zeros(shape, dtype=bool)
    rows, columns = (max(1, round(n / math.sqrt(acceleration))) for n in shape)
    top, left = shape[0] // 2 - rows // 2, shape[1] // 2 - columns // 2
    mask[top : top + rows, left : left + columns] = True
    return _tensor(mask)


MASKS: dict[str, Callable[..., Tensor]] = {
    "poisson": poisson,
    "cartesian-random": cartesian_random,
    "cartesian-equispaced": cartesian_equispaced,
    "radial": radial,
    "radial-golden": radial_golden,
    "spiral": spiral,
    "gaussian": gaussian,
    "random": random,
}

# For tasks other than compressed sensing: nothing random about them, and one has no acceleration.
TASKS: dict[str, Callable[..., Tensor]] = {"full": full, "centre": centre}


def make_mask(name: str, shape: Shape, acceleration: float, *, seed: int = 0, **options: Any) -> Tensor:
    """The mask of the family called `name`, with that family's own options.

    Arguments:
        name: a key of `MASKS` or of `TASKS`.
        shape: `(H, W)` of the grid.
        acceleration: grid points per sampled point, ≥ 1.
        seed: ≥ 0.
        options: see the family's function, or `options(name)`.

    Returns:
        mask `(H, W)`, float32.

    Raises:
        BadOption: unknown family or option, a value out of range, or an acceleration that the family cannot come
            within a quarter of on this grid.
    """
    family = _family(name)
    known = _options(name)
    for option in options:
        if option not in known:
            # Options of other families are a common slip: say what this one takes.
            raise errors.BadOption(
                f"{name} masks take no such option", key=option, help=errors.did_you_mean(option, known)
            )
    mask = family(shape, acceleration, seed=seed, **options)
    measured = mask.numel() / float(mask.sum())
    if name != "full" and not 0.8 <= measured / acceleration <= 1.25:
        raise errors.BadOption(
            f"a {name} mask of {shape[0]}×{shape[1]} cannot have {acceleration:g}, the nearest is {measured:.3g}",
            key="acceleration",
            help="take another acceleration or another mask",
        )
    return mask


def describe(name: str) -> str:
    """One line about the family called `name`; raises `BadOption` for an unknown one."""
    return (inspect.getdoc(_family(name)) or "").split("\n", 1)[0]


def options(name: str) -> dict[str, Any]:
    """The options that the family called `name` takes, with their defaults; raises `BadOption` for an unknown one."""
    return _options(name)


def _options(name: str) -> dict[str, Any]:
    parameters = inspect.signature(_family(name)).parameters
    return {key: p.default for key, p in parameters.items() if key not in ("shape", "acceleration", "seed")}


def _family(name: str) -> Callable[..., Tensor]:
    known = MASKS | TASKS
    if name not in known:
        raise errors.BadOption(
            f"no mask family is called {name!r}", key="mask", help=errors.did_you_mean(str(name), known)
        )
    return known[name]


def _count(shape: Shape, acceleration: float) -> int:
    """Number of points that meets the acceleration; checks the two arguments that every family has."""
    if len(shape) != 2 or any(not isinstance(size, (int, np.integer)) or size < 1 for size in shape):
        raise errors.BadOption(f"found {tuple(shape)}, expected (rows, columns) of at least 1 each", key="shape")
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise errors.BadOption(
            f"found {acceleration}, expected a finite number ≥ 1", key="acceleration", help="1 samples everything"
        )
    return max(1, round(_size(shape) / acceleration))


def _check_order(order: float) -> None:
    if not 0 <= order <= 20:
        raise errors.BadOption(f"found {order}, expected a number from 0 to 20", key="order", help="0 is uniform")


def _size(shape: Shape) -> int:
    return shape[0] * shape[1]


def _generator(seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise errors.BadOption(f"found {seed!r}, expected a whole number ≥ 0", key="seed")
    return np.random.default_rng(seed)


def _radius(shape: Shape) -> NDArray[np.float64]:
    """Distance from zero frequency in units of half the grid, `(H, W)`: 1 at the edges, √2 in the corners."""
    y, x = ((np.arange(size) - size // 2) / (size / 2) for size in shape)
    return np.hypot(y[:, None], x)


def _calibration(shape: Shape, calibration: int | tuple[int, int] | None, count: int) -> NDArray[np.bool_]:
    """The block around zero frequency that is sampled completely; zero frequency always is."""
    if calibration is None:
        sides = [max(1, min(24, size // 8)) for size in shape]
        while sides[0] * sides[1] > max(1, count // 2):  # leave half of the samples for the rest
            sides = [max(1, side - 1) for side in sides]
    else:
        sides = [calibration] * 2 if isinstance(calibration, int) else list(calibration)
        if (
            len(sides) != 2
            or any(not isinstance(side, int) for side in sides)
            or not all(0 <= side <= size for side, size in zip(sides, shape, strict=True))
        ):
            raise errors.BadOption(
                f"found {calibration}, expected a whole number, or two, from 0 to the size of the grid",
                key="calibration",
            )
        sides = [max(1, side) for side in sides]
        if sides[0] * sides[1] > count:
            raise errors.BadOption(
                f"a block of {sides[0]}×{sides[1]} is more than the {count} points that the acceleration allows",
                key="calibration",
                help="take a smaller block or a lower acceleration",
            )
    block = np.zeros(shape, dtype=bool)
    top, left = (size // 2 - side // 2 for size, side in zip(shape, sides, strict=True))
    block[top : top + sides[0], left : left + sides[1]] = True
    return block


def _lines(
    shape: Shape, acceleration: float, center_fraction: float | None, phase_axis: PhaseAxis
) -> tuple[NDArray[np.bool_], int]:
    """The central lines, and the number of all lines."""
    _count(shape, acceleration)
    if phase_axis not in ("columns", "rows"):
        raise errors.BadOption(f"found {phase_axis!r}, expected 'columns' or 'rows'", key="phase_axis")
    if center_fraction is not None and not 0 < center_fraction < 1:
        raise errors.BadOption(
            f"found {center_fraction}, expected a number between 0 and 1", key="center_fraction",
            help="0.08 at 4×, 0.04 at 8×",
        )  # fmt: skip
    size = shape[1 if phase_axis == "columns" else 0]
    count = max(1, round(size / acceleration))
    fraction = 0.32 / acceleration if center_fraction is None else center_fraction
    middle = max(1, round(size * fraction))
    if middle > count:
        raise errors.BadOption(
            f"{middle} central lines are more than the {count} that acceleration {acceleration:g} allows",
            key="center_fraction", help=f"take less than {1 / acceleration:.3g}",
        )  # fmt: skip
    centre = np.zeros(size, dtype=bool)
    first = (size - middle + 1) // 2
    centre[first : first + middle] = True
    return centre, count


def _spread(lines: NDArray[np.bool_], shape: Shape, phase_axis: PhaseAxis) -> Tensor:
    along = lines[None, :] if phase_axis == "columns" else lines[:, None]
    return _tensor(np.broadcast_to(along, shape))


def _search_lines(shape: Shape, count: int, angles: Callable[[int], NDArray[Any]]) -> NDArray[np.bool_]:
    """Lines through the centre at `angles(n)`, with the n that samples most nearly `count` points."""
    if count == _size(shape):
        return np.ones(shape, dtype=bool)
    drawn: dict[int, NDArray[np.bool_]] = {}

    def points(n: int) -> int:
        if n not in drawn:
            drawn[n] = _draw_lines(shape, angles(n))
        return int(drawn[n].sum())

    low, high = 1, 1
    while points(high) < count and high < 4 * max(shape):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if points(middle) < count else (low, middle)
    # Equal angles overlap more for some n than for others: the fraction wavers on its way up, so look around too.
    nearest = min(range(max(1, low - 4), high + 5), key=lambda n: abs(points(n) - count))
    return drawn[nearest]


def _draw_lines(shape: Shape, angles: NDArray[Any]) -> NDArray[np.bool_]:
    """One-pixel lines through zero frequency, `(H, W)`; the angle is 0 along a row."""
    h, w = shape
    mask = np.zeros(shape, dtype=bool)
    cosine, sine = np.cos(angles), np.sin(angles)
    flat = np.abs(sine) <= np.abs(cosine)
    # Only the frequencies that have a mirror image: of an even size the first row and column stay empty.
    y, x = (np.arange(-((size - 1) // 2), (size - 1) // 2 + 1) for size in shape)
    rows = np.rint(np.tan(angles[flat])[:, None] * x).astype(int)
    columns = np.rint((cosine[~flat] / sine[~flat])[:, None] * y).astype(int)
    for row, column in ((rows, np.broadcast_to(x, rows.shape)), (np.broadcast_to(y, columns.shape), columns)):
        inside = (np.abs(row) <= (h - 1) // 2) & (np.abs(column) <= (w - 1) // 2)
        mask[h // 2 + row[inside], w // 2 + column[inside]] = True
    return mask


def _tensor(mask: NDArray[np.bool_]) -> Tensor:
    import torch  # here alone, so that the list of families is quick

    return torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))
