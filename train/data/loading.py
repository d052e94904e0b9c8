"""Loads the data of a run in every process, and checks that all processes read the same."""

from typing import Any

import jax

from train import processes
from train.config.fields import Config, UserError
from train.step import tasks


def read_data(config: Config) -> Any:
    """Loads the tokens or images that a config names.

    The first process loads first and fills the cache for the others.

    Raises:
        UserError: the data cannot be read, or this process reads other data than the first.
    """
    task, data = tasks.of(config), []

    def digest() -> str:
        data.append(task.read(config))
        return data[0].digest

    wanted = processes.from_first(digest)
    if not data:
        data.append(task.read(config))
    if data[0].digest != wanted:
        raise UserError(
            f"Process {jax.process_index()} reads different {task.noun} than process 0: the digest is"
            f" {data[0].digest[:16]} instead of {wanted[:16]}."
        )
    return data[0]
