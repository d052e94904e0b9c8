"""Measuring many matrices, a few at a time: one compiled loop per shape, and different matrices on every device.

The matrices have a fixed order. Each step measures those of a range [low, high) of it, in loops with dynamic bounds.
The same program therefore serves a step in which nothing is due, a step with a few matrices of a staggered refresh, and
a step that measures all matrices.

A loop goes in *rounds* of D matrices, one per device: a device takes its shards of D matrices, exchanges them for one
whole matrix (`optax_decay.matrices.whole`) and measures it. At the end, one sum over the devices shares the numbers.
The order, and so what is measured when, does not depend on D.
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
from optax_decay.parameters.meshes import reshard, varying_axes
from optax_decay.spectral.measure import Measurement
from optax_decay.spectral.selection import MeasuredParameter

# (matrix [m, n] or [P, m, n] with m <= n, carried number) -> its measurement
Measure = Callable[[jax.Array, jax.Array], Measurement]


class Measurements(NamedTuple):
    """The measurements of a sweep, ``[T]`` each, in the order of `Sweep.parameters` and their chosen slices.

    Attributes:
        fresh: bool; True for matrices measured in this step. The other fields mean nothing where it is False.
        value, stable, centre, error, resolved: as in `Measurement`.
    """

    fresh: jax.Array
    value: jax.Array
    stable: jax.Array
    centre: jax.Array
    error: jax.Array
    resolved: jax.Array


@dataclasses.dataclass(frozen=True)
class _Source:
    """Matrices that one piece of code can fetch: the slices of one parameter, or several parameters without slices.

    Attributes:
        parameters: one parameter with slices, or some without.
        first, count: the matrices have the numbers first .. first + count - 1 in the order of the sweep.
    """

    parameters: tuple[MeasuredParameter, ...]
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the sweep runs.

    Attributes:
        mesh: the sweep is wrapped in a ``shard_map`` over this mesh; None if it is inside one already, or needs none.
        sizes: the mesh axes over which matrices are shared out, and their sizes.
    """

    mesh: Any
    sizes: tuple[tuple[str, int], ...]

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.sizes)


