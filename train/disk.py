"""Files and their failures: paths that users give, files that are no files, full and read-only disks, failed saves.

A FIFO or a device can block a reader for ever or feed it for ever, so `read_file` reads regular files only, and no
more of them than they hold or than fits into memory.
"""

import contextlib
import errno
import os
import pathlib
import select
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from train import memory
from train.errors import UserError

# Full, over quota, file too large, read-only, or no permission.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
)
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and on macOS or longer there
JSON_FILE = 256_000_000  # bytes; configs, vocabularies, manifests and indices are far smaller


class NotRegular(OSError):
    """Something other than a regular file of a sensible size; the message says what it is."""


def user_path(text: str | os.PathLike[str]) -> pathlib.Path:
    """A path as a user writes it, with `~` and `~user` replaced by the home folders.

    Raises:
        UserError: there is no such user, or the path is longer than the system allows.
    """
    path = pathlib.Path(text)
    try:
        path = path.expanduser() if os.fspath(text).startswith("~") else path
    except RuntimeError:
        raise UserError(
            f"{shortened(path)}: there is no user {shortened(path.parts[0][1:])!r} on this machine; write the"
            " folder out, or ./~... for a folder of that name."
        ) from None
    sizes = {part: len(os.fsencode(part)) for part in path.parts}
    longest = max(sizes, key=lambda part: sizes[part], default="")
    whole = len(os.fsencode(path))
    if "\0" in str(path):
        raise UserError(f"{shortened(path)!r} holds a zero byte, which no path may hold.")
    if longest and sizes[longest] > LONGEST_NAME:
        raise UserError(
            f"{shortened(path)} holds a name of {sizes[longest]} bytes; allowed are at most {LONGEST_NAME}."
        )
    if whole > LONGEST_PATH:
        raise UserError(f"{shortened(path)} has {whole} bytes; allowed are at most {LONGEST_PATH}.")
    return path


def shortened(path: object) -> str:
    """A path for a message, without the middle of a very long one."""
    text = str(path)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def kind(path: pathlib.Path) -> str | None:
    """What is at a path, links followed: "a file", "a folder", "a FIFO", ...; None: nothing, or a dangling link."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return next((name for test, name in KINDS if test(mode)), "no file")


def read_file(path: pathlib.Path, most: int | None = None) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        most: largest size that is read [bytes]; None: as much as fits into the machine's memory.

    Raises:
        NotRegular: a FIFO, a device, a folder or a socket.
        OSError: it cannot be read, or is too large.
    """
    _check_regular(path, path.stat().st_mode)
    # Should a FIFO have taken the file's place meanwhile, this does not wait for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_regular(path, status.st_mode)
        if most is not None and status.st_size > most:
            raise NotRegular(f"{path} has {status.st_size:,} bytes; at most {most:,} are read")
        memory.check(status.st_size, f"reading {path}")
        # Files of /proc claim to be empty, and some never end.
        return file.read(status.st_size)


def read_json_text(path: pathlib.Path) -> str:
    """The text of a small regular file, such as a config; errors as `read_file`, or UnicodeDecodeError."""
    return read_file(path, JSON_FILE).decode("utf-8")


@contextlib.contextmanager
def silent_errors() -> Iterator[None]:
    """Discards what is written to standard error, by libraries in C and Rust too; for short calls."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stderr.flush()
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def lose(descriptor: int) -> None:
    """Sends what is still to be written to standard output (1) or standard error (2) nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def reader_is_gone(descriptor: int) -> bool:
    """Whether a descriptor is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))


def config_text(path: pathlib.Path) -> str:
    """The text of a config; raises UserError if it cannot be read."""
    try:
        return read_json_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None


def check_folder(path: pathlib.Path, flag: str) -> None:
    """Raises UserError if something other than a folder is at a path that a flag names."""
    if (found := kind(path)) not in (None, "a folder"):
        raise UserError(
            f"{path} is {found}, and must be a folder, new or old; name another with {flag}."
        )
    if found is None and path.is_symlink():
        raise UserError(
            f"{path} is a link to {path.readlink()}, which does not exist; name another with {flag}."
        )


def reason(error: BaseException) -> str:
    """Why a file cannot be read, without a number and without its name."""
    return getattr(error, "strerror", None) or first_line(error)


def _check_regular(path: pathlib.Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        found = next((name for test, name in KINDS if test(mode)), "something else")
        raise NotRegular(f"{path} is {found}; only regular files are read")


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def short_reason(error: BaseException) -> str:
    """The operating system's message inside a long error, or else its first line."""
    known = [os.strerror(code) for code in (*REFUSED, errno.EIO) if os.strerror(code) in str(error)]
    return known[0] if known else first_line(error)


def unreadable_path(path: pathlib.Path) -> pathlib.Path:
    """A new path in the same folder for a file or folder that cannot be read: `unreadable-NAME`, or with a number."""
    return free_path(path, "unreadable")


def free_path(path: pathlib.Path, word: str) -> pathlib.Path:
    """A new path in the same folder: `WORD-NAME`, or with a number behind it."""
    place, number = path.with_name(f"{word}-{path.name}"), 1
    while place.exists() or place.is_symlink():
        number += 1
        place = path.with_name(f"{word}-{path.name}-{number}")
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
