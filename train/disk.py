"""A disk that is full, failing or not to be written: what it says, and what a failed save leaves behind."""

import errno
import os
import pathlib
import shutil
import sys
import time
from typing import Any

# Full, over its quota, too small for a file, or not to be written.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def reason(error: BaseException) -> str:
    """What the system said, out of the pages around it."""
    known = [os.strerror(code) for code in (*REFUSED, errno.EIO) if os.strerror(code) in str(error)]
    return known[0] if known else first_line(error)


def aside(path: pathlib.Path) -> pathlib.Path:
    """Where what cannot be read is kept: `unreadable-NAME` beside it, or with a number what is not there yet."""
    place, number = path.with_name(f"unreadable-{path.name}"), 1
    while place.exists():
        number += 1
        place = path.with_name(f"unreadable-{path.name}-{number}")
    return place


def remove(folder: pathlib.Path, pattern: str) -> None:
    """Removes what matches; parts on their way make their folders anew, so look until none comes back."""
    quiet, end = time.monotonic(), time.monotonic() + 5
    while time.monotonic() < min(quiet + 0.3, end):
        for part in folder.glob(pattern):
            shutil.rmtree(part, ignore_errors=True)
            quiet = time.monotonic()
        time.sleep(0.05)


class Quiet:
    """Until `end`, nothing is printed about arrays that end up nowhere since another of their save failed."""

    def __init__(self) -> None:
        self._before, sys.unraisablehook = sys.unraisablehook, self._hook

    def end(self) -> None:
        sys.unraisablehook = self._before

    def _hook(self, found: Any) -> None:
        error = found.exc_value
        if not (isinstance(error, RuntimeError) and "loop is closed" in str(error)):
            self._before(found)
