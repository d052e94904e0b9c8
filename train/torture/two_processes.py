"""Reliability tests of a run in two processes: one of them receives SIGTERM, is killed, or does not come."""

import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

from train.torture.runs import (
    INTERVAL,
    RunProcess,
    Workspace,
    free_address,
    last_step,
    losses,
    saved,
    started_at,
)

STEPS = 6 * INTERVAL


def pair(workspace: Workspace, name: str) -> list[RunProcess]:
    """Starts both processes of a run, each with one device."""
    join = ["--coordinator", free_address(), "--processes", "2", "--process"]
    flags = workspace.flags(name, STEPS, "--mesh.data", "1", "--mesh.fsdp", "2")
    return [
        RunProcess([*flags, *join, str(number)], workspace.folder / f"{name}-{number}.log")
        for number in range(2)
    ]


def interrupted(workspace: Workspace, run: pathlib.Path, number: int, after: int) -> list[int]:
    """Sends a signal to the second process after some steps; returns the exit codes of both."""
    first, second = pair(workspace, run.name)
    starts = len(started_at(run))
    if first.until(lambda: len(started_at(run)) > starts and last_step(run) > after):
        second.process.send_signal(number)
    return [first.end(), second.end()]


def survivor(workspace: Workspace, dies: int) -> dict[str, Any]:
    """Kills one of two processes in the middle of a run; how the other ends."""
    name = f"survivor-{dies}"
    both = pair(workspace, name)
    other = both[1 - dies]
    met = both[dies].until(lambda: last_step(workspace.run(name)) > 0)
    both[dies].kill()
    begun = time.monotonic()
    code = other.end()
    text = other.log.read_text()
    return {
        "code": code,
        "seconds": time.monotonic() - begun,
        "named": met and f"Process {dies} of 2 has ended before its work was done" in text,
        "stack": "Traceback" in text or "stack trace" in text,
    }


def absent(workspace: Workspace, number: int) -> dict[str, Any]:
    """Starts one of two processes alone; how it ends."""
    join = ["--coordinator", free_address(), "--processes", "2", "--process", str(number)]
    log = workspace.folder / f"absent-{1 - number}.log"
    flags = workspace.flags(f"absent-{1 - number}", STEPS, *join, "--connect_seconds", "5")
    running, begun = RunProcess(flags, log), time.monotonic()
    code, text = running.end(), log.read_text()
    wanted = "Process 1 of 2 did not arrive" if number == 0 else "cannot reach process 0 at"
    return {
        "code": code,
        "seconds": time.monotonic() - begun,
        "named": wanted in text,
        "stack": "Traceback" in text or "stack trace" in text,
    }


def two_processes(workspace: Workspace, say: Callable[[str], None]) -> dict[str, Any]:
    """Stops the second of two processes by SIGTERM, restarts the run, kills the second, and lets the run finish."""
    run, expected = workspace.run("processes"), losses(workspace.run("clean"))
    terminated = interrupted(workspace, run, signal.SIGTERM, INTERVAL)
    stopped, kept = last_step(run), saved(run)
    say(f"two processes: SIGTERM to the second, exit codes {terminated}, step {stopped}")
    killed = interrupted(workspace, run, signal.SIGKILL, stopped + INTERVAL)
    before = last_step(run)
    say(f"two processes: kill -9 of the second, exit codes {killed}, step {before}")
    codes = [running.end() for running in pair(workspace, run.name)]
    seen, starts = losses(run), started_at(run)
    say(f"two processes: continued from step {starts[-1]}, exit codes {codes}")
    whole = sorted(seen) == list(range(1, STEPS + 1))
    return {
        "saved_on_SIGTERM": terminated == [0, 128 + signal.SIGTERM] and kept[-1:] == [stopped],
        "ended_after_kill": killed[1] == -signal.SIGKILL and killed[0] != 0,
        "steps_lost": before - starts[-1],
        "continued": codes == [0, 0],
        "largest_difference": max(abs(seen[n] / expected[n] - 1) for n in seen)
        if whole
        else float("inf"),
    }
