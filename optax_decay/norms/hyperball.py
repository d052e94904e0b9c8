"""Hyperball: every matrix stays on the sphere it starts on, and the learning rate is an angle.

With w a matrix before the step, Δ the finished update that arrives (learning rate and sign included), ‖·‖ the Frobenius
norm of one slice (`slices`), R the radius (units of the weights) and η_t the learning rate::

    x = w + η_t R Δ/‖Δ‖,      w ← R x/‖x‖,      R = ‖w_0‖

Only the direction of Δ matters. η is the length of the step relative to the matrix: it turns w by ``atan η`` if Δ is
orthogonal to w. The norm is exact at every step, so that no decay of these matrices has anything left to do.

Reference: "Hyperball" (arXiv 2606.16899); with Adam's direction known as AdamH, with Muon's as MuonH.

**Differs from the paper and the released programs.** Only the abstract of the paper could be read.

* Levanter and rollfast take the direction u and replace ``scale_by_learning_rate``; here the link stands last, as all
  links of this kind, and is given η once more. A chain in the other convention climbs, and nothing in the arrays tells.
* R is stored, in float32. Levanter, Paddle and ArchScale read ‖w_t‖ again at every step, which drifts: by -2.9 % in
  20 000 steps with bfloat16 weights and η = 0.01, and by -0.02 % with float32 ones.
* Which weights share a sphere is `per`. Levanter has one for all experts of a layer, ``per="layer"``; HeavyBall and
  rollfast have one per array, ``per="leaf"``. Levanter also puts every weight of a vector on its own sphere, where it
  can never move; here vectors are left alone.
* Zero matrices have no radius. They raise at ``init``; most programs leave them at zero for ever, Levanter makes NaN.
* A step of η_t = 0, or without direction, changes no bit.

**Cost.** State: 4 bytes per matrix. Two reductions per matrix and step.
"""

from typing import Any, NamedTuple

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
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.product import masks
from optax_decay.product.couplings import now
from optax_decay.product.links import Link, and_more, tell
from optax_decay.product.product import increment


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
        count: int32 scalar, completed updates.
        radius: R by path, float32 (float64 for float64 weights), one per slice. NaN where ``init`` saw only shapes, or
            under ``jax.jit`` a slice of zeros: then a state has to be restored, or the first update gives NaN.
    """

    count: jax.Array
    radius: Any


def hyperball(
    *,
    learning_rate: optax.ScalarOrSchedule,
    radius: float | jax.Array | None = None,
    per: str = "matrix",
    min_direction: float | jax.Array = 0.0,
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norm of every matrix and turns it by the angle that the learning rate says; stands last in the chain.

    Anything that moves the weights after this link leaves the sphere. A decay before it is part of the direction:
    where it is proportional to w (l2 with any multiplier per matrix) the sphere undoes it; where it is not (a bounded
    pull, a cautious gate) it turns the step, by an amount relative to the size of the update.

    Args:
        learning_rate: η, the same number or schedule as in the chain's ``scale_by_learning_rate``.
        radius: R as RMS per weight, > 0, for every slice; the first step moves the weights onto that sphere. None: the
            norm that each slice has at ``init``.
        per: the weights that share a sphere: ``"matrix"``, ``"layer"``, ``"leaf"`` or ``"output"`` (`slices`).
        min_direction: a slice rests while the RMS of its update, before the learning rate, is at most this. With 0 a
            matrix that gets no gradients, such as an expert without tokens, walks on at full speed along what is left
            of its momentum.
        mask: which leaves; they must be matrices. Everything else passes through.
        axes: what the parameters' axes mean (`axes.signatures`).
        param_specs: inside ``shard_map``, the PartitionSpecs of the parameters (or a prefix of the tree).

    Returns:
        A transformation with a `HyperballState`, whose ``update`` needs params. Radii must be saved with the weights:
        they cannot be read from trained weights without drift.

    Raises:
        ValueError: a number out of its range or an unknown name; at ``init``, a slice of zeros without `radius`, or a
            selected leaf that is not a matrix.

    >>> import optax, optax_decay
    >>> schedule = optax.linear_schedule(0.02, 0.0, 1000)
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(b1=0.9, b2=0.95),
    ...     optax.scale_by_learning_rate(schedule),
    ...     optax_decay.hyperball(learning_rate=schedule),
    ... )
    """
    check("learning_rate", learning_rate, 0.0)
    if radius is not None:
        check("radius", radius, 0.0, open_low=True)
    check("min_direction", min_direction, 0.0)
    check_slices(per, mask)

    def init(params: Any) -> HyperballState:
        if has_no_leaves(params):
            return placeholder_state(HyperballState)
        found = slices(params, per, mask, axes, param_specs)
        tell(
            Link(
                "hyperball",
                "sphere",
                tuple(found),
                learning_rate=learning_rate,
                per=per,
                slices={path: own.reduced for path, own in found.items()},
            )
        )
        start = norms(params, found)
        if radius is not None:
            start = {
                path: jnp.full_like(value, radius * found[path].size ** 0.5)
                for path, value in start.items()
            }
        empty = list(zeros(start))
        if empty:
            raise ValueError(
                f"{and_more(empty)} holds only zeros, so that there is no sphere to stay on: initialise it otherwise, "
                "pass radius=..., or exclude it from the sphere."
            )
        return HyperballState(
            jnp.zeros([], jnp.int32),
            {path: jnp.where(value > 0, value, jnp.nan) for path, value in start.items()},
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        eta = now(learning_rate, state.count)

        def step(u: jax.Array, w: jax.Array, own: Slices) -> jax.Array:
            sphere = state.radius[own.path].astype(jnp.finfo(u.dtype).dtype)
            length = own.norm(u)
            # Written with <= and ~, so that NaN moves: it must not be hidden.
            rests = (length == 0) | (length <= eta * (min_direction * own.size**0.5))
            stride = eta * sphere / jnp.where(length == 0, 1, length)
            x = w + own.spread(stride) * u
            norm = own.norm(x)
            # A step of η = 1 straight to the centre has no direction either.
            rests = rests | (eta == 0) | (norm == 0)
            scale = own.spread(sphere / jnp.where(norm == 0, 1, norm))
            return jnp.where(own.spread(rests), 0, scale * x - w)

        found = {} if params is None else slices(params, per, mask, axes, param_specs)
        new = map_slices(updates, params, found, step, "hyperball")
        return new, HyperballState(increment(state.count), state.radius)

    return optax.GradientTransformationExtraArgs(init, update)
