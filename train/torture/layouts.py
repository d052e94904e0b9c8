"""What optimizers and decays compute on other numbers of devices and processes, against one device.

All of the trainer's optimizers but one_bit_adam, to whose result the number of replicas belongs.

    python -m train.torture.layouts FOLDER [--coordinator HOST:PORT --processes N --process I]

is one process of it: eight devices of one process, or of several, work through the layouts of their number.
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
from train.torture.runs import Life, Place, free_address

STEPS, DEVICES = 6, 8
REFRESH = ("--optimizer.refresh_every", "2")
SPECTRAL = (
    *("--decay.spectrum.refresh_every", "2", "--decay.spectrum.min_eigenvalues", "2"),
    "--decay.spectrum.score",
)
THRESHOLD, DECAY = "--decay.threshold", "--decay"
WEAK = ("--decay.weight_decay", "0.03", "--decay.coupling")  # not times a rate of 0.003

# So strong that six steps tell one decay from another, and none from any.
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
    "threshold ema": (THRESHOLD, "ema"),
    "threshold 0.02": (THRESHOLD, "0.02"),
    "cautious": ("--decay.form", "cautious"),
    "proximal": ("--decay.form", "proximal"),
    "coupling schedule": (*WEAK, "schedule"),
    "coupling corrected": ("--decay.weight_decay", "5", "--decay.coupling", "corrected"),
    "coupling none": (*WEAK, "none"),
    "every role": ("--decay.mask", "hidden", "head", "embedding", "vector"),
    "alpha": (*SPECTRAL, "alpha"),
    "alphahat": (*SPECTRAL, "alphahat"),
    "stable_rank": (*SPECTRAL, "stable_rank"),
    "entropy": (*SPECTRAL, "entropy"),
    "fnorm": (*SPECTRAL, "fnorm"),
    "gradnorm": (*SPECTRAL, "gradnorm"),
    "width": ("--width.base", "8"),
    "alpha x cautious": (*SPECTRAL, "alpha", "--decay.form", "cautious"),
}
SETTINGS = OPTIMIZERS | DECAYS
NOTHING = ("--decay.weight_decay", "0", DECAY, "l2")

# Number of processes to grids, data x fsdp x tensor; the first of all is what the others are compared with.
GRIDS = {1: ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)), 2: ((2, 4, 1),)}


def name_of(count: int, grid: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, grid))} in {count}"


def steps(flags: list[str]) -> dict[str, Any]:
    """The losses of some steps, and a digest of what they learnt from."""
    config = parse(flags)
    program = main.assemble(config, main.load(config))
    state, losses, seen = program.init(jax.random.key(0)), [], hashlib.sha256()
    for index in range(STEPS):
        batch = program.batch(index)
        state, noted = program.update(state, batch)
        losses.append(float(noted["loss"]))
        whole = multihost_utils.process_allgather(batch, tiled=True)
        seen.update(np.ascontiguousarray(whole).tobytes())
    return {"losses": losses, "batches": seen.hexdigest()}


def work(folder: pathlib.Path, settings: dict[str, tuple[str, ...]]) -> None:
    """All settings on all grids of so many processes; the first of them writes what came out."""
    count, place, found = jax.process_count(), Place(folder), {}
    for grid in GRIDS[count]:
        axes = zip(("data", "fsdp", "tensor"), grid)
        mesh = [part for name, size in axes for part in (f"--mesh.{name}", str(size))]
        here = found.setdefault(name_of(count, grid), {})
        for name, own in settings.items():
            here[name] = steps(place.flags("layouts", STEPS, *STRONG, *own, *mesh))
            jax.clear_caches()
            if processes.first():
                print(f"{name} on {name_of(count, grid)}: {here[name]['losses'][-1]}", flush=True)
    if processes.first():
        (folder / f"layouts-{count}.json").write_text(json.dumps(found))


def layouts(place: Place, say: Callable[[str], None]) -> dict[str, Any]:
    """The largest relative difference of a loss from one device's by layout, and where it was."""
    found: dict[str, Any] = {}
    for count in GRIDS:
        join = ["--coordinator", free_address(), "--processes", str(count), "--process"]
        lives = [
            Life(
                [str(place.folder), *([*join, str(number)] if count > 1 else [])],
                place.folder / f"layouts-{count}-{number}.log",
                DEVICES // count,
                module="train.torture.layouts",
                patience=3600,
            )
            for number in range(count)
        ]
        if any([life.end() for life in lives]):
            return {"failed": str(lives[0].log)}
        found |= json.loads((place.folder / f"layouts-{count}.json").read_text())
        say(f"{len(SETTINGS)} settings on {len(GRIDS[count])} grids in {count} processes")
    return compared(found)


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each layout with the first one, and each setting with no decay."""
    alone, *_ = found.values()
    without = np.array(alone["none"]["losses"])
    effects = {
        name: float(np.max(np.abs(np.array(seen["losses"]) / without - 1)))
        for name, seen in alone.items()
        if name in DECAYS
    }
    worst: dict[str, Any] = {}
    for layout, settings in found.items():
        apart = {
            name: float(np.max(np.abs(np.array(seen["losses"]) / alone[name]["losses"] - 1)))
            for name, seen in settings.items()
        }
        name = max(apart, key=lambda name: apart[name])
        worst[layout] = {"difference": apart[name], "of": name}
    batches = {seen["batches"] for settings in found.values() for seen in settings.values()}
    return {
        "largest": worst,
        "settings": len(alone),
        "orders_of_data": len(batches),
        "least_effect_of_a_decay": min(effects.values()),
    }


if __name__ == "__main__":
    rest = processes.join(sys.argv[1:])
    work(pathlib.Path(rest[0]), {"none": NOTHING} | SETTINGS)
