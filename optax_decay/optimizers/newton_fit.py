"""Coefficients of the Newton iteration, fitted to the singular values that it will meet.

One step maps a singular value x to ``f(x) = a x + b x³ + c x⁵``; K steps should bring all of them near 1. For a
matrix of m x n (m <= n) divided by its Frobenius norm, the coefficients minimise::

    ρ · mean_i (f^K(s_i) - 1)²  +  (1-ρ) · mean_i (f^K(t_i) - 1)²  +  penalty

with ρ = 1/4. t is the spectrum of a random matrix (Marchenko-Pastur law), s the spectrum of momentum: recorded, or
else a power law ``s_i ~ i^-0.8``. Neither sees every value that training will produce, and an iteration fitted to
gaps in its samples can blow up inside them: the published triple for 2048 x 2048 turns 0.559 into 3.3, and into 679
with one step more. So the penalty holds f^K and f^(K+3) below 1.25 on all of [0, 1] and above 0, and the largest
value of f below its repelling fixed point, so that no number of steps escapes.

Reference: the mixture of one part momentum to three parts random follows descriptions of ROOT (arXiv 2511.20626).

**Differs from the paper.** The authors' code holds four triples and no derivation. With the exponent fitted per shape
(0.65 to 0.875) the procedure above, without penalty, gives each of the four to 0.06 and with the same error; their
digits depend on momenta that were not published.

Pure NumPy and SciPy, run where a shape is first met: 0.1 to 1 s for a triple, a few seconds for a schedule.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_decay.parameters.arguments import check

NODES = 512  # ranks at which a spectrum is sampled
EXPONENT = 0.8
MOMENTUM_SHARE = 0.25
CEILING = 1.25  # where the penalty begins
LIMIT = 1.35  # no result exceeds this on [0, 1]
MARGIN = 0.005  # between the largest value of f and the fixed point that it must not reach
SMALLEST = 32  # narrower matrices use the law of one of this many rows and equal aspect

# Several minima exist: Muon's triple, the four published ones, and one that suits wide matrices.
STARTS = (
    (3.4445, -4.7750, 2.0315),
    (3.4916, -4.8224, 2.1095),
    (3.4509, -4.5790, 1.9325),
    (2.9794, -3.6674, 1.6207),
    (3.1943, -3.8221, 1.5322),
    (2.6, -3.1, 1.57),
)
# Polar Express (arXiv 2505.16932): where the search for schedules begins. Its safety factor 1.01 is applied to all
# steps but the last, and once more to the first, in place of dividing the matrix by 1.01 times its norm.
_POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
POLAR_EXPRESS = tuple(
    (a / 1.01**e, b / 1.01 ** (3 * e), c / 1.01 ** (5 * e))
    for (a, b, c), e in zip(_POLAR, (2, 1, 1, 1, 1, 1, 1, 0))
)
_GRID = np.concatenate([np.geomspace(1e-4, 0.02, 200), np.linspace(0.02, 1, 1801)])


def random_spectrum(shape: tuple[int, int], nodes: int = NODES) -> np.ndarray:
    """Singular values of a Gaussian m x n matrix over its Frobenius norm, as `nodes` quantiles of their law."""
    m, n = _oriented(shape)
    aspect = m / n
    # With eigenvalue = 1 + y - 2 sqrt(y) cos(angle) the density has no singularity, not even for square matrices.
    angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi
    eigenvalue = 1 + aspect - 2 * np.sqrt(aspect) * np.cos(angle)
    density = np.sin(angle) ** 2 / eigenvalue
    below = np.cumsum(density) - density / 2
    ranks = (np.arange(nodes) + 0.5) / nodes
    return np.sqrt(np.interp(ranks, below / density.sum(), eigenvalue) / m)


def power_law_spectrum(
    shape: tuple[int, int], exponent: float = EXPONENT, nodes: int = NODES
) -> np.ndarray:
    """``s_i ~ i^-exponent`` with unit sum of squares, sampled at the middle of `nodes` equal groups of ranks."""
    m, _ = _oriented(shape)
    ranks = (np.arange(nodes) + 0.5) / nodes * m + 0.5 if m > nodes else np.arange(1.0, m + 1)
    values = ranks**-exponent
    return values / np.sqrt(np.mean(values**2) * m)


def _oriented(shape: tuple[int, int]) -> tuple[float, float]:
    m, n = sorted(shape)
    scale = max(1.0, SMALLEST / m)
    return m * scale, n * scale


def iterate(x: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """`coefficients` [K, 3] applied in turn to singular values; overshooting values stop at ±1000."""
    for a, b, c in coefficients:
        square = x * x
        x = np.clip(x * (a + square * (b + square * c)), -1e3, 1e3)
    return x


def largest_output(coefficients: Any, steps: int = 5) -> float:
    """The largest of ``f^K(x)`` over x in [0, 1], for one triple used `steps` times or a schedule [K, 3]."""
    return float(iterate(np.linspace(0, 1, 200_001), _tiled(np.asarray(coefficients), steps)).max())


def escape(triple: np.ndarray) -> float:
    """The largest value of f inside [0, 1] minus its repelling fixed point; negative if no orbit escapes.

    A window around the maximiser that is too narrow for a grid already escapes when this is positive.
    """
    a, b, c = triple
    turning, fixed = 9 * b * b - 20 * a * c, b * b - 4 * c * (a - 1)
    if c <= 0 or turning <= 0 or fixed <= 0:
        return 1.0  # no turning point, or f(x) > x for all x > 1
    peak = np.sqrt(max((-3 * b - np.sqrt(turning)) / (10 * c), 0.0))
    return float(iterate(np.array([peak]), np.array([triple]))[0]) - np.sqrt(
        (-b + np.sqrt(fixed)) / (2 * c)
    )


def error(
    coefficients: Any,
    shape: tuple[int, int],
    steps: int = 5,
    *,
    spectra: Sequence[Any] | None = None,
    exponent: float = EXPONENT,
    share: float = MOMENTUM_SHARE,
) -> float:
    """Root mean squared distance to 1 after the iteration, over the mixture that `fit_coefficients` uses."""
    x, weight = _mixture(shape, spectra, exponent, share)
    out = iterate(x, _tiled(np.asarray(coefficients), steps))
    return float(np.sqrt(np.sum(weight * (out - 1) ** 2)))


def _tiled(coefficients: np.ndarray, steps: int) -> np.ndarray:
    return np.tile(coefficients, (steps, 1)) if coefficients.ndim == 1 else coefficients


def _mixture(
    shape: tuple[int, int], spectra: Sequence[Any] | None, exponent: float, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points and their weights, which sum to 1."""
    if spectra is None:
        momentum = [power_law_spectrum(shape, exponent)]
    else:
        momentum = [np.asarray(s, np.float64).reshape(-1) for s in spectra]
        momentum = [np.sort(s)[::-1] / np.linalg.norm(s) for s in momentum if np.any(s)]
        if not momentum:
            raise ValueError("spectra holds no spectrum with a value other than zero.")
    random = random_spectrum(shape)
    weights = [np.full(len(s), share / len(momentum) / len(s)) for s in momentum]
    weights.append(np.full(len(random), (1 - share) / len(random)))
    return np.concatenate([*momentum, random]), np.concatenate(weights)


