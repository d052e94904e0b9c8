"""Lines of metrics.jsonl: what was written comes back, or is missed, but is never another number."""

import json
import random

import pytest

from train.run import log, records

GOOD = [
    {"kind": "train", "step": n, "loss": 3.25 - n / 7, "seconds": n + 0.5, "tokens": 96 * n}
    for n in range(1, 9)
] + [{"kind": "weights", "step": 8, "hidden": {"norm": 1.5e-7, "é": -3.0}}]


def test_records_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert records.read_records(path) == []
    path.write_text("".join(map(records.line, GOOD)))
    assert records.read_records(path) == GOOD
    assert [r["step"] for r in records.read_records(path, 3)] == [1, 2, 3]
    for text in path.read_text().splitlines():  # plain JSON for everybody else
        assert set(json.loads(text)) > {"kind", "step", "check"}
    assert (
        json.loads(records.line({"kind": "train", "step": 1, "loss": float("nan")}))["loss"] is None
    )


def test_no_flipped_bit_changes_a_number_or_a_name(tmp_path):
    """Every bit of a line, and random ones of a file; whatever is read is a record as it was written."""
    path, generator = tmp_path / "metrics.jsonl", random.Random(0)
    content = "".join(map(records.line, GOOD)).encode()
    first = content.index(b"\n")
    places = [*range(8 * first), *(generator.randrange(8 * len(content)) for _ in range(1000))]
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = records.read_records(path)
        assert all(record in GOOD for record in found)
        missing = (
            0 if damaged[place // 8 : place // 8 + 1] != b"\n" and content[place // 8] == 10 else 1
        )
        assert len(found) >= len(GOOD) - missing


def test_a_damaged_end_of_a_line_loses_no_record(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(records.line, GOOD[:3])).replace("}\n{", "}J{", 1))
    assert records.read_records(path) == GOOD[:3]
    records.keep_damaged(path)
    assert (
        "1 of 2 lines cannot be read or were changed, starting with line 1"
        in capsys.readouterr().out
    )
    assert (tmp_path / "unreadable-metrics.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", ['{"kind": "train", "step": 3, "loss": 2.0}', "[1]", "null", "{}"])
def test_lines_without_their_checksum_are_not_records(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    assert records.read_records(tmp_path / "metrics.jsonl") == []


def test_an_evaluation_that_a_kill_cut_in_two_is_made_again(tmp_path):
    """Wherever in its bytes the kill came."""
    path = tmp_path / "metrics.jsonl"
    with log.Recorder(path, 0, 9, 5) as recorder:
        recorder.train(1, {"loss": 0.5})
        recorder.flush()
        start = path.stat().st_size
        measured = {"weights": {"hidden": {"norm": 2.0}}, "spectrum": {}}
        recorder.evaluation(1, {"loss": 0.25}, "words", measured)
    whole = path.read_bytes()
    assert [r["kind"] for r in records.read_records(path)] == ["train", "weights", "held_out"]
    for stop in range(start, len(whole) - 1):
        path.write_bytes(whole[:stop])
        with log.Recorder(path, 1, 9, 5) as recorder:
            assert not recorder.evaluated(1)
            recorder.evaluation(1, {"loss": 0.25}, "words", measured)
        again = records.read_records(path)
        assert [r["kind"] for r in again] == ["train", "weights", "held_out"], stop
        assert again[:2] == records.read_records(path)[:2] and again[2]["loss"] == 0.25
    with log.Recorder(path, 1, 9, 5) as recorder:
        assert recorder.evaluated(1)
