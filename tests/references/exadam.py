"""EXAdam written out in float64 NumPy, one parameter at a time, straight from the algorithm."""

import math

import numpy as np


def exadam(
    w, gradients, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, log_growth=False
):
    """Weights after every step.

    Args:
        w: initial weights, any shape, real or complex.
        gradients: one array per step.
        learning_rate: a number, or one number per step.
    """
    w = np.array(w, np.complex128 if np.iscomplexobj(w) else np.float64)
    m, v = np.zeros_like(w), np.zeros(w.shape)
    rates = np.broadcast_to(learning_rate, (len(gradients),))
    history = []
    for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
        g = np.asarray(g, w.dtype)
        step = rate * math.log(math.sqrt(2) * math.sqrt(t + 1)) if log_growth else rate
        w = w - rate * weight_decay * w
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        d1 = 1 + b2**t * v / (v + eps)
        d2 = 1 + b1**t * np.abs(m) ** 2 / (np.abs(m) ** 2 + eps)
        m_tilde = m / (1 - b1**t) * d1
        g_tilde = g / (1 - b1**t) * d1
        v_tilde = v / (1 - b2**t) * d2
        w = w - step * (m_tilde + g_tilde) / (np.sqrt(v_tilde) + eps)
        history.append(w)
    return history
