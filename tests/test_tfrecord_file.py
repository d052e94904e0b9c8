"""Checksums of tfrecord files against a sum that goes bit by bit, and against the standard's examples."""

import numpy as np

from tests.tfds_files import crc32c, frame
from train import tfrecord_file
from train.tfrecord_file import BLOCK, checksums, records


def test_sums_are_the_standards():
    # RFC 3720, B.4.
    examples = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    assert checksums([*examples]).tolist() == [*examples.values()]


def test_sums_of_any_length_are_those_of_every_bit():
    rng = np.random.default_rng(0)
    lengths = [*range(6), BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 7 * BLOCK + 3]
    parts = [rng.bytes(length) for length in rng.permutation([*lengths, 777, 1])]
    assert checksums(parts).tolist() == [crc32c(part) for part in parts]
    assert checksums([]).shape == (0,)


def test_records_come_in_order_however_many_are_compared_at_once(tmp_path, monkeypatch):
    wanted = [bytes([i]) * (i * 37 % 101) for i in range(50)]
    path = tmp_path / "some.tfrecord"
    path.write_bytes(b"".join(map(frame, wanted)))
    for together in (1, 200, 1 << 20):
        monkeypatch.setattr(tfrecord_file, "TOGETHER", together)
        assert list(records(path)) == wanted
