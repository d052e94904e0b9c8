"""Benchmarks many runs side by side in one program against runs one after the other (train/study/population.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.bench.table import Options, Table, best_times
from train.step.families import of
from train.study.population import side_by_side
from train.study.small_runs import Compiled, Numbers, SmallProgram, SmallTask, compiled, numbers
from train.study.width.runs import adamw

VOCABULARY = 257  # bytes, and the end of a document
# On CPUs the model of the comparison's CPU tier; on accelerators one of 1.24M weights with 4096 tokens a step.
TASKS = {
    "cpu": SmallTask(chunk=10),
    "accelerator": SmallTask(
        width=160,
        mlp_width=432,
        layers=4,
        heads=5,
        length=128,
        batch_size=32,
        dtype="bfloat16",
        chunk=50,
    ),
}
COUNTS = {"cpu": (1, 2, 4), "accelerator": (1, 8, 24, 48)}


def population_table(options: Options) -> Table:
    """Tokens per second of all members together, against the number of members."""
    backend = jax.default_backend()
    kind = "cpu" if backend == "cpu" else "accelerator"
    task = TASKS[kind]
    model = task.model(VOCABULARY)
    program = SmallProgram(task, model, adamw)
    runs = {"one by one": _chunk(compiled(program), task, None)}
    device = (jax.local_devices()[0],)
    for count in COUNTS[kind]:
        runs[f"{count} side by side"] = _chunk(side_by_side(program, device), task, count)
    cpu, wall = best_times(options.rounds, runs)
    rows: list[dict[str, Any]] = []
    for name in runs:
        members = 1 if name == "one by one" else int(name.split()[0])
        tokens = members * task.chunk * task.batch_size * task.length
        rows.append(
            {
                "members": name,
                "ms / step of all": 1e3 * wall[name] / task.chunk,
                "tokens/s": tokens / wall[name],
                "CPU ms / step of one": 1e3 * cpu[name] / task.chunk / members,
            }
        )
    for row in rows:
        row["/ one by one"] = row["tokens/s"] / rows[0]["tokens/s"]
    return Table(
        f"A population with AdamW: {of(model).count(model) / 1e6:.2f}M weights a member, {task.batch_size} x"
        f" {task.length} tokens a step, {task.dtype}; wall time",
        rows,
        "tokens/s counts the tokens of all members. train/study/population.py trains side by side on accelerators"
        " only.",
    )


def _chunk(runs: Compiled, task: SmallTask, members: int | None) -> Callable[[], Any]:
    """A function that trains a chunk of steps; `members` side by side, or one run alone."""
    shape = (task.chunk, *(() if members is None else (members,)), task.batch_size, task.length + 1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32))
    own: Numbers = numbers(1e-3, 0.1, 10**6, 0)
    if members is not None:
        own = numbers([1e-3] * members, [0.1] * members, 10**6, list(range(members)))
    carry = [runs.init(own)]

    def run() -> Any:
        carry[0], losses = runs.advance(carry[0], own, tokens)
        return losses

    return run
