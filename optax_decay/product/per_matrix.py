"""One number per matrix: what thresholds and multipliers have in common.

A `PerMatrix` gives every decayed parameter one float32 number, or one per slice if the leaf stacks several matrices,
and may keep memory between steps. The threshold of the Huber pull is one (``1.5 · mean|w|``), the spectral
multiplier of AlphaDecay is one, and so is the constant. `decay` multiplies and applies them.

To write a new one, return ``PerMatrix(init, update)``. Both see dictionaries by path, holding only the parameters that
decay; values have the shape ``signature.batch_shape`` (or are plain numbers). State must be arrays only, with dtypes
and shapes that stay the same from step to step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters import paths
from optax_decay.parameters.meshes import varying_axes

AxisName = str | tuple[str, ...] | None  # mesh axes of a surrounding shard_map
Value = float | jax.Array  # a number, or a float32 array of shape () or `signature.batch_shape`


class Context(NamedTuple):
    """All that a `PerMatrix` can see in one step.

    Attributes:
        updates: incoming updates by path; a path is absent where the update is None.
        params: weights before the step, by path.
        signatures: `axes.Signature` by path.
        count: int32 scalar, number of completed updates.
        extra: the extra arguments given to ``update``, unchanged.
    """

    updates: Mapping[str, jax.Array]
    params: Mapping[str, jax.Array]
    signatures: Mapping[str, axes_lib.Signature]
    count: jax.Array
    extra: Mapping[str, Any]

    def gradients(self) -> dict[str, jax.Array]:
        """Raw gradients by path: the extra argument ``gradients`` if the caller gives it, else the updates.

        A link that stands after ``scale_by_adam`` no longer sees gradients; pass ``tx.update(grads, state, params,
        gradients=grads)``.
        """
        tree = self.extra.get("gradients")
        if tree is None:
            return dict(self.updates)
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        found = {paths.path_string(key): leaf for key, leaf in leaves}
        missing = [path for path in self.params if path not in found]
        if missing:
            raise ValueError(
                f"the extra argument 'gradients' has no leaf at {missing[0]!r}; give the whole tree."
            )
        return {path: found[path] for path in self.params}


class PerMatrix(NamedTuple):
    """One number per matrix, with memory.

    Attributes:
        init: ``(params by path, signatures by path) -> state``; params may be ``jax.ShapeDtypeStruct``.
        update: ``(Context, state) -> (values by path, state)``.
    """

    init: Callable[[Mapping[str, Any], Mapping[str, axes_lib.Signature]], Any]
    update: Callable[[Context, Any], tuple[dict[str, Value], Any]]


def now(value: optax.ScalarOrSchedule, count: jax.Array) -> Value:
    """A number, or the value of a schedule at this step."""
    return value(count) if callable(value) else value  # type: ignore[return-value]


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> Any:
    """float32 for low precision and float32, float64 for float64; the real counterpart for complex."""
    return jnp.promote_types(jnp.finfo(dtype).dtype, jnp.float32)


def constant(value: optax.ScalarOrSchedule) -> PerMatrix:
    """The same number for every matrix; a number, or an optax schedule of the step."""

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        return dict.fromkeys(context.params, now(value, context.count)), state

    return PerMatrix(lambda params, signatures: (), update)


def slice_mean(
    x: jax.Array, signature: axes_lib.Signature, axis_name: AxisName = None, what: str = "a mean"
) -> jax.Array:
    """Mean of `x` over each slice of a parameter, in accumulator precision.

    Args:
        x: real array of the parameter's shape.
        signature: which axes count as one slice.
        axis_name: inside ``shard_map``, the mesh axes over which slices are split.
        what: names the caller in the error.

    Returns:
        Array of shape ``signature.batch_shape``.

    Raises:
        ValueError: the array varies over mesh axes of a ``shard_map`` and no `axis_name` says what to sum over.
    """
    x = x.astype(accumulator_dtype(x.dtype))
    varying = varying_axes(x)
    if varying and axis_name is None:
        raise ValueError(
            f"{what} of {signature.path!r} is taken inside shard_map on a shard that varies over {sorted(varying)}: "
            f"pass axis_name=... with the mesh axes that split one matrix (() if none does)."
        )
    total = jnp.sum(x, axis=signature.reduced)
    size = jnp.asarray(x.size // max(1, total.size), x.dtype)
    if axis_name:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        # Summing the sizes too keeps the mean right for leaves that are replicated over some of the axes.
        total, size = jax.lax.psum(total, names), jax.lax.psum(size, names)
    return total / size
