"""Processes that make views of images, for more cores than threads of one Python can keep busy.

A view holds Python's global lock for about a seventh of its time, so more than about six threads gain nothing. Workers
are plain processes that answer over pipes: a batch goes out as lists of wanted views and comes back as bytes, read
straight into the arrays of the batch. Which worker makes a view changes nothing, and between two batches a worker
holds none, so a run can resume at any step with any number of workers.

A worker ends when its input ends, and so with the program, even if that is killed. This is why it is not one of
Grain's: in version 0.2.18 those outlive a killed program, each starts JAX, and each makes whole batches of its own.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from train.data.views import ViewMaker, Views, Wanted
from train.errors import UserError

BUFFER = 1 << 20  # bytes that a worker may be ahead of the program
PARTS = 4  # of a batch for each worker, so that none waits long for the last one
ROOT = pathlib.Path(__file__).resolve().parents[2]
START = f"import sys; sys.path[0] = {str(ROOT)!r}; from {__name__} import serve; serve()"
KEPT_ALIVE = ("SIGINT", "SIGTERM", "SIGHUP")  # the program saves first; then the input ends


class Workers:
    """Processes that make views. They start when they are made, and end with this object or with the program."""

    def __init__(self, maker: ViewMaker, count: int) -> None:
        self._maker = maker
        self._processes = [_started(maker) for _ in range(count)]
        self._threads = concurrent.futures.ThreadPoolExecutor(count)  # one to talk to each worker
        self._free = threading.Lock()  # for one batch at a time
        self.close = weakref.finalize(self, _end, self._processes)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def make(self, wanted: Sequence[Wanted]) -> Views:
        """The wanted views, in their order.

        Raises:
            UserError: an image cannot be read (the first of them), or a worker is gone.
        """
        views = self._maker.empty(len(wanted))
        size = max(1, -(-len(wanted) // (PARTS * len(self._processes))))
        starts: queue.SimpleQueue[int] = queue.SimpleQueue()
        for start in range(0, len(wanted), size):
            starts.put(start)
        failed: dict[int, Exception] = {}

        def work(process: subprocess.Popen[bytes]) -> None:
            # Parts are taken in order: all before the first broken image are made, or tried.
            while not failed:
                try:
                    start = starts.get_nowait()
                except queue.Empty:
                    return
                part = slice(start, start + size)
                try:
                    _ask(process, wanted[part], Views(*(array[part] for array in views)))
                except Exception as error:
                    failed[start] = error

        with self._free:
            for _ in self._threads.map(work, self._processes):
                pass
        if failed:
            raise failed[min(failed)]
        return views


def _started(maker: ViewMaker) -> subprocess.Popen[bytes]:
    """A worker in a session of its own, where Ctrl-C in the terminal does not reach it."""
    process = subprocess.Popen(
        [sys.executable, "-c", START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    # macOS and Windows have no such setting, and Linux may allow less.
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(_pipe(process.stdout), fcntl.F_SETPIPE_SZ, BUFFER)
    with contextlib.suppress(OSError):  # it is gone already; the first request says so
        _send(maker, _pipe(process.stdin))
    return process


def _ask(process: subprocess.Popen[bytes], wanted: Sequence[Wanted], views: Views) -> None:
    """Has a worker fill the arrays."""
    answers, problems = _pipe(process.stdout), []
    try:
        _send(list(wanted), _pipe(process.stdin))
        for i in range(len(wanted)):
            answer = pickle.load(answers)
            if isinstance(answer, str):
                problems.append(answer)
            else:
                views.label[i], views.noise[i] = answer
                _fill(views.image[i], answers)
    except (OSError, EOFError, pickle.UnpicklingError):
        code = _waited(process)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"A worker process that decodes images has ended ({how}). If it was killed, the machine may have run out"
            " of memory: nearest, fewer --images.workers. Everything up to the last checkpoint is safe."
        ) from None
    if problems:
        raise UserError(problems[0])


def _send(value: Any, to: IO[bytes]) -> None:
    pickle.dump(value, to, pickle.HIGHEST_PROTOCOL)
    to.flush()


def _fill(array: np.ndarray, source: IO[bytes]) -> None:
    """Reads an array's bytes into it; EOFError if they end too early."""
    left = memoryview(array).cast("B")
    while left:
        count = source.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        left = left[count:]


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # Popen was asked for it
    return pipe


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            _pipe(process.stdin).close()
    for process in processes:
        _waited(process)
        _pipe(process.stdout).close()


def _waited(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that ends by itself, or else is ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk that does not answer
        return process.wait(5)
    process.kill()
    return process.wait()


def serve() -> None:
    """A worker: makes the views that it is asked for, until its input ends."""
    for name in KEPT_ALIVE:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        maker: ViewMaker = pickle.load(requests)
        while True:
            wanted: list[Wanted] = pickle.load(requests)
            for one in wanted:
                try:
                    image, *answer = maker.make(one)
                except UserError as error:
                    _send(str(error), answers)
                    continue
                pickle.dump(answer, answers)
                answers.write(memoryview(np.ascontiguousarray(image)).cast("B"))
                answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the program is gone, and so is whoever would read what Python says at its end
