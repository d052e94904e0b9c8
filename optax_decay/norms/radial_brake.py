"""Radial brake: the finished step keeps its direction on the sphere and loses part of what it adds to the norm.

With w a matrix before the step, Δ the finished update that arrives, x = w + Δ, ‖·‖ the Frobenius norm of one slice
(`slices`), and s the share of a change of norm that is kept, `outward` or `inward` according to its sign::

    norm           w ← x (‖w‖ + s (‖x‖ - ‖w‖)) / ‖x‖

    first_order    c = ⟨Δ, w⟩/‖w‖²,   Δ' = Δ + (s - 1) c w,   w ← (w + Δ')/‖w + Δ'‖ · ‖w‖ (1 + s c)

``norm`` looks at the norm itself. ``first_order`` looks at the radial part of Δ and drops all growth of second order
``‖Δ‖²/2‖w‖``, so that a step orthogonal to w keeps the norm. The learning rate is not needed, and nothing is stored. A
decay before this link is part of Δ and points inward; ``inward < 1`` weakens it.

References: ``norm``, the radial brake of Emerging-Optimizers (NVIDIA-NeMo); ``first_order``, records 29 and later of
track 3 of modded-nanogpt (pull request 294).

**Differs from the released programs.**

* Emerging-Optimizers applies decoupled decay before it measures ‖w‖, so that its brake never acts on the decay; here
  decay is part of Δ, which is the same for ``inward=1``.
* The record applies its floor on the size of the update to the direction that is already braked. As separate links the
  floor stands before the learning rate and sees the raw direction: equal where the floor does nothing.
* The record's norm turns negative when a step points inward by more than ``‖w‖/s``; here it stops at zero.
* Zero matrices: ``norm`` moves them by s Δ, as Emerging-Optimizers does; ``first_order`` by 1e-8 Δ/‖Δ‖, as the record
  does, and by more from the next step on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.norms.slices import Slices, check_slices, map_slices, slices
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, one_of
from optax_decay.product import masks
from optax_decay.product.links import Link, tell

RULES = ("norm", "first_order")
NORM_FLOOR = 1e-8  # the record's, for first_order


def radial_brake(
    outward: float | jax.Array = 0.5,
    inward: float | jax.Array = 1.0,
    *,
    rule: str = "norm",
    per: str = "matrix",
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps a share of every change of norm; stands last in the chain.

    ``radial_brake(0.0, 0.0)`` keeps every norm without setting the length of the step, as `hyperball` does.

    Args:
        outward: s in [0, 1] where the norm would grow.
        inward: s in [0, 1] where it would shrink.
        rule: ``"norm"`` or ``"first_order"``, see the module.
        per: the weights that share a norm: ``"matrix"``, ``"layer"``, ``"leaf"`` or ``"output"`` (`slices`).
        mask: which leaves; they must be matrices. Everything else passes through.
        axes: what the parameters' axes mean (`axes.signatures`).
        param_specs: inside ``shard_map``, the PartitionSpecs of the parameters (or a prefix of the tree).

    Returns:
        A transformation without state, whose ``update`` needs params.

    Raises:
        ValueError: a number out of its range or an unknown name; when updated, a selected leaf that is not a matrix.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.adamw(1e-3), optax_decay.radial_brake())
    """
    check("outward", outward, 0.0, 1.0)
    check("inward", inward, 0.0, 1.0)
    one_of("rule", rule, RULES)
    check_slices(per, mask)

    def init(params: Any) -> optax.EmptyState:
        found = slices(params, per, mask, axes, param_specs)
        tell(Link("radial_brake", "brake", tuple(found), per=per, inward=inward))
        return optax.EmptyState()

    def by_norm(u: jax.Array, w: jax.Array, own: Slices) -> jax.Array:
        old, new = own.norm(w), own.norm(w + u)
        # (new² - old²)/(new + old): the difference of two large numbers only where it is large.
        both = old + new
        growth = own.dot(u, w + w + u) / jnp.where(both > 0, both, 1)
        kept = jnp.where(growth > 0, outward, inward)
        change = (kept - 1) * growth / jnp.where(new > 0, new, 1)
        return u + own.spread(change) * (w + u)

    def by_first_order(u: jax.Array, w: jax.Array, own: Slices) -> jax.Array:
        old = jnp.maximum(own.norm(w), NORM_FLOOR)
        c = own.dot(u, w) / (old * old)
        kept = jnp.where(c > 0, outward, inward)
        x = w + u + own.spread((kept - 1) * c) * w
        norm = own.norm(x)
        radius = old * jnp.maximum(1 + kept * c, 0)
        moved = x * own.spread(radius / jnp.where(norm > 0, norm, 1)) - w
        return jnp.where(own.spread(own.dot(u, u) == 0), 0, moved)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        found = {} if params is None else slices(params, per, mask, axes, param_specs)
        step = by_norm if rule == "norm" else by_first_order
        return map_slices(updates, params, found, step, "radial_brake"), state

    return optax.GradientTransformationExtraArgs(init, update)
