"""Text to tokens and back: bytes, learned pairs, and the vocabularies that people have."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

from tests.train.data.test_batches import ODD_TEXTS, prose, write
from tests.train.data.test_tokenise import build
from train.data import pieces, token_store, tokens

# --- our own


@pytest.fixture(scope="module", params=["bytes", "bpe-512", "bpe-700"])
def tokenizer(request):
    return tokens.learn_tokenizer(request.param, [prose(i) for i in range(40)])


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_survives(tokenizer, text):
    encoded = tokenizer.encode([text])
    assert encoded.dtype == np.uint16
    assert tokenizer.decode(encoded) == text
    assert encoded[-1] == tokenizer.separator and (encoded[:-1] != tokenizer.separator).all()


def test_texts_follow_each_other_with_a_separator_after_each(tokenizer):
    encoded = tokenizer.encode(ODD_TEXTS)
    ends = np.flatnonzero(encoded == tokenizer.separator) + 1
    parts = np.split(encoded, ends)[:-1]
    assert [tokenizer.decode(part) for part in parts] == ODD_TEXTS
    assert encoded.max() == tokenizer.separator == tokenizer.vocab_size - 1
    assert len(tokenizer.encode([])) == 0


def test_vocabulary_sizes(tokenizer):
    assert tokenizer.vocab_size == {"bytes": 257}.get(tokenizer.name) or (
        tokenizer.name == f"bpe-{tokenizer.vocab_size}"
    )
    text = prose(999)
    ratio = len(text.encode()) / (len(tokenizer.encode([text])) - 1)
    assert (ratio == 1) if tokenizer.name == "bytes" else (ratio > 2)


def test_restored_tokenizer_is_the_same(tokenizer):
    again = tokens.tokenizer_from_json(tokenizer.name, tokenizer.to_json())
    np.testing.assert_array_equal(again.encode(ODD_TEXTS), tokenizer.encode(ODD_TEXTS))


def test_learning_twice_gives_the_same_vocabulary():
    texts = [prose(i) for i in range(20)]
    assert (
        tokens.learn_tokenizer("bpe-600", texts).to_json()
        == tokens.learn_tokenizer("bpe-600", texts).to_json()
    )


def test_of_much_text_an_even_sample_is_learned_from(monkeypatch):
    texts = [prose(i) for i in range(10)]
    all_of_it, sample = (
        tokens.learn_tokenizer("bpe-600", texts),
        tokens.learn_tokenizer("bpe-600", texts[::3]),
    )
    assert all_of_it.to_json() != sample.to_json()
    monkeypatch.setattr(tokens, "LEARN_FROM", sum(map(len, texts)) // 2)
    assert tokens.learn_tokenizer("bpe-600", texts).to_json() == sample.to_json()


def test_little_text_has_a_smaller_vocabulary():
    learned = tokens.learn_tokenizer("bpe-4096", ["abc abc"])
    assert 257 < learned.vocab_size < 270
    assert learned.decode(learned.encode(["abc Ω"])) == "abc Ω"


def test_long_texts_are_cut_and_survive(monkeypatch):
    text = "".join(prose(i) + "\n" for i in range(5)) + "no newline at the end " * 40
    learned = tokens.learn_tokenizer("bpe-512", [text])
    whole = learned.encode([text, "next"])
    monkeypatch.setattr(pieces, "PIECE", 500)
    divided = list(pieces.pieces(text))
    assert len(divided) > 5 and "".join(piece for piece, _ in divided) == text
    assert [last for _, last in divided] == [False] * (len(divided) - 1) + [True]
    cut = learned.encode([text, "next"])
    assert learned.decode(cut) == learned.decode(whole) == text + "next"
    assert (cut == learned.separator).sum() == 2


# --- given


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    files = {f"{i:02d}.txt": prose(i) for i in range(40)}
    return write(tmp_path_factory.mktemp("texts"), files)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """As people have them: T5's kind with an end token of its own, and GPT-2's pair of files."""
    root = tmp_path_factory.mktemp("vocabularies")
    texts = [prose(i) for i in range(20)]
    five = tokenizers.Tokenizer(tokenizers.models.Unigram())
    five.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    five.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    five.train_from_iterator(texts, trainer)
    five.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    five.enable_padding(length=50)
    five.enable_truncation(max_length=50)
    (root / "t5").mkdir()
    five.save(str(root / "t5/tokenizer.json"))
    pairs = tokenizers.ByteLevelBPETokenizer()
    pairs.train_from_iterator(
        texts, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False
    )
    (root / "gpt2").mkdir()
    pairs.save_model(str(root / "gpt2"))
    return root


def test_a_tokenizer_json(vocabularies, folder, tmp_path):
    path = vocabularies / "t5/tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.no_padding()
    made = build(tmp_path / "out", folder, tokenizer=path)
    assert made.tokenizer.separator == 1
    start = 0
    for end in made.train.ends[0].tolist():
        document = made.train.arrays[0][start:end]
        text = theirs.decode(document.tolist())
        assert theirs.encode(text).ids == document.tolist()  # T5's rule: its end token, once
        start = end
    again = token_store.open_store(tmp_path / "out").tokenizer
    assert again.decode(document) == made.tokenizer.decode(document) == text


def test_gpt2s_pair_of_files(vocabularies):
    given = tokens.read_vocabulary(vocabularies / "gpt2")
    theirs = tokenizers.ByteLevelBPETokenizer(
        str(vocabularies / "gpt2/vocab.json"), str(vocabularies / "gpt2/merges.txt")
    )
    for text in ODD_TEXTS[:4] + ODD_TEXTS[6:]:
        assert given.encode([text])[:-1].tolist() == theirs.encode(text).ids
        assert given.decode(given.encode([text])) == text
    spelled = given.encode(["a<|endoftext|>b"])
    assert (spelled == given.separator).sum() == 1 and spelled[-1] == given.separator
    assert tokens.read_vocabulary(vocabularies / "gpt2/vocab.json").to_json() == given.to_json()


def test_which_token_ends_a_text(vocabularies, tmp_path):
    shutil.copytree(vocabularies / "t5", tmp_path / "t5")
    path = tmp_path / "t5"
    assert tokens.read_vocabulary(path).separator == 1
    assert tokens.read_vocabulary(path, "<pad>").separator == 0
    (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<unk>"}}')
    assert tokens.read_vocabulary(path).separator == 2
    with pytest.raises(ValueError, match=r"has none of <nothing>; .*--end_of_text.*<pad>"):
        tokens.read_vocabulary(path, "<nothing>")


def test_what_begins_a_text_is_told_from_what_ends_it(vocabularies, tmp_path):
    assert tokens.read_vocabulary(vocabularies / "gpt2").begin == ()
    library = tokenizers.Tokenizer.from_file(str(vocabularies / "t5/tokenizer.json"))
    library.no_padding()
    assert tokens.tokenizer_from_json("t5", library.to_str(), 1).begin == ()
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("</s>", 1), ("<pad>", 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    given = tokens.read_vocabulary(tmp_path)
    assert given.begin == (0,)
    assert given.encode(["a b"]).tolist() == library.encode("a b").ids[1:]  # not between documents


def test_wide_vocabularies_take_four_bytes():
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}, "w0")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wide = tokens.tokenizer_from_json("wide", library.to_str(), 70_000)
    encoded = wide.encode(["w3 w69999", "w1"])
    assert encoded.dtype == np.uint32 and encoded.tolist() == [3, 69_999, 70_000, 1, 70_000]


WORDS = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, "</s>")).to_str()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "merges.txt"),
        ({"tokenizer.json": "{"}, "SentencePiece"),
        ({"vocab.json": "{}"}, "missing: merges"),
        ({"spiece.model": ""}, "SentencePiece models are not supported.*AutoTokenizer"),
        ({"tokenizer.json": WORDS, "tokenizer_config.json": "{"}, "tokenizer_config.json cannot"),
        ({"tokenizer.json": WORDS, "tokenizer_config.json": "[1]"}, "tokenizer_config.json cannot"),
    ],
)
def test_unreadable_vocabularies_are_refused(tmp_path, content, said):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=said):
        tokens.read_vocabulary(tmp_path)


def model(kind, vocab, **more):
    base = {"version": "1.0", "added_tokens": [], "truncation": None, "padding": None}
    base |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({**base, "model": {"type": kind, "vocab": vocab, **more}})


TWO = {"</s>": 0, "a": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (model("BPE", TWO, merges=[], dropout=0.25), "dropout of 0.25: .* differently each time"),
        (model("BPE", TWO, merges=[], dropout=7), "cannot be read: Dropout"),
        (model("BPE", {"</s>": 0, "a": 2_000_000_000}, merges=[]), "'a' the number 2,000,000,000"),
        (model("WordLevel", {"</s>": 0, "a": 1_999}, unk_token="a"), "numbers below 1,004"),
        (model("BPE", {}, merges=[]), "has no tokens"),
        (model("WordLevel", TWO, unk_token="[UNK]"), "fails when it is used.*Name a token"),
        (
            model(
                "WordPiece",
                TWO,
                unk_token="[UNK]",
                continuing_subword_prefix="##",
                max_input_chars_per_word=9,
            ),
            "fails when it is used.*Name a token",
        ),
        (model("Unigram", [["</s>", 0.0]], unk_id=None), "fails when it is used.*Name a token"),
        (
            model("BPE", TWO, merges=[]).replace(
                '"normalizer": null',
                '"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}',
            ),
            "cannot be read",
        ),
        ('{"a":' * 3000, "cannot be read"),
    ],
)
def test_vocabularies_that_cannot_be_used(tmp_path, capfd, content, said):
    write(tmp_path, {"tokenizer.json": content})
    with pytest.raises(ValueError, match=said) as error:
        tokens.learn_tokenizer(str(tmp_path), ()).encode(["a b c"])
    assert len(str(error.value)) < 500
    assert "stack backtrace" not in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"cannot be|dropout|number|no tokens|fails"):  # of a store
        tokens.tokenizer_from_json("x", content, 0).encode(["a b c"])


def test_a_dropout_of_nothing_is_none(tmp_path):
    write(tmp_path, {"tokenizer.json": model("BPE", TWO, merges=[], dropout=0.0)})
    assert tokens.read_vocabulary(tmp_path).encode(["aa"]).tolist() == [1, 1, 0]


@pytest.mark.parametrize("letter", ["a", " ", "é"])
def test_a_line_without_an_end_is_cut(monkeypatch, letter):
    """Learning and encoding take time in proportion to it, and it survives."""
    monkeypatch.setattr(pieces, "PIECE", 10_000)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefgh"), 300_000)) + letter * 100_000
    learned = tokens.learn_tokenizer("bpe-600", [text, prose(1)])
    done = []
    encoded = learned.encode([text], done.append)
    assert learned.decode(encoded) == text and sum(done) == len(text) and len(done) > 15
    assert len(encoded) < len(text) / 1.3  # pairs of its letters were learned
    assert max(len(piece) for piece, _ in pieces.pieces(text)) <= 20_000


def test_only_words_that_nobody_writes_are_learned_in_parts():
    texts = [prose(1), "x" * 999 + " " + "y" * 999, "z" * 1001 + "\n"]
    assert pieces.overlong(texts) == 1001
    assert list(pieces.learnable(texts[:2], 0)) == texts[:2]
    found = list(pieces.learnable(texts, 1001))
    assert "".join(found) == "".join(texts) and max(map(len, found[3:])) == 100
