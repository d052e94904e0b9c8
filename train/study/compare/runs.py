"""One training run of a comparison: a jitted function of seed, learning rate, decay and number of steps.

Every arm is one compiled program, whatever the grid point, the seed or the budget: those are traced numbers. The loop
over steps is inside of it, in chunks. The step is `step.update`, the trainer's own.

Runs go one after another. On one CPU core a step of 134k weights and 512 tokens takes 7.1 ms of CPU time this way,
7.5 as one of four runs in `jax.lax.map`, 8.7 in a Python loop over jitted steps, and 9.0 as one of four in `jax.vmap`,
which besides would compute both branches of every `cond`: new bases and spectra at each step.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import llama
from train.data import batches as data_lib
from train.step import optimizer
from train.step import update as step
from train.study.compare.arms import ARMS, Setting

ROUNDS = 5  # of timing


@dataclasses.dataclass(frozen=True)
class Task:
    """What all runs of a comparison have in common; the optimizer is the only difference."""

    width: int = 64
    """Width of the model [features]."""
    mlp_width: int = 176
    """Width inside the MLP [features]."""
    layers: int = 2
    """Number of layers."""
    heads: int = 4
    """Number of attention heads."""
    init_std: float = 0.1
    """Standard deviation of the matrices at the start."""
    tokenizer: str = "bytes"
    """bytes, or bpe-N."""
    length: int = 64
    """Length of a sequence [tokens]."""
    batch_size: int = 8
    """Sequences per step."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate climbs; from there it falls to 0 in a line."""
    clip: float = 1.0
    """Longest gradient, as a global norm."""
    eval_batches: int = 32
    """Held-out batches for the loss at the end."""
    chunk: int = 50
    """Steps per call of the compiled program; every budget is a multiple of it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""


def model(task: Task, vocab_size: int) -> llama.Config:
    names = ("width", "mlp_width", "layers", "heads", "init_std", "dtype")
    return llama.Config(vocab_size=vocab_size, **{name: getattr(task, name) for name in names})


def run(
    task: Task,
    data: data_lib.TokenBatches,
    arm: str,
    *,
    learning_rate: float,
    weight_decay: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Trains once.

    Args:
        data: text for the task; the run's seed orders it.
        steps: of the whole run, with a schedule of that length; a multiple of `task.chunk`.
        seed: of the initial weights and the order of the text.

    Returns:
        The loss on held-out text in nats per token (infinite if it is not a number), the mean training loss of every
        tenth of a chunk, and the seconds it took (compiling included, where the arm has not run before).
    """
    init, advance, finish = program(task, arm, data.vocab_size)
    began = time.perf_counter()
    numbers = tuple(jnp.asarray(x, jnp.float32) for x in (learning_rate, weight_decay))
    numbers += (jnp.asarray(steps, jnp.int32),)
    state = init(jnp.asarray(seed, jnp.uint32), *numbers)
    source = dataclasses.replace(data, seed=seed)
    losses = []
    for start in range(0, steps, task.chunk):
        tokens = np.stack([source.batch(i) for i in range(start, start + task.chunk)])
        state, loss = advance(state, *numbers, jnp.asarray(tokens))
        losses.append(loss)
    held_out = np.stack(data.held_out(task.eval_batches))
    final = float(finish(state, jnp.asarray(held_out)))
    each = math.gcd(task.chunk, max(1, task.chunk // 10))
    curve = np.concatenate(losses).reshape(-1, each).mean(axis=1)
    return {
        "loss": final if math.isfinite(final) else math.inf,
        "curve": [round(float(x), 4) if math.isfinite(x) else math.inf for x in curve],
        "seconds": round(time.perf_counter() - began, 3),
    }


def cost(
    task: Task, data: data_lib.TokenBatches, arm: str, point: tuple[float, float]
) -> dict[str, Any]:
    """Seconds of a step of an arm and of AdamW, in turns: of the CPU if that is the device.

    Returns:
        The best of several rounds of each, and the ratio of every round, which says how far to trust that of the best.
    """
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    tokens = jnp.asarray(np.stack([data.batch(i) for i in range(task.chunk)]))
    steps = jnp.asarray(task.chunk, jnp.int32)
    taken: dict[str, list[float]] = {arm: [], "adamw": []}
    for _ in range(ROUNDS + 1):
        for name, seconds in taken.items():
            numbers = (*(jnp.asarray(x, jnp.float32) for x in point), steps)
            init, advance, _ = program(task, name, data.vocab_size)
            state = jax.block_until_ready(init(jnp.asarray(0, jnp.uint32), *numbers))
            began = clock()
            jax.block_until_ready(advance(state, *numbers, tokens))
            seconds.append((clock() - began) / task.chunk)
    ours, adamw = (seconds[1:] for seconds in taken.values())  # the first compiles
    return {
        "seconds_per_step": min(ours),
        "adamw_seconds_per_step": min(adamw),
        "ratios": [round(a / b, 4) for a, b in zip(ours, adamw)],
        "clock": "CPU" if on_cpu else "wall",
    }


def program(task: Task, arm: str, vocab_size: int) -> Any:
    """(init, advance, finish) of an arm's runs."""
    return compiled(task, ARMS[arm].build, ARMS[arm].workers, vocab_size)


@functools.lru_cache(maxsize=4)
def compiled(
    task: Task,
    build: Callable[[Setting], optax.GradientTransformation],
    workers: int,
    vocab_size: int,
) -> Any:
    """(init, advance, finish) of the runs of arms with the same chain."""
    config = model(task, vocab_size)
    axes = llama.axes(config)
    forward = functools.partial(llama.forward, config)

    def chain(eta: jax.Array, lam: jax.Array, steps: jax.Array) -> Any:
        climb = jnp.maximum(1.0, jnp.round(task.warmup * steps))

        def rate(count: Any) -> Any:
            rise, fall = (count + 1) / climb, (steps - count) / jnp.maximum(1.0, steps - climb)
            return eta * jnp.minimum(1.0, jnp.minimum(rise, fall))

        setting = Setting(rate, eta, lam, steps, axes, task.width)
        tx = optax.chain(optimizer.clip(task.clip), build(setting))
        return optax.with_extra_args_support(tx), rate

    def each_worker(function: Any, mapped: tuple[int, ...]) -> Any:
        """`function` on every simulated worker; state and results have a leading axis of workers."""
        if workers == 1:
            return function
        return jax.vmap(function, in_axes=mapped, axis_name="worker", axis_size=workers)

    def init(seed: jax.Array, *numbers: jax.Array) -> Any:
        params = functools.partial(llama.init, config)
        key = jax.random.key(seed)
        begin = lambda: step.init(params, chain(*numbers)[0], key)
        return each_worker(begin, ())()

    def advance(state: Any, *numbers_and_tokens: jax.Array) -> Any:
        *numbers, tokens = numbers_and_tokens
        tx, rate = chain(*numbers)

        def one(state: Any, tokens: jax.Array) -> Any:
            state, noted = step.update(forward, tx, rate, 1, state, tokens)
            return state, noted["loss"]

        def batch(state: Any, tokens: jax.Array) -> Any:
            rows = tokens if workers == 1 else tokens.reshape(workers, -1, tokens.shape[-1])
            state, losses = each_worker(one, (0, 0))(state, rows)
            return state, jnp.mean(losses)

        return jax.lax.scan(batch, state, tokens)

    def finish(state: Any, batches: jax.Array) -> jax.Array:
        first = (lambda w: w) if workers == 1 else (lambda w: w[0])
        params = jax.tree.map(first, state["params"])
        return jnp.mean(jax.lax.map(lambda batch: step.loss(forward, params, batch), batches))

    return jax.jit(init), jax.jit(advance, donate_argnums=0), jax.jit(finish)
