"""Digests of arrays and of files: nothing that was changed passes for what was written."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding

from train.config.fields import Config
from train.run import integrity
from train.run.checkpoints import Checkpoints, describe, flat, structure
from train.torture import damage


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def reference(x: np.ndarray) -> str:
    """The digest of an array, from the bytes of its elements in C order."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
    words = np.frombuffer(np.ascontiguousarray(x).tobytes(), unsigned).astype(np.uint32)
    first = mix(words ^ mix(np.arange(words.size, dtype=np.uint32) + np.uint32(0x9E3779B9)))
    second = mix(first ^ np.uint32(0x7F4A7C15))
    sums = [int(part.sum(dtype=np.uint64)) % 2**32 for part in (first, second)]
    return f"{sums[0]:08x}{sums[1]:08x}"


def arrays() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).normal(size=(8, 6))
    types = ("float32", "float16", "int32", "uint8", "int16", "bool", ml_dtypes.bfloat16)
    found = {f"{np.dtype(t)}": (values * 3).astype(t) for t in types}
    return {**found, "scalar": np.float32(2.5), "empty": np.zeros((0, 3), np.float32)}


def test_digests_are_those_of_the_bytes_on_every_mesh():
    plain = arrays()
    wanted = {name: reference(np.asarray(x)) for name, x in plain.items()}
    assert len(set(wanted.values())) == len(wanted)
    assert integrity.digests(jax.tree.map(jnp.asarray, plain)) == dict(sorted(wanted.items()))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("a", "b"), (kind, kind))
        placed = {
            name: jax.device_put(
                x, NamedSharding(mesh, jax.P("a", "b") if np.shape(x) == (8, 6) else jax.P())
            )
            for name, x in plain.items()
        }
        assert integrity.digests(placed) == dict(sorted(wanted.items()))
    with jax.enable_x64(True):
        wide = np.random.default_rng(1).normal(size=(3, 5))
        assert integrity.digests({"x": jnp.asarray(wide)}) == {"x": reference(wide)}


