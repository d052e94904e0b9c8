"""Addition modulo 97, learned from half of its table: how many steps until held-out sums come out right?

A transformer reads (a, b) and answers a + b mod 97. Every step sees the whole training half. A seed decides the initial
weights and which half is held out. The learning rate climbs for `WARMUP` steps and then stays.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import llama
from optax_decay.axes import resolve
from train.step.optimizer import clip
from train.step.update import State, first_state
from train.study.population import Member, member_axes, side_by_side_here
from train.study.small_runs import Numbers, Optimizer, Setting, numbers

WARMUP = 10  # steps


@dataclasses.dataclass(frozen=True)
class AdditionTask:
    """The table, the model, and when to look at held-out answers."""

    modulus: int = 97
    """p of a + b mod p."""
    train_share: float = 0.5
    """Share of the table that is trained on."""
    width: int = 64
    """Width of the model [features]."""
    mlp_width: int = 128
    """Width inside the MLP [features]."""
    layers: int = 1
    """Number of layers."""
    heads: int = 4
    """Number of attention heads."""
    init_std: float = 0.1
    """Standard deviation of the matrices at the start."""
    clip: float = 1.0
    """Longest gradient, as a global norm."""
    every: int = 20
    """Steps between two looks at held-out answers."""

    @property
    def model(self) -> llama.Config:
        names = ("width", "mlp_width", "layers", "heads", "init_std")
        shape = {name: getattr(self, name) for name in names}
        return llama.Config(vocab_size=self.modulus, **shape)


class Table(NamedTuple):
    """Pairs int32 [N, 2] and their sums int32 [N]."""

    pairs: Any
    sums: Any


def tables(task: AdditionTask, seed: int) -> tuple[Table, Table]:
    """The training half and the other half."""
    numbers_ = np.arange(task.modulus, dtype=np.int32)
    pairs = np.stack(np.meshgrid(numbers_, numbers_, indexing="ij"), -1).reshape(-1, 2)
    order = np.random.default_rng([97, seed]).permutation(len(pairs))
    cut = round(task.train_share * len(pairs))
    first, second = (
        Table(pairs[part], pairs[part].sum(1) % task.modulus) for part in (order[:cut], order[cut:])
    )
    return first, second


class Found(NamedTuple):
    """What a run came to.

    Attributes:
        member: its numbers.
        steps: until the share of right held-out answers was reached; None if it was not, within the run.
        train_steps: until that share of the training half was right; None if it was not.
        accuracy: share of right held-out answers at the end.
        seconds: of wall time, shared equally by members side by side.
    """

    member: Member
    steps: int | None
    train_steps: int | None
    accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class AdditionProgram:
    """Runs of one optimizer, as pure functions of their `Numbers`."""

    task: AdditionTask
    build: Optimizer
    steps: int

    @functools.cached_property
    def axes(self) -> Any:
        shapes = jax.eval_shape(functools.partial(llama.init, self.task.model), jax.random.key(0))
        return resolve(llama.AXES, shapes)

    def optimizer(self, own: Numbers) -> optax.GradientTransformationExtraArgs:
        peak = own.learning_rate

        def rate(count: Any) -> Any:
            return peak * jnp.minimum(1.0, (count + 1) / WARMUP)

        setting = Setting(rate, peak, own.weight_decay, self.steps, self.axes, self.task.width)
        tx = optax.chain(clip(self.task.clip), self.build(setting))
        return optax.with_extra_args_support(tx)

    def init(self, own: Numbers) -> State:
        params = llama.init(self.task.model, jax.random.key(own.seed))
        return first_state(params, self.optimizer(own))

    def logits(self, params: Any, table: Table) -> jax.Array:
        """[N, p]"""
        return llama.forward(self.task.model, params, table.pairs)[:, -1]

    def advance(self, state: State, own: Numbers, halves: tuple[Table, Table]) -> Any:
        """The state after `task.every` steps, and the shares of right answers on both halves."""
        tx = self.optimizer(own)

        def loss(params: Any) -> jax.Array:
            logits = self.logits(params, halves[0])
            found = optax.softmax_cross_entropy_with_integer_labels(logits, halves[0].sums)
            return jnp.mean(found)

        def one(state: State, _: Any) -> tuple[State, None]:
            value, gradient = jax.value_and_grad(loss)(state["params"])
            change, optimizer = tx.update(
                *(gradient, state["optimizer"], state["params"]), value=value, gradients=gradient
            )
            params = optax.apply_updates(state["params"], change)
            return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, None

        state = jax.lax.scan(one, state, length=self.task.every)[0]
        right = [
            jnp.mean(jnp.argmax(self.logits(state["params"], half), -1) == half.sums)
            for half in halves
        ]
        return state, jnp.stack(right)


@functools.lru_cache(maxsize=4)
def compiled(program: AdditionProgram, together: bool) -> tuple[Any, Any]:
    """`init` and `advance`, of one run or of several side by side."""
    init, advance = program.init, program.advance
    if together:
        axes = member_axes(jax.eval_shape(program.init, numbers(1.0, 0.0, 1, 0)))
        own = Numbers(0, 0, None, 0)
        init = jax.vmap(init, (own,), axes)
        advance = jax.vmap(advance, (axes, own, 0), (axes, 0))
    return jax.jit(init), jax.jit(advance, donate_argnums=0)


def train(
    program: AdditionProgram,
    members: Sequence[Member],
    enough: float,
    together: bool | None = None,
) -> Iterator[Found]:
    """Trains members until all have reached a share of right held-out answers, or for `program.steps`.

    Args:
        program: of all members.
        members: their numbers.
        enough: the share.
        together: whether to train side by side; None: as `side_by_side_here` says.
    """
    if side_by_side_here() if together is None else together:
        yield from _group(program, list(members), enough, True)
        return
    for member in members:
        yield from _group(program, [member], enough, False)


def _group(
    program: AdditionProgram, members: list[Member], enough: float, together: bool
) -> Iterator[Found]:
    began = time.perf_counter()
    init, advance = compiled(program, together)
    rates, decays, seeds = zip(*members)
    halves = [tables(program.task, seed) for seed in seeds]
    if together:
        own = numbers(rates, decays, program.steps, seeds)
        data = jax.tree.map(lambda *x: np.stack(x), *halves)
    else:
        own = numbers(rates[0], decays[0], program.steps, seeds[0])
        data = halves[0]
    data = jax.device_put(data)
    state, looks = init(own), []
    for _ in range(0, program.steps, program.task.every):
        state, right = advance(state, own, data)
        looks.append(np.asarray(right).reshape(len(members), 2))
        if all(max(look[i, 1] for look in looks) >= enough for i in range(len(members))):
            break
    shares = np.stack(looks, axis=1)  # [members, looks, 2]
    each = (time.perf_counter() - began) / len(members)
    for member, mine in zip(members, shares):
        train_steps, steps = (_first(mine[:, k] >= enough, program.task.every) for k in (0, 1))
        yield Found(member, steps, train_steps, float(mine[-1, 1]), each)


def _first(reached: np.ndarray, every: int) -> int | None:
    return int(np.argmax(reached) + 1) * every if reached.any() else None
