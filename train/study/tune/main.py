"""Finds the learning rate and the weight decay for your text, optimizer and decay, with a small model of your family.

    python -m train tune [ARGUMENTS OF YOUR RUN] [--minutes 20] [--folder FOLDER] [--proxy.FIELD VALUE ...]

Write what you would write after `python -m train`: an experiment, --data.text, --model.preset, --optimizer, --decay
and their fields. `python -m train --help` shows these; the options below belong to tune alone. An example:

    python -m train tune --data.text 'my/texts/**/*.txt' --model.preset 60M --optimizer muon --decay huber

The command trains many small models. It tries a grid of learning rates and decays, and moves the grid until the best
point is inside. Then it trains the best points again with other seeds. It prints a table, the recommended numbers with
the range that cannot be told apart from them, how much they may be off before the loss rises by 0.02 nats, and the
command that trains the real model with them. The learning rate and the decay carry over to the real width by μP, which
the flag --width.base of that command switches on.

The best decay grows with the number of times that a text is seen. If your run sees its text more than once, add
--proxy.epochs with that number: small runs then see a part of the text as often.

On two CPU cores this takes about ten minutes, and 20 at most. Every finished run is a line of a file. After Ctrl-C, a
kill or the end of --minutes, the same command goes on where it stopped. The folder holds

    tune.json         the options
    environment.json  one entry per start: command, commit, versions, devices, digest of the text
    results.jsonl     one line per finished run
    tune.txt          the table and the recommendation
    tune.png          the surface of losses over learning rate and decay
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import tyro

from train import cli
from train.config import tree
from train.config.fields import Config, UserError
from train.data.batches import TokenBatches
from train.display import clock, say
from train.processes import FLAGS
from train.run.folder import write
from train.run.signals import signals
from train.step.families import of
from train.step.tasks import LanguageTask
from train.study.compare.tuning import FIRST_SEED
from train.study.population import Member, Outcome, population, recorded, side_by_side_here
from train.study.results import RESULTS, locked_folder, note_start, read
from train.study.small_runs import SmallProgram
from train.study.tune.figures import draw
from train.study.tune.options import Tune, check, grid, small_config, small_program
from train.study.tune.repetition import cut
from train.study.tune.report import report
from train.study.tune.search import BEST, next_members
from train.study.tune.surface import surface

Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    began = time.monotonic()
    tune, rest = parse(arguments)
    real = cli.parse(rest)
    check(tune, real)
    small = small_config(tune, real)
    # What a result is of. The grid, the seeds and the time decide which results there are.
    fields = {"proxy": dataclasses.asdict(tune.proxy), "run": tree.as_dict(small)}
    with locked_folder(tune.folder, fields, "tune") as folder:
        whole = LanguageTask.read(small)
        data = cut(tune.proxy, whole)
        note_start(folder, text=data.summary())
        program = small_program(tune, small, data)
        _introduce(tune, small, program)
        stored = read(folder / RESULTS)
        with signals("small run") as stop:
            results = search(tune, small, program, data, stored, folder / RESULTS, began, stop)
        if not results:
            say("stopped before the first run had ended; the same command starts again.")
            return 128 + stop[0] if stop else 0
        found = surface(results)
        if not math.isfinite(found.best.loss):
            raise UserError(
                f"All {len(results)} runs diverged, down to the learning rate"
                f" {min(p.learning_rate for p in found.points):g}; begin with lower --learning_rates."
            )
        text = report(tune, real, rest, results, found, whole)
        write(folder / "tune.txt", text + "\n")
        title = f"{small.optimizer.direction.name} with {small.decay.name} decay, width {tune.proxy.width}"
        picture = draw(
            found, f"{title}, {tune.proxy.steps} steps on {small.data.text}", folder / "tune.png"
        )
        say(f"\n{text}\n\npicture   {picture}")
    return 128 + stop[0] if stop else 0


def parse(arguments: Sequence[str]) -> tuple[Tune, list[str]]:
    """The options of tune, and the arguments that are those of a run."""
    tune, rest = tyro.cli(
        Tune,
        args=list(arguments),
        prog="python -m train tune",
        description=__doc__,
        use_underscores=True,
        return_unknown_args=True,
    )
    several = [word for word in rest if word.partition("=")[0] in FLAGS]
    if several:
        raise UserError(
            f"{several[0]}: tune runs in one process, and uses all devices of its machine; leave out {' '.join(FLAGS)}."
        )
    return tune, rest


def search(
    tune: Tune,
    small: Config,
    program: SmallProgram,
    data: TokenBatches,
    stored: Sequence[Record],
    path: pathlib.Path,
    began: float,
    stop: Sequence[int] = (),
) -> list[Record]:
    """All runs, until the search is over, the time is, or `stop` is not empty; stored ones are not trained again."""
    rates, decays = grid(tune, small)
    at_once = together(tune)
    places = len(rates) * len(decays) * tune.seeds if at_once else 1  # those of the first grid
    results: list[Record] = []
    known = {_member(record) for record in stored}
    if known:
        say(f"{len(known)} runs are done already")
    fresh, started = 0, time.monotonic()

    def run(members: Sequence[Member]) -> Iterator[Outcome]:
        steps = tune.proxy.steps
        return population(program, members, data, steps, together=at_once, places=places)

    def over() -> bool:
        """Whether to stop, because of a signal or because another run would end too late."""
        each = (time.monotonic() - started) / max(fresh, 1)
        return bool(stop) or (fresh > 0 and time.monotonic() + each > began + 60 * tune.minutes)

    while members := next_members(rates, decays, results, tune.trials, tune.seeds, at_once):
        for i, record in enumerate(recorded(path, stored, members, run, over), 1):
            results.append(record)
            if _member(record) in known:
                continue
            fresh += 1
            to_do = len(members) - i + _later(tune, results, len(members) - i)
            left = to_do * (time.monotonic() - started) / fresh
            left = min(left, max(0.0, began + 60 * tune.minutes - time.monotonic()))
            say(_line(record, len(results), to_do, left))
        if over():
            reason = "stopped" if stop else f"{tune.minutes:g} minutes are over"
            say(f"{reason}; the same command goes on where it stopped, in {tune.folder}")
            break
    return results


def _member(record: Record) -> Member:
    return Member(*(record[name] for name in Member._fields))


def _later(tune: Tune, results: Sequence[Record], waiting: int) -> int:
    """A guess of the runs that follow those that wait: during the search, a row of the grid and the seeds."""
    if results[-1]["seed"] != FIRST_SEED:
        return 0
    points = len(results) + waiting
    return min(3, max(0, tune.trials - points)) + (tune.seeds - 1) * min(BEST, points)


def _line(record: Record, done: int, to_do: int, left: float) -> str:
    return (
        f"{100 * done / (done + to_do):3.0f} %  η {record['learning_rate']:<8.3g} λ {record['weight_decay']:<7.3g}"
        f" seed {record['seed'] % 1000:<2d}  loss {record['loss']:.4f}  about {clock(left)} left"
    )


def together(tune: Tune) -> bool:
    """Whether runs train side by side."""
    return side_by_side_here() if tune.side_by_side is None else tune.side_by_side


def _introduce(tune: Tune, small: Config, program: SmallProgram) -> None:
    count = of(program.model).count(program.model)
    how = "side by side" if together(tune) else "one after the other"
    say(
        f"tuning {small.optimizer.direction.name} with {small.decay.name} decay on a model of {count:,} weights:"
        f" {tune.proxy.steps} steps of {small.data.batch_size * small.data.length} tokens a run\nruns train {how}"
        f" on {jax.devices()[0].device_kind}; {tune.minutes:g} minutes at most"
    )
