"""The training program: config → mesh → model → optimizer → step → loop → checkpoint.

Read it from `train` downwards; every other file of this folder is one link of that chain.
"""

import dataclasses
import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from train import determinism, disk, processes
from train.cli import parse
from train.config.fields import Config, UserError
from train.config.tree import as_dict, flatten
from train.data.loading import read_data
from train.display import say
from train.run import checkpoints, figures, kept_tokenizer, log, lost, watchdog
from train.run.folder import ROOT, Folder, environment, write
from train.run.signals import signals
from train.step import (
    families,
    memory_needed,
    observe,
    optimizer,
    replicas,
    sharding,
    tasks,
    try_decay,
)
from train.step.program import Program, describe, real_mesh
from train.step.update import State
from train.weights import hugging_face


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code. What the user can put right is a UserError."""
    code = train(parse(processes.join(arguments)))
    processes.finished()
    return code


def train(config: Config) -> int:
    """Trains as the config says, going on with what its run folder already holds."""
    if config.run.deterministic:
        determinism.prepare()
    run = assemble(config, read_data(config))
    program = run.program
    with (
        signals() as stop,
        Folder(config) as folder,
        checkpoints.Checkpoints(
            folder.path / "checkpoints",
            config.run.keep,
            config.run.keep_every,
            saved=functools.partial(lost.note_saved, folder.path),
        ) as saved,
    ):
        meta = checkpoints.describe(folder.config, run.data.digest, program.shapes)
        in_first(kept_tokenizer.keep, folder.path, run.data)
        fresh = program.fresh_optimizer if config.run.migrate else None
        restart = config.run.restart
        in_first(lost.check_restart, folder.path, saved.steps, restart)
        found = None if restart else saved.restore(program.placed_shapes(), meta, say, fresh)
        in_first(lost.check_restored, folder.path, found and found[1], restart)
        in_first(folder.confirm)
        state, start = found or (None, 0)
        introduce(run, folder, start)
        if start >= config.run.steps:
            say(f"This run is complete: step {start} of {config.run.steps}.")
            say(further(config, folder.path, start))
            return 0
        if state is None:
            state = run.begin()
        with (
            recorder(program, folder, start) as records,
            watchdog.Watchdog(folder.path / "stuck.txt") as watch,
        ):
            save = functools.partial(saved.save, meta=meta, say=say)
            done = loop(run, state, start, records, save, stop, watch)
            finish(saved, folder.path)
        conclude(run, folder.path, done)
    return 128 + stop[0] if stop else 0


def in_first(work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work` in the first process; an error is raised in all of them."""
    processes.from_first(lambda: work(*arguments) or "")


@dataclasses.dataclass(frozen=True)
class Run:
    """A program and the data that it trains on.

    Attributes:
        config: as given; that of the program also holds what only the data knows.
        program: everything but the data.
        data: text as tokens, or images.
    """

    config: Config
    program: Program
    data: Any

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """About the data."""
        return self.data.summary()

    def begin(self) -> State:
        """The state before the first step: of fresh weights, or of those of `model.weights`."""
        program, config = self.program, self.program.config
        if config.model.weights is None:
            return program.init(jax.random.key(config.run.seed))
        folder = disk.user_path(config.model.weights)
        say(f"reading the weights in {folder} ...")
        weights = hugging_face.load_pretrained(folder, program.model, program.shardings["params"])
        return program.first_state(weights)

    def batch(self, index: int) -> Any:
        """The batch of step `index`, on the devices: an array or a dict of arrays."""
        data = self.data
        make = functools.partial(data.batch, index)
        return sharding.put_batch(make, data.shape, self.program.mesh)

    def evaluate(self, state: State, stop: Sequence[int] = ()) -> dict[str, float] | None:
        """Scores on held-out data; None if a signal has arrived."""
        program, found = self.program, []
        for batch in self.data.held_out(program.config.run.eval_batches):
            if stop:
                return None
            found.append(program.sums(state, sharding.put_whole(batch, program.mesh)))
        total = np.asarray(jax.device_get(found), np.float64).sum(0)
        return program.task.scores(total, self.facts)


def assemble(config: Config, data: Any) -> Run:
    """The run of a config on its data and the devices that are here. Allocates no weights.

    Raises:
        UserError: a size that does not fit the data or the devices, or more memory than there is.
    """
    complete = tasks.complete(config, tasks.of(config).outputs(data))
    program = describe(complete, real_mesh(complete))
    memory_needed.check(program)
    return Run(config, program, data)


