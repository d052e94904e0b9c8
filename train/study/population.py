"""A population: many runs of one small program that differ in learning rate, decay and seed.

The members of a population share a model, an optimizer, a text and a length. A member's seed decides its initial
weights and its order of the text, so members of one seed see the same text in the same order from the same start,
whatever their optimizer is: differences between points are taken seed by seed.

On an accelerator all members train side by side as one compiled program: `jax.vmap` of the trainer's own step, with
the axis of members split over the devices. Members exchange nothing, so a member that diverges harms no other one. On
CPUs members train one after the other, because a step of several members costs more there than their steps one by one.
`side_by_side_here` is the one place that decides between the two.

Every member is at the same step. Counters of completed steps therefore have no axis of members, and a `jax.lax.cond`
on such a counter stays a condition: bases and spectra are computed when they are due, not in every step. A counter is
recognised by its name, `count` or `step`. A counter that depends on data, such as `SpectralAlphaState.measured`, has
the axis of members.
"""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

import optax_decay
from train.data.batches import TokenBatches
from train.study.results import append
from train.study.small_runs import Compiled, Numbers, SmallProgram, compiled, numbers, train

AXIS = "member"
COUNTERS = frozenset({"count", "step"})
SPARE = 0.9  # share of a device's free memory that a population may take
Look = Callable[[Any], Any]


class Member(NamedTuple):
    """The numbers of one run: peak learning rate, decay coefficient, and seed of weights and text."""

    learning_rate: float
    weight_decay: float
    seed: int


class Outcome(NamedTuple):
    """What one run came to.

    Attributes:
        member: its numbers.
        loss: on held-out text, in nats per token; infinite if the run diverged.
        losses: of every training step, float32 [steps].
        seen: result of `look` on the final state; None without it.
        seconds: of wall time, with compilation where the program was new; shared equally by members side by side.
        more: whether other members ended together with this one, and are yielded right after it.
    """

    member: Member
    loss: float
    losses: np.ndarray
    seen: Any
    seconds: float
    more: bool = False

    def record(self) -> dict[str, Any]:
        """A line of results."""
        return {**self.member._asdict(), "loss": self.loss, "seconds": round(self.seconds, 3)}


def side_by_side_here() -> bool:
    """Whether members train side by side: on accelerators they do, on CPUs they do not."""
    return jax.default_backend() != "cpu"


def population(
    program: SmallProgram,
    members: Sequence[Member],
    data: TokenBatches,
    steps: int,
    *,
    together: bool | None = None,
    devices: Sequence[jax.Device] | None = None,
    memory: int | None = None,
    places: int = 1,
    look: Look | None = None,
) -> Iterator[Outcome]:
    """Trains all members, and yields each when it is done.

    Args:
        program: task, model and optimizer of all members.
        members: their numbers.
        data: text for the task, read in an order of its own by each seed.
        steps: length of every run and of its schedule.
        together: whether to train side by side; None: as `side_by_side_here` says. Runs with simulated workers train
            one after the other in any case.
        devices: to split the members over; None: all of this process.
        memory: bytes that the program may take per device; None: most of what is free.
        places: members that a program side by side is compiled for at least. Calls with different numbers of members
            then share one program: places that are left over repeat the last member.
        look: function of the final state of one run, whose result is kept. Pass the same function in every call.
    """
    if together is None:
        together = side_by_side_here()
    if not together or program.workers > 1:
        yield from _one_by_one(program, members, data, steps, look)
        return
    chosen = tuple(jax.local_devices() if devices is None else devices)
    wanted = max(places, len(members))
    size = planned(program, wanted, data, steps, chosen, memory)
    for first in range(0, len(members), size):
        group = list(members[first : first + size])
        yield from _group(program, group, size, data, steps, chosen, look)


