"""The time that a program spends in each kind of kernel, from JAX's profiler.

The profiler names the instruction of XLA's program that each kernel belongs to; the program's text says what the
instruction does and where in the training step it comes from (`train/plan/kernel_model.py`).
"""

import collections
import pathlib
import tempfile
from typing import Any

import jax

from train.plan import kernel_model


def kinds(step: Any, steps: int) -> dict[str, float]:
    """Seconds per step by kind of kernel; on a CPU, seconds of all threads.

    Args:
        step: performs a step when it is called, and has the compiled program as `text`.
        steps: to be profiled.
    """
    known = {k.name: described(k) for k in kernel_model.kernels(step.text)}
    found: collections.defaultdict[str, float] = collections.defaultdict(float)
    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([step() for _ in range(steps)])
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for name, seconds in events(path):
                found[known.get(name, "other")] += seconds / steps
    return dict(found)


def described(kernel: kernel_model.Kernel) -> str:
    """The kind of a kernel; of those of the loss and the optimizer, with the part of the step."""
    words = kernel.source.replace("(", "/").replace(")", "/").split("/")
    part = next((name for name in ("loss", "optimizer") if name in words), "")
    return f"{part}: {kernel.kind}" if part and kernel.kind != "attention" else kernel.kind


def events(path: pathlib.Path) -> list[tuple[str, float]]:
    """The instruction and the seconds of every kernel in a profile."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    found = []
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    found.append((str(name), event.duration_ns / 1e9))
    return found
