"""Tokenizers, from text to token numbers and back: bytes, byte pairs learned from the text, or a vocabulary file.

Bytes and learned byte pairs are lossless: `decode(encode(text)) == text` for any text. A vocabulary file may not be.
The separator follows every text: the highest token of bytes and learned pairs, the end-of-text token of a vocabulary
file. No text encodes to it, except the separator's own spelling in vocabularies, such as T5's, that treat it as an
ordinary token.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer as Library

from train import disk, memory
from train.data import pieces
from train.errors import UserError

SMALLEST, LARGEST = 512, 65_536  # sizes of learned vocabularies
LEARN_FROM = 32_000_000  # characters; longer texts are sampled evenly, which is faster and as good
GAPS = 1000  # numbers below the highest token that no token has, beyond as many as there are tokens
BYTES = 50  # of memory for each character that the library encodes at once
SEPARATOR = "<|end of text|>"
INSTEAD = (
    "SentencePiece models are not supported. The package transformers converts them to tokenizer.json:"
    " AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
)
# End-of-text tokens that are tried if a vocabulary does not specify one.
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", SEPARATOR)


Advance = Callable[[int], Any]


def _nothing(count: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Each byte of UTF-8 is a token."""

    name: str = "bytes"
    vocab_size: int = 257
    separator: int = 256

    def each(self, texts: Iterable[str], advance: Advance = _nothing) -> Iterator[np.ndarray]:
        """The tokens of each text, with the separator; uint16 [tokens]. `advance` receives the characters done."""
        end = np.array([self.separator], np.uint16)
        for text in texts:
            yield np.concatenate([np.frombuffer(text.encode(), np.uint8).astype(np.uint16), end])
            advance(len(text))

    def encode(self, texts: Iterable[str], advance: Advance = _nothing) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens]."""
        return np.concatenate([*self.each(texts, advance), np.zeros(0, np.uint16)])

    def decode(self, tokens: np.ndarray) -> str:
        """Tokens to text, without separators. Incomplete characters become U+FFFD."""
        tokens = np.asarray(tokens)
        return bytes(tokens[tokens < 256].astype(np.uint8)).decode(errors="replace")

    def to_json(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Subwords:
    """A vocabulary of subwords, encoded by the library `tokenizers`."""

    library: Library
    name: str
    separator: int
    cut: bool  # whether long texts may be encoded in pieces; safe for byte pairs that were learned here

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest token, since a vocabulary may have gaps."""
        return max(self.library.get_vocab().values()) + 1

    @property
    def begin(self) -> tuple[int, ...]:
        """Tokens that transformers puts before a text according to the vocabulary file: LLaMA's <s>, mostly none."""
        plain, whole = (
            self._use(self.library.encode, "a", add_special_tokens=special).ids
            for special in (False, True)
        )
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    def each(self, texts: Iterable[str], advance: Advance = _nothing) -> Iterator[np.ndarray]:
        """The tokens of each text, with the separator; uint16 [tokens], or uint32 for large vocabularies.

        `advance` receives characters as they are done.

        Raises:
          ValueError: the vocabulary cannot encode a text, for example because it has no token for unknown words.
        """
        kind, parts = token_dtype(self.vocab_size), []
        divided = ((p, last) for text in texts for p, last in self._pieces(text))
        for batch in pieces.batches(divided):
            encodings = self._use(
                self.library.encode_batch_fast,
                [piece for piece, _ in batch],
                add_special_tokens=False,
            )
            for encoding, (piece, last) in zip(encodings, batch):
                parts.append(np.array(encoding.ids + [self.separator] * last, kind))
                advance(len(piece))
                if last:
                    yield np.concatenate(parts)
                    parts = []

    def encode(self, texts: Iterable[str], advance: Advance = _nothing) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens], or uint32 for large vocabularies."""
        return np.concatenate(
            [*self.each(texts, advance), np.zeros(0, token_dtype(self.vocab_size))]
        )

    def _pieces(self, text: str) -> Iterable[tuple[str, bool]]:
        if self.cut:
            return pieces.pieces(text)
        memory.check(BYTES * len(text), f"encoding one document of {len(text):,} characters")
        return [(text, True)]

    def decode(self, tokens: np.ndarray) -> str:
        """Tokens to text, without separators. Incomplete characters become U+FFFD."""
        return self._use(self.library.decode, np.asarray(tokens).tolist(), skip_special_tokens=True)

    def _use(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        try:
            return call(*arguments, **more)
        except BaseException as error:
            raise _failure(error, f"the tokenizer {self.name} fails when it is used") from None

    def to_json(self) -> str:
        return self.library.to_str()


Tokenizer = Bytes | Subwords


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 over the tokens, their numbers and the separator; hexadecimal."""
    known = sorted(tokenizer.library.get_vocab().items()) if isinstance(tokenizer, Subwords) else []
    facts = json.dumps([tokenizer.vocab_size, tokenizer.separator, known])
    return hashlib.sha256(facts.encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds a vocabulary, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def parse_name(name: str) -> int | pathlib.Path | None:
    """Parses a tokenizer's name: the size for "bpe-<size>", None for "bytes", else the path of a vocabulary file.

    Raises:
      ValueError: `name` is none of these, or the size is out of range.
    """
    if name == "bytes":
        return None
    match = re.fullmatch(r"bpe-(\d+)", name)
    if match is None:
        path = disk.user_path(name)
        if path.exists():
            return path
        raise ValueError(
            f'tokenizer {name!r} must be "bytes", "bpe-<size>" such as "bpe-4096", an existing file'
            " tokenizer.json, or a folder that holds it, or vocab.json and merges.txt"
        )
    size = int(match[1])
    if not SMALLEST <= size <= LARGEST:
        nearest = min(max(size, SMALLEST), LARGEST)
        raise ValueError(
            f"tokenizer {name!r}: the size must be {SMALLEST} to {LARGEST} tokens; "
            f'nearest: "bpe-{nearest}"'
        )
    return size


def given_vocabulary(name: str) -> Subwords | None:
    """The vocabulary of a file, if `name` is its path; None for names of tokenizers that are made or learned here."""
    path = parse_name(name)
    return read_vocabulary(path) if isinstance(path, pathlib.Path) else None


def learn_tokenizer(name: str, texts: Collection[str]) -> Tokenizer:
    """Makes the tokenizer called `name`; "bpe-<size>" learns its byte pairs from `texts`.

    The vocabulary becomes smaller than <size> if the texts have too few pairs.
    """
    size = parse_name(name)
    if not isinstance(size, int):
        return Bytes() if size is None else read_vocabulary(size)
    library = Library(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    every = 1 + sum(map(len, texts)) // LEARN_FROM
    parts = pieces.learnable(texts, pieces.overlong(texts))
    library.train_from_iterator(itertools.islice(parts, 0, None, every), trainer)
    library.add_special_tokens([SEPARATOR])
    return tokenizer_from_json(name, library.to_str())


def tokenizer_from_json(name: str, text: str, separator: int | None = None) -> Tokenizer:
    """Restores a tokenizer from the result of `to_json`. Without a `separator`, its highest token is the separator.

    Raises:
      ValueError: the text is no vocabulary, or one that cannot be used (`_check`).
    """
    if not text:
        return Bytes()
    library = _parsed(text, f"the tokenizer {name}")
    # The spelling of the separator in a text is encoded as ordinary text.
    library.encode_special_tokens = True
    size = library.get_vocab_size()
    own = library.token_to_id(SEPARATOR) == size - 1
    if own:
        name = f"bpe-{size}"
    return Subwords(library, name, size - 1 if separator is None else separator, cut=own)


def read_vocabulary(path: pathlib.Path, end: str | None = None) -> Subwords:
    """Reads a vocabulary in Hugging Face's format: tokenizer.json, or GPT-2's pair of vocab.json and merges.txt.

    Args:
      path: the file, or the folder that holds it or the pair.
      end: the end-of-text token. None means `eos_token` of tokenizer_config.json in the same folder, else the only
        usual end-of-text token that the vocabulary has.

    Raises:
      ValueError: the files are missing or malformed, or the end-of-text token is not in the vocabulary, or unclear.
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
            library = _from_pair(*pair)
            library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            library.decoder = tokenizers.decoders.ByteLevel()
        else:
            library = _parsed(disk.read_json_text(file), f"the tokenizer {path}")
    except UnicodeDecodeError as error:
        raise ValueError(f"the tokenizer {path} cannot be read: {error}. {INSTEAD}") from None
    end = _end(library, folder, end)
    library.add_special_tokens([end])
    # Some vocabulary files enable these; here, documents are truncated and padded when batches are made.
    library.no_truncation()
    library.no_padding()
    return tokenizer_from_json(folder.resolve().name, library.to_str(), library.token_to_id(end))  # type: ignore[return-value]


def _end(library: Library, folder: pathlib.Path, end: str | None) -> str:
    """The end-of-text token; see `read_vocabulary`."""
    if end is None and (config := folder / "tokenizer_config.json").is_file():
        try:
            end = dict(json.loads(disk.read_json_text(config))).get("eos_token")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{config} cannot be read: {error}") from None
        end = end.get("content") if isinstance(end, dict) else end
    candidates = (end,) if isinstance(end, str) else ENDS
    known = [token for token in candidates if library.token_to_id(token) is not None]
    if len(known) != 1:
        special = sorted(t.content for t in library.get_added_tokens_decoder().values())
        raise ValueError(
            "the end-of-text token is unclear: the vocabulary at"
            f" {folder} has {', '.join(known) or 'none'} of {', '.join(candidates)}; name the token with"
            f" --end_of_text. Special tokens: {', '.join(special[:12]) or 'none'}"
        )
    return known[0]


def _from_pair(vocabulary: pathlib.Path, merges: pathlib.Path) -> Library:
    for path in (vocabulary, merges):
        disk.read_file(path, disk.JSON_FILE)  # no FIFO, and of a sensible size
    try:
        library = Library(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    except BaseException as error:
        raise _failure(error, f"{vocabulary} and {merges.name} cannot be read") from None
    _check(library, f"the tokenizer {vocabulary.parent}")
    return library


def _parsed(text: str, what: str) -> Library:
    try:
        with disk.silent_errors():  # Rust prints the stack of a panic
            library = Library.from_str(text)
    except BaseException as error:
        more = "" if text.lstrip().startswith("{") and text.rstrip().endswith("}") else INSTEAD
        raise _failure(error, f"{what} cannot be read", more) from None
    _check(library, what)
    return library


def _check(library: Library, what: str) -> None:
    """Raises ValueError for a vocabulary that gives other tokens each time, or whose numbers are far too high."""
    dropout = getattr(library.model, "dropout", None)
    if dropout:
        raise ValueError(
            f"{what} has a dropout of {dropout:g}: it would encode the same text differently each time; set"
            ' "dropout" to null in tokenizer.json'
        )
    vocabulary = library.get_vocab()
    if not vocabulary:
        raise ValueError(f"{what} has no tokens")
    count, (token, highest) = len(vocabulary), max(vocabulary.items(), key=lambda item: item[1])
    if highest >= 2 * count + GAPS:
        raise ValueError(
            f"{what} has {count:,} tokens, but gives {token[:40]!r} the number {highest:,}; allowed are numbers below"
            f" {2 * count + GAPS:,}, since the model needs a row for every number"
        )


def _failure(error: BaseException, what: str, more: str = "") -> BaseException:
    """A ValueError for whatever the library raised; it panics in Rust for some vocabularies."""
    panic = type(error).__name__ == "PanicException"
    if isinstance(error, UserError) or not (panic or isinstance(error, Exception)):
        return error
    said = disk.first_line(error) or type(error).__name__
    if "unk" in said.lower():
        more = "Name a token of the vocabulary that stands for unknown words as unk_token"
    return ValueError(f"{what}: {said}" + (f". {more}" if more else ""))


def tokenizer_version(name: str, given: Subwords | None = None) -> str:
    """Identifies everything that the tokens depend on, apart from the text; `given` is the vocabulary of a file."""
    if given is not None:
        content = f"{given.separator}\0{given.to_json()}"
        name = f"given-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    return name if name == "bytes" else f"{name}-tokenizers-{tokenizers.__version__}"
