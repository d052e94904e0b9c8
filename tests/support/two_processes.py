"""Runs of two processes on this machine, one after the other in the same pair: connecting and importing cost most.

    python -m tests.support.two_processes FOLDER --coordinator HOST:PORT --processes 2 --process I

Each process writes FOLDER/said-I.json: of every run the exit code, and what was printed.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest

from tests.support.runs import flags, interrupt_after
from train import __main__ as command
from train import main, processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRID = ["--mesh.data", "2", "--mesh.fsdp", "4"]
SPARE = ["--run.eval_batches", "1", "--optimizer.clip", "None"]
ONE_BIT = ["--optimizer.name", "one_bit_adam", "--optimizer.freeze", "3", "--run.save_every", "4"]
WORKERS = ["--mesh.replica", "2", "--mesh.data", "1", "--mesh.fsdp", "4"]
STOP, STEPS = 4, 6


def runs(folder: pathlib.Path) -> dict[str, list[str]]:
    """Name to arguments, in their order."""

    def own(name: str, *more: str) -> list[str]:
        return flags(folder, *SPARE, *more, "--run.folder", str(folder / name))

    # The schedule is that of the other runs, which end at STEPS.
    endless = ["--run.steps", "1000", "--run.eval_every", "1000", "--run.save_every", "1000"]
    return {
        "refused": own("taken", *GRID),
        "stopped": own("stopped", *GRID, *endless, "--optimizer.schedule.steps", str(STEPS)),
        "whole": own("whole", *ONE_BIT, *WORKERS),
        "resumed": ["--resume", str(folder / "resumed")],
    }


def cut(folder: pathlib.Path) -> str:
    """A copy of the whole run as it was after step 4, in the compressed phase."""
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(folder / f"resumed/checkpoints/{STEPS}")
    return ""


def unobserved(assemble: Callable[..., Any], *arguments: Any) -> Any:
    """A program that looks at no weights: what looks costs as much to compile as the step."""
    return dataclasses.replace(assemble(*arguments), look=lambda *_: {"hidden": {}})


def work(folder: pathlib.Path, join: list[str]) -> dict[str, tuple[int, str]]:
    assert processes.join(["rest", *join]) == ["rest"]
    seen = {}
    for name, arguments in runs(folder).items():
        said = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            patch.setattr(main.figures, "draw", lambda *_: [])
            if name != "stopped":
                patch.setattr(main, "assemble", functools.partial(unobserved, main.assemble))
            if name == "stopped" and not processes.first():
                interrupt_after(patch, STOP, signal.SIGTERM)
            if name == "resumed":
                processes.from_first(lambda: cut(folder))
            seen[name] = (command.main(arguments), said.getvalue())
    return seen


def start(folder: pathlib.Path) -> list[dict[str, tuple[int, str]]]:
    """What both processes have seen; four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Only the first process writes the compilation cache, and the second's keys are its own: it compiles everything.
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "COLUMNS": "120",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    module = [sys.executable, "-m", "tests.support.two_processes", str(folder)]
    join = ["--coordinator", address, "--processes", "2", "--process"]
    both = [
        subprocess.Popen(
            [*module, *join, str(i)],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=500)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"said-{i}.json").read_text()) for i in range(2)]


if __name__ == "__main__":
    place = pathlib.Path(sys.argv[1])
    result = work(place, sys.argv[2:])
    (place / f"said-{jax.process_index()}.json").write_text(json.dumps(result))