def fit_coefficients(
    shape: tuple[int, int],
    *,
    steps: int = 5,
    per_step: bool = False,
    spectra: Sequence[Any] | None = None,
    exponent: float = EXPONENT,
    share: float = MOMENTUM_SHARE,
) -> np.ndarray:
    """Coefficients for matrices of one shape, in either orientation.

    Args:
        shape: rows and columns.
        steps: K, how often the iteration is applied.
        per_step: fit K triples instead of one triple used K times.
        spectra: recorded singular values, one array per matrix, in any scale (`root.momentum_spectra`); None for
            the power law.
        exponent: of the power law, dimensionless.
        share: ρ, how much the momentum's spectrum counts against the random one's, in [0, 1].

    Returns:
        Float64 array [3], or [K, 3] if `per_step`, rounded to four decimals; `largest_output` is at most 1.35 (for
        a triple after K + 3 steps as well).

    Raises:
        ValueError: a number out of its range; spectra that are all zero.
    """
    check("steps", steps, 1, 20)
    check("exponent", exponent, 0.0)
    check("share", share, 0.0, 1.0)
    check("shape", min(shape), 1)
    x, weight = _mixture(tuple(shape), spectra, exponent, share)
    starts = [np.asarray(start) for start in STARTS]
    if per_step:
        index = np.minimum(np.arange(steps), len(POLAR_EXPRESS) - 1)
        starts = [np.asarray(POLAR_EXPRESS)[index]]
    strength = 3.0
    for _ in range(4):
        fitted = np.round(_search(x, weight, starts, steps, strength), 4)
        peaks = [largest_output(fitted, steps)]
        peaks += [] if per_step else [largest_output(fitted, steps + 3)]
        if max(peaks) <= LIMIT:
            return fitted
        strength *= 30
    raise ValueError(
        f"no bounded coefficients were found for shape {shape} and steps={steps} (reached {max(peaks):.3f}); "
        "fit with exponent=0.8, or use coefficients='polar_express'."
    )


