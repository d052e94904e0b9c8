"""Tune small, train large: where are the best learning rate and decay at several widths?

    python -m train width [quick | cpu | h200] [--folder FOLDER] [--field VALUE ...]

Trains every learning rate × decay × seed at every width, once with one learning rate for all
parameters (plain AdamW) and once under μP, and reads the runs under plain AdamW and under three
rules for the decay. `--task.family gpt` takes GPTs instead of LLaMAs. The folder holds

    sweep.json        the fields
    environment.json  one entry per start: command, commit, versions, devices, digest of the text
    results.jsonl     one line per finished run; a sweep that was stopped goes on where it was
    summary.txt       optima per width, how far they move, what the transfer costs, exponents
    width.png         loss against η and λ, per rule and width
"""

import collections
import dataclasses
import math
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from train.config.fields import UserError, nearest
from train.data.batches import TokenBatches
from train.display import Progress, say
from train.run.folder import write
from train.run.signals import signals
from train.study.results import RESULTS, append, locked_folder, note_start, read
from train.study.small_runs import SmallTask
from train.study.width.analysis import (
    RULES,
    TITLES,
    optimum,
    spectral_exponents,
    surfaces,
    transfer,
)
from train.study.width.figures import draw
from train.study.width.runs import check_widths, proxy, run_group


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Widths, learning rates, decays and seeds; the narrowest width is the proxy."""

    task: SmallTask = dataclasses.field(default_factory=proxy)
    """Of the proxy; its heads and MLP grow with the width."""
    text: str = "stdlib"
    """Folder, file or glob of text files; stdlib: the sources of the running Python's library."""
    steps: int = 300
    """Updates per run."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Widths of the models [features]; multiples of the width of the proxy's heads."""
    learning_rates: tuple[float, ...] = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)
    """Peaks; under μP those of the proxy."""
    weight_decays: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """λ of the matrices themselves; each rule names it by another λ of the proxy."""
    seeds: int = 3
    """Runs of every combination: of the initial weights and the order of the text."""
    folder: str = "runs/width"
    """Where the results go, and where a sweep that was stopped goes on."""


def quick() -> Sweep:
    """A minute on 2 CPU cores, to see all parts work: nothing can be learned from its optima."""
    return Sweep(
        proxy(16, 8, batch_size=4, length=32, eval_batches=2),
        steps=20,
        widths=(16, 32),
        learning_rates=(0.005, 0.02, 0.08),
        weight_decays=(0.5, 1.0, 2.0),
        seeds=2,
        folder="runs/width-quick",
    )


def cpu() -> Sweep:
    """648 runs of 300 steps of 512 bytes at widths 32, 64 and 128."""
    return Sweep(folder="runs/width-cpu")


def h200() -> Sweep:
    """756 runs of 1500 steps of 16k tokens at widths 128, 256 and 512; one H200.

    Not run. Its 7e17 floating-point operations are about 70 minutes at a fifth of the device's peak.
    """
    return Sweep(
        proxy(
            128,
            64,
            layers=4,
            init_std=0.05,
            tokenizer="bpe-4096",
            length=256,
            batch_size=64,
            dtype="bfloat16",
        ),
        steps=1500,
        widths=(128, 256, 512),
        learning_rates=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032),
        folder="runs/width-h200",
    )


SWEEPS = {make.__name__: make for make in (quick, cpu, h200)}


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    sweep = parse(arguments)
    fields = {k: v for k, v in dataclasses.asdict(sweep).items() if k != "folder"}
    with locked_folder(sweep.folder, fields, "sweep") as folder:
        data = sweep.task.read_text(sweep.text)
        note_start(folder, text=data.summary())
        results = read(folder / RESULTS)
        with signals("group of runs") as stop:
            run(sweep, data, results, folder / RESULTS, stop)
        text = summary(results, sweep.task.width)
        write(folder / "summary.txt", text + "\n")
        say(f"\n{text}")
        picture = draw(results, sweep.task.width, folder / "width.png")
        say(f"\nresults   {folder / 'results.jsonl'}\npicture   {picture}")
        if stop:
            say(
                f"stopped; the same command goes on:  python -m train width ... --folder {shlex.quote(str(folder))}"
            )
    return 128 + stop[0] if stop else 0


def parse(arguments: Sequence[str]) -> Sweep:
    """The sweep of a command line, checked.

    Raises:
        UserError: an unknown sweep, or fields that do not work together.
        SystemExit: after `--help`, or an unknown flag.
    """
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "cpu"
    if name not in SWEEPS:
        raise UserError(
            f"There is no sweep {name!r}; there are {', '.join(SWEEPS)};"
            f" nearest: {nearest(name, list(SWEEPS))}."
        )
    sweeps = "\n".join(f"  {name}: {make.__doc__}" for name, make in SWEEPS.items())
    sweep = tyro.cli(
        Sweep,
        args=arguments,
        default=SWEEPS[name](),
        prog=f"python -m train width [{' | '.join(SWEEPS)}]",
        description=f"{__doc__}\nSweeps:\n{sweeps}",
        use_underscores=True,
    )
    check(sweep)
    return sweep


