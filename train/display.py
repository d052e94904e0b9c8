"""Output of the program: a live progress line on a terminal; plain lines in pipes, files and CI."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, cast

import rich.console
import rich.progress

from train import disk

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a full disk, in contrast, may have room again


class _Output:
    """Standard output, whose reader may go away, as `head` or a closed terminal does: then nothing more is printed."""

    def write(self, text: str) -> int:
        with self._forgiving():
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        if sys.stdout is None:  # closed before this program began
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        try:
            yield
        except (OSError, ValueError) as error:
            if getattr(error, "errno", errno.EBADF) in GONE:
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    disk.lose(sys.stdout.fileno())


_console = rich.console.Console(file=cast(IO[str], _Output()))


def say(line: object = "") -> None:
    """Prints a line for the user, above the live line if there is one."""
    _console.print(line, markup=False, highlight=False, soft_wrap=True)
    _console.file.flush()


def watched() -> bool:
    """Whether the output is a terminal that can move its cursor, and not a CI log."""
    return _console.is_terminal and not _console.is_dumb_terminal and not os.environ.get("CI")


def silence() -> None:
    """Suppresses all further output, because another process of the run prints it."""
    _console.quiet = True


def make_display(start: int, steps: int, unit: str) -> "Lines | Live":
    """`Live` on a terminal, else `Lines`; `unit` is the unit of the work in a step."""
    return Live(start, steps, unit) if watched() else Lines(start, steps, unit)


class Lines:
    """Prints about twenty lines over a run."""

    held_out: float | None = None

    def __init__(self, start: int, steps: int, unit: str):
        self._steps, self._every, self._unit = steps, max(1, (steps - start) // 20), unit

    def start(self) -> None: ...

    def step(self, step: int, loss: float, done: int, seconds: float | None) -> None:
        if step % self._every == 0 or step == self._steps:
            speed = pace(self._steps - step, done, self._unit, seconds)
            say(f"step {step}/{self._steps}  loss {loss:.4f}{speed}")

    def stop(self) -> None: ...


class Live:
    """One line at the bottom of the terminal, which is redrawn four times a second."""

    held_out: float | None = None

    def __init__(self, start: int, steps: int, unit: str):
        self._steps, self._unit = steps, unit
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[text]}"),
            console=_console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, text="compiling")

    def start(self) -> None:
        self._bar.start()

    def step(self, step: int, loss: float, done: int, seconds: float | None) -> None:
        held_out = f"  held-out {self.held_out:.3f}" if self.held_out is not None else ""
        speed = pace(self._steps - step, done, self._unit, seconds)
        text = f"loss {loss:.3f}{held_out}{speed}"
        self._bar.update(self._task, completed=step, text=text)

    def stop(self) -> None:
        self._bar.stop()


class Counter:
    """Progress towards a total: a bar on a terminal, else about twenty lines."""

    def __init__(self, title: str, unit: str, total: int):
        self._title, self._unit, self._total = title, unit, total
        self._done = self._said = 0
        self._began = time.perf_counter()
        self._bar = None
        if watched() and total:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[text]}"),
                console=_console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(title, total=total, text="")

    def __enter__(self) -> "Counter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        self._done += count
        seconds = time.perf_counter() - self._began
        left = clock(seconds * (self._total - self._done) / self._done) if self._done else "?"
        text = f"{self._done:,} of {self._total:,} {self._unit}  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        elif self._done - self._said >= self._total / 20:
            self._said = self._done
            say(f"{self._title}  {text}")


def pace(steps_left: int, done: int, unit: str, seconds: float | None) -> str:
    """Speed and remaining time; empty as long as they are not known."""
    if not seconds:
        return ""
    rate = done / seconds
    number = f"{rate / 1e3:.1f}k" if rate >= 1e3 else f"{rate:.0f}"
    return f"  {number} {unit}/s  {clock(steps_left * seconds)} left"


def clock(seconds: float) -> str:
    """A duration as minutes:seconds or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Prints a line for each finished part of a long job, with the remaining time."""

    def __init__(self, work: float, finished: float = 0.0):
        """`work` is the amount of work of all parts, in any unit, and `finished` the amount from an earlier start."""
        self._work, self._finished, self._now = work, finished, 0.0
        self._began = time.monotonic()

    def done(self, work: float, what: str, result: str) -> None:
        self._now += work
        share = (self._finished + self._now) / self._work
        left = (time.monotonic() - self._began) * (self._work - self._finished) / self._now
        left -= time.monotonic() - self._began
        say(f"{100 * share:3.0f} %  {what}  {result}  {clock(max(0.0, left))} left")


class Speed:
    """Seconds per step: a running mean over about the last ten steps that were not interrupted."""

    def __init__(self) -> None:
        self.seconds_per_step: float | None = None
        self._last = time.perf_counter()
        self._compiling = True

    def go(self) -> None:
        """Starts measuring, after a pause."""
        self._last = time.perf_counter()

    def tick(self) -> float:
        """Seconds since the last tick. The first tick includes compilation, and does not count for the mean."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        if not self._compiling:
            mean = self.seconds_per_step
            self.seconds_per_step = passed if mean is None else 0.9 * mean + 0.1 * passed
        self._compiling = False
        return passed
