"""The folder of many runs: locked while in use, a JSON line per finished run, so that a stop loses one run at most."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from train.config import UserError
from train.folder import environment, write

RESULTS = "results.jsonl"


@contextmanager
def locked_folder(name: str, fields: Mapping[str, Any], what: str) -> Iterator[pathlib.Path]:
    """A folder, new or of the same fields, used by one process at a time.

    Args:
        name: its path.
        fields: JSON values; what is to be run. They are kept in WHAT.json.
        what: one word for it, such as "sweep".

    Raises:
        UserError: it is in use, or holds results of other fields.
    """
    folder = pathlib.Path(name).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on Windows
            pass
        except OSError:
            raise UserError(f"{folder} is in use by another {what}; wait for it.") from None
        path, now = folder / f"{what}.json", json.loads(json.dumps(fields))
        before = json.loads(path.read_text()) if path.exists() else now
        if before != now:
            changed = [key for key in now if before.get(key) != now[key]]
            raise UserError(
                f"{folder} holds another {what}: {', '.join(changed)} differ. Name another folder"
                " with --folder, or leave the fields as they were."
            )
        write(path, json.dumps(now, indent=2) + "\n")
        yield folder


def note_start(folder: pathlib.Path, **facts: Any) -> None:
    """Adds one entry to environment.json."""
    path = folder / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    write(path, json.dumps([*starts, environment(**facts)], indent=2) + "\n")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of results.jsonl; a line that a kill has torn ends the file, and is cut off."""
    results = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            results.append(json.loads(line))
        except ValueError:
            break
    write(path, "".join(json.dumps(result) + "\n" for result in results))
    return results


def append(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(result) + "\n" for result in results))
