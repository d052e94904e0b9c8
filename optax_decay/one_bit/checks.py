"""What must hold where workers compress their momenta, and errors that say which of it does not."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.one_bit import buffers as sign_buffers
from optax_decay.one_bit import compression as sc
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import leaf_paths
from optax_decay.product import masks


class Leaf(NamedTuple):
    """One parameter: its path, whether its momentum is compressed, how it is sharded, which axes stack matrices."""

    path: str
    compressed: bool
    spec: jax.sharding.PartitionSpec
    batch: tuple[int, ...]


def resolve(
    tree: Any, compress: masks.Mask, axes: axes_lib.Axes, param_specs: Any, axis_name: sc.AxisName
) -> list[Leaf]:
    """The leaves of `tree` in flattening order.

    Raises:
        ValueError: a mask, axes or specs that do not fit, a spec that names a compressed axis, numbers without a sign.
    """
    for path, x in zip(leaf_paths(tree), jax.tree.leaves(tree)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{path!r} holds {x.dtype}; one_bit_adam takes real floating numbers.")
    signatures = axes_lib.signatures(axes, tree)
    chosen = masks.strengths(compress, tree, signatures)
    specs: list[Any] = []
    try:
        jax.tree.map(
            lambda spec, part: specs.extend([spec or jax.P()] * len(jax.tree.leaves(part))),
            param_specs,
            tree,
            is_leaf=lambda x: x is None or isinstance(x, jax.P),
        )
    except ValueError as error:
        raise ValueError(
            f"param_specs is not a tree of PartitionSpec like the parameters (or a prefix of it): {error}"
        ) from error
    leaves = [
        Leaf(path, chosen[path] > 0, spec, signature.batch)
        for (path, signature), spec in zip(signatures.items(), specs, strict=True)
    ]
    for leaf in leaves:
        check_not_split(leaf.path, sign_buffers.spec_axes(leaf.spec), axis_name)
    return leaves


def check_not_split(path: str, axes: Any, axis_name: sc.AxisName) -> None:
    """Raises ValueError when a parameter is sharded over a compressed axis."""
    both = sorted(set(axes) & set(sc.axis_tuple(axis_name)))
    if both:
        raise ValueError(
            f"the parameter {path!r} is sharded over {both[0]!r}, the axis that one_bit_adam compresses over. All "
            f"workers of that axis must hold the same parameters: shard them over another mesh axis, or compress "
            f"over another one. (Inside shard_map: state and params come in with specs that leave {both[0]!r} out, and "
            f"tx.update gets the original params, not local_params.)"
        )


def check_placement(leaves: Sequence[Leaf], arrays: Sequence[Any], axis_name: sc.AxisName) -> None:
    """Raises ValueError when arrays given to ``init`` are laid out over a compressed axis."""
    for leaf, x in zip(leaves, arrays):
        traced = isinstance(x, jax.core.Tracer)
        sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
        spec = getattr(sharding, "spec", jax.P())
        check_not_split(leaf.path, sign_buffers.spec_axes(spec), axis_name)
        if traced:
            check_not_split(leaf.path, varying_axes(x), axis_name)


def check_update(
    leaves: Sequence[Leaf], grads: Sequence[Any], mu: Sequence[Any], axis_name: sc.AxisName
) -> None:
    """Raises ValueError when ``update`` runs outside `shard_map`, or on gradients that are not the worker's own."""
    axes = sc.axis_tuple(axis_name)
    for axis in axes:
        if not sc.is_bound(axis):
            raise ValueError(
                f"one_bit_adam compresses over the mesh axis {axis!r}, but this update does not run inside "
                f"jax.shard_map over it. Outside, gradients are averaged before an optimizer sees them."
            )
    if not sc.tracks_varying(axis_name):
        return
    for leaf, g, m in zip(leaves, grads, mu):
        check_not_split(leaf.path, varying_axes(m), axis_name)
        missing = [axis for axis in axes if axis not in varying_axes(g)]
        if missing:
            raise ValueError(
                f"the gradient of {leaf.path!r} is the same on all workers of {missing[0]!r}: it has been summed over "
                f"the mesh already. Differentiate with respect to optax_decay.local_params(params, {axis_name!r})."
            )
        # The first holds axes of the shard_map, the second those of an Explicit mesh that it leaves to the compiler.
        split = varying_axes(m) | set(sign_buffers.spec_axes(jax.typeof(m).sharding.spec))
        extra = sorted(split - set(sign_buffers.spec_axes(leaf.spec)))
        if leaf.compressed and extra:
            raise ValueError(
                f"the momentum of {leaf.path!r} is split over {extra[0]!r}, which its entry {leaf.spec} in param_specs "
                f"does not name; pass param_specs=..., the PartitionSpecs of the parameters."
            )
