"""Updates whose size follows that of the weights: exactly, or from below.

With u the direction before the learning rate, w the weights and ‖·‖ the Frobenius norm of one slice (`slices`)::

    relative_update          u ← u ‖w‖/‖u‖                   0 if either norm is below 1e-15
    relative_update_floor    u ← u max(1, c ‖w‖/‖u‖)         norms are taken as at least 1e-8

Both stand between the direction and the decay, which would otherwise be scaled too. Under `relative_update` the
learning rate is the step relative to ‖w‖, and norms grow, by ``sqrt(1 + η²)`` per step if u is orthogonal to w.

References: `relative_update`, the relative update of Emerging-Optimizers (NVIDIA-NeMo), and LARS without its constant
(arXiv 1708.03888); `relative_update_floor`, records 9 (c = 0.35), 46 (per output) and others of track 3 of
modded-nanogpt (pull request 274).

**Differs from the released programs.** Slices of stacks have their own norms. ``optax.scale_by_trust_ratio`` is the
rule of `relative_update` per array, with factor 1 where a norm is zero. Emerging-Optimizers leaves zero matrices at
zero for ever. Here they raise at ``init``, except under ``jax.jit``, where nothing can. `relative_update_floor` lets
them go, as the records do.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.norms.slices import (
    Slices,
    check_slices,
    map_slices,
    norms,
    slices,
    zeros,
)
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product import masks
from optax_decay.product.links import Link, and_more, tell

NORM_ZERO = 1e-15  # Emerging-Optimizers
NORM_FLOOR = 1e-8  # the records


def relative_update(
    *,
    per: str = "matrix",
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives every update the norm of its weights; stands before the decay and the learning rate.

    Args:
        per: the weights that share a norm: ``"matrix"``, ``"layer"``, ``"leaf"`` or ``"output"`` (`slices`).
        mask: which leaves; they must be matrices. Everything else passes through.
        axes: what the parameters' axes mean (`axes.signatures`).
        param_specs: inside ``shard_map``, the PartitionSpecs of the parameters (or a prefix of the tree).

    Returns:
        A transformation without state, whose ``update`` needs params.

    Raises:
        ValueError: an unknown name; at ``init``, a slice of zeros, which would never move, or a selected leaf that is
            not a matrix.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(), optax_decay.relative_update(), optax.scale_by_learning_rate(0.01)
    ... )
    """
    check_slices(per, mask)

    def init(params: Any) -> optax.EmptyState:
        found = slices(params, per, mask, axes, param_specs)
        tell(Link("relative_update", "scale", tuple(found), per=per))
        empty = list(zeros(norms(params, found)))
        if empty:
            raise ValueError(
                f"{and_more(empty)} holds only zeros, and a relative update would keep it there: initialise it "
                "otherwise, or exclude it with mask=...."
            )
        return optax.EmptyState()

    def step(u: jax.Array, w: jax.Array, own: Slices) -> jax.Array:
        size, length = own.norm(w), own.norm(u)
        usable = (size >= NORM_ZERO) & (length >= NORM_ZERO)
        factor = jnp.where(usable, size / jnp.where(usable, length, 1), 0)
        return u * own.spread(factor)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        found = {} if params is None else slices(params, per, mask, axes, param_specs)
        return map_slices(updates, params, found, step, "relative_update"), state

    return optax.GradientTransformationExtraArgs(init, update)


def relative_update_floor(
    floor: float | jax.Array = 0.35,
    *,
    per: str = "matrix",
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lengthens updates that are shorter than c times their weights; stands before the decay and the learning rate.

    Args:
        floor: c >= 0, the least ‖u‖/‖w‖, dimensionless.
        per, mask, axes, param_specs: as in `relative_update`.

    Returns:
        A transformation without state, whose ``update`` needs params.

    Raises:
        ValueError: a number out of its range or an unknown name; when updated, a selected leaf that is not a matrix.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax_decay.scale_by_muon(),
    ...     optax_decay.relative_update_floor(0.35),
    ...     optax.scale_by_learning_rate(0.01),
    ... )
    """
    check("floor", floor, 0.0)
    check_slices(per, mask)

    def init(params: Any) -> optax.EmptyState:
        found = slices(params, per, mask, axes, param_specs)
        tell(Link("relative_update_floor", "scale", tuple(found), per=per))
        return optax.EmptyState()

    def step(u: jax.Array, w: jax.Array, own: Slices) -> jax.Array:
        size = jnp.maximum(own.norm(w), NORM_FLOOR)
        length = jnp.maximum(own.norm(u), NORM_FLOOR)
        return u * own.spread(jnp.maximum(1, floor * size / length))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        found = {} if params is None else slices(params, per, mask, axes, param_specs)
        return map_slices(updates, params, found, step, "relative_update_floor"), state

    return optax.GradientTransformationExtraArgs(init, update)
