"""Thresholds δ of the bounded pulls, in units of the weights: numbers that follow the weights of each matrix.

With θ the weights before the step, per matrix (per slice of a stacked leaf), and c a dimensionless factor::

    mean_size            δ = c · mean|θ|
    rms_size             δ = c · sqrt(mean θ²)
    running_mean_size    δ = c · μ_t,   μ_t = β μ_{t-1} + (1-β) mean|θ_t|,   μ_0 = mean|θ_0|

A plain number or an optax schedule is a threshold too, and so is any `PerMatrix`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, nearest
from optax_decay.product.couplings import now
from optax_decay.product.per_matrix import (
    AxisName,
    Context,
    PerMatrix,
    Value,
    accumulator_dtype,
    constant,
    slice_mean,
)

Threshold = optax.ScalarOrSchedule | PerMatrix


def _sizes(
    context: Context, axis_name: AxisName, what: str, squared: bool = False
) -> dict[str, Any]:
    """mean|θ|, or mean θ², of every matrix, by path."""
    values = {}
    for path, w in context.params.items():
        x = jnp.abs(w)
        x = x.astype(accumulator_dtype(x.dtype))
        signature = context.signatures[path]
        values[path] = slice_mean(x * x if squared else x, signature, axis_name, what)
    return values


def _times(
    factor: optax.ScalarOrSchedule, values: Mapping[str, Any], count: jax.Array
) -> dict[str, Value]:
    c = now(factor, count)
    return {path: c * value for path, value in values.items()}


def mean_size(factor: optax.ScalarOrSchedule = 1.5, axis_name: AxisName = None) -> PerMatrix:
    """``c · mean|θ|`` of every matrix. No state.

    Args:
        factor: c, dimensionless, positive; a number or an optax schedule.
        axis_name: inside ``shard_map``, the mesh axes over which one matrix is split.

    Raises:
        ValueError: a factor that is not positive.
    """
    check("factor", factor, 0.0, open_low=True)

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        sizes = _sizes(context, axis_name, "the threshold mean_size")
        return _times(factor, sizes, context.count), state

    return PerMatrix(lambda params, signatures: (), update)


def rms_size(factor: optax.ScalarOrSchedule = 1.5, axis_name: AxisName = None) -> PerMatrix:
    """``c · sqrt(mean θ²)`` of every matrix. No state. Arguments and errors as `mean_size`."""
    check("factor", factor, 0.0, open_low=True)

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        squares = _sizes(context, axis_name, "the threshold rms_size", squared=True)
        roots = {path: jnp.sqrt(value) for path, value in squares.items()}
        return _times(factor, roots, context.count), state

    return PerMatrix(lambda params, signatures: (), update)


def running_mean_size(
    factor: optax.ScalarOrSchedule = 1.5, memory: float = 0.99, axis_name: AxisName = None
) -> PerMatrix:
    """``c · μ_t`` with μ_t a running mean of mean|θ|. State: one float32 per matrix.

    Args:
        factor, axis_name: as in `mean_size`.
        memory: β in [0, 1), the share of the running mean that is kept per step.

    Raises:
        ValueError: a factor that is not positive, a memory outside [0, 1).
    """
    check("factor", factor, 0.0, open_low=True)
    check("memory", memory, 0.0, 1.0, open_high=True)

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        return {
            path: jnp.zeros(signatures[path].batch_shape, accumulator_dtype(w.dtype))
            for path, w in params.items()
        }

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        sizes = _sizes(context, axis_name, "the threshold running_mean_size")
        state = {
            path: jnp.where(context.count == 0, size, memory * state[path] + (1 - memory) * size)
            for path, size in sizes.items()
        }
        return _times(factor, state, context.count), state

    return PerMatrix(init, update)


NAMES = ("mean_size", "rms_size", "running_mean_size")


def as_threshold(threshold: Threshold | str) -> PerMatrix:
    """The `PerMatrix` of a threshold that may be a number or a schedule.

    Raises:
        ValueError: a number that is not positive, or something else.
    """
    if isinstance(threshold, PerMatrix):
        return threshold
    if isinstance(threshold, str):
        raise ValueError(
            f"threshold={threshold!r} is not a threshold; allowed: a positive number, a schedule, or "
            f"{', '.join(f'thresholds.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.thresholds.{nearest(threshold, NAMES)}()?)."
        )
    check("threshold", threshold, 0.0, open_low=True)
    return constant(threshold)
