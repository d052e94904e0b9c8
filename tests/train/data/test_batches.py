"""Text, tokens, batches: exact, split once, and a pure function of (seed, step)."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from train.data import batches, corpus, token_store, tokens
from train.errors import UserError

ODD_TEXTS = [
    "",
    "plain words, and  two spaces\t\n\n  and an indented line\n",
    "naïve café — “quotes” … Ωμέγα жжж 漢字 かな 한글 \u200d👩‍👩‍👧‍👦 🇩🇪 e\u0301 \ufeff",
    "\u0000\u0001\x7f\x85\u2028\u2029\ufffd\U0010ffff",
    "\r\n mixed \n\r ends \r",
    f"the separator {tokens.SEPARATOR} spelled out{tokens.SEPARATOR}",
    " " * 50 + "x" * 50,
]


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def prose(seed, words=400):
    """Words of two or three syllables, some of them often: something that a BPE can merge."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bdklmnrst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    lexicon = ["".join(np.random.default_rng(i).choice(syllables, 2)) for i in range(200)]
    chosen = rng.zipf(1.3, words) % len(lexicon)
    return " ".join(lexicon[i] + (".\n" if i % 11 == 0 else "") for i in chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    files = {f"part{i % 3}/{i}.txt": prose(i) for i in range(60)}
    return write(tmp_path_factory.mktemp("texts"), files)


def load(folder, tokenizer="bytes", length=16, batch_size=4, seed=0, cache=None):
    return batches.load_text(
        str(folder), tokenizer, length=length, batch_size=batch_size, seed=seed, cache=cache
    )


def contents(entry):
    return {path.name: path.read_bytes() for path in entry.iterdir()}


# --- corpus


def test_the_split_depends_on_names_and_sizes_alone(tmp_path, folder):
    found = corpus.read_corpus(str(folder))
    names = {f"part{i % 3}/{i}.txt" for i in range(60)}
    assert found.files == 60 and (found.skipped, found.repaired) == (0, 0)
    assert set(found.train) | set(found.held_out) == names
    assert not set(found.train) & set(found.held_out)
    assert 2 <= len(found.held_out) <= 4  # 5 % of 60 files of about the same size
    # Other contents and another place: each name stays where it was.
    files = {name: text[::-1] for name, text in (found.train | found.held_out).items()}
    moved = corpus.read_corpus(str(write(tmp_path, files)))
    assert moved.digest != found.digest
    assert set(moved.held_out) == set(found.held_out)


def test_more_files_move_only_the_end_of_the_order():
    order = sorted(
        (f"{i}.txt" for i in range(1000)), key=lambda n: hashlib.sha256(n.encode()).digest()
    )
    _, all_held_out = corpus.split({name: "x" * 10 for name in order})
    assert sorted(order[:50]) == list(all_held_out)
    rng = np.random.default_rng(0)
    for _ in range(5):
        some = [name for name in order if rng.random() < 0.7]
        train, held_out = corpus.split({name: "x" * 10 for name in some})
        assert set(held_out) == set(some[: -(-len(some) // 20)])
        assert list(train) == sorted(some[-(-len(some) // 20) :])


def test_enough_is_held_out_whatever_the_sizes():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 19, 20, 21, 50, 200):
        texts = {f"{i}.txt": "x" * int(size) for i, size in enumerate(rng.lognormal(6, 2, count))}
        train, held_out = corpus.split(texts)
        total = sum(map(len, texts.values()))
        kept = sum(map(len, train.values())), sum(map(len, held_out.values()))
        assert sum(kept) == total
        # At least a twentieth; at most one file (of a twentieth) and one character a file more.
        assert 0.05 * total <= kept[1] <= 0.1 * total + count


def test_a_large_file_gives_its_end(tmp_path):
    text = prose(0, words=3000)
    found = corpus.read_corpus(str(write(tmp_path, {"one.txt": text}) / "one.txt"))
    (train,), (held_out,) = found.train.values(), found.held_out.values()
    assert train + held_out == text
    assert len(held_out) == np.ceil(corpus.HELD_OUT * len(text))
    small = {f"{i}.txt": prose(i, 20) for i in range(50)}
    train, held_out = corpus.split({"big.txt": text, **small})
    assert train["big.txt"] + held_out["big.txt"] == text
    assert all((name in train) != (name in held_out) for name in small)


def test_digest_follows_names_and_contents_not_the_place(tmp_path):
    files = {"a.txt": "one two three", "b/c.txt": "four"}
    digest = corpus.read_corpus(str(write(tmp_path / "x", files))).digest
    assert corpus.read_corpus(str(write(tmp_path / "y", files))).digest == digest
    others = [
        files | {"a.txt": "one two threE"},
        {"A.txt": files["a.txt"], "b/c.txt": "four"},
        {"a.txt": "one two threefour", "b/c.txt": ""},
    ]
    digests = {
        corpus.read_corpus(str(write(tmp_path / str(i), f))).digest for i, f in enumerate(others)
    }
    assert len(digests | {digest}) == 4


def test_what_is_not_text_is_counted(tmp_path):
    files = {
        "good.txt": "good text " * 30,
        "latin.txt": "caf\xe9 ".encode("latin-1") * 10,
        "picture.png": b"\x89PNG\0\0\0",
        "empty.txt": "",
        ".hidden": "not read",
        ".git/config": "not read",
    }
    write(tmp_path, files)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    found = corpus.read_corpus(str(tmp_path))
    assert (found.files, found.skipped, found.repaired) == (2, 4, 1)
    assert "caf\ufffd" in found.train["latin.txt"]
    assert set(found.train) == {"good.txt", "latin.txt"}


def test_patterns_and_folders_find_the_same(tmp_path):
    write(tmp_path, {"a/x.txt": "one " * 20, "a/b/y.txt": "two " * 20, "a/b/z.md": "three " * 20})
    pattern = corpus.read_corpus(f"{tmp_path}/a/**/*.txt")
    assert set(pattern.train) == {"x.txt", "b/y.txt"}
    both = corpus.read_corpus(f"{tmp_path}/a/**")
    assert both.digest == corpus.read_corpus(f"{tmp_path}/a").digest
    assert set(corpus.read_corpus(f"{tmp_path}/*/x.txt").train) == {"a/x.txt"}


@pytest.mark.parametrize(
    ("files", "source", "error", "fragments"),
    [
        ({}, "", ValueError, ["contains no text", "{root}", "found 0 files"]),
        ({"a.bin": b"\0\0", "b.txt": ""}, "", ValueError, ["found 2 files", "1 are unreadable"]),
        ({}, "missing.txt", FileNotFoundError, ["no file or folder", "{root}", "texts/**/*.txt"]),
        ({"a.md": "x"}, "**/*.txt", FileNotFoundError, ["no file matches", "**/*.txt", "{root}"]),
        ({"a.txt": "x" * 300}, "", ValueError, ["is too short", "held-out", "15", "16", "17"]),
        ({"a.txt": "x"}, "", ValueError, ["training", "length=16 needs 17; give more text"]),
    ],
)
def test_too_little_text_is_refused_with_what_was_searched(
    tmp_path, files, source, error, fragments
):
    write(tmp_path, files)
    with pytest.raises(error) as caught:
        load(tmp_path / source)
    for fragment in fragments:
        assert fragment.format(root=tmp_path) in str(caught.value)


def test_standard_library_is_found_without_its_tests():
    paths, searched = corpus._stdlib()
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(paths)
    assert len(paths) > 300 and "argparse.py" in os.listdir(searched.split(" for ")[0])
    for name in paths:
        assert name.endswith(".py")
        assert not {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))
        assert "sysconfigdata" not in name


# --- unknown tokenizers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", 'must be "bytes", "bpe-<size>".* an existing file tokenizer.json'),
        ("bpe4096", 'must be "bytes", "bpe-<size>"'),
        ("bpe-100", '512 to 65536 tokens; nearest: "bpe-512"'),
        ("bpe-100000", 'nearest: "bpe-65536"'),
    ],
)
def test_unknown_tokenizers_are_refused(folder, name, message):
    with pytest.raises(ValueError, match=message):
        load(folder, tokenizer=name)


# --- batches


def test_a_batch_depends_on_seed_and_step_alone(folder):
    first, second = load(folder), load(folder)
    forward = [first.batch(step) for step in range(12)]
    backward = [second.batch(step) for step in reversed(range(12))][::-1]
    for a, b in zip(forward, backward):
        assert a.dtype == np.int32 and a.shape == (4, 17)
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(forward[0], forward[1])
    assert not np.array_equal(load(folder, seed=1).batch(0), forward[0])


@pytest.mark.parametrize("arrays", [1, 3])
@pytest.mark.parametrize("documents", [False, True])
def test_batches_of_many_steps_are_those_of_each(folder, arrays, documents):
    """Across the ends of epochs, of arrays and of documents."""
    made = load(folder, seed=5)
    whole, separator = made.train.arrays[0], made.vocab_size - 1
    parts = [
        token_store.TokenSequence.from_array(x, separator) for x in np.array_split(whole, arrays)
    ]
    train = token_store.TokenSequence(
        [x for part in parts for x in part.arrays], [x for part in parts for x in part.ends]
    )
    made = dataclasses.replace(made, train=train, documents=documents)
    epoch = made.windows // made.batch_size
    found = made.batches(epoch - 2, epoch + 5)
    assert found.dtype == np.int32 and found.shape == (7, *made.shape)
    each = [made.batch(step) for step in range(epoch - 2, epoch + 5)]
    np.testing.assert_array_equal(found, each)
    if not documents:  # wherever the arrays are divided
        whole = dataclasses.replace(load(folder, seed=5), documents=False)
        np.testing.assert_array_equal(found, whole.batches(epoch - 2, epoch + 5))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_same_batch(folder, processes):
    made = load(folder)
    for step in (0, 3, 10_000):
        each = 4 // processes
        parts = [made.batch(step, slice(p * each, (p + 1) * each)) for p in range(processes)]
        np.testing.assert_array_equal(np.concatenate(parts), made.batch(step))


def starts(made, epoch):
    """Where each window of an epoch begins, by looking it up in the text."""
    first, last = epoch * made.windows, (epoch + 1) * made.windows
    steps = range(first // made.batch_size, -(-last // made.batch_size))
    rows = np.concatenate([made.batch(step) for step in steps])
    rows = rows[first % made.batch_size :][: made.windows]
    where = {}
    windows = np.lib.stride_tricks.sliding_window_view(made.train.arrays[0], made.length + 1)
    for start, window in enumerate(windows):
        where.setdefault(window.tobytes(), []).append(start)
    found = [where[row.astype(np.uint16).tobytes()] for row in rows]
    assert all(len(places) == 1 for places in found)
    return [places[0] for places in found]


def test_an_epoch_visits_every_window_once(tmp_path):
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 2000)))
    made = load(write(tmp_path, {"a.txt": text}), length=16, batch_size=7)
    assert made.windows % made.batch_size  # epochs end inside a batch
    orders = [starts(made, epoch) for epoch in range(4)]
    for order in orders:
        ordered = np.sort(order)
        np.testing.assert_array_equal(np.diff(ordered), 16)
        assert 0 <= ordered[0] < 16 and len(order) == made.windows
        # Never more left unread than the offset before and less than two windows after.
        assert len(made.train) - 1 - (ordered[-1] + 16) < 2 * 16
    assert len({tuple(order) for order in orders}) == 4
    assert len({min(order) for order in orders}) > 1


def test_a_text_of_one_window_repeats_it(tmp_path):
    made = load(write(tmp_path, {"a.txt": "0123456789" * 3}), length=1, batch_size=5)
    assert made.batch(3).shape == (5, 2)
    short = token_store.TokenSequence.from_array(
        made.train.arrays[0][:18], made.tokenizer.separator
    )
    made = batches.TokenBatches(short, made.held, made.tokenizer, made.corpus, 16, 5, 0, "off", {})
    assert made.windows == 1
    whole = {
        short.arrays[0][:17].astype(np.int32).tobytes(),
        short.arrays[0][1:18].astype(np.int32).tobytes(),
    }
    assert {row.tobytes() for step in range(20) for row in made.batch(step)} == whole


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permutation_is_one(size):
    index = np.arange(size)
    shuffled = batches.permutation(index, size, (0, 1))
    np.testing.assert_array_equal(np.sort(shuffled), index)
    np.testing.assert_array_equal(batches.permutation(index[::-1], size, (0, 1)), shuffled[::-1])


def test_permutations_are_like_random_ones():
    size, keys = 11, 4000
    shuffles = np.array([batches.permutation(np.arange(size), size, key) for key in range(keys)])
    # Two positions get each of the 110 pairs of values equally often: chi-square with 109 degrees
    # of freedom has mean 109 and deviation sqrt(218); five of them.
    for i, j in ((0, 1), (1, 0), (3, 10), (5, 6)):
        pairs = np.bincount(shuffles[:, i] * size + shuffles[:, j], minlength=size**2)
        assert set(np.flatnonzero(pairs == 0)) >= {k * (size + 1) for k in range(size)}
        expected = keys / (size * (size - 1))
        chi_square = ((pairs - expected) ** 2 / expected).sum() - size * expected
        assert chi_square < 109 + 5 * np.sqrt(218)
    # A large one moves neighbours apart: no correlation of position and value.
    large = batches.permutation(np.arange(100_000), 100_000, "key")
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 5 / np.sqrt(100_000)
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 5 / np.sqrt(100_000)


def test_held_out_batches_are_fixed_and_spread(folder):
    made = load(folder)
    chosen = made.held_out(5)
    assert [batch.shape for batch in chosen] == [(4, 17)] * 5
    for a, b in zip(chosen, load(folder, seed=9).held_out(5)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(chosen[0][0], made.held.arrays[0][:17])
    np.testing.assert_array_equal(chosen[-1][-1], made.held.arrays[0][-17:])
    every = made.held_out(10**9)
    assert len(every) == (len(made.held) - 1) // 16 // 4
    with pytest.raises(ValueError, match="batches=0"):
        made.held_out(0)


def test_a_short_held_out_text_gives_one_batch(tmp_path):
    made = load(write(tmp_path, {"a.txt": "abcdefghij" * 40}), length=16, batch_size=4)
    assert len(made.held) == 21
    (batch,) = made.held_out(3)
    assert batch.shape == (4, 17)


def test_no_text_is_in_both_parts(folder):
    made = load(folder, tokenizer="bpe-512")
    assert made.decode(made.train.arrays[0]) == "".join(made.corpus.train.values())
    assert made.decode(made.held.arrays[0]) == "".join(made.corpus.held_out.values())


def test_figures(folder):
    made = load(folder, tokenizer="bpe-512")
    held = "".join(made.corpus.held_out.values()).encode()
    assert made.bytes_per_token == pytest.approx(len(held) / len(made.held))
    (train,), (held_out,) = (row.arrays for row in (made.train, made.held))
    train, held_out, vocabulary = train.tolist(), held_out.tolist(), made.vocab_size
    counts = {token: train.count(token) for token in set(held_out)}
    logs = [np.log((counts[t] + 1) / (len(train) + vocabulary)) for t in held_out]
    assert made.unigram_entropy() == pytest.approx(-np.mean(logs), rel=1e-12)
    summary = made.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["digest"] == made.digest
    assert summary["digests"]["text"] == corpus.read_corpus(str(folder)).digest
    assert summary["tokenizer"] == "bpe-512" and summary["documents"] == 60
    assert summary["steps_per_epoch"] * made.batch_size == made.windows


@pytest.mark.parametrize("argument", ["length", "batch_size"])
def test_sizes_are_checked(folder, argument):
    with pytest.raises(ValueError, match=f"{argument}=0 must be at least 1"):
        load(folder, **{argument: 0})


# --- cache


@pytest.fixture
def cached(folder, tmp_path):
    made = load(folder, "bpe-512", cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    return made, entry


def assert_same(a, b):
    np.testing.assert_array_equal(a.train.arrays[0], b.train.arrays[0])
    np.testing.assert_array_equal(a.held.arrays[0], b.held.arrays[0])
    np.testing.assert_array_equal(a.batch(3), b.batch(3))
    assert a.tokenizer.to_json() == b.tokenizer.to_json()


def test_the_cache_is_used(folder, cached, monkeypatch):
    made, entry = cached
    assert made.cache == "new"
    before = contents(entry)
    monkeypatch.setattr(tokens, "learn_tokenizer", lambda *_: pytest.fail("learned again"))
    again = load(folder, "bpe-512", cache=entry.parent)
    assert again.cache == "reused"
    assert_same(made, again)
    assert contents(entry) == before


def test_without_a_cache_nothing_is_written(folder, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = load(folder, "bpe-512")
    assert made.cache == "off"
    assert_same(made, cached[0])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("name", ["tokenizer.json", "train", "held_out", batches.SEAL])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_cache_is_made_again(folder, cached, name, damage):
    made, entry = cached
    good = contents(entry)
    path = entry / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        kept = {"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage]
        path.write_bytes(bytes(kept))
    again = load(folder, "bpe-512", cache=entry.parent)
    assert again.cache == ("new" if (name, damage) == (batches.SEAL, "remove") else "rebuilt")
    assert_same(made, again)
    assert contents(entry) == good
    assert load(folder, "bpe-512", cache=entry.parent).cache == "reused"


def test_a_killed_writer_leaves_nothing_that_is_read(folder, cached, monkeypatch):
    made, entry = cached
    good = contents(entry)
    for stop in range(1, 2 * len(good) + 1):
        for path in entry.iterdir():
            path.unlink()
        calls = []

        def interrupted(call, stop=stop, calls=calls):
            def wrapper(*arguments):
                calls.append(call)
                if len(calls) == stop:
                    if call is pathlib.Path.write_bytes:
                        call(arguments[0], arguments[1][:5])  # half a file is on the disk
                    raise KeyboardInterrupt
                return call(*arguments)

            return wrapper

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pathlib.Path, "write_bytes", interrupted(pathlib.Path.write_bytes))
            patch.setattr(os, "replace", interrupted(os.replace))
            load(folder, "bpe-512", cache=entry.parent)
        assert batches.SEAL not in contents(entry)
        again = load(folder, "bpe-512", cache=entry.parent)
        assert again.cache == "new"
        assert_same(made, again)
        assert {n: c for n, c in contents(entry).items() if not n.endswith(".tmp")} == good


def test_other_texts_and_vocabularies_have_entries_of_their_own(folder, cached, tmp_path):
    _, entry = cached
    load(folder, "bpe-600", cache=entry.parent)
    load(folder, "bytes", cache=entry.parent)
    more = write(tmp_path / "more", {f"{i}.txt": prose(i) for i in range(41)})
    load(more, "bpe-512", cache=entry.parent)
    assert len(list(entry.parent.iterdir())) == 4
    assert load(folder, "bpe-600", cache=entry.parent).vocab_size == 600


def test_another_split_has_an_entry_of_its_own(folder, cached, monkeypatch):
    made, entry = cached
    monkeypatch.setattr(corpus, "HELD_OUT", 0.2)
    other = load(folder, "bpe-512", cache=entry.parent)
    assert other.corpus.digest == made.corpus.digest and other.digest != made.digest
    assert len(other.held) > 2 * len(made.held)
    assert other.cache == "new"


def test_a_cache_that_cannot_be_written_is_not_fatal(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not cached"):
        made = load(folder, "bpe-512", cache=tmp_path / "cache")
    assert made.cache == "off" and made.batch(0).shape == (4, 17)


def test_two_processes_may_write_the_same_cache(folder, tmp_path):
    code = (
        "import pathlib, sys; from train.data import batches; "
        "made = batches.load_text(sys.argv[1], 'bpe-512', length=16, batch_size=4, seed=0, "
        "cache=pathlib.Path(sys.argv[2])); print(made.batch(5).sum())"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    root = pathlib.Path(batches.__file__).parents[2]
    started = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert printed == {f"{load(folder, 'bpe-512').batch(5).sum()}\n"}
    assert load(folder, "bpe-512", cache=tmp_path / "cache").cache == "reused"


def test_the_digest_follows_everything_that_makes_tokens(tmp_path):
    """Another vocabulary of the same size, another rule, another end of text; and not the name of the folder."""
    text = write(tmp_path / "text", {f"{i}.txt": prose(i).title() for i in range(20)})

    def vocabulary(name, texts, change=lambda library: None, config=None):
        library = tokenizers.ByteLevelBPETokenizer()
        special = ["<|endoftext|>", "</s>"]
        library.train_from_iterator(texts, 500, special_tokens=special, show_progress=False)
        library = tokenizers.Tokenizer.from_str(library.to_str())
        change(library)
        config = {"eos_token": "</s>", **(config or {})}
        files = {"tokenizer.json": library.to_str(), "tokenizer_config.json": json.dumps(config)}
        return load(text, str(write(tmp_path / name, files)), cache=tmp_path / "cache")

    def lowercase(library):
        library.normalizer = tokenizers.normalizers.Lowercase()

    texts = [prose(i).title() for i in range(9)]
    first = vocabulary("first", texts)
    others = [
        vocabulary("other", [prose(100)]),
        vocabulary("rule", texts, lowercase),
        vocabulary("end", texts, config={"eos_token": "<|endoftext|>"}),
        load(text, "bpe-512"),
        load(text),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 6
    assert first.vocab_size == others[1].vocab_size == others[2].vocab_size
    assert {other.digests["text"] for other in others} == {first.digests["text"]}
    assert vocabulary("moved", texts).digest == first.digest


def test_a_token_that_no_vocabulary_has_is_not_trained_on(folder):
    made = load(folder)
    made.train.arrays[0].flags.writeable = True
    made.train.arrays[0][:] = 300
    with pytest.raises(UserError, match="token 300 is not in the vocabulary, which ends at 256"):
        made.batch(0)


@pytest.mark.parametrize("content", ["[]", "7", '{"train": 1}', "null", '{"a":' * 9999])
def test_a_seal_of_another_form_is_damage(folder, cached, content):
    made, entry = cached
    (entry / batches.SEAL).write_text(content)
    again = load(folder, "bpe-512", cache=entry.parent)
    assert again.cache == "rebuilt"
    assert_same(made, again)
