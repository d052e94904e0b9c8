"""Reliability tests of real runs in separate processes: kills, signals, changed devices, a full disk.

All tests train the same toy run, so that every loss can be compared with that of an undisturbed run.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from train.run.folder import ROOT
from train.run.log import read_records

TOY = (
    *("--model.preset", "toy", "--model.width", "16", "--model.mlp_width", "20"),
    *("--model.layers", "2", "--model.heads", "2", "--model.kv_heads", "1"),
    *("--data.tokenizer", "bytes", "--data.length", "12", "--data.batch_size", "8"),
    *("--run.tensorboard", "False", "--optimizer.schedule", "constant"),
    *("--optimizer.schedule.warmup_steps", "10"),
)
INTERVAL = 5  # steps between two checkpoints
PATIENCE = 600.0  # seconds after which a process counts as stuck


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folder that holds the runs of one test."""

    folder: pathlib.Path

    def flags(self, name: str, steps: int, *more: str) -> list[str]:
        """Command-line flags of the toy run, in a run folder with this name."""
        text = ["--data.text", str(self.folder / "text.txt")]
        cache = ["--data.cache", str(self.folder / "cache")]
        every = ["--run.save_every", str(INTERVAL), "--run.eval_every", str(4 * INTERVAL)]
        own = ["--run.steps", str(steps), "--run.keep", "4", "--run.folder", str(self.run(name))]
        return [*TOY, *text, *cache, *every, *own, *more]

    def run(self, name: str) -> pathlib.Path:
        return self.folder / name

    def write_text(self) -> None:
        """Writes 30 kB of words with Zipf-like frequencies."""
        generator = random.Random(0)
        words = ["".join(generator.choices("abcdefghij", k=n % 7 + 1)) for n in range(50)]
        weights = [1 / (n + 1) for n in range(50)]
        text = " ".join(generator.choices(words, weights, k=7000))
        (self.folder / "text.txt").write_text(text)


