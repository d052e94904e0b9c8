"""The runs of a sweep at one width and learning rate: a population of all its decays and seeds."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import optax_decay
from train.config.fields import UserError
from train.data.batches import TokenBatches
from train.study.population import Member, population
from train.study.small_runs import (
    Optimizer,
    Setting,
    SmallProgram,
    SmallTask,
)

# standard: one learning rate for all parameters, and the model as it is at any width.
# mup: learning rates of matrices ∝ 1/width, and the model with `base_width`.
Parametrisation = Literal["standard", "mup"]


def proxy(width: int = 32, head_width: int = 16, **changes: Any) -> SmallTask:
    """The task of a sweep at its narrowest width; wider models have more heads of the same width."""
    heads = max(1, width // head_width)
    task = SmallTask(width=width, mlp_width=3 * width, heads=heads, chunk=20)
    return dataclasses.replace(task, **changes)


def head_width(task: SmallTask) -> int:
    """Of attention heads at all widths [features]; every width is a multiple of it."""
    return task.width // task.heads


def check_widths(task: SmallTask, widths: Sequence[int]) -> None:
    """Raises UserError for a proxy that does not work out, or a width that its heads do not divide."""
    try:
        task.model(1)
    except ValueError as error:
        raise UserError(f"The task of the proxy does not work out: {error}.") from None
    unit = head_width(task)
    for width in widths:
        if width < unit or width % unit:
            raise UserError(
                f"width {width} is not a multiple of the width of a head, {unit};"
                f" nearest: {max(1, round(width / unit)) * unit}."
            )


def model(task: SmallTask, width: int, vocab_size: int, parametrisation: str) -> Any:
    """The network of a sweep at one width, for the proxy's task."""
    return dataclasses.replace(
        task.model(vocab_size),
        width=width,
        mlp_width=task.mlp_width * width // task.width,
        heads=width // head_width(task),
        base_width=task.width if parametrisation == "mup" else None,
    )


def adamw(s: Setting) -> optax.GradientTransformation:
    """AdamW with one learning rate for all parameters."""
    decay = optax_decay.decay(s.weight_decay, mask=("hidden", "head"), axes=s.axes)
    return optax.chain(optax.scale_by_adam(b2=0.95), decay, optax.scale_by_learning_rate(s.rate))


@functools.cache
def mup_adamw(base_width: int) -> Optimizer:
    """AdamW under μP, for the learning rate of the proxy and the decay of the matrices at the model's own width."""
    return lambda s: optax_decay.mup_adamw(
        s.rate,
        base_width,
        b2=0.95,
        weight_decay=s.weight_decay,
        law=optax_decay.width.law("constant"),
        axes=s.axes,
    )


def program(
    task: SmallTask, steps: int, parametrisation: str, width: int, vocab_size: int
) -> SmallProgram:
    """The runs of so many steps at one width under one parametrisation."""
    build = mup_adamw(task.width) if parametrisation == "mup" else adamw
    network = model(task, width, vocab_size, parametrisation)
    return SmallProgram(task, network, build, steps=steps)


def run_group(
    task: SmallTask,
    steps: int,
    data: TokenBatches,
    parametrisation: str,
    width: int,
    learning_rate: float,
    weight_decays: Sequence[float],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Trains all decays × seeds at one width and learning rate, as one population.

    Args:
        task: of the proxy.
        steps: updates of each run.
        data: text for the task; a run's seed orders it.
        parametrisation: "standard" or "mup".
        width: of the models [features].
        learning_rate: η at the peak; under μP, that of the proxy.
        weight_decays: λ of the matrices at this width, whatever a rule calls it at the proxy.
        seeds: of the initial weights and the order of the text.

    Returns:
        One record per seed and decay: what it was, the loss on held-out text in nats per token
        (infinite if it is not a number), that of the last fifth of the training, and the largest
        singular value of every hidden matrix (geometric mean over layers).
    """
    small = program(task, steps, parametrisation, width, data.vocab_size)
    members = [Member(learning_rate, decay, seed) for seed in seeds for decay in weight_decays]
    last = -max(1, steps // 5)
    return [
        {
            "parametrisation": parametrisation,
            "width": width,
            **found.member._asdict(),
            "loss": found.loss,
            "training_loss": float(found.losses[last:].mean()),
            "top": {path: float(value) for path, value in found.seen.items()},
        }
        for found in population(small, members, data, steps, look=_largest_singular_values(small))
    ]


@functools.lru_cache(maxsize=4)
def _largest_singular_values(small: SmallProgram) -> Callable[[Any], dict[str, jax.Array]]:
    """Of the hidden matrices of one run, by path: the geometric mean over layers."""

    def of_one(state: Any) -> dict[str, jax.Array]:
        values, _ = optax_decay.spectra.top_singular_values(
            small.params(state), iterations=40, roles=("hidden",), axes=small.axes
        )
        return {path: jnp.exp(jnp.mean(jnp.log(value))) for path, value in values.items()}

    return of_one
