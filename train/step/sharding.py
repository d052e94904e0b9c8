"""Which device holds what: from the letters of a model's `AXES` to the axes of a mesh.

    replica  copies of the model with a slow network between them (slices, machines), on other sequences; only
             gradients or momenta cross it, which some optimizers compress (`replicas.py`)
    data     copies of the model, each working on other sequences
    fsdp     every weight is split, and gathered where it is used; sequences are split as well
    tensor   heads, MLP features and vocabulary are split, and so is the work on them

Axes are of the Auto kind: the compiler places everything that is not placed here.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from models import embedding
from models.layers import Placement
from optax_decay.axes import leaf_paths, partition_specs, resolve
from train.config.fields import Mesh, UserError
from train.step import replicas

# Two letters of one parameter on one mesh axis raise; letters that are not named stay whole.
LETTERS = {"D": "fsdp", "H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}

NAMES = ("replica", "data", "fsdp", "tensor")
KINDS = (AxisType.Auto,) * len(NAMES)

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Axes that the first dimension of a batch is split over.
ROWS = ("replica", "data", "fsdp")


def make_mesh(
    config: Mesh, sequences: int, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """The devices in a grid (replica, data, fsdp, tensor); replicas lie furthest apart.

    Args:
        config: sizes; without `data`, as many copies as devices and sequences allow.
        sequences: number of them that are worked on at once, in a batch or a micro batch.

    Raises:
        UserError: more devices are asked for than there are, or sequences cannot be shared evenly.
    """
    devices = jax.devices() if devices is None else devices
    shape = grid(config, sequences, len(devices), devices[0].platform)
    used = devices[: math.prod(shape)]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise UserError(
            f"The mesh {' x '.join(map(str, shape))} leaves processes without work, {min(idle)} the first: with"
            f" several processes it needs devices of each; nearest: a product of {len(devices)}."
        )
    return jax.make_mesh(shape, NAMES, KINDS, devices=used)


def abstract_mesh(config: Mesh, sequences: int, count: int) -> jax.sharding.AbstractMesh:
    """The grid of `make_mesh` for so many devices, none of which need be there."""
    return jax.sharding.AbstractMesh(grid(config, sequences, count, "planned"), NAMES, KINDS)


def grid(config: Mesh, sequences: int, count: int, kind: str) -> tuple[int, ...]:
    """Sizes of the axes `NAMES`."""
    inner = config.replica * config.fsdp * config.tensor
    if inner * (config.data or 1) > count:
        raise UserError(
            f"mesh.replica x mesh.data x mesh.fsdp x mesh.tensor = {config.replica} x {config.data or 1} x"
            f" {config.fsdp} x {config.tensor} needs {inner * (config.data or 1)} devices; there are"
            f" {count} ({kind}). Nearest: a product of {count}."
        )
    rows = sequences
    for name in ("replica", "fsdp"):
        parts = getattr(config, name)
        if rows % parts:
            raise UserError(
                f"mesh.{name} = {parts} must divide the {rows} sequences that are worked on at once;"
                f" nearest: {math.gcd(parts, rows)}."
            )
        rows //= parts
    possible = [n for n in range(1, count // inner + 1) if rows % n == 0]
    data = config.data or max(possible)
    if rows % data:
        raise UserError(
            f"mesh.data = {data} must divide the {rows} sequences of each fsdp part;"
            f" nearest: {min(possible, key=lambda n: abs(n - data))}."
        )
    return (config.replica, data, config.fsdp, config.tensor)


def of_parameters(axes: Any, params: Any, mesh: AnyMesh) -> Any:
    """A tree of NamedSharding like `params`; a dimension that its mesh axis does not divide stays whole."""
    axes = resolve(axes, params)
    used = {name for signature in jax.tree.leaves(axes) for name in signature.names}
    specs = partition_specs(
        axes, params, {letter: axis for letter, axis in LETTERS.items() if letter in used}
    )

    def fit(leaf: Any, spec: jax.P) -> NamedSharding:
        sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
        parts = [None if n % size else axis for n, size, axis in zip(leaf.shape, sizes, spec)]
        return NamedSharding(mesh, jax.P(*parts))

    return jax.tree.map(fit, params, specs)


def of_state(state: Any, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
    """Shardings of an optimizer state: each leaf that mirrors a parameter is split like it.

    A leaf mirrors a parameter when its path ends with the parameter's and the shapes agree. This
    needs no help from the optimizer, whose state may be masked, factored or per matrix; everything
    else is replicated.
    """
    known = {
        (path, leaf.shape): sharding
        for path, leaf, sharding in zip(
            leaf_paths(params), jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
        )
    }
    whole = NamedSharding(mesh, jax.P())

    def find(path: str, shape: tuple[int, ...]) -> NamedSharding:
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((known[end, shape] for end in ends if (end, shape) in known), whole)

    leaves, treedef = jax.tree.flatten(state)
    found = [find(path, leaf.shape) for path, leaf in zip(leaf_paths(state), leaves, strict=True)]
    return jax.tree.unflatten(treedef, found)


def of_train_state(state: Any, params: Any) -> Any:
    """Shardings of the whole state of a step.

    Args:
        state: as shapes.
        params: shardings of its parameters.
    """
    mesh = jax.tree.leaves(params)[0].mesh
    average = {"average": params} if "average" in state else {}
    optimizer = of_state(state["optimizer"], state["params"], params, mesh)
    return average | {
        "params": params,
        "optimizer": replicas.place_errors(optimizer, state["optimizer"], params),
        "step": NamedSharding(mesh, jax.P()),
    }


class Activations(Placement):
    """Activations [B, T, D] are split by sequences alone."""

    def __init__(self, mesh: AnyMesh):
        self._mesh = mesh

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self._put(x_BTD, ROWS)

    def look_up(self, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """As if fsdp split features: each device looks up its own part of rows, and parts of rows then change
        places for whole ones. Without this XLA gathers the tokens of all devices, and looks up all of them on each."""
        width, parts = table_VD.shape[-1], self._mesh.shape["fsdp"]
        x_BTD = embedding.rows(table_VD, self._put(tokens_BT, ROWS[:-1]))
        return self._put(x_BTD, ROWS[:-1], None, None if width % parts else "fsdp")

    def _put(self, x: jax.Array, rows: tuple[str, ...], *others: str | None) -> jax.Array:
        here = jax.sharding.get_abstract_mesh()  # inside of a shard_map over replicas
        rows = tuple(name for name in rows if name not in here.manual_axes)
        known = self._mesh if here.empty else here
        return jax.lax.with_sharding_constraint(x, NamedSharding(known, jax.P(rows, *others)))


def on_mesh(function: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """`function`, traced with the mesh in context: work on whole matrices is then shared over its devices."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return call


