"""What every benchmark shares: the options, a table of numbers, and times taken in turns."""

import dataclasses
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax

from train.config.fields import UserError, nearest
from train.step import families


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    preset: str = "60M"
    """Name of a language model, as for --model.preset, for its shapes."""
    layout: Literal["layers", "stacked"] = "layers"
    """Leaves of the optimizers' tables: one per layer, or one for all layers."""
    only: tuple[str, ...] = ()
    """Rows of the optimizers' tables; none: all."""
    rounds: int = 5
    """Timed runs of everything that is timed."""
    tokens: int = 2048
    """Per training step, where one is timed."""
    training_steps: int = 300
    """Of the model whose weights the section products-trained measures."""
    megatokens: int = 100
    """Size of the token store that the loader's tables read [million tokens]; each takes two bytes."""
    text: str = "stdlib"
    """That the loader's table reads beside a store, as for --data.text."""
    tokenizer: str = "bpe-4096"
    """Of this text, as for --data.tokenizer."""
    out: str | None = None
    """File for the tables and the machine's facts, as JSON."""

    def __post_init__(self) -> None:
        known = [name for name in families.PRESETS if families.task(name) == "language"]
        if self.preset not in known:
            raise UserError(
                f"--preset {self.preset} is not that of a language model; nearest: {nearest(self.preset, known)}."
                f" There are {', '.join(known)}."
            )
        for name in ("rounds", "tokens", "training_steps", "megatokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1.")

    def chosen(self, rows: Iterable[str]) -> list[str]:
        """Those of a table's rows that are asked for.

        Raises:
            UserError: another one is asked for.
        """
        rows = list(rows)
        for name in self.only:
            if name not in rows:
                raise UserError(
                    f"--only {name!r} is no row of this table; nearest: {nearest(name, rows)!r}."
                    f" There are {', '.join(rows)}."
                )
        return [name for name in rows if not self.only or name in self.only]


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers with a title; every row has the same columns, named with their units.

    Attributes:
        title: what was measured, on what.
        rows: column to value, the first column being the row's name.
        note: what a reader must know to read it.
    """

    title: str
    rows: list[dict[str, Any]]
    note: str = ""

    def __str__(self) -> str:
        """Column names are broken at their spaces, so that a table fits a terminal of 80 columns."""
        columns = list(self.rows[0])
        heads = [name.replace(" /", "\u00a0/").split(" ") for name in columns]
        tall = max(map(len, heads))
        cells = [[(head + [""] * tall)[i] for head in heads] for i in range(tall)]
        cells += [[text(row[c]) for c in columns] for row in self.rows]
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


def text(value: Any) -> str:
    """A number with three or four digits that say something."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if value else "0"
    return str(value)


def best_times(
    rounds: int, runs: Mapping[str, Callable[[], Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds of all threads, and wall seconds, of each: the best of `rounds`, in turns, after one call."""
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
