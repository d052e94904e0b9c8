"""The program of many small runs, compiled for a GPU that is not here: its kernels and their least time.

    python -m train plan population
    python -m train plan population --arm muon_huber --members 24 48 96 --kernels 20
    python -m train plan population --arm l2 --task.width 256 --task.mlp_width 688 --target h100

Members train side by side, as on an accelerator (train/study/population.py). Nothing runs: every number comes from the
compiled program and from the data sheet of the GPU (train/plan/kernel_model.py). Real kernels are slower. On an H200 a
population whose kernels need at least 4.2 ms by this model took 8.8 ms a step, and one with 6.7 ms took 10.7 ms.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
import tyro

from train.config.fields import UserError, nearest
from train.display import say
from train.plan import ahead_of_time, kernel_model
from train.plan.bytes_report import count, table
from train.plan.kernel_model import Kernel
from train.plan.main import DEVICES, Device, short
from train.step import families
from train.study.population import AXIS, advance_program
from train.study.regimes.arms import ARMS
from train.study.regimes.repeated_tiers import gpu
from train.study.small_runs import SmallProgram, SmallTask

VOCABULARY = 257  # bytes, and the end of a document
START = 2e-6  # seconds from one kernel to the next, about; short kernels are no faster


@dataclasses.dataclass(frozen=True)
class Options:
    """The runs, and the GPU."""

    members: tuple[int, ...] = (24,)
    """Numbers of members to compile programs for."""
    arm: str = "l2"
    """Optimizer and decay: a name in train/study/regimes/arms.py."""
    steps: int = 4000
    """Steps of every run; rare work such as new spectra follows from them."""
    target: Literal["h100", "h200"] = "h200"
    """The GPU."""
    devices: int = 1
    """GPUs that the members are split over, at most 8."""
    kernels: int = 0
    """Longest kernels to list, of the first number of members."""
    task: SmallTask = dataclasses.field(default_factory=lambda: gpu().task)
    """The model and its batch; those of python -m train compare repeated gpu."""

    def __post_init__(self) -> None:
        known = [name for name, row in ARMS.items() if row.workers == 1]
        if self.arm not in known:
            raise UserError(
                f"--arm {self.arm} is not one of {', '.join(known)}; nearest: {nearest(self.arm, known)}."
            )
        if not 1 <= self.devices <= 8:
            raise UserError(f"--devices {self.devices} must be 1 to 8, those of one machine.")
        for number in self.members:
            if number < 1 or number % self.devices:
                fitting = max(1, round(number / self.devices)) * self.devices
                raise UserError(
                    f"--members {number} must be a multiple of --devices {self.devices}; nearest: {fitting}."
                )
        if not self.members:
            raise UserError("--members: give one number or more, such as 24.")
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} must be at least 1; nearest: 1.")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled population on one device.

    Attributes:
        members: on all devices.
        usual: kernels of a step in which nothing rare is due.
        rare: kernels of a step in which everything is due; equal to `usual` without conditionals.
        conditions: number of conditionals.
        report: of the compiler.
        chunk: steps that the program holds.
    """

    members: int
    usual: list[Kernel]
    rare: list[Kernel]
    conditions: int
    report: ahead_of_time.Report
    chunk: int

    def least(self, device: Device, rare: bool = False) -> float:
        """Seconds of a step if every kernel ran at its limit."""
        found = self.rare if rare else self.usual
        return sum(k.least(device.flops, device.bandwidth) for k in found) / self.chunk

    @property
    def starts(self) -> float:
        """Kernels of a usual step."""
        return sum(k.times for k in self.usual) / self.chunk


