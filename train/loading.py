"""The text of a run, read by every process and the same in all."""

import pathlib

import jax

from train import data as data_lib
from train import processes
from train.config import Config, UserError
from train.display import say


def load(config: Config) -> data_lib.Data:
    """The text of a config, as tokens."""
    # The first process fills the cache for all, and all must have read the same.
    data: list[data_lib.Data] = []

    def digest() -> str:
        data.append(read(config))
        return data[0].digest

    wanted = processes.from_first(digest)
    if not data:
        data.append(read(config))
    if data[0].digest != wanted:
        raise UserError(
            f"Process {jax.process_index()} reads another text from {config.data.text} than the first one: digest"
            f" {data[0].digest[:16]} instead of {wanted[:16]}."
        )
    return data[0]


def read(config: Config) -> data_lib.Data:
    wanted = config.data
    encoded = wanted.text.startswith(data_lib.STORE)
    say(f"reading {wanted.text}{'' if encoded else f' as {wanted.tokenizer} tokens'} ...")
    try:
        return data_lib.load(
            wanted.text,
            wanted.tokenizer,
            length=wanted.length,
            batch_size=wanted.batch_size,
            seed=config.run.seed,
            documents=wanted.documents,
            cache=pathlib.Path(wanted.cache),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"There is nothing to train on: {error}.") from None
