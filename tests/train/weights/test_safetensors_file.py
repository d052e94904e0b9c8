"""Files of arrays: what is written is read, and no header that a stranger wrote makes us read outside of a file."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from train.config.fields import UserError
from train.weights.safetensors_file import INDEX, PlannedArray, Tensors, write_checkpoint

A = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
B = np.array([1.0, -0.0, np.inf], np.float32)


def file(folder, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + body)
    return folder


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
)
def test_what_is_written_is_read(dtype, kind, tmp_path):
    arrays = {"a": A, "b": B, "empty": np.zeros((0, 4), np.float32), "scalar": np.float32(7)}
    planned = [PlannedArray(n, np.shape(x), lambda x=x: np.asarray(x)) for n, x in arrays.items()]
    assert write_checkpoint(tmp_path, planned, dtype, 10**9) == ["model.safetensors"]
    tensors = Tensors(tmp_path)
    assert list(tensors) == list(arrays) and tensors.shape("a") == (2, 3)
    for name, x in arrays.items():
        found = tensors.read(name)
        assert found.dtype == kind and not found.flags.writeable
        np.testing.assert_array_equal(found, np.asarray(x).astype(kind))


def test_several_files(tmp_path):
    planned = [PlannedArray(n, (2, 3), lambda i=i: A + i) for i, n in enumerate("abcde")]
    assert len(write_checkpoint(tmp_path, planned, "F32", 48)) == 3
    tensors = Tensors(tmp_path)
    for i, name in enumerate("abcde"):
        np.testing.assert_array_equal(tensors.read(name), A + i)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 120
    for change, said in (
        ({"a": "../model.safetensors"}, "not the name of a file in this folder"),
        ({"a": "/etc/passwd"}, "not the name of a file in this folder"),
        ({"a": 3}, "not the name of a file in this folder"),
        ({"z": "model-00001-of-00003.safetensors"}, "does not hold 'z'"),
        ({"a": "model-00003-of-00003.safetensors"}, "does not list it there"),
        ({"e": "model-00009-of-00003.safetensors"}, "cannot be read"),
    ):
        changed = {"weight_map": {**index["weight_map"], **change}}
        (tmp_path / INDEX).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            Tensors(tmp_path)
    (tmp_path / INDEX).write_text("[1]")
    with pytest.raises(UserError, match="no weight_map"):
        Tensors(tmp_path)


def test_a_plan_is_held_to(tmp_path):
    with pytest.raises(
        ValueError, match=r"a has shape \(2, 3\), but its planned shape is \(3, 2\)"
    ):
        write_checkpoint(tmp_path, [PlannedArray("a", (3, 2), lambda: A)], "F32", 100)
    assert not (tmp_path / "model.safetensors").exists()


ENTRY = json.dumps(entry()).encode()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry(data_offsets=[0, 28])}, "invalid shape, data type, or offset"),
        ({"a": entry(data_offsets=[24, 0])}, "invalid offset for tensor `a`"),
        ({"a": entry(data_offsets=[-24, 0])}, "integer `-24`"),
        ({"a": entry(data_offsets=[0.0, 24.0])}, "floating point `0.0`"),
        ({"a": entry(data_offsets=[4, 28])}, "invalid offset for tensor `a`"),
        ({"a": entry(), "b": entry()}, "invalid offset for tensor `[ab]`"),
        ({"a": entry(shape=[2**62, 2**62])}, "overflow"),
        ({"a": entry(shape=[True, 6])}, "boolean `true`"),
        ({"a": entry(shape=[1] * 33)}, "invalid shape, data type, or offset"),
        ({"a": entry(dtype="F99")}, "unknown variant `F99`"),
        ({"a": entry(dtype=["F32"])}, "invalid type: sequence"),
        ({"a": {"dtype": "F32"}}, "missing field `shape`"),
        ({"a": 7}, "invalid type: integer `7`"),
        ({}, "file not fully covered"),
        ([1], "invalid type: sequence"),
        (b'{"a":{},"a":{}}', "missing field `dtype`"),
        (b'{"a":%b,"a":%b}' % (ENTRY, ENTRY), "a name occurs twice"),
        (b"\xff\xfe{}", "invalid UTF-8"),
        (b"[" * 100_000, "invalid type: sequence"),
        (b"{" + b'"a":1' + b"0" * 5000 + b"}", "number out of range"),
    ],
)
def test_hostile_headers_are_refused(header, said, tmp_path):
    with pytest.raises(UserError, match=said):
        Tensors(file(tmp_path, header, bytes(24)))


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        UserError, match=r"pytorch_model.bin is a pickled checkpoint.*save_pretrained"
    ):
        Tensors(tmp_path)
    for length in (0, 1, 10**6, 2**63):
        with pytest.raises(UserError, match="not a valid safetensors file"):
            Tensors(file(tmp_path, {"a": entry()}, bytes(24), length))
    (tmp_path / "model.safetensors").write_bytes(b"PK")
    with pytest.raises(UserError, match="not a valid safetensors file"):
        Tensors(tmp_path)
    for size in (23, 25):
        with pytest.raises(UserError, match="file not fully covered"):
            Tensors(file(tmp_path, {"a": entry()}, bytes(size)))
    whole = Tensors(file(tmp_path, {"a": entry(dtype="I32")}, bytes(24)))
    with pytest.raises(UserError, match="type I32; allowed are F32"):
        whole.read("a")


def test_damage_never_reaches_an_array(tmp_path):
    """Bytes of a good header changed at random: an error of ours, or arrays that lie inside the file."""
    planned = [PlannedArray("first", (2, 3), lambda: A), PlannedArray("second", (3,), lambda: B)]
    write_checkpoint(tmp_path, planned, "F32", 10**9)
    path = tmp_path / "model.safetensors"
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        bad = bytearray(good)
        for place in rng.integers(0, len(good) - 36, rng.integers(1, 4)):
            bad[place] = rng.choice(list(b'0123456789{}[]",:- \x00\xff'))
        path.write_bytes(bad)
        try:
            tensors = Tensors(tmp_path)
            assert sum(tensors.read(name).nbytes for name in tensors) == 36
        except UserError:
            refused += 1
    assert 200 < refused < 400


@pytest.mark.parametrize(
    ("dtype", "kind", "value"),
    [
        ("F32", "<f4", np.nan),
        ("F16", "<f2", np.inf),
        ("F64", "<f8", -np.inf),
        ("F64", "<f8", 1e300),
    ],
)
def test_values_that_are_no_numbers_are_refused_with_their_place(tmp_path, dtype, kind, value):
    array = A.astype(kind)
    array[1, 2] = value
    held = {"good": entry(dtype=dtype, data_offsets=[0, array.nbytes])}
    file(tmp_path, held, A.astype(kind).tobytes())
    np.testing.assert_array_equal(Tensors(tmp_path).read_finite("good"), A.astype(kind))
    file(tmp_path, {"layers.3.weight": held["good"]}, array.tobytes())
    with pytest.raises(
        UserError, match=r"'layers.3.weight' in .* holds 1 of 6 values .* at \[1, 2\]"
    ):
        Tensors(tmp_path).read_finite("layers.3.weight")


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_fifo_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a FIFO; only regular files are read"):
        Tensors(tmp_path)
