"""Token stores: what is written, that nothing but the source decides it, and what is refused."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support.runs import flags, records
from tests.train.data.test_batches import ODD_TEXTS, prose, write
from train import __main__ as command
from train import main
from train.data import batches, shards, token_store, tokenise
from train.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
TEXTS = [text for text in ODD_TEXTS if text] + [prose(i, 60) for i in range(40)]
HELD_OUT = [prose(100 + i, 50) for i in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    files = {f"{i:02d}.txt": prose(i) for i in range(40)} | {"empty.txt": "", "zero.bin": b"\0x"}
    return write(tmp_path_factory.mktemp("texts"), files)


def build(out, source, *, workers=1, tokenizer="bytes", shard_megabytes=0.01, **more):
    asked = tokenise.Arguments(
        out=str(out),
        source=str(source),
        workers=workers,
        tokenizer=str(tokenizer),
        shard_megabytes=shard_megabytes,
        **more,
    )
    return tokenise.build(out, asked)


def files(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != "lock"}


def texts_of(store, row):
    everything = np.concatenate(list(row.arrays))
    ends = np.flatnonzero(everything == store.tokenizer.separator)
    return [store.tokenizer.decode(part) for part in np.split(everything, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    return build(tmp_path_factory.mktemp("store"), folder, tokenizer="bpe-512")


# --- what is written


def test_a_store_holds_the_text(folder, store):
    assert len(store.shards["train"]) > 3
    found = texts_of(store, store.train) + texts_of(store, store.held_out)
    assert sorted(found) == sorted(prose(i) for i in range(40))
    assert (
        1 <= store.held_out.documents <= 3
        and store.train.documents + store.held_out.documents == 40
    )
    assert store.train_bytes == sum(len(t.encode()) for t in texts_of(store, store.train))
    store.verify()


def test_a_store_does_not_depend_on_processes_or_place(folder, store, tmp_path):
    two = build(tmp_path / "two", folder, tokenizer="bpe-512", workers=2)
    assert files(tmp_path / "two") == files(store.folder) and two.digest == store.digest
    other = build(tmp_path / "other", folder, tokenizer="bpe-512", shard_megabytes=0.02)
    assert len(other.shards["train"]) < len(store.shards["train"])
    assert texts_of(other, other.train) == texts_of(store, store.train)


def test_large_files_are_cut_at_lines(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(3000))
    write(tmp_path / "in", {"one.txt": text, "wide.txt": "é" * 20_000})
    made = build(tmp_path / "out", tmp_path / "in")
    parts = texts_of(made, made.train) + texts_of(made, made.held_out)
    lines = [part for part in parts if part[0] != "é"]
    assert len(lines) > 3 and all(part.endswith("\n") for part in lines)
    assert "".join(lines) == text  # train and held-out parts follow each other
    assert "".join(part for part in parts if part[0] == "é") == "é" * 20_000


# --- resuming


def test_kill_and_resume(folder, store, tmp_path):
    """Killed without warning again and again, and by the same command at last what nobody disturbed."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "train",
        "tokenise",
        "--out",
        str(out),
        "--source",
        str(folder),
    ]
    command += ["--tokenizer", "bpe-512", "--shard_megabytes", "0.01", "--workers", "2"]
    slow = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # Every worker waits after a shard, so that there is a moment to kill it in.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time, os\n"
        "real = os.replace\n"
        "def replace(a, b):\n"
        "    real(a, b)\n"
        "    if str(b).endswith('.seal'): time.sleep(0.3)\n"
        "os.replace = replace\n"
    )
    seals = 0
    process = subprocess.Popen(
        command, cwd=ROOT, env=slow, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while seals < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        seals = len(list(out.glob("*.seal")))
    process.kill()
    process.wait()
    assert seals >= 2 and not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="begun and not finished"):
        token_store.open_store(out)
    # Workers end with the command that started them.
    while time.monotonic() < deadline:
        if subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).returncode:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers outlived their command")
    before = {
        p.name: p.stat().st_mtime_ns
        for p in out.glob("*.tokens")
        if p.with_suffix(".seal").exists()
    }
    (out / "train-00001.tokens.77.part").write_bytes(b"torn")
    build(out, folder, tokenizer="bpe-512")
    assert files(out) == files(store.folder)
    assert before and all((out / n).stat().st_mtime_ns == t for n, t in before.items())


def test_a_finished_store_is_left_alone(folder, store, monkeypatch):
    monkeypatch.setattr(shards, "make_shard", None)
    before = files(store.folder)
    build(store.folder, folder, tokenizer="bpe-512")
    assert files(store.folder) == before


