"""Handles SIGINT (Ctrl-C) and SIGTERM: a signal is recorded, and the caller stops at its next safe point."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals(unit: str = "step") -> Iterator[list[int]]:
    """Yields the list of signals that have arrived. A second signal raises KeyboardInterrupt."""
    arrived: list[int] = []

    def take(number: int, frame: Any) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(number)
        # `say` is not reentrant, and this may interrupt it.
        text = f"\nstopping after this {unit}, and saving (Ctrl-C again stops immediately) ...\n"
        os.write(2, text.encode())

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
