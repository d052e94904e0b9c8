"""Which decay or optimizer is faster than AdamW, by how much, and what can be said at all?

    python -m train compare one_pass [smoke | cpu | gpu] [--arms ARM ...] [--folder FOLDER] [--field VALUE ...]

One training program, in which the optimizer is the only difference. Every arm (`arms.py`) is tuned with the
same number of trials on seeds that no result uses, over learning rate and decay together, and then trained with
other seeds; AdamW at several budgets, each with its own full schedule. Only losses at the end of a run count. The
result of an arm is its speed-up: the steps AdamW needs for the arm's loss, over the arm's steps.

Every report holds two controls: AdamW against itself, whose interval must hold 1, and Muon, whose speed-up must
exceed 1.2 with an interval above 1. If either fails the report is void, says so at its top, and the exit code is 1.

The folder holds

    comparison.json   the fields
    environment.json  one entry per start: command, commit, versions, devices, digests of the texts
    results.jsonl     one line per finished run; a comparison that was stopped goes on where it was
    report.md         the tables, with speedup.png, curves.png, ladder.png and cost.png
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from train.config.fields import UserError, nearest
from train.data.batches import TokenBatches
from train.display import Progress, say
from train.run.signals import signals
from train.study.compare.arms import ARMS, CONTROLS, WORKERS
from train.study.compare.points import POINTS
from train.study.compare.report import write_report
from train.study.compare.runs import cost, run
from train.study.compare.tiers import TIERS, Comparison, cpu
from train.study.compare.tuning import FIRST_SEED, next_trials, tuned
from train.study.results import RESULTS, append, locked_folder, note_start, read

APART = 1000  # between the first seeds of two arms
Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code: 1 if the report is void."""
    comparison = parse(arguments)
    fields = {k: v for k, v in dataclasses.asdict(comparison).items() if k != "folder"}
    with locked_folder(comparison.folder, fields, "comparison") as folder:
        texts = {text: comparison.task.read_text(text) for text in comparison.texts}
        facts = {text: data.summary() for text, data in texts.items()}
        note_start(folder, texts=facts)
        path = folder / RESULTS
        stored = read(path)
        with signals("run") as stop:
            results = run_all(comparison, texts, stored, path, stop)
        void = write_report(comparison, results, folder)
        say(f"\nreport    {folder / 'report.md'}")
        for reason in void:
            say(f"VOID: {reason}")
        if stop:
            say(
                "stopped; the same command goes on:  python -m train compare one_pass ..."
                f" --folder {shlex.quote(str(folder))}"
            )
            return 128 + stop[0]
    return 1 if void else 0


def parse(arguments: Sequence[str]) -> Comparison:
    """The comparison of a command line, checked.

    Raises:
        UserError: an unknown tier or arm, or fields that do not work together.
        SystemExit: after `--help`, or an unknown flag.
    """
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "smoke"
    if name not in TIERS:
        raise UserError(
            f"There is no tier {name!r}; there are {', '.join(TIERS)};"
            f" nearest: {nearest(name, list(TIERS))}."
        )
    tiers = "\n".join(f"  {name}: {make.__doc__}" for name, make in TIERS.items())
    arms = "\n".join(f"  {name}: {arm.title}" for name, arm in ARMS.items())
    comparison = tyro.cli(
        Comparison,
        args=arguments,
        default=TIERS[name](),
        prog=f"python -m train compare one_pass [{' | '.join(TIERS)}]",
        description=f"{__doc__}\nTiers:\n{tiers}\n\nArms:\n{arms}",
        use_underscores=True,
    )
    check(comparison)
    return comparison


