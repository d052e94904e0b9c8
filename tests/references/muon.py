"""Muon and NorMuon in float64 NumPy, one matrix [outputs, inputs] at a time, as torch programs hold it."""

import numpy as np

from tests.references.root import MUON


def newton(b, coefficients, eps):
    """Jordan's iteration: the matrix by its Frobenius norm, with fewer rows than columns."""
    x = b.T if b.shape[0] > b.shape[1] else b
    x = x / (np.linalg.norm(x) + eps)
    for c0, c1, c2 in coefficients:
        a = x @ x.T
        x = c0 * x + (c1 * a + c2 * (a @ a)) @ x
    return x.T if b.shape[0] > b.shape[1] else x


def normalised(x, v, beta):
    """Dion's NorMuon: [outputs, inputs] by the root of the running mean square of each output; and its new mean."""
    v = beta * v + (1 - beta) * np.mean(x * x, axis=-1, keepdims=True)
    y = x / (np.sqrt(v) + 1e-8)
    return y * np.linalg.norm(x) / np.linalg.norm(y), v


def direction(g, m, t, momentum, form):
    """What is orthogonalised at step t = 1, 2, …, for the new momentum m."""
    if form == "plain":
        return m
    if form == "nesterov":
        return (1 - momentum) * g + momentum * m
    ahead, here = 1 - momentum ** (t + 1), 1 - momentum**t
    return momentum * m / ahead + (1 - momentum) * g / here


def matrix_run(
    p,
    grads,
    lr,
    *,
    weight_decay=0.1,
    momentum=0.95,
    form="nesterov",
    coefficients=(MUON,) * 5,
    eps=1e-8,
    scale=lambda outputs, inputs: 0.2 * max(outputs, inputs) ** 0.5,
    beta=None,
):
    """Weights after every step; `lr` is one number per step, `beta` is NorMuon's."""
    m, v = np.zeros_like(p), 0.0
    history = []
    for t, (g, rate) in enumerate(zip(grads, lr, strict=True), start=1):
        m = momentum * m + (1 - momentum) * g
        x = newton(direction(g, m, t, momentum, form), coefficients, eps)
        if beta is not None:
            x, v = normalised(x, v, beta)
        p = p * (1 - rate * weight_decay) - rate * scale(*p.shape) * x
        history.append(p)
    return history


def adam_run(p, grads, lr, *, weight_decay=0.0, b1=0.9, b2=0.95, eps=1e-8):
    """Weights after every step of a parameter that is not a hidden matrix, in the convention of torch and optax."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    history = []
    for t, (g, rate) in enumerate(zip(grads, lr, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p * (1 - rate * weight_decay) - rate * u
        history.append(p)
    return history
