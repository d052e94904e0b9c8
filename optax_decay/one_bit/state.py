"""The state of 1-bit Adam: its shardings, its phase, and its conversion to another number of workers."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.one_bit import buffers, compression
from optax_decay.one_bit.adam import OneBitAdamState
from optax_decay.parameters.arguments import one_of
from optax_decay.parameters.paths import path_string

CONVERSIONS = ("reset", "redistribute")


def _is_one_bit(x: jax.Array) -> bool:
    return isinstance(x, OneBitAdamState)


def _states(opt_state: optax.OptState) -> list[OneBitAdamState]:
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_one_bit) if _is_one_bit(x)]
    if not found:
        raise ValueError("the optimizer state holds no OneBitAdamState.")
    return found


def one_bit_phase(opt_state: optax.OptState) -> str:
    """The phase of the next step, ``"warmup"`` or ``"compressed"``. Reads one number from the device.

    Args:
        opt_state: an optimizer state that contains a `OneBitAdamState`.

    Raises:
        ValueError: no 1-bit Adam in `opt_state`, or several in different phases.
    """
    phases = {int(np.asarray(s.warmup_end)) > 0 for s in _states(opt_state)}
    if len(phases) > 1:
        raise ValueError("the 1-bit Adams in this optimizer state are in different phases.")
    return "compressed" if phases.pop() else "warmup"


def state_partition_specs(
    opt_state: optax.OptState,
    axis_name: compression.AxisName,
    param_specs: Any = None,
    *,
    manual_axes: tuple[str, ...] | None = None,
) -> Any:
    """PartitionSpecs of an optimizer state with 1-bit Adam, for `jax.shard_map`, `jax.jit` and checkpoints.

    Errors have one row per device: ``P((axis_name, splitting axes))``. A leaf whose path ends in the path of a
    parameter is sharded like that parameter. All other leaves are replicated.

    Args:
        opt_state: the state of any chain with 1-bit Adam, or its ``jax.ShapeDtypeStruct``.
        axis_name, param_specs: as given to the optimizer. Here `param_specs` must be a full tree, not a prefix.
        manual_axes: keep only these mesh axes, for a `shard_map` over some of the axes. None: keep all.

    Returns:
        A tree of PartitionSpec like `opt_state`.

    Raises:
        ValueError: no 1-bit Adam in `opt_state`.
    """
    _states(opt_state)
    leaves = jax.tree_util.tree_flatten_with_path(
        param_specs, is_leaf=lambda x: isinstance(x, jax.P)
    )[0]
    specs = {path_string(key): spec or jax.P() for key, spec in leaves}
    axes = compression.axis_tuple(axis_name)

    def reduced(spec: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
        if manual_axes is None:
            return spec
        kept = [tuple(a for a in buffers.entry_axes(e) if a in manual_axes) for e in spec]
        while kept and not kept[-1]:
            kept.pop()
        return jax.P(*(k[0] if len(k) == 1 else k or None for k in kept))

    def like_param(key: jax.tree_util.KeyPath, leaf: Any) -> jax.sharding.PartitionSpec:
        path = path_string(key)
        fits = [p for p in specs if path == p or path.endswith("/" + p)]
        spec = specs[max(fits, key=len)] if fits else jax.P()
        return reduced(spec) if len(spec) <= len(leaf.shape) else jax.P()

    def error_spec(name: str) -> jax.sharding.PartitionSpec:
        if name in specs:
            split = buffers.spec_axes(specs[name])
        else:
            split = tuple(name.split("/")[1:]) if name.split("/")[0] == "flat" else ()
        both = axes + split
        return reduced(jax.P(both if len(both) > 1 else both[0]))

    def rows(errors: Any) -> Any:
        return {name: error_spec(name) for name in errors} if isinstance(errors, dict) else jax.P()

    def walk(key: jax.tree_util.KeyPath, node: Any) -> Any:
        if not _is_one_bit(node):
            return like_param(key, node)
        specs = jax.tree_util.tree_map_with_path(like_param, node)
        return specs._replace(
            worker_error=rows(node.worker_error), server_error=rows(node.server_error)
        )

    return jax.tree_util.tree_map_with_path(walk, opt_state, is_leaf=_is_one_bit)


def _workers(state: OneBitAdamState) -> int:
    """The number of workers for which the errors were made; 0 without errors."""
    pairs = zip(jax.tree.leaves(state.worker_error), jax.tree.leaves(state.server_error))
    return next((w.shape[-1] // s.shape[-1] for w, s in pairs), 0)


def _redistribute(
    old: OneBitAdamState, new: OneBitAdamState, name: str
) -> tuple[jax.Array, jax.Array]:
    """Errors of one buffer for new workers: each gets the mean of what the old workers had not sent."""
    before, after, target = _workers(old), _workers(new), new.worker_error[name]
    if name in old.worker_error:
        worker, server = old.worker_error[name], old.server_error[name]
        shards, matrices = worker.shape[0] // before, worker.shape[1]
        if (shards, matrices) == (target.shape[0] // after, target.shape[1]):
            pending = jnp.mean(worker.reshape(before, shards, matrices, -1), axis=0)
            chunks = jnp.moveaxis(server.reshape(before, shards, matrices, -1), 0, 2)
            pending += chunks.reshape(shards, matrices, -1)
            # The padding at the end depends on the number of workers; it has no errors.
            pending = pending[..., : target.shape[-1]]
            gap = target.shape[-1] - pending.shape[-1]
            pending = jnp.pad(pending, ((0, 0), (0, 0), (0, gap)))
            spread = jnp.broadcast_to(pending, (after, *pending.shape)).reshape(target.shape)
            empty = new.server_error[name]
            return spread.astype(target.dtype), jnp.zeros(empty.shape, empty.dtype)
    raise ValueError(
        f"the errors of {name!r} cannot be redistributed: the layout, the compressed leaves or the shards per worker "
        f"changed; use errors='reset'."
    )


def _convert(
    old: OneBitAdamState, new: OneBitAdamState, errors: str
) -> tuple[OneBitAdamState, str]:
    """`old` with errors of the shapes of `new`, and a note that says what was done."""
    if _shapes((old.worker_error, old.server_error)) == _shapes(
        (new.worker_error, new.server_error)
    ):
        return old, "The errors fit as they are and were kept."
    if errors == "redistribute":
        done = "redistributed"
        pairs = {name: _redistribute(old, new, name) for name in new.worker_error}
        worker, server = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    else:
        done = "reset to 0"
        worker, server = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (new.worker_error, new.server_error)
        )
    note = (
        f"The errors of {_workers(old)} workers were {done} for {_workers(new)} workers; momentum, variance and phase "
        f"were kept."
    )
    return old._replace(worker_error=worker, server_error=server), note


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def _rest(opt_state: optax.OptState) -> Any:
    """The state without the errors of its 1-bit Adams."""
    return jax.tree.map(
        lambda x: x._replace(worker_error=(), server_error=()) if _is_one_bit(x) else x,
        opt_state,
        is_leaf=_is_one_bit,
    )


def change_workers(
    opt_state: optax.OptState,
    fresh: optax.OptState,
    errors: Literal["reset", "redistribute"] = "reset",
    report: Callable[[str], Any] | None = None,
) -> tuple[Any, str]:
    """The optimizer state for another number of workers.

    Momentum, variance, phase and the states of all other links are kept; they are the same on all workers. Each error
    belongs to one worker and one layout. Errors are either dropped, as the released code does on every load, or
    redistributed: every new worker gets the mean of what the old ones had not sent, so that nothing is lost.

    Args:
        opt_state: the old state as global arrays, outside `shard_map`.
        fresh: ``tx.init(params)`` of the new optimizer, or its ``jax.ShapeDtypeStruct``, for structure and shapes.
        errors: ``"reset"`` or ``"redistribute"``. The second needs the same layout, leaves and shards per worker.
        report: a function that is called with the note; None for no call.

    Returns:
        The new state (place it with `state_partition_specs`), and a note that says what was done.

    Raises:
        ValueError: an unknown name; states of different chains or parameters; errors that cannot be redistributed.
    """
    one_of("errors", errors, CONVERSIONS)
    before, after = _states(opt_state), _states(fresh)
    if _shapes(_rest(opt_state)) != _shapes(_rest(fresh)):
        raise ValueError(
            "the two states differ in more than the workers' errors: they belong to different chains or parameters."
        )
    pairs = [_convert(old, new, errors) for old, new in zip(before, after, strict=True)]
    converted = iter([state for state, _ in pairs])
    state = jax.tree.map(
        lambda x: next(converted) if _is_one_bit(x) else x, opt_state, is_leaf=_is_one_bit
    )
    note = "1-bit Adam: " + " ".join(note for _, note in pairs)
    if report is not None:
        report(note)
    return state, note
