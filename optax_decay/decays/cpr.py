"""Constrained parameter regularization (CPR): decay only what exceeds a bound, with a force that learns itself.

With θ = w + u the weights after the optimizer's step, R a size of one matrix (one slice of a stacked leaf) of n
weights, κ its bound, and one multiplier ℓ per matrix, ℓ_0 = 0::

    ℓ ← max(0, ℓ + μ (R(θ) - κ)),      w ← θ - s ℓ ∇R(θ)

============ ============ ==================================== ========
measure      R            ∇R                                   μ
============ ============ ==================================== ========
l2           Σ θ²         2θ                                   rate/n
l1           ``Σ |θ|``    sign θ                               rate/n
huber        Σ H₁(θ)      clip(θ, -1, 1)                       rate/n
std          std θ        (θ - mean θ)/((n-1) std θ)           rate
============ ============ ==================================== ========

(std with n-1.) This is the augmented Lagrangian of the constraint R <= κ: no decay below the bound, and an
integrating one above. s is 1, or η_t if `learning_rate` is given. κ comes from one of `bounds`; until it is known
nothing decays.

Reference: Franke, Hefenbrock, Koehler and Hutter, "Improving Deep Learning Optimization through Constrained Parameter
Regularization", arXiv 2311.09058; their code (automl/CPR, class AdamCPR), whose default is l2 with the inflection.

**Differs from the code.**

* Its inflection test exists twice: on CPU it compares every step (``bounds.inflection(k, sample_every=1)`` here), on
  GPU every k-th, where it also decays against a placeholder bound of 1000 meanwhile. The default here is every k-th,
  without that decay. Its moving average of R is never stored and so changes nothing; there is none here. It always
  tests Σθ², here R.
* On GPU its l1 pull is θ instead of sign θ, and its std does not run. The table above is its CPU path.
* Slices of stacked leaves have their own ℓ and κ. Which parameters take part is `mask`; theirs are the weights of
  linear layers without embeddings, biases and norms.
* std = 0 has no gradient here instead of 0/0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.decays import bounds
from optax_decay.decays.bounds import Bound
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, one_of
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.product import masks
from optax_decay.product.couplings import now
from optax_decay.product.links import Link, tell
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import by_path, increment, resolver


class CprState(NamedTuple):
    """State of `cpr_decay`: dictionaries by path of float32 arrays of shape ``signature.batch_shape``.

    Attributes:
        count: int32 scalar, completed updates.
        multiplier: ℓ.
        bound: κ; infinite until it is known.
        sample: R at the last sample; used by `bounds.inflection`.
        growth: difference of the last two samples; used by `bounds.inflection`.
    """

    count: jax.Array
    multiplier: Any
    bound: Any
    sample: Any
    growth: Any


class _Slices(NamedTuple):
    """Sums over one slice, and back."""

    signature: axes_lib.Signature
    number: int

    def sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=self.signature.reduced)

    def spread(self, x: jax.Array) -> jax.Array:
        return self.signature.spread(x) if x.ndim else x


def _l2(x: jax.Array, slices: _Slices) -> tuple[jax.Array, jax.Array]:
    return slices.sum(jnp.square(jnp.abs(x))), 2 * x


def _l1(x: jax.Array, slices: _Slices) -> tuple[jax.Array, jax.Array]:
    return slices.sum(jnp.abs(x)), jnp.sign(x)


def _huber(x: jax.Array, slices: _Slices) -> tuple[jax.Array, jax.Array]:
    size = jnp.abs(x)
    inside = size < 1
    return slices.sum(jnp.where(inside, size * size / 2, size - 0.5)), jnp.where(
        inside, x, jnp.sign(x)
    )


def _std(x: jax.Array, slices: _Slices) -> tuple[jax.Array, jax.Array]:
    centred = x - slices.spread(slices.sum(x) / slices.number)
    free = max(1, slices.number - 1)
    std = jnp.sqrt(slices.sum(jnp.square(jnp.abs(centred))) / free)
    wide = slices.spread(std)
    return std, jnp.where(wide > 0, centred / (free * jnp.where(wide > 0, wide, 1)), 0)


MEASURES: dict[str, Callable[[jax.Array, _Slices], tuple[jax.Array, jax.Array]]] = {
    "l2": _l2,
    "l1": _l1,
    "std": _std,
    "huber": _huber,
}


def cpr_decay(
    bound: Bound = bounds.inflection(),
    *,
    measure: str = "l2",
    rate: optax.ScalarOrSchedule = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the size of each matrix at or below its bound; stands last in the chain and replaces weight decay.

    Args:
        bound: κ, one of `bounds`.
        measure: R: ``"l2"``, ``"l1"``, ``"std"`` or ``"huber"``.
        rate: μ n (μ for std) > 0; a number or schedule.
        learning_rate: η, a number or schedule, if decay is to be scaled by it.
        mask, axes: as in `decay`; by default hidden matrices and the output head. Without `axes`, names of parameters
            decide (`axes.signatures`).

    Returns:
        A transformation with a `CprState`, whose ``update`` needs params.

    Raises:
        ValueError: an unknown measure, a number out of its range, something that is not a bound; when updated,
            weights split by ``shard_map`` (under jit they may be sharded in any way).

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.adam(1e-3), optax_decay.cpr_decay(optax_decay.bounds.warm_start(2000)))
    """
    bounds.check_bound(bound)
    one_of("measure", measure, MEASURES)
    check("rate", rate, 0.0, open_low=True)
    masks.check_mask(mask)
    regularizer = MEASURES[measure]

    resolved = resolver(mask, axes)

    def chosen(params: optax.Params) -> dict[str, axes_lib.Signature]:
        _, signatures, strengths = resolved(params)
        if partly := [path for path, strength in strengths.items() if strength != 1.0]:
            raise ValueError(
                f"the mask at {partly[0]!r} is {strengths[partly[0]]:g}; a matrix is constrained or not, so cpr_decay "
                "takes True and False only."
            )
        return signatures

    def init(params: optax.Params) -> CprState:
        if has_no_leaves(params):
            return placeholder_state(CprState)
        leaves = by_path(params)
        tell(Link("cpr_decay", "pull", tuple(chosen(params)), proportional=measure == "l2"))

        def full(value: float) -> dict[str, jax.Array]:
            return {
                path: jnp.full(s.batch_shape, value, accumulator_dtype(leaves[path].dtype))
                for path, s in chosen(params).items()
            }

        return CprState(
            jnp.zeros([], jnp.int32), full(0.0), full(float("inf")), full(0.0), full(0.0)
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> Any:
        del extra
        if params is None:
            raise ValueError("cpr_decay needs the weights: call tx.update(updates, state, params).")
        signatures, weights = chosen(params), by_path(params)
        new = CprState(increment(state.count), *(dict(part) for part in state[1:]))

        def leaf(key: jax.tree_util.KeyPath, u: jax.Array) -> Any:
            path = path_string(key)
            if u is None or path not in signatures:
                return u
            w = weights[path]
            if split := sorted(varying_axes(w) | varying_axes(u)):
                raise ValueError(
                    f"cpr_decay needs whole matrices inside shard_map; {path!r} varies over {split}. "
                    "Call it under jit, where weights may be sharded in any way."
                )
            dtype = jnp.promote_types(jnp.promote_types(u.dtype, w.dtype), jnp.float32)
            w, theta = w.astype(dtype), w.astype(dtype) + u.astype(dtype)
            signature = signatures[path]
            number = max(1, w.size // max(1, state.bound[path].size))
            slices = _Slices(signature, number)
            size, gradient = regularizer(theta, slices)
            before = regularizer(w, slices)[0] if bound.reads_initial else size
            memory = bounds.Memory(state.bound[path], state.sample[path], state.growth[path])
            memory = bound.advance(increment(state.count), size, before, memory)
            mu = now(rate, state.count) / (1 if measure == "std" else number)
            # An infinite bound must not meet μ: the derivative of the force by μ would be 0 · ∞.
            unknown = jnp.isposinf(memory.bound)
            excess = jnp.where(unknown, 0, size - jnp.where(unknown, 0, memory.bound))
            force = jnp.maximum(state.multiplier[path] + mu * excess, 0)
            values = (force, *memory)
            for part, old, value in zip(new[1:], state[1:], values):
                part[path] = value.astype(old[path].dtype)
            if learning_rate is not None:
                force = force * now(learning_rate, state.count)
            return (theta - slices.spread(force) * gradient - w).astype(u.dtype)

        flat = jax.tree_util.tree_map_with_path(leaf, updates, is_leaf=lambda x: x is None)
        return flat, new

    return optax.GradientTransformationExtraArgs(init, update)
