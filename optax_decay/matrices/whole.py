"""Functions of whole matrices, applied to weights that are split over devices.

Factorising a matrix that FSDP and tensor parallelism have split over two mesh axes either gathers it everywhere and
repeats the work on every device (Auto axes), or fails (Explicit axes). `each_matrix` instead gives every device a few
*whole* matrices of the stack: one all-to-all per mesh axis brings them in, and numbers (or the same all-to-alls) go
out. No weight is gathered: of D devices, each receives 1/D of the bytes of the stack.

======================== ==========================================================================================
where the code runs      effect
======================== ==========================================================================================
one device               the function is called directly
jit, Explicit axes       mesh and partition are read from the array's type
jit, Auto axes           the mesh is that of ``jax.set_mesh`` or the argument `mesh`; the partition is the argument
                         `spec`, or left to the compiler; without a mesh the compiler gathers and repeats
inside ``shard_map``     arrays are shards as `spec` says, or whole matrices if there is no `spec`
======================== ==========================================================================================
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optax_decay.parameters.meshes import mark_varying, reshard, varying_axes


def split_axes(spec: Sequence[Any]) -> tuple[tuple[str, int], ...]:
    """The mesh axes of a partition with the dimension that each splits; the fastest varying of a dimension first."""
    found: list[tuple[str, int]] = []
    for dimension, entry in enumerate(spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        found.extend((name, dimension) for name in reversed(names))
    return tuple(found)


def inside_shard_map() -> bool:
    """Whether this code runs inside ``shard_map``, where arrays are shards."""
    return AxisType.Manual in (jax.sharding.get_abstract_mesh().axis_types or ())


def known_mesh(x: jax.Array, mesh: Any) -> Any:
    """The mesh over which matrices can be spread: the argument, that of x, or that in context; else None."""
    own = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    for found in (mesh, own, jax.sharding.get_abstract_mesh()):
        if found is not None and not found.empty:
            return found
    return None


def _spare_axes(count: int, sizes: dict[str, int], taken: int) -> tuple[str, ...]:
    """The mesh axes of `sizes` that finish `count` matrices soonest, with the fewest devices among equals."""
    choices = itertools.chain.from_iterable(
        itertools.combinations(sizes, r) for r in range(len(sizes) + 1)
    )

    def cost(axes: tuple[str, ...]) -> tuple[int, int]:
        devices = taken * math.prod(sizes[a] for a in axes)
        return math.ceil(count / devices), devices

    return min(choices, key=cost)


def each_matrix(
    fn: Callable[..., Any],
    x: jax.Array,
    *others: jax.Array,
    lead: int | None = None,
    mesh: Any = None,
    spec: Any = None,
) -> Any:
    """Applies `fn` to stacks of whole matrices, spread over the devices of the mesh.

    Args:
        fn: ``([b, *inner], [b, ...], ...) -> tree of [b, ...]``, which treats each of the b matrices independently.
        x: ``[*lead, *inner]``; the leading axes are flattened for `fn` and restored after it.
        others: arrays with the same leading axes, replicated.
        lead: number of leading axes; default: all but two.
        mesh: the mesh, see the table above.
        spec: the partition of x (``jax.P`` with an entry per dimension of x), where it cannot be read from x.

    Returns:
        The tree of `fn` with the leading axes restored: outputs with the shape of x are split like x, others are the
        same on all devices.

    Raises:
        ValueError: x has too few dimensions; inside ``shard_map``, a leading axis is split, or x is a shard and `spec`
            does not say how it is split.
    """
    lead = x.ndim - 2 if lead is None else lead
    if lead < 0:
        raise ValueError(f"an array of shape {x.shape} holds no matrices: expected [..., m, n].")
    entries = tuple(spec or ()) + (None,) * (x.ndim - len(spec or ()))
    if inside_shard_map():
        if spec is None and varying_axes(x):
            raise ValueError(
                f"an array of shape {x.shape} inside shard_map is a shard (it varies over "
                f"{sorted(varying_axes(x))}): pass its partition as spec=..., or () if it holds whole matrices."
            )
        if any(e is not None for e in entries[:lead]):
            raise ValueError(
                f"the leading axes of shape {x.shape[:lead]} are split ({spec}) inside shard_map; split the "
                "matrices instead."
            )
        return _spread(fn, (x, *others), lead, entries[lead:], ())
    found = known_mesh(x, mesh)
    if found is None:
        return _spread(fn, (x, *others), lead, (), ())
    explicit = AxisType.Explicit in found.axis_types
    if explicit:
        entries = tuple(jax.typeof(x).sharding.spec)
        # Splitting the leading axes would leave whole matrices in place, but other leaves may be split otherwise.
        x = reshard(x, jax.P(*(None,) * lead, *entries[lead:]))
        others = tuple(reshard(a, jax.P()) for a in others)
    elif spec is None:
        return _left_to_compiler(fn, (x, *others), lead, found)
    inner = entries[lead:]
    taken = {name for name, _ in split_axes(inner)}
    devices = math.prod(found.shape[a] for a in taken)
    rest = {a: n for a, n in found.shape.items() if a not in taken}
    spare = _spare_axes(math.prod(x.shape[:lead]), rest, devices)
    like_x = jax.P(*(None,) * lead, *inner)
    shapes = jax.eval_shape(
        lambda *a: fn(*(jnp.zeros((1, *b.shape[lead:]), b.dtype) for b in a)), x, *others
    )
    out = jax.shard_map(
        lambda *a: _spread(fn, a, lead, inner, spare),
        mesh=found,
        in_specs=(like_x, *(jax.P() for _ in others)),
        out_specs=jax.tree.map(
            lambda s: like_x if s.shape[1:] == x.shape[lead:] else jax.P(), shapes
        ),
    )(x, *others)
    if explicit and any(e is not None for e in entries[:lead]):
        out = jax.tree.map(lambda a: reshard(a, jax.P(*entries)) if a.shape == x.shape else a, out)
    return out


def _left_to_compiler(fn: Any, inputs: tuple[jax.Array, ...], lead: int, mesh: Any) -> Any:
    """For Auto axes and an unknown partition: asks for whole matrices and lets the compiler move them."""
    shape = inputs[0].shape[:lead]
    count = math.prod(shape)
    axes = _spare_axes(count, dict(mesh.shape), 1)
    padding = -count % math.prod(mesh.shape[a] for a in axes)
    flat = (a.reshape((count, *a.shape[lead:])) for a in inputs)
    padded = (jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)) for a in flat)
    whole = jax.P(axes or None)
    out = jax.shard_map(fn, mesh=mesh, in_specs=whole, out_specs=whole)(*padded)
    return jax.tree.map(lambda a: a[:count].reshape(shape + a.shape[1:]), out)


def _spread(
    fn: Any, inputs: Sequence[jax.Array], lead: int, inner: Sequence[Any], spare: tuple[str, ...]
) -> Any:
    """The exchange of matrices, from the view of one device.

    Args:
        inputs: ``[*lead, *shard]``, then replicated arrays ``[*lead, ...]``.
        inner: partition of the matrix.
        spare: mesh axes over which the matrices are replicated, so that different devices can take different ones.
    """
    shape = inputs[0].shape[:lead]
    count = math.prod(shape)
    moves = split_axes(inner)
    names = spare + tuple(name for name, _ in moves)
    devices = math.prod(jax.lax.axis_size(a) for a in names)
    flat = [a.reshape((count, *a.shape[lead:])) for a in inputs]
    if devices == 1 and not names:
        return jax.tree.map(lambda a: a.reshape(shape + a.shape[1:]), fn(*flat))
    padding = -count % devices
    flat = [jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)) for a in flat]
    mine = (count + padding) // devices
    position = device_position(names)

    x = flat[0]
    if spare:
        part = x.shape[0] // math.prod(jax.lax.axis_size(a) for a in spare)
        x = jax.lax.dynamic_slice_in_dim(x, device_position(spare) * part, part)
    x = bring_together(x, moves)
    rest = [jax.lax.dynamic_slice_in_dim(a, position * mine, mine) for a in flat[1:]]
    whole = x.shape[1:]
    out = fn(x, *rest)

    def give_back(a: jax.Array) -> jax.Array:
        if a.shape[1:] == whole:
            for name, dimension in reversed(moves):
                a = jax.lax.all_to_all(a, name, dimension + 1, 0, tiled=True)
            for name in reversed(spare):
                a = _gather(a, name)
        else:
            # A sum of parts that do not overlap, because after it JAX knows that all devices agree.
            dtype = jnp.int32 if a.dtype == jnp.bool_ else a.dtype
            table = jnp.zeros((count + padding, *a.shape[1:]), dtype)
            table = jax.lax.dynamic_update_slice_in_dim(table, a.astype(dtype), position * mine, 0)
            a = jax.lax.psum(table, names).astype(a.dtype)
        return a[:count].reshape(shape + a.shape[1:])

    return jax.tree.map(give_back, out)


def bring_together(x: jax.Array, moves: Sequence[tuple[str, int]]) -> jax.Array:
    """Inside ``shard_map``: ``[D·b, *shard] -> [b, *whole]`` by one all-to-all per mesh axis of `moves` (`split_axes`).

    D is the number of devices along those axes. The device at `device_position` i gets the rows from i·b to (i+1)·b.
    """
    for name, dimension in moves:
        x = jax.lax.all_to_all(x, name, 0, dimension + 1, tiled=True)
    return x


def vary_over(x: jax.Array, names: Sequence[str]) -> jax.Array:
    """Marks x as differing between devices along mesh axes. Branches and loop carries must agree on these marks."""
    return mark_varying(x, names)


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`vary_over` the mesh axes over which another array differs."""
    return vary_over(x, tuple(varying_axes(like)))


def device_position(names: Sequence[str]) -> jax.Array:
    """Inside ``shard_map``: the index of this device along several mesh axes, of which the first varies slowest."""
    index = jnp.zeros([], jnp.int32)
    for name in names:
        index = index * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return index


def _gather(a: jax.Array, name: str) -> jax.Array:
    size, index = jax.lax.axis_size(name), jax.lax.axis_index(name)
    table = jnp.zeros((size * a.shape[0], *a.shape[1:]), a.dtype)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(table, a, index * a.shape[0], 0), name)
