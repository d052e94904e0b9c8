"""ROOT in NumPy, one parameter at a time, from the rules of the released code; independent of the library."""

import numpy as np

MUON = (3.4445, -4.7750, 2.0315)


def newton(b, coefficients):
    """Orthogonalises one matrix of any orientation; `coefficients` is one triple per step."""
    x = b.T if b.shape[0] > b.shape[1] else b
    x = x / (np.sqrt(np.sum(x * x)) + 1e-7)
    for c0, c1, c2 in coefficients:
        a = x @ x.T
        x = c0 * x + (c1 * a + c2 * (a @ a)) @ x
    return x.T if b.shape[0] > b.shape[1] else x


def matrix_run(
    p,
    grads,
    lr,
    *,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    percentile=0.9,
    threshold=None,
    coefficients=(MUON,) * 5,
    scale=0.2,
):
    """Weights after every step of one matrix; `lr` is a number or one per step."""
    m = np.zeros_like(p)
    history = []
    for t, g in enumerate(grads):
        rate = np.broadcast_to(lr, len(grads))[t].item()
        m = momentum * m + g
        d = g + momentum * m if nesterov else m
        theta = threshold
        if threshold is None:
            theta = np.quantile(np.abs(d).astype(np.float64), percentile) + 1e-9
        outliers = np.sign(d) * np.maximum(np.abs(d) - theta, 0)
        x = newton((d - outliers).astype(p.dtype), coefficients)
        factor = 1.0 if scale is None else scale * np.sqrt(max(p.shape))
        p = p * (1 - rate * weight_decay)
        p = (p - rate * factor * x).astype(m.dtype)
        history.append(p)
    return history


def adam_run(p, grads, lr, *, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8):
    """Weights after every step of a parameter that is not a ROOT matrix."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    history = []
    for t, g in enumerate(grads, start=1):
        rate = np.broadcast_to(lr, len(grads))[t - 1].item()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        step = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
        p = p * (1 - rate * weight_decay) - step * m / (np.sqrt(v) + eps)
        history.append(p)
    return history
