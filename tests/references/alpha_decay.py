"""The released AlphaDecay algorithm in float64 NumPy: assignment, phase, torch's Adam and AdamW, matrix by matrix."""

import numpy as np

from tests.references import spectra as reference_spectra

GRADIENT = ("gradnorm", "gradnorm_d_weightnorm")


def scores(weights, gradients, metric):
    found = []
    for name, w in weights.items():
        if metric in GRADIENT:
            norm = np.linalg.norm(gradients[name])
            if metric == "gradnorm_d_weightnorm":
                norm = norm / (reference_spectra.metric(w, "spectral_norm") + 1e-8)
            found.append(norm)
        else:
            found.append(reference_spectra.metric(w, metric))
    return np.array(found)


def assign(s, assignment, low, high, blocks):
    n = len(s)
    if assignment == "linear":
        return np.interp(s, [s.min(), s.max()], [low, high])
    if assignment == "sigmoid":
        result = np.zeros(n)
        for block in set(blocks):
            i = [k for k in range(n) if blocks[k] == block]
            z = (s[i] - s[i].mean()) / (s[i].std() + 1e-8)
            result[i] = 2 / (1 + np.exp(-4 * z))
        return result
    f = {"sqrt": np.sqrt, "log2": np.log2}[assignment](s)
    return f / np.sum(f + 1e-8) * n


def run(
    weights,
    gradients,
    tuned,
    blocks,
    *,
    metric,
    assignment,
    low,
    high,
    every,
    optimizer,
    rate,
    decay,
):
    """Weights after every step.

    Args:
        weights: name -> array; all of them decay.
        gradients: one such dictionary per step.
        tuned: names of the matrices whose decay is scheduled.
        blocks: the block of each of them.
        optimizer: "adam" (coupled) or "adamw".
    """
    w = {name: np.array(x, np.float64) for name, x in weights.items()}
    m = {name: np.zeros_like(x) for name, x in w.items()}
    v = {name: np.zeros_like(x) for name, x in w.items()}
    factor = dict.fromkeys(w, 1.0)

    def schedule(g):
        s = scores({name: w[name] for name in tuned}, g, metric)
        factor.update(zip(tuned, assign(s, assignment, low, high, blocks)))

    if metric not in GRADIENT:
        schedule(None)
    history = []
    for u, step_gradients in enumerate(gradients):
        g = {name: np.array(x, np.float64) for name, x in step_gradients.items()}
        if (u + 1) % every == 0:
            schedule(g)
        for name in w:
            strength = decay * factor[name]
            d = g[name]
            if optimizer == "adam":
                d = d + strength * w[name]
            else:
                w[name] = w[name] * (1 - rate * strength)
            m[name] = 0.9 * m[name] + 0.1 * d
            v[name] = 0.999 * v[name] + 0.001 * d**2
            mean, square = m[name] / (1 - 0.9 ** (u + 1)), v[name] / (1 - 0.999 ** (u + 1))
            w[name] = w[name] - rate * mean / (np.sqrt(square) + 1e-8)
        history.append({name: x.copy() for name, x in w.items()})
    return history
