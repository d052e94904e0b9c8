"""Shardings of parameters, from the names of their axes."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from optax_decay.parameters.axes import Axes, Signature, signatures


def partition_specs(
    axes: Axes, params: optax.Params, mesh_axes: Mapping[str, str | tuple[str, ...] | None]
) -> Any:
    """Shardings from names: a tree of ``jax.P`` that puts every named axis on its mesh axis.

    Args:
        axes: as in `signatures`; names are needed, so rules or signature strings.
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh_axes: name of an array axis to mesh axis, tuple of mesh axes or None. Names left out are replicated.

    Raises:
        ValueError: one parameter would use a mesh axis twice, or `mesh_axes` holds a name that no parameter has.
    """
    found = signatures(axes, params)
    known = sorted({name for signature in found.values() for name in signature.names})
    for name in mesh_axes:
        if found and name not in known:
            raise ValueError(
                f"mesh_axes names {name!r}, which no parameter has; names are {known}."
            )

    def spec(signature: Signature) -> jax.sharding.PartitionSpec:
        entries = [mesh_axes.get(name) for name in signature.names] or [None] * len(signature.shape)
        used: dict[str, str] = {}
        for name, entry in zip(signature.names, entries):
            for axis in () if entry is None else (entry,) if isinstance(entry, str) else entry:
                if axis in used:
                    raise ValueError(
                        f"{signature.path!r} ({' '.join(signature.names)}) would put both {used[axis]!r} and "
                        f"{name!r} on the mesh axis {axis!r}; map one of them to another axis or to None."
                    )
                used[axis] = name
        return jax.P(*entries)

    return jax.tree.unflatten(jax.tree.structure(params), map(spec, found.values()))
