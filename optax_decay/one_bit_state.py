"""Where the state of 1-bit Adam lives, which phase it is in, and how it moves to another number of workers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay import sign_buffers
from optax_decay import sign_compression as sc
from optax_decay.one_bit_adam import OneBitAdamState
from optax_decay.paths import path_string

CONVERSIONS = ("reset", "redistribute")


def _is_one_bit(x: Any) -> bool:
    return isinstance(x, OneBitAdamState)


def _states(opt_state: Any) -> list[OneBitAdamState]:
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_one_bit) if _is_one_bit(x)]
    if not found:
        raise ValueError("the optimizer state holds no OneBitAdamState.")
    return found


def one_bit_phase(opt_state: Any) -> str:
    """``"warmup"`` or ``"compressed"``: what the next step will do. Reads one number from the device.

    Raises:
        ValueError: no 1-bit Adam in `opt_state`, or several that disagree.
    """
    phases = {int(np.asarray(s.freeze_count)) > 0 for s in _states(opt_state)}
    if len(phases) > 1:
        raise ValueError("the 1-bit Adams in this state are in different phases.")
    return "compressed" if phases.pop() else "warmup"


def state_partition_specs(
    opt_state: Any,
    axis_name: sc.AxisName,
    param_specs: Any = None,
    *,
    manual_axes: tuple[str, ...] | None = None,
) -> Any:
    """PartitionSpecs of an optimizer state that holds a 1-bit Adam: for `jax.shard_map`, `jax.jit` and checkpoints.

    Errors have one row per device: ``P((axis_name, splitting axes))``. A leaf whose path ends in the path of a
    parameter is sharded like it; everything else is replicated.

    Args:
        opt_state: the state, or its ``jax.ShapeDtypeStruct``; any chain around it.
        axis_name, param_specs: as given to the optimizer. `param_specs` must be a full tree here, not a prefix.
        manual_axes: keep only these mesh axes, as the specs of a `shard_map` over some of the axes must.

    Raises:
        ValueError: no 1-bit Adam in `opt_state`.
    """
    _states(opt_state)
    leaves = jax.tree_util.tree_flatten_with_path(
        param_specs, is_leaf=lambda x: isinstance(x, jax.P)
    )[0]
    specs = {path_string(key): spec or jax.P() for key, spec in leaves}
    axes = sc.axis_tuple(axis_name)

    def reduced(spec: Any) -> jax.sharding.PartitionSpec:
        if manual_axes is None:
            return spec
        kept = [tuple(a for a in sign_buffers.entry_axes(e) if a in manual_axes) for e in spec]
        while kept and not kept[-1]:
            kept.pop()
        return jax.P(*(k[0] if len(k) == 1 else k or None for k in kept))

    def like_param(key: Any, leaf: Any) -> jax.sharding.PartitionSpec:
        path = path_string(key)
        fits = [p for p in specs if path == p or path.endswith("/" + p)]
        spec = specs[max(fits, key=len)] if fits else jax.P()
        return reduced(spec) if len(spec) <= len(leaf.shape) else jax.P()

    def error_spec(name: str) -> jax.sharding.PartitionSpec:
        if name in specs:
            split = sign_buffers.spec_axes(specs[name])
        else:
            split = tuple(name.split("/")[1:]) if name.split("/")[0] == "flat" else ()
        both = axes + split
        return reduced(jax.P(both if len(both) > 1 else both[0]))

    def rows(errors: Any) -> Any:
        return {name: error_spec(name) for name in errors} if isinstance(errors, dict) else jax.P()

    def walk(key: Any, node: Any) -> Any:
        if not _is_one_bit(node):
            return like_param(key, node)
        specs = jax.tree_util.tree_map_with_path(like_param, node)
        return specs._replace(
            worker_error=rows(node.worker_error), server_error=rows(node.server_error)
        )

    return jax.tree_util.tree_map_with_path(walk, opt_state, is_leaf=_is_one_bit)


def _redistribute(
    worker: jax.Array, server: jax.Array, wanted: Any, wanted_server: Any
) -> tuple[jax.Array, jax.Array] | None:
    """Errors of other workers with the same mean, or None where the shards differ too."""
    old_workers, new_workers = (
        worker.shape[1] // server.shape[1],
        (wanted.shape[1] // wanted_server.shape[1]),
    )
    shards = worker.shape[0] // old_workers
    if shards != wanted.shape[0] // new_workers:
        return None
    pending = jnp.mean(worker.reshape(old_workers, shards, -1), axis=0)
    chunks = server.reshape(old_workers, shards, -1).transpose(1, 0, 2).reshape(shards, -1)
    pending = (pending + chunks)[:, : wanted.shape[1]]
    pending = jnp.pad(pending, ((0, 0), (0, wanted.shape[1] - pending.shape[1])))
    rows = jnp.broadcast_to(pending, (new_workers, *pending.shape)).reshape(wanted.shape)
    return rows.astype(wanted.dtype), jnp.zeros(wanted_server.shape, wanted_server.dtype)


def change_workers(
    opt_state: Any,
    fresh: Any,
    errors: str = "reset",
    report: Callable[[str], Any] | None = print,
) -> tuple[Any, str]:
    """The optimizer state for another number of workers.

    Momentum, variance, phase and all other links' states are kept; they are the same on all workers. Errors belong to
    one worker and one layout each and are either dropped (what the released code does on every load) or redistributed:
    every new worker gets the mean of what the old ones had not sent, so that nothing is lost.

    Args:
        opt_state: the old state as global arrays, outside `shard_map`.
        fresh: ``tx.init(params)`` of the new optimizer, or its ``jax.ShapeDtypeStruct``; gives structure and shapes.
        errors: ``"reset"`` or ``"redistribute"``. The second needs the same layout, leaves and shards per worker.
        report: called with the note.

    Returns:
        The new state (place it with `state_partition_specs`), and a note that says what was done.

    Raises:
        ValueError: an unknown name; states of different chains or parameters; errors that cannot be redistributed.
    """
    if errors not in CONVERSIONS:
        raise ValueError(f"errors={errors!r} is not known; allowed: {', '.join(CONVERSIONS)}.")
    before, after = _states(opt_state), _states(fresh)
    notes = []

    def convert(old: OneBitAdamState, new: OneBitAdamState) -> OneBitAdamState:
        same = jax.tree.map(lambda x: (x.shape, x.dtype), (old.worker_error, old.server_error))
        if same == jax.tree.map(lambda x: (x.shape, x.dtype), (new.worker_error, new.server_error)):
            notes.append("The errors fit as they are and were kept.")
            return old
        worker, server = (
            {n: jnp.zeros(x.shape, x.dtype) for n, x in part.items()} for part in new[4:6]
        )
        count = {w.shape[1] // s.shape[1] for w, s in zip(old[4].values(), old[5].values())}
        target = {w.shape[1] // s.shape[1] for w, s in zip(new[4].values(), new[5].values())}
        done = "were reset to 0"
        if errors == "redistribute":
            for name in new.worker_error:
                pair = None
                if name in old.worker_error:
                    args = (old.worker_error[name], old.server_error[name])
                    pair = _redistribute(*args, new.worker_error[name], new.server_error[name])
                if pair is None:
                    raise ValueError(
                        f"the errors of {name!r} cannot be redistributed: the layout, the compressed leaves or the "
                        f"shards per worker changed; use errors='reset'."
                    )
                worker[name], server[name] = pair
            done = "were redistributed"
        notes.append(
            f"The errors of {_join(count)} workers {done} for {_join(target)} workers; momentum, variance and phase "
            f"were kept."
        )
        return old._replace(worker_error=worker, server_error=server)

    shapes = [
        jax.tree.map(lambda x: tuple(x.shape), tree, is_leaf=None)
        for tree in (
            _without_errors(opt_state),
            _without_errors(fresh),
        )
    ]
    if len(before) != len(after) or shapes[0] != shapes[1]:
        raise ValueError(
            "the two states differ in more than the workers' errors: they belong to different chains or parameters."
        )
    leaves, treedef = jax.tree.flatten(opt_state, is_leaf=_is_one_bit)
    targets = iter(after)
    state = treedef.unflatten([convert(x, next(targets)) if _is_one_bit(x) else x for x in leaves])
    note = "1-bit Adam: " + " ".join(notes)
    if report is not None:
        report(note)
    return state, note


def _join(numbers: set[int]) -> str:
    return "/".join(str(n) for n in sorted(numbers)) or "no"


def _without_errors(opt_state: Any) -> Any:
    return jax.tree.map(
        lambda x: x._replace(worker_error=(), server_error=()) if _is_one_bit(x) else x,
        opt_state,
        is_leaf=_is_one_bit,
    )