def check(comparison: Comparison) -> None:
    """Raises UserError for the first field that is out of its range or does not fit the others."""
    for arm in comparison.arms:
        if arm not in ARMS or arm in CONTROLS:
            others = [name for name in ARMS if name not in CONTROLS]
            raise UserError(
                f"arms: {arm!r} is not one of {', '.join(others)}; nearest: {nearest(arm, others)}."
            )
    chunk = comparison.task.chunk
    for steps in {*comparison.ladder, comparison.steps, comparison.trial_steps}:
        if steps < 1 or steps % chunk:
            raise UserError(
                f"{steps} steps are not a multiple of task.chunk = {chunk};"
                f" nearest: {max(1, round(steps / chunk)) * chunk}."
            )
    if comparison.task.batch_size % WORKERS and "one_bit_adam" in comparison.arms:
        raise UserError(
            f"task.batch_size = {comparison.task.batch_size} cannot be split over the {WORKERS}"
            f" workers of one_bit_adam; nearest: {max(1, round(comparison.task.batch_size / WORKERS)) * WORKERS}."
        )
    if comparison.steps not in comparison.ladder or len(set(comparison.ladder)) < 3:
        raise UserError(
            f"ladder = {comparison.ladder} must be three budgets or more, among them steps ="
            f" {comparison.steps}."
        )
    for name in ("seeds", "ladder_seeds"):
        if not 2 <= getattr(comparison, name) <= APART // 10:
            raise UserError(f"{name} = {getattr(comparison, name)} must be 2 to {APART // 10}.")
    last = comparison.first_seed + APART * len(ARMS)
    if comparison.first_seed < 0 or last > FIRST_SEED:
        raise UserError(
            f"first_seed = {comparison.first_seed} must be 0 to {FIRST_SEED - APART * len(ARMS)}:"
            " higher seeds belong to tuning."
        )
    if len(comparison.ladder) > 10 or not comparison.texts:
        raise UserError("At most 10 budgets, and at least one text.")
    check_points(comparison)


def check_points(comparison: Comparison) -> None:
    """Raises UserError if the search does not work out."""
    arms = [arm for arm in names(comparison) if arm != "again"]
    carried = comparison.grid == "carried"
    stored = [] if comparison.trials and not carried else comparison.texts
    for text, arm in ((text, arm) for text in stored for arm in arms):
        known = next(iter(POINTS.values()), {}) if carried else POINTS.get(text, {})
        if arm not in known:
            raise UserError(
                f"train/study/compare/points.py has no point of {arm} for {text!r}; nearest: --grid full"
                f" --trials {cpu().trials}."
            )
    largest = max(len(rates) * len(decays) for rates, decays in (grid(comparison, a) for a in arms))
    if 0 < comparison.trials < largest:
        raise UserError(
            f"trials = {comparison.trials} do not fill a grid of {largest} points; nearest:"
            f" {largest} (or 0, for stored points)."
        )


def names(comparison: Comparison) -> list[str]:
    """All arms in the order of their runs, controls first."""
    return [*CONTROLS, *dict.fromkeys(comparison.arms)]


def run_all(
    comparison: Comparison,
    texts: dict[str, TokenBatches],
    stored: Sequence[Record],
    path: pathlib.Path,
    stop: Sequence[int] = (),
) -> list[Record]:
    """All runs, until `stop` is not empty: taken from `stored` where they are there, else run and added to `path`.

    Stored results are looked up run by run, so that nothing else can get into a report: no other seed, no point that
    the search does not lead to, no run twice.
    """
    known = {_identity(record): record for record in reversed(stored) if _whole(record)}
    if known:
        say(f"{len(known)} runs are done already")
    progress = Progress(total(comparison), sum(r.get("steps", 0) for r in known.values()))
    results: list[Record] = []
    for job in jobs(comparison, results):
        if _identity(job) in known:
            results.append(known.pop(_identity(job)))
            continue
        if stop:
            return results
        arm, text = job["arm"], job["text"]
        if job["stage"] == "cost":
            record = job | cost(
                comparison.task, texts[text], arm, point(comparison, results, arm, text)
            )
        else:
            numbers = ("learning_rate", "weight_decay", "steps", "seed")
            chosen = {name: job[name] for name in numbers}
            record = job | run(comparison.task, texts[text], arm, **chosen)
            progress.done(
                *(job["steps"], f"{arm:18s} {text:7s} {job['stage']:6s} {job['steps']:4d} steps"),
                f"η {job['learning_rate']:<7g} λ {job['weight_decay']:<6g} loss {record['loss']:.4f}",
            )
        results.append(record)
        append(path, [record])
    others = len(stored) - sum(record in results for record in stored)
    if others:
        say(f"{others} lines of {path} are of no run of this comparison, and were left out.")
    return results


