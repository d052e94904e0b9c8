"""Gradients over weights, in tenths of a run: the mean of log(‖gradient‖/‖weights‖) over hidden matrices and steps.

A link of a chain that changes nothing. It keeps the means in its state, from where they are read after a run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.axes import signatures

PARTS = 10


class TenthsState(NamedTuple):
    """Completed steps int32; sums of log ratios and numbers of steps, float32 [PARTS] each."""

    count: jax.Array
    total: jax.Array
    steps: jax.Array


def record_tenths(steps: int, axes: Any) -> optax.GradientTransformationExtraArgs:
    """Watches the raw gradients of a run of so many steps; call `update` with `gradients=`.

    Args:
        steps: of the run.
        axes: of the parameters; a stack of layers counts as its layers.
    """

    def init(params: Any) -> TenthsState:
        zero = jnp.zeros([PARTS], jnp.float32)
        return TenthsState(jnp.zeros([], jnp.int32), zero, zero)

    def update(
        updates: Any, state: TenthsState, params: Any = None, **extra: Any
    ) -> tuple[Any, TenthsState]:
        gradients, described = extra["gradients"], signatures(axes, params)
        ratios = []
        for signature, g, w in zip(
            described.values(), jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True
        ):
            if signature.role == "hidden":
                inside = tuple(i for i in range(w.ndim) if i not in signature.batch)
                sizes = [jnp.sum(jnp.square(x), axis=inside) for x in (g, w)]
                ratios.append(jnp.ravel(0.5 * (jnp.log(sizes[0]) - jnp.log(sizes[1]))))
        part = state.count * PARTS // steps
        after = TenthsState(
            state.count + 1,
            state.total.at[part].add(jnp.mean(jnp.concatenate(ratios))),
            state.steps.at[part].add(1.0),
        )
        return updates, after

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def means(state: Any) -> jax.Array:
    """The mean of each tenth, float32 [PARTS], from the state of an optimizer that holds one such link."""
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, TenthsState))
        if isinstance(node, TenthsState)
    ]
    (only,) = found
    return only.total / only.steps
