"""Handles full, failing and read-only disks: short error messages, and cleaning up after a failed save."""

import errno
import os
import pathlib
import shutil
import sys
import time
from typing import Any

# Full, over quota, file too large, read-only, or no permission.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def short_reason(error: BaseException) -> str:
    """The operating system's message inside a long error, or else its first line."""
    known = [os.strerror(code) for code in (*REFUSED, errno.EIO) if os.strerror(code) in str(error)]
    return known[0] if known else first_line(error)


def unreadable_path(path: pathlib.Path) -> pathlib.Path:
    """A new path in the same folder for a file or folder that cannot be read: `unreadable-NAME`, or with a number."""
    place, number = path.with_name(f"unreadable-{path.name}"), 1
    while place.exists():
        number += 1
        place = path.with_name(f"unreadable-{path.name}-{number}")
    return place


def remove_matching(folder: pathlib.Path, pattern: str) -> None:
    """Removes the matching folders. Unfinished writes may create them again, so it repeats until none comes back."""
    quiet, end = time.monotonic(), time.monotonic() + 5
    while time.monotonic() < min(quiet + 0.3, end):
        for part in folder.glob(pattern):
            shutil.rmtree(part, ignore_errors=True)
            quiet = time.monotonic()
        time.sleep(0.05)


class QuietAfterFailedSave:
    """Suppresses Orbax's messages about abandoned writes after a failed save, until `end` is called."""

    def __init__(self) -> None:
        self._before, sys.unraisablehook = sys.unraisablehook, self._hook

    def end(self) -> None:
        sys.unraisablehook = self._before

    def _hook(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and "loop is closed" in str(error)):
            self._before(unraisable)