def test_every_single_bit_counts():
    x = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    seen = {reference(x)}
    for bit in range(x.size * 32):
        bits = x.copy().view(np.uint32)
        bits.reshape(-1)[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(reference(bits.view(np.float32)))
    assert len(seen) == 1 + x.size * 32
    swapped = x.copy()
    swapped[0, 0], swapped[2, 4] = x[2, 4], x[0, 0]
    assert reference(swapped) not in seen
    assert reference(x.reshape(5, 3)) == reference(x)  # shapes are compared beside the digest


def state(step: int) -> dict:
    values = np.random.default_rng(step).normal(size=(40, 6)).astype(np.float32)
    return {
        "params": {"a": jnp.asarray(values), "b": jnp.arange(5.0) + step},
        "optimizer": {"mu": jnp.asarray(values[::-1], jnp.bfloat16), "none": None},
        "step": jnp.asarray(step, jnp.int32),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2, and their meta."""
    folder = tmp_path_factory.mktemp("checkpoints")
    meta = describe(Config(), "text", state(1))
    with Checkpoints(folder, 3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), meta, step)
        checkpoints.wait()
    return folder, meta


def abstract() -> dict:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(1))


def restored(folder, meta) -> tuple[int, list[str]]:
    """The step that a folder gives back, which must be whole, and what was said."""
    said: list[str] = []
    with Checkpoints(folder, 3) as checkpoints:
        found = checkpoints.restore(abstract(), meta, said.append)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[0], state(found[1]))
    assert structure(found[0]) == structure(state(1))
    return found[1], said


def test_what_was_written_passes(saved):
    assert restored(*saved) == (2, [])


@pytest.mark.parametrize("seed", range(24))
def test_damaged_files_are_found_and_the_checkpoint_before_used(saved, tmp_path, seed):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    done = damage.one(folder / "2", random.Random(seed), ("flip", "cut", "delete")[seed % 3])
    step, said = restored(folder, saved[1])
    assert len(said) == 1
    if done == "delete seal.json":  # whose arrays are judged by their own digests
        assert step == 2 and "no seal.json" in said[0]
    else:
        assert step == 1 and (folder / "unreadable-2").is_dir(), done
        assert "step 2 cannot be read" in said[0]


@pytest.mark.parametrize("seed", range(12))
def test_without_a_seal_no_wrong_array_passes(saved, tmp_path, seed):
    """Killed between the rename and the seal, and then damaged: digests of arrays are what is left."""
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    (folder / "2/seal.json").unlink()
    damage.one(folder / "2/state", random.Random(seed), "flip")
    restored(folder, saved[1])


def test_eight_devices_to_four_to_one_and_back_are_bit_equal(tmp_path):
    meta = describe(Config(), "text", state(5))
    current = state(5)
    for step, count in enumerate((8, 4, 1, 8)):
        mesh = jax.make_mesh((count,), ("a",), (AxisType.Auto,), devices=jax.devices()[:count])
        split = {
            path: NamedSharding(mesh, jax.P("a") if x.shape[:1] == (40,) else jax.P())
            for path, x in flat(current).items()
        }
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            current,
            jax.tree.unflatten(jax.tree.structure(current), split.values()),
        )
        with Checkpoints(tmp_path, 9) as checkpoints:
            if step:
                found = checkpoints.restore(placed, meta, print)
                assert found is not None and found[1] == step - 1
                current = found[0]
                assert len(current["params"]["a"].sharding.device_set) == count
            current = jax.device_put(current, jax.tree.map(lambda x: x.sharding, placed))
            checkpoints.save(current, meta, step)
            checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(current), state(5))


def test_an_array_that_orbax_returns_wrong_is_found(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    plain = ocp.Checkpointer.restore

    def wrong(self, path, *rest, **more):
        arrays = plain(self, path, *rest, **more)
        if path.parent.name == "2" and path.name == "state":
            arrays["params/a"] = arrays["params/a"].at[3, 2].add(1e-6)
        return arrays

    monkeypatch.setattr(ocp.Checkpointer, "restore", wrong)
    step, said = restored(folder, saved[1])
    assert step == 1 and "1 of 4 arrays differ from what was saved: params/a" in said[0]


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_as_well(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    (folder / "unreadable-2").mkdir()
    damage.one(folder / "2", random.Random(0), "cut")
    assert restored(folder, saved[1])[0] == 1
    assert (folder / "unreadable-2-2").is_dir()


def test_further_files_are_no_damage(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    (folder / "2/.DS_Store").write_text("left by a file manager")
    assert restored(folder, saved[1]) == (2, [])


HOSTILE = [
    *(None, 0, "x", [], {}, {"digest": 1}, {"files": [], "digest": "0"}),
    integrity.add_digest({}),
    integrity.add_digest({"files": {"../../../etc/passwd": [1, "00"]}}),
    integrity.add_digest({"files": {"/etc/passwd": [1, "00"]}}),
    integrity.add_digest({"files": "all"}),
    integrity.add_digest({"files": {"meta/metadata": None}}),
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_seals_are_damage_and_no_path_in_them_is_opened(tmp_path, value):
    (tmp_path / "a").write_text("a")
    (tmp_path / "seal.json").write_text(json.dumps(value, indent=1) + "\n")
    with pytest.raises(integrity.Damaged):
        integrity.check_seal(tmp_path)


META = {
    "step": 3,
    "config": [],
    "text": 5,
    "structure": {"params/a": 3},
    "names": {},
    "digests": ["a"],
}


@pytest.mark.parametrize("field", META)
def test_a_meta_of_another_form_is_damage_though_its_digest_holds(saved, tmp_path, field):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    path = folder / "2/meta/metadata"
    meta = integrity.verify_digest(json.loads(path.read_text()))
    path.write_text(json.dumps(integrity.add_digest({**meta, field: META[field]})))
    integrity.seal(folder / "2")
    step, said = restored(folder, saved[1])
    assert step == 1 and "meta" in said[0]


def test_random_text_in_place_of_json_is_damage(saved, tmp_path):
    generator = random.Random(0)
    text = (saved[0] / "2/seal.json").read_bytes()
    (tmp_path / "a").write_text("a")
    for _ in range(300):
        noise = bytearray(text[: generator.randrange(len(text))])
        for _ in range(generator.randrange(1, 9)):
            noise.insert(generator.randrange(len(noise) + 1), generator.randrange(256))
        (tmp_path / "seal.json").write_bytes(noise)
        with pytest.raises(integrity.Damaged):
            integrity.check_seal(tmp_path)