def recorded(
    path: pathlib.Path,
    stored: Iterable[Mapping[str, Any]],
    members: Sequence[Member],
    run: Callable[[Sequence[Member]], Iterator[Outcome]],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """The results of all members: first those that are stored, then the others, each written to a file when done.

    Args:
        path: of the lines of results (`results.py`).
        stored: lines that are in the file already.
        members: that are wanted.
        run: trains members that are missing.
        stop: whether to end before the next members are trained.
    """
    known = {Member(*(line[name] for name in Member._fields)): dict(line) for line in stored}
    yield from (known[member] for member in members if member in known)
    for outcome in run([member for member in members if member not in known]):
        append(path, [outcome.record()])
        yield outcome.record()
        if not outcome.more and stop():
            return


def member_axes(state: Any) -> Any:
    """A tree like the state of one run: None for counters that all members share, 0 for leaves with an axis of members.

    Steps that `skip_on_spike` leaves out differ between members, so nothing inside its state is shared.
    """
    return _by_sharing(state, None, 0)


def _by_sharing(state: Any, shared: Any, own: Any) -> Any:
    def skips(node: Any) -> bool:
        return isinstance(node, optax_decay.states.SkipOnSpikeState)

    def of(path: Any, x: Any) -> Any:
        if skips(x):
            return jax.tree.map(lambda _: own, x)
        name = getattr(path[-1], "name", getattr(path[-1], "key", None)) if path else None
        return shared if name in COUNTERS and x.shape == () else own

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=skips)


@functools.lru_cache(maxsize=4)
def side_by_side(program: SmallProgram, devices: tuple[jax.Device, ...]) -> Compiled:
    """Several runs as one program, split over devices.

    Args:
        program: of one run, without simulated workers.
        devices: their number divides the number of members.

    Returns:
        Functions of `Numbers` (learning rates, decays and seeds [members], steps []), states [members, ...], tokens
        [steps, members, B, T + 1] and losses [steps, members].

    Raises:
        ValueError: simulated workers.
    """
    if program.workers > 1:
        raise ValueError("runs side by side have no simulated workers: train them one at a time.")
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    first, second = P(AXIS), P(None, AXIS)
    state = jax.eval_shape(program.init, _described())
    states, own = member_axes(state), Numbers(0, 0, None, 0)
    split, numbers_split = _by_sharing(state, P(), first), Numbers(first, first, P(), first)

    def over(function: Any, axes: Any, out: Any, specs: Any, out_specs: Any) -> Any:
        mapped = jax.vmap(function, axes, out)
        if len(devices) == 1:
            return mapped
        # Members exchange nothing, so there is nothing to check about which values devices agree on.
        return jax.shard_map(
            mapped, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )

    init = over(program.init, (own,), states, (numbers_split,), split)
    advance = over(
        *(program.advance, (states, own, 1), (states, 1)),
        *((split, numbers_split, second), (split, second)),
    )
    held_out_loss = over(program.held_out_loss, (states, None), 0, (split, P()), first)
    # The states decide where the other two run.
    return Compiled(
        jax.jit(init, out_shardings=_placed(split, mesh)),
        jax.jit(advance, donate_argnums=0),
        jax.jit(held_out_loss),
    )


def _described(*sides: int) -> Numbers:
    """Shapes of the numbers of one run, or of so many members."""
    return jax.eval_shape(lambda: numbers(jnp.ones(sides), jnp.ones(sides), 1, jnp.ones(sides)))


