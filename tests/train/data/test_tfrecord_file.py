"""Records of tfrecord files against a checksum that goes bit by bit, and what is said of damaged ones."""

import pytest

from tests.support.tfds_files import frame
from train.data.tfrecord_file import records

WANTED = [bytes([i]) * (i * 37 % 101) for i in range(50)]


def test_records_come_in_order(tmp_path):
    path = tmp_path / "some.tfrecord"
    path.write_bytes(b"".join(map(frame, WANTED)))
    assert list(records(path)) == WANTED
    path.write_bytes(b"")
    assert list(records(path)) == []


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path, whole = tmp_path / "some.tfrecord", b"".join(map(frame, WANTED[:3]))
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged length|does not match its checksum"):
            list(records(path))
    ends = [len(b"".join(map(frame, WANTED[:n]))) for n in range(3)]
    for length in set(range(len(whole))) - set(ends):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="ends in the middle of the record at byte"):
            list(records(path))