def find_placement(
    arrays: Mapping[str, jax.Array], parameters: Sequence[MeasuredParameter], mesh: Any
) -> Placement:
    """Where a sweep can run, from the types of the arrays, the mesh in context and the arguments.

    Args:
        arrays: the measured parameters, by path.
        parameters: the same parameters, with how they are split.
        mesh: the mesh, where it is neither in context nor in the types.

    Raises:
        ValueError: inside ``shard_map``, a parameter is a shard although no partition is known for it, or its slices
            are split.
    """
    names = {name: None for parameter in parameters for name, _ in split_axes(parameter.spec)}
    if inside_shard_map():
        for parameter in parameters:
            known = {name for name, _ in split_axes(parameter.spec)}
            varying = varying_axes(arrays[parameter.path])
            if varying - known:
                raise ValueError(
                    f"{parameter.path!r} is a shard inside shard_map (it varies over {sorted(varying - known)}): pass "
                    f"param_specs=..., a tree of jax.P like the parameters."
                )
            if any(parameter.spec[i] is not None for i in parameter.slice_axes):
                raise ValueError(
                    f"{parameter.path!r} is split along its stacked axes ({parameter.spec}) inside shard_map; split "
                    "its matrices instead."
                )
        return Placement(None, tuple((name, jax.lax.axis_size(name)) for name in names))
    found = next((m for x in arrays.values() if (m := known_mesh(x, mesh)) is not None), None)
    if found is None:
        return Placement(None, ())
    if AxisType.Explicit not in found.axis_types and (
        not names or math.prod(found.shape.values()) == 1
    ):
        # Only the compiler knows how Auto axes are used: it gathers the one matrix that is being measured.
        return Placement(None, ())
    return Placement(found, tuple(found.shape.items()))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The plan for measuring the matrices of one tree of parameters. Build one with `plan`.

    Attributes:
        parameters: in the order in which their chosen slices are measured.
        placement: where the sweep runs.
        groups: sources of matrices of the same shape; each group is one loop.
    """

    parameters: tuple[MeasuredParameter, ...]
    placement: Placement
    groups: tuple[tuple[_Source, ...], ...]

    @property
    def count(self) -> int:
        return sum(len(parameter.chosen) for parameter in self.parameters)

    def run(
        self,
        arrays: Mapping[str, jax.Array],
        centres: jax.Array,
        low: jax.Array,
        high: jax.Array,
        measure: Measure,
    ) -> Measurements:
        """Measures the matrices [low, high).

        Args:
            arrays: parameters by path; shards inside ``shard_map``.
            centres: ``[T]``, one number per matrix that is passed to `measure`.
            low, high: int32 scalars.
            measure: measures one matrix, see `Measure`.
        """
        used = {parameter.path: arrays[parameter.path] for parameter in self.parameters}
        mesh = self.placement.mesh

        def body(used: Any, centres: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
            return self._body(used, centres, low, high, measure)

        if mesh is None:
            table = body(used, centres, low, high)
        else:
            specs = {parameter.path: _inner_spec(parameter) for parameter in self.parameters}
            if AxisType.Explicit in mesh.axis_types:
                used = {path: reshard(x, specs[path]) for path, x in used.items()}
                centres, low, high = (reshard(x, jax.P()) for x in (centres, low, high))
            none = jax.P()
            table = jax.shard_map(
                body, mesh=mesh, in_specs=(specs, none, none, none), out_specs=none
            )(used, centres, low, high)
        flags = table[:, [0, 2, 5]] > 0.5
        return Measurements(
            flags[:, 0], table[:, 1], flags[:, 1], table[:, 3], table[:, 4], flags[:, 2]
        )

    def _body(
        self,
        used: Mapping[str, jax.Array],
        centres: jax.Array,
        low: jax.Array,
        high: jax.Array,
        measure: Measure,
    ) -> jax.Array:
        names = tuple(name for name, _ in self.placement.sizes)
        table = vary_over(
            jnp.zeros((self.count + 1, 1 + len(Measurement._fields)), centres.dtype), names
        )
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
        devices = self.placement.devices
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
        parameter = source.parameters[0]
        axes = tuple(name for name, _ in self.placement.sizes)
        inner = [i for i in range(len(parameter.shape)) if i not in parameter.slice_axes]
        # Axes that the mesh does not have, or a mesh of one device, split nothing.
        moves = tuple(m for m in split_axes([parameter.spec[i] for i in inner]) if m[0] in axes)
        split = tuple(name for name, _ in moves)
        spare = tuple(name for name in axes if name not in split)
        together = math.prod(size for name, size in self.placement.sizes if name in split)

        def fetch(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            # The matrices of a round are numbered by the spare axes first, then by the axes that split them.
            start = i * self.placement.devices
            if spare:
                start = start + device_position(spare) * together
            stack = _take(source, used, start, together)
            whole = bring_together(stack, moves)[0]
            mine = start + device_position(split) if split else start
            slot = jnp.where(mine < source.count, source.first + mine, self.count)
            return vary_over(_orient(whole, parameter), axes), vary_over(slot, axes)

        return fetch


def _inner_spec(parameter: MeasuredParameter) -> Any:
    """The partition of a parameter inside the sweep: slices are indexed, so their axes must not be split."""
    return jax.P(*(None if i in parameter.slice_axes else s for i, s in enumerate(parameter.spec)))


def _take(
    source: _Source, used: Mapping[str, jax.Array], start: jax.Array, together: int
) -> jax.Array:
    """`together` consecutive matrices of a source, ``[together, *inner]``; past its end the last one repeats."""
    total = source.count
    parameter = source.parameters[0]
    if len(source.parameters) == 1 and parameter.slice_axes:
        x = jnp.moveaxis(
            used[parameter.path], parameter.slice_axes, range(len(parameter.slice_axes))
        )
        place = jnp.minimum(start + jnp.arange(together), total - 1)
        flat = jnp.asarray(parameter.chosen)[place]
        index = jnp.unravel_index(flat, parameter.slice_shape)
        if together == 1:
            for axis_index in index:
                x = jax.lax.dynamic_index_in_dim(x, axis_index[0], 0, keepdims=False)
            return x[None]
        return x[index]
    parts = [used[member.path] for member in source.parameters]
    bundles = [parts[i : i + together] for i in range(0, total, together)]
    bundles[-1] = bundles[-1] + [parts[-1]] * (together - len(bundles[-1]))
    bundle = jnp.minimum(start // together, len(bundles) - 1)
    return jax.lax.switch(bundle, [lambda b=b: jnp.stack(b) for b in bundles])


def _orient(x: jax.Array, parameter: MeasuredParameter) -> jax.Array:
    """One whole slice as ``[small, large]``, or ``[P, small, large]`` for a convolution."""
    rest = [i for i in range(len(parameter.shape)) if i not in parameter.slice_axes]
    order = parameter.pooled_axes + parameter.signature.inputs + parameter.signature.outputs
    x = jnp.transpose(x, [rest.index(i) for i in order])
    x = x.reshape(
        (parameter.pooled, *parameter.sides) if parameter.pooled_axes else parameter.sides
    )
    rows, columns = parameter.sides
    return jnp.swapaxes(x, -1, -2) if rows > columns else x


def plan(
    parameters: Sequence[MeasuredParameter], dtypes: Mapping[str, Any], placement: Placement
) -> Sweep:
    """The `Sweep`: parameters that can share a stack become one source, and sources of one shape one loop."""
    groups: dict[Any, dict[Any, list[MeasuredParameter]]] = {}
    for parameter in parameters:
        signature, dtype = parameter.signature, jnp.dtype(dtypes[parameter.path])
        shape = (bool(parameter.pooled_axes), parameter.pooled, *sorted(parameter.sides), dtype)
        alike = (
            parameter.shape,
            parameter.spec,
            signature.batch,
            signature.inputs,
            signature.outputs,
        )
        stack = parameter.path if parameter.slice_axes else alike
        groups.setdefault(shape, {}).setdefault(stack, []).append(parameter)
    ordered: list[MeasuredParameter] = []
    planned, first = [], 0
    for group in groups.values():
        sources = []
        for members in group.values():
            count = sum(len(parameter.chosen) for parameter in members)
            sources.append(_Source(tuple(members), first, count))
            ordered.extend(members)
            first += count
        planned.append(tuple(sources))
    return Sweep(tuple(ordered), placement, tuple(planned))
