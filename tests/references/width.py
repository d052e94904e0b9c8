"""Width laws by hand: the published worked example, multipliers of the shared toy tree, and float64 trajectories.

Nothing here uses the library. Numbers that can be written down are written down.
"""

import math

import numpy as np

from tests.references.decays import adam_directions

# Base width 256, target 2048, so m = 8; η = 3e-3, λ = 0.1 at the base; σ_max ∝ sqrt(η/λ)·d^0.75.
EXAMPLE = {"base": 256, "target": 2048, "learning_rate": 3e-3, "weight_decay": 0.1}

# rule: η₂, λ₂, shrink η₂λ₂, σ_max over the base's
EXAMPLE_ROWS = {
    "constant": (3.75e-4, 0.1, 3.75e-5, 8**0.25),
    "fan2025": (3.75e-4, 0.1 * math.sqrt(8), 3e-4 / math.sqrt(8), 1.0),
    "mup_package": (3.75e-4, 0.8, 3e-4, 8**-0.25),
    "timescale": (3.75e-4, 0.8, 3e-4, 8**-0.25),
    "qiu2025": (3.75e-4, 0.1, 3.75e-5, 8**0.25),
}

# The digits of the published table, to the precision that it prints: η₂, λ₂, shrink, steps, σ_max ratio.
EXAMPLE_PRINTED = {
    "constant": ("0.000375", "0.1", "3.75e-05", "26667", "1.68"),
    "fan2025": ("0.000375", "0.28284", "0.00010607", "9428", "1.00"),
    "mup_package": ("0.000375", "0.8", "0.0003", "3333", "0.59"),
    "qiu2025": ("0.000375", "0.1", "3.75e-05", "26667", "1.68"),
}

# Fan-in of the toy tree's matrices over that of a proxy with D=4, H=3, F=6 (E, G and V as they are).
TOY_LETTERS = {"D": 4, "H": 3, "F": 6}
TOY_FACTORS = {
    "blocks/attention/kernel": 8 / 4,
    "blocks/up/kernel": 8 / 4,
    "blocks/down/kernel": 12 / 6,
    "mix/kernel": 8 / 4,
}


def trajectory(
    params: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
    *,
    rates: list[float],
    weight_decay: float,
    factors: dict[str, float],
    r: float,
    s: float,
    pull=lambda w, name: w,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> dict[str, np.ndarray]:
    """Adam where each matrix of `factors` has its own η_i = η m^-r and λ_i = λ m^s; nothing else decays."""
    w = {name: value.astype(np.float64) for name, value in params.items()}
    direction = adam_directions(b1, b2, eps)
    for g, eta in zip(gradients, rates):
        for name in w:
            u = direction(name, g[name].astype(np.float64))
            if name in factors:
                eta_i = eta / factors[name] ** r
                lambda_i = weight_decay * factors[name] ** s
                w[name] = w[name] - eta_i * u - eta_i * lambda_i * pull(w[name], name)
            else:
                w[name] = w[name] - eta * u
    return w
