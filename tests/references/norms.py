"""Rules about norms in float64 NumPy, one matrix at a time, in the arithmetic of the released programs.

Theirs take the direction u before the learning rate, which descends by ``-η u``.
"""

import numpy as np


def hyperball(w, u, eta, radius):
    """Emerging-Optimizers and HeavyBall: a step of length ηR against the unit direction, then back to the radius."""
    x = w - eta * radius * u / np.linalg.norm(u)
    return radius * x / np.linalg.norm(x)


def brake_norm(w, u, eta, outward, inward):
    """Emerging-Optimizers."""
    x = w - eta * u
    a, b = np.linalg.norm(w), np.linalg.norm(x)
    s = outward if b - a >= 1e-15 else inward if b - a <= -1e-15 else 0.0
    return x * (a + s * (b - a)) / b


def brake_first_order(w, u, eta, outward, inward):
    """Record 29 of track 3, which brakes the direction and then pins the radius."""
    norm = max(np.linalg.norm(w), 1e-8)
    c = np.sum(u * w) / norm**2
    u = u - c * w + (outward if c < 0 else inward) * c * w
    radius = norm - eta * np.sum(u * w) / norm
    x = w - eta * u
    return radius * x / np.linalg.norm(x)


def relative_update(w, u):
    """Emerging-Optimizers."""
    a, b = np.linalg.norm(w), np.linalg.norm(u)
    return u * a / b if min(a, b) >= 1e-15 else np.zeros_like(u)


def relative_update_floor(w, u, floor):
    """Record 9 of track 3."""
    return u * max(1.0, floor * max(np.linalg.norm(w), 1e-8) / max(np.linalg.norm(u), 1e-8))


def on_slices(function, kept, w, *others):
    """`function` of every slice of w and arrays like it, where the axes `kept` count the slices.

    `others` that are not of w's shape hold one number per slice.
    """
    kept = tuple(kept)
    ends = tuple(range(len(kept)))
    front = [np.moveaxis(x, kept, ends) if x.shape == w.shape else x for x in (w, *others)]
    out = np.empty_like(front[0])
    for index in np.ndindex(front[0].shape[: len(kept)]):
        out[index] = function(*(x[index] for x in front))
    return np.moveaxis(out, ends, kept)
