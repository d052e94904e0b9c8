"""The runs of a regime: which are wanted, which are there, and the others, trained in several processes.

A regime says what it wants unit by unit. A unit is a group of runs that decides by itself how it goes on, such as the
search, the sweep and the results of one arm. `wanted(unit, results)` yields lists of jobs; after each list, `results`
holds their records. Stored results are looked up job by job, so nothing else can get into a report: no other seed, no
point that the search does not lead to, no run twice.

On CPUs, units are spread over processes, each bound to a core of its own, because one small model cannot use two
cores. On an accelerator one process trains the runs of a list side by side.
"""

import json
import multiprocessing
import os
import pathlib
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from train.config.fields import UserError
from train.display import clock, say
from train.study.results import append

Record = dict[str, Any]
PATIENCE = 1.0  # seconds between two looks at the processes


class Regime(Protocol):
    """The part of a regime that is about its runs. It is sent to other processes, so it is a plain dataclass."""

    def units(self) -> Sequence[str]:
        """All units, the most important ones first."""

    def wanted(self, unit: str, results: list[Record]) -> Iterator[list[Record]]:
        """Lists of jobs, the next one decided from the records so far."""

    def train(self, jobs: Sequence[Record], folder: pathlib.Path) -> Iterator[Record]:
        """The records of jobs: the jobs with what came out. `folder` is for what is too large for a line."""


class Known(NamedTuple):
    """What the stored lines say.

    Attributes:
        records: of the runs of this regime, in the order of its units.
        missing: whether runs are still wanted.
        strange: number of lines that are of no run of this regime.
    """

    records: list[Record]
    missing: bool
    strange: int


