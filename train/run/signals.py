"""Requests to stop, by Ctrl-C or from outside: noted, and heeded where nothing is half done."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals(unit: str = "step") -> Iterator[list[int]]:
    """The signals to stop that arrived: Ctrl-C or a request to end. A second one stops at once."""
    arrived: list[int] = []

    def take(number: int, frame: Any) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(number)
        # Not by `say`, which may be what this interrupts.
        text = f"\nstopping after this {unit}, and saving (Ctrl-C again stops at once) ...\n"
        os.write(2, text.encode())

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
