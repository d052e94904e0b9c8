"""What the compiler knows about where an array lives: the one place that reads JAX's types for it."""

import jax


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Mesh axes of the surrounding ``shard_map`` over which `x` differs between devices.

    Empty outside ``shard_map``, and everywhere under ``shard_map(..., check_vma=False)``, which does not track it.
    """
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())