def _sensitivity(
    x: np.ndarray, coefficients: np.ndarray, ends: tuple[int, ...]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """``f^k(x)`` for every k in `ends`, and its derivatives with respect to the coefficients."""
    shared = coefficients.ndim == 1
    tiled = _tiled(coefficients, max(ends))
    slope = np.zeros((len(x), *tiled.shape))
    reached = {}
    for k, (a, b, c) in enumerate(tiled):
        square = x * x
        slope *= np.where(np.abs(x) < 1e3, a + square * (3 * b + 5 * c * square), 0)[:, None, None]
        slope[:, k] = np.stack([x, x * square, x * square * square], axis=1)
        x = iterate(x, tiled[k : k + 1])
        if k + 1 in ends:
            total = slope.sum(axis=1) if shared else slope.reshape(len(x), -1)
            reached[k + 1] = x, total.copy()
    return reached


def _search(
    x: np.ndarray, weight: np.ndarray, starts: list[np.ndarray], steps: int, strength: float
) -> np.ndarray:
    import scipy.optimize  # a second at import that most runs need not spend

    form = starts[0].shape
    points, split = np.concatenate([x, _GRID]), len(x)
    root, scale = np.sqrt(weight), np.sqrt(strength / len(_GRID))
    if len(form) == 1:  # one triple may be used for more steps
        ceilings = {steps: CEILING, steps + 3: CEILING}
    else:  # a schedule ends after K steps, but blows up where any of them leaves the range of the next
        prefixes = [starts[0][:k] for k in range(1, steps)]
        ceilings = {k + 1: 1.05 * largest_output(p) for k, p in enumerate(prefixes)}
        ceilings[steps] = CEILING

    def residuals(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reached = _sensitivity(points, flat.reshape(form), tuple(ceilings))
        y, slope = reached[steps]
        values, rows = [root * (y[:split] - 1)], [root[:, None] * slope[:split]]
        for k, ceiling in ceilings.items():
            y, slope = reached[k][0][split:], reached[k][1][split:]
            values += [scale * np.maximum(y - ceiling, 0), np.minimum(y, 0)]
            rows += [scale * (y > ceiling)[:, None] * slope, (y < 0)[:, None] * slope]
        if len(form) == 1:
            excess = escape(flat) + MARGIN
            nudged = [escape(flat + 1e-6 * unit) + MARGIN - excess for unit in np.eye(3)]
            values.append(np.array([10 * max(excess, 0.0)]))
            rows.append(np.array([nudged]) * 1e7 * (excess > 0))
        return np.concatenate(values), np.concatenate(rows)

    fits = [
        scipy.optimize.least_squares(
            lambda flat: residuals(flat)[0],
            start.ravel(),
            lambda flat: residuals(flat)[1],
            max_nfev=100,
        )
        for start in starts
    ]
    return min(fits, key=lambda fit: fit.cost).x.reshape(form)
