"""Rotational AdamW: every step rotates each neuron by the angle that AdamW's decay would settle at.

Under AdamW the weights of a neuron reach an equilibrium between decay and updates, with a constant norm and a rotation
of sqrt(2ηλ(1-β₁)/(1+β₁)) per step. This optimizer keeps every neuron at that equilibrium from the first step on. With u
the optimizer's direction before the learning rate, w one row (the incoming weights of one output), and s the norm of
the row at the first step::

    d = u - mean(u)                         (zero_mean)
    d ← d - w (d·w)/s²
    q ← a q + (1-a)‖d‖²
    v = w - ρ s d/(ε + sqrt(q/(1-aᵗ)))      ρ = sqrt(2 η λ (1-β₁)/(1+β₁))
    w ← v s/‖v‖

λ is that of AdamW, a is `memory`, and ρ is the angle in radians. The norm of a row never changes, so a layer whose
output should change its size needs a learnable gain.

Reference: Kosson, Messmer and Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
Networks", arXiv 2305.17212; their code (epfml/REQ, class RotationalAdamW).

**Differs from the code.**

* Their constructor also centres the rows of the initial weights; apply `center_rows` to yours. Updates without a mean
  keep them centred. If they are not centred, the radial projection adds some of the mean back, and norms are those of
  the whole rows.
* Leaves of role ``"hidden"`` rotate; in the code all leaves of two or more dimensions do, embeddings and head included.
  `rotational_adamw` decays the head as AdamW does.
* A row of zeros has no direction. It moves by -ηu, here and in all later steps of the run, instead of becoming 0/0. If
  centring and projection leave only rounding errors of a direction, the row does not rotate; in the code it rotates
  in an arbitrary direction.
* λ = 0 raises an error, as in the code, because nothing would move.
"""

from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.parameters.structures import once_per_structure
from optax_decay.product import masks
from optax_decay.product.couplings import now
from optax_decay.product.decay import decay
from optax_decay.product.links import Link, tell
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import by_path, increment
from optax_decay.product.running_means import share_seen


class RotationalState(NamedTuple):
    """State of `rotational_update`: dictionaries by path, one float32 per row, with the rows' axes kept as 1.

    Attributes:
        count: int32 scalar, completed updates.
        norm: s, the norm of each row at the first step, in units of the weights.
        square: q, the running mean of ‖d‖².
    """

    count: jax.Array
    norm: Any
    square: Any


class RotationOptions(TypedDict, total=False):
    """Keyword arguments that `rotational_adamw` passes on to `rotational_update`, which describes them."""

    memory: float | jax.Array
    zero_mean: bool
    per_neuron: bool


