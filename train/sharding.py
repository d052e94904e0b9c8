"""Which device holds what: from the letters of a model's `AXES` to the axes of a mesh.

    data     copies of the model, each working on other sequences
    fsdp     every weight is split, and gathered where it is used; sequences are split as well
    tensor   heads, MLP features and vocabulary are split, and so is the work on them

Axes are of the Auto kind: the compiler places what is not said here.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

import optax_decay
from optax_decay.axes import signatures
from optax_decay.paths import leaf_paths
from train.config import Mesh, UserError

# Two letters of one parameter on one mesh axis raise; letters that are not named stay whole.
LETTERS = {"D": "fsdp", "H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}

# The first dimension of a batch.
ROWS = jax.P(("data", "fsdp"))


def make_mesh(
    config: Mesh, sequences: int, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """The devices in a grid (data, fsdp, tensor).

    Args:
        config: sizes; without `data`, as many copies as devices and sequences allow.
        sequences: that are worked on at once, a batch or a micro batch.

    Raises:
        UserError: more devices are asked for than there are, or sequences cannot be shared evenly.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    if inner * (config.data or 1) > len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {config.data or 1} x {config.fsdp} x"
            f" {config.tensor} needs {inner * (config.data or 1)} devices; there are {len(devices)}"
            f" ({devices[0].platform}). Nearest: a product of {len(devices)}."
        )
    if sequences % config.fsdp:
        raise UserError(
            f"mesh.fsdp = {config.fsdp} must divide the {sequences} sequences that are worked on at"
            f" once; nearest: {math.gcd(config.fsdp, sequences)}."
        )
    rows = sequences // config.fsdp
    possible = [n for n in range(1, len(devices) // inner + 1) if rows % n == 0]
    data = config.data or max(possible)
    if rows % data:
        raise UserError(
            f"mesh.data = {data} must divide the {rows} sequences of each fsdp part;"
            f" nearest: {min(possible, key=lambda n: abs(n - data))}."
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices[: math.prod(shape)]
    )


def of_parameters(axes: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedSharding like `params`; a dimension that its mesh axis does not divide stays whole."""
    used = {name for s in signatures(axes, params).values() for name in s.names}
    specs = optax_decay.partition_specs(
        axes, params, {letter: axis for letter, axis in LETTERS.items() if letter in used}
    )

    def fit(leaf: Any, spec: jax.P) -> NamedSharding:
        sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
        parts = [None if n % size else axis for n, size, axis in zip(leaf.shape, sizes, spec)]
        return NamedSharding(mesh, jax.P(*parts))

    return jax.tree.map(fit, params, specs)


def of_state(state: Any, params: Any, shardings: Any, mesh: jax.sharding.Mesh) -> Any:
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


def of_train_state(axes: Any, state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the whole state of `step.init`, given as shapes."""
    params = of_parameters(axes, state["params"], mesh)
    average = {"average": params} if "average" in state else {}
    return average | {
        "params": params,
        "optimizer": of_state(state["optimizer"], state["params"], params, mesh),
        "step": NamedSharding(mesh, jax.P()),
    }


def place_activations(mesh: jax.sharding.Mesh) -> Any:
    """The function for a model's `place`: activations [B, T, D] are split by sequences alone."""
    where = NamedSharding(mesh, ROWS)
    return lambda x_BTD: jax.lax.with_sharding_constraint(x_BTD, where)


def put_batch(make: Any, shape: Any, mesh: jax.sharding.Mesh) -> Any:
    """A batch over the devices, where each process makes only the rows that its devices hold.

    Args:
        make: rows (a slice) to an array of them, such as int32 [rows, length + 1], or a dict of arrays.
        shape: of the whole batch, or a dict of shapes.
    """
    rows = NamedSharding(mesh, ROWS)
    made = functools.cache(lambda start, stop: make(slice(start, stop)))

    def put(shape: tuple[int, ...], pick: Callable[[Any], Any]) -> jax.Array:
        def part(index: Any) -> Any:
            where = index[0] if index else slice(None)
            return pick(made(where.start, where.stop))

        return jax.make_array_from_callback(shape, rows, part)

    if isinstance(shape, dict):
        return {name: put(shape[name], operator.itemgetter(name)) for name in shape}
    return put(shape, lambda array: array)
