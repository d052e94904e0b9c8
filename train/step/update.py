"""One update and one evaluation: pure functions of a state and tokens, compiled once.

The state is a plain dict, {"params", "optimizer", "step"}: what a checkpoint holds.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_decay
from models.loss import cross_entropy
from train.step import replicas, sharding

State = dict[str, Any]
Forward = Callable[[Any, jax.Array], jax.Array]  # (params, tokens [B, T]) -> logits [B, T, V]


def first_state(params: Any, tx: optax.GradientTransformation) -> State:
    """The state before the first step, of fresh weights or of those of another model."""
    return {"params": params, "optimizer": tx.init(params), "step": jnp.zeros([], jnp.int32)}


def summed(forward: Forward, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropy of predicting each token from those before it, and the number of predictions.

    Args:
        forward: of a model; one with a `nats` method (`families.Forward`) sums without all logits at once.
        params: its weights.
        tokens: int32 [B, T + 1]. Negative numbers are padding and end a row: a causal model sees
            none of them before the last real token.
    """
    if hasattr(forward, "nats"):
        return forward.nats(params, inputs(tokens), tokens[:, 1:])
    return cross_entropy(forward(params, inputs(tokens)), tokens[:, 1:])


def loss(forward: Forward, params: Any, tokens: jax.Array) -> jax.Array:
    """Mean of `summed` per prediction; 0 where there is nothing to predict."""
    total, count = summed(forward, params, tokens)
    return total / jnp.maximum(count, 1)


def inputs(tokens: jax.Array) -> jax.Array:
    """All but the last of [..., T + 1] tokens; padding becomes a token whose output nothing reads."""
    return jnp.maximum(tokens[..., :-1], 0)


def parts(tokens: jax.Array, micro_batches: int) -> jax.Array:
    """[B, ...] to [n, B/n, ...]: row r goes to part r mod n, so that every device keeps its own rows."""
    return tokens.reshape(-1, micro_batches, *tokens.shape[1:]).swapaxes(0, 1)


def loss_and_gradient(
    forward: Forward, params: Any, tokens: jax.Array, micro_batches: int
) -> tuple[jax.Array, Any]:
    """Loss and gradient of the whole batch, worked through in `micro_batches` equal parts one after the other.

    Where replicas are workers (`replicas.on_each`), those of the replica's own part of the batch, weighed by its
    tokens: the mean over replicas is that of the batch.
    """
    # Of all parts together: with padding, a mean of means would weigh their tokens differently.
    tokens_here = jnp.sum(tokens[:, 1:] >= 0, dtype=jnp.float32)
    count = jnp.maximum(replicas.mean(tokens_here), 1)
    share = jax.value_and_grad(lambda params, part: summed(forward, params, part)[0] / count)
    params, nothing = replicas.own((params, jnp.zeros([], jnp.float32)))
    if micro_batches == 1:
        return share(params, tokens)

    def add(total: Any, part: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, share(params, part)), None

    zero = (nothing, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, parts(tokens, micro_batches))[0]


def gradient(forward: Forward, micro_batches: int, params: Any, tokens: jax.Array) -> Any:
    """Of the mean loss of a batch."""
    return loss_and_gradient(forward, params, tokens, micro_batches)[1]


def train_step(
    forward: Forward,
    tx: optax.GradientTransformationExtraArgs,
    rate: optax.Schedule,
    micro_batches: int,
    curvature: bool,
    state: State,
    tokens: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one step, and scalars to note of the step.

    Args:
        forward: of a model, as in `summed`.
        tx: the optimizer.
        rate: the learning rate by step.
        micro_batches: equal parts that the batch is worked through in.
        curvature: whether the optimizer asks for a sampled-label gradient when one is due.
        state: before the step.
        tokens: int32 [B, T + 1].
    """
    value, gradient = loss_and_gradient(forward, state["params"], tokens, micro_batches)
    if not curvature:
        return advance(tx, rate, state, value, gradient)
    pieces = parts(tokens, micro_batches)
    hessian = optax_decay.curvature.gnb_hessian(
        forward, inputs(pieces), pieces[..., 1:] >= 0, micro_batches=True
    )
    return advance(tx, rate, state, value, gradient, hessian)


def advance(
    tx: optax.GradientTransformationExtraArgs,
    rate: optax.Schedule,
    state: State,
    value: jax.Array,
    gradient: Any,
    hessian: Callable[[Any, jax.Array], Any] | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """The state after a step of this loss and gradient, and scalars to note of it.

    Some multipliers of decay look at the raw gradient, which their place in the chain hides; an optimizer that needs
    a curvature calls `hessian` when one is due. Where replicas are workers, the norm that is noted is the root of the
    mean square of theirs, and all of them leave out the same steps.
    """
    params = state["params"]
    noted = {
        "loss": replicas.mean(value),
        "gradient_norm": jnp.sqrt(replicas.mean(optax.tree.norm(gradient, squared=True))),
        "learning_rate": jnp.asarray(rate(state["step"]), jnp.float32),
    }
    with jax.named_scope("optimizer"):
        change, optimizer = tx.update(
            gradient,
            state["optimizer"],
            params,
            value=noted["loss"],
            norm=noted["gradient_norm"],
            gradients=None if replicas.inside() else gradient,
            hessian_fn=hessian,
        )
        params = optax.apply_updates(params, change)
    if isinstance(optimizer, optax_decay.states.SkipOnSpikeState):
        noted |= {"skipped": optimizer.skipped, "skipped_in_a_row": optimizer.in_a_row}
    return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, noted


def compile_update(
    forward: Forward,
    tx: optax.GradientTransformationExtraArgs,
    rate: optax.Schedule,
    micro_batches: int,
    shardings: State,
    curvature: bool = False,
) -> Any:
    """`train_step` of state and tokens, jitted. It overwrites the state it is given (donation)."""
    step = functools.partial(train_step, forward, tx, rate, micro_batches, curvature)
    return compiled(step, shardings)


def compiled(step: Callable[[State, Any], Any], shardings: State, workers: bool = False) -> Any:
    """A step from state and batch to state and notes, jitted; with `workers` every replica has its own gradient.

    Shardings of the result are pinned to those of the argument: otherwise the second call would
    compile again. Arguments that nothing reads, such as the last step's metrics, are kept: otherwise
    their memory would not be used again.
    """
    results = (shardings, None)
    step = sharding.over_devices(step, shardings, workers, results)
    return jax.jit(step, donate_argnums=0, keep_unused=True, out_shardings=results)
