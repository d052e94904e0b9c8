"""Decay towards the initial weights instead of towards zero: L2-SP and SODA.

With u the incoming update, w the weight before the step, w_0 its value at ``init``, and λ_t the rate with its
coupling::

    u ← u + λ_t (w - w_0)

* L2-SP, for fine-tuning: λ constant with AdamW's coupling, ``toward_initial_decay(0.1)``.
* SODA: ``λ_t = 1/(t + 2)`` on the finished step, whatever the learning rate, `soda_decay`:
  ``w ← w + Δ + (w_0 - w)/(t + 2)``. It has no number to tune. The first step feels nothing.

References: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
arXiv 1802.01483 (L2-SP); SODA, arXiv 2605.11172, and its code (tmpethick/soda_code, class SODAWrapper).

**Differs from the papers and the code.**

* L2-SP is a penalty in the paper, added to the gradient. Here it is decoupled, as weight decay is in AdamW.
* SODA's code keeps w_0 in the dtype of the weights, and leaves t out of the state dict when Adam is wrapped after a
  warm-up. Here both are state, and w_0 is float32.
* The base of SODA has no decay in the paper. A decay beside it is possible in a chain, and not checked.

**Cost.** State: 4 bytes per weight, a full copy in float32 of everything that `mask` selects: as much as a moment of
Adam. It has to be saved, and continuing needs the saved copy: an anchor that is read from weights which were trained,
migrated or initialised again pulls towards those. In bfloat16 weights the pull is lost once ``|w - w_0|`` is below
``t 2^-9 |w|``: keep float32 weights, or use `optax_decay.apply_updates`.
"""

from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.product import couplings, masks, schedules
from optax_decay.product.couplings import Coupling, check_coupling
from optax_decay.product.gates import Gate, as_gate
from optax_decay.product.links import Link, tell
from optax_decay.product.product import by_path, increment, resolver


class TowardInitialState(NamedTuple):
    """State of `toward_initial_decay`.

    Attributes:
        count: int32 scalar, completed updates.
        initial: w_0 by path, float32 (float64 for float64 weights), of the leaves that decay. NaN where ``init`` saw
            only shapes: then a state has to be restored, or the first update gives NaN.
    """

    count: jax.Array
    initial: Any


class TowardInitialOptions(TypedDict, total=False):
    """Keyword arguments that `soda_decay` passes on to `toward_initial_decay`, which describes them."""

    cautious: bool | Gate
    mask: masks.Mask
    axes: axes_lib.Axes


def toward_initial_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    cautious: bool | Gate = False,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: Coupling = couplings.learning_rate(),
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ_t (w - w_0)`` to the update, with w_0 the weights at ``init``; stands where `decay` stands.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or an optax schedule of the step.
        cautious: only where the step and the pull agree, ``u (w - w_0) >= 0``; or another of `gates`.
        mask: which leaves decay (`masks.strengths`). None: every leaf that this link is given.
        axes: what the parameters' axes mean (`axes.signatures`), for masks by role.
        coupling: what λ is multiplied with per step, one of `couplings`.

    Returns:
        A transformation with a `TowardInitialState`, a full copy of the decayed weights, whose ``update`` needs params.

    Raises:
        ValueError: a number out of its range, something that is not a coupling; at ``init``, a mask that does not fit.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     optax_decay.toward_initial_decay(0.1),
    ...     optax.scale_by_learning_rate(1e-4),
    ... )
    """
    check("weight_decay", weight_decay, 0.0)
    check_coupling(coupling)
    masks.check_mask(mask)
    gate = as_gate(cautious, coupling.after_rate)
    sign = -1 if coupling.after_rate else 1  # after the learning rate updates point downhill

    resolved = resolver(mask, axes)

    def copy(w: Any) -> jax.Array:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        if isinstance(w, jax.ShapeDtypeStruct):
            return jnp.full(w.shape, jnp.nan, dtype)
        return jnp.array(w, dtype, copy=True)  # never a buffer of the weights, which may be donated

    def init(params: Any) -> TowardInitialState:
        if has_no_leaves(params):
            return placeholder_state(TowardInitialState)
        strength = resolved(params).strengths
        initial = {path: copy(w) for path, w in by_path(params).items() if path in strength}
        if not (isinstance(weight_decay, int | float) and weight_decay == 0):
            pulled = tuple(initial)
            tell(
                Link(
                    "toward_initial_decay", "pull", pulled, weight_decay=weight_decay, initial=True
                )
            )
        return TowardInitialState(jnp.zeros([], jnp.int32), initial)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError(
                "toward_initial_decay needs the weights: call tx.update(updates, state, params)."
            )
        strength, weights = resolved(params).strengths, by_path(params)
        rate = coupling.rate(weight_decay, state.count)

        def leaf(key: Any, u: Any) -> Any:
            path = path_string(key)
            if u is None or path not in strength:
                return u
            dtype = jnp.promote_types(jnp.promote_types(u.dtype, weights[path].dtype), jnp.float32)
            wide, w = u.astype(dtype), weights[path].astype(dtype)
            if gate is not None and gate.stepped:
                w = w + wide
            away = w - state.initial[path]
            term = (rate * strength[path]) * away
            if gate is not None:
                term = jnp.where(gate.keeps(sign * wide, away), term, jnp.zeros_like(term))
            return (wide + sign * term).astype(u.dtype)

        new = jax.tree_util.tree_map_with_path(leaf, updates, is_leaf=lambda x: x is None)
        return new, TowardInitialState(increment(state.count), state.initial)

    return optax.GradientTransformationExtraArgs(init, update)


@passes_options_to(toward_initial_decay, "weight_decay", "coupling")
def soda_decay(
    start: float | jax.Array = 2.0, **options: Unpack[TowardInitialOptions]
) -> optax.GradientTransformationExtraArgs:
    """SODA: moves every weight by ``(w_0 - w)/(t + 2)`` per step; stands after ``scale_by_learning_rate``.

    Args:
        start: the 2, >= 1.
        options: cautious, mask, axes, as in `toward_initial_decay`. SODA's demo for Muon leaves out the leaves of Adam.

    Returns:
        A transformation with a `TowardInitialState`, a full copy of the decayed weights, whose ``update`` needs params.

    Raises:
        ValueError: as `toward_initial_decay`.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.adam(1e-3), optax_decay.soda_decay())
    """
    return toward_initial_decay(schedules.soda(start), coupling=couplings.independent(), **options)
