"""Conda in NumPy, one parameter at a time, from the rules of the released code; independent of the library.

Matrices are stored as torch stores them, [outputs, inputs].
"""

import numpy as np


def basis(m, side):
    """(Q, True if it acts from the right) from the singular vectors of m on its smaller side."""
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    rows, columns = m.shape
    right = rows >= columns if side == "std" else side == "right"
    return (vt.T, True) if right else (u, False)


def matrix_run(
    p,
    grads,
    lr,
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    gap=2000,
    scale=0.25,
    side="std",
    weight_decay=0.0,
    refresh_at=None,
):
    """Weights after every step of one matrix; `lr` is a number or one per step.

    `refresh_at`: steps (from 0) at which the basis is renewed, instead of every `gap` steps.
    """
    m, v = np.zeros_like(p), np.zeros_like(p)
    q, right = None, None
    history = []
    for t, g in enumerate(grads):
        rate = np.broadcast_to(lr, len(grads))[t].item()
        m = b1 * m + (1 - b1) * g
        if t in refresh_at if refresh_at is not None else t % gap == 0:
            q, right = basis(m, side)
        g_hat = g @ q if right else q.T @ g
        m_hat = m @ q if right else q.T @ m
        v = b2 * v + (1 - b2) * g_hat * g_hat
        u = m_hat / (np.sqrt(v) + eps)
        back = scale * (u @ q.T if right else q @ u)
        step = rate * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        p = p - step * back
        p = p - rate * weight_decay * p
        history.append(p)
    return history


def adam_run(p, grads, lr, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """Weights after every step of a parameter that is not rotated."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    history = []
    for t, g in enumerate(grads):
        rate = np.broadcast_to(lr, len(grads))[t].item()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        step = rate * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        p = p - step * m / (np.sqrt(v) + eps)
        p = p - rate * weight_decay * p
        history.append(p)
    return history
