"""The parameters as 1-bit Adam sees them, and checks that workers may compress their momenta."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.one_bit import compression
from optax_decay.one_bit.buffers import spec_axes
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import leaf_paths
from optax_decay.product import masks


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        path: its ``/``-joined path.
        compressed: whether its momentum is compressed.
        spec: how it is sharded.
        batch: its dimensions that index separate matrices.
    """

    path: str
    compressed: bool
    spec: jax.sharding.PartitionSpec
    batch: tuple[int, ...]


def describe(
    tree: Any,
    compress: masks.Mask,
    axes: axes_lib.Axes,
    param_specs: Any,
    axis_name: compression.AxisName,
) -> list[Parameter]:
    """The parameters of `tree` in flattening order.

    Raises:
        ValueError: a mask, axes or specs that do not fit, a spec that names a compressed axis, numbers that are not
            real.
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
    found = [
        Parameter(path, chosen[path] > 0, spec, signature.batch)
        for (path, signature), spec in zip(signatures.items(), specs, strict=True)
    ]
    for parameter in found:
        check_not_split(parameter.path, spec_axes(parameter.spec), axis_name)
    return found


def check_compressed(found: Sequence[Parameter], compress: masks.Mask) -> None:
    """Raises ValueError when no parameter is compressed, so that layout, floor and bound would be ignored."""
    if not any(parameter.compressed for parameter in found):
        raise ValueError(
            f"compress={compress!r} selects none of the {len(found)} parameters, so nothing would be sent as signs; "
            f"allowed: a mask that selects at least one, such as compress=None for all of them. The first is "
            f"{found[0].path!r}. Without compression use optax.adam on averaged gradients."
        )


def check_not_split(path: str, axes: Iterable[str], axis_name: compression.AxisName) -> None:
    """Raises ValueError when a parameter is sharded over a compressed axis."""
    both = sorted(set(axes) & set(compression.axis_tuple(axis_name)))
    if both:
        raise ValueError(
            f"the parameter {path!r} is sharded over {both[0]!r}, the axis that one_bit_adam compresses over. All "
            f"workers of that axis must hold the same parameters: shard them over another mesh axis, or compress "
            f"over another one. (Inside shard_map, the specs of state and params must not contain {both[0]!r}, and "
            f"tx.update takes the original params, not local_params.)"
        )


def check_placement(
    found: Sequence[Parameter], arrays: Sequence[Any], axis_name: compression.AxisName
) -> None:
    """Raises ValueError when arrays given to ``init`` are laid out over a compressed axis."""
    for parameter, x in zip(found, arrays):
        traced = isinstance(x, jax.core.Tracer)
        sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
        spec = getattr(sharding, "spec", jax.P())
        check_not_split(parameter.path, spec_axes(spec), axis_name)
        if traced:
            check_not_split(parameter.path, varying_axes(x), axis_name)


def check_update(
    found: Sequence[Parameter],
    grads: Sequence[Any],
    mu: Sequence[Any],
    axis_name: compression.AxisName,
) -> None:
    """Raises ValueError when ``update`` runs outside `shard_map`, or on gradients that are not the worker's own."""
    axes = compression.axis_tuple(axis_name)
    for axis in axes:
        if not compression.is_bound(axis):
            raise ValueError(
                f"one_bit_adam compresses over the mesh axis {axis!r}, but this update does not run inside "
                f"jax.shard_map over it. Outside, gradients are averaged before an optimizer sees them."
            )
    if not compression.tracks_varying(axis_name):
        return
    for parameter, g, m in zip(found, grads, mu):
        check_not_split(parameter.path, varying_axes(m), axis_name)
        missing = [axis for axis in axes if axis not in varying_axes(g)]
        if missing:
            raise ValueError(
                f"the gradient of {parameter.path!r} is the same on all workers of {missing[0]!r}: it has been summed "
                f"over the mesh already. Differentiate with respect to "
                f"optax_decay.one_bit.local_params(params, {axis_name!r})."
            )
        # The first are axes of the shard_map, the second axes of an Explicit mesh that it leaves to the compiler.
        split = varying_axes(m) | set(spec_axes(jax.typeof(m).sharding.spec))
        extra = sorted(split - set(spec_axes(parameter.spec)))
        if parameter.compressed and extra:
            raise ValueError(
                f"the momentum of {parameter.path!r} is split over {extra[0]!r}, which its entry {parameter.spec} in "
                f"param_specs does not name; pass param_specs=..., the PartitionSpecs of the parameters."
            )
