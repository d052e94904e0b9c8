"""Batches of tokens that are a pure function of (seed, step).

No position is stored: any process can make any rows of any step, so a run sees the same data after a restart and on
another number of devices. The training text is one long sequence of tokens, divided into windows of `length`
predictions, or into its documents. An epoch visits every window or document once, in an order that depends on
(seed, epoch).
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shlex
import uuid
import warnings
from typing import Any

import numpy as np

from train import disk
from train.data import corpus, hugging_face_sets, token_store, tokens
from train.display import Counter
from train.errors import UserError

FORMAT = 1  # version of the cache; caches of other versions are ignored
SEAL = "sha256.json"  # digests of the other files of a cache entry; written last
STORE = "store:"  # prefix of a token store's folder
PADDING = -1  # fills batches of single documents
VERIFIED = 1 << 30  # bytes; the digests of stores up to this size are verified before use
SHOWN = 20_000_000  # characters; encoding longer texts shows its progress
SAMPLED = 10_000_000  # tokens that token frequencies are counted over, spread evenly


@dataclasses.dataclass(frozen=True)
class TokenBatches:
    """Training and held-out tokens, and how to make batches of them."""

    train: token_store.TokenSequence
    held: token_store.TokenSequence  # held out
    tokenizer: tokens.Tokenizer
    corpus: corpus.Corpus | token_store.Store  # the source of the tokens
    length: int  # predictions per sequence
    batch_size: int  # sequences per step, over all processes
    seed: int
    cache: str  # "off", "new", "reused", or "rebuilt" after damage
    digests: dict[str, str]  # SHA-256 of what the batches depend on, by what it is; hexadecimal
    documents: bool = False  # each sequence is one document, truncated or filled with PADDING

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens and of what they stand for; hexadecimal.

        It depends on everything that makes the tokens by its effect: the text and its division, the vocabulary, its
        rules, the end of text, and the version of the library. The digest of a store is that of its manifest.
        """
        if len(self.digests) == 1:
            return next(iter(self.digests.values()))
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of held-out text per held-out token (separators are tokens without bytes).

        A loss of x nats per token is x / (ln 2 · bytes_per_token) bits per byte.
        """
        return self.corpus.held_out_bytes / len(self.held)

    @property
    def windows(self) -> int:
        """Sequences in an epoch."""
        if self.documents:
            return self.train.documents
        return max(1, (len(self.train) - 1) // self.length - 1)

    @property
    def steps_per_epoch(self) -> float:
        return self.windows / self.batch_size

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a training batch."""
        return (self.batch_size, self.length + 1)

    def batch(self, step: int, rows: slice | None = None) -> np.ndarray:
        """Tokens of one training step.

        Args:
          step: from 0.
          rows: the rows that this process needs; None makes the whole batch.

        Returns:
          int32 [rows, length + 1]: inputs `[:, :-1]` and targets `[:, 1:]`.
        """
        return self._rows(step * self.batch_size + np.arange(self.batch_size)[rows or slice(None)])

    def batches(self, start: int, stop: int) -> np.ndarray:
        """`batch` of the steps from `start` up to `stop`, int32 [steps, rows, length + 1]; faster than one by one."""
        numbers = self._rows(np.arange(start * self.batch_size, stop * self.batch_size))
        return numbers.reshape(stop - start, *self.shape)

    def _rows(self, row: np.ndarray) -> np.ndarray:
        """The rows of these numbers; the rows of all batches, one after the other, are numbered from 0."""
        epoch, position = np.divmod(row, self.windows)
        number, offset = np.empty_like(row), np.empty_like(row)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            number[here] = permutation(position[here], self.windows, (self.seed, e))
            offset[here] = 0 if self.documents else self._offset(e)
        if self.documents:
            return self._checked(self.train.padded_documents(number, self.length + 1, PADDING))
        return self._checked(self.train.windows(offset + self.length * number, self.length + 1))

    def _checked(self, numbers: np.ndarray) -> np.ndarray:
        """The tokens, all of which are in the vocabulary: large stores are not verified before they are used.

        Raises:
          UserError: the store is damaged. A model would take another token instead, without a word.
        """
        low = PADDING if self.documents else 0
        wrong = numbers[(numbers >= self.vocab_size) | (numbers < low)]
        if wrong.size:
            raise UserError(
                f"{self.corpus.source}: token {int(wrong[0]) % 2**32} is not in the vocabulary, which ends at"
                f" {self.vocab_size - 1}, so the store is damaged. Find the file with python -m train tokenise --verify"
                " True --out FOLDER."
            )
        return numbers

    def _offset(self, epoch: int) -> int:
        """Start of the first window of an epoch. It differs between epochs, so that windows do too."""
        room = len(self.train) - 1 - self.length * self.windows
        number = hashlib.sha256(repr(("offset", self.seed, epoch)).encode()).digest()
        return int.from_bytes(number[:8], "big") % min(self.length, room + 1)

    def held_out(self, batches: int) -> list[np.ndarray]:
        """Evaluation batches, spread evenly over the held-out text; the same at every call.

        Args:
          batches: number of batches. A short held-out text gives fewer, but at least one. Windows overlap, or
            documents repeat, only if the text is too short for one batch.

        Returns:
          int32 [batch_size, length + 1] each.
        """
        available = self.held.documents if self.documents else (len(self.held) - 1) // self.length
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        batches = min(batches, max(1, available // self.batch_size))
        last = available - 1 if self.documents else len(self.held) - 1 - self.length
        chosen = np.linspace(0, last, batches * self.batch_size).astype(np.int64)
        make = (
            functools.partial(self.held.padded_documents, length=self.length + 1, fill=PADDING)
            if self.documents
            else functools.partial(self.held.windows, length=self.length + 1)
        )
        return [self._checked(make(part)) for part in chosen.reshape(batches, self.batch_size)]

    def unigram_entropy(self) -> float:
        """Loss of a model that knows only the frequency of each token in the training text [nats per token].

        A model with a lower loss has learned something about the order of tokens. Long texts are sampled.
        """
        train, held = (self._checked(part.sample(SAMPLED)) for part in (self.train, self.held))
        counts = np.bincount(train, minlength=self.vocab_size) + 1.0
        return float(-np.log(counts / counts.sum())[held].mean())

    def decode(self, numbers: np.ndarray) -> str:
        """Tokens to text."""
        return self.tokenizer.decode(numbers)

    def summary(self) -> dict[str, Any]:
        """Facts to print and to store; JSON values only."""
        source = self.corpus
        left_out = {}
        if isinstance(source, corpus.Corpus):
            left_out = {"files_skipped": source.skipped, "files_repaired": source.repaired}
        return {
            "source": source.source,
            "digest": self.digest,
            "digests": self.digests,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.vocab_size,
            "documents": self.train.documents + self.held.documents,
            **left_out,
            "train_bytes": source.train_bytes,
            "held_out_bytes": source.held_out_bytes,
            "train_tokens": len(self.train),
            "held_out_tokens": len(self.held),
            "bytes_per_token": self.bytes_per_token,
            "unigram_entropy": self.unigram_entropy(),
            "steps_per_epoch": self.steps_per_epoch,
            "cache": self.cache,
        }


def load_text(
    text: str = "stdlib",
    tokenizer: str = "bpe-4096",
    *,
    length: int,
    batch_size: int,
    seed: int,
    documents: bool = False,
    cache: pathlib.Path | None = None,
) -> TokenBatches:
    """Reads and encodes a text, or opens a token store.

    Args:
      text: a source as for `corpus.read_corpus`, or "store:" and the folder of a token store, whose vocabulary
        then replaces `tokenizer`.
      tokenizer: "bytes"; "bpe-<vocabulary size>", learned from the training part of the text; or the path of a
        vocabulary.
      length: predictions per sequence [tokens].
      batch_size: sequences per step, over all processes.
      seed: of the order of the sequences.
      documents: whether each sequence is one document.
      cache: folder that keeps vocabulary and tokens for the next start; None switches the cache off.

    Raises:
      FileNotFoundError: there is no such text or store.
      ValueError: the text is too short, the store is damaged, or an argument is out of range.
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if text.startswith(STORE):
        store = token_store.open_store(text.removeprefix(STORE))
        if store.size <= VERIFIED:
            store.verify()
        made = TokenBatches(
            *(store.train, store.held_out, store.tokenizer, store, length, batch_size, seed),
            cache="off",
            digests={"store": store.digest},
            documents=documents,
        )
    else:
        made = _from_text(text, tokenizer, length, batch_size, seed, documents, cache)
    for part, row in (("training", made.train), ("held-out", made.held)):
        if not row.documents or (not documents and len(row) <= length):
            shorter = f", or a length of at most {len(row) - 1}" if len(row) > 1 else ""
            raise ValueError(
                f"{text!r} is too short: its {part} part has {len(row)} tokens, and one sequence of"
                f" length={length} needs {length + 1}; give more text{shorter}"
            )
    return made


def _from_text(
    text: str,
    tokenizer: str,
    length: int,
    batch_size: int,
    seed: int,
    documents: bool,
    cache: pathlib.Path | None,
) -> TokenBatches:
    given = tokens.given_vocabulary(tokenizer)
    if text.startswith("tfds:"):
        raise ValueError(
            f"{disk.shortened(text)} is a tfds data set. Tokenise it once, with python -m train tokenise --source"
            f" {shlex.quote(disk.shortened(text))}"
            f" --out FOLDER, and then train with --data.text {STORE}FOLDER"
        )
    read = hugging_face_sets if hugging_face_sets.is_source(text) else corpus
    source = read.read_corpus(text)
    entry = None
    if cache is not None:
        # Another version of this program may split a text differently.
        parts = {name: len(part) for name, part in source.held_out.items()}
        key = hashlib.sha256(repr((FORMAT, source.digest, parts)).encode()).hexdigest()
        entry = disk.user_path(cache) / f"{key[:16]}-{tokens.tokenizer_version(tokenizer, given)}"
    learned, train, held, state = _encode(source, tokenizer, given, entry)
    rows = [token_store.TokenSequence.from_array(part, learned.separator) for part in (train, held)]
    digests = {
        "text": source.digest,
        "vocabulary": tokens.vocabulary_digest(learned),
        "training tokens": hashlib.sha256(train).hexdigest(),
        "held-out tokens": hashlib.sha256(held).hexdigest(),
    }
    return TokenBatches(
        *(rows[0], rows[1], learned, source, length, batch_size, seed, state, digests, documents)
    )


def permutation(index: np.ndarray, size: int, key: object) -> np.ndarray:
    """Values of a pseudo-random permutation of `size` items at some indices, without computing all of it.

    A Feistel network on pairs of digits below ceil(√size) permutes slightly more than `size` numbers. A result that
    is too large goes through the network again until it is below `size`.

    Args:
      index: integers below `size`.
      size: number of items.
      key: selects the permutation; any value with a stable `repr`.

    Returns:
      Integers below `size`, shaped like `index`; different for different indices.
    """
    base = np.uint64(math.isqrt(size - 1) + 1)
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode()).digest(), "<u8")

    def network(number: np.ndarray) -> np.ndarray:
        left, right = np.divmod(number, base)
        for round_key in keys:
            left, right = right, (left + _mix(right + round_key) % base) % base
        return left * base + right

    result = network(index.astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = network(result[outside])
    return result.astype(np.int64)


def _mix(number: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def _encode(
    source: corpus.Corpus, name: str, given: tokens.Subwords | None, entry: pathlib.Path | None
) -> tuple[tokens.Tokenizer, np.ndarray, np.ndarray, str]:
    """Tokenizer, training tokens, held-out tokens, and the status of the cache."""
    state = "off" if entry is None else "rebuilt" if (entry / SEAL).exists() else "new"
    files = None if entry is None else _read_cache(entry)
    if files is not None:
        learned = given or tokens.tokenizer_from_json(name, files["tokenizer.json"].decode())
        kind = tokens.token_dtype(learned.vocab_size)
        train, held = (np.frombuffer(files[part], kind) for part in ("train", "held_out"))
        return learned, train, held, "reused"
    learned = given or tokens.learn_tokenizer(name, source.train.values())
    parts = (source.train, source.held_out)
    total = sum(len(text) for part in parts for text in part.values())
    with Counter("encoding", "characters", total if total > SHOWN else 0) as counter:
        advance = counter.advance if total > SHOWN else lambda count: None
        train, held = (learned.encode(part.values(), advance) for part in parts)
    if entry is not None:
        files = {"tokenizer.json": learned.to_json().encode()}
        files |= {"train": train.tobytes(), "held_out": held.tobytes()}
        try:
            _write_cache(entry, files)
        except OSError as error:
            warnings.warn(f"the tokens are not cached in {entry}: {error}", stacklevel=3)
            state = "off"
    return learned, train, held, state


def _write_cache(entry: pathlib.Path, files: dict[str, bytes]) -> None:
    """Writes each file atomically, and the seal last, so that a reader sees a complete entry or none."""
    entry.mkdir(parents=True, exist_ok=True)
    seal = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in {**files, SEAL: json.dumps(seal).encode()}.items():
        unfinished = entry / f"{name}.{uuid.uuid4().hex}.tmp"
        unfinished.write_bytes(content)
        os.replace(unfinished, entry / name)


def _read_cache(entry: pathlib.Path) -> dict[str, bytes] | None:
    """The files of a cache entry; None if the seal or a file is missing, or a digest differs."""
    wanted = ("tokenizer.json", "train", "held_out")
    try:
        seal = json.loads(disk.read_json_text(entry / SEAL))
        files = {name: disk.read_file(entry / name) for name in wanted}
        intact = all(hashlib.sha256(files[name]).hexdigest() == seal[name] for name in wanted)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return files if intact else None