def loop(
    run: Run,
    state: State,
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
    program, done, agreement = run.program, start, processes.Agreement()
    options = program.config.run
    due = stopped = False  # a checkpoint; by a signal

    def evaluate() -> None:
        with records.pause():
            watch.other(f"the evaluation after step {done}")
            # Several processes must all go through with it, and know of each other's signals after steps alone.
            through = done == options.steps or jax.process_count() > 1
            scores = run.evaluate(state, () if through else stop)
            if scores is None:
                return
            measured = {
                "weights": program.observed(state, batch),
                "spectrum": observe.spectrum(state["optimizer"].inner_state["decay"]),
                "gains": program.gains(state["params"]),
            }
            records.evaluation(done, scores, program.task.say_scores(scores), measured)

    def keep() -> bool:
        """Saves, but for weights that give no numbers: those of the checkpoints before may be healthier."""
        with records.pause():
            watch.other(f"saving after step {done}")
            if healthy := stopped or not records.skipping:
                save(state, step=done)
        return healthy

    batch = run.batch(start)
    # Only the first process knows what has been written.
    if start % options.eval_every == 0 and not processes.from_first(
        lambda: "done" if records.evaluated(start) else ""
    ):
        evaluate()
    while done < options.steps and not (stopped := agreement.ask(bool(stop))):
        watch.step(done + 1, records.seconds_per_step)
        state, noted = program.update(state, batch)
        done += 1
        batch = run.batch(done)
        records.train(done, noted)
        if done % options.eval_every == 0 or done == options.steps:
            evaluate()
        due = due or done % options.save_every == 0
        if due:
            due = not keep()
    keep()
    return done


def finish(saved: checkpoints.Checkpoints, folder: pathlib.Path) -> None:
    """Waits for the last checkpoint to be on disk."""
    try:
        saved.wait()
    except OSError as error:
        kept = max(saved.steps, default=None)
        safe = "nothing is saved" if kept is None else f"step {kept} is the last that is safe"
        raise UserError(
            f"{error}; {safe}. Make room, and go on with --resume {shlex.quote(str(folder))}."
        ) from None


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
            log.weights_and_biases(run.wandb, folder.path, as_dict(folder.config)),
        )
        if first
        else (),
        run.max_skipped,
        task.unit,
    )


def introduce(run: Run, folder: Folder, start: int) -> None:
    """Says and writes down what is about to be trained, on what, and what decays."""
    if not processes.first():
        return
    program, facts = run.program, run.facts
    config, mesh, task = program.config, program.mesh, program.task
    folder.add_start(environment(start=start, mesh=dict(mesh.shape), **{task.noun: facts}))
    tokens = task.per_step if task.unit == "tokens" else None
    shapes = program.shapes["params"]
    table = f"{optimizer.decay_table(config, shapes, program.axes, tokens)}"
    table += optimizer.fixed_norms(config, shapes, program.axes)
    write(folder.path / "decay.txt", f"{table}\n")
    grid = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(
        f"{task.noun:9} {task.introduction(facts)}, digest {run.data.digest[:16]}\n"
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
        name = config.optimizer.direction.name
        say(
            f"network   one replica: nothing is compressed; for workers of {name} set --mesh.replica"
        )
    say(f"\n{table}\n")
    for problem in try_decay.problems(config, program.shapes["params"], program.axes):
        say(f"warning: {problem}\n")


def conclude(run: Run, folder: pathlib.Path, done: int) -> None:
    """Draws the pictures and says what was reached, where it is, and how to go on."""
    if not processes.first():
        return
    records = log.read_records(folder / "metrics.jsonl")
    program, task = run.program, run.program.task
    baseline = task.baseline(run.facts)
    name, metric = title(program.config), flatten(program.config).get("decay.spectrum.score")
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
    """A run in one line."""
    optimizer, decay = config.optimizer, flatten(config.decay)
    strength = f" {decay['weight_decay']:g}" if "weight_decay" in decay else ""
    return (
        f"{config.run.name}: {config.model.preset}, {optimizer.direction.name} at {optimizer.learning_rate:g}"
        f" with {config.decay.name} decay{strength}"
    )


def further(config: Config, folder: pathlib.Path, done: int) -> str:
    """The command that continues a run."""
    own = pathlib.Path(sys.prefix) == ROOT / ".venv"
    activated = os.environ.get("VIRTUAL_ENV") == sys.prefix
    python = "python3 train/environment.py" if own and not activated else "python"
    command = f"{python} -m train --resume {shlex.quote(str(folder))}"
    if done < config.run.steps:
        return f"go on     {command}"
    return f"go on     {command} --run.steps {2 * config.run.steps}"
