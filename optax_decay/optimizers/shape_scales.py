"""By how much an orthogonal factor is multiplied, given the shape of its matrix.

An orthogonal factor has singular values of 1, and so an RMS of ``1/sqrt(max(inputs, outputs))``. The released programs
multiply it by one of these, and their names for them collide:

========================================== ======================= =================================================
value                                      factor                  called
========================================== ======================= =================================================
sqrt_larger_side(0.2)                      0.2 sqrt(max(in, out))  Moonshot (arXiv 2502.16982); Dion "rms_norm"; optax
                                                                   ``consistent_rms=0.2``
sqrt_larger_side(1.0)                      sqrt(max(in, out))      Emerging-Optimizers "spectral"
sqrt_outputs_per_input()                   sqrt(max(1, out/in))    Jordan's Muon; Emerging-Optimizers "shape_scaling";
                                                                   the default of optax
sqrt_outputs_per_input(at_least=0.0)       sqrt(out/in)            Dion "spectral_norm"; Emerging-Optimizers
                                                                   "unit_rms_norm"
one()                                      1                       before a rule that only reads the direction
========================================== ======================= =================================================

With ``sqrt_larger_side(0.2)`` updates have the RMS of 0.2 that Adam's typically have, so that one learning rate and one
decay serve both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_decay.parameters.arguments import check


class ShapeScale(NamedTuple):
    """A factor that depends on the shape of a matrix. Build one with the functions of this module.

    Attributes:
        name: the function that built it.
        factor: ``(inputs, outputs) -> number``, dimensionless.
    """

    name: str
    factor: Callable[[int, int], Any]


def sqrt_larger_side(factor: Any = 0.2) -> ShapeScale:
    """``factor · sqrt(max(inputs, outputs))``: the RMS of the update is `factor`, whatever the shape.

    Raises:
        ValueError: a factor that is not positive.
    """
    check("factor", factor, 0.0, open_low=True)
    return ShapeScale("sqrt_larger_side", lambda m, n: factor * max(m, n) ** 0.5)


def sqrt_outputs_per_input(at_least: Any = 1.0) -> ShapeScale:
    """``sqrt(max(at_least, outputs/inputs))``.

    Args:
        at_least: dimensionless, >= 0; 0 for the plain square root, which also shrinks the updates of wide inputs.

    Raises:
        ValueError: a negative number.
    """
    check("at_least", at_least, 0.0)
    return ShapeScale("sqrt_outputs_per_input", lambda m, n: jnp.sqrt(jnp.maximum(at_least, n / m)))


def one() -> ShapeScale:
    """1: the orthogonal factor as it is."""
    return ShapeScale("one", lambda m, n: 1.0)


def check_shape_scale(shape_scale: Any) -> None:
    """Raises ValueError unless `shape_scale` is a `ShapeScale`."""
    if not isinstance(shape_scale, ShapeScale):
        raise ValueError(
            f"shape_scale={shape_scale!r} is not a value of optax_decay.shape_scales: pass sqrt_larger_side(0.2), "
            "sqrt_outputs_per_input() or one()."
        )
