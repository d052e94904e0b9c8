"""Coefficients of the Newton iteration, fitted to the singular values of the matrices it is applied to.

One step maps a singular value x to ``f(x) = a x + b x³ + c x⁵``, and K steps should bring every x near 1. For an m x n
matrix (m <= n) divided by its Frobenius norm, the coefficients minimise::

    ρ · mean_i (f^K(s_i) - 1)²  +  (1-ρ) · mean_i (f^K(t_i) - 1)²  +  penalty

with ρ = 1/4. t is the spectrum of a random matrix (Marchenko-Pastur law). s is the spectrum of a momentum, either
recorded or a power law ``s_i ~ i^-0.8``. Neither contains every value that occurs in training, and an iteration fitted
to samples can blow up between them: the published triple for 2048 x 2048 maps 0.559 to 3.3 in five steps, and to 679 in
six. The penalty therefore keeps f^K and f^(K+3) between 0 and 1.25 on all of [0, 1], and the largest value of f below
its repelling fixed point, so that no number of steps diverges.

Reference: the mixture of one part momentum and three parts random matrix follows descriptions of ROOT
(arXiv 2511.20626).

**Differs from the paper.** The authors' code contains four triples and no derivation. With an exponent chosen per shape
(0.65 to 0.875) the procedure above, without the penalty, reproduces each of the four to 0.06 and with the same error.
Their exact digits depend on momenta that were not published.

The fit runs in NumPy and SciPy when a shape is first met. It takes 0.1 to 1 s for a triple and a few seconds for one
triple per step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_decay.parameters.arguments import check

NODES = 512  # number of ranks at which a spectrum is sampled
EXPONENT = 0.8
MOMENTUM_SHARE = 0.25
CEILING = 1.25  # the penalty begins here
LIMIT = 1.35  # no result exceeds this on [0, 1]
MARGIN = 0.005  # least distance between the largest value of f and its repelling fixed point
SMALLEST = 32  # narrower matrices use the spectrum of a matrix with this many rows and the same aspect ratio

# Recorded singular values, one array per matrix, or the exponent of a power law.
Spectra = Sequence[Any] | float

# The objective has several minima. The search starts from Muon's triple, the four published ones, and one that suits
# wide matrices.
STARTS = (
    (3.4445, -4.7750, 2.0315),
    (3.4916, -4.8224, 2.1095),
    (3.4509, -4.5790, 1.9325),
    (2.9794, -3.6674, 1.6207),
    (3.1943, -3.8221, 1.5322),
    (2.6, -3.1, 1.57),
)
# Polar Express (arXiv 2505.16932), where the search for one triple per step begins. Its safety factor 1.01 is applied
# to all steps but the last. It is applied twice to the first, instead of dividing the matrix by 1.01 times its norm.
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
    m, n = _enlarged(shape)
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
    m, _ = _enlarged(shape)
    ranks = (np.arange(nodes) + 0.5) / nodes * m + 0.5 if m > nodes else np.arange(1.0, m + 1)
    values = ranks**-exponent
    return values / np.sqrt(np.mean(values**2) * m)


def _enlarged(shape: tuple[int, int]) -> tuple[float, float]:
    """(smaller, larger) side; narrow matrices are enlarged to `SMALLEST` rows."""
    m, n = sorted(shape)
    scale = max(1.0, SMALLEST / m)
    return m * scale, n * scale


def iterate(x: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Singular values after the steps `coefficients` [K, 3]; values that overshoot are clipped at ±1000."""
    for a, b, c in coefficients:
        square = x * x
        x = np.clip(x * (a + square * (b + square * c)), -1e3, 1e3)
    return x


def largest_output(coefficients: Any, steps: int = 5) -> float:
    """The largest ``f^K(x)`` over x in [0, 1], for one triple used `steps` times or one triple per step, [K, 3]."""
    table = _one_per_step(np.asarray(coefficients), steps)
    return float(iterate(np.linspace(0, 1, 200_001), table).max())


def divergence_margin(triple: np.ndarray) -> float:
    """The largest value of f inside [0, 1] minus its repelling fixed point; negative if no start diverges.

    If it is positive, values in a window around the maximiser diverge, even if a grid is too coarse to show it.
    """
    a, b, c = triple
    turning, fixed = 9 * b * b - 20 * a * c, b * b - 4 * c * (a - 1)
    if c <= 0 or turning <= 0 or fixed <= 0:
        return 1.0  # no turning point, or f(x) > x for all x > 1
    peak = np.sqrt(max((-3 * b - np.sqrt(turning)) / (10 * c), 0.0))
    return float(iterate(np.array([peak]), np.array([triple]))[0]) - np.sqrt(
        (-b + np.sqrt(fixed)) / (2 * c)
    )


