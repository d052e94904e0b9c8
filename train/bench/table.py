"""Shared parts of the benchmarks: their options, tables of numbers, and timing in turns."""

import dataclasses
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax

from train.errors import UserError, nearest
from train.step import families


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all benchmarks."""

    preset: str = "60M"
    """Language model whose shapes are used; a name as for --model.preset."""
    layout: Literal["layers", "stacked"] = "layers"
    """Whether the optimizers' tables use one leaf per layer, or one stacked leaf for all layers."""
    only: tuple[str, ...] = ()
    """Rows of the optimizers' tables to measure; default all."""
    rounds: int = 5
    """Number of times that everything is timed; the best time counts."""
    tokens: int = 2048
    """Size of the batch in a training step [tokens]."""
    training_steps: int = 300
    """Steps that the model of the section accuracy-trained is trained for."""
    megatokens: int = 100
    """Size of the token store in the sections loader and loader-step [million tokens, of two bytes]."""
    text: str = "stdlib"
    """Text that the section loader reads beside a token store; as for --data.text."""
    tokenizer: str = "bpe-4096"
    """Tokenizer of this text; as for --data.tokenizer."""
    out: str | None = None
    """JSON file for the tables and a description of the machine."""

    def __post_init__(self) -> None:
        known = [name for name in families.PRESETS if families.task(name) == "language"]
        if self.preset not in known:
            raise UserError(
                f"--preset {self.preset} is not a language model; nearest: {nearest(self.preset, known)}."
                f" Allowed are {', '.join(known)}."
            )
        for name in ("rounds", "tokens", "training_steps", "megatokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1; nearest: 1.")

    def chosen(self, rows: Iterable[str]) -> list[str]:
        """The rows of a table that --only selects.

        Raises:
            UserError: --only names a row that the table does not have.
        """
        rows = list(rows)
        for name in self.only:
            if name not in rows:
                raise UserError(
                    f"--only {name!r} is not a row of this table; nearest: {nearest(name, rows)!r}."
                    f" Allowed are {', '.join(rows)}."
                )
        return [name for name in rows if not self.only or name in self.only]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of numbers. All rows have the same columns, whose names contain the units.

    Attributes:
        title: the measured quantity and its subject.
        rows: column to value; the first column is the name of the row.
        note: explanation of the columns.
    """

    title: str
    rows: list[dict[str, Any]]
    note: str = ""

    def __str__(self) -> str:
        """The table as text. Column names are wrapped, so that a table fits into 80 columns."""
        columns = list(self.rows[0])
        heads = [name.replace(" /", "\u00a0/").split(" ") for name in columns]
        tall = max(map(len, heads))
        cells = [[(head + [""] * tall)[i] for head in heads] for i in range(tall)]
        cells += [[format_value(row[c]) for c in columns] for row in self.rows]
        wide = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            " ".join(
                cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in enumerate(zip(line, wide))
            ).rstrip()
            for line in cells
        ]
        lines.insert(tall, " ".join("-" * n for n in wide))
        notes = textwrap.wrap(self.note, 80)
        return "\n".join([*textwrap.wrap(self.title, 80), *lines, *notes])


def format_value(value: Any) -> str:
    """A number with three or four significant digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if value else "0"
    return str(value)


def best_times(
    rounds: int, runs: Mapping[str, Callable[[], Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Times functions in turns, after one call of each to warm up.

    Args:
        rounds: number of timed calls of each function; the best one counts.
        runs: functions by name.

    Returns:
        CPU time of all threads [s] and wall time [s], by name.
    """
    cpu, wall = {}, {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        cpu[name] = wall[name] = float("inf")
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time(), time.perf_counter()
            jax.block_until_ready(run())
            cpu[name] = min(cpu[name], time.process_time() - start[0])
            wall[name] = min(wall[name], time.perf_counter() - start[1])
    return cpu, wall
