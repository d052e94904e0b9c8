"""The small trainer of all experiments about many runs: one model, one schedule, one loss, and the trainer's own step.

    rate(t) = η min(1, (t+1)/W, (T−t)/(T−W))      W: warm-up, T: steps of the run

Everything by which the runs of one program differ is in `Numbers`, and may be traced: grid points, seeds and budgets
share a compilation. The loop over steps is inside of the program, in chunks. Runs go one after the other (`compiled`)
or side by side (`population.py`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import gpt, llama
from models.products import platform
from optax_decay.axes import resolve
from train.config.fields import UserError
from train.data import batches
from train.step import families, replicas
from train.step.optimizer import clip
from train.step.update import State, first_state, loss, train_step

WORKER = replicas.AXIS  # the name that the trainer gives it too


@dataclasses.dataclass(frozen=True)
class SmallTask:
    """What all runs of an experiment have in common; the optimizer is the only difference."""

    family: Literal["llama", "gpt"] = "llama"
    """File of models/ that the model comes from."""
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
    """Steps per call of the compiled program."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""

    def model(self, vocab_size: int) -> Any:
        """The Config of the model, with the family's own values for everything else."""
        names = ("width", "mlp_width", "layers", "heads", "init_std", "dtype")
        shape = {name: getattr(self, name) for name in names} | {"vocab_size": vocab_size}
        if self.family == "gpt":
            return fastest(gpt.Config(positions=self.length, **shape))
        return fastest(llama.Config(**shape))

    def read_text(self, text: str) -> batches.TokenBatches:
        """A text as in --data.text of a run.

        Raises:
            UserError: there is none, or it is too short.
        """
        try:
            return batches.load_text(
                text,
                self.tokenizer,
                length=self.length,
                batch_size=self.batch_size,
                seed=0,
                cache=pathlib.Path(".cache/data"),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"There is nothing to train on: {error}.") from None


def fastest(model: Any) -> Any:
    """The model with the attention kernel that is the fastest where it runs: cuDNN's, on GPUs and in bfloat16."""
    fused = model.dtype == "bfloat16" and platform() == "gpu"
    return dataclasses.replace(model, attention="cudnn") if fused else model


class Setting(NamedTuple):
    """The numbers and functions that an optimizer is built from.

    Attributes:
        rate: learning rate by step.
        peak: its largest value.
        weight_decay: λ.
        steps: of the whole run, may be traced.
        axes: of the parameters.
        width: of the model [features].
    """

    rate: Callable[[Any], Any]
    peak: Any
    weight_decay: Any
    steps: Any
    axes: Any
    width: int


Optimizer = Callable[[Setting], optax.GradientTransformation]


class Numbers(NamedTuple):
    """The numbers of one run, which may be traced: η float32, λ float32, steps int32, seed uint32.

    Attributes:
        learning_rate: its peak, η.
        weight_decay: λ.
        steps: of the whole run, whose schedule has this length.
        seed: of the initial weights.
    """

    learning_rate: Any
    weight_decay: Any
    steps: Any
    seed: Any


def numbers(learning_rate: Any, weight_decay: Any, steps: int, seed: Any) -> Numbers:
    """`Numbers` as arrays of their types."""
    types = (jnp.float32, jnp.float32, jnp.int32, jnp.uint32)
    given = (learning_rate, weight_decay, steps, seed)
    return Numbers(*(jnp.asarray(x, kind) for x, kind in zip(given, types)))


def climb_and_fall(peak: Any, steps: Any, warmup: float) -> Callable[[Any], Any]:
    """The schedule above; `warmup` is the share of the steps in which the rate climbs."""
    climb = jnp.maximum(1.0, jnp.round(warmup * steps))

    def rate(count: Any) -> Any:
        rise, fall = (count + 1) / climb, (steps - count) / jnp.maximum(1.0, steps - climb)
        return peak * jnp.minimum(1.0, jnp.minimum(rise, fall))

    return rate