def rms_error(
    coefficients: Any,
    shape: tuple[int, int],
    steps: int = 5,
    *,
    spectra: Spectra = EXPONENT,
    share: float = MOMENTUM_SHARE,
) -> float:
    """Root mean squared distance to 1 after the iteration, over the mixture that `fit_coefficients` uses."""
    x, weight = _mixture(shape, spectra, share)
    out = iterate(x, _one_per_step(np.asarray(coefficients), steps))
    return float(np.sqrt(np.sum(weight * (out - 1) ** 2)))


def _one_per_step(coefficients: np.ndarray, steps: int) -> np.ndarray:
    return np.tile(coefficients, (steps, 1)) if coefficients.ndim == 1 else coefficients


def _mixture(
    shape: tuple[int, int], spectra: Spectra, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points and their weights, which sum to 1."""
    if isinstance(spectra, int | float):
        momentum = [power_law_spectrum(shape, spectra)]
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
    spectra: Spectra = EXPONENT,
    share: float = MOMENTUM_SHARE,
) -> np.ndarray:
    """Coefficients for matrices of one shape, in either orientation.

    Args:
        shape: rows and columns.
        steps: K, the number of steps, in [1, 20].
        per_step: fit K triples instead of one triple that is used K times.
        spectra: the spectrum of the momentum: recorded singular values, one array per matrix, in any scale
            (`root.momentum_spectra`); or the exponent of a power law, dimensionless, >= 0.
        share: ρ, the weight of the momentum's spectrum, in [0, 1]; that of the random matrix has the weight 1-ρ.

    Returns:
        Float64 array [3], or [K, 3] if `per_step`, rounded to four decimals. `largest_output` is at most 1.35, for a
        single triple after K + 3 steps as well.

    Raises:
        ValueError: a number out of its range; spectra that are all zero.
    """
    check("steps", steps, 1, 20)
    if isinstance(spectra, int | float):
        check("spectra", spectra, 0.0)
    check("share", share, 0.0, 1.0)
    check("shape", min(shape), 1)
    x, weight = _mixture(shape, spectra, share)
    starts = [np.asarray(start) for start in STARTS]
    if per_step:
        index = np.minimum(np.arange(steps), len(POLAR_EXPRESS) - 1)
        starts = [np.asarray(POLAR_EXPRESS)[index]]
    strength = 3.0
    for _ in range(4):
        fitted = np.round(_least_squares(x, weight, starts, steps, strength), 4)
        peaks = [largest_output(fitted, steps)]
        peaks += [] if per_step else [largest_output(fitted, steps + 3)]
        if max(peaks) <= LIMIT:
            return fitted
        strength *= 30
    raise ValueError(
        f"no bounded coefficients were found for shape {shape} and steps={steps} (reached {max(peaks):.3f}); "
        "fit with spectra=0.8, or use the coefficients polar_express()."
    )


def _sensitivity(
    x: np.ndarray, coefficients: np.ndarray, ends: tuple[int, ...]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """``f^k(x)`` for every k in `ends`, and its derivatives with respect to the coefficients."""
    shared = coefficients.ndim == 1
    tiled = _one_per_step(coefficients, max(ends))
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


def _least_squares(
    x: np.ndarray, weight: np.ndarray, starts: list[np.ndarray], steps: int, strength: float
) -> np.ndarray:
    """The coefficients with the smallest objective, over searches from all `starts`."""
    import scipy.optimize  # importing it takes a second, which most runs need not spend

    form = starts[0].shape
    points, split = np.concatenate([x, _GRID]), len(x)
    root, scale = np.sqrt(weight), np.sqrt(strength / len(_GRID))
    if len(form) == 1:  # a single triple may be used for more steps
        ceilings = {steps: CEILING, steps + 3: CEILING}
    else:  # one triple per step ends after K steps, but diverges where a step leaves the range of the next
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
            excess = divergence_margin(flat) + MARGIN
            nudged = [divergence_margin(flat + 1e-6 * unit) + MARGIN - excess for unit in np.eye(3)]
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
