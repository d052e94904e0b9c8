"""The spectral metrics of AlphaDecay in float64 NumPy, eigenvalue by eigenvalue, from singular values."""

import math

import numpy as np

RANK_FLOOR = 6e-5
ZERO = 1e-5


def eigenvalues(w, conv_norm=0.5):
    """Ascending squared singular values; a 3-d array is a stack of kernel positions whose values are pooled."""
    w = np.asarray(w, np.float64)
    if w.ndim == 3:
        w = w * math.sqrt(conv_norm)
    return np.sort(np.linalg.svd(w, compute_uv=False).ravel() ** 2)


def exponent(lam, i):
    tail = lam[i:]
    with np.errstate(divide="ignore"):
        return 1 + len(tail) / np.sum(np.log(tail / tail[0]))


def distance(lam, i):
    tail, alpha = lam[i:], exponent(lam, i)
    if not alpha > 1:
        return 1.0
    j = np.arange(len(tail))
    return np.max(np.abs(1 - (tail / tail[0]) ** (1 - alpha) - j / len(tail)))


def peak(lam, bins=100):
    """Left edge of the fullest of 100 bins of log10 λ."""
    counts, edges = np.histogram(np.log10(lam), bins=bins)
    return 10 ** edges[np.argmax(counts)]


def alpha(lam, fit="median", xmin_pos=2.0, filter_zeros=False):
    if filter_zeros and np.any(lam > ZERO):
        lam = lam[lam > ZERO]
    if fit == "median":
        return exponent(lam, int(len(lam) / xmin_pos))
    candidates = range(len(lam) - 1)
    if fit == "fix-finger":
        p = peak(lam)
        candidates = [i for i in candidates if 0.95 * p <= lam[i] <= 1.5 * p]
    return exponent(lam, min(candidates, key=lambda i: distance(lam, i)))


def entropy(lam):
    rank = np.sum(np.sqrt(lam) > RANK_FLOOR)
    q = lam / np.sum(lam) + RANK_FLOOR
    return -np.sum(q * np.log(q)) / np.log(rank + RANK_FLOOR)


def metric(w, name, **fit):
    lam = eigenvalues(w)
    if name == "alpha":
        return alpha(lam, **fit)
    if name == "alphahat":
        return np.log1p(np.exp(alpha(lam, **fit) * np.log10(lam[-1])))
    if name == "stable_rank":
        return np.sum(lam) / lam[-1]
    if name == "entropy":
        return entropy(lam)
    return {"spectral_norm": lam[-1], "fnorm": np.sum(lam)}[name]


def marchenko_pastur_alpha(aspect, size=1500, draws=4, seed=0):
    """The Hill exponent of random matrices, by drawing some."""
    rng = np.random.default_rng(seed)
    shape = (size, round(size * aspect))
    return np.mean([alpha(eigenvalues(rng.standard_normal(shape))) for _ in range(draws)])
