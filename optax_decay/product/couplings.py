"""What λ = 0.1 multiplies is the *coupling*. With η_t the learning rate of step t, the weight shrinks per step by

============ ====================== ================================================ ==========================
coupling     shrink per step        place in the chain                               who means this
============ ====================== ================================================ ==========================
lr           η_t λ                  before ``scale_by_learning_rate``                torch AdamW, optax.adamw
schedule     (η_t/η_max) λ          before ``scale_by_learning_rate``                AdamW's paper, big_vision
corrected    (η_t²/η_max) λ         before ``scale_by_learning_rate``                AdamC (arXiv 2506.02285)
none         λ                      after ``scale_by_learning_rate``                 "independent" decay
============ ====================== ================================================ ==========================

`convert_weight_decay` turns one into another.
"""

import difflib
from typing import Any

import jax

from optax_decay.parameters.arguments import check

ScalarOrSchedule = Any
COUPLINGS = ("lr", "schedule", "corrected", "none")


def check_coupling(coupling: str, learning_rate: Any, peak_learning_rate: Any) -> None:
    if coupling not in COUPLINGS:
        near = difflib.get_close_matches(str(coupling), COUPLINGS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"coupling={coupling!r} is not known; allowed: {', '.join(COUPLINGS)} (did you mean {near!r}?)."
        )
    if coupling in ("schedule", "corrected") and peak_learning_rate is None:
        raise ValueError(
            f"coupling={coupling!r} divides by the peak of the learning rate: pass peak_learning_rate=..."
        )
    if coupling == "corrected" and learning_rate is None:
        raise ValueError(
            "coupling='corrected' needs learning_rate=..., the number or schedule of the chain."
        )
    if peak_learning_rate is not None:
        check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)


def now(value: ScalarOrSchedule, count: jax.Array) -> Any:
    return value(count) if callable(value) else value


def coupled_rate(
    weight_decay: Any, coupling: str, learning_rate: Any, peak: Any, count: jax.Array
) -> Any:
    """λ(t) with its coupling, as the factor of ψ at the decay's place in the chain."""
    rate = now(weight_decay, count)
    if coupling == "schedule":
        return rate / peak
    if coupling == "corrected":
        return rate * (now(learning_rate, count) / peak)
    return rate


def convert_weight_decay(
    weight_decay: float, source: str, target: str, *, peak_learning_rate: float
) -> float:
    """λ under another coupling, with the same shrink per step at the peak of the learning rate.

    Args:
        weight_decay: λ under `source`.
        source, target: ``"lr"``, ``"schedule"``, ``"corrected"`` or ``"none"``.
        peak_learning_rate: η_max.

    >>> convert_weight_decay(0.1, "lr", "schedule", peak_learning_rate=3e-4)
    3e-05
    """
    check("weight_decay", weight_decay, 0.0)
    check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)
    scale = {
        "lr": peak_learning_rate,
        "corrected": peak_learning_rate,
        "schedule": 1.0,
        "none": 1.0,
    }
    for name in (source, target):
        if name not in scale:
            check_coupling(name, None, None)
    return float(f"{weight_decay * scale[source] / scale[target]:.15g}")
