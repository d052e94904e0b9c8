"""The buffers of sign compression: which arrays share one, which share an exchange, and how large their errors are.

Each buffer has its own scales and errors. An exchange is one all-to-all and one all-gather of bytes, and two
all-gathers of scales.

========== ================================= ============ ========================================================
layout     buffers                           exchanges    scales
========== ================================= ============ ========================================================
joined     one per array                     one          one per matrix, as in the released code
per_leaf   one per array                     one each     the same: the numbers of joined
flat       one for all arrays                one          one for all: less padding, but the noise of the largest
                                                          momenta is added to all others
========== ================================= ============ ========================================================

In an array that stacks several matrices (its signature has batch axes) each matrix has its own scale, as if it were an
array of its own. Arrays that a mesh axis splits (FSDP inside a slice) are compressed shard by shard: scales are per
shard, and arrays that are split over different axes share neither buffers nor exchanges.

Errors are a dictionary by buffer name, which is the path of the array, or ``"flat"`` followed by the splitting axes
(``"flat/fsdp"``). Each error is a [devices, matrices, elements] array with one entry per device that has numbers of its
own: N for a replicated array, N · F for an array split F ways. It is sharded over (compressed axis, splitting axes), so
that every device holds exactly its own entry.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.one_bit import compression

Layout = Literal["joined", "per_leaf", "flat"]
LAYOUTS = ("joined", "per_leaf", "flat")

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Errors = dict[str, jax.Array]


class Piece(NamedTuple):
    """One array to compress.

    Attributes:
        path: its ``/``-joined path.
        shape: as seen here, which is the local shape along axes of the surrounding `shard_map`.
        dtype: of its errors and scales.
        spec: how it is sharded.
        batch: its dimensions that index separate matrices.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    spec: jax.sharding.PartitionSpec
    batch: tuple[int, ...]


