"""Batches of tokens that are a pure function of (seed, step).

Nothing here remembers a position: any process can make any rows of any step, so a run that is
resumed, or spread over another number of devices, sees the same data. The training text is one
long row of tokens, cut into windows of `length` predictions, or into its documents; an epoch visits
every window or document once, in an order that depends on (seed, epoch).
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import uuid
import warnings
from typing import Any

import numpy as np

from train.data import corpus, token_store, tokens

FORMAT = 1  # of the cache; a new number leaves old caches unread
SEAL = "sha256.json"  # digests of the other files of a cache entry, written last
STORE = "store:"  # before the folder of a token store
PADDING = -1  # in batches of single documents: no token
VERIFIED = 1 << 30  # bytes; a smaller store is read and compared with its digests before use
SAMPLED = 10_000_000  # tokens that frequencies are counted over, spread evenly


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokens to train on and to evaluate on, and what is known about them."""

    train: token_store.Row
    held: token_store.Row  # held out
    tokenizer: tokens.Tokenizer
    corpus: corpus.Corpus | token_store.Store  # where the tokens come from
    length: int  # predictions per sequence
    batch_size: int  # sequences per step, over all processes
    seed: int
    cache: str  # "off", "new", "reused" or "rebuilt" (it was damaged)
    documents: bool = False  # a sequence is a document, cut or filled with PADDING

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of all files, or of the store; hexadecimal."""
        return self.corpus.digest

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
        """Of a training batch."""
        return (self.batch_size, self.length + 1)

    def batch(self, step: int, rows: slice | None = None) -> np.ndarray:
        """Tokens of one training step.

        Args:
          step: from 0.
          rows: the part of the batch to make, for a process that needs no more; None is all.

        Returns:
          int32 [rows, length + 1]: inputs `[:, :-1]` and targets `[:, 1:]`.
        """
        row = np.arange(self.batch_size)[slice(None) if rows is None else rows]
        epoch, position = np.divmod(step * self.batch_size + row, self.windows)
        number, offset = np.empty_like(row), np.empty_like(row)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            number[here] = permutation(position[here], self.windows, (self.seed, e))
            offset[here] = 0 if self.documents else self._offset(e)
        if self.documents:
            return self.train.cut(number, self.length + 1, PADDING)
        return self.train.windows(offset + self.length * number, self.length + 1)

    def _offset(self, epoch: int) -> int:
        """Where the first window of an epoch begins: other epochs cut the text elsewhere."""
        room = len(self.train) - 1 - self.length * self.windows
        number = hashlib.sha256(repr(("offset", self.seed, epoch)).encode()).digest()
        return int.from_bytes(number[:8], "big") % min(self.length, room + 1)

    def held_out(self, batches: int) -> list[np.ndarray]:
        """The same evaluation batches at every call, spread evenly over the held-out text.

        Args:
          batches: how many are wanted. A short held-out text gives fewer, at least one; only
            when it is too short for one batch do windows overlap, or documents repeat.

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
            functools.partial(self.held.cut, length=self.length + 1, fill=PADDING)
            if self.documents
            else functools.partial(self.held.windows, length=self.length + 1)
        )
        return [make(part) for part in chosen.reshape(batches, self.batch_size)]

    def unigram_entropy(self) -> float:
        """Loss, in nats per token, of knowing only how frequent each token is in training.

        A model below it has learned something about the order of the tokens. Much text is sampled.
        """
        counts = np.bincount(self.train.sample(SAMPLED), minlength=self.vocab_size) + 1.0
        return float(-np.log(counts / counts.sum())[self.held.sample(SAMPLED)].mean())

    def decode(self, numbers: np.ndarray) -> str:
        """The text of some tokens."""
        return self.tokenizer.decode(numbers)

    def summary(self) -> dict[str, Any]:
        """What to print and to store: JSON values only."""
        found = self.corpus
        left_out = {}
        if isinstance(found, corpus.Corpus):
            left_out = {"files_skipped": found.skipped, "files_repaired": found.repaired}
        return {
            "source": found.source,
            "digest": self.digest,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.vocab_size,
            "documents": self.train.documents + self.held.documents,
            **left_out,
            "train_bytes": found.train_bytes,
            "held_out_bytes": found.held_out_bytes,
            "train_tokens": len(self.train),
            "held_out_tokens": len(self.held),
            "bytes_per_token": self.bytes_per_token,
            "unigram_entropy": self.unigram_entropy(),
            "steps_per_epoch": self.steps_per_epoch,
            "cache": self.cache,
        }


