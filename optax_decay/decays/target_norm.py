"""Weight norm control: decay towards a norm other than zero.

With θ one matrix (one slice of a stacked leaf), ‖θ‖ = sqrt(mean θ²) its size before the step, r_t the target::

    u ← u + λ_t (1 - r_t/‖θ‖) θ

Matrices larger than the target shrink, smaller ones grow, by η λ r in norm at most per step for growth. r = 0 is AdamW.

Reference: Loshchilov, "Weight Norm Control", arXiv 2311.11446 (AdamWN).

**Differs from the paper.** Only its abstract could be read; the form above is derived from it, with κ_t = η_t λ_t.
Norms are measured as RMS per weight instead of Frobenius norms, so that one target serves matrices of every shape:
‖θ‖_F = RMS · sqrt(number of weights); the rule itself does not change. ``target=None``, every matrix keeps
the size it had at the first step, is an addition.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.product.couplings import now
from optax_decay.product.decay import FixedPullOptions, decay, times
from optax_decay.product.per_matrix import (
    AxisName,
    Context,
    PerMatrix,
    Value,
    accumulator_dtype,
    slice_mean,
)


def norm_excess(
    target: optax.ScalarOrSchedule | None = None, *, axis_name: AxisName = None
) -> PerMatrix:
    """1 - r/‖θ‖ per slice, dimensionless, negative below the target; 0 for a slice of zeros.

    Args:
        target: r >= 0, RMS per weight, in units of the weights: a number or a schedule. None: the size of each slice
            at the first step.
        axis_name: inside ``shard_map``, the mesh axes over which one matrix is split.

    Returns:
        PerMatrix. State: nothing, or one float32 per slice for ``target=None``, set in the first update.

    Raises:
        ValueError: a negative target.
    """
    if target is not None:
        check("target", target, 0.0)

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        if target is not None:
            return ()
        return {
            path: jnp.zeros(signatures[path].batch_shape, accumulator_dtype(w.dtype))
            for path, w in params.items()
        }

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        values, kept = {}, {}
        for path, w in context.params.items():
            square = jnp.square(jnp.abs(w).astype(accumulator_dtype(w.dtype)))
            size = jnp.sqrt(slice_mean(square, context.signatures[path], axis_name, "the norm"))
            if target is None:
                kept[path] = jnp.where(context.count == 0, size, state[path])
            goal = kept[path] if target is None else now(target, context.count)
            values[path] = jnp.where(size > 0, 1 - goal / jnp.where(size > 0, size, 1), 0)
        return values, kept if target is None else state

    return PerMatrix(init, update)


@passes_options_to(decay, "pull")
def target_norm_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    target: optax.ScalarOrSchedule | None = None,
    *,
    axis_name: AxisName = None,
    **options: Unpack[FixedPullOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ (1 - r/‖θ‖) θ`` to the update.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        target: r >= 0, RMS per weight: a number or a schedule. None: each matrix keeps its size at the first step.
        axis_name: inside ``shard_map``, the mesh axes over which one matrix is split.
        options: multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; a negative target.

    >>> import optax, optax_decay
    >>> link = optax_decay.target_norm_decay(0.1, target=0.02)
    >>> tx = optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(3e-4))
    """
    excess = norm_excess(target, axis_name=axis_name)
    return decay(weight_decay, **times(excess, options))
