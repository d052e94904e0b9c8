"""Placement of arrays, as JAX's types record it; no other file reads those types."""

import jax


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Mesh axes of the surrounding ``shard_map`` over which `x` differs between devices.

    Empty outside ``shard_map``, and everywhere under ``shard_map(..., check_vma=False)``, which does not track it.
    """
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())
