"""The largest singular value of every matrix of a model, followed through a run, and the gains of sublayers.

The gain of a sublayer is the product of the largest singular values along it, a bound on how much it enlarges its
input. Singular values are computed by power iteration with carried vectors, see `orthogonal.top_singular_value`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.matrices.orthogonal import top_singular_value, top_singular_vector
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.paths import matches
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import by_path

Vectors = dict[str, jax.Array]


def top_singular_values(
    params: optax.Params,
    vectors: Vectors | None = None,
    *,
    iterations: int = 4,
    exact_below: int = 0,
    roles: Sequence[str] = ("hidden", "head"),
    axes: axes_lib.Axes = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> tuple[dict[str, jax.Array], Vectors]:
    """The largest singular value of every matrix, from vectors that are carried from call to call.

    Singular vectors of weights turn slowly: a few iterations per call follow them, if each call gets the vectors that
    the last one returned. The function is pure and can be jitted. It works on split weights (Auto and Explicit meshes)
    without gathering them.

    Args:
        params: the weights.
        vectors: the vectors that the last call returned, or None for a fixed start.
        iterations: of power iteration; each multiplies a matrix with a vector twice.
        exact_below: matrices whose smaller side is below this are solved exactly instead.
        roles: parameters of another role, and those that hold no matrix, are left out.
        axes: as in `axes.signatures`.
        mesh: where the weights are split over a mesh with Auto axes that is not the surrounding ``jax.set_mesh``.

    Returns:
        ``(values, vectors)`` by path. Values are float32 of the shape ``signature.batch_shape``; vectors have the
        fan-out as an additional last dimension.
    """
    weights, found = by_path(params), axes_lib.signatures(axes, params)
    values, carried = {}, {}
    for path, signature in found.items():
        if signature.role not in roles or not signature.is_matrix:
            continue
        matrices = axes_lib.as_matrix(weights[path], signature)
        dtype = accumulator_dtype(matrices.dtype)
        start = (
            top_singular_vector(matrices.shape, dtype)
            if vectors is None
            else jnp.reshape(vectors[path], (matrices.shape[0], signature.fan_out))
        )
        top, vector = top_singular_value(
            matrices, start, iterations=iterations, exact_below=exact_below, mesh=mesh
        )
        values[path] = jnp.reshape(top, signature.batch_shape)
        carried[path] = jnp.reshape(vector, (*signature.batch_shape, signature.fan_out))
    return values, carried


def top_singular_vectors(
    params: optax.Params, *, roles: Sequence[str] = ("hidden", "head"), axes: axes_lib.Axes = None
) -> Vectors:
    """The vectors from which `top_singular_values` starts. Passing them to the first call saves a compilation."""
    weights = by_path(params)
    return {
        path: top_singular_vector(
            (*signature.batch_shape, signature.fan_in, signature.fan_out),
            accumulator_dtype(weights[path].dtype),
        )
        for path, signature in axes_lib.signatures(axes, params).items()
        if signature.role in roles and signature.is_matrix
    }


def sublayer_gains(
    values: Mapping[str, Any], sublayers: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The products of largest singular values along sublayers.

    Args:
        values: from `top_singular_values`.
        sublayers: name to path patterns, such as ``{"mlp": ("mlp/up/kernel", "mlp/down/kernel")}``.

    Returns:
        One gain per sublayer, of the shape of its values.

    Raises:
        ValueError: a pattern that matches no matrix or several, or matrices stacked differently.
    """
    gains = {}
    for name, patterns in sublayers.items():
        paths = []
        for pattern in patterns:
            hits = [path for path in values if matches(pattern, path)]
            if len(hits) != 1:
                raise ValueError(
                    f"sublayer {name!r}: {pattern!r} must match one matrix, but it matches {hits}; the matrices are "
                    f"{sorted(values)}."
                )
            paths.append(hits[0])
        shapes = {np.shape(values[path]) for path in paths}
        if len(shapes) != 1:
            raise ValueError(f"sublayer {name!r} mixes stacks of shapes {sorted(shapes)}.")
        gains[name] = math.prod(values[path] for path in paths)
    return gains
