"""Replicas as the workers of 1-bit Adam: each has a gradient of its own, and errors that no other has.

The step is then a `jax.shard_map` over the mesh axis replica alone; inside a replica the compiler places data, fsdp and
tensor as ever. Nothing but what the optimizer exchanges, and a few scalars, crosses replicas.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from optax_decay import OneBitAdamState, change_workers, local_params, state_partition_specs
from optax_decay.parameters.paths import path_string
from train.config.fields import Config
from train.run import migration as migrate

AXIS = "replica"


def used(config: Config) -> bool:
    return config.optimizer.name == "one_bit_adam"


def inside() -> bool:
    """Whether this is traced by `on_each`."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def own(tree: Any) -> Any:
    """Inside, `tree` as the replica's own, so that gradients with respect to it are too; else `tree` itself."""
    return local_params(tree, AXIS) if inside() else tree


def mean(x: jax.Array) -> jax.Array:
    """Inside, over the replicas."""
    return jax.lax.pmean(x, AXIS) if inside() else x


def on_each(function: Callable[..., Any], shardings: Any, outputs: Any) -> Callable[..., Any]:
    """`function` of a state and tokens, run by every replica on its own rows.

    Args:
        function: (state, tokens) -> outputs; the axis is bound in it.
        shardings: of the state.
        outputs: a tree or prefix of NamedSharding for what it returns; None: the same on all replicas.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    inside = jax.tree.map(_across, shardings)
    out = jax.tree.map(
        lambda s: jax.P() if s is None else _across(s), outputs, is_leaf=lambda s: s is None
    )
    return jax.shard_map(
        function, mesh=mesh, in_specs=(inside, jax.P(AXIS)), out_specs=out, axis_names={AXIS}
    )


def _across(sharding: NamedSharding) -> jax.sharding.PartitionSpec:
    """What of a sharding is over replicas."""
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec]
    return jax.P(*(AXIS if AXIS in entry else None for entry in entries))


def parameter_specs(shardings: Any) -> Any:
    """PartitionSpecs for the optimizer, without axes of size 1: what they split shares exchanges with the rest."""

    def split(sharding: NamedSharding) -> jax.sharding.PartitionSpec:
        sizes = sharding.mesh.shape
        return jax.P(*(e if e is not None and sizes[e] > 1 else None for e in sharding.spec))

    return jax.tree.map(split, shardings)


def _is_one_bit(x: Any) -> bool:
    return isinstance(x, OneBitAdamState)


def place_errors(placed: Any, state: Any, params: Any) -> Any:
    """`placed`, the shardings of an optimizer's state, with those of its workers' errors: a row per device.

    Args:
        placed: a tree of NamedSharding like `state`.
        state: as shapes.
        params: shardings of the parameters.
    """
    if not any(_is_one_bit(x) for x in jax.tree.leaves(state, is_leaf=_is_one_bit)):
        return placed
    mesh = jax.tree.leaves(params)[0].mesh
    specs = state_partition_specs(state, AXIS, parameter_specs(params))

    def put(found: Any, spec: Any) -> Any:
        if not _is_one_bit(found):
            return found
        rows = jax.tree.map(
            lambda s: NamedSharding(mesh, s),
            (spec.worker_error, spec.server_error),
            is_leaf=lambda s: isinstance(s, jax.P),
        )
        return found._replace(worker_error=rows[0], server_error=rows[1])

    return jax.tree.map(put, placed, specs, is_leaf=_is_one_bit)


def as_saved(
    abstract: Any, saved: dict[str, Any], now: dict[str, Any], say: Callable[[str], None]
) -> tuple[Any, Callable[[Any], Any]]:
    """How to read a state that other workers saved: the tree to read, and what makes the wanted one of it.

    Errors belong to a replica and to the part of it that a device holds. With another number of replicas each new one
    gets the mean of what the old ones had yet to send; with other parts they start from 0. `say` is told.

    Args:
        abstract: the wanted state, ShapeDtypeStruct with shardings.
        saved, now: what `checkpoint.describe` makes of the saved run and of this one.
    """
    grids = [_grid(meta["config"]) for meta in (saved, now)]
    nodes = jax.tree.leaves(abstract, is_leaf=_is_one_bit)
    if grids[0] == grids[1] or not any(_is_one_bit(node) for node in nodes):
        return abstract, lambda state: state
    optimizer = abstract["optimizer"]
    same_parts = grids[0][1:] == grids[1][1:]
    shardings = jax.tree.map(lambda x: x.sharding, optimizer)
    notes: list[str] = []

    def convert(old: Any) -> Any:
        if same_parts:
            return change_workers(old, optimizer, "redistribute", report=notes.append)[0]
        notes.append(
            "1-bit Adam: the weights are split in another way inside a replica, so that the workers' errors were reset"
            " to 0; momentum, variance and phase were kept."
        )
        return jax.tree.map(_without_errors, old, optimizer, is_leaf=_is_one_bit)

    def finish(state: Any) -> Any:
        changed = jax.jit(convert, out_shardings=shardings)(state["optimizer"])
        say(notes[0])
        return {**state, "optimizer": changed}

    wanted = jax.tree_util.tree_map_with_path(
        lambda key, x: _with_saved_errors(path_string(key), x, saved["structure"]),
        abstract,
        is_leaf=_is_one_bit,
    )
    return wanted, finish


def is_error(name: str) -> bool:
    """Whether an array of this name (`migrate.leaf_names`) belongs to one worker."""
    fields = ("worker_error", "server_error")
    return name.startswith(tuple(f"{OneBitAdamState.__name__}.{field}/" for field in fields))


def _grid(config: Any) -> list[int]:
    """Sizes of a saved config's mesh that errors depend on; a config may lack what has a default."""
    mesh = config.get("mesh", {})
    return [mesh.get(name, 1) for name in (AXIS, "fsdp", "tensor")]


def _without_errors(old: Any, new: Any) -> Any:
    if not _is_one_bit(old):
        return old
    rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (new.worker_error, new.server_error))
    return old._replace(worker_error=rows[0], server_error=rows[1])


def _with_saved_errors(path: str, state: Any, structure: dict[str, str]) -> Any:
    """A shape of the state at `path` with the errors that a checkpoint of this structure holds."""
    if not _is_one_bit(state):
        return state
    mesh = jax.tree.leaves(state.mu)[0].sharding.mesh

    def found(name: str) -> dict[str, jax.ShapeDtypeStruct]:
        start = f"{path}/{name}/"
        own = {p.removeprefix(start): t for p, t in structure.items() if p.startswith(start)}
        return {key: _array(text, mesh) for key, text in own.items()}

    return state._replace(worker_error=found("worker_error"), server_error=found("server_error"))


def _array(text: str, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """An array of a checkpoint, its rows over all devices if they can be."""
    found = migrate.parse_shape(text)
    spec = jax.P() if found.shape[0] % mesh.size else jax.P(mesh.axis_names)
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=NamedSharding(mesh, spec))