class RunProcess:
    """One process of a run. Creating it starts the process."""

    def __init__(
        self,
        flags: list[str],
        log: pathlib.Path,
        devices: int = 1,
        largest_file: int | None = None,
        module: str = "train",
        patience: float = PATIENCE,
        platform: str = "cpu",
    ):
        variables = {k: v for k, v in os.environ.items() if k != "CI"}
        variables["XLA_FLAGS"] = re.sub(
            r"--xla_force_host_platform_device_count=\S*", "", variables.get("XLA_FLAGS", "")
        ).strip()  # XLA takes flags that start with a space for the name of a file
        cache = str(log.parent / "compiled")
        variables |= {"JAX_PLATFORMS": platform, "JAX_NUM_CPU_DEVICES": str(devices)}
        if platform != "cpu":  # several processes share the memory of one device
            variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
        variables.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        self.log, self._patience = log, patience
        self._begun = time.monotonic()
        self.since = time.time()
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    *(limited(largest_file) if largest_file else ()),
                    "-m",
                    module,
                    *flags,
                ],
                cwd=ROOT,
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def until(self, condition: Callable[[], Any]) -> bool:
        """Waits for a condition; returns False if the process ended first."""
        return any(condition() for _ in self.ticks())

    def ticks(self) -> Iterator[None]:
        while self.process.poll() is None:
            if time.monotonic() - self._begun > self._patience:
                self.process.kill()
                raise TimeoutError(
                    f"a process has not ended after {self._patience:.0f} s; see {self.log}"
                )
            yield
            time.sleep(0.002)

    def end(self) -> int:
        """Waits for the exit code."""
        for _ in self.ticks():
            time.sleep(0.02)
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_address() -> str:
    """A free local address for the coordinator of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def limited(size: int) -> list[str]:
    """Arguments that make Python run the arguments after them with a limit to the size of files [bytes]."""
    program = (
        "import os, resource, sys; size = int(sys.argv[1]);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (size, size));"
        " os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    return ["-c", program, str(size)]


def records(run: pathlib.Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_records(run / "metrics.jsonl") if record["kind"] == kind]


def losses(run: pathlib.Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run)}


def last_step(run: pathlib.Path) -> int:
    return max(losses(run), default=0)


def saving(run: pathlib.Path, since: float) -> bool:
    """Whether a save that began after a point in time is in flight; older ones are left over from a kill."""
    for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= since:
                return True
    return False


def saved(run: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def started_at(run: pathlib.Path) -> list[int]:
    """The step from which each start of a run continued."""
    path = run / "environment.json"
    return [start["start"] for start in json.loads(path.read_text())] if path.exists() else []


def clean(workspace: Workspace, steps: int) -> dict[int, float]:
    """Trains the undisturbed run; returns its losses."""
    running = RunProcess(workspace.flags("clean", steps), workspace.folder / "clean.log")
    if running.end() != 0:
        raise RuntimeError(f"the undisturbed run failed; see {running.log}")
    return losses(workspace.run("clean"))


def strike(
    running: RunProcess, run: pathlib.Path, generator: random.Random, startup: float
) -> bool:
    """Waits for a save (half of the time), a step, or a moment of the start; returns False if the process has ended."""
    starts = len(started_at(run))
    how = generator.choices(("save", "step", "start"), (5, 3, 2))[0]
    at = last_step(run) + generator.randrange(1, 2 * INTERVAL)
    end = time.monotonic() + generator.uniform(0, 1.2 * startup)
    match how:
        case "save":
            alive = running.until(lambda: last_step(run) >= at - INTERVAL)
            # Before the first save, the process has started and removed the files that a killed one left.
            alive = alive and running.until(lambda: len(started_at(run)) > starts)
            alive = alive and running.until(lambda: saving(run, running.since))
        case "step":
            alive = running.until(lambda: last_step(run) >= at)
        case _:
            alive = running.until(lambda: time.monotonic() > end)
    time.sleep(generator.uniform(0, 0.05))
    return alive and running.process.poll() is None


def kills(
    workspace: Workspace, count: int, steps: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Kills a run many times, restarts it each time, and lets it finish after the last time.

    Every loss that was ever written is compared with that of the undisturbed run.
    """
    generator, expected = random.Random(seed), losses(workspace.run("clean"))
    number, done, inside, wrong, failed = 1, 0, 0, 0, 0
    lost: list[int] = []
    begun, startup = time.monotonic(), 10.0
    while failed < 3:
        run = workspace.run(f"kills-{number}")
        before, starts, since = last_step(run), len(started_at(run)), time.monotonic()
        running = RunProcess(workspace.flags(run.name, steps), workspace.folder / "kills.log")
        if done < count and strike(running, run, generator, startup):
            in_flight = len(started_at(run)) > starts and saving(run, running.since)
            running.kill()
            done, inside = done + 1, inside + in_flight
        elif running.end() != 0:
            failed += 1
        else:
            startup = min(60.0, time.monotonic() - since)
        if starts and len(started_at(run)) > starts:
            lost.append(max(0, before - started_at(run)[-1]))
        seen = losses(run)
        wrong += sum(loss != expected[step] for step, loss in seen.items())
        say(f"kill {done} of {count}, {inside} inside a save; step {last_step(run)} of {steps}")
        if running.process.returncode == 0:
            wrong += len(expected) - len(seen)
            if done >= count:
                break
            number += 1
    return {
        "killed": done,
        "inside_a_save": inside,
        "runs": number,
        "wrong_losses": wrong,
        "failed_restarts": failed,
        "steps_lost_median": sorted(lost)[len(lost) // 2] if lost else 0,
        "steps_lost_most": max(lost, default=0),
        "seconds": round(time.monotonic() - begun),
    }


PHASES = ("compile", "warm-up", "step", "evaluation", "save")


def signals(
    workspace: Workspace, steps: int, number: int, say: Callable[[str], None]
) -> dict[str, str]:
    """Sends a signal to a run in each phase, then lets it continue; returns the outcome by phase."""
    steps = min(steps, 8 * INTERVAL)
    expected, outcomes = losses(workspace.run("clean")), {}
    expected = {step: expected[step] for step in range(1, steps + 1)}
    for phase in PHASES:
        run = workspace.run(f"signal-{number}-{phase}")
        # Longer evaluations, so that a signal can arrive in one. They do not change the training losses.
        flags = workspace.flags(run.name, steps, "--run.eval_batches", "40")
        running = RunProcess(flags, workspace.folder / "signals.log")

        def reached(
            run: pathlib.Path = run, phase: str = phase, running: RunProcess = running
        ) -> bool:
            at = last_step(run)
            match phase:
                case "compile":  # after the introduction, before the first record
                    return (run / "decay.txt").exists()
                case "warm-up":
                    return 0 < at < 10
                case "step":
                    return at > 2 * INTERVAL
                case "evaluation":  # due, but not recorded yet
                    return at >= 4 * INTERVAL and at // (4 * INTERVAL) >= len(
                        records(run, "held_out")
                    )
                case _:
                    return saving(run, running.since)

        met = running.until(reached)
        if met:
            running.process.send_signal(number)
        code, stopped, kept = running.end(), last_step(run), saved(run)
        again = RunProcess(flags, workspace.folder / "signals.log").end()
        if not met:
            outcomes[phase] = "not met"
        elif code != 128 + number or again != 0:
            outcomes[phase] = f"exit codes {code} and {again}"
        elif losses(run) != expected:
            outcomes[phase] = "wrong losses after the restart"
        else:
            outcomes[phase] = "saved" if kept and kept[-1] == stopped else "fell back"
        say(f"{signal.Signals(number).name} in {phase}: {outcomes[phase]}")
    return outcomes


