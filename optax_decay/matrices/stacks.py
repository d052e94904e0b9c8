"""One compiled function for all matrices of one shape, from any number of parameters.

Iterations and decompositions of whole matrices have two costs that grow with the number of parameters: a compiled
copy per parameter, and, when matrices are sharded, collectives inside every product. Both disappear when matrices of
one shape are stacked, the function is mapped over the stack, and the axis of the stack is sharded. Each device then
works on its own whole matrices, and data moves once on the way in and once on the way out.

    [B1, m, n], [B2, m, n], …  →  [B1 + B2 + …, m, n]  →  each device B/devices of them  →  back

Under `jax.set_mesh` the stack is spread over every Auto axis of the mesh, unless `stack_axes` names others. Arrays with
Explicit shardings are handled by `on_auto_axes`. Without a mesh in context, the partitioner decides alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optax_decay.matrices.orthogonal import adjoint
from optax_decay.parameters import axes as axes_lib

Function = Callable[[jax.Array], jax.Array]


def on_auto_axes(function: Callable[..., Any], like: Any, *args: Any) -> Any:
    """Calls ``function(*args)`` with the Explicit axes of the mesh turned into Auto axes.

    In Explicit mode, products over sharded axes are errors; with Auto axes the partitioner decides about them.

    Args:
        function: of `args`, returning a tree of the structure of `like`.
        like: tree of arrays; the results get their explicit shardings.
        args: trees of arrays.

    Returns:
        The tree that `function` returns.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves((like, args))]
    explicit = [m for m in meshes if AxisType.Explicit in _axis_types(m).values()]
    if not explicit:
        return function(*args)
    names = tuple(a for a, kind in _axis_types(explicit[0]).items() if kind == AxisType.Explicit)

    def place(x: jax.Array) -> Any:
        sharding = jax.typeof(x).sharding
        return sharding if not sharding.mesh.empty else jax.NamedSharding(explicit[0], jax.P())

    shardings = jax.tree.map(place, like)
    return jax.sharding.auto_axes(function, axes=names, out_sharding=shardings)(*args)


def _axis_types(mesh: Any) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types))


def stack_axes_in_context(stack_axes: Any = None) -> tuple[str, ...]:
    """The mesh axes over which stacks are spread in the current context.

    Args:
        stack_axes: None for all Auto axes of the mesh in context, a name, or a tuple of names (() for none).

    Raises:
        ValueError: a name that the mesh in context does not have.
    """
    kinds = _axis_types(jax.sharding.get_abstract_mesh())
    usable = tuple(name for name, kind in kinds.items() if kind == AxisType.Auto)
    if stack_axes is None:
        return usable
    chosen = (stack_axes,) if isinstance(stack_axes, str) else tuple(stack_axes)
    for name in chosen:
        if name not in kinds:
            raise ValueError(
                f"stack_axes names {name!r}, which the mesh in context does not have; its axes are "
                f"{tuple(kinds)}. Put the mesh in context with jax.set_mesh(mesh)."
            )
    return tuple(name for name in chosen if name in usable)


def map_matrices(
    function: Function,
    stacks: Sequence[jax.Array],
    *,
    stack_axes: Any = None,
    entries_at_once: int = 2**20,
) -> list[jax.Array]:
    """Applies `function` to every matrix of several stacks.

    Args:
        function: ``[k, m, n] -> [k, ...]``, independent over k. Compiled once.
        stacks: arrays ``[B_i, m, n]`` with the same m and n.
        stack_axes: as in `stack_axes_in_context`. The stack is padded with zero matrices to a multiple of the
            devices.
        entries_at_once: upper bound of k·m·n (but k is at least 1). Small matrices are batched and large ones are not,
            which bounds the workspace.

    Returns:
        One array ``[B_i, ...]`` per stack.
    """
    sizes = [len(stack) for stack in stacks]
    x = jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]
    axes = stack_axes_in_context(stack_axes)
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(mesh_shape[name] for name in axes)
    local = functools.partial(_map_chunks, function, entries_at_once=entries_at_once)
    if devices == 1:
        y = local(x)
    else:
        total = len(x)
        x = jnp.pad(x, ((0, -total % devices), (0, 0), (0, 0)))
        spec = jax.P(axes)
        x = _constrained(_in_hops(x, axes), spec)
        y = jax.shard_map(local, in_specs=spec, out_specs=spec, axis_names=set(axes))(x)
        y = _in_hops(y, axes, back=True)[:total]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return list(jnp.split(y, ends))


def sides(signature: axes_lib.Signature) -> tuple[int, int]:
    """(smaller side, larger side) of a parameter's matrices."""
    smaller, larger = sorted((signature.fan_in, signature.fan_out))
    return smaller, larger


def map_by_shape(
    function: Function,
    leaves: dict[str, jax.Array],
    signatures: dict[str, axes_lib.Signature],
    stack_axes: str | Sequence[str] | None = None,
) -> dict[str, jax.Array]:
    """`function` of every matrix of every leaf, compiled once per shape.

    Args:
        function: ``[k, m, n] -> [k, m, n]`` with m <= n, independent over k: tall matrices arrive as their adjoints.
        leaves: arrays by path.
        signatures: of the same paths, all of matrices.
        stack_axes: as in `stack_axes_in_context`.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for path in leaves:
        groups.setdefault(sides(signatures[path]), []).append(path)
    results = {}
    for paths in groups.values():
        stacks = []
        for path in paths:
            x = axes_lib.as_matrix(leaves[path], signatures[path])
            stacks.append(x if x.shape[1] <= x.shape[2] else adjoint(x))
        for path, y in zip(paths, map_matrices(function, stacks, stack_axes=stack_axes)):
            wide = signatures[path].fan_in <= signatures[path].fan_out
            results[path] = axes_lib.from_matrix(y if wide else adjoint(y), signatures[path])
    return {path: results[path] for path in leaves}


def _in_hops(x: jax.Array, axes: tuple[str, ...], back: bool = False) -> jax.Array:
    """Moves the sharding of the stack over one mesh axis at a time.

    Directly from a matrix that is sharded over two axes to a sharded stack, the partitioner gathers everything. One
    axis at a time, each move is an all-to-all.
    """
    hops = [axes[i:] for i in range(len(axes) - 1, 0, -1)]
    free = [jax.P.UNCONSTRAINED] * (x.ndim - 1)
    for hop in hops[::-1] if back else hops:
        x = _constrained(x, jax.P(hop, *free))
    return x


def _constrained(x: jax.Array, spec: jax.P) -> jax.Array:
    """On the mesh of the surrounding program, which jax 0.7 does not look up itself where the array brought it."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, spec))


def _map_chunks(function: Function, x: jax.Array, *, entries_at_once: int) -> jax.Array:
    count = len(x)
    fit = max(1, entries_at_once // math.prod(x.shape[1:]))
    chunk = max(k for k in range(1, min(count, fit) + 1) if count % k == 0)
    if chunk == count:
        return function(x)
    y = jax.lax.map(function, x.reshape(count // chunk, chunk, *x.shape[1:]))
    return y.reshape(count, *y.shape[2:])
