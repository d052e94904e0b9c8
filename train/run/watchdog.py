"""Says when a run hangs, and where: what every thread was doing.

The loop says what it begins and how long that may take; a thread of its own looks at the clock. A step
may take twice the usual time and half a minute more, everything else half an hour. What takes longer
is reported once, with the stacks of all threads, in `stuck.txt` of the run folder and on the
terminal; the run itself is left alone, since it may only be slow.
"""

import datetime
import faulthandler
import pathlib
import threading
import time

from train.display import clock, say

GRACE = 30.0  # seconds beyond twice the usual step
OTHER = 1800.0  # seconds for what has no usual time: compiling, evaluating, saving


class Watchdog:
    """Watches between `with` and its end."""

    def __init__(self, path: pathlib.Path):
        """Reports are added to the file at `path`."""
        self._path = path
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._begun: tuple[str, float, float] | None = None  # what, from when, how long [s]

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def step(self, step: int, usual: float | None) -> None:
        """A step begins; steps usually take `usual` seconds, or None as long as nobody knows."""
        self._begin(f"step {step}", OTHER if usual is None else 2 * usual + GRACE)

    def other(self, what: str) -> None:
        """Something else begins."""
        self._begin(what, OTHER)

    def _begin(self, what: str, seconds: float) -> None:
        self._begun = (what, time.monotonic(), seconds)

    def _watch(self) -> None:
        told = None
        while not self._end.wait(min(1.0, GRACE / 4)):
            begun = self._begun
            if begun is None or begun is told:
                continue
            what, since, seconds = begun
            passed = time.monotonic() - since
            if passed > seconds:
                told = begun
                self._report(what, passed)

    def _report(self, what: str, passed: float) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            with self._path.open("a") as file:
                file.write(f"{now}: {what} has not ended for {passed:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"; what every thread does is in {self._path}"
        except OSError as error:
            where = f" (and {self._path} cannot be written: {error.strerror})"
        say(
            f"{what} has not ended for {clock(passed)}: a hang, or a very slow machine{where}."
            " Nothing was stopped."
        )
