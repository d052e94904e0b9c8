"""The lines of metrics.jsonl, each with a checksum, so that a changed number is found and never plotted.

A line is a JSON object whose last entry is the CRC-32 of the characters before it::

    {"kind": "train", "step": 7, "loss": 3.25, "check": "5d41402a"}

CRC-32 finds every change of up to 32 neighbouring bits, and misses other damage with a probability of 2^-32.
"""

import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from train import disk
from train.display import say

_LINE = re.compile(rb'(\{"kind": .*?), "check": "([0-9a-f]{8})"\}', re.DOTALL)


def line(record: dict[str, Any]) -> str:
    """A record as a line, with its checksum."""
    text = json.dumps(finite(record), allow_nan=False)[:-1]
    return f'{text}, "check": "{zlib.crc32(text.encode()):08x}"}}\n'


def finite(values: Any) -> Any:
    """Replaces NaN and infinity, which JSON cannot hold, by None."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_records(path: pathlib.Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Reads the records up to `last_step`, without their checksums, and ignores damaged ones."""
    records = [record for part in _lines(path) for record in _records(part)]
    return [record for record in records if record["step"] <= last_step]


def _lines(path: pathlib.Path) -> list[bytes]:
    return disk.read_file(path).split(b"\n") if path.exists() else []


def _records(part: bytes) -> Iterator[dict[str, Any]]:
    """The intact records in a line; several if the end of a line was damaged."""
    for match in _LINE.finditer(part):
        if (record := _record(*match.groups())) is not None:
            yield record


def _record(text: bytes, check: bytes) -> dict[str, Any] | None:
    if int(check, 16) != zlib.crc32(text):
        return None
    try:
        record = json.loads(text + b"}")
        numbers = [record["step"], record.get("seconds", 0.0)]
    except (ValueError, KeyError, RecursionError):
        return None
    good = isinstance(record["kind"], str) and all(type(x) in (int, float) for x in numbers)
    return record if good else None


def keep_damaged(path: pathlib.Path) -> None:
    """Copies a file of records if some of its lines are damaged; an incomplete last line does not count."""
    *lines, _ = _lines(path) or [b""]
    bad = [number for number, part in enumerate(lines, 1) if not _intact(part)]
    if bad:
        copy = disk.unreadable_path(path)
        copy.write_bytes(disk.read_file(path))
        say(
            f"{path}: {len(bad)} of {len(lines)} lines cannot be read or were changed, starting with line {bad[0]}."
            f" They are removed; the original file is kept as {copy.name}."
        )


def _intact(part: bytes) -> bool:
    match = _LINE.fullmatch(part)
    return match is not None and _record(*match.groups()) is not None
