"""Handles SIGINT (Ctrl-C), SIGTERM, and SIGHUP, which a closed terminal sends: the caller stops at its next safe point.

A signal is recorded, and a second Ctrl-C stops immediately. Schedulers and terminals often send their signals several
times, so a second SIGTERM or SIGHUP changes nothing. `nohup` makes a program ignore SIGHUP, and that is respected.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals(unit: str = "step") -> Iterator[list[int]]:
    """Yields the list of signals that have arrived. Ctrl-C raises KeyboardInterrupt if another signal came before."""
    arrived: list[int] = []

    def take(number: int, frame: Any) -> None:
        if arrived:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        arrived.append(number)
        # `say` is not reentrant, and this may interrupt it.
        text = f"\nstopping after this {unit}, and saving (Ctrl-C again stops immediately) ...\n"
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, text.encode())

    handled = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        handled.append(hangup)
    before = {number: signal.signal(number, take) for number in handled}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
