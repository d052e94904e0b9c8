"""Placement of arrays, as the types of every supported JAX record it; no other file reads those types."""

from collections.abc import Iterable

import jax


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Mesh axes of the surrounding ``shard_map`` over which `x` differs between devices.

    Empty outside ``shard_map``, and everywhere under ``shard_map(..., check_vma=False)``, which does not track it.
    """
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # jax >= 0.10
        return getattr(kind.manual_axis_type, "varying", frozenset())
    return getattr(kind, "vma", frozenset())


def inside_shard_map() -> bool:
    """Whether arrays are parts of larger ones here, split by hand over mesh axes."""
    mesh = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    return bool(getattr(mesh, "manual_axes", ()))


def mark_varying(x: jax.Array, names: Iterable[str]) -> jax.Array:
    """Marks `x` as differing between devices along mesh axes of the surrounding ``shard_map``."""
    missing = tuple(name for name in names if name not in varying_axes(x))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):  # jax >= 0.8
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # type: ignore[attr-defined]


def gather_alike(x: jax.Array, axis_name: str | tuple[str, ...]) -> jax.Array:
    """``jax.lax.all_gather`` in ``shard_map``, with a result that counts as the same on every device."""
    if hasattr(jax.lax, "pcast"):  # jax >= 0.8
        return jax.lax.all_gather(x, axis_name, to="invarying")
    return jax.lax.all_gather_invariant(x, axis_name)  # type: ignore[attr-defined]


# `jax.reshard` stood in `jax.sharding` before jax 0.8.
reshard = jax.reshard if hasattr(jax, "reshard") else jax.sharding.reshard
