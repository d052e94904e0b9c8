"""The folder of many runs: locked while in use, a JSON line per finished run, so that a stop loses one run at most."""

import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from train import disk
from train.config.fields import UserError
from train.display import say
from train.run.folder import environment, write

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
    folder = disk.user_path(name)
    disk.check_folder(folder, "--folder")
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
    """Adds one entry to environment.json; `facts` have to say which text, by digests, as they did at every start.

    Raises:
        UserError: it is another text. Results of two texts are not results of one.
    """
    path = folder / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    now = _digests(facts)
    if any(_digests({name: start.get(name) for name in facts}) != now for start in starts):
        raise UserError(
            f"{folder} holds results of another text than is found now ({', '.join(now)}); the standard library, for"
            " one, differs between versions of Python. Name another folder with --folder."
        )
    write(path, json.dumps([*starts, environment(**facts)], indent=2) + "\n")


def _digests(facts: Any, name: str = "") -> dict[str, str]:
    """What is called "digest" in nested dictionaries, by where it is."""
    found = {}
    for key, value in facts.items() if isinstance(facts, Mapping) else ():
        if key == "digest":
            found[name] = value
        found |= _digests(value, key)
    return found


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl, each once.

    A last line that a kill has torn is cut off. Any other line that cannot be read, differs from what was written, or
    is there twice is reported and left out, and the file as it was is kept beside it.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines()
    results, kept, bad = [], [], []
    for number, line in enumerate(lines, 1):
        result = _result(line)
        if result is not None and result not in results:
            results.append(result)
            kept.append(line + b"\n")
        elif number < len(lines) or content.endswith(b"\n"):
            bad.append(number)
    if bad:
        copy = disk.unreadable_path(path)
        copy.write_bytes(content)
        say(
            f"{path}: {len(bad)} of {len(lines)} lines cannot be read, were changed or are there twice, line {bad[0]}"
            f" the first; they are left out, and the file as it was is kept as {copy.name}."
        )
    if content and b"".join(kept) != content:  # what was not checked when it was written stays so
        write(path, b"".join(kept).decode())
    return results


def append(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(map(_line, results)))


def _line(result: Mapping[str, Any]) -> str:
    return json.dumps({**result, "check": _check(result)}) + "\n"


def _result(line: bytes) -> dict[str, Any] | None:
    """None: not a result, or not the one that was written."""
    try:
        result = json.loads(line)
        check = result.pop("check", None)
    except (ValueError, AttributeError, TypeError):
        return None
    return result if check == _check(result) else None


def _check(result: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(result).encode()):08x}"