def _identity(record: Record) -> str:
    names = ("arm", "text", "stage", "steps", "learning_rate", "weight_decay", "seed")
    return json.dumps([record.get(name) for name in names])


def _whole(record: Record) -> bool:
    """Whether it says what a run came to."""
    numbers = (
        ("seconds_per_step", "adamw_seconds_per_step")
        if record.get("stage") == "cost"
        else ("loss", "seconds")
    )
    return all(isinstance(record.get(name), float) for name in numbers)


def total(comparison: Comparison) -> int:
    """Steps of all runs."""
    each = comparison.trials * comparison.trial_steps + comparison.seeds * comparison.steps
    again = comparison.seeds * comparison.steps
    adamw = comparison.trials * comparison.trial_steps + comparison.ladder_seeds * sum(
        comparison.ladder
    )
    arms = len(names(comparison)) - 2
    return len(comparison.texts) * (adamw + again + arms * each)


def jobs(comparison: Comparison, results: list[Record]) -> Iterator[Record]:
    """What is to be run next, as long as there is something; `results` has to grow by each."""
    for arm in names(comparison):
        for text in comparison.texts:
            base = {"arm": arm, "text": text}
            while arm != "again" and comparison.trials:
                tried = chosen(results, arm, text, "trial")
                trials = next_trials(*grid(comparison, arm), tried, comparison.trials)
                if not trials:
                    break
                # One at a time, since the best point so far decides how a search goes on.
                yield base | {"stage": "trial", "steps": comparison.trial_steps} | trials[0]
            eta, lam = point(comparison, results, arm, text)
            done = {(r["steps"], r["seed"]) for r in chosen(results, arm, text, "result")}
            for steps, seed in wanted(comparison, arm):
                if (steps, seed) not in done:
                    yield base | {
                        "stage": "result",
                        "steps": steps,
                        "learning_rate": eta,
                        "weight_decay": lam,
                        "seed": seed,
                    }
        text = comparison.texts[0]
        if arm not in ("adamw", "again") and not chosen(results, arm, text, "cost"):
            yield {"arm": arm, "text": text, "stage": "cost"}


def grid(comparison: Comparison, arm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Learning rates and decays where the search of an arm begins.

    A point is carried over by η ∝ 1/width, and by the same shrink ηλT over the whole run.
    """
    row = ARMS[arm]
    if comparison.grid == "full":
        return row.learning_rates, row.weight_decays
    before, (eta, lam) = cpu(), next(iter(POINTS.values()))[arm]
    rate = eta * before.task.width / comparison.task.width
    decay = lam * eta * before.steps / (rate * comparison.steps)
    return (rate / 2, rate, rate * 2), (decay,)


def chosen(results: Sequence[Record], arm: str, text: str, stage: str) -> list[Record]:
    return [r for r in results if (r["arm"], r["text"], r["stage"]) == (arm, text, stage)]


def point(
    comparison: Comparison, results: Sequence[Record], arm: str, text: str
) -> tuple[float, float]:
    """Learning rate and decay that an arm's results are made with."""
    arm = "adamw" if arm == "again" else arm
    if not comparison.trials:
        return POINTS[text][arm]
    found = tuned(chosen(results, arm, text, "trial"))
    return found.learning_rate, found.weight_decay


def wanted(comparison: Comparison, arm: str) -> list[tuple[int, int]]:
    """Budgets and seeds of an arm's results; no two runs of a text share a seed."""
    first = comparison.first_seed + APART * list(ARMS).index(arm)
    if arm != "adamw":
        return [(comparison.steps, first + i) for i in range(comparison.seeds)]
    return [
        (steps, first + k * APART // 10 + i)
        for k, steps in enumerate(sorted(comparison.ladder))
        for i in range(comparison.ladder_seeds)
    ]