def check(sweep: Sweep) -> None:
    """Raises UserError for the first field that is out of its range or does not fit the others."""
    check_widths(sweep.task, sweep.widths)
    if sweep.task.width != min(sweep.widths):
        raise UserError(
            f"task.width = {sweep.task.width} is not the narrowest of the widths"
            f" {sweep.widths}; nearest: {min(sweep.widths)}."
        )
    for name in ("learning_rates", "weight_decays"):
        values = getattr(sweep, name)
        if not values or min(values) <= 0 or len(set(values)) < len(values):
            raise UserError(f"{name} = {values} must be different numbers above 0.")
    if sweep.seeds < 1:
        raise UserError(f"seeds = {sweep.seeds} must be 1 or more.")


def run(
    sweep: Sweep,
    data: TokenBatches,
    results: list[dict[str, Any]],
    path: pathlib.Path,
    stop: Sequence[int] = (),
) -> None:
    """Runs what is not in `results` yet, until `stop` is not empty; adds it there and to the file at `path`."""
    groups = todo(sweep, results)
    if len(groups) < 2 * len(sweep.widths) * len(sweep.learning_rates):
        say(f"{len(results)} runs are done already")
    # A step is work ∝ width (attention, embeddings) and ∝ width² (matrices).
    work = [width**1.5 * len(decays) for _, width, _, decays in groups]
    progress = Progress(sum(work))
    for (parametrisation, width, eta, decays), part in zip(groups, work):
        found = run_group(
            *(
                sweep.task,
                sweep.steps,
                data,
                parametrisation,
                width,
                eta,
                decays,
                range(sweep.seeds),
            )
        )
        append(path, found)
        results.extend(found)
        progress.done(
            *(part, f"{parametrisation:8s}  width {width:4d}  η {eta:<8g}"),
            f"best loss {min(r['loss'] for r in found):.3f}",
        )
        if stop:
            return


def todo(
    sweep: Sweep, results: Sequence[dict[str, Any]]
) -> list[tuple[str, int, float, list[float]]]:
    """(parametrisation, width, η, decays) of the runs that are missing, one model after the other."""
    seeds = collections.defaultdict(set)
    for r in results:
        key = (r["parametrisation"], r["width"], r["learning_rate"], r["weight_decay"])
        seeds[key].add(r["seed"])
    groups = []
    for width in sorted(sweep.widths):
        for parametrisation in ("standard", "mup"):
            for eta in sweep.learning_rates:
                missing = [
                    lam
                    for lam in sweep.weight_decays
                    if len(seeds[parametrisation, width, eta, lam]) < sweep.seeds
                ]
                if missing:
                    groups.append((parametrisation, width, eta, missing))
    return groups


def summary(results: Sequence[dict[str, Any]], base_width: int) -> str:
    """Optima, shifts, costs and exponents, as text."""
    lines = ["optimum of learning rate η and decay λ, both as the proxy's, and the loss there"]
    lines += [f"{'':26s} width        η         λ   loss           edge of the grid"]
    for rule in RULES:
        for surface in surfaces(results, rule, base_width):
            best = optimum(surface)
            lines.append(
                f"{TITLES[rule]:26s} {surface.width:5d}  {best.learning_rate:7.2g}  {best.weight_decay:8.2g}"
                f"   {best.loss:.3f} ± {best.deviation:.3f}  {'' if best.inside else 'at the edge'}".rstrip()
            )
    lines += [
        "",
        "from the narrowest to the widest: how far the optimum moves (factors of 2, ± one",
    ]
    lines += [
        "deviation over resampled seeds), and what the proxy's best point costs at the widest"
    ]
    lines += [f"{'':26s}             η             λ   cost in loss"]
    for rule in RULES:
        moved = transfer(results, rule, base_width)
        if moved:
            cost = "outside the grid" if math.isnan(moved.cost) else f"{moved.cost:+.3f}"
            lines.append(
                f"{TITLES[rule]:26s} {moved.rate_shift:+5.2f} ± {moved.rate_error:4.2f}"
                f"  {moved.decay_shift:+5.2f} ± {moved.decay_error:4.2f}   {cost}"
            )
    proxy = surfaces(results, "constant", base_width)
    if len(proxy) > 1:
        i, j = np.unravel_index(np.argmin(proxy[0].mean()), proxy[0].mean().shape)
        eta, lam = float(proxy[0].learning_rates[i]), float(proxy[0].weight_decays[j])
        lines += [
            "",
            f"largest singular values grow as sqrt(η/λ)·width^a (at η = {eta:g}, λ = {lam:g});",
        ]
        lines += ["λ ∝ width^(2a-1) would hold them"]
        for path, (a, deviation) in spectral_exponents(results, eta, lam).items():
            lines.append(f"  {path:32s} a = {a:.2f} ± {deviation:.2f}   2a-1 = {2 * a - 1:+.2f}")
    return "\n".join(lines)
