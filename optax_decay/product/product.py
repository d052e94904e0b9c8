"""The machinery behind `decay` and `proximal_decay`: state, and the product of rate, multipliers and pull per leaf."""

import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.parameters.structures import once_per_structure
from optax_decay.product import masks
from optax_decay.product.metrics import measure, no_metrics
from optax_decay.product.per_matrix import Context, PerMatrix, Value, accumulator_dtype
from optax_decay.product.pulls import Pull

# ``(u, w, coefficient, δ) -> (new update, decay term)`` of one leaf; δ is None for pulls without a threshold.
Step = Callable[[jax.Array, jax.Array, Value, Value | None], tuple[jax.Array, jax.Array]]


class DecayState(NamedTuple):
    """State of `decay` and `proximal_decay`. Its structure does not depend on whether λ is a number or a schedule.

    Attributes:
        count: int32 scalar, completed updates.
        threshold: memory of the pull's threshold; empty unless it has any.
        multipliers: tuple, memory of each multiplier.
        metrics: `Metrics` by path with ``metrics=True``, else empty.
    """

    count: jax.Array
    threshold: Any
    multipliers: tuple[Any, ...]
    metrics: Any


class Resolved(NamedTuple):
    """A mask and axes, read for one tree of parameters.

    Attributes:
        paths: of all leaves, in flattening order.
        signatures: of the leaves that decay, by path.
        strengths: how strongly each of those decays, by path.
    """

    paths: tuple[str, ...]
    signatures: dict[str, axes_lib.Signature]
    strengths: dict[str, float]


class NothingDecaysWarning(UserWarning):
    """A mask under which no parameter decays."""


def _check_leaf(path: str, shape: jax.ShapeDtypeStruct) -> None:
    """Raises ValueError for a decayed parameter that cannot decay; names it."""
    wrong = None
    if not jnp.issubdtype(shape.dtype, jnp.inexact):
        kind = jnp.issubdtype(shape.dtype, jnp.integer)
        kind = f"integers ({shape.dtype})" if kind else f"values of dtype {shape.dtype}"
        wrong = f"holds {kind}, which cannot decay"
    elif shape.size == 0:
        wrong = f"of shape {shape.shape} has no elements"
    if wrong:
        raise ValueError(
            f"the parameter {path!r} {wrong}: leave it out with mask=... or optax.masked."
        )


def resolver(mask: masks.Mask, axes: axes_lib.Axes) -> Callable[[optax.Params], Resolved]:
    """Reads a mask and axes for a tree of parameters, once for each structure."""

    def resolve(shapes: optax.Params) -> Resolved:
        signatures = axes_lib.signatures(axes, shapes)
        strengths = masks.strengths(mask, shapes, signatures)
        chosen = {path: s for path, s in signatures.items() if strengths[path]}
        leaves = by_path(shapes)
        for path in chosen:
            _check_leaf(path, leaves[path])
        if leaves and not chosen:
            short = reprlib.repr(mask)  # a mask may be a tree of thousands of leaves
            warnings.warn(
                f"mask={short} decays none of the {len(leaves)} parameters.",
                NothingDecaysWarning,
                stacklevel=4,
            )
        return Resolved(tuple(signatures), chosen, {path: strengths[path] for path in chosen})

    return once_per_structure(resolve)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_string(key): leaf for key, leaf in leaves}


def _spread(value: Value, signature: axes_lib.Signature, dtype: jax.typing.DTypeLike) -> Value:
    """A number per matrix so that it broadcasts against the parameter; Python numbers stay weakly typed."""
    if isinstance(value, int | float):
        return value
    value = jnp.asarray(value, accumulator_dtype(dtype))
    return signature.spread(value) if value.ndim else value


