"""Batches of tokens that are a pure function of (seed, step).

Nothing here remembers a position: any process can make any rows of any step, so a run that is
resumed, or spread over another number of devices, sees the same data. The training text is one
long row of tokens, cut into windows of `length` predictions; an epoch visits every window once,
in an order that depends on (seed, epoch).
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import uuid
import warnings
from typing import Any

import numpy as np

from train import corpus, tokens

FORMAT = 1  # of the cache; a new number leaves old caches unread
SEAL = "sha256.json"  # digests of the other files of a cache entry, written last


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokens to train on and to evaluate on, and what is known about them."""

    train: np.ndarray  # uint16 [tokens]
    held: np.ndarray  # uint16 [tokens], held out
    tokenizer: tokens.Tokenizer
    corpus: corpus.Corpus
    length: int  # predictions per sequence
    batch_size: int  # sequences per step, over all processes
    seed: int
    cache: str  # "off", "new", "reused" or "rebuilt" (it was damaged)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of all files, hexadecimal."""
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
        return max(1, (len(self.train) - 1) // self.length - 1)

    @property
    def steps_per_epoch(self) -> float:
        return self.windows / self.batch_size

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
        start = np.empty_like(row)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            window = permutation(position[here], self.windows, (self.seed, e))
            start[here] = self._offset(e) + self.length * window
        return _windows(self.train, start, self.length)

    def _offset(self, epoch: int) -> int:
        """Where the first window of an epoch begins: other epochs cut the text elsewhere."""
        room = len(self.train) - 1 - self.length * self.windows
        number = hashlib.sha256(repr(("offset", self.seed, epoch)).encode()).digest()
        return int.from_bytes(number[:8], "big") % min(self.length, room + 1)

    def held_out(self, batches: int) -> list[np.ndarray]:
        """The same evaluation batches at every call, spread evenly over the held-out text.

        Args:
          batches: how many are wanted. A short held-out text gives fewer, at least one; only
            when it is too short for one batch do windows overlap.

        Returns:
          int32 [batch_size, length + 1] each.
        """
        available = (len(self.held) - 1) // self.length
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        batches = min(batches, max(1, available // self.batch_size))
        last = len(self.held) - 1 - self.length
        starts = np.linspace(0, last, batches * self.batch_size).astype(np.int64)
        return [
            _windows(self.held, start, self.length)
            for start in starts.reshape(batches, self.batch_size)
        ]

    def unigram_entropy(self) -> float:
        """Loss, in nats per token, of knowing only how frequent each token is in training.

        A model below it has learned something about the order of the tokens.
        """
        counts = np.bincount(self.train, minlength=self.vocab_size) + 1.0
        return float(-np.log(counts / counts.sum())[self.held].mean())

    def decode(self, numbers: np.ndarray) -> str:
        """The text of some tokens."""
        return self.tokenizer.decode(numbers)

    def summary(self) -> dict[str, Any]:
        """What to print and to store: JSON values only."""
        return {
            "source": self.corpus.source,
            "digest": self.digest,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.vocab_size,
            "files": self.corpus.files,
            "files_skipped": self.corpus.skipped,
            "files_repaired": self.corpus.repaired,
            "train_bytes": self.corpus.train_bytes,
            "held_out_bytes": self.corpus.held_out_bytes,
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
    cache: pathlib.Path | None = None,
) -> Data:
    """Reads and encodes a corpus.

    Args:
      text: see `train.corpus.read`.
      tokenizer: "bytes", or "bpe-<vocabulary>", learned from the training part of the text.
      length: predictions per sequence, in tokens.
      batch_size: sequences per step, over all processes.
      seed: of the order of the windows.
      cache: folder in which vocabulary and tokens are kept for the next start; None: nowhere.

    Raises:
      FileNotFoundError, ValueError: no text, too little of it, or an argument out of range.
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    tokens.check(tokenizer)
    found = corpus.read(text)
    entry = None
    if cache is not None:
        # The way a text is split may change from one version of this program to the next.
        parts = {name: len(part) for name, part in found.held_out.items()}
        key = hashlib.sha256(repr((FORMAT, found.digest, parts)).encode()).hexdigest()
        entry = pathlib.Path(cache).expanduser() / f"{key[:16]}-{tokens.version(tokenizer)}"
    learned, train, held, state = _encode(found, tokenizer, entry)
    for part, numbers in (("training", train), ("held-out", held)):
        if len(numbers) <= length:
            raise ValueError(
                f"too little text in {text!r}: its {part} part has {len(numbers)} tokens, and one "
                f"sequence of length={length} needs {length + 1}; give more text, or a length of "
                f"at most {len(numbers) - 1}"
            )
    return Data(train, held, learned, found, length, batch_size, seed, state)


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


def _windows(numbers: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
    return numbers[start[:, None] + np.arange(length + 1)].astype(np.int32)


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
