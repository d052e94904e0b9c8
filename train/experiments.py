"""Named experiments: each states only what differs from the defaults of `config.Config`.

The docstring of each says what it is for, its command, hardware, tokens, time and expected result.
"""

from collections.abc import Callable

from train.config import Config


def small() -> Config:
    """AdamHD on the standard library."""
    return Config()


EXPERIMENTS: dict[str, Callable[[], Config]] = {make.__name__: make for make in (small,)}