def test_other_arguments_or_files_are_refused(folder, store, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer: .*bpe-512.* -> bytes"):
        build(store.folder, folder, tokenizer="bytes")
    shutil.copytree(folder, tmp_path / "in")
    build(tmp_path / "out", tmp_path / "in")
    (tmp_path / "in/01.txt").write_text("something else")
    with pytest.raises(UserError, match="source's files"):
        build(tmp_path / "out", tmp_path / "in")
    write(tmp_path / "mine", {"thesis.txt": "mine"})
    with pytest.raises(UserError, match=r"holds thesis\.txt"):
        build(tmp_path / "mine", folder)


# --- training from a store


def load(store, **more):
    wanted = {"length": 16, "batch_size": 8, "seed": 3} | more
    return batches.load_text(f"store:{store.folder}", **wanted)


def test_a_store_gives_the_batches_of_one_row(store):
    """Many shards, whose borders windows cross, give what the same tokens in one array give."""
    made = load(store)
    assert len(made.train.arrays) > 3 and made.vocab_size == 512
    rows = [
        token_store.TokenSequence.from_array(
            np.concatenate(list(row.arrays)), made.tokenizer.separator
        )
        for row in (made.train, made.held)
    ]
    one = dataclasses.replace(made, train=rows[0], held=rows[1])
    for documents in (False, True):
        a, b = (dataclasses.replace(x, documents=documents) for x in (made, one))
        assert a.windows == b.windows and a.unigram_entropy() == b.unigram_entropy()
        for step in range(a.windows // 8 + 2):
            np.testing.assert_array_equal(a.batch(step), b.batch(step))
        np.testing.assert_array_equal(np.stack(a.held_out(3)), np.stack(b.held_out(3)))
    assert not np.array_equal(made.batch(0), load(store, seed=4).batch(0))
    assert made.summary()["documents"] == 40 and made.digest == store.digest


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_batches_of_a_store(store, processes, documents):
    whole = load(store, documents=documents)
    each = 8 // processes
    hosts = [load(store, documents=documents) for _ in range(processes)]
    for step in (7, 0, 10_000):
        parts = [h.batch(step, slice(p * each, (p + 1) * each)) for p, h in enumerate(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole.batch(step))


def test_documents_are_cut_and_filled_as_the_recipes_do(tmp_path):
    """Against what the library `tokenizers` does when it is told to cut and to fill."""
    texts = ["a" * n for n in (1, 3, 14, 15, 16, 17, 40)]
    write(tmp_path / "in", {f"{i}.txt": text for i, text in enumerate(texts)})
    # So small that each file stands in a shard of its own.
    store = build(tmp_path / "out", tmp_path / "in", shard_megabytes=1e-6 * 64)
    made = load(store, length=15, batch_size=2, documents=True)
    count = made.windows
    rows = np.concatenate([made.batch(step) for step in range(3 * count)])[: 3 * count]
    end = made.tokenizer.separator
    for epoch in np.split(rows, 3):
        found = {row.tobytes() for row in epoch}
        assert len(found) == len(
            {len(t) if len(t) < 15 else 15 for t in texts_of(store, store.train)}
        )
    for row in rows:
        real = row[row >= 0]
        assert (row[len(real) :] == batches.PADDING).all()
        assert real[-1] == end and (real[:-1] == ord("a")).all() and len(real) >= 2
    lengths = sorted(min(len(t) + 1, 16) for t in texts_of(store, store.train))
    assert sorted((row >= 0).sum() for row in rows[:count]) == lengths


def test_a_damaged_store_is_not_trained_on(store, tmp_path, capsys):
    shutil.copytree(store.folder, tmp_path / "copy")
    path = tmp_path / "copy/train-00001.tokens"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    flags = ["--data.text", f"store:{tmp_path / 'copy'}", "--run.folder", str(tmp_path / "run")]
    assert command.main(["toy", *flags]) == 2  # the toy's own tokenizer gives way to the store's
    assert "train-00001.tokens is damaged" in capsys.readouterr().err
    assert command.main(["toy", "--data.tokenizer", "bpe-512", *flags]) == 2
    assert "data.tokenizer = bpe-512 would have no effect" in capsys.readouterr().err


def test_training_from_a_store(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    store = build(tmp_path / "store", folder)
    text = ["--data.text", f"store:{store.folder}", "--data.tokenizer", "bpe-4096"]
    wanted = [*flags(tmp_path), *text, "--data.cache", ".cache/data", "--data.documents", "True"]
    assert main.main([*wanted, "--run.steps", "4"]) == 0
    seen = records(tmp_path / "run")
    assert [r["step"] for r in seen if r["kind"] == "train"] == [1, 2, 3, 4]
    held_out = [r for r in seen if r["kind"] == "held_out"]
    assert held_out[0]["loss"] == pytest.approx(np.log(257), abs=0.05)
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert "40 documents" in capsys.readouterr().out


# --- damage


def test_one_flipped_bit_is_found(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    damaged = [p for p in (tmp_path / "copy").iterdir() if p.suffix in (".tokens", ".ends")]
    damaged = [p for p in damaged if p.stat().st_size]
    for path in damaged[:3] + damaged[-1:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        with pytest.raises(token_store.Damaged, match=path.name):
            token_store.open_store(tmp_path / "copy").verify()
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    token_store.open_store(tmp_path / "copy").verify()


def test_sizes_names_and_vocabulary_are_checked_at_once(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    path = copy / "train-00001.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(
        token_store.Damaged, match=f"{len(content) - 2} bytes instead of {len(content)}"
    ):
        token_store.open_store(copy)
    path.unlink()
    with pytest.raises(token_store.Damaged, match="missing"):
        token_store.open_store(copy)
    (tmp_path / "outside").write_bytes(content)
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(token_store.Damaged, match="link to"):
        token_store.open_store(copy)
    path.unlink()
    path.write_bytes(content)
    token_store.open_store(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(token_store.Damaged, match=r"tokenizer\.json is damaged"):
        token_store.open_store(copy)


def test_no_manifest_gets_through_by_chance(store, tmp_path):
    """Random damage to the manifest is refused in our words, or leaves the content as it was."""
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    path = copy / "manifest.json"
    good = path.read_bytes()
    rng = random.Random(0)
    refused = 0

    def replaced(value):
        """One random leaf of a JSON tree replaced by something strange."""
        if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            if rng.random() < 0.1:
                return {k: v for k, v in value.items() if k != key}
            return value | {key: replaced(value[key])}
        if isinstance(value, list) and value:
            i = rng.randrange(len(value))
            return [*value[:i], replaced(value[i]), *value[i + 1 :]]
        strange = [None, -1, 0, 2**70, 1.5, True, "", "../../x", [], {}, "a" * 64, float("inf")]
        return rng.choice(strange)

    for trial in range(300):
        if trial % 3:
            content = json.dumps(replaced(json.loads(good))).encode()
        else:
            content = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            content = bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        path.write_bytes(content)
        try:
            opened = token_store.open_store(copy)
        except token_store.Damaged as error:
            refused += 1
            assert str(copy) in str(error)
            continue
        # Only what nothing reads may have changed: the description, a count of bytes, a digest.
        assert len(opened.train) == len(store.train)
        assert opened.tokenizer.vocab_size == store.tokenizer.vocab_size
    assert refused > 200


# --- what is said


def test_options_of_other_sources_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="--split applies to tfds data sets only"):
        build(tmp_path, folder, split="train")
    with pytest.raises(UserError, match="end_of_text"):
        build(tmp_path, folder, end_of_text="</s>")
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(UserError, match="no text to train on"):
        build(tmp_path / "out", tmp_path / "one.txt")
    assert not (tmp_path / "out/manifest.json").exists()
    for wrong in ("--workers 0", "--shard_megabytes inf", "--shard_megabytes nan"):
        with pytest.raises(UserError, match=wrong.split()[0]):
            tokenise.main(["--out", str(tmp_path / "out"), *wrong.split()])
    with pytest.raises(ValueError, match="tokenise --source tfds:c4/en --out FOLDER"):
        batches.load_text("tfds:c4/en", length=4, batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"nothing to tokenise.*--data.text zipf "):
        build(tmp_path, "zipf")


def test_the_command(folder, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "s"), "--source", str(folder), "--tokenizer", "bytes"]
    assert tokenise.main([*arguments, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "documents to train on" in said and f"store:{tmp_path / 's'}" in said
    assert tokenise.main(["--out", str(tmp_path / "s"), "--verify", "True"]) == 0
    (tmp_path / "s/train-00000.tokens").write_bytes(b"")
    with pytest.raises(UserError, match="train-00000"):
        tokenise.main(["--out", str(tmp_path / "s"), "--verify", "True"])


@pytest.mark.parametrize(
    "content", ["{}", "7", "[1]", "{", '{"wanted": 3, "tokenizer": {}}', '{"a":' * 9999]
)
def test_a_plan_of_another_form_is_damage(tmp_path, content):
    text = write(tmp_path / "text", {"a.txt": prose(0), "b.txt": prose(1)})
    build(tmp_path / "out", text, tokenizer="bytes")
    (tmp_path / "out/plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan.json is damaged.*begin again"):
        build(tmp_path / "out", text, tokenizer="bytes")


def test_too_many_shards_are_refused_at_once(tmp_path):
    text = write(tmp_path / "text", {"a.txt": prose(0, 40_000)})
    with pytest.raises(UserError, match=r"would become .* shards; allowed are 99,999. Nearest"):
        build(tmp_path / "out", text, tokenizer="bytes", shard_megabytes=1e-6)