def identity(record: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps([record.get(name) for name in names])


def known(regime: Regime, stored: Sequence[Record]) -> Known:
    """Looks up every run that the regime wants."""
    records: list[Record] = []
    missing, table = False, _Table(stored)
    for unit in regime.units():
        results: list[Record] = []
        for jobs in regime.wanted(unit, results):
            found = table.look_up(jobs)
            results += found
            if len(found) < len(jobs):
                missing = True
                break
        records += results
    return Known(records, missing, len(stored) - len(records))


class _Table:
    """Stored lines by the fields of a job."""

    def __init__(self, stored: Sequence[Record]):
        self._tables: dict[tuple[str, ...], dict[str, Record]] = {}
        self._stored = stored

    def look_up(self, jobs: Sequence[Record]) -> list[Record]:
        """The records that are there, in the order of the jobs."""
        found = []
        for job in jobs:
            names = tuple(job)
            if names not in self._tables:
                self._tables[names] = {
                    identity(r, names): r for r in self._stored if "seconds" in r
                }
            record = self._tables[names].get(identity(job, names))
            if record is not None:
                found.append(record)
        return found


def run_all(
    regime: Regime,
    stored: Sequence[Record],
    path: pathlib.Path,
    stop: Callable[[], bool],
    *,
    processes: int,
    expected: int,
) -> None:
    """Trains what is missing, and adds each record to a file when it is there.

    Args:
        regime: what is wanted.
        stored: the lines of the file.
        path: of the file.
        stop: whether to end after the runs that are being trained.
        processes: how many train at once.
        expected: runs of all units, for the time that is left.
    """
    began, before = time.monotonic(), len(known(regime, stored).records)
    trained = _trained(regime, stored, path.parent, stop, processes)
    for done, (unit, record) in enumerate(trained, 1):
        append(path, [record])
        if done % max(1, expected // 200) == 0 or done == 1:
            passed = time.monotonic() - began
            left = passed / done * max(0, expected - before - done)
            share = min(1.0, (before + done) / max(1, expected))
            say(f"{100 * share:3.0f} %  {unit:24s} {_words(record)}  about {clock(left)} left")


def _words(record: Record) -> str:
    """What a run was, and what it came to, in a line."""
    words = [str(record["text"])] if "text" in record else []
    if "learning_rate" in record:
        words.append(f"η {record['learning_rate']:<7.3g} λ {record['weight_decay']:<7.3g}")
    words.append(f"seed {record.get('seed')}")
    steps = record.get("steps_to_generalise")
    words.append(f"loss {record['loss']:.4f}" if steps is None else f"{steps:.0f} steps")
    return "  ".join(words)


def _trained(
    regime: Regime,
    stored: Sequence[Record],
    folder: pathlib.Path,
    stop: Callable[[], bool],
    processes: int,
) -> Iterator[tuple[str, Record]]:
    units = [unit for unit in regime.units() if _missing(regime, unit, stored)]
    if processes < 2 or len(units) < 2:
        for unit in units:
            for record in _unit(regime, unit, stored, folder, stop):
                yield unit, record
            if stop():
                return
        return
    yield from _in_processes(regime, units, stored, folder, stop, min(processes, len(units)))


def _missing(regime: Regime, unit: str, stored: Sequence[Record]) -> bool:
    table, results = _Table(stored), []
    for jobs in regime.wanted(unit, results):
        found = table.look_up(jobs)
        if len(found) < len(jobs):
            return True
        results += found
    return False


def _unit(
    regime: Regime,
    unit: str,
    stored: Sequence[Record],
    folder: pathlib.Path,
    stop: Callable[[], bool],
) -> Iterator[Record]:
    """Trains what a unit still wants."""
    table, results = _Table(stored), []
    for jobs in regime.wanted(unit, results):
        found = {identity(job, tuple(job)): r for job in jobs for r in table.look_up([job])}
        left = [job for job in jobs if identity(job, tuple(job)) not in found]
        for record in regime.train(left, folder) if left else ():
            yield record
            found[identity(record, tuple(jobs[0]))] = record
            if stop():
                return
        results += [found[identity(job, tuple(job))] for job in jobs]


def _in_processes(
    regime: Regime,
    units: Sequence[str],
    stored: Sequence[Record],
    folder: pathlib.Path,
    stop: Callable[[], bool],
    processes: int,
) -> Iterator[tuple[str, Record]]:
    context = multiprocessing.get_context("spawn")
    tasks, done, halt = context.Queue(), context.Queue(), context.Event()
    for unit in [*units, *([None] * processes)]:
        tasks.put(unit)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    workers = []
    for i in range(processes):
        core = cores[i % len(cores)] if cores else None
        arguments = (regime, stored, folder, tasks, done, halt, core, os.getpid())
        workers.append(context.Process(target=_serve, args=arguments, daemon=True))
        workers[-1].start()
    working = processes
    try:
        while working:
            if stop():
                halt.set()
            try:
                unit, record = done.get(timeout=PATIENCE)
            except queue.Empty:
                broken = [w for w in workers if w.exitcode not in (None, 0)]
                if broken:
                    raise UserError(
                        f"A process that trains ended with {broken[0].exitcode}; see above. Everything that had ended"
                        " is kept, and the same command goes on. With too little memory, use --processes 1."
                    ) from None
                continue
            if unit is None:
                working -= 1
            else:
                yield unit, record
    finally:
        halt.set()
        for worker in workers:
            worker.join(timeout=60)
            if worker.is_alive():
                worker.terminate()


def _serve(
    regime: Regime,
    stored: Sequence[Record],
    folder: pathlib.Path,
    tasks: Any,
    done: Any,
    halt: Any,
    core: int | None,
    parent: int,
) -> None:
    """One process: takes units until there are none, or until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    if core is not None:  # before the first computation, which decides how many threads there are
        os.sched_setaffinity(0, {core})

    def stop() -> bool:
        return halt.is_set() or os.getppid() != parent

    while (unit := tasks.get()) is not None and not stop():
        for record in _unit(regime, unit, stored, folder, stop):
            done.put((unit, record))
    done.put((None, None))
