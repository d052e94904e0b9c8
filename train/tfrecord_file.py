"""Records of a tfrecord file, every one compared with its checksum.

A file is one record after the other, all numbers little-endian:

    uint64 n | uint32 checksum of these 8 bytes | n bytes | uint32 checksum of these n bytes

A checksum is a CRC-32C c (RFC 3720, B.4), masked: (c >> 15 | c << 17) + 0xa282ead8. Grain's reader, the other one
that needs no TensorFlow, compares none, and takes a damaged n at its word. Here the sums of many records are
computed at once: every record is cut into blocks, NumPy works through all blocks side by side, and the sums
of the blocks of a record are put together, for which a sum is moved past a block of zeros.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

TOGETHER = 8_000_000  # bytes of records that are compared at once
BLOCK = 512  # bytes
ONES = np.uint32(0xFFFFFFFF)  # what a sum begins with, and is turned over by at the end


def records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """What a file holds.

    Raises:
        ValueError: a checksum is another one, or the file ends in the middle of a record.
    """
    size, at = pathlib.Path(path).stat().st_size, 0
    with open(path, "rb") as file:
        while at < size:
            found, sums, start = [], [], at
            while at < size and at - start < TOGETHER:
                head = file.read(12)
                length = int.from_bytes(head[:8], "little")
                # Before it is believed: nobody knows how much memory it would ask for.
                if len(head) == 12 and head[8:] != _masked(_of_few(head[:8])):
                    raise ValueError(f"the record at byte {at} has a damaged length")
                if len(head) < 12 or length + 4 > size - at - 12:
                    raise ValueError(f"it ends in the middle of the record at byte {at}")
                found.append(file.read(length))
                sums.append((at, file.read(4)))
                at += length + 16
            for computed, (where, said) in zip(checksums(found).tolist(), sums, strict=True):
                if said != _masked(computed):
                    raise ValueError(f"the record at byte {where} is not as its checksum says")
            yield from found


def checksums(parts: Sequence[bytes]) -> np.ndarray:
    """CRC-32C of each; uint32 [parts]."""
    parts, order = list(parts), np.argsort([-len(part) for part in parts], kind="stable")
    lengths = np.array([len(parts[i]) for i in order], np.int64)
    counts = np.maximum(-(-lengths // BLOCK), 1)
    begin = np.cumsum(counts) - counts
    # Zeros in front of a part's first bytes change no sum that has not begun yet.
    before = counts * BLOCK - lengths
    blocks = np.zeros((int(counts.sum()), BLOCK), np.uint8)
    flat = blocks.reshape(-1)
    for i, start in zip(order.tolist(), (begin * BLOCK + before).tolist()):
        flat[start : start + len(parts[i])] = np.frombuffer(parts[i], np.uint8)
    of_blocks = np.zeros(len(blocks), np.uint32)
    for pair in np.ascontiguousarray(blocks.view("<u2").T):
        of_blocks = _PAIR[(of_blocks ^ pair) & 0xFFFF] ^ (of_blocks >> 16)
    total = _BEGUN[BLOCK - before] ^ of_blocks[begin]
    for number in range(1, int(counts[0]) if len(counts) else 0):
        longer = int(np.searchsorted(-counts, -number))  # they stand in front
        moved = _past_block(total[:longer])
        total[:longer] = moved ^ of_blocks[begin[:longer] + number]
    sums = np.empty_like(total)
    sums[order] = total ^ ONES
    return sums


def _zero(sums: np.ndarray) -> np.ndarray:
    """Sums moved past one byte of zeros."""
    return _BYTE[sums & 0xFF] ^ (sums >> 8)


def _past_block(sums: np.ndarray) -> np.ndarray:
    parts = (table[(sums >> 8 * i) & 0xFF] for i, table in enumerate(_PAST))
    return np.bitwise_xor.reduce(list(parts))


def _of_few(part: bytes) -> int:
    """CRC-32C of a few bytes, for which NumPy is slow."""
    total = int(ONES)
    for byte in part:
        total = _LIST[(total ^ byte) & 0xFF] ^ total >> 8
    return total ^ int(ONES)


def _masked(total: int) -> bytes:
    turned = (total >> 15 | total << 17) & 0xFFFFFFFF
    return ((turned + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


_BYTE = _byte_table()  # what a byte does to a sum
_LIST = _BYTE.tolist()
_PAIR = _zero(_zero(np.arange(1 << 16, dtype=np.uint32)))  # what two bytes do
_PAST = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
_BEGUN = np.full(BLOCK + 1, ONES)  # a sum of as many zeros, not yet turned over
for _i in range(BLOCK):
    _PAST = _zero(_PAST)
    _BEGUN[_i + 1] = _zero(_BEGUN[_i])
