"""Many small training runs at one width in one program: all decays and seeds of a sweep at once.

Runs that differ only in numbers (learning rate, decay, seed) are one `jax.vmap`: they share a
compilation, and the device works on all of them together.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay
from models import llama
from train.data import batches as data_lib
from train.step import optimizer
from train.step import update as step

# standard: one learning rate for all parameters, and the model as it is at any width.
# mup: learning rates of matrices ∝ 1/width, and the model with `base_width`.
Parametrisation = Literal["standard", "mup"]

CHUNK = 20  # steps per call of the compiled function


@dataclasses.dataclass(frozen=True)
class Task:
    """What every run of a sweep has in common, whatever its width."""

    base_width: int = 32
    """Width of the proxy [features]."""
    head_width: int = 16
    """Of attention heads, at all widths: wider models have more of them [features]."""
    mlp_factor: int = 3
    """Width inside the MLP over the width of the model."""
    layers: int = 2
    """Number of layers."""
    init_std: float = 0.1
    """Standard deviation of the matrices of the proxy at the start."""
    text: str = "stdlib"
    """Folder, file or glob of text files; stdlib: the sources of the running Python's library."""
    tokenizer: str = "bytes"
    """bytes, or bpe-N."""
    length: int = 64
    """Length of a sequence [tokens]."""
    batch_size: int = 8
    """Sequences per step."""
    steps: int = 300
    """Updates per run."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate climbs; from there it falls to 0 in a line."""
    eval_batches: int = 32
    """Held-out batches for the loss at the end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""


def model(task: Task, width: int, vocab_size: int, parametrisation: str) -> llama.Config:
    """The network of a sweep at one width."""
    return llama.Config(
        vocab_size=vocab_size,
        width=width,
        mlp_width=task.mlp_factor * width,
        layers=task.layers,
        heads=width // task.head_width,
        init_std=task.init_std,
        base_width=task.base_width if parametrisation == "mup" else None,
        dtype=task.dtype,
    )


def transformation(
    task: Task, parametrisation: str, axes: Any, learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """AdamW, or AdamW under μP, for numbers that may be traced.

    Args:
        task: of the sweep.
        parametrisation: "standard" or "mup".
        axes: of the parameters.
        learning_rate: η at the peak; under μP, that of the proxy.
        weight_decay: λ of the matrices at this width, whatever a rule calls it at the proxy.
    """
    climb = max(1, round(task.warmup * task.steps))

    def rate(count: Any) -> Any:
        rise, fall = (count + 1) / climb, (task.steps - count) / max(1, task.steps - climb)
        return learning_rate * jnp.minimum(1.0, jnp.minimum(rise, fall))

    if parametrisation == "mup":
        adamw = optax_decay.mup_adamw(
            rate, task.base_width, b2=0.95, weight_decay=weight_decay, rule="constant", axes=axes
        )
    else:
        decay = optax_decay.decay(weight_decay, mask=("hidden", "head"), axes=axes)
        adamw = optax.chain(optax.scale_by_adam(b2=0.95), decay, optax.scale_by_learning_rate(rate))
    return optax.chain(optimizer.clip(1.0), adamw)


def run_group(
    task: Task,
    data: data_lib.TokenBatches,
    parametrisation: str,
    width: int,
    learning_rate: float,
    weight_decays: Sequence[float],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Trains all decays × seeds at one width and learning rate, side by side.

    Args:
        data: text for the task; a run's seed orders it.

    Returns:
        One record per seed and decay: what it was, the loss on held-out text in nats per token
        (infinite if it is not a number), that of the last fifth of the training, and the largest
        singular value of every hidden matrix (geometric mean over layers).
    """
    init, advance, finish = _compiled(task, parametrisation, width, data.vocab_size)
    eta = jnp.asarray(learning_rate, jnp.float32)
    lambdas = jnp.asarray(weight_decays, jnp.float32)
    state = init(eta, lambdas, jnp.asarray(seeds, jnp.uint32))
    sources = [dataclasses.replace(data, seed=seed) for seed in seeds]
    losses = []
    for start in range(0, task.steps, CHUNK):
        numbers = range(start, min(start + CHUNK, task.steps))
        tokens = np.stack([[source.batch(i) for source in sources] for i in numbers])
        state, loss = advance(state, eta, lambdas, jnp.asarray(tokens))
        losses.append(np.asarray(loss))  # [steps, seeds, decays]
    held_out = np.stack(data.held_out(task.eval_batches))
    final, tops = jax.device_get(finish(state, jnp.asarray(held_out)))
    last = np.concatenate(losses)[-max(1, task.steps // 5) :].mean(axis=0)
    return [
        {
            "parametrisation": parametrisation,
            "width": width,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "seed": seed,
            "loss": float(final[i, j]) if np.isfinite(final[i, j]) else math.inf,
            "training_loss": float(last[i, j]),
            "top": {path: float(value[i, j]) for path, value in tops.items()},
        }
        for i, seed in enumerate(seeds)
        for j, weight_decay in enumerate(weight_decays)
    ]


@functools.lru_cache(maxsize=1)
def _compiled(task: Task, parametrisation: str, width: int, vocab_size: int) -> Any:
    """(init, advance, finish) of all runs at a width; states have leading axes [seeds, decays]."""
    config = model(task, width, vocab_size, parametrisation)
    axes = llama.axes(config)
    forward = functools.partial(llama.forward, config)

    def tx(eta: jax.Array, lam: jax.Array) -> optax.GradientTransformation:
        return transformation(task, parametrisation, axes, eta, lam)

    def begin(eta: jax.Array, lambdas: jax.Array, seeds: jax.Array) -> Any:
        one = jax.vmap(lambda seed: llama.init(config, jax.random.key(seed)))(seeds)
        copies = lambda w: jnp.repeat(w[:, None], len(lambdas), axis=1)
        params = jax.tree.map(copies, one)
        make = over_runs(lambda lam, p: tx(eta, lam).init(p), (None, 0), (0, 0))
        return params, make(lambdas, params)

    def one_step(state: Any, eta: jax.Array, lam: jax.Array, tokens: jax.Array) -> Any:
        params, opt = state
        loss, gradient = jax.value_and_grad(lambda p: step.loss(forward, p, tokens))(params)
        change, opt = tx(eta, lam).update(gradient, opt, params)
        return (optax.apply_updates(params, change), opt), loss

    def over_runs(
        function: Any, seeded: Sequence[int | None], decayed: Sequence[int | None]
    ) -> Any:
        return jax.vmap(jax.vmap(function, in_axes=tuple(decayed)), in_axes=tuple(seeded))

    steps = over_runs(one_step, (0, None, None, 0), (0, None, 0, None))

    def advance(state: Any, eta: jax.Array, lambdas: jax.Array, tokens: jax.Array) -> Any:
        return jax.lax.scan(lambda s, batch: steps(s, eta, lambdas, batch), state, tokens)

    def end(state: Any, batches: jax.Array) -> Any:
        params, _ = state
        losses = jax.lax.map(lambda batch: step.loss(forward, params, batch), batches)
        values, _ = optax_decay.top_singular_values(
            params, iterations=40, roles=("hidden",), axes=axes
        )
        tops = {path: jnp.exp(jnp.mean(jnp.log(value))) for path, value in values.items()}
        return jnp.mean(losses), tops

    return (
        jax.jit(begin),
        jax.jit(advance, donate_argnums=0),
        jax.jit(over_runs(end, (0, None), (0, None))),
    )
