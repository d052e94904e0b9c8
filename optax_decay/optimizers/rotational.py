"""Rotational AdamW: the rotation per step that weight decay would settle at, from the first step on.

Under AdamW the weights of a neuron reach an equilibrium where decay and updates balance: a constant norm, and a
rotation of sqrt(2ηλ(1-β₁)/(1+β₁)) per step. This keeps every neuron there. With u the optimizer's direction before
the learning rate, w one row (the incoming weights of one output), s its norm at the first step::

    d = u - mean(u)                         (zero_mean)
    d ← d - w (d·w)/s²
    q ← a q + (1-a)‖d‖²
    v = w - ρ s d/(ε + sqrt(q/(1-aᵗ)))      ρ = sqrt(2 η λ (1-β₁)/(1+β₁))
    w ← v s/‖v‖

λ is AdamW's. The norm of a row never changes: give the layer a learnable gain where it should.

Reference: Kosson, Messmer and Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
Networks", arXiv 2305.17212; their code (epfml/REQ, class RotationalAdamW).

**Differs from the code.**

* Their constructor also centres the rows of the initial weights: apply `center_rows` to yours. Updates without mean
  keep them centred. Without it the radial projection puts some of the mean back, and norms are those of whole rows.
* Rotational are the leaves of role ``"hidden"``; theirs are all of two or more dimensions, embeddings and head
  included. `rotational_adamw` decays the head as AdamW does.
* A row of zeros has no direction: it is moved by -ηu instead of 0/0, and keeps moving so for the whole run. A
  direction of which centring and projection leave only rounding does not turn its row; there it turns it anywhere.
* λ = 0 is refused, as there: nothing would move.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import path_string
from optax_decay.product import masks
from optax_decay.product.couplings import now
from optax_decay.product.decay import decay
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import by_path, increment


class RotationalState(NamedTuple):
    """State of `rotational_update`: dictionaries by path, one float32 per row, with the rows' axes kept as 1.

    Attributes:
        count: int32 scalar, completed updates.
        norm: s, norm of each row at the first step.
        square: q, average of ‖d‖².
    """

    count: jax.Array
    norm: Any
    square: Any


def _rows(
    params: Any, per_neuron: bool, mask: masks.Mask, axes: axes_lib.Axes
) -> dict[str, tuple[int, ...]]:
    """The axes of one row, for every leaf that rotates."""
    signatures = axes_lib.signatures(axes, params)
    strength = masks.strengths(mask, params, signatures)
    found = {}
    for path, signature in signatures.items():
        if strength[path] and not signature.is_matrix:
            raise ValueError(
                f"{path!r} of shape {signature.shape} cannot rotate: its axes do not make it a matrix."
            )
        if strength[path]:
            found[path] = signature.inputs if per_neuron else signature.reduced
    return found


def rotational_update(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    b1: float = 0.9,
    *,
    average: float = 0.9,
    eps: float = 1e-8,
    zero_mean: bool = True,
    per_neuron: bool = True,
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Turns directions into steps: rotations of fixed mean angle where `mask` says so, ``-η u`` elsewhere.

    Takes the place of both decay and ``scale_by_learning_rate`` at the end of a chain.

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ > 0 of the AdamW whose equilibrium is kept; a number or schedule.
        b1: β₁ in [0, 1) of the Adam in the chain.
        average: a in [0, 1), how slowly the size of updates is tracked; 0 makes every rotation exactly ρ.
        eps: ε >= 0, in units of the direction's norm.
        zero_mean: remove the mean of every row from its updates.
        per_neuron: rows are the inputs of one output; False: whole matrices.
        mask: which leaves rotate, as in `decay`; they must be matrices, which `axes` describes.
        axes: as in `decay`.

    Returns:
        A transformation with a `RotationalState`, whose ``update`` needs params.

    Raises:
        ValueError: a number out of its range; at ``init``, a chosen leaf that is no matrix; when updated, weights
            split by ``shard_map`` (under jit they may be sharded in any way).
    """
    check("learning_rate", learning_rate, 0.0)
    check("weight_decay", weight_decay, 0.0, open_low=True)
    check("b1", b1, 0.0, 1.0, open_high=True)
    check("average", average, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    masks.check_mask(mask)

    def rows(params: Any) -> dict[str, tuple[int, ...]]:
        return _rows(params, per_neuron, mask, axes)

    def init(params: Any) -> RotationalState:
        count = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            # optax.tree.map_params calls init with a leafless placeholder and needs a prefix of the real state.
            return RotationalState(count, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))
        leaves = by_path(params)

        def zeros() -> dict[str, jax.Array]:
            # Sums of zeros rather than zeros: on explicit mesh axes they are sharded as the rows are.
            return {
                path: jnp.sum(
                    jnp.zeros_like(leaves[path], accumulator_dtype(leaves[path].dtype)),
                    axis=row,
                    keepdims=True,
                )
                for path, row in rows(params).items()
            }

        return RotationalState(count, zeros(), zeros())

    def rotate(u: Any, w: Any, row: Any, norm: Any, square: Any, count: Any, eta: Any) -> Any:
        """The step of one leaf, and the state of its rows."""

        def length(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(x * x, axis=row, keepdims=True))

        def divide(x: jax.Array, y: jax.Array) -> jax.Array:
            return x / jnp.where(y > 0, y, 1)

        s = jnp.where(count == 0, length(w), norm)
        d = u - jnp.mean(u, axis=row, keepdims=True) if zero_mean else u
        d = d - w * divide(jnp.sum(d * w, axis=row, keepdims=True), s * s)
        d = jnp.where(length(d) > 16 * jnp.finfo(d.dtype).eps * length(u), d, 0)
        q = average * square + (1 - average) * jnp.sum(d * d, axis=row, keepdims=True)
        steps = count.astype(q.dtype) + 1
        # 1 - a**t without cancellation; log1p(-1) = -inf gives 1 for a = 0.
        typical = jnp.sqrt(q / -jnp.expm1(steps * jnp.log1p(-jnp.asarray(1 - average, q.dtype))))
        angle = jnp.sqrt(2 * eta * now(weight_decay, count) * (1 - b1) / (1 + b1))
        turned = w - angle * s * divide(d, eps + typical)
        new = turned * divide(s, length(turned))
        return jnp.where(s > 0, new - w, -eta * u), s, q

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError(
                "rotational_update needs the weights: call tx.update(updates, state, params)."
            )
        chosen, weights = rows(params), by_path(params)
        norms, squares = dict(state.norm), dict(state.square)
        eta = now(learning_rate, state.count)

        def leaf(key: Any, u: Any) -> Any:
            path = path_string(key)
            if u is None:
                return None
            if path not in chosen:
                return (-eta * u).astype(u.dtype)
            w = weights[path]
            if split := sorted(varying_axes(w) | varying_axes(u)):
                raise ValueError(
                    f"rotational_update needs whole matrices inside shard_map; {path!r} varies over {split}. "
                    "Call it under jit, where weights may be sharded in any way."
                )
            dtype = jnp.promote_types(jnp.promote_types(u.dtype, w.dtype), jnp.float32)
            step, norm, square = rotate(
                u.astype(dtype),
                w.astype(dtype),
                chosen[path],
                norms[path],
                squares[path],
                state.count,
                eta,
            )
            norms[path] = norm.astype(norms[path].dtype)
            squares[path] = square.astype(squares[path].dtype)
            return step.astype(u.dtype)

        flat = jax.tree_util.tree_map_with_path(leaf, updates, is_leaf=lambda x: x is None)
        return flat, RotationalState(increment(state.count), norms, squares)

    return optax.GradientTransformationExtraArgs(init, update)


