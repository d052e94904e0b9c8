"""Runs whose weights are stored in bfloat16, by the way an update is added to them; everything else is float32.

float32      the weights are not rounded
bfloat16     round to nearest after every step: a change below half a unit in the last place is lost
stochastic   round up or down at random, so that the expectation is right
kahan        a second bfloat16 number per weight keeps what was lost
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_decay
from train.step.update import State, first_state, loss, loss_and_gradient
from train.study.small_runs import Numbers, SmallProgram, SmallTask

FORMS = ("float32", "bfloat16", "stochastic", "kahan")


@dataclasses.dataclass(frozen=True)
class RoundedProgram:
    """`SmallProgram` with weights of one of `FORMS`; the same functions of the same arguments.

    Attributes:
        inner: model, task and optimizer.
        form: how weights are stored.
    """

    inner: SmallProgram
    form: str

    workers = 1

    @property
    def task(self) -> SmallTask:
        return self.inner.task

    def init(self, own: Numbers) -> State:
        """The state before the first step; moments are float32."""
        state = self.inner.init(own)
        stored = state["params"]
        if self.form != "float32":
            stored = jax.tree.map(lambda w: w.astype(jnp.bfloat16), stored)
        started = first_state(wide(stored), self.inner.optimizer(own)[0]) | {"params": stored}
        return started | {"lost": optax_decay.low_precision.kahan_init(stored)}

    def advance(self, state: State, own: Numbers, tokens: jax.Array) -> tuple[State, jax.Array]:
        """The state after some steps, and their losses; tokens int32 [steps, B, T + 1]."""
        tx, _ = self.inner.optimizer(own)

        def one(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
            weights = wide(state["params"])
            value, gradient = loss_and_gradient(self.inner.forward, weights, tokens, 1)
            change, optimizer = tx.update(
                gradient, state["optimizer"], weights, value=value, gradients=gradient
            )
            params, lost = self._added(state, change, own.seed)
            after = {"params": params, "lost": lost, "optimizer": optimizer}
            return after | {"step": state["step"] + 1}, value

        return jax.lax.scan(one, state, tokens)

    def _added(self, state: State, change: Any, seed: Any) -> tuple[Any, Any]:
        params, lost = state["params"], state["lost"]
        if self.form == "stochastic":
            key = jax.random.fold_in(jax.random.key(seed), state["step"])
            return optax_decay.low_precision.apply_updates(params, change, key=key), lost
        if self.form == "kahan":
            return optax_decay.low_precision.kahan_apply_updates(params, change, lost)
        return optax.apply_updates(params, change), lost

    def params(self, state: State) -> Any:
        """The weights, as float32."""
        return wide(state["params"])

    def held_out_loss(self, state: State, held_out: jax.Array) -> jax.Array:
        """Mean loss of batches, int32 [N, B, T + 1], in nats per token."""
        params = self.params(state)
        of_one = lambda batch: loss(self.inner.forward, params, batch)
        return jnp.mean(jax.lax.map(of_one, held_out))


def wide(tree: Any) -> Any:
    """As float32."""
    return jax.tree.map(lambda w: w.astype(jnp.float32), tree)