class Buffer(NamedTuple):
    """Arrays that are compressed together.

    Attributes:
        name: key of its errors.
        members: positions of its arrays.
        batch: the batch axes of its array; empty if it has several arrays.
        matrices: vectors per device, each with its own scale.
        size: elements per device and vector, without padding.
        dtype: of errors and scales.
        split: mesh axes over which its arrays are split, in alphabetical order.
        devices: entries of its errors as seen here: 1 inside a `shard_map` over all its axes.
        workers: N.
    """

    name: str
    members: tuple[int, ...]
    batch: tuple[int, ...]
    matrices: int
    size: int
    dtype: Any
    split: tuple[str, ...]
    devices: int
    workers: int

    @property
    def worker_shape(self) -> tuple[int, int, int]:
        return self.devices, self.matrices, compression.padded_size(self.size, self.workers)

    @property
    def server_shape(self) -> tuple[int, int, int]:
        devices, matrices, size = self.worker_shape
        return devices, matrices, size // self.workers

    def pack(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Its arrays as [matrices, size]."""
        flat = [
            jnp.moveaxis(x, self.batch, range(len(self.batch))).reshape(self.matrices, -1)
            for x in (arrays[i].astype(self.dtype) for i in self.members)
        ]
        return jnp.concatenate(flat, axis=1)

    def unpack(self, packed: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The inverse of `pack`, in the shapes and dtypes of its `arrays`."""
        ends = np.cumsum([arrays[i].size // self.matrices for i in self.members])[:-1]
        parts = []
        for i, part in zip(self.members, jnp.split(packed, ends, axis=1)):
            shape, rest = arrays[i].shape, range(arrays[i].ndim)
            order = (*self.batch, *(axis for axis in rest if axis not in self.batch))
            part = part.reshape([shape[axis] for axis in order])
            part = jnp.moveaxis(part, range(len(self.batch)), self.batch)
            parts.append(part.astype(arrays[i].dtype))
        return parts


def entry_axes(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_axes(spec: jax.sharding.PartitionSpec) -> tuple[str, ...]:
    """Mesh axes of a PartitionSpec, in alphabetical order."""
    return tuple(sorted(axis for entry in spec for axis in entry_axes(entry)))


def axis_size(axis: str, mesh: Mesh | None) -> int:
    """Size of a mesh axis: of the surrounding `shard_map`, else of the mesh in context, else of `mesh`.

    Raises:
        ValueError: none of them has the axis.
    """
    if compression.is_bound(axis):
        return jax.lax.axis_size(axis)
    context = jax.sharding.get_abstract_mesh()
    for candidate in (context, mesh):
        if candidate is not None and axis in candidate.axis_names:
            return candidate.shape[axis]
    raise ValueError(
        f"the size of the mesh axis {axis!r} is not known here: call init inside jax.shard_map over it, under "
        f"jax.set_mesh(mesh), or pass mesh=... to the optimizer."
    )


def _local_shape(piece: Piece, mesh: Mesh | None) -> list[int]:
    """Lengths per device. Along axes of the surrounding `shard_map` the shape is local already."""
    lengths = []
    for i, length in enumerate(piece.shape):
        axes = entry_axes(piece.spec[i]) if i < len(piece.spec) else ()
        parts = math.prod(axis_size(axis, mesh) for axis in axes if not compression.is_bound(axis))
        if length % parts:
            raise ValueError(
                f"dimension {i} of {piece.path!r}, shape {piece.shape}, is split {parts} ways by "
                f"{piece.spec}; allowed: a divisor of {length}."
            )
        lengths.append(length // parts)
    return lengths


def plan(
    pieces: Sequence[Piece],
    layout: Layout,
    axis_name: compression.AxisName,
    mesh: Mesh | None,
) -> tuple[Buffer, ...]:
    """The buffers of the given arrays, in a fixed order."""
    axes = compression.axis_tuple(axis_name)
    workers = math.prod(axis_size(axis, mesh) for axis in axes)
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i, piece in enumerate(pieces):
        split = spec_axes(piece.spec)
        name = "/".join(("flat", *split)) if layout == "flat" else piece.path
        groups.setdefault((name, split), []).append(i)

    def buffer(name: str, split: tuple[str, ...], members: list[int]) -> Buffer:
        shapes = [_local_shape(pieces[i], mesh) for i in members]
        batch = () if layout == "flat" else pieces[members[0]].batch
        matrices = math.prod(shapes[0][axis] for axis in batch)
        size = sum(math.prod(shape) for shape in shapes) // matrices
        dtype = jnp.result_type(*(pieces[i].dtype for i in members))
        devices = math.prod(axis_size(a, mesh) for a in axes + split if not compression.is_bound(a))
        return Buffer(name, tuple(members), batch, matrices, size, dtype, split, devices, workers)

    return tuple(buffer(name, split, members) for (name, split), members in groups.items())


def zero_errors(buffers: Sequence[Buffer]) -> tuple[Errors, Errors]:
    """The errors of workers and of servers before the first step."""
    worker = {b.name: jnp.zeros(b.worker_shape, b.dtype) for b in buffers}
    server = {b.name: jnp.zeros(b.server_shape, b.dtype) for b in buffers}
    return worker, server


def check_errors(buffers: Sequence[Buffer], worker: jax.Array, server: jax.Array) -> None:
    """Raises ValueError for errors that were made for other workers, another layout or other arrays."""
    for what, errors in (("worker_error", worker), ("server_error", server)):
        found = {k: tuple(v.shape) for k, v in errors.items()} if isinstance(errors, dict) else {}
        shapes = [b.worker_shape if what == "worker_error" else b.server_shape for b in buffers]
        wanted = {b.name: shape for b, shape in zip(buffers, shapes)}
        for name in wanted.keys() | found.keys():
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{what}[{name!r}] has the shape {found.get(name)} on each device, but "
                    f"{buffers[0].workers if buffers else 0} workers need {wanted.get(name)}. The state was made for "
                    f"another number of workers, layout, param_specs or choice of compressed leaves. Errors cannot be "
                    f"reused: convert the state with optax_decay.one_bit.change_workers(state, tx.init(params))."
                )


def exchange_groups(buffers: Sequence[Buffer], layout: Layout) -> list[list[Buffer]]:
    """The buffers, grouped by the exchange that they share."""
    if layout != "joined":
        return [[b] for b in buffers]
    groups: dict[tuple[str, ...], list[Buffer]] = {}
    for b in buffers:
        groups.setdefault(b.split, []).append(b)
    return list(groups.values())


def compressed_means(
    arrays: Sequence[jax.Array],
    specs: Sequence[jax.sharding.PartitionSpec],
    worker: Errors,
    server: Errors,
    groups: Sequence[Sequence[Buffer]],
    axis_name: compression.AxisName,
) -> tuple[list[jax.Array], Errors, Errors]:
    """The sign-compressed mean of every array over the axis, and the new errors; one exchange per group.

    Enters a `shard_map` over the splitting axes that the surrounding one leaves to the compiler, so that every device
    packs its own shard and nothing is gathered.
    """

    def body(
        arrays: list[jax.Array], worker: Errors, server: Errors
    ) -> tuple[list[jax.Array], Errors, Errors]:
        means, new_worker, new_server = list(arrays), {}, {}
        for group in groups:
            results = compression.sign_compressed_means(
                [b.pack(arrays) for b in group],
                [worker[b.name][0] for b in group],
                [server[b.name][0] for b in group],
                axis_name,
            )
            for b, mean, e, s in zip(group, *results):
                new_worker[b.name], new_server[b.name] = e[None], s[None]
                for i, part in zip(b.members, b.unpack(mean, arrays)):
                    means[i] = part
        return means, new_worker, new_server

    buffers = [b for group in groups for b in group]
    if not buffers or buffers[0].workers == 1:
        return jax.lax.pmean(list(arrays), axis_name), worker, server
    left_to_compiler = sorted(
        {axis for b in buffers for axis in b.split if not compression.is_bound(axis)}
    )
    if not left_to_compiler:
        return body(list(arrays), worker, server)

    def keep(entry: Any) -> Any:
        return tuple(a for a in entry_axes(entry) if a in left_to_compiler) or None

    array_specs = [jax.P(*(keep(entry) for entry in spec)) for spec in specs]
    rows = {b.name: jax.P(keep(b.split)) for b in buffers}
    specs_of_all = (array_specs, rows, rows)
    return jax.shard_map(
        body,
        in_specs=specs_of_all,
        out_specs=specs_of_all,
        axis_names=set(left_to_compiler),
        check_vma=compression.tracks_varying(axis_name),
    )(list(arrays), worker, server)