class _Rotation(NamedTuple):
    """The equations of one leaf, whose rows extend over the axes `row`."""

    row: tuple[int, ...]
    memory: float | jax.Array
    eps: float | jax.Array
    zero_mean: bool

    def sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=self.row, keepdims=True)

    def length(self, x: jax.Array) -> jax.Array:
        return jnp.sqrt(self.sum(x * x))

    def __call__(
        self,
        u: jax.Array,
        w: jax.Array,
        norm: jax.Array,
        square: jax.Array,
        count: jax.Array,
        eta: Any,
        angle: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The step of one leaf, and the norms and mean squares of its rows."""
        s = jnp.where(count == 0, self.length(w), norm)
        d = u - jnp.mean(u, axis=self.row, keepdims=True) if self.zero_mean else u
        d = d - w * _divide(self.sum(d * w), s * s)
        d = jnp.where(self.length(d) > 16 * jnp.finfo(d.dtype).eps * self.length(u), d, 0)
        q = self.memory * square + (1 - self.memory) * self.sum(d * d)
        typical = jnp.sqrt(q / share_seen(self.memory, increment(count), q.dtype))
        rotated = w - angle * s * _divide(d, self.eps + typical)
        new = rotated * _divide(s, self.length(rotated))
        return jnp.where(s > 0, new - w, -eta * u), s, q


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and x where y is not positive."""
    return x / jnp.where(y > 0, y, 1)


def _rows(
    params: optax.Params, per_neuron: bool, mask: masks.Mask, axes: axes_lib.Axes
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
    b1: float | jax.Array = 0.9,
    *,
    memory: float | jax.Array = 0.9,
    eps: float | jax.Array = 1e-8,
    zero_mean: bool = True,
    per_neuron: bool = True,
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Turns directions into steps: rotations of fixed mean angle for the leaves in `mask`, ``-η u`` for all others.

    Replaces both the decay and ``scale_by_learning_rate`` at the end of a chain.

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ > 0 of the AdamW whose equilibrium is kept, dimensionless; a number or schedule.
        b1: β₁ in [0, 1) of the Adam in the chain.
        memory: a in [0, 1), the share of the running mean q that is kept per step. 0 makes every rotation exactly ρ.
        eps: ε >= 0, in units of the direction's norm.
        zero_mean: remove the mean of every row from its updates.
        per_neuron: a row holds the inputs of one output. False: a row is a whole matrix.
        mask: which leaves rotate, as in `decay`. They must be matrices, which `axes` describes.
        axes: what the parameters' axes mean (`axes.signatures`).

    Returns:
        A transformation with a `RotationalState`, whose ``update`` needs params.

    Raises:
        ValueError: a number out of its range; at ``init``, a chosen leaf that is not a matrix; when updated, weights
            that ``shard_map`` splits (under jit they may be sharded in any way).
    """
    check("learning_rate", learning_rate, 0.0)
    check("weight_decay", weight_decay, 0.0, open_low=True)
    check("b1", b1, 0.0, 1.0, open_high=True)
    check("memory", memory, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    masks.check_mask(mask)

    @once_per_structure
    def rows(shapes: optax.Params) -> dict[str, tuple[int, ...]]:
        return _rows(shapes, per_neuron, mask, axes)

    def init(params: optax.Params) -> RotationalState:
        if has_no_leaves(params):
            return placeholder_state(RotationalState)
        leaves = by_path(params)
        turned = rows(params)
        tell(
            Link(
                "rotational_update",
                "sphere",
                tuple(turned),
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                per="output" if per_neuron else "matrix",
                slices=turned,
            )
        )

        def zeros() -> dict[str, jax.Array]:
            # Sums of zeros instead of zeros: on explicit mesh axes they are sharded like the rows.
            return {
                path: jnp.sum(
                    jnp.zeros_like(leaves[path], accumulator_dtype(leaves[path].dtype)),
                    axis=row,
                    keepdims=True,
                )
                for path, row in rows(params).items()
            }

        return RotationalState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> Any:
        del extra
        if params is None:
            raise ValueError(
                "rotational_update needs the weights: call tx.update(updates, state, params)."
            )
        chosen, weights = rows(params), by_path(params)
        norms, squares = dict(state.norm), dict(state.square)
        eta = now(learning_rate, state.count)
        angle = jnp.sqrt(2 * eta * now(weight_decay, state.count) * (1 - b1) / (1 + b1))

        def leaf(key: jax.tree_util.KeyPath, u: jax.Array) -> Any:
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
            rotate = _Rotation(chosen[path], memory, eps, zero_mean)
            step, norm, square = rotate(
                u.astype(dtype),
                w.astype(dtype),
                norms[path],
                squares[path],
                state.count,
                eta,
                angle,
            )
            norms[path] = norm.astype(norms[path].dtype)
            squares[path] = square.astype(squares[path].dtype)
            return step.astype(u.dtype)

        flat = jax.tree_util.tree_map_with_path(leaf, updates, is_leaf=lambda x: x is None)
        return flat, RotationalState(increment(state.count), norms, squares)

    return optax.GradientTransformationExtraArgs(init, update)


def center_rows(
    params: optax.Params,
    *,
    per_neuron: bool = True,
    mask: masks.Mask = "hidden",
    axes: axes_lib.Axes = None,
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

    def center(key: jax.tree_util.KeyPath, w: jax.Array) -> jax.Array:
        row = rows.get(path_string(key))
        if row is None:
            return w
        x = w.astype(accumulator_dtype(w.dtype))
        centred = x - jnp.mean(x, axis=row, keepdims=True)
        norm, left = (jnp.sqrt(jnp.sum(y * y, axis=row, keepdims=True)) for y in (x, centred))
        return (centred * (norm / jnp.where(left > 0, left, 1))).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(center, params)


@passes_options_to(rotational_update, "eps")
def rotational_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    *,
    mask: masks.Mask = "hidden",
    decay_mask: masks.Mask = "head",
    axes: axes_lib.Axes = None,
    **options: Unpack[RotationOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adam whose hidden matrices rotate; the head decays as in AdamW, and everything else does not decay.

    Without `axes`, names of parameters decide (`axes.signatures`).

    Args:
        learning_rate: η, a number or schedule.
        b1, b2, eps: as in ``optax.adam``.
        weight_decay: λ > 0, of the rotation and of the decay, dimensionless; a number or schedule.
        mask: which leaves rotate, as in `decay`.
        decay_mask: which leaves decay, as in `decay`.
        axes: what the parameters' axes mean (`axes.signatures`).
        options: memory, zero_mean, per_neuron, as in `rotational_update`.

    Raises:
        ValueError: as in `rotational_update`; at ``init``, a leaf that is in both masks. Rotation keeps its norm, so
            its decay would be ignored.

    >>> import optax_decay
    >>> tx = optax_decay.rotational_adamw(1e-3, weight_decay=0.1)
    """
    chain = optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        decay(weight_decay, mask=decay_mask, axes=axes),
        rotational_update(learning_rate, weight_decay, b1, mask=mask, axes=axes, **options),
    )

    def init(params: optax.Params) -> Any:
        signatures = axes_lib.signatures(axes, params)
        decayed, rotated = (masks.strengths(m, params, signatures) for m in (decay_mask, mask))
        both = [path for path in signatures if decayed[path] and rotated[path]]
        if both:
            raise ValueError(
                f"{both[0]!r} and {len(both) - 1} more parameters are in mask and in decay_mask. Rotation keeps the "
                "norm of a parameter, so its decay would be ignored: leave it out of one of the two."
            )
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init, chain.update)