def over_devices(
    function: Callable[[Any, Any], Any], shardings: Any, workers: bool, outputs: Any = None
) -> Callable[[Any, Any], Any]:
    """`function` of a state and a batch, traced for the devices that hold the state.

    Args:
        function: (state, batch) -> outputs.
        shardings: of the state.
        workers: whether every replica runs it on its own rows (`replicas.on_each`), or all devices run it together.
        outputs: shardings of what workers return, as in `replicas.on_each`.
    """
    if workers:
        return replicas.on_each(function, shardings, outputs)
    return on_mesh(function, jax.tree.leaves(shardings)[0].mesh)


def put_batch(make: Any, shape: Any, mesh: AnyMesh) -> Any:
    """A batch over the devices, where each process makes only the rows that its devices hold.

    Args:
        make: rows (a slice) to an array of them, such as int32 [rows, length + 1], or a dict of arrays.
        shape: of the whole batch, or a dict of shapes.
    """
    rows = NamedSharding(mesh, jax.P(ROWS))
    made = functools.cache(lambda start, stop: make(slice(start, stop)))

    def put(shape: tuple[int, ...], pick: Callable[[Any], Any]) -> jax.Array:
        def part(index: Any) -> Any:
            where = index[0] if index else slice(None)
            return pick(made(where.start, where.stop))

        return jax.make_array_from_callback(shape, rows, part)

    if isinstance(shape, dict):
        return {name: put(shape[name], operator.itemgetter(name)) for name in shape}
    return put(shape, lambda array: array)


def put_whole(batch: Any, mesh: AnyMesh) -> Any:
    """A batch over the devices, of which every process has all rows."""
    part = lambda rows: jax.tree.map(lambda array: array[rows], batch)
    return put_batch(part, jax.tree.map(np.shape, batch), mesh)
