"""Slices of a parameter that have one norm each, and those norms in the precision and on the mesh they need.

========== =================================== ============================= ==================
per        one norm for                        ``"L E | D -> F"``            shape of the norms
========== =================================== ============================= ==================
matrix     inputs × outputs                    every expert of every layer   [L, E]
layer      all but the first batch axis        all experts of a layer        [L]
leaf       the whole array                     everything                    []
output     the incoming weights of an output   every neuron of every expert  [L, E, F]
========== =================================== ============================= ==================

Under ``jax.jit`` arrays may be sharded in any way: sums are those of the global array. Inside ``shard_map`` an array is
a shard, and the sums are completed over the mesh axes that split a slice, according to `param_specs`, and over no
others: replicas and other slices do not count.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.matrices.whole import split_axes
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import one_of
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import path_string
from optax_decay.product import masks
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import by_path

PER = ("matrix", "layer", "leaf", "output")


class Slices(NamedTuple):
    """How one parameter is cut into slices.

    Attributes:
        path: of the parameter.
        shape: of the parameter; of the shard inside ``shard_map``.
        reduced: dimensions that lie within a slice.
        split: mesh axes over which a slice is split inside ``shard_map``; None if no `param_specs` says so.
    """

    path: str
    shape: tuple[int, ...]
    reduced: tuple[int, ...]
    split: tuple[str, ...] | None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of one number per slice."""
        return tuple(n for i, n in enumerate(self.shape) if i not in self.reduced)

    @property
    def size(self) -> int:
        """Weights of one slice, on all devices together."""
        size = int(np.prod([self.shape[i] for i in self.reduced], dtype=np.int64))
        for name in self.split or ():
            size *= jax.lax.axis_size(name)
        return size

    def spread(self, numbers: Any) -> Any:
        """One number per slice, so that it broadcasts against the parameter."""
        return jnp.expand_dims(numbers, self.reduced) if self.batch_shape else numbers

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums of real `x` over each slice: an array of `batch_shape`.

        Raises:
            ValueError: `x` is a shard of a ``shard_map``, and no `param_specs` says how it is split.
        """
        if self.split is None and (varying := varying_axes(x)):
            raise ValueError(
                f"the norms of {self.path!r} are taken inside shard_map, where it varies over {sorted(varying)}: pass "
                "param_specs=..., the PartitionSpecs of the parameters."
            )
        total = jnp.sum(x, axis=self.reduced)
        return jax.lax.psum(total, self.split) if self.split else total

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Real inner products of the slices of `x` and `y`."""
        return self.sum(jnp.real(x * jnp.conj(y)) if jnp.iscomplexobj(x) else x * y)

    def norm(self, x: jax.Array) -> jax.Array:
        """Frobenius norms of the slices of `x`."""
        return jnp.sqrt(self.dot(x, x))


def check_slices(per: Any, mask: masks.Mask) -> None:
    """Raises ValueError for an unknown `per` and for roles that do not exist."""
    one_of("per", per, PER)
    masks.check_mask(mask)


def slices(
    params: Any, per: str, mask: masks.Mask, axes: axes_lib.Axes, param_specs: Any
) -> dict[str, Slices]:
    """The slices of every parameter that `mask` selects, by path.

    Raises:
        ValueError: a selected parameter that is not a matrix; axes, a mask or specs that do not fit.
    """
    signatures = axes_lib.signatures(axes, params)
    strength = masks.strengths(mask, params, signatures)
    specs = specs_by_path(param_specs, params, signatures)
    found = {}
    for path, signature in signatures.items():
        if not strength[path]:
            continue
        if not signature.is_matrix:
            raise ValueError(
                f"{path!r} of shape {signature.shape} is not a matrix by its axes, and a rule about norms leaves "
                "vectors alone: exclude it with mask=..., such as mask='hidden'."
            )
        reduced = {
            "matrix": signature.reduced,
            "layer": tuple(i for i in range(len(signature.shape)) if i not in signature.batch[:1]),
            "leaf": tuple(range(len(signature.shape))),
            "output": signature.inputs,
        }[per]
        split = None
        if path in specs:
            split = tuple(name for name, i in split_axes(specs[path]) if i in reduced)
        found[path] = Slices(path, signature.shape, tuple(sorted(reduced)), split)
    return found


def specs_by_path(param_specs: Any, params: Any, signatures: Any) -> dict[str, Any]:
    """Partitions by path inside ``shard_map``; empty elsewhere, where they do not matter.

    Raises:
        ValueError: `param_specs` is not a prefix of the tree of parameters.
    """
    manual = jax.sharding.AxisType.Manual
    if param_specs is None or manual not in (jax.sharding.get_abstract_mesh().axis_types or ()):
        return {}
    flat: list[Any] = []
    try:
        jax.tree.map(
            lambda spec, part: flat.extend([spec or jax.P()] * len(jax.tree.leaves(part))),
            param_specs,
            params,
            is_leaf=lambda x: x is None or isinstance(x, jax.P),
        )
    except ValueError as error:
        raise ValueError(
            f"param_specs is not a tree of PartitionSpec like the parameters (or a prefix of it): {error}"
        ) from error
    return dict(zip(signatures, flat, strict=True))


def map_slices(
    updates: Any,
    params: Any,
    found: dict[str, Slices],
    step: Callable[[jax.Array, jax.Array, Slices], jax.Array],
    name: str,
) -> Any:
    """``step(u, w, slices)`` in at least float32 for every selected leaf; the others pass through.

    Raises:
        ValueError: no params; the message names the caller, `name`.
    """
    if params is None:
        raise ValueError(f"{name} needs the weights: call tx.update(updates, state, params).")
    weights = by_path(params)

    def leaf(key: Any, u: Any) -> Any:
        path = path_string(key)
        if u is None or path not in found:
            return u
        w = weights[path]
        dtype = jnp.promote_types(jnp.promote_types(u.dtype, w.dtype), jnp.float32)
        return step(u.astype(dtype), w.astype(dtype), found[path]).astype(u.dtype)

    return jax.tree_util.tree_map_with_path(leaf, updates, is_leaf=lambda x: x is None)


def wide(w: jax.Array) -> jax.Array:
    """`w` in the precision in which norms are taken: float32, or that of `w` if it is higher."""
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def norms(params: Any, found: dict[str, Slices]) -> dict[str, jax.Array]:
    """Frobenius norms of the selected slices; NaN for ``jax.ShapeDtypeStruct``, which has none."""
    values = {}
    for path, w in by_path(params).items():
        if path not in found:
            continue
        if isinstance(w, jax.ShapeDtypeStruct):
            shape, dtype = found[path].batch_shape, accumulator_dtype(w.dtype)
            values[path] = jnp.full(shape, jnp.nan, dtype)
        else:
            values[path] = found[path].norm(wide(w))
    return values


def zeros(values: dict[str, jax.Array]) -> Iterator[str]:
    """Names of the slices with norm zero, ``path[index]``; none of traced or abstract norms."""
    for path, value in values.items():
        if isinstance(value, jax.core.Tracer) or not value.is_fully_addressable:
            continue
        for index in np.argwhere(np.asarray(value) == 0):
            yield f"{path}[{', '.join(map(str, index))}]" if len(index) else path