def elastic(workspace: Workspace, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Continues one run on 8, 4, 1 and 8 devices; the largest relative difference of a loss."""
    expected, run = losses(workspace.run("clean")), workspace.run("elastic")
    counts, steps = (8, 4, 1, 8), min(steps, 8 * INTERVAL)
    for part, devices in enumerate(counts, 1):
        flags = workspace.flags(run.name, steps * part // len(counts))
        fixed = [] if part == 1 else ["--mesh.fsdp", str(min(2, devices))]
        if RunProcess([*flags, *fixed], workspace.folder / "elastic.log", devices).end() != 0:
            return {"devices": counts[:part], "failed": True}
        say(f"{devices} devices up to step {last_step(run)}")
    seen = losses(run)
    worst = max(abs(seen[step] / expected[step] - 1) for step in range(1, steps + 1))
    return {"devices": counts, "largest_difference": worst, "starts": started_at(run)}


def full_disk(workspace: Workspace) -> dict[str, Any]:
    """Trains with a limit to the size of files, so that checkpoints do not fit, and then without it."""
    run, expected = workspace.run("full"), losses(workspace.run("clean"))
    flags = workspace.flags(run.name, 2 * INTERVAL)
    refused = RunProcess(flags, workspace.folder / "full.log", largest_file=16_000).end()
    output = (workspace.folder / "full.log").read_text()
    code = RunProcess(flags, workspace.folder / "full.log").end()
    seen = losses(run)
    return {
        "refused": refused == 2 and "could not be written" in output and "Make room" in output,
        "equal": code == 0 and all(seen[n] == expected[n] for n in range(1, 2 * INTERVAL + 1)),
    }


def second_run(workspace: Workspace) -> dict[str, Any]:
    """Starts a second run on a folder in use, and a third one after the first was killed."""
    run, log = workspace.run("shared"), workspace.folder / "shared.log"
    flags = workspace.flags(run.name, 100_000)
    first = RunProcess(flags, workspace.folder / "shared-first.log")
    met = first.until(lambda: last_step(run) > 0)
    refused = RunProcess(flags, log).end()
    alive = first.process.poll() is None
    first.kill()
    third = RunProcess(flags, log)
    at = last_step(run)
    free = third.until(lambda: last_step(run) > at)
    third.kill()
    output = log.read_text()
    return {
        "refused": met and alive and refused == 2 and "in use by another run" in output,
        "free": free,
    }
