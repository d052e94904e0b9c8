"""Compares the losses of optimizers and decays on several devices and processes with those on one device.

The comparison covers all of the trainer's optimizers except one_bit_adam, whose result depends on the number of
replicas.

    python -m train.torture.layouts FOLDER [--coordinator HOST:PORT --processes N --process I]

runs one process of the comparison. Its processes have eight devices together, and train on every layout for their
number of processes.
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train import main, processes
from train.cli import parse
from train.torture.runs import RunProcess, Workspace, free_address

STEPS, DEVICES = 6, 8
REFRESH = ("--optimizer.refresh_every", "2")
SPECTRAL = (
    *("--decay.spectrum.refresh_every", "2", "--decay.spectrum.min_eigenvalues", "2"),
    "--decay.spectrum.score",
)
THRESHOLD, DECAY = "--decay.threshold", "--decay"
WEAK = ("--decay.weight_decay", "0.03", "--decay.coupling")  # not times a rate of 0.003

# Strong enough that six steps distinguish every decay from the others, and from no decay.
STRONG = ("--decay.weight_decay", "10", "--optimizer.schedule.warmup_steps", "1")
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adam": (),
    "lion": ("--optimizer", "lion", "--optimizer.learning_rate", "1e-3"),
    "exadam": ("--optimizer", "exadam"),
    "conda": ("--optimizer", "conda", *REFRESH),
    "root": ("--optimizer", "root"),
    "sophia": ("--optimizer", "sophia", *REFRESH),
}
DECAYS: dict[str, tuple[str, ...]] = {
    "l2": (DECAY, "l2"),
    "l1": (DECAY, "l1", "--decay.weight_decay", "0.1"),
    "pseudo_huber": (DECAY, "pseudo_huber"),
    "log_cosh": (DECAY, "log_cosh"),
    "fair": (DECAY, "fair"),
    "threshold rms": (THRESHOLD, "rms"),
    "threshold running_mean": (THRESHOLD, "running_mean"),
    "threshold 0.02": (THRESHOLD, "0.02"),
    "cautious": ("--decay.form", "cautious"),
    "proximal": ("--decay.form", "proximal"),
    "coupling schedule": (*WEAK, "schedule"),
    "coupling corrected": ("--decay.weight_decay", "5", "--decay.coupling", "corrected"),
    "coupling none": (*WEAK, "none"),
    "every role": ("--decay.mask", "hidden", "head", "embedding", "vector"),
    "alpha": (*SPECTRAL, "hill"),
    "alphahat": (*SPECTRAL, "alphahat"),
    "stable_rank": (*SPECTRAL, "stable_rank"),
    "entropy": (*SPECTRAL, "entropy"),
    "frobenius_norm": (*SPECTRAL, "frobenius_norm"),
    "gradient_norm": (*SPECTRAL, "gradient_norm"),
    "width": ("--width.base", "8"),
    "alpha x cautious": (*SPECTRAL, "hill", "--decay.form", "cautious"),
}
SETTINGS = OPTIMIZERS | DECAYS
NOTHING = ("--decay.weight_decay", "0", DECAY, "l2")

# Number of processes to grids, data x fsdp x tensor. The first grid is the reference for all others.
GRIDS = {1: ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)), 2: ((2, 4, 1),)}


def name_of(count: int, grid: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, grid))} in {count}"


def steps(flags: list[str]) -> dict[str, Any]:
    """The losses of some steps, and a digest of what they learnt from."""
    config = parse(flags)
    run = main.assemble(config, main.read_data(config))
    state, losses, digest = run.program.init(jax.random.key(0)), [], hashlib.sha256()
    for index in range(STEPS):
        batch = run.batch(index)
        state, noted = run.program.update(state, batch)
        losses.append(float(noted["loss"]))
        whole = multihost_utils.process_allgather(batch, tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return {"losses": losses, "batches": digest.hexdigest()}


def work(folder: pathlib.Path, settings: dict[str, tuple[str, ...]]) -> None:
    """Trains with all settings on all grids for this number of processes; the first process writes the results."""
    count, workspace, results = jax.process_count(), Workspace(folder), {}
    for grid in GRIDS[count]:
        axes = zip(("data", "fsdp", "tensor"), grid)
        mesh = [part for name, size in axes for part in (f"--mesh.{name}", str(size))]
        here = results.setdefault(name_of(count, grid), {})
        for name, own in settings.items():
            here[name] = steps(workspace.flags("layouts", STEPS, *STRONG, *own, *mesh))
            jax.clear_caches()
            if processes.first():
                print(f"{name} on {name_of(count, grid)}: {here[name]['losses'][-1]}", flush=True)
    if processes.first():
        (folder / f"layouts-{count}.json").write_text(json.dumps(results))


def compare_layouts(workspace: Workspace, say: Callable[[str], None]) -> dict[str, Any]:
    """The largest relative difference of a loss from that on one device, by layout, and its setting."""
    results: dict[str, Any] = {}
    for count in GRIDS:
        join = ["--coordinator", free_address(), "--processes", str(count), "--process"]
        started = [
            RunProcess(
                [str(workspace.folder), *([*join, str(number)] if count > 1 else [])],
                workspace.folder / f"layouts-{count}-{number}.log",
                DEVICES // count,
                module="train.torture.layouts",
                patience=3600,
            )
            for number in range(count)
        ]
        if any([running.end() for running in started]):
            return {"failed": str(started[0].log)}
        results |= json.loads((workspace.folder / f"layouts-{count}.json").read_text())
        say(f"{len(SETTINGS)} settings on {len(GRIDS[count])} grids in {count} processes")
    return compared(results)


def compared(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compares each layout with the first one, and each decay with none."""
    alone, *_ = results.values()
    without = np.array(alone["none"]["losses"])
    effects = {
        name: float(np.max(np.abs(np.array(run["losses"]) / without - 1)))
        for name, run in alone.items()
        if name in DECAYS
    }
    worst: dict[str, Any] = {}
    for layout, settings in results.items():
        apart = {
            name: float(np.max(np.abs(np.array(run["losses"]) / alone[name]["losses"] - 1)))
            for name, run in settings.items()
        }
        name = max(apart, key=lambda name: apart[name])
        worst[layout] = {"difference": apart[name], "of": name}
    batches = {run["batches"] for settings in results.values() for run in settings.values()}
    return {
        "largest": worst,
        "settings": len(alone),
        "orders_of_data": len(batches),
        "least_effect_of_a_decay": min(effects.values()),
    }


if __name__ == "__main__":
    rest = processes.join(sys.argv[1:])
    work(pathlib.Path(rest[0]), {"none": NOTHING} | SETTINGS)
