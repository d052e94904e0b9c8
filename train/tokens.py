"""Text to token numbers and back: bytes, or byte-level byte-pair encoding learned on the spot.

Both are exact: `decode(encode(text)) == text` for any text. The highest token is the separator
that stands after every file; no text encodes to it.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import Tokenizer as Library

SMALLEST, LARGEST = 512, 65_536  # vocabulary; the largest token has to fit into 16 bits
LEARN_FROM = 32_000_000  # characters; of more text an even sample, since all of it is only a wait
PIECE = 1_000_000  # characters encoded at once: the library holds about 50 bytes for each
SEPARATOR = "<|end of text|>"


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A token is a byte of UTF-8."""

    name: str = "bytes"
    vocab_size: int = 257
    separator: int = 256

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens]."""
        end = np.array([self.separator], np.uint16)
        parts = ((np.frombuffer(text.encode(), np.uint8).astype(np.uint16), end) for text in texts)
        return np.concatenate([*itertools.chain.from_iterable(parts), end[:0]])

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without separators; bytes cut in the middle of a character become U+FFFD."""
        tokens = np.asarray(tokens)
        return bytes(tokens[tokens < 256].astype(np.uint8)).decode(errors="replace")

    def to_json(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Bpe:
    """A token is a frequent string of bytes (byte-level BPE, as GPT-2's)."""

    library: Library

    @property
    def name(self) -> str:
        return f"bpe-{self.vocab_size}"

    @functools.cached_property
    def vocab_size(self) -> int:
        return self.library.get_vocab_size()

    @property
    def separator(self) -> int:
        return self.vocab_size - 1

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens]."""
        parts = [np.zeros(0, np.uint16)]
        for batch in _batches((piece, last) for text in texts for piece, last in _pieces(text)):
            encodings = self.library.encode_batch_fast([piece for piece, _ in batch])
            for encoding, (_, last) in zip(encodings, batch):
                parts.append(np.array(encoding.ids + [self.separator] * last, np.uint16))
        return np.concatenate(parts)

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without separators; bytes cut in the middle of a character become U+FFFD."""
        return self.library.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        return self.library.to_str()


Tokenizer = Bytes | Bpe


def check(name: str) -> int | None:
    """The vocabulary asked for by "bpe-<vocabulary>"; None for "bytes".

    Raises:
      ValueError: `name` is neither, or the vocabulary is out of range.
    """
    if name == "bytes":
        return None
    match = re.fullmatch(r"bpe-(\d+)", name)
    if match is None:
        raise ValueError(f'tokenizer {name!r} is neither "bytes" nor "bpe-<size>" as in "bpe-4096"')
    size = int(match[1])
    if not SMALLEST <= size <= LARGEST:
        nearest = min(max(size, SMALLEST), LARGEST)
        raise ValueError(
            f"tokenizer {name!r}: a vocabulary has {SMALLEST} to {LARGEST} tokens; "
            f'nearest: "bpe-{nearest}"'
        )
    return size


def learn(name: str, texts: Collection[str]) -> Tokenizer:
    """The tokenizer called `name`, learned from `texts`.

    Little text has few pairs to merge: the vocabulary can then stay smaller than asked for.
    """
    size = check(name)
    if size is None:
        return Bytes()
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


def restore(name: str, json: str) -> Tokenizer:
    """The tokenizer that `to_json` described."""
    if check(name) is None:
        return Bytes()
    library = Library.from_str(json)
    # A text that spells the separator is text.
    library.encode_special_tokens = True
    return Bpe(library)


def version(name: str) -> str:
    """What, beside the text, the tokens depend on."""
    return name if check(name) is None else f"{name}-tokenizers-{tokenizers.__version__}"


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