class Product:
    """The product of rate, multipliers and pull, leaf by leaf, which `decay` and `proximal_decay` share."""

    def __init__(
        self,
        pull: Pull,
        multipliers: tuple[PerMatrix, ...],
        mask: masks.Mask,
        axes: axes_lib.Axes,
        metrics: bool,
    ):
        self.pull, self.multipliers, self.metrics = pull, multipliers, metrics
        self.resolved = resolver(mask, axes)

    def init(self, params: optax.Params) -> DecayState:
        """The state before the first update."""
        if has_no_leaves(params):
            return placeholder_state(DecayState)
        paths, signatures, _ = self.resolved(params)
        leaves = dict(zip(paths, jax.tree.leaves(params), strict=True))
        chosen = {path: leaves[path] for path in signatures}
        metrics = {}
        if self.metrics:
            metrics = {path: no_metrics(signatures[path], w.dtype) for path, w in chosen.items()}
        return DecayState(
            jnp.zeros([], jnp.int32),
            self.pull.threshold.init(chosen, signatures) if self.pull.threshold else (),
            tuple(m.init(chosen, signatures) for m in self.multipliers),
            metrics,
        )

    def update(
        self,
        updates: optax.Updates,
        state: DecayState,
        params: optax.Params | None,
        extra: Mapping[str, Any],
        rate: Value,
        step: Step,
    ) -> tuple[optax.Updates, DecayState]:
        """Runs `step` on every leaf that decays.

        Args:
            updates, params, extra: as in the ``update`` of the transformation.
            state: from `init` or the last update.
            rate: λ(t) at the decay's place in the chain.
            step: the arithmetic of one leaf.
        """
        if params is None:
            raise ValueError(
                "weight decay needs the weights: call tx.update(updates, state, params)."
            )
        if has_no_leaves(params):
            return updates, state._replace(count=increment(state.count))
        paths, signatures, strengths = self.resolved(params)
        weights, treedef = jax.tree.flatten(params)
        incoming = treedef.flatten_up_to(updates)  # None, or masked, where a leaf has no update
        leaves = {
            path: (u, w) for path, u, w in zip(paths, incoming, weights, strict=True) if is_array(u)
        }
        context = Context(
            {path: leaves[path][0] for path in signatures if path in leaves},
            {path: w for path, w in zip(paths, weights) if path in signatures},
            signatures,
            state.count,
            extra,
        )
        deltas, threshold = {}, state.threshold
        if self.pull.threshold:
            deltas, threshold = self.pull.threshold.update(context, threshold)
        factors, memories = [], []
        for multiplier, memory in zip(self.multipliers, state.multipliers, strict=True):
            values, memory = multiplier.update(context, memory)
            factors.append(values)
            memories.append(memory)
        results, metrics = {}, dict(state.metrics)
        for path in context.updates:
            u, w = leaves[path]
            signature = signatures[path]
            # Promote first: Python numbers are weakly typed and leave a plain AdamW's arithmetic untouched.
            dtype = jnp.promote_types(jnp.promote_types(u.dtype, w.dtype), jnp.float32)
            coefficient = _spread(rate, signature, dtype)
            if strengths[path] != 1.0:
                coefficient = coefficient * strengths[path]
            for values in factors:
                coefficient = coefficient * _spread(values[path], signature, dtype)
            delta = _spread(deltas[path], signature, dtype) if deltas else None
            w = w.astype(dtype)
            new, term = step(u.astype(dtype), w, coefficient, delta)
            results[path] = new.astype(u.dtype)
            if self.metrics:
                metrics[path] = measure(signature, coefficient, term, u, w, delta)
        flat = [results.get(path, u) for path, u in zip(paths, incoming)]
        new_state = DecayState(increment(state.count), threshold, tuple(memories), metrics)
        return jax.tree.unflatten(treedef, flat), new_state


def is_array(update: object) -> bool:
    """False for the holes that ``optax.masked`` and filtered trees leave in updates."""
    return update is not None and not isinstance(update, optax.MaskedNode)


def increment(count: jax.Array) -> jax.Array:
    """One more completed update; stays at the largest int32."""
    return jnp.asarray(optax.safe_increment(count))
