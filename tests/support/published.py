"""Renews the results that RESULTS.md rests on from comparisons that have run: lines, pages and pictures.

    python -m tests.support.published                   # pages and pictures of what is published
    python -m tests.support.published runs repeated     # after new runs; without names, all that are in the folder

A published folder is what `python -m train compare` leaves, without weights and lock. Its page and pictures follow from
its lines alone, so a change of a report is published by the same command.
"""

import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from train.run.folder import write
from train.study.compare import main as one_pass
from train.study.compare.tiers import Comparison
from train.study.regimes import main as command
from train.study.regimes import map as regime_map
from train.study.regimes.work import known
from train.study.results import RESULTS, append, read
from train.study.small_runs import SmallTask

ROOT = pathlib.Path(__file__).resolve().parents[2]
PUBLISHED = pathlib.Path("notebooks/results")  # in the root
TIER = "cpu"
# Regime of each comparison; the last has fields of its own.
REGIME_OF = {name: name for name in command.REGIMES} | {"grokking_small": "grokking"}
NAMES = (command.ONE_PASS, *REGIME_OF)


def folder_of(name: str, where: pathlib.Path) -> pathlib.Path:
    return where / f"compare-{name}-{TIER}"


def publish(name: str, source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what a report follows from: fields, starts, and the lines of its runs, not those of other plans.

    Raises:
        ValueError: the comparison is not finished. What was published stays.
    """
    fields = json.loads((source / "comparison.json").read_text())
    if "source" in fields:  # the weights that were measured came from this comparison
        fields["source"] = (PUBLISHED / pathlib.Path(fields["source"]).name).as_posix()
    starts = json.loads((source / "environment.json").read_text())
    for start in starts:
        start["command"] = re.sub(r"^\S*/(?=python)", "", start["command"])
    with tempfile.TemporaryDirectory() as name_of_copy:
        copy = pathlib.Path(name_of_copy)
        write(copy / "comparison.json", json.dumps(fields, indent=2) + "\n")
        write(copy / RESULTS, (source / RESULTS).read_text())
        _, records, missing = plan(name, copy)
    if missing:
        raise ValueError(f"{source} is not finished; the same command goes on.")
    target.mkdir(parents=True, exist_ok=True)
    write(target / "comparison.json", json.dumps(fields, indent=2) + "\n")
    write(target / "environment.json", json.dumps(starts, indent=2) + "\n")
    (target / RESULTS).unlink(missing_ok=True)
    append(target / RESULTS, records)


def plan(name: str, folder: pathlib.Path) -> tuple[Any, list[dict[str, Any]], bool]:
    """The fields of a folder, the records of its runs, and whether some are missing."""
    path = folder / RESULTS
    if name != command.ONE_PASS:
        regime, records = regime_map.regime(REGIME_OF[name], folder, TIER)
        return regime, records, known(regime, records).missing
    fields = json.loads((folder / "comparison.json").read_text())
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    comparison = Comparison(**values | {"task": SmallTask(**fields["task"])})
    # Stopped from the beginning, it takes what is there and trains nothing.
    records = one_pass.run_all(comparison, {}, read(path), path, stop=[1])
    return comparison, records, next(one_pass.jobs(comparison, records), None) is not None


def report(name: str, lines: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Writes the page of the lines of one folder into another; returns which controls failed."""
    if folder != lines:
        write(folder / "environment.json", (lines / "environment.json").read_text())
    regime, records, _ = plan(name, lines)
    if name == command.ONE_PASS:
        return one_pass.write_report(regime, records, folder)
    module = importlib.import_module(command.REGIMES[REGIME_OF[name]])
    return module.write_report(regime, records, folder)


def main(arguments: list[str]) -> None:
    """Publishes the comparisons that are named, or all that are there; in the root of the project."""
    os.chdir(ROOT)
    runs, names = pathlib.Path(arguments[0]) if arguments else None, arguments[1:] or NAMES
    if strange := set(names) - set(NAMES):
        raise ValueError(f"There is no comparison {strange.pop()!r}; there are {', '.join(NAMES)}.")
    for name in names:
        if runs is not None and folder_of(name, runs).exists():
            publish(name, folder_of(name, runs), folder_of(name, PUBLISHED))
        if folder_of(name, PUBLISHED).exists():
            failed = report(name, folder_of(name, PUBLISHED), folder_of(name, PUBLISHED))
            print(f"{name}: {failed or 'all controls hold'}")
    regime_map.main(["--runs", str(PUBLISHED), "--folder", str(PUBLISHED / "compare-map")])


if __name__ == "__main__":
    main(sys.argv[1:])
