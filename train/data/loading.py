"""The data of a run, read by every process and the same in all."""

from typing import Any

import jax

from train import processes
from train.config.fields import Config, UserError
from train.step import tasks


def load(config: Config) -> Any:
    """The data of a config: text as tokens, or images."""
    # The first process fills the cache for all, and all must have read the same.
    task, data = tasks.of(config), []

    def digest() -> str:
        data.append(task.read(config))
        return data[0].digest

    wanted = processes.from_first(digest)
    if not data:
        data.append(task.read(config))
    if data[0].digest != wanted:
        raise UserError(
            f"Process {jax.process_index()} reads other {task.noun} than the first one: digest"
            f" {data[0].digest[:16]} instead of {wanted[:16]}."
        )
    return data[0]
