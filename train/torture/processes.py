"""What is done to a run of two processes: one of them is asked to end, or killed."""

import pathlib
import signal
from collections.abc import Callable
from typing import Any

from train.torture.runs import (
    INTERVAL,
    Life,
    Place,
    free_address,
    last_step,
    losses,
    saved,
    started_at,
)

STEPS = 6 * INTERVAL


def pair(place: Place, name: str) -> list[Life]:
    """Both processes of a run, each with one device."""
    join = ["--coordinator", free_address(), "--processes", "2", "--process"]
    flags = place.flags(name, STEPS, "--mesh.data", "1", "--mesh.fsdp", "2")
    return [
        Life([*flags, *join, str(number)], place.folder / f"{name}-{number}.log")
        for number in range(2)
    ]


def interrupted(place: Place, run: pathlib.Path, number: int, after: int) -> list[int]:
    """Sends a signal to the second process after some steps; the exit codes of both."""
    first, second = pair(place, run.name)
    starts = len(started_at(run))
    if first.until(lambda: len(started_at(run)) > starts and last_step(run) > after):
        second.process.send_signal(number)
    return [first.end(), second.end()]


def two_processes(place: Place, say: Callable[[str], None]) -> dict[str, Any]:
    """A run of two processes whose second one is asked to end, then killed, and which then goes on."""
    run, expected = place.run("processes"), losses(place.run("clean"))
    asked = interrupted(place, run, signal.SIGTERM, INTERVAL)
    stopped, kept = last_step(run), saved(run)
    say(f"two processes: SIGTERM to the second, exit codes {asked}, step {stopped}")
    killed = interrupted(place, run, signal.SIGKILL, stopped + INTERVAL)
    before = last_step(run)
    say(f"two processes: kill -9 of the second, exit codes {killed}, step {before}")
    codes = [life.end() for life in pair(place, run.name)]
    seen, starts = losses(run), started_at(run)
    say(f"two processes: gone on from step {starts[-1]}, exit codes {codes}")
    whole = sorted(seen) == list(range(1, STEPS + 1))
    return {
        "saved_on_SIGTERM": asked == [0, 128 + signal.SIGTERM] and kept[-1:] == [stopped],
        "ended_after_kill": killed[1] == -signal.SIGKILL and killed[0] != 0,
        "steps_lost": before - starts[-1],
        "gone_on": codes == [0, 0],
        "largest_difference": max(abs(seen[n] / expected[n] - 1) for n in seen)
        if whole
        else float("inf"),
    }
