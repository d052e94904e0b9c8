"""Text to token numbers and back: bytes, byte-pair encoding learned on the spot, or a given vocabulary.

Bytes and learned pairs are exact: `decode(encode(text)) == text` for any text; a given vocabulary is as
exact as whoever made it. After every text stands the separator: the highest token of our own vocabularies,
the end-of-text token of a given one. No text encodes to it, except its own spelling where a given
vocabulary, such as T5's, holds that as a piece like any other.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import Tokenizer as Library

SMALLEST, LARGEST = 512, 65_536  # vocabulary of learned pairs
LEARN_FROM = 32_000_000  # characters; of more text an even sample, since all of it is only a wait
PIECE = 1_000_000  # characters encoded at once: the library holds about 50 bytes for each
SEPARATOR = "<|end of text|>"
INSTEAD = (
    "A SentencePiece model is not accepted; AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) of"
    " the package transformers writes the tokenizer.json that is"
)
# What ends a text in vocabularies that do not say so themselves.
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", SEPARATOR)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A token is a byte of UTF-8."""

    name: str = "bytes"
    vocab_size: int = 257
    separator: int = 256

    def each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of every text and the separator; uint16 [tokens]."""
        end = np.array([self.separator], np.uint16)
        for text in texts:
            yield np.concatenate([np.frombuffer(text.encode(), np.uint8).astype(np.uint16), end])

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens]."""
        return np.concatenate([*self.each(texts), np.zeros(0, np.uint16)])

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without separators; bytes cut in the middle of a character become U+FFFD."""
        tokens = np.asarray(tokens)
        return bytes(tokens[tokens < 256].astype(np.uint8)).decode(errors="replace")

    def to_json(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Subwords:
    """A token is a frequent string of bytes or characters: what the library `tokenizers` describes."""

    library: Library
    name: str
    separator: int
    # Of byte pairs learned here it does not matter where a long text is cut; of others it may.
    cut: bool

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest token: a vocabulary may have gaps."""
        return max(self.library.get_vocab().values()) + 1

    @property
    def begin(self) -> tuple[int, ...]:
        """What transformers puts before a text, as the vocabulary's file says: LLaMA's <s>, for most nothing."""
        letter = "a"
        plain = self.library.encode(letter, add_special_tokens=False).ids
        whole = self.library.encode(letter, add_special_tokens=True).ids
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    def each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of every text and the separator; uint16 [tokens], or uint32 if they need it."""
        kind, parts = dtype(self.vocab_size), []
        pieces = ((p, last) for text in texts for p, last in self._pieces(text))
        for batch in _batches(pieces):
            encodings = self.library.encode_batch_fast(
                [piece for piece, _ in batch], add_special_tokens=False
            )
            for encoding, (_, last) in zip(encodings, batch):
                parts.append(np.array(encoding.ids + [self.separator] * last, kind))
                if last:
                    yield np.concatenate(parts)
                    parts = []

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens], or uint32 if they need it."""
        return np.concatenate([*self.each(texts), np.zeros(0, dtype(self.vocab_size))])

    def _pieces(self, text: str) -> Iterable[tuple[str, bool]]:
        return _pieces(text) if self.cut else [(text, True)]

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without separators; bytes cut in the middle of a character become U+FFFD."""
        return self.library.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        return self.library.to_str()


Tokenizer = Bytes | Subwords


def dtype(vocab_size: int) -> np.dtype:
    """Of the smallest whole numbers that hold a vocabulary, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def check(name: str) -> int | pathlib.Path | None:
    """What a name asks for: the size of "bpe-<size>", the path of a given vocabulary, None for "bytes".

    Raises:
      ValueError: `name` is none of them, or the size is out of range.
    """
    if name == "bytes":
        return None
    match = re.fullmatch(r"bpe-(\d+)", name)
    if match is None:
        path = pathlib.Path(name).expanduser()
        if path.exists():
            return path
        raise ValueError(
            f'tokenizer {name!r} is neither "bytes" nor "bpe-<size>" as in "bpe-4096" nor an existing'
            " file tokenizer.json, nor a folder that holds one, or vocab.json and merges.txt"
        )
    size = int(match[1])
    if not SMALLEST <= size <= LARGEST:
        nearest = min(max(size, SMALLEST), LARGEST)
        raise ValueError(
            f"tokenizer {name!r}: a vocabulary has {SMALLEST} to {LARGEST} tokens; "
            f'nearest: "bpe-{nearest}"'
        )
    return size


