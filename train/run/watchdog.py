"""Reports a run that hangs, with the stacks of all threads.

The training loop announces what it is about to do, and a separate thread measures how long it takes. A step may take
twice its usual time plus half a minute, everything else half an hour. If it takes longer, the watchdog reports it once,
in `stuck.txt` of the run folder and on the terminal. It does not stop the run, which may just be slow.
"""

import datetime
import faulthandler
import pathlib
import threading
import time

from train.display import clock, say

GRACE = 30.0  # seconds beyond twice the usual step
OTHER = 1800.0  # seconds for compiling, evaluating and saving, which have no usual time


class Watchdog:
    """Watches the training loop inside a `with` statement."""

    def __init__(self, path: pathlib.Path):
        """Appends reports to the file at `path`."""
        self._path = path
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._begun: tuple[str, float, float] | None = None  # what, start and limit [s]

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def step(self, step: int, usual: float | None) -> None:
        """Announces a step. Steps usually take `usual` seconds; None if that is not known yet."""
        self._begin(f"step {step}", OTHER if usual is None else 2 * usual + GRACE)

    def other(self, what: str) -> None:
        """Announces an operation other than a step."""
        self._begin(what, OTHER)

    def _begin(self, what: str, seconds: float) -> None:
        self._begun = (what, time.monotonic(), seconds)

    def _watch(self) -> None:
        reported = None
        while not self._end.wait(min(1.0, GRACE / 4)):
            begun = self._begun
            if begun is None or begun is reported:
                continue
            what, since, seconds = begun
            passed = time.monotonic() - since
            if passed > seconds:
                reported = begun
                self._report(what, passed)

    def _report(self, what: str, passed: float) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            with self._path.open("a") as file:
                file.write(f"{now}: {what} has not ended for {passed:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"; the stacks of all threads are in {self._path}"
        except OSError as error:
            where = f" (and {self._path} cannot be written: {error.strerror})"
        say(
            f"{what} has not ended for {clock(passed)}, so the run hangs or is very slow{where}. The run was"
            " not stopped."
        )
