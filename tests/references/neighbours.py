"""The decays beside AdamW in float64 NumPy, written from the papers and from the released programs' arithmetic.

Every trajectory takes ``{name: array}`` weights, and one such gradient tree and one learning rate per step. `stacked`
says that the first axis of a leaf counts matrices.
"""

from collections.abc import Callable

import numpy as np

from tests.references.decays import Tree, adam_directions


def run(
    params: Tree,
    gradients: list[Tree],
    rates: list[float],
    step: Callable[[int, float, Tree, Tree], Tree],
) -> Tree:
    w = {name: value.astype(np.float64) for name, value in params.items()}
    for t, (g, eta) in enumerate(zip(gradients, rates, strict=True)):
        w = step(t, eta, w, {name: x.astype(np.float64) for name, x in g.items()})
    return w


def after_adam(
    params: Tree, gradients: list[Tree], rates: list[float], term: Callable, decayed: frozenset[str]
) -> Tree:
    """w ← w - η (Adam + term); ``term(t, name, w, u, all weights, all gradients)``."""
    direction = adam_directions(0.9, 0.999, 1e-8)

    def step(t, eta, w, g):
        u = {name: direction(name, g[name]) for name in w}
        add = {n: term(t, n, w[n], u[n], w, g) if n in decayed else 0.0 for n in w}
        return {n: w[n] - eta * (u[n] + add[n]) for n in w}

    return run(params, gradients, rates, step)


def before_adam(
    params: Tree, gradients: list[Tree], rates: list[float], term: Callable, decayed: frozenset[str]
) -> Tree:
    """w ← w - η Adam(g + term): the coupled form."""
    direction = adam_directions(0.9, 0.999, 1e-8)

    def step(t, eta, w, g):
        add = {n: term(t, n, w[n], None, w, g) if n in decayed else 0.0 for n in w}
        return {n: w[n] - eta * direction(n, g[n] + add[n]) for n in w}

    return run(params, gradients, rates, step)


def last(
    params: Tree, gradients: list[Tree], rates: list[float], prox: Callable, decayed: frozenset[str]
) -> Tree:
    """w ← prox(w - η Adam, η, w)."""
    direction = adam_directions(0.9, 0.999, 1e-8)

    def step(t, eta, w, g):
        new = {n: w[n] - eta * direction(n, g[n]) for n in w}
        return {n: prox(t, n, new[n], eta, w[n]) if n in decayed else new[n] for n in w}

    return run(params, gradients, rates, step)


def padam(q: np.ndarray, w: np.ndarray, tau: float, p: float, late: bool) -> np.ndarray:
    """The released step: Adam's result q times X/(X + p tau)."""
    x = np.abs(q if late else w) ** (2 - p)
    return q * x / (x + p * tau)


def soft_threshold(q: np.ndarray, l1: float, l2: float) -> np.ndarray:
    return np.sign(q) * np.maximum(np.abs(q) - l1, 0.0) / (1 + l2)


def rms(w: np.ndarray, stacked: bool) -> np.ndarray:
    axes = tuple(range(1 if stacked else 0, w.ndim))
    return np.sqrt(np.mean(w * w, axis=axes, keepdims=True))


class StableMean:
    """sqrt of the mean over all parameters of Adam's bias-corrected second moment, which it keeps in full."""

    def __init__(self, b2: float):
        self.b2, self.v, self.t = b2, None, 0

    def __call__(self, gradients: Tree) -> float:
        self.t += 1
        old = self.v or {name: np.zeros_like(g) for name, g in gradients.items()}
        self.v = {n: self.b2 * old[n] + (1 - self.b2) * gradients[n] ** 2 for n in gradients}
        flat = np.concatenate([np.ravel(v / (1 - self.b2**self.t)) for v in self.v.values()])
        return float(np.sqrt(flat.mean()))


class AdaptiveRatio:
    """The released scheduler of AWD: one number per step for every parameter."""

    def __init__(self, rate: float):
        self.rate, self.average = rate, 0.0

    def __call__(self, weights: Tree, gradients: Tree) -> float:
        norm = lambda tree: np.sqrt(sum(np.sum(x * x) for x in tree.values()))
        now = norm(gradients) * self.rate / (norm(weights) + 1e-8)
        self.average = 0.1 * self.average + 0.9 * now
        return self.average


def sigmoid(z: np.ndarray, alpha: float) -> np.ndarray:
    return 2 / (1 + np.exp(-alpha * z))


def weight_sigmoid(g: np.ndarray, alpha: float, stacked: bool) -> np.ndarray:
    """AdaDecay's factor of every weight."""
    axes = tuple(range(1 if stacked else 0, g.ndim))
    size = np.abs(g)
    mean = size.mean(axis=axes, keepdims=True)
    std = np.sqrt(((size - mean) ** 2).mean(axis=axes, keepdims=True))
    z = np.divide(size - mean, std, out=np.zeros_like(size), where=std > 0)
    return sigmoid(z, alpha)


def block_sigmoid(gradients: Tree, block: list[tuple[str, int | None]], alpha: float) -> dict:
    """The program's factor of every module (name, slice) of one block: population std + 1e-8."""
    norms = np.array(
        [np.linalg.norm(gradients[n] if i is None else gradients[n][i]) for n, i in block]
    )
    z = (norms - norms.mean()) / (norms.std() + 1e-8)
    return dict(zip(block, sigmoid(z, alpha), strict=True))