@dataclasses.dataclass(frozen=True)
class SmallProgram:
    """Runs of one model and one optimizer, as pure functions of their `Numbers`.

    Attributes:
        task: of the experiment.
        model: of the runs, a Config of a language model.
        build: the chain behind the clipping.
        workers: simulated workers with gradients of their own, on a mapped axis called `WORKER`.
        curvature: whether the optimizer needs a sampled-label gradient now and then.
        steps: of every run, where all have the same length and it is compiled in; None: `Numbers.steps`.
    """

    task: SmallTask
    model: Any
    build: Optimizer
    workers: int = 1
    curvature: bool = False
    steps: int | None = None

    @functools.cached_property
    def axes(self) -> Any:
        family = families.of(self.model)
        shapes = jax.eval_shape(functools.partial(family.init, self.model), jax.random.key(0))
        return resolve(family.axes(self.model), shapes)

    @property
    def forward(self) -> families.Forward:
        return families.Forward(self.model)

    def optimizer(self, own: Numbers) -> tuple[optax.GradientTransformationExtraArgs, Any]:
        """The whole chain, and its learning rate by step."""
        eta, lam, steps, _ = own if self.steps is None else own._replace(steps=self.steps)
        rate = climb_and_fall(eta, steps, self.task.warmup)
        setting = Setting(rate, eta, lam, steps, self.axes, self.model.width)
        tx = optax.chain(clip(self.task.clip), self.build(setting))
        return optax.with_extra_args_support(tx), rate

    def init(self, own: Numbers) -> State:
        """The state before the first step."""
        make = lambda: first_state(
            families.of(self.model).init(self.model, jax.random.key(own.seed)),
            self.optimizer(own)[0],
        )
        return self._each_worker(make, ())()

    def advance(self, state: State, own: Numbers, tokens: jax.Array) -> tuple[State, jax.Array]:
        """The state after some steps, and their losses; tokens int32 [steps, B, T + 1]."""
        tx, rate = self.optimizer(own)

        def one(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
            state, noted = train_step(self.forward, tx, rate, 1, self.curvature, state, tokens)
            return state, noted["loss"]

        def batch(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
            if self.workers > 1:
                tokens = tokens.reshape(self.workers, -1, tokens.shape[-1])
            state, losses = self._each_worker(one, (0, 0))(state, tokens)
            return state, jnp.mean(losses)

        return jax.lax.scan(batch, state, tokens)

    def params(self, state: State) -> Any:
        """The weights, of the first worker if there are several."""
        params = state["params"]
        return params if self.workers == 1 else jax.tree.map(lambda w: w[0], params)

    def held_out_loss(self, state: State, held_out: jax.Array) -> jax.Array:
        """Mean loss of batches, int32 [N, B, T + 1], in nats per token."""
        params = self.params(state)
        return jnp.mean(jax.lax.map(lambda batch: loss(self.forward, params, batch), held_out))

    def _each_worker(self, function: Any, mapped: tuple[int, ...]) -> Any:
        """`function` on every simulated worker; state and results have a leading axis of workers."""
        if self.workers == 1:
            return function
        return jax.vmap(function, in_axes=mapped, axis_name=WORKER, axis_size=self.workers)


class Compiled(NamedTuple):
    """`SmallProgram.init`, `advance` (which overwrites the state that it is given) and `held_out_loss`."""

    init: Callable[[Numbers], State]
    advance: Callable[[State, Numbers, Any], tuple[State, jax.Array]]
    held_out_loss: Callable[[State, Any], jax.Array]


@functools.lru_cache(maxsize=4)
def compiled(program: SmallProgram) -> Compiled:
    """One run at a time."""
    return Compiled(
        jax.jit(program.init),
        jax.jit(program.advance, donate_argnums=0),
        jax.jit(program.held_out_loss),
    )


def train(
    runs: Compiled, own: Numbers, batches: Callable[[int, int], np.ndarray], steps: int, chunk: int
) -> tuple[State, np.ndarray]:
    """The last state, and the loss of every step.

    Args:
        runs: one run, or some side by side.
        own: their numbers.
        batches: tokens of the steps from one up to another, [steps, B, T + 1], or of some runs [steps, runs, B, T + 1].
        steps: of the whole run.
        chunk: steps per call of the compiled program.
    """
    state, losses = runs.init(own), []
    for start in range(0, steps, chunk):
        tokens = batches(start, min(start + chunk, steps))
        state, some = runs.advance(state, own, jnp.asarray(tokens))
        losses.append(some)
    none = np.zeros((0, *np.shape(own.learning_rate)), np.float32)
    return state, np.concatenate([none, *losses])