def _placed(specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings over the devices, in a tree like the partition specs."""
    if mesh.size == 1:
        return jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)


def planned(
    program: SmallProgram,
    members: int,
    data: TokenBatches,
    steps: int,
    devices: tuple[jax.Device, ...],
    memory: int | None = None,
) -> int:
    """The number of members that train at once: in as few rounds of one size as the compiled program says fit.

    The last program that is compiled here is the one that trains. There are few of them: where all members do not fit,
    the figure of that program says how many rounds are needed.

    Args:
        program, data, steps, devices, memory: as for `population`.
        members: that are wanted.

    Returns:
        A multiple of the number of devices; at least one member per device, whether it fits or not.
    """
    limit = free_memory(devices[0]) if memory is None else memory
    rounds = 1
    while True:
        size = _multiple(math.ceil(members / rounds), len(devices))
        if size == len(devices):
            return size
        need = bytes_needed(program, size, data, steps, devices)
        if need <= limit:
            return size
        rounds = max(rounds + 1, math.ceil(rounds * need / max(1, limit)))


def bytes_needed(
    program: SmallProgram,
    members: int,
    data: TokenBatches,
    steps: int,
    devices: tuple[jax.Device, ...],
) -> int:
    """Bytes per device that the compiled program of so many members takes: states, tokens and workspace.

    Where a kernel of cuDNN says that it needs workspace, it is part of the program's own.
    """
    lowered = advance_program(program, members, data.shape, steps, devices)
    memory: Any = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def advance_program(
    program: SmallProgram,
    members: int,
    shape: tuple[int, int],
    steps: int,
    devices: tuple[jax.Device, ...],
) -> Any:
    """The lowered program that trains so many members for a chunk of steps; the devices need not be there.

    Args:
        program, members, steps, devices: as for `planned`.
        shape: of the tokens of one member in one step, [B, T + 1].
    """
    runs = side_by_side(program, devices)
    own = _described(members)
    chunk = min(steps, program.task.chunk)
    tokens = jax.ShapeDtypeStruct((chunk, members, *shape), jnp.int32)
    state = jax.eval_shape(runs.init, own)
    return runs.advance.lower(state, own, tokens)  # type: ignore[attr-defined]


def free_memory(device: jax.Device) -> int:
    """Bytes that a population may take on one device; on CPUs half of the machine's memory, over all devices."""
    known = device.memory_stats() if device.platform != "cpu" else None
    if known and "bytes_limit" in known:
        return int(SPARE * (known["bytes_limit"] - known.get("bytes_in_use", 0)))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // 2 // jax.local_device_count()


def _one_by_one(
    program: SmallProgram,
    members: Sequence[Member],
    data: TokenBatches,
    steps: int,
    look: Look | None,
) -> Iterator[Outcome]:
    runs = compiled(program)
    for member in members:
        began = time.perf_counter()
        own = numbers(member.learning_rate, member.weight_decay, steps, member.seed)
        source = dataclasses.replace(data, seed=member.seed)
        state, losses = train(runs, own, source.batches, steps, program.task.chunk)
        held_out = np.stack(data.held_out(program.task.eval_batches))
        final = float(runs.held_out_loss(state, jnp.asarray(held_out)))
        seen = jax.device_get(jax.jit(look)(state)) if look else None
        yield Outcome(member, _loss(final), losses, seen, time.perf_counter() - began)


def _group(
    program: SmallProgram,
    members: list[Member],
    size: int,
    data: TokenBatches,
    steps: int,
    devices: tuple[jax.Device, ...],
    look: Look | None,
) -> Iterator[Outcome]:
    """Members side by side; places that are left over repeat the last one."""
    began = time.perf_counter()
    places = members + [members[-1]] * (size - len(members))
    rates, decays, seeds = zip(*places)
    own, runs = numbers(rates, decays, steps, seeds), side_by_side(program, devices)
    sources = {seed: dataclasses.replace(data, seed=seed) for seed in seeds}

    def tokens(start: int, stop: int) -> np.ndarray:
        rows = {seed: source.batches(start, stop) for seed, source in sources.items()}
        return np.stack([rows[seed] for seed in seeds], axis=1)

    state, losses = train(runs, own, tokens, steps, program.task.chunk)
    held_out = np.stack(data.held_out(program.task.eval_batches))
    final = np.asarray(runs.held_out_loss(state, jnp.asarray(held_out)))
    axes = member_axes(jax.eval_shape(program.init, _described()))
    seen = jax.device_get(jax.jit(jax.vmap(look, (axes,)))(state)) if look else None
    each = (time.perf_counter() - began) / len(members)
    for i, member in enumerate(members):
        mine = jax.tree.map(lambda x, i=i: x[i], seen)
        more = i + 1 < len(members)
        yield Outcome(member, _loss(float(final[i])), losses[:, i], mine, each, more)


def _loss(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
