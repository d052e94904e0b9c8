"""Reads the records of a tfrecord file, and verifies the checksum of each.

A file is a sequence of records; all numbers are little-endian:

    uint64 n | uint32 checksum of these 8 bytes | n bytes | uint32 checksum of these n bytes

A checksum is a CRC-32C c (RFC 3720, B.4), masked: (c >> 15 | c << 17) + 0xa282ead8.

The reader is written by hand because the only other one without TensorFlow, Grain's, verifies no checksum, and
allocates as much memory as a damaged length n asks for.
"""

import os
import pathlib
from collections.abc import Iterator

import google_crc32c


def records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The records of a file, in order.

    Raises:
        ValueError: a checksum differs, or the file ends in the middle of a record.
    """
    size, at = pathlib.Path(path).stat().st_size, 0
    with open(path, "rb") as file:
        while at < size:
            head = file.read(12)
            length = int.from_bytes(head[:8], "little")
            # Checked before use, because a damaged length may ask for any amount of memory.
            if len(head) == 12 and head[8:] != checksum(head[:8]):
                raise ValueError(f"the record at byte {at} has a damaged length")
            if len(head) < 12 or length + 4 > size - at - 12:
                raise ValueError(f"it ends in the middle of the record at byte {at}")
            record = file.read(length)
            if file.read(4) != checksum(record):
                raise ValueError(f"the record at byte {at} does not match its checksum")
            yield record
            at += length + 16


def checksum(part: bytes) -> bytes:
    """The masked CRC-32C, as it is stored in files."""
    total = google_crc32c.value(part)
    turned = (total >> 15 | total << 17) & 0xFFFFFFFF
    return ((turned + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