def compiled(options: Options, members: int) -> Compiled:
    """Compiles the program of so many members.

    Raises:
        NotInstalled: the compiler of the GPU is not on this machine.
    """
    devices = tuple(ahead_of_time.devices(options.target)[: options.devices])
    task, row = options.task, ARMS[options.arm]
    # The mesh tells the models that they are traced for a GPU.
    with jax.set_mesh(jax.sharding.Mesh(np.array(devices), (AXIS,))):
        build = functools.partial(SmallProgram, task, task.model(VOCABULARY), row.build)
        program = build(curvature=row.curvature, steps=options.steps)
        shape = (task.batch_size, task.length + 1)
        lowered = advance_program(program, members, shape, options.steps, devices)
    seen = ahead_of_time.read(lowered, devices[0])
    usual, rare = (kernel_model.kernels(seen.text, rare) for rare in (False, True))
    conditions = kernel_model.conditions(seen.text)
    return Compiled(members, usual, rare, conditions, seen, min(options.steps, task.chunk))


def report(options: Options) -> str:
    """The tables of all programs."""
    task, device = options.task, DEVICES[options.target]
    found = [compiled(options, members) for members in options.members]
    model = task.model(VOCABULARY)
    weights = families.of(model).count(model)
    rows = [
        [
            "members",
            "kernels",
            "least ms",
            "tokens/s at most",
            f"with {1e6 * START:g} us a kernel",
            "temporary",
            "memory",
        ]
    ]
    for one in found:
        tokens = one.members * task.batch_size * task.length
        seconds = one.least(device)
        memory = one.report.arguments + one.report.temporary
        rows.append(
            [
                str(one.members),
                f"{one.starts:.0f}",
                short(1e3 * seconds),
                f"{tokens / seconds / 1e6:.1f}M",
                f"{tokens / (seconds + START * one.starts) / 1e6:.1f}M",
                count(one.report.temporary),
                count(memory),
            ]
        )
    parts = [
        f"{options.arm}: {weights / 1e6:.2f}M weights a member, {task.batch_size} x {task.length} tokens a step,"
        f" {task.dtype}; compiled for {options.devices} {device.name}",
        table(rows),
        "Kernels and milliseconds are those of one step on one device, memory that of one device. No kernel is faster"
        " than its bytes and operations allow; most are slower.",
    ]
    first = found[0]
    if first.conditions:
        parts.append(
            f"{first.conditions} condition{'s' if first.conditions > 1 else ''}: a step in which everything rare is"
            f" due takes {short(1e3 * first.least(device, rare=True))} ms at least."
        )
    parts.append(f"A step of {first.members} members by kind of kernel:\n{_kinds(first, device)}")
    if options.kernels:
        parts.append(_longest(first, device, options.kernels))
    return "\n\n".join(parts)


def _kinds(one: Compiled, device: Device) -> str:
    rows: dict[str, list[float]] = {}
    for kernel in one.usual:
        row = rows.setdefault(kernel.kind, [0.0, 0.0, 0.0])
        row[0] += kernel.times / one.chunk
        row[1] += 1e3 * kernel.least(device.flops, device.bandwidth) / one.chunk
        row[2] += kernel.times * kernel.bytes / one.chunk
    order = sorted(rows.items(), key=lambda item: -item[1][1])
    return table(
        [["kind", "kernels", "least ms", "bytes"]]
        + [[kind, f"{n:.0f}", f"{ms:.3f}", count(moved)] for kind, (n, ms, moved) in order]
    )


def _longest(one: Compiled, device: Device, number: int) -> str:
    def seconds(kernel: Kernel) -> Any:
        return kernel.least(device.flops, device.bandwidth) / one.chunk

    chosen = sorted(one.usual, key=seconds, reverse=True)[:number]
    return table(
        [["longest kernels", "least ms", "bytes", "from"]]
        + [[k.name, f"{1e3 * seconds(k):.4f}", count(k.bytes), k.source[-60:]] for k in chosen]
    )


def main(arguments: list[str]) -> int:
    """Prints the tables; returns the exit code."""
    name = "python -m train plan population"
    options = tyro.cli(
        Options, args=arguments, prog=name, description=__doc__, use_underscores=True
    )
    try:
        say(report(options))
    except ahead_of_time.NotInstalled as error:
        raise UserError(f"--target {options.target}: {error}.") from None
    return 0
