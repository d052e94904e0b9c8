"""The machinery behind `decay` and `proximal_decay`: state, and the product of rate, multipliers and pull per leaf."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.product import masks
from optax_decay.product.metrics import Metrics, measure
from optax_decay.product.per_matrix import Context, PerMatrix, accumulator_dtype
from optax_decay.product.pulls import Pull


class DecayState(NamedTuple):
    """State of `decay` and `proximal_decay`. Its structure does not depend on whether λ is a number or a schedule.

    Attributes:
        count: int32 scalar, completed updates.
        threshold: memory of the pull's threshold; empty unless it has any.
        multipliers: tuple, memory of each multiplier.
        metrics: `Metrics` by path if asked for, else empty.
    """

    count: jax.Array
    threshold: Any
    multipliers: tuple[Any, ...]
    metrics: Any


class _Leaf(NamedTuple):
    path: str
    update: Any
    param: Any


def _flatten(updates: Any, params: Any) -> tuple[list[_Leaf], Any]:
    """Leaves of updates with their paths and parameters; a None update is a leaf, a MaskedNode is not."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
    weights = treedef.flatten_up_to(params)
    return [_Leaf(path_string(k), u, w) for (k, u), w in zip(keyed, weights)], treedef


def _spread(value: Any, signature: axes_lib.Signature, dtype: Any) -> Any:
    if isinstance(value, int | float):
        return value
    value = jnp.asarray(value, accumulator_dtype(dtype))
    return signature.spread(value) if value.ndim else value


def by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_string(key): leaf for key, leaf in leaves}


class Product(NamedTuple):
    """What `decay` and `proximal_decay` share: the product of rate, multipliers and pull, leaf by leaf."""

    pull: Pull
    multipliers: tuple[PerMatrix, ...]
    mask: Any
    axes: Any
    metrics: bool

    def decayed(self, params: Any) -> tuple[dict[str, axes_lib.Signature], dict[str, float]]:
        signatures = axes_lib.signatures(self.axes, params)
        strength = masks.strengths(self.mask, params, signatures)
        return {path: s for path, s in signatures.items() if strength[path]}, strength

    def init(self, params: Any) -> DecayState:
        if has_no_leaves(params):
            return placeholder_state(DecayState)
        signatures, _ = self.decayed(params)
        chosen = {p: w for p, w in by_path(params).items() if p in signatures}
        metrics = {}
        for path, w in chosen.items():
            # Five arrays, not one array five times: a donated buffer must not appear twice.
            zeros = (
                jnp.zeros(signatures[path].batch_shape, accumulator_dtype(w.dtype))
                for _ in range(5)
            )
            if self.metrics:
                metrics[path] = Metrics(*zeros)
        return DecayState(
            jnp.zeros([], jnp.int32),
            self.pull.threshold.init(chosen, signatures) if self.pull.threshold else (),
            tuple(m.init(chosen, signatures) for m in self.multipliers),
            metrics,
        )

    def update(
        self,
        updates: Any,
        state: DecayState,
        params: Any,
        extra: dict[str, Any],
        rate: Any,
        step: Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, jax.Array]],
    ) -> tuple[Any, DecayState]:
        """Runs ``step(u, w, coefficient, δ) -> (new update, decay term)`` on every decayed leaf."""
        if params is None:
            raise ValueError(
                "weight decay needs the weights: call tx.update(updates, state, params)."
            )
        if has_no_leaves(params):
            return updates, state._replace(count=increment(state.count))
        signatures, strength = self.decayed(params)
        leaves, treedef = _flatten(updates, params)
        chosen = {
            leaf.path: leaf
            for leaf in leaves
            if leaf.update is not None and leaf.path in signatures
        }
        context = Context(
            {path: leaf.update for path, leaf in chosen.items()},
            {p: w for p, w in by_path(params).items() if p in signatures},
            signatures,
            state.count,
            extra,
        )
        deltas: dict[str, Any] = {}
        threshold = state.threshold
        if self.pull.threshold:
            deltas, threshold = self.pull.threshold.update(context, state.threshold)
        factors, memories = [], []
        for multiplier, memory in zip(self.multipliers, state.multipliers, strict=True):
            values, memory = multiplier.update(context, memory)
            factors.append(values)
            memories.append(memory)
        results, metrics = {}, dict(state.metrics)
        for path, leaf in chosen.items():
            signature = signatures[path]
            # Promote first: Python numbers are weakly typed and leave a plain AdamW's arithmetic untouched.
            dtype = jnp.promote_types(
                jnp.promote_types(leaf.update.dtype, leaf.param.dtype), jnp.float32
            )
            coefficient = _spread(rate, signature, dtype)
            if strength[path] != 1.0:
                coefficient = coefficient * strength[path]
            for values in factors:
                coefficient = coefficient * _spread(values[path], signature, dtype)
            delta = _spread(deltas[path], signature, dtype) if deltas else None
            w = leaf.param.astype(dtype)
            new, term = step(leaf.update.astype(dtype), w, coefficient, delta)
            results[path] = new.astype(leaf.update.dtype)
            if self.metrics:
                metrics[path] = measure(signature, coefficient, term, leaf.update, w, delta)
        flat = [results.get(leaf.path, leaf.update) for leaf in leaves]
        new_state = DecayState(increment(state.count), threshold, tuple(memories), metrics)
        return jax.tree.unflatten(treedef, flat), new_state


def increment(count: jax.Array) -> jax.Array:
    """One more completed update; stays at the largest int32."""
    return jnp.asarray(optax.safe_increment(count))
