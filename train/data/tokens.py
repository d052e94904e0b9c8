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
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import Tokenizer as Library

SMALLEST, LARGEST = 512, 65_536  # sizes of learned vocabularies
LEARN_FROM = 32_000_000  # characters; longer texts are sampled evenly, which is faster and as good
PIECE = 1_000_000  # characters encoded at once; the library needs about 50 bytes for each
SEPARATOR = "<|end of text|>"
INSTEAD = (
    "SentencePiece models are not supported. The package transformers converts them to tokenizer.json:"
    " AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
)
# End-of-text tokens that are tried if a vocabulary does not specify one.
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", SEPARATOR)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Each byte of UTF-8 is a token."""

    name: str = "bytes"
    vocab_size: int = 257
    separator: int = 256

    def each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of each text, with the separator; uint16 [tokens]."""
        end = np.array([self.separator], np.uint16)
        for text in texts:
            yield np.concatenate([np.frombuffer(text.encode(), np.uint8).astype(np.uint16), end])

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """All texts, each followed by the separator; uint16 [tokens]."""
        return np.concatenate([*self.each(texts), np.zeros(0, np.uint16)])

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
        letter = "a"
        plain = self.library.encode(letter, add_special_tokens=False).ids
        whole = self.library.encode(letter, add_special_tokens=True).ids
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    def each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of each text, with the separator; uint16 [tokens], or uint32 for large vocabularies."""
        kind, parts = token_dtype(self.vocab_size), []
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
        """All texts, each followed by the separator; uint16 [tokens], or uint32 for large vocabularies."""
        return np.concatenate([*self.each(texts), np.zeros(0, token_dtype(self.vocab_size))])

    def _pieces(self, text: str) -> Iterable[tuple[str, bool]]:
        return _pieces(text) if self.cut else [(text, True)]

    def decode(self, tokens: np.ndarray) -> str:
        """Tokens to text, without separators. Incomplete characters become U+FFFD."""
        return self.library.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        return self.library.to_str()


Tokenizer = Bytes | Subwords


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
        path = pathlib.Path(name).expanduser()
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
    pieces = (piece for text in texts for piece, _ in _pieces(text))
    every = 1 + sum(map(len, texts)) // LEARN_FROM
    library.train_from_iterator(itertools.islice(pieces, 0, None, every), trainer)
    library.add_special_tokens([SEPARATOR])
    return tokenizer_from_json(name, library.to_str())


def tokenizer_from_json(name: str, json: str, separator: int | None = None) -> Tokenizer:
    """Restores a tokenizer from the result of `to_json`. Without a `separator`, its highest token is the separator."""
    if not json:
        return Bytes()
    library = Library.from_str(json)
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
    # Some vocabulary files enable these; here, documents are truncated and padded when batches are made.
    library.no_truncation()
    library.no_padding()
    return tokenizer_from_json(folder.resolve().name, library.to_str(), library.token_to_id(end))  # type: ignore[return-value]


def _end(library: Library, folder: pathlib.Path, end: str | None) -> str:
    """The end-of-text token; see `read_vocabulary`."""
    if end is None and (config := folder / "tokenizer_config.json").is_file():
        try:
            end = dict(json.loads(config.read_bytes())).get("eos_token")
        except (ValueError, TypeError) as error:
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


def tokenizer_version(name: str) -> str:
    """Identifies everything that the tokens depend on, apart from the text."""
    kind = parse_name(name)
    if isinstance(kind, pathlib.Path):
        vocabulary = read_vocabulary(kind)
        content = f"{vocabulary.separator}\0{vocabulary.to_json()}"
        name = f"given-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    return name if kind is None else f"{name}-tokenizers-{tokenizers.__version__}"


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Divides a text at the first end of line after every `PIECE` characters; yields (piece, whether it is last)."""
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
