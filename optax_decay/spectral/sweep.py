"""Measuring many matrices a few at a time: one compiled loop per shape, every device its own matrices.

The matrices have a fixed order, and each step measures those of a range [low, high) of it, in loops with dynamic
bounds: the same program serves a step in which nothing is due, one with a few matrices of a staggered schedule, and
all matrices at once. A loop goes in *rounds* of D matrices, one per device: a device takes its shards of D matrices,
exchanges them for one whole matrix (`whole_matrices`) and measures it; at the end one sum over devices shares the
numbers. The order, and so what is measured when, does not depend on D.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from optax_decay.matrices.whole import (
    bring_together,
    device_position,
    inside_shard_map,
    known_mesh,
    split_axes,
    vary_over,
)
from optax_decay.parameters.meshes import varying_axes
from optax_decay.spectral.selection import Leaf

# (matrix [m, n] or [P, m, n] with m <= n, carried number) -> five numbers
Measure = Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
_FIELDS = 5


class Swept(NamedTuple):
    """What a sweep found, ``[T]`` each, in the order of `Sweep.leaves` and their chosen slices.

    Attributes:
        fresh: bool, measured now; the other fields mean nothing where it is False.
        value, stable, centre, error, resolved: see `spectra.Measurement`.
    """

    fresh: jax.Array
    value: jax.Array
    stable: jax.Array
    centre: jax.Array
    error: jax.Array
    resolved: jax.Array


@dataclasses.dataclass(frozen=True)
class _Source:
    """Leaves that are cut alike: one stack of matrices, or several single ones.

    Attributes:
        leaves: one with slices, or some without.
        first, count: the matrices are first .. first + count - 1 of the order.
    """

    leaves: tuple[Leaf, ...]
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the sweep runs.

    Attributes:
        mesh: wrap the sweep in a ``shard_map`` over this mesh; None if it is inside one, or needs none.
        sizes: mesh axes to share matrices over, and their sizes.
    """

    mesh: Any
    sizes: tuple[tuple[str, int], ...]

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.sizes)


