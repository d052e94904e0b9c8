"""Float64 NumPy references for the decays and for the Adam around them, written from the equations."""

from collections.abc import Callable

import numpy as np

Tree = dict[str, np.ndarray]


def adam_directions(b1: float, b2: float, eps: float) -> Callable[[str, np.ndarray], np.ndarray]:
    """Bias-corrected Adam, one instance per run: ``(name, gradient) -> direction``."""
    memory: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def direction(name: str, g: np.ndarray) -> np.ndarray:
        t, m, v = memory.get(name, (0, np.zeros_like(g), np.zeros_like(g)))
        t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        memory[name] = t, m, v
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)

    return direction


def slice_size(kind: str, w: np.ndarray, stacked: bool) -> np.ndarray:
    """mean|w| or rms(w), per slice of the first axis when `stacked`, shaped to broadcast."""
    axes = tuple(range(1 if stacked else 0, w.ndim))
    if kind == "rms":
        return np.sqrt(np.mean(w * w, axis=axes, keepdims=True))
    return np.mean(np.abs(w), axis=axes, keepdims=True)


def huber_pull(w: np.ndarray, delta: np.ndarray | float) -> np.ndarray:
    return np.where(np.abs(w) <= delta, w, delta * np.sign(w))


def huber_prox(theta: np.ndarray, tau: float, delta: np.ndarray | float) -> np.ndarray:
    return np.where(
        np.abs(theta) <= (1 + tau) * delta, theta / (1 + tau), theta - tau * delta * np.sign(theta)
    )


def prox_by_search(penalty: Callable, theta: float, tau: float) -> float:
    """argmin_x (x-θ)²/2 + τ·penalty(x) by golden section on the convex objective."""
    low, high = min(theta, 0.0) - 1e-9, max(theta, 0.0) + 1e-9
    golden = (np.sqrt(5) - 1) / 2

    def value(x: float) -> float:
        return 0.5 * (x - theta) ** 2 + tau * penalty(x)

    for _ in range(200):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if value(a) < value(b):
            high = b
        else:
            low = a
    return (low + high) / 2


def thresholds(
    kind: str | float, factor: float, beta: float, stacked: frozenset[str] = frozenset()
) -> Callable[[str, np.ndarray], np.ndarray | float]:
    """δ of one run: ``(name, weights before the step) -> δ``."""
    averages: dict[str, np.ndarray] = {}

    def delta(name: str, w: np.ndarray) -> np.ndarray | float:
        if not isinstance(kind, str):
            return kind
        size = slice_size("rms" if kind == "rms" else "mean", w, name in stacked)
        if kind == "running_mean":
            averages[name] = beta * averages[name] + (1 - beta) * size if name in averages else size
            size = averages[name]
        return factor * size

    return delta


def huber_trajectory(
    params: Tree,
    gradients: list[Tree],
    *,
    rates: list[float],
    weight_decay: float,
    delta: Callable[[str, np.ndarray], np.ndarray | float],
    decayed: frozenset[str],
    proximal: bool = False,
    cautious: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Tree:
    """Weights after Adam with Huber decay, coupling lr, one entry of `gradients` and `rates` per step."""
    w = {name: value.astype(np.float64) for name, value in params.items()}
    direction = adam_directions(b1, b2, eps)
    for g, eta in zip(gradients, rates):
        for name in w:
            u = direction(name, g[name].astype(np.float64))
            if name not in decayed:
                w[name] = w[name] - eta * u
                continue
            d = delta(name, w[name])
            if proximal:
                w[name] = huber_prox(w[name] - eta * u, eta * weight_decay, d)
                continue
            term = weight_decay * huber_pull(w[name], d)
            if cautious:
                term = term * (u * w[name] >= 0)
            w[name] = w[name] - eta * (u + term)
    return w
