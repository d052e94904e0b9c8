"""Where does weight decay matter, how much, and which kind?

    python -m train compare REGIME [TIER] [--field VALUE ...]

Regimes:
{regimes}

Tiers: smoke (minutes), cpu (on two cores up to two hours, repeated up to four) and gpu (stretches of 9 minutes on
one GPU).
`python -m train compare REGIME --help` shows the fields of a regime.

Every run that has ended is a line of results.jsonl. After Ctrl-C, a kill or the end of --minutes, the same command
goes on where it stopped. --fresh_seeds N repeats everything with other seeds, in a folder of its own. The folder holds

    comparison.json   the fields
    environment.json  one entry per start: command, commit, versions, devices, digests of the texts
    results.jsonl     one line per run
    report.md         the tables and pictures
    points.json       of repeated: learning rates and λ, to repeat the runs that count without a search (--points)

A report whose controls fail says so at its top; the exit code is then 1.
"""

import dataclasses
import importlib
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import tyro

from train import cores
from train.config.fields import UserError, nearest
from train.display import clock, say
from train.run.signals import signals
from train.study.regimes.work import known, run_all
from train.study.results import RESULTS, locked_folder, note_start, read

# Name to module. Each has TIERS (name to a function that returns the fields, whose docstring describes the tier),
# `seconds` (of a run, measured), `facts` (of the texts) and `write_report`.
REGIMES = {
    "repeated": "train.study.regimes.repeated_tiers",
    "grokking": "train.study.regimes.grokking_tiers",
    "compress": "train.study.regimes.compress_tiers",
    "bfloat16": "train.study.regimes.bfloat16_tiers",
    "ending": "train.study.regimes.ending_tiers",
}
ONE_PASS, MAP = "one_pass", "map"
APART = ("folder", "minutes", "processes")  # fields that do not decide what a result is
MARGIN = 1.3  # times of arms over those of L2 with compiling, about


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit code: 1 if a control of the report failed."""
    began = time.monotonic()
    names = [ONE_PASS, *REGIMES, MAP]
    if not arguments or arguments[0] in ("-h", "--help"):
        say((__doc__ or "").format(regimes=_described()))
        return 0
    name, rest = arguments[0], list(arguments[1:])
    if name == ONE_PASS:
        return importlib.import_module("train.study.compare.main").main(rest)
    if name == MAP:
        return importlib.import_module("train.study.regimes.map").main(rest)
    if name not in REGIMES:
        raise UserError(
            f"There is no regime {name!r}; there are {', '.join(names)}; nearest: {nearest(name, names)}."
        )
    module = importlib.import_module(REGIMES[name])
    regime = parse(name, module, rest)
    return run(module, regime, began)


def _described() -> str:
    lines = [f"  {ONE_PASS:10s} Every decay and optimizer against AdamW, in one pass over a text."]
    for name, module in REGIMES.items():
        first = (importlib.import_module(module).TIERS["cpu"]().__doc__ or "").splitlines()[0]
        lines.append(f"  {name:10s} {first}")
    lines.append(
        f"  {MAP:10s} One picture of all of them: what each decay gains over L2 decay, where."
    )
    return "\n".join(lines)


def parse(name: str, module: Any, arguments: Sequence[str]) -> Any:
    """The fields of a command line, checked.

    Raises:
        UserError: an unknown tier, or fields that do not work together.
        SystemExit: after `--help`, or an unknown flag.
    """
    rest = list(arguments)
    tier = rest.pop(0) if rest and not rest[0].startswith("-") else "smoke"
    if tier not in module.TIERS:
        raise UserError(
            f"There is no tier {tier!r} of {name}; there are {', '.join(module.TIERS)};"
            f" nearest: {nearest(tier, list(module.TIERS))}."
        )
    tiers = "\n".join(f"  {t}: {make.__doc__}" for t, make in module.TIERS.items())
    default = module.TIERS[tier]()
    regime = tyro.cli(
        type(default),
        args=rest,
        default=default,
        prog=f"python -m train compare {name} [{' | '.join(module.TIERS)}]",
        description=f"{module.__doc__}\nTiers:\n{tiers}",
        use_underscores=True,
    )
    if not regime.minutes > 0:
        raise UserError(f"--minutes {regime.minutes:g} must be above 0; nearest: 1.")
    if regime.processes < 0:
        raise UserError(f"--processes {regime.processes} must be 0 or more; nearest: 0.")
    regime.check()
    if regime.folder == default.folder:
        given = "-points" if dataclasses.asdict(regime).get("points") else ""
        seeds = f"-seeds-{regime.fresh_seeds}" if regime.fresh_seeds else ""
        regime = dataclasses.replace(regime, folder=f"{regime.folder}{given}{seeds}")
    return regime


def run(module: Any, regime: Any, began: float) -> int:
    """Trains what is missing, and writes the report."""
    fields = {k: v for k, v in dataclasses.asdict(regime).items() if k not in APART}
    with locked_folder(regime.folder, fields, "comparison") as folder:
        note_start(folder, texts=module.facts(regime))
        path = folder / RESULTS
        stored = read(path)
        there = known(regime, stored)
        with signals("run") as stopped:
            if there.missing:
                processes = regime.processes or default_processes()
                _introduce(module, regime, len(there.records), processes)
                limit = began + 60 * regime.minutes
                run_all(
                    regime,
                    stored,
                    path,
                    lambda: bool(stopped) or time.monotonic() > limit,
                    processes=processes,
                    expected=math.ceil(regime.expected()),
                )
                there = known(regime, read(path))
        if there.strange:
            say(
                f"{there.strange} lines of {path} are of no run of this comparison, and were left out."
            )
        failed = module.write_report(regime, there.records, folder)
        say(f"\nreport    {folder / 'report.md'}")
        for reason in failed:
            say(f"CONTROL FAILED: {reason}")
        if there.missing:
            say(f"not finished; the same command goes on (folder {folder}).")
    if stopped:
        return 128 + stopped[0]
    return 1 if failed else 0


def default_processes() -> int:
    """One per core that this process may use; one alone on an accelerator, where runs train side by side."""
    if jax.default_backend() != "cpu":
        return 1
    return cores.usable()


def _introduce(module: Any, regime: Any, done: int, processes: int) -> None:
    """Says how long it will take, from the time of a short run of L2 decay here."""
    each, expected = module.seconds(regime), regime.expected()
    left = MARGIN * each * max(0.0, expected - done) / processes
    say(
        f"about {expected:,.0f} runs, {done:,} of them done; {each:.1f} s each here, in {processes}"
        f" {'processes' if processes > 1 else 'process'}: about {clock(left)} in all."
    )
    if math.isfinite(regime.minutes):
        say(f"This start ends after {regime.minutes:g} minutes; the same command goes on.")
