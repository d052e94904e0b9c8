"""The training program: config → mesh → model → optimizer → step → loop → checkpoint.

Read it from `train` downwards; every other file of this folder is one link of that chain.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from optax_decay.parameters.axes import signatures
from train import processes
from train.cli import parse
from train.config.fields import Config, UserError, model_config, resolved
from train.data.loading import read_data as read_data
from train.display import say
from train.run import checkpoints as checkpoint
from train.run import figures, log, watchdog
from train.run.folder import ROOT, Folder, environment, write
from train.run.signals import signals
from train.step import families, observe, optimizer, replicas, sharding, tasks
from train.step import update as step
from train.weights import hugging_face


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code. What the user can put right is a UserError."""
    return train(parse(processes.join(arguments)))


def train(asked: Config) -> int:
    """Trains as the config says, going on with what its run folder already holds."""
    config = resolved(asked)
    data = read_data(config)
    program = assemble(config, data)
    with (
        signals() as stop,
        Folder(asked) as folder,
        checkpoint.Checkpoints(
            folder.path / "checkpoints", config.run.keep, config.run.keep_every
        ) as checkpoints,
    ):
        meta = checkpoint.describe(folder.config, data.digest, program.shapes)
        fresh = program.fresh if config.run.migrate else None
        state, start = checkpoints.restore(program.placed_shapes(), meta, say, fresh) or (None, 0)
        introduce(program, folder, start)
        if start >= config.run.steps:
            say(f"This run is complete: step {start} of {config.run.steps}.")
            say(further(config, folder.path, start))
            return 0
        if state is None:
            state = program.begin()
        with (
            recorder(program, folder, start) as records,
            watchdog.Watchdog(folder.path / "stuck.txt") as watch,
        ):
            save = functools.partial(checkpoints.save, meta=meta, say=say)
            done = loop(program, state, start, records, save, stop, watch)
            finish(checkpoints, folder.path)
        conclude(program, folder.path, done)
    return 128 + stop[0] if stop else 0


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that is decided before the first step; nothing of it changes afterwards."""

    config: Config  # resolved
    task: tasks.Task  # with its data
    facts: dict[str, Any]  # about the data
    mesh: jax.sharding.Mesh
    model: Any  # Config of a file of models/
    axes: Any  # what the parameters' axes mean
    shapes: step.State  # the state as ShapeDtypeStruct
    shardings: step.State
    weights: Callable[[jax.Array], Any]  # fresh ones
    start: Callable[[Any], step.State]  # weights to the state before the first step
    fresh: Callable[[Any], Any]  # weights to the state of an optimizer that has not moved them yet
    update: Callable[[step.State, Any], tuple[step.State, dict[str, jax.Array]]]
    # Scores on held-out data; None if a signal has arrived.
    evaluate: Callable[[step.State, Sequence[int]], dict[str, float] | None]
    look: Callable[[step.State, Any], dict[str, dict[str, float]]]  # observe.py
    gains: Callable[[Any], dict[str, Any]]  # observe.py; of weights; empty without model.base_width

    def begin(self) -> step.State:
        """The state before the first step: of fresh weights, or of those of `model.weights`."""
        if self.config.model.weights is None:
            return self.init(jax.random.key(self.config.run.seed))
        folder = pathlib.Path(self.config.model.weights)
        say(f"reading the weights in {folder} ...")
        return self.start(
            hugging_face.load_pretrained(folder, self.model, self.shardings["params"])
        )

    def init(self, key: jax.Array) -> step.State:
        """In two programs: models of one shape share that of their weights, whatever trains them."""
        return self.start(self.weights(key))

    def batch(self, index: int) -> Any:
        """What step `index` learns from, on the devices: an array or a dict of arrays."""
        data = self.task.data
        return sharding.put_batch(lambda rows: data.batch(index, rows), data.shape, self.mesh)

    def placed_shapes(self) -> step.State:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.shapes,
            self.shardings,
        )


def assemble(config: Config, data: Any) -> Program:
    """Mesh, model, optimizer and compiled functions of a resolved config. Allocates no weights."""
    mesh = sharding.make_mesh(config.mesh, config.data.batch_size // config.run.micro_batches)
    task = tasks.of(config)(config, data)
    model = model_config(config, task.outputs)
    family = families.of(model)
    axes = family.axes(model)
    weights = functools.partial(family.init, model)
    placed = sharding.of_parameters(axes, jax.eval_shape(weights, jax.random.key(0)), mesh)
    tx = optimizer.build(config, axes, params=placed)

    init = functools.partial(task.init, weights, tx)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.of_train_state(axes, shapes, mesh)

    forward = families.Forward(model, sharding.Activations(mesh))
    rate, parts = optimizer.schedule(config.optimizer), config.run.micro_batches
    each = replicas.used(config)
    whole = jax.NamedSharding(mesh, jax.P())  # every process reads the numbers
    update = task.compile_update(forward, tx, rate, parts, shardings, each)
    sums = jax.jit(functools.partial(task.sums, forward), out_shardings=whole)

    described = signatures(axes, shapes["params"])
    sizes = jax.jit(functools.partial(observe.weights, described), out_shardings=whole)
    gradient = functools.partial(task.gradient, forward, parts)
    observed = optimizer.chain(config, axes, metrics=True, params=placed)
    tried = functools.partial(observe.try_decay, gradient, observed)
    tried = replicas.on_each(tried, shardings, None) if each else sharding.on_mesh(tried, mesh)
    try_decay = jax.jit(tried, out_shardings=whole)

    def evaluate(state: step.State, stop: Sequence[int] = ()) -> dict[str, float] | None:
        found = []
        for batch in data.held_out(config.run.eval_batches):
            if stop:
                return None
            found.append(sums(state, sharding.put_whole(batch, mesh)))
        return task.scores(np.asarray(jax.device_get(found), np.float64).sum(0))

    def look(state: step.State, batch: Any) -> dict[str, dict[str, float]]:
        seen = jax.device_get((try_decay(state, batch), sizes(state["params"])))
        return observe.merge(observe.decay(described, seen[0]), seen[1])

    return Program(
        *(config, task, data.summary(), mesh, model, axes, shapes, shardings),
        weights=jax.jit(weights, out_shardings=shardings["params"]),
        start=jax.jit(
            lambda params: task.init(lambda key: params, tx, jax.random.key(0)),
            out_shardings=shardings,
        ),
        fresh=jax.jit(tx.init, out_shardings=shardings["optimizer"]),
        update=update,
        evaluate=evaluate,
        look=look,
        gains=(
            observe.gain_meter(axes, shapes["params"], mesh)
            if config.model.base_width
            else lambda params: {}
        ),
    )


def loop(
    program: Program,
    state: step.State,
    start: int,
    records: log.Recorder,
    save: Callable[..., None],
    stop: Sequence[int],
    watch: watchdog.Watchdog,
) -> int:
    """Trains from step `start` to the end or to a signal, and returns the number of steps done.

    While the device works on a step, the host makes the next batch and reads the numbers of the
    step before. An evaluation that a signal cuts off is made up for when the run goes on.
    """
    run, done, agreement = program.config.run, start, processes.Agreement()
    due = stopped = False  # a checkpoint; by a signal

    def evaluate() -> None:
        with records.pause():
            watch.other(f"the evaluation after step {done}")
            # Several processes must all go through with it, and know of each other's signals after steps alone.
            through = done == run.steps or jax.process_count() > 1
            scores = program.evaluate(state, () if through else stop)
            if scores is None:
                return
            records.held_out(done, scores, program.task.say_scores(scores))
            records.weights(done, program.look(state, batch))
            records.spectrum(done, observe.spectrum(state["optimizer"].inner_state["decay"]))
            records.gains(done, program.gains(state["params"]))

    def keep() -> bool:
        """Saves, but for weights that give no numbers: those of the checkpoints before may be healthier."""
        with records.pause():
            watch.other(f"saving after step {done}")
            if healthy := stopped or not records.skipping:
                save(state, step=done)
        return healthy

    batch = program.batch(start)
    # Only the first process knows what has been written.
    if start % run.eval_every == 0 and not processes.from_first(
        lambda: "done" if records.evaluated(start) else ""
    ):
        evaluate()
    while done < run.steps and not (stopped := agreement.ask(bool(stop))):
        watch.step(done + 1, records.seconds_per_step)
        state, noted = program.update(state, batch)
        done += 1
        batch = program.batch(done)
        records.train(done, noted)
        if done % run.eval_every == 0 or done == run.steps:
            evaluate()
        due = due or done % run.save_every == 0
        if due:
            due = not keep()
    keep()
    return done


def finish(checkpoints: checkpoint.Checkpoints, folder: pathlib.Path) -> None:
    """Waits for the last checkpoint to be on disk."""
    try:
        checkpoints.wait()
    except OSError as error:
        kept = max(checkpoints.steps, default=None)
        safe = "nothing is saved" if kept is None else f"step {kept} is the last that is safe"
        raise UserError(f"{error}; {safe}. Make room, and go on with --resume {folder}.") from None


def recorder(program: Program, folder: Folder, start: int) -> log.Recorder:
    """Where the numbers of the run go, from step `start` on."""
    run, task, first = program.config.run, program.task, processes.first()
    return log.Recorder(
        folder.path / "metrics.jsonl" if first else None,
        start,
        run.steps,
        task.per_step,
        run.log_every,
        (
            log.tensorboard(run.tensorboard, folder.path, start),
            log.weights_and_biases(run.wandb, folder.path, dataclasses.asdict(folder.config)),
        )
        if first
        else (),
        run.max_skipped,
        task.unit,
    )


def introduce(program: Program, folder: Folder, start: int) -> None:
    """Says and writes down what is about to be trained, on what, and what decays."""
    if not processes.first():
        return
    config, facts, mesh, task = program.config, program.facts, program.mesh, program.task
    folder.add_start(environment(start=start, mesh=dict(mesh.shape), **{task.noun: facts}))
    tokens = task.per_step if task.unit == "tokens" else None
    table = optimizer.decay_table(config, program.shapes["params"], program.axes, tokens)
    write(folder.path / "decay.txt", f"{table}\n")
    grid = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(
        f"{task.noun:9} {task.introduction(facts)}, digest {task.data.digest[:16]}\n"
        f"model     {config.model.preset}: {families.of(program.model).count(program.model) / 1e6:.2f}M weights,"
        f" {program.model.layers} layers of width {program.model.width}\n"
        f"training  {config.run.steps} steps of {task.per_step} {task.unit},"
        f" {config.run.steps / facts['steps_per_epoch']:.2f} times through the {task.noun}\n"
        f"devices   {mesh.size} of {len(jax.devices())} {mesh.devices.flat[0].device_kind} ({grid})"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + "\n"
        f"folder    {folder.path}" + (f", continued after step {start}" if start else "")
    )
    if replicas.used(config) and mesh.shape[replicas.AXIS] == 1:
        say(
            "network   one replica: nothing is compressed; for 1-bit Adam's workers set --mesh.replica"
        )
    say(f"\n{table}\n")


def conclude(program: Program, folder: pathlib.Path, done: int) -> None:
    """Draws the pictures and says what was reached, where it is, and how to go on."""
    if not processes.first():
        return
    records = log.read_records(folder / "metrics.jsonl")
    task, baseline = program.task, program.task.baseline(program.facts)
    name, metric = title(program.config), program.config.decay.spectral
    pictures = figures.draw(records, baseline, name, folder / "figures", metric, task.words)
    if done < program.config.run.steps:
        say(f"\nstopped after step {done} of {program.config.run.steps}; everything is saved")
    for last in [record for record in records if record["kind"] == "held_out"][-1:]:
        say(
            f"\n{task.words.held_out} after step {last['step']}: loss {last['loss']:.3f} {task.words.loss},"
            f" {task.say_scores(last)}\n"
            f"({task.words.baseline}: {baseline:.3f} {task.words.loss})"
        )
    say(
        f"metrics   {folder / 'metrics.jsonl'}\n"
        f"pictures  {'  '.join(str(path) for path in pictures)}"
    )
    say(further(program.config, folder, done))


def title(config: Config) -> str:
    """What a run was, in one line."""
    optimizer, decay = config.optimizer, config.decay
    return (
        f"{config.run.name}: {config.model.preset}, {optimizer.name} at {optimizer.learning_rate:g}"
        f" with {decay.pull} decay {decay.weight_decay:g}"
    )


def further(config: Config, folder: pathlib.Path, done: int) -> str:
    """The command that continues a run."""
    inside = pathlib.Path(sys.prefix) == ROOT / ".venv"
    python = "python3 train/environment.py" if inside else "python"
    command = f"{python} -m train --resume {folder}"
    if done < config.run.steps:
        return f"go on     {command}"
    return f"go on     {command} --run.steps {2 * config.run.steps}"