def find_place(arrays: Mapping[str, jax.Array], leaves: Sequence[Leaf], mesh: Any) -> Place:
    """Reads from types, context and arguments how the matrices can be shared out; `leaves` say how they are split.

    Raises:
        ValueError: inside ``shard_map``, a parameter is a shard of something that its leaf does not tell; or slices
            are split there.
    """
    names = {name: None for leaf in leaves for name, _ in split_axes(leaf.spec)}
    if inside_shard_map():
        for leaf in leaves:
            told = {name for name, _ in split_axes(leaf.spec)}
            varying = varying_axes(arrays[leaf.path])
            if varying - told:
                raise ValueError(
                    f"{leaf.path!r} is a shard inside shard_map (it varies over {sorted(varying - told)}): pass "
                    f"partition=..., a tree of jax.P like the parameters."
                )
            if any(leaf.spec[i] is not None for i in leaf.slice_axes):
                raise ValueError(
                    f"{leaf.path!r} is split over its layers ({leaf.spec}) inside shard_map; split its matrices."
                )
        return Place(None, tuple((name, jax.lax.axis_size(name)) for name in names))
    found = next((m for x in arrays.values() if (m := known_mesh(x, mesh)) is not None), None)
    if found is None:
        return Place(None, ())
    if AxisType.Explicit not in found.axis_types and (
        not names or math.prod(found.shape.values()) == 1
    ):
        # Auto axes whose use only the compiler knows: it gathers the one matrix that is being measured.
        return Place(None, ())
    return Place(found, tuple(found.shape.items()))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The plan for one tree of parameters.

    Attributes:
        leaves: with their chosen slices, in the order in which they are measured.
        place: where it runs.
        groups: sources by shape; each group is one loop.
    """

    leaves: tuple[Leaf, ...]
    place: Place
    groups: tuple[tuple[_Source, ...], ...]

    @property
    def count(self) -> int:
        return sum(len(leaf.chosen) for leaf in self.leaves)

    def run(
        self,
        arrays: Mapping[str, jax.Array],
        centres: jax.Array,
        low: jax.Array,
        high: jax.Array,
        measure: Measure,
    ) -> Swept:
        """Measures the matrices [low, high).

        Args:
            arrays: parameters by path (shards inside ``shard_map``).
            centres: ``[T]``, handed to `measure`.
            low, high: int32 scalars.
            measure: see `Measure`.
        """
        used = {leaf.path: arrays[leaf.path] for leaf in self.leaves}
        mesh = self.place.mesh

        def body(used: Any, centres: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
            return self._body(used, centres, low, high, measure)

        if mesh is None:
            table = body(used, centres, low, high)
        else:
            specs = {leaf.path: _inner_spec(leaf) for leaf in self.leaves}
            if AxisType.Explicit in mesh.axis_types:
                used = {path: jax.reshard(x, specs[path]) for path, x in used.items()}
                centres, low, high = (jax.reshard(x, jax.P()) for x in (centres, low, high))
            none = jax.P()
            table = jax.shard_map(
                body, mesh=mesh, in_specs=(specs, none, none, none), out_specs=none
            )(used, centres, low, high)
        flags = table[:, [0, 2, 5]] > 0.5
        return Swept(flags[:, 0], table[:, 1], flags[:, 1], table[:, 3], table[:, 4], flags[:, 2])

    def _body(
        self,
        used: Mapping[str, jax.Array],
        centres: jax.Array,
        low: jax.Array,
        high: jax.Array,
        measure: Measure,
    ) -> jax.Array:
        names = tuple(name for name, _ in self.place.sizes)
        table = vary_over(jnp.zeros((self.count + 1, 1 + _FIELDS), centres.dtype), names)
        for group in self.groups:
            table = self._loop(group, used, centres, low, high, table, measure)
        table = table[:-1]
        return jax.lax.psum(table, names) if names else table

    def _loop(
        self,
        group: Sequence[_Source],
        used: Mapping[str, jax.Array],
        centres: jax.Array,
        low: jax.Array,
        high: jax.Array,
        table: jax.Array,
        measure: Measure,
    ) -> jax.Array:
        devices = self.place.devices
        firsts = np.asarray([source.first for source in group])
        counts = np.asarray([source.count for source in group])
        starts, stops = jnp.clip(low - firsts, 0, counts), jnp.clip(high - firsts, 0, counts)
        first_rounds = starts // devices
        rounds = jnp.where(stops > starts, -(-stops // devices) - first_rounds, 0)
        ends = jnp.cumsum(rounds)
        branches = [self._fetcher(source, used) for source in group]

        def one(i: jax.Array, table: jax.Array) -> jax.Array:
            source = jnp.sum(i >= ends)
            nth = first_rounds[source] + i - (ends - rounds)[source]
            w, slot = jax.lax.switch(source, branches, nth)
            # Devices without a matrix of this range write to the row beyond the last.
            row = jnp.where((slot >= low) & (slot < high), slot, self.count)
            numbers = measure(w, centres[jnp.minimum(slot, self.count - 1)])
            new = jnp.stack([jnp.ones([], table.dtype), *(n.astype(table.dtype) for n in numbers)])
            return table.at[row].set(new)

        return jax.lax.fori_loop(0, ends[-1], one, table)

    def _fetcher(self, source: _Source, used: Mapping[str, jax.Array]) -> Callable:
        """A function of the round that returns this device's whole matrix and its slot."""
        leaf = source.leaves[0]
        axes = tuple(name for name, _ in self.place.sizes)
        inner = [i for i in range(len(leaf.shape)) if i not in leaf.slice_axes]
        # A partition over axes of a mesh that is not there, or has one device, splits nothing.
        moves = tuple(m for m in split_axes([leaf.spec[i] for i in inner]) if m[0] in axes)
        split = tuple(name for name, _ in moves)
        spare = tuple(name for name in axes if name not in split)
        together = math.prod(size for name, size in self.place.sizes if name in split)

        def fetch(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            # The matrices of a round in order: by the spare axes first, then by the axes that split them.
            start = i * self.place.devices
            if spare:
                start = start + device_position(spare) * together
            stack = _take(source, used, start, together)
            whole = bring_together(stack, moves)[0]
            mine = start + device_position(split) if split else start
            slot = jnp.where(mine < source.count, source.first + mine, self.count)
            return vary_over(_orient(whole, leaf), axes), vary_over(slot, axes)

        return fetch


def _inner_spec(leaf: Leaf) -> Any:
    """How a leaf enters the sweep: slices are indexed, so their axes must not be split."""
    return jax.P(*(None if i in leaf.slice_axes else s for i, s in enumerate(leaf.spec)))


def _take(
    source: _Source, used: Mapping[str, jax.Array], start: jax.Array, together: int
) -> jax.Array:
    """`together` consecutive matrices of a source, ``[together, *inner]``; past its end the last one repeats."""
    total = source.count
    leaf = source.leaves[0]
    if len(source.leaves) == 1 and leaf.slice_axes:
        x = jnp.moveaxis(used[leaf.path], leaf.slice_axes, range(len(leaf.slice_axes)))
        place = jnp.minimum(start + jnp.arange(together), total - 1)
        flat = jnp.asarray(leaf.chosen)[place]
        index = jnp.unravel_index(flat, leaf.slice_shape)
        if together == 1:
            for axis_index in index:
                x = jax.lax.dynamic_index_in_dim(x, axis_index[0], 0, keepdims=False)
            return x[None]
        return x[index]
    parts = [used[member.path] for member in source.leaves]
    bundles = [parts[i : i + together] for i in range(0, total, together)]
    bundles[-1] = bundles[-1] + [parts[-1]] * (together - len(bundles[-1]))
    bundle = jnp.minimum(start // together, len(bundles) - 1)
    return jax.lax.switch(bundle, [lambda b=b: jnp.stack(b) for b in bundles])


def _orient(x: jax.Array, leaf: Leaf) -> jax.Array:
    """One whole slice as ``[small, large]``, or ``[P, small, large]`` for a convolution."""
    rest = [i for i in range(len(leaf.shape)) if i not in leaf.slice_axes]
    order = leaf.pooled_axes + leaf.signature.inputs + leaf.signature.outputs
    x = jnp.transpose(x, [rest.index(i) for i in order])
    x = x.reshape((leaf.pooled, *leaf.sides) if leaf.pooled_axes else leaf.sides)
    rows, columns = leaf.sides
    return jnp.swapaxes(x, -1, -2) if rows > columns else x


def plan(leaves: Sequence[Leaf], dtypes: Mapping[str, Any], place: Place) -> Sweep:
    """Orders leaves by shape: those that can share a stack become a source, sources of one shape a loop."""
    groups: dict[Any, dict[Any, list[Leaf]]] = {}
    for leaf in leaves:
        signature, dtype = leaf.signature, jnp.dtype(dtypes[leaf.path])
        shape = (bool(leaf.pooled_axes), leaf.pooled, *sorted(leaf.sides), dtype)
        alike = (leaf.shape, leaf.spec, signature.batch, signature.inputs, signature.outputs)
        stack = leaf.path if leaf.slice_axes else alike
        groups.setdefault(shape, {}).setdefault(stack, []).append(leaf)
    ordered: list[Leaf] = []
    planned, first = [], 0
    for group in groups.values():
        sources = []
        for members in group.values():
            count = sum(len(leaf.chosen) for leaf in members)
            sources.append(_Source(tuple(members), first, count))
            ordered.extend(members)
            first += count
        planned.append(tuple(sources))
    return Sweep(tuple(ordered), place, tuple(planned))
