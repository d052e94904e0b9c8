"""Replicas as workers: each has a gradient of its own, and errors that no other has.

Some optimizers compress the exchange between replicas themselves. The step is then a `jax.shard_map` over the mesh
axis replica alone; inside a replica the compiler places data, fsdp and tensor as it always does. Only the exchange of
the optimizer and a few scalars cross replicas. The state of such an optimizer has two fields, `worker_error` and
`server_error`: dicts of arrays with a row per device, which are all that this file knows of it.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from optax_decay.axes import path_string
from optax_decay.one_bit import change_workers, local_params, state_partition_specs
from train.config.fields import Config
from train.run import migration

AXIS = "replica"
ERRORS = ("worker_error", "server_error")


def used(config: Config) -> bool:
    """Whether every replica is a worker of the optimizer."""
    return config.optimizer.direction.workers


def inside() -> bool:
    """Whether the function that is being traced is run by each worker (`on_each`)."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def own(tree: Any) -> Any:
    """In a worker, `tree` as its own, so that gradients with respect to it are its own too; else `tree` itself."""
    return local_params(tree, AXIS) if inside() else tree


def mean(x: jax.Array) -> jax.Array:
    """In a worker, the mean over all of them; else `x` itself."""
    return jax.lax.pmean(x, AXIS) if inside() else x


def on_each(function: Callable[..., Any], shardings: Any, outputs: Any) -> Callable[..., Any]:
    """`function` of a state and a batch, run by every replica on its own rows.

    Args:
        function: (state, batch) -> outputs; the axis is bound in it.
        shardings: of the state.
        outputs: shardings of the outputs, a tree or prefix of NamedSharding; None: the same on all replicas.
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
    """The part of a sharding that is over replicas."""
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec]
    return jax.P(*(AXIS if AXIS in entry else None for entry in entries))


def parameter_specs(shardings: Any) -> Any:
    """PartitionSpecs for the optimizer, without axes of size 1, which split nothing."""

    def split(sharding: NamedSharding) -> jax.sharding.PartitionSpec:
        sizes = sharding.mesh.shape
        return jax.P(*(e if e is not None and sizes[e] > 1 else None for e in sharding.spec))

    return jax.tree.map(split, shardings)


def _has_errors(x: Any) -> bool:
    return all(hasattr(x, name) for name in ERRORS)


def place_errors(placed: Any, state: Any, params: Any) -> Any:
    """`placed`, the shardings of an optimizer's state, with the errors of its workers split into a row per device.

    Args:
        placed: a tree of NamedSharding like `state`.
        state: as shapes.
        params: shardings of the parameters.
    """
    if not any(_has_errors(x) for x in jax.tree.leaves(state, is_leaf=_has_errors)):
        return placed
    mesh = jax.tree.leaves(params)[0].mesh
    specs = state_partition_specs(state, AXIS, parameter_specs(params))

    def put(found: Any, spec: Any) -> Any:
        if not _has_errors(found):
            return found
        rows = jax.tree.map(
            lambda s: NamedSharding(mesh, s),
            (spec.worker_error, spec.server_error),
            is_leaf=lambda s: isinstance(s, jax.P),
        )
        return found._replace(worker_error=rows[0], server_error=rows[1])

    return jax.tree.map(put, placed, specs, is_leaf=_has_errors)


def as_saved(
    abstract: Any, saved: dict[str, Any], now: dict[str, Any], say: Callable[[str], None]
) -> tuple[Any, Callable[[Any], Any]]:
    """How to read a state that other workers saved: the tree to read, and a function from it to the wanted state.

    Errors belong to a replica and to the part of it that a device holds. With another number of replicas each new one
    gets the mean of what the old ones had yet to send; with other parts they start from 0. `say` gets a message.

    Args:
        abstract: the wanted state, ShapeDtypeStruct with shardings.
        saved, now: the descriptions of the saved run and of this one (`checkpoints.describe`).
    """
    grids = [_grid(meta["config"]) for meta in (saved, now)]
    nodes = jax.tree.leaves(abstract, is_leaf=_has_errors)
    if grids[0] == grids[1] or not any(_has_errors(node) for node in nodes):
        return abstract, lambda state: state
    optimizer = abstract["optimizer"]
    same_parts = grids[0][1:] == grids[1][1:]
    shardings = jax.tree.map(lambda x: x.sharding, optimizer)
    notes: list[str] = []

    def convert(old: Any) -> Any:
        if same_parts:
            return change_workers(old, optimizer, "redistribute", report=notes.append)[0]
        notes.append(
            "The weights are split in another way inside a replica, so that the workers' errors were reset to 0;"
            " everything else in the optimizer's state was kept."
        )
        return jax.tree.map(_without_errors, old, optimizer, is_leaf=_has_errors)

    def finish(state: Any) -> Any:
        changed = jax.jit(convert, out_shardings=shardings)(state["optimizer"])
        say(notes[0])
        return {**state, "optimizer": changed}

    wanted = jax.tree_util.tree_map_with_path(
        lambda key, x: _with_saved_errors(path_string(key), x, saved["structure"]),
        abstract,
        is_leaf=_has_errors,
    )
    return wanted, finish


def is_error(name: str) -> bool:
    """Whether an array of this name (`migration.leaf_names`) belongs to one worker."""
    return re.match(rf"\w+\.({'|'.join(ERRORS)})/", name) is not None


def _grid(config: Any) -> list[int]:
    """Sizes of a saved config's mesh that errors depend on; a config may lack what has a default."""
    mesh = config.get("mesh", {})
    return [mesh.get(name, 1) for name in (AXIS, "fsdp", "tensor")]


def _without_errors(old: Any, new: Any) -> Any:
    if not _has_errors(old):
        return old
    rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (new.worker_error, new.server_error))
    return old._replace(worker_error=rows[0], server_error=rows[1])


def _with_saved_errors(path: str, state: Any, structure: dict[str, str]) -> Any:
    """A shape of the state at `path` with the errors that a checkpoint of this structure holds."""
    if not _has_errors(state):
        return state
    mesh = jax.tree.leaves(state.mu)[0].sharding.mesh

    def found(name: str) -> dict[str, jax.ShapeDtypeStruct]:
        start = f"{path}/{name}/"
        own = {p.removeprefix(start): t for p, t in structure.items() if p.startswith(start)}
        return {key: _array(text, mesh) for key, text in own.items()}

    return state._replace(worker_error=found("worker_error"), server_error=found("server_error"))


def _array(text: str, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """An array of a checkpoint, its rows over all devices if they can be."""
    found = migration.parse_shape(text)
    spec = jax.P() if found.shape[0] % mesh.size else jax.P(mesh.axis_names)
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=NamedSharding(mesh, spec))
