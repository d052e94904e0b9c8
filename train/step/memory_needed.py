"""The least memory that a run needs, held against what is there before anything of it is allocated."""

import math
from typing import Any

import jax

from train import memory
from train.errors import UserError
from train.step import families
from train.step.program import Program

ADVICE = (
    "Nearest: a smaller --data.batch_size or --data.length, more --run.micro_batches, a smaller model, or weights split"
    " over more devices with --mesh.fsdp. `python -m train plan` with the same flags says more."
)


def size(program: Program, part: str) -> int:
    """Bytes of a part of the state on one device."""
    pairs = zip(jax.tree.leaves(program.shapes[part]), jax.tree.leaves(program.shardings[part]))
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def least(program: Program) -> dict[str, int]:
    """Bytes on one device that no implementation could do without, by what they are."""
    state = {part: size(program, part) for part in program.shapes}
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.task.batch))
    spread = math.prod(n for name, n in program.mesh.shape.items() if name != "tensor")
    return {
        "weights": state.pop("params"),
        "state of optimizer and decay": sum(state.values()),
        "gradients": size(program, "params"),
        "a batch": batch // spread,
        "inputs of the layers": _inputs(program) // spread,
    }


def _inputs(program: Program) -> int:
    """Bytes of what the layers of one micro batch take in, which the backward pass needs in any case."""
    model, config = program.model, program.config
    positions = config.data.length
    if families.task(config.model.preset) == "images":
        positions = (model.image_size // model.patch_size) ** 2
    rows = config.data.batch_size // config.run.micro_batches
    return rows * positions * model.layers * model.width * (2 if model.dtype == "bfloat16" else 4)


def check(program: Program) -> None:
    """Raises UserError if the least that a run needs is more than there is, or on a CPU than other programs leave."""
    needed = least(program)
    total = sum(needed.values())
    largest = max(needed, key=lambda name: needed[name])
    what = f"this run, {memory.gigabytes(needed[largest])} of it for {largest},"
    devices = [d for d in program.mesh.devices.flat if d.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        there, free, where = memory.of_host(), memory.free(), "in this machine"
        total *= len(devices)
    else:
        stats: dict[str, Any] = devices[0].memory_stats() or {}
        there, free, where = stats.get("bytes_limit"), None, "in each device"
    if there is not None and total > there:
        raise UserError(memory.too_large(total, there, what, ADVICE, where))
    if free is not None and total > free:
        where += ", and other programs use the rest"
        raise UserError(memory.too_large(total, free, what, ADVICE, where))
