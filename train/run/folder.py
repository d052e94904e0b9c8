"""The folder of a run. It is locked while a run uses it, and describes the run completely.

config.json        the config
environment.json   one entry per start: command, commit, versions, devices, digest of the data
decay.txt          which parameters decay, and at which rate
metrics.jsonl      one JSON object per line (log.py)
tokenizer/         the tokenizer of a text (kept_tokenizer.py)
checkpoints/       checkpoints.py
saved.json         the step of the newest checkpoint (lost.py)
figures/           figures.py
tensorboard/       events, if tensorboardX is installed
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

import jax

from train import disk, processes
from train.config.continuation import refuse_changes
from train.config.fields import Config
from train.config.saved import from_json, to_json
from train.config.tree import replace
from train.display import say
from train.errors import UserError

ONCE = {"run.migrate": False, "run.restart": False}
FILES = ("config.json", "environment.json", "decay.txt", "metrics.jsonl", "saved.json", "lock")
FOLDERS = ("checkpoints", "figures", "tokenizer", "tensorboard")
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Folder:
    """A locked run folder: `path`, and `config` with the folder filled in."""

    def __init__(self, config: Config):
        """Creates a new folder, or opens the folder of a run with the same config.

        Raises:
            UserError: the folder is not writable, not a run folder, in use, or of a run with another config.
        """
        self._lock: IO[str] | None = None
        self._text = ""  # of config.json
        path = processes.from_first(lambda: str(self._prepare(config)))
        self.path = pathlib.Path(path)
        # These two are allowed at this start only.
        self.config = replace(config, {"run.folder": path, **ONCE})

    def _prepare(self, config: Config) -> pathlib.Path:
        try:
            path = _new(config.run.name) if config.run.folder is None else _given(config)
            _check_places(path)
            self._lock = locked(path)
        except OSError as error:
            raise UserError(
                f"The run folder cannot be written: {error.strerror or error} ({error.filename})."
                " Name another with --run.folder."
            ) from None
        now = replace(config, {"run.folder": str(path)})
        try:
            saved = path / "config.json"
            if saved.exists():
                before = from_json(disk.config_text(saved), str(saved))
                refuse_changes(before, now, str(path), config.run.migrate)
            self._text = to_json(replace(now, ONCE))
            if not saved.exists():
                write(saved, self._text)
        except BaseException:
            self._lock.close()
            raise
        return path

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def confirm(self) -> None:
        """Writes config.json, now that the data and the checkpoints fit the config; in the first process only."""
        write(self.path / "config.json", self._text)

    def add_start(self, environment: dict[str, Any]) -> None:
        """Adds one entry to environment.json."""
        path, starts = self.path / "environment.json", []
        try:
            starts = json.loads(disk.read_json_text(path)) if path.exists() else []
        except (ValueError, RecursionError):
            starts = None
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            aside = disk.unreadable_path(path)
            path.replace(aside)
            say(f"{path} does not hold what this program wrote; it is kept as {aside.name}.")
            starts = []
        write(path, json.dumps([*starts, environment], indent=2) + "\n")


def write(path: pathlib.Path, text: str) -> None:
    """Replaces a file atomically: a reader sees either the old text or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _new(name: str) -> pathlib.Path:
    runs = pathlib.Path("runs")
    disk.user_path(runs / f"{name}-001")
    runs.mkdir(exist_ok=True)
    for path in _numbered(runs / name):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError


def _numbered(path: pathlib.Path) -> Iterator[pathlib.Path]:
    number = 0
    while True:
        number += 1
        yield path.with_name(f"{path.name}-{number:03d}")


def _given(config: Config) -> pathlib.Path:
    path = disk.user_path(config.run.folder or "")
    disk.check_folder(path, "--run.folder")
    path.mkdir(parents=True, exist_ok=True)
    strange = [p.name for p in path.iterdir() if p.name not in ("lock", "config.json.part")]
    if strange and not (path / "config.json").exists():
        raise UserError(
            f"{path} is neither empty nor a run folder (it holds {strange[0]}, but no config.json); name"
            " another with --run.folder."
        )
    return path


def _check_places(path: pathlib.Path) -> None:
    """Raises UserError if something in a run folder is not what it should be, before a run needs it."""
    for names, wanted in ((FILES, "a file"), (FOLDERS, "a folder")):
        for place in (path / name for name in names):
            found = disk.kind(place)
            if place.is_symlink() and found is None:
                raise UserError(
                    f"{place} is a link to {place.readlink()}, which does not exist; is its disk mounted? Put it"
                    " back, or remove the link."
                )
            if found not in (None, wanted):
                raise UserError(
                    f"{place} is {found}; it must be {wanted}. Move it away, and go on."
                )
            if found == "a folder" and not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"{place} cannot be written; change its permissions, and go on.")


def locked(path: pathlib.Path, what: str = "run") -> IO[str]:
    """Locks a folder, until the returned file is closed or the process ends, even if it is killed.

    Args:
        path: of the folder.
        what: kind of the other user of the folder, for the error message.

    Raises:
        UserError: another process holds the lock.
    """
    file = (path / "lock").open("a+")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such locks
        return file
    except OSError:
        file.seek(0)
        raise UserError(
            f"{path} is in use by another {what} (process {file.read().strip() or 'unknown'}); wait for"
            f" it, or name another folder with --{'run.folder' if what == 'run' else 'out'}."
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def environment(**more: Any) -> dict[str, Any]:
    """The environment of a run: everything outside its config that may change its numbers."""
    names = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy", "tokenizers")
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (s := _git("status", "--porcelain")) is None else bool(s),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "variables": {n: os.environ[n] for n in ("XLA_FLAGS", "JAX_PLATFORMS") if n in os.environ},
        **more,
    }


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists():  # installed: a repository around it is another one
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