def learn(name: str, texts: Collection[str]) -> Tokenizer:
    """The tokenizer called `name`; pairs are learned from `texts`.

    Little text has few pairs to merge: the vocabulary can then stay smaller than asked for.
    """
    size = check(name)
    if not isinstance(size, int):
        return Bytes() if size is None else given(size)
    library = Library(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece, _ in _pieces(text))
    every = 1 + sum(map(len, texts)) // LEARN_FROM
    library.train_from_iterator(itertools.islice(pieces, 0, None, every), trainer)
    library.add_special_tokens([SEPARATOR])
    return restore(name, library.to_str())


def restore(name: str, json: str, separator: int | None = None) -> Tokenizer:
    """The tokenizer that `to_json` described; without a `separator` its highest token is that."""
    if not json:
        return Bytes()
    library = Library.from_str(json)
    # A text that spells the separator is text.
    library.encode_special_tokens = True
    size = library.get_vocab_size()
    own = library.token_to_id(SEPARATOR) == size - 1
    if own:
        name = f"bpe-{size}"
    return Subwords(library, name, size - 1 if separator is None else separator, cut=own)


def given(path: pathlib.Path, end: str | None = None) -> Subwords:
    """A vocabulary in Hugging Face's form: tokenizer.json, or GPT-2's pair of vocab.json and merges.txt.

    Args:
      path: the file, or the folder that holds it or the pair.
      end: the token that ends a text; None: what tokenizer_config.json beside the file calls
        `eos_token`, else the one of the usual names that the vocabulary has.

    Raises:
      ValueError: no such files, files that cannot be read as a vocabulary, or no token that ends a text.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    pair = folder / "vocab.json", folder / "merges.txt"
    paired = file in pair or (path.is_dir() and not file.exists())
    try:
        if paired:
            if missing := [p.name for p in pair if not p.is_file()]:
                raise ValueError(
                    f"{folder} holds neither tokenizer.json nor both of vocab.json and merges.txt"
                    f" (missing: {', '.join(missing)}). {INSTEAD}"
                )
            library = Library(tokenizers.models.BPE.from_file(*map(str, pair)))
            library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            library.decoder = tokenizers.decoders.ByteLevel()
        else:
            library = Library.from_file(str(file))
    except ValueError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer {str(path)!r} cannot be read: {error}. {INSTEAD}") from None
    end = _end(library, folder, end)
    library.add_special_tokens([end])
    # The files of some vocabularies ask for these; a document is cut and filled where batches are made.
    library.no_truncation()
    library.no_padding()
    return restore(folder.resolve().name, library.to_str(), library.token_to_id(end))  # type: ignore[return-value]


def _end(library: Library, folder: pathlib.Path, asked: str | None) -> str:
    """The token that ends a text."""
    said = asked
    if asked is None and (beside := folder / "tokenizer_config.json").is_file():
        try:
            said = dict(json.loads(beside.read_bytes())).get("eos_token")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{beside} cannot be read: {error}") from None
        said = said.get("content") if isinstance(said, dict) else said
    wanted = (said,) if isinstance(said, str) else ENDS
    known = [token for token in wanted if library.token_to_id(token) is not None]
    if len(known) != 1:
        special = sorted(t.content for t in library.get_added_tokens_decoder().values())
        raise ValueError(
            f"which token ends a text? {said or 'One of ' + ', '.join(ENDS)} is"
            f" {'not' if not known else 'more than once'} in the vocabulary at {folder}; name one with"
            f" --end_of_text. Its special tokens: {', '.join(special[:12]) or 'none'}"
        )
    return known[0]


def version(name: str) -> str:
    """What, beside the text, the tokens depend on."""
    asked = check(name)
    if isinstance(asked, pathlib.Path):
        found = given(asked)
        digest = hashlib.sha256(f"{found.separator}\0{found.to_json()}".encode()).hexdigest()
        name = f"given-{digest[:16]}"
    return name if asked is None else f"{name}-tokenizers-{tokenizers.__version__}"


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """`text` cut after the first end of line past every `PIECE` characters; is it the last?"""
    start = 0
    while len(text) - start > PIECE:
        stop = text.find("\n", start + PIECE) + 1 or len(text)
        if stop == len(text):
            break
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size > 4 * PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