def load(
    text: str = "stdlib",
    tokenizer: str = "bpe-4096",
    *,
    length: int,
    batch_size: int,
    seed: int,
    documents: bool = False,
    cache: pathlib.Path | None = None,
) -> Data:
    """Reads and encodes a corpus, or opens one that is encoded already.

    Args:
      text: see `train.corpus.read`; or "store:" and the folder of a token store, whose vocabulary
        then stands in place of `tokenizer`.
      tokenizer: "bytes", "bpe-<vocabulary>", learned from the training part of the text, or the
        path of a given vocabulary.
      length: predictions per sequence, in tokens.
      batch_size: sequences per step, over all processes.
      seed: of the order of the sequences.
      documents: whether each sequence is one document.
      cache: folder in which vocabulary and tokens are kept for the next start; None: nowhere.

    Raises:
      FileNotFoundError, ValueError: no text, too little of it, a damaged store, or an argument out
        of range.
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if text.startswith(STORE):
        store = token_store.open_store(text.removeprefix(STORE))
        if store.size <= VERIFIED:
            store.verify()
        made = Data(
            *(store.train, store.held_out, store.tokenizer, store, length, batch_size, seed),
            cache="off",
            documents=documents,
        )
    else:
        made = _from_text(text, tokenizer, length, batch_size, seed, documents, cache)
    for part, row in (("training", made.train), ("held-out", made.held)):
        if not row.documents or (not documents and len(row) <= length):
            shorter = f", or a length of at most {len(row) - 1}" if len(row) > 1 else ""
            raise ValueError(
                f"too little text in {text!r}: its {part} part has {len(row)} tokens, and one "
                f"sequence of length={length} needs {length + 1}; give more text{shorter}"
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
) -> Data:
    tokens.check(tokenizer)
    if text.startswith("tfds:"):
        raise ValueError(
            f"{text!r} is a prepared data set, which is tokenised once before it is trained on: python"
            f" -m train tokenise --source {text} --out FOLDER, and then --data.text {STORE}FOLDER"
        )
    found = corpus.read(text)
    entry = None
    if cache is not None:
        # The way a text is split may change from one version of this program to the next.
        parts = {name: len(part) for name, part in found.held_out.items()}
        key = hashlib.sha256(repr((FORMAT, found.digest, parts)).encode()).hexdigest()
        entry = pathlib.Path(cache).expanduser() / f"{key[:16]}-{tokens.version(tokenizer)}"
    learned, train, held, state = _encode(found, tokenizer, entry)
    rows = [token_store.Row.of(part, learned.separator) for part in (train, held)]
    return Data(rows[0], rows[1], learned, found, length, batch_size, seed, state, documents)


def permutation(index: np.ndarray, size: int, key: object) -> np.ndarray:
    """Where a shuffle of `size` things puts those at `index`, without making the shuffle.

    A Feistel network on pairs of digits below ceil(√size) shuffles a few numbers too many; one
    that lands on a number that is too large is sent through again until it does not.

    Args:
      index: integers below `size`.
      size: how many things are shuffled.
      key: which shuffle; anything with a fixed `repr`.

    Returns:
      Different integers below `size` for different indices, shaped like `index`.
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
    """The finaliser of splitmix64: every bit of uint64 depends on every bit."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def _encode(
    found: corpus.Corpus, name: str, entry: pathlib.Path | None
) -> tuple[tokens.Tokenizer, np.ndarray, np.ndarray, str]:
    """Tokenizer, training tokens, held-out tokens, and what the cache had to do with it."""
    state = "off" if entry is None else "rebuilt" if (entry / SEAL).exists() else "new"
    files = None if entry is None else _read_cache(entry)
    if files is not None:
        kept = files["tokenizer.json"].decode()
        learned = (
            tokens.learn(name, ())
            if isinstance(tokens.check(name), pathlib.Path)
            else tokens.restore(name, kept)
        )
        kind = tokens.dtype(learned.vocab_size)
        train, held = (np.frombuffer(files[part], kind) for part in ("train", "held_out"))
        return learned, train, held, "reused"
    learned = tokens.learn(name, found.train.values())
    train, held = (learned.encode(part.values()) for part in (found.train, found.held_out))
    if entry is not None:
        files = {"tokenizer.json": learned.to_json().encode()}
        files |= {"train": train.tobytes(), "held_out": held.tobytes()}
        try:
            _write_cache(entry, files)
        except OSError as error:
            warnings.warn(f"the tokens are not kept in {entry}: {error}", stacklevel=3)
            state = "off"
    return learned, train, held, state


def _write_cache(entry: pathlib.Path, files: dict[str, bytes]) -> None:
    """Whole files only, and the seal after all others: a reader sees everything or nothing."""
    entry.mkdir(parents=True, exist_ok=True)
    seal = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in {**files, SEAL: json.dumps(seal).encode()}.items():
        unfinished = entry / f"{name}.{uuid.uuid4().hex}.tmp"
        unfinished.write_bytes(content)
        os.replace(unfinished, entry / name)


def _read_cache(entry: pathlib.Path) -> dict[str, bytes] | None:
    """The sealed files; None where there is no seal, or one is missing or not as sealed."""
    try:
        seal = json.loads((entry / SEAL).read_bytes())
        files = {name: (entry / name).read_bytes() for name in seal}
    except (OSError, ValueError):
        return None
    intact = all(hashlib.sha256(files[name]).hexdigest() == seal[name] for name in files)
    return files if intact and {"tokenizer.json", "train", "held_out"} <= set(files) else None