def center_rows(
    params: Any, *, per_neuron: bool = True, mask: masks.Mask = "hidden", axes: axes_lib.Axes = None
) -> Any:
    """Initial weights without the means of their rows, and with the norms they had.

    Args:
        params: tree of weights.
        per_neuron, mask, axes: as in `rotational_update`.

    >>> import jax.numpy as jnp, optax_decay
    >>> centred = optax_decay.center_rows({"w": jnp.array([[0.0], [2.0]])})["w"]
    >>> [round(float(x), 3) for x in centred.ravel()]
    [-1.414, 1.414]
    """
    rows = _rows(params, per_neuron, mask, axes)

    def center(key: Any, w: jax.Array) -> jax.Array:
        row = rows.get(path_string(key))
        if row is None:
            return w
        x = w.astype(accumulator_dtype(w.dtype))
        centred = x - jnp.mean(x, axis=row, keepdims=True)
        norm, left = (jnp.sqrt(jnp.sum(y * y, axis=row, keepdims=True)) for y in (x, centred))
        return (centred * (norm / jnp.where(left > 0, left, 1))).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(center, params)


def rotational_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    *,
    mask: masks.Mask = "hidden",
    head: masks.Mask = "head",
    axes: axes_lib.Axes = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose hidden matrices rotate; the head decays as in AdamW, everything else does not.

    That needs `axes`: without a description, every leaf of exactly two dimensions counts as a hidden matrix.

    Args:
        learning_rate: η, a number or schedule.
        b1, b2, eps: as in ``optax.adam``.
        weight_decay: λ > 0, for both; a number or schedule.
        mask: which leaves rotate, as in `decay`.
        head: which leaves decay, as in `decay`.
        axes: what the parameters' axes mean (`axes.signatures`).
        options: average, zero_mean, per_neuron, as in `rotational_update`.

    >>> import optax_decay
    >>> tx = optax_decay.rotational_adamw(1e-3, weight_decay=0.1)
    """
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        decay(weight_decay, mask=head, axes=axes),
        rotational_update(learning_rate, weight_decay, b1, mask=mask, axes=axes, **options),
    )
